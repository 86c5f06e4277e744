//! RMSprop, as `torch.optim.RMSprop`: weight decay is part of the gradient (Hinton 2012; centred: Graves 2013).

use super::one_by_one::{Rule, StepOf};

/// `s = alpha s + (1 - alpha) g²;  p -= lr g / (sqrt(s) + eps)`.
#[derive(Debug)]
pub(super) struct RmsProp {
    pub(super) alpha: f64,
    pub(super) eps: f64,
    /// Above 0 the quotient goes into a velocity: `v = momentum v + g / (sqrt(s) + eps);  p -= lr v`.
    pub(super) momentum: f64,
    /// Whether `s - mean²` stands under the root, with the mean kept as `s` is.
    pub(super) centered: bool,
    pub(super) weight_decay: f64,
}

impl Rule for RmsProp {
    fn parts(&self) -> Vec<&'static str> {
        let mut parts = vec!["square_avg"];
        if self.momentum > 0.0 {
            parts.push("momentum");
        }
        if self.centered {
            parts.push("grad_avg");
        }
        parts
    }

    fn update(&self, step: &StepOf, param: &mut [f32], grad: &[f32], state: &mut [&mut [f32]]) {
        let (alpha, enter, eps) = (self.alpha as f32, (1.0 - self.alpha) as f32, self.eps as f32);
        let (momentum, lr) = (self.momentum as f32, step.lr as f32);
        let decay = if step.decay { self.weight_decay as f32 } else { 0.0 };
        let (square, rest) = state.split_first_mut().expect("parts begins with the mean square");
        let (mut velocity, mut mean) = match rest {
            [] => (None, None),
            [one] if self.centered => (None, Some(one)),
            [one] => (Some(one), None),
            [velocity, mean, ..] => (Some(velocity), Some(mean)),
        };
        for (i, (p, &g)) in param.iter_mut().zip(grad).enumerate() {
            let g = g * step.grad_scale + decay * *p;
            square[i] = alpha * square[i] + enter * g * g;
            let mut under = square[i];
            if let Some(mean) = &mut mean {
                mean[i] += enter * (g - mean[i]);
                under -= mean[i] * mean[i];
            }
            let quotient = g / (under.max(0.0).sqrt() + eps);
            *p -= lr
                * match &mut velocity {
                    None => quotient,
                    Some(velocity) => {
                        velocity[i] = momentum * velocity[i] + quotient;
                        velocity[i]
                    }
                };
        }
    }
}
