//! Linux's own x86 selftests (`tools/testing/selftests/x86`): on the host, and in the guest on each engine.
//!
//! They test what emulators get wrong: signals that return to bad segments, faults of IRET, single steps over SYSCALL,
//! 16-bit stacks, system calls with wild flags.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use trapgate_vmm::{EngineChoice, EngineKind};

use crate::linux::{self, Linux};
use crate::packages::{self, run};
use crate::{ENGINES, everything, say, skipped};

/// Tests that fail in the guest, and why that is as it should be.
const EXCUSED: &[(&str, &str)] = &[("amx_64", "the CPU profiles have no AMX")];

/// Counts in the guest that may fall short of the host's: a test, its checks that are good, and what it leaves out.
type Fewer = (&'static str, usize, usize);

/// Under any kernel.
const FEWER: &[Fewer] = &[
    // Signal frames without AVX-512 fit the stack that is to be too small.
    ("sigaltstack_32", 1, 0),
    ("sigaltstack_64", 1, 0),
    // The kernel has no getcpu for 32-bit programs.
    ("test_vsyscall_32", 2, 0),
];

/// Under Debian's kernel for clouds, which has no 16-bit segments.
const FEWER_IN_CLOUDS: &[Fewer] = &[("sigreturn_32", 10, 4), ("sigreturn_64", 12, 5)];

/// Those for the interpreter, when there is only a minute in all: about what the CPU does at the edges of system calls,
/// returns and debugging.
const TELLING: &[&str] = &[
    "mov_ss_trap_",
    "ptrace_syscall_",
    "sigreturn_",
    "single_step_syscall_",
    "syscall_arg_fault_",
    "syscall_nt_",
    "sysret_ss_attrs_",
];

/// In the guest each test must be done by then; on the host in a tenth.
const SECONDS: u64 = 300;

/// The words for the guest's kernel: the host's has this page too.
const VSYSCALL: &str = "vsyscall=xonly";

/// What the guest prints before the name of a test and before its status.
const NAME: &str = "trapgate-test: ";
const STATUS: &str = "trapgate-test-status: ";

/// The status of what `timeout` killed.
const KILLED: i32 = 128 + 9;

/// Source that is needed, of all of the kernel's.
const SOURCES: &str = "tools/testing/selftests/x86 tools/testing/selftests/kselftest.h \
    tools/testing/selftests/lib.mk tools/scripts/Makefile.arch arch/x86/include/asm/desc_defs.h";

/// How a test ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Exit status; `None` if it did not end by itself.
    status: Option<i32>,
    /// Checks that it calls good, bad, and not done.
    good: usize,
    bad: usize,
    left_out: usize,
}

impl Verdict {
    pub(crate) fn of(status: Option<i32>, output: &str) -> Self {
        let count = |marks: &[&str]| {
            let marked = |line: &&str| marks.iter().any(|mark| line.contains(mark));
            output.lines().filter(marked).count()
        };
        Self {
            status,
            good: count(&["[OK]", "[PASS]"]),
            bad: count(&["[FAIL]"]),
            left_out: count(&["[SKIP]"]),
        }
    }

    pub(crate) fn passed(&self) -> bool {
        self.status == Some(0) && self.bad == 0
    }

    /// Whether it checked no less and left out no more than on the host, but for what is known to be missing. A test that forks
    /// with lines in its buffer prints them once more for each process, so what is left out is counted by what is checked.
    fn checks_enough(&self, name: &str, host: &Self, known: &[Fewer]) -> bool {
        (self.good >= host.good && self.left_out * host.good <= host.left_out * self.good)
            || known.contains(&(name, self.good, self.left_out))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            _ if self.passed() => write!(f, "pass, {} checks", self.good)?,
            Some(status) => write!(
                f,
                "FAIL, {} of {} checks, status {status}",
                self.bad,
                self.bad + self.good
            )?,
            None => f.write_str("FAIL, does not end")?,
        }
        if self.left_out != 0 {
            write!(f, ", {} left out", self.left_out)?;
        }
        Ok(())
    }
}

/// Verdicts by the tests' names.
pub(crate) type Verdicts = BTreeMap<String, Verdict>;

/// The directory with the built tests, 64-bit and where the compiler can, 32-bit.
fn built() -> Result<PathBuf, String> {
    packages::made("selftests", |work| {
        let unpack = format!(
            "apt-get -o APT::Sandbox::User=root download linux-source-6.1
            dpkg-deb --fsys-tarfile *.deb | tar xO ./usr/src/linux-source-6.1.tar.xz | xz -dcT0 |
                tar x --strip-components=1 $(printf 'linux-source-6.1/%s ' {SOURCES})
            rm *.deb"
        );
        let bash = ["-euo", "pipefail", "-c"];
        run(Command::new("bash")
            .args(bash)
            .arg(unpack)
            .current_dir(work))?;
        let out = work.join("out");
        std::fs::create_dir_all(&out).map_err(|error| error.to_string())?;
        run(Command::new("make")
            .args(["-j2", "CC=gcc"])
            .arg(format!("OUTPUT={}", out.display()))
            .current_dir(work.join("tools/testing/selftests/x86")))?;
        Ok(())
    })
    .map(|directory| directory.join("out"))
}

/// The names of the built tests.
fn names(built: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(built).expect("it was built").flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// An initramfs with tests, the libraries that they need, and the script `/selftests/run`.
pub(crate) fn archive(width: Option<&str>) -> Result<Vec<u8>, String> {
    let built = built()?;
    let root = tempfile::tempdir().map_err(|error| error.to_string())?;
    let copy = |from: &Path, to: &Path| {
        let to = root.path().join(to.strip_prefix("/").unwrap_or(to));
        std::fs::create_dir_all(to.parent().expect("it has a name"))?;
        std::fs::copy(from, to)
    };
    for name in names(&built) {
        if width.is_some_and(|width| !name.ends_with(width)) {
            continue;
        }
        let program = built.join(&name);
        let mut files = vec![(program.clone(), Path::new("selftests").join(&name))];
        // It fails for a program that is linked statically.
        let libraries = run(Command::new("ldd").arg(&program)).unwrap_or_default();
        let paths = libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'));
        files.extend(paths.map(|path| (path.into(), path.into())));
        for (from, to) in files {
            copy(&from, &to).map_err(|error| format!("{}: {error}", from.display()))?;
        }
    }
    let script = format!(
        "cd /selftests
        for test in $*; do
            echo {NAME}$test
            # Until what it leaves behind has said its last, too.
            {{ timeout -s KILL {SECONDS} ./$test </dev/null 2>&1; echo $? >/tmp/status; }} | cat
            echo
            echo {STATUS}$(cat /tmp/status)
        done"
    );
    std::fs::write(root.path().join("selftests/run"), script).map_err(|error| error.to_string())?;
    packages::archive(root.path())
}

/// The names of the tests of a width that are built.
pub(crate) fn names_of(width: &str) -> Result<Vec<String>, String> {
    let mut names = names(&built()?);
    names.retain(|name| name.ends_with(width));
    Ok(names)
}

/// What the script printed.
pub(crate) fn verdicts(output: &str) -> Verdicts {
    output
        .split(NAME)
        .filter_map(|part| {
            let (name, rest) = part.split_once('\n')?;
            let (output, status) = rest.split_once(STATUS)?;
            let status = status.lines().next()?.trim().parse().ok();
            let status = status.filter(|status| *status != KILLED);
            Some((name.trim().to_owned(), Verdict::of(status, output)))
        })
        .collect()
}

/// Runs a test here.
fn on_host(program: &Path) -> Verdict {
    let log = tempfile::NamedTempFile::new().expect("room for a file");
    let sink = || log.reopen().expect("it is there");
    let mut child = Command::new(program)
        .current_dir(program.parent().expect("it is in a directory"))
        .stdin(Stdio::null())
        .stdout(sink())
        .stderr(sink())
        .spawn()
        .expect("it was built here");
    let deadline = Instant::now() + Duration::from_secs(SECONDS / 10);
    let status = loop {
        match child.try_wait().expect("it is our child") {
            Some(status) => break status.code(),
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let output = std::fs::read(log.path()).unwrap_or_default();
    Verdict::of(status, &String::from_utf8_lossy(&output))
}

/// Runs tests in a guest.
fn in_guest(
    image: &trapgate_image::StockImage,
    engine: EngineKind,
    archive: &[u8],
    names: &[String],
) -> Verdicts {
    let mut command = vec!["sh", "/selftests/run"];
    command.extend(names.iter().map(String::as_str));
    let guest = Linux::boot(image, &command, |config| {
        config.engine = EngineChoice::Only(engine);
        // Some tests move to another processor.
        config.cpus = 2;
        config.command_line = format!(
            "console=ttyS0 quiet panic=-1 {} {VSYSCALL}",
            trapgate_image::COMMAND_LINE
        );
        config.initrds.push(archive.to_vec().into());
    });
    guest.powers_off();
    verdicts(&guest.stdout.text())
}

/// The cell for a test that was not run.
const NOT_RUN: &str = "";

#[test]
fn selftests_of_linux_pass_in_the_guest() {
    let image = if everything() {
        // It has what the kernel for clouds leaves out: 16-bit segments.
        linux::image_of("linux-image-amd64", true)
    } else {
        linux::image().cloned()
    };
    let Some(image) = image else { return };
    let (built, archive) = match (built(), archive(None)) {
        (Ok(built), Ok(archive)) => (built, archive),
        (Err(why), _) | (_, Err(why)) => return skipped("Linux's selftests", &why),
    };
    let _turn = linux::turn();
    let names = names(&built);
    if !names.iter().any(|name| name.ends_with("_32")) {
        skipped("Linux's 32-bit selftests", "gcc -m32 does not work");
    }

    let host: Verdicts = names
        .iter()
        .map(|name| (name.clone(), on_host(&built.join(name))))
        .collect();
    let guests = ENGINES.map(|engine| {
        let mut chosen = names.clone();
        if engine == EngineKind::Interp && !everything() {
            chosen.retain(|name| TELLING.iter().any(|start| name.starts_with(start)));
        }
        let verdicts = in_guest(&image, engine, &archive, &chosen);
        assert_eq!(verdicts.len(), chosen.len(), "{engine}: {verdicts:?}");
        verdicts
    });

    let mut table = format!(
        "| test | host | {} | {} |\n| --- | --- | --- | --- |\n",
        ENGINES[0], ENGINES[1]
    );
    let mut known = FEWER.to_vec();
    if image.kernel_version.contains("cloud") {
        known.extend(FEWER_IN_CLOUDS);
    }
    let mut wrong = Vec::new();
    for name in &names {
        let cell = |verdicts: &Verdicts| {
            verdicts
                .get(name)
                .map_or(NOT_RUN.into(), |verdict| verdict.to_string())
        };
        let cells: Vec<_> = guests.iter().map(cell).collect();
        table += &format!("| {name} | {} | {} |\n", cell(&host), cells.join(" | "));
        let excused = EXCUSED.iter().any(|(excused, _)| excused == name);
        let as_it_should = |verdict: &Verdict| {
            verdict.passed() != excused
                && (excused || verdict.checks_enough(name, &host[name], &known))
        };
        let mut found = guests.iter().filter_map(|verdicts| verdicts.get(name));
        if !found.all(as_it_should) {
            wrong.push(name);
        }
    }
    let file = packages::directory().join("selftests.md");
    std::fs::write(&file, &table).expect("room for a table");
    say(&format!(
        "Linux's selftests, {}:\n{table}",
        image.kernel_version
    ));
    assert!(
        wrong.is_empty(),
        "these end other than they should: {wrong:?}; see {}",
        file.display()
    );
}

#[test]
fn guest_that_checks_less_than_the_host_is_seen() {
    let verdict = |good, left_out| Verdict {
        status: Some(0),
        good,
        bad: 0,
        left_out,
    };
    let known = &[("a_64", 4, 1)];
    let host = verdict(5, 0);
    for (name, good, left_out, enough) in [
        ("a_64", 5, 0, true),
        ("a_64", 6, 0, true),
        ("a_64", 5, 1, false),
        ("a_64", 4, 1, true),
        ("a_64", 4, 2, false),
        ("a_64", 3, 1, false),
        ("b_64", 4, 1, false),
    ] {
        let found = verdict(good, left_out).checks_enough(name, &host, known);
        assert_eq!(found, enough, "{name} {good} {left_out}");
    }
}

#[test]
fn verdicts_are_read_from_the_output() {
    let output = format!(
        "{NAME}a_32\n[RUN]\tx\n[OK]\ty\n[SKIP]\tz\n{STATUS}0\n{NAME}b_64\n[FAIL]\tq\n{STATUS}0\n\
         {NAME}c_64\r\n{STATUS}137\r\n{NAME}d_64\n"
    );
    let verdicts = verdicts(&output);
    let texts: Vec<_> = verdicts
        .iter()
        .map(|(name, verdict)| format!("{name} {} {verdict}", verdict.passed()))
        .collect();
    assert_eq!(
        texts,
        [
            "a_32 true pass, 1 checks, 1 left out",
            "b_64 false FAIL, 1 of 1 checks, status 0",
            "c_64 false FAIL, does not end",
        ]
    );
}
