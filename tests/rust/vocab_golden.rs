//! Modules trained whole beside an adapter, and resized vocabularies, against transformers and PEFT (tests/golden/README.md).

use crate::llama_golden::{absolute, concatenated, golden, load, model_folder, relative, rows, step};
use crate::train_golden::{assert_losses, optimizer};
use rustune::config::LoraOptions;
use rustune::io::safetensors::TensorFile;
use rustune::lora::peft;
use rustune::model::Model;
use rustune::ops::linear::Matrix;
use rustune::train::Recompute;
use rustune::train::optimizer::ParamSlot;
use serde_json::json;

/// What is trained over which base, as `VARIANTS` of golden_vocab.py has it.
const VARIANTS: [(&str, &str, &[&str], bool); 5] = [
    ("copies", "gqa", &["embed_tokens", "lm_head"], false),
    ("one", "gqa", &["embed_tokens", "lm_head"], true),
    ("embedding", "gqa", &["embed_tokens"], false),
    ("untied", "head_dim", &["embed_tokens", "lm_head"], false),
    ("norms", "head_dim", &["norm"], false),
];

/// The model of a variant, with the golden values in everything that is trained.
fn adapted(variant: &str, base: &TensorFile, file: &TensorFile, modules: &[&str], tying: bool) -> Model {
    let folder = model_folder(base, &["model/"], |_| false);
    let mut model = load(folder.path());
    let written = json!({"r": 4, "lora_alpha": 8, "modules_to_save": modules, "ensure_weight_tying": tying});
    let lora = serde_json::from_value::<LoraOptions>(written).unwrap().resolve(model.llama.layers.len()).unwrap();
    peft::attach(&mut model, &lora).unwrap();
    for param in model.params.all_mut() {
        let saved = format!("{variant}/saved/base_model.model.{}", param.name);
        let start = format!("lora/base_model.model.{}", param.name);
        let values = if file.contains(&saved) { file.read_f32(&saved) } else { base.read_f32(&start) };
        assert_eq!(file.contains(&saved), !param.name.contains("lora_"), "{}", param.name);
        param.data = values.unwrap();
    }
    model
}

#[test]
fn modules_trained_whole_give_pefts_logits_gradients_and_ten_losses() {
    let file = TensorFile::open(golden("vocab.safetensors")).unwrap();
    for (variant, case, modules, tying) in VARIANTS {
        let base = TensorFile::open(golden(&format!("llama_{case}.safetensors"))).unwrap();
        let mut model = adapted(variant, &base, &file, modules, tying);
        let (tokens, targets) = rows(&base);
        let difference = absolute(&model.logits(&tokens).unwrap(), &concatenated(&file, &format!("{variant}/logits")));
        assert!(difference < 1e-4, "{variant}: logits differ by {difference}");
        for recompute in [Recompute::EveryLayer, Recompute::Nothing] {
            let (loss, grads) = step(&model, &tokens, &targets, recompute);
            let want = f64::from(file.read_f32(&format!("{variant}/loss")).unwrap()[0]);
            assert!((loss - want).abs() < 1e-4, "{variant}: loss {loss} against {want}");
            for (param, grad) in model.params.all().iter().zip(grads.all()) {
                let want = file.read_f32(&format!("{variant}/grad/base_model.model.{}", param.name)).unwrap();
                let difference = relative(grad, &want);
                assert!(difference < 1e-4, "{variant}: gradient of {} differs by {difference}", param.name);
            }
        }
        // Nothing is trained here that PEFT does not train.
        let trained = file.names().filter(|name| name.starts_with(&format!("{variant}/grad/"))).count();
        assert_eq!(model.params.all().len(), trained, "{variant}");

        let mut optimizer = optimizer(&model, 0.01);
        let mut losses = Vec::new();
        for _ in 0..10 {
            let (loss, grads) = step(&model, &tokens, &targets, Recompute::EveryLayer);
            losses.push(loss as f32);
            let slots = model.params.all_mut().iter_mut().zip(grads.all());
            let mut slots: Vec<_> = slots
                .map(|(p, grad)| {
                    let table = p.name.contains("embed_tokens") || p.name.contains("lm_head");
                    let lr = if table { 1e-3 } else { 1e-2 };
                    ParamSlot { name: &p.name, data: &mut p.data, grad, decay: true, lr }
                })
                .collect();
            optimizer.step(&mut slots, 1.0).unwrap();
        }
        assert_losses(&losses, &file, &format!("{variant}/losses"), 1e-4);
    }
}

#[test]
fn adapters_of_peft_bring_their_vocabulary() {
    let base = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let want = TensorFile::open(golden("peft_vocab_logits.safetensors")).unwrap();
    let (tokens, _) = rows(&base);
    for (folder, vocab) in [("peft_vocab", 120), ("peft_vocab_tied", 112), ("peft_vocab_frozen", 120)] {
        let mut model = load(model_folder(&base, &["model/"], |_| false).path());
        let adapter = peft::load(&mut model, &golden(folder)).unwrap();
        assert_eq!((model.config.vocab_size, &model.config.json["vocab_size"]), (vocab, &json!(vocab)));
        let got = model.logits(&tokens).unwrap();
        let difference = absolute(&got, &concatenated(&want, &format!("{folder}/logits")));
        assert!(difference < 1e-4, "{folder}: logits differ by {difference}");
        assert_eq!(matches!(model.llama.embed, Matrix::Trained(_)), folder != "peft_vocab_frozen");
        assert_eq!(model.llama.head.is_none(), folder != "peft_vocab", "{folder}: copies where PEFT has copies");

        // Written by us it has what PEFT loads, and loads again to the bit on the base as it is.
        let ours = tempfile::tempdir().unwrap();
        peft::save(&model, &adapter, ours.path()).unwrap();
        let file = TensorFile::open(ours.path().join(peft::WEIGHTS_FILE)).unwrap();
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            let name = format!("{}{name}", peft::PREFIX);
            assert_eq!(file.info(&name).unwrap().shape, [vocab, 48], "{folder}");
        }
        let mut again = load(model_folder(&base, &["model/"], |_| false).path());
        let read = peft::load(&mut again, ours.path()).unwrap();
        assert_eq!(read.lora, adapter.lora, "{folder}");
        assert_eq!(again.logits(&tokens).unwrap(), got, "{folder}");
    }
}
