//! Matrix times a few vectors in whole numbers of 16 bits, for decoding: NF4 is looked up as bytes, 32 or more at once, where
//! floats are looked up eight or sixteen at once, so that memory is waited for and not the look-up.
//!
//! A row of x becomes 64 neighbours at a time: codes of at most [`LARGEST`] and a scale. The code book of NF4 becomes 16 whole
//! numbers of as many bits; what the weights would be rounded to, the dtype of the checkpoint, is left out. Every lane adds up
//! eight products of a block, `8 · 16383² < 2³¹`, exactly; lanes are scaled and added up in f32. A product of normal numbers is
//! off by 3 · 10⁻⁵ of its size; one of bf16 by 2 · 10⁻³.
//!
//! Rows in 8 bits are widened to 16 and multiplied alike.
//!
//! Magnitudes below 10⁻³⁴ become zeros; with an infinity or a NaN in a block, its products are NaN.

use super::gemv::{AHEAD, BLOCK, Dots, MAX_X, Nf4Rows, Packed, Room, Scales, product, sums};
use super::generic::Simd;
use super::int16::{Shorts, inverse, largest_of, step, times};

/// The largest code.
pub const LARGEST: f32 = 16383.0;
/// Words of a block: two codes each.
pub const WORDS: usize = BLOCK / 2;

/// For which weights codes are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// 8-bit rows: in the order of the numbers.
    Plain,
    /// NF4: as its kernel meets the weights, blocks filled up to whole units.
    Nf4,
}

/// Rows of x in 16 bits.
#[derive(Clone, Copy)]
pub struct Codes16<'a> {
    /// Two codes a word, `[n, blocks of a row · 32]`.
    pub words: &'a [f32],
    /// `[n, blocks of a row]`.
    pub scales: &'a [f32],
    /// Columns, a multiple of 64.
    pub cols: usize,
}

/// One instruction set's product.
#[derive(Clone, Copy)]
pub struct Int16Gemv {
    /// Whether it is faster than that of floats.
    pub fast: bool,
    /// Blocks that the kernel of NF4 takes together: those of a row of x are filled up to a multiple of that.
    pub unit: usize,
    /// A row of x to codes;  x: `[n · 64]`, words: `[m · 32]`, scales: `[m]`, m: [`Self::blocks`].
    pub encode: fn(x: &[f32], layout: Layout, words: &mut [f32], scales: &mut [f32]),
    /// `out[j, i] = Σ_p w[j, p] · x[i, p]`, `w = code[index] · scale` whatever it is to be rounded to;  code: at most 1 in magnitude,
    /// at most [`MAX_X`] rows of x, out: `[rows, n_x]`.
    pub nf4: fn(w: Nf4Rows<'_>, code: &[f32; 16], x: Codes16<'_>, out: &mut [f32]),
    /// `out[j, i] = Σ_p scales[j, p / 64] · w[j, p] · x[i, p]`;  w: `[rows, cols]`, scales: `[rows, cols / 64]`, x and out as above.
    pub int8: fn(w: &[i8], scales: &[f32], x: Codes16<'_>, out: &mut [f32]),
}

impl Int16Gemv {
    /// Blocks of a row of `cols` numbers.
    pub fn blocks(&self, cols: usize, layout: Layout) -> usize {
        match layout {
            Layout::Plain => cols / BLOCK,
            Layout::Nf4 => (cols / BLOCK).next_multiple_of(self.unit),
        }
    }
}

impl Codes16<'_> {
    /// Rows of x in units of so many blocks; panics if the parts do not fit each other or `out`.
    fn check(&self, rows: usize, unit: usize, out: &[f32]) -> usize {
        assert!(self.cols > 0 && self.cols.is_multiple_of(BLOCK), "int16 gemv: {} columns", self.cols);
        let blocks = (self.cols / BLOCK).next_multiple_of(unit);
        let n_x = self.scales.len() / blocks;
        let fits = self.words.len() == n_x * blocks * WORDS && self.scales.len() == n_x * blocks;
        assert!(fits && n_x <= MAX_X && out.len() == rows * n_x, "int16 gemv: lengths differ");
        n_x
    }

    /// The same, against rows of NF4.
    fn check_nf4(&self, w: &Nf4Rows<'_>, unit: usize, out: &[f32]) -> usize {
        assert_eq!(w.cols, self.cols, "int16 gemv: columns differ");
        self.check(w.rows("int16 gemv"), unit, out)
    }

    /// The same, against rows in 8 bits.
    fn check_int8(&self, w: &[i8], scales: &[f32], out: &[f32]) -> usize {
        let rows = w.len() / self.cols.max(1);
        let fits = w.len() == rows * self.cols && scales.len() * BLOCK == w.len();
        assert!(fits, "int16 gemv: lengths differ");
        self.check(rows, 1, out)
    }
}

/// The blocks of NF4 that a vector holds, `U` of them.
pub(super) type Packed16<const U: usize> = [[u8; BLOCK / 2]; U];

/// What an instruction set adds for such products; a unit is the `U` blocks of NF4 that fill a vector.
pub(super) trait ShortsGemv<const U: usize>: Shorts {
    /// Code `i` of a unit's vectors belongs to element `ORDER[i]` of the unit.
    const ORDER: [[u8; BLOCK]; U];
    /// A table, wherever in a vector it is looked up.
    type Everywhere: Copy;
    fn everywhere(self, table: Self::Table) -> Self::Everywhere;
    /// The weights of a unit.
    fn look_up_unit(self, packed: &Packed16<U>, table: Self::Everywhere) -> [Self::B; 4];
    /// Weights of a block.
    type Wide: AsRef<[Self::B]>;
    /// 64 weights in 8 bits, in order.
    fn widen(self, codes: &[i8; BLOCK]) -> Self::Wide;
    /// The scale of its block in every lane.
    fn unit_scales(self, scales: &[f32; U]) -> <Self::F as Simd>::V;
}

/// [`Int16Gemv::encode`].
#[inline(always)]
pub(super) fn encode<S: ShortsGemv<U>, const U: usize>(
    s: S,
    x: &[f32],
    layout: Layout,
    words: &mut [f32],
    scales: &mut [f32],
) {
    let blocks = x.len() / BLOCK;
    let filled = if layout == Layout::Plain { blocks } else { blocks.next_multiple_of(U) };
    let fits = x.len() == blocks * BLOCK && scales.len() == filled && words.len() == filled * WORDS;
    assert!(fits, "int16 encode: lengths differ");
    if layout == Layout::Plain {
        let parts = x.as_chunks().0.iter().zip(words.as_chunks_mut().0).zip(scales);
        return parts.for_each(|((x, words), scale)| *scale = encode_block(s, x, words));
    }
    let units = words.chunks_exact_mut(U * WORDS).zip(scales.chunks_exact_mut(U));
    for (x, (words, scales)) in x.chunks(U * BLOCK).zip(units) {
        let mut plain = [[0.0; WORDS]; U];
        scales.fill(0.0);
        for ((x, plain), scale) in x.as_chunks::<BLOCK>().0.iter().zip(&mut plain).zip(scales) {
            *scale = encode_block(s, x, plain);
        }
        let plain = plain.as_flattened();
        let code = |i: u8| (plain[usize::from(i / 2)].to_bits() >> (16 * u32::from(i % 2))) as u16;
        for (word, from) in words.iter_mut().zip(S::ORDER.as_flattened().as_chunks::<2>().0) {
            *word = f32::from_bits(u32::from(code(from[0])) | u32::from(code(from[1])) << 16);
        }
    }
}

/// The codes of a block, in order; returns its scale.
#[inline(always)]
fn encode_block<S: Shorts>(s: S, x: &[f32; BLOCK], words: &mut [f32; WORDS]) -> f32 {
    let (f, lanes) = (s.floats(), <S::F as Simd>::LANES);
    let largest = largest_of(s, x);
    let factor = f.splat(inverse(LARGEST, largest));
    for (x, out) in x.chunks_exact(2 * lanes).zip(words.chunks_exact_mut(lanes)) {
        f.store(s.neighbours(f.mul(f.load(x), factor), f.mul(f.load(&x[lanes..]), factor)), out);
    }
    step(LARGEST, largest)
}

/// [`Int16Gemv::nf4`].
#[inline(always)]
pub(super) fn nf4<S: ShortsGemv<U>, const U: usize>(
    s: S,
    w: Nf4Rows<'_>,
    code: &[f32; 16],
    x: Codes16<'_>,
    out: &mut [f32],
) {
    let (n_x, blocks) = (x.check_nf4(&w, U, out), w.cols / BLOCK);
    let table = s.everywhere(s.table(&times(s.floats(), *code, LARGEST)));
    let (packed, room) = (w.packed.as_chunks().0, [Room::NEW; 4]);
    product(
        Nf4::<S, S::Everywhere, U> { s, table, packed, scales: w.scales, room, x, blocks },
        packed.len() / blocks,
        n_x,
        out,
    );
    for out in out {
        *out *= 1.0 / LARGEST;
    }
}

/// Rows of NF4 and of x, in units of `U` blocks.
struct Nf4<'a, S, T, const U: usize> {
    s: S,
    table: T,
    packed: &'a [[u8; BLOCK / 2]],
    scales: Scales<'a>,
    room: [Room; 4],
    x: Codes16<'a>,
    blocks: usize,
}

impl<S: ShortsGemv<U>, const U: usize> Dots for Nf4<'_, S, S::Everywhere, U> {
    const GROUP: usize = <S::F as Packed>::GROUP;

    #[inline(always)]
    fn dots<const M: usize, const N: usize>(&mut self, rows: [usize; N], first: usize) -> [[f32; M]; N] {
        let (s, f, blocks, filled) = (self.s, self.s.floats(), self.blocks, self.blocks.next_multiple_of(U));
        let whole = blocks / U;
        let mut side_by_side: [(&[[u8; BLOCK / 2]], &[f32]); N] = [(&[], &[]); N];
        for ((row, room), j) in side_by_side.iter_mut().zip(&mut self.room).zip(rows) {
            *row = (&self.packed[j * blocks..][..blocks], self.scales.row(f, j, blocks, room));
        }
        // Equally long, as the compiler sees: no index is checked in the loop.
        let packed: [&[Packed16<U>]; N] = std::array::from_fn(|r| &side_by_side[r].0.as_chunks().0[..whole]);
        let scales: [&[[f32; U]]; N] = std::array::from_fn(|r| &side_by_side[r].1.as_chunks().0[..whole]);
        let words: [&[[[f32; WORDS]; U]]; M] = std::array::from_fn(|i| {
            &self.x.words[(first + i) * filled * WORDS..][..filled * WORDS].as_chunks().0.as_chunks().0[..filled / U]
        });
        let steps: [&[[f32; U]]; M] =
            std::array::from_fn(|i| &self.x.scales[(first + i) * filled..][..filled].as_chunks().0[..filled / U]);
        let mut acc = [[f.splat(0.0); M]; N];
        let (some_words, some_steps) = (words.map(|words| &words[..whole]), steps.map(|steps| &steps[..whole]));
        for u in 0..whole {
            for r in 0..N {
                f.prefetch(&packed[r][u], AHEAD);
                let (weights, scale) = (s.look_up_unit(&packed[r][u], self.table), s.unit_scales(&scales[r][u]));
                for i in 0..M {
                    acc[r][i] = add_unit(s, weights, &some_words[i][u], scale, &some_steps[i][u], acc[r][i]);
                }
            }
        }
        if whole * U < blocks {
            // Fewer blocks than a vector holds: what stands for the others is multiplied with codes of 0.
            for r in 0..N {
                let (mut packed, mut scales) = ([[0; BLOCK / 2]; U], [0.0; U]);
                packed[..blocks - whole * U].copy_from_slice(&side_by_side[r].0[whole * U..]);
                scales[..blocks - whole * U].copy_from_slice(&side_by_side[r].1[whole * U..]);
                let (weights, scale) = (s.look_up_unit(&packed, self.table), s.unit_scales(&scales));
                for i in 0..M {
                    acc[r][i] = add_unit(s, weights, &words[i][whole], scale, &steps[i][whole], acc[r][i]);
                }
            }
        }
        sums(f, acc)
    }
}

/// [`Int16Gemv::int8`].
#[inline(always)]
pub(super) fn int8<S: ShortsGemv<U>, const U: usize>(s: S, w: &[i8], scales: &[f32], x: Codes16<'_>, out: &mut [f32]) {
    let n_x = x.check_int8(w, scales, out);
    let blocks = x.cols / BLOCK;
    product(Int8::<S, U> { s, codes: w.as_chunks().0, scales, x, blocks }, scales.len() / blocks, n_x, out);
}

/// Rows in 8 bits and of x.
struct Int8<'a, S, const U: usize> {
    s: S,
    codes: &'a [[i8; BLOCK]],
    scales: &'a [f32],
    x: Codes16<'a>,
    blocks: usize,
}

impl<S: ShortsGemv<U>, const U: usize> Dots for Int8<'_, S, U> {
    const GROUP: usize = <S::F as Packed>::GROUP;

    #[inline(always)]
    fn dots<const M: usize, const N: usize>(&mut self, rows: [usize; N], first: usize) -> [[f32; M]; N] {
        let (s, f, blocks) = (self.s, self.s.floats(), self.blocks);
        let codes = rows.map(|j| &self.codes[j * blocks..][..blocks]);
        let scales = rows.map(|j| &self.scales[j * blocks..][..blocks]);
        let words: [&[[f32; WORDS]]; M] =
            std::array::from_fn(|i| &self.x.words.as_chunks().0[(first + i) * blocks..][..blocks]);
        let steps: [&[f32]; M] = std::array::from_fn(|i| &self.x.scales[(first + i) * blocks..][..blocks]);
        let mut acc = [[f.splat(0.0); M]; N];
        for b in 0..blocks {
            for r in 0..N {
                f.prefetch(&codes[r][b], AHEAD);
                let (weights, scale) = (s.widen(&codes[r][b]), f.splat(scales[r][b]));
                for i in 0..M {
                    acc[r][i] = add(s, weights.as_ref(), &words[i][b], scale, f.splat(steps[i][b]), acc[r][i]);
                }
            }
        }
        sums(f, acc)
    }
}

/// `acc` and the products of a unit.
#[inline(always)]
fn add_unit<S: ShortsGemv<U>, const U: usize>(
    s: S,
    weights: [S::B; 4],
    words: &[[f32; WORDS]; U],
    scale: <S::F as Simd>::V,
    steps: &[f32; U],
    acc: <S::F as Simd>::V,
) -> <S::F as Simd>::V {
    add(s, &weights, words.as_flattened(), scale, s.unit_scales(steps), acc)
}

/// `acc` and the products of weights and codes.
#[inline(always)]
fn add<S: Shorts>(
    s: S,
    weights: &[S::B],
    words: &[f32],
    scale: <S::F as Simd>::V,
    step: <S::F as Simd>::V,
    acc: <S::F as Simd>::V,
) -> <S::F as Simd>::V {
    let (f, lanes) = (s.floats(), <S::F as Simd>::LANES);
    let mut sums = s.splat(0.0);
    for (v, weights) in weights.iter().enumerate() {
        sums = s.dot2(sums, *weights, s.load(&words[v * lanes..]));
    }
    f.fma(f.mul(s.to_f32(sums), step), scale, acc)
}

/// The specification, for every machine.
pub(super) mod reference {
    use super::*;

    pub(in crate::kernels) const TABLE: Int16Gemv = Int16Gemv { fast: false, unit: 1, encode, nf4, int8 };

    fn encode(x: &[f32], _: Layout, words: &mut [f32], scales: &mut [f32]) {
        let fits = x.len() == scales.len() * BLOCK && words.len() == scales.len() * WORDS;
        assert!(fits, "int16 encode: lengths differ");
        for ((x, words), scale) in x.chunks(BLOCK).zip(words.chunks_mut(WORDS)).zip(scales) {
            let largest = f32::from_bits(x.iter().fold(0, |m, x| m.max(x.abs().to_bits())));
            let code = |x: f32| (x * inverse(LARGEST, largest)).round_ties_even() as i16 as u16;
            for (word, x) in words.iter_mut().zip(x.as_chunks::<2>().0) {
                *word = f32::from_bits(u32::from(code(x[0])) | u32::from(code(x[1])) << 16);
            }
            *scale = step(LARGEST, largest);
        }
    }

    /// The code at place `p` of row `i`.
    fn code_of(x: &Codes16<'_>, i: usize, p: usize) -> i64 {
        let word = x.words[(i * x.cols + p) / 2].to_bits();
        i64::from((word >> (p % 2 * 16)) as u16 as i16)
    }

    fn int8(w: &[i8], scales: &[f32], x: Codes16<'_>, out: &mut [f32]) {
        let (n_x, blocks) = (x.check_int8(w, scales, out), x.cols / BLOCK);
        for (at, out) in out.iter_mut().enumerate() {
            let (j, i) = (at / n_x, at % n_x);
            let dots = (0..blocks).map(|b| {
                let products = (b * BLOCK..(b + 1) * BLOCK).map(|p| i64::from(w[j * x.cols + p]) * code_of(&x, i, p));
                let sum = products.sum::<i64>() as f64;
                sum * f64::from(scales[j * blocks + b]) * f64::from(x.scales[i * blocks + b])
            });
            *out = dots.sum::<f64>() as f32;
        }
    }

    fn nf4(w: Nf4Rows<'_>, code: &[f32; 16], x: Codes16<'_>, out: &mut [f32]) {
        let (n_x, blocks) = (x.check_nf4(&w, 1, out), w.cols / BLOCK);
        let code = code.map(|code| (code * LARGEST).round_ties_even() as i64);
        for (at, out) in out.iter_mut().enumerate() {
            let (j, i) = (at / n_x, at % n_x);
            let dots = (0..blocks).map(|b| {
                let products = (0..BLOCK).map(|p| {
                    let byte = w.packed[(j * blocks + b) * BLOCK / 2 + p / 2];
                    let index = if p.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                    code[usize::from(index)] * code_of(&x, i, b * BLOCK + p)
                });
                let sum = products.sum::<i64>() as f64;
                sum * f64::from(w.scales.scale(j * blocks + b)) * f64::from(x.scales[i * blocks + b])
            });
            *out = (dots.sum::<f64>() / f64::from(LARGEST)) as f32;
        }
    }
}
