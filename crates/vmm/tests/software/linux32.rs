//! A 32-bit kernel of Debian's: protected mode with and without PAE, its entry code, its paging, its system calls.

use std::path::Path;

use trapgate_vmm::{
    Content, EngineChoice, EngineKind, Hooks, Host, Machine, MachineConfig, Outcome,
};

use crate::boot::{Transcript, end};
use crate::{ENGINES, everything, linux, packages, say, selftests, skipped};

/// The guest's first program; `/rest` is what a test adds.
const INIT: &str = "#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t tmpfs tmpfs /tmp
uname -m
seq 3000 | sort -r | md5sum
[ ! -e /selftests/run ] || sh /selftests/run $(cat /names)
poweroff -f
";

/// An initramfs with busybox and that init.
fn archive(packages: &Path, names: &[String]) -> Result<Vec<u8>, String> {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().map_err(|error| error.to_string())?;
    let path = |name: &str| root.path().join(name);
    let make = || -> std::io::Result<()> {
        for directory in ["bin", "dev", "proc", "sys", "tmp"] {
            std::fs::create_dir(path(directory))?;
        }
        std::fs::copy(packages.join("bin/busybox"), path("bin/busybox"))?;
        std::fs::write(path("init"), INIT)?;
        std::fs::write(path("names"), names.join(" "))?;
        std::fs::set_permissions(path("init"), PermissionsExt::from_mode(0o755))
    };
    make().map_err(|error| error.to_string())?;
    packages::archive(root.path())
}

/// Boots the kernel of a package to its end; gives what the serial port said.
fn boot(packages: &Path, initrds: &[Vec<u8>], engine: EngineKind) -> String {
    let mut names = std::fs::read_dir(packages.join("boot")).expect("a kernel's package");
    let kernel = names
        .find_map(|entry| {
            let path = entry.ok()?.path();
            path.file_name()?
                .to_str()?
                .starts_with("vmlinuz-")
                .then_some(path)
        })
        .expect("a kernel's package");
    let config = MachineConfig {
        kernel: Content::from(std::fs::read(kernel).expect("it is there")),
        initrds: initrds.iter().cloned().map(Content::from).collect(),
        command_line: format!(
            "console=ttyS0 quiet panic=-1 {}",
            trapgate_image::COMMAND_LINE
        ),
        memory_bytes: 256 << 20,
        engine: EngineChoice::Only(engine),
        level: Host::probe().level(),
        ..MachineConfig::default()
    };
    let serial = Transcript::default();
    let sink = serial.clone();
    let hooks = Hooks {
        serial: Box::new(move |bytes| sink.add(bytes)),
        ..Hooks::default()
    };
    let machine = Machine::start(config, hooks).expect("it boots");
    let outcome = end(&machine, &serial);
    assert!(
        matches!(outcome, Outcome::PoweredOff),
        "{outcome:?}: {}",
        serial.text()
    );
    serial.text()
}

#[test]
fn kernels_of_32_bits_run_commands() {
    let kernels: &[&str] = if everything() {
        &["linux-image-686-pae", "linux-image-686"]
    } else {
        &["linux-image-686-pae"]
    };
    let mut engines = ENGINES.to_vec();
    if !everything() {
        engines.retain(|engine| *engine == EngineKind::Jit);
    }
    for package in kernels {
        let unpacked = match packages::i386(&[package, "busybox-static"]) {
            Ok(directory) => directory,
            Err(why) => return skipped(package, &why),
        };
        let mut names = Vec::new();
        let mut initrds = Vec::new();
        if everything() {
            match (selftests::names_of("_32"), selftests::archive(Some("_32"))) {
                (Ok(built), Ok(archive)) => {
                    names = built;
                    initrds.push(archive);
                }
                (Err(why), _) | (_, Err(why)) => skipped("selftests on a 32-bit kernel", &why),
            }
        }
        initrds.insert(0, archive(&unpacked, &names).expect("there is a cpio"));
        let _turn = linux::turn();
        for engine in &engines {
            let begun = std::time::Instant::now();
            let text = boot(&unpacked, &initrds, *engine).replace('\r', "");
            let said = "i686\n58a411f0f5089590c17ee74d6b228992  -\n";
            assert!(text.contains(said), "{package} on {engine}: {text}");
            let verdicts = selftests::verdicts(&text);
            assert!(
                verdicts.keys().eq(&names),
                "{package} on {engine}: {verdicts:?}"
            );
            assert!(
                verdicts.values().all(selftests::Verdict::passed),
                "{package} on {engine}: {verdicts:#?}"
            );
            say(&format!(
                "{package} on {engine}: a command and {} selftests, {:.0?}",
                names.len(),
                begun.elapsed()
            ));
        }
    }
}
