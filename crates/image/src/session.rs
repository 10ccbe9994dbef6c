//! What the VMM tells the guest's init: the second archive of the initrd.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::ImageError;
use crate::initramfs::Archive;

/// The virtio-console port on which init reports.
pub const STATUS_PORT: &str = "trapgate.status";
/// The virtio-console port that is the command's standard input.
pub const STDIN_PORT: &str = "trapgate.stdin";
/// The virtio-console port that is the command's standard output.
pub const STDOUT_PORT: &str = "trapgate.stdout";
/// The virtio-console port that is the command's standard error.
pub const STDERR_PORT: &str = "trapgate.stderr";
/// What stands before a status line on the serial port, where there is no [`STATUS_PORT`].
pub const STATUS_PREFIX: &str = "trapgate-status: ";

/// What to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// The program and its arguments, passed on byte for byte; empty for an interactive shell.
    pub command: Vec<OsString>,
    /// Environment variables, such as `TERM`. `COLUMNS` and `LINES` become the terminal's size.
    pub env: Vec<(String, OsString)>,
    /// Whether a command runs on the terminal (`/dev/hvc0`) in place of the three stream ports. An interactive
    /// shell always does.
    pub terminal: bool,
}

/// The cpio archive to append to [`crate::StockImage::initramfs`] so that init runs this session.
///
/// # Errors
/// [`ImageError::BadSession`] if an argument or value contains a NUL byte, or a variable has a name that a shell
/// can't set.
pub fn session_archive(session: &Session) -> Result<Vec<u8>, ImageError> {
    let mut archive = Archive::new();
    archive.directory("trapgate", 0o755);

    let mut env = Vec::new();
    for (name, value) in &session.env {
        let proper = name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric())
            && !name.is_empty()
            && !name.as_bytes()[0].is_ascii_digit();
        if !proper {
            return Err(ImageError::BadSession {
                what: format!("`{name}` can't be the name of an environment variable"),
            });
        }
        env.extend_from_slice(b"export ");
        env.extend_from_slice(name.as_bytes());
        env.push(b'=');
        quote(value, &mut env)?;
        env.push(b'\n');
    }
    archive.file("trapgate/env", 0o644, &env);

    if !session.command.is_empty() {
        let mut line = b"set --".to_vec();
        for argument in &session.command {
            line.push(b' ');
            quote(argument, &mut line)?;
        }
        line.push(b'\n');
        archive.file("trapgate/command", 0o644, &line);
    }
    if session.terminal {
        archive.file("trapgate/tty", 0o644, b"");
    }
    Ok(archive.finish())
}

/// Appends `text` as one word of shell (POSIX.1-2017 XCU 2.2.2: nothing is special between single quotes but their end).
fn quote(text: &OsStr, into: &mut Vec<u8>) -> Result<(), ImageError> {
    into.push(b'\'');
    for &byte in text.as_bytes() {
        match byte {
            0 => {
                return Err(ImageError::BadSession {
                    what: format!("the argument {text:?} contains a NUL byte"),
                });
            }
            b'\'' => into.extend_from_slice(b"'\\''"),
            _ => into.push(byte),
        }
    }
    into.push(b'\'');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::initramfs::list;
    use std::os::unix::ffi::OsStringExt;
    use std::process::{Command, Stdio};

    #[test]
    fn a_session_without_a_command_leaves_the_command_file_out() {
        let session = Session {
            env: vec![("TERM".into(), "xterm".into())],
            ..Session::default()
        };

        let entries = list(&session_archive(&session).unwrap());

        assert_eq!(
            entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(),
            ["trapgate", "trapgate/env"]
        );
        assert_eq!(entries[1].data, b"export TERM='xterm'\n");
    }

    #[test]
    fn a_terminal_session_says_so() {
        let session = Session {
            command: vec!["vi".into()],
            terminal: true,
            ..Session::default()
        };

        let entries = list(&session_archive(&session).unwrap());

        assert!(entries.iter().any(|e| e.name == "trapgate/tty"));
        assert!(
            entries
                .iter()
                .any(|e| e.name == "trapgate/command" && e.data == b"set -- 'vi'\n")
        );
    }

    #[test]
    fn a_shell_reads_back_every_byte_of_every_argument() {
        // Given all bytes but NUL, an empty argument, quotes, newlines and an option
        let every: Vec<u8> = (1..=255).collect();
        let command: Vec<OsString> = vec![
            OsString::from_vec(every),
            "".into(),
            "it's `a` \"$HOME\" \\ \n line".into(),
            "-n".into(),
            "'".into(),
        ];
        let session = Session {
            command: command.clone(),
            ..Session::default()
        };
        let archive = session_archive(&session).unwrap();
        let file = list(&archive)
            .into_iter()
            .find(|e| e.name == "trapgate/command")
            .unwrap()
            .data;

        // When a shell sources it, and prints its parameters each followed by NUL
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("command");
        std::fs::write(&path, file).unwrap();
        let output = Command::new("sh")
            .arg("-c")
            .arg(r#". "$0"; for a in "$@"; do printf '%s\0' "$a"; done"#)
            .arg(&path)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .unwrap();

        // Then they are the ones we gave
        let mut expected = Vec::new();
        for argument in &command {
            expected.extend_from_slice(argument.as_bytes());
            expected.push(0);
        }
        assert_eq!(output.stdout, expected);
    }

    #[test]
    fn nul_bytes_and_improper_names_are_refused() {
        for session in [
            Session {
                command: vec![OsString::from_vec(vec![b'a', 0])],
                ..Session::default()
            },
            Session {
                env: vec![("A".into(), OsString::from_vec(vec![0]))],
                ..Session::default()
            },
            Session {
                env: vec![("A B".into(), "".into())],
                ..Session::default()
            },
            Session {
                env: vec![("".into(), "".into())],
                ..Session::default()
            },
            Session {
                env: vec![("1A".into(), "".into())],
                ..Session::default()
            },
        ] {
            assert!(
                matches!(
                    session_archive(&session),
                    Err(ImageError::BadSession { .. })
                ),
                "{session:?}"
            );
        }
    }
}
