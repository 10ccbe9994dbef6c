//! Running an instruction that is given as bytes, with all registers that it uses.

use core::arch::naked_asm;

use runtime::interrupts::{Fault, catch};

/// The registers that string instructions use.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Registers {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rflags: u64,
}

#[repr(C, align(64))]
struct Code([u8; 64]);

static mut CODE: Code = Code([0; 64]);
#[unsafe(no_mangle)]
static mut STRINGS_REGISTERS: Registers = Registers {
    rax: 0,
    rcx: 0,
    rdx: 0,
    rsi: 0,
    rdi: 0,
    rflags: 0,
};

/// Where the instruction stands.
pub fn address() -> u64 {
    (&raw const CODE) as u64
}

/// Runs `code`, one instruction and NOPs behind it.
pub fn run(code: &[u8], start: &Registers) -> Result<Registers, Fault> {
    let finish = finish as *const () as u64;
    let bytes = code
        .iter()
        .copied()
        // jmp [rip]
        .chain([0xFF, 0x25, 0, 0, 0, 0])
        .chain(finish.to_le_bytes());
    let to = (&raw mut CODE).cast::<u8>();
    for (index, byte) in bytes.enumerate() {
        // SAFETY: a few bytes of the 64; one CPU.
        unsafe { to.add(index).write_volatile(byte) }
    }
    // SAFETY: one CPU.
    unsafe {
        (&raw mut STRINGS_REGISTERS).write_volatile(*start);
        catch(begin, address())?;
        Ok((&raw const STRINGS_REGISTERS).read_volatile())
    }
}

#[unsafe(naked)]
unsafe extern "C" fn begin(code: u64) -> u64 {
    naked_asm!(
        "push rdi",
        "push qword ptr [STRINGS_REGISTERS + 40]",
        "mov rax, [STRINGS_REGISTERS]",
        "mov rcx, [STRINGS_REGISTERS + 8]",
        "mov rdx, [STRINGS_REGISTERS + 16]",
        "mov rsi, [STRINGS_REGISTERS + 24]",
        "mov rdi, [STRINGS_REGISTERS + 32]",
        "popfq",
        "ret",
    )
}

#[unsafe(naked)]
unsafe extern "C" fn finish() {
    naked_asm!(
        "mov [STRINGS_REGISTERS], rax",
        "mov [STRINGS_REGISTERS + 8], rcx",
        "mov [STRINGS_REGISTERS + 16], rdx",
        "mov [STRINGS_REGISTERS + 24], rsi",
        "mov [STRINGS_REGISTERS + 32], rdi",
        "pushfq",
        "pop qword ptr [STRINGS_REGISTERS + 40]",
        "cld",
        "ret",
    )
}
