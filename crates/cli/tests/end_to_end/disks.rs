//! Disks keep what was written to them.

use crate::harness::{finish, linux, trapgate};

fn disk(mebibytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(mebibytes << 20).unwrap();
    file
}

#[test]
fn file_system_survives_the_machine() {
    let Some(_turn) = linux() else { return };
    let disk = disk(16);
    let path = format!("path={}", disk.path().display());
    let write = "mke2fs -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && echo kept >/mnt/file; exit $?";
    let read = "mkdir -p /mnt && mount /dev/vda /mnt && cat /mnt/file";

    let first = finish(trapgate(&[
        "run", "-q", "--disk", &path, "--", "sh", "-c", write,
    ]));
    let second = finish(trapgate(&[
        "run", "-q", "--disk", &path, "--", "sh", "-c", read,
    ]));

    assert_eq!(first.code(), Some(0), "{first:?}");
    assert_eq!(
        (second.code(), second.out().as_str()),
        (Some(0), "kept\n"),
        "{second:?}"
    );
}

#[test]
fn reboot_finds_the_disk_as_it_was_left() {
    let Some(_turn) = linux() else { return };
    let disk = disk(1);
    let path = format!("path={}", disk.path().display());
    let script =
        "if grep -q mark /dev/vda; then exit 9; fi; echo mark >/dev/vda; sync; reboot; sleep 100";
    let run = finish(trapgate(&[
        "run", "--disk", &path, "--", "sh", "-c", script,
    ]));
    assert_eq!(run.code(), Some(9), "{run:?}");
    assert!(run.stderr.contains("the guest restarts"), "{run:?}");
}

#[test]
fn read_only_disk_cannot_be_written() {
    let Some(_turn) = linux() else { return };
    let disk = disk(1);
    let path = format!("path={},ro", disk.path().display());
    let script = "cat /sys/block/vda/ro; echo mark >/dev/vda";
    let run = finish(trapgate(&[
        "run", "-q", "--disk", &path, "--", "sh", "-c", script,
    ]));
    assert_ne!(run.code(), Some(0), "{run:?}");
    assert_eq!(run.out(), "1\n");
    assert!(
        std::fs::read(disk.path())
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
}
