//! The optimizers: their names, and the numbers that go with each.

use serde::{Deserialize, Serialize};

use crate::data::nearest::closest_name;
use crate::error::{Error, Result};

/// The optimizers there are. Betas, epsilon and weight decay are [`AdamHyper`]'s where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// AdamW with f32 state, 8 bytes a parameter.
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with 8-bit state in blocks of 256, 2.03 bytes a parameter.
    #[serde(rename = "adamw_8bit")]
    AdamW8bit,
    /// Adafactor at a given learning rate, one number of state for each row and column; its own epsilons.
    #[serde(rename = "adafactor")]
    Adafactor,
    /// Gradient descent, with 4 bytes of state a parameter if there is momentum.
    #[serde(rename = "sgd")]
    Sgd {
        /// Share of the last update that goes on.
        momentum: f64,
        /// Share of the gradient that does not enter the momentum.
        dampening: f64,
        /// Whether the gradient is looked at where the momentum leads (Sutskever et al. 2013).
        nesterov: bool,
    },
    /// Lion with f32 state, 4 bytes a parameter; no epsilon.
    #[serde(rename = "lion_32bit")]
    Lion,
    /// Lion with 8-bit state in blocks of 256, 1.02 bytes a parameter; no epsilon.
    #[serde(rename = "lion_8bit")]
    Lion8bit,
    /// RMSprop, 4 to 12 bytes a parameter.
    #[serde(rename = "rmsprop")]
    RmsProp {
        /// Decay of the mean square.
        alpha: f64,
        /// Added to its root.
        eps: f64,
        /// Share of the last update that goes on.
        momentum: f64,
        /// Whether the mean is taken off the mean square.
        centered: bool,
    },
    /// Adagrad, 4 bytes a parameter.
    #[serde(rename = "adagrad")]
    Adagrad {
        /// Added to the root of the sum of squares.
        eps: f64,
        /// How fast the learning rate falls with the steps.
        lr_decay: f64,
    },
}

/// Every optimizer by transformers' names; paging makes no difference: on a CPU all memory is main memory.
const NAMES: [(&[&str], Family); 8] = [
    (&["adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused", "paged_adamw", "paged_adamw_32bit"], Family::AdamW),
    (&["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"], Family::AdamW8bit),
    (&["adafactor"], Family::Adafactor),
    (&["sgd"], Family::Sgd),
    (&["lion_32bit", "lion", "paged_lion_32bit", "paged_lion"], Family::Lion),
    (&["lion_8bit", "paged_lion_8bit"], Family::Lion8bit),
    (&["rmsprop"], Family::RmsProp),
    (&["adagrad"], Family::Adagrad),
];

#[derive(Clone, Copy)]
enum Family {
    AdamW,
    AdamW8bit,
    Adafactor,
    Sgd,
    Lion,
    Lion8bit,
    RmsProp,
    Adagrad,
}

impl OptimizerKind {
    /// The optimizer of a name as transformers spells it, with torch's defaults.
    ///
    /// args: `optim_args`, as `momentum=0.9,nesterov=true`.
    ///
    /// # Errors
    /// [`Error::Config`] for an optimizer that is not there, an argument it does not take, or one out of range.
    pub fn resolve(name: &str, args: &str) -> Result<Self> {
        let Some((_, family)) = NAMES.iter().find(|(names, _)| names.contains(&name)) else {
            let near = closest_name(name, NAMES.iter().flat_map(|(names, _)| names.iter().copied()));
            let near = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
            let names: Vec<_> = NAMES.iter().map(|(names, _)| names.last().copied().unwrap_or_default()).collect();
            let expected = format!("not there; expected adamw_torch, adamw_8bit, {}{near}", names[2..].join(", "));
            return Err(Error::config("optim", name, expected));
        };
        let mut args = Arguments::parse(name, args)?;
        let from_0_below_1 = |x: f64| (0.0..1.0).contains(&x);
        let not_negative = |x: f64| x >= 0.0;
        let kind = match family {
            Family::AdamW => Self::AdamW,
            Family::AdamW8bit => Self::AdamW8bit,
            Family::Adafactor => Self::Adafactor,
            Family::Lion => Self::Lion,
            Family::Lion8bit => Self::Lion8bit,
            Family::Sgd => {
                let momentum = args.number("momentum", 0.0, from_0_below_1, "from 0 to below 1")?;
                let dampening = args.number("dampening", 0.0, from_0_below_1, "from 0 to below 1")?;
                let nesterov = args.truth("nesterov")?;
                if nesterov && (momentum == 0.0 || dampening != 0.0) {
                    return Err(wrong("nesterov=true", "needs a momentum and no dampening"));
                }
                Self::Sgd { momentum, dampening, nesterov }
            }
            Family::RmsProp => Self::RmsProp {
                alpha: args.number("alpha", 0.99, from_0_below_1, "from 0 to below 1")?,
                eps: args.number("eps", 1e-8, |x| x > 0.0, "above 0")?,
                momentum: args.number("momentum", 0.0, from_0_below_1, "from 0 to below 1")?,
                centered: args.truth("centered")?,
            },
            Family::Adagrad => Self::Adagrad {
                eps: args.number("eps", 1e-10, |x| x > 0.0, "above 0")?,
                lr_decay: args.number("lr_decay", 0.0, not_negative, "at least 0")?,
            },
        };
        args.finish()?;
        Ok(kind)
    }
}

/// The settings of Adam with decoupled weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamHyper {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Share of a parameter taken away in a step, times the learning rate; not from norms and biases.
    pub weight_decay: f64,
}

fn wrong(written: &str, expected: impl Into<String>) -> Error {
    Error::config("optim_args", written, expected)
}

/// What is left of `optim_args`, and the names that were asked for.
struct Arguments {
    optim: String,
    left: Vec<(String, String)>,
    known: Vec<&'static str>,
}

impl Arguments {
    fn parse(optim: &str, text: &str) -> Result<Self> {
        let left = text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .map(|part| match part.split_once('=') {
                Some((name, value)) => Ok((name.trim().to_owned(), value.trim().to_owned())),
                None => Err(wrong(part, "expected name=value, separated by commas")),
            })
            .collect::<Result<_>>()?;
        Ok(Self { optim: optim.to_owned(), left, known: Vec::new() })
    }

    fn take(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        let at = self.left.iter().position(|(left, _)| left == name)?;
        Some(self.left.remove(at).1)
    }

    fn number(
        &mut self,
        name: &'static str,
        default: f64,
        allowed: impl Fn(f64) -> bool,
        expected: &str,
    ) -> Result<f64> {
        let Some(text) = self.take(name) else { return Ok(default) };
        match text.parse().ok().filter(|x: &f64| x.is_finite() && allowed(*x)) {
            Some(x) => Ok(x),
            None => Err(wrong(&format!("{name}={text}"), format!("expected a number {expected}"))),
        }
    }

    fn truth(&mut self, name: &'static str) -> Result<bool> {
        let Some(text) = self.take(name) else { return Ok(false) };
        match text.to_lowercase().as_str() {
            "true" | "1" | "yes" => Ok(true),
            "false" | "0" | "no" => Ok(false),
            _ => Err(wrong(&format!("{name}={text}"), "expected true or false")),
        }
    }

    /// # Errors
    /// [`Error::Config`] if something was written that nobody asked for.
    fn finish(self) -> Result<()> {
        let Some((name, value)) = self.left.first() else { return Ok(()) };
        let takes = if self.known.is_empty() { "nothing".to_owned() } else { self.known.join(", ") };
        let besides = if name == "weight_decay" { "; set weight_decay itself" } else { "" };
        Err(wrong(&format!("{name}={value}"), format!("{} takes {takes}{besides}", self.optim)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn names_and_arguments() {
        let resolve = |name, args| OptimizerKind::resolve(name, args).unwrap();
        for name in ["adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"] {
            assert_eq!(resolve(name, ""), OptimizerKind::AdamW);
        }
        for name in ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"] {
            assert_eq!(resolve(name, ""), OptimizerKind::AdamW8bit);
        }
        assert_eq!(resolve("paged_lion_8bit", ""), OptimizerKind::Lion8bit);
        assert_eq!(resolve("paged_lion_32bit", ""), OptimizerKind::Lion);
        let sgd = OptimizerKind::Sgd { momentum: 0.9, dampening: 0.0, nesterov: true };
        assert_eq!(resolve("sgd", "momentum=0.9, nesterov=True"), sgd);
        let rmsprop = OptimizerKind::RmsProp { alpha: 0.99, eps: 1e-6, momentum: 0.0, centered: false };
        assert_eq!(resolve("rmsprop", "eps=1e-6"), rmsprop);
        assert_eq!(resolve("adagrad", ""), OptimizerKind::Adagrad { eps: 1e-10, lr_decay: 0.0 });
        let text = serde_json::to_string(&sgd).unwrap();
        assert_eq!(serde_json::from_str::<OptimizerKind>(&text).unwrap(), sgd);
    }

    #[test]
    fn every_wrong_value_is_named() {
        for (name, args, message) in [
            ("adamw_8bits", "", "optim = adamw_8bits: not there; expected adamw_torch"),
            ("adamw_8bits", "", "did you mean adamw_8bit?"),
            ("galore_adamw", "", "optim = galore_adamw: not there"),
            ("sgd", "momentum", "optim_args = momentum: expected name=value"),
            ("sgd", "momentum=1", "optim_args = momentum=1: expected a number from 0 to below 1"),
            ("sgd", "momentum=much", "optim_args = momentum=much: expected a number"),
            ("sgd", "nesterov=maybe", "expected true or false"),
            ("sgd", "nesterov=true", "needs a momentum"),
            ("sgd", "alpha=0.9", "optim_args = alpha=0.9: sgd takes momentum, dampening, nesterov"),
            ("sgd", "weight_decay=0.1", "set weight_decay itself"),
            ("adamw_torch", "eps=1", "adamw_torch takes nothing"),
            ("rmsprop", "eps=0", "optim_args = eps=0"),
        ] {
            let error = OptimizerKind::resolve(name, args).unwrap_err().to_string();
            assert!(error.contains(message), "{name} {args}: {error}");
        }
    }
}
