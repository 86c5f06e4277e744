//! Adagrad, as `torch.optim.Adagrad`: weight decay is part of the gradient (Duchi et al. 2011).

use super::one_by_one::{Rule, StepOf};

/// `s += g²;  p -= lr / (1 + (t - 1) lr_decay) · g / (sqrt(s) + eps)`.
#[derive(Debug)]
pub(super) struct Adagrad {
    pub(super) eps: f64,
    pub(super) lr_decay: f64,
    pub(super) weight_decay: f64,
}

impl Rule for Adagrad {
    fn parts(&self) -> Vec<&'static str> {
        vec!["sum"]
    }

    fn update(&self, step: &StepOf, param: &mut [f32], grad: &[f32], state: &mut [&mut [f32]]) {
        let [sum] = state else { unreachable!("one part") };
        let lr = (step.lr / (1.0 + (step.t - 1) as f64 * self.lr_decay)) as f32;
        let eps = self.eps as f32;
        let decay = if step.decay { self.weight_decay as f32 } else { 0.0 };
        for ((p, &g), s) in param.iter_mut().zip(grad).zip(sum.iter_mut()) {
            let g = g * step.grad_scale + decay * *p;
            *s += g * g;
            *p -= lr * (g / (s.sqrt() + eps));
        }
    }
}
