//! Rows of elementwise work written once over a vector: dropout, rotary embedding, the gain of a norm, AdamW.
//!
//! Dropout draws a vector of counters at a time: lane `l` of word vector `w` holds word `w` of one Philox block, and blocks
//! are dealt to lanes such that interleaving four word vectors gives the elements in order (`Simd::philox_blocks`).
//! AdamW adds and multiplies without fusing, so every instruction set gives the bits of the scalar formula.

use super::generic::Simd;
use super::philox::philox4x32_10;

/// The mask of a piece of a row: its element `i` takes word `i % 4` of Philox block `[(first + i) / 4, position, row, module]`.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    /// Seed and step.
    pub key: [u32; 2],
    /// Position, dataset row and module.
    pub counter: [u32; 3],
    /// Where the piece begins in its row, a multiple of 4.
    pub first: u32,
    /// Elements whose word is below it are dropped.
    pub threshold: u32,
    /// What kept elements are multiplied by.
    pub scale: f32,
}

/// What happens to a masked row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Masked<'a> {
    /// `y = y ⊙ mask · scale`.
    InPlace,
    /// `y = x ⊙ mask · scale`.
    Copy(&'a [f32]),
    /// `y += x ⊙ mask · scale`.
    Add(&'a [f32]),
}

/// The scalars of one AdamW step.
#[derive(Debug, Clone, Copy)]
pub struct AdamStep {
    /// Decay of the first moment.
    pub beta1: f32,
    /// `1 - beta1`.
    pub one_minus_beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// Added to the root of the corrected second moment.
    pub eps: f32,
    /// `sqrt(1 - beta2^t)`.
    pub correction2_sqrt: f32,
    /// `-lr / (1 - beta1^t)`.
    pub step_size: f32,
    /// What decay leaves of a parameter: `1 - lr · weight_decay`.
    pub keep: f32,
    /// What gradients are multiplied by first.
    pub grad_scale: f32,
}

impl AdamStep {
    /// One element: new moments from the old ones and the gradient, and the parameter updated with them.
    ///
    /// Loshchilov and Hutter 2019, algorithm 2, in the order of `torch.optim.AdamW`: decay first, epsilon outside the
    /// root of the corrected second moment.
    #[inline(always)]
    pub fn update(&self, p: &mut f32, m: f32, v: f32, g: f32) -> (f32, f32) {
        let g = g * self.grad_scale;
        let m = m * self.beta1 + self.one_minus_beta1 * g;
        let v = v * self.beta2 + self.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / self.correction2_sqrt + self.eps;
        *p = *p * self.keep + self.step_size * m / denominator;
        (m, v)
    }
}

/// Four word vectors: the words of `LANES` blocks from `first` on, interleaved into `4 · LANES` elements in order.
#[inline(always)]
fn philox<S: Simd>(s: S, first: u32, m: &Mask) -> [S::U; 4] {
    let [position, row, module] = m.counter;
    let mut c = [s.philox_blocks(first), s.splat_u32(position), s.splat_u32(row), s.splat_u32(module)];
    let mut key = m.key;
    for _ in 0..10 {
        let (left_high, left_low) = s.mul_wide(c[0], 0xD251_1F53);
        let (right_high, right_low) = s.mul_wide(c[2], 0xCD9E_8D57);
        c = [
            s.xor(s.xor(right_high, c[1]), s.splat_u32(key[0])),
            right_low,
            s.xor(s.xor(left_high, c[3]), s.splat_u32(key[1])),
            left_low,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    s.interleave(c)
}

/// One vector of a masked row.
#[inline(always)]
fn masked<S: Simd>(s: S, x: S::V, words: S::U, m: &Mask, add_to: Option<S::V>) -> S::V {
    let kept = s.keep(s.mul(x, s.splat(m.scale)), words, m.threshold);
    if let Some(y) = add_to { s.add(y, kept) } else { kept }
}

#[inline(always)]
pub(super) fn dropout_row<S: Simd>(s: S, m: &Mask, how: Masked<'_>, y: &mut [f32]) {
    if let Masked::Copy(x) | Masked::Add(x) = how {
        assert_eq!(x.len(), y.len(), "dropout_row: lengths differ");
    }
    assert!(m.first.is_multiple_of(4), "dropout_row: a block serves four elements");
    for (step, y) in y.chunks_mut(4 * S::LANES).enumerate() {
        let words = philox(s, m.first / 4 + (step * S::LANES) as u32, m);
        for (v, y) in y.chunks_mut(S::LANES).enumerate() {
            let at = (step * 4 + v) * S::LANES;
            let whole = y.len() == S::LANES;
            let old = if whole { s.load(y) } else { s.load_tail(y) };
            let (x, add_to) = match how {
                Masked::InPlace => (old, None),
                Masked::Copy(x) | Masked::Add(x) => {
                    let x = &x[at..][..y.len()];
                    let add_to = if matches!(how, Masked::Add(_)) { Some(old) } else { None };
                    (if whole { s.load(x) } else { s.load_tail(x) }, add_to)
                }
            };
            let out = masked(s, x, words[v], m, add_to);
            if whole {
                s.store(out, y);
            } else {
                s.store_tail(out, y);
            }
        }
    }
}

/// [`dropout_row`] word by word.
pub(super) fn dropout_row_scalar(m: &Mask, how: Masked<'_>, y: &mut [f32]) {
    if let Masked::Copy(x) | Masked::Add(x) = how {
        assert_eq!(x.len(), y.len(), "dropout_row: lengths differ");
    }
    assert!(m.first.is_multiple_of(4), "dropout_row: a block serves four elements");
    let [position, row, module] = m.counter;
    for (i, y) in y.iter_mut().enumerate() {
        let word = philox4x32_10([m.first / 4 + (i / 4) as u32, position, row, module], m.key)[i % 4];
        let x = match how {
            Masked::InPlace => *y,
            Masked::Copy(x) | Masked::Add(x) => x[i],
        };
        let kept = if word >= m.threshold { x * m.scale } else { 0.0 };
        *y = if matches!(how, Masked::Add(_)) { *y + kept } else { kept };
    }
}

#[inline(always)]
pub(super) fn rope_row<S: Simd>(s: S, x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    assert!(sin.len() == half && x.len().is_multiple_of(2 * half), "rope_row: lengths differ");
    let (body, sign) = (half - half % S::LANES, s.splat(sign));
    for head in x.chunks_exact_mut(2 * half) {
        let (x1, x2) = head.split_at_mut(half);
        for i in (0..body).step_by(S::LANES) {
            let (a, b) = (s.load(&x1[i..]), s.load(&x2[i..]));
            let (c, n) = (s.load(&cos[i..]), s.mul(sign, s.load(&sin[i..])));
            s.store(s.sub(s.mul(a, c), s.mul(b, n)), &mut x1[i..]);
            s.store(s.fma(a, n, s.mul(b, c)), &mut x2[i..]);
        }
        if body < half {
            let (a, b) = (s.load_tail(&x1[body..]), s.load_tail(&x2[body..]));
            let (c, n) = (s.load_tail(&cos[body..]), s.mul(sign, s.load_tail(&sin[body..])));
            s.store_tail(s.sub(s.mul(a, c), s.mul(b, n)), &mut x1[body..]);
            s.store_tail(s.fma(a, n, s.mul(b, c)), &mut x2[body..]);
        }
    }
}

#[inline(always)]
pub(super) fn rms_norm_gain<S: Simd>(s: S, x: &[f32], rstd: f32, dy: &[f32], dw: &mut [f32]) {
    let n = x.len();
    assert!([dy.len(), dw.len()] == [n; 2], "rms_norm_gain: lengths differ");
    let r = s.splat(rstd);
    let (mut xs, mut dys) = (x.chunks_exact(S::LANES), dy.chunks_exact(S::LANES));
    let mut dws = dw.chunks_exact_mut(S::LANES);
    for ((x, dy), dw) in (&mut xs).zip(&mut dys).zip(&mut dws) {
        s.store(s.fma(s.mul(s.load(dy), s.load(x)), r, s.load(dw)), dw);
    }
    let term = s.mul(s.load_tail(dys.remainder()), s.load_tail(xs.remainder()));
    let dw = dws.into_remainder();
    s.store_tail(s.fma(term, r, s.load_tail(dw)), dw);
}

/// One vector of parameters and moments, updated.
#[inline(always)]
fn adam<S: Simd>(s: S, step: &AdamStep, p: S::V, g: S::V, m: S::V, v: S::V) -> (S::V, S::V, S::V) {
    let g = s.mul(g, s.splat(step.grad_scale));
    let m = s.add(s.mul(m, s.splat(step.beta1)), s.mul(s.splat(step.one_minus_beta1), g));
    let v = s.add(s.mul(v, s.splat(step.beta2)), s.mul(s.mul(s.splat(step.one_minus_beta2), g), g));
    let denominator = s.add(s.div(s.sqrt(v), s.splat(step.correction2_sqrt)), s.splat(step.eps));
    let p = s.add(s.mul(p, s.splat(step.keep)), s.div(s.mul(s.splat(step.step_size), m), denominator));
    (p, m, v)
}

#[inline(always)]
pub(super) fn adamw_row<S: Simd>(s: S, step: &AdamStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    assert!([g.len(), m.len(), v.len()] == [p.len(); 3], "adamw_row: lengths differ");
    let (mut ps, mut gs) = (p.chunks_exact_mut(S::LANES), g.chunks_exact(S::LANES));
    let (mut ms, mut vs) = (m.chunks_exact_mut(S::LANES), v.chunks_exact_mut(S::LANES));
    for (((p, g), m), v) in (&mut ps).zip(&mut gs).zip(&mut ms).zip(&mut vs) {
        let new = adam(s, step, s.load(p), s.load(g), s.load(m), s.load(v));
        s.store(new.0, p);
        s.store(new.1, m);
        s.store(new.2, v);
    }
    let (p, g, m, v) = (ps.into_remainder(), gs.remainder(), ms.into_remainder(), vs.into_remainder());
    let new = adam(s, step, s.load_tail(p), s.load_tail(g), s.load_tail(m), s.load_tail(v));
    s.store_tail(new.0, p);
    s.store_tail(new.1, m);
    s.store_tail(new.2, v);
}

/// [`adamw_row`] element by element.
pub(super) fn adamw_row_scalar(step: &AdamStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    assert!([g.len(), m.len(), v.len()] == [p.len(); 3], "adamw_row: lengths differ");
    for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
        (*m, *v) = step.update(p, *m, *v, *g);
    }
}
