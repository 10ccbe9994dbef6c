//! The judge: runs one instruction natively, unchanged, with every register of the guest in its
//! host register, and reports all registers after it. Nothing here shares code with the thunks.
#![allow(unsafe_code, dead_code, unreachable_pub)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use iced_x86::{Encoder, Instruction, Register};

/// Everything a user-mode instruction can change.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub gpr: [u64; 16],
    pub flags: u64,
    pub mxcsr: u32,
    pub vector: [[u8; 32]; 16],
    pub x87: [u8; 160],
    pub memory: [u8; MEMORY],
    /// An unmasked SIMD floating-point exception was raised.
    pub simd_exception: bool,
}

/// Bytes of memory operand.
pub const MEMORY: usize = 128;

const SIZE: usize = 64 << 10;
// Offsets in the mapping; code comes first.
const GPR: usize = 0x8000;
const FLAGS: usize = 0x8080;
const MXCSR: usize = 0x8088;
const HOST_MXCSR: usize = 0x808c;
const HOST_CONTROL_WORD: usize = 0x8090;
const HOST_RSP: usize = 0x8098;
const VECTOR: usize = 0x8100;
const X87: usize = 0x8400;
const OPERAND: usize = 0x8800;

/// A lock on the only judge: its signal handler is the process's.
pub struct Oracle {
    base: usize,
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());
static BASE: OnceLock<usize> = OnceLock::new();
static RESUME: AtomicU64 = AtomicU64::new(0);
static RAISED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_sigfpe(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let resume = RESUME.load(Ordering::SeqCst);
    if resume == 0 {
        // Not ours: the test dies of it.
        // SAFETY: the default action takes no handler.
        unsafe { libc::signal(libc::SIGFPE, libc::SIG_DFL) };
        return;
    }
    RAISED.store(true, Ordering::SeqCst);
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid context to an SA_SIGINFO handler.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_RIP as usize] = resume as i64 };
}

struct Code {
    bytes: Vec<u8>,
    base: usize,
}

impl Code {
    fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// `opcode reg, [rip → offset in the mapping]`
    fn with(&mut self, opcode: &[u8], register: usize, target: usize) {
        self.raw(opcode);
        self.bytes.push(((register & 7) << 3 | 5) as u8);
        let next = self.bytes.len() + 4;
        self.raw(&(target as i32 - next as i32).to_le_bytes());
    }

    fn gpr(&mut self, opcode: u8, register: usize) {
        self.with(
            &[0x48 | (register >> 3 << 2) as u8, opcode],
            register,
            GPR + 8 * register,
        );
    }

    fn ymm(&mut self, opcode: u8, register: usize) {
        let second = if register < 8 { 0xfc } else { 0x7c };
        self.with(&[0xc5, second, opcode], register, VECTOR + 32 * register);
    }
}

impl Oracle {
    pub fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: a new mapping, and a handler that only touches atomics and its context.
        let base = *BASE.get_or_init(|| unsafe {
            let address = libc::mmap(
                core::ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(address, libc::MAP_FAILED);
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = on_sigfpe as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(
                libc::sigaction(libc::SIGFPE, &action, core::ptr::null_mut()),
                0
            );
            address as usize
        });
        // The guest's RSP is anything, so signals need a stack of their own on this thread.
        // SAFETY: the stack is leaked, so it outlives the thread.
        unsafe {
            let stack = Box::leak(vec![0_u8; 256 << 10].into_boxed_slice());
            let stack = libc::stack_t {
                ss_sp: stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: stack.len(),
            };
            assert_eq!(libc::sigaltstack(&stack, core::ptr::null_mut()), 0);
        }
        Self { base, _turn: turn }
    }

    /// Encodes `instruction` with the oracle's memory as its memory operand, if it has one.
    pub fn place(&self, instruction: &Instruction) -> Result<Vec<u8>, iced_x86::IcedError> {
        // The address is fixed so that the same bytes can be decoded and run.
        let mut placed = *instruction;
        if placed.memory_base() == Register::RIP {
            placed.set_memory_displacement64((self.base + OPERAND) as u64);
            placed.set_memory_displ_size(8);
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&placed, (self.base + INSTRUCTION) as u64)?;
        Ok(encoder.take_buffer())
    }

    pub fn address(&self) -> u64 {
        (self.base + INSTRUCTION) as u64
    }

    /// Runs `bytes` on `state`, natively.
    pub fn run(&mut self, bytes: &[u8], state: &State) -> State {
        let mut code = Code {
            bytes: Vec::new(),
            base: self.base,
        };
        code.raw(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
        code.with(&[0x48, 0x89], 4, HOST_RSP);
        code.with(&[0x0f, 0xae], 3, HOST_MXCSR);
        code.with(&[0xd9], 7, HOST_CONTROL_WORD);
        code.with(&[0x48, 0x0f, 0xae], 1, X87);
        code.with(&[0x0f, 0xae], 2, MXCSR);
        for register in 0..16 {
            code.ymm(0x10, register);
        }
        code.with(&[0xff], 6, FLAGS);
        code.raw(&[0x9d]);
        for register in 0..16 {
            code.gpr(0x8b, register);
        }
        assert!(code.bytes.len() <= INSTRUCTION);
        code.bytes.resize(INSTRUCTION, 0x90);
        code.raw(bytes);
        let after = code.bytes.len();
        for register in 0..16 {
            code.gpr(0x89, register);
        }
        code.with(&[0x48, 0x8b], 4, HOST_RSP);
        code.raw(&[0x9c]);
        code.with(&[0x8f], 0, FLAGS);
        for register in 0..16 {
            code.ymm(0x11, register);
        }
        code.with(&[0x0f, 0xae], 3, MXCSR);
        code.with(&[0x48, 0x0f, 0xae], 0, X87);
        code.raw(&[0xdb, 0xe3]);
        code.with(&[0xd9], 5, HOST_CONTROL_WORD);
        code.with(&[0x0f, 0xae], 2, HOST_MXCSR);
        code.raw(&[0xc5, 0xf8, 0x77]);
        code.raw(&[
            0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3,
        ]);

        let at = |offset: usize| (code.base + offset) as *mut u8;
        let mut result = state.clone();
        // SAFETY: the offsets are within the mapping, which only the holder of the turn uses; the
        // code restores every register that the ABI wants kept.
        unsafe {
            core::ptr::copy_nonoverlapping(code.bytes.as_ptr(), at(0), code.bytes.len());
            at(GPR).cast::<[u64; 16]>().write(state.gpr);
            at(FLAGS).cast::<u64>().write(state.flags & 0x8d5 | 0x202);
            at(MXCSR).cast::<u32>().write(state.mxcsr);
            at(VECTOR).cast::<[[u8; 32]; 16]>().write(state.vector);
            core::ptr::write_bytes(at(X87), 0, 512);
            at(X87).cast::<[u8; 160]>().write(state.x87);
            at(X87 + 24).cast::<u32>().write(0x1f80);
            at(OPERAND).cast::<[u8; MEMORY]>().write(state.memory);
            RAISED.store(false, Ordering::SeqCst);
            RESUME.store((code.base + after) as u64, Ordering::SeqCst);
            let entry: extern "sysv64" fn() = core::mem::transmute(at(0));
            entry();
            RESUME.store(0, Ordering::SeqCst);
            result.gpr = at(GPR).cast::<[u64; 16]>().read();
            result.flags = state.flags & !0x8d5 | at(FLAGS).cast::<u64>().read() & 0x8d5;
            result.mxcsr = at(MXCSR).cast::<u32>().read();
            result.vector = at(VECTOR).cast::<[[u8; 32]; 16]>().read();
            result.x87 = at(X87).cast::<[u8; 160]>().read();
            result.memory = at(OPERAND).cast::<[u8; MEMORY]>().read();
        }
        result.simd_exception = RAISED.load(Ordering::SeqCst);
        result
    }
}

/// Where the instruction lies in the mapping.
const INSTRUCTION: usize = 0x400;
