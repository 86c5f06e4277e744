//! The training loop, optimizers, schedules and checkpoints.

pub mod step;

pub use step::{MicroBatch, Recompute, StepOptions, forward_backward};
