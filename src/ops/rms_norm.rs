//! RMSNorm: `y = x · w / sqrt(mean(x²) + eps)`.  Zhang & Sennrich 2019, eq. 4.

use super::{Buf, Ctx, Env, Grads, ParamId, TASKS_AT_ONCE, rows_per_task};
use rayon::prelude::*;

/// The gain of a norm.
pub enum Gain {
    /// Not trained, `[hidden]`.
    Frozen(Vec<f32>),
    /// Trained.
    Trained(ParamId),
}

/// An RMSNorm layer.
pub struct RmsNorm {
    /// `[hidden]`.
    pub gain: Gain,
    /// Added to the mean square.
    pub eps: f32,
}

/// What the backward needs beside its input.
pub struct Saved {
    /// `1 / sqrt(mean(x²) + eps)` of each token, `[n_tokens]`.
    rstd: Buf,
}

impl RmsNorm {
    fn weights<'a>(&'a self, env: &Env<'a>) -> &'a [f32] {
        match &self.gain {
            Gain::Frozen(gain) => gain,
            Gain::Trained(id) => env.params.get(*id),
        }
    }

    /// x: `[n_tokens, hidden]` -> y: `[n_tokens, hidden]`.
    pub fn forward(&self, env: &Env<'_>, x: &[f32]) -> (Buf, Saved) {
        let w = self.weights(env);
        let mut y = env.ctx.buf(x.len());
        let mut rstd = env.ctx.buf(x.len() / w.len());
        rms_norm(env.ctx, x, w, self.eps, &mut y, &mut rstd);
        (y, Saved { rstd })
    }

    /// Adds the gradient of the input to `dx`, and of the gain to `grads` where it is trained.
    pub fn backward(&self, env: &Env<'_>, x: &[f32], saved: &Saved, dy: &[f32], dx: &mut [f32], grads: &mut Grads) {
        let w = self.weights(env);
        let (hidden, task) = (w.len(), rows_per_task(w.len()));
        let backward_row = env.ctx.kernels.rms_norm_row_backward;
        dx.par_chunks_mut(task * hidden).with_max_len(TASKS_AT_ONCE).enumerate().for_each(|(chunk, dx)| {
            for (r, dx) in dx.chunks_exact_mut(hidden).enumerate() {
                let t = chunk * task + r;
                let row = t * hidden..(t + 1) * hidden;
                backward_row(&x[row.clone()], w, saved.rstd[t], &dy[row], dx);
            }
        });
        if let Gain::Trained(id) = self.gain {
            // dw[i] = Σ_t dy[t, i] · x[t, i] · rstd[t], summed over t in order
            grads.get_mut(id).par_chunks_mut(128).enumerate().for_each(|(chunk, dw)| {
                for (t, rstd) in saved.rstd.iter().enumerate() {
                    let part = t * hidden + chunk * 128..t * hidden + chunk * 128 + dw.len();
                    (env.ctx.kernels.rms_norm_gain)(&x[part.clone()], *rstd, &dy[part], dw);
                }
            });
        }
    }
}

/// The forward on plain slices;  x, y: `[n_tokens, hidden]`, w: `[hidden]`, rstd: `[n_tokens]`.
fn rms_norm(ctx: &Ctx, x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let (hidden, task) = (w.len(), rows_per_task(w.len()));
    let tasks = y.par_chunks_mut(task * hidden).zip(x.par_chunks(task * hidden)).zip(rstd.par_chunks_mut(task));
    tasks.with_max_len(TASKS_AT_ONCE).for_each(|((y, x), rstd)| {
        for ((y, x), rstd) in y.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden)).zip(rstd) {
            *rstd = (ctx.kernels.rms_norm_row)(x, w, eps, y);
        }
    });
}
