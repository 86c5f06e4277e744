//! The magnitude of an adapted matrix: its rows are scaled to trained lengths.  DoRA, Liu et al. 2024, equations 5 and 6.
//!
//! `W' = m ⊙ V / n` by rows, with `V = W + s B A` and `n_j = |v_j|`, which the backward takes for a constant (section 4.3
//! there). V is never formed: `n_j² = |w_j|² + b_j · t_j` with `T = s (2 W Aᵀ + s B A Aᵀ)`, whose products are as thin as
//! the adapter, and `n` holds until the trained tensors change. So the layer computes `z = x Vᵀ` as without a magnitude and
//! adds `(m / n - 1) ⊙ z`: where B is zero and m has its first value, that is exactly nothing.

use super::linear::Lora;
use super::matmul::{Gemm, Into, Left, Operand, Shape, Term, gemm, gemm_sum};
use super::{Buf, Ctx, Env, ParamId, ParamStore, Precision, Weight, rows_per_task};
use crate::kernels::tiles::{bounds, split_grid};
use rayon::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// Below this share of `|w_j|²` the sum that gives `n_j²` has lost too many digits, and row j is added up densely.
const CANCELLED: f64 = 0.1;

/// Columns of a task that sums over tokens.
const COLUMNS: usize = 256;

/// A trained magnitude `[out]` over a frozen matrix.
#[derive(Debug)]
pub struct Dora {
    /// `[out]`.
    pub magnitude: ParamId,
    /// `|w_j|²`, `[out]`.
    squared_norms: Vec<f64>,
    /// The factors, and the state of the trained tensors they belong to.
    latest: Mutex<Option<(u64, Arc<Factors>)>>,
}

/// What a layer's outputs are multiplied with, `[out]` each.
#[derive(Debug)]
pub struct Factors {
    /// `m / n`; 1 where n is 0, and z with it.
    ratio: Vec<f32>,
    /// `m / n - 1`.
    excess: Vec<f32>,
    /// `1 / n`; 0 where n is 0.
    inverse_norm: Vec<f32>,
}

impl Dora {
    /// Over a matrix whose rows have these squared lengths ([`squared_norms`]).
    pub fn new(magnitude: ParamId, squared_norms: Vec<f64>) -> Self {
        Self { magnitude, squared_norms, latest: Mutex::new(None) }
    }

    /// Adds a magnitude that changes nothing as yet: the lengths of the rows of `W + s B A`.
    pub fn begin(ctx: &Ctx, params: &mut ParamStore, name: String, weight: &Weight, lora: &Lora) -> Self {
        let squares = squared_norms(ctx, weight);
        let magnitude = norms(ctx, params, weight, lora, &squares);
        Self::new(params.add(name, vec![weight.rows()], magnitude, true), squares)
    }

    /// The factors for the trained tensors as they are now; computed once for each of their states.
    pub fn factors(&self, env: &Env<'_>, weight: &Weight, lora: &Lora) -> Arc<Factors> {
        let state = env.params.state();
        // Not computed under the lock: a thread that waits for a product takes up other work, which may come by here.
        let latest = || self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, factors)) = &*latest()
            && *of == state
        {
            return factors.clone();
        }
        let norms = norms(env.ctx, env.params, weight, lora, &self.squared_norms);
        let factors = Arc::new(Factors::new(env.params.get(self.magnitude), &norms));
        *latest() = Some((state, factors.clone()));
        factors
    }
}

impl Factors {
    fn new(magnitude: &[f32], norms: &[f32]) -> Self {
        let ratio = |(&m, &n): (&f32, &f32)| if n > 0.0 { f64::from(m) / f64::from(n) } else { 1.0 };
        let ratios: Vec<f64> = magnitude.iter().zip(norms).map(ratio).collect();
        Self {
            ratio: ratios.iter().map(|&ratio| ratio as f32).collect(),
            excess: ratios.iter().map(|&ratio| (ratio - 1.0) as f32).collect(),
            inverse_norm: norms.iter().map(|&n| if n > 0.0 { 1.0 / n } else { 0.0 }).collect(),
        }
    }

    /// `y = z + bias` becomes `z + bias + (m/n - 1) ⊙ z`; returns z.  y: `[n_tokens, out]`, bias: `[out]`.
    pub fn scale(&self, ctx: &Ctx, bias: Option<&[f32]>, y: &mut [f32]) -> Buf {
        let (mut z, task) = (ctx.buf(y.len()), self.task());
        y.par_chunks_mut(task).zip(z.par_chunks_mut(task)).for_each(|(y, z)| {
            for (y, z) in y.chunks_exact_mut(self.width()).zip(z.chunks_exact_mut(self.width())) {
                match bias {
                    None => z.copy_from_slice(y),
                    Some(bias) => z.iter_mut().zip(&*y).zip(bias).for_each(|((z, y), bias)| *z = y - bias),
                }
                add_product(&self.excess, z, y);
            }
        });
        z
    }

    /// `y += (m/n - 1) ⊙ z`;  y, z: `[n_tokens, out]`.
    pub fn add_excess(&self, z: &[f32], y: &mut [f32]) {
        let (width, task) = (self.width(), self.task());
        y.par_chunks_mut(task).zip(z.par_chunks(task)).for_each(|(y, z)| {
            y.chunks_exact_mut(width).zip(z.chunks_exact(width)).for_each(|(y, z)| add_product(&self.excess, z, y));
        });
    }

    /// From the gradient of y to that of m, `Σ dy ⊙ z / n`, which is added, and to that of z, `m/n ⊙ dy`, which replaces z.
    ///
    /// dy, z: `[n_tokens, out]`, dm: `[out]`.
    pub fn backward(&self, dy: &[f32], z: &mut [f32], dm: &mut [f32]) {
        let width = self.width();
        let n_tokens = dy.len() / width;
        let cols = bounds(width, COLUMNS);
        split_grid(z, width, &[0, n_tokens], &cols).into_par_iter().zip(dm.par_chunks_mut(COLUMNS)).for_each(
            |(mut tile, dm)| {
                let own = tile.col0..tile.col0 + tile.cols();
                let (ratio, mut sums) = (&self.ratio[own.clone()], [0.0; COLUMNS]);
                for t in 0..n_tokens {
                    let dy = &dy[t * width..][own.clone()];
                    for (((z, dy), ratio), sum) in tile.row(t).iter_mut().zip(dy).zip(ratio).zip(&mut sums) {
                        *sum += dy * *z;
                        *z = ratio * dy;
                    }
                }
                for ((dm, sum), inverse) in dm.iter_mut().zip(sums).zip(&self.inverse_norm[own]) {
                    *dm += sum * inverse;
                }
            },
        );
    }

    /// `y_j += (m/n - 1)_j · (y_j - bias_j)` for outputs from `first` on, in the layout of decoding;  y: `[some out, n_rows]`.
    pub fn scale_columns(&self, bias: Option<&[f32]>, first: usize, n_rows: usize, y: &mut [f32]) {
        for (j, outputs) in y.chunks_exact_mut(n_rows).enumerate() {
            let (excess, bias) = (self.excess[first + j], bias.map_or(0.0, |bias| bias[first + j]));
            for y in outputs {
                *y += excess * (*y - bias);
            }
        }
    }

    fn width(&self) -> usize {
        self.ratio.len()
    }

    /// Elements of a task: whole rows.
    fn task(&self) -> usize {
        rows_per_task(self.width()) * self.width()
    }
}

/// `y += a ⊙ b`.
fn add_product(a: &[f32], b: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y += a * b);
}

/// `|w_j|²` of every row, `[out]`, of the weight as it stands in memory; sums in f64.
pub fn squared_norms(ctx: &Ctx, weight: &Weight) -> Vec<f64> {
    let square = |v: &f32| f64::from(*v) * f64::from(*v);
    let mut out = vec![0.0; weight.rows()];
    out.par_iter_mut().enumerate().for_each_init(
        || vec![0.0; weight.cols()],
        |row, (j, out)| {
            weight.read(ctx.kernels, j * row.len(), row);
            *out = row.iter().map(square).sum();
        },
    );
    out
}

/// `|w_j + s b_j A|`, `[out]`, from `|w_j|²`: as exact in every precision, since operands are not rounded.
fn norms(ctx: &Ctx, params: &ParamStore, weight: &Weight, lora: &Lora, squared_norms: &[f64]) -> Vec<f32> {
    let ctx = &Ctx { precision: Precision::F32, ..ctx.clone() };
    let (rank, inputs, outputs, s) = (lora.rank, weight.cols(), weight.rows(), lora.scale);
    let (a, b) = (params.get(lora.a), params.get(lora.b));
    // tᵀ = 2s (A Wᵀ + (s/2 A Aᵀ) Bᵀ), [rank, out]
    let mut gram = ctx.buf(rank * rank);
    let rows = Operand::rows(a, inputs);
    let product = Gemm { m: rank, n: rank, k: inputs, a: rows, b: rows.swap(), alpha: 0.5 * s, into: Into::Store };
    gemm(ctx, &product, &mut gram);
    let mut t = ctx.buf(rank * outputs);
    let terms = [
        Term::new(inputs, Left::Plain(rows), Operand::WeightT(weight, 0)),
        Term::new(rank, Left::Plain(Operand::rows(&gram, rank)), Operand::transposed(b, rank)),
    ];
    gemm_sum(ctx, Shape { m: rank, n: outputs, alpha: 2.0 * s, into: Into::Store }, &terms, &mut t);
    let norm = |(j, (b, &square)): (usize, (&[f32], &f64))| {
        let added: f64 = b.iter().enumerate().map(|(r, b)| f64::from(*b) * f64::from(t[r * outputs + j])).sum();
        let sum = square + added;
        if sum > CANCELLED * square { sum.sqrt() } else { dense_norm(ctx, weight, a, b, s, j) }
    };
    b.par_chunks_exact(rank).zip(squared_norms).enumerate().map(|row| norm(row) as f32).collect()
}

/// `|w_j + s b_j A|` element by element;  a: `[rank, in]`, b: row j of B.
fn dense_norm(ctx: &Ctx, weight: &Weight, a: &[f32], b: &[f32], s: f32, j: usize) -> f64 {
    let mut row = vec![0.0; weight.cols()];
    weight.read(ctx.kernels, j * row.len(), &mut row);
    let mut sums: Vec<f64> = row.into_iter().map(f64::from).collect();
    for (a, b) in a.chunks_exact(sums.len()).zip(b) {
        let factor = f64::from(s) * f64::from(*b);
        sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * f64::from(*a));
    }
    sums.iter().map(|v| v * v).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::Tokens;
    use crate::ops::linear::{Bias, Linear, Matrix};
    use crate::ops::tape::test_floats as floats;
    use crate::quant::{FloatKind, Nf4Tensor};
    use half::bf16;

    const S: f32 = 1.5;

    /// A layer with a magnitude at its first value, A as given and B zero.
    fn layer(ctx: &Ctx, weight: Weight, a: &[f32], bias: Bias, params: &mut ParamStore) -> Linear {
        let (outputs, inputs) = (weight.rows(), weight.cols());
        let rank = a.len() / inputs;
        let a = params.add("a".into(), vec![rank, inputs], a.to_vec(), true);
        let b = params.add("b".into(), vec![outputs, rank], vec![0.0; outputs * rank], true);
        let mut lora = Lora { a, b, rank, scale: S, dropout: 0.25, module: 1, dora: None, taken: None };
        lora.dora = Some(Arc::new(Dora::begin(ctx, params, "m".into(), &weight, &lora)));
        Linear { inputs, outputs, matrix: Matrix::Frozen(weight), bias, lora: Some(lora) }
    }

    fn factors(ctx: &Ctx, linear: &Linear, params: &ParamStore) -> Arc<Factors> {
        linear.factors(&Env::new(ctx, params, &Tokens::default())).unwrap()
    }

    #[test]
    fn norms_are_those_of_the_dense_matrix_also_where_the_update_cancels_a_row() {
        for kernels in crate::kernels::available() {
            for (outputs, inputs, rank) in [(9, 50, 3), (300, 96, 8)] {
                let ctx = &Ctx { kernels, ..Ctx::new(Precision::Bf16).unwrap() };
                let (a, b) = (floats(rank * inputs, 1), floats(outputs * rank, 2));
                let update = |j: usize, k: usize| {
                    let sum: f64 = (0..rank).map(|r| f64::from(b[j * rank + r]) * f64::from(a[r * inputs + k])).sum();
                    sum * f64::from(S)
                };
                let mut w = floats(outputs * inputs, 3);
                // Row 1 is all but the negative of its update, row 2 nothing.
                for k in 0..inputs {
                    w[inputs + k] = (-0.9999 * update(1, k)) as f32;
                    w[2 * inputs + k] = 0.0;
                }
                let halves = w.iter().map(|v| bf16::from_f32(*v)).collect();
                let nf4 = Nf4Tensor::quantize(&w, &[outputs, inputs], FloatKind::Bf16, 64, true).unwrap();
                for (name, weight) in [
                    ("f32", Weight::f32(w, outputs, inputs).unwrap()),
                    ("bf16", Weight::bf16(halves, outputs, inputs).unwrap()),
                    ("nf4", Weight::nf4(nf4).unwrap()),
                ] {
                    let mut plain = vec![0.0; outputs * inputs];
                    weight.read(kernels, 0, &mut plain);
                    let mut params = ParamStore::default();
                    let linear = layer(ctx, weight, &a, Bias::None, &mut params);
                    params.set(linear.lora.as_ref().unwrap().b, &b).unwrap();
                    let got = factors(ctx, &linear, &params);
                    for (j, (row, inverse)) in plain.chunks_exact(inputs).zip(&got.inverse_norm).enumerate() {
                        let v = row.iter().enumerate().map(|(k, w)| (f64::from(*w) + update(j, k)).powi(2));
                        let want = v.sum::<f64>().sqrt();
                        // 1e-5: products in f32, of which nine tenths may cancel before the row is added up densely.
                        let error = (1.0 / f64::from(*inverse) - want).abs() / want;
                        assert!(error < 1e-5, "{} {name} {outputs}x{inputs} row {j}: {error}", kernels.isa);
                    }
                }
            }
        }
    }

    #[test]
    fn factors_follow_the_trained_tensors_and_a_zero_row_stays_finite() {
        let ctx = &Ctx::new(Precision::F32).unwrap();
        let mut params = ParamStore::default();
        let mut w = floats(5 * 16, 4);
        w[16..32].fill(0.0);
        let linear = layer(ctx, Weight::f32(w, 5, 16).unwrap(), &floats(2 * 16, 5), Bias::None, &mut params);
        let lora = linear.lora.as_ref().unwrap();
        let first = factors(ctx, &linear, &params);
        assert_eq!((&first.ratio[..], &first.excess[..]), (&[1.0; 5][..], &[0.0; 5][..]));
        assert!(Arc::ptr_eq(&first, &factors(ctx, &linear, &params)), "computed once");
        params.set(lora.b, &floats(5 * 2, 6)).unwrap();
        let moved = factors(ctx, &linear, &params);
        assert!(moved.excess.iter().all(|e| *e != 0.0 && e.is_finite()), "{moved:?}");
        assert_eq!(moved.ratio[1], 0.0, "the row that was zero has no length yet");
        let magnitude = lora.dora.as_ref().unwrap().magnitude;
        let halved: Vec<f32> = params.get(magnitude).iter().map(|m| m / 2.0).collect();
        params.set(magnitude, &halved).unwrap();
        let half = factors(ctx, &linear, &params);
        assert_eq!(half.ratio, moved.ratio.iter().map(|ratio| ratio / 2.0).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_forward_is_that_of_the_base_to_the_bit() {
        for precision in [Precision::F32, Precision::Bf16] {
            let ctx = &Ctx::new(precision).unwrap();
            for n in [1, 3, 40] {
                let (x, bias) = (floats(n * 64, 7), floats(130, 8));
                let mut params = ParamStore::default();
                let weight = Nf4Tensor::quantize(&floats(130 * 64, 9), &[130, 64], FloatKind::F32, 64, false).unwrap();
                let (weight, bias) = (Weight::nf4(weight).unwrap(), Bias::Frozen(bias));
                let mut linear = layer(ctx, weight, &floats(4 * 64, 10), bias, &mut params);
                let sequence = vec![0; n];
                let tokens = Tokens::from_sequences([&sequence[..]]);
                let env = Env::new(ctx, &params, &tokens);
                let dropping = Env { dropout: Some(crate::ops::DropoutKey { seed: 1, step: 1 }), ..env };
                let (got, dropped) = (linear.forward(&env, &x).0, linear.forward(&dropping, &x).0);
                linear.lora = None;
                let want = linear.forward(&env, &x).0;
                assert!(got[..] == want[..] && dropped[..] == want[..], "{precision:?}, {n} tokens");
            }
        }
    }
}
