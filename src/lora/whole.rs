//! Modules that are trained whole beside an adapter, in f32: PEFT's `modules_to_save`.
//!
//! PEFT trains a copy of each module. So it is here, but the frozen original is kept only where something still uses it:
//! where the head is the embedding table and only one of the two is trained. Where both are, they are two copies that go
//! apart; `ensure_weight_tying` keeps them one tensor, which gets the sum of both gradients.

use crate::config::Lora;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::vocab::Which;
use crate::ops::linear::Matrix;
use crate::ops::rms_norm::{Gain, RmsNorm};

/// A module that can be trained whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// The embedding table or the head, `[vocab, hidden]`.
    Table(Which),
    /// The norm before a layer's attention, `[hidden]`.
    InputNorm(usize),
    /// The norm before a layer's MLP, `[hidden]`.
    PostNorm(usize),
    /// The norm before the head, `[hidden]`.
    LastNorm,
}

/// The embedding table.
pub const EMBEDDING: Whole = Whole::Table(Which::Embedding);
/// The head.
pub const HEAD: Whole = Whole::Table(Which::Head);

impl Whole {
    /// Its name, `model.embed_tokens`.
    pub fn module(self) -> String {
        match self {
            Self::Table(which) => which.module().to_owned(),
            Self::InputNorm(layer_idx) => format!("model.layers.{layer_idx}.input_layernorm"),
            Self::PostNorm(layer_idx) => format!("model.layers.{layer_idx}.post_attention_layernorm"),
            Self::LastNorm => "model.norm".to_owned(),
        }
    }

    /// The name of its weight, `model.embed_tokens.weight`.
    pub fn weight(self) -> String {
        format!("{}.weight", self.module())
    }

    /// Whether it is the embedding table or the head.
    pub fn is_table(self) -> bool {
        matches!(self, Self::Table(_))
    }

    /// The shape of its weight.
    pub fn shape(self, vocab: usize, hidden: usize) -> Vec<usize> {
        if self.is_table() { vec![vocab, hidden] } else { vec![hidden] }
    }
}

/// The modules that settings train whole in a model of `n_layers`, `tied` if its head is the embedding table; in the
/// order of a checkpoint.
///
/// A name applies to every module that ends with it, as in PEFT: `norm` is every norm.
///
/// # Errors
/// [`Error::Config`] for a name that applies to none.
pub fn modules(lora: &Lora, n_layers: usize, tied: bool) -> Result<Vec<Whole>> {
    let of_layer = |layer_idx| [Whole::InputNorm(layer_idx), Whole::PostNorm(layer_idx)];
    let norms = (0..n_layers).flat_map(of_layer).chain([Whole::LastNorm]);
    let all: Vec<_> = [EMBEDDING].into_iter().chain(norms).chain([HEAD]).collect();
    let asked = |whole: &Whole, name: &str| whole.module().ends_with(name);
    if let Some(name) = lora.modules_to_save.iter().find(|name| !all.iter().any(|whole| asked(whole, name))) {
        let expected = format!("the model has no such module; its layers are 0 to {}", n_layers.saturating_sub(1));
        return Err(Error::config("modules_to_save", name, expected));
    }
    let one = lora.ensure_weight_tying && tied;
    let is_trained = |whole: &Whole| lora.modules_to_save.iter().any(|name| asked(whole, name));
    Ok(all
        .into_iter()
        .filter(|&whole| match whole {
            EMBEDDING if one => is_trained(&EMBEDDING) || is_trained(&HEAD),
            HEAD if one => false,
            whole => is_trained(&whole),
        })
        .collect())
}

/// Has the modules of [`modules`] trained from now on, starting as they are.
///
/// # Errors
/// None but those of a head's 8-bit copy, which is dropped where the head is trained.
pub(super) fn train(model: &mut Model, wholes: &[Whole], ensure_weight_tying: bool) -> Result<()> {
    for &whole in wholes {
        match whole {
            EMBEDDING => {
                let trained = trained_table(model, EMBEDDING);
                let frozen = std::mem::replace(&mut model.llama.embed, trained);
                // A head that was this table goes on with it.
                if model.llama.head.is_none() && !ensure_weight_tying {
                    model.llama.head = Some(frozen);
                }
            }
            HEAD => model.llama.head = Some(trained_table(model, HEAD)),
            Whole::InputNorm(layer_idx) => {
                train_norm(model, whole, |model| &mut model.llama.layers[layer_idx].input_norm);
            }
            Whole::PostNorm(layer_idx) => {
                train_norm(model, whole, |model| &mut model.llama.layers[layer_idx].post_norm);
            }
            Whole::LastNorm => train_norm(model, whole, |model| &mut model.llama.norm),
        }
    }
    model.refresh_lm_head_copy()
}

/// The table or head as a trained tensor that starts as it is.
fn trained_table(model: &mut Model, whole: Whole) -> Matrix {
    let matrix = if whole == HEAD { model.llama.head_matrix() } else { &model.llama.embed };
    let values = match matrix {
        Matrix::Frozen(weight) => weight.to_f32(model.ctx.kernels),
        Matrix::Trained(id) => model.params.get(*id).to_vec(),
    };
    let shape = whole.shape(model.config.vocab_size, model.config.hidden_size);
    Matrix::Trained(model.params.add(whole.weight(), shape, values, true))
}

fn train_norm(model: &mut Model, whole: Whole, norm: impl Fn(&mut Model) -> &mut RmsNorm) {
    if let Gain::Frozen(values) = &mut norm(model).gain {
        let values = std::mem::take(values);
        let id = model.params.add(whole.weight(), vec![values.len()], values, false);
        norm(model).gain = Gain::Trained(id);
    }
}

/// Has modules of a test model trained whole, whatever else is trained in it.
#[cfg(test)]
pub(crate) fn train_whole(model: &mut Model, names: &[&str]) {
    let n_layers = model.llama.layers.len();
    let names = names.iter().map(|&name| name.to_owned()).collect();
    let options = crate::config::LoraOptions { modules_to_save: Some(names), ..Default::default() };
    let lora = options.resolve(n_layers).expect("names that can be trained whole");
    let wholes = modules(&lora, n_layers, model.llama.head.is_none()).expect("names of this model");
    train(model, &wholes, false).expect("no 8-bit head");
}
