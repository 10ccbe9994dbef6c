//! The code in question.

use runtime::bodies;

bodies! {
    // TF is set by POPF: the first trap is after the instruction behind it. The last POPF clears it, and has a trap
    // of its own.
    steps: ["pushfq", "or qword ptr [rsp], 0x100", "popfq"] "nop; nop; pushfq; and qword ptr [rsp], -257; popfq; nop";
    steps_branches: ["xor eax, eax", "pushfq", "or qword ptr [rsp], 0x100", "popfq"] "test eax, eax; jnz 3f; jz 2f; ud2; 2: nop; 3: pushfq; and qword ptr [rsp], -257; popfq; nop";
    steps_stack_segment: ["mov ecx, ss", "sub rsp, 16", "lea rdx, [rsp + 16]", "mov [rsp], rdx", "mov [rsp + 8], rcx", "pushfq", "or qword ptr [rsp], 0x100", "popfq"] "mov ss, ecx; nop; nop; .byte 0x48, 0x0F, 0xB2, 0x24, 0x24; nop; pushfq; and qword ptr [rsp], -257; popfq; nop"; // lss rsp, [rsp]
    steps_flags: ["pushfq", "or qword ptr [rsp], 0x100", "popfq"] "sti; cli; nop; pushfq; and qword ptr [rsp], -257; popfq; nop";
    steps_iret: ["mov rdx, rsp", "mov ecx, ss", "push rcx", "push rdx", "push 2", "mov ecx, cs", "push rcx", "lea rax, [rip + 3f]", "push rax", "pushfq", "or qword ptr [rsp], 0x100", "popfq"] "nop; iretq; 3: nop; nop";
    steps_fault: ["pushfq", "or qword ptr [rsp], 0x100", "popfq"] "nop; ud2";
    steps_string: ["mov ecx, 3", "pushfq", "or qword ptr [rsp], 0x100", "popfq"] "rep stosb; pushfq; and qword ptr [rsp], -257; popfq; nop";
    steps_int: ["pushfq", "or qword ptr [rsp], 0x100", "popfq"] "nop; int 0x80; nop; nop; pushfq; and qword ptr [rsp], -257; popfq; nop";
    pushed_flags: [] "pushfq; pop rax";

    // IRET with the flags of the argument to the instruction in question.
    resumed: ["mov rdx, rsp", "mov ecx, ss", "push rcx", "push rdx", "or rdi, 2", "push rdi", "mov ecx, cs", "push rcx", "lea rax, [rip + 98f]", "push rax", "iretq"] "nop; nop";
    popped: ["or rdi, 2", "push rdi", "popfq"] "nop";

    two_nops: [] "nop; nop";
    undefined: [] "ud2";
    privileged_undefined: [] ".byte 0xF0, 0x0F, 0x20, 0xD8"; // lock mov rax, cr3
    divide: ["xor ecx, ecx"] "div ecx";
    nop_after_mov_ss: ["mov ecx, ss", "mov ss, ecx"] "nop; nop";

    write_1: [] "mov [rdi], al";
    write_2: [] "mov [rdi], ax";
    write_4: [] "mov [rdi], eax";
    write_8: [] "mov [rdi], rax";
    read_4: [] "mov eax, [rdi]";
    modify: [] "inc dword ptr [rdi]";
    locked: [] "lock inc dword ptr [rdi]";
    push: ["mov rdx, rsp", "mov rsp, rdi", "add rsp, 8"] "push rax; mov rsp, rdx";
    call: ["mov rdx, rsp", "mov rsp, rdi", "add rsp, 8"] "call 2f; 2: mov rsp, rdx; nop";
    compare: [] "cmp dword ptr [rdi], 0";
    address: [] "lea rax, [rdi]";
    store_string: ["mov ecx, 5", "sub rdi, 2"] "rep stosb";
    copy_string: ["mov ecx, 5", "mov rsi, rdi", "sub rsi, 2"] "rep lodsb";
    write_then_step: ["pushfq", "or qword ptr [rsp], 0x100", "popfq"] "mov [rdi], al; pushfq; and qword ptr [rsp], -257; popfq; nop";
    write_faulting: ["xor ecx, ecx"] "mov [rdi], al; div ecx";
    // One access hits, the other faults: the instruction has not happened.
    move_to_nowhere: ["mov rsi, rdi", "mov rdi, 0x140000000"] "movsb";
    load_ss: [] "mov ss, [rdi]; nop; nop";
    load_ss_int3: [] "mov ss, [rdi]; int3; nop";
    far_return: ["mov rdx, rsp", "lea rsp, [rdi - 8]", "mov ecx, cs", "mov [rsp + 8], rcx", "lea rax, [rip + 3f]", "mov [rsp], rax", "mov rcx, [rsp]"] "retfq; 3: mov rsp, rdx; nop";
    interrupt_return: ["mov rdx, rsp", "lea rsp, [rdi - 16]", "mov [rsp + 24], rdx", "mov ecx, ss", "mov [rsp + 32], rcx", "mov qword ptr [rsp + 16], 2", "mov ecx, cs", "mov [rsp + 8], rcx", "lea rax, [rip + 3f]", "mov [rsp], rax"] "iretq; 3: nop";

    out_1: [] "out 0x80, al";
    out_2: ["mov edx, 0x80"] "out dx, ax";
    in_4: ["mov edx, 0x7E"] "in eax, dx";
    out_above: [] "out 0x84, al";
    outs: ["mov edx, 0x80", "mov rsi, rdi"] "outsb";
    mov_to_dr0: [] "mov dr0, rdi";
    mov_from_dr6: [] "mov rax, dr6";
    mov_to_dr7: [] "mov dr7, rdi";

    // For the order of events: interrupts are let in by the STI; NOPs follow.
    let_in: [] "sti; nop; nop; nop; cli";
    let_in_stepping: ["pushfq", "or qword ptr [rsp], 0x100", "popfq"] "sti; nop; nop; pushfq; and qword ptr [rsp], -257; popfq; cli";
}
