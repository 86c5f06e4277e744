//! The Llama decoder (Touvron et al. 2023, section 2.2; grouped heads of Llama 2, rope scaling of Llama 3.1).
//!
//! `x = embed(ids)`; each layer `x += o(attention(rope(q(h)), rope(k(h)), v(h)))` with `h = norm(x)`, then
//! `x += down(silu(gate(h)) · up(h))` with `h = norm(x)`; `logits = head(norm(x))`.
//! Every forward quoted in a backward stands in this file.

use super::kv_cache::{KvCache, LayerCache};
use crate::ops::attention::{self, Forward, Heads};
use crate::ops::linear::{self, Linear, Matrix};
use crate::ops::matmul::Into;
use crate::ops::rms_norm::{self, RmsNorm};
use crate::ops::rope::{Angles, Rope, Turn};
use crate::ops::{Buf, Env, Grads, embedding, head, swiglu};
use std::ops::Range;

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

/// How much of a layer's forward is kept for its backward beside its input; the rest is computed again, to the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// Nothing: the layer runs again, up to its last product.
    Input,
    /// What the attention's products gave; the MLP runs again, up to its last product.
    Attention,
    /// What all products gave; norms and the gated activation run again.
    Products,
    /// Everything.
    Everything,
}

/// What a layer's backward needs beside its input.
pub struct Saved {
    attention: AttentionSaved,
    /// One for each chunk of tokens, or none where the MLP runs again.
    mlp: Vec<MlpSaved>,
}

/// Whether anything before a layer is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Something is: the input's gradient is needed.
    Trained,
    /// Nothing is.
    Nothing,
}

/// What a layer's backward reads beside what was saved.
#[derive(Clone, Copy)]
pub struct Backward<'a> {
    /// The forward's environment.
    pub env: &'a Env<'a>,
    /// The forward's angles.
    pub rope: &'a Angles,
    /// The forward's input, `[n_tokens, hidden]`.
    pub x: &'a [f32],
    /// Whether the input's gradient is needed.
    pub below: Below,
}

/// A norm's output and what its backward needs.
type Normed = (Buf, rms_norm::Saved);

/// What the backward of `mid = x + o(attention(...))` needs.
struct AttentionSaved {
    normed: Option<Normed>,
    q: Buf,
    k: Buf,
    v: Buf,
    lin_qkv: [linear::Saved; 3],
    attended: Buf,
    lse: Buf,
    lin_o: linear::Saved,
    mid: Buf,
}

/// What the backward of `down(silu(gate(h)) · up(h))` needs.
struct MlpSaved {
    gated: Gated,
    lin_down: linear::Saved,
}

/// The MLP up to its last product.
struct Gated {
    normed: Option<Normed>,
    gate: Buf,
    up: Buf,
    lin_gate_up: [linear::Saved; 2],
    active: Option<Buf>,
}

/// Floats of one `[tokens, ffn]` buffer beyond which the MLP takes its tokens in chunks.
const MLP_FLOATS: usize = 8 << 20;

/// The tokens of each chunk of the MLP: as few chunks as keep a `[tokens, ffn]` buffer small, of multiples of 64 tokens.
///
/// The chunks follow from the shapes alone, whatever is kept and however many threads there are: what is summed over
/// tokens (dA, dB, dW) is summed chunk after chunk in every run.
pub fn mlp_chunks(n_tokens: usize, ffn: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    let most = (MLP_FLOATS / ffn).max(64);
    let chunk = n_tokens.div_ceil(n_tokens.div_ceil(most).max(1)).next_multiple_of(64);
    (0..n_tokens.div_ceil(chunk.max(1))).map(move |i| i * chunk..n_tokens.min((i + 1) * chunk))
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

    /// Whether the norm before the attention or its products have anything to train.
    fn is_attention_trained(&self) -> bool {
        matches!(self.input_norm.gain, rms_norm::Gain::Trained(_))
            || [&self.q, &self.k, &self.v, &self.o].iter().any(|linear| linear.is_trained())
    }

    /// x: `[n_tokens, hidden]` -> `[n_tokens, hidden]`, and what `keep` asks for beside x itself ([`Keep::Input`]: nothing).
    ///
    /// With a cache, the new tokens see what their sequence has seen.
    pub fn forward(
        &self,
        env: &Env<'_>,
        rope: &Angles,
        x: &[f32],
        cache: Option<&mut LayerCache>,
        keep: Keep,
    ) -> (Buf, Option<Saved>) {
        let mut attention = self.attend(env, rope, x, cache);
        // out = mid + down(...): out starts as mid
        let (mut out, attention) = if keep == Keep::Input {
            let mid = std::mem::take(&mut attention.mid);
            drop(attention);
            (mid, None)
        } else {
            attention.normed.take_if(|_| keep < Keep::Everything);
            (env.ctx.copy(&attention.mid), Some(attention))
        };
        let mut mlp = Vec::new();
        self.for_mlp_chunks(env, |env, rows| {
            let out = &mut out[rows];
            let gates = [&self.gate, &self.up];
            if keep < Keep::Products && linear::can_gate(env, gates, out.len() / self.gate.inputs) {
                let active = linear::forward_gated(env, gates, &self.post_norm.forward(env, out).0);
                self.down.forward_onto(env, &active, out);
                return;
            }
            let (mut gated, active) = self.activate(env, out);
            let lin_down = self.down.forward_onto(env, &active, out);
            if keep == Keep::Everything {
                gated.active = Some(active);
            } else {
                gated.normed = None;
            }
            if keep >= Keep::Products {
                mlp.push(MlpSaved { gated, lin_down });
            }
        });
        (out, attention.map(|attention| Saved { attention, mlp }))
    }

    /// `mid = x + o(attention(rope(q(h)), rope(k(h)), v(h)))` with `h = norm(x)`;  x: `[n_tokens, hidden]`.
    fn attend(&self, env: &Env<'_>, rope: &Angles, x: &[f32], cache: Option<&mut LayerCache>) -> AttentionSaved {
        let (ctx, heads, cu_seqlens) = (env.ctx, self.heads, &env.tokens.cu_seqlens);
        let (h, norm) = self.input_norm.forward(env, x);
        let [(mut q, lin_q), (mut k, lin_k), (v, lin_v)] = linear::forward_all(env, [&self.q, &self.k, &self.v], &h);
        rope.rotate(ctx, &mut q, heads.q_width(), Turn::Forward);
        rope.rotate(ctx, &mut k, heads.kv_width(), Turn::Forward);
        let (attended, lse) = match cache {
            None => attention::forward(ctx, heads, &q, &attention::segments(cu_seqlens, heads.kv_width(), &k, &v)),
            Some(cache) => {
                cache.append(cu_seqlens, heads.kv_width(), &k, &v);
                attention::forward(ctx, heads, &q, &cache.segments(cu_seqlens, heads.kv_width()))
            }
        };
        let mut mid = ctx.copy(x);
        let lin_o = self.o.forward_onto(env, &attended, &mut mid);
        let lin_qkv = [lin_q, lin_k, lin_v];
        AttentionSaved { normed: Some((h, norm)), q, k, v, lin_qkv, attended, lse, lin_o, mid }
    }

    /// `silu(gate(h)) · up(h)` with `h = norm(mid)`;  mid: `[chunk, hidden]` -> `[chunk, ffn]`.
    fn activate(&self, env: &Env<'_>, mid: &[f32]) -> (Gated, Buf) {
        let (h, norm) = self.post_norm.forward(env, mid);
        let [(gate, lin_gate), (up, lin_up)] = linear::forward_all(env, [&self.gate, &self.up], &h);
        let active = swiglu::forward(env.ctx, &gate, &up);
        let lin_gate_up = [lin_gate, lin_up];
        (Gated { normed: Some((h, norm)), gate, up, lin_gate_up, active: None }, active)
    }

    /// Calls `work(environment, elements)` for each chunk of [`mlp_chunks`]: the environment is that of the chunk's tokens,
    /// the elements are those of the chunk in a `[n_tokens, hidden]` buffer.
    fn for_mlp_chunks(&self, env: &Env<'_>, mut work: impl FnMut(&Env<'_>, Range<usize>)) {
        let (n_tokens, hidden) = (env.tokens.len(), self.down.outputs);
        for rows in mlp_chunks(n_tokens, self.down.inputs) {
            let elements = rows.start * hidden..rows.end * hidden;
            if rows.len() == n_tokens {
                work(env, elements);
            } else {
                work(&Env { tokens: &env.tokens.rows(rows), ..*env }, elements);
            }
        }
    }

    /// From the gradient of the output to that of the input;  dout: `[n_tokens, hidden]`.
    ///
    /// What was not saved is computed again. Returns `None` where nothing below needs a gradient.
    pub fn backward(&self, at: Backward<'_>, saved: Option<Saved>, dout: Buf, grads: &mut Grads) -> Option<Buf> {
        let Backward { env, rope, x, below } = at;
        let Saved { mut attention, mlp } =
            saved.unwrap_or_else(|| Saved { attention: self.attend(env, rope, x, None), mlp: Vec::new() });
        // out = mid + mlp(mid): dmid starts as dout
        let mut dmid = dout;
        let mut mlp = mlp.into_iter();
        self.for_mlp_chunks(env, |env, rows| {
            self.mlp_backward(env, &attention.mid[rows.clone()], mlp.next(), &mut dmid[rows], grads);
        });
        attention.mid = Buf::default();
        if below == Below::Nothing && !self.is_attention_trained() {
            return None;
        }
        self.attend_backward(at, attention, dmid, grads)
    }

    /// Adds the part of the gradient that comes through the MLP;  mid: `[chunk, hidden]`, dmid: the same, starts as dout.
    fn mlp_backward(&self, env: &Env<'_>, mid: &[f32], saved: Option<MlpSaved>, dmid: &mut [f32], grads: &mut Grads) {
        let ctx = env.ctx;
        let (gated, active, lin_down) = match saved {
            None => {
                let (gated, active) = self.activate(env, mid);
                let lin_down = self.down.recompute(env, &active);
                (gated, active, lin_down)
            }
            Some(MlpSaved { mut gated, lin_down }) => {
                let active = gated.active.take();
                let active = active.unwrap_or_else(|| swiglu::forward(ctx, &gated.gate, &gated.up));
                (gated, active, lin_down)
            }
        };
        let Gated { normed, gate, up, lin_gate_up: [lin_gate, lin_up], .. } = gated;
        let mut dactive = ctx.buf(active.len());
        let parts = [(&self.down, lin_down, &*dmid)];
        linear::backward_all(env, &active, parts, Some((&mut dactive, Into::Store)), grads);
        drop(active);
        let (dgate, dup) = swiglu::backward(ctx, &gate, &up, &dactive);
        drop((dactive, gate, up));
        let (h, norm) = normed.unwrap_or_else(|| self.post_norm.forward(env, mid));
        let mut dh = ctx.buf(h.len());
        let parts = [(&self.gate, lin_gate, &*dgate), (&self.up, lin_up, &*dup)];
        linear::backward_all(env, &h, parts, Some((&mut dh, Into::Store)), grads);
        drop((dgate, dup, h));
        self.post_norm.backward(env, mid, &norm, &dh, dmid, grads);
    }

    /// From the gradient of `mid` to that of x.
    fn attend_backward(&self, at: Backward<'_>, saved: AttentionSaved, dmid: Buf, grads: &mut Grads) -> Option<Buf> {
        let Backward { env, rope, x, below } = at;
        let (ctx, heads) = (env.ctx, self.heads);
        let AttentionSaved { normed, q, k, v, lin_qkv: [lin_q, lin_k, lin_v], attended, lse, lin_o, mid: _ } = saved;
        // mid = x + o(attended): dx starts as dmid
        let mut dattended = ctx.buf(attended.len());
        let parts = [(&self.o, lin_o, &*dmid)];
        linear::backward_all(env, &attended, parts, Some((&mut dattended, Into::Store)), grads);
        let f = Forward { q: &q, k: &k, v: &v, out: &attended, lse: &lse };
        let (mut dq, mut dk, dv) = attention::backward(ctx, heads, &env.tokens.cu_seqlens, f, &dattended);
        drop((dattended, q, k, v, attended, lse));
        rope.rotate(ctx, &mut dq, heads.q_width(), Turn::Backward);
        rope.rotate(ctx, &mut dk, heads.kv_width(), Turn::Backward);
        let (h, norm) = normed.unwrap_or_else(|| self.input_norm.forward(env, x));
        // The gain's gradient needs dh even where x needs none.
        let through = below == Below::Trained || matches!(self.input_norm.gain, rms_norm::Gain::Trained(_));
        let mut dh = through.then(|| ctx.buf(h.len()));
        let parts = [(&self.q, lin_q, &*dq), (&self.k, lin_k, &*dk), (&self.v, lin_v, &*dv)];
        linear::backward_all(env, &h, parts, dh.as_deref_mut().map(|dh| (dh, Into::Store)), grads);
        drop((dq, dk, dv, h));
        let dh = dh?;
        let mut dx = dmid;
        self.input_norm.backward(env, x, &norm, &dh, &mut dx, grads);
        Some(dx)
    }
}

impl Llama {
    /// Hidden states after the last norm, `[n_tokens, hidden]`.
    pub fn forward(&self, env: &Env<'_>, mut cache: Option<&mut KvCache>) -> Buf {
        let rope = self.rope.angles(&env.tokens.positions);
        let mut x = embedding::forward(env, &self.embed, self.hidden_size);
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| cache.layer(layer_idx));
            (x, _) = layer.forward(env, &rope, &x, cache, Keep::Input);
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
