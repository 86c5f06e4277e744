//! One forward and backward over a micro-batch, keeping of each layer what there is memory for and re-running the rest.
//!
//! Chen et al. 2016, "Training deep nets with sublinear memory cost", with one segment per layer; what is kept decides
//! how long a step takes and never what comes out of it.

use super::plan::{Sizes, keeps};
use crate::error::Result;
use crate::model::Model;
use crate::model::llama::{Backward, Below, Keep, Layer, Saved};
use crate::ops::linear::Matrix;
use crate::ops::rms_norm::Gain;
use crate::ops::{Buf, DropoutKey, Env, Grads, Tokens, embedding, head};

/// What the backward keeps of the forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Each layer's input, and what the last layer has at hand anyway; the others run again in the backward.
    EveryLayer,
    /// Everything.
    Nothing,
    /// As much as stays within this many bytes of activations; at least what `EveryLayer` keeps.
    Within(usize),
}

/// A micro-batch.
pub struct MicroBatch<'a> {
    /// The tokens.
    pub tokens: &'a Tokens,
    /// What each token is to predict, `[n_tokens]`, -100 where nothing is trained.
    pub targets: &'a [i32],
}

/// How a micro-batch is run.
#[derive(Clone, Copy)]
pub struct StepOptions<'a> {
    /// The key of the dropout masks, `None` for no dropout.
    pub dropout: Option<DropoutKey>,
    /// Strength of the noise on the embeddings, 0 for none; drawn under the key of the dropout masks.
    pub noise_alpha: f32,
    /// What a token's loss counts in the step's loss: 1 / trained tokens of the whole optimizer step.
    pub weight: f32,
    /// What is kept.
    pub recompute: Recompute,
    /// Called between layers; an error ends the step.
    pub poll: &'a (dyn Fn() -> Result<()> + Sync),
}

/// Sum of the token losses; `weight` times its gradient is added to `grads`.
///
/// # Errors
/// [`crate::Error::Data`] for ids outside the vocabulary; what `poll` returns.
pub fn forward_backward(
    model: &Model,
    batch: &MicroBatch<'_>,
    options: &StepOptions<'_>,
    grads: &mut Grads,
) -> Result<f64> {
    let sizes = Sizes::of(model);
    run(model, batch, options, &keeps(&sizes, batch.tokens.len(), options.recompute), grads)
}

/// The step with what each trained layer, and each above one, keeps.
fn run(
    model: &Model,
    batch: &MicroBatch<'_>,
    options: &StepOptions<'_>,
    keeps: &[Keep],
    grads: &mut Grads,
) -> Result<f64> {
    model.check_ids(&batch.tokens.ids)?;
    model.check_targets(batch.targets)?;
    let llama = &model.llama;
    let env = Env { dropout: options.dropout, ..model.env(batch.tokens) };
    let rope = llama.rope.angles(&batch.tokens.positions);
    let embed_trained = matches!(llama.embed, Matrix::Trained(_));
    let n_layers = llama.layers.len();
    // Below the first trained layer nothing needs a gradient.
    let first = n_layers - keeps.len();

    let mut x = embedding::forward(&env, &llama.embed, llama.hidden_size);
    embedding::add_noise(&env, options.noise_alpha, llama.hidden_size, &mut x);
    let mut kept: Vec<(Buf, Option<Saved>)> = Vec::with_capacity(keeps.len());
    for (layer_idx, layer) in llama.layers.iter().enumerate() {
        (options.poll)()?;
        let keep = layer_idx.checked_sub(first).map_or(Keep::Input, |trained_idx| keeps[trained_idx]);
        let (out, saved) = layer.forward(&env, &rope, &x, None, keep);
        let input = std::mem::replace(&mut x, out);
        if layer_idx >= first {
            kept.push((input, saved));
        }
    }
    let (h, norm) = llama.norm.forward(&env, &x);
    (options.poll)()?;
    let (sum, dh) =
        head::loss_and_grad(&env, llama.head_matrix(), llama.vocab_size, &h, batch.targets, options.weight, grads);
    drop(h);
    if first == n_layers && !matches!(llama.norm.gain, Gain::Trained(_)) {
        return Ok(sum);
    }
    let mut dx = env.ctx.zeros(x.len());
    llama.norm.backward(&env, &x, &norm, &dh, &mut dx, grads);
    drop((dh, x, norm));
    for (layer_idx, layer) in llama.layers.iter().enumerate().skip(first).rev() {
        (options.poll)()?;
        let (input, saved) = kept.pop().expect("one entry for each layer from `first`");
        let below = if layer_idx > first || embed_trained { Below::Trained } else { Below::Nothing };
        let at = Backward { env: &env, rope: &rope, x: &input, below };
        let Some(dinput) = layer.backward(at, saved, dx, grads) else { return Ok(sum) };
        dx = dinput;
    }
    if embed_trained {
        embedding::backward(&env, &llama.embed, llama.hidden_size, &dx, grads);
    }
    Ok(sum)
}

/// The first layer whose backward is needed.
pub(super) fn first_trained(model: &Model) -> usize {
    let llama = &model.llama;
    let embed_trained = matches!(llama.embed, Matrix::Trained(_));
    if embed_trained { 0 } else { llama.layers.iter().position(Layer::is_trained).unwrap_or(llama.layers.len()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::lora::whole::train_whole;
    use crate::model::llama::mlp_chunks;
    use crate::model::testing::{TestShape, random_model, random_tokens};
    use crate::ops::Precision;

    fn options() -> StepOptions<'static> {
        let dropout = Some(DropoutKey { seed: 3, step: 5 });
        StepOptions { dropout, noise_alpha: 0.0, weight: 0.01, recompute: Recompute::EveryLayer, poll: &|| Ok(()) }
    }

    fn gradients(model: &Model, batch: &MicroBatch<'_>, keeps: &[Keep]) -> (u64, Vec<Vec<f32>>) {
        let mut grads = Grads::zeros(&model.params);
        let sum = run(model, batch, &options(), keeps, &mut grads).unwrap();
        (sum.to_bits(), grads.all().to_vec())
    }

    #[test]
    fn what_is_kept_changes_no_bit() {
        for (dropout, dora, precision, saved) in [
            (0.1, false, Precision::F32, ""),
            (0.0, true, Precision::F32, "embed_tokens lm_head norm"),
            (0.1, true, Precision::Bf16, ""),
            (0.1, false, Precision::Int16, ""),
            (0.0, true, Precision::Int16, "embed_tokens lm_head norm"),
        ] {
            let shape = TestShape { dropout, dora, precision, ..TestShape::wide() };
            let mut model = random_model(shape);
            train_whole(&mut model, &saved.split_whitespace().collect::<Vec<_>>());
            let (tokens, targets) = random_tokens(&[70, 130], shape.vocab);
            assert!(mlp_chunks(tokens.len(), shape.ffn).len() > 1, "the MLP runs in chunks");
            let batch = MicroBatch { tokens: &tokens, targets: &targets };
            let whole = gradients(&model, &batch, &[Keep::Everything; 3]);
            assert!(whole.1.iter().all(|grad| grad.iter().any(|g| *g != 0.0)), "every tensor has a gradient");
            for keeps in [
                [Keep::Input; 3],
                [Keep::Attention; 3],
                [Keep::Products; 3],
                [Keep::Input, Keep::Attention, Keep::Everything],
                [Keep::Products, Keep::Input, Keep::Attention],
            ] {
                let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                let got = one_thread.install(|| gradients(&model, &batch, &keeps));
                assert!(got == whole, "{precision:?} dora {dora} {keeps:?} {saved}");
            }
        }
    }

    #[test]
    fn chunks_of_the_mlp_change_only_the_order_of_sums() {
        let shape = TestShape::wide();
        let model = random_model(shape);
        let lengths = [60, 90, 64];
        let (tokens, targets) = random_tokens(&lengths, shape.vocab);
        assert_eq!(mlp_chunks(tokens.len(), shape.ffn).len(), 2);
        let (sum, chunked) = gradients(&model, &MicroBatch { tokens: &tokens, targets: &targets }, &[Keep::Input; 3]);
        // Each row alone is one chunk; it keeps its number, and so its dropout masks.
        let (mut total, mut grads) = (0.0, Grads::zeros(&model.params));
        for row in 0..lengths.len() {
            let range = tokens.cu_seqlens[row]..tokens.cu_seqlens[row + 1];
            assert_eq!(mlp_chunks(range.len(), shape.ffn).len(), 1);
            let batch = MicroBatch { tokens: &tokens.rows(range.clone()), targets: &targets[range] };
            total += run(&model, &batch, &options(), &[Keep::Input; 3], &mut grads).unwrap();
        }
        assert!((f64::from_bits(sum) - total).abs() < 1e-5 * total, "losses");
        for (i, (got, want)) in chunked.iter().zip(grads.all()).enumerate() {
            let scale = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let difference = got.iter().zip(want).fold(0.0_f32, |m, (g, w)| m.max((g - w).abs()));
            // 2e-5: f32 sums of some hundred tokens through three layers, in another order.
            assert!(difference <= 2e-5 * scale, "gradient {i}: {difference} of {scale}");
        }
    }

    #[test]
    fn blocks_of_16_bits_are_closer_to_f32_than_bf16() {
        let made = |precision| {
            let shape = TestShape { precision, dropout: 0.0, ..TestShape::wide() };
            let model = random_model(shape);
            let (tokens, targets) = random_tokens(&[70, 130], shape.vocab);
            let (sum, grads) = gradients(&model, &MicroBatch { tokens: &tokens, targets: &targets }, &[Keep::Input; 3]);
            (f64::from_bits(sum), grads)
        };
        let (loss, want) = made(Precision::F32);
        // Of each tensor's gradient, what is off in relation to all of it.
        let off = |grads: &[Vec<f32>]| {
            let norm = |grad: &[f32]| grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let relative = |(got, want): (&Vec<f32>, &Vec<f32>)| {
                let difference: Vec<f32> = got.iter().zip(want).map(|(g, w)| g - w).collect();
                norm(&difference) / norm(want)
            };
            grads.iter().zip(&want).map(relative).fold(0.0, f64::max)
        };
        let [(loss_16, int16), (loss_bf16, bf16)] = [Precision::Int16, Precision::Bf16].map(made);
        let (of_int16, of_bf16) = (off(&int16), off(&bf16));
        eprintln!("gradients off by {of_int16:.1e} (int16), {of_bf16:.1e} (bf16)");
        eprintln!("losses off by {:.1e} and {:.1e}", (loss_16 / loss - 1.0).abs(), (loss_bf16 / loss - 1.0).abs());
        assert!(of_int16 < 5e-2 && of_int16 < of_bf16 / 3.0, "{of_int16} {of_bf16}");
        assert!((loss_16 / loss - 1.0).abs() < 1e-5, "{loss_16} against {loss}");
    }

    #[test]
    fn layers_below_the_first_adapter_keep_nothing_and_the_rest_is_unchanged() {
        let shape = TestShape { layers: 3, ..TestShape::wide() };
        let (tokens, targets) = random_tokens(&[40, 30], shape.vocab);
        let batch = MicroBatch { tokens: &tokens, targets: &targets };
        let mut model = random_model(shape);
        let all = gradients(&model, &batch, &[Keep::Input; 3]);
        // With frozen adapters below, the gradients above are the same: they only end earlier.
        let frozen = model.llama.layers[0].linears_mut().map(|linear| linear.lora.take());
        assert_eq!(first_trained(&model), 1);
        let without = gradients(&model, &batch, &[Keep::Input; 2]);
        assert_ne!(all.0, without.0, "the adapters of the first layer did something");
        for lora in frozen.into_iter().flatten() {
            assert!(without.1[lora.a.0].iter().all(|g| *g == 0.0));
        }
        for (grad, _) in without.1.iter().zip(model.params.all()).skip(14) {
            assert!(grad.iter().any(|g| *g != 0.0));
        }
        // The gradient that enters a layer whose input needs none is used for its own tensors all the same.
        model.llama.layers[0].q.lora = model.llama.layers[1].q.lora.clone();
        let through = gradients(&model, &batch, &[Keep::Input; 3]);
        assert_ne!(through.1[model.llama.layers[1].q.lora.as_ref().unwrap().a.0], vec![0.0; 3 * 32]);
    }
}
