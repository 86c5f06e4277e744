//! The training loop: which rows, forward and backward, clip, update, log, evaluate, save.
//!
//! Everything random or ordered is a function of the seed and the step, so a run can be taken up at any step. The loss of
//! a step is the sum of its token losses over the number of its trained tokens, however they are split into micro-batches.

use super::batches::Batches;
use super::checkpoint;
use super::clip::{clip_factor, global_norm};
use super::optimizer::{Optimizer, ParamSlot, build};
use super::schedule::Schedule;
use super::step::{MicroBatch, Recompute, StepOptions, forward_backward};
use crate::config::train::{Plan, Train, When};
use crate::data::collate::{Batch, collate};
use crate::data::rows::Example;
use crate::error::{Error, Result};
use crate::io::os::with_pool;
use crate::model::Model;
use crate::ops::{DropoutKey, Grads, Tokens};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The settings of a run over a known number of rows.
#[derive(Clone, Debug)]
pub struct Settings {
    /// As resolved from what was written.
    pub train: Train,
    /// Steps and epochs for the rows at hand.
    pub plan: Plan,
    /// Which rows make up each step.
    pub batches: Batches,
    /// What the backward recomputes.
    pub recompute: Recompute,
}

impl Settings {
    /// Settings for these training rows.
    ///
    /// # Errors
    /// [`Error::Data`] if there are no rows.
    pub fn new(train: Train, rows: &[Example], recompute: Recompute) -> Result<Self> {
        let batches = Batches::new(&train, rows.iter().map(|row| row.input_ids.len()).collect());
        let plan = train.plan(batches.n_units())?;
        Ok(Self { train, plan, batches, recompute })
    }

    /// Tokens of the run's largest micro-batch.
    pub fn largest_micro_batch(&self) -> usize {
        self.batches.largest(&self.plan)
    }

    fn schedule(&self) -> Schedule {
        let t = &self.train;
        let total_steps = self.plan.total_steps;
        Schedule { kind: t.schedule, peak: t.learning_rate, warmup_steps: t.warmup.steps(total_steps), total_steps }
    }

    fn lr_at(&self, done: usize) -> f64 {
        self.schedule().lr_at(done)
    }

    /// The learning rate of embeddings and head.
    fn embedding_lr_at(&self, done: usize) -> f64 {
        let schedule = self.schedule();
        self.train.embedding_learning_rate.unwrap_or(schedule.peak) * schedule.factor(done)
    }
}

/// What happened, in the order in which transformers' callbacks hear of it.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Before the first step.
    TrainBegin,
    /// Before an epoch's first step.
    EpochBegin,
    /// Before a step.
    StepBegin,
    /// After a micro-batch that does not end its step.
    SubstepEnd,
    /// After a step.
    StepEnd,
    /// A log entry was made.
    Log(&'a Map<String, Value>),
    /// An evaluation was made.
    Evaluate(&'a Map<String, Value>),
    /// A checkpoint was written.
    Save(&'a Path),
    /// After an epoch's last step.
    EpochEnd,
    /// After the last step.
    TrainEnd,
    /// Something the user should know.
    Warning(&'a str),
}

/// What an observer may ask for; looked at after each event.
#[expect(clippy::struct_excessive_bools, reason = "four independent wishes, named as in transformers")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// End the run after this step.
    pub stop: bool,
    /// Make a log entry now.
    pub log: bool,
    /// Evaluate now.
    pub evaluate: bool,
    /// Write a checkpoint now.
    pub save: bool,
}

/// Where the run stands.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Finished optimizer steps.
    pub step: usize,
    /// Finished epochs, with a fraction.
    pub epoch: f64,
    /// Steps of the whole run.
    pub max_steps: usize,
    /// Tokens trained on in this call.
    pub tokens: usize,
    /// All log entries so far.
    pub log_history: Vec<Value>,
    /// The best value so far of the metric that tells the best evaluation.
    pub best_metric: Option<f64>,
    /// The step of that evaluation.
    pub best_step: Option<usize>,
    /// The checkpoint written at such a step, the last time one was.
    pub best_checkpoint: Option<PathBuf>,
}

/// Whoever watches and steers a run.
pub trait Observer {
    /// Hears of an event and may change `control`.
    ///
    /// # Errors
    /// Any error ends the run.
    fn event(&mut self, event: Event<'_>, status: &Status, control: &mut Control) -> Result<()>;

    /// Evaluates instead of the run, whose model is free meanwhile; `None` leaves it to the run.
    ///
    /// # Errors
    /// Any error ends the run.
    fn evaluate(&mut self, status: &Status) -> Result<Option<Map<String, Value>>> {
        let _ = status;
        Ok(None)
    }

    /// Called several times a second on the thread that called [`run`].
    ///
    /// # Errors
    /// Any error ends the run within a layer.
    fn poll(&mut self) -> Result<()>;
}

/// Where a run finds its model: it is lent for each piece of work, so that observers can use it in between.
pub trait Lender: Sync {
    /// Runs `work` on the model, which others may read meanwhile.
    ///
    /// # Errors
    /// What `work` returns.
    fn read(&self, work: &mut dyn FnMut(&Model) -> Result<()>) -> Result<()>;

    /// Runs `work` on the model while nobody else uses it.
    ///
    /// # Errors
    /// What `work` returns.
    fn write(&self, work: &mut dyn FnMut(&mut Model) -> Result<()>) -> Result<()>;
}

/// What a run needs.
pub struct Job<'a> {
    /// The model; its trained tensors change, and nothing else may change them meanwhile.
    pub model: &'a dyn Lender,
    /// Training rows.
    pub train: &'a [Example],
    /// Evaluation rows; may be empty.
    pub eval: &'a [Example],
    /// Settings.
    pub settings: &'a Settings,
    /// A checkpoint to go on from.
    pub resume: Option<&'a Path>,
    /// Writes weights and tokenizer into a checkpoint's folder.
    pub write_model: &'a (dyn Fn(&Model, &Path) -> Result<()> + Sync),
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Where it stands.
    pub status: Status,
    /// Mean of the steps' losses over the whole run.
    pub training_loss: f64,
    /// Seconds of this call.
    pub seconds: f64,
    /// Steps of this call.
    pub steps: usize,
    /// Rows of this call.
    pub rows: usize,
}

/// Trains.
///
/// # Errors
/// [`Error::Data`] for no rows or ids outside the vocabulary, [`Error::Diverged`] before the update that would do harm,
/// [`Error::Checkpoint`] and [`Error::Weights`] for a checkpoint that does not fit, what the observer returns.
/// The model is as after the last finished step.
pub fn run(job: Job<'_>, observer: &mut dyn Observer) -> Result<Outcome> {
    let lender = job.model;
    let outcome = Run::new(job, observer)?.train();
    // What the activations took is free for whatever comes after training.
    lender.read(&mut |model| {
        model.ctx.pool.clear();
        Ok(())
    })?;
    outcome
}

/// Mean token loss over `rows` and the number of trained tokens.
///
/// # Errors
/// [`Error::Data`] if no token has a target; what the observer returns.
pub fn evaluate(
    model: &Model,
    rows: &[Example],
    batch_size: usize,
    observer: &mut dyn Observer,
) -> Result<(f64, usize)> {
    let (mut sum, mut trained) = (0.0, 0);
    for (chunk, rows) in rows.chunks(batch_size.max(1)).enumerate() {
        let first = chunk * batch_size.max(1);
        let batch = collate(&rows.iter().zip(first as u32..).collect::<Vec<_>>());
        trained += batch.n_trained();
        let (tokens, targets) = split(batch);
        let nll = computing(observer, |_| model.token_losses(&tokens, &targets))?;
        sum += nll.iter().map(|&v| f64::from(v)).sum::<f64>();
    }
    if trained == 0 {
        return Err(Error::data("eval_dataset", "no token has a label: there is nothing to evaluate"));
    }
    Ok((sum / trained as f64, trained))
}

/// The tokens and targets of a batch.
pub fn split(batch: Batch) -> (Tokens, Vec<i32>) {
    let Batch { input_ids, targets, positions, row_ids, cu_seqlens } = batch;
    (Tokens { ids: input_ids, positions, rows: row_ids, cu_seqlens }, targets)
}

/// Runs `work` on the pool while this thread keeps polling; a poll's error cancels the work and is returned.
///
/// # Errors
/// What `work` or the observer's poll returns.
pub fn computing<T: Send>(
    observer: &mut dyn Observer,
    work: impl FnOnce(&(dyn Fn() -> Result<()> + Sync)) -> Result<T> + Send,
) -> Result<T> {
    let cancelled = AtomicBool::new(false);
    let check = || {
        let stop = cancelled.load(Ordering::Relaxed);
        if stop { Err(Error::Callback("cancelled".into())) } else { Ok(()) }
    };
    std::thread::scope(|scope| {
        let (done, finished) = mpsc::channel::<()>();
        let worker = scope.spawn(|| {
            let result = with_pool(|| work(&check));
            drop(done);
            result
        });
        let mut interruption = None;
        while finished.recv_timeout(Duration::from_millis(50)) == Err(mpsc::RecvTimeoutError::Timeout) {
            if interruption.is_none() {
                interruption = observer.poll().err();
                cancelled.store(interruption.is_some(), Ordering::Relaxed);
            }
        }
        let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        interruption.map_or(result, Err)
    })
}

struct Run<'a, 'o> {
    job: Job<'a>,
    observer: &'o mut dyn Observer,
    optimizer: Box<dyn Optimizer>,
    grads: Grads,
    control: Control,
    status: Status,
    /// Sum and number of the step losses since the last log entry.
    pending: (f64, usize),
    /// Sum of all step losses of the run.
    total_loss: f64,
    grad_norm: f64,
    started: Instant,
    logged: (Instant, usize),
}

impl<'a, 'o> Run<'a, 'o> {
    fn new(job: Job<'a>, observer: &'o mut dyn Observer) -> Result<Self> {
        if job.train.is_empty() {
            return Err(Error::data("train_dataset", "has no rows"));
        }
        let (mut sizes, mut grads) = (Vec::new(), Grads::default());
        job.model.read(&mut |model| {
            // Not in the middle of a run.
            job.train.iter().chain(job.eval).try_for_each(|row| model.check_ids(&row.input_ids))?;
            sizes = model.params.all().iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
            grads = Grads::zeros(&model.params);
            Ok(())
        })?;
        if sizes.is_empty() {
            let expected = "nothing to train: call get_peft_model, or load with full_finetuning=True";
            return Err(Error::config("model", "no trainable tensor", expected));
        }
        let embeddings = sizes.iter().any(|(name, _)| is_embedding(name));
        if let (Some(lr), false) = (job.settings.train.embedding_learning_rate, embeddings) {
            let expected = "neither embed_tokens nor lm_head is trained: add them to target_modules of get_peft_model, or leave it out";
            return Err(Error::config("embedding_learning_rate", lr, expected));
        }
        let optimizer = build(job.settings.train.optimizer, job.settings.train.adam, &sizes);
        let status = Status { max_steps: job.settings.plan.total_steps, ..Status::default() };
        let now = Instant::now();
        let mut run = Self {
            job,
            observer,
            optimizer,
            grads,
            control: Control::default(),
            status,
            pending: (0.0, 0),
            total_loss: 0.0,
            grad_norm: 0.0,
            started: now,
            logged: (now, 0),
        };
        if let Some(folder) = run.job.resume {
            run.resume(folder)?;
        }
        Ok(run)
    }

    fn resume(&mut self, folder: &Path) -> Result<()> {
        let refuse = |problem: String| Error::Checkpoint { path: folder.to_owned(), problem };
        checkpoint::verify(folder).map_err(|reason| refuse(format!("is not a complete checkpoint: {reason}")))?;
        let state = checkpoint::read_state(folder)?;
        let own = &state["rustune"];
        let Some(step) = state["global_step"].as_u64() else {
            return Err(refuse(format!("{} has no global_step", checkpoint::STATE_FILE)));
        };
        for (key, now) in self.fingerprint() {
            if !own["data"][key].is_null() && own["data"][key] != now {
                let text = format!(
                    "{key} was {} when {} was made and is {now} now: the order of the remaining rows differs",
                    own["data"][key],
                    folder.display()
                );
                self.tell(Event::Warning(&text))?;
            }
        }
        self.job.model.write(&mut |model| checkpoint::load_params(folder, model))?;
        checkpoint::load_optimizer(folder, &mut *self.optimizer)?;
        self.status.step = step as usize;
        self.status.epoch = self.epoch_at(step as usize);
        self.status.log_history = state["log_history"].as_array().cloned().unwrap_or_default();
        self.status.best_step = state["best_global_step"].as_u64().map(|step| step as usize);
        self.status.best_checkpoint = state["best_model_checkpoint"].as_str().map(PathBuf::from).map(|path| {
            // The output folder may have another name by now.
            let moved = self.job.settings.train.output_dir.join(path.file_name().unwrap_or_default());
            if path.exists() { path } else { moved }
        });
        let exact = |value: &Value| value.as_f64().or_else(|| value.as_str()?.parse().ok());
        self.status.best_metric = exact(&own["best_metric"]);
        self.total_loss = exact(&own["total_loss"]).unwrap_or(0.0);
        self.pending =
            (exact(&own["pending_loss"]).unwrap_or(0.0), own["pending_steps"].as_u64().unwrap_or(0) as usize);
        Ok(())
    }

    /// What the order of rows depends on.
    fn fingerprint(&self) -> [(&'static str, Value); 8] {
        let t = &self.job.settings.train;
        [
            ("packing", json!(t.packing)),
            ("max_length", json!(t.max_length.filter(|_| t.packing))),
            ("rows", json!(self.job.train.len())),
            ("per_device_train_batch_size", json!(t.per_device_train_batch_size)),
            ("gradient_accumulation_steps", json!(t.gradient_accumulation_steps)),
            ("data_seed", json!(t.data_seed)),
            ("order", json!(t.order)),
            ("drop_last", json!(t.drop_last)),
        ]
    }

    fn steps_per_epoch(&self) -> usize {
        self.job.settings.plan.steps_per_epoch
    }

    fn epoch_at(&self, step: usize) -> f64 {
        step as f64 / self.steps_per_epoch() as f64
    }

    fn tell(&mut self, event: Event<'_>) -> Result<()> {
        self.observer.event(event, &self.status, &mut self.control)
    }

    fn train(mut self) -> Result<Outcome> {
        let per_epoch = self.steps_per_epoch();
        let first_step = self.status.step;
        let mut rows_seen = 0;
        self.tell(Event::TrainBegin)?;
        if self.job.settings.train.eval_on_start && first_step == 0 {
            self.evaluate()?;
        }
        let mut order = (usize::MAX, Vec::new());
        while self.status.step < self.job.settings.plan.total_steps && !self.control.stop {
            let (epoch, in_epoch) = (self.status.step / per_epoch, self.status.step % per_epoch);
            if order.0 != epoch {
                order = (epoch, self.job.settings.batches.epoch(epoch));
                self.tell(Event::EpochBegin)?;
            }
            self.control = Control::default();
            self.tell(Event::StepBegin)?;
            let micro_batches = self.job.settings.batches.step(&order.1, in_epoch);
            rows_seen += micro_batches.iter().map(Vec::len).sum::<usize>();
            let loss = self.step(&micro_batches)?;
            self.status.step += 1;
            self.status.epoch = self.epoch_at(self.status.step);
            self.total_loss += loss;
            self.pending = (self.pending.0 + loss, self.pending.1 + 1);
            self.control = self.due();
            self.tell(Event::StepEnd)?;
            self.act()?;
            let ended = self.control.stop || self.status.step >= self.job.settings.plan.total_steps;
            if ended || in_epoch + 1 == per_epoch {
                self.control = self.due_after_epoch();
                self.tell(Event::EpochEnd)?;
                self.act()?;
            }
        }
        if self.job.settings.train.best.load_at_end {
            self.load_best()?;
        }
        self.tell(Event::TrainEnd)?;
        let steps = self.status.step - first_step;
        Ok(Outcome {
            training_loss: self.total_loss / self.status.step.max(1) as f64,
            seconds: self.started.elapsed().as_secs_f64(),
            steps,
            rows: rows_seen,
            status: self.status,
        })
    }

    /// What the settings ask for after the step that was just made.
    fn due(&self) -> Control {
        let Settings { train, plan, .. } = self.job.settings;
        let step = self.status.step;
        let due = |when: When| when.is_due(step, plan.total_steps);
        // Like transformers, a run that saves every so many steps saves its end; it can only be the best if it is scored.
        let last = |when: When| step >= plan.total_steps && when.every(plan.total_steps).is_some();
        let evaluate = due(train.eval) || (last(train.eval) && train.best.load_at_end);
        Control {
            stop: self.control.stop,
            log: due(train.logging) || (train.logging_first_step && step == 1),
            evaluate: evaluate && step as f64 >= train.eval_delay,
            save: due(train.save) || last(train.save),
        }
    }

    /// What the settings ask for after the epoch that was just made, or broken off.
    fn due_after_epoch(&self) -> Control {
        let train = &self.job.settings.train;
        Control {
            stop: self.control.stop,
            log: train.logging == When::Epoch,
            evaluate: train.eval == When::Epoch && self.status.epoch >= train.eval_delay,
            save: train.save == When::Epoch,
        }
    }

    /// Does what was asked for, in transformers' order.
    fn act(&mut self) -> Result<()> {
        if self.control.log && self.pending.1 > 0 {
            self.log()?;
        }
        if self.control.evaluate {
            let entry = self.evaluate()?;
            if self.takes_the_lead(&entry)? && self.job.settings.train.save == When::Best {
                self.control.save = true;
            }
        }
        if self.control.save {
            self.save()?;
        }
        Ok(())
    }

    /// Whether an evaluation is the best so far, which is then noted.
    fn takes_the_lead(&mut self, entry: &Map<String, Value>) -> Result<bool> {
        let best = &self.job.settings.train.best;
        let Some(value) = entry.get(&best.metric).and_then(Value::as_f64) else {
            if !best.keep {
                return Ok(false);
            }
            let names: Vec<_> = entry.keys().map(String::as_str).filter(|name| name.starts_with("eval_")).collect();
            let expected = format!("the evaluation gives {}", names.join(", "));
            return Err(Error::config("metric_for_best_model", &best.metric, expected));
        };
        let leads = best.is_better(value, self.status.best_metric);
        if leads {
            self.status.best_metric = Some(value);
            self.status.best_step = Some(self.status.step);
        }
        Ok(leads)
    }

    /// Puts the best checkpoint's weights into the model.
    fn load_best(&mut self) -> Result<()> {
        let train = &self.job.settings.train;
        let Some(path) = self.status.best_checkpoint.clone() else {
            let text = "load_best_model_at_end: no checkpoint was written at an evaluation better than all before; \
                        the weights are those of the last step";
            return self.tell(Event::Warning(text));
        };
        if let Err(reason) = checkpoint::verify(&path) {
            let text =
                format!("load_best_model_at_end: {}: {reason}; the weights are those of the last step", path.display());
            return self.tell(Event::Warning(&text));
        }
        self.job.model.write(&mut |model| checkpoint::load_params(&path, model))?;
        // The last checkpoint was kept to resume from, which is over.
        if train.save_total_limit == Some(1) { checkpoint::keep_only(&train.output_dir, &path) } else { Ok(()) }
    }

    /// One optimizer step over the rows of its micro-batches; returns its loss.
    fn step(&mut self, micro_batches: &[Vec<u32>]) -> Result<f64> {
        let s = self.job.settings;
        let batches: Vec<_> = micro_batches
            .iter()
            .map(|rows| collate(&rows.iter().map(|&row| (&self.job.train[row as usize], row)).collect::<Vec<_>>()))
            .collect();
        let trained: usize = batches.iter().map(Batch::n_trained).sum();
        if trained == 0 {
            let row = micro_batches.iter().flatten().next().copied().unwrap_or(0);
            return Err(Error::data(format!("row {row} of train_dataset"), "no token of this step is trained"));
        }
        let n_batches = batches.len();
        let dropout = Some(DropoutKey { seed: s.train.seed as u32, step: self.status.step as u32 });
        let mut sum = 0.0;
        self.grads.clear();
        for (i, batch) in batches.into_iter().enumerate() {
            self.status.tokens += batch.n_tokens();
            let (tokens, targets) = split(batch);
            let (lender, grads) = (self.job.model, &mut self.grads);
            sum += computing(self.observer, |poll| {
                let (weight, noise_alpha) = (1.0 / trained as f32, s.train.noise_alpha as f32);
                let options = StepOptions { dropout, noise_alpha, weight, recompute: s.recompute, poll };
                let mut loss = 0.0;
                lender.read(&mut |model| {
                    let batch = MicroBatch { tokens: &tokens, targets: &targets };
                    loss = forward_backward(model, &batch, &options, grads)?;
                    Ok(())
                })?;
                Ok(loss)
            })?;
            if i + 1 < n_batches {
                self.tell(Event::SubstepEnd)?;
            }
        }
        let loss = sum / trained as f64;
        self.diverged("loss", loss)?;
        self.update()?;
        Ok(loss)
    }

    /// Clips and applies the gradients; the model is untouched if they are not finite.
    fn update(&mut self) -> Result<()> {
        let s = self.job.settings;
        let (lr, embedding_lr) = (s.lr_at(self.status.step), s.embedding_lr_at(self.status.step));
        let grads = &self.grads;
        let norm = with_pool(|| Ok(global_norm(&grads.all().iter().map(Vec::as_slice).collect::<Vec<_>>())))?;
        self.grad_norm = norm;
        self.diverged("grad_norm", norm)?;
        let (optimizer, grads) = (&mut self.optimizer, &self.grads);
        self.job.model.write(&mut |model| {
            with_pool(|| {
                let mut slots: Vec<_> = model
                    .params
                    .all_mut()
                    .iter_mut()
                    .zip(grads.all())
                    .map(|(p, grad)| {
                        let lr = if is_embedding(&p.name) { embedding_lr } else { lr };
                        ParamSlot { name: &p.name, data: &mut p.data, grad, decay: p.decay, lr }
                    })
                    .collect();
                optimizer.step(&mut slots, clip_factor(norm, s.train.max_grad_norm))
            })
        })
    }

    fn diverged(&self, what: &'static str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let lr = self.job.settings.lr_at(self.status.step);
        let advice = format!(
            "the weights are those of the step before; lower the learning rate (now {lr:.1e}), \
             or resume from an earlier checkpoint"
        );
        Err(Error::Diverged { step: self.status.step + 1, what, value, advice })
    }

    fn log(&mut self) -> Result<()> {
        let (sum, count) = std::mem::take(&mut self.pending);
        let seconds = self.logged.0.elapsed().as_secs_f64();
        let tokens = self.status.tokens - self.logged.1;
        self.logged = (Instant::now(), self.status.tokens);
        let entry = json!({
            "loss": sum / count as f64,
            "grad_norm": self.grad_norm,
            "learning_rate": self.job.settings.lr_at(self.status.step - 1),
            "epoch": self.status.epoch,
            "step": self.status.step,
            "tokens_per_second": tokens as f64 / seconds.max(1e-9),
        });
        self.record(entry, |entry| Event::Log(entry))
    }

    fn evaluate(&mut self) -> Result<Map<String, Value>> {
        let started = Instant::now();
        let mut entry = match self.observer.evaluate(&self.status)? {
            Some(entry) => entry,
            None => self.score()?,
        };
        entry.insert("epoch".to_owned(), json!(self.status.epoch));
        entry.insert("step".to_owned(), json!(self.status.step));
        // Evaluation's time is not training's.
        self.logged.0 += started.elapsed();
        self.record(Value::Object(entry.clone()), |entry| Event::Evaluate(entry))?;
        Ok(entry)
    }

    /// The loss on the evaluation rows, and how long that took.
    fn score(&mut self) -> Result<Map<String, Value>> {
        if self.job.eval.is_empty() {
            return Err(Error::data(
                "eval_dataset",
                "evaluation was asked for, but there are no rows; pass eval_dataset",
            ));
        }
        let started = Instant::now();
        let batch_size = self.job.settings.train.per_device_eval_batch_size;
        let mut loss = 0.0;
        self.job.model.read(&mut |model| {
            (loss, _) = evaluate(model, self.job.eval, batch_size, self.observer)?;
            Ok(())
        })?;
        let seconds = started.elapsed().as_secs_f64().max(1e-9);
        let numbers = [
            ("eval_loss", loss),
            ("eval_runtime", seconds),
            ("eval_samples_per_second", self.job.eval.len() as f64 / seconds),
            ("eval_steps_per_second", self.job.eval.len().div_ceil(batch_size) as f64 / seconds),
        ];
        Ok(numbers.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect())
    }

    fn record(&mut self, entry: Value, event: impl Fn(&Map<String, Value>) -> Event<'_>) -> Result<()> {
        self.status.log_history.push(entry.clone());
        let Value::Object(entry) = entry else { unreachable!("log entries are objects") };
        self.tell(event(&entry))
    }

    fn save(&mut self) -> Result<()> {
        let s = self.job.settings;
        if self.status.best_step == Some(self.status.step) {
            self.status.best_checkpoint = Some(checkpoint::path(&s.train.output_dir, self.status.step));
        }
        let mut state = checkpoint::state_json(
            self.status.step,
            self.status.epoch,
            s.plan.total_steps,
            &json!(s.train),
            &self.status.log_history,
        );
        state["best_metric"] = json!(self.status.best_metric);
        state["best_global_step"] = json!(self.status.best_step);
        state["best_model_checkpoint"] = json!(self.status.best_checkpoint);
        let own = &mut state["rustune"];
        own["data"] = self.fingerprint().into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        // As texts: a number in JSON is read back to the last bit but one.
        own["total_loss"] = json!(self.total_loss.to_string());
        own["pending_loss"] = json!(self.pending.0.to_string());
        own["best_metric"] = json!(self.status.best_metric.map(|metric| metric.to_string()));
        own["pending_steps"] = json!(self.pending.1);
        let (lender, write_model) = (self.job.model, self.job.write_model);
        let path = checkpoint::save(
            &s.train.output_dir,
            self.status.step,
            (!s.train.save_only_model).then_some(&*self.optimizer),
            &state,
            s.train.save_total_limit,
            self.status.best_checkpoint.as_deref().filter(|_| s.train.best.keep),
            |folder| lender.read(&mut |model| write_model(model, folder)),
        )?;
        self.tell(Event::Save(&path))
    }
}

/// Whether a trained tensor is the embedding table or the head, which may have a learning rate of their own.
fn is_embedding(name: &str) -> bool {
    name.contains("embed_tokens") || name.contains("lm_head")
}
