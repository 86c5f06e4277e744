//! The one error type of the Rust core; `py/errors.rs` turns it into Python's exception tree.

use std::path::{Path, PathBuf};

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// An error that names the thing, says what was expected, and what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that cannot be used.
    #[error("{field} = {value}: {expected}")]
    Config {
        /// The setting's full name as its user writes it, `lora.r` or `learning_rate`.
        field: &'static str,
        /// What was written.
        value: String,
        /// What would be accepted, and what to do.
        expected: String,
    },
    /// Buffers or arrays whose sizes do not fit each other.
    #[error("{op}: expected {expected}, got {got:?}")]
    Shape {
        /// The operation that refused.
        op: &'static str,
        /// The sizes it needs.
        expected: String,
        /// The sizes it was given.
        got: Vec<usize>,
    },
    /// A `config.json` that describes no model we can run.
    #[error("{}: {problem}", path.display())]
    Model {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A weight file that is damaged, incomplete, or does not fit its config.
    #[error("{}: tensor {tensor}: {problem}", path.display())]
    Weights {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name in the file, or `*` when the whole file is meant.
        tensor: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// An adapter folder that cannot be applied.
    #[error("{}: {key}: {problem}", path.display())]
    Adapter {
        /// The file or folder.
        path: PathBuf,
        /// The key of `adapter_config.json`, or the tensor.
        key: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Training or evaluation data that cannot be used.
    #[error("{what}: {problem}")]
    Data {
        /// The dataset, row or column.
        what: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A tokenizer or chat template that cannot be read or rendered.
    #[error("{what}: {problem}")]
    Tokenizer {
        /// The file, template or token.
        what: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A hub repository that could not be had.
    #[error("{repo}: {problem}")]
    Hub {
        /// The repository, `owner/name`.
        repo: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A training checkpoint that cannot be written or resumed from.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The checkpoint folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The loss or the gradient is no longer a finite number.
    #[error("step {step}: {what} is {value}: training diverged; {advice}")]
    Diverged {
        /// The optimizer step, counted from 1.
        step: usize,
        /// `loss` or `grad_norm`.
        what: &'static str,
        /// The value.
        value: f64,
        /// What to do.
        advice: String,
    },
    /// The operating system refused; Python sees its builtin exception.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's own error.
        source: std::io::Error,
    },
    /// A caller's callback failed, or asked to stop now (Ctrl-C); carried through unchanged.
    #[error("callback: {0}")]
    Callback(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// An [`Error::Config`] about `field`.
    #[allow(clippy::needless_pass_by_value, reason = "callers hand over numbers and temporaries")]
    pub fn config(field: &'static str, value: impl ToString, expected: impl Into<String>) -> Self {
        Self::Config { field, value: value.to_string(), expected: expected.into() }
    }

    /// An [`Error::Data`] about `what`.
    pub fn data(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Data { what: what.into(), problem: problem.into() }
    }

    /// An [`Error::Weights`] about one tensor of a file.
    pub fn weights(path: impl AsRef<Path>, tensor: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Weights { path: path.as_ref().to_owned(), tensor: tensor.into(), problem: problem.into() }
    }
}
