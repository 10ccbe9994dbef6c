//! The value of `--disk`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use trapgate_vmm::DiskConfig;

/// Reads `[path=]FILE[,ro]`. A comma in the name of the file is written twice.
///
/// # Errors
/// A text for a person.
pub(crate) fn parse(text: &OsStr) -> Result<DiskConfig, String> {
    let mut parts = split(text.as_bytes()).into_iter();
    let first = parts.next().unwrap_or_default();
    let path = match first.strip_prefix(b"path=") {
        Some(path) => path.to_vec(),
        None => first,
    };
    if path.is_empty() {
        return Err(
            "the file's name is missing; write for example path=disk.img or path=disk.img,ro"
                .to_owned(),
        );
    }
    let mut read_only = false;
    for option in parts {
        match option.as_slice() {
            b"ro" => read_only = true,
            other => {
                return Err(format!(
                    "`{}` is no option of a disk; the only one is `ro` (a comma in a file's name is written twice)",
                    String::from_utf8_lossy(other)
                ));
            }
        }
    }
    Ok(DiskConfig {
        path: PathBuf::from(OsString::from_vec(path)),
        read_only,
    })
}

/// Splits at commas; two commas are one that does not split.
fn split(text: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().peekable();
    while let Some(&byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_understood() {
        for (text, path, read_only) in [
            ("path=a.img", "a.img", false),
            ("path=a.img,ro", "a.img", true),
            ("a.img", "a.img", false),
            ("/d/a.img,ro", "/d/a.img", true),
            ("path=a,,b.img", "a,b.img", false),
            ("path=a=b", "a=b", false),
        ] {
            let disk = parse(OsStr::new(text)).unwrap();
            assert_eq!(
                (disk.path, disk.read_only),
                (path.into(), read_only),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_disk_is_explained() {
        for (text, complaint) in [
            ("", "name is missing"),
            ("path=", "name is missing"),
            (",ro", "name is missing"),
            ("a.img,rw", "`rw`"),
            ("a.img,readonly=on", "`readonly=on`"),
            ("a.img,", "``"),
        ] {
            let error = parse(OsStr::new(text)).unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }

    #[test]
    fn names_need_not_be_text() {
        let disk = parse(OsStr::from_bytes(b"path=\xff,ro")).unwrap();
        assert_eq!(disk.path.as_os_str().as_bytes(), b"\xff");
    }
}
