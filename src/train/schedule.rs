//! Learning rates over the steps of a run, as transformers' `get_scheduler` gives them.

use serde::{Deserialize, Serialize};

pub use crate::config::ScheduleKind;
use crate::config::schedule::Shape;

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

    /// What `peak` is multiplied by; embeddings with a rate of their own multiply that.
    pub fn factor(&self, done: usize) -> f64 {
        use std::f64::consts::PI;
        let (warmup, done) = (self.warmup_steps as f64, done as f64);
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let remaining = self.total_steps as f64 - done;
        let progress = (done - warmup) / decay_steps;
        let wave = |cycles: f64, progress: f64| 0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos());
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::WarmupStableDecay { warmup_type, min_lr_ratio, .. } if done < warmup => {
                let risen = match warmup_type {
                    Shape::Linear => done / warmup,
                    Shape::Cosine => 0.5 * (1.0 - (PI * done / warmup).cos()),
                    Shape::OneMinusSqrt => 1.0 - (1.0 - done / warmup).sqrt(),
                };
                between(min_lr_ratio, risen)
            }
            _ if done < warmup => done / warmup,
            ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear => (remaining / decay_steps).max(0.0),
            ScheduleKind::Cosine { num_cycles } => wave(num_cycles, progress).max(0.0),
            ScheduleKind::CosineWithMinLr { num_cycles, min_lr_rate } => {
                between(min_lr_rate, wave(num_cycles, progress)).max(0.0)
            }
            ScheduleKind::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            ScheduleKind::CosineWithRestarts { num_cycles } => wave(0.5, (num_cycles * progress) % 1.0).max(0.0),
            ScheduleKind::Polynomial { lr_end, .. } if remaining < 0.0 => lr_end / self.peak,
            ScheduleKind::Polynomial { power, lr_end } => {
                ((self.peak - lr_end) * (1.0 - progress).max(0.0).powf(power) + lr_end) / self.peak
            }
            ScheduleKind::InverseSqrt { timescale } => {
                let unset = if self.warmup_steps == 0 { 10_000.0 } else { warmup };
                let timescale = timescale.unwrap_or(unset);
                1.0 / ((done + timescale - warmup) / timescale).sqrt()
            }
            ScheduleKind::WarmupStableDecay {
                num_decay_steps,
                num_stable_steps,
                decay_type,
                min_lr_ratio,
                num_cycles,
                ..
            } => {
                let decay = num_decay_steps as f64;
                let stable = num_stable_steps.map_or(self.total_steps as f64 - warmup - decay, |steps| steps as f64);
                let fallen = (done - warmup - stable) / decay.max(1.0);
                if done < warmup + stable {
                    1.0
                } else if done >= warmup + stable + decay {
                    min_lr_ratio
                } else {
                    let left = match decay_type {
                        Shape::Linear => 1.0 - fallen,
                        Shape::Cosine => wave(num_cycles, fallen),
                        Shape::OneMinusSqrt => 1.0 - fallen.sqrt(),
                    };
                    between(min_lr_ratio, left).max(0.0)
                }
            }
        }
    }
}

/// `share` of the way from `least` to 1.
fn between(least: f64, share: f64) -> f64 {
    share * (1.0 - least) + least
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::{Map, Value};

    fn rates(kind: ScheduleKind, warmup_steps: usize, total_steps: usize, at: &[usize]) -> Vec<f64> {
        let schedule = Schedule { kind, peak: 2e-4, warmup_steps, total_steps };
        at.iter().map(|&done| schedule.lr_at(done)).collect()
    }

    #[test]
    fn equals_transformers() {
        #[derive(Deserialize)]
        struct Case {
            name: String,
            #[serde(default)]
            kwargs: Map<String, Value>,
            warmup: usize,
            total: usize,
            lr: f64,
            rates: Vec<f64>,
        }
        #[derive(Deserialize)]
        struct File {
            cases: Vec<Case>,
        }
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/schedules.json");
        let file: File = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(file.cases.len(), 60);
        for Case { name, kwargs, warmup, total, lr, rates } in file.cases {
            let kind = ScheduleKind::resolve(&name, &kwargs, lr).unwrap();
            let schedule = Schedule { kind, peak: lr, warmup_steps: warmup, total_steps: total };
            for (done, want) in rates.into_iter().enumerate() {
                // 1e-12 of the peak: cosines and powers of two maths libraries.
                let got = schedule.lr_at(done);
                assert!((got - want).abs() < 1e-12 * lr, "{kind:?} {warmup} {total} at {done}: {got}, not {want}");
            }
        }
        // Past the end, from transformers with lr 2e-4, warm-up 5 of 60 steps, 70 steps done.
        let cosine = ScheduleKind::Cosine { num_cycles: 0.5 };
        assert_eq!(rates(ScheduleKind::Linear, 5, 60, &[70]), [0.0]);
        assert!((rates(cosine, 5, 60, &[70])[0] - 1.587_464_671_688_188e-5).abs() < 1e-18);
    }

    #[test]
    fn edges_stay_finite() {
        for (name, kwargs) in [
            ("linear", "{}"),
            ("cosine", "{}"),
            ("cosine_with_restarts", r#"{"num_cycles": 3}"#),
            ("cosine_with_min_lr", r#"{"min_lr_rate": 0.1}"#),
            ("polynomial", r#"{"power": 0.5}"#),
            ("constant", "{}"),
            ("constant_with_warmup", "{}"),
            ("inverse_sqrt", "{}"),
            ("warmup_stable_decay", r#"{"num_decay_steps": 0}"#),
            ("warmup_stable_decay", r#"{"num_decay_steps": 7, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"}"#),
        ] {
            let kind = ScheduleKind::resolve(name, &serde_json::from_str(kwargs).unwrap(), 2e-4).unwrap();
            for (warmup, total) in [(0, 0), (0, 1), (1, 1), (9, 3)] {
                for lr in rates(kind, warmup, total, &[0, 1, 2, 3, 9, 100]) {
                    assert!((0.0..=2e-4).contains(&lr), "{kind:?} {warmup} {total}: {lr}");
                }
            }
        }
    }
}
