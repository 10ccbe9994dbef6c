//! Boots a kernel with its serial port on standard output, and says what it did.
//!
//! `cargo run --release -p trapgate-vmm --example boot -- KERNEL [INITRD…] [--cmdline S] [--cpus N]
//! [--memory MIB] [--limit SECONDS] [--disk FILE] [--button SECONDS] [--level v2|v3] [--engine ENGINE]
//! [--extra INITRD] [--stock [COMMAND…]]`
//!
//! `--stock` boots the distribution's kernel with the init of `trapgate_image`, which runs the command;
//! what comes through the console's ports is printed line by line with the port's name.

use std::io::Write;
use std::time::{Duration, Instant};

use trapgate_image::{STATUS_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use trapgate_vmm::{
    Content, DiskConfig, Hooks, Machine, MachineConfig, MachineError, Port, PortOutput,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = MachineConfig::default();
    let mut files = Vec::new();
    let mut extra = Vec::new();
    let mut names: &[&str] = &[];
    let mut button = None;
    let mut limit = Duration::from_secs(60);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or("an option needs a value");
        match &argument[..] {
            "--cmdline" => config.command_line = value()?,
            "--engine" => config.engine = value()?.parse()?,
            "--extra" => extra.push(std::fs::read(value()?)?),
            "--level" => {
                config.level = match &value()?[..] {
                    "v2" => trapgate_x86::profile::Level::V2,
                    _ => trapgate_x86::profile::Level::V3,
                }
            }
            "--cpus" => config.cpus = value()?.parse()?,
            "--memory" => config.memory_bytes = value()?.parse::<u64>()? << 20,
            "--limit" => limit = Duration::from_secs(value()?.parse()?),
            "--button" => button = Some(Duration::from_secs(value()?.parse()?)),
            "--disk" => config.disks.push(DiskConfig {
                path: value()?.into(),
                read_only: false,
            }),
            "--stock" => {
                let image = trapgate_image::stock(
                    &trapgate_image::CacheDir::from_env()?,
                    &mut |_: trapgate_image::Phase, _: u64, _: Option<u64>| {},
                )?;
                let session = trapgate_image::Session {
                    command: arguments.by_ref().map(Into::into).collect(),
                    ..Default::default()
                };
                files.push(std::fs::read(image.kernel)?);
                files.push(std::fs::read(image.initramfs)?);
                files.push(trapgate_image::session_archive(&session)?);
                names = &[STATUS_PORT, STDIN_PORT, STDOUT_PORT, STDERR_PORT];
                if config.command_line.is_empty() {
                    config.command_line = "console=ttyS0 panic=-1".to_owned();
                }
            }
            _ => files.push(std::fs::read(&argument)?),
        }
    }
    let mut files = files.into_iter().chain(extra).map(Content::from);
    config.kernel = files.next().ok_or("usage: boot KERNEL [INITRD…]")?;
    config.initrds = files.collect();

    let hooks = Hooks {
        serial: Box::new(|bytes| {
            let mut out = std::io::stdout().lock();
            // A closed pipe ends the program at its time limit.
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }),
        terminal: (!names.is_empty()).then(|| Box::new(Named("terminal")) as _),
        ports: names
            .iter()
            .map(|name| Port {
                name: (*name).to_owned(),
                output: Box::new(Named(name)),
            })
            .collect(),
    };
    let begun = Instant::now();
    let machine = Machine::start(config, hooks).map_err(explain)?;
    eprintln!(
        "{} through {}, on {} ({}), {:?} to load",
        machine.kernel_version().unwrap_or("an unnamed kernel"),
        machine
            .protocol()
            .map_or_else(String::new, |way| way.to_string()),
        machine.engine().kind,
        machine.engine().reason,
        begun.elapsed(),
    );
    if let Some(stdin) = machine.port(STDIN_PORT) {
        stdin.input_all(b"the input\n");
        stdin.close_input();
    }
    if let Some(delay) = button {
        let handle = machine.handle();
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            handle.power_button();
        });
    }
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

/// Prints what comes through a port.
struct Named(&'static str);

impl PortOutput for Named {
    fn write(&mut self, data: &[u8]) {
        eprintln!("[{}] {:?}", self.0, String::from_utf8_lossy(data));
    }

    fn guest_open(&mut self, open: bool) {
        eprintln!("[{}] {}", self.0, if open { "opened" } else { "closed" });
    }
}

fn explain(error: MachineError) -> String {
    match error.fix() {
        Some(fix) => format!("{error}\n  fix: {fix}"),
        None => error.to_string(),
    }
}
