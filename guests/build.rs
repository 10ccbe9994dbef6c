//! Compiles each guest program in `programs/` to a bootable ELF file.
//!
//! The guests are freestanding programs, not part of the host build: they are compiled by calling
//! `rustc` directly, so that flags, sanitizers and profiles meant for the host never reach them.
//!
//! They are compiled for `x86_64-unknown-none`, whose `core` library uses general registers only:
//! a KVM that emulates supervisor code executes little of SSE. Where that target is not installed
//! the Linux target does: the guests then run on every engine that executes SSE in ring 0, and a
//! warning says how to get the other. (No `rust-toolchain.toml` asks for the target: with it rustup
//! would update a toolchain that is called `stable`, and refuse to build where it has no network.)
//! One thing follows from the second choice: its `core` is compiled with a red zone, so the runtime
//! takes every interrupt on a stack of its own (see `runtime/interrupts.rs`).

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
    let target = guest_target(&root);

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
        let text = |file: String| {
            let file = root.join("expected").join(file);
            if file.is_file() {
                format!("Some(include_str!({file:?}))")
            } else {
                "None".to_owned()
            }
        };
        let expected = text(format!("{name}.txt"));
        let expected_v3 = text(format!("{name}.v3.txt"));
        writeln!(
            table,
            "    Program {{ name: {name:?}, image: include_bytes!({image:?}), expected: {expected}, expected_v3: {expected_v3} }},"
        )
        .expect("a String takes any text");
    }
    table.push(']');
    // Read by `src/lib.rs`.
    println!("cargo::rustc-env=GUEST_TARGET={target}");
    let list = out.join("programs.rs");
    if let Err(error) = fs::write(&list, table) {
        fail(
            &format!("cannot write {}: {error}", list.display()),
            "free some space or change the target directory",
        );
    }
}

/// Whose `core` uses general registers only.
const FREESTANDING: &str = "x86_64-unknown-none";

/// The target the guests are compiled for: [`FREESTANDING`] if its `core` is installed. Else an
/// x86-64 Linux target: the one the host code is built for if it is such a target, or the machine's
/// own.
fn guest_target(root: &Path) -> String {
    if is_installed(root, FREESTANDING) {
        return FREESTANDING.to_owned();
    }
    println!(
        "cargo::warning=the guests are built with SSE, so they will not run on a KVM without \
         virtualization hardware; fix: `rustup target add {FREESTANDING}`, then `touch guests/build.rs`"
    );
    [cargo_sets("TARGET"), cargo_sets("HOST")]
        .into_iter()
        .find(|triple| triple.starts_with("x86_64-") && triple.contains("-linux-"))
        .unwrap_or_else(|| "x86_64-unknown-linux-gnu".to_owned())
}

/// Whether the compiler has a `core` library for `target`.
fn is_installed(root: &Path, target: &str) -> bool {
    let Ok(output) = rustc(root, target)
        .args(["--print", "target-libdir"])
        .output()
    else {
        return false;
    };
    let directory = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let Ok(entries) = fs::read_dir(directory) else {
        return false;
    };
    entries.filter_map(Result::ok).any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
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
        "-Crelro-level=off".to_owned(),
        "-Clink-arg=-T".to_owned(),
        format!("-Clink-arg={}", root.join("runtime/image.ld").display()),
    ];
    if target == FREESTANDING {
        // Linked by the linker that comes with the compiler.
        for flag in ["--build-id=none", "-zmax-page-size=4096", "-znoexecstack"] {
            arguments.push(format!("-Clink-arg={flag}"));
        }
        return arguments;
    }
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
