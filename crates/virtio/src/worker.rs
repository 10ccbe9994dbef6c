//! A device's own thread, which works in steps and can be stopped between any two.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::lock;

/// What a thread works on.
pub(crate) trait Job: Send + 'static {
    /// What only the thread itself touches, without a lock.
    type Outside: Send + 'static;

    /// Does a bounded piece of work; whether there may be more.
    fn step(&mut self, outside: &mut Self::Outside) -> bool;

    /// Comes after each step, without the lock: here a job may wait for the host.
    fn after_step(_outside: &mut Self::Outside) {}
}

struct Desk<J> {
    job: J,
    paused: bool,
}

#[derive(Default)]
struct Progress {
    stopped: bool,
    /// Between taking a kick and waiting for the next.
    busy: bool,
    /// In [`Job::after_step`].
    outside: bool,
}

pub(crate) struct Shared<J> {
    desk: Mutex<Desk<J>>,
    /// How many others want the desk: the thread steps aside for them, since a lock that is taken
    /// again at once is not fair.
    visitors: AtomicUsize,
    kicked: AtomicBool,
    progress: Mutex<Progress>,
    /// Kicked, or stopped.
    wake: Condvar,
    /// No longer busy.
    idle: Condvar,
}

impl<J: Job> Shared<J> {
    /// Says that there may be work.
    pub(crate) fn kick(&self) {
        if !self.kicked.swap(true, Ordering::AcqRel) {
            // With the lock the thread either has not yet looked, or already waits.
            drop(lock(&self.progress));
            self.wake.notify_one();
        }
    }

    /// Works on the job between two of its steps. The thread is not told: see [`Self::kick`].
    pub(crate) fn visit<R>(&self, visit: impl FnOnce(&mut J) -> R) -> R {
        self.visit_desk(|desk| visit(&mut desk.job))
    }

    fn visit_desk<R>(&self, visit: impl FnOnce(&mut Desk<J>) -> R) -> R {
        self.visitors.fetch_add(1, Ordering::AcqRel);
        let mut desk = lock(&self.desk);
        self.visitors.fetch_sub(1, Ordering::AcqRel);
        visit(&mut desk)
    }

    /// Waits on `condition` until `ready` gives something.
    pub(crate) fn wait<R>(
        &self,
        condition: &Condvar,
        mut ready: impl FnMut(&mut J) -> Option<R>,
    ) -> R {
        let mut desk = lock(&self.desk);
        loop {
            if let Some(result) = ready(&mut desk.job) {
                return result;
            }
            desk = condition.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// After this no step runs, until [`Self::resume`].
    pub(crate) fn pause(&self) {
        self.visit_desk(|desk| desk.paused = true);
    }

    pub(crate) fn resume(&self) {
        self.visit_desk(|desk| desk.paused = false);
        self.kick();
    }

    /// Waits until there is nothing left to do; `false` if that takes longer than `timeout`.
    pub(crate) fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        self.kick();
        let mut progress = lock(&self.progress);
        while progress.busy || self.kicked.load(Ordering::Acquire) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || progress.stopped {
                return false;
            }
            progress = self
                .idle
                .wait_timeout(progress, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Waits for a kick; `false` when the thread is to end.
    fn wait_for_kick(&self) -> bool {
        let mut progress = lock(&self.progress);
        progress.busy = false;
        loop {
            if progress.stopped {
                self.idle.notify_all();
                return false;
            }
            if self.kicked.swap(false, Ordering::AcqRel) {
                progress.busy = true;
                return true;
            }
            self.idle.notify_all();
            progress = self
                .wake
                .wait(progress)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self, outside: &mut J::Outside) {
        while self.wait_for_kick() {
            loop {
                let more = {
                    let mut desk = lock(&self.desk);
                    // Whoever resumes kicks.
                    !desk.paused && desk.job.step(outside)
                };
                {
                    let mut progress = lock(&self.progress);
                    if progress.stopped {
                        return;
                    }
                    progress.outside = true;
                }
                J::after_step(outside);
                lock(&self.progress).outside = false;
                if !more {
                    break;
                }
                while self.visitors.load(Ordering::Acquire) > 0 {
                    thread::yield_now();
                }
            }
        }
    }
}

/// A thread with its job. Dropping it stops the thread after its present step.
pub(crate) struct Worker<J: Job> {
    shared: Arc<Shared<J>>,
    thread: Option<JoinHandle<()>>,
}

impl<J: Job> Worker<J> {
    /// Starts a thread; `name` has 15 bytes at most (Linux cuts the rest).
    pub(crate) fn start(name: &str, job: J, mut outside: J::Outside) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            desk: Mutex::new(Desk { job, paused: false }),
            visitors: AtomicUsize::new(0),
            kicked: AtomicBool::new(false),
            progress: Mutex::default(),
            wake: Condvar::new(),
            idle: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || of_thread.run(&mut outside))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<J>> {
        &self.shared
    }
}

impl<J: Job> std::ops::Deref for Worker<J> {
    type Target = Shared<J>;

    fn deref(&self) -> &Shared<J> {
        &self.shared
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        self.pause();
        let waits_for_host = {
            let mut progress = lock(&self.progress);
            progress.stopped = true;
            progress.outside
        };
        self.wake.notify_all();
        self.idle.notify_all();
        if let Some(thread) = self.thread.take()
            && !waits_for_host
        {
            // A thread that waits for the host (a pipe that no one reads) is left behind: it can
            // touch neither the job nor guest memory any more. An error is a panic, which has
            // been reported.
            let _ = thread.join();
        }
    }
}
