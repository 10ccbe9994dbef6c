//! Ways between ring 3 and ring 0, and what ring 3 may see and do.
#![no_std]
#![no_main]

mod kernel_entries;
mod user_code;

use kernel_entries::*;
use runtime::cpu::{self, cr4, msr};
use runtime::interrupts::{self, Fault, TrapFrame, catch};
use runtime::ring3::{self, Start};
use runtime::segments::{
    self, FIRST_FREE, KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_CODE_32, USER_DATA,
};
use runtime::{print, println};

runtime::entry!(transfers);

type Code = unsafe extern "C" fn(u64) -> u64;

const FINISHED: u8 = 0x30;

#[repr(C, align(16))]
struct Stack([u8; 8192]);

static mut USER_STACK: Stack = Stack([0; 8192]);
static mut KERNEL_STACK: Stack = Stack([0; 8192]);

const GATE: u16 = FIRST_FREE;
const GATE_OF_RING_0: u16 = FIRST_FREE + 0x10;
const GATE_NOT_PRESENT: u16 = FIRST_FREE + 0x20;
const GATE_TO_NULL: u16 = FIRST_FREE + 0x30;
const CONFORMING: u16 = FIRST_FREE + 0x40;
const READ_ONLY: u16 = FIRST_FREE + 0x48;
const EXECUTE_ONLY: u16 = FIRST_FREE + 0x50;
const NOT_PRESENT: u16 = FIRST_FREE + 0x58;

fn transfers() {
    ring3::open_memory();
    interrupts::allow_from_ring3(FINISHED);
    segments::set_ring0_stack(kernel_stack());
    write_descriptors();
    interrupt_to_ring0();
    system_calls();
    sysenter();
    call_gates();
    returns();
    what_selectors_tell();
    sensitive_instructions();
    privileged_instructions();
    ports();
    println!("transfers: done");
}

fn user_stack() -> u64 {
    (&raw const USER_STACK) as u64 + 8192
}

fn kernel_stack() -> u64 {
    (&raw const KERNEL_STACK) as u64 + 8192
}

fn write_descriptors() {
    let gate = |selector: u16, target: u16, access: u8| {
        let [low, high] =
            segments::gate_descriptor(target, enter_by_gate as *const () as u64, access);
        segments::set_descriptor(selector, low);
        segments::set_descriptor(selector + 8, high);
    };
    gate(GATE, KERNEL_CODE, 0xEC);
    gate(GATE_OF_RING_0, KERNEL_CODE, 0x8C);
    gate(GATE_NOT_PRESENT, KERNEL_CODE, 0x6C);
    gate(GATE_TO_NULL, 0, 0xEC);
    segments::set_descriptor(CONFORMING, 0x00AF_9F00_0000_FFFF);
    segments::set_descriptor(READ_ONLY, 0x00CF_F100_0000_FFFF);
    segments::set_descriptor(EXECUTE_ONLY, 0x00AF_F900_0000_FFFF);
    segments::set_descriptor(NOT_PRESENT, 0x00CF_7300_0000_FFFF);
}

/// Runs a piece of ring 3 code with the given flags and arguments.
fn run_with(code: Code, rflags: u64, argument: u64) -> Fault {
    let mut start = Start::new(code as *const () as u64, user_stack(), argument);
    start.rflags |= rflags;
    ring3::run(&start)
}

fn run(code: Code, argument: u64) -> Fault {
    run_with(code, 0, argument)
}

/// Prints the exception that ended the code, or nothing. True if it ran to its end.
fn finished(fault: &Fault) -> bool {
    let frame = &fault.frame;
    if frame.vector == u64::from(FINISHED) {
        return true;
    }
    let name = match frame.vector {
        6 => "#UD",
        11 => "#NP",
        12 => "#SS",
        13 => "#GP",
        14 => "#PF",
        _ => "vector",
    };
    print!("{name}");
    match frame.vector {
        11..=14 => println!("({:#x}) in ring {}", frame.error, frame.cs & 3),
        6 => println!(" in ring {}", frame.cs & 3),
        vector => println!(" {vector} in ring {}", frame.cs & 3),
    }
    false
}

/// A line for code that leaves something in RAX.
fn show(what: &str, code: Code, argument: u64) {
    print!("{what}: ");
    let fault = run(code, argument);
    if finished(&fault) {
        println!("{:#x}", fault.frame.rax);
    }
}

/// SDM vol. 3A 7.14.2: the stack comes from the TSS, aligned to 16 bytes.
fn interrupt_to_ring0() {
    static mut FRAME_END: u64 = 0;
    fn note(frame: &mut TrapFrame) {
        // SAFETY: one CPU, read when this is over.
        unsafe {
            (&raw mut FRAME_END)
                .write_volatile(frame as *const TrapFrame as u64 + size_of::<TrapFrame>() as u64)
        }
        println!(
            "int 0x30 from ring 3: cs {:#x} ss {:#x} rsp {:#x} below the top",
            frame.cs,
            frame.ss,
            user_stack() - frame.rsp
        );
        // Let the runtime end the ring 3 code.
        interrupts::clear_handler(FINISHED);
        frame.rip -= 2;
    }
    interrupts::set_handler(FINISHED, note);
    for (what, below) in [("top", 0), ("top - 8", 8)] {
        interrupts::set_handler(FINISHED, note);
        interrupts::set_gate(
            FINISHED,
            KERNEL_CODE,
            interrupts::stub_address(FINISHED),
            0xEE,
            0,
        );
        segments::set_ring0_stack(kernel_stack() - below);
        run(user_code::nothing, 0);
        // SAFETY: as above.
        let end = unsafe { (&raw const FRAME_END).read_volatile() };
        println!(
            "rsp0 at the {what}: the frame begins {} below the top",
            kernel_stack() - end
        );
    }
    segments::set_ring0_stack(kernel_stack());
    interrupts::allow_from_ring3(FINISHED);
}

/// SDM vol. 2B SYSCALL, SYSRET.
fn system_calls() {
    const SCE: u64 = 1;
    let efer = cpu::read_msr(msr::EFER);
    cpu::write_msr(
        msr::STAR,
        u64::from(USER_CODE_32) << 48 | u64::from(KERNEL_CODE) << 32,
    );
    cpu::write_msr(msr::LSTAR, enter_by_syscall as *const () as u64);
    // Direction, carry and zero are cleared on the way in.
    cpu::write_msr(msr::FMASK, 0x441);

    print!("syscall while efer.sce is off: ");
    finished(&run(user_code::system_call, 0));
    cpu::write_msr(msr::EFER, efer | SCE);

    let fault = run_with(user_code::system_call, 0xCD5, 0);
    let entry = found();
    print_entry("syscall", &entry);
    println!(
        "syscall: r11 {:#x}, rcx behind it {}",
        entry.r11,
        u8::from(entry.rcx == fault.frame.rip - 2)
    );
    println!(
        "sysret: cs {:#x} ss {:#x} flags {:#x}",
        fault.frame.cs, fault.frame.ss, fault.frame.rflags
    );
    let fault = run(user_code::system_call, 0x25_7CD7);
    println!(
        "sysret with r11 0x257cd7, which has the resume flag: flags {:#x}",
        fault.frame.rflags
    );
    cpu::write_msr(
        msr::LSTAR,
        enter_by_syscall_leave_to_32_bit as *const () as u64,
    );
    let fault = run(user_code::system_call, 0);
    println!(
        "sysret to 32-bit code: cs {:#x} ss {:#x}",
        fault.frame.cs, fault.frame.ss
    );
    cpu::write_msr(
        msr::LSTAR,
        enter_by_syscall_leave_to_nowhere as *const () as u64,
    );
    print!("sysret to a non-canonical address: ");
    finished(&run(user_code::system_call, 0));
    print!("sysret in ring 3: ");
    finished(&run(user_code::sysret, 0));
    cpu::write_msr(msr::EFER, efer);
}

fn print_entry(what: &str, entry: &Entry) {
    println!(
        "{what}: cs {:#x} ss {:#x} flags {:#x}",
        entry.cs, entry.ss, entry.rflags
    );
}

/// SDM vol. 2B SYSENTER, SYSEXIT.
fn sysenter() {
    cpu::write_msr(msr::SYSENTER_CS, 0);
    cpu::write_msr(msr::SYSENTER_ESP, kernel_stack());
    cpu::write_msr(msr::SYSENTER_EIP, enter_by_sysenter as *const () as u64);
    print!("sysenter with a null selector: ");
    finished(&run(user_code::sysenter, 0));
    cpu::write_msr(msr::SYSENTER_CS, KERNEL_CODE.into());
    let fault = run_with(user_code::sysenter, 0x200, 0);
    let entry = found();
    print_entry("sysenter", &entry);
    println!(
        "sysenter: rsp from the msr {}",
        u8::from(entry.rsp == kernel_stack())
    );
    println!(
        "sysexit: cs {:#x} ss {:#x} flags {:#x}",
        fault.frame.cs, fault.frame.ss, fault.frame.rflags
    );
    cpu::write_msr(
        msr::SYSENTER_EIP,
        enter_by_sysenter_leave_to_32_bit as *const () as u64,
    );
    let fault = run(user_code::sysenter, 0);
    println!(
        "sysexit to 32-bit code: cs {:#x} ss {:#x}",
        fault.frame.cs, fault.frame.ss
    );
    print!("sysexit in ring 3: ");
    finished(&run(user_code::sysexit, 0));
}

/// The operand of a far call or jump.
#[repr(C, packed)]
struct FarPointer {
    offset: u32,
    selector: u16,
}

/// SDM vol. 3A 6.8.4.
fn call_gates() {
    let to = |selector: u16, offset: Code| FarPointer {
        offset: offset as *const () as u32,
        selector,
    };
    let call = |what: &str, code: Code, target: FarPointer| {
        print!("{what}: ");
        let fault = run(code, &raw const target as u64);
        finished(&fault).then_some(fault)
    };
    if let Some(fault) = call(
        "far call through a gate",
        user_code::far_call,
        to(GATE | 3, user_code::nothing),
    ) {
        let entry = found();
        let [rip, cs, rsp, ss] = entry.stack;
        println!(
            "cs {:#x} ss {:#x}, {} bytes on rsp0",
            entry.cs,
            entry.ss,
            kernel_stack() - entry.rsp
        );
        println!(
            "far call through a gate: saved cs {cs:#x} ss {ss:#x}, rip {}, rsp {}",
            u8::from(rip == fault.frame.rip - 2),
            u8::from(rsp == user_stack())
        );
        println!(
            "far return to ring 3: cs {:#x} ss {:#x}",
            fault.frame.cs, fault.frame.ss
        );
    }
    call(
        "far call through a gate of ring 0",
        user_code::far_call,
        to(GATE_OF_RING_0, user_code::nothing),
    );
    call(
        "far call through a gate that is not present",
        user_code::far_call,
        to(GATE_NOT_PRESENT, user_code::nothing),
    );
    call(
        "far call through a gate to null",
        user_code::far_call,
        to(GATE_TO_NULL, user_code::nothing),
    );
    call(
        "far jump through a gate to ring 0",
        user_code::far_jump,
        to(GATE, user_code::nothing),
    );
    call(
        "far call to ring 0 code",
        user_code::far_call,
        to(KERNEL_CODE, user_code::nothing),
    );
    call(
        "far call to data",
        user_code::far_call,
        to(USER_DATA, user_code::nothing),
    );
    call(
        "far call to null",
        user_code::far_call,
        to(0, user_code::nothing),
    );
    call(
        "far call to a tss",
        user_code::far_call,
        to(segments::TASK, user_code::nothing),
    );
    for (what, code) in [
        (
            "far jump to conforming code of ring 0",
            user_code::far_jump as Code,
        ),
        ("far call to conforming code of ring 0", user_code::far_call),
    ] {
        if let Some(fault) = call(what, code, to(CONFORMING, user_code::conforming_target)) {
            println!("cs {:#x}", fault.frame.rax);
        }
    }
    if let Some(fault) = call(
        "far call to ring 3 code",
        user_code::far_call,
        to(USER_CODE, user_code::conforming_target),
    ) {
        println!(
            "cs {:#x}, {} bytes pushed",
            fault.frame.rax,
            user_stack() - fault.frame.rsp
        );
    }
}

fn returns() {
    let show_cs = |what: &str, code: Code, selector: u16| {
        print!("{what}: ");
        let fault = run(code, selector.into());
        if finished(&fault) {
            println!("cs {:#x}", fault.frame.cs);
        }
    };
    show_cs("far return to ring 3", user_code::far_return, USER_CODE);
    show_cs("far return to ring 0", user_code::far_return, KERNEL_CODE);
    show_cs(
        "far return to conforming code with rpl 3",
        user_code::far_return,
        CONFORMING | 3,
    );
    show_cs(
        "far return to conforming code with rpl 0",
        user_code::far_return,
        CONFORMING,
    );
    show_cs("iret to ring 0", user_code::interrupt_return, KERNEL_CODE);
    show_cs("iret to ring 3", user_code::interrupt_return, USER_CODE);
}

/// SDM vol. 2A LAR and LSL, vol. 2C VERR and VERW. `-` where the zero flag says no.
fn what_selectors_tell() {
    let selectors = [
        ("null", 0),
        ("ring 0 code", KERNEL_CODE),
        ("ring 0 data", KERNEL_DATA),
        ("ring 3 code", USER_CODE),
        ("ring 3 32-bit code", USER_CODE_32),
        ("ring 3 data", USER_DATA),
        ("ring 3 data, rpl 0", USER_DATA & !3),
        ("ring 3 read-only", READ_ONLY | 3),
        ("ring 3 execute-only", EXECUTE_ONLY | 3),
        ("ring 3 data, not present", NOT_PRESENT | 3),
        ("conforming ring 0 code", CONFORMING | 3),
        ("tss", segments::TASK),
        ("call gate", GATE),
        ("beyond the gdt", 0x1000),
        ("in no ldt", 4),
    ];
    for (name, selector) in selectors {
        print!("{name}: ");
        for (instruction, code) in [("lar", user_code::lar as Code), (" lsl", user_code::lsl)] {
            for (ring, fault) in [
                (3, run(code, selector.into())),
                (0, run_in_ring0(code, selector.into())),
            ] {
                print!("{instruction}{ring} ");
                match fault.frame.rcx {
                    // Bits 16 to 19 of LAR's answer are undefined.
                    1 if instruction == "lar" => print!("{:#x} ", fault.frame.rax & !0xF_0000),
                    1 => print!("{:#x} ", fault.frame.rax),
                    _ => print!("- "),
                }
            }
        }
        for (instruction, code) in [("verr", user_code::verr as Code), ("verw", user_code::verw)] {
            let [ring3, ring0] = [
                run(code, selector.into()),
                run_in_ring0(code, selector.into()),
            ]
            .map(|fault| fault.frame.rcx);
            print!(" {instruction} {ring3}/{ring0}");
        }
        println!();
    }
}

/// Runs the same code in ring 0.
fn run_in_ring0(code: Code, argument: u64) -> Fault {
    match catch(code, argument) {
        Err(fault) => fault,
        Ok(_) => unreachable!("every piece ends with INT"),
    }
}

/// What Robin and Irvine's seventeen instructions show to ring 3 (USENIX Security 2000): none
/// traps, unless UMIP makes five of them do so.
fn sensitive_instructions() {
    let has_umip = cpu::cpuid(7, 0).ecx & 1 << 2 != 0;
    for umip in [false, true] {
        if umip && !has_umip {
            println!("note: no umip");
            break;
        }
        let old = cpu::read_cr4();
        cpu::write_cr4(if umip { old | cr4::UMIP } else { old });
        let prefix = if umip { "with umip, " } else { "" };
        for (name, code) in [
            ("sgdt limit", user_code::sgdt as Code),
            ("sidt limit", user_code::sidt),
            ("sldt", user_code::sldt),
            ("str", user_code::str_),
        ] {
            print!("{prefix}");
            show(name, code, 0);
        }
        print!("{prefix}smsw: ");
        let fault = run(user_code::smsw, 0);
        if finished(&fault) {
            println!(
                "all of cr0 {}",
                u8::from(fault.frame.rax == cpu::read_cr0())
            );
        }
        cpu::write_cr4(old);
    }
    const IF: u64 = 1 << 9;
    const IOPL_3: u64 = 3 << 12;
    let flags = |what: &str, code: Code, rflags: u64, argument: u64| {
        print!("{what}: ");
        let fault = run_with(code, rflags, argument);
        if finished(&fault) {
            println!("{:#x}", fault.frame.rax);
        }
    };
    flags("pushf, if 1, iopl 3", user_code::pushf, IF | IOPL_3, 0);
    flags(
        "popf of if 1 and iopl 3, iopl 0",
        user_code::popf,
        0,
        IF | IOPL_3 | 2,
    );
    flags(
        "popf of if 0 and iopl 0, if 1, iopl 0",
        user_code::popf,
        IF,
        2,
    );
    flags(
        "popf of if 1 and iopl 0, iopl 3",
        user_code::popf,
        IOPL_3,
        IF | 2,
    );
    show("mov from cs", user_code::mov_from_cs, 0);
    show("mov from ss", user_code::mov_from_ss, 0);
    show("push fs", user_code::push_fs, 0);
    show(
        "mov to ds of ring 3 data",
        user_code::mov_to_ds,
        USER_DATA.into(),
    );
    show(
        "mov to ds of ring 0 data",
        user_code::mov_to_ds,
        KERNEL_DATA.into(),
    );
    show("mov to ds of null with rpl 3", user_code::mov_to_ds, 3);
    show(
        "mov to ds of conforming code",
        user_code::mov_to_ds,
        u64::from(CONFORMING | 3),
    );
    show(
        "mov to ds of execute-only code",
        user_code::mov_to_ds,
        u64::from(EXECUTE_ONLY | 3),
    );
    show("mov to ss of null", user_code::mov_to_ss, 0);
    show(
        "mov to ss of ring 0 data",
        user_code::mov_to_ss,
        KERNEL_DATA.into(),
    );
    show(
        "mov to ss of ring 3 data with rpl 0",
        user_code::mov_to_ss,
        u64::from(USER_DATA & !3),
    );
    show("pop fs of ring 3 data", user_code::pop_fs, USER_DATA.into());
    // An IRET to the same ring leaves IF and IOPL alone as POPF does.
    let mut start = Start::new(
        user_code::interrupt_return as *const () as u64,
        user_stack(),
        USER_CODE.into(),
    );
    start.rflags = 2;
    let fault = ring3::run(&start);
    println!(
        "flags after iret in ring 3: {:#x}",
        fault.frame.rflags & (IF | IOPL_3)
    );
}

fn privileged_instructions() {
    for (name, code) in [
        ("sti", user_code::sti as Code),
        ("clts", user_code::clts),
        ("lgdt", user_code::lgdt),
        ("rdmsr", user_code::rdmsr),
        ("mov to cr8", user_code::mov_to_cr8),
        ("invlpg", user_code::invlpg),
        ("wbinvd", user_code::wbinvd),
        ("swapgs", user_code::swapgs),
        ("rdpmc", user_code::rdpmc),
    ] {
        show(name, code, 0);
    }
    let old = cpu::read_cr4();
    let ends = |what: &str, code: Code, argument: u64| {
        print!("{what}: ");
        if finished(&run(code, argument)) {
            println!("allowed");
        }
    };
    ends("rdtsc", user_code::rdtsc, 0);
    cpu::write_cr4(old | cr4::TSD);
    ends("rdtsc while cr4.tsd", user_code::rdtsc, 0);
    cpu::write_cr4(old & !cr4::FSGSBASE);
    ends("wrfsbase without cr4.fsgsbase", user_code::wrfsbase, 0);
    if cpu::cpuid(7, 0).ebx & 1 != 0 {
        cpu::write_cr4(old | cr4::FSGSBASE);
        show("wrfsbase", user_code::wrfsbase, 0x1234_5678_9ABC);
        show(
            "wrfsbase of a non-canonical address",
            user_code::wrfsbase,
            1 << 63,
        );
    } else {
        println!("note: no fsgsbase");
    }
    cpu::write_cr4(old);
}

/// SDM vol. 1 19.5.2.
fn ports() {
    let ends = |what: &str, code: Code, rflags: u64, port: u64| {
        print!("{what}: ");
        if finished(&run_with(code, rflags, port)) {
            println!("allowed");
        }
    };
    ends("port 0x80, iopl 0", user_code::out_port, 0, 0x80);
    ends("port 0x80, iopl 3", user_code::out_port, 3 << 12, 0x80);
    segments::permit_port(0x80, true);
    ends("port 0x80, permitted", user_code::out_port, 0, 0x80);
    ends(
        "ports 0x80 and 0x81, one permitted",
        user_code::out_port_word,
        0,
        0x80,
    );
    segments::permit_port(0x81, true);
    ends(
        "ports 0x80 and 0x81, both permitted",
        user_code::out_port_word,
        0,
        0x80,
    );
    ends(
        "port 0x1000, behind the map",
        user_code::out_port,
        0,
        0x1000,
    );
    segments::permit_port(0x80, false);
    segments::permit_port(0x81, false);
}
