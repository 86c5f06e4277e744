//! The training loop, optimizers, schedules and checkpoints.

mod adafactor;
mod adagrad;
mod adamw;
pub mod batches;
pub mod checkpoint;
pub mod clip;
mod in_blocks;
#[cfg(test)]
mod life_tests;
mod lion;
mod one_by_one;
pub mod optimizer;
pub mod plan;
mod rmsprop;
pub mod run;
pub mod schedule;
mod sgd;
pub mod step;

pub use run::{Control, Event, Job, Lender, Observer, Outcome, Settings, Status};
pub use step::{MicroBatch, Recompute, StepOptions, forward_backward};
