//! AdamW with block-wise 8-bit state, by the rules of bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).
//!
//! Blocks of 256 elements share a scale for each moment; the first is coded by the signed dynamic map, the second by the
//! unsigned one. A step decodes a block, updates it and the parameters in f32, and codes it again: the largest magnitude
//! becomes the scale, each element the nearest entry of the map. Tensors under 4,096 elements keep f32 state.
//!
//! Backends of bitsandbytes differ in details that vanish in the noise of 8 bits; ours is its default one: weight decay
//! before the update (its CUDA kernel: after), a tie to the lower code, no move of a code that lost its sign.

use rayon::prelude::*;

use super::adamw::Moments;
use super::optimizer::{AdamHyper, NamedState, Optimizer, ParamSlot, Stored, TensorSize, adam_step, check_slots};
use crate::error::Result;
use crate::kernels::elementwise::AdamStep;
use crate::kernels::{self, Kernels};
use crate::quant::DynamicMap;

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// Tensors with fewer elements keep f32 state (`min_8bit_size` of bitsandbytes).
pub const MIN_8BIT_SIZE: usize = 4_096;

/// Blocks of a task.
const BLOCKS: usize = 32;

/// Smallest scale that is inverted, so that a block of zeros gives no NaN.
const MIN_ABSMAX: f32 = 1e-38;

/// The two moments of one tensor in 8 bits.
#[derive(Debug)]
struct Codes {
    /// First moment, [`DynamicMap::signed`].
    state1: Vec<u8>,
    absmax1: Vec<f32>,
    /// Second moment, [`DynamicMap::unsigned`].
    state2: Vec<u8>,
    absmax2: Vec<f32>,
}

impl Codes {
    fn new(len: usize) -> Self {
        // Code 0 is not 0.0, but times an absmax of 0 it is.
        let blocks = len.div_ceil(BLOCK);
        Self { state1: vec![0; len], absmax1: vec![0.0; blocks], state2: vec![0; len], absmax2: vec![0.0; blocks] }
    }

    fn update(&mut self, kernels: &Kernels, param: &mut [f32], grad: &[f32], step: &AdamStep) {
        let task = BLOCKS * BLOCK;
        param
            .par_chunks_mut(task)
            .zip(grad.par_chunks(task))
            .zip(self.state1.par_chunks_mut(task).zip(self.absmax1.par_chunks_mut(BLOCKS)))
            .zip(self.state2.par_chunks_mut(task).zip(self.absmax2.par_chunks_mut(BLOCKS)))
            .for_each(|(((param, grad), (state1, absmax1)), (state2, absmax2))| {
                let blocks = param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
                let first = state1.chunks_mut(BLOCK).zip(absmax1);
                let second = state2.chunks_mut(BLOCK).zip(absmax2);
                for (((param, grad), (codes1, absmax1)), (codes2, absmax2)) in blocks.zip(first).zip(second) {
                    update_block(kernels, param, grad, (codes1, absmax1), (codes2, absmax2), step);
                }
            });
    }
}

/// One block: decode both moments, update, code them again.
fn update_block(
    kernels: &Kernels,
    param: &mut [f32],
    grad: &[f32],
    (codes1, absmax1): (&mut [u8], &mut f32),
    (codes2, absmax2): (&mut [u8], &mut f32),
    step: &AdamStep,
) {
    let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
    let (m, v) = (&mut m[..param.len()], &mut v[..param.len()]);
    for (m, &code) in m.iter_mut().zip(&*codes1) {
        *m = signed.decode(code) * *absmax1;
    }
    for (v, &code) in v.iter_mut().zip(&*codes2) {
        *v = unsigned.decode(code) * *absmax2;
    }
    (kernels.adamw_row)(step, param, grad, m, v);
    *absmax1 = encode_block(m, signed, codes1);
    *absmax2 = encode_block(v, unsigned, codes2);
}

/// Codes `values` by their largest magnitude, which it returns.
pub(super) fn encode_block(values: &[f32], map: &DynamicMap, codes: &mut [u8]) -> f32 {
    let absmax = values.iter().fold(0f32, |max, x| max.max(x.abs()));
    let inverse = 1.0 / absmax.max(MIN_ABSMAX);
    for (code, x) in codes.iter_mut().zip(values) {
        *code = map.encode(x * inverse);
    }
    absmax
}

/// The state of one tensor.
#[derive(Debug)]
enum State {
    Small(Moments),
    Large(Codes),
}

impl State {
    fn new(len: usize) -> Self {
        if len < MIN_8BIT_SIZE { Self::Small(Moments::new(len)) } else { Self::Large(Codes::new(len)) }
    }

    fn len(&self) -> usize {
        match self {
            Self::Small(moments) => moments.len(),
            Self::Large(codes) => codes.state1.len(),
        }
    }
}

/// The optimizer; see [`super::optimizer::build`].
#[derive(Debug)]
pub struct AdamW8bit {
    hyper: AdamHyper,
    steps: u64,
    tensors: Vec<(String, State)>,
}

impl AdamW8bit {
    /// Zero moments for tensors of these names and shapes.
    pub fn new(hyper: AdamHyper, sizes: &[TensorSize]) -> Self {
        let tensors = sizes.iter().map(|(name, shape)| (name.clone(), State::new(shape.iter().product()))).collect();
        Self { hyper, steps: 0, tensors }
    }
}

impl Optimizer for AdamW8bit {
    fn step(&mut self, params: &mut [ParamSlot<'_>], grad_scale: f32) -> Result<()> {
        check_slots(params, self.tensors.iter().map(|(name, state)| (name.as_str(), state.len())))?;
        self.steps += 1;
        let (hyper, steps) = (&self.hyper, self.steps);
        let kernels = kernels::active()?;
        params.par_iter_mut().zip(&mut self.tensors).for_each(|(slot, (_, state))| {
            let step = adam_step(hyper, steps, slot, grad_scale);
            match state {
                State::Small(moments) => moments.update(kernels, slot.data, slot.grad, &step),
                State::Large(codes) => codes.update(kernels, slot.data, slot.grad, &step),
            }
        });
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<NamedState<'_>> {
        let mut state = Vec::with_capacity(4 * self.tensors.len());
        for (name, tensor) in &self.tensors {
            match tensor {
                State::Small(moments) => moments.state(name, &mut state),
                State::Large(codes) => state.extend([
                    NamedState::u8(name, "state1", &codes.state1),
                    NamedState::f32(name, "absmax1", &codes.absmax1),
                    NamedState::u8(name, "state2", &codes.state2),
                    NamedState::f32(name, "absmax2", &codes.absmax2),
                ]),
            }
        }
        state
    }

    fn load_state(&mut self, steps: u64, state: Vec<NamedState<'_>>) -> Result<()> {
        let mut stored = Stored::new(state);
        let mut load = |name: &str, len: usize| {
            if len < MIN_8BIT_SIZE {
                return Ok(State::Small(Moments::stored(name, len, &mut stored)?));
            }
            let blocks = len.div_ceil(BLOCK);
            Ok(State::Large(Codes {
                state1: stored.take_u8(name, "state1", len)?,
                absmax1: stored.take_f32(name, "absmax1", blocks)?,
                state2: stored.take_u8(name, "state2", len)?,
                absmax2: stored.take_f32(name, "absmax2", blocks)?,
            }))
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
            State::Small(moments) => moments.bytes(),
            State::Large(codes) => 2 * codes.state1.len() + 2 * size_of_val(codes.absmax1.as_slice()),
        };
        self.tensors.iter().map(|(_, state)| bytes(state)).sum()
    }
}
