//! The one place where a Rust [`Error`] becomes a Python exception, and the tree of those exceptions.

use crate::error::Error;
use pyo3::exceptions::{PyArithmeticError, PyException, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// Every exception of ours: its name, the builtin it also is, and what it is about.
const TREE: [(&str, Builtin, &str); 10] = [
    ("ConfigError", Builtin::Value, "A setting that cannot be used."),
    ("ShapeError", Builtin::Value, "Arrays whose sizes do not fit each other."),
    ("ModelError", Builtin::Value, "A config.json that describes no model that can be run."),
    ("WeightsError", Builtin::Value, "A weight file that is damaged, incomplete, or does not fit its config."),
    ("AdapterError", Builtin::Value, "An adapter folder that cannot be applied."),
    ("DataError", Builtin::Value, "Training or evaluation data that cannot be used."),
    ("TokenizerError", Builtin::Value, "A tokenizer or chat template that cannot be read or rendered."),
    ("HubError", Builtin::Os, "A hub repository that could not be had."),
    ("CheckpointError", Builtin::None, "A training checkpoint that cannot be written or resumed from."),
    ("DivergedError", Builtin::Arithmetic, "The loss or the gradient is no longer a finite number."),
];

/// The builtin exception one of ours inherits from besides `RustuneError`.
#[derive(Clone, Copy)]
enum Builtin {
    None,
    Value,
    Os,
    Arithmetic,
}

/// The exception classes by name, made once when the module is imported.
static CLASSES: PyOnceLock<Vec<(&'static str, Py<PyType>)>> = PyOnceLock::new();

/// Adds the exception classes to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    for (name, class) in classes(py)? {
        module.add(*name, class.bind(py))?;
    }
    Ok(())
}

/// The classes, `RustuneError` first; made at the first call.
fn classes(py: Python<'_>) -> PyResult<&Vec<(&'static str, Py<PyType>)>> {
    CLASSES.get_or_try_init(py, || {
        let exception = py.get_type::<PyException>();
        let root = class(py, "RustuneError", "The root of every exception of rustune.", &[&exception])?;
        let mut made = vec![("RustuneError", root.clone().unbind())];
        for (name, builtin, doc) in TREE {
            let second = match builtin {
                Builtin::None => None,
                Builtin::Value => Some(py.get_type::<PyValueError>()),
                Builtin::Os => Some(py.get_type::<PyOSError>()),
                Builtin::Arithmetic => Some(py.get_type::<PyArithmeticError>()),
            };
            let bases: Vec<&Bound<'_, PyType>> = std::iter::once(&root).chain(second.as_ref()).collect();
            made.push((name, class(py, name, doc, &bases)?.unbind()));
        }
        Ok(made)
    })
}

/// `type(name, bases, {...})`: pyo3's own macro knows a single base only.
fn class<'py>(py: Python<'py>, name: &str, doc: &str, bases: &[&Bound<'py, PyType>]) -> PyResult<Bound<'py, PyType>> {
    let body = PyDict::new(py);
    body.set_item("__doc__", doc)?;
    // The package re-exports them, so this is where users, tracebacks and pickles find them.
    body.set_item("__module__", "rustune")?;
    let bases = PyTuple::new(py, bases)?;
    Ok(py.get_type::<PyType>().call1((name, bases, body))?.cast_into::<PyType>()?)
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let name = match error {
            Error::Config { .. } => "ConfigError",
            Error::Shape { .. } => "ShapeError",
            Error::Model { .. } => "ModelError",
            Error::Weights { .. } => "WeightsError",
            Error::Adapter { .. } => "AdapterError",
            Error::Data { .. } => "DataError",
            Error::Tokenizer { .. } => "TokenizerError",
            Error::Hub { .. } => "HubError",
            Error::Checkpoint { .. } => "CheckpointError",
            Error::Diverged { .. } => "DivergedError",
            Error::Io { path, source } => return os_error(&path.display().to_string(), source),
            Error::Callback(inner) => {
                return match inner.downcast::<PyErr>() {
                    Ok(raised) => *raised,
                    Err(other) => PyRuntimeError::new_err(other.to_string()),
                };
            }
        };
        Python::attach(|py| match classes(py) {
            Ok(classes) => match classes.iter().find(|(known, _)| *known == name) {
                Some((_, class)) => Self::from_type(class.bind(py).clone(), error.to_string()),
                None => PyRuntimeError::new_err(error.to_string()),
            },
            Err(failed) => failed,
        })
    }
}

/// `OSError(errno, text, path)`, which Python turns into `FileNotFoundError` and its like by itself.
fn os_error(path: &str, source: std::io::Error) -> PyErr {
    match source.raw_os_error() {
        Some(errno) => {
            let text = source.to_string();
            // Rust writes "No such file or directory (os error 2)"; Python prints the number itself.
            let text = text.split(" (os error").next().unwrap_or(&text).to_owned();
            PyOSError::new_err((errno, text, path.to_owned()))
        }
        None => PyErr::from(std::io::Error::new(source.kind(), format!("{path}: {source}"))),
    }
}
