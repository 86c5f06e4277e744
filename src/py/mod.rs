//! The Python extension module `rustune._native`: one file per exposed type, and the only use of pyo3.

use crate::error::Result;
use pyo3::prelude::*;

mod errors;
mod nf4;

/// Runs `work` without the GIL and turns its error into a Python exception: the one door into Rust.
pub(crate) fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(PyErr::from)
}

/// `rustune._native`.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::register(module)?;
    nf4::register(module)?;
    Ok(())
}
