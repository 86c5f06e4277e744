//! Training and evaluation behind `Model`'s methods, and the Python observer they report to.

use super::json;
use super::model::{Model, callback, write_weights};
use crate::config::TrainOptions;
use crate::data::rows::Example;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::train::plan::{Checkpointing, Run};
use crate::train::{Control, Event, Job, Observer, Recompute, Settings, Status, run};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A Python object with a method `event(name, status, payload) -> dict | None`.
pub(super) struct PyObserver {
    object: Option<Py<PyAny>>,
}

impl PyObserver {
    /// An observer that only polls for signals.
    pub(super) fn silent() -> Self {
        Self { object: None }
    }

    /// Calls `event` and reads what it asks for.
    fn call(&self, py: Python<'_>, event: Event<'_>, status: &Status, control: &mut Control) -> PyResult<()> {
        let Some(object) = &self.object else { return Ok(()) };
        let (name, payload) = describe(py, event, *control)?;
        let answer = object.bind(py).call_method1("event", (name, described(status), payload))?;
        if answer.is_none() {
            return Ok(());
        }
        let answer = answer.cast_into::<PyDict>()?;
        for (key, value) in answer {
            let value: bool = value.extract()?;
            match key.extract::<String>()?.as_str() {
                "stop" => control.stop = value,
                "log" => control.log = value,
                "evaluate" => control.evaluate = value,
                "save" => control.save = value,
                other => {
                    return Err(Error::config("observer", other, "expected stop, log, evaluate or save").into());
                }
            }
        }
        Ok(())
    }
}

/// A status as Python reads it.
fn described(status: &Status) -> String {
    json!({
        "step": status.step,
        "epoch": status.epoch,
        "max_steps": status.max_steps,
        "tokens": status.tokens,
        "best_metric": status.best_metric,
        "best_global_step": status.best_step,
        "best_model_checkpoint": status.best_checkpoint,
    })
    .to_string()
}

/// An event's name and payload.
fn describe(py: Python<'_>, event: Event<'_>, control: Control) -> PyResult<(&'static str, Py<PyAny>)> {
    let asked = || -> PyResult<Py<PyAny>> {
        let dict = PyDict::new(py);
        for (key, value) in
            [("stop", control.stop), ("log", control.log), ("evaluate", control.evaluate), ("save", control.save)]
        {
            dict.set_item(key, value)?;
        }
        dict.into_py_any(py)
    };
    Ok(match event {
        Event::TrainBegin => ("train_begin", py.None()),
        Event::EpochBegin => ("epoch_begin", py.None()),
        Event::StepBegin => ("step_begin", py.None()),
        Event::SubstepEnd => ("substep_end", py.None()),
        Event::StepEnd => ("step_end", asked()?),
        Event::Log(entry) => ("log", json::to_python(py, &Value::Object(entry.clone()))?.unbind()),
        Event::Evaluate(entry) => ("evaluate", json::to_python(py, &Value::Object(entry.clone()))?.unbind()),
        Event::Save(path) => ("save", path.to_string_lossy().into_py_any(py)?),
        Event::EpochEnd => ("epoch_end", asked()?),
        Event::TrainEnd => ("train_end", py.None()),
        Event::Warning(text) => ("warning", text.into_py_any(py)?),
    })
}

impl Observer for PyObserver {
    fn event(&mut self, event: Event<'_>, status: &Status, control: &mut Control) -> Result<()> {
        Python::attach(|py| self.call(py, event, status, control)).map_err(callback)
    }

    fn evaluate(&mut self, status: &Status) -> Result<Option<Map<String, Value>>> {
        let Some(object) = &self.object else { return Ok(None) };
        Python::attach(|py| {
            let answer = object.bind(py).call_method1("evaluate", (described(status),))?;
            let Value::Object(entry) = json::from_python("compute_metrics", &answer)? else { return Ok(None) };
            Ok(Some(entry))
        })
        .map_err(callback)
    }

    fn poll(&mut self) -> Result<()> {
        #[expect(
            clippy::redundant_closure_for_method_calls,
            reason = "the method itself is not general over lifetimes"
        )]
        Python::attach(|py| py.check_signals()).map_err(callback)
    }
}

/// What `Model.train` was called with.
pub(super) struct Call {
    pub(super) eval: Option<Arc<Vec<Example>>>,
    pub(super) options: TrainOptions,
    pub(super) checkpointing: Checkpointing,
    pub(super) resume: Option<PathBuf>,
    pub(super) observer: Option<Py<PyAny>>,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) base_model: Option<String>,
}

/// Trains a model on rows; returns the outcome as JSON.
pub(super) fn train(model: &Model, rows: &[Example], call: Call) -> Result<String> {
    let mut settings = Settings::new(call.options.resolve()?, rows, Recompute::EveryLayer)?;
    let _training = model.start_training()?;
    let n_tokens = settings.largest_micro_batch();
    let state = model.read()?;
    let forecast = Run::of(&state.core, settings.train.optimizer, n_tokens).forecast_here(call.checkpointing);
    settings.recompute = forecast.recompute;
    let adapter = state.adapter.clone();
    drop(state);
    let write_model = |core: &crate::model::Model, folder: &Path| {
        write_weights(core, adapter.as_ref(), folder, call.base_model.as_deref())?;
        call.tokenizer.as_ref().map_or(Ok(()), |tokenizer| tokenizer.save(folder))
    };
    let eval = call.eval.unwrap_or_default();
    let job = Job {
        model,
        train: rows,
        eval: &eval,
        settings: &settings,
        resume: call.resume.as_deref(),
        write_model: &write_model,
    };
    let outcome = run::run(job, &mut PyObserver { object: call.observer })?;
    let status = &outcome.status;
    Ok(json!({
        "global_step": status.step,
        "epoch": status.epoch,
        "training_loss": outcome.training_loss,
        "seconds": outcome.seconds,
        "steps": outcome.steps,
        "rows": outcome.rows,
        "tokens": status.tokens,
        "log_history": status.log_history,
    })
    .to_string())
}

/// What `train` would take of this machine's memory, as JSON.
pub(super) fn training_memory(
    model: &Model,
    rows: &[Example],
    options: &TrainOptions,
    asked: Checkpointing,
) -> Result<String> {
    let settings = Settings::new(options.resolve()?, rows, Recompute::EveryLayer)?;
    let n_tokens = settings.largest_micro_batch();
    let run = Run::of(&model.read()?.core, settings.train.optimizer, n_tokens);
    Ok(json!(run.forecast_here(asked)).to_string())
}

/// Mean token loss over rows, and the number of tokens it is the mean of.
pub(super) fn evaluate(
    model: &Model,
    rows: &[Example],
    batch_size: usize,
    observer: Option<Py<PyAny>>,
) -> Result<(f64, usize)> {
    run::evaluate(&model.read()?.core, rows, batch_size, &mut PyObserver { object: observer })
}
