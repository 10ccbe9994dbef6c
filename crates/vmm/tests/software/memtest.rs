//! memtest86+ as it comes in its package: an image that a boot loader starts like Linux, with its own drivers and no
//! operating system below it.

use std::time::Duration;

use trapgate_vmm::{Content, EngineChoice, EngineKind, Hooks, Host, Machine, MachineConfig};

use crate::boot::Transcript;
use crate::{ENGINES, everything, packages, say, skipped};

/// Guest memory.
const MEMORY: u64 = 64 << 20;

/// How long a pass may take: half an hour of the interpreter's with a host CPU to itself, in which three minutes are spent
/// waiting for bits to fade. With all of these tests at once it has half of one.
const LIMIT: Duration = Duration::from_secs(2 * 3600);

/// How many passes were done, as the screen said last.
fn passes(screen: &str) -> u32 {
    let passes = numbers(screen, "Pass:  ");
    passes.last().copied().unwrap_or(0)
}

/// The tests that the screen named. It is drawn now and then, so a short test may never be on it.
fn tests(screen: &str) -> Vec<u32> {
    numbers(screen, "#")
}

/// The number after each occurrence of `mark`.
fn numbers(screen: &str, mark: &str) -> Vec<u32> {
    screen
        .split(mark)
        .skip(1)
        .filter_map(|rest| {
            rest.split(|c: char| !c.is_ascii_digit())
                .next()?
                .parse()
                .ok()
        })
        .collect()
}

/// Runs an image until it begins this test, or one behind it; or for a whole pass.
fn run(file: &str, engine: EngineKind, until: Option<u32>) {
    let package = match packages::native("memtest86+") {
        Ok(directory) => directory,
        Err(why) => return skipped("memtest86+", &why),
    };
    let image = std::fs::read(package.join("boot").join(file)).expect("it is in the package");
    let config = MachineConfig {
        kernel: Content::from(image),
        command_line: "console=ttyS0,115200 nosmp".to_owned(),
        memory_bytes: MEMORY,
        engine: EngineChoice::Only(engine),
        level: Host::probe().level(),
        ..MachineConfig::default()
    };
    let screen = Transcript::default();
    let sink = screen.clone();
    let hooks = Hooks {
        serial: Box::new(move |bytes| sink.add(bytes)),
        ..Hooks::default()
    };
    let machine = Machine::start(config, hooks).expect("it boots like Linux");
    let begun = std::time::Instant::now();
    let reached = screen.waits_until(LIMIT, |screen| {
        passes(screen) >= 1
            || until.is_some_and(|first| tests(screen).iter().any(|test| *test >= first))
    });
    drop(machine);

    let text = screen.text();
    assert!(reached, "{file} on {engine}: {text}");
    let errors = numbers(&text, "Errors: ");
    assert!(text.contains("Memory  :   64MB"), "{text}");
    assert!(
        !errors.is_empty() && errors.iter().all(|count| *count == 0),
        "{errors:?}: {text}"
    );
    say(&format!(
        "memtest86+, {file} on {engine}: {} passes, to test {}, no errors, {:.0?}",
        passes(&text),
        tests(&text).last().copied().unwrap_or(0),
        begun.elapsed()
    ));
}

/// The first three tests are about addresses; from the third on patterns move through all of memory.
#[test]
fn memtest_of_64_bits_finds_no_errors() {
    let file = "memtest86+x64.bin";
    if everything() {
        std::thread::scope(|scope| {
            for engine in ENGINES {
                scope.spawn(move || run(file, engine, None));
            }
        });
    } else {
        run(file, EngineKind::Jit, Some(4));
    }
}

/// A pass of the interpreter's only: the translator leaves 32-bit code of ring 0 to it.
#[test]
fn memtest_of_32_bits_finds_no_errors() {
    let file = "memtest86+ia32.bin";
    if everything() {
        run(file, EngineKind::Jit, Some(4));
        run(file, EngineKind::Interp, None);
    } else {
        run(file, EngineKind::Interp, Some(2));
    }
}

#[test]
fn test_that_the_screen_skips_is_passed_by_the_next() {
    let screen = "76% ####\x1b[4;35H #2  [Address] #5  [Block move] | Pass:  0        Errors: 0 ";
    assert_eq!(tests(screen), [2, 5]);
    assert_eq!(passes(screen), 0);
}
