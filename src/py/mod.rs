//! The Python bindings, the only place that knows pyo3.
