//! AdamW with its two moments in f32, as `torch.optim.AdamW`.

use rayon::prelude::*;

use super::optimizer::{AdamHyper, NamedState, Optimizer, ParamSlot, Stored, TensorSize, adam_step, check_slots};
use crate::error::Result;
use crate::kernels::elementwise::AdamStep;
use crate::kernels::{self, Kernels};

/// Elements of a task: large enough to be worth handing to another thread.
const CHUNK: usize = 16_384;

/// The two moments of one tensor.
#[derive(Debug)]
pub(super) struct Moments {
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl Moments {
    pub(super) fn new(len: usize) -> Self {
        Self { exp_avg: vec![0.0; len], exp_avg_sq: vec![0.0; len] }
    }

    /// `param`, `grad`: as long as the moments.
    pub(super) fn update(&mut self, kernels: &Kernels, param: &mut [f32], grad: &[f32], step: &AdamStep) {
        param
            .par_chunks_mut(CHUNK)
            .zip(grad.par_chunks(CHUNK))
            .zip(self.exp_avg.par_chunks_mut(CHUNK).zip(self.exp_avg_sq.par_chunks_mut(CHUNK)))
            .for_each(|((param, grad), (exp_avg, exp_avg_sq))| {
                (kernels.adamw_row)(step, param, grad, exp_avg, exp_avg_sq);
            });
    }

    pub(super) fn state<'a>(&'a self, name: &str, into: &mut Vec<NamedState<'a>>) {
        into.push(NamedState::f32(name, "exp_avg", &self.exp_avg));
        into.push(NamedState::f32(name, "exp_avg_sq", &self.exp_avg_sq));
    }

    pub(super) fn stored(name: &str, len: usize, stored: &mut Stored<'_>) -> Result<Self> {
        Ok(Self {
            exp_avg: stored.take_f32(name, "exp_avg", len)?,
            exp_avg_sq: stored.take_f32(name, "exp_avg_sq", len)?,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.exp_avg.len()
    }

    pub(super) fn bytes(&self) -> usize {
        2 * size_of_val(self.exp_avg.as_slice())
    }
}

/// The optimizer; see [`super::optimizer::build`].
#[derive(Debug)]
pub struct AdamW {
    hyper: AdamHyper,
    steps: u64,
    tensors: Vec<(String, Moments)>,
}

impl AdamW {
    /// Zero moments for tensors of these names and shapes.
    pub fn new(hyper: AdamHyper, sizes: &[TensorSize]) -> Self {
        let tensors = sizes.iter().map(|(name, shape)| (name.clone(), Moments::new(shape.iter().product()))).collect();
        Self { hyper, steps: 0, tensors }
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, params: &mut [ParamSlot<'_>], grad_scale: f32) -> Result<()> {
        check_slots(params, self.tensors.iter().map(|(name, moments)| (name.as_str(), moments.len())))?;
        self.steps += 1;
        let (hyper, steps) = (&self.hyper, self.steps);
        let kernels = kernels::active()?;
        params.par_iter_mut().zip(&mut self.tensors).for_each(|(slot, (_, moments))| {
            let step = adam_step(hyper, steps, slot, grad_scale);
            moments.update(kernels, slot.data, slot.grad, &step);
        });
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<NamedState<'_>> {
        let mut state = Vec::with_capacity(2 * self.tensors.len());
        for (name, moments) in &self.tensors {
            moments.state(name, &mut state);
        }
        state
    }

    fn load_state(&mut self, steps: u64, state: Vec<NamedState<'_>>) -> Result<()> {
        let mut stored = Stored::new(state);
        let tensors = self
            .tensors
            .iter()
            .map(|(name, moments)| Ok((name.clone(), Moments::stored(name, moments.len(), &mut stored)?)))
            .collect::<Result<_>>()?;
        stored.finish()?;
        self.tensors = tensors;
        self.steps = steps;
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        self.tensors.iter().map(|(_, moments)| moments.bytes()).sum()
    }
}
