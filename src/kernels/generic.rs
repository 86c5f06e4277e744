//! The kernels written once over a vector of f32 lanes; `x86/*.rs` instantiate them.
//!
//! An instruction set is a zero-sized token `S: Simd` that only its own detection can make, so holding one proves that
//! its instructions may run and everything here is safe code. All is `inline(always)`: the `target_feature` sits on the
//! outermost function, in the file of the instruction set. Tails use masked loads and stores, never a scalar loop.

/// One instruction set's vector of f32.
pub(super) trait Simd: Copy {
    /// `LANES` floats in a register.
    type V: Copy;
    const LANES: usize;
    fn splat(self, x: f32) -> Self::V;
    /// The first `LANES` elements of `x`.
    fn load(self, x: &[f32]) -> Self::V;
    /// All of `x`, shorter than `LANES`; the other lanes are 0.
    fn load_tail(self, x: &[f32]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32]);
    fn store_tail(self, v: Self::V, out: &mut [f32]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger one; `b` if either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one; `b` if either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, one rounding.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The nearest integer, as a float.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` for an integral `n` in -126 ..= 127.
    fn exp2i(self, n: Self::V) -> Self::V;
    /// `a · 2^n` for an integral `n` in -126 ..= 127.
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V {
        self.mul(a, self.exp2i(n))
    }
    fn sum(self, a: Self::V) -> f32;
    fn max_lane(self, a: Self::V) -> f32;
    /// Every lane rounded to bfloat16, ties to even; NaN stays NaN.
    fn round_bf16(self, a: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// `LANES` NF4 indices from the first `LANES / 2` bytes, looked up in `code` (high nibble first).
    fn nf4_lookup(self, packed: &[u8], code: &[f32; 16]) -> Self::V;
    /// The first `LANES` bf16 of `x`, widened.
    fn load_bf16(self, x: &[u16]) -> Self::V;
    /// `LANES` vectors.
    type Square: Copy + AsRef<[Self::V]> + AsMut<[Self::V]>;
    /// A square of `v`s.
    fn square(self, v: Self::V) -> Self::Square;
    /// Lane `p` of vector `r` goes to lane `r` of vector `p`.
    fn transpose(self, rows: Self::Square) -> Self::Square;
    /// `LANES` u32 in a register.
    type U: Copy;
    fn splat_u32(self, x: u32) -> Self::U;
    fn xor(self, a: Self::U, b: Self::U) -> Self::U;
    /// The upper and the lower half of every lane's product with `b`.
    fn mul_wide(self, a: Self::U, b: u32) -> (Self::U, Self::U);
    /// The numbers `first .. first + LANES`, dealt to the lanes such that [`Simd::interleave`] puts them in order.
    fn philox_blocks(self, first: u32) -> Self::U;
    /// Word `w` of number `n`, in the lanes of `words[w]` that [`Simd::philox_blocks`] gave `n`, as element `4 n + w`.
    fn interleave(self, words: [Self::U; 4]) -> [Self::U; 4];
    /// `a` where the word is at least `threshold`, else 0.
    fn keep(self, a: Self::V, words: Self::U, threshold: u32) -> Self::V;
}

/// `exp(x)` for every lane, within 2 ulp for x in [-87.3, 88.3]; 2^-126 below and about 2^127 above; NaN stays NaN.
///
/// Cody & Waite: `x = n ln 2 + r`, |r| <= ln 2 / 2; a degree-6 Taylor polynomial in r; scaled by 2^n.
#[inline(always)]
fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-87.3), s.min(s.splat(88.3), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    s.scale2(p, n)
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, z: S::V) -> S::V {
    let e = exp(s, s.sub(s.splat(0.0), z));
    s.div(s.splat(1.0), s.add(s.splat(1.0), e))
}

#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len(), "dot: lengths differ");
    // Four chains hide the latency of the FMA.
    let mut acc = [s.splat(0.0); 4];
    let (mut x4, mut y4) = (x.chunks_exact(4 * S::LANES), y.chunks_exact(4 * S::LANES));
    for (x, y) in (&mut x4).zip(&mut y4) {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = s.fma(s.load(&x[i * S::LANES..]), s.load(&y[i * S::LANES..]), *acc);
        }
    }
    let (mut x1, mut y1) = (x4.remainder().chunks_exact(S::LANES), y4.remainder().chunks_exact(S::LANES));
    for (x, y) in (&mut x1).zip(&mut y1) {
        acc[0] = s.fma(s.load(x), s.load(y), acc[0]);
    }
    acc[1] = s.fma(s.load_tail(x1.remainder()), s.load_tail(y1.remainder()), acc[1]);
    s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])))
}

#[inline(always)]
pub(super) fn axpy<S: Simd>(s: S, alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy: lengths differ");
    let a = s.splat(alpha);
    let (mut xs, mut ys) = (x.chunks_exact(S::LANES), y.chunks_exact_mut(S::LANES));
    for (x, y) in (&mut xs).zip(&mut ys) {
        s.store(s.fma(a, s.load(x), s.load(y)), y);
    }
    let y = ys.into_remainder();
    s.store_tail(s.fma(a, s.load_tail(xs.remainder()), s.load_tail(y)), y);
}

#[inline(always)]
pub(super) fn rms_norm_row<S: Simd>(s: S, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
    assert!(x.len() == w.len() && x.len() == y.len(), "rms_norm_row: lengths differ");
    let rstd = 1.0 / (dot(s, x, x) / x.len() as f32 + eps).sqrt();
    let r = s.splat(rstd);
    let (mut xs, mut ws, mut ys) = (x.chunks_exact(S::LANES), w.chunks_exact(S::LANES), y.chunks_exact_mut(S::LANES));
    for ((x, w), y) in (&mut xs).zip(&mut ws).zip(&mut ys) {
        s.store(s.mul(s.mul(s.load(x), r), s.load(w)), y);
    }
    let tail = s.mul(s.mul(s.load_tail(xs.remainder()), r), s.load_tail(ws.remainder()));
    s.store_tail(tail, ys.into_remainder());
    rstd
}

#[inline(always)]
pub(super) fn rms_norm_row_backward<S: Simd>(s: S, x: &[f32], w: &[f32], rstd: f32, dy: &[f32], dx: &mut [f32]) {
    let n = x.len();
    assert!([w.len(), dy.len(), dx.len()] == [n; 3], "rms_norm_row_backward: lengths differ");
    let vectors = |x| <[f32]>::chunks_exact(x, S::LANES);
    let (mut xs, mut ws, mut dys) = (vectors(x), vectors(w), vectors(dy));
    let mut acc = s.splat(0.0);
    for ((x, w), dy) in (&mut xs).zip(&mut ws).zip(&mut dys) {
        acc = s.fma(s.mul(s.load(x), s.load(w)), s.load(dy), acc);
    }
    let tail = (s.load_tail(xs.remainder()), s.load_tail(ws.remainder()), s.load_tail(dys.remainder()));
    acc = s.fma(s.mul(tail.0, tail.1), tail.2, acc);
    let (r, pull) = (s.splat(rstd), s.splat(-s.sum(acc) / n as f32 * rstd * rstd));
    let mut dxs = dx.chunks_exact_mut(S::LANES);
    for (((x, w), dy), dx) in vectors(x).zip(vectors(w)).zip(vectors(dy)).zip(&mut dxs) {
        let inner = s.fma(s.load(x), pull, s.mul(s.load(w), s.load(dy)));
        s.store(s.fma(r, inner, s.load(dx)), dx);
    }
    let (inner, dx) = (s.fma(tail.0, pull, s.mul(tail.1, tail.2)), dxs.into_remainder());
    s.store_tail(s.fma(r, inner, s.load_tail(dx)), dx);
}

#[inline(always)]
pub(super) fn swiglu_row<S: Simd>(s: S, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!([up.len(), y.len()] == [gate.len(); 2], "swiglu_row: lengths differ");
    let (mut gates, mut ups) = (gate.chunks_exact(S::LANES), up.chunks_exact(S::LANES));
    let mut ys = y.chunks_exact_mut(S::LANES);
    for ((gate, up), y) in (&mut gates).zip(&mut ups).zip(&mut ys) {
        let g = s.load(gate);
        s.store(s.mul(s.mul(g, sigmoid(s, g)), s.load(up)), y);
    }
    let g = s.load_tail(gates.remainder());
    s.store_tail(s.mul(s.mul(g, sigmoid(s, g)), s.load_tail(ups.remainder())), ys.into_remainder());
}

/// `(dgate, dup)` of one vector.
#[inline(always)]
fn swiglu_backward<S: Simd>(s: S, g: S::V, u: S::V, dy: S::V) -> (S::V, S::V) {
    let sig = sigmoid(s, g);
    let slope = s.mul(sig, s.fma(g, s.sub(s.splat(1.0), sig), s.splat(1.0)));
    (s.mul(s.mul(dy, u), slope), s.mul(dy, s.mul(g, sig)))
}

#[inline(always)]
pub(super) fn swiglu_row_backward<S: Simd>(
    s: S,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let n = gate.len();
    assert!([up.len(), dy.len(), dgate.len(), dup.len()] == [n; 4], "swiglu_row_backward: lengths differ");
    let (mut gates, mut ups) = (gate.chunks_exact(S::LANES), up.chunks_exact(S::LANES));
    let mut dys = dy.chunks_exact(S::LANES);
    let (mut dgates, mut dups) = (dgate.chunks_exact_mut(S::LANES), dup.chunks_exact_mut(S::LANES));
    for ((((gate, up), dy), dgate), dup) in (&mut gates).zip(&mut ups).zip(&mut dys).zip(&mut dgates).zip(&mut dups) {
        let (dg, du) = swiglu_backward(s, s.load(gate), s.load(up), s.load(dy));
        s.store(dg, dgate);
        s.store(du, dup);
    }
    let (gate, up, dy) = (gates.remainder(), ups.remainder(), dys.remainder());
    let (dg, du) = swiglu_backward(s, s.load_tail(gate), s.load_tail(up), s.load_tail(dy));
    s.store_tail(dg, dgates.into_remainder());
    s.store_tail(du, dups.into_remainder());
}

#[inline(always)]
pub(super) fn max_row<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = s.splat(f32::NEG_INFINITY);
    let mut chunks = x.chunks_exact(S::LANES);
    for x in &mut chunks {
        acc = s.max(acc, s.load(x));
    }
    chunks.remainder().iter().copied().fold(s.max_lane(acc), f32::max)
}

#[inline(always)]
pub(super) fn exp_row<S: Simd>(s: S, x: &mut [f32], scale: f32, shift: f32) -> f32 {
    let (a, b) = (s.splat(scale), s.splat(-shift));
    let mut acc = s.splat(0.0);
    let mut chunks = x.chunks_exact_mut(S::LANES);
    for x in &mut chunks {
        let e = exp(s, s.fma(a, s.load(x), b));
        acc = s.add(acc, e);
        s.store(e, x);
    }
    let tail = chunks.into_remainder();
    s.store_tail(exp(s, s.fma(a, s.load_tail(tail), b)), tail);
    s.sum(s.add(acc, s.load_tail(tail)))
}

#[inline(always)]
pub(super) fn round_bf16<S: Simd>(s: S, x: &mut [f32]) {
    let mut chunks = x.chunks_exact_mut(S::LANES);
    for x in &mut chunks {
        s.store(s.round_bf16(s.load(x)), x);
    }
    let tail = chunks.into_remainder();
    s.store_tail(s.round_bf16(s.load_tail(tail)), tail);
}
