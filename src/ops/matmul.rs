//! The one GEMM driver: packs operands into panels, dequantizing as it goes, and multiplies tile by tile.
//!
//! `C[m, n] (+)= alpha · A[m, k] · B[k, n]` after Goto & van de Geijn 2008: A is packed once into panels `[k, mr]`; each task
//! packs a `KC x NC` block of B into panels `[k, nr]` that stay in the second-level cache and multiplies it with all of A.
//! The sum over k runs block after block and, within a block, in order, for every element alike: the result does not
//! depend on the number of threads or on how C is cut. Few rows against a frozen weight take the dot-product path instead.

use super::weight::{Precision, Weight};
use super::{Buf, Ctx};
use crate::kernels::tiles::{TileMut, bounds, split_grid};
use crate::kernels::{Kernels, MAX_TILE};
use rayon::prelude::*;
use std::cell::RefCell;

/// Depth of a packed block.
const KC: usize = 256;
/// Columns of C that one task takes.
const NC: usize = 192;
/// Up to this many columns, B is packed once for all tasks and the tasks share the rows.
const THIN: usize = 768;
/// Rows of A that are packed at a time: bounds the packed copy.
const MC: usize = 1920;
/// Up to this many rows, `X · Wᵀ` is a row of dot products straight from the weight's storage.
const FEW_ROWS: usize = 4;

/// A GEMM operand.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// `element(i, j) = data[i · row_stride + j · col_stride]`.
    Dense {
        /// The elements.
        data: &'a [f32],
        /// Distance between rows.
        row_stride: usize,
        /// Distance between columns.
        col_stride: usize,
    },
    /// A weight `W: [out, in]` as it is: the operand is `[out, in]`.
    Weight(&'a Weight),
    /// A weight `W: [out, in]` transposed: the operand is `[in, out]`.
    WeightT(&'a Weight),
}

impl<'a> Operand<'a> {
    /// A row-major matrix with `width` columns.
    pub fn rows(data: &'a [f32], width: usize) -> Self {
        Self::Dense { data, row_stride: width, col_stride: 1 }
    }

    /// The transpose of a row-major matrix with `width` columns.
    pub fn transposed(data: &'a [f32], width: usize) -> Self {
        Self::Dense { data, row_stride: 1, col_stride: width }
    }
}

/// What happens to the old content of C.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// It is replaced.
    Store,
    /// It is added to.
    Add,
}

/// `C (+)= alpha · A · B`;  A: `[m, k]`, B: `[k, n]`, C: `[m, n]` row-major.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Left operand.
    pub a: Operand<'a>,
    /// Right operand.
    pub b: Operand<'a>,
    /// Factor of the product.
    pub alpha: f32,
    /// Replace or add.
    pub into: Into,
}

thread_local! {
    /// A thread's packed block of B and one unpacked row.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { panel: Vec::new(), row: Vec::new() }) };
}

/// Scratch of one task.
#[derive(Default)]
struct Scratch {
    panel: Vec<f32>,
    row: Vec<f32>,
}

/// Runs a GEMM on all threads.
///
/// # Panics
/// If `c` is not `[m, n]`.
pub fn gemm(ctx: &Ctx, g: &Gemm<'_>, c: &mut [f32]) {
    assert_eq!(c.len(), g.m * g.n, "gemm: C is not [m, n]");
    if g.into == Into::Store {
        c.fill(0.0);
    }
    if g.m == 0 || g.n == 0 || g.k == 0 {
        return;
    }
    if let (true, Operand::WeightT(weight), Operand::Dense { data, row_stride, col_stride: 1 }) =
        (g.m <= FEW_ROWS, g.b, g.a)
    {
        few_rows(ctx, g, weight, data, row_stride, c);
        return;
    }
    let shared = (g.n <= THIN).then(|| pack_all_b(ctx, g));
    for m0 in (0..g.m).step_by(MC) {
        let rows = MC.min(g.m - m0);
        let packed = pack_a(ctx, g, m0, rows);
        let c_band = &mut c[m0 * g.n..(m0 + rows) * g.n];
        let (row_step, col_step) = if shared.is_some() { (8 * ctx.kernels.mr, g.n) } else { (rows, NC) };
        let tiles = split_grid(c_band, g.n, &bounds(rows, row_step), &bounds(g.n, col_step));
        tiles.into_par_iter().for_each(|tile| {
            SCRATCH.with_borrow_mut(|scratch| multiply(ctx, g, (&packed, rows), shared.as_deref(), tile, scratch));
        });
    }
}

/// All of B as `[k block][panel of nr columns][depth][nr]`, for products whose tiles all need it.
fn pack_all_b(ctx: &Ctx, g: &Gemm<'_>) -> Buf {
    let nr = ctx.kernels.nr;
    let width = g.n.div_ceil(nr) * nr;
    let mut packed = ctx.buf(width * g.k);
    packed.par_chunks_mut(KC * width).enumerate().for_each(|(block, out)| {
        let ks = block * KC..g.k.min((block + 1) * KC);
        let depth = ks.len();
        out.par_chunks_mut(depth * nr).enumerate().for_each(|(panel, out)| {
            SCRATCH.with_borrow_mut(|scratch| {
                pack_b(ctx, g, ks.clone(), panel * nr..g.n.min((panel + 1) * nr), scratch);
                out.copy_from_slice(&scratch.panel);
            });
        });
    });
    packed
}

/// All of k for one tile of C, whose `row0` counts from the packed band's first row.
fn multiply(
    ctx: &Ctx,
    g: &Gemm<'_>,
    (packed, band_rows): (&[f32], usize),
    shared_b: Option<&[f32]>,
    mut tile: TileMut<'_>,
    scratch: &mut Scratch,
) {
    let Kernels { mr, nr, gemm_tile, axpy, .. } = *ctx.kernels;
    let panels_of_a = band_rows.div_ceil(mr);
    let (rows, cols, row0, col0) = (tile.rows(), tile.cols(), tile.row0, tile.col0);
    let mut out = [0.0; MAX_TILE];
    let out = &mut out[..mr * nr];
    for (block, k0) in (0..g.k).step_by(KC).enumerate() {
        let depth = KC.min(g.k - k0);
        let panels_of_b = cols.div_ceil(nr);
        let b_block = if let Some(shared) = shared_b {
            &shared[block * KC * panels_of_b * nr..][..panels_of_b * nr * depth]
        } else {
            pack_b(ctx, g, k0..k0 + depth, col0..col0 + cols, scratch);
            &scratch.panel[..]
        };
        let a_block = &packed[block * KC * panels_of_a * mr..];
        for (j, b_panel) in b_block.chunks_exact(depth * nr).enumerate() {
            let width = nr.min(cols - j * nr);
            for i in (0..rows).step_by(mr) {
                let a_panel = &a_block[(row0 + i) * depth..][..depth * mr];
                gemm_tile(a_panel, b_panel, out);
                for r in 0..mr.min(rows - i) {
                    axpy(g.alpha, &out[r * nr..][..width], &mut tile.row(i + r)[j * nr..][..width]);
                }
            }
        }
    }
}

/// Rows `m0 .. m0 + rows` of A as `[k block][panel of mr rows][depth][mr]`, the last panel padded with zeros.
fn pack_a(ctx: &Ctx, g: &Gemm<'_>, m0: usize, rows: usize) -> Buf {
    let mr = ctx.kernels.mr;
    let panels = rows.div_ceil(mr);
    let mut packed = ctx.buf(panels * mr * g.k);
    packed.par_chunks_mut(KC * panels * mr).enumerate().for_each(|(block, out)| {
        let k0 = block * KC;
        let depth = KC.min(g.k - k0);
        out.par_chunks_mut(depth * mr).enumerate().for_each(|(panel, out)| {
            let first = panel * mr;
            pack_panel(&g.a, m0 + first, mr.min(rows - first), k0, out, mr);
            if ctx.precision == Precision::Bf16 {
                (ctx.kernels.round_bf16)(out);
            }
        });
    });
    packed
}

/// `out[p, i] = A[i0 + i, k0 + p]` for `count` rows of a dense A; `out: [depth, width]`, the other columns zero.
fn pack_panel(a: &Operand<'_>, i0: usize, count: usize, k0: usize, out: &mut [f32], width: usize) {
    let Operand::Dense { data, row_stride, col_stride } = *a else { panic!("gemm: the left operand is dense") };
    if count < width {
        out.fill(0.0);
    }
    if row_stride == 1 {
        for (p, out) in out.chunks_exact_mut(width).enumerate() {
            let base = i0 + (k0 + p) * col_stride;
            out[..count].copy_from_slice(&data[base..base + count]);
        }
        return;
    }
    assert_eq!(col_stride, 1, "gemm: one stride of a dense operand is 1");
    let depth = out.len() / width;
    let row = |i: usize| &data[(i0 + i) * row_stride + k0..][..depth];
    interleave(count, row, out, width, 0);
}

/// `out[p, first + i] = row(i)[p]`, four rows at a time, so that a line of `out` is written four elements at once.
fn interleave<'a>(count: usize, row: impl Fn(usize) -> &'a [f32], out: &mut [f32], width: usize, first: usize) {
    for i in (0..count - count % 4).step_by(4) {
        let (a, b, c, d) = (row(i), row(i + 1), row(i + 2), row(i + 3));
        for ((((out, a), b), c), d) in out.chunks_exact_mut(width).zip(a).zip(b).zip(c).zip(d) {
            out[first + i..first + i + 4].copy_from_slice(&[*a, *b, *c, *d]);
        }
    }
    for i in count - count % 4..count {
        for (out, value) in out.chunks_exact_mut(width).zip(row(i)) {
            out[first + i] = *value;
        }
    }
}

/// Fills `scratch.panel` with `B[ks, js]` as `[panel of nr columns][depth][nr]`, the last panel padded with zeros.
fn pack_b(ctx: &Ctx, g: &Gemm<'_>, ks: std::ops::Range<usize>, js: std::ops::Range<usize>, scratch: &mut Scratch) {
    let nr = ctx.kernels.nr;
    let (depth, cols) = (ks.len(), js.len());
    let panels = cols.div_ceil(nr);
    let Scratch { panel, row } = scratch;
    panel.resize(panels * depth * nr, 0.0);
    if cols % nr != 0 {
        panel[(panels - 1) * depth * nr..].fill(0.0);
    }
    let bf16 = ctx.precision == Precision::Bf16;
    match g.b {
        Operand::Dense { data, row_stride, col_stride } => {
            let transposed = Operand::Dense { data, row_stride: col_stride, col_stride: row_stride };
            for (j, out) in panel.chunks_exact_mut(depth * nr).enumerate() {
                pack_panel(&transposed, js.start + j * nr, nr.min(cols - j * nr), ks.start, out, nr);
            }
            if bf16 {
                (ctx.kernels.round_bf16)(panel);
            }
        }
        Operand::Weight(weight) => {
            row.resize(cols, 0.0);
            for (p, k) in ks.enumerate() {
                weight.read(ctx.kernels, k * weight.cols() + js.start, row);
                if bf16 {
                    (ctx.kernels.round_bf16)(row);
                }
                for (j, part) in row.chunks(nr).enumerate() {
                    panel[j * depth * nr + p * nr..][..part.len()].copy_from_slice(part);
                }
            }
        }
        Operand::WeightT(weight) => {
            row.resize(4 * depth, 0.0);
            for (j, out) in panel.chunks_exact_mut(depth * nr).enumerate() {
                let width = nr.min(cols - j * nr);
                for i0 in (0..width).step_by(4) {
                    let count = 4.min(width - i0);
                    for (i, row) in row.chunks_exact_mut(depth).take(count).enumerate() {
                        weight.read(ctx.kernels, (js.start + j * nr + i0 + i) * weight.cols() + ks.start, row);
                    }
                    if bf16 {
                        (ctx.kernels.round_bf16)(&mut row[..count * depth]);
                    }
                    interleave(count, |i| &row[i * depth..][..depth], out, nr, i0);
                }
            }
        }
    }
}

/// `C (+)= alpha · X · Wᵀ` for few rows: every weight row is read once and dotted with each row of X.
fn few_rows(ctx: &Ctx, g: &Gemm<'_>, weight: &Weight, x: &[f32], x_stride: usize, c: &mut [f32]) {
    let bf16 = ctx.precision == Precision::Bf16;
    let mut rows = ctx.buf(g.m * g.k);
    for (i, row) in rows.chunks_exact_mut(g.k).enumerate() {
        row.copy_from_slice(&x[i * x_stride..][..g.k]);
    }
    if bf16 {
        (ctx.kernels.round_bf16)(&mut rows);
    }
    let step = (65_536 / g.k).clamp(1, 64);
    split_grid(c, g.n, &[0, g.m], &bounds(g.n, step)).into_par_iter().for_each(|mut tile| {
        SCRATCH.with_borrow_mut(|scratch| {
            let w = &mut scratch.row;
            w.resize(g.k, 0.0);
            for j in 0..tile.cols() {
                weight.read(ctx.kernels, (tile.col0 + j) * g.k, w);
                if bf16 {
                    (ctx.kernels.round_bf16)(w);
                }
                for (i, x) in rows.chunks_exact(g.k).enumerate() {
                    tile.row(i)[j] += g.alpha * (ctx.kernels.dot)(x, w);
                }
            }
        });
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::tape::test_floats as floats;

    /// The slow twin, in f64.
    fn naive(
        m: usize,
        n: usize,
        k: usize,
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f32> {
        let sum = |i, j| (0..k).map(|p| f64::from(a(i, p)) * f64::from(b(p, j))).sum::<f64>() as f32;
        (0..m * n).map(|ij| sum(ij / n, ij % n)).collect()
    }

    fn close(got: &[f32], want: &[f32], what: &str) {
        let scale = want.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            // f32 sums of up to 600 products.
            assert!((g - w).abs() <= 2e-6 * scale, "{what}[{i}]: {g} against {w}");
        }
    }

    #[test]
    fn every_operand_form_and_shape_equals_the_slow_twin() {
        for kernels in crate::kernels::available() {
            let ctx = Ctx { kernels, ..Ctx::new(Precision::F32).unwrap() };
            for (m, n, k) in
                [(1, 1, 1), (3, 5, 7), (4, 300, 64), (13, 17, 300), (50, 200, 33), (130, 20, 600), (2000, 3, 5)]
            {
                let what = format!("{} {m}x{n}x{k}", kernels.isa);
                let (a, b) = (floats(m * k, 1), floats(k * n, 2));
                let want = naive(m, n, k, |i, p| a[i * k + p], |p, j| b[p * n + j]);
                let run = |a, b| {
                    let mut c = vec![9.0; m * n];
                    gemm(&ctx, &Gemm { m, n, k, a, b, alpha: 1.0, into: Into::Store }, &mut c);
                    c
                };
                close(&run(Operand::rows(&a, k), Operand::rows(&b, n)), &want, &what);
                let at: Vec<f32> = (0..m * k).map(|x| a[(x % m) * k + x / m]).collect();
                let bt: Vec<f32> = (0..n * k).map(|x| b[(x % k) * n + x / k]).collect();
                close(&run(Operand::transposed(&at, m), Operand::transposed(&bt, k)), &want, &what);
                let frozen = Weight::f32(b.clone(), k, n).unwrap();
                close(&run(Operand::rows(&a, k), Operand::Weight(&frozen)), &want, &what);
                let frozen = Weight::f32(bt.clone(), n, k).unwrap();
                close(&run(Operand::rows(&a, k), Operand::WeightT(&frozen)), &want, &what);
                let mut c = want.clone();
                let g = Gemm { m, n, k, a: Operand::rows(&a, k), b: Operand::rows(&b, n), alpha: 1.0, into: Into::Add };
                gemm(&ctx, &g, &mut c);
                close(&c, &want.iter().map(|v| 2.0 * v).collect::<Vec<_>>(), &what);
            }
        }
    }
}
