//! The host CPU: a child process that runs batches of cases natively.
//!
//! The child may make no system call but those that it waits, ends and returns from signals with (a seccomp filter
//! kills it otherwise, or reports a case that tried). What it may write beside the pages of its arenas lies at addresses that the
//! host chose at random, and no case knows them. When it dies nevertheless, another is started.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::ptr::{addr_of, addr_of_mut, null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::layout::{self, ARENA_BYTES, CONTROL, CONTROL_AT, MONITOR, Region, vector};
use crate::monitor::{control, entries};
use crate::processor_time;

/// Why cases cannot be run natively.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// The host lacks something.
    #[error("the host has no {0}, which running cases natively needs")]
    Host(&'static str),
    /// A call failed.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The child died.
    #[error("the native child died at case {case} of its batch (status {status:#x}, RIP {rip:#x})")]
    Died {
        /// Which case it was at.
        case: usize,
        /// As wait gives it.
        status: i32,
        /// Of the last signal that it took.
        rip: u64,
    },
    /// The child does not answer.
    #[error("the native child does not end case {case} of its batch")]
    Stuck {
        /// Which case it is at.
        case: usize,
    },
}

fn failed(what: &'static str) -> NativeError {
    NativeError::System {
        what,
        source: std::io::Error::last_os_error(),
    }
}

/// What parent and child tell each other.
#[repr(C)]
struct Mailbox {
    /// Counts requests; the child sleeps on it.
    asked: AtomicU32,
    /// Counts answers; the parent sleeps on it.
    answered: AtomicU32,
    /// RIP of the last signal, for a person.
    rip: [AtomicU32; 2],
}

/// Bytes for the mailbox, behind the arenas.
const MAILBOX_BYTES: usize = 4096;
const SHARED_BYTES: usize = ARENA_BYTES + MAILBOX_BYTES;
const SIGNAL_STACK: usize = 256 << 10;

/// A case that takes more of the child's processor time than this does not come to its end.
const PATIENCE: Duration = Duration::from_millis(60);

/// The child process and what it shares with this one.
pub struct Native {
    shared: *mut u8,
    file: i32,
    child: Option<libc::pid_t>,
    modifying: bool,
    working: bool,
    /// Children that died.
    pub deaths: u64,
}

// SAFETY: the pointer is to a mapping that only this object and its child use.
unsafe impl Send for Native {}

/// What the child is, for its signal handler: everything else belongs to the case.
struct Child {
    mailbox: *mut Mailbox,
    resume: u64,
}

static mut CHILD: Child = Child {
    mailbox: null_mut(),
    resume: 0,
};

global_asm!(
    // Calls the monitor (RDI), whose control page is RSI, and restores what it does not keep.
    ".pushsection .text",
    "trapgate_oracle_enter:",
    "    push rbx",
    "    push rbp",
    "    push r12",
    "    push r13",
    "    push r14",
    "    push r15",
    "    rdfsbase rax",
    "    push rax",
    "    rdgsbase rax",
    "    push rax",
    "    sub rsp, 8",
    "    stmxcsr [rsp]",
    "    fnstcw [rsp + 4]",
    "    lea rax, [rip + 2f]",
    "    mov [rsi + {done}], rax",
    "    jmp rdi",
    "2:  fninit",
    "    fldcw [rsp + 4]",
    "    ldmxcsr [rsp]",
    "    add rsp, 8",
    "    pop rax",
    "    wrgsbase rax",
    "    pop rax",
    "    wrfsbase rax",
    "    pop r15",
    "    pop r14",
    "    pop r13",
    "    pop r12",
    "    pop rbp",
    "    pop rbx",
    "    ret",
    // The kernel clears DF and TF for a handler, but not AC.
    "trapgate_oracle_signal:",
    "    pushfq",
    "    and qword ptr [rsp], -0x40001",
    "    popfq",
    "    jmp {handler}",
    ".popsection",
    done = const control::DONE,
    handler = sym on_signal,
);

unsafe extern "C" {
    fn trapgate_oracle_enter(monitor: u64, control: u64);
    fn trapgate_oracle_signal();
}

/// In the child: a case has faulted. Writes down what there is to know and goes back to the monitor.
/// FS is the case's, so nothing here may use thread-local storage.
extern "C" fn on_signal(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context; `CHILD` was written before any case ran; SAVED is memory that the
    // child has mapped for the monitor.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let child = &*addr_of!(CHILD);
        let rip = registers[libc::REG_RIP as usize] as u64;
        (*child.mailbox).rip[0].store(rip as u32, Ordering::Relaxed);
        (*child.mailbox).rip[1].store((rip >> 32) as u32, Ordering::Relaxed);
        if signal == libc::SIGALRM && !layout::is_near(rip) {
            // Between two cases, or outside all.
            return;
        }
        if rip >> 32 == MONITOR >> 32 {
            // The monitor has faulted: a record is wrong.
            libc::syscall(libc::SYS_exit_group, 99);
        }
        let saved = (CONTROL + control::SAVED as u64) as *mut u64;
        const ORDER: [i32; 16] = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (index, register) in ORDER.into_iter().enumerate() {
            saved.add(index).write(registers[register as usize] as u64);
        }
        saved
            .add(16)
            .write(registers[libc::REG_EFL as usize] as u64);
        saved.add(17).write(rip);
        let trap = registers[libc::REG_TRAPNO as usize] as u64;
        let (vector, error, address) = match signal {
            libc::SIGALRM => (vector::TIMEOUT, 0, 0),
            libc::SIGSYS => (vector::SYSTEM_CALL, 0, 0),
            libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL | libc::SIGTRAP => {
                let error = registers[libc::REG_ERR as usize] as u64;
                let address = registers[libc::REG_CR2 as usize] as u64;
                // What is pushed with these; the kernel leaves an old value otherwise.
                let has_code = 0x6022_7d00u64 >> trap & 1 != 0;
                (
                    trap,
                    if has_code { error } else { 0 },
                    if trap == 14 { address } else { 0 },
                )
            }
            _ => (vector::SIGNAL, signal as u64, 0),
        };
        saved.add(18).write(vector);
        saved.add(19).write(error);
        saved.add(20).write(address);
        let segments = registers[libc::REG_CSGSFS as usize] as u64;
        saved.add(24).write(segments & 0xffff);
        saved.add(25).write(segments >> 48);
        registers[libc::REG_CSGSFS as usize] =
            (0x2b << 48 | segments << 16 >> 32 << 16 | 0x33) as i64;
        registers[libc::REG_RIP as usize] = child.resume as i64;
        registers[libc::REG_EFL as usize] = 0x202;
        registers[libc::REG_RSP as usize] = (CONTROL + control::STACK_TOP as u64) as i64;
    }
}

/// Whether the host can be asked.
///
/// # Errors
/// [`NativeError::Host`].
pub fn usable() -> Result<(), NativeError> {
    // SAFETY: reads the auxiliary vector. Bit 1 of AT_HWCAP2 is FSGSBASE.
    let fsgsbase = unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0;
    if !fsgsbase {
        return Err(NativeError::Host("FSGSBASE for programs"));
    }
    if !std::is_x86_feature_detected!("xsave") {
        return Err(NativeError::Host("XSAVE"));
    }
    Ok(())
}

impl Native {
    /// A child that waits for cases. `modifying`: they may write their code.
    ///
    /// # Errors
    /// [`NativeError`].
    pub fn new(modifying: bool) -> Result<Self, NativeError> {
        usable()?;
        // SAFETY: a new file and a new mapping of it.
        let (file, shared) = unsafe {
            let file = libc::memfd_create(c"trapgate-oracle".as_ptr(), libc::MFD_CLOEXEC);
            if file < 0 || libc::ftruncate(file, SHARED_BYTES as i64) != 0 {
                return Err(failed("make memory to share with the native child"));
            }
            let shared = libc::mmap(
                null_mut(),
                SHARED_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file,
                0,
            );
            if shared == libc::MAP_FAILED {
                return Err(failed("map memory to share with the native child"));
            }
            (file, shared.cast::<u8>())
        };
        let mut native = Self {
            shared,
            file,
            child: None,
            modifying,
            working: false,
            deaths: 0,
        };
        native.start()?;
        Ok(native)
    }

    fn mailbox(&self) -> &Mailbox {
        // SAFETY: the mapping is larger, and what lies there is only atomics.
        unsafe { &*self.shared.add(ARENA_BYTES).cast::<Mailbox>() }
    }

    /// The memory of the arena. Not while the child works.
    pub fn arena(&mut self) -> &mut [u8] {
        assert!(!self.working, "the native child works");
        // SAFETY: in bounds; the child touches the arena only while it works, and this borrows all of `self`.
        unsafe { std::slice::from_raw_parts_mut(self.shared, ARENA_BYTES) }
    }

    fn start(&mut self) -> Result<(), NativeError> {
        let mailbox = self.mailbox();
        mailbox
            .answered
            .store(mailbox.asked.load(Ordering::SeqCst), Ordering::SeqCst);
        let regions = layout::regions(self.modifying);
        // SAFETY: getpid has no conditions.
        let parent = unsafe { libc::getpid() };
        // SAFETY: the child does nothing that other threads' locks could stop: no allocation, system calls only.
        match unsafe { libc::fork() } {
            -1 => Err(failed("start the native child")),
            // SAFETY: this is the child.
            0 => unsafe { live(self.shared, self.file, &regions, parent) },
            child => {
                self.child = Some(child);
                Ok(())
            }
        }
    }

    /// Lets the child run what lies in the arena, whose control page says how many cases.
    ///
    /// # Errors
    /// [`NativeError`] if no child can be started.
    pub fn begin(&mut self) -> Result<(), NativeError> {
        if self.child.is_none() {
            self.start()?;
        }
        self.working = true;
        let mailbox = self.mailbox();
        mailbox.asked.fetch_add(1, Ordering::SeqCst);
        wake(&mailbox.asked);
        Ok(())
    }

    /// Cases yet to run.
    fn left(&self) -> u64 {
        let at = CONTROL_AT + control::COUNT;
        // SAFETY: in bounds and aligned; the child may change it meanwhile.
        unsafe { self.shared.add(at).cast::<u64>().read_volatile() }
    }

    /// Waits for what [`Self::begin`] began, of `cases` cases.
    ///
    /// # Errors
    /// [`NativeError::Died`], after which another child runs the next batch.
    pub fn wait(&mut self, cases: usize) -> Result<(), NativeError> {
        if !std::mem::take(&mut self.working) {
            return Ok(());
        }
        let mut seen = None;
        loop {
            let mailbox = self.mailbox();
            let answered = mailbox.answered.load(Ordering::SeqCst);
            if answered == mailbox.asked.load(Ordering::SeqCst) {
                return Ok(());
            }
            sleep(&mailbox.answered, answered, Duration::from_millis(20));
            let child = self.child.expect("it was started by `begin`");
            let mut status = 0;
            // SAFETY: waits for a child of this process.
            if unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == child {
                self.child = None;
                self.deaths += 1;
                let rip = &self.mailbox().rip;
                let half = |index: usize| u64::from(rip[index].load(Ordering::Relaxed));
                return Err(NativeError::Died {
                    case: cases - (self.left() as usize).min(cases),
                    status,
                    rip: half(0) | half(1) << 32,
                });
            }
            let (left, now) = (self.left(), processor_time::of_process(child));
            let since = match seen {
                Some((before, since)) if before == left => now.saturating_sub(since),
                _ => {
                    seen = Some((left, now));
                    Duration::ZERO
                }
            };
            if since > 20 * PATIENCE {
                self.kill();
                return Err(NativeError::Stuck {
                    case: cases - (left as usize).min(cases),
                });
            } else if since > PATIENCE {
                // SAFETY: a signal to a child of this process that has not been waited for.
                unsafe { libc::kill(child, libc::SIGALRM) };
            }
        }
    }

    fn kill(&mut self) {
        if let Some(child) = self.child.take() {
            // SAFETY: a child of this process that has not been waited for.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, null_mut(), 0);
            }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: nobody uses the mapping or the file any more.
        unsafe {
            libc::munmap(self.shared.cast(), SHARED_BYTES);
            libc::close(self.file);
        }
    }
}

fn wake(word: &AtomicU32) {
    // SAFETY: the word lives; FUTEX_WAKE only looks at its address.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

fn sleep(word: &AtomicU32, value: u32, most: Duration) {
    let most = libc::timespec {
        tv_sec: most.as_secs() as i64,
        tv_nsec: most.subsec_nanos().into(),
    };
    // SAFETY: word and time live during the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            &raw const most,
        )
    };
}

/// Ends a child that could not be set up.
fn give_up(code: i32) -> ! {
    // SAFETY: ends this process.
    unsafe { libc::_exit(code) }
}

/// The child's life: maps its arenas, confines itself, and runs what it is asked to.
///
/// # Safety
/// To be called in a new process, with memory that is [`SHARED_BYTES`] long and backed by `file`.
unsafe fn live(shared: *mut u8, file: i32, regions: &[Region], parent: libc::pid_t) -> ! {
    // SAFETY: this process has one thread, this one. Mappings and what is unmapped are nothing that it goes on to use: what
    // lies below 4 GiB is the translator's, and the rest are addresses that the layout chose.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent {
            give_up(90);
        }
        // Cases would find the translator's code, by a segment's base or any address made up.
        libc::munmap(layout::EXIT as *mut _, (1 << 32) - layout::EXIT as usize);
        for region in regions {
            let mut protection = libc::PROT_READ;
            if region.writable {
                protection |= libc::PROT_WRITE;
            }
            if region.executable {
                protection |= libc::PROT_EXEC;
            }
            let mapped = libc::mmap(
                region.linear as *mut _,
                region.length,
                protection,
                // All pages at once: a fault's error code tells whether a page was there.
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE,
                file,
                region.offset as i64,
            );
            if mapped as u64 != region.linear {
                give_up(91);
            }
        }
        let stack = libc::mmap(
            null_mut(),
            SIGNAL_STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let stack = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: SIGNAL_STACK,
        };
        if libc::sigaltstack(&raw const stack, null_mut()) != 0 {
            give_up(92);
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = trapgate_oracle_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGALRM,
        ] {
            if libc::sigaction(signal, &raw const action, null_mut()) != 0 {
                give_up(93);
            }
        }
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, null_mut());
        let mailbox = shared.add(ARENA_BYTES).cast::<Mailbox>();
        let child = addr_of_mut!(CHILD);
        (*child).mailbox = mailbox;
        (*child).resume = MONITOR + entries().resume;
        confine();
        let mailbox = &*mailbox;
        let mut done = mailbox.answered.load(Ordering::SeqCst);
        loop {
            let asked = mailbox.asked.load(Ordering::SeqCst);
            if asked == done {
                libc::syscall(
                    libc::SYS_futex,
                    mailbox.asked.as_ptr(),
                    libc::FUTEX_WAIT,
                    asked,
                    null::<libc::timespec>(),
                );
                continue;
            }
            trapgate_oracle_enter(MONITOR, CONTROL);
            done = asked;
            mailbox.answered.store(done, Ordering::SeqCst);
            wake(&mailbox.answered);
        }
    }
}

/// Leaves this process no system calls but waiting, ending, and returning from a signal.
///
/// # Safety
/// For the child only.
unsafe fn confine() {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    let load = |offset: u32| libc::sock_filter {
        code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
        jt: 0,
        jf: 0,
        k: offset,
    };
    let equal = |k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    };
    let answer = |k: u32| libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut filter = [
        // struct seccomp_data: number, then architecture.
        load(4),
        equal(AUDIT_ARCH_X86_64, 0, 5),
        load(0),
        equal(libc::SYS_futex as u32, 2, 0),
        equal(libc::SYS_rt_sigreturn as u32, 1, 0),
        equal(libc::SYS_exit_group as u32, 0, 1),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(libc::SECCOMP_RET_TRAP),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the filter lives during the calls.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) != 0
        {
            give_up(94);
        }
    }
}
