//! The other side of a device, for tests.
