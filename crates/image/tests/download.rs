//! The stock image from the real packages. Needs apt and its mirrors; says so where it has to be skipped.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use trapgate_image::{CacheDir, ImageError, Origin, Phase, cached, stock};

/// A cache that outlives the test, so that the packages are fetched once and not for each run.
fn cache() -> CacheDir {
    CacheDir::at(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("trapgate-cache"))
}

#[test]
fn the_distributions_kernel_is_fetched_packed_and_then_found_in_the_cache() {
    let cache = cache();
    let mut phases: Vec<Phase> = Vec::new();
    let image = match stock(&cache, &mut |phase: Phase, _: u64, _: Option<u64>| {
        phases.push(phase)
    }) {
        Ok(image) => image,
        Err(
            error @ (ImageError::NoPackageManager
            | ImageError::NoSuchPackage { .. }
            | ImageError::NoHostKernel { .. }
            | ImageError::Command { .. }),
        ) => {
            // Past the test harness, which would swallow it.
            let line = format!("skipped: no kernel can be fetched here: {error}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
            return;
        }
        Err(error) => panic!("{error}"),
    };

    // Another time there is nothing to do.
    assert_eq!(cached(&cache).as_ref(), Some(&image));
    let again = stock(&cache, &mut |phase: Phase, _: u64, _: Option<u64>| {
        panic!("{phase}")
    })
    .unwrap();
    assert_eq!(again, image);

    let kernel = std::fs::read(&image.kernel).unwrap();
    assert_eq!(&kernel[0x202..0x206], b"HdrS");
    if let Origin::Package { name, .. } = &image.origin {
        assert_eq!(*name, format!("linux-image-{}", image.kernel_version));
    }

    // The modules that init loads are there, in an order in which each finds what it needs.
    let initramfs = std::fs::read(&image.initramfs).unwrap();
    assert!(initramfs.len() < 10 << 20, "{} bytes", initramfs.len());
    let text = member(&initramfs, "etc/trapgate/modules");
    let order: Vec<&str> = std::str::from_utf8(&text).unwrap().lines().collect();
    let position = |name: &str| {
        order
            .iter()
            .position(|p| p.ends_with(&format!("/{name}.ko")))
    };
    if let Some(console) = position("virtio_console") {
        assert!(position("virtio").unwrap() < console);
        assert!(position("virtio_ring").unwrap() < position("virtio").unwrap());
    }
    for path in &order {
        assert!(
            member(&initramfs, path.trim_start_matches('/')).starts_with(b"\x7fELF"),
            "{path}"
        );
    }

    // The busybox in it runs, and has what init calls.
    let directory = tempfile::tempdir().unwrap();
    let busybox = directory.path().join("busybox");
    std::fs::write(&busybox, member(&initramfs, "bin/busybox")).unwrap();
    std::fs::set_permissions(
        &busybox,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let output = Command::new(&busybox).arg("--list").output().unwrap();
    let applets = String::from_utf8(output.stdout).unwrap();
    for needed in [
        "acpid", "cat", "ifconfig", "insmod", "ln", "mkdir", "mkfifo", "modprobe", "mount",
        "poweroff", "reboot", "setsid", "sh", "sleep", "stty", "sync", "umount",
    ] {
        assert!(
            applets.lines().any(|a| a == needed),
            "this busybox has no {needed}"
        );
    }
}

/// The bytes of one file of a "newc" archive.
fn member(archive: &[u8], name: &str) -> Vec<u8> {
    use std::io::Read;
    let mut rest = archive;
    loop {
        let mut reader = cpio::newc::Reader::new(rest).unwrap();
        assert!(!reader.entry().is_trailer(), "no {name} in the archive");
        if reader.entry().name() == name {
            let mut data = Vec::new();
            reader.read_to_end(&mut data).unwrap();
            return data;
        }
        rest = reader.finish().unwrap();
    }
}
