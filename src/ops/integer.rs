//! Many rows of x in 8 bits times a frozen NF4 matrix: what reading a prompt consists of, where 8 bits are allowed.
//!
//! Each task takes a panel of the matrix, a few dozen of its rows, dequantizes it to words of four codes (as many bytes as
//! weights), and multiplies it with all rows of x. A row's result does not depend on its neighbours or on the threads.

use super::linear::Matrix;
use super::matmul::Into;
use super::pack::sized;
use super::weight::{Storage, Weight};
use super::{Buf, Ctx, Env};
use crate::kernels::gemm::Rows;
use crate::kernels::gemv::BLOCK;
use crate::kernels::integer::{Codes, IntegerTile, Order, STEPS, WORDS};
use crate::kernels::lines::Lines;
use crate::kernels::tiles::{TileMut, bounds, split_grid};
use crate::quant::Nf4Tensor;
use rayon::prelude::*;
use std::cell::RefCell;

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
        parts.zip(starts.par_chunks_mut(ENCODE_BLOCKS)).zip(x.par_chunks(ENCODE_BLOCKS * BLOCK)).for_each(
            |(((words, scales), starts), x)| (ctx.kernels.integer.encode)(x, order, words, scales, starts),
        );
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

/// Whether products with this matrix may take x in 8 bits: it is NF4, its rows are whole blocks, and nobody trains.
pub fn takes(weight: &Weight) -> Option<&Nf4Tensor> {
    match weight.storage() {
        Storage::Nf4(tensor) if weight.cols().is_multiple_of(BLOCK) && tensor.block_size.is_multiple_of(BLOCK) => {
            Some(tensor)
        }
        _ => None,
    }
}

/// [`takes`], where products of many rows in 8 bits are asked for and faster than others.
pub fn many<'a>(env: &Env<'_>, matrix: &'a Matrix) -> Option<(&'a Weight, IntegerTile)> {
    let (Matrix::Frozen(weight), true) = (matrix, env.int8) else { return None };
    takes(weight).and(env.ctx.kernels.integer.tile).map(|tile| (weight, tile))
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

/// `y (+)= x · Wᵀ` on all threads;  x in [`Order::EvenOdd`], `[n, in]`, y: `[n, out]`.
///
/// # Panics
/// If the shapes do not fit, or the matrix is none that [`takes`] knows.
pub fn product(ctx: &Ctx, x: &Encoded, (weight, tile): (&Weight, IntegerTile), into: Into, y: &mut [f32]) {
    let (n, outputs) = (x.scales.len() * BLOCK / x.cols, weight.rows());
    assert!(weight.cols() == x.cols && y.len() == n * outputs, "integer product: shapes differ");
    let Some(tensor) = takes(weight) else { panic!("integer product: the matrix is not NF4") };
    let tiles = split_grid(y, outputs, &[0, n], &bounds(outputs, tile.nr));
    // One panel a leaf: at the end no thread waits for more than one panel of another.
    tiles.into_par_iter().with_max_len(1).for_each(|part| {
        SCRATCH.with_borrow_mut(|scratch| panel(ctx, tensor, x.codes(), &tile, into, part, scratch));
    });
}

/// The columns of one panel.
fn panel(
    ctx: &Ctx,
    tensor: &Nf4Tensor,
    x: Codes<'_>,
    tile: &IntegerTile,
    into: Into,
    mut out: TileMut<'_>,
    scratch: &mut Scratch,
) {
    let IntegerTile { mr, nr, nf4_words, run } = *tile;
    let (blocks, first, count) = (x.cols / BLOCK, out.col0, out.cols());
    let Scratch { words, panel, row_scales, scales, tile: piece } = scratch;
    let panel = sized(panel, blocks * WORDS * nr);
    for chunk in (0..blocks).step_by(CHUNK) {
        let some = CHUNK.min(blocks - chunk);
        let words = sized(words, count * some * WORDS);
        for (j, words) in words.chunks_exact_mut(some * WORDS).enumerate() {
            let at = ((first + j) * blocks + chunk) * BLOCK / 2;
            nf4_words(&tensor.packed[at..at + some * BLOCK / 2], words);
        }
        let rows = Rows { data: words, stride: some * WORDS, count, depth: some * WORDS };
        (ctx.kernels.transpose)(rows, &mut panel[chunk * WORDS * nr..(chunk + some) * WORDS * nr], nr, 0);
    }
    let scales = sized(scales, blocks * nr);
    scales.fill(0.0);
    let row_scales = sized(row_scales, blocks);
    for j in 0..count {
        tensor.block_scales(ctx.kernels, BLOCK, (first + j) * blocks, row_scales);
        for (scales, scale) in scales.chunks_exact_mut(nr).zip(&*row_scales) {
            scales[j] = scale / STEPS;
        }
    }
    for i in (0..out.rows()).step_by(mr) {
        let height = mr.min(out.rows() - i);
        let piece = sized(piece, height * nr);
        run(x.rows(i..i + height), panel, scales, piece);
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
    use crate::ops::{ParamStore, Precision, Tokens};
    use crate::quant::FloatKind;

    fn linear(rows: usize, cols: usize, block: usize, nested: bool, bias: bool) -> Linear {
        let values: Vec<f32> = floats(rows * cols, 5).iter().map(|v| v * 0.1).collect();
        let tensor = Nf4Tensor::quantize(&values, &[rows, cols], FloatKind::F32, block, nested).unwrap();
        let bias = if bias { Bias::Frozen(floats(rows, 6)) } else { Bias::None };
        let matrix = Matrix::Frozen(Weight::nf4(tensor).unwrap());
        Linear { inputs: cols, outputs: rows, matrix, bias, lora: None }
    }

    #[test]
    fn many_rows_give_what_few_rows_give_and_almost_what_floats_give() {
        let mut left_out = 0;
        for kernels in crate::kernels::available() {
            let ctx = Ctx { kernels, ..Ctx::new(Precision::F32).unwrap() };
            let (params, tokens) = (ParamStore::default(), Tokens::default());
            let exact = Env::new(&ctx, &params, &tokens);
            let env = Env { int8: true, ..exact };
            // Outputs that fill no panel, rows that fill no tile, blocks of 128 that run across rows.
            for (rows, cols, block, nested, bias) in
                [(70, 192, 64, true, false), (33, 640, 64, false, true), (5, 64, 128, true, true)]
            {
                let layer = linear(rows, cols, block, nested, bias);
                let n = 29;
                let x = floats(n * cols, 7);
                left_out += usize::from(many(&env, &layer.matrix).is_none());
                let [(got, _)] = forward_all(&env, [&layer], &x);
                let what = format!("{} {rows} x {cols}", kernels.isa);
                let [(want, _)] = forward_all(&exact, [&layer], &x);
                let size = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
                let worst = got.iter().zip(&*want).fold(0.0_f32, |m, (g, w)| m.max((g - w).abs()));
                // A number is off by 1/254 of its block's largest at most, a weight by less; their errors average out.
                assert!(worst < 0.02 * size, "{what}: {worst} of {size}");
                if kernels.integer.tile.is_some() {
                    assert!(worst > 0.0, "{what}: 8 bits were not used");
                }
                for (i, x) in x.chunks_exact(cols).enumerate().step_by(7) {
                    let few = Input::new(&ctx, x, 1, cols, cols).in_8_bits(true);
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
        let env = Env { int8: true, ..Env::new(&ctx, &params, &tokens) };
        let (rows, cols, n) = (100, 256, 40);
        let (layer, x) = (linear(rows, cols, 64, true, false), floats(n * cols, 8));
        let run = |threads: usize, x: &[f32]| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| layer.forward(&env, x).0.to_vec())
        };
        let all = run(1, &x);
        assert_eq!(all, run(3, &x));
        assert_eq!(all[10 * rows..30 * rows], run(2, &x[10 * cols..30 * cols]));
    }
}
