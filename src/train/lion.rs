//! Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), as bitsandbytes.

use super::one_by_one::{Rule, StepOf};
use super::optimizer::AdamHyper;

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
