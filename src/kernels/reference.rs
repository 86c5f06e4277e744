//! The scalar reference: obvious loops, the specification and the fallback of every other table.
//!
//! Sums run in f64, left to right, except the GEMM tile, whose f32 sum over p is left to right as well.

use super::Kernels;
use super::gemm::{GemmTile, PairKernels, PanelA, reference as twin};

const TILE: GemmTile = GemmTile { mr: twin::MR, nr: twin::NR, panel_a: PanelA::Columns, run: twin::tile_f32 };

/// The table every machine can run.
pub(super) fn table() -> Kernels {
    Kernels {
        isa: "scalar",
        tile: TILE,
        pairs: Some(PairKernels {
            tile: GemmTile { run: twin::tile_pairs, ..TILE },
            fast: false,
            pack_row: twin::pack_row,
            join_rows: twin::join_rows,
            join_halves: twin::join_halves,
            nf4: twin::nf4_halves,
        }),
        transpose: twin::transpose,
        nf4_blocks: twin::nf4_blocks,
        widen: twin::widen,
        dot,
        axpy,
        rms_norm_row,
        rms_norm_row_backward,
        swiglu_row,
        swiglu_row_backward,
        max_row,
        exp_row,
        rope_row,
        round_bf16,
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len(), "dot: lengths differ");
    x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>() as f32
}

fn axpy(alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy: lengths differ");
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}

fn rms_norm_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
    assert!(x.len() == w.len() && x.len() == y.len(), "rms_norm_row: lengths differ");
    let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
    let rstd = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = x * rstd * w;
    }
    rstd
}

fn rms_norm_row_backward(x: &[f32], w: &[f32], rstd: f32, dy: &[f32], dx: &mut [f32]) {
    assert!(x.len() == w.len() && x.len() == dy.len() && x.len() == dx.len(), "rms_norm_row_backward: lengths differ");
    let sum: f64 = x.iter().zip(w).zip(dy).map(|((&x, &w), &dy)| f64::from(x) * f64::from(w) * f64::from(dy)).sum();
    let pull = (sum / x.len() as f64) as f32 * rstd * rstd;
    for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(w).zip(dy) {
        *dx += rstd * (w * dy - x * pull);
    }
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

fn swiglu_row(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == y.len(), "swiglu_row: lengths differ");
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = g * sigmoid(*g) * u;
    }
}

fn swiglu_row_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let n = gate.len();
    assert!([up.len(), dy.len(), dgate.len(), dup.len()] == [n; 4], "swiglu_row_backward: lengths differ");
    for i in 0..n {
        let s = sigmoid(gate[i]);
        dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        dup[i] = dy[i] * gate[i] * s;
    }
}

fn max_row(x: &[f32]) -> f32 {
    x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn exp_row(x: &mut [f32], scale: f32, shift: f32) -> f32 {
    let mut sum = 0.0;
    for x in x {
        *x = (scale * *x - shift).exp();
        sum += f64::from(*x);
    }
    sum as f32
}

fn rope_row(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert!(x.len() == 2 * cos.len() && cos.len() == sin.len(), "rope_row: lengths differ");
    let (first, second) = x.split_at_mut(cos.len());
    for (((x1, x2), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*x1, *x2) = (*x1 * c - *x2 * s, *x2 * c + *x1 * s);
    }
}

fn round_bf16(x: &mut [f32]) {
    for x in x {
        *x = half::bf16::from_f32(*x).to_f32();
    }
}
