//! A thread that kicks a running processor again and again, as a machine's other threads do.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use trapgate_engine::{Signal, Signals};

/// Time between two kicks.
const PERIOD: Duration = Duration::from_micros(500);

static WATCHED: LazyLock<Mutex<Option<Arc<Signals>>>> = LazyLock::new(|| {
    thread::spawn(|| {
        loop {
            thread::sleep(PERIOD);
            if let Some(signals) = &*lock() {
                signals.raise(Signal::Kick);
            }
        }
    });
    Mutex::default()
});

fn lock() -> std::sync::MutexGuard<'static, Option<Arc<Signals>>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kicks as long as it lives.
pub struct Watched(());

/// Starts to kick.
pub fn kick(signals: &Arc<Signals>) -> Watched {
    *lock() = Some(Arc::clone(signals));
    Watched(())
}

impl Drop for Watched {
    fn drop(&mut self) {
        *lock() = None;
    }
}
