//! The gated activation `silu(gate) · up`.  Shazeer 2020, eq. 6.

use super::{Buf, Ctx, TASKS_AT_ONCE, rows_per_task};
use rayon::prelude::*;

/// gate, up: `[n_tokens, ffn]` -> `[n_tokens, ffn]`.
pub fn forward(ctx: &Ctx, gate: &[f32], up: &[f32]) -> Buf {
    let mut y = ctx.buf(gate.len());
    let task = rows_per_task(1);
    let tasks = y.par_chunks_mut(task).zip(gate.par_chunks(task)).zip(up.par_chunks(task));
    tasks.with_max_len(TASKS_AT_ONCE).for_each(|((y, gate), up)| (ctx.kernels.swiglu_row)(gate, up, y));
    y
}

/// Gradients of gate and up from that of the output, `[n_tokens, ffn]` each.
pub fn backward(ctx: &Ctx, gate: &[f32], up: &[f32], dy: &[f32]) -> (Buf, Buf) {
    let (mut dgate, mut dup) = (ctx.buf(gate.len()), ctx.buf(gate.len()));
    let task = rows_per_task(1);
    let outputs = dgate.par_chunks_mut(task).zip(dup.par_chunks_mut(task));
    let inputs = gate.par_chunks(task).zip(up.par_chunks(task)).zip(dy.par_chunks(task));
    outputs.zip(inputs).with_max_len(TASKS_AT_ONCE).for_each(|((dgate, dup), ((gate, up), dy))| {
        (ctx.kernels.swiglu_row_backward)(gate, up, dy, dgate, dup);
    });
    (dgate, dup)
}
