//! Every table against the reference, every kernel, on lengths around each lane width and tail.

use super::gemv::{Nf4Rows, Round};
use super::{Kernels, available, philox::philox4x32_10, reference};

const LENGTHS: [usize; 12] = [1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 100, 1000];

/// `n` floats in [-3, 3), the same for the same seed.
fn floats(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| philox4x32_10([i, 0, 0, 0], [seed, 1])[0] as f32 / 4_294_967_296.0 * 6.0 - 3.0).collect()
}

/// Largest difference over the largest expected magnitude.
fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-6_f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}[{i}]: {g} against {w}");
    }
}

fn each(check: impl Fn(&Kernels, &Kernels, usize, &str)) {
    let reference = reference::table();
    for table in available() {
        for n in LENGTHS {
            check(table, &reference, n, &format!("{} n={n}", table.isa));
        }
    }
}

#[test]
fn gemm_tile() {
    for table in available() {
        for k in [1, 2, 7, 64, 257] {
            let (a, b) = (floats(k * table.mr, 1), floats(k * table.nr, 2));
            let mut got = vec![7.0; table.mr * table.nr];
            (table.gemm_tile)(&a, &b, &mut got);
            let mut want = vec![0.0; got.len()];
            for i in 0..table.mr {
                for j in 0..table.nr {
                    let sum: f64 =
                        (0..k).map(|p| f64::from(a[p * table.mr + i]) * f64::from(b[p * table.nr + j])).sum();
                    want[i * table.nr + j] = sum as f32;
                }
            }
            // f32 sums of up to 257 products.
            assert_close(&got, &want, 1e-5, &format!("{} k={k}", table.isa));
        }
        assert!(table.mr * table.nr <= super::MAX_TILE, "{}: tile larger than MAX_TILE", table.isa);
    }
}

#[test]
fn dot_axpy_max() {
    each(|table, reference, n, what| {
        let (x, y) = (floats(n, 3), floats(n, 4));
        let magnitude: f32 = x.iter().zip(&y).map(|(a, b)| (a * b).abs()).sum();
        let (got, want) = ((table.dot)(&x, &y), (reference.dot)(&x, &y));
        assert!((got - want).abs() <= 1e-6 * magnitude, "dot {what}: {got} against {want}"); // f32, sum reassociated
        let (mut got, mut want) = (y.clone(), y);
        (table.axpy)(0.37, &x, &mut got);
        (reference.axpy)(0.37, &x, &mut want);
        assert_close(&got, &want, 2e-7, what); // one rounding less with FMA
        assert_eq!((table.max_row)(&x), (reference.max_row)(&x), "max {what}");
    });
}

#[test]
fn rms_norm() {
    each(|table, reference, n, what| {
        let (x, w, dy) = (floats(n, 5), floats(n, 6), floats(n, 7));
        let (mut got, mut want) = (vec![0.0; n], vec![0.0; n]);
        let got_rstd = (table.rms_norm_row)(&x, &w, 1e-5, &mut got);
        let rstd = (reference.rms_norm_row)(&x, &w, 1e-5, &mut want);
        assert_close(&[got_rstd], &[rstd], 1e-6, what); // f32, sum reassociated
        assert_close(&got, &want, 2e-6, what);
        let (mut got, mut want) = (floats(n, 8), floats(n, 8));
        (table.rms_norm_row_backward)(&x, &w, rstd, &dy, &mut got);
        (reference.rms_norm_row_backward)(&x, &w, rstd, &dy, &mut want);
        assert_close(&got, &want, 3e-6, what);
    });
}

#[test]
fn swiglu_and_exp() {
    each(|table, reference, n, what| {
        let (g, u, dy) = (floats(n, 9), floats(n, 10), floats(n, 11));
        let (mut got, mut want) = (vec![0.0; n], vec![0.0; n]);
        (table.swiglu_row)(&g, &u, &mut got);
        (reference.swiglu_row)(&g, &u, &mut want);
        assert_close(&got, &want, 1e-6, what); // exp within 2 ulp
        let mut got = (vec![0.0; n], vec![0.0; n]);
        let mut want = got.clone();
        (table.swiglu_row_backward)(&g, &u, &dy, &mut got.0, &mut got.1);
        (reference.swiglu_row_backward)(&g, &u, &dy, &mut want.0, &mut want.1);
        assert_close(&got.0, &want.0, 1e-6, what);
        assert_close(&got.1, &want.1, 1e-6, what);
        let mut got: Vec<f32> = g.iter().map(|v| v * 25.0).collect();
        let mut want = got.clone();
        let (got_sum, want_sum) = ((table.exp_row)(&mut got, 1.0, 2.0), (reference.exp_row)(&mut want, 1.0, 2.0));
        for (g, w) in got.iter().zip(&want) {
            assert!((g - w).abs() <= 4e-7 * w + 1e-37, "exp {what}: {g} against {w}"); // 2 ulp; flushed below 1e-38
        }
        assert!((got_sum - want_sum).abs() <= 2e-6 * want_sum, "exp sum {what}: {got_sum} against {want_sum}");
    });
}

#[test]
fn rope() {
    each(|table, reference, half, what| {
        let (cos, sin) = (floats(half, 12), floats(half, 13));
        let (mut got, mut want) = (floats(2 * half, 14), floats(2 * half, 14));
        (table.rope_row)(&mut got, &cos, &sin);
        (reference.rope_row)(&mut want, &cos, &sin);
        assert_close(&got, &want, 3e-7, what); // one rounding less with FMA
    });
}

#[test]
fn rounding_and_nf4_are_exact() {
    let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 7.5 - 1.0);
    each(|table, reference, n, what| {
        let mut got = floats(n, 15);
        got[0] = f32::NAN;
        got[n / 2] = f32::from_bits(0x3F80_8000); // a tie
        let mut want = got.clone();
        (table.round_bf16)(&mut got);
        (reference.round_bf16)(&mut want);
        for (g, w) in got.iter().zip(&want) {
            assert!(g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan()), "bf16 {what}: {g} against {w}");
        }
        let packed: Vec<u8> = (0..n.div_ceil(2)).map(|i| philox4x32_10([i as u32, 9, 9, 9], [1, 1])[0] as u8).collect();
        let (mut got, mut want) = (vec![0.0; n], vec![0.0; n]);
        (table.nf4_block)(&packed, 0.123, &code, &mut got);
        (reference.nf4_block)(&packed, 0.123, &code, &mut want);
        assert_eq!(got, want, "nf4 {what}");
    });
}

/// Random NF4 rows: packed bytes and scales, the smallest of which makes half-precision denormals.
fn nf4_rows(rows: usize, cols: usize) -> (Vec<u8>, Vec<f32>) {
    let packed = (0..rows * cols / 2).map(|i| philox4x32_10([i as u32, 5, 5, 5], [2, 2])[0] as u8).collect();
    let scales = floats(rows * cols / 64, 21).into_iter().enumerate().map(|(i, s)| s.abs() * [1.0, 0.02, 1e-5][i % 3]);
    (packed, scales.collect())
}

const ROUNDS: [Round; 4] = [Round::F32, Round::Bf16, Round::F16, Round::F16ThenBf16];

#[test]
fn gemv_weights_are_exact() {
    // Against the rows of the identity, every product is one weight: exactly the rounded value.
    let code: [f32; 16] = std::array::from_fn(|i| (i as f32 / 7.5 - 1.0).powi(3) + 0.013);
    let (rows, cols) = (3, 128);
    let (packed, scales) = nf4_rows(rows, cols);
    let reference = reference::table();
    for table in available() {
        for round in ROUNDS {
            let w = Nf4Rows { packed: &packed, scales: &scales, cols, round };
            for p in 0..cols {
                let mut x = vec![0.0; cols];
                x[p] = 1.0;
                let mut ordered = x.clone();
                (table.nf4_order)(&x, &mut ordered);
                let (mut got, mut want) = (vec![7.0; rows], vec![7.0; rows]);
                (table.nf4_gemv)(w, &code, &ordered, &mut got);
                (reference.nf4_gemv)(w, &code, &x, &mut want);
                assert_eq!(got, want, "{} {round:?} column {p}", table.isa);
            }
        }
    }
}

#[test]
fn gemv() {
    let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 7.5 - 1.0);
    let (rows, reference) = (5, reference::table());
    for table in available() {
        for n_x in [1, 2, 3, 4, 5, 7, 8] {
            for cols in [64, 128, 576] {
                let x = floats(n_x * cols, 22);
                let mut ordered = x.clone();
                (table.nf4_order)(&x, &mut ordered);
                let (packed, scales) = nf4_rows(rows, cols);
                let (mut got, mut want) = (vec![7.0; rows * n_x], vec![7.0; rows * n_x]);
                for round in ROUNDS {
                    let w = Nf4Rows { packed: &packed, scales: &scales, cols, round };
                    (table.nf4_gemv)(w, &code, &ordered, &mut got);
                    (reference.nf4_gemv)(w, &code, &x, &mut want);
                    // f32 sums of up to 576 products.
                    assert_close(&got, &want, 2e-6, &format!("{} nf4 {round:?} {cols} x {n_x}", table.isa));
                }
                let w: Vec<i8> = packed.iter().chain(&packed).map(|byte| *byte as i8).collect();
                (table.i8_gemv)(&w, &scales, cols, &x, &mut got);
                (reference.i8_gemv)(&w, &scales, cols, &x, &mut want);
                assert_close(&got, &want, 2e-6, &format!("{} i8 {cols} x {n_x}", table.isa));
            }
            for cols in LENGTHS {
                let (x, w) = (floats(n_x * cols, 23), floats(rows * cols, 24));
                let (mut got, mut want) = (vec![7.0; rows * n_x], vec![7.0; rows * n_x]);
                (table.f32_gemv)(&w, cols, &x, &mut got);
                (reference.f32_gemv)(&w, cols, &x, &mut want);
                assert_close(&got, &want, 4e-6, &format!("{} f32 {cols} x {n_x}", table.isa));
                let w: Vec<half::bf16> = w.iter().map(|w| half::bf16::from_f32(*w)).collect();
                (table.bf16_gemv)(&w, cols, &x, &mut got);
                (reference.bf16_gemv)(&w, cols, &x, &mut want);
                assert_close(&got, &want, 4e-6, &format!("{} bf16 {cols} x {n_x}", table.isa));
            }
        }
    }
}

#[test]
fn a_row_of_x_does_not_see_its_neighbours() {
    let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 7.5 - 1.0);
    let (rows, cols) = (3, 192);
    let (packed, scales) = nf4_rows(rows, cols);
    let x = floats(8 * cols, 25);
    let bf16: Vec<_> = floats(rows * cols, 26).iter().map(|w| half::bf16::from_f32(*w)).collect();
    let w = Nf4Rows { packed: &packed, scales: &scales, cols, round: Round::Bf16 };
    for table in available() {
        let (mut nf4, mut dense) = (vec![0.0; rows * 8], vec![0.0; rows * 8]);
        (table.nf4_gemv)(w, &code, &x, &mut nf4);
        (table.bf16_gemv)(&bf16, cols, &x, &mut dense);
        for i in 0..8 {
            let x = &x[i * cols..(i + 1) * cols];
            let (mut one_nf4, mut one_dense) = (vec![0.0; rows], vec![0.0; rows]);
            (table.nf4_gemv)(w, &code, x, &mut one_nf4);
            (table.bf16_gemv)(&bf16, cols, x, &mut one_dense);
            for j in 0..rows {
                assert_eq!((one_nf4[j], one_dense[j]), (nf4[j * 8 + i], dense[j * 8 + i]), "{} row {i}", table.isa);
            }
        }
    }
}

#[test]
fn nf4_quantize_is_exact() {
    let thresholds: [f32; 15] = std::array::from_fn(|i| (i as f32 - 7.0) / 8.0);
    let reference = reference::table();
    for table in available() {
        for n in [32, 64, 128, 4096] {
            let mut x = floats(n, 27);
            // On thresholds exactly, just above them, and a zero of either sign.
            for (i, threshold) in thresholds.iter().enumerate() {
                x[2 * i] = 3.0 * threshold;
                x[2 * i + 1] = 3.0 * threshold.next_up();
            }
            x[30] = 3.0;
            x[31] = -0.0;
            let cases =
                [x.clone(), vec![0.0; n], x.iter().map(|x| x * 1e-39).collect(), x.iter().map(|x| -x).collect()];
            for (case, x) in cases.iter().enumerate() {
                let (mut got, mut want) = (vec![7; n / 2], vec![7; n / 2]);
                let absmax = (table.nf4_quantize)(x, &thresholds, &mut got);
                assert_eq!(absmax, (reference.nf4_quantize)(x, &thresholds, &mut want), "{} case {case}", table.isa);
                assert_eq!(got, want, "{} n={n} case {case}", table.isa);
            }
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                x[n - 3] = bad;
                assert!(!(table.nf4_quantize)(&x, &thresholds, &mut vec![0; n / 2]).is_finite(), "{} {bad}", table.isa);
            }
        }
    }
}
