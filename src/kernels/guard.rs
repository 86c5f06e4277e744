//! Every kernel on slices that lie flush against pages nobody may touch: a read or write out of bounds kills the test.
//!
//! The tests take the tables apart by name, so a new kernel does not compile before it has a line here.

use super::attention::{
    Attention, Block, FEW_KEYS, Few, Gradients, KEYS, PAD, QUERIES, Softmax, Upstream, pack_panels, pack_queries,
    pack_rows, queries_len,
};
use super::elementwise::{AdamStep, Mask, Masked};
use super::gemm::{GemmTile, PairKernels, PanelA, Rows, TileC};
use super::gemv::{MAX_X, NestedScales, Nf4Pairs, Nf4Rows, Round, Scales};
use super::int16::{self, Int16Kernels, Nf4Column};
use super::int16_gemv::{Codes16, Int16Gemv, Layout};
use super::integer::{Codes, Integer, IntegerTile, Order};
use super::tiles::TileMut;
use super::{Kernels, tables};
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

impl Flush {
    /// A guarded copy.
    fn of<T: Copy>(self, values: &[T]) -> Guarded<T> {
        Guarded::new(values, self)
    }

    /// Guarded floats in [-1, 1).
    fn floats(self, len: usize) -> Guarded<f32> {
        let values: Vec<f32> = (0..len).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        self.of(&values)
    }
}

/// Runs a check on every table, on both sides and for every length around the lane widths.
fn each(check: impl Fn(&Kernels, usize, Flush)) {
    for table in tables() {
        for n in 1..=70 {
            for flush in [Flush::Start, Flush::End] {
                check(table, n, flush);
            }
        }
    }
}

/// What a step past either end of guarded memory does to a process: run in a child, which it kills.
#[test]
fn a_step_past_either_end_kills() {
    for flush in [Flush::Start, Flush::End] {
        let guarded = flush.of(&[1_u8; 3]);
        let past = match flush {
            Flush::Start => guarded.data.wrapping_sub(1),
            Flush::End => guarded.data.wrapping_add(3),
        };
        for (pointer, survives) in [(guarded.data, true), (past, false)] {
            // SAFETY: the child reads one byte and ends, without an allocation or a lock.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: what is under test; ending here runs nothing of the parent's.
                unsafe {
                    pointer.read_volatile();
                    libc::_exit(0);
                }
            }
            let mut status = 0;
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child, "waitpid");
            assert_eq!(status == 0, survives, "{flush:?}: wait status {status}");
        }
    }
}

#[test]
fn every_kernel_stays_in_bounds() {
    each(|table, n, flush| {
        let Kernels {
            isa: _,
            tile,
            pairs,
            transpose,
            copy_rows,
            store_sums,
            nf4_blocks,
            int8_row,
            widen,
            dot,
            axpy,
            rms_norm_row,
            rms_norm_row_backward,
            swiglu_row,
            swiglu_row_backward,
            max_row,
            exp_row,
            round_bf16,
            attention,
            rope_row,
            rms_norm_gain,
            dropout_row,
            adamw_row,
            nf4_order,
            nf4_gemv,
            nested_scales,
            integer,
            int16,
            nf4_pairs,
            bf16_gemv,
            f32_gemv,
            i8_gemv,
            nf4_quantize,
        } = table;
        let floats = |len| flush.floats(len);

        // Rows.
        let (x, w, dy) = (floats(n), floats(n), floats(n));
        let (mut y, mut z) = (floats(n), floats(n));
        dot(&x, &w);
        axpy(0.5, &x, &mut y);
        rms_norm_row(&x, &w, 1e-5, &mut y);
        rms_norm_row_backward(&x, &w, 0.7, &dy, &mut y);
        rms_norm_gain(&x, 0.7, &dy, &mut y);
        swiglu_row(&x, &w, &mut y);
        swiglu_row_backward(&x, &w, &dy, &mut y, &mut z);
        max_row(&x);
        exp_row(&mut y, 1.0, 2.0);
        round_bf16(&mut y);
        rope_row(&mut floats(6 * n), &x, &w, -1.0);
        widen(&flush.of(&vec![0x3F80_u16; n]), &mut y);
        let mask = Mask { key: [1, 2], counter: [3, 4, 5], first: 0, threshold: 1 << 30, scale: 2.0 };
        for how in [Masked::InPlace, Masked::Copy(&x), Masked::Add(&x)] {
            dropout_row(&mask, how, &mut y);
        }
        adamw_row(&ADAM_STEP, &mut floats(n), &x, &mut y, &mut z);

        // Matrices.
        let (count, width) = (n.min(20), 23);
        let data = floats(count * n);
        let rows = Rows { data: &data, stride: n, count, depth: n };
        transpose(&rows, &mut floats(n * width), width, width - count);
        transpose(&rows, &mut floats(n * count), count, 0);
        for width in [n, n + 3] {
            copy_rows(&rows, &mut floats(count * width), width);
        }
        let nr = 16;
        for alpha in [1.0, 0.5] {
            let sums = floats(n.div_ceil(nr) * nr * (count + 2));
            let mut c = floats((count - 1) * (n + 3) + n);
            let c = &mut TileMut::whole(&mut c, n + 3, count, n);
            store_sums(&sums, nr, TileC { c, i: 0, j: 0, alpha, add: alpha == 1.0, ahead: &[] });
        }
        products(tile, n, flush);
        int16_stays_in_bounds(int16, n, flush);
        attention_stays_in_bounds(attention, n, flush);

        // 8 bits, NF4.
        int8_row(&flush.of(&vec![-7_i8; n]), 0.5, &mut y);
        let (code, thresholds) = (flush.of(&[0.25; 16]), flush.of(&[0.5; 15]));
        let code = code.first_chunk().expect("16 values");
        let thresholds = thresholds.first_chunk().expect("15 thresholds");
        let packed = flush.of(&vec![0x5A_u8; n.div_ceil(2)]);
        for block in [32, 64] {
            let scales = floats(n.div_ceil(block));
            nf4_blocks(&packed, &scales, block, code, n % 2 == 0, &mut y);
            if let Some(pairs) = pairs {
                pairs_stay_in_bounds(pairs, &packed, &scales, block, code, n, flush);
            }
        }
        let map = flush.of(&[0.5; 256]);
        let codes = flush.of(&vec![0xFF_u8; n]);
        nested_scales(&codes, map.first_chunk().expect("256 values"), 0.5, 0.25, &mut y);
        nf4_quantize(&floats(n * 32), thresholds, &mut flush.of(&vec![0_u8; n * 16]));

        // A matrix times a few vectors: rows of whole blocks, then rows of any length.
        let (rows, n_x, cols) = (n % 5 + 1, n % MAX_X + 1, n * 64 % 640 + 64);
        let bytes = flush.of(&vec![0xA5_u8; rows * cols / 2]);
        let (x, scales) = (floats(n_x * cols), floats(rows * cols / 64));
        let (mut ordered, mut out) = (floats(n_x * cols), floats(rows * n_x));
        nf4_order(&x, &mut ordered);
        for round in [Round::F32, Round::Bf16, Round::F16, Round::F16ThenBf16] {
            let w = Nf4Rows { packed: &bytes, scales: Scales::Each(&scales), cols, round };
            nf4_gemv(w, code, &ordered, &mut out);
            if let Some(Nf4Pairs { order, gemv }) = nf4_pairs {
                let mut words = floats(n_x * cols / 2);
                order(&x, &mut words);
                gemv(w, code, &words, &mut out);
            }
        }
        let codes = flush.of(&vec![-7_i8; rows * cols]);
        i8_gemv(&codes, &scales, cols, &x, &mut out);
        let (groups, nested_codes) =
            (floats((rows * cols / 64).div_ceil(3)), flush.of(&vec![0xFF_u8; rows * cols / 64]));
        let map = map.first_chunk().expect("256 values");
        let nested = NestedScales { codes: &nested_codes, first: 0, absmax: &groups, offset: 0.5, group: 3, map };
        for round in [Round::F32, Round::Bf16] {
            let w = Nf4Rows { packed: &bytes, scales: Scales::Nested(nested), cols, round };
            nf4_order(&x, &mut ordered);
            nf4_gemv(w, code, &ordered, &mut out);
            integers_stay_in_bounds(integer, w, &scales, &codes, &x, flush);
            let Int16Gemv { fast: _, unit: _, encode, nf4, int8 } = &int16.gemv;
            let blocks = int16.gemv.blocks(cols, Layout::Nf4);
            let (mut words, mut steps) = (floats(n_x * blocks * 32), floats(n_x * blocks));
            for ((x, words), steps) in x.chunks(cols).zip(words.chunks_mut(blocks * 32)).zip(steps.chunks_mut(blocks)) {
                encode(x, Layout::Nf4, words, steps);
            }
            for scales in [w.scales, Scales::Each(&scales)] {
                nf4(Nf4Rows { scales, ..w }, code, Codes16 { words: &words, scales: &steps, cols }, &mut out);
            }
            let (mut words, mut steps) = (floats(n_x * cols / 2), floats(n_x * cols / 64));
            for ((x, words), steps) in x.chunks(cols).zip(words.chunks_mut(cols / 2)).zip(steps.chunks_mut(cols / 64)) {
                encode(x, Layout::Plain, words, steps);
            }
            int8(&codes, &scales, Codes16 { words: &words, scales: &steps, cols }, &mut out);
        }
        let x = floats(n_x * n);
        f32_gemv(&floats(rows * n), n, &x, &mut out);
        bf16_gemv(&flush.of(&vec![0x3F80_u16; rows * n]), n, &x, &mut out);
    });
}

const ADAM_STEP: AdamStep = AdamStep {
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

/// Products of `k` words: up to two panels of A, on a C that ends with its last row and begins with a column of others.
fn products(tile: &GemmTile, k: usize, flush: Flush) {
    let GemmTile { mr, nr, panel_a, run } = *tile;
    // Rows of A panels are whole tile registers.
    let depth = if panel_a == PanelA::Rows { k.next_multiple_of(16) } else { k };
    let (rows, cols) = (k.min(2 * mr), k.min(nr));
    let (a, b) = (flush.floats(depth * rows.next_multiple_of(mr)), flush.floats(depth * nr));
    for (alpha, add) in [(1.0, false), (1.0, true), (0.5, false), (0.5, true)] {
        for j in [0, 1] {
            let mut c = flush.floats(rows * (j + cols));
            let c = &mut TileMut::whole(&mut c, j + cols, rows, j + cols);
            run(&a, &b, TileC { c, i: 0, j, alpha, add, ahead: &[] });
        }
    }
}

fn pairs_stay_in_bounds(
    pairs: &PairKernels,
    packed: &[u8],
    scales: &[f32],
    block: usize,
    code: &[f32; 16],
    n: usize,
    flush: Flush,
) {
    let PairKernels { tile, fast: _, pack_row, pack_lines, join_rows, join_halves, nf4, int8 } = pairs;
    let row = flush.floats(n);
    pack_row(&row, &mut flush.floats(n.div_ceil(2)));
    for stride in [16, 48] {
        pack_lines(&row, &mut flush.floats((n.div_ceil(32) - 1) * stride + 16), stride);
    }
    let halves = || flush.of(&vec![0x3F80_u16; n]);
    // Rows of every length down to 1 in a panel that ends with the last of them.
    let (count, depth) = (n.min(5), n / n.min(5));
    let (stride, width) = (n / count, depth + n % 2);
    let mut words = flush.floats((count.div_ceil(2) - 1) * width + depth);
    join_rows(&Rows { data: &row, stride, count, depth }, &mut words, width);
    join_halves(&Rows { data: &halves(), stride, count, depth }, &mut words, width);
    nf4(packed, scales, block, code, &mut halves());
    int8(&flush.of(&vec![-7_i8; n]), 0.5, &mut halves());
    products(tile, n, flush);
}

fn int16_stays_in_bounds(int16: &Int16Kernels, n: usize, flush: Flush) {
    let Int16Kernels { tile, fast: _, pack_row, join_rows, pack_halves, join_halves, nf4_row, nf4_join, gemv: _ } =
        int16;
    let depth = int16::depth(n);
    pack_row(&flush.floats(n), &mut flush.floats(depth));
    pack_halves(&flush.of(&vec![0x3F80_u16; n]), &mut flush.floats(depth));
    let columns = n % 37 + 1;
    for (count, width) in [(n.min(int16::BLOCK), columns), (n % 3 + 1, columns + n % 2)] {
        let rows = flush.floats((count - 1) * (columns + 3) + columns);
        let mut words = flush.floats((int16::depth(count) - 1) * width + columns);
        join_rows(&Rows { data: &rows, stride: columns + 3, count, depth: columns }, &mut words, width);
        let halves = flush.of(&vec![0x3F80_u16; rows.len()]);
        join_halves(&Rows { data: &halves, stride: columns + 3, count, depth: columns }, &mut words, width);
    }
    let code = flush.of(&[0.25; 16]);
    let code = code.first_chunk().expect("16 values");
    let (blocks, rows) = (n % 3 + 1, n.min(int16::BLOCK));
    for round in [false, true] {
        let packed = flush.of(&vec![0x5A_u8; blocks * 32]);
        nf4_row(&packed, &flush.floats(blocks), code, round, &mut flush.floats(blocks * int16::BLOCK_WORDS));
        for width in [16, 32, 64] {
            let (stride, panel) = (32 + n, int16::depth(rows) * width);
            let packed = flush.of(&vec![0x5A_u8; (rows - 1) * stride + 32]);
            let column = Nf4Column { packed: &packed, stride, scales: &flush.floats(rows), code, round };
            nf4_join(column, &mut flush.floats((64 / width - 1) * panel + int16::depth(rows) * width), width, panel);
        }
    }
    // A short block has a word and a scale at least.
    products(tile, depth, flush);
}

fn integers_stay_in_bounds(integer: &Integer, w: Nf4Rows<'_>, steps: &[f32], codes: &[i8], x: &[f32], flush: Flush) {
    let Integer { encode, nf4_gemv, int8_gemv, tile } = integer;
    let (cols, n, rows) = (w.cols, x.len() / w.cols, codes.len() / w.cols);
    let (mut words, mut scales, mut starts) =
        (flush.floats(x.len() / 4), flush.floats(x.len() / 64), flush.floats(x.len() / 64));
    for order in [Order::Plain, Order::EvenOdd] {
        encode(x, order, &mut words, &mut scales, &mut starts);
    }
    let x = Codes { words: &words, scales: &scales, starts: &starts, cols };
    let mut out = flush.floats(rows * n);
    nf4_gemv(w, x, &mut out);
    int8_gemv(codes, steps, x, &mut out);
    let Some(IntegerTile { mr, nr, beats_pairs: _, nf4_words, int8_words, run }) = tile else { return };
    nf4_words(w.packed, &mut flush.floats(rows * cols / 4));
    int8_words(codes, &mut flush.floats(rows * cols / 4));
    let (panel, scales) = (flush.floats(cols / 4 * nr), flush.floats(cols / 64 * nr));
    let x = x.rows(0..n.min(*mr));
    run(x, &panel, &scales, &mut flush.floats(n.min(*mr) * nr));
}

fn attention_stays_in_bounds(attention: &Attention, i: usize, flush: Flush) {
    let Attention { panel, forward, backward, softmax, slopes, few } = attention;
    let floats = |len| flush.floats(len);
    // Blocks of few keys and almost full ones; widths below, at and between the lane widths, and of two chunks.
    let keys = if i.is_multiple_of(2) { i } else { KEYS + 1 - i };
    let (dim, n): (usize, usize) = ([5, 16, 24, 64, 260][i % 5], i.min(QUERIES));
    let (width, bf16) = (dim.next_multiple_of(PAD), i % 4 < 2);
    let src = floats(keys.max(n) * dim);
    let mut panels = floats(keys.next_multiple_of(*panel) * dim);
    pack_panels(&src, dim, keys, dim, *panel, &mut panels);
    let mut rows = floats(keys * width);
    pack_rows(&src, dim, keys, dim, width, &mut rows);
    let mut q = floats(queries_len(dim));
    pack_queries(&src, dim, n, dim, &mut q);
    let ahead = keys as isize - n as isize;
    let block = Block { q: &q, k_panels: &panels, n, keys, dim, ahead, scale: 0.2, bf16 };
    let (mut acc, mut max, mut sum) = (floats(n * width), floats(n), floats(n));
    let mut scores = floats(QUERIES * KEYS);
    forward(&block, &rows, &mut Softmax { scores: &mut scores, acc: &mut acc, max: &mut max, sum: &mut sum });
    let (lse, delta) = (floats(n), floats(n));
    let upstream = Upstream { dout: &q, v_panels: &panels, k_rows: &rows, lse: &lse, delta: &delta };
    let (mut p, mut ds, mut dq) = (floats(QUERIES * KEYS), floats(QUERIES * KEYS), floats(n * width));
    let (mut dk, mut dv) = (floats(keys * width), floats(keys * width));
    let mut gradients = Gradients { p: &mut p, ds: &mut ds, dq: &mut dq, dk: &mut dk, dv: &mut dv };
    backward(&block, &upstream, &mut gradients);

    // The middles alone, on as many rows as there are queries.
    let mut scores = floats(n * KEYS);
    softmax(&block, &mut Softmax { scores: &mut scores, acc: &mut acc, max: &mut max, sum: &mut sum });
    slopes(&block, &lse, &delta, &mut floats(n * KEYS), &mut floats(n * KEYS));

    let seen = flush.of(&[keys, keys - 1, keys, 1, keys, keys, keys][..=i % 7]);
    let (heads, stride) = (seen.len(), dim + i % 3);
    // The last key ends with its head.
    let (k, v) = (floats((keys - 1) * stride + dim), floats((keys - 1) * stride + dim));
    let (q, mut acc, mut max, mut sum) = (floats(heads * dim), floats(heads * width), floats(heads), floats(heads));
    let rows = Few { q: &q, k: &k, v: &v, stride, keys, dim, seen: &seen, scale: 0.2, bf16 };
    let mut scores = floats(heads * FEW_KEYS);
    few(&rows, &mut Softmax { scores: &mut scores, acc: &mut acc, max: &mut max, sum: &mut sum });
}
