//! From dataset rows of any usual shape to token ids and labels.

use super::chat_template::RenderInput;
use super::masking::{Markers, ResponseMasker, is_trained, labels_inside};
use super::nearest::closest_name;
use super::threads;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// The label of a token that is not trained, as in PyTorch.
pub const IGNORE: i32 = -100;

/// A tokenised row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Example {
    /// Token ids, `[n_tokens]`.
    pub input_ids: Vec<u32>,
    /// The id itself where the token is trained, [`IGNORE`] elsewhere; not shifted; `[n_tokens]`.
    pub labels: Vec<i32>,
}

impl Example {
    /// Whether any token is trained. The first token's label does not count: nothing comes before it.
    pub fn is_trained(&self) -> bool {
        is_trained(&self.labels)
    }
}

/// How rows are to be read.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RowOptions {
    /// The column that holds plain text.
    pub text_field: String,
    /// Longest row in tokens; the rest is cut off. `None` cuts nothing.
    pub max_length: Option<usize>,
    /// Rows to keep; reading ends when there are so many. `None` keeps all.
    pub max_rows: Option<usize>,
    /// Train on the completion only. `None`: yes for prompt/completion rows, no for instruction rows.
    pub completion_only_loss: Option<bool>,
    /// Train on the assistant's turns of a conversation only.
    pub assistant_only_loss: bool,
    /// Give texts the BOS and the eos they lack; default true.
    pub add_special_tokens: bool,
    /// Variables for the chat template; `date_string` keeps a template that prints the date the same every day.
    pub variables: Map<String, Value>,
}

impl Default for RowOptions {
    fn default() -> Self {
        Self {
            text_field: "text".to_owned(),
            max_length: None,
            max_rows: None,
            completion_only_loss: None,
            assistant_only_loss: false,
            add_special_tokens: true,
            variables: Map::new(),
        }
    }
}

/// What became of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct RowReport {
    /// Rows read.
    pub rows: usize,
    /// Rows that became examples.
    pub kept: usize,
    /// Rows longer than `max_length`.
    pub cut: usize,
    /// Tokens beyond `max_length`, over all rows.
    pub tokens_lost: usize,
    /// Rows left out because they hold no text.
    pub empty: usize,
    /// Rows left out because none of their tokens would be trained.
    pub untrained: usize,
}

/// The shape of the rows, told from the columns.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// `input_ids`, perhaps with `labels` and masks.
    Tokens,
    /// One column of plain text.
    Text(String),
    /// `prompt` and `completion`, both texts or both lists of messages.
    Completion,
    /// A column of conversations, `role`/`content` or ShareGPT's `from`/`value`.
    Messages(&'static str),
    /// `instruction`, perhaps `input`, and the named answer column.
    Instruction(&'static str),
}

/// Reads a dataset batch by batch.
#[derive(Debug)]
pub struct RowReader<'a> {
    tokenizer: Option<&'a Tokenizer>,
    options: RowOptions,
    kind: Option<Kind>,
    /// For `assistant_only_loss` with a template that does not mark the answers itself.
    masker: Option<ResponseMasker<'a>>,
    examples: Vec<Example>,
    report: RowReport,
}

/// Every column that is read, besides the one of [`RowOptions::text_field`].
const COLUMNS: [&str; 14] = [
    "input_ids",
    "labels",
    "attention_mask",
    "completion_mask",
    "assistant_masks",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "response",
    "tools",
];

/// One row on its way: `Ok(None)` is an empty one.
type Read = Result<Option<Example>>;

impl<'a> RowReader<'a> {
    /// A reader that has seen no rows; the tokenizer may only be missing if the rows hold `input_ids`.
    pub fn new(tokenizer: Option<&'a Tokenizer>, options: RowOptions) -> Self {
        Self { tokenizer, options, kind: None, masker: None, examples: Vec::new(), report: RowReport::default() }
    }

    /// Whether a column is ever looked at.
    pub fn reads(&self, column: &str) -> bool {
        column == self.options.text_field || COLUMNS.contains(&column)
    }

    /// Rows read so far.
    pub fn n_read(&self) -> usize {
        self.report.rows
    }

    /// Tokenises rows given as columns of equal length, on all threads.
    ///
    /// # Errors
    /// [`Error::Data`] naming the row or the columns, [`Error::Tokenizer`] if a chat template refuses.
    pub fn push(&mut self, columns: &[(String, Vec<Value>)]) -> Result<()> {
        let n_rows = columns.first().map_or(0, |(_, values)| values.len());
        if let Some((name, values)) = columns.iter().find(|(_, values)| values.len() != n_rows) {
            return Err(Error::data(
                format!("column {name:?}"),
                format!("expected {n_rows} rows, got {}", values.len()),
            ));
        }
        if self.kind.is_none() {
            let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
            self.begin(recognise(&names, &self.options.text_field)?)?;
        }
        let first = self.report.rows;
        let indices: Vec<usize> = (0..n_rows).collect();
        let this = &*self;
        let read = threads::map(&indices, |&row| {
            let fields = Row { columns, row };
            this.read(&fields).map_err(|error| match error {
                Error::Data { what, problem } => {
                    Error::data(format!("row {}", first + row), format!("{what}: {problem}"))
                }
                Error::Tokenizer { what, problem } => {
                    Error::Tokenizer { what: format!("row {}: {what}", first + row), problem }
                }
                other => other,
            })
        })?;
        for example in read {
            if self.is_full() {
                break;
            }
            self.report.rows += 1;
            self.keep(example?);
        }
        Ok(())
    }

    /// Whether there are as many examples as [`RowOptions::max_rows`] asks for.
    pub fn is_full(&self) -> bool {
        self.options.max_rows.is_some_and(|rows| self.examples.len() >= rows)
    }

    /// The examples, in the order of the rows, and what became of the rest.
    ///
    /// # Errors
    /// [`Error::Data`] if no row became an example, with the reasons.
    pub fn finish(self) -> Result<(Vec<Example>, RowReport)> {
        let report = self.report;
        if self.examples.is_empty() {
            let problem = if report.rows == 0 {
                "it has no rows".to_owned()
            } else {
                format!(
                    "none of its {} rows can be trained on: {} are empty, {} have no trained token{}",
                    report.rows,
                    report.empty,
                    report.untrained,
                    if report.cut > 0 { " (some answers may lie beyond max_length)" } else { "" },
                )
            };
            return Err(Error::data("dataset", problem));
        }
        Ok((self.examples, report))
    }

    /// Checks once what the rows' shape asks of the options and the tokenizer.
    fn begin(&mut self, kind: Kind) -> Result<()> {
        if kind != Kind::Tokens && self.tokenizer.is_none() {
            return Err(Error::data(
                "dataset",
                "its rows hold text but there is no tokenizer; give one, or rows with input_ids",
            ));
        }
        let conversational = matches!(kind, Kind::Messages(_) | Kind::Completion | Kind::Instruction(_));
        if self.options.assistant_only_loss && !conversational {
            return Err(Error::config("assistant_only_loss", true, "rows with messages or conversations"));
        }
        if self.options.completion_only_loss == Some(true) && matches!(kind, Kind::Text(_) | Kind::Messages(_)) {
            return Err(Error::config(
                "completion_only_loss",
                true,
                "rows with prompt and completion; for conversations use assistant_only_loss or train_on_responses_only",
            ));
        }
        if let (true, Kind::Messages(_), Some(tokenizer)) = (self.options.assistant_only_loss, &kind, self.tokenizer)
            && !tokenizer.choose_template(false)?.marks_answers()
        {
            self.masker = Some(ResponseMasker::new(tokenizer, Markers::from_template(tokenizer)?)?);
        }
        self.kind = Some(kind);
        Ok(())
    }

    /// Cuts, counts and keeps one row.
    fn keep(&mut self, example: Option<Example>) {
        let Some(mut example) = example.filter(|example| !example.input_ids.is_empty()) else {
            self.report.empty += 1;
            return;
        };
        let limit = self.options.max_length.unwrap_or(usize::MAX);
        if example.input_ids.len() > limit {
            self.report.cut += 1;
            self.report.tokens_lost += example.input_ids.len() - limit;
            example.input_ids.truncate(limit);
            example.labels.truncate(limit);
        }
        if example.is_trained() {
            self.report.kept += 1;
            self.examples.push(example);
        } else {
            self.report.untrained += 1;
        }
    }

    fn read(&self, row: &Row<'_>) -> Read {
        match self.kind.as_ref().expect("`push` recognises the rows first") {
            Kind::Tokens => read_tokens(row),
            Kind::Text(column) => match row.text(column)? {
                Some(text) => self.example_of_text(text, 0, false).map(Some),
                None => Ok(None),
            },
            Kind::Messages(column) => match row.get(column) {
                None => Ok(None),
                Some(messages) => self.example_of_messages(&standard_messages(messages)?, row),
            },
            Kind::Completion => self.read_completion(row),
            Kind::Instruction(answer) => self.read_instruction(row, answer),
        }
    }

    fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer.expect("`begin` refuses text without a tokenizer")
    }

    /// A text with its BOS (once) and its eos, or as it is without [`RowOptions::add_special_tokens`]; trained from byte
    /// `trained_from` of the text if `masked`.
    fn example_of_text(&self, text: &str, trained_from: usize, masked: bool) -> Result<Example> {
        let (tokenizer, complete) = (self.tokenizer(), self.options.add_special_tokens);
        let mut encoded = tokenizer.encode_with_spans(text, complete)?;
        let bos = tokenizer.special_id("bos_token");
        if complete && bos.is_some() && encoded.ids.len() > 1 && encoded.ids[..2].iter().all(|&id| Some(id) == bos) {
            // The text was rendered by a chat template that writes the BOS itself.
            encoded.ids.remove(0);
            encoded.spans.remove(0);
        }
        if let (true, Some(&eos)) = (complete, tokenizer.eos_ids().first()) {
            let has_end = |(&id, &(start, end)): (&u32, &(usize, usize))| {
                tokenizer.eos_ids().contains(&id) || !text.get(start..end).unwrap_or_default().trim().is_empty()
            };
            // Templates may end in `<|im_end|>\n`: blanks after the end of a turn do not open another.
            let last = encoded.ids.iter().zip(&encoded.spans).rev().find(|&pair| has_end(pair)).map(|(&id, _)| id);
            if !last.is_some_and(|id| tokenizer.eos_ids().contains(&id)) {
                encoded.ids.push(eos);
                encoded.spans.push((text.len(), text.len()));
            }
        }
        let mut labels: Vec<i32> = encoded.ids.iter().map(|&id| id as i32).collect();
        if masked {
            labels = labels_inside(&encoded.ids, &encoded.spans, &[(trained_from, text.len())]);
            if let (Some(label), Some(&id)) = (labels.last_mut(), encoded.ids.last()) {
                // The appended eos stands for no text, and is what the model most needs to learn.
                *label = id as i32;
            }
        }
        Ok(Example { input_ids: encoded.ids, labels })
    }

    /// A conversation as the chat template renders it.
    fn example_of_messages(&self, messages: &[Value], row: &Row<'_>) -> Read {
        if messages.is_empty() {
            return Ok(None);
        }
        let tokenizer = self.tokenizer();
        let input = self.render_input(messages, row);
        let rendered = tokenizer.render(&input)?;
        if self.options.assistant_only_loss && self.masker.is_none() {
            let encoded = tokenizer.encode_with_spans(&rendered.text, false)?;
            let labels = labels_inside(&encoded.ids, &encoded.spans, &rendered.answers);
            return Ok(Some(Example { input_ids: encoded.ids, labels }));
        }
        // Spans cost as much as the ids do.
        let input_ids = tokenizer.encode(&rendered.text, false)?;
        let labels = match &self.masker {
            Some(masker) => masker.labels(&input_ids),
            None => input_ids.iter().map(|&id| id as i32).collect(),
        };
        Ok(Some(Example { input_ids, labels }))
    }

    fn render_input<'r>(&'r self, messages: &'r [Value], row: &'r Row<'_>) -> RenderInput<'r> {
        let tools = row.get("tools").filter(|tools| tools.as_array().is_some_and(|list| !list.is_empty()));
        RenderInput { tools, variables: Some(&self.options.variables), ..RenderInput::new(messages) }
    }

    fn read_completion(&self, row: &Row<'_>) -> Read {
        let masked = self.options.completion_only_loss.unwrap_or(true);
        match (row.get("prompt"), row.get("completion")) {
            (None | Some(Value::String(_)), None | Some(Value::String(_))) => {
                let (prompt, completion) = (row.text("prompt")?.unwrap_or_default(), row.text("completion")?);
                let Some(completion) = completion else { return Ok(None) };
                self.example_of_text(&format!("{prompt}{completion}"), prompt.len(), masked).map(Some)
            }
            (Some(prompt @ Value::Array(_)), Some(completion @ Value::Array(_))) => {
                let mut messages = standard_messages(prompt)?;
                let n_prompt = messages.len();
                messages.extend(standard_messages(completion)?);
                self.example_of_exchange(&messages, n_prompt, masked, row)
            }
            _ => Err(Error::data("prompt and completion", "expected two texts or two lists of messages")),
        }
    }

    /// A conversation whose first `n_prompt` messages are given; the others are trained (all, unless `masked`).
    fn example_of_exchange(&self, messages: &[Value], n_prompt: usize, masked: bool, row: &Row<'_>) -> Read {
        if messages.len() == n_prompt {
            return Ok(None);
        }
        let tokenizer = self.tokenizer();
        let whole = tokenizer.render(&self.render_input(messages, row))?;
        if !masked && !self.options.assistant_only_loss {
            let input_ids = tokenizer.encode(&whole.text, false)?;
            let labels = input_ids.iter().map(|&id| id as i32).collect();
            return Ok(Some(Example { input_ids, labels }));
        }
        let encoded = tokenizer.encode_with_spans(&whole.text, false)?;
        let input = self.render_input(&messages[..n_prompt], row);
        let prompt = tokenizer.render(&RenderInput { add_generation_prompt: true, ..input })?;
        // Some prompts end in more than a finished conversation has there (`<think>`): the common start counts.
        let same = prompt.text.bytes().zip(whole.text.bytes()).take_while(|(a, b)| a == b).count();
        let labels = labels_inside(&encoded.ids, &encoded.spans, &[(same, whole.text.len())]);
        Ok(Some(Example { input_ids: encoded.ids, labels }))
    }

    /// `instruction`, `input`, answer: a conversation if there is a chat template, else Alpaca's headings.
    fn read_instruction(&self, row: &Row<'_>, answer: &str) -> Read {
        let (instruction, input) =
            (row.text("instruction")?.unwrap_or_default(), row.text("input")?.unwrap_or_default());
        let Some(answer) = row.text(answer)? else { return Ok(None) };
        let masked = self.options.completion_only_loss.unwrap_or(self.options.assistant_only_loss);
        if self.tokenizer().choose_template(false).is_ok() {
            let question = if input.is_empty() { instruction.to_owned() } else { format!("{instruction}\n\n{input}") };
            let messages =
                [json!({"role": "user", "content": question}), json!({"role": "assistant", "content": answer})];
            return self.example_of_exchange(&messages, 1, masked, row);
        }
        let input = if input.is_empty() { String::new() } else { format!("### Input:\n{input}\n\n") };
        let prompt = format!("### Instruction:\n{instruction}\n\n{input}### Response:\n");
        self.example_of_text(&format!("{prompt}{answer}"), prompt.len(), masked).map(Some)
    }
}

/// One row of a batch of columns.
struct Row<'c> {
    columns: &'c [(String, Vec<Value>)],
    row: usize,
}

impl<'c> Row<'c> {
    /// The value of a column; `None` if the column is not there or the value is null.
    fn get(&self, column: &str) -> Option<&'c Value> {
        let (_, values) = self.columns.iter().find(|(name, _)| name == column)?;
        values.get(self.row).filter(|value| !value.is_null())
    }

    /// The text of a column; `None` if it is missing or blank.
    fn text(&self, column: &str) -> Result<Option<&'c str>> {
        match self.get(column) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.trim().is_empty())),
            Some(other) => {
                Err(Error::data(format!("column {column:?}"), format!("expected a text, got {}", kind_of(other))))
            }
        }
    }
}

/// The shape of rows with these columns.
fn recognise(names: &[&str], text_field: &str) -> Result<Kind> {
    let has = |name: &str| names.contains(&name);
    if has("input_ids") {
        return Ok(Kind::Tokens);
    }
    if has(text_field) {
        return Ok(Kind::Text(text_field.to_owned()));
    }
    let known = if text_field != "text" {
        // Asked for by name: taking another column instead would be a guess.
        None
    } else if has("prompt") && has("completion") {
        Some(Kind::Completion)
    } else if has("messages") {
        Some(Kind::Messages("messages"))
    } else if has("conversations") {
        Some(Kind::Messages("conversations"))
    } else if has("instruction") && has("output") {
        Some(Kind::Instruction("output"))
    } else if has("instruction") && has("response") {
        Some(Kind::Instruction("response"))
    } else {
        None
    };
    known.ok_or_else(|| {
        let wanted = [text_field, "messages", "conversations", "prompt", "completion", "instruction", "output", "input_ids"];
        let near = wanted.iter().find_map(|want| {
            closest_name(want, names.iter().copied().filter(|name| !wanted.contains(name))).map(|name| (want, name))
        });
        let hint = near.map_or(String::new(), |(want, name)| {
            format!("; did you mean {name:?} to be {want:?}? Name it with dataset_text_field or rename the column")
        });
        Error::data(
            format!("column {text_field:?}"),
            format!(
                "not in the dataset, whose columns are [{}]; expected {text_field}, messages, conversations, prompt + completion, \
                 instruction + output, or input_ids{hint}",
                names.join(", ")
            ),
        )
    })
}

/// A row that is tokenised already: padding (`attention_mask` 0) is left out, masked tokens are not trained.
fn read_tokens(row: &Row<'_>) -> Read {
    let Some(ids) = integers(row, "input_ids")? else { return Ok(None) };
    let optional = |column: &str| -> Result<Option<Vec<i64>>> {
        let values = integers(row, column)?;
        match values {
            Some(values) if values.len() != ids.len() => Err(Error::data(
                format!("column {column:?}"),
                format!("expected {} numbers, as input_ids has, got {}", ids.len(), values.len()),
            )),
            values => Ok(values),
        }
    };
    let labels = optional("labels")?;
    let attention = optional("attention_mask")?;
    let masks = [optional("completion_mask")?, optional("assistant_masks")?];
    let mut example = Example::default();
    for (i, &id) in ids.iter().enumerate() {
        if attention.as_ref().is_some_and(|mask| mask[i] == 0) {
            continue;
        }
        let id = u32::try_from(id).ok().filter(|&id| i32::try_from(id).is_ok());
        let id = id.ok_or_else(|| Error::data("column \"input_ids\"", format!("{} is not a token id", ids[i])))?;
        let label = labels.as_ref().map_or(i64::from(id), |labels| labels[i]);
        let masked = masks.iter().flatten().any(|mask| mask[i] == 0);
        let label = if masked || label < 0 { IGNORE } else { i32::try_from(label).unwrap_or(IGNORE) };
        example.input_ids.push(id);
        example.labels.push(label);
    }
    Ok(Some(example))
}

/// A column that holds a list of whole numbers per row.
fn integers(row: &Row<'_>, column: &str) -> Result<Option<Vec<i64>>> {
    let wrong = |got: &Value| {
        Error::data(format!("column {column:?}"), format!("expected a list of whole numbers, got {}", kind_of(got)))
    };
    match row.get(column) {
        None => Ok(None),
        Some(Value::Array(list)) => {
            list.iter().map(|value| value.as_i64().ok_or_else(|| wrong(value))).collect::<Result<_>>().map(Some)
        }
        Some(other) => Err(wrong(other)),
    }
}

/// The chat templates' name for a role as datasets spell it; `None` if the role is unknown.
pub fn standard_role(role: &str) -> Option<&'static str> {
    match role.to_ascii_lowercase().as_str() {
        "user" | "human" | "input" => Some("user"),
        "assistant" | "gpt" | "model" | "chatgpt" | "bot" | "output" | "function_call" => Some("assistant"),
        "system" => Some("system"),
        "developer" => Some("developer"),
        "tool" | "observation" | "function_response" => Some("tool"),
        "function" => Some("function"),
        "ipython" => Some("ipython"),
        _ => None,
    }
}

/// A conversation with `role` and `content`, from that form or from ShareGPT's `from` and `value`.
///
/// Fields that are null are dropped: Arrow tables give every message the fields of all others.
///
/// # Errors
/// [`Error::Data`] naming the message if it has no role, no content or an unknown role.
pub fn standard_messages(conversation: &Value) -> Result<Vec<Value>> {
    let Value::Array(turns) = conversation else {
        return Err(Error::data("conversation", format!("expected a list of messages, got {}", kind_of(conversation))));
    };
    turns.iter().enumerate().map(|(i, turn)| standard_message(turn, i)).collect()
}

fn standard_message(turn: &Value, index: usize) -> Result<Value> {
    let at = || format!("message {index}");
    let Value::Object(fields) = turn else {
        return Err(Error::data(at(), format!("expected an object with role and content, got {}", kind_of(turn))));
    };
    let mut message: Map<String, Value> =
        fields.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())).collect();
    if let (false, Some(from)) = (message.contains_key("role"), message.remove("from")) {
        message.insert("role".to_owned(), from);
    }
    if let (false, Some(value)) = (message.contains_key("content"), message.remove("value")) {
        message.insert("content".to_owned(), value);
    }
    let Some(role) = message.get("role").and_then(Value::as_str) else {
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        return Err(Error::data(at(), format!("has no role (or from); its fields are [{}]", names.join(", "))));
    };
    let Some(standard) = standard_role(role) else {
        return Err(Error::data(
            at(),
            format!(
                "unknown role {role:?}; known are user, human, assistant, gpt, model, system, tool, observation, function_call"
            ),
        ));
    };
    // Answers that only call tools have no content.
    if !message.contains_key("content") && !message.contains_key("tool_calls") {
        return Err(Error::data(at(), "has no content (or value)"));
    }
    message.insert("role".to_owned(), json!(standard));
    Ok(Value::Object(message))
}

/// What a JSON value is, in a word.
fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::data::testing::{CHATML, chatml, tokenizer_with};

    fn columns(columns: &Value) -> Vec<(String, Vec<Value>)> {
        let columns = columns.as_object().unwrap();
        columns.iter().map(|(name, values)| (name.clone(), values.as_array().unwrap().clone())).collect()
    }

    fn read(tokenizer: Option<&Tokenizer>, options: RowOptions, rows: &Value) -> Result<(Vec<Example>, RowReport)> {
        let mut reader = RowReader::new(tokenizer, options);
        reader.push(&columns(rows))?;
        reader.finish()
    }

    /// The text of all tokens, and of the trained ones.
    fn texts(tokenizer: &Tokenizer, example: &Example) -> (String, String) {
        let trained: Vec<u32> = example.labels.iter().filter(|&&l| l != IGNORE).map(|&l| l as u32).collect();
        assert_eq!(example.labels.len(), example.input_ids.len());
        let text = |ids: &[u32]| String::from_utf8(tokenizer.bytes_of(ids).0).unwrap();
        (text(&example.input_ids), text(&trained))
    }

    #[test]
    fn text_rows_get_one_bos_and_one_eos() {
        let tokenizer = chatml();
        let rows = json!({"text": ["Hi", "<s>Hi", "Hi<|im_end|>\n", null, "  "]});
        let (examples, report) = read(Some(&tokenizer), RowOptions::default(), &rows).unwrap();
        let seen: Vec<String> = examples.iter().map(|example| texts(&tokenizer, example).0).collect();
        assert_eq!(seen, ["<s>Hi<|im_end|>", "<s>Hi<|im_end|>", "<s>Hi<|im_end|>\n"]);
        assert_eq!(report, RowReport { rows: 5, kept: 3, empty: 2, ..RowReport::default() });
        let options = RowOptions { add_special_tokens: false, ..RowOptions::default() };
        let (examples, report) = read(Some(&tokenizer), options, &rows).unwrap();
        let seen: Vec<String> = examples.iter().map(|example| texts(&tokenizer, example).0).collect();
        // A text of one token predicts nothing.
        assert_eq!((seen, report.untrained), (vec!["<s>Hi".to_owned(), "Hi<|im_end|>\n".to_owned()], 1));
    }

    #[test]
    fn conversations_are_rendered_and_masked() {
        let tokenizer = chatml();
        let messages = json!({"messages": [[{"role": "user", "content": "Q", "tool_calls": null}, {"role": "assistant", "content": "A"}], []]});
        let sharegpt =
            json!({"conversations": [[{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], null]});
        let whole = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n";
        for rows in [&messages, &sharegpt] {
            let (examples, report) = read(Some(&tokenizer), RowOptions::default(), rows).unwrap();
            assert_eq!(texts(&tokenizer, &examples[0]), (whole.to_owned(), whole.to_owned()));
            assert_eq!((report.kept, report.empty), (1, 1));
            let options = RowOptions { assistant_only_loss: true, ..RowOptions::default() };
            let (examples, _) = read(Some(&tokenizer), options.clone(), rows).unwrap();
            assert_eq!(texts(&tokenizer, &examples[0]).1, "A<|im_end|>");
            // Without marks in the template the answers are found by its markers.
            let unmarked = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "");
            let other = tokenizer_with(&json!({"eos_token": "<|im_end|>", "chat_template": unmarked}));
            let (examples, _) = read(Some(&other), options, rows).unwrap();
            assert_eq!(texts(&other, &examples[0]).1, "A<|im_end|>");
        }
    }

    #[test]
    fn completions_are_trained_alone_unless_asked_otherwise() {
        let tokenizer = chatml();
        let rows = json!({"prompt": ["Q: x\n"], "completion": ["Hey"]});
        let chat = json!({"prompt": [[{"role": "user", "content": "Q"}]], "completion": [[{"role": "assistant", "content": "A"}]]});
        let (examples, _) = read(Some(&tokenizer), RowOptions::default(), &rows).unwrap();
        // `\n` and `H` merge into one token, which lies partly in the completion.
        assert_eq!(
            texts(&tokenizer, &examples[0]),
            ("<s>Q: x\nHey<|im_end|>".to_owned(), "\nHey<|im_end|>".to_owned())
        );
        let (examples, _) = read(Some(&tokenizer), RowOptions::default(), &chat).unwrap();
        assert_eq!(texts(&tokenizer, &examples[0]).1, "A<|im_end|>\n");
        let options = RowOptions { completion_only_loss: Some(false), ..RowOptions::default() };
        let (examples, _) = read(Some(&tokenizer), options, &rows).unwrap();
        assert_eq!(examples[0].labels.iter().filter(|&&l| l == IGNORE).count(), 0);
    }

    #[test]
    fn instructions_work_with_and_without_a_chat_template() {
        let rows = json!({"instruction": ["I", "J"], "input": ["X", ""], "output": ["O", "P"]});
        let options = RowOptions { completion_only_loss: Some(true), ..RowOptions::default() };
        let tokenizer = chatml();
        let (examples, _) = read(Some(&tokenizer), options.clone(), &rows).unwrap();
        let (text, trained) = texts(&tokenizer, &examples[0]);
        assert_eq!(text, "<|im_start|>user\nI\n\nX<|im_end|>\n<|im_start|>assistant\nO<|im_end|>\n");
        assert_eq!(trained, "O<|im_end|>\n");
        let plain = tokenizer_with(&json!({"eos_token": "</s>"}));
        let (examples, _) = read(Some(&plain), options, &rows).unwrap();
        assert_eq!(texts(&plain, &examples[0]).0, "<s>### Instruction:\nI\n\n### Input:\nX\n\n### Response:\nO</s>");
        assert_eq!(
            texts(&plain, &examples[1]),
            ("<s>### Instruction:\nJ\n\n### Response:\nP</s>".to_owned(), "P</s>".to_owned())
        );
    }

    #[test]
    fn tokenised_rows_need_no_tokenizer() {
        let rows = json!({"input_ids": [[5, 6, 0], [7, 8], [9]], "labels": [[-100, 6, 0], [-100, -100], [9]],
                          "attention_mask": [[1, 1, 0], [1, 1], [1]]});
        let (examples, report) = read(None, RowOptions::default(), &rows).unwrap();
        assert_eq!(examples, [Example { input_ids: vec![5, 6], labels: vec![IGNORE, 6] }]);
        assert_eq!((report.kept, report.untrained), (1, 2));
        let error = read(None, RowOptions::default(), &json!({"text": ["x"]})).unwrap_err().to_string();
        assert!(error.contains("no tokenizer"), "{error}");
        for bad in [
            json!({"input_ids": [[-1]]}),
            json!({"input_ids": [["a"]]}),
            json!({"input_ids": [[1]], "labels": [[1, 2]]}),
        ] {
            assert!(matches!(read(None, RowOptions::default(), &bad), Err(Error::Data { .. })));
        }
    }

    #[test]
    fn long_rows_are_cut_and_counted() {
        let rows = json!({"input_ids": [[1, 2, 3, 4, 5], [1, 2], [1, 2, 3, 4]], "labels": [[1, 2, 3, 4, 5], [1, 2], [-100, -100, -100, 4]]});
        let options = RowOptions { max_length: Some(3), ..RowOptions::default() };
        let (examples, report) = read(None, options, &rows).unwrap();
        assert_eq!(examples[0].input_ids, [1, 2, 3]);
        assert_eq!(report, RowReport { rows: 3, kept: 2, cut: 2, tokens_lost: 3, empty: 0, untrained: 1 });
    }

    #[test]
    fn reading_ends_with_the_rows_asked_for() {
        let rows = json!({"input_ids": [[1, 2], [], [3, 4], [5, 6], [7, 8]]});
        let options = RowOptions { max_rows: Some(2), ..RowOptions::default() };
        let mut reader = RowReader::new(None, options);
        reader.push(&columns(&rows)).unwrap();
        assert!(reader.is_full());
        let (examples, report) = reader.finish().unwrap();
        assert_eq!(examples.iter().map(|example| example.input_ids[0]).collect::<Vec<_>>(), [1, 3]);
        assert_eq!((report.rows, report.kept, report.empty), (3, 2, 1));
    }

    #[test]
    fn errors_name_the_row_the_column_and_the_nearest_one() {
        let tokenizer = chatml();
        let fails = |rows: Value| read(Some(&tokenizer), RowOptions::default(), &rows).unwrap_err().to_string();
        let error = fails(json!({"texts": ["x"], "label": [1]}));
        assert!(error.contains("[texts, label]") && error.contains("did you mean \"texts\""), "{error}");
        let error = fails(json!({"text": ["x", 3]}));
        assert!(error.contains("row 1") && error.contains("a number"), "{error}");
        let error = fails(json!({"messages": [[{"role": "wizard", "content": "x"}]]}));
        assert!(error.contains("wizard") && error.contains("message 0"), "{error}");
        let error = fails(json!({"text": ["", null]}));
        assert!(error.contains("2 are empty"), "{error}");
        let error = fails(json!({"text": []}));
        assert!(error.contains("no rows"), "{error}");
        let options = RowOptions { completion_only_loss: Some(true), ..RowOptions::default() };
        assert!(read(Some(&tokenizer), options, &json!({"text": ["x"]})).is_err());
    }
}
