//! A native child and engines side by side: all run the same batch from the same memory.

use std::time::{Duration, Instant};

use trapgate_x86::profile::Level;

use crate::engine::{Engine, EngineError, Kind, prepare};
use crate::layout::{
    ARENA_BYTES, CODE_AT, CONTROL_AT, IN_AT, OUT_AT, PAGE, RECORD, SLOTS, record_in, record_out,
};
use crate::monitor::control;
use crate::native::{Native, NativeError};
use crate::record::{of, put};

/// Why the oracle could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The host CPU could not be asked.
    #[error(transparent)]
    Native(#[from] NativeError),
    /// An engine could not be asked.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Nothing to do.
    #[error("no instruction's name contains `{0}`")]
    NoCode(String),
}

/// Where time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Making cases.
    pub making: Duration,
    /// Waiting for the host when the engines were done.
    pub host: Duration,
    /// Each engine.
    pub engines: [Duration; 2],
    /// Comparing.
    pub comparing: Duration,
}

impl Times {
    /// Adds another's.
    pub fn add(&mut self, other: &Self) {
        self.making += other.making;
        self.host += other.host;
        for (sum, time) in self.engines.iter_mut().zip(other.engines) {
            *sum += time;
        }
        self.comparing += other.comparing;
    }
}

/// Does something and adds the time that it took.
pub fn timed<T>(into: &mut Duration, go: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = go();
    *into += begun.elapsed();
    result
}

/// Tells the monitor which cases to run.
fn begin(arena: &mut [u8], first: usize, cases: usize) {
    put(arena, CONTROL_AT + control::CURRENT_IN, record_in(first));
    put(arena, CONTROL_AT + control::CURRENT_OUT, record_out(first));
    put(arena, CONTROL_AT + control::COUNT, cases as u64);
}

/// An arena to make batches in.
pub fn arena() -> Vec<u8> {
    let mut arena = vec![0; ARENA_BYTES];
    prepare(&mut arena);
    arena
}

/// Where in the arena, and what.
pub type StandIn = (usize, [u8; 2]);

/// The native child and the engines.
pub struct Bench {
    /// The host CPU.
    pub native: Native,
    /// The engines.
    pub engines: Vec<Engine>,
    /// What the host executes in place of what lies there.
    pub stand_ins: Vec<StandIn>,
    outcomes: Vec<Vec<u8>>,
}

impl Bench {
    /// `modifying`: cases may write their code.
    ///
    /// # Errors
    /// [`OracleError`].
    pub fn new(level: Level, kinds: &[Kind], modifying: bool) -> Result<Self, OracleError> {
        let mut native = Native::new(modifying)?;
        prepare(native.arena());
        let engines = kinds
            .iter()
            .map(|kind| Engine::new(*kind, level, modifying))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            native,
            stand_ins: Vec::new(),
            outcomes: vec![Vec::new(); engines.len()],
            engines,
        })
    }

    /// Runs `cases` cases from number `first` of the `total` in an arena, natively and on all engines.
    ///
    /// # Errors
    /// [`OracleError`].
    pub fn run(
        &mut self,
        arena: &mut [u8],
        total: usize,
        first: usize,
        cases: usize,
        times: &mut Times,
    ) -> Result<(), OracleError> {
        begin(arena, first, cases);
        let shared = self.native.arena();
        for (from, length) in [
            (IN_AT, total * RECORD),
            (CODE_AT, SLOTS * 2 * PAGE as usize),
        ] {
            shared[from..from + length].copy_from_slice(&arena[from..from + length]);
        }
        for (at, bytes) in &self.stand_ins {
            shared[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        begin(shared, first, cases);
        self.native.begin()?;
        for (index, engine) in self.engines.iter_mut().enumerate() {
            timed(&mut times.engines[index.min(1)], || {
                engine.load(arena, total, SLOTS)?;
                engine.run(cases)?;
                engine.records(total, &mut self.outcomes[index])
            })?;
        }
        timed(&mut times.host, || self.native.wait(cases))?;
        Ok(())
    }

    /// What a case left natively, and on each engine.
    pub fn outcome(&mut self, case: usize) -> (&[u8], impl Iterator<Item = &[u8]>) {
        let native = of(&self.native.arena()[OUT_AT..], case);
        (
            native,
            self.outcomes.iter().map(move |outcomes| of(outcomes, case)),
        )
    }
}
