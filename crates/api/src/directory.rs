//! Where the sockets are: one directory for each user, one socket and one lock for each running machine.
//!
//! The directory is `$XDG_RUNTIME_DIR/trapgate`, or else `trapgate-UID` in the directory for temporary files, which others
//! can write too: so it is taken only if it is a directory of ours that nobody else may enter, and from then on
//! everything happens relative to the descriptor that was checked.
//!
//! A machine that runs holds a lock on `NAME.lock`, which the kernel takes back however the process ends. So a socket whose lock
//! can be had was left by a dead machine, and goes away. The lock's file holds the process's number.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// Longest name: with what is before and after it a socket's address has 108 bytes.
const LONGEST_NAME: usize = 63;
/// How often a name that seems taken is tried again. `ps` holds the lock of a dead machine for a moment.
const TRIES: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);
/// How long the messages of a machine that failed are kept.
const KEEP_LOGS: Duration = Duration::from_secs(7 * 24 * 3600);

/// Something is wrong with the directory, or with what is in it. [`Self::fix`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A name that can't be one.
    #[error("`{name}` cannot be a machine's name: {reason}")]
    BadName {
        /// The name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// It can't be made, or looked at.
    #[error("cannot use the directory `{path}` for control sockets")]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It belongs to someone else.
    #[error("the directory `{path}` for control sockets belongs to user {owner}, not to us")]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// User ID of its owner.
        owner: u32,
    },
    /// Others may enter it.
    #[error("others may enter the directory `{path}` for control sockets (mode {mode:o})")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The name belongs to a machine that runs.
    #[error("there is a running machine called `{name}` already")]
    Taken {
        /// The name.
        name: Name,
    },
    /// A socket or a lock can't be made.
    #[error("cannot make the control socket `{path}`")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl DirectoryError {
    /// What to do about it, as a sentence for a person.
    pub fn fix(&self) -> String {
        match self {
            Self::BadName { .. } => {
                "use letters, digits, `-`, `_` and `.`, at most 63, and begin with a letter or digit".to_owned()
            }
            Self::Unusable { .. } | Self::Socket { .. } => {
                "set XDG_RUNTIME_DIR to a directory of yours that can be written".to_owned()
            }
            Self::Foreign { path, .. } => format!(
                "set XDG_RUNTIME_DIR to a directory of yours; someone else made `{}`",
                path.display()
            ),
            Self::Open { path, .. } => format!("`chmod 700 {}`", path.display()),
            Self::Taken { name } => {
                format!("choose another `--name`, or stop that one: `trapgate stop {name}`")
            }
        }
    }
}

/// A machine's name: 1 to 63 letters, digits, `-`, `_` and `.`, the first a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = DirectoryError;

    fn from_str(name: &str) -> Result<Self, DirectoryError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let reason = if name.is_empty() {
            "it is empty"
        } else if name.len() > LONGEST_NAME {
            "it has more than 63 bytes"
        } else if !name.chars().all(allowed) {
            "it has a character that is neither letter nor digit nor one of `-_.`"
        } else if !name.starts_with(|first: char| first.is_ascii_alphanumeric()) {
            "it does not begin with a letter or digit"
        } else {
            return Ok(Self(name.to_owned()));
        };
        Err(DirectoryError::BadName {
            name: name.to_owned(),
            reason,
        })
    }
}

/// A machine that is, or seemed to be, there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: Name,
    /// Its process, if that had said so.
    pub pid: Option<u32>,
}

/// The directory of a user's sockets.
#[derive(Debug)]
pub struct RuntimeDirectory {
    directory: OwnedFd,
    path: PathBuf,
}

/// What the place of the directory depends on.
struct Surroundings {
    runtime: Option<OsString>,
    temporary: PathBuf,
}

impl RuntimeDirectory {
    /// The directory for this user and environment, made if it is not there.
    ///
    /// # Errors
    /// It can't be made, or others may do what they want with it.
    pub fn open() -> Result<Self, DirectoryError> {
        Self::open_in(&Surroundings {
            runtime: std::env::var_os("XDG_RUNTIME_DIR"),
            temporary: std::env::temp_dir(),
        })
    }

    fn open_in(surroundings: &Surroundings) -> Result<Self, DirectoryError> {
        // As the XDG base directory specification says, a relative path counts for nothing. After `su` or in a container the
        // variable may name a directory that is another user's or is not there.
        let given = surroundings.runtime.as_deref().map(Path::new);
        if let Some(runtime) = given.filter(|path| path.is_absolute())
            && let Ok(metadata) = std::fs::metadata(runtime)
            && std::os::unix::fs::MetadataExt::uid(&metadata) == rustix::process::geteuid().as_raw()
        {
            return Self::at(runtime.join("trapgate"));
        }
        let user = rustix::process::geteuid().as_raw();
        Self::at(surroundings.temporary.join(format!("trapgate-{user}")))
    }

    /// The directory at this path, made if it is not there.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn at(path: PathBuf) -> Result<Self, DirectoryError> {
        let unusable = |source: Errno| DirectoryError::Unusable {
            path: path.clone(),
            source: source.into(),
        };
        match rustix::fs::mkdir(&path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(unusable(error)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty()).map_err(unusable)?;
        let status = rustix::fs::fstat(&directory).map_err(unusable)?;
        if status.st_uid != rustix::process::geteuid().as_raw() {
            return Err(DirectoryError::Foreign {
                path,
                owner: status.st_uid,
            });
        }
        if status.st_mode & 0o077 != 0 {
            return Err(DirectoryError::Open {
                path,
                mode: status.st_mode & 0o7777,
            });
        }
        Ok(Self { directory, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the socket of a machine is, for a person.
    pub fn socket_path(&self, name: &Name) -> PathBuf {
        self.path.join(format!("{name}.sock"))
    }

    /// Where the messages of a machine that runs without a terminal are.
    pub fn log_path(&self, name: &Name) -> PathBuf {
        self.path.join(format!("{name}.log"))
    }

    /// Where the socket of a machine is, in few bytes, and by way of the directory that was checked.
    pub(crate) fn socket_address(&self, name: &Name) -> PathBuf {
        let directory = self.directory.as_raw_fd();
        PathBuf::from(format!("/proc/self/fd/{directory}/{name}.sock"))
    }

    fn remove(&self, file: &str) {
        // It may not be there, which is what is wanted.
        let _ = rustix::fs::unlinkat(&self.directory, file, AtFlags::empty());
    }

    /// Takes the lock of a name; `None` if a running machine has it.
    fn lock(&self, name: &Name) -> Result<Option<File>, Errno> {
        let file = format!("{name}.lock");
        loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR;
            let lock = rustix::fs::openat(&self.directory, &file, flags, mode)?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error),
            }
            // The machine that had it may have removed the file after we opened it: then we locked a file that
            // nobody else will find.
            let ours = rustix::fs::fstat(&lock)?;
            match rustix::fs::statat(&self.directory, &file, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(there) if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino) => {
                    return Ok(Some(File::from(lock)));
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes a name for a machine of this process.
    ///
    /// # Errors
    /// A running machine has it, or the directory can't be written.
    pub fn claim(self, name: Name) -> Result<Claim, DirectoryError> {
        for _ in 0..TRIES {
            if let Some(lock) = self.try_claim(&name)? {
                return self.claimed(name, lock);
            }
            std::thread::sleep(BETWEEN_TRIES);
        }
        Err(DirectoryError::Taken { name })
    }

    /// Takes the first of `vm1`, `vm2`, … that is free.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn claim_any(self) -> Result<Claim, DirectoryError> {
        let mut number = 1_u64;
        loop {
            let name = Name(format!("vm{number}"));
            if let Some(lock) = self.try_claim(&name)? {
                return self.claimed(name, lock);
            }
            number += 1;
        }
    }

    fn try_claim(&self, name: &Name) -> Result<Option<File>, DirectoryError> {
        self.lock(name).map_err(|source| DirectoryError::Socket {
            path: self.socket_path(name),
            source: source.into(),
        })
    }

    fn claimed(self, name: Name, mut lock: File) -> Result<Claim, DirectoryError> {
        let written = lock
            .set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        let socket = self.socket_path(&name);
        let claim = Claim {
            directory: self,
            name,
            _lock: lock,
        };
        written.map_err(|source| DirectoryError::Socket {
            path: socket,
            source,
        })?;
        // What a dead machine of this name left.
        claim.directory.remove(&format!("{}.sock", claim.name));
        Ok(claim)
    }

    /// The names of the machines that seem to run. What dead ones left is removed on the way.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn machines(&self) -> Result<Vec<Found>, DirectoryError> {
        let unusable = |source: Errno| DirectoryError::Unusable {
            path: self.path.clone(),
            source: source.into(),
        };
        let mut machines = Vec::new();
        let mut logs = Vec::new();
        for entry in Dir::read_from(&self.directory).map_err(unusable)? {
            let entry = entry.map_err(unusable)?;
            let Ok(file) = entry.file_name().to_str() else {
                continue;
            };
            if let Some(name) = file.strip_suffix(".log").and_then(|name| name.parse().ok()) {
                logs.push(name);
            }
            // The socket goes before its lock, so a lock alone is a machine that is about to serve, or has ceased to.
            let Some(name) = file
                .strip_suffix(".sock")
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            // If the lock can't even be tried the machine may be there.
            if !self.bury(&name).unwrap_or(false) {
                let pid = self.pid(&name);
                machines.push(Found { name, pid });
            }
        }
        logs.retain(|name| machines.iter().all(|found| found.name != *name));
        self.remove_old(&logs);
        machines.sort_by(|one, other| natural(&one.name).cmp(&natural(&other.name)));
        Ok(machines)
    }

    /// Removes what a machine left, if it is dead; whether it was.
    fn bury(&self, name: &Name) -> Result<bool, Errno> {
        let Some(lock) = self.lock(name)? else {
            return Ok(false);
        };
        self.remove(&format!("{name}.sock"));
        self.remove(&format!("{name}.lock"));
        drop(lock);
        Ok(true)
    }

    fn remove_old(&self, logs: &[Name]) {
        for name in logs {
            let file = format!("{name}.log");
            let Ok(status) = rustix::fs::statat(&self.directory, &file, AtFlags::SYMLINK_NOFOLLOW)
            else {
                continue;
            };
            let written = SystemTime::UNIX_EPOCH
                + Duration::from_secs(u64::try_from(status.st_mtime).unwrap_or(0));
            if written.elapsed().is_ok_and(|age| age > KEEP_LOGS) {
                self.remove(&file);
            }
        }
    }

    /// The process that has a name.
    fn pid(&self, name: &Name) -> Option<u32> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = format!("{name}.lock");
        let lock = rustix::fs::openat(&self.directory, file, flags, Mode::empty()).ok()?;
        let mut text = String::new();
        File::from(lock).take(32).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }
}

/// `vm10` comes after `vm9`.
fn natural(name: &Name) -> (String, u64, &Name) {
    let text = name.as_str();
    let stem = text.trim_end_matches(|c: char| c.is_ascii_digit());
    (
        stem.to_owned(),
        text[stem.len()..].parse().unwrap_or(0),
        name,
    )
}

/// A name that belongs to this process until this is dropped.
#[derive(Debug)]
pub struct Claim {
    directory: RuntimeDirectory,
    name: Name,
    _lock: File,
}

impl Claim {
    /// The name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The directory.
    pub fn directory(&self) -> &RuntimeDirectory {
        &self.directory
    }

    /// Makes the socket.
    ///
    /// # Errors
    /// The directory can't be written.
    pub(crate) fn bind(&self) -> Result<UnixListener, DirectoryError> {
        UnixListener::bind(self.directory.socket_address(&self.name)).map_err(|source| {
            DirectoryError::Socket {
                path: self.directory.socket_path(&self.name),
                source,
            }
        })
    }

    /// Makes an empty file for messages, in the place of an older one.
    ///
    /// # Errors
    /// That of the host.
    pub fn create_log(&self) -> io::Result<File> {
        // Whoever has an older one open keeps it.
        self.remove_log();
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::APPEND
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let file = format!("{}.log", self.name);
        let log = rustix::fs::openat(
            &self.directory.directory,
            file,
            flags,
            Mode::RUSR | Mode::WUSR,
        )?;
        Ok(File::from(log))
    }

    /// Removes the file for messages.
    pub fn remove_log(&self) {
        self.directory.remove(&format!("{}.log", self.name));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock last: as long as we have it nobody else makes files of these names.
        self.directory.remove(&format!("{}.sock", self.name));
        self.directory.remove(&format!("{}.lock", self.name));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn files(path: &Path) -> Vec<String> {
        let mut files: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        files
    }

    /// A socket and a lock of a machine that is no more.
    fn leave_behind(path: &Path, name: &str) {
        drop(UnixListener::bind(path.join(format!("{name}.sock"))).unwrap());
        std::fs::write(path.join(format!("{name}.lock")), "1\n").unwrap();
    }

    #[test]
    fn names_are_safe_in_a_path_and_on_a_command_line() {
        for good in ["a", "vm1", "Web-01_test.x", "7", &"x".repeat(63)] {
            assert_eq!(name(good).as_str(), good);
        }
        for bad in [
            "",
            "-x",
            ".",
            "..",
            ".hidden",
            "_x",
            "a/b",
            "a b",
            "a\n",
            "\u{e4}",
            "a\0",
            &"x".repeat(64),
        ] {
            let error = bad.parse::<Name>().unwrap_err();
            assert!(matches!(error, DirectoryError::BadName { .. }), "{bad:?}");
        }
    }

    #[test]
    fn directory_is_made_for_us_alone() {
        let parent = tempfile::tempdir().unwrap();
        let directory = RuntimeDirectory::at(parent.path().join("d")).unwrap();
        let mode = std::fs::metadata(directory.path()).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o700);
    }

    #[test]
    fn runtime_directory_of_the_session_is_taken_if_it_is_ours() {
        let parent = tempfile::tempdir().unwrap();
        let place = |runtime: Option<OsString>| {
            let surroundings = Surroundings {
                runtime,
                temporary: parent.path().to_owned(),
            };
            let directory = RuntimeDirectory::open_in(&surroundings).unwrap();
            directory
                .path()
                .strip_prefix(parent.path())
                .unwrap()
                .to_owned()
        };
        let user = rustix::process::geteuid().as_raw();
        let fallback = PathBuf::from(format!("trapgate-{user}"));
        let run = parent.path().join("run");
        std::fs::create_dir(&run).unwrap();

        assert_eq!(place(Some(run.into())), Path::new("run/trapgate"));
        assert_eq!(place(None), fallback);
        assert_eq!(place(Some("relative".into())), fallback);
        assert_eq!(place(Some("/nowhere/at/all".into())), fallback);
        assert_eq!(place(Some("".into())), fallback);
    }

    #[test]
    fn directory_that_others_may_enter_or_that_is_a_link_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let open = parent.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = RuntimeDirectory::at(open.clone()).unwrap_err();
        assert!(
            matches!(error, DirectoryError::Open { mode: 0o755, .. }),
            "{error}"
        );

        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o700)).unwrap();
        let link = parent.path().join("link");
        symlink(&open, &link).unwrap();
        let error = RuntimeDirectory::at(link).unwrap_err();
        assert!(matches!(error, DirectoryError::Unusable { .. }), "{error}");

        let file = parent.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = RuntimeDirectory::at(file).unwrap_err();
        assert!(matches!(error, DirectoryError::Unusable { .. }), "{error}");
    }

    #[test]
    fn name_belongs_to_one_machine_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let open = || RuntimeDirectory::at(parent.path().join("d")).unwrap();
        let first = open().claim(name("web")).unwrap();

        let error = open().claim(name("web")).unwrap_err();
        assert!(matches!(error, DirectoryError::Taken { .. }), "{error}");
        assert!(error.fix().contains("trapgate stop web"));

        drop(first);
        assert_eq!(open().claim(name("web")).unwrap().name(), &name("web"));
        assert!(files(open().path()).is_empty());
    }

    #[test]
    fn names_of_nobodys_choice_are_short_and_different_and_reused() {
        let parent = tempfile::tempdir().unwrap();
        let open = || RuntimeDirectory::at(parent.path().join("d")).unwrap();
        let one = open().claim_any().unwrap();
        let two = open().claim_any().unwrap();
        assert_eq!((one.name().as_str(), two.name().as_str()), ("vm1", "vm2"));
        drop(one);
        assert_eq!(open().claim_any().unwrap().name().as_str(), "vm1");
    }

    #[test]
    fn what_a_dead_machine_left_is_removed_and_a_live_one_stays() {
        let parent = tempfile::tempdir().unwrap();
        let open = || RuntimeDirectory::at(parent.path().join("d")).unwrap();
        let alive = open().claim(name("alive")).unwrap();
        let _socket = alive.bind().unwrap();
        leave_behind(open().path(), "dead");

        let found = open().machines().unwrap();

        let alive = Found {
            name: name("alive"),
            pid: Some(std::process::id()),
        };
        assert_eq!(found, [alive]);
        assert_eq!(files(open().path()), ["alive.lock", "alive.sock"]);
    }

    #[test]
    fn name_of_a_dead_machine_can_be_claimed_and_served() {
        let parent = tempfile::tempdir().unwrap();
        let open = || RuntimeDirectory::at(parent.path().join("d")).unwrap();
        leave_behind(open().path(), "x");
        let claim = open().claim(name("x")).unwrap();
        let _socket = claim.bind().unwrap();
        UnixStream::connect(open().socket_path(&name("x"))).unwrap();
    }

    #[test]
    fn path_may_be_longer_than_an_address() {
        let parent = tempfile::tempdir().unwrap();
        let deep = parent.path().join("d".repeat(200));
        let directory = RuntimeDirectory::at(deep).unwrap();
        let claim = directory.claim(name(&"n".repeat(63))).unwrap();
        let _socket = claim.bind().unwrap();
        UnixStream::connect(claim.directory().socket_address(claim.name())).unwrap();
    }

    #[test]
    fn many_claims_at_once_get_names_of_their_own() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("d");
        let threads: Vec<_> = (0..10)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || RuntimeDirectory::at(path).unwrap().claim_any().unwrap())
            })
            .collect();
        let claims: Vec<Claim> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        let mut names: Vec<_> = claims.iter().map(|claim| claim.name().clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 10);
    }

    #[test]
    fn machines_are_listed_as_people_count() {
        let parent = tempfile::tempdir().unwrap();
        let open = || RuntimeDirectory::at(parent.path().join("d")).unwrap();
        let claims: Vec<_> = ["vm10", "vm9", "web"]
            .into_iter()
            .map(|text| open().claim(name(text)).unwrap())
            .collect();
        let _sockets: Vec<_> = claims.iter().map(|claim| claim.bind().unwrap()).collect();
        let names: Vec<_> = open().machines().unwrap();
        let names: Vec<_> = names.iter().map(|found| found.name.as_str()).collect();
        assert_eq!(names, ["vm9", "vm10", "web"]);
    }
}
