//! Chat templates: Jinja as transformers sets it up, with the character ranges of the answers.
//!
//! minijinja renders; added here is what transformers' sandbox offers beyond Jinja itself: Python's methods and
//! spellings (`None`, `True`), `tojson` in Python's layout, `raise_exception`, `strftime_now`, `loopcontrols`, and the
//! `{% generation %}` block around what the model is to say. Those blocks become two private-use characters in the
//! output, so the answers are known as positions in the text and never have to be searched for among token ids.

use super::markup;
use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State, Value as Jinja};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// Stands in the output where an answer begins; a private-use character of plane 16.
const ANSWER_START: char = '\u{10F5A1}';
/// Stands in the output where an answer ends.
const ANSWER_END: char = '\u{10F5A2}';

/// The one template of each environment.
const NAME: &str = "chat_template";

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    env: Environment<'static>,
    marks_answers: bool,
}

/// What a template is rendered with, besides the special tokens.
#[derive(Debug, Clone, Copy)]
pub struct RenderInput<'a> {
    /// The conversation: objects with `role` and `content`.
    pub messages: &'a [Value],
    /// JSON schemas of the tools the model may call.
    pub tools: Option<&'a Value>,
    /// Whether to end with what opens an answer.
    pub add_generation_prompt: bool,
    /// Further variables the template may use; `date_string` also fixes the date of `strftime_now`.
    pub variables: Option<&'a Map<String, Value>>,
}

impl<'a> RenderInput<'a> {
    /// Only messages; no tools, variables or generation prompt.
    pub fn new(messages: &'a [Value]) -> Self {
        Self { messages, tools: None, add_generation_prompt: false, variables: None }
    }
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rendered {
    /// The text the model sees.
    pub text: String,
    /// Byte ranges of `text` inside `{% generation %}` blocks, in order.
    pub answers: Vec<(usize, usize)>,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the line if it is not valid Jinja.
    pub fn new(source: &str) -> Result<Self> {
        let (marked, marks_answers) = mark_answers(source);
        let marked = markup::rewrite_sums(marked);
        let mut env = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        env.set_syntax(syntax.build().map_err(|e| failed(&e))?);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_formatter(write_as_python);
        env.add_filter("tojson", tojson);
        env.add_filter("string", |value: &Jinja| python_str(value));
        env.add_filter("indent", indent);
        env.add_function(markup::ADD, |terms: Vec<Jinja>| markup::add(&terms));
        env.add_test("iterable", |value: &Jinja| !value.is_none() && value.try_iter().is_ok());
        env.add_function("raise_exception", |message: String| -> std::result::Result<Jinja, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_template_owned(NAME, marked).map_err(|e| failed(&e))?;
        Ok(Self { source: source.to_owned(), env, marks_answers })
    }

    /// The template as written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template marks answers with `{% generation %}`.
    pub fn marks_answers(&self) -> bool {
        self.marks_answers
    }

    /// Renders a conversation; `special` holds `bos_token` and the like.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the template's own words if it refuses the conversation, or with the line where it
    /// goes wrong.
    pub fn render(&self, special: &BTreeMap<String, String>, input: &RenderInput<'_>) -> Result<Rendered> {
        let mut context: BTreeMap<String, Jinja> =
            special.iter().map(|(role, token)| (role.clone(), Jinja::from(token.as_str()))).collect();
        let messages: Vec<Jinja> = input.messages.iter().map(to_jinja).collect();
        context.insert("messages".to_owned(), messages.into_iter().collect());
        // transformers always defines these two, as None when there is nothing.
        context.insert("tools".to_owned(), input.tools.map_or(Jinja::from(()), to_jinja));
        context.insert("documents".to_owned(), Jinja::from(()));
        context.insert("add_generation_prompt".to_owned(), Jinja::from(input.add_generation_prompt));
        let mut pinned = None;
        for (name, value) in input.variables.into_iter().flatten() {
            if name == "date_string" {
                pinned = value.as_str().map(str::to_owned);
                if pinned.is_none() {
                    continue;
                }
            }
            context.insert(name.clone(), to_jinja(value));
        }
        context.insert(
            "strftime_now".to_owned(),
            Jinja::from_function(move |format: String| now(&format, pinned.as_deref())),
        );
        let template = self.env.get_template(NAME).expect("`new` has added it");
        let text = template.render(Jinja::from_pairs(context)).map_err(|e| failed(&e))?;
        take_marks(&text, self.marks_answers)
    }
}

/// Rewrites `{% generation %}` and `{% endgeneration %}` so that each writes its mark; tells whether there were any.
///
/// Each tag becomes an `if` around the mark, because tags and only tags take part in `trim_blocks`, and a dash on
/// either side must keep working on that side.
fn mark_answers(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut any = false;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let Some(close) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inside = &tag[2..close];
        let left = if inside.starts_with(['-', '+']) { &inside[..1] } else { "" };
        let right = if inside.len() > 1 && inside.ends_with(['-', '+']) { &inside[inside.len() - 1..] } else { "" };
        let mark = match inside[left.len()..inside.len() - right.len()].trim() {
            "generation" => Some(ANSWER_START),
            "endgeneration" => Some(ANSWER_END),
            _ => None,
        };
        match mark {
            Some(mark) => {
                any = true;
                // Writing to a String cannot fail.
                let _ = write!(out, "{{%{left} if true %}}{mark}{{% endif {right}%}}");
            }
            None => out.push_str(&tag[..close + 2]),
        }
        rest = &tag[close + 2..];
    }
    out.push_str(rest);
    (out, any)
}

/// Takes the marks out of the text and remembers where they were.
fn take_marks(text: &str, expected: bool) -> Result<Rendered> {
    if !expected {
        return Ok(Rendered { text: text.to_owned(), answers: Vec::new() });
    }
    let mut rendered = Rendered { text: String::with_capacity(text.len()), answers: Vec::new() };
    let mut start = None;
    for c in text.chars() {
        match (c, start) {
            (ANSWER_START, None) => start = Some(rendered.text.len()),
            (ANSWER_END, Some(from)) => {
                rendered.answers.push((from, rendered.text.len()));
                start = None;
            }
            (ANSWER_START | ANSWER_END, _) => {
                return Err(Error::Tokenizer {
                    what: NAME.to_owned(),
                    problem: "its generation blocks are nested or cut in two".to_owned(),
                });
            }
            _ => rendered.text.push(c),
        }
    }
    Ok(rendered)
}

/// JSON as a template value; the order of keys is kept.
fn to_jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(i), _, _) => Jinja::from(i),
            (_, Some(u), _) => Jinja::from(u),
            (_, _, f) => Jinja::from(f.unwrap_or(f64::NAN)),
        },
        Value::String(s) => Jinja::from(s.as_str()),
        Value::Array(items) => items.iter().map(to_jinja).collect(),
        Value::Object(fields) => Jinja::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), to_jinja(v)))),
    }
}

/// How a value is written: strings as they are, nothing for undefined, everything else as Python's `str` has it.
fn write_as_python(out: &mut Output, _: &mut State, value: &Jinja) -> std::result::Result<(), minijinja::Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python_str(value)),
    };
    written.map_err(|e| minijinja::Error::new(ErrorKind::WriteFailure, e.to_string()))
}

/// Python's `str(value)`.
fn python_str(value: &Jinja) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => {
            let mut out = String::new();
            python_repr(value, &mut out);
            out
        }
    }
}

/// Python's `repr(value)`, for what JSON can hold.
fn python_repr(value: &Jinja, out: &mut String) {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => out.extend(['\\', c]),
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Seq if !value.is_tuple() => {
            out.push('[');
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_repr(&item, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_repr(&key, out);
                out.push_str(": ");
                python_repr(&value.get_item(&key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        _ => {
            // Macros, tuples and undefined: minijinja's own words.
            let _ = write!(out, "{value}");
        }
    }
}

/// A number as Python writes it: floats keep a `.0`, and large or small ones have a signed two-digit exponent.
fn number(value: &Jinja) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if !x.is_finite() {
        return if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let size = x.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = x.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

/// The filter `tojson`: `json.dumps(value, ensure_ascii=False, indent, separators, sort_keys)`.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands filters their keyword arguments by value")]
fn tojson(value: &Jinja, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    // Ours never escapes: that is what every chat template asks for.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let layout = Layout { indent, item, key, sort_keys: sort_keys.unwrap_or(false) };
    let mut out = String::new();
    layout.write(value, 0, &mut out)?;
    Ok(out)
}

/// The filter `indent(width=4, first=false, blank=false)`, which keeps a line break at the end (minijinja's drops it).
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands filters their keyword arguments by value")]
fn indent(
    text: &str,
    width: Option<Jinja>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let width = width.or(options.get("width")?);
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = blank.or(options.get("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    let margin = match width.as_ref().map(|width| (width.as_str(), width.as_usize())) {
        None => "    ".to_owned(),
        Some((Some(margin), _)) => margin.to_owned(),
        Some((None, Some(spaces))) => " ".repeat(spaces),
        Some((None, None)) => {
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "indent: expected a width"));
        }
    };
    let mut out = String::with_capacity(text.len());
    for (i, line) in python_lines(text).enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&margin);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// The lines of `text + "\n"` as Python's `splitlines` finds them.
fn python_lines(text: &str) -> impl Iterator<Item = &str> {
    const ENDS: [char; 10] = ['\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let Some(at) = text.find(ENDS) else {
            rest = None;
            return Some(text);
        };
        let length =
            if text[at..].starts_with("\r\n") { 2 } else { text[at..].chars().next().map_or(1, char::len_utf8) };
        rest = Some(&text[at + length..]);
        Some(&text[..at])
    })
}

/// How `tojson` lays its text out.
struct Layout {
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Layout {
    fn write(&self, value: &Jinja, depth: usize, out: &mut String) -> std::result::Result<(), minijinja::Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => out.push_str(&Value::from(value.as_str().unwrap_or_default()).to_string()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Jinja> = value.try_iter()?.collect();
                self.write_all('[', ']', depth, &items, out, |item, out| self.write(item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Jinja> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_all('{', '}', depth, &keys, out, |key, out| {
                    out.push_str(&Value::from(python_str(key)).to_string());
                    out.push_str(&self.key);
                    self.write(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            kind => {
                let problem = format!("a value of kind {kind} cannot be written as JSON");
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
            }
        }
        Ok(())
    }

    /// A list or an object: its brackets, separators and line breaks.
    fn write_all(
        &self,
        open: char,
        close: char,
        depth: usize,
        items: &[Jinja],
        out: &mut String,
        mut one: impl FnMut(&Jinja, &mut String) -> std::result::Result<(), minijinja::Error>,
    ) -> std::result::Result<(), minijinja::Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = self.indent.filter(|_| !items.is_empty()) {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            out.push_str(if i > 0 { &self.item } else { "" });
            line(out, depth + 1);
            one(item, out)?;
        }
        line(out, depth);
        out.push(close);
        Ok(())
    }
}

/// `datetime.now().strftime(format)`, in UTC, or of the pinned date.
///
/// A pinned date is understood as `26 Jul 2024` or `2024-07-26`; any other text is returned as it is.
fn now(format: &str, pinned: Option<&str>) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let today = civil_from_days((seconds / 86_400) as i64);
    match pinned {
        None => strftime(format, today, seconds % 86_400),
        Some(text) => parse_date(text).map_or_else(|| text.to_owned(), |date| strftime(format, date, 0)),
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// `26 Jul 2024`, `26 July 2024` or `2024-07-26` as (year, month, day).
fn parse_date(text: &str) -> Option<(i64, usize, usize)> {
    let words: Vec<&str> = text.split([' ', '-']).collect();
    let [a, b, c] = words.as_slice() else { return None };
    let month = b
        .parse()
        .ok()
        .or_else(|| MONTHS.iter().position(|name| b.len() >= 3 && name.starts_with(b)).map(|index| index + 1))?;
    let (year, day) = if a.len() == 4 { (a, c) } else { (c, a) };
    let (year, day) = (year.parse().ok()?, day.parse().ok()?);
    ((1..=12).contains(&month) && (1..=31).contains(&day)).then_some((year, month, day))
}

/// Days since 1970-01-01 as (year, month, day) of the Gregorian calendar, by counting.
fn civil_from_days(mut days: i64) -> (i64, usize, usize) {
    let mut year = 1970;
    while days >= 365 + i64::from(is_leap(year)) {
        days -= 365 + i64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    while days >= month_length(year, month) {
        days -= month_length(year, month);
        month += 1;
    }
    (year, month, days as usize + 1)
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn month_length(year: i64, month: usize) -> i64 {
    match month {
        2 => 28 + i64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// C's `strftime` for the fields dates and clock times have; an unknown one stays as written.
fn strftime(format: &str, (year, month, day): (i64, usize, usize), second_of_day: u64) -> String {
    let before: i64 = (1..month).map(|m| month_length(year, m)).sum();
    let day_of_year = before + day as i64;
    let days: i64 = (1970..year).map(|y| 365 + i64::from(is_leap(y))).sum::<i64>() + day_of_year - 1;
    // 1970-01-01 was a Thursday.
    let weekday = WEEKDAYS[(days + 3).rem_euclid(7) as usize];
    let month_name = MONTHS[month - 1];
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut field = chars.next().unwrap_or('%');
        // glibc's `%-d` leaves the leading zero out.
        let bare = field == '-';
        if bare {
            field = chars.next().unwrap_or('%');
        }
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        let part = match field {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => two(month as u64),
            'd' => two(day as u64),
            'e' => format!("{day:2}"),
            'j' => format!("{day_of_year:03}"),
            'B' => month_name.to_owned(),
            'b' | 'h' => month_name[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => two(hour),
            'I' => two((hour + 11) % 12 + 1),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => two(minute),
            'S' => two(second),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            '%' => "%".to_owned(),
            other => format!("%{other}"),
        };
        out.push_str(&part);
    }
    out
}

/// A template's failure in its own words where it has any, with the line.
fn failed(error: &minijinja::Error) -> Error {
    // A `raise_exception` deep in a macro is the source of the error that arrives here.
    let mut innermost: &minijinja::Error = error;
    while let Some(source) = std::error::Error::source(innermost).and_then(|e| e.downcast_ref::<minijinja::Error>()) {
        innermost = source;
    }
    let what = match innermost.line() {
        Some(line) => format!("{NAME}, line {line}"),
        None => NAME.to_owned(),
    };
    let words = innermost.detail().map(str::to_owned);
    Error::Tokenizer { what, problem: words.unwrap_or_else(|| innermost.kind().to_string()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::data::testing::shared_data;
    use serde_json::json;

    fn special(bos: &str, eos: &str) -> BTreeMap<String, String> {
        [("bos_token", bos), ("eos_token", eos)].map(|(role, token)| (role.to_owned(), token.to_owned())).into()
    }

    /// Renders made by Jinja2, see `tests/fixtures/make_chat_templates.py`.
    #[test]
    fn renders_what_jinja2_renders() {
        let text = include_str!("../../tests/fixtures/chat_templates.json");
        let file: Value = serde_json::from_str(text).unwrap();
        let cases = file["cases"].as_array().unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let name = case["name"].as_str().unwrap();
            let template = ChatTemplate::new(case["template"].as_str().unwrap()).unwrap();
            let variables = case["variables"].as_object().unwrap();
            let input = RenderInput {
                messages: case["messages"].as_array().unwrap(),
                tools: variables.get("tools"),
                add_generation_prompt: variables.contains_key("add_generation_prompt"),
                variables: Some(variables),
            };
            let result = template.render(&special("<s>", "</s>"), &input);
            if let Some(words) = case.get("refusal") {
                assert!(result.unwrap_err().to_string().contains(words.as_str().unwrap()), "{name}");
                continue;
            }
            let rendered = result.unwrap();
            assert_eq!(rendered.text, case["expected"].as_str().unwrap(), "{name}");
            let answers: Vec<&str> = rendered.answers.iter().map(|&(from, to)| &rendered.text[from..to]).collect();
            assert_eq!(json!(answers), case["answers"], "{name}");
        }
    }

    #[test]
    fn renders_real_templates_as_jinja2_does() {
        let Some(data) = shared_data(30) else { return };
        let text = std::fs::read_to_string(data.join("chat-templates/chat_template_cases.json")).unwrap();
        let file: Value = serde_json::from_str(&text).unwrap();
        let mut compared = 0;
        for case in file["cases"].as_array().unwrap() {
            if case["jinja2_matches"] != true || case["system_merged_into_user"] == true {
                continue;
            }
            let field = |name: &str| case[name].as_str().unwrap_or_default();
            let template = ChatTemplate::new(field("template_str")).unwrap();
            let messages = file["messages"].as_array().unwrap();
            let input = RenderInput { add_generation_prompt: true, ..RenderInput::new(messages) };
            let rendered = template.render(&special(field("bos_token"), field("eos_token")), &input).unwrap();
            let jinja = field("expected_output_jinja");
            let expected = if jinja.is_empty() { field("expected_output") } else { jinja };
            assert_eq!(rendered.text, expected, "{}", field("name"));
            compared += 1;
        }
        assert!(compared >= 4, "only {compared} cases compared");
    }

    #[test]
    fn compiles_and_renders_every_real_template() {
        let Some(data) = shared_data(17) else { return };
        let messages = [json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": "Yes?"})];
        let tools = json!([{"type": "function", "function": {"name": "f", "description": "d",
                            "parameters": {"type": "object", "properties": {}, "required": []}}}]);
        // One of the templates adds `functions` and `datetime` to a text without asking whether they are there.
        let variables = json!({"date_string": "26 Jul 2024", "functions": "[]", "datetime": "noon"});
        let mut rendered = 0;
        for entry in std::fs::read_dir(data.join("chat-templates")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|ext| ext != "jinja") {
                continue;
            }
            let template = ChatTemplate::new(&std::fs::read_to_string(&path).unwrap()).unwrap();
            for tools in [None, Some(&tools)] {
                let input = RenderInput { tools, variables: variables.as_object(), ..RenderInput::new(&messages) };
                let result = template.render(&special("<s>", "</s>"), &input);
                let text = result.unwrap_or_else(|e| panic!("{}: {e}", path.display())).text;
                assert!(text.contains("Yes?"), "{}: {text}", path.display());
            }
            rendered += 1;
        }
        assert_eq!(rendered, 17);
    }

    #[test]
    fn says_where_a_template_is_wrong() {
        let error = ChatTemplate::new("{% for m in messages %}\n{{ m.content }").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        let template = ChatTemplate::new("\n\n{{ messages[0].nothing.at_all }}").unwrap();
        let messages = [json!({"role": "user"})];
        let error = template.render(&BTreeMap::new(), &RenderInput::new(&messages)).unwrap_err().to_string();
        assert!(error.contains("line 3"), "{error}");
    }

    #[test]
    fn knows_the_calendar() {
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(19_782), (2024, 2, 29));
        assert_eq!(
            strftime("%a %e %b %Y %I:%M %p %%", (2000, 2, 29), 13 * 3600 + 5 * 60),
            "Tue 29 Feb 2000 01:05 PM %"
        );
        assert_eq!(now("%d/%m/%y", Some("2024-07-26")), "26/07/24");
        assert_eq!(now("%d/%m/%y", Some("some day")), "some day");
        assert!(now("%Y", None).parse::<i64>().unwrap() >= 2024);
    }
}
