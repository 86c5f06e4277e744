//! A tokenizer's files: a folder of the Hugging Face kind read and written, and all of it as one text.

use super::special::{ROLES, token_text};
use super::{DEFAULT_TEMPLATE, PaddingSide, Tokenizer, bad};
use crate::data::chat_template::ChatTemplate;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::OnceLock;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

/// Keys of `tokenizer_config.json`, besides [`ROLES`], whose values are kept in fields of their own.
const KEPT_APART: [&str; 5] =
    ["chat_template", "additional_special_tokens", "extra_special_tokens", "eos_token_ids", "padding_side"];

impl Tokenizer {
    /// Opens the tokenizer in `folder`: `tokenizer.json` (or `vocab.json` + `merges.txt` of a GPT-2), and beside it,
    /// each if present, `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`,
    /// `chat_template.jinja` (which wins over the one in the config), `additional_chat_templates/*.jinja` and the eos
    /// ids of `generation_config.json` and `config.json`. `Ok(None)` if there is no vocabulary at all.
    ///
    /// **The pad token is never the eos token.** It is the first of: the configured one; `generation_config.json`'s
    /// `pad_token_id`; the first token of the vocabulary named like a pad token (`<|finetune_right_pad_id|>`, `<pad>`,
    /// `[PAD]`, ... , `<unk>`); a new token `<|pad|>` at the end of the vocabulary. Candidates that are the eos or
    /// bos token are passed over.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::Tokenizer`] if one makes no sense.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let metadata = std::fs::metadata(folder).map_err(|e| Error::io(folder, e))?;
        if !metadata.is_dir() {
            return Err(bad(folder.display(), "expected a folder with tokenizer.json"));
        }
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let Some(inner) = read_vocabulary(folder, &config)? else {
            return Ok(None);
        };
        let mut templates = config_templates(&config)?;
        read_template_files(folder, &mut templates)?;
        let generation = read_object(&folder.join("generation_config.json"))?;
        let model = read_object(&folder.join("config.json"))?;
        let legacy_map = read_object(&folder.join("special_tokens_map.json"))?;
        let added = read_object(&folder.join("added_tokens.json"))?;

        let mut tokenizer = Self {
            inner,
            special: BTreeMap::new(),
            additional: Vec::new(),
            eos_ids: Vec::new(),
            templates,
            padding_side: match config.get("padding_side") {
                Some(Value::String(side)) => side.parse()?,
                _ => PaddingSide::Right,
            },
            config,
            pieces: OnceLock::new(),
            known: OnceLock::new(),
        };
        tokenizer.add_listed_tokens(folder, &added)?;
        tokenizer.name_special_tokens(&legacy_map)?;
        tokenizer.find_eos(&[&generation, &model])?;
        tokenizer.find_pad(&generation)?;
        tokenizer.reconcile_bos()?;
        for key in KEPT_APART {
            tokenizer.config.remove(key);
        }
        for role in ROLES {
            tokenizer.config.remove(role);
        }
        Ok(Some(tokenizer))
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and the chat templates into
    /// `folder`, which is made if need be. transformers, tokenizers and [`from_folder`](Self::from_folder) read them.
    ///
    /// The default template goes to `chat_template.jinja` and, for older readers, into the config too.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|e| Error::io(&path, e))
        };
        write("tokenizer.json", &self.inner.to_string(true).map_err(|e| bad("tokenizer.json", e))?)?;
        let mut map: Map<String, Value> =
            self.special.iter().map(|(role, token)| (role.clone(), json!(token))).collect();
        if !self.additional.is_empty() {
            map.insert("additional_special_tokens".to_owned(), json!(self.additional));
        }
        write("tokenizer_config.json", &pretty(&Value::Object(self.config_to_save(&map))))?;
        write("special_tokens_map.json", &pretty(&Value::Object(map)))?;
        for (name, template) in &self.templates {
            if name == DEFAULT_TEMPLATE {
                write("chat_template.jinja", template.source())?;
            } else {
                let named = folder.join("additional_chat_templates");
                std::fs::create_dir_all(&named).map_err(|e| Error::io(&named, e))?;
                write(&format!("additional_chat_templates/{name}.jinja"), template.source())?;
            }
        }
        Ok(())
    }

    /// SHA-256 of everything that changes what this tokenizer does, in hexadecimal; the same on every machine.
    ///
    /// # Errors
    /// As [`to_state`](Self::to_state).
    pub fn content_hash(&self) -> Result<String> {
        let digest = Sha256::digest(self.to_state()?.as_bytes());
        Ok(digest.iter().fold(String::with_capacity(64), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        }))
    }

    /// Everything as one JSON text, for pickling; [`from_state`](Self::from_state) reads it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the vocabulary cannot be written as JSON.
    pub fn to_state(&self) -> Result<String> {
        let inner = self.inner.to_string(false).map_err(|e| bad("tokenizer.json", e))?;
        let templates: Vec<Value> =
            self.templates.iter().map(|(name, template)| json!([name, template.source()])).collect();
        // Sorted, because the order of a config's keys means nothing and must not change the hash.
        let config: BTreeMap<&String, &Value> = self.config.iter().collect();
        let state = json!({
            "tokenizer": inner, "config": config, "special": self.special, "additional": self.additional,
            "eos_ids": self.eos_ids, "templates": templates, "padding_side": self.padding_side.name(),
        });
        Ok(state.to_string())
    }

    /// The tokenizer that [`to_state`](Self::to_state) wrote.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the text is something else.
    pub fn from_state(state: &str) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct State {
            tokenizer: String,
            config: Map<String, Value>,
            special: BTreeMap<String, String>,
            additional: Vec<String>,
            eos_ids: Vec<u32>,
            templates: Vec<(String, String)>,
            padding_side: String,
        }
        let state: State = serde_json::from_str(state).map_err(|e| bad("tokenizer state", e))?;
        let templates = state.templates.into_iter().map(|(name, source)| Ok((name, ChatTemplate::new(&source)?)));
        Ok(Self {
            inner: Inner::from_bytes(state.tokenizer).map_err(|e| bad("tokenizer state", e))?,
            config: state.config,
            special: state.special,
            additional: state.additional,
            eos_ids: state.eos_ids,
            templates: templates.collect::<Result<_>>()?,
            padding_side: state.padding_side.parse()?,
            pieces: OnceLock::new(),
            known: OnceLock::new(),
        })
    }

    /// `tokenizer_config.json` as read, with what may have changed since.
    fn config_to_save(&self, special: &Map<String, Value>) -> Map<String, Value> {
        let mut config = self.config.clone();
        config.extend(special.clone());
        config.entry("tokenizer_class").or_insert_with(|| json!("PreTrainedTokenizerFast"));
        config.insert("padding_side".to_owned(), json!(self.padding_side.name()));
        if self.eos_ids.len() > 1 {
            // generation_config.json belongs to the model and may not be copied along.
            config.insert("eos_token_ids".to_owned(), json!(self.eos_ids));
        }
        let named: Vec<Value> =
            self.templates.iter().map(|(name, t)| json!({"name": name, "template": t.source()})).collect();
        match self.template(DEFAULT_TEMPLATE) {
            Some(only) if named.len() == 1 => {
                config.insert("chat_template".to_owned(), json!(only.source()));
            }
            _ if !named.is_empty() => {
                config.insert("chat_template".to_owned(), json!(named));
            }
            _ => {}
        }
        config
    }

    /// Adds what `added_tokens.json` and the config's `added_tokens_decoder` list and the vocabulary lacks.
    fn add_listed_tokens(&mut self, folder: &Path, added: &Map<String, Value>) -> Result<()> {
        let mut listed: BTreeMap<u64, AddedToken> = BTreeMap::new();
        for (token, id) in added {
            let id = id.as_u64().ok_or_else(|| bad("added_tokens.json", format!("the id of {token:?} is {id}")))?;
            listed.insert(id, AddedToken::from(token.as_str(), false));
        }
        if let Some(Value::Object(decoder)) = self.config.get("added_tokens_decoder") {
            for (id, token) in decoder {
                let Ok(number) = id.parse() else {
                    return Err(bad("added_tokens_decoder", format!("{id:?} is not a token id")));
                };
                let Some(content) = token_text(token) else {
                    return Err(bad("added_tokens_decoder", format!("token {id} has no content")));
                };
                let flag = |name: &str| token.get(name).and_then(Value::as_bool);
                let special = flag("special").unwrap_or(false);
                listed.insert(
                    number,
                    AddedToken::from(content, special)
                        .lstrip(flag("lstrip").unwrap_or(false))
                        .rstrip(flag("rstrip").unwrap_or(false))
                        .single_word(flag("single_word").unwrap_or(false))
                        .normalized(flag("normalized").unwrap_or(!special)),
                );
            }
        }
        for (id, token) in listed {
            if self.inner.token_to_id(&token.content).is_none() {
                let content = token.content.clone();
                self.inner.add_tokens([token]).map_err(|e| bad(folder.display(), e))?;
                let got = self.inner.token_to_id(&content);
                if got.map(u64::from) != Some(id) {
                    return Err(bad(
                        folder.display(),
                        format!(
                            "{content:?} is listed as token {id} but the vocabulary has room for it only at {got:?}"
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// JSON as people read it, with a newline at the end.
fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// The text of a file that need not be there.
fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

/// A JSON object from a file; empty if the file is not there.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let Some(text) = read_text(path)? else {
        return Ok(Map::new());
    };
    serde_json::from_str(&text).map_err(|e| bad(path.display(), format!("not a JSON object: {e}")))
}

/// The vocabulary from `tokenizer.json`, or from a GPT-2's two files.
fn read_vocabulary(folder: &Path, config: &Map<String, Value>) -> Result<Option<Inner>> {
    let path = folder.join("tokenizer.json");
    if let Some(text) = read_text(&path)? {
        let mut inner = Inner::from_bytes(text).map_err(|e| bad(path.display(), e))?;
        // Padding and truncation are asked for at each call, never left over from whoever saved the file.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| bad(path.display(), e))?;
        return Ok(Some(inner));
    }
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if vocab.is_file() && merges.is_file() {
        let model = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy());
        let mut inner = Inner::new(model.build().map_err(|e| bad(vocab.display(), e))?);
        let prefix = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
        inner.with_pre_tokenizer(Some(ByteLevel::new(prefix, true, true)));
        inner.with_decoder(Some(ByteLevel::default()));
        inner.with_post_processor(Some(ByteLevel::new(prefix, false, true)));
        if config.is_empty() && inner.token_to_id("<|endoftext|>").is_some() {
            let end = AddedToken::from("<|endoftext|>", true);
            inner.add_special_tokens([end]).map_err(|e| bad(vocab.display(), e))?;
        }
        return Ok(Some(inner));
    }
    if folder.join("tokenizer.model").is_file() {
        return Err(bad(
            folder.display(),
            "only tokenizer.model is there; save the tokenizer with transformers once to get tokenizer.json",
        ));
    }
    Ok(None)
}

/// The config's `chat_template`: one text, or a list of `{"name", "template"}`.
fn config_templates(config: &Map<String, Value>) -> Result<Vec<(String, ChatTemplate)>> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![(DEFAULT_TEMPLATE.to_owned(), ChatTemplate::new(source)?)]),
        Some(Value::Array(list)) => list
            .iter()
            .map(|entry| {
                let field = |key: &str| entry.get(key).and_then(Value::as_str);
                match (field("name"), field("template")) {
                    (Some(name), Some(source)) => Ok((name.to_owned(), ChatTemplate::new(source)?)),
                    _ => Err(bad("chat_template", "each entry of the list needs a name and a template")),
                }
            })
            .collect(),
        Some(other) => Err(bad("chat_template", format!("expected a text or a list of named ones, got {other}"))),
    }
}

/// `chat_template.jinja` and `additional_chat_templates/*.jinja`; a file wins over the config's template of that name.
fn read_template_files(folder: &Path, templates: &mut Vec<(String, ChatTemplate)>) -> Result<()> {
    let mut found = Vec::new();
    if let Some(source) = read_text(&folder.join("chat_template.jinja"))? {
        found.push((DEFAULT_TEMPLATE.to_owned(), source));
    }
    let additional = folder.join("additional_chat_templates");
    if additional.is_dir() {
        let listing = std::fs::read_dir(&additional).map_err(|e| Error::io(&additional, e))?;
        for entry in listing {
            let path = entry.map_err(|e| Error::io(&additional, e))?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned);
            if let (Some(name), true) = (name, path.extension().is_some_and(|ext| ext == "jinja")) {
                found.push((name, read_text(&path)?.unwrap_or_default()));
            }
        }
        found.sort();
    }
    for (name, source) in found {
        templates.retain(|(known, _)| *known != name);
        templates.push((name, ChatTemplate::new(&source)?));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::data::testing::{CHATML, chatml, tokenizer_json, write_folder};

    #[test]
    fn reads_tokens_however_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({
            "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": null, "model_max_length": 1e30,
            "added_tokens_decoder": {"266": {"content": "<tool>", "special": true}},
            "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
        });
        write_folder(folder.path(), &config);
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("special_tokens_map.json", r#"{"unk_token": "<unk>", "additional_special_tokens": ["<|im_start|>"]}"#);
        write("generation_config.json", r#"{"eos_token_id": [263, 265, 99999]}"#);
        write("chat_template.jinja", "file");
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
        assert_eq!(tokenizer.special("bos_token"), Some("<s>"));
        assert_eq!(tokenizer.special("unk_token"), Some("<unk>"));
        assert_eq!(tokenizer.special("eos_token"), Some("</s>"), "from generation_config.json");
        assert_eq!(tokenizer.eos_ids(), [263, 265]);
        assert_eq!(tokenizer.token_to_id("<tool>"), Some(266));
        assert_eq!(tokenizer.additional_special_tokens(), ["<|im_start|>"]);
        assert_eq!(tokenizer.model_max_length(), None);
        assert_eq!(tokenizer.template("default").unwrap().source(), "file");
        assert_eq!(tokenizer.choose_template(true).unwrap().source(), "t");
    }

    #[test]
    fn saves_what_it_reads() {
        let mut tokenizer = chatml();
        tokenizer.set_padding_side(PaddingSide::Left);
        tokenizer.set_model_max_length(Some(77));
        assert_eq!(tokenizer.add_special_tokens(&["<|tool|>".to_owned()]).unwrap(), 1);
        assert_eq!(tokenizer.add_tokens(&["zzz".to_owned()]).unwrap(), 1);
        tokenizer.set_special("eos_token", "</s>").unwrap();
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        let again = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
        assert_eq!(again.eos_ids(), tokenizer.eos_ids());
        assert_eq!(again.special_tokens(), tokenizer.special_tokens());
        assert_eq!(again.additional_special_tokens(), tokenizer.additional_special_tokens());
        assert_eq!(again.padding_side(), PaddingSide::Left);
        assert_eq!(again.model_max_length(), Some(77));
        assert_eq!(again.template(DEFAULT_TEMPLATE).unwrap().source(), CHATML);
        let text = "<|tool|> zzz you\n\n";
        assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
        // Saving what was saved changes nothing any more.
        let second = tempfile::tempdir().unwrap();
        again.save(second.path()).unwrap();
        let third = Tokenizer::from_folder(second.path()).unwrap().unwrap();
        assert_eq!(third.content_hash().unwrap(), again.content_hash().unwrap());
        // The bare tokenizers library opens it too.
        let bare = Inner::from_file(folder.path().join("tokenizer.json")).unwrap();
        assert_eq!(bare.encode(text, true).unwrap().get_ids(), tokenizer.encode(text, true).unwrap());
    }

    #[test]
    fn state_is_stable_and_complete() {
        let tokenizer = chatml();
        let again = Tokenizer::from_state(&tokenizer.to_state().unwrap()).unwrap();
        assert_eq!(again.content_hash().unwrap(), tokenizer.content_hash().unwrap());
        assert_eq!(chatml().content_hash().unwrap(), tokenizer.content_hash().unwrap());
        let mut other = chatml();
        other.set_padding_side(PaddingSide::Left);
        assert_ne!(other.content_hash().unwrap(), tokenizer.content_hash().unwrap());
        assert!(Tokenizer::from_state("{}").is_err());
    }

    #[test]
    fn no_vocabulary_is_no_tokenizer_and_a_broken_one_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Tokenizer::from_folder(folder.path()).unwrap().is_none());
        assert!(matches!(Tokenizer::from_folder(&folder.path().join("gone")), Err(Error::Io { .. })));
        std::fs::write(folder.path().join("tokenizer.model"), "x").unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        let mut json = tokenizer_json();
        json["added_tokens"] = json!([]);
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::write(folder.path().join("added_tokens.json"), r#"{"<x>": 500}"#).unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains("<x>") && error.contains("500"), "{error}");
    }
}
