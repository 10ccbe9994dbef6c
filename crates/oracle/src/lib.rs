//! The host CPU as judge of trapgate's engines.
//!
//! Guest and host are the same architecture, so whether an engine does what the machine does can be asked of the
//! machine: the same bytes run natively in a confined child process and in a guest, from the same registers and
//! memory at the same addresses, and what they leave is compared.

pub mod amd;
pub mod bench;
pub mod campaign;
pub mod cases;
pub mod encodings;
pub mod engine;
pub mod host;
pub mod images;
pub mod instructions;
pub mod judge;
pub mod layout;
mod monitor;
pub mod native;
mod processor_time;
pub mod profile;
pub mod programs;
pub mod random;
pub mod record;
pub mod sequences;
pub mod straight;
pub mod undefined;

/// A seed that nobody chose.
pub fn fresh_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    random::Random(since.map_or(0, |time| time.as_nanos() as u64)).next()
}
