//! Compatibility mode: 32-bit code of ring 3 under a 64-bit kernel.

use core::arch::{global_asm, naked_asm};

use runtime::cpu::{self, msr};
use runtime::interrupts::{self, Fault};
use runtime::ring3::{self, Start};
use runtime::segments::{KERNEL_CODE, USER_CODE, USER_CODE_32, USER_DATA};
use runtime::{print, println, report};

use crate::{restore, user_top};

unsafe extern "C" {
    fn compatibility_syscall();
    fn compatibility_sysenter();
    fn compatibility_int();
    fn compatibility_bound();
    fn compatibility_into();
    fn compatibility_inc();
    fn compatibility_stack();
    fn compatibility_to_64();
    fn compatibility_retf();
    fn compatibility_limit();
    fn compatibility_end();
}

global_asm!(
    r#"
    .code32
    .global compatibility_syscall, compatibility_sysenter, compatibility_int, compatibility_bound, compatibility_into
    .global compatibility_inc, compatibility_stack, compatibility_to_64, compatibility_retf, compatibility_limit
    .global compatibility_end
compatibility_syscall:
    syscall
    ud2
compatibility_sysenter:
    mov ecx, esp
    sysenter
    ud2
compatibility_int:
    int 0x30
    ud2
compatibility_bound:
    push 5
    push 1
    mov eax, 9
    bound eax, [esp]
    ud2
compatibility_into:
    mov eax, 0x7FFFFFFF
    add eax, 1
    into
    ud2
compatibility_inc:
    mov eax, 5
    .byte 0x48, 0x40, 0x40       // dec, inc, inc; in 64-bit mode prefixes
    jmp compatibility_end
compatibility_stack:
    mov eax, esp
    push eax
    pushfd
    sub eax, esp
    jmp compatibility_end
compatibility_to_64:
    .byte 0xEA
    .long compatibility_64
    .word 0x2B
compatibility_retf:
    push 0x2B
    mov eax, offset compatibility_64
    push eax
    retf
compatibility_limit:
    mov ebx, 0x23                // IRET to ring 3 made it null
    mov ds, ebx
    mov ebx, 0xFFFFFFFF
    mov eax, [ebx + 5 + 0x60000000] // wraps around at 4 GiB
    ud2
compatibility_end:
    ud2
    .code64
compatibility_64:
    mov rax, -1
    shr rax, 32
    ud2
    "#
);

/// 32-bit code in ring 3, until its first event.
fn run(code: unsafe extern "C" fn()) -> Fault {
    let mut start = Start::new(code as *const () as u64, user_top(), 0);
    start.cs = USER_CODE_32.into();
    ring3::run(&start)
}

pub fn show() {
    interrupts::allow_from_ring3(0x30);
    interrupts::allow_from_ring3(4);
    for (what, code) in [
        ("syscall", compatibility_syscall as unsafe extern "C" fn()),
        ("int 0x30", compatibility_int),
        ("bound", compatibility_bound),
        ("into", compatibility_into),
        (
            "an address behind 4 GiB, which wraps around to one without a page",
            compatibility_limit,
        ),
    ] {
        let fault = run(code);
        print!("compatibility mode, {what}: ");
        report::print_name(&fault);
        println!(
            " cs {:#x} ss {:#x}, rsp below 4 GiB {}{}",
            fault.frame.cs,
            fault.frame.ss,
            u8::from(fault.frame.rsp >> 32 == 0),
            if fault.frame.vector == 14 {
                ", and a cr2"
            } else {
                ""
            }
        );
    }
    for (what, code) in [
        (
            "0x48 and 0x40 are dec and inc",
            compatibility_inc as unsafe extern "C" fn(),
        ),
        ("bytes of two pushes", compatibility_stack),
        ("far jump to 64-bit code", compatibility_to_64),
        ("far return to 64-bit code", compatibility_retf),
    ] {
        let fault = run(code);
        println!(
            "compatibility mode, {what}: {:#x}, cs {:#x}, at its end {}",
            fault.frame.rax,
            fault.frame.cs,
            u8::from(fault.frame.vector == 6)
        );
    }
    let _ = compatibility_end as unsafe extern "C" fn();
    sysenter();
    restore();
}

static mut ENTERED: [u64; 4] = [0; 4];

/// SYSENTER from compatibility mode enters 64-bit code (vol. 2B SYSENTER), SYSEXIT goes back to either.
fn sysenter() {
    cpu::write_msr(msr::SYSENTER_CS, KERNEL_CODE.into());
    cpu::write_msr(msr::SYSENTER_ESP, 0x1234_5678_9ABC);
    cpu::write_msr(msr::SYSENTER_EIP, entry as *const () as u64);
    let fault = run(compatibility_sysenter);
    // SAFETY: one CPU, it is over.
    let [cs, ss, rsp, _] = unsafe { (&raw const ENTERED).read_volatile() };
    print!(
        "compatibility mode, sysenter: cs {cs:#x} ss {ss:#x} rsp {rsp:#x}, sysexit to 32-bit code: "
    );
    report::print_name(&fault);
    println!(" cs {:#x} ss {:#x}", fault.frame.cs, fault.frame.ss);
    cpu::write_msr(msr::SYSENTER_CS, 0);
    let _ = (USER_CODE, USER_DATA);
}

#[unsafe(naked)]
unsafe extern "C" fn entry() {
    naked_asm!(
        "mov eax, cs",
        "mov [{entered}], rax",
        "mov eax, ss",
        "mov [{entered} + 8], rax",
        "mov [{entered} + 16], rsp",
        // ECX is its stack pointer.
        "lea rdx, [rip + compatibility_end]",
        "sysexit",
        entered = sym ENTERED,
    )
}
