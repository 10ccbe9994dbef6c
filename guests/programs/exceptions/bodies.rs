//! The code that raises the exceptions.

use core::arch::global_asm;

use runtime::bodies;
pub use runtime::report::{Body, at};

bodies! {
    divide_by_zero: ["mov eax, 1", "xor edx, edx", "xor ecx, ecx"] "div ecx";
    divide_overflow: ["xor eax, eax", "mov edx, 1", "mov ecx, 1"] "div ecx";
    idiv_overflow: ["mov eax, 0x80000000", "cdq", "mov ecx, -1"] "idiv ecx";

    // The trap follows the instruction after the POPF that sets TF.
    single_step: ["pushfq", "or qword ptr [rsp], 0x100", "popfq"] "nop";
    // The trap after MOV SS is held back until the instruction after it is done.
    single_step_mov_ss: ["mov ecx, ss", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "mov ss, ecx"] "nop";
    int1: [] ".byte 0xF1";
    breakpoint_target: ["nop"] "inc eax";
    out_0x80: [] "out 0x80, al";
    mov_from_dr7: [] "mov rax, dr7";
    mov_from_dr4: [] ".byte 0x0F, 0x21, 0xE0"; // mov rax, dr4

    int3: [] "int3";
    int_3: [] ".byte 0xCD, 3";
    int_4: [] "int 4";
    int_0x80: [] "int 0x80";
    int_0x81: [] "int 0x81";

    ud2: [] "ud2";
    ud1: [] ".byte 0x0F, 0xB9, 0xC0";
    ud0: [] ".byte 0x0F, 0xFF, 0xC0";
    lock_register: [] ".byte 0xF0, 0x01, 0xC0"; // lock add eax, eax
    lock_load: [] ".byte 0xF0, 0x8B, 0x07"; // lock mov eax, [rdi]
    mov_to_cs: [] ".byte 0x8E, 0xC8"; // mov cs, eax
    push_es: [] ".byte 0x06";
    into: [] ".byte 0xCE";
    aam: [] ".byte 0xD4, 0x0A";
    pusha: [] ".byte 0x60";
    far_call_immediate: [] ".byte 0x9A, 0, 0, 0, 0, 8, 0";
    lea_register: [] ".byte 0x8D, 0xC0"; // lea eax, eax
    mov_from_cr1: [] ".byte 0x0F, 0x20, 0xC8"; // mov rax, cr1
    sixteen_bytes: [] ".byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90";
    fifteen_bytes: [] ".byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90";


    mov_ds: [] "mov ds, edi";
    mov_ss: [] "mov ss, edi";
    ltr: [] "ltr di";
    lldt: [] "lldt di";
    far_return: ["push rdi", "lea rax, [rip + 99f]", "push rax"] "retfq";

    read_byte: [] "mov al, [rdi]";
    write_byte: [] "mov [rdi], al";
    write_8: [] "mov [rdi], rax";
    increment: [] "inc byte ptr [rdi]";
    read_rbp: ["mov rbp, rdi"] "mov al, [rbp]";
    push_on: ["mov rsp, rdi"] "push rax";
    jump: [] "jmp rdi";
    read_with_ac: [".byte 0x0F, 0x01, 0xCB"] "mov al, [rdi]"; // stac

    read_msr: ["mov ecx, edi"] "rdmsr";
    // Nor canonical with 57 bits: the check is made for what the processor has.
    write_lstar_non_canonical: ["mov ecx, 0xC0000082", "mov edx, 0x80000000", "xor eax, eax"] "wrmsr";
    write_efer: ["mov ecx, 0xC0000080", "xor edx, edx", "mov eax, edi"] "wrmsr";
    write_cr0: [] "mov cr0, rdi";
    write_cr4: [] "mov cr4, rdi";
    write_cr8: [] "mov cr8, rdi";
    write_dr7: [] "mov dr7, rdi";
    iret_nested: [
        "mov rax, rsp", "mov ecx, ss", "push rcx", "push rax", "push 2", "mov ecx, cs", "push rcx",
        "lea rcx, [rip + 99f]", "push rcx", "pushfq", "or qword ptr [rsp], 0x4000", "popfq"
    ] "iretq";
}

// Ring 3 code, alone in its page: each piece is 16 bytes from the next.
global_asm!(
    r#"
    .balign 4096
exceptions_user_page:
    mov al, [rdi]
    .balign 16
    mov [rdi], al
    .balign 16
    jmp rdi
    .balign 16
    int 0x80
    .balign 16
    int3
    .balign 16
    .byte 0xF1
    .balign 16
    hlt
    .balign 16
    cli
    int 0x80
    .balign 16
    out 0x80, al
    .balign 16
    mov rax, cr0
    .balign 16
    mov rax, [rdi]
    int 0x80
    .balign 16
    ret
    .balign 4096
    "#
);

pub const USER_READ: u64 = 0x00;
pub const USER_WRITE: u64 = 0x10;
pub const USER_JUMP: u64 = 0x20;
pub const USER_INT_0X80: u64 = 0x30;
pub const USER_INT3: u64 = 0x40;
pub const USER_INT1: u64 = 0x50;
pub const USER_HLT: u64 = 0x60;
pub const USER_CLI: u64 = 0x70;
pub const USER_OUT: u64 = 0x80;
pub const USER_CR0: u64 = 0x90;
pub const USER_READ_8: u64 = 0xA0;
pub const USER_RETURN: u64 = 0xB0;

pub fn user_page() -> *const u8 {
    unsafe extern "C" {
        static exceptions_user_page: u8;
    }
    &raw const exceptions_user_page
}
