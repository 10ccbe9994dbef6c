//! The program that runs cases, natively and in the guest alike: takes a record, loads all registers from it, jumps,
//! gets back, and writes all registers to another record.
//!
//! It is copied to where the arena has it, and finds its data relative to its own address. Natively a signal handler
//! brings it back from a fault ([`crate::native`]), in the guest the handlers of exceptions at its end.
#![allow(unsafe_code)]

use std::arch::global_asm;

use crate::layout::{CONTROL_AT, MONITOR_BYTES};

/// Offsets of the monitor's own data in the control pages.
pub(crate) mod control {
    /// What a record that comes out starts with is gathered here.
    pub(crate) const SAVED: usize = 0;
    /// Address of the current record that goes in.
    pub(crate) const CURRENT_IN: usize = 0x200;
    /// Address of the current record that comes out.
    pub(crate) const CURRENT_OUT: usize = 0x208;
    /// Cases to go.
    pub(crate) const COUNT: usize = 0x210;
    /// Where to go when none is left.
    pub(crate) const DONE: usize = 0x228;
    /// Above the monitor's stack.
    pub(crate) const STACK_TOP: usize = 0x2000;
}

/// Takes flags and registers from the record at RBX, that last.
macro_rules! take_registers {
    () => {
        concat!(
            "    lea rsp, [rbx + 0x80]\n",
            "    popfq\n",
            "    mov rax, [rbx]\n",
            "    mov rcx, [rbx + 8]\n",
            "    mov rdx, [rbx + 16]\n",
            "    mov rsp, [rbx + 32]\n",
            "    mov rbp, [rbx + 40]\n",
            "    mov rsi, [rbx + 48]\n",
            "    mov rdi, [rbx + 56]\n",
            "    mov r8, [rbx + 64]\n",
            "    mov r9, [rbx + 72]\n",
            "    mov r10, [rbx + 80]\n",
            "    mov r11, [rbx + 88]\n",
            "    mov r12, [rbx + 96]\n",
            "    mov r13, [rbx + 104]\n",
            "    mov r14, [rbx + 112]\n",
            "    mov r15, [rbx + 120]\n",
            "    mov rbx, [rbx + 24]\n",
        )
    };
}

global_asm!(
    ".pushsection .text.trapgate_oracle_monitor, \"ax\", @progbits",
    ".balign 4096",
    ".global trapgate_oracle_monitor",
    ".global trapgate_oracle_exit",
    ".global trapgate_oracle_resume",
    ".global trapgate_oracle_done_guest",
    ".global trapgate_oracle_vectors",
    ".global trapgate_oracle_finished",
    ".global trapgate_oracle_monitor_end",
    ".set SAVED, trapgate_oracle_monitor + {control}",
    ".set CURRENT_IN, SAVED + 0x200",
    ".set CURRENT_OUT, SAVED + 0x208",
    ".set COUNT, SAVED + 0x210",
    ".set TARGET, SAVED + 0x218",
    ".set OUTER_RSP, SAVED + 0x220",
    ".set DONE, SAVED + 0x228",
    ".set FAR, SAVED + 0x230",
    ".set STACK_TOP, SAVED + 0x2000",
    "trapgate_oracle_monitor:",
    "    mov [rip + OUTER_RSP], rsp",
    "2:  mov rbx, [rip + CURRENT_IN]",
    // Windows of memory.
    "    lea rsi, [rbx + 0x440]",
    "    mov rdi, [rbx + 0xa0]",
    "    mov rcx, [rbx + 0xa8]",
    "    rep movsq",
    "    mov rdi, [rbx + 0xb0]",
    "    mov rcx, [rbx + 0xb8]",
    "    rep movsq",
    "    mov rax, [rbx + 0x88]",
    "    mov [rip + TARGET], rax",
    "    mov [rip + FAR], eax",
    "    mov dword ptr [rip + FAR + 4], 0x23",
    "    mov rax, [rbx + 0x90]",
    "    wrfsbase rax",
    "    mov rax, [rbx + 0x98]",
    "    wrgsbase rax",
    "    mov eax, 7",
    "    xor edx, edx",
    "    xrstor64 [rbx + 0x100]",
    "    cmp byte ptr [rbx + 0xc0], 0",
    "    jne 3f",
    take_registers!(),
    "    jmp qword ptr [rip + TARGET]",
    // 32-bit code: flat data segments, and a far jump.
    "3:  mov eax, 0x2b",
    "    mov ds, eax",
    "    mov es, eax",
    "    mov fs, eax",
    "    mov gs, eax",
    "    mov rax, [rbx + 0x90]",
    "    wrfsbase rax",
    "    mov rax, [rbx + 0x98]",
    "    wrgsbase rax",
    take_registers!(),
    "    jmp fword ptr [rip + FAR]",
    // A case that came to its end jumps here.
    "trapgate_oracle_exit:",
    "    mov [rip + SAVED + 32], rsp",
    "    mov [rip + SAVED], rax",
    "    mov [rip + SAVED + 8], rcx",
    "    mov [rip + SAVED + 16], rdx",
    "    mov [rip + SAVED + 24], rbx",
    "    mov [rip + SAVED + 40], rbp",
    "    mov [rip + SAVED + 48], rsi",
    "    mov [rip + SAVED + 56], rdi",
    "    mov [rip + SAVED + 64], r8",
    "    mov [rip + SAVED + 72], r9",
    "    mov [rip + SAVED + 80], r10",
    "    mov [rip + SAVED + 88], r11",
    "    mov [rip + SAVED + 96], r12",
    "    mov [rip + SAVED + 104], r13",
    "    mov [rip + SAVED + 112], r14",
    "    mov [rip + SAVED + 120], r15",
    "    mov [rip + SAVED + 0xc8], ss",
    "    lea rsp, [rip + STACK_TOP]",
    "    pushfq",
    "    pop rax",
    "    mov [rip + SAVED + 0x80], rax",
    // Flags that must not hold here: DF, NT, AC.
    "    push 0x202",
    "    popfq",
    "    xor eax, eax",
    "    mov [rip + SAVED + 0x88], rax",
    "    mov dword ptr [rip + SAVED + 0x90], 0x100",
    "    mov [rip + SAVED + 0x94], eax",
    "    mov [rip + SAVED + 0x98], rax",
    "    mov [rip + SAVED + 0xa0], rax",
    "    mov [rip + SAVED + 0xc0], rax",
    // A fault comes back here, with SAVED filled, flags in order, and the stack empty.
    "trapgate_oracle_resume:",
    "    mov rbx, [rip + CURRENT_IN]",
    "    mov r8, [rip + CURRENT_OUT]",
    "    rdfsbase rax",
    "    mov [rip + SAVED + 0xa8], rax",
    "    rdgsbase rax",
    "    mov [rip + SAVED + 0xb0], rax",
    "    mov [rip + SAVED + 0xb8], ds",
    "    mov [rip + SAVED + 0xba], es",
    "    mov [rip + SAVED + 0xbc], fs",
    "    mov [rip + SAVED + 0xbe], gs",
    "    mov eax, 7",
    "    xor edx, edx",
    "    xsave64 [r8 + 0x100]",
    "    xor eax, eax",
    "    cmp [rip + SAVED + 0xb8], rax",
    "    je 4f",
    "    mov ds, eax",
    "    mov es, eax",
    "    mov fs, eax",
    "    mov gs, eax",
    "4:  lea rsi, [rip + SAVED]",
    "    mov rdi, r8",
    "    mov ecx, 26",
    "    rep movsq",
    "    lea rdi, [r8 + 0x440]",
    "    mov rsi, [rbx + 0xa0]",
    "    mov rcx, [rbx + 0xa8]",
    "    rep movsq",
    "    mov rsi, [rbx + 0xb0]",
    "    mov rcx, [rbx + 0xb8]",
    "    rep movsq",
    "    mov rdi, [rbx + 0xa0]",
    "    mov rcx, [rbx + 0xa8]",
    "    rep stosq",
    "    mov rdi, [rbx + 0xb0]",
    "    mov rcx, [rbx + 0xb8]",
    "    rep stosq",
    "    add qword ptr [rip + CURRENT_IN], {record}",
    "    add qword ptr [rip + CURRENT_OUT], {record}",
    "    dec qword ptr [rip + COUNT]",
    "    jnz 2b",
    "    mov rsp, [rip + OUTER_RSP]",
    "    jmp qword ptr [rip + DONE]",
    "trapgate_oracle_done_guest:",
    "    int 0x80",
    // The guest's kernel. Its stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
    "5:  push rax",
    "    mov rax, [rsp + 24]",
    "    shr rax, 32",
    "    cmp eax, [rip + SAVED + 0x244]",
    // The monitor itself has faulted.
    "    je trapgate_oracle_finished",
    "    pop rax",
    "    mov [rip + SAVED], rax",
    "    mov [rip + SAVED + 8], rcx",
    "    mov [rip + SAVED + 16], rdx",
    "    mov [rip + SAVED + 24], rbx",
    "    mov [rip + SAVED + 40], rbp",
    "    mov [rip + SAVED + 48], rsi",
    "    mov [rip + SAVED + 56], rdi",
    "    mov [rip + SAVED + 64], r8",
    "    mov [rip + SAVED + 72], r9",
    "    mov [rip + SAVED + 80], r10",
    "    mov [rip + SAVED + 88], r11",
    "    mov [rip + SAVED + 96], r12",
    "    mov [rip + SAVED + 104], r13",
    "    mov [rip + SAVED + 112], r14",
    "    mov [rip + SAVED + 120], r15",
    "    pop rax",
    "    mov [rip + SAVED + 0x90], rax",
    "    mov rcx, cr2",
    "    xor edx, edx",
    "    cmp eax, 14",
    "    cmovne rcx, rdx",
    "    mov [rip + SAVED + 0xa0], rcx",
    "    pop rax",
    "    mov [rip + SAVED + 0x98], rax",
    "    mov rax, [rsp]",
    "    mov [rip + SAVED + 0x88], rax",
    "    mov rax, [rsp + 8]",
    "    mov [rip + SAVED + 0xc0], rax",
    "    mov rax, [rsp + 16]",
    "    mov [rip + SAVED + 0x80], rax",
    "    mov rax, [rsp + 24]",
    "    mov [rip + SAVED + 32], rax",
    "    mov rax, [rsp + 32]",
    "    mov [rip + SAVED + 0xc8], rax",
    "    lea rax, [rip + trapgate_oracle_resume]",
    "    mov [rsp], rax",
    "    mov qword ptr [rsp + 8], 0x33",
    "    mov qword ptr [rsp + 16], 0x202",
    "    lea rax, [rip + STACK_TOP]",
    "    mov [rsp + 24], rax",
    "    mov qword ptr [rsp + 32], 0x2b",
    "    iretq",
    // Entry points of the first 32 vectors, 16 bytes each.
    ".balign 16",
    "trapgate_oracle_vectors:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    ".if (0x60227d00 >> vector) & 1",
    ".else",
    "    push 0",
    ".endif",
    "    push vector",
    "    jmp 5b",
    ".set vector, vector + 1",
    ".endr",
    ".balign 16",
    "trapgate_oracle_finished:",
    "    hlt",
    "    jmp trapgate_oracle_finished",
    "trapgate_oracle_monitor_end:",
    ".popsection",
    control = const CONTROL_AT,
    record = const crate::layout::RECORD,
);

unsafe extern "C" {
    static trapgate_oracle_monitor: u8;
    static trapgate_oracle_exit: u8;
    static trapgate_oracle_resume: u8;
    static trapgate_oracle_done_guest: u8;
    static trapgate_oracle_vectors: u8;
    static trapgate_oracle_finished: u8;
    static trapgate_oracle_monitor_end: u8;
}

/// Where the high half of the monitor's own address lies in the control pages: the guest's kernel tells by it.
pub(crate) const OWN_HALF: usize = 0x244;

/// Offsets of entry points in the monitor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entries {
    /// Where a case jumps to.
    pub(crate) exit: u64,
    /// Where a fault comes back.
    pub(crate) resume: u64,
    /// Where the guest's monitor goes when all cases are done.
    pub(crate) done_guest: u64,
    /// Handlers of the first 32 vectors, 16 bytes each.
    pub(crate) vectors: u64,
    /// The handler of the interrupt that ends a batch.
    pub(crate) finished: u64,
}

/// The monitor's entry points.
pub(crate) fn entries() -> Entries {
    let start = &raw const trapgate_oracle_monitor as u64;
    Entries {
        exit: &raw const trapgate_oracle_exit as u64 - start,
        resume: &raw const trapgate_oracle_resume as u64 - start,
        done_guest: &raw const trapgate_oracle_done_guest as u64 - start,
        vectors: &raw const trapgate_oracle_vectors as u64 - start,
        finished: &raw const trapgate_oracle_finished as u64 - start,
    }
}

/// The monitor's code.
pub(crate) fn code() -> &'static [u8] {
    let start = &raw const trapgate_oracle_monitor;
    let length = &raw const trapgate_oracle_monitor_end as usize - start as usize;
    assert!(length <= MONITOR_BYTES, "the monitor has {length} bytes");
    // SAFETY: the two symbols are start and end of one run of bytes of this program's text.
    unsafe { std::slice::from_raw_parts(start, length) }
}
