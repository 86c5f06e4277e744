//! `Model`: loading, adapters, logits, generation and training (whose work is in `train.rs`).

use super::rows::Rows;
use super::tokenizer::Tokenizer;
use super::{enter, parse, train};
use crate::config::generate::Bans;
use crate::config::{GenerateOptions, LoraOptions, Quantization, QuantizationOptions, TrainOptions};
use crate::data::collate::collate;
use crate::data::rows::Example;
use crate::error::{Error, Result};
use crate::generate::constraints::ban;
use crate::generate::sampling::{Draw, Sampler, StopMatcher};
use crate::generate::{Chooser, decode};
use crate::io::os::with_pool;
use crate::io::safetensors::Dtype;
use crate::lora::peft::{self, Adapter};
use crate::model::vocab::NewToken;
use crate::model::{LoadOptions, Model as Core, Quantize, save};
use crate::ops::{Precision, Tokens};
use crate::train::plan::Checkpointing;
use crate::train::run::{Lender, computing, split};
use numpy::{PyArray1, PyArray2, PyArrayDyn, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::Duration;

/// A loaded model.
#[pyclass(module = "rustune._native", frozen)]
pub(super) struct Model {
    pub(super) state: RwLock<State>,
    /// Whether a run has it: then it may be read, and the run alone changes it.
    training: AtomicBool,
}

/// The model and the settings of its adapter.
pub(super) struct State {
    pub(super) core: Core,
    pub(super) adapter: Option<Adapter>,
}

impl State {
    /// Writes the adapter, or the whole model where all of it is trained.
    pub(super) fn save(&self, folder: &Path, base_model: Option<&str>) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        write_weights(&self.core, self.adapter.as_ref(), folder, base_model)
    }
}

/// See [`State::save`].
pub(super) fn write_weights(
    core: &Core,
    adapter: Option<&Adapter>,
    folder: &Path,
    base_model: Option<&str>,
) -> Result<()> {
    let Some(adapter) = adapter else { return save::save(core, folder, checkpoint_dtype(core)) };
    let base_model = base_model.map(str::to_owned).or_else(|| adapter.base_model.clone());
    peft::save(core, &Adapter { base_model, lora: adapter.lora.clone() }, folder)
}

/// The dtype that `config.json` names, in which a trained model is written back.
fn checkpoint_dtype(core: &Core) -> Dtype {
    let json = &core.config.json;
    match json["dtype"].as_str().or_else(|| json["torch_dtype"].as_str()) {
        Some("bfloat16") => Dtype::BF16,
        Some("float16") => Dtype::F16,
        _ => Dtype::F32,
    }
}

impl Model {
    /// The model to read; while it is being trained, between the changes that training makes.
    pub(super) fn read(&self) -> Result<RwLockReadGuard<'_, State>> {
        loop {
            match self.state.try_read() {
                Ok(guard) => return Ok(guard),
                Err(TryLockError::Poisoned(poison)) => return Ok(poison.into_inner()),
                Err(TryLockError::WouldBlock) if self.training.load(Ordering::Acquire) => std::thread::sleep(PAUSE),
                Err(TryLockError::WouldBlock) => return Err(busy()),
            }
        }
    }

    /// The model to change, unless it is in use.
    pub(super) fn write(&self) -> Result<RwLockWriteGuard<'_, State>> {
        let guard = match self.state.try_write() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poison)) => poison.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(busy()),
        };
        // Looked at with the lock in hand: whoever begins to train after this waits for the lock.
        if self.training.load(Ordering::Acquire) { Err(busy()) } else { Ok(guard) }
    }

    /// Keeps everyone but the caller from changing the model until the result is dropped; others may be reading it.
    pub(super) fn start_training(&self) -> Result<Training<'_>> {
        if self.training.swap(true, Ordering::AcqRel) { Err(busy()) } else { Ok(Training(&self.training)) }
    }
}

/// How long to wait before a lock is tried again. Nobody queues for it: a queued writer would keep out the thread that it
/// waits for, if that reads once more.
const PAUSE: Duration = Duration::from_millis(1);

/// A model that is being trained.
pub(super) struct Training<'a>(&'a AtomicBool);

impl Drop for Training<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Lender for Model {
    fn read(&self, work: &mut dyn FnMut(&Core) -> Result<()>) -> Result<()> {
        work(&Model::read(self)?.core)
    }

    fn write(&self, work: &mut dyn FnMut(&mut Core) -> Result<()>) -> Result<()> {
        loop {
            match self.state.try_write() {
                Ok(mut guard) => return work(&mut guard.core),
                Err(TryLockError::Poisoned(poison)) => return work(&mut poison.into_inner().core),
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        }
    }
}

fn busy() -> Error {
    Error::config("model", "in use", "the model is being trained or used by another thread; wait until that is done")
}

#[pymethods]
impl Model {
    /// Loads a Hugging Face folder.
    #[staticmethod]
    #[pyo3(signature = (folder, dtype, quantization, max_seq_length=None, rope_scaling=None))]
    fn load(
        py: Python<'_>,
        folder: PathBuf,
        dtype: Option<&str>,
        quantization: &str,
        max_seq_length: Option<usize>,
        rope_scaling: Option<&str>,
    ) -> PyResult<Self> {
        let options = load_options(dtype, quantization)?;
        let scaling: Option<Value> = rope_scaling.map(|text| parse("rope_scaling", text)).transpose()?;
        let mut core = enter(py, || with_pool(|| Core::load_for(&folder, &options, max_seq_length, scaling.as_ref())))?;
        if dtype.is_none() {
            core.usually_decode_in_16_bits();
        }
        Ok(Self { state: RwLock::new(State { core, adapter: None }), training: AtomicBool::new(false) })
    }

    /// Adds an untrained adapter; returns its settings as resolved.
    fn add_adapter(&self, py: Python<'_>, options: &str) -> PyResult<String> {
        let options: LoraOptions = parse("get_peft_model", options)?;
        enter(py, || {
            let mut state = self.write()?;
            let lora = options.resolve(state.core.llama.layers.len())?;
            let core = &mut state.core;
            with_pool(|| peft::attach(core, &lora))?;
            let text = json!(lora).to_string();
            state.adapter = Some(Adapter { base_model: None, lora });
            Ok(text)
        })
    }

    /// Gives the model a vocabulary of `n_tokens`; new rows are the mean of the old ones.
    fn resize_vocab(&self, py: Python<'_>, n_tokens: usize) -> PyResult<()> {
        enter(py, || with_pool(|| self.write()?.core.resize_vocab(n_tokens)))
    }

    /// Sets the rows of new tokens, given by their ids and the ids that spelled them before, in a vocabulary of at least
    /// `n_tokens`: the mean of all rows, `interpolation` of it replaced by the mean of the token's pieces.
    fn add_tokens(
        &self,
        py: Python<'_>,
        n_tokens: usize,
        tokens: Vec<(u32, Vec<u32>)>,
        interpolation: f64,
    ) -> PyResult<()> {
        let tokens: Vec<_> = tokens.into_iter().map(|(id, pieces)| NewToken { id, pieces }).collect();
        enter(py, || with_pool(|| self.write()?.core.add_tokens(n_tokens, &tokens, interpolation)))
    }

    /// Whether the head is the embedding table.
    #[getter]
    fn is_tied(&self) -> PyResult<bool> {
        Ok(self.read()?.core.llama.head.is_none())
    }

    /// Adds the trained adapter of a PEFT folder; returns its settings as resolved.
    fn load_adapter(&self, py: Python<'_>, folder: PathBuf) -> PyResult<String> {
        enter(py, || {
            let mut state = self.write()?;
            let core = &mut state.core;
            let adapter = with_pool(|| peft::load(core, &folder))?;
            let mut text = json!(adapter.lora);
            text["base_model_name_or_path"] = json!(adapter.base_model);
            state.adapter = Some(adapter);
            Ok(text.to_string())
        })
    }

    /// Writes the adapter as PEFT would.
    #[pyo3(signature = (folder, base_model=None))]
    fn save_adapter(&self, py: Python<'_>, folder: PathBuf, base_model: Option<String>) -> PyResult<()> {
        enter(py, || {
            let state = self.read()?;
            if state.adapter.is_none() {
                let expected = "has no adapter; call get_peft_model first";
                return Err(Error::config("save_pretrained", "model", expected));
            }
            state.save(&folder, base_model.as_deref())
        })
    }

    /// Writes a fully trained model: its config and its weights in the checkpoint's dtype.
    fn save_full(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        enter(py, || {
            let state = self.read()?;
            std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
            save::save(&state.core, &folder, checkpoint_dtype(&state.core))
        })
    }

    /// The text of config.json.
    #[getter]
    fn config(&self) -> PyResult<String> {
        Ok(self.read()?.core.config.json.to_string())
    }

    /// What GEMM operands are rounded to.
    #[getter]
    fn products(&self) -> PyResult<&'static str> {
        Ok(self.read()?.core.ctx.precision.name())
    }

    /// Where the model came from.
    #[getter]
    fn folder(&self) -> PyResult<PathBuf> {
        Ok(self.read()?.core.folder.clone())
    }

    /// Whether there is an adapter.
    #[getter]
    fn has_adapter(&self) -> PyResult<bool> {
        Ok(self.read()?.adapter.is_some())
    }

    /// Bits of the head in generation: 8, or None for the head as it is.
    fn set_lm_head_bits(&self, py: Python<'_>, bits: Option<u32>) -> PyResult<()> {
        enter(py, || with_pool(|| self.write()?.core.set_lm_head_bits(bits)))
    }

    /// Bits of the layers' inputs in generation: 8, or None for inputs as they are.
    fn set_activation_bits(&self, bits: Option<u32>) -> PyResult<()> {
        Ok(self.write()?.core.set_activation_bits(bits)?)
    }

    /// Whether every tensor is trained.
    #[getter]
    fn is_fully_trained(&self) -> PyResult<bool> {
        let state = self.read()?;
        Ok(state.adapter.is_none() && !state.core.params.all().is_empty())
    }

    /// Trainable elements.
    #[getter]
    fn n_trainable(&self) -> PyResult<usize> {
        Ok(self.read()?.core.params.n_elements())
    }

    /// All elements, those of the adapter included.
    #[getter]
    fn n_parameters(&self) -> PyResult<usize> {
        Ok(self.read()?.core.n_parameters())
    }

    /// Bytes of all weights.
    #[getter]
    fn nbytes(&self) -> PyResult<usize> {
        Ok(self.read()?.core.nbytes())
    }

    /// Tokens that end a generation.
    #[getter]
    fn eos_token_ids(&self) -> PyResult<Vec<u32>> {
        Ok(self.read()?.core.config.eos_token_ids.clone())
    }

    /// The token that fills short rows.
    #[getter]
    fn pad_token_id(&self) -> PyResult<Option<u32>> {
        Ok(self.read()?.core.config.pad_token_id)
    }

    /// The length the model was made for.
    #[getter]
    fn max_position_embeddings(&self) -> PyResult<usize> {
        Ok(self.read()?.core.config.max_position_embeddings)
    }

    /// The length the model was made for, which `max_seq_length` may have exceeded.
    #[getter]
    fn original_positions(&self) -> PyResult<usize> {
        Ok(self.read()?.core.config.original_positions)
    }

    /// Number of tokens.
    #[getter]
    fn vocab_size(&self) -> PyResult<usize> {
        Ok(self.read()?.core.config.vocab_size)
    }

    /// Logits of each row, f32 `[len, vocab]`.
    fn logits<'py>(&self, py: Python<'py>, rows: Vec<Vec<u32>>) -> PyResult<Vec<Bound<'py, PyArray2<f32>>>> {
        let (logits, vocab) = enter(py, || {
            let state = self.read()?;
            let tokens = Tokens::from_sequences(rows.iter().map(|row| &row[..]));
            Ok((with_pool(|| state.core.logits(&tokens))?, state.core.config.vocab_size))
        })?;
        let mut rest = &logits[..];
        rows.iter()
            .map(|row| {
                let (part, tail) = rest.split_at(row.len() * vocab);
                rest = tail;
                PyArray1::from_slice(py, part).reshape([row.len(), vocab])
            })
            .collect()
    }

    /// For each row, the negative log-likelihood of the next label, f32 `[len]`; 0 where it is -100 and at the end.
    fn token_losses<'py>(
        &self,
        py: Python<'py>,
        rows: Vec<Vec<u32>>,
        labels: Vec<Vec<i32>>,
    ) -> PyResult<Vec<Bound<'py, PyArray1<f32>>>> {
        if rows.len() != labels.len() || rows.iter().zip(&labels).any(|(row, labels)| row.len() != labels.len()) {
            let got = labels.iter().map(Vec::len).collect();
            return Err(Error::Shape { op: "labels", expected: "the lengths of input_ids".into(), got }.into());
        }
        let examples: Vec<_> =
            rows.into_iter().zip(labels).map(|(input_ids, labels)| Example { input_ids, labels }).collect();
        let losses = enter(py, || {
            let state = self.read()?;
            let batch = collate(&examples.iter().zip(0..).collect::<Vec<_>>());
            let (tokens, targets) = split(batch);
            with_pool(|| state.core.token_losses(&tokens, &targets))
        })?;
        let mut rest = &losses[..];
        Ok(examples
            .iter()
            .map(|row| {
                let (part, tail) = rest.split_at(row.input_ids.len());
                rest = tail;
                PyArray1::from_slice(py, part)
            })
            .collect())
    }

    /// Continues each prompt; returns the new ids, `num_return_sequences` for each prompt.
    ///
    /// on_step: called after each step with the new token of each sequence, None for those that are over; gives a list
    /// that says for each whether it ends here, or an empty one.
    #[pyo3(signature = (prompts, options, tokenizer=None, on_step=None))]
    fn generate(
        &self,
        py: Python<'_>,
        prompts: Vec<Vec<u32>>,
        options: &str,
        tokenizer: Option<&Tokenizer>,
        on_step: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Vec<u32>>> {
        let options: GenerateOptions = parse("generate", options)?;
        let settings = options.resolve()?;
        let tokenizer = tokenizer.map(Tokenizer::shared);
        if !settings.stop_strings.is_empty() && tokenizer.is_none() {
            let expected = "needs the tokenizer: pass tokenizer=";
            return Err(Error::config("stop_strings", settings.stop_strings.join(", "), expected).into());
        }
        enter(py, || {
            let state = self.read()?;
            let prompts: Vec<_> = prompts
                .iter()
                .flat_map(|prompt| std::iter::repeat_n(prompt.clone(), settings.num_return_sequences))
                .collect();
            let mut chooser = Chosen {
                sampler: Sampler::new(settings.sampling, settings.repetition_penalty, settings.seed),
                bans: settings.bans.clone(),
                eos: settings.eos_token_ids.clone().unwrap_or_else(|| state.core.config.eos_token_ids.clone()),
                tokenizer,
                stops: vec![StopMatcher::new(settings.stop_strings.iter().cloned()); prompts.len()],
                shown: vec![0; prompts.len()],
                stop_strings: !settings.stop_strings.is_empty(),
                on_step,
            };
            computing(&mut train::PyObserver::silent(), |poll| {
                decode(&state.core, &prompts, settings.max_new_tokens, &mut chooser, poll)
            })
        })
    }

    /// Trains on tokenised rows; returns the outcome as JSON.
    #[pyo3(signature = (train, eval, options, checkpointing="unsloth", resume=None, observer=None, tokenizer=None, base_model=None))]
    #[expect(clippy::too_many_arguments, reason = "one call from the Python trainer, all by name")]
    fn train(
        &self,
        py: Python<'_>,
        train: &Rows,
        eval: Option<&Rows>,
        options: &str,
        checkpointing: &str,
        resume: Option<PathBuf>,
        observer: Option<Py<PyAny>>,
        tokenizer: Option<&Tokenizer>,
        base_model: Option<String>,
    ) -> PyResult<String> {
        let call = train::Call {
            eval: eval.map(|rows| rows.examples.clone()),
            options: parse("SFTConfig", options)?,
            checkpointing: Checkpointing::from_name(checkpointing)?,
            resume,
            observer,
            tokenizer: tokenizer.map(Tokenizer::shared),
            base_model,
        };
        let rows = train.examples.clone();
        enter(py, || train::train(self, &rows, call))
    }

    /// What `train` with the same arguments would take of this machine's memory, as JSON: bytes of the parts, `peak`,
    /// `available` and `fits`.
    fn training_memory(&self, py: Python<'_>, train: &Rows, options: &str, checkpointing: &str) -> PyResult<String> {
        let options: TrainOptions = parse("SFTConfig", options)?;
        let asked = Checkpointing::from_name(checkpointing)?;
        let rows = train.examples.clone();
        enter(py, || train::training_memory(self, &rows, &options, asked))
    }

    /// Of the rows from `start` to `stop`: the logits of each, f32 `[len, vocab]`, the sum of the token losses, and the
    /// number of tokens that have a label.
    fn predict<'py>(&self, py: Python<'py>, rows: &Rows, start: usize, stop: usize) -> PyResult<Predicted<'py>> {
        let examples = rows.examples.clone();
        let Some(examples) = examples.get(start..stop) else {
            let got = vec![start, stop];
            return Err(
                Error::Shape { op: "predict", expected: format!("rows of {}", rows.examples.len()), got }.into()
            );
        };
        let (logits, sum, trained, vocab) = enter(py, || {
            let state = self.read()?;
            let batch = collate(&examples.iter().zip(start as u32..).collect::<Vec<_>>());
            let trained = batch.n_trained();
            let (tokens, targets) = split(batch);
            let (logits, losses) = with_pool(|| state.core.logits_and_losses(&tokens, &targets))?;
            let sum = losses.iter().map(|&v| f64::from(v)).sum::<f64>();
            Ok((logits, sum, trained, state.core.config.vocab_size))
        })?;
        let mut rest = &logits[..];
        let arrays = examples.iter().map(|row| {
            let (part, tail) = rest.split_at(row.input_ids.len() * vocab);
            rest = tail;
            PyArray1::from_slice(py, part).reshape([row.input_ids.len(), vocab])
        });
        Ok((arrays.collect::<PyResult<_>>()?, sum, trained))
    }

    /// Mean token loss over rows, and the number of tokens it is the mean of.
    #[pyo3(signature = (rows, batch_size, observer=None))]
    fn evaluate(
        &self,
        py: Python<'_>,
        rows: &Rows,
        batch_size: usize,
        observer: Option<Py<PyAny>>,
    ) -> PyResult<(f64, usize)> {
        let rows = rows.examples.clone();
        enter(py, || train::evaluate(self, &rows, batch_size, observer))
    }

    /// The names and shapes of the trainable tensors.
    #[getter]
    fn parameter_shapes(&self) -> PyResult<Vec<(String, Vec<usize>)>> {
        Ok(self.read()?.core.params.all().iter().map(|param| (param.name.clone(), param.shape.clone())).collect())
    }

    /// Copies of the trainable tensors by name.
    fn parameters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for param in self.read()?.core.params.all() {
            let array: Bound<'py, PyArrayDyn<f32>> =
                PyArray1::from_slice(py, &param.data).reshape(param.shape.clone())?;
            dict.set_item(&param.name, array)?;
        }
        Ok(dict)
    }
}

/// How a checkpoint becomes a model, as it was asked for.
pub(super) fn load_options(dtype: Option<&str>, quantization: &str) -> Result<LoadOptions> {
    let quantization: QuantizationOptions = parse("quantization", quantization)?;
    let precision = match dtype {
        None => Precision::best(crate::kernels::active()?),
        Some(name) => Precision::ALL
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| Error::config("dtype", name, "expected float32, bfloat16, int16 or None"))?,
    };
    let full_finetuning = quantization.full_finetuning == Some(true);
    let quantize = match quantization.resolve()? {
        Quantization::None => None,
        Quantization::Int8 => Some(Quantize::Int8),
        Quantization::Nf4 { block_size, double_quant } => Some(Quantize::Nf4 { block_size, double_quant }),
    };
    Ok(LoadOptions { precision, quantize, full_finetuning })
}

/// The logits of each row, the sum of their token losses, and the number of tokens that have a label.
type Predicted<'py> = (Vec<Bound<'py, PyArray2<f32>>>, f64, usize);

/// A Python exception on its way through Rust.
pub(super) fn callback(error: PyErr) -> Error {
    Error::Callback(Box::new(error))
}

/// The user's settings and callback, as the decode loop asks for them.
struct Chosen {
    sampler: Sampler,
    bans: Bans,
    eos: Vec<u32>,
    tokenizer: Option<Arc<crate::data::tokenizer::Tokenizer>>,
    stops: Vec<StopMatcher>,
    /// Bytes of each sequence's text that its stop matcher has seen.
    shown: Vec<usize>,
    stop_strings: bool,
    on_step: Option<Py<PyAny>>,
}

impl Chooser for Chosen {
    fn choose(&mut self, seq: usize, ids: &[u32], n_new: usize, logits: &mut [f32]) -> u32 {
        ban(&self.bans, logits, ids, n_new, &self.eos);
        self.sampler.choose(logits, ids, Draw { sequence: seq as u32, position: ids.len() as u32 })
    }

    fn accept(&mut self, seq: usize, token: u32, new_ids: &[u32]) -> Result<bool> {
        let mut ends = self.eos.contains(&token);
        if let (true, Some(tokenizer)) = (self.stop_strings, &self.tokenizer) {
            let text = tokenizer.decode(new_ids, true)?;
            // A piece that ends inside a character decodes differently once the rest is there: wait for it.
            if !text.ends_with('\u{FFFD}') && text.is_char_boundary(self.shown[seq]) {
                let mut out = String::new();
                ends |= self.stops[seq].push(text.get(self.shown[seq]..).unwrap_or_default(), &mut out);
                self.shown[seq] = text.len();
            }
        }
        Ok(ends)
    }

    fn stepped(&mut self, tokens: &[Option<u32>]) -> Result<Vec<bool>> {
        let Some(on_step) = &self.on_step else { return Ok(Vec::new()) };
        Python::attach(|py| on_step.call1(py, (tokens.to_vec(),))?.extract::<Vec<bool>>(py)).map_err(callback)
    }
}

/// Adds the class to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Model>()
}
