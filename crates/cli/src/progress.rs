//! How long work is shown: a bar or a spinner on standard error, where that is a terminal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use trapgate_image::Phase;

use crate::terminal;

/// A line that moves. Clones are the same line; once cleared for good it stays away.
#[derive(Clone)]
pub(crate) struct Progress(Arc<Line>);

struct Line {
    /// Lets the guest's output pass without the lock.
    gone: AtomicBool,
    bar: Mutex<Bar>,
    /// Whether to say in plain lines what a bar would show.
    plain: bool,
}

struct Bar {
    bar: Option<ProgressBar>,
    phase: Option<Phase>,
}

impl Progress {
    /// A line to come; it never shows if `quiet`, and only says what takes long where there is no terminal.
    pub(crate) fn new(quiet: bool) -> Self {
        let shows = !quiet && terminal::stderr_is_terminal();
        Self(Arc::new(Line {
            gone: AtomicBool::new(quiet),
            bar: Mutex::new(Bar {
                bar: shows.then(|| {
                    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10))
                }),
                phase: None,
            }),
            plain: !quiet && !shows,
        }))
    }

    /// The image is being prepared.
    pub(crate) fn fetch(&self, phase: Phase, done: u64, total: Option<u64>) {
        if self.0.gone.load(Ordering::Acquire) {
            return;
        }
        let mut line = self.0.bar.lock().unwrap_or_else(PoisonError::into_inner);
        let new = line.phase.replace(phase) != Some(phase);
        if new && self.0.plain {
            terminal::say(&format!("trapgate: {phase}"));
        }
        let Some(bar) = &line.bar else { return };
        match total {
            Some(total) => {
                if new {
                    bar.set_style(style("{msg} [{bar:30}] {bytes} of {total_bytes}"));
                }
                bar.set_length(total);
            }
            None if new => bar.set_style(style("{spinner} {msg} ({elapsed})")),
            None => {}
        }
        if new {
            bar.set_message(format!("trapgate: {phase}"));
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        bar.set_position(done);
    }

    /// The guest boots.
    pub(crate) fn boot(&self, what: &str) {
        if self.0.gone.load(Ordering::Acquire) {
            return;
        }
        let line = self.0.bar.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bar) = &line.bar else { return };
        bar.reset_elapsed();
        bar.set_style(style("{spinner} {msg} ({elapsed})"));
        bar.set_message(format!("trapgate: booting {what}"));
        bar.enable_steady_tick(Duration::from_millis(100));
    }

    /// Takes the line away for good. Cheap when it is already gone.
    pub(crate) fn clear(&self) {
        if self.0.gone.load(Ordering::Acquire) {
            return;
        }
        let line = self.0.bar.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = &line.bar {
            bar.finish_and_clear();
        }
        // Only now: another thread that sees it may print.
        self.0.gone.store(true, Ordering::Release);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
