//! The host's own kernel, where there is no package manager to fetch one; and telling kernels and busyboxes apart
//! from what only looks like one.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use object::Object;
use object::elf::{ET_DYN, ET_EXEC, PT_INTERP};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};

use crate::modules::{ModuleSet, name_of};
use crate::{ImageError, Origin, Parts, Phase, Progress, initramfs};

/// Takes the parts of an image from the host: its newest readable kernel, the modules installed for it, and a static
/// busybox. `because` is why this was tried.
pub(crate) fn parts(progress: &mut dyn Progress, because: ImageError) -> Result<Parts, ImageError> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<PathBuf> = std::env::split_paths(&search).collect();
    progress.report(Phase::Unpack, 0, None);
    parts_under(Path::new("/"), &directories).map_err(|detail| ImageError::NoHostKernel {
        because: Box::new(because),
        detail,
    })
}

fn parts_under(root: &Path, path: &[PathBuf]) -> Result<Parts, String> {
    let (kernel_path, kernel_version, kernel) = newest_kernel(root)?;
    let busybox = static_busybox(path)?;
    let modules = installed_modules(root, &kernel_version).map_err(|e| e.to_string())?;
    Ok(Parts {
        kernel,
        kernel_version,
        busybox,
        modules,
        origin: Origin::Host { path: kernel_path },
    })
}

/// `/boot/vmlinuz-*`, or `/lib/modules/*/vmlinuz` as other distributions have it.
fn newest_kernel(root: &Path) -> Result<(PathBuf, String, Vec<u8>), String> {
    let in_boot = fs::read_dir(root.join("boot"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path());
    let in_boot = in_boot.filter(|p| {
        p.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz"))
    });
    let in_modules = fs::read_dir(root.join("lib/modules"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("vmlinuz"));
    let mut problems = Vec::new();
    let mut kernels = Vec::new();
    for path in in_boot.chain(in_modules) {
        match fs::read(&path) {
            Ok(bytes) => match check_kernel(&path, &bytes) {
                Ok(version) => kernels.push((path, version, bytes)),
                Err(error) => problems.push(error.to_string()),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => problems.push(format!("cannot read `{}`: {error}", path.display())),
        }
    }
    if let Some(newest) = kernels
        .into_iter()
        .max_by(|a, b| compare_versions(&a.1, &b.1))
    {
        return Ok(newest);
    }
    if problems.is_empty() {
        problems.push("there is no /boot/vmlinuz-*".into());
    }
    Err(problems.join("; "))
}

fn static_busybox(path: &[PathBuf]) -> Result<Vec<u8>, String> {
    let mut problem = "there is no busybox in PATH to go with it".to_owned();
    for name in ["busybox", "busybox-static", "busybox.static"] {
        for file in path.iter().map(|d| d.join(name)) {
            let Ok(bytes) = fs::read(&file) else { continue };
            match check_busybox(&bytes) {
                Ok(()) => return Ok(bytes),
                Err(detail) => {
                    problem = format!("`{}` can't run in the guest: {detail}", file.display())
                }
            }
        }
    }
    Err(problem)
}

/// The wanted modules from `/lib/modules/VERSION`; none if that is not there.
fn installed_modules(root: &Path, version: &str) -> Result<ModuleSet, ImageError> {
    let top = root.join("lib/modules").join(version);
    let mut set = ModuleSet::default();
    if let Ok(text) = fs::read_to_string(top.join("modules.builtin")) {
        set.set_builtin(&text);
    }
    let mut files = Vec::new();
    list_modules(&top.join("kernel"), &mut files);
    let mut wanted = initramfs::wanted_modules();
    let mut asked = BTreeSet::new();
    while !wanted.is_subset(&asked) {
        for file in &files {
            let relative = file
                .strip_prefix(&top)
                .expect("the list was made under `top`")
                .to_string_lossy();
            if let Some(name) = name_of(&relative)
                && wanted.contains(&name)
                && !set.contains(&name)
                && let Ok(bytes) = fs::read(file)
            {
                set.insert(&relative, &bytes)?;
            }
        }
        asked.append(&mut wanted);
        wanted = set.missing();
    }
    Ok(set)
}

fn list_modules(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        // The type of the entry itself, so that a link can't lead in a circle.
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => list_modules(&entry.path(), files),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
}

/// Compares versions as people do: runs of digits by their value.
pub(crate) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        let digits = |s: &[u8]| s.iter().take_while(|c| c.is_ascii_digit()).count();
        let (n, m) = (digits(a), digits(b));
        if n > 0 && m > 0 {
            let trim = |s: &[u8]| s.iter().position(|&c| c != b'0').unwrap_or(s.len());
            let (x, y) = (&a[..n][trim(&a[..n])..], &b[..m][trim(&b[..m])..]);
            match x.len().cmp(&y.len()).then(x.cmp(y)) {
                Ordering::Equal => (a, b) = (&a[n..], &b[m..]),
                unequal => return unequal,
            }
        } else {
            match (a.split_first(), b.split_first()) {
                (Some((x, rest_a)), Some((y, rest_b))) if x == y => (a, b) = (rest_a, rest_b),
                (x, y) => return x.map(|(c, _)| c).cmp(&y.map(|(c, _)| c)),
            }
        }
    }
}

/// Checks that a file is a bzImage and returns the version it names (Linux, Documentation/arch/x86/boot.rst:
/// `boot_flag`, `header` and `kernel_version` in the setup header).
pub(crate) fn check_kernel(path: &Path, bytes: &[u8]) -> Result<String, ImageError> {
    let not = |detail: &str| ImageError::NotAKernel {
        path: path.into(),
        detail: detail.into(),
    };
    if bytes.get(0x1fe..0x200) != Some(&[0x55, 0xaa]) || bytes.get(0x202..0x206) != Some(b"HdrS") {
        return Err(not("it has no boot header"));
    }
    let at = bytes
        .get(0x20e..0x210)
        .map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let text = bytes.get(at + 0x200..).unwrap_or_default();
    let length = text
        .iter()
        .take(256)
        .position(|&b| b == 0 || b == b' ')
        .unwrap_or(0);
    let version = String::from_utf8_lossy(&text[..length]).into_owned();
    if at == 0 || !crate::deb::proper_version(&version) {
        return Err(not("its header names no version"));
    }
    Ok(version)
}

/// Checks that a program can be the guest's first: it must need no libraries, which the guest hasn't got.
pub(crate) fn check_busybox(bytes: &[u8]) -> Result<(), String> {
    let file = ElfFile64::<object::Endianness>::parse(bytes)
        .map_err(|_| "it is not a 64-bit ELF file".to_owned())?;
    if file.architecture() != object::Architecture::X86_64 {
        return Err("it is not for x86-64".into());
    }
    let endian = file.endian();
    if !matches!(file.elf_header().e_type(endian), ET_EXEC | ET_DYN) {
        return Err("it is not a program".into());
    }
    if file
        .elf_program_headers()
        .iter()
        .any(|h| h.p_type(endian) == PT_INTERP)
    {
        return Err("it is not statically linked".into());
    }
    Ok(())
}

/// The least that passes for a kernel of this version.
#[cfg(any(test, fuzzing))]
pub(crate) fn test_kernel(version: &str) -> Vec<u8> {
    let mut bytes = vec![0; 0x400];
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    bytes[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
    bytes
}

/// The least that passes for a static busybox: an ELF header of a program without program headers.
#[cfg(any(test, fuzzing))]
pub(crate) fn test_busybox() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend(2u16.to_le_bytes());
    elf.extend(62u16.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    elf.resize(52, 0);
    elf.extend(64u16.to_le_bytes());
    elf.resize(64, 0);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::test_module;

    #[test]
    fn versions_compare_by_the_value_of_their_numbers() {
        for (smaller, larger) in [
            ("6.1.0-9", "6.1.0-10"),
            ("5.15", "6.1"),
            ("6.1", "6.1.1"),
            ("6.1.09", "6.1.10"),
        ] {
            assert_eq!(
                compare_versions(smaller, larger),
                Ordering::Less,
                "{smaller} {larger}"
            );
            assert_eq!(
                compare_versions(larger, smaller),
                Ordering::Greater,
                "{smaller} {larger}"
            );
        }
        assert_eq!(compare_versions("6.1.0", "6.1.0"), Ordering::Equal);
    }

    #[test]
    fn kernels_are_known_by_their_header() {
        let path = Path::new("vmlinuz");
        assert_eq!(
            check_kernel(path, &test_kernel("6.1.0-1-x (builder) #1")).unwrap(),
            "6.1.0-1-x"
        );
        for bytes in [
            &b""[..],
            b"\x7fELF",
            &[0; 0x400],
            &test_kernel("")[..],
            &test_kernel("6.1")[..0x20f],
        ] {
            assert!(matches!(
                check_kernel(path, bytes),
                Err(ImageError::NotAKernel { .. })
            ));
        }
    }

    #[test]
    fn a_busybox_must_be_static_and_for_this_machine() {
        assert_eq!(check_busybox(&test_busybox()), Ok(()));
        let mut foreign = test_busybox();
        foreign[18] = 183; // EM_AARCH64
        let cat = fs::read("/bin/cat").unwrap();
        for (bytes, complaint) in [
            (&b"#!/bin/sh"[..], "ELF"),
            (&foreign[..], "x86-64"),
            (&cat[..], "statically"),
            (&test_module("", &[])[..], "program"),
        ] {
            assert!(
                check_busybox(bytes).unwrap_err().contains(complaint),
                "{complaint}"
            );
        }
    }

    #[test]
    fn the_newest_readable_kernel_of_the_host_is_taken_with_its_modules() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let kernel_modules = root.join("lib/modules/6.1.0-10/kernel/drivers");
        for directory in [&root.join("boot"), &root.join("bin"), &kernel_modules] {
            fs::create_dir_all(directory).unwrap();
        }
        for version in ["6.1.0-9", "6.1.0-10"] {
            fs::write(
                root.join(format!("boot/vmlinuz-{version}")),
                test_kernel(version),
            )
            .unwrap();
        }
        fs::write(root.join("boot/vmlinuz-6.1.0-11"), "cut off").unwrap();
        fs::write(root.join("bin/busybox"), test_busybox()).unwrap();
        fs::write(
            kernel_modules.join("virtio_blk.ko"),
            test_module("more", &[]),
        )
        .unwrap();
        fs::write(kernel_modules.join("more.ko"), test_module("", &[])).unwrap();

        let parts = parts_under(root, &[root.join("bin")]).ok().unwrap();

        assert_eq!(parts.kernel_version, "6.1.0-10");
        assert_eq!(parts.modules.iter().count(), 2);
        assert_eq!(
            parts.origin,
            Origin::Host {
                path: root.join("boot/vmlinuz-6.1.0-10")
            }
        );
    }

    #[test]
    fn a_host_without_a_kernel_is_told_of_the_option() {
        let root = tempfile::tempdir().unwrap();
        let detail = parts_under(root.path(), &[]).err().unwrap();
        let error = ImageError::NoHostKernel {
            because: Box::new(ImageError::NoPackageManager),
            detail,
        };

        assert!(error.to_string().contains("/boot/vmlinuz-*"), "{error}");
        assert!(error.to_string().contains("apt-get"), "{error}");
        assert!(error.fix().contains("--kernel"), "{}", error.fix());
    }
}
