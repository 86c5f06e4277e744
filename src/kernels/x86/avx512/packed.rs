//! Packed weights for AVX-512: a block's table is one register, looked up with `vpermps`, or with `vpermw` as bfloat16.

use super::Avx512;
use crate::kernels::gemv::{self, BLOCK, Nf4Gemv, Nf4Pairs, Nf4Rows, Packed, Round, Weights};
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

/// [`crate::kernels::Kernels::nf4_gemv`] and `nf4_pairs` where the CPU has AVX512-BF16: one instruction rounds the table and
/// lays it out twice as 16-bit values, and `vpermw` looks up 32 weights at once (a fifth index bit chooses between equal
/// halves). What it looks up are pairs: `vdpbf16ps` takes them as they are, f32 products after a shift and a mask.
///
/// The instructions take numbers below the smallest normal one, 1.2e-38, for zero.
pub(in crate::kernels::x86) fn nf4_bf16() -> Option<(Nf4Gemv, Nf4Pairs)> {
    Avx512::detect()?;
    let gemv: Nf4Gemv = |w, code, x, out| match w.round {
        // SAFETY: AVX512-BF16 is detected below before this function is handed out, the rest by `detect`.
        Round::Bf16 => unsafe { nf4_rounded(Avx512(()), w, code, x, out) },
        // SAFETY: `detect` has seen the instruction set.
        _ => unsafe { super::nf4_gemv(Avx512(()), w, code, x, out) },
    };
    // SAFETY: AVX512-BF16 is detected below before this function is handed out, the rest by `detect`.
    let pairs: Nf4Gemv = |w, code, x, out| unsafe { nf4_pairs(Avx512(()), w, code, x, out) };
    is_x86_feature_detected!("avx512bf16").then_some((gemv, Nf4Pairs { order: pair_order, gemv: pairs }))
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
        let [a, b] = look_up_pairs(s, packed, scaled(s, self.0, scale));
        intrinsic!({
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

/// The 64 weights of a block as bfloat16: in word `i` of register `r` the weights `ORDER[32 r + i]` and, above it,
/// `ORDER[32 r + 16 + i]`. Only for functions that have AVX512-BF16.
#[inline(always)]
fn look_up_pairs(_: Avx512, packed: &[u8; BLOCK / 2], values: __m512) -> [__m512i; 2] {
    intrinsic!({
        let words = _mm512_broadcast_i64x4(_mm256_loadu_si256(packed.as_ptr().cast()));
        let table = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(values, values));
        macro_rules! nibbles {
            ($first:literal, $second:literal) => {{
                let by = _mm512_inserti64x4::<1>(_mm512_set1_epi16($first), _mm256_set1_epi16($second));
                _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, by), table)
            }};
        }
        [nibbles!(4, 0), nibbles!(12, 8)]
    })
}

/// x in words as [`look_up_pairs`] gives the weights.
fn pair_order(x: &[f32], out: &mut [f32]) {
    assert!(x.len() == 2 * out.len() && x.len().is_multiple_of(BLOCK), "nf4_pairs: lengths differ");
    let order = Avx512::ORDER.map(usize::from);
    for (x, out) in x.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<{ BLOCK / 2 }>().0) {
        for (i, out) in out.iter_mut().enumerate() {
            let at = i / 16 * 32 + i % 16;
            let (low, high) = (x[order[at]].to_bits(), x[order[at + 16]].to_bits());
            *out = f32::from_bits(low >> 16 | high & 0xFFFF_0000);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn nf4_pairs(s: Avx512, w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) {
    let n_x = w.check_pairs(x, out);
    let mut first = 0;
    while first < n_x {
        let count = Avx512::GROUP.min(n_x - first);
        match count {
            1 => pairs_pass::<1>(s, w, code, x, n_x, first, out),
            2 => pairs_pass::<2>(s, w, code, x, n_x, first, out),
            3 => pairs_pass::<3>(s, w, code, x, n_x, first, out),
            _ => pairs_pass::<4>(s, w, code, x, n_x, first, out),
        }
        first += count;
    }
}

/// All rows of W against rows `first .. first + M` of x. Only for functions that have AVX512-BF16.
#[inline(always)]
fn pairs_pass<const M: usize>(
    s: Avx512,
    w: Nf4Rows<'_>,
    code: &[f32; 16],
    x: &[f32],
    n_x: usize,
    first: usize,
    out: &mut [f32],
) {
    let (blocks, words) = (w.cols / BLOCK, w.cols / 2);
    let half = matches!(w.round, Round::F16 | Round::F16ThenBf16);
    let xs: [&[[f32; BLOCK / 2]]; M] =
        std::array::from_fn(|i| x[(first + i) * words..(first + i + 1) * words].as_chunks::<{ BLOCK / 2 }>().0);
    let rows = w.packed.as_chunks::<{ BLOCK / 2 }>().0.chunks_exact(blocks).zip(w.scales.chunks_exact(blocks));
    for ((bytes, scales), out) in rows.zip(out.chunks_exact_mut(n_x)) {
        let mut acc = [[s.splat(0.0); 2]; M];
        for (b, (bytes, &scale)) in bytes.iter().zip(scales).enumerate() {
            let values = scaled(s, code, scale);
            let values = if half { round_f16(s, values) } else { values };
            let weights = look_up_pairs(s, bytes, values);
            for i in 0..M {
                for r in 0..2 {
                    let x = s.load(&xs[i][b][16 * r..]);
                    acc[i][r] = intrinsic!({
                        let weights = std::mem::transmute::<__m512i, __m512bh>(weights[r]);
                        _mm512_dpbf16_ps(acc[i][r], weights, std::mem::transmute::<__m512, __m512bh>(x))
                    });
                }
            }
        }
        for (out, acc) in out[first..first + M].iter_mut().zip(&acc) {
            *out = s.sum(s.add(acc[0], acc[1]));
        }
    }
}
