//! Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2) with its momentum in f32 or in 8-bit blocks, as bitsandbytes.
//!
//! The 8-bit state is that of [`super::adamw8bit`]: blocks of 256 share a scale and are coded by the signed dynamic map;
//! tensors under 4,096 elements keep f32.

use rayon::prelude::*;

use super::adamw8bit::{BLOCK, MIN_8BIT_SIZE, encode_block};
use super::one_by_one::{Rule, StepOf};
use super::optimizer::{AdamHyper, NamedState, Optimizer, ParamSlot, Stored, TensorSize, check_slots};
use crate::error::Result;
use crate::quant::DynamicMap;

/// Blocks of a task.
const BLOCKS: usize = 32;

/// `p -= lr (sign(beta1 m + (1 - beta1) g) + decay p);  m = beta2 m + (1 - beta2) g`.
#[derive(Debug)]
pub(super) struct Lion {
    pub(super) hyper: AdamHyper,
}

impl Rule for Lion {
    fn parts(&self) -> Vec<&'static str> {
        vec!["exp_avg"]
    }

    fn update(&self, step: &StepOf, param: &mut [f32], grad: &[f32], state: &mut [&mut [f32]]) {
        let [m] = state else { unreachable!("one part") };
        let AdamHyper { beta1, beta2, weight_decay, .. } = self.hyper;
        let (enter1, enter2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let (beta1, beta2, lr) = (beta1 as f32, beta2 as f32, step.lr as f32);
        let keep = if step.decay { (1.0 - step.lr * weight_decay) as f32 } else { 1.0 };
        for ((p, &g), m) in param.iter_mut().zip(grad).zip(m.iter_mut()) {
            let g = g * step.grad_scale;
            let direction = *m * beta1 + g * enter1;
            // Unlike signum, torch's sign of 0 is 0.
            let sign = f32::from(i8::from(direction > 0.0) - i8::from(direction < 0.0));
            *p = *p * keep - lr * sign;
            *m = *m * beta2 + g * enter2;
        }
    }
}

/// The momentum of one tensor.
#[derive(Debug)]
enum State {
    Small(Vec<f32>),
    Large { codes: Vec<u8>, absmax: Vec<f32> },
}

impl State {
    fn new(len: usize) -> Self {
        if len < MIN_8BIT_SIZE {
            return Self::Small(vec![0.0; len]);
        }
        Self::Large { codes: vec![0; len], absmax: vec![0.0; len.div_ceil(BLOCK)] }
    }

    fn len(&self) -> usize {
        match self {
            Self::Small(m) => m.len(),
            Self::Large { codes, .. } => codes.len(),
        }
    }
}

/// Lion with 8-bit state; see [`super::optimizer::build`].
#[derive(Debug)]
pub(super) struct Lion8bit {
    rule: Lion,
    steps: u64,
    tensors: Vec<(String, State)>,
}

impl Lion8bit {
    pub(super) fn new(hyper: AdamHyper, sizes: &[TensorSize]) -> Self {
        let tensors = sizes.iter().map(|(name, shape)| (name.clone(), State::new(shape.iter().product()))).collect();
        Self { rule: Lion { hyper }, steps: 0, tensors }
    }
}

impl Optimizer for Lion8bit {
    fn step(&mut self, params: &mut [ParamSlot<'_>], grad_scale: f32) -> Result<()> {
        check_slots(params, self.tensors.iter().map(|(name, state)| (name.as_str(), state.len())))?;
        self.steps += 1;
        let (t, rule, map) = (self.steps, &self.rule, DynamicMap::signed());
        params.par_iter_mut().zip(&mut self.tensors).for_each(|(slot, (_, state))| {
            let step = StepOf { t, lr: slot.lr, grad_scale, decay: slot.decay };
            let (codes, absmax) = match state {
                State::Small(m) => return rule.update(&step, slot.data, slot.grad, &mut [m]),
                State::Large { codes, absmax } => (codes, absmax),
            };
            let task = BLOCKS * BLOCK;
            slot.data
                .par_chunks_mut(task)
                .zip(slot.grad.par_chunks(task))
                .zip(codes.par_chunks_mut(task).zip(absmax.par_chunks_mut(BLOCKS)))
                .for_each(|((param, grad), (codes, absmax))| {
                    let blocks = param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
                    for ((param, grad), (codes, absmax)) in blocks.zip(codes.chunks_mut(BLOCK).zip(absmax)) {
                        let mut m = [0f32; BLOCK];
                        let m = &mut m[..param.len()];
                        m.iter_mut().zip(&*codes).for_each(|(m, &code)| *m = map.decode(code) * *absmax);
                        rule.update(&step, param, grad, &mut [m]);
                        *absmax = encode_block(m, map, codes);
                    }
                });
        });
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<NamedState<'_>> {
        let mut state = Vec::with_capacity(2 * self.tensors.len());
        for (name, tensor) in &self.tensors {
            match tensor {
                State::Small(m) => state.push(NamedState::f32(name, "exp_avg", m)),
                State::Large { codes, absmax } => {
                    state.push(NamedState::u8(name, "state1", codes));
                    state.push(NamedState::f32(name, "absmax1", absmax));
                }
            }
        }
        state
    }

    fn load_state(&mut self, steps: u64, state: Vec<NamedState<'_>>) -> Result<()> {
        let mut stored = Stored::new(state);
        let mut load = |name: &str, len: usize| {
            if len < MIN_8BIT_SIZE {
                return Ok(State::Small(stored.take_f32(name, "exp_avg", len)?));
            }
            let codes = stored.take_u8(name, "state1", len)?;
            Ok(State::Large { codes, absmax: stored.take_f32(name, "absmax1", len.div_ceil(BLOCK))? })
        };
        let tensors =
            self.tensors.iter().map(|(name, old)| Ok((name.clone(), load(name, old.len())?))).collect::<Result<_>>()?;
        stored.finish()?;
        self.tensors = tensors;
        self.steps = steps;
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        let bytes = |state: &State| match state {
            State::Small(m) => 4 * m.len(),
            State::Large { codes, absmax } => codes.len() + 4 * absmax.len(),
        };
        self.tensors.iter().map(|(_, state)| bytes(state)).sum()
    }
}
