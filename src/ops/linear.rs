//! A linear layer over a frozen or trained weight, with an optional low-rank adapter.  Hu et al. 2021, section 4.1.
//!
//! `y = x Wᵀ + bias + u Bᵀ` with `u = scale · D(x) Aᵀ`, D = dropout.  The backward is `dx = dy W + D(du A)`,
//! `du = scale · dy B`, `dA = duᵀ D(x)`, `dB = dyᵀ u`; a frozen W never gets a gradient, and costs none.
//!
//! With a magnitude ([`super::dora`]) y grows by `(c - 1) ⊙ z`, `z = D(x) Wᵀ + u Bᵀ` and `c = m / n`.  Where dropout drops
//! nothing, z is y without its bias, and the backward above holds with `c ⊙ dy` for dy.  Where it does, z takes a product of
//! its own, and with `g = c ⊙ dy` the backward is `dx = dy W + D((g - dy) W + du A)`, `du = scale · g B`, `dB = gᵀ u`.

use super::dora::{Dora, Factors};
use super::dropout::Dropout;
use super::integer::{self, Encoded};
use super::matmul::{FEW_ROWS, Gemm, Into, Left, Mask, Operand, PackedA, Shape, Term, gemm, gemm_gated, gemm_sum};
use super::{Buf, Ctx, Env, Grads, ParamId, Weight, add};
use crate::kernels::elementwise::Masked;
use crate::kernels::gemm::Rows;
use crate::kernels::integer::Order;
use rayon::prelude::*;
use std::sync::Arc;

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
    /// The magnitude, if the adapter has one.
    pub dora: Option<Arc<Dora>>,
    /// The first A and B, if `scale · B A` of them was taken out of the frozen matrix.
    pub taken: Option<Arc<Halves>>,
}

/// The two halves of a low-rank matrix `B A`.
#[derive(Clone, Debug, PartialEq)]
pub struct Halves {
    /// `[rank, in]`.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
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
    /// `D(x) (W + scale · B A)ᵀ`, `[n_tokens, out]`; absent without a magnitude.
    direction: Option<Buf>,
}

impl Lora {
    /// `u Bᵀ` as a term of the product;  low: u, `[n_tokens, rank]`.
    fn update<'a>(&self, env: &Env<'a>, low: &'a [f32]) -> Term<'a> {
        let up = Operand::transposed(env.params.get(self.b), self.rank);
        Term::new(self.rank, Left::Plain(Operand::rows(low, self.rank)), up)
    }
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
        let [made] = forward_all(env, [self], x);
        made
    }

    /// [`Self::forward`] added to y.
    pub fn forward_onto(&self, env: &Env<'_>, x: &[f32], y: &mut [f32]) -> Saved {
        if self.lora.as_ref().is_some_and(|lora| lora.dora.is_some()) {
            let (made, saved) = self.forward(env, x); // the magnitude scales the product
            add(env.ctx, y, &made);
            return saved;
        }
        let input = Input::new(env, &[self], x);
        self.forward_packed(env, &input, y, Into::Add)
    }

    /// What the backward needs, without the output: for a forward that runs again.
    pub fn recompute(&self, env: &Env<'_>, x: &[f32]) -> Saved {
        if self.lora.as_ref().is_some_and(|lora| lora.dora.is_some()) {
            return self.forward(env, x).1; // the magnitude's gradient needs the product
        }
        let packed = Left::Plain(Operand::rows(x, self.inputs));
        let low = self.lora.as_ref().map(|lora| self.low(env, lora, x, self.dropped(env, lora, x).as_deref(), packed));
        Saved { low, direction: None }
    }

    /// The forward with its input prepared; a layer with a magnitude replaces y.
    fn forward_packed(&self, env: &Env<'_>, input: &Input<'_>, y: &mut [f32], into: Into) -> Saved {
        let ctx = env.ctx;
        let bias = match &self.bias {
            Bias::None => None,
            Bias::Frozen(bias) => Some(&bias[..]),
            Bias::Trained(id) => Some(env.params.get(*id)),
        };
        if let Some(bias) = bias {
            y.par_chunks_mut(self.outputs).for_each(|row| match into {
                Into::Store => row.copy_from_slice(bias),
                Into::Add => (ctx.kernels.axpy)(1.0, bias, row),
            });
        }
        let into = if bias.is_some() { Into::Add } else { into };
        let shape = Shape { m: input.x.len() / self.inputs, n: self.outputs, alpha: 1.0, into };
        let own = Term::new(self.inputs, input.left(), self.operand(env, true));
        let integer = integer::many(env, &self.matrix)
            .and_then(|many| input.codes[many.matrix.order() as usize].as_ref().map(|codes| (codes, many)));
        if let Some((codes, many)) = integer {
            integer::product(ctx, codes, many, into, y);
        }
        let Some(lora) = &self.lora else {
            if integer.is_none() {
                gemm_sum(ctx, shape, &[own], y);
            }
            return Saved { low: None, direction: None };
        };
        let dropped = self.dropped(env, lora, input.x);
        let low = self.low(env, lora, input.x, dropped.as_deref(), input.left());
        let update = lora.update(env, &low);
        match integer {
            Some(_) => gemm_sum(ctx, Shape { into: Into::Add, ..shape }, &[update], y),
            None => gemm_sum(ctx, shape, &[own, update], y),
        }
        let direction = self.factors(env).map(|factors| match &dropped {
            None => factors.scale(ctx, bias, y),
            Some(dropped) => {
                let mut z = ctx.buf(y.len());
                let own = Term { a: Left::Plain(Operand::rows(dropped, self.inputs)), ..own };
                gemm_sum(ctx, Shape { into: Into::Store, ..shape }, &[own, update], &mut z);
                factors.add_excess(&z, y);
                z
            }
        });
        Saved { low: Some(low), direction }
    }

    /// What the magnitude multiplies the outputs with, if there is one.
    pub fn factors(&self, env: &Env<'_>) -> Option<Arc<Factors>> {
        let lora = self.lora.as_ref()?;
        match (&lora.dora, &self.matrix) {
            (Some(dora), Matrix::Frozen(weight)) => Some(dora.factors(env, weight, lora)),
            _ => None,
        }
    }

    /// `scale · D(x) Aᵀ`, `[n_tokens, rank]`;  dropped: D(x) where it is not x, packed: x.
    fn low(&self, env: &Env<'_>, lora: &Lora, x: &[f32], dropped: Option<&[f32]>, packed: Left<'_>) -> Buf {
        let (m, k) = (x.len() / self.inputs, self.inputs);
        let input = dropped.map_or(packed, |dropped| Left::Plain(Operand::rows(dropped, k)));
        let mut low = env.ctx.buf(m * lora.rank);
        let down = Term::new(k, input, Operand::transposed(env.params.get(lora.a), k));
        gemm_sum(env.ctx, Shape { m, n: lora.rank, alpha: lora.scale, into: Into::Store }, &[down], &mut low);
        low
    }

    /// Adds the gradient of the input to `dx` (unless nothing below needs it) and those of trained tensors to `grads`.
    ///
    /// x: the forward's input, dy: `[n_tokens, out]`, dx: `[n_tokens, in]`.
    pub fn backward(
        &self,
        env: &Env<'_>,
        x: &[f32],
        saved: Saved,
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: &mut Grads,
    ) {
        backward_all(env, x, [(self, saved, dy)], dx.map(|dx| (dx, Into::Add)), grads);
    }

    /// Adds the magnitude's gradient; returns that of z, and what of dy goes through the dropped input beside it.
    fn through_magnitude(&self, env: &Env<'_>, direction: Option<Buf>, dy: &[f32], grads: &mut Grads) -> Scaled {
        let parts = (&self.lora, self.factors(env), direction);
        let (Some(lora @ Lora { dora: Some(dora), .. }), Some(factors), Some(mut z)) = parts else {
            return Scaled { direction: None, dropped: None };
        };
        factors.backward(dy, &mut z, grads.get_mut(dora.magnitude));
        let dropped = self.dropout(env, lora).map(|_| {
            let mut excess = env.ctx.zeros(dy.len());
            factors.add_excess(dy, &mut excess);
            excess
        });
        Scaled { direction: Some(z), dropped }
    }

    /// The gradients of this layer's own tensors; returns `scale · dz B`, `[n_tokens, rank]`, where there is an adapter.
    fn own_gradients(&self, env: &Env<'_>, x: &[f32], part: &Part<'_>, grads: &mut Grads) -> Option<Buf> {
        let (ctx, n_tokens) = (env.ctx, x.len() / self.inputs);
        let (n_in, n_out, dy) = (self.inputs, self.outputs, part.dy);
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
        let (Some(lora), Some(low)) = (&self.lora, &part.low) else { return None };
        let (rank, dz) = (lora.rank, part.dz());
        // dB += (uᵀ dz)ᵀ: the product reads dz as it lies
        let mut across = ctx.buf(rank * n_out);
        let (a, b) = (Operand::transposed(low, rank), Operand::rows(dz, n_out));
        gemm(ctx, &Gemm { m: rank, n: n_out, k: n_tokens, a, b, alpha: 1.0, into: Into::Store }, &mut across);
        add_transposed(ctx, &across, rank, grads.get_mut(lora.b));
        // du = scale · dz B
        let mut dlow = ctx.buf(n_tokens * rank);
        let left = if part.scaled.dropped.is_none() { part.left() } else { Left::Plain(Operand::rows(dz, n_out)) };
        let up = Term::new(n_out, left, Operand::rows(env.params.get(lora.b), rank));
        gemm_sum(ctx, Shape { m: n_tokens, n: rank, alpha: lora.scale, into: Into::Store }, &[up], &mut dlow);
        // dA += duᵀ D(x), of layers that share x together
        if let Some(dropped) = self.dropped(env, lora, x) {
            down_gradients(ctx, &[(lora, &dlow)], &dropped, n_in, grads);
        }
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

/// An input prepared for the layers that share it.
struct Input<'a> {
    /// `[n_tokens, in]`.
    x: &'a [f32],
    width: usize,
    /// Packed, where several products read it.
    packed: Option<PackedA>,
    /// Rounded to 8 bits, for matrices that take it so.
    codes: [Option<Encoded>; 2],
}

impl<'a> Input<'a> {
    fn new(env: &Env<'_>, linears: &[&Linear], x: &'a [f32]) -> Self {
        let width = linears.first().map_or(1, |linear| linear.inputs);
        let order = |linear: &Linear| integer::many(env, &linear.matrix).map(|many| many.matrix.order());
        let codes = [Order::Plain, Order::EvenOdd].map(|kind| {
            let wanted = linears.iter().any(|linear| order(linear) == Some(kind));
            wanted.then(|| Encoded::new(env.ctx, x, width, kind))
        });
        let products = |linear: &Linear| {
            usize::from(order(linear).is_none())
                + usize::from(linear.lora.as_ref().is_some_and(|lora| linear.dropout(env, lora).is_none()))
        };
        let products = linears.iter().map(|linear| products(linear)).sum::<usize>();
        Self { x, width, packed: (products > 1).then(|| pack(env, x, width)).flatten(), codes }
    }

    fn left(&self) -> Left<'_> {
        self.packed.as_ref().map_or(Left::Plain(Operand::rows(self.x, self.width)), Left::Packed)
    }
}

/// The forwards of layers that share their input, which is packed once.
pub fn forward_all<const N: usize>(env: &Env<'_>, linears: [&Linear; N], x: &[f32]) -> [(Buf, Saved); N] {
    let input = Input::new(env, &linears, x);
    linears.map(|linear| {
        let mut y = env.ctx.buf(x.len() / linear.inputs * linear.outputs);
        let saved = linear.forward_packed(env, &input, &mut y, Into::Store);
        (y, saved)
    })
}

/// Whether [`forward_gated`] can run: no layer needs its output whole, and there are rows enough for panels.
pub fn can_gate(env: &Env<'_>, layers: [&Linear; 2], n_tokens: usize) -> bool {
    let plain = |linear: &Linear| {
        let magnitude = linear.lora.as_ref().is_some_and(|lora| lora.dora.is_some());
        matches!(linear.bias, Bias::None) && !magnitude && integer::many(env, &linear.matrix).is_none()
    };
    n_tokens > FEW_ROWS && layers.into_iter().all(plain)
}

/// `silu(gate(x)) · up(x)`, `[n_tokens, out]`, without either of them in memory, where [`can_gate`].
///
/// The same numbers as [`forward_all`] and [`super::swiglu::forward`].
pub fn forward_gated(env: &Env<'_>, [gate, up]: [&Linear; 2], x: &[f32]) -> Buf {
    let n_tokens = x.len() / gate.inputs;
    assert!(can_gate(env, [gate, up], n_tokens), "forward_gated: a layer with a bias, a magnitude or 8 bits");
    let input = Input::new(env, &[gate, up], x);
    let low = [gate, up].map(|linear| {
        let lora = linear.lora.as_ref()?;
        Some((lora, linear.low(env, lora, x, linear.dropped(env, lora, x).as_deref(), input.left())))
    });
    let mut y = env.ctx.buf(n_tokens * gate.outputs);
    let sums = [(gate, &low[0]), (up, &low[1])].map(|(linear, low)| {
        let own = Term::new(linear.inputs, input.left(), linear.operand(env, true));
        let update = low.as_ref().map(|(lora, low)| lora.update(env, low));
        [Some(own), update].into_iter().flatten().collect::<Vec<_>>()
    });
    gemm_gated(env.ctx, [n_tokens, gate.outputs], [&sums[0], &sums[1]], &mut y);
    y
}

/// The gradients that a magnitude makes of dy; all are dy without one.
struct Scaled {
    /// `m/n ⊙ dy`, that of z, `[n_tokens, out]`.
    direction: Option<Buf>,
    /// `(m/n - 1) ⊙ dy`, what goes through the frozen matrix to the dropped input, where inputs are dropped.
    dropped: Option<Buf>,
}

/// One layer in a backward.
struct Part<'a> {
    linear: &'a Linear,
    low: Option<Buf>,
    /// `[n_tokens, out]`.
    dy: &'a [f32],
    scaled: Scaled,
    /// [`Part::dx_side`], packed.
    packed: Option<PackedA>,
}

impl Part<'_> {
    /// The gradient of z, `[n_tokens, out]`.
    fn dz(&self) -> &[f32] {
        self.scaled.direction.as_deref().unwrap_or(self.dy)
    }

    /// What goes through the frozen matrix to the input as it is, `[n_tokens, out]`.
    fn dx_side(&self) -> &[f32] {
        if self.scaled.dropped.is_some() { self.dy } else { self.dz() }
    }

    fn left(&self) -> Left<'_> {
        self.packed.as_ref().map_or(Left::Plain(Operand::rows(self.dx_side(), self.linear.outputs)), Left::Packed)
    }
}

/// The backward of layers that share their input: the gradient of the input is one sum with one pass over `dx`.
///
/// x: the forward's input, parts: each layer with what its forward saved and its `dy: [n_tokens, out]`,
/// dx: `[n_tokens, in]`, `None` where nothing below needs it; gradients of trained tensors are added to `grads`.
pub fn backward_all<const N: usize>(
    env: &Env<'_>,
    x: &[f32],
    parts: [(&Linear, Saved, &[f32]); N],
    dx: Option<(&mut [f32], Into)>,
    grads: &mut Grads,
) {
    let parts = parts.map(|(linear, saved, dy)| {
        let scaled = linear.through_magnitude(env, saved.direction, dy, grads);
        let mut part = Part { linear, low: saved.low, dy, scaled, packed: None };
        part.packed = pack(env, part.dx_side(), linear.outputs);
        part
    });
    let dlow = parts.each_ref().map(|part| part.linear.own_gradients(env, x, part, grads));
    let inputs = parts.first().map_or(1, |part| part.linear.inputs);
    let undropped = parts.iter().zip(&dlow).filter_map(|(part, dlow)| {
        let lora = part.linear.lora.as_ref()?;
        part.linear.dropout(env, lora).is_none().then_some((lora, dlow.as_ref()?))
    });
    down_gradients(env.ctx, &undropped.collect::<Vec<_>>(), x, inputs, grads);
    let Some((dx, into)) = dx else { return };
    let masks = parts.each_ref().map(|part| part.linear.mask(env));
    // dx (+)= Σ dy W + D(du A), with a magnitude and dropout Σ dy W + D((dz - dy) W + du A)
    let mut terms = Vec::with_capacity(3 * N);
    for ((part, dlow), mask) in parts.iter().zip(&dlow).zip(&masks) {
        let (linear, mask) = (part.linear, mask.as_ref().map(|mask| mask as Mask<'_>));
        let own = Term::new(linear.outputs, part.left(), linear.operand(env, false));
        terms.push(own);
        if let Some(dropped) = &part.scaled.dropped {
            terms.push(Term { a: Left::Plain(Operand::rows(dropped, linear.outputs)), mask, ..own });
        }
        if let (Some(lora), Some(dlow)) = (&linear.lora, dlow) {
            let (a, b) = (Operand::rows(dlow, lora.rank), Operand::rows(env.params.get(lora.a), inputs));
            terms.push(Term { mask, ..Term::new(lora.rank, Left::Plain(a), b) });
        }
    }
    gemm_sum(env.ctx, Shape { m: x.len() / inputs, n: inputs, alpha: 1.0, into }, &terms, dx);
}

/// `dA += duᵀ x` of layers with the same x, whose rows are read once;  x: `[n_tokens, width]`, du: `[n_tokens, rank]`.
fn down_gradients(ctx: &Ctx, parts: &[(&Lora, &Buf)], x: &[f32], width: usize, grads: &mut Grads) {
    let (n_tokens, ranks) = (x.len() / width, parts.iter().map(|(lora, _)| lora.rank).sum::<usize>());
    if ranks == 0 {
        return;
    }
    let mut side_by_side = ctx.buf(n_tokens * ranks);
    for (t, row) in side_by_side.chunks_exact_mut(ranks).enumerate() {
        let mut at = 0;
        for (lora, du) in parts {
            row[at..at + lora.rank].copy_from_slice(&du[t * lora.rank..][..lora.rank]);
            at += lora.rank;
        }
    }
    let mut da = ctx.buf(ranks * width);
    let (a, b) = (Operand::transposed(&side_by_side, ranks), Operand::rows(x, width));
    gemm(ctx, &Gemm { m: ranks, n: width, k: n_tokens, a, b, alpha: 1.0, into: Into::Store }, &mut da);
    let mut rest = &da[..];
    for (lora, _) in parts {
        let (own, others) = rest.split_at(lora.rank * width);
        add(ctx, grads.get_mut(lora.a), own);
        rest = others;
    }
}

/// `y += xᵀ`;  x: `[rows, n]`, y: `[n, rows]`.
fn add_transposed(ctx: &Ctx, x: &[f32], rows: usize, y: &mut [f32]) {
    const COLUMNS: usize = 64;
    let n = y.len() / rows;
    y.par_chunks_mut(COLUMNS * rows).enumerate().for_each(|(task, y)| {
        let data = &x[task * COLUMNS..];
        let mut turned = ctx.buf(y.len());
        (ctx.kernels.transpose)(&Rows { data, stride: n, count: rows, depth: y.len() / rows }, &mut turned, rows, 0);
        (ctx.kernels.axpy)(1.0, &turned, y);
    });
}

/// A left operand for several products, or `None` where rows are too few to be packed.
fn pack(env: &Env<'_>, x: &[f32], width: usize) -> Option<PackedA> {
    let rows = x.len() / width;
    (rows > FEW_ROWS).then(|| PackedA::new(env.ctx, Operand::rows(x, width), rows, width))
}
