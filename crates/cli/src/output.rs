//! Our standard output and standard error, as the far ends of the guest's ports.

use std::os::fd::BorrowedFd;
use std::sync::mpsc::Sender;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, write};
use rustix::stdio::{stderr, stdout};
use trapgate_vmm::PortOutput;

use crate::event::Event;
use crate::progress::Progress;

/// Which of our two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output: that it fails ends the run.
    Output,
    /// Standard error: that it fails is of no consequence.
    Error,
}

impl Stream {
    fn descriptor(self) -> BorrowedFd<'static> {
        match self {
            Self::Output => stdout(),
            Self::Error => stderr(),
        }
    }
}

/// Takes bytes from the guest to one of our outputs, unchanged and at once.
pub(crate) struct HostOutput {
    stream: Stream,
    events: Sender<Event>,
    progress: Progress,
    failed: bool,
}

impl HostOutput {
    pub(crate) fn new(stream: Stream, events: Sender<Event>, progress: Progress) -> Self {
        Self {
            stream,
            events,
            progress,
            failed: false,
        }
    }

    /// Writes all of `data`, unless the other end is gone.
    pub(crate) fn put(&mut self, data: &[u8]) {
        self.progress.clear();
        let mut rest = data;
        while !rest.is_empty() && !self.failed {
            match write(self.stream.descriptor(), rest) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // Whoever gave us this output made it so; it may be shared with them.
                    let descriptor = self.stream.descriptor();
                    let _ = poll(&mut [PollFd::new(&descriptor, PollFlags::OUT)], None);
                }
                Err(error) => {
                    self.failed = true;
                    if self.stream == Stream::Output {
                        let _ = self.events.send(Event::OutputFailed(error.into()));
                    }
                }
            }
        }
    }
}

impl PortOutput for HostOutput {
    fn write(&mut self, data: &[u8]) {
        self.put(data);
    }
}
