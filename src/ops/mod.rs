//! One op per file: a forward and a hand-derived backward on buffers the caller owns.
//!
//! Activations are `[n_tokens, width]`, row-major f32; the rows of several sequences stand one after the other without
//! padding ([`Tokens::cu_seqlens`] holds the boundaries). A forward returns what its backward needs; a backward adds into
//! the gradients of parameters and returns the gradient of its input. Sums run in an order that depends on shapes alone,
//! never on the number of threads.

pub mod attention;
mod attention_pairs;
pub mod crew;
pub mod dora;
pub mod dropout;
pub mod embedding;
pub mod gemv;
pub mod head;
pub mod integer;
pub mod linear;
pub mod matmul;
mod pack;
pub mod params;
pub mod pool;
pub mod probe;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
pub mod tape;
pub mod weight;

pub use dropout::DropoutKey;
pub use params::{Grads, ParamId, ParamStore};
pub use pool::{Buf, Pool};
pub use weight::{Precision, Weight};

use crate::kernels::Kernels;
use rayon::prelude::*;
use std::sync::Arc;

/// What every op needs beside its operands.
#[derive(Clone)]
pub struct Ctx {
    /// The instruction set in use.
    pub kernels: &'static Kernels,
    /// What GEMM operands are rounded to.
    pub precision: Precision,
    /// Buffers that go from op to op and from step to step.
    pub pool: Arc<Pool>,
}

impl Ctx {
    /// The active instruction set and an empty pool.
    ///
    /// # Errors
    /// See [`crate::kernels::active`].
    pub fn new(precision: Precision) -> crate::Result<Self> {
        crate::io::os::return_large_blocks();
        Ok(Self { kernels: crate::kernels::active()?, precision, pool: Arc::new(Pool::default()) })
    }

    /// A buffer of `len` floats whose content is unspecified.
    pub fn buf(&self, len: usize) -> Buf {
        self.pool.take(len)
    }

    /// A buffer of `len` zeros.
    pub fn zeros(&self, len: usize) -> Buf {
        let mut buf = self.pool.take(len);
        buf.par_chunks_mut(COPY).for_each(|part| part.fill(0.0));
        buf
    }

    /// A buffer that holds a copy of `src`.
    pub fn copy(&self, src: &[f32]) -> Buf {
        let mut buf = self.pool.take(src.len());
        buf.par_chunks_mut(COPY).zip(src.par_chunks(COPY)).for_each(|(part, src)| part.copy_from_slice(src));
        buf
    }
}

/// Floats that a thread copies or clears at a time.
const COPY: usize = 1 << 16;

/// The tokens of one micro-batch: sequences one after the other.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    /// Token ids, `[n_tokens]`.
    pub ids: Vec<u32>,
    /// Position of each token within its sequence (RoPE, dropout key), `[n_tokens]`.
    pub positions: Vec<u32>,
    /// Dataset row of each token (dropout key), `[n_tokens]`.
    pub rows: Vec<u32>,
    /// Where each sequence starts, and the end of the last: `[n_seqs + 1]`.
    pub cu_seqlens: Vec<usize>,
}

impl Tokens {
    /// Sequences from position 0, rows numbered from 0.
    pub fn from_sequences<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut tokens = Self { cu_seqlens: vec![0], ..Self::default() };
        for (row, ids) in sequences.into_iter().enumerate() {
            tokens.ids.extend_from_slice(ids);
            tokens.positions.extend(0..ids.len() as u32);
            tokens.rows.extend(std::iter::repeat_n(row as u32, ids.len()));
            tokens.cu_seqlens.push(tokens.ids.len());
        }
        tokens
    }

    /// The tokens of a range, for ops that look at each token alone: they stand there as one sequence.
    #[must_use]
    pub fn rows(&self, range: std::ops::Range<usize>) -> Self {
        Self {
            ids: self.ids[range.clone()].to_vec(),
            positions: self.positions[range.clone()].to_vec(),
            rows: self.rows[range.clone()].to_vec(),
            cu_seqlens: vec![0, range.len()],
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// What a layer sees of a run: tools, parameters, tokens and, while training, the key of the dropout masks.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// Kernels and buffers.
    pub ctx: &'a Ctx,
    /// The trainable tensors.
    pub params: &'a ParamStore,
    /// The tokens of this micro-batch.
    pub tokens: &'a Tokens,
    /// `None` outside training: no dropout.
    pub dropout: Option<DropoutKey>,
    /// How frozen layers in 4 or 8 bits may take their input; exactly in training.
    pub activations: Activations,
}

/// What generation may round the inputs of layers in 4 or 8 bits to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// To nothing.
    Exact,
    /// To 16 bits, 64 neighbours to a scale, where a few tokens meet such a layer and that is faster ([`crate::kernels::int16_gemv`]).
    Bits16,
    /// To 8 bits, 64 neighbours to a scale ([`crate::kernels::integer`]).
    Bits8,
}

impl<'a> Env<'a> {
    /// One without dropout, whose layers take their inputs exactly.
    pub fn new(ctx: &'a Ctx, params: &'a ParamStore, tokens: &'a Tokens) -> Self {
        Self { ctx, params, tokens, dropout: None, activations: Activations::Exact }
    }
}

/// Rows of a parallel elementwise loop that one task takes: enough work to be worth a task.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// The most such tasks that a thread takes at once: threads of a shared machine are not equally fast, and whoever is done
/// helps out.
pub(crate) const TASKS_AT_ONCE: usize = 4;

/// `y += x`.
pub(crate) fn add(ctx: &Ctx, y: &mut [f32], x: &[f32]) {
    let task = rows_per_task(1);
    let tasks = y.par_chunks_mut(task).zip(x.par_chunks(task)).with_max_len(TASKS_AT_ONCE);
    tasks.for_each(|(y, x)| (ctx.kernels.axpy)(1.0, x, y));
}
