//! Packed weights for AVX-512: a block's table is one register, looked up with `vpermps`, or with `vpermw` as bfloat16.

use super::Avx512;
use crate::kernels::gemv::{self, BLOCK, Nf4Gemv, Nf4Rows, Packed, Round, Weights};
use crate::kernels::generic::Simd;
use std::arch::x86_64::*;

/// The body of a function that takes the token: the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: the token exists only after detection of AVX-512; memory operands are arrays of the loaded length, or
        // asserted.
        unsafe { $e }
    };
}

/// The 16 values of a block.
#[inline(always)]
fn scaled(_: Avx512, code: &[f32; 16], scale: f32) -> __m512 {
    intrinsic!(_mm512_mul_ps(_mm512_loadu_ps(code.as_ptr()), _mm512_set1_ps(scale)))
}

/// Rounded to half precision and back.
#[inline(always)]
fn round_f16(_: Avx512, table: __m512) -> __m512 {
    intrinsic!(_mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(table)))
}

/// A block's indices looked up in its table: the bytes as 8 words of 8 nibbles, twice in a register; each shift moves one
/// nibble of the first copy and its neighbour of the second to the low end, which is all that `vpermps` looks at.
#[inline(always)]
fn lookup(_: Avx512, packed: &[u8; BLOCK / 2], table: __m512) -> [__m512; 4] {
    intrinsic!({
        let words = _mm512_broadcast_i64x4(_mm256_loadu_si256(packed.as_ptr().cast()));
        macro_rules! nibbles {
            ($first:literal, $second:literal) => {{
                let by = _mm512_inserti64x4::<1>(_mm512_set1_epi32($first), _mm256_set1_epi32($second));
                _mm512_permutexvar_ps(_mm512_srlv_epi32(words, by), table)
            }};
        }
        [nibbles!(4, 0), nibbles!(20, 16), nibbles!(12, 8), nibbles!(28, 24)]
    })
}

impl Packed for Avx512 {
    type Block = [__m512; 4];
    const GROUP: usize = 4;
    const ORDER: [u8; BLOCK] = {
        let mut order = [0; BLOCK];
        let mut i = 0;
        while i < BLOCK {
            let (vector, lane) = (i / 16, i % 16);
            order[i] = (lane % 8 * 8 + vector % 2 * 4 + vector / 2 * 2 + lane / 8) as u8;
            i += 1;
        }
        order
    };

    #[inline(always)]
    fn nf4_f32(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m512; 4] {
        lookup(self, packed, scaled(self, code, scale))
    }
    #[inline(always)]
    fn nf4_bf16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m512; 4] {
        lookup(self, packed, self.round_bf16(scaled(self, code, scale)))
    }
    #[inline(always)]
    fn nf4_f16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m512; 4] {
        lookup(self, packed, round_f16(self, scaled(self, code, scale)))
    }
    #[inline(always)]
    fn nf4_f16_bf16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m512; 4] {
        lookup(self, packed, self.round_bf16(round_f16(self, scaled(self, code, scale))))
    }
    #[inline(always)]
    fn load_i8(self, w: &[i8]) -> __m512 {
        assert!(w.len() >= 16);
        intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(w.as_ptr().cast()))))
    }
}

/// [`crate::kernels::Kernels::nf4_gemv`] where the CPU has AVX512-BF16: one instruction rounds the table and lays it out
/// twice as 16-bit values, and `vpermw` looks up 32 weights at once (a fifth index bit chooses between equal halves).
///
/// The instruction takes products below the smallest normal number, 1.2e-38, for zero.
pub(in crate::kernels::x86) fn nf4_gemv_bf16() -> Option<Nf4Gemv> {
    Avx512::detect()?;
    is_x86_feature_detected!("avx512bf16").then_some(|w, code, x, out| match w.round {
        // SAFETY: AVX512-BF16 was detected just above, the rest by `detect`.
        Round::Bf16 => unsafe { nf4_rounded(Avx512(()), w, code, x, out) },
        // SAFETY: `detect` has seen the instruction set.
        _ => unsafe { super::nf4_gemv(Avx512(()), w, code, x, out) },
    })
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn nf4_rounded(s: Avx512, w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) {
    gemv::nf4_groups(s, w, x, out, Bf16Table(code));
}

/// Indices into a code book, `code · scale` rounded to bfloat16 by AVX512-BF16; used by `nf4_rounded` alone.
#[derive(Clone, Copy)]
struct Bf16Table<'a>(&'a [f32; 16]);

impl Weights<Avx512> for Bf16Table<'_> {
    #[inline(always)]
    fn of(self, s: Avx512, packed: &[u8; BLOCK / 2], scale: f32) -> [__m512; 4] {
        intrinsic!({
            let words = _mm512_broadcast_i64x4(_mm256_loadu_si256(packed.as_ptr().cast()));
            let values = scaled(s, self.0, scale);
            let table = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(values, values));
            macro_rules! nibbles {
                ($first:literal, $second:literal) => {{
                    let by = _mm512_inserti64x4::<1>(_mm512_set1_epi16($first), _mm256_set1_epi16($second));
                    _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, by), table)
                }};
            }
            let (a, b) = (nibbles!(4, 0), nibbles!(12, 8));
            let odd = _mm512_set1_epi32(!0xFFFF);
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
                _mm512_castsi512_ps(_mm512_and_si512(a, odd)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)),
                _mm512_castsi512_ps(_mm512_and_si512(b, odd)),
            ]
        })
    }
}
