//! The initramfs: what is in it, and the archive it is written as.

use std::collections::BTreeSet;
use std::io::Write;

use cpio::newc::{Builder, trailer};

use crate::Parts;

/// The guest's first program.
pub(crate) const INIT: &str = include_str!("init.sh");

/// Modules that init loads before it reports, with what they depend on: the way to the status port.
const FIRST: &[&str] = &["virtio_pci", "virtio_console"];

/// Modules that are there to be loaded when a device, a file system or a person asks for them.
const AT_HAND: &[&str] = &[
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "virtio_balloon",
    "virtiofs",
    "button",
    "evdev",
    "ext4",
    "crc32c_generic",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "nls_iso8859_1",
    "nls_utf8",
    "isofs",
    "squashfs",
    "overlay",
    "loop",
    "af_packet",
];

/// The modules that an initramfs holds if the kernel has them as modules. What they depend on comes along; some of it
/// is named here only because a second pass through a package takes seconds.
pub(crate) fn wanted_modules() -> BTreeSet<String> {
    const DEPENDENCIES: &[&str] = &[
        "virtio",
        "virtio_ring",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "rng_core",
        "net_failover",
        "failover",
        "fuse",
        "mbcache",
        "jbd2",
        "crc16",
        "fat",
        "cdrom",
    ];
    [FIRST, AT_HAND, DEPENDENCIES]
        .concat()
        .into_iter()
        .map(String::from)
        .collect()
}

/// What init runs before `busybox --install` has made the links for all applets.
const APPLETS: &[&str] = &[
    "sh", "mount", "insmod", "sleep", "mkdir", "ln", "poweroff", "reboot",
];

const PROFILE: &str = r"export PS1='\u@\h:\w\$ '
alias ll='ls -l'
";

/// busybox's acpid runs this when the power button is pressed.
const POWER_BUTTON: &str = "#!/bin/sh\nexec poweroff\n";

/// The initramfs as a cpio archive whose length is a multiple of 512, so that another may follow.
pub(crate) fn build(parts: &Parts) -> Vec<u8> {
    let mut archive = Archive::new();
    for directory in [
        "bin",
        "dev",
        "etc",
        "etc/acpi",
        "etc/acpi/PWRF",
        "etc/trapgate",
        "lib",
        "mnt",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr",
        "usr/bin",
        "usr/sbin",
        "var",
        "var/log",
    ] {
        archive.directory(directory, if directory == "root" { 0o700 } else { 0o755 });
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.character_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/busybox", 0o755, &parts.busybox);
    for applet in APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    archive.symlink("etc/mtab", "/proc/self/mounts");
    archive.symlink("var/run", "/run");
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    );
    archive.file(
        "etc/group",
        0o644,
        b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    );
    archive.file("etc/hostname", 0o644, b"trapgate\n");
    archive.file(
        "etc/hosts",
        0o644,
        b"127.0.0.1 localhost trapgate\n::1 localhost\n",
    );
    archive.file("etc/profile", 0o644, PROFILE.as_bytes());
    archive.file("etc/acpi/PWRF/00000080", 0o755, POWER_BUTTON.as_bytes());

    let root = format!("lib/modules/{}", parts.kernel_version);
    archive.parents(&format!("{root}/modules.dep"));
    let mut first = String::new();
    for module in parts.modules.load_order(FIRST.iter().copied()) {
        first.push_str(&format!("/{root}/{}\n", module.path));
    }
    archive.file("etc/trapgate/modules", 0o644, first.as_bytes());
    for module in parts.modules.iter() {
        let path = format!("{root}/{}", module.path);
        archive.parents(&path);
        archive.file(&path, 0o644, &module.data);
    }
    archive.file(
        &format!("{root}/modules.dep"),
        0o644,
        parts.modules.dep_file().as_bytes(),
    );
    archive.file(
        &format!("{root}/modules.alias"),
        0o644,
        parts.modules.alias_file().as_bytes(),
    );
    archive.file(
        &format!("{root}/modules.builtin"),
        0o644,
        parts.modules.builtin_file().as_bytes(),
    );
    archive.finish()
}

/// A cpio archive in the format "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), written
/// to memory. Everything belongs to root and has no date, so that the same input makes the same archive.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    count: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            count: 0,
            directories: BTreeSet::new(),
        }
    }

    pub(crate) fn directory(&mut self, path: &str, mode: u32) {
        self.directories.insert(path.into());
        self.entry(path, 0o040_000 | mode, None, b"");
    }

    /// Makes the directories above `path` that aren't there yet.
    pub(crate) fn parents(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            if !self.directories.contains(&path[..end]) {
                self.directory(&path[..end], 0o755);
            }
        }
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entry(path, 0o100_000 | mode, None, data);
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, 0o120_777, None, target.as_bytes());
    }

    pub(crate) fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, 0o020_000 | mode, Some((major, minor)), b"");
    }

    fn entry(&mut self, path: &str, mode: u32, device: Option<(u32, u32)>, data: &[u8]) {
        self.count += 1;
        let (major, minor) = device.unwrap_or((0, 0));
        let size = u32::try_from(data.len())
            .expect("members come from `modules` and `deb`, which take at most 256 MiB");
        let mut writer = Builder::new(path)
            .ino(self.count)
            .mode(mode)
            .nlink(1)
            .rdev_major(major)
            .rdev_minor(minor)
            .write(&mut self.bytes, size);
        writer
            .write_all(data)
            .and_then(|()| writer.finish())
            .expect("a Vec takes what it is given");
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        trailer(&mut self.bytes).expect("a Vec takes what it is given");
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}

/// An entry of an archive, read back.
#[cfg(test)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) mode: u32,
    pub(crate) data: Vec<u8>,
}

/// Reads an archive back.
#[cfg(test)]
pub(crate) fn list(archive: &[u8]) -> Vec<Listed> {
    use std::io::Read;
    let mut entries = Vec::new();
    let mut rest = archive;
    loop {
        let mut reader = cpio::newc::Reader::new(rest).unwrap();
        if reader.entry().is_trailer() {
            return entries;
        }
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        entries.push(Listed {
            name: reader.entry().name().into(),
            mode: reader.entry().mode(),
            data,
        });
        rest = reader.finish().unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Origin;
    use crate::modules::{ModuleSet, test_module};
    use std::process::{Command, Stdio};

    fn parts() -> Parts {
        let mut modules = ModuleSet::default();
        let folder = "kernel/drivers/virtio";
        for (name, depends) in [
            ("virtio", ""),
            ("virtio_ring", ""),
            ("virtio_pci", "virtio_ring,virtio"),
            ("virtio_console", "virtio_ring,virtio"),
            ("virtio_blk", "virtio"),
        ] {
            modules
                .insert(
                    &format!("{folder}/{name}.ko"),
                    &test_module(depends, &[&format!("virtio:{name}")]),
                )
                .unwrap();
        }
        Parts {
            kernel: vec![],
            kernel_version: "6.1.0-test".into(),
            busybox: b"busybox's bytes".to_vec(),
            modules,
            origin: Origin::Host {
                path: "/boot/vmlinuz".into(),
            },
        }
    }

    #[test]
    fn modules_come_before_those_that_need_them_and_only_the_first_ones_are_listed() {
        let entries = list(&build(&parts()));

        let order = entries
            .iter()
            .find(|e| e.name == "etc/trapgate/modules")
            .unwrap();
        let names: Vec<_> = std::str::from_utf8(&order.data)
            .unwrap()
            .lines()
            .map(|l| l.rsplit('/').next().unwrap())
            .collect();
        assert_eq!(
            names,
            [
                "virtio_ring.ko",
                "virtio.ko",
                "virtio_pci.ko",
                "virtio_console.ko"
            ]
        );
        assert!(
            entries
                .iter()
                .any(|e| e.name == "lib/modules/6.1.0-test/kernel/drivers/virtio/virtio_blk.ko")
        );
    }

    #[test]
    fn a_directory_stands_before_what_is_in_it_and_once() {
        let entries = list(&build(&parts()));

        let mut directories = BTreeSet::new();
        for entry in &entries {
            if let Some((parent, _)) = entry.name.rsplit_once('/') {
                assert!(
                    directories.contains(parent),
                    "{} has no directory",
                    entry.name
                );
            }
            if entry.mode & 0o170_000 == 0o040_000 {
                assert!(
                    directories.insert(entry.name.as_str()),
                    "{} twice",
                    entry.name
                );
            }
        }
        assert!(directories.contains("lib/modules/6.1.0-test/kernel/drivers/virtio"));
    }

    #[test]
    fn init_and_busybox_can_be_executed_and_the_console_is_a_device() {
        let entries = list(&build(&parts()));
        let mode = |name: &str| entries.iter().find(|e| e.name == name).unwrap().mode;

        assert_eq!(mode("init"), 0o100_755);
        assert_eq!(mode("bin/busybox"), 0o100_755);
        assert_eq!(mode("dev/console"), 0o020_600);
        assert_eq!(mode("bin/sh"), 0o120_777);
    }

    #[test]
    fn the_same_parts_make_the_same_archive_of_whole_blocks() {
        let once = build(&parts());

        assert_eq!(once, build(&parts()));
        assert_eq!(once.len() % 512, 0);
    }

    /// The format is judged by another's program, not only by the crate that wrote it.
    #[test]
    fn another_cpio_lists_the_same_names() {
        let archive = build(&parts());
        let expected: Vec<_> = list(&archive).into_iter().map(|e| e.name).collect();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("initramfs");
        std::fs::write(&path, &archive).unwrap();

        let Some(output) = ["cpio", "busybox"].into_iter().find_map(|program| {
            let mut command = Command::new(program);
            if program == "busybox" {
                command.arg("cpio");
            }
            let input = std::fs::File::open(&path).unwrap();
            command
                .arg("-t")
                .stdin(input)
                .stderr(Stdio::null())
                .output()
                .ok()
        }) else {
            // Past the test harness, which would swallow it.
            let line = b"skipped: neither cpio nor busybox is installed\n";
            let _ = std::io::stderr().write_all(line);
            return;
        };

        assert!(output.status.success());
        let listed: Vec<_> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(String::from)
            .collect();
        assert_eq!(listed, expected);
    }

    /// Every shell on the host that reads POSIX finds no error of syntax in init.
    #[test]
    fn init_is_well_formed_shell() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("init");
        std::fs::write(&path, INIT).unwrap();

        let output = Command::new("sh").arg("-n").arg(&path).output().unwrap();

        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
