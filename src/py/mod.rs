//! The Python extension module `rustune._native`: one file per exposed type, and the only use of pyo3.

use crate::error::{Error, Result};
use pyo3::prelude::*;
use serde::de::DeserializeOwned;

mod errors;
mod json;
mod model;
mod nf4;
mod rows;
mod system;
mod tokenizer;
mod train;

/// Runs `work` without the GIL and turns its error into a Python exception: the one door into Rust.
pub(crate) fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(PyErr::from)
}

/// Settings that came as JSON text; an unknown key or a wrong type is an error that names it.
fn parse<T: DeserializeOwned>(field: &'static str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::config(field, "arguments", error.to_string()))
}

/// `rustune._native`.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::register(module)?;
    tokenizer::register(module)?;
    rows::register(module)?;
    model::register(module)?;
    system::register(module)?;
    nf4::register(module)?;
    Ok(())
}
