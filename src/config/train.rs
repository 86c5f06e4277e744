//! How a training run goes: batches, steps, learning rate, optimizer, and when to log, evaluate and save.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{AdamHyper, OptimizerKind, ScheduleKind, at_least_one, number};
use crate::error::{Error, Result};

/// The order rows are trained in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowOrder {
    /// Shuffled anew in every pass over the data.
    Random,
    /// As they come, in every pass.
    Sequential,
    /// Neighbours of about the same length, in an order that is random otherwise.
    GroupByLength,
}

impl RowOrder {
    /// The order of a name as transformers 5 spells it (`train_sampling_strategy`).
    ///
    /// # Errors
    /// [`Error::Config`] for an order that is not there.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "random" => Ok(Self::Random),
            "sequential" => Ok(Self::Sequential),
            "group_by_length" => Ok(Self::GroupByLength),
            _ => Err(Error::config(
                "train_sampling_strategy",
                name,
                "not there; expected random, sequential or group_by_length",
            )),
        }
    }
}

/// Whose defaults fill in what was not written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// `SFTConfig`, as Unsloth sets it.
    #[default]
    Sft,
    /// `TrainingArguments`, as transformers sets it.
    TrainingArguments,
}

/// Fields of `SFTConfig` and `TrainingArguments` that the training loop uses, as written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// Whose defaults apply.
    pub preset: Preset,
    /// Rows of a micro-batch; default 4, or 8.
    pub per_device_train_batch_size: Option<i64>,
    /// Rows of an evaluation batch; default as in training.
    pub per_device_eval_batch_size: Option<i64>,
    /// Micro-batches of an optimizer step; default 2, or 1.
    pub gradient_accumulation_steps: Option<i64>,
    /// Optimizer steps of warm-up, or below 1 their share of the run; wins over `warmup_ratio`.
    pub warmup_steps: Option<f64>,
    /// Share of the run that is warm-up; default 0.1, or 0.
    pub warmup_ratio: Option<f64>,
    /// Optimizer steps of the run; 0 or less leaves it to `num_train_epochs`, the default.
    pub max_steps: Option<i64>,
    /// Passes over the data; default 3.
    pub num_train_epochs: Option<f64>,
    /// The highest learning rate; default 5e-5.
    pub learning_rate: Option<f64>,
    /// See [`ScheduleKind::resolve`]; default linear.
    pub lr_scheduler_type: Option<String>,
    /// Numbers of the schedule by name.
    pub lr_scheduler_kwargs: Option<Map<String, Value>>,
    /// See [`OptimizerKind::resolve`]; default `adamw_8bit`, or `adamw_torch`.
    pub optim: Option<String>,
    /// Numbers of the optimizer, `name=value` separated by commas.
    pub optim_args: Option<String>,
    /// Default 0.001, or 0.
    pub weight_decay: Option<f64>,
    /// Default 0.9.
    pub adam_beta1: Option<f64>,
    /// Default 0.999.
    pub adam_beta2: Option<f64>,
    /// Default 1e-8.
    pub adam_epsilon: Option<f64>,
    /// Norm the gradients are clipped to, 0 for no clipping; default 1.
    pub max_grad_norm: Option<f64>,
    /// `steps`, `epoch` or `no`; default steps.
    pub logging_strategy: Option<String>,
    /// Steps between log lines, or below 1 their share of the run; default 1, or 500.
    pub logging_steps: Option<f64>,
    /// Whether step 1 is logged too; default false.
    pub logging_first_step: Option<bool>,
    /// `steps`, `epoch`, `best` (after an evaluation better than all before) or `no`; default steps.
    pub save_strategy: Option<String>,
    /// Steps between checkpoints, or below 1 their share of the run; default 500.
    pub save_steps: Option<f64>,
    /// Checkpoints kept, the newest; 0 or less keeps all, the default.
    pub save_total_limit: Option<i64>,
    /// `steps`, `epoch` or `no`; default no.
    pub eval_strategy: Option<String>,
    /// Steps between evaluations, or below 1 their share of the run; default `logging_steps`.
    pub eval_steps: Option<f64>,
    /// Steps, or with the strategy `epoch` epochs, before the first evaluation; default 0.
    pub eval_delay: Option<f64>,
    /// Whether the evaluation data is scored before the first step too; default false.
    pub eval_on_start: Option<bool>,
    /// The metric that tells the best evaluation, with or without `eval_`; default the loss.
    pub metric_for_best_model: Option<String>,
    /// Whether more of it is better; default: unless its name ends in `loss`.
    pub greater_is_better: Option<bool>,
    /// Whether the run ends with the weights of the best checkpoint, which is kept; default false.
    pub load_best_model_at_end: Option<bool>,
    /// Whether checkpoints go without the optimizer's state, so that no run can go on from them; default false.
    pub save_only_model: Option<bool>,
    /// Whether a pass over the data leaves out a last micro-batch that is not full; default false.
    pub dataloader_drop_last: Option<bool>,
    /// Seed of dropout and, unless `data_seed` is given, of the order of rows; default 3407, or 42.
    pub seed: Option<u64>,
    /// Seed of the order of rows; default `seed`.
    pub data_seed: Option<u64>,
    /// Where checkpoints go; default `outputs`.
    pub output_dir: Option<PathBuf>,
    /// See [`RowOrder::from_name`]; default random.
    pub train_sampling_strategy: Option<String>,
    /// Longest row in tokens, cut beyond; default: what the model was loaded with.
    pub max_length: Option<i64>,
    /// Whether rows are put together to packed rows of up to `max_length` tokens, each of which counts as a row; default
    /// false.
    pub packing: Option<bool>,
    /// Whether the rows of a step are of about the same length; default false.
    pub group_by_length: Option<bool>,
    /// Strength of the noise on the embeddings (NEFTune); default none.
    pub neftune_noise_alpha: Option<f64>,
    /// The highest learning rate of the embeddings and the head where they are trained; default `learning_rate`.
    pub embedding_learning_rate: Option<f64>,
}

/// When something is done in the course of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// Not at all.
    Never,
    /// After so many optimizer steps each time.
    Steps(usize),
    /// Each time after this share of the run.
    Share(f64),
    /// At the end of each pass over the data, and of the run.
    Epoch,
    /// After an evaluation better than all before.
    Best,
}

impl When {
    /// Optimizer steps between two times in a run of `total_steps`; `None` if it does not go by steps.
    pub fn every(self, total_steps: usize) -> Option<usize> {
        match self {
            Self::Never | Self::Epoch | Self::Best => None,
            Self::Steps(n) => Some(n),
            Self::Share(share) => Some(((total_steps as f64 * share).ceil() as usize).max(1)),
        }
    }

    /// Whether it is time after `done` optimizer steps of a run of `total_steps`, by its steps alone.
    pub fn is_due(self, done: usize, total_steps: usize) -> bool {
        self.every(total_steps).is_some_and(|every| done.is_multiple_of(every))
    }
}

/// What makes an evaluation the best, and what becomes of its checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Best {
    /// The metric's name, with `eval_`.
    pub metric: String,
    /// Whether more is better.
    pub greater: bool,
    /// Whether the best checkpoint outlives `save_total_limit`.
    pub keep: bool,
    /// Whether the run ends with its weights.
    pub load_at_end: bool,
}

impl Best {
    /// Whether a value beats the best so far.
    pub fn is_better(&self, value: f64, best: Option<f64>) -> bool {
        best.is_none_or(|best| if self.greater { value > best } else { value < best })
    }
}

/// How long the learning rate rises.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// So many optimizer steps.
    Steps(usize),
    /// This share of the run, rounded up to a step.
    Share(f64),
}

impl Warmup {
    /// Optimizer steps in a run of `total_steps`.
    pub fn steps(self, total_steps: usize) -> usize {
        match self {
            Self::Steps(steps) => steps,
            Self::Share(share) => (total_steps as f64 * share).ceil() as usize,
        }
    }
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// So many optimizer steps.
    Steps(usize),
    /// So many passes over the data, the last one perhaps in part.
    Epochs(f64),
}

/// A run of known length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Optimizer steps of one pass over the data; the last one of a pass may hold fewer micro-batches.
    pub steps_per_epoch: usize,
    /// Optimizer steps of the run.
    pub total_steps: usize,
    /// Passes over the data that are begun.
    pub epochs: usize,
}

/// A run as it will go.
#[expect(clippy::struct_excessive_bools, reason = "five independent switches, named as in transformers")]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Train {
    /// Rows of a micro-batch.
    pub per_device_train_batch_size: usize,
    /// Rows of an evaluation batch.
    pub per_device_eval_batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Rise of the learning rate.
    pub warmup: Warmup,
    /// Length of the run.
    pub length: Length,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Its course.
    pub schedule: ScheduleKind,
    /// Which optimizer.
    pub optimizer: OptimizerKind,
    /// Its settings.
    pub adam: AdamHyper,
    /// Norm the gradients are clipped to; 0 for no clipping.
    pub max_grad_norm: f64,
    /// When a log line is written.
    pub logging: When,
    /// Whether step 1 is logged too.
    pub logging_first_step: bool,
    /// When a checkpoint is written.
    pub save: When,
    /// Checkpoints kept; `None` for all.
    pub save_total_limit: Option<usize>,
    /// Whether checkpoints go without the optimizer's state.
    pub save_only_model: bool,
    /// When the evaluation data is scored.
    pub eval: When,
    /// Steps, or epochs, before that begins.
    pub eval_delay: f64,
    /// Whether it is scored before the first step too.
    pub eval_on_start: bool,
    /// What makes an evaluation the best.
    pub best: Best,
    /// Strength of the noise on the embeddings; 0 for none.
    pub noise_alpha: f64,
    /// The highest learning rate of embeddings and head, where it is not that of everything.
    pub embedding_learning_rate: Option<f64>,
    /// Seed of dropout.
    pub seed: u64,
    /// Seed of the order of rows.
    pub data_seed: u64,
    /// The order of rows.
    pub order: RowOrder,
    /// Whether a last micro-batch that is not full is left out.
    pub drop_last: bool,
    /// Where checkpoints go.
    pub output_dir: PathBuf,
    /// Longest row in tokens; `None` for the model's.
    pub max_length: Option<usize>,
    /// Whether rows are put together to packed rows of up to `max_length` tokens (of the longest row, without one).
    pub packing: bool,
}

impl TrainOptions {
    /// Checks what was written and fills in the rest.
    ///
    /// # Errors
    /// [`Error::Config`] naming a setting that is out of range, contradicts another, or is not there yet.
    pub fn resolve(&self) -> Result<Train> {
        let sft = self.preset == Preset::Sft;
        let batch =
            at_least_one("per_device_train_batch_size", self.per_device_train_batch_size, if sft { 4 } else { 8 })?;
        let accumulation = self.gradient_accumulation_steps;
        let positive = "expected a finite number above 0";
        let not_negative = "expected a finite number, at least 0";
        let share = "expected at least 0 and less than 1";
        let logging_default = if sft { 1.0 } else { 500.0 };
        let logging_steps = self.logging_steps.unwrap_or(logging_default);
        let seed = self.seed.unwrap_or(if sft { 3407 } else { 42 });
        let optim = self.optim.as_deref().unwrap_or(if sft { "adamw_8bit" } else { "adamw_torch" });
        let not_below_zero = |x: f64| x >= 0.0;
        let learning_rate = number("learning_rate", self.learning_rate, 5e-5, not_below_zero, not_negative)?;
        let save = when(
            ("save_strategy", self.save_strategy.as_deref().unwrap_or("steps")),
            ("save_steps", self.save_steps.unwrap_or(500.0)),
        )?;
        let eval = when(
            ("eval_strategy", self.eval_strategy.as_deref().unwrap_or("no")),
            ("eval_steps", self.eval_steps.unwrap_or(logging_steps)),
        )?;
        Ok(Train {
            per_device_train_batch_size: batch,
            per_device_eval_batch_size: at_least_one(
                "per_device_eval_batch_size",
                self.per_device_eval_batch_size,
                batch,
            )?,
            gradient_accumulation_steps: at_least_one(
                "gradient_accumulation_steps",
                accumulation,
                if sft { 2 } else { 1 },
            )?,
            warmup: self.warmup(if sft { 0.1 } else { 0.0 })?,
            length: match self.max_steps {
                Some(steps) if steps > 0 => Length::Steps(steps as usize),
                _ => Length::Epochs(number("num_train_epochs", self.num_train_epochs, 3.0, |x| x > 0.0, positive)?),
            },
            learning_rate,
            schedule: ScheduleKind::resolve(
                self.lr_scheduler_type.as_deref().unwrap_or("linear"),
                self.lr_scheduler_kwargs.as_ref().unwrap_or(&Map::new()),
                learning_rate,
            )?,
            optimizer: OptimizerKind::resolve(optim, self.optim_args.as_deref().unwrap_or_default())?,
            adam: AdamHyper {
                beta1: number("adam_beta1", self.adam_beta1, 0.9, |x| (0.0..1.0).contains(&x), share)?,
                beta2: number("adam_beta2", self.adam_beta2, 0.999, |x| (0.0..1.0).contains(&x), share)?,
                eps: number("adam_epsilon", self.adam_epsilon, 1e-8, |x| x > 0.0, positive)?,
                weight_decay: number(
                    "weight_decay",
                    self.weight_decay,
                    if sft { 0.001 } else { 0.0 },
                    not_below_zero,
                    not_negative,
                )?,
            },
            max_grad_norm: number("max_grad_norm", self.max_grad_norm, 1.0, not_below_zero, not_negative)?,
            logging: when(
                ("logging_strategy", self.logging_strategy.as_deref().unwrap_or("steps")),
                ("logging_steps", logging_steps),
            )?,
            logging_first_step: self.logging_first_step.unwrap_or(false),
            save,
            save_total_limit: self.save_total_limit.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0),
            save_only_model: self.save_only_model.unwrap_or(false),
            eval,
            eval_delay: number("eval_delay", self.eval_delay, 0.0, not_below_zero, not_negative)?,
            eval_on_start: self.eval_on_start.unwrap_or(false),
            best: self.best(save, eval)?,
            noise_alpha: number("neftune_noise_alpha", self.neftune_noise_alpha, 0.0, not_below_zero, not_negative)?,
            embedding_learning_rate: match self.embedding_learning_rate {
                None => None,
                written => Some(number("embedding_learning_rate", written, 0.0, not_below_zero, not_negative)?),
            },
            seed,
            data_seed: self.data_seed.unwrap_or(seed),
            order: self.order()?,
            drop_last: self.dataloader_drop_last.unwrap_or(false),
            output_dir: self.output_dir.clone().unwrap_or_else(|| PathBuf::from("outputs")),
            max_length: match self.max_length {
                None => None,
                Some(_) => Some(at_least_one("max_length", self.max_length, 1)?),
            },
            packing: self.packing.unwrap_or(false),
        })
    }

    fn best(&self, save: When, eval: When) -> Result<Best> {
        let load_at_end = self.load_best_model_at_end.unwrap_or(false);
        if (load_at_end || save == When::Best || self.eval_on_start == Some(true)) && eval == When::Never {
            let (field, value) = match save {
                _ if load_at_end => ("load_best_model_at_end", "true"),
                When::Best => ("save_strategy", "best"),
                _ => ("eval_on_start", "true"),
            };
            return Err(Error::config(field, value, "needs evaluations: set eval_strategy to steps or epoch"));
        }
        if load_at_end && save != When::Best {
            let fits = match (save, eval) {
                (When::Epoch, When::Epoch) => true,
                (When::Steps(save), When::Steps(eval)) => save.is_multiple_of(eval),
                (When::Share(save), When::Share(eval)) => ((save / eval).round() * eval - save).abs() < 1e-9,
                _ => false,
            };
            if !fits {
                let shown = |when: When| match when {
                    When::Steps(n) => format!("every {n} steps"),
                    When::Share(share) => format!("every {share} of the run"),
                    When::Epoch => "every epoch".to_owned(),
                    When::Never | When::Best => "never".to_owned(),
                };
                let expected = format!(
                    "the best model must have been saved: expected save_strategy to be eval_strategy or best, and \
                     save_steps a multiple of eval_steps; it is saved {} and evaluated {}",
                    shown(save),
                    shown(eval)
                );
                return Err(Error::config("load_best_model_at_end", true, expected));
            }
        }
        let written = self.metric_for_best_model.as_deref().unwrap_or("loss");
        let metric = if written.starts_with("eval_") { written.to_owned() } else { format!("eval_{written}") };
        let greater = self.greater_is_better.unwrap_or(!metric.ends_with("loss"));
        let keep = load_at_end || save == When::Best || self.metric_for_best_model.is_some();
        Ok(Best { metric, greater, keep, load_at_end })
    }

    /// The order of rows: `group_by_length` is the older way to ask for [`RowOrder::GroupByLength`].
    fn order(&self) -> Result<RowOrder> {
        match (self.train_sampling_strategy.as_deref(), self.group_by_length) {
            (None, Some(true)) => Ok(RowOrder::GroupByLength),
            (name, grouped) => {
                let order = RowOrder::from_name(name.unwrap_or("random"))?;
                if grouped == Some(true) && order != RowOrder::GroupByLength {
                    let expected = "contradicts train_sampling_strategy; write one of them";
                    return Err(Error::config("group_by_length", true, expected));
                }
                Ok(order)
            }
        }
    }

    fn warmup(&self, default_share: f64) -> Result<Warmup> {
        let steps = number("warmup_steps", self.warmup_steps, 0.0, |x| x >= 0.0, "expected at least 0")?;
        if steps >= 1.0 {
            return Ok(Warmup::Steps(whole("warmup_steps", steps)?));
        }
        if steps > 0.0 {
            return Ok(Warmup::Share(steps));
        }
        // A written 0 asks for no warm-up unless a ratio was written beside it.
        let default = if self.warmup_steps.is_some() { 0.0 } else { default_share };
        let in_range = |x: f64| (0.0..=1.0).contains(&x);
        Ok(Warmup::Share(number("warmup_ratio", self.warmup_ratio, default, in_range, "expected from 0 to 1")?))
    }
}

impl Train {
    /// The steps of a run over `n_rows` rows (packed ones, with packing), counted as transformers' `Trainer` counts them.
    ///
    /// # Errors
    /// [`Error::Data`] if there are no rows, or none that are trained.
    pub fn plan(&self, n_rows: usize) -> Result<Plan> {
        if n_rows == 0 {
            return Err(Error::data("train_dataset", "has no rows to train on"));
        }
        let batch = self.per_device_train_batch_size;
        let micro_batches = if self.drop_last { n_rows / batch } else { n_rows.div_ceil(batch) };
        if micro_batches == 0 {
            let problem = format!("its {n_rows} rows are no full batch of {batch}, and dataloader_drop_last = True");
            return Err(Error::data("train_dataset", problem));
        }
        let steps_per_epoch = micro_batches.div_ceil(self.gradient_accumulation_steps);
        let total_steps = match self.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => ((epochs * steps_per_epoch as f64).ceil() as usize).max(1),
        };
        Ok(Plan { steps_per_epoch, total_steps, epochs: total_steps.div_ceil(steps_per_epoch) })
    }
}

/// `steps >= 1` as a whole number.
fn whole(field: &'static str, steps: f64) -> Result<usize> {
    if steps.fract() == 0.0 && steps < 1e15 {
        return Ok(steps as usize);
    }
    Err(Error::config(field, steps, "expected a whole number of steps, or a share below 1"))
}

fn when((strategy_field, strategy): (&'static str, &str), (field, steps): (&'static str, f64)) -> Result<When> {
    match strategy {
        "no" => Ok(When::Never),
        "epoch" => Ok(When::Epoch),
        "best" if strategy_field == "save_strategy" => Ok(When::Best),
        "steps" if steps >= 1.0 => Ok(When::Steps(whole(field, steps)?)),
        "steps" if steps > 0.0 => Ok(When::Share(steps)),
        "steps" => Err(Error::config(field, steps, "expected at least 1 step, or a share of the run below 1")),
        _ if strategy_field == "save_strategy" => {
            Err(Error::config(strategy_field, strategy, "expected steps, epoch, best or no"))
        }
        _ => Err(Error::config(strategy_field, strategy, "expected steps, epoch or no")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::{Value, json};

    fn resolve(options: Value) -> Result<Train> {
        serde_json::from_value::<TrainOptions>(options).unwrap().resolve()
    }

    #[test]
    fn defaults_of_both_presets() {
        let sft = resolve(json!({})).unwrap();
        assert_eq!((sft.per_device_train_batch_size, sft.gradient_accumulation_steps), (4, 2));
        assert_eq!((sft.optimizer, sft.adam.weight_decay), (OptimizerKind::AdamW8bit, 0.001));
        assert_eq!((sft.seed, sft.logging, sft.warmup), (3407, When::Steps(1), Warmup::Share(0.1)));
        assert_eq!((sft.learning_rate, sft.max_grad_norm, sft.length), (5e-5, 1.0, Length::Epochs(3.0)));
        assert_eq!((sft.save, sft.eval, sft.schedule), (When::Steps(500), When::Never, ScheduleKind::Linear));
        assert_eq!((sft.output_dir.to_str(), sft.max_length, sft.save_total_limit), (Some("outputs"), None, None));
        let args = resolve(json!({"preset": "training_arguments"})).unwrap();
        assert_eq!((args.per_device_train_batch_size, args.gradient_accumulation_steps), (8, 1));
        assert_eq!((args.optimizer, args.adam.weight_decay), (OptimizerKind::AdamW, 0.0));
        assert_eq!((args.seed, args.logging, args.warmup), (42, When::Steps(500), Warmup::Share(0.0)));
        for train in [sft, args] {
            let text = serde_json::to_string(&train).unwrap();
            assert_eq!(serde_json::from_str::<Train>(&text).unwrap(), train);
        }
    }

    #[test]
    fn a_usual_notebook() {
        let train = resolve(json!({
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "warmup_steps": 5, "max_steps": 60,
            "learning_rate": 2e-4, "logging_steps": 1, "optim": "paged_adamw_8bit", "weight_decay": 0.01,
            "lr_scheduler_type": "cosine", "seed": 7, "output_dir": "here", "eval_strategy": "steps",
            "save_strategy": "epoch", "save_total_limit": 2, "max_length": 128, "logging_first_step": true,
        }))
        .unwrap();
        assert_eq!((train.warmup.steps(60), train.length), (5, Length::Steps(60)));
        assert_eq!((train.per_device_eval_batch_size, train.data_seed, train.max_length), (2, 7, Some(128)));
        assert_eq!((train.eval, train.save, train.save_total_limit), (When::Steps(1), When::Epoch, Some(2)));
        assert_eq!(train.schedule, ScheduleKind::Cosine { num_cycles: 0.5 });
    }

    #[test]
    fn steps_are_counted_as_transformers_does() {
        let plan = |options: Value, rows| resolve(options).unwrap().plan(rows).unwrap();
        let two_by_four = |more: Value| {
            let mut options = json!({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4});
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            options
        };
        // 21 rows are 11 micro-batches: two steps of 4 and one of 3.
        let plan_21 = plan(two_by_four(json!({})), 21);
        assert_eq!(plan_21, Plan { steps_per_epoch: 3, total_steps: 9, epochs: 3 });
        assert_eq!(plan(two_by_four(json!({"num_train_epochs": 0.5})), 21).total_steps, 2);
        let capped = plan(two_by_four(json!({"max_steps": 4})), 21);
        assert_eq!(capped, Plan { steps_per_epoch: 3, total_steps: 4, epochs: 2 });
        assert_eq!(
            plan(two_by_four(json!({"max_steps": -1})), 1),
            Plan { steps_per_epoch: 1, total_steps: 3, epochs: 3 }
        );
        assert!(resolve(json!({})).unwrap().plan(0).unwrap_err().to_string().contains("no rows"));

        let due = |when: When, plan: &Plan| {
            (1..=plan.total_steps).filter(|&done| when.is_due(done, plan.total_steps)).collect::<Vec<_>>()
        };
        assert_eq!(due(When::Steps(4), &plan_21), [4, 8]);
        assert_eq!(due(When::Epoch, &capped), [0usize; 0]);
        assert_eq!(due(When::Share(0.25), &plan_21), [3, 6, 9]);
        assert_eq!(due(When::Never, &plan_21), [0usize; 0]);
        assert_eq!((Warmup::Share(0.1).steps(60), Warmup::Share(0.1).steps(61)), (6, 7));
    }

    #[test]
    fn warmup_is_read_as_written() {
        let warmup = |options| resolve(options).unwrap().warmup;
        assert_eq!(warmup(json!({"warmup_steps": 5, "warmup_ratio": 0.5})), Warmup::Steps(5));
        assert_eq!(warmup(json!({"warmup_steps": 0.03})), Warmup::Share(0.03));
        assert_eq!(warmup(json!({"warmup_steps": 0})), Warmup::Share(0.0));
        assert_eq!(warmup(json!({"warmup_steps": 0, "warmup_ratio": 0.2})), Warmup::Share(0.2));
    }

    #[test]
    fn what_is_best_follows_from_its_name() {
        let best = |options: Value| resolve(options).unwrap().best;
        let loss = best(json!({}));
        assert_eq!(
            (loss.metric.as_str(), loss.greater, loss.keep, loss.load_at_end),
            ("eval_loss", false, false, false)
        );
        assert!(loss.is_better(1.0, None) && loss.is_better(1.0, Some(2.0)) && !loss.is_better(1.0, Some(1.0)));
        let steps = json!({"eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.2, "load_best_model_at_end": true,
            "metric_for_best_model": "accuracy"});
        let accuracy = best(steps);
        assert_eq!((accuracy.metric.as_str(), accuracy.greater, accuracy.load_at_end), ("eval_accuracy", true, true));
        assert!(accuracy.keep && accuracy.is_better(2.0, Some(1.0)));
        let error = best(json!({"metric_for_best_model": "eval_error", "greater_is_better": false}));
        assert_eq!((error.metric.as_str(), error.greater, error.keep), ("eval_error", false, true));
        let saved = json!({"load_best_model_at_end": true, "eval_strategy": "epoch", "save_strategy": "best"});
        assert_eq!(resolve(saved).unwrap().save, When::Best);
    }

    #[test]
    fn every_wrong_value_is_named() {
        for (options, message) in [
            (json!({"per_device_train_batch_size": 0}), "per_device_train_batch_size = 0: expected at least 1"),
            (json!({"per_device_eval_batch_size": -1}), "per_device_eval_batch_size = -1"),
            (json!({"gradient_accumulation_steps": 0}), "gradient_accumulation_steps = 0"),
            (json!({"learning_rate": -1e-4}), "learning_rate = -0.0001: expected a finite number"),
            (json!({"weight_decay": -0.1}), "weight_decay = -0.1"),
            (json!({"adam_beta1": 1.0}), "adam_beta1 = 1"),
            (json!({"adam_beta2": -0.1}), "adam_beta2 = -0.1"),
            (json!({"adam_epsilon": 0.0}), "adam_epsilon = 0"),
            (json!({"max_grad_norm": -1}), "max_grad_norm = -1"),
            (json!({"warmup_ratio": 1.5}), "warmup_ratio = 1.5"),
            (json!({"warmup_steps": -5}), "warmup_steps = -5"),
            (json!({"warmup_steps": 5.5}), "warmup_steps = 5.5: expected a whole number"),
            (json!({"num_train_epochs": 0}), "num_train_epochs = 0"),
            (json!({"logging_steps": 0}), "logging_steps = 0"),
            (json!({"save_steps": 2.5}), "save_steps = 2.5"),
            (json!({"eval_strategy": "often"}), "eval_strategy = often: expected steps, epoch or no"),
            (json!({"save_strategy": "often"}), "save_strategy = often: expected steps, epoch, best or no"),
            (json!({"eval_strategy": "best"}), "eval_strategy = best: expected steps, epoch or no"),
            (json!({"eval_delay": -1}), "eval_delay = -1"),
            (json!({"optim": "lion_4bit"}), "optim = lion_4bit: not there; expected adamw_torch, adamw_8bit"),
            (json!({"optim": "sgd", "optim_args": "moment=1"}), "optim_args = moment=1: sgd takes momentum"),
            (json!({"lr_scheduler_type": "sine"}), "lr_scheduler_type = sine: not there"),
            (json!({"lr_scheduler_kwargs": {"power": 2}}), "lr_scheduler_kwargs = power: linear takes nothing"),
            (json!({"max_length": 0}), "max_length = 0"),
            (json!({"neftune_noise_alpha": -5}), "neftune_noise_alpha = -5"),
            (json!({"embedding_learning_rate": -1e-5}), "embedding_learning_rate = -0.00001"),
            (json!({"load_best_model_at_end": true}), "load_best_model_at_end = true: needs evaluations"),
            (json!({"save_strategy": "best"}), "save_strategy = best: needs evaluations"),
            (json!({"eval_on_start": true}), "eval_on_start = true: needs evaluations"),
            (
                json!({"load_best_model_at_end": true, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 6}),
                "it is saved every 6 steps and evaluated every 4 steps",
            ),
            (
                json!({"load_best_model_at_end": true, "eval_strategy": "epoch", "save_strategy": "no"}),
                "it is saved never and evaluated every epoch",
            ),
        ] {
            let error = resolve(options.clone()).unwrap_err().to_string();
            assert!(error.contains(message), "{options}: {error}");
        }
        // JSON knows no infinity; Python does.
        let infinite = TrainOptions { learning_rate: Some(f64::INFINITY), ..Default::default() };
        assert!(infinite.resolve().unwrap_err().to_string().contains("learning_rate = inf"));
        let nan = TrainOptions { learning_rate: Some(f64::NAN), ..Default::default() };
        assert!(nan.resolve().unwrap_err().to_string().contains("learning_rate = NaN"));
    }
}
