//! The one GEMM driver: packs operands into panels, dequantizing as it goes, and multiplies tile by tile.
//!
//! `C[m, n] (+)= alpha · Σ_t A_t[m, k_t] · B_t[k_t, n]` after Goto & van de Geijn 2008: each A is packed once into panels
//! that the tiles stream; each task packs a `KC x columns` block of B into panels that stay in its cache and multiplies it
//! with all of A. The sums of a task stay in its cache, tile behind tile, until all terms are in; C is touched once. So a
//! low-rank update costs its FLOPs and no traffic.
//! The sum runs term after term and block after block, for every element alike: the result does not depend on the number
//! of threads or on how C is cut. Few rows against a frozen weight take the dot-product path instead,
//! unless operands are 16-bit blocks.

use super::pack::{Form, Piece, pack_b, pack_down, pack_panel, sized};
use super::weight::{Precision, Weight};
use super::{Buf, Ctx, TASKS_AT_ONCE, gemv};
use crate::kernels::gemm::{GemmTile, PanelA, TileC};
use crate::kernels::lines::Lines;
use crate::kernels::tiles::{TileMut, split_grid};
use rayon::prelude::*;
use std::cell::RefCell;

/// Columns of C that one task takes, about.
const NC: usize = 192;
/// And where tiles are so fast that reading A once more from the third-level cache costs more than sums in the second.
const NC_FAST: usize = 384;
/// Columns are cut at multiples of this, so that no task begins inside a block of NF4.
const COLUMN_UNIT: usize = 64;
/// Up to this many columns, B is packed once for all tasks and the tasks share the rows.
const THIN: usize = 768;
/// Rows of C that one task takes at most, about: its sums take 4 bytes · ROWS · NC of the second-level cache.
const ROWS: usize = 1280;
/// Rows of A that stream past a block of B before the next block's panel: they fit the second-level cache beside the sums.
const MC: usize = 256;
/// Up to this many rows, `X · Wᵀ` is a row of dot products straight from the weight's storage.
pub(crate) const FEW_ROWS: usize = 4;

/// A GEMM operand.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// `element(i, j) = data[i · row_stride + j · col_stride]`; one of the strides is 1.
    Dense {
        /// The elements.
        data: &'a [f32],
        /// Distance between rows.
        row_stride: usize,
        /// Distance between columns.
        col_stride: usize,
    },
    /// A weight `W: [out, in]` from a row on: the operand is `[out - row, in]`.
    Weight(&'a Weight, usize),
    /// A weight `W: [out, in]` from a row on, transposed: the operand is `[in, out - row]`.
    WeightT(&'a Weight, usize),
}

impl<'a> Operand<'a> {
    /// A row-major matrix with `width` columns.
    pub fn rows(data: &'a [f32], width: usize) -> Self {
        Self::Dense { data, row_stride: width, col_stride: 1 }
    }

    /// The transpose of a row-major matrix with `width` columns.
    pub fn transposed(data: &'a [f32], width: usize) -> Self {
        Self::Dense { data, row_stride: 1, col_stride: width }
    }

    /// The transpose.
    pub(super) fn swap(self) -> Self {
        match self {
            Self::Dense { data, row_stride, col_stride } => {
                Self::Dense { data, row_stride: col_stride, col_stride: row_stride }
            }
            Self::Weight(weight, first) => Self::WeightT(weight, first),
            Self::WeightT(weight, first) => Self::Weight(weight, first),
        }
    }
}

/// What happens to the old content of C.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// It is replaced.
    Store,
    /// It is added to.
    Add,
}

/// `C (+)= alpha · A · B`;  A: `[m, k]`, B: `[k, n]`, C: `[m, n]` row-major.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Left operand.
    pub a: Operand<'a>,
    /// Right operand.
    pub b: Operand<'a>,
    /// Factor of the product.
    pub alpha: f32,
    /// Replace or add.
    pub into: Into,
}

/// A left operand: as it is, or packed before.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// Packed for this product alone; dense.
    Plain(Operand<'a>),
    /// Packed once for several products.
    Packed(&'a PackedA),
}

/// Changes a piece of a row of a product: `(row, first column, values)`.
pub type Mask<'a> = &'a (dyn Fn(usize, usize, &mut [f32]) + Sync);

/// One product of a sum.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    /// Columns of A, rows of B.
    pub k: usize,
    /// Left operand, `[m, k]`.
    pub a: Left<'a>,
    /// Right operand, `[k, n]`.
    pub b: Operand<'a>,
    /// What each piece of the product goes through before it is added; linear, element by element.
    pub mask: Option<Mask<'a>>,
}

impl<'a> Term<'a> {
    /// A product without a mask.
    pub fn new(k: usize, a: Left<'a>, b: Operand<'a>) -> Self {
        Self { k, a, b, mask: None }
    }
}

/// The shape of a sum of products and what becomes of it.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Factor of the sum.
    pub alpha: f32,
    /// Replace or add.
    pub into: Into,
}

/// A left operand `[m, k]` in panels: `[k block][panel][..]`, the last panel padded with zeros.
pub struct PackedA {
    data: Buf,
    m: usize,
    k: usize,
}

thread_local! {
    /// A thread's packed block of B and what is unpacked on the way.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Scratch of one task.
#[derive(Default)]
struct Scratch {
    /// A packed block of B.
    panel: Lines,
    /// Rows of words on their way into a panel.
    rows: Lines,
    /// The sums of a task: `[panel of B][rows][nr]`.
    sums: Lines,
    /// Those of a second product.
    ups: Lines,
    /// One tile of a product.
    tile: Lines,
}

/// Floats of the right operand `[k, n]` that are packed at a time, beside what each thread packs for itself.
pub fn packed_whole(n: usize, k: usize) -> usize {
    if n <= THIN { n * k } else { 0 }
}

/// Runs a GEMM on all threads.
///
/// # Panics
/// If `c` is not `[m, n]`.
pub fn gemm(ctx: &Ctx, g: &Gemm<'_>, c: &mut [f32]) {
    let Gemm { m, n, k, a, b, alpha, into } = *g;
    gemm_sum(ctx, Shape { m, n, alpha, into }, &[Term::new(k, Left::Plain(a), b)], c);
}

/// Runs a sum of products on all threads, with one pass over C.
///
/// # Panics
/// If `c` is not `[m, n]`, or a packed operand is of another shape.
pub fn gemm_sum(ctx: &Ctx, shape: Shape, terms: &[Term<'_>], c: &mut [f32]) {
    let Shape { m, n, .. } = shape;
    assert_eq!(c.len(), m * n, "gemm: C is not [m, n]");
    let terms: Vec<_> = terms.iter().filter(|term| term.k > 0).copied().collect();
    if terms.is_empty() || c.is_empty() {
        if shape.into == Into::Store {
            c.fill(0.0);
        }
        return;
    }
    // Blocks of 16 bits stay what they are, so that a row is the same among many.
    let few = m <= FEW_ROWS && ctx.precision != Precision::Int16;
    if few && terms.iter().all(|term| matches!(term.a, Left::Plain(_)) && term.mask.is_none()) {
        for (t, term) in terms.iter().enumerate() {
            let into = if t == 0 { shape.into } else { Into::Add };
            few_rows(ctx, Shape { into, ..shape }, term, c);
        }
        return;
    }
    let form = Form::of(ctx);
    let packed = pack_plain(ctx, m, &terms);
    let sides = Side::all(ctx, &form, n, &terms, &packed);
    let (rows, cols) = grid(&form, m, n, 1);
    // One task at a time: threads are not equally fast.
    split_grid(c, n, &rows, &cols).into_par_iter().with_max_len(1).for_each(|mut tile| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut sums = std::mem::take(&mut scratch.sums);
            accumulate(ctx, &form, m, &sides, &tile, &mut sums, scratch);
            let add = shape.into == Into::Add;
            let c = TileC { c: &mut tile, i: 0, j: 0, alpha: shape.alpha, add, ahead: &[] };
            (ctx.kernels.store_sums)(sums.as_slice(), form.tile.nr, c);
            scratch.sums = sums;
        });
    });
}

/// `c = silu(gate) · up`, each a sum of products `[m, n]` that is nowhere in memory as a whole.
///
/// # Panics
/// If `c` is not `[m, n]`, or a packed operand is of another shape.
pub fn gemm_gated(ctx: &Ctx, [m, n]: [usize; 2], [gate, up]: [&[Term<'_>]; 2], c: &mut [f32]) {
    assert_eq!(c.len(), m * n, "gemm: C is not [m, n]");
    let form = Form::of(ctx);
    let packed = [gate, up].map(|terms| pack_plain(ctx, m, terms));
    let [gate, up] = [(gate, &packed[0]), (up, &packed[1])].map(|(terms, own)| Side::all(ctx, &form, n, terms, own));
    let (rows, cols) = grid(&form, m, n, 2);
    split_grid(c, n, &rows, &cols).into_par_iter().with_max_len(1).for_each(|mut tile| {
        SCRATCH.with_borrow_mut(|scratch| {
            let (mut gates, mut ups) = (std::mem::take(&mut scratch.sums), std::mem::take(&mut scratch.ups));
            accumulate(ctx, &form, m, &gate, &tile, &mut gates, scratch);
            accumulate(ctx, &form, m, &up, &tile, &mut ups, scratch);
            let strip = form.tile.mr * form.tile.nr;
            let piece = sized(&mut scratch.tile, strip);
            for (gate, up) in gates.as_mut_slice().chunks_exact_mut(strip).zip(ups.as_slice().chunks_exact(strip)) {
                (ctx.kernels.swiglu_row)(gate, up, piece);
                gate.copy_from_slice(piece);
            }
            let c = TileC { c: &mut tile, i: 0, j: 0, alpha: 1.0, add: false, ahead: &[] };
            (ctx.kernels.store_sums)(gates.as_slice(), form.tile.nr, c);
            (scratch.sums, scratch.ups) = (gates, ups);
        });
    });
}

/// The left operands that were not packed before, packed.
fn pack_plain(ctx: &Ctx, m: usize, terms: &[Term<'_>]) -> Vec<Option<PackedA>> {
    let pack = |term: &Term<'_>| match term.a {
        Left::Plain(operand) => Some(PackedA::new(ctx, operand, m, term.k)),
        Left::Packed(packed) => {
            assert!(packed.m == m && packed.k == term.k, "gemm: packed for another shape");
            None
        }
    };
    terms.iter().map(pack).collect()
}

/// The bounds of the tasks of C, in rows and columns, where a task keeps `n_sums` sums of its columns.
fn grid(form: &Form, m: usize, n: usize, n_sums: usize) -> (Vec<usize>, Vec<usize>) {
    let (mr, threads) = (form.tile.mr, rayon::current_num_threads());
    if n <= THIN {
        return (cut(m, mr, 8, threads), vec![0, n]);
    }
    let unit = COLUMN_UNIT.next_multiple_of(form.tile.nr);
    let columns = if form.tile.panel_a == PanelA::Rows { NC_FAST } else { NC };
    (cut(m, mr, ROWS / mr, 1), cut(n, unit, columns / n_sums / unit, threads))
}

/// Bounds of about `len / (unit · units)` pieces, a multiple of `threads`, cut at multiples of `unit`.
fn cut(len: usize, unit: usize, units: usize, threads: usize) -> Vec<usize> {
    let total = len.div_ceil(unit);
    let pieces = total.div_ceil(units.max(1)).next_multiple_of(threads).min(total);
    (0..=pieces).map(|piece| (piece * total / pieces * unit).min(len)).collect()
}

/// One term with its packed operands.
struct Side<'a> {
    term: Term<'a>,
    a: &'a [f32],
    /// All of B as `[k block][panel of nr columns][depth][nr]`, for products whose tiles all need it.
    shared_b: Option<Buf>,
}

impl<'a> Side<'a> {
    /// own: what [`pack_plain`] has packed.
    fn all(ctx: &Ctx, form: &Form, n: usize, terms: &[Term<'a>], own: &'a [Option<PackedA>]) -> Vec<Self> {
        let side = |(term, own): (&Term<'a>, &'a Option<PackedA>)| {
            let a = match (own, term.a) {
                (Some(own), _) => &own.data[..],
                (None, Left::Packed(packed)) => &packed.data[..],
                (None, Left::Plain(_)) => unreachable!("plain operands were packed before"),
            };
            Side { term: *term, a, shared_b: (n <= THIN).then(|| pack_all_b(ctx, form, term, n)) }
        };
        terms.iter().zip(own).map(side).collect()
    }
}

fn pack_all_b(ctx: &Ctx, form: &Form, term: &Term<'_>, n: usize) -> Buf {
    let nr = form.tile.nr;
    let panels = n.div_ceil(nr);
    let mut packed = ctx.buf(panels * nr * form.blocks(term.k).map(|(_, ks)| form.depth(ks.len())).sum::<usize>());
    let block = form.block_depth() * panels * nr;
    packed.par_chunks_mut(block).zip(form.blocks(term.k).collect::<Vec<_>>()).for_each(|(out, (_, ks))| {
        let depth = form.depth(ks.len());
        out.par_chunks_mut(depth * nr).enumerate().for_each(|(panel, out)| {
            SCRATCH.with_borrow_mut(|scratch| {
                pack_b(ctx, form, term.b, ks.clone(), panel * nr..n.min((panel + 1) * nr), out, &mut scratch.rows);
            });
        });
    });
    packed
}

/// All terms for one tile of C, of `m` rows: `sums` becomes `[panel of columns][rows, up to a whole panel][nr]`.
fn accumulate(
    ctx: &Ctx,
    form: &Form,
    m: usize,
    sides: &[Side<'_>],
    tile: &TileMut<'_>,
    sums: &mut Lines,
    scratch: &mut Scratch,
) {
    let GemmTile { mr, nr, run, .. } = form.tile;
    let (rows, cols, row0, col0) = (tile.rows(), tile.cols(), tile.row0, tile.col0);
    let (panels_of_a, panels_of_b) = (m.div_ceil(mr), cols.div_ceil(nr));
    let height = rows.next_multiple_of(mr);
    let Scratch { panel, rows: words, tile: piece, .. } = scratch;
    let sums = sized(sums, panels_of_b * height * nr);
    let blocks: Vec<_> =
        sides.iter().flat_map(|side| form.blocks(side.term.k).map(move |(block, ks)| (side, block, ks))).collect();
    // Rows of A in a block of k, from a row of this tile on.
    let band_rows = MC.next_multiple_of(mr);
    let strip = |at: usize, row: usize| {
        let (side, block, ks) = &blocks[at];
        let (depth, end) = (form.depth(ks.len()), height.min(row + band_rows));
        &side.a[block * form.block_depth() * panels_of_a * mr..][(row0 + row) * depth..(row0 + end) * depth]
    };
    for (at, (Side { term, shared_b, .. }, block, ks)) in blocks.iter().enumerate() {
        let depth = form.depth(ks.len());
        let b_block = if let Some(shared) = shared_b {
            &shared[block * form.block_depth() * panels_of_b * nr..][..panels_of_b * nr * depth]
        } else {
            let out = sized(panel, panels_of_b * nr * depth);
            pack_b(ctx, form, term.b, ks.clone(), col0..col0 + cols, out, words);
            &*out
        };
        for band in (0..height).step_by(band_rows) {
            let a = strip(at, band);
            // After the last block comes the next task, with the same rows.
            let next =
                if band + band_rows < height { strip(at, band + band_rows) } else { strip((at + 1) % blocks.len(), 0) };
            let share = next.len() / panels_of_b;
            for (j, b_panel) in b_block.chunks_exact(depth * nr).enumerate() {
                let sums = &mut sums[j * height * nr..][..height * nr];
                let Some(mask) = term.mask else {
                    let c = &mut TileMut::whole(sums, nr, height, nr);
                    let ahead = &next[j * share..][..share];
                    run(a, b_panel, TileC { c, i: band, j: 0, alpha: 1.0, add: at > 0, ahead });
                    continue;
                };
                let panels = a.chunks_exact(depth * mr).zip(sums[band * nr..].chunks_exact_mut(mr * nr));
                for (i, (a_panel, sums)) in (band..).step_by(mr).zip(panels) {
                    let (tall, width) = (mr.min(rows - i), nr.min(cols - j * nr));
                    let piece = sized(piece, mr * nr);
                    let c = &mut TileMut::whole(piece, nr, mr, nr);
                    run(a_panel, b_panel, TileC { c, i: 0, j: 0, alpha: 1.0, add: false, ahead: &[] });
                    for (r, values) in piece.chunks_exact_mut(nr).take(tall).enumerate() {
                        mask(row0 + i + r, col0 + j * nr, &mut values[..width]);
                    }
                    if at > 0 { (ctx.kernels.axpy)(1.0, piece, sums) } else { sums.copy_from_slice(piece) }
                }
            }
        }
    }
}

impl PackedA {
    /// Packs a dense operand `[m, k]` for the precision in use.
    ///
    /// # Panics
    /// If the operand is a weight.
    pub fn new(ctx: &Ctx, operand: Operand<'_>, m: usize, k: usize) -> Self {
        let form = Form::of(ctx);
        let mr = form.tile.mr;
        let panels = m.div_ceil(mr);
        let mut data = ctx.buf(panels * mr * form.blocks(k).map(|(_, ks)| form.depth(ks.len())).sum::<usize>());
        // Where k runs down the rows of memory, a task takes pieces of rows that are worth a visit.
        let together = match operand {
            Operand::Dense { row_stride: 1, data, col_stride } if col_stride != 1 => Some((data, col_stride)),
            _ => None,
        };
        let group = if together.is_some() { (NC / mr).max(1) } else { 1 };
        let block = form.block_depth() * panels * mr;
        data.par_chunks_mut(block).zip(form.blocks(k).collect::<Vec<_>>()).for_each(|(out, (_, ks))| {
            let depth = form.depth(ks.len());
            out.par_chunks_mut(depth * mr * group).with_max_len(TASKS_AT_ONCE).enumerate().for_each(|(task, out)| {
                let rows = task * group * mr..m.min((task + 1) * group * mr);
                SCRATCH.with_borrow_mut(|scratch| {
                    let (layout, words) = (form.tile.panel_a, &mut scratch.rows);
                    match together {
                        Some((data, stride)) => {
                            let piece = Piece { data, stride, columns: rows, ks: ks.clone() };
                            pack_down(ctx, &form, &piece, layout, out, mr, words);
                        }
                        None => pack_panel(ctx, &form, operand, rows, ks.clone(), layout, out, words),
                    }
                });
            });
        });
        Self { data, m, k }
    }
}

/// `C (+)= alpha · A · B` for few rows of A: of a weight every row is read once and dotted with each row of A.
fn few_rows(ctx: &Ctx, shape: Shape, term: &Term<'_>, c: &mut [f32]) {
    let (k, bf16) = (term.k, ctx.precision == Precision::Bf16);
    let Left::Plain(Operand::Dense { data, row_stride, col_stride }) = term.a else {
        panic!("gemm: the left operand is dense")
    };
    if let (Operand::WeightT(weight, first), 1) = (term.b, col_stride) {
        if shape.into == Into::Store {
            c.fill(0.0);
        }
        let x = gemv::Input::new(ctx, data, shape.m, k, row_stride);
        (ctx.kernels.axpy)(shape.alpha, &gemv::weight(ctx, weight, first, shape.n, &x), c);
        return;
    }
    let mut rows = ctx.buf(shape.m * k);
    for (i, row) in rows.chunks_exact_mut(k).enumerate() {
        for (p, value) in row.iter_mut().enumerate() {
            *value = data[i * row_stride + p * col_stride];
        }
    }
    if bf16 {
        (ctx.kernels.round_bf16)(&mut rows);
    }
    let rows = &rows[..];
    if shape.into == Into::Store {
        c.fill(0.0);
    }
    let step = (65_536 / k).clamp(1, 256);
    let bounds = crate::kernels::tiles::bounds(shape.n, step);
    split_grid(c, shape.n, &[0, shape.m], &bounds).into_par_iter().for_each(|mut tile| {
        SCRATCH.with_borrow_mut(|scratch| {
            let width = tile.cols();
            match term.b {
                Operand::WeightT(..) | Operand::Dense { row_stride: 1, .. } => {
                    let w = sized(&mut scratch.rows, k);
                    for j in 0..width {
                        match term.b {
                            Operand::WeightT(weight, first) => {
                                weight.read(ctx.kernels, (first + tile.col0 + j) * k, w);
                            }
                            Operand::Dense { data, col_stride, .. } => {
                                w.copy_from_slice(&data[(tile.col0 + j) * col_stride..][..k]);
                            }
                            Operand::Weight(..) => unreachable!("the outer match"),
                        }
                        if bf16 {
                            (ctx.kernels.round_bf16)(w);
                        }
                        for (i, x) in rows.chunks_exact(k).enumerate() {
                            tile.row(i)[j] += shape.alpha * (ctx.kernels.dot)(x, w);
                        }
                    }
                }
                Operand::Weight(..) | Operand::Dense { .. } => {
                    let w = sized(&mut scratch.rows, width);
                    for p in 0..k {
                        match term.b {
                            Operand::Weight(weight, first) => {
                                weight.read(ctx.kernels, (first + p) * weight.cols() + tile.col0, w);
                            }
                            Operand::Dense { data, row_stride, .. } => {
                                w.copy_from_slice(&data[p * row_stride + tile.col0..][..width]);
                            }
                            Operand::WeightT(..) => unreachable!("the outer match"),
                        }
                        if bf16 {
                            (ctx.kernels.round_bf16)(w);
                        }
                        for (i, x) in rows.chunks_exact(k).enumerate() {
                            (ctx.kernels.axpy)(shape.alpha * x[p], w, tile.row(i));
                        }
                    }
                }
            }
        });
    });
}

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;
