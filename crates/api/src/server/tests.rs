//! Clients of every kind, on a real socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use serde_json::Value;

use super::*;
use crate::client::{Client, ClientError};
use crate::data::{Nothing, SnapshotRequest, State, StopRequest, TerminalSize};
use crate::directory::{Name, RuntimeDirectory};
use crate::fake::{FakeMachine, OnButton};
use crate::lock;
use crate::operation::{
    GetCounters, GetInfo, Pause, PressPowerButton, ResizeTerminal, Resume, Snapshot, Stop,
};
use crate::terminal::VIEWERS;

/// Short, for tests that wait until it is over.
const IMPATIENT: Duration = Duration::from_millis(200);
/// For what must not take for ever; a slow machine does not come near it.
const LONG: Duration = Duration::from_secs(60);

struct Served {
    machine: Arc<FakeMachine>,
    service: Arc<Service>,
    server: Server,
    path: PathBuf,
    _parent: tempfile::TempDir,
}

impl Served {
    fn with(machine: Arc<FakeMachine>, patience: Duration) -> Self {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("d");
        let directory = RuntimeDirectory::at(path.clone()).unwrap();
        let claim = directory.claim("fake".parse().unwrap()).unwrap();
        let service = Service::new(machine.clone(), patience);
        Self {
            machine,
            service: Arc::clone(&service),
            server: Server::start_with(claim, service).unwrap(),
            path,
            _parent: parent,
        }
    }

    fn new() -> Self {
        Self::with(FakeMachine::new(OnButton::PowerOff), PATIENCE)
    }

    fn client(&self) -> Client {
        let directory = RuntimeDirectory::at(self.path.clone()).unwrap();
        Client::new(directory, "fake".parse::<Name>().unwrap()).unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path.join("fake.sock")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Sends bytes; gives the status line's number and all that followed it.
    fn raw(&self, bytes: &[u8]) -> (u16, String) {
        let mut stream = self.connect();
        // The server may answer and close before it has taken everything.
        let _ = stream.write_all(bytes);
        received(&mut stream)
    }

    fn is_well(&self) {
        let info = self
            .client()
            .call::<GetInfo>(&Nothing {}, Some(LONG))
            .unwrap();
        assert_eq!(info.name, "fake");
    }
}

/// Everything until the connection is closed.
fn received(stream: &mut UnixStream) -> (u16, String) {
    let mut bytes = Vec::new();
    // A connection that is closed with something unread ends with an error, after what was answered.
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        bytes.extend(&buffer[..count]);
    }
    let text = String::from_utf8(bytes).unwrap();
    let status = text
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    (status.unwrap_or(0), text)
}

fn problem_type(answer: &str) -> String {
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    assert!(answer.contains(MEDIA_TYPE), "{answer}");
    let problem: Value = serde_json::from_str(body).unwrap();
    problem["type"]
        .as_str()
        .unwrap()
        .rsplit(':')
        .next()
        .unwrap()
        .to_owned()
}

#[test]
fn client_and_server_speak_of_the_same_operations() {
    let served = Served::new();
    let client = served.client();
    assert_eq!(
        client.call::<GetInfo>(&Nothing {}, None).unwrap(),
        served.machine.info()
    );
    let counters = client.call::<GetCounters>(&Nothing {}, None).unwrap();
    assert_eq!(counters.get("asked").unwrap().cpus.len(), 2);

    let paused = client.call::<Pause>(&Nothing {}, None).unwrap();
    assert_eq!((paused.state, paused.changed), (State::Paused, true));
    let again = client.call::<Pause>(&Nothing {}, None).unwrap();
    assert_eq!((again.state, again.changed), (State::Paused, false));
    let resumed = client.call::<Resume>(&Nothing {}, None).unwrap();
    assert_eq!((resumed.state, resumed.changed), (State::Running, true));

    let request = SnapshotRequest {
        directory: "/somewhere".to_owned(),
    };
    let saved = client.call::<Snapshot>(&request, None).unwrap();
    assert_eq!(saved.directory, "/somewhere");
}

#[test]
fn ten_clients_at_once_are_all_answered() {
    let served = Served::new();
    let threads: Vec<_> = (0..10)
        .map(|_| {
            let client = served.client();
            thread::spawn(move || {
                for _ in 0..20 {
                    client.call::<GetCounters>(&Nothing {}, Some(LONG)).unwrap();
                }
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    let counters = served.machine.counters().unwrap();
    assert_eq!(counters.get("asked").unwrap().value, 200);
}

/// Given a snapshot that waits for a disk, and pauses that wait for it, when others ask what needs no waiting, then they
/// are answered meanwhile, and those that waited are afterwards.
#[test]
fn snapshot_that_takes_long_holds_up_nobody_but_those_who_must_wait_for_it() {
    let served = Served::new();
    let disk = lock(&served.machine.busy);
    let waiting: Vec<_> = (0..10)
        .map(|number| {
            let client = served.client();
            thread::spawn(move || {
                if number == 0 {
                    let request = SnapshotRequest {
                        directory: "/somewhere".to_owned(),
                    };
                    client.call::<Snapshot>(&request, Some(LONG)).map(drop)
                } else {
                    client.call::<Pause>(&Nothing {}, Some(LONG)).map(drop)
                }
            })
        })
        .collect();
    let mut answering = served.service.answering.subscribe();
    while *answering.borrow_and_update() < waiting.len() {
        thread::sleep(Duration::from_millis(5));
    }

    let client = served.client();
    for _ in 0..20 {
        client.call::<GetCounters>(&Nothing {}, Some(LONG)).unwrap();
        client.call::<GetInfo>(&Nothing {}, Some(LONG)).unwrap();
    }

    assert!(waiting.iter().all(|client| !client.is_finished()));
    drop(disk);
    for client in waiting {
        client.join().unwrap().unwrap();
    }
    assert_eq!(lock(&served.machine.story).len(), 9);
}

#[test]
fn what_is_not_http_is_refused_and_the_next_client_served() {
    let served = Served::new();
    let garbage: Vec<u8> = (0..=255).cycle().take(5000).collect();
    for (bytes, expected) in [
        (&b"hello\r\n\r\n"[..], 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /v1/vm HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"GET /v1/vm HTTP/9.9\r\n\r\n", 400),
        (
            b"POST /v1/vm/pause HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            400,
        ),
        (
            b"POST /v1/vm/pause HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
        ),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (&garbage, 400),
    ] {
        let (status, answer) = served.raw(bytes);
        // HTTP/2's preface is understood as what it is, and not answered.
        assert!(
            status == expected || answer.is_empty(),
            "{bytes:?}: {answer}"
        );
        served.is_well();
    }
    assert!(lock(&served.machine.story).is_empty());
}

#[test]
fn request_that_is_cut_off_does_nothing() {
    let served = Served::new();
    let request = b"POST /v1/vm/stop HTTP/1.1\r\nContent-Length: 20\r\n\r\n{\"grace_seconds\":0}\n";
    for cut in 0..request.len() {
        let mut stream = served.connect();
        stream.write_all(&request[..cut]).unwrap();
        drop(stream);
    }
    served.is_well();
    assert!(lock(&served.machine.story).is_empty());
}

#[test]
fn oversized_heads_and_bodies_are_refused_by_their_kind() {
    let served = Served::new();
    let long = "x".repeat(2 * HEAD);
    let (status, _) = served.raw(format!("GET /{long} HTTP/1.1\r\n\r\n").as_bytes());
    assert!(status == 414 || status == 431, "{status}");
    let (status, _) = served.raw(format!("GET /v1/vm HTTP/1.1\r\nX: {long}\r\n\r\n").as_bytes());
    assert_eq!(status, 431);
    let many = "X: y\r\n".repeat(HEADERS + 1);
    let (status, _) = served.raw(format!("GET /v1/vm HTTP/1.1\r\n{many}\r\n").as_bytes());
    assert_eq!(status, 431);

    let announced = format!(
        "POST /v1/vm/stop HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        u64::MAX / 2
    );
    let (status, answer) = served.raw(announced.as_bytes());
    assert_eq!((status, problem_type(&answer).as_str()), (413, "too-large"));

    let mut chunked = b"POST /v1/vm/stop HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..20 {
        chunked.extend(b"2000\r\n");
        chunked.extend([b' '; 0x2000]);
        chunked.extend(b"\r\n");
    }
    let (status, answer) = served.raw(&chunked);
    assert_eq!((status, problem_type(&answer).as_str()), (413, "too-large"));
    served.is_well();
    assert!(lock(&served.machine.story).is_empty());
}

#[test]
fn wrong_paths_methods_and_bodies_are_problems_with_a_fix() {
    let served = Served::new();
    for (request, status, kind) in [
        ("GET / HTTP/1.1\r\n\r\n", 404, "no-such-path"),
        ("GET /v1/vm/ HTTP/1.1\r\n\r\n", 404, "no-such-path"),
        ("DELETE /v1/vm HTTP/1.1\r\n\r\n", 405, "no-such-method"),
        ("GET /v1/vm/stop HTTP/1.1\r\n\r\n", 405, "no-such-method"),
        (
            "POST /v1/vm/stop HTTP/1.1\r\nContent-Length: 1\r\n\r\n{",
            400,
            "malformed",
        ),
        (
            "POST /v1/vm/stop HTTP/1.1\r\nContent-Length: 20\r\n\r\n{\"grace_seconds\":-1}",
            400,
            "malformed",
        ),
        (
            "POST /v1/vm/stop HTTP/1.1\r\nContent-Length: 22\r\n\r\n{\"grace_seconds\":1e99}",
            400,
            "malformed",
        ),
        (
            "POST /v1/vm/pause HTTP/1.1\r\nContent-Length: 9\r\n\r\n{\"now\":1}",
            400,
            "malformed",
        ),
        (
            "POST /v1/vm/snapshot HTTP/1.1\r\nContent-Length: 17\r\n\r\n{\"directory\":\"x\"}",
            400,
            "malformed",
        ),
        (
            "GET /v1/vm/console HTTP/1.1\r\n\r\n",
            426,
            "upgrade-required",
        ),
        (
            "GET /v1/vm/console HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            426,
            "upgrade-required",
        ),
    ] {
        let (found, answer) = served.raw(request.as_bytes());
        assert_eq!(
            (found, problem_type(&answer).as_str()),
            (status, kind),
            "{request}"
        );
        assert!(answer.contains("\"fix\":"), "{request}: {answer}");
    }
    assert!(lock(&served.machine.story).is_empty());
}

#[test]
fn connection_is_closed_after_one_answer() {
    let served = Served::new();
    let two = "POST /v1/vm/pause HTTP/1.1\r\n\r\n".repeat(2);
    let (status, answer) = served.raw(two.as_bytes());
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    assert_eq!(lock(&served.machine.story).len(), 1);
}

#[test]
fn document_is_served() {
    let served = Served::new();
    let (status, answer) = served.raw(b"GET /v1/openapi.json HTTP/1.0\r\n\r\n");
    assert_eq!(status, 200);
    assert!(answer.ends_with(openapi::document()));
}

#[test]
fn half_sent_requests_are_given_up() {
    let served = Served::with(FakeMachine::new(OnButton::PowerOff), IMPATIENT);
    for head in [
        "",
        "G",
        "GET /v1/vm HTTP/1.1\r\n",
        "GET /v1/vm HTTP/1.1\r\nHost: x",
    ] {
        // Nothing is answered to what is not a request yet.
        let (_, answer) = served.raw(head.as_bytes());
        assert!(!answer.contains("200"), "{answer}");
    }
    let (status, answer) =
        served.raw(b"POST /v1/vm/stop HTTP/1.1\r\nContent-Length: 20\r\n\r\n{\"grace");
    assert_eq!((status, problem_type(&answer).as_str()), (408, "too-slow"));
    served.is_well();
    assert!(lock(&served.machine.story).is_empty());
}

#[test]
fn clients_that_send_nothing_hold_the_others_up_for_a_while_at_most() {
    let served = Served::with(FakeMachine::new(OnButton::PowerOff), IMPATIENT);
    let idle: Vec<_> = (0..CONNECTIONS).map(|_| served.connect()).collect();
    served.is_well();
    drop(idle);
}

#[test]
fn client_that_does_not_take_its_answer_is_given_up() {
    // Given a client that sends a request and never reads, through a pipe that holds less than the answer
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let service = Service::new(FakeMachine::new(OnButton::PowerOff), IMPATIENT);
    runtime.block_on(async {
        let (mut client, server) = tokio::io::duplex(64);
        let connection = tokio::spawn(connection(server, service));
        client
            .write_all(b"GET /v1/openapi.json HTTP/1.1\r\n\r\n")
            .await
            .unwrap();
        tokio::time::timeout(LONG, connection)
            .await
            .unwrap()
            .unwrap();
    });
}

#[test]
fn stop_asks_first_and_forces_only_a_guest_that_does_not_obey() {
    let served = Served::new();
    let stop = |served: &Served, grace_seconds| {
        let request = StopRequest { grace_seconds };
        served
            .client()
            .call::<Stop>(&request, Some(LONG))
            .unwrap()
            .forced
    };
    assert!(!stop(&served, 3600.0));
    assert_eq!(*lock(&served.machine.story), ["button"]);
    // One that has ended has stopped.
    assert!(!stop(&served, 3600.0));

    let served = Served::with(FakeMachine::new(OnButton::Ignore), PATIENCE);
    assert!(stop(&served, 0.02));
    assert_eq!(*lock(&served.machine.story), ["button", "running", "cord"]);

    let served = Served::with(FakeMachine::new(OnButton::Ignore), PATIENCE);
    assert!(stop(&served, 0.0));
    assert_eq!(*lock(&served.machine.story), ["cord"]);
}

#[test]
fn paused_machine_is_resumed_to_be_stopped_but_its_button_does_not_press() {
    let served = Served::with(FakeMachine::new(OnButton::Ignore), PATIENCE);
    let client = served.client();
    client.call::<Pause>(&Nothing {}, None).unwrap();
    let refused = client
        .call::<PressPowerButton>(&Nothing {}, None)
        .unwrap_err();
    assert!(
        matches!(&refused, ClientError::Refused(problem) if problem.kind == ProblemKind::Paused),
        "{refused}"
    );
    let request = StopRequest {
        grace_seconds: 0.02,
    };
    assert!(client.call::<Stop>(&request, None).unwrap().forced);
    assert_eq!(
        *lock(&served.machine.story),
        ["paused", "button", "running", "cord"]
    );
}

#[test]
fn ended_machine_says_so() {
    let served = Served::new();
    served.machine.stop();
    let client = served.client();
    let refused = client.call::<Pause>(&Nothing {}, None).unwrap_err();
    assert!(
        matches!(&refused, ClientError::Refused(problem) if problem.kind == ProblemKind::Ended),
        "{refused}"
    );
    assert_eq!(
        client.call::<GetInfo>(&Nothing {}, None).unwrap().state,
        State::Ended
    );
    assert!(client.attach().is_err());
}

#[test]
fn client_that_leaves_a_stop_leaves_the_guest_its_will() {
    let served = Served::with(FakeMachine::new(OnButton::Ignore), PATIENCE);
    let request = StopRequest { grace_seconds: 0.3 };
    let left = served
        .client()
        .call::<Stop>(&request, Some(Duration::from_millis(100)));
    assert!(matches!(left, Err(ClientError::Slow { .. })));
    thread::sleep(Duration::from_millis(600));
    assert_eq!(served.machine.states.get(), State::Running);
}

#[test]
fn defect_of_ours_is_an_answer_and_the_server_goes_on() {
    let served = Served::new();
    let request = SnapshotRequest {
        directory: "/panic".to_owned(),
    };
    let refused = served
        .client()
        .call::<Snapshot>(&request, None)
        .unwrap_err();
    assert!(
        matches!(&refused, ClientError::Refused(problem) if problem.kind == ProblemKind::Defect),
        "{refused}"
    );
    served.is_well();
}

#[test]
fn terminal_carries_bytes_both_ways_until_the_guest_is_gone() {
    let served = Served::new();
    let terminal = served.machine.terminal.clone().unwrap();
    terminal.push(b"before ");
    let (mut output, mut keys) = served.client().attach().unwrap().split().unwrap();
    keys.write_all(b"typed ").unwrap();
    let mut seen = [0; 13];
    output.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"before typed ");

    let size = TerminalSize {
        columns: 100,
        rows: 30,
    };
    served.client().call::<ResizeTerminal>(&size, None).unwrap();
    terminal.push(b" last");
    served.machine.stop();

    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "<100x30> last");
}

#[test]
fn several_look_at_one_terminal_and_those_who_leave_make_room() {
    let served = Served::new();
    let attached: Vec<_> = (0..VIEWERS)
        .map(|_| served.client().attach().unwrap().split().unwrap())
        .collect();
    let refused = served.client().attach().unwrap_err();
    assert!(
        matches!(&refused, ClientError::Refused(problem) if problem.kind == ProblemKind::Busy),
        "{refused}"
    );
    let terminal = served.machine.terminal.clone().unwrap();
    terminal.push(b"all");
    for (mut output, _keys) in attached {
        let mut seen = [0; 3];
        output.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"all");
    }
    // The server notices as soon as it looks.
    let deadline = std::time::Instant::now() + LONG;
    while served.client().attach().is_err() {
        assert!(std::time::Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn finish_lets_the_last_answer_out_and_gives_the_name_back() {
    let served = Served::with(FakeMachine::new(OnButton::Ignore), PATIENCE);
    // Given a stop that waits for the guest
    let client = served.client();
    let (done, stopped) = mpsc::channel();
    let stopping = thread::spawn(move || {
        let request = StopRequest {
            grace_seconds: 60.0,
        };
        done.send(client.call::<Stop>(&request, None)).unwrap();
    });
    while lock(&served.machine.story).len() < 2 {
        thread::sleep(Duration::from_millis(5));
    }
    served.machine.states.set(State::Ended);

    served.server.finish(LONG);

    assert!(!stopped.recv().unwrap().unwrap().forced);
    stopping.join().unwrap();
    let left: Vec<_> = std::fs::read_dir(&served.path).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(UnixStream::connect(served.path.join("fake.sock")).is_err());
}

#[test]
fn finish_does_not_wait_for_those_who_ask_nothing_nor_for_ever() {
    let served = Served::with(FakeMachine::new(OnButton::Ignore), LONG);
    let idle = served.connect();
    served.server.finish(LONG * 60);
    drop(idle);

    // Someone who does not read what the guest wrote
    let served = Served::with(FakeMachine::new(OnButton::Ignore), LONG);
    let (_output, _keys) = served.client().attach().unwrap().split().unwrap();
    let terminal = served.machine.terminal.clone().unwrap();
    terminal.push(&vec![b'x'; 4 << 20]);
    served.server.finish(IMPATIENT);
}

#[test]
fn last_words_of_the_guest_arrive_although_the_machine_ends_at_once() {
    for _ in 0..20 {
        let served = Served::new();
        let (mut output, _keys) = served.client().attach().unwrap().split().unwrap();
        let reader = thread::spawn(move || {
            let mut seen = String::new();
            output.read_to_string(&mut seen).map(|_| seen)
        });
        served.machine.terminal.as_ref().unwrap().push(b"goodbye");
        served.server.finish(LONG);
        assert_eq!(reader.join().unwrap().unwrap(), "goodbye");
    }
}

#[test]
fn machine_that_is_not_there_or_dies_is_told_from_one_that_refuses() {
    let parent = tempfile::tempdir().unwrap();
    let open = || RuntimeDirectory::at(parent.path().join("d")).unwrap();
    let name: Name = "gone".parse().unwrap();
    let client = Client::new(open(), name.clone()).unwrap();
    let ask = |client: &Client| {
        client
            .call::<GetInfo>(&Nothing {}, Some(IMPATIENT))
            .unwrap_err()
    };
    assert!(matches!(ask(&client), ClientError::NoSuchMachine { .. }));

    // Left by a machine that is no more
    let claim = open().claim(name).unwrap();
    let listener = claim.bind().unwrap();
    assert!(matches!(ask(&client), ClientError::Slow { .. }));
    let dying = thread::spawn(move || {
        // The first has given up.
        drop(listener.accept().unwrap());
        drop(listener.accept().unwrap());
        drop(listener);
    });
    assert!(matches!(ask(&client), ClientError::Ended { .. }));
    dying.join().unwrap();
    assert!(matches!(ask(&client), ClientError::NoSuchMachine { .. }));
}
