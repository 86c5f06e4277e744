//! Matrix times a few vectors, straight from the weights' storage: decoding is bandwidth, so a weight is read once.
//!
//! A kernel takes some rows of W and up to [`MAX_X`] rows of x, and writes the dot products `out[j, i] = Σ_p W[j, p] · x[i, p]`,
//! `out: [rows of W, rows of x]`. Products and sums are f32, in the same chains for each row of x whatever the number of rows, so a
//! row's result does not depend on its neighbours.
//!
//! NF4, blocks of 64: the 16 values that a block's indices stand for are its scale times the code book, rounded to the dtype
//! the tensor stands for; they fill one register of AVX-512, two of AVX2. The block's 32 bytes are looked up in whole
//! registers: a shift moves one nibble of every lane into place, so the weights come out in another order than they are
//! stored in, and x is brought into that order once for each product ([`super::Kernels::nf4_order`]).

use super::generic::Simd;
use half::bf16;
use std::ops::Range;

/// Rows of x that a kernel takes at most.
pub const MAX_X: usize = 8;
/// Weights that share a scale, in NF4 and int8 rows.
pub const BLOCK: usize = 64;

/// What the values of an NF4 block are rounded to before they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// Not at all.
    F32,
    /// bfloat16, ties to even.
    Bf16,
    /// IEEE half, ties to even.
    F16,
    /// Half, and the result to bfloat16: a half checkpoint in a bfloat16 run.
    F16ThenBf16,
}

impl Round {
    /// `x` rounded.
    #[inline]
    pub fn apply(self, x: f32) -> f32 {
        let half = |x: f32| half::f16::from_f32(x).to_f32();
        match self {
            Self::F32 => x,
            Self::Bf16 => bf16::from_f32(x).to_f32(),
            Self::F16 => half(x),
            Self::F16ThenBf16 => bf16::from_f32(half(x)).to_f32(),
        }
    }
}

/// Blocks of a row whose scales may be [`Scales::Nested`].
pub const MAX_NESTED: usize = 512;

/// The scales of blocks of 64.
#[derive(Clone, Copy)]
pub enum Scales<'a> {
    /// As they are.
    Each(&'a [f32]),
    /// Codes; for rows of at most [`MAX_NESTED`] blocks. A kernel looks them up row by row, while memory fetches weights.
    Nested(NestedScales<'a>),
}

/// Scales `map[code] · absmax[block / group] + offset`, of the blocks from `first` on.
#[derive(Clone, Copy)]
pub struct NestedScales<'a> {
    /// A code for each block of the tensor, up to the last one that is wanted.
    pub codes: &'a [u8],
    /// The first block that is wanted.
    pub first: usize,
    /// A scale for each `group` blocks of the tensor.
    pub absmax: &'a [f32],
    /// Added to all.
    pub offset: f32,
    /// Blocks that share a scale.
    pub group: usize,
    /// What each code stands for.
    pub map: &'a [f32; 256],
}

/// Room for the nested scales of a row, and what each code stands for in the group they were looked up in: a group is some
/// rows, a look-up then is a load and takes nothing from the ports that multiply, as a gather does.
pub(super) struct Room {
    scales: [f32; MAX_NESTED],
    of_codes: [f32; 256],
    group: Option<usize>,
}

impl Room {
    pub(super) const NEW: Self = Self { scales: [0.0; MAX_NESTED], of_codes: [0.0; 256], group: None };
}

/// `map[i] · scale + offset`, rounded as in [`nested_scales`].
#[inline(always)]
fn scale_map<S: Simd>(s: S, map: &[f32; 256], scale: f32, offset: f32, out: &mut [f32; 256]) {
    let (scale, offset) = (s.splat(scale), s.splat(offset));
    for (map, out) in map.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
        s.store(s.add(s.mul(s.load(map), scale), offset), out);
    }
}

impl Scales<'_> {
    /// Number of blocks.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Each(scales) => scales.len(),
            Self::Nested(nested) => nested.codes.len() - nested.first,
        }
    }

    /// The scales of row `j`, looked up in `room` where they are nested.
    #[inline(always)]
    pub(super) fn row<'b, S: Packed>(&'b self, s: S, j: usize, blocks: usize, room: &'b mut Room) -> &'b [f32] {
        let nested = match self {
            Self::Each(scales) => return &scales[j * blocks..][..blocks],
            Self::Nested(nested) => nested,
        };
        let (mut at, end) = (nested.first + j * blocks, nested.first + (j + 1) * blocks);
        let mut done = 0;
        while at < end {
            let (group, inside) = (at / nested.group, at % nested.group);
            let len = (nested.group - inside).min(end - at);
            if room.group != Some(group) {
                scale_map(s, nested.map, nested.absmax[group], nested.offset, &mut room.of_codes);
                room.group = Some(group);
            }
            let codes = &nested.codes[at..at + len];
            s.prefetch(codes, AHEAD / 4);
            for (scale, code) in room.scales[done..done + len].iter_mut().zip(codes) {
                *scale = room.of_codes[usize::from(*code)];
            }
            (at, done) = (at + len, done + len);
        }
        &room.scales[..blocks]
    }

    /// The scale of a block.
    pub(super) fn scale(&self, block: usize) -> f32 {
        match self {
            Self::Each(scales) => scales[block],
            Self::Nested(n) => {
                let at = n.first + block;
                n.map[usize::from(n.codes[at])] * n.absmax[at / n.group] + n.offset
            }
        }
    }
}

/// Rows of an NF4 matrix whose rows are whole blocks.
#[derive(Clone, Copy)]
pub struct Nf4Rows<'a> {
    /// `[rows, cols / 2]`, the first of two neighbours in the high nibble.
    pub packed: &'a [u8],
    /// `[rows, cols / 64]`.
    pub scales: Scales<'a>,
    /// Columns, a multiple of 64.
    pub cols: usize,
    /// What `code · scale` is rounded to.
    pub round: Round,
}

/// `(w, scales, cols, x, out)` of [`super::Kernels::i8_gemv`].
pub type Int8Gemv = fn(w: &[i8], scales: &[f32], cols: usize, x: &[f32], out: &mut [f32]);

/// `(codes, map, scale, offset, out)` of [`super::Kernels::nested_scales`].
pub type LookUpScales = fn(codes: &[u8], map: &[f32; 256], scale: f32, offset: f32, out: &mut [f32]);

/// Rows of W, the code book, x in order, out.
pub type Nf4Gemv = fn(w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]);

/// The same product where x is bfloat16 and the CPU multiplies pairs of them; the weights are then rounded to bfloat16.
#[derive(Clone, Copy)]
pub struct Nf4Pairs {
    /// x, all of it bfloat16, as the kernel reads it: two numbers a word;  x: `[n · 64]`, out: `[n · 32]`.
    pub order: fn(x: &[f32], out: &mut [f32]),
    /// As [`super::Kernels::nf4_gemv`] with x from `order`: `[n_x, cols / 2]`.
    pub gemv: Nf4Gemv,
}

impl Nf4Rows<'_> {
    /// Number of rows; panics if the parts do not fit each other.
    pub(super) fn rows(&self, what: &str) -> usize {
        assert!(self.cols > 0 && self.cols.is_multiple_of(BLOCK), "{what}: {} columns", self.cols);
        let (rows, blocks) = (self.packed.len() / (self.cols / 2), self.cols / BLOCK);
        let fits = self.packed.len() == rows * self.cols / 2 && self.scales.len() == rows * blocks;
        assert!(fits, "{what}: lengths differ");
        if let Scales::Nested(nested) = self.scales {
            assert!(blocks <= MAX_NESTED && nested.group > 0, "{what}: rows of {blocks} blocks, {}", nested.group);
        }
        rows
    }

    /// Rows of x; panics if the parts do not fit each other.
    pub(super) fn check(&self, x: &[f32], out: &[f32]) -> usize {
        check_x("nf4_gemv", self.rows("nf4_gemv"), self.cols, x, out)
    }

    /// Rows of x, given in words of two numbers; panics if the parts do not fit each other.
    pub(super) fn check_pairs(&self, x: &[f32], out: &[f32]) -> usize {
        check_x("nf4_pairs", self.rows("nf4_pairs"), self.cols / 2, x, out)
    }
}

/// Rows of x; panics if `x: [n_x, cols]` and `out: [rows, n_x]` do not fit.
pub(super) fn check_x(what: &str, rows: usize, cols: usize, x: &[f32], out: &[f32]) -> usize {
    let n_x = x.len() / cols.max(1);
    assert!(n_x <= MAX_X && x.len() == n_x * cols && out.len() == rows * n_x, "{what}: lengths differ");
    n_x
}

/// What an instruction set adds to [`Simd`] for packed weights.
pub(super) trait Packed: Simd {
    /// The 64 weights of a block, `64 / LANES` vectors.
    type Block: AsRef<[Self::V]> + Copy;
    /// Rows of x whose sums, with those of as many rows of W as are read side by side, fit into the registers: 4 or 8.
    const GROUP: usize;
    /// Element `i` of a block's vectors, in their order, is weight `ORDER[i]` of the block.
    const ORDER: [u8; BLOCK];

    /// The weights of a block whose indices stand for `code · scale`.
    fn nf4_f32(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> Self::Block;
    /// The same, `code · scale` rounded to bfloat16.
    fn nf4_bf16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> Self::Block;
    /// The same, `code · scale` rounded to half precision.
    fn nf4_f16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> Self::Block;
    /// The same, `code · scale` rounded to half precision and the result to bfloat16.
    fn nf4_f16_bf16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> Self::Block;
    /// The first `LANES` elements of `w`.
    fn load_i8(self, w: &[i8]) -> Self::V;
    /// `map[codes[i]]` of the first `LANES` codes.
    fn look_up_bytes(self, codes: &[u8], map: &[f32; 256]) -> Self::V;
    /// Asks for the cache line `bytes` after the start of `data`, which may lie outside of it.
    fn prefetch<T>(self, data: &[T], bytes: usize);
}

/// How far ahead of its use a weight is asked for, in bytes. The hardware's own prefetching stops at the end of a page of
/// 4 KiB, which a thread is through in a third of a microsecond; with it alone a thread reads at half of its rate.
pub(super) const AHEAD: usize = 2048;

#[inline(always)]
pub(super) fn nf4_order<S: Packed>(_: S, x: &[f32], out: &mut [f32]) {
    assert!(x.len() == out.len() && x.len().is_multiple_of(BLOCK), "nf4_order: lengths differ");
    for (x, out) in x.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        for (out, &from) in out.iter_mut().zip(&S::ORDER) {
            *out = x[usize::from(from)];
        }
    }
}

#[inline(always)]
pub(super) fn nested_scales<S: Packed>(s: S, codes: &[u8], map: &[f32; 256], scale: f32, offset: f32, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "nested_scales: lengths differ");
    let (scale, offset) = (s.splat(scale), s.splat(offset));
    let (mut whole, mut outs) = (codes.chunks_exact(S::LANES), out.chunks_exact_mut(S::LANES));
    for (codes, out) in (&mut whole).zip(&mut outs) {
        s.store(s.add(s.mul(s.look_up_bytes(codes, map), scale), offset), out);
    }
    let mut padded = [0; 16];
    padded[..whole.remainder().len()].copy_from_slice(whole.remainder());
    s.store_tail(s.add(s.mul(s.look_up_bytes(&padded, map), scale), offset), outs.into_remainder());
}

/// The next rows of x that a kernel takes together, of `left`: 8 where their sums fit (`most`), else up to 4.
#[inline(always)]
pub(super) fn group(most: usize, left: usize) -> usize {
    if most >= 8 && left >= 8 { 8 } else { left.min(4) }
}

/// What a kind of weights has for [`product`].
pub(super) trait Dots {
    /// Rows of x that are taken together at most: 4 or 8.
    const GROUP: usize;
    /// Rows `rows` of W against `M` rows of x, from `first` on.
    fn dots<const M: usize, const N: usize>(&mut self, rows: [usize; N], first: usize) -> [[f32; M]; N];
}

/// All rows of W against all rows of x, in groups;  out: `[rows, n_x]`.
#[inline(always)]
pub(super) fn product<D: Dots>(mut dots: D, rows: usize, n_x: usize, out: &mut [f32]) {
    let mut first = 0;
    while first < n_x {
        first += match group(D::GROUP, n_x - first) {
            8 if D::GROUP >= 8 => pass::<D, 8>(&mut dots, rows, n_x, first, out),
            4 => pass::<D, 4>(&mut dots, rows, n_x, first, out),
            3 => pass::<D, 3>(&mut dots, rows, n_x, first, out),
            2 => pass::<D, 2>(&mut dots, rows, n_x, first, out),
            _ => pass::<D, 1>(&mut dots, rows, n_x, first, out),
        };
    }
}

/// All rows of W against `M` rows of x; returns `M`. A row of x alone takes four rows of W, far apart: memory then fetches ahead
/// in four places, and four sums hide an addition's latency.
#[inline(always)]
fn pass<D: Dots, const M: usize>(dots: &mut D, rows: usize, n_x: usize, first: usize, out: &mut [f32]) -> usize {
    let whole = if M == 1 {
        abreast::<D, M, 4>(dots, 0..rows, n_x, first, out)
    } else {
        abreast::<D, M, 2>(dots, 0..rows, n_x, first, out)
    };
    abreast::<D, M, 1>(dots, whole..rows, n_x, first, out);
    M
}

/// Rows of W, `N` of them side by side; returns the row behind the last.
#[inline(always)]
fn abreast<D: Dots, const M: usize, const N: usize>(
    dots: &mut D,
    rows: Range<usize>,
    n_x: usize,
    first: usize,
    out: &mut [f32],
) -> usize {
    let part = rows.len() / N;
    for j in rows.start..rows.start + part {
        let made = dots.dots::<M, N>(std::array::from_fn(|r| j + r * part), first);
        for (r, made) in made.iter().enumerate() {
            out[(j + r * part) * n_x + first..][..M].copy_from_slice(made);
        }
    }
    rows.start + N * part
}

/// The weights of a block, `code · scale` rounded as `R`, a [`Round`], says. A parameter and not a closure: what is not marked
/// `inline(always)` may be compiled without the instruction set, and each intrinsic in it becomes a call.
#[inline(always)]
fn weights<S: Packed, const R: u8>(s: S, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> S::Block {
    const BF16: u8 = Round::Bf16 as u8;
    const F16: u8 = Round::F16 as u8;
    const F16_BF16: u8 = Round::F16ThenBf16 as u8;
    match R {
        BF16 => s.nf4_bf16(packed, code, scale),
        F16 => s.nf4_f16(packed, code, scale),
        F16_BF16 => s.nf4_f16_bf16(packed, code, scale),
        _ => s.nf4_f32(packed, code, scale),
    }
}

#[inline(always)]
pub(super) fn nf4_gemv<S: Packed>(s: S, w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) {
    match w.round {
        Round::F32 => nf4_rounded::<S, { Round::F32 as u8 }>(s, w, code, x, out),
        Round::Bf16 => nf4_rounded::<S, { Round::Bf16 as u8 }>(s, w, code, x, out),
        Round::F16 => nf4_rounded::<S, { Round::F16 as u8 }>(s, w, code, x, out),
        Round::F16ThenBf16 => nf4_rounded::<S, { Round::F16ThenBf16 as u8 }>(s, w, code, x, out),
    }
}

#[inline(always)]
fn nf4_rounded<S: Packed, const R: u8>(s: S, w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) {
    let (n_x, blocks) = (w.check(x, out), w.cols / BLOCK);
    let (packed, x, room) = (w.packed.as_chunks().0, x.as_chunks().0, [Room::NEW; 4]);
    product(Nf4::<S, R> { s, packed, scales: w.scales, code, x, room, blocks }, packed.len() / blocks, n_x, out);
}

/// Rows of NF4, `code · scale` rounded as `R` says, and of x in order.
struct Nf4<'a, S, const R: u8> {
    s: S,
    packed: &'a [[u8; BLOCK / 2]],
    scales: Scales<'a>,
    code: &'a [f32; 16],
    x: &'a [[f32; BLOCK]],
    room: [Room; 4],
    /// Of a row.
    blocks: usize,
}

impl<S: Packed, const R: u8> Dots for Nf4<'_, S, R> {
    const GROUP: usize = S::GROUP;

    #[inline(always)]
    fn dots<const M: usize, const N: usize>(&mut self, rows: [usize; N], first: usize) -> [[f32; M]; N] {
        let blocks = self.blocks;
        let xs: [&[[f32; BLOCK]]; M] = std::array::from_fn(|i| &self.x[(first + i) * blocks..][..blocks]);
        let mut side_by_side: [Nf4Row<'_>; N] = [(&[], &[]); N];
        for ((row, room), j) in side_by_side.iter_mut().zip(&mut self.room).zip(rows) {
            *row = (&self.packed[j * blocks..][..blocks], self.scales.row(self.s, j, blocks, room));
        }
        nf4_dots::<S, R, M, N>(self.s, side_by_side, self.code, xs)
    }
}

/// The blocks of a row and their scales.
type Nf4Row<'a> = (&'a [[u8; BLOCK / 2]], &'a [f32]);

/// `N` rows of weights against `M` rows of x in order, all of the same number of blocks.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "a block is one of each row of W and of x")]
fn nf4_dots<S: Packed, const R: u8, const M: usize, const N: usize>(
    s: S,
    rows: [Nf4Row<'_>; N],
    code: &[f32; 16],
    xs: [&[[f32; BLOCK]]; M],
) -> [[f32; M]; N] {
    let blocks = xs[0].len();
    let rows = rows.map(|(packed, scales)| (&packed[..blocks], &scales[..blocks]));
    let mut acc = [[s.splat(0.0); M]; N];
    for b in 0..blocks {
        // Loops of constant length, which are unrolled: what an iterator steps over would go through memory.
        if M == 1 {
            for r in 0..N {
                s.prefetch(&rows[r].0[b], AHEAD);
                let of_row = weights::<S, R>(s, &rows[r].0[b], code, rows[r].1[b]);
                for v in 0..BLOCK / S::LANES {
                    acc[r][0] = s.fma(of_row.as_ref()[v], s.load(&xs[0][b][v * S::LANES..]), acc[r][0]);
                }
            }
            continue;
        }
        let mut of_rows = [weights::<S, R>(s, &rows[0].0[b], code, rows[0].1[b]); N];
        s.prefetch(&rows[0].0[b], AHEAD);
        for r in 1..N {
            s.prefetch(&rows[r].0[b], AHEAD);
            of_rows[r] = weights::<S, R>(s, &rows[r].0[b], code, rows[r].1[b]);
        }
        for v in 0..BLOCK / S::LANES {
            for i in 0..M {
                let x = s.load(&xs[i][b][v * S::LANES..]);
                for r in 0..N {
                    acc[r][i] = s.fma(of_rows[r].as_ref()[v], x, acc[r][i]);
                }
            }
        }
    }
    sums(s, acc)
}

/// The sum over the lanes of each vector.
#[inline(always)]
pub(super) fn sums<S: Simd, const M: usize, const N: usize>(s: S, acc: [[S::V; M]; N]) -> [[f32; M]; N] {
    let mut dots = [[0.0; M]; N];
    for (dots, acc) in dots.iter_mut().zip(acc) {
        for (dot, acc) in dots.iter_mut().zip(acc) {
            *dot = s.sum(acc);
        }
    }
    dots
}

/// An element of plain rows.
pub(super) trait Element: Copy {
    /// The first `LANES` elements of `w`.
    fn load<S: Packed>(s: S, w: &[Self]) -> S::V;
    /// All of `w`, fewer than `LANES` elements.
    fn load_tail<S: Packed>(s: S, w: &[Self]) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Packed>(s: S, w: &[Self]) -> S::V {
        s.load(w)
    }
    #[inline(always)]
    fn load_tail<S: Packed>(s: S, w: &[Self]) -> S::V {
        s.load_tail(w)
    }
}

/// The bits of bf16.
impl Element for u16 {
    #[inline(always)]
    fn load<S: Packed>(s: S, w: &[Self]) -> S::V {
        s.load_bf16(w)
    }
    #[inline(always)]
    fn load_tail<S: Packed>(s: S, w: &[Self]) -> S::V {
        let mut padded = [0.0; 16];
        for (to, &from) in padded.iter_mut().zip(w) {
            *to = f32::from_bits(u32::from(from) << 16);
        }
        s.load_tail(&padded[..w.len()])
    }
}

/// Rows of plain elements against groups of rows of x.
#[inline(always)]
pub(super) fn dense<S: Packed, T: Element>(s: S, w: &[T], cols: usize, x: &[f32], out: &mut [f32]) {
    let rows = w.len() / cols;
    assert_eq!(w.len(), rows * cols, "gemv: lengths differ");
    let n_x = check_x("gemv", rows, cols, x, out);
    product(Dense { s, w, cols, x }, rows, n_x, out);
}

/// Plain rows and rows of x.
struct Dense<'a, S, T> {
    s: S,
    w: &'a [T],
    cols: usize,
    x: &'a [f32],
}

impl<S: Packed, T: Element> Dots for Dense<'_, S, T> {
    const GROUP: usize = S::GROUP;

    #[inline(always)]
    fn dots<const M: usize, const N: usize>(&mut self, rows: [usize; N], first: usize) -> [[f32; M]; N] {
        let rows = rows.map(|j| &self.w[j * self.cols..][..self.cols]);
        dense_dots(self.s, rows, std::array::from_fn(|i| &self.x[(first + i) * self.cols..][..self.cols]))
    }
}

/// `N` rows against `M` rows of x, all equally long.
#[inline(always)]
fn dense_dots<S: Packed, T: Element, const M: usize, const N: usize>(
    s: S,
    rows: [&[T]; N],
    xs: [&[f32]; M],
) -> [[f32; M]; N] {
    let cols = xs[0].len();
    let (whole, body) = (cols - cols % (4 * S::LANES), cols - cols % S::LANES);
    let mut acc = [[s.splat(0.0); M]; N];
    for c in (0..whole).step_by(4 * S::LANES) {
        for row in &rows {
            for line in 0..(4 * S::LANES * size_of::<T>()).div_ceil(64) {
                s.prefetch(&row[c..], AHEAD + 64 * line);
            }
        }
        for c in (c..c + 4 * S::LANES).step_by(S::LANES) {
            step::<S, T, M, N>(s, rows, xs, c, &mut acc);
        }
    }
    for c in (whole..body).step_by(S::LANES) {
        step::<S, T, M, N>(s, rows, xs, c, &mut acc);
    }
    if body < cols {
        for (row, acc) in rows.iter().zip(&mut acc) {
            let weights = T::load_tail(s, &row[body..]);
            for i in 0..M {
                acc[i] = s.fma(weights, s.load_tail(&xs[i][body..]), acc[i]);
            }
        }
    }
    sums(s, acc)
}

/// Columns `c .. c + LANES` of [`dense_dots`].
#[inline(always)]
fn step<S: Packed, T: Element, const M: usize, const N: usize>(
    s: S,
    rows: [&[T]; N],
    xs: [&[f32]; M],
    c: usize,
    acc: &mut [[S::V; M]; N],
) {
    let mut weights = [s.splat(0.0); N];
    for r in 0..N {
        weights[r] = T::load(s, &rows[r][c..]);
    }
    for i in 0..M {
        let x = s.load(&xs[i][c..]);
        for r in 0..N {
            acc[r][i] = s.fma(weights[r], x, acc[r][i]);
        }
    }
}

/// w: the bits of bf16.
#[inline(always)]
pub(super) fn bf16_gemv<S: Packed>(s: S, w: &[u16], cols: usize, x: &[f32], out: &mut [f32]) {
    dense(s, w, cols, x, out);
}

#[inline(always)]
pub(super) fn f32_gemv<S: Packed>(s: S, w: &[f32], cols: usize, x: &[f32], out: &mut [f32]) {
    dense(s, w, cols, x, out);
}

#[inline(always)]
pub(super) fn i8_gemv<S: Packed>(s: S, w: &[i8], scales: &[f32], cols: usize, x: &[f32], out: &mut [f32]) {
    assert!(cols > 0 && cols.is_multiple_of(BLOCK), "i8_gemv: {cols} columns");
    let (rows, blocks) = (w.len() / cols, cols / BLOCK);
    assert!(w.len() == rows * cols && scales.len() == rows * blocks, "i8_gemv: lengths differ");
    let n_x = check_x("i8_gemv", rows, cols, x, out);
    product(Int8 { s, codes: w.as_chunks().0, scales, x: x.as_chunks().0, blocks }, rows, n_x, out);
}

/// Rows in 8 bits, their scales, and rows of x.
struct Int8<'a, S> {
    s: S,
    codes: &'a [[i8; BLOCK]],
    scales: &'a [f32],
    x: &'a [[f32; BLOCK]],
    /// Of a row.
    blocks: usize,
}

impl<S: Packed> Dots for Int8<'_, S> {
    const GROUP: usize = S::GROUP;

    #[inline(always)]
    fn dots<const M: usize, const N: usize>(&mut self, rows: [usize; N], first: usize) -> [[f32; M]; N] {
        let blocks = self.blocks;
        let rows = rows.map(|j| (&self.codes[j * blocks..][..blocks], &self.scales[j * blocks..][..blocks]));
        i8_dots(self.s, rows, std::array::from_fn(|i| &self.x[(first + i) * blocks..][..blocks]))
    }
}

/// `N` rows of codes with their scales against `M` rows of x, all of the same number of blocks.
#[inline(always)]
fn i8_dots<S: Packed, const M: usize, const N: usize>(
    s: S,
    rows: [(&[[i8; BLOCK]], &[f32]); N],
    xs: [&[[f32; BLOCK]]; M],
) -> [[f32; M]; N] {
    let mut acc = [[s.splat(0.0); M]; N];
    for b in 0..xs[0].len() {
        for ((codes, scales), acc) in rows.iter().zip(&mut acc) {
            let w = &codes[b];
            s.prefetch(w, AHEAD);
            // Within the block the factors are whole numbers; its scale comes once, at its end.
            let mut sums = [s.splat(0.0); M];
            for v in 0..BLOCK / S::LANES {
                let weights = s.load_i8(&w[v * S::LANES..]);
                for i in 0..M {
                    sums[i] = s.fma(weights, s.load(&xs[i][b][v * S::LANES..]), sums[i]);
                }
            }
            let scale = s.splat(scales[b]);
            for i in 0..M {
                acc[i] = s.fma(scale, sums[i], acc[i]);
            }
        }
    }
    sums(s, acc)
}
