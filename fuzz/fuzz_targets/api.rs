//! A client of the control socket that sends anything, in any pieces: the server closes the connection, and says nothing
//! but well-formed answers.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use trapgate_api::fuzzing::converse;

#[derive(Arbitrary, Debug)]
enum Input {
    /// Bytes as they come.
    Raw(Vec<Vec<u8>>),
    /// Something like requests.
    Requests(Vec<Request>, Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Request {
    method: Method,
    path: Path,
    headers: Vec<Header>,
    body: Body,
    /// Where it is cut in two.
    cut: u16,
}

#[derive(Arbitrary, Debug)]
enum Method {
    Get,
    Put,
    Post,
    Other(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Path {
    Known(u8),
    Other(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Header {
    Upgrade,
    ConnectionUpgrade,
    KeepAlive,
    Continue,
    Length(u64),
    Chunked,
    Many(u8),
    Long(u16),
    Other(Vec<u8>, Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Body {
    None,
    Grace(f64),
    Directory(String),
    Size(i32, i32),
    Chunks(Vec<Vec<u8>>),
    Long(u32),
    Other(Vec<u8>),
}

const PATHS: [&str; 10] = [
    "/v1/vm",
    "/v1/vm/counters",
    "/v1/vm/pause",
    "/v1/vm/resume",
    "/v1/vm/power-button",
    "/v1/vm/stop",
    "/v1/vm/snapshot",
    "/v1/vm/console",
    "/v1/vm/console/size",
    "/v1/openapi.json",
];

impl Request {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = match &self.method {
            Method::Get => b"GET".to_vec(),
            Method::Put => b"PUT".to_vec(),
            Method::Post => b"POST".to_vec(),
            Method::Other(name) => name.clone(),
        };
        bytes.push(b' ');
        match &self.path {
            Path::Known(index) => bytes.extend(PATHS[usize::from(*index) % PATHS.len()].bytes()),
            Path::Other(path) => bytes.extend(path),
        }
        bytes.extend(b" HTTP/1.1\r\n");
        let body = self.body.bytes();
        let says_length = |header: &Header| matches!(header, Header::Length(_) | Header::Chunked);
        if matches!(self.body, Body::Chunks(_)) {
            bytes.extend(b"Transfer-Encoding: chunked\r\n");
        } else if !body.is_empty() && !self.headers.iter().any(says_length) {
            bytes.extend(format!("Content-Length: {}\r\n", body.len()).bytes());
        }
        for header in &self.headers {
            match header {
                Header::Upgrade => bytes.extend(b"Upgrade: trapgate-console"),
                Header::ConnectionUpgrade => bytes.extend(b"Connection: Upgrade"),
                Header::KeepAlive => bytes.extend(b"Connection: keep-alive"),
                Header::Continue => bytes.extend(b"Expect: 100-continue"),
                Header::Length(length) => {
                    bytes.extend(format!("Content-Length: {length}").bytes());
                }
                Header::Chunked => bytes.extend(b"Transfer-Encoding: chunked"),
                Header::Many(count) => bytes.extend(b"A: b\r\n".repeat((*count).into())),
                Header::Long(length) => {
                    bytes.extend(b"A: ");
                    bytes.resize(bytes.len() + usize::from(*length), b'x');
                }
                Header::Other(name, value) => {
                    bytes.extend(name);
                    bytes.extend(b": ");
                    bytes.extend(value);
                }
            }
            bytes.extend(b"\r\n");
        }
        bytes.extend(b"\r\n");
        bytes.extend(body);
        bytes
    }
}

impl Body {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::None => Vec::new(),
            Self::Grace(seconds) => format!("{{\"grace_seconds\":{seconds}}}").into_bytes(),
            Self::Directory(directory) => {
                format!("{{\"directory\":{}}}", Value::from(directory.as_str())).into_bytes()
            }
            Self::Size(columns, rows) => {
                format!("{{\"columns\":{columns},\"rows\":{rows}}}").into_bytes()
            }
            Self::Chunks(chunks) => {
                let mut bytes = Vec::new();
                for chunk in chunks {
                    bytes.extend(format!("{:x}\r\n", chunk.len()).bytes());
                    bytes.extend(chunk);
                    bytes.extend(b"\r\n");
                }
                bytes
            }
            Self::Long(length) => vec![b' '; (*length as usize).min(1 << 20)],
            Self::Other(bytes) => bytes.clone(),
        }
    }
}

fn pieces(input: Input) -> Vec<Vec<u8>> {
    match input {
        Input::Raw(pieces) => pieces,
        Input::Requests(requests, rest) => {
            let mut pieces = Vec::new();
            for request in requests {
                // The test's own machine panics at this name, which is another test's business.
                if matches!(&request.body, Body::Directory(path) if path.ends_with("panic")) {
                    continue;
                }
                let mut bytes = request.bytes();
                let second = bytes.split_off(usize::from(request.cut) % (bytes.len() + 1));
                pieces.extend([bytes, second]);
            }
            pieces.push(rest);
            pieces
        }
    }
}

/// Checks an answer, which may be followed by a terminal's bytes.
fn check(answer: &[u8]) {
    let text = String::from_utf8_lossy(answer);
    let mut text = text.as_ref();
    while let Some(rest) = text.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n") {
        text = rest;
    }
    if text.is_empty() {
        return;
    }
    let (head, body) = text.split_once("\r\n\r\n").expect("a whole head");
    let status: u16 = head
        .strip_prefix("HTTP/1.1 ")
        .or_else(|| head.strip_prefix("HTTP/1.0 "))
        .and_then(|line| line.get(..3))
        .and_then(|status| status.parse().ok())
        .expect("a status");
    assert_ne!(status, 500, "{text}");
    // What is not HTTP is refused without words.
    if status == 101 || body.is_empty() {
        return;
    }
    // A client that sends no more is taken to have left: its answer may be cut off.
    let length: usize = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .and_then(|length| length.parse().ok())
        .expect("a length");
    assert!(body.len() <= length, "{text}");
    if body.len() < length {
        return;
    }
    let value: Value = serde_json::from_str(body).expect("JSON");
    if status >= 400 {
        assert_eq!(value["status"], status);
        assert!(head.contains("application/problem+json"));
    }
}

fuzz_target!(|input: (Input, bool)| {
    let (input, obedient) = input;
    check(&converse(&pieces(input), obedient));
});
