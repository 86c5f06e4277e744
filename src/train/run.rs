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
use std::path::Path;
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
}

/// Whoever watches and steers a run.
pub trait Observer {
    /// Hears of an event and may change `control`.
    ///
    /// # Errors
    /// Any error ends the run.
    fn event(&mut self, event: Event<'_>, status: &Status, control: &mut Control) -> Result<()>;

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
            sizes = model.params.all().iter().map(|p| (p.name.clone(), p.data.len())).collect();
            grads = Grads::zeros(&model.params);
            Ok(())
        })?;
        if sizes.is_empty() {
            let expected = "nothing to train: call get_peft_model, or load with full_finetuning=True";
            return Err(Error::config("model", "no trainable tensor", expected));
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
                self.observer.event(Event::Warning(&text), &self.status, &mut self.control)?;
            }
        }
        self.job.model.write(&mut |model| checkpoint::load_params(folder, &mut model.params))?;
        checkpoint::load_optimizer(folder, &mut *self.optimizer)?;
        self.status.step = step as usize;
        self.status.epoch = self.epoch_at(step as usize);
        self.status.log_history = state["log_history"].as_array().cloned().unwrap_or_default();
        self.total_loss = own["total_loss"].as_f64().unwrap_or(0.0);
        self.pending =
            (own["pending_loss"].as_f64().unwrap_or(0.0), own["pending_steps"].as_u64().unwrap_or(0) as usize);
        Ok(())
    }

    /// What the order of rows depends on.
    fn fingerprint(&self) -> [(&'static str, Value); 7] {
        let t = &self.job.settings.train;
        [
            ("packing", json!(t.packing)),
            ("max_length", json!(t.max_length.filter(|_| t.packing))),
            ("rows", json!(self.job.train.len())),
            ("per_device_train_batch_size", json!(t.per_device_train_batch_size)),
            ("gradient_accumulation_steps", json!(t.gradient_accumulation_steps)),
            ("data_seed", json!(t.data_seed)),
            ("order", json!(t.order)),
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
            if in_epoch + 1 == per_epoch {
                let stop = self.control.stop;
                self.control = Control { stop, ..Control::default() };
                self.tell(Event::EpochEnd)?;
                self.act()?;
            }
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
        let due = |when: When| when.is_due(step, plan);
        // Like transformers, a run that saves at all saves its end.
        let last = step >= plan.total_steps && train.save != When::Never;
        Control {
            stop: self.control.stop,
            log: due(train.logging) || (train.logging_first_step && step == 1),
            evaluate: due(train.eval),
            save: due(train.save) || last,
        }
    }

    /// Does what was asked for, in transformers' order.
    fn act(&mut self) -> Result<()> {
        if self.control.log && self.pending.1 > 0 {
            self.log()?;
        }
        if self.control.evaluate {
            self.evaluate()?;
        }
        if self.control.save {
            self.save()?;
        }
        Ok(())
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
                let options = StepOptions { dropout, weight: 1.0 / trained as f32, recompute: s.recompute, poll };
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
        let lr = s.lr_at(self.status.step);
        let grads = &mut self.grads;
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
                    .map(|(p, grad)| ParamSlot { name: &p.name, data: &mut p.data, grad, decay: p.decay })
                    .collect();
                optimizer.step(&mut slots, lr, clip_factor(norm, s.train.max_grad_norm))
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

    fn evaluate(&mut self) -> Result<()> {
        if self.job.eval.is_empty() {
            return Err(Error::data(
                "eval_dataset",
                "evaluation was asked for, but there are no rows; pass eval_dataset",
            ));
        }
        let started = Instant::now();
        let settings = self.job.settings;
        let (batch_size, mut loss) = (settings.train.per_device_eval_batch_size, 0.0);
        self.job.model.read(&mut |model| {
            (loss, _) = evaluate(model, self.job.eval, batch_size, self.observer)?;
            Ok(())
        })?;
        let entry = json!({
            "eval_loss": loss,
            "eval_runtime": started.elapsed().as_secs_f64(),
            "eval_samples_per_second": self.job.eval.len() as f64 / started.elapsed().as_secs_f64().max(1e-9),
            "epoch": self.status.epoch,
            "step": self.status.step,
        });
        // Evaluation's time is not training's.
        self.logged.0 += started.elapsed();
        self.record(entry, |entry| Event::Evaluate(entry))
    }

    fn record(&mut self, entry: Value, event: impl Fn(&Map<String, Value>) -> Event<'_>) -> Result<()> {
        self.status.log_history.push(entry.clone());
        let Value::Object(entry) = entry else { unreachable!("log entries are objects") };
        self.tell(event(&entry))
    }

    fn save(&mut self) -> Result<()> {
        let s = self.job.settings;
        let mut state = checkpoint::state_json(
            self.status.step,
            self.status.epoch,
            s.plan.total_steps,
            &json!(s.train),
            &self.status.log_history,
        );
        let own = &mut state["rustune"];
        own["data"] = self.fingerprint().into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        own["total_loss"] = json!(self.total_loss);
        own["pending_loss"] = json!(self.pending.0);
        own["pending_steps"] = json!(self.pending.1);
        let (lender, write_model) = (self.job.model, self.job.write_model);
        let path = checkpoint::save(
            &s.train.output_dir,
            self.status.step,
            &*self.optimizer,
            &state,
            s.train.save_total_limit,
            |folder| lender.read(&mut |model| write_model(model, folder)),
        )?;
        self.tell(Event::Save(&path))
    }
}
