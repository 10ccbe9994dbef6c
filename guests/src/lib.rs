//! Small bare-metal guests, built with the workspace and carried inside it.
//!
//! Each program is an ELF file that boots two ways, through its PVH note and through its
//! multiboot 1 header, prints to the first serial port (COM1, 0x3F8) and powers the machine off.
//! [`BUILTIN`] greets a newcomer (`trapgate run builtin`); the others show what a CPU must do and
//! serve as tests: what they print is known, see [`check`].
//!
//! Powering off means, in this order: ACPI S5 through the PM1a control register at port 0x604, the
//! isa-debug-exit port 0xF4 (value 0x10), a triple fault. A program that fails writes 0x11 to port
//! 0xF4 first.
#![forbid(unsafe_code)]

mod output;

#[cfg(test)]
mod images;

#[cfg(test)]
mod instructions;

#[cfg(test)]
#[path = "../programs/hello/expression.rs"]
mod expression;

pub use output::{Mismatch, check, compare};

/// A guest program.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// The name of its directory in `guests/programs`.
    pub name: &'static str,
    /// The ELF file.
    pub image: &'static [u8],
    /// What every correct CPU makes it print, if that is always the same text.
    pub expected: Option<&'static str>,
    /// The same on a CPU of level x86-64-v3, where that is another text: `expected` is for x86-64-v2.
    pub expected_v3: Option<&'static str>,
}

static PROGRAMS: &[Program] = include!(concat!(env!("OUT_DIR"), "/programs.rs"));

impl Program {
    /// Whether it executes x87 or SSE instructions in ring 0, and so needs an engine that executes
    /// them there: a KVM that emulates supervisor code does not. The other programs do not, if they
    /// were built for the freestanding [`TARGET`].
    pub fn uses_coprocessor(&self) -> bool {
        ["bench", "coprocessor", "hostile"].contains(&self.name)
    }

    /// How many processors the machine must have for it to print what is expected.
    pub fn processors(&self) -> u32 {
        if self.name == "processors" { 2 } else { 1 }
    }
}

/// The target that the programs were built for: `x86_64-unknown-none`, or a Linux one, whose code
/// uses SSE everywhere.
pub const TARGET: &str = env!("GUEST_TARGET");

/// The built-in guest as an ELF file: the program `hello`.
pub static BUILTIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"));

/// Every program, sorted by name.
pub fn all() -> &'static [Program] {
    PROGRAMS
}

/// The program called `name`, if there is one.
pub fn named(name: &str) -> Option<&'static Program> {
    PROGRAMS.iter().find(|program| program.name == name)
}
