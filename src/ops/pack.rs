//! Packing: from operands as they are stored to panels of words, dequantizing on the way.
//!
//! What a word of a panel is follows from the precision: an f32; a pair of bf16 where the instruction set multiplies
//! them, and where it does not an f32 that is rounded; a pair of 16-bit codes, with words of scales between.

use super::Ctx;
use super::matmul::Operand;
use super::weight::{Precision, Storage, Weight};
use crate::kernels::gemm::{GemmTile, PairKernels, PanelA, Rows};
use crate::kernels::int16::{self, Int16Kernels, Nf4Column};
use crate::kernels::lines::{LINE, Lines, halves_mut, prefetch};
use crate::quant::nf4::CODE_BOOK;
use crate::quant::{FloatKind, Nf4Tensor};
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Words of k in a packed block: with 32 columns of B, 32 KiB.
pub(super) const KC: usize = 256;
/// Rows of a weight that are read before they are dealt out.
const ROWS: usize = 16;
/// How far ahead pieces of rows are asked for: about what memory delivers while it finds the first of them.
const AHEAD_BYTES: usize = 2048;
/// And not more rows than this.
const AHEAD_ROWS: usize = 8;

/// Rows to ask for ahead, where a piece of a row has so many bytes.
fn rows_ahead(bytes: usize) -> usize {
    (AHEAD_BYTES / bytes.max(1)).clamp(1, AHEAD_ROWS)
}

/// Pieces of the rows of a weight, `[row][start .. start + len]`, read row by row.
#[derive(Clone, Copy)]
struct Pieces<'a> {
    weight: &'a Weight,
    start: usize,
    len: usize,
    ahead: usize,
}

impl<'a> Pieces<'a> {
    fn new(weight: &'a Weight, start: usize, len: usize) -> Self {
        let ahead = rows_ahead(len * weight.nbytes() / (weight.rows() * weight.cols()).max(1));
        Self { weight, start, len, ahead }
    }

    /// Where the piece of a row begins in the matrix. Asks for that of a row which will be wanted soon.
    fn of(&self, row: usize) -> usize {
        let at = |row: usize| row * self.weight.cols() + self.start;
        self.weight.prefetch(at(row + self.ahead), self.len);
        at(row)
    }
}

/// The product in use.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub(super) tile: GemmTile,
    words: Words,
}

/// What the words of a panel are.
#[derive(Clone, Copy)]
enum Words {
    /// f32, rounded to bf16 or not.
    F32 { round: bool },
    /// Pairs of bf16.
    Pairs(PairKernels),
    /// Pairs of 16-bit codes, and the scales of their blocks.
    Int16(Int16Kernels),
}

impl Form {
    pub(super) fn of(ctx: &Ctx) -> Self {
        let words = match (ctx.precision, ctx.kernels.pairs) {
            (Precision::F32, _) => Words::F32 { round: false },
            (Precision::Int16, _) => Words::Int16(ctx.kernels.int16),
            (Precision::Bf16, None) => Words::F32 { round: true },
            (Precision::Bf16, Some(pairs)) => Words::Pairs(pairs),
        };
        let tile = match &words {
            Words::F32 { .. } => ctx.kernels.tile,
            Words::Pairs(pairs) => pairs.tile,
            Words::Int16(int16) => int16.tile,
        };
        Self { tile, words }
    }

    /// Elements of k in a word.
    pub(super) fn k_per_word(&self) -> usize {
        if matches!(self.words, Words::F32 { .. }) { 1 } else { 2 }
    }

    /// Words of `k` elements of a row.
    fn used(&self, k: usize) -> usize {
        if matches!(self.words, Words::Int16(_)) { int16::depth(k) } else { k.div_ceil(self.k_per_word()) }
    }

    /// Words of a panel that holds `k` elements, padding included.
    pub(super) fn depth(&self, k: usize) -> usize {
        match self.tile.panel_a {
            PanelA::Columns => self.used(k),
            PanelA::Rows => self.used(k).next_multiple_of(LINE),
        }
    }

    /// Elements of k in a block.
    fn block(&self) -> usize {
        KC * self.k_per_word()
    }

    /// Words of a panel in a whole block.
    pub(super) fn block_depth(&self) -> usize {
        self.depth(self.block())
    }

    /// The blocks of `k`: number and elements of each.
    pub(super) fn blocks(&self, k: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let step = self.block();
        (0..k.div_ceil(step)).map(move |block| (block, block * step..k.min((block + 1) * step)))
    }
}

/// The first `len` floats of a buffer, whose content is unspecified.
pub(super) fn sized(lines: &mut Lines, len: usize) -> &mut [f32] {
    lines.set_len(len);
    lines.as_mut_slice()
}

/// `A[rows, ks]` as a panel of `width` rows, `width` given by `out: [depth, width]` in the layout asked for; zeros beyond.
#[expect(clippy::too_many_arguments, reason = "one rectangle of one operand on its way into one panel")]
pub(super) fn pack_panel(
    ctx: &Ctx,
    form: &Form,
    a: Operand<'_>,
    rows: Range<usize>,
    ks: Range<usize>,
    layout: PanelA,
    out: &mut [f32],
    words: &mut Lines,
) {
    let depth = form.depth(ks.len());
    let (count, width) = (rows.len(), out.len() / depth);
    let used = form.used(ks.len());
    let down = matches!(a, Operand::Dense { row_stride: 1, col_stride, .. } if col_stride != 1);
    if !down && (count < width || used < depth) {
        out.fill(0.0);
    }
    match a {
        // k runs along the columns of memory: rows of words, then transposed.
        Operand::Dense { data, row_stride, col_stride: 1 } if layout == PanelA::Columns && form.is_plain() => {
            let data = &data[rows.start * row_stride + ks.start..];
            (ctx.kernels.transpose)(&Rows { data, stride: row_stride, count, depth: used }, out, width, 0);
        }
        Operand::Dense { data, row_stride, col_stride: 1 }
            if let (PanelA::Rows, Words::Pairs(pairs)) = (layout, &form.words) =>
        {
            let piece = |row: usize| &data[row * row_stride + ks.start..][..ks.len()];
            for (r, row) in rows.clone().enumerate() {
                if row + 1 < rows.end {
                    prefetch(piece(row + 1));
                }
                (pairs.pack_lines)(piece(row), &mut out[r * LINE..], width * LINE);
            }
        }
        Operand::Dense { col_stride: 1, .. } | Operand::Weight(..) => {
            let (words, row_floats) = sized(words, count * used + ks.len()).split_at_mut(count * used);
            let outs = words.chunks_exact_mut(used);
            match a {
                Operand::Dense { data, row_stride, .. } => {
                    for (row, out) in rows.zip(outs) {
                        form.pack_row(ctx, &data[row * row_stride + ks.start..][..ks.len()], out);
                    }
                }
                Operand::Weight(weight, first) => {
                    let pieces = Pieces::new(weight, ks.start, ks.len());
                    for (row, out) in rows.zip(outs) {
                        form.read_row(ctx, weight, pieces.of(first + row), row_floats, out);
                    }
                }
                Operand::WeightT(..) => unreachable!("the outer match"),
            }
            match layout {
                PanelA::Columns => {
                    (ctx.kernels.transpose)(&Rows { data: words, stride: used, count, depth: used }, out, width, 0);
                }
                PanelA::Rows => {
                    for (r, row) in words.chunks_exact(used).enumerate() {
                        for (chunk, line) in row.chunks(LINE).enumerate() {
                            out[(chunk * width + r) * LINE..][..line.len()].copy_from_slice(line);
                        }
                    }
                }
            }
        }
        Operand::Dense { row_stride: 1, data, col_stride } => {
            let piece = Piece { data, stride: col_stride, columns: rows, ks };
            pack_down(ctx, form, &piece, layout, out, width, words);
        }
        Operand::Dense { .. } => panic!("gemm: one stride of a dense operand is 1"),
        Operand::WeightT(weight, first) => pack_weight_rows(ctx, form, weight, first, rows, ks, out, width, words),
    }
}

/// A rectangle of a dense matrix whose k runs down the rows: `data[k · stride ..][columns]` for each k of `ks`.
pub(super) struct Piece<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) columns: Range<usize>,
    pub(super) ks: Range<usize>,
}

impl Piece<'_> {
    fn row(&self, k: usize) -> &[f32] {
        &self.data[k * self.stride..][self.columns.clone()]
    }

    /// Asks for a row, if there is one.
    fn ask(&self, k: usize) {
        if k < self.ks.end {
            prefetch(self.row(k));
        }
    }
}

/// A piece as panels of `width` columns, zeros beyond: a row of memory, or two, is a row of each panel. Whole rows of the piece
/// are read, so that memory is read along its lines, and dealt out to the panels.
pub(super) fn pack_down(
    ctx: &Ctx,
    form: &Form,
    piece: &Piece<'_>,
    layout: PanelA,
    out: &mut [f32],
    width: usize,
    words: &mut Lines,
) {
    let Piece { ks, .. } = piece;
    let (count, depth, step) = (piece.columns.len(), form.depth(ks.len()), form.k_per_word());
    let panel_len = depth * width;
    if !count.is_multiple_of(width) || form.used(ks.len()) < depth {
        out.fill(0.0);
    }
    let ahead = rows_ahead(4 * count);
    if let Words::Int16(int16) = &form.words {
        let block = sized(words, int16::BLOCK * count);
        return join_blocks(int16.join_rows, ks, count, block, out, width, |k, row| {
            piece.ask(k + ahead);
            row.copy_from_slice(piece.row(k));
        });
    }
    let panels = || (0..count).step_by(width).map(|column| column..count.min(column + width)).enumerate();
    match layout {
        PanelA::Columns if form.k_per_word() == 1 => {
            for k in ks.clone().step_by(ahead) {
                let end = ks.end.min(k + ahead);
                (end..end + ahead).for_each(|k| piece.ask(k));
                let data = &piece.data[k * piece.stride + piece.columns.start..];
                for (panel, columns) in panels() {
                    let data = &data[columns.start..];
                    let block = Rows { data, stride: piece.stride, count: end - k, depth: columns.len() };
                    (ctx.kernels.copy_rows)(&block, &mut out[panel * panel_len + (k - ks.start) * width..], width);
                }
            }
            form.round(ctx, out);
        }
        PanelA::Columns => {
            // Some rows at a time, so that each panel takes a block of them; their next ones are asked for meanwhile.
            for k in ks.clone().step_by(ROWS) {
                let end = ks.end.min(k + ROWS);
                for (panel, columns) in panels() {
                    for k in end..ks.end.min(end + ROWS) {
                        prefetch(&piece.row(k)[columns.clone()]);
                    }
                    let out = &mut out[panel * panel_len + (k - ks.start) / step * width..];
                    form.join(ctx, piece, k..end, columns, out, width);
                }
            }
        }
        PanelA::Rows => {
            let words = sized(words, LINE * count);
            for (chunk, k) in ks.clone().step_by(LINE * step).enumerate() {
                let end = ks.end.min(k + LINE * step);
                (end..end + LINE * step).for_each(|k| piece.ask(k));
                form.join(ctx, piece, k..end, 0..count, words, count);
                for (panel, columns) in panels() {
                    let data = &words[columns.start..];
                    let lines = (end - k).div_ceil(step);
                    let block = Rows { data, stride: count, count: lines, depth: columns.len() };
                    let out = &mut out[panel * panel_len + chunk * LINE * width..][..LINE * width];
                    (ctx.kernels.transpose)(&block, out, LINE, 0);
                }
            }
        }
    }
}

/// Panels of 16-bit codes from rows of memory: `read(k, row)` gives row `k` of `ks`, `count` wide;  block: `[BLOCK, count]`.
fn join_blocks<T>(
    join: fn(&Rows<'_, T>, &mut [f32], usize),
    ks: &Range<usize>,
    count: usize,
    block: &mut [T],
    out: &mut [f32],
    width: usize,
    read: impl Fn(usize, &mut [T]),
) {
    let panel_len = int16::depth(ks.len()) * width;
    for (b, k) in ks.clone().step_by(int16::BLOCK).enumerate() {
        let end = ks.end.min(k + int16::BLOCK);
        for (k, row) in (k..end).zip(block.chunks_exact_mut(count)) {
            read(k, row);
        }
        for (panel, column) in (0..count).step_by(width).enumerate() {
            let data = &block[column..(end - k) * count];
            let rows = Rows { data, stride: count, count: end - k, depth: width.min(count - column) };
            let words = &mut out[panel * panel_len..][..panel_len][b * int16::BLOCK_WORDS * width..];
            join(&rows, words, width);
        }
    }
}

/// Whether elements `start .. start + len` of every row that is a multiple of [`int16::BLOCK`] further on are whole blocks of
/// NF4 of one scale each, of numbers that are rounded to bf16 or not at all.
fn whole_blocks(weight: &Weight, start: usize, len: usize) -> bool {
    let fits = |n: usize| n.is_multiple_of(int16::BLOCK);
    match weight.storage() {
        Storage::Nf4(tensor) => {
            fits(weight.cols()) && fits(tensor.block_size) && fits(start) && fits(len) && tensor.dtype != FloatKind::F16
        }
        _ => false,
    }
}

/// Whether the numbers that a tensor stands for are rounded to bf16.
fn rounds(tensor: &Nf4Tensor) -> bool {
    tensor.dtype == FloatKind::Bf16
}

/// [`join_blocks`] of the rows of a weight from `first` on.
#[expect(clippy::too_many_arguments, reason = "one rectangle of one operand on its way into its panels")]
fn join_weight(
    ctx: &Ctx,
    int16: &Int16Kernels,
    pieces: &Pieces<'_>,
    first: usize,
    ks: &Range<usize>,
    out: &mut [f32],
    width: usize,
    words: &mut Lines,
) {
    const BLOCK: usize = int16::BLOCK;
    let Pieces { weight, start, len: count, .. } = *pieces;
    match weight.storage() {
        Storage::Nf4(tensor) if whole_blocks(weight, start, count) && BLOCK.is_multiple_of(width) => {
            let (panel_len, columns, cols) = (int16::depth(ks.len()) * width, count / BLOCK, weight.cols());
            // Scales as they lie, then by columns.
            let (row_scales, scales) = sized(words, columns * (BLOCK + 1)).split_at_mut(columns);
            for (b, k) in ks.clone().step_by(BLOCK).enumerate() {
                let rows = BLOCK.min(ks.end - k);
                for r in 0..rows {
                    let at = (first + k + r) * cols + start;
                    weight.prefetch(at + BLOCK * cols, count);
                    tensor.block_scales(ctx.kernels, BLOCK, at / BLOCK, row_scales);
                    row_scales.iter().enumerate().for_each(|(c, scale)| scales[c * BLOCK + r] = *scale);
                }
                for c in 0..columns {
                    let at = (first + k) * cols + start + c * BLOCK;
                    let column = Nf4Column {
                        packed: &tensor.packed[at / 2..],
                        stride: cols / 2,
                        scales: &scales[c * BLOCK..][..rows],
                        code: &CODE_BOOK,
                        round: rounds(tensor),
                    };
                    let out = &mut out[c * BLOCK / width * panel_len + b * int16::BLOCK_WORDS * width..];
                    (int16.nf4_join)(column, out, width, panel_len);
                }
            }
        }
        Storage::Bf16(data) => {
            let data: &[u16] = data.reinterpret_cast();
            let block = halves_mut(sized(words, BLOCK * count.div_ceil(2)));
            join_blocks(int16.join_halves, ks, count, block, out, width, |k, row| {
                row.copy_from_slice(&data[pieces.of(first + k)..][..count]);
            });
        }
        _ => {
            let block = sized(words, BLOCK * count);
            join_blocks(int16.join_rows, ks, count, block, out, width, |k, row| {
                weight.read(ctx.kernels, pieces.of(first + k), row);
            });
        }
    }
}

/// `W[first + ks, columns]` as panels of `width` columns: whole rows of the weight are read, and dealt out to the panels.
#[expect(clippy::too_many_arguments, reason = "one rectangle of one operand on its way into its panels")]
fn pack_weight_rows(
    ctx: &Ctx,
    form: &Form,
    weight: &Weight,
    first: usize,
    columns: Range<usize>,
    ks: Range<usize>,
    out: &mut [f32],
    width: usize,
    words: &mut Lines,
) {
    let panel_len = form.depth(ks.len()) * width;
    let count = columns.len();
    let pieces = Pieces::new(weight, columns.start, count);
    if let Words::Int16(int16) = &form.words {
        return join_weight(ctx, int16, &pieces, first, &ks, out, width, words);
    }
    if let Words::Pairs(pairs) = &form.words {
        let stride = count.next_multiple_of(2);
        let block = halves_mut(sized(words, ROWS * stride / 2));
        for k in ks.clone().step_by(ROWS) {
            let end = ks.end.min(k + ROWS);
            for (k, row) in (k..end).zip(block.chunks_exact_mut(stride)) {
                weight.read_bf16(pairs, pieces.of(first + k), &mut row[..count]);
            }
            for (panel, column) in (0..count).step_by(width).enumerate() {
                let rows = Rows { data: &block[column..], stride, count: end - k, depth: width.min(count - column) };
                (pairs.join_halves)(&rows, &mut out[panel * panel_len + (k - ks.start) / 2 * width..], width);
            }
        }
        return;
    }
    // Some rows at a time, so that each panel takes a block of them.
    let block = sized(words, ROWS * count);
    for (p, k) in ks.clone().step_by(ROWS).enumerate() {
        let block = &mut block[..ROWS.min(ks.end - k) * count];
        for (row, k) in block.chunks_exact_mut(count).zip(k..) {
            weight.read(ctx.kernels, pieces.of(first + k), row);
        }
        form.round(ctx, block);
        for (panel, column) in (0..count).step_by(width).enumerate() {
            let depth = width.min(count - column);
            let rows = Rows { data: &block[column..], stride: count, count: block.len() / count, depth };
            (ctx.kernels.copy_rows)(&rows, &mut out[panel * panel_len + p * ROWS * width..], width);
        }
    }
}

impl Form {
    /// Whether a word is an f32 as it stands in memory.
    fn is_plain(&self) -> bool {
        matches!(self.words, Words::F32 { round: false })
    }

    /// Consecutive elements along k to words.
    fn pack_row(&self, ctx: &Ctx, x: &[f32], out: &mut [f32]) {
        match &self.words {
            Words::Pairs(pairs) => (pairs.pack_row)(x, out),
            Words::Int16(int16) => (int16.pack_row)(x, out),
            Words::F32 { .. } => {
                out.copy_from_slice(x);
                self.round(ctx, out);
            }
        }
    }

    /// Consecutive elements of a weight to words, as many as there is room for them as floats.
    fn read_row(&self, ctx: &Ctx, weight: &Weight, start: usize, room: &mut [f32], out: &mut [f32]) {
        match &self.words {
            Words::Pairs(pairs) => {
                let (k, out) = (room.len(), halves_mut(out));
                weight.read_bf16(pairs, start, &mut out[..k]);
                out[k..].fill(0);
            }
            Words::Int16(int16) => match weight.storage() {
                Storage::Nf4(tensor) if whole_blocks(weight, start, room.len()) => {
                    let scales = &mut room[..out.len() / int16::BLOCK_WORDS];
                    tensor.block_scales(ctx.kernels, int16::BLOCK, start / int16::BLOCK, scales);
                    let (packed, round) =
                        (&tensor.packed[start / 2..][..scales.len() * int16::BLOCK / 2], rounds(tensor));
                    (int16.nf4_row)(packed, scales, &CODE_BOOK, round, out);
                }
                Storage::Bf16(data) => (int16.pack_halves)(data[start..start + room.len()].reinterpret_cast(), out),
                _ => {
                    weight.read(ctx.kernels, start, room);
                    (int16.pack_row)(room, out);
                }
            },
            Words::F32 { .. } => {
                weight.read(ctx.kernels, start, out);
                self.round(ctx, out);
            }
        }
    }

    /// Rounds words that are f32 where the operands are to be bf16.
    fn round(&self, ctx: &Ctx, words: &mut [f32]) {
        if matches!(self.words, Words::F32 { round: true }) {
            (ctx.kernels.round_bf16)(words);
        }
    }

    /// The words of some rows of memory: those rows, or two by two (a missing last one is zeros);
    /// out: `[words of ks, width]`.
    fn join(
        &self,
        ctx: &Ctx,
        piece: &Piece<'_>,
        ks: Range<usize>,
        columns: Range<usize>,
        out: &mut [f32],
        width: usize,
    ) {
        let data = &piece.data[ks.start * piece.stride + piece.columns.start + columns.start..];
        let rows = Rows { data, stride: piece.stride, count: ks.len(), depth: columns.len() };
        if let Words::Pairs(pairs) = &self.words {
            return (pairs.join_rows)(&rows, out, width);
        }
        (ctx.kernels.copy_rows)(&rows, out, width);
        self.round(ctx, out);
    }
}

/// Fills `out` with `B[ks, js]` as `[panel of nr columns][depth][nr]`, zeros beyond.
pub(super) fn pack_b(
    ctx: &Ctx,
    form: &Form,
    b: Operand<'_>,
    ks: Range<usize>,
    js: Range<usize>,
    out: &mut [f32],
    words: &mut Lines,
) {
    let nr = form.tile.nr;
    let panel_len = form.depth(ks.len()) * nr;
    if let Operand::Weight(weight, first) = b {
        if !js.len().is_multiple_of(nr) || form.used(ks.len()) * nr < panel_len {
            out.fill(0.0);
        }
        return pack_weight_rows(ctx, form, weight, first, js, ks, out, nr, words);
    }
    if let Operand::Dense { data, row_stride, col_stride: 1 } = b
        && row_stride != 1
    {
        let piece = Piece { data, stride: row_stride, columns: js, ks };
        return pack_down(ctx, form, &piece, PanelA::Columns, out, nr, words);
    }
    for (panel, out) in out.chunks_exact_mut(panel_len).enumerate() {
        let first = js.start + panel * nr;
        let columns = first..js.end.min(first + nr);
        pack_panel(ctx, form, b.swap(), columns, ks.clone(), PanelA::Columns, out, words);
    }
}
