//! AVX-512 BF16: the AVX-512 table with products of bf16 pairs by `vdpbf16ps`, 12 x 32.
//!
//! On AMD (Zen 4 and later) the instruction does twice the work of an f32 FMA in the same time; on Intel's server cores
//! it runs at half the rate of FMA, so there the table is offered after the f32 one.

use super::avx512::{self, Avx512};
use super::made_by;
use crate::kernels::Kernels;
use crate::kernels::gemm::{self, GemmTile, PairKernels, PanelA, Rows, TileC, check_nf4};
use crate::kernels::gemv::Packed;
use crate::kernels::generic::Simd;
use crate::kernels::int8;
use std::arch::x86_64::*;

/// Proof that AVX-512 BF16 may run beside what [`Avx512`] proves.
#[derive(Clone, Copy)]
struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    fn detect() -> Option<Self> {
        let base = Avx512::detect()?;
        is_x86_feature_detected!("avx512bf16").then_some(Self(base))
    }
}

pub(super) fn table() -> Option<Kernels> {
    Avx512Bf16::detect()?;
    let tile = GemmTile {
        mr: 12,
        nr: 32,
        panel_a: PanelA::Columns,
        // SAFETY: only `table` hands these functions out, after `detect` has seen the instruction set.
        run: |a, b, c| unsafe { tile(Avx512Bf16(Avx512(())), a, b, c) },
    };
    Some(Kernels {
        isa: "avx512bf16",
        pairs: Some(PairKernels {
            tile,
            fast: made_by(b"AuthenticAMD"),
            // SAFETY: as above.
            pack_row: |x, out| unsafe { pack_row(Avx512Bf16(Avx512(())), x, out) },
            // SAFETY: as above.
            pack_lines: |x, out, stride| unsafe { pack_lines(Avx512Bf16(Avx512(())), x, out, stride) },
            // SAFETY: as above.
            join_rows: |rows, out, width| unsafe { join_rows(Avx512Bf16(Avx512(())), rows, out, width) },
            // SAFETY: as above.
            join_halves: |rows, out, width| unsafe { join_halves(Avx512Bf16(Avx512(())), rows, out, width) },
            // SAFETY: as above.
            nf4: |packed, scales, block, code, out| unsafe {
                nf4(Avx512Bf16(Avx512(())), packed, scales, block, code, out);
            },
            // SAFETY: as above.
            int8: |codes, absmax, out| unsafe { int8(Avx512Bf16(Avx512(())), codes, absmax, out) },
        }),
        ..avx512::table()?
    })
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn tile(s: Avx512Bf16, a: &[f32], b: &[f32], c: TileC<'_, '_>) {
    let pairs = |a: __m512, b: __m512, sum: __m512| {
        // SAFETY: same width, any bits; the token proves the instruction.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    };
    gemm::tile::<Avx512, 12, 2>(s.0, pairs, a, b, c);
}

/// The 32 bf16 of two vectors, those of `first` in the lower half.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round_two(first: __m512, second: __m512) -> __m512 {
    // SAFETY: same width, any bits.
    unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// Note that `vcvtne2ps2bf16` flushes denormal inputs to zero; the sums of products do so as well.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn pack_row(token: Avx512Bf16, x: &[f32], out: &mut [f32]) {
    let s = token.0;
    assert_eq!(x.len().div_ceil(2), out.len(), "pack_row: lengths differ");
    let (body, x) = x.split_at(x.len() / 32 * 32);
    let (words, out) = out.split_at_mut(body.len() / 2);
    for (x, out) in body.chunks_exact(32).zip(words.chunks_exact_mut(16)) {
        s.store(round_two(s.load(x), s.load(&x[16..])), out);
    }
    let (first, second) = x.split_at(x.len().min(16));
    let first = if first.len() == 16 { s.load(first) } else { s.load_tail(first) };
    let second = s.load_tail(second);
    let last = round_two(first, second);
    if out.len() == 16 { s.store(last, out) } else { s.store_tail(last, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn pack_lines(token: Avx512Bf16, x: &[f32], out: &mut [f32], stride: usize) {
    let s = token.0;
    let mut rows = x.chunks_exact(32);
    let mut line = 0;
    for x in &mut rows {
        s.store(round_two(s.load(x), s.load(&x[16..])), &mut out[line..line + 16]);
        line += stride;
    }
    let rest = rows.remainder();
    if !rest.is_empty() {
        let (first, second) = rest.split_at(rest.len().min(16));
        s.store(round_two(s.load_tail(first), s.load_tail(second)), &mut out[line..line + 16]);
    }
}

/// Interleaves the lower 16 halves of `both` with its upper 16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(both: __m512) -> __m512 {
    /// 0, 16, 1, 17, ...
    const ORDER: [u16; 32] = {
        let (mut order, mut i) = ([0; 32], 0);
        while i < 32 {
            order[i as usize] = i / 2 + 16 * (i % 2);
            i += 1;
        }
        order
    };
    // SAFETY: the array is as wide as the vector.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(both)))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn join_rows(token: Avx512Bf16, rows: &Rows<'_>, out: &mut [f32], width: usize) {
    let s = token.0;
    for p in 0..rows.count.div_ceil(2) {
        let (low, high) = rows.pair(p);
        let out = &mut out[p * width..][..low.len()];
        let body = low.len() / 16 * 16;
        let (mut lows, mut outs) = (low.chunks_exact(16), out.chunks_exact_mut(16));
        match high {
            Some(high) => {
                for ((low, high), out) in (&mut lows).zip(high.chunks_exact(16)).zip(&mut outs) {
                    s.store(interleave(round_two(s.load(low), s.load(high))), out);
                }
            }
            None => {
                for (low, out) in (&mut lows).zip(&mut outs) {
                    s.store(interleave(round_two(s.load(low), s.splat(0.0))), out);
                }
            }
        }
        if body < low.len() {
            let upper = high.map_or(s.splat(0.0), |high| s.load_tail(&high[body..]));
            s.store_tail(interleave(round_two(s.load_tail(&low[body..]), upper)), &mut out[body..]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn join_halves(token: Avx512Bf16, rows: &Rows<'_, u16>, out: &mut [f32], width: usize) {
    let s = token.0;
    for p in 0..rows.count.div_ceil(2) {
        let (low, high) = rows.pair(p);
        let out = &mut out[p * width..][..low.len()];
        let body = low.len() / 16 * 16;
        let (mut lows, mut outs) = (low.chunks_exact(16), out.chunks_exact_mut(16));
        match high {
            Some(high) => {
                for ((low, high), out) in (&mut lows).zip(high.chunks_exact(16)).zip(&mut outs) {
                    // SAFETY: both pieces hold 16 halves.
                    let (low, high) =
                        unsafe { (_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())) };
                    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
                    s.store(interleave(_mm512_castsi512_ps(both)), out);
                }
            }
            None => {
                for (low, out) in (&mut lows).zip(&mut outs) {
                    for (out, low) in out.iter_mut().zip(low) {
                        *out = f32::from_bits(u32::from(*low));
                    }
                }
            }
        }
        for at in body..low.len() {
            out[at] = f32::from_bits(u32::from(low[at]) | high.map_or(0, |high| u32::from(high[at])) << 16);
        }
    }
}

/// The bytes that the lanes of [`nf4`] take: each lane of 128 bits has all 16 and takes its four, each into a word of its own.
const TWICE: [u8; 64] = {
    let (mut twice, mut i) = ([0x80; 64], 0);
    while i < 64 {
        twice[i] = (i / 4) as u8;
        i += 2;
    }
    twice
};

/// 16 bytes, each twice in a word of its own; a shift brings one nibble of each to the low end of its half, and one `vpermw`
/// looks 32 elements up in the block's own table.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn nf4(token: Avx512Bf16, packed: &[u8], scales: &[f32], block: usize, code: &[f32; 16], out: &mut [u16]) {
    check_nf4(packed.len(), scales.len(), block, out.len());
    let s = token.0;
    let code = s.load(code);
    // SAFETY: the array is as wide as the vector.
    let (twice, by) = unsafe { (_mm512_loadu_si512(TWICE.as_ptr().cast()), _mm512_set1_epi32(4)) };
    for ((out, bytes), scale) in out.chunks_mut(block).zip(packed.chunks(block / 2)).zip(scales) {
        let scaled = s.mul(code, s.splat(*scale));
        // Entries 16 .. 32 repeat the first 16: the bit above a nibble does not matter.
        let table = _mm512_castps_si512(round_two(scaled, scaled));
        let mut outs = out.chunks_exact_mut(32);
        for (out, bytes) in (&mut outs).zip(bytes.chunks_exact(16)) {
            // SAFETY: 16 bytes are read and 32 halves written.
            unsafe {
                let bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().cast()));
                let index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, twice), by);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(index, table));
            }
        }
        let tail = outs.into_remainder();
        if !tail.is_empty() {
            let mut entries = [0_u16; 32];
            // SAFETY: 32 halves are written.
            unsafe { _mm512_storeu_si512(entries.as_mut_ptr().cast(), table) };
            let rest = &bytes[bytes.len() - tail.len().div_ceil(2)..];
            for (i, out) in tail.iter_mut().enumerate() {
                *out = entries[usize::from(if i % 2 == 0 { rest[i / 2] >> 4 } else { rest[i / 2] & 15 })];
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn int8(token: Avx512Bf16, codes: &[i8], absmax: f32, out: &mut [u16]) {
    int8::check(codes.len(), out.len());
    let s = token.0;
    let (absmax, step) = (s.splat(absmax), s.splat(int8::STEP));
    let weights = |codes: &[i8]| s.mul(s.mul(s.load_i8(codes), absmax), step);
    let (mut rows, mut outs) = (codes.chunks_exact(32), out.chunks_exact_mut(32));
    for (codes, out) in (&mut rows).zip(&mut outs) {
        let both = round_two(weights(codes), weights(&codes[16..]));
        // SAFETY: 32 halves are written.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().cast(), both) };
    }
    let (rest, out) = (rows.remainder(), outs.into_remainder());
    let (mut whole, mut halves) = ([0; 32], [0_u16; 32]);
    whole[..rest.len()].copy_from_slice(rest);
    let both = round_two(weights(&whole), weights(&whole[16..]));
    // SAFETY: 32 halves are written.
    unsafe { _mm512_storeu_ps(halves.as_mut_ptr().cast(), both) };
    out.copy_from_slice(&halves[..rest.len()]);
}
