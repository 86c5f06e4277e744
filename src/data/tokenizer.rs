//! The text tokenizer: a folder of Hugging Face tokenizer files, opened, used and written back.
//!
//! The vocabulary, its merges and its normalisation are the tokenizers crate's; what is added here is what that crate
//! leaves to transformers: the named special tokens, the pad token, the ids that end a text, the chat templates and
//! the files around `tokenizer.json`.

use super::chat_template::{ChatTemplate, RenderInput, Rendered};
use super::threads;
use super::words::Words;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer as Inner};

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

/// The name of the template used when none is named.
pub const DEFAULT_TEMPLATE: &str = "default";

/// Keys of `tokenizer_config.json`, besides [`ROLES`], whose values are kept in fields of their own.
const KEPT_APART: [&str; 5] =
    ["chat_template", "additional_special_tokens", "extra_special_tokens", "eos_token_ids", "padding_side"];

/// Longest `model_max_length` taken seriously: transformers writes 1e30 for "no limit".
const NO_LIMIT: f64 = 1e9;

/// Which side of the shorter rows of a padded batch is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PaddingSide {
    /// Before the text: for generation.
    Left,
    /// After the text: for training.
    Right,
}

impl PaddingSide {
    /// `left` or `right`, as the files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
        }
    }
}

impl FromStr for PaddingSide {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "left" => Ok(Self::Left),
            "right" => Ok(Self::Right),
            _ => Err(Error::config("padding_side", text, "left or right")),
        }
    }
}

/// Token ids with the part of the text each stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids, `[n_tokens]`.
    pub ids: Vec<u32>,
    /// Byte ranges of the text, `[n_tokens]`, in order and without gaps; tokens that share a character share its range;
    /// empty for tokens that stand for no text (an added BOS).
    pub spans: Vec<(usize, usize)>,
}

/// What encoding needs to know of a vocabulary.
#[derive(Debug, Clone)]
struct Known {
    words: Words,
    /// The ids put before and after every text; `None` if that is not all the post-processor does.
    frame: Option<(Vec<u32>, Vec<u32>)>,
}

/// A vocabulary with its special tokens and chat templates.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Inner,
    /// The rest of `tokenizer_config.json`, as read.
    config: Map<String, Value>,
    /// Role (one of [`ROLES`]) to token.
    special: BTreeMap<String, String>,
    /// Special tokens without a role.
    additional: Vec<String>,
    /// Ids after which generation stops; the eos token's first.
    eos_ids: Vec<u32>,
    /// Name and template; at most one is called [`DEFAULT_TEMPLATE`].
    templates: Vec<(String, ChatTemplate)>,
    padding_side: PaddingSide,
    /// What each id stands for, made when first asked for.
    pieces: OnceLock<Vec<Box<[u8]>>>,
    /// How words are remembered, and what the post-processor puts around a text; made when first asked for.
    known: OnceLock<Known>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("len", &self.len())
            .field("special", &self.special)
            .field("eos_ids", &self.eos_ids)
            .finish_non_exhaustive()
    }
}

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

    /// The number of tokens, added ones included.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether the vocabulary has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token ids of `text`; with `add_special`, what the vocabulary's post-processor adds (usually a BOS).
    ///
    /// Special tokens written in the text become their ids in any case.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the vocabulary cannot spell the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        if self.known().words.are_remembered() {
            return self.encode_with_spans(text, add_special).map(|encoded| encoded.ids);
        }
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| bad("encode", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Like [`encode`](Self::encode), with the byte range of `text` that each token stands for.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_spans(&self, text: &str, add_special: bool) -> Result<Encoded> {
        let known = self.known();
        let encoded = |text: &str| known.words.encode(text, |piece| self.spell(piece, false));
        match (add_special, &known.frame) {
            (false, _) => encoded(text),
            (true, None) => self.spell(text, true),
            (true, Some((before, after))) => {
                let inner = encoded(text)?;
                let end = inner.spans.iter().map(|span| span.1).max().unwrap_or(0);
                let spans = [vec![(0, 0); before.len()], inner.spans, vec![(end, end); after.len()]];
                Ok(Encoded { ids: [&before[..], &inner.ids, after].concat(), spans: spans.concat() })
            }
        }
    }

    /// What of the vocabulary encoding makes use of.
    fn known(&self) -> &Known {
        self.known.get_or_init(|| self.look_at_vocabulary())
    }

    fn look_at_vocabulary(&self) -> Known {
        let probe = |add_special| self.spell("a", add_special).map(|encoded| encoded.ids).unwrap_or_default();
        let (framed, bare) = (probe(true), probe(false));
        let at = framed.windows(bare.len().max(1)).position(|window| window == bare);
        let frame = at.map(|at| (framed[..at].to_vec(), framed[at + bare.len()..].to_vec()));
        Known { words: Words::of(&self.inner), frame }
    }

    /// The tokens of a text as the vocabulary spells it, nothing remembered.
    pub(super) fn spell(&self, text: &str, add_special: bool) -> Result<Encoded> {
        let encoding = self.inner.encode(text, add_special).map_err(|e| bad("encode", e))?;
        let mut end = 0;
        let spans = encoding
            .get_offsets()
            .iter()
            .zip(encoding.get_special_tokens_mask())
            .map(|(&(token_start, token_end), &is_added)| {
                if is_added != 0 {
                    return (end, end);
                }
                // A character of several tokens belongs to each of them. Otherwise a token owns all text since the
                // token before it, because post-processors trim spaces off the offsets.
                let start = if token_end <= end { token_start.min(end) } else { end };
                end = end.max(token_end);
                (start, end)
            })
            .collect();
        Ok(Encoded { ids: encoding.get_ids().to_vec(), spans })
    }

    /// [`encode`](Self::encode) for many texts, on all threads.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], add_special: bool) -> Result<Vec<Vec<u32>>> {
        threads::map(texts, |text| self.encode(text.as_ref(), add_special))?.into_iter().collect()
    }

    /// The text of `ids`; with `skip_special`, without the special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the vocabulary's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| bad("decode", e))
    }

    /// Decodes ids as they come: each call gives the text that became complete with that id, if any.
    pub fn stream(&self, skip_special: bool) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        let mut stream = self.inner.decode_stream(skip_special);
        move |id| stream.step(id).map_err(|e| bad("decode", e))
    }

    /// The id of `token`, if it is one.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token with this id, as the vocabulary spells it (`Ġthe`, `▁the`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Every token and its id, added ones included.
    pub fn vocab(&self) -> std::collections::HashMap<String, u32> {
        self.inner.get_vocab(true)
    }

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

    /// Ids of all added tokens, special or not: those that are never part of a word.
    pub fn added_ids(&self) -> Vec<u32> {
        self.inner.get_added_tokens_decoder().keys().copied().collect()
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

    /// Adds ordinary tokens; returns how many were new to the vocabulary.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the vocabulary refuses one.
    pub fn add_tokens(&mut self, tokens: &[String]) -> Result<usize> {
        let before = self.len();
        let tokens = tokens.iter().map(|token| AddedToken::from(token.as_str(), false));
        self.inner.add_tokens(tokens).map_err(|e| bad("add_tokens", e))?;
        self.pieces = OnceLock::new();
        self.known = OnceLock::new();
        Ok(self.len() - before)
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

    /// Where padding goes.
    pub fn padding_side(&self) -> PaddingSide {
        self.padding_side
    }

    /// Chooses where padding goes.
    pub fn set_padding_side(&mut self, side: PaddingSide) {
        self.padding_side = side;
    }

    /// The longest text the config says the model was made for, in tokens; `None` is no limit.
    pub fn model_max_length(&self) -> Option<usize> {
        self.config
            .get("model_max_length")
            .and_then(Value::as_f64)
            .filter(|&n| n > 0.0 && n < NO_LIMIT)
            .map(|n| n as usize)
    }

    /// Sets or removes the limit of [`model_max_length`](Self::model_max_length).
    pub fn set_model_max_length(&mut self, limit: Option<usize>) {
        match limit {
            Some(limit) => self.config.insert("model_max_length".to_owned(), json!(limit)),
            None => self.config.remove("model_max_length"),
        };
    }

    /// The chat template with this name; [`DEFAULT_TEMPLATE`] is the usual one.
    pub fn template(&self, name: &str) -> Option<&ChatTemplate> {
        self.templates.iter().find(|(known, _)| known == name).map(|(_, template)| template)
    }

    /// The names of the chat templates.
    pub fn template_names(&self) -> Vec<&str> {
        self.templates.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Sets (or, with `None`, removes) the chat template used when none is named.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the template is not valid Jinja.
    pub fn set_template(&mut self, source: Option<&str>) -> Result<()> {
        let template = source.map(ChatTemplate::new).transpose()?;
        self.templates.retain(|(name, _)| name != DEFAULT_TEMPLATE);
        if let Some(template) = template {
            self.templates.insert(0, (DEFAULT_TEMPLATE.to_owned(), template));
        }
        Ok(())
    }

    /// The template to render with: the default one, or `tool_use` when there are tools and such a template.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none.
    pub fn choose_template(&self, with_tools: bool) -> Result<&ChatTemplate> {
        let tools = if with_tools { self.template("tool_use") } else { None };
        tools.or_else(|| self.template(DEFAULT_TEMPLATE)).ok_or_else(|| {
            let others = self.template_names();
            let hint = if others.is_empty() {
                "set one with get_chat_template(tokenizer, \"llama-3.1\") or tokenizer.chat_template = ...".to_owned()
            } else {
                format!("the named ones are {}", others.join(", "))
            };
            bad("chat_template", format!("this tokenizer has no default chat template; {hint}"))
        })
    }

    /// Renders a conversation with [`choose_template`](Self::choose_template).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is no template, or if it refuses the conversation.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<Rendered> {
        self.choose_template(input.tools.is_some())?.render(&self.special, input)
    }

    /// Renders a conversation with another template than the tokenizer's own, if one is given.
    ///
    /// # Errors
    /// As [`render`](Self::render); also if `template` is not valid Jinja.
    pub fn render_with(&self, template: Option<&str>, input: &RenderInput<'_>) -> Result<Rendered> {
        match template {
            Some(source) if source.contains('{') => ChatTemplate::new(source)?.render(&self.special, input),
            Some(name) => match self.template(name) {
                Some(template) => template.render(&self.special, input),
                None => Err(bad("chat_template", format!("{name:?} is neither a template nor the name of one"))),
            },
            None => self.render(input),
        }
    }

    /// The bytes each of `ids` stands for, end to end, and where each starts: `[n + 1]`.
    ///
    /// Unlike [`decode`](Self::decode) this never merges, trims or replaces anything, so that positions in the bytes
    /// are positions among the ids.
    pub fn bytes_of(&self, ids: &[u32]) -> (Vec<u8>, Vec<usize>) {
        let pieces = self.pieces.get_or_init(|| self.spell_pieces());
        let mut bytes = Vec::with_capacity(4 * ids.len());
        let mut starts = Vec::with_capacity(ids.len() + 1);
        for &id in ids {
            starts.push(bytes.len());
            if let Some(piece) = pieces.get(id as usize) {
                bytes.extend_from_slice(piece);
            }
        }
        starts.push(bytes.len());
        (bytes, starts)
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

    /// Reads the roles from the config, then from `special_tokens_map.json` for those the config does not mention.
    fn name_special_tokens(&mut self, legacy_map: &Map<String, Value>) -> Result<()> {
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
    fn find_eos(&mut self, configs: &[&Map<String, Value>]) -> Result<()> {
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
    fn find_pad(&mut self, generation: &Map<String, Value>) -> Result<()> {
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
    fn reconcile_bos(&mut self) -> Result<()> {
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

    /// What each id stands for, by the rules of the vocabulary's decoder.
    fn spell_pieces(&self) -> Vec<Box<[u8]>> {
        let added = self.inner.get_added_tokens_decoder();
        // The decoder is a private type behind a wrapper; its JSON says plainly which rules it has.
        let decoder = self.inner.get_decoder().and_then(|d| serde_json::to_string(d).ok()).unwrap_or_default();
        let has = |name: &str| decoder.contains(&format!("\"type\":\"{name}\""));
        let byte_level = has("ByteLevel");
        let byte_fallback = has("ByteFallback");
        let vocab = self.inner.get_vocab(true);
        let mut pieces: Vec<Box<[u8]>> = vec![Box::default(); vocab.values().max().map_or(0, |&id| id as usize + 1)];
        for (token, id) in vocab {
            let bytes = if let Some(token) = added.get(&id) {
                token.content.as_bytes().to_vec()
            } else if byte_level {
                token.chars().flat_map(byte_level_bytes).collect()
            } else if let Some(byte) = byte_fallback.then(|| fallback_byte(&token)).flatten() {
                vec![byte]
            } else {
                token.replace('▁', " ").into_bytes()
            };
            pieces[id as usize] = bytes.into();
        }
        pieces
    }
}

/// The byte a character of a byte-level token stands for: GPT-2 shows the 188 printable bytes of Latin-1 as
/// themselves and the other 68, in order, as the characters from U+0100.
fn byte_level_bytes(c: char) -> Vec<u8> {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let code = c as u32;
    if printable(code) {
        return vec![code as u8];
    }
    let hidden = (0..256).filter(|&b| !printable(b)).nth(code.wrapping_sub(256) as usize);
    match hidden {
        Some(byte) => vec![byte as u8],
        None => c.to_string().into_bytes(),
    }
}

/// The byte of a fallback token, `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The text of a token written as a string or as `{"content": ...}`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
}

/// An [`Error::Tokenizer`].
#[expect(clippy::needless_pass_by_value, reason = "callers give texts, errors and paths, mostly temporaries")]
fn bad(what: impl ToString, problem: impl ToString) -> Error {
    Error::Tokenizer { what: what.to_string(), problem: problem.to_string() }
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
    use crate::data::testing::{CHATML, chatml, shared_data, tokenizer_json, tokenizer_with, write_folder};
    use proptest::prelude::*;

    #[test]
    fn encodes_and_decodes() {
        let tokenizer = chatml();
        let ids = tokenizer.encode("<|im_start|>user\n\nHi<|im_end|>", true).unwrap();
        assert_eq!(ids, [262, 264, 117, 115, 101, 114, 256, 257, 265]);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "user\n\nHi");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s><|im_start|>user\n\nHi<|im_end|>");
        let texts = ["a", "", "Grüße 🙂"];
        let batch = tokenizer.encode_batch(&texts, false).unwrap();
        for (text, ids) in texts.iter().zip(batch) {
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), *text);
        }
    }

    #[test]
    fn streams_whole_characters() {
        let tokenizer = chatml();
        let text = "é 🙂!";
        let mut next = tokenizer.stream(true);
        let mut streamed = String::new();
        for id in tokenizer.encode(text, false).unwrap() {
            let piece = next(id).unwrap().unwrap_or_default();
            assert!(!piece.contains('\u{FFFD}'));
            streamed += &piece;
        }
        assert_eq!(streamed, text);
    }

    #[test]
    fn spans_cover_the_text() {
        let tokenizer = chatml();
        let text = "Hi you <|im_end|> \n";
        let encoded = tokenizer.encode_with_spans(text, true).unwrap();
        assert_eq!(encoded.spans[0], (0, 0), "the added bos stands for nothing");
        let joined: String = encoded.spans.iter().map(|&(from, to)| &text[from..to]).collect();
        assert_eq!(joined, text);
        // The leading space belongs to its token, although the post-processor trims it off the offsets.
        assert!(encoded.spans.contains(&(2, 4)), "{:?}", encoded.spans);
    }

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

    #[test]
    fn llama_classes_follow_their_bos_flag() {
        let config = |flag| json!({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": flag});
        assert!(tokenizer_with(&config(true)).adds_bos());
        assert!(!tokenizer_with(&config(false)).adds_bos());
    }

    #[test]
    fn agrees_with_llama_cpp_on_gpt2_and_phi2() {
        let Some(data) = shared_data(2) else { return };
        let read = |name: &str| std::fs::read_to_string(data.join("tokenizers").join(name)).unwrap();
        let texts = read("vectors/ggml-vocab-gpt-2.gguf.inp");
        let expected = read("vectors/ggml-vocab-gpt-2.gguf.out");
        let tokenizer = Tokenizer::from_folder(&data.join("tokenizers/gpt2")).unwrap().unwrap();
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let lines: Vec<&str> = expected.lines().collect();
        let mut compared = 0;
        for (text, line) in texts.iter().zip(&lines) {
            let ids: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
            let (bytes, _) = tokenizer.bytes_of(&ids);
            assert_eq!(String::from_utf8_lossy(&bytes), *text);
            compared += 1;
        }
        assert!(compared >= 40, "only {compared} texts");
        let phi = Tokenizer::from_folder(&data.join("tokenizers/phi2")).unwrap().unwrap();
        assert_eq!(phi.special("pad_token"), Some("<|pad|>"));
        let text = "def f(x):\n        return x";
        assert_eq!(phi.decode(&phi.encode(text, true).unwrap(), true).unwrap(), text);
    }

    #[test]
    fn opens_the_stories_model() {
        let Some(data) = shared_data(1) else { return };
        let tokenizer = Tokenizer::from_folder(&data.join("models/stories260K-hf")).unwrap().unwrap();
        assert_eq!((tokenizer.len(), tokenizer.eos_ids()), (512, &[2][..]));
        assert!(tokenizer.adds_bos());
        assert_eq!(tokenizer.special("pad_token"), Some("<unk>"));
        let text = "Once upon a time, Grüße";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids[0], 1);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        assert_eq!(tokenizer.bytes_of(&ids[1..]).0, format!(" {text}").into_bytes());
        // A character of four byte tokens.
        let encoded = tokenizer.encode_with_spans("a 🙂", false).unwrap();
        assert_eq!(encoded.spans.iter().filter(|&&span| span == (2, 6)).count(), 4, "{:?}", encoded.spans);
    }

    proptest! {
        #[test]
        fn any_text_survives(text in "\\PC{0,40}") {
            let tokenizer = chatml();
            let encoded = tokenizer.encode_with_spans(&text, false).unwrap();
            prop_assert_eq!(&encoded.ids, &tokenizer.encode(&text, false).unwrap());
            let (bytes, starts) = tokenizer.bytes_of(&encoded.ids);
            prop_assert_eq!(&bytes, text.as_bytes());
            prop_assert_eq!(starts.len(), encoded.ids.len() + 1);
            for &(from, to) in &encoded.spans {
                prop_assert!(from < to && text.get(from..to).is_some(), "{:?}", encoded.spans);
            }
            prop_assert_eq!(tokenizer.decode(&encoded.ids, false).unwrap(), text);
        }
    }
}
