//! Quantizing for AVX-512: all thresholds in one register.

use super::Avx512;
use crate::kernels::quantize::{CHUNK, Encode};
use std::arch::x86_64::*;

/// The body of a method of the token: the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: the token exists only after detection of AVX-512; memory operands are arrays of the accessed length.
        unsafe { $e }
    };
}

impl Encode for Avx512 {
    #[inline(always)]
    fn max_magnitude(self, acc: __m512, x: __m512) -> __m512 {
        intrinsic!({
            let magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
            _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(acc), magnitude))
        })
    }
    #[inline(always)]
    fn max_bits(self, acc: __m512) -> u32 {
        intrinsic!(_mm512_reduce_max_epu32(_mm512_castps_si512(acc)))
    }
    #[inline(always)]
    fn nf4_encode(self, x: &[f32; CHUNK], inverse: f32, thresholds: &[f32; 15], out: &mut [u8; CHUNK / 2]) {
        intrinsic!({
            let table = _mm512_maskz_loadu_ps(0x7FFF, thresholds.as_ptr());
            let table1 = _mm512_maskz_loadu_ps(0x3FFF, thresholds.as_ptr().add(1));
            let (t3, t7, t11) =
                (_mm512_set1_ps(thresholds[3]), _mm512_set1_ps(thresholds[7]), _mm512_set1_ps(thresholds[11]));
            let inverse = _mm512_set1_ps(inverse);
            // A macro: a closure may be compiled without the instruction set, and each intrinsic in it becomes a call.
            macro_rules! half {
                ($from:literal) => {{
                    let x = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add($from)), inverse);
                    let m8 = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, t7);
                    let m4 = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_mask_blend_ps(m8, t3, t11));
                    let code = _mm512_maskz_set1_epi32(m8, 8);
                    let code = _mm512_mask_add_epi32(code, m4, code, _mm512_set1_epi32(4));
                    let m2 = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_permutexvar_ps(code, table1));
                    let code = _mm512_mask_add_epi32(code, m2, code, _mm512_set1_epi32(2));
                    let m1 = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_permutexvar_ps(code, table));
                    let code = _mm512_mask_add_epi32(code, m1, code, _mm512_set1_epi32(1));
                    // The low byte of each pair of codes: the first in the high nibble.
                    let pairs = _mm512_or_si512(_mm512_slli_epi64::<4>(code), _mm512_srli_epi64::<32>(code));
                    _mm512_cvtepi64_epi8(pairs)
                }};
            }
            let (first, second) = (half!(0), half!(16));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_unpacklo_epi64(first, second));
        });
    }
}
