//! Dropout whose mask is a function of (seed, step, dataset row, token, module, element), so nothing is stored.
//!
//! Srivastava et al. 2014 in the inverted form: kept elements are scaled by 1 / (1 - p). Recomputation replays the mask,
//! and neither threads nor the split of a step into micro-batches nor padding changes it.

use super::{Ctx, TASKS_AT_ONCE, Tokens, rows_per_task};
use crate::kernels::elementwise::{Mask, Masked};
use rayon::prelude::*;
use std::ops::Range;

/// The part of the key that all masks of one optimizer step share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u32,
    /// The optimizer step, counted from 0.
    pub step: u32,
}

/// One layer's dropout over the tokens of a micro-batch.
#[derive(Clone, Copy)]
pub struct Dropout<'a> {
    /// Seed and step.
    pub key: DropoutKey,
    /// Tells the layers of a model apart.
    pub module: u32,
    /// Probability that an element is dropped.
    pub p: f32,
    /// Positions and dataset rows.
    pub tokens: &'a Tokens,
    /// Elements of a token.
    pub width: usize,
}

impl Dropout<'_> {
    /// `out = x ⊙ mask / (1 - p)`;  x, out: `[n_tokens, width]`. The backward is the same call on the gradient.
    pub fn copy(&self, ctx: &Ctx, x: &[f32], out: &mut [f32]) {
        self.apply(ctx, out, |row| Masked::Copy(&x[row]));
    }

    /// `x = x ⊙ mask / (1 - p)`.
    pub fn in_place(&self, ctx: &Ctx, x: &mut [f32]) {
        self.apply(ctx, x, |_| Masked::InPlace);
    }

    /// `out += x ⊙ mask / (1 - p)`.
    pub fn add(&self, ctx: &Ctx, x: &[f32], out: &mut [f32]) {
        self.apply(ctx, out, |row| Masked::Add(&x[row]));
    }

    fn apply<'x>(&self, ctx: &Ctx, out: &mut [f32], how: impl Fn(Range<usize>) -> Masked<'x> + Sync) {
        let (width, task) = (self.width, rows_per_task(self.width));
        out.par_chunks_mut(task * width).with_max_len(TASKS_AT_ONCE).enumerate().for_each(|(chunk, out)| {
            for (r, row) in out.chunks_exact_mut(width).enumerate() {
                let t = chunk * task + r;
                (ctx.kernels.dropout_row)(&self.mask(t, 0), how(t * width..(t + 1) * width), row);
            }
        });
    }

    /// The mask of one token's row from element `first` on, a multiple of 4.
    pub fn mask(&self, token: usize, first: usize) -> Mask {
        Mask {
            key: [self.key.seed, self.key.step],
            counter: [self.tokens.positions[token], self.tokens.rows[token], self.module],
            first: first as u32,
            threshold: (f64::from(self.p) * 4_294_967_296.0) as u32,
            scale: 1.0 / (1.0 - self.p),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn tokens(rows: &[u32], len: u32) -> Tokens {
        let mut tokens = Tokens { cu_seqlens: vec![0], ..Tokens::default() };
        for &row in rows {
            for position in 0..len {
                tokens.ids.push(0);
                tokens.positions.push(position);
                tokens.rows.push(row);
            }
            tokens.cu_seqlens.push(tokens.ids.len());
        }
        tokens
    }

    fn ctx() -> Ctx {
        Ctx::new(crate::ops::Precision::F32).unwrap()
    }

    #[test]
    fn the_mask_belongs_to_the_row_not_to_its_place_in_the_batch() {
        let key = DropoutKey { seed: 1, step: 2 };
        let (width, len, ctx) = (37, 5, ctx());
        let ones = vec![1.0; 2 * width * len as usize];
        let (pair, single) = (tokens(&[7, 9], len), tokens(&[9], len));
        let of_pair = Dropout { key, module: 3, p: 0.25, tokens: &pair, width };
        let of_single = Dropout { tokens: &single, ..of_pair };
        let mut both = ones.clone();
        of_pair.copy(&ctx, &ones, &mut both);
        let mut alone = ones[..width * len as usize].to_vec();
        of_single.in_place(&ctx, &mut alone);
        assert_eq!(both[width * len as usize..], alone);
        let mut added = ones[..width * len as usize].to_vec();
        of_single.add(&ctx, &ones[..width * len as usize], &mut added);
        assert!(added.iter().zip(&alone).all(|(sum, masked)| *sum == 1.0 + masked));
        let mut other = ones[..width * len as usize].to_vec();
        Dropout { key: DropoutKey { step: 3, ..key }, ..of_single }.in_place(&ctx, &mut other);
        assert_ne!(alone, other, "another step has another mask");
    }

    #[test]
    fn a_share_p_is_dropped_and_the_mean_stays() {
        let tokens = tokens(&[0], 1000);
        let mut x = vec![1.0; 100_000];
        let key = DropoutKey { seed: 5, step: 0 };
        Dropout { key, module: 0, p: 0.1, tokens: &tokens, width: 100 }.in_place(&ctx(), &mut x);
        let dropped = x.iter().filter(|v| **v == 0.0).count() as f64 / 1e5;
        assert!((dropped - 0.1).abs() < 0.004, "{dropped}"); // 4 standard deviations of 1e5 coin flips
        assert!(x.iter().all(|v| *v == 0.0 || (*v - 1.0 / 0.9).abs() < 1e-6));
    }
}
