//! Models of any shape with random weights, for tests.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::llama::{Layer, Llama};
use super::{Model, ModelConfig};
use crate::ops::attention::Heads;
use crate::ops::dora::Dora;
use crate::ops::linear::{Bias, Linear, Lora, Matrix};
use crate::ops::rms_norm::{Gain, RmsNorm};
use crate::ops::rope::{Rope, RopeScaling};
use crate::ops::tape::test_floats as floats;
use crate::ops::{Activations, Ctx, ParamStore, Precision, Tokens, Weight};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;

/// The sizes of a test model.
#[derive(Clone, Copy)]
pub(crate) struct TestShape {
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) layers: usize,
    pub(crate) heads: Heads,
    pub(crate) vocab: usize,
    /// Of adapters on all linear layers; 0 for none.
    pub(crate) rank: usize,
    pub(crate) dropout: f32,
    /// Whether adapters have a magnitude, off its first value.
    pub(crate) dora: bool,
    pub(crate) precision: Precision,
}

impl TestShape {
    /// A small model with grouped heads, and an MLP so wide that some hundred tokens are several chunks.
    pub(crate) fn wide() -> Self {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 8 };
        let (rank, dropout, precision) = (3, 0.1, Precision::F32);
        Self { hidden: 32, ffn: 1 << 16, layers: 3, heads, vocab: 50, rank, dropout, dora: false, precision }
    }
}

/// A model of a shape; adapters have random A and B.
pub(crate) fn random_model(s: TestShape) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": s.hidden, "intermediate_size": s.ffn, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads.heads, "num_key_value_heads": s.heads.kv_heads, "head_dim": s.heads.head_dim,
        "vocab_size": s.vocab, "tie_word_embeddings": true,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let ctx = Ctx::new(s.precision).unwrap();
    let mut params = ParamStore::default();
    let mut module = 0;
    let weight = |rows: usize, cols: usize, seed: u32| {
        let scale = 1.0 / (cols as f32).sqrt();
        let values = floats(rows * cols, seed).into_iter().map(|v| v * scale).collect();
        Weight::f32(values, rows, cols).unwrap()
    };
    let mut linear = |outputs: usize, inputs: usize| {
        module += 1;
        let weight = weight(outputs, inputs, module);
        let mut add = |kind: &str, rows: usize, cols: usize, seed: u32| {
            let values = floats(rows * cols, seed).into_iter().map(|v| 0.2 * v).collect();
            params.add(format!("{module}.{kind}"), vec![rows, cols], values, true)
        };
        let mut lora = (s.rank > 0).then(|| Lora {
            a: add("a", s.rank, inputs, 1000 + module),
            b: add("b", outputs, s.rank, 2000 + module),
            rank: s.rank,
            scale: 0.7,
            dropout: s.dropout,
            module,
            dora: None,
            taken: None,
        });
        if let (true, Some(lora)) = (s.dora, &mut lora) {
            let dora = Dora::begin(&ctx, &mut params, format!("{module}.magnitude"), &weight, lora);
            let off = floats(outputs, 3000 + module).into_iter().map(|v| 1.0 + 0.2 * v);
            let moved: Vec<f32> = params.get(dora.magnitude).iter().zip(off).map(|(m, off)| m * off).collect();
            params.set(dora.magnitude, &moved).unwrap();
            lora.dora = Some(Arc::new(dora));
        }
        Linear { inputs, outputs, matrix: Matrix::Frozen(weight), bias: Bias::None, lora }
    };
    let norm = || RmsNorm { gain: Gain::Frozen(vec![1.0; s.hidden]), eps: 1e-5 };
    let (h, q, kv) = (s.hidden, s.heads.q_width(), s.heads.kv_width());
    let layers = (0..s.layers).map(|_| Layer {
        heads: s.heads,
        input_norm: norm(),
        q: linear(q, h),
        k: linear(kv, h),
        v: linear(kv, h),
        o: linear(h, q),
        post_norm: norm(),
        gate: linear(s.ffn, h),
        up: linear(s.ffn, h),
        down: linear(h, s.ffn),
    });
    let llama = Llama {
        hidden_size: h,
        vocab_size: s.vocab,
        layers: layers.collect(),
        embed: Matrix::Frozen(weight(s.vocab, h, 99)),
        norm: norm(),
        head: None,
        rope: Rope::new(s.heads.head_dim, 10_000.0, &RopeScaling::None),
    };
    let config = ModelConfig::read(folder.path()).unwrap();
    Model {
        folder: PathBuf::new(),
        config,
        llama,
        params,
        ctx,
        new_tables: false,
        int8_head: None,
        activations: Activations::Exact,
        usual_activations: Activations::Exact,
    }
}

/// Sequences of these lengths with ids below `vocab`, and their shifted targets.
pub(crate) fn random_tokens(lengths: &[usize], vocab: usize) -> (Tokens, Vec<i32>) {
    let mut next = 7_u32;
    let mut id = || {
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (next >> 8) % vocab as u32
    };
    let sequences: Vec<Vec<u32>> = lengths.iter().map(|&len| (0..len).map(|_| id()).collect()).collect();
    let targets = sequences.iter().flat_map(|ids| ids[1..].iter().map(|&id| id as i32).chain([-100])).collect();
    (Tokens::from_sequences(sequences.iter().map(|ids| &ids[..])), targets)
}
