//! Learning rates over the steps of a run, as transformers' `get_scheduler` gives them.

use serde::{Deserialize, Serialize};

pub use crate::config::ScheduleKind;

/// A schedule ready to run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Its shape.
    pub kind: ScheduleKind,
    /// The learning rate at its highest.
    pub peak: f64,
    /// Steps over which it rises from zero in a straight line.
    pub warmup_steps: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
}

impl Schedule {
    /// The learning rate of the optimizer step that follows `done` finished ones; 0 gives that of the first step.
    pub fn lr_at(&self, done: usize) -> f64 {
        self.peak * self.factor(done)
    }

    fn factor(&self, done: usize) -> f64 {
        if self.kind == ScheduleKind::Constant {
            return 1.0;
        }
        if done < self.warmup_steps {
            return done as f64 / self.warmup_steps.max(1) as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear => self.total_steps.saturating_sub(done) as f64 / decay_steps,
            ScheduleKind::Cosine => {
                let progress = (done - self.warmup_steps) as f64 / decay_steps;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn rates(kind: ScheduleKind, warmup_steps: usize, total_steps: usize, at: &[usize]) -> Vec<f64> {
        let schedule = Schedule { kind, peak: 2e-4, warmup_steps, total_steps };
        at.iter().map(|&done| schedule.lr_at(done)).collect()
    }

    #[test]
    fn equals_transformers() {
        #[derive(Deserialize)]
        struct Case {
            name: ScheduleKind,
            warmup: usize,
            total: usize,
            factors: Vec<f64>,
        }
        #[derive(Deserialize)]
        struct File {
            cases: Vec<Case>,
        }
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/schedules.json");
        let file: File = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(file.cases.len(), 16);
        for Case { name, warmup, total, factors } in file.cases {
            let schedule = Schedule { kind: name, peak: 1.0, warmup_steps: warmup, total_steps: total };
            for (done, want) in factors.into_iter().enumerate() {
                // 1e-15: cosines of two maths libraries.
                assert!((schedule.lr_at(done) - want).abs() < 1e-15, "{name:?} {warmup} {total} at {done}");
            }
        }
        // Past the end, from transformers with lr 2e-4, warm-up 5 of 60 steps, 70 steps done.
        assert_eq!(rates(ScheduleKind::Linear, 5, 60, &[70]), [0.0]);
        assert!((rates(ScheduleKind::Cosine, 5, 60, &[70])[0] - 1.587_464_671_688_188e-5).abs() < 1e-18);
    }

    #[test]
    fn edges_stay_finite() {
        for kind in
            [ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::Constant, ScheduleKind::ConstantWithWarmup]
        {
            for (warmup, total) in [(0, 0), (0, 1), (1, 1), (9, 3)] {
                for lr in rates(kind, warmup, total, &[0, 1, 2, 3, 9, 100]) {
                    assert!((0.0..=2e-4).contains(&lr), "{kind:?} {warmup} {total}: {lr}");
                }
            }
        }
    }
}
