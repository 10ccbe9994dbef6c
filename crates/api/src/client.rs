//! Asks a running machine.

use std::io::{self, Read};
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::directory::{Name, RuntimeDirectory};
use crate::operation::{CONSOLE_PATH, CONSOLE_PROTOCOL, Method, Operation};
use crate::problem::Problem;

/// Longest answer that is taken.
const ANSWER: usize = 16 << 20;
/// How long a machine may take to accept a connection.
const CONNECT_TIME: Duration = Duration::from_secs(5);

/// Why there is no answer, or none that helps. [`Self::fix`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no such machine.
    #[error("there is no running machine called `{name}`")]
    NoSuchMachine {
        /// Its name.
        name: Name,
    },
    /// The machine was there and does not answer.
    #[error("the machine `{name}` does not answer")]
    Slow {
        /// Its name.
        name: Name,
    },
    /// The machine ended before it answered.
    #[error("the machine `{name}` ended before it answered")]
    Ended {
        /// Its name.
        name: Name,
    },
    /// The machine says why not.
    #[error(transparent)]
    Refused(#[from] Problem),
    /// The answer is none of this API.
    #[error("cannot understand the answer of the machine `{name}`: {reason}")]
    Nonsense {
        /// Its name.
        name: Name,
        /// What is wrong with it.
        reason: String,
    },
    /// The socket can't be used.
    #[error("cannot talk to the machine `{name}`")]
    Host {
        /// Its name.
        name: Name,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl ClientError {
    /// What to do about it, as a sentence for a person, where there is something to do.
    pub fn fix(&self) -> Option<String> {
        match self {
            Self::NoSuchMachine { .. } => Some("`trapgate ps` lists those that run".to_owned()),
            Self::Slow { name } => Some(format!(
                "look whether its process was stopped (`trapgate ps`); if all else fails, kill it: `trapgate ps` names the process of `{name}`"
            )),
            Self::Ended { .. } => None,
            Self::Refused(problem) => problem.fix.clone(),
            Self::Nonsense { .. } => {
                Some("use the version of trapgate that the machine was started with".to_owned())
            }
            Self::Host { .. } => Some("check that you are the user who started it".to_owned()),
        }
    }
}

/// Whoever asks one machine. Each question is a connection of its own.
#[derive(Debug)]
pub struct Client {
    runtime: tokio::runtime::Runtime,
    name: Name,
    socket: PathBuf,
    /// `socket` leads through its descriptor.
    _directory: RuntimeDirectory,
}

impl Client {
    /// To the machine of this name; nothing is asked yet.
    ///
    /// # Errors
    /// The host lacks something.
    pub fn new(directory: RuntimeDirectory, name: Name) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|source| ClientError::Host {
                name: name.clone(),
                source,
            })?;
        Ok(Self {
            runtime,
            socket: directory.socket_address(&name),
            name,
            _directory: directory,
        })
    }

    /// The machine's name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Asks, and waits for the answer, at most for `limit` if there is one.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn call<O: Operation>(
        &self,
        request: &O::Request,
        limit: Option<Duration>,
    ) -> Result<O::Answer, ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| self.nonsense(error))?;
        let body = if O::METHOD == Method::Get {
            Vec::new()
        } else {
            body
        };
        let request = Request::builder()
            .method(O::METHOD.name())
            .uri(O::PATH)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.nonsense(error))?;
        self.run(limit, async {
            let response = self.send(request).await?;
            let (status, body) = self.read(response).await?;
            self.judge(status, &body)?;
            serde_json::from_slice(&body).map_err(|error| self.nonsense(error))
        })
    }

    /// Attaches to the guest's terminal.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn attach(&self) -> Result<Attached, ClientError> {
        let request = Request::builder()
            .method(Method::Get.name())
            .uri(CONSOLE_PATH)
            .header(HOST, "localhost")
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, CONSOLE_PROTOCOL)
            .body(Full::default())
            .map_err(|error| self.nonsense(error))?;
        self.run(Some(CONNECT_TIME), async {
            let response = self.send(request).await?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let (status, body) = self.read(response).await?;
                self.judge(status, &body)?;
                return Err(self.nonsense("it does not make the connection a terminal"));
            }
            let upgraded = hyper::upgrade::on(response)
                .await
                .map_err(|error| self.http(&error))?;
            let Ok(parts) = upgraded.downcast::<TokioIo<UnixStream>>() else {
                return Err(self.nonsense("the connection was exchanged"));
            };
            let stream = parts.io.into_inner().into_std();
            let stream = stream.and_then(|stream| {
                stream.set_nonblocking(false)?;
                Ok(stream)
            });
            Ok(Attached {
                first: parts.read_buf,
                stream: stream.map_err(|source| self.host(source))?,
            })
        })
    }

    fn run<T>(
        &self,
        limit: Option<Duration>,
        work: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        self.runtime.block_on(async {
            match limit {
                None => work.await,
                Some(limit) => tokio::time::timeout(limit, work)
                    .await
                    .unwrap_or_else(|_| Err(self.slow())),
            }
        })
    }

    /// Sends a request on a new connection, and waits for the head of the answer.
    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        let connect = tokio::time::timeout(CONNECT_TIME, UnixStream::connect(&self.socket));
        let stream = match connect.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.no_connection(error)),
            Err(_) => return Err(self.slow()),
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.http(&error))?;
        // Ends with the connection; what is wrong with that the request hears too.
        tokio::spawn(connection.with_upgrades());
        sender
            .send_request(request)
            .await
            .map_err(|error| self.http(&error))
    }

    async fn read(&self, response: Response<Incoming>) -> Result<(StatusCode, Bytes), ClientError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER).collect().await;
        match body {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) if error.is::<hyper::Error>() => Err(ClientError::Ended {
                name: self.name.clone(),
            }),
            Err(error) => Err(self.nonsense(error)),
        }
    }

    /// Whether an answer is one of success.
    fn judge(&self, status: StatusCode, body: &[u8]) -> Result<(), ClientError> {
        if status.is_success() {
            return Ok(());
        }
        match serde_json::from_slice::<Problem>(body) {
            Ok(problem) => Err(problem.into()),
            Err(_) => Err(self.nonsense(format!("it has the status {status}"))),
        }
    }

    fn no_connection(&self, source: io::Error) -> ClientError {
        match source.kind() {
            // Without a file, or left by a machine that is no more.
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoSuchMachine {
                    name: self.name.clone(),
                }
            }
            // Linux says so of a Unix socket whose queue is full.
            io::ErrorKind::WouldBlock => self.slow(),
            _ => self.host(source),
        }
    }

    fn http(&self, error: &hyper::Error) -> ClientError {
        if error.is_parse() {
            return self.nonsense(error);
        }
        // The connection was closed.
        ClientError::Ended {
            name: self.name.clone(),
        }
    }

    fn slow(&self) -> ClientError {
        ClientError::Slow {
            name: self.name.clone(),
        }
    }

    fn host(&self, source: io::Error) -> ClientError {
        ClientError::Host {
            name: self.name.clone(),
            source,
        }
    }

    fn nonsense(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::Nonsense {
            name: self.name.clone(),
            reason: reason.to_string(),
        }
    }
}

/// A connection that carries a terminal's bytes.
#[derive(Debug)]
pub struct Attached {
    /// What came with the answer.
    first: Bytes,
    stream: StdStream,
}

impl Attached {
    /// The two directions: what the guest writes, and what is typed. The first ends when the guest is gone.
    ///
    /// # Errors
    /// The host lacks descriptors.
    pub fn split(self) -> io::Result<(impl Read + Send + 'static, StdStream)> {
        let keys = self.stream.try_clone()?;
        Ok((io::Cursor::new(self.first).chain(self.stream), keys))
    }
}
