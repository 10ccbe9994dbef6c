//! The control socket of a machine that we run.

use std::sync::Arc;
use std::time::Duration;

use trapgate_api::directory::{Claim, DirectoryError, Name, RuntimeDirectory};
use trapgate_api::server::Server;
use trapgate_api::terminal::Terminal;
use trapgate_vmm::{Identity, Machine, RemoteControl};

use crate::failure::Failure;
use crate::{status, terminal};

/// How long the end of a run waits for answers that are on their way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// A name of ours, on which nothing is served yet.
///
/// Where nobody asked for a name or a socket, a host that has no place for one does not keep a machine from running.
///
/// # Errors
/// The name is taken, or there is no place for a socket and one is needed.
pub(crate) fn claim(
    name: Option<&Name>,
    needed: bool,
    quiet: bool,
) -> Result<Option<Claim>, Failure> {
    let claimed = RuntimeDirectory::open().and_then(|directory| match name {
        Some(name) => directory.claim(name.clone()),
        None => directory.claim_any(),
    });
    match claimed {
        Ok(claim) => Ok(Some(claim)),
        Err(error) if needed || name.is_some() => Err(Failure::directory(&error)),
        Err(error) => {
            if !quiet {
                terminal::say(&format!(
                    "trapgate: there is no control socket, so `trapgate ps` won't show this machine: {error}"
                ));
            }
            Ok(None)
        }
    }
}

/// A machine's name, and what is served under it.
pub(crate) struct Socket {
    claim: Option<Claim>,
    remote: Arc<RemoteControl>,
    terminal: Option<Terminal>,
    server: Option<Server>,
}

impl Socket {
    /// Under this name, if there is one. `has_terminal` says whether clients may attach.
    pub(crate) fn new(claim: Option<Claim>, identity: Identity, has_terminal: bool) -> Self {
        let terminal = (has_terminal && claim.is_some()).then(Terminal::default);
        Self {
            claim,
            remote: Arc::new(RemoteControl::new(identity, terminal.clone())),
            terminal,
            server: None,
        }
    }

    /// Where the guest's output is to go, for those who attach.
    pub(crate) fn terminal(&self) -> Option<Terminal> {
        self.terminal.clone()
    }

    /// The name and its directory.
    pub(crate) fn claim(&self) -> Option<&Claim> {
        self.claim
            .as_ref()
            .or_else(|| self.server.as_ref().map(Server::claim))
    }

    /// From now on this machine is controlled; with the first, it is served.
    ///
    /// # Errors
    /// There is no socket.
    pub(crate) fn connect(&mut self, machine: &Arc<Machine>) -> Result<(), Failure> {
        self.remote.connect(machine);
        if let Some(claim) = self.claim.take() {
            let control = Arc::clone(&self.remote);
            let server = Server::start(claim, control).map_err(|error| Failure::server(&error))?;
            self.server = Some(server);
        }
        Ok(())
    }

    /// The machine is gone, and perhaps another comes.
    pub(crate) fn disconnect(&self) {
        self.remote.disconnect();
    }

    /// The guest is gone for good. Whoever waits for that gets an answer.
    pub(crate) fn end(&mut self) {
        self.remote.end();
        if let Some(server) = self.server.take() {
            server.finish(LAST_ANSWERS);
        }
    }
}

impl Failure {
    /// There is no place for a control socket, or no such name.
    pub(crate) fn directory(error: &DirectoryError) -> Self {
        let (status, message) = match error {
            DirectoryError::BadName { .. } | DirectoryError::Taken { .. } => {
                (status::USAGE, "the machine cannot have this name")
            }
            _ => (status::HOST, "there is no place for control sockets"),
        };
        Self::new(status, message).chain(error).fix(error.fix())
    }

    fn server(error: &trapgate_api::server::ServerError) -> Self {
        use trapgate_api::server::ServerError;
        match error {
            ServerError::Directory(error) => Self::directory(error),
            ServerError::Host(_) => {
                Self::new(status::HOST, "the machine cannot be controlled").chain(error)
            }
        }
    }
}
