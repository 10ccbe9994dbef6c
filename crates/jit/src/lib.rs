//! The translator: x86-64 guest code becomes x86-64 host code.
//!
//! Guest registers live in host registers, guest flags in host flags, and every memory operand is checked
//! against a software TLB before the guest's own instruction runs on the host address. What is not
//! translated, the interpreter does, one instruction at a time, so that any guest that runs on it runs here.
//! How it came to be so, with figures, is in `docs/translator.md`.

mod adapt;
mod clock;
mod code_memory;
mod code_pages;
mod context;
mod crossing;
mod emit;
mod instruction;
mod list;
mod low;
mod memory;
mod mode;
mod perf_map;
mod registers;
mod returns;
mod room;
mod run;
mod spaces;
mod statistics;
mod stubs;
mod system;
mod unit;
mod x87;

pub use run::lockstep::{Compared, Lockstep};
pub use run::{JitError, Translating, usable};
