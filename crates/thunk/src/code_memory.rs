//! Code memory.
#[derive(Debug)]
pub(crate) struct Chunk;
