//! Processes that this program starts as itself: trapgate's, and one that becomes another program.
//!
//! Both end when this program does, whatever ends it: nothing is left running that nobody watches.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::process::{Signal, set_parent_process_death_signal};
use trapgate_vmm::{Hooks, Host, Level, Machine, MachineConfig, Outcome, choose};

use crate::Failure;

/// The first argument of such a process. Then follows `exec PROGRAM ARGUMENT…` or
/// `trapgate ENGINE LEVEL RAM-BYTES KERNEL INITRAMFS COMMAND-LINE`.
pub(crate) const OPTION: &str = "--as-child";

/// Such a process.
///
/// # Errors
/// It cannot do what it is for.
pub(crate) fn main(words: Vec<OsString>) -> Result<ExitCode, Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let [kind, rest @ ..] = &words[..] else {
        return Err("nothing to become".into());
    };
    if kind == "exec" {
        let [program, rest @ ..] = rest else {
            return Err("no program to become".into());
        };
        let error = Command::new(program).args(rest).exec();
        return Err(format!("cannot start {}: {error}", program.display()).into());
    }
    let [engine, level, memory, kernel, initramfs, command_line] = rest else {
        return Err("six arguments make a machine".into());
    };
    let text = |word: &OsString| word.to_string_lossy().into_owned();
    let mut config = MachineConfig {
        engine: text(engine).parse()?,
        memory_bytes: text(memory).parse()?,
        kernel: std::fs::read(kernel)?.into(),
        initrds: vec![std::fs::read(initramfs)?.into()],
        command_line: text(command_line),
        // QEMU's machine has none either.
        entropy: false,
        ..MachineConfig::default()
    };
    let host = Host::probe();
    match &text(level)[..] {
        "v2" => config.level = Level::V2,
        "v3" => config.level = Level::V3,
        // What `trapgate run` chooses.
        _ => config.level = host.level(),
    }
    let hooks = Hooks {
        serial: Box::new(|bytes| {
            let mut out = std::io::stdout().lock();
            // Whoever does not listen any more ends this process.
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }),
        ..Hooks::default()
    };
    let engine = choose(config.engine, config.level, &host)?;
    println!("@engine {}", engine.kind.name());
    let machine = Machine::start(config, hooks)?;
    let serial = machine.serial();
    // Not joined: it may wait for input for as long as this process lives.
    std::thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut bytes) {
            if !serial.input_all(&bytes[..count]) {
                break;
            }
        }
    });
    match machine.wait() {
        Outcome::PoweredOff => Ok(ExitCode::SUCCESS),
        other => Err(format!("the machine ended: {other:?}").into()),
    }
}
