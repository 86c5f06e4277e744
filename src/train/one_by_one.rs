//! Optimizers that treat every element by itself: a rule for a run of elements, and what all such rules share.

use rayon::prelude::*;

use super::optimizer::{NamedState, Optimizer, ParamSlot, Stored, TensorSize, check_slots};
use crate::error::Result;
use crate::kernels::{self, Kernels};

/// Elements of a task: large enough to be worth handing to another thread.
const CHUNK: usize = 16_384;

/// What a step of a rule is told about a tensor.
#[derive(Clone, Copy)]
pub(super) struct StepOf {
    /// What runs on vectors.
    pub(super) kernels: &'static Kernels,
    /// The step, counted from 1.
    pub(super) t: u64,
    /// The learning rate.
    pub(super) lr: f64,
    /// What gradients are multiplied by first.
    pub(super) grad_scale: f32,
    /// Whether weight decay applies.
    pub(super) decay: bool,
}

/// The arithmetic of one optimizer.
pub(super) trait Rule: Send + Sync {
    /// The names of an element's f32 state, which begins at zero.
    fn parts(&self) -> Vec<&'static str>;

    /// Updates parameters and state;  state: one slice for each part, all as long as `param`.
    fn update(&self, step: &StepOf, param: &mut [f32], grad: &[f32], state: &mut [&mut [f32]]);
}

/// The state of one tensor: its name, its length, and a vector for each part.
#[derive(Debug)]
struct Tensor {
    name: String,
    len: usize,
    parts: Vec<Vec<f32>>,
}

/// The optimizer that follows a rule.
#[derive(Debug)]
pub(super) struct OneByOne<R> {
    rule: R,
    steps: u64,
    tensors: Vec<Tensor>,
}

impl<R: Rule> OneByOne<R> {
    pub(super) fn new(rule: R, sizes: &[TensorSize]) -> Self {
        let n_parts = rule.parts().len();
        let tensor = |(name, shape): &TensorSize| {
            let len = shape.iter().product();
            Tensor { name: name.clone(), len, parts: vec![vec![0.0; len]; n_parts] }
        };
        Self { steps: 0, tensors: sizes.iter().map(tensor).collect(), rule }
    }
}

impl<R: Rule> Optimizer for OneByOne<R> {
    fn step(&mut self, params: &mut [ParamSlot<'_>], grad_scale: f32) -> Result<()> {
        check_slots(params, self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.len)))?;
        let kernels = kernels::active()?;
        self.steps += 1;
        let (t, rule) = (self.steps, &self.rule);
        params.par_iter_mut().zip(&mut self.tensors).for_each(|(slot, tensor)| {
            let step = StepOf { kernels, t, lr: slot.lr, grad_scale, decay: slot.decay };
            // chunks[i]: the i-th piece of every part.
            let mut chunks: Vec<Vec<&mut [f32]>> = (0..tensor.len.div_ceil(CHUNK)).map(|_| Vec::new()).collect();
            for part in &mut tensor.parts {
                chunks.iter_mut().zip(part.chunks_mut(CHUNK)).for_each(|(chunk, piece)| chunk.push(piece));
            }
            slot.data
                .par_chunks_mut(CHUNK)
                .zip(slot.grad.par_chunks(CHUNK))
                .zip(chunks)
                .for_each(|((param, grad), mut state)| rule.update(&step, param, grad, &mut state));
        });
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<NamedState<'_>> {
        let names = self.rule.parts();
        let mut state = Vec::with_capacity(names.len() * self.tensors.len());
        for tensor in &self.tensors {
            state.extend(names.iter().zip(&tensor.parts).map(|(part, data)| NamedState::f32(&tensor.name, part, data)));
        }
        state
    }

    fn load_state(&mut self, steps: u64, state: Vec<NamedState<'_>>) -> Result<()> {
        let (mut stored, names) = (Stored::new(state), self.rule.parts());
        let mut load = |tensor: &Tensor| {
            let parts = names.iter().map(|part| stored.take_f32(&tensor.name, part, tensor.len));
            parts.collect::<Result<Vec<_>>>()
        };
        let loaded = self.tensors.iter().map(&mut load).collect::<Result<Vec<_>>>()?;
        stored.finish()?;
        self.tensors.iter_mut().zip(loaded).for_each(|(tensor, parts)| tensor.parts = parts);
        self.steps = steps;
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        self.tensors.iter().map(|tensor| 4 * tensor.len * tensor.parts.len()).sum()
    }
}
