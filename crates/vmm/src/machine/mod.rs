//! The machine as its owner sees it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use trapgate_boot::{Entry, Protocol};
use trapgate_chipset::Chipset;
use trapgate_engine::probe::Host;
use trapgate_engine::{Signal, Vcpu};
use trapgate_memory::{GuestMemory, Watch};
use trapgate_pci::Bus;
use trapgate_virtio::block::SECTOR;
use trapgate_virtio::{ConsoleHandle, Disk, PortOutput};
use trapgate_x86::{CpuProfile, CpuState};

use crate::alarm::Alarm;
use crate::board::Board;
use crate::clock::{Clock, time_of_day};
use crate::crew::{Crew, Message};
use crate::doorbells::Doorbells;
use crate::pc::{self, Consoles};
use crate::processor::{Processor, Tally};
use crate::serial::SerialOutput;
use crate::snapshot::{self, MachineState, Materials};
use crate::supervisor::{
    Agenda, Brake, Ending, Event, Supervisor, panic_message, start_processors,
};
use crate::turns::Turns;
use crate::world::PcWorld;
use crate::{
    Choice, Counters, Failure, MachineConfig, MachineError, Outcome, SerialHandle, Snapshot,
    SnapshotError, engines,
};

/// Ports of one console device.
const MOST_PORTS: usize = 31;

/// A named port of the virtio console (under Linux `/sys/class/virtio-ports/*/name`).
pub struct Port {
    /// Its name.
    pub name: String,
    /// Where the guest's output goes.
    pub output: Box<dyn PortOutput>,
}

/// Takes the output of a serial port: bytes, at least one.
pub type SerialSink = Box<dyn FnMut(&[u8]) + Send>;

/// Where the guest's output goes.
pub struct Hooks {
    /// Takes what the guest writes to COM1. Called on a thread of its own, and may wait.
    pub serial: SerialSink,
    /// Takes what the guest writes to its terminal, `/dev/hvc0`; without it there is no terminal.
    pub terminal: Option<Box<dyn PortOutput>>,
    /// Named ports.
    pub ports: Vec<Port>,
}

impl Default for Hooks {
    /// Everything is dropped; there is neither terminal nor port.
    fn default() -> Self {
        Self {
            serial: Box::new(|_| {}),
            terminal: None,
            ports: Vec::new(),
        }
    }
}

/// The host's side of a terminal or port.
#[derive(Clone)]
pub struct PortHandle {
    console: ConsoleHandle,
    port: usize,
}

impl PortHandle {
    /// Gives input to the guest; tells how many bytes of it were accepted. The guest gets them when it
    /// has the port open.
    pub fn input(&self, data: &[u8]) -> usize {
        self.console.input(self.port, data)
    }

    /// Gives all of `data` to the guest, and waits as often as need be; `false` if the port was closed,
    /// or the machine ended, before.
    pub fn input_all(&self, data: &[u8]) -> bool {
        self.console.input_all(self.port, data)
    }

    /// There will be no more input; the guest sees the end once it has read what there is (not on a
    /// terminal, which has no end).
    pub fn close_input(&self) {
        self.console.close_input(self.port);
    }

    /// Tells the guest the size of the terminal, in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.console.resize(columns, rows);
    }
}

/// A running machine. Dropping it stops it.
pub struct Machine {
    engine: Choice,
    protocol: Option<Protocol>,
    kernel_version: Option<String>,
    pub(crate) board: Arc<Board>,
    pub(crate) crew: Arc<Crew>,
    agenda: Arc<Agenda>,
    pub(crate) brake: Arc<Brake>,
    pub(crate) consoles: Arc<Consoles>,
    /// What else a snapshot is made from.
    pub(crate) source: snapshot::Source,
    ending: Arc<Ending>,
    tallies: Vec<Arc<Tally>>,
    resets: Arc<AtomicU64>,
    supervisor: Option<JoinHandle<()>>,
}

/// What other threads, such as a signal handler's, can do with a machine. It may outlive the machine
/// and then does nothing.
#[derive(Clone)]
pub struct MachineHandle {
    board: Arc<Board>,
    agenda: Arc<Agenda>,
}

impl MachineHandle {
    /// Stops the machine as if its power cord were pulled; [`Machine::wait`] gives [`Outcome::Stopped`].
    pub fn stop(&self) {
        self.agenda.stop();
    }

    /// Presses the ACPI power button, which asks the guest to shut down.
    pub fn power_button(&self) {
        self.board
            .operate(|chipset, now| chipset.press_power_button(now));
    }
}

/// What a machine begins with.
struct Beginning<'a> {
    disks: Vec<Disk>,
    memory: Arc<GuestMemory>,
    chipset: Chipset,
    clock: Clock,
    protocol: Option<Protocol>,
    kernel_version: Option<String>,
    start: Start<'a>,
}

/// How it goes on from there.
enum Start<'a> {
    /// A kernel is in memory, and firmware would have left the processors so.
    Kernel(Box<Entry>),
    /// As it was when it was saved.
    Saved(&'a MachineState),
}

/// Makes processor `index` of `count`.
pub(crate) type MakeVcpu<'a> = &'a dyn engines::Constructor;

impl Machine {
    /// Builds a machine and lets it run.
    ///
    /// # Errors
    /// Any [`MachineError`]; [`MachineError::fix`] says what to do about it.
    pub fn start(mut config: MachineConfig, hooks: Hooks) -> Result<Self, MachineError> {
        config.validate()?;
        let (choice, make) = engines::take(&config, &Host::probe())?;
        config.tsc_hz = engines::tsc_hz(choice.kind, config.tsc_hz)?;
        Self::start_on(config, hooks, choice, &*make)
    }

    /// As [`Self::start`], with processors that `make` gives.
    pub(crate) fn start_on(
        config: MachineConfig,
        hooks: Hooks,
        engine: Choice,
        make: MakeVcpu<'_>,
    ) -> Result<Self, MachineError> {
        config.validate()?;
        // What a person can get wrong comes first, before there are threads.
        let disks = pc::open_disks(&config)?;
        let memory = pc::memory(&config)?;
        let entry = pc::load_kernel(&config, &memory)?;
        let epoch = config.epoch.unwrap_or_else(time_of_day);
        let beginning = Beginning {
            disks,
            memory: Arc::new(memory),
            chipset: pc::chipset(&config, epoch)?,
            clock: Clock::new(epoch),
            protocol: Some(entry.protocol),
            kernel_version: entry.version.clone(),
            start: Start::Kernel(Box::new(entry)),
        };
        Self::begin(config, hooks, engine, make, beginning)
    }

    /// Builds the machine that was saved, and lets it go on where it stood.
    ///
    /// # Errors
    /// Any [`SnapshotError`]; [`SnapshotError::fix`] says what to do about it.
    pub fn restore(snapshot: &Snapshot, hooks: Hooks) -> Result<Self, SnapshotError> {
        let (choice, make) = engines::take_saved(snapshot.config(), &Host::probe())?;
        Self::restore_on(snapshot, hooks, choice, &*make)
    }

    /// As [`Self::restore`], with processors that `make` gives.
    pub(crate) fn restore_on(
        snapshot: &Snapshot,
        hooks: Hooks,
        engine: Choice,
        make: MakeVcpu<'_>,
    ) -> Result<Self, SnapshotError> {
        let Materials {
            disks,
            chipset,
            memory,
        } = snapshot.materials(&hooks)?;
        let state = snapshot.state();
        let beginning = Beginning {
            disks,
            memory: Arc::new(memory),
            chipset,
            clock: Clock::at(state.clock.epoch, state.clock.now),
            protocol: None,
            kernel_version: snapshot.header().guest.clone(),
            start: Start::Saved(state),
        };
        let machine = Self::begin(snapshot.config().clone(), hooks, engine, make, beginning)?;
        Ok(machine)
    }

    /// Builds the machine around what it begins with, and lets it run.
    fn begin(
        config: MachineConfig,
        mut hooks: Hooks,
        engine: Choice,
        make: MakeVcpu<'_>,
        beginning: Beginning<'_>,
    ) -> Result<Self, MachineError> {
        let Beginning {
            disks,
            memory,
            chipset,
            clock,
            protocol,
            kernel_version,
            start,
        } = beginning;
        if hooks.ports.len() > MOST_PORTS {
            return Err(MachineError::Ports {
                ports: hooks.ports.len(),
            });
        }
        let config = Arc::new(config);
        let count = config.cpus as usize;
        let crew = Arc::new(Crew::new(count));
        let agenda = Arc::new(Agenda::default());
        let serial = Arc::new(SerialOutput::default());
        let board = Arc::new(Board::new(
            chipset,
            clock,
            Arc::clone(&crew),
            Arc::clone(&agenda),
            Arc::clone(&serial),
        ));
        let bus = Arc::new(Bus::new());
        let source = snapshot::Source {
            config: Arc::clone(&config),
            memory: Arc::clone(&memory),
            bus: Arc::clone(&bus),
            disks: disks.iter().map(|disk| disk.sectors() * SECTOR).collect(),
            has_terminal: hooks.terminal.is_some(),
        };
        let consoles = pc::add_devices(&config, disks, &mut hooks, &bus, &board, &memory)?;
        let consoles = Arc::new(consoles);
        if let Start::Saved(state) = &start {
            bus.restore(&state.bus).map_err(SnapshotError::from)?;
            board.restore_serial_input(&state.serial_input);
        }

        let profile = CpuProfile::new(config.level, config.tsc_hz);
        let mut vcpus: Vec<Box<dyn Vcpu>> = (0..count)
            .map(|cpu| {
                let world = PcWorld {
                    board: Arc::clone(&board),
                    bus: Arc::clone(&bus),
                    cpu,
                };
                let (index, count) = (cpu as u32, config.cpus);
                make.vcpu(
                    Arc::clone(&memory),
                    Box::new(world),
                    profile.clone(),
                    index,
                    count,
                )
            })
            .collect::<Result<_, MachineError>>()?;
        if let Some(controllers) = make.controllers() {
            board.lend_controllers_to(controllers);
        }
        let doorbells = make
            .ringer()
            .map(|ringer| Doorbells::new(&bus, ringer))
            .transpose()
            .map_err(pc::thread("doorbells"))?;
        let signals: Vec<_> = vcpus.iter().map(|vcpu| vcpu.signals()).collect();
        crew.set_signals(signals.clone());
        if let Start::Saved(state) = &start {
            for (cpu, (vcpu, state)) in vcpus.iter_mut().zip(&state.processors).enumerate() {
                vcpu.set_state(state)
                    .map_err(|source| MachineError::refused(engine.kind, cpu, source))?;
                if board.operate(|chipset, _| chipset.interrupt_pending(cpu)) {
                    signals[cpu].raise(Signal::Interrupt);
                }
            }
        }
        let turns =
            (count > 1 && engine.kind.takes_turns()).then(|| Arc::new(Turns::new(signals.clone())));
        let tallies: Vec<_> = vcpus
            .iter()
            .map(|vcpu| Arc::new(Tally::of(&**vcpu)))
            .collect();

        // From here on threads must be ended if one does not start.
        let mut threads = Threads {
            handles: Vec::new(),
            crew: Arc::clone(&crew),
            board: Arc::clone(&board),
            doorbells: doorbells.clone(),
            serial: Arc::clone(&serial),
            memory: Arc::clone(&memory),
        };
        let ending = Arc::new(Ending::default());
        if memory.watch().is_some() {
            let (ending, memory) = (Arc::clone(&ending), Arc::clone(&memory));
            // Not by way of the supervisor: it may be waiting for the thread that stands still.
            threads.start("saved memory", "saved memory".to_owned(), move || {
                if memory.watch().is_some_and(Watch::wait) {
                    ending.set(Outcome::Failed(Failure::MemoryGone));
                }
            })?;
        }
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let processor = Processor {
                index,
                vcpu,
                signals: Arc::clone(&signals[index]),
                board: Arc::clone(&board),
                crew: Arc::clone(&crew),
                turns: turns.clone(),
                tally: Arc::clone(&tallies[index]),
                alarm: Alarm::default(),
            };
            threads.start("a processor", format!("processor {index}"), || {
                processor.run()
            })?;
        }
        let timer = Arc::clone(&board);
        threads.start("timers", "timers".to_owned(), move || timer.run_timer())?;
        if let Some(doorbells) = doorbells.clone() {
            let of = Arc::clone(&board);
            threads.start("doorbells", "doorbells".to_owned(), move || {
                if let Err(error) = doorbells.run() {
                    of.report(Event::Died {
                        thread: "doorbells".to_owned(),
                        message: error.to_string(),
                    });
                }
            })?;
        }
        let output = Arc::clone(&serial);
        let mut sink = hooks.serial;
        thread::Builder::new()
            .name("serial-out".to_owned())
            .spawn(move || output.run(&mut *sink))
            .map_err(pc::thread("serial output"))?;

        // The process confines itself here (DESIGN.md, idea 4): every file is open and every thread
        // but the supervisor's is started, and no instruction of the guest has run.

        if let Start::Kernel(entry) = start {
            start_processors(&config, &crew, *entry);
        }
        let brake = Arc::new(Brake::new(
            Arc::clone(&crew),
            Arc::clone(&bus),
            doorbells,
            Arc::clone(&board),
        ));
        let resets = Arc::new(AtomicU64::new(0));
        let supervisor = Supervisor {
            config,
            memory,
            board: Arc::clone(&board),
            bus,
            crew: Arc::clone(&crew),
            agenda: Arc::clone(&agenda),
            brake: Arc::clone(&brake),
            serial,
            consoles: Arc::clone(&consoles),
            ending: Arc::clone(&ending),
            resets: Arc::clone(&resets),
            threads,
        };
        let supervisor = thread::Builder::new()
            .name("supervisor".to_owned())
            .spawn(move || supervisor.run())
            .map_err(pc::thread("the supervisor"))?;
        brake.release();
        Ok(Self {
            engine,
            protocol,
            kernel_version,
            board,
            crew,
            agenda,
            brake,
            consoles,
            source,
            ending,
            tallies,
            resets,
            supervisor: Some(supervisor),
        })
    }

    /// Waits until the machine has ended and everything that the guest wrote until then has been given
    /// to the hooks (or their owners have not taken it for two seconds). Once ended it gives the same
    /// answer again.
    pub fn wait(&self) -> &Outcome {
        self.ending.wait()
    }

    /// Like [`Self::wait`] for at most `limit`; `None` if the machine then still runs.
    pub fn wait_for(&self, limit: Duration) -> Option<&Outcome> {
        self.ending.wait_for(limit)
    }

    /// A handle for other threads.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle {
            board: Arc::clone(&self.board),
            agenda: Arc::clone(&self.agenda),
        }
    }

    /// Stops the machine as if its power cord were pulled; [`Self::wait`] gives [`Outcome::Stopped`].
    pub fn stop(&self) {
        self.handle().stop();
    }

    /// Presses the ACPI power button, which asks the guest to shut down.
    pub fn power_button(&self) {
        self.handle().power_button();
    }

    /// Stands the machine still, its clock too, until the guard is dropped.
    pub fn pause(&self) -> Pause<'_> {
        self.brake.engage();
        Pause { machine: self }
    }

    /// Stands the machine still until [`Self::release_brake`].
    pub(crate) fn engage_brake(&self) {
        self.brake.engage();
    }

    /// Undoes one [`Self::engage_brake`].
    pub(crate) fn release_brake(&self) {
        self.brake.release();
    }

    /// The state of each processor of a machine that stands still; none once it has ended.
    pub(crate) fn processor_states(&self) -> Vec<CpuState> {
        let (answer, answers) = mpsc::channel();
        for cpu in 0..self.tallies.len() {
            self.crew.post(cpu, Message::Report(answer.clone()));
        }
        drop(answer);
        let mut states: Vec<(usize, CpuState)> = answers.iter().collect();
        states.sort_by_key(|(cpu, _)| *cpu);
        states.into_iter().map(|(_, state)| state).collect()
    }

    /// The engine, and why it was taken.
    pub fn engine(&self) -> &Choice {
        &self.engine
    }

    /// The way into the kernel that was taken; `None` for a machine that was restored.
    pub fn protocol(&self) -> Option<Protocol> {
        self.protocol
    }

    /// What the kernel calls itself, if it says so where it can be found without running it.
    pub fn kernel_version(&self) -> Option<&str> {
        self.kernel_version.as_deref()
    }

    /// The terminal, if [`Hooks::terminal`] was given.
    pub fn terminal(&self) -> Option<PortHandle> {
        let console = self.consoles.terminal.clone()?;
        Some(PortHandle { console, port: 0 })
    }

    /// The port of this name.
    pub fn port(&self, name: &str) -> Option<PortHandle> {
        let console = self.consoles.ports.clone()?;
        let port = self.consoles.names.iter().position(|port| port == name)?;
        Some(PortHandle { console, port })
    }

    /// COM1's input.
    pub fn serial(&self) -> SerialHandle {
        SerialHandle {
            board: Arc::clone(&self.board),
        }
    }

    /// What it did until now.
    pub fn counters(&self) -> Counters {
        Counters {
            processors: self.tallies.iter().map(|tally| tally.read()).collect(),
            clock: self.board.clock.now(),
            resets: self.resets.load(Ordering::Relaxed),
        }
    }

    /// Calls the processors that run out of the guest, so that the next [`Self::counters`] are no older than this. Waits a
    /// few milliseconds at most.
    pub(crate) fn refresh_counters(&self) {
        let running = self.tallies.iter().enumerate();
        let running: Vec<_> = running
            .filter_map(|(cpu, tally)| Some((cpu, tally, tally.inside()?)))
            .collect();
        for (cpu, ..) in &running {
            self.crew.raise(*cpu, Signal::Kick);
        }
        for _ in 0..20 {
            let told = |(_, tally, exits): &(_, &Arc<Tally>, u64)| tally.told_since(*exits);
            if running.iter().all(told) {
                return;
            }
            thread::sleep(Duration::from_micros(250));
        }
    }

    /// What the engine spends host time on, by processor.
    pub(crate) fn costs(&self) -> Vec<Vec<trapgate_engine::Cost>> {
        let costs = self.tallies.iter().filter_map(|tally| tally.costs.as_ref());
        costs.map(|costs| costs.costs()).collect()
    }

    /// All that it counts, as clients get it.
    pub fn account(&self) -> trapgate_api::data::Counters {
        crate::control::counters(self, 0)
    }

    /// What the engine counts, by processor.
    pub(crate) fn engine_counters(&self) -> Vec<Vec<trapgate_engine::Counter>> {
        let engine = |tally: &Arc<Tally>| tally.engine.clone();
        self.tallies.iter().map(engine).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.agenda.stop();
        if let Some(Outcome::Failed(Failure::MemoryGone)) = self.ending.wait_for(Duration::ZERO) {
            // A thread of the machine stands still for good, and with it whoever waits for it.
            return;
        }
        if let Some(supervisor) = self.supervisor.take() {
            // Its panic would be a defect that has been printed.
            let _ = supervisor.join();
        }
    }
}

/// The threads of a machine's processors and timers. They end with this.
pub(crate) struct Threads {
    handles: Vec<JoinHandle<()>>,
    crew: Arc<Crew>,
    board: Arc<Board>,
    doorbells: Option<Arc<Doorbells>>,
    serial: Arc<SerialOutput>,
    memory: Arc<GuestMemory>,
}

impl Threads {
    fn start(
        &mut self,
        what: &'static str,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), MachineError> {
        let (board, of) = (Arc::clone(&self.board), name.clone());
        // A panic is a defect of ours. The machine has to end then: without a processor, or without
        // timers, it looks to its guest and to its owner as if it hung.
        let guarded = move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
                board.report(Event::Died {
                    thread: of,
                    message: panic_message(&*panic),
                });
            }
        };
        let handle = thread::Builder::new()
            .name(name)
            .spawn(guarded)
            .map_err(pc::thread(what))?;
        self.handles.push(handle);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.crew.finish();
        self.board.end();
        if let Some(watch) = self.memory.watch() {
            watch.end();
        }
        if let Some(doorbells) = &self.doorbells {
            doorbells.end();
        }
        for handle in self.handles.drain(..) {
            // A panic has been reported as an event.
            let _ = handle.join();
        }
        // The thread of the serial port's output is not joined: it may wait for the host for ever.
        self.serial.close();
    }
}

/// The machine stands still as long as this lives. Several may; the last one to go lets it run.
pub struct Pause<'a> {
    machine: &'a Machine,
}

impl Pause<'_> {
    /// The state of each processor; none once the machine has ended.
    pub fn processors(&self) -> Vec<CpuState> {
        self.machine.processor_states()
    }

    /// What the machine did until now, exactly.
    pub fn counters(&self) -> Counters {
        self.machine.counters()
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.machine.brake.release();
    }
}

#[cfg(test)]
mod tests;
