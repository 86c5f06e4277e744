//! Every kernel on slices that lie flush against pages nobody may touch: a read or write out of bounds kills the test.

use super::attention::{
    Block, FEW_KEYS, Few, Gradients, KEYS, PAD, QUERIES, Softmax, Upstream, pack_panels, pack_queries, pack_rows,
    queries_len,
};
use super::elementwise::{AdamStep, Mask, Masked};
use super::gemm::{PanelA, Rows, TileC};
use super::gemv::{MAX_X, Nf4Rows, Round};
use super::tiles::TileMut;
use super::{Kernels, available};
use std::ops::{Deref, DerefMut};

/// Where a slice lies between its two guard pages.
#[derive(Clone, Copy, Debug)]
enum Flush {
    /// The page before it may not be touched.
    Start,
    /// The page after it may not be touched.
    End,
}

/// A slice with a forbidden page on both sides, flush against one of them.
struct Guarded<T> {
    map: *mut libc::c_void,
    bytes: usize,
    data: *mut T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    fn new(values: &[T], flush: Flush) -> Self {
        // SAFETY: sysconf has no requirements.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("a page has a size");
        let inner = size_of_val(values).next_multiple_of(page);
        let bytes = inner + 2 * page;
        // SAFETY: an anonymous mapping at an address of the kernel's choice.
        let map = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(map, libc::MAP_FAILED, "mmap of {bytes} bytes");
        let offset = match flush {
            Flush::Start => page,
            Flush::End => page + inner - size_of_val(values),
        };
        // SAFETY: the pages between the first and the last lie in the mapping.
        let opened =
            inner == 0 || unsafe { libc::mprotect(map.byte_add(page), inner, libc::PROT_READ | libc::PROT_WRITE) } == 0;
        assert!(opened, "mprotect of {inner} bytes");
        // SAFETY: `offset` lies in the mapping; it is aligned, as pages and sizes are multiples of the alignment.
        let data = unsafe { map.byte_add(offset) }.cast::<T>();
        // SAFETY: `data` has room for the values between the guard pages, and the mapping is new.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), data, values.len()) };
        Self { map, bytes, data, len: values.len() }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised values stand at `data` as long as the mapping.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and this is the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and nothing borrows from it any more.
        unsafe { libc::munmap(self.map, self.bytes) };
    }
}

/// Runs a check on every table, both sides and every length around the lane widths.
fn each(check: impl Fn(&Kernels, usize, &dyn Fn(usize) -> Guarded<f32>, Flush)) {
    for table in available() {
        for n in 1..=70 {
            for flush in [Flush::Start, Flush::End] {
                let floats = |len: usize| {
                    let values: Vec<f32> = (0..len).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
                    Guarded::new(&values, flush)
                };
                check(table, n, &floats, flush);
            }
        }
    }
}

#[test]
fn rows_stay_in_bounds() {
    each(|table, n, floats, flush| {
        let (x, w, dy) = (floats(n), floats(n), floats(n));
        let (mut y, mut z) = (floats(n), floats(n));
        (table.dot)(&x, &w);
        (table.axpy)(0.5, &x, &mut y);
        (table.rms_norm_row)(&x, &w, 1e-5, &mut y);
        (table.rms_norm_row_backward)(&x, &w, 0.7, &dy, &mut y);
        (table.rms_norm_gain)(&x, 0.7, &dy, &mut y);
        (table.swiglu_row)(&x, &w, &mut y);
        (table.swiglu_row_backward)(&x, &w, &dy, &mut y, &mut z);
        (table.max_row)(&x);
        (table.exp_row)(&mut y, 1.0, 2.0);
        (table.round_bf16)(&mut y);
        (table.rope_row)(&mut floats(6 * n), &x, &w, -1.0);
        let packed = Guarded::new(&vec![0x5A_u8; n.div_ceil(2)], flush);
        let scales = floats(n.div_ceil(32));
        (table.nf4_blocks)(&packed, &scales, 32, &[0.25; 16], n % 2 == 0, &mut y);
        let halves = Guarded::new(&vec![0x3F80_u16; n], flush);
        (table.widen)(&halves, &mut y);
        if let Some(pairs) = &table.pairs {
            (pairs.pack_row)(&x, &mut floats(n.div_ceil(2)));
            (pairs.join_rows)(&x, &w, &mut y);
            (pairs.join_halves)(&halves, &halves, &mut y);
            (pairs.nf4)(&packed, &scales, 32, &[0.25; 16], &mut Guarded::new(&vec![0; n], flush));
        }
        let mask = Mask { key: [1, 2], counter: [3, 4, 5], first: 0, threshold: 1 << 30, scale: 2.0 };
        for how in [Masked::InPlace, Masked::Copy(&x), Masked::Add(&x)] {
            (table.dropout_row)(&mask, how, &mut y);
        }
        let step = AdamStep {
            beta1: 0.9,
            one_minus_beta1: 0.1,
            beta2: 0.99,
            one_minus_beta2: 0.01,
            eps: 1e-8,
            correction2_sqrt: 0.5,
            step_size: -1e-3,
            keep: 0.99,
            grad_scale: 0.5,
        };
        (table.adamw_row)(&step, &mut floats(n), &x, &mut y, &mut z);
    });
}

#[test]
fn tiles_stay_in_bounds() {
    each(|table, k, floats, _| {
        for tile in [Some(&table.tile), table.pairs.as_ref().map(|pairs| &pairs.tile)].into_iter().flatten() {
            // Rows of A panels are whole tile registers.
            let depth = if tile.panel_a == PanelA::Rows { k.next_multiple_of(16) } else { k };
            let (rows, cols) = (k.min(tile.mr), k.min(tile.nr));
            for add in [false, true] {
                let mut c = floats(rows * cols);
                let c = &mut TileMut::whole(&mut c, cols, rows, cols);
                (tile.run)(
                    &floats(depth * tile.mr),
                    &floats(depth * tile.nr),
                    TileC { c, i: 0, j: 0, alpha: 1.0, add },
                );
            }
        }
        let (count, width) = (k.min(20), 23);
        let rows = floats(count * k);
        let rows = Rows { data: &rows, stride: k, count, depth: k };
        (table.transpose)(rows, &mut floats(k * width), width, width - count);
        (table.transpose)(rows, &mut floats(k * count), count, 0);
        for width in [k, k + 3] {
            (table.copy_rows)(rows, &mut floats(count * width), width);
        }
    });
}

#[test]
fn attention_stays_in_bounds() {
    each(|table, keys, floats, flush| {
        // Widths below, at and between the lane widths; as many queries as keys, up to a tile.
        let (dim, n): (usize, usize) = ([5, 16, 24, 64][keys % 4], keys.min(QUERIES));
        let (width, panel) = (dim.next_multiple_of(PAD), table.attention.panel);
        let src = floats(keys.max(n) * dim);
        let mut panels = floats(keys.next_multiple_of(panel) * dim);
        pack_panels(&src, dim, keys, dim, panel, &mut panels);
        let mut rows = floats(keys * width);
        pack_rows(&src, dim, keys, dim, width, &mut rows);
        let mut q = floats(queries_len(dim));
        pack_queries(&src, dim, n, dim, &mut q);
        let ahead = keys as isize - n as isize;
        let block = Block { q: &q, k_panels: &panels, n, keys, dim, ahead, scale: 0.2, bf16: keys % 2 == 0 };
        let (mut acc, mut max, mut sum) = (floats(n * width), floats(n), floats(n));
        let mut scores = floats(QUERIES * KEYS);
        let mut state = Softmax { scores: &mut scores, acc: &mut acc, max: &mut max, sum: &mut sum };
        (table.attention.forward)(&block, &rows, &mut state);
        let (lse, delta) = (floats(n), floats(n));
        let upstream = Upstream { dout: &q, v_panels: &panels, k_rows: &rows, lse: &lse, delta: &delta };
        let (mut p, mut ds, mut dq) = (floats(QUERIES * KEYS), floats(QUERIES * KEYS), floats(n * width));
        let (mut dk, mut dv) = (floats(keys * width), floats(keys * width));
        let mut gradients = Gradients { p: &mut p, ds: &mut ds, dq: &mut dq, dk: &mut dk, dv: &mut dv };
        (table.attention.backward)(&block, &upstream, &mut gradients);
        let seen = Guarded::new(&[keys, keys - 1, keys][..], flush);
        let (q, mut acc, mut max, mut sum) = (floats(3 * dim), floats(3 * width), floats(3), floats(3));
        let few = Few {
            q: &q,
            k: &src[..keys * dim],
            v: &src[..keys * dim],
            stride: dim,
            keys,
            dim,
            seen: &seen,
            scale: 0.2,
            bf16: keys % 2 == 0,
        };
        let mut scores = floats(3 * FEW_KEYS);
        let mut state = Softmax { scores: &mut scores, acc: &mut acc, max: &mut max, sum: &mut sum };
        (table.attention.few)(&few, &mut state);
    });
}

#[test]
fn products_of_few_rows_stay_in_bounds() {
    let (code, thresholds) = ([0.5; 16], std::array::from_fn(|i| i as f32 / 7.0 - 1.0));
    each(|table, n, floats, flush| {
        let (rows, n_x, cols) = (n % 5 + 1, n % MAX_X + 1, n * 64 % 640 + 64);
        let bytes = Guarded::new(&vec![0xA5_u8; rows * cols / 2][..], flush);
        let (x, scales) = (floats(n_x * cols), floats(rows * cols / 64));
        let (mut ordered, mut out) = (floats(n_x * cols), floats(rows * n_x));
        (table.nf4_order)(&x, &mut ordered);
        for round in [Round::F32, Round::Bf16, Round::F16, Round::F16ThenBf16] {
            let w = Nf4Rows { packed: &bytes, scales: &scales, cols, round };
            (table.nf4_gemv)(w, &code, &ordered, &mut out);
            if let Some(pairs) = table.nf4_pairs {
                let mut words = floats(n_x * cols / 2);
                (pairs.order)(&x, &mut words);
                (pairs.gemv)(w, &code, &words, &mut out);
            }
        }
        (table.i8_gemv)(&Guarded::new(&vec![-7_i8; rows * cols][..], flush), &scales, cols, &x, &mut out);
        let mut codes = Guarded::new(&vec![0_u8; cols / 2][..], flush);
        (table.nf4_quantize)(&floats(cols), &thresholds, &mut codes);
        // Rows of any length.
        let x = floats(n_x * n);
        (table.f32_gemv)(&floats(rows * n), n, &x, &mut out);
        (table.bf16_gemv)(&Guarded::new(&vec![0x3F80_u16; rows * n][..], flush), n, &x, &mut out);
    });
}
