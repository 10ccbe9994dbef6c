//! What is compared: the host, trapgate and TCG, as processes that are told by their standard input when to
//! go on, and whose standard output is read.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::arguments::Arguments;
use crate::image::Image;
use crate::protocol::{Event, parse};
use crate::{Failure, monitor};

/// RAM of the guests: room for the largest workload and its files.
pub(crate) const RAM_MIB: u64 = 1024;

/// Lines that are kept of what a process says of itself.
const LAST_WORDS: usize = 5;
/// How long they are waited for when it has ended.
const PATIENCE: Duration = Duration::from_millis(500);

/// One of those that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Subject {
    /// The host itself.
    Native,
    /// trapgate.
    Trapgate,
    /// QEMU without KVM.
    Tcg,
}

impl Subject {
    /// In one word.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Trapgate => "trapgate",
            Self::Tcg => "TCG",
        }
    }

    /// Starts it with workloads of these names.
    ///
    /// # Errors
    /// It does not start.
    pub(crate) fn start(
        self,
        names: &[&str],
        arguments: &Arguments,
        image: &Image,
    ) -> Result<Running, Failure> {
        let words = match self {
            Self::Native => [vec!["exec".to_owned()], image.on_host(names)].concat(),
            Self::Trapgate => vec![
                "trapgate".to_owned(),
                arguments.engine.clone(),
                arguments.level.clone().unwrap_or_default(),
                (RAM_MIB << 20).to_string(),
                image.kernel.display().to_string(),
                image.initramfs(names)?.display().to_string(),
                image.command_line.clone(),
            ],
            Self::Tcg => [vec!["exec".to_owned()], qemu(names, arguments, image)?].concat(),
        };
        Running::start(&words)
    }
}

fn qemu(names: &[&str], arguments: &Arguments, image: &Image) -> Result<Vec<String>, Failure> {
    let mut words = vec![arguments.qemu.display().to_string()];
    let mut add = |text: &str| words.extend(text.split(' ').map(str::to_owned));
    // A machine with what trapgate's has: no more devices than that.
    add("-accel tcg -smp 1 -nodefaults -no-user-config -display none -no-reboot -serial stdio");
    add(&format!("-cpu {} -m {RAM_MIB}", arguments.qemu_cpu));
    for (option, value) in [
        ("-kernel", image.kernel.display().to_string()),
        ("-initrd", image.initramfs(names)?.display().to_string()),
        ("-append", image.command_line.clone()),
    ] {
        words.extend([option.to_owned(), value]);
    }
    Ok(words)
}

/// QEMU's version, if it is installed.
pub(crate) fn qemu_version(program: &Path) -> Option<String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let first = text.lines().next()?.trim();
    Some(
        first
            .strip_prefix("QEMU emulator version ")
            .unwrap_or(first)
            .to_owned(),
    )
}

/// A process that runs workloads. Dropped, it is ended.
pub(crate) struct Running {
    child: Child,
    /// Its standard input: the guest's serial port.
    input: Option<ChildStdin>,
    pub(crate) begun: Instant,
    events: Receiver<(Instant, Event)>,
    last_words: Arc<Mutex<VecDeque<String>>>,
    listener: Option<JoinHandle<()>>,
}

/// Why nothing came of a process any more.
pub(crate) enum Silence {
    /// It took too long.
    Late,
    /// It ended.
    Ended,
}

impl Running {
    fn start(words: &[String]) -> Result<Self, Failure> {
        let begun = Instant::now();
        let mut child = Command::new(std::env::current_exe()?)
            .arg(monitor::OPTION)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (to, events) = channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                    let at = Instant::now();
                    if let Some(event) = parse(&String::from_utf8_lossy(&line))
                        && to.send((at, event)).is_err()
                    {
                        break;
                    }
                }
            });
        }
        let last_words = Arc::new(Mutex::new(VecDeque::new()));
        let keep = Arc::clone(&last_words);
        let listener = child.stderr.take().map(|errors| {
            std::thread::spawn(move || {
                for line in BufReader::new(errors).split(b'\n').map_while(Result::ok) {
                    let mut last = keep.lock().unwrap_or_else(PoisonError::into_inner);
                    last.push_back(String::from_utf8_lossy(&line).trim().to_owned());
                    if last.len() > LAST_WORDS {
                        last.pop_front();
                    }
                }
            })
        });
        Ok(Self {
            input: child.stdin.take(),
            child,
            begun,
            events,
            last_words,
            listener,
        })
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Has it run its next workload.
    pub(crate) fn go(&mut self) {
        if let Some(input) = &mut self.input {
            // It may have ended: what comes of it, or does not, says so.
            let _ = input.write_all(b"\n");
        }
    }

    /// Waits for the next event; gives it with the time at which it came.
    pub(crate) fn next(&self, limit: Duration) -> Result<(Instant, Event), Silence> {
        self.events
            .recv_timeout(limit)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => Silence::Late,
                RecvTimeoutError::Disconnected => Silence::Ended,
            })
    }

    /// Ends it; gives the last that it said on standard error.
    pub(crate) fn end(mut self) -> String {
        self.kill();
        // The end of its output comes at once, unless something that it started holds the other end.
        let deadline = Instant::now() + PATIENCE;
        while self
            .listener
            .as_ref()
            .is_some_and(|listener| !listener.is_finished())
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        let last = self
            .last_words
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Vec::from(last.clone()).join("; ")
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}
