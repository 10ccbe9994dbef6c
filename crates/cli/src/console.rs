//! `trapgate console`: this terminal, attached to the guest's.

use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use trapgate_api::client::Client;
use trapgate_api::data::TerminalSize;
use trapgate_api::directory::Name;
use trapgate_api::operation::ResizeTerminal;

use crate::clients::client;
use crate::event::Event;
use crate::failure::Failure;
use crate::keyboard::{Keyboard, Sink};
use crate::output::{HostOutput, Stream};
use crate::progress::Progress;
use crate::scene::{Verdict, output_failed};
use crate::{signals, status, terminal};

/// How long the guest may take to hear of the window's size.
const RESIZE: Duration = Duration::from_secs(2);

/// Attaches until the person or the guest leaves; gives our exit status.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn console(name: &Name) -> Result<u8, Failure> {
    let (events, inbox) = channel();
    signals::watch(events.clone())?;
    let client = client(name)?;
    let attached = client
        .attach()
        .map_err(|error| Failure::client("attach to", name, &error))?;
    let (from_guest, to_guest) = attached.split().map_err(|error| {
        Failure::new(status::HOST, format!("cannot attach to `{name}`")).cause(error)
    })?;

    let interactive = terminal::stdin_is_terminal();
    if interactive {
        terminal::say(&format!("trapgate: attached to `{name}`; Ctrl-] detaches"));
        terminal::make_raw()
            .map_err(|error| Failure::new(status::HOST, "cannot use this terminal").cause(error))?;
    }
    resize(&client);
    show(from_guest, events.clone())?;
    let keyboard = Keyboard::default();
    keyboard.connect(Sink::Console(Arc::new(to_guest)));
    keyboard.start(interactive, events)?;

    let leave = |text: &str| {
        if interactive {
            terminal::say("");
        }
        terminal::restore();
        terminal::say(&format!("trapgate: {text}"));
    };
    loop {
        match inbox.recv() {
            Ok(Event::Resized) => resize(&client),
            Ok(Event::Leave) => {
                leave(&format!("detached from `{name}`, which goes on"));
                return Ok(status::SUCCESS);
            }
            Ok(Event::Ended) => {
                leave(&format!("`{name}` has ended"));
                return Ok(status::SUCCESS);
            }
            Ok(Event::Signal(signal)) => {
                leave(&format!(
                    "{}: detached from `{name}`, which goes on",
                    signals::name(signal)
                ));
                return Ok(signals::exit_status(signal));
            }
            Ok(Event::OutputFailed(error)) => {
                let Verdict::Status(status) = output_failed(error, interactive)? else {
                    return Ok(status::SUCCESS);
                };
                return Ok(status);
            }
            Ok(_) => {}
            Err(_) => return Err(Failure::defect("the event channel broke")),
        }
    }
}

/// Tells the guest the size of our window. A guest that does not want to know is none the worse for it.
fn resize(client: &Client) {
    if let Some((columns, rows)) = terminal::size() {
        let _ = client.call::<ResizeTerminal>(&TerminalSize { columns, rows }, Some(RESIZE));
    }
}

/// Starts to show what the guest writes, to its end.
fn show(mut from: impl Read + Send + 'static, events: Sender<Event>) -> Result<(), Failure> {
    let mut output = HostOutput::new(Stream::Output, events.clone(), Progress::new(true));
    let work = move || {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            output.put(&buffer[..count]);
        }
        let _ = events.send(Event::Ended);
    };
    std::thread::Builder::new()
        .name("output".to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|error| Failure::defect(format!("cannot start a thread: {error}")))
}
