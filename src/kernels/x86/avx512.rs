//! AVX-512 F/BW/DQ/VL: 16 lanes of f32. GEMM tile 12 x 32: 24 accumulators, 2 of B, broadcasts of A from memory.
//! The 16-entry NF4 table is one register, looked up with `vpermps`.

mod encode;
mod packed;

use crate::kernels::generic::Simd;
pub(super) use packed::nf4_pairs;
use std::arch::x86_64::*;

/// Proof that AVX-512 F, BW, DQ and VL may run.
#[derive(Clone, Copy)]
pub(super) struct Avx512(pub(super) ());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma");
        all.then_some(Self(()))
    }
}

instantiate!("avx512", Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", 12 x 2);
instantiate!(attention Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", 12);

/// A lane mask with the first `n` lanes set.
#[inline(always)]
fn tail_mask(n: usize) -> __mmask16 {
    assert!(n <= 16, "tail_mask: {n} lanes");
    ((1_u32 << n) - 1) as __mmask16
}

/// The body of a `Simd` method: the token is the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: `self` exists only after detection of AVX-512; memory operands are asserted by the method.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> __m512 {
        assert!(x.len() >= 16);
        intrinsic!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_tail(self, x: &[f32]) -> __m512 {
        let mask = tail_mask(x.len());
        intrinsic!(_mm512_maskz_loadu_ps(mask, x.as_ptr()))
    }
    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32]) {
        assert!(out.len() >= 16);
        intrinsic!(_mm512_storeu_ps(out.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn store_tail(self, v: __m512, out: &mut [f32]) {
        let mask = tail_mask(out.len());
        intrinsic!(_mm512_mask_storeu_ps(out.as_mut_ptr(), mask, v));
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        intrinsic!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn exp2i(self, n: __m512) -> __m512 {
        intrinsic!({
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn scale2(self, a: __m512, n: __m512) -> __m512 {
        intrinsic!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(a))
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn round_bf16(self, a: __m512) -> __m512 {
        intrinsic!({
            let bits = _mm512_castps_si512(a);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
            let kept = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(!0xFFFF)));
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), kept, a)
        })
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        intrinsic!(_mm512_sqrt_ps(a))
    }
    #[inline(always)]
    fn nf4_lookup(self, packed: &[u8], code: &[f32; 16]) -> __m512 {
        assert!(packed.len() >= 8);
        intrinsic!({
            // Bytes b0..b7 to 16 lanes: widen to 16 bits, double each into (b >> 4, b & 15), widen to 32 bits.
            let bytes = _mm_loadl_epi64(packed.as_ptr().cast());
            let twice = _mm_unpacklo_epi8(
                _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15)),
                _mm_and_si128(bytes, _mm_set1_epi8(15)),
            );
            _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(twice), _mm512_loadu_ps(code.as_ptr()))
        })
    }

    type U = __m512i;

    #[inline(always)]
    fn splat_u32(self, x: u32) -> __m512i {
        intrinsic!(_mm512_set1_epi32(x as i32))
    }
    #[inline(always)]
    fn xor(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_xor_si512(a, b))
    }
    #[inline(always)]
    fn mul_wide(self, a: __m512i, b: u32) -> (__m512i, __m512i) {
        intrinsic!({
            let b = _mm512_set1_epi64(i64::from(b));
            // Products of the even and of the odd lanes, 64 bits each.
            let even = _mm512_mul_epu32(a, b);
            let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(a), b);
            let high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64::<32>(even), odd);
            (high, _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64::<32>(odd)))
        })
    }
    #[inline(always)]
    fn philox_blocks(self, first: u32) -> __m512i {
        intrinsic!({
            let lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_add_epi32(_mm512_set1_epi32(first as i32), lanes)
        })
    }
    #[inline(always)]
    fn interleave(self, [a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
        intrinsic!({
            let (ab, ab2) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd, cd2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ab2, cd2),
                _mm512_unpackhi_epi64(ab2, cd2),
            ]
        })
    }
    #[inline(always)]
    fn keep(self, a: __m512, words: __m512i, threshold: u32) -> __m512 {
        intrinsic!(_mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(words, _mm512_set1_epi32(threshold as i32)), a))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16]) -> __m512 {
        assert!(x.len() >= 16);
        intrinsic!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }
    type Square = [__m512; 16];
    #[inline(always)]
    fn square(self, v: __m512) -> [__m512; 16] {
        [v; 16]
    }
    #[inline(always)]
    fn transpose(self, r: [__m512; 16]) -> [__m512; 16] {
        let mut columns = r;
        intrinsic!({
            // Pairs of rows, then fours: u[4 g + c] holds rows 4 g .. 4 g + 4 of column 4 l + c in its lane l of 128 bits.
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let pd = |v: __m512| _mm512_castps_pd(v);
            let ps = |v: __m512d| _mm512_castpd_ps(v);
            let mut u = t;
            for g in 0..4 {
                let [a, b, c, d] = [t[4 * g], t[4 * g + 1], t[4 * g + 2], t[4 * g + 3]];
                u[4 * g] = ps(_mm512_unpacklo_pd(pd(a), pd(c)));
                u[4 * g + 1] = ps(_mm512_unpackhi_pd(pd(a), pd(c)));
                u[4 * g + 2] = ps(_mm512_unpacklo_pd(pd(b), pd(d)));
                u[4 * g + 3] = ps(_mm512_unpackhi_pd(pd(b), pd(d)));
            }
            // Column 4 l + c is lane l of the four u[4 g + c].
            for c in 0..4 {
                let even_low = _mm512_shuffle_f32x4::<0x88>(u[c], u[4 + c]);
                let odd_low = _mm512_shuffle_f32x4::<0xDD>(u[c], u[4 + c]);
                let even_high = _mm512_shuffle_f32x4::<0x88>(u[8 + c], u[12 + c]);
                let odd_high = _mm512_shuffle_f32x4::<0xDD>(u[8 + c], u[12 + c]);
                columns[c] = _mm512_shuffle_f32x4::<0x88>(even_low, even_high);
                columns[8 + c] = _mm512_shuffle_f32x4::<0xDD>(even_low, even_high);
                columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high);
                columns[12 + c] = _mm512_shuffle_f32x4::<0xDD>(odd_low, odd_high);
            }
        });
        columns
    }
}
