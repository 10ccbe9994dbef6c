//! A machine with the distribution's stock kernel and the init of `trapgate_image`.
#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test binary uses its own part"
)]

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use trapgate_image::{
    CacheDir, Phase, STATUS_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT, Session, StockImage,
    cached, session_archive, stock, stock_of,
};
use trapgate_vmm::{Content, Hooks, Host, Machine, MachineConfig, Outcome, Port};

use crate::boot::{Transcript, end, skipped};

/// Kernel and initramfs, or why there are none.
pub(crate) fn image() -> Option<&'static StockImage> {
    static IMAGE: OnceLock<Result<StockImage, String>> = OnceLock::new();
    let image = IMAGE.get_or_init(|| {
        let cache = CacheDir::from_env().map_err(|error| error.to_string())?;
        stock(&cache, &mut |_: Phase, _: u64, _: Option<u64>| {}).map_err(|error| error.to_string())
    });
    match image {
        Ok(image) => Some(image),
        Err(why) => {
            skipped(&format!("no stock kernel to boot: {why}"));
            None
        }
    }
}

/// The kernel that this package depends on, with its initramfs, if it is in the cache or may be fetched.
pub(crate) fn image_of(package: &str, fetch: bool) -> Option<StockImage> {
    let cache = CacheDir::from_env().ok()?;
    let cache = CacheDir::at(cache.path().join("other").join(package));
    let image = if fetch {
        stock_of(package, &cache, &mut |_: Phase, _: u64, _: Option<u64>| {})
            .map_err(|error| error.to_string())
    } else {
        cached(&cache).ok_or_else(|| "it was not fetched".to_owned())
    };
    image
        .map_err(|why| skipped(&format!("{package}: {why}")))
        .ok()
}

pub(crate) struct Linux {
    pub(crate) machine: Machine,
    pub(crate) serial: Transcript,
    pub(crate) terminal: Transcript,
    pub(crate) status: Transcript,
    pub(crate) stdout: Transcript,
    pub(crate) stderr: Transcript,
}

impl Linux {
    /// Boots, and runs `command`, or a shell on the terminal if it is empty.
    pub(crate) fn boot(
        image: &StockImage,
        command: &[&str],
        change: impl FnOnce(&mut MachineConfig),
    ) -> Self {
        let session = Session {
            command: command.iter().map(Into::into).collect(),
            ..Session::default()
        };
        let read = |path| Content::from(std::fs::read(path).unwrap());
        let mut config = MachineConfig {
            kernel: read(&image.kernel),
            initrds: vec![
                read(&image.initramfs),
                session_archive(&session).unwrap().into(),
            ],
            command_line: "console=ttyS0 quiet panic=-1".to_owned(),
            // As `trapgate run` gives it.
            level: Host::probe().level(),
            ..MachineConfig::default()
        };
        change(&mut config);
        Self::connected(|hooks| Machine::start(config, hooks).unwrap())
    }

    /// The machine that is made with these connections.
    pub(crate) fn connected(make: impl FnOnce(Hooks) -> Machine) -> Self {
        let [serial, terminal, status, stdout, stderr] = [(); 5].map(|()| Transcript::default());
        let port = |name: &str, output: &Transcript| Port {
            name: name.to_owned(),
            output: Box::new(output.clone()),
        };
        let sink = serial.clone();
        let hooks = Hooks {
            serial: Box::new(move |bytes| sink.add(bytes)),
            terminal: Some(Box::new(terminal.clone())),
            ports: vec![
                port(STATUS_PORT, &status),
                Port {
                    name: STDIN_PORT.to_owned(),
                    output: Box::new(()),
                },
                port(STDOUT_PORT, &stdout),
                port(STDERR_PORT, &stderr),
            ],
        };
        let machine = make(hooks);
        Self {
            machine,
            serial,
            terminal,
            status,
            stdout,
            stderr,
        }
    }

    #[track_caller]
    pub(crate) fn powers_off(&self) {
        let outcome = end(&self.machine, &self.serial);
        assert!(
            matches!(outcome, Outcome::PoweredOff),
            "{outcome:?}; serial port:\n{}",
            self.serial.text()
        );
    }
}

/// Boots take seconds of a host CPU each, and a test's patience is counted in host time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A turn, which ends when this is dropped.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The image and a turn, or the end of the test.
macro_rules! image_or_skip {
    () => {{
        let Some(image) = crate::linux::image() else {
            return;
        };
        (image, crate::linux::turn())
    }};
}
pub(crate) use image_or_skip;
