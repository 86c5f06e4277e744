//! Dropout whose mask is a function of (seed, step, dataset row, token, module, element), so nothing is stored.
//!
//! Srivastava et al. 2014 in the inverted form: kept elements are scaled by 1 / (1 - p). Recomputation replays the mask,
//! and neither threads nor the split of a step into micro-batches nor padding changes it.

use super::{Tokens, rows_per_task};
use crate::kernels::philox::philox4x32_10;
use rayon::prelude::*;

/// The part of the key that all masks of one optimizer step share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u32,
    /// The optimizer step, counted from 0.
    pub step: u32,
}

/// `out = x ⊙ mask / (1 - p)`;  x, out: `[n_tokens, width]`. The backward is the same call on the gradient.
///
/// `module` tells the layers of a model apart.
pub fn dropout(key: DropoutKey, module: u32, p: f32, tokens: &Tokens, width: usize, x: &[f32], out: &mut [f32]) {
    apply(key, module, p, tokens, width, out, |row, i| row.copy_from_slice(&x[i..i + width]));
}

/// `x = x ⊙ mask / (1 - p)` in place.
pub fn dropout_in_place(key: DropoutKey, module: u32, p: f32, tokens: &Tokens, width: usize, x: &mut [f32]) {
    apply(key, module, p, tokens, width, x, |_, _| ());
}

/// `x = x ⊙ mask / (1 - p)` for a piece of the row of one token that begins at element `first`, a multiple of 4.
pub fn dropout_piece(key: DropoutKey, module: u32, p: f32, tokens: &Tokens, token: usize, first: usize, x: &mut [f32]) {
    debug_assert!(first.is_multiple_of(4), "a word of the generator serves four elements");
    let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
    let scale = 1.0 / (1.0 - p);
    for (block, four) in x.chunks_mut(4).enumerate() {
        let counter = [(first / 4 + block) as u32, tokens.positions[token], tokens.rows[token], module];
        let words = philox4x32_10(counter, [key.seed, key.step]);
        for (value, word) in four.iter_mut().zip(words) {
            *value = if word >= threshold { *value * scale } else { 0.0 };
        }
    }
}

/// Fills each row, then masks it.
fn apply(
    key: DropoutKey,
    module: u32,
    p: f32,
    tokens: &Tokens,
    width: usize,
    out: &mut [f32],
    fill: impl Fn(&mut [f32], usize) + Sync,
) {
    let task = rows_per_task(width);
    out.par_chunks_mut(task * width).enumerate().for_each(|(chunk, out)| {
        for (r, row) in out.chunks_exact_mut(width).enumerate() {
            let t = chunk * task + r;
            fill(row, t * width);
            dropout_piece(key, module, p, tokens, t, 0, row);
        }
    });
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn the_mask_belongs_to_the_row_not_to_its_place_in_the_batch() {
        let key = DropoutKey { seed: 1, step: 2 };
        let (width, len) = (37, 5);
        let ones = vec![1.0; 2 * width * len as usize];
        let mut both = ones.clone();
        dropout(key, 3, 0.25, &tokens(&[7, 9], len), width, &ones, &mut both);
        let mut alone = ones[..width * len as usize].to_vec();
        dropout_in_place(key, 3, 0.25, &tokens(&[9], len), width, &mut alone);
        assert_eq!(both[width * len as usize..], alone);
        let mut other = ones[..width * len as usize].to_vec();
        dropout_in_place(DropoutKey { step: 3, ..key }, 3, 0.25, &tokens(&[9], len), width, &mut other);
        assert_ne!(alone, other, "another step has another mask");
    }

    #[test]
    fn a_share_p_is_dropped_and_the_mean_stays() {
        let tokens = tokens(&[0], 1000);
        let mut x = vec![1.0; 100_000];
        dropout_in_place(DropoutKey { seed: 5, step: 0 }, 0, 0.1, &tokens, 100, &mut x);
        let dropped = x.iter().filter(|v| **v == 0.0).count() as f64 / 1e5;
        assert!((dropped - 0.1).abs() < 0.004, "{dropped}"); // 4 standard deviations of 1e5 coin flips
        assert!(x.iter().all(|v| *v == 0.0 || (*v - 1.0 / 0.9).abs() < 1e-6));
    }
}
