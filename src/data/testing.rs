//! A tiny byte-level vocabulary for the tests of this folder.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// ChatML with marked answers.
pub(super) const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
    {% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}\
    {{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// `tokenizer.json`: the 256 bytes, a few merges across what a template's marker may touch, and five special tokens.
pub(super) fn tokenizer_json() -> Value {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut hidden = 256..;
    let mut vocab: Map<String, Value> = Map::new();
    for byte in 0..256u32 {
        let code = if printable(byte) { byte } else { hidden.next().unwrap() };
        vocab.insert(char::from_u32(code).unwrap().to_string(), json!(byte));
    }
    let merges = [["Ċ", "Ċ"], ["H", "i"], ["Ġ", "y"], ["Ċ", "H"], [":", "Ċ"]];
    for [a, b] in merges {
        vocab.insert(format!("{a}{b}"), json!(vocab.len()));
    }
    let special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<Value> = special
        .iter()
        .zip(261..)
        .map(|(token, id)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            {"type": "TemplateProcessing",
             "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [262], "tokens": ["<s>"]}}}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges}
    })
}

/// Writes the vocabulary and `config` into `folder`.
pub(super) fn write_folder(folder: &Path, config: &Value) {
    std::fs::write(folder.join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// The tokenizer of such a folder.
pub(super) fn tokenizer_with(config: &Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), config);
    Tokenizer::from_folder(folder.path()).unwrap().unwrap()
}

/// The tokenizer with ChatML, `<|im_end|>` as eos, `<s>` as bos.
pub(super) fn chatml() -> Tokenizer {
    tokenizer_with(&json!({"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}))
}

/// The folder of shared test material, if it is there.
pub(super) fn shared_data(cases: usize) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = ["../shared/data", "../../shared/data"].iter().map(|path| root.join(path)).find(|path| path.is_dir());
    if found.is_none() {
        #[allow(clippy::print_stderr, reason = "a test that leaves cases out says so")]
        {
            eprintln!("left out {cases} cases: shared data not found");
        }
    }
    found
}
