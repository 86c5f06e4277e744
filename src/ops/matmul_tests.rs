//! Every operand form, precision and table against a product in f64.

#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::ops::tape::test_floats as floats;

/// The slow twin, in f64.
fn naive(m: usize, n: usize, k: usize, a: impl Fn(usize, usize) -> f32, b: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    let sum = |i, j| (0..k).map(|p| f64::from(a(i, p)) * f64::from(b(p, j))).sum::<f64>() as f32;
    (0..m * n).map(|ij| sum(ij / n, ij % n)).collect()
}

fn close(got: &[f32], want: &[f32], what: &str) {
    // f32 sums of up to 600 products; those of 16-bit blocks are rounded before.
    let tolerance = if what.contains("Int16") { 2e-4 } else { 2e-6 };
    let scale = want.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}[{i}]: {g} against {w}");
    }
}

/// Random values that f32 and bf16 both represent, so that one slow twin serves both.
fn values(n: usize, seed: u32) -> Vec<f32> {
    floats(n, seed).iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect()
}

/// Every table in every precision.
fn contexts() -> impl Iterator<Item = (Ctx, String)> {
    crate::kernels::tables().into_iter().flat_map(|kernels| {
        Precision::ALL.map(|precision| {
            let ctx = Ctx { kernels, ..Ctx::new(precision).unwrap() };
            (ctx, format!("{} {precision:?}", kernels.isa))
        })
    })
}

#[test]
fn every_operand_form_and_shape_equals_the_slow_twin() {
    for (ctx, what) in contexts() {
        for (m, n, k) in [
            (1, 1, 1),
            (3, 5, 7),
            (4, 300, 64),
            (13, 17, 300),
            (50, 200, 33),
            (130, 20, 600),
            (2000, 3, 5),
            (40, 900, 530),
            // More rows than one task takes, in more than one block of columns.
            (1300, 800, 9),
        ] {
            let what = format!("{what} {m}x{n}x{k}");
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let want = naive(m, n, k, |i, p| a[i * k + p], |p, j| b[p * n + j]);
            let run = |a: Operand<'_>, b: Operand<'_>| {
                let mut c = vec![9.0; m * n];
                gemm(&ctx, &Gemm { m, n, k, a, b, alpha: 1.0, into: Into::Store }, &mut c);
                c
            };
            close(&run(Operand::rows(&a, k), Operand::rows(&b, n)), &want, &what);
            let at: Vec<f32> = (0..m * k).map(|x| a[(x % m) * k + x / m]).collect();
            let bt: Vec<f32> = (0..n * k).map(|x| b[(x % k) * n + x / k]).collect();
            close(&run(Operand::transposed(&at, m), Operand::transposed(&bt, k)), &want, &what);
            // A weight from its third row on, in each storage that holds the values exactly.
            let behind = |rows: &[f32], width: usize| [&values(2 * width, 3), rows].concat();
            let halves = |v: &[f32]| v.iter().map(|v| half::bf16::from_f32(*v)).collect::<Vec<_>>();
            let whole = behind(&b, n);
            for frozen in
                [Weight::f32(whole.clone(), k + 2, n).unwrap(), Weight::bf16(halves(&whole), k + 2, n).unwrap()]
            {
                close(&run(Operand::rows(&a, k), Operand::Weight(&frozen, 2)), &want, &what);
            }
            let whole = behind(&bt, k);
            for frozen in
                [Weight::f32(whole.clone(), n + 2, k).unwrap(), Weight::bf16(halves(&whole), n + 2, k).unwrap()]
            {
                close(&run(Operand::rows(&a, k), Operand::WeightT(&frozen, 2)), &want, &what);
            }
            let mut c = want.clone();
            let g = Gemm { m, n, k, a: Operand::rows(&a, k), b: Operand::rows(&b, n), alpha: 1.0, into: Into::Add };
            gemm(&ctx, &g, &mut c);
            close(&c, &want.iter().map(|v| 2.0 * v).collect::<Vec<_>>(), &what);
        }
    }
}

#[test]
fn quantized_weights_are_those_that_dequantize_gives() {
    // Rows of 100: blocks of 64 run across them, and k and n are no multiples of anything.
    quantized_weights(9, 201, 100, 64);
    // Rows of whole blocks, more than a block of k of them; blocks that are two of 64.
    quantized_weights(9, 201, 128, 64);
    quantized_weights(7, 600, 1088, 64);
    quantized_weights(9, 70, 256, 128);
}

fn quantized_weights(m: usize, rows: usize, cols: usize, block_size: usize) {
    use crate::quant::{FloatKind, Nf4Tensor, RowwiseInt8};
    let (w, x) = (floats(rows * cols, 7), values(m * rows.max(cols), 8));
    for (ctx, what) in contexts() {
        let mut cases = Vec::new();
        for kind in [FloatKind::F32, FloatKind::F16, FloatKind::Bf16] {
            for double_quant in [false, true] {
                let tensor = Nf4Tensor::quantize(&w, &[rows, cols], kind, block_size, double_quant).unwrap();
                let dense = tensor.dequantize();
                cases.push((
                    format!("{what} {kind:?} {double_quant} {rows} x {cols}"),
                    Weight::nf4(tensor).unwrap(),
                    dense,
                ));
            }
        }
        let read = |start: usize, out: &mut [f32]| {
            out.copy_from_slice(&w[start..start + out.len()]);
            Ok(())
        };
        let matrix = RowwiseInt8::quantize_from(rows, cols, read).unwrap();
        let weight = |i: usize| f32::from(matrix.codes[i]) * matrix.absmax[i / cols] / 127.0;
        let dense = (0..rows * cols).map(weight).collect();
        cases.push((format!("{what} int8"), Weight::int8(matrix), dense));
        for (what, frozen, dense) in cases {
            let rounded = |v: f32| match ctx.precision {
                Precision::F32 | Precision::Int16 => v,
                Precision::Bf16 => half::bf16::from_f32(v).to_f32(),
            };
            let dense: Vec<f32> = dense.into_iter().map(rounded).collect();
            let run = |k: usize, n: usize, b: Operand<'_>| {
                let mut c = vec![0.0; m * n];
                let a = Operand::rows(&x[..m * k], k);
                gemm(&ctx, &Gemm { m, n, k, a, b, alpha: 1.0, into: Into::Store }, &mut c);
                c
            };
            let want = naive(m, rows, cols, |i, p| x[i * cols + p], |p, j| dense[j * cols + p]);
            close(&run(cols, rows, Operand::WeightT(&frozen, 0)), &want, &what);
            let want = naive(m, cols, rows, |i, p| x[i * rows + p], |p, j| dense[p * cols + j]);
            close(&run(rows, cols, Operand::Weight(&frozen, 0)), &want, &what);
        }
    }
}

#[test]
fn a_sum_of_products_is_one_pass_with_masks_and_packed_operands() {
    for (ctx, what) in contexts() {
        let (m, n, k1, k2) = (70, 900, 65, 16);
        let (a1, b1, a2, b2) = (values(m * k1, 1), values(k1 * n, 2), values(m * k2, 3), values(k2 * n, 4));
        let first = naive(m, n, k1, |i, p| a1[i * k1 + p], |p, j| b1[p * n + j]);
        let second = naive(m, n, k2, |i, p| a2[i * k2 + p], |p, j| b2[p * n + j]);
        let keeps = |row: usize, col: usize| !(row * 31 + col).is_multiple_of(3);
        let mask = |row: usize, first: usize, values: &mut [f32]| {
            for (i, value) in values.iter_mut().enumerate() {
                *value = if keeps(row, first + i) { *value } else { 0.0 };
            }
        };
        let packed = PackedA::new(&ctx, Operand::rows(&a1, k1), m, k1);
        let old = values(m * n, 5);
        for into in [Into::Store, Into::Add] {
            let terms = [
                Term::new(k1, Left::Packed(&packed), Operand::rows(&b1, n)),
                Term { mask: Some(&mask), ..Term::new(k2, Left::Plain(Operand::rows(&a2, k2)), Operand::rows(&b2, n)) },
            ];
            let mut c = old.clone();
            gemm_sum(&ctx, Shape { m, n, alpha: 0.5, into }, &terms, &mut c);
            let want: Vec<f32> = (0..m * n)
                .map(|x| {
                    let masked = if keeps(x / n, x % n) { second[x] } else { 0.0 };
                    0.5 * (first[x] + masked) + if into == Into::Add { old[x] } else { 0.0 }
                })
                .collect();
            close(&c, &want, &what);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for (ctx, what) in contexts() {
        let (m, n, k) = (300, 1000, 700);
        let (a, b) = (values(m * k, 1), values(k * n, 2));
        let g = Gemm { m, n, k, a: Operand::rows(&a, k), b: Operand::rows(&b, n), alpha: 1.0, into: Into::Store };
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = vec![0.0; m * n];
            pool.install(|| gemm(&ctx, &g, &mut c));
            c
        };
        let one = run(1);
        assert!([2, 3, 5].iter().all(|&threads| run(threads) == one), "{what}");
    }
}

#[test]
fn a_gated_product_is_that_of_its_two_halves_to_the_bit() {
    for (ctx, what) in contexts() {
        // Panels that are not full; the second k is a low rank. Narrow and wide: both ways to cut C.
        for (m, n, k, rank) in [(7, 20, 33, 3), (37, 1000, 530, 16)] {
            let (x, low) = (values(m * k, 1), values(m * rank, 2));
            let (weights, ups) = ([values(n * k, 3), values(n * k, 4)], [values(n * rank, 5), values(n * rank, 6)]);
            let packed = PackedA::new(&ctx, Operand::rows(&x, k), m, k);
            let terms = [0, 1].map(|i| {
                let own = Term::new(k, Left::Packed(&packed), Operand::transposed(&weights[i], k));
                let up = Operand::transposed(&ups[i], rank);
                [own, Term::new(rank, Left::Plain(Operand::rows(&low, rank)), up)]
            });
            let [gate, up] = [0, 1].map(|i| {
                let mut c = vec![0.0; m * n];
                gemm_sum(&ctx, Shape { m, n, alpha: 1.0, into: Into::Store }, &terms[i], &mut c);
                c
            });
            let want = crate::ops::swiglu::forward(&ctx, &gate, &up);
            let mut got = vec![9.0; m * n];
            gemm_gated(&ctx, [m, n], [&terms[0], &terms[1]], &mut got);
            assert!(got == want[..], "{what} {m} x {n}");
        }
    }
}
