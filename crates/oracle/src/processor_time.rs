//! Processor time: others on this host must not make a case late, nor a person who stops the process.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

/// Processor time that a process has used; none if it has ended.
pub(crate) fn of_process(process: libc::pid_t) -> Duration {
    let mut clock = 0;
    // SAFETY: the call writes what it is given.
    if unsafe { libc::clock_getcpuclockid(process, &raw mut clock) } != 0 {
        return Duration::ZERO;
    }
    read(clock)
}

/// The clock of a thread's processor time, which other threads may read.
pub(crate) struct ThreadClock(AtomicI32);

impl ThreadClock {
    /// That of the calling thread.
    pub(crate) fn new() -> Self {
        let clock = Self(AtomicI32::new(0));
        clock.take();
        clock
    }

    /// From now on it is that of the calling thread.
    pub(crate) fn take(&self) {
        let mut clock = 0;
        // SAFETY: a thread that runs; the call writes what it is given.
        if unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) } == 0 {
            self.0.store(clock, Ordering::Relaxed);
        }
    }

    /// What the thread has used; none if it has ended.
    pub(crate) fn now(&self) -> Duration {
        read(self.0.load(Ordering::Relaxed))
    }
}

fn read(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes what it is given, and refuses a clock that there is not.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Duration::ZERO;
    }
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_sleeps_takes_no_time() {
        let clock = ThreadClock::new();
        let before = clock.now();
        std::thread::sleep(Duration::from_millis(200));
        assert!(clock.now() - before < Duration::from_millis(100));
    }

    #[test]
    fn other_threads_see_what_a_thread_takes() {
        let (clock, done) = (ThreadClock::new(), std::sync::Barrier::new(2));
        let most = Duration::from_millis(20);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                clock.take();
                while clock.now() < most {}
                done.wait();
                done.wait();
            });
            done.wait();
            assert!(clock.now() >= most);
            done.wait();
        });
    }
}
