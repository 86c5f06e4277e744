//! Products of 16-bit whole numbers with a scale for each 64 neighbours along the sum: closer to f32 than bf16 is, and up
//! to twice as fast, on CPUs that add up products of 16-bit pairs and have no unit for bf16.
//!
//! A block of [`BLOCK`] numbers becomes codes of at most [`LARGEST`] and a scale, `x[p] ≈ scale · code[p]` within half a
//! scale: block floating point with 13.5 bits. Products of codes are summed as 32-bit whole numbers within a block, exactly: 64 of
//! the largest stay below 2³¹. The sums of blocks are scaled and added up in f32.
//!
//! Not for numbers at the ends of f32: a block of magnitudes below 10⁻³⁴ becomes zeros, one above 10³² may overflow when scaled; with an
//! infinity or a NaN in it, its products are NaN.
//!
//! A panel of such numbers is one of words, like every other ([`super::gemm`]): of each block, a word for each two codes, the
//! lower k in the lower half, then the scale as an f32. The last block may be short.

use super::gemm::{GemmTile, Rows, TileC, check_strip};
use super::generic::Simd;
use super::int16_gemv::{self, Int16Gemv};
use super::integer::Bytes;

/// Elements of k that share a scale.
pub const BLOCK: usize = 64;
/// Words of a block: its codes and its scale.
pub const BLOCK_WORDS: usize = BLOCK / 2 + 1;
/// The largest code: `64 · 5792² < 2³¹`.
pub const LARGEST: f32 = 5792.0;

/// Words of a row of `k` elements.
pub const fn depth(k: usize) -> usize {
    let rest = k % BLOCK;
    k / BLOCK * BLOCK_WORDS + if rest > 0 { rest.div_ceil(2) + 1 } else { 0 }
}

/// 64 columns of some rows of NF4, a block wide.
#[derive(Clone, Copy)]
pub struct Nf4Column<'a> {
    /// Row `r` is `packed[r · stride ..][.. 32]`, the first element of a byte in its high nibble.
    pub packed: &'a [u8],
    /// Distance between rows.
    pub stride: usize,
    /// What each row's code-book values are multiplied with, at most [`BLOCK`] rows.
    pub scales: &'a [f32],
    /// The values of the codes, in ascending order.
    pub code: &'a [f32; 16],
    /// Whether the products are rounded to bf16 before anything else.
    pub round: bool,
}

/// `(packed, scales, code, round, out)` of [`Int16Kernels::nf4_row`].
pub type Nf4Row = fn(packed: &[u8], scales: &[f32], code: &[f32; 16], round: bool, out: &mut [f32]);

/// One instruction set's products of blocks of 16-bit numbers, and what packs them.
#[derive(Clone, Copy)]
pub struct Int16Kernels {
    /// The product, on panels of [`depth`] words.
    pub tile: GemmTile,
    /// Whether it is faster than that of f32 on this machine.
    pub fast: bool,
    /// Consecutive floats to words;  x: `[n]`, out: `[depth(n)]`.
    pub pack_row: fn(x: &[f32], out: &mut [f32]),
    /// The rows of one block to words, each column with a scale of its own: `out[p, i]` has the code of `rows[2p][i]` in its
    /// lower half and that of `rows[2p + 1][i]`, or 0, in its upper; the row after the last has the scales;
    /// out: `[depth(count), width]`, the other columns are left alone.
    pub join_rows: fn(rows: &Rows<'_>, out: &mut [f32], width: usize),
    /// [`Self::pack_row`] of bits of bf16.
    pub pack_halves: fn(x: &[u16], out: &mut [f32]),
    /// [`Self::join_rows`] of bits of bf16.
    pub join_halves: fn(rows: &Rows<'_, u16>, out: &mut [f32], width: usize),
    /// Whole blocks of NF4 to words: those of the numbers that they stand for, or nearly: a block without a code of 1 or -1
    /// has the scale of one with it;  packed: `[n · 32]`, scales: `[n]`, out: `[n · 33]`.
    pub nf4_row: Nf4Row,
    /// [`Self::join_rows`] of NF4, where all columns have the scale of the largest block;  out: panels of `width` columns that
    /// begin `panel` apart, width: 16, 32 or 64.
    pub nf4_join: fn(column: Nf4Column<'_>, out: &mut [f32], width: usize, panel: usize),
    /// The product of few rows.
    pub gemv: Int16Gemv,
}

/// What the product of 16-bit pairs adds to bytes and floats.
pub(super) trait Shorts: Bytes {
    /// `sums + w · x` in every lane, two products each.
    fn dot2(self, sums: Self::B, w: Self::B, x: Self::B) -> Self::B;
    /// The larger of `m` and the magnitude of `x` by their bits, which are ordered like magnitudes; NaN is the largest.
    fn max_bits(self, m: Self::B, x: <Self::F as Simd>::V) -> Self::B;
    /// The floats of these bits.
    fn floats_of(self, bits: Self::B) -> <Self::F as Simd>::V;
    /// Words with `low` in their lower halves and `high` in their upper, both to the nearest whole number; what has no
    /// 32-bit number becomes 0.
    fn halves(self, low: <Self::F as Simd>::V, high: <Self::F as Simd>::V) -> <Self::F as Simd>::V;
    /// The words of `2 · LANES` neighbours, of which `first` are the first.
    fn neighbours(self, first: <Self::F as Simd>::V, second: <Self::F as Simd>::V) -> <Self::F as Simd>::V;

    /// 16 codes by their index.
    type Table: Copy;
    /// 32 words.
    type Words: AsRef<[<Self::F as Simd>::V]>;
    /// The nearest whole numbers.
    fn table(self, values: &[f32; 16]) -> Self::Table;
    /// The words of a block.
    fn look_up(self, packed: &[u8; BLOCK / 2], table: Self::Table) -> Self::Words;
    /// The words of 32 columns of two rows, which have tables of their own.
    fn look_up_two(self, rows: [&[u8; 16]; 2], tables: [Self::Table; 2]) -> Self::Words;
}

/// What can be made into blocks.
pub(super) trait Source<S: Simd>: Copy {
    /// The first `LANES` of them.
    fn load(s: S, x: &[Self]) -> S::V;
    /// Fewer than `LANES`, zeros behind.
    fn load_tail(s: S, x: &[Self]) -> S::V;
}

impl<S: Simd> Source<S> for f32 {
    #[inline(always)]
    fn load(s: S, x: &[f32]) -> S::V {
        s.load(x)
    }
    #[inline(always)]
    fn load_tail(s: S, x: &[f32]) -> S::V {
        s.load_tail(x)
    }
}

/// Bits of bf16.
impl<S: Simd> Source<S> for u16 {
    #[inline(always)]
    fn load(s: S, x: &[u16]) -> S::V {
        s.load_bf16(x)
    }
    #[inline(always)]
    fn load_tail(s: S, x: &[u16]) -> S::V {
        let mut whole = [0; 16];
        whole[..x.len()].copy_from_slice(x);
        s.load_bf16(&whole)
    }
}

/// [`Int16Kernels::tile`]: `MR x (NV · LANES)` sums of a block stay in registers, those of all blocks in the first-level cache.
#[inline(always)]
pub(super) fn tile<S: Shorts, const MR: usize, const NV: usize>(s: S, a: &[f32], b: &[f32], out: TileC<'_, '_>) {
    let nr = NV * <S::F as Simd>::LANES;
    let depth = check_strip(a, b, MR, nr);
    let TileC { c, i, j, alpha, add, .. } = out;
    for (panel, a) in a.chunks_exact(MR * depth).enumerate() {
        let row0 = i + panel * MR;
        // In place where C is a strip of sums, as the driver has it.
        if alpha == 1.0
            && c.cols() == nr
            && let Some(sums) = c.solid(row0, MR)
        {
            add_panels::<S, MR, NV>(s, a, b, sums, add);
            continue;
        }
        let mut sums = [[0.0; MAX_NR]; MR];
        let sums = &mut sums.as_flattened_mut()[..MR * nr];
        add_panels::<S, MR, NV>(s, a, b, sums, false);
        let (rows, cols) = (c.rows().min(row0 + MR), c.cols().min(j + nr));
        for (row, sums) in (row0..rows).zip(sums.chunks_exact(nr)) {
            for (out, sum) in c.row(row)[j..cols].iter_mut().zip(sums) {
                *out = alpha * sum + if add { *out } else { 0.0 };
            }
        }
    }
}

/// The widest panel.
const MAX_NR: usize = 32;

/// `sums (+)= a · b`;  sums: `[MR, NV · LANES]`, in memory: a block's sums leave no register to those of all.
#[inline(always)]
fn add_panels<S: Shorts, const MR: usize, const NV: usize>(s: S, a: &[f32], b: &[f32], sums: &mut [f32], add: bool) {
    let nr = NV * <S::F as Simd>::LANES;
    assert_eq!(sums.len(), MR * nr, "int16 tile: sums of another shape");
    if !add {
        sums.fill(0.0);
    }
    for (a, b) in a.chunks(BLOCK_WORDS * MR).zip(b.chunks(BLOCK_WORDS * nr)) {
        add_block::<S, MR, NV>(s, a, b, sums);
    }
}

/// Adds the products of one block.
#[inline(always)]
fn add_block<S: Shorts, const MR: usize, const NV: usize>(s: S, a: &[f32], b: &[f32], totals: &mut [f32]) {
    let (f, lanes, nr) = (s.floats(), <S::F as Simd>::LANES, NV * <S::F as Simd>::LANES);
    let (a, a_scales) = a.split_last_chunk::<MR>().expect("a block ends with its scales");
    let (b, b_scales) = b.split_at(b.len() - nr);
    let mut sums = [[s.splat(0.0); NV]; MR];
    // Two words at a time: the loop's own instructions take turns with the products.
    let (mut a_pairs, mut b_pairs) = (a.chunks_exact(2 * MR), b.chunks_exact(2 * nr));
    for (a_words, b_words) in (&mut a_pairs).zip(&mut b_pairs) {
        add_word(s, &a_words[..MR], &b_words[..nr], &mut sums);
        add_word(s, &a_words[MR..], &b_words[nr..], &mut sums);
    }
    if a_pairs.remainder().len() == MR {
        add_word(s, a_pairs.remainder(), b_pairs.remainder(), &mut sums);
    }
    let mut b_scale = [f.splat(0.0); NV];
    for (v, b_scale) in b_scale.iter_mut().enumerate() {
        *b_scale = f.load(&b_scales[v * lanes..]);
    }
    for r in 0..MR {
        let a_scale = f.splat(a_scales[r]);
        for v in 0..NV {
            let total = &mut totals[r * nr + v * lanes..][..lanes];
            f.store(f.fma(f.mul(s.to_f32(sums[r][v]), a_scale), b_scale[v], f.load(total)), total);
        }
    }
}

/// Adds the products of one word of each row and column.
#[inline(always)]
fn add_word<S: Shorts, const MR: usize, const NV: usize>(s: S, a: &[f32], b: &[f32], sums: &mut [[S::B; NV]; MR]) {
    let mut b_vec = [s.splat(0.0); NV];
    for (v, b_vec) in b_vec.iter_mut().enumerate() {
        *b_vec = s.load(&b[v * <S::F as Simd>::LANES..]);
    }
    for r in 0..MR {
        let a_word = s.splat(a[r]);
        for v in 0..NV {
            sums[r][v] = s.dot2(sums[r][v], b_vec[v], a_word);
        }
    }
}

/// What a magnitude is multiplied with to become a code of at most `top`; 0 where that is no number.
#[inline(always)]
pub(super) fn inverse(top: f32, largest: f32) -> f32 {
    let inverse = top / largest;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The scale of a block; no number where the block holds none or an infinity, whose codes mean nothing.
#[inline(always)]
pub(super) fn step(top: f32, largest: f32) -> f32 {
    if largest.is_finite() { largest / top } else { f32::NAN }
}

/// The largest magnitude of a block; NaN if there is one.
#[inline(always)]
pub(super) fn largest_of<S: Shorts, T: Source<S::F>>(s: S, x: &[T; BLOCK]) -> f32 {
    let (f, lanes) = (s.floats(), <S::F as Simd>::LANES);
    let mut largest = s.splat(0.0);
    for x in x.chunks_exact(lanes) {
        largest = s.max_bits(largest, T::load(f, x));
    }
    // As floats a NaN might be lost among them, so the lanes are compared by their bits.
    let mut bits = [0.0; 16];
    f.store(s.floats_of(largest), &mut bits);
    f32::from_bits(bits[..lanes].iter().fold(0, |m, x| m.max(x.to_bits())))
}

#[inline(always)]
pub(super) fn pack_row<S: Shorts, T: Source<S::F> + Default>(s: S, x: &[T], out: &mut [f32]) {
    assert_eq!(out.len(), depth(x.len()), "pack_row: lengths differ");
    let (whole, rest) = x.as_chunks::<BLOCK>();
    let (outs, last) = out.split_at_mut(whole.len() * BLOCK_WORDS);
    for (x, out) in whole.iter().zip(outs.as_chunks_mut::<BLOCK_WORDS>().0) {
        pack_block(s, x, out);
    }
    if !rest.is_empty() {
        let (mut block, mut words) = ([T::default(); BLOCK], [0.0; BLOCK_WORDS]);
        block[..rest.len()].copy_from_slice(rest);
        pack_block(s, &block, &mut words);
        let (codes, scale) = last.split_at_mut(last.len() - 1);
        codes.copy_from_slice(&words[..codes.len()]);
        scale[0] = words[BLOCK_WORDS - 1];
    }
}

#[inline(always)]
fn pack_block<S: Shorts, T: Source<S::F>>(s: S, x: &[T; BLOCK], out: &mut [f32; BLOCK_WORDS]) {
    let (f, lanes) = (s.floats(), <S::F as Simd>::LANES);
    let largest = largest_of(s, x);
    let inverse = f.splat(inverse(LARGEST, largest));
    for (x, out) in x.chunks_exact(2 * lanes).zip(out.chunks_exact_mut(lanes)) {
        f.store(s.neighbours(f.mul(T::load(f, x), inverse), f.mul(T::load(f, &x[lanes..]), inverse)), out);
    }
    out[BLOCK_WORDS - 1] = step(LARGEST, largest);
}

#[inline(always)]
pub(super) fn join_rows<S: Shorts, T: Source<S::F>>(s: S, rows: &Rows<'_, T>, out: &mut [f32], width: usize) {
    let (f, lanes) = (s.floats(), <S::F as Simd>::LANES);
    let words = check_join(rows, out, width);
    let Rows { data, stride, count, depth } = *rows;
    for at in (0..depth).step_by(lanes) {
        let end = depth.min(at + lanes);
        let mut largest = s.splat(0.0);
        for r in 0..count {
            largest = s.max_bits(largest, load_some(f, &data[r * stride..][at..end]));
        }
        let largest = s.floats_of(largest);
        // Infinite where all are 0 or nearly so: the products then are no whole numbers and become 0.
        let inverse = f.div(f.splat(LARGEST), largest);
        for p in 0..words {
            let low = load_some(f, &data[2 * p * stride..][at..end]);
            let mut high = f.splat(0.0);
            if 2 * p + 1 < count {
                high = f.mul(load_some(f, &data[(2 * p + 1) * stride..][at..end]), inverse);
            }
            store_some(f, s.halves(f.mul(low, inverse), high), &mut out[p * width..][at..end]);
        }
        store_some(f, f.div(largest, f.splat(LARGEST)), &mut out[words * width..][at..end]);
    }
}

/// `round(scale · code)`.
#[inline(always)]
fn scaled<S: Simd>(s: S, code: &[f32; 16], scale: f32, round: bool) -> [f32; 16] {
    let mut values = [0.0; 16];
    for (out, code) in values.chunks_exact_mut(S::LANES).zip(code.chunks_exact(S::LANES)) {
        let value = s.mul(s.load(code), s.splat(scale));
        s.store(if round { s.round_bf16(value) } else { value }, out);
    }
    values
}

/// `values` times a factor.
#[inline(always)]
pub(super) fn times<S: Simd>(s: S, mut values: [f32; 16], factor: f32) -> [f32; 16] {
    for values in values.chunks_exact_mut(S::LANES) {
        s.store(s.mul(s.load(values), s.splat(factor)), values);
    }
    values
}

/// The magnitude of the larger of the outer values, by its bits: NaN is the largest.
#[inline(always)]
pub(super) fn outer(values: &[f32; 16]) -> f32 {
    f32::from_bits(values[0].abs().to_bits().max(values[15].abs().to_bits()))
}

#[inline(always)]
pub(super) fn nf4_row<S: Shorts>(s: S, packed: &[u8], scales: &[f32], code: &[f32; 16], round: bool, out: &mut [f32]) {
    let f = s.floats();
    let fits = packed.len() == scales.len() * BLOCK / 2 && out.len() == scales.len() * BLOCK_WORDS;
    assert!(fits, "nf4_row: lengths differ");
    let blocks = packed.as_chunks::<{ BLOCK / 2 }>().0.iter().zip(out.as_chunks_mut::<BLOCK_WORDS>().0);
    for ((packed, out), scale) in blocks.zip(scales) {
        let values = scaled(f, code, *scale, round);
        let largest = outer(&values);
        let table = s.table(&times(f, values, inverse(LARGEST, largest)));
        let words = s.look_up(packed, table);
        for (words, out) in words.as_ref().iter().zip(out.chunks_exact_mut(<S::F as Simd>::LANES)) {
            f.store(*words, out);
        }
        out[BLOCK_WORDS - 1] = step(LARGEST, largest);
    }
}

#[inline(always)]
pub(super) fn nf4_join<S: Shorts>(s: S, column: Nf4Column<'_>, out: &mut [f32], width: usize, panel: usize) {
    let (f, lanes) = (s.floats(), <S::F as Simd>::LANES);
    let words = check_nf4_join(column, out, width, panel);
    let Nf4Column { packed, stride, scales, code, round } = column;
    let (largest, factor) = column_scale(f, code, scales, round);
    for p in 0..words {
        let (low, high) = (2 * p, (2 * p + 1).min(scales.len() - 1));
        // A row that is missing has codes of 0.
        let mut tables = [s.table(&times(f, scaled(f, code, scales[low], round), factor)), s.table(&[0.0; 16])];
        if low != high {
            tables[1] = s.table(&times(f, scaled(f, code, scales[high], round), factor));
        }
        let (low, high) = (packed[low * stride..].as_chunks::<16>().0, packed[high * stride..].as_chunks::<16>().0);
        for half in 0..2 {
            let made = s.look_up_two([&low[half], &high[half]], tables);
            for (v, words) in made.as_ref().iter().enumerate() {
                let at = half * 32 + v * lanes;
                f.store(*words, &mut out[at / width * panel + p * width + at % width..]);
            }
        }
    }
    let scale = f.splat(step(LARGEST, largest));
    for at in (0..BLOCK).step_by(lanes) {
        f.store(scale, &mut out[at / width * panel + words * width + at % width..]);
    }
}

/// The largest number of a column of blocks, and what makes it [`LARGEST`].
#[inline(always)]
fn column_scale<S: Simd>(s: S, code: &[f32; 16], scales: &[f32], round: bool) -> (f32, f32) {
    let scale = f32::from_bits(scales.iter().fold(0, |m, scale| m.max(scale.abs().to_bits())));
    let largest = outer(&scaled(s, code, scale, round));
    (largest, inverse(LARGEST, largest))
}

/// The words of codes in a column.
///
/// # Panics
/// If there are no rows or too many, one leaves the data, or the panels are too small.
fn check_nf4_join(column: Nf4Column<'_>, out: &[f32], width: usize, panel: usize) -> usize {
    let Nf4Column { packed, stride, scales, .. } = column;
    let rows = scales.len();
    assert!((1..=BLOCK).contains(&rows), "nf4_join: {rows} rows");
    assert!((rows - 1) * stride + BLOCK / 2 <= packed.len(), "nf4_join: rows leave the data");
    let words = rows.div_ceil(2);
    assert!(matches!(width, 16 | 32 | 64), "nf4_join: panels of {width} columns");
    assert!((BLOCK / width - 1) * panel + (words + 1) * width <= out.len(), "nf4_join: rows leave the panels");
    words
}

/// A vector, or fewer numbers.
#[inline(always)]
fn load_some<S: Simd, T: Source<S>>(s: S, x: &[T]) -> S::V {
    if x.len() == S::LANES { T::load(s, x) } else { T::load_tail(s, x) }
}

#[inline(always)]
fn store_some<S: Simd>(s: S, v: S::V, out: &mut [f32]) {
    if out.len() == S::LANES { s.store(v, out) } else { s.store_tail(v, out) }
}

/// The words of codes in a column.
///
/// # Panics
/// If there is more than a block, a row leaves the data or the panel is too small.
fn check_join<T>(rows: &Rows<'_, T>, out: &[f32], width: usize) -> usize {
    let Rows { data, stride, count, depth } = *rows;
    assert!((1..=BLOCK).contains(&count), "join_rows: {count} rows");
    assert!((count - 1) * stride + depth <= data.len(), "join_rows: rows leave the data");
    let words = count.div_ceil(2);
    assert!(depth <= width && words * width + depth <= out.len(), "join_rows: rows leave the panel");
    words
}

/// The specification, for every machine.
pub(super) mod reference {
    use super::*;
    use crate::kernels::gemm::PanelA;
    use crate::kernels::gemm::reference::{MR, NR};

    pub(in crate::kernels) const TABLE: Int16Kernels = Int16Kernels {
        tile: GemmTile { mr: MR, nr: NR, panel_a: PanelA::Columns, run: tile },
        fast: false,
        pack_row: |x, out| pack(x.iter().copied(), out),
        join_rows: |rows, out, width| join(rows, out, width, |x| x),
        pack_halves: |x, out| pack(x.iter().map(|x| half(*x)), out),
        join_halves: |rows, out, width| join(rows, out, width, half),
        nf4_row,
        nf4_join,
        gemv: int16_gemv::reference::TABLE,
    };

    fn codes(word: f32) -> [i32; 2] {
        let bits = word.to_bits();
        [i32::from(bits as u16 as i16), i32::from((bits >> 16) as u16 as i16)]
    }

    fn word(low: i32, high: i32) -> f32 {
        f32::from_bits(u32::from(low as i16 as u16) | u32::from(high as i16 as u16) << 16)
    }

    fn tile(a: &[f32], b: &[f32], out: TileC<'_, '_>) {
        let TileC { c, i, j, alpha, add, .. } = out;
        let depth = check_strip(a, b, MR, NR);
        for (panel, a) in a.chunks_exact(MR * depth).enumerate() {
            for r in 0..(c.rows() - i - panel * MR).min(MR) {
                for v in 0..(c.cols() - j).min(NR) {
                    let mut total = 0.0;
                    for (a, b) in a.chunks(BLOCK_WORDS * MR).zip(b.chunks(BLOCK_WORDS * NR)) {
                        let (a, a_scales) = a.split_at(a.len() - MR);
                        let (b, b_scales) = b.split_at(b.len() - NR);
                        let pairs = a.chunks_exact(MR).zip(b.chunks_exact(NR));
                        let dot = |(a, b): (&[f32], &[f32])| {
                            let ([a0, a1], [b0, b1]) = (codes(a[r]), codes(b[v]));
                            i64::from(a0) * i64::from(b0) + i64::from(a1) * i64::from(b1)
                        };
                        total += pairs.map(dot).sum::<i64>() as f32 * a_scales[r] * b_scales[v];
                    }
                    let out = &mut c.row(i + panel * MR + r)[j + v];
                    *out = alpha * total + if add { *out } else { 0.0 };
                }
            }
        }
    }

    /// The codes of up to a block of numbers, and their scale.
    fn encode(x: impl Iterator<Item = f32> + Clone) -> (impl Fn(f32) -> i32, f32) {
        let largest = f32::from_bits(x.fold(0, |m, x| m.max(x.abs().to_bits())));
        let inverse = inverse(LARGEST, largest);
        (move |x: f32| (x * inverse).round_ties_even() as i32, step(LARGEST, largest))
    }

    fn half(bits: u16) -> f32 {
        half::bf16::from_bits(bits).to_f32()
    }

    fn pack(x: impl Iterator<Item = f32>, out: &mut [f32]) {
        let x: Vec<f32> = x.collect();
        assert_eq!(out.len(), depth(x.len()), "pack_row: lengths differ");
        for (x, out) in x.chunks(BLOCK).zip(out.chunks_mut(BLOCK_WORDS)) {
            let (code, scale) = encode(x.iter().copied());
            let words = x.len().div_ceil(2);
            for (out, x) in out.iter_mut().zip(x.chunks(2)) {
                *out = word(code(x[0]), x.get(1).map_or(0, |x| code(*x)));
            }
            out[words] = scale;
        }
    }

    fn join<T: Copy>(rows: &Rows<'_, T>, out: &mut [f32], width: usize, value: impl Fn(T) -> f32) {
        let words = check_join(rows, out, width);
        for i in 0..rows.depth {
            let at = |r: usize| value(rows.data[r * rows.stride + i]);
            let (code, scale) = encode((0..rows.count).map(at));
            for p in 0..words {
                let high = if 2 * p + 1 < rows.count { code(at(2 * p + 1)) } else { 0 };
                out[p * width + i] = word(code(at(2 * p)), high);
            }
            out[words * width + i] = scale;
        }
    }

    /// Element `i` of a run of NF4.
    fn nf4(packed: &[u8], i: usize, code: &[f32; 16], scale: f32, round: bool) -> f32 {
        let value =
            code[usize::from(if i.is_multiple_of(2) { packed[i / 2] >> 4 } else { packed[i / 2] & 15 })] * scale;
        if round { half::bf16::from_f32(value).to_f32() } else { value }
    }

    /// The codes of numbers of which the largest would be that of a code of 1 with this scale.
    fn encode_nf4(code: &[f32; 16], scale: f32, round: bool) -> (impl Fn(f32) -> i32, f32) {
        let ends = [nf4(&[0], 0, code, scale, round), nf4(&[0xFF], 0, code, scale, round)];
        encode(ends.into_iter())
    }

    fn nf4_row(packed: &[u8], scales: &[f32], code: &[f32; 16], round: bool, out: &mut [f32]) {
        assert!(packed.len() == scales.len() * BLOCK / 2, "nf4_row: lengths differ");
        let blocks = packed.chunks_exact(BLOCK / 2).zip(scales);
        for ((packed, scale), out) in blocks.zip(out.as_chunks_mut::<BLOCK_WORDS>().0) {
            let (encode, step) = encode_nf4(code, *scale, round);
            let at = |i| encode(nf4(packed, i, code, *scale, round));
            let (last, words) = out.split_last_mut().expect("a block has a scale");
            for (p, out) in words.iter_mut().enumerate() {
                *out = word(at(2 * p), at(2 * p + 1));
            }
            *last = step;
        }
    }

    fn nf4_join(column: Nf4Column<'_>, out: &mut [f32], width: usize, panel: usize) {
        let words = check_nf4_join(column, out, width, panel);
        let Nf4Column { packed, stride, scales, code, round } = column;
        let largest = f32::from_bits(scales.iter().fold(0, |m, scale| m.max(scale.abs().to_bits())));
        let (encode, step) = encode_nf4(code, largest, round);
        for i in 0..BLOCK {
            let at = |r: usize| encode(nf4(&packed[r * stride..], i, code, scales[r], round));
            let mut set = |p: usize, value| out[i / width * panel + p * width + i % width] = value;
            for p in 0..words {
                set(p, word(at(2 * p), if 2 * p + 1 < scales.len() { at(2 * p + 1) } else { 0 }));
            }
            set(words, step);
        }
    }
}
