//! Packed weights for AVX-512: a block's table is one register, looked up with `vpermps`, or with `vpermw` as pairs of bfloat16.

use super::Avx512;
use crate::kernels::gemv::{AHEAD, BLOCK, Nf4Gemv, Nf4Pairs, Nf4Rows, Packed, Room, Round, group};
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

/// Rounded to bfloat16, ties to even, for tables: below 2^-126 to 8 digits, and not beyond 2^111.
///
/// With `t = X ulp(t)`, `c = 65535 t` is `2^16 X - X` rounded to a multiple of 2^16, which leaves `65536 t - c`, exact in one fused
/// step, as X rounded to a multiple of 2^16: its upper 8 digits. At a tie X is even, so that both have the same parity. Just
/// above a power of two c has one digit more, and X lies next to the power itself. (Dekker 1971, with an odd factor that
/// never carries into the next power.) Integer arithmetic takes five instructions for the same.
#[inline(always)]
fn round_table(_: Avx512, table: __m512) -> __m512 {
    intrinsic!({
        let c = _mm512_mul_ps(table, _mm512_set1_ps(65535.0));
        _mm512_fmsub_ps(table, _mm512_set1_ps(65536.0), c)
    })
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
    const GROUP: usize = 8;
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
        lookup(self, packed, round_table(self, scaled(self, code, scale)))
    }
    #[inline(always)]
    fn nf4_f16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m512; 4] {
        lookup(self, packed, round_f16(self, scaled(self, code, scale)))
    }
    #[inline(always)]
    fn nf4_f16_bf16(self, packed: &[u8; BLOCK / 2], code: &[f32; 16], scale: f32) -> [__m512; 4] {
        lookup(self, packed, round_table(self, round_f16(self, scaled(self, code, scale))))
    }
    #[inline(always)]
    fn load_i8(self, w: &[i8]) -> __m512 {
        assert!(w.len() >= 16);
        intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(w.as_ptr().cast()))))
    }
    #[inline(always)]
    fn look_up_bytes(self, codes: &[u8], map: &[f32; 256]) -> __m512 {
        assert!(codes.len() >= 16);
        // A byte is an index within the map.
        intrinsic!({
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            _mm512_i32gather_ps::<4>(index, map.as_ptr())
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, data: &[T], bytes: usize) {
        // A prefetch reads nothing and never faults.
        intrinsic!(_mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast::<i8>().wrapping_add(bytes)));
    }
}

/// [`crate::kernels::Kernels::nf4_pairs`] where the CPU has AVX512-BF16: one instruction rounds the table and lays it out
/// twice as 16-bit values, `vpermw` looks up 32 weights at once (a fifth index bit chooses between equal halves), and what
/// it looks up are pairs that `vdpbf16ps` takes as they are.
///
/// The instructions take numbers below the smallest normal one, 1.2e-38, for zero.
pub(in crate::kernels::x86) fn nf4_pairs() -> Option<Nf4Pairs> {
    Avx512::detect()?;
    // SAFETY: AVX512-BF16 is detected below before this function is handed out, the rest by `detect`.
    let gemv: Nf4Gemv = |w, code, x, out| unsafe { pairs(Avx512(()), w, code, x, out) };
    is_x86_feature_detected!("avx512bf16").then_some(Nf4Pairs { order: pair_order, gemv })
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
fn pairs(s: Avx512, w: Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) {
    let n_x = w.check_pairs(x, out);
    let mut first = 0;
    while first < n_x {
        let count = group(Avx512::GROUP, n_x - first);
        match count {
            1 => pairs_pass::<1>(s, w, code, x, n_x, first, out),
            2 => pairs_pass::<2>(s, w, code, x, n_x, first, out),
            3 => pairs_pass::<3>(s, w, code, x, n_x, first, out),
            8 => pairs_pass::<8>(s, w, code, x, n_x, first, out),
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
    let rows = w.packed.as_chunks::<{ BLOCK / 2 }>().0.chunks_exact(blocks);
    let mut room = Room::NEW;
    for (j, (bytes, out)) in rows.zip(out.chunks_exact_mut(n_x)).enumerate() {
        let scales = w.scales.row(s, j, blocks, &mut room);
        let mut acc = [[s.splat(0.0); 2]; M];
        for (b, (bytes, scale)) in bytes.iter().zip(scales).enumerate() {
            s.prefetch(bytes, AHEAD);
            let values = scaled(s, code, *scale);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn rounded(s: Avx512, x: &[f32; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        s.store(round_table(s, s.load(x)), &mut out);
        out
    }

    #[test]
    fn every_mantissa_is_rounded_as_the_reference_rounds() {
        let Some(s) = Avx512::detect() else {
            eprintln!("left out: rounding on AVX-512, which this machine lacks");
            return;
        };
        for exponent in [1.0, 2f32.powi(-20), -1.5 * 2f32.powi(60)] {
            for first in (0..1 << 23).step_by(16) {
                let x = std::array::from_fn(|i| f32::from_bits(0x3F80_0000 | (first + i as u32)) * exponent);
                // SAFETY: `s` exists only after detection.
                let got = unsafe { rounded(s, &x) };
                assert_eq!(got, x.map(|x| half::bf16::from_f32(x).to_f32()), "{x:?}");
            }
        }
    }
}
