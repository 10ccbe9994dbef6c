//! Code that lets a waiting interrupt in, in different ways. Each returns the address behind the
//! instruction that lets it in; single-byte NOPs follow, so that the saved RIP minus that address
//! is the number of instructions that ran before the interrupt.

use core::arch::naked_asm;

macro_rules! doors {
    ($($(#[$doc:meta])* $name:ident: $($line:literal),*;)*) => {
        $($(#[$doc])* #[unsafe(naked)]
        pub extern "C" fn $name() -> u64 {
            naked_asm!("lea rax, [rip + 98f]", $($line,)* "98: nop", "nop", "nop", "nop", "cli", "ret")
        })*
    };
}

doors! {
    sti: "sti";
    sti_cli: "sti", "cli";
    popf: "pushfq", "or qword ptr [rsp], 0x200", "popfq";
    iret:
        "mov rdx, rsp", "mov ecx, ss", "push rcx", "push rdx",
        "pushfq", "or qword ptr [rsp], 0x200", "mov ecx, cs", "push rcx", "push rax", "iretq";
    sti_hlt: "sti", "hlt";
    lower_cr8: "sti", "nop", "xor ecx, ecx", "mov cr8, rcx";
}

/// Lets interrupts in for a moment.
#[unsafe(naked)]
pub extern "C" fn breathe() {
    naked_asm!("sti", "nop", "nop", "cli", "ret")
}

/// REP MOVSB with interrupts on.
#[unsafe(naked)]
pub unsafe extern "C" fn copy(to: *mut u8, from: *const u8, count: usize) {
    naked_asm!("mov rcx, rdx", "sti", "nop", "rep movsb", "cli", "ret")
}
