//! A guest that is moved from engine to engine while it runs, at moments that a die throws.
//!
//! Every move is what a restore is: the processor's state is taken out of an engine, and put into a
//! new one of the other kind. Memory and devices stay where they are. The guest `chain` hashes everything that
//! a machine remembers, so that whatever is lost on the way shows in its result.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use trapgate_engine::probe::EngineKind;
use trapgate_engine::{Exit, Refused, Signal, Signals, StateError, Vcpu, World};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_kvm::{Facts, InKernel, KvmMachine, Lacks};
use trapgate_memory::GuestMemory;
use trapgate_x86::{CpuProfile, CpuState};

use crate::engines::{By, Constructor, OnKvm};
use crate::skipped::skipped;
use crate::{Choice, Content, Hooks, Host, Machine, MachineConfig, Outcome, Snapshot, lock};

/// Moves in each direction, unless `TRAPGATE_MOVES` says otherwise.
const MOVES: u64 = 12;
/// Long enough that a guest that is not done by then never will be.
const LIMIT: Duration = Duration::from_secs(300);
/// The same for moves through a directory.
const SNAPSHOTS: u64 = 3;
/// What this KVM's emulator of supervisor code cannot do, in the words of `chain`: ring 3 through
/// SYSCALL, XSETBV, LSL, data breakpoints, RDTSCP. Hardware can all of it.
const PARAVIRTUAL_CANNOT: &str = "without=ring3,xcr0,ldt,watch,tsc_aux";
const SIGNALS: [Signal; 4] = [Signal::Kick, Signal::Interrupt, Signal::Nmi, Signal::Flush];

/// One world for two engines, of which one runs.
#[derive(Clone)]
struct SharedWorld(Arc<Mutex<Box<dyn World>>>);

impl World for SharedWorld {
    fn read_memory(&mut self, gpa: u64, data: &mut [u8]) {
        lock(&self.0).read_memory(gpa, data);
    }
    fn write_memory(&mut self, gpa: u64, data: &[u8]) {
        lock(&self.0).write_memory(gpa, data);
    }
    fn read_port(&mut self, port: u16, size: u8) -> u32 {
        lock(&self.0).read_port(port, size)
    }
    fn write_port(&mut self, port: u16, size: u8, value: u32) {
        lock(&self.0).write_port(port, size, value);
    }
    fn take_interrupt(&mut self) -> Option<u8> {
        lock(&self.0).take_interrupt()
    }
    fn read_apic_msr(&mut self, index: u32) -> Result<u64, Refused> {
        lock(&self.0).read_apic_msr(index)
    }
    fn write_apic_msr(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        lock(&self.0).write_apic_msr(index, value)
    }
    fn task_priority(&mut self) -> u8 {
        lock(&self.0).task_priority()
    }
    fn set_task_priority(&mut self, priority: u8) {
        lock(&self.0).set_task_priority(priority);
    }
    fn clock(&mut self) -> u64 {
        lock(&self.0).clock()
    }
    fn epoch(&mut self) -> u64 {
        lock(&self.0).epoch()
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        lock(&self.0).set_tsc_offset(offset);
    }
}

/// How other threads reach the engine that runs.
#[derive(Default)]
struct Control {
    /// What the machine raises.
    outer: OnceLock<Weak<Signals>>,
    /// The engine's own.
    inner: Mutex<Option<Arc<Signals>>>,
    /// The machine wants the processor out of the guest.
    kicked: AtomicBool,
    /// The die wants it moved.
    move_wanted: AtomicBool,
    moves: Mutex<Moves>,
}

/// Moves that were made, by the engine that was left: the first or the second of a pair.
type Moves = [u64; 2];

impl Control {
    fn forward(&self) {
        let Some(outer) = self.outer.get().and_then(Weak::upgrade) else {
            return;
        };
        let inner = lock(&self.inner);
        for signal in SIGNALS {
            if outer.take(signal) {
                if signal == Signal::Kick {
                    self.kicked.store(true, Ordering::SeqCst);
                }
                if let Some(inner) = &*inner {
                    inner.raise(signal);
                }
            }
        }
    }

    fn order_move(&self) {
        self.move_wanted.store(true, Ordering::SeqCst);
        if let Some(inner) = &*lock(&self.inner) {
            inner.raise(Signal::Kick);
        }
    }
}

/// A processor that is moved between two engines.
struct Wanderer {
    /// Makes a new processor of a kind.
    make: Box<dyn Fn(EngineKind) -> Box<dyn Vcpu> + Send>,
    pair: [EngineKind; 2],
    engine: Box<dyn Vcpu>,
    /// Which of the pair it is on.
    at: usize,
    signals: Arc<Signals>,
    control: Arc<Control>,
}

impl Wanderer {
    fn new(
        make: Box<dyn Fn(EngineKind) -> Box<dyn Vcpu> + Send>,
        pair: [EngineKind; 2],
        control: Arc<Control>,
    ) -> Self {
        let forwarder = Arc::clone(&control);
        let signals = Arc::new(Signals::with_interrupter(move || forwarder.forward()));
        control.outer.set(Arc::downgrade(&signals)).unwrap();
        let engine = make(pair[0]);
        *lock(&control.inner) = Some(engine.signals());
        Self {
            make,
            pair,
            engine,
            at: 0,
            signals,
            control,
        }
    }

    fn change_engine(&mut self) {
        let state = self.engine.state();
        let other = 1 - self.at;
        let mut engine = (self.make)(self.pair[other]);
        engine.set_state(&state).unwrap();
        let mut inner = lock(&self.control.inner);
        let (old, new) = (self.engine.signals(), engine.signals());
        for signal in SIGNALS {
            if old.is_raised(signal) {
                new.raise(signal);
            }
        }
        // As `vmm` does after a state was set: what waits in the interrupt controller.
        new.raise(Signal::Interrupt);
        *inner = Some(new);
        drop(inner);
        lock(&self.control.moves)[self.at] += 1;
        self.engine = engine;
        self.at = other;
    }
}

impl Vcpu for Wanderer {
    fn run(&mut self) -> Exit {
        loop {
            match self.engine.run() {
                // Here and not in the machine, which does not know of the engine's own signals.
                Exit::Halted => self.engine.signals().sleep(None),
                Exit::Kicked => {
                    if self.control.move_wanted.swap(false, Ordering::SeqCst) {
                        self.change_engine();
                    }
                    if self.control.kicked.swap(false, Ordering::SeqCst) {
                        return Exit::Kicked;
                    }
                }
                exit => return exit,
            }
        }
    }

    fn step(&mut self) -> Exit {
        self.engine.step()
    }

    fn state(&mut self) -> CpuState {
        self.engine.state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.engine.set_state(state)
    }

    fn signals(&self) -> Arc<Signals> {
        Arc::clone(&self.signals)
    }

    fn instructions(&self) -> u64 {
        self.engine.instructions()
    }
}

fn maker(
    memory: Arc<GuestMemory>,
    world: SharedWorld,
    profile: CpuProfile,
) -> Box<dyn Fn(EngineKind) -> Box<dyn Vcpu> + Send> {
    Box::new(move |kind| {
        let (memory, world) = (Arc::clone(&memory), Box::new(world.clone()));
        match kind {
            EngineKind::Kvm => {
                let machine =
                    KvmMachine::new(memory, profile.clone(), 1, Lacks::Hide, InKernel::NOTHING)
                        .unwrap();
                Box::new(machine.vcpu(world, 0).unwrap())
            }
            EngineKind::Jit => {
                Box::new(Translating::new(memory, world, profile.clone(), 0, 1).unwrap())
            }
            EngineKind::Interp => Box::new(Interpreter::new(memory, world, profile.clone(), 0, 1)),
            EngineKind::Lockstep => {
                Box::new(Lockstep::new(memory, world, profile.clone(), 0, 1).unwrap())
            }
        }
    })
}

/// Numbers that look random: the same for the same seed.
pub(crate) struct Die(pub(crate) u64);

impl Die {
    /// A time from nothing to `most`.
    pub(crate) fn time(&mut self, most: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_nanos(self.0 % most.as_nanos() as u64)
    }
}

/// Runs `chain` to its end. `moves` is how often it is moved in all; gives what it said, and the moves that
/// were made.
fn chain(
    command_line: &str,
    tsc_hz: u64,
    pair: [EngineKind; 2],
    moves: u64,
    seed: u64,
) -> (String, Moves) {
    let said = Arc::new(Mutex::new(Vec::new()));
    let hooks = hooks(&said);
    let config = MachineConfig {
        memory_bytes: 16 << 20,
        kernel: Content::from(trapgate_guests::named("chain").unwrap().image),
        command_line: command_line.to_owned(),
        tsc_hz,
        ..MachineConfig::default()
    };
    let control = Arc::new(Control::default());
    let choice = choice(pair[0]);
    let reached = Arc::clone(&control);
    let machine = Machine::start_on(
        config,
        hooks,
        choice,
        &By(move |memory, world, profile, _, _| {
            let world = SharedWorld(Arc::new(Mutex::new(world)));
            let make = maker(memory, world, profile);
            let wanderer = Wanderer::new(make, pair, Arc::clone(&reached));
            Ok(Box::new(wanderer) as Box<dyn Vcpu>)
        }),
    )
    .unwrap();
    let mut die = Die(seed | 1);
    let done = || -> u64 { lock(&control.moves).iter().sum() };
    while done() < moves {
        let before = done();
        // The emulator of a paravirtual KVM needs longer for as much.
        let most = Duration::from_millis(match pair[(before % 2) as usize] {
            EngineKind::Kvm => 20,
            EngineKind::Jit | EngineKind::Interp | EngineKind::Lockstep => 2,
        });
        if machine.wait_for(die.time(most)).is_some() {
            break;
        }
        control.order_move();
        while done() == before && machine.wait_for(Duration::from_micros(50)).is_none() {}
    }
    println!("moved {:?}, seed {seed}", lock(&control.moves));
    let text = all_words(&machine, &said);
    let moves = *lock(&control.moves);
    (text, moves)
}

/// The lines that do not tell which pieces of state there are.
fn lines(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| line.starts_with("chain: "))
        .collect()
}

/// What a test does.
struct Setting {
    tsc_hz: u64,
    /// For `chain`'s command line.
    without: &'static str,
    /// How many moves in each direction.
    moves: u64,
    seed: u64,
}

impl Setting {
    fn new(moves: u64) -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
        let setting = Self {
            tsc_hz: MachineConfig::default().tsc_hz,
            without: "",
            moves: number("TRAPGATE_MOVES").unwrap_or(moves),
            seed: number("TRAPGATE_SEED").unwrap_or_else(crate::clock::time_of_day),
        };
        println!(
            "{} moves in each direction, TRAPGATE_SEED={}",
            setting.moves, setting.seed
        );
        setting
    }

    /// As the KVM of this host needs it, or `None`, with a word about it, where there is none.
    fn with_kvm(moves: u64) -> Option<Self> {
        let facts = match Facts::probe() {
            Ok(facts) => facts,
            Err(error) => {
                skipped(&format!("no KVM here: {error}"));
                return None;
            }
        };
        let profile = CpuProfile::new(crate::Level::V2, facts.tsc_hz);
        let without = match facts.check_profile(&profile) {
            Ok(()) => "",
            Err(_) => PARAVIRTUAL_CANNOT,
        };
        Some(Self {
            tsc_hz: facts.tsc_hz,
            without,
            ..Self::new(moves)
        })
    }
}

/// Moves a guest that computes, with timer interrupts and NMIs all the while, between two engines at
/// random moments; it ends with the result that it has on the interpreter alone.
fn wander(setting: &Setting, pair: [EngineKind; 2], rounds: u64) {
    let Setting {
        tsc_hz,
        without,
        moves: wanted,
        seed,
    } = *setting;
    let command_line = format!("rounds={rounds} {without}");
    let alone = [EngineKind::Interp; 2];
    let (alone, _) = chain(&command_line, tsc_hz, alone, 0, seed);
    assert!(alone.contains("the clock went back 0 times"), "{alone}");
    assert!(alone.contains("0 pieces of state lost"), "{alone}");
    let mut made: Moves = [0, 0];
    let mut run = 0;
    while made.iter().any(|&made| made < wanted) {
        let left = (2 * wanted).saturating_sub(made.iter().sum()) + 2;
        let seed = seed.wrapping_add(run);
        // From either end.
        let swapped = run % 2 == 1;
        let order = if swapped { [pair[1], pair[0]] } else { pair };
        let (moved, mut moves) = chain(&command_line, tsc_hz, order, left, seed);
        if swapped {
            moves.swap(0, 1);
        }
        println!("run {run}: {moves:?}");
        assert_eq!(lines(&moved), lines(&alone), "seed {seed}, run {run}");
        made = [made[0] + moves[0], made[1] + moves[1]];
        run += 1;
    }
    println!(
        "{} moves from {}, {} from {}",
        made[0], pair[0], made[1], pair[1]
    );
}

#[test]
fn computation_survives_moves_between_interpreter_and_kvm_at_random_moments() {
    if let Some(setting) = Setting::with_kvm(MOVES) {
        wander(&setting, [EngineKind::Interp, EngineKind::Kvm], 3000);
    }
}

#[test]
fn computation_survives_moves_between_interpreter_and_translator_at_random_moments() {
    let setting = Setting::new(MOVES);
    wander(&setting, [EngineKind::Interp, EngineKind::Jit], 5000);
}

#[test]
fn computation_survives_moves_between_translator_and_kvm_at_random_moments() {
    if let Some(setting) = Setting::with_kvm(MOVES) {
        wander(&setting, [EngineKind::Jit, EngineKind::Kvm], 3000);
    }
}

/// Makes processors of an engine; those of KVM in a machine of which the kernel does what it can of `in_kernel`.
pub(crate) fn constructor(engine: EngineKind, in_kernel: InKernel) -> Box<dyn Constructor> {
    match engine {
        EngineKind::Kvm => Box::new(OnKvm::new(&Host::probe(), in_kernel)),
        _ => Box::new(By(|memory, world, profile, index, count| {
            let vcpu = Interpreter::new(memory, world, profile, index, count);
            Ok(Box::new(vcpu) as Box<dyn Vcpu>)
        })),
    }
}

pub(crate) fn choice(kind: EngineKind) -> Choice {
    Choice {
        kind,
        reason: "a test".to_owned(),
    }
}

/// Starts `chain` on an engine; and what it says.
fn start(
    engine: EngineKind,
    in_kernel: InKernel,
    command_line: &str,
    tsc_hz: u64,
) -> (Machine, Arc<Mutex<Vec<u8>>>) {
    let said = Arc::new(Mutex::new(Vec::new()));
    let config = MachineConfig {
        memory_bytes: 16 << 20,
        kernel: Content::from(trapgate_guests::named("chain").unwrap().image),
        command_line: command_line.to_owned(),
        tsc_hz,
        ..MachineConfig::default()
    };
    let make = constructor(engine, in_kernel);
    let machine = Machine::start_on(config, hooks(&said), choice(engine), &*make).unwrap();
    (machine, said)
}

pub(crate) fn hooks(said: &Arc<Mutex<Vec<u8>>>) -> Hooks {
    let sink = Arc::clone(said);
    Hooks {
        serial: Box::new(move |bytes| lock(&sink).extend_from_slice(bytes)),
        ..Hooks::default()
    }
}

/// What a machine said, once it has ended by itself.
#[track_caller]
fn all_words(machine: &Machine, said: &Mutex<Vec<u8>>) -> String {
    let outcome = machine.wait_for(LIMIT);
    let text = String::from_utf8_lossy(&lock(said)).into_owned();
    if outcome.is_none() {
        let pause = machine.pause();
        let (chipset, _) = machine.board.save();
        let processors = pause.processors();
        panic!("the guest hangs: {processors:#x?}, {chipset:#x?}:\n{text}");
    }
    assert!(
        matches!(outcome, Some(Outcome::PoweredOff)),
        "{outcome:?}:\n{text}"
    );
    text
}

/// The last five lines of it: whether the clock went back, how many pieces of state were lost, which timers ticked, the
/// result.
#[track_caller]
fn last_words(machine: &Machine, said: &Mutex<Vec<u8>>) -> Vec<String> {
    let text = all_words(machine, said);
    let lines = lines(&text);
    let last = lines.len().saturating_sub(5);
    lines[last..].iter().map(|&line| line.to_owned()).collect()
}

/// A machine that computes is saved at random moments on one engine, and each time ends with the right
/// result when it is restored on the other.
fn cross(in_kernel: InKernel) {
    let Some(Setting {
        tsc_hz,
        without,
        moves,
        seed,
    }) = Setting::with_kvm(SNAPSHOTS)
    else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let command_line = format!("rounds=200 {without}");
    let (machine, said) = start(EngineKind::Interp, in_kernel, &command_line, tsc_hz);
    let expected = last_words(&machine, &said);
    assert!(
        expected.contains(&"chain: 0 pieces of state lost".to_owned()),
        "{expected:?}"
    );
    let mut die = Die(seed | 1);
    let mut too_late = 0;
    for (from, to, most) in [
        (EngineKind::Interp, EngineKind::Kvm, 90),
        (EngineKind::Kvm, EngineKind::Interp, 500),
    ] {
        let mut moved = 0;
        while moved < moves {
            let (machine, _) = start(from, in_kernel, &command_line, tsc_hz);
            let path = directory.path().join(format!("{from}-{moved}"));
            let ended = machine.wait_for(die.time(Duration::from_millis(most)));
            if ended.is_some() || machine.snapshot(&path).is_err() {
                // Its moment would have come after its end.
                assert!(machine.wait_for(Duration::from_secs(10)).is_some());
                too_late += 1;
                continue;
            }
            machine.stop();
            drop(machine);
            let snapshot = Snapshot::open(&path).unwrap();
            let said = Arc::default();
            let make = constructor(to, in_kernel);
            let machine = Machine::restore_on(&snapshot, hooks(&said), choice(to), &*make).unwrap();
            let words = last_words(&machine, &said);
            // Some of them may have been said before.
            assert!(
                expected.ends_with(&words),
                "from {from} to {to}, move {moved}, seed {seed}: {words:?} and not {expected:?}"
            );
            std::fs::remove_dir_all(&path).unwrap();
            // All of them: there was nothing left to compute.
            moved += u64::from(!words.is_empty());
        }
        println!("{moved} from {from} to {to}; {too_late} came too late until now");
    }
}

#[test]
fn computation_survives_a_snapshot_that_another_engine_restores() {
    cross(InKernel::NOTHING);
}

#[test]
fn computation_survives_a_snapshot_with_the_kernels_interrupt_controllers() {
    if Facts::probe().is_ok_and(|facts| !facts.irqchip) {
        skipped("this KVM has no interrupt controllers");
        return;
    }
    cross(InKernel::ALL);
}
