//! Settings as written, resolved once into settings as run.
//!
//! `XOptions` holds what a user wrote, every field optional, in the spelling of the Python arguments; `resolve` checks it,
//! fills in the defaults, whose only home is here, and gives an `X`. An `X` serialises, so that what ran can be saved.

pub mod generate;
pub mod lora;
pub mod optimizer;
pub mod quantization;
pub mod schedule;
pub mod train;

pub use generate::{Generate, GenerateOptions};
pub use lora::{InitWeights, Lora, LoraOptions};
pub use optimizer::{AdamHyper, OptimizerKind};
pub use quantization::{Quantization, QuantizationOptions};
pub use schedule::ScheduleKind;
pub use train::{Preset, Train, TrainOptions};

use crate::error::{Error, Result};

/// A number that is at least 1, or `default` where nothing was written.
fn at_least_one(field: &'static str, written: Option<i64>, default: usize) -> Result<usize> {
    match written {
        None => Ok(default),
        Some(n) => {
            usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| Error::config(field, n, "expected at least 1"))
        }
    }
}

/// A finite number in `allowed`, or `default` where nothing was written.
fn number(
    field: &'static str,
    written: Option<f64>,
    default: f64,
    allowed: impl Fn(f64) -> bool,
    expected: &str,
) -> Result<f64> {
    let x = written.unwrap_or(default);
    if x.is_finite() && allowed(x) { Ok(x) } else { Err(Error::config(field, x, expected)) }
}

/// Refuses a setting whose feature is not there yet.
fn refuse_if(there: bool, field: &'static str, value: impl ToString, instead: &str) -> Result<()> {
    if there { Err(Error::config(field, value, format!("not there yet; {instead}"))) } else { Ok(()) }
}
