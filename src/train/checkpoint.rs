//! Checkpoints: `output_dir/checkpoint-{step}`, written aside and renamed, complete only with its manifest.
//!
//! A folder holds the adapter in PEFT's form (or the whole model), `optimizer.safetensors`, `trainer_state.json` with the
//! log, and whatever the caller adds (tokenizer files). Data order and randomness are functions of seed and step, so
//! weights, optimizer and step are all that a bit-exact resume needs.

use super::optimizer::{NamedState, Optimizer, StateData};
use crate::error::{Error, Result};
use crate::io::atomic::{AtomicDir, DirState, sweep_stale, verify_dir};
use crate::io::safetensors::{Dtype, SafetensorsWriter, TensorFile, TensorSpec};
use crate::lora::peft;
use crate::model::Model;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The optimizer's state.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Step, settings and log history.
pub const STATE_FILE: &str = "trainer_state.json";
/// The weights of a fully trained model.
pub const MODEL_FILE: &str = "model.safetensors";
const PREFIX: &str = "checkpoint-";

/// The folder of a step's checkpoint.
pub fn path(output_dir: &Path, step: usize) -> PathBuf {
    output_dir.join(format!("{PREFIX}{step}"))
}

/// Writes `output_dir/checkpoint-{step}` and then removes the oldest complete ones beyond `limit`, but not `best`.
///
/// Without an optimizer no run can go on from it. `write_model` writes the weights (and the tokenizer) into the folder it
/// is given. Returns the checkpoint's path.
///
/// # Errors
/// [`Error::Io`], or what `write_model` returns; nothing half-written remains, and older checkpoints stay.
pub fn save(
    output_dir: &Path,
    step: usize,
    optimizer: Option<&dyn Optimizer>,
    state: &Value,
    limit: Option<usize>,
    best: Option<&Path>,
    write_model: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    std::fs::create_dir_all(output_dir).map_err(|e| Error::io(output_dir, e))?;
    sweep_stale(output_dir)?;
    let path = path(output_dir, step);
    let folder = AtomicDir::create(&path)?;
    write_model(folder.path())?;
    if let Some(optimizer) = optimizer {
        write_optimizer(&folder.path().join(OPTIMIZER_FILE), optimizer)?;
    }
    let text = serde_json::to_vec_pretty(state).expect("JSON values always serialise");
    crate::io::atomic::write_file(folder.path().join(STATE_FILE), &text)?;
    folder.commit(Some(step as u64))?;
    if let Some(limit) = limit {
        let mut complete = list(output_dir)?;
        complete.retain(|(_, path)| matches!(verify_dir(path), Ok(DirState::Complete(_))));
        // The newest is there to resume from; with the best beside it, even a limit of 1 leaves two.
        let protected = |old: &Path| old == path || Some(old) == best;
        let n_protected = complete.iter().filter(|(_, old)| protected(old)).count();
        let surplus = complete.len().saturating_sub(limit.max(n_protected));
        for (_, old) in complete.iter().filter(|(_, old)| !protected(old)).take(surplus) {
            std::fs::remove_dir_all(old).map_err(|e| Error::io(old, e))?;
        }
    }
    Ok(path)
}

/// Removes every complete checkpoint of `output_dir` but one.
///
/// # Errors
/// [`Error::Io`].
pub fn keep_only(output_dir: &Path, kept: &Path) -> Result<()> {
    for (_, path) in list(output_dir)? {
        if path != kept && verify(&path).is_ok() {
            std::fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

fn write_optimizer(path: &Path, optimizer: &dyn Optimizer) -> Result<()> {
    let state = optimizer.state();
    let specs: Vec<_> = state
        .iter()
        .map(|s| match &s.data {
            StateData::F32(data) => TensorSpec { name: s.name.clone(), dtype: Dtype::F32, shape: vec![data.len()] },
            StateData::U8(data) => TensorSpec { name: s.name.clone(), dtype: Dtype::U8, shape: vec![data.len()] },
        })
        .collect();
    let metadata = BTreeMap::from([("steps".to_owned(), optimizer.steps().to_string())]);
    let mut writer = SafetensorsWriter::create(path, &specs, &metadata)?;
    for s in &state {
        match &s.data {
            StateData::F32(data) => writer.write_f32(&s.name, data)?,
            StateData::U8(data) => writer.write(&s.name, data)?,
        }
    }
    writer.finish()
}

/// Restores an optimizer from a checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] if there is no file, or it does not belong to this optimizer; [`Error::Io`].
pub fn load_optimizer(folder: &Path, optimizer: &mut dyn Optimizer) -> Result<()> {
    let refuse = |problem: String| Error::Checkpoint { path: folder.to_owned(), problem };
    if !folder.join(OPTIMIZER_FILE).exists() {
        let problem =
            "holds the weights alone (save_only_model): from_pretrained opens it, but no run can go on from it";
        return Err(refuse(problem.to_owned()));
    }
    let file = TensorFile::open(folder.join(OPTIMIZER_FILE))?;
    let steps = file.metadata().get("steps").and_then(|s| s.parse().ok());
    let steps = steps.ok_or_else(|| refuse(format!("{OPTIMIZER_FILE} does not say how many steps it has taken")))?;
    let mut state = Vec::new();
    for name in file.names() {
        let data = match file.info(name)?.dtype {
            Dtype::U8 => {
                let mut bytes = Vec::new();
                file.read_bytes(name, &mut bytes)?;
                StateData::U8(Cow::Owned(bytes))
            }
            _ => StateData::F32(Cow::Owned(file.read_f32(name)?)),
        };
        state.push(NamedState { name: name.to_owned(), data });
    }
    optimizer.load_state(steps, state).map_err(|e| refuse(format!("{e}; was it made with other settings?")))
}

/// `trainer_state.json` of a checkpoint.
///
/// # Errors
/// [`Error::Io`]; [`Error::Checkpoint`] if it is no JSON.
pub fn read_state(folder: &Path) -> Result<Value> {
    let path = folder.join(STATE_FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::Checkpoint { path, problem: format!("not JSON: {e}") })
}

/// A checkpoint that was passed over, and why.
pub type Skipped = (PathBuf, String);

/// The newest complete checkpoint of `output_dir`, and the newer ones that were passed over.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed.
pub fn newest(output_dir: &Path) -> Result<(Option<PathBuf>, Vec<Skipped>)> {
    let mut skipped = Vec::new();
    for (_, path) in list(output_dir)?.into_iter().rev() {
        match verify(&path) {
            Ok(()) => return Ok((Some(path), skipped)),
            Err(reason) => skipped.push((path, reason)),
        }
    }
    Ok((None, skipped))
}

/// Whether a folder is a complete checkpoint, or why not.
///
/// # Errors
/// The reason.
pub fn verify(path: &Path) -> std::result::Result<(), String> {
    match verify_dir(path) {
        Ok(DirState::Complete(_)) => Ok(()),
        Ok(DirState::Incomplete { reason }) => Err(reason),
        Err(error) => Err(error.to_string()),
    }
}

/// The checkpoints of a folder by ascending step, complete or not; none if there is no such folder.
fn list(output_dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let entries = match std::fs::read_dir(output_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(output_dir, e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(output_dir, e))?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|step| step.parse().ok());
        if let Some(step) = step {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The `trainer_state.json` of a run, in transformers' spelling.
pub fn state_json(step: usize, epoch: f64, max_steps: usize, settings: &Value, log_history: &[Value]) -> Value {
    json!({
        "global_step": step,
        "epoch": epoch,
        "max_steps": max_steps,
        "rustune": { "version": env!("CARGO_PKG_VERSION"), "settings": settings },
        "log_history": log_history,
    })
}

/// Sets the model's trained tensors to those of a checkpoint or adapter folder.
///
/// # Errors
/// Those of [`peft::load_values`]: the model must have been set up as it was then.
pub fn load_params(folder: &Path, model: &mut Model) -> Result<()> {
    let adapter = folder.join(peft::WEIGHTS_FILE);
    if adapter.exists() {
        peft::load_values(model, &adapter, peft::PREFIX)
    } else {
        peft::load_values(model, &folder.join(MODEL_FILE), "")
    }
}
