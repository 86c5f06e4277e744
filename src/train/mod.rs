//! The training loop, optimizers, schedules and checkpoints.

pub mod adamw;
pub mod adamw8bit;
pub mod batches;
pub mod checkpoint;
pub mod clip;
pub mod optimizer;
pub mod plan;
pub mod run;
pub mod schedule;
pub mod step;

pub use run::{Control, Event, Job, Lender, Observer, Outcome, Settings, Status};
pub use step::{MicroBatch, Recompute, StepOptions, forward_backward};
