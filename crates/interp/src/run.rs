//! The run loop: blocks, and what comes between them.

use trapgate_engine::{Exit, Signal};
use trapgate_x86::registers::{dr, rflags, sreg};
use trapgate_x86::{Activity, Exception, InterruptShadow, Vector};

use crate::Interpreter;
use crate::cpu::{Cpu, Stop};
use crate::events::EventKind;

impl Interpreter {
    pub(crate) fn run_until_exit(&mut self) -> Exit {
        loop {
            if self.cpu.signals.any() || self.cpu.attention {
                if let Some(exit) = self.between_blocks() {
                    return exit;
                }
                if self.cpu.pending.is_some() {
                    // A task switch to the event's handler left an exception of the new task,
                    // which comes before its first instruction.
                    continue;
                }
                if self.cpu.attention {
                    if let Err(stop) = self.step_carefully()
                        && let Some(exit) = self.stopped(stop)
                    {
                        return exit;
                    }
                    continue;
                }
            }
            if self.cpu.sys.activity != Activity::Running {
                return self.inactive();
            }
            if let Err(stop) = self.execute_block()
                && let Some(exit) = self.stopped(stop)
            {
                return exit;
            }
        }
    }

    /// Runs one instruction, or delivers one event.
    pub(crate) fn run_one(&mut self) -> Exit {
        let before = self.cpu.rip;
        if let Some(exit) = self.between_blocks() {
            return exit;
        }
        if self.cpu.sys.activity != Activity::Running {
            return self.inactive();
        }
        if self.cpu.rip != before || self.cpu.pending.is_some() {
            // An event was delivered.
            return Exit::Debug;
        }
        match self.step_carefully() {
            Ok(()) => Exit::Debug,
            Err(stop) => self.stopped(stop).unwrap_or(Exit::Debug),
        }
    }

    /// Why a processor that does not run does not.
    pub(crate) fn inactive(&self) -> Exit {
        match self.cpu.sys.activity {
            Activity::Shutdown => Exit::ShutDown,
            _ => Exit::Halted,
        }
    }

    /// Signals from outside and events that wait, in the order of their priorities (SDM vol. 3A,
    /// table 7-2).
    pub(crate) fn between_blocks(&mut self) -> Option<Exit> {
        let cpu = &mut self.cpu;
        let signals = std::sync::Arc::clone(&cpu.signals);
        if signals.take(Signal::Flush) {
            self.blocks.drop_stale(cpu);
        }
        if signals.take(Signal::Nmi) {
            cpu.sys.nmi_pending = true;
            cpu.update_attention();
        }
        if signals.take(Signal::Interrupt) {
            cpu.interrupt_waits = true;
            cpu.update_attention();
        }
        if signals.take(Signal::Kick) {
            return Some(Exit::Kicked);
        }
        if cpu.sys.activity == Activity::Shutdown || cpu.sys.activity == Activity::WaitForSipi {
            return Some(self.inactive());
        }
        if let Some(exception) = cpu.pending.take() {
            let delivered = cpu.deliver_exception(exception);
            return self.delivered(delivered);
        }
        if let Some(vector) = cpu.acknowledged.take() {
            cpu.sys.activity = Activity::Running;
            let delivered = cpu.deliver_interrupt(vector, EventKind::External);
            return self.delivered(delivered);
        }
        if cpu.sys.shadow == InterruptShadow::None {
            if cpu.sys.nmi_pending && !cpu.sys.nmi_blocked {
                cpu.sys.nmi_pending = false;
                cpu.sys.activity = Activity::Running;
                let delivered = cpu.deliver_interrupt(2, EventKind::Nmi);
                return self.delivered(delivered);
            }
            if cpu.interrupt_waits && cpu.system_flags & rflags::IF != 0 {
                match cpu.world.take_interrupt() {
                    Some(vector) => {
                        cpu.sys.activity = Activity::Running;
                        let delivered = cpu.deliver_interrupt(vector, EventKind::External);
                        return self.delivered(delivered);
                    }
                    None => {
                        cpu.interrupt_waits = false;
                        cpu.update_attention();
                    }
                }
            }
        }
        None
    }

    /// After the delivery of an event: a fault in it becomes an exception of its own.
    fn delivered(&mut self, outcome: Result<(), Stop>) -> Option<Exit> {
        self.cpu.update_attention();
        match outcome {
            Ok(()) => None,
            Err(stop) => self.stopped(stop),
        }
    }

    /// Runs the block at RIP.
    #[inline]
    pub(crate) fn execute_block(&mut self) -> Result<(), Stop> {
        let cpu = &mut self.cpu;
        self.blocks.find(cpu)?;
        let ops = self.blocks.ops();
        cpu.end_block = false;
        // Kept here, not in memory: only a block's last instruction goes anywhere else.
        let mut rip = cpu.rip;
        let mut index = 0;
        while let Some(op) = ops.get(index) {
            let quiet = usize::from(op.quiet);
            if quiet != 0 {
                for op in &ops[index..index + quiet] {
                    // Quiet ops do nothing but compute.
                    let _ = (op.handler)(cpu, op);
                }
                rip = rip.wrapping_add(u64::from(op.extra));
                cpu.rip = rip;
                index += quiet;
                continue;
            }
            let start = rip;
            rip = rip.wrapping_add(u64::from(op.length));
            cpu.rip = rip;
            index += 1;
            let step = (op.handler)(cpu, op);
            if step.is_err() || cpu.end_block {
                cpu.instructions += index as u64;
                if step == Err(Stop::Fault) {
                    cpu.instructions -= 1;
                    cpu.rip = start;
                }
                return step;
            }
        }
        cpu.instructions += ops.len() as u64;
        Ok(())
    }

    /// Runs one instruction, with everything that can be asked to happen around it: instruction
    /// breakpoints, the end of shadows, single step, data breakpoints.
    pub(crate) fn step_carefully(&mut self) -> Result<(), Stop> {
        let cpu = &mut self.cpu;
        if cpu.sys.activity != Activity::Running {
            return Ok(());
        }
        let shadow = std::mem::take(&mut cpu.sys.shadow);
        let resumed = cpu.system_flags & rflags::RF != 0;
        if cpu.breakpoints_enabled() && !resumed && shadow != InterruptShadow::MovSs {
            let linear = cpu.linear(sreg::CS, cpu.rip);
            let hit = cpu.instruction_breakpoints(linear);
            if hit != 0 {
                cpu.sys.dr6 |= hit;
                return Err(cpu.raise(Exception::plain(Vector::DB)));
            }
        }
        let single_step = cpu.system_flags & rflags::TF != 0;
        let start = cpu.rip;
        let op = self.blocks.single(cpu)?;
        cpu.system_flags &= !rflags::RF;
        // A repeated string instruction that goes on is not to look up after each element for RF's sake.
        cpu.update_attention();
        cpu.end_block = false;
        cpu.rip = cpu.rip.wrapping_add(u64::from(op.length));
        let next = cpu.rip;
        let step = (op.handler)(cpu, &op);
        if step == Err(Stop::Fault) {
            // What a faulting instruction touched is not reported; it will touch it again.
            cpu.take_breakpoints();
            if resumed {
                cpu.system_flags |= rflags::RF;
            }
            cpu.rip = start;
            return step;
        }
        cpu.instructions += 1;
        cpu.update_attention();
        if cpu.sys.shadow == InterruptShadow::MovSs {
            // Debug traps wait for the instruction after; single step shows then anyhow.
            return step;
        }
        let mut hit = cpu.take_breakpoints();
        // A transfer that cleared TF (an event's delivery, SYSCALL) is not single-stepped.
        if single_step && (cpu.system_flags & rflags::TF != 0 || cpu.rip == next) {
            hit |= dr::DR6_BS;
        }
        if hit != 0 {
            cpu.sys.dr6 |= hit;
            if step == Err(Stop::Halt) {
                cpu.sys.activity = Activity::Halted;
            }
            cpu.deliver_trap()?;
            return Ok(());
        }
        step
    }

    /// Deals with the end of a block; says if that ends the run.
    #[inline]
    pub(crate) fn stopped(&mut self, stop: Stop) -> Option<Exit> {
        match stop {
            Stop::EndBlock => None,
            Stop::Fault => {
                let exception = self.cpu.exception;
                match self.cpu.deliver_exception(exception) {
                    Ok(()) => {
                        self.cpu.update_attention();
                        None
                    }
                    Err(Stop::Fault) => unreachable!("a fault in delivery is delivered there"),
                    Err(stop) => self.stopped(stop),
                }
            }
            Stop::Halt => {
                self.cpu.sys.activity = Activity::Halted;
                // What is pending already ends the halt at once.
                match self.between_blocks() {
                    Some(exit) => Some(exit),
                    None if self.cpu.sys.activity == Activity::Halted => Some(Exit::Halted),
                    None => None,
                }
            }
            Stop::Shutdown => {
                self.cpu.sys.activity = Activity::Shutdown;
                Some(Exit::ShutDown)
            }
        }
    }
}

impl Cpu {
    /// Delivers #DB as a trap: after the instruction.
    fn deliver_trap(&mut self) -> Result<(), Stop> {
        self.deliver_exception(Exception::plain(Vector::DB))
    }
}
