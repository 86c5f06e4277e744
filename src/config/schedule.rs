//! The course of the learning rate: its names, and the numbers that go with each.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::nearest::closest_name;
use crate::error::{Error, Result};

/// How the learning rate goes after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Down to zero in a straight line.
    Linear,
    /// Along a cosine (Loshchilov and Hutter 2017, without restarts).
    Cosine {
        /// Waves; a half goes down to zero.
        num_cycles: f64,
    },
    /// Down to zero along half a cosine again and again (Loshchilov and Hutter 2017).
    CosineWithRestarts {
        /// Times it goes down.
        num_cycles: f64,
    },
    /// Along half a cosine to a share of the highest rate.
    CosineWithMinLr {
        /// Waves; a half goes down to the end.
        num_cycles: f64,
        /// The share.
        min_lr_rate: f64,
    },
    /// Down to `lr_end` along a power of what remains of the run.
    Polynomial {
        /// The power; 1 is a straight line.
        power: f64,
        /// The rate at the end.
        lr_end: f64,
    },
    /// No change and no warm-up.
    Constant,
    /// No change.
    ConstantWithWarmup,
    /// As one over the root of the steps (Zhai et al. 2022, "Scaling vision transformers").
    InverseSqrt {
        /// Steps after which it has fallen to about 0.7; `None`: those of the warm-up, or 10,000 without one.
        timescale: Option<f64>,
    },
    /// Up, level, and down at the end (Hu et al. 2024, "MiniCPM", section 4).
    WarmupStableDecay {
        /// Steps it goes down.
        num_decay_steps: usize,
        /// Steps it stays level; `None`: all that remain.
        num_stable_steps: Option<usize>,
        /// How it rises.
        warmup_type: Shape,
        /// How it falls.
        decay_type: Shape,
        /// Where it begins and ends, as a share of the highest rate.
        min_lr_ratio: f64,
        /// Waves of a cosine decay.
        num_cycles: f64,
    },
}

/// The shape of a rise or fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shape {
    /// A straight line.
    #[serde(rename = "linear")]
    Linear,
    /// Half a cosine.
    #[serde(rename = "cosine")]
    Cosine,
    /// One minus a root.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// Every schedule by transformers' name, with the arguments it takes.
const SCHEDULES: [(&str, &[&str]); 9] = [
    ("linear", &[]),
    ("cosine", &["num_cycles"]),
    ("cosine_with_restarts", &["num_cycles"]),
    ("cosine_with_min_lr", &["num_cycles", "min_lr", "min_lr_rate"]),
    ("polynomial", &["power", "lr_end"]),
    ("constant", &[]),
    ("constant_with_warmup", &[]),
    ("inverse_sqrt", &["timescale"]),
    (
        "warmup_stable_decay",
        &["num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"],
    ),
];

impl ScheduleKind {
    /// The schedule of a name as transformers spells it.
    ///
    /// kwargs: `lr_scheduler_kwargs`; peak: the highest rate.
    ///
    /// # Errors
    /// [`Error::Config`] for a schedule that is not there, an argument it does not take, or one out of range.
    pub fn resolve(name: &str, kwargs: &Map<String, Value>, peak: f64) -> Result<Self> {
        let Some((name, known)) = SCHEDULES.iter().find(|(known, _)| *known == name) else {
            let names: Vec<_> = SCHEDULES.iter().map(|(name, _)| *name).collect();
            let near =
                closest_name(name, names.iter().copied()).map_or(String::new(), |n| format!("; did you mean {n}?"));
            let expected = format!("not there; expected one of {}{near}", names.join(", "));
            return Err(Error::config("lr_scheduler_type", name, expected));
        };
        if let Some(unknown) = kwargs.keys().find(|key| !known.contains(&key.as_str())) {
            let expected = if known.is_empty() { "nothing".to_owned() } else { known.join(", ") };
            return Err(wrong(unknown, format!("{name} takes {expected}")));
        }
        let args = Arguments(kwargs);
        let at_least_0 = |x: f64| x >= 0.0;
        let share = |x: f64| (0.0..=1.0).contains(&x);
        Ok(match *name {
            "linear" => Self::Linear,
            "cosine" => {
                Self::Cosine { num_cycles: args.number("num_cycles", at_least_0, "at least 0")?.unwrap_or(0.5) }
            }
            "cosine_with_restarts" => {
                let num_cycles = args.whole("num_cycles", 1)?.unwrap_or(1) as f64;
                Self::CosineWithRestarts { num_cycles }
            }
            "cosine_with_min_lr" => Self::CosineWithMinLr {
                num_cycles: args.number("num_cycles", at_least_0, "at least 0")?.unwrap_or(0.5),
                min_lr_rate: match (
                    args.number("min_lr", |x| (0.0..=peak).contains(&x), "from 0 to learning_rate")?,
                    args.number("min_lr_rate", share, "from 0 to 1")?,
                ) {
                    (None, Some(rate)) => rate,
                    (Some(lr), None) => lr / peak.max(f64::MIN_POSITIVE),
                    _ => return Err(wrong("min_lr", "cosine_with_min_lr needs min_lr or min_lr_rate, one of them")),
                },
            },
            "polynomial" => {
                let lr_end = args.number("lr_end", at_least_0, "at least 0")?.unwrap_or(1e-7);
                if lr_end >= peak {
                    return Err(wrong("lr_end", format!("{lr_end} is not below learning_rate = {peak}")));
                }
                Self::Polynomial { power: args.number("power", |x| x > 0.0, "above 0")?.unwrap_or(1.0), lr_end }
            }
            "constant" => Self::Constant,
            "constant_with_warmup" => Self::ConstantWithWarmup,
            "inverse_sqrt" => Self::InverseSqrt { timescale: args.number("timescale", |x| x > 0.0, "above 0")? },
            _ => Self::WarmupStableDecay {
                num_decay_steps: args
                    .whole("num_decay_steps", 0)?
                    .ok_or_else(|| wrong("num_decay_steps", "warmup_stable_decay needs the steps of its fall"))?,
                num_stable_steps: args.whole("num_stable_steps", 0)?,
                warmup_type: args.shape("warmup_type")?.unwrap_or(Shape::Linear),
                decay_type: args.shape("decay_type")?.unwrap_or(Shape::Cosine),
                min_lr_ratio: args.number("min_lr_ratio", share, "from 0 to 1")?.unwrap_or(0.0),
                num_cycles: args.number("num_cycles", at_least_0, "at least 0")?.unwrap_or(0.5),
            },
        })
    }
}

/// An error about one argument.
fn wrong(name: &str, problem: impl std::fmt::Display) -> Error {
    Error::config("lr_scheduler_kwargs", name, problem.to_string())
}

/// `lr_scheduler_kwargs`; null counts as not written.
struct Arguments<'a>(&'a Map<String, Value>);

impl Arguments<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn number(&self, name: &str, allowed: impl Fn(f64) -> bool, expected: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64().filter(|&x| x.is_finite() && allowed(x)) {
            Some(x) => Ok(Some(x)),
            None => Err(wrong(name, format!("{value} is not a number {expected}"))),
        }
    }

    fn whole(&self, name: &str, least: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let whole =
            value.as_u64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && *x >= 0.0).map(|x| x as u64));
        match whole.filter(|&n| n >= least && n < 1 << 50) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(wrong(name, format!("{value} is not a whole number, at least {least}"))),
        }
    }

    fn shape(&self, name: &str) -> Result<Option<Shape>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match serde_json::from_value(value.clone()) {
            Ok(shape) => Ok(Some(shape)),
            Err(_) => Err(wrong(name, format!("{value} is not linear, cosine or 1-sqrt"))),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    fn resolve(name: &str, kwargs: &Value) -> Result<ScheduleKind> {
        ScheduleKind::resolve(name, kwargs.as_object().unwrap(), 2e-4)
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        for (name, kind) in [
            ("linear", ScheduleKind::Linear),
            ("cosine", ScheduleKind::Cosine { num_cycles: 0.5 }),
            ("cosine_with_restarts", ScheduleKind::CosineWithRestarts { num_cycles: 1.0 }),
            ("polynomial", ScheduleKind::Polynomial { power: 1.0, lr_end: 1e-7 }),
            ("inverse_sqrt", ScheduleKind::InverseSqrt { timescale: None }),
        ] {
            assert_eq!(resolve(name, &json!({})).unwrap(), kind);
        }
        let cosine = resolve("cosine_with_min_lr", &json!({"min_lr": 2e-5, "min_lr_rate": null})).unwrap();
        let ScheduleKind::CosineWithMinLr { min_lr_rate, .. } = cosine else { panic!("{cosine:?}") };
        assert!((min_lr_rate - 0.1).abs() < 1e-12);
    }

    #[test]
    fn every_wrong_value_is_named() {
        for (name, kwargs, message) in [
            ("polinomial", json!({}), "did you mean polynomial?"),
            ("reduce_lr_on_plateau", json!({}), "lr_scheduler_type = reduce_lr_on_plateau: not there; expected one of"),
            ("linear", json!({"power": 2}), "lr_scheduler_kwargs = power: linear takes nothing"),
            ("cosine", json!({"cycles": 2}), "lr_scheduler_kwargs = cycles: cosine takes num_cycles"),
            ("cosine", json!({"num_cycles": -1}), "num_cycles: -1 is not a number at least 0"),
            ("cosine_with_restarts", json!({"num_cycles": 1.5}), "num_cycles: 1.5 is not a whole number, at least 1"),
            ("cosine_with_min_lr", json!({}), "needs min_lr or min_lr_rate"),
            ("cosine_with_min_lr", json!({"min_lr": 1e-5, "min_lr_rate": 0.1}), "one of them"),
            ("polynomial", json!({"lr_end": 2e-4}), "lr_end: 0.0002 is not below learning_rate = 0.0002"),
            ("polynomial", json!({"power": "2"}), "power: \"2\" is not a number above 0"),
            ("inverse_sqrt", json!({"timescale": 0}), "timescale: 0 is not"),
            ("warmup_stable_decay", json!({}), "num_decay_steps: warmup_stable_decay needs"),
            ("warmup_stable_decay", json!({"num_decay_steps": 3, "decay_type": "steep"}), "decay_type: \"steep\""),
        ] {
            let error = resolve(name, &kwargs).unwrap_err().to_string();
            assert!(error.contains(message), "{name} {kwargs}: {error}");
        }
    }
}
