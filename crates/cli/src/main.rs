//! The `trapgate` command.
fn main() {}
