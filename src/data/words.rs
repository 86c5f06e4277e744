//! Tokens of whole words, remembered: text repeats its words, and spelling one anew costs far more than looking it up.
//!
//! A text is cut before a space that stands between a visible character and an ASCII letter. Byte-level vocabularies with
//! one of the usual word patterns (GPT-2's, Llama 3's, Qwen's) start a new word there in any case, so the pieces' tokens
//! are the text's tokens; for other vocabularies nothing is cut. Each thread remembers for itself: no locks.

use super::tokenizer::Encoded;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use tokenizers::{ModelWrapper, Tokenizer as Inner};

/// Word patterns (besides GPT-2's own) in which a word holds a space at its beginning only.
const PATTERNS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];
/// Longest piece remembered, in bytes; long ones hardly come again.
const LONGEST: usize = 48;
/// Pieces a thread remembers before it forgets all: some 10 MB.
const MOST: usize = 50_000;

/// Tells tokenizers apart, so that no thread takes the words of one for those of another.
static STAMP: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The stamp of the tokenizer, and its words.
    static WORDS: RefCell<(u64, HashMap<Box<str>, Encoded>)> = RefCell::new((0, HashMap::new()));
}

/// Whether and for which tokenizer words are remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Words {
    stamp: u64,
    cut: bool,
}

impl Words {
    /// What holds for a vocabulary as it is now; to be asked anew after every change.
    pub(super) fn of(inner: &Inner) -> Self {
        Self { stamp: STAMP.fetch_add(1, Ordering::Relaxed), cut: can_be_cut(inner) }
    }

    /// The tokens of `text`, with `spell` asked for pieces not met before; without added specials.
    pub(super) fn encode<E>(self, text: &str, spell: impl Fn(&str) -> Result<Encoded, E>) -> Result<Encoded, E> {
        if !self.cut {
            return spell(text);
        }
        // Taken out while it is used: whatever `spell` does on this thread meets an empty memory, not a borrowed one.
        let (stamp, mut words) = WORDS.take();
        if stamp != self.stamp || words.len() > MOST {
            words.clear();
        }
        let whole = look_up(text, &mut words, spell);
        WORDS.set((self.stamp, words));
        whole
    }

    /// Whether texts of this vocabulary are cut at all.
    pub(super) fn are_remembered(self) -> bool {
        self.cut
    }
}

/// The tokens of `text`, piece by piece.
fn look_up<E>(
    text: &str,
    words: &mut HashMap<Box<str>, Encoded>,
    spell: impl Fn(&str) -> Result<Encoded, E>,
) -> Result<Encoded, E> {
    let mut whole = Encoded::default();
    let mut start = 0;
    for end in cuts(text) {
        let piece = &text[start..end];
        if let Some(known) = words.get(piece) {
            append(&mut whole, known, start);
        } else {
            let spelt = spell(piece)?;
            append(&mut whole, &spelt, start);
            if piece.len() <= LONGEST {
                words.insert(piece.into(), spelt);
            }
        }
        start = end;
    }
    Ok(whole)
}

/// Adds the tokens of a piece that begins at byte `start`.
fn append(whole: &mut Encoded, piece: &Encoded, start: usize) {
    whole.ids.extend_from_slice(&piece.ids);
    whole.spans.extend(piece.spans.iter().map(|&(from, to)| (start + from, start + to)));
}

/// Where pieces end: before each space between a visible character and an ASCII letter, and at the end.
fn cuts(text: &str) -> impl Iterator<Item = usize> + '_ {
    let bytes = text.as_bytes();
    let inner = (1..bytes.len().saturating_sub(1)).filter(move |&at| {
        // White space beyond ASCII ends in a byte of 0x80 or more: such a byte is not taken for a visible character.
        bytes[at] == b' ' && bytes[at + 1].is_ascii_alphabetic() && bytes[at - 1].is_ascii_graphic()
    });
    inner.chain((!text.is_empty()).then_some(text.len()))
}

/// Whether the tokens of a text are those of its pieces.
fn can_be_cut(inner: &Inner) -> bool {
    let ModelWrapper::BPE(model) = inner.get_model() else { return false };
    // NFC never joins anything with a space or an ASCII letter that follows.
    let normalizer = inner.get_normalizer().map(serde_json::to_value);
    let harmless = match &normalizer {
        None => true,
        Some(Ok(value)) => value["type"] == "NFC",
        Some(Err(_)) => false,
    };
    let words = inner.get_pre_tokenizer().map(serde_json::to_value);
    let Some(Ok(words)) = words else { return false };
    let level = |value: &serde_json::Value, use_regex: bool| {
        value["type"] == "ByteLevel" && value["add_prefix_space"] == false && value["use_regex"] == use_regex
    };
    let usual = level(&words, true)
        || words["pretokenizers"].as_array().is_some_and(|steps| match steps.as_slice() {
            [split, last] => {
                let pattern = split["pattern"]["Regex"].as_str().unwrap_or_default();
                PATTERNS.contains(&pattern)
                    && split["behavior"] == "Isolated"
                    && split["invert"] == false
                    && level(last, false)
            }
            _ => false,
        });
    // A token of several words would be cut in two; one that takes the blanks beside it would lose them.
    let tokens_stay_whole = inner.get_added_tokens_decoder().values().all(|token| {
        let blank = token.content.len() > 1 && token.content.bytes().all(|b| b == b' ');
        (blank || !token.content.contains(' ')) && !(token.lstrip || token.rstrip || token.single_word)
    });
    model.dropout.is_none() && harmless && usual && tokens_stay_whole
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::testing::{shared_data, tokenizer_json};
    use super::super::tokenizer::Tokenizer;
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// The test vocabulary with GPT-2's words, or with Llama 3's.
    fn tokenizer(pattern: Option<&str>) -> Tokenizer {
        let mut file = tokenizer_json();
        let level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        file["pre_tokenizer"] = match pattern {
            None => level(true),
            Some(regex) => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, level(false)]}),
        };
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), "{\"bos_token\": \"<s>\"}").unwrap();
        Tokenizer::from_folder(folder.path()).unwrap().unwrap()
    }

    fn same(tokenizer: &Tokenizer, text: &str) {
        for add_special in [false, true] {
            let plain = tokenizer.spell(text, add_special).unwrap();
            let remembered = tokenizer.encode_with_spans(text, add_special).unwrap();
            assert_eq!(remembered, plain, "{text:?}");
            assert_eq!(tokenizer.encode(text, add_special).unwrap(), plain.ids, "{text:?}");
        }
    }

    #[test]
    fn pieces_end_where_words_begin() {
        let pieces = |text: &str| cuts(text).collect::<Vec<_>>();
        assert_eq!(pieces("the cat, sat  on 3 mats. a"), [3, 8, 18, 24, 26]);
        assert_eq!(pieces(" a"), [2]);
        assert_eq!(pieces("\u{a0} a\n b"), [7]);
        assert_eq!(pieces(""), [0usize; 0]);
    }

    #[test]
    fn known_vocabularies_are_cut_and_others_are_not() {
        let cut = |file: &Value| can_be_cut(&Inner::from_bytes(file.to_string()).unwrap());
        let mut file = tokenizer_json();
        assert!(!cut(&file), "no words");
        file["pre_tokenizer"]["use_regex"] = json!(true);
        assert!(cut(&file));
        for (key, value) in [("rstrip", json!(true)), ("content", json!("a b")), ("content", json!("b "))] {
            let mut other = file.clone();
            other["added_tokens"][1][key] = value;
            assert!(!cut(&other), "{key}");
        }
        file["pre_tokenizer"]["add_prefix_space"] = json!(true);
        assert!(!cut(&file));
    }

    #[test]
    fn a_changed_vocabulary_is_spelt_anew() {
        let mut tokenizer = tokenizer(None);
        same(&tokenizer, "x Hi x Hi");
        tokenizer.add_tokens(&["Hi x".to_owned(), "yes".to_owned()]).unwrap();
        same(&tokenizer, "x Hi x yes Hi");
        tokenizer.add_special_tokens(&["<|b|>".to_owned()]).unwrap();
        same(&tokenizer, "x<|b|> Hi x yes Hi");
    }

    #[test]
    fn real_texts_with_a_real_vocabulary() {
        let Some(data) = shared_data(999) else { return };
        let tokenizer = Tokenizer::from_folder(&data.join("tokenizers/gpt2")).unwrap().unwrap();
        let text = std::fs::read_to_string(data.join("instruct/llamafactory_alpaca_en_demo.json")).unwrap();
        let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
        for row in &rows {
            same(&tokenizer, row["output"].as_str().unwrap());
        }
    }

    proptest! {
        #[test]
        fn any_text_has_the_tokens_of_its_pieces(
            parts in prop::collection::vec(prop_oneof![
                "[ \t\n\u{a0}]{1,3}", "[a-cH]{1,4}i?", "[0-9]{1,5}", "[.,:'<|>]{1,2}", "'(s|re|LL)", "\\PC{1,3}",
                Just("<|im_end|>".to_owned()), Just("y".to_owned()), Just(" y".to_owned())
            ], 0..30)
        ) {
            let text = parts.concat();
            for pattern in [None, Some(PATTERNS[0]), Some(PATTERNS[1])] {
                same(&tokenizer(pattern), &text);
            }
        }
    }
}
