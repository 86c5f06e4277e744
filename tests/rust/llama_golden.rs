//! Logits, gradients and ten losses of tiny Llamas against transformers and PEFT (tests/golden/README.md).

use rustune::io::safetensors::{Dtype, SafetensorsWriter, TensorFile, TensorSpec};
use rustune::lora::{Init, Placement, inject};
use rustune::model::{LoadOptions, Model};
use rustune::ops::{Grads, Precision, Tokens};
use rustune::train::{MicroBatch, Recompute, StepOptions, forward_backward};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) const CASES: [&str; 5] = ["gqa", "head_dim", "bias", "rope_llama3", "rope_linear"];

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Writes the tensors that stand under `prefixes` of a golden file as a model folder.
pub(crate) fn model_folder(file: &TensorFile, prefixes: &[&str], skip: impl Fn(&str) -> bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = Vec::new();
    for name in file.names() {
        for prefix in prefixes {
            if let Some(short) = name.strip_prefix(prefix).filter(|short| !skip(short)) {
                let info = file.info(name).unwrap();
                let mut bytes = Vec::new();
                file.read_bytes(name, &mut bytes).unwrap();
                tensors
                    .push((TensorSpec { name: short.to_owned(), dtype: info.dtype, shape: info.shape.clone() }, bytes));
            }
        }
    }
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let path = folder.path().join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &specs, &BTreeMap::new()).unwrap();
    for (spec, bytes) in &tensors {
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(folder.path().join("config.json"), &file.metadata()["config"]).unwrap();
    folder
}

pub(crate) fn load(folder: &Path) -> Model {
    let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: false };
    Model::load(folder, &options).unwrap()
}

/// The rows of a golden file and their shifted targets.
pub(crate) fn rows(file: &TensorFile) -> (Tokens, Vec<i32>) {
    let ints = |name: &str| {
        let mut bytes = Vec::new();
        file.read_bytes(name, &mut bytes).unwrap();
        assert_eq!(file.info(name).unwrap().dtype, Dtype::I64);
        bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    let (ids, lengths) = (ints("input_ids"), ints("lengths"));
    let labels = if file.contains("labels") { ints("labels") } else { vec![-100; ids.len()] };
    let width = ids.len() / lengths.len();
    let mut sequences = Vec::new();
    let mut targets = Vec::new();
    for (i, &len) in lengths.iter().enumerate() {
        let at = i * width..i * width + len as usize;
        sequences.push(ids[at.clone()].iter().map(|&id| id as u32).collect::<Vec<_>>());
        targets.extend(labels[at.start + 1..at.end].iter().map(|&l| l as i32).chain([-100]));
    }
    (Tokens::from_sequences(sequences.iter().map(|s| &s[..])), targets)
}

/// Largest difference over the largest expected magnitude.
pub(crate) fn relative(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0_f32, |m, (g, w)| m.max((g - w).abs())) / scale.max(1e-12)
}

pub(crate) fn absolute(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).fold(0.0_f32, |m, (g, w)| m.max((g - w).abs()))
}

/// Adds the golden adapter: rank 4, alpha 8, all seven linear layers.
pub(crate) fn add_adapter(model: &mut Model, file: &TensorFile) {
    let places: Vec<_> = (0..model.llama.layers.len())
        .flat_map(|layer_idx| {
            (0..7).map(move |linear_idx| Placement {
                layer_idx,
                linear_idx,
                rank: 4,
                scale: 2.0,
                dropout: 0.0,
                dora: false,
            })
        })
        .collect();
    inject(model, &places, Init::Uniform, 0).unwrap();
    for param in model.params.all_mut() {
        param.data = file.read_f32(&format!("lora/base_model.model.{}", param.name)).unwrap();
    }
}

/// A golden file, its model with its adapter, its rows and their targets.
pub(crate) fn adapted(case: &str) -> (TensorFile, Model, Tokens, Vec<i32>) {
    let file = TensorFile::open(golden(&format!("llama_{case}.safetensors"))).unwrap();
    let folder = model_folder(&file, &["model/"], |_| false);
    let mut model = load(folder.path());
    add_adapter(&mut model, &file);
    let (tokens, targets) = rows(&file);
    (file, model, tokens, targets)
}

/// Compares the gradient of every tensor of the adapter with the one under `prefix`.
pub(crate) fn assert_gradients(model: &Model, grads: &Grads, file: &TensorFile, prefix: &str, tolerance: f32) {
    for (param, grad) in model.params.all().iter().zip(grads.all()) {
        let difference = relative(grad, &file.read_f32(&format!("{prefix}/base_model.model.{}", param.name)).unwrap());
        let case = file.path().display();
        assert!(difference < tolerance, "{case}: {prefix} of {} differs by {difference}", param.name);
    }
}

pub(crate) fn concatenated(file: &TensorFile, prefix: &str) -> Vec<f32> {
    (0..2).flat_map(|i| file.read_f32(&format!("{prefix}/{i}")).unwrap()).collect()
}

/// Loss and gradients of the golden batch.
pub(crate) fn step(model: &Model, tokens: &Tokens, targets: &[i32], recompute: Recompute) -> (f64, Grads) {
    let trained = targets.iter().filter(|t| **t != -100).count();
    let mut grads = Grads::zeros(&model.params);
    let options =
        StepOptions { dropout: None, noise_alpha: 0.0, weight: 1.0 / trained as f32, recompute, poll: &|| Ok(()) };
    let sum = forward_backward(model, &MicroBatch { tokens, targets }, &options, &mut grads).unwrap();
    (sum / trained as f64, grads)
}

#[test]
fn logits_and_loss_of_the_base() {
    for case in CASES {
        let file = TensorFile::open(golden(&format!("llama_{case}.safetensors"))).unwrap();
        let folder = model_folder(&file, &["model/"], |_| false);
        let model = load(folder.path());
        let (tokens, targets) = rows(&file);
        let difference = absolute(&model.logits(&tokens).unwrap(), &concatenated(&file, "logits"));
        assert!(difference < 1e-4, "{case}: logits differ by {difference}");
        let nll = model.token_losses(&tokens, &targets).unwrap();
        let trained = targets.iter().filter(|t| **t != -100).count();
        let loss = nll.iter().map(|&v| f64::from(v)).sum::<f64>() / trained as f64;
        let want = f64::from(file.read_f32("loss").unwrap()[0]);
        assert!((loss - want).abs() < 1e-4, "{case}: loss {loss} against {want}");
    }
}

#[test]
fn adapter_logits_and_every_gradient() {
    for case in CASES {
        let (file, model, tokens, targets) = adapted(case);
        let difference = absolute(&model.logits(&tokens).unwrap(), &concatenated(&file, "lora_logits"));
        assert!(difference < 1e-4, "{case}: logits differ by {difference}");
        for recompute in [Recompute::EveryLayer, Recompute::Nothing] {
            let (loss, grads) = step(&model, &tokens, &targets, recompute);
            let want = f64::from(file.read_f32("lora_loss").unwrap()[0]);
            assert!((loss - want).abs() < 1e-4, "{case}: loss {loss} against {want}");
            assert_gradients(&model, &grads, &file, "grad", 1e-4);
        }
    }
}

#[test]
fn every_gradient_of_full_finetuning() {
    let file = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let folder = model_folder(&file, &["model/"], |_| false);
    let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: true };
    let model = Model::load(folder.path(), &options).unwrap();
    let (tokens, targets) = rows(&file);
    let (_, grads) = step(&model, &tokens, &targets, Recompute::EveryLayer);
    assert!(!model.params.all().is_empty());
    for (param, grad) in model.params.all().iter().zip(grads.all()) {
        let difference = relative(grad, &file.read_f32(&format!("fullgrad/{}", param.name)).unwrap());
        assert!(difference < 1e-4, "gradient of {} differs by {difference}", param.name);
    }
}

#[test]
fn a_bitsandbytes_checkpoint_gives_its_logits_and_gradients() {
    let file = TensorFile::open(golden("llama_nf4.safetensors")).unwrap();
    for variant in ["plain", "double"] {
        let mut model = nf4_model(&file, variant);
        let (tokens, targets) = rows(&file);
        let difference = absolute(&model.logits(&tokens).unwrap(), &concatenated(&file, &format!("{variant}/logits")));
        assert!(difference < 2e-3, "{variant}: logits differ by {difference}");
        add_adapter(&mut model, &file);
        let (_, grads) = step(&model, &tokens, &targets, Recompute::EveryLayer);
        assert_gradients(&model, &grads, &file, &format!("{variant}/grad"), 2e-3);
    }
}

/// The bitsandbytes checkpoint of llama_nf4, in two shards: the quantized tensors and the others.
pub(crate) fn nf4_folder(file: &TensorFile, variant: &str) -> tempfile::TempDir {
    let quantized = |name: &str| name.ends_with("_proj.weight");
    let mut folder = model_folder(file, &["bnb/", &format!("bnb_{variant}/")], |_| false);
    let rest = model_folder(file, &["model/"], quantized);
    join(&mut folder, rest.path());
    folder
}

/// The model of [`nf4_folder`].
pub(crate) fn nf4_model(file: &TensorFile, variant: &str) -> Model {
    load(nf4_folder(file, variant).path())
}

/// Turns two one-file folders into one of two shards.
pub(crate) fn join(folder: &mut tempfile::TempDir, other: &Path) {
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join(shards[0])).unwrap();
    std::fs::copy(other.join("model.safetensors"), folder.path().join(shards[1])).unwrap();
    let mut map = BTreeMap::new();
    for shard in shards {
        for name in TensorFile::open(folder.path().join(shard)).unwrap().names() {
            map.insert(name.to_owned(), shard);
        }
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
}
