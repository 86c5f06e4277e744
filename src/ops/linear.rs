//! A linear layer over a frozen or trained weight, with an optional low-rank adapter.  Hu et al. 2021, section 4.1.
//!
//! `y = x Wᵀ + bias + scale · (D(x) Aᵀ) Bᵀ`, D = dropout.  With u = D(x) Aᵀ and g = scale · dy, the backward is
//! `dx = dy W + D(du A)`, `du = g B`, `dA = duᵀ D(x)`, `dB = gᵀ u`; a frozen W never gets a gradient, and costs none.

use super::dropout::Dropout;
use super::matmul::{Gemm, Into, Operand, gemm};
use super::{Buf, Env, Grads, ParamId, Weight};
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
    /// `D(x) Aᵀ`, `[n_tokens, rank]`; absent without an adapter.
    low: Option<Buf>,
}

impl Linear {
    /// The matrix as a GEMM operand, transposed or not.
    fn operand<'a>(&'a self, env: &Env<'a>, transposed: bool) -> Operand<'a> {
        match &self.matrix {
            Matrix::Frozen(weight) if transposed => Operand::WeightT(weight),
            Matrix::Frozen(weight) => Operand::Weight(weight),
            Matrix::Trained(id) if transposed => Operand::transposed(env.params.get(*id), self.inputs),
            Matrix::Trained(id) => Operand::rows(env.params.get(*id), self.inputs),
        }
    }

    /// x: `[n_tokens, in]` -> y: `[n_tokens, out]`.
    pub fn forward(&self, env: &Env<'_>, x: &[f32]) -> (Buf, Saved) {
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
        let (m, n, k) = (n_tokens, self.outputs, self.inputs);
        gemm(ctx, &Gemm { m, n, k, a: Operand::rows(x, k), b: self.operand(env, true), alpha: 1.0, into }, &mut y);
        let low = self.lora.as_ref().map(|lora| {
            let dropped = self.dropped(env, lora, x);
            let (a, b, rank) = (env.params.get(lora.a), env.params.get(lora.b), lora.rank);
            let mut low = ctx.buf(n_tokens * rank);
            let input = Operand::rows(dropped.as_deref().unwrap_or(x), k);
            let down = Gemm { m, n: rank, k, a: input, b: Operand::transposed(a, k), alpha: 1.0, into: Into::Store };
            gemm(ctx, &down, &mut low);
            let (a, b) = (Operand::rows(&low, rank), Operand::transposed(b, rank));
            gemm(ctx, &Gemm { m, n, k: rank, a, b, alpha: lora.scale, into: Into::Add }, &mut y);
            low
        });
        (y, Saved { low })
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
        mut dx: Option<&mut [f32]>,
        grads: &mut Grads,
    ) {
        let (ctx, n_tokens) = (env.ctx, x.len() / self.inputs);
        let (n_in, n_out) = (self.inputs, self.outputs);
        if let Some(dx) = dx.as_deref_mut() {
            // dx += dy W
            let (a, b) = (Operand::rows(dy, n_out), self.operand(env, false));
            gemm(ctx, &Gemm { m: n_tokens, n: n_in, k: n_out, a, b, alpha: 1.0, into: Into::Add }, dx);
        }
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
        let (Some(lora), Some(low)) = (&self.lora, &saved.low) else { return };
        let rank = lora.rank;
        // dB += scale · dyᵀ u
        let (a, b) = (Operand::transposed(dy, n_out), Operand::rows(low, rank));
        let g = Gemm { m: n_out, n: rank, k: n_tokens, a, b, alpha: lora.scale, into: Into::Add };
        gemm(ctx, &g, grads.get_mut(lora.b));
        // du = scale · dy B
        let mut dlow = ctx.buf(n_tokens * rank);
        let (a, b) = (Operand::rows(dy, n_out), Operand::rows(env.params.get(lora.b), rank));
        gemm(ctx, &Gemm { m: n_tokens, n: rank, k: n_out, a, b, alpha: lora.scale, into: Into::Store }, &mut dlow);
        // dA += duᵀ D(x)
        let mut dropped = self.dropped(env, lora, x);
        let (a, b) = (Operand::transposed(&dlow, rank), Operand::rows(dropped.as_deref().unwrap_or(x), n_in));
        let g = Gemm { m: rank, n: n_in, k: n_tokens, a, b, alpha: 1.0, into: Into::Add };
        gemm(ctx, &g, grads.get_mut(lora.a));
        // dx += D(du A)
        let Some(dx) = dx else { return };
        let (a, b) = (Operand::rows(&dlow, rank), Operand::rows(env.params.get(lora.a), n_in));
        let g = Gemm { m: n_tokens, n: n_in, k: rank, a, b, alpha: 1.0, into: Into::Add };
        match (&mut dropped, self.dropout(env, lora)) {
            (Some(low), Some(dropout)) => {
                gemm(ctx, &Gemm { into: Into::Store, ..g }, low);
                dropout.add(ctx, low, dx);
            }
            _ => gemm(ctx, &g, dx),
        }
    }

    /// D(x), or `None` where it is x itself.
    fn dropped(&self, env: &Env<'_>, lora: &Lora, x: &[f32]) -> Option<Buf> {
        let dropout = self.dropout(env, lora)?;
        let mut out = env.ctx.buf(x.len());
        dropout.copy(env.ctx, x, &mut out);
        Some(out)
    }

    /// The dropout of the adapter's input, if there is any.
    fn dropout<'a>(&self, env: &Env<'a>, lora: &Lora) -> Option<Dropout<'a>> {
        let key = env.dropout.filter(|_| lora.dropout > 0.0)?;
        Some(Dropout { key, module: lora.module, p: lora.dropout, tokens: env.tokens, width: self.inputs })
    }

    /// Whether the layer itself has anything to train.
    pub fn is_trained(&self) -> bool {
        self.lora.is_some() || matches!(self.matrix, Matrix::Trained(_)) || matches!(self.bias, Bias::Trained(_))
    }
}
