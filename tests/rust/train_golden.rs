//! Training against torch: ten losses, clipping and schedule, full fine-tuning, and the laws of LoRA.

use crate::llama_golden::{CASES, adapted, add_adapter, golden, load, model_folder, nf4_model, relative, rows, step};
use rustune::config::{AdamHyper, OptimizerKind, ScheduleKind};
use rustune::io::safetensors::TensorFile;
use rustune::lora::{Init, Placement, inject};
use rustune::model::{LoadOptions, Model};
use rustune::ops::{Grads, ParamStore, Precision, Tokens};
use rustune::train::Recompute;
use rustune::train::clip::{clip_factor, global_norm};
use rustune::train::optimizer::{Optimizer, ParamSlot, build};
use rustune::train::schedule::Schedule;

pub(crate) fn optimizer(model: &Model, weight_decay: f64) -> Box<dyn Optimizer> {
    let sizes: Vec<_> = model.params.all().iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
    build(OptimizerKind::AdamW, AdamHyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay }, &sizes)
}

fn update(model: &mut Model, optimizer: &mut dyn Optimizer, grads: &Grads, lr: f64, grad_scale: f32) {
    let slots = model.params.all_mut().iter_mut().zip(grads.all());
    // torch decays every tensor it is given, norms included.
    let mut slots: Vec<_> =
        slots.map(|(p, grad)| ParamSlot { name: &p.name, data: &mut p.data, grad, decay: true, lr }).collect();
    optimizer.step(&mut slots, grad_scale).unwrap();
}

/// The losses before each of ten updates.
pub(crate) fn ten_losses(model: &mut Model, tokens: &Tokens, targets: &[i32], lr: f64) -> Vec<f32> {
    let mut optimizer = optimizer(model, 0.01);
    (0..10)
        .map(|_| {
            let (loss, grads) = step(model, tokens, targets, Recompute::EveryLayer);
            update(model, &mut *optimizer, &grads, lr, 1.0);
            loss as f32
        })
        .collect()
}

pub(crate) fn assert_losses(got: &[f32], file: &TensorFile, name: &str, tolerance: f32) {
    let want = read_f64(file, name);
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!((f64::from(*got) - want).abs() < f64::from(tolerance), "{name}: step {i}: {got} against {want}");
    }
}

fn read_f64(file: &TensorFile, name: &str) -> Vec<f64> {
    let mut bytes = Vec::new();
    file.read_bytes(name, &mut bytes).unwrap();
    bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
}

#[test]
fn ten_losses_of_every_architecture() {
    for case in CASES {
        let (file, mut model, tokens, targets) = adapted(case);
        let losses = ten_losses(&mut model, &tokens, &targets, 1e-2);
        assert_losses(&losses, &file, "losses_adamw", 1e-4);
        assert!(losses[9] < losses[0], "{case}: the loss did not fall");
    }
}

#[test]
fn ten_losses_over_a_bitsandbytes_base() {
    let file = TensorFile::open(golden("llama_nf4.safetensors")).unwrap();
    for variant in ["plain", "double"] {
        let mut model = nf4_model(&file, variant);
        add_adapter(&mut model, &file);
        let (tokens, targets) = rows(&file);
        let losses = ten_losses(&mut model, &tokens, &targets, 1e-2);
        assert_losses(&losses, &file, &format!("{variant}/losses_adamw"), 2e-3);
    }
}

#[test]
fn ten_losses_with_clipping_and_schedule() {
    for case in CASES {
        let (file, mut model, tokens, targets) = adapted(case);
        let schedule = Schedule { kind: ScheduleKind::Linear, peak: 1e-2, warmup_steps: 3, total_steps: 10 };
        let (lrs, norms) = (read_f64(&file, "lrs_clip"), read_f64(&file, "grad_norms_clip"));
        let mut optimizer = optimizer(&model, 0.01);
        let mut losses = Vec::new();
        for i in 0..10 {
            let (loss, grads) = step(&model, &tokens, &targets, Recompute::EveryLayer);
            losses.push(loss as f32);
            let norm = global_norm(&grads.all().iter().map(Vec::as_slice).collect::<Vec<_>>());
            assert!((norm - norms[i]).abs() < 1e-4 * norms[i].max(1.0), "{case}: norm {norm} against {}", norms[i]);
            assert!((schedule.lr_at(i) - lrs[i]).abs() < 1e-12, "{case}: lr of step {i}");
            update(&mut model, &mut *optimizer, &grads, schedule.lr_at(i), clip_factor(norm, 0.5));
        }
        assert_losses(&losses, &file, "losses_clip", 1e-4);
    }
}

#[test]
fn ten_losses_of_full_finetuning() {
    let file = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let folder = model_folder(&file, &["model/"], |_| false);
    let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: true };
    let mut model = Model::load(folder.path(), &options).unwrap();
    let (tokens, targets) = rows(&file);
    let losses = ten_losses(&mut model, &tokens, &targets, 1e-3);
    assert_losses(&losses, &file, "losses_full", 1e-4);
}

#[test]
fn a_zero_b_changes_nothing_and_only_a_and_b_move() {
    let file = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let folder = model_folder(&file, &["model/"], |_| false);
    let mut model = load(folder.path());
    let (tokens, targets) = rows(&file);
    let base = model.logits(&tokens).unwrap();
    for dora in [false, true] {
        let place = |linear_idx| Placement { layer_idx: 1, linear_idx, rank: 3, scale: 1.7, dropout: 0.0, dora };
        inject(&mut model, &[place(0), place(1)], Init::Uniform, 1).unwrap();
        assert_eq!(model.logits(&tokens).unwrap(), base, "B = 0 is the base model to the bit");
        assert_eq!(model.params.all().len(), if dora { 6 } else { 4 });
        let begun = model.params.clone();
        ten_losses(&mut model, &tokens, &targets, 1e-2);
        for (param, begun) in model.params.all().iter().zip(begun.all()) {
            assert!(param.data != begun.data, "{} never moved", param.name);
        }
        // Without its adapter the model is the base model to the bit: nothing else moved.
        for linear in model.llama.layers[1].linears_mut() {
            linear.lora = None;
        }
        model.params = ParamStore::default();
        assert_eq!(model.logits(&tokens).unwrap(), base);
    }
}

#[test]
fn merged_equals_unmerged_at_a_scale_other_than_one() {
    let file = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let folder = model_folder(&file, &["model/"], |_| false);
    let mut model = load(folder.path());
    add_adapter(&mut model, &file);
    let (tokens, _) = rows(&file);
    let unmerged = model.logits(&tokens).unwrap();
    let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: true };
    let mut merged = Model::load(folder.path(), &options).unwrap();
    for adapter in model.params.all().chunks(2) {
        let (a, b) = (&adapter[0], &adapter[1]);
        let (rank, inputs) = (a.shape[0], a.shape[1]);
        let name = a.name.replace("lora_A.weight", "weight");
        let id = merged.params.find(&name).unwrap();
        let mut weight = merged.params.get(id).to_vec();
        for (o, row) in weight.chunks_exact_mut(inputs).enumerate() {
            for r in 0..rank {
                for (w, a) in row.iter_mut().zip(&a.data[r * inputs..]) {
                    *w += 2.0 * b.data[o * rank + r] * a; // scale = alpha / rank = 8 / 4
                }
            }
        }
        merged.params.set(id, &weight).unwrap();
    }
    let difference = relative(&merged.logits(&tokens).unwrap(), &unmerged);
    assert!(difference < 1e-5, "merged differs by {difference}"); // f32 rounding of the merged weight
}
