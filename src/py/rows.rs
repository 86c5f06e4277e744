//! `Rows`: a tokenised dataset.

use super::enter;
use super::json::from_python;
use super::tokenizer::Tokenizer;
use crate::data::masking::{Markers, ResponseMasker};
use crate::data::packing::pack;
use crate::data::rows::{Example, RowOptions, RowReader};
use crate::error::Error;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator};
use serde_json::Value;
use std::sync::Arc;

/// Tokenised rows with their labels.
#[pyclass(module = "rustune._native", frozen)]
pub(super) struct Rows {
    pub(super) examples: Arc<Vec<Example>>,
    report: String,
}

#[pymethods]
impl Rows {
    /// Reads and tokenises a dataset given as batches of columns.
    #[staticmethod]
    fn read(
        py: Python<'_>,
        tokenizer: Option<&Tokenizer>,
        options: &str,
        batches: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let options: RowOptions = super::parse("dataset options", options)?;
        let guard = tokenizer.map(Tokenizer::shared);
        let mut reader = RowReader::new(guard.as_deref(), options);
        let mut batches = PyIterator::from_object(batches)?;
        while !reader.is_full() {
            let Some(batch) = batches.next() else { break };
            let columns = columns(&batch?.cast_into::<PyDict>()?, &reader)?;
            let reader = &mut reader;
            enter(py, move || reader.push(&columns))?;
        }
        let (examples, report) = enter(py, move || reader.finish())?;
        let report = serde_json::to_string(&report).map_err(|e| Error::data("dataset report", e.to_string()))?;
        Ok(Self { examples: Arc::new(examples), report })
    }

    fn __len__(&self) -> usize {
        self.examples.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, i: isize) -> PyResult<Bound<'py, PyDict>> {
        let at = if i < 0 { i + self.examples.len() as isize } else { i };
        let row = usize::try_from(at).ok().and_then(|at| self.examples.get(at));
        let row = row.ok_or_else(|| PyIndexError::new_err(format!("row {i} of {}", self.examples.len())))?;
        let dict = PyDict::new(py);
        dict.set_item("input_ids", row.input_ids.clone())?;
        dict.set_item("labels", row.labels.clone())?;
        Ok(dict)
    }

    /// What reading did, as JSON: rows, kept, cut, tokens_lost, empty, untrained.
    #[getter]
    fn report(&self) -> &str {
        &self.report
    }

    /// Tokens of all rows.
    #[getter]
    fn n_tokens(&self) -> usize {
        self.examples.iter().map(|row| row.input_ids.len()).sum()
    }

    /// Tokens with a label.
    #[getter]
    fn n_trained(&self) -> usize {
        self.examples.iter().map(|row| row.labels.iter().skip(1).filter(|label| **label >= 0).count()).sum()
    }

    /// Tokens of the longest row.
    #[getter]
    fn longest(&self) -> usize {
        self.examples.iter().map(|row| row.input_ids.len()).max().unwrap_or(0)
    }

    /// Number of packed rows of up to `max_length` tokens that the rows are put together to.
    fn n_packed(&self, max_length: usize) -> usize {
        let lengths: Vec<usize> = self.examples.iter().map(|row| row.input_ids.len()).collect();
        pack(&lengths, max_length).len()
    }

    /// The rows with labels on answers only, the two markers, and how many rows had no answer and were dropped.
    fn train_on_responses_only(
        &self,
        py: Python<'_>,
        tokenizer: &Tokenizer,
        instruction_part: Option<String>,
        response_part: Option<String>,
    ) -> PyResult<(Self, String, String, usize)> {
        let tokenizer = tokenizer.shared();
        let mut examples = self.examples.as_ref().clone();
        let report = self.report.clone();
        enter(py, move || {
            let markers = match (instruction_part, response_part) {
                (Some(instruction), Some(response)) => Markers { instruction, response },
                (None, None) => Markers::from_template(&tokenizer)?,
                _ => {
                    let expected = "give both instruction_part and response_part, or neither";
                    return Err(Error::config("train_on_responses_only", "one marker", expected));
                }
            };
            let (instruction, response) = (markers.instruction.clone(), markers.response.clone());
            let dropped = ResponseMasker::new(&tokenizer, markers)?.apply(&mut examples)?;
            Ok((Self { examples: Arc::new(examples), report }, instruction, response, dropped))
        })
    }
}

/// A batch of columns, `{name: [value of each row]}`; those that nobody reads, whatever they hold, hold nothing.
fn columns(batch: &Bound<'_, PyDict>, reader: &RowReader<'_>) -> PyResult<Vec<(String, Vec<Value>)>> {
    let mut columns = Vec::with_capacity(batch.len());
    for (name, values) in batch {
        let name = name.str()?.to_string_lossy().into_owned();
        let values = if reader.reads(&name) {
            let row = |i: usize| format!("row {}: column {name:?}", reader.n_read() + i);
            let values = values.try_iter()?.enumerate();
            values.map(|(i, value)| from_python(&row(i), &value?)).collect::<PyResult<_>>()?
        } else {
            vec![Value::Null; values.len()?]
        };
        columns.push((name, values));
    }
    Ok(columns)
}

/// Adds the class to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Rows>()
}
