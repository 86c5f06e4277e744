//! A PiSSA adapter in a file: a plain one of twice the rank over the matrix as it was, which is what others take it for.
//!
//! `W_rest + s B A = W + s (B A - B₀ A₀)`, so the tensors are `[A; A₀]` and `[B, -B₀]`. An entry of the file's metadata holds the
//! settings it began with, by which it is taken apart again here.

use super::Placement;
use crate::config::Lora;
use crate::error::{Error, Result};
use crate::io::safetensors::TensorFile;
use crate::model::Model;
use crate::model::llama::Layer;
use crate::model::weights::Originals;
use crate::ops::linear::{Halves, Matrix};
use crate::ops::params::Param;
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The entry of the metadata.
const PISSA: &str = "rustune_pissa";

/// How a trained tensor stands in a weights file.
pub(super) enum Form<'a> {
    /// As it is.
    Plain,
    /// A with PiSSA's A₀ below it, `[2 rank, in]`.
    Below(&'a [f32]),
    /// B with the negative of PiSSA's B₀ beside it, `[out, 2 rank]`.
    Beside(&'a [f32]),
}

impl Form<'_> {
    /// Those of a model's trained tensors.
    pub(super) fn all(model: &Model) -> Vec<Form<'_>> {
        let mut forms: Vec<_> = model.params.all().iter().map(|_| Form::Plain).collect();
        for lora in model.llama.layers.iter().flat_map(Layer::linears).filter_map(|linear| linear.lora.as_ref()) {
            if let Some(taken) = &lora.taken {
                forms[lora.a.0] = Form::Below(&taken.a);
                forms[lora.b.0] = Form::Beside(&taken.b);
            }
        }
        forms
    }

    pub(super) fn shape(&self, param: &Param) -> Vec<usize> {
        let mut shape = param.shape.clone();
        match self {
            Self::Plain => {}
            Self::Below(_) => shape[0] *= 2,
            Self::Beside(_) => shape[1] *= 2,
        }
        shape
    }

    /// The tensor as it is written.
    pub(super) fn write<'p>(&self, param: &'p Param) -> Cow<'p, [f32]> {
        match self {
            Self::Plain => Cow::Borrowed(&param.data),
            Self::Below(first) => Cow::Owned([&param.data[..], *first].concat()),
            Self::Beside(first) => {
                let rank = param.shape[1];
                let rows = param.data.chunks_exact(rank).zip(first.chunks_exact(rank));
                Cow::Owned(rows.flat_map(|(now, first)| now.iter().copied().chain(first.iter().map(|v| -v))).collect())
            }
        }
    }

    /// Takes what was written apart; `None` if it began with other values than the model's.
    pub(super) fn read(&self, param: &Param, mut values: Vec<f32>) -> Option<Vec<f32>> {
        match self {
            Self::Plain => Some(values),
            Self::Below(first) => (values.split_off(param.data.len()) == *first).then_some(values),
            Self::Beside(first) => {
                let (now, begun) = beside(&values, param.shape[1]);
                (begun == *first).then_some(now)
            }
        }
    }
}

/// B and B₀ from `[B, -B₀]`.
fn beside(values: &[f32], rank: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = || values.chunks_exact(2 * rank);
    (
        rows().flat_map(|row| row[..rank].iter().copied()).collect(),
        rows().flat_map(|row| row[rank..].iter().map(|v| -v)).collect(),
    )
}

/// The settings of a plain adapter of twice the rank and the same scale.
fn doubled(lora: &Lora) -> Lora {
    let alpha = if lora.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    Lora {
        r: 2 * lora.r,
        lora_alpha: alpha * lora.lora_alpha,
        rank_pattern: lora.rank_pattern.iter().map(|(key, rank)| (key.clone(), 2 * rank)).collect(),
        alpha_pattern: lora.alpha_pattern.iter().map(|(key, value)| (key.clone(), alpha * value)).collect(),
        ..lora.clone()
    }
}

/// The settings with which a PiSSA adapter began, if the file holds one.
pub(super) fn begun(file: &TensorFile, written: &Lora) -> Result<Option<Lora>> {
    let Some(text) = file.metadata().get(PISSA) else { return Ok(None) };
    let refuse = |problem: String| Error::weights(file.path(), "*", format!("metadata {PISSA}: {problem}"));
    let lora: Lora = serde_json::from_str(text).map_err(|e| refuse(e.to_string()))?;
    let twice = doubled(&lora);
    if (twice.r, &twice.rank_pattern, &twice.target_modules, twice.use_dora)
        != (written.r, &written.rank_pattern, &written.target_modules, written.use_dora)
    {
        return Err(refuse("contradicts adapter_config.json; save the adapter again".to_owned()));
    }
    Ok(Some(lora))
}

/// The settings to be written for tensors in these forms; those of a PiSSA adapter are noted in the metadata.
pub(super) fn plain(lora: &Lora, forms: &[Form<'_>], metadata: &mut BTreeMap<String, String>) -> Lora {
    if forms.iter().all(|form| matches!(form, Form::Plain)) {
        return lora.clone();
    }
    metadata.insert(PISSA.to_owned(), json!(lora).to_string());
    doubled(lora)
}

/// Takes apart the tensors of a PiSSA adapter, which stand there layer by layer, and what it began with out of the frozen matrices.
pub(super) fn take_out(
    model: &mut Model,
    placements: &[Placement],
    values: &mut [Vec<f32>],
) -> Result<Vec<Arc<Halves>>> {
    let mut originals = Originals::of(&model.folder);
    let mut taken = Vec::new();
    let mut rest = values;
    for place in placements {
        let (tensors, others) = rest.split_at_mut(place.n_tensors());
        rest = others;
        let half = tensors[0].len() / 2;
        let (b, first_b) = beside(&tensors[1], place.rank);
        let first = Halves { a: tensors[0].split_off(half), b: first_b };
        tensors[1] = b;
        let matrix = &mut model.llama.layers[place.layer_idx].linears_mut()[place.linear_idx].matrix;
        if let Matrix::Frozen(weight) = matrix {
            let site = place.site(weight, 0);
            *matrix = Matrix::Frozen(site.rest(&model.ctx, &mut originals, &first)?);
        }
        taken.push(Arc::new(first));
    }
    Ok(taken)
}
