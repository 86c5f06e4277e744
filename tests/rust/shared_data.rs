//! Checks against real checkpoints that stand outside the repository; each says how many cases it left out without them.

use crate::llama_golden::load;
use rustune::generate::{Chooser, decode};
use rustune::model::{LoadOptions, Model};
use rustune::ops::{Precision, Tokens};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A file or folder of the shared data, or `None` with a printed line.
pub(crate) fn shared(path: &str, cases: usize) -> Option<PathBuf> {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(path);
    if full.exists() {
        return Some(full);
    }
    #[allow(clippy::print_stdout, reason = "a test that leaves something out says so")]
    {
        println!("left out {cases} cases: {path} of the shared data not found");
    }
    None
}

fn golden(folder: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn largest_difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).fold(0.0, |m, (g, w)| f32::max(m, (g - w).abs()))
}

/// Takes the likeliest token, always.
struct Greedy;

impl Chooser for Greedy {
    fn choose(&mut self, _: usize, _: &[u32], _: usize, logits: &mut [f32]) -> u32 {
        rustune::generate::sampling::argmax(logits)
    }

    fn accept(&mut self, _: usize, _: u32, _: &[u32]) -> rustune::Result<bool> {
        Ok(false)
    }
}

#[test]
fn every_token_of_the_trained_checkpoints() {
    for name in ["stories260K-hf", "stories260K-bnb-4bit", "stories260K-bnb-4bit-f32"] {
        let Some(folder) = shared(&format!("models/{name}"), 1) else { continue };
        let (model, golden) = (load(&folder), golden(&folder));
        let scored = ids(&golden["score_ids"]);
        let tokens = Tokens::from_sequences([&scored[..]]);
        let targets: Vec<i32> = scored[1..].iter().map(|&id| id as i32).chain([-100]).collect();
        let nll = model.token_losses(&tokens, &targets).unwrap();
        let difference = largest_difference(&nll[..scored.len() - 1], &floats(&golden["score_nll"]));
        assert!(difference < 1e-4, "{name}: a token's NLL differs by {difference}");
        let logits = model.logits(&tokens).unwrap();
        let last = &logits[logits.len() - model.config.vocab_size..];
        let difference = largest_difference(last, &floats(&golden["last_logits"]));
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");
    }
}

/// What rounding the operands of products costs a token, on average and at most.
#[test]
fn blocks_of_16_bits_hardly_change_a_loss() {
    for name in ["stories260K-hf", "stories260K-bnb-4bit", "stories260K-bnb-4bit-f32"] {
        let Some(folder) = shared(&format!("models/{name}"), 1) else { continue };
        let scored = ids(&golden(&folder)["score_ids"]);
        let targets: Vec<i32> = scored[1..].iter().map(|&id| id as i32).chain([-100]).collect();
        let [want, int16, bf16] = [Precision::F32, Precision::Int16, Precision::Bf16].map(|precision| {
            let options = LoadOptions { precision, quantize: None, full_finetuning: false };
            let model = Model::load(&folder, &options).unwrap();
            model.token_losses(&Tokens::from_sequences([&scored[..]]), &targets).unwrap()
        });
        let [(mean, most), (mean_bf16, most_bf16)] = [int16, bf16].map(|got| {
            let off = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).collect::<Vec<_>>();
            (off.iter().sum::<f32>() / off.len() as f32, off.iter().fold(0.0_f32, |m, x| m.max(*x)))
        });
        eprintln!(
            "{name}: a token's loss is off by {mean:.1e}, at most {most:.1e}; in bf16 {mean_bf16:.1e}, {most_bf16:.1e}"
        );
        assert!(mean < 1e-3 && mean < mean_bf16 / 3.0, "{name}: {mean} against {mean_bf16}");
    }
}

#[test]
fn greedy_text_is_identical() {
    for name in ["stories260K-hf", "stories260K-bnb-4bit"] {
        let Some(folder) = shared(&format!("models/{name}"), 1) else { continue };
        let (model, golden) = (load(&folder), golden(&folder));
        let want = ids(&golden["greedy_ids"]);
        let prompt = vec![want[0]];
        // Two sequences at once: neighbours change nothing.
        let prompts = [prompt.clone(), want[..7].to_vec()];
        let out = decode(&model, &prompts, want.len() - 1, &mut Greedy, &|| Ok(())).unwrap();
        assert_eq!([prompt, out[0].clone()].concat(), want, "{name}");
        assert_eq!(out[1][..want.len() - 7], want[7..], "{name}");
    }
}
