//! What requests and answers carry.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The guest runs, or waits for something to happen to it.
    Running,
    /// The guest and its clock stand still.
    Paused,
    /// The guest is gone; the process is about to end.
    Ended,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ended => "ended",
        })
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Engine {
    /// Its name, as `--engine` takes it.
    pub name: String,
    /// Why it was chosen.
    pub reason: String,
}

/// What a machine is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Info {
    /// Its name, which no other running machine of this user has.
    pub name: String,
    /// The process that it is.
    pub pid: u32,
    /// Whether it runs.
    pub state: State,
    /// What runs in it, for people.
    pub guest: String,
    /// What runs it.
    pub engine: Engine,
    /// Virtual processors.
    pub cpus: u32,
    /// RAM of the guest, bytes.
    pub memory_bytes: u64,
    /// When the machine was started: seconds since 1970-01-01 UTC.
    pub started_unix_seconds: u64,
    /// Seconds since then.
    pub uptime_seconds: f64,
    /// Whether it has a terminal that can be attached to.
    pub has_terminal: bool,
    /// Version of trapgate.
    pub version: String,
}

/// A request that says nothing: its body is empty, or `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// The state that a machine is in after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StateAnswer {
    /// The state.
    pub state: State,
    /// Whether the request changed it.
    pub changed: bool,
}

/// How to stop a machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Seconds that the guest gets to shut down after its power button was pressed; with 0 it is not pressed, and
    /// the machine stops as if its power cord were pulled.
    #[serde(default = "StopRequest::default_grace")]
    #[schemars(range(min = 0, max = 86400))]
    pub grace_seconds: f64,
}

impl StopRequest {
    /// The longest grace, a day.
    pub const LONGEST: f64 = 86_400.0;
    /// The usual one.
    pub const USUAL: f64 = 30.0;

    fn default_grace() -> f64 {
        Self::USUAL
    }
}

impl Default for StopRequest {
    fn default() -> Self {
        Self {
            grace_seconds: Self::USUAL,
        }
    }
}

/// How a machine stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StopAnswer {
    /// Whether it was stopped without the guest's agreement.
    pub forced: bool,
}

/// Where to save a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory to make, as an absolute path; there must be nothing of this name.
    #[schemars(regex(pattern = "^/"))]
    pub directory: String,
}

/// What was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotAnswer {
    /// The directory.
    pub directory: String,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Nanoseconds for which the guest stood still for it (0 if it was paused before).
    pub paused_ns: u64,
}

/// The size of a terminal's window, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Characters in a line.
    #[schemars(range(min = 1))]
    pub columns: u16,
    /// Lines.
    #[schemars(range(min = 1))]
    pub rows: u16,
}

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Events.
    Count,
    /// Bytes.
    Bytes,
    /// Nanoseconds.
    Nanoseconds,
}

/// How a counter moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It only grows, from the machine's start on: of interest is how fast.
    Total,
    /// It goes up and down.
    Level,
}

/// A number that a machine keeps of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Counter {
    /// Its name: lower case with underscores. Which there are depends on engine and version.
    pub name: String,
    /// What it counts, for people.
    pub help: String,
    /// Of what.
    pub unit: Unit,
    /// How it moves.
    pub kind: Kind,
    /// The machine's value; the sum over the virtual processors if each has one.
    pub value: u64,
    /// The value of each virtual processor; empty for a counter of the machine as a whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<u64>,
}

/// Something that a machine's engine spends host time on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cost {
    /// What it is, of a few kinds: lower case with underscores. Which there are depends on engine and version.
    pub kind: String,
    /// Which of this kind, such as the guest's instruction; empty if there is but one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// How often it happened since the machine's start.
    pub count: u64,
    /// Host time that it took, in nanoseconds, without that of other costs within it. Only of a machine that was asked to
    /// measure (`trapgate run --stats`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nanoseconds: Option<u64>,
    /// The time is an estimate: the count times what one is known to take. It lies within that of `translated_code`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub estimated: bool,
}

/// All counters of a machine, at about the same moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Counters {
    /// Nanoseconds of VM time, which stands still while the machine is paused.
    pub clock_ns: u64,
    /// The counters, machine-wide ones first.
    pub counters: Vec<Counter>,
    /// What the engine spends host time on, summed over the virtual processors, the most expensive first; empty if it
    /// does not know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub costs: Vec<Cost>,
}

impl Counters {
    /// The counter of this name.
    pub fn get(&self, name: &str) -> Option<&Counter> {
        self.counters.iter().find(|counter| counter.name == name)
    }
}
