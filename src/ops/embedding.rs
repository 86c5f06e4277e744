//! Token embedding: a row of the table for each id.

use super::linear::Matrix;
use super::{Buf, Env, Grads};
use crate::kernels::tiles::{bounds, split_grid};
use rayon::prelude::*;

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
