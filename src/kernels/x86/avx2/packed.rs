//! Packed weights for AVX2: a block's table is two registers for `vpermps`, or, as bfloat16, two planes for `vpshufb`.

use super::Avx2;
use crate::kernels::gemv::{BLOCK, Packed};
use crate::kernels::generic::Simd;
use std::arch::x86_64::*;

/// The body of a function that takes the token: the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: the token exists only after detection of AVX2, FMA and F16C; memory operands are arrays of the loaded
        // length, or asserted.
        unsafe { $e }
    };
}

/// The 16 values of a block, in two registers.
#[inline(always)]
fn scaled(_: Avx2, code: &[f32; 16], scale: f32) -> [__m256; 2] {
    intrinsic!({
        let scale = _mm256_set1_ps(scale);
        let (low, high) = (_mm256_loadu_ps(code.as_ptr()), _mm256_loadu_ps(code.as_ptr().add(8)));
        [_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)]
    })
}

/// Rounded to half precision and back.
#[inline(always)]
fn round_f16(_: Avx2, table: [__m256; 2]) -> [__m256; 2] {
    let [low, high] = table;
    intrinsic!([
        _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low)),
        _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high)),
    ])
}

/// A block's indices looked up in its table: the bytes as 8 words of 8 nibbles; each right shift moves one nibble of every
/// word to the low end, where `vpermps` looks at three bits, a left shift moves its fourth bit to the sign, for the blend.
#[inline(always)]
fn lookup(_: Avx2, packed: &[u8; BLOCK / 2], table: [__m256; 2]) -> [__m256; 8] {
    macro_rules! nibble {
        ($words:ident, $right:literal, $left:literal) => {{
            let index = _mm256_srli_epi32::<$right>($words);
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<$left>($words));
            let low = _mm256_permutevar8x32_ps(table[0], index);
            let high = _mm256_permutevar8x32_ps(table[1], index);
            _mm256_blendv_ps(low, high, upper)
        }};
    }
    intrinsic!({
        let words = _mm256_loadu_si256(packed.as_ptr().cast());
        [
            nibble!(words, 4, 24),
            nibble!(words, 0, 28),
            nibble!(words, 12, 16),
            nibble!(words, 8, 20),
            nibble!(words, 20, 8),
            nibble!(words, 16, 12),
            nibble!(words, 28, 0),
            nibble!(words, 24, 4),
        ]
    })
}

impl Packed for Avx2 {
    type Block = [__m256; 8];
    const GROUP: usize = 4;
    const ORDER: [u8; BLOCK] = {
        let mut order = [0; BLOCK];
        let mut i = 0;
        while i < BLOCK {
            order[i] = (i % 8 * 8 + i / 8) as u8;
            i += 1;
        }
        order
    };

    #[inline(always)]
    fn nf4_f32(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m256; 8] {
        lookup(self, packed, scaled(self, code, scale))
    }
    /// The table as two planes of bytes: `vpshufb` looks 32 indices up in each, interleaved they are bfloat16.
    #[inline(always)]
    fn nf4_bf16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m256; 8] {
        intrinsic!({
            // As `round_table` of AVX-512, and down to the lower half.
            macro_rules! rounded {
                ($half:expr) => {{
                    let c = _mm256_mul_ps($half, _mm256_set1_ps(65535.0));
                    let rounded = _mm256_fmsub_ps($half, _mm256_set1_ps(65536.0), c);
                    _mm256_srli_epi32::<16>(_mm256_castps_si256(rounded))
                }};
            }
            let [low, high] = scaled(self, code, scale);
            let (low, high) = (rounded!(low), rounded!(high));
            // 16 values of 16 bits in order, then all their low bytes and all their high bytes, each in both halves.
            let values = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            let low_bytes = _mm256_and_si256(values, _mm256_set1_epi16(0xFF));
            let planes = _mm256_packus_epi16(low_bytes, _mm256_srli_epi16::<8>(values));
            let plane0 = _mm256_permute4x64_epi64::<0b10_00_10_00>(planes);
            let plane1 = _mm256_permute4x64_epi64::<0b11_01_11_01>(planes);
            // The bytes of a word of 4 are spread so that a lane of each result comes from one word, as in `lookup`.
            let spread = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            let bytes = _mm256_loadu_si256(packed.as_ptr().cast());
            let bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(spread));
            let nibble = _mm256_set1_epi8(15);
            macro_rules! look_up {
                ($index:expr) => {{
                    let index = $index;
                    let (low, high) = (_mm256_shuffle_epi8(plane0, index), _mm256_shuffle_epi8(plane1, index));
                    (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high))
                }};
            }
            let (a, c) = look_up!(_mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble));
            let (b, d) = look_up!(_mm256_and_si256(bytes, nibble));
            let odd = _mm256_set1_epi32(!0xFFFF);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                _mm256_castsi256_ps(_mm256_and_si256(a, odd)),
                _mm256_castsi256_ps(_mm256_and_si256(b, odd)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(c)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(d)),
                _mm256_castsi256_ps(_mm256_and_si256(c, odd)),
                _mm256_castsi256_ps(_mm256_and_si256(d, odd)),
            ]
        })
    }
    #[inline(always)]
    fn nf4_f16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m256; 8] {
        lookup(self, packed, round_f16(self, scaled(self, code, scale)))
    }
    #[inline(always)]
    fn nf4_f16_bf16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m256; 8] {
        {
            let [low, high] = round_f16(self, scaled(self, code, scale));
            lookup(self, packed, [self.round_bf16(low), self.round_bf16(high)])
        }
    }
    #[inline(always)]
    fn load_i8(self, w: &[i8]) -> __m256 {
        assert!(w.len() >= 8);
        intrinsic!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(w.as_ptr().cast()))))
    }
    #[inline(always)]
    fn look_up_bytes(self, codes: &[u8], map: &[f32; 256]) -> __m256 {
        assert!(codes.len() >= 8);
        // A byte is an index within the map.
        intrinsic!({
            let index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
            _mm256_i32gather_ps::<4>(map.as_ptr(), index)
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, data: &[T], bytes: usize) {
        // A prefetch reads nothing and never faults.
        intrinsic!(_mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast::<i8>().wrapping_add(bytes)));
    }
}
