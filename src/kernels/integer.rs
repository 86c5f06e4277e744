//! Products of 8-bit whole numbers, for generation where the caller allows activations of 8 bits.
//!
//! A row of x becomes 64 neighbours at a time: codes from -127 to 127 and a scale, `x[p] ≈ scale · code[p]`. The weights are
//! NF4, whose code book is here 16 whole numbers ([`CODE_BOOK`]), or 8-bit rows. Products of codes are summed as 32-bit
//! whole numbers within a block, exactly; the sums are scaled and added up in f32.
//!
//! An instruction that multiplies bytes takes four neighbours of one operand with four of the other, so codes travel as
//! words: an f32 whose bits are four codes. Most such instructions want one operand without a sign; there the weights are
//! raised by 128, and each sum starts at `-128 · Σ code` of its block ([`Codes::starts`]), which takes that out again.

use super::gemv::{AHEAD, BLOCK, Dots, MAX_X, Nf4Rows, Packed, Room, Scales, product};
use super::generic::Simd;

/// Words of a block.
pub const WORDS: usize = BLOCK / 4;

/// The NF4 code book times [`STEPS`], rounded: the 16 whole numbers and the factor that together lie nearest to it, by mean
/// squares (0.0017 of a block's absmax; NF4 itself is 20 times as far from the weights).
pub const CODE_BOOK: [i8; 16] = [-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112];
/// What [`CODE_BOOK`] is to be divided by.
pub const STEPS: f32 = 112.030_22;

/// The largest code.
const LARGEST: f32 = 127.0;
/// 1.5 · 2²³: added to a small number it leaves, in the lowest byte, the nearest whole number, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// In which order the codes of a block stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// That of the numbers.
    Plain,
    /// Those at even places, then those at odd ones: as the high and the low nibbles of NF4 come out.
    EvenOdd,
}

/// Rows of x in 8 bits.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    /// Four codes a word, `[n, cols / 4]`.
    pub words: &'a [f32],
    /// `[n, cols / 64]`.
    pub scales: &'a [f32],
    /// The bits of the 32-bit number at which a block's sums start, `[n, cols / 64]`.
    pub starts: &'a [f32],
    /// A multiple of 64.
    pub cols: usize,
}

/// `(x, order, words, scales, starts)` of [`Integer::encode`].
pub type Encode = fn(x: &[f32], order: Order, words: &mut [f32], scales: &mut [f32], starts: &mut [f32]);

/// One instruction set's products of bytes.
#[derive(Clone, Copy)]
pub struct Integer {
    /// Rows of x to codes;  x: `[n · 64]`, words: `[n · 16]`, scales, starts: `[n]`.
    pub encode: Encode,
    /// `out[j, i] = Σ_p w[j, p] · x[i, p]`, whatever the weights are to be rounded to;  x: [`Order::EvenOdd`], at most
    /// [`MAX_X`] rows, out: `[rows, n]`.
    pub nf4_gemv: fn(w: Nf4Rows<'_>, x: Codes<'_>, out: &mut [f32]),
    /// `out[j, i] = Σ_p scales[j, p / 64] · w[j, p] · x[i, p]`;  x: [`Order::Plain`].
    pub int8_gemv: fn(w: &[i8], scales: &[f32], x: Codes<'_>, out: &mut [f32]),
    /// The product of many rows, where it is faster than that of f32.
    pub tile: Option<IntegerTile>,
}

/// A product of many rows of codes with a panel of weights.
#[derive(Clone, Copy)]
pub struct IntegerTile {
    /// Rows of x at most.
    pub mr: usize,
    /// Columns of a panel: rows of the weight.
    pub nr: usize,
    /// Whether it is faster than the product of bf16 pairs too.
    pub beats_pairs: bool,
    /// Blocks of NF4 to words that the tile takes;  packed: `[n · 32]`, words: `[n · 16]`.
    pub nf4_words: fn(packed: &[u8], words: &mut [f32]),
    /// Blocks of 8-bit weights to words that the tile takes;  codes: `[n · 64]`, words: `[n · 16]`.
    pub int8_words: fn(codes: &[i8], words: &mut [f32]),
    /// `out[i, j] = Σ_p w[p, j] · x[i, p]`;  w: `[cols / 4, nr]` words, scales: `[cols / 64, nr]`, out: `[n, nr]`.
    pub run: fn(x: Codes<'_>, w: &[f32], scales: &[f32], out: &mut [f32]),
}

impl<'a> Codes<'a> {
    /// Number of rows; panics if the parts do not fit each other.
    fn check(&self, what: &str) -> usize {
        assert!(self.cols > 0 && self.cols.is_multiple_of(BLOCK), "{what}: {} columns", self.cols);
        let (n, blocks) = (self.words.len() / (self.cols / 4), self.cols / BLOCK);
        let fits =
            self.words.len() == n * self.cols / 4 && self.scales.len() == n * blocks && self.starts.len() == n * blocks;
        assert!(fits, "{what}: lengths differ");
        n
    }

    /// Some of the rows.
    #[must_use]
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let blocks = self.cols / BLOCK;
        let some = |data: &'a [f32], width: usize| &data[rows.start * width..rows.end * width];
        Self {
            words: some(self.words, blocks * WORDS),
            scales: some(self.scales, blocks),
            starts: some(self.starts, blocks),
            cols: self.cols,
        }
    }
}

/// What an instruction set that multiplies bytes adds to its floats.
pub(super) trait Bytes: Copy {
    /// The floats beside it.
    type F: Packed;
    /// `LANES` words.
    type B: Copy;
    /// The words of a block.
    type Block: AsRef<[Self::B]>;
    /// What is added to weights.
    const RAISED: i32;

    fn floats(self) -> Self::F;
    /// The 64 weights of a block of NF4, raised, in [`Order::EvenOdd`].
    fn nf4(self, packed: &[u8; BLOCK / 2]) -> Self::Block;
    /// 64 weights in 8 bits, raised.
    fn int8(self, codes: &[i8; BLOCK]) -> Self::Block;
    /// The first `LANES` words of `x`.
    fn load(self, x: &[f32]) -> Self::B;
    fn store(self, b: Self::B, out: &mut [f32]);
    /// The word in every lane.
    fn splat(self, word: f32) -> Self::B;
    /// The word in the first lane, zero in the others.
    fn first(self, word: f32) -> Self::B;
    /// `sums + w · x` in every lane, four products each;  w: raised weights, x: codes.
    fn dot4(self, sums: Self::B, w: Self::B, x: Self::B) -> Self::B;
    /// Whole numbers as floats.
    fn to_f32(self, sums: Self::B) -> <Self::F as Simd>::V;
}

/// One block: its codes in order of places, and its scale.
#[inline(always)]
fn encode_block(x: &[f32; BLOCK]) -> ([i8; BLOCK], f32) {
    // Bits of magnitudes are ordered like magnitudes, and NaN is the largest: one in x makes the scale NaN.
    let largest = f32::from_bits(x.iter().fold(0, |m, v| m.max(v.abs().to_bits())));
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    // An infinite inverse (of a denormal) times zero is no number, whose lowest byte is 0 as well.
    (x.map(|v| (v * inverse + ROUNDER).to_bits() as i8), largest / LARGEST)
}

/// [`Integer::encode`], where the weights are raised by `RAISED`.
#[inline(always)]
pub(super) fn encode<const RAISED: i32>(
    x: &[f32],
    order: Order,
    words: &mut [f32],
    scales: &mut [f32],
    starts: &mut [f32],
) {
    let blocks = scales.len();
    let fits = x.len() == blocks * BLOCK && words.len() == blocks * WORDS && starts.len() == blocks;
    assert!(fits, "encode: lengths differ");
    let parts = x.as_chunks::<BLOCK>().0.iter().zip(words.as_chunks_mut::<WORDS>().0);
    for ((x, words), (scale, start)) in parts.zip(scales.iter_mut().zip(starts)) {
        let (codes, step) = encode_block(x);
        *scale = step;
        let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
        *start = f32::from_bits((-RAISED * sum) as u32);
        let ordered: [i8; BLOCK] = match order {
            Order::Plain => codes,
            Order::EvenOdd => std::array::from_fn(|i| codes[i % 32 * 2 + i / 32]),
        };
        for (word, codes) in words.iter_mut().zip(ordered.as_chunks::<4>().0) {
            *word = f32::from_bits(u32::from_le_bytes(codes.map(|code| code as u8)));
        }
    }
}

/// A matrix whose rows are blocks.
trait Weights<S: Bytes>: Copy {
    /// Block `b` of row `j`.
    fn block(self, s: S, j: usize, b: usize) -> S::Block;
    /// The scales of row `j`, in `room` if they must be looked up.
    fn scales<'b>(&'b self, s: S, j: usize, room: &'b mut Room) -> &'b [f32];
}

/// Rows of NF4.
#[derive(Clone, Copy)]
struct Nf4<'a> {
    packed: &'a [[u8; BLOCK / 2]],
    scales: Scales<'a>,
    blocks: usize,
}

impl<S: Bytes> Weights<S> for Nf4<'_> {
    #[inline(always)]
    fn block(self, s: S, j: usize, b: usize) -> S::Block {
        let packed = &self.packed[j * self.blocks + b];
        s.floats().prefetch(packed, AHEAD);
        s.nf4(packed)
    }
    #[inline(always)]
    fn scales<'b>(&'b self, s: S, j: usize, room: &'b mut Room) -> &'b [f32] {
        self.scales.row(s.floats(), j, self.blocks, room)
    }
}

/// Rows in 8 bits.
#[derive(Clone, Copy)]
struct Int8<'a> {
    codes: &'a [[i8; BLOCK]],
    scales: &'a [f32],
    blocks: usize,
}

impl<S: Bytes> Weights<S> for Int8<'_> {
    #[inline(always)]
    fn block(self, s: S, j: usize, b: usize) -> S::Block {
        let codes = &self.codes[j * self.blocks + b];
        s.floats().prefetch(codes, AHEAD);
        s.int8(codes)
    }
    #[inline(always)]
    fn scales<'b>(&'b self, _: S, j: usize, _: &'b mut Room) -> &'b [f32] {
        &self.scales[j * self.blocks..][..self.blocks]
    }
}

#[inline(always)]
pub(super) fn nf4_gemv<S: Bytes>(s: S, w: Nf4Rows<'_>, x: Codes<'_>, out: &mut [f32]) {
    let (n, blocks) = (x.check("nf4_gemv"), x.cols / BLOCK);
    let rows = w.rows("nf4_gemv");
    assert!(w.cols == x.cols && n <= MAX_X && out.len() == rows * n, "nf4_gemv: lengths differ");
    let w = Nf4 { packed: w.packed.as_chunks().0, scales: w.scales, blocks };
    groups(s, w, rows, 1.0 / STEPS, x, out);
}

#[inline(always)]
pub(super) fn int8_gemv<S: Bytes>(s: S, w: &[i8], scales: &[f32], x: Codes<'_>, out: &mut [f32]) {
    let (n, blocks) = (x.check("int8_gemv"), x.cols / BLOCK);
    let rows = scales.len() / blocks;
    let fits = w.len() == rows * x.cols && scales.len() == rows * blocks;
    assert!(fits && n <= MAX_X && out.len() == rows * n, "int8_gemv: lengths differ");
    groups(s, Int8 { codes: w.as_chunks().0, scales, blocks }, rows, 1.0, x, out);
}

/// Rows of weights against rows of codes.
struct Rows<'a, S, W> {
    s: S,
    w: W,
    x: Codes<'a>,
    room: [Room; 4],
}

impl<S: Bytes, W: Weights<S>> Dots for Rows<'_, S, W> {
    const GROUP: usize = <S::F as Packed>::GROUP;

    #[inline(always)]
    fn dots<const M: usize, const N: usize>(&mut self, rows: [usize; N], first: usize) -> [[f32; M]; N] {
        let (w, mut scales): (&W, [&[f32]; N]) = (&self.w, [&[]; N]);
        for ((scales, room), j) in scales.iter_mut().zip(&mut self.room).zip(rows) {
            *scales = w.scales(self.s, j, room);
        }
        dots::<S, W, M, N>(self.s, self.w, rows, scales, self.x.rows(first..first + M))
    }
}

/// All rows of w against all of x.
#[inline(always)]
fn groups<S: Bytes, W: Weights<S>>(s: S, w: W, rows: usize, factor: f32, x: Codes<'_>, out: &mut [f32]) {
    let n = x.scales.len() / (x.cols / BLOCK);
    product(Rows { s, w, x, room: [Room::NEW; 4] }, rows, n, out);
    for out in out {
        *out *= factor;
    }
}

/// `R` rows of w against `M` rows of x.
#[inline(always)]
fn dots<S: Bytes, W: Weights<S>, const M: usize, const R: usize>(
    s: S,
    w: W,
    rows: [usize; R],
    scales: [&[f32]; R],
    x: Codes<'_>,
) -> [[f32; M]; R] {
    let (f, blocks) = (s.floats(), x.cols / BLOCK);
    let words: [&[[f32; WORDS]]; M] =
        std::array::from_fn(|i| x.words[i * blocks * WORDS..(i + 1) * blocks * WORDS].as_chunks().0);
    let starts: [&[f32]; M] = std::array::from_fn(|i| &x.starts[i * blocks..(i + 1) * blocks]);
    let steps: [&[f32]; M] = std::array::from_fn(|i| &x.scales[i * blocks..(i + 1) * blocks]);
    let scales = scales.map(|scales| &scales[..blocks]);
    let mut acc = [[f.splat(0.0); M]; R];
    for b in 0..blocks {
        for r in 0..R {
            let weights = w.block(s, rows[r], b);
            let weights = weights.as_ref();
            let scale = f.splat(scales[r][b]);
            for i in 0..M {
                let mut sums = s.first(starts[i][b]);
                for (v, &weights) in weights.iter().enumerate() {
                    sums = s.dot4(sums, weights, s.load(&words[i][b][v * <S::F as Simd>::LANES..]));
                }
                let step = f.splat(steps[i][b]);
                acc[r][i] = f.fma(f.mul(s.to_f32(sums), step), scale, acc[r][i]);
            }
        }
    }
    let mut dots = [[0.0; M]; R];
    for (dots, acc) in dots.iter_mut().zip(&acc) {
        for (dot, acc) in dots.iter_mut().zip(acc) {
            *dot = f.sum(*acc);
        }
    }
    dots
}

/// [`IntegerTile::nf4_words`].
#[inline(always)]
pub(super) fn nf4_words<S: Bytes>(s: S, packed: &[u8], words: &mut [f32]) {
    let (packed, words) = (packed.as_chunks::<{ BLOCK / 2 }>().0, words.as_chunks_mut::<WORDS>().0);
    assert_eq!(packed.len(), words.len(), "nf4_words: lengths differ");
    for (packed, words) in packed.iter().zip(words) {
        for (weights, words) in s.nf4(packed).as_ref().iter().zip(words.chunks_exact_mut(<S::F as Simd>::LANES)) {
            s.store(*weights, words);
        }
    }
}

/// [`IntegerTile::int8_words`].
#[inline(always)]
pub(super) fn int8_words<S: Bytes>(s: S, codes: &[i8], words: &mut [f32]) {
    let (codes, words) = (codes.as_chunks::<BLOCK>().0, words.as_chunks_mut::<WORDS>().0);
    assert_eq!(codes.len(), words.len(), "int8_words: lengths differ");
    for (codes, words) in codes.iter().zip(words) {
        for (weights, words) in s.int8(codes).as_ref().iter().zip(words.chunks_exact_mut(<S::F as Simd>::LANES)) {
            s.store(*weights, words);
        }
    }
}

/// [`IntegerTile::run`] for `M` rows and a panel of `NV` vectors: the sums of a block stay in registers, those of all blocks
/// in `out`, which the first-level cache holds.
#[inline(always)]
pub(super) fn tile<S: Bytes, const M: usize, const NV: usize>(
    s: S,
    x: Codes<'_>,
    w: &[f32],
    scales: &[f32],
    out: &mut [f32],
) {
    let (f, lanes, nr, blocks) = (s.floats(), <S::F as Simd>::LANES, NV * <S::F as Simd>::LANES, x.cols / BLOCK);
    let fits = x.check("integer tile") == M && w.len() == blocks * WORDS * nr && scales.len() == blocks * nr;
    assert!(fits && out.len() == M * nr, "integer tile: lengths differ");
    for b in 0..blocks {
        let words: [&[f32; WORDS]; M] = std::array::from_fn(|i| &x.words.as_chunks().0[i * blocks + b]);
        let panel = &w[b * WORDS * nr..][..WORDS * nr];
        // Loops and no closures, which might be compiled without the instruction set.
        let mut sums = [[s.splat(0.0); NV]; M];
        for (i, sums) in sums.iter_mut().enumerate() {
            *sums = [s.splat(x.starts[i * blocks + b]); NV];
        }
        for (p, panel) in panel.chunks_exact(nr).enumerate() {
            let mut weights = [s.load(panel); NV];
            for (v, weights) in weights.iter_mut().enumerate() {
                *weights = s.load(&panel[v * lanes..]);
            }
            for (sums, words) in sums.iter_mut().zip(words) {
                let codes = s.splat(words[p]);
                for v in 0..NV {
                    sums[v] = s.dot4(sums[v], weights[v], codes);
                }
            }
        }
        let scales = &scales[b * nr..][..nr];
        for (i, (sums, out)) in sums.iter().zip(out.chunks_exact_mut(nr)).enumerate() {
            let step = f.splat(x.scales[i * blocks + b]);
            for v in 0..NV {
                let (scaled, out) = (f.mul(s.to_f32(sums[v]), step), &mut out[v * lanes..][..lanes]);
                let before = if b == 0 { f.splat(0.0) } else { f.load(out) };
                f.store(f.fma(scaled, f.load(&scales[v * lanes..]), before), out);
            }
        }
    }
}

/// The specification, for every machine.
pub(super) mod reference {
    use super::{BLOCK, CODE_BOOK, Codes, Integer, MAX_X, Nf4Rows, STEPS, Scales, encode};

    pub(in crate::kernels) const TABLE: Integer = Integer { encode: encode::<0>, nf4_gemv, int8_gemv, tile: None };

    /// The code at place `p` of row `i`.
    fn code(x: &Codes<'_>, i: usize, p: usize) -> i32 {
        i32::from(x.words[(i * x.cols + p) / 4].to_bits().to_le_bytes()[p % 4] as i8)
    }

    fn gemv(scales: Scales<'_>, x: &Codes<'_>, factor: f32, out: &mut [f32], weight: impl Fn(usize, usize) -> i32) {
        let (n, blocks) = (x.check("integer gemv"), x.cols / BLOCK);
        assert!(n <= MAX_X && out.len() * blocks == scales.len() * n, "integer gemv: lengths differ");
        for (at, out) in out.iter_mut().enumerate() {
            let (j, i) = (at / n, at % n);
            let blocks = (0..blocks).map(|b| {
                let sum: i32 = (b * BLOCK..(b + 1) * BLOCK).map(|p| weight(j, p) * code(x, i, p)).sum();
                f64::from(sum) * f64::from(x.scales[i * blocks + b]) * f64::from(scales.scale(j * blocks + b))
            });
            *out = (blocks.sum::<f64>() * f64::from(factor)) as f32;
        }
    }

    fn nf4_gemv(w: Nf4Rows<'_>, x: Codes<'_>, out: &mut [f32]) {
        gemv(w.scales, &x, 1.0 / STEPS, out, |j, p| {
            // Place p of a block: the even elements first, in the high nibbles.
            let byte = w.packed[(j * w.cols + p / BLOCK * BLOCK) / 2 + p % 32];
            let index = if p % BLOCK < 32 { byte >> 4 } else { byte & 15 };
            i32::from(CODE_BOOK[usize::from(index)])
        });
    }

    fn int8_gemv(w: &[i8], scales: &[f32], x: Codes<'_>, out: &mut [f32]) {
        gemv(Scales::Each(scales), &x, 1.0, out, |j, p| i32::from(w[j * x.cols + p]));
    }
}
