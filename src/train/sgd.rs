//! Gradient descent with momentum, as `torch.optim.SGD`: weight decay is part of the gradient.

use super::one_by_one::{Rule, StepOf};

/// `v = momentum v + (1 - dampening) g;  p -= lr v`, or without momentum `p -= lr g`.
#[derive(Debug)]
pub(super) struct Sgd {
    pub(super) momentum: f64,
    pub(super) dampening: f64,
    /// `p -= lr (g + momentum v)` instead (Sutskever et al. 2013).
    pub(super) nesterov: bool,
    pub(super) weight_decay: f64,
}

impl Rule for Sgd {
    fn parts(&self) -> Vec<&'static str> {
        if self.momentum == 0.0 { Vec::new() } else { vec!["momentum"] }
    }

    fn update(&self, step: &StepOf, param: &mut [f32], grad: &[f32], state: &mut [&mut [f32]]) {
        let decay = if step.decay { self.weight_decay as f32 } else { 0.0 };
        let lr = step.lr as f32;
        let [velocity] = state else {
            for (p, &g) in param.iter_mut().zip(grad) {
                *p -= lr * (g * step.grad_scale + decay * *p);
            }
            return;
        };
        let momentum = self.momentum as f32;
        // Momentum begins as the first gradient.
        let entering = if step.t == 1 { 1.0 } else { (1.0 - self.dampening) as f32 };
        for ((p, &g), v) in param.iter_mut().zip(grad).zip(velocity.iter_mut()) {
            let g = g * step.grad_scale + decay * *p;
            *v = momentum * *v + entering * g;
            *p -= lr * if self.nesterov { g + momentum * *v } else { *v };
        }
    }
}
