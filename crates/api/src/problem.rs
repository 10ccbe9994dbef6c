//! Why a request was not fulfilled, as data: RFC 9457 with a member that says what to do.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The media type of a [`Problem`].
pub const MEDIA_TYPE: &str = "application/problem+json";

macro_rules! kinds {
    ($($(#[doc = $help:literal])+ $kind:ident = $name:literal, $status:literal, $title:literal;)+) => {
        /// What kind of problem it is. More may come: treat an unknown one by its HTTP status.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        pub enum ProblemKind {
            $($(#[doc = $help])+ #[serde(rename = $name)] $kind,)+
            /// One that this version does not know.
            #[serde(other, rename = "urn:trapgate:problem:unknown")]
            Unknown,
        }

        impl ProblemKind {
            /// All that a server of this version answers with.
            pub const ALL: &[Self] = &[$(Self::$kind),+];

            /// The HTTP status that goes with it.
            pub fn status(self) -> u16 {
                match self {
                    $(Self::$kind => $status,)+
                    Self::Unknown => 500,
                }
            }

            /// The same for every problem of this kind, in words.
            pub fn title(self) -> &'static str {
                match self {
                    $(Self::$kind => $title,)+
                    Self::Unknown => "the request failed",
                }
            }
        }
    };
}

kinds! {
    /// The request is no JSON, or not the JSON that the operation takes.
    Malformed = "urn:trapgate:problem:malformed", 400, "the request makes no sense";
    /// There is no such path.
    NoSuchPath = "urn:trapgate:problem:no-such-path", 404, "there is nothing at this path";
    /// The path has no such method.
    NoSuchMethod = "urn:trapgate:problem:no-such-method", 405, "this path has no such method";
    /// The client was too slow.
    TooSlow = "urn:trapgate:problem:too-slow", 408, "the request took too long to arrive";
    /// The machine has to run for that.
    Paused = "urn:trapgate:problem:paused", 409, "the machine is paused";
    /// The guest is gone.
    Ended = "urn:trapgate:problem:ended", 409, "the machine has ended";
    /// Nothing to attach to.
    NoTerminal = "urn:trapgate:problem:no-terminal", 409, "the machine has no terminal";
    /// The machine is occupied with another request.
    Busy = "urn:trapgate:problem:busy", 409, "the machine is busy";
    /// The body is too large.
    TooLarge = "urn:trapgate:problem:too-large", 413, "the request is too large";
    /// The host would not do it.
    Host = "urn:trapgate:problem:host", 422, "the host could not do it";
    /// The connection has to be upgraded.
    UpgradeRequired = "urn:trapgate:problem:upgrade-required", 426, "this needs an upgraded connection";
    /// trapgate is wrong.
    Defect = "urn:trapgate:problem:defect", 500, "trapgate failed";
}

/// Why a request was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
pub struct Problem {
    /// What kind of problem it is.
    #[serde(rename = "type")]
    pub kind: ProblemKind,
    /// What went wrong, for people.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What to do about it, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Problem {
    /// A problem that says no more than its kind.
    pub fn new(kind: ProblemKind) -> Self {
        Self {
            kind,
            title: kind.title().to_owned(),
            status: kind.status(),
            detail: None,
            fix: None,
        }
    }

    /// Says what went wrong in words of its own.
    pub fn title(mut self, title: impl Into<String>) -> Self {
        self.title = title.into();
        self
    }

    /// Says why.
    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.detail = Some(cause.to_string());
        self
    }

    /// Says what to do about it.
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl From<ProblemKind> for Problem {
    fn from(kind: ProblemKind) -> Self {
        Self::new(kind)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.title)?;
        match &self.detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problem_is_an_rfc_9457_object_and_comes_back() {
        let problem = Problem::new(ProblemKind::Paused)
            .cause("someone paused it")
            .fix("resume it");

        let text = serde_json::to_string(&problem).unwrap();

        assert_eq!(
            text,
            r#"{"type":"urn:trapgate:problem:paused","title":"the machine is paused","status":409,"detail":"someone paused it","fix":"resume it"}"#
        );
        assert_eq!(serde_json::from_str::<Problem>(&text).unwrap(), problem);
    }

    #[test]
    fn kind_of_a_later_version_is_unknown_and_the_words_stay() {
        let text = r#"{"type":"urn:trapgate:problem:haunted","title":"it is haunted","status":418,"more":1}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        assert_eq!(problem.kind, ProblemKind::Unknown);
        assert_eq!(
            (problem.to_string().as_str(), problem.status),
            ("it is haunted", 418)
        );
    }

    #[test]
    fn every_kind_has_a_name_of_its_own_and_an_error_status() {
        let mut names: Vec<String> = ProblemKind::ALL
            .iter()
            .map(|kind| serde_json::to_string(kind).unwrap())
            .collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ProblemKind::ALL.len());
        for kind in ProblemKind::ALL {
            assert!((400..600).contains(&kind.status()), "{kind:?}");
        }
    }
}
