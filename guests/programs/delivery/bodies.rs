//! The code in question.

use runtime::bodies;

bodies! {
    divide: ["xor ecx, ecx"] "div ecx";
    undefined: [] "ud2";
    general_protection: ["mov rax, 0x800000000000"] "mov al, [rax]";
    stack_fault: ["mov rbp, 0x800000000000"] "mov al, [rbp]";
    not_present: ["mov eax, 0x58"] "mov ds, eax"; // FIRST_FREE
    page_fault: ["mov rax, 0x140000000"] "mov al, [rax]";
    breakpoint: [] "int3";
    debug: [] ".byte 0xF1";
    int_0x81: [] "int 0x81";
    misaligned: ["pushfq", "or qword ptr [rsp], 0x40000", "popfq", "lea rax, [rsp - 15]"] "mov ax, [rax]";

    // IRET from a frame that the argument points to.
    iret: ["mov rsp, rdi"] "iretq";
    iret_32: ["mov rsp, rdi"] "iretd";
    arrived: [] "ud2";

    // For interrupts and halts.
    halt: ["sti"] "hlt; nop; cli";
    halt_off: [] "hlt; nop";
    nmi_then_sti: [] "nop; sti; nop; nop; cli";
}
