//! Few rows in 16 bits (`kernels/int16_gemv.rs`): NF4 looked up by `vpermw`, 128 weights of two blocks at a time, or by
//! `vpshufb`, lower and upper bytes apart, 64 of one.

use super::avx2::Avx2;
use super::avx512::Avx512;
use super::bytes::{Vnni256, Vnni512};
use super::shorts::codes256;
use crate::kernels::gemv::{BLOCK, Nf4Rows};
use crate::kernels::int16_gemv::{self, Codes16, Int16Gemv, Layout, Packed16, ShortsGemv};
use std::arch::x86_64::*;

/// The body of a method: the token is the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: a token exists only after detection of its instruction set; memory operands are of the asserted length.
        unsafe { $e }
    };
}

/// Each 16 bits of the packed bytes are four indices, from the lowest: the second, the first, the fourth and the third element.
const ORDER_512: [[u8; BLOCK]; 2] = {
    let mut order = [[0; BLOCK]; 2];
    let mut i = 0;
    while i < 2 * BLOCK {
        order[i / BLOCK][i % BLOCK] = (i % 32 * 4) as u8 + [1, 0, 3, 2][i / 32];
        i += 1;
    }
    order
};

impl ShortsGemv<2> for Vnni512 {
    const ORDER: [[u8; BLOCK]; 2] = ORDER_512;
    type Everywhere = __m512i;

    #[inline(always)]
    fn everywhere(self, table: __m256i) -> __m512i {
        intrinsic!(_mm512_broadcast_i64x4(table))
    }
    #[inline(always)]
    fn look_up_unit(self, packed: &Packed16<2>, table: __m512i) -> [__m512i; 4] {
        intrinsic!({
            // Of an index `vpermw` sees five bits; the table is there twice, so the fifth does not matter.
            let indices = _mm512_loadu_si512(packed.as_ptr().cast());
            [
                _mm512_permutexvar_epi16(indices, table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(indices), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(indices), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(indices), table),
            ]
        })
    }
    type Wide = [__m512i; 2];
    #[inline(always)]
    fn widen(self, codes: &[i8; BLOCK]) -> [__m512i; 2] {
        intrinsic!([
            _mm512_cvtepi8_epi16(_mm256_loadu_si256(codes.as_ptr().cast())),
            _mm512_cvtepi8_epi16(_mm256_loadu_si256(codes.as_ptr().add(32).cast())),
        ])
    }
    #[inline(always)]
    fn unit_scales(self, scales: &[f32; 2]) -> __m512 {
        intrinsic!({
            let both = _mm512_castpd_ps(_mm512_set1_pd(scales.as_ptr().cast::<f64>().read_unaligned()));
            let halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            _mm512_permutexvar_ps(halves, both)
        })
    }
}

/// Of the high nibbles and of the low ones, what `codes256` makes of their bytes: of each half of 128 bits the first eight, then
/// the others.
const ORDER_256: [[u8; BLOCK]; 1] = {
    let mut order = [[0; BLOCK]; 1];
    let mut i = 0;
    while i < BLOCK {
        let (vector, word) = (i / 16, i % 16);
        let byte = word / 8 * 16 + vector % 2 * 8 + word % 8;
        order[0][i] = (2 * byte + vector / 2) as u8;
        i += 1;
    }
    order
};

/// What both 256-bit sets share.
macro_rules! shorts_gemv256 {
    ($token:ty) => {
        impl ShortsGemv<1> for $token {
            const ORDER: [[u8; BLOCK]; 1] = ORDER_256;
            type Everywhere = [__m256i; 2];

            #[inline(always)]
            fn everywhere(self, [lower, upper]: [__m128i; 2]) -> [__m256i; 2] {
                intrinsic!([_mm256_broadcastsi128_si256(lower), _mm256_broadcastsi128_si256(upper)])
            }
            #[inline(always)]
            fn look_up_unit(self, packed: &Packed16<1>, table: [__m256i; 2]) -> [__m256i; 4] {
                intrinsic!({
                    let bytes = _mm256_loadu_si256(packed[0].as_ptr().cast());
                    let nibbles = _mm256_set1_epi8(15);
                    let [a, b] = codes256(table, _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibbles));
                    let [c, d] = codes256(table, _mm256_and_si256(bytes, nibbles));
                    [a, b, c, d]
                })
            }
            type Wide = [__m256i; 4];
            #[inline(always)]
            fn widen(self, codes: &[i8; BLOCK]) -> [__m256i; 4] {
                intrinsic!([
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().add(16).cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().add(32).cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().add(48).cast())),
                ])
            }
            #[inline(always)]
            fn unit_scales(self, scales: &[f32; 1]) -> __m256 {
                intrinsic!(_mm256_set1_ps(scales[0]))
            }
        }
    };
}

shorts_gemv256!(Vnni256);
shorts_gemv256!(Avx2);

/// The functions of one token, which carry the `target_feature`, and their entries.
macro_rules! instantiate_gemv {
    ($module:ident, $token:ty, $make:expr, $features:literal, $unit:literal) => {
        pub(super) mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn encode(s: $token, x: &[f32], layout: Layout, words: &mut [f32], scales: &mut [f32]) {
                int16_gemv::encode::<_, $unit>(s, x, layout, words, scales);
            }
            #[target_feature(enable = $features)]
            fn int8(s: $token, w: &[i8], scales: &[f32], x: Codes16<'_>, out: &mut [f32]) {
                int16_gemv::int8::<_, $unit>(s, w, scales, x, out);
            }
            #[target_feature(enable = $features)]
            fn nf4(s: $token, w: Nf4Rows<'_>, code: &[f32; 16], x: Codes16<'_>, out: &mut [f32]) {
                int16_gemv::nf4::<_, $unit>(s, w, code, x, out);
            }

            /// Hands the functions out where their instructions may run.
            pub(in super::super) fn table(detected: Option<$token>, fast: bool) -> Option<Int16Gemv> {
                detected?;
                Some(Int16Gemv {
                    fast,
                    unit: $unit,
                    // SAFETY: the token of the detection above proves the instruction set, here and below.
                    encode: |x, layout, words, scales| unsafe { encode($make, x, layout, words, scales) },
                    // SAFETY: as above.
                    nf4: |w, code, x, out| unsafe { nf4($make, w, code, x, out) },
                    // SAFETY: as above.
                    int8: |w, scales, x, out| unsafe { int8($make, w, scales, x, out) },
                })
            }
        }
    };
}

instantiate_gemv!(vnni512, Vnni512, Vnni512(Avx512(())), "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma", 2);
instantiate_gemv!(vnni256, Vnni256, Vnni256(Avx2(())), "avxvnni,avx2,fma,f16c", 1);
instantiate_gemv!(plain, Avx2, Avx2(()), "avx2,fma,f16c", 1);
