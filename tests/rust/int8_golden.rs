//! Weights in 8 bits against bitsandbytes and transformers (tests/golden/README.md, llama_int8).

use crate::decoding::forced;
use crate::llama_golden::{
    absolute, add_adapter, assert_gradients, concatenated, golden, join, load, model_folder, relative, rows, step,
};
use crate::train_golden::{assert_losses, ten_losses};
use rustune::Result;
use rustune::io::safetensors::{Dtype, TensorFile};
use rustune::kernels;
use rustune::model::{LoadOptions, Model, Quantize};
use rustune::ops::{Precision, Tokens, Weight};
use rustune::quant::RowwiseInt8;
use rustune::train::Recompute;
use std::path::Path;

fn open(name: &str) -> TensorFile {
    TensorFile::open(golden(&format!("{name}.safetensors"))).unwrap()
}

fn codes(file: &TensorFile, name: &str) -> Vec<i8> {
    let mut bytes = Vec::new();
    file.read_bytes(name, &mut bytes).unwrap();
    assert_eq!(file.info(name).unwrap().dtype, Dtype::I8);
    bytes.into_iter().map(u8::cast_signed).collect()
}

#[test]
fn codes_scales_and_weights_are_those_of_bitsandbytes() {
    let file = open("llama_int8");
    for dtype in ["f32", "bf16", "f16"] {
        let name = |part: &str| format!("vectors/{dtype}/{part}");
        let [rows, cols] = file.info(&name("input")).unwrap().shape[..] else { panic!("a matrix") };
        let read = |start: usize, out: &mut [f32]| file.read_f32_slice(&name("input"), start, out);
        let matrix = RowwiseInt8::quantize_from(rows, cols, read).unwrap();
        assert_eq!(matrix.codes, codes(&file, &name("codes")), "{dtype}");
        assert_eq!(matrix.absmax, file.read_f32(&name("SCB")).unwrap(), "{dtype}");
        let want = file.read_f32(&name("dequantized")).unwrap();
        let weight = Weight::int8(matrix);
        for table in kernels::available() {
            // All of it, and a range that begins and ends inside rows.
            for (start, len) in [(0, rows * cols), (50, 3 * cols)] {
                let mut got = vec![f32::NAN; len];
                weight.read(table, start, &mut got);
                assert_eq!(got, want[start..start + len], "{dtype} {} from {start}", table.isa);
                let Some(pairs) = &table.pairs else { continue };
                let mut halves = vec![0; len];
                weight.read_bf16(pairs, start, &mut halves);
                let rounded = want[start..start + len].iter().map(|v| half::bf16::from_f32(*v).to_bits());
                assert!(halves.iter().copied().eq(rounded), "{dtype} {} halves from {start}", table.isa);
            }
        }
    }
}

/// The int8 checkpoint of llama_int8, in two shards: the quantized tensors and the others.
fn checkpoint(file: &TensorFile) -> tempfile::TempDir {
    let mut folder = model_folder(file, &["bnb/"], |_| false);
    let rest = model_folder(&open("llama_gqa"), &["model/"], |name| name.ends_with("_proj.weight"));
    join(&mut folder, rest.path());
    folder
}

fn load_int8(folder: &Path) -> Result<Model> {
    let options = LoadOptions { precision: Precision::F32, quantize: Some(Quantize::Int8), full_finetuning: false };
    Model::load(folder, &options)
}

#[test]
fn a_checkpoint_gives_the_logits_and_gradients_of_its_dequantized_weights() {
    let file = open("llama_int8");
    let folder = checkpoint(&file);
    let mut model = load(folder.path());
    let (tokens, targets) = rows(&file);
    let logits = model.logits(&tokens).unwrap();
    let difference = absolute(&logits, &concatenated(&file, "logits"));
    assert!(difference < 1e-4, "logits differ by {difference}");
    // The same weights in 32 bits, quantized while they are read: the same codes, so the same logits to the bit.
    let plain = model_folder(&open("llama_gqa"), &["model/"], |_| false);
    let quantized = load_int8(plain.path()).unwrap();
    assert_eq!(quantized.logits(&tokens).unwrap(), logits);
    assert_eq!(quantized.nbytes(), model.nbytes());
    assert!(quantized.nbytes() < load(plain.path()).nbytes() / 2);
    add_adapter(&mut model, &open("llama_gqa"));
    let difference = absolute(&model.logits(&tokens).unwrap(), &concatenated(&file, "lora_logits"));
    assert!(difference < 1e-4, "logits with the adapter differ by {difference}");
    for recompute in [Recompute::EveryLayer, Recompute::Nothing] {
        let (loss, grads) = step(&model, &tokens, &targets, recompute);
        let want = f64::from(file.read_f32("lora_loss").unwrap()[0]);
        assert!((loss - want).abs() < 1e-4, "loss {loss} against {want}");
        assert_gradients(&model, &grads, &file, "grad", 1e-4);
    }
    let losses = ten_losses(&mut model, &tokens, &targets, 1e-2);
    assert_losses(&losses, &file, "losses_adamw", 1e-4);
}

#[test]
fn token_by_token_equals_the_whole_sequence() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/rustune/quickstart/model");
    // bf16: x is rounded after sums in another order, so a few elements round the other way.
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 1e-2), (Precision::Int16, 2e-3)] {
        let options = LoadOptions { precision, quantize: Some(Quantize::Int8), full_finetuning: false };
        let model = Model::load(&folder, &options).unwrap();
        let vocab = model.config.vocab_size;
        let sequences: Vec<Vec<u32>> =
            (0..3_usize).map(|s| (0..30).map(|t| ((t * 13 + s * 29 + t * t) % vocab) as u32).collect()).collect();
        for (seq, seen) in forced(&model, &sequences, |_| 12).iter().enumerate() {
            let whole = model.logits(&Tokens::from_sequences([&sequences[seq][..]])).unwrap();
            for (step, got) in seen.iter().enumerate() {
                let difference = relative(got, &whole[(11 + step) * vocab..][..vocab]);
                assert!(difference < tolerance, "{precision:?} sequence {seq} step {step}: {difference}");
            }
        }
    }
}

#[test]
fn a_damaged_checkpoint_is_an_error_that_names_the_tensor() {
    let file = open("llama_int8");
    let error = |folder: &Path| load_int8(folder).map(|_| ()).unwrap_err().to_string();
    // Without the scales of one matrix, its codes are weights of an unknown type.
    let mut folder = model_folder(&file, &["bnb/"], |name| name == "model.layers.1.mlp.up_proj.SCB");
    let rest = model_folder(&open("llama_gqa"), &["model/"], |name| name.ends_with("_proj.weight"));
    join(&mut folder, rest.path());
    let message = error(folder.path());
    assert!(message.contains("layers.1.mlp.up_proj.weight") && message.contains("I8"), "{message}");
    // Floats beside scales.
    let mut folder = model_folder(&file, &["bnb/"], |name| name.ends_with("weight"));
    let rest = model_folder(&open("llama_gqa"), &["model/"], |_| false);
    join(&mut folder, rest.path());
    let message = error(folder.path());
    assert!(message.contains("q_proj.weight") && message.contains("expected I8"), "{message}");
    // All of it trained.
    let folder = checkpoint(&file);
    let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: true };
    let message = Model::load(folder.path(), &options).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("full fine-tuning"), "{message}");
}
