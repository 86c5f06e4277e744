//! Sampling and the decode loop.

pub mod constraints;
pub mod decode;
pub mod sampling;

pub use decode::{Chooser, decode};
