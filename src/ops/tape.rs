//! Bridges to candle's autograd tape: any op here as a differentiable candle op, for tests and for rare composed code.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Random-looking floats in [-1, 1), the same for the same seed; what the tests of this crate feed their ops.
#[cfg(test)]
pub(crate) fn test_floats(n: usize, seed: u32) -> Vec<f32> {
    use crate::kernels::philox::{philox4x32_10, unit_f32};
    (0..n as u32).map(|i| 2.0 * unit_f32(philox4x32_10([i, 0, 0, 0], [seed, 7])[0]) - 1.0).collect()
}

/// A scalar whose gradient with respect to its input is a given tensor: seeds `backward` with an upstream gradient.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// A zero that, when `backward` is called on it, hands `upstream` to `output`'s tape.
///
/// # Errors
/// candle's, if the shapes differ.
pub fn seed_gradient(output: &Tensor, upstream: &Tensor) -> Result<Tensor> {
    output.apply_op1(Seed(upstream.clone()))
}
