//! Serves a machine's API on its socket.
//!
//! One thread does everything that does not wait, and sleeps while nobody asks. What a client can take up is limited:
//!
//! | what | limit |
//! | --- | --- |
//! | connections at once | [`CONNECTIONS`]; further ones wait to be accepted |
//! | requests of a connection | one; it is closed after the answer |
//! | head of a request | 16 KiB, 64 headers, [`PATIENCE`] |
//! | body of a request | [`BODY`] bytes, [`PATIENCE`] |
//! | taking the answer | [`PATIENCE`] |
//! | attached terminals | [`crate::terminal::VIEWERS`] |
//!
//! Who may connect: the directory lets in its owner and root, and so does the server, by the credentials that the kernel gives.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderMap, HeaderValue, UPGRADE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::{Notify, Semaphore, watch};

use crate::control::Control;
use crate::directory::Claim;
use crate::openapi;
use crate::operation::{Action, CONSOLE_PROTOCOL, DOCUMENT_PATH, ENTRIES, Entry, no_terminal};
use crate::problem::{MEDIA_TYPE, Problem, ProblemKind};
use crate::terminal::Viewer;

/// Connections that are served at once.
pub const CONNECTIONS: usize = 64;
/// Bytes of a request's body.
pub const BODY: usize = 64 << 10;
/// How long the head of a request may take to arrive, then its body, and then the client to take the answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a request's head.
const HEAD: usize = 16 << 10;
const HEADERS: usize = 64;
/// Threads for what may wait: one for each connection, so that those that wait for a disk, or for one another (a pause
/// for the snapshot before it), hold up nobody else. They are made when they are needed.
const WAITING_THREADS: usize = CONNECTIONS;
/// How long such a thread stays when there is nothing more to do.
const THREAD_STAYS: Duration = Duration::from_secs(1);
/// How long to wait when the host lacks descriptors for another connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Bytes of keys that are taken from a client at a time.
const KEYS: usize = 4 << 10;

/// What all connections share.
pub(crate) struct Service {
    control: Arc<dyn Control>,
    /// How long each part of a client's turn may take.
    patience: Duration,
    /// Requests that are being answered, and terminals that are attached.
    answering: watch::Sender<usize>,
}

impl Service {
    pub(crate) fn new(control: Arc<dyn Control>, patience: Duration) -> Arc<Self> {
        Arc::new(Self {
            control,
            patience,
            answering: watch::Sender::new(0),
        })
    }
}

/// A request that is being answered, or a terminal that is attached, until this is dropped.
struct Answering(Arc<Service>);

impl Answering {
    fn new(service: &Arc<Service>) -> Self {
        service.answering.send_modify(|count| *count += 1);
        Self(Arc::clone(service))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answering.send_modify(|count| *count -= 1);
    }
}

/// A server and its thread. Dropping it ends both at once; see [`Self::finish`].
#[derive(Debug)]
pub struct Server {
    finish: watch::Sender<Option<Duration>>,
    thread: Option<JoinHandle<()>>,
    claim: Claim,
}

impl Server {
    /// Makes the socket of `claim` and serves `control` on it.
    ///
    /// # Errors
    /// The socket can't be made, or the host gives no thread.
    pub fn start(claim: Claim, control: Arc<dyn Control>) -> Result<Self, ServerError> {
        Self::start_with(claim, Service::new(control, PATIENCE))
    }

    fn start_with(claim: Claim, service: Arc<Service>) -> Result<Self, ServerError> {
        let listener = claim.bind()?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(WAITING_THREADS)
            .thread_keep_alive(THREAD_STAYS)
            .thread_name("api-wait")
            .build()?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(listener)?
        };
        let (finish, finished) = watch::channel(None);
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || {
                runtime.block_on(serve(listener, service, finished));
                // What waits for the host, such as a snapshot, holds nobody up.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            finish,
            thread: Some(thread),
            claim,
        })
    }

    /// The name and directory that it serves.
    pub fn claim(&self) -> &Claim {
        &self.claim
    }

    /// Takes no more requests, closes the guest's terminal, lets everyone have the rest of their answer and of what the guest
    /// wrote if that takes no longer than `limit`, and gives the name back.
    pub fn finish(mut self, limit: Duration) {
        self.end(limit);
    }

    fn end(&mut self, limit: Duration) {
        self.finish.send_replace(Some(limit));
        if let Some(thread) = self.thread.take() {
            // Its panic would be a defect that has been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is no socket.
    #[error(transparent)]
    Directory(#[from] crate::directory::DirectoryError),
    /// The host lacks something.
    #[error("cannot serve the control socket")]
    Host(#[from] io::Error),
}

async fn serve(
    listener: UnixListener,
    service: Arc<Service>,
    mut finish: watch::Receiver<Option<Duration>>,
) {
    let finished = async {
        // Fails if the owner is gone, which does not happen before it has sent.
        let limit = finish.wait_for(Option::is_some).await;
        limit.ok().and_then(|limit| *limit).unwrap_or_default()
    };
    let accept = async {
        accept(&listener, &service).await;
        Duration::ZERO
    };
    let limit = first_of(accept, finished).await;
    // Nobody connects any more.
    drop(listener);
    if let Some(terminal) = service.control.terminal() {
        terminal.close();
    }
    let mut answering = service.answering.subscribe();
    let _ = tokio::time::timeout(limit, answering.wait_for(|count| *count == 0)).await;
}

async fn accept(listener: &UnixListener, service: &Arc<Service>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let ours = rustix::process::geteuid().as_raw();
    loop {
        // Closed never.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let user = stream.peer_cred().map(|peer| peer.uid());
        if !user.is_ok_and(|user| user == ours || user == 0) {
            continue;
        }
        let service = Arc::clone(service);
        tokio::spawn(async move {
            connection(stream, service).await;
            drop(place);
        });
    }
}

/// Serves one connection to its end, or until it becomes a terminal.
pub(crate) async fn connection<S>(stream: S, service: Arc<Service>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answered = Notify::new();
    // From the first request until the connection is done with, so that the answer is out.
    let answering = OnceLock::new();
    let requests = service_fn(|request| async {
        answering.get_or_init(|| Answering::new(&service));
        let response = answer(&service, request).await;
        answered.notify_one();
        Ok::<_, Infallible>(response)
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(service.patience)
        .keep_alive(false)
        .max_buf_size(HEAD)
        .max_headers(HEADERS)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), requests)
        .with_upgrades();
    let late = async {
        answered.notified().await;
        tokio::time::sleep(service.patience).await;
    };
    // An error is the client's; what was not HTTP has been answered, if it could be.
    first_of(async { drop(served.await) }, late).await;
}

type Answer = Response<Full<Bytes>>;

async fn answer(service: &Arc<Service>, request: Request<Incoming>) -> Answer {
    let entry = match find(&request) {
        Ok(entry) => entry,
        Err(answer) => return *answer,
    };
    let result = match entry.action {
        Action::Perform { perform, .. } => {
            let control = Arc::clone(&service.control);
            match body(request.into_body(), service.patience).await {
                Ok(body) => perform(control, body).await,
                Err(problem) => Err(problem),
            }
        }
        Action::Document => Ok(openapi::document().into()),
        Action::Console => match console(service, request) {
            Ok(answer) => return answer,
            Err(problem) => Err(problem),
        },
    };
    match result {
        Ok(body) => whole(StatusCode::OK, "application/json", body),
        Err(problem) => refusal(&problem),
    }
}

/// What is at the path of a request.
fn find(request: &Request<Incoming>) -> Result<&'static Entry, Box<Answer>> {
    let path = request.uri().path();
    let mut there = ENTRIES.iter().filter(|entry| entry.path == path).peekable();
    if there.peek().is_none() {
        // What the client sent is not repeated: it may be anything.
        let problem = Problem::new(ProblemKind::NoSuchPath)
            .fix(format!("see {DOCUMENT_PATH} for what there is"));
        return Err(refusal(&problem).into());
    }
    let allowed: Vec<_> = there.clone().map(|entry| entry.method.name()).collect();
    let allowed = allowed.join(", ");
    there
        .find(|entry| request.method().as_str() == entry.method.name())
        .ok_or_else(|| {
            let problem = Problem::new(ProblemKind::NoSuchMethod).fix(format!("use {allowed}"));
            let mut answer = refusal(&problem);
            if let Ok(value) = HeaderValue::from_str(&allowed) {
                answer.headers_mut().insert(ALLOW, value);
            }
            answer.into()
        })
}

/// Takes the body of a request.
async fn body(body: Incoming, patience: Duration) -> Result<Vec<u8>, Problem> {
    let too_large =
        || Problem::new(ProblemKind::TooLarge).cause(format!("a body has at most {BODY} bytes"));
    if body.size_hint().lower() > BODY as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(patience, Limited::new(body, BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes().into()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Problem::new(ProblemKind::Malformed).cause(error)),
        Err(_) => Err(Problem::new(ProblemKind::TooSlow).cause(format!(
            "its body was not complete after {} seconds",
            patience.as_secs_f32()
        ))),
    }
}

fn whole(status: StatusCode, media_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    answer
}

fn refusal(problem: &Problem) -> Answer {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    // A structure of strings always is JSON.
    let body = serde_json::to_vec(problem).unwrap_or_default();
    whole(status, MEDIA_TYPE, body)
}

/// Makes the connection a terminal.
fn console(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Problem> {
    if !wants(request.headers(), CONSOLE_PROTOCOL) {
        return Err(Problem::new(ProblemKind::UpgradeRequired)
            .fix(format!("send `Connection: Upgrade` and `Upgrade: {CONSOLE_PROTOCOL}`, or use `trapgate console`")));
    }
    let terminal = service.control.terminal().ok_or_else(no_terminal)?;
    let viewer = terminal.attach()?;
    let answering = Answering::new(service);
    tokio::spawn(async move {
        let patience = answering.0.patience;
        // Fails if the client has gone.
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            attached(TokioIo::new(upgraded), &viewer, patience).await;
        }
    });
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(CONSOLE_PROTOCOL));
    Ok(answer)
}

fn wants(headers: &HeaderMap, protocol: &str) -> bool {
    let says = |name, word: &str| {
        headers.get_all(name).iter().any(|value| {
            value.to_str().is_ok_and(|text| {
                text.split(',')
                    .any(|part| part.trim().eq_ignore_ascii_case(word))
            })
        })
    };
    says(CONNECTION, "upgrade") && says(UPGRADE, protocol)
}

/// Carries bytes both ways until the guest is gone or the client is.
async fn attached(stream: impl AsyncRead + AsyncWrite, viewer: &Viewer, patience: Duration) {
    let (mut from, mut to) = tokio::io::split(stream);
    let output = async {
        while let Some(bytes) = viewer.read().await {
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        // The guest's last words are to arrive; a client that does not take them has had its time.
        let _ = tokio::time::timeout(patience, to.shutdown()).await;
    };
    let input = async {
        let mut keys = vec![0; KEYS];
        while let Ok(count @ 1..) = from.read(&mut keys).await {
            if !viewer.write(&keys[..count]).await {
                // What the guest wrote last is still on its way.
                return std::future::pending().await;
            }
        }
    };
    first_of(output, input).await;
}

/// Waits for the first of two, and drops the other. (`tokio::select!` costs a compiler of macros.)
async fn first_of<T>(one: impl Future<Output = T>, other: impl Future<Output = T>) -> T {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| match one.as_mut().poll(context) {
        Poll::Ready(result) => Poll::Ready(result),
        Poll::Pending => other.as_mut().poll(context),
    })
    .await
}

#[cfg(test)]
mod tests;
