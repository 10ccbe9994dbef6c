//! memtest86+ as it comes in its package: an image that a boot loader starts like Linux, with its own drivers and no
//! operating system below it.

use std::time::Duration;

use trapgate_vmm::{Content, EngineChoice, EngineKind, Hooks, Host, Machine, MachineConfig};

use crate::boot::Transcript;
use crate::{ENGINES, everything, packages, say, skipped};

/// Guest memory.
const MEMORY: u64 = 64 << 20;

/// How long a pass may take: three minutes are spent waiting for bits to fade.
const LIMIT: Duration = Duration::from_secs(3600);

/// How many passes were done, as the screen said last.
fn passes(screen: &str) -> Option<u32> {
    numbers(screen, "Pass:  ").into_iter().next_back()
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

/// Runs an image until its screen holds `goal`.
fn run(file: &str, engine: EngineKind, goal: impl Fn(&str) -> bool) {
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
    let reached = screen.waits_until(LIMIT, goal);
    drop(machine);

    let text = screen.text();
    assert!(reached, "{text}");
    let errors = numbers(&text, "Errors: ");
    assert!(text.contains("Memory  :   64MB"), "{text}");
    assert!(
        !errors.is_empty() && errors.iter().all(|count| *count == 0),
        "{errors:?}: {text}"
    );
    say(&format!(
        "memtest86+, {file} on {engine}: {} passes, no errors, {:.0?}",
        passes(&text).unwrap_or(0),
        begun.elapsed()
    ));
}

/// This test is about to begin, so those before it are done. The first three are about addresses; from the third on
/// patterns move through all of memory.
fn test_begins(number: u32) -> impl Fn(&str) -> bool {
    move |screen| screen.contains(&format!("#{number} "))
}

#[test]
fn memtest_finds_no_errors() {
    if everything() {
        for engine in ENGINES {
            for file in ["memtest86+x64.bin", "memtest86+ia32.bin"] {
                run(file, engine, |screen| passes(screen) == Some(1));
            }
        }
    } else {
        run("memtest86+x64.bin", EngineKind::Jit, test_begins(4));
        run("memtest86+ia32.bin", EngineKind::Interp, test_begins(2));
    }
}
