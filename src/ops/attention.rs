//! Causal attention with grouped heads over several sequences in one buffer, without a score matrix.
//!
//! Forward: tiles of `TILE` queries by `TILE` keys with a running maximum and sum (Dao et al. 2022, algorithm 1); only the
//! log-sum-exp of each query and head is kept. Backward (Dao 2023, algorithm 2): with P = exp(scale · q kᵀ - lse) and
//! D = Σ dout ⊙ out, `dv = Pᵀ dout`, `dS = P ⊙ (dout vᵀ - D)`, `dq = scale · dS k`, `dk = scale · dSᵀ q`.
//! K and V are read in place for all query heads of their group; a tile never leaves its sequence.

use super::matmul::{BlockScratch, Gemm, Into, Operand, gemm_block};
use super::{Buf, Ctx};
use crate::kernels::tiles::split_grid;
use rayon::prelude::*;
use std::cell::RefCell;

/// Queries and keys of one tile.
const TILE: usize = 64;

/// The sizes of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of the queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// One sequence: queries `q_start .. q_start + q_len` of the buffer against its own keys.
///
/// The last query sees all `kv_len` keys, the one before it all but one: with a cache, `kv_len` exceeds `q_len`.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// First query row.
    pub q_start: usize,
    /// Number of queries.
    pub q_len: usize,
    /// `[kv_len, kv_heads · head_dim]`.
    pub k: &'a [f32],
    /// `[kv_len, kv_heads · head_dim]`.
    pub v: &'a [f32],
    /// Number of keys, at least `q_len`.
    pub kv_len: usize,
}

/// The segments of a buffer whose keys stand beside its queries.
pub fn segments<'a>(cu_seqlens: &[usize], kv_width: usize, k: &'a [f32], v: &'a [f32]) -> Vec<Segment<'a>> {
    cu_seqlens
        .windows(2)
        .map(|pair| {
            let rows = pair[0] * kv_width..pair[1] * kv_width;
            let len = pair[1] - pair[0];
            Segment { q_start: pair[0], q_len: len, k: &k[rows.clone()], v: &v[rows], kv_len: len }
        })
        .collect()
}

/// Scratch of one task.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    dscores: Vec<f32>,
    acc: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    block: BlockScratch,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Attention of all segments.
///
/// q: `[n_tokens, heads · head_dim]`, segments in the order of their rows and covering them.
/// Returns out: `[n_tokens, heads · head_dim]` and lse: `[n_tokens, heads]`.
pub fn forward(ctx: &Ctx, shape: Heads, q: &[f32], segments: &[Segment<'_>]) -> (Buf, Buf) {
    let width = shape.q_width();
    let mut out = ctx.buf(q.len());
    let mut lse = ctx.buf(q.len() / shape.head_dim);
    // A task is one tile of queries of one head.
    let mut rows = vec![0];
    let mut owner = Vec::new();
    for (s, segment) in segments.iter().enumerate() {
        for i in (0..segment.q_len).step_by(TILE) {
            rows.push(segment.q_start + (i + TILE).min(segment.q_len));
            owner.push(s);
        }
    }
    let head_bounds: Vec<usize> = (0..=shape.heads).collect();
    let col_bounds: Vec<usize> = head_bounds.iter().map(|h| h * shape.head_dim).collect();
    let out_tiles = split_grid(&mut out, width, &rows, &col_bounds);
    let lse_tiles = split_grid(&mut lse, shape.heads, &rows, &head_bounds);
    out_tiles.into_par_iter().zip(lse_tiles).enumerate().for_each(|(task, (mut out, mut lse))| {
        let segment = &segments[owner[task / shape.heads]];
        let head = task % shape.heads;
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { scores, acc, block, .. } = scratch;
            let (dim, n) = (shape.head_dim, out.rows());
            let q_tile = &q[out.row0 * width + head * dim..];
            let kv_col = head / (shape.heads / shape.kv_heads) * dim;
            // Position among the keys of the tile's first query.
            let first = segment.kv_len - segment.q_len + out.row0 - segment.q_start;
            scores.resize(TILE * TILE, 0.0);
            acc.clear();
            acc.resize(n * dim, 0.0);
            let (mut max, mut sum) = ([f32::NEG_INFINITY; TILE], [0.0_f32; TILE]);
            for k0 in (0..first + n).step_by(TILE) {
                let keys = TILE.min(first + n - k0);
                tile_scores(
                    ctx,
                    shape,
                    q_tile,
                    width,
                    &segment.k[k0 * shape.kv_width() + kv_col..],
                    (n, keys),
                    scores,
                    block,
                );
                for i in 0..n {
                    let seen = (first + i + 1).saturating_sub(k0).min(keys);
                    let row = &mut scores[i * TILE..i * TILE + keys];
                    row[seen..].fill(0.0);
                    if seen == 0 {
                        continue;
                    }
                    let new_max = max[i].max((ctx.kernels.max_row)(&row[..seen]) * shape.scale());
                    let shrink = (max[i] - new_max).exp();
                    sum[i] = sum[i] * shrink + (ctx.kernels.exp_row)(&mut row[..seen], shape.scale(), new_max);
                    if shrink != 1.0 {
                        acc[i * dim..(i + 1) * dim].iter_mut().for_each(|o| *o *= shrink);
                    }
                    max[i] = new_max;
                }
                // acc += P v
                let (a, b) =
                    (Operand::rows(scores, TILE), kv_rows(&segment.v[k0 * shape.kv_width() + kv_col..], shape));
                gemm_block(ctx, &Gemm { m: n, n: dim, k: keys, a, b, alpha: 1.0, into: Into::Add }, acc, dim, block);
            }
            for i in 0..n {
                let inverse = 1.0 / sum[i];
                for (o, a) in out.row(i).iter_mut().zip(&acc[i * dim..]) {
                    *o = a * inverse;
                }
                lse.row(i)[0] = max[i] + sum[i].ln();
            }
        });
    });
    (out, lse)
}

/// Rows of one key or value head.
fn kv_rows(data: &[f32], shape: Heads) -> Operand<'_> {
    Operand::Dense { data, row_stride: shape.kv_width(), col_stride: 1 }
}

/// `scores[i, j] = q_i · k_j`, unscaled, rows `TILE` apart.
#[expect(clippy::too_many_arguments, reason = "one tile of two buffers with their strides")]
fn tile_scores(
    ctx: &Ctx,
    shape: Heads,
    q: &[f32],
    q_stride: usize,
    k: &[f32],
    (n, keys): (usize, usize),
    scores: &mut [f32],
    block: &mut BlockScratch,
) {
    let a = Operand::Dense { data: q, row_stride: q_stride, col_stride: 1 };
    let b = Operand::Dense { data: k, row_stride: 1, col_stride: shape.kv_width() };
    let g = Gemm { m: n, n: keys, k: shape.head_dim, a, b, alpha: 1.0, into: Into::Store };
    gemm_block(ctx, &g, scores, TILE, block);
}

/// The forward's inputs and outputs, as its backward reads them.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    /// `[n_tokens, heads · head_dim]`.
    pub q: &'a [f32],
    /// `[n_tokens, kv_heads · head_dim]`.
    pub k: &'a [f32],
    /// `[n_tokens, kv_heads · head_dim]`.
    pub v: &'a [f32],
    /// `[n_tokens, heads · head_dim]`.
    pub out: &'a [f32],
    /// `[n_tokens, heads]`.
    pub lse: &'a [f32],
}

/// Gradients of q, k and v, in their shapes, from that of the output;  dout: `[n_tokens, heads · head_dim]`.
///
/// A task is one key-value head of one sequence with all its query heads, so no two tasks add to the same place.
pub fn backward(ctx: &Ctx, shape: Heads, cu_seqlens: &[usize], f: Forward<'_>, dout: &[f32]) -> (Buf, Buf, Buf) {
    let (mut dq, mut dk, mut dv) = (ctx.buf(f.q.len()), ctx.buf(f.k.len()), ctx.buf(f.v.len()));
    let group = shape.heads / shape.kv_heads;
    let bounds = |step: usize| (0..=shape.kv_heads).map(|h| h * step).collect::<Vec<_>>();
    let kv_bounds = bounds(shape.head_dim);
    let dq_tiles = split_grid(&mut dq, shape.q_width(), cu_seqlens, &bounds(group * shape.head_dim));
    let dk_tiles = split_grid(&mut dk, shape.kv_width(), cu_seqlens, &kv_bounds);
    let dv_tiles = split_grid(&mut dv, shape.kv_width(), cu_seqlens, &kv_bounds);
    dq_tiles.into_par_iter().zip(dk_tiles).zip(dv_tiles).for_each(|((mut dq, mut dk), mut dv)| {
        SCRATCH.with_borrow_mut(|scratch| {
            let (start, len, dim) = (dk.row0, dk.rows(), shape.head_dim);
            let first_head = dk.col0 / dim * group;
            for buffer in [&mut scratch.dk, &mut scratch.dv] {
                buffer.clear();
                buffer.resize(len * dim, 0.0);
            }
            for head in first_head..first_head + group {
                scratch.dq.clear();
                scratch.dq.resize(len * dim, 0.0);
                head_backward(ctx, shape, f, dout, start..start + len, head, scratch);
                for i in 0..len {
                    let at = (head - first_head) * dim;
                    dq.row(i)[at..at + dim].copy_from_slice(&scratch.dq[i * dim..(i + 1) * dim]);
                }
            }
            for i in 0..len {
                dk.row(i).copy_from_slice(&scratch.dk[i * dim..(i + 1) * dim]);
                dv.row(i).copy_from_slice(&scratch.dv[i * dim..(i + 1) * dim]);
            }
        });
    });
    (dq, dk, dv)
}

/// One query head of one sequence: sets `scratch.dq`, adds to `scratch.dk` and `scratch.dv`, all `[len, head_dim]`.
fn head_backward(
    ctx: &Ctx,
    shape: Heads,
    f: Forward<'_>,
    dout: &[f32],
    rows: std::ops::Range<usize>,
    head: usize,
    scratch: &mut Scratch,
) {
    let Scratch { scores, dscores, dq, dk, dv, block, .. } = scratch;
    let (dim, q_width, len, scale) = (shape.head_dim, shape.q_width(), rows.len(), shape.scale());
    let q_at = |i: usize| (rows.start + i) * q_width + head * dim;
    let kv_at = |j: usize| (rows.start + j) * shape.kv_width() + head / (shape.heads / shape.kv_heads) * dim;
    scores.resize(TILE * TILE, 0.0);
    dscores.resize(TILE * TILE, 0.0);
    for q0 in (0..len).step_by(TILE) {
        let n = TILE.min(len - q0);
        let q_rows = Operand::Dense { data: &f.q[q_at(q0)..], row_stride: q_width, col_stride: 1 };
        let dout_rows = Operand::Dense { data: &dout[q_at(q0)..], row_stride: q_width, col_stride: 1 };
        let mut delta = [0.0; TILE];
        for (i, delta) in delta[..n].iter_mut().enumerate() {
            let at = q_at(q0 + i);
            *delta = (ctx.kernels.dot)(&dout[at..at + dim], &f.out[at..at + dim]);
        }
        for k0 in (0..q0 + n).step_by(TILE) {
            let keys = TILE.min(q0 + n - k0);
            // P = exp(scale · q kᵀ - lse)
            tile_scores(ctx, shape, &f.q[q_at(q0)..], q_width, &f.k[kv_at(k0)..], (n, keys), scores, block);
            for i in 0..n {
                let seen = (q0 + i + 1).saturating_sub(k0).min(keys);
                let row = &mut scores[i * TILE..i * TILE + keys];
                (ctx.kernels.exp_row)(&mut row[..seen], scale, f.lse[(rows.start + q0 + i) * shape.heads + head]);
                row[seen..].fill(0.0);
            }
            // dP = dout vᵀ, then dS = P ⊙ (dP - D)
            tile_scores(ctx, shape, &dout[q_at(q0)..], q_width, &f.v[kv_at(k0)..], (n, keys), dscores, block);
            for i in 0..n {
                let p = &scores[i * TILE..i * TILE + keys];
                for (ds, p) in dscores[i * TILE..i * TILE + keys].iter_mut().zip(p) {
                    *ds = p * (*ds - delta[i]);
                }
            }
            let (p_t, ds_t) = (Operand::transposed(scores, TILE), Operand::transposed(dscores, TILE));
            // dv += Pᵀ dout
            let g = Gemm { m: keys, n: dim, k: n, a: p_t, b: dout_rows, alpha: 1.0, into: Into::Add };
            gemm_block(ctx, &g, &mut dv[k0 * dim..], dim, block);
            // dk += scale · dSᵀ q
            gemm_block(ctx, &Gemm { a: ds_t, b: q_rows, alpha: scale, ..g }, &mut dk[k0 * dim..], dim, block);
            // dq += scale · dS k
            let (a, b) = (Operand::rows(dscores, TILE), kv_rows(&f.k[kv_at(k0)..], shape));
            let g = Gemm { m: n, n: dim, k: keys, a, b, alpha: scale, into: Into::Add };
            gemm_block(ctx, &g, &mut dq[q0 * dim..], dim, block);
        }
    }
}
