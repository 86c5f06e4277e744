//! Quantizing one block to NF4: its largest magnitude, then for each weight the number of thresholds strictly below it.
//!
//! The thresholds are searched in registers: two comparisons with halves of the table, then look-ups of 4 and 8 (AVX2) or 16
//! entries (AVX-512). Products, the one division and the comparisons are those of the scalar loop, so the bits are, too.

use super::generic::Simd;

/// Smallest absmax that is inverted, so that a block of zeros gives no NaN (`clamp(min=1e-38)` in bitsandbytes).
pub const MIN_ABSMAX: f32 = 1e-38;
/// The bits of infinity: those of larger magnitudes are NaN.
pub const INFINITY_BITS: u32 = 0x7f80_0000;
/// Weights that are encoded at a time.
pub const CHUNK: usize = 32;

/// What an instruction set adds to [`Simd`] for quantizing.
pub(super) trait Encode: Simd {
    /// The larger of the bits of `acc` and of the magnitude of `x`, as unsigned integers.
    fn max_magnitude(self, acc: Self::V, x: Self::V) -> Self::V;
    /// The largest lane as an unsigned integer.
    fn max_bits(self, acc: Self::V) -> u32;
    /// Two codes a byte, the first in the high nibble: the number of thresholds strictly below `x · inverse`.
    fn nf4_encode(self, x: &[f32; CHUNK], inverse: f32, thresholds: &[f32; 15], out: &mut [u8; CHUNK / 2]);
}

#[inline(always)]
pub(super) fn nf4_quantize<S: Encode>(s: S, x: &[f32], thresholds: &[f32; 15], out: &mut [u8]) -> f32 {
    assert!(x.len().is_multiple_of(CHUNK) && out.len() == x.len() / 2, "nf4_quantize: lengths differ");
    let mut acc = s.splat(0.0);
    for x in x.chunks_exact(S::LANES) {
        acc = s.max_magnitude(acc, s.load(x));
    }
    let largest = s.max_bits(acc);
    let absmax = f32::from_bits(largest);
    if largest >= INFINITY_BITS {
        return absmax;
    }
    let inverse = 1.0 / absmax.max(MIN_ABSMAX);
    for (x, out) in x.as_chunks::<CHUNK>().0.iter().zip(out.as_chunks_mut::<{ CHUNK / 2 }>().0) {
        s.nf4_encode(x, inverse, thresholds, out);
    }
    absmax
}
