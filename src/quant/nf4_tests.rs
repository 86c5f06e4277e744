//! Tests of NF4 against bitsandbytes' own files and against a slow twin.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::*;

/// The folder of bitsandbytes vectors next to the repository, where it exists.
pub(crate) fn shared_nf4() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/nf4");
    folder.is_dir().then_some(folder)
}

pub(crate) fn floats(view: &TensorView<'_>) -> Vec<f32> {
    let data = view.data();
    match view.dtype() {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::F16 => data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        other => panic!("unexpected dtype {other:?}"),
    }
}

fn kind(view: &TensorView<'_>) -> FloatKind {
    match view.dtype() {
        Dtype::F32 => FloatKind::F32,
        Dtype::F16 => FloatKind::F16,
        Dtype::BF16 => FloatKind::Bf16,
        other => panic!("unexpected dtype {other:?}"),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Fails with the first difference only, not with two tensors.
#[track_caller]
fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let differ = got.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(differ.is_none(), "{what}: at {differ:?} {:?}, not {:?}", differ.map(|i| got[i]), differ.map(|i| want[i]));
}

/// Compares every case of a file of bitsandbytes vectors; returns how many there were.
fn check_vectors(file: &SafeTensors<'_>, block_size_of: impl Fn(&str) -> usize) -> usize {
    let mut cases = 0;
    for name in file.names().into_iter().filter_map(|name| name.strip_suffix(".input")) {
        let get = |part: &str| file.tensor(&format!("{name}.{part}")).unwrap();
        let (input, shape, dtype) = (floats(&get("input")), get("input").shape().to_vec(), kind(&get("input")));
        let block_size = block_size_of(name);

        // Plain: every byte, scale and dequantized value.
        let plain = Nf4Tensor::quantize(&input, &shape, dtype, block_size, false).unwrap();
        assert_eq!(plain.packed, get("plain.packed").data(), "{name}: packed");
        assert_same_bits(&plain.scales(), &floats(&get("plain.absmax")), &format!("{name}: absmax"));
        assert_same_bits(&plain.dequantize(), &floats(&get("plain.dequant")), &format!("{name}: dequantized"));

        // Double quantization as bitsandbytes stored it: dequantized to the bit.
        let nested = Absmax::Nested {
            codes: get("dq.absmax").data().to_vec(),
            absmax: floats(&get("dq.nested_absmax")),
            offset: floats(&get("dq.offset"))[0],
            block_size: NESTED_BLOCK_SIZE,
            map: floats(&get("dq.nested_code")).into_boxed_slice().try_into().unwrap(),
        };
        let packed = get("dq.packed").data().to_vec();
        let stored = Nf4Tensor::from_parts(packed, nested, shape.clone(), dtype, block_size).unwrap();
        assert_same_bits(
            &stored.dequantize(),
            &floats(&get("dq.dequant")),
            &format!("{name}: dequantized from nested"),
        );

        // Our own double quantization: the same up to one step of a nested index on a near-tie, and the mean's last bit.
        let ours = Nf4Tensor::quantize(&input, &shape, dtype, block_size, true).unwrap();
        assert_eq!(ours.packed, stored.packed, "{name}: packed, nested");
        let (
            Absmax::Nested { codes, absmax, offset, map, .. },
            Absmax::Nested { codes: want, absmax: m, offset: o, map: wm, .. },
        ) = (&ours.absmax, &stored.absmax)
        else {
            panic!("{name}: not nested")
        };
        assert_same_bits(map.as_slice(), wm.as_slice(), name);
        assert!((offset - o).abs() <= 2.0 * f32::EPSILON * o.abs(), "{name}: offset {offset} {o}");
        for (a, b) in absmax.iter().zip(m) {
            assert!((a - b).abs() <= 4.0 * f32::EPSILON * o.abs(), "{name}: nested absmax {a} {b}");
        }
        let off = codes.iter().zip(want).filter(|(a, b)| a != b).count();
        assert!(codes.iter().zip(want).all(|(a, b)| a.abs_diff(*b) <= 1), "{name}: nested index more than a step off");
        assert!(off * 50 <= codes.len(), "{name}: {off} of {} nested indices differ", codes.len());
        cases += 1;
    }
    cases
}

#[test]
fn vectors_of_bitsandbytes_hold_to_the_bit() {
    let Some(folder) = shared_nf4() else {
        eprintln!("left out 11 cases: shared data not found");
        return;
    };
    let bytes = std::fs::read(folder.join("nf4_golden.safetensors")).unwrap();
    let about: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("nf4_golden.json")).unwrap()).unwrap();
    let block_size_of = |name: &str| {
        let cases = about["cases"].as_array().unwrap();
        cases.iter().find(|case| case["name"] == name).unwrap()["blocksize"].as_u64().unwrap() as usize
    };
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(check_vectors(&file, block_size_of), 11);
    assert_same_bits(&CODE_BOOK, &floats(&file.tensor("nf4_code").unwrap()), "code book");
    assert_same_bits(&THRESHOLDS, &floats(&file.tensor("thresholds_cuda").unwrap()), "thresholds");
}

#[test]
fn small_vectors_hold_to_the_bit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nf4_small.safetensors");
    let bytes = std::fs::read(path).unwrap();
    // The names end in the block size: `bf16_5x13_bs32`.
    let block_size_of = |name: &str| name.rsplit_once("_bs").unwrap().1.parse().unwrap();
    assert_eq!(check_vectors(&SafeTensors::deserialize(&bytes).unwrap(), block_size_of), 4);
}

#[test]
fn every_block_size_dtype_and_tail_holds_to_the_bit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/nf4_extra.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases = 0;
    for name in file.names().into_iter().filter_map(|name| name.strip_suffix("/input")) {
        let get = |part: &str| file.tensor(&format!("{name}/{part}")).unwrap();
        let block_size = name.rsplit_once('_').unwrap().1.parse().unwrap();
        let (input, dtype) = (floats(&get("input")), kind(&get("input")));
        let tensor = Nf4Tensor::quantize(&input, &[input.len()], dtype, block_size, false).unwrap();
        assert_eq!(tensor.packed, get("packed").data(), "{name}: packed");
        assert_same_bits(&tensor.scales(), &floats(&get("absmax")), &format!("{name}: absmax"));
        cases += 1;
    }
    assert_eq!(cases, 24);
}

/// The specification: one weight at a time, straight from the definition.
fn twin(values: &[f32], dtype: FloatKind, block_size: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let (mut codes, mut scales, mut back) = (Vec::new(), Vec::new(), Vec::new());
    for block in values.chunks(block_size) {
        let absmax = block.iter().fold(0f32, |m, v| m.max(v.abs()));
        scales.push(absmax);
        for v in block {
            let x = v * (1.0 / absmax.max(1e-38));
            let code = THRESHOLDS.iter().filter(|&&t| t < x).count();
            codes.push(code as u8);
            back.push(dtype.round(CODE_BOOK[code] * absmax));
        }
    }
    if codes.len() % 2 == 1 {
        codes.push(7);
    }
    (codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect(), scales, back)
}

proptest! {
    #[test]
    fn any_tensor_equals_the_twin(
        values in proptest::collection::vec(-3f32..3.0, 1..900),
        exponent in 5u32..=12,
        dtype in prop_oneof![Just(FloatKind::F32), Just(FloatKind::F16), Just(FloatKind::Bf16)],
        start in 0usize..900,
        len in 0usize..900,
        double_quant: bool,
    ) {
        let block_size = 1 << exponent;
        let n = values.len();
        let tensor = Nf4Tensor::quantize(&values, &[n], dtype, block_size, false).unwrap();
        let (packed, scales, back) = twin(&values, dtype, block_size);
        prop_assert_eq!(&tensor.packed, &packed);
        prop_assert_eq!(bits(&tensor.scales()), bits(&scales));
        prop_assert_eq!(bits(&tensor.dequantize()), bits(&back));

        // Any range of it is the same piece of the whole.
        let mut nested = Nf4Tensor::quantize(&values, &[n], dtype, block_size, double_quant).unwrap();
        let whole = nested.dequantize();
        let start = start.min(n);
        let mut piece = vec![f32::NAN; len.min(n - start)];
        nested.dequantize_range(start, &mut piece);
        prop_assert_eq!(bits(&piece), bits(&whole[start..start + piece.len()]));

        // Through a checkpoint and back, and with the scales unfolded.
        prop_assert_eq!(&Nf4Tensor::from_bnb_parts(nested.to_bnb_parts()).unwrap(), &nested);
        nested.denest();
        prop_assert!(!nested.double_quant());
        prop_assert_eq!(bits(&nested.dequantize()), bits(&whole));
    }
}

/// Numbers that look random, the same each time.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / 8_388_608.0 - 1.0) * 0.05
        })
        .collect()
}

#[test]
fn threads_do_not_change_a_bit() {
    let values = noise(200_003);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| Nf4Tensor::quantize(&values, &[values.len()], FloatKind::Bf16, 128, true).unwrap())
    };
    let one = run(1);
    for threads in [2, 3, 4] {
        assert_eq!(run(threads), one);
    }
}

#[test]
fn sixteen_bit_input_equals_its_f32_value() {
    let wide = noise(1_000);
    let half: Vec<bf16> = wide.iter().map(|&v| bf16::from_f32(v)).collect();
    let back: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
    let shape = [10, 100];
    let from_half = Nf4Tensor::quantize(&half, &shape, <bf16 as Weight>::KIND, 64, true).unwrap();
    assert_eq!(from_half, Nf4Tensor::quantize(&back, &shape, FloatKind::Bf16, 64, true).unwrap());
    let half: Vec<f16> = wide.iter().map(|&v| f16::from_f32(v)).collect();
    let back: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
    let from_half = Nf4Tensor::quantize(&half, &shape, <f16 as Weight>::KIND, 32, false).unwrap();
    assert_eq!(from_half, Nf4Tensor::quantize(&back, &shape, FloatKind::F16, 32, false).unwrap());
}

#[test]
fn zeros_and_tiny_numbers_survive() {
    let zeros = Nf4Tensor::quantize(&[0f32; 70], &[70], FloatKind::F32, 64, true).unwrap();
    assert!(zeros.dequantize().iter().all(|&v| v == 0.0));
    assert!(zeros.packed.iter().all(|&byte| byte == 0x77));
    let tiny = [f32::from_bits(1), -f32::from_bits(3), 0.0];
    let tensor = Nf4Tensor::quantize(&tiny, &[3], FloatKind::F32, 64, false).unwrap();
    assert!(tensor.dequantize().iter().all(|v| v.is_finite()));
}

#[test]
fn sizes_are_what_the_format_says() {
    let values = noise(128 * 256);
    let plain = Nf4Tensor::quantize(&values, &[128, 256], FloatKind::Bf16, 64, false).unwrap();
    assert_eq!(plain.nbytes(), 128 * 256 / 2 + 512 * 4);
    let nested = Nf4Tensor::quantize(&values, &[128, 256], FloatKind::Bf16, 64, true).unwrap();
    assert_eq!(nested.nbytes(), 128 * 256 / 2 + 512 + 2 * 4 + 256 * 4 + 4);
}

#[test]
fn errors_name_the_thing() {
    let text = |result: Result<Nf4Tensor>| result.unwrap_err().to_string();
    let quantize =
        |values: &[f32], shape: &[usize], block| Nf4Tensor::quantize(values, shape, FloatKind::F32, block, false);
    let mut values = vec![0.5f32; 12];
    assert!(text(quantize(&values, &[3, 5], 64)).contains("[3, 5]"));
    assert!(text(quantize(&[], &[0], 64)).contains("at least one value"));
    assert!(text(quantize(&values, &[3, 4], 48)).contains("block_size = 48"));
    assert!(text(quantize(&values, &[3, 4], 8192)).contains("32 to 4096"));
    values[7] = f32::NAN;
    assert!(text(quantize(&values, &[3, 4], 64)).contains("[1, 3] is NaN"));
    values[7] = f32::NEG_INFINITY;
    assert!(text(quantize(&values, &[3, 4], 64)).contains("[1, 3] is -inf"));

    let good = Nf4Tensor::quantize(&[1f32; 12], &[3, 4], FloatKind::F32, 64, true).unwrap().to_bnb_parts();
    let spoil = |change: &dyn Fn(&mut BnbParts)| {
        let mut parts = good.clone();
        change(&mut parts);
        text(Nf4Tensor::from_bnb_parts(parts))
    };
    let state =
        |from: &str, to: &str| String::from_utf8(good.quant_state.clone()).unwrap().replace(from, to).into_bytes();
    assert!(spoil(&|p| p.packed.truncate(5)).contains("packed"));
    assert!(spoil(&|p| p.nested_absmax = None).contains("nested_absmax"));
    assert!(spoil(&|p| p.nested_absmax = Some(vec![])).contains("nested_absmax"));
    assert!(spoil(&|p| p.nested_absmax = Some(vec![f32::NAN])).contains("damaged"));
    assert!(spoil(&|p| p.nested_quant_map = Some(vec![0.0; 3])).contains("nested_quant_map"));
    assert!(spoil(&|p| p.quant_map[3] = 0.0).contains("quant_map"));
    assert!(spoil(&|p| p.quant_state = state("\"nf4\"", "\"fp4\"")).contains("fp4"));
    assert!(spoil(&|p| p.quant_state = state("[3,4]", "[3,5]")).contains("packed"));
    assert!(spoil(&|p| p.quant_state = state("[3,4]", "[0,4]")).contains("shape"));
    assert!(spoil(&|p| p.quant_state = state("float32\",\"shape", "float8\",\"shape")).contains("float8"));
    assert!(spoil(&|p| p.quant_state = b"{".to_vec()).contains("JSON"));
    assert!(
        spoil(&|p| p.quant_state = state("\"nested_blocksize\":256", "\"nested_blocksize\":0"))
            .contains("nested_blocksize")
    );
}
