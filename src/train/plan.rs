//! What a run keeps of its forward, and how much memory that takes: estimated before it is taken.
//!
//! The sums follow the schedule of `train/step.rs` and `model/llama.rs` buffer by buffer; a test holds them against the
//! most that the pool had in use.

use super::in_blocks::{BLOCK, MIN_8BIT_SIZE};
use super::step::{Recompute, first_trained};
use crate::config::{InitWeights, Lora, OptimizerKind};
use crate::error::{Error, Result};
use crate::io::os::{available_memory_bytes, rss_bytes};
use crate::kernels::{self, Kernels};
use crate::lora::Placement;
use crate::lora::peft::placements;
use crate::lora::whole::{self, EMBEDDING, HEAD, Whole};
use crate::model::llama::{Keep, mlp_chunks};
use crate::model::{LoadOptions, Model, ModelConfig, Quantize};
use crate::ops::linear::{Linear, Matrix};
use crate::ops::matmul::packed_whole;
use crate::ops::{Precision, head};
use serde::Serialize;

/// The sizes of a model that the memory of its training follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Layers that are trained or lie above one that is.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Width of the queries.
    pub q_width: usize,
    /// Width of the keys, and of the values.
    pub kv_width: usize,
    /// Query heads.
    pub heads: usize,
    /// Number of tokens.
    pub vocab: usize,
    /// Whether the head is trained.
    pub head_trained: bool,
    /// Floats of a token that a layer's adapters up to the output projection keep: of the layer with the most.
    pub attention_adapters: usize,
    /// Floats of a token that a layer's adapters of the MLP keep.
    pub mlp_adapters: usize,
    /// Whether the MLP's last product is among what runs again: the gradient of a magnitude needs it.
    pub down_again: bool,
    /// Whether adapters drop inputs: a masked copy then stands beside the input.
    pub dropout: bool,
    /// Bytes of a packed operand's element.
    pub packed_bytes: usize,
}

impl Sizes {
    /// Those of a loaded model.
    pub fn of(model: &Model) -> Self {
        let (llama, config) = (&model.llama, &model.config);
        let kept = |linear: &Linear| {
            linear.lora.as_ref().map_or(0, |lora| adapter_floats(lora.rank, lora.dora.is_some(), linear.outputs))
        };
        let most = |range: std::ops::Range<usize>| {
            let floats = llama.layers.iter().map(|layer| layer.linears()[range.clone()].iter().map(|l| kept(l)).sum());
            floats.max().unwrap_or(0)
        };
        let drops = |linear: &&Linear| linear.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0);
        Self {
            layers: llama.layers.len() - first_trained(model),
            hidden: config.hidden_size,
            ffn: config.intermediate_size,
            q_width: config.num_heads * config.head_dim,
            kv_width: config.num_kv_heads * config.head_dim,
            heads: config.num_heads,
            vocab: config.vocab_size,
            head_trained: matches!(llama.head_matrix(), Matrix::Trained(_)),
            attention_adapters: most(0..4),
            mlp_adapters: most(4..7),
            down_again: llama
                .layers
                .iter()
                .any(|layer| layer.down.lora.as_ref().is_some_and(|lora| lora.dora.is_some())),
            dropout: llama.layers.iter().any(|layer| layer.linears().iter().any(drops)),
            packed_bytes: packed_bytes(model.ctx.kernels, model.ctx.precision),
        }
    }

    /// Floats of a token that a layer keeps beside its input.
    fn kept(&self, keep: Keep) -> usize {
        let attention = 2 * self.q_width + 2 * self.kv_width + self.heads + self.hidden + self.attention_adapters;
        let products = attention + 2 * self.ffn + self.mlp_adapters;
        match keep {
            Keep::Input => 0,
            Keep::Attention => attention,
            Keep::Products => products,
            Keep::Everything => products + 2 * self.hidden + self.ffn + 2,
        }
    }

    /// Bytes that a layer's backward takes beside what is kept and the gradient that comes in.
    fn layer_bytes(&self, keep: Keep, n_tokens: usize) -> usize {
        let chunk = mlp_chunks(n_tokens, self.ffn).map(|rows| rows.len()).max().unwrap_or(0);
        let (h, ffn, q, kv) = (self.hidden, self.ffn, self.q_width, self.kv_width);
        // Kept by no one, the attention's buffers are made anew: with the norm's output where it was not dropped.
        let attention = if keep == Keep::Input { n_tokens * (self.kept(Keep::Attention) + h) } else { 0 };
        let gated = if keep < Keep::Products { 2 * ffn + self.mlp_adapters } else { 0 };
        let activated = if keep < Keep::Everything { h + ffn } else { 0 };
        let masked = if self.dropout { ffn } else { 0 };
        let packed = |floats: usize| floats * self.packed_bytes / 4;
        // Through down: dactive and its packed operand. Through gate and up: dgate, dup, h, dh and three packed, or two
        // beside both weights where dx is so narrow that they are packed whole. What was kept is freed on the way.
        let through_down = gated + activated + ffn + masked.max(packed(h));
        let freed = if keep == Keep::Everything { ffn } else { 0 };
        let swiglu = gated + h + 3 * ffn - freed;
        let freed = freed + if keep >= Keep::Products { 2 * ffn } else { 0 };
        // What adapters made anew is there until their gradients are done.
        let made = if keep < Keep::Products { self.mlp_adapters } else { 0 };
        let gradients = 2 * ffn + 2 * h + masked.min(h) + made;
        let own = (gradients + packed(3 * ffn)).saturating_sub(freed);
        let narrow =
            (chunk * (gradients + packed(2 * ffn)) + packed(2 * packed_whole(h, ffn))).saturating_sub(chunk * freed);
        let again = if self.down_again && keep < Keep::Products {
            chunk * (gated + activated + packed(ffn) + 2 * h) + packed(packed_whole(h, ffn))
        } else {
            0
        };
        let mlp = (chunk * through_down.max(swiglu).max(own)).max(narrow).max(again);
        // mid is gone; dattended, dq, dk, dv, D, keys twice and values packed; then h, dh and the packed operands.
        let apart = if keep == Keep::Input { attention - n_tokens * h } else { 0 };
        let through_attention = apart + n_tokens * (2 * q + 5 * kv + self.heads);
        let freed = if keep == Keep::Input { 0 } else { h + 2 * q + 2 * kv };
        let made = if keep == Keep::Input { self.attention_adapters } else { 0 };
        let through_qkv = q + 2 * kv + 2 * h + packed(2 * q + 2 * kv) + masked.min(h) + made;
        let through_qkv = n_tokens * through_qkv.saturating_sub(freed);
        4 * (attention + mlp).max(through_attention).max(through_qkv)
    }

    /// Bytes of activations at the most, with what each layer keeps.
    fn peak_bytes(&self, keeps: &[Keep], n_tokens: usize) -> usize {
        let stream = 4 * n_tokens * self.hidden;
        let mut kept = 0;
        let mut peak = 0;
        for &keep in keeps {
            kept += stream + 4 * n_tokens * self.kept(keep);
            // The gradient that comes in.
            peak = peak.max(kept + stream + self.layer_bytes(keep, n_tokens));
        }
        peak.max(kept + self.head_bytes(n_tokens))
    }

    /// Bytes that the norm before the head, the head and the loss take.
    fn head_bytes(&self, n_tokens: usize) -> usize {
        let stream = 4 * n_tokens * self.hidden;
        let logits = head::logits_at_a_time(n_tokens, self.vocab, self.head_trained);
        let narrow = packed_whole(self.hidden, logits / n_tokens.max(1));
        let logits = 4 * logits + self.packed_bytes * (logits + narrow);
        // x, h, h packed, the sums and the logits; then x, h, the sums, dh and its finished rows.
        (3 * stream + stream * self.packed_bytes / 4 + logits).max(5 * stream)
    }
}

/// What each layer keeps, from the first trained one to the last.
///
/// Under [`Recompute::EveryLayer`] the last layer keeps what it would compute again at once: all of its attention, and of
/// its MLP if that is one chunk. [`Recompute::Within`] upgrades layers from the last to the first: what they keep is free
/// again by the time the lower ones run.
pub fn keeps(sizes: &Sizes, n_tokens: usize, recompute: Recompute) -> Vec<Keep> {
    let n = sizes.layers;
    if recompute == Recompute::Nothing {
        return vec![Keep::Everything; n];
    }
    let mut keeps = vec![Keep::Input; n];
    if let Some(last) = keeps.last_mut() {
        *last = if mlp_chunks(n_tokens, sizes.ffn).len() > 1 { Keep::Attention } else { Keep::Everything };
    }
    let Recompute::Within(bytes) = recompute else { return keeps };
    for level in [Keep::Products, Keep::Everything] {
        for i in (0..n).rev() {
            for keep in [level, Keep::Attention] {
                let mut better = keeps.clone();
                better[i] = keeps[i].max(keep);
                if sizes.peak_bytes(&better, n_tokens) <= bytes {
                    keeps = better;
                    break;
                }
            }
        }
    }
    keeps
}

/// What a user asks for: `use_gradient_checkpointing`, and the trainer's `gradient_checkpointing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checkpointing {
    /// `"unsloth"`: what is fastest in the memory there is.
    Fastest,
    /// `True`: every layer runs again.
    EveryLayer,
    /// `False`: no layer does.
    Nothing,
}

impl Checkpointing {
    /// `unsloth`, `true` or `false`.
    ///
    /// # Errors
    /// [`Error::Config`] for anything else.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "unsloth" => Ok(Self::Fastest),
            "true" => Ok(Self::EveryLayer),
            "false" => Ok(Self::Nothing),
            _ => Err(Error::config("use_gradient_checkpointing", name, "expected \"unsloth\", True or False")),
        }
    }
}

/// Share of the available memory that [`Checkpointing::Fastest`] plans with; the rest is for what else runs.
const SHARE: f64 = 0.8;

/// A run's memory beside that of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Forecast {
    /// What the run takes.
    pub estimate: Estimate,
    /// The process's most resident memory then, where the system says how much it has now.
    pub peak: Option<u64>,
    /// What the process may still take, where the system says so.
    pub available: Option<u64>,
    /// Whether that is enough; `None` where the system does not say.
    pub fits: Option<bool>,
    /// What follows from it.
    #[serde(skip)]
    pub recompute: Recompute,
}

/// The memory of a training run, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// Frozen and trained weights.
    pub model: usize,
    /// The optimizer's state.
    pub optimizer: usize,
    /// The gradients of the trained weights.
    pub gradients: usize,
    /// What the forward keeps for the backward.
    pub kept: usize,
    /// What is in use beside that at the most.
    pub workspace: usize,
    /// Layers that are kept in full, in part, and that run again.
    pub layers: [usize; 3],
    /// Tokens of the micro-batch.
    pub n_tokens: usize,
}

impl Estimate {
    /// All of it.
    pub fn total(&self) -> usize {
        self.model + self.added()
    }

    /// What training takes beside the model.
    pub fn added(&self) -> usize {
        self.optimizer + self.gradients + self.kept + self.workspace
    }
}

/// What the memory of a run follows from.
#[derive(Clone, Debug)]
pub struct Run {
    /// The sizes of the model.
    pub sizes: Sizes,
    /// Bytes of its weights, adapters included.
    pub weights: usize,
    /// Elements of each trained tensor.
    pub trained: Vec<usize>,
    /// The optimizer.
    pub optimizer: OptimizerKind,
    /// Tokens of the largest micro-batch.
    pub n_tokens: usize,
}

impl Run {
    /// The training of a loaded model.
    pub fn of(model: &Model, optimizer: OptimizerKind, n_tokens: usize) -> Self {
        let trained = model.params.all().iter().map(|param| param.data.len()).collect();
        Self { sizes: Sizes::of(model), weights: model.nbytes(), trained, optimizer, n_tokens }
    }

    /// Its memory.
    pub fn estimate(&self, recompute: Recompute) -> Estimate {
        let Self { sizes, n_tokens, .. } = self;
        let keeps = keeps(sizes, *n_tokens, recompute);
        let kept = keeps.iter().map(|&keep| 4 * n_tokens * (sizes.hidden + sizes.kept(keep))).sum();
        let count = |level: fn(Keep) -> bool| keeps.iter().filter(|&&keep| level(keep)).count();
        Estimate {
            model: self.weights,
            optimizer: self.trained.iter().map(|&len| state_bytes(self.optimizer, len)).sum(),
            gradients: 4 * self.trained.iter().sum::<usize>(),
            kept,
            workspace: sizes.peak_bytes(&keeps, *n_tokens) - kept,
            layers: [
                count(|keep| keep >= Keep::Products),
                count(|keep| keep == Keep::Attention),
                count(|keep| keep == Keep::Input),
            ],
            n_tokens: *n_tokens,
        }
    }

    /// How the run goes where the process has `resident` bytes with the model loaded and may take `available` more.
    pub fn forecast(&self, asked: Checkpointing, resident: Option<u64>, available: Option<u64>) -> Forecast {
        let recompute = match (asked, available) {
            (Checkpointing::Nothing, _) => Recompute::Nothing,
            (Checkpointing::EveryLayer, _) | (_, None) => Recompute::EveryLayer,
            (Checkpointing::Fastest, Some(available)) => {
                let least = self.estimate(Recompute::EveryLayer);
                let for_all = (SHARE * available as f64) as usize;
                Recompute::Within(for_all.saturating_sub(least.optimizer + least.gradients))
            }
        };
        let estimate = self.estimate(recompute);
        let added = estimate.added() as u64;
        Forecast {
            peak: resident.map(|now| now + added),
            fits: available.map(|available| added <= available),
            available,
            estimate,
            recompute,
        }
    }

    /// How the training of a loaded model goes on this machine as it is now.
    pub fn forecast_here(&self, asked: Checkpointing) -> Forecast {
        self.forecast(asked, rss_bytes(), available_memory_bytes())
    }

    /// The training of a model that is not loaded yet; `lora`: the adapter it is to get.
    ///
    /// # Errors
    /// [`Error::Config`] if the adapter names no layer of the model.
    pub fn planned(
        c: &ModelConfig,
        options: &LoadOptions,
        lora: &Lora,
        optimizer: OptimizerKind,
        n_tokens: usize,
    ) -> Result<Self> {
        let (h, ffn, q, kv) =
            (c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        // [out, in] in the order of `LINEAR_NAMES`.
        let linears = [(q, h), (kv, h), (kv, h), (h, q), (ffn, h), (ffn, h), (h, ffn)];
        let places = if options.full_finetuning { Vec::new() } else { placements(lora, c.num_layers)? };
        let tied = c.tie_word_embeddings;
        let wholes = if options.full_finetuning { Vec::new() } else { whole::modules(lora, c.num_layers, tied)? };
        let lowest = |whole: &Whole| match *whole {
            EMBEDDING => 0,
            Whole::InputNorm(layer_idx) | Whole::PostNorm(layer_idx) => layer_idx,
            Whole::LastNorm | HEAD => c.num_layers,
        };
        let first = places.iter().map(|p| p.layer_idx).chain(wholes.iter().map(lowest)).min().unwrap_or(0);
        let embedding_trained = options.full_finetuning || wholes.contains(&EMBEDDING);
        let is_head = embedding_trained && tied && lora.ensure_weight_tying;
        let head_trained = options.full_finetuning || wholes.contains(&HEAD) || is_head;
        let adapters = |range: std::ops::Range<usize>| {
            let of_layer = |layer| {
                let here = places.iter().filter(|p| p.layer_idx == layer && range.contains(&p.linear_idx));
                here.map(|p| adapter_floats(p.rank, p.dora, linears[p.linear_idx].0)).sum::<usize>()
            };
            (0..c.num_layers).map(of_layer).max().unwrap_or(0)
        };
        let sizes = Sizes {
            layers: c.num_layers - first,
            hidden: h,
            ffn,
            q_width: q,
            kv_width: kv,
            heads: c.num_heads,
            vocab: c.vocab_size,
            head_trained,
            attention_adapters: adapters(0..4),
            mlp_adapters: adapters(4..7),
            down_again: places.iter().any(|p| p.dora && p.linear_idx == DOWN),
            dropout: places.iter().any(|p| p.dropout > 0.0),
            packed_bytes: packed_bytes(kernels::active()?, options.precision),
        };
        if options.full_finetuning {
            let tables = vec![c.vocab_size * h; if tied { 1 } else { 2 }];
            let norms = vec![h; 2 * c.num_layers + 1];
            let matrices = linears.iter().map(|(rows, cols)| rows * cols).collect::<Vec<_>>().repeat(c.num_layers);
            let trained = [tables, norms, matrices].concat();
            let weights = 4 * trained.iter().sum::<usize>();
            return Ok(Self { sizes, weights, trained, optimizer, n_tokens });
        }
        let of_adapters = places.iter().flat_map(|p| {
            let (rows, cols) = linears[p.linear_idx];
            [p.rank * cols, rows * p.rank].into_iter().chain(p.dora.then_some(rows))
        });
        let of_wholes = wholes.iter().map(|whole| whole.shape(c.vocab_size, h).iter().product());
        let trained: Vec<usize> = of_adapters.chain(of_wholes).collect();
        // A tied table stays as long as either of its two uses does.
        let frozen_tables = if tied {
            usize::from(!(embedding_trained && head_trained))
        } else {
            usize::from(!embedding_trained) + usize::from(!head_trained)
        };
        // A 16-bit checkpoint stays as it is; f32 is rounded where the products are.
        let is_f32 = ["dtype", "torch_dtype"].iter().any(|key| c.json[*key] == "float32");
        let wide = if is_f32 && options.precision != Precision::Bf16 { 4.0 } else { 2.0 };
        let linear_bytes = |&(rows, cols): &(usize, usize)| {
            let bytes_of_one = match options.quantize {
                None => wide,
                Some(Quantize::Int8) => 1.0 + 4.0 / cols as f64,
                Some(Quantize::Nf4 { block_size, double_quant: true }) => 0.5 + (1.0 + 4.0 / 256.0) / block_size as f64,
                Some(Quantize::Nf4 { block_size, double_quant: false }) => 0.5 + 4.0 / block_size as f64,
            };
            (rows * cols) as f64 * bytes_of_one
        };
        let of_layer: f64 = linears.iter().map(linear_bytes).sum();
        let frozen = wide * (frozen_tables * c.vocab_size * h) as f64 + of_layer * c.num_layers as f64;
        // PiSSA keeps the first A and B, to write what became of them.
        let both_halves = |p: &Placement| p.rank * (linears[p.linear_idx].0 + linears[p.linear_idx].1);
        let pissa = matches!(lora.init_lora_weights, InitWeights::Pissa { .. });
        let first = if pissa { places.iter().map(both_halves).sum::<usize>() } else { 0 };
        let weights = frozen as usize + 4 * (trained.iter().sum::<usize>() + first);
        Ok(Self { sizes, weights, trained, optimizer, n_tokens })
    }
}

/// The place of the MLP's last product in `LINEAR_NAMES`.
const DOWN: usize = 6;

/// Floats of a token that an adapter keeps: its low-rank product and, with a magnitude, the output that this multiplies.
fn adapter_floats(rank: usize, dora: bool, outputs: usize) -> usize {
    rank + if dora { outputs } else { 0 }
}

/// Bytes of a packed operand's element: halves where there are products of pairs (the scales of 16-bit blocks, a thirtieth
/// more, are not counted).
fn packed_bytes(kernels: &Kernels, precision: Precision) -> usize {
    match precision {
        Precision::Bf16 if kernels.pairs.is_some() => 2,
        Precision::Int16 => 2,
        Precision::Bf16 | Precision::F32 => 4,
    }
}

/// Bytes of an optimizer's state for a tensor of `len` elements.
fn state_bytes(optimizer: OptimizerKind, len: usize) -> usize {
    match optimizer {
        OptimizerKind::AdamW8bit if len >= MIN_8BIT_SIZE => 2 * len + 8 * len.div_ceil(BLOCK),
        OptimizerKind::AdamW | OptimizerKind::AdamW8bit => 8 * len,
        OptimizerKind::Lion8bit if len >= MIN_8BIT_SIZE => len + 4 * len.div_ceil(BLOCK),
        OptimizerKind::Lion | OptimizerKind::Lion8bit | OptimizerKind::Adagrad { .. } => 4 * len,
        OptimizerKind::Sgd { momentum, .. } => {
            if momentum > 0.0 {
                4 * len
            } else {
                0
            }
        }
        OptimizerKind::RmsProp { momentum, centered, .. } => {
            4 * len * (1 + usize::from(momentum > 0.0) + usize::from(centered))
        }
        // Of a matrix it keeps a number for each row and column, which are few; of a vector as many as it has.
        OptimizerKind::Adafactor if len < MIN_8BIT_SIZE => 4 * len,
        OptimizerKind::Adafactor => 8 * len.isqrt(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::model::testing::{TestShape, random_model, random_tokens};
    use crate::ops::attention::Heads;
    use crate::ops::{DropoutKey, Grads};
    use crate::train::{MicroBatch, StepOptions, forward_backward};

    fn shapes() -> [TestShape; 7] {
        let heads = Heads { heads: 8, kv_heads: 2, head_dim: 32 };
        let usual = TestShape {
            hidden: 256,
            ffn: 1024,
            layers: 4,
            heads,
            vocab: 4096,
            rank: 8,
            dropout: 0.0,
            ..TestShape::wide()
        };
        let chunked = TestShape { ffn: 1 << 15, layers: 2, ..usual };
        let dora = TestShape { dora: true, ..usual };
        [
            usual,
            TestShape { dropout: 0.1, precision: Precision::Bf16, ..usual },
            TestShape { dropout: 0.1, precision: Precision::Int16, ..usual },
            chunked,
            dora,
            TestShape { dropout: 0.1, ..dora },
            TestShape { dora: true, ..chunked },
        ]
    }

    /// The most that a step has in use at once, in bytes.
    fn measured(model: &Model, lengths: &[usize], recompute: Recompute) -> usize {
        let (tokens, targets) = random_tokens(lengths, model.config.vocab_size);
        let dropout = Some(DropoutKey { seed: 0, step: 0 });
        let options = StepOptions { dropout, noise_alpha: 0.0, weight: 1.0, recompute, poll: &|| Ok(()) };
        model.ctx.pool.clear();
        let batch = MicroBatch { tokens: &tokens, targets: &targets };
        forward_backward(model, &batch, &options, &mut Grads::zeros(&model.params)).unwrap();
        model.ctx.pool.peak_bytes()
    }

    #[test]
    fn the_estimate_is_what_the_pool_has_in_use_at_most() {
        for (i, shape) in shapes().into_iter().enumerate() {
            let model = random_model(shape);
            let lengths = [300, 100, 112];
            for recompute in [Recompute::EveryLayer, Recompute::Nothing] {
                let run = Run { weights: 0, trained: Vec::new(), ..Run::of(&model, OptimizerKind::AdamW, 512) };
                let estimated = run.estimate(recompute).total() as f64;
                let measured = measured(&model, &lengths, recompute) as f64;
                let ratio = estimated / measured;
                assert!((0.9..1.15).contains(&ratio), "shape {i}, {recompute:?}: {estimated} against {measured}");
            }
        }
    }

    #[test]
    fn more_memory_keeps_more_and_never_too_much() {
        let model = random_model(shapes()[0]);
        let sizes = Sizes::of(&model);
        let least = keeps(&sizes, 512, Recompute::EveryLayer);
        assert_eq!(least, [Keep::Input, Keep::Input, Keep::Input, Keep::Everything]);
        assert_eq!(keeps(&sizes, 512, Recompute::Within(0)), least, "too little memory keeps what has to be kept");
        assert_eq!(keeps(&sizes, 512, Recompute::Within(usize::MAX)), [Keep::Everything; 4]);
        let (low, high) = (sizes.peak_bytes(&least, 512), sizes.peak_bytes(&[Keep::Everything; 4], 512));
        let mut before = least;
        for share in 1..10 {
            let bytes = low + (high - low) * share / 10;
            let now = keeps(&sizes, 512, Recompute::Within(bytes));
            assert!(sizes.peak_bytes(&now, 512) <= bytes);
            let floats = |keeps: &[Keep]| keeps.iter().map(|&keep| sizes.kept(keep)).sum::<usize>();
            // Layers are kept whole rather than in part: up to one part may be missing.
            assert!(floats(&now) + sizes.kept(Keep::Attention) >= floats(&before), "{now:?} after {before:?}");
            let measured = measured(&model, &[512], Recompute::Within(bytes));
            assert!(measured < bytes * 115 / 100, "{measured} of {bytes}: {now:?}");
            before = now;
        }
        assert_ne!(before, [Keep::Input, Keep::Input, Keep::Input, Keep::Everything]);
    }

    #[test]
    fn a_model_is_estimated_before_it_is_loaded() {
        use crate::config::LoraOptions;
        use crate::lora::peft::attach;
        let shape = TestShape { rank: 0, ..shapes()[0] };
        for (dora, init) in [(false, "gaussian"), (true, "gaussian"), (false, "pissa_niter_0")] {
            let mut model = random_model(shape);
            let written = serde_json::json!({
                "r": 8, "target_modules": ["q_proj", "up_proj"], "finetune_last_n_layers": 2, "use_dora": dora,
                "init_lora_weights": init,
            });
            let lora = serde_json::from_value::<LoraOptions>(written).unwrap().resolve(shape.layers).unwrap();
            let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: false };
            let mut config = model.config.clone();
            config.json["dtype"] = "float32".into();
            let before = Run::planned(&config, &options, &lora, OptimizerKind::AdamW8bit, 100).unwrap();
            attach(&mut model, &lora).unwrap();
            let after = Run::of(&model, OptimizerKind::AdamW8bit, 100);
            assert_eq!((before.sizes, before.weights), (after.sizes, after.weights), "dora {dora}, {init}");
            assert_eq!(before.sizes.layers, 2);
            let sorted = |run: &Run| {
                let mut trained = run.trained.clone();
                trained.sort_unstable();
                trained
            };
            assert_eq!(sorted(&before), sorted(&after));
        }
    }

    #[test]
    fn what_is_trained_whole_is_in_the_estimate() {
        use crate::config::LoraOptions;
        use crate::lora::peft::attach;
        let shape = TestShape { rank: 0, ..shapes()[0] };
        let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: false };
        let mut totals = Vec::new();
        let both = "embed_tokens lm_head";
        for (saved, tying) in
            [("", false), ("lm_head", false), ("embed_tokens", false), (both, false), (both, true), ("norm", false)]
        {
            let saved: Vec<_> = saved.split_whitespace().collect();
            let mut model = random_model(shape);
            let mut config = model.config.clone();
            config.json["dtype"] = "float32".into();
            let written = serde_json::json!({
                "r": 8, "finetune_last_n_layers": 2, "modules_to_save": saved, "ensure_weight_tying": tying,
            });
            let lora = serde_json::from_value::<LoraOptions>(written).unwrap().resolve(shape.layers).unwrap();
            let before = Run::planned(&config, &options, &lora, OptimizerKind::AdamW8bit, 100).unwrap();
            attach(&mut model, &lora).unwrap();
            let after = Run::of(&model, OptimizerKind::AdamW8bit, 100);
            assert_eq!((before.sizes, before.weights), (after.sizes, after.weights), "{saved:?} {tying}");
            assert_eq!(before.trained.iter().sum::<usize>(), after.trained.iter().sum::<usize>(), "{saved:?} {tying}");
            // All layers lie above a trained embedding, and above the first norm.
            let all = saved.contains(&"embed_tokens") || saved.contains(&"norm");
            assert_eq!(after.sizes.layers, if all { 4 } else { 2 }, "{saved:?}");
            totals.push(after.estimate(Recompute::EveryLayer).total());
            let measured = measured(&model, &[300, 100, 112], Recompute::EveryLayer) as f64;
            let run = Run { weights: 0, trained: Vec::new(), ..Run::of(&model, OptimizerKind::AdamW, 512) };
            let ratio = run.estimate(Recompute::EveryLayer).total() as f64 / measured;
            assert!((0.9..1.15).contains(&ratio), "{saved:?} {tying}: {ratio} of what is in use");
        }
        let [none, head, embedding, copies, one, norms] = totals[..] else { unreachable!("six cases") };
        assert!(none < norms && norms < one && one < copies && head < copies && embedding < copies, "{totals:?}");
    }

    #[test]
    fn a_forecast_says_whether_the_memory_is_enough() {
        let run = Run::of(&random_model(shapes()[0]), OptimizerKind::AdamW, 512);
        let enough = run.forecast(Checkpointing::Fastest, Some(1000), Some(1 << 40));
        assert_eq!((enough.estimate.layers, enough.fits), ([4, 0, 0], Some(true)));
        assert_eq!(enough.peak, Some(1000 + enough.estimate.added() as u64));
        let tight = run.forecast(Checkpointing::Fastest, None, Some(1000));
        assert_eq!((tight.estimate.layers, tight.fits, tight.peak), ([1, 0, 3], Some(false), None));
        assert_eq!(run.forecast(Checkpointing::Fastest, None, None).recompute, Recompute::EveryLayer);
        assert_eq!(run.forecast(Checkpointing::Nothing, None, Some(0)).recompute, Recompute::Nothing);
        assert_eq!(run.forecast(Checkpointing::EveryLayer, None, Some(1 << 40)).recompute, Recompute::EveryLayer);
        assert!(Checkpointing::from_name("sometimes").is_err());
    }

    #[test]
    fn an_estimate_counts_the_optimizer_as_it_is() {
        use crate::config::AdamHyper;
        use crate::train::optimizer::build;
        let hyper = AdamHyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let lens = [100, 5_000, 40_000];
        let named: Vec<_> = lens.iter().map(|&len| (len.to_string(), vec![len])).collect();
        for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion, OptimizerKind::Lion8bit] {
            let run = Run::of(&random_model(TestShape { layers: 1, ffn: 64, ..TestShape::wide() }), kind, 10);
            let got = Run { weights: 12, trained: lens.to_vec(), ..run }.estimate(Recompute::EveryLayer);
            assert_eq!((got.optimizer, got.gradients), (build(kind, hyper, &named).state_bytes(), 4 * 45_100));
            assert_eq!(got.total(), 12 + got.added());
        }
    }
}
