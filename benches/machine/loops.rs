//! Guest instructions a second: the loops of the guest program `bench`, and the same machine code
//! natively.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use trapgate_vmm::{EngineChoice, EngineKind, Hooks, Machine, MachineConfig, Outcome};

use crate::Failure;
use crate::child::{Values, run_all};
use crate::figure::{Promise, Report};

#[path = "../../guests/programs/bench/loops.rs"]
#[allow(unsafe_code)]
mod code;

/// The child that runs the guest.
pub(crate) const CHILD: &str = "loops";

/// Loops that make up the promised figure; the others are of another kind, or wait for something else.
const INTEGER: [&str; 7] = [
    "alu", "memory", "calls", "branches", "flags", "pages", "sieve",
];

/// How long the guest may take.
const LIMIT: Duration = Duration::from_secs(600);

/// Passes on the host, which are short; the first, which finds cold caches, does not count.
const HOST_PASSES: usize = 6;

pub(crate) fn measure(runs: usize, report: &mut Report) -> Result<(), Failure> {
    let guest = run_all(CHILD, runs)?;
    let host = natively();
    let unit = "million instructions/s";
    let instructions = sums(&guest, "instructions", &INTEGER);
    let rates: Vec<f64> = instructions
        .zip(sums(&guest, "seconds", &INTEGER))
        .map(|(instructions, seconds)| instructions / seconds / 1e6)
        .collect();
    let native = INTEGER.iter().filter_map(|name| host.get(name));
    let (instructions, seconds) = native.fold((0.0, 0.0), |(instructions, seconds), native| {
        (instructions + native.instructions, seconds + native.seconds)
    });
    report.promised(
        "integer loops together",
        unit,
        &rates,
        Some(Promise::AtLeast(40.0)),
        Some(instructions / seconds / 1e6),
    );
    for name in INTEGER.into_iter().chain(["vector", "copy", "ports"]) {
        let Some(rates) = guest.get(&format!("{name}.rate")) else {
            return Err(format!("the guest did not report `{name}`").into());
        };
        let native = host.get(name);
        if let (Some(native), Some(results)) = (native, guest.get(&format!("{name}.result"))) {
            // Half of the checksum, which is what a float holds exactly.
            let right = f64::from(native.result as u32);
            if results.iter().any(|result| *result != right) {
                return Err(format!("`{name}` computed something else in the guest").into());
            }
        }
        let native = native.map(|native| native.instructions / native.seconds / 1e6);
        report.promised(format!("  {name}"), unit, rates, None, native);
    }
    Ok(())
}

/// By run: what the loops of `names` have in `field`, summed up.
fn sums<'a>(
    guest: &'a BTreeMap<String, Vec<f64>>,
    field: &'a str,
    names: &'a [&str],
) -> impl Iterator<Item = f64> + 'a {
    let runs = guest.values().map(Vec::len).min().unwrap_or(0);
    (0..runs).map(move |run| {
        let of = |name: &&str| {
            guest
                .get(&format!("{name}.{field}"))
                .map_or(f64::NAN, |all| all[run])
        };
        names.iter().map(of).sum()
    })
}

/// A loop on the host.
struct Native {
    instructions: f64,
    /// The median of the passes.
    seconds: f64,
    result: u64,
}

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Runs the loops on the host. All but the one that needs a port.
#[allow(unsafe_code)]
fn natively() -> BTreeMap<&'static str, Native> {
    eprintln!("loops: on the host");
    let mut memory = vec![Page([0; 4096]); code::MEMORY_SIZE / 4096];
    let begun = Instant::now();
    let now = || begun.elapsed().as_nanos() as u64;
    let mut passes: BTreeMap<&'static str, Vec<code::Measured>> = BTreeMap::new();
    for _ in 0..HOST_PASSES {
        memory.fill(Page([0; 4096]));
        let bytes = memory.as_mut_ptr().cast();
        // SAFETY: the memory has the size and alignment, is zeros, and is ours alone; no port is
        // written; this is the only thread.
        unsafe {
            code::run_all(
                bytes,
                |rounds| rounds,
                false,
                now,
                |measured| {
                    passes.entry(measured.name).or_default().push(measured);
                },
            );
        }
    }
    let native = |mut passes: Vec<code::Measured>| {
        passes.remove(0);
        passes.sort_by_key(|pass| pass.ticks);
        let pass = &passes[passes.len() / 2];
        Native {
            instructions: pass.instructions as f64,
            seconds: pass.ticks as f64 / 1e9,
            result: pass.result,
        }
    };
    passes
        .into_iter()
        .map(|(name, passes)| (name, native(passes)))
        .collect()
}

/// Runs the guest program.
pub(crate) fn child() -> Result<Values, Failure> {
    let program = trapgate_guests::named("bench").ok_or("there is no guest `bench`")?;
    let output = Arc::new(Mutex::new(Vec::new()));
    let lock = |output: &Mutex<Vec<u8>>| {
        output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    };
    let sink = Arc::clone(&output);
    let hooks = Hooks {
        serial: Box::new(move |bytes| {
            let mut output = sink.lock().unwrap_or_else(PoisonError::into_inner);
            output.extend_from_slice(bytes);
        }),
        ..Hooks::default()
    };
    let config = MachineConfig {
        kernel: program.image.into(),
        engine: EngineChoice::Only(EngineKind::Interp),
        ..MachineConfig::default()
    };
    let machine = Machine::start(config, hooks)?;
    match machine.wait_for(LIMIT) {
        Some(Outcome::PoweredOff) => {}
        other => return Err(format!("the guest did not power off: {other:?}").into()),
    }
    let text = String::from_utf8(lock(&output))?;
    // What is wrong is not worth timing.
    trapgate_guests::check(program, &text)?;
    values(&text)
}

/// Reads `result NAME 0xN` and `bench NAME instructions=N ns=N …`.
fn values(text: &str) -> Result<Values, Failure> {
    let mut values = Values::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["result", name, number] => {
                let number = u64::from_str_radix(number.trim_start_matches("0x"), 16)?;
                values.insert(format!("{name}.result"), f64::from(number as u32));
            }
            ["bench", name, ref fields @ ..] => {
                let field = |wanted: &str| -> Result<f64, Failure> {
                    let text = fields.iter().find_map(|field| field.strip_prefix(wanted));
                    Ok(text.ok_or(format!("no {wanted} in `{line}`"))?.parse()?)
                };
                let (instructions, seconds) = (field("instructions=")?, field("ns=")? / 1e9);
                values.insert(format!("{name}.instructions"), instructions);
                values.insert(format!("{name}.seconds"), seconds);
                values.insert(format!("{name}.rate"), instructions / seconds / 1e6);
            }
            _ => {}
        }
    }
    Ok(values)
}
