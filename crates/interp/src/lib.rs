//! The interpreter: the semantics of every instruction and event, in all modes.
//!
//! Instructions are decoded once, block by block, into [`op::Op`]s that the run loop calls one after
//! another. This crate is the specification that other engines are measured by; the host CPU is
//! the final judge, and runs whatever it can run itself (`trapgate_thunk`).

mod code;
pub mod cpu;
mod debug;
mod flags;
mod mmu;
pub mod op;
mod paging;
mod tlb;
mod vector;
mod width;

#[cfg(test)]
mod testing;
