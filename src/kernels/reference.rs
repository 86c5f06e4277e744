//! The scalar reference: obvious loops, the specification and the fallback of every other table.
//!
//! Sums run in f64, left to right, except the GEMM tile, whose f32 sum over p is left to right as well.

use super::Kernels;
use super::attention::{Attention, Block, DIMS, Few, Gradients, KEYS, PAD, QUERIES, QUERY_STRIDE, Softmax, Upstream};
use super::elementwise::{adamw_row_scalar, dropout_row_scalar};
use super::gemm::{GemmTile, PairKernels, PanelA, reference as twin};
use super::gemv::{BLOCK, Nf4Rows, check_x};
use super::int8::reference::{int8_halves, int8_row};
use super::quantize::{INFINITY_BITS, MIN_ABSMAX};

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
            pack_lines: twin::pack_lines,
            join_rows: twin::join_rows,
            join_halves: twin::join_halves,
            nf4: twin::nf4_halves,
            int8: int8_halves,
        }),
        transpose: twin::transpose,
        copy_rows: twin::copy_rows,
        store_sums: twin::store_sums,
        nf4_blocks: twin::nf4_blocks,
        int8_row,
        widen: twin::widen,
        dot,
        axpy,
        rms_norm_row,
        rms_norm_row_backward,
        swiglu_row,
        swiglu_row_backward,
        max_row,
        exp_row,
        round_bf16,
        attention: Attention {
            panel: PANEL,
            forward: attend,
            backward: attend_backward,
            softmax,
            slopes,
            few: attend_few,
        },
        rope_row,
        rms_norm_gain,
        dropout_row: dropout_row_scalar,
        adamw_row: adamw_row_scalar,
        nf4_order: |x, out| out.copy_from_slice(x),
        nf4_gemv,
        nf4_pairs: None,
        nested_scales: |codes, map, scale, offset, out| {
            assert_eq!(codes.len(), out.len(), "nested_scales: lengths differ");
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = map[usize::from(code)] * scale + offset;
            }
        },
        bf16_gemv: |w, cols, x, out| gemv(w.len() / cols, cols, x, out, |at| f32::from_bits(u32::from(w[at]) << 16)),
        f32_gemv: |w, cols, x, out| gemv(w.len() / cols, cols, x, out, |at| w[at]),
        i8_gemv: |w, scales, cols, x, out| {
            gemv(w.len() / cols, cols, x, out, |at| f32::from(w[at]) * scales[at / BLOCK]);
        },
        integer: super::integer::reference::TABLE,
        int16: super::int16::reference::TABLE,
        nf4_quantize,
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

fn rope_row(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    assert!(sin.len() == half && x.len().is_multiple_of(2 * half), "rope_row: lengths differ");
    for head in x.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for (((x1, x2), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*x1, *x2) = (*x1 * c - *x2 * (sign * s), *x2 * c + *x1 * (sign * s));
        }
    }
}

fn rms_norm_gain(x: &[f32], rstd: f32, dy: &[f32], dw: &mut [f32]) {
    assert!(x.len() == dy.len() && x.len() == dw.len(), "rms_norm_gain: lengths differ");
    for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
        *dw += dy * x * rstd;
    }
}

fn round_bf16(x: &mut [f32]) {
    for x in x {
        *x = half::bf16::from_f32(*x).to_f32();
    }
}

/// Keys of a packed panel.
const PANEL: usize = 16;

/// Element `d` of packed query `i`.
fn packed_query(q: &[f32], i: usize, d: usize) -> f32 {
    q[(d / DIMS * QUERIES + i) * QUERY_STRIDE + d % DIMS]
}

/// `Σ_d q[i, d] · k[j, d]` of packed queries and panels.
fn score(t: &Block<'_>, q: &[f32], panels: &[f32], i: usize, j: usize) -> f32 {
    let panel = &panels[j / PANEL * PANEL * t.dim..][..PANEL * t.dim];
    (0..t.dim).map(|d| f64::from(packed_query(q, i, d)) * f64::from(panel[d * PANEL + j % PANEL])).sum::<f64>() as f32
}

fn operand(x: f32, bf16: bool) -> f32 {
    if bf16 { half::bf16::from_f32(x).to_f32() } else { x }
}

/// Adds scores to a running softmax: they become powers, relative to the new maximum.
fn softmax_row(scores: &mut [f32], c: f32, bf16: bool, max: &mut f32, sum: &mut f32, acc: &mut [f32]) {
    let new_max = scores.iter().fold(*max, |m, s| m.max(s * c));
    let shrink = (*max - new_max).exp2();
    for o in acc.iter_mut() {
        *o *= shrink;
    }
    let mut total = f64::from(*sum * shrink);
    for score in scores {
        let p = (*score * c - new_max).exp2();
        total += f64::from(p);
        *score = operand(p, bf16);
    }
    (*max, *sum) = (new_max, total as f32);
}

fn softmax(t: &Block<'_>, st: &mut Softmax<'_>) {
    let width = t.width();
    for i in 0..t.n {
        let (row, seen) = (&mut st.scores[i * KEYS..][..t.keys], t.seen(i));
        row[seen..].fill(0.0);
        if seen > 0 {
            let c = t.scale * std::f32::consts::LOG2_E;
            let acc = &mut st.acc[i * width..][..width];
            softmax_row(&mut row[..seen], c, t.bf16, &mut st.max[i], &mut st.sum[i], acc);
        }
    }
}

/// `out[i, j] = q_i · k_j` of packed queries and panels, where query i sees key j.
fn scores(t: &Block<'_>, q: &[f32], panels: &[f32], out: &mut [f32]) {
    for i in 0..t.n {
        for j in 0..t.seen(i) {
            out[i * KEYS + j] = score(t, q, panels, i, j);
        }
    }
}

fn attend(t: &Block<'_>, v_rows: &[f32], st: &mut Softmax<'_>) {
    t.check();
    let width = t.width();
    scores(t, t.q, t.k_panels, st.scores);
    softmax(t, st);
    for i in 0..t.n {
        for (p, v) in st.scores[i * KEYS..][..t.keys].iter().zip(v_rows.chunks_exact(width)) {
            axpy(*p, v, &mut st.acc[i * width..][..width]);
        }
    }
}

fn slopes(t: &Block<'_>, lse: &[f32], delta: &[f32], p: &mut [f32], ds: &mut [f32]) {
    for i in 0..t.n {
        let rows = p[i * KEYS..][..t.keys].iter_mut().zip(&mut ds[i * KEYS..][..t.keys]);
        for (j, (p, ds)) in rows.enumerate() {
            let power = if j < t.seen(i) { (t.scale * *p - lse[i]).exp() } else { 0.0 };
            let slope = if j < t.seen(i) { power * (*ds - delta[i]) } else { 0.0 };
            (*p, *ds) = (operand(power, t.bf16), operand(slope, t.bf16));
        }
    }
}

fn attend_backward(t: &Block<'_>, u: &Upstream<'_>, g: &mut Gradients<'_>) {
    t.check();
    let width = t.width();
    scores(t, t.q, t.k_panels, g.p);
    scores(t, u.dout, u.v_panels, g.ds);
    slopes(t, u.lse, u.delta, g.p, g.ds);
    for i in 0..t.n {
        for j in 0..t.seen(i) {
            let (p, ds) = (g.p[i * KEYS + j], g.ds[i * KEYS + j]);
            for d in 0..t.dim {
                g.dv[j * width + d] += p * packed_query(u.dout, i, d);
                g.dk[j * width + d] += ds * packed_query(t.q, i, d);
                g.dq[i * width + d] += ds * u.k_rows[j * width + d];
            }
        }
    }
}

fn attend_few(t: &Few<'_>, st: &mut Softmax<'_>) {
    let width = t.dim.next_multiple_of(PAD);
    for (r, &seen) in t.seen.iter().enumerate() {
        let q = &t.q[r * t.dim..][..t.dim];
        let acc = &mut st.acc[r * width..][..width];
        for j in 0..seen.min(t.keys) {
            let rounded =
                |x: &[f32]| x[j * t.stride..][..t.dim].iter().map(|x| operand(*x, t.bf16)).collect::<Vec<_>>();
            let mut row = [dot(q, &rounded(t.k))];
            let c = t.scale * std::f32::consts::LOG2_E;
            softmax_row(&mut row, c, t.bf16, &mut st.max[r], &mut st.sum[r], acc);
            axpy(row[0], &rounded(t.v), &mut acc[..t.dim]);
        }
    }
}

fn nf4_gemv(w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) {
    w.check(x, out);
    let rows = w.rows("nf4_gemv");
    gemv(rows, w.cols, x, out, |at| {
        let byte = w.packed[at / 2];
        let index = if at % 2 == 0 { byte >> 4 } else { byte & 15 };
        w.round.apply(code[usize::from(index)] * w.scales.scale(at / BLOCK))
    });
}

/// `out[j, i] = Σ_p weight(j · cols + p) · x[i, p]`.
fn gemv(rows: usize, cols: usize, x: &[f32], out: &mut [f32], weight: impl Fn(usize) -> f32) {
    let n_x = check_x("gemv", rows, cols, x, out);
    for j in 0..rows {
        for i in 0..n_x {
            let products = (0..cols).map(|p| f64::from(weight(j * cols + p)) * f64::from(x[i * cols + p]));
            out[j * n_x + i] = products.sum::<f64>() as f32;
        }
    }
}

fn nf4_quantize(x: &[f32], thresholds: &[f32; 15], out: &mut [u8]) -> f32 {
    assert_eq!(out.len(), x.len().div_ceil(2), "nf4_quantize: lengths differ");
    // The magnitude bits of floats sort like the floats, with infinity and NaN on top.
    let largest = x.iter().map(|x| x.abs().to_bits()).fold(0, u32::max);
    let absmax = f32::from_bits(largest);
    if largest < INFINITY_BITS {
        let inverse = 1.0 / absmax.max(MIN_ABSMAX);
        let code = |x: f32| thresholds.iter().filter(|&&threshold| x * inverse > threshold).count() as u8;
        for (pair, byte) in x.chunks(2).zip(out) {
            *byte = code(pair[0]) << 4 | code(pair.get(1).copied().unwrap_or(0.0));
        }
    }
    absmax
}
