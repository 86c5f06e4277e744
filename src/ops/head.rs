//! LM head and cross-entropy in one pass over the vocabulary, so `[tokens, vocab]` never exists.
//!
//! The head is an attention over the vocabulary: with the logits `l = h Wᵀ` of a token, `loss = lse(l) - l[target]` and
//! `dh = weight · (softmax(l) W - W[target])`. So a block of W is read once, its logits give a running maximum and sum
//! (Milakov & Gimelshein 2018, algorithm 3), and their exponentials, times the same block, are added to a `dh` that is
//! scaled down whenever the maximum rises, as in flash attention. The weight of a step's loss is known before its forward
//! (1 / trained tokens of the step). Tokens without a target are left out before the first multiplication.
//! A trained head needs the finished softmax for its own gradient and goes through chunks of tokens instead.

use super::linear::Matrix;
use super::matmul::{Gemm, Into, Left, Operand, PackedA, Shape, Term, gemm, gemm_sum};
use super::{Buf, Ctx, Env, Grads, rows_per_task};
use rayon::prelude::*;
use std::ops::Range;

/// The target that is not trained: Hugging Face's -100.
pub const IGNORE: i32 = -100;

/// Floats of logits that exist at a time.
const LOGITS: usize = 4 << 20;
/// Rows of W in a block, at least: fewer would add `dh` up too often.
const MIN_BLOCK: usize = 1024;

/// Floats of logits that exist at a time when `n` tokens have a target.
pub fn logits_at_a_time(n: usize, vocab: usize, head_trained: bool) -> usize {
    if head_trained { n.min(rows_at_a_time(vocab)) * vocab } else { n * block_rows(n, vocab) }
}

/// Rows of W in a block.
fn block_rows(n: usize, vocab: usize) -> usize {
    (LOGITS / n.max(1)).max(MIN_BLOCK).next_multiple_of(64).min(vocab)
}

/// Tokens that go through a trained head together.
fn rows_at_a_time(vocab: usize) -> usize {
    (LOGITS / vocab.max(1)).max(256)
}

/// Hidden states -> logits `[n, vocab]`;  h: `[n, hidden]`, head: `[vocab, hidden]`.
pub fn logits(env: &Env<'_>, head: &Matrix, vocab: usize, hidden: usize, h: &[f32]) -> Buf {
    let mut out = env.ctx.buf(h.len() / hidden * vocab);
    let (a, b) = (Operand::rows(h, hidden), operand(env, head, hidden, 0, true));
    gemm(env.ctx, &Gemm { m: h.len() / hidden, n: vocab, k: hidden, a, b, alpha: 1.0, into: Into::Store }, &mut out);
    out
}

/// The negative log-likelihood of each target, `[n_tokens]`, 0 where the target is [`IGNORE`].
pub fn token_losses(env: &Env<'_>, head: &Matrix, vocab: usize, hidden: usize, h: &[f32], targets: &[i32]) -> Vec<f32> {
    let mut losses = vec![0.0; targets.len()];
    let rows = trained(targets);
    let pass = Pass::new(env, head, vocab, hidden, h, targets, &rows);
    let (rows_seen, _) = pass.run(false);
    rows.iter().zip(rows_seen).for_each(|(&t, seen)| losses[t] = seen.nll());
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
    let Matrix::Frozen(table) = head else {
        return trained_loss_and_grad(env, head, vocab, h, targets, weight, grads);
    };
    let rows = trained(targets);
    let pass = Pass::new(env, head, vocab, hidden, h, targets, &rows);
    let (seen, sums) = pass.run(true);
    let mut dh = env.ctx.zeros(h.len());
    let finished = sums.par_chunks(hidden).zip(&seen).map(|(sums, seen)| {
        // weight · (softmax(l) W - W[target])
        let mut row = vec![0.0; hidden];
        table.read(env.ctx.kernels, seen.target * hidden, &mut row);
        row.iter_mut().zip(sums).for_each(|(out, sum)| *out = weight * (sum / seen.sum - *out));
        row
    });
    for (&t, row) in rows.iter().zip(finished.collect::<Vec<_>>()) {
        dh[t * hidden..(t + 1) * hidden].copy_from_slice(&row);
    }
    (seen.iter().map(|seen| f64::from(seen.nll())).sum(), dh)
}

/// The tokens that have a target.
fn trained(targets: &[i32]) -> Vec<usize> {
    (0..targets.len()).filter(|&t| targets[t] != IGNORE).collect()
}

/// What a token has seen of the vocabulary so far.
#[derive(Clone, Copy)]
struct Seen {
    /// Its target.
    target: usize,
    /// The target's logit.
    of_target: f32,
    /// The largest logit.
    max: f32,
    /// `Σ exp(l - max)`.
    sum: f32,
    /// By what the last block's maximum scales what was summed before it.
    shrink: f32,
}

impl Seen {
    fn nll(&self) -> f32 {
        self.sum.ln() + self.max - self.of_target
    }

    /// Takes in the logits of rows `ids` of the vocabulary and leaves `exp(l - max)` in their place.
    fn take(&mut self, ctx: &Ctx, ids: &Range<usize>, scores: &mut [f32]) {
        if ids.contains(&self.target) {
            self.of_target = scores[self.target - ids.start];
        }
        let max = self.max.max((ctx.kernels.max_row)(scores));
        self.shrink = (self.max - max).exp();
        self.sum = self.sum * self.shrink + (ctx.kernels.exp_row)(scores, 1.0, max);
        self.max = max;
    }
}

/// One pass over the vocabulary for the tokens that have a target.
struct Pass<'a> {
    env: &'a Env<'a>,
    head: &'a Matrix,
    vocab: usize,
    hidden: usize,
    /// Their hidden states.
    h: PackedA,
    seen: Vec<Seen>,
}

impl<'a> Pass<'a> {
    fn new(
        env: &'a Env<'a>,
        head: &'a Matrix,
        vocab: usize,
        hidden: usize,
        h: &[f32],
        targets: &[i32],
        rows: &[usize],
    ) -> Self {
        let gathered = gather(env.ctx, h, hidden, rows);
        let seen = |&t: &usize| Seen {
            target: targets[t] as usize,
            of_target: 0.0,
            max: f32::NEG_INFINITY,
            sum: 0.0,
            shrink: 0.0,
        };
        let packed = PackedA::new(env.ctx, Operand::rows(&gathered, hidden), rows.len(), hidden);
        Self { env, head, vocab, hidden, h: packed, seen: rows.iter().map(seen).collect() }
    }

    /// What each token saw and, if asked for, `Σ_v exp(l_v - max) W_v`, `[tokens, hidden]`.
    fn run(mut self, with_sums: bool) -> (Vec<Seen>, Buf) {
        let (ctx, n, hidden) = (self.env.ctx, self.seen.len(), self.hidden);
        let mut sums = ctx.buf(if with_sums { n * hidden } else { 0 });
        if n == 0 {
            return (self.seen, sums);
        }
        let block = block_rows(n, self.vocab);
        let mut scores = ctx.buf(n * block);
        for first in (0..self.vocab).step_by(block) {
            let ids = first..self.vocab.min(first + block);
            let scores = &mut scores[..n * ids.len()];
            let term = Term::new(hidden, Left::Packed(&self.h), operand(self.env, self.head, hidden, first, true));
            gemm_sum(ctx, Shape { m: n, n: ids.len(), alpha: 1.0, into: Into::Store }, &[term], scores);
            scores.par_chunks_mut(ids.len()).zip(&mut self.seen).for_each(|(row, seen)| seen.take(ctx, &ids, row));
            if !with_sums {
                continue;
            }
            if first > 0 {
                sums.par_chunks_mut(hidden)
                    .zip(&self.seen)
                    .filter(|(_, seen)| seen.shrink != 1.0)
                    .for_each(|(row, seen)| row.iter_mut().for_each(|sum| *sum *= seen.shrink));
            }
            let into = if first == 0 { Into::Store } else { Into::Add };
            let (a, b) = (Operand::rows(scores, ids.len()), operand(self.env, self.head, hidden, first, false));
            gemm(ctx, &Gemm { m: n, n: hidden, k: ids.len(), a, b, alpha: 1.0, into }, &mut sums);
        }
        (self.seen, sums)
    }
}

/// [`loss_and_grad`] for a trained head, in chunks of tokens.
fn trained_loss_and_grad(
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
    for rows in trained(targets).chunks(rows_at_a_time(vocab)) {
        let h = gather(env.ctx, h, hidden, rows);
        let mut dlogits = logits(env, head, vocab, hidden, &h);
        sum += cross_entropy(env.ctx, vocab, &mut dlogits, rows, targets, weight);
        let n = rows.len();
        if let Matrix::Trained(id) = *head {
            // dW += dlogitsᵀ h
            let (a, b) = (Operand::transposed(&dlogits, vocab), Operand::rows(&h, hidden));
            let g = Gemm { m: vocab, n: hidden, k: n, a, b, alpha: 1.0, into: Into::Add };
            gemm(env.ctx, &g, grads.get_mut(id));
        }
        // dh = dlogits W
        let mut part = env.ctx.buf(n * hidden);
        let (a, b) = (Operand::rows(&dlogits, vocab), operand(env, head, hidden, 0, false));
        gemm(env.ctx, &Gemm { m: n, n: hidden, k: vocab, a, b, alpha: 1.0, into: Into::Store }, &mut part);
        for (&t, row) in rows.iter().zip(part.chunks_exact(hidden)) {
            dh[t * hidden..(t + 1) * hidden].copy_from_slice(row);
        }
    }
    (sum, dh)
}

/// The head from row `first` on, transposed or not.
fn operand<'a>(env: &Env<'a>, head: &'a Matrix, hidden: usize, first: usize, transposed: bool) -> Operand<'a> {
    match head {
        Matrix::Frozen(weight) if transposed => Operand::WeightT(weight, first),
        Matrix::Frozen(weight) => Operand::Weight(weight, first),
        Matrix::Trained(id) if transposed => Operand::transposed(&env.params.get(*id)[first * hidden..], hidden),
        Matrix::Trained(id) => Operand::rows(&env.params.get(*id)[first * hidden..], hidden),
    }
}

/// The hidden states of some tokens, `[rows, hidden]`.
fn gather(ctx: &Ctx, h: &[f32], hidden: usize, rows: &[usize]) -> Buf {
    let mut gathered = ctx.buf(rows.len() * hidden);
    let tasks = gathered.par_chunks_exact_mut(hidden).zip(rows).with_min_len(16);
    tasks.for_each(|(row, &t)| row.copy_from_slice(&h[t * hidden..(t + 1) * hidden]));
    gathered
}

/// The sum of the losses of the rows of `scores: [rows, vocab]`, which become their own gradient.
fn cross_entropy(ctx: &Ctx, vocab: usize, scores: &mut [f32], rows: &[usize], targets: &[i32], weight: f32) -> f64 {
    let task = rows_per_task(vocab);
    let work = scores.par_chunks_mut(task * vocab).zip(rows.par_chunks(task));
    let nll = work.flat_map_iter(|(scores, rows)| {
        scores.chunks_exact_mut(vocab).zip(rows).map(|(row, &t)| {
            let target = targets[t] as usize;
            let (max, of_target) = ((ctx.kernels.max_row)(row), row[target]);
            let sum = (ctx.kernels.exp_row)(row, 1.0, max);
            let scale = weight / sum;
            for p in row.iter_mut() {
                *p *= scale;
            }
            row[target] -= weight;
            sum.ln() + max - of_target
        })
    });
    nll.collect::<Vec<_>>().iter().map(|&nll| f64::from(nll)).sum()
}
