//! The chain itself, in ring 0 and in ring 3.

use core::arch::{global_asm, naked_asm};

use runtime::cpu::{self, msr};
use runtime::ring3;
use runtime::segments::{KERNEL_CODE, USER_CODE_32};

const WORDS: usize = 8192;
const STEPS: u64 = 64;

#[repr(C, align(4096))]
struct Memory([u64; WORDS]);

/// What the chain runs over: 64 KiB.
static mut MEMORY: Memory = Memory([0; WORDS]);
static mut USER_STACK: [u64; 512] = [0; 512];

/// What GS points to in ring 0. The assembly knows the offsets.
#[repr(C)]
struct Processor {
    /// RSP while ring 3 runs.
    stack: u64,
    number: u64,
}

static mut PROCESSORS: [Processor; 2] = [
    Processor {
        stack: 0,
        number: 0x11,
    },
    Processor {
        stack: 0,
        number: 0x22,
    },
];

/// What GS and FS point to in ring 3. The assembly knows the offsets.
#[repr(C, align(16))]
struct Thread {
    number: u64,
    /// MXCSR and the x87 control word that the next visit sets.
    mxcsr: u32,
    control: u32,
    /// TSC_AUX can be read with RDTSCP.
    has_rdtscp: u64,
}

static mut THREADS: [Thread; 4] = [const {
    Thread {
        number: 0,
        mxcsr: 0x1F80,
        control: 0x37F,
        has_rdtscp: 0,
    }
}; 4];

/// R8 to R15, which the mixing keeps between its runs.
#[repr(C)]
pub struct Hash {
    words: [u64; 8],
    calls: u64,
    was_in_ring_3: bool,
}

/// Ring 3 may use all memory, SYSCALL works, GS points to the first processor.
pub fn prepare() {
    const SCE: u64 = 1;
    ring3::open_memory();
    cpu::write_msr(
        msr::STAR,
        u64::from(USER_CODE_32) << 48 | u64::from(KERNEL_CODE) << 32,
    );
    cpu::write_msr(msr::LSTAR, chain_system_call as *const () as u64);
    // Interrupts and the direction flag off, and a few that change nothing.
    cpu::write_msr(msr::FMASK, 0x4_4700);
    cpu::write_msr(msr::EFER, cpu::read_msr(msr::EFER) | SCE);
    let memory = (&raw mut MEMORY) as *mut u64;
    let mut value = 1u64;
    for index in 0..WORDS {
        value = value
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        // SAFETY: inside the memory.
        unsafe { memory.add(index).write_volatile(value) }
    }
    let has_rdtscp = cpu::cpuid(0x8000_0001, 0).edx >> 27 & 1;
    for (index, round) in (0..4).zip([0u32, 1, 2, 3]) {
        let thread = thread(index);
        // SAFETY: one CPU, and ring 3 does not run.
        unsafe {
            (*thread).number = 0x1111 * (index as u64 + 1);
            // The two bits of rounding control.
            (*thread).mxcsr = 0x1F80 | round << 13;
            (*thread).control = 0x37F | round << 10;
            (*thread).has_rdtscp = has_rdtscp.into();
        }
    }
}

fn thread(index: usize) -> *mut Thread {
    ((&raw mut THREADS) as *mut Thread).wrapping_add(index & 3)
}

fn processor(index: u64) -> *mut Processor {
    ((&raw mut PROCESSORS) as *mut Processor).wrapping_add(index as usize & 1)
}

impl Hash {
    pub fn new() -> Hash {
        Hash {
            words: [
                0x243F_6A88_85A3_08D3,
                0x1319_8A2E_0370_7344,
                0xA409_3822_299F_31D0,
                0x082E_FA98_EC4E_6C89,
                0x4528_21E6_38D0_1377,
                0xBE54_66CF_34E9_0C6C,
                0xC0AC_29B7_C97C_50DD,
                0x3F84_D5B5_B547_0917,
            ],
            calls: 0,
            was_in_ring_3: false,
        }
    }

    pub fn value(&self) -> u64 {
        self.words
            .iter()
            .fold(0, |sum, word| (sum ^ word).rotate_left(13))
    }

    /// Takes something that was read into the chain.
    pub fn take(&mut self, value: u64) {
        let index = (self.calls & 7) as usize;
        self.calls += 1;
        self.words[index] = (self.words[index] ^ value)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(29);
    }

    pub fn in_ring_0(&mut self) {
        // SAFETY: the function stays inside the memory and keeps what a C function keeps.
        unsafe {
            mix(
                self.words.as_mut_ptr(),
                (&raw mut MEMORY) as *mut u64,
                STEPS,
            )
        };
        // What interrupts and pauses must not tear: copies forward and backward, 16 KiB each.
        if self.words[0] & 7 == 0 {
            // SAFETY: both stay inside the memory.
            unsafe { move_around((&raw mut MEMORY) as *mut u64) }
        }
    }

    pub fn in_ring_3(&mut self) {
        let first = !core::mem::replace(&mut self.was_in_ring_3, true);
        let (which, processor) = (self.words[1] as usize & 3, processor(self.words[2]));
        cpu::write_msr(msr::GS_BASE, processor as u64);
        cpu::write_msr(msr::KERNEL_GS_BASE, thread(which) as u64);
        cpu::write_msr(msr::FS_BASE, thread(which + 1) as u64);
        let stack = (&raw mut USER_STACK) as u64 + 4096;
        // SAFETY: ring 3 ends with SYSCALL, and changes the memory and the words only.
        let value = unsafe {
            enter_ring3(
                self.words.as_mut_ptr(),
                (&raw mut MEMORY) as *mut u64,
                STEPS,
                stack,
                u64::from(first),
            )
        };
        self.take(value);
        // SWAPGS has brought back what it was exchanged for.
        self.take(u64::from(
            cpu::read_msr(msr::GS_BASE) == processor as u64
                && cpu::read_msr(msr::KERNEL_GS_BASE) == thread(which) as u64
                && cpu::read_msr(msr::FS_BASE) == thread(which + 1) as u64,
        ));
    }
}

/// Mixes the eight words with the memory, `steps` times. All sixteen general registers are in use,
/// and the carry flag goes from one step to the next.
#[unsafe(naked)]
unsafe extern "C" fn mix(words: *mut u64, memory: *mut u64, steps: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "mov r8, [rdi]",
        "mov r9, [rdi + 8]",
        "mov r10, [rdi + 16]",
        "mov r11, [rdi + 24]",
        "mov r12, [rdi + 32]",
        "mov r13, [rdi + 40]",
        "mov r14, [rdi + 48]",
        "mov r15, [rdi + 56]",
        "mov rcx, rdx",
        "mov rbx, 0x9E3779B97F4A7C15",
        "clc",
        "2:",
        "movzx ebp, r8w",
        "mov rdi, r9",
        "lea rbp, [rbp * 8]", // no flags from here to ADC, but those of the step before
        "movzx ebp, bp",
        "mov rax, [rsi + rbp]",
        "adc r8, rax",
        "adc r9, r8",
        "sbb r10, r9",
        "adc r11, r10",
        "lahf",
        "mov rdx, r11",
        "rol rdx, 23",
        "xor r12, rdx",
        "imul r12, rbx",
        "add r13, r12",
        "rcr r13, 7",
        "sub r14, r13",
        "bswap r14",
        "xor r15, r14",
        "add r15, rax",
        "mov [rsi + rbp], r15",
        "xchg r9, r12",
        "xor r10, rdi",
        "sahf",
        "dec rcx", // leaves the carry alone
        "jnz 2b",
        "adc r8, 1",
        "pop rdi",
        "mov [rdi], r8",
        "mov [rdi + 8], r9",
        "mov [rdi + 16], r10",
        "mov [rdi + 24], r11",
        "mov [rdi + 32], r12",
        "mov [rdi + 40], r13",
        "mov [rdi + 48], r14",
        "mov [rdi + 56], r15",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

/// Copies the first quarter of the memory to the second, and the third to the fourth backwards.
#[unsafe(naked)]
unsafe extern "C" fn move_around(memory: *mut u64) {
    naked_asm!(
        "mov rdx, rdi",
        "mov rsi, rdx",
        "lea rdi, [rdx + 0x4000]",
        "mov ecx, 0x4000",
        "rep movsb",
        "lea rsi, [rdx + 0xBFFC]",
        "lea rdi, [rdx + 0xFFFC]",
        "mov ecx, 0x1000",
        "std",
        "rep movsd",
        "cld",
        "ret",
    )
}

/// To ring 3 by SYSRET with interrupts on. Comes back through [`chain_system_call`] with what ring
/// 3 left in RAX.
#[unsafe(naked)]
unsafe extern "C" fn enter_ring3(
    words: *mut u64,
    memory: *mut u64,
    steps: u64,
    stack: u64,
    first: u64,
) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "pushfq",
        "cli",
        "mov gs:[0], rsp",
        "mov rsp, rcx",
        "swapgs",
        "lea rcx, [rip + {code}]",
        "mov r11d, 0x202",
        "sysretq",
        code = sym ring3_visit,
    )
}

// Where SYSCALL arrives: the stack is still ring 3's.
global_asm!(
    r#"
    .global chain_system_call
chain_system_call:
    swapgs
    mov rsp, gs:[0]
    add rax, gs:[8]
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    "#
);

unsafe extern "C" {
    fn chain_system_call();
}

/// Ring 3's part: general, vector and x87 registers, whose values stay there from one visit to the
/// next; what FS and GS point to; TSC_AUX; and the mixing. Its only call is SYSCALL.
#[unsafe(naked)]
unsafe extern "C" fn ring3_visit() {
    naked_asm!(
        "test r8, r8",
        "jz 2f",
        "fninit",
        "fld1",
        "fldz",
        "pxor xmm0, xmm0",
        "pxor xmm2, xmm2",
        "pxor xmm9, xmm9",
        "pxor xmm15, xmm15",
        "mov dword ptr [rsp - 8], 0x1F80",
        "ldmxcsr [rsp - 8]",
        "2:",
        // What the visit before left.
        "stmxcsr [rsp - 8]",
        "mov ebx, [rsp - 8]",
        "fnstcw [rsp - 8]",
        "movzx eax, word ptr [rsp - 8]",
        "rol rbx, 16",
        "xor rbx, rax",
        "ldmxcsr gs:[8]",
        "fldcw gs:[12]",
        "movq xmm3, qword ptr [rdi]",
        "movq xmm4, qword ptr [rdi + 8]",
        "paddq xmm0, xmm3",
        "pxor xmm15, xmm0",
        "pshufd xmm1, xmm0, 0x4E",
        "psubd xmm2, xmm1",
        "paddq xmm9, xmm2",
        "pxor xmm9, xmm4",
        "mov eax, 3",
        "cvtsi2sd xmm5, rax",
        "cvtsi2sd xmm6, qword ptr [rdi + 16]", // rounds as MXCSR says
        "divsd xmm6, xmm5",
        "movq rax, xmm6",
        "rol rbx, 9",
        "add rbx, rax",
        "movq rax, xmm9",
        "xor rbx, rax",
        "movq rax, xmm15",
        "add rbx, rax",
        "fild qword ptr [rdi + 24]",
        "faddp st(1), st", // rounds as the control word says
        "fxch",
        "fld st(1)",
        "fstp tbyte ptr [rsp - 16]",
        "xor rbx, [rsp - 16]",
        "movzx eax, word ptr [rsp - 8]",
        "rol rbx, 17",
        "add rbx, rax",
        "add rbx, gs:[0]",
        "rol rbx, 5",
        "add rbx, fs:[0]",
        "cmp qword ptr gs:[16], 0",
        "je 3f",
        "mov r9, rdx",
        "rdtscp",
        "rol rbx, 5",
        "add rbx, rcx",
        "mov rdx, r9",
        "3:",
        "call {mix}",
        "mov rax, rbx",
        "syscall",
        "ud2",
        mix = sym mix,
    )
}
