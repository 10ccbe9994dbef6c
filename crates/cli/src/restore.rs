//! `trapgate restore`: a machine goes on from a snapshot, with our terminal or our streams connected to it.

use std::sync::Arc;
use std::sync::mpsc::channel;

use trapgate_image::{STATUS_PORT, STDIN_PORT};
use trapgate_vmm::{Host, Identity, Snapshot, SnapshotError};

use crate::arguments::RestoreArguments;
use crate::curtain::Curtain;
use crate::failure::Failure;
use crate::keyboard::Keyboard;
use crate::progress::Progress;
use crate::run::observe;
use crate::scene::{Console, NOTE_COMMAND, NOTE_GUEST, Origin, Scene};
use crate::socket::{self, Socket};
use crate::{detach, signals, status, terminal};

/// Goes on from a snapshot, and gives our exit status.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn restore(arguments: &RestoreArguments) -> Result<u8, Failure> {
    let RestoreArguments {
        directory,
        engine,
        check,
        stats,
        perf,
        name,
        detach,
        quiet,
        verbose,
    } = arguments;
    if *detach && !detach::is_child() {
        return detach::launch(*quiet);
    }
    let (events, inbox) = channel();
    signals::watch(events.clone())?;

    let failed = |error: SnapshotError| Failure::snapshot(directory, &error);
    let mut snapshot = Snapshot::open(directory).map_err(failed)?;
    if *check {
        snapshot.check_memory().map_err(failed)?;
    }
    snapshot.set_engine(engine.choice());
    let choice = snapshot
        .choose_engine(&Host::probe())
        .map_err(|error| Failure::machine("the guest", &error))?;
    snapshot.set_observe(observe(*stats, *perf, &choice)?);
    let console = console_of(&snapshot)?;
    let claim = socket::claim(name.as_ref(), *detach, *quiet)?;
    if !quiet {
        for warning in snapshot.warnings() {
            terminal::say(&format!("trapgate: {warning}"));
        }
    }

    let config = snapshot.config().clone();
    let guest = config
        .notes
        .get(NOTE_GUEST)
        .cloned()
        .unwrap_or_else(|| "the guest".to_owned());
    let identity = Identity {
        name: claim
            .as_ref()
            .map_or_else(String::new, |claim| claim.name().to_string()),
        guest: guest.clone(),
        engine: choice.clone(),
        cpus: config.cpus,
        memory_bytes: config.memory_bytes,
    };
    let socket = Socket::new(claim, identity, console != Console::Streams);
    let scene = Scene {
        console,
        detach: *detach,
        interactive: !detach && console.is_interactive(),
        has_command: config.notes.contains_key(NOTE_COMMAND),
        quiet: *quiet,
        verbose: *verbose,
        stats: *stats,
        name: guest,
        choice,
        events,
        progress: Progress::new(*quiet),
        keyboard: Keyboard::default(),
        log: Arc::default(),
        curtain: Curtain::default(),
        viewers: socket.terminal(),
        origin: Origin::Snapshot(Box::new(snapshot)),
    };
    scene.perform(&config, &inbox, socket)
}

/// Where the person meets the guest: where whoever started it did.
fn console_of(snapshot: &Snapshot) -> Result<Console, Failure> {
    let console = match (snapshot.has_terminal(), snapshot.ports()) {
        (false, []) => Some(Console::Serial),
        (true, [status]) if status == STATUS_PORT => Some(Console::Terminal),
        (false, [status, stdin, ..]) if status == STATUS_PORT && stdin == STDIN_PORT => {
            Some(Console::Streams)
        }
        _ => None,
    };
    console.ok_or_else(|| {
        Failure::new(
            status::INPUT,
            "the snapshot's machine was not one of `trapgate run`",
        )
        .cause("its terminal and ports are others")
        .fix("restore it with the program that took it")
    })
}

impl Failure {
    /// Nothing can go on from a snapshot.
    pub(crate) fn snapshot(directory: &std::path::Path, error: &SnapshotError) -> Self {
        if let SnapshotError::Machine(error) = error {
            return Self::machine("the guest", error);
        }
        let message = format!("cannot restore `{}`", directory.display());
        let failure = Self::new(status::INPUT, message).chain(error);
        match error.fix() {
            Some(fix) => failure.fix(fix),
            None => failure,
        }
    }
}
