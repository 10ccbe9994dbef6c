//! Segments: what may be loaded where, what a segment of each type permits, and where it ends
//! (SDM vol. 3A 4.4.1, 6.3 to 6.8).
//!
//! Limits count in 32-bit code only, so most of this happens in compatibility mode.
#![no_std]
#![no_main]

mod code;
mod loads;
mod tables;

use code::{Access, access};
use runtime::interrupts::Fault;
use runtime::segments::{self, FIRST_FREE, set_descriptor};
use runtime::{print, println, report};

runtime::entry!(segmentation);

/// The segment in question.
pub const SEGMENT: u16 = FIRST_FREE;

/// A page of numbers, and more behind it.
#[repr(C, align(4096))]
struct Memory([u8; 3 * 4096]);

static mut MEMORY: Memory = Memory([0; 3 * 4096]);

pub fn memory() -> u64 {
    (&raw const MEMORY) as u64
}

fn segmentation() {
    for index in 0..3 * 4096 {
        // SAFETY: inside the memory; one CPU.
        unsafe {
            (memory() as *mut u8)
                .add(index)
                .write_volatile(index as u8 ^ 0x5A)
        }
    }
    types();
    limits();
    directions();
    tables::show();
    loads::show();
    code_limits();
    println!("segmentation: done");
}

/// A descriptor of 32-bit code or data. `flags`: 8 granularity, 4 size, 2 long.
pub fn descriptor(base: u64, limit: u32, access: u8, flags: u8) -> u64 {
    let [low, _] = segments::system_descriptor(base, limit, access);
    low | u64::from(flags) << 52
}

pub fn print_ended(ended: Result<u64, Fault>) {
    match ended {
        Ok(_) => print!("yes"),
        Err(fault) => report::print_name(&fault),
    }
}

/// What each of the sixteen types of code and data may be used for in ring 0 (SDM vol. 3A 3.4.5.1, 6.4).
fn types() {
    println!("type: load ds, load ss, read, write, jump; type afterwards");
    for kind in 0..16u8 {
        let write = || {
            set_descriptor(
                SEGMENT,
                descriptor(memory(), 0xFFF, 0x90 | kind, 4), // byte granular, 32 bits
            );
        };
        print!("{kind:#x}:");
        for what in [
            Access::LoadDs,
            Access::LoadSs,
            Access::Read,
            Access::Write,
            Access::Jump,
        ] {
            write();
            if let Access::Jump = what {
                // As large as all memory: the target is this program's.
                set_descriptor(SEGMENT, descriptor(0, 0xF_FFFF, 0x90 | kind, 0xC));
            }
            print!(" ");
            print_ended(access(what, SEGMENT, 0));
            print!(" {:x}", segments::descriptor(SEGMENT) >> 40 & 0xF);
        }
        println!();
    }
    // System descriptors are nothing that a segment register takes.
    print!("system types that ds takes:");
    for kind in 0..16u8 {
        set_descriptor(SEGMENT, descriptor(memory(), 0xFFF, 0x80 | kind, 4));
        if access(Access::LoadDs, SEGMENT, 0).is_ok() {
            print!(" {kind:#x}");
        }
    }
    println!();
    set_descriptor(SEGMENT, descriptor(memory(), 0xFFF, 0x12, 4));
    print!("not present: ds ");
    print_ended(access(Access::LoadDs, SEGMENT, 0));
    print!(", ss ");
    print_ended(access(Access::LoadSs, SEGMENT, 0));
    set_descriptor(SEGMENT, descriptor(0, 0xF_FFFF, 0x1A, 0xC));
    print!(", jump ");
    print_ended(access(Access::Jump, SEGMENT, 0));
    println!();
    // What the register holds is what the descriptor said when it was loaded.
    set_descriptor(SEGMENT, descriptor(memory(), 0xFFF, 0x92, 4));
    println!(
        "descriptor gone after the load: {:#x}",
        access(Access::ReadBehindTheDescriptor, SEGMENT, 0x10).unwrap_or(0)
    );
    print!("null: load ");
    print_ended(access(Access::LoadDs, 0, 0));
    print!(", read ");
    print_ended(access(Access::Read, 0, 0));
    print!(", ss ");
    print_ended(access(Access::LoadSs, 0, 0));
    println!();
}

/// SDM vol. 3A 6.3. The last offsets that reads of 1, 2, 4 and 8 bytes may have.
fn limits() {
    for (what, limit, flags) in [
        ("limit 0", 0u32, 4u8),
        ("limit 1", 1, 4),
        ("limit 0x7ff", 0x7FF, 4),
        ("limit 0xfff", 0xFFF, 4),
        ("limit 0x1000", 0x1000, 4),
        ("limit 0 pages", 0, 0xC),
        ("limit 1 page", 1, 0xC),
    ] {
        set_descriptor(SEGMENT, descriptor(memory(), limit, 0x92, flags));
        let end = if flags & 8 != 0 {
            (u64::from(limit) << 12) + 0xFFF
        } else {
            u64::from(limit)
        };
        print!("{what}:");
        for (size, read, write) in [
            (1, Access::Read, Access::Write),
            (2, Access::Read2, Access::Write2),
            (4, Access::Read4, Access::Write4),
        ] {
            for (name, what) in [("read", read), ("write", write)] {
                // The last that fits, if any, and the first that does not.
                let last = (end + 1).checked_sub(size);
                let beyond = last.map_or(0, |last| last + 1);
                print!(" {name}{size} ");
                match last.map(|last| access(what, SEGMENT, last)) {
                    Some(ended) => print_ended(ended),
                    None => print!("-"),
                }
                print!("/");
                print_ended(access(what, SEGMENT, beyond));
            }
        }
        println!();
    }
    // Base and offset add up modulo 4 GiB. (Whether an access may wrap around at the limit of 4 GiB
    // is the implementation's choice, SDM vol. 3A 6.3.)
    set_descriptor(SEGMENT, descriptor(0xFFFF_F000, 0xF_FFFF, 0x92, 0xC));
    println!(
        "base and offset beyond 4 GiB: {:#x}",
        access(Access::Read4, SEGMENT, memory() + 0x1010).unwrap_or(0)
    );
}

/// SDM vol. 3A 6.3. Segments that grow downwards: valid are the offsets above the limit, up to 64 KiB or 4 GiB.
fn directions() {
    for (what, limit, flags) in [
        ("down, limit 0x7ff, 32 bits", 0x7FFu32, 4u8),
        ("down, limit 0x7ff, 16 bits", 0x7FF, 0),
        ("down, limit 0 pages, 32 bits", 0, 0xC),
        ("down, limit 0xfffff pages", 0xF_FFFF, 0xC),
        ("down, limit 0xffff, 16 bits", 0xFFFF, 0),
    ] {
        // The base is such that offset 0x1000 is this program's memory.
        let base = memory().wrapping_sub(0x1000) & 0xFFFF_FFFF;
        set_descriptor(SEGMENT, descriptor(base, limit, 0x96, flags));
        print!("{what}:");
        for (name, offset) in [
            ("0x0", 0u64),
            ("0x7ff", 0x7FF),
            ("0x800", 0x800),
            ("0xfff", 0xFFF),
            ("0x1000", 0x1000),
            ("0xffff", 0xFFFF),
            ("0x10000", 0x1_0000),
        ] {
            print!(" {name} ");
            print_ended(access(Access::Read, SEGMENT, offset));
        }
        print!(" word at 0xffff ");
        print_ended(access(Access::Read2, SEGMENT, 0xFFFF));
        println!();
    }
    // A stack has its own exception, and its own size.
    for (what, kind, limit, flags) in [
        ("stack up, limit 0xfff", 0x92u8, 0xFFFu32, 4u8),
        ("stack down, limit 0xfff", 0x96, 0xFFF, 4),
    ] {
        let base = if kind == 0x92 {
            memory()
        } else {
            memory().wrapping_sub(0x1000)
        };
        set_descriptor(SEGMENT, descriptor(base, limit, kind, flags));
        print!("{what}: push at");
        for offset in [0x4u64, 0x1000, 0x1001, 0x1004, 0x1008] {
            print!(" {offset:#x} ");
            print_ended(access(Access::Push, SEGMENT, offset));
        }
        print!(", read through ebp at 0x1000 ");
        print_ended(access(Access::ReadEbp, SEGMENT, 0x1000));
        println!();
    }
}

/// Code has a limit too (SDM vol. 3A 6.3).
fn code_limits() {
    let small = |limit: u32, flags: u8| {
        set_descriptor(SEGMENT, descriptor(code::landing(), limit, 0x9A, flags));
    };
    // Two bytes of code, then a jump back of seven.
    small(0x1F, 4);
    print!("code limit 0x1f: jump to 0 ");
    print_ended(access(Access::JumpTo, SEGMENT, 0));
    print!(", to 0x20 ");
    print_ended(access(Access::JumpTo, SEGMENT, 0x20));
    small(0x3, 4);
    print!("; limit 3, an instruction that reaches beyond ");
    print_ended(access(Access::JumpTo, SEGMENT, 0));
    small(0x1F, 4);
    print!("; near jump beyond ");
    print_ended(access(Access::JumpTo, SEGMENT, 0x10));
    println!();
}
