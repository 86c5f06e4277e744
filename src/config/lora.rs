//! Which linear layers get an adapter, and of what size; which modules are trained whole beside it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{at_least_one, number, refuse_if};
use crate::error::{Error, Result};

/// The linear layers of a decoder block, and what `target_modules="all-linear"` and the default mean.
pub const ALL_LINEAR: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// The modules that `modules_to_save` can name by these endings: the embedding table, the head, and the norms.
pub const WHOLE_MODULES: [&str; 5] = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"];

/// Arguments of `get_peft_model`, as written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraOptions {
    /// Rank; default 16.
    pub r: Option<i64>,
    /// Default 16.
    pub lora_alpha: Option<f64>,
    /// Default 0.
    pub lora_dropout: Option<f64>,
    /// A list of names or name endings, or `"all-linear"`; default all seven. `embed_tokens` and `lm_head` move to
    /// `modules_to_save`, as in Unsloth.
    pub target_modules: Option<Value>,
    /// Only `"none"`.
    pub bias: Option<String>,
    /// Scale by alpha / sqrt(r); default false.
    pub use_rslora: Option<bool>,
    /// Train the lengths of the adapted matrix's rows as well; default false.
    pub use_dora: Option<bool>,
    /// One layer or a list; default all.
    pub layers_to_transform: Option<Value>,
    /// The last n layers; instead of `layers_to_transform`.
    pub finetune_last_n_layers: Option<i64>,
    /// Endings of the names of modules that are trained whole; some of [`WHOLE_MODULES`].
    pub modules_to_save: Option<Vec<String>>,
    /// Whether a head that is the embedding table stays so when either is trained; default false: copies.
    pub ensure_weight_tying: Option<bool>,
    /// true, `"gaussian"`, `"pissa"`, `"pissa_niter_N"` or `"loftq"`; default true.
    pub init_lora_weights: Option<Value>,
    /// How `"loftq"` quantizes; default 4 bits, one round.
    pub loftq_config: Option<LoftqOptions>,
    /// Ranks of modules that differ, by name or name ending.
    pub rank_pattern: Option<BTreeMap<String, i64>>,
    /// Alphas of modules that differ, by name or name ending.
    pub alpha_pattern: Option<BTreeMap<String, f64>>,
    /// Seed of the initialisation and of dropout; default 3407.
    pub random_state: Option<u64>,
}

/// How LoftQ quantizes, as written: PEFT's `LoftQConfig`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoftqOptions {
    /// Only 4.
    pub loftq_bits: Option<i64>,
    /// Only 1.
    pub loftq_iter: Option<i64>,
}

/// How an adapter starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum InitWeights {
    /// A uniform in ±1 / sqrt(in), B zero: PEFT's default.
    Uniform,
    /// A normal with deviation 1 / r, B zero.
    Gaussian,
    /// With the leading singular vectors of the matrix: Meng et al. 2024.
    Pissa {
        /// Rounds of subspace iteration; `None` until they have converged.
        rounds: Option<usize>,
    },
    /// With the leading singular vectors of what quantization lost: Li et al. 2023.
    Loftq,
}

impl From<InitWeights> for String {
    fn from(init: InitWeights) -> Self {
        match init {
            InitWeights::Uniform => "uniform".to_owned(),
            InitWeights::Gaussian => "gaussian".to_owned(),
            InitWeights::Pissa { rounds: None } => "pissa".to_owned(),
            InitWeights::Pissa { rounds: Some(rounds) } => format!("{PISSA_ROUNDS}{rounds}"),
            InitWeights::Loftq => "loftq".to_owned(),
        }
    }
}

impl TryFrom<String> for InitWeights {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        let rounds = name.strip_prefix(PISSA_ROUNDS).and_then(|n| n.parse().ok()).filter(|n| *n <= MOST_ROUNDS);
        match (name.as_str(), rounds) {
            ("uniform", _) => Ok(Self::Uniform),
            ("gaussian", _) => Ok(Self::Gaussian),
            ("pissa", _) => Ok(Self::Pissa { rounds: None }),
            ("loftq", _) => Ok(Self::Loftq),
            (_, Some(rounds)) => Ok(Self::Pissa { rounds: Some(rounds) }),
            _ => Err(format!("{name:?} is no way for an adapter to start")),
        }
    }
}

/// What stands before the number of rounds in PEFT's name for them.
const PISSA_ROUNDS: &str = "pissa_niter_";

/// More rounds than this are a slip of the keyboard.
const MOST_ROUNDS: usize = 1000;

/// An adapter as it will be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lora {
    /// Rank.
    pub r: usize,
    /// The scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.  Hu et al. 2021, section 4.1.
    pub lora_alpha: f64,
    /// Share of the inputs of A set to zero in training.
    pub lora_dropout: f64,
    /// Names or name endings of the adapted layers.
    pub target_modules: Vec<String>,
    /// Endings of the names of modules that are trained whole, in f32.
    pub modules_to_save: Vec<String>,
    /// Whether a head that is the embedding table stays so when either is trained.
    pub ensure_weight_tying: bool,
    /// Whether the scale uses the root of the rank.  Kalajdzievski 2023.
    pub use_rslora: bool,
    /// Whether the rows of the adapted matrix get a trained length.  Liu et al. 2024.
    pub use_dora: bool,
    /// Layers that are adapted, ascending; `None` for all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// How the adapter starts.
    pub init_lora_weights: InitWeights,
    /// Ranks of modules that differ.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of modules that differ.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Seed.
    pub random_state: u64,
}

impl LoraOptions {
    /// Checks what was written and fills in the rest, for a model of `n_layers`.
    ///
    /// # Errors
    /// [`Error::Config`] naming a setting that is out of range, contradicts another, or is not there yet.
    pub fn resolve(&self, n_layers: usize) -> Result<Lora> {
        let bias = self.bias.as_deref().unwrap_or("none");
        refuse_if(bias != "none", "bias", bias, "use \"none\"")?;
        let lora_dropout = self.lora_dropout.unwrap_or(0.0);
        let dropout_range = "expected at least 0 and less than 1";
        let (target_modules, modules_to_save) = self.modules()?;
        Ok(Lora {
            r: at_least_one("r", self.r, 16)?,
            lora_alpha: number("lora_alpha", self.lora_alpha, 16.0, |x| x > 0.0, "expected a positive number")?,
            lora_dropout: number("lora_dropout", Some(lora_dropout), 0.0, |x| (0.0..1.0).contains(&x), dropout_range)?,
            target_modules,
            modules_to_save,
            ensure_weight_tying: self.ensure_weight_tying.unwrap_or(false),
            use_rslora: self.use_rslora.unwrap_or(false),
            use_dora: self.use_dora.unwrap_or(false),
            layers_to_transform: self.layers(n_layers)?,
            init_lora_weights: self.init()?,
            rank_pattern: pattern("rank_pattern", self.rank_pattern.as_ref(), |&r| {
                usize::try_from(r).ok().filter(|&r| r > 0)
            })?,
            alpha_pattern: pattern("alpha_pattern", self.alpha_pattern.as_ref(), |&alpha| {
                Some(alpha).filter(|alpha| alpha.is_finite() && *alpha > 0.0)
            })?,
            random_state: self.random_state.unwrap_or(3407),
        })
    }

    /// The layers that get an adapter and the modules that are trained whole, each sorted: a list in any order, or with
    /// a name twice, is the same adapter.
    fn modules(&self) -> Result<(Vec<String>, Vec<String>)> {
        let (tables, linears): (Vec<_>, Vec<_>) = self.targets()?.into_iter().partition(|name| is_table(name));
        if linears.is_empty() {
            let expected = "expected a linear layer too: these are trained whole, beside an adapter";
            return Err(Error::config("target_modules", tables.join(", "), expected));
        }
        let saved = self.modules_to_save.clone().unwrap_or_default();
        if let Some(unknown) = saved.iter().find(|name| !WHOLE_MODULES.contains(&leaf(name))) {
            let expected = format!("expected some of {}", WHOLE_MODULES.join(", "));
            return Err(Error::config("modules_to_save", unknown, expected));
        }
        Ok((sorted(linears), sorted([tables, saved].concat())))
    }

    fn targets(&self) -> Result<Vec<String>> {
        let field = "target_modules";
        let all = || ALL_LINEAR.iter().map(|name| (*name).to_owned()).collect();
        let wrong = |value: &dyn ToString| {
            Error::config(field, value.to_string(), "expected a list of layer names, or \"all-linear\"")
        };
        let targets: Vec<String> = match &self.target_modules {
            None | Some(Value::Null) => all(),
            Some(Value::String(name)) if name == "all-linear" => all(),
            Some(Value::String(name)) => vec![name.clone()],
            Some(Value::Array(list)) => list
                .iter()
                .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| wrong(item)))
                .collect::<Result<_>>()?,
            Some(other) => return Err(wrong(other)),
        };
        if targets.is_empty() {
            return Err(wrong(&"[]"));
        }
        Ok(targets)
    }

    fn layers(&self, n_layers: usize) -> Result<Option<Vec<usize>>> {
        let field = "layers_to_transform";
        let expected = || format!("expected layers from 0 to {}", n_layers.saturating_sub(1));
        let one = |value: &Value| {
            let layer = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n < n_layers);
            layer.ok_or_else(|| Error::config(field, value, expected()))
        };
        let written = match &self.layers_to_transform {
            None | Some(Value::Null) => None,
            Some(Value::Array(list)) if list.is_empty() => return Err(Error::config(field, "[]", expected())),
            Some(Value::Array(list)) => Some(list.iter().map(one).collect::<Result<Vec<_>>>()?),
            Some(value) => Some(vec![one(value)?]),
        };
        let last = match self.finetune_last_n_layers {
            None => return Ok(written.map(sorted)),
            Some(n) => usize::try_from(n).ok().filter(|n| (1..=n_layers).contains(n)).ok_or_else(|| {
                Error::config("finetune_last_n_layers", n, format!("the model has {n_layers} layers"))
            })?,
        };
        if written.is_some() {
            return Err(Error::config("finetune_last_n_layers", last, "contradicts layers_to_transform: choose one"));
        }
        Ok(Some((n_layers - last..n_layers).collect()))
    }

    fn init(&self) -> Result<InitWeights> {
        let expected = "not there yet; expected True, \"gaussian\", \"pissa\", \"pissa_niter_N\" or \"loftq\"";
        let wrong = |value: &Value| Error::config("init_lora_weights", value, expected);
        let init = match &self.init_lora_weights {
            None | Some(Value::Null | Value::Bool(true)) => InitWeights::Uniform,
            Some(value @ Value::String(name)) if name != "uniform" => {
                InitWeights::try_from(name.clone()).map_err(|_| wrong(value))?
            }
            Some(value) => return Err(wrong(value)),
        };
        let loftq = self.loftq_config.clone().unwrap_or_default();
        match (loftq.loftq_bits, loftq.loftq_iter) {
            (Some(bits), _) if bits != 4 => Err(Error::config(
                "loftq_config",
                format!("loftq_bits: {bits}"),
                "the base is held in 4 bits: expected 4",
            )),
            (_, Some(rounds)) if rounds != 1 => {
                let expected = "expected 1: after more rounds the adapter fits a quantized base that no file holds";
                Err(Error::config("loftq_config", format!("loftq_iter: {rounds}"), expected))
            }
            _ => Ok(init),
        }
    }
}

fn sorted<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort_unstable();
    list.dedup();
    list
}

/// The last part of a module's name.
fn leaf(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Whether a module is the embedding table or the head.
pub fn is_table(name: &str) -> bool {
    ["embed_tokens", "lm_head"].contains(&leaf(name))
}

fn pattern<V: ToString, T>(
    field: &'static str,
    written: Option<&BTreeMap<String, V>>,
    check: impl Fn(&V) -> Option<T>,
) -> Result<BTreeMap<String, T>> {
    let mut resolved = BTreeMap::new();
    for (key, value) in written.into_iter().flatten() {
        let wrong = |expected: &str| Error::config(field, format!("{key}: {}", value.to_string()), expected);
        // PEFT reads the keys as regular expressions; names need none of their special characters but the dot.
        if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || "._\\".contains(c)) {
            return Err(wrong("expected the name of a module or its ending as the key, no regular expression"));
        }
        resolved.insert(key.clone(), check(value).ok_or_else(|| wrong("expected a positive number"))?);
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    fn resolve(options: Value) -> Result<Lora> {
        serde_json::from_value::<LoraOptions>(options).unwrap().resolve(4)
    }

    #[test]
    fn defaults_are_those_of_the_notebooks() {
        let lora = resolve(json!({})).unwrap();
        assert_eq!((lora.r, lora.lora_alpha, lora.lora_dropout, lora.random_state), (16, 16.0, 0.0, 3407));
        assert_eq!(lora.target_modules.len(), 7);
        assert_eq!(lora.layers_to_transform, None);
        assert_eq!(resolve(json!({"target_modules": "all-linear"})).unwrap(), lora);
        let text = serde_json::to_string(&lora).unwrap();
        assert_eq!(serde_json::from_str::<Lora>(&text).unwrap(), lora);
    }

    #[test]
    fn what_was_written_is_what_runs() {
        let lora = resolve(json!({
            "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "use_rslora": true, "init_lora_weights": "gaussian", "use_dora": true,
            "target_modules": ["v_proj", "q_proj", "v_proj"], "layers_to_transform": [3, 1],
            "rank_pattern": {"layers.0.self_attn.q_proj": 4}, "alpha_pattern": {"q_proj": 2.5},
        }))
        .unwrap();
        assert_eq!((lora.r, lora.lora_alpha, lora.lora_dropout), (8, 32.0, 0.1));
        assert!(lora.use_rslora && lora.use_dora);
        assert_eq!(lora.target_modules, ["q_proj", "v_proj"]);
        assert_eq!(lora.layers_to_transform, Some(vec![1, 3]));
        assert_eq!(lora.init_lora_weights, InitWeights::Gaussian);
        assert_eq!(lora.rank_pattern["layers.0.self_attn.q_proj"], 4);
        assert_eq!(lora.alpha_pattern["q_proj"], 2.5);
        let last = resolve(json!({"finetune_last_n_layers": 2})).unwrap();
        assert_eq!(last.layers_to_transform, Some(vec![2, 3]));
        assert_eq!(resolve(json!({"layers_to_transform": 2})).unwrap().layers_to_transform, Some(vec![2]));
    }

    #[test]
    fn tables_among_the_targets_are_trained_whole() {
        let targets = json!({"target_modules": ["q_proj", "lm_head", "embed_tokens"], "modules_to_save": ["lm_head"]});
        let lora = resolve(targets).unwrap();
        assert_eq!(lora.target_modules, ["q_proj"]);
        assert_eq!(lora.modules_to_save, ["embed_tokens", "lm_head"]);
        let saved = json!({"modules_to_save": ["model.norm", "norm", "model.norm"], "ensure_weight_tying": true});
        let lora = resolve(saved).unwrap();
        assert_eq!((lora.modules_to_save, lora.ensure_weight_tying), (vec!["model.norm".into(), "norm".into()], true));
        assert_eq!(lora.target_modules.len(), 7);
        assert_eq!(resolve(json!({})).unwrap().modules_to_save, [""; 0]);
    }

    #[test]
    fn ways_to_start_go_by_name() {
        for (name, want) in [
            ("gaussian", InitWeights::Gaussian),
            ("pissa", InitWeights::Pissa { rounds: None }),
            ("pissa_niter_16", InitWeights::Pissa { rounds: Some(16) }),
            ("loftq", InitWeights::Loftq),
        ] {
            let lora = resolve(json!({"init_lora_weights": name})).unwrap();
            assert_eq!(lora.init_lora_weights, want);
            let text = serde_json::to_string(&lora).unwrap();
            assert!(text.contains(&format!("{name:?}")), "{text}");
            assert_eq!(serde_json::from_str::<Lora>(&text).unwrap(), lora);
        }
        let loftq = json!({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}});
        assert_eq!(resolve(loftq).unwrap().init_lora_weights, InitWeights::Loftq);
    }

    #[test]
    fn every_wrong_value_is_named() {
        for (options, message) in [
            (json!({"r": 0}), "r = 0: expected at least 1"),
            (json!({"r": -4}), "r = -4"),
            (json!({"lora_alpha": 0}), "lora_alpha = 0"),
            (json!({"lora_dropout": 1.0}), "lora_dropout = 1"),
            (json!({"lora_dropout": -0.1}), "lora_dropout = -0.1"),
            (json!({"target_modules": []}), "target_modules = []"),
            (json!({"target_modules": [1]}), "target_modules = 1"),
            (json!({"target_modules": ["lm_head"]}), "target_modules = lm_head: expected a linear layer too"),
            (json!({"bias": "all"}), "bias = all: not there yet"),
            (
                json!({"modules_to_save": ["lm_head", "q_proj"]}),
                "modules_to_save = q_proj: expected some of embed_tokens",
            ),
            (json!({"modules_to_save": ["head"]}), "modules_to_save = head"),
            (json!({"init_lora_weights": "olora"}), "init_lora_weights = \"olora\": not there yet; expected True"),
            (json!({"init_lora_weights": "pissa_niter_x"}), "init_lora_weights = \"pissa_niter_x\""),
            (json!({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}), "loftq_bits: 2"),
            (json!({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}}), "loftq_iter: 5: expected 1"),
            (json!({"init_lora_weights": false}), "init_lora_weights = false"),
            (json!({"layers_to_transform": [4]}), "layers_to_transform = 4: expected layers from 0 to 3"),
            (json!({"layers_to_transform": []}), "layers_to_transform = []"),
            (json!({"finetune_last_n_layers": 5}), "finetune_last_n_layers = 5"),
            (json!({"finetune_last_n_layers": 1, "layers_to_transform": 1}), "choose one"),
            (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern = q_proj: 0"),
            (json!({"rank_pattern": {".*q_proj": 4}}), "no regular expression"),
            (json!({"alpha_pattern": {"q_proj": -1}}), "alpha_pattern = q_proj: -1"),
        ] {
            let error = resolve(options.clone()).unwrap_err().to_string();
            assert!(error.contains(message), "{options}: {error}");
        }
    }
}
