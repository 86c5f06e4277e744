//! Low-rank adapters: where they go, how they start, and their files.  Hu et al. 2021.

mod converted;
pub mod peft;
pub mod spectral;
pub mod svd;
pub mod whole;

use crate::error::{Error, Result};
use crate::kernels::philox::{philox4x32_10, unit_f32};
use crate::model::Model;
use crate::model::llama::LINEAR_NAMES;
use crate::model::weights::Originals;
use crate::ops::Weight;
use crate::ops::dora::Dora;
use crate::ops::linear::{Halves, Lora, Matrix};
use spectral::Site;
use std::sync::Arc;
use svd::Rounds;

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

    /// Tells the layers' random numbers apart.
    fn number(&self) -> u32 {
        (self.layer_idx * LINEAR_NAMES.len() + self.linear_idx) as u32
    }

    /// Tensors of the adapter: A, B and perhaps a magnitude.
    fn n_tensors(&self) -> usize {
        if self.dora { 3 } else { 2 }
    }

    fn site<'a>(&self, weight: &'a Weight, seed: u64) -> Site<'a> {
        Site { module: self.module(), weight, rank: self.rank, scale: self.scale, seed, number: self.number() }
    }
}

/// How an adapter starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// A uniform in ±1 / sqrt(in), B zero, so that the adapted model starts as the base model: PEFT's default
    /// (`kaiming_uniform_` with a = sqrt 5).
    Uniform,
    /// A normal with deviation 1 / rank, B zero: PEFT's `"gaussian"`.
    Gaussian,
    /// With the leading singular vectors of the matrix, which loses them ([`spectral`]).
    Pissa(Rounds),
    /// With the leading singular vectors of what quantization took from the matrix ([`spectral`]).
    Loftq,
}

/// The name of one linear layer, `model.layers.0.self_attn.q_proj`.
pub fn module_name(layer_idx: usize, linear_idx: usize) -> String {
    format!("model.layers.{layer_idx}.{}", LINEAR_NAMES[linear_idx])
}

/// Adds adapters to a model that has none. A magnitude starts as the lengths of the rows as they are then, so it changes
/// nothing.
///
/// # Errors
/// [`Error::Config`] if the model already has trained tensors, a rank is 0 or too large for `init`, a placement names no
/// layer, or nothing was quantized that LoftQ could repair; with [`Init::Pissa`] and [`Init::Loftq`] also those of reading the
/// model's folder again.
pub fn inject(model: &mut Model, placements: &[Placement], init: Init, seed: u64) -> Result<()> {
    if !model.params.all().is_empty() {
        let expected = "this model already has adapters or is fully trained; load it again to start afresh";
        return Err(Error::config("get_peft_model", "model", expected));
    }
    if placements.is_empty() {
        return Err(Error::config("target_modules", "(no layer)", "matches no linear layer of this model"));
    }
    let mut originals = Originals::of(&model.folder);
    // What can be wrong is found before anything is changed.
    for place in placements {
        if place.rank == 0 {
            return Err(Error::config("r", 0, "expected a rank of at least 1"));
        }
        let Some(layer) = model.llama.layers.get(place.layer_idx) else {
            let expected = format!("the model has layers 0 to {}", model.llama.layers.len().saturating_sub(1));
            return Err(Error::config("layers_to_transform", place.layer_idx, expected));
        };
        if let Matrix::Frozen(weight) = &layer.linears()[place.linear_idx].matrix {
            place.site(weight, seed).check(init, &mut originals)?;
        }
    }
    for place in placements {
        let (module, mask) = (place.module(), place.number());
        let linear = &mut *model.llama.layers[place.layer_idx].linears_mut()[place.linear_idx];
        let (rank, inputs, outputs) = (place.rank, linear.inputs, linear.outputs);
        let zeros = || vec![0.0; outputs * rank];
        let (first, taken) = match (init, &linear.matrix) {
            (Init::Pissa(rounds), Matrix::Frozen(weight)) => {
                let (first, rest) = place.site(weight, seed).principal(&model.ctx, &mut originals, rounds)?;
                linear.matrix = Matrix::Frozen(rest);
                (first.clone(), Some(Arc::new(first)))
            }
            (Init::Loftq, Matrix::Frozen(weight)) => (place.site(weight, seed).lost(&model.ctx, &mut originals)?, None),
            _ => (Halves { a: initial(init, rank, inputs, seed, mask), b: zeros() }, None),
        };
        let a = model.params.add(format!("{module}.lora_A.weight"), vec![rank, inputs], first.a, true);
        let b = model.params.add(format!("{module}.lora_B.weight"), vec![outputs, rank], first.b, true);
        let (scale, dropout) = (place.scale, place.dropout);
        let mut lora = Lora { a, b, rank, scale, dropout, module: mask, dora: None, taken };
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
    let value = |i: usize| match init {
        Init::Gaussian => normal(i, module, key) / rank as f32,
        _ => (2.0 * unit_f32(philox4x32_10([i as u32, (i >> 32) as u32, module, 0], key)[0]) - 1.0) * bound,
    };
    (0..rank * inputs).map(value).collect()
}

/// A normal number of deviation 1, a function of (key, module, element).  Box and Muller 1958.
fn normal(element: usize, module: u32, key: [u32; 2]) -> f32 {
    let words = philox4x32_10([element as u32, (element >> 32) as u32, module, 0], key);
    // 1 - u is never 0.
    let radius = (-2.0 * (1.0 - unit_f32(words[0])).ln()).sqrt();
    radius * (std::f32::consts::TAU * unit_f32(words[1])).cos()
}
