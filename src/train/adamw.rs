//! AdamW (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim.AdamW`.

use super::one_by_one::{Rule, StepOf};
use super::optimizer::AdamHyper;
use crate::kernels::elementwise::AdamStep;

/// `p = keep p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`, m and v the decaying means of g and g².
#[derive(Debug)]
pub(super) struct AdamW {
    pub(super) hyper: AdamHyper,
}

impl AdamW {
    /// The scalars of a step. Computed in f64 and rounded once, as PyTorch does with Python floats.
    fn scalars(&self, step: &StepOf) -> AdamStep {
        let (AdamHyper { beta1, beta2, eps, weight_decay }, t) = (self.hyper, step.t as f64);
        AdamStep {
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            eps: eps as f32,
            correction2_sqrt: (1.0 - beta2.powf(t)).sqrt() as f32,
            step_size: (-step.lr / (1.0 - beta1.powf(t))) as f32,
            keep: if step.decay { (1.0 - step.lr * weight_decay) as f32 } else { 1.0 },
            grad_scale: step.grad_scale,
        }
    }
}

impl Rule for AdamW {
    fn parts(&self) -> Vec<&'static str> {
        vec!["exp_avg", "exp_avg_sq"]
    }

    fn update(&self, step: &StepOf, param: &mut [f32], grad: &[f32], state: &mut [&mut [f32]]) {
        let [m, v] = state else { unreachable!("two parts") };
        (step.kernels.adamw_row)(&self.scalars(step), param, grad, m, v);
    }
}
