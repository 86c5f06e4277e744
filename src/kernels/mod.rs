//! Slices in, slices out: the arithmetic, one table of functions per instruction set, chosen once at run time.
//!
//! [`mod@reference`] is the specification; `generic` is the same arithmetic written once over a vector; each file under
//! `x86/` proves that the CPU can run it and hands out the whole table. Holding a table is the proof.
//! Kernels never allocate, never use threads and never read the environment, except [`active`], which picks a table.

pub mod attention;
pub mod elementwise;
pub mod gemm;
pub mod gemv;
mod generic;
#[cfg(all(test, unix))]
mod guard;
pub mod int16;
pub mod int16_gemv;
pub mod int8;
pub mod integer;
pub mod lines;
#[cfg(test)]
mod parity;
pub mod philox;
pub mod quantize;
pub mod reference;
pub mod tiles;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::error::{Error, Result};
use elementwise::{AdamStep, Mask, Masked};
use gemm::{GemmTile, PairKernels, Rows, TileC};
use std::sync::OnceLock;

/// A function on five equally long rows: three that are read, two that are written.
type FiveRows = fn(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]);
/// A function on four equally long rows and a number.
type FourRows = fn(x: &[f32], w: &[f32], rstd: f32, dy: &[f32], dx: &mut [f32]);

/// A step, parameters, gradients and two moments, equally long.
type AdamRow = fn(step: &AdamStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]);

/// One instruction set's functions. Lengths that do not fit each other are a bug of the caller and panic.
pub struct Kernels {
    /// The name shown by `rustune.info()` and accepted by `RUSTUNE_ISA`.
    pub isa: &'static str,
    /// The f32 product.
    pub tile: GemmTile,
    /// The product of bf16 pairs, where there is one; elsewhere f32 products of rounded operands stand in.
    pub pairs: Option<PairKernels>,
    /// `out[p, first + r] = rows[r][p]` on words;  out: `[depth, width]`, columns before `first` are left alone, those behind
    /// the last row's are left alone or zero.
    pub transpose: fn(rows: &Rows<'_>, out: &mut [f32], width: usize, first: usize),
    /// `out[p, i] = rows[p][i]` on words;  out: `[count, width]`, the other columns are left alone.
    pub copy_rows: fn(rows: &Rows<'_>, out: &mut [f32], width: usize),
    /// `c[i, j] (+)= alpha · sums[j / nr, i, j % nr]` for all of the tile;  sums: `[ceil(columns / nr), at least rows, nr]`.
    pub store_sums: fn(sums: &[f32], nr: usize, out: TileC<'_, '_>),
    /// Whole blocks of NF4: `out[i] = code[index i] · scales[i / block]`, rounded to bf16 if `round`;
    /// packed: `[ceil(n / 2)]`, first element in the high nibble.
    pub nf4_blocks: gemm::Nf4Blocks,
    /// `out[i] = (codes[i] · absmax) · 1/127`.
    pub int8_row: fn(codes: &[i8], absmax: f32, out: &mut [f32]),
    /// bf16 to f32, exactly.
    pub widen: fn(x: &[u16], out: &mut [f32]),
    /// `Σ x[i] · y[i]`.
    pub dot: fn(x: &[f32], y: &[f32]) -> f32,
    /// `y[i] += alpha · x[i]`.
    pub axpy: fn(alpha: f32, x: &[f32], y: &mut [f32]),
    /// `y[i] = x[i] · w[i] · rstd`, `rstd = 1 / sqrt(mean(x²) + eps)`, which is returned.  Zhang & Sennrich 2019, eq. 4.
    pub rms_norm_row: fn(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32,
    /// `(x, w, rstd, dy, dx)`: backward of `y = x · w · rstd`: `dx[i] += rstd · (w[i] dy[i] - x[i] · rstd² · mean(x · w · dy))`.
    pub rms_norm_row_backward: FourRows,
    /// `y[i] = silu(gate[i]) · up[i]`, `silu(z) = z / (1 + exp(-z))`.  Shazeer 2020, eq. 6.
    pub swiglu_row: fn(gate: &[f32], up: &[f32], y: &mut [f32]),
    /// `(gate, up, dy, dgate, dup)`: backward of `y = silu(g) · u`: `dg = dy · u · σ(g) · (1 + g · (1 - σ(g)))`, `du = dy · silu(g)`.
    pub swiglu_row_backward: FiveRows,
    /// `max(x)`; negative infinity for an empty row.
    pub max_row: fn(x: &[f32]) -> f32,
    /// `x[i] = exp(scale · x[i] - shift)`; returns the sum of the new row.
    pub exp_row: fn(x: &mut [f32], scale: f32, shift: f32) -> f32,
    /// Rounds every element to the nearest bfloat16, ties to even; NaN stays NaN.
    pub round_bf16: fn(x: &mut [f32]),
    /// Attention on tiles of queries and blocks of keys.
    pub attention: attention::Attention,
    // Elementwise rows.
    /// Rotates the halves of every head of a row by `sign` times its angle: `(x1, x2) -> (x1 c - x2 s, x2 c + x1 s)`;
    /// x: `[heads · 2 · half]`, cos, sin: `[half]`.  Su et al. 2021, eq. 34, in the half-split layout of HF Llama.
    pub rope_row: fn(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32),
    /// `(x, rstd, dy, dw)`: the gain's part of the backward of `y = x · w · rstd`: `dw[i] += dy[i] · x[i] · rstd`.
    pub rms_norm_gain: fn(x: &[f32], rstd: f32, dy: &[f32], dw: &mut [f32]),
    /// Masks a row, to the bits of `philox4x32_10`; `y` is read unless it is a copy's target.  Srivastava et al. 2014.
    pub dropout_row: fn(mask: &Mask, how: Masked<'_>, y: &mut [f32]),
    /// One AdamW step of parameters `p` with gradients `g` and moments `m`, `v`; the bits of [`AdamStep::update`].
    pub adamw_row: AdamRow,
    // Matrix times a few vectors (gemv.rs); x: `[n_x, cols]`, out: `[rows, n_x]`, n_x at most `gemv::MAX_X`.
    /// x in the order in which this table's `nf4_gemv` meets the weights of a block;  x, out: `[n · 64]`.
    pub nf4_order: fn(x: &[f32], out: &mut [f32]),
    /// `out[j, i] = Σ_p w[j, p] · x[i, p]`, `w = round(code[index] · scale)`, x brought into order by `nf4_order`.
    pub nf4_gemv: gemv::Nf4Gemv,
    /// The same for x that is bfloat16, where there is a faster way.
    pub nf4_pairs: Option<gemv::Nf4Pairs>,
    /// Scales that are codes: `out[i] = map[codes[i]] · scale + offset`, rounded twice.
    pub nested_scales: gemv::LookUpScales,
    /// `out[j, i] = Σ_p w[j, p] · x[i, p]`;  w: bits of bf16, `[rows, cols]`.
    pub bf16_gemv: fn(w: &[u16], cols: usize, x: &[f32], out: &mut [f32]),
    /// `out[j, i] = Σ_p w[j, p] · x[i, p]`;  w: `[rows, cols]`.
    pub f32_gemv: fn(w: &[f32], cols: usize, x: &[f32], out: &mut [f32]),
    /// `out[j, i] = Σ_p scales[j, p / 64] · w[j, p] · x[i, p]`;  w: `[rows, cols]`, scales: `[rows, cols / 64]`.
    pub i8_gemv: gemv::Int8Gemv,
    /// Products with x in 8 bits (integer.rs).
    pub integer: integer::Integer,
    /// Products of blocks of 16-bit numbers (int16.rs).
    pub int16: int16::Int16Kernels,
    // Quantizing (quantize.rs).
    /// One block to NF4: `code[i]` = number of thresholds strictly below `x[i] · (1 / absmax)`, two codes a byte, the first
    /// in the high nibble; returns absmax, the largest magnitude. If that is NaN or infinite, `out` is unspecified.
    /// x: `[n · 32]`, thresholds ascending, out: `[n · 16]`.
    pub nf4_quantize: fn(x: &[f32], thresholds: &[f32; 15], out: &mut [u8]) -> f32,
}

impl Kernels {
    /// Whether products of bf16 are faster than those of f32, so that they are what "best" means.
    pub fn prefers_bf16(&self) -> bool {
        self.pairs.is_some_and(|pairs| pairs.fast)
    }
}

/// Every table this machine can run, best first; the last is always `scalar`.
pub fn available() -> &'static [Kernels] {
    static TABLES: OnceLock<Vec<Kernels>> = OnceLock::new();
    TABLES.get_or_init(|| {
        let mut tables = Vec::new();
        #[cfg(target_arch = "x86_64")]
        tables.extend(x86::tables());
        tables.push(reference::table());
        tables
    })
}

/// The table in use: the best one, or the one that `RUSTUNE_ISA` names; read once.
///
/// # Errors
/// [`Error::Config`] if `RUSTUNE_ISA` names a table that does not exist or that this machine cannot run.
pub fn active() -> Result<&'static Kernels> {
    static ACTIVE: OnceLock<std::result::Result<&'static Kernels, (String, String)>> = OnceLock::new();
    let choice = ACTIVE.get_or_init(|| match std::env::var("RUSTUNE_ISA") {
        Err(_) => Ok(&available()[0]),
        Ok(name) => named(&name).map_err(|expected| (name, expected)),
    });
    choice.clone().map_err(|(value, expected)| Error::Config { field: "RUSTUNE_ISA", value, expected })
}

/// The table called `name`, or what would have been accepted.
fn named(name: &str) -> std::result::Result<&'static Kernels, String> {
    available().iter().find(|table| table.isa == name).ok_or_else(|| {
        let names: Vec<_> = available().iter().map(|table| table.isa).collect();
        format!("this machine runs {}; set one of these or unset it", names.join(", "))
    })
}

/// Every table, and AMX on emulated tiles where the machine has none.
#[cfg(test)]
pub(crate) fn tables() -> Vec<&'static Kernels> {
    static EMULATED: OnceLock<Option<Kernels>> = OnceLock::new();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let amx = EMULATED.get_or_init(x86::amx::emulated::table).as_ref();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let amx = EMULATED.get_or_init(|| None).as_ref();
    available().iter().filter(|table| table.isa != "amx").chain(amx).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_unknown_instruction_set_is_refused_by_name() {
        let Err(message) = super::named("sse9") else { panic!("sse9 was accepted") };
        assert!(message.contains("scalar"), "{message}");
        assert_eq!(super::named("scalar").map(|k| k.isa), Ok("scalar"));
    }
}
