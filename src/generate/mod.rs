//! Sampling and the decode loop.

pub mod decode;

pub use decode::{Chooser, decode};
