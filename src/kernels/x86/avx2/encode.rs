//! Quantizing for AVX2: the thresholds in three small tables, one for each but the first step of the search.

use super::Avx2;
use crate::kernels::quantize::{CHUNK, Encode};
use std::arch::x86_64::*;

/// The body of a method of the token: the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: the token exists only after detection of AVX2; memory operands are arrays of the accessed length.
        unsafe { $e }
    };
}

impl Encode for Avx2 {
    #[inline(always)]
    fn max_magnitude(self, acc: __m256, x: __m256) -> __m256 {
        intrinsic!({
            let magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(i32::MAX));
            _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(acc), magnitude))
        })
    }
    #[inline(always)]
    fn max_bits(self, acc: __m256) -> u32 {
        intrinsic!({
            let acc = _mm256_castps_si256(acc);
            let four = _mm_max_epu32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256::<1>(acc));
            let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
            _mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32::<0b00_00_00_01>(two))) as u32
        })
    }
    #[inline(always)]
    fn nf4_encode(self, x: &[f32; CHUNK], inverse: f32, t: &[f32; 15], out: &mut [u8; CHUNK / 2]) {
        intrinsic!({
            let inverse = _mm256_set1_ps(inverse);
            let quarters = _mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]);
            let eighths = _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]);
            let (t3, t7, t11) = (_mm256_set1_ps(t[3]), _mm256_set1_ps(t[7]), _mm256_set1_ps(t[11]));
            // Macros: a closure may be compiled without the instruction set, and each intrinsic in it becomes a call.
            macro_rules! above {
                ($x:ident, $threshold:expr) => {
                    _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>($x, $threshold)) // -1 where x is above
                };
            }
            macro_rules! codes {
                ($from:literal) => {{
                    let x = _mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add($from)), inverse);
                    let m8 = above!(x, t7);
                    let m4 = above!(x, _mm256_blendv_ps(t3, t11, _mm256_castsi256_ps(m8)));
                    let code = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_add_epi32(_mm256_add_epi32(m8, m8), m4));
                    let m2 = above!(x, _mm256_permutevar_ps(quarters, code));
                    let code = _mm256_sub_epi32(_mm256_add_epi32(code, code), m2);
                    let m1 = above!(x, _mm256_permutevar8x32_ps(eighths, code));
                    _mm256_sub_epi32(_mm256_add_epi32(code, code), m1)
                }};
            }
            // Packing works in halves of registers, so 4-byte groups come out in the order 0, 4, 1, 5, 2, 6, 3, 7.
            let halves = _mm256_packus_epi16(
                _mm256_packs_epi32(codes!(0), codes!(8)),
                _mm256_packs_epi32(codes!(16), codes!(24)),
            );
            let bytes = _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110)); // 16 · first + second
            let packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            _mm_storeu_si128(out.as_mut_ptr().cast(), packed);
        });
    }
}
