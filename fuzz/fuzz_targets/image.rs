//! Packages, modules, kernels and programs with anything wrong with them: an error, or an initramfs
//! that is a well-formed archive.
#![no_main]
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;

use arbitrary::Arbitrary;
use flate2::Compression;
use flate2::write::GzEncoder;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use trapgate_image::{Session, fuzzing, session_archive};

#[derive(Arbitrary, Debug)]
enum Input {
    Package(Package),
    RawPackage(Vec<u8>),
    Modules(String, Vec<Module>),
    Kernel(Vec<Bend>, Vec<u8>),
    Busybox(Vec<Bend>, Vec<u8>),
    Session {
        command: Vec<Vec<u8>>,
        env: Vec<(String, Vec<u8>)>,
        terminal: bool,
    },
}

/// An `ar` archive of `data.tar`, packed.
#[derive(Arbitrary, Debug)]
struct Package {
    packing: Packing,
    with_kernel: bool,
    with_busybox: bool,
    files: Vec<(Path, Content)>,
    tar_bends: Vec<Bend>,
    packed_bends: Vec<Bend>,
    ar_bends: Vec<Bend>,
    cut: Option<u16>,
}

#[derive(Arbitrary, Debug)]
enum Packing {
    None,
    Gzip,
    /// Bytes that only say that they are packed.
    Xz(Vec<u8>),
    Zstd(Vec<u8>),
    Other,
}

#[derive(Arbitrary, Debug)]
enum Path {
    Kernel(String),
    Busybox,
    Builtin,
    VirtioPci,
    VirtioConsole,
    VirtioRing,
    Any(String),
}

#[derive(Arbitrary, Debug)]
enum Content {
    Module(Module),
    Any(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Module {
    name: String,
    depends: String,
    aliases: Vec<String>,
    gzip: bool,
    bends: Vec<Bend>,
}

/// A value written somewhere: large files have holes, so most hit near the start.
#[derive(Arbitrary, Debug)]
enum Bend {
    Start(u8, u64),
    Text(u16, u8),
    Anywhere(u16, u32),
}

impl Bend {
    fn apply(&self, file: &mut [u8]) {
        let (offset, bytes) = match *self {
            Self::Start(offset, value) => (usize::from(offset), value.to_le_bytes().to_vec()),
            Self::Text(offset, byte) => (usize::from(offset), vec![byte]),
            Self::Anywhere(offset, value) => (usize::from(offset), value.to_le_bytes().to_vec()),
        };
        for (place, byte) in file.iter_mut().skip(offset).zip(bytes) {
            *place = byte;
        }
    }
}

fn bent(mut file: Vec<u8>, bends: &[Bend]) -> Vec<u8> {
    for bend in bends {
        bend.apply(&mut file);
    }
    file
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder
        .write_all(data)
        .expect("a Vec takes what it is given");
    encoder.finish().expect("a Vec takes what it is given")
}

impl Module {
    fn file(&self) -> Vec<u8> {
        let aliases: Vec<_> = self.aliases.iter().map(String::as_str).collect();
        let file = bent(fuzzing::sample_module(&self.depends, &aliases), &self.bends);
        if self.gzip { gzip(&file) } else { file }
    }
}

impl Path {
    fn text(&self) -> String {
        let module = |path| format!("./lib/modules/6.1.0-fuzz/{path}");
        match self {
            Self::Kernel(version) => format!("./boot/vmlinuz-{version}"),
            Self::Busybox => "./usr/bin/busybox".into(),
            Self::Builtin => module("modules.builtin"),
            Self::VirtioPci => module("kernel/virtio/virtio_pci.ko"),
            Self::VirtioConsole => module("kernel/char/virtio_console.ko.gz"),
            Self::VirtioRing => module("kernel/virtio/virtio_ring.ko.xz"),
            Self::Any(path) => path.clone(),
        }
    }
}

impl Package {
    fn file(&self) -> Vec<u8> {
        let mut files = Vec::new();
        if self.with_kernel {
            let path = "./boot/vmlinuz-6.1.0-fuzz".to_owned();
            files.push((path, fuzzing::sample_kernel("6.1.0-fuzz")));
        }
        if self.with_busybox {
            files.push((Path::Busybox.text(), fuzzing::sample_busybox()));
        }
        files.extend(self.files.iter().map(|(path, content)| {
            let content = match content {
                Content::Module(module) => module.file(),
                Content::Any(bytes) => bytes.clone(),
            };
            (path.text(), content)
        }));
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in &files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            // A path that a tar archive cannot hold is left out.
            let _ = archive.append_data(&mut header, path, &content[..]);
        }
        let tar = archive.into_inner().expect("a Vec takes what it is given");
        let tar = bent(tar, &self.tar_bends);
        let (name, packed) = match &self.packing {
            Packing::None => ("data.tar", tar),
            Packing::Gzip => ("data.tar.gz", gzip(&tar)),
            Packing::Xz(bytes) => ("data.tar.xz", [b"\xfd7zXZ\0", &bytes[..]].concat()),
            Packing::Zstd(bytes) => (
                "data.tar.zst",
                [&[0x28, 0xb5, 0x2f, 0xfd], &bytes[..]].concat(),
            ),
            Packing::Other => ("data.tar.lzma", tar),
        };
        let packed = bent(packed, &self.packed_bends);
        let mut deb = ar::Builder::new(Vec::new());
        for (name, data) in [("debian-binary", &b"2.0\n"[..]), (name, &packed[..])] {
            deb.append(&ar::Header::new(name.into(), data.len() as u64), data)
                .expect("a Vec takes what it is given");
        }
        let mut file = deb.into_inner().expect("a Vec takes what it is given");
        file.truncate(self.cut.map_or(usize::MAX, usize::from));
        bent(file, &self.ar_bends)
    }
}

fuzz_target!(|input: Input| match &input {
    Input::Package(package) => read_package(&package.file()),
    Input::RawPackage(bytes) => read_package(&[b"!<arch>\n", &bytes[..]].concat()),
    Input::Modules(builtin, modules) => {
        let modules: Vec<_> = modules
            .iter()
            .map(|module| (module.name.clone(), module.file()))
            .collect();
        let _ = fuzzing::index_of_modules(builtin, &modules);
    }
    Input::Kernel(bends, tail) => {
        let file = [fuzzing::sample_kernel("6.1.0-fuzz"), tail.clone()].concat();
        let _ = fuzzing::kernel_version(&bent(file, bends));
    }
    Input::Busybox(bends, tail) => {
        let file = [fuzzing::sample_busybox(), tail.clone()].concat();
        let _ = fuzzing::check_busybox(&bent(file, bends));
    }
    Input::Session {
        command,
        env,
        terminal,
    } => {
        let text = |bytes: &Vec<u8>| OsString::from_vec(bytes.clone());
        let session = Session {
            command: command.iter().map(text).collect(),
            env: env
                .iter()
                .map(|(name, value)| (name.clone(), text(value)))
                .collect(),
            terminal: *terminal,
        };
        if let Ok(archive) = session_archive(&session) {
            check_archive(&archive);
        }
    }
});

fn read_package(bytes: &[u8]) {
    let mut file = File::from(memfd_create("package", MemfdFlags::CLOEXEC).expect("memory"));
    file.write_all(bytes).expect("memory for the package");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match fuzzing::initramfs_of_package(path.into()) {
        Ok(archive) => check_archive(&archive),
        Err(error) => assert!(!error.to_string().is_empty() && !error.fix().is_empty()),
    }
}

/// The archive can be read to its end, and another can follow it.
fn check_archive(archive: &[u8]) {
    assert_eq!(archive.len() % 512, 0);
    let mut rest = archive;
    loop {
        let reader = cpio::newc::Reader::new(rest).expect("a header comes next");
        if reader.entry().is_trailer() {
            return;
        }
        rest = reader.finish().expect("the file is whole");
    }
}
