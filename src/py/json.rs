//! Python objects as JSON values and back.

use crate::error::Error;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple, PyType};
use serde_json::{Map, Number, Value};

/// Deepest nesting accepted; a list that contains itself would otherwise never end.
const MAX_DEPTH: usize = 64;

/// A Python object as JSON: None, bool, int, float, str, mappings and sequences of them, and whatever has `tolist`
/// (numpy arrays and scalars) or `isoformat` (dates). What cannot be JSON is an error about `what`.
pub(crate) fn from_python(what: &str, object: &Bound<'_, PyAny>) -> PyResult<Value> {
    convert(object, 0).map_err(|failure| match failure {
        Failure::Unfit(problem) => Error::data(what, problem).into(),
        Failure::Raised(error) => error,
    })
}

/// Why an object became no JSON.
enum Failure {
    /// It is none, and why.
    Unfit(String),
    /// A method of it raised this.
    Raised(PyErr),
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Raised(error)
    }
}

/// A JSON value as Python objects.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(b) => PyBool::new(py, *b).to_owned().into_any(),
        Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => i.into_pyobject(py)?.into_any(),
            (_, Some(u)) => u.into_pyobject(py)?.into_any(),
            _ => PyFloat::new(py, n.as_f64().unwrap_or(f64::NAN)).into_any(),
        },
        Value::String(s) => PyString::new(py, s).into_any(),
        Value::Array(items) => {
            let list = PyList::empty(py);
            for item in items {
                list.append(to_python(py, item)?)?;
            }
            list.into_any()
        }
        Value::Object(fields) => {
            let dict = PyDict::new(py);
            for (key, item) in fields {
                dict.set_item(key, to_python(py, item)?)?;
            }
            dict.into_any()
        }
    })
}

fn convert(object: &Bound<'_, PyAny>, depth: usize) -> Result<Value, Failure> {
    if depth > MAX_DEPTH {
        return Err(Failure::Unfit(format!("nested more than {MAX_DEPTH} levels deep")));
    }
    if object.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(text) = object.cast::<PyString>() {
        return text_of(text).map(Value::String);
    }
    // bool is a subclass of int, so it is asked first.
    if let Ok(truth) = object.cast::<PyBool>() {
        return Ok(Value::Bool(truth.is_true()));
    }
    if object.is_instance_of::<PyInt>() {
        if let Ok(number) = object.extract::<i64>() {
            return Ok(Value::from(number));
        }
        // Beyond what JSON's readers keep exact; only ids of rows are so large.
        let number = object.extract::<f64>();
        return Ok(Value::from(number.map_err(|_| Failure::Unfit("a whole number that is too large".to_owned()))?));
    }
    if object.is_instance_of::<PyFloat>() {
        // JSON has no NaN; tables use it for a missing text.
        return Ok(Number::from_f64(object.extract()?).map_or(Value::Null, Value::Number));
    }
    if let Ok(dict) = object.cast::<PyDict>() {
        let mut fields = Map::new();
        for (key, item) in dict {
            fields.insert(text_of(&key.str()?)?, convert(&item, depth + 1)?);
        }
        return Ok(Value::Object(fields));
    }
    if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
        let mut items = Vec::new();
        for item in object.try_iter()? {
            items.push(convert(&item?, depth + 1)?);
        }
        return Ok(Value::Array(items));
    }
    if !object.is_instance_of::<PyType>() {
        for method in ["tolist", "isoformat"] {
            if object.hasattr(method)? {
                return convert(&object.call_method0(method)?, depth + 1);
            }
        }
        if object.hasattr("keys")? {
            let dict = PyDict::new(object.py());
            dict.call_method1("update", (object,))?;
            return convert(&dict, depth + 1);
        }
    }
    let kind = object.get_type().fully_qualified_name()?;
    Err(Failure::Unfit(format!("expected text, numbers, lists and dicts, got {kind}")))
}

/// A text; Python's may hold halves of surrogate pairs.
fn text_of(text: &Bound<'_, PyString>) -> Result<String, Failure> {
    let read = text.to_cow().map(std::borrow::Cow::into_owned);
    read.map_err(|_| Failure::Unfit("a text with half of a surrogate pair, which stands for no character".to_owned()))
}
