//! Attention's products on pairs of bf16: the tile of [`crate::kernels::gemm`] between the softmax kernels of
//! [`crate::kernels::attention`].
//!
//! Left operands (q, dout, p, ds and the transposes of the last two) are packed per tile of queries, right ones (keys and
//! values, and per tile q and dout) as panels of pairs along the sum. What a tile of products sums is cut at the diagonal;
//! the tiles above it are left out.

use super::Ctx;
use super::matmul::Operand;
use super::pack::{Form, pack_b, pack_panel, sized};
use crate::kernels::attention::{Block, KEYS, Softmax};
use crate::kernels::gemm::{PanelA, TileC};
use crate::kernels::lines::Lines;
use crate::kernels::tiles::TileMut;
use std::ops::Range;

/// Queries of a tile: whole tiles of every instruction set's rows.
pub(super) const QUERIES: usize = 96;
/// Keys and values are padded to a multiple of this: whole panels, and whole words of every left layout.
pub(super) const UNIT: usize = 32;

/// Packs rows (keys, values) of one head as the right operand of `x · rowsᵀ`: `[panel of nr rows][depth of dim][nr]`.
pub(super) fn pack_transposed(ctx: &Ctx, form: &Form, rows: Rows<'_>, out: &mut [f32], words: &mut Lines) {
    let b = Operand::Dense { data: rows.data, row_stride: 1, col_stride: rows.stride };
    let len = rows.count.next_multiple_of(form.tile.nr) * form.depth(rows.dim);
    pack_b(ctx, form, b, 0..rows.dim, 0..rows.count, &mut out[..len], words);
}

/// Packs rows of one head as the right operand of `p · rows`: `[panel of nr columns][depth of count][nr]`.
pub(super) fn pack_rows(ctx: &Ctx, form: &Form, rows: Rows<'_>, out: &mut [f32], words: &mut Lines) {
    let b = Operand::Dense { data: rows.data, row_stride: rows.stride, col_stride: 1 };
    let len = rows.dim.next_multiple_of(form.tile.nr) * form.depth(rows.count);
    pack_b(ctx, form, b, 0..rows.count, 0..rows.dim, &mut out[..len], words);
}

/// Rows of one head, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) count: usize,
    pub(super) dim: usize,
}

/// Rows of one head as a left operand: panels of `mr` rows.
fn pack_left(ctx: &Ctx, form: &Form, rows: Rows<'_>, out: &mut Lines, words: &mut Lines) {
    let (mr, depth) = (form.tile.mr, form.depth(rows.dim));
    let a = Operand::rows(rows.data, rows.stride);
    let out = sized(out, rows.count.next_multiple_of(mr) * depth);
    for (panel, out) in out.chunks_exact_mut(mr * depth).enumerate() {
        let here = panel * mr..rows.count.min((panel + 1) * mr);
        pack_panel(ctx, form, a, here, 0..rows.dim, form.tile.panel_a, out, words);
    }
}

/// Packed operands and scratch of one task.
#[derive(Default)]
pub(super) struct Scratch {
    /// The left panels of the queries of each head.
    pub(super) q: Vec<Lines>,
    dout: Lines,
    q_right: Lines,
    dout_right: Lines,
    panel: Lines,
    pub(super) words: Lines,
}

/// Packs the queries of head `slot` of a task.
pub(super) fn pack_queries(ctx: &Ctx, form: &Form, rows: Rows<'_>, slot: usize, scratch: &mut Scratch) {
    if scratch.q.len() <= slot {
        scratch.q.resize_with(slot + 1, Lines::default);
    }
    pack_left(ctx, form, rows, &mut scratch.q[slot], &mut scratch.words);
}

/// Adds a block of keys to the running softmax of a tile of queries; `t.k_panels`: [`pack_transposed`], v: [`pack_rows`].
pub(super) fn forward(
    ctx: &Ctx,
    form: &Form,
    t: &Block<'_>,
    slot: usize,
    v: &[f32],
    st: &mut Softmax<'_>,
    scratch: &mut Scratch,
) {
    let Scratch { q, panel, words, .. } = scratch;
    scores(form, t, q[slot].as_slice(), t.k_panels, st.scores);
    (ctx.kernels.attention.softmax)(t, st);
    row_product(ctx, form, t, st.scores, v, st.acc, (panel, words));
}

/// What the backward of a block reads and adds to.
pub(super) struct Backward<'a> {
    pub(super) q: Rows<'a>,
    pub(super) dout: Rows<'a>,
    /// [`pack_transposed`].
    pub(super) v_transposed: &'a [f32],
    /// [`pack_rows`].
    pub(super) k_rows: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
    /// Scratch, `[QUERIES, KEYS]`.
    pub(super) p: &'a mut [f32],
    /// Scratch, `[QUERIES, KEYS]`.
    pub(super) ds: &'a mut [f32],
    pub(super) dq: &'a mut [f32],
    pub(super) dk: &'a mut [f32],
    pub(super) dv: &'a mut [f32],
}

/// Adds one block's part to the gradients of its queries, keys and values; dq and dk lack the factor `scale`.
pub(super) fn backward(ctx: &Ctx, form: &Form, t: &Block<'_>, b: &mut Backward<'_>, scratch: &mut Scratch) {
    pack_queries(ctx, form, b.q, 0, scratch);
    let Scratch { q, dout, q_right, dout_right, panel, words } = scratch;
    pack_left(ctx, form, b.dout, dout, words);
    let right = b.q.dim.next_multiple_of(form.tile.nr) * form.depth(t.n);
    pack_rows(ctx, form, b.q, sized(q_right, right), words);
    pack_rows(ctx, form, b.dout, sized(dout_right, right), words);
    scores(form, t, q[0].as_slice(), t.k_panels, b.p);
    scores(form, t, dout.as_slice(), b.v_transposed, b.ds);
    (ctx.kernels.attention.slopes)(t, b.lse, b.delta, b.p, b.ds);
    column_product(ctx, form, t, b.p, dout_right.as_slice(), b.dv, (panel, words));
    column_product(ctx, form, t, b.ds, q_right.as_slice(), b.dk, (panel, words));
    row_product(ctx, form, t, b.ds, b.k_rows, b.dq, (panel, words));
}

/// `out[i, j] = a_i · b_j` where query i sees key j; elsewhere unspecified.
fn scores(form: &Form, t: &Block<'_>, a: &[f32], b: &[f32], out: &mut [f32]) {
    let (mr, nr, depth) = (form.tile.mr, form.tile.nr, form.depth(t.dim));
    let mut c = TileMut::whole(out, KEYS, t.n, t.keys);
    for (j, b) in (0..t.keys).step_by(nr).zip(b.chunks_exact(nr * depth)) {
        let i = t.first_query(j) / mr * mr;
        if i < t.n {
            (form.tile.run)(&a[i * depth..], b, TileC { c: &mut c, i, j, alpha: 1.0, add: false, ahead: &[] });
        }
    }
}

/// A product whose right operand, rows, stands in panels along the sum.
struct Product<'a> {
    ctx: &'a Ctx,
    form: &'a Form,
    /// The left operand.
    x: Operand<'a>,
    /// `[panel of nr columns][whole][nr]`.
    rows: &'a [f32],
    /// Words of the whole sum.
    whole: usize,
    /// Columns of the rows.
    dim: usize,
}

impl Product<'_> {
    /// `c[i, :] += Σ_k x[i, k] · rows[k, :]` for one panel of rows i, over the k of `sum`, which begins at a whole word.
    fn add(&self, i: Range<usize>, sum: Range<usize>, c: &mut TileMut<'_>, (panel, words): (&mut Lines, &mut Lines)) {
        let Self { ctx, form, x, rows, whole, dim } = *self;
        let (tile, depth) = (form.tile, form.depth(sum.len()));
        let (first, from) = (i.start, sum.start / form.k_per_word() * tile.nr);
        let a = sized(panel, tile.mr * depth);
        pack_panel(ctx, form, x, i, sum, tile.panel_a, a, words);
        for (j, rows) in (0..dim).step_by(tile.nr).zip(rows.chunks_exact(whole * tile.nr)) {
            let strip = TileC { c: &mut *c, i: first, j, alpha: 1.0, add: true, ahead: &[] };
            (tile.run)(a, &rows[from..][..depth * tile.nr], strip);
        }
    }
}

/// `c[i, :] += Σ_j x[i, j] · rows[j, :]`;  x: `[n, KEYS]`, c: `[n, width]`.
fn row_product(
    ctx: &Ctx,
    form: &Form,
    t: &Block<'_>,
    x: &[f32],
    rows: &[f32],
    c: &mut [f32],
    (panel, words): (&mut Lines, &mut Lines),
) {
    let product = Product { ctx, form, x: Operand::rows(x, KEYS), rows, whole: form.depth(t.keys), dim: t.dim };
    let mut c = TileMut::whole(c, t.width(), t.n, t.dim);
    for i in (0..t.n).step_by(form.tile.mr) {
        let end = t.n.min(i + form.tile.mr);
        let seen = t.seen(end - 1);
        if seen > 0 {
            product.add(i..end, 0..seen, &mut c, (panel, words));
        }
    }
}

/// `c[j, :] += Σ_i x[i, j] · rows[i, :]`;  x: `[n, KEYS]`, rows: those of the queries, c: `[keys, width]`.
fn column_product(
    ctx: &Ctx,
    form: &Form,
    t: &Block<'_>,
    x: &[f32],
    rows: &[f32],
    c: &mut [f32],
    (panel, words): (&mut Lines, &mut Lines),
) {
    // The sum begins at the first query that sees a key, at whole words and, where the layout has them, whole lines.
    let unit = if form.tile.panel_a == PanelA::Rows { UNIT } else { form.k_per_word() };
    let product = Product { ctx, form, x: Operand::transposed(x, KEYS), rows, whole: form.depth(t.n), dim: t.dim };
    let keys = t.seen(t.n - 1);
    let mut c = TileMut::whole(c, t.width(), keys, t.dim);
    for j in (0..keys).step_by(form.tile.mr) {
        let first = t.first_query(j) / unit * unit;
        product.add(j..keys.min(j + form.tile.mr), first..t.n, &mut c, (panel, words));
    }
}
