//! Causal attention with grouped heads over several sequences in one buffer, without a score matrix.
//!
//! K and V of each sequence and key-value head are packed once, and read by all query tiles and heads of the group. Forward: a
//! task takes a tile of queries of all heads of a group and walks over the blocks of keys; only the log-sum-exp of each
//! query and head is kept. Backward: a sequence is cut into blocks; a task takes one block of keys and one of queries, and
//! adds to the gradients of both. Tasks run in rounds in which no block of keys and no block of queries comes up twice, so
//! they share nothing, the order of every sum follows from the lengths alone, and one long sequence keeps many threads busy.
//! A few queries (decoding) read keys and values where they lie, in ranges that are merged afterwards.
//! The arithmetic of a tile stands in [`crate::kernels::attention`].

use super::attention_pairs::{self as pairs, Rows};
use super::crew::Crew;
use super::pack::Form;
use super::{Buf, Ctx, Precision, TASKS_AT_ONCE};
use crate::kernels::attention::{
    Block, FEW_KEYS, Few, Gradients, KEYS, PAD, QUERIES, Softmax, Upstream, pack_panels, pack_queries, pack_rows,
    queries_len,
};
use crate::kernels::tiles::{TileMut, split_grid};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Up to this many queries of a sequence, keys and values are read where they lie.
const FEW_QUERIES: usize = 4;
/// Keys that one task of the path for few queries takes.
const FEW_RANGE: usize = 256;
/// Query heads of a group that a forward task takes at most.
const HEADS_PER_TASK: usize = 4;
/// Below this many floats of keys and values, the path for few queries stays on its thread.
const SERIAL: usize = 65_536;

/// The sizes of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of the queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Query heads of a key-value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of packed rows.
    fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(PAD)
    }
}

/// One sequence: queries `q_start .. q_start + q_len` of the buffer against its own keys.
///
/// The last query sees all `kv_len` keys, the one before it all but one: with a cache, `kv_len` exceeds `q_len`.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// First query row.
    pub q_start: usize,
    /// Number of queries.
    pub q_len: usize,
    /// `[kv_len, kv_heads · head_dim]`.
    pub k: &'a [f32],
    /// `[kv_len, kv_heads · head_dim]`.
    pub v: &'a [f32],
    /// Number of keys, at least `q_len`.
    pub kv_len: usize,
}

/// The segments of a buffer whose keys stand beside its queries.
pub fn segments<'a>(cu_seqlens: &[usize], kv_width: usize, k: &'a [f32], v: &'a [f32]) -> Vec<Segment<'a>> {
    cu_seqlens
        .windows(2)
        .map(|pair| {
            let rows = pair[0] * kv_width..pair[1] * kv_width;
            let len = pair[1] - pair[0];
            Segment { q_start: pair[0], q_len: len, k: &k[rows.clone()], v: &v[rows], kv_len: len }
        })
        .collect()
}

/// Scratch of one task.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    dout: Vec<f32>,
    scores: Vec<f32>,
    dscores: Vec<f32>,
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    pairs: pairs::Scratch,
}

/// The product of pairs of bf16, where that is what the products are made of.
fn pair_form(ctx: &Ctx) -> Option<Form> {
    (ctx.precision == Precision::Bf16 && ctx.kernels.pairs.is_some()).then(|| Form::of(ctx))
}

/// Queries of a tile.
fn tile_queries(form: Option<&Form>) -> usize {
    if form.is_some() { pairs::QUERIES } else { QUERIES }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `buffer` as `len` copies of `value`.
fn filled(buffer: &mut Vec<f32>, len: usize, value: f32) -> &mut [f32] {
    buffer.clear();
    buffer.resize(len, value);
    buffer
}

/// `buffer` as `len` floats of unspecified value.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// What packed keys or values are for.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// Products with their transpose; in f32 `[panel][head_dim][panel width]`.
    Panels,
    /// Products with them; in f32 `[keys][padded head_dim]`.
    Rows,
}

/// One of K and V of all segments, each (segment, key-value head) padded to whole panels.
struct Packed {
    data: Buf,
    /// Padded keys before each segment.
    starts: Vec<usize>,
    kv_heads: usize,
    /// Floats of one key.
    per_key: usize,
}

impl Packed {
    /// Packs `lengths[s]` rows of `[_, kv_width]` for each segment.
    fn new(ctx: &Ctx, shape: Heads, matrices: &[&[f32]], layout: Layout) -> Self {
        let (dim, form) = (shape.head_dim, pair_form(ctx));
        let panel = if form.is_some() { pairs::UNIT } else { ctx.kernels.attention.panel };
        let per_key = match (&form, layout) {
            (None, Layout::Panels) => dim,
            (None, Layout::Rows) => shape.padded(),
            (Some(form), Layout::Panels) => form.depth(dim),
            (Some(form), Layout::Rows) => dim.next_multiple_of(form.tile.nr) / 2,
        };
        let lengths: Vec<usize> = matrices.iter().map(|m| m.len() / shape.kv_width()).collect();
        let mut starts = vec![0];
        for len in &lengths {
            starts.push(starts[starts.len() - 1] + len.next_multiple_of(panel));
        }
        let mut data = ctx.buf(starts[lengths.len()] * shape.kv_heads * per_key);
        // (segment, head, first key, where it goes)
        let mut tasks = Vec::new();
        let mut rest = &mut data[..];
        for (segment, len) in lengths.iter().enumerate() {
            for head in 0..shape.kv_heads {
                let (region, after) = rest.split_at_mut(len.next_multiple_of(panel) * per_key);
                rest = after;
                tasks.extend(
                    region.chunks_mut(KEYS * per_key).enumerate().map(|(b, out)| (segment, head, b * KEYS, out)),
                );
            }
        }
        tasks.into_par_iter().with_max_len(1).for_each(|(segment, head, first, out)| {
            let count = (lengths[segment] - first).min(KEYS);
            let src = &matrices[segment][first * shape.kv_width() + head * dim..];
            if let Some(form) = &form {
                let rows = Rows { data: src, stride: shape.kv_width(), count, dim };
                let pack = if layout == Layout::Panels { pairs::pack_transposed } else { pairs::pack_rows };
                return SCRATCH.with_borrow_mut(|scratch| pack(ctx, form, rows, out, &mut scratch.pairs.words));
            }
            match layout {
                Layout::Panels => pack_panels(src, shape.kv_width(), count, dim, panel, out),
                Layout::Rows => pack_rows(src, shape.kv_width(), count, dim, per_key, out),
            }
            if ctx.precision == Precision::Bf16 {
                (ctx.kernels.round_bf16)(out);
            }
        });
        Self { data, starts, kv_heads: shape.kv_heads, per_key }
    }

    /// The packed block of keys from `first` on, of one segment and head.
    fn block(&self, segment: usize, head: usize, first: usize) -> &[f32] {
        let (start, end) = (self.starts[segment], self.starts[segment + 1]);
        let at = start * self.kv_heads + head * (end - start) + first;
        &self.data[at * self.per_key..][..(end - start - first).min(KEYS) * self.per_key]
    }
}

/// Attention of all segments.
///
/// q: `[n_tokens, heads · head_dim]`, segments in the order of their rows and covering them.
/// Returns out: `[n_tokens, heads · head_dim]` and lse: `[n_tokens, heads]`.
pub fn forward(ctx: &Ctx, shape: Heads, q: &[f32], segments: &[Segment<'_>]) -> (Buf, Buf) {
    let mut out = ctx.buf(q.len());
    let mut lse = ctx.buf(q.len() / shape.head_dim);
    let (few, many): (Vec<_>, Vec<_>) = segments.iter().partition(|segment| segment.q_len <= FEW_QUERIES);
    forward_many(ctx, shape, q, &many, (&mut out, &mut lse));
    forward_few(ctx, None, shape, q, &few, (&mut out, &mut lse));
    (out, lse)
}

/// The output of [`forward`] for segments of new tokens, with a crew at hand.
pub fn decode(ctx: &Ctx, crew: &Crew, shape: Heads, q: &[f32], segments: &[Segment<'_>]) -> Buf {
    let mut out = ctx.buf(q.len());
    let mut lse = ctx.buf(q.len() / shape.head_dim);
    let (few, many): (Vec<_>, Vec<_>) = segments.iter().partition(|segment| segment.q_len <= FEW_QUERIES);
    forward_many(ctx, shape, q, &many, (&mut out, &mut lse));
    forward_few(ctx, Some(crew), shape, q, &few, (&mut out, &mut lse));
    out
}

/// The forward by tiles of queries.
fn forward_many(ctx: &Ctx, shape: Heads, q: &[f32], segments: &[&Segment<'_>], (out, lse): (&mut [f32], &mut [f32])) {
    if segments.is_empty() {
        return;
    }
    let (dim, group, form) = (shape.head_dim, shape.group(), pair_form(ctx));
    let queries = tile_queries(form.as_ref());
    let k_width = shape.kv_width();
    let k: Vec<&[f32]> = segments.iter().map(|segment| &segment.k[..segment.kv_len * k_width]).collect();
    let v: Vec<&[f32]> = segments.iter().map(|segment| &segment.v[..segment.kv_len * k_width]).collect();
    let k = Packed::new(ctx, shape, &k, Layout::Panels);
    let v = Packed::new(ctx, shape, &v, Layout::Rows);
    // Row bounds of the tiles, and whose each band of rows is: some lie between segments.
    let (mut rows, mut owner) = (vec![0], Vec::new());
    for (s, segment) in segments.iter().enumerate() {
        rows.push(segment.q_start);
        owner.push(None);
        for i in (0..segment.q_len).step_by(queries) {
            rows.push(segment.q_start + (i + queries).min(segment.q_len));
            owner.push(Some(s));
        }
    }
    // A task takes up to HEADS_PER_TASK heads of one group.
    let mut heads = vec![0];
    for kv_head in 0..shape.kv_heads {
        for h in (0..group).step_by(HEADS_PER_TASK) {
            heads.push(kv_head * group + (h + HEADS_PER_TASK).min(group));
        }
    }
    let cols: Vec<usize> = heads.iter().map(|h| h * dim).collect();
    let bands = heads.len() - 1;
    let tiles =
        split_grid(out, shape.q_width(), &rows, &cols).into_iter().zip(split_grid(lse, shape.heads, &rows, &heads));
    let mut tasks: Vec<_> = tiles
        .enumerate()
        .filter_map(|(task, (out, lse))| owner[task / bands].map(|segment| (segment, out, lse)))
        .collect();
    // The last tiles of a sequence see the most keys: they go first.
    tasks.reverse();
    tasks.into_par_iter().with_max_len(1).for_each(|(segment, out, lse)| {
        SCRATCH.with_borrow_mut(|scratch| {
            let of = (segment, segments[segment]);
            forward_tile((ctx, form.as_ref()), shape, q, of, (&k, &v), (out, lse), scratch);
        });
    });
}

/// A tile of queries of some heads of one group against all keys they see.
fn forward_tile(
    (ctx, form): (&Ctx, Option<&Form>),
    shape: Heads,
    q: &[f32],
    (index, segment): (usize, &Segment<'_>),
    (k, v): (&Packed, &Packed),
    (mut out, mut lse): (TileMut<'_>, TileMut<'_>),
    scratch: &mut Scratch,
) {
    let (dim, width, n) = (shape.head_dim, shape.padded(), out.rows());
    let (head0, heads) = (lse.col0, lse.cols());
    let kv_head = head0 / shape.group();
    // Position among the keys of the tile's first query.
    let first = segment.kv_len - segment.q_len + out.row0 - segment.q_start;
    let queries = queries_len(dim);
    let packed_q = sized(&mut scratch.q, if form.is_some() { 0 } else { heads * queries });
    for h in 0..heads {
        let rows = &q[out.row0 * shape.q_width() + (head0 + h) * dim..];
        if let Some(form) = form {
            let rows = Rows { data: rows, stride: shape.q_width(), count: n, dim };
            pairs::pack_queries(ctx, form, rows, h, &mut scratch.pairs);
        } else {
            pack_queries(rows, shape.q_width(), n, dim, &mut packed_q[h * queries..][..queries]);
        }
    }
    if ctx.precision == Precision::Bf16 {
        (ctx.kernels.round_bf16)(packed_q);
    }
    let acc = filled(&mut scratch.acc, heads * n * width, 0.0);
    let max = filled(&mut scratch.max, heads * n, f32::NEG_INFINITY);
    let sum = filled(&mut scratch.sum, heads * n, 0.0);
    let scores = sized(&mut scratch.scores, tile_queries(form) * KEYS);
    for k0 in (0..first + n).step_by(KEYS) {
        let (k_panels, v_rows) = (k.block(index, kv_head, k0), v.block(index, kv_head, k0));
        for h in 0..heads {
            let block = Block {
                q: if form.is_some() { &[] } else { &packed_q[h * queries..][..queries] },
                k_panels,
                n,
                keys: KEYS.min(segment.kv_len - k0),
                dim,
                ahead: first as isize - k0 as isize,
                scale: shape.scale(),
                // Pairs are rounded as they are packed.
                bf16: ctx.precision == Precision::Bf16 && form.is_none(),
            };
            let mut softmax = Softmax {
                scores,
                acc: &mut acc[h * n * width..][..n * width],
                max: &mut max[h * n..][..n],
                sum: &mut sum[h * n..][..n],
            };
            match form {
                Some(form) => pairs::forward(ctx, form, &block, h, v_rows, &mut softmax, &mut scratch.pairs),
                None => (ctx.kernels.attention.forward)(&block, v_rows, &mut softmax),
            }
        }
    }
    for i in 0..n {
        let (out, lse) = (out.row(i), lse.row(i));
        for h in 0..heads {
            let at = h * n + i;
            lse[h] = finish(&acc[at * width..][..dim], (max[at], sum[at]), &mut out[h * dim..][..dim]);
        }
    }
}

/// `out = acc / sum`; returns the log-sum-exp.
fn finish(acc: &[f32], (max, sum): (f32, f32), out: &mut [f32]) -> f32 {
    let inverse = 1.0 / sum;
    for (o, a) in out.iter_mut().zip(acc) {
        *o = a * inverse;
    }
    (max + sum.log2()) * std::f32::consts::LN_2
}

/// One task of the path for few queries: some keys of one segment and key-value head.
struct FewTask<'a> {
    segment: &'a Segment<'a>,
    kv_head: usize,
    keys: Range<usize>,
}

/// The forward of segments with few queries: each key and value is read once, for all heads of its group.
fn forward_few(
    ctx: &Ctx,
    crew: Option<&Crew>,
    shape: Heads,
    q: &[f32],
    segments: &[&Segment<'_>],
    (out, lse): (&mut [f32], &mut [f32]),
) {
    let (dim, group, width) = (shape.head_dim, shape.group(), shape.padded());
    let mut tasks = Vec::new();
    for &segment in segments.iter().filter(|segment| segment.q_len > 0) {
        for kv_head in 0..shape.kv_heads {
            for first in (0..segment.kv_len).step_by(FEW_RANGE) {
                tasks.push(FewTask { segment, kv_head, keys: first..segment.kv_len.min(first + FEW_RANGE) });
            }
        }
    }
    // Of each task and row: the accumulator, the maximum and the sum.
    let rows = FEW_QUERIES * group;
    let mut parts = ctx.buf(tasks.len() * rows * (width + 2));
    let run = |(task, part): (&FewTask<'_>, &mut [f32])| {
        SCRATCH.with_borrow_mut(|scratch| few_keys(ctx, shape, q, task, part, scratch));
    };
    let floats: usize = segments.iter().map(|segment| 2 * segment.kv_len * shape.kv_width()).sum();
    if floats < SERIAL {
        tasks.iter().zip(parts.chunks_exact_mut(rows * (width + 2))).for_each(run);
    } else if let Some(crew) = crew {
        crew.for_chunks(&mut parts, rows * (width + 2), |i, part| run((&tasks[i], part)));
    } else {
        tasks.par_iter().zip(parts.par_chunks_exact_mut(rows * (width + 2))).for_each(run);
    }
    // Ranges of the same segment and head stand one after the other.
    let mut done = 0;
    while done < tasks.len() {
        let FewTask { segment, kv_head, .. } = tasks[done];
        let ranges = segment.kv_len.div_ceil(FEW_RANGE);
        let parts = &mut parts[done * rows * (width + 2)..][..ranges * rows * (width + 2)];
        for row in 0..segment.q_len * group {
            let (token, head) = (segment.q_start + row / group, kv_head * group + row % group);
            let out = &mut out[token * shape.q_width() + head * dim..][..dim];
            lse[token * shape.heads + head] = merge(parts, (rows, width), row, out);
        }
        done += ranges;
    }
}

/// Merges one row's ranges; returns the log-sum-exp.  parts: `[ranges][rows · (width + 2)]`.
fn merge(parts: &[f32], (rows, width): (usize, usize), row: usize, out: &mut [f32]) -> f32 {
    let parts = || parts.chunks_exact(rows * (width + 2));
    let state = |part: &[f32]| (part[rows * width + row], part[rows * (width + 1) + row]);
    let max = parts().map(|part| state(part).0).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    out.fill(0.0);
    for part in parts() {
        let (part_max, part_sum) = state(part);
        let weight = (part_max - max).exp2();
        sum += weight * part_sum;
        for (o, a) in out.iter_mut().zip(&part[row * width..]) {
            *o += weight * a;
        }
    }
    for o in out.iter_mut() {
        *o /= sum;
    }
    (max + sum.log2()) * std::f32::consts::LN_2
}

/// The running softmax of one task's keys.  part: accumulators `[rows, width]`, maxima `[rows]`, sums `[rows]`.
fn few_keys(ctx: &Ctx, shape: Heads, q: &[f32], task: &FewTask<'_>, part: &mut [f32], scratch: &mut Scratch) {
    let (dim, group, width) = (shape.head_dim, shape.group(), shape.padded());
    let FewTask { segment, kv_head, ref keys } = *task;
    let (rows, capacity) = (segment.q_len * group, FEW_QUERIES * group);
    let bf16 = ctx.precision == Precision::Bf16;
    let packed_q = sized(&mut scratch.q, rows * dim);
    for (i, q_rows) in packed_q.chunks_exact_mut(group * dim).enumerate() {
        let at = (segment.q_start + i) * shape.q_width() + kv_head * group * dim;
        q_rows.copy_from_slice(&q[at..][..group * dim]);
    }
    if bf16 {
        (ctx.kernels.round_bf16)(packed_q);
    }
    // Query i sees all keys but the last q_len - 1 - i.
    let seen: Vec<usize> = (0..rows)
        .map(|row| (segment.kv_len - (segment.q_len - 1 - row / group)).clamp(keys.start, keys.end) - keys.start)
        .collect();
    part[..capacity * width].fill(0.0);
    let (acc, state) = part.split_at_mut(capacity * width);
    let (max, sum) = state.split_at_mut(capacity);
    max.fill(f32::NEG_INFINITY);
    sum.fill(0.0);
    let at = keys.start * shape.kv_width() + kv_head * dim;
    let few = Few {
        q: packed_q,
        k: &segment.k[at..],
        v: &segment.v[at..],
        stride: shape.kv_width(),
        keys: keys.len(),
        dim,
        seen: &seen,
        scale: shape.scale(),
        bf16,
    };
    let scores = sized(&mut scratch.scores, (rows * FEW_KEYS).max(QUERIES * KEYS));
    (ctx.kernels.attention.few)(&few, &mut Softmax { scores, acc, max, sum });
}

/// The forward's inputs and outputs, as its backward reads them.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    /// `[n_tokens, heads · head_dim]`.
    pub q: &'a [f32],
    /// `[n_tokens, kv_heads · head_dim]`.
    pub k: &'a [f32],
    /// `[n_tokens, kv_heads · head_dim]`.
    pub v: &'a [f32],
    /// `[n_tokens, heads · head_dim]`.
    pub out: &'a [f32],
    /// `[n_tokens, heads]`.
    pub lse: &'a [f32],
}

/// K and V as the backward reads them.
struct PackedKv {
    k_panels: Packed,
    k_rows: Packed,
    v_panels: Packed,
}

/// A block of keys and a block of queries of one sequence and key-value head.
struct Cell<'a> {
    segment: usize,
    /// First row of the segment.
    start: usize,
    kv_head: usize,
    dq: TileMut<'a>,
    dk: TileMut<'a>,
    dv: TileMut<'a>,
}

/// Gradients of q, k and v, in their shapes, from that of the output;  dout: `[n_tokens, heads · head_dim]`.
pub fn backward(ctx: &Ctx, shape: Heads, cu_seqlens: &[usize], f: Forward<'_>, dout: &[f32]) -> (Buf, Buf, Buf) {
    let (mut dq, mut dk, mut dv) = (ctx.zeros(f.q.len()), ctx.zeros(f.k.len()), ctx.zeros(f.v.len()));
    let delta = deltas(ctx, shape, f.out, dout);
    let of = |matrix| {
        let segments = segments(cu_seqlens, shape.kv_width(), matrix, matrix);
        segments.into_iter().map(|segment| segment.k).collect::<Vec<_>>()
    };
    let kv = PackedKv {
        k_panels: Packed::new(ctx, shape, &of(f.k), Layout::Panels),
        k_rows: Packed::new(ctx, shape, &of(f.k), Layout::Rows),
        v_panels: Packed::new(ctx, shape, &of(f.v), Layout::Panels),
    };
    // Blocks of KEYS rows, none of which leaves its sequence; of each sequence its first row, first block and their number.
    let (mut rows, mut sequences) = (vec![0], Vec::new());
    for pair in cu_seqlens.windows(2) {
        sequences.push((pair[0], rows.len() - 1, (pair[1] - pair[0]).div_ceil(KEYS)));
        rows.extend((pair[0]..pair[1]).step_by(KEYS).map(|row| (row + KEYS).min(pair[1])));
    }
    let cols = |step: usize| (0..=shape.kv_heads).map(|h| h * step).collect::<Vec<_>>();
    let rounds = sequences.iter().map(|(_, _, blocks)| *blocks).max().unwrap_or(0);
    for round in 0..rounds {
        let grid = |matrix, cols: &[usize]| {
            let tiles = split_grid(matrix, cols[shape.kv_heads], &rows, cols);
            tiles.into_iter().map(Some).collect::<Vec<_>>()
        };
        let mut dq = grid(&mut dq, &cols(shape.group() * shape.head_dim));
        let (mut dk, mut dv) = (grid(&mut dk, &cols(shape.head_dim)), grid(&mut dv, &cols(shape.head_dim)));
        let mut cells = Vec::new();
        for (segment, &(start, block0, blocks)) in sequences.iter().enumerate() {
            for (x, y) in pairs(blocks, round) {
                for kv_head in 0..shape.kv_heads {
                    let take = |tiles: &mut Vec<Option<_>>, block: usize| {
                        tiles[(block0 + block) * shape.kv_heads + kv_head]
                            .take()
                            .expect("a block comes up once in a round")
                    };
                    let (dq, dk, dv) = (take(&mut dq, y), take(&mut dk, x), take(&mut dv, x));
                    cells.push(Cell { segment, start, kv_head, dq, dk, dv });
                }
            }
        }
        cells.into_par_iter().with_max_len(1).for_each(|cell| {
            SCRATCH.with_borrow_mut(|scratch| backward_cell(ctx, shape, f, (dout, &delta), &kv, cell, scratch));
        });
    }
    (dq, dk, dv)
}

/// The pairs (block of keys, block of queries not before it) of one of `blocks` rounds: no block is twice on its side.
///
/// In round r stand the pairs whose sum is r modulo `blocks`, those on the diagonal, which are half as much work, last.
fn pairs(blocks: usize, round: usize) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    if round < blocks {
        let partner = |x: usize| (round + blocks - x) % blocks;
        pairs.extend((0..blocks).map(|x| (x, partner(x))).filter(|(x, y)| x < y));
        pairs.extend((0..blocks).map(|x| (x, partner(x))).filter(|(x, y)| x == y));
    }
    pairs
}

/// `delta = Σ dout ⊙ out` of each token and head, `[n_tokens, heads]`.
fn deltas(ctx: &Ctx, shape: Heads, out: &[f32], dout: &[f32]) -> Buf {
    let mut delta = ctx.buf(out.len() / shape.head_dim);
    let task = super::rows_per_task(shape.head_dim);
    delta.par_chunks_mut(task).with_max_len(TASKS_AT_ONCE).enumerate().for_each(|(chunk, delta)| {
        for (i, delta) in delta.iter_mut().enumerate() {
            let at = (chunk * task + i) * shape.head_dim;
            *delta = (ctx.kernels.dot)(&dout[at..][..shape.head_dim], &out[at..][..shape.head_dim]);
        }
    });
    delta
}

/// Adds one cell's part to the gradients.
fn backward_cell(
    ctx: &Ctx,
    shape: Heads,
    f: Forward<'_>,
    (dout, delta): (&[f32], &[f32]),
    kv: &PackedKv,
    mut cell: Cell<'_>,
    scratch: &mut Scratch,
) {
    let (dim, width, group, scale) = (shape.head_dim, shape.padded(), shape.group(), shape.scale());
    let (k0, keys) = (cell.dk.row0 - cell.start, cell.dk.rows());
    let dk = filled(&mut scratch.dk, keys * width, 0.0);
    let dv = filled(&mut scratch.dv, keys * width, 0.0);
    let (form, bf16) = (pair_form(ctx), ctx.precision == Precision::Bf16);
    let tile = tile_queries(form.as_ref());
    let (p, ds) = (sized(&mut scratch.scores, tile * KEYS), sized(&mut scratch.dscores, tile * KEYS));
    let (q, packed_dout) = (sized(&mut scratch.q, queries_len(dim)), sized(&mut scratch.dout, queries_len(dim)));
    let (mut lse_tile, mut delta_tile) = ([0.0; pairs::QUERIES], [0.0; pairs::QUERIES]);
    for i0 in (0..cell.dq.rows()).step_by(tile) {
        let n = tile.min(cell.dq.rows() - i0);
        let row0 = cell.dq.row0 + i0;
        for h in 0..group {
            let head = cell.kv_head * group + h;
            let at = row0 * shape.q_width() + head * dim;
            for i in 0..n {
                let at = (row0 + i) * shape.heads + head;
                (lse_tile[i], delta_tile[i]) = (f.lse[at], delta[at]);
            }
            let dq = filled(&mut scratch.acc, n * width, 0.0);
            let k_rows = kv.k_rows.block(cell.segment, cell.kv_head, k0);
            let v_panels = kv.v_panels.block(cell.segment, cell.kv_head, k0);
            let (lse, delta) = (&lse_tile[..n], &delta_tile[..n]);
            let block = Block {
                q: &[],
                k_panels: kv.k_panels.block(cell.segment, cell.kv_head, k0),
                n,
                keys,
                dim,
                ahead: (row0 - cell.start) as isize - k0 as isize,
                scale,
                // Pairs are rounded as they are packed.
                bf16: bf16 && form.is_none(),
            };
            if let Some(form) = &form {
                let rows = |data| Rows { data, stride: shape.q_width(), count: n, dim };
                let (q, dout) = (rows(&f.q[at..]), rows(&dout[at..]));
                let v_transposed = v_panels;
                let mut b = pairs::Backward { q, dout, v_transposed, k_rows, lse, delta, p, ds, dq, dk, dv };
                pairs::backward(ctx, form, &block, &mut b, &mut scratch.pairs);
            } else {
                pack_queries(&f.q[at..], shape.q_width(), n, dim, q);
                pack_queries(&dout[at..], shape.q_width(), n, dim, packed_dout);
                if bf16 {
                    (ctx.kernels.round_bf16)(q);
                    (ctx.kernels.round_bf16)(packed_dout);
                }
                let upstream = Upstream { dout: packed_dout, v_panels, k_rows, lse, delta };
                let mut gradients = Gradients { p, ds, dq, dk, dv };
                (ctx.kernels.attention.backward)(&Block { q, ..block }, &upstream, &mut gradients);
            }
            for (i, dq) in dq.chunks_exact(width).enumerate() {
                (ctx.kernels.axpy)(scale, &dq[..dim], &mut cell.dq.row(i0 + i)[h * dim..][..dim]);
            }
        }
    }
    for (j, (dk, dv)) in dk.chunks_exact(width).zip(dv.chunks_exact(width)).enumerate() {
        (ctx.kernels.axpy)(scale, &dk[..dim], cell.dk.row(j));
        (ctx.kernels.axpy)(1.0, &dv[..dim], cell.dv.row(j));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::tape::test_floats as floats;

    fn context(kernels: &'static crate::kernels::Kernels, precision: Precision) -> Ctx {
        Ctx { kernels, ..Ctx::new(precision).unwrap() }
    }

    /// out, lse, dq, dk, dv of sequences that end at `cu_seqlens`, of inputs that are bf16 already.
    fn run(ctx: &Ctx, shape: Heads, cu_seqlens: &[usize]) -> [Vec<f32>; 5] {
        let n = cu_seqlens[cu_seqlens.len() - 1];
        let halves = |width: usize, seed: u32| {
            let values = floats(n * width, seed).into_iter();
            values.map(|v| half::bf16::from_f32(2.0 * v).to_f32()).collect::<Vec<_>>()
        };
        let (q, k) = (halves(shape.q_width(), 1), halves(shape.kv_width(), 2));
        let (v, dout) = (halves(shape.kv_width(), 3), halves(shape.q_width(), 4));
        let (out, lse) = forward(ctx, shape, &q, &segments(cu_seqlens, shape.kv_width(), &k, &v));
        let f = Forward { q: &q, k: &k, v: &v, out: &out, lse: &lse };
        let (dq, dk, dv) = backward(ctx, shape, cu_seqlens, f, &dout);
        [out.to_vec(), lse.to_vec(), dq.to_vec(), dk.to_vec(), dv.to_vec()]
    }

    fn assert_near(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
        let scale = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * scale, "{what}[{i}]: {g} against {w}");
        }
    }

    #[test]
    fn pairs_of_bf16_give_what_f32_gives_on_rounded_inputs() {
        let mut seen = Vec::new();
        for table in crate::kernels::tables() {
            if table.pairs.is_none() {
                continue;
            }
            seen.push(table.isa);
            for (heads, kv_heads, head_dim, cu_seqlens) in [
                (4, 2, 16, vec![0, 7, 107, 108, 300]),
                (3, 3, 40, vec![0, 97, 290]),
                (5, 1, 64, vec![0, 33, 33, 225]),
                (2, 2, 130, vec![0, 50]),
            ] {
                let shape = Heads { heads, kv_heads, head_dim };
                let got = run(&context(table, Precision::Bf16), shape, &cu_seqlens);
                let want = run(&context(table, Precision::F32), shape, &cu_seqlens);
                let names = ["out", "lse", "dq", "dk", "dv"];
                for ((name, got), want) in names.iter().zip(&got).zip(&want) {
                    // p and ds are rounded to 8 bits: 2^-9 of each.
                    assert_near(&format!("{} {shape:?} {name}", table.isa), got, want, 6e-3);
                }
            }
        }
        eprintln!("pairs multiplied by: {seen:?}");
    }

    #[test]
    fn few_queries_against_a_cache_equal_the_last_rows_of_the_whole() {
        for table in crate::kernels::available() {
            for precision in [Precision::F32, Precision::Bf16] {
                for (heads, kv_heads, head_dim, len) in [(4, 2, 16, 700), (6, 2, 20, 259), (3, 3, 5, 9)] {
                    let (ctx, shape) = (context(table, precision), Heads { heads, kv_heads, head_dim });
                    let q = floats(len * shape.q_width(), 1);
                    let (k, v) = (floats(len * shape.kv_width(), 2), floats(len * shape.kv_width(), 3));
                    let whole = segments(&[0, len], shape.kv_width(), &k, &v);
                    let (out, lse) = forward(&ctx, shape, &q, &whole);
                    for q_len in [1, 2, FEW_QUERIES, FEW_QUERIES + 1] {
                        let at = (len - q_len) * shape.q_width();
                        let last = [Segment { q_start: 0, q_len, ..whole[0] }];
                        let (few_out, few_lse) = forward(&ctx, shape, &q[at..], &last);
                        let what = format!("{} {precision:?} {shape:?} {q_len} of {len}", table.isa);
                        // f32: sums in another order; bf16: p is rounded relative to another maximum.
                        let tolerance = if precision == Precision::F32 { 2e-6 } else { 6e-3 };
                        assert_near(&what, &few_out, &out[at..], tolerance);
                        assert_near(&what, &few_lse, &lse[(len - q_len) * heads..], tolerance);
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let shape = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
        for precision in [Precision::F32, Precision::Bf16] {
            let with = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let ctx = Ctx::new(precision).unwrap();
                let bits = |x: &Vec<f32>| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                pool.install(|| run(&ctx, shape, &[0, 3, 650, 900]).iter().map(bits).collect::<Vec<_>>())
            };
            let one = with(1);
            assert!(with(2) == one && with(5) == one, "{precision:?}");
        }
    }

    #[test]
    fn rounds_hold_every_pair_once_and_no_block_twice() {
        for blocks in 0..12 {
            let mut seen = std::collections::BTreeSet::new();
            for round in 0..blocks + 2 {
                let pairs = pairs(blocks, round);
                for side in [|p: &(usize, usize)| p.0, |p: &(usize, usize)| p.1] {
                    let distinct: std::collections::BTreeSet<_> = pairs.iter().map(side).collect();
                    assert_eq!(distinct.len(), pairs.len(), "{blocks} blocks, round {round}: {pairs:?}");
                }
                for pair in pairs {
                    assert!(pair.0 <= pair.1 && pair.1 < blocks && seen.insert(pair), "{blocks} blocks: {pair:?}");
                }
            }
            assert_eq!(seen.len(), blocks * (blocks + 1) / 2);
        }
    }
}
