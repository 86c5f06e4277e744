//! Bridges to candle's autograd tape: any op here as a differentiable candle op, for tests and for rare composed code.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

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

/// One op of this crate as a differentiable candle op of one or two f32 tensors on the CPU.
///
/// `forward` gets the inputs, row-major whatever their layout, and returns the output, whose shape is that of the first
/// input; `backward` gets the inputs and the output's gradient and returns one gradient per input.
pub struct Op<F, B> {
    /// What candle's errors call it.
    pub name: &'static str,
    /// Inputs -> output.
    pub forward: F,
    /// Inputs, gradient of the output -> gradients of the inputs.
    pub backward: B,
}

impl<F, B> Op<F, B>
where
    F: Fn(&[&[f32]]) -> Vec<f32>,
    B: Fn(&[&[f32]], &[f32]) -> Vec<Vec<f32>>,
{
    fn run(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let values = inputs.iter().map(|(storage, layout)| elements(storage, layout)).collect::<Result<Vec<_>>>()?;
        let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        Ok((CpuStorage::F32((self.forward)(&slices)), inputs[0].1.shape().clone()))
    }

    fn gradients(&self, inputs: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let read = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let values = inputs.iter().map(|input| read(input)).collect::<Result<Vec<_>>>()?;
        let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        let gradients = (self.backward)(&slices, &read(upstream)?);
        let back = |(gradient, input): (Vec<f32>, &&Tensor)| Tensor::from_vec(gradient, input.shape(), input.device());
        gradients.into_iter().zip(inputs).map(|pair| back(pair).map(Some)).collect()
    }
}

/// The elements of a view in row-major order.
fn elements(storage: &CpuStorage, layout: &Layout) -> Result<Vec<f32>> {
    let CpuStorage::F32(data) = storage else { candle_core::bail!("expected f32") };
    let at = |mut flat: usize| {
        let mut index = layout.start_offset();
        for (dim, stride) in layout.dims().iter().zip(layout.stride()).rev() {
            index += flat % dim * stride;
            flat /= dim;
        }
        index
    };
    Ok((0..layout.shape().elem_count()).map(|flat| data[at(flat)]).collect())
}

impl<F, B> CustomOp1 for Op<F, B>
where
    F: Fn(&[&[f32]]) -> Vec<f32> + Send + Sync,
    B: Fn(&[&[f32]], &[f32]) -> Vec<Vec<f32>> + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(&[(s, l)])
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients(&[x], upstream)?.swap_remove(0))
    }
}

impl<F, B> CustomOp2 for Op<F, B>
where
    F: Fn(&[&[f32]]) -> Vec<f32> + Send + Sync,
    B: Fn(&[&[f32]], &[f32]) -> Vec<Vec<f32>> + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2)])
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients(&[x, y], upstream)?;
        let second = gradients.pop().flatten();
        Ok((gradients.pop().flatten(), second))
    }
}
