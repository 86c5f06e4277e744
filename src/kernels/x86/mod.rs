//! Tables for x86-64, best first.

/// Writes the table of one instruction set: for each kernel a safe entry that holds the token, and below it the
/// function that carries the `target_feature`.
macro_rules! instantiate {
    ($isa:literal, $token:ident, $features:literal, $mr:literal x $nv:literal) => {
        use crate::kernels::elementwise::{self, AdamStep, Mask, Masked};
        use crate::kernels::gemm::{self, GemmTile, PanelA, Rows, TileC};
        use crate::kernels::{Kernels, gemv, generic, int8, quantize};

        pub(super) fn table() -> Option<Kernels> {
            $token::detect()?;
            Some(Kernels {
                isa: $isa,
                tile: GemmTile {
                    mr: $mr,
                    nr: $nv * <$token as generic::Simd>::LANES,
                    panel_a: PanelA::Columns,
                    run: |a, b, c| instantiate!(@enter $token, tile(a, b, c)),
                },
                pairs: None,
                transpose: |rows, out, width, first| instantiate!(@enter $token, transpose(rows, out, width, first)),
                copy_rows: |rows, out, width| instantiate!(@enter $token, copy_rows(rows, out, width)),
                store_sums: |sums, nr, out| instantiate!(@enter $token, store_sums(sums, nr, out)),
                nf4_blocks: |packed, scales, block, code, round, out| {
                    instantiate!(@enter $token, nf4_blocks(packed, scales, block, code, round, out))
                },
                int8_row: |codes, absmax, out| instantiate!(@enter $token, int8_row(codes, absmax, out)),
                widen: |x, out| instantiate!(@enter $token, widen(x, out)),
                dot: |x, y| instantiate!(@enter $token, dot(x, y)),
                axpy: |alpha, x, y| instantiate!(@enter $token, axpy(alpha, x, y)),
                rms_norm_row: |x, w, eps, y| instantiate!(@enter $token, rms_norm_row(x, w, eps, y)),
                rms_norm_row_backward: |x, w, rstd, dy, dx| {
                    instantiate!(@enter $token, rms_norm_row_backward(x, w, rstd, dy, dx))
                },
                swiglu_row: |gate, up, y| instantiate!(@enter $token, swiglu_row(gate, up, y)),
                swiglu_row_backward: |gate, up, dy, dgate, dup| {
                    instantiate!(@enter $token, swiglu_row_backward(gate, up, dy, dgate, dup))
                },
                max_row: |x| instantiate!(@enter $token, max_row(x)),
                exp_row: |x, scale, shift| instantiate!(@enter $token, exp_row(x, scale, shift)),
                round_bf16: |x| instantiate!(@enter $token, round_bf16(x)),
                attention: attention(),
                rope_row: |x, cos, sin, sign| instantiate!(@enter $token, rope_row(x, cos, sin, sign)),
                rms_norm_gain: |x, rstd, dy, dw| instantiate!(@enter $token, rms_norm_gain(x, rstd, dy, dw)),
                dropout_row: |mask, how, y| instantiate!(@enter $token, dropout_row(mask, how, y)),
                adamw_row: |step, p, g, m, v| instantiate!(@enter $token, adamw_row(step, p, g, m, v)),
                // Matrix times a few vectors (gemv.rs).
                nf4_order: |x, out| instantiate!(@enter $token, nf4_order(x, out)),
                nf4_gemv: |w, code, x, out| instantiate!(@enter $token, nf4_gemv(w, code, x, out)),
                nf4_pairs: None,
                nested_scales: |codes, map, scale, offset, out| {
                    instantiate!(@enter $token, nested_scales(codes, map, scale, offset, out))
                },
                bf16_gemv: |w, cols, x, out| instantiate!(@enter $token, bf16_gemv(w, cols, x, out)),
                f32_gemv: |w, cols, x, out| instantiate!(@enter $token, f32_gemv(w, cols, x, out)),
                i8_gemv: |w, scales, cols, x, out| instantiate!(@enter $token, i8_gemv(w, scales, cols, x, out)),
                integer: super::bytes::narrow()?,
                int16: super::shorts::narrow(<$token as generic::Simd>::LANES == 8)?,
                // Quantizing (quantize.rs).
                nf4_quantize: |x, thresholds, out| instantiate!(@enter $token, nf4_quantize(x, thresholds, out)),
            })
        }

        #[target_feature(enable = $features)]
        fn tile(s: $token, a: &[f32], b: &[f32], c: TileC<'_, '_>) {
            gemm::tile::<$token, $mr, $nv>(s, |a, b, sum| generic::Simd::fma(s, a, b, sum), a, b, c);
        }

        instantiate!(@functions elementwise, $token, $features,
            rope_row(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) -> ();
            rms_norm_gain(x: &[f32], rstd: f32, dy: &[f32], dw: &mut [f32]) -> ();
            dropout_row(mask: &Mask, how: Masked<'_>, y: &mut [f32]) -> ();
            adamw_row(step: &AdamStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> ();
        );
        instantiate!(@functions gemm, $token, $features,
            transpose(rows: &Rows<'_>, out: &mut [f32], width: usize, first: usize) -> ();
            copy_rows(rows: &Rows<'_>, out: &mut [f32], width: usize) -> ();
            store_sums(sums: &[f32], nr: usize, out: TileC<'_, '_>) -> ();
            nf4_blocks(packed: &[u8], scales: &[f32], block: usize, code: &[f32; 16], round: bool, out: &mut [f32]) -> ();
            widen(x: &[u16], out: &mut [f32]) -> ();
        );
        instantiate!(@functions generic, $token, $features,
            dot(x: &[f32], y: &[f32]) -> f32;
            axpy(alpha: f32, x: &[f32], y: &mut [f32]) -> ();
            rms_norm_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32;
            rms_norm_row_backward(x: &[f32], w: &[f32], rstd: f32, dy: &[f32], dx: &mut [f32]) -> ();
            swiglu_row(gate: &[f32], up: &[f32], y: &mut [f32]) -> ();
            swiglu_row_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) -> ();
            max_row(x: &[f32]) -> f32;
            exp_row(x: &mut [f32], scale: f32, shift: f32) -> f32;
            round_bf16(x: &mut [f32]) -> ();
        );
        instantiate!(@functions gemv, $token, $features,
            nf4_order(x: &[f32], out: &mut [f32]) -> ();
            nf4_gemv(w: gemv::Nf4Rows<'_>, code: &[f32; 16], x: &[f32], out: &mut [f32]) -> ();
            nested_scales(codes: &[u8], map: &[f32; 256], scale: f32, offset: f32, out: &mut [f32]) -> ();
            bf16_gemv(w: &[u16], cols: usize, x: &[f32], out: &mut [f32]) -> ();
            f32_gemv(w: &[f32], cols: usize, x: &[f32], out: &mut [f32]) -> ();
            i8_gemv(w: &[i8], scales: &[f32], cols: usize, x: &[f32], out: &mut [f32]) -> ();
        );
        instantiate!(@functions int8, $token, $features,
            int8_row(codes: &[i8], absmax: f32, out: &mut [f32]) -> ();
        );
        instantiate!(@functions quantize, $token, $features,
            nf4_quantize(x: &[f32], thresholds: &[f32; 15], out: &mut [u8]) -> f32;
        );
    };
    // The attention kernels, on a tile of $mr rows.
    (attention $token:ident, $features:literal, $mr:literal) => {
        use crate::kernels::attention::{self, Attention, Block, Few, Gradients, Softmax, Upstream};

        fn attention() -> Attention {
            Attention {
                panel: 2 * <$token as generic::Simd>::LANES,
                forward: |t, v_rows, softmax| instantiate!(@enter $token, attend(t, v_rows, softmax)),
                backward: |t, upstream, gradients| instantiate!(@enter $token, attend_backward(t, upstream, gradients)),
                softmax: |t, state| instantiate!(@enter $token, softmax(t, state)),
                slopes: |t, lse, delta, p, ds| instantiate!(@enter $token, slopes(t, lse, delta, p, ds)),
                few: |t, softmax| instantiate!(@enter $token, attend_few(t, softmax)),
            }
        }

        #[target_feature(enable = $features)]
        fn attend(s: $token, t: &Block<'_>, v_rows: &[f32], softmax: &mut Softmax<'_>) {
            attention::forward::<$token, $mr>(s, t, v_rows, softmax);
        }

        #[target_feature(enable = $features)]
        fn attend_backward(s: $token, t: &Block<'_>, upstream: &Upstream<'_>, gradients: &mut Gradients<'_>) {
            attention::backward::<$token, $mr>(s, t, upstream, gradients);
        }

        instantiate!(@functions attention, $token, $features,
            softmax(t: &Block<'_>, state: &mut Softmax<'_>) -> ();
            slopes(t: &Block<'_>, lse: &[f32], delta: &[f32], p: &mut [f32], ds: &mut [f32]) -> ();
        );

        #[target_feature(enable = $features)]
        fn attend_few(s: $token, t: &Few<'_>, softmax: &mut Softmax<'_>) {
            attention::few(s, t, softmax);
        }
    };
    (@enter $token:ident, $name:ident($($arg:ident),*)) => {
        // SAFETY: only `table` hands this function out, after `detect` has seen the instruction set.
        unsafe { $name($token(()), $($arg),*) }
    };
    (@functions $home:ident, $token:ident, $features:literal, $($name:ident($($arg:ident: $type:ty),*) -> $out:ty;)*) => {$(
        #[target_feature(enable = $features)]
        fn $name(s: $token, $($arg: $type),*) -> $out {
            $home::$name(s, $($arg),*)
        }
    )*};
}

pub(super) mod amx;
#[cfg(all(test, target_os = "linux"))]
mod amx_emulator;
mod avx2;
mod avx512;
mod avx512bf16;
mod bytes;
mod shorts;
mod shorts_gemv;

use super::Kernels;
use super::integer::{Integer, IntegerTile};

/// Whether the CPU's maker calls itself so.
fn made_by(vendor: &[u8; 12]) -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened() == vendor
}

/// The tables this CPU and operating system can run, best first.
pub(super) fn tables() -> impl Iterator<Item = Kernels> {
    let (fast, slow): (Vec<_>, Vec<_>) =
        avx512bf16::table().into_iter().partition(|table| table.pairs.is_some_and(|pairs| pairs.fast));
    let tables = amx::table().into_iter().chain(fast).chain(avx512::table()).chain(slow);
    let tables = tables.map(|table| {
        let integer = bytes::wide().unwrap_or(table.integer);
        let int16 = shorts::wide().unwrap_or(table.int16);
        // AMX multiplies bfloat16 faster than VNNI bytes.
        let tile = integer.tile.map(|tile| IntegerTile { beats_pairs: table.isa != "amx", ..tile });
        Kernels {
            nf4_pairs: table.pairs.and(avx512::nf4_pairs()),
            integer: Integer { tile, ..integer },
            int16,
            ..table
        }
    });
    tables.chain(bytes::table()).chain(avx2::table())
}
