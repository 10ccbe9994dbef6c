//! The control socket of a machine: its typed API, the server, and the client.
//!
//! Each running machine serves HTTP/1.1 with JSON on a Unix socket of its own. [`operation`] defines what can be asked,
//! once: the server dispatches by it, the client calls by it, and the OpenAPI document is made from it.
//!
//! | module | what it is about |
//! | --- | --- |
//! | [`data`], [`problem`] | what is said: answers, requests, errors |
//! | [`operation`] | what can be asked, and where |
//! | [`mod@openapi`] | the same as a document |
//! | [`control`] | what a server needs of a machine |
//! | [`terminal`] | the guest's terminal, looked at by several |
//! | [`directory`] | where the sockets are, and whose name is whose |
//! | [`server`], [`client`] | the two ends of a socket |
//!
//! This room knows nothing of machines: `vmm` implements [`control::Control`].
//!
//! # What a client can do to a machine
//! Only what the operations say. Whatever else it sends, or does not send, ends with an answer or a closed connection:
//! sizes, times and numbers of connections are limited (see [`server`]). The server has one thread, which sleeps while
//! nobody asks; what may take long happens on threads that end soon afterwards.
#![forbid(unsafe_code)]

pub mod client;
pub mod control;
pub mod data;
pub mod directory;
#[cfg(any(test, fuzzing))]
mod fake;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod openapi;
pub mod operation;
pub mod problem;
pub mod server;
pub mod terminal;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whether or not a thread panicked while it held the lock.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
