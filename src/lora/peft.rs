//! PEFT's adapter folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A key of the config that would change the numbers and is not supported is an error that names it; what it would do
//! silently is exactly what must not happen. Tensors: `base_model.model.{module}.lora_A.weight` `[r, in]` and
//! `lora_B.weight` `[out, r]`. Patterns follow PEFT: a key applies to a module if `(.*\.)?(key)$` matches its name.

use super::{Init, Placement, inject, module_name};
use crate::config::lora::{ALL_LINEAR, InitWeights, Lora, LoraOptions};
use crate::error::{Error, Result};
use crate::io::safetensors::{Dtype, SafetensorsWriter, TensorFile, TensorSpec};
use crate::model::Model;
use crate::model::llama::{LINEAR_NAMES, Layer};
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
const HARMLESS: [&str; 21] = [
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
    "target_modules",
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
                let dropout = lora.lora_dropout as f32;
                placements.push(Placement { layer_idx, linear_idx, rank, scale: scale(lora, rank, alpha), dropout });
            }
        }
    }
    Ok(placements)
}

/// Adds an untrained adapter to a model that has none.
///
/// # Errors
/// Those of [`placements`] and [`inject`].
pub fn attach(model: &mut Model, lora: &Lora) -> Result<()> {
    let places = placements(lora, model.llama.layers.len())?;
    let init = match lora.init_lora_weights {
        InitWeights::Uniform => Init::Uniform,
        InitWeights::Gaussian => Init::Gaussian,
    };
    inject(model, &places, init, lora.random_state)
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
            let problem =
                format!("{value} changes the base weights; convert the adapter to a plain one with PEFT first");
            return Err(refuse(key, problem));
        }
        if !off && !HARMLESS.contains(&key.as_str()) {
            return Err(refuse(key, format!("= {value} is not supported yet and would change the numbers")));
        }
    }
    // The same resolution as get_peft_model's; PEFT's own rules for what a file may leave out.
    let mut options: LoraOptions = LoraOptions {
        r: get("r").as_i64().or(Some(0)),
        lora_alpha: get("lora_alpha").as_f64(),
        lora_dropout: get("lora_dropout").as_f64(),
        target_modules: Some(get("target_modules").clone()),
        use_rslora: get("use_rslora").as_bool(),
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
    let lora = options.resolve(n_layers).map_err(|error| match error {
        Error::Config { field, value, expected } => refuse(field, format!("= {value}: {expected}")),
        other => other,
    })?;
    Ok(Adapter { base_model: get("base_model_name_or_path").as_str().map(str::to_owned), lora })
}

/// Adds the adapter of `folder` to a model that has none, with its trained values.
///
/// # Errors
/// Those of [`read_config`]; [`Error::Weights`] for a missing, surplus, misshapen or non-finite tensor.
pub fn load(model: &mut Model, folder: &Path) -> Result<Adapter> {
    let n_layers = model.llama.layers.len();
    let adapter = read_config(folder, n_layers)?;
    let placements = placements(&adapter.lora, n_layers)?;
    let file = TensorFile::open(folder.join(WEIGHTS_FILE))?;
    // Everything is read and checked before the model is touched.
    let mut values = Vec::new();
    let mut used = BTreeSet::new();
    for place in &placements {
        let linear = model.llama.layers[place.layer_idx].linears()[place.linear_idx];
        for (part, shape) in [("lora_A", [place.rank, linear.inputs]), ("lora_B", [linear.outputs, place.rank])] {
            let name = format!("{PREFIX}{}.{part}.weight", place.module());
            let error = |problem: String| Error::weights(file.path(), &name, problem);
            if !file.contains(&name) {
                return Err(error("is missing, though adapter_config.json asks for it".to_owned()));
            }
            let got = &file.info(&name)?.shape;
            if *got != shape {
                return Err(error(format!("has shape {got:?}, but the model and adapter_config.json say {shape:?}")));
            }
            let tensor = file.read_f32(&name)?;
            if let Some(bad) = tensor.iter().find(|v| !v.is_finite()) {
                return Err(error(format!("holds {bad}: the adapter is damaged")));
            }
            values.push(tensor);
            used.insert(name);
        }
    }
    if let Some(name) = file.names().find(|name| !used.contains(*name)) {
        return Err(Error::weights(file.path(), name, "is not part of what adapter_config.json describes"));
    }
    inject(model, &placements, Init::Uniform, 0)?;
    for (param, value) in model.params.all_mut().iter_mut().zip(values) {
        param.data = value;
    }
    Ok(adapter)
}

/// Writes the model's adapter into `folder`, which exists, as PEFT would.
///
/// # Errors
/// [`Error::Config`] if the model has no adapter; [`Error::Io`].
pub fn save(model: &Model, adapter: &Adapter, folder: &Path) -> Result<()> {
    let params = model.params.all();
    if !model.llama.layers.iter().flat_map(Layer::linears).any(|linear| linear.lora.is_some()) {
        return Err(Error::config("save_pretrained", "model", "has no adapter; call get_peft_model first"));
    }
    let specs: Vec<_> = params
        .iter()
        .map(|p| TensorSpec { name: format!("{PREFIX}{}", p.name), dtype: Dtype::F32, shape: p.shape.clone() })
        .collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = SafetensorsWriter::create(folder.join(WEIGHTS_FILE), &specs, &metadata)?;
    for (param, spec) in params.iter().zip(&specs) {
        writer.write_f32(&spec.name, &param.data)?;
    }
    writer.finish()?;
    let lora = &adapter.lora;
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
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "target_modules": lora.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": lora.use_rslora,
    });
    let text = serde_json::to_vec_pretty(&config).expect("strings and finite numbers always serialise");
    crate::io::atomic::write_file(folder.join(CONFIG_FILE), &text)
}
