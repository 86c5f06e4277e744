//! Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) at a given learning rate, as transformers' `Trainer` sets it up:
//! no relative step, no scaling by the parameter, no momentum, updates clipped to a root mean square of 1.
//!
//! A matrix keeps the mean square of each row and column, other tensors that of each element. Sums run in f64 over rows in
//! order, whatever the threads.

use rayon::prelude::*;

use super::optimizer::{NamedState, Optimizer, ParamSlot, Stored, TensorSize, check_slots};
use crate::error::Result;

/// Added to a squared gradient (`eps[0]`).
const EPS: f64 = 1e-30;
/// Root mean square of an update beyond which it is scaled down.
const CLIP_THRESHOLD: f64 = 1.0;
/// Exponent of the step in the decay of the means: `1 - t^DECAY_RATE`.
const DECAY_RATE: f64 = -0.8;

/// The mean squares of one tensor.
#[derive(Debug)]
enum Means {
    /// Of a matrix `[rows, cols]`.
    Factored {
        row: Vec<f32>,
        col: Vec<f32>,
    },
    Whole(Vec<f32>),
}

impl Means {
    fn new(shape: &[usize]) -> Self {
        match *shape {
            [rows, cols] => Self::Factored { row: vec![0.0; rows], col: vec![0.0; cols] },
            _ => Self::Whole(vec![0.0; shape.iter().product()]),
        }
    }

    fn n_elements(&self) -> usize {
        match self {
            Self::Factored { row, col } => row.len() * col.len(),
            Self::Whole(means) => means.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Factored { row, col } => 4 * (row.len() + col.len()),
            Self::Whole(means) => 4 * means.len(),
        }
    }

    /// Takes in the squared gradients and writes the unclipped update into `update`, which holds the gradients.
    fn update(&mut self, update: &mut [f32], beta2: f64) {
        let (keep, enter) = (beta2 as f32, (1.0 - beta2) as f32);
        let squared = |g: f32| f64::from(g) * f64::from(g) + EPS;
        match self {
            Self::Whole(means) => {
                for (u, mean) in update.iter_mut().zip(means) {
                    *mean = keep * *mean + enter * squared(*u) as f32;
                    *u *= 1.0 / mean.sqrt();
                }
            }
            Self::Factored { row, col } => {
                let (n_rows, n_cols) = (row.len(), col.len());
                row.par_iter_mut().zip(update.par_chunks(n_cols)).for_each(|(mean, grads)| {
                    let sum: f64 = grads.iter().map(|&g| squared(g)).sum();
                    *mean = keep * *mean + enter * (sum / n_cols as f64) as f32;
                });
                let mut sums = vec![0f64; n_cols];
                for grads in update.chunks(n_cols) {
                    sums.iter_mut().zip(grads).for_each(|(sum, &g)| *sum += squared(g));
                }
                for (mean, sum) in col.iter_mut().zip(sums) {
                    *mean = keep * *mean + enter * (sum / n_rows as f64) as f32;
                }
                let mean_row = row.iter().map(|&mean| f64::from(mean)).sum::<f64>() / n_rows as f64;
                update.par_chunks_mut(n_cols).zip(&*row).for_each(|(update, &row)| {
                    let of_row = 1.0 / (row / mean_row as f32).sqrt();
                    update.iter_mut().zip(&*col).for_each(|(u, &col)| *u *= of_row * (1.0 / col.sqrt()));
                });
            }
        }
    }
}

/// The optimizer; see [`super::optimizer::build`].
#[derive(Debug)]
pub(super) struct Adafactor {
    weight_decay: f64,
    steps: u64,
    tensors: Vec<(String, Means)>,
}

impl Adafactor {
    pub(super) fn new(weight_decay: f64, sizes: &[TensorSize]) -> Self {
        let tensors = sizes.iter().map(|(name, shape)| (name.clone(), Means::new(shape))).collect();
        Self { weight_decay, steps: 0, tensors }
    }
}

impl Optimizer for Adafactor {
    fn step(&mut self, params: &mut [ParamSlot<'_>], grad_scale: f32) -> Result<()> {
        check_slots(params, self.tensors.iter().map(|(name, means)| (name.as_str(), means.n_elements())))?;
        self.steps += 1;
        let beta2 = 1.0 - (self.steps as f64).powf(DECAY_RATE);
        let weight_decay = self.weight_decay;
        // One after the other: a tensor's update is the one buffer beside it.
        for (slot, (_, means)) in params.iter_mut().zip(&mut self.tensors) {
            if slot.data.is_empty() {
                continue;
            }
            let mut update: Vec<f32> = slot.grad.iter().map(|&g| g * grad_scale).collect();
            means.update(&mut update, beta2);
            let squares: Vec<f64> = update
                .par_chunks(16_384)
                .map(|chunk| chunk.iter().map(|&u| f64::from(u) * f64::from(u)).sum())
                .collect();
            let rms = (squares.iter().sum::<f64>() / update.len() as f64).sqrt();
            let scale = (slot.lr / (rms / CLIP_THRESHOLD).max(1.0)) as f32;
            let keep = if slot.decay { (1.0 - weight_decay * slot.lr) as f32 } else { 1.0 };
            slot.data.iter_mut().zip(&update).for_each(|(p, &u)| *p = *p * keep - u * scale);
        }
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<NamedState<'_>> {
        let mut state = Vec::with_capacity(2 * self.tensors.len());
        for (name, means) in &self.tensors {
            match means {
                Means::Factored { row, col } => {
                    state.push(NamedState::f32(name, "exp_avg_sq_row", row));
                    state.push(NamedState::f32(name, "exp_avg_sq_col", col));
                }
                Means::Whole(means) => state.push(NamedState::f32(name, "exp_avg_sq", means)),
            }
        }
        state
    }

    fn load_state(&mut self, steps: u64, state: Vec<NamedState<'_>>) -> Result<()> {
        let mut stored = Stored::new(state);
        let mut load = |name: &str, old: &Means| {
            Ok(match old {
                Means::Factored { row, col } => Means::Factored {
                    row: stored.take_f32(name, "exp_avg_sq_row", row.len())?,
                    col: stored.take_f32(name, "exp_avg_sq_col", col.len())?,
                },
                Means::Whole(means) => Means::Whole(stored.take_f32(name, "exp_avg_sq", means.len())?),
            })
        };
        let tensors =
            self.tensors.iter().map(|(name, old)| Ok((name.clone(), load(name, old)?))).collect::<Result<_>>()?;
        stored.finish()?;
        self.tensors = tensors;
        self.steps = steps;
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        self.tensors.iter().map(|(_, means)| means.bytes()).sum()
    }
}
