//! Every table against the reference, every kernel, on lengths around each lane width and tail.

use super::gemm::{GemmTile, PairKernels, PanelA, Rows, TileC};
use super::tiles::TileMut;
use super::{Kernels, available, philox::philox4x32_10, reference, tables};

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

/// Words of random bf16 pairs.
fn pairs(n: usize, seed: u32) -> Vec<f32> {
    let mut words = vec![0.0; n];
    (reference::table().pairs.expect("the reference has pairs").pack_row)(&floats(2 * n, seed), &mut words);
    words
}

/// The element in row `i` and word `p` of an A panel.
fn a_at(tile: &GemmTile, a: &[f32], i: usize, p: usize) -> f32 {
    match tile.panel_a {
        PanelA::Columns => a[p * tile.mr + i],
        PanelA::Rows => a[(p / 16 * tile.mr + i) * 16 + p % 16],
    }
}

fn check_tile(what: &str, tile: &GemmTile, make: impl Fn(usize, u32) -> Vec<f32>, product: impl Fn(f32, f32) -> f64) {
    for depth in [16, 64, 272].into_iter().chain([1, 7, 257].into_iter().filter(|_| tile.panel_a == PanelA::Columns)) {
        let (a, b) = (make(depth * tile.mr, 1), make(depth * tile.nr, 2));
        for (rows, cols) in [(tile.mr, tile.nr), (tile.mr, tile.nr - 1), (1, tile.nr), (tile.mr - 1, 3), (1, 1)] {
            for (alpha, add) in [(1.0, false), (1.0, true), (0.5, true), (-2.0, false)] {
                let stride = tile.nr + 5;
                let old = floats((rows + 3) * stride, 3);
                let mut got = old.clone();
                let c = &mut TileMut::whole(&mut got, stride, rows + 2, cols + 1);
                (tile.run)(&a, &b, TileC { c, i: 2, j: 1, alpha, add });
                let mut want = old.clone();
                for i in 0..rows {
                    for j in 0..cols {
                        let sum: f64 = (0..depth).map(|p| product(a_at(tile, &a, i, p), b[p * tile.nr + j])).sum();
                        let out = &mut want[(i + 2) * stride + j + 1];
                        *out = (f64::from(alpha) * sum + if add { f64::from(*out) } else { 0.0 }) as f32;
                    }
                }
                // f32 sums of up to 544 products; what lies outside the tile is untouched to the bit.
                assert_close(&got, &want, 1e-5, &format!("{what} depth={depth} {rows}x{cols} {alpha} {add}"));
                let inside = |x: usize| (2..rows + 2).contains(&(x / stride)) && (1..=cols).contains(&(x % stride));
                assert!((0..got.len()).all(|x| inside(x) || got[x].to_bits() == old[x].to_bits()), "{what}: outside");
            }
        }
    }
}

#[test]
fn gemm_tiles() {
    let halves = |word: f32| {
        let bits = word.to_bits();
        [f64::from(f32::from_bits(bits << 16)), f64::from(f32::from_bits(bits & 0xFFFF_0000))]
    };
    let mut seen = Vec::new();
    for table in tables() {
        check_tile(table.isa, &table.tile, floats, |a, b| f64::from(a) * f64::from(b));
        if let Some(kernels) = &table.pairs {
            seen.push(table.isa);
            check_tile(&format!("{} pairs", table.isa), &kernels.tile, pairs, |a, b| {
                let ([a0, a1], [b0, b1]) = (halves(a), halves(b));
                a0 * b0 + a1 * b1
            });
        }
    }
    println!("pairs multiplied by: {seen:?}");
}

#[test]
fn packing_is_exact() {
    let twin = reference::table();
    let twin_pairs = twin.pairs.expect("the reference has pairs");
    for table in tables() {
        for (count, depth) in [(1, 1), (3, 40), (8, 8), (12, 100), (16, 16), (17, 33), (32, 5)] {
            let (stride, width, first) = (depth + 3, count + 4, 2);
            let data = floats(count * stride, 20);
            let rows = Rows { data: &data[..(count - 1) * stride + depth], stride, count, depth };
            let (mut got, mut want) = (floats(depth * width, 21), floats(depth * width, 21));
            (table.transpose)(rows, &mut got, width, first);
            (twin.transpose)(rows, &mut want, width, first);
            assert_eq!(got, want, "{} transpose {count} x {depth}", table.isa);
        }
        for n in LENGTHS {
            let halves: Vec<u16> = floats(n, 22).iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            let (mut got, mut want) = (vec![0.0; n], vec![0.0; n]);
            (table.widen)(&halves, &mut got);
            (twin.widen)(&halves, &mut want);
            assert_eq!(got, want, "{} widen {n}", table.isa);
            let Some(kernels) = &table.pairs else { continue };
            let what = format!("{} n={n}", table.isa);
            let bits = |words: &[f32]| words.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
            let (mut low, high) = (floats(n, 23), floats(n, 24));
            low[n / 2] = f32::from_bits(0x3F80_8000); // a tie
            let run = |f: &dyn Fn(&mut [f32]), len| {
                let mut out = vec![0.0; len];
                f(&mut out);
                bits(&out)
            };
            let packed = |k: &PairKernels| run(&|out| (k.pack_row)(&low, out), n.div_ceil(2));
            assert_eq!(packed(kernels), packed(&twin_pairs), "pack_row {what}");
            let joined = |k: &PairKernels| run(&|out| (k.join_rows)(&low, &high, out), n);
            assert_eq!(joined(kernels), joined(&twin_pairs), "join_rows {what}");
            let joined = |k: &PairKernels| run(&|out| (k.join_halves)(&halves, &halves[..n], out), n);
            assert_eq!(joined(kernels), joined(&twin_pairs), "join_halves {what}");
        }
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
        for block in [32, 64, 256] {
            let scales: Vec<f32> = (0..n.div_ceil(block)).map(|i| 0.123 + i as f32).collect();
            for round in [false, true] {
                let (mut got, mut want) = (vec![0.0; n], vec![0.0; n]);
                (table.nf4_blocks)(&packed, &scales, block, &code, round, &mut got);
                (reference.nf4_blocks)(&packed, &scales, block, &code, round, &mut want);
                assert_eq!(got, want, "nf4 {what} {block} {round}");
            }
            if let (Some(pairs), Some(twin)) = (&table.pairs, &reference.pairs) {
                let (mut got, mut want) = (vec![0; n], vec![0; n]);
                (pairs.nf4)(&packed, &scales, block, &code, &mut got);
                (twin.nf4)(&packed, &scales, block, &code, &mut want);
                assert_eq!(got, want, "nf4 halves {what} {block}");
            }
        }
    });
}
