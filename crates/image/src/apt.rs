//! Packages by way of apt.
//!
//! apt checks what it fetches against its signed lists. Where the system's lists are missing or too old, root updates
//! them; who isn't root, or can't, gets lists of their own for this one time, under the cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::cache::{need_space, publish, write_file};
use crate::packages::{Package, resolve};
use crate::{CacheDir, ImageError, Origin, Parts, Phase, Progress, deb, host};

/// Space that lists of our own take while they are needed, bytes.
const LISTS_NEED: u64 = 256 << 20;

/// What is in a directory of kept packages: `origin NAME VERSION`, and for each package `file SIZE NAME`.
const KEPT: &str = "kept";

/// Makes the parts from packages of an earlier run, if there are any.
pub(crate) fn kept(
    cache: &CacheDir,
    progress: &mut dyn Progress,
) -> Result<Option<Parts>, ImageError> {
    let entries = fs::read_dir(cache.packages())
        .into_iter()
        .flatten()
        .flatten();
    let mut directories: Vec<_> = entries.map(|e| e.path()).collect();
    directories.sort_by(|a, b| host::compare_versions(&b.to_string_lossy(), &a.to_string_lossy()));
    for directory in directories {
        if let Some((origin, files)) = read_kept(&directory) {
            match deb::parts(&files, origin, progress) {
                Ok(parts) => return Ok(Some(parts)),
                // Damaged in the cache: fetched anew.
                Err(
                    ImageError::Package { .. }
                    | ImageError::Missing { .. }
                    | ImageError::NotAKernel { .. },
                ) => {}
                Err(error) => return Err(error),
            }
        }
        let _ = fs::remove_dir_all(&directory);
    }
    Ok(None)
}

fn read_kept(directory: &Path) -> Option<(Origin, Vec<PathBuf>)> {
    let text = fs::read_to_string(directory.join(KEPT)).ok()?;
    let mut origin = None;
    let mut files = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        match (words.next()?, words.next()?, words.next()?) {
            ("origin", name, version) => {
                origin = Some(Origin::Package {
                    name: name.into(),
                    version: version.into(),
                })
            }
            ("file", size, name) => {
                let path = directory.join(name);
                (path.metadata().ok()?.len() == size.parse().ok()?).then_some(())?;
                files.push(path);
            }
            _ => return None,
        }
    }
    Some((origin?, files))
}

/// Fetches the packages, makes the parts from them, and keeps the packages. The kernel is that which the first
/// known package of `kernels` depends on.
pub(crate) fn fetch(
    kernels: &[&str],
    cache: &CacheDir,
    work: &Path,
    progress: &mut dyn Progress,
) -> Result<Parts, ImageError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let find = |name: &str| {
        std::env::split_paths(&path)
            .map(|d| d.join(name))
            .find(|p| p.is_file())
    };
    let (Some(get), Some(query)) = (find("apt-get"), find("apt-cache")) else {
        return Err(ImageError::NoPackageManager);
    };
    let apt = Apt {
        get,
        query,
        kernels,
        options: Vec::new(),
        work: work.into(),
    };
    fetch_with(
        apt,
        rustix::process::geteuid().is_root(),
        cache,
        work,
        progress,
    )
}

fn fetch_with(
    mut apt: Apt<'_>,
    root: bool,
    cache: &CacheDir,
    work: &Path,
    progress: &mut dyn Progress,
) -> Result<Parts, ImageError> {
    if root {
        // Otherwise apt drops to a user who may not write to the cache, and complains of it.
        apt.option("APT::Sandbox::User=root");
    }
    apt.option("Acquire::Retries=2");
    apt.option("Acquire::Languages=none");
    progress.report(Phase::Lists, 0, None);

    let target = work.join("packages");
    let mut attempt = get_packages(&apt, &target, progress);
    if root && worth_an_update(&attempt) {
        attempt = update_and_get(&apt, &target, progress);
    }
    if worth_an_update(&attempt) {
        need_space(work, LISTS_NEED)?;
        apt.use_own_lists(&work.join("apt"))?;
        attempt = update_and_get(&apt, &target, progress);
    }
    let (kernel, files) = attempt?;

    let origin = Origin::Package {
        name: kernel.name.clone(),
        version: kernel.version.clone(),
    };
    let parts = deb::parts(&files, origin, progress)?;
    keep(&kernel, &files, &target, cache, work)?;
    Ok(parts)
}

/// Whether newer lists may help.
fn worth_an_update<T>(attempt: &Result<T, ImageError>) -> bool {
    matches!(
        attempt,
        Err(ImageError::Command { .. } | ImageError::NoSuchPackage { .. })
    )
}

/// Another attempt with newer lists. An update that couldn't reach a mirror is no error to apt, but then it is the
/// reason why packages are unknown.
fn update_and_get(
    apt: &Apt<'_>,
    target: &Path,
    progress: &mut dyn Progress,
) -> Result<(Package, Vec<PathBuf>), ImageError> {
    let warning = apt.update(progress)?;
    match (get_packages(apt, target, progress), warning) {
        (Err(ImageError::NoSuchPackage { .. }), Some(detail)) => Err(ImageError::Command {
            command: "apt-get update".into(),
            detail,
        }),
        (result, _) => result,
    }
}

/// Moves the fetched packages to their place in the cache.
fn keep(
    kernel: &Package,
    files: &[PathBuf],
    target: &Path,
    cache: &CacheDir,
    work: &Path,
) -> Result<(), ImageError> {
    let mut text = format!("origin {} {}\n", kernel.name, kernel.version);
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let opened = File::open(file).and_then(|f| f.sync_all().and_then(|()| f.metadata()));
        let size = opened
            .map_err(|e| ImageError::cache("cannot write", file, e))?
            .len();
        text.push_str(&format!("file {size} {name}\n"));
    }
    write_file(&target.join(KEPT), text.as_bytes())?;
    let name = format!(
        "{}_{}",
        kernel.name,
        kernel.version.replace(['/', ':'], "_")
    );
    publish(target, &cache.packages().join(name), work)
}

/// Resolves, then downloads into `target`. Returns the kernel's package and all files.
fn get_packages(
    apt: &Apt<'_>,
    target: &Path,
    progress: &mut dyn Progress,
) -> Result<(Package, Vec<PathBuf>), ImageError> {
    let packages = resolve(apt.kernels, &|names| apt.show(names))?;
    let _ = fs::remove_dir_all(target);
    fs::create_dir_all(target).map_err(|e| ImageError::cache("cannot create", target, e))?;
    let total = packages.iter().map(|p| p.size).sum::<u64>();
    // The kernel alone unpacks to less than its package's size; so do the modules that are taken.
    need_space(target, 2 * total + (16 << 20))?;

    let mut arguments = vec!["download".to_owned()];
    arguments.extend(packages.iter().map(|p| format!("{}={}", p.name, p.version)));
    apt.run(&arguments, target, &mut || {
        progress.report(Phase::Download, bytes_in(target).min(total), Some(total))
    })?;
    progress.report(Phase::Download, total, Some(total));

    let entries = fs::read_dir(target).map_err(|e| ImageError::cache("cannot read", target, e))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "deb"))
        .collect();
    // Busybox's package is small: with the kernel's first, a round that finds it all reads that one once.
    files.sort();
    if files.len() != packages.len() {
        let detail = format!("{} of {} packages arrived", files.len(), packages.len());
        return Err(ImageError::Command {
            command: format!("apt-get {}", arguments.join(" ")),
            detail,
        });
    }
    Ok((
        packages
            .into_iter()
            .next()
            .expect("resolve returns the kernel's package first"),
        files,
    ))
}

/// Bytes of all files in a directory, not in those below it.
fn bytes_in(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.metadata().ok())
        .filter(|m| m.is_file())
        .map(|m| m.len())
        .sum()
}

/// apt's two programs and how to call them.
struct Apt<'a> {
    get: PathBuf,
    query: PathBuf,
    /// Packages that depend on a kernel, the best first.
    kernels: &'a [&'a str],
    options: Vec<String>,
    work: PathBuf,
}

impl Apt<'_> {
    fn option(&mut self, option: impl Into<String>) {
        self.options.push(option.into());
    }

    /// Uses lists and a cache of our own in place of the system's, which only root may write to.
    fn use_own_lists(&mut self, directory: &Path) -> Result<(), ImageError> {
        for name in ["state/lists/partial", "cache/archives/partial"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).map_err(|e| ImageError::cache("cannot create", &path, e))?;
        }
        for (option, name) in [
            ("Dir::State", "state"),
            ("Dir::State::Lists", "state/lists"),
            ("Dir::Cache", "cache"),
        ] {
            self.option(format!("{option}={}", directory.join(name).display()));
        }
        // Not in the state directory of our own: which packages are installed matters not, but apt wants the file.
        self.option("Dir::State::status=/var/lib/dpkg/status");
        Ok(())
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null());
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command
    }

    fn show(&self, names: &[&str]) -> Vec<Package> {
        // It fails if one name is unknown, but tells of the others; each package's own version to fetch only.
        let output = self
            .command(&self.query)
            .args(["show", "--no-all-versions"])
            .args(names)
            .output();
        let text = output
            .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
            .unwrap_or_default();
        text.split("\n\n")
            .filter_map(Package::parse)
            .filter(|p| names.contains(&p.name.as_str()))
            .collect()
    }

    /// Fetches lists. Returns what apt complains of though it does not fail.
    fn update(&self, progress: &mut dyn Progress) -> Result<Option<String>, ImageError> {
        let own = self.work.join("apt/state/lists");
        let mut poll = || {
            progress.report(
                Phase::Lists,
                bytes_in(&own) + bytes_in(&own.join("partial")),
                None,
            )
        };
        let output = self.run(&["update".to_owned()], &self.work, &mut poll)?;
        Ok(complaint(&output, "W: Failed to fetch "))
    }

    /// Runs apt-get in a directory, and calls `poll` a few times a second meanwhile. Returns what it printed.
    fn run(
        &self,
        arguments: &[String],
        directory: &Path,
        poll: &mut dyn FnMut(),
    ) -> Result<String, ImageError> {
        let failed = |detail: String| ImageError::Command {
            command: format!("apt-get {}", arguments.join(" ")),
            detail,
        };
        // To a file, since a pipe that nobody reads would stop it.
        let log = self.work.join("apt-get.log");
        let out = File::create(&log).map_err(|e| ImageError::cache("cannot create", &log, e))?;
        let err = out
            .try_clone()
            .map_err(|e| ImageError::cache("cannot create", &log, e))?;
        let mut command = self.command(&self.get);
        command
            .args(arguments)
            .current_dir(directory)
            .stdout(out)
            .stderr(err);
        let mut child = Running(command.spawn().map_err(|e| failed(e.to_string()))?);
        let status = loop {
            poll();
            match child.0.try_wait().map_err(|e| failed(e.to_string()))? {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        if status.success() {
            return Ok(text);
        }
        Err(failed(
            complaint(&text, "E: ").unwrap_or_else(|| format!("it ended with {status}")),
        ))
    }
}

/// A command that ends when nobody waits for it any more: `poll` may unwind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lines of apt's output that begin with `mark`: what went wrong. The last few, since it repeats itself.
fn complaint(output: &str, mark: &str) -> Option<String> {
    let mut lines: Vec<&str> = output
        .lines()
        .filter_map(|l| l.strip_prefix(mark))
        .map(str::trim)
        .collect();
    lines.dedup();
    let last = lines.len().saturating_sub(2);
    (!lines.is_empty()).then(|| lines[last..].join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{test_busybox, test_kernel};
    use crate::packages::{KERNELS, test_stanza};

    const VERSION: &str = "6.1.0-1-cloud-amd64";

    #[test]
    fn of_what_apt_says_only_the_complaint_is_passed_on() {
        let output = "Reading lists...\nW: a warning\nE: Failed to fetch x  404  Not Found\nE: Unable to fetch some\n";
        assert_eq!(
            complaint(output, "E: ").unwrap(),
            "Failed to fetch x  404  Not Found; Unable to fetch some"
        );
        assert_eq!(complaint("all went well\n", "E: "), None);
    }

    /// A cache, and stand-ins for apt's programs that work on files in a directory:
    /// `lists` is what is known, `lists.new` what an update finds, `pool` what can be downloaded, and `log` what was called.
    struct Stage {
        directory: tempfile::TempDir,
        cache: CacheDir,
    }

    impl Stage {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let at = directory.path();
            // Links to files that nobody writes: a file just written can't be run while a child that another
            // thread has forked still holds it open.
            let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-apt");
            for name in ["apt-get", "apt-cache"] {
                std::os::unix::fs::symlink(programs.join(name), at.join(name)).unwrap();
            }
            for name in ["pool", "work", "cache/packages"] {
                fs::create_dir_all(at.join(name)).unwrap();
            }
            let cache = CacheDir::at(at.join("cache"));
            Self { directory, cache }
        }

        fn lists(&self, name: &str) {
            let text = [
                test_stanza("linux-image-cloud-amd64", &format!("linux-image-{VERSION}")),
                test_stanza(&format!("linux-image-{VERSION}"), ""),
                test_stanza("busybox-static", ""),
            ];
            fs::write(self.directory.path().join(name), text.join("\n")).unwrap();
        }

        fn pool(&self) {
            let pool = self.directory.path().join("pool");
            let kernel = format!("./boot/vmlinuz-{VERSION}");
            deb::test_package(
                &pool.join("linux.deb"),
                "data.tar",
                &[(kernel.as_str(), &test_kernel(VERSION))],
            );
            deb::test_package(
                &pool.join("busybox.deb"),
                "data.tar",
                &[("./bin/busybox", &test_busybox())],
            );
        }

        fn fetch(&self, root: bool) -> Result<Parts, ImageError> {
            let at = self.directory.path();
            let apt = Apt {
                get: at.join("apt-get"),
                query: at.join("apt-cache"),
                kernels: KERNELS,
                options: Vec::new(),
                work: at.join("work"),
            };
            fetch_with(apt, root, &self.cache, &at.join("work"), &mut |_, _, _| ())
        }

        fn log(&self) -> String {
            let text = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            text.lines().map(str::trim).collect::<Vec<_>>().join(", ")
        }
    }

    #[test]
    fn packages_are_kept_for_another_time() {
        let stage = Stage::new();
        stage.lists("lists");
        stage.pool();
        assert!(kept(&stage.cache, &mut |_, _, _| ()).unwrap().is_none());

        let fetched = stage.fetch(false).ok().unwrap();
        let again = kept(&stage.cache, &mut |_, _, _| ()).unwrap().unwrap();

        assert_eq!(stage.log(), "download");
        assert_eq!(again.kernel, fetched.kernel);
        assert_eq!(again.origin, fetched.origin);
        assert_eq!(
            again.origin,
            Origin::Package {
                name: format!("linux-image-{VERSION}"),
                version: "1:2.3-4".into()
            }
        );
    }

    #[test]
    fn damaged_packages_in_the_cache_are_thrown_away() {
        let stage = Stage::new();
        stage.lists("lists");
        stage.pool();
        stage.fetch(false).ok().unwrap();
        let directory = fs::read_dir(stage.cache.packages())
            .unwrap()
            .flatten()
            .next()
            .unwrap()
            .path();
        let file = directory.join("linux.deb");
        let whole = fs::read(&file).unwrap();
        let mut page = whole.clone();
        page[..8].copy_from_slice(b"<html>\n\n");
        for damaged in [&whole[..100], &page] {
            fs::create_dir_all(&directory).unwrap();
            fs::write(&file, damaged).unwrap();

            assert!(kept(&stage.cache, &mut |_, _, _| ()).unwrap().is_none());
            assert!(!directory.exists());

            stage.fetch(false).ok().unwrap();
        }
    }

    #[test]
    fn missing_lists_are_updated_by_root() {
        let stage = Stage::new();
        stage.lists("lists.new");
        stage.pool();

        assert!(stage.fetch(true).is_ok());

        assert_eq!(stage.log(), "update, download");
    }

    #[test]
    fn who_is_not_root_gets_lists_of_their_own() {
        let stage = Stage::new();
        stage.lists("lists.newown");
        stage.pool();

        assert!(stage.fetch(false).is_ok());

        assert_eq!(stage.log(), "update own, download own");
    }

    #[test]
    fn lists_that_are_too_old_are_updated() {
        let stage = Stage::new();
        stage.lists("lists");
        stage.lists("lists.new");

        let result = stage.fetch(true);

        assert!(matches!(result, Err(ImageError::Command { .. })));
        assert_eq!(stage.log(), "download, update, download, update own");
    }

    #[test]
    fn without_a_network_apt_has_the_last_word() {
        let stage = Stage::new();

        let error = stage.fetch(false).err().unwrap();

        assert_eq!(error.to_string(), "`apt-get update` failed: no route");
        assert!(error.fix().contains("--kernel"));
    }

    #[test]
    fn an_update_that_reached_nothing_is_the_reason_why_packages_are_unknown() {
        let stage = Stage::new();
        fs::write(stage.directory.path().join("lists.newown"), "").unwrap();
        fs::write(
            stage.directory.path().join("warning"),
            "W: Failed to fetch x  Temporary failure resolving 'y'",
        )
        .unwrap();

        let error = stage.fetch(false).err().unwrap();

        assert_eq!(
            error.to_string(),
            "`apt-get update` failed: x  Temporary failure resolving 'y'"
        );
    }

    #[test]
    fn complete_lists_without_a_kernel_are_another_matter() {
        let stage = Stage::new();
        fs::write(stage.directory.path().join("lists.newown"), "").unwrap();

        assert!(matches!(
            stage.fetch(false),
            Err(ImageError::NoSuchPackage { .. })
        ));
    }

    #[test]
    fn a_download_that_brings_too_little_is_an_error() {
        let stage = Stage::new();
        stage.lists("lists");
        stage.pool();
        fs::remove_file(stage.directory.path().join("pool/busybox.deb")).unwrap();

        let result = stage.fetch(false);

        assert!(matches!(result, Err(ImageError::Command { .. })));
        assert_eq!(fs::read_dir(stage.cache.packages()).unwrap().count(), 0);
    }
}
