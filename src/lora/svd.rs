//! The leading singular triplets of a dense matrix, by subspace iteration from random rows.
//!
//! Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1. A block of some rows more than asked for is multiplied with Wᵀ and
//! W in turn, made orthonormal each time: `W ≈ leftᵀ L right` with L triangular and as small as the block, whose own SVD
//! (one-sided Jacobi, Hestenes 1958) turns both sides into singular vectors. Vectors are rows, so that they are contiguous. The
//! products with W run through the GEMM driver in f32, and nothing depends on the number of threads.

use crate::kernels::Kernels;
use crate::ops::matmul::{Gemm, Into, Operand, gemm};
use crate::ops::{Buf, Ctx, Precision};
use rayon::prelude::*;

/// Singular values and vectors, the largest first.
pub struct Triplets {
    /// `[rank]`.
    pub values: Vec<f64>,
    /// `[rank, rows]`: one left vector a row.
    pub left: Buf,
    /// `[rank, cols]`: one right vector a row.
    pub right: Buf,
}

/// How often the block goes through W and Wᵀ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// Until `|W v - s u|` of every triplet that is asked for is below [`TOLERANCE`] times s, or [`MOST_ROUNDS`].
    Converged,
    /// So many times after the first.
    Exactly(usize),
}

/// What is left of a triplet, `|W v - s u|` relative to s, when it is good enough (`Wᵀ u = s v` holds at any time). A vector is
/// off by about that over the relative distance of its value to those outside the block, a value by the square.
pub const TOLERANCE: f64 = 1e-4;

/// The most rounds there are: a spectrum that is still moving then is flat, and any of its directions as good.
pub const MOST_ROUNDS: usize = 60;

/// The block is at least this much larger than what is asked for, and at least by half.
const MORE: usize = 24;

/// Rows shorter than this, relative to what they were, are nothing but rounding.
const NOTHING: f64 = 1e-6;

/// The `rank` leading triplets of `w: [rows, cols]`, at most as many as its shorter side; `start` gives the elements of the random rows.
///
/// # Panics
/// If `w` is empty or no matrix of `cols` columns, or `rank` is 0 or more than its shorter side.
pub fn leading(
    ctx: &Ctx,
    w: &[f32],
    cols: usize,
    rank: usize,
    rounds: Rounds,
    start: impl Fn(usize) -> f32,
) -> Triplets {
    assert!(cols > 0 && !w.is_empty() && w.len().is_multiple_of(cols), "svd: not a matrix");
    let ctx = &Ctx { precision: Precision::F32, ..ctx.clone() };
    let rows = w.len() / cols;
    let shorter = rows.min(cols);
    assert!((1..=shorter).contains(&rank), "svd: rank {rank} of {rows} x {cols}");
    let block = (rank + (rank / 2).max(MORE)).min(shorter);
    let product = |a: &[f32], k: usize, b: Operand<'_>, n: usize| {
        let mut c = ctx.buf(block * n);
        let a = Operand::rows(a, k);
        gemm(ctx, &Gemm { m: block, n, k, a, b, alpha: 1.0, into: Into::Store }, &mut c);
        c
    };
    let mut right = ctx.buf(block * cols);
    for (i, v) in right.iter_mut().enumerate() {
        // A block as wide as the matrix holds every direction; random rows might all but miss some.
        *v = if block == cols { f32::from(u8::from(i / cols == i % cols)) } else { start(i) };
    }
    let image = |right: &[f32]| product(right, cols, Operand::transposed(w, cols), rows);
    let mut left = image(&right);
    for round in 0.. {
        orthonormalize(ctx.kernels, &mut left, rows);
        right = product(&left, rows, Operand::rows(w, cols), cols);
        let small = Small::of(orthonormalize(ctx.kernels, &mut right, cols), block);
        right = product(&small.right, block, Operand::rows(&right, cols), cols);
        left = product(&small.left, block, Operand::rows(&left, rows), rows);
        let values = &small.values[..rank];
        let last = match rounds {
            Rounds::Exactly(n) => round >= n,
            Rounds::Converged => round >= MOST_ROUNDS,
        };
        // A block as large as the matrix is all of it.
        let next = (!last && block < shorter).then(|| image(&right));
        match next {
            Some(next) if rounds != Rounds::Converged || !have_converged(values, &left, &next, rows) => left = next,
            _ => {
                let (left, right) = (ctx.copy(&left[..rank * rows]), ctx.copy(&right[..rank * cols]));
                return Triplets { values: values.to_vec(), left, right };
            }
        }
    }
    unreachable!("some round is the last")
}

/// Makes the rows of `block: [_, width]` orthonormal, one after the other; returns L, lower triangular, row-major: what
/// they were is L times what they are. A row that is nothing beside those before it becomes zero, as does its column of L.
///
/// Modified Gram-Schmidt, twice: the second pass takes away what rounding left in the first.
fn orthonormalize(kernels: &Kernels, block: &mut [f32], width: usize) -> Vec<f64> {
    let first = gram_schmidt(kernels, block, width);
    let second = gram_schmidt(kernels, block, width);
    let n = block.len() / width;
    let mut product = vec![0.0; n * n];
    for i in 0..n {
        for k in 0..=i {
            for j in 0..=k {
                product[i * n + j] += first[i * n + k] * second[k * n + j];
            }
        }
    }
    product
}

/// One pass of [`orthonormalize`].
fn gram_schmidt(kernels: &Kernels, block: &mut [f32], width: usize) -> Vec<f64> {
    let n = block.len() / width;
    let length = |row: &[f32]| f64::from((kernels.dot)(row, row)).sqrt();
    let least: Vec<f64> = block.chunks_exact(width).map(|row| NOTHING * length(row)).collect();
    let mut triangle = vec![0.0; n * n];
    for (i, least) in least.into_iter().enumerate() {
        let (done, below) = block.split_at_mut((i + 1) * width);
        let row = &mut done[i * width..];
        let norm = length(row);
        if norm <= least {
            row.fill(0.0);
            continue;
        }
        triangle[i * n + i] = norm;
        for v in row.iter_mut() {
            *v = (f64::from(*v) / norm) as f32;
        }
        let row = &*row;
        let column = triangle[(i + 1) * n..].par_chunks_mut(n);
        below.par_chunks_mut(width).zip(column).with_min_len(8).for_each(|(other, coefficients)| {
            let part = (kernels.dot)(row, other);
            (kernels.axpy)(-part, row, other);
            coefficients[i] = f64::from(part);
        });
    }
    triangle
}

/// The SVD of a small square matrix.
struct Small {
    /// Descending.
    values: Vec<f64>,
    /// Left vectors, one a row.
    left: Vec<f32>,
    /// Right vectors, one a row; zero where the value is.
    right: Vec<f32>,
}

impl Small {
    /// Of `g: [n, n]`, row-major: its rows are turned in pairs until all are orthogonal. Their lengths are the values then,
    /// their directions the right vectors, and the turns so far the left ones.
    fn of(mut g: Vec<f64>, n: usize) -> Self {
        const SWEEPS: usize = 30;
        const ORTHOGONAL: f64 = 1e-10;
        let mut turns = vec![0.0; n * n];
        turns.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let squares = |g: &[f64]| g.chunks_exact(n).map(|row| dot(row, row)).collect::<Vec<f64>>();
        for _ in 0..SWEEPS {
            let mut lengths = squares(&g);
            let mut turned = false;
            for p in 0..n {
                for q in p + 1..n {
                    let (a, b, c) = (lengths[p], lengths[q], dot(&g[p * n..][..n], &g[q * n..][..n]));
                    if c.abs() <= ORTHOGONAL * (a * b).sqrt() {
                        continue;
                    }
                    turned = true;
                    let zeta = (b - a) / (2.0 * c);
                    let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                    let cosine = tangent.hypot(1.0).recip();
                    for matrix in [&mut g, &mut turns] {
                        let (upper, lower) = matrix.split_at_mut(q * n);
                        for (x, y) in upper[p * n..][..n].iter_mut().zip(&mut lower[..n]) {
                            (*x, *y) = (cosine * (*x - tangent * *y), cosine * (tangent * *x + *y));
                        }
                    }
                    (lengths[p], lengths[q]) = (a - tangent * c, b + tangent * c);
                }
            }
            if !turned {
                break;
            }
        }
        let values: Vec<f64> = squares(&g).into_iter().map(f64::sqrt).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| values[j].total_cmp(&values[i]).then(i.cmp(&j)));
        let rows = |matrix: &[f64], scale: &dyn Fn(usize) -> f64| {
            order.iter().flat_map(|&i| matrix[i * n..][..n].iter().map(move |v| (v * scale(i)) as f32)).collect()
        };
        let inverse = |i: usize| if values[i] > 0.0 { 1.0 / values[i] } else { 0.0 };
        Self {
            left: rows(&turns, &|_| 1.0),
            right: rows(&g, &inverse),
            values: order.iter().map(|&i| values[i]).collect(),
        }
    }
}

/// Whether `W v`, one a row of `images`, is `s u` for each of the first triplets, but for [`TOLERANCE`].
fn have_converged(values: &[f64], left: &[f32], images: &[f32], rows: usize) -> bool {
    /// Products in f32 are off by some share of the largest value, however small the others.
    const ROUNDING: f64 = 3e-6;
    values.iter().zip(left.chunks_exact(rows)).zip(images.chunks_exact(rows)).all(|((value, left), image)| {
        let off = left.iter().zip(image).map(|(u, wv)| (f64::from(*wv) - value * f64::from(*u)).powi(2)).sum::<f64>();
        off.sqrt() <= (TOLERANCE * value).max(ROUNDING * values[0])
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests; what convergence took is worth reading")]
    use super::*;
    use crate::ops::tape::test_floats as floats;

    fn gaussian(seed: u32) -> impl Fn(usize) -> f32 {
        move |i| super::super::normal(i, 0, [seed, 99])
    }

    /// `left[k] · values[k] · right[k]` added up, `[rows, cols]`.
    fn product(t: &Triplets, rows: usize, cols: usize) -> Vec<f64> {
        let mut out = vec![0.0; rows * cols];
        for (k, value) in t.values.iter().enumerate() {
            for (i, row) in out.chunks_exact_mut(cols).enumerate() {
                let left = value * f64::from(t.left[k * rows + i]);
                row.iter_mut().zip(&t.right[k * cols..]).for_each(|(out, right)| *out += left * f64::from(*right));
            }
        }
        out
    }

    /// `[rows, cols]` with these singular values, their vectors from random rows.
    fn with_values(ctx: &Ctx, rows: usize, cols: usize, values: &[f64]) -> Vec<f32> {
        let side = |width: usize, seed: u32| {
            let mut basis = ctx.buf(values.len() * width);
            basis.copy_from_slice(&floats(values.len() * width, seed));
            orthonormalize(ctx.kernels, &mut basis, width);
            basis
        };
        let made = Triplets { values: values.to_vec(), left: side(rows, 1), right: side(cols, 2) };
        product(&made, rows, cols).into_iter().map(|v| v as f32).collect()
    }

    fn orthonormal(rows: &[f32], width: usize) -> f32 {
        let n = rows.len() / width;
        let mut worst = 0.0_f32;
        for i in 0..n {
            for j in 0..=i {
                let dot: f32 =
                    rows[i * width..][..width].iter().zip(&rows[j * width..][..width]).map(|(a, b)| a * b).sum();
                worst = worst.max((dot - f32::from(u8::from(i == j))).abs());
            }
        }
        worst
    }

    #[test]
    fn known_values_come_back_on_every_instruction_set() {
        for kernels in crate::kernels::available() {
            let ctx = &Ctx { kernels, ..Ctx::new(Precision::Bf16).unwrap() };
            let falling: Vec<f64> = (0..90).map(|k| 10.0 * 0.9_f64.powi(k)).collect();
            let slow: Vec<f64> = (0..90).map(|k| 10.0 / f64::from(k + 1).sqrt()).collect();
            for (rows, cols) in [(90, 130), (130, 90), (200, 200)] {
                for (name, values) in [("falling", &falling), ("slow", &slow)] {
                    let w = with_values(ctx, rows, cols, values);
                    let got = leading(ctx, &w, cols, 8, Rounds::Converged, gaussian(1));
                    for (got, want) in got.values.iter().zip(values) {
                        assert!((got - want).abs() < 3e-5 * want, "{} {name} {rows}x{cols}: {got} {want}", kernels.isa);
                    }
                    assert!(orthonormal(&got.left, rows) < 1e-5 && orthonormal(&got.right, cols) < 1e-5);
                    // What is left has the ninth value as its largest: Eckart & Young 1936.
                    let part = product(&got, rows, cols);
                    let rest: Vec<f32> = w.iter().zip(part).map(|(w, part)| (f64::from(*w) - part) as f32).collect();
                    let next = leading(ctx, &rest, cols, 1, Rounds::Converged, gaussian(2)).values[0];
                    assert!((next - values[8]).abs() < 2e-3 * values[8], "{name}: {next} {}", values[8]);
                }
            }
        }
    }

    #[test]
    fn small_and_deficient_matrices_are_taken_whole() {
        let ctx = &Ctx::new(Precision::F32).unwrap();
        for (rows, cols, rank) in [(5, 9, 5), (9, 5, 5), (1, 7, 1), (7, 1, 1), (30, 20, 3)] {
            let w = floats(rows * cols, 3);
            let got = leading(ctx, &w, cols, rows.min(cols), Rounds::Converged, gaussian(3));
            for (w, part) in w.iter().zip(product(&got, rows, cols)) {
                assert!((f64::from(*w) - part).abs() < 1e-5, "{rows}x{cols}: the whole is not the sum of its parts");
            }
            let some = leading(ctx, &w, cols, rank, Rounds::Exactly(0), gaussian(4));
            for (got, want) in some.values.iter().zip(&got.values) {
                assert!((got - want).abs() < 1e-5 * want.max(0.1), "{rows}x{cols}: {got} {want}");
            }
        }
        let two = with_values(ctx, 60, 40, &[3.0, 2.0]);
        let got = leading(ctx, &two, 40, 4, Rounds::Converged, gaussian(5));
        assert!((got.values[1] - 2.0).abs() < 1e-4 && got.values[2] < 1e-4, "{:?}", got.values);
        let nothing = leading(ctx, &vec![0.0; 60 * 40], 40, 4, Rounds::Converged, gaussian(5));
        assert!(nothing.values.iter().all(|v| *v == 0.0) && nothing.left.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn a_flat_spectrum_converges_and_threads_change_no_bit() {
        let ctx = &Ctx::new(Precision::F32).unwrap();
        let (rows, cols) = (300, 500);
        let w: Vec<f32> = (0..rows * cols).map(gaussian(6)).collect();
        let run = |threads: usize, rounds: Rounds| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| leading(ctx, &w, cols, 16, rounds, gaussian(7)))
        };
        let (one, three) = (run(1, Rounds::Converged), run(3, Rounds::Converged));
        assert!(one.values == three.values && one.left[..] == three.left[..] && one.right[..] == three.right[..]);
        let exact = leading(ctx, &w, cols, rows, Rounds::Exactly(0), gaussian(8));
        let off = |got: &Triplets| {
            got.values.iter().zip(&exact.values).map(|(got, want)| (got - want).abs() / want).fold(0.0, f64::max)
        };
        let (four, converged) = (off(&run(2, Rounds::Exactly(4))), off(&one));
        println!("values of 300 x 500 normal numbers: off by {converged:.1e} converged, {four:.1e} after 4 rounds");
        // Neighbouring values are half a percent apart: the slowest case there is.
        assert!(converged < 1e-4 && converged < four && four < 5e-2, "{converged} {four}");
    }
}
