//! A machine that runs, with our terminal or our streams connected to it, and what is made of its end.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use trapgate_api::terminal::Terminal;
use trapgate_image::{STATUS_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use trapgate_vmm::{Choice, Hooks, Machine, MachineConfig, Outcome, Port, PortOutput, Snapshot};

use crate::curtain::Curtain;
use crate::event::Event;
use crate::failure::Failure;
use crate::keyboard::{Keyboard, Sink};
use crate::output::{HostOutput, Stream};
use crate::progress::Progress;
use crate::serial_log::SerialLog;
use crate::socket::Socket;
use crate::{detach, signals, stats, status, terminal};

/// In a snapshot: what to call the guest.
pub(crate) const NOTE_GUEST: &str = "guest";
/// In a snapshot: it runs a command rather than a shell.
pub(crate) const NOTE_COMMAND: &str = "command";
/// How long the guest may take to write its disks and power off after the command has ended.
const POWER_OFF: Duration = Duration::from_secs(120);
/// The exit status of a machine that was stopped by force: that of a process that SIGTERM (15) ends.
const STOPPED: u8 = status::SIGNAL + 15;
/// Lines of the kernel's that are shown when it failed.
const EXCERPT: usize = 16;

/// Where the person meets the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Console {
    /// On the serial port: guests that do not run our init.
    Serial,
    /// On a terminal of the guest, `/dev/hvc0`.
    Terminal,
    /// Three streams, binary clean.
    Streams,
}

impl Console {
    /// Whether a person's keys go to the guest one by one.
    pub(crate) fn is_interactive(self) -> bool {
        self != Self::Streams && terminal::stdin_is_terminal()
    }
}

/// How the first machine begins.
pub(crate) enum Origin {
    /// It boots.
    Kernel,
    /// It goes on.
    Snapshot(Box<Snapshot>),
}

/// Everything around the machine that outlives it when it restarts.
pub(crate) struct Scene {
    pub(crate) console: Console,
    /// In the background: nobody is here to see anything.
    pub(crate) detach: bool,
    pub(crate) interactive: bool,
    pub(crate) has_command: bool,
    pub(crate) quiet: bool,
    pub(crate) verbose: bool,
    /// It is to be said at the end where the time went.
    pub(crate) stats: bool,
    pub(crate) name: String,
    pub(crate) choice: Choice,
    pub(crate) events: Sender<Event>,
    pub(crate) progress: Progress,
    pub(crate) keyboard: Keyboard,
    pub(crate) log: Arc<Mutex<SerialLog>>,
    pub(crate) curtain: Curtain,
    /// Those who attach to the guest's terminal.
    pub(crate) viewers: Option<Terminal>,
    pub(crate) origin: Origin,
}

/// Whether there is to be another machine.
enum Next {
    Restart,
    End(u8),
}

impl Scene {
    /// Runs machines until it is known how the run ends, and leaves everything as it was.
    pub(crate) fn perform(
        &self,
        config: &MachineConfig,
        inbox: &Receiver<Event>,
        mut socket: Socket,
    ) -> Result<u8, Failure> {
        let result = self.play(config, inbox, &mut socket);
        self.progress.clear();
        terminal::restore();
        if self.detach {
            last_words(&result, &socket);
        }
        socket.end();
        result
    }

    /// Whether this machine goes on from a snapshot: its init runs already.
    fn is_restored(&self, first: bool) -> bool {
        first && matches!(self.origin, Origin::Snapshot(_))
    }

    fn play(
        &self,
        config: &MachineConfig,
        inbox: &Receiver<Event>,
        socket: &mut Socket,
    ) -> Result<u8, Failure> {
        let has_disks = config.disks.iter().any(|disk| !disk.read_only);
        if self.console != Console::Terminal && !self.detach {
            if self.console == Console::Serial && !self.interactive && !self.is_restored(true) {
                self.keyboard.hold();
            }
            self.keyboard.start(self.interactive, self.events.clone())?;
        }
        let mut first = true;
        loop {
            if first && !self.is_restored(first) {
                self.progress.boot(&self.name);
            }
            let run = self.once(config, inbox, socket, has_disks, first)?;
            match run {
                Next::End(status) => return Ok(status),
                Next::Restart => {
                    self.keyboard.disconnect();
                    self.lock_log().restarted();
                    // Once in the background: a guest that crashes again and again must not fill the file.
                    if !self.quiet && (first || !self.detach) {
                        terminal::say("trapgate: the guest restarts");
                    }
                    first = false;
                }
            }
        }
    }

    /// Runs one machine to its end.
    fn once(
        &self,
        config: &MachineConfig,
        inbox: &Receiver<Event>,
        socket: &mut Socket,
        has_disks: bool,
        first: bool,
    ) -> Result<Next, Failure> {
        let started = Instant::now();
        let name = match self.console {
            Console::Serial => self.name.clone(),
            _ => "the stock kernel".to_owned(),
        };
        let machine = match &self.origin {
            Origin::Snapshot(snapshot) if first => Machine::restore(snapshot, self.hooks())
                .map_err(|error| Failure::snapshot(snapshot.directory(), &error))?,
            _ => Machine::start(config.clone(), self.hooks())
                .map_err(|error| Failure::machine(&name, &error))?,
        };
        let machine = Arc::new(machine);
        let on_stage = self.enter(&machine, socket, first);
        // In any case: a machine does not end while its output waits.
        self.curtain.raise();
        on_stage?;
        self.connect(&machine);
        let waiter = {
            let (machine, events) = (Arc::clone(&machine), self.events.clone());
            std::thread::Builder::new()
                .name("wait".to_owned())
                .spawn(move || {
                    machine.wait();
                    let _ = events.send(Event::Ended);
                })
                .map_err(|error| Failure::defect(format!("cannot start a thread: {error}")))?
        };

        let verdict = self.watch(&machine, inbox, started, has_disks, first);
        machine.stop();
        machine.wait();
        // It has the machine too, and with it the locks of the disks.
        let _ = waiter.join();
        socket.disconnect();
        if self.verbose {
            let counters = machine.counters();
            terminal::say(&format!(
                "trapgate: {} million guest instructions in {:.1} s",
                counters.instructions() / 1_000_000,
                started.elapsed().as_secs_f64()
            ));
        }
        if self.stats {
            self.progress.clear();
            terminal::restore();
            let engine = machine.engine().kind.name();
            let report = stats::report(&machine.account(), engine, started.elapsed());
            terminal::say(&report);
        }
        match verdict? {
            Verdict::Status(status) => Ok(Next::End(status)),
            Verdict::Ended { init } => self.judge(machine.wait(), init),
        }
    }

    /// What has to be said and done before the guest's first words.
    fn enter(
        &self,
        machine: &Arc<Machine>,
        socket: &mut Socket,
        first: bool,
    ) -> Result<(), Failure> {
        socket.connect(machine)?;
        if !first {
            return Ok(());
        }
        if let Some(claim) = socket.claim().filter(|_| self.detach) {
            self.progress.clear();
            detach::ready(claim)?;
        }
        if self.console != Console::Serial && !self.is_restored(first) {
            return Ok(());
        }
        self.progress.clear();
        self.announce(None);
        self.take_keyboard()?;
        if self.console == Console::Terminal {
            self.resize(machine);
            if !self.detach {
                self.keyboard.start(self.interactive, self.events.clone())?;
            }
        }
        Ok(())
    }

    /// Follows a machine until we know how the run ends.
    fn watch(
        &self,
        machine: &Machine,
        inbox: &Receiver<Event>,
        started: Instant,
        has_disks: bool,
        first: bool,
    ) -> Result<Verdict, Failure> {
        let mut init = self.is_restored(first);
        let mut result: Option<(u8, Instant)> = None;
        loop {
            let event = match result {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((_, deadline)) => {
                    inbox.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                }
            };
            match event {
                Ok(Event::Init) => {
                    // A machine may have been saved before its init ran.
                    if first && !init {
                        self.progress.clear();
                        self.announce(Some(started.elapsed()));
                        if self.console == Console::Terminal {
                            self.take_keyboard()?;
                            if !self.detach {
                                self.keyboard.start(self.interactive, self.events.clone())?;
                            }
                        }
                    }
                    init = true;
                    self.resize(machine);
                }
                Ok(Event::Resized) => self.resize(machine),
                Ok(Event::Status(status)) => {
                    if !has_disks {
                        return Ok(Verdict::Status(status));
                    }
                    // What it wrote to disks is to be on them.
                    result.get_or_insert((status, Instant::now() + POWER_OFF));
                }
                Ok(Event::Ended) => {
                    return Ok(match result {
                        Some((status, _)) => Verdict::Status(status),
                        None => Verdict::Ended { init },
                    });
                }
                Ok(Event::Signal(signal)) => {
                    machine.stop();
                    terminal::restore();
                    self.progress.clear();
                    return Ok(Verdict::Status(signals::tell(signal)));
                }
                Ok(Event::Leave) => {
                    machine.stop();
                    terminal::say("");
                    terminal::restore();
                    if !self.quiet {
                        terminal::say("trapgate: left; the machine is off");
                    }
                    let status = if self.has_command {
                        130
                    } else {
                        status::SUCCESS
                    };
                    return Ok(Verdict::Status(status));
                }
                Ok(Event::OutputFailed(error)) => return output_failed(error, self.interactive),
                Ok(Event::NoConsole) => return Err(self.no_console()),
                Ok(Event::Fetched(_)) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let status = result.map_or(status::SUCCESS, |(status, _)| status);
                    terminal::say(
                        "trapgate: the guest did not power off in time; what it wrote last may not be on its disks",
                    );
                    return Ok(Verdict::Status(status));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::defect("the event channel broke"));
                }
            }
        }
    }

    /// What the end of a machine means.
    fn judge(&self, outcome: &Outcome, init: bool) -> Result<Next, Failure> {
        let panic = self.lock_log().panic().map(str::to_owned);
        let failed = |status: u8, message: String| {
            let failure = Failure::new(status, message);
            // On the serial port, and where the person asked for it, it was on the screen already.
            if self.console == Console::Serial || self.verbose {
                failure
            } else {
                failure.log(self.lock_log().excerpt(EXCERPT))
            }
        };
        match outcome {
            Outcome::Reset(_) if panic.is_some() => {
                let reason = panic.unwrap_or_default();
                let failure = failed(status::PANIC, "the guest's kernel panicked".to_owned())
                    .cause(reason.clone());
                Err(match advice(&reason) {
                    Some(fix) => failure.fix(fix),
                    None => failure,
                })
            }
            Outcome::Reset(cause) if !init && self.console != Console::Serial => Err(failed(
                status::CRASH,
                "the guest reset itself before it was up".to_owned(),
            )
            .cause(format!("{cause:?}"))
            .fix("run it again with `--verbose` to see how far its kernel came")),
            Outcome::Reset(_) => Ok(Next::Restart),
            Outcome::TripleFault(fault) => Err(failed(status::CRASH, fault.to_string())
                .cause(fault.hint())
                .fix("run it again with `--verbose` to see how far it came, or on another engine")),
            Outcome::PoweredOff => Ok(Next::End(status::SUCCESS)),
            // As a process would: the low byte.
            Outcome::Exited(value) => Ok(Next::End((value & 0xff) as u8)),
            // By a client: when `watch` stops it, it has the verdict.
            Outcome::Stopped => {
                terminal::restore();
                if !self.quiet {
                    terminal::say("trapgate: stopped by `trapgate stop`; the machine is off");
                }
                Ok(Next::End(STOPPED))
            }
            Outcome::Failed(failure) => {
                if let trapgate_vmm::Failure::Engine {
                    details: Some(details),
                    ..
                } = failure
                {
                    // Lockstep found a difference: this is what the person asked for.
                    terminal::restore();
                    terminal::say(details);
                }
                Err(went_wrong(&self.name, failure))
            }
        }
    }

    fn lock_log(&self) -> std::sync::MutexGuard<'_, SerialLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one line that says what runs, and why so.
    fn announce(&self, time: Option<Duration>) {
        if self.quiet {
            return;
        }
        let Choice { kind, reason } = &self.choice;
        let mut line = format!("trapgate: {kind} ({reason}), {}", self.name);
        if let Some(time) = time {
            line += &format!(", init after {:.1} s", time.as_secs_f64());
        }
        if self.interactive {
            line += "; Ctrl-] leaves";
        }
        terminal::say(&line);
    }

    fn take_keyboard(&self) -> Result<(), Failure> {
        if !self.interactive {
            return Ok(());
        }
        terminal::make_raw().map_err(|error| {
            Failure::new(status::HOST, "cannot use this terminal")
                .cause(error)
                .fix("run it without a terminal: `trapgate run </dev/null`")
        })
    }

    fn resize(&self, machine: &Machine) {
        if let (Some(port), Some((columns, rows))) = (machine.terminal(), terminal::size()) {
            port.resize(columns, rows);
        }
    }

    /// Where the machine's output goes.
    fn hooks(&self) -> Hooks {
        let output = |stream| HostOutput::new(stream, self.events.clone(), self.progress.clone());
        let port = |name: &str, output: Box<dyn PortOutput>| Port {
            name: name.to_owned(),
            output,
        };
        let mut hooks = Hooks {
            serial: Box::new(self.serial_output()),
            ..Hooks::default()
        };
        if self.console == Console::Serial {
            return hooks;
        }
        hooks.ports.push(port(
            STATUS_PORT,
            Box::new(StatusPort {
                line: Vec::new(),
                events: self.events.clone(),
            }),
        ));
        if self.console == Console::Terminal {
            hooks.terminal = Some(Box::new(Screens {
                ours: (!self.detach).then(|| output(Stream::Output)),
                viewers: self.viewers.clone(),
            }));
        } else {
            hooks.ports.push(port(STDIN_PORT, Box::new(())));
            hooks
                .ports
                .push(port(STDOUT_PORT, Box::new(output(Stream::Output))));
            hooks
                .ports
                .push(port(STDERR_PORT, Box::new(output(Stream::Error))));
        }
        hooks
    }

    fn serial_output(&self) -> impl FnMut(&[u8]) + Send + 'static {
        let stream = match self.console {
            Console::Serial if self.detach => None,
            Console::Serial => Some(Stream::Output),
            _ if self.verbose => Some(Stream::Error),
            _ => None,
        };
        let ours = stream
            .map(|stream| HostOutput::new(stream, self.events.clone(), self.progress.clone()));
        let viewers = self.viewers.clone();
        let mut shown = Screens {
            ours,
            viewers: viewers.filter(|_| self.console == Console::Serial),
        };
        let (log, events) = (Arc::clone(&self.log), self.events.clone());
        let (keyboard, curtain) = (self.keyboard.clone(), self.curtain.clone());
        let has_init = self.console != Console::Serial;
        let mut told = false;
        move |bytes: &[u8]| {
            curtain.wait();
            shown.write(bytes);
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            if !log.spoken() {
                keyboard.release();
            }
            log.push(bytes);
            if has_init && log.status_seen() && !told {
                told = true;
                let _ = events.send(Event::NoConsole);
            }
        }
    }

    /// Gives the machine our input.
    fn connect(&self, machine: &Machine) {
        if self.detach {
            return;
        }
        let sink = match self.console {
            Console::Serial => Some(Sink::Serial(machine.serial())),
            Console::Terminal => machine.terminal().map(Sink::Port),
            Console::Streams => machine.port(STDIN_PORT).map(Sink::Port),
        };
        if let Some(sink) = sink {
            self.keyboard.connect(sink);
        }
    }

    fn no_console(&self) -> Failure {
        Failure::new(status::INPUT, format!("{} can't be talked to", self.name))
            .cause("it has no driver for the virtio-console, neither built in nor as a module")
            .fix("use it with its own initrd, on the serial port: `--kernel FILE --initrd FILE`")
    }
}

/// All that show what the guest writes to its terminal.
struct Screens {
    ours: Option<HostOutput>,
    viewers: Option<Terminal>,
}

impl PortOutput for Screens {
    fn write(&mut self, data: &[u8]) {
        if let Some(ours) = &mut self.ours {
            ours.put(data);
        }
        if let Some(viewers) = &self.viewers {
            viewers.push(data);
        }
    }
}

pub(crate) enum Verdict {
    /// The run is over, with this status.
    Status(u8),
    /// The machine ended by itself.
    Ended {
        /// Whether its first program had run.
        init: bool,
    },
}

/// What may help against a panic.
fn advice(reason: &str) -> Option<&'static str> {
    let reason = reason.to_ascii_lowercase();
    if reason.contains("unable to mount root") || reason.contains("no working init") {
        Some(
            "pass the initrd that belongs to this kernel (`--initrd`), or a disk and `--cmdline root=/dev/vda`",
        )
    } else if reason.contains("memory") {
        Some("give the guest more memory: `--memory 1G`")
    } else {
        None
    }
}

/// `terminal` says that the output is, or was, a terminal.
pub(crate) fn output_failed(error: io::Error, terminal: bool) -> Result<Verdict, Failure> {
    if terminal && error.raw_os_error() == Some(Errno::IO.raw_os_error()) {
        // The window was closed; that we see it here before SIGHUP (1) arrives is chance.
        return Ok(Verdict::Status(status::SIGNAL + 1));
    }
    if error.kind() == io::ErrorKind::BrokenPipe {
        // As a program that SIGPIPE (13) ends.
        return Ok(Verdict::Status(status::SIGNAL + 13));
    }
    Err(
        Failure::new(status::HOST, "cannot write to standard output")
            .cause(error)
            .fix("make room there, or send the output elsewhere"),
    )
}

/// Takes what the guest's init reports.
struct StatusPort {
    line: Vec<u8>,
    events: Sender<Event>,
}

impl PortOutput for StatusPort {
    fn write(&mut self, data: &[u8]) {
        for &byte in data {
            if byte != b'\n' {
                // No line of init's is longer; a guest may write anything here.
                if self.line.len() < 16 {
                    self.line.push(byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let event = match line.as_slice() {
                b"init" => Some(Event::Init),
                digits => std::str::from_utf8(digits)
                    .ok()
                    .and_then(|digits| digits.parse().ok())
                    .map(Event::Status),
            };
            if let Some(event) = event {
                let _ = self.events.send(event);
            }
        }
    }
}

/// What remains of a machine in the background: nothing if all was well.
fn last_words(result: &Result<u8, Failure>, socket: &Socket) {
    match result {
        // A status of success, or that of a machine that was stopped, by whatever means: somebody wanted it.
        Ok(status::SUCCESS | STOPPED) => {
            if let Some(claim) = socket.claim() {
                claim.remove_log();
            }
        }
        Ok(status) => terminal::say(&format!("trapgate: ended with status {status}")),
        // It is said at the very end.
        Err(_) => {}
    }
}

/// What a machine's failure is to a person.
fn went_wrong(name: &str, failure: &trapgate_vmm::Failure) -> Failure {
    match failure {
        trapgate_vmm::Failure::Restart(error) => Failure::machine(name, error),
        // Lockstep has more to say, and then it is not the host that failed.
        trapgate_vmm::Failure::Engine { details: None, .. } => {
            Failure::new(status::HOST, failure.to_string())
                .fix("run it on another engine, for example with `--engine interp`")
        }
        trapgate_vmm::Failure::MemoryGone => Failure::new(status::HOST, failure.to_string()).fix(
            "restore it again from a whole snapshot, whose files nobody changes while it runs",
        ),
        failure => Failure::defect(failure.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn status_events(data: &[&[u8]]) -> Vec<String> {
        let (events, inbox) = channel();
        let mut port = StatusPort {
            line: Vec::new(),
            events,
        };
        for piece in data {
            port.write(piece);
        }
        inbox.try_iter().map(|event| format!("{event:?}")).collect()
    }

    #[test]
    fn difference_that_lockstep_found_is_a_defect_and_a_host_that_fails_is_none() {
        let with = |details: Option<&str>| trapgate_vmm::Failure::Engine {
            cpu: 0,
            failure: trapgate_vmm::EngineFailure {
                what: "a test",
                code: 0,
                rip: 0,
            },
            details: details.map(str::to_owned),
        };
        let found = went_wrong("a", &with(Some("rax differs")));
        assert_eq!(found.status, status::DEFECT);
        assert_eq!(went_wrong("a", &with(None)).status, status::HOST);
    }

    #[test]
    fn status_lines_arrive_in_any_pieces() {
        assert_eq!(
            status_events(&[b"in", b"it\n1", b"27\n"]),
            ["Init", "Status(127)"]
        );
    }

    #[test]
    fn nonsense_of_the_guest_is_no_status() {
        let long = [b'9'; 4096];
        assert_eq!(
            status_events(&[b"\n-1\n256\nhello\n\xff\n", &long, b"\n7\n"]),
            ["Status(7)"]
        );
    }

    #[test]
    fn broken_pipe_ends_quietly_and_a_full_disk_does_not() {
        let broken = output_failed(io::ErrorKind::BrokenPipe.into(), false);
        assert!(matches!(broken, Ok(Verdict::Status(141))));
        let full = output_failed(io::ErrorKind::StorageFull.into(), false)
            .err()
            .unwrap();
        assert_eq!(full.status, status::HOST);
    }

    #[test]
    fn terminal_that_is_gone_is_a_hang_up_and_a_broken_disk_is_not() {
        let gone = || io::Error::from(Errno::IO);
        let window = output_failed(gone(), true);
        assert!(matches!(window, Ok(Verdict::Status(129))));
        let disk = output_failed(gone(), false).err().unwrap();
        assert_eq!(disk.status, status::HOST);
    }
}
