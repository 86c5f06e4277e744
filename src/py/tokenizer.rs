//! `rustune._native.Tokenizer`: the Rust tokenizer, one method per operation; `rustune.Tokenizer` is built on it.

use super::enter;
use super::json::{from_python, to_python};
use crate::data::chat_template::RenderInput;
use crate::data::masking::{Markers, labels_inside};
use crate::data::rows::{IGNORE, standard_messages};
use crate::data::tokenizer::{DEFAULT_TEMPLATE, ROLES, Tokenizer as Inner};
use crate::error::Error;
use crate::io::os;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

/// A vocabulary with its special tokens and chat templates.
#[pyclass(module = "rustune._native")]
pub(super) struct Tokenizer {
    inner: Arc<Inner>,
}

impl Tokenizer {
    /// The tokenizer as it is now, for work that goes on while Python may change its own.
    pub(super) fn shared(&self) -> Arc<Inner> {
        Arc::clone(&self.inner)
    }
}

/// What `render` is asked with, in Rust's types.
struct Conversation {
    messages: Vec<Value>,
    tools: Option<Value>,
    variables: Map<String, Value>,
}

impl Conversation {
    fn new(
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        variables: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let Value::Array(messages) = from_python("messages", messages)? else {
            return Err(Error::data("messages", "expected a list of dicts with role and content").into());
        };
        let variables = match variables.map(|given| from_python("template variables", given)).transpose()? {
            Some(Value::Object(variables)) => variables,
            _ => Map::new(),
        };
        Ok(Self { messages, tools: tools.map(|given| from_python("tools", given)).transpose()?, variables })
    }

    fn input(&self, add_generation_prompt: bool) -> RenderInput<'_> {
        RenderInput {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt,
            variables: Some(&self.variables),
        }
    }
}

#[pymethods]
impl Tokenizer {
    /// Opens the tokenizer in a folder; None if the folder has no vocabulary.
    #[staticmethod]
    fn from_folder(py: Python<'_>, path: PathBuf) -> PyResult<Option<Self>> {
        enter(py, || Ok(Inner::from_folder(&path)?.map(|inner| Self { inner: Arc::new(inner) })))
    }

    /// The tokenizer that `to_state` wrote.
    #[staticmethod]
    fn from_state(py: Python<'_>, state: &str) -> PyResult<Self> {
        enter(py, || Ok(Self { inner: Arc::new(Inner::from_state(state)?) }))
    }

    /// Everything as one JSON text.
    fn to_state(&self, py: Python<'_>) -> PyResult<String> {
        enter(py, || self.inner.to_state())
    }

    /// SHA-256 of the contents, in hexadecimal.
    fn content_hash(&self, py: Python<'_>) -> PyResult<String> {
        enter(py, || self.inner.content_hash())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        let py = slf.py();
        let state = slf.borrow().to_state(py)?;
        Ok((py.get_type::<Self>().getattr("from_state")?, (state,)))
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// The ids of one text.
    fn encode(&self, py: Python<'_>, text: &str, add_special_tokens: bool) -> PyResult<Vec<u32>> {
        enter(py, || self.inner.encode(text, add_special_tokens))
    }

    /// The ids of many texts, on all threads.
    fn encode_batch(&self, py: Python<'_>, texts: Vec<String>, add_special_tokens: bool) -> PyResult<Vec<Vec<u32>>> {
        enter(py, || self.inner.encode_batch(&texts, add_special_tokens))
    }

    /// The ids of one text, and the character range each stands for.
    #[allow(clippy::type_complexity, reason = "two plain lists for Python")]
    fn encode_with_offsets(
        &self,
        py: Python<'_>,
        text: &str,
        add_special_tokens: bool,
    ) -> PyResult<(Vec<u32>, Vec<(usize, usize)>)> {
        enter(py, || {
            let encoded = self.inner.encode_with_spans(text, add_special_tokens)?;
            // Where each byte of the text lies in characters.
            let mut characters = vec![0; text.len() + 1];
            for (count, (byte, c)) in text.char_indices().enumerate() {
                characters[byte + c.len_utf8()] = count + 1;
            }
            let offsets = encoded.spans.iter().map(|&(from, to)| (characters[from], characters[to])).collect();
            Ok((encoded.ids, offsets))
        })
    }

    /// The text of ids.
    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special_tokens: bool) -> PyResult<String> {
        enter(py, || self.inner.decode(&ids, skip_special_tokens))
    }

    /// The id of a token, if it is one.
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token with this id, as the vocabulary spells it.
    fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Every token and its id.
    fn vocab(&self) -> HashMap<String, u32> {
        self.inner.vocab()
    }

    /// The token that has a role (`eos_token`, ...).
    fn special(&self, role: &str) -> Option<String> {
        self.inner.special(role).map(str::to_owned)
    }

    /// Gives a token a role; returns how many tokens were added to the vocabulary.
    fn set_special(&mut self, role: &str, token: &str) -> PyResult<usize> {
        Ok(Arc::make_mut(&mut self.inner).set_special(role, token)?)
    }

    /// The bytes the ids stand for, end to end, and where each starts (`n + 1` numbers).
    fn spell<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> (Bound<'py, PyBytes>, Vec<usize>) {
        let (bytes, starts) = self.inner.bytes_of(&ids);
        (PyBytes::new(py, &bytes), starts)
    }

    /// Every role with its token.
    fn special_tokens(&self) -> BTreeMap<String, String> {
        self.inner.special_tokens().clone()
    }

    /// Special tokens without a role.
    fn additional_special_tokens(&self) -> Vec<String> {
        self.inner.additional_special_tokens().to_vec()
    }

    /// Ids of all special tokens.
    fn all_special_ids(&self) -> Vec<u32> {
        self.inner.all_special_ids()
    }

    /// Adds special tokens without a role; returns how many were new.
    fn add_special_tokens(&mut self, tokens: Vec<String>) -> PyResult<usize> {
        Ok(Arc::make_mut(&mut self.inner).add_special_tokens(&tokens)?)
    }

    /// Adds ordinary tokens; returns how many were new.
    fn add_tokens(&mut self, tokens: Vec<String>) -> PyResult<usize> {
        Ok(Arc::make_mut(&mut self.inner).add_tokens(&tokens)?)
    }

    /// Ids after which a text is over, the eos token's first.
    #[getter]
    fn eos_ids(&self) -> Vec<u32> {
        self.inner.eos_ids().to_vec()
    }

    /// Whether encoding with special tokens puts a BOS in front.
    #[getter]
    fn adds_bos(&self) -> bool {
        self.inner.adds_bos()
    }

    /// `left` or `right`.
    #[getter]
    fn padding_side(&self) -> &'static str {
        self.inner.padding_side().name()
    }

    #[setter]
    fn set_padding_side(&mut self, side: &str) -> PyResult<()> {
        let side = side.parse()?;
        Arc::make_mut(&mut self.inner).set_padding_side(side);
        Ok(())
    }

    /// The longest text the model was made for; None is no limit.
    #[getter]
    fn model_max_length(&self) -> Option<usize> {
        self.inner.model_max_length()
    }

    #[setter]
    fn set_model_max_length(&mut self, limit: Option<usize>) {
        Arc::make_mut(&mut self.inner).set_model_max_length(limit);
    }

    /// The default chat template's source.
    #[getter]
    fn chat_template(&self) -> Option<String> {
        self.inner.template(DEFAULT_TEMPLATE).map(|template| template.source().to_owned())
    }

    #[setter]
    fn set_chat_template(&mut self, source: Option<&str>) -> PyResult<()> {
        Ok(Arc::make_mut(&mut self.inner).set_template(source)?)
    }

    /// Renders a conversation; returns the text and the character ranges of the answers the template marks.
    ///
    /// `template` renders with another template than the tokenizer's own.
    #[pyo3(signature = (messages, *, tools=None, add_generation_prompt=false, variables=None, template=None))]
    #[allow(clippy::type_complexity, reason = "a text and a plain list for Python")]
    fn render(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        variables: Option<&Bound<'_, PyAny>>,
        template: Option<&str>,
    ) -> PyResult<(String, Vec<(usize, usize)>)> {
        let talk = Conversation::new(messages, tools, variables)?;
        enter(py, || {
            let rendered = self.inner.render_with(template, &talk.input(add_generation_prompt))?;
            let characters = |byte: usize| rendered.text[..byte].chars().count();
            let answers = rendered.answers.iter().map(|&(from, to)| (characters(from), characters(to))).collect();
            Ok((rendered.text, answers))
        })
    }

    /// Renders and encodes a conversation; returns the ids and, for each, whether it lies in an answer the template
    /// marks (None if it marks none).
    #[pyo3(signature = (messages, *, tools=None, add_generation_prompt=false, variables=None, template=None))]
    #[allow(clippy::type_complexity, reason = "two plain lists for Python")]
    fn encode_chat(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        variables: Option<&Bound<'_, PyAny>>,
        template: Option<&str>,
    ) -> PyResult<(Vec<u32>, Option<Vec<u8>>)> {
        let talk = Conversation::new(messages, tools, variables)?;
        enter(py, || {
            let rendered = self.inner.render_with(template, &talk.input(add_generation_prompt))?;
            let encoded = self.inner.encode_with_spans(&rendered.text, false)?;
            let labels = labels_inside(&encoded.ids, &encoded.spans, &rendered.answers);
            let mask = labels.iter().map(|&label| u8::from(label != IGNORE)).collect();
            Ok((encoded.ids, (!rendered.answers.is_empty()).then_some(mask)))
        })
    }

    /// The texts that open a question and an answer in the chat template.
    fn markers(&self, py: Python<'_>) -> PyResult<(String, String)> {
        enter(py, || Markers::from_template(&self.inner).map(|found| (found.instruction, found.response)))
    }

    /// Writes the tokenizer's files into a folder.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        enter(py, || self.inner.save(&path))
    }
}

/// A conversation in `role`/`content` form, from that or from ShareGPT's `from`/`value`.
#[pyfunction(name = "standard_messages")]
fn py_standard_messages(conversation: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
    let messages = standard_messages(&from_python("conversation", conversation)?)?;
    Ok(to_python(conversation.py(), &Value::Array(messages))?.unbind())
}

/// Tells Rust that this process was forked; Python calls it through `os.register_at_fork`.
#[pyfunction]
fn mark_forked_child() {
    os::mark_forked_child();
}

/// Adds the class and its functions to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()?;
    module.add("SPECIAL_TOKEN_ROLES", ROLES.to_vec())?;
    module.add_function(wrap_pyfunction!(py_standard_messages, module)?)?;
    module.add_function(wrap_pyfunction!(mark_forked_child, module)?)
}
