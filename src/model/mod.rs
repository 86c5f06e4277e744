//! Decoders, one readable file per family, and what they share: config, weights, KV cache.

pub mod config;
pub mod decode;
pub mod kv_cache;
pub mod llama;
pub mod save;
#[cfg(test)]
pub(crate) mod testing;
pub mod vocab;
pub mod weights;

pub use config::ModelConfig;
pub use kv_cache::KvCache;
use llama::Layer;
pub use llama::Llama;
pub use weights::{LoadOptions, Quantize};

use crate::error::{Error, Result};
use crate::ops::{Activations, Ctx, Env, ParamStore, Precision, Tokens};
use crate::quant::Int8Matrix;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A loaded model: the decoder, its trainable tensors, and the tools to run it.
pub struct Model {
    /// Where it came from.
    pub folder: PathBuf,
    /// What `config.json` says.
    pub config: ModelConfig,
    /// The decoder.
    pub llama: Llama,
    /// Everything that is trained.
    pub params: ParamStore,
    /// Kernels and buffers.
    pub ctx: Ctx,
    /// Whether the embedding table and the head, where they are frozen, are not those of `folder`: the vocabulary was
    /// resized, or an adapter brought its own.
    pub new_tables: bool,
    /// The head in 8 bits, for generation where asked for ([`Model::set_lm_head_bits`]).
    int8_head: Option<Int8Matrix>,
    /// What generation rounds inputs of layers to ([`Model::set_activation_bits`]).
    activations: Activations,
    /// The same, unless asked otherwise.
    usual_activations: Activations,
}

impl Model {
    /// Loads a Hugging Face model folder, tensor by tensor.
    ///
    /// # Errors
    /// [`Error::Io`] if a file is missing, [`Error::Model`] for a `config.json` we cannot run, [`Error::Weights`] for a
    /// missing, misshapen or non-finite tensor, [`Error::Config`] for `RUSTUNE_ISA`.
    pub fn load(folder: &Path, options: &LoadOptions) -> Result<Self> {
        Self::load_for(folder, options, None, None)
    }

    /// Loads a model for rows of up to `max_seq_length` tokens, more than it was made for if need be: its positions are
    /// then squeezed, see [`ModelConfig::stretch_to`], or scaled as was asked for, see [`ModelConfig::scale_positions`].
    ///
    /// # Errors
    /// As [`load`](Self::load); [`Error::Config`] for a scaling that cannot be used.
    pub fn load_for(
        folder: &Path,
        options: &LoadOptions,
        max_seq_length: Option<usize>,
        rope_scaling: Option<&Value>,
    ) -> Result<Self> {
        let mut config = ModelConfig::read(folder)?;
        match (rope_scaling, max_seq_length) {
            (Some(scaling), length) => config.scale_positions(scaling, length)?,
            (None, Some(length)) => config.stretch_to(length),
            (None, None) => {}
        }
        let ctx = Ctx::new(options.precision)?;
        let mut params = ParamStore::default();
        let llama = weights::load(folder, &config, options, &mut params)?;
        let folder = folder.to_owned();
        let activations = match options.precision {
            Precision::F32 => Activations::Exact,
            Precision::Bf16 | Precision::Int16 => Activations::Bits16,
        };
        let (new_tables, int8_head, usual_activations) = (false, None, activations);
        Ok(Self { folder, config, llama, params, ctx, new_tables, int8_head, activations, usual_activations })
    }

    /// Logits of every token, `[n_tokens, vocab]`.
    ///
    /// # Errors
    /// [`Error::Data`] for an id outside the vocabulary.
    pub fn logits(&self, tokens: &Tokens) -> Result<Vec<f32>> {
        let hidden = self.hidden(tokens)?;
        Ok(self.llama.logits(&self.env(tokens), &hidden).to_vec())
    }

    /// Negative log-likelihood of each target, `[n_tokens]`, 0 where it is -100.
    ///
    /// # Errors
    /// [`Error::Data`] for an id or target outside the vocabulary.
    pub fn token_losses(&self, tokens: &Tokens, targets: &[i32]) -> Result<Vec<f32>> {
        self.check_targets(targets)?;
        let hidden = self.hidden(tokens)?;
        Ok(self.losses_of(&self.env(tokens), &hidden, targets))
    }

    /// [`Model::logits`] and [`Model::token_losses`] of one forward.
    ///
    /// # Errors
    /// [`Error::Data`] for an id or target outside the vocabulary.
    pub fn logits_and_losses(&self, tokens: &Tokens, targets: &[i32]) -> Result<(Vec<f32>, Vec<f32>)> {
        self.check_targets(targets)?;
        let hidden = self.hidden(tokens)?;
        let env = self.env(tokens);
        Ok((self.llama.logits(&env, &hidden).to_vec(), self.losses_of(&env, &hidden, targets)))
    }

    fn losses_of(&self, env: &Env<'_>, hidden: &[f32], targets: &[i32]) -> Vec<f32> {
        let (head, config) = (self.llama.head_matrix(), &self.config);
        crate::ops::head::token_losses(env, head, config.vocab_size, config.hidden_size, hidden, targets)
    }

    /// Hidden states after the last norm, `[n_tokens, hidden]`, without dropout.
    fn hidden(&self, tokens: &Tokens) -> Result<crate::ops::Buf> {
        self.check_ids(&tokens.ids)?;
        Ok(self.llama.forward(&self.env(tokens), None))
    }

    /// The environment of a run without dropout.
    pub fn env<'a>(&'a self, tokens: &'a Tokens) -> Env<'a> {
        Env::new(&self.ctx, &self.params, tokens)
    }

    /// The environment of generation.
    pub fn generation_env<'a>(&'a self, tokens: &'a Tokens) -> Env<'a> {
        Env { activations: self.activations, ..self.env(tokens) }
    }

    /// # Errors
    /// [`Error::Data`] for an id outside the vocabulary.
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            None => Ok(()),
            Some(id) => Err(self.outside_vocabulary("input_ids", i64::from(*id))),
        }
    }

    /// # Errors
    /// [`Error::Data`] for a target that is neither -100 nor in the vocabulary.
    pub fn check_targets(&self, targets: &[i32]) -> Result<()> {
        let vocab = self.config.vocab_size as i64;
        let bad = |t: &&i32| **t != crate::ops::head::IGNORE && !(0..vocab).contains(&i64::from(**t));
        match targets.iter().find(bad) {
            None => Ok(()),
            Some(target) => Err(self.outside_vocabulary("labels", i64::from(*target))),
        }
    }

    fn outside_vocabulary(&self, what: &str, id: i64) -> Error {
        let vocab = self.config.vocab_size;
        let advice = "is this its tokenizer? After adding tokens call model.resize_token_embeddings(len(tokenizer))";
        Error::data(what, format!("id {id} is outside the model's vocabulary of {vocab}; {advice}"))
    }

    /// Number of elements, those of adapters included.
    pub fn n_parameters(&self) -> usize {
        self.llama.n_frozen() + self.params.n_elements()
    }

    /// Bytes of all weights, trained ones included, and of what was taken out of frozen ones.
    pub fn nbytes(&self) -> usize {
        let taken =
            self.llama.layers.iter().flat_map(Layer::linears).filter_map(|linear| linear.lora.as_ref()?.taken.as_ref());
        self.llama.nbytes()
            + 4 * (self.params.n_elements() + taken.map(|taken| taken.a.len() + taken.b.len()).sum::<usize>())
    }
}
