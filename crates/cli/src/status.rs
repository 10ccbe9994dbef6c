//! The exit statuses of the command.
//!
//! What runs in the guest has the whole range, as under `ssh` and in containers; ours keep clear of
//! the ones that programs use most, and of 126 and up, which belong to shells.

/// All is well; for a machine, that it was powered off.
pub(crate) const SUCCESS: u8 = 0;
/// A machine that runs refused what it was asked for, or ended meanwhile.
pub(crate) const REFUSED: u8 = 1;
/// The command line makes no sense.
pub(crate) const USAGE: u8 = 120;
/// A kernel, an initrd or a disk can't be used.
pub(crate) const INPUT: u8 = 121;
/// This host lacks what is needed: space, memory, a package, an engine.
pub(crate) const HOST: u8 = 122;
/// The guest's kernel panicked.
pub(crate) const PANIC: u8 = 123;
/// The guest crashed: a triple fault, or it reset itself before it was up.
pub(crate) const CRASH: u8 = 124;
/// trapgate itself failed.
pub(crate) const DEFECT: u8 = 125;
/// To be added to the number of the signal that ended us, as shells do.
pub(crate) const SIGNAL: u8 = 128;

/// The table for `--help`.
pub(crate) const HELP: &str = "\
Exit status:
  The status of the command or shell in the guest; 0 if the guest was powered off. Otherwise:
  120  the command line is wrong
  121  a kernel, initrd, disk or snapshot can't be used
  122  this host lacks something: space, memory, a package, an engine
  123  the guest's kernel panicked
  124  the guest crashed (triple fault), or reset itself before it was up
  125  trapgate itself failed
  126, 127  the command can't be executed in the guest, or was not found there
  129, 130, 141, 143  trapgate was ended by SIGHUP, Ctrl-C, a closed pipe, SIGTERM; 143 also
       if `trapgate stop` had to use force";

/// The same for what is asked of machines that run.
pub(crate) const CLIENT_HELP: &str = "\
Exit status:
    0  done
    1  the machine refused, or ended meanwhile
  120  there is no such machine, or the command line is wrong
  122  this host lacks something, or the machine does not answer
  125  trapgate itself failed";
