//! The stock image, fetched while the person can see it and interrupt it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use trapgate_image::{CacheDir, ImageError, Phase, StockImage, stock};

use crate::event::Event;
use crate::failure::Failure;
use crate::progress::Progress;

/// How long an interrupted fetch may take to clean up after itself.
const GRACE: Duration = Duration::from_secs(5);

/// How a fetch ended, as an [`Event`].
pub(crate) type Fetched = Result<Result<StockImage, ImageError>, Box<dyn Any + Send>>;

/// An image, or the signal that came first.
pub(crate) enum Stock {
    Image(StockImage),
    Interrupted(i32),
}

/// Carried by the unwinding of an abandoned fetch.
struct Abandoned;

/// Gets the image from the cache, or makes it.
///
/// # Errors
/// There is no image to be had.
pub(crate) fn fetch(
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
    progress: &Progress,
) -> Result<Stock, Failure> {
    let cache = CacheDir::from_env().map_err(|error| Failure::image(&error))?;
    let abandoned = Arc::new(AtomicBool::new(false));
    let work = {
        let (events, progress, abandoned) =
            (events.clone(), progress.clone(), Arc::clone(&abandoned));
        move || {
            let mut report = |phase: Phase, done: u64, total: Option<u64>| {
                // Unwinding removes the half-made files on its way: they belong to values of `stock`.
                if abandoned.load(Ordering::Relaxed) {
                    resume_unwind(Box::new(Abandoned));
                }
                progress.fetch(phase, done, total);
            };
            let fetched = catch_unwind(AssertUnwindSafe(|| stock(&cache, &mut report)));
            let _ = events.send(Event::Fetched(fetched));
        }
    };
    std::thread::Builder::new()
        .name("fetch".to_owned())
        .spawn(work)
        .map_err(|error| Failure::defect(format!("cannot start a thread: {error}")))?;

    let mut interrupted = None;
    loop {
        let event = match interrupted {
            None => inbox.recv().ok(),
            // It may also be waiting for another process that makes the image; then there is nothing to clean up.
            Some((_, deadline)) => inbox
                .recv_timeout(Instant::saturating_duration_since(
                    &deadline,
                    Instant::now(),
                ))
                .ok(),
        };
        match (event, interrupted) {
            (Some(Event::Signal(signal)), None) => {
                abandoned.store(true, Ordering::Relaxed);
                interrupted = Some((signal, Instant::now() + GRACE));
            }
            (Some(Event::Fetched(_)) | None, Some((signal, _))) => {
                return Ok(Stock::Interrupted(signal));
            }
            (Some(Event::Fetched(Ok(Ok(image)))), None) => return Ok(Stock::Image(image)),
            (Some(Event::Fetched(Ok(Err(error)))), None) => return Err(Failure::image(&error)),
            (Some(Event::Fetched(Err(_))) | None, None) => {
                return Err(Failure::defect("the kernel could not be prepared"));
            }
            _ => {}
        }
    }
}
