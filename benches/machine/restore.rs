//! Saving a machine, and going on from a snapshot, by the command itself.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use trapgate_vmm::{
    EngineChoice, EngineKind, EngineReport, Hooks, Host, Machine, MachineConfig, engines,
};

use crate::Failure;
use crate::figure::{Promise, Report};
use crate::footprint::mib;

/// RAM of the guest, bytes.
const MEMORY: u64 = 1 << 30;
/// Pages that it touches: 100 MiB.
const TOUCHED: u32 = 25_600;
/// How long it may take to touch them.
const LIMIT: Duration = Duration::from_secs(60);

/// A multiboot kernel that touches [`TOUCHED`] pages from 2 MiB on, and then says dots on COM1 for ever.
fn guest() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    /// The addresses in the header count (Multiboot 0.6.96, 3.1.3).
    const FLAGS: u32 = 1 << 16;
    const LOAD: u32 = 0x10_0000;
    const HEADER: u32 = 32;
    let mut code = vec![0xbf, 0, 0, 0x20, 0, 0xb9]; // mov edi, 2 MiB; mov ecx,
    code.extend(TOUCHED.to_le_bytes());
    code.extend([0x89, 0x3f]); // mov [edi], edi
    code.extend([0x81, 0xc7, 0, 0x10, 0, 0]); // add edi, 4096
    code.extend([0x49, 0x75, 0xf5]); // dec ecx; jnz
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'.']); // mov dx, 0x3f8; mov al, '.'
    code.extend([0xee, 0xb9, 0, 4, 0, 0]); // out dx, al; mov ecx, 1024
    code.extend([0xe2, 0xfe, 0xeb, 0xf6]); // loop; jmp
    let end = LOAD + HEADER + code.len() as u32;
    let words = [
        MAGIC,
        FLAGS,
        MAGIC.wrapping_add(FLAGS).wrapping_neg(),
        LOAD,
        LOAD,
        end,
        end,
        LOAD + HEADER,
    ];
    let mut image: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    image.extend(code);
    image
}

pub(crate) fn measure(runs: usize, report: &mut Report) -> Result<(), Failure> {
    let program = program()?;
    // Beside the program, on a disk: what `/tmp` is differs from host to host.
    let above = program.parent().unwrap_or(Path::new("."));
    let directory = tempfile::tempdir_in(above)?;
    for EngineReport { kind, usable, .. } in engines(&Host::probe()) {
        // It is for finding faults, whatever that costs.
        if kind == EngineKind::Lockstep {
            continue;
        }
        let saved = directory.path().join(kind.name());
        let done = match usable {
            Ok(_) => measure_on(kind, &program, &saved, runs, report),
            Err(reason) => Err(reason.into()),
        };
        if let Err(error) = done {
            report.skip(&format!("restore on {kind}"), error.as_ref());
        }
    }
    Ok(())
}

fn measure_on(
    engine: EngineKind,
    program: &Path,
    saved: &Path,
    runs: usize,
    report: &mut Report,
) -> Result<(), Failure> {
    let (paused, bytes) = save(engine, saved)?;
    report.add(
        format!("save on {engine}: the guest stands still"),
        "ms",
        &[paused],
    );
    report.add(format!("save on {engine}: on the disk"), "MiB", &[bytes]);
    let (mut times, mut memory) = (Vec::new(), Vec::new());
    for _ in 0..runs.max(5) {
        let (time, own) = restore(program, engine, saved)?;
        times.push(time);
        memory.push(own);
    }
    report.promised(
        format!("restore on {engine}: command to guest output"),
        "ms",
        &times,
        Some(Promise::AtMost(30.0)),
        None,
    );
    report.add(
        format!("restore on {engine}: memory of its own"),
        "MiB",
        &memory,
    );
    Ok(())
}

/// `trapgate`, as cargo has built it for us.
fn program() -> Result<PathBuf, Failure> {
    let own = std::env::current_exe()?;
    let release = own.parent().and_then(Path::parent);
    let program = release.unwrap_or(Path::new(".")).join("trapgate");
    if program.exists() {
        Ok(program)
    } else {
        Err("the command is not there: build it with `cargo build --release -p trapgate`".into())
    }
}

/// Milliseconds of pause, and MiB on the disk.
fn save(engine: EngineKind, to: &Path) -> Result<(f64, f64), Failure> {
    let (said, hears) = channel();
    let hooks = Hooks {
        serial: Box::new(move |_| {
            let _ = said.send(());
        }),
        ..Hooks::default()
    };
    let config = MachineConfig {
        memory_bytes: MEMORY,
        kernel: guest().into(),
        engine: EngineChoice::Only(engine),
        ..MachineConfig::default()
    };
    let machine = Machine::start(config, hooks)?;
    hears
        .recv_timeout(LIMIT)
        .map_err(|_| "the guest said nothing")?;
    let report = machine.snapshot(to)?;
    let bytes = report.bytes as f64 / f64::from(1 << 20);
    Ok((report.paused.as_secs_f64() * 1e3, bytes))
}

/// The command, which ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Milliseconds from the command to the guest's first output, and MiB of memory that are its own then.
fn restore(program: &Path, engine: EngineKind, from: &Path) -> Result<(f64, f64), Failure> {
    let started = Instant::now();
    let child = Command::new(program)
        .arg("restore")
        .arg(from)
        .args(["--quiet", "--engine", engine.name()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut child = Running(child);
    let mut byte = [0];
    let stdout = child.0.stdout.as_mut().ok_or("it has no output")?;
    stdout.read_exact(&mut byte)?;
    let time = started.elapsed();
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.0.id()))?;
    let own = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or("the host does not tell of memory")?;
    Ok((time.as_secs_f64() * 1e3, mib(own)))
}
