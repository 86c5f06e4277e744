//! One forward and backward over a micro-batch, keeping only each layer's input and re-running the layer in the backward.
//!
//! Chen et al. 2016, "Training deep nets with sublinear memory cost", with one segment per layer.

use crate::error::Result;
use crate::model::Model;
use crate::model::llama::{Layer, Saved};
use crate::ops::linear::Matrix;
use crate::ops::rms_norm::Gain;
use crate::ops::{Buf, DropoutKey, Env, Grads, Tokens, embedding, head};

/// What the backward keeps of the forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Only each layer's input; the layer runs again in the backward.
    EveryLayer,
    /// Everything.
    Nothing,
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
    model.check_ids(&batch.tokens.ids)?;
    model.check_targets(batch.targets)?;
    let llama = &model.llama;
    let env = Env { ctx: &model.ctx, params: &model.params, tokens: batch.tokens, dropout: options.dropout };
    let rope = llama.rope.angles(&batch.tokens.positions);
    // Below the first trained layer nothing needs a gradient.
    let embed_trained = matches!(llama.embed, Matrix::Trained(_));
    let n_layers = llama.layers.len();
    let first = if embed_trained { 0 } else { llama.layers.iter().position(Layer::is_trained).unwrap_or(n_layers) };

    let mut x = embedding::forward(&env, &llama.embed, llama.hidden_size);
    let mut kept: Vec<(Buf, Option<Saved>)> = Vec::with_capacity(n_layers);
    for (layer_idx, layer) in llama.layers.iter().enumerate() {
        (options.poll)()?;
        let (out, saved) = layer.forward(&env, &rope, &x, None);
        let input = std::mem::replace(&mut x, out);
        if layer_idx >= first {
            kept.push((input, (options.recompute == Recompute::Nothing).then_some(saved)));
        }
    }
    let (h, norm) = llama.norm.forward(&env, &x);
    (options.poll)()?;
    let (sum, dh) =
        head::loss_and_grad(&env, llama.head_matrix(), llama.vocab_size, &h, batch.targets, options.weight, grads);
    if first == n_layers && !matches!(llama.norm.gain, Gain::Trained(_)) {
        return Ok(sum);
    }
    let mut dx = env.ctx.zeros(x.len());
    llama.norm.backward(&env, &x, &norm, &dh, &mut dx, grads);
    drop((h, dh, x, norm));
    for layer in llama.layers[first..].iter().rev() {
        (options.poll)()?;
        let (input, saved) = kept.pop().expect("one entry for each layer from `first`");
        let saved = saved.unwrap_or_else(|| layer.forward(&env, &rope, &input, None).1);
        dx = layer.backward(&env, &rope, &input, &saved, dx, grads);
    }
    if embed_trained {
        embedding::backward(&env, &llama.embed, llama.hidden_size, &dx, grads);
    }
    Ok(sum)
}
