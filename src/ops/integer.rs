//! Many rows of x in 8 bits times a frozen matrix in 4 or 8 bits: what reading a prompt consists of, where 8 bits are allowed.
//!
//! Each task takes a panel of the matrix, a few dozen of its rows, dequantizes it to words of four codes (as many bytes as
//! weights), and multiplies it with all rows of x. A row's result does not depend on its neighbours or on the threads.

use super::linear::Matrix;
use super::matmul::Into;
use super::pack::sized;
use super::weight::{Precision, Storage, Weight};
use super::{Activations, Buf, Ctx, Env};
use crate::kernels::gemm::Rows;
use crate::kernels::gemv::BLOCK;
use crate::kernels::int8::STEP;
use crate::kernels::integer::{Codes, IntegerTile, Order, STEPS, WORDS};
use crate::kernels::lines::Lines;
use crate::kernels::tiles::{TileMut, bounds, split_grid};
use crate::quant::{Nf4Tensor, RowwiseInt8};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Blocks of 64 that a task rounds to 8 bits.
const ENCODE_BLOCKS: usize = 256;
/// Blocks of a weight row that are dequantized before they are dealt out: 32 rows of them fit the first-level cache.
const CHUNK: usize = 8;

/// Rows of x in 8 bits.
pub struct Encoded {
    words: Buf,
    scales: Buf,
    starts: Buf,
    cols: usize,
}

impl Encoded {
    /// Rounds rows of x to 8 bits, on all threads;  x: `[n, cols]`, cols a multiple of 64.
    pub fn new(ctx: &Ctx, x: &[f32], cols: usize, order: Order) -> Self {
        let mut encoded = Self::room(ctx, x.len(), cols);
        let Self { words, scales, starts, .. } = &mut encoded;
        let parts = words.par_chunks_mut(ENCODE_BLOCKS * WORDS).zip(scales.par_chunks_mut(ENCODE_BLOCKS));
        parts
            .zip(starts.par_chunks_mut(ENCODE_BLOCKS))
            .zip(x.par_chunks(ENCODE_BLOCKS * BLOCK))
            .for_each(|(((words, scales), starts), x)| (ctx.kernels.integer.encode)(x, order, words, scales, starts));
        encoded
    }

    /// The same on this thread alone.
    pub fn alone(ctx: &Ctx, x: &[f32], cols: usize, order: Order) -> Self {
        let mut encoded = Self::room(ctx, x.len(), cols);
        let Self { words, scales, starts, .. } = &mut encoded;
        (ctx.kernels.integer.encode)(x, order, words, scales, starts);
        encoded
    }

    fn room(ctx: &Ctx, len: usize, cols: usize) -> Self {
        let blocks = len / BLOCK;
        Self { words: ctx.buf(blocks * WORDS), scales: ctx.buf(blocks), starts: ctx.buf(blocks), cols }
    }

    /// The rows.
    pub fn codes(&self) -> Codes<'_> {
        Codes { words: &self.words, scales: &self.scales, starts: &self.starts, cols: self.cols }
    }
}

/// A matrix whose products may take x in 8 bits.
#[derive(Clone, Copy)]
pub enum Quantized<'a> {
    /// Blocks of a multiple of 64.
    Nf4(&'a Nf4Tensor),
    /// A scale a row.
    Int8(&'a RowwiseInt8),
}

impl<'a> Quantized<'a> {
    /// The weight as such a matrix, if its rows are whole blocks of 64.
    pub fn of(weight: &'a Weight) -> Option<Self> {
        match weight.storage() {
            _ if !weight.cols().is_multiple_of(BLOCK) => None,
            Storage::Nf4(tensor) if tensor.block_size.is_multiple_of(BLOCK) => Some(Self::Nf4(tensor)),
            Storage::Int8(matrix) => Some(Self::Int8(matrix)),
            Storage::F32(_) | Storage::Bf16(_) | Storage::Nf4(_) => None,
        }
    }

    /// The order in which its kernels want codes.
    pub fn order(self) -> Order {
        match self {
            Self::Nf4(_) => Order::EvenOdd,
            Self::Int8(_) => Order::Plain,
        }
    }

    /// Blocks `blocks` as words of the tile.
    fn words(self, tile: &IntegerTile, blocks: Range<usize>, words: &mut [f32]) {
        match self {
            Self::Nf4(tensor) => {
                (tile.nf4_words)(&tensor.packed[blocks.start * BLOCK / 2..blocks.end * BLOCK / 2], words);
            }
            Self::Int8(matrix) => (tile.int8_words)(&matrix.codes[blocks.start * BLOCK..blocks.end * BLOCK], words),
        }
    }

    /// What the products of blocks from `first` on are to be multiplied with;  out: those of one row.
    fn scales(self, ctx: &Ctx, first: usize, out: &mut [f32]) {
        match self {
            Self::Nf4(tensor) => {
                tensor.block_scales(ctx.kernels, BLOCK, first, out);
                for scale in out {
                    *scale /= STEPS;
                }
            }
            Self::Int8(matrix) => out.fill(matrix.absmax[first * BLOCK / matrix.cols] * STEP),
        }
    }
}

/// The matrix, where products of many rows in 8 bits are asked for and faster than others.
pub fn many<'a>(env: &Env<'_>, matrix: &'a Matrix) -> Option<Many<'a>> {
    let (Matrix::Frozen(weight), Activations::Bits8) = (matrix, env.activations) else { return None };
    let (tile, matrix) = (env.ctx.kernels.integer.tile?, Quantized::of(weight)?);
    let pairs = env.ctx.precision == Precision::Bf16 && env.ctx.kernels.pairs.is_some();
    if pairs && !tile.beats_pairs {
        return None;
    }
    Some(Many { tile, matrix, outputs: weight.rows(), inputs: weight.cols() })
}

/// A matrix `[outputs, inputs]` and the tile that multiplies it.
#[derive(Clone, Copy)]
pub struct Many<'a> {
    tile: IntegerTile,
    /// How it is stored.
    pub matrix: Quantized<'a>,
    outputs: usize,
    inputs: usize,
}

/// Scratch of one task.
#[derive(Default)]
struct Scratch {
    words: Lines,
    panel: Lines,
    row_scales: Lines,
    scales: Lines,
    tile: Lines,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `y (+)= x · Wᵀ` on all threads;  x in the matrix's order, `[n, in]`, y: `[n, out]`.
///
/// # Panics
/// If the shapes do not fit.
pub fn product(ctx: &Ctx, x: &Encoded, many: Many<'_>, into: Into, y: &mut [f32]) {
    let n = x.scales.len() * BLOCK / x.cols;
    assert!(many.inputs == x.cols && y.len() == n * many.outputs, "integer product: shapes differ");
    let tiles = split_grid(y, many.outputs, &[0, n], &bounds(many.outputs, many.tile.nr));
    // One panel a leaf: at the end no thread waits for more than one panel of another.
    tiles.into_par_iter().with_max_len(1).for_each(|part| {
        SCRATCH.with_borrow_mut(|scratch| panel(ctx, &many, x.codes(), into, part, scratch));
    });
}

/// The columns of one panel.
fn panel(ctx: &Ctx, many: &Many<'_>, x: Codes<'_>, into: Into, mut out: TileMut<'_>, scratch: &mut Scratch) {
    let (tile, blocks) = (&many.tile, x.cols / BLOCK);
    let (mr, nr, first, count) = (tile.mr, tile.nr, out.col0, out.cols());
    let Scratch { words, panel, row_scales, scales, tile: piece } = scratch;
    let panel = sized(panel, blocks * WORDS * nr);
    for chunk in (0..blocks).step_by(CHUNK) {
        let some = CHUNK.min(blocks - chunk);
        let words = sized(words, count * some * WORDS);
        for (j, words) in words.chunks_exact_mut(some * WORDS).enumerate() {
            let at = (first + j) * blocks + chunk;
            many.matrix.words(tile, at..at + some, words);
        }
        let rows = Rows { data: words, stride: some * WORDS, count, depth: some * WORDS };
        (ctx.kernels.transpose)(&rows, &mut panel[chunk * WORDS * nr..(chunk + some) * WORDS * nr], nr, 0);
    }
    let scales = sized(scales, blocks * nr);
    scales.fill(0.0);
    let row_scales = sized(row_scales, blocks);
    for j in 0..count {
        many.matrix.scales(ctx, (first + j) * blocks, row_scales);
        for (scales, scale) in scales.chunks_exact_mut(nr).zip(&*row_scales) {
            scales[j] = *scale;
        }
    }
    for i in (0..out.rows()).step_by(mr) {
        let height = mr.min(out.rows() - i);
        let piece = sized(piece, height * nr);
        (tile.run)(x.rows(i..i + height), panel, scales, piece);
        for (r, sums) in piece.chunks_exact(nr).enumerate() {
            let row = out.row(i + r);
            match into {
                Into::Store => row.copy_from_slice(&sums[..count]),
                Into::Add => (ctx.kernels.axpy)(1.0, &sums[..count], row),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::crew::with_crew;
    use crate::ops::gemv::{self, Input};
    use crate::ops::linear::{Bias, Linear, forward_all};
    use crate::ops::tape::test_floats as floats;
    use crate::ops::{ParamStore, Tokens};
    use crate::quant::FloatKind;

    /// In NF4 with blocks of `block` weights, or in 8 bits where that is `None`.
    fn linear(rows: usize, cols: usize, block: Option<usize>, bias: bool) -> Linear {
        let values: Vec<f32> = floats(rows * cols, 5).iter().map(|v| v * 0.1).collect();
        let weight = match block {
            Some(block) => {
                let tensor = Nf4Tensor::quantize(&values, &[rows, cols], FloatKind::F32, block, block == 64);
                Weight::nf4(tensor.unwrap()).unwrap()
            }
            None => Weight::int8(
                RowwiseInt8::quantize_from(rows, cols, |start, out| {
                    out.copy_from_slice(&values[start..start + out.len()]);
                    Ok(())
                })
                .unwrap(),
            ),
        };
        let bias = if bias { Bias::Frozen(floats(rows, 6)) } else { Bias::None };
        Linear { inputs: cols, outputs: rows, matrix: Matrix::Frozen(weight), bias, lora: None }
    }

    #[test]
    fn the_code_book_lies_as_near_to_that_of_nf4_as_is_said() {
        let codes = crate::kernels::integer::CODE_BOOK.map(|code| f32::from(code) / STEPS);
        let errors = codes.iter().zip(&crate::quant::nf4::CODE_BOOK).map(|(code, exact)| (code - exact).abs());
        assert!(errors.clone().all(|error| error <= 0.5001 / STEPS), "each is the nearest whole number");
        let mean = (errors.map(|error| error * error).sum::<f32>() / 16.0).sqrt();
        assert!((0.001_71..0.001_72).contains(&mean), "{mean}");
    }

    #[test]
    fn many_rows_give_what_few_rows_give_and_almost_what_floats_give() {
        let mut left_out = 0;
        for kernels in crate::kernels::available() {
            let ctx = Ctx { kernels, ..Ctx::new(Precision::F32).unwrap() };
            let (params, tokens) = (ParamStore::default(), Tokens::default());
            let exact = Env::new(&ctx, &params, &tokens);
            let env = Env { activations: Activations::Bits8, ..exact };
            // Outputs that fill no panel, rows that fill no tile, blocks of 128 that run across rows.
            for (rows, cols, block, bias) in [
                (70, 192, Some(64), false),
                (33, 640, Some(128), true),
                (5, 64, Some(128), true),
                (70, 192, None, true),
                (9, 576, None, false),
            ] {
                let layer = linear(rows, cols, block, bias);
                let n = 29;
                let x = floats(n * cols, 7);
                left_out += usize::from(many(&env, &layer.matrix).is_none());
                let [(got, _)] = forward_all(&env, [&layer], &x);
                let what = format!("{} {block:?} {rows} x {cols}", kernels.isa);
                let [(want, _)] = forward_all(&exact, [&layer], &x);
                let size = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
                let worst = got.iter().zip(&*want).fold(0.0_f32, |m, (g, w)| m.max((g - w).abs()));
                // A number is off by 1/254 of its block's largest at most, a weight by less; their errors average out.
                assert!(worst < 0.02 * size, "{what}: {worst} of {size}");
                if kernels.integer.tile.is_some() {
                    assert!(worst > 0.0, "{what}: 8 bits were not used");
                }
                for (i, x) in x.chunks_exact(cols).enumerate().step_by(7) {
                    let few = Input::new(&ctx, x, 1, cols, cols).rounded(Activations::Bits8);
                    let [few] = with_crew(|crew| gemv::linears(&env, crew, [&layer], &few));
                    let tolerance = if kernels.integer.tile.is_some() { 2e-6 } else { 0.02 };
                    for (g, w) in got[i * rows..].iter().zip(&*few) {
                        assert!((g - w).abs() <= tolerance * size, "{what} row {i}: {g} against {w}");
                    }
                }
            }
        }
        eprintln!("left out: the panel product, {left_out} cases of tables that have none");
    }

    #[test]
    fn a_row_depends_neither_on_its_neighbours_nor_on_the_threads() {
        let ctx = Ctx::new(Precision::F32).unwrap();
        let (params, tokens) = (ParamStore::default(), Tokens::default());
        let env = Env { activations: Activations::Bits8, ..Env::new(&ctx, &params, &tokens) };
        let (rows, cols, n) = (100, 256, 40);
        let (layer, x) = (linear(rows, cols, Some(64), false), floats(n * cols, 8));
        let run = |threads: usize, x: &[f32]| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| layer.forward(&env, x).0.to_vec())
        };
        let all = run(1, &x);
        assert_eq!(all, run(3, &x));
        assert_eq!(all[10 * rows..30 * rows], run(2, &x[10 * cols..30 * cols]));
    }
}
