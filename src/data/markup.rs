//! `|safe` and `+` as Jinja2 has them: a safe text escapes what is added to it, even where nothing else is escaped.
//!
//! One published template writes `{{ "..."|safe + name + ... }}`, and its model was trained on the `&#34;` this makes.
//! minijinja's `+` knows no safe texts, so sums with a `safe` in an output are rewritten to calls of [`add`].

use minijinja::{Error, ErrorKind, Value};

/// The name of [`add`] in templates.
pub(super) const ADD: &str = "_add_markup";

/// Words that bind weaker than `+`: an expression with one of them outside of brackets is left as it is.
const WEAKER: [&str; 7] = ["if", "else", "or", "and", "not", "in", "is"];

/// `terms[0] + terms[1] + ...` from the left.
pub(super) fn add(terms: &[Value]) -> Result<Value, Error> {
    let mut sum = terms.first().cloned().unwrap_or_default();
    for term in &terms[1.min(terms.len())..] {
        let (Some(a), Some(b)) = (sum.as_str(), term.as_str()) else {
            let problem = format!("tried to add {} and {} beside a |safe", sum.kind(), term.kind());
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        };
        sum = match (sum.is_safe(), term.is_safe()) {
            (false, false) => Value::from(format!("{a}{b}")),
            (true, true) => Value::from_safe_string(format!("{a}{b}")),
            (true, false) => Value::from_safe_string(format!("{a}{}", escaped(b))),
            (false, true) => Value::from_safe_string(format!("{}{b}", escaped(a))),
        };
    }
    Ok(sum)
}

/// `markupsafe.escape`.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

/// Rewrites `{{ a|safe + b }}` to `{{ _add_markup([a|safe, b]) }}`; everything else stays.
pub(super) fn rewrite_sums(source: String) -> String {
    if !source.contains("safe") {
        return source;
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(open) = rest.find("{{") {
        out.push_str(&rest[..open]);
        let inside = &rest[open + 2..];
        let Some(close) = end_of_output(inside) else {
            rest = &rest[open..];
            break;
        };
        let (body, after) = inside.split_at(close);
        let left = &body[..usize::from(body.starts_with(['-', '+']))];
        let right = &body[body.len() - usize::from(body.len() > left.len() && body.ends_with(['-', '+']))..];
        match terms(&body[left.len()..body.len() - right.len()]) {
            Some(terms) => {
                let terms = terms.join(", ");
                out.extend(["{{", left, " ", ADD, "([", &terms, "]) ", right, "}}"]);
            }
            None => out.push_str(&rest[open..open + 4 + close]),
        }
        rest = &after[2..];
    }
    out.push_str(rest);
    out
}

/// Where the `}}` of an output lies, strings and brackets left aside.
fn end_of_output(inside: &str) -> Option<usize> {
    let mut scan = Scan::default();
    inside
        .char_indices()
        .find(|&(at, c)| scan.is_outside(c) && c == '}' && inside[at..].starts_with("}}"))
        .map(|(at, _)| at)
}

/// The terms of a sum in which something is safe; `None` for every other expression.
fn terms(expression: &str) -> Option<Vec<&str>> {
    let mut scan = Scan::default();
    let (mut terms, mut start, mut word, mut safe) = (Vec::new(), 0, String::new(), false);
    let mut filter = false;
    for (at, c) in expression.char_indices().chain([(expression.len(), ' ')]) {
        let outside = scan.is_outside(c);
        if outside && (c.is_alphanumeric() || c == '_') {
            word.push(c);
            continue;
        }
        if WEAKER.contains(&word.as_str()) {
            return None;
        }
        safe |= filter && word == "safe";
        if !word.is_empty() || !c.is_whitespace() {
            filter = outside && c == '|';
        }
        word.clear();
        match c {
            '~' | '<' | '>' | '=' | '!' | '-' if outside => return None,
            '+' if outside => {
                terms.push(&expression[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&expression[start..]);
    (safe && terms.len() > 1).then_some(terms)
}

/// Knows, character by character, whether one stands outside of strings and brackets.
#[derive(Default)]
struct Scan {
    quote: Option<char>,
    escaped: bool,
    depth: usize,
}

impl Scan {
    fn is_outside(&mut self, c: char) -> bool {
        match self.quote {
            Some(quote) => {
                if !self.escaped && c == quote {
                    self.quote = None;
                }
                self.escaped = c == '\\' && !self.escaped;
                return false;
            }
            None if c == '"' || c == '\'' => {
                self.quote = Some(c);
                return false;
            }
            None => {}
        }
        match c {
            '(' | '[' | '{' => self.depth += 1,
            ')' | ']' | '}' if self.depth > 0 => {
                self.depth -= 1;
                return false;
            }
            _ => {}
        }
        self.depth == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn rewrites_sums_with_a_safe_term_only() {
        let same = |text: &str| assert_eq!(rewrite_sums(text.to_owned()), text);
        same("{{ a + b }} safe");
        same("{{ 'x|safe + y' + b }}");
        same("{{ a|safe }}{% set x = a|safe + b %}");
        same("{{ a|safe + b if c else d }}");
        same("{{ {'a': 1}['a'] }}{{ f(a|safe + b) }}");
        same("{{ a|safe + b");
        let sum = "{{- \"a'}}\" | safe + t['x'] + t | tojson() -}}.";
        assert_eq!(rewrite_sums(sum.to_owned()), "{{- _add_markup([ \"a'}}\" | safe ,  t['x'] ,  t | tojson() ]) -}}.");
    }

    #[test]
    fn a_safe_text_escapes_what_is_added() {
        let safe = Value::from_safe_string("<a>".to_owned());
        let plain = Value::from("<b'&\">");
        let sum = add(&[safe.clone(), plain.clone()]).unwrap();
        assert_eq!((sum.as_str().unwrap(), sum.is_safe()), ("<a>&lt;b&#39;&amp;&#34;&gt;", true));
        assert_eq!(add(&[plain.clone(), safe]).unwrap().as_str().unwrap(), "&lt;b&#39;&amp;&#34;&gt;<a>");
        assert_eq!(add(&[plain.clone(), plain]).unwrap().as_str().unwrap(), "<b'&\"><b'&\">");
        assert!(add(&[Value::from(1), Value::from("x")]).is_err());
    }
}
