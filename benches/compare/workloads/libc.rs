//! What the standard library does not offer of the C library it is linked with.

use std::ffi::{c_int, c_uint, c_void};

pub(crate) const PROT_READ: c_int = 1;
pub(crate) const PROT_WRITE: c_int = 2;
pub(crate) const MAP_PRIVATE: c_int = 2;
pub(crate) const MAP_ANONYMOUS: c_int = 0x20;
pub(crate) const MADV_NOHUGEPAGE: c_int = 15;
pub(crate) const SIGKILL: c_int = 9;
pub(crate) const CLOCK_MONOTONIC: c_int = 1;

/// `struct timespec`.
#[repr(C)]
pub(crate) struct Timespec {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: i64,
}

unsafe extern "C" {
    pub(crate) fn mmap(
        address: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        file: c_int,
        offset: i64,
    ) -> *mut c_void;
    pub(crate) fn munmap(address: *mut c_void, length: usize) -> c_int;
    pub(crate) fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    pub(crate) fn fork() -> c_int;
    pub(crate) fn waitpid(process: c_int, status: *mut c_int, options: c_int) -> c_int;
    pub(crate) fn _exit(status: c_int) -> !;
    pub(crate) fn pipe(ends: *mut c_int) -> c_int;
    pub(crate) fn read(file: c_int, to: *mut c_void, count: usize) -> isize;
    pub(crate) fn write(file: c_int, from: *const c_void, count: usize) -> isize;
    pub(crate) fn close(file: c_int) -> c_int;
    pub(crate) fn alarm(seconds: c_uint) -> c_uint;
    pub(crate) fn kill(process: c_int, signal: c_int) -> c_int;
    pub(crate) fn sched_getcpu() -> c_int;
    pub(crate) fn sched_setaffinity(process: c_int, size: usize, set: *const u64) -> c_int;
    pub(crate) fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now() -> u64 {
    let mut time = Timespec {
        seconds: 0,
        nanoseconds: 0,
    };
    // SAFETY: `time` is ours, and of the type that the call fills.
    unsafe { clock_gettime(CLOCK_MONOTONIC, &raw mut time) };
    time.seconds as u64 * 1_000_000_000 + time.nanoseconds as u64
}

/// Keeps this process and its children on one processor, as in a guest that has but one: with several,
/// processes that wait for each other would be woken on another one.
pub(crate) fn stay_on_one_processor() {
    // SAFETY: takes nothing.
    let cpu = unsafe { sched_getcpu() };
    let mut set = [0_u64; 16];
    let Ok(cpu) = usize::try_from(cpu) else {
        return;
    };
    if let Some(word) = set.get_mut(cpu / 64) {
        *word = 1 << (cpu % 64);
        // SAFETY: the set has the size that is given. Where it fails the process may wander.
        unsafe { sched_setaffinity(0, size_of_val(&set), set.as_ptr()) };
    }
}
