//! Sampling and the decode loop.

pub mod decode;
pub mod sampling;

pub use decode::{Chooser, decode};
