//! The life of a run on a small random model: resumed, scored, its best checkpoint kept and taken up.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::checkpoint::{self, MODEL_FILE};
use super::run::Lender;
use super::{Control, Event, Job, Observer, Outcome, Recompute, Settings, Status, run};
use crate::config::TrainOptions;
use crate::data::rows::Example;
use crate::error::Result;
use crate::io::safetensors::{Dtype, SafetensorsWriter, TensorSpec};
use crate::lora::whole::train_whole;
use crate::model::Model;
use crate::model::testing::{TestShape, random_model};
use crate::ops::attention::Heads;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::RwLock;

/// A model as the bindings hold it.
struct Lent(RwLock<Model>);

impl Lender for Lent {
    fn read(&self, work: &mut dyn FnMut(&Model) -> Result<()>) -> Result<()> {
        work(&self.0.read().unwrap())
    }

    fn write(&self, work: &mut dyn FnMut(&mut Model) -> Result<()>) -> Result<()> {
        work(&mut self.0.write().unwrap())
    }
}

fn model() -> Lent {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 8 };
    let shape = TestShape { hidden: 16, ffn: 32, layers: 1, heads, vocab: 30, dora: true, ..TestShape::wide() };
    Lent(RwLock::new(random_model(shape)))
}

fn rows(count: u32) -> Vec<Example> {
    let row = |i: u32| {
        let input_ids: Vec<u32> = (0..6 + i % 3).map(|at| (i * 7 + at * 3) % 30).collect();
        Example { labels: input_ids.iter().map(|&id| id as i32).collect(), input_ids }
    };
    (0..count).map(row).collect()
}

/// Writes the trained tensors as [`checkpoint::load_params`] reads them.
fn write_model(model: &Model, folder: &Path) -> Result<()> {
    let spec =
        |p: &crate::ops::params::Param| TensorSpec { name: p.name.clone(), dtype: Dtype::F32, shape: p.shape.clone() };
    let specs: Vec<_> = model.params.all().iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(folder.join(MODEL_FILE), &specs, &BTreeMap::new())?;
    for param in model.params.all() {
        writer.write_f32(&param.name, &param.data)?;
    }
    writer.finish()
}

/// Hears everything, and answers evaluations from a script.
#[derive(Default)]
struct Script {
    heard: Vec<String>,
    scores: Vec<f64>,
    stop_at: Option<usize>,
}

impl Observer for Script {
    fn event(&mut self, event: Event<'_>, status: &Status, control: &mut Control) -> Result<()> {
        let name = match event {
            Event::TrainBegin => "train_begin".to_owned(),
            Event::EpochBegin => "epoch_begin".to_owned(),
            Event::StepBegin | Event::SubstepEnd => return Ok(()),
            Event::StepEnd => format!("step {}", status.step),
            Event::Log(_) => "log".to_owned(),
            Event::Evaluate(_) => format!("evaluate (best {:?})", status.best_metric),
            Event::Save(path) => path.file_name().unwrap().to_str().unwrap().to_owned(),
            Event::EpochEnd => "epoch_end".to_owned(),
            Event::TrainEnd => "train_end".to_owned(),
            Event::Warning(text) => format!("warning: {text}"),
        };
        control.stop |= self.stop_at.is_some_and(|step| status.step >= step);
        self.heard.push(name);
        Ok(())
    }

    fn evaluate(&mut self, _: &Status) -> Result<Option<Map<String, Value>>> {
        let score = self.scores.remove(0);
        Ok(json!({"eval_loss": score, "eval_accuracy": 1.0 - score}).as_object().cloned())
    }

    fn poll(&mut self) -> Result<()> {
        Ok(())
    }
}

fn train_with(
    model: &Lent,
    out: &Path,
    options: &Value,
    resume: Option<&Path>,
    script: &mut Script,
) -> Result<Outcome> {
    let mut written = json!({
        "output_dir": out, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 6,
        "learning_rate": 1e-2, "warmup_steps": 2, "logging_strategy": "no", "save_strategy": "no",
    });
    written.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    let options: TrainOptions = serde_json::from_value(written).unwrap();
    let train = rows(8);
    let settings = Settings::new(options.resolve()?, &train, Recompute::EveryLayer)?;
    let job = Job { model, train: &train, eval: &[], settings: &settings, resume, write_model: &write_model };
    run::run(job, script)
}

fn weights(model: &Lent) -> Vec<Vec<f32>> {
    model.0.read().unwrap().params.all().iter().map(|param| param.data.clone()).collect()
}

#[test]
fn every_optimizer_and_schedule_resumes_to_the_bit() {
    let optimizers = [
        ("adamw_torch", ""),
        ("adamw_8bit", ""),
        ("paged_adamw_32bit", ""),
        ("adafactor", ""),
        ("sgd", ""),
        ("sgd", "momentum=0.9,nesterov=true"),
        ("lion_32bit", ""),
        ("paged_lion_8bit", ""),
        ("rmsprop", "momentum=0.5,centered=true"),
        ("adagrad", "lr_decay=0.1"),
    ];
    let schedules = [
        ("linear", json!({})),
        ("cosine", json!({})),
        ("cosine_with_restarts", json!({"num_cycles": 2})),
        ("cosine_with_min_lr", json!({"min_lr_rate": 0.1})),
        ("polynomial", json!({"power": 2})),
        ("constant", json!({})),
        ("constant_with_warmup", json!({})),
        ("inverse_sqrt", json!({})),
        ("warmup_stable_decay", json!({"num_decay_steps": 2})),
    ];
    let cases = optimizers.iter().map(|optimizer| (optimizer, &schedules[0]));
    for ((optim, args), (schedule, kwargs)) in cases.chain(schedules.iter().map(|schedule| (&optimizers[0], schedule)))
    {
        let folder = tempfile::tempdir().unwrap();
        let options = json!({
            "optim": optim, "optim_args": args, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs,
            "save_strategy": "steps", "save_steps": 3, "neftune_noise_alpha": 5.0, "weight_decay": 0.01,
            "embedding_learning_rate": 2e-3,
        });
        let (whole, resumed) = (model(), model());
        for model in [&whole, &resumed] {
            train_whole(&mut model.0.write().unwrap(), &["embed_tokens", "lm_head", "norm"]);
        }
        let begun = weights(&whole);
        let out = train_with(&whole, folder.path(), &options, None, &mut Script::default()).unwrap();
        let checkpoint = folder.path().join("checkpoint-3");
        let again = train_with(&resumed, folder.path(), &options, Some(&checkpoint), &mut Script::default()).unwrap();
        assert_eq!((out.status.step, again.status.step, again.steps), (6, 6, 3), "{optim} {schedule}");
        assert_eq!(out.training_loss.to_bits(), again.training_loss.to_bits(), "{optim} {schedule}");
        assert!(weights(&whole) == weights(&resumed), "{optim} {args} {schedule}");
        assert!(weights(&whole) != begun, "{optim} {schedule}: something was trained");
    }
}

#[test]
fn the_best_checkpoint_is_kept_and_its_weights_are_taken_up() {
    let folder = tempfile::tempdir().unwrap();
    let options = json!({
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        "load_best_model_at_end": true,
    });
    let mut script = Script { scores: vec![0.5, 0.3, 0.4, 0.6, 0.31, 0.32], ..Script::default() };
    let trained = model();
    let outcome = train_with(&trained, folder.path(), &options, None, &mut script).unwrap();
    let best = folder.path().join("checkpoint-2");
    assert_eq!((outcome.status.best_metric, outcome.status.best_step), (Some(0.3), Some(2)));
    assert_eq!(outcome.status.best_checkpoint.as_ref(), Some(&best));
    // The best and the newest outlive the limit.
    assert!(best.exists() && folder.path().join("checkpoint-6").exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    let at_best = model();
    checkpoint::load_params(&best, &mut at_best.0.write().unwrap()).unwrap();
    assert!(weights(&trained) == weights(&at_best));
    // Callbacks hear of an evaluation before it is compared, as early stopping needs it.
    assert_eq!(script.heard[2..5], ["step 1", "evaluate (best None)", "checkpoint-1"]);
    assert!(script.heard.contains(&"evaluate (best Some(0.5))".to_owned()));
    let state = checkpoint::read_state(&folder.path().join("checkpoint-6")).unwrap();
    assert_eq!((&state["best_metric"], &state["best_global_step"]), (&json!(0.3), &json!(2)));

    // A resumed run knows the best so far.
    let mut script = Script { scores: vec![0.9, 0.8], ..Script::default() };
    let mut more = options.clone();
    more["max_steps"] = json!(8);
    let last = folder.path().join("checkpoint-6");
    let resumed = model();
    let outcome = train_with(&resumed, folder.path(), &more, Some(&last), &mut script).unwrap();
    assert_eq!(outcome.status.best_checkpoint, Some(best));
    assert!(weights(&resumed) == weights(&at_best));
}

#[test]
fn with_a_limit_of_one_only_the_best_remains() {
    let folder = tempfile::tempdir().unwrap();
    let options = json!({
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1,
        "load_best_model_at_end": true, "metric_for_best_model": "accuracy",
    });
    let mut script = Script { scores: vec![0.2, 0.5, 0.9], ..Script::default() };
    let outcome = train_with(&model(), folder.path(), &options, None, &mut script).unwrap();
    assert_eq!(outcome.status.best_metric, Some(0.8));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["checkpoint-2"]);
}

#[test]
fn strategies_say_when() {
    let folder = tempfile::tempdir().unwrap();
    // 8 rows by 2 are 4 steps an epoch; the second one ends with the run.
    let options = json!({
        "eval_strategy": "epoch", "save_strategy": "best", "eval_on_start": true, "logging_strategy": "epoch",
    });
    let mut script = Script { scores: vec![0.1, 0.5, 0.6], ..Script::default() };
    train_with(&model(), folder.path(), &options, None, &mut script).unwrap();
    let expected = [
        "train_begin",
        "evaluate (best None)",
        "epoch_begin",
        "step 1",
        "step 2",
        "step 3",
        "step 4",
        "epoch_end",
        "log",
        "evaluate (best None)",
        "checkpoint-4",
        "epoch_begin",
        "step 5",
        "step 6",
        "epoch_end",
        "log",
        "evaluate (best Some(0.5))",
        "train_end",
    ];
    assert_eq!(script.heard, expected);

    let delayed = json!({"eval_strategy": "steps", "eval_steps": 0.34, "eval_delay": 4});
    let mut script = Script { scores: vec![0.1], stop_at: Some(7), ..Script::default() };
    train_with(&model(), folder.path(), &delayed, None, &mut script).unwrap();
    // A share of 0.34 of 6 steps is 3 of them, rounded up; the first falls before the delay.
    assert_eq!(script.heard.iter().filter(|name| name.starts_with("evaluate")).count(), 1);

    let mut script = Script { stop_at: Some(2), ..Script::default() };
    let epochs = json!({"save_strategy": "epoch"});
    train_with(&model(), folder.path(), &epochs, None, &mut script).unwrap();
    assert_eq!(script.heard[3..], ["step 2", "epoch_end", "checkpoint-2", "train_end"], "a broken-off epoch ends too");
}

#[test]
fn what_cannot_be_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = |options: Value, scores: &[f64]| {
        let mut script = Script { scores: scores.to_vec(), ..Script::default() };
        train_with(&model(), folder.path(), &options, None, &mut script).unwrap_err().to_string()
    };
    let embeddings = error(json!({"embedding_learning_rate": 1e-5}), &[]);
    assert!(embeddings.contains("embedding_learning_rate = 0.00001: neither embed_tokens nor lm_head"), "{embeddings}");
    let metric = json!({"metric_for_best_model": "bleu", "eval_strategy": "steps", "eval_steps": 1});
    let metric = error(metric, &[0.5]);
    assert!(metric.contains("metric_for_best_model = eval_bleu"), "{metric}");
    assert!(
        metric.contains("gives eval_loss, eval_accuracy") || metric.contains("eval_accuracy, eval_loss"),
        "{metric}"
    );
}

#[test]
fn a_run_that_never_saved_its_best_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let options = json!({
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 3,
        "load_best_model_at_end": true,
    });
    let mut script = Script { scores: vec![0.1, 0.2, 0.3], ..Script::default() };
    train_with(&model(), folder.path(), &options, None, &mut script).unwrap();
    let warning = &script.heard[script.heard.len() - 2];
    assert!(warning.starts_with("warning: load_best_model_at_end: no checkpoint"), "{warning}");
}

fn score(model: &Lent) -> f64 {
    run::evaluate(&model.0.read().unwrap(), &rows(4), 2, &mut Script::default()).unwrap().0
}

#[test]
fn noise_on_the_embeddings_changes_training_alone() {
    let folder = tempfile::tempdir().unwrap();
    let losses = |alpha: f64| {
        let model = model();
        let options = json!({"neftune_noise_alpha": alpha, "max_steps": 2});
        let outcome = train_with(&model, folder.path(), &options, None, &mut Script::default()).unwrap();
        (outcome.training_loss.to_bits(), score(&model).to_bits())
    };
    assert_eq!(losses(5.0), losses(5.0));
    assert_ne!(losses(5.0).0, losses(0.0).0);
    let untrained = score(&model());
    let options = json!({"neftune_noise_alpha": 50.0, "learning_rate": 0.0, "max_steps": 1, "weight_decay": 0.0});
    let model = model();
    train_with(&model, folder.path(), &options, None, &mut Script::default()).unwrap();
    assert_eq!(score(&model).to_bits(), untrained.to_bits());
}
