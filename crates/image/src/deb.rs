//! Debian packages (deb(5)): an `ar` archive with a compressed tar archive of the files. Only what an image needs is
//! taken out, into memory; nothing is extracted to a path that a package names.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::modules::{ModuleSet, name_of};
use crate::{ImageError, Origin, Parts, Phase, Progress, host, initramfs};

/// Larger files in packages are refused: a damaged length must not take all memory. Bytes.
const LARGEST: u64 = 256 << 20;

/// What was found in packages so far.
#[derive(Default)]
struct Contents {
    /// The version, from the file's name, and the file.
    kernel: Option<(String, Vec<u8>)>,
    busybox: Option<Vec<u8>>,
    modules: ModuleSet,
}

/// Takes the parts of an image out of packages.
pub(crate) fn parts(
    packages: &[PathBuf],
    origin: Origin,
    progress: &mut dyn Progress,
) -> Result<Parts, ImageError> {
    let mut wanted = initramfs::wanted_modules();
    let mut contents = Contents::default();
    let mut asked = BTreeSet::new();
    // Nearly always one round: it takes another only where a module depends on one that nobody foresaw.
    while !wanted.is_subset(&asked) {
        let total = packages
            .iter()
            .filter_map(|p| p.metadata().ok())
            .map(|m| m.len())
            .sum();
        let mut before = 0;
        for package in packages {
            let done = unpack(package, &wanted, &mut contents, &mut |read| {
                progress.report(Phase::Unpack, before + read, Some(total));
            });
            before += done.map_err(|e| damaged(package, e))?;
        }
        asked.append(&mut wanted);
        wanted = contents.modules.missing();
    }

    let missing = |what: &str| ImageError::Missing {
        what: what.into(),
        place: packages
            .iter()
            .map(|p| format!("`{}`", p.display()))
            .collect::<Vec<_>>()
            .join(", "),
    };
    let (kernel_version, kernel) = contents
        .kernel
        .ok_or_else(|| missing("a kernel (/boot/vmlinuz-*)"))?;
    let busybox = contents.busybox.ok_or_else(|| missing("/bin/busybox"))?;
    host::check_kernel(
        Path::new(&format!("/boot/vmlinuz-{kernel_version}")),
        &kernel,
    )?;
    host::check_busybox(&busybox)
        .map_err(|detail| missing(&format!("a busybox that can run in the guest ({detail})")))?;
    Ok(Parts {
        kernel,
        kernel_version,
        busybox,
        modules: contents.modules,
        origin,
    })
}

fn damaged(file: &Path, error: io::Error) -> ImageError {
    let detail = match error.kind() {
        io::ErrorKind::UnexpectedEof => "it ends too early".into(),
        _ => error.to_string(),
    };
    ImageError::Package {
        file: file.into(),
        detail,
    }
}

/// Reads one package and takes what is wanted and not there yet. Returns the package's length in bytes.
fn unpack(
    package: &Path,
    wanted: &BTreeSet<String>,
    contents: &mut Contents,
    on_read: &mut dyn FnMut(u64),
) -> io::Result<u64> {
    let file = File::open(package)?;
    let length = file.metadata()?.len();
    let mut outer = ar::Archive::new(BufReader::with_capacity(
        256 << 10,
        Counted {
            inner: file,
            count: 0,
            on_read,
        },
    ));
    while let Some(entry) = outer.next_entry() {
        let entry = entry?;
        let name = String::from_utf8_lossy(entry.header().identifier())
            .trim_end_matches('/')
            .to_owned();
        // `ar` does not mind an archive that ends within a member.
        let size = entry.header().size();
        let whole = Whole {
            inner: entry,
            left: size,
        };
        match name.as_str() {
            "data.tar.xz" => files(lzma_rust2::XzReader::new(whole, true), wanted, contents)?,
            "data.tar.zst" => {
                let decoder =
                    ruzstd::decoding::StreamingDecoder::new(whole).map_err(io::Error::other)?;
                files(decoder, wanted, contents)?;
            }
            "data.tar.gz" => files(flate2::read::MultiGzDecoder::new(whole), wanted, contents)?,
            "data.tar" => files(whole, wanted, contents)?,
            other if other.starts_with("data.tar") => {
                return Err(io::Error::other(format!(
                    "its files are packed in a way we can't unpack: {other}"
                )));
            }
            _ => continue,
        }
        return Ok(length);
    }
    Err(io::Error::from(io::ErrorKind::UnexpectedEof))
}

/// Takes the wanted files from a tar archive, and reads it to its end so that the decoder checks its checksums.
fn files(
    mut reader: impl Read,
    wanted: &BTreeSet<String>,
    contents: &mut Contents,
) -> io::Result<()> {
    let mut archive = tar::Archive::new(&mut reader);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.trim_start_matches("./").trim_start_matches('/');
        let path = path.strip_prefix("usr/").unwrap_or(path);
        let mut data = || -> io::Result<Vec<u8>> {
            if entry.size() > LARGEST {
                return Err(io::Error::other(format!(
                    "{path} in it has more than {} MiB",
                    LARGEST >> 20
                )));
            }
            let mut data = Vec::new();
            entry.read_to_end(&mut data)?;
            Ok(data)
        };
        if let Some(version) = path.strip_prefix("boot/vmlinuz-") {
            if contents.kernel.is_none() && proper_version(version) {
                contents.kernel = Some((version.into(), data()?));
            }
        } else if path == "bin/busybox" {
            if contents.busybox.is_none() {
                contents.busybox = Some(data()?);
            }
        } else if let Some((_version, path)) = path
            .strip_prefix("lib/modules/")
            .and_then(|p| p.split_once('/'))
        {
            if path == "modules.builtin" {
                contents
                    .modules
                    .set_builtin(&String::from_utf8_lossy(&data()?));
            } else if let Some(name) = name_of(path)
                && wanted.contains(&name)
                && !contents.modules.contains(&name)
            {
                contents
                    .modules
                    .insert(path, &data()?)
                    .map_err(io::Error::other)?;
            }
        }
    }
    io::copy(&mut reader, &mut io::sink())?;
    Ok(())
}

/// A version becomes part of paths here and in the guest, so it must be one plain word.
pub(crate) fn proper_version(version: &str) -> bool {
    !version.is_empty()
        && !version.starts_with('.')
        && version.len() <= 128
        && version
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._+-~".contains(&b))
}

/// Tells how far a file was read.
struct Counted<'a> {
    inner: File,
    count: u64,
    on_read: &'a mut dyn FnMut(u64),
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count += count as u64;
        (self.on_read)(self.count);
        Ok(count)
    }
}

/// Makes the end of the file an error where more bytes were announced.
struct Whole<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if count == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// Writes a package with these files, packed as the name of the member says.
#[cfg(test)]
pub(crate) fn test_package(path: &Path, member: &str, files: &[(&str, &[u8])]) {
    use std::io::Write;
    let mut archive = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *data).unwrap();
    }
    let plain = archive.into_inner().unwrap();
    let packed = match member {
        "data.tar.gz" => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&plain).unwrap();
            encoder.finish().unwrap()
        }
        "data.tar.xz" => crate::modules::test_xz(&plain),
        "data.tar.zst" => ruzstd::encoding::compress_to_vec(
            plain.as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        ),
        _ => plain,
    };
    let mut deb = ar::Builder::new(File::create(path).unwrap());
    for (name, data) in [
        ("debian-binary", &b"2.0\n"[..]),
        ("control.tar", b"ignored"),
        (member, &packed),
    ] {
        deb.append(&ar::Header::new(name.into(), data.len() as u64), data)
            .unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{test_busybox, test_kernel};
    use crate::modules::test_module;

    const VERSION: &str = "6.1.0-1-test";

    fn origin() -> Origin {
        Origin::Package {
            name: "linux-image-test".into(),
            version: "1".into(),
        }
    }

    fn all_files() -> Vec<(String, Vec<u8>)> {
        let modules = format!("./lib/modules/{VERSION}");
        vec![
            (format!("./boot/vmlinuz-{VERSION}"), test_kernel(VERSION)),
            ("./bin/busybox".into(), test_busybox()),
            (format!("{modules}/kernel/virtio.ko"), test_module("", &[])),
            (
                format!("{modules}/kernel/virtio_blk.ko"),
                test_module("virtio,surprise", &[]),
            ),
            (
                format!("{modules}/kernel/surprise.ko"),
                test_module("another,built_in", &[]),
            ),
            (format!("{modules}/kernel/another.ko"), test_module("", &[])),
            (
                format!("{modules}/kernel/unwanted.ko"),
                b"not looked at".to_vec(),
            ),
            (
                format!("{modules}/modules.builtin"),
                b"kernel/built-in.ko\n".to_vec(),
            ),
        ]
    }

    fn package(directory: &Path, member: &str) -> PathBuf {
        let files = all_files();
        let files: Vec<(&str, &[u8])> = files
            .iter()
            .map(|(n, d)| (n.as_str(), d.as_slice()))
            .collect();
        let path = directory.join("kernel.deb");
        test_package(&path, member, &files);
        path
    }

    #[test]
    fn all_ways_to_pack_are_unpacked() {
        for member in ["data.tar", "data.tar.gz", "data.tar.zst", "data.tar.xz"] {
            let directory = tempfile::tempdir().unwrap();
            let path = package(directory.path(), member);

            let parts = parts(&[path], origin(), &mut |_, _, _| ()).unwrap();

            assert_eq!(parts.kernel_version, VERSION, "{member}");
            assert_eq!(parts.kernel, test_kernel(VERSION), "{member}");
            assert_eq!(parts.busybox, test_busybox(), "{member}");
        }
    }

    #[test]
    fn dependencies_that_nobody_foresaw_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = package(directory.path(), "data.tar");

        let parts = parts(&[path], origin(), &mut |_, _, _| ()).unwrap();

        let names: Vec<_> = parts
            .modules
            .iter()
            .map(|m| name_of(&m.path).unwrap())
            .collect();
        assert_eq!(names, ["another", "surprise", "virtio", "virtio_blk"]);
    }

    #[test]
    fn progress_reaches_its_total() {
        let directory = tempfile::tempdir().unwrap();
        let path = package(directory.path(), "data.tar");
        let length = path.metadata().unwrap().len();
        let mut last = (0, None);

        parts(&[path], origin(), &mut |_, done, total| {
            last = (done, total)
        })
        .unwrap();

        assert_eq!(last, (length, Some(length)));
    }

    #[test]
    fn a_package_cut_off_anywhere_is_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cut.deb");
        let packed = ["data.tar.gz", "data.tar.xz", "data.tar.zst"]
            .map(|m| std::fs::read(package(directory.path(), m)).unwrap());
        let cuts = packed.iter().flat_map(|whole| {
            (0..whole.len() - 1)
                .step_by(23)
                .map(move |length| (whole, length))
        });
        for (whole, length) in cuts {
            std::fs::write(&path, &whole[..length]).unwrap();

            let result = parts(std::slice::from_ref(&path), origin(), &mut |_, _, _| ());

            assert!(
                matches!(result, Err(ImageError::Package { .. })),
                "{length} of {} bytes",
                whole.len()
            );
        }
    }

    #[test]
    fn what_is_not_a_package_is_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("page.deb");
        std::fs::write(&path, "<html>please log in to this network</html>").unwrap();

        let result = parts(&[path], origin(), &mut |_, _, _| ());

        assert!(matches!(result, Err(ImageError::Package { .. })));
    }

    #[test]
    fn what_a_package_lacks_is_named() {
        let directory = tempfile::tempdir().unwrap();
        for (left_out, named) in [("boot", "vmlinuz"), ("busybox", "busybox")] {
            let mut files = all_files();
            files.retain(|(name, _)| !name.contains(left_out));
            let files: Vec<(&str, &[u8])> = files
                .iter()
                .map(|(n, d)| (n.as_str(), d.as_slice()))
                .collect();
            let path = directory.path().join("kernel.deb");
            test_package(&path, "data.tar", &files);

            let error = parts(&[path], origin(), &mut |_, _, _| ()).err().unwrap();

            assert!(
                matches!(&error, ImageError::Missing { what, .. } if what.contains(named)),
                "{error}"
            );
        }
    }

    #[test]
    fn versions_that_could_leave_their_directory_are_no_versions() {
        for (version, proper) in [
            ("6.1.0-56-cloud-amd64", true),
            ("6.8.0-31-generic", true),
            ("", false),
            ("..", false),
            ("a/b", false),
            ("a b", false),
            ("a\nb", false),
        ] {
            assert_eq!(proper_version(version), proper, "{version:?}");
        }
    }
}
