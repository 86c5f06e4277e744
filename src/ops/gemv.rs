//! A few rows of x times a frozen matrix on all threads, straight from the weights' storage: what decoding consists of.
//!
//! The weights are read once for up to [`MAX_ROWS`] rows of x, in tasks of whole weight rows, so the result does not depend on
//! the number of threads, nor a row's on its neighbours. Layers that share their input are one loop of a [`Crew`], and a
//! low-rank adapter is added in the same task as its weight rows.

use super::crew::Crew;
use super::dora::Factors;
use super::integer::{Encoded, Quantized};
use super::linear::{Bias, Linear, Matrix};
use super::weight::{Precision, Storage, Weight};
use super::{Activations, Buf, Ctx, Env};
use crate::kernels::gemv::{BLOCK, MAX_NESTED, MAX_X, NestedScales, Nf4Pairs, Nf4Rows, Round, Scales};
use crate::kernels::int8::STEP;
use crate::kernels::int16_gemv::{Codes16, Layout, WORDS};
use crate::kernels::integer::{Codes, Order};
use crate::quant::nf4::{Absmax, CODE_BOOK};
use crate::quant::{FloatKind, Int8Matrix, Nf4Tensor};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Up to this many rows of x, a product reads its weights where they are stored.
pub const MAX_ROWS: usize = MAX_X;

/// Bytes of weights that one task reads at most: fewer bytes, and starting a task shows; more, and threads wait for the last.
const TASK_BYTES: usize = 256 << 10;

/// Rows of x in the forms in which kernels read them.
pub struct Input {
    n_rows: usize,
    cols: usize,
    /// `[n_rows, cols]`, rounded as the precision asks.
    plain: Buf,
    /// What products may round x to.
    activations: Activations,
    /// x in the order of the NF4 kernel, once one asks for it.
    ordered: OnceLock<Buf>,
    /// x in 8 bits, in each [`Order`].
    encoded: [OnceLock<Encoded>; 2],
    /// x in 16 bits, and their scales, in each [`Layout`].
    encoded16: [OnceLock<(Buf, Buf)>; 2],
}

/// How a matrix is multiplied with, and so how x is to be laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// With x as it is.
    Plain,
    /// NF4 with x in the order of its kernel.
    Nf4,
    /// With x in 8 bits.
    Codes(Order),
    /// With x in 16 bits.
    Codes16(Layout),
}

impl Input {
    /// Takes `x`: `[n_rows, cols]`, rows `stride` apart.
    ///
    /// # Panics
    /// If there are more than [`MAX_ROWS`] rows.
    pub fn new(ctx: &Ctx, x: &[f32], n_rows: usize, cols: usize, stride: usize) -> Self {
        assert!(n_rows <= MAX_ROWS, "gemv: {n_rows} rows");
        let mut plain = ctx.buf(n_rows * cols);
        for (i, row) in plain.chunks_exact_mut(cols).enumerate() {
            row.copy_from_slice(&x[i * stride..][..cols]);
        }
        if ctx.precision == Precision::Bf16 {
            (ctx.kernels.round_bf16)(&mut plain);
        }
        let (ordered, encoded) = (OnceLock::new(), [const { OnceLock::new() }; 2]);
        let encoded16 = [const { OnceLock::new() }; 2];
        Self { n_rows, cols, plain, activations: Activations::Exact, ordered, encoded, encoded16 }
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The same, which products with NF4 and 8-bit matrices may round.
    #[must_use]
    pub fn rounded(self, activations: Activations) -> Self {
        Self { activations, ..self }
    }

    /// Lays x out for a form, once: by the thread that leads, before others would wait for it.
    fn lay_out(&self, ctx: &Ctx, form: Form) {
        match form {
            Form::Plain => (),
            Form::Nf4 => drop(self.ordered(ctx)),
            Form::Codes(order) => drop(self.codes(ctx, order)),
            Form::Codes16(layout) => drop(self.codes16(ctx, layout)),
        }
    }

    fn ordered(&self, ctx: &Ctx) -> &[f32] {
        self.ordered.get_or_init(|| {
            let (order, len) = match pairs(ctx) {
                Some(pairs) => (pairs.order, self.plain.len() / 2),
                None => (ctx.kernels.nf4_order, self.plain.len()),
            };
            let mut ordered = ctx.buf(len);
            order(&self.plain, &mut ordered);
            ordered
        })
    }

    fn codes(&self, ctx: &Ctx, order: Order) -> Codes<'_> {
        self.encoded[order as usize].get_or_init(|| Encoded::alone(ctx, &self.plain, self.cols, order)).codes()
    }

    fn codes16(&self, ctx: &Ctx, layout: Layout) -> Codes16<'_> {
        let gemv = &ctx.kernels.int16.gemv;
        let blocks = gemv.blocks(self.cols, layout);
        let (words, scales) = self.encoded16[layout as usize].get_or_init(|| {
            let (mut words, mut scales) = (ctx.buf(self.n_rows * blocks * WORDS), ctx.buf(self.n_rows * blocks));
            let rows = words.chunks_exact_mut(blocks * WORDS).zip(scales.chunks_exact_mut(blocks));
            for (x, (words, scales)) in self.plain.chunks_exact(self.cols).zip(rows) {
                (gemv.encode)(x, layout, words, scales);
            }
            (words, scales)
        });
        Codes16 { words, scales, cols: self.cols }
    }
}

/// The product of bfloat16 pairs, where x is bfloat16 and the CPU has one.
fn pairs(ctx: &Ctx) -> Option<Nf4Pairs> {
    ctx.kernels.nf4_pairs.filter(|_| ctx.precision == Precision::Bf16)
}

/// Scratch of one task.
#[derive(Default)]
struct Scratch {
    scales: Vec<f32>,
    row: Vec<f32>,
    part: Vec<f32>,
    both: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A matrix to be multiplied with.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// Frozen, in its storage.
    Weight(&'a Weight),
    /// Trained, `[_, cols]`.
    F32(&'a [f32]),
    /// In 8 bits.
    Int8(&'a Int8Matrix),
}

impl<'a> Rows<'a> {
    fn of(env: &Env<'a>, matrix: &'a Matrix) -> Self {
        match matrix {
            Matrix::Frozen(weight) => Self::Weight(weight),
            Matrix::Trained(id) => Self::F32(env.params.get(*id)),
        }
    }

    /// Rows of each task, of `rows` in all: tasks of at most [`TASK_BYTES`], as many for each thread.
    fn per_task(self, rows: usize, cols: usize, n_threads: usize) -> usize {
        let bytes = match self {
            Self::Weight(weight) => weight.nbytes() / weight.rows().max(1),
            Self::F32(_) => 4 * cols,
            Self::Int8(_) => cols + cols / 16,
        };
        let tasks = (rows * bytes).div_ceil(TASK_BYTES).next_multiple_of(n_threads).max(1);
        rows.div_ceil(tasks).max(1)
    }

    fn form(self, ctx: &Ctx, x: &Input) -> Form {
        let bits16 = x.activations == Activations::Bits16 && ctx.kernels.int16.gemv.fast;
        let matrix = match self {
            Self::Weight(weight) => Quantized::of(weight),
            Self::F32(_) | Self::Int8(_) => None,
        };
        let int8 = matches!((self, matrix), (Self::Int8(_), _) | (_, Some(Quantized::Int8(_))));
        match (matrix, x.activations) {
            (Some(matrix), Activations::Bits8) => Form::Codes(matrix.order()),
            (None, Activations::Bits8) if int8 => Form::Codes(Order::Plain),
            (Some(Quantized::Nf4(_)), _) if bits16 => Form::Codes16(Layout::Nf4),
            (Some(Quantized::Nf4(_)), _) => Form::Nf4,
            _ if int8 && bits16 => Form::Codes16(Layout::Plain),
            _ => Form::Plain,
        }
    }

    /// `out[j, i] = row (first + j) · x_i`, on this thread.
    fn multiply(self, ctx: &Ctx, x: &Input, first: usize, out: &mut [f32], scratch: &mut Scratch) {
        let (rows, form) = (first..first + out.len() / x.n_rows, self.form(ctx, x));
        let elements = rows.start * x.cols..rows.end * x.cols;
        let bf16 = ctx.precision == Precision::Bf16;
        let weight = match self {
            Self::F32(data) if !bf16 => return (ctx.kernels.f32_gemv)(&data[elements], x.cols, &x.plain, out),
            Self::F32(data) => {
                let read = |row: usize, to: &mut [f32]| to.copy_from_slice(&data[row * x.cols..][..x.cols]);
                return by_rows(ctx, x, rows, out, &mut scratch.row, read);
            }
            Self::Int8(matrix) => {
                let scales = &matrix.scales[elements.start / BLOCK..elements.end / BLOCK];
                return int8_rows(ctx, &matrix.codes[elements], scales, x, form, out);
            }
            Self::Weight(weight) => weight,
        };
        match (weight.storage(), form) {
            (Storage::F32(data), _) if !bf16 => (ctx.kernels.f32_gemv)(&data[elements], x.cols, &x.plain, out),
            (Storage::Bf16(data), _) => {
                (ctx.kernels.bf16_gemv)(data[elements].reinterpret_cast(), x.cols, &x.plain, out);
            }
            (Storage::Int8(matrix), form) if x.cols.is_multiple_of(BLOCK) && (!bf16 || form != Form::Plain) => {
                let scales = &mut scratch.scales;
                scales.clear();
                let steps = matrix.absmax[rows].iter().map(|absmax| absmax * STEP);
                scales.extend(steps.flat_map(|step| std::iter::repeat_n(step, x.cols / BLOCK)));
                int8_rows(ctx, &matrix.codes[elements], scales, x, form, out);
            }
            (Storage::Nf4(tensor), Form::Nf4 | Form::Codes(_) | Form::Codes16(_)) => {
                let packed = &tensor.packed[elements.start / 2..elements.end / 2];
                let blocks = elements.start / BLOCK..elements.end / BLOCK;
                let scales = block_scales(ctx, tensor, blocks, x.cols, &mut scratch.scales);
                let w = Nf4Rows { packed, scales, cols: x.cols, round: round(tensor.dtype, ctx.precision) };
                match form {
                    Form::Codes(order) => (ctx.kernels.integer.nf4_gemv)(w, x.codes(ctx, order), out),
                    Form::Codes16(layout) => {
                        (ctx.kernels.int16.gemv.nf4)(w, &CODE_BOOK, x.codes16(ctx, layout), out);
                    }
                    Form::Nf4 => {
                        let gemv = pairs(ctx).map_or(ctx.kernels.nf4_gemv, |pairs| pairs.gemv);
                        gemv(w, &CODE_BOOK, x.ordered(ctx), out);
                    }
                    Form::Plain => unreachable!("the outer match"),
                }
            }
            _ => {
                let read = |row: usize, to: &mut [f32]| weight.read(ctx.kernels, row * x.cols, to);
                by_rows(ctx, x, rows, out, &mut scratch.row, read);
            }
        }
    }
}

/// Rows in 8 bits against x, in 8 bits too if the form says so.
fn int8_rows(ctx: &Ctx, codes: &[i8], scales: &[f32], x: &Input, form: Form, out: &mut [f32]) {
    match form {
        Form::Codes(order) => (ctx.kernels.integer.int8_gemv)(codes, scales, x.codes(ctx, order), out),
        Form::Codes16(layout) => (ctx.kernels.int16.gemv.int8)(codes, scales, x.codes16(ctx, layout), out),
        Form::Plain | Form::Nf4 => (ctx.kernels.i8_gemv)(codes, scales, x.cols, &x.plain, out),
    }
}

/// The slower way for what the kernels do not take: each row is read as f32, rounded as the precision asks, and multiplied.
fn by_rows(
    ctx: &Ctx,
    x: &Input,
    rows: Range<usize>,
    out: &mut [f32],
    row: &mut Vec<f32>,
    read: impl Fn(usize, &mut [f32]),
) {
    row.resize(x.cols, 0.0);
    for (j, out) in rows.zip(out.chunks_exact_mut(x.n_rows)) {
        read(j, row);
        if ctx.precision == Precision::Bf16 {
            (ctx.kernels.round_bf16)(row);
        }
        (ctx.kernels.f32_gemv)(row, x.cols, &x.plain, out);
    }
}

/// How a GEMM would round the weights of a tensor that stands for `dtype`; blocks of 16 bits are f32 here.
fn round(dtype: FloatKind, precision: Precision) -> Round {
    match (dtype, precision) {
        (FloatKind::F32, Precision::F32 | Precision::Int16) => Round::F32,
        (FloatKind::F16, Precision::F32 | Precision::Int16) => Round::F16,
        (FloatKind::F16, Precision::Bf16) => Round::F16ThenBf16,
        (FloatKind::Bf16, _) | (FloatKind::F32, Precision::Bf16) => Round::Bf16,
    }
}

/// The scales of the 64-weight blocks `blocks` of a tensor whose own blocks are a multiple of that.
fn block_scales<'a>(
    ctx: &Ctx,
    tensor: &'a Nf4Tensor,
    blocks: Range<usize>,
    cols: usize,
    scratch: &'a mut Vec<f32>,
) -> Scales<'a> {
    match &tensor.absmax {
        Absmax::Plain(scales) if tensor.block_size == BLOCK => Scales::Each(&scales[blocks]),
        Absmax::Nested { codes, absmax, offset, block_size, map }
            if tensor.block_size == BLOCK && cols / BLOCK <= MAX_NESTED =>
        {
            Scales::Nested(NestedScales {
                codes: &codes[..blocks.end],
                first: blocks.start,
                absmax,
                offset: *offset,
                group: *block_size,
                map,
            })
        }
        _ => {
            scratch.resize(blocks.len(), 0.0);
            tensor.block_scales(ctx.kernels, BLOCK, blocks.start, scratch);
            Scales::Each(scratch)
        }
    }
}

/// `x · weight[first .. first + count]ᵀ`, `[n_rows, count]`, by the pool's threads outside a crew.
pub fn weight(ctx: &Ctx, weight: &Weight, first: usize, count: usize, x: &Input) -> Buf {
    let rows = Rows::Weight(weight);
    x.lay_out(ctx, rows.form(ctx, x));
    let step = rows.per_task(count, x.cols, rayon::current_num_threads());
    let mut out = ctx.buf(count * x.n_rows);
    // One part a leaf: at the end of a product no thread waits for more than one part of another.
    out.par_chunks_mut(step * x.n_rows).with_max_len(1).enumerate().for_each(|(task, out)| {
        SCRATCH.with_borrow_mut(|scratch| rows.multiply(ctx, x, first + task * step, out, scratch));
    });
    if x.n_rows == 1 {
        return out;
    }
    let mut turned = ctx.buf(out.len());
    turned.par_chunks_mut(count).enumerate().for_each(|(i, row)| column(&out, x.n_rows, i, row));
    turned
}

/// `matrix · x`, `[n_rows, rows]`.
pub fn matrix(env: &Env<'_>, crew: &Crew, matrix: &Matrix, rows: usize, x: &Input) -> Buf {
    let [out] = stacked(env.ctx, crew, [(Rows::of(env, matrix), rows)], x, |_, _, _, _| ());
    out
}

/// `matrix · x`, `[n_rows, rows]`.
pub fn int8(ctx: &Ctx, crew: &Crew, matrix: &Int8Matrix, x: &Input) -> Buf {
    let rows = matrix.codes.len() / matrix.cols;
    let [out] = stacked(ctx, crew, [(Rows::Int8(matrix), rows)], x, |_, _, _, _| ());
    out
}

/// Matrices with the same input, each with its number of rows, one below the other in one loop: `[n_rows, rows]` each.
///
/// `finish(matrix, first, out, scratch)` completes `out`, products of rows from `first` on, `[some rows, n_rows]`.
fn stacked<const N: usize>(
    ctx: &Ctx,
    crew: &Crew,
    parts: [(Rows<'_>, usize); N],
    x: &Input,
    finish: impl Fn(usize, usize, &mut [f32], &mut Scratch) + Sync,
) -> [Buf; N] {
    let n_rows = x.n_rows;
    for (rows, _) in &parts {
        x.lay_out(ctx, rows.form(ctx, x));
    }
    let height = parts.iter().map(|(_, height)| height).sum();
    let step = parts.iter().map(|(rows, _)| rows.per_task(height, x.cols, crew.n_threads())).min().unwrap_or(1);
    let mut out = ctx.buf(height * n_rows);
    crew.for_chunks(&mut out, step * n_rows, |task, out| {
        let (mut out, mut first) = (out, task * step);
        SCRATCH.with_borrow_mut(|scratch| {
            for (i, &(rows, height)) in parts.iter().enumerate() {
                if first >= height {
                    first -= height;
                    continue;
                }
                let len = ((height - first) * n_rows).min(out.len());
                let (part, rest) = std::mem::take(&mut out).split_at_mut(len);
                rows.multiply(ctx, x, first, part, scratch);
                finish(i, first, part, scratch);
                (out, first) = (rest, 0);
                if out.is_empty() {
                    break;
                }
            }
        });
    });
    if N == 1 && n_rows == 1 {
        let mut whole = Some(out);
        return parts.map(|_| whole.take().unwrap_or_default());
    }
    let mut at = 0;
    parts.map(|(_, height)| {
        let columns = &out[at..at + height * n_rows];
        at += height * n_rows;
        transpose(ctx, crew, columns, n_rows)
    })
}

/// `[width, n_rows]` to `[n_rows, width]`.
fn transpose(ctx: &Ctx, crew: &Crew, columns: &[f32], n_rows: usize) -> Buf {
    if n_rows == 1 {
        return ctx.copy(columns);
    }
    let width = columns.len() / n_rows;
    let mut out = ctx.buf(columns.len());
    crew.for_chunks(&mut out, width, |i, row| column(columns, n_rows, i, row));
    out
}

/// Column `i` of `[_, n_rows]`.
fn column(columns: &[f32], n_rows: usize, i: usize, out: &mut [f32]) {
    for (to, from) in out.iter_mut().zip(columns[i..].iter().step_by(n_rows)) {
        *to = *from;
    }
}

/// What a linear layer adds to the product with its matrix.
struct Additions<'a> {
    bias: Option<&'a [f32]>,
    /// The adapter's B, its rank, and `scale · A x` as `[n_rows, rank]`.
    low: Option<(&'a [f32], usize, Buf)>,
    /// What a magnitude multiplies with.
    factors: Option<Arc<Factors>>,
}

impl<'a> Additions<'a> {
    /// Those of layers that share their input.
    fn of<const N: usize>(env: &Env<'a>, crew: &Crew, linears: [&'a Linear; N], x: &Input) -> [Self; N] {
        let down = |linear: &'a Linear| match &linear.lora {
            Some(lora) => (Rows::F32(env.params.get(lora.a)), lora.rank),
            None => (Rows::F32(&[]), 0),
        };
        let mut lows = if linears.iter().any(|linear| linear.lora.is_some()) {
            stacked(env.ctx, crew, linears.map(down), x, |i, _, out, _| {
                let scale = linears[i].lora.as_ref().map_or(1.0, |lora| lora.scale);
                for low in out {
                    *low *= scale;
                }
            })
            .map(Some)
        } else {
            [const { None }; N]
        };
        let mut i = 0;
        linears.map(|linear| {
            let bias = match &linear.bias {
                Bias::None => None,
                Bias::Frozen(bias) => Some(&bias[..]),
                Bias::Trained(id) => Some(env.params.get(*id)),
            };
            let low = lows[i].take().zip(linear.lora.as_ref());
            i += 1;
            let low = low.map(|(low, lora)| (env.params.get(lora.b), lora.rank, low));
            Self { bias, low, factors: linear.factors(env) }
        })
    }

    /// Adds to the products of rows from `first` on, `[some rows, n_rows]`.
    fn add(&self, ctx: &Ctx, n_rows: usize, first: usize, out: &mut [f32], scratch: &mut Scratch) {
        if let Some(bias) = self.bias {
            for (out, bias) in out.chunks_exact_mut(n_rows).zip(&bias[first..]) {
                for out in out {
                    *out += bias;
                }
            }
        }
        if let Some((b, rank, low)) = &self.low {
            let part = &mut scratch.part;
            part.resize(out.len(), 0.0);
            (ctx.kernels.f32_gemv)(&b[first * rank..][..out.len() / n_rows * rank], *rank, low, part);
            out.iter_mut().zip(part).for_each(|(out, part)| *out += *part);
        }
        if let Some(factors) = &self.factors {
            factors.scale_columns(self.bias, first, n_rows, out);
        }
    }
}

/// Linear layers that share their input, without dropout: `[n_rows, outputs]` each.
pub fn linears<const N: usize>(env: &Env<'_>, crew: &Crew, linears: [&Linear; N], x: &Input) -> [Buf; N] {
    let additions = Additions::of(env, crew, linears, x);
    let parts = linears.map(|linear| (Rows::of(env, &linear.matrix), linear.outputs));
    stacked(env.ctx, crew, parts, x, |i, first, out, scratch| {
        additions[i].add(env.ctx, x.n_rows, first, out, scratch);
    })
}

/// `silu(gate(x)) · up(x)`, `[n_rows, ffn]`: the rows of both layers in one task.
pub fn gated(env: &Env<'_>, crew: &Crew, [gate, up]: [&Linear; 2], x: &Input) -> Buf {
    let (ctx, n_rows) = (env.ctx, x.n_rows);
    let mut out = ctx.buf(gate.outputs * n_rows);
    let additions = Additions::of(env, crew, [gate, up], x);
    let [gate_rows, up_rows] = [gate, up].map(|linear| Rows::of(env, &linear.matrix));
    for rows in [gate_rows, up_rows] {
        x.lay_out(ctx, rows.form(ctx, x));
    }
    let step = gate_rows.per_task(gate.outputs, x.cols, crew.n_threads());
    crew.for_chunks(&mut out, step * n_rows, |task, out| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut both = std::mem::take(&mut scratch.both);
            both.resize(2 * out.len(), 0.0);
            let (gate_part, up_part) = both.split_at_mut(out.len());
            for (rows, additions, part) in
                [(gate_rows, &additions[0], &mut *gate_part), (up_rows, &additions[1], &mut *up_part)]
            {
                rows.multiply(ctx, x, task * step, part, scratch);
                additions.add(ctx, n_rows, task * step, part, scratch);
            }
            (ctx.kernels.swiglu_row)(gate_part, up_part, out);
            scratch.both = both;
        });
    });
    if n_rows == 1 { out } else { transpose(ctx, crew, &out, n_rows) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::crew::with_crew;
    use crate::ops::tape::test_floats as floats;
    use crate::quant::RowwiseInt8;
    use half::bf16;

    /// The weight as the GEMM path sees it: read, then rounded.
    fn dense(ctx: &Ctx, weight: &Weight) -> Vec<f32> {
        let mut values = vec![0.0; weight.rows() * weight.cols()];
        weight.read(ctx.kernels, 0, &mut values);
        if ctx.precision == Precision::Bf16 {
            (ctx.kernels.round_bf16)(&mut values);
        }
        values
    }

    fn weights(rows: usize, cols: usize) -> Vec<(String, Weight)> {
        let values: Vec<f32> = floats(rows * cols, 3).iter().map(|v| v * 0.1).collect();
        let mut made = vec![
            ("f32".to_owned(), Weight::f32(values.clone(), rows, cols).unwrap()),
            ("bf16".to_owned(), Weight::bf16(values.iter().map(|v| bf16::from_f32(*v)).collect(), rows, cols).unwrap()),
        ];
        let int8 = RowwiseInt8::quantize_from(rows, cols, |start, out| {
            out.copy_from_slice(&values[start..start + out.len()]);
            Ok(())
        });
        made.push(("int8".to_owned(), Weight::int8(int8.unwrap())));
        for kind in [FloatKind::F32, FloatKind::Bf16, FloatKind::F16] {
            for (block, nested) in [(64, false), (64, true), (32, false), (128, false), (256, true)] {
                let tensor = Nf4Tensor::quantize(&values, &[rows, cols], kind, block, nested).unwrap();
                made.push((format!("nf4 {kind:?} {block} {nested}"), Weight::nf4(tensor).unwrap()));
            }
        }
        made
    }

    #[test]
    fn every_storage_block_and_precision_equals_the_dequantized_product() {
        for kernels in crate::kernels::available() {
            for precision in [Precision::F32, Precision::Bf16] {
                let ctx = Ctx { kernels, ..Ctx::new(precision).unwrap() };
                // 192 columns: blocks of 128 and 256 run across rows; 100: no row is whole blocks.
                for (rows, cols, n_rows) in [(7, 192, 1), (5, 192, 3), (300, 64, 8), (9, 100, 2)] {
                    let x = floats(n_rows * cols, 4);
                    let input = Input::new(&ctx, &x, n_rows, cols, cols);
                    let mut rounded = x.clone();
                    if precision == Precision::Bf16 {
                        (kernels.round_bf16)(&mut rounded);
                    }
                    for (name, w) in weights(rows, cols) {
                        let out = weight(&ctx, &w, 0, rows, &input);
                        let [stacked] =
                            with_crew(|crew| stacked(&ctx, crew, [(Rows::Weight(&w), rows)], &input, |_, _, _, _| ()));
                        assert_eq!(out[..], stacked[..]);
                        let values = dense(&ctx, &w);
                        for (at, got) in out.iter().enumerate() {
                            let (i, j) = (at / rows, at % rows);
                            let products =
                                (0..cols).map(|p| f64::from(rounded[i * cols + p]) * f64::from(values[j * cols + p]));
                            let want = products.sum::<f64>() as f32;
                            // f32 sums of up to 192 products of size 0.1.
                            let what = format!("{} {precision:?} {name} {rows}x{cols} [{i}, {j}]", kernels.isa);
                            assert!((got - want).abs() <= 2e-6 * cols as f32 * 0.1, "{what}: {got} against {want}");
                        }
                    }
                }
            }
        }
    }
}
