//! Debian packages of either architecture, unpacked. Needs apt and dpkg-deb, no root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The directory of what is fetched and built; it outlives the tests.
pub(crate) fn directory() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("software")
}

/// The directory below [`directory`] that `make` fills, once.
pub(crate) fn made(
    name: &str,
    make: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<PathBuf, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let (target, work) = (
        directory().join(name),
        directory().join(format!("{name}.part")),
    );
    if !target.exists() {
        // An earlier attempt may have left its parts.
        let _ = std::fs::remove_dir_all(&work);
        std::fs::create_dir_all(&work).map_err(|error| error.to_string())?;
        make(&work)?;
        std::fs::rename(&work, &target).map_err(|error| error.to_string())?;
    }
    Ok(target)
}

/// The unpacked files of a package of the host's own architecture.
pub(crate) fn native(package: &str) -> Result<PathBuf, String> {
    made(package, |work| {
        fetch(&[], package, work)?;
        unpack(work)
    })
}

/// The unpacked files of i386 packages. Where a package only depends on the one that is meant, as
/// `linux-image-686` does on a version of itself, that is taken in its place.
pub(crate) fn i386(packages: &[&str]) -> Result<PathBuf, String> {
    made(&packages.join("+"), |work| {
        // Lists of our own: the system need not know the architecture, and only root may change what it knows.
        let state = work.join("apt");
        for directory in ["state/lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(state.join(directory)).map_err(|error| error.to_string())?;
        }
        let options = [
            "APT::Architecture=i386".to_owned(),
            "APT::Architectures=i386".to_owned(),
            format!("Dir::State={}", state.join("state").display()),
            format!("Dir::State::Lists={}", state.join("state/lists").display()),
            format!("Dir::Cache={}", state.join("cache").display()),
            "Dir::State::status=/dev/null".to_owned(),
        ];
        // It fails where one of several mirrors is amiss; whether the others are enough shows below.
        let updated = run(apt("apt-get", &options).arg("update"));
        for package in packages {
            let depends = run(apt("apt-cache", &options).args(["depends", package]))
                .map_err(|why| updated.clone().err().unwrap_or(why))?;
            let versioned = depends
                .lines()
                .filter_map(|line| line.trim().strip_prefix("Depends: "))
                .find(|name| name.starts_with("linux-image-"));
            fetch(&options, versioned.unwrap_or(package), work)?;
        }
        unpack(work)?;
        std::fs::remove_dir_all(state).map_err(|error| error.to_string())
    })
}

fn apt(program: &str, options: &[String]) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    // As root it would drop to a user who may not write here.
    command.args(["-o", "APT::Sandbox::User=root"]);
    command.args(["-o", "Acquire::Languages=none", "-o", "Acquire::Retries=2"]);
    for option in options {
        command.args(["-o", option]);
    }
    command
}

pub(crate) fn fetch(options: &[String], package: &str, into: &Path) -> Result<(), String> {
    run(apt("apt-get", options)
        .args(["download", package])
        .current_dir(into))
    .map(drop)
}

/// Unpacks the packages in a directory into it, and removes them.
pub(crate) fn unpack(directory: &Path) -> Result<(), String> {
    let entries = std::fs::read_dir(directory).map_err(|error| error.to_string())?;
    let packages = entries.flatten().map(|entry| entry.path());
    for package in packages.filter(|path| path.extension().is_some_and(|end| end == "deb")) {
        run(Command::new("dpkg-deb")
            .arg("-x")
            .args([&package, directory]))?;
        std::fs::remove_file(package).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Runs a command to its end; gives what it printed, or why it failed in one line.
pub(crate) fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let words = stderr
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("");
    Err(format!("{name}: {}: {words}", output.status))
}

/// An uncompressed initramfs of a directory's files.
pub(crate) fn archive(root: &Path) -> Result<Vec<u8>, String> {
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", "find . | cpio -o -H newc --quiet"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("bash: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "cpio: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    Ok(output.stdout)
}
