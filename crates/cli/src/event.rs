//! What the main thread hears from the others.

use std::io;

use crate::stock::Fetched;

/// What happens outside of the main thread and matters to it.
#[derive(Debug)]
pub(crate) enum Event {
    /// The image is there, or can't be had.
    Fetched(Fetched),
    /// A signal that ends us.
    Signal(i32),
    /// The window may have another size.
    Resized,
    /// The person pressed Ctrl-].
    Leave,
    /// The guest's first program runs.
    Init,
    /// The command or shell in the guest ended.
    Status(u8),
    /// The guest's init found no virtio-console.
    NoConsole,
    /// Our standard output takes no more.
    OutputFailed(io::Error),
    /// The machine has ended.
    Ended,
}
