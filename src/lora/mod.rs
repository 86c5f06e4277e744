//! Low-rank adapters: where they go, how they start, and their files.  Hu et al. 2021.

pub mod peft;
pub mod whole;

use crate::error::{Error, Result};
use crate::kernels::philox::{philox4x32_10, unit_f32};
use crate::model::Model;
use crate::model::llama::LINEAR_NAMES;
use crate::ops::dora::Dora;
use crate::ops::linear::{Lora, Matrix};
use std::sync::Arc;

/// One adapter to be added.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// The decoder layer.
    pub layer_idx: usize,
    /// Which of [`LINEAR_NAMES`].
    pub linear_idx: usize,
    /// Rank.
    pub rank: usize,
    /// alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    pub scale: f32,
    /// Dropout before A.
    pub dropout: f32,
    /// Whether the rows of the adapted matrix get a trained length: DoRA, Liu et al. 2024.
    pub dora: bool,
}

impl Placement {
    /// The module's name, `model.layers.0.self_attn.q_proj`.
    pub fn module(&self) -> String {
        module_name(self.layer_idx, self.linear_idx)
    }
}

/// How A starts; B is zero, so that the adapted model starts as the base model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Uniform in ±1 / sqrt(in): PEFT's default (`kaiming_uniform_` with a = sqrt 5).
    Uniform,
    /// Normal with deviation 1 / rank: PEFT's `"gaussian"`.
    Gaussian,
}

/// The name of one linear layer, `model.layers.0.self_attn.q_proj`.
pub fn module_name(layer_idx: usize, linear_idx: usize) -> String {
    format!("model.layers.{layer_idx}.{}", LINEAR_NAMES[linear_idx])
}

/// Adds adapters to a model that has none. A magnitude starts as the lengths of the frozen rows, so it changes nothing.
///
/// # Errors
/// [`Error::Config`] if the model already has trained tensors, a rank is 0, or a placement names no layer.
pub fn inject(model: &mut Model, placements: &[Placement], init: Init, seed: u64) -> Result<()> {
    if !model.params.all().is_empty() {
        let expected = "this model already has adapters or is fully trained; load it again to start afresh";
        return Err(Error::config("get_peft_model", "model", expected));
    }
    if placements.is_empty() {
        return Err(Error::config("target_modules", "(no layer)", "matches no linear layer of this model"));
    }
    for place in placements {
        let module = place.module();
        if place.rank == 0 {
            return Err(Error::config("r", 0, "expected a rank of at least 1"));
        }
        let n_layers = model.llama.layers.len();
        let Some(layer) = model.llama.layers.get_mut(place.layer_idx) else {
            let expected = format!("the model has layers 0 to {}", n_layers.saturating_sub(1));
            return Err(Error::config("layers_to_transform", place.layer_idx, expected));
        };
        let linear = &mut *layer.linears_mut()[place.linear_idx];
        let mask = (place.layer_idx * LINEAR_NAMES.len() + place.linear_idx) as u32;
        let (rank, inputs, outputs) = (place.rank, linear.inputs, linear.outputs);
        let a = initial(init, rank, inputs, seed, mask);
        let a = model.params.add(format!("{module}.lora_A.weight"), vec![rank, inputs], a, true);
        let b = vec![0.0; outputs * rank];
        let b = model.params.add(format!("{module}.lora_B.weight"), vec![outputs, rank], b, true);
        let mut lora = Lora { a, b, rank, scale: place.scale, dropout: place.dropout, module: mask, dora: None };
        if let (true, Matrix::Frozen(weight)) = (place.dora, &linear.matrix) {
            let name = format!("{module}.lora_magnitude_vector");
            lora.dora = Some(Arc::new(Dora::begin(&model.ctx, &mut model.params, name, weight, &lora)));
        }
        linear.lora = Some(lora);
    }
    Ok(())
}

/// `[rank, inputs]`, a function of (seed, module, element).
fn initial(init: Init, rank: usize, inputs: usize, seed: u64, module: u32) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32 ^ 0x4C6F_5241];
    let bound = 1.0 / (inputs as f32).sqrt();
    (0..rank * inputs)
        .map(|i| {
            let words = philox4x32_10([i as u32, (i >> 32) as u32, module, 0], key);
            let u = unit_f32(words[0]);
            match init {
                Init::Uniform => (2.0 * u - 1.0) * bound,
                Init::Gaussian => {
                    // Box and Muller 1958; 1 - u is never 0.
                    let radius = (-2.0 * (1.0 - u).ln()).sqrt();
                    radius * (std::f32::consts::TAU * unit_f32(words[1])).cos() / rank as f32
                }
            }
        })
        .collect()
}
