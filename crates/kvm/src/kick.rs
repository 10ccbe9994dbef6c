//! How other threads get a vCPU out of the guest.
//!
//! A signal makes KVM_RUN return. If it comes just before KVM_RUN it would be lost, so that the
//! signal's handler sets `immediate_exit` in the page that the kernel looks at
//! (`Documentation/virt/kvm/api.rst`, `immediate_exit`).
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering, fence};

use kvm_ioctls::VcpuFd;

use crate::calls;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, or null. Needs neither to be
    /// initialised nor dropped, so that a signal handler may read it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// A real-time signal that the C library leaves to programs and that nobody here uses otherwise.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn handle(_signal: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Running` keeps this pointer here only while the vCPU's page is mapped, and clears
        // it on this same thread, which is in this handler now.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Relaxed);
    }
}

/// Calls `enter` with a signal that waits for this thread and is blocked everywhere but in the kernel's
/// KVM_RUN (KVM_SET_SIGNAL_MASK), so that a KVM_RUN in it does what comes before the guest and
/// leaves the guest alone.
pub(crate) fn with_signal_waiting<R>(vcpu: &OwnedFd, enter: impl FnOnce() -> R) -> io::Result<R> {
    // SAFETY: the sets are locals that the calls initialise; only this thread's mask changes, and it is
    // put back; the signal has a handler, and is taken away before it is unblocked.
    unsafe {
        let mut ours: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut ours);
        libc::sigaddset(&raw mut ours, signal());
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const ours, &raw mut before);
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal());
        let only_ours = !(1u64 << (signal() - 1));
        let result = calls::set_signal_mask(vcpu, Some(only_ours)).map(|()| enter());
        let unset = calls::set_signal_mask(vcpu, None);
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        libc::sigtimedwait(&raw const ours, ptr::null_mut(), &raw const none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        unset.and(result)
    }
}

/// Installs the handler, once in the process.
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: zero bytes are a valid `sigaction`; the handler only reads a thread-local and
        // stores a byte, which is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal(), &raw const action, ptr::null_mut());
        }
    });
}

/// The thread that runs a vCPU, if one does.
#[derive(Debug, Default)]
pub(crate) struct Kick {
    thread: AtomicI32,
}

impl Kick {
    /// Gets the vCPU out of the guest, if it is there. The caller has told before, by a word that
    /// the vCPU's thread looks at, what for.
    pub(crate) fn kick(&self) {
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: sends a signal that has a handler. If the thread has left the guest meanwhile,
            // or ended and its number is another's of this process, the handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    /// This thread is about to run the vCPU, until what is returned is dropped.
    pub(crate) fn enter(&self, vcpu: &mut VcpuFd) -> Running<'_> {
        install();
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        // SAFETY: the set is a local, initialised by `sigemptyset`; only this thread's mask changes.
        let thread = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
            libc::gettid()
        };
        self.thread.store(thread, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Running { kick: self }
    }
}

/// A thread runs a vCPU.
pub(crate) struct Running<'a> {
    kick: &'a Kick,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.kick.thread.store(0, Ordering::SeqCst);
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Gets this thread's vCPU out of the guest after a time.
#[derive(Debug)]
pub(crate) struct Alarm {
    timer: libc::timer_t,
    thread: i32,
}

// SAFETY: the kernel's name of a timer means the same on every thread of the process.
unsafe impl Send for Alarm {}

impl Alarm {
    /// An alarm for the thread that calls this.
    pub(crate) fn new() -> io::Result<Self> {
        install();
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: zero bytes are a valid `sigevent`; both structures live; the signal has a handler.
        let (made, thread) = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal();
            event.sigev_notify_thread_id = libc::gettid();
            let made = libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer);
            (made, event.sigev_notify_thread_id)
        };
        if made != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { timer, thread })
    }

    /// Whether it is this thread's.
    pub(crate) fn is_mine(&self) -> bool {
        // SAFETY: asks for a number.
        self.thread == unsafe { libc::gettid() }
    }

    /// Goes off once, in this many nanoseconds, less than a second; never, for 0.
    pub(crate) fn set(&self, nanoseconds: u32) {
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let time = libc::itimerspec {
            it_interval: zero,
            it_value: libc::timespec {
                tv_nsec: nanoseconds.into(),
                ..zero
            },
        };
        // SAFETY: the timer is ours until it is dropped; the structure lives. With valid arguments
        // it does not fail.
        unsafe { libc::timer_settime(self.timer, 0, &raw const time, ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours, and nobody has it any more.
        unsafe { libc::timer_delete(self.timer) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stray_kick_is_harmless() {
        install();
        let kick = Kick::default();
        kick.kick();
        // SAFETY: asks for a number.
        kick.thread
            .store(unsafe { libc::gettid() }, Ordering::SeqCst);
        kick.kick();
        assert!(IMMEDIATE_EXIT.get().is_null());
    }
}
