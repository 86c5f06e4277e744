//! A linear layer over a frozen or trained weight, with an optional low-rank adapter.  Hu et al. 2021, section 4.1.
//!
//! `y = x Wᵀ + bias + u Bᵀ` with `u = scale · D(x) Aᵀ`, D = dropout.  The backward is `dx = dy W + D(du A)`,
//! `du = scale · dy B`, `dA = duᵀ D(x)`, `dB = dyᵀ u`; a frozen W never gets a gradient, and costs none.

use super::dropout::Dropout;
use super::matmul::{FEW_ROWS, Gemm, Into, Left, Mask, Operand, PackedA, Shape, Term, gemm, gemm_sum};
use super::{Buf, Env, Grads, ParamId, Weight};
use crate::kernels::elementwise::Masked;
use rayon::prelude::*;

/// The matrix of a layer, `[out, in]`.
pub enum Matrix {
    /// Not trained: the gradient goes through it, never into it.
    Frozen(Weight),
    /// Trained, f32.
    Trained(ParamId),
}

/// The bias of a layer, `[out]`.
pub enum Bias {
    /// There is none.
    None,
    /// Not trained.
    Frozen(Vec<f32>),
    /// Trained.
    Trained(ParamId),
}

/// A low-rank update `scale · B A` of a layer's matrix.
#[derive(Clone, Debug)]
pub struct Lora {
    /// `[rank, in]`.
    pub a: ParamId,
    /// `[out, rank]`.
    pub b: ParamId,
    /// Rank.
    pub rank: usize,
    /// alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023).
    pub scale: f32,
    /// Probability with which an input element is dropped before A, in training.
    pub dropout: f32,
    /// Tells this layer's dropout mask from the others'.
    pub module: u32,
}

/// A linear layer.
pub struct Linear {
    /// Number of inputs.
    pub inputs: usize,
    /// Number of outputs.
    pub outputs: usize,
    /// `[out, in]`.
    pub matrix: Matrix,
    /// `[out]`.
    pub bias: Bias,
    /// The adapter, if any.
    pub lora: Option<Lora>,
}

/// What the backward needs beside its input.
pub struct Saved {
    /// `scale · D(x) Aᵀ`, `[n_tokens, rank]`; absent without an adapter.
    low: Option<Buf>,
}

impl Linear {
    /// The matrix as a GEMM operand, transposed or not.
    fn operand<'a>(&'a self, env: &Env<'a>, transposed: bool) -> Operand<'a> {
        match &self.matrix {
            Matrix::Frozen(weight) if transposed => Operand::WeightT(weight, 0),
            Matrix::Frozen(weight) => Operand::Weight(weight, 0),
            Matrix::Trained(id) if transposed => Operand::transposed(env.params.get(*id), self.inputs),
            Matrix::Trained(id) => Operand::rows(env.params.get(*id), self.inputs),
        }
    }

    /// x: `[n_tokens, in]` -> y: `[n_tokens, out]`.
    pub fn forward(&self, env: &Env<'_>, x: &[f32]) -> (Buf, Saved) {
        self.forward_packed(env, x, Left::Plain(Operand::rows(x, self.inputs)))
    }

    /// What the backward needs, without the output: for a forward that runs again.
    pub fn recompute(&self, env: &Env<'_>, x: &[f32]) -> Saved {
        Saved { low: self.low(env, x, Left::Plain(Operand::rows(x, self.inputs))) }
    }

    /// The forward with x packed before.
    fn forward_packed(&self, env: &Env<'_>, x: &[f32], packed: Left<'_>) -> (Buf, Saved) {
        let (ctx, n_tokens) = (env.ctx, x.len() / self.inputs);
        let mut y = ctx.buf(n_tokens * self.outputs);
        let bias = match &self.bias {
            Bias::None => None,
            Bias::Frozen(bias) => Some(&bias[..]),
            Bias::Trained(id) => Some(env.params.get(*id)),
        };
        if let Some(bias) = bias {
            y.par_chunks_mut(self.outputs).for_each(|row| row.copy_from_slice(bias));
        }
        let into = if bias.is_some() { Into::Add } else { Into::Store };
        let low = self.low(env, x, packed);
        let mut terms = vec![Term::new(self.inputs, packed, self.operand(env, true))];
        if let (Some(lora), Some(low)) = (&self.lora, &low) {
            let up = Operand::transposed(env.params.get(lora.b), lora.rank);
            terms.push(Term::new(lora.rank, Left::Plain(Operand::rows(low, lora.rank)), up));
        }
        gemm_sum(ctx, Shape { m: n_tokens, n: self.outputs, alpha: 1.0, into }, &terms, &mut y);
        (y, Saved { low })
    }

    /// `scale · D(x) Aᵀ`, `[n_tokens, rank]`.
    fn low(&self, env: &Env<'_>, x: &[f32], packed: Left<'_>) -> Option<Buf> {
        let lora = self.lora.as_ref()?;
        let (m, k) = (x.len() / self.inputs, self.inputs);
        let dropped = self.dropped(env, lora, x);
        let input = dropped.as_deref().map_or(packed, |dropped| Left::Plain(Operand::rows(dropped, k)));
        let mut low = env.ctx.buf(m * lora.rank);
        let down = Term::new(k, input, Operand::transposed(env.params.get(lora.a), k));
        gemm_sum(env.ctx, Shape { m, n: lora.rank, alpha: lora.scale, into: Into::Store }, &[down], &mut low);
        Some(low)
    }

    /// Adds the gradient of the input to `dx` (unless nothing below needs it) and those of trained tensors to `grads`.
    ///
    /// x: the forward's input, dy: `[n_tokens, out]`, dx: `[n_tokens, in]`.
    pub fn backward(
        &self,
        env: &Env<'_>,
        x: &[f32],
        saved: &Saved,
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: &mut Grads,
    ) {
        backward_all(env, x, &[(self, saved, dy)], dx.map(|dx| (dx, Into::Add)), grads);
    }

    /// The gradients of this layer's own tensors; returns `scale · dy B`, `[n_tokens, rank]`, where there is an adapter.
    fn own_gradients(
        &self,
        env: &Env<'_>,
        x: &[f32],
        saved: &Saved,
        dy: &[f32],
        packed_dy: Left<'_>,
        grads: &mut Grads,
    ) -> Option<Buf> {
        let (ctx, n_tokens) = (env.ctx, x.len() / self.inputs);
        let (n_in, n_out) = (self.inputs, self.outputs);
        if let Matrix::Trained(id) = self.matrix {
            // dW += dyᵀ x
            let (a, b) = (Operand::transposed(dy, n_out), Operand::rows(x, n_in));
            let g = Gemm { m: n_out, n: n_in, k: n_tokens, a, b, alpha: 1.0, into: Into::Add };
            gemm(ctx, &g, grads.get_mut(id));
        }
        if let Bias::Trained(id) = self.bias {
            for row in dy.chunks_exact(n_out) {
                (ctx.kernels.axpy)(1.0, row, grads.get_mut(id));
            }
        }
        let (Some(lora), Some(low)) = (&self.lora, &saved.low) else { return None };
        let rank = lora.rank;
        // dB += dyᵀ (scale · u)
        let (a, b) = (Operand::transposed(dy, n_out), Operand::rows(low, rank));
        let g = Gemm { m: n_out, n: rank, k: n_tokens, a, b, alpha: 1.0, into: Into::Add };
        gemm(ctx, &g, grads.get_mut(lora.b));
        // du = scale · dy B
        let mut dlow = ctx.buf(n_tokens * rank);
        let up = Term::new(n_out, packed_dy, Operand::rows(env.params.get(lora.b), rank));
        gemm_sum(ctx, Shape { m: n_tokens, n: rank, alpha: lora.scale, into: Into::Store }, &[up], &mut dlow);
        // dA += duᵀ D(x)
        let dropped = self.dropped(env, lora, x);
        let (a, b) = (Operand::transposed(&dlow, rank), Operand::rows(dropped.as_deref().unwrap_or(x), n_in));
        let g = Gemm { m: rank, n: n_in, k: n_tokens, a, b, alpha: 1.0, into: Into::Add };
        gemm(ctx, &g, grads.get_mut(lora.a));
        Some(dlow)
    }

    /// D(x), or `None` where it is x itself.
    fn dropped(&self, env: &Env<'_>, lora: &Lora, x: &[f32]) -> Option<Buf> {
        let dropout = self.dropout(env, lora)?;
        let mut out = env.ctx.buf(x.len());
        dropout.copy(env.ctx, x, &mut out);
        Some(out)
    }

    /// The dropout of the adapter's input, if there is any.
    fn dropout<'e>(&self, env: &Env<'e>, lora: &Lora) -> Option<Dropout<'e>> {
        let key = env.dropout.filter(|_| lora.dropout > 0.0)?;
        Some(Dropout { key, module: lora.module, p: lora.dropout, tokens: env.tokens, width: self.inputs })
    }

    /// What the gradient of D(x) goes through on its way to that of x.
    fn mask<'e>(&self, env: &'e Env<'e>) -> Option<impl Fn(usize, usize, &mut [f32]) + Sync + use<'e>> {
        let dropout = self.dropout(env, self.lora.as_ref()?)?;
        let kernels = env.ctx.kernels;
        Some(move |token: usize, first: usize, values: &mut [f32]| {
            (kernels.dropout_row)(&dropout.mask(token, first), Masked::InPlace, values);
        })
    }

    /// Whether the layer itself has anything to train.
    pub fn is_trained(&self) -> bool {
        self.lora.is_some() || matches!(self.matrix, Matrix::Trained(_)) || matches!(self.bias, Bias::Trained(_))
    }
}

/// The forwards of layers that share their input, which is packed once.
pub fn forward_all<const N: usize>(env: &Env<'_>, linears: [&Linear; N], x: &[f32]) -> [(Buf, Saved); N] {
    let inputs = linears.first().map_or(1, |linear| linear.inputs);
    let packed = pack(env, x, inputs);
    let left = packed.as_ref().map_or(Left::Plain(Operand::rows(x, inputs)), Left::Packed);
    linears.map(|linear| linear.forward_packed(env, x, left))
}

/// The backward of layers that share their input: the gradient of the input is one sum with one pass over `dx`.
///
/// x: the forward's input, parts: each layer with what its forward saved and its `dy: [n_tokens, out]`,
/// dx: `[n_tokens, in]`, `None` where nothing below needs it; gradients of trained tensors are added to `grads`.
pub fn backward_all(
    env: &Env<'_>,
    x: &[f32],
    parts: &[(&Linear, &Saved, &[f32])],
    dx: Option<(&mut [f32], Into)>,
    grads: &mut Grads,
) {
    let packed: Vec<_> = parts.iter().map(|(linear, _, dy)| pack(env, dy, linear.outputs)).collect();
    let left = |i: usize| {
        let (linear, _, dy) = parts[i];
        packed[i].as_ref().map_or(Left::Plain(Operand::rows(dy, linear.outputs)), Left::Packed)
    };
    let own = |(i, &(linear, saved, dy)): (usize, &(&Linear, &Saved, &[f32]))| {
        linear.own_gradients(env, x, saved, dy, left(i), grads)
    };
    let dlow: Vec<_> = parts.iter().enumerate().map(own).collect();
    let Some((dx, into)) = dx else { return };
    let inputs = parts.first().map_or(1, |(linear, ..)| linear.inputs);
    let masks: Vec<_> = parts.iter().map(|(linear, ..)| linear.mask(env)).collect();
    // dx (+)= Σ dy W + D(du A)
    let mut terms = Vec::with_capacity(2 * parts.len());
    for (i, (linear, ..)) in parts.iter().enumerate() {
        terms.push(Term::new(linear.outputs, left(i), linear.operand(env, false)));
        if let (Some(lora), Some(dlow)) = (&linear.lora, &dlow[i]) {
            let (a, b) = (Operand::rows(dlow, lora.rank), Operand::rows(env.params.get(lora.a), inputs));
            let mask = masks[i].as_ref().map(|mask| mask as Mask<'_>);
            terms.push(Term { mask, ..Term::new(lora.rank, Left::Plain(a), b) });
        }
    }
    gemm_sum(env.ctx, Shape { m: x.len() / inputs, n: inputs, alpha: 1.0, into }, &terms, dx);
}

/// A left operand for several products, or `None` where rows are too few to be packed.
fn pack(env: &Env<'_>, x: &[f32], width: usize) -> Option<PackedA> {
    let rows = x.len() / width;
    (rows > FEW_ROWS).then(|| PackedA::new(env.ctx, Operand::rows(x, width), rows, width))
}
