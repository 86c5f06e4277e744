//! The training loop, optimizers, schedules and checkpoints.

pub mod adamw;
pub mod adamw8bit;
pub mod clip;
pub mod optimizer;
pub mod schedule;
pub mod step;

pub use step::{MicroBatch, Recompute, StepOptions, forward_backward};
