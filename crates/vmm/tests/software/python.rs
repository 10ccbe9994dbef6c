//! CPython's own tests of numbers, text and bytes, from Debian's packages: mathematics with every corner of IEEE 754,
//! conversions to and from decimal, strings in all widths, checksums, compression. The same files run on the host and in
//! the guest, down to the C library, and each test must end alike.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use trapgate_vmm::{EngineChoice, EngineKind};

use crate::linux::{self, Linux};
use crate::packages::{self, run};
use crate::{everything, say, skipped};

/// All that Python needs, so that both sides have the same.
const PACKAGES: &[&str] = &[
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libpython3.11-testsuite",
    "libc6",
    "libgcc-s1",
    "libexpat1",
    "zlib1g",
    "libffi8",
    "libbz2-1.0",
    "liblzma5",
];

/// Modules that take the interpreter a minute.
const SHORT: &[&str] = &["cmath", "struct", "complex"];
/// Modules that take the translator seconds.
const QUICK: &[&str] = &["math", "cmath", "float", "strtod", "struct", "complex"];
/// Modules that take the translator a minute.
const LONG: &[&str] = &[
    "long",
    "unicode",
    "bytes",
    "re",
    "zlib",
    "binascii",
    "string",
    "array",
    "random",
    "fractions",
    "memoryview",
    "audioop",
];

/// Runs the modules that it is given and prints how each test ended.
const RUNNER: &str = "\
import sys, unittest
class Result(unittest.TestResult):
    def say(self, word, test): print(word, test.id(), flush=True)
    def addSuccess(self, test): self.say('ok', test)
    def addExpectedFailure(self, test, error): self.say('ok', test)
    def addSkip(self, test, why): self.say('skipped', test)
    def addFailure(self, test, error): self.say('failed', test); sys.stderr.write(self._exc_info_to_string(error, test))
    addError = addFailure
    def addUnexpectedSuccess(self, test): self.say('failed', test)
    def addSubTest(self, test, part, error):
        if error: self.addFailure(test, error)
for name in sys.argv[1:]:
    unittest.defaultTestLoader.loadTestsFromName('test.test_' + name).run(Result())
print('end')
";

/// How each test ended; `ok`, `skipped` or `failed`.
type Verdicts = BTreeMap<String, String>;

fn verdicts(output: &str) -> Verdicts {
    assert!(output.trim_end().ends_with("\nend"), "{output}");
    output
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(word, _)| ["ok", "skipped", "failed"].contains(word))
        .map(|(word, test)| (test.to_owned(), word.to_owned()))
        .collect()
}

fn on_host(root: &Path, modules: &[&str]) -> Verdicts {
    let libraries =
        ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|path| root.join(path));
    let output = run(Command::new(libraries[0].join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(format!(
            "{}:{}",
            libraries[0].display(),
            libraries[1].display()
        ))
        .arg(root.join("usr/bin/python3.11"))
        .args(["-c", RUNNER])
        .args(modules)
        .env("PYTHONHOME", root.join("usr"))
        .env("PYTHONHASHSEED", "0")
        // The guest gets a copy of the same directory.
        .env("PYTHONDONTWRITEBYTECODE", "1"));
    verdicts(&output.expect("Python runs here"))
}

fn in_guest(
    image: &trapgate_image::StockImage,
    engine: EngineKind,
    archive: &[u8],
    modules: &[&str],
) -> Verdicts {
    let mut command = vec!["env", "PYTHONHASHSEED=0", "python3.11", "-c", RUNNER];
    command.extend(modules);
    let guest = Linux::boot(image, &command, |config| {
        config.engine = EngineChoice::Only(engine);
        config.memory_bytes = 1 << 30;
        config.command_line = format!(
            "console=ttyS0 quiet panic=-1 {}",
            trapgate_image::COMMAND_LINE
        );
        config.initrds.push(archive.to_vec().into());
    });
    guest.powers_off();
    say(guest.stderr.text().trim_end());
    verdicts(&guest.stdout.text())
}

#[test]
fn tests_of_python_end_as_on_the_host() {
    let Some((image, _turn)) = linux::image().map(|image| (image, linux::turn())) else {
        return;
    };
    let root = packages::made("python", |work| {
        PACKAGES
            .iter()
            .try_for_each(|package| packages::fetch(&[], package, work))?;
        packages::unpack(work)?;
        std::fs::remove_dir_all(work.join("usr/share")).map_err(|error| error.to_string())
    });
    let archive = root
        .as_deref()
        .map_err(Clone::clone)
        .and_then(packages::archive);
    let (root, archive) = match (root, archive) {
        (Ok(root), Ok(archive)) => (root, archive),
        (Err(why), _) | (_, Err(why)) => return skipped("Python's tests", &why),
    };
    let all = [QUICK, LONG].concat();
    let runs: &[(EngineKind, &[&str])] = if everything() {
        &[(EngineKind::Jit, &all), (EngineKind::Interp, SHORT)]
    } else {
        &[(EngineKind::Jit, QUICK)]
    };
    for &(engine, modules) in runs {
        let host = on_host(&root, modules);
        let begun = std::time::Instant::now();
        let guest = in_guest(image, engine, &archive, modules);
        let count = |word: &str| guest.values().filter(|verdict| *verdict == word).count();
        say(&format!(
            "Python's tests, {} modules on {engine}: {} ok, {} skipped, {} failed, {:.0?}",
            modules.len(),
            count("ok"),
            count("skipped"),
            count("failed"),
            begun.elapsed()
        ));
        let differ: Vec<_> = host
            .iter()
            .filter(|(test, verdict)| guest.get(*test) != Some(verdict))
            .collect();
        assert!(
            differ.is_empty(),
            "these end otherwise on {engine}: {differ:?}"
        );
        assert_eq!(host.len(), guest.len(), "{engine}");
    }
}
