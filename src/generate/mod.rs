//! Sampling and the decode loop.

pub mod sampling;
