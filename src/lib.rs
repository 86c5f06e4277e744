//! rustune: fine-tune Llama-family models in 4 bits on a plain CPU.
//!
//! Reading order follows the dependencies, lowest first:
//! [`error`], [`kernels`] (slices in, slices out), [`quant`] (NF4), [`ops`] (forward and hand-derived backward),
//! [`model`] (the decoder), [`lora`] (adapters), [`train`] (the loop), [`generate`] (decoding);
//! beside them [`config`] (settings as written, settings as run), [`io`] (files, hub, operating system) and
//! [`data`] (chat templates, masking, collation, batch order). `py` binds all of it to Python and is used by nothing.

pub mod config;
pub mod data;
pub mod error;
pub mod generate;
pub mod io;
pub mod kernels;
pub mod lora;
pub mod model;
pub mod ops;
pub mod quant;
pub mod train;

#[cfg(feature = "python")]
#[expect(clippy::needless_pass_by_value, reason = "pyo3 hands arguments over by value")]
mod py;

pub use error::{Error, Result};
