//! The four breakpoints, and general detect.

use runtime::interrupts::{self, TrapFrame};
use runtime::report;
use runtime::{cpu, print, println};

use crate::bodies::*;
use crate::trace;

#[repr(C, align(4096))]
struct Page([u8; 4096]);
static mut PAGE: Page = Page([0; 4096]);

/// The place that is watched, with room around it.
fn place() -> u64 {
    (&raw const PAGE) as u64 + 0x100
}

const WRITE: u64 = 1;
const PORTS: u64 = 2;
const ACCESS: u64 = 3;
/// Codes of lengths.
const LENGTH: [(u64, u64); 4] = [(1, 0), (2, 1), (4, 3), (8, 2)];

/// DR7 for breakpoint `index`, enabled globally or locally.
fn dr7(index: u64, kind: u64, length: u64) -> u64 {
    0x400 | 2 << (2 * index) | kind << (16 + 4 * index) | length << (18 + 4 * index)
}

pub fn show() {
    code();
    sizes();
    accesses();
    stack_segment();
    ports();
    general_detect();
    status();
}

/// 19.2.4, 19.3.1.1: a fault, before the instruction; at its first byte only.
fn code() {
    let target = report::at(two_nops);
    for (what, address, dr7) in [
        ("global", target, 0x402u64),
        ("local", target, 0x401),
        ("disabled", target, 0x400),
        ("beside it", target - 1, 0x402),
    ] {
        cpu::write_dr0(address);
        cpu::write_dr7(dr7);
        crate::show_as("code breakpoint, ", what, two_nops, 0);
    }
    cpu::write_dr0(target);
    cpu::write_dr3(target);
    cpu::write_dr1(target + 1);
    cpu::write_dr7(0x482 | 8);
    trace("two on one instruction, one on the next", two_nops, 0);
    cpu::write_dr7(0x400);
    // Before anything that the instruction itself raises (table 7-2).
    for (what, body) in [
        ("ud2", undefined as report::Body),
        ("a division by zero", divide),
    ] {
        cpu::write_dr0(report::at(body));
        cpu::write_dr7(0x402);
        trace_line("code breakpoint on ", what, body);
    }
    // The shadow of MOV SS covers the breakpoint on the next instruction (vol. 3A 7.8.3).
    cpu::write_dr0(report::at(nop_after_mov_ss));
    cpu::write_dr7(0x402);
    trace("code breakpoint behind mov ss", nop_after_mov_ss, 0);
    cpu::write_dr0(report::at(nop_after_mov_ss) + 1);
    trace(
        "code breakpoint on the second behind it",
        nop_after_mov_ss,
        0,
    );
    cpu::write_dr7(0x400);
}

fn trace_line(before: &str, what: &str, body: report::Body) {
    print!("{before}");
    trace(what, body, 0);
}

/// 19.2.5: which accesses touch which breakpoints, by their sizes. `+` hit.
fn sizes() {
    println!("writes of 1, 2, 4, 8 bytes from 8 below to 8 above breakpoints of 1, 2, 4, 8 bytes");
    for (bytes, code) in LENGTH {
        cpu::write_dr2(place());
        cpu::write_dr7(dr7(2, WRITE, code));
        print!("{bytes}:");
        for body in [write_1 as report::Body, write_2, write_4, write_8] {
            print!(" ");
            for offset in -8i64..=8 {
                let address = place().wrapping_add_signed(offset);
                cpu::write_dr6(0);
                let hit = match interrupts::catch(body, address) {
                    Ok(_) => '-',
                    Err(_) if cpu::read_dr6() & 0xF == 4 => '+',
                    Err(_) => '?',
                };
                print!("{hit}");
            }
        }
        println!();
    }
    // The address' low bits below the length are not looked at.
    cpu::write_dr2(place() + 3);
    cpu::write_dr7(dr7(2, WRITE, 3));
    crate::show(
        "4 bytes at an address that is not aligned, its first byte",
        write_1,
        place(),
    );
    cpu::write_dr7(0x400);
}

/// What is an access, and of what kind. The trap is after the instruction, or after an element of a string.
fn accesses() {
    for (what, kind) in [
        ("write breakpoint, ", WRITE),
        ("access breakpoint, ", ACCESS),
    ] {
        cpu::write_dr0(place());
        cpu::write_dr7(dr7(0, kind, 3));
        for (name, body) in [
            ("read", read_4 as report::Body),
            ("write", write_4),
            ("inc", modify),
            ("lock inc", locked),
            ("cmp", compare),
            ("push", push),
            ("call", call),
            ("lea", address),
            ("rep stosb across it", store_string),
            ("rep lodsb across it", copy_string),
            ("retf from it", far_return),
            ("iret from it", interrupt_return),
        ] {
            print!("{what}");
            trace(name, body, place());
        }
    }
    cpu::write_dr7(dr7(0, WRITE, 3));
    trace("a hit and a single step together", write_then_step, place());
    trace("a hit, then a division by zero", write_faulting, place());
    cpu::write_dr7(dr7(0, ACCESS, 3));
    trace(
        "read that hits, write that faults",
        move_to_nowhere,
        place(),
    );
    // Two breakpoints, one disabled.
    cpu::write_dr1(place() + 4);
    cpu::write_dr7(dr7(0, WRITE, 3) | dr7(1, WRITE, 3));
    crate::show("8 bytes over two breakpoints", write_8, place());
    cpu::write_dr7(0x400);
}

/// A trap that MOV SS itself causes waits for the end of the next instruction (vol. 3A 7.8.3), also if that is INT3:
/// then it is raised at the start of INT3's handler.
fn stack_segment() {
    // SAFETY: this program's own memory.
    unsafe { (place() as *mut u16).write_volatile(runtime::segments::KERNEL_DATA) }
    cpu::write_dr0(place());
    cpu::write_dr7(dr7(0, ACCESS, 3));
    trace("mov ss from it", load_ss, place());
    fn nothing(_: &mut TrapFrame) {}
    interrupts::set_handler(3, nothing);
    // SAFETY: one CPU.
    let before = interrupts::stub_address(3);
    let body = load_ss_int3 as report::Body;
    cpu::write_dr6(0);
    let ended = interrupts::catch(body, place());
    print!("mov ss from it, then int3: ");
    match ended {
        Ok(_) => println!("no exception"),
        Err(fault) => {
            report::print_name(&fault);
            println!(
                " at the start of the handler {}, dr6 {:#x}",
                u8::from(fault.frame.rip == before),
                cpu::read_dr6() & 0xE00F
            );
        }
    }
    interrupts::clear_handler(3);
    cpu::write_dr7(0x400);
}

/// With CR4.DE: ports, by their addresses and sizes.
fn ports() {
    let old = cpu::read_cr4();
    cpu::write_cr4(old | cpu::cr4::DE);
    cpu::write_dr0(0x80);
    for (bytes, code) in [(1u64, 0u64), (2, 1), (4, 3)] {
        cpu::write_dr7(dr7(0, PORTS, code));
        for (what, body) in [
            ("out of a byte to 0x80", out_1 as report::Body),
            ("out of a word to 0x80", out_2),
            ("in of a dword from 0x7e", in_4),
            ("outsb to 0x80", outs),
            ("out to 0x84", out_above),
        ] {
            print!("port breakpoint of {bytes}, ");
            crate::show(what, body, place());
        }
    }
    // A port's breakpoint is no memory's.
    cpu::write_dr0(place());
    cpu::write_dr7(dr7(0, PORTS, 3));
    crate::show("port breakpoint, memory at its address", write_4, place());
    cpu::write_dr7(0x400);
    cpu::write_cr4(old);
}

/// 19.3.1.3: any access to a debug register, before it; the handler may use them, since GD is cleared.
fn general_detect() {
    for (what, body) in [
        ("mov to dr0", mov_to_dr0 as report::Body),
        ("mov from dr6", mov_from_dr6),
        ("mov to dr7", mov_to_dr7),
    ] {
        cpu::write_dr6(0);
        cpu::write_dr7(0x400 | 1 << 13);
        print!("general detect, ");
        let ended = interrupts::catch(body, 0x400);
        let after = cpu::read_dr7();
        report::show(what, ended, body);
        println!("  dr7 in its handler {after:#x}");
    }
    cpu::write_dr7(0x400);
}

/// 19.2.3: bits are set by the processor, and cleared by nobody but software.
fn status() {
    cpu::write_dr6(0);
    println!(
        "dr6 of 0: {:#x}, dr7: {:#x}",
        cpu::read_dr6(),
        cpu::read_dr7()
    );
    cpu::write_dr0(place());
    cpu::write_dr7(dr7(0, WRITE, 0));
    cpu::write_dr6(0x4004);
    let _ = interrupts::catch(write_1, place());
    println!(
        "dr6 of 0x4004, then a hit of breakpoint 0: {:#x}",
        cpu::read_dr6() & 0xFFFF
    );
    cpu::write_dr7(0x400);
    cpu::write_dr6(0);
}
