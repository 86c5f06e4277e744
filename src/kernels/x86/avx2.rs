//! AVX2 + FMA: 8 lanes of f32. GEMM tile 6 x 16: 12 accumulators, 2 of B, 1 broadcast of A fill 15 of 16 registers.
//! bf16 rounding adds 0x7FFF + the lowest kept bit; NF4 looks eight indices up in two 8-entry registers and blends.

mod encode;
mod packed;

use crate::kernels::generic::Simd;
use std::arch::x86_64::*;

/// Proof that AVX2, FMA and F16C may run.
#[derive(Clone, Copy)]
pub(super) struct Avx2(pub(super) ());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

instantiate!(attention Avx2, "avx2,fma,f16c", 6);
instantiate!("avx2", Avx2, "avx2,fma,f16c", 6 x 2);

/// A lane mask with the first `n` lanes set.
#[inline(always)]
fn tail_mask(n: usize) -> __m256i {
    const MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(n <= 8, "tail_mask: {n} lanes");
    // SAFETY: reads 8 of 16 integers starting at 8 - n, in bounds for n <= 8; the token's holder has AVX.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast()) }
}

/// The body of a `Simd` method: the token is the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: `self` exists only after detection of AVX2, FMA and F16C; memory operands are asserted by the method.
        unsafe { $e }
    };
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        intrinsic!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> __m256 {
        assert!(x.len() >= 8);
        intrinsic!(_mm256_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_tail(self, x: &[f32]) -> __m256 {
        let mask = tail_mask(x.len());
        intrinsic!(_mm256_maskload_ps(x.as_ptr(), mask))
    }
    #[inline(always)]
    fn store(self, v: __m256, out: &mut [f32]) {
        assert!(out.len() >= 8);
        intrinsic!(_mm256_storeu_ps(out.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn store_tail(self, v: __m256, out: &mut [f32]) {
        let mask = tail_mask(out.len());
        intrinsic!(_mm256_maskstore_ps(out.as_mut_ptr(), mask, v));
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        intrinsic!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        intrinsic!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn exp2i(self, n: __m256) -> __m256 {
        intrinsic!({
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        intrinsic!({
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        intrinsic!({
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn round_bf16(self, a: __m256) -> __m256 {
        intrinsic!({
            let bits = _mm256_castps_si256(a);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
            let kept = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(!0xFFFF)));
            _mm256_blendv_ps(kept, a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a))
        })
    }
    #[inline(always)]
    fn sqrt(self, a: __m256) -> __m256 {
        intrinsic!(_mm256_sqrt_ps(a))
    }
    #[inline(always)]
    fn nf4_lookup(self, packed: &[u8], code: &[f32; 16]) -> __m256 {
        assert!(packed.len() >= 4);
        let word = i32::from_le_bytes([packed[0], packed[1], packed[2], packed[3]]);
        intrinsic!({
            // Lane i holds element i: byte i / 2, its high nibble first.
            let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
            let index = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32(15));
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code.as_ptr()), index);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code.as_ptr().add(8)), index);
            // Bit 3 of the index, moved to the sign, chooses the upper half.
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
        })
    }

    type U = __m256i;

    #[inline(always)]
    fn splat_u32(self, x: u32) -> __m256i {
        intrinsic!(_mm256_set1_epi32(x as i32))
    }
    #[inline(always)]
    fn xor(self, a: __m256i, b: __m256i) -> __m256i {
        intrinsic!(_mm256_xor_si256(a, b))
    }
    #[inline(always)]
    fn mul_wide(self, a: __m256i, b: u32) -> (__m256i, __m256i) {
        intrinsic!({
            let b = _mm256_set1_epi64x(i64::from(b));
            // Products of the even and of the odd lanes, 64 bits each.
            let even = _mm256_mul_epu32(a, b);
            let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), b);
            let high = _mm256_blend_epi32::<0b1010_1010>(_mm256_srli_epi64::<32>(even), odd);
            (high, _mm256_blend_epi32::<0b1010_1010>(even, _mm256_slli_epi64::<32>(odd)))
        })
    }
    #[inline(always)]
    fn philox_blocks(self, first: u32) -> __m256i {
        intrinsic!(_mm256_add_epi32(_mm256_set1_epi32(first as i32), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)))
    }
    #[inline(always)]
    fn interleave(self, [a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
        intrinsic!({
            let (ab, ab2) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let (cd, cd2) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            [
                _mm256_unpacklo_epi64(ab, cd),
                _mm256_unpackhi_epi64(ab, cd),
                _mm256_unpacklo_epi64(ab2, cd2),
                _mm256_unpackhi_epi64(ab2, cd2),
            ]
        })
    }
    #[inline(always)]
    fn keep(self, a: __m256, words: __m256i, threshold: u32) -> __m256 {
        intrinsic!({
            // words >= threshold, unsigned: the larger of the two is the word.
            let larger = _mm256_max_epu32(words, _mm256_set1_epi32(threshold as i32));
            _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(larger, words)))
        })
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16]) -> __m256 {
        assert!(x.len() >= 8);
        intrinsic!({
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }
    type Square = [__m256; 8];
    #[inline(always)]
    fn square(self, v: __m256) -> [__m256; 8] {
        [v; 8]
    }
    #[inline(always)]
    fn transpose(self, r: [__m256; 8]) -> [__m256; 8] {
        let mut columns = r;
        intrinsic!({
            // Pairs of rows, then fours: u[4 g + c] holds rows 4 g .. 4 g + 4 of column 4 l + c in its half l.
            let mut t = r;
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut u = t;
            for g in 0..2 {
                let [a, b, c, d] = [t[4 * g], t[4 * g + 1], t[4 * g + 2], t[4 * g + 3]];
                u[4 * g] = _mm256_shuffle_ps::<0x44>(a, c);
                u[4 * g + 1] = _mm256_shuffle_ps::<0xEE>(a, c);
                u[4 * g + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                u[4 * g + 3] = _mm256_shuffle_ps::<0xEE>(b, d);
            }
            for c in 0..4 {
                columns[c] = _mm256_permute2f128_ps::<0x20>(u[c], u[4 + c]);
                columns[4 + c] = _mm256_permute2f128_ps::<0x31>(u[c], u[4 + c]);
            }
        });
        columns
    }
}
