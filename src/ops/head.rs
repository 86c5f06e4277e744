//! LM head and cross-entropy in chunks of tokens, forward and backward together, so `[tokens, vocab]` never exists.
//!
//! The weight of a step's loss is known before its forward (1 / trained tokens of the step), so the gradient of a chunk
//! is taken while its logits are at hand: `dlogits = weight · (softmax(logits) - onehot)`, `dh = dlogits W`,
//! `dW = dlogitsᵀ h`. Tokens without a target are left out before the first multiplication.

use super::linear::Matrix;
use super::matmul::{Gemm, Into, Operand, gemm};
use super::{Buf, Ctx, Env, Grads, rows_per_task};
use rayon::prelude::*;

/// The target that is not trained: Hugging Face's -100.
pub const IGNORE: i32 = -100;

/// Floats of logits that exist at a time.
const LOGITS: usize = 32 << 20;

/// Hidden states -> logits `[n, vocab]`;  h: `[n, hidden]`, head: `[vocab, hidden]`.
pub fn logits(env: &Env<'_>, head: &Matrix, vocab: usize, hidden: usize, h: &[f32]) -> Buf {
    let mut out = env.ctx.buf(h.len() / hidden * vocab);
    let (a, b) = (Operand::rows(h, hidden), operand(env, head, hidden, true));
    gemm(env.ctx, &Gemm { m: h.len() / hidden, n: vocab, k: hidden, a, b, alpha: 1.0, into: Into::Store }, &mut out);
    out
}

/// The negative log-likelihood of each target, `[n_tokens]`, 0 where the target is [`IGNORE`].
pub fn token_losses(env: &Env<'_>, head: &Matrix, vocab: usize, hidden: usize, h: &[f32], targets: &[i32]) -> Vec<f32> {
    let mut losses = vec![0.0; targets.len()];
    for_chunks(env, vocab, hidden, h, targets, |rows, h| {
        let mut scores = logits(env, head, vocab, hidden, h);
        let nll = cross_entropy(env.ctx, vocab, &mut scores, rows, targets, None);
        rows.iter().zip(nll).for_each(|(&t, nll)| losses[t] = nll);
    });
    losses
}

/// Sum of the token losses and, for `weight` times that sum, the gradient of h; the head's own is added to `grads`.
///
/// h: `[n_tokens, hidden]`, targets: `[n_tokens]` with [`IGNORE`] where nothing is trained. Returns the sum in f64 and
/// `dh: [n_tokens, hidden]`.
pub fn loss_and_grad(
    env: &Env<'_>,
    head: &Matrix,
    vocab: usize,
    h: &[f32],
    targets: &[i32],
    weight: f32,
    grads: &mut Grads,
) -> (f64, Buf) {
    let hidden = h.len() / targets.len().max(1);
    let mut dh = env.ctx.zeros(h.len());
    let mut sum = 0.0;
    for_chunks(env, vocab, hidden, h, targets, |rows, h| {
        let mut scores = logits(env, head, vocab, hidden, h);
        let nll = cross_entropy(env.ctx, vocab, &mut scores, rows, targets, Some(weight));
        sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        let (n, dlogits) = (rows.len(), scores);
        if let Matrix::Trained(id) = *head {
            // dW += dlogitsᵀ h
            let (a, b) = (Operand::transposed(&dlogits, vocab), Operand::rows(h, hidden));
            let g = Gemm { m: vocab, n: hidden, k: n, a, b, alpha: 1.0, into: Into::Add };
            gemm(env.ctx, &g, grads.get_mut(id));
        }
        // dh = dlogits W
        let mut part = env.ctx.buf(n * hidden);
        let (a, b) = (Operand::rows(&dlogits, vocab), operand(env, head, hidden, false));
        gemm(env.ctx, &Gemm { m: n, n: hidden, k: vocab, a, b, alpha: 1.0, into: Into::Store }, &mut part);
        for (&t, row) in rows.iter().zip(part.chunks_exact(hidden)) {
            dh[t * hidden..(t + 1) * hidden].copy_from_slice(row);
        }
    });
    (sum, dh)
}

fn operand<'a>(env: &Env<'a>, head: &'a Matrix, hidden: usize, transposed: bool) -> Operand<'a> {
    match head {
        Matrix::Frozen(weight) if transposed => Operand::WeightT(weight),
        Matrix::Frozen(weight) => Operand::Weight(weight),
        Matrix::Trained(id) if transposed => Operand::transposed(env.params.get(*id), hidden),
        Matrix::Trained(id) => Operand::rows(env.params.get(*id), hidden),
    }
}

/// Calls `work(token indices, their hidden states)` for chunks of the tokens that have a target.
fn for_chunks(
    env: &Env<'_>,
    vocab: usize,
    hidden: usize,
    h: &[f32],
    targets: &[i32],
    mut work: impl FnMut(&[usize], &[f32]),
) {
    let trained: Vec<usize> = (0..targets.len()).filter(|&t| targets[t] != IGNORE).collect();
    for rows in trained.chunks((LOGITS / vocab.max(1)).max(16)) {
        let mut gathered = env.ctx.buf(rows.len() * hidden);
        for (row, &t) in gathered.chunks_exact_mut(hidden).zip(rows) {
            row.copy_from_slice(&h[t * hidden..(t + 1) * hidden]);
        }
        work(rows, &gathered);
    }
}

/// The loss of each row of `scores: [rows, vocab]`; with a weight, the scores become their own gradient.
fn cross_entropy(
    ctx: &Ctx,
    vocab: usize,
    scores: &mut [f32],
    rows: &[usize],
    targets: &[i32],
    weight: Option<f32>,
) -> Vec<f32> {
    let task = rows_per_task(vocab);
    let mut nll = vec![0.0; rows.len()];
    let work = scores.par_chunks_mut(task * vocab).zip(nll.par_chunks_mut(task)).zip(rows.par_chunks(task));
    work.for_each(|((scores, nll), rows)| {
        for ((row, nll), &t) in scores.chunks_exact_mut(vocab).zip(nll).zip(rows) {
            let target = targets[t] as usize;
            let (max, of_target) = ((ctx.kernels.max_row)(row), row[target]);
            let sum = (ctx.kernels.exp_row)(row, 1.0, max);
            *nll = sum.ln() + max - of_target;
            if let Some(weight) = weight {
                let scale = weight / sum;
                for p in row.iter_mut() {
                    *p *= scale;
                }
                row[target] -= weight;
            }
        }
    });
    nll
}
