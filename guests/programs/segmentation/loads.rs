//! Who may load what: privilege levels of code, selector and descriptor against each other (SDM vol. 3A 6.5 to 6.8).
//!
//! Rings 1 and 2 are there too.

use core::arch::naked_asm;

use runtime::interrupts::Fault;
use runtime::ring3::{self, Start};
use runtime::segments::{self, FIRST_FREE, set_descriptor};
use runtime::{print, println};

use crate::{SEGMENT, descriptor};

/// Code and stack of each ring.
const RING_CODE: u16 = FIRST_FREE + 0x20;
const RING_STACK: u16 = FIRST_FREE + 0x40;

#[repr(C, align(16))]
struct Stack([u8; 4096]);

static mut STACK: Stack = Stack([0; 4096]);

type Code = unsafe extern "C" fn(u64) -> u64;

/// Where every piece comes to its end. (INT would do, but a paravirtual KVM does not emulate it in
/// ring 0.)
#[unsafe(naked)]
unsafe extern "C" fn finished() {
    naked_asm!("ud2")
}

fn is_finished(fault: &Fault) -> bool {
    fault.frame.rip == finished as *const () as u64
}

macro_rules! pieces {
    ($($name:ident: $($line:literal),*;)*) => {
        $(#[unsafe(naked)]
        unsafe extern "C" fn $name(argument: u64) -> u64 {
            naked_asm!($($line,)* "jmp {}", sym finished)
        })*
    };
}

pieces! {
    load_ds: "mov ds, edi";
    load_ss: "mov ss, edi";
    load_fs: "mov fs, edi";
    far_jump: "jmp fword ptr [rdi]"; // to the next instruction
    far_call: "call fword ptr [rdi]";
    far_return: "push rdi", "lea rax, [rip + 2f]", "push rax", "retfq", "2:";
    report_cs: "mov eax, cs";
}

#[repr(C, packed)]
struct FarPointer {
    offset: u32,
    selector: u16,
}

pub fn show() {
    ring3::open_memory();
    for ring in 0..4u16 {
        set_descriptor(
            RING_CODE + ring * 8,
            descriptor(0, 0xF_FFFF, 0x9B | (ring as u8) << 5, 0xA),
        );
        set_descriptor(
            RING_STACK + ring * 8,
            descriptor(0, 0xF_FFFF, 0x93 | (ring as u8) << 5, 0xC),
        );
    }
    segments::set_ring0_stack((&raw const STACK) as u64 + 4096);
    println!("for each ring and rpl, the descriptor's privilege levels 0 to 3: + loaded, - #GP");
    matrix("ds, data", 0x93, 0xC, |selector| (load_ds, selector));
    matrix("ds, code", 0x9B, 0xA, |selector| (load_ds, selector));
    matrix("ds, conforming code", 0x9F, 0xA, |selector| {
        (load_ds, selector)
    });
    matrix("fs, data", 0x93, 0xC, |selector| (load_fs, selector));
    matrix("ss, data", 0x93, 0xC, |selector| (load_ss, selector));
    matrix("jump, code", 0x9B, 0xA, |selector| {
        (far_jump, pointer(selector))
    });
    matrix("jump, conforming code", 0x9F, 0xA, |selector| {
        (far_jump, pointer(selector))
    });
    matrix("call, code", 0x9B, 0xA, |selector| {
        (far_call, pointer(selector))
    });
    matrix("call, conforming code", 0x9F, 0xA, |selector| {
        (far_call, pointer(selector))
    });
    returns();
}

/// A far pointer to [`report_cs`].
fn pointer(selector: u64) -> u64 {
    static mut POINTER: FarPointer = FarPointer {
        offset: 0,
        selector: 0,
    };
    // SAFETY: one CPU.
    unsafe {
        (&raw mut POINTER).write_unaligned(FarPointer {
            offset: report_cs as *const () as u32,
            selector: selector as u16,
        })
    }
    (&raw const POINTER) as u64
}

fn run(ring: u16, code: Code, argument: u64) -> Fault {
    let start = Start {
        rip: code as *const () as u64,
        cs: u64::from(RING_CODE + ring * 8 | ring),
        rflags: 2,
        rsp: (&raw const STACK) as u64 + 2048,
        ss: u64::from(RING_STACK + ring * 8 | ring),
        argument,
    };
    ring3::run(&start)
}

fn matrix(what: &str, access: u8, flags: u8, request: impl Fn(u64) -> (Code, u64)) {
    println!("{what}:");
    for ring in 0..4 {
        print!("  ring {ring}:");
        for rpl in 0..4u16 {
            print!(" ");
            for dpl in 0..4u8 {
                set_descriptor(SEGMENT, descriptor(0, 0xF_FFFF, access | dpl << 5, flags));
                let selector = u64::from(SEGMENT | rpl);
                let (code, argument) = request(selector);
                let fault = run(ring, code, argument);
                let frame = &fault.frame;
                let letter = match (frame.vector, frame.error) {
                    _ if is_finished(&fault) && frame.cs & 3 == u64::from(ring) => '+',
                    _ if is_finished(&fault) => '!',
                    (13, error) if error == u64::from(SEGMENT) => '-',
                    (12, _) => 's',
                    _ => '?',
                };
                print!("{letter}");
            }
        }
        println!();
    }
}

/// RETF outwards, inwards and level (SDM vol. 3A 6.8.6). Outwards it takes a stack too, which is
/// not asked here: `transfers` does.
fn returns() {
    println!("return to the same ring: the ring that runs, for each ring and rpl of the selector");
    for ring in 0..4u16 {
        print!("  ring {ring}:");
        for rpl in 0..4u16 {
            if rpl > ring {
                // It would take a stack pointer from what is no such thing.
                print!(" .");
                continue;
            }
            let fault = run(ring, far_return, u64::from(RING_CODE + ring * 8 | rpl));
            match (fault.frame.vector, fault.frame.error) {
                _ if is_finished(&fault) => print!(" {}", fault.frame.cs & 3),
                (vector, error) => print!(" {vector}({error:#x})"),
            }
        }
        println!();
    }
}
