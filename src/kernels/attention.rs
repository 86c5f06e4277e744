//! Causal attention on one tile of queries and one block of keys, forward and backward, with everything in cache.
//!
//! Dao et al. 2022, algorithm 1, and Dao 2023, algorithm 2. With `s = q kᵀ`, `p = exp(scale · s - lse)` and
//! `delta = Σ dout ⊙ out` of a query: `out += p v`, `dv += pᵀ dout`, `ds = p ⊙ (dout vᵀ - delta)`, `dq += ds k`,
//! `dk += dsᵀ q` (the last two still to be multiplied by `scale`). Exponentials are powers of two of `scale · log2 e · s`.
//!
//! | operand | layout |
//! | --- | --- |
//! | queries, dout | `[chunk of DIMS][QUERIES][QUERY_STRIDE]`, zero up to a multiple of [`PAD`] columns |
//! | keys, values as left factors of a transpose | panels `[panel][dim][panel width]`, zero after the last key |
//! | keys, values as rows | `[keys][width]`, `width` = dim up to a multiple of [`PAD`], zero there |
//! | scores, p, ds | `[QUERIES][KEYS]` |
//!
//! All five products run on one register tile of `MR x NV · LANES` sums: a vector of the right operand times a broadcast
//! of the left one, read by rows (q, p, ds) or by columns (pᵀ, dsᵀ), so nothing but K and V is ever transposed.
//! Tiles above the diagonal are left out; within a tile the scores there become zeros after the exponential.

use super::generic::Simd;
use std::ops::Range;

/// Queries of a tile.
pub const QUERIES: usize = 48;
/// Keys of a block; a multiple of every panel's width.
pub const KEYS: usize = 192;
/// Head dimensions of a chunk of packed queries.
pub const DIMS: usize = 256;
/// Distance of packed query rows: 17 cache lines, so that rows do not meet in the sets of the cache.
pub const QUERY_STRIDE: usize = 272;
/// Packed rows are padded to a multiple of this many columns.
pub const PAD: usize = 16;
/// Keys whose scores the path for few queries holds at a time.
pub const FEW_KEYS: usize = 64;

/// The attention kernels of one instruction set.
pub struct Attention {
    /// Keys of a packed panel; divides [`KEYS`].
    pub panel: usize,
    /// Adds a block of keys to the running softmax of a tile of queries.
    pub forward: fn(&Block<'_>, v_rows: &[f32], &mut Softmax<'_>),
    /// Adds a block of keys' part to the gradients of a tile of queries, and the tile's to those of the keys and values.
    pub backward: fn(&Block<'_>, &Upstream<'_>, &mut Gradients<'_>),
    /// The middle of `forward`: adds the scores in `Softmax::scores` to the running softmax, leaving p in their place.
    pub softmax: fn(&Block<'_>, &mut Softmax<'_>),
    /// The middle of `backward`: `(p, ds)` hold `q kᵀ` and `dout vᵀ` before and p and ds after.
    pub slopes: Slopes,
    /// Adds keys and values, as they lie in memory, to the running softmax of a few query rows.
    pub few: fn(&Few<'_>, &mut Softmax<'_>),
}

/// A function of a block, the log-sum-exp and delta of its queries, and two matrices `[n, KEYS]`.
pub type Slopes = fn(&Block<'_>, lse: &[f32], delta: &[f32], p: &mut [f32], ds: &mut [f32]);

/// A tile of queries of one head and a block of keys.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// Packed queries.
    pub q: &'a [f32],
    /// Packed panels of keys.
    pub k_panels: &'a [f32],
    /// Number of queries, at most [`QUERIES`].
    pub n: usize,
    /// Number of keys, at most [`KEYS`].
    pub keys: usize,
    /// Width of a head.
    pub dim: usize,
    /// Query `i` sees the keys `j <= i + ahead`.
    pub ahead: isize,
    /// Factor of the scores.
    pub scale: f32,
    /// Whether p and ds are rounded to bfloat16 before they are multiplied.
    pub bf16: bool,
}

/// The running softmax of some query rows.
pub struct Softmax<'a> {
    /// Scratch: `[QUERIES, KEYS]`, or `[rows, FEW_KEYS]` for few queries.
    pub scores: &'a mut [f32],
    /// Σ p v so far, `[n, width]`.
    pub acc: &'a mut [f32],
    /// Largest `scale · log2 e · s` so far, `[n]`; starts as negative infinity.
    pub max: &'a mut [f32],
    /// Σ p so far, `[n]`.
    pub sum: &'a mut [f32],
}

/// What the backward of a block reads beside the block.
#[derive(Clone, Copy)]
pub struct Upstream<'a> {
    /// Packed gradient of the output, in the queries' layout.
    pub dout: &'a [f32],
    /// Packed panels of values.
    pub v_panels: &'a [f32],
    /// Keys as rows.
    pub k_rows: &'a [f32],
    /// Log-sum-exp of the scaled scores, `[n]`.
    pub lse: &'a [f32],
    /// Σ dout ⊙ out, `[n]`.
    pub delta: &'a [f32],
}

/// What the backward of a block adds to, and its scratch.
pub struct Gradients<'a> {
    /// Scratch, `[QUERIES, KEYS]`.
    pub p: &'a mut [f32],
    /// Scratch, `[QUERIES, KEYS]`.
    pub ds: &'a mut [f32],
    /// `[n, width]`, without the factor `scale`.
    pub dq: &'a mut [f32],
    /// `[keys, width]`, without the factor `scale`.
    pub dk: &'a mut [f32],
    /// `[keys, width]`.
    pub dv: &'a mut [f32],
}

/// A few query rows of one key-value head against keys as they lie in memory.
#[derive(Clone, Copy)]
pub struct Few<'a> {
    /// `[rows, dim]`.
    pub q: &'a [f32],
    /// Keys from the first one's head on, rows `stride` apart.
    pub k: &'a [f32],
    /// Values likewise.
    pub v: &'a [f32],
    /// Distance of keys, and of values.
    pub stride: usize,
    /// Number of keys.
    pub keys: usize,
    /// Width of a head.
    pub dim: usize,
    /// Row `i` sees the first `seen[i]` keys.
    pub seen: &'a [usize],
    /// Factor of the scores.
    pub scale: f32,
    /// Whether operands are rounded to bfloat16.
    pub bf16: bool,
}

impl Block<'_> {
    /// Width of padded rows.
    pub fn width(&self) -> usize {
        self.dim.next_multiple_of(PAD)
    }

    /// Keys that query `i` sees.
    #[inline(always)]
    pub fn seen(&self, i: usize) -> usize {
        (i as isize + self.ahead + 1).clamp(0, self.keys as isize) as usize
    }

    /// The first query that sees key `j`.
    #[inline(always)]
    pub fn first_query(&self, j: usize) -> usize {
        (j as isize - self.ahead).clamp(0, self.n as isize) as usize
    }

    pub(super) fn check(&self) {
        assert!(self.n <= QUERIES && self.keys <= KEYS, "attention: {} queries, {} keys", self.n, self.keys);
    }
}

/// `2^x` for every lane, within 2 ulp for x in [-126, 127]; 2^-126 below; NaN stays NaN.
///
/// `x = n + r`, |r| <= 1/2; a minimax polynomial of degree 5 in r (relative error 9.2e-8, exact at 0); scaled by 2^n.
#[inline(always)]
fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-126.0), x);
    let n = s.round(x);
    let r = s.sub(x, n);
    let mut p = s.splat(0.001_326_472_7);
    // Beside ln 2, where it deviates least, not ln 2 itself.
    let linear = f32::from_bits(0x3F31_7215);
    for c in [0.009_671_513, 0.055_507_336, 0.240_222_42, linear, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    s.scale2(p, n)
}

/// Operands of [`tile`]: the left one, read by rows or by columns `STRIDE` apart, and the right one.
#[derive(Clone, Copy)]
struct Operands<'a> {
    a: &'a [f32],
    b: &'a [f32],
    b_stride: usize,
    c_stride: usize,
    /// Whether the old content of c stays in the sum.
    add: bool,
}

/// `c[i, j] (+)= Σ_p a(i, p) · b[p, j]` over `depth` for `MR` rows from `row` on and `NV` vectors.
///
/// `a(i, p)` is `a[i · STRIDE + p]` by rows and `a[p · STRIDE + i]` by columns.
#[inline(always)]
fn tile<S: Simd, const MR: usize, const NV: usize, const BY_ROWS: bool, const STRIDE: usize>(
    s: S,
    o: &Operands<'_>,
    row: usize,
    depth: Range<usize>,
    c: &mut [f32],
) {
    let nr = NV * S::LANES;
    let (p0, count) = (depth.start, depth.len());
    let mut acc = [[s.splat(0.0); NV]; MR];
    if count > 0 {
        // Element (r, p) of the left operand is at `first + r · by_row + p · by_depth`. Both operands are checked here, once:
        // with checks inside the loop the compiler keeps the sums in memory.
        let (by_row, by_depth) = if BY_ROWS { (STRIDE, 1) } else { (1, STRIDE) };
        let first = row * by_row + p0 * by_depth;
        assert!(first + (MR - 1) * by_row + (count - 1) * by_depth < o.a.len(), "attention: left operand too short");
        assert!((p0 + count - 1) * o.b_stride + nr <= o.b.len(), "attention: right operand too short");
        let (a, b) = (&o.a[first..], &o.b[p0 * o.b_stride..]);
        for p in 0..count {
            // SAFETY: p < count, and the assert on `b` covers the row of the last p.
            let b = unsafe { b.get_unchecked(p * o.b_stride..p * o.b_stride + nr) };
            let mut b_vec = [s.splat(0.0); NV];
            for (v, b_vec) in b_vec.iter_mut().enumerate() {
                *b_vec = s.load(&b[v * S::LANES..]);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: r < MR and p < count, and the assert on `a` covers the last of both.
                let a = s.splat(unsafe { *a.get_unchecked(r * by_row + p * by_depth) });
                for (acc, b) in acc.iter_mut().zip(&b_vec) {
                    *acc = s.fma(a, *b, *acc);
                }
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        let c = &mut c[(row + r) * o.c_stride..][..nr];
        for (v, acc) in acc.iter().enumerate() {
            let c = &mut c[v * S::LANES..];
            let sum = if o.add { s.add(s.load(c), *acc) } else { *acc };
            s.store(sum, c);
        }
    }
}

/// [`tile`] over `rows`, each with the depth that `depth(row, rows of the tile)` names.
#[inline(always)]
fn band<S: Simd, const MR: usize, const NV: usize, const BY_ROWS: bool, const STRIDE: usize>(
    s: S,
    o: &Operands<'_>,
    rows: Range<usize>,
    depth: impl Fn(usize, usize) -> Range<usize>,
    c: &mut [f32],
) {
    let mut i = rows.start;
    while i < rows.end {
        let left = rows.end - i;
        if left >= MR {
            tile::<S, MR, NV, BY_ROWS, STRIDE>(s, o, i, depth(i, MR), c);
            i += MR;
        } else if MR > 8 && left >= 8 {
            tile::<S, 8, NV, BY_ROWS, STRIDE>(s, o, i, depth(i, 8), c);
            i += 8;
        } else if left >= 4 {
            tile::<S, 4, NV, BY_ROWS, STRIDE>(s, o, i, depth(i, 4), c);
            i += 4;
        } else if left >= 2 {
            tile::<S, 2, NV, BY_ROWS, STRIDE>(s, o, i, depth(i, 2), c);
            i += 2;
        } else {
            tile::<S, 1, NV, BY_ROWS, STRIDE>(s, o, i, depth(i, 1), c);
            i += 1;
        }
    }
}

/// `scores[i, j] = q_i · k_j` where query i sees key j; elsewhere unspecified.
#[inline(always)]
fn score_product<S: Simd, const MR: usize>(s: S, t: &Block<'_>, q: &[f32], panels: &[f32], scores: &mut [f32]) {
    let nr = 2 * S::LANES;
    for (panel, j) in panels.chunks(nr * t.dim).zip((0..t.keys).step_by(nr)) {
        for (chunk, d0) in (0..t.dim).step_by(DIMS).enumerate() {
            let depth = DIMS.min(t.dim - d0);
            let o = Operands {
                a: &q[chunk * QUERIES * QUERY_STRIDE..],
                b: &panel[d0 * nr..],
                b_stride: nr,
                c_stride: KEYS,
                add: chunk > 0,
            };
            band::<S, MR, 2, true, QUERY_STRIDE>(s, &o, t.first_query(j)..t.n, |_, _| 0..depth, &mut scores[j..]);
        }
    }
}

/// `c[i, :] += Σ_j p[i, j] · rows[j, :]`;  c: `[n, width]`, rows: `[keys, width]`.
#[inline(always)]
fn row_product<S: Simd, const MR: usize>(s: S, t: &Block<'_>, p: &[f32], rows: &[f32], c: &mut [f32]) {
    let (nr, width) = (2 * S::LANES, t.width());
    let depth = |i: usize, r: usize| 0..t.seen(i + r - 1);
    for j in (0..width).step_by(nr) {
        let o = Operands { a: p, b: &rows[j..], b_stride: width, c_stride: width, add: true };
        if width - j >= nr {
            band::<S, MR, 2, true, KEYS>(s, &o, 0..t.n, depth, &mut c[j..]);
        } else {
            band::<S, MR, 1, true, KEYS>(s, &o, 0..t.n, depth, &mut c[j..]);
        }
    }
}

/// `c[j, :] += Σ_i p[i, j] · q[i, :]`;  c: `[keys, width]`, q: packed queries.
#[inline(always)]
fn column_product<S: Simd, const MR: usize>(s: S, t: &Block<'_>, p: &[f32], q: &[f32], c: &mut [f32]) {
    let (nr, width) = (2 * S::LANES, t.width());
    let depth = |j: usize, _| t.first_query(j)..t.n;
    let keys = 0..t.seen(t.n - 1);
    for j in (0..width).step_by(nr) {
        // DIMS is a multiple of nr, so a panel of columns lies in one chunk.
        let at = j / DIMS * QUERIES * QUERY_STRIDE + j % DIMS;
        let o = Operands { a: p, b: &q[at..], b_stride: QUERY_STRIDE, c_stride: width, add: true };
        if width - j >= nr {
            band::<S, MR, 2, false, KEYS>(s, &o, keys.clone(), depth, &mut c[j..]);
        } else {
            band::<S, MR, 1, false, KEYS>(s, &o, keys.clone(), depth, &mut c[j..]);
        }
    }
}

/// The largest element of `row`, whose length is a multiple of the lanes.
#[inline(always)]
fn row_max<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut max = s.splat(f32::NEG_INFINITY);
    for x in row.chunks_exact(S::LANES) {
        max = s.max(max, s.load(x));
    }
    s.max_lane(max)
}

/// `row[i] = 2^(c · row[i] - shift)`, rounded if asked; the sum is that of the unrounded powers.
#[inline(always)]
fn row_exp2<S: Simd>(s: S, row: &mut [f32], c: f32, shift: f32, bf16: bool) -> f32 {
    let (c, shift) = (s.splat(c), s.splat(-shift));
    let mut sum = s.splat(0.0);
    for x in row.chunks_exact_mut(S::LANES) {
        let e = exp2(s, s.fma(c, s.load(x), shift));
        sum = s.add(sum, e);
        s.store(if bf16 { s.round_bf16(e) } else { e }, x);
    }
    s.sum(sum)
}

/// `x[i] *= factor`, a multiple of the lanes long.
#[inline(always)]
fn row_scale<S: Simd>(s: S, x: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(s.mul(s.load(x), factor), x);
    }
}

/// The running softmax of one row: its scores become powers, its accumulator shrinks if the maximum grew.
#[inline(always)]
fn softmax_row<S: Simd>(
    s: S,
    row: &mut [f32],
    seen: usize,
    bf16: bool,
    c: f32,
    old: (f32, f32),
    acc: &mut [f32],
) -> (f32, f32) {
    let padded = seen.next_multiple_of(S::LANES);
    row[seen..padded].fill(f32::NEG_INFINITY);
    let (old_max, old_sum) = old;
    let row_max = row_max(s, &row[..padded]) * c;
    let max = if row_max <= old_max { old_max } else { row_max };
    let new = row_exp2(s, &mut row[..padded], c, max, bf16);
    row[seen..].fill(0.0);
    if max == old_max {
        return (max, old_sum + new);
    }
    let shrink = (old_max - max).exp2();
    row_scale(s, acc, shrink);
    (max, old_sum * shrink + new)
}

#[inline(always)]
pub(super) fn softmax<S: Simd>(s: S, t: &Block<'_>, st: &mut Softmax<'_>) {
    let (width, c) = (t.width(), t.scale * std::f32::consts::LOG2_E);
    for i in 0..t.n {
        // The row with its padding; keys may end between two vectors.
        let row = &mut st.scores[i * KEYS..][..t.keys.next_multiple_of(S::LANES)];
        let seen = t.seen(i);
        if seen == 0 {
            row.fill(0.0);
            continue;
        }
        let acc = &mut st.acc[i * width..][..width];
        (st.max[i], st.sum[i]) = softmax_row(s, row, seen, t.bf16, c, (st.max[i], st.sum[i]), acc);
    }
}

#[inline(always)]
pub(super) fn forward<S: Simd, const MR: usize>(s: S, t: &Block<'_>, v_rows: &[f32], st: &mut Softmax<'_>) {
    t.check();
    score_product::<S, MR>(s, t, t.q, t.k_panels, st.scores);
    softmax(s, t, st);
    row_product::<S, MR>(s, t, st.scores, v_rows, st.acc);
}

#[inline(always)]
pub(super) fn slopes<S: Simd>(s: S, t: &Block<'_>, lse: &[f32], delta: &[f32], p: &mut [f32], ds: &mut [f32]) {
    let (scale, padded) = (s.splat(t.scale * std::f32::consts::LOG2_E), t.keys.next_multiple_of(S::LANES));
    for i in 0..t.n {
        let seen = t.seen(i);
        let (p_row, ds_row) = (&mut p[i * KEYS..][..padded], &mut ds[i * KEYS..][..padded]);
        let (shift, delta) = (s.splat(-lse[i] * std::f32::consts::LOG2_E), s.splat(delta[i]));
        let lanes = seen.next_multiple_of(S::LANES);
        let pairs = p_row[..lanes].chunks_exact_mut(S::LANES).zip(ds_row[..lanes].chunks_exact_mut(S::LANES));
        for (p, ds) in pairs {
            let power = exp2(s, s.fma(scale, s.load(p), shift));
            let slope = s.mul(power, s.sub(s.load(ds), delta));
            if t.bf16 {
                s.store(s.round_bf16(power), p);
                s.store(s.round_bf16(slope), ds);
            } else {
                s.store(power, p);
                s.store(slope, ds);
            }
        }
        p_row[seen..].fill(0.0);
        ds_row[seen..].fill(0.0);
    }
}

#[inline(always)]
pub(super) fn backward<S: Simd, const MR: usize>(s: S, t: &Block<'_>, u: &Upstream<'_>, g: &mut Gradients<'_>) {
    t.check();
    if t.n == 0 {
        return;
    }
    score_product::<S, MR>(s, t, t.q, t.k_panels, g.p);
    score_product::<S, MR>(s, t, u.dout, u.v_panels, g.ds);
    slopes(s, t, u.lse, u.delta, g.p, g.ds);
    column_product::<S, MR>(s, t, g.p, u.dout, g.dv);
    column_product::<S, MR>(s, t, g.ds, t.q, g.dk);
    row_product::<S, MR>(s, t, g.ds, u.k_rows, g.dq);
}

/// `scores[r, j] = q_r · k_j` for `R` rows from `first` on.
#[inline(always)]
fn few_dots<S: Simd, const R: usize>(s: S, t: &Few<'_>, first: usize, keys: Range<usize>, scores: &mut [f32]) {
    let body = t.dim - t.dim % S::LANES;
    let mut q = [&t.q[..0]; R];
    for (r, q) in q.iter_mut().enumerate() {
        *q = &t.q[(first + r) * t.dim..][..t.dim];
    }
    for (at, j) in keys.enumerate() {
        let k = &t.k[j * t.stride..][..t.dim];
        let mut acc = [s.splat(0.0); R];
        for d in (0..body).step_by(S::LANES) {
            let x = s.load(&k[d..]);
            let x = if t.bf16 { s.round_bf16(x) } else { x };
            for r in 0..R {
                acc[r] = s.fma(s.load(&q[r][d..]), x, acc[r]);
            }
        }
        if body < t.dim {
            let x = s.load_tail(&k[body..]);
            let x = if t.bf16 { s.round_bf16(x) } else { x };
            for r in 0..R {
                acc[r] = s.fma(s.load_tail(&q[r][body..]), x, acc[r]);
            }
        }
        for r in 0..R {
            scores[(first + r) * FEW_KEYS + at] = s.sum(acc[r]);
        }
    }
}

/// `y += alpha · x`, x rounded if asked.
#[inline(always)]
fn add_row<S: Simd>(s: S, alpha: f32, x: &[f32], bf16: bool, y: &mut [f32]) {
    let alpha = s.splat(alpha);
    let (mut xs, mut ys) = (x.chunks_exact(S::LANES), y.chunks_exact_mut(S::LANES));
    for (x, y) in (&mut xs).zip(&mut ys) {
        let x = s.load(x);
        s.store(s.fma(alpha, if bf16 { s.round_bf16(x) } else { x }, s.load(y)), y);
    }
    let (x, y) = (s.load_tail(xs.remainder()), ys.into_remainder());
    s.store_tail(s.fma(alpha, if bf16 { s.round_bf16(x) } else { x }, s.load_tail(y)), y);
}

#[inline(always)]
pub(super) fn few<S: Simd>(s: S, t: &Few<'_>, st: &mut Softmax<'_>) {
    let (rows, width) = (t.seen.len(), t.dim.next_multiple_of(PAD));
    let c = t.scale * std::f32::consts::LOG2_E;
    for k0 in (0..t.keys).step_by(FEW_KEYS) {
        let keys = k0..t.keys.min(k0 + FEW_KEYS);
        let mut r = 0;
        while r < rows {
            if rows - r >= 4 {
                few_dots::<S, 4>(s, t, r, keys.clone(), st.scores);
                r += 4;
            } else if rows - r >= 2 {
                few_dots::<S, 2>(s, t, r, keys.clone(), st.scores);
                r += 2;
            } else {
                few_dots::<S, 1>(s, t, r, keys.clone(), st.scores);
                r += 1;
            }
        }
        for r in 0..rows {
            let row = &mut st.scores[r * FEW_KEYS..][..FEW_KEYS];
            let seen = t.seen[r].clamp(k0, keys.end) - k0;
            if seen == 0 {
                continue;
            }
            let acc = &mut st.acc[r * width..][..width];
            (st.max[r], st.sum[r]) = softmax_row(s, row, seen, t.bf16, c, (st.max[r], st.sum[r]), acc);
        }
        for (at, j) in keys.enumerate() {
            let v = &t.v[j * t.stride..][..t.dim];
            for r in 0..rows {
                // A key that a row does not see must not touch it, whatever its value holds.
                if j < t.seen[r] {
                    add_row(s, st.scores[r * FEW_KEYS + at], v, t.bf16, &mut st.acc[r * width..][..t.dim]);
                }
            }
        }
    }
}

/// Packs rows `stride` apart as panels `[panel][dim][width]`, zero after the last;  `dim` elements of each row.
pub fn pack_panels(src: &[f32], stride: usize, count: usize, dim: usize, width: usize, out: &mut [f32]) {
    for (panel, out) in out.chunks_exact_mut(dim * width).enumerate() {
        let first = panel * width;
        let here = width.min(count.saturating_sub(first));
        if here < width {
            out.fill(0.0);
        }
        let row = |i: usize| &src[(first + i) * stride..][..dim];
        // Four rows at a time, so that four elements of a line are written at once.
        for i in (0..here - here % 4).step_by(4) {
            let (a, b, c, d) = (row(i), row(i + 1), row(i + 2), row(i + 3));
            for ((((out, a), b), c), d) in out.chunks_exact_mut(width).zip(a).zip(b).zip(c).zip(d) {
                out[i..i + 4].copy_from_slice(&[*a, *b, *c, *d]);
            }
        }
        for i in here - here % 4..here {
            for (out, value) in out.chunks_exact_mut(width).zip(row(i)) {
                out[i] = *value;
            }
        }
    }
}

/// Packs rows `stride` apart as rows `width` apart, zero after `dim` columns.
pub fn pack_rows(src: &[f32], stride: usize, count: usize, dim: usize, width: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(width).take(count).enumerate() {
        out[..dim].copy_from_slice(&src[i * stride..][..dim]);
        out[dim..].fill(0.0);
    }
}

/// Packs at most [`QUERIES`] rows `stride` apart in the layout of queries.
pub fn pack_queries(src: &[f32], stride: usize, count: usize, dim: usize, out: &mut [f32]) {
    for (chunk, d0) in (0..dim).step_by(DIMS).enumerate() {
        let part = DIMS.min(dim - d0);
        let padded = part.next_multiple_of(PAD);
        for (i, out) in out[chunk * QUERIES * QUERY_STRIDE..].chunks_mut(QUERY_STRIDE).take(count).enumerate() {
            out[..part].copy_from_slice(&src[i * stride + d0..][..part]);
            out[part..padded].fill(0.0);
        }
    }
}

/// Floats of the packed queries of one tile.
pub fn queries_len(dim: usize) -> usize {
    dim.div_ceil(DIMS) * QUERIES * QUERY_STRIDE
}
