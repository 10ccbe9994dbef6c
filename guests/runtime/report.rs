//! Code that raises exceptions, and lines that say which it raised.
//!
//! A line reads `WHAT: #XX(ERROR) at|after rf=R …`: the exception, its error code in hex if it has
//! one, whether the saved RIP points at the instruction (a fault) or behind it (a trap), and the
//! resume flag in the saved RFLAGS (SDM vol. 3B 19.3.1.1: 1 for a fault, except for a code
//! breakpoint). Page faults add CR2, debug exceptions DR6.

use crate::interrupts::Fault;
use crate::{cpu, print, println};

/// A function made by [`bodies!`](crate::bodies).
pub type Body = unsafe extern "C" fn(u64) -> u64;

/// Functions of one argument (RDI), each with the one instruction that is asked about:
/// `name: ["before", …] "instruction";`. In front of each stand two addresses: of that instruction,
/// and of the one behind it.
#[macro_export]
macro_rules! bodies {
    ($($name:ident: [$($before:literal),*] $instruction:literal;)*) => {
        $(core::arch::global_asm!(concat!(
            ".balign 16\n.quad 98f, 99f\n.global ", stringify!($name), "\n", stringify!($name), ":\n",
            $($before, "\n",)*
            "98: ", $instruction, "\n",
            "99: ret\n",
        ));)*
        unsafe extern "C" {
            $(pub fn $name(argument: u64) -> u64;)*
        }
    };
}

/// The address of the instruction that is asked about, and of the one behind it.
fn addresses(body: Body) -> [u64; 2] {
    // SAFETY: each body is preceded by them.
    unsafe { *((body as *const () as u64 - 16) as *const [u64; 2]) }
}

/// The address of the instruction that `body` asks about.
pub fn at(body: Body) -> u64 {
    addresses(body)[0]
}

/// Prints a line about how `body` ended.
pub fn show(what: &str, ended: Result<u64, Fault>, body: Body) {
    print!("{what}: ");
    match ended {
        Ok(_) => println!("no exception"),
        Err(fault) => describe(&fault, Some(body)),
    }
}

/// Prints an exception, and the end of the line. With `body` also where RIP is.
pub fn describe(fault: &Fault, body: Option<Body>) {
    let frame = &fault.frame;
    print_name(fault);
    if let Some(body) = body {
        let [at, after] = addresses(body);
        match frame.rip {
            rip if rip == at => print!(" at"),
            rip if rip == after => print!(" after"),
            rip => print!(" rip={rip:#x}"),
        }
        print!(" rf={}", frame.rflags >> 16 & 1);
    }
    match frame.vector {
        1 => print!(" dr6={:#x}", cpu::read_dr6() & 0xE00F),
        14 => print!(" cr2={:#x}", fault.cr2),
        _ => {}
    }
    println!();
}

/// Prints `#XX`, with the error code in parentheses if the exception has one.
pub fn print_name(fault: &Fault) {
    print_vector(fault.frame.vector, fault.frame.error);
}

/// The same of a vector and what was pushed for it.
pub fn print_vector(vector: u64, error: u64) {
    match name(vector) {
        Some(name) => print!("{name}"),
        None => print!("vector {vector:#x}"),
    }
    if has_error_code(vector) {
        print!("({error:#x})");
    }
}

fn name(vector: u64) -> Option<&'static str> {
    let names = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS",
        "#GP", "#PF", "", "#MF", "#AC", "#MC", "#XM",
    ];
    names
        .get(vector as usize)
        .copied()
        .filter(|name| !name.is_empty())
}

fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}
