//! Every table against the reference, every kernel, on lengths around each lane width and tail.

use super::attention::{
    Block, FEW_KEYS, Few, Gradients, KEYS, PAD, QUERIES, Softmax, Upstream, pack_panels, pack_queries, pack_rows,
    queries_len,
};
use super::elementwise::{AdamStep, Mask, Masked};
use super::gemm::{GemmTile, PairKernels, PanelA, Rows, TileC};
use super::gemv::{NestedScales, Nf4Rows, Round, Scales};
use super::int16::{self, Int16Kernels, Nf4Column};
use super::int16_gemv::{Codes16, Int16Gemv, Layout};
use super::integer::{Codes, Integer, IntegerTile, Order, STEPS};
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

/// The element in row `i` and word `p` of A panels.
fn a_at(tile: &GemmTile, a: &[f32], depth: usize, i: usize, p: usize) -> f32 {
    let (a, i) = (&a[i / tile.mr * tile.mr * depth..], i % tile.mr);
    match tile.panel_a {
        PanelA::Columns => a[p * tile.mr + i],
        PanelA::Rows => a[(p / 16 * tile.mr + i) * 16 + p % 16],
    }
}

fn check_tile(what: &str, tile: &GemmTile, make: impl Fn(usize, u32) -> Vec<f32>, product: impl Fn(f32, f32) -> f64) {
    for depth in [16, 64, 272].into_iter().chain([1, 7, 257].into_iter().filter(|_| tile.panel_a == PanelA::Columns)) {
        let b = make(depth * tile.nr, 2);
        let (mr, nr) = (tile.mr, tile.nr);
        for (rows, cols) in [(mr, nr), (mr, nr - 1), (1, nr), (mr - 1, 3), (1, 1), (2 * mr + 1, nr), (3 * mr, 5)] {
            let a = make(depth * rows.next_multiple_of(mr), 1);
            for (alpha, add) in [(1.0, false), (1.0, true), (0.5, true), (-2.0, false)] {
                let stride = tile.nr + 5;
                let old = floats((rows + 3) * stride, 3);
                let mut got = old.clone();
                let c = &mut TileMut::whole(&mut got, stride, rows + 2, cols + 1);
                (tile.run)(&a, &b, TileC { c, i: 2, j: 1, alpha, add, ahead: &[] });
                let mut want = old.clone();
                for i in 0..rows {
                    for j in 0..cols {
                        let sum: f64 =
                            (0..depth).map(|p| product(a_at(tile, &a, depth, i, p), b[p * tile.nr + j])).sum();
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
    assert!(seen.contains(&"scalar"), "pairs were multiplied by {seen:?} only");
}

/// Rows of `k` numbers as panels of `width` columns.
fn int16_panels(kernels: &Int16Kernels, x: &[f32], k: usize, width: usize) -> Vec<f32> {
    let (depth, mut panels) = (int16::depth(k), Vec::new());
    for rows in x.chunks(k * width) {
        let mut panel = vec![0.0; depth * width];
        for (r, row) in rows.chunks(k).enumerate() {
            let mut words = vec![0.0; depth];
            (kernels.pack_row)(row, &mut words);
            words.iter().enumerate().for_each(|(p, word)| panel[p * width + r] = *word);
        }
        panels.extend(panel);
    }
    panels
}

#[test]
fn products_of_16_bit_blocks() {
    let reference = reference::table().int16;
    // The largest sums there are: whatever overflows on the way shows.
    let extreme = |n: usize, _| (0..n).map(|i| if i % 3 == 0 { 3.0 } else { -3.0 }).collect::<Vec<f32>>();
    let same = |n: usize, _| vec![-3.0; n];
    for table in tables() {
        let tile = &table.int16.tile;
        let (mr, nr) = (tile.mr, tile.nr);
        for k in [1, 2, 16, 63, 64, 65, 130, 512] {
            for (rows, cols) in [(mr, nr), (mr, nr - 1), (1, nr), (mr - 1, 3), (1, 1), (2 * mr + 1, nr), (3 * mr, 5)] {
                for make in [floats, extreme, same] {
                    let (x, w) = (make(rows * k, 41), make(cols * k, 42));
                    let (a, b) = (int16_panels(&reference, &x, k, mr), int16_panels(&reference, &w, k, nr));
                    for (alpha, add) in [(1.0, false), (1.0, true), (0.5, true), (-2.0, false)] {
                        let what = format!("{} k={k} {rows}x{cols} {alpha} {add}", table.isa);
                        let stride = nr + 5;
                        let old = floats((rows + 3) * stride, 3);
                        let mut got = old.clone();
                        let c = &mut TileMut::whole(&mut got, stride, rows + 2, cols + 1);
                        (tile.run)(&a, &b, TileC { c, i: 2, j: 1, alpha, add, ahead: &[] });
                        let sum = |i: usize, j: usize| -> (f64, f64) {
                            let product = |p: usize| f64::from(x[i * k + p]) * f64::from(w[j * k + p]);
                            let sizes = (0..k).map(|p| f64::from(x[i * k + p].abs() + w[j * k + p].abs()));
                            ((0..k).map(product).sum(), sizes.sum())
                        };
                        for at in 0..got.len() {
                            let (i, j) = ((at / stride).wrapping_sub(2), (at % stride).wrapping_sub(1));
                            if i >= rows || j >= cols {
                                assert_eq!(got[at].to_bits(), old[at].to_bits(), "{what}: outside");
                                continue;
                            }
                            let (sum, size) = sum(i, j);
                            let before = if add { f64::from(old[at]) } else { 0.0 };
                            let error = (f64::from(got[at]) - f64::from(alpha) * sum - before).abs();
                            // x and w are off by half a step of at most 3 / 5792 each, products by that times the other.
                            let bound = f64::from(alpha).abs() * 0.51 * 3.0 / 5792.0 * size;
                            assert!(error <= bound + 1e-6 * (size + 1.0), "{what} [{i}, {j}]: off by {error}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn packing_16_bit_blocks_is_exact() {
    let bits = |words: &[f32]| words.iter().map(|word| word.to_bits()).collect::<Vec<_>>();
    let reference = reference::table().int16;
    for table in tables() {
        for n in LENGTHS.into_iter().chain([63, 65, 128, 300]) {
            let mut x = floats(n, 43);
            x.iter_mut().step_by(5).for_each(|x| *x *= 1e-3);
            if n > 128 {
                x[..64].fill(0.0);
                x[64..100].iter_mut().for_each(|x| *x = 1e-43); // denormal
                x[100..128].fill(0.0);
            }
            let packed = |kernels: &Int16Kernels| {
                let mut out = vec![9.0; int16::depth(n)];
                (kernels.pack_row)(&x, &mut out);
                bits(&out)
            };
            assert_eq!(packed(&table.int16), packed(&reference), "{} pack_row {n}", table.isa);
        }
        for (count, depth) in [(1, 1), (2, 16), (3, 40), (7, 8), (64, 33), (63, 192), (64, 5)] {
            let stride = depth + 3;
            let mut data = floats(count * stride, 44);
            data.iter_mut().skip(2).step_by(stride).for_each(|x| *x = 0.0);
            let rows = Rows { data: &data, stride, count, depth };
            for width in [depth, depth + 7] {
                let joined = |kernels: &Int16Kernels| {
                    let mut out = vec![9.0; int16::depth(count) * width];
                    (kernels.join_rows)(&rows, &mut out, width);
                    bits(&out)
                };
                let what = format!("{} join_rows {count} x {depth} in {width}", table.isa);
                assert_eq!(joined(&table.int16), joined(&reference), "{what}");
                let halves: Vec<u16> = data.iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
                let rows = Rows { data: &halves, stride, count, depth };
                let joined = |kernels: &Int16Kernels| {
                    let mut out = vec![9.0; int16::depth(count) * width];
                    (kernels.join_halves)(&rows, &mut out, width);
                    bits(&out)
                };
                assert_eq!(joined(&table.int16), joined(&reference), "{what} halves");
            }
        }
        for n in [1, 16, 63, 64, 200] {
            let halves: Vec<u16> = floats(n, 47).iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
            let packed = |kernels: &Int16Kernels| {
                let mut out = vec![9.0; int16::depth(n)];
                (kernels.pack_halves)(&halves, &mut out);
                bits(&out)
            };
            assert_eq!(packed(&table.int16), packed(&reference), "{} pack_halves {n}", table.isa);
        }
    }
}

#[test]
fn nf4_to_16_bit_blocks_is_exact() {
    let bits = |words: &[f32]| words.iter().map(|word| word.to_bits()).collect::<Vec<_>>();
    // Not the real ones, but as they are: ascending from -1 to 1.
    let code = std::array::from_fn(|i| (i as f32 - 7.5) / 7.5);
    let reference = reference::table().int16;
    let (cols, n_rows) = (192, 64);
    let (packed, mut scales) = nf4_rows(n_rows, cols);
    scales[5] = 0.0;
    scales[7] *= 1e-40;
    scales[9] *= 1e3;
    for table in tables() {
        for round in [false, true] {
            let run = |kernels: &Int16Kernels| {
                let mut out = vec![9.0; scales.len() * int16::BLOCK_WORDS];
                (kernels.nf4_row)(&packed, &scales, &code, round, &mut out);
                bits(&out)
            };
            assert_eq!(run(&table.int16), run(&reference), "{} nf4_row {round}", table.isa);
            for (rows, width) in [(1, 16), (2, 32), (63, 64), (64, 16), (64, 32), (7, 32)] {
                let scales: Vec<f32> = (0..rows).map(|r| scales[r * cols / 64 + 1]).collect();
                let of = |packed| Nf4Column { packed, stride: cols / 2, scales: &scales, code: &code, round };
                let panel = int16::depth(rows) * width + 32;
                let run = |kernels: &Int16Kernels| {
                    let mut out = vec![9.0; 64 / width * panel];
                    (kernels.nf4_join)(of(&packed[32..]), &mut out, width, panel);
                    bits(&out)
                };
                assert_eq!(run(&table.int16), run(&reference), "{} nf4_join {rows} {width} {round}", table.isa);
            }
        }
    }
}

#[test]
fn what_is_no_number_is_not_lost_in_16_bits() {
    for table in tables() {
        let kernels = &table.int16;
        let (mr, nr) = (kernels.tile.mr, kernels.tile.nr);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let (mut x, w) = (floats(128, 45), floats(128 * nr, 46));
            x[70] = bad;
            let mut c = vec![0.0; nr];
            let (a, b) = (int16_panels(kernels, &x, 128, mr), int16_panels(kernels, &w, 128, nr));
            let tile = &mut TileMut::whole(&mut c, nr, 1, nr);
            (kernels.tile.run)(&a, &b, TileC { c: tile, i: 0, j: 0, alpha: 1.0, add: false, ahead: &[] });
            assert!(c.iter().all(|c| c.is_nan()), "{} {bad}: {c:?}", table.isa);
            // The same number down a column.
            let mut words = vec![0.0; int16::depth(64) * 2];
            let rows = Rows { data: &x[64..], stride: 1, count: 64, depth: 1 };
            (kernels.join_rows)(&rows, &mut words, 2);
            assert!(!words[(int16::BLOCK_WORDS - 1) * 2].is_finite(), "{} {bad}", table.isa);
            let (code, mut row) = ([0.5; 16], [0.0; int16::BLOCK_WORDS]);
            (kernels.nf4_row)(&[0x5A; 32], &[bad], &code, false, &mut row);
            assert!(row[int16::BLOCK_WORDS - 1].is_nan(), "{} {bad}", table.isa);
        }
    }
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
            let what = format!("{} {count} x {depth}", table.isa);
            for (width, first) in [(width, first), (count, 0), (count + 20, 0)] {
                let old = floats(depth * width, 21);
                let (mut got, mut want) = (old.clone(), old.clone());
                (table.transpose)(&rows, &mut got, width, first);
                (twin.transpose)(&rows, &mut want, width, first);
                let behind = |x: usize| x % width >= first + count && got[x] == 0.0;
                assert!((0..got.len()).all(|x| got[x] == want[x] || behind(x)), "transpose {what} in {width}");
                assert!(got[..first].iter().eq(&old[..first]), "transpose {what} in {width}: before the first column");
            }
            for width in [depth, depth + 3] {
                let (mut got, mut want) = (floats(count * width, 21), floats(count * width, 21));
                (table.copy_rows)(&rows, &mut got, width);
                (twin.copy_rows)(&rows, &mut want, width);
                assert_eq!(got, want, "copy_rows {what} in {width}");
                let (nr, height) = (32, count + 3);
                let sums = floats(depth.div_ceil(nr) * height * nr, 25);
                for (alpha, add) in [(1.0, true), (0.5, false)] {
                    let store = |k: &Kernels| {
                        let mut c = floats(count * width, 21);
                        let tile = &mut TileMut::whole(&mut c, width, count, depth);
                        (k.store_sums)(&sums, nr, TileC { c: tile, i: 0, j: 0, alpha, add, ahead: &[] });
                        c
                    };
                    assert_eq!(store(table), store(&twin), "store_sums {what} in {width}");
                }
            }
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
            let lines = |k: &PairKernels| run(&|out| (k.pack_lines)(&low, out, 48), n.div_ceil(32) * 48);
            assert_eq!(lines(kernels), lines(&twin_pairs), "pack_lines {what}");
            let (both, count) = ([&low[..], &high].concat(), 3.min(2 * n));
            let (stride, depth) = (2 * n / count, 2 * n / count);
            for width in [depth, depth + 5] {
                let rows = Rows { data: &both, stride, count, depth };
                let joined = |k: &PairKernels| run(&|out| (k.join_rows)(&rows, out, width), 2 * width);
                assert_eq!(joined(kernels), joined(&twin_pairs), "join_rows {what}");
                let data: Vec<u16> = (0..count * depth).map(|i| halves[i % halves.len()]).collect();
                let rows = Rows { data: &data, stride, count, depth };
                let joined = |k: &PairKernels| run(&|out| (k.join_halves)(&rows, out, width), 2 * width);
                assert_eq!(joined(kernels), joined(&twin_pairs), "join_halves {what}");
            }
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
        for sign in [1.0, -1.0] {
            let (mut got, mut want) = (floats(6 * half, 14), floats(6 * half, 14));
            (table.rope_row)(&mut got, &cos, &sin, sign);
            (reference.rope_row)(&mut want, &cos, &sin, sign);
            assert_close(&got, &want, 3e-7, what); // one rounding less with FMA
        }
    });
}

#[test]
fn gain_of_a_norm() {
    each(|table, reference, n, what| {
        let (x, dy) = (floats(n, 30), floats(n, 31));
        let (mut got, mut want) = (floats(n, 32), floats(n, 32));
        (table.rms_norm_gain)(&x, 0.7, &dy, &mut got);
        (reference.rms_norm_gain)(&x, 0.7, &dy, &mut want);
        assert_close(&got, &want, 3e-7, what); // one rounding less with FMA
    });
}

#[test]
fn dropout_masks_are_the_scalar_generators_to_the_bit() {
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    each(|table, _, n, what| {
        let x = floats(n, 33);
        for (first, threshold) in [(0, 0), (0, 1 << 30), (8, 3 << 30), (0x7FFF_FFF0, u32::MAX)] {
            let mask = Mask { key: [3407, 17], counter: [u32::MAX, 5, 9], first, threshold, scale: 1.25 };
            let word =
                |i: usize| philox4x32_10([(first as usize / 4 + i / 4) as u32, u32::MAX, 5, 9], [3407, 17])[i % 4];
            let want: Vec<f32> = (0..n).map(|i| if word(i) >= threshold { x[i] * 1.25 } else { 0.0 }).collect();
            let (mut copied, mut in_place, mut added) = (vec![9.0; n], x.clone(), vec![1.0; n]);
            (table.dropout_row)(&mask, Masked::Copy(&x), &mut copied);
            (table.dropout_row)(&mask, Masked::InPlace, &mut in_place);
            (table.dropout_row)(&mask, Masked::Add(&x), &mut added);
            assert_eq!(bits(&copied), bits(&want), "copy {what}");
            assert_eq!(bits(&in_place), bits(&want), "in place {what}");
            let sums: Vec<f32> = want.iter().map(|v| 1.0 + v).collect();
            assert_eq!(bits(&added), bits(&sums), "add {what}");
        }
    });
}

#[test]
fn adamw_gives_the_bits_of_the_formula() {
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let step = AdamStep {
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        eps: 1e-8,
        correction2_sqrt: 0.044,
        step_size: -2e-3,
        keep: 0.9999,
        grad_scale: 0.37,
    };
    each(|table, _, n, what| {
        let start = || [floats(n, 34), floats(n, 35), floats(n, 36).iter().map(|v| v.abs()).collect()];
        let (g, [mut p, mut m, mut v], mut want) = (floats(n, 37), start(), start());
        (table.adamw_row)(&step, &mut p, &g, &mut m, &mut v);
        for i in 0..n {
            let (first, second) = (want[1][i], want[2][i]);
            (want[1][i], want[2][i]) = step.update(&mut want[0][i], first, second, g[i]);
        }
        for (got, want) in [p, m, v].iter().zip(&want) {
            assert_eq!(bits(got), bits(want), "{what}");
        }
    });
}

#[test]
fn a_nan_stays_a_nan() {
    each(|table, _, n, what| {
        let mut x = floats(n, 38);
        x[n / 2] = f32::NAN;
        let ones = vec![1.0; n];
        let mut y = vec![0.0; n];
        (table.swiglu_row)(&x, &ones, &mut y);
        assert!(y[n / 2].is_nan(), "swiglu {what}");
        assert!((table.exp_row)(&mut x, 1.0, 0.0).is_nan() && x[n / 2].is_nan(), "exp {what}");
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

#[test]
fn rows_of_8_bits_are_exact() {
    each(|table, reference, n, what| {
        let codes: Vec<i8> = (0..n).map(|i| (i * 53 % 255) as i8).collect();
        let (mut got, mut want) = (vec![7.0; n], vec![0.0; n]);
        (table.int8_row)(&codes, 0.0123, &mut got);
        (reference.int8_row)(&codes, 0.0123, &mut want);
        assert_eq!(got, want, "{what}");
        if let (Some(pairs), Some(twin)) = (&table.pairs, &reference.pairs) {
            let (mut got, mut want) = (vec![7; n], vec![0; n]);
            (pairs.int8)(&codes, 0.0123, &mut got);
            (twin.int8)(&codes, 0.0123, &mut want);
            assert_eq!(got, want, "halves {what}");
        }
    });
}

/// What one table makes of two blocks of keys: accumulators, sums, maxima and the gradients of the second block.
fn attention_run(table: &Kernels, dim: usize, n: usize, (first, second): (usize, usize), bf16: bool) -> [Vec<f32>; 6] {
    let (panel, width, keys) = (table.attention.panel, dim.next_multiple_of(PAD), first + second);
    let rounded = |mut x: Vec<f32>| {
        if bf16 {
            (reference::table().round_bf16)(&mut x);
        }
        x
    };
    let (q, dout) = (rounded(floats(n * dim, 20)), rounded(floats(n * dim, 21)));
    let (k, v) = (rounded(floats(keys * dim, 22)), rounded(floats(keys * dim, 23)));
    let queries = |x: &[f32]| {
        let mut out = vec![f32::NAN; queries_len(dim)];
        pack_queries(x, dim, n, dim, &mut out);
        out
    };
    let panels = |x: &[f32]| {
        let count = x.len() / dim;
        let mut out = vec![f32::NAN; count.next_multiple_of(panel) * dim];
        pack_panels(x, dim, count, dim, panel, &mut out);
        out
    };
    let rows = |x: &[f32]| {
        let mut out = vec![f32::NAN; x.len() / dim * width];
        pack_rows(x, dim, x.len() / dim, dim, width, &mut out);
        out
    };
    let (packed_q, packed_dout) = (queries(&q), queries(&dout));
    let (mut acc, mut max, mut sum) = (vec![0.0; n * width], vec![f32::NEG_INFINITY; n], vec![0.0; n]);
    let mut scores = vec![f32::NAN; QUERIES * KEYS];
    let scale = 1.0 / (dim as f32).sqrt();
    // The last query sees the last key, as in a sequence with a cache.
    let ahead = keys as isize - n as isize;
    let block = |range: std::ops::Range<usize>| Block {
        q: &packed_q,
        k_panels: &[],
        n,
        keys: range.len(),
        dim,
        ahead: ahead - range.start as isize,
        scale,
        bf16,
    };
    for range in [0..first, first..keys] {
        let part = range.start * dim..range.end * dim;
        let mut state = Softmax { scores: &mut scores, acc: &mut acc, max: &mut max, sum: &mut sum };
        let k_panels = panels(&k[part.clone()]);
        let block = Block { k_panels: &k_panels, ..block(range) };
        (table.attention.forward)(&block, &rows(&v[part]), &mut state);
    }
    let lse: Vec<f32> = max.iter().zip(&sum).map(|(m, s)| (m + s.log2()) * std::f32::consts::LN_2).collect();
    let (mut dq, mut dk, mut dv) = (vec![0.5; n * width], vec![0.25; second * width], vec![0.0; second * width]);
    let (mut p, mut ds) = (vec![f32::NAN; QUERIES * KEYS], vec![f32::NAN; QUERIES * KEYS]);
    let (k_panels, v_panels) = (panels(&k[first * dim..]), panels(&v[first * dim..]));
    let (k_rows, delta) = (rows(&k[first * dim..]), floats(n, 24));
    let upstream = Upstream { dout: &packed_dout, v_panels: &v_panels, k_rows: &k_rows, lse: &lse, delta: &delta };
    let mut gradients = Gradients { p: &mut p, ds: &mut ds, dq: &mut dq, dk: &mut dk, dv: &mut dv };
    let block = Block { k_panels: &k_panels, ..block(first..keys) };
    (table.attention.backward)(&block, &upstream, &mut gradients);
    [acc, sum, max, dq, dk, dv]
}

#[test]
fn attention_tiles() {
    let reference = reference::table();
    for (dim, n, first, second) in [
        (16, 1, 5, 1),
        (20, 7, 48, 7),
        (40, 48, 192, 49),
        (64, 48, 192, 192),
        (64, 31, 192, 17),
        (128, 13, 100, 33),
        (300, 47, 64, 47),
    ] {
        for bf16 in [false, true] {
            let want = attention_run(&reference, dim, n, (first, second), bf16);
            for table in available() {
                let got = attention_run(table, dim, n, (first, second), bf16);
                for (name, (got, want)) in ["acc", "sum", "max", "dq", "dk", "dv"].iter().zip(got.iter().zip(&want)) {
                    // f32: sums of up to 300 products, reassociated. bf16: a p at a midpoint may go either way.
                    let tolerance = if bf16 { 1e-3 } else { 2e-5 };
                    assert_close(got, want, tolerance, &format!("{} {name} dim={dim} n={n} bf16={bf16}", table.isa));
                }
            }
        }
    }
}

#[test]
fn attention_of_few_queries() {
    for table in available() {
        for (dim, rows, keys) in [(1, 1, 1), (20, 3, 65), (64, 4, 200), (64, 16, 64), (100, 7, 130)] {
            for bf16 in [false, true] {
                let stride = dim + 3;
                let (q, k, v) = (floats(rows * dim, 25), floats(keys * stride, 26), floats(keys * stride, 27));
                let seen: Vec<usize> = (0..rows).map(|r| keys.saturating_sub(rows - 1 - r)).collect();
                let few = Few { q: &q, k: &k, v: &v, stride, keys, dim, seen: &seen, scale: 0.3, bf16 };
                let run = |table: &Kernels| {
                    let mut acc = vec![0.0; rows * dim.next_multiple_of(PAD)];
                    let (mut max, mut sum) = (vec![f32::NEG_INFINITY; rows], vec![0.0; rows]);
                    let mut scores = vec![f32::NAN; rows * FEW_KEYS];
                    let mut state = Softmax { scores: &mut scores, acc: &mut acc, max: &mut max, sum: &mut sum };
                    (table.attention.few)(&few, &mut state);
                    [acc, max, sum]
                };
                for (got, want) in run(table).iter().zip(run(&reference::table())) {
                    // bf16: the running maximum differs, and with it what p is rounded to.
                    let tolerance = if bf16 { 1e-2 } else { 1e-5 };
                    assert_close(got, &want, tolerance, &format!("{} dim={dim} rows={rows} bf16={bf16}", table.isa));
                }
            }
        }
    }
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
            let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols, round };
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
            for cols in [64, 128, 576, 640] {
                let x = floats(n_x * cols, 22);
                let mut ordered = x.clone();
                (table.nf4_order)(&x, &mut ordered);
                let (packed, scales) = nf4_rows(rows, cols);
                let (mut got, mut want) = (vec![7.0; rows * n_x], vec![7.0; rows * n_x]);
                for round in ROUNDS {
                    let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols, round };
                    (table.nf4_gemv)(w, &code, &ordered, &mut got);
                    (reference.nf4_gemv)(w, &code, &x, &mut want);
                    // f32 sums of up to 576 products.
                    assert_close(&got, &want, 2e-6, &format!("{} nf4 {round:?} {cols} x {n_x}", table.isa));
                }
                if let Some(pairs) = table.nf4_pairs {
                    let mut rounded = x.clone();
                    (table.round_bf16)(&mut rounded);
                    let mut words = vec![0.0; x.len() / 2];
                    (pairs.order)(&rounded, &mut words);
                    for round in [Round::Bf16, Round::F16ThenBf16] {
                        let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols, round };
                        (pairs.gemv)(w, &code, &words, &mut got);
                        (reference.nf4_gemv)(w, &code, &rounded, &mut want);
                        assert_close(&got, &want, 2e-6, &format!("{} pairs {round:?} {cols} x {n_x}", table.isa));
                    }
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
                let w: Vec<u16> = w.iter().map(|w| half::bf16::from_f32(*w).to_bits()).collect();
                (table.bf16_gemv)(&w, cols, &x, &mut got);
                (reference.bf16_gemv)(&w, cols, &x, &mut want);
                assert_close(&got, &want, 4e-6, &format!("{} bf16 {cols} x {n_x}", table.isa));
            }
        }
    }
}

/// Rows of x in 8 bits: words, scales, starts.
type Encoded = (Vec<f32>, Vec<f32>, Vec<f32>);

fn codes_of((words, scales, starts): &Encoded, cols: usize) -> Codes<'_> {
    Codes { words, scales, starts, cols }
}

/// Rows of x as `integer` encodes them.
fn encoded(integer: &Integer, x: &[f32], order: Order) -> Encoded {
    let (mut words, mut scales, mut starts) =
        (vec![0.0; x.len() / 4], vec![0.0; x.len() / 64], vec![0.0; x.len() / 64]);
    (integer.encode)(x, order, &mut words, &mut scales, &mut starts);
    (words, scales, starts)
}

#[test]
fn codes_are_exact() {
    let reference = reference::table().integer;
    let mut x = floats(64 * 9, 31);
    x[64..128].fill(0.0);
    x[128..192].iter_mut().for_each(|x| *x *= 1e-43); // denormal
    x[200] = 1e30;
    for table in available() {
        for order in [Order::Plain, Order::EvenOdd] {
            let (words, scales, starts) = encoded(&table.integer, &x, order);
            let (want, want_scales, _) = encoded(&reference, &x, order);
            let bits = |words: &[f32]| words.iter().map(|word| word.to_bits()).collect::<Vec<_>>();
            assert_eq!((bits(&words), scales), (bits(&want), want_scales), "{} {order:?}", table.isa);
            // Raised by 0 or by 128, the sum starts at what that adds.
            for (start, words) in starts.iter().zip(words.chunks_exact(16)) {
                let codes = words.iter().flat_map(|word| word.to_bits().to_le_bytes());
                let sum: i32 = codes.map(|code| i32::from(code as i8)).sum();
                let start = start.to_bits() as i32;
                assert!(start == 0 || start == -128 * sum, "{} {start} {sum}", table.isa);
            }
        }
    }
}

#[test]
fn what_is_no_number_is_not_lost_in_8_bits() {
    for table in available() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let mut x = floats(128, 34);
            x[70] = bad;
            let encoded = encoded(&table.integer, &x, Order::EvenOdd);
            let (packed, scales) = nf4_rows(2, 128);
            let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols: 128, round: Round::F32 };
            let mut out = [0.0; 2];
            (table.integer.nf4_gemv)(w, codes_of(&encoded, 128), &mut out);
            assert!(out.iter().all(|out| !out.is_finite()), "{} {bad}: {out:?}", table.isa);
        }
    }
}

#[test]
fn a_number_comes_back_within_half_a_step() {
    let integer = reference::table().integer;
    let x = floats(64 * 5, 32);
    let (words, scales, _) = encoded(&integer, &x, Order::Plain);
    for (i, x) in x.iter().enumerate() {
        let code = words[i / 4].to_bits().to_le_bytes()[i % 4] as i8;
        assert!((f32::from(code) * scales[i / 64] - x).abs() <= 0.5001 * scales[i / 64], "{i}: {x}");
    }
}

#[test]
fn products_of_codes() {
    // The largest products there are: whatever saturates on the way shows.
    let extreme = |n: usize| (0..n).map(|i| if i / 3 % 2 == 0 { 3.0 } else { -3.0 }).collect::<Vec<f32>>();
    let (rows, reference) = (5, reference::table().integer);
    for table in available() {
        let integer = &table.integer;
        for (n, cols) in [1, 2, 3, 4, 5, 8, 12].into_iter().flat_map(|n| [64, 128, 576].map(|cols| (n, cols))) {
            let (mut packed, scales) = nf4_rows(rows, cols);
            for (x, even) in [(floats(n * cols, 33), false), (extreme(n * cols), true)] {
                if even {
                    packed.iter_mut().enumerate().for_each(|(i, byte)| *byte = if i % 2 == 0 { 0x0F } else { 0xF0 });
                }
                let what = format!("{} {cols} x {n}", table.isa);
                let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols, round: Round::F32 };
                let first = &x[..n.min(8) * cols];
                let ours = encoded(integer, first, Order::EvenOdd);
                let theirs = encoded(&reference, first, Order::EvenOdd);
                let (mut got, mut want) = (vec![7.0; rows * n.min(8)], vec![7.0; rows * n.min(8)]);
                (integer.nf4_gemv)(w, codes_of(&ours, cols), &mut got);
                (reference.nf4_gemv)(w, codes_of(&theirs, cols), &mut want);
                assert_close(&got, &want, 2e-6, &format!("{what} nf4"));
                let w: Vec<i8> = packed.iter().chain(&packed).map(|byte| (*byte as i8).max(-127)).collect();
                let (ours, theirs) = (encoded(integer, first, Order::Plain), encoded(&reference, first, Order::Plain));
                (integer.int8_gemv)(&w, &scales, codes_of(&ours, cols), &mut got);
                (reference.int8_gemv)(&w, &scales, codes_of(&theirs, cols), &mut want);
                assert_close(&got, &want, 2e-6, &format!("{what} int8"));
                let Some(tile) = integer.tile else { continue };
                tile_of_codes(integer, &tile, &packed, &scales, &x, cols, &what);
            }
        }
    }
}

/// The tile on a panel of repeated rows gives what the product row by row gives.
fn tile_of_codes(
    integer: &Integer,
    tile: &IntegerTile,
    packed: &[u8],
    scales: &[f32],
    x: &[f32],
    cols: usize,
    what: &str,
) {
    let (n, rows, blocks) = ((x.len() / cols).min(tile.mr), scales.len() / (cols / 64), cols / 64);
    let mut words = vec![0.0; rows * cols / 4];
    (tile.nf4_words)(packed, &mut words);
    let (mut panel, mut steps) = (vec![0.0; cols / 4 * tile.nr], vec![0.0; blocks * tile.nr]);
    for j in 0..tile.nr {
        for p in 0..cols / 4 {
            panel[p * tile.nr + j] = words[j % rows * cols / 4 + p];
        }
        for b in 0..blocks {
            steps[b * tile.nr + j] = scales[j % rows * blocks + b] / STEPS;
        }
    }
    let mut got = vec![7.0; n * tile.nr];
    let encoded = encoded(integer, &x[..n * cols], Order::EvenOdd);
    let x = codes_of(&encoded, cols);
    (tile.run)(x, &panel, &steps, &mut got);
    for i in 0..n {
        let mut want = vec![7.0; rows];
        let w = Nf4Rows { packed, scales: Scales::Each(scales), cols, round: Round::F32 };
        (integer.nf4_gemv)(w, x.rows(i..i + 1), &mut want);
        let want: Vec<f32> = (0..tile.nr).map(|j| want[j % rows]).collect();
        assert_close(&got[i * tile.nr..][..tile.nr], &want, 2e-6, &format!("{what} tile row {i}"));
    }
}

/// Rows of x in 16 bits: words, scales.
fn encoded16(gemv: &Int16Gemv, x: &[f32], cols: usize, layout: Layout) -> (Vec<f32>, Vec<f32>) {
    let (n, blocks) = (x.len() / cols, gemv.blocks(cols, layout));
    let (mut words, mut scales) = (vec![7.0; n * blocks * 32], vec![7.0; n * blocks]);
    for ((x, words), scales) in x.chunks(cols).zip(words.chunks_mut(blocks * 32)).zip(scales.chunks_mut(blocks)) {
        (gemv.encode)(x, layout, words, scales);
    }
    (words, scales)
}

/// `x · wᵀ` in 16 bits, `[rows, n]`.
fn product16(gemv: &Int16Gemv, w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32]) -> Vec<f32> {
    let (words, scales) = encoded16(gemv, x, w.cols, Layout::Nf4);
    let mut out = vec![7.0; w.packed.len() / (w.cols / 2) * x.len() / w.cols];
    (gemv.nf4)(w, code, Codes16 { words: &words, scales: &scales, cols: w.cols }, &mut out);
    out
}

const NF4_CODE: [f32; 16] = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
    0.7230, 1.0,
];

#[test]
fn products_of_16_bit_codes() {
    let (rows, reference) = (9, reference::table().int16.gemv);
    for table in available() {
        let gemv = &table.int16.gemv;
        for (n, cols) in (1..=8).flat_map(|n| [64, 128, 192, 576].map(|cols| (n, cols))) {
            let what = format!("{} {cols} x {n}", table.isa);
            let (mut packed, scales) = nf4_rows(rows, cols);
            let x = floats(n * cols, 51);
            let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols, round: Round::F32 };
            let got = product16(gemv, w, &NF4_CODE, &x);
            assert_close(&got, &product16(&reference, w, &NF4_CODE, &x), 2e-6, &what);
            // Against exact numbers, by the size of what is added up.
            for (at, got) in got.iter().enumerate() {
                let (j, i) = (at / n, at % n);
                let (mut want, mut size) = (0.0, 0.0);
                for p in 0..cols {
                    let byte = packed[(j * cols + p) / 2];
                    let index = if p % 2 == 0 { byte >> 4 } else { byte & 15 };
                    let scale = scales[(j * cols + p) / 64];
                    let product =
                        f64::from(NF4_CODE[usize::from(index)]) * f64::from(scale) * f64::from(x[i * cols + p]);
                    want += product;
                    size += product * product;
                }
                // Two roundings of at most 1 / 32766 of a block's largest, which is few times the average.
                assert!(
                    (f64::from(*got) - want).abs() <= 3e-4 * size.sqrt(),
                    "{what} [{j}, {i}]: {got} against {want}"
                );
            }
            let codes: Vec<i8> = packed.iter().chain(&packed).map(|byte| (*byte as i8).max(-127)).collect();
            let product = |gemv: &Int16Gemv| {
                let (words, steps) = encoded16(gemv, &x, cols, Layout::Plain);
                let mut out = vec![7.0; rows * n];
                (gemv.int8)(&codes, &scales, Codes16 { words: &words, scales: &steps, cols }, &mut out);
                out
            };
            assert_close(&product(gemv), &product(&reference), 2e-6, &format!("{what} int8"));
            let mut want = vec![7.0; rows * n];
            (reference::table().i8_gemv)(&codes, &scales, cols, &x, &mut want);
            assert_close(&product(gemv), &want, 3e-4, &format!("{what} int8, of floats"));
            // The largest sums there are, of either sign: one that does not fit shows.
            for byte in [0x00, 0xFF] {
                packed.fill(byte);
                let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols, round: Round::F32 };
                let x = vec![3.0; n * cols];
                let want: Vec<f32> = product16(&reference, w, &NF4_CODE, &x);
                assert_close(&product16(gemv, w, &NF4_CODE, &x), &want, 2e-6, &format!("{what}, all {byte}"));
                let sum = scales[..cols / 64].iter().sum::<f32>() * 3.0 * 64.0;
                assert!((want[0].abs() - sum).abs() <= 1e-4 * sum, "{what}: {} of {sum}", want[0]);
            }
        }
    }
}

#[test]
fn what_is_no_number_and_what_is_none_in_16_bits() {
    let (packed, scales) = nf4_rows(2, 192);
    let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols: 192, round: Round::F32 };
    for table in available() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = floats(192, 52);
            x[70] = bad;
            let out = product16(&table.int16.gemv, w, &NF4_CODE, &x);
            assert!(out.iter().all(|out| out.is_nan()), "{} {bad}: {out:?}", table.isa);
        }
        for zero in [0.0, -0.0, 1e-43] {
            assert_eq!(product16(&table.int16.gemv, w, &NF4_CODE, &[zero; 192]), [0.0; 2], "{} {zero}", table.isa);
        }
    }
}

#[test]
fn nested_scales_are_exact() {
    let map: [f32; 256] = std::array::from_fn(|i| (i as f32 / 127.5 - 1.0).powi(3));
    each(|table, reference, n, what| {
        let codes: Vec<u8> = (0..n).map(|i| (i * 37 + 11) as u8).collect();
        let (mut got, mut want) = (vec![7.0; n], vec![7.0; n]);
        (table.nested_scales)(&codes, &map, 0.37, 0.011, &mut got);
        (reference.nested_scales)(&codes, &map, 0.37, 0.011, &mut want);
        assert_eq!(got, want, "{what}");
    });
}

#[test]
fn nested_scales_are_looked_up_row_by_row() {
    let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 7.5 - 1.0);
    let map: [f32; 256] = std::array::from_fn(|i| (i as f32 / 127.5 - 1.0).powi(3));
    // Groups of 7 blocks run across rows of 9, and the first row begins inside one.
    let (rows, cols, first, n_x) = (5, 576, 11, 2);
    let codes: Vec<u8> = (0..first + rows * cols / 64).map(|i| (i * 37 + 11) as u8).collect();
    let absmax: Vec<f32> = floats(codes.len().div_ceil(7), 41);
    let nested = NestedScales { codes: &codes, first, absmax: &absmax, offset: 0.3, group: 7, map: &map };
    let each: Vec<f32> = (first..codes.len()).map(|i| map[usize::from(codes[i])] * absmax[i / 7] + 0.3).collect();
    let (packed, x) = (nf4_rows(rows, cols).0, floats(n_x * cols, 42));
    for table in available() {
        let both = |scales, round| {
            let w = Nf4Rows { packed: &packed, scales, cols, round };
            let mut ordered = x.clone();
            (table.nf4_order)(&x, &mut ordered);
            let mut outs = vec![vec![7.0; rows * n_x]; 3];
            outs.push(product16(&table.int16.gemv, w, &code, &x));
            (table.nf4_gemv)(w, &code, &ordered, &mut outs[0]);
            (table.integer.nf4_gemv)(w, codes_of(&encoded(&table.integer, &x, Order::EvenOdd), cols), &mut outs[1]);
            if let Some(pairs) = table.nf4_pairs {
                (pairs.order)(&x, &mut ordered[..x.len() / 2]);
                (pairs.gemv)(w, &code, &ordered[..x.len() / 2], &mut outs[2]);
            }
            outs
        };
        for round in ROUNDS {
            let what = format!("{} {round:?}", table.isa);
            assert_eq!(both(Scales::Nested(nested), round), both(Scales::Each(&each), round), "{what}");
        }
    }
}

#[test]
fn a_row_of_x_does_not_see_its_neighbours() {
    let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 7.5 - 1.0);
    let (rows, cols) = (3, 192);
    let (packed, scales) = nf4_rows(rows, cols);
    let x = floats(8 * cols, 25);
    let bf16: Vec<_> = floats(rows * cols, 26).iter().map(|w| half::bf16::from_f32(*w).to_bits()).collect();
    let w = Nf4Rows { packed: &packed, scales: Scales::Each(&scales), cols, round: Round::Bf16 };
    for table in available() {
        let (mut nf4, mut dense) = (vec![0.0; rows * 8], vec![0.0; rows * 8]);
        let in_16_bits = product16(&table.int16.gemv, w, &code, &x);
        (table.nf4_gemv)(w, &code, &x, &mut nf4);
        (table.bf16_gemv)(&bf16, cols, &x, &mut dense);
        for i in 0..8 {
            let x = &x[i * cols..(i + 1) * cols];
            let (mut one_nf4, mut one_dense) = (vec![0.0; rows], vec![0.0; rows]);
            let one_16 = product16(&table.int16.gemv, w, &code, x);
            (table.nf4_gemv)(w, &code, x, &mut one_nf4);
            (table.bf16_gemv)(&bf16, cols, x, &mut one_dense);
            for j in 0..rows {
                assert_eq!((one_nf4[j], one_dense[j]), (nf4[j * 8 + i], dense[j * 8 + i]), "{} row {i}", table.isa);
                assert_eq!(one_16[j], in_16_bits[j * 8 + i], "{} row {i}", table.isa);
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
