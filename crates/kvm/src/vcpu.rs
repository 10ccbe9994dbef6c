//! A processor that the host's hardware runs: the loop around KVM_RUN.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug};
use kvm_ioctls::{VcpuExit, VcpuFd};
use trapgate_engine::{Counter, Exit, Failure, Measure, Signal, Signals, StateError, Vcpu, World};
use trapgate_x86::{Activity, CpuState};

use crate::error::{call, named};
use crate::kick::{Alarm, Kick, with_signal_waiting};
use crate::machine::KvmMachine;
use crate::state::Ours;
use crate::{KvmError, calls};

/// A processor that the host's hardware runs.
pub struct KvmVcpu {
    pub(crate) vcpu: VcpuFd,
    pub(crate) machine: Arc<KvmMachine>,
    pub(crate) world: Box<dyn World>,
    index: usize,
    kick: Arc<Kick>,
    signals: Arc<Signals>,
    /// State that the kernel does not keep.
    pub(crate) ours: Ours,
    pub(crate) activity: Activity,
    /// IA32_APIC_BASE as the kernel knows it, which shows it in CPUID.
    pub(crate) apic_base: u64,
    /// The kernel has not taken the answer to the last exit, without which the state is that of half
    /// an instruction.
    pub(crate) answer_waits: bool,
    /// RFLAGS.IF, and whether the processor takes an interrupt now: as of the last exit, or of the state
    /// that was set since.
    pub(crate) interrupts_on: bool,
    pub(crate) ready: bool,
    /// The interrupt controller signalled an interrupt that could not be taken yet.
    pub(crate) interrupt_waits: bool,
    /// Somebody said so: it is not only that nobody has looked since a state was set.
    interrupt_signalled: bool,
    /// [`Vcpu::step`] wants one instruction.
    step_wanted: bool,
    /// The kernel runs single steps.
    stepping: bool,
    /// Ends a KVM_RUN that would overlook something.
    alarm: Option<Alarm>,
    /// The stretch between two pauses in which the TSC was last set, see [`crate::pace`]; 0 if it
    /// is not.
    pub(crate) stretch: usize,
    /// The state's offset of the TSC, if it is not set.
    pub(crate) tsc_offset: u64,
    counters: Counters,
}

/// What there is to count: how often the guest was left, and for what.
struct Counters {
    exits: Counter,
    ports: Counter,
    memory: Counter,
    msrs: Counter,
}

impl Counters {
    fn new() -> Self {
        let events = |name, help| Counter::new(name, Measure::Events, help);
        Self {
            exits: events(
                "exits",
                "Times that the guest was left for the program that runs it",
            ),
            ports: events("port_exits", "Those of them for an access to a port"),
            memory: events(
                "device_exits",
                "Those of them for an access to a device's memory",
            ),
            msrs: events("msr_exits", "Those of them for a model-specific register"),
        }
    }
}

/// How long a task priority that fell may go unnoticed, in nanoseconds, where nobody tells.
const OVERLOOKED: u32 = 300_000;

/// What one KVM_RUN ended with.
enum Ended {
    /// The guest asks for something. Once it is answered, the answer waits for the kernel to take it.
    Memory,
    Port,
    ReadMsr(u32),
    WriteMsr(u32, u64),
    /// Nothing that concerns the guest.
    Nothing,
    Halted,
    ShutDown,
    Stepped,
    /// The kernel gave up, with a code for it.
    InternalError,
    Failed(&'static str, u64),
}

impl KvmVcpu {
    pub(crate) fn new(
        machine: Arc<KvmMachine>,
        vcpu: VcpuFd,
        world: Box<dyn World>,
        index: usize,
    ) -> Result<Self, KvmError> {
        let kick = Arc::new(Kick::default());
        let interrupter = Arc::clone(&kick);
        let mut new = Self {
            vcpu,
            machine,
            world,
            index,
            signals: Arc::new(Signals::with_interrupter(move || interrupter.kick())),
            kick,
            ours: Ours::default(),
            activity: Activity::Running,
            apic_base: 0,
            answer_waits: false,
            interrupts_on: false,
            ready: false,
            interrupt_waits: false,
            interrupt_signalled: false,
            step_wanted: false,
            stepping: false,
            alarm: None,
            stretch: 0,
            tsc_offset: 0,
            counters: Counters::new(),
        };
        new.import(&CpuState::default())?;
        Ok(new)
    }

    /// Whether the kernel has the interrupt controllers.
    pub(crate) fn has_kernel_controllers(&self) -> bool {
        self.machine.has_controllers()
    }

    /// Signals from outside, and interrupts. Gives the exit if the guest is not to go on.
    fn between_entries(&mut self) -> Result<Option<Exit>, KvmError> {
        let signals = Arc::clone(&self.signals);
        // The hardware's translations are the kernel's, which looks after them.
        signals.take(Signal::Flush);
        if signals.take(Signal::Nmi) {
            self.vcpu.nmi().map_err(call("KVM_NMI"))?;
            if self.activity == Activity::Halted {
                self.activity = Activity::Running;
            }
        }
        if signals.take(Signal::Interrupt) {
            self.interrupt_waits = true;
            self.interrupt_signalled = true;
        }
        if signals.take(Signal::Kick) {
            return Ok(Some(Exit::Kicked));
        }
        if self.has_kernel_controllers() {
            // It halts, starts and takes interrupts in the kernel.
            return Ok((self.activity == Activity::Shutdown).then_some(Exit::ShutDown));
        }
        match self.activity {
            Activity::Running | Activity::Halted => {}
            Activity::WaitForSipi => return Ok(Some(Exit::Halted)),
            Activity::Shutdown => return Ok(Some(Exit::ShutDown)),
        }
        // The shadow of STI ends with the HLT after it.
        let ready = self.ready || self.activity == Activity::Halted;
        if self.interrupt_waits && self.interrupts_on && ready {
            match self.world.take_interrupt() {
                Some(vector) => {
                    calls::interrupt(&self.vcpu, vector).map_err(named("KVM_INTERRUPT"))?;
                    self.activity = Activity::Running;
                    // There may be another behind it, from the other interrupt controller.
                    self.ready = false;
                }
                None => {
                    self.interrupt_waits = false;
                    self.interrupt_signalled = false;
                }
            }
        }
        Ok((self.activity == Activity::Halted).then_some(Exit::Halted))
    }

    /// Lets the guest run until it asks for something, and deals with that.
    fn enter(&mut self) -> Result<Option<Exit>, KvmError> {
        if self.has_kernel_controllers() {
            self.set_stepping(self.step_wanted)?;
            let ended = self.run_kernel(false)?;
            return self.act(ended);
        }
        let priority = u64::from(self.world.task_priority());
        let window = self.interrupt_waits;
        let step = self.step_wanted || self.must_be_watched()?;
        self.set_stepping(step)?;
        // Nor does such a KVM tell that the task priority fell.
        let alarm = self.machine.overlooks_windows() && priority != 0 && !step;
        if alarm {
            self.alarm()?.set(OVERLOOKED);
        }
        let run = self.vcpu.get_kvm_run();
        run.request_interrupt_window = window.into();
        run.cr8 = priority;
        let ended = self.run_kernel(false)?;
        if let (true, Some(alarm)) = (alarm, &self.alarm) {
            alarm.set(0);
        }
        let run = self.vcpu.get_kvm_run();
        let priority_now = run.cr8;
        self.interrupts_on = run.if_flag != 0;
        self.ready = run.ready_for_interrupt_injection != 0;
        if priority_now != priority {
            self.world.set_task_priority(priority_now as u8);
            self.interrupt_waits = true;
            self.interrupt_signalled = true;
        }
        self.act(ended)
    }

    /// One KVM_RUN. `only_answer`: it returns as soon as the kernel has taken the last answer.
    fn run_kernel(&mut self, only_answer: bool) -> Result<Ended, KvmError> {
        self.vcpu.set_kvm_immediate_exit(only_answer.into());
        // Whoever kicked before the flag was cleared left a signal in the word; who does so after it
        // sets the flag again (`kick`).
        fence(Ordering::SeqCst);
        if self.signals.any() {
            self.vcpu.set_kvm_immediate_exit(1);
        }
        self.answer_waits = false;
        let ended = match self.vcpu.run() {
            Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => Ended::Memory,
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Ended::Port,
            Ok(VcpuExit::X86Rdmsr(read)) => Ended::ReadMsr(read.index),
            Ok(VcpuExit::X86Wrmsr(write)) => Ended::WriteMsr(write.index, write.data),
            Ok(VcpuExit::Hlt) => Ended::Halted,
            Ok(VcpuExit::Shutdown) => Ended::ShutDown,
            Ok(VcpuExit::Debug(_)) => Ended::Stepped,
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => Ended::Nothing,
            Ok(VcpuExit::InternalError) => Ended::InternalError,
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Ended::Failed("the processor refused to enter the guest", reason)
            }
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                Ended::Failed("KVM could not reach guest memory", gpa)
            }
            Ok(VcpuExit::Unsupported(reason)) => {
                Ended::Failed("KVM left the guest for an unknown reason", reason.into())
            }
            Ok(_) => Ended::Failed("KVM left the guest for a reason that has no place here", 0),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ended::Nothing,
            Err(error) => return Err(call("KVM_RUN")(error)),
        };
        Ok(ended)
    }

    /// Deals with what a KVM_RUN ended with. Gives the exit if the guest is not to go on.
    fn act(&mut self, ended: Ended) -> Result<Option<Exit>, KvmError> {
        self.counters.exits.add(1);
        match &ended {
            Ended::Memory => self.counters.memory.add(1),
            Ended::Port => self.counters.ports.add(1),
            Ended::ReadMsr(_) | Ended::WriteMsr(..) => self.counters.msrs.add(1),
            _ => {}
        }
        match ended {
            Ended::Nothing => {}
            // After the task priority that the guest had then was noticed: it may be what is asked for.
            Ended::Memory => {
                self.answer_waits = true;
                self.access_memory();
            }
            Ended::Port => {
                self.answer_waits = true;
                self.access_port();
            }
            Ended::ReadMsr(index) => {
                self.answer_waits = true;
                let value = self.read_msr(index);
                calls::answer_msr(self.vcpu.get_kvm_run(), value);
            }
            Ended::WriteMsr(index, value) => {
                self.answer_waits = true;
                let written = self.write_msr(index, value)?;
                calls::answer_msr(self.vcpu.get_kvm_run(), written.map(|()| value));
            }
            // A KVM without hardware may tell of a HLT again, from which an interrupt has taken the guest
            // already.
            Ended::Halted if self.machine.overlooks_windows() && !self.is_halt(-1)? => {}
            Ended::Halted => self.activity = Activity::Halted,
            Ended::ShutDown => {
                self.activity = Activity::Shutdown;
                return Ok(Some(Exit::ShutDown));
            }
            Ended::Stepped => return Ok(self.step_wanted.then_some(Exit::Debug)),
            Ended::InternalError => {
                let code = calls::suberror(self.vcpu.get_kvm_run());
                return Ok(Some(
                    self.failed("KVM could not emulate what it had to", code),
                ));
            }
            Ended::Failed(what, code) => return Ok(Some(self.failed(what, code))),
        }
        Ok(None)
    }

    fn access_memory(&mut self) {
        let access = calls::memory_access(self.vcpu.get_kvm_run());
        if access.is_write {
            self.world.write_memory(access.gpa, access.data);
        } else {
            self.world.read_memory(access.gpa, access.data);
        }
    }

    fn access_port(&mut self) {
        let access = calls::port_access(self.vcpu.get_kvm_run());
        for element in access.data.chunks_exact_mut(access.size.max(1)) {
            let mut bytes = [0; 4];
            let length = element.len().min(4);
            if access.is_input {
                let value = self.world.read_port(access.port, length as u8);
                element[..length].copy_from_slice(&value.to_le_bytes()[..length]);
            } else {
                bytes[..length].copy_from_slice(&element[..length]);
                let value = u32::from_le_bytes(bytes);
                self.world.write_port(access.port, length as u8, value);
            }
        }
    }

    fn failed(&self, what: &'static str, code: u64) -> Exit {
        let rip = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
        Exit::Failed(Failure { what, code, rip })
    }

    /// Gives the kernel the answer to the last exit, so that the state is that between two
    /// instructions.
    fn complete(&mut self) -> Result<Option<Exit>, KvmError> {
        let mut exit = None;
        // An instruction that accesses several devices asks for each of them.
        while self.answer_waits {
            let ended = self.run_kernel(true)?;
            exit = self.act(ended)?.or(exit);
        }
        Ok(exit)
    }

    fn run_until_exit(&mut self) -> Result<Exit, KvmError> {
        self.start_tsc()?;
        if let Some(controllers) = &self.machine.controllers {
            controllers.arm(self.index)?;
        }
        let mut exit = loop {
            if let Some(exit) = self.between_entries()? {
                break exit;
            }
            if let Some(exit) = self.enter()? {
                break exit;
            }
        };
        if let Some(other) = self.complete()? {
            if exit == Exit::Kicked {
                self.signals.raise(Signal::Kick);
            }
            exit = other;
        }
        self.set_stepping(false)?;
        self.tell_offset()?;
        self.note_timer()?;
        Ok(exit)
    }

    /// Notes what the local APIC's timer does, if that is the kernel's.
    fn note_timer(&mut self) -> Result<(), KvmError> {
        let machine = Arc::clone(&self.machine);
        let Some(controllers) = &machine.controllers else {
            return Ok(());
        };
        let page = calls::lapic(&self.vcpu).map_err(named("KVM_GET_LAPIC"))?;
        // After the count was read: late by the time between rather than early.
        let now = self.world.clock();
        if controllers.left(self.index, &page, now) {
            self.settle_timer()?;
        }
        Ok(())
    }

    /// Enters the kernel, and not the guest: an interrupt of the timer that waits in the kernel, where
    /// nobody can take it from, comes into the local APIC's registers.
    fn settle_timer(&mut self) -> Result<(), KvmError> {
        self.vcpu.set_kvm_immediate_exit(0);
        let Self { vcpu, .. } = self;
        let descriptor = calls::duplicate(vcpu).map_err(named("the descriptor of a processor"))?;
        let ended = with_signal_waiting(&descriptor, || vcpu.run().map(|_| ()))
            .map_err(named("KVM_SET_SIGNAL_MASK"))?;
        match ended {
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
            Err(error) => Err(call("KVM_RUN")(error)),
            Ok(()) => Err(KvmError::Lacks {
                what: "a KVM_RUN that a signal ends",
            }),
        }
    }

    fn run_on_this_thread(&mut self) -> Exit {
        let kick = Arc::clone(&self.kick);
        let _running = kick.enter(&mut self.vcpu);
        match self.run_until_exit() {
            Ok(exit) => exit,
            Err(KvmError::Call { call, source }) => {
                self.failed(call, source.raw_os_error().unwrap_or_default() as u64)
            }
            Err(_) => self.failed("KVM lacks something", 0),
        }
    }

    /// Whether the guest must be run step by step, so that nothing is overlooked. A KVM without
    /// hardware emulates supervisor code in long batches, and looks for an interrupt window after each
    /// only. A guest that opens one for a moment, again and again, could wait for ever.
    fn must_be_watched(&self) -> Result<bool, KvmError> {
        let waits = self.interrupt_signalled && !self.ready;
        if !self.machine.overlooks_windows() || !waits {
            return Ok(false);
        }
        // A step over it would not say what it was.
        Ok(!self.is_event_due()? && !self.is_halt(0)?)
    }

    /// Whether an event comes before the next instruction. A step into it would push the step's TF: a trap
    /// for the guest, once its handler returns, unless it is stepped then too. It may have waited
    /// for more than one KVM_RUN, or have come with a state: only the kernel knows.
    fn is_event_due(&self) -> Result<bool, KvmError> {
        let events = self
            .vcpu
            .get_vcpu_events()
            .map_err(call("KVM_GET_VCPU_EVENTS"))?;
        let nmi = events.nmi.injected != 0 || (events.nmi.pending != 0 && events.nmi.masked == 0);
        let exception = events.exception.injected | events.exception.pending != 0;
        Ok(nmi || exception || events.interrupt.injected != 0)
    }

    /// This thread's alarm.
    fn alarm(&mut self) -> Result<&Alarm, KvmError> {
        let alarm = match self.alarm.take().filter(Alarm::is_mine) {
            Some(alarm) => alarm,
            None => Alarm::new().map_err(named("timer_create"))?,
        };
        Ok(self.alarm.insert(alarm))
    }

    /// Whether HLT is at RIP, or as many bytes from it.
    fn is_halt(&self, from_rip: i64) -> Result<bool, KvmError> {
        const HLT: [u8; 1] = [0xf4];
        let regs = self.vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
        let sregs = calls::sregs2(&self.vcpu).map_err(named("KVM_GET_SREGS2"))?;
        let rip = regs.rip.wrapping_add_signed(from_rip);
        let linear = sregs.cs.base.wrapping_add(rip);
        let place = self
            .vcpu
            .translate_gva(linear)
            .map_err(call("KVM_TRANSLATE"))?;
        let mut byte = [0];
        let there = place.valid != 0
            && self
                .machine
                .memory
                .read(place.physical_address, &mut byte)
                .is_ok();
        Ok(there && byte == HLT)
    }

    fn set_stepping(&mut self, on: bool) -> Result<(), KvmError> {
        if on == self.stepping {
            return Ok(());
        }
        let debug = kvm_guest_debug {
            control: if on {
                KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP
            } else {
                0
            },
            ..kvm_guest_debug::default()
        };
        self.vcpu
            .set_guest_debug(&debug)
            .map_err(call("KVM_SET_GUEST_DEBUG"))?;
        self.stepping = on;
        Ok(())
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Exit {
        self.run_on_this_thread()
    }

    /// As the hardware does it, by the trap flag: a guest that looks at its flags meanwhile, by
    /// PUSHF or in the frame of an event, sees it. An event that is delivered takes the first
    /// instruction of its handler with it.
    fn step(&mut self) -> Exit {
        self.step_wanted = true;
        let exit = self.run_on_this_thread();
        self.step_wanted = false;
        exit
    }

    fn state(&mut self) -> CpuState {
        match self.export() {
            Ok(state) => state,
            // The kernel gives a processor's registers to whoever has its descriptor: this would be a
            // defect of ours.
            Err(error) => panic!("cannot take a processor's state: {}", chain(&error)),
        }
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.import(state).map_err(|error| StateError::Host {
            what: "KVM does not take this state",
            reason: chain(&error),
        })
    }

    fn signals(&self) -> Arc<Signals> {
        Arc::clone(&self.signals)
    }

    /// The hardware does not count for us.
    fn instructions(&self) -> u64 {
        0
    }

    fn counters(&self) -> Vec<Counter> {
        let Counters {
            exits,
            ports,
            memory,
            msrs,
        } = &self.counters;
        [exits, ports, memory, msrs].map(Counter::clone).to_vec()
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
