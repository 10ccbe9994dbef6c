//! Starting `trapgate`, with limits on how long it may take.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// No run may take longer. A slow machine that does something else besides takes a tenth of it.
const LIMIT: Duration = Duration::from_secs(300);

/// What a run that has ended left.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    pub(crate) status: ExitStatus,
}

impl Finished {
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub(crate) fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A child of ours that ends with the test, however that ends.
pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Where the control sockets of machines are that no test asks for.
fn runtime_directory() -> &'static Path {
    let directory = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/runtime"));
    std::fs::create_dir_all(directory).unwrap();
    directory
}

/// `trapgate` with these arguments and no terminal.
pub(crate) fn trapgate<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapgate"));
    command
        .args(arguments)
        .env("XDG_RUNTIME_DIR", runtime_directory())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs it to its end, with `input` on standard input.
pub(crate) fn finish_with(mut command: Command, input: &[u8]) -> Finished {
    command.stdin(Stdio::piped());
    let mut child = Running(command.spawn().unwrap());
    let mut stdin = child.0.stdin.take().unwrap();
    let input = input.to_vec();
    // It may end without having read everything.
    std::thread::spawn(move || drop(stdin.write_all(&input)));
    collect(child)
}

/// Runs it to its end.
pub(crate) fn finish(mut command: Command) -> Finished {
    collect(Running(command.spawn().unwrap()))
}

/// Starts it.
pub(crate) fn start(mut command: Command) -> Running {
    Running(command.spawn().unwrap())
}

/// Takes its output until it ends.
pub(crate) fn collect(mut child: Running) -> Finished {
    fn reader(from: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
        let (send, receive) = channel();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut from) = from {
                from.read_to_end(&mut bytes).unwrap();
            }
            let _ = send.send(bytes);
        });
        receive
    }
    let out = reader(child.0.stdout.take());
    let err = reader(child.0.stderr.take());
    let status = child.wait();
    // A grandchild that keeps the pipes would keep these open.
    let limit = Duration::from_secs(20);
    let stderr = err
        .recv_timeout(limit)
        .expect("its standard error is closed");
    Finished {
        stdout: out
            .recv_timeout(limit)
            .expect("its standard output is closed"),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        status,
    }
}

/// Lines of a run that is still going, and the run.
pub(crate) struct Lines {
    pieces: Receiver<Vec<u8>>,
    pub(crate) seen: String,
    /// How much of `seen` was waited for already.
    at: usize,
}

impl Lines {
    pub(crate) fn of(mut from: impl Read + Send + 'static) -> Self {
        let (send, pieces) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A pseudo-terminal whose other side was closed fails with EIO.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                if send.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            pieces,
            seen: String::new(),
            at: 0,
        }
    }

    /// All that comes from now on, to the end.
    pub(crate) fn rest(&mut self) -> String {
        let rest = self.pieces.iter().flatten().collect::<Vec<u8>>();
        String::from_utf8_lossy(&rest).into_owned()
    }

    /// All that has come, for whoever reads why a test failed.
    pub(crate) fn so_far(&mut self) -> String {
        while let Ok(piece) = self.pieces.recv_timeout(Duration::from_millis(100)) {
            self.seen += &String::from_utf8_lossy(&piece);
        }
        self.seen.clone()
    }

    /// Whether `text` comes before the end.
    pub(crate) fn comes(&mut self, text: &str) -> bool {
        while !self.seen[self.at..].contains(text) {
            match self.pieces.recv_timeout(LIMIT) {
                Ok(piece) => self.seen += &String::from_utf8_lossy(&piece),
                Err(_) => return false,
            }
        }
        true
    }

    /// Waits until `text` comes, after what was waited for before; gives what came before it.
    pub(crate) fn expect(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(found) = self.seen[self.at..].find(text) {
                let before = self.seen[self.at..][..found].to_owned();
                self.at += found + text.len();
                return before;
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(rest) {
                Ok(piece) => self.seen += &String::from_utf8_lossy(&piece),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!(
                        "`{text}` did not come; after {} bytes: {}",
                        self.at, self.seen
                    )
                }
            }
        }
    }
}

/// The standard output of a run, taken as it comes.
pub(crate) fn stdout_of(child: &mut Running) -> Lines {
    Lines::of(child.0.stdout.take().unwrap())
}

/// Types into the standard input of a run.
pub(crate) fn type_into(child: &mut Running, input: &[u8]) {
    let stdin = child.0.stdin.as_mut().expect("it was not closed");
    stdin.write_all(input).unwrap();
    stdin.flush().unwrap();
}

/// There is no more input for a run.
pub(crate) fn close_stdin_of(child: &mut Running) {
    drop(child.0.stdin.take());
}

/// Nobody reads the standard output of a run any more.
pub(crate) fn close_stdout_of(child: &mut Running) {
    drop(child.0.stdout.take());
}

/// The standard error of a run, taken as it comes.
pub(crate) fn stderr_of(child: &mut Running) -> Lines {
    Lines::of(child.0.stderr.take().unwrap())
}

/// A pseudo-terminal, and `trapgate` on it as if a person had typed it there.
pub(crate) struct OnTerminal {
    pub(crate) child: Running,
    pub(crate) screen: Lines,
    keys: Option<File>,
    closed: Arc<AtomicBool>,
    /// Stays open, so that its settings can be looked at.
    terminal: OwnedFd,
    before: Termios,
}

impl OnTerminal {
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: &[S]) -> Self {
        Self::start_in(runtime_directory(), arguments)
    }

    /// In another directory, which is that of control sockets too.
    pub(crate) fn start_in<S: AsRef<OsStr>>(runtime: &Path, arguments: &[S]) -> Self {
        let controller =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let name = name.to_str().unwrap();
        // Not by `File::open`, which would make it the terminal of the tests.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = open(name, flags, Mode::empty()).unwrap();
        let size = Winsize {
            ws_col: 101,
            ws_row: 37,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&terminal, size).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        // `setsid --ctty` makes it a session's terminal, so that window changes and hang-ups are signalled.
        let mut command = Command::new("setsid");
        command
            .arg("--ctty")
            .arg(env!("CARGO_BIN_EXE_trapgate"))
            .args(arguments)
            .env("TERM", "xterm")
            .env("XDG_RUNTIME_DIR", runtime)
            .current_dir(runtime)
            .stdin(terminal.try_clone().unwrap())
            .stdout(terminal.try_clone().unwrap())
            .stderr(terminal.try_clone().unwrap());
        let keys = File::from(controller);
        let closed = Arc::new(AtomicBool::new(false));
        let screen = Screen {
            file: keys.try_clone().unwrap(),
            closed: Arc::clone(&closed),
        };
        Self {
            child: Running(command.spawn().unwrap()),
            screen: Lines::of(screen),
            keys: Some(keys),
            closed,
            terminal,
            before,
        }
    }

    pub(crate) fn press(&mut self, keys: &str) {
        let keyboard = self.keys.as_mut().expect("it was not closed");
        keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Closes the window.
    pub(crate) fn hang_up(&mut self) {
        self.keys = None;
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn resize(&mut self, columns: u16, rows: u16) {
        let size = Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.terminal, size).unwrap();
    }

    /// Whether keys go to the program one by one.
    pub(crate) fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.terminal).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits until the terminal is raw, or is not.
    pub(crate) fn wait_until_raw(&self, raw: bool) {
        let deadline = Instant::now() + LIMIT;
        while self.is_raw() != raw {
            assert!(Instant::now() < deadline, "raw: {}", !raw);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end of the program; the terminal must be as it was before.
    pub(crate) fn end(&mut self) -> Option<i32> {
        let status = self.child.wait();
        let after = tcgetattr(&self.terminal).unwrap();
        let modes = |t: &Termios| {
            (
                t.input_modes,
                t.output_modes,
                t.control_modes,
                t.local_modes,
            )
        };
        assert_eq!(modes(&after), modes(&self.before));
        assert_eq!(status.signal(), None);
        status.code()
    }
}

/// The output side of a pseudo-terminal, until its window is closed.
struct Screen {
    file: File,
    closed: Arc<AtomicBool>,
}

impl Read for Screen {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            if self.closed.load(Ordering::Relaxed) {
                return Ok(0);
            }
            let soon = Timespec {
                tv_sec: 0,
                tv_nsec: 20_000_000,
            };
            if poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&soon))? > 0 {
                return self.file.read(buffer);
            }
        }
    }
}

/// One Linux at a time: a boot takes a whole processor. `None`, said aloud, where there is no Linux to be had.
pub(crate) fn linux() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let turn = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let missing = MISSING.get_or_init(|| {
        let probe = finish(trapgate(&["run", "--", "true"]));
        match probe.code() {
            Some(0) => None,
            Some(122) => Some(probe.stderr),
            _ => panic!("Linux does not boot: {probe:?}"),
        }
    });
    let Some(why) = missing else {
        return Some(turn);
    };
    assert!(
        std::env::var_os("TRAPGATE_TESTS_MUST_RUN").is_none(),
        "there is no Linux to test with:\n{why}"
    );
    skipped(why);
    None
}

/// Says aloud that a test did not take place.
pub(crate) fn skipped(why: &str) {
    // Past the test harness, which would swallow it; one line, so that it can be searched for.
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let why: Vec<&str> = why.lines().map(str::trim).collect();
    let line = format!("skipped: {test}: {}\n", why.join("; "));
    let _ = std::io::stderr().write_all(line.as_bytes());
}
