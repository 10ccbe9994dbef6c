//! Boots a kernel with its serial port on standard output, and says what it did.
//!
//! `cargo run --release -p trapgate-vmm --example boot -- KERNEL [INITRD…] [--cmdline S] [--cpus N]
//! [--memory MIB] [--limit SECONDS] [--disk FILE]`

use std::io::Write;
use std::time::{Duration, Instant};

use trapgate_vmm::{Content, DiskConfig, Hooks, Machine, MachineConfig, MachineError};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = MachineConfig::default();
    let mut files = Vec::new();
    let mut limit = Duration::from_secs(60);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or("an option needs a value");
        match &argument[..] {
            "--cmdline" => config.command_line = value()?,
            "--cpus" => config.cpus = value()?.parse()?,
            "--memory" => config.memory_bytes = value()?.parse::<u64>()? << 20,
            "--limit" => limit = Duration::from_secs(value()?.parse()?),
            "--disk" => config.disks.push(DiskConfig {
                path: value()?.into(),
                read_only: false,
            }),
            _ => files.push(std::fs::read(&argument)?),
        }
    }
    let mut files = files.into_iter().map(Content::from);
    config.kernel = files.next().ok_or("usage: boot KERNEL [INITRD…]")?;
    config.initrds = files.collect();

    let hooks = Hooks {
        serial: Box::new(|bytes| {
            let mut out = std::io::stdout().lock();
            // A closed pipe ends the program at its time limit.
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }),
        ..Hooks::default()
    };
    let begun = Instant::now();
    let machine = Machine::start(config, hooks).map_err(explain)?;
    eprintln!(
        "{} through {}, on {} ({}), {:?} to load",
        machine.kernel_version().unwrap_or("an unnamed kernel"),
        machine.protocol(),
        machine.engine().kind,
        machine.engine().reason,
        begun.elapsed(),
    );
    let begun = Instant::now();
    let ended = machine.wait_for(limit).is_some();
    let took = begun.elapsed();
    if !ended {
        let pause = machine.pause();
        for (cpu, state) in pause.processors().iter().enumerate() {
            eprintln!(
                "cpu {cpu}: {:?} at rip {:#x}, rsp {:#x}, cr3 {:#x}, rflags {:#x}",
                state.system.activity, state.rip, state.gpr[4], state.system.cr3, state.rflags
            );
        }
    }
    let counters = machine.counters();
    let millions = counters.instructions() as f64 / 1e6;
    eprintln!(
        "{:.1} million instructions in {took:.1?}: {:.1} million a second; {:?}",
        millions,
        millions / took.as_secs_f64(),
        counters.processors,
    );
    if ended {
        eprintln!("{:x?}", machine.wait());
    } else {
        eprintln!("stopped at its time limit");
    }
    Ok(())
}

fn explain(error: MachineError) -> String {
    match error.fix() {
        Some(fix) => format!("{error}\n  fix: {fix}"),
        None => error.to_string(),
    }
}
