//! Where SYSCALL, SYSENTER and call gates enter ring 0, and how they leave it. Each entry notes
//! what it finds: vol. 2B of the SDM, SYSCALL, SYSRET, SYSENTER, SYSEXIT, and vol. 3A 6.8.3 to 6.8.8; a call gate's stack: 6.8.5.

use core::arch::global_asm;

/// What an entry found.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    pub rcx: u64,
    pub r11: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub cs: u64,
    pub ss: u64,
    /// The four words on the stack of a call gate.
    pub stack: [u64; 4],
}

#[unsafe(no_mangle)]
static mut ENTRY_FOUND: Entry = Entry {
    rcx: 0,
    r11: 0,
    rsp: 0,
    rflags: 0,
    cs: 0,
    ss: 0,
    stack: [0; 4],
};

#[unsafe(no_mangle)]
static mut ENTRY_STACK: [u64; 64] = [0; 64];

/// What the last entry found.
pub fn found() -> Entry {
    // SAFETY: one CPU, and no entry is running.
    unsafe { (&raw const ENTRY_FOUND).read_volatile() }
}

global_asm!(
    r#"
    .macro note_entry
    mov [ENTRY_FOUND + 0], rcx
    mov [ENTRY_FOUND + 8], r11
    mov [ENTRY_FOUND + 16], rsp
    lea rsp, [ENTRY_STACK + 512]
    pushfq
    pop rax
    mov [ENTRY_FOUND + 24], rax
    mov eax, cs
    mov [ENTRY_FOUND + 32], rax
    mov eax, ss
    mov [ENTRY_FOUND + 40], rax
    mov rsp, [ENTRY_FOUND + 16]
    .endm

    // R15: flags to return with, unless zero.
    .global enter_by_syscall
enter_by_syscall:
    note_entry
    test r15, r15
    cmovnz r11, r15
    sysretq

    .global enter_by_syscall_leave_to_32_bit
enter_by_syscall_leave_to_32_bit:
    note_entry
    sysret

    .global enter_by_syscall_leave_to_nowhere
enter_by_syscall_leave_to_nowhere:
    note_entry
    lea rsp, [ENTRY_STACK + 512]
    mov rcx, 0x800000000000
    sysretq

    .global enter_by_sysenter
enter_by_sysenter:
    note_entry
    sysexitq

    .global enter_by_sysenter_leave_to_32_bit
enter_by_sysenter_leave_to_32_bit:
    note_entry
    sysexit

    .global enter_by_gate
enter_by_gate:
    note_entry
    mov rax, [rsp]
    mov [ENTRY_FOUND + 48], rax
    mov rax, [rsp + 8]
    mov [ENTRY_FOUND + 56], rax
    mov rax, [rsp + 16]
    mov [ENTRY_FOUND + 64], rax
    mov rax, [rsp + 24]
    mov [ENTRY_FOUND + 72], rax
    retfq
    "#
);

unsafe extern "C" {
    pub fn enter_by_syscall();
    pub fn enter_by_syscall_leave_to_32_bit();
    pub fn enter_by_syscall_leave_to_nowhere();
    pub fn enter_by_sysenter();
    pub fn enter_by_sysenter_leave_to_32_bit();
    pub fn enter_by_gate();
}
