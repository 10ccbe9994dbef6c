//! What can be asked of a machine, and at which path: the one definition that server, client and OpenAPI document share.

use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::Control;
use crate::data::{
    Counters, Info, Nothing, SnapshotAnswer, SnapshotRequest, State, StateAnswer, StopAnswer,
    StopRequest, TerminalSize,
};
use crate::problem::{Problem, ProblemKind};

/// What the protocol of an attached terminal is called in the header `Upgrade`.
pub const CONSOLE_PROTOCOL: &str = "trapgate-console";
/// Where a terminal is attached.
pub const CONSOLE_PATH: &str = "/v1/vm/console";
/// Where the document is.
pub const DOCUMENT_PATH: &str = "/v1/openapi.json";

/// The methods that occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Changes nothing.
    Get,
    /// Changes something, and may be repeated.
    Put,
    /// Does something.
    Post,
}

impl Method {
    /// As it stands in a request.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Post => "POST",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Something that can be asked of a machine.
pub trait Operation: 'static {
    /// What has to be said with it.
    type Request: Serialize + DeserializeOwned + JsonSchema + Send + 'static;
    /// What is answered.
    type Answer: Serialize + DeserializeOwned + JsonSchema + Send + 'static;

    /// Its name in the document.
    const ID: &'static str;
    /// Its method.
    const METHOD: Method;
    /// Its path.
    const PATH: &'static str;
    /// What it does, in a line.
    const SUMMARY: &'static str;
    /// What else there is to say; may be empty.
    const DESCRIPTION: &'static str;
    /// The problems that are its own; those of every request come on top.
    const PROBLEMS: &'static [ProblemKind];

    /// Does it. If the client goes away the future is dropped.
    fn perform(
        control: Arc<dyn Control>,
        request: Self::Request,
    ) -> impl Future<Output = Result<Self::Answer, Problem>> + Send;
}

/// Runs what may wait on a thread of its own, so that the server goes on answering.
async fn waiting<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // It panicked: whoever watches panics has been told.
        Err(error) => Err(Problem::new(ProblemKind::Defect).cause(error)),
    }
}

/// Says what a machine is.
#[derive(Debug)]
pub enum GetInfo {}

impl Operation for GetInfo {
    type Request = Nothing;
    type Answer = Info;
    const ID: &'static str = "info";
    const METHOD: Method = Method::Get;
    const PATH: &'static str = "/v1/vm";
    const SUMMARY: &'static str = "Says what the machine is, and whether it runs";
    const DESCRIPTION: &'static str = "";
    const PROBLEMS: &'static [ProblemKind] = &[];

    async fn perform(control: Arc<dyn Control>, _: Nothing) -> Result<Info, Problem> {
        Ok(control.info())
    }
}

/// Gives the counters.
#[derive(Debug)]
pub enum GetCounters {}

impl Operation for GetCounters {
    type Request = Nothing;
    type Answer = Counters;
    const ID: &'static str = "counters";
    const METHOD: Method = Method::Get;
    const PATH: &'static str = "/v1/vm/counters";
    const SUMMARY: &'static str = "Gives the numbers that the machine keeps of itself";
    const DESCRIPTION: &'static str = "Which counters there are depends on the engine and on the version. Totals begin again \
        at 0 when the guest restarts.";
    const PROBLEMS: &'static [ProblemKind] = &[ProblemKind::Busy, ProblemKind::Ended];

    async fn perform(control: Arc<dyn Control>, _: Nothing) -> Result<Counters, Problem> {
        waiting(move || control.counters()).await
    }
}

/// Stands the machine still.
#[derive(Debug)]
pub enum Pause {}

impl Operation for Pause {
    type Request = Nothing;
    type Answer = StateAnswer;
    const ID: &'static str = "pause";
    const METHOD: Method = Method::Post;
    const PATH: &'static str = "/v1/vm/pause";
    const SUMMARY: &'static str = "Stands the machine still, its clock too";
    const DESCRIPTION: &'static str =
        "Answers once it stands still. A machine that is paused already stays paused.";
    const PROBLEMS: &'static [ProblemKind] = &[ProblemKind::Ended];

    async fn perform(control: Arc<dyn Control>, _: Nothing) -> Result<StateAnswer, Problem> {
        waiting(move || control.pause()).await
    }
}

/// Lets the machine go on.
#[derive(Debug)]
pub enum Resume {}

impl Operation for Resume {
    type Request = Nothing;
    type Answer = StateAnswer;
    const ID: &'static str = "resume";
    const METHOD: Method = Method::Post;
    const PATH: &'static str = "/v1/vm/resume";
    const SUMMARY: &'static str = "Lets the machine go on";
    const DESCRIPTION: &'static str = "A machine that runs goes on running.";
    const PROBLEMS: &'static [ProblemKind] = &[ProblemKind::Ended];

    async fn perform(control: Arc<dyn Control>, _: Nothing) -> Result<StateAnswer, Problem> {
        waiting(move || control.resume()).await
    }
}

/// Presses the power button.
#[derive(Debug)]
pub enum PressPowerButton {}

impl Operation for PressPowerButton {
    type Request = Nothing;
    type Answer = StateAnswer;
    const ID: &'static str = "power-button";
    const METHOD: Method = Method::Post;
    const PATH: &'static str = "/v1/vm/power-button";
    const SUMMARY: &'static str = "Presses the power button, which asks the guest to shut down";
    const DESCRIPTION: &'static str =
        "Does not wait for the guest, which may ignore it. A paused guest would not see it.";
    const PROBLEMS: &'static [ProblemKind] = &[ProblemKind::Ended, ProblemKind::Paused];

    async fn perform(control: Arc<dyn Control>, _: Nothing) -> Result<StateAnswer, Problem> {
        let state = control.states().get();
        if state == State::Paused {
            return Err(Problem::new(ProblemKind::Paused)
                .cause("a guest that stands still does not see its power button")
                .fix("resume it first, or stop it, which does both"));
        }
        control.press_power_button()?;
        Ok(StateAnswer {
            state,
            changed: false,
        })
    }
}

/// Stops the machine.
#[derive(Debug)]
pub enum Stop {}

impl Operation for Stop {
    type Request = StopRequest;
    type Answer = StopAnswer;
    const ID: &'static str = "stop";
    const METHOD: Method = Method::Post;
    const PATH: &'static str = "/v1/vm/stop";
    const SUMMARY: &'static str = "Stops the machine";
    const DESCRIPTION: &'static str = "Presses the power button, resumes the machine if it is paused, gives the guest some \
        time to shut down, and then stops the machine as if its power cord were pulled. Answers once the guest is gone. \
        If the client goes away before, the guest has been asked but is not forced.";
    const PROBLEMS: &'static [ProblemKind] = &[];

    async fn perform(
        control: Arc<dyn Control>,
        request: StopRequest,
    ) -> Result<StopAnswer, Problem> {
        let grace = request.grace_seconds;
        if !(0.0..=StopRequest::LONGEST).contains(&grace) {
            return Err(Problem::new(ProblemKind::Malformed)
                .cause(format!("`grace_seconds` is {grace}"))
                .fix("pass 0 to 86400 seconds"));
        }
        // A machine that has ended has stopped.
        if grace > 0.0 && control.press_power_button().is_ok() {
            let resumed = Arc::clone(&control);
            let shut_down = async {
                let _ = waiting(move || resumed.resume()).await;
                control.states().ended().await;
            };
            let limit = Duration::from_secs_f64(grace);
            if tokio::time::timeout(limit, shut_down).await.is_ok() {
                return Ok(StopAnswer { forced: false });
            }
        }
        let forced = control.states().get() != State::Ended;
        control.stop();
        control.states().ended().await;
        Ok(StopAnswer { forced })
    }
}

/// Saves the machine.
#[derive(Debug)]
pub enum Snapshot {}

impl Operation for Snapshot {
    type Request = SnapshotRequest;
    type Answer = SnapshotAnswer;
    const ID: &'static str = "snapshot";
    const METHOD: Method = Method::Post;
    const PATH: &'static str = "/v1/vm/snapshot";
    const SUMMARY: &'static str = "Saves the machine to a directory";
    const DESCRIPTION: &'static str = "The guest stands still meanwhile, and goes on afterwards; if it was paused it stays \
        paused. The directory appears under its name only when it is complete.";
    const PROBLEMS: &'static [ProblemKind] =
        &[ProblemKind::Busy, ProblemKind::Ended, ProblemKind::Host];

    async fn perform(
        control: Arc<dyn Control>,
        request: SnapshotRequest,
    ) -> Result<SnapshotAnswer, Problem> {
        let directory = request.directory;
        if !Path::new(&directory).is_absolute() {
            return Err(Problem::new(ProblemKind::Malformed)
                .cause(format!("`{directory}` is not an absolute path"))
                .fix("pass a path that starts with `/`: the machine's working directory is not yours"));
        }
        waiting(move || control.snapshot(Path::new(&directory))).await
    }
}

/// Sets the size of the terminal.
#[derive(Debug)]
pub enum ResizeTerminal {}

impl Operation for ResizeTerminal {
    type Request = TerminalSize;
    type Answer = TerminalSize;
    const ID: &'static str = "console-size";
    const METHOD: Method = Method::Put;
    const PATH: &'static str = "/v1/vm/console/size";
    const SUMMARY: &'static str = "Tells the guest the size of its terminal";
    const DESCRIPTION: &'static str = "Of several who look at the terminal the last one to say counts. \
        A terminal on a serial port has no size, and this changes nothing.";
    const PROBLEMS: &'static [ProblemKind] = &[ProblemKind::Ended, ProblemKind::NoTerminal];

    async fn perform(
        control: Arc<dyn Control>,
        request: TerminalSize,
    ) -> Result<TerminalSize, Problem> {
        let terminal = control.terminal().ok_or_else(no_terminal)?;
        if request.columns == 0 || request.rows == 0 {
            return Err(Problem::new(ProblemKind::Malformed)
                .cause("a window has at least one line and one column"));
        }
        terminal.resize(request.columns, request.rows);
        Ok(request)
    }
}

/// What to answer if nobody can attach.
pub(crate) fn no_terminal() -> Problem {
    Problem::new(ProblemKind::NoTerminal)
        .cause("its input and output are connected to whoever started it")
        .fix("run it on a terminal, or with `--detach`")
}

/// Answers a request's body with an answer's, both JSON.
pub(crate) type Perform =
    fn(Arc<dyn Control>, Vec<u8>) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, Problem>> + Send>>;

/// Makes the schema of a type.
pub(crate) type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// What happens at a path.
#[derive(Clone, Copy)]
pub(crate) enum Action {
    /// An operation.
    Perform {
        perform: Perform,
        /// None if nothing can be said.
        request: Option<MakeSchema>,
        answer: MakeSchema,
    },
    /// The connection becomes a terminal.
    Console,
    /// The document.
    Document,
}

/// One line of the table of all that can be asked.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) id: &'static str,
    pub(crate) method: Method,
    pub(crate) path: &'static str,
    pub(crate) summary: &'static str,
    pub(crate) description: &'static str,
    pub(crate) problems: &'static [ProblemKind],
    pub(crate) action: Action,
}

impl Entry {
    const fn of<O: Operation>(request: Option<MakeSchema>) -> Self {
        Self {
            id: O::ID,
            method: O::METHOD,
            path: O::PATH,
            summary: O::SUMMARY,
            description: O::DESCRIPTION,
            problems: O::PROBLEMS,
            action: Action::Perform {
                perform: perform::<O>,
                request,
                answer: |generator| generator.subschema_for::<O::Answer>(),
            },
        }
    }

    /// An operation that nothing has to be said with.
    const fn plain<O: Operation<Request = Nothing>>() -> Self {
        Self::of::<O>(None)
    }

    const fn with_request<O: Operation>() -> Self {
        Self::of::<O>(Some(|generator| generator.subschema_for::<O::Request>()))
    }
}

/// All that can be asked.
pub(crate) const ENTRIES: &[Entry] = &[
    Entry::plain::<GetInfo>(),
    Entry::plain::<GetCounters>(),
    Entry::plain::<Pause>(),
    Entry::plain::<Resume>(),
    Entry::plain::<PressPowerButton>(),
    Entry::with_request::<Stop>(),
    Entry::with_request::<Snapshot>(),
    Entry {
        id: "console",
        method: Method::Get,
        path: CONSOLE_PATH,
        summary: "Attaches to the guest's terminal",
        description: "Needs the headers `Connection: Upgrade` and `Upgrade: trapgate-console`. After the answer 101 the \
            connection carries bytes: those from the client are keys, those to the client are what the guest writes, \
            beginning with the last 16 KiB that it wrote before. Several may be attached at once. The connection \
            is closed when the guest is gone. A client that does not read for a while misses output, and is told how much.",
        problems: &[
            ProblemKind::Busy,
            ProblemKind::Ended,
            ProblemKind::NoTerminal,
            ProblemKind::UpgradeRequired,
        ],
        action: Action::Console,
    },
    Entry::with_request::<ResizeTerminal>(),
    Entry {
        id: "document",
        method: Method::Get,
        path: DOCUMENT_PATH,
        summary: "Gives this document",
        description: "",
        problems: &[],
        action: Action::Document,
    },
];

fn perform<O: Operation>(
    control: Arc<dyn Control>,
    body: Vec<u8>,
) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, Problem>> + Send>> {
    Box::pin(async move {
        let request = parse::<O>(&body)?;
        let answer = O::perform(control, request).await?;
        serde_json::to_vec(&answer).map_err(|error| Problem::new(ProblemKind::Defect).cause(error))
    })
}

fn parse<O: Operation>(body: &[u8]) -> Result<O::Request, Problem> {
    // Where everything has a default nothing need be said.
    let text = if body.trim_ascii().is_empty() {
        b"{}"
    } else {
        body
    };
    serde_json::from_slice(text).map_err(|error| {
        Problem::new(ProblemKind::Malformed)
            .cause(format!("the body is not what `{}` takes: {error}", O::ID))
            .fix(format!("see {DOCUMENT_PATH}, `components.schemas`"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_entries_share_a_name_or_a_path_with_method() {
        let mut ids: Vec<_> = ENTRIES.iter().map(|entry| entry.id).collect();
        let mut places: Vec<_> = ENTRIES
            .iter()
            .map(|entry| (entry.path, entry.method.name()))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        places.sort_unstable();
        places.dedup();
        assert_eq!((ids.len(), places.len()), (ENTRIES.len(), ENTRIES.len()));
    }

    #[test]
    fn empty_body_stands_for_the_defaults() {
        let usual = StopRequest {
            grace_seconds: StopRequest::USUAL,
        };
        for body in ["", " \n", "{}"] {
            assert_eq!(parse::<Stop>(body.as_bytes()).unwrap(), usual);
        }
        assert!(parse::<Snapshot>(b"").is_err());
    }

    #[test]
    fn members_that_are_not_known_are_refused_by_name() {
        let problem = parse::<Stop>(br#"{"grace": 1}"#).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Malformed);
        assert!(problem.to_string().contains("`grace`"), "{problem}");
        assert!(parse::<Pause>(br#"{"x": 1}"#).is_err());
    }
}
