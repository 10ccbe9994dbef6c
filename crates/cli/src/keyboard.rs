//! Our standard input, on its way to the guest.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read};
use rustix::stdio::stdin;
use trapgate_vmm::{PortHandle, SerialHandle};

use crate::event::Event;
use crate::failure::Failure;

/// Ctrl-], which leaves.
const ESCAPE: u8 = 0x1d;
/// Ctrl-D, which is how a person ends input on a terminal.
const END_OF_TRANSMISSION: u8 = 0x04;
/// Pieces of a person's input that wait for the guest; more are lost, as on a real terminal.
const KEYS: usize = 4096;

/// Where the guest takes input.
#[derive(Clone)]
pub(crate) enum Sink {
    Serial(SerialHandle),
    Port(PortHandle),
    /// Of another process.
    Console(Arc<UnixStream>),
}

impl Sink {
    /// Gives it all to the guest; `false` if the machine ended before.
    fn put(&self, data: &[u8]) -> bool {
        match self {
            Self::Serial(serial) => serial.input_all(data),
            Self::Port(port) => port.input_all(data),
            Self::Console(stream) => (&**stream).write_all(data).is_ok(),
        }
    }

    fn end(&self) {
        match self {
            // A serial port has no end; this is what comes closest. A guest that leaves it full won't read it.
            Self::Serial(serial) => drop(serial.input(&[END_OF_TRANSMISSION])),
            Self::Port(port) => port.close_input(),
            // Others may type on: what the guest writes is still of interest.
            Self::Console(_) => {}
        }
    }
}

/// Standard input, and the machine that gets it at the moment: a machine that restarts is another.
#[derive(Clone, Default)]
pub(crate) struct Keyboard(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    sink: Option<Sink>,
    /// Counts connections, so that one that broke is told from one that was made since.
    connections: u64,
    /// Input waits for [`Keyboard::release`].
    held: bool,
    ended: bool,
}

impl Keyboard {
    /// Lets input wait for [`Self::release`]. For a serial port, which loses what comes before the guest
    /// has set it up: a person sees when that is, a file doesn't.
    pub(crate) fn hold(&self) {
        let (state, _) = &*self.0;
        state.lock().unwrap_or_else(PoisonError::into_inner).held = true;
    }

    /// Lets input flow.
    pub(crate) fn release(&self) {
        let (state, changed) = &*self.0;
        state.lock().unwrap_or_else(PoisonError::into_inner).held = false;
        changed.notify_all();
    }

    /// From now on the guest takes input here.
    pub(crate) fn connect(&self, sink: Sink) {
        let (state, changed) = &*self.0;
        let ended = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.sink = Some(sink.clone());
            state.connections += 1;
            changed.notify_all();
            state.ended
        };
        if ended {
            sink.end();
        }
    }

    /// The machine is gone; input waits for the next.
    pub(crate) fn disconnect(&self) {
        let (state, _) = &*self.0;
        state.lock().unwrap_or_else(PoisonError::into_inner).sink = None;
    }

    fn deliver(&self, data: &[u8]) {
        let (state, changed) = &*self.0;
        let mut tried = 0;
        loop {
            let sink = {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                while state.held || state.sink.is_none() || state.connections == tried {
                    state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                tried = state.connections;
                state.sink.clone()
            };
            if sink.is_some_and(|sink| sink.put(data)) {
                return;
            }
        }
    }

    fn end(&self) {
        let (state, changed) = &*self.0;
        let sink = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            while state.held {
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.ended = true;
            state.sink.clone()
        };
        if let Some(sink) = sink {
            sink.end();
        }
    }

    /// Starts to read standard input, to its end. With `escape` Ctrl-] in it is ours.
    pub(crate) fn start(&self, escape: bool, events: Sender<Event>) -> Result<(), Failure> {
        // Two threads, so that Ctrl-] is seen also when the guest takes no input any more.
        let (send, receive) = sync_channel::<Vec<u8>>(if escape { KEYS } else { 1 });
        let keyboard = self.clone();
        spawn("input", move || {
            for piece in receive {
                keyboard.deliver(&piece);
            }
            keyboard.end();
        })?;
        spawn("keyboard", move || {
            let mut buffer = vec![0; 16 << 10];
            while let Some(count) = read_some(&mut buffer) {
                let bytes = &buffer[..count];
                let escaped = bytes.iter().position(|byte| escape && *byte == ESCAPE);
                if escaped.is_some() {
                    let _ = events.send(Event::Leave);
                }
                let piece = bytes[..escaped.unwrap_or(count)].to_vec();
                let sent = if escape {
                    // A person who types on a guest that hangs.
                    !matches!(send.try_send(piece), Err(TrySendError::Disconnected(_)))
                } else {
                    send.send(piece).is_ok()
                };
                if !sent {
                    return;
                }
            }
        })
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|error| Failure::defect(format!("cannot start a thread: {error}")))
}

/// Waits for standard input, and says how many bytes came; `None` at its end.
fn read_some(buffer: &mut [u8]) -> Option<usize> {
    loop {
        match read(stdin(), &mut *buffer) {
            Ok(0) => return None,
            Ok(count) => return Some(count),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let descriptor = stdin();
                let _ = poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], None);
            }
            // There is no input (it may be closed), or the terminal has gone.
            Err(_) => return None,
        }
    }
}
