//! A running machine behind the API's trait: what the control socket reaches.
//!
//! A [`RemoteControl`] outlives the machine that it controls, since a guest that restarts gets another: what was asked
//! for (that it be paused, that it stop) holds for the next one too.
//!
//! Locks are taken in the order paused → machine, and keep those who must not wait apart from those who may: a pause waits
//! for processors and for a snapshot, a snapshot for a disk, and neither holds up a stop or the counters.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use trapgate_api::control::{Control, States};
use trapgate_api::data::{
    Cost, Counter, Counters, Engine, Info, Kind, SnapshotAnswer, State, StateAnswer, Unit,
};
use trapgate_api::problem::{Problem, ProblemKind};
use trapgate_api::terminal::{Keyboard, Terminal};
use trapgate_engine::Measure;

use crate::{Choice, Machine, MachineHandle, PortHandle, SerialHandle, SnapshotError, lock};

/// How often at most the processors are called out of the guest to tell their numbers: whoever asks more often gets what
/// was told last. It is what counting costs the guest.
const FRESH: Duration = Duration::from_millis(20);

/// What clients are told that a machine is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// What runs in it, for people.
    pub guest: String,
    /// What runs it, and why.
    pub engine: Choice,
    /// Virtual processors.
    pub cpus: u32,
    /// RAM of the guest, bytes.
    pub memory_bytes: u64,
}

/// For those who must not wait.
#[derive(Default)]
struct Quick {
    machine: Option<MachineHandle>,
    /// It is to stop, and so are those that come after it.
    stop: bool,
}

/// Controls a machine, and those that come after it when the guest restarts.
pub struct RemoteControl {
    identity: Identity,
    started: Instant,
    started_unix: Duration,
    states: States,
    terminal: Option<Terminal>,
    quick: Mutex<Quick>,
    /// Whether clients want it to stand still. Locked while that, or the machine's place on a disk, is changed.
    paused: Mutex<bool>,
    /// For those who may wait: read as long as someone works on the machine.
    machine: RwLock<Option<Arc<Machine>>>,
    /// How many machines there have been.
    machines: AtomicU64,
    /// When the processors told their numbers last.
    counted: Mutex<Option<Instant>>,
}

impl fmt::Debug for RemoteControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {}", self.identity, self.states.get())
    }
}

impl RemoteControl {
    /// Controls no machine yet. `terminal` is the guest's, if clients are to reach it.
    pub fn new(identity: Identity, terminal: Option<Terminal>) -> Self {
        Self {
            identity,
            started: Instant::now(),
            started_unix: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
            states: States::new(State::Running),
            terminal,
            quick: Mutex::default(),
            paused: Mutex::default(),
            machine: RwLock::default(),
            machines: AtomicU64::new(0),
            counted: Mutex::default(),
        }
    }

    /// From now on it controls this machine. Keys from the terminal go to its terminal, or to its serial port if it has
    /// none.
    pub fn connect(&self, machine: &Arc<Machine>) {
        if let Some(terminal) = &self.terminal {
            terminal.connect(match machine.terminal() {
                Some(port) => Arc::new(port) as Arc<dyn Keyboard>,
                None => Arc::new(machine.serial()),
            });
        }
        let paused = lock(&self.paused);
        if *paused {
            machine.engage_brake();
        }
        self.machines.fetch_add(1, Ordering::Relaxed);
        self.replace(Some(Arc::clone(machine)));
        drop(paused);
        let mut quick = lock(&self.quick);
        if quick.stop {
            machine.stop();
        }
        quick.machine = Some(machine.handle());
    }

    /// It controls nothing now. Waits for requests that work on the machine, and holds nothing of it afterwards.
    pub fn disconnect(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.disconnect();
        }
        lock(&self.quick).machine = None;
        self.replace(None);
    }

    fn replace(&self, machine: Option<Arc<Machine>>) {
        let mut present = self.machine.write().unwrap_or_else(PoisonError::into_inner);
        let former = std::mem::replace(&mut *present, machine);
        drop(present);
        // Which may be the end of its threads: not under the lock.
        drop(former);
    }

    fn machine(&self) -> RwLockReadGuard<'_, Option<Arc<Machine>>> {
        self.machine.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is gone for good.
    pub fn end(&self) {
        // First: between the two nobody is to be told that another machine comes.
        self.states.set(State::Ended);
        self.disconnect();
        if let Some(terminal) = &self.terminal {
            terminal.close();
        }
    }

    /// There is no machine at the moment, or none any more.
    fn absent(&self) -> Problem {
        if self.states.get() == State::Ended {
            return ProblemKind::Ended.into();
        }
        Problem::new(ProblemKind::Busy)
            .cause("its guest is restarting, or about to end")
            .fix("ask again in a second")
    }

    /// Pauses or resumes.
    fn set_paused(&self, paused: bool) -> Result<StateAnswer, Problem> {
        let mut present = lock(&self.paused);
        let machine = self.machine();
        // Its owner may not have noticed yet that it has ended.
        let ended = |machine: &Arc<Machine>| machine.wait_for(Duration::ZERO).is_some();
        if self.states.get() == State::Ended || machine.as_ref().is_some_and(ended) {
            return Err(ProblemKind::Ended.into());
        }
        let changed = *present != paused;
        if changed {
            *present = paused;
            match &*machine {
                Some(machine) if paused => machine.engage_brake(),
                Some(machine) => machine.release_brake(),
                // The next one will be.
                None => {}
            }
        }
        let state = if paused {
            State::Paused
        } else {
            State::Running
        };
        self.states.set(state);
        Ok(StateAnswer { state, changed })
    }
}

impl Control for RemoteControl {
    fn info(&self) -> Info {
        let Identity {
            name,
            guest,
            engine,
            cpus,
            memory_bytes,
        } = &self.identity;
        Info {
            name: name.clone(),
            pid: std::process::id(),
            state: self.states.get(),
            guest: guest.clone(),
            engine: Engine {
                name: engine.kind.to_string(),
                reason: engine.reason.clone(),
            },
            cpus: *cpus,
            memory_bytes: *memory_bytes,
            started_unix_seconds: self.started_unix.as_secs(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            has_terminal: self.terminal.is_some(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn states(&self) -> &States {
        &self.states
    }

    fn counters(&self) -> Result<Counters, Problem> {
        let machine = self.machine();
        let machine = machine.as_ref().ok_or_else(|| self.absent())?;
        let mut counted = lock(&self.counted);
        if counted.is_none_or(|then| then.elapsed() >= FRESH) {
            machine.refresh_counters();
            *counted = Some(Instant::now());
        }
        // One that the guest reset may have become another.
        let earlier = self.machines.load(Ordering::Relaxed).saturating_sub(1);
        Ok(counters(machine, earlier))
    }

    fn pause(&self) -> Result<StateAnswer, Problem> {
        self.set_paused(true)
    }

    fn resume(&self) -> Result<StateAnswer, Problem> {
        self.set_paused(false)
    }

    fn press_power_button(&self) -> Result<(), Problem> {
        if self.states.get() == State::Ended {
            return Err(ProblemKind::Ended.into());
        }
        if let Some(machine) = &lock(&self.quick).machine {
            machine.power_button();
        }
        Ok(())
    }

    fn stop(&self) {
        let mut quick = lock(&self.quick);
        quick.stop = true;
        if let Some(machine) = &quick.machine {
            machine.stop();
        }
    }

    fn snapshot(&self, directory: &Path) -> Result<SnapshotAnswer, Problem> {
        // Until it is done: whoever disconnects must find nothing of the machine here afterwards.
        let paused = lock(&self.paused);
        let machine = self.machine();
        let machine = machine.as_ref().ok_or_else(|| self.absent())?;
        let report = machine
            .snapshot(directory)
            .map_err(|error| not_saved(&error))?;
        let paused = if *paused {
            Duration::ZERO
        } else {
            report.paused
        };
        Ok(SnapshotAnswer {
            directory: report.directory.display().to_string(),
            bytes: report.bytes,
            paused_ns: paused.as_nanos() as u64,
        })
    }

    fn terminal(&self) -> Option<Terminal> {
        self.terminal.clone()
    }
}

/// Why there is no snapshot.
fn not_saved(error: &SnapshotError) -> Problem {
    let kind = match error {
        SnapshotError::Ended => ProblemKind::Ended,
        _ => ProblemKind::Host,
    };
    let mut problem = Problem::new(kind).title(error.to_string());
    if let Some(cause) = error.source() {
        problem = problem.cause(cause_chain(cause));
    }
    match error.fix() {
        Some(fix) => problem.fix(fix),
        None => problem,
    }
}

/// An error and its causes, in one line.
fn cause_chain(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", cause_chain(cause)),
        None => error.to_string(),
    }
}

/// All that a machine counts. `earlier` machines were reset.
pub(crate) fn counters(machine: &Machine, earlier: u64) -> Counters {
    let own = machine.counters();
    let alone = |name: &str, unit, kind, value, help: &str| Counter {
        name: name.to_owned(),
        help: help.to_owned(),
        unit,
        kind,
        value,
        cpus: Vec::new(),
    };
    let mut all = vec![
        alone(
            "resets",
            Unit::Count,
            Kind::Total,
            earlier + own.resets,
            "Times that the guest reset the machine",
        ),
        alone(
            "host_cpu",
            Unit::Nanoseconds,
            Kind::Total,
            host_cpu_time(),
            "Processor time of the whole process",
        ),
    ];
    let each = |name: &str, value: fn(&crate::ProcessorCounters) -> u64, help: &str| {
        let cpus: Vec<u64> = own.processors.iter().map(value).collect();
        Counter {
            name: name.to_owned(),
            help: help.to_owned(),
            unit: Unit::Count,
            kind: Kind::Total,
            value: cpus.iter().sum(),
            cpus,
        }
    };
    all.extend([
        each(
            "instructions",
            |cpu| cpu.instructions,
            "Guest instructions, as far as the engine counts them",
        ),
        each("halts", |cpu| cpu.halts, "Times that a processor halted"),
        each(
            "kicks",
            |cpu| cpu.kicks,
            "Times that a processor was called out of the guest",
        ),
    ]);
    all.extend(engine_counters(&machine.engine_counters()));
    Counters {
        clock_ns: own.clock,
        counters: all,
        costs: costs(machine.costs()),
    }
}

/// What the engine counts, by processor, as one counter for each name.
fn engine_counters(processors: &[Vec<trapgate_engine::Counter>]) -> Vec<Counter> {
    let first = processors.first().map_or(&[][..], Vec::as_slice);
    let families = first.iter().enumerate();
    families
        .map(|(index, counter)| {
            let each = processors.iter().filter_map(|own| own.get(index));
            let cpus: Vec<u64> = each.map(trapgate_engine::Counter::get).collect();
            let (unit, kind) = match counter.measure() {
                Measure::Events => (Unit::Count, Kind::Total),
                Measure::Nanoseconds => (Unit::Nanoseconds, Kind::Total),
                Measure::Bytes => (Unit::Bytes, Kind::Level),
                Measure::Level => (Unit::Count, Kind::Level),
            };
            Counter {
                name: counter.name().to_owned(),
                help: counter.help().to_owned(),
                unit,
                kind,
                value: cpus.iter().sum(),
                cpus,
            }
        })
        .collect()
}

/// What the engine spends time on, summed over the processors; what takes most comes first.
fn costs(processors: Vec<Vec<trapgate_engine::Cost>>) -> Vec<Cost> {
    let mut sums = BTreeMap::<_, Cost>::new();
    for cost in processors.into_iter().flatten() {
        let trapgate_engine::Cost {
            kind,
            detail,
            count,
            nanoseconds,
            estimated,
        } = cost;
        let sum = sums.entry((kind, detail.clone())).or_insert(Cost {
            kind: kind.to_owned(),
            detail,
            count: 0,
            nanoseconds: None,
            estimated,
        });
        sum.count += count;
        sum.nanoseconds = match (sum.nanoseconds, nanoseconds) {
            (Some(sum), Some(more)) => Some(sum + more),
            (sum, more) => sum.or(more),
        };
    }
    let mut costs: Vec<_> = sums.into_values().collect();
    costs.sort_by_key(|cost| Reverse((cost.nanoseconds, cost.count)));
    costs
}

/// Nanoseconds of processor time that this process has taken.
fn host_cpu_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + nanoseconds
}

impl Keyboard for PortHandle {
    fn input(&self, data: &[u8]) -> usize {
        Self::input(self, data)
    }

    fn resize(&self, columns: u16, rows: u16) {
        Self::resize(self, columns, rows);
    }
}

impl Keyboard for SerialHandle {
    fn input(&self, data: &[u8]) -> usize {
        Self::input(self, data)
    }

    fn resize(&self, _columns: u16, _rows: u16) {}
}

#[cfg(test)]
mod tests;
