//! Ring 3 code. Each piece ends with INT 0x30, which the runtime catches with all registers.

use core::arch::naked_asm;

macro_rules! pieces {
    ($($(#[$doc:meta])* $name:ident: $($line:literal),*;)*) => {
        $($(#[$doc])* #[unsafe(naked)]
        pub unsafe extern "C" fn $name(argument: u64) -> u64 {
            naked_asm!($($line,)* "int 0x30", "ud2")
        })*
    };
}

pieces! {
    nothing: "nop";
    /// R15 is passed on to the system call, see `kernel_entries`.
    system_call: "mov r15, rdi", "syscall";
    sysret: "xor ecx, ecx", "sysretq";
    sysenter: "lea rdx, [rip + 2f]", "mov rcx, rsp", "sysenter", "2:";
    sysexit: "sysexit";
    far_call: "call fword ptr [rdi]"; // a 16-bit selector behind a 32-bit offset
    far_jump: "jmp fword ptr [rdi]";
    /// CS in RAX.
    conforming_target: "mov eax, cs";
    far_return: "push rdi", "lea rax, [rip + 2f]", "push rax", "retfq", "2:", "nop";
    /// With flags of IF 1 and IOPL 3, which ring 3 cannot have.
    interrupt_return:
        "mov rax, rsp", "mov ecx, ss", "push rcx", "push rax", "push 0x3202", "push rdi",
        "lea rax, [rip + 2f]", "push rax", "iretq", "2:", "nop";

    sgdt: "xor eax, eax", "sgdt [rsp - 16]", "movzx eax, word ptr [rsp - 16]";
    sidt: "xor eax, eax", "sidt [rsp - 16]", "movzx eax, word ptr [rsp - 16]";
    sldt: "mov eax, -1", "sldt eax";
    str_: "mov eax, -1", "str eax";
    smsw: "mov rax, -1", "smsw rax";
    pushf: "pushfq", "pop rax";
    popf: "push rdi", "popfq", "pushfq", "pop rax";
    lar: "mov eax, 0x55", "lar eax, edi", "setz cl", "movzx ecx, cl";
    lsl: "mov eax, 0x55", "lsl eax, edi", "setz cl", "movzx ecx, cl";
    verr: "verr di", "setz cl", "movzx ecx, cl";
    verw: "verw di", "setz cl", "movzx ecx, cl";
    mov_from_cs: "mov eax, cs";
    mov_from_ss: "mov eax, ss";
    push_fs: "push fs", "pop rax";
    mov_to_ds: "mov ds, edi", "mov eax, ds";
    mov_to_ss: "mov ss, edi";
    pop_fs: "push rdi", "pop fs", "mov eax, fs";

    out_port: "mov edx, edi", "out dx, al";
    out_port_word: "mov edx, edi", "out dx, ax";
    rdtsc: "rdtsc";
    rdpmc: "xor ecx, ecx", "rdpmc";
    swapgs: "swapgs";
    wrfsbase: "wrfsbase rdi", "rdfsbase rax";
    wbinvd: "wbinvd";
    invlpg: "invlpg [rdi]";
    clts: "clts";
    lgdt: "lgdt [rdi]";
    rdmsr: "mov ecx, 0x1B", "rdmsr";
    mov_to_cr8: "mov cr8, rdi";
    sti: "sti";
}
