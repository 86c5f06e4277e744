//! DoRA, PiSSA and LoftQ against PEFT: logits, gradients and ten losses of tiny Llamas, and what goes to files and back.

use crate::llama_golden::{concatenated, golden, load, model_folder, nf4_folder, nf4_model, relative, rows, step};
use crate::train_golden::{assert_losses, ten_losses};
use rustune::config::LoraOptions;
use rustune::io::safetensors::{SafetensorsWriter, TensorFile, TensorSpec};
use rustune::kernels::philox::philox4x32_10;
use rustune::lora::svd::{self, Rounds};
use rustune::lora::{Init, Placement, inject, peft};
use rustune::model::{LoadOptions, Model, Quantize};
use rustune::ops::linear::Matrix;
use rustune::ops::{Ctx, Precision};
use rustune::train::Recompute;
use rustune::train::checkpoint;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Adapters of rank 4 on all linears.
fn placements(model: &Model, scale: f32, dora: bool) -> Vec<Placement> {
    let layers = 0..model.llama.layers.len();
    let place = |layer_idx, linear_idx| Placement { layer_idx, linear_idx, rank: 4, scale, dropout: 0.0, dora };
    layers.flat_map(|layer_idx| (0..7).map(move |linear_idx| place(layer_idx, linear_idx))).collect()
}

/// Sets every trained tensor to that of a golden file.
fn set(model: &mut Model, file: &TensorFile, prefix: &str) {
    for param in model.params.all_mut() {
        param.data = file.read_f32(&format!("{prefix}/base_model.model.{}", param.name)).unwrap();
    }
}

/// Logits, every gradient and ten losses.
fn check(model: &mut Model, file: &TensorFile, prefix: &str, batch: &TensorFile, tolerance: f32) {
    let (tokens, targets) = rows(batch);
    let difference = relative(&model.logits(&tokens).unwrap(), &concatenated(file, &format!("{prefix}logits")));
    assert!(difference < tolerance, "{prefix}: logits differ by {difference}");
    for recompute in [Recompute::EveryLayer, Recompute::Nothing] {
        let (loss, grads) = step(model, &tokens, &targets, recompute);
        let want = f64::from(file.read_f32(&format!("{prefix}loss")).unwrap()[0]);
        assert!((loss - want).abs() < f64::from(tolerance), "{prefix}: loss {loss} against {want}");
        for (param, grad) in model.params.all().iter().zip(grads.all()) {
            let want = file.read_f32(&format!("{prefix}grad/base_model.model.{}", param.name)).unwrap();
            let difference = relative(grad, &want);
            assert!(difference < tolerance, "{prefix}: gradient of {} differs by {difference}", param.name);
        }
    }
    let losses = ten_losses(model, &tokens, &targets, 1e-2);
    assert_losses(&losses, file, &format!("{prefix}losses_adamw"), tolerance);
}

#[test]
fn dora_gives_the_logits_gradients_and_losses_of_peft() {
    let file = TensorFile::open(golden("dora.safetensors")).unwrap();
    for case in ["gqa", "bias", "nf4"] {
        let batch = TensorFile::open(golden(&format!("llama_{case}.safetensors"))).unwrap();
        // 2e-3 over NF4: absmax is the same to the bit, bitsandbytes' code book differs from ours in the last one.
        let (mut model, tolerance) = if case == "nf4" {
            (nf4_model(&batch, "plain"), 2e-3)
        } else {
            (load(model_folder(&batch, &["model/"], |_| false).path()), 1e-4)
        };
        let places = placements(&model, 2.0, true);
        inject(&mut model, &places, Init::Uniform, 0).unwrap();
        set(&mut model, &file, &format!("{case}/lora"));
        check(&mut model, &file, &format!("{case}/"), &batch, tolerance);
    }
}

#[test]
fn a_dora_folder_of_peft_gives_its_logits_and_comes_back_the_same() {
    let file = TensorFile::open(golden("dora.safetensors")).unwrap();
    let base = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let folder = model_folder(&base, &["model/"], |_| false);
    let mut model = load(folder.path());
    let adapter = peft::load(&mut model, &golden("peft_adapter_dora")).unwrap();
    assert!(adapter.lora.use_dora && adapter.lora.use_rslora);
    let (tokens, _) = rows(&base);
    let difference = relative(&model.logits(&tokens).unwrap(), &concatenated(&file, "peft_adapter_dora/logits"));
    assert!(difference < 1e-4, "logits differ by {difference}");
    let out = tempfile::tempdir().unwrap();
    peft::save(&model, &adapter, out.path()).unwrap();
    let (theirs, ours) = (
        TensorFile::open(golden("peft_adapter_dora").join(peft::WEIGHTS_FILE)).unwrap(),
        TensorFile::open(out.path().join(peft::WEIGHTS_FILE)).unwrap(),
    );
    let names = |file: &TensorFile| file.names().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(names(&theirs), names(&ours));
    for name in theirs.names() {
        assert_eq!(theirs.read_f32(name).unwrap(), ours.read_f32(name).unwrap(), "{name}");
    }
    assert_eq!(peft::read_config(out.path(), 2).unwrap(), adapter);
}

/// Turns the adapters' pairs of vectors, whose signs are free, to those of a golden file, and holds them to it.
fn turn_to(model: &mut Model, file: &TensorFile, prefix: &str, tolerance: f32) {
    for [a, b] in model.params.all_mut().as_chunks_mut::<2>().0 {
        let want = [&*a, &*b].map(|p| file.read_f32(&format!("{prefix}/base_model.model.{}", p.name)).unwrap());
        let (rank, inputs) = (a.shape[0], a.shape[1]);
        for k in 0..rank {
            let row = &mut a.data[k * inputs..][..inputs];
            if row.iter().zip(&want[0][k * inputs..]).map(|(x, y)| x * y).sum::<f32>() < 0.0 {
                row.iter_mut().chain(b.data[k..].iter_mut().step_by(rank)).for_each(|v| *v = -*v);
            }
        }
        for (param, want) in [(&*a, &want[0]), (&*b, &want[1])] {
            let difference = relative(&param.data, want);
            assert!(difference < tolerance, "{} differs by {difference}", param.name);
        }
    }
}

/// Sum of the squares of what the linears are off by from `exact`, adapters included: from their action on unit rows.
fn distance(model: &Model, exact: &Model) -> f64 {
    let layers = model.llama.layers.iter().zip(&exact.llama.layers);
    let linears = layers.flat_map(|(a, b)| a.linears().into_iter().zip(b.linears()));
    let off = linears.map(|(a, b)| {
        let mut unit = vec![0.0; a.inputs * a.inputs];
        unit.iter_mut().step_by(a.inputs + 1).for_each(|v| *v = 1.0);
        let sequence = vec![0; a.inputs];
        let tokens = rustune::ops::Tokens::from_sequences([&sequence[..]]);
        let (a, b) = (a.forward(&model.env(&tokens), &unit).0, b.forward(&exact.env(&tokens), &unit).0);
        a.iter().zip(&b[..]).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    });
    off.sum()
}

fn resolved(options: serde_json::Value) -> rustune::config::Lora {
    serde_json::from_value::<LoraOptions>(options).unwrap().resolve(2).unwrap()
}

fn load_in_4_bits(folder: &Path) -> Model {
    let quantize = Some(Quantize::Nf4 { block_size: 64, double_quant: false });
    Model::load(folder, &LoadOptions { precision: Precision::F32, quantize, full_finetuning: false }).unwrap()
}

#[test]
fn leading_singular_values_are_those_of_torch() {
    let file = TensorFile::open(golden("pissa.safetensors")).unwrap();
    let base = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let ctx = Ctx::new(Precision::F32).unwrap();
    let mut compared = 0;
    for name in file.names().filter_map(|name| name.strip_prefix("singular_values/")) {
        let (w, shape) =
            (base.read_f32(&format!("model/{name}")).unwrap(), &base.info(&format!("model/{name}")).unwrap().shape);
        let mut bytes = Vec::new();
        file.read_bytes(&format!("singular_values/{name}"), &mut bytes).unwrap();
        let want = bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b));
        // Anything without a pattern: rows that depend on each other would leave directions out.
        let start = |i: usize| (philox4x32_10([i as u32, 0, 0, 0], [1, 2])[0] as f32 / 2_147_483_648.0) - 1.0;
        let got = svd::leading(&ctx, &w, shape[1], 8, Rounds::Converged, start);
        for (got, want) in got.values.iter().zip(want) {
            // Values are off by the square of what vectors are off by: f32 products are what is left.
            assert!((got - want).abs() < 1e-5 * want, "{name}: {got} against {want}");
            compared += 1;
        }
    }
    assert_eq!(compared, 14 * 8);
}

#[test]
fn pissa_starts_and_trains_as_in_peft_and_comes_back_from_its_file() {
    let file = TensorFile::open(golden("pissa.safetensors")).unwrap();
    let base = TensorFile::open(golden("llama_gqa.safetensors")).unwrap();
    let folder = model_folder(&base, &["model/"], |_| false);
    let (tokens, _) = rows(&base);
    let lora = resolved(serde_json::json!({"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}));
    let mut model = load(folder.path());
    let plain = model.logits(&tokens).unwrap();
    peft::attach(&mut model, &lora).unwrap();
    let difference = relative(&model.logits(&tokens).unwrap(), &plain);
    assert!(difference < 1e-5, "PiSSA starts as the base model: {difference}");
    // 1e-3: |W v - s u| is below 1e-4 s, and values outside the block are more than a tenth of s away.
    turn_to(&mut model, &file, "start/lora", 1e-3);
    check(&mut model, &file, "start/", &base, 1e-3);

    set(&mut model, &file, "trained/lora");
    let trained = model.logits(&tokens).unwrap();
    let difference = relative(&trained, &concatenated(&file, "trained/logits"));
    // 1e-3 again: their A and B over what our first ones left.
    assert!(difference < 1e-3, "logits differ by {difference}");

    let out = tempfile::tempdir().unwrap();
    let adapter = peft::Adapter { base_model: None, lora };
    peft::save(&model, &adapter, out.path()).unwrap();
    // Read by us: the same model to the bit.
    let mut again = load(folder.path());
    assert_eq!(peft::load(&mut again, out.path()).unwrap().lora, adapter.lora);
    assert_eq!(again.logits(&tokens).unwrap(), trained);
    // Read by anyone else: a plain adapter of twice the rank over the base as it is.
    without_metadata(&out.path().join(peft::WEIGHTS_FILE));
    let mut converted = load(folder.path());
    let lora = peft::load(&mut converted, out.path()).unwrap().lora;
    assert_eq!((lora.r, lora.lora_alpha, converted.params.all()[0].shape[0]), (8, 16.0, 8));
    let difference = relative(&converted.logits(&tokens).unwrap(), &trained);
    assert!(difference < 1e-5, "the converted adapter differs by {difference}"); // f32: W - s B0 A0 + s B0 A0
}

/// Writes a file anew without what only we read.
fn without_metadata(path: &Path) {
    let file = TensorFile::open(path).unwrap();
    let spec = |name: &str| {
        let info = file.info(name).unwrap();
        TensorSpec { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone() }
    };
    let tensors: Vec<_> = file.names().map(|name| (spec(name), file.read_f32(name).unwrap())).collect();
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, &specs, &BTreeMap::new()).unwrap();
    for (spec, values) in &tensors {
        writer.write_f32(&spec.name, values).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn pissa_over_four_bits_loses_less_and_comes_back_to_the_bit() {
    let file = TensorFile::open(golden("llama_nf4.safetensors")).unwrap();
    let folder = model_folder(&file, &["model/"], |_| false);
    let (tokens, targets) = rows(&file);
    let options = serde_json::json!({"r": 4, "lora_alpha": 16, "use_rslora": true, "init_lora_weights": "pissa_niter_8",
        "use_dora": true, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3.0}});
    let adapter = peft::Adapter { base_model: None, lora: resolved(options) };
    let exact = load(folder.path());
    // From the 16- or 32-bit checkpoint, and from one that bitsandbytes has quantized.
    let quantized = nf4_folder(&file, "double");
    let bases: [&dyn Fn() -> Model; 2] = [&|| load_in_4_bits(folder.path()), &|| load(quantized.path())];
    for (i, base) in bases.into_iter().enumerate() {
        let mut model = base();
        let before = distance(&model, &exact);
        peft::attach(&mut model, &adapter.lora).unwrap();
        assert!(matches!(&model.llama.layers[0].q.matrix, Matrix::Frozen(w) if w.nbytes() < 96 * 96));
        let after = distance(&model, &exact);
        if i == 0 {
            assert!(after < 0.95 * before, "error {after} of the adapted, {before} of the quantized model");
        }
        ten_losses(&mut model, &tokens, &targets, 1e-2);
        let trained = model.logits(&tokens).unwrap();
        let out = tempfile::tempdir().unwrap();
        peft::save(&model, &adapter, out.path()).unwrap();
        let mut loaded = base();
        peft::load(&mut loaded, out.path()).unwrap();
        assert_eq!(loaded.logits(&tokens).unwrap(), trained, "loaded");
        // As a resumed run does it.
        let mut resumed = base();
        peft::attach(&mut resumed, &adapter.lora).unwrap();
        checkpoint::load_params(out.path(), &mut resumed).unwrap();
        assert_eq!(resumed.logits(&tokens).unwrap(), trained, "resumed");
        let mut other = base();
        let lora = rustune::config::Lora { random_state: 1, ..adapter.lora.clone() };
        peft::attach(&mut other, &lora).unwrap();
        let error = checkpoint::load_params(out.path(), &mut other).unwrap_err().to_string();
        assert!(error.contains("began with other singular vectors"), "{error}");
    }
}

#[test]
fn loftq_begins_with_what_quantization_lost() {
    let file = TensorFile::open(golden("loftq.safetensors")).unwrap();
    let base = TensorFile::open(golden("llama_nf4.safetensors")).unwrap();
    let folder = model_folder(&base, &["model/"], |_| false);
    let exact = load(folder.path());
    let mut model = load_in_4_bits(folder.path());
    let before = distance(&model, &exact);
    let lora = resolved(serde_json::json!({"r": 4, "lora_alpha": 4, "init_lora_weights": "loftq"}));
    peft::attach(&mut model, &lora).unwrap();
    // 2e-3: as for PiSSA, and bitsandbytes' code book differs from ours in the last bit.
    turn_to(&mut model, &file, "lora", 2e-3);
    check(&mut model, &file, "", &base, 2e-3);
    let mut model = load_in_4_bits(folder.path());
    let twice = rustune::config::Lora { lora_alpha: 8.0, ..lora.clone() };
    peft::attach(&mut model, &twice).unwrap();
    let after = distance(&model, &exact);
    assert!(after < 0.9 * before, "error {after} of the adapted, {before} of the quantized model");
    // Nothing but a plain adapter: the base is as it was.
    let out = tempfile::tempdir().unwrap();
    let adapter = peft::Adapter { base_model: None, lora: twice };
    peft::save(&model, &adapter, out.path()).unwrap();
    let mut loaded = load_in_4_bits(folder.path());
    peft::load(&mut loaded, out.path()).unwrap();
    let (tokens, _) = rows(&base);
    assert_eq!(loaded.logits(&tokens).unwrap(), model.logits(&tokens).unwrap());

    let error = |mut model: Model, lora: &rustune::config::Lora| {
        let error = peft::attach(&mut model, lora).unwrap_err().to_string();
        assert!(model.params.all().is_empty(), "nothing was half done");
        error
    };
    let prequantized = nf4_folder(&base, "plain");
    let quantized = error(load(prequantized.path()), &lora);
    assert!(quantized.contains("init_lora_weights = loftq") && quantized.contains("load the 16-bit"), "{quantized}");
    assert!(error(load(folder.path()), &lora).contains("load_in_4bit=True"));
    let large = rustune::config::Lora { r: 40, ..lora };
    assert!(error(load_in_4_bits(folder.path()), &large).contains("no more than 32 singular values"));
}
