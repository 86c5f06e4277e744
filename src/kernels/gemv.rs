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
    pub(super) fn row<'b, S: Packed>(
        &'b self,
        s: S,
        j: usize,
        blocks: usize,
        room: &'b mut [f32; MAX_NESTED],
    ) -> &'b [f32] {
        let nested = match self {
            Self::Each(scales) => return &scales[j * blocks..][..blocks],
            Self::Nested(nested) => nested,
        };
        let (mut at, end) = (nested.first + j * blocks, nested.first + (j + 1) * blocks);
        let mut done = 0;
        while at < end {
            let len = (nested.group - at % nested.group).min(end - at);
            let codes = &nested.codes[at..at + len];
            s.prefetch(codes, AHEAD / 4);
            nested_scales(
                s,
                codes,
                nested.map,
                nested.absmax[at / nested.group],
                nested.offset,
                &mut room[done..done + len],
            );
            (at, done) = (at + len, done + len);
        }
        &room[..blocks]
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
    type Block: AsRef<[Self::V]>;
    /// Rows of x whose sums fit into the registers.
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

/// Sum of four chains.
#[inline(always)]
fn total<S: Simd>(s: S, acc: &[S::V; 4]) -> f32 {
    s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])))
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
        Round::F32 => nf4_groups::<S, { Round::F32 as u8 }>(s, w, code, x, out),
        Round::Bf16 => nf4_groups::<S, { Round::Bf16 as u8 }>(s, w, code, x, out),
        Round::F16 => nf4_groups::<S, { Round::F16 as u8 }>(s, w, code, x, out),
        Round::F16ThenBf16 => nf4_groups::<S, { Round::F16ThenBf16 as u8 }>(s, w, code, x, out),
    }
}

#[inline(always)]
fn nf4_groups<S: Packed, const R: u8>(s: S, w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) {
    let n_x = w.check(x, out);
    let mut first = 0;
    while first < n_x {
        let count = S::GROUP.min(n_x - first);
        match count {
            1 => nf4_pass::<S, R, 1>(s, w, code, x, n_x, first, out),
            2 => nf4_pass::<S, R, 2>(s, w, code, x, n_x, first, out),
            3 => nf4_pass::<S, R, 3>(s, w, code, x, n_x, first, out),
            _ => nf4_pass::<S, R, 4>(s, w, code, x, n_x, first, out),
        }
        first += count;
    }
}

/// All rows of W against rows `first .. first + M` of x.
#[inline(always)]
fn nf4_pass<S: Packed, const R: u8, const M: usize>(
    s: S,
    w: Nf4Rows<'_>,
    code: &[f32; 16],
    x: &[f32],
    n_x: usize,
    first: usize,
    out: &mut [f32],
) {
    let blocks = w.cols / BLOCK;
    let xs: [&[[f32; BLOCK]]; M] =
        std::array::from_fn(|i| x[(first + i) * w.cols..(first + i + 1) * w.cols].as_chunks::<BLOCK>().0);
    let packed = w.packed.as_chunks::<{ BLOCK / 2 }>().0;
    let rows = packed.len() / blocks;
    let row = |j: usize| &packed[j * blocks..][..blocks];
    let mut room = [[0.0; MAX_NESTED]; 2];
    let mut write = |j: usize, dots: [f32; M]| out[j * n_x + first..][..M].copy_from_slice(&dots);
    let paired = streams::<M>(rows);
    for j in 0..paired {
        let [first, second] = &mut room;
        let scales = [w.scales.row(s, j, blocks, first), w.scales.row(s, paired + j, blocks, second)];
        let [one, other] = nf4_dots::<S, R, M, 2>(s, [(row(j), scales[0]), (row(paired + j), scales[1])], code, xs);
        write(j, one);
        write(paired + j, other);
    }
    for j in 2 * paired..rows {
        let scales = w.scales.row(s, j, blocks, &mut room[0]);
        let [dots] = nf4_dots::<S, R, M, 1>(s, [(row(j), scales)], code, xs);
        write(j, dots);
    }
}

/// The blocks of a row and their scales.
type Nf4Row<'a> = (&'a [[u8; BLOCK / 2]], &'a [f32]);

/// `W` rows of weights against `M` rows of x in order, all of the same number of blocks.
#[inline(always)]
fn nf4_dots<S: Packed, const R: u8, const M: usize, const W: usize>(
    s: S,
    rows: [Nf4Row<'_>; W],
    code: &[f32; 16],
    xs: [&[[f32; BLOCK]]; M],
) -> [[f32; M]; W] {
    let mut acc = [[[s.splat(0.0); 4]; M]; W];
    for b in 0..xs[0].len() {
        for ((packed, scales), acc) in rows.iter().zip(&mut acc) {
            s.prefetch(&packed[b], AHEAD);
            let weights = weights::<S, R>(s, &packed[b], code, scales[b]);
            let weights = weights.as_ref();
            for i in 0..M {
                let (acc, x) = (&mut acc[i], &xs[i][b]);
                for v in 0..BLOCK / S::LANES {
                    acc[v % 4] = s.fma(weights[v], s.load(&x[v * S::LANES..]), acc[v % 4]);
                }
            }
        }
    }
    let mut dots = [[0.0; M]; W];
    for (dots, acc) in dots.iter_mut().zip(&acc) {
        for (dot, acc) in dots.iter_mut().zip(acc) {
            *dot = total(s, acc);
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
    let mut first = 0;
    while first < n_x {
        let count = S::GROUP.min(n_x - first);
        match count {
            1 => dense_pass::<S, T, 1>(s, w, cols, x, n_x, first, out),
            2 => dense_pass::<S, T, 2>(s, w, cols, x, n_x, first, out),
            3 => dense_pass::<S, T, 3>(s, w, cols, x, n_x, first, out),
            _ => dense_pass::<S, T, 4>(s, w, cols, x, n_x, first, out),
        }
        first += count;
    }
}

#[inline(always)]
fn dense_pass<S: Packed, T: Element, const M: usize>(
    s: S,
    w: &[T],
    cols: usize,
    x: &[f32],
    n_x: usize,
    first: usize,
    out: &mut [f32],
) {
    let xs: [&[f32]; M] = std::array::from_fn(|i| &x[(first + i) * cols..(first + i + 1) * cols]);
    let rows = w.len() / cols;
    let row = |j: usize| &w[j * cols..][..cols];
    let mut write = |j: usize, dots: [f32; M]| out[j * n_x + first..][..M].copy_from_slice(&dots);
    let paired = streams::<M>(rows);
    for j in 0..paired {
        let [one, other] = dense_dots(s, [row(j), row(paired + j)], xs);
        write(j, one);
        write(paired + j, other);
    }
    for j in 2 * paired..rows {
        let [dots] = dense_dots(s, [row(j)], xs);
        write(j, dots);
    }
}

/// Rows of each of two streams. Two rows far apart are read side by side where their sums fit into the registers: memory
/// then has twice as much to fetch ahead.
#[inline(always)]
fn streams<const M: usize>(rows: usize) -> usize {
    if M == 1 { rows / 2 } else { 0 }
}

/// `W` rows against `M` rows of x, all equally long.
#[inline(always)]
fn dense_dots<S: Packed, T: Element, const M: usize, const W: usize>(
    s: S,
    rows: [&[T]; W],
    xs: [&[f32]; M],
) -> [[f32; M]; W] {
    let cols = xs[0].len();
    let (whole, body) = (cols - cols % (4 * S::LANES), cols - cols % S::LANES);
    let mut acc = [[[s.splat(0.0); 4]; M]; W];
    for c in (0..whole).step_by(4 * S::LANES) {
        for (row, acc) in rows.iter().zip(&mut acc) {
            let w = &row[c..c + 4 * S::LANES];
            for line in 0..(4 * S::LANES * size_of::<T>()).div_ceil(64) {
                s.prefetch(w, AHEAD + 64 * line);
            }
            for v in 0..4 {
                let weights = T::load(s, &w[v * S::LANES..]);
                for i in 0..M {
                    acc[i][v] = s.fma(weights, s.load(&xs[i][c + v * S::LANES..]), acc[i][v]);
                }
            }
        }
    }
    for (row, acc) in rows.iter().zip(&mut acc) {
        for c in (whole..body).step_by(S::LANES) {
            let weights = T::load(s, &row[c..]);
            for i in 0..M {
                acc[i][0] = s.fma(weights, s.load(&xs[i][c..]), acc[i][0]);
            }
        }
        if body < cols {
            let weights = T::load_tail(s, &row[body..]);
            for i in 0..M {
                acc[i][1] = s.fma(weights, s.load_tail(&xs[i][body..]), acc[i][1]);
            }
        }
    }
    let mut dots = [[0.0; M]; W];
    for (dots, acc) in dots.iter_mut().zip(&acc) {
        for (dot, acc) in dots.iter_mut().zip(acc) {
            *dot = total(s, acc);
        }
    }
    dots
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
    let w = w.as_chunks::<BLOCK>().0;
    for (i, x) in x.chunks_exact(cols).enumerate() {
        let x = x.as_chunks::<BLOCK>().0;
        let row = |j: usize| (&w[j * blocks..][..blocks], &scales[j * blocks..][..blocks]);
        let paired = rows / 2;
        for j in 0..paired {
            [out[j * n_x + i], out[(paired + j) * n_x + i]] = i8_dots(s, [row(j), row(paired + j)], x);
        }
        if rows % 2 == 1 {
            [out[(rows - 1) * n_x + i]] = i8_dots(s, [row(rows - 1)], x);
        }
    }
}

/// `W` rows of codes with their scales against a row of x, all of the same number of blocks.
#[inline(always)]
fn i8_dots<S: Packed, const W: usize>(s: S, rows: [(&[[i8; BLOCK]], &[f32]); W], x: &[[f32; BLOCK]]) -> [f32; W] {
    let mut acc = [s.splat(0.0); W];
    for (b, x) in x.iter().enumerate() {
        for ((codes, scales), acc) in rows.iter().zip(&mut acc) {
            let w = &codes[b];
            s.prefetch(w, AHEAD);
            // Within the block the factors are whole numbers; its scale comes once, at its end.
            let mut sum = s.mul(s.load_i8(w), s.load(x));
            for v in 1..BLOCK / S::LANES {
                sum = s.fma(s.load_i8(&w[v * S::LANES..]), s.load(&x[v * S::LANES..]), sum);
            }
            *acc = s.fma(s.splat(scales[b]), sum, *acc);
        }
    }
    let mut dots = [0.0; W];
    for (dot, acc) in dots.iter_mut().zip(acc) {
        *dot = s.sum(acc);
    }
    dots
}
