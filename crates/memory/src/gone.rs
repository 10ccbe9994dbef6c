//! Pages of a mapped file that are gone: somebody cut the file short, or its disk fails.
//!
//! The host tells whoever touches one by SIGBUS (signal(7)), which ends the process: without a word, and with the
//! terminal as the guest left it. So a handler tells the [`Watch`] over that memory, whose owner can end in order. The
//! thread that touched the page stands still for good: whatever it read instead, it might write to a disk. A SIGBUS
//! anywhere else does what it did before.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use crate::access::HostAddress;

/// Ranges that can be watched at once. Others are left to the host.
const MOST: usize = 64;
/// What is added to the event when a page is gone, and when nobody is to wait any more.
const GONE: u64 = 1;
const OVER: u64 = 1 << 32;

/// A range as the handler finds it: it may interrupt anything, so there are no locks.
struct Range {
    /// Host address; 0: nobody watches.
    start: AtomicUsize,
    end: AtomicUsize,
    /// An eventfd.
    event: AtomicI32,
}

static RANGES: [Range; MOST] = [const {
    Range {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        event: AtomicI32::new(-1),
    }
}; MOST];

/// Watches over guest memory that is mapped from a file.
#[derive(Debug)]
pub struct Watch {
    /// Indices in [`RANGES`].
    ranges: Vec<usize>,
    event: File,
}

impl Watch {
    /// Watches over ranges, given with their length in bytes. They are to stay mapped while it lives.
    pub(crate) fn over(ranges: impl Iterator<Item = (HostAddress, u64)>) -> io::Result<Self> {
        install();
        // SAFETY: it makes a descriptor.
        let event = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if event < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut watch = Self {
            ranges: Vec::new(),
            // SAFETY: it was made above, and belongs to nobody else.
            event: unsafe { File::from_raw_fd(event) },
        };
        for (host, length) in ranges {
            let start = host.as_ptr().addr();
            let free = RANGES.iter().position(|range| {
                let order = Ordering::Acquire;
                let taken = range.start.compare_exchange(0, start, order, order);
                taken.is_ok()
            });
            let Some(index) = free else { break };
            watch.ranges.push(index);
            RANGES[index].event.store(event, Ordering::Relaxed);
            // Last: until then there is nothing in it.
            let end = start + length as usize;
            RANGES[index].end.store(end, Ordering::Release);
        }
        Ok(watch)
    }

    /// Waits until a thread touched a page that is gone (`true`), and stands still since; or for [`Self::end`]
    /// (`false`). For one thread.
    pub fn wait(&self) -> bool {
        let mut count = [0; 8];
        // It fails for no reason but signals, which `read_exact` is not told of.
        let read = (&self.event).read_exact(&mut count);
        read.is_ok() && u64::from_ne_bytes(count) % OVER != 0
    }

    /// Lets who waits go.
    pub fn end(&self) {
        // It fails if it was called four billion times.
        let _ = (&self.event).write_all(&OVER.to_ne_bytes());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for &index in &self.ranges {
            let Range { start, end, event } = &RANGES[index];
            end.store(0, Ordering::Relaxed);
            event.store(-1, Ordering::Relaxed);
            start.store(0, Ordering::Release);
        }
    }
}

/// Takes SIGBUS for the process, once.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: zero bytes are a valid `sigaction`. The handler makes system calls and looks at atomics, which a
        // handler may. It runs on the stack that Rust gives every thread for signals: guest code may have any.
        // It can fail only for a signal that may not be taken.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
        }
    });
}

extern "C" fn handle(
    signal: libc::c_int,
    information: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives it, and SIGBUS has an address.
    let (address, code) = unsafe { ((*information).si_addr().addr(), (*information).si_code) };
    // One that somebody sent has none.
    let event = (code > 0).then(|| watched(address)).flatten();
    // SAFETY: system calls that a handler may make; the buffer is as long as is said. At the end the access is repeated,
    // or the signal sent again, and ends the process.
    unsafe {
        if let Some(event) = event {
            let gone = GONE;
            libc::write(event, (&raw const gone).cast(), size_of::<u64>());
            loop {
                libc::pause();
            }
        }
        libc::signal(signal, libc::SIG_DFL);
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

/// The event of the range that has a host address.
fn watched(address: usize) -> Option<i32> {
    let range = RANGES.iter().find(|range| {
        let end = range.end.load(Ordering::Acquire);
        (range.start.load(Ordering::Relaxed)..end).contains(&address)
    })?;
    Some(range.event.load(Ordering::Relaxed))
}
