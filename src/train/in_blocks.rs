//! Optimizers with their state in 8 bits, block by block, as bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).
//!
//! Blocks of 256 elements share a scale; the first part of a rule's state is coded by the signed dynamic map, the second,
//! a mean of squares, by the unsigned one. A step decodes a block, updates it and the parameters in f32, and codes it again:
//! the largest magnitude becomes the scale, each element the nearest entry of the map. Tensors under 4,096 elements keep
//! f32 state.
//!
//! Backends of bitsandbytes differ in details that vanish in the noise of 8 bits; ours is its default one: weight decay
//! before the update (its CUDA kernel: after), a tie to the lower code, no move of a code that lost its sign.

use rayon::prelude::*;

use super::one_by_one::{Rule, StepOf};
use super::optimizer::{NamedState, Optimizer, ParamSlot, Stored, TensorSize, check_slots};
use crate::error::Result;
use crate::kernels;
use crate::quant::DynamicMap;

/// Elements that share a scale.
pub(super) const BLOCK: usize = 256;

/// Tensors with fewer elements keep f32 state (`min_8bit_size` of bitsandbytes).
pub(super) const MIN_8BIT_SIZE: usize = 4_096;

/// Blocks of a task.
const BLOCKS: usize = 32;

/// Most parts that a rule may have.
const PARTS: usize = 2;

/// Smallest scale that is inverted, so that a block of zeros gives no NaN.
const MIN_ABSMAX: f32 = 1e-38;

/// The map of a rule's part.
fn map(part: usize) -> &'static DynamicMap {
    if part == 0 { DynamicMap::signed() } else { DynamicMap::unsigned() }
}

/// One part of a tensor's state.
#[derive(Debug)]
struct Coded {
    codes: Vec<u8>,
    /// A scale for each block.
    absmax: Vec<f32>,
}

impl Coded {
    /// Zeros: code 0 is not 0.0, but times an absmax of 0 it is.
    fn new(len: usize) -> Self {
        Self { codes: vec![0; len], absmax: vec![0.0; len.div_ceil(BLOCK)] }
    }
}

/// The state of one tensor, part by part.
#[derive(Debug)]
enum State {
    Small(Vec<Vec<f32>>),
    Large(Vec<Coded>),
}

#[derive(Debug)]
struct Tensor {
    name: String,
    len: usize,
    state: State,
}

/// The optimizer that follows a rule of at most two parts.
#[derive(Debug)]
pub(super) struct InBlocks<R> {
    rule: R,
    steps: u64,
    tensors: Vec<Tensor>,
}

impl<R: Rule> InBlocks<R> {
    /// State of zero for tensors of these names and shapes.
    pub(super) fn new(rule: R, sizes: &[TensorSize]) -> Self {
        let n_parts = rule.parts().len();
        assert!(n_parts <= PARTS, "{n_parts} parts of 8-bit state");
        let tensor = |(name, shape): &TensorSize| {
            let len: usize = shape.iter().product();
            let state = if len < MIN_8BIT_SIZE {
                State::Small(vec![vec![0.0; len]; n_parts])
            } else {
                State::Large((0..n_parts).map(|_| Coded::new(len)).collect())
            };
            Tensor { name: name.clone(), len, state }
        };
        Self { steps: 0, tensors: sizes.iter().map(tensor).collect(), rule }
    }
}

/// Updates a tensor with coded state, on all threads.
fn update(rule: &impl Rule, step: &StepOf, param: &mut [f32], grad: &[f32], parts: &mut [Coded]) {
    let task = BLOCKS * BLOCK;
    // pieces[i]: the i-th piece of every part.
    let mut pieces: Vec<Vec<(&mut [u8], &mut [f32])>> = (0..param.len().div_ceil(task)).map(|_| Vec::new()).collect();
    for part in parts {
        let of_part = part.codes.chunks_mut(task).zip(part.absmax.chunks_mut(BLOCKS));
        pieces.iter_mut().zip(of_part).for_each(|(pieces, piece)| pieces.push(piece));
    }
    param.par_chunks_mut(task).zip(grad.par_chunks(task)).zip(pieces).for_each(|((param, grad), mut pieces)| {
        for (block, (param, grad)) in param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).enumerate() {
            let here = block * BLOCK..block * BLOCK + param.len();
            let mut values = [[0_f32; BLOCK]; PARTS];
            for (part, ((codes, absmax), values)) in pieces.iter().zip(&mut values).enumerate() {
                for (value, &code) in values.iter_mut().zip(&codes[here.clone()]) {
                    *value = map(part).decode(code) * absmax[block];
                }
            }
            let mut state = values.each_mut().map(|values| &mut values[..param.len()]);
            rule.update(step, param, grad, &mut state[..pieces.len()]);
            for (part, ((codes, absmax), values)) in pieces.iter_mut().zip(&state).enumerate() {
                absmax[block] = encode(values, map(part), &mut codes[here.clone()]);
            }
        }
    });
}

/// Codes `values` by their largest magnitude, which it returns.
fn encode(values: &[f32], map: &DynamicMap, codes: &mut [u8]) -> f32 {
    let absmax = values.iter().fold(0f32, |max, x| max.max(x.abs()));
    let inverse = 1.0 / absmax.max(MIN_ABSMAX);
    for (code, x) in codes.iter_mut().zip(values) {
        *code = map.encode(x * inverse);
    }
    absmax
}

impl<R: Rule> Optimizer for InBlocks<R> {
    fn step(&mut self, params: &mut [ParamSlot<'_>], grad_scale: f32) -> Result<()> {
        check_slots(params, self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.len)))?;
        let kernels = kernels::active()?;
        self.steps += 1;
        let (t, rule) = (self.steps, &self.rule);
        params.par_iter_mut().zip(&mut self.tensors).for_each(|(slot, tensor)| {
            let step = StepOf { kernels, t, lr: slot.lr, grad_scale, decay: slot.decay };
            match &mut tensor.state {
                State::Small(parts) => {
                    let mut state: Vec<&mut [f32]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
                    rule.update(&step, slot.data, slot.grad, &mut state);
                }
                State::Large(parts) => update(rule, &step, slot.data, slot.grad, parts),
            }
        });
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<NamedState<'_>> {
        let mut state = Vec::new();
        for Tensor { name, state: of_tensor, .. } in &self.tensors {
            match of_tensor {
                State::Small(parts) => {
                    let names = self.rule.parts();
                    state.extend(names.iter().zip(parts).map(|(part, data)| NamedState::f32(name, part, data)));
                }
                State::Large(parts) => {
                    for (number, part) in (1..).zip(parts) {
                        state.push(NamedState::u8(name, &format!("state{number}"), &part.codes));
                        state.push(NamedState::f32(name, &format!("absmax{number}"), &part.absmax));
                    }
                }
            }
        }
        state
    }

    fn load_state(&mut self, steps: u64, state: Vec<NamedState<'_>>) -> Result<()> {
        let (mut stored, names) = (Stored::new(state), self.rule.parts());
        let mut load = |Tensor { name, len, .. }: &Tensor| -> Result<State> {
            if *len < MIN_8BIT_SIZE {
                let parts = names.iter().map(|part| stored.take_f32(name, part, *len));
                return Ok(State::Small(parts.collect::<Result<_>>()?));
            }
            let parts = (1..=names.len()).map(|number| {
                let codes = stored.take_u8(name, &format!("state{number}"), *len)?;
                let absmax = stored.take_f32(name, &format!("absmax{number}"), len.div_ceil(BLOCK))?;
                Ok(Coded { codes, absmax })
            });
            Ok(State::Large(parts.collect::<Result<_>>()?))
        };
        let loaded = self.tensors.iter().map(&mut load).collect::<Result<Vec<_>>>()?;
        stored.finish()?;
        self.tensors.iter_mut().zip(loaded).for_each(|(tensor, state)| tensor.state = state);
        self.steps = steps;
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| match &tensor.state {
            State::Small(parts) => 4 * tensor.len * parts.len(),
            State::Large(parts) => parts.iter().map(|part| part.codes.len() + 4 * part.absmax.len()).sum(),
        };
        self.tensors.iter().map(bytes).sum()
    }
}
