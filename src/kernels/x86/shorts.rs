//! Products of 16-bit pairs: `vpdpwssd` of VNNI, 512 bits wide (AVX512-VNNI) and 256 (AVX-VNNI), and of AVX2 without it
//! `vpmaddwd` and an addition.

use super::avx2::Avx2;
use super::avx512::Avx512;
use super::bytes::{Vnni256, Vnni512};
use super::made_by;
use crate::kernels::gemm::{GemmTile, PanelA, Rows, TileC};
use crate::kernels::generic::Simd;
use crate::kernels::int16::{self, BLOCK, Int16Kernels, Nf4Column, Shorts};
use crate::kernels::integer::Bytes;
use std::arch::asm;
use std::arch::x86_64::*;

/// The body of a method: the token is the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: a token exists only after detection of its instruction set; memory operands are arrays of the loaded length.
        unsafe { $e }
    };
}

/// `vpdpwssd` as it is: of the intrinsic the compiler makes `vpmaddwd` and an addition where it takes a chain of sums for slow,
/// which is two instructions instead of one.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dpwssd512(mut sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
    // SAFETY: registers in, a register out.
    unsafe {
        asm!(
            "vpdpwssd {sums}, {w}, {x}",
            sums = inlateout(zmm_reg) sums, w = in(zmm_reg) w, x = in(zmm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// The same of AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn dpwssd256(mut sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: as above.
    unsafe {
        asm!(
            "{{vex}} vpdpwssd {sums}, {w}, {x}",
            sums = inlateout(ymm_reg) sums, w = in(ymm_reg) w, x = in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

impl Shorts for Vnni512 {
    #[inline(always)]
    fn dot2(self, sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
        intrinsic!(dpwssd512(sums, w, x))
    }
    #[inline(always)]
    fn max_bits(self, m: __m512i, x: __m512) -> __m512i {
        intrinsic!(_mm512_max_epu32(m, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX))))
    }
    #[inline(always)]
    fn floats_of(self, bits: __m512i) -> __m512 {
        intrinsic!(_mm512_castsi512_ps(bits))
    }
    #[inline(always)]
    fn halves(self, low: __m512, high: __m512) -> __m512 {
        intrinsic!({
            let high = _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(high));
            _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAA_AAAA, _mm512_cvtps_epi32(low), high))
        })
    }
    #[inline(always)]
    fn neighbours(self, first: __m512, second: __m512) -> __m512 {
        intrinsic!({
            // Lanes of 128 bits hold four codes of each, so that every other 64 bits belong together.
            let mixed = _mm512_packs_epi32(_mm512_cvtps_epi32(first), _mm512_cvtps_epi32(second));
            _mm512_castsi512_ps(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed))
        })
    }

    type Table = __m256i;
    type Words = [__m512; 2];

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> __m256i {
        intrinsic!(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_loadu_ps(values.as_ptr()))))
    }
    #[inline(always)]
    fn look_up(self, packed: &[u8; BLOCK / 2], table: __m256i) -> [__m512; 2] {
        intrinsic!({
            // 16-bit indices whose lower five bits count, into the table twice: the high nibble below, the low one above.
            let table = _mm512_broadcast_i64x4(table);
            let [first, second] =
                [_mm_loadu_si128(packed.as_ptr().cast()), _mm_loadu_si128(packed.as_ptr().add(16).cast())];
            let (first, second) = (_mm512_cvtepu8_epi32(first), _mm512_cvtepu8_epi32(second));
            let first = _mm512_or_si512(_mm512_srli_epi32::<4>(first), _mm512_slli_epi32::<16>(first));
            let second = _mm512_or_si512(_mm512_srli_epi32::<4>(second), _mm512_slli_epi32::<16>(second));
            [
                _mm512_castsi512_ps(_mm512_permutexvar_epi16(first, table)),
                _mm512_castsi512_ps(_mm512_permutexvar_epi16(second, table)),
            ]
        })
    }
    #[inline(always)]
    fn look_up_two(self, [low, high]: [&[u8; 16]; 2], [below, above]: [__m256i; 2]) -> [__m512; 2] {
        intrinsic!({
            // Both tables in one: the upper half of a word looks up behind the lower one's 16 entries.
            let table = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(below), above);
            let low = _mm512_cvtepu8_epi32(_mm_loadu_si128(low.as_ptr().cast()));
            let high = _mm512_cvtepu8_epi32(_mm_loadu_si128(high.as_ptr().cast()));
            let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            let (nibbles, upper) = (_mm512_set1_epi32(0x000F_000F), _mm512_set1_epi32(0x0010_0000));
            // (x & nibbles) | upper
            let even = _mm512_ternarylogic_epi32::<0xEA>(_mm512_srli_epi32::<4>(both), nibbles, upper);
            let odd = _mm512_ternarylogic_epi32::<0xEA>(both, nibbles, upper);
            let (even, odd) = (_mm512_permutexvar_epi16(even, table), _mm512_permutexvar_epi16(odd, table));
            let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            [
                _mm512_castsi512_ps(_mm512_permutex2var_epi32(even, first, odd)),
                _mm512_castsi512_ps(_mm512_permutex2var_epi32(even, second, odd)),
            ]
        })
    }
}

/// The codes of 32 indices: of each half of 128 bits the first eight, and the others.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn codes256([lower, upper]: [__m256i; 2], index: __m256i) -> [__m256i; 2] {
    let (lower, upper) = (_mm256_shuffle_epi8(lower, index), _mm256_shuffle_epi8(upper, index));
    [_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)]
}

/// The 32 nibbles of a row, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles256(row: &[u8; 16]) -> __m256i {
    // SAFETY: the array is as wide as the vector.
    let bytes = unsafe { _mm_loadu_si128(row.as_ptr().cast()) };
    let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15));
    let low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low))
}

/// 32 words with what `low` finds in the first table in their lower halves, and in their upper what `high` finds in the second.
#[inline]
#[target_feature(enable = "avx2")]
fn words256(low: __m256i, high: __m256i, [below, above]: [[__m128i; 2]; 2]) -> [__m256; 4] {
    let [below, above] =
        [below, above].map(|[lower, upper]| [_mm256_broadcastsi128_si256(lower), _mm256_broadcastsi128_si256(upper)]);
    let ([low0, low1], [high0, high1]) = (codes256(below, low), codes256(above, high));
    // Of each half of 128 bits a quarter: words 0..4 and 16..20, 4..8 and 20..24, and so on.
    let [a, b] = [_mm256_unpacklo_epi16(low0, high0), _mm256_unpackhi_epi16(low0, high0)];
    let [c, d] = [_mm256_unpacklo_epi16(low1, high1), _mm256_unpackhi_epi16(low1, high1)];
    [
        _mm256_castsi256_ps(_mm256_permute2x128_si256::<0x20>(a, b)),
        _mm256_castsi256_ps(_mm256_permute2x128_si256::<0x20>(c, d)),
        _mm256_castsi256_ps(_mm256_permute2x128_si256::<0x31>(a, b)),
        _mm256_castsi256_ps(_mm256_permute2x128_si256::<0x31>(c, d)),
    ]
}

/// What both 256-bit sets share.
macro_rules! shorts256 {
    (|$sums:ident, $w:ident, $x:ident| $dot2:expr) => {
        #[inline(always)]
        fn dot2(self, $sums: __m256i, $w: __m256i, $x: __m256i) -> __m256i {
            intrinsic!($dot2)
        }
        #[inline(always)]
        fn max_bits(self, m: __m256i, x: __m256) -> __m256i {
            intrinsic!(_mm256_max_epu32(m, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(i32::MAX))))
        }
        #[inline(always)]
        fn floats_of(self, bits: __m256i) -> __m256 {
            intrinsic!(_mm256_castsi256_ps(bits))
        }
        #[inline(always)]
        fn halves(self, low: __m256, high: __m256) -> __m256 {
            intrinsic!({
                let high = _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(high));
                _mm256_castsi256_ps(_mm256_blend_epi16::<0xAA>(_mm256_cvtps_epi32(low), high))
            })
        }
        #[inline(always)]
        fn neighbours(self, first: __m256, second: __m256) -> __m256 {
            intrinsic!({
                let mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
                _mm256_castsi256_ps(_mm256_permute4x64_epi64::<0b11_01_10_00>(mixed))
            })
        }

        // The lower and the upper bytes of 16 codes.
        type Table = [__m128i; 2];
        type Words = [__m256; 4];

        #[inline(always)]
        fn table(self, values: &[f32; 16]) -> [__m128i; 2] {
            intrinsic!({
                let first = _mm256_cvtps_epi32(_mm256_loadu_ps(values.as_ptr()));
                let second = _mm256_cvtps_epi32(_mm256_loadu_ps(values.as_ptr().add(8)));
                let mixed = _mm256_packs_epi32(first, second);
                let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed);
                let order = _mm256_setr_epi8(
                    0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, //
                    0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
                );
                let apart = _mm256_shuffle_epi8(codes, order);
                let (first, second) = (_mm256_castsi256_si128(apart), _mm256_extracti128_si256::<1>(apart));
                [_mm_unpacklo_epi64(first, second), _mm_unpackhi_epi64(first, second)]
            })
        }
        #[inline(always)]
        fn look_up(self, packed: &[u8; BLOCK / 2], table: [__m128i; 2]) -> [__m256; 4] {
            intrinsic!({
                let bytes = _mm256_loadu_si256(packed.as_ptr().cast());
                let nibbles = _mm256_set1_epi8(15);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibbles);
                let low = _mm256_and_si256(bytes, nibbles);
                words256(high, low, [table, table])
            })
        }
        #[inline(always)]
        fn look_up_two(self, [low, high]: [&[u8; 16]; 2], tables: [[__m128i; 2]; 2]) -> [__m256; 4] {
            intrinsic!(words256(nibbles256(low), nibbles256(high), tables))
        }
    };
}

impl Shorts for Vnni256 {
    shorts256!(|sums, w, x| dpwssd256(sums, w, x));
}

impl Shorts for Avx2 {
    shorts256!(|sums, w, x| _mm256_add_epi32(sums, _mm256_madd_epi16(w, x)));
}

/// The functions of one token, which carry the `target_feature`, and their entries.
macro_rules! instantiate_shorts {
    ($module:ident, $token:ty, $make:expr, $features:literal, $mr:literal x $nv:literal) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn tile(s: $token, a: &[f32], b: &[f32], c: TileC<'_, '_>) {
                int16::tile::<$token, $mr, $nv>(s, a, b, c);
            }
            #[target_feature(enable = $features)]
            fn pack_row(s: $token, x: &[f32], out: &mut [f32]) {
                int16::pack_row(s, x, out);
            }
            #[target_feature(enable = $features)]
            fn join_rows(s: $token, rows: &Rows<'_>, out: &mut [f32], width: usize) {
                int16::join_rows(s, rows, out, width);
            }
            #[target_feature(enable = $features)]
            fn pack_halves(s: $token, x: &[u16], out: &mut [f32]) {
                int16::pack_row(s, x, out);
            }
            #[target_feature(enable = $features)]
            fn join_halves(s: $token, rows: &Rows<'_, u16>, out: &mut [f32], width: usize) {
                int16::join_rows(s, rows, out, width);
            }
            #[target_feature(enable = $features)]
            fn nf4_row(s: $token, packed: &[u8], scales: &[f32], code: &[f32; 16], round: bool, out: &mut [f32]) {
                int16::nf4_row(s, packed, scales, code, round, out);
            }
            #[target_feature(enable = $features)]
            fn nf4_join(s: $token, column: Nf4Column<'_>, out: &mut [f32], width: usize, panel: usize) {
                int16::nf4_join(s, column, out, width, panel);
            }

            /// Hands the functions out where their instructions may run.
            pub(super) fn table(detected: Option<$token>, fast: bool, fast_gemv: bool) -> Option<Int16Kernels> {
                detected?;
                Some(Int16Kernels {
                    tile: GemmTile {
                        mr: $mr,
                        nr: $nv * <<$token as Bytes>::F as Simd>::LANES,
                        panel_a: PanelA::Columns,
                        // SAFETY: the token of the detection above proves the instruction set, here and below.
                        run: |a, b, c| unsafe { tile($make, a, b, c) },
                    },
                    fast,
                    // SAFETY: as above.
                    pack_row: |x, out| unsafe { pack_row($make, x, out) },
                    // SAFETY: as above.
                    join_rows: |rows, out, width| unsafe { join_rows($make, rows, out, width) },
                    // SAFETY: as above.
                    pack_halves: |x, out| unsafe { pack_halves($make, x, out) },
                    // SAFETY: as above.
                    join_halves: |rows, out, width| unsafe { join_halves($make, rows, out, width) },
                    // SAFETY: as above.
                    nf4_row: |packed, scales, code, round, out| unsafe {
                        nf4_row($make, packed, scales, code, round, out);
                    },
                    // SAFETY: as above.
                    nf4_join: |column, out, width, panel| unsafe { nf4_join($make, column, out, width, panel) },
                    gemv: $crate::kernels::x86::shorts_gemv::$module::table(detected, fast_gemv)?,
                })
            }
        }
    };
}

instantiate_shorts!(
    vnni512,
    Vnni512,
    Vnni512(Avx512(())),
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma",
    12 x 2
);
instantiate_shorts!(vnni256, Vnni256, Vnni256(Avx2(())), "avxvnni,avx2,fma,f16c", 6 x 2);
instantiate_shorts!(plain, Avx2, Avx2(()), "avx2,fma,f16c", 6 x 2);

/// Products of 16-bit pairs 512 bits wide: twice those of f32.
pub(super) fn wide() -> Option<Int16Kernels> {
    vnni512::table(Vnni512::detect(), true, true)
}

/// Those of AVX-VNNI.
pub(super) fn vnni() -> Option<Int16Kernels> {
    vnni256::table(Vnni256::detect(), true, true)
}

/// Those of AVX2 alone; `alone`: the table's f32 product is 256 bits wide as well.
pub(super) fn narrow(alone: bool) -> Option<Int16Kernels> {
    plain::table(Avx2::detect(), alone && multiplies_shorts_twice(), alone)
}

/// Whether two `vpmaddwd` a cycle can be expected: Intel's cores since Skylake have that (which came with `xsavec`), AMD's since
/// Zen 3 (with 256-bit `vaes`). Where there is one, AVX2's two FMA do as much. Not measured, so that a machine always decides alike.
fn multiplies_shorts_twice() -> bool {
    is_x86_feature_detected!("vaes") || (made_by(b"GenuineIntel") && is_x86_feature_detected!("xsavec"))
}
