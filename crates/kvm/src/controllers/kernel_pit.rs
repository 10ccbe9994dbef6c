//! The kernel's interval timer: lent with the interrupt controllers, and taken back with its time.
//!
//! KVM_GET_PIT2 does not tell how far channel 0 has come: only a processor can ask for that, by the ports. So the machine
//! has one more processor, which the guest never sees, with its local APIC switched off. It runs while
//! the machine stands still, for a dozen instructions, from a few bytes of the guest's memory that it has on loan.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip,
    kvm_mp_state, kvm_pic_state, kvm_pit_config, kvm_pit_state2, kvm_regs,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use trapgate_chipset::map::TIMER_GSI;
use trapgate_chipset::pit::PitState;
use trapgate_memory::GuestMemory;
use trapgate_x86::registers::rflags;

use super::pit::{self, Given, Moment, Reading, Start};
use super::{Routing, set_line};
// The kernel's timer runs by the host's monotonic clock.
use crate::calls::monotonic as host_now;
use crate::error::{call, named};
use crate::{KvmError, calls};

/// Where the processor's code is while it runs: RAM in every PC.
const CODE: u64 = 0x7c00;
/// Tells that it is done. The kernel has nothing at this port.
const DONE: u8 = 0xed;
/// The local APIC at its usual place, and off (IA32_APIC_BASE): nobody reaches this processor.
const APIC_OFF: u64 = 0xfee0_0000;
/// How often a signal may come between.
const TRIES: usize = 16;

/// So long before an edge channel 0 is not read, since it must not come between reading and stopping.
const CLOSE: u64 = 300_000;
/// How long after it the kernel may deliver an edge, on a host that is busy.
const LATE: Duration = Duration::from_millis(20);
/// When it has delivered one on a host that is not.
const SOON: u64 = 500_000;
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_micros(20);

/// What was read of channel 0.
struct Seen {
    reading: Reading,
    /// When, at the earliest, by the host's monotonic clock.
    at: u64,
    /// When its next edge is due, by the same clock, if one is.
    due: Option<u64>,
}

/// While the machine runs.
#[derive(Debug)]
struct Running {
    given: Given,
    /// When channel 0's edge is due, by the host's monotonic clock; the first one of a periodic channel.
    due: Option<u64>,
}

#[derive(Debug)]
struct State {
    reader: Option<VcpuFd>,
    running: Option<Running>,
}

/// The kernel's interval timer.
#[derive(Debug)]
pub(crate) struct KernelPit {
    memory: Arc<GuestMemory>,
    /// The number of the processor that reads it.
    number: u32,
    state: Mutex<State>,
}

impl KernelPit {
    /// Makes it, in a machine for `count` processors that are yet to be made.
    pub(crate) fn new(
        machine: &VmFd,
        memory: Arc<GuestMemory>,
        count: u32,
    ) -> Result<Self, KvmError> {
        let config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..kvm_pit_config::default()
        };
        machine
            .create_pit2(config)
            .map_err(call("KVM_CREATE_PIT2"))?;
        // The chipset's does not make up for interrupts that were not taken in time either.
        calls::do_not_reinject(machine).map_err(named("KVM_REINJECT_CONTROL"))?;
        Ok(Self {
            memory,
            number: count,
            state: Mutex::new(State {
                reader: None,
                running: None,
            }),
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the kernel the state that the timer has at `now`, nanoseconds of VM time, which stands until this
    /// returns. The interrupt controllers are given after it, and then comes [`Self::settle`]. A timer that is not `connected`
    /// interrupts nobody. `in_phase`: channel 0 is to be in its phase even if that takes up to a period.
    pub(crate) fn give(
        &self,
        machine: &VmFd,
        routing: &Routing,
        state: &PitState,
        now: u64,
        connected: bool,
        in_phase: bool,
    ) -> Result<(), KvmError> {
        let (kernel, start) = pit::to_kernel(state, now, in_phase);
        routing.connect_pit(machine, connected || start == Start::Quiet)?;
        let set = || -> Result<u64, KvmError> {
            machine.set_pit2(&kernel).map_err(call("KVM_SET_PIT2"))?;
            Ok(host_now())
        };
        let ends = pit::nanoseconds(kernel.channels[0].count.into());
        // From where it is set it counts: what follows is soon done, or reckoned with.
        let due = match start {
            Start::Ahead(phase) => {
                let began = set()?;
                sleep_until(began + phase.as_nanos() as u64);
                Some(began + ends)
            }
            Start::Now => {
                let began = set()?;
                (kernel.channels[0].mode != 5).then_some(began + ends)
            }
            Start::Quiet => {
                let mut tries = 0;
                loop {
                    silence(machine)?;
                    let began = set()?;
                    wait_for_edge(machine)?;
                    tries += 1;
                    // Channel 2 counts meanwhile.
                    if host_now() - began < SOON || tries == 4 {
                        break;
                    }
                }
                routing.connect_pit(machine, connected)?;
                None
            }
        };
        self.state().running = Some(Running {
            given: Given {
                state: state.clone(),
                kernel: machine.get_pit2().map_err(call("KVM_GET_PIT2"))?,
            },
            due: due.filter(|_| connected),
        });
        Ok(())
    }

    /// The interrupt controllers have been given, after the timer: an edge that was due meanwhile may have been lost with
    /// what they had before. No processor has run.
    pub(crate) fn settle(&self, machine: &VmFd) -> Result<(), KvmError> {
        let due = self
            .state()
            .running
            .as_ref()
            .and_then(|running| running.due);
        if due.is_some_and(|due| due <= host_now()) {
            // The kernel may be about to deliver it. One more is none, as long as nobody has taken it.
            thread::sleep(Duration::from_nanos(2 * SOON));
            for level in [true, false] {
                set_line(machine, TIMER_GSI, level)?;
            }
        }
        Ok(())
    }

    /// Stops the timer, and gives its state at `now`, nanoseconds of VM time, which stands. All processors
    /// stand still, and the interrupt controllers are still the kernel's.
    pub(crate) fn take(&self, machine: &VmFd, now: u64) -> Result<PitState, KvmError> {
        let host = host_now();
        let mut state = self.state();
        let kernel = machine.get_pit2().map_err(call("KVM_GET_PIT2"))?;
        let seen = self.read_away_from_edges(machine, &mut state, &kernel)?;
        let mut stopped = kernel;
        // In this mode the kernel has no timer for channel 0.
        stopped.channels[0].mode = 5;
        let before = host_now();
        machine.set_pit2(&stopped).map_err(call("KVM_SET_PIT2"))?;
        let at_stop = before.midpoint(host_now());
        let Running { given, .. } = state.running.take().ok_or(KvmError::Lacks {
            what: "a state of the interval timer: it was given none",
        })?;
        let moment = Moment {
            now,
            host,
            read: seen.at,
            // On a host that is busy a moment may be long.
            edge_since: seen.due.is_some_and(|due| due <= at_stop),
        };
        Ok(pit::from_kernel(&kernel, seen.reading, &given, moment))
    }

    /// Reads channel 0, and when at the earliest; the next edge is far enough that it does not come before the timer is stopped.
    fn read_away_from_edges(
        &self,
        machine: &VmFd,
        state: &mut State,
        kernel: &kvm_pit_state2,
    ) -> Result<Seen, KvmError> {
        let timer = &kernel.channels[0];
        let reload = u64::from(timer.count);
        let close = match timer.mode {
            2 | 3 => CLOSE.min(pit::nanoseconds(reload) / 2),
            _ => CLOSE,
        };
        let mut tries = 0;
        loop {
            let before = host_now();
            let reading = self.read(machine, state, timer.mode)?;
            let (elapsed, ended) = reading.elapsed(timer);
            let left = pit::nanoseconds(reload.saturating_sub(elapsed));
            tries += 1;
            let comes = !ended && timer.mode != 5;
            if !comes || left > close || tries == 4 {
                return Ok(Seen {
                    reading,
                    at: before,
                    due: comes.then_some(before + left),
                });
            }
            thread::sleep(Duration::from_nanos(left + close / 4));
        }
    }

    /// Lets the hidden processor read channel 0.
    fn read(&self, machine: &VmFd, state: &mut State, mode: u8) -> Result<Reading, KvmError> {
        let reader = match &mut state.reader {
            Some(reader) => reader,
            none => none.insert(make_reader(machine, self.number)?),
        };
        let code = code(mode);
        let mut kept = vec![0; code.len()];
        let no_memory = |_| KvmError::Lacks {
            what: "memory below 640 KiB",
        };
        self.memory.read(CODE, &mut kept).map_err(no_memory)?;
        self.memory.write(CODE, &code).map_err(no_memory)?;
        let read = run(reader);
        self.memory.write(CODE, &kept).map_err(no_memory)?;
        read
    }
}

/// What the hidden processor runs, in real mode. In the kernel a control word changes nothing but how bytes are accessed.
fn code(mode: u8) -> Vec<u8> {
    /// IN AL, 0x40.
    const READ: [u8; 2] = [0xe4, 0x40];
    let write_control = |value| [0xb0, value, 0xe6, 0x43];
    let mut code = Vec::new();
    // Counts of two bytes; what the guest latched is read away (it is in the state already).
    code.extend(write_control(0x30 | mode << 1));
    code.extend([READ; 3].concat());
    // Latches status and count: the status to BL, the count to CX.
    code.extend(write_control(0xc2));
    code.extend([READ, [0x88, 0xc3], READ, [0x88, 0xc1], READ, [0x88, 0xc5]].concat());
    // OUT DONE, AL.
    code.extend([0xe6, DONE]);
    code
}

fn make_reader(machine: &VmFd, number: u32) -> Result<VcpuFd, KvmError> {
    let reader = machine
        .create_vcpu(number.into())
        .map_err(call("KVM_CREATE_VCPU"))?;
    let mut sregs = calls::sregs2(&reader).map_err(named("KVM_GET_SREGS2"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.apic_base = APIC_OFF;
    calls::set_sregs2(&reader, &sregs).map_err(named("KVM_SET_SREGS2"))?;
    let running = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    reader
        .set_mp_state(running)
        .map_err(call("KVM_SET_MP_STATE"))?;
    Ok(reader)
}

fn run(reader: &mut VcpuFd) -> Result<Reading, KvmError> {
    let regs = kvm_regs {
        rip: CODE,
        rflags: rflags::ONE,
        ..kvm_regs::default()
    };
    reader.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    let mut done = false;
    for _ in 0..TRIES {
        match reader.run() {
            Ok(VcpuExit::IoOut(port, _)) => {
                done = port == u16::from(DONE);
                break;
            }
            Ok(VcpuExit::Intr) => {}
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Ok(_) => break,
            Err(error) => return Err(call("KVM_RUN")(error)),
        }
    }
    // The port access is to be over when it runs again.
    reader.set_kvm_immediate_exit(1);
    let _ = reader.run();
    reader.set_kvm_immediate_exit(0);
    if !done {
        return Err(KvmError::Lacks {
            what: "a processor that reads the interval timer",
        });
    }
    let regs = reader.get_regs().map_err(call("KVM_GET_REGS"))?;
    Ok(Reading {
        output: regs.rbx & 0x80 != 0,
        count: regs.rcx as u16,
    })
}

/// Forgets what the first of the kernel's 8259As has seen; nothing comes through it.
fn silence(machine: &VmFd) -> Result<(), KvmError> {
    let mut irqchip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_PIC_MASTER,
        ..kvm_irqchip::default()
    };
    irqchip.chip.pic = kvm_pic_state {
        imr: 0xff,
        ..kvm_pic_state::default()
    };
    machine
        .set_irqchip(&irqchip)
        .map_err(call("KVM_SET_IRQCHIP"))
}

/// Waits for an edge of channel 0 to reach the first of the kernel's 8259As, which has none yet.
fn wait_for_edge(machine: &VmFd) -> Result<(), KvmError> {
    let until = host_now() + LATE.as_nanos() as u64;
    while host_now() < until {
        let mut irqchip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_PIC_MASTER,
            ..kvm_irqchip::default()
        };
        machine
            .get_irqchip(&mut irqchip)
            .map_err(call("KVM_GET_IRQCHIP"))?;
        if calls::pic_of(&irqchip).irr & 1 != 0 {
            break;
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Sleeps, and gives the processor away for the last moments, as a sleep takes longer than it is asked to.
fn sleep_until(time: u64) {
    /// Longer than a sleep is late on a host that is not busy.
    const LAST: u64 = 100_000;
    loop {
        let left = time.saturating_sub(host_now());
        match left {
            0 => return,
            ..LAST => thread::yield_now(),
            _ => thread::sleep(Duration::from_nanos(left - LAST)),
        }
    }
}
