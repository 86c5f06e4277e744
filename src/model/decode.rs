//! One token of each of a few sequences through the decoder, straight from packed weights: [`Llama::forward`] for decoding.
//!
//! The same arithmetic as [`super::llama::Layer::forward`] with a cache, without what only a backward needs, and with the
//! products of `ops/gemv.rs`: a weight is read once for all sequences. Buffers come from the context's pool.

use super::kv_cache::{KvCache, LayerCache};
use super::llama::{Layer, Llama};
use crate::ops::gemv::{self, Input};
use crate::ops::rope::{Angles, Turn};
use crate::ops::{Buf, Env, attention, embedding};

impl Llama {
    /// Logits of the next token, `[n_tokens, vocab]`; each sequence gives one token of `env.tokens` or none, and at most
    /// [`gemv::MAX_ROWS`] together.
    pub fn decode(&self, env: &Env<'_>, cache: &mut KvCache) -> Buf {
        let (n_tokens, hidden) = (env.tokens.len(), self.hidden_size);
        let rope = self.rope.angles(&env.tokens.positions);
        let mut x = embedding::forward(env, &self.embed, hidden);
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            layer.decode(env, &rope, &mut x, cache.layer(layer_idx));
        }
        cache.advance(env.tokens);
        let x = self.norm.forward(env, &x).0;
        let input = Input::new(env.ctx, &x, n_tokens, hidden, hidden);
        let mut logits = env.ctx.buf(n_tokens * self.vocab_size);
        gemv::matrix(env, self.head_matrix(), &input, &mut logits);
        gemv::transpose(env.ctx, logits, n_tokens)
    }
}

impl Layer {
    /// x: `[n_tokens, hidden]`, becomes the layer's output.
    fn decode(&self, env: &Env<'_>, rope: &Angles, x: &mut [f32], cache: &mut LayerCache) {
        let (ctx, heads, n_tokens) = (env.ctx, self.heads, env.tokens.len());
        let cu_seqlens = &env.tokens.cu_seqlens;
        let input = |x: &[f32]| Input::new(ctx, x, n_tokens, x.len() / n_tokens, x.len() / n_tokens);
        let h = input(&self.input_norm.forward(env, x).0);
        let (mut q, (mut k, v)) = rayon::join(
            || gemv::linear(env, &self.q, &h),
            || rayon::join(|| gemv::linear(env, &self.k, &h), || gemv::linear(env, &self.v, &h)),
        );
        rope.rotate(ctx, &mut q, heads.q_width(), Turn::Forward);
        rope.rotate(ctx, &mut k, heads.kv_width(), Turn::Forward);
        cache.append(cu_seqlens, heads.kv_width(), &k, &v);
        let attended = attention::forward(ctx, heads, &q, &cache.segments(cu_seqlens, heads.kv_width())).0;
        (ctx.kernels.axpy)(1.0, &gemv::linear(env, &self.o, &input(&attended)), x); // x += o(attended)
        let h = input(&self.post_norm.forward(env, x).0);
        let active = input(&gemv::gated(env, &self.gate, &self.up, &h));
        (ctx.kernels.axpy)(1.0, &gemv::linear(env, &self.down, &active), x); // x += down(active)
    }
}
