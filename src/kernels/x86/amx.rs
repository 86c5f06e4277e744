//! AMX: products of bf16 pairs on tile registers, 16 x 32 of C at a time, on top of the AVX-512 BF16 table.
//!
//! A tile register holds 16 rows of 64 bytes. Two keep C, one takes 16 rows of A, one 16 columns of B after another; a step
//! of 16 words (32 elements of k) loads 3 KiB and multiplies twice:
//!
//! ```text
//!             tmm3 (left, then right)   A panel: [depth / 16, 16, 16] words, a tile is 1 KiB in one piece
//!   tmm2      tmm0    tmm1              B panel: [depth, 32] words, a tile is every other line of 2 KiB
//! ```
//!
//! Four registers of the eight, where a square of 32 x 32 on all eight would load less: a core that runs two threads, as
//! most cores of rented machines do, seems to give each about ten tile registers to rename to. What is live is missing
//! there, and a load or product waits until one is free: on such a core a product took 27 ns with eight registers live, 19
//! with seven, 12 with four. On a core of its own both ways take the 6 ns of the multiplier (`docs/decisions.md`).
//!
//! With a depth of 256 words the B panel is 32 KiB and stays in the first-level cache while the A panels stream past it, by
//! loads that say so (`tileloaddt1`): plain ones push B out. Sums lie in one piece as the driver keeps them
//! ([`crate::ops::matmul`]); the next ones are asked for while a tile is multiplied. The intrinsics are not stable, so the loop
//! is written in assembly. The tile state is configured and released in each call, which takes a whole column strip: a
//! context switch between calls has nothing to save.

use super::avx512bf16;
use crate::kernels::Kernels;
use crate::kernels::gemm::{GemmTile, PairKernels, PanelA, TileC, TileFn, check_strip};
use crate::kernels::tiles::TileMut;
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Rows of C in one product.
const ROWS: usize = 16;
/// Columns of C in one product.
const COLS: usize = 32;
/// Words of k that one tile takes.
const STEP: usize = 16;

/// The table, where a small product comes out right: we have only seen it run on emulated tiles.
pub(super) fn table() -> Option<Kernels> {
    detect().then(unchecked_table)?.filter(|table| table.pairs.is_some_and(|pairs| is_right(pairs.tile.run)))
}

/// Whether a product of small whole numbers is exact: whole tiles stored and added to, then tiles that leave the matrix.
fn is_right(run: TileFn) -> bool {
    const DEPTH: usize = 2 * STEP;
    const HEIGHT: usize = 3 * ROWS;
    let a_at = |i: usize, k: usize| ((7 * i + 3 * k) % 11) as f32 - 5.0;
    let b_at = |k: usize, j: usize| ((5 * k + 2 * j) % 13) as f32 - 6.0;
    // Whole numbers this small are bfloat16: the upper halves of f32.
    let word = |low: f32, high: f32| f32::from_bits(low.to_bits() >> 16 | high.to_bits());
    let a: Vec<f32> = (0..HEIGHT * DEPTH)
        .map(|at| {
            let (panel, step, row, word) = (at / (ROWS * DEPTH), at / (ROWS * STEP) % 2, at / STEP % ROWS, at % STEP);
            let (i, k) = (panel * ROWS + row, 2 * (step * STEP + word));
            (a_at(i, k), a_at(i, k + 1))
        })
        .map(|(low, high)| word(low, high))
        .collect();
    let b: Vec<f32> =
        (0..DEPTH * COLS).map(|at| word(b_at(at / COLS * 2, at % COLS), b_at(at / COLS * 2 + 1, at % COLS))).collect();
    let dot = |i: usize, j: usize| (0..2 * DEPTH).map(|k| a_at(i, k) * b_at(k, j)).sum::<f32>();
    // (rows, columns, what is added up in turn: factor and whether to add)
    [(HEIGHT, COLS, [(1.0, false), (1.0, true)]), (HEIGHT - 5, COLS - 3, [(0.5, false), (2.0, true)])].into_iter().all(
        |(rows, cols, runs)| {
            let mut c = vec![7.0; rows * cols];
            for (alpha, add) in runs {
                let c = &mut TileMut::whole(&mut c, cols, rows, cols);
                run(&a, &b, TileC { c, i: 0, j: 0, alpha, add, ahead: &[] });
            }
            let factor = runs[0].0 + runs[1].0;
            c.iter().enumerate().all(|(at, &value)| value == factor * dot(at / cols, at % cols))
        },
    )
}

/// The table on a machine that can run AVX-512 BF16; to be called only where AMX runs too, or is emulated.
fn unchecked_table() -> Option<Kernels> {
    let base = avx512bf16::table()?;
    let pairs = PairKernels {
        tile: GemmTile { mr: ROWS, nr: COLS, panel_a: PanelA::Rows, run: tile },
        fast: true,
        ..base.pairs?
    };
    Some(Kernels { isa: "amx", pairs: Some(pairs), ..base })
}

/// CPUID leaf 7: AMX-BF16 and AMX-TILE; XCR0: the operating system saves tiles; and on Linux the process must ask.
fn detect() -> bool {
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & 1 << 27 == 0 {
        return false;
    }
    let amx = 1 << 22 | 1 << 24;
    __cpuid_count(7, 0).edx & amx == amx && tiles_are_saved() && request_permission()
}

/// XCR0 bits 17 and 18.
fn tiles_are_saved() -> bool {
    let low: u32;
    // SAFETY: CPUID says that the operating system has enabled XGETBV (OSXSAVE).
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags)) };
    low >> 17 & 3 == 3
}

/// `ARCH_REQ_XCOMP_PERM` for tile data: Linux gives a process the 8 KiB of state on request only.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// The operand of `ldtilecfg`: palette 1, every tile 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// A tile of C on the stack, for tiles that leave the matrix or are scaled.
#[repr(C, align(64))]
struct Scratch([f32; ROWS * COLS]);

fn tile(a: &[f32], b: &[f32], out: TileC<'_, '_>) {
    let depth = check_strip(a, b, ROWS, COLS);
    assert!(depth.is_multiple_of(STEP), "gemm tile: a depth of {depth} words");
    let TileC { c, i, j, alpha, add, ahead } = out;
    let cols = (c.cols() - j).min(COLS);
    let share = ahead.len() / (a.len() / (ROWS * depth)).max(1);
    let _tiles = Configured::new();
    for (panel, a) in a.chunks_exact(ROWS * depth).enumerate() {
        let i = i + panel * ROWS;
        let ahead = if share > 0 { ahead[panel * share..].as_ptr() } else { b.as_ptr() };
        let rows = (c.rows() - i).min(ROWS);
        if rows == ROWS && cols == COLS && alpha == 1.0 {
            let stride = c.stride();
            // SAFETY: rows i .. i + 16 and columns j .. j + 32 lie in the tile, which is this call's alone.
            unsafe { product(a, b, c.pointer(i, j), stride, add, ahead) };
            continue;
        }
        let mut scratch = Scratch([0.0; ROWS * COLS]);
        // SAFETY: the scratch is 16 x 32.
        unsafe { product(a, b, scratch.0.as_mut_ptr(), COLS, false, ahead) };
        for (r, values) in scratch.0.chunks_exact(COLS).take(rows).enumerate() {
            let row = &mut c.row(i + r)[j..j + cols];
            for (out, value) in row.iter_mut().zip(values) {
                *out = if add { *out + alpha * value } else { alpha * value };
            }
        }
    }
}

/// While it lives, this thread's tile registers have their shapes.
struct Configured(());

impl Configured {
    fn new() -> Self {
        // SAFETY: the table that leads here is handed out after detection only.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags)) };
        Self(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: as in `new`.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// `c (+)= a · b`, 16 x 32 at `c` with rows `stride` floats apart; what lies from `ahead` on is fetched to the second-level
/// cache, 192 bytes a step.
///
/// # Safety
/// The tiles are configured; `c` is writable at 16 rows of 32 floats.
unsafe fn product(a: &[f32], b: &[f32], c: *mut f32, stride: usize, add: bool, ahead: *const f32) {
    let steps = b.len() / (STEP * COLS);
    // Where tiles lie one behind the other, the next is fetched, 128 bytes a step; elsewhere this one is asked for again.
    let next = if stride == COLS { c.wrapping_add(ROWS * COLS) } else { c };
    // SAFETY: panels hold `steps` pieces of 1 and 2 KiB each; prefetches may point anywhere.
    unsafe {
        asm!(
            "test {add:e}, {add:e}",
            "jz 2f",
            "tileloadd tmm0, [{c} + {row_c}*1]",
            "tileloadd tmm1, [{c} + {row_c}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "3:",
            "test {steps}, {steps}",
            "jz 5f",
            "4:",
            "tileloaddt1 tmm2, [{a} + {row_a}*1]",
            "tileloadd tmm3, [{b} + {row_b}*1]",
            "prefetchw [{next}]",
            "prefetcht1 [{ahead}]",
            "tdpbf16ps tmm0, tmm2, tmm3",
            "tileloadd tmm3, [{b} + {row_b}*1 + 64]",
            "prefetchw [{next} + 64]",
            "prefetcht1 [{ahead} + 64]",
            "tdpbf16ps tmm1, tmm2, tmm3",
            "prefetcht1 [{ahead} + 128]",
            "add {a}, 1024",
            "add {b}, 2048",
            "add {next}, 128",
            "add {ahead}, 192",
            "dec {steps}",
            "jnz 4b",
            "5:",
            "tilestored [{c} + {row_c}*1], tmm0",
            "tilestored [{c} + {row_c}*1 + 64], tmm1",
            add = in(reg) u32::from(add),
            a = inout(reg) a.as_ptr() => _,
            b = inout(reg) b.as_ptr() => _,
            c = in(reg) c,
            next = inout(reg) next => _,
            ahead = inout(reg) ahead => _,
            row_a = in(reg) 64_usize,
            row_b = in(reg) 4 * COLS,
            row_c = in(reg) 4 * stride,
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack),
        );
    }
}

#[cfg(all(test, target_os = "linux"))]
pub(in crate::kernels) mod emulated {
    //! The table on machines without AMX: see [`super::super::amx_emulator`].

    use crate::kernels::Kernels;

    /// The AMX table, its tile instructions emulated where the machine lacks them; `None` without AVX-512 BF16.
    pub(in crate::kernels) fn table() -> Option<Kernels> {
        if !super::detect() {
            super::super::amx_emulator::install();
        }
        super::unchecked_table()
    }

    #[test]
    fn a_wrong_product_is_not_offered() {
        let Some(table) = table() else {
            eprintln!("left out: the check of AMX, which needs AVX-512 BF16");
            return;
        };
        assert!(table.pairs.is_some_and(|pairs| super::is_right(pairs.tile.run)));
        assert!(!super::is_right(|_, _, _| ()));
        assert!(!super::is_right(|a, b, out| {
            let super::TileC { c, i, j, alpha, add, ahead } = out;
            super::tile(a, b, super::TileC { c: &mut *c, i, j, alpha, add, ahead });
            c.row(3)[2] += 1.0;
        }));
    }
}
