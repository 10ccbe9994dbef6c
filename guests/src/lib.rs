//! Small bare-metal guests, built with the workspace and carried inside it.
//!
//! Each program is an ELF file that boots two ways, through its PVH note and through its
//! multiboot 1 header, prints to the first serial port (COM1, 0x3F8) and powers the machine off.
//! [`BUILTIN`] greets a newcomer (`trapgate run builtin`); the others show what a CPU must do and
//! serve as tests: each prints lines that every correct x86-64 CPU prints (see [`Guest::expected`]).
//!
//! Powering off means, in this order: ACPI S5 through the PM1a control register at port 0x604, the
//! isa-debug-exit port 0xF4 (value 0x10 for success, 0x11 for failure), a triple fault.
#![forbid(unsafe_code)]

#[cfg(test)]
mod images;

#[cfg(test)]
#[path = "../programs/hello/expression.rs"]
mod expression;

/// `(name, ELF file)` of each program, sorted by name.
static PROGRAMS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// The built-in guest as an ELF file: the program `hello`.
pub static BUILTIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"));

/// Every program as `(name, ELF file)`, sorted by name.
pub fn all() -> &'static [(&'static str, &'static [u8])] {
    PROGRAMS
}

/// The ELF file of the program called `name`, if there is one.
pub fn named(name: &str) -> Option<&'static [u8]> {
    PROGRAMS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, image)| *image)
}
