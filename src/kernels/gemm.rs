//! The inner products: one tile of a matrix product, and the kernels that pack its operands.
//!
//! A panel is made of 32-bit words kept in f32 slices. In f32 products a word is one element and spans one step of k; in
//! bf16 products it is a pair of elements, the lower k in the lower half, and spans two. B panels are `[depth, nr]`, A
//! panels `[depth, mr]` ([`PanelA::Columns`]) or, where the hardware loads whole rows, `[depth / 16, mr, 16]`
//! ([`PanelA::Rows`]); depth counts words. Packing sees one shape of problem, whatever a word stands for.

use super::generic::Simd;
use super::tiles::TileMut;

/// How the words of an A panel are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanelA {
    /// `[depth, mr]`.
    Columns,
    /// `[depth / 16, mr, 16]`: 16 words of a row stand together, as a tile register takes them.
    Rows,
}

/// What to do with a column strip of tiles of C.
pub struct TileC<'a, 'm> {
    /// Where it lies.
    pub c: &'a mut TileMut<'m>,
    /// Its first row in `c`.
    pub i: usize,
    /// Its first column in `c`; rows and columns beyond `c` are not written, but every panel has a row in it.
    pub j: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Whether the product is added to what is there, or replaces it.
    pub add: bool,
    /// What the next products read that is not near yet: a tile that has the time asks for it. May be empty.
    pub ahead: &'a [f32],
}

/// `c (+)= alpha · a · b` for the tiles of one column strip, one below the other;  a: one or more A panels, b: `[depth, nr]`.
pub type TileFn = fn(a: &[f32], b: &[f32], c: TileC<'_, '_>);

/// One kind of inner product of an instruction set.
#[derive(Clone, Copy)]
pub struct GemmTile {
    /// Rows of a tile.
    pub mr: usize,
    /// Columns of a tile.
    pub nr: usize,
    /// The layout of an A panel.
    pub panel_a: PanelA,
    /// The product.
    pub run: TileFn,
}

/// `(packed, scales, block, code, out)` of [`PairKernels::nf4`].
pub type Nf4Halves = fn(packed: &[u8], scales: &[f32], block: usize, code: &[f32; 16], out: &mut [u16]);

/// `(packed, scales, block, code, round, out)` of [`super::Kernels::nf4_blocks`].
pub type Nf4Blocks = fn(packed: &[u8], scales: &[f32], block: usize, code: &[f32; 16], round: bool, out: &mut [f32]);

/// Products of bf16 pairs with f32 accumulation, and what packs them.
#[derive(Clone, Copy)]
pub struct PairKernels {
    /// The product.
    pub tile: GemmTile,
    /// Whether it is faster than f32 on this machine, so that bf16 is what "best" means.
    pub fast: bool,
    /// Consecutive floats to words, rounded to bf16, ties to even;  x: `[n]`, out: `[ceil(n / 2)]`, a missing half is 0.
    pub pack_row: fn(x: &[f32], out: &mut [f32]),
    /// [`Self::pack_row`] in lines of 16 words that begin `stride` apart, the last one filled up with zeros;
    /// x: `[n]`, out: `[(ceil(n / 32) - 1) · stride + 16]` or more.
    pub pack_lines: fn(x: &[f32], out: &mut [f32], stride: usize),
    /// Rows two by two to words, rounded to bf16, ties to even: `out[p, i]` has `rows[2p][i]` in its lower half and
    /// `rows[2p + 1][i]`, or 0, in its upper;  out: `[ceil(count / 2), width]`, the other columns are left alone.
    pub join_rows: fn(rows: &Rows<'_>, out: &mut [f32], width: usize),
    /// [`Self::join_rows`] of rows that are bf16.
    pub join_halves: fn(rows: &Rows<'_, u16>, out: &mut [f32], width: usize),
    /// Whole blocks of NF4 to bf16: `out[i] = bf16(code[index i] · scales[i / block])`;
    /// packed: `[ceil(n / 2)]`, first element in the high nibble, block: even.
    pub nf4: Nf4Halves,
    /// [`super::Kernels::int8_row`] rounded to bf16, ties to even.
    pub int8: fn(codes: &[i8], absmax: f32, out: &mut [u16]),
}

/// A matrix of words on its way into a panel.
#[derive(Clone, Copy)]
pub struct Rows<'a, T = f32> {
    /// Row `r` is `data[r · stride ..][.. depth]`.
    pub data: &'a [T],
    /// Distance between rows.
    pub stride: usize,
    /// Number of rows.
    pub count: usize,
    /// Words of a row.
    pub depth: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Row `2p` and, if there is one, the row after it.
    #[inline(always)]
    pub(super) fn pair(&self, p: usize) -> (&'a [T], Option<&'a [T]>) {
        let row = |r: usize| &self.data[r * self.stride..][..self.depth];
        (row(2 * p), (2 * p + 1 < self.count).then(|| row(2 * p + 1)))
    }
}

impl Rows<'_> {
    /// # Panics
    /// If a row leaves the data, or the panel is smaller than `depth` rows of `width` with `count` columns from `first`.
    pub(super) fn check(&self, out: &[f32], width: usize, first: usize) {
        let Rows { data, stride, count, depth } = *self;
        assert!(count == 0 || (count - 1) * stride + depth <= data.len(), "transpose: rows leave the data");
        assert!(first + count <= width && out.len() >= depth * width, "transpose: rows leave the panel");
    }
}

/// `MR x (NV · LANES)` accumulators stay in registers over the whole depth; `fma(a, b, acc)` takes words.
#[inline(always)]
pub(super) fn tile<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    fma: impl Fn(S::V, S::V, S::V) -> S::V,
    a: &[f32],
    b: &[f32],
    out: TileC<'_, '_>,
) {
    let depth = check_strip(a, b, MR, NV * S::LANES);
    let TileC { c, i, j, alpha, add, .. } = out;
    for (panel, a) in a.chunks_exact(MR * depth).enumerate() {
        one_tile::<S, MR, NV>(s, &fma, a, b, TileC { c, i: i + panel * MR, j, alpha, add, ahead: &[] });
    }
}

/// The depth of the panels.
///
/// # Panics
/// If they do not fit each other.
pub(super) fn check_strip(a: &[f32], b: &[f32], mr: usize, nr: usize) -> usize {
    let depth = b.len() / nr;
    let whole = depth > 0 && b.len() == depth * nr && a.len().is_multiple_of(mr * depth);
    assert!(whole, "gemm tile: depths differ");
    depth
}

#[inline(always)]
fn one_tile<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    fma: &impl Fn(S::V, S::V, S::V) -> S::V,
    a: &[f32],
    b: &[f32],
    out: TileC<'_, '_>,
) {
    let nr = NV * S::LANES;
    let TileC { c, i: row0, j: col0, alpha, add, .. } = out;
    let mut acc = [[s.splat(0.0); NV]; MR];
    for (a_words, b_words) in a.chunks_exact(MR).zip(b.chunks_exact(nr)) {
        let mut b_vec = [s.splat(0.0); NV];
        for (v, b_vec) in b_vec.iter_mut().enumerate() {
            *b_vec = s.load(&b_words[v * S::LANES..]);
        }
        for r in 0..MR {
            let a_word = s.splat(a_words[r]);
            for v in 0..NV {
                acc[r][v] = fma(a_word, b_vec[v], acc[r][v]);
            }
        }
    }
    let (rows, cols) = (c.rows() - row0, c.cols() - col0);
    let alpha = s.splat(alpha);
    for (r, acc) in acc.iter().enumerate() {
        if r >= rows {
            break;
        }
        let row = &mut c.row(row0 + r)[col0..];
        for (v, acc) in acc.iter().enumerate() {
            let at = v * S::LANES;
            if at + S::LANES <= cols {
                let part = &mut row[at..at + S::LANES];
                s.store(if add { s.fma(alpha, *acc, s.load(part)) } else { s.mul(alpha, *acc) }, part);
            } else if at < cols {
                let part = &mut row[at..];
                s.store_tail(if add { s.fma(alpha, *acc, s.load_tail(part)) } else { s.mul(alpha, *acc) }, part);
            }
        }
    }
}

/// `out[p, first + r] = rows[r][p]`;  out: `[depth, width]`, columns before `first` are left alone, those behind the last
/// row's are left alone or zero.
#[inline(always)]
pub(super) fn transpose<S: Simd>(s: S, rows: &Rows<'_>, out: &mut [f32], width: usize, first: usize) {
    rows.check(out, width, first);
    let Rows { data, stride, count, depth } = *rows;
    for r0 in (0..count).step_by(S::LANES) {
        let block_rows = S::LANES.min(count - r0);
        for p0 in (0..depth).step_by(S::LANES) {
            let block_depth = S::LANES.min(depth - p0);
            let src = &data[r0 * stride + p0..];
            // A whole vector may be stored where it stays within the row, or runs into the next one, which is written later.
            let spill = first + r0 + S::LANES <= width || first + r0 == 0;
            let block = Rows { data: src, stride, count: block_rows, depth: block_depth };
            transpose_block(s, block, &mut out[p0 * width + first + r0..], width, spill);
        }
    }
}

/// [`transpose`] of at most `LANES x LANES` words: `out[p · width + r] = rows[r][p]`; with `spill`, the words behind a row
/// may become zero, up to `LANES` in all and as far as `out` reaches.
#[inline(always)]
fn transpose_block<S: Simd>(s: S, rows: Rows<'_>, out: &mut [f32], width: usize, spill: bool) {
    let Rows { data, stride, count, depth } = rows;
    assert!(count <= S::LANES && depth <= S::LANES, "transpose: a block of {count} x {depth}");
    let mut square = s.square(s.splat(0.0));
    if count == S::LANES && depth == S::LANES {
        for (i, vector) in square.as_mut().iter_mut().enumerate() {
            *vector = s.load(&data[i * stride..]);
        }
        for (p, column) in s.transpose(square).as_ref().iter().enumerate() {
            s.store(*column, &mut out[p * width..]);
        }
        return;
    }
    for (i, vector) in square.as_mut().iter_mut().enumerate() {
        if i < count {
            let row = &data[i * stride..];
            *vector = if depth == S::LANES { s.load(row) } else { s.load_tail(&row[..depth]) };
        }
    }
    for (p, column) in s.transpose(square).as_ref().iter().enumerate() {
        if p < depth {
            let out = &mut out[p * width..];
            if count == S::LANES || (spill && out.len() >= S::LANES) {
                s.store(*column, out);
            } else {
                s.store_tail(*column, &mut out[..count]);
            }
        }
    }
}

/// `out[p, i] = rows[p][i]`;  out: `[count, width]`, the other columns are left alone.
#[inline(always)]
pub(super) fn copy_rows<S: Simd>(s: S, rows: &Rows<'_>, out: &mut [f32], width: usize) {
    let Rows { data, stride, count, depth } = *rows;
    assert!(count == 0 || (count - 1) * stride + depth <= data.len(), "copy_rows: rows leave the data");
    assert!(depth <= width && out.len() >= count * width, "copy_rows: rows leave the panel");
    if depth.is_multiple_of(S::LANES) {
        for (p, out) in out.chunks_exact_mut(width).take(count).enumerate() {
            let vectors = data[p * stride..][..depth].chunks_exact(S::LANES);
            for (out, src) in out.chunks_exact_mut(S::LANES).zip(vectors) {
                s.store(s.load(src), out);
            }
        }
        return;
    }
    for p in 0..count {
        let (src, out) = (&data[p * stride..], &mut out[p * width..]);
        for i in (0..depth).step_by(S::LANES) {
            let whole = i + S::LANES <= depth;
            // What runs into the next row is written again with that row.
            let spill = depth == width && i + S::LANES <= src.len() && i + S::LANES <= out.len();
            if whole || (spill && p + 1 < count) {
                s.store(s.load(&src[i..]), &mut out[i..]);
            } else {
                s.store_tail(s.load_tail(&src[i..depth]), &mut out[i..depth]);
            }
        }
    }
}

/// `c[i, j] (+)= alpha · sums[j / nr, i, j % nr]` for all of c, whose place in `out` is not read;
/// sums: `[ceil(columns / nr), at least rows, nr]`.
#[inline(always)]
pub(super) fn store_sums<S: Simd>(s: S, sums: &[f32], nr: usize, out: TileC<'_, '_>) {
    let TileC { c, alpha, add, .. } = out;
    let height = check_sums(sums, nr, c);
    let alpha = s.splat(alpha);
    for i in 0..c.rows() {
        for (panel, out) in c.row(i).chunks_mut(nr).enumerate() {
            let sums = &sums[(panel * height + i) * nr..][..nr];
            for at in (0..out.len()).step_by(S::LANES) {
                let value = s.load(&sums[at..]);
                if at + S::LANES <= out.len() {
                    let part = &mut out[at..at + S::LANES];
                    s.store(if add { s.fma(alpha, value, s.load(part)) } else { s.mul(alpha, value) }, part);
                } else {
                    let part = &mut out[at..];
                    s.store_tail(if add { s.fma(alpha, value, s.load_tail(part)) } else { s.mul(alpha, value) }, part);
                }
            }
        }
    }
}

/// The rows of a panel of sums.
///
/// # Panics
/// If they do not fit the tile.
fn check_sums(sums: &[f32], nr: usize, c: &TileMut<'_>) -> usize {
    let panels = c.cols().div_ceil(nr);
    let height = sums.len() / (panels * nr).max(1);
    assert!(nr.is_multiple_of(16) && sums.len() == panels * height * nr && height >= c.rows(), "sums of another shape");
    height
}

/// Whole blocks of NF4, dequantized and optionally rounded to bf16.
#[inline(always)]
pub(super) fn nf4_blocks<S: Simd>(
    s: S,
    packed: &[u8],
    scales: &[f32],
    block: usize,
    code: &[f32; 16],
    round: bool,
    out: &mut [f32],
) {
    check_nf4(packed.len(), scales.len(), block, out.len());
    let mut table = [0.0; 16];
    for ((out, bytes), scale) in out.chunks_mut(block).zip(packed.chunks(block / 2)).zip(scales) {
        for (table, code) in table.chunks_exact_mut(S::LANES).zip(code.chunks_exact(S::LANES)) {
            let scaled = s.mul(s.load(code), s.splat(*scale));
            s.store(if round { s.round_bf16(scaled) } else { scaled }, table);
        }
        let mut vectors = out.chunks_exact_mut(S::LANES);
        for (out, bytes) in (&mut vectors).zip(bytes.chunks_exact(S::LANES / 2)) {
            s.store(s.nf4_lookup(bytes, &table), out);
        }
        let tail = vectors.into_remainder();
        if !tail.is_empty() {
            // The tail's bytes, moved to a buffer that is long enough for a whole lookup.
            let mut whole = [0; 8];
            let rest = &bytes[bytes.len() - tail.len().div_ceil(2)..];
            whole[..rest.len()].copy_from_slice(rest);
            s.store_tail(s.nf4_lookup(&whole, &table), tail);
        }
    }
}

/// # Panics
/// If bytes, scales and elements do not fit each other.
pub(super) fn check_nf4(packed: usize, scales: usize, block: usize, out: usize) {
    assert!(block >= 32 && block.is_multiple_of(32), "nf4: blocks of {block}");
    assert!(packed == out.div_ceil(2) && scales == out.div_ceil(block), "nf4: lengths differ");
}

/// Widens bf16 to f32, exactly.
#[inline(always)]
pub(super) fn widen<S: Simd>(s: S, x: &[u16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "widen: lengths differ");
    let (mut xs, mut outs) = (x.chunks_exact(S::LANES), out.chunks_exact_mut(S::LANES));
    for (x, out) in (&mut xs).zip(&mut outs) {
        s.store(s.load_bf16(x), out);
    }
    for (out, x) in outs.into_remainder().iter_mut().zip(xs.remainder()) {
        *out = f32::from_bits(u32::from(*x) << 16);
    }
}

/// The slow twins.
pub(super) mod reference {
    use super::*;
    use half::bf16;

    pub(in crate::kernels) const MR: usize = 4;
    pub(in crate::kernels) const NR: usize = 16;

    fn tile(a: &[f32], b: &[f32], out: TileC<'_, '_>, product: impl Fn(f32, f32, f32) -> f32) {
        let TileC { c, i, j, alpha, add, .. } = out;
        let depth = check_strip(a, b, MR, NR);
        let cols = (c.cols() - j).min(NR);
        for (panel, a) in a.chunks_exact(MR * depth).enumerate() {
            let first = i + panel * MR;
            for r in 0..(c.rows() - first).min(MR) {
                let row = &mut c.row(first + r)[j..j + cols];
                for (v, out) in row.iter_mut().enumerate() {
                    let pairs = a.chunks_exact(MR).zip(b.chunks_exact(NR));
                    let sum = pairs.fold(0.0, |sum, (a, b)| product(a[r], b[v], sum));
                    *out = if add { *out + alpha * sum } else { alpha * sum };
                }
            }
        }
    }

    pub(in crate::kernels) fn tile_f32(a: &[f32], b: &[f32], out: TileC<'_, '_>) {
        tile(a, b, out, |a, b, sum| sum + a * b);
    }

    /// The two halves of a word.
    fn pair(word: f32) -> (f32, f32) {
        let bits = word.to_bits();
        (f32::from_bits(bits << 16), f32::from_bits(bits & 0xFFFF_0000))
    }

    pub(in crate::kernels) fn tile_pairs(a: &[f32], b: &[f32], out: TileC<'_, '_>) {
        tile(a, b, out, |a, b, sum| {
            let ((a0, a1), (b0, b1)) = (pair(a), pair(b));
            sum + a0 * b0 + a1 * b1
        });
    }

    pub(in crate::kernels) fn transpose(rows: &Rows<'_>, out: &mut [f32], width: usize, first: usize) {
        rows.check(out, width, first);
        for r in 0..rows.count {
            for p in 0..rows.depth {
                out[p * width + first + r] = rows.data[r * rows.stride + p];
            }
        }
    }

    pub(in crate::kernels) fn copy_rows(rows: &Rows<'_>, out: &mut [f32], width: usize) {
        for p in 0..rows.count {
            out[p * width..][..rows.depth].copy_from_slice(&rows.data[p * rows.stride..][..rows.depth]);
        }
    }

    pub(in crate::kernels) fn store_sums(sums: &[f32], nr: usize, out: TileC<'_, '_>) {
        let TileC { c, alpha, add, .. } = out;
        let height = check_sums(sums, nr, c);
        for i in 0..c.rows() {
            for (j, out) in c.row(i).iter_mut().enumerate() {
                let value = sums[(j / nr * height + i) * nr + j % nr];
                *out = if add { *out + alpha * value } else { alpha * value };
            }
        }
    }

    pub(in crate::kernels) fn nf4_blocks(
        packed: &[u8],
        scales: &[f32],
        block: usize,
        code: &[f32; 16],
        round: bool,
        out: &mut [f32],
    ) {
        check_nf4(packed.len(), scales.len(), block, out.len());
        for (i, out) in out.iter_mut().enumerate() {
            let nibble = if i % 2 == 0 { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
            let value = code[usize::from(nibble)] * scales[i / block];
            *out = if round { bf16::from_f32(value).to_f32() } else { value };
        }
    }

    pub(in crate::kernels) fn widen(x: &[u16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "widen: lengths differ");
        for (out, x) in out.iter_mut().zip(x) {
            *out = bf16::from_bits(*x).to_f32();
        }
    }

    fn word(low: u16, high: u16) -> f32 {
        f32::from_bits(u32::from(low) | u32::from(high) << 16)
    }

    pub(in crate::kernels) fn pack_row(x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len().div_ceil(2), out.len(), "pack_row: lengths differ");
        for (out, x) in out.iter_mut().zip(x.chunks(2)) {
            let bits = |i: usize| x.get(i).map_or(0, |x| bf16::from_f32(*x).to_bits());
            *out = word(bits(0), bits(1));
        }
    }

    pub(in crate::kernels) fn pack_lines(x: &[f32], out: &mut [f32], stride: usize) {
        for (x, out) in x.chunks(32).zip(out.chunks_mut(stride)) {
            pack_row(x, &mut out[..x.len().div_ceil(2)]);
            out[x.len().div_ceil(2)..16].fill(0.0);
        }
    }

    pub(in crate::kernels) fn join_rows(rows: &Rows<'_>, out: &mut [f32], width: usize) {
        join(rows, out, width, |x| bf16::from_f32(x).to_bits());
    }

    pub(in crate::kernels) fn join_halves(rows: &Rows<'_, u16>, out: &mut [f32], width: usize) {
        join(rows, out, width, |x| x);
    }

    fn join<T: Copy>(rows: &Rows<'_, T>, out: &mut [f32], width: usize, half: impl Fn(T) -> u16) {
        for p in 0..rows.count.div_ceil(2) {
            let (low, high) = rows.pair(p);
            for (i, out) in out[p * width..][..rows.depth].iter_mut().enumerate() {
                *out = word(half(low[i]), high.map_or(0, |high| half(high[i])));
            }
        }
    }

    pub(in crate::kernels) fn nf4_halves(
        packed: &[u8],
        scales: &[f32],
        block: usize,
        code: &[f32; 16],
        out: &mut [u16],
    ) {
        check_nf4(packed.len(), scales.len(), block, out.len());
        for (i, out) in out.iter_mut().enumerate() {
            let nibble = if i % 2 == 0 { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
            *out = bf16::from_f32(code[usize::from(nibble)] * scales[i / block]).to_bits();
        }
    }
}
