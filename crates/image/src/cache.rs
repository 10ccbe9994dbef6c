//! The cache directory.
//!
//! ```text
//! CACHE/lock                            held (flock) by the process that makes an image
//! CACHE/images/VERSION.FORMAT/          an image: vmlinuz, initramfs, manifest; never changed once it has this name
//! CACHE/packages/NAME_VERSION/          the packages it was made from; likewise
//! CACHE/tmp/                            what is in the making; belongs to whoever holds the lock
//! ```
//!
//! An image is made under `tmp` and renamed when it is complete and on the disk, so that a process killed at any moment
//! leaves an image or none. Since only the holder of the lock writes to `tmp`, whatever a new holder finds there is
//! the rest of a process that died.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::{ImageError, Origin, Parts, Phase, Progress, StockImage, host, initramfs};

/// To be raised when what this crate puts into an initramfs changes, other than `init.sh` (which counts by itself).
const REVISION: u32 = 1;

/// Space that making an image takes, bytes: packages, kernel and initramfs with some to spare.
pub(crate) const NEED: u64 = 96 << 20;

/// Where images are kept between runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheDir {
    root: PathBuf,
}

impl CacheDir {
    /// The user's own: `trapgate` under `$XDG_CACHE_HOME`, or under `~/.cache` (XDG Base Directory Specification 0.8:
    /// relative paths are ignored).
    ///
    /// # Errors
    /// [`ImageError::NoCacheDir`] if neither variable says where that is.
    pub fn from_env() -> Result<Self, ImageError> {
        Self::from_variables(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"))
    }

    fn from_variables(xdg: Option<OsString>, home: Option<OsString>) -> Result<Self, ImageError> {
        let absolute = |v: OsString| Some(PathBuf::from(v)).filter(|p| p.is_absolute());
        let base = xdg
            .and_then(absolute)
            .or_else(|| home.and_then(absolute).map(|h| h.join(".cache")));
        base.map(|b| Self::at(b.join("trapgate")))
            .ok_or(ImageError::NoCacheDir)
    }

    /// This directory. It is created when it is first needed.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.root
    }

    fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Where packages are kept.
    pub(crate) fn packages(&self) -> PathBuf {
        self.root.join("packages")
    }
}

/// Which images this version of trapgate can use: changes with everything that goes into an initramfs.
fn format() -> String {
    format!(
        "{REVISION}-{:08x}",
        crc32fast::hash(initramfs::INIT.as_bytes())
    )
}

/// The newest intact image in the cache.
pub(crate) fn find(cache: &CacheDir) -> Option<StockImage> {
    let suffix = format!(".{}", format());
    let entries = fs::read_dir(cache.images()).ok()?.flatten();
    let mut images: Vec<StockImage> = entries
        .filter(|e| e.file_name().to_string_lossy().ends_with(&suffix))
        .filter_map(|e| open(&e.path()))
        .collect();
    images.sort_by(|a, b| host::compare_versions(&a.kernel_version, &b.kernel_version));
    images.pop()
}

/// Gets the parts of an image. The path is a directory of its own to work in, removed afterwards.
type Make<'a> = dyn FnMut(&CacheDir, &Path, &mut dyn Progress) -> Result<Parts, ImageError> + 'a;

/// Makes the image with `make` unless the cache holds one.
pub(crate) fn open_or_make(
    cache: &CacheDir,
    progress: &mut dyn Progress,
    make: &mut Make<'_>,
) -> Result<StockImage, ImageError> {
    // Images never change, so this needs no lock, and works on a cache that can't be written.
    if let Some(image) = find(cache) {
        return Ok(image);
    }
    let tmp = cache.root.join("tmp");
    for directory in [&tmp, &cache.images(), &cache.packages()] {
        fs::create_dir_all(directory)
            .map_err(|e| ImageError::cache("cannot create", directory, e))?;
    }
    let _lock = lock(cache, progress)?;
    if let Some(image) = find(cache) {
        return Ok(image);
    }
    clear(&tmp);
    need_space(&cache.root, NEED)?;

    let work = tempfile::Builder::new().prefix("make-").tempdir_in(&tmp);
    let work = work.map_err(|e| ImageError::cache("cannot create a directory in", &tmp, e))?;
    let parts = make(cache, work.path(), progress)?;

    let staged = work.path().join("image");
    write(&staged, &parts, progress)?;
    let name = format!("{}.{}", parts.kernel_version, format());
    publish(&staged, &cache.images().join(name), work.path())?;
    remove_other_formats(&cache.images());

    find(cache).ok_or_else(|| {
        let lost = io::Error::other("the image is not what was just written");
        ImageError::cache("cannot read back", &cache.images(), lost)
    })
}

/// Takes the lock, and waits for it if another process has it. The kernel gives it back when the process ends, however it ends.
fn lock(cache: &CacheDir, progress: &mut dyn Progress) -> Result<File, ImageError> {
    let path = cache.root.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = file.map_err(|e| ImageError::cache("cannot open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            progress.report(Phase::Waiting, 0, None);
            file.lock()
                .map_err(|e| ImageError::cache("cannot lock", &path, e))?;
            Ok(file)
        }
        Err(TryLockError::Error(e)) => Err(ImageError::cache("cannot lock", &path, e)),
    }
}

/// Removes what is in a directory, as far as possible: what stays only takes space.
fn clear(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let _ = if entry.file_type().is_ok_and(|t| t.is_dir()) {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
    }
}

/// Images of other versions of trapgate are of no use to this one, and each takes as much space as ours.
fn remove_other_formats(images: &Path) {
    let suffix = format!(".{}", format());
    for entry in fs::read_dir(images).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().ends_with(&suffix) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Bytes that we may still write to the file system of this directory; all there are if nobody can say.
pub(crate) fn free_space(directory: &Path) -> u64 {
    rustix::fs::statvfs(directory).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize))
}

/// Fails now rather than after minutes of downloading.
pub(crate) fn need_space(directory: &Path, need: u64) -> Result<(), ImageError> {
    let free = free_space(directory);
    if free < need {
        return Err(ImageError::NoSpace {
            dir: directory.into(),
            need,
            free,
        });
    }
    Ok(())
}

/// Writes a file and waits until it is on the disk.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|e| ImageError::cache("cannot write", path, e))
}

/// Gives a finished directory its name. What had the name, because it was damaged, goes to `trash` first.
pub(crate) fn publish(staged: &Path, name: &Path, trash: &Path) -> Result<(), ImageError> {
    let sync = |path: &Path| {
        let synced = File::open(path).and_then(|d| d.sync_all());
        synced.map_err(|e| ImageError::cache("cannot write", path, e))
    };
    sync(staged)?;
    if name.symlink_metadata().is_ok() {
        let old = trash.join("old");
        fs::rename(name, &old).map_err(|e| ImageError::cache("cannot replace", name, e))?;
    }
    fs::rename(staged, name).map_err(|e| ImageError::cache("cannot create", name, e))?;
    name.parent().map_or(Ok(()), sync)
}

const KERNEL: &str = "vmlinuz";
const INITRAMFS: &str = "initramfs";
const MANIFEST: &str = "manifest";
/// The last line of a manifest.
const END: &str = "end\n";

fn write(directory: &Path, parts: &Parts, progress: &mut dyn Progress) -> Result<(), ImageError> {
    let initramfs = initramfs::build(parts);
    let files = [(KERNEL, &parts.kernel), (INITRAMFS, &initramfs)];
    let total = files.iter().map(|(_, b)| b.len() as u64).sum();
    let mut done = 0;
    progress.report(Phase::Write, done, Some(total));
    fs::create_dir(directory).map_err(|e| ImageError::cache("cannot create", directory, e))?;

    let mut manifest = format!("kernel-version {}\n", parts.kernel_version);
    match &parts.origin {
        Origin::Package { name, version } => {
            manifest.push_str(&format!("package {name} {version}\n"))
        }
        Origin::Host { path } => manifest.push_str(&format!("host {}\n", path.display())),
    }
    for (name, bytes) in files {
        write_file(&directory.join(name), bytes)?;
        manifest.push_str(&format!(
            "file {name} {} {:08x}\n",
            bytes.len(),
            crc32fast::hash(bytes)
        ));
        done += bytes.len() as u64;
        progress.report(Phase::Write, done, Some(total));
    }
    // So that a manifest cut off between its lines is none.
    manifest.push_str(END);
    write_file(&directory.join(MANIFEST), manifest.as_bytes())
}

/// The image in this directory, if it is intact.
fn open(directory: &Path) -> Option<StockImage> {
    let manifest = fs::read_to_string(directory.join(MANIFEST)).ok()?;
    let (mut kernel_version, mut origin, mut files) = (None, None, Vec::new());
    for line in manifest.strip_suffix(END)?.lines() {
        let (key, value) = line.split_once(' ')?;
        match key {
            "kernel-version" => kernel_version = Some(value.to_owned()),
            "package" => {
                let (name, version) = value.split_once(' ')?;
                origin = Some(Origin::Package {
                    name: name.into(),
                    version: version.into(),
                });
            }
            "host" => origin = Some(Origin::Host { path: value.into() }),
            "file" => {
                let mut words = value.split(' ');
                let name = words.next()?;
                let length = words.next()?.parse().ok()?;
                let checksum = u32::from_str_radix(words.next()?, 16).ok()?;
                intact(&directory.join(name), length, checksum)?;
                files.push(name);
            }
            _ => return None,
        }
    }
    (files == [KERNEL, INITRAMFS]).then_some(())?;
    Some(StockImage {
        kernel: directory.join(KERNEL),
        initramfs: directory.join(INITRAMFS),
        kernel_version: kernel_version?,
        origin: origin?,
    })
}

/// Whether a file still has this length and CRC-32. This is against accidents, not against whoever may write to the cache.
fn intact(path: &Path, length: u64, checksum: u32) -> Option<()> {
    let mut file = File::open(path).ok()?;
    if file.metadata().ok()?.len() != length {
        return None;
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer).ok()? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    (hasher.finalize() == checksum).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{test_busybox, test_kernel};
    use crate::modules::ModuleSet;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn parts() -> Parts {
        Parts {
            kernel: test_kernel("6.1.0-1-test"),
            kernel_version: "6.1.0-1-test".into(),
            busybox: test_busybox(),
            modules: ModuleSet::default(),
            origin: Origin::Package {
                name: "linux-image-test".into(),
                version: "1.2-3".into(),
            },
        }
    }

    fn silent() -> impl Progress {
        |_: Phase, _: u64, _: Option<u64>| ()
    }

    fn make(cache: &CacheDir) -> StockImage {
        open_or_make(cache, &mut silent(), &mut |_, _, _| Ok(parts())).unwrap()
    }

    fn never(_: &CacheDir, _: &Path, _: &mut dyn Progress) -> Result<Parts, ImageError> {
        panic!("the image is in the cache")
    }

    #[test]
    fn the_place_is_what_the_environment_says() {
        let at = |xdg: Option<&str>, home: Option<&str>| {
            CacheDir::from_variables(xdg.map(Into::into), home.map(Into::into))
                .map(|c| c.root)
                .ok()
        };
        assert_eq!(at(Some("/x"), Some("/h")), Some("/x/trapgate".into()));
        assert_eq!(at(None, Some("/h")), Some("/h/.cache/trapgate".into()));
        assert_eq!(
            at(Some("relative"), Some("/h")),
            Some("/h/.cache/trapgate".into())
        );
        assert_eq!(at(Some(""), Some("/h")), Some("/h/.cache/trapgate".into()));
        assert_eq!(at(None, None), None);
    }

    #[test]
    fn an_image_is_made_once_and_then_found() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path().join("new/cache"));
        assert_eq!(find(&cache), None);

        let made = make(&cache);
        let found = open_or_make(&cache, &mut silent(), &mut never).unwrap();

        assert_eq!(made, found);
        assert_eq!(fs::read(&found.kernel).unwrap(), parts().kernel);
        assert_eq!(
            fs::read(&found.initramfs).unwrap(),
            initramfs::build(&parts())
        );
        assert_eq!(found.origin, parts().origin);
        assert_eq!(fs::read_dir(cache.root.join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path());

        let result = open_or_make(&cache, &mut silent(), &mut |_, work, _| {
            fs::write(work.join("half"), "half").unwrap();
            Err(ImageError::NoPackageManager)
        });

        assert!(matches!(result, Err(ImageError::NoPackageManager)));
        assert_eq!(find(&cache), None);
        assert_eq!(fs::read_dir(cache.root.join("tmp")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(cache.images()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_never_taken_for_an_image() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path());
        let left = cache.root.join("tmp/make-dead/image");
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join(KERNEL), "half").unwrap();

        let image = make(&cache);

        assert!(!left.exists());
        assert!(image.kernel.starts_with(cache.images()));
    }

    #[test]
    fn damage_of_any_file_is_noticed_and_repaired() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path());
        let image = make(&cache);
        let manifest = image.kernel.with_file_name(MANIFEST);
        for file in [&image.kernel, &image.initramfs, &manifest] {
            let whole = fs::read(file).unwrap();
            let mut flipped = whole.clone();
            flipped[whole.len() / 2] ^= 1;
            for damaged in [&whole[..whole.len() - 1], b"", &flipped] {
                fs::write(file, damaged).unwrap();
                assert_eq!(find(&cache), None, "{}", file.display());

                assert_eq!(make(&cache), image);
                assert_eq!(fs::read(file).unwrap(), whole);
            }
            fs::remove_file(file).unwrap();
            assert_eq!(make(&cache), image);
        }
    }

    #[test]
    fn an_image_of_another_format_is_not_used_and_makes_room() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path());
        let image = make(&cache);
        let other = cache.images().join("6.1.0-1-test.0-00000000");
        fs::rename(image.kernel.parent().unwrap(), &other).unwrap();
        assert_eq!(find(&cache), None);

        make(&cache);

        assert!(!other.exists());
    }

    #[test]
    fn of_several_processes_one_makes_the_image_and_the_others_wait() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path());
        let made = AtomicU32::new(0);

        // Locks of flock(2) belong to an open file, so that threads exclude each other as processes do.
        let images: Vec<StockImage> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        open_or_make(&cache, &mut silent(), &mut |_, _, _| {
                            made.fetch_add(1, Ordering::SeqCst);
                            std::thread::yield_now();
                            Ok(parts())
                        })
                        .unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });

        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert!(images.iter().all(|i| *i == images[0]));
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a-file");
        fs::write(&file, "").unwrap();
        let cache = CacheDir::at(&file);

        let error = open_or_make(&cache, &mut silent(), &mut never).unwrap_err();

        assert!(error.to_string().contains("a-file"), "{error}");
        assert!(error.fix().contains("XDG_CACHE_HOME"), "{}", error.fix());
    }

    #[test]
    fn too_little_space_is_said_before_the_work() {
        let directory = tempfile::tempdir().unwrap();

        let error = need_space(directory.path(), u64::MAX).unwrap_err();

        assert!(matches!(&error, ImageError::NoSpace { dir, .. } if dir == directory.path()));
        assert!(error.fix().contains("space"));
    }

    #[test]
    fn a_disk_that_fills_up_meanwhile_is_said_so() {
        let full = io::Error::from(io::ErrorKind::StorageFull);

        let error = ImageError::cache("cannot write", Path::new("/tmp/x/vmlinuz"), full);

        assert!(matches!(error, ImageError::NoSpace { .. }));
    }
}
