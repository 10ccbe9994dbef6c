//! The processor outside long mode: [`run`] leaves long mode, loads what a [`State`] says, and comes
//! back with the first event that was delivered.

use core::arch::global_asm;

use runtime::report;
use runtime::{print, println, segments};

/// Selectors. The first three are those of the start-up code.
pub const CODE: u16 = 0x18;
pub const DATA: u16 = 0x10;
pub const USER_CODE: u16 = 0x20 | 3;
pub const USER_DATA: u16 = 0x28 | 3;
pub const TASK: u16 = 0x30;
pub const TASK_B: u16 = 0x38;
pub const TASK_16: u16 = 0x40;
pub const TASK_DF: u16 = 0x48;
pub const LDT: u16 = 0x50;
pub const RING1_CODE: u16 = 0x58 | 1;
pub const RING1_DATA: u16 = 0x60 | 1;
/// 32-bit code that begins at [`stubs`], for gates with 16-bit offsets.
pub const STUBS: u16 = 0x68;
/// 16-bit data from address 0 on.
pub const DATA_16: u16 = 0x70;
/// Slots for each case to fill.
pub const FREE: u16 = 0x78;
pub const FREE_B: u16 = 0x80;
/// The task with which the way back begins.
const TASK_BACK: u16 = 0x90;
pub const GDT_SLOTS: usize = 24;

/// Where 16-bit code runs.
pub const LOW: u32 = 0x8000;

/// What the processor has when the code starts. The assembly below knows the offsets.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct State {
    pub eip: u32,
    pub cs: u32,
    pub eflags: u32,
    pub esp: u32,
    pub ss: u32,
    pub es: u32,
    pub ds: u32,
    pub fs: u32,
    pub gs: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ebp: u32,
    pub cr0: u32,
    pub cr3: u32,
    pub cr4: u32,
    pub ldtr: u32,
}

/// What the handler found: its own pushes, upwards from the last, then the CPU's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outcome {
    pub gs: u32,
    pub fs: u32,
    pub es: u32,
    pub ds: u32,
    pub edi: u32,
    pub esi: u32,
    pub ebp: u32,
    pub esp_in_handler: u32,
    pub ebx: u32,
    pub edx: u32,
    pub ecx: u32,
    pub eax: u32,
    pub vector: u32,
    pub error: u32,
    pub eip: u32,
    pub cs: u32,
    pub eflags: u32,
    pub esp: u32,
    pub ss: u32,
    /// ES, DS, FS, GS of virtual-8086 mode.
    pub virtual_segments: [u32; 4],
    pub handler_ss: u32,
    pub handler_esp: u32,
    pub handler_flags: u32,
    pub cr0: u32,
    pub cr2: u32,
    pub cr3: u32,
    pub tr: u32,
    pub ldtr: u32,
    pub dr6: u32,
}

const WORDS: usize = 23;

#[unsafe(no_mangle)]
static mut LEGACY_STATE: [u32; 20] = [0; 20];
#[unsafe(no_mangle)]
static mut LEGACY_OUT: [u32; WORDS + 9] = [0; WORDS + 9];
#[unsafe(no_mangle)]
static mut LEGACY_SAVED: [u64; 10] = [0; 10];
#[repr(C, align(16))]
struct Table<const N: usize>([u64; N]);
#[unsafe(no_mangle)]
static mut LEGACY_GDT: Table<GDT_SLOTS> = Table([0; GDT_SLOTS]);
static mut LEGACY_IDT: Table<256> = Table([0; 256]);
static mut LEGACY_LDT: Table<4> = Table([0; 4]);
#[unsafe(no_mangle)]
static mut LEGACY_POINTERS: [u16; 16] = [0; 16];

#[repr(C, align(4096))]
struct Stack([u8; 8192]);
#[unsafe(no_mangle)]
static mut LEGACY_STACK: Stack = Stack([0; 8192]);
static mut RING0_STACK: Stack = Stack([0; 8192]);
static mut RING1_STACK: Stack = Stack([0; 8192]);
static mut CODE_STACK: Stack = Stack([0; 8192]);

/// A 32-bit task-state segment with an I/O permission map of 0x88 ports (SDM vol. 3A, figure 9-2), and the
/// redirection map for virtual-8086 mode's interrupts in front of it.
#[repr(C, align(128))]
pub struct Task {
    pub words: [u32; 26],
    pub redirection: [u8; 32],
    pub ports: [u8; 18],
}

const NO_TASK: Task = Task {
    words: [0; 26],
    redirection: [0xFF; 32],
    ports: [0xFF; 18],
};
static mut TASKS: [Task; 3] = [NO_TASK; 3];
static mut SMALL_TASK: [u16; 22] = [0; 22];

pub const TASK_LIMIT: u32 = 104 + 32 + 17;

/// The task-state segment number `index`: of [`TASK`], [`TASK_B`], [`TASK_DF`].
pub fn task(index: usize) -> &'static mut Task {
    assert!(index < 3);
    // SAFETY: one CPU; a reference lives for a statement.
    unsafe { &mut (*(&raw mut TASKS))[index] }
}

/// The 16-bit task-state segment (SDM vol. 3A, figure 9-10).
pub fn small_task() -> &'static mut [u16; 22] {
    // SAFETY: as in `task`.
    unsafe { &mut *(&raw mut SMALL_TASK) }
}

/// The interior of a stack: its top has room above.
const ROOM_ABOVE: u32 = 256;
pub fn ring0_top() -> u32 {
    (&raw const RING0_STACK) as u32 + 8192 - ROOM_ABOVE
}
pub fn ring1_top() -> u32 {
    (&raw const RING1_STACK) as u32 + 8192 - ROOM_ABOVE
}
pub fn code_top() -> u32 {
    (&raw const CODE_STACK) as u32 + 8192 - ROOM_ABOVE
}

/// A code or data descriptor. `flags`: 8 granularity, 4 size.
pub fn segment(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let [low, _] = segments::system_descriptor(base.into(), limit, access);
    low | u64::from(flags) << 52
}

/// A gate: access byte, selector, offset; `count` parameters.
pub fn gate(access: u8, selector: u16, offset: u32, count: u8) -> u64 {
    let [low, _] = segments::gate_descriptor(selector, offset.into(), access);
    low | u64::from(count) << 32
}

pub fn set_descriptor(selector: u16, descriptor: u64) {
    // SAFETY: the index is checked; one CPU.
    unsafe { (*(&raw mut LEGACY_GDT)).0[usize::from(selector >> 3)] = descriptor }
}

pub fn descriptor(selector: u16) -> u64 {
    // SAFETY: as above.
    unsafe { (*(&raw const LEGACY_GDT)).0[usize::from(selector >> 3)] }
}

pub fn set_gate(vector: u8, gate: u64) {
    // SAFETY: as above.
    unsafe { (*(&raw mut LEGACY_IDT)).0[usize::from(vector)] = gate }
}

pub fn set_idt_limit(limit: u16) {
    // SAFETY: as above.
    unsafe { (*(&raw mut LEGACY_POINTERS))[8] = limit }
}

const STUB_BYTES: u32 = 16;

fn address(place: Piece) -> u32 {
    place as *const () as u32
}

pub fn stubs() -> u32 {
    address(legacy_stubs)
}

pub fn stub(vector: u8) -> u32 {
    stubs() + u32::from(vector) * STUB_BYTES
}

/// Tables as every case finds them: flat segments of rings 0, 1 and 3, an interrupt gate to ring 0 for each
/// vector (of privilege level 3 from 0x40 on), tasks that are not busy.
pub fn reset() {
    let pointer = |slot: usize, limit: u32, base: u32| {
        // SAFETY: two slots; one CPU.
        let pointers = unsafe { &mut *(&raw mut LEGACY_POINTERS) };
        pointers[slot] = limit as u16;
        pointers[slot + 1] = base as u16;
        pointers[slot + 2] = (base >> 16) as u16;
        pointers[slot + 3] = 0;
    };
    pointer(0, GDT_SLOTS as u32 * 8 - 1, (&raw const LEGACY_GDT) as u32);
    pointer(8, 2047, (&raw const LEGACY_IDT) as u32);
    for slot in 0..GDT_SLOTS as u16 {
        set_descriptor(slot * 8, 0);
    }
    set_descriptor(8, 0x00AF_9B00_0000_FFFF);
    set_descriptor(DATA, 0x00CF_9300_0000_FFFF);
    set_descriptor(CODE, 0x00CF_9B00_0000_FFFF);
    set_descriptor(USER_CODE, 0x00CF_FB00_0000_FFFF);
    set_descriptor(USER_DATA, 0x00CF_F300_0000_FFFF);
    set_descriptor(RING1_CODE, 0x00CF_BB00_0000_FFFF);
    set_descriptor(RING1_DATA, 0x00CF_B300_0000_FFFF);
    set_descriptor(STUBS, segment(stubs(), 0xFFFF, 0x9B, 4));
    set_descriptor(DATA_16, segment(0, 0xFFFF, 0x93, 0));
    for (index, selector) in [TASK, TASK_B, TASK_DF].into_iter().enumerate() {
        let base = task(index) as *const Task as u32;
        set_descriptor(selector, segment(base, TASK_LIMIT, 0x89, 0));
        *task(index) = NO_TASK;
        let words = &mut task(index).words;
        // SS0, SS1 and their pointers, then what a switch loads.
        words[1] = ring0_top();
        words[2] = DATA.into();
        words[3] = ring1_top();
        words[4] = RING1_DATA.into();
        words[9] = 2;
        words[14] = ring0_top() - 4096;
        words[18] = DATA.into();
        words[19] = CODE.into();
        for segment in &mut words[20..24] {
            *segment = DATA.into();
        }
        words[25] = (104 + 32) << 16;
    }
    set_descriptor(TASK_BACK, descriptor(TASK));
    task(2).words[8] = address(legacy_double_fault);
    task(2).words[14] = ring1_top();
    let base = small_task().as_ptr() as u32;
    set_descriptor(TASK_16, segment(base, 43, 0x81, 0));
    set_descriptor(LDT, segment((&raw const LEGACY_LDT) as u32, 31, 0x82, 0));
    for vector in 0..=255u8 {
        let access = if vector < 0x40 { 0x8E } else { 0xEE };
        set_gate(vector, gate(access, CODE, stub(vector), 0));
    }
}

/// 32-bit code without paging.
pub const CR0: u32 = 0x33;

impl State {
    /// Ring 0 code, interrupts off.
    pub fn ring0(code: Code) -> State {
        State {
            eip: code.start,
            cs: CODE.into(),
            eflags: 2,
            esp: code_top(),
            ss: DATA.into(),
            es: DATA.into(),
            ds: DATA.into(),
            fs: 0,
            gs: 0,
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
            esi: 0,
            edi: 0,
            ebp: 0,
            cr0: CR0,
            cr3: 0,
            cr4: 0,
            ldtr: 0,
        }
    }

    /// Ring 3 code.
    pub fn ring3(code: Code) -> State {
        State {
            cs: USER_CODE.into(),
            ss: USER_DATA.into(),
            ds: USER_DATA.into(),
            es: USER_DATA.into(),
            ..State::ring0(code)
        }
    }

    /// Code in virtual-8086 mode, at [`LOW`].
    pub fn virtual_8086(code: Code) -> State {
        let code = code.copied();
        State {
            eip: code.start - LOW,
            cs: LOW >> 4,
            eflags: 0x2_0002,
            esp: 0x7000,
            ss: 0,
            ds: 0,
            es: 0,
            ..State::ring0(code)
        }
    }
}

/// A function made by [`pieces!`](crate::pieces).
pub type Piece = unsafe extern "C" fn();

/// A piece of code, see [`pieces!`](crate::pieces): where it starts, the instruction in question, and what is behind it.
#[derive(Clone, Copy)]
pub struct Code {
    pub start: u32,
    pub at: u32,
    pub after: u32,
}

impl Code {
    pub fn new(piece: Piece) -> Code {
        let start = address(piece);
        // SAFETY: each piece is preceded by two addresses.
        let [at, after] = unsafe { *((start - 8) as *const [u32; 2]) };
        Code { start, at, after }
    }

    /// The same in low memory. Addresses there are real ones.
    fn copied(self) -> Code {
        let bytes = self.after - self.start + 2;
        // SAFETY: low memory is not used for anything else.
        unsafe {
            core::ptr::copy_nonoverlapping(self.start as *const u8, LOW as *mut u8, bytes as usize);
        }
        Code {
            start: LOW,
            at: self.at - self.start + LOW,
            after: self.after - self.start + LOW,
        }
    }

    /// As offsets in the 64 KiB at [`LOW`].
    pub fn offsets(self) -> Code {
        Code {
            start: 0,
            at: self.at - self.start,
            after: self.after - self.start,
        }
    }
}

/// Functions of 32-bit or 16-bit code: `name: ["before", …] "the instruction in question";`. Behind it stands UD2,
/// which ends every piece in every mode.
#[macro_export]
macro_rules! pieces {
    ($size:literal $($name:ident: [$($before:literal),*] $instruction:literal;)*) => {
        $(core::arch::global_asm!(concat!(
            ".section .text.legacy, \"ax\"\n.code", $size, "\n.balign 16\n.long 98f, 99f\n.global ",
            stringify!($name), "\n", stringify!($name), ":\n", $($before, "\n",)*
            "98: ", $instruction, "\n99: ud2\n.code64\n.text\n",
        ));)*
        unsafe extern "C" {
            $(fn $name();)*
        }
    };
}

/// Runs the code until the first event.
pub fn run(state: &State) -> Outcome {
    // SAFETY: `legacy_enter` keeps what a C function keeps; the state is the program's to choose.
    unsafe {
        (&raw mut LEGACY_STATE)
            .cast::<State>()
            .write_volatile(*state);
        legacy_enter();
        (&raw const LEGACY_OUT).cast::<Outcome>().read_volatile()
    }
}

/// Prints which exception it was and where; `no exception` for the UD2 behind the code.
pub fn describe(outcome: &Outcome, code: Code) {
    if outcome.vector == 6 && outcome.eip == code.after {
        print!("no exception");
        return;
    }
    print_event(outcome);
    match outcome.eip {
        eip if eip == code.at => print!(" at"),
        eip if eip == code.after => print!(" after"),
        eip => print!(" eip {eip:#x}"),
    }
}

pub fn print_event(outcome: &Outcome) {
    report::print_vector(outcome.vector.into(), outcome.error.into());
}

/// One line: what happened to `piece` under `state`.
pub fn show0(what: &str, piece: Piece, change: impl FnOnce(&mut State)) {
    let code = Code::new(piece);
    let mut state = State::ring0(code);
    change(&mut state);
    show_state(what, code, &state);
}

/// The same in ring 3.
pub fn show3(what: &str, piece: Piece, change: impl FnOnce(&mut State)) {
    let code = Code::new(piece);
    let mut state = State::ring3(code);
    change(&mut state);
    show_state(what, code, &state);
}

fn show_state(what: &str, code: Code, state: &State) {
    print!("{what}: ");
    describe(&run(state), code);
    println!();
}

unsafe extern "C" {
    fn legacy_enter();
    fn legacy_stubs();
    fn legacy_double_fault();
}

global_asm!(
    r#"
    .set OUT_SS, LEGACY_OUT + 4 * 23

    .section .text.legacy, "ax"
    .code64
    .global legacy_enter
legacy_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    pushfq
    cli
    mov [LEGACY_SAVED], rsp
    mov rax, cr0
    mov [LEGACY_SAVED + 8], rax
    mov rax, cr3
    mov [LEGACY_SAVED + 16], rax
    mov rax, cr4
    mov [LEGACY_SAVED + 24], rax
    sgdt [LEGACY_SAVED + 32]
    sidt [LEGACY_SAVED + 48]
    lgdt [LEGACY_POINTERS]
    push 0x18
    lea rax, [rip + 2f]
    push rax
    retfq

    // SDM vol. 3A 11.8.5.4.
    .code32
2:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset LEGACY_STACK + 8192
    mov eax, cr0
    and eax, 0x7FFFFFFF
    mov cr0, eax
    mov ecx, 0xC0000080
    rdmsr
    and eax, 0xFFFFFEFF
    wrmsr
    mov eax, [LEGACY_STATE + 72]
    mov cr4, eax
    mov eax, [LEGACY_STATE + 68]
    mov cr3, eax
    lidt [LEGACY_POINTERS + 16]
    and byte ptr [LEGACY_GDT + 0x30 + 5], 0xFD
    mov eax, 0x30
    ltr ax
    mov eax, [LEGACY_STATE + 76]
    lldt ax
    mov eax, [LEGACY_STATE + 64]
    mov cr0, eax
    test dword ptr [LEGACY_STATE + 8], 0x20000
    jnz 3f
    test byte ptr [LEGACY_STATE + 4], 3
    jnz 4f
    lss esp, [LEGACY_STATE + 12]
    jmp 5f
3:  push dword ptr [LEGACY_STATE + 32]
    push dword ptr [LEGACY_STATE + 28]
    push dword ptr [LEGACY_STATE + 24]
    push dword ptr [LEGACY_STATE + 20]
4:  push dword ptr [LEGACY_STATE + 16]
    push dword ptr [LEGACY_STATE + 12]
5:  push dword ptr [LEGACY_STATE + 8]
    push dword ptr [LEGACY_STATE + 4]
    push dword ptr [LEGACY_STATE]
    mov eax, [LEGACY_STATE + 36]
    mov ebx, [LEGACY_STATE + 40]
    mov ecx, [LEGACY_STATE + 44]
    mov edx, [LEGACY_STATE + 48]
    mov esi, [LEGACY_STATE + 52]
    mov edi, [LEGACY_STATE + 56]
    mov ebp, [LEGACY_STATE + 60]
    test dword ptr [LEGACY_STATE + 8], 0x20000
    jnz 6f
    mov es, [LEGACY_STATE + 20]
    mov fs, [LEGACY_STATE + 28]
    mov gs, [LEGACY_STATE + 32]
    mov ds, [LEGACY_STATE + 24]
6:  iretd

    .balign 16
    .global legacy_stubs
legacy_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17)
    .else
    push 0
    .endif
    push vector
    jmp legacy_common
    .set vector, vector + 1
    .endr

    // The task behind a task gate for double faults.
    .global legacy_double_fault
legacy_double_fault:
    push 8
legacy_common:
    pushad
    .byte 0x1E, 0x06, 0x0F, 0xA0, 0x0F, 0xA8 // ds, es, fs, gs: the assembler would push words
    pushfd
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    pop dword ptr [OUT_SS + 8]
    mov ebp, esp
    mov eax, ss
    mov [OUT_SS], eax
    lar ecx, eax
    test ecx, 0x400000
    jnz 1f
    movzx ebp, bp
1:  mov [OUT_SS + 4], ebp
    cld
    mov edi, offset LEGACY_OUT
    mov ecx, 23
2:  mov eax, ss:[ebp]
    stosd
    add ebp, 4
    loop 2b
    mov eax, cr0
    mov [OUT_SS + 12], eax
    mov eax, cr2
    mov [OUT_SS + 16], eax
    mov eax, cr3
    mov [OUT_SS + 20], eax
    xor eax, eax
    str ax
    mov [OUT_SS + 24], eax
    sldt ax
    mov [OUT_SS + 28], eax
    mov eax, dr6
    mov [OUT_SS + 32], eax

    // Back to long mode, SDM vol. 3A 11.8.5.
    .global legacy_leave
legacy_leave:
    mov eax, 0x10
    mov ss, eax
    mov esp, offset LEGACY_STACK + 8192
    // Long mode is not entered with a 16-bit task.
    and byte ptr [LEGACY_GDT + 0x90 + 5], 0xFD
    mov eax, 0x90
    ltr ax
    mov eax, cr0
    and eax, 0x7FFFFFFF
    mov cr0, eax
    mov eax, [LEGACY_SAVED + 24]
    mov cr4, eax
    mov eax, [LEGACY_SAVED + 16]
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, [LEGACY_SAVED + 8]
    mov cr0, eax
    .byte 0xEA
    .long legacy_back
    .word 0x08
    .code64
legacy_back:
    lgdt [LEGACY_SAVED + 32]
    lidt [LEGACY_SAVED + 48]
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, [LEGACY_SAVED]
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .text
    "#
);
