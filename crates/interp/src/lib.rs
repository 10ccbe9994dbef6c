//! The interpreter: the semantics of every instruction and event, in all modes.
//!
//! Instructions are decoded once, block by block, into [`op::Op`]s that the run loop calls one after
//! another. This crate is the specification that other engines are measured by; the host CPU is
//! the final judge, and runs whatever it can run itself (`trapgate_thunk`).

mod apart;
mod arithmetic;
mod block;
mod branch;
mod clock;
mod code;
mod control;
pub mod cpu;
mod debug;
mod decode;
mod descriptor_tables;
mod door;
mod entropy;
mod events;
mod features;
mod flag_control;
mod flags;
mod frame;
mod gather;
mod hints;
mod identity;
mod iret;
mod legacy;
mod mmu;
mod moves;
mod msr;
pub mod op;
mod paging;
mod parts;
mod port;
mod quiet;
mod run;
mod segments;
mod stack;
mod state;
mod strings;
mod task;
mod tlb;
mod transfer;
mod vector;
mod width;
mod xsave;

use std::sync::Arc;

use trapgate_engine::{Counter, Exit, Measure, Signals, StateError, Vcpu, World};
use trapgate_memory::{GuestMemory, TraceFlags};
use trapgate_x86::{CpuProfile, CpuState};

pub use crate::apart::{MemoryDifference, Written};
use crate::block::Blocks;
pub use crate::block::Dropped;
use crate::cpu::Cpu;
pub use crate::door::Target;
pub use crate::features::{Reader, is_lacking};
pub use crate::tlb::{Access, Changes, Layout, Level, View};

/// A vCPU that interprets.
pub struct Interpreter {
    /// The processor.
    pub cpu: Cpu,
    blocks: Blocks,
    /// What others read, brought up to date when it stops.
    counters: [Counter; 2],
    /// The traces' epoch when this processor last ran.
    traces: u64,
}

impl Interpreter {
    /// A processor after reset. It is number `index` of `count`, and owns its view of the world.
    pub fn new(
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
    ) -> Self {
        Self::with_signals(memory, world, profile, index, count, Arc::default())
    }

    /// As [`Self::new`], with signals that someone else looks at too.
    pub fn with_signals(
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
        signals: Arc<Signals>,
    ) -> Self {
        let cpu = Cpu::new(memory, world, profile, index, count, signals);
        let listener = Arc::clone(&cpu.code);
        cpu.memory.traces().listen(TraceFlags::CODE, listener);
        Self::of(cpu)
    }

    /// Around a processor that listens to writes to code already, if it has to.
    fn of(cpu: Cpu) -> Self {
        Self {
            cpu,
            blocks: Blocks::new(),
            counters: [
                Counter::new(
                    "page_walks",
                    Measure::Events,
                    "Misses of the TLB, for which page tables were walked",
                ),
                Counter::new(
                    "blocks_decoded",
                    Measure::Events,
                    "Blocks of guest code that were decoded",
                ),
            ],
            traces: 0,
        }
    }
}

impl Interpreter {
    /// Other processors may have traced pages that this one still has writable translations of.
    /// They take turns (one runs, the others are outside `run`), so it is enough to look here.
    pub fn notice_traces(&mut self) {
        let epoch = self.cpu.memory.traces().epoch();
        if epoch != self.traces && self.cpu.count > 1 {
            self.cpu.tlb.flush_all();
            self.cpu.fetch_epoch = self.cpu.fetch_epoch.wrapping_add(1);
        }
        self.traces = epoch;
    }
}

impl Vcpu for Interpreter {
    fn forget_code(&mut self) {
        self.clear();
    }

    fn run(&mut self) -> Exit {
        self.notice_traces();
        let exit = self.run_until_exit();
        let [walks, decoded] = &self.counters;
        walks.set(self.cpu.walks);
        decoded.set(self.blocks.decoded);
        exit
    }

    fn step(&mut self) -> Exit {
        self.notice_traces();
        self.run_one()
    }

    fn state(&mut self) -> CpuState {
        self.cpu.export()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.cpu.import(state)
    }

    fn signals(&self) -> Arc<Signals> {
        Arc::clone(&self.cpu.signals)
    }

    fn instructions(&self) -> u64 {
        self.cpu.instructions
    }

    fn counters(&self) -> Vec<Counter> {
        self.counters.to_vec()
    }
}

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod system_testing;
#[cfg(test)]
mod testing;
