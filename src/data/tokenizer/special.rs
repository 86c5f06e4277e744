//! The special tokens: which token has which role, what ends a text, what fills a row.

use super::{Tokenizer, bad};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper};

/// The roles a special token can have, as `tokenizer_config.json` spells them.
pub const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Tokens that exist for padding in published vocabularies, best first; see [`Tokenizer::from_folder`].
const PAD_CANDIDATES: [&str; 10] = [
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<PAD>",
    "<|PAD_TOKEN|>",
    "<|vision_pad|>",
    "<|placeholder6|>",
    "<|reserved_special_token_0|>",
    "<unk>",
];

impl Tokenizer {
    /// The token that has `role` (one of [`ROLES`]).
    pub fn special(&self, role: &str) -> Option<&str> {
        self.special.get(role).map(String::as_str)
    }

    /// The id of the token that has `role`.
    pub fn special_id(&self, role: &str) -> Option<u32> {
        self.special(role).and_then(|token| self.token_to_id(token))
    }

    /// Every role with its token.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// Special tokens without a role.
    pub fn additional_special_tokens(&self) -> &[String] {
        &self.additional
    }

    /// Ids of all special tokens, sorted: what `skip_special` leaves out.
    pub fn all_special_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self
            .inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// Gives `token` a role; it is added to the vocabulary if it is not there.
    ///
    /// Returns how many tokens were added, 0 or 1.
    ///
    /// # Errors
    /// [`Error::Config`] if the role is unknown, or if the pad token would be the eos token.
    pub fn set_special(&mut self, role: &str, token: &str) -> Result<usize> {
        let Some(role) = ROLES.into_iter().find(|known| *known == role) else {
            return Err(Error::config("special token", role, format!("one of {}", ROLES.join(", "))));
        };
        if role == "pad_token" && self.special("eos_token") == Some(token) {
            return Err(Error::config(
                "pad_token",
                token,
                "another token than eos_token: padding that ends a text teaches the model to never stop",
            ));
        }
        let added = self.make_special(std::slice::from_ref(&token.to_owned()))?;
        self.special.insert(role.to_owned(), token.to_owned());
        if role == "eos_token" {
            let id = self.token_to_id(token).expect("make_special has put it into the vocabulary");
            self.eos_ids.retain(|&known| known != id);
            self.eos_ids.insert(0, id);
            if self.special("pad_token") == Some(token) {
                self.special.remove("pad_token");
                self.find_pad(&Map::new())?;
            }
        }
        Ok(added)
    }

    /// Adds special tokens without a role; returns how many were new to the vocabulary.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the vocabulary refuses one.
    pub fn add_special_tokens(&mut self, tokens: &[String]) -> Result<usize> {
        let added = self.make_special(tokens)?;
        for token in tokens {
            if !self.additional.contains(token) {
                self.additional.push(token.clone());
            }
        }
        Ok(added)
    }

    /// Ids after which a text is over; the eos token's first. Empty if nothing names one.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Whether [`encode`](Self::encode) with `add_special` puts a BOS in front.
    pub fn adds_bos(&self) -> bool {
        let bos = self.special_id("bos_token");
        bos.is_some() && self.encode("a", true).is_ok_and(|ids| ids.first().copied() == bos)
    }

    /// Makes each token special, adding those the vocabulary lacks; returns how many it lacked.
    fn make_special(&mut self, tokens: &[String]) -> Result<usize> {
        let before = self.len();
        if let Some(empty) = tokens.iter().find(|token| token.is_empty()) {
            return Err(Error::config("special token", format!("{empty:?}"), "a text of at least one character"));
        }
        let known = self.inner.get_added_tokens_decoder();
        let missing: Vec<AddedToken> = tokens
            .iter()
            .filter(|token| !known.values().any(|added| added.special && added.content == **token))
            .map(|token| AddedToken::from(token.as_str(), true))
            .collect();
        if !missing.is_empty() {
            self.inner.add_special_tokens(missing).map_err(|e| bad("add_special_tokens", e))?;
            self.pieces = OnceLock::new();
            self.known = OnceLock::new();
        }
        Ok(self.len() - before)
    }

    /// Reads the roles from the config, then from `special_tokens_map.json` for those the config does not mention.
    pub(super) fn name_special_tokens(&mut self, legacy_map: &Map<String, Value>) -> Result<()> {
        let mut tokens = Vec::new();
        for role in ROLES {
            let named = self.config.get(role).or_else(|| legacy_map.get(role));
            if let Some(token) = named.and_then(token_text).filter(|token| !token.is_empty()) {
                self.special.insert(role.to_owned(), token.to_owned());
                tokens.push(token.to_owned());
            }
        }
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            if let Some(Value::Array(list)) = self.config.get(key).or_else(|| legacy_map.get(key)) {
                for token in list.iter().filter_map(token_text) {
                    if !self.additional.iter().any(|known| known == token) {
                        self.additional.push(token.to_owned());
                    }
                }
            }
        }
        tokens.extend(self.additional.iter().cloned());
        // A role given to a token the vocabulary lacks would shift the model's ids; transformers adds it, so do we.
        self.make_special(&tokens)?;
        Ok(())
    }

    /// Collects the ids that end a text: the eos token's, our own list, then those of the model's configs.
    pub(super) fn find_eos(&mut self, configs: &[&Map<String, Value>]) -> Result<()> {
        let mut ids: Vec<u32> = self.special_id("eos_token").into_iter().collect();
        let own = self.config.get("eos_token_ids");
        for listed in own.into_iter().chain(configs.iter().filter_map(|config| config.get("eos_token_id"))) {
            let list = match listed {
                Value::Array(list) => list.as_slice(),
                Value::Null => &[],
                one => std::slice::from_ref(one),
            };
            for value in list {
                let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
                let id = id.ok_or_else(|| bad("eos_token_id", format!("{value} is not a token id")))?;
                // Configs of resized models name ids the vocabulary does not have: such a token is never decoded.
                if !ids.contains(&id) && self.id_to_token(id).is_some() {
                    ids.push(id);
                }
            }
        }
        if let (None, Some(&first)) = (self.special("eos_token"), ids.first()) {
            let token = self.id_to_token(first).expect("only ids of the vocabulary are collected");
            self.make_special(std::slice::from_ref(&token))?;
            self.special.insert("eos_token".to_owned(), token);
        }
        self.eos_ids = ids;
        Ok(())
    }

    /// Chooses the pad token as [`from_folder`](Self::from_folder) says.
    pub(super) fn find_pad(&mut self, generation: &Map<String, Value>) -> Result<()> {
        let taken = [self.special("eos_token"), self.special("bos_token")];
        let usable = |token: &&str| !taken.contains(&Some(*token)) && self.token_to_id(token).is_some();
        let by_config =
            generation.get("pad_token_id").and_then(Value::as_u64).and_then(|id| self.id_to_token(id as u32));
        // The configured token is only refused for being eos: a bos that pads does no harm.
        let configured = self.special("pad_token").filter(|&token| Some(token) != self.special("eos_token"));
        let chosen = configured
            .or_else(|| by_config.as_deref().filter(&usable))
            .or_else(|| PAD_CANDIDATES.into_iter().find(&usable))
            .unwrap_or("<|pad|>")
            .to_owned();
        self.make_special(std::slice::from_ref(&chosen))?;
        self.special.insert("pad_token".to_owned(), chosen);
        Ok(())
    }

    /// Follows `add_bos_token` / `add_eos_token` where transformers does: the classes that rebuild their
    /// post-processor from these two flags. Everywhere else `tokenizer.json` alone decides.
    pub(super) fn reconcile_bos(&mut self) -> Result<()> {
        let class = self.config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        let rebuilt = ["Llama", "CodeLlama", "Gemma", "Cohere"].iter().any(|family| class.starts_with(family));
        let flag = |name: &str, default| self.config.get(name).and_then(Value::as_bool).unwrap_or(default);
        if !rebuilt || (!self.config.contains_key("add_bos_token") && !self.config.contains_key("add_eos_token")) {
            return Ok(());
        }
        let bos = self.special("bos_token").filter(|_| flag("add_bos_token", true));
        let eos = self.special("eos_token").filter(|_| flag("add_eos_token", false));
        let single: Vec<&str> = bos.into_iter().chain(["$A"]).chain(eos).collect();
        let mut tokens: Vec<(String, u32)> = Vec::new();
        for token in bos.into_iter().chain(eos) {
            let id = self.token_to_id(token).expect("roles are given to tokens of the vocabulary only");
            if !tokens.iter().any(|(known, _)| known == token) {
                tokens.push((token.to_owned(), id));
            }
        }
        if tokens.iter().any(|(token, _)| token.contains(' ')) {
            // The crate's template language splits at spaces; no published vocabulary has such a token here.
            return Ok(());
        }
        let template = TemplateProcessing::builder()
            .try_single(single.join(" "))
            .map_err(|e| bad("post_processor", e))?
            .special_tokens(tokens)
            .build()
            .map_err(|e| bad("post_processor", e))?;
        self.inner.with_post_processor(Some(PostProcessorWrapper::from(template)));
        self.known = OnceLock::new();
        Ok(())
    }
}

/// The text of a token written as a string or as `{"content": ...}`.
pub(super) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::data::testing::tokenizer_with;
    use serde_json::json;

    #[test]
    fn pads_with_anything_but_eos() {
        let pad = |config: Value| {
            let tokenizer = tokenizer_with(&config);
            (tokenizer.special("pad_token").unwrap().to_owned(), tokenizer.len())
        };
        assert_eq!(pad(json!({"eos_token": "</s>", "pad_token": "<s>"})), ("<s>".to_owned(), 266));
        assert_eq!(pad(json!({"eos_token": "</s>", "pad_token": "</s>"})), ("<unk>".to_owned(), 266));
        assert_eq!(pad(json!({"eos_token": "</s>"})), ("<unk>".to_owned(), 266));
        let everything = json!({"eos_token": "<unk>", "bos_token": "<unk>", "unk_token": "<unk>"});
        assert_eq!(pad(everything), ("<|pad|>".to_owned(), 267));
        let mut tokenizer = tokenizer_with(&json!({"eos_token": "</s>"}));
        assert!(tokenizer.set_special("pad_token", "</s>").is_err());
        tokenizer.set_special("eos_token", "<unk>").unwrap();
        assert_eq!(tokenizer.special("pad_token"), Some("<|pad|>"), "eos moved onto the pad token");
    }

    #[test]
    fn llama_classes_follow_their_bos_flag() {
        let config = |flag| json!({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": flag});
        assert!(tokenizer_with(&config(true)).adds_bos());
        assert!(!tokenizer_with(&config(false)).adds_bos());
    }
}
