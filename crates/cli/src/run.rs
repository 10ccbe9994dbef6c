//! `trapgate run`: what a machine is to be, from the command line.

use std::collections::HashSet;
use std::ffi::OsString;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use trapgate_image::{Session, session_archive};
use trapgate_virtio::Disk;
use trapgate_vmm::{
    Choice, DiskConfig, EngineKind, Host, Identity, MachineConfig, Observe, OnReset, choose,
};

use crate::arguments::{Cpu, RunArguments};
use crate::curtain::Curtain;
use crate::event::Event;
use crate::failure::Failure;
use crate::guest::{Guest, Source, read_initrd};
use crate::keyboard::Keyboard;
use crate::progress::Progress;
use crate::scene::{Console, NOTE_COMMAND, NOTE_GUEST, Origin, Scene};
use crate::socket::{self, Socket};
use crate::stock::{Stock, fetch};
use crate::{detach, signals, status, terminal};

/// Runs a machine, and gives our exit status.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    if arguments.detach && !detach::is_child() {
        return detach::launch(arguments.quiet);
    }
    let (events, inbox) = channel();
    signals::watch(events.clone())?;

    // Whatever can be found wrong is found before a kernel is fetched or a terminal is changed.
    let source = Source::of(arguments)?;
    let host = Host::probe();
    let level = arguments.cpu.map_or_else(|| host.level(), Cpu::level);
    let choice = choose(arguments.engine.choice(), level, &host)
        .map_err(|error| Failure::machine("the guest", &error))?;
    let observe = observe(arguments.stats, arguments.perf, &choice)?;
    let mut config = MachineConfig {
        cpus: arguments.cpus,
        memory_bytes: arguments.memory,
        disks: arguments.disks.clone(),
        engine: arguments.engine.choice(),
        level,
        on_reset: OnReset::End,
        observe,
        ..MachineConfig::default()
    };
    config
        .validate()
        .map_err(|error| Failure::machine("the guest", &error))?;
    source.check_memory(arguments.memory)?;
    check_disks(&arguments.disks)?;

    let claim = socket::claim(arguments.name.as_ref(), arguments.detach, arguments.quiet)?;
    let console = console_of(&source, arguments);
    let progress = Progress::new(arguments.quiet);
    let loaded = load(arguments, &source, console, &events, &inbox, &progress);
    let guest = match loaded {
        Ok(Loaded::Guest(guest)) => guest,
        Ok(Loaded::Interrupted(signal)) => {
            progress.clear();
            return Ok(signals::tell(signal));
        }
        Err(failure) => {
            progress.clear();
            return Err(failure);
        }
    };
    config.kernel = guest.kernel;
    config.initrds = guest.initrds;
    config.command_line = guest.command_line;
    let mut note = |key: &str, value: String| config.notes.insert(key.to_owned(), value);
    note(NOTE_GUEST, guest.name.clone());
    if !arguments.command.is_empty() {
        note(NOTE_COMMAND, "yes".to_owned());
    }

    let name = claim
        .as_ref()
        .map_or_else(String::new, |claim| claim.name().to_string());
    let identity = Identity {
        name,
        guest: guest.name.clone(),
        engine: choice.clone(),
        cpus: arguments.cpus,
        memory_bytes: arguments.memory,
    };
    let socket = Socket::new(claim, identity, console != Console::Streams);
    let scene = Scene {
        console,
        detach: arguments.detach,
        interactive: !arguments.detach && console.is_interactive(),
        has_command: !arguments.command.is_empty(),
        quiet: arguments.quiet,
        verbose: arguments.verbose,
        stats: arguments.stats,
        name: guest.name,
        choice,
        events,
        progress,
        keyboard: Keyboard::default(),
        log: Arc::default(),
        curtain: Curtain::default(),
        viewers: socket.terminal(),
        origin: Origin::Kernel,
    };
    scene.perform(&config, &inbox, socket)
}

/// What the engine is to find out.
///
/// # Errors
/// It has nothing to tell.
pub(crate) fn observe(stats: bool, perf: bool, choice: &Choice) -> Result<Observe, Failure> {
    if perf && choice.kind != EngineKind::Jit {
        return Err(Failure::new(
            status::USAGE,
            format!(
                "there is no translated code on the engine `{}`",
                choice.kind
            ),
        )
        .fix("leave `--perf` out, or add `--engine jit`"));
    }
    Ok(Observe {
        costs: stats,
        perf_map: perf,
    })
}

fn check_disks(disks: &[DiskConfig]) -> Result<(), Failure> {
    let mut files = HashSet::new();
    for disk in disks {
        // Opens it and closes it again: the machine will open it for itself.
        Disk::open(&disk.path, disk.read_only)
            .map_err(|error| Failure::disk(&disk.path, &error))?;
        let file = disk.path.canonicalize().unwrap_or(disk.path.clone());
        if !files.insert(file) {
            return Err(Failure::new(
                status::USAGE,
                format!("the disk `{}` was given twice", disk.path.display()),
            )
            .fix("leave one of them out"));
        }
    }
    Ok(())
}

enum Loaded {
    Guest(Guest),
    Interrupted(i32),
}

fn load(
    arguments: &RunArguments,
    source: &Source,
    console: Console,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
    progress: &Progress,
) -> Result<Loaded, Failure> {
    let initrd = match source {
        Source::Builtin => return Ok(Loaded::Guest(Guest::builtin(arguments))),
        Source::Kernel { kernel, initrd } => {
            return Guest::from_files(arguments, kernel, initrd.as_deref()).map(Loaded::Guest);
        }
        Source::Stock { initrd } => initrd.as_deref(),
    };
    // Both before the kernel, which may take minutes.
    let own = initrd.map(read_initrd).transpose()?;
    let session =
        session_archive(&session(arguments, console)).map_err(|error| Failure::image(&error))?;
    let image = match fetch(events, inbox, progress)? {
        Stock::Image(image) => image,
        Stock::Interrupted(signal) => return Ok(Loaded::Interrupted(signal)),
    };
    let initrds = match own {
        Some(own) => vec![own],
        None => vec![read_initrd(&image.initramfs)?, session.into()],
    };
    Guest::stock(arguments, &image.kernel_version, &image.kernel, initrds).map(Loaded::Guest)
}

/// Where a person meets this guest.
fn console_of(source: &Source, run: &RunArguments) -> Console {
    let input = terminal::stdin_is_terminal();
    match (source.has_init(), run.command.is_empty()) {
        (false, _) => Console::Serial,
        // For whoever attaches.
        (true, _) if run.detach => Console::Terminal,
        // As ssh does: a shell on a terminal is interactive, and one that reads a file is not. A command's
        // output may be wanted byte for byte, so it gets a terminal only if nobody could tell.
        (true, true) if input => Console::Terminal,
        (true, false) if input && terminal::stdout_is_terminal() => Console::Terminal,
        (true, _) => Console::Streams,
    }
}

/// What init is to run.
fn session(arguments: &RunArguments, console: Console) -> Session {
    let mut command = arguments.command.clone();
    let mut env = Vec::new();
    if console == Console::Terminal {
        let term = std::env::var_os("TERM").filter(|term| !term.is_empty());
        env.extend(term.map(|term| ("TERM".to_owned(), term)));
        if let Some((columns, rows)) = terminal::size() {
            env.push(("COLUMNS".to_owned(), OsString::from(columns.to_string())));
            env.push(("LINES".to_owned(), OsString::from(rows.to_string())));
        }
    } else if command.is_empty() {
        command.push("sh".into());
    }
    Session {
        command,
        env,
        terminal: console == Console::Terminal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_that_is_given_twice_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let disk = DiskConfig {
            path: file.path().into(),
            read_only: true,
        };
        assert!(check_disks(std::slice::from_ref(&disk)).is_ok());
        let failure = check_disks(&[disk.clone(), disk]).unwrap_err();
        assert!(failure.to_string().contains("twice"), "{failure}");
    }
}
