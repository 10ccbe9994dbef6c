//! The loops, and how many instructions each has. The host runs the same code for comparison, see
//! `benches/` in the workspace.

use core::arch::naked_asm;

/// A loop of `count` rounds. Returns its checksum.
type Loop = unsafe extern "C" fn(count: u64, memory: *mut u8) -> u64;

struct Bench {
    name: &'static str,
    run: Loop,
    count: u64,
    /// Instructions in one round, and outside of the rounds (RET included).
    round: u64,
    rest: u64,
    /// It writes a port, which a program on the host may not.
    port: bool,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "alu",
        run: alu,
        count: 2_000_000,
        round: 10,
        rest: 3,
        port: false,
    },
    Bench {
        name: "memory",
        run: memory,
        count: 2_000_000,
        round: 8,
        rest: 3,
        port: false,
    },
    Bench {
        name: "calls",
        run: calls,
        count: 3_000_000,
        round: 5,
        rest: 2,
        port: false,
    },
    Bench {
        name: "branches",
        run: branches,
        count: 2_000_000,
        round: 8,
        rest: 3,
        port: false,
    },
    Bench {
        name: "flags",
        run: flags,
        count: 2_000_000,
        round: 9,
        rest: 4,
        port: false,
    },
    Bench {
        name: "pages",
        run: pages,
        count: 2_000_000,
        round: 7,
        rest: 3,
        port: false,
    },
    Bench {
        name: "vector",
        run: vector,
        count: 1_000_000,
        round: 8,
        rest: 7,
        port: false,
    },
    Bench {
        name: "copy",
        run: copy,
        count: 2_000,
        round: 6,
        rest: 3,
        port: false,
    },
    Bench {
        name: "ports",
        run: ports,
        count: 100_000,
        round: 3,
        rest: 3,
        port: true,
    },
];

const SIEVE_LIMIT: u64 = 1 << 20;

/// Bytes that the loops work on, aligned to a page.
pub(crate) const MEMORY_SIZE: usize = 4 << 20;

/// What a loop did.
pub(crate) struct Measured {
    pub(crate) name: &'static str,
    /// What it computed: the same on every CPU.
    pub(crate) result: u64,
    pub(crate) instructions: u64,
    /// By the clock that was given.
    pub(crate) ticks: u64,
}

/// Runs the loops that need nothing but a CPU and, if `ports` says so, the one that needs a port. `rounds` says how many
/// rounds are run of so many.
///
/// # Safety
/// `memory` points to [`MEMORY_SIZE`] bytes that nobody else uses, zeros, aligned to a page. Writing
/// port 0x80 is harmless if `ports` is set. Nobody else runs this at the same time.
pub(crate) unsafe fn run_all(
    memory: *mut u8,
    rounds: impl Fn(u64) -> u64,
    ports: bool,
    now: impl Fn() -> u64,
    mut report: impl FnMut(Measured),
) {
    fill(memory);
    for bench in BENCHES.iter().filter(|bench| ports || !bench.port) {
        let count = rounds(bench.count);
        let start = now();
        // SAFETY: the loops stay inside the memory, whose size they know.
        let result = unsafe { (bench.run)(count, memory) };
        report(Measured {
            name: bench.name,
            result,
            instructions: bench.round * count + bench.rest,
            ticks: now() - start,
        });
    }
    let start = now();
    // SAFETY: as above.
    let (result, instructions) = unsafe { (sieve(SIEVE_LIMIT, memory), sieve_rounds()) };
    report(Measured {
        name: "sieve",
        result,
        instructions,
        ticks: now() - start,
    });
}

/// Gives the first 256 KiB contents, so that the checksums say something.
fn fill(memory: *mut u8) {
    let mut value = 1u64;
    for index in 0..(256 << 10) / 8 {
        value = value
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        // SAFETY: inside the memory.
        unsafe { (memory as *mut u64).add(index).write(value) }
    }
}

/// Arithmetic between registers.
#[unsafe(naked)]
unsafe extern "C" fn alu(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "mov rax, 1",
        "mov rdx, 0x9E3779B97F4A7C15",
        "2:",
        "add rax, rdx",
        "mov rcx, rax",
        "shr rcx, 29",
        "xor rax, rcx",
        "lea rax, [rax + rax * 4 + 11]",
        "rol rax, 17",
        "imul rcx, rdx",
        "sub rax, rcx",
        "dec rdi",
        "jnz 2b",
        "ret",
    )
}

/// Loads and stores over 256 KiB.
#[unsafe(naked)]
unsafe extern "C" fn memory(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "xor eax, eax",
        "xor ecx, ecx",
        "2:",
        "add rax, [rsi + rcx]",
        "mov [rsi + rcx + 8], rax",
        "movzx edx, byte ptr [rsi + rcx + 9]",
        "add [rsi + rcx + 16], rdx",
        "add ecx, 24",
        "and ecx, 0x3FFF8",
        "dec rdi",
        "jnz 2b",
        "ret",
    )
}

/// A call and a return in each round.
#[unsafe(naked)]
unsafe extern "C" fn calls(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "xor eax, eax",
        "2:",
        "call 3f",
        "dec rdi",
        "jnz 2b",
        "ret",
        "3:",
        "lea rax, [rax + rdi]",
        "ret",
    )
}

/// Branches that depend on pseudo-random numbers; both ways are two instructions long.
#[unsafe(naked)]
unsafe extern "C" fn branches(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "xor eax, eax",
        "mov edx, 1",
        "2:",
        "imul edx, edx, 1664525",
        "add edx, 1013904223",
        "test edx, 0x10000",
        "jz 3f",
        "add rax, rdi",
        "jmp 4f",
        "3:",
        "xor rax, rdi",
        "nop",
        "4:",
        "dec rdi",
        "jnz 2b",
        "ret",
    )
}

/// Flags that later instructions use.
#[unsafe(naked)]
unsafe extern "C" fn flags(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "mov rax, 0x123456789ABCDEF",
        "xor ecx, ecx",
        "2:",
        "add rax, rax",
        "adc rcx, 0",
        "cmp rax, rcx",
        "sbb rdx, rdx",
        "sub rax, rdx",
        "cmovo rcx, rax",
        "lea rcx, [rcx + 1]",
        "dec rdi",
        "jnz 2b",
        "lea rax, [rax + rcx]",
        "ret",
    )
}

/// A different page each time, 1024 of them.
#[unsafe(naked)]
unsafe extern "C" fn pages(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "xor eax, eax",
        "xor ecx, ecx",
        "2:",
        "add rax, [rsi + rcx]",
        "inc rax",
        "mov [rsi + rcx], rax",
        "add ecx, 4096 + 64",
        "and ecx, 0x3FFFC0",
        "dec rdi",
        "jnz 2b",
        "ret",
    )
}

/// SSE2 between registers and memory.
#[unsafe(naked)]
unsafe extern "C" fn vector(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "movdqa xmm0, [rsi]",
        "movdqa xmm1, [rsi + 16]",
        "nop",
        "2:",
        "paddd xmm0, [rsi + 32]",
        "pxor xmm1, xmm0",
        "pshufd xmm2, xmm1, 0x4E",
        "psubw xmm0, xmm2",
        "movdqa [rsi], xmm0",
        "paddq xmm1, xmm2",
        "dec rdi",
        "jnz 2b",
        "paddq xmm0, xmm1",
        "movq rax, xmm0",
        "bswap rax",
        "ret",
    )
}

/// Copies of 4 KiB with REP MOVSB.
#[unsafe(naked)]
unsafe extern "C" fn copy(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "mov rdx, rsi",
        "mov rax, rdi",
        "2:",
        "mov rsi, rdx",
        "lea rdi, [rdx + 4096]",
        "mov ecx, 4096",
        "rep movsb",
        "dec rax",
        "jnz 2b",
        "ret",
    )
}

/// Writes to a port that nobody listens to: what an exit to the machine costs.
#[unsafe(naked)]
unsafe extern "C" fn ports(count: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "mov eax, 0x5A",
        "nop",
        "2:",
        "out 0x80, al",
        "dec rdi",
        "jnz 2b",
        "ret"
    )
}

/// Counts the primes below `limit` with a byte for each number. Every instruction is counted in
/// R8, by blocks.
#[unsafe(naked)]
unsafe extern "C" fn sieve(limit: u64, memory: *mut u8) -> u64 {
    naked_asm!(
        "xor eax, eax",
        "mov rcx, rdi",
        "mov rdi, rsi",
        "mov rdx, rcx",
        "rep stosb",
        "mov rcx, 2",
        "mov r8d, 9", // these nine, and the last three less the SETs: see the end
        "xor eax, eax",
        "nop",
        "2:", // for each number
        "add r8, 6",
        "cmp byte ptr [rsi + rcx], 0",
        "jne 4f",
        "add r8, 6",
        "inc rax",
        "mov r9, rcx",
        "imul r9, rcx",
        "cmp r9, rdx",
        "jae 4f",
        "3:", // for each multiple
        "add r8, 5",
        "mov byte ptr [rsi + r9], 1",
        "add r9, rcx",
        "cmp r9, rdx",
        "jb 3b",
        "4:",
        "inc rcx",
        "cmp rcx, rdx",
        "jb 2b",
        "add r8, 3",
        "mov [rip + {rounds}], r8",
        "ret",
        rounds = sym SIEVE_ROUNDS,
    )
}

static mut SIEVE_ROUNDS: u64 = 0;

/// The instructions that the last [`sieve`] took.
unsafe fn sieve_rounds() -> u64 {
    // SAFETY: one CPU; the caller ran the sieve.
    unsafe { (&raw const SIEVE_ROUNDS).read_volatile() }
}
