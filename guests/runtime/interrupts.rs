//! The IDT, a handler for each vector, and catching faults.
//!
//! Every gate has an interrupt stack (IST). That is not only for safety: the `core` library of a Linux
//! target, with which guests are built where the freestanding one is missing (see `build.rs`), is
//! compiled with a red zone, which an interrupt on the same stack would overwrite.

use core::arch::{asm, global_asm, naked_asm};

use crate::segments::{
    self, IST_DOUBLE_FAULT, IST_EXCEPTION, IST_INTERRUPT, IST_NMI, KERNEL_CODE, TablePointer,
};
use crate::{cpu, power, println};

/// What the CPU and the entry stubs pushed. The handler may change it: the registers are restored
/// from it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    /// Zero for the vectors without an error code.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

pub type Handler = fn(&mut TrapFrame);

static mut HANDLERS: [Option<Handler>; 256] = [None; 256];

#[repr(C, align(16))]
struct Idt([[u64; 2]; 256]);

static mut IDT: Idt = Idt([[0; 2]; 256]);

/// Bytes from one entry stub to the next.
const STUB_SIZE: usize = 16;

// Handlers compiled with SSE must not change the registers of what they interrupt.
#[cfg(not(target_feature = "sse"))]
global_asm!(
    ".macro save_vectors",
    ".endm",
    ".macro restore_vectors",
    ".endm"
);
#[cfg(target_feature = "sse")]
global_asm!(
    r#"
    .macro save_vectors
    // FXSAVE raises #NM while CR0.TS or EM is set: an interrupt clears both, for good.
    mov rax, cr0
    test al, 0x0C
    jz 2f
    and al, 0xF3
    mov cr0, rax
2:  sub rsp, 512
    fxsave64 [rsp]
    .endm
    .macro restore_vectors
    fxrstor64 [rsp]
    add rsp, 512
    .endm
    "#
);

// Vectors 8, 10 to 14, 17, 21, 29 and 30 push an error code (SDM vol. 3A 7.15); the others get a
// zero, so that the frame is the same for all.
global_asm!(
    r#"
    .balign 16
    .global interrupt_stubs
interrupt_stubs:
    .set vector, 0
    .rept 256
    .balign {stub_size}
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0
    .endif
    push vector
    jmp interrupt_common
    .set vector, vector + 1
    .endr

interrupt_common:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    // The CPU aligned the stack before it pushed five words; 17 more make a multiple of 16 bytes.
    mov rdi, rsp
    save_vectors
    cld
    call {dispatch}
    restore_vectors
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq
    "#,
    stub_size = const STUB_SIZE,
    dispatch = sym dispatch,
);

unsafe extern "C" {
    static interrupt_stubs: u8;
}

extern "C" fn dispatch(frame: &mut TrapFrame) {
    // SAFETY: the vector is below 256; one CPU.
    let handler = unsafe {
        ((&raw const HANDLERS) as *const Option<Handler>)
            .add(frame.vector as usize)
            .read_volatile()
    };
    match handler {
        Some(handler) => handler(frame),
        None if catch_fault(frame) => {}
        None => {
            let TrapFrame {
                vector,
                error,
                rip,
                cs,
                rflags,
                rsp,
                ss,
                ..
            } = frame;
            println!(
                "unexpected interrupt: vector {vector} error {error:#x} rip {cs:#x}:{rip:#x} rflags {rflags:#x} rsp {ss:#x}:{rsp:#x} cr2 {:#x}",
                cpu::read_cr2()
            );
            power::fail()
        }
    }
}

/// The address of the code that the gate of `vector` points to.
pub fn stub_address(vector: u8) -> u64 {
    (&raw const interrupt_stubs) as u64 + u64::from(vector) * STUB_SIZE as u64
}

/// Present, ring 0, 64-bit interrupt gate.
const INTERRUPT_GATE: u8 = 0x8E;

/// Fills the IDT and loads it. Also the way back for a program that loaded its own.
pub fn load() {
    for vector in 0..=255u8 {
        let ist = match vector {
            2 => IST_NMI,
            8 => IST_DOUBLE_FAULT,
            0..32 => IST_EXCEPTION,
            _ => IST_INTERRUPT,
        };
        set_gate(
            vector,
            KERNEL_CODE,
            stub_address(vector),
            INTERRUPT_GATE,
            ist,
        );
    }
    let pointer = TablePointer {
        limit: 4095,
        base: (&raw const IDT) as u64,
    };
    // SAFETY: the table has all vectors.
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack)) }
}

/// The address of the IDT.
pub fn table() -> u64 {
    (&raw const IDT) as u64
}

/// Writes the gate of `vector`. `access` is the descriptor's sixth byte (present, DPL, type).
pub fn set_gate(vector: u8, selector: u16, offset: u64, access: u8, ist: u8) {
    let [low, high] = segments::gate_descriptor(selector, offset, access);
    // SAFETY: the vector is inside the table; one CPU.
    unsafe {
        ((&raw mut IDT) as *mut [u64; 2])
            .add(usize::from(vector))
            .write_volatile([low | u64::from(ist & 7) << 32, high]);
    }
}

/// Lets INT n of this vector be executed in ring 3.
pub fn allow_from_ring3(vector: u8) {
    set_gate(
        vector,
        KERNEL_CODE,
        stub_address(vector),
        INTERRUPT_GATE | 3 << 5,
        if vector < 32 {
            IST_EXCEPTION
        } else {
            IST_INTERRUPT
        },
    );
}

/// Calls `handler` for each interrupt with this vector.
pub fn set_handler(vector: u8, handler: Handler) {
    // SAFETY: the vector is inside the table; one CPU.
    unsafe {
        ((&raw mut HANDLERS) as *mut Option<Handler>)
            .add(usize::from(vector))
            .write_volatile(Some(handler))
    }
}

pub fn clear_handler(vector: u8) {
    // SAFETY: as in `set_handler`.
    unsafe {
        ((&raw mut HANDLERS) as *mut Option<Handler>)
            .add(usize::from(vector))
            .write_volatile(None)
    }
}

/// An exception that [`catch`] stopped at.
#[derive(Clone, Copy)]
pub struct Fault {
    pub frame: TrapFrame,
    pub cr2: u64,
}

static mut ARMED: bool = false;
static mut CAUGHT: Option<Fault> = None;
#[unsafe(no_mangle)]
static mut CATCH_RSP: u64 = 0;

/// Calls `body(argument)`. An interrupt without a handler ends it, wherever it came from (ring 3
/// and other code segments included), and is returned.
pub fn catch(body: unsafe extern "C" fn(u64) -> u64, argument: u64) -> Result<u64, Fault> {
    // SAFETY: one CPU; `enter` keeps the registers that its callers rely on, also when the body
    // does not come back by itself.
    unsafe {
        (&raw mut CAUGHT).write_volatile(None);
        (&raw mut ARMED).write_volatile(true);
        let value = enter(body, argument);
        (&raw mut ARMED).write_volatile(false);
        match (&raw const CAUGHT).read_volatile() {
            Some(fault) => Err(fault),
            None => Ok(value),
        }
    }
}

/// Saves what a C function keeps and calls `body(argument)`. `leave` is the second way out.
#[unsafe(naked)]
unsafe extern "C" fn enter(body: unsafe extern "C" fn(u64) -> u64, argument: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "pushfq",
        "mov [CATCH_RSP], rsp",
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "jmp {leave}",
        leave = sym leave,
    )
}

#[unsafe(naked)]
unsafe extern "C" fn leave() {
    naked_asm!(
        "mov rsp, [CATCH_RSP]",
        "popfq",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

/// Ends a [`catch`] from a handler: execution goes on behind it.
fn catch_fault(frame: &mut TrapFrame) -> bool {
    // SAFETY: one CPU, and `catch` waits.
    unsafe {
        if !(&raw const ARMED).read_volatile() {
            return false;
        }
        (&raw mut ARMED).write_volatile(false);
        (&raw mut CAUGHT).write_volatile(Some(Fault {
            frame: *frame,
            cr2: cpu::read_cr2(),
        }));
        frame.rip = leave as *const () as u64;
        frame.cs = u64::from(KERNEL_CODE);
        frame.ss = u64::from(segments::KERNEL_DATA);
        frame.rsp = (&raw const CATCH_RSP).read_volatile();
        frame.rflags = 2;
    }
    true
}
