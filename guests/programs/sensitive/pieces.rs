//! The instructions. Each piece ends with the same UD2, which the runtime catches with all registers.
//! (INT would do, but a paravirtual KVM does not emulate it in ring 0.)

use core::arch::naked_asm;

pub type Code = unsafe extern "C" fn(u64) -> u64;

/// Where every piece comes to its end.
#[unsafe(naked)]
pub unsafe extern "C" fn finished() {
    naked_asm!("ud2")
}

macro_rules! pieces {
    ($($(#[$doc:meta])* $name:ident: $($line:literal),*;)*) => {
        $($(#[$doc])* #[unsafe(naked)]
        pub unsafe extern "C" fn $name(argument: u64) -> u64 {
            naked_asm!($($line,)* "jmp {}", sym finished)
        })*
    };
}

pieces! {
    /// Limit in RAX, base in RDX, and in RCX what is behind them.
    sgdt:
        "mov rax, 0xEEEEEEEEEEEEEEEE", "mov [rsp - 32], rax", "mov [rsp - 24], rax",
        "sgdt [rsp - 32]", "movzx eax, word ptr [rsp - 32]", "mov rdx, [rsp - 30]",
        "mov rcx, [rsp - 22]";
    sidt:
        "mov rax, 0xEEEEEEEEEEEEEEEE", "mov [rsp - 32], rax", "mov [rsp - 24], rax",
        "sidt [rsp - 32]", "movzx eax, word ptr [rsp - 32]", "mov rdx, [rsp - 30]",
        "mov rcx, [rsp - 22]";
    smsw16: "mov rax, -1", "smsw ax";
    smsw32: "mov rax, -1", "smsw eax";
    smsw64: "mov rax, -1", "smsw rax";
    smsw_memory: "mov qword ptr [rsp - 16], -1", "smsw word ptr [rsp - 16]", "mov rax, [rsp - 16]";
    sldt16: "mov rax, -1", "sldt ax";
    sldt32: "mov rax, -1", "sldt eax";
    sldt64: "mov rax, -1", "sldt rax";
    sldt_memory: "mov qword ptr [rsp - 16], -1", "sldt word ptr [rsp - 16]", "mov rax, [rsp - 16]";
    str16: "mov rax, -1", "str ax";
    str32: "mov rax, -1", "str eax";
    str64: "mov rax, -1", "str rax";
    str_memory: "mov qword ptr [rsp - 16], -1", "str word ptr [rsp - 16]", "mov rax, [rsp - 16]";

    lar: "mov rax, -1", "lar eax, edi", "setz cl", "movzx ecx, cl";
    lar16: "mov rax, -1", "lar ax, di", "setz cl", "movzx ecx, cl";
    lsl: "mov rax, -1", "lsl eax, edi", "setz cl", "movzx ecx, cl";
    lsl16: "mov rax, -1", "lsl ax, di", "setz cl", "movzx ecx, cl";
    verr: "verr di", "setz cl", "movzx ecx, cl";
    verw: "verw di", "setz cl", "movzx ecx, cl";

    mov_cs16: "mov rax, -1", "mov ax, cs";
    mov_cs32: "mov rax, -1", "mov eax, cs";
    mov_cs64: "mov rax, -1", ".byte 0x48, 0x8C, 0xC8"; // mov rax, cs
    mov_cs_memory:
        "mov qword ptr [rsp - 16], -1", "mov word ptr [rsp - 16], cs", "mov rax, [rsp - 16]";
    mov_ss32: "mov eax, ss";
    mov_fs32: "mov fs, edi", "mov eax, fs";
    push_pop_fs: "push rdi", "pop fs", "push fs", "pop rax";
    /// Two bytes at a time; the stack must come out level.
    push_pop_fs16:
        "mov rdx, rsp", "push di", ".byte 0x66, 0x0F, 0xA1", ".byte 0x66, 0x0F, 0xA0", "pop ax",
        "movzx eax, ax", "sub rdx, rsp", "shl rdx, 16", "or rax, rdx";

    /// The arithmetic flags are clear, in ring 0 too.
    pushf: "xor eax, eax", "inc eax", "pushfq", "pop rax";
    /// The upper half of RAX: two bytes are on the stack.
    pushf16: "xor eax, eax", "inc eax", "mov rdx, rsp", "pushfw", "sub rdx, rsp", "pop ax", "movzx eax, ax", "shl rdx, 16", "or rax, rdx";
    /// What POPF makes of RDI, on top of the flags as they are.
    popf: "push rdi", "popfq", "pushfq", "pop rax", "push 2", "popfq";
    popf16: "push di", "popfw", "pushfq", "pop rax", "push 2", "popfq";
    iret:
        "mov rax, rsp", "mov ecx, ss", "push rcx", "push rax", "push rdi", "mov ecx, cs", "push rcx",
        "lea rcx, [rip + 2f]", "push rcx", "iretq", "2:", "pushfq", "pop rax", "push 2", "popfq";

    /// RDI: a selector and an offset in memory. In RAX what CS is there, in RDX what was pushed.
    far_call: "mov rdx, rsp", "call fword ptr [rdi]";
    far_jump: "mov rdx, rsp", "jmp fword ptr [rdi]";
    far_target: "mov eax, cs", "sub rdx, rsp";
    far_return: "mov rdx, rsp", "push rdi", "lea rax, [rip + 2f]", "push rax", "retfq", "2:", "mov eax, cs", "sub rdx, rsp";
    int_0x31: "int 0x31", "mov eax, 0x5EED";
    int3: "int3", "mov eax, 0x5EED";
    int_last: "int 0xF9";
    int_half: "int 0xFA";
    int_beyond: "int 0xFB";
}
