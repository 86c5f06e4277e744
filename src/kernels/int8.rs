//! Rows of 8-bit weights to floats: `w[i] = (codes[i] · absmax) · 1/127`, two roundings, in this order.
//!
//! That is how bitsandbytes' `int8_vectorwise_dequant` multiplies, so the weights are those that it gives, to the bit.

use super::gemv::Packed;

/// What a code of an absmax of 1 stands for.
pub const STEP: f32 = 1.0 / 127.0;

/// # Panics
/// If the lengths differ.
pub(super) fn check(codes: usize, out: usize) {
    assert_eq!(codes, out, "int8_row: lengths differ");
}

#[inline(always)]
pub(super) fn int8_row<S: Packed>(s: S, codes: &[i8], absmax: f32, out: &mut [f32]) {
    check(codes.len(), out.len());
    let (absmax, step) = (s.splat(absmax), s.splat(STEP));
    let (mut rows, mut outs) = (codes.chunks_exact(S::LANES), out.chunks_exact_mut(S::LANES));
    for (codes, out) in (&mut rows).zip(&mut outs) {
        s.store(s.mul(s.mul(s.load_i8(codes), absmax), step), out);
    }
    let (rest, out) = (rows.remainder(), outs.into_remainder());
    let mut whole = [0; 16];
    whole[..rest.len()].copy_from_slice(rest);
    s.store_tail(s.mul(s.mul(s.load_i8(&whole), absmax), step), out);
}

/// The slow twins.
pub(super) mod reference {
    use super::{STEP, check};
    use half::bf16;

    pub(in crate::kernels) fn int8_row(codes: &[i8], absmax: f32, out: &mut [f32]) {
        check(codes.len(), out.len());
        for (out, code) in out.iter_mut().zip(codes) {
            *out = f32::from(*code) * absmax * STEP;
        }
    }

    pub(in crate::kernels) fn int8_halves(codes: &[i8], absmax: f32, out: &mut [u16]) {
        check(codes.len(), out.len());
        for (out, code) in out.iter_mut().zip(codes) {
            *out = bf16::from_f32(f32::from(*code) * absmax * STEP).to_bits();
        }
    }
}
