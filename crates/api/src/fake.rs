//! A machine that is none, for tests and the fuzzer.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::control::{Control, States};
use crate::data::{
    Counter, Counters, Engine, Info, Kind, SnapshotAnswer, State, StateAnswer, Unit,
};
use crate::lock;
use crate::problem::{Problem, ProblemKind};
use crate::terminal::{Keyboard, Terminal};

/// What a [`FakeMachine`] does when its power button is pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnButton {
    PowerOff,
    Ignore,
}

/// A machine that is none.
pub(crate) struct FakeMachine {
    pub(crate) states: States,
    pub(crate) terminal: Option<Terminal>,
    pub(crate) on_button: OnButton,
    /// Locked while it is saved, or changes between running and standing still, as that of a machine is.
    pub(crate) busy: Mutex<()>,
    /// What happened to it, in order.
    pub(crate) story: Mutex<Vec<String>>,
    asked: AtomicU64,
}

impl FakeMachine {
    pub(crate) fn new(on_button: OnButton) -> Arc<Self> {
        let terminal = Terminal::default();
        terminal.connect(Arc::new(Echo(terminal.clone())));
        Arc::new(Self {
            states: States::new(State::Running),
            terminal: Some(terminal),
            on_button,
            busy: Mutex::default(),
            story: Mutex::default(),
            asked: AtomicU64::new(0),
        })
    }

    fn note(&self, what: impl Into<String>) {
        let mut story = lock(&self.story);
        // The fuzzer may have it do much.
        if story.len() < 1000 {
            story.push(what.into());
        }
    }

    fn end(&self) {
        self.states.set(State::Ended);
        if let Some(terminal) = &self.terminal {
            terminal.close();
        }
    }

    fn change(&self, state: State) -> Result<StateAnswer, Problem> {
        let _busy = lock(&self.busy);
        let changed = self.states.set(state);
        if self.states.get() == State::Ended {
            return Err(ProblemKind::Ended.into());
        }
        self.note(state.to_string());
        Ok(StateAnswer { state, changed })
    }
}

/// A guest that writes what is typed.
struct Echo(Terminal);

impl Keyboard for Echo {
    fn input(&self, data: &[u8]) -> usize {
        self.0.push(data);
        data.len()
    }

    fn resize(&self, columns: u16, rows: u16) {
        self.0.push(format!("<{columns}x{rows}>").as_bytes());
    }
}

impl Control for FakeMachine {
    fn info(&self) -> Info {
        Info {
            name: "fake".to_owned(),
            pid: std::process::id(),
            state: self.states.get(),
            guest: "nothing".to_owned(),
            engine: Engine {
                name: "none".to_owned(),
                reason: "a test".to_owned(),
            },
            cpus: 2,
            memory_bytes: 1 << 20,
            started_unix_seconds: 0,
            uptime_seconds: 0.5,
            has_terminal: self.terminal.is_some(),
            version: "0".to_owned(),
        }
    }

    fn states(&self) -> &States {
        &self.states
    }

    fn counters(&self) -> Result<Counters, Problem> {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(Counters {
            clock_ns: 1,
            counters: vec![Counter {
                name: "asked".to_owned(),
                help: "Times that it was asked".to_owned(),
                unit: Unit::Count,
                kind: Kind::Total,
                value: asked,
                cpus: vec![asked, 0],
            }],
            costs: Vec::new(),
        })
    }

    fn pause(&self) -> Result<StateAnswer, Problem> {
        self.change(State::Paused)
    }

    fn resume(&self) -> Result<StateAnswer, Problem> {
        self.change(State::Running)
    }

    fn press_power_button(&self) -> Result<(), Problem> {
        if self.states.get() == State::Ended {
            return Err(ProblemKind::Ended.into());
        }
        self.note("button");
        if self.on_button == OnButton::PowerOff {
            self.end();
        }
        Ok(())
    }

    fn stop(&self) {
        self.note("cord");
        self.end();
    }

    fn snapshot(&self, directory: &Path) -> Result<SnapshotAnswer, Problem> {
        assert!(!directory.ends_with("panic"), "as the test wanted");
        let _busy = lock(&self.busy);
        Ok(SnapshotAnswer {
            directory: directory.to_string_lossy().into_owned(),
            bytes: 0,
            paused_ns: 0,
        })
    }

    fn terminal(&self) -> Option<Terminal> {
        self.terminal.clone()
    }
}
