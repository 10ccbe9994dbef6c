//! String instructions that stop halfway, and go on.
//!
//! Each of them, in each size and both directions, runs into a page that is not there: with the
//! element that touches it starting there, or reaching into it from its neighbour (`across`). The
//! registers must say how far it came (SDM vol. 2B REP, vol. 3A 7.5), memory must have what was
//! done and nothing else, and with the page in place it must go on to the right end.
//!
//! A line: `rep NAME up|down, WHAT is missing: #PF(ERROR) at ADDRESS, COUNT left, rsi …, rdi …`,
//! with RSI and RDI as distances from where they began, and the address from the boundary.
#![no_std]
#![no_main]

mod others;
mod run;

use run::{Registers, run};
use runtime::interrupts::Fault;
use runtime::window::{self, PRESENT, WRITABLE};
use runtime::{port, print, println, report};

runtime::entry!(strings);

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
    Ins,
    Outs,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Movs => "movs",
            Kind::Stos => "stos",
            Kind::Lods => "lods",
            Kind::Cmps => "cmps",
            Kind::Scas => "scas",
            Kind::Ins => "ins",
            Kind::Outs => "outs",
        }
    }

    /// For elements of one byte. The next opcode is for the larger ones.
    fn opcode(self) -> u8 {
        match self {
            Kind::Movs => 0xA4,
            Kind::Stos => 0xAA,
            Kind::Lods => 0xAC,
            Kind::Cmps => 0xA6,
            Kind::Scas => 0xAE,
            Kind::Ins => 0x6C,
            Kind::Outs => 0x6E,
        }
    }

    fn has_source(self) -> bool {
        matches!(self, Kind::Movs | Kind::Lods | Kind::Cmps | Kind::Outs)
    }

    fn has_destination(self) -> bool {
        !matches!(self, Kind::Lods | Kind::Outs)
    }
}

const REP: u8 = 0xF3;
const DIRECTION: u64 = 1 << 10;
/// Carry, parity, adjust, zero, sign, overflow.
const ARITHMETIC: u64 = 0x8D5;

/// Window pages: the source's pair and the destination's, with nothing around them.
const SOURCE: usize = 0x10;
const DESTINATION: usize = 0x20;
/// Elements up to the boundary, and in all.
const BEFORE: u64 = 5;
const COUNT: u64 = 9;
const FILLER: u8 = 0xEE;

#[repr(C, align(4096))]
struct Pages([u8; 2 * 4096]);

static mut FROM: Pages = Pages([0; 2 * 4096]);
static mut TO: Pages = Pages([0; 2 * 4096]);

fn from() -> *mut u8 {
    (&raw mut FROM).cast()
}

fn to() -> *mut u8 {
    (&raw mut TO).cast()
}

fn strings() {
    window::open();
    for (kind, sizes) in [
        (Kind::Movs, &[1u64, 2, 4, 8][..]),
        (Kind::Stos, &[1, 2, 4, 8]),
        (Kind::Lods, &[1, 2, 4, 8]),
        (Kind::Cmps, &[1, 2, 4, 8]),
        (Kind::Scas, &[1, 2, 4, 8]),
        (Kind::Ins, &[1, 2, 4]),
        (Kind::Outs, &[1, 2, 4]),
    ] {
        for &size in sizes {
            for down in [false, true] {
                for source_is_missing in [true, false] {
                    let exists = if source_is_missing {
                        kind.has_source()
                    } else {
                        kind.has_destination()
                    };
                    for across in [false, true] {
                        if exists && (size > 1 || !across) {
                            Stop {
                                kind,
                                size,
                                down,
                                source_is_missing,
                                across,
                            }
                            .show();
                        }
                    }
                }
            }
        }
    }
    others::show();
    println!("strings: done");
}

/// One way to stop.
struct Stop {
    kind: Kind,
    size: u64,
    down: bool,
    source_is_missing: bool,
    across: bool,
}

/// What a byte of the source is.
fn pattern(index: u64) -> u8 {
    (index ^ index >> 8).wrapping_mul(167) as u8
}

impl Stop {
    fn show(&self) {
        let Stop {
            kind, size, down, ..
        } = *self;
        let letter = ["", "b", "w", "", "d", "", "", "", "q"][size as usize];
        print!(
            "rep {}{letter} {}, {} is missing{}: ",
            kind.name(),
            if down { "down" } else { "up" },
            if self.source_is_missing {
                "source"
            } else {
                "destination"
            },
            if self.across { ", across" } else { "" }
        );
        self.fill();
        let start = self.start();
        let expected_flags = start.rflags;
        let stopped = match run(&self.code(), &start) {
            Ok(_) => {
                println!("no exception");
                return;
            }
            Err(fault) => fault,
        };
        self.print(&stopped, &start);
        if stopped.frame.rflags & ARITHMETIC != expected_flags & ARITHMETIC {
            print!(", flags {:#x}", stopped.frame.rflags & ARITHMETIC);
        }
        self.check_effect(COUNT - stopped.frame.rcx, &stopped.frame.rax);

        // On with it, from where it stopped.
        self.map(true);
        let frame = &stopped.frame;
        let again = Registers {
            rax: frame.rax,
            rcx: frame.rcx,
            rdx: frame.rdx,
            rsi: frame.rsi,
            rdi: frame.rdi,
            rflags: frame.rflags & (ARITHMETIC | DIRECTION) | 2,
        };
        match run(&self.code(), &again) {
            Ok(end) => {
                let step = (if down { size.wrapping_neg() } else { size }).wrapping_mul(COUNT);
                let went = |is_used: bool| if is_used { step } else { 0 };
                if (end.rcx, end.rsi, end.rdi)
                    != (
                        0,
                        start.rsi.wrapping_add(went(kind.has_source())),
                        start.rdi.wrapping_add(went(kind.has_destination())),
                    )
                {
                    print!(", ends with {:#x} {:#x} {:#x}", end.rcx, end.rsi, end.rdi);
                }
                self.check_effect(COUNT, &end.rax);
            }
            Err(fault) => {
                print!(", then ");
                report::print_name(&fault);
            }
        }
        println!();
    }

    fn code(&self) -> [u8; 4] {
        let opcode = self.kind.opcode() + u8::from(self.size > 1);
        let nop = 0x90;
        match self.size {
            2 => [0x66, REP, opcode, nop],
            8 => [REP, 0x48, opcode, nop],
            _ => [REP, opcode, nop, nop],
        }
    }

    /// Where the first element is, in both pairs of pages. Upwards the second page is missing,
    /// downwards the first.
    fn first(&self) -> u64 {
        let size = self.size;
        let shift = if self.across { size / 2 } else { 0 };
        if self.down {
            4096 + (BEFORE - 1) * size - shift
        } else {
            4096 - BEFORE * size + shift
        }
    }

    fn start(&self) -> Registers {
        let first = self.first();
        Registers {
            rax: match self.kind {
                Kind::Scas => self.found(),
                _ => 0x8877_6655_4433_2211,
            },
            rcx: COUNT,
            rdx: self.port().into(),
            rsi: window::BASE + SOURCE as u64 * 4096 + first,
            rdi: window::BASE + DESTINATION as u64 * 4096 + first,
            // Not what any of the comparisons gives.
            rflags: 2 | 0x891 | if self.down { DIRECTION } else { 0 },
        }
    }

    /// For comparisons all elements are equal, and equal to RAX.
    fn found(&self) -> u64 {
        0x4242_4242_4242_4242
    }

    /// Whose value can be read back, where there is one for that size.
    fn port(&self) -> u16 {
        match self.size {
            1 => SERIAL_SCRATCH,
            4 => PCI_ADDRESS,
            _ => NOBODY,
        }
    }

    /// Contents, and the page that is missing.
    fn fill(&self) {
        let equal = matches!(self.kind, Kind::Cmps | Kind::Scas);
        for index in 0..2 * 4096 {
            let source = match self.kind {
                _ if equal => 0x42,
                // Values that the port keeps.
                Kind::Outs if self.size == 4 => [0x04, 0x12, 0x34, 0x80][index as usize & 3],
                _ => pattern(index),
            };
            let destination = if equal { 0x42 } else { FILLER };
            // SAFETY: inside FROM and TO.
            unsafe {
                from().add(index as usize).write_volatile(source);
                to().add(index as usize).write_volatile(destination);
            }
        }
        port::write8(SERIAL_SCRATCH, 0x5A);
        port::write32(PCI_ADDRESS, 0x8011_2230);
        self.map(false);
    }

    fn map(&self, everything: bool) {
        for (first, memory, misses) in [
            (SOURCE, from(), self.source_is_missing),
            (DESTINATION, to(), !self.source_is_missing),
        ] {
            let missing = if self.down { 0 } else { 1 };
            for page in 0..2 {
                if misses && page == missing && !everything {
                    window::unmap(first + page);
                } else {
                    window::map(
                        first + page,
                        memory as u64 + page as u64 * 4096,
                        PRESENT | WRITABLE,
                    );
                }
            }
        }
    }

    fn print(&self, fault: &Fault, start: &Registers) {
        let frame = &fault.frame;
        report::print_name(fault);
        let first_page = if self.source_is_missing {
            SOURCE
        } else {
            DESTINATION
        };
        let boundary = window::BASE + (first_page as u64 + 1) * 4096;
        print!(
            " at {:+}, {} left, rsi {:+}, rdi {:+}",
            fault.cr2.wrapping_sub(boundary) as i64,
            frame.rcx,
            frame.rsi.wrapping_sub(start.rsi) as i64,
            frame.rdi.wrapping_sub(start.rdi) as i64
        );
    }

    /// What `done` elements must have left behind.
    fn check_effect(&self, done: u64, rax: &u64) {
        let size = self.size;
        let first = self.first();
        // The lowest byte that was touched, and the one behind the last.
        let (low, high) = if self.down {
            (first + size - done * size, first + size)
        } else {
            (first, first + done * size)
        };
        let last = if self.down { low } else { high - size };
        let element = |memory: *const u8, at: u64| {
            (0..size).fold(0u64, |value, byte| {
                // SAFETY: inside FROM or TO.
                let byte_value = unsafe { memory.add((at + byte) as usize).read_volatile() };
                value | u64::from(byte_value) << (8 * byte)
            })
        };
        let right = match self.kind {
            Kind::Movs | Kind::Stos | Kind::Ins => (0..2 * 4096).all(|index| {
                // SAFETY: inside TO.
                let byte = unsafe { to().add(index as usize).read_volatile() };
                if !(low..high).contains(&index) {
                    return byte == FILLER;
                }
                match (self.kind, size) {
                    (Kind::Movs, _) => byte == pattern(index),
                    (Kind::Stos, _) => {
                        byte == (0x8877_6655_4433_2211u64 >> ((index - low) % size * 8)) as u8
                    }
                    (_, 1) => byte == 0x5A,
                    (_, 4) => byte == (0x8011_2230u32 >> ((index - low) % size * 8)) as u8,
                    _ => true,
                }
            }),
            Kind::Lods => {
                let loaded = element(from(), last);
                let kept = match size {
                    1 => 0x8877_6655_4433_2200,
                    2 => 0x8877_6655_4433_0000,
                    _ => 0,
                };
                *rax == loaded | kept
            }
            Kind::Outs if size == 1 => {
                u64::from(port::read8(SERIAL_SCRATCH)) == element(from(), last)
            }
            Kind::Outs if size == 4 => {
                // Across the boundary the bytes are another word, of which the port keeps a part.
                self.across || u64::from(port::read32(PCI_ADDRESS)) == element(from(), last)
            }
            _ => true,
        };
        if !right {
            print!(", wrong after {done}");
        }
    }
}

const SERIAL_SCRATCH: u16 = 0x3FF;
const PCI_ADDRESS: u16 = 0xCF8;
const NOBODY: u16 = 0x80;
