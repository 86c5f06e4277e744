//! PEFT's adapter folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A key of the config that would change the numbers and is not supported is an error that names it; what it would do
//! silently is exactly what must not happen. Tensors: `base_model.model.{module}.lora_A.weight` `[r, in]` and
//! `lora_B.weight` `[out, r]`, with DoRA `lora_magnitude_vector` `[out]`; `base_model.model.{module}.weight` of a module trained whole, and of the embedding table and
//! the head where they are not the base's. What is trained is f32, what is frozen as the base stores it.
//! Patterns follow PEFT: a key applies to a module if `(.*\.)?(key)$` matches its name.

use super::converted::{self, Form};
use super::svd::Rounds;
use super::whole::{self, Whole};
use super::{Init, Placement, inject, module_name};
use crate::config::lora::{ALL_LINEAR, InitWeights, Lora, LoraOptions, is_table};
use crate::error::{Error, Result};
use crate::io::safetensors::{Dtype, SafetensorsWriter, TensorFile, TensorSpec};
use crate::model::Model;
use crate::model::llama::{LINEAR_NAMES, Layer};
use crate::model::vocab::Which;
use crate::model::weights::to_bytes;
use crate::ops::linear::Matrix;
use crate::ops::weight::Storage;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The two files of an adapter.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// See [`CONFIG_FILE`].
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What stands before a module's name in the weights file.
pub const PREFIX: &str = "base_model.model.";

/// Keys that say nothing about the numbers, or that are read below.
const HARMLESS: [&str; 23] = [
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_type",
    "peft_version",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
    "loftq_config",
];

/// An adapter's settings and the base model it names.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The base model as `adapter_config.json` names it.
    pub base_model: Option<String>,
    /// The settings.
    pub lora: Lora,
}

/// alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023).
fn scale(lora: &Lora, rank: usize, alpha: f64) -> f32 {
    let denominator = if lora.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
    (alpha / denominator) as f32
}

/// The adapters that settings describe in a model of `n_layers`.
///
/// # Errors
/// [`Error::Config`] for a target that is no linear layer of the decoder, or a layer that does not exist.
pub fn placements(lora: &Lora, n_layers: usize) -> Result<Vec<Placement>> {
    for target in &lora.target_modules {
        let hit = |layer: usize| (0..LINEAR_NAMES.len()).any(|linear| ends_with(&module_name(layer, linear), target));
        if !(0..n_layers).any(hit) {
            let expected = format!("no linear layer has this name; expected some of {}", ALL_LINEAR.join(", "));
            return Err(Error::config("target_modules", target, expected));
        }
    }
    if let Some(layer) = lora.layers_to_transform.iter().flatten().find(|&&layer| layer >= n_layers) {
        let expected = format!("the model has layers 0 to {}", n_layers.saturating_sub(1));
        return Err(Error::config("layers_to_transform", layer, expected));
    }
    let wanted = |layer: &usize| lora.layers_to_transform.as_ref().is_none_or(|layers| layers.contains(layer));
    let mut placements = Vec::new();
    for layer_idx in (0..n_layers).filter(wanted) {
        for linear_idx in 0..LINEAR_NAMES.len() {
            let module = module_name(layer_idx, linear_idx);
            if lora.target_modules.iter().any(|target| ends_with(&module, target)) {
                let rank = lookup(&lora.rank_pattern, &module).copied().unwrap_or(lora.r);
                let alpha = lookup(&lora.alpha_pattern, &module).copied().unwrap_or(lora.lora_alpha);
                let (scale, dropout, dora) = (scale(lora, rank, alpha), lora.lora_dropout as f32, lora.use_dora);
                placements.push(Placement { layer_idx, linear_idx, rank, scale, dropout, dora });
            }
        }
    }
    Ok(placements)
}

/// Adds an untrained adapter to a model that has none, and has the modules to save trained from where they are.
///
/// # Errors
/// Those of [`placements`], [`whole::modules`] and [`inject`].
pub fn attach(model: &mut Model, lora: &Lora) -> Result<()> {
    let n_layers = model.llama.layers.len();
    let places = placements(lora, n_layers)?;
    let wholes = whole::modules(lora, n_layers, model.llama.head.is_none())?;
    let init = match lora.init_lora_weights {
        InitWeights::Uniform => Init::Uniform,
        InitWeights::Gaussian => Init::Gaussian,
        InitWeights::Pissa { rounds } => Init::Pissa(rounds.map_or(Rounds::Converged, Rounds::Exactly)),
        InitWeights::Loftq => Init::Loftq,
    };
    inject(model, &places, init, lora.random_state)?;
    whole::train(model, &wholes, lora.ensure_weight_tying)
}

/// Whether `target` is the module's name or an ending of it that starts at a dot.
fn ends_with(module: &str, target: &str) -> bool {
    module.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The value of the first key that applies to `module`.
///
/// PEFT's keys are regular expressions; here they are names and endings of names, with `.` as itself. Keys with other
/// special characters were refused when the config was read.
fn lookup<'a, T>(pattern: &'a BTreeMap<String, T>, module: &str) -> Option<&'a T> {
    pattern.iter().find(|(key, _)| ends_with(module, &key.replace("\\.", "."))).map(|(_, value)| value)
}

/// Reads `folder/adapter_config.json` for a base of `n_layers`.
///
/// # Errors
/// [`Error::Io`] if it is missing, [`Error::Adapter`] if it is damaged or asks for what is not supported.
pub fn read_config(folder: &Path, n_layers: usize) -> Result<Adapter> {
    let path = folder.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let refuse = |key: &str, problem: String| Error::Adapter { path: path.clone(), key: key.to_owned(), problem };
    let json: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| refuse("(file)", format!("not a JSON object: {e}")))?;
    let get = |key: &str| json.get(key).unwrap_or(&Value::Null);
    if get("peft_type") != "LORA" {
        return Err(refuse("peft_type", format!("{} is not supported; expected \"LORA\"", get("peft_type"))));
    }
    for (key, value) in &json {
        let off = value.is_null()
            || value == false
            || value == &json!({})
            || value == &json!([])
            || value == "none"
            || (key == "layers_pattern" && value == "layers");
        let lora_init = key == "init_lora_weights" && (value == "pissa" || value == "olora" || value == "corda");
        if lora_init {
            let problem = format!(
                "{value} changes the base weights: convert the adapter to a plain one, with PEFT's save_pretrained(..., \
                 path_initial_model_for_weight_conversion=...)"
            );
            return Err(refuse(key, problem));
        }
        if !off && !HARMLESS.contains(&key.as_str()) {
            return Err(refuse(key, format!("= {value} is not supported yet and would change the numbers")));
        }
    }
    let mut targets = get("target_modules").as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(name) = targets.find(|name| is_table(name)) {
        let problem = format!(
            "{name}: adapters of the embedding table and the head (lora_embedding_A) are not supported yet; \
             train it with modules_to_save"
        );
        return Err(refuse("target_modules", problem));
    }
    // The same resolution as get_peft_model's; PEFT's own rules for what a file may leave out.
    let mut options: LoraOptions = LoraOptions {
        r: get("r").as_i64().or(Some(0)),
        lora_alpha: get("lora_alpha").as_f64(),
        lora_dropout: get("lora_dropout").as_f64(),
        target_modules: Some(get("target_modules").clone()),
        ensure_weight_tying: get("ensure_weight_tying").as_bool(),
        use_rslora: get("use_rslora").as_bool(),
        use_dora: get("use_dora").as_bool(),
        layers_to_transform: Some(get("layers_to_transform").clone()).filter(|layers| layers != &json!([])),
        ..LoraOptions::default()
    };
    for key in ["rank_pattern", "alpha_pattern"] {
        let Value::Object(map) = get(key) else { continue };
        for (name, value) in map {
            let number = || refuse(key, format!("{name}: {value}: expected a positive number"));
            if key == "rank_pattern" {
                let rank = value.as_i64().ok_or_else(number)?;
                options.rank_pattern.get_or_insert_default().insert(name.clone(), rank);
            } else {
                let alpha = value.as_f64().ok_or_else(number)?;
                options.alpha_pattern.get_or_insert_default().insert(name.clone(), alpha);
            }
        }
    }
    if let Value::Array(names) = get("modules_to_save") {
        let name = |value: &Value| value.as_str().map(str::to_owned);
        let names = names.iter().map(name).collect::<Option<_>>();
        options.modules_to_save = Some(names.ok_or_else(|| refuse("modules_to_save", "expected names".to_owned()))?);
    }
    let lora = options.resolve(n_layers).map_err(|error| match error {
        Error::Config { field, value, expected } => refuse(field, format!("= {value}: {expected}")),
        other => other,
    })?;
    Ok(Adapter { base_model: get("base_model_name_or_path").as_str().map(str::to_owned), lora })
}

/// Adds the adapter of `folder` to a model that has none, with its trained values. The vocabulary becomes the adapter's,
/// if it brings an embedding table or a head.
///
/// # Errors
/// Those of [`read_config`]; [`Error::Weights`] for a missing, surplus, misshapen or non-finite tensor; for a PiSSA adapter those of
/// reading the model's folder again.
pub fn load(model: &mut Model, folder: &Path) -> Result<Adapter> {
    let n_layers = model.llama.layers.len();
    let mut adapter = read_config(folder, n_layers)?;
    let file = TensorFile::open(folder.join(WEIGHTS_FILE))?;
    let begun = converted::begun(&file, &adapter.lora)?;
    let times = if begun.is_some() { 2 } else { 1 };
    let pissa = begun.is_some();
    adapter.lora = begun.unwrap_or(adapter.lora);
    let placements = placements(&adapter.lora, n_layers)?;
    let wholes = whole::modules(&adapter.lora, n_layers, model.llama.head.is_none())?;
    let mut file = AdapterFile { file, used: BTreeSet::new() };
    // Everything is read and checked before the model is touched.
    let mut values = Vec::new();
    for place in &placements {
        let linear = model.llama.layers[place.layer_idx].linears()[place.linear_idx];
        let tensors = [
            ("lora_A.weight", vec![times * place.rank, linear.inputs]),
            ("lora_B.weight", vec![linear.outputs, times * place.rank]),
            ("lora_magnitude_vector", vec![linear.outputs]),
        ];
        for (part, shape) in tensors.into_iter().take(place.n_tensors()) {
            values.push(file.read(&format!("{}.{part}", place.module()), &shape)?);
        }
    }
    let hidden = model.config.hidden_size;
    let vocab = file.vocab()?.unwrap_or(model.config.vocab_size);
    for whole in &wholes {
        values.push(file.read(&whole.weight(), &whole.shape(vocab, hidden))?);
    }
    // Those that are in the file and not trained: the vocabulary was resized, or somebody asked for them.
    let mut tables = Vec::new();
    let copies = !adapter.lora.ensure_weight_tying && wholes.iter().any(|whole| whole.is_table());
    let stays_tied = model.llama.head.is_none() && !copies;
    let more: Vec<_> = Which::ALL.into_iter().filter(|&which| file.has_more(&weight_of(which))).collect();
    for which in more {
        let values = file.read(&weight_of(which), &[vocab, hidden])?;
        if which == Which::Head && stays_tied && values != file.read(&weight_of(Which::Embedding), &[vocab, hidden])? {
            let problem = "differs from the embedding table, which is the head of this model";
            return Err(Error::weights(file.file.path(), weight_of(which), problem));
        }
        tables.push((which, values));
    }
    file.refuse_surplus()?;
    let taken = if pissa { converted::take_out(model, &placements, &mut values)? } else { Vec::new() };
    inject(model, &placements, Init::Uniform, 0)?;
    model.resize_vocab(vocab)?;
    whole::train(model, &wholes, adapter.lora.ensure_weight_tying)?;
    for (param, value) in model.params.all_mut().iter_mut().zip(values) {
        param.data = value;
    }
    for (which, values) in tables {
        model.set_table(which, &values)?;
    }
    for (place, taken) in placements.iter().zip(taken) {
        if let Some(lora) = &mut model.llama.layers[place.layer_idx].linears_mut()[place.linear_idx].lora {
            lora.taken = Some(taken);
        }
    }
    Ok(adapter)
}

/// The name of a table's weight in the model.
fn weight_of(which: Which) -> String {
    Whole::Table(which).weight()
}

/// An adapter's weights file and what of it was read.
struct AdapterFile {
    file: TensorFile,
    used: BTreeSet<String>,
}

impl AdapterFile {
    /// The tensor of the model's `name`, checked for its shape and for numbers that are none.
    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let name = format!("{PREFIX}{name}");
        let error = |problem: String| Error::weights(self.file.path(), &name, problem);
        if !self.file.contains(&name) {
            return Err(error("is missing, though adapter_config.json asks for it".to_owned()));
        }
        let got = &self.file.info(&name)?.shape;
        if *got != shape {
            return Err(error(format!("has shape {got:?}, but the model and adapter_config.json say {shape:?}")));
        }
        let tensor = self.file.read_f32(&name)?;
        if let Some(bad) = tensor.iter().find(|v| !v.is_finite()) {
            return Err(error(format!("holds {bad}: the adapter is damaged")));
        }
        self.used.insert(name);
        Ok(tensor)
    }

    /// The number of tokens, if there is an embedding table or a head.
    fn vocab(&self) -> Result<Option<usize>> {
        let names = Which::ALL.map(|which| format!("{PREFIX}{}", weight_of(which)));
        let Some(name) = names.iter().find(|name| self.file.contains(name)) else { return Ok(None) };
        Ok(self.file.info(name)?.shape.first().copied())
    }

    /// Whether the tensor is there and was not read.
    fn has_more(&self, name: &str) -> bool {
        let name = format!("{PREFIX}{name}");
        self.file.contains(&name) && !self.used.contains(&name)
    }

    fn refuse_surplus(&self) -> Result<()> {
        // Of a module to save whose vocabulary was resized PEFT writes the frozen original and the trained copy once more.
        let again = |name: &str| {
            let stem = [".original_module.weight", ".modules_to_save.weight"].iter().find_map(|s| name.strip_suffix(s));
            stem.is_some_and(|stem| self.used.contains(&format!("{stem}.weight")))
        };
        match self.file.names().find(|name| !self.used.contains(*name) && !again(name)) {
            None => Ok(()),
            Some(name) => {
                Err(Error::weights(self.file.path(), name, "is not part of what adapter_config.json describes"))
            }
        }
    }
}

/// The embedding table and the head where they go into an adapter's file without being trained there themselves: they are
/// not the base's, or the head is the trained embedding table.
fn more_tables(model: &Model) -> Vec<(Which, &Matrix)> {
    let llama = &model.llama;
    let is_trained = |matrix: &Matrix| matches!(matrix, Matrix::Trained(_));
    let both = [(Which::Embedding, &llama.embed), (Which::Head, llama.head_matrix())];
    let tied_to_trained = |which| which == Which::Head && llama.head.is_none() && is_trained(&llama.embed);
    both.into_iter()
        .filter(|&(which, matrix)| tied_to_trained(which) || (model.new_tables && !is_trained(matrix)))
        .collect()
}

/// Sets the trained tensors of a model to those of a file of the same run; `prefix` stands before their names there.
///
/// # Errors
/// [`Error::Weights`] if a tensor is missing or has another shape, or if a PiSSA adapter began otherwise: the model must have
/// been set up as it was then.
pub fn load_values(model: &mut Model, path: &Path, prefix: &str) -> Result<()> {
    let file = TensorFile::open(path)?;
    let mut values = Vec::new();
    for (param, form) in model.params.all().iter().zip(Form::all(model)) {
        let name = format!("{prefix}{}", param.name);
        let refuse = |problem: String| Error::weights(path, &name, problem);
        let shape = form.shape(param);
        if !file.contains(&name) || file.info(&name)?.shape != shape {
            return Err(refuse(format!("is missing or not of shape {shape:?}; was the model set up as in that run?")));
        }
        let value = form.read(param, file.read_f32(&name)?).ok_or_else(|| {
            let problem = "began with other singular vectors than this model's (another random_state, rank or instruction \
                           set): load this folder with from_pretrained instead of get_peft_model";
            refuse(problem.to_owned())
        })?;
        values.push(value);
    }
    for (param, values) in model.params.all_mut().iter_mut().zip(values) {
        param.data = values;
    }
    Ok(())
}

/// Writes the model's adapter into `folder`, which exists, as PEFT would: a PiSSA adapter converted to a plain one.
///
/// # Errors
/// [`Error::Config`] if the model has no adapter; [`Error::Io`].
pub fn save(model: &Model, adapter: &Adapter, folder: &Path) -> Result<()> {
    let params = model.params.all();
    if !model.llama.layers.iter().flat_map(Layer::linears).any(|linear| linear.lora.is_some()) {
        return Err(Error::config("save_pretrained", "model", "has no adapter; call get_peft_model first"));
    }
    let (vocab, hidden) = (model.config.vocab_size, model.config.hidden_size);
    let (tables, forms) = (more_tables(model), Form::all(model));
    let dtype = |matrix: &Matrix| match matrix {
        Matrix::Frozen(weight) if matches!(weight.storage(), Storage::Bf16(_)) => Dtype::BF16,
        _ => Dtype::F32,
    };
    let spec = |name: &str, dtype, shape| TensorSpec { name: format!("{PREFIX}{name}"), dtype, shape };
    let of_params = params.iter().zip(&forms).map(|(p, form)| spec(&p.name, Dtype::F32, form.shape(p)));
    let mut specs: Vec<_> = of_params.collect();
    specs.extend(tables.iter().map(|&(which, matrix)| spec(&weight_of(which), dtype(matrix), vec![vocab, hidden])));
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let lora = converted::plain(&adapter.lora, &forms, &mut metadata);
    let mut writer = SafetensorsWriter::create(folder.join(WEIGHTS_FILE), &specs, &metadata)?;
    for ((param, form), spec) in params.iter().zip(&forms).zip(&specs) {
        writer.write_f32(&spec.name, &form.write(param))?;
    }
    for (&(_, matrix), spec) in tables.iter().zip(&specs[params.len()..]) {
        match matrix {
            Matrix::Frozen(weight) => {
                writer.write(&spec.name, &to_bytes(&weight.to_f32(model.ctx.kernels), spec.dtype))?;
            }
            Matrix::Trained(id) => writer.write_f32(&spec.name, model.params.get(*id))?,
        }
    }
    writer.finish()?;
    let config = json!({
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_to_transform": lora.layers_to_transform,
        "layers_pattern": null,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "ensure_weight_tying": lora.ensure_weight_tying,
        "modules_to_save": if lora.modules_to_save.is_empty() { Value::Null } else { json!(lora.modules_to_save) },
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "target_modules": lora.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    });
    let text = serde_json::to_vec_pretty(&config).expect("strings and finite numbers always serialise");
    crate::io::atomic::write_file(folder.join(CONFIG_FILE), &text)
}
