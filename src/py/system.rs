//! Module functions about the machine, checkpoints, the hub and settings.

use super::model::{callback, load_options};
use super::{enter, parse};
use crate::config::{LoraOptions, OptimizerKind, TrainOptions};
use crate::io::hub::{HubEvent, HubOptions, resolve_with};
use crate::io::os;
use crate::kernels;
use crate::model::ModelConfig;
use crate::ops::probe::{peak_flops, read_bandwidth};
use crate::ops::{Ctx, Precision};
use crate::train::checkpoint::{self, Skipped};
use crate::train::plan::{Checkpointing, Run};
use pyo3::prelude::*;
use serde_json::json;
use std::path::PathBuf;

/// Sets the number of threads that everything after this call computes with.
#[pyfunction]
fn set_num_threads(n_threads: usize) -> PyResult<()> {
    Ok(os::set_num_threads(n_threads)?)
}

/// The number of threads that computations use.
#[pyfunction]
fn num_threads() -> PyResult<usize> {
    Ok(os::num_threads()?)
}

/// What rustune runs on, as JSON.
#[pyfunction]
fn info() -> PyResult<String> {
    let isas: Vec<_> = kernels::available().iter().map(|table| table.isa).collect();
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "isa": kernels::active()?.isa,
        "available_isas": isas,
        "prefers_bfloat16": kernels::active()?.prefers_bf16(),
        "products": Precision::best(kernels::active()?).name(),
        "threads": os::num_threads()?,
        "cpus": os::granted_cpus(),
        "total_memory_bytes": os::total_memory_bytes(),
        "available_memory_bytes": os::available_memory_bytes(),
        "peak_rss_bytes": os::peak_rss_bytes(),
    })
    .to_string())
}

/// The newest complete checkpoint of a folder, and the newer ones that were passed over with the reason.
#[pyfunction]
fn newest_checkpoint(py: Python<'_>, output_dir: PathBuf) -> PyResult<(Option<PathBuf>, Vec<Skipped>)> {
    enter(py, || checkpoint::newest(&output_dir))
}

/// The folder of a model: a local one as it is, or that of a hub repository, downloaded where needed.
///
/// `on_event(kind, text, done, total)` hears of progress (bytes of the file `text`) and warnings.
#[pyfunction]
#[pyo3(signature = (name, revision=None, token=None, cache_dir=None, local_files_only=false, on_event=None))]
fn resolve_model(
    py: Python<'_>,
    name: String,
    revision: Option<String>,
    token: Option<String>,
    cache_dir: Option<PathBuf>,
    local_files_only: bool,
    on_event: Option<Py<PyAny>>,
) -> PyResult<PathBuf> {
    let options = HubOptions { revision, token, cache_dir, local_files_only };
    let mut observe = |event: &HubEvent<'_>| {
        let heard = Python::attach(|py| {
            py.check_signals()?;
            let Some(on_event) = &on_event else { return Ok(()) };
            match event {
                HubEvent::Progress { file, done_bytes, total_bytes } => {
                    on_event.call1(py, ("progress", *file, *done_bytes, *total_bytes)).map(drop)
                }
                HubEvent::Warning(text) => on_event.call1(py, ("warning", *text, 0, 0)).map(drop),
                HubEvent::Waiting => Ok(()),
            }
        });
        heard.map_err(callback)
    };
    enter(py, || resolve_with(&name, &options, &mut observe))
}

/// Settings as they will run over `n_rows` rows, as JSON.
#[pyfunction]
fn resolve_train_options(options: &str, n_rows: usize) -> PyResult<String> {
    let options: TrainOptions = parse("SFTConfig", options)?;
    let train = options.resolve()?;
    let plan = train.plan(n_rows)?;
    Ok(json!({ "train": train, "plan": plan }).to_string())
}

/// The most that this machine reaches, as JSON: `flops` of products in `dtype` and `read_bytes`, each a second.
///
/// Takes a second or two.
#[pyfunction]
fn measure_peak(py: Python<'_>, dtype: &str) -> PyResult<String> {
    let options = load_options(Some(dtype), "{}")?;
    let measured = enter(py, || {
        os::with_pool(|| {
            let ctx = Ctx::new(options.precision)?;
            Ok(json!({"flops": peak_flops(&ctx), "read_bytes": read_bandwidth(&ctx)}))
        })
    })?;
    Ok(measured.to_string())
}

/// What training a model would take before it is loaded, as JSON like that of `Model.training_memory`.
///
/// folder: has a `config.json`; lora: arguments of `get_peft_model`; available: of this machine if not given.
#[pyfunction]
#[pyo3(signature = (folder, quantization, lora, n_tokens, dtype=None, optim="adamw_8bit", checkpointing="unsloth", available=None))]
#[expect(clippy::too_many_arguments, reason = "one call from the Python side, all by name")]
fn estimate_memory(
    py: Python<'_>,
    folder: PathBuf,
    quantization: &str,
    lora: &str,
    n_tokens: usize,
    dtype: Option<&str>,
    optim: &str,
    checkpointing: &str,
    available: Option<u64>,
) -> PyResult<String> {
    let options = load_options(dtype, quantization)?;
    let lora: LoraOptions = parse("get_peft_model", lora)?;
    let (optimizer, asked) = (OptimizerKind::resolve(optim, "")?, Checkpointing::from_name(checkpointing)?);
    enter(py, || {
        let config = ModelConfig::read(&folder)?;
        let run = Run::planned(&config, &options, &lora.resolve(config.num_layers)?, optimizer, n_tokens)?;
        let weights = run.weights as u64;
        let available = available.or_else(os::available_memory_bytes).map(|bytes| bytes.saturating_sub(weights));
        Ok(json!(run.forecast(asked, os::rss_bytes().map(|now| now + weights), available)).to_string())
    })
}

/// Adds the functions to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(info, module)?)?;
    module.add_function(wrap_pyfunction!(resolve_model, module)?)?;
    module.add_function(wrap_pyfunction!(newest_checkpoint, module)?)?;
    module.add_function(wrap_pyfunction!(estimate_memory, module)?)?;
    module.add_function(wrap_pyfunction!(measure_peak, module)?)?;
    module.add_function(wrap_pyfunction!(resolve_train_options, module)?)
}
