//! The Llama decoder (Touvron et al. 2023, section 2.2; grouped heads of Llama 2, rope scaling of Llama 3.1).
//!
//! `x = embed(ids)`; each layer `x += o(attention(rope(q(h)), rope(k(h)), v(h)))` with `h = norm(x)`, then
//! `x += down(silu(gate(h)) · up(h))` with `h = norm(x)`; `logits = head(norm(x))`.
//! Every forward quoted in a backward stands in this file.

use super::kv_cache::{KvCache, LayerCache};
use crate::ops::attention::{self, Forward, Heads};
use crate::ops::linear::{self, Linear, Matrix};
use crate::ops::rms_norm::{self, RmsNorm};
use crate::ops::rope::{Angles, Rope, Turn};
use crate::ops::{Buf, Ctx, Env, Grads, embedding, head, rows_per_task, swiglu};
use rayon::prelude::*;

/// The decoder.
pub struct Llama {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// `[vocab, hidden]`.
    pub embed: Matrix,
    /// From the first to the last.
    pub layers: Vec<Layer>,
    /// The norm before the head.
    pub norm: RmsNorm,
    /// `[vocab, hidden]`; `None` where it is the embedding table.
    pub head: Option<Matrix>,
    /// The rotary frequencies.
    pub rope: Rope,
}

/// One decoder layer.
pub struct Layer {
    /// Sizes of the attention.
    pub heads: Heads,
    /// The norm before the attention.
    pub input_norm: RmsNorm,
    /// Queries, `[heads · head_dim, hidden]`.
    pub q: Linear,
    /// Keys, `[kv_heads · head_dim, hidden]`.
    pub k: Linear,
    /// Values, `[kv_heads · head_dim, hidden]`.
    pub v: Linear,
    /// Output of the attention, `[hidden, heads · head_dim]`.
    pub o: Linear,
    /// The norm before the MLP.
    pub post_norm: RmsNorm,
    /// `[ffn, hidden]`.
    pub gate: Linear,
    /// `[ffn, hidden]`.
    pub up: Linear,
    /// `[hidden, ffn]`.
    pub down: Linear,
}

/// What a layer's backward needs beside its input.
pub struct Saved {
    norm1: rms_norm::Saved,
    h1: Buf,
    q: Buf,
    k: Buf,
    v: Buf,
    lin_q: linear::Saved,
    lin_k: linear::Saved,
    lin_v: linear::Saved,
    attended: Buf,
    lse: Buf,
    lin_o: linear::Saved,
    mid: Buf,
    norm2: rms_norm::Saved,
    h2: Buf,
    gate: Buf,
    up: Buf,
    lin_gate: linear::Saved,
    lin_up: linear::Saved,
    active: Buf,
    lin_down: linear::Saved,
}

/// The linear layers of a decoder layer by their Hugging Face names, in the order of [`Layer::linears`].
pub const LINEAR_NAMES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl Layer {
    /// The linear layers in the order of [`LINEAR_NAMES`].
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// The linear layers in the order of [`LINEAR_NAMES`].
    pub fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// Whether anything in this layer is trained.
    pub fn is_trained(&self) -> bool {
        self.linears().iter().any(|linear| linear.is_trained())
            || [&self.input_norm, &self.post_norm].iter().any(|norm| matches!(norm.gain, rms_norm::Gain::Trained(_)))
    }

    /// x: `[n_tokens, hidden]` -> `[n_tokens, hidden]`. With a cache, the new tokens see what their sequence has seen.
    pub fn forward(&self, env: &Env<'_>, rope: &Angles, x: &[f32], cache: Option<&mut LayerCache>) -> (Buf, Saved) {
        let (ctx, heads) = (env.ctx, self.heads);
        let cu_seqlens = &env.tokens.cu_seqlens;
        let (h1, norm1) = self.input_norm.forward(env, x);
        let (mut q, lin_q) = self.q.forward(env, &h1);
        let (mut k, lin_k) = self.k.forward(env, &h1);
        let (v, lin_v) = self.v.forward(env, &h1);
        rope.rotate(ctx, &mut q, heads.q_width(), Turn::Forward);
        rope.rotate(ctx, &mut k, heads.kv_width(), Turn::Forward);
        let (attended, lse) = match cache {
            None => attention::forward(ctx, heads, &q, &attention::segments(cu_seqlens, heads.kv_width(), &k, &v)),
            Some(cache) => {
                cache.append(cu_seqlens, heads.kv_width(), &k, &v);
                attention::forward(ctx, heads, &q, &cache.segments(cu_seqlens, heads.kv_width()))
            }
        };
        let (mut mid, lin_o) = self.o.forward(env, &attended);
        add(ctx, &mut mid, x); // mid = x + o(attended)
        let (h2, norm2) = self.post_norm.forward(env, &mid);
        let (gate, lin_gate) = self.gate.forward(env, &h2);
        let (up, lin_up) = self.up.forward(env, &h2);
        let active = swiglu::forward(ctx, &gate, &up);
        let (mut out, lin_down) = self.down.forward(env, &active);
        add(ctx, &mut out, &mid); // out = mid + down(active)
        let saved = Saved {
            norm1,
            h1,
            q,
            k,
            v,
            lin_q,
            lin_k,
            lin_v,
            attended,
            lse,
            lin_o,
            mid,
            norm2,
            h2,
            gate,
            up,
            lin_gate,
            lin_up,
            active,
            lin_down,
        };
        (out, saved)
    }

    /// From the gradient of the output to that of the input;  x: the forward's input, dout: `[n_tokens, hidden]`.
    pub fn backward(&self, env: &Env<'_>, rope: &Angles, x: &[f32], s: &Saved, dout: Buf, grads: &mut Grads) -> Buf {
        let ctx = env.ctx;
        // out = mid + down(silu(gate(h2)) · up(h2)): dmid starts as dout
        let mut dactive = ctx.zeros(s.active.len());
        self.down.backward(env, &s.active, &s.lin_down, &dout, Some(&mut dactive), grads);
        let (dgate, dup) = swiglu::backward(ctx, &s.gate, &s.up, &dactive);
        drop(dactive);
        let mut dh2 = ctx.zeros(s.h2.len());
        self.gate.backward(env, &s.h2, &s.lin_gate, &dgate, Some(&mut dh2), grads);
        self.up.backward(env, &s.h2, &s.lin_up, &dup, Some(&mut dh2), grads);
        drop((dgate, dup));
        let mut dmid = dout;
        self.post_norm.backward(env, &s.mid, &s.norm2, &dh2, &mut dmid, grads);
        drop(dh2);
        // mid = x + o(attended): dx starts as dmid
        let mut dattended = ctx.zeros(s.attended.len());
        self.o.backward(env, &s.attended, &s.lin_o, &dmid, Some(&mut dattended), grads);
        let f = Forward { q: &s.q, k: &s.k, v: &s.v, out: &s.attended, lse: &s.lse };
        let (mut dq, mut dk, dv) = attention::backward(ctx, self.heads, &env.tokens.cu_seqlens, f, &dattended);
        drop(dattended);
        rope.rotate(ctx, &mut dq, self.heads.q_width(), Turn::Backward);
        rope.rotate(ctx, &mut dk, self.heads.kv_width(), Turn::Backward);
        let mut dh1 = ctx.zeros(s.h1.len());
        self.q.backward(env, &s.h1, &s.lin_q, &dq, Some(&mut dh1), grads);
        self.k.backward(env, &s.h1, &s.lin_k, &dk, Some(&mut dh1), grads);
        self.v.backward(env, &s.h1, &s.lin_v, &dv, Some(&mut dh1), grads);
        let mut dx = dmid;
        self.input_norm.backward(env, x, &s.norm1, &dh1, &mut dx, grads);
        dx
    }
}

impl Llama {
    /// Hidden states after the last norm, `[n_tokens, hidden]`.
    pub fn forward(&self, env: &Env<'_>, mut cache: Option<&mut KvCache>) -> Buf {
        let rope = self.rope.angles(&env.tokens.positions);
        let mut x = embedding::forward(env, &self.embed, self.hidden_size);
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| cache.layer(layer_idx));
            (x, _) = layer.forward(env, &rope, &x, cache);
        }
        if let Some(cache) = cache {
            cache.advance(env.tokens);
        }
        self.norm.forward(env, &x).0
    }

    /// Hidden states `[n, hidden]` -> logits `[n, vocab]`.
    pub fn logits(&self, env: &Env<'_>, hidden: &[f32]) -> Buf {
        head::logits(env, self.head_matrix(), self.vocab_size, self.hidden_size, hidden)
    }

    /// The matrix of the LM head: its own, or the embedding table.
    pub fn head_matrix(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Number of frozen elements, norms and biases included.
    pub fn n_frozen(&self) -> usize {
        let matrix = |m: &Matrix| if let Matrix::Frozen(weight) = m { weight.rows() * weight.cols() } else { 0 };
        let bias = |linear: &Linear| if let linear::Bias::Frozen(bias) = &linear.bias { bias.len() } else { 0 };
        let norm = |norm: &RmsNorm| if let rms_norm::Gain::Frozen(gain) = &norm.gain { gain.len() } else { 0 };
        let layer = |layer: &Layer| {
            let linears = layer.linears().map(|linear| matrix(&linear.matrix) + bias(linear));
            linears.iter().sum::<usize>() + norm(&layer.input_norm) + norm(&layer.post_norm)
        };
        let tables = matrix(&self.embed) + self.head.as_ref().map_or(0, matrix);
        tables + norm(&self.norm) + self.layers.iter().map(layer).sum::<usize>()
    }

    /// Bytes of the frozen weights.
    pub fn nbytes(&self) -> usize {
        let matrix = |m: &Matrix| if let Matrix::Frozen(weight) = m { weight.nbytes() } else { 0 };
        let layers = self.layers.iter().flat_map(Layer::linears).map(|linear| matrix(&linear.matrix));
        matrix(&self.embed) + self.head.as_ref().map_or(0, matrix) + layers.sum::<usize>()
    }
}

/// `y += x`.
fn add(ctx: &Ctx, y: &mut [f32], x: &[f32]) {
    let task = rows_per_task(1);
    y.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(y, x)| (ctx.kernels.axpy)(1.0, x, y));
}
