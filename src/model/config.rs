//! `config.json` of a Hugging Face folder, in the old spelling and in that of transformers 5.

use crate::error::{Error, Result};
use crate::ops::rope::RopeScaling;
use serde_json::{Map, Value};
use std::path::Path;

/// What the decoder is made of.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head; may differ from `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// The longest row there are positions for.
    pub max_position_embeddings: usize,
    /// The length the model was made for; less than `max_position_embeddings` after [`stretch_to`](Self::stretch_to).
    pub original_positions: usize,
    /// Whether the LM head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// The token a sequence begins with.
    pub bos_token_id: Option<u32>,
    /// The token that fills short rows.
    pub pad_token_id: Option<u32>,
    /// The file as it is, to be copied verbatim.
    pub json: Value,
}

/// Architectures whose decoder is the Llama decoder, by `model_type`.
const MODEL_TYPES: [&str; 1] = ["llama"];

impl ModelConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such file; [`Error::Model`] if it is no JSON, lacks a key, or describes an
    /// architecture, activation or rope type that is not supported.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|e| Error::Model { path: path.clone(), problem: format!("not JSON: {e}; download it again") })?;
        let mut config = Self::from_json(json).map_err(|problem| Error::Model { path, problem })?;
        config.read_generation_config(folder);
        Ok(config)
    }

    /// Makes room for `length` positions: beyond `max_position_embeddings` the rotary positions are divided by
    /// `length / max_position_embeddings` (Chen et al. 2023, position interpolation), in place of the scaling there was,
    /// and `json` says so, in the spelling it has. Does nothing if there is room already.
    pub fn stretch_to(&mut self, length: usize) {
        if length <= self.max_position_embeddings {
            return;
        }
        let factor = length as f64 / self.max_position_embeddings as f64;
        self.rope_scaling = RopeScaling::Linear { factor };
        self.max_position_embeddings = length;
        self.json["max_position_embeddings"] = length.into();
        self.write_rope(
            [("rope_type".to_owned(), "linear".into()), ("factor".to_owned(), factor.into())].into_iter().collect(),
        );
    }

    /// Scales the rotary positions as `scaling` says, in transformers' form, in place of the scaling there was; `json` says
    /// so, in the spelling it has. Rows may then have as many tokens as the scaling makes room for.
    ///
    /// scaling: `rope_type` (or `type`) default, linear or llama3, its numbers, and perhaps `rope_theta`.
    ///
    /// # Errors
    /// [`Error::Config`] for a type or number that cannot be used, or if `length` is more than there is room for.
    pub fn scale_positions(&mut self, scaling: &Value, length: Option<usize>) -> Result<()> {
        let refuse = |expected: String| Error::config("rope_scaling", scaling, expected);
        let Some(written) = scaling.as_object() else { return Err(refuse("expected a dict with a rope_type".into())) };
        if let Some(unknown) = written.keys().find(|key| !ROPE_KEYS.contains(&key.as_str())) {
            return Err(refuse(format!("unknown key {unknown:?}; expected {}", ROPE_KEYS.join(", "))));
        }
        if rope_type(scaling).is_none() {
            return Err(refuse("expected a rope_type: default, linear or llama3".into()));
        }
        let theta = match &scaling["rope_theta"] {
            Value::Null => self.rope_theta,
            theta => {
                theta.as_f64().filter(|&x| x > 0.0).ok_or_else(|| refuse("rope_theta: expected above 0".into()))?
            }
        };
        let made = rope_scaling(scaling).map_err(refuse)?;
        let trained = self.original_positions as f64;
        let room = match made {
            RopeScaling::None => trained,
            RopeScaling::Linear { factor } => trained * factor,
            RopeScaling::Llama3 { factor, original_max, .. } => trained.max(original_max * factor),
        };
        if let Some(length) = length.filter(|&length| length as f64 > room) {
            return Err(refuse(format!(
                "makes room for {room} tokens, but max_seq_length = {length}; raise the factor"
            )));
        }
        if let Some(length) = length.filter(|&length| length > self.max_position_embeddings) {
            self.max_position_embeddings = length;
            self.json["max_position_embeddings"] = length.into();
        }
        (self.rope_theta, self.rope_scaling) = (theta, made);
        let mut written = written.clone();
        if let Some(kind) = written.remove("type") {
            written.entry("rope_type").or_insert(kind);
        }
        self.write_rope(written);
        Ok(())
    }

    /// Puts a scaling into `json`, in the spelling it has.
    fn write_rope(&mut self, mut scaling: Map<String, Value>) {
        if self.json["rope_parameters"].is_object() {
            scaling.insert("rope_theta".to_owned(), self.rope_theta.into());
            self.json["rope_parameters"] = scaling.into();
        } else {
            if scaling.remove("rope_theta").is_some() {
                self.json["rope_theta"] = self.rope_theta.into();
            }
            self.json["rope_scaling"] = scaling.into();
        }
    }

    /// The config that `json` describes, or what is wrong with it.
    fn from_json(json: Value) -> std::result::Result<Self, String> {
        let model_type = json["model_type"].as_str().unwrap_or("(none)");
        if !MODEL_TYPES.contains(&model_type) {
            return Err(format!(
                "model_type {model_type:?} is not supported yet; supported: {}",
                MODEL_TYPES.join(", ")
            ));
        }
        let activation = json["hidden_act"].as_str().unwrap_or("silu");
        if activation != "silu" {
            return Err(format!("hidden_act {activation:?} is not supported; expected \"silu\""));
        }
        let size = |key: &str| match &json[key] {
            Value::Null => Err(format!("key {key:?} is missing")),
            value => match value.as_u64() {
                Some(n) if n > 0 => Ok(n as usize),
                _ => Err(format!("{key} = {value}: expected a positive integer")),
            },
        };
        let (hidden_size, num_heads) = (size("hidden_size")?, size("num_attention_heads")?);
        let optional = |key: &str, default: usize| if json[key].is_null() { Ok(default) } else { size(key) };
        let flag = |key: &str, default: bool| json[key].as_bool().unwrap_or(default);
        let num_kv_heads = optional("num_key_value_heads", num_heads)?;
        if num_heads % num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}"
            ));
        }
        if json["head_dim"].is_null() && hidden_size % num_heads != 0 {
            return Err(format!("hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_heads}"));
        }
        let head_dim = optional("head_dim", hidden_size / num_heads)?;
        if head_dim % 2 != 0 || head_dim > 512 {
            return Err(format!("head_dim = {head_dim}: expected an even number up to 512"));
        }
        let (rope_theta, rope_scaling) = rope(&json)?;
        let ids = |value: &Value| match value {
            Value::Array(list) => list.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
            other => other.as_u64().map(|id| id as u32).into_iter().collect::<Vec<_>>(),
        };
        Ok(Self {
            hidden_size,
            intermediate_size: size("intermediate_size")?,
            num_layers: size("num_hidden_layers")?,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: size("vocab_size")?,
            rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
            rope_theta,
            rope_scaling,
            max_position_embeddings: optional("max_position_embeddings", 2048)?,
            original_positions: optional("max_position_embeddings", 2048)?,
            tie_word_embeddings: flag("tie_word_embeddings", false),
            attention_bias: flag("attention_bias", false),
            mlp_bias: flag("mlp_bias", false),
            eos_token_ids: ids(&json["eos_token_id"]),
            bos_token_id: ids(&json["bos_token_id"]).first().copied(),
            pad_token_id: ids(&json["pad_token_id"]).first().copied(),
            json,
        })
    }

    /// `generation_config.json` often lists more end tokens than `config.json` does.
    fn read_generation_config(&mut self, folder: &Path) {
        let Ok(text) = std::fs::read_to_string(folder.join("generation_config.json")) else { return };
        let Ok(json) = serde_json::from_str::<Value>(&text) else { return };
        let listed = match &json["eos_token_id"] {
            Value::Array(list) => list.clone(),
            Value::Null => return,
            one => vec![one.clone()],
        };
        for id in listed.iter().filter_map(Value::as_u64).map(|id| id as u32) {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
    }
}

/// theta and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`.
fn rope(json: &Value) -> std::result::Result<(f64, RopeScaling), String> {
    let nested = &json["rope_parameters"];
    let scaling = if nested.is_object() { nested } else { &json["rope_scaling"] };
    let theta = nested["rope_theta"].as_f64().or_else(|| json["rope_theta"].as_f64()).unwrap_or(10_000.0);
    let partial = nested["partial_rotary_factor"].as_f64().or_else(|| json["partial_rotary_factor"].as_f64());
    if partial.is_some_and(|factor| factor != 1.0) {
        return Err("partial_rotary_factor other than 1 is not supported for this architecture".to_owned());
    }
    Ok((theta, rope_scaling(scaling)?))
}

/// What a scaling in transformers' form may hold.
const ROPE_KEYS: [&str; 7] = [
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
];

/// The name of a scaling, in either spelling.
fn rope_type(scaling: &Value) -> Option<&str> {
    scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str())
}

/// The scaling that a dict of transformers' form describes; none for an empty one.
fn rope_scaling(scaling: &Value) -> std::result::Result<RopeScaling, String> {
    let number = |key: &str, least: f64| match scaling[key].as_f64() {
        None => Err(format!("rope scaling lacks the number {key:?}")),
        Some(x) if x < least => Err(format!("rope scaling: {key} = {x}: expected at least {least}")),
        Some(x) => Ok(x),
    };
    Ok(match rope_type(scaling).unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor", 1.0)? },
        "llama3" => {
            let (low, high) = (number("low_freq_factor", 0.0)?, number("high_freq_factor", 0.0)?);
            if low >= high {
                return Err(format!(
                    "rope scaling: low_freq_factor = {low}: expected less than high_freq_factor = {high}"
                ));
            }
            RopeScaling::Llama3 {
                factor: number("factor", 1.0)?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max: number("original_max_position_embeddings", 1.0)?,
            }
        }
        other => return Err(format!("rope type {other:?} is not supported yet; supported: default, linear, llama3")),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    fn minimal() -> Value {
        json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
               "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512})
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() {
        let mut old = minimal();
        old["rope_theta"] = json!(500_000.0);
        old["rope_scaling"] = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let mut new = minimal();
        new["rope_parameters"] = old["rope_scaling"].clone();
        new["rope_parameters"]["rope_theta"] = json!(500_000.0);
        let (old, new) = (ModelConfig::from_json(old).unwrap(), ModelConfig::from_json(new).unwrap());
        assert_eq!((old.rope_theta, &old.rope_scaling), (new.rope_theta, &new.rope_scaling));
        assert!(matches!(new.rope_scaling, RopeScaling::Llama3 { factor, .. } if factor == 32.0));
    }

    #[test]
    fn longer_rows_squeeze_the_positions() {
        let mut old = minimal();
        old["max_position_embeddings"] = json!(512);
        old["rope_theta"] = json!(500_000.0);
        let mut new = minimal();
        new["max_position_embeddings"] = json!(512);
        new["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500_000.0});
        for json in [old, new] {
            let mut config = ModelConfig::from_json(json.clone()).unwrap();
            config.stretch_to(512);
            assert_eq!((&config.rope_scaling, &config.json), (&RopeScaling::None, &json));
            config.stretch_to(2048);
            assert_eq!(config.original_positions, 512);
            // Written out and read again it is the same.
            for config in [ModelConfig::from_json(config.json.clone()).unwrap(), config] {
                assert!(matches!(config.rope_scaling, RopeScaling::Linear { factor } if factor == 4.0));
                assert_eq!((config.max_position_embeddings, config.rope_theta), (2048, 500_000.0));
            }
        }
    }

    #[test]
    fn a_scaling_that_was_asked_for_replaces_that_of_the_file() {
        let mut old = minimal();
        old["max_position_embeddings"] = json!(512);
        old["rope_scaling"] = json!({"type": "linear", "factor": 8.0});
        let mut new = minimal();
        new["max_position_embeddings"] = json!(512);
        new["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500_000.0});
        for json in [old, new] {
            let theta = ModelConfig::from_json(json.clone()).unwrap().rope_theta;
            let mut config = ModelConfig::from_json(json.clone()).unwrap();
            config.scale_positions(&json!({"type": "linear", "factor": 2}), Some(1024)).unwrap();
            assert_eq!((config.max_position_embeddings, config.original_positions), (1024, 512));
            for config in [ModelConfig::from_json(config.json.clone()).unwrap(), config] {
                assert_eq!((&config.rope_scaling, config.rope_theta), (&RopeScaling::Linear { factor: 2.0 }, theta));
                assert_eq!(config.max_position_embeddings, 1024);
            }
            let mut config = ModelConfig::from_json(json.clone()).unwrap();
            config.scale_positions(&json!({"rope_type": "default", "rope_theta": 1e6}), None).unwrap();
            let again = ModelConfig::from_json(config.json.clone()).unwrap();
            assert_eq!((&again.rope_scaling, again.rope_theta), (&RopeScaling::None, 1e6));
            let llama3 = json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512});
            config.scale_positions(&llama3, Some(2048)).unwrap();
            assert!(matches!(config.rope_scaling, RopeScaling::Llama3 { factor, .. } if factor == 4.0));
        }
    }

    #[test]
    fn a_scaling_that_cannot_be_is_named() {
        for (scaling, length, named) in [
            (json!({"type": "dynamic", "factor": 2.0}), None, "dynamic"),
            (json!({"type": "linear"}), None, "\"factor\""),
            (json!({"type": "linear", "factor": 0.5}), None, "factor = 0.5"),
            (json!({"type": "linear", "factor": "2"}), None, "\"factor\""),
            (json!({"factor": 2.0}), None, "expected a rope_type"),
            (json!({"type": "linear", "kind": 2.0}), None, "\"kind\""),
            (json!({"type": "linear", "factor": 2.0}), Some(1025), "room for 1024 tokens"),
            (json!({"type": "default", "rope_theta": -1.0}), None, "rope_theta"),
            (
                json!({"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 512}),
                None,
                "low_freq_factor = 4",
            ),
        ] {
            let mut json = minimal();
            json["max_position_embeddings"] = json!(512);
            let error =
                ModelConfig::from_json(json).unwrap().scale_positions(&scaling, length).unwrap_err().to_string();
            assert!(error.starts_with("rope_scaling = ") && error.contains(named), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        for (key, value, named) in [
            ("model_type", json!("mamba"), "mamba"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("vocab_size", json!(0), "vocab_size"),
            ("num_key_value_heads", json!(3), "num_key_value_heads"),
            ("rope_scaling", json!({"type": "yarn", "factor": 2.0}), "yarn"),
            ("hidden_size", Value::Null, "hidden_size"),
        ] {
            let mut config = minimal();
            config[key] = value;
            let problem = ModelConfig::from_json(config).unwrap_err();
            assert!(problem.contains(named), "{problem}");
        }
    }
}
