//! Training on the answers only: which tokens of a conversation the model is to learn to say.
//!
//! The text between two markers is searched among the *bytes* the ids stand for, not among the ids: the same marker
//! becomes different tokens in different surroundings (`\n` merges with what follows it), its bytes do not.

use super::chat_template::RenderInput;
use super::nearest::closest_part;
use super::rows::{Example, IGNORE};
use super::threads;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use serde_json::json;

/// What stands before each question and before each answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Markers {
    /// Opens a question: `<|start_header_id|>user<|end_header_id|>\n\n`.
    pub instruction: String,
    /// Opens an answer: `<|start_header_id|>assistant<|end_header_id|>\n\n`.
    pub response: String,
}

impl Markers {
    /// Finds the markers by rendering a probe conversation with the tokenizer's chat template and reading what the
    /// template writes around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is no template, or if its markers cannot be told apart.
    pub fn from_template(tokenizer: &Tokenizer) -> Result<Self> {
        let template = tokenizer.choose_template(false)?;
        let words = ["Qa1Zu", "Rb2Yv", "Sc3Xw", "Td4Wx"];
        let talk: Vec<_> = words
            .iter()
            .enumerate()
            .map(|(i, word)| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": word}))
            .collect();
        let render = |turns: usize, add_generation_prompt| {
            let input = RenderInput { add_generation_prompt, ..RenderInput::new(&talk[..turns]) };
            template.render(tokenizer.special_tokens(), &input).map(|rendered| rendered.text)
        };
        let unclear = || Error::Tokenizer {
            what: "chat_template".to_owned(),
            problem: "questions and answers cannot be told apart in it; give instruction_part and response_part"
                .to_owned(),
        };
        let whole = render(4, false)?;
        // parts[i] is what the template writes after the i-th word.
        let mut parts = Vec::new();
        let mut rest = whole.as_str();
        for word in words {
            let (before, after) = rest.split_once(word).ok_or_else(unclear)?;
            parts.push(before);
            rest = after;
        }
        let (to_question, to_answer, end) = (parts[2], parts[3], rest);
        let after_question = |text: String| text.split_once(words[0]).map(|(_, after)| after.to_owned());
        let closed = after_question(render(1, false)?).ok_or_else(unclear)?;
        let prompted = after_question(render(1, true)?).ok_or_else(unclear)?;
        let prompt = prompted.strip_prefix(&closed).unwrap_or_default();
        let response = answer_marker(to_answer, prompt).unwrap_or_else(|| without_common_start(to_answer, end));
        let instruction = without_common_start(to_question, end);
        if instruction.trim().is_empty() || response.trim().is_empty() || instruction == response {
            return Err(unclear());
        }
        Ok(Self { instruction: instruction.to_owned(), response: response.to_owned() })
    }
}

/// The part of `between` (question to answer) that the generation prompt writes, or begins to write.
fn answer_marker<'a>(between: &'a str, prompt: &str) -> Option<&'a str> {
    let trimmed = prompt.trim_end();
    if trimmed.is_empty() {
        return None;
    }
    if let Some(at) = between.rfind(trimmed) {
        // Blanks after it belong to the marker; what else follows (an empty `<think>` block) is part of the answer.
        let rest = &between[at + trimmed.len()..];
        return Some(&between[at..between.len() - rest.trim_start().len()]);
    }
    // Reasoning models' prompts go on (`<think>`) where a finished answer does not.
    let prefixes = trimmed.char_indices().map(|(at, _)| &trimmed[..at]).filter(|prefix| !prefix.trim().is_empty());
    prefixes
        .rev()
        .find(|prefix| between.trim_end().ends_with(prefix))
        .and_then(|prefix| between.rfind(prefix).map(|at| &between[at..]))
}

/// `text` without the start it shares with `other`: a turn's opening without the end of the turn before it.
fn without_common_start<'a>(text: &'a str, other: &str) -> &'a str {
    if let Some(rest) = text.strip_prefix(other).or_else(|| text.strip_prefix(other.trim_end())) {
        return if rest.trim().is_empty() { text } else { rest };
    }
    text
}

/// Finds the answers in token ids.
#[derive(Debug)]
pub struct ResponseMasker<'a> {
    tokenizer: &'a Tokenizer,
    markers: Markers,
    /// Ways the markers' bytes may come back out of the vocabulary, likeliest first.
    instruction: Vec<Vec<u8>>,
    response: Vec<Vec<u8>>,
    /// Tokens that end a turn.
    turn_ends: Vec<u32>,
}

impl<'a> ResponseMasker<'a> {
    /// Prepares to look for `markers`.
    ///
    /// # Errors
    /// [`Error::Config`] if a marker is empty, [`Error::Tokenizer`] if the vocabulary cannot spell one.
    pub fn new(tokenizer: &'a Tokenizer, markers: Markers) -> Result<Self> {
        for (field, marker) in [("instruction_part", &markers.instruction), ("response_part", &markers.response)] {
            if marker.trim().is_empty() {
                return Err(Error::config(field, format!("{marker:?}"), "the text that stands before every turn"));
            }
        }
        let instruction = spellings(tokenizer, &markers.instruction)?;
        let response = spellings(tokenizer, &markers.response)?;
        Ok(Self { tokenizer, markers, instruction, response, turn_ends: turn_ends(tokenizer)? })
    }

    /// Labels for `ids`: the id itself inside an answer (its end of turn included), [`IGNORE`] elsewhere.
    ///
    /// An answer reaches from the end of a response marker to the first token that ends a turn, which belongs to it; in
    /// formats without one, to the next instruction marker or the end of the row. A token that lies partly in an
    /// answer is trained.
    pub fn labels(&self, ids: &[u32]) -> Vec<i32> {
        let (bytes, starts) = self.tokenizer.bytes_of(ids);
        let mut answers = self.answers(&bytes);
        for (start, end) in &mut answers {
            let first = starts.partition_point(|at| at < start);
            let inside = first..starts.partition_point(|at| at < end).min(ids.len());
            if let Some(last) = inside.into_iter().find(|&i| self.turn_ends.contains(&ids[i])) {
                *end = starts[last + 1];
            }
        }
        let spans: Vec<(usize, usize)> = starts.windows(2).map(|pair| (pair[0], pair[1])).collect();
        labels_inside(ids, &spans, &answers)
    }

    /// Byte ranges of the answers.
    fn answers(&self, bytes: &[u8]) -> Vec<(usize, usize)> {
        let Some((length, found)) = occurrences(bytes, &self.response) else {
            return Vec::new();
        };
        let questions = occurrences(bytes, &self.instruction).map_or(Vec::new(), |(_, found)| found);
        found
            .iter()
            .map(|at| {
                let start = at + length;
                let end = questions.iter().copied().find(|&question| question >= start).unwrap_or(bytes.len());
                (start, end)
            })
            .collect()
    }

    /// Sets the labels of every example and drops those left without a trained token; returns how many were dropped.
    ///
    /// # Errors
    /// [`Error::Data`] naming the marker and the nearest text found, if no example has a trained token.
    pub fn apply(&self, examples: &mut Vec<Example>) -> Result<usize> {
        let labels = threads::map(examples, |example| self.labels(&example.input_ids))?;
        if !examples.is_empty() && labels.iter().all(|labels| !is_trained(labels)) {
            return Err(self.nothing_trained(&examples[0]));
        }
        for (example, labels) in examples.iter_mut().zip(labels) {
            example.labels = labels;
        }
        let before = examples.len();
        examples.retain(Example::is_trained);
        Ok(before - examples.len())
    }

    fn nothing_trained(&self, example: &Example) -> Error {
        let (bytes, _) = self.tokenizer.bytes_of(&example.input_ids);
        let text = String::from_utf8_lossy(&bytes);
        let response = &self.markers.response;
        let problem = if occurrences(&bytes, &self.response).is_some() {
            format!("response_part {response:?} is there, but nothing follows it before the row ends")
        } else {
            let nearest = closest_part(response, &text);
            format!(
                "no row contains response_part {response:?}, so nothing would be trained; the nearest text in the first row is {nearest:?}"
            )
        };
        Error::data("train_on_responses_only", problem)
    }
}

/// Labels for `ids` whose spans touch one of `ranges` (both in order); [`IGNORE`] for the others and for tokens
/// that stand for no text.
pub fn labels_inside(ids: &[u32], spans: &[(usize, usize)], ranges: &[(usize, usize)]) -> Vec<i32> {
    let mut ahead = ranges;
    ids.iter()
        .zip(spans)
        .map(|(&id, &(start, end))| {
            while let [(_, range_end), rest @ ..] = ahead {
                if *range_end > start {
                    break;
                }
                ahead = rest;
            }
            let inside = start < end
                && ahead.first().is_some_and(|&(range_start, range_end)| start < range_end && end > range_start);
            if inside { id as i32 } else { IGNORE }
        })
        .collect()
}

/// Whether any label is a target: the first never is, since nothing comes before it.
pub(super) fn is_trained(labels: &[i32]) -> bool {
    labels.iter().skip(1).any(|&label| label != IGNORE)
}

/// The tokenizer's eos ids, and the token its chat template writes first after an answer.
///
/// A template may end turns with a token that ends no text (`<|end|>` of Phi-3, whose eos token is `<|endoftext|>`).
fn turn_ends(tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut ends = tokenizer.eos_ids().to_vec();
    let word = "Rb2Yv";
    let talk = [json!({"role": "user", "content": "Qa1Zu"}), json!({"role": "assistant", "content": word})];
    // A tokenizer without a template, or with one that refuses such a conversation, has its eos ids.
    let rendered = tokenizer.render(&RenderInput::new(&talk)).map(|rendered| rendered.text).unwrap_or_default();
    if let Some((_, after)) = rendered.split_once(word) {
        let added = tokenizer.added_ids();
        ends.extend(tokenizer.encode(after, false)?.into_iter().find(|id| added.contains(id)));
    }
    Ok(ends)
}

/// The marker as written, as the vocabulary spells it (which may add or drop spaces), and both without outer blanks.
fn spellings(tokenizer: &Tokenizer, marker: &str) -> Result<Vec<Vec<u8>>> {
    let (again, _) = tokenizer.bytes_of(&tokenizer.encode(marker, false)?);
    let mut all = vec![marker.as_bytes().to_vec(), again.clone()];
    all.push(marker.trim_end().as_bytes().to_vec());
    all.push(marker.trim().as_bytes().to_vec());
    all.push(again.trim_ascii().to_vec());
    all.retain(|spelling| !spelling.is_empty());
    let mut unique: Vec<Vec<u8>> = Vec::new();
    for spelling in all {
        if !unique.contains(&spelling) {
            unique.push(spelling);
        }
    }
    Ok(unique)
}

/// Where the first spelling that occurs at all occurs, and its length.
fn occurrences(bytes: &[u8], spellings: &[Vec<u8>]) -> Option<(usize, Vec<usize>)> {
    spellings.iter().find_map(|spelling| {
        let found: Vec<usize> = bytes
            .windows(spelling.len())
            .enumerate()
            .filter(|(_, window)| window == spelling)
            .map(|(at, _)| at)
            .collect();
        (!found.is_empty()).then_some((spelling.len(), found))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::data::testing::{chatml, tokenizer_with};

    fn markers(instruction: &str, response: &str) -> Markers {
        Markers { instruction: instruction.to_owned(), response: response.to_owned() }
    }

    /// The text of the trained tokens.
    fn trained(tokenizer: &Tokenizer, labels: &[i32]) -> String {
        let ids: Vec<u32> = labels.iter().filter(|&&label| label != IGNORE).map(|&label| label as u32).collect();
        String::from_utf8(tokenizer.bytes_of(&ids).0).unwrap()
    }

    #[test]
    fn finds_the_markers_of_usual_templates() {
        let found = |template: &str| {
            let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
            let markers = Markers::from_template(&tokenizer_with(&config)).unwrap();
            (markers.instruction, markers.response)
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let chat = crate::data::testing::CHATML;
        assert_eq!(found(chat), pair("<|im_start|>user\n", "<|im_start|>assistant\n"));
        let llama3 = "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m.role + '<|e|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|h|>assistant<|e|>\n\n' }}{% endif %}";
        assert_eq!(found(llama3), pair("<|h|>user<|e|>\n\n", "<|h|>assistant<|e|>\n\n"));
        let mistral = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
            {% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}";
        assert_eq!(found(mistral), pair("[INST] ", " [/INST] "));
        let vicuna = "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}\
            {% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}\
            {% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";
        assert_eq!(found(vicuna), pair("USER: ", "ASSISTANT: "));
        let thinking = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}";
        assert_eq!(found(thinking), pair("<|user|>", "<|assistant|>"));
        let empty_thoughts = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if loop.last and m.role == 'assistant' %}\
            {{ '\n<think></think>\n' }}{% else %}{{ '\n' }}{% endif %}{{ m.content + eos_token }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}";
        assert_eq!(found(empty_thoughts), pair("<|user|>\n", "<|assistant|>\n"));
        let unclear =
            tokenizer_with(&serde_json::json!({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}));
        assert!(Markers::from_template(&unclear).unwrap_err().to_string().contains("response_part"));
    }

    #[test]
    fn trains_every_answer_and_its_end_of_turn() {
        let tokenizer = chatml();
        let masker = ResponseMasker::new(&tokenizer, Markers::from_template(&tokenizer).unwrap()).unwrap();
        let text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHi you<|im_end|>\n\
                    <|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\nend<|im_end|>\n";
        let ids = tokenizer.encode(text, false).unwrap();
        let labels = masker.labels(&ids);
        // The line break after a turn belongs to the format, not to the answer.
        assert_eq!(trained(&tokenizer, &labels), "Hi you<|im_end|>end<|im_end|>");
        assert_eq!(labels.len(), ids.len());
        // What a tool says between two answers is given, not said.
        let text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\ncall<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n\
                    <|im_start|>assistant\nseven<|im_end|>\n";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(trained(&tokenizer, &masker.labels(&ids)), "call<|im_end|>seven<|im_end|>");
    }

    #[test]
    fn a_turn_may_end_with_another_token_than_a_text() {
        let template = crate::data::testing::CHATML;
        let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
        let tokenizer = tokenizer_with(&config);
        let masker = ResponseMasker::new(&tokenizer, Markers::from_template(&tokenizer).unwrap()).unwrap();
        let ids =
            tokenizer.encode("<|im_start|>assistant\nA<|im_end|>\n<|im_start|>tool\nB<|im_end|>\n</s>", false).unwrap();
        assert_eq!(trained(&tokenizer, &masker.labels(&ids)), "A<|im_end|>");
        // Without a token that ends turns, the next question does.
        let plain = tokenizer_with(&serde_json::json!({}));
        let masker = ResponseMasker::new(&plain, markers("Q:", "A:")).unwrap();
        let ids = plain.encode("Q:x A:yes Q:y A:no", false).unwrap();
        assert_eq!(trained(&plain, &masker.labels(&ids)), "yes no");
    }

    #[test]
    fn survives_merges_across_the_marker() {
        let tokenizer = chatml();
        // `:` + `\n` and `\n` + `H` are merges: the marker's tokens alone occur nowhere in the row.
        let masker = ResponseMasker::new(&tokenizer, markers("### Q:", "### A:\n")).unwrap();
        let ids = tokenizer.encode("### Q: x\n### A:\n\nHi", false).unwrap();
        assert_eq!(trained(&tokenizer, &masker.labels(&ids)), "\n\nHi");
        let masker = ResponseMasker::new(&tokenizer, markers("Q", "A:")).unwrap();
        let ids = tokenizer.encode("Q x A:\nHi", false).unwrap();
        // The token `:\n` lies partly in the answer.
        assert_eq!(trained(&tokenizer, &masker.labels(&ids)), ":\nHi");
        // Blanks around a marker may be lost in a vocabulary's normalisation.
        let masker = ResponseMasker::new(&tokenizer, markers("Q", " A: \n")).unwrap();
        let ids = tokenizer.encode("Qx A:yes", false).unwrap();
        assert_eq!(trained(&tokenizer, &masker.labels(&ids)), "yes");
    }

    #[test]
    fn drops_rows_without_answers_and_refuses_when_all_are() {
        let tokenizer = chatml();
        let masker = ResponseMasker::new(&tokenizer, markers("<|im_start|>user\n", "<|im_start|>asistant\n")).unwrap();
        let row = |text: &str| {
            let input_ids = tokenizer.encode(text, false).unwrap();
            Example { labels: input_ids.iter().map(|&id| id as i32).collect(), input_ids }
        };
        let good = row("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>");
        let bad = row("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n");
        let error = masker.apply(&mut vec![good.clone(), bad.clone()]).unwrap_err().to_string();
        assert!(
            error.contains("asistant") && error.contains("nearest") && error.contains("<|im_start|>assistant"),
            "{error}"
        );
        let masker = ResponseMasker::new(&tokenizer, Markers::from_template(&tokenizer).unwrap()).unwrap();
        let mut rows = vec![bad.clone(), good];
        assert_eq!(masker.apply(&mut rows).unwrap(), 1);
        assert_eq!(trained(&tokenizer, &rows[0].labels), "B<|im_end|>");
        let error = masker.apply(&mut vec![bad]).unwrap_err().to_string();
        assert!(error.contains("nothing follows"), "{error}");
        assert!(ResponseMasker::new(&tokenizer, markers("", "x")).is_err());
    }
}
