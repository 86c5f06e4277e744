//! A few tokens through the decoder, straight from packed weights: [`Llama::forward`] for decoding.
//!
//! The same arithmetic as [`super::llama::Layer::forward`] with a cache, without what only a backward needs, and with the
//! products of `ops/gemv.rs`: a weight is read once for all tokens. Buffers come from the context's pool.

use super::Model;
use super::kv_cache::{KvCache, LayerCache};
use super::llama::{Layer, Llama};
use crate::error::{Error, Result};
use crate::kernels::gemv::BLOCK;
use crate::ops::crew::Crew;
use crate::ops::gemv::{self, Input};
use crate::ops::integer::Quantized;
use crate::ops::linear::{Linear, Matrix};
use crate::ops::rope::{Angles, Turn};
use crate::ops::{Activations, Buf, Env, Precision, attention, embedding};
use crate::quant::Int8Matrix;

impl Model {
    /// Takes the head of generation in `bits`: 8 for a copy in 8 bits, which halves what a token reads of a bf16 head, or
    /// `None` for the head as it is. Losses and training never use the copy.
    ///
    /// # Errors
    /// [`Error::Config`] for other bits, a head that is trained, or a hidden size that is no multiple of 64.
    pub fn set_lm_head_bits(&mut self, bits: Option<u32>) -> Result<()> {
        let bad = |value: u32, expected| Err(Error::config("lm_head_bits", value, expected));
        self.int8_head = match (bits, self.llama.head_matrix()) {
            (None, _) => None,
            (Some(8), Matrix::Frozen(_)) if !self.config.hidden_size.is_multiple_of(BLOCK) => {
                return bad(8, "expected None: the hidden size of this model is no multiple of 64");
            }
            (Some(8), Matrix::Frozen(head)) => {
                let kernels = self.ctx.kernels;
                let read = |row: usize, out: &mut [f32]| head.read(kernels, row * head.cols(), out);
                Some(Int8Matrix::quantize(head.rows(), head.cols(), read)?)
            }
            (Some(8), Matrix::Trained(_)) => return bad(8, "expected None: the head of this model is trained"),
            (Some(other), _) => return bad(other, "expected 8 or None"),
        };
        Ok(())
    }

    /// Lets generation round the inputs of layers in 4 or 8 bits, and of a head in 8 bits, to `bits`, 64 neighbours to a scale: 8;
    /// 16, where a few tokens meet such a layer and that is faster; 32 for inputs as they are; or `None` for what is usual
    /// with the model's precision: 32 in f32, else 16. Losses and training never round.
    ///
    /// # Errors
    /// [`Error::Config`] for other bits, and where no layer could take its input so.
    pub fn set_activation_bits(&mut self, bits: Option<u32>) -> Result<()> {
        let bad = |value: u32, expected| Err(Error::config("activation_bits", value, expected));
        let takes =
            |linear: &Linear| matches!(&linear.matrix, Matrix::Frozen(weight) if Quantized::of(weight).is_some());
        let nobody = || {
            self.int8_head.is_none() && !self.llama.layers.iter().any(|layer| layer.linears().into_iter().any(takes))
        };
        self.activations = match bits {
            None => self.usual_activations,
            Some(32) => Activations::Exact,
            Some(16) => Activations::Bits16,
            Some(8) if nobody() => {
                return bad(
                    8,
                    "expected None: no layer is in 4 or 8 bits with rows of a multiple of 64 (load_in_4bit=True makes them)",
                );
            }
            Some(8) => Activations::Bits8,
            Some(other) => return bad(other, "expected 8, 16, 32 or None"),
        };
        Ok(())
    }

    /// Makes 16 bits usual ([`set_activation_bits`](Self::set_activation_bits)) although the products of many tokens are of f32.
    pub fn usually_decode_in_16_bits(&mut self) {
        (self.activations, self.usual_activations) = (Activations::Bits16, Activations::Bits16);
    }

    /// Whether a few tokens are rounded otherwise than many are.
    pub(crate) fn few_differ_from_many(&self) -> bool {
        self.ctx.precision == Precision::Int16
            || (self.activations == Activations::Bits16 && self.ctx.kernels.int16.gemv.fast)
    }

    /// Makes the copy of [`set_lm_head_bits`](Self::set_lm_head_bits) anew after the head has changed; drops it where the
    /// head is trained now.
    ///
    /// # Errors
    /// Those of quantization.
    pub(crate) fn refresh_lm_head_copy(&mut self) -> Result<()> {
        let is_frozen = matches!(self.llama.head_matrix(), Matrix::Frozen(_));
        self.set_lm_head_bits(self.int8_head.as_ref().filter(|_| is_frozen).map(|_| 8))
    }

    /// Logits for generation, `[n, vocab]`, from the last norm's output, `[n, hidden]`. A row does not depend on the others.
    pub fn next_logits(&self, env: &Env<'_>, crew: &Crew, hidden: &[f32]) -> Buf {
        let (width, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let product = |hidden: &[f32]| {
            let input = Input::new(env.ctx, hidden, hidden.len() / width, width, width).rounded(env.activations);
            match &self.int8_head {
                Some(head) => gemv::int8(env.ctx, crew, head, &input),
                None => gemv::matrix(env, crew, self.llama.head_matrix(), vocab, &input),
            }
        };
        if hidden.len() <= gemv::MAX_ROWS * width {
            return product(hidden);
        }
        let mut logits = env.ctx.buf(hidden.len() / width * vocab);
        for (hidden, logits) in hidden.chunks(gemv::MAX_ROWS * width).zip(logits.chunks_mut(gemv::MAX_ROWS * vocab)) {
            logits.copy_from_slice(&product(hidden));
        }
        logits
    }
}

impl Llama {
    /// Hidden states after the last norm, `[n_tokens, hidden]`, of at most [`gemv::MAX_ROWS`] new tokens.
    pub fn decode(&self, env: &Env<'_>, crew: &Crew, cache: &mut KvCache) -> Buf {
        let rope = self.rope.angles(&env.tokens.positions);
        let mut x = embedding::forward(env, &self.embed, self.hidden_size);
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            layer.decode(env, crew, &rope, &mut x, cache.layer(layer_idx));
        }
        cache.advance(env.tokens);
        self.norm.forward(env, &x).0
    }
}

impl Layer {
    /// x: `[n_tokens, hidden]`, becomes the layer's output.
    fn decode(&self, env: &Env<'_>, crew: &Crew, rope: &Angles, x: &mut [f32], cache: &mut LayerCache) {
        let (ctx, heads, n_tokens) = (env.ctx, self.heads, env.tokens.len());
        let cu_seqlens = &env.tokens.cu_seqlens;
        let input =
            |x: &[f32]| Input::new(ctx, x, n_tokens, x.len() / n_tokens, x.len() / n_tokens).rounded(env.activations);
        let h = input(&self.input_norm.forward(env, x).0);
        let [mut q, mut k, v] = gemv::linears(env, crew, [&self.q, &self.k, &self.v], &h);
        rope.rotate(ctx, &mut q, heads.q_width(), Turn::Forward);
        rope.rotate(ctx, &mut k, heads.kv_width(), Turn::Forward);
        cache.append(cu_seqlens, heads.kv_width(), &k, &v);
        let attended = attention::decode(ctx, crew, heads, &q, &cache.segments(cu_seqlens, heads.kv_width()));
        let [out] = gemv::linears(env, crew, [&self.o], &input(&attended));
        (ctx.kernels.axpy)(1.0, &out, x); // x += o(attended)
        let h = input(&self.post_norm.forward(env, x).0);
        let active = input(&gemv::gated(env, crew, [&self.gate, &self.up], &h));
        let [out] = gemv::linears(env, crew, [&self.down], &active);
        (ctx.kernels.axpy)(1.0, &out, x); // x += down(active)
    }
}
