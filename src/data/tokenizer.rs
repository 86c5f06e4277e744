//! The text tokenizer: a folder of Hugging Face tokenizer files, opened, used and written back.
//!
//! The vocabulary, its merges and its normalisation are the tokenizers crate's; what is added here is what that crate
//! leaves to transformers: the named special tokens, the pad token and the ids that end a text (`special.rs`), the chat
//! templates, and the files around `tokenizer.json` (`files.rs`).

mod files;
mod special;

pub use special::ROLES;

use super::chat_template::{ChatTemplate, RenderInput, Rendered};
use super::threads;
use super::words::Words;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::OnceLock;
use tokenizers::{AddedToken, Tokenizer as Inner};

/// The name of the template used when none is named.
pub const DEFAULT_TEMPLATE: &str = "default";

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

    /// Ids of all added tokens, special or not: those that are never part of a word.
    pub fn added_ids(&self) -> Vec<u32> {
        self.inner.get_added_tokens_decoder().keys().copied().collect()
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

/// An [`Error::Tokenizer`].
#[expect(clippy::needless_pass_by_value, reason = "callers give texts, errors and paths, mostly temporaries")]
fn bad(what: impl ToString, problem: impl ToString) -> Error {
    Error::Tokenizer { what: what.to_string(), problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::data::testing::{chatml, shared_data};
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
