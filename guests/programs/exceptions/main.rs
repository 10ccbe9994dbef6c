//! Raises every exception that 64-bit code can raise, and says what the CPU told the handler.
//!
//! What a line says: see `runtime::report`.
#![no_std]
#![no_main]

mod bodies;

use bodies::*;
use runtime::interrupts::{self, catch};
use runtime::report::{self, describe};
use runtime::ring3::{self, Start};
use runtime::segments::{self, FIRST_FREE};
use runtime::window::{self, NO_EXECUTE, PRESENT, USER, WRITABLE};
use runtime::{cpu, print, println};

runtime::entry!(exceptions);

/// Has no translation: above the identity map, below the window.
const UNMAPPED: u64 = 5 << 30;
const NON_CANONICAL: u64 = 0x8000_0000_0000;

#[repr(C, align(4096))]
struct Page([u8; 4096]);

static mut FRAME: Page = Page([0; 4096]);
static mut USER_STACK: Page = Page([0; 4096]);

fn exceptions() {
    window::open();
    divide();
    single_steps();
    segments();
    addresses();
    double_faults();
    user_mode();
    page_faults();
    // A paravirtual KVM does not emulate some of these.
    debug();
    smap_suspended();
    invalid_opcodes();
    gates();
    software_interrupts();
    registers();
    println!("exceptions: done");
}

/// Runs `body` in ring 0 and prints how it ended.
fn show(what: &str, body: Body, argument: u64) {
    report::show(what, catch(body, argument), body);
}

fn divide() {
    show("div by zero", divide_by_zero, 0);
    show("div with a quotient of 33 bits", divide_overflow, 0);
    show("idiv of the smallest number by -1", idiv_overflow, 0);
}

/// SDM vol. 3B 19.3.1.4.
fn single_steps() {
    cpu::write_dr6(0);
    show("single step", single_step, 0);
    show(
        "single step over mov ss, which holds it back for one instruction",
        single_step_mov_ss,
        0,
    );
    cpu::write_dr6(0);
}

/// SDM vol. 3B 19.2 and 19.3.
fn debug() {
    // DR7: enable breakpoint 0; bits 16 to 19 say what for.
    let target = bodies::at(breakpoint_target);
    cpu::write_dr0(target);
    cpu::write_dr7(0x402);
    cpu::write_dr6(0);
    show("code breakpoint", breakpoint_target, 0);
    cpu::write_dr0((&raw const FRAME) as u64);
    cpu::write_dr7(0x402 | 1 << 16);
    cpu::write_dr6(0);
    show(
        "data breakpoint on a write",
        write_byte,
        (&raw const FRAME) as u64,
    );
    show(
        "data breakpoint on a write does not see a read",
        read_byte,
        (&raw const FRAME) as u64,
    );
    cpu::write_dr7(0x402 | 3 << 16 | 3 << 18);
    cpu::write_dr6(0);
    show(
        "data breakpoint on an access of 4 bytes, at the third",
        read_byte,
        (&raw const FRAME) as u64 + 2,
    );
    cpu::write_cr4(cpu::read_cr4() | cpu::cr4::DE);
    cpu::write_dr0(0x80);
    cpu::write_dr7(0x402 | 2 << 16);
    cpu::write_dr6(0);
    show("i/o breakpoint", out_0x80, 0);
    cpu::write_dr6(0);
    cpu::write_dr7(0x400 | 1 << 13);
    // The exception clears the general-detect bit before its handler runs.
    show(
        "debug registers while general detect is on",
        mov_from_dr7,
        0,
    );
    cpu::write_dr7(0x400);
    show("dr4 with debugging extensions", mov_from_dr4, 0);
    cpu::write_cr4(cpu::read_cr4() & !cpu::cr4::DE);
    show("dr4 without", mov_from_dr4, 0);
    cpu::write_dr6(0);
}

fn software_interrupts() {
    cpu::write_dr6(0);
    show("int1", int1, 0);
    show("int3", int3, 0);
    show("int 3 in two bytes", int_3, 0);
    show("int 4", int_4, 0);
    show("int 0x80", int_0x80, 0);
}

fn invalid_opcodes() {
    show("ud2", ud2, 0);
    show("ud1", ud1, 0);
    show("ud0", ud0, 0);
    show("lock before a register", lock_register, 0);
    show("lock before a load", lock_load, 0);
    show("mov to cs", mov_to_cs, 0);
    show("push es in 64-bit mode", push_es, 0);
    show("into in 64-bit mode", into, 0);
    show("aam in 64-bit mode", aam, 0);
    show("pusha in 64-bit mode", pusha, 0);
    show(
        "far call with an immediate in 64-bit mode",
        far_call_immediate,
        0,
    );
    show("lea of a register", lea_register, 0);
    show("cr1", mov_from_cr1, 0);
    show("16 bytes long", sixteen_bytes, 0);
    show("15 bytes long", fifteen_bytes, 0);
}

/// Selectors and descriptors, SDM vol. 3A 7.15 (#NP, #SS, #GP).
fn segments() {
    const DATA_NOT_PRESENT: u16 = FIRST_FREE;
    const READ_ONLY: u16 = FIRST_FREE + 8;
    const RING_3_DATA: u16 = segments::USER_DATA & !3;
    const BEYOND: u16 = 0x1000;
    segments::set_descriptor(DATA_NOT_PRESENT, 0x00CF_1300_0000_FFFF);
    segments::set_descriptor(READ_ONLY, 0x00CF_9100_0000_FFFF);

    show(
        "ds: segment not present",
        mov_ds,
        u64::from(DATA_NOT_PRESENT),
    );
    show(
        "ss: segment not present",
        mov_ss,
        u64::from(DATA_NOT_PRESENT),
    );
    show("ds: beyond the gdt", mov_ds, u64::from(BEYOND));
    show("ds: beyond the gdt, rpl 3", mov_ds, u64::from(BEYOND | 3));
    show("ds: no ldt", mov_ds, 4);
    show("ds: a tss", mov_ds, u64::from(segments::TASK));
    show("ds: null", mov_ds, 0);
    show("ss: code", mov_ss, u64::from(segments::KERNEL_CODE));
    show("ss: read-only", mov_ss, u64::from(READ_ONLY));
    show("ss: ring 3", mov_ss, u64::from(RING_3_DATA));
    show("ltr: busy", ltr, u64::from(segments::TASK));
    show("ltr: null", ltr, 0);
    segments::load();
    show("lldt: data", lldt, u64::from(segments::KERNEL_DATA));
    show("lret to null", far_return, 0);
    show("lret to data", far_return, u64::from(segments::KERNEL_DATA));
    show(
        "lret to ring 3 code with rpl 0",
        far_return,
        u64::from(segments::USER_CODE & !3),
    );
}

/// The gates of INT n (SDM vol. 3A 7.12.1, 7.13).
fn gates() {
    interrupts::set_gate(
        0x81,
        segments::KERNEL_CODE,
        interrupts::stub_address(0x81),
        0x0E,
        0,
    );
    show("int: gate not present", int_0x81, 0);
    interrupts::set_gate(
        0x81,
        segments::KERNEL_DATA,
        interrupts::stub_address(0x81),
        0x8E,
        0,
    );
    show("int: gate to data", int_0x81, 0);
    interrupts::set_gate(0x81, 0, interrupts::stub_address(0x81), 0x8E, 0);
    show("int: gate to null", int_0x81, 0);
    interrupts::set_gate(
        0x81,
        segments::KERNEL_CODE,
        interrupts::stub_address(0x81),
        0x85,
        0,
    );
    show("int: task gate in long mode", int_0x81, 0);
    interrupts::load();
}

fn addresses() {
    show(
        "load from a non-canonical address",
        read_byte,
        NON_CANONICAL,
    );
    show(
        "store to a non-canonical address",
        write_byte,
        NON_CANONICAL,
    );
    show(
        "load through rbp from a non-canonical address",
        read_rbp,
        NON_CANONICAL,
    );
    show(
        "push to a non-canonical stack",
        push_on,
        NON_CANONICAL + 0x1000,
    );
    show("jmp to a non-canonical address", jump, NON_CANONICAL);
}

/// Values that control registers and MSRs refuse. Last, because a CPU that takes one of them may
/// not get far.
fn registers() {
    show("rdmsr of an msr that is not there", read_msr, 0xDEAD_0000);
    show(
        "wrmsr of a non-canonical address to lstar",
        write_lstar_non_canonical,
        0,
    );
    show(
        "efer: a reserved bit",
        write_efer,
        cpu::read_msr(cpu::msr::EFER) | 1 << 1,
    );
    show(
        "efer: long mode off while paging is on",
        write_efer,
        cpu::read_msr(cpu::msr::EFER) & !(1 << 8),
    );
    show(
        "cr0: paging without protection",
        write_cr0,
        cpu::read_cr0() & !1,
    );
    show(
        "cr0: not-write-through with caches on",
        write_cr0,
        (cpu::read_cr0() | 1 << 29) & !(1 << 30),
    );
    show(
        "cr0: a reserved high bit",
        write_cr0,
        cpu::read_cr0() | 1 << 32,
    );
    show("cr4: a reserved bit", write_cr4, cpu::read_cr4() | 1 << 31);
    show(
        "cr4: pae off in long mode",
        write_cr4,
        cpu::read_cr4() & !(1 << 5),
    );
    show("cr8: a reserved bit", write_cr8, 0x10);
    show("dr7: a reserved high bit", write_dr7, 1 << 32);
    show("iret with the nested-task flag", iret_nested, 0);
}

/// SDM vol. 3A 5.7: bit 0 present, 1 write, 2 user, 3 reserved bit, 4 fetch.
fn page_faults() {
    let frame = &raw const FRAME;
    show("read, not present", read_byte, UNMAPPED + 0x123);
    show("write, not present", write_byte, UNMAPPED + 0x123);
    show(
        "read-modify-write, not present",
        increment,
        UNMAPPED + 0x123,
    );
    let missing = window::unmap(0);
    show_fetch("fetch, not present", missing);
    let page = window::map_memory(1, frame, PRESENT);
    show("write, read-only", write_byte, page);
    show("read-modify-write, read-only", increment, page);
    let page = window::map_memory(2, frame, PRESENT | WRITABLE | NO_EXECUTE);
    show_fetch("fetch, no-execute", page);
    let page = window::set_large(PRESENT | WRITABLE | window::LARGE | 1 << 13);
    show("read, reserved bit", read_byte, page);
    show("write, reserved bit", write_byte, page);
    show_fetch("fetch, reserved bit", page);
    window::set_large(0);

    let page = window::map_memory(1, frame, PRESENT | WRITABLE);
    window::unmap(2);
    show(
        "write of 8 bytes into a page that is not there, at its second byte",
        write_8,
        page + 4096 - 7,
    );
    show(
        "push into a page that is not there",
        push_on,
        window::BASE + 3 * 4096,
    );

    let page = window::map_memory(4, bodies::user_page(), PRESENT | USER);
    if has_feature(7) {
        cpu::write_cr4(cpu::read_cr4() | cpu::cr4::SMEP);
        show_fetch("fetch from a user page, smep", page + bodies::USER_RETURN);
        cpu::write_cr4(cpu::read_cr4() & !cpu::cr4::SMEP);
    }
    if has_feature(20) {
        let page = window::map_memory(4, frame, PRESENT | WRITABLE | USER);
        cpu::write_cr4(cpu::read_cr4() | cpu::cr4::SMAP);
        show("read of a user page, smap", read_byte, page);
        show("write of a user page, smap", write_byte, page);
        cpu::write_cr4(cpu::read_cr4() & !cpu::cr4::SMAP);
    }
}

/// SDM vol. 3A 5.6.1.
fn smap_suspended() {
    if has_feature(20) {
        let page = window::map_memory(4, &raw const FRAME, PRESENT | WRITABLE | USER);
        cpu::write_cr4(cpu::read_cr4() | cpu::cr4::SMAP);
        show("read of a user page, smap, ac set", read_with_ac, page);
        cpu::write_cr4(cpu::read_cr4() & !cpu::cr4::SMAP);
    }
}

/// A bit of CPUID leaf 7 EBX.
fn has_feature(bit: u32) -> bool {
    cpu::cpuid(7, 0).ebx & 1 << bit != 0
}

/// Jumps to `address`; the saved RIP must be `address` itself.
fn show_fetch(what: &str, address: u64) {
    let ended = catch(jump, address);
    print!("{what}: ");
    match ended {
        Ok(_) => println!("no exception"),
        Err(fault) => {
            assert_eq!(fault.frame.rip, address, "{what}");
            describe(&fault, None);
        }
    }
}

fn user_mode() {
    const CODE: usize = 16;
    const STACK: usize = 18;
    let code = window::map_memory(CODE, bodies::user_page(), PRESENT | USER);
    let stack = window::map_memory(STACK, &raw const USER_STACK, PRESENT | WRITABLE | USER) + 4096;
    let frame = &raw const FRAME;
    let supervisor = window::map_memory(20, frame, PRESENT | WRITABLE);
    let read_only = window::map_memory(21, frame, PRESENT | USER);
    let no_execute = window::map_memory(22, frame, PRESENT | USER | NO_EXECUTE);
    let missing = window::unmap(23);
    let writable = window::map_memory(24, frame, PRESENT | USER | WRITABLE);

    let run = |what: &str, offset: u64, rflags: u64, argument: u64| {
        let mut start = Start::new(code + offset, stack, argument);
        start.rflags |= rflags;
        let fault = ring3::run(&start);
        print!("ring 3, {what}: ");
        assert_eq!(fault.frame.cs & 3, 3);
        describe(&fault, None);
    };
    run("read, not present", bodies::USER_READ, 0, missing);
    run("write, not present", bodies::USER_WRITE, 0, missing);
    run("fetch, not present", bodies::USER_JUMP, 0, missing);
    run(
        "read of a supervisor page",
        bodies::USER_READ,
        0,
        supervisor,
    );
    run(
        "write of a supervisor page",
        bodies::USER_WRITE,
        0,
        supervisor,
    );
    run(
        "fetch from a supervisor page",
        bodies::USER_JUMP,
        0,
        supervisor,
    );
    run("write, read-only", bodies::USER_WRITE, 0, read_only);
    run("fetch, no-execute", bodies::USER_JUMP, 0, no_execute);
    run(
        "int 0x80 through a ring 0 gate",
        bodies::USER_INT_0X80,
        0,
        0,
    );
    interrupts::allow_from_ring3(0x80);
    run(
        "int 0x80 through a ring 3 gate",
        bodies::USER_INT_0X80,
        0,
        0,
    );
    run("int3 through a ring 0 gate", bodies::USER_INT3, 0, 0);
    interrupts::allow_from_ring3(3);
    run("int3 through a ring 3 gate", bodies::USER_INT3, 0, 0);
    run("int1 through a ring 0 gate", bodies::USER_INT1, 0, 0);
    run("hlt", bodies::USER_HLT, 0, 0);
    run("cli with iopl 0", bodies::USER_CLI, 0, 0);
    run(
        "cli with iopl 3, then int 0x80",
        bodies::USER_CLI,
        3 << 12,
        0,
    );
    run("out with iopl 0", bodies::USER_OUT, 0, 0);
    run("mov from cr0", bodies::USER_CR0, 0, 0);

    cpu::write_cr0(cpu::read_cr0() | cpu::cr0::AM);
    const AC: u64 = 1 << 18;
    run(
        "misaligned read with cr0.am and ac",
        bodies::USER_READ_8,
        AC,
        writable + 1,
    );
    run(
        "aligned read with cr0.am and ac, then int 0x80",
        bodies::USER_READ_8,
        AC,
        writable,
    );
    run(
        "misaligned read without ac, then int 0x80",
        bodies::USER_READ_8,
        0,
        writable + 1,
    );
    cpu::write_cr0(cpu::read_cr0() & !cpu::cr0::AM);
    interrupts::load();
}

/// SDM vol. 3A table 7-5. The saved RIP is not defined, so it is not printed.
fn double_faults() {
    let double_fault = |what: &str, body: Body, argument: u64| {
        let ended = catch(body, argument);
        interrupts::load();
        segments::load();
        print!("{what}: ");
        match ended {
            Ok(_) => println!("no exception"),
            Err(fault) => describe(&fault, None),
        }
    };
    let stub = |vector| interrupts::stub_address(vector);
    interrupts::set_gate(0, segments::KERNEL_CODE, stub(0), 0x0E, 0);
    double_fault("#DE through a gate that is not present", divide_by_zero, 0);
    interrupts::set_gate(13, segments::KERNEL_CODE, stub(13), 0x0E, 0);
    double_fault(
        "#GP through a gate that is not present",
        read_byte,
        NON_CANONICAL,
    );
    interrupts::set_gate(14, segments::KERNEL_CODE, stub(14), 0x0E, 0);
    double_fault(
        "#PF through a gate that is not present",
        read_byte,
        UNMAPPED,
    );
    segments::set_ist(5, UNMAPPED + 4096);
    interrupts::set_gate(14, segments::KERNEL_CODE, stub(14), 0x8E, 5);
    double_fault("#PF on a stack that is not mapped", read_byte, UNMAPPED);
    segments::set_ist(5, NON_CANONICAL);
    interrupts::set_gate(14, segments::KERNEL_CODE, stub(14), 0x8E, 5);
    double_fault("#PF on a non-canonical stack", read_byte, UNMAPPED);
    // Not two contributory exceptions: #UD is benign, so the second is delivered alone.
    interrupts::set_gate(6, segments::KERNEL_CODE, stub(6), 0x0E, 0);
    double_fault("#UD through a gate that is not present", ud2, 0);
    segments::set_ist(5, UNMAPPED + 4096);
    interrupts::set_gate(0, segments::KERNEL_CODE, stub(0), 0x8E, 5);
    double_fault("#DE on a stack that is not mapped", divide_by_zero, 0);
}
