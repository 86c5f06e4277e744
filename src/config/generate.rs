//! How text is generated.

use serde::{Deserialize, Serialize};

use super::{at_least_one, number};
use crate::error::{Error, Result};

/// Arguments of `generate`, as written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateOptions {
    /// Default 256.
    pub max_new_tokens: Option<i64>,
    /// Default: whether any setting of sampling was written.
    pub do_sample: Option<bool>,
    /// Default 1; 0 means greedy.
    pub temperature: Option<f64>,
    /// Default 50 as in transformers; 0 for off.
    pub top_k: Option<i64>,
    /// Default 1, off.
    pub top_p: Option<f64>,
    /// Default 0, off.
    pub min_p: Option<f64>,
    /// Default 1, off.
    pub repetition_penalty: Option<f64>,
    /// Sequences for each prompt; default 1.
    pub num_return_sequences: Option<i64>,
    /// Tokens that end a sequence; default those of the tokenizer or model.
    pub eos_token_id: Option<Vec<u32>>,
    /// What finished sequences are filled up with; default the first eos token.
    pub pad_token_id: Option<u32>,
    /// Texts that end a sequence; default none.
    pub stop_strings: Option<Vec<String>>,
    /// Default 3407: the same call gives the same text.
    pub seed: Option<u64>,
    /// New tokens before a sequence may end; default 0.
    pub min_new_tokens: Option<i64>,
    /// Tokens, those of the prompt included, before a sequence may end; default 0.
    pub min_length: Option<i64>,
    /// Length of the sequences of tokens that may not come twice; default 0, off.
    pub no_repeat_ngram_size: Option<i64>,
    /// Sequences of tokens that may not come; default none.
    pub bad_words_ids: Option<Vec<Vec<u32>>>,
    /// Tokens that may not come; default none.
    pub suppress_tokens: Option<Vec<u32>>,
    /// Tokens that may not come first; default none.
    pub begin_suppress_tokens: Option<Vec<u32>>,
}

/// What may not come next.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bans {
    /// New tokens before a sequence may end.
    pub min_new_tokens: usize,
    /// Tokens, those of the prompt included, before a sequence may end.
    pub min_length: usize,
    /// Length of the sequences of tokens that may not come twice; 0 for off.
    pub no_repeat_ngram_size: usize,
    /// Sequences of tokens that may not come.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Tokens that may not come.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that may not come first.
    pub begin_suppress_tokens: Vec<u32>,
}

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Only so many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least so likely relative to the likeliest; 0 for all.
    pub min_p: f32,
}

/// Generation as it will go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// Tokens after the prompt, at most.
    pub max_new_tokens: usize,
    /// `None` takes the likeliest token.
    pub sampling: Option<Sampling>,
    /// Divides the positive and multiplies the negative logits of tokens that were there before; 1 for off.
    pub repetition_penalty: f32,
    /// Sequences for each prompt.
    pub num_return_sequences: usize,
    /// Tokens that end a sequence; `None` for those of the model.
    pub eos_token_ids: Option<Vec<u32>>,
    /// What finished sequences are filled up with.
    pub pad_token_id: Option<u32>,
    /// Texts that end a sequence.
    pub stop_strings: Vec<String>,
    /// Seed of the choices.
    pub seed: u64,
    /// What may not come next.
    pub bans: Bans,
}

impl GenerateOptions {
    /// Checks what was written and fills in the rest.
    ///
    /// # Errors
    /// [`Error::Config`] naming a setting that is out of range or contradicts another.
    pub fn resolve(&self) -> Result<Generate> {
        let max_new_tokens = at_least_one("max_new_tokens", self.max_new_tokens, 256)?;
        let temperature = number("temperature", self.temperature, 1.0, |x| x >= 0.0, "expected at least 0")?;
        let share = "expected above 0, at most 1";
        let top_p = number("top_p", self.top_p, 1.0, |x| x > 0.0 && x <= 1.0, share)?;
        let min_p = number("min_p", self.min_p, 0.0, |x| (0.0..=1.0).contains(&x), "expected from 0 to 1")?;
        let top_k = self.top_k.unwrap_or(50);
        let top_k = usize::try_from(top_k).map_err(|_| Error::config("top_k", top_k, "expected at least 0"))?;
        let asked = self.temperature.is_some() || self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let sample = self.do_sample.unwrap_or(asked) && temperature > 0.0;
        let num_return_sequences = at_least_one("num_return_sequences", self.num_return_sequences, 1)?;
        if num_return_sequences > 1 && !sample {
            let expected = "expected 1 without sampling, which gives the same text each time; pass do_sample=True";
            return Err(Error::config("num_return_sequences", num_return_sequences, expected));
        }
        let stop_strings = self.stop_strings.clone().unwrap_or_default();
        if stop_strings.iter().any(String::is_empty) {
            return Err(Error::config("stop_strings", "\"\"", "expected texts that are not empty"));
        }
        let penalty = number("repetition_penalty", self.repetition_penalty, 1.0, |x| x > 0.0, "expected above 0")?;
        let sampling = Sampling { temperature: temperature as f32, top_k, top_p: top_p as f32, min_p: min_p as f32 };
        Ok(Generate {
            max_new_tokens,
            sampling: sample.then_some(sampling),
            repetition_penalty: penalty as f32,
            num_return_sequences,
            eos_token_ids: self.eos_token_id.clone(),
            pad_token_id: self.pad_token_id,
            stop_strings,
            seed: self.seed.unwrap_or(3407),
            bans: self.bans()?,
        })
    }

    fn bans(&self) -> Result<Bans> {
        let count = |field: &'static str, value: Option<i64>| {
            let value = value.unwrap_or(0);
            usize::try_from(value).map_err(|_| Error::config(field, value, "expected at least 0"))
        };
        let bad_words_ids = self.bad_words_ids.clone().unwrap_or_default();
        if bad_words_ids.iter().any(Vec::is_empty) {
            return Err(Error::config("bad_words_ids", "[]", "expected lists of ids that are not empty"));
        }
        Ok(Bans {
            min_new_tokens: count("min_new_tokens", self.min_new_tokens)?,
            min_length: count("min_length", self.min_length)?,
            no_repeat_ngram_size: count("no_repeat_ngram_size", self.no_repeat_ngram_size)?,
            bad_words_ids,
            suppress_tokens: self.suppress_tokens.clone().unwrap_or_default(),
            begin_suppress_tokens: self.begin_suppress_tokens.clone().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::{Value, json};

    fn resolve(options: Value) -> Result<Generate> {
        serde_json::from_value::<GenerateOptions>(options).unwrap().resolve()
    }

    #[test]
    fn greedy_unless_sampling_was_asked_for() {
        let greedy = resolve(json!({})).unwrap();
        assert_eq!((greedy.sampling, greedy.repetition_penalty, greedy.seed), (None, 1.0, 3407));
        let sampling = resolve(json!({"temperature": 1.5, "min_p": 0.1})).unwrap().sampling.unwrap();
        assert_eq!(sampling, Sampling { temperature: 1.5, top_k: 50, top_p: 1.0, min_p: 0.1 });
        assert_eq!(resolve(json!({"temperature": 0.7, "do_sample": false})).unwrap().sampling, None);
        assert_eq!(resolve(json!({"temperature": 0.0, "do_sample": true})).unwrap().sampling, None);
        assert_eq!(resolve(json!({"do_sample": true, "top_k": 0})).unwrap().sampling.unwrap().top_k, 0);
        assert_eq!(resolve(json!({"do_sample": true, "num_return_sequences": 3})).unwrap().num_return_sequences, 3);
    }

    #[test]
    fn every_wrong_value_is_named() {
        for (options, message) in [
            (json!({"max_new_tokens": 0}), "max_new_tokens = 0"),
            (json!({"temperature": -1}), "temperature = -1"),
            (json!({"top_p": 0}), "top_p = 0"),
            (json!({"top_p": 1.1}), "top_p = 1.1"),
            (json!({"top_k": -1}), "top_k = -1"),
            (json!({"min_p": 1.1}), "min_p = 1.1"),
            (json!({"repetition_penalty": 0}), "repetition_penalty = 0"),
            (json!({"num_return_sequences": 2}), "do_sample=True"),
            (json!({"stop_strings": [""]}), "stop_strings"),
            (json!({"min_new_tokens": -1}), "min_new_tokens = -1"),
            (json!({"no_repeat_ngram_size": -2}), "no_repeat_ngram_size = -2"),
            (json!({"bad_words_ids": [[]]}), "bad_words_ids = []"),
        ] {
            let error = resolve(options.clone()).unwrap_err().to_string();
            assert!(error.contains(message), "{options}: {error}");
        }
    }
}
