//! Products of bytes: VNNI, 512 bits wide (AVX512-VNNI) and 256 (AVX-VNNI), and AVX2 without it.
//!
//! `vpdpbusd` multiplies unsigned bytes with signed ones and adds four neighbours to a 32-bit sum in one step. AVX2 takes
//! three: `vpmaddubsw` of |w| and of x with the sign of w, whose 16-bit sums of two hold 2 · 127 · 127, then `vpmaddwd`.

use super::avx2::Avx2;
use super::avx512::Avx512;
use crate::kernels::gemv::{BLOCK, Nf4Rows};
use crate::kernels::integer::{self, Bytes, CODE_BOOK, Codes, Integer, IntegerTile, Order};
use crate::kernels::{Kernels, generic::Simd};
use std::arch::x86_64::*;

/// Proof that AVX512-VNNI may run beside what [`Avx512`] proves.
#[derive(Clone, Copy)]
pub(super) struct Vnni512(pub(super) Avx512);

impl Vnni512 {
    pub(super) fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| is_x86_feature_detected!("avx512vnni")).map(Self)
    }
}

/// Proof that AVX-VNNI may run beside what [`Avx2`] proves.
#[derive(Clone, Copy)]
pub(super) struct Vnni256(pub(super) Avx2);

impl Vnni256 {
    pub(super) fn detect() -> Option<Self> {
        Avx2::detect().filter(|_| is_x86_feature_detected!("avxvnni")).map(Self)
    }
}

/// The code book plus `raised`, for `vpshufb`.
const fn code_book(raised: i32) -> [u8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (CODE_BOOK[i] as i32 + raised) as u8;
        i += 1;
    }
    table
}

/// The code book as it is, and raised as `vpdpbusd` wants it.
const PLAIN: [u8; 16] = code_book(0);
const RAISED: [u8; 16] = code_book(128);

/// The body of a method: the token is the proof that the intrinsics may run.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: a token exists only after detection of its instruction set; memory operands are arrays of the loaded
        // length, or asserted.
        unsafe { $e }
    };
}

impl Bytes for Vnni512 {
    type F = Avx512;
    type B = __m512i;
    type Block = [__m512i; 1];
    const RAISED: i32 = 128;

    #[inline(always)]
    fn floats(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn nf4(self, packed: &[u8; BLOCK / 2]) -> [__m512i; 1] {
        intrinsic!({
            let bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(packed.as_ptr().cast()));
            let by = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_setzero_si256());
            let index = _mm512_and_si512(_mm512_srlv_epi16(bytes, by), _mm512_set1_epi8(15));
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(RAISED.as_ptr().cast()));
            [_mm512_shuffle_epi8(table, index)]
        })
    }
    #[inline(always)]
    fn int8(self, codes: &[i8; BLOCK]) -> [__m512i; 1] {
        // Raising by 128 turns the highest bit over.
        intrinsic!([_mm512_xor_si512(_mm512_loadu_si512(codes.as_ptr().cast()), _mm512_set1_epi8(-128))])
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> __m512i {
        assert!(x.len() >= 16);
        intrinsic!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn store(self, b: __m512i, out: &mut [f32]) {
        assert!(out.len() >= 16);
        intrinsic!(_mm512_storeu_si512(out.as_mut_ptr().cast(), b));
    }
    #[inline(always)]
    fn splat(self, word: f32) -> __m512i {
        intrinsic!(_mm512_set1_epi32(word.to_bits() as i32))
    }
    #[inline(always)]
    fn first(self, word: f32) -> __m512i {
        intrinsic!(_mm512_zextsi128_si512(_mm_cvtsi32_si128(word.to_bits() as i32)))
    }
    #[inline(always)]
    fn dot4(self, sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
        intrinsic!(_mm512_dpbusd_epi32(sums, w, x))
    }
    #[inline(always)]
    fn to_f32(self, sums: __m512i) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(sums))
    }
}

/// What both 256-bit sets share.
macro_rules! bytes256 {
    ($table:ident, $raised:literal, |$sums:ident, $w:ident, $x:ident| $dot4:expr) => {
        type F = Avx2;
        type B = __m256i;
        type Block = [__m256i; 2];
        const RAISED: i32 = $raised;

        #[inline(always)]
        fn nf4(self, packed: &[u8; BLOCK / 2]) -> [__m256i; 2] {
            intrinsic!({
                let bytes = _mm256_loadu_si256(packed.as_ptr().cast());
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128($table.as_ptr().cast()));
                let nibble = _mm256_set1_epi8(15);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
                let low = _mm256_and_si256(bytes, nibble);
                [_mm256_shuffle_epi8(table, high), _mm256_shuffle_epi8(table, low)]
            })
        }
        #[inline(always)]
        fn int8(self, codes: &[i8; BLOCK]) -> [__m256i; 2] {
            intrinsic!({
                let raise = _mm256_set1_epi8(if $raised == 0 { 0 } else { -128 });
                let low = _mm256_loadu_si256(codes.as_ptr().cast());
                let high = _mm256_loadu_si256(codes.as_ptr().add(BLOCK / 2).cast());
                [_mm256_xor_si256(low, raise), _mm256_xor_si256(high, raise)]
            })
        }
        #[inline(always)]
        fn load(self, x: &[f32]) -> __m256i {
            assert!(x.len() >= 8);
            intrinsic!(_mm256_loadu_si256(x.as_ptr().cast()))
        }
        #[inline(always)]
        fn store(self, b: __m256i, out: &mut [f32]) {
            assert!(out.len() >= 8);
            intrinsic!(_mm256_storeu_si256(out.as_mut_ptr().cast(), b));
        }
        #[inline(always)]
        fn splat(self, word: f32) -> __m256i {
            intrinsic!(_mm256_set1_epi32(word.to_bits() as i32))
        }
        #[inline(always)]
        fn first(self, word: f32) -> __m256i {
            intrinsic!(_mm256_zextsi128_si256(_mm_cvtsi32_si128(word.to_bits() as i32)))
        }
        #[inline(always)]
        fn dot4(self, $sums: __m256i, $w: __m256i, $x: __m256i) -> __m256i {
            intrinsic!($dot4)
        }
        #[inline(always)]
        fn to_f32(self, sums: __m256i) -> __m256 {
            intrinsic!(_mm256_cvtepi32_ps(sums))
        }
    };
}

impl Bytes for Vnni256 {
    #[inline(always)]
    fn floats(self) -> Avx2 {
        self.0
    }
    bytes256!(RAISED, 128, |sums, w, x| _mm256_dpbusd_avx_epi32(sums, w, x));
}

impl Bytes for Avx2 {
    #[inline(always)]
    fn floats(self) -> Avx2 {
        self
    }
    bytes256!(PLAIN, 0, |sums, w, x| {
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    });
}

/// The functions of one token, which carry the `target_feature`, and their entries.
macro_rules! instantiate_bytes {
    ($module:ident, $token:ty, $make:expr, $features:literal, $tile:expr) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn encode(x: &[f32], order: Order, words: &mut [f32], scales: &mut [f32], starts: &mut [f32]) {
                integer::encode::<{ <$token as Bytes>::RAISED }>(x, order, words, scales, starts);
            }
            #[target_feature(enable = $features)]
            fn nf4_gemv(s: $token, w: Nf4Rows<'_>, x: Codes<'_>, out: &mut [f32]) {
                integer::nf4_gemv(s, w, x, out);
            }
            #[target_feature(enable = $features)]
            fn int8_gemv(s: $token, w: &[i8], scales: &[f32], x: Codes<'_>, out: &mut [f32]) {
                integer::int8_gemv(s, w, scales, x, out);
            }

            /// Hands the functions out where their instructions may run.
            pub(super) fn table(detected: Option<$token>) -> Option<Integer> {
                detected?;
                Some(Integer {
                    // SAFETY: the token of the detection above proves the instruction set, here and below.
                    encode: |x, order, words, scales, starts| unsafe { encode(x, order, words, scales, starts) },
                    // SAFETY: as above.
                    nf4_gemv: |w, x, out| unsafe { nf4_gemv($make, w, x, out) },
                    // SAFETY: as above.
                    int8_gemv: |w, scales, x, out| unsafe { int8_gemv($make, w, scales, x, out) },
                    tile: $tile,
                })
            }
        }
    };
}

/// The tile of a token: `$mr` rows at most, `$nv` vectors wide.
macro_rules! instantiate_tile {
    ($module:ident, $token:ty, $make:expr, $features:literal, $nv:literal, $mr:literal: $($m:literal)*) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn nf4_words(s: $token, packed: &[u8], words: &mut [f32]) {
                integer::nf4_words(s, packed, words);
            }
            #[target_feature(enable = $features)]
            fn int8_words(s: $token, codes: &[i8], words: &mut [f32]) {
                integer::int8_words(s, codes, words);
            }
            #[target_feature(enable = $features)]
            fn run(s: $token, x: Codes<'_>, w: &[f32], scales: &[f32], out: &mut [f32]) {
                let nr = $nv * <<$token as Bytes>::F as Simd>::LANES;
                match out.len() / nr {
                    $($m => integer::tile::<$token, $m, $nv>(s, x, w, scales, out),)*
                    rows => panic!("integer tile: {rows} rows"),
                }
            }

            pub(super) const TILE: IntegerTile = IntegerTile {
                mr: $mr,
                nr: $nv * <<$token as Bytes>::F as Simd>::LANES,
                beats_pairs: true,
                // SAFETY: only a `table` with the token's proof hands the tile out.
                nf4_words: |packed, words| unsafe { nf4_words($make, packed, words) },
                // SAFETY: as above.
                int8_words: |codes, words| unsafe { int8_words($make, codes, words) },
                // SAFETY: as above.
                run: |x, w, scales, out| unsafe { run($make, x, w, scales, out) },
            };
        }
    };
}

instantiate_tile!(
    tile512, Vnni512, Vnni512(Avx512(())), "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma",
    2, 12: 1 2 3 4 5 6 7 8 9 10 11 12
);
instantiate_tile!(tile256, Vnni256, Vnni256(Avx2(())), "avxvnni,avx2,fma,f16c", 2, 6: 1 2 3 4 5 6);
instantiate_bytes!(
    vnni512,
    Vnni512,
    Vnni512(Avx512(())),
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma",
    Some(tile512::TILE)
);
instantiate_bytes!(vnni256, Vnni256, Vnni256(Avx2(())), "avxvnni,avx2,fma,f16c", Some(tile256::TILE));
instantiate_bytes!(plain, Avx2, Avx2(()), "avx2,fma,f16c", None);

/// Products of bytes 512 bits wide.
pub(super) fn wide() -> Option<Integer> {
    vnni512::table(Vnni512::detect())
}

/// Products of bytes by AVX2 alone.
pub(super) fn narrow() -> Option<Integer> {
    plain::table(Avx2::detect())
}

/// The AVX2 table with AVX-VNNI, as laptops have it since 2021.
pub(super) fn table() -> Option<Kernels> {
    let integer = vnni256::table(Vnni256::detect())?;
    Some(Kernels { isa: "avxvnni", integer, int16: super::shorts::vnni()?, ..super::avx2::table()? })
}
