//! The `trapgate` program as people meet it: run as a process, with real pipes and terminals.
//!
//! What needs Linux in the guest needs a kernel from the distribution's packages. Where none can be had these
//! tests say so on standard error and pass, unless `TRAPGATE_TESTS_MUST_RUN` is set.
#![forbid(unsafe_code)]

mod bad_input;
mod builtin_guest;
mod disks;
mod doctor;
mod harness;
mod linux_command;
mod linux_machines;
mod linux_terminal;
mod machines;
mod observation;
mod snapshots;
mod terminal;
