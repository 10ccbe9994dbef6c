//! Compiles each guest program in `programs/` to a bootable ELF file.
//!
//! The guests are freestanding programs, not part of the host build: they are compiled by calling
//! `rustc` directly, so that flags, sanitizers and profiles meant for the host never reach them.
//! The installed Linux target is enough: its `core` library needs no operating system. One thing
//! follows from using it: `core` is compiled with a red zone, so the runtime takes every interrupt
//! on a stack of its own (see `runtime/interrupts.rs`).

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Environment variables through which the host's build could reach into the guests'.
const NOT_INHERITED: &[&str] = &[
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTFLAGS",
    "CARGO_MAKEFLAGS",
    "MAKEFLAGS",
    "MFLAGS",
    "RUSTC_LOG",
    "RUST_TARGET_PATH",
];

/// Same code in every profile: what a guest prints and counts must not depend on the host's build.
const CODEGEN: &[&str] = &[
    "--edition=2024",
    "-Copt-level=2",
    "-Ccodegen-units=1",
    "-Cdebuginfo=0",
    "-Cdebug-assertions=no",
    "-Coverflow-checks=no",
    "-Cpanic=abort",
    "-Crelocation-model=static",
    "-Ccode-model=small",
    "-Ctarget-cpu=x86-64",
    "-Cno-redzone=yes",
    "-Cforce-unwind-tables=no",
    "-Cforce-frame-pointers=no",
];

fn main() {
    for watched in ["build.rs", "runtime", "programs", "expected"] {
        println!("cargo::rerun-if-changed={watched}");
    }
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");

    let root = PathBuf::from(cargo_sets("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(cargo_sets("OUT_DIR"));
    let target = guest_target();

    let runtime = out.join("libruntime.rlib");
    compile(
        rustc(&root, &target)
            .args(["--crate-name=runtime", "--crate-type=rlib", "-o"])
            .arg(&runtime)
            .arg("runtime/lib.rs"),
        "the guests' runtime",
        &target,
    );

    let mut table = String::from("&[\n");
    for name in programs(&root) {
        let image = out.join(format!("{name}.elf"));
        compile(
            rustc(&root, &target)
                .arg(format!("--crate-name={name}"))
                .args(["--crate-type=bin", "-o"])
                .arg(&image)
                .arg("--extern")
                .arg(format!("runtime={}", runtime.display()))
                .args(link_arguments(&root, &target))
                .arg(format!("programs/{name}/main.rs")),
            &format!("the guest `{name}`"),
            &target,
        );
        let expected = root.join(format!("expected/{name}.txt"));
        let expected = if expected.is_file() {
            format!("Some(include_str!({expected:?}))")
        } else {
            "None".to_owned()
        };
        writeln!(
            table,
            "    Program {{ name: {name:?}, image: include_bytes!({image:?}), expected: {expected} }},"
        )
        .expect("a String takes any text");
    }
    table.push(']');
    let list = out.join("programs.rs");
    if let Err(error) = fs::write(&list, table) {
        fail(
            &format!("cannot write {}: {error}", list.display()),
            "free some space or change the target directory",
        );
    }
}

/// The target the guests are compiled for: an x86-64 Linux target whose `core` is installed. The
/// one the host code is built for if it is such a target, else the machine's own.
fn guest_target() -> String {
    [cargo_sets("TARGET"), cargo_sets("HOST")]
        .into_iter()
        .find(|triple| triple.starts_with("x86_64-") && triple.contains("-linux-"))
        .unwrap_or_else(|| "x86_64-unknown-linux-gnu".to_owned())
}

fn rustc(root: &Path, target: &str) -> Command {
    let mut command = Command::new(cargo_sets("RUSTC"));
    // Relative source paths from here on: the guests' panic messages name no directory of the
    // machine they were built on.
    command
        .current_dir(root)
        .arg("--target")
        .arg(target)
        .args(CODEGEN);
    for variable in NOT_INHERITED {
        command.env_remove(variable);
    }
    command
}

fn link_arguments(root: &Path, target: &str) -> Vec<String> {
    let mut arguments = vec![
        "-Cstrip=debuginfo".to_owned(),
        "-Clink-arg=-T".to_owned(),
        format!("-Clink-arg={}", root.join("runtime/image.ld").display()),
    ];
    if target.ends_with("-musl") {
        // Else the start-up objects that come with the target are linked in.
        arguments.push("-Clink-self-contained=no".to_owned());
    }
    for flag in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,noexecstack",
    ] {
        arguments.push(format!("-Clink-arg={flag}"));
    }
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        // Only a linker driven the way `cc` is understands the arguments above.
        let linker = linker.to_string_lossy().into_owned();
        if linker.contains("cc") || linker.contains("clang") {
            arguments.push(format!("-Clinker={linker}"));
        }
    }
    arguments
}

fn programs(root: &Path) -> Vec<String> {
    let directory = root.join("programs");
    let entries = fs::read_dir(&directory).unwrap_or_else(|error| {
        fail(
            &format!("cannot list {}: {error}", directory.display()),
            "restore guests/programs",
        )
    });
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().join("main.rs").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn compile(command: &mut Command, what: &str, target: &str) {
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => fail(
            &format!(
                "cannot start {:?} to compile {what}: {error}",
                command.get_program()
            ),
            "check the Rust installation (`rustc --version`)",
        ),
    };
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        for line in text.lines().filter(|line| !line.is_empty()) {
            println!("cargo::warning={line}");
        }
        return;
    }
    eprintln!("{text}");
    let fix = if text.contains("linker `") && text.contains("not found") {
        "install a C linker, for example `apt-get install gcc`: the guests are linked by `cc`"
            .to_owned()
    } else if text.contains("can't find crate for `core`") {
        format!("install the target's core library: `rustup target add {target}`")
    } else {
        "the compiler's messages above say more".to_owned()
    };
    fail(&format!("cannot build {what} for {target}"), &fix);
}

fn cargo_sets(variable: &str) -> String {
    env::var(variable)
        .unwrap_or_else(|_| fail(&format!("{variable} is not set"), "build with cargo"))
}

fn fail(problem: &str, fix: &str) -> ! {
    println!("cargo::error={problem}; fix: {fix}");
    exit(1)
}
