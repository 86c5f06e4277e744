//! Token embedding: a row of the table for each id.

use super::linear::Matrix;
use super::{Buf, DropoutKey, Env, Grads};
use crate::kernels::philox::{philox4x32_10, unit_f32};
use crate::kernels::tiles::{bounds, split_grid};
use rayon::prelude::*;

/// The module number of [`add_noise`].
const NOISE: u32 = u32::MAX;

/// Columns of the table's gradient that a task takes.
const COLUMNS: usize = 128;

/// ids -> `[n_tokens, hidden]`;  table: `[vocab, hidden]`.
///
/// # Panics
/// If an id is not below the vocabulary's size; the model checks ids where they enter.
pub fn forward(env: &Env<'_>, table: &Matrix, hidden: usize) -> Buf {
    let mut x = env.ctx.buf(env.tokens.len() * hidden);
    x.par_chunks_mut(hidden).zip(&env.tokens.ids).for_each(|(row, &id)| {
        let start = id as usize * hidden;
        match table {
            Matrix::Frozen(weight) => weight.read(env.ctx.kernels, start, row),
            Matrix::Trained(param) => row.copy_from_slice(&env.params.get(*param)[start..start + hidden]),
        }
    });
    x
}

/// Adds uniform noise from `-alpha / sqrt(len · hidden)` to the same above zero, where `len` is that of the token's sequence
/// (Jain et al. 2023, "NEFTune", algorithm 1);  x: `[n_tokens, hidden]`. Nothing outside training: without a dropout key.
///
/// An element's noise is a function of seed, step, dataset row, position and element, as a dropout mask is; the module that
/// numbers a mask is `NOISE`, which no layer has. The gradient passes through unchanged.
pub fn add_noise(env: &Env<'_>, alpha: f32, hidden: usize, x: &mut [f32]) {
    let Some(DropoutKey { seed, step }) = env.dropout.filter(|_| alpha > 0.0) else { return };
    for ends in env.tokens.cu_seqlens.windows(2) {
        let (first, len) = (ends[0], ends[1] - ends[0]);
        let most = alpha / ((len * hidden) as f32).sqrt();
        x[first * hidden..ends[1] * hidden].par_chunks_mut(hidden).enumerate().for_each(|(t, row)| {
            let (position, dataset_row) = (env.tokens.positions[first + t], env.tokens.rows[first + t]);
            for (block, four) in row.chunks_mut(4).enumerate() {
                let words = philox4x32_10([block as u32, position, dataset_row, NOISE], [seed, step]);
                four.iter_mut().zip(words).for_each(|(x, word)| *x += most * (2.0 * unit_f32(word) - 1.0));
            }
        });
    }
}

/// Adds each token's gradient to its id's row, in the order of the tokens;  dx: `[n_tokens, hidden]`.
///
/// A task takes some columns of all rows, so that no two tasks meet and the order holds.
pub fn backward(env: &Env<'_>, table: &Matrix, hidden: usize, dx: &[f32], grads: &mut Grads) {
    let Matrix::Trained(param) = *table else { return };
    let grad = grads.get_mut(param);
    let rows = [0, grad.len() / hidden];
    split_grid(grad, hidden, &rows, &bounds(hidden, COLUMNS)).into_par_iter().for_each(|mut tile| {
        let cols = tile.col0..tile.col0 + tile.cols();
        for (row, &id) in dx.chunks_exact(hidden).zip(&env.tokens.ids) {
            (env.ctx.kernels.axpy)(1.0, &row[cols.clone()], tile.row(id as usize));
        }
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::{Ctx, ParamStore, Precision, Tokens};

    const HIDDEN: usize = 30;

    /// The noise on sequences of `(dataset row, length)`.
    fn noise(sequences: &[(u32, u32)], key: Option<DropoutKey>, alpha: f32) -> Vec<f32> {
        let mut tokens = Tokens { cu_seqlens: vec![0], ..Tokens::default() };
        for &(row, len) in sequences {
            tokens.ids.extend(vec![0; len as usize]);
            tokens.positions.extend(0..len);
            tokens.rows.extend(vec![row; len as usize]);
            tokens.cu_seqlens.push(tokens.ids.len());
        }
        let (ctx, params) = (Ctx::new(Precision::F32).unwrap(), ParamStore::default());
        let mut x = vec![0.0; tokens.len() * HIDDEN];
        add_noise(&Env { dropout: key, ..Env::new(&ctx, &params, &tokens) }, alpha, HIDDEN, &mut x);
        x
    }

    #[test]
    fn noise_is_uniform_and_as_strong_as_the_paper_says() {
        let key = Some(DropoutKey { seed: 1, step: 2 });
        let x = noise(&[(0, 400)], key, 5.0);
        let most = 5.0 / (400.0 * HIDDEN as f32).sqrt();
        assert!(x.iter().all(|v| v.abs() <= most) && x.iter().any(|v| *v > 0.99 * most));
        let (n, mean) = (x.len() as f32, x.iter().sum::<f32>() / x.len() as f32);
        assert!(mean.abs() < 4.0 * most / (3.0 * n).sqrt(), "{mean}"); // 4 standard deviations of the mean
        let square = x.iter().map(|v| v * v).sum::<f32>() / n;
        assert!((square / (most * most / 3.0) - 1.0).abs() < 0.05, "{square}"); // 6 of the mean square
        assert!(noise(&[(0, 9)], None, 5.0).iter().all(|v| *v == 0.0), "none outside training");
        assert!(noise(&[(0, 9)], key, 0.0).iter().all(|v| *v == 0.0));
    }

    #[test]
    fn noise_belongs_to_the_row_whatever_it_is_batched_with() {
        let key = Some(DropoutKey { seed: 1, step: 2 });
        let both = noise(&[(7, 5), (9, 11)], key, 5.0);
        assert_eq!(both[5 * HIDDEN..], noise(&[(9, 11)], key, 5.0));
        assert_ne!(both[..5 * HIDDEN], noise(&[(8, 5)], key, 5.0));
        let other = Some(DropoutKey { seed: 1, step: 3 });
        assert_ne!(both, noise(&[(7, 5), (9, 11)], other, 5.0), "another step has other noise");
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(both, one_thread.install(|| noise(&[(7, 5), (9, 11)], key, 5.0)));
    }
}
