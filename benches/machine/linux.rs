//! The distribution's kernel with the init of `trapgate_image`, as `trapgate run` boots it.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use trapgate_image::{
    COMMAND_LINE, CacheDir, Phase, STATUS_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT, Session,
    session_archive, stock,
};
use trapgate_vmm::{
    DiskConfig, EngineChoice, EngineKind, Hooks, Machine, MachineConfig, Port, PortOutput,
};

use crate::Failure;
use crate::child::{Values, run_all};
use crate::figure::{Promise, Report};
use crate::footprint::{Footprint, mib};

/// The child that boots to a shell.
pub(crate) const BOOT: &str = "boot";
/// The child that copies to and from disk and console.
pub(crate) const TRANSFER: &str = "transfer";
/// The child that watches the clock.
pub(crate) const CLOCK: &str = "clock";

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(600);
/// How long the shell has been idle when its memory is measured.
const SETTLE: Duration = Duration::from_secs(2);
/// Bytes that are read from and written to the disk.
const DISK: u64 = 128 << 20;
/// Bytes through the console.
const CONSOLE: f64 = (8 << 20) as f64;
/// Over which the clocks are compared.
const WATCH: Duration = Duration::from_secs(120);
/// The terminal's name here; ports have names of their own.
const TERMINAL: &str = "terminal";

/// Sees to it that the image is in the cache; gives the kernel's version.
///
/// # Errors
/// It can't be had; the text says what to do.
pub(crate) fn prepare() -> Result<String, Failure> {
    let mut last = None;
    let mut progress = |phase: Phase, _: u64, _: Option<u64>| {
        if last.replace(phase) != Some(phase) {
            eprintln!("{phase}");
        }
    };
    let image = CacheDir::from_env().and_then(|cache| stock(&cache, &mut progress));
    let image = image.map_err(|error| format!("{error}\n  fix: {}", error.fix()))?;
    Ok(format!("{} ({})", image.kernel_version, image.origin))
}

pub(crate) fn measure_boot(runs: usize, report: &mut Report) -> Result<(), Failure> {
    let values = run_all(BOOT, runs)?;
    report.promised(
        "stock kernel, start to init",
        "s",
        &values["init"],
        Some(Promise::AtMost(40.0)),
        None,
    );
    report.add("  of which loading on the host", "s", &values["load"]);
    report.add("  start to the shell's prompt", "s", &values["prompt"]);
    report.add("  instructions to init", "million", &values["instructions"]);
    let rates: Vec<f64> = values["instructions"]
        .iter()
        .zip(&values["init"])
        .map(|(instructions, seconds)| instructions / seconds)
        .collect();
    report.add("  rate to init", "million instructions/s", &rates);
    report.promised(
        "256 MiB guest at the shell: VMM",
        "MiB",
        &values["vmm"],
        Some(Promise::AtMost(64.0)),
        None,
    );
    report.add("  less what other processes share", "MiB", &values["share"]);
    report.add("  guest RAM in use", "MiB", &values["guest"]);
    report.add("  host CPU time of a second idle", "ms", &values["idle"]);
    Ok(())
}

pub(crate) fn boot_child() -> Result<Values, Failure> {
    let mut guest = Guest::boot(&[], None)?;
    let init = guest.wait(STATUS_PORT, "init\n")?;
    let instructions = guest.machine.pause().counters().instructions();
    let prompt = guest.wait(TERMINAL, "# ")?;
    std::thread::sleep(SETTLE);
    let footprint = Footprint::now()?;
    let (before, second) = (cpu_time()?, Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    let idle = (cpu_time()? - before) / second.elapsed().as_secs_f64();
    Ok(Values::from([
        ("load".to_owned(), guest.load.as_secs_f64()),
        ("init".to_owned(), (init - guest.begun).as_secs_f64()),
        ("prompt".to_owned(), (prompt - guest.begun).as_secs_f64()),
        ("instructions".to_owned(), instructions as f64 / 1e6),
        ("vmm".to_owned(), mib(footprint.vmm)),
        ("share".to_owned(), mib(footprint.vmm_share)),
        ("guest".to_owned(), mib(footprint.guest)),
        ("idle".to_owned(), idle),
    ]))
}

/// Milliseconds of CPU time that all threads of this process took (`proc_pid_schedstat`).
fn cpu_time() -> Result<f64, Failure> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let first = text.split_whitespace().next().ok_or("an empty schedstat")?;
        nanoseconds += first.parse::<u64>()?;
    }
    Ok(nanoseconds as f64 / 1e6)
}

pub(crate) fn measure_transfer(runs: usize, report: &mut Report) -> Result<(), Failure> {
    let values = run_all(TRANSFER, runs)?;
    for (name, text) in [
        ("read", "disk, `dd if=/dev/vda bs=1M`"),
        ("write", "disk, `dd of=/dev/vda bs=1M conv=fsync`"),
        ("console", "console port, `dd bs=64k`"),
    ] {
        report.add(text, "MiB/s", &values[name]);
    }
    Ok(())
}

pub(crate) fn transfer_child() -> Result<Values, Failure> {
    let mut disk = tempfile::NamedTempFile::new()?;
    let megabyte: Vec<u8> = (0..1 << 20).map(|index: u32| (index >> 3) as u8).collect();
    for _ in 0..DISK >> 20 {
        disk.write_all(&megabyte)?;
    }
    // Each word on standard error begins or ends a stretch of time.
    let script = format!(
        "exec 3>&2 2>/dev/null; say() {{ echo $1 >&3; }}; \
         say a; dd if=/dev/vda of=/dev/null bs=1M; \
         say b; dd if=/dev/zero of=/dev/vda bs=1M count={} conv=fsync; \
         say c; dd if=/dev/zero bs=64k count={}",
        DISK >> 20,
        CONSOLE as u64 >> 16,
    );
    let mut guest = Guest::boot(&["sh", "-c", &script], Some(disk.path()))?;
    let a = guest.wait(STDERR_PORT, "a\n")?;
    let b = guest.wait(STDERR_PORT, "b\n")?;
    let c = guest.wait(STDERR_PORT, "c\n")?;
    let d = guest.wait_bytes(STDOUT_PORT, CONSOLE as usize)?;
    let rate = |bytes: f64, from: Instant, to: Instant| {
        bytes / f64::from(1 << 20) / (to - from).as_secs_f64()
    };
    Ok(Values::from([
        ("read".to_owned(), rate(DISK as f64, a, b)),
        ("write".to_owned(), rate(DISK as f64, b, c)),
        ("console".to_owned(), rate(CONSOLE, c, d)),
    ]))
}

pub(crate) fn measure_clock(report: &mut Report) -> Result<(), Failure> {
    eprintln!("{CLOCK}: {} s", WATCH.as_secs());
    let values = run_all(CLOCK, 1)?;
    report.promised(
        "guest's `date` against the host, after 2 minutes",
        "s",
        &values["offset"],
        Some(Promise::AtMost(1.0)),
        None,
    );
    report.add("  drift over them", "s", &values["drift"]);
    Ok(())
}

pub(crate) fn clock_child() -> Result<Values, Failure> {
    // Its `date` knows whole seconds only: a second is said when it begins.
    let script = format!(
        "tick() {{ old=$(date +%s); until new=$(date +%s); [ $new != $old ]; do :; done; echo $new; }}; \
         tick; (sleep {}; : >done) & until [ -e done ]; do :; done; tick",
        WATCH.as_secs()
    );
    let mut guest = Guest::boot(&["sh", "-c", &script], None)?;
    let mut offset = || -> Result<f64, Failure> {
        let (line, _) = guest.line(STDOUT_PORT)?;
        // On its way a line loses some milliseconds, the second as the first.
        let host = SystemTime::now().duration_since(UNIX_EPOCH)?;
        Ok((line.trim().parse::<f64>()? - host.as_secs_f64()).abs())
    };
    let (first, last) = (offset()?, offset()?);
    Ok(Values::from([
        ("offset".to_owned(), last),
        ("drift".to_owned(), (last - first).abs()),
    ]))
}

/// What the guest wrote, and when that arrived.
struct Written {
    port: &'static str,
    at: Instant,
    bytes: Vec<u8>,
}

struct Output {
    port: &'static str,
    to: Sender<Written>,
}

impl PortOutput for Output {
    fn write(&mut self, data: &[u8]) {
        // Nobody listens any more once the figure is known.
        let _ = self.to.send(Written {
            port: self.port,
            at: Instant::now(),
            bytes: data.to_vec(),
        });
    }
}

/// A booting guest.
struct Guest {
    machine: Machine,
    begun: Instant,
    load: Duration,
    written: Receiver<Written>,
    /// What was written to each port and not waited for yet.
    waiting: Vec<Written>,
}

impl Guest {
    /// Starts a machine; `command` is empty for a shell on the terminal.
    fn boot(command: &[&str], disk: Option<&Path>) -> Result<Self, Failure> {
        let image = stock(
            &CacheDir::from_env()?,
            &mut |_: Phase, _: u64, _: Option<u64>| {},
        )?;
        let session = session_archive(&Session {
            command: command.iter().map(Into::into).collect(),
            terminal: command.is_empty(),
            ..Session::default()
        })?;
        let config = MachineConfig {
            kernel: std::fs::read(&image.kernel)?.into(),
            initrds: vec![std::fs::read(&image.initramfs)?.into(), session.into()],
            command_line: format!("console=ttyS0 panic=-1 quiet {COMMAND_LINE}"),
            disks: disk
                .into_iter()
                .map(|path| DiskConfig {
                    path: path.to_owned(),
                    read_only: false,
                })
                .collect(),
            engine: EngineChoice::Only(EngineKind::Interp),
            ..MachineConfig::default()
        };
        let (to, written) = channel();
        let output = |port: &'static str| -> Box<dyn PortOutput> {
            let to = to.clone();
            Box::new(Output { port, to })
        };
        let ports = [STATUS_PORT, STDIN_PORT, STDOUT_PORT, STDERR_PORT];
        let hooks = Hooks {
            terminal: Some(output(TERMINAL)),
            ports: ports
                .into_iter()
                .map(|port| Port {
                    name: port.to_owned(),
                    output: output(port),
                })
                .collect(),
            ..Hooks::default()
        };
        let begun = Instant::now();
        let machine = Machine::start(config, hooks)?;
        Ok(Self {
            load: begun.elapsed(),
            machine,
            begun,
            written,
            waiting: Vec::new(),
        })
    }

    /// Waits for `text` on a port; gives when its last byte arrived.
    fn wait(&mut self, port: &str, text: &str) -> Result<Instant, Failure> {
        self.until(port, &format!("{text:?}"), |bytes| {
            let found = bytes
                .windows(text.len())
                .position(|at| at == text.as_bytes());
            found.map(|start| start + text.len())
        })
        .map(|(_, at)| at)
    }

    /// Waits for `count` bytes on a port; gives when the last of them arrived.
    fn wait_bytes(&mut self, port: &str, count: usize) -> Result<Instant, Failure> {
        self.until(port, &format!("{count} bytes"), |bytes| {
            (bytes.len() >= count).then_some(count)
        })
        .map(|(_, at)| at)
    }

    /// Waits for a line on a port.
    fn line(&mut self, port: &str) -> Result<(String, Instant), Failure> {
        let (bytes, at) = self.until(port, "a line", |bytes| {
            bytes
                .iter()
                .position(|&byte| byte == b'\n')
                .map(|end| end + 1)
        })?;
        Ok((String::from_utf8(bytes)?, at))
    }

    /// Waits until `enough` finds what it wants in a port's bytes, and takes them up to there.
    fn until(
        &mut self,
        port: &str,
        what: &str,
        enough: impl Fn(&[u8]) -> Option<usize>,
    ) -> Result<(Vec<u8>, Instant), Failure> {
        let mut bytes = Vec::new();
        let deadline = Instant::now() + LIMIT;
        loop {
            let next = match self.waiting.iter().position(|written| written.port == port) {
                Some(index) => self.waiting.remove(index),
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let next = self.written.recv_timeout(left);
                    let next = next.map_err(|_| format!("no {what} came on `{port}`"))?;
                    if next.port != port {
                        self.waiting.push(next);
                        continue;
                    }
                    next
                }
            };
            bytes.extend_from_slice(&next.bytes);
            if let Some(end) = enough(&bytes) {
                let rest = bytes.split_off(end);
                if !rest.is_empty() {
                    self.waiting.insert(
                        0,
                        Written {
                            bytes: rest,
                            ..next
                        },
                    );
                }
                return Ok((bytes, next.at));
            }
        }
    }
}
