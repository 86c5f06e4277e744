//! GEMM throughput of each instruction set and precision: frozen bf16 and NF4 weights, forward and backward, in FLOP/s.
//! Reported as elements a second, where an element is one floating-point operation.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustune::kernels::available;
use rustune::ops::matmul::{Gemm, Into, Operand, gemm};
use rustune::ops::{Ctx, Precision, Weight};
use rustune::quant::{FloatKind, Nf4Tensor};
use std::hint::black_box;

/// Tokens, inputs and outputs of a Llama-3.2-1B attention projection over 2 x 256 tokens.
const SIZES: [usize; 3] = [512, 2048, 2048];

fn gemms(c: &mut Criterion) {
    let [tokens, inputs, outputs] = SIZES;
    let values: Vec<f32> = (0..inputs * outputs).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect();
    let x = values[..tokens * inputs].to_vec();
    let tensor = Nf4Tensor::quantize(&values, &[outputs, inputs], FloatKind::Bf16, 64, false).expect("finite values");
    let halves = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
    let weights = [
        ("bf16", Weight::bf16(halves, outputs, inputs).expect("sizes fit")),
        ("nf4", Weight::nf4(tensor).expect("a matrix")),
    ];
    let mut group = c.benchmark_group("gemm");
    group.sample_size(10).throughput(Throughput::Elements(2 * (tokens * inputs * outputs) as u64));
    for kernels in available() {
        for precision in Precision::ALL {
            if precision == Precision::Bf16 && kernels.pairs.is_none() || kernels.isa == "scalar" {
                continue;
            }
            let ctx = Ctx { kernels, ..Ctx::new(precision).expect("RUSTUNE_ISA names a table") };
            let mut y = vec![0.0; tokens * outputs];
            for (name, weight) in &weights {
                for (direction, b, [m, n, k]) in [
                    ("forward", Operand::WeightT(weight, 0), [tokens, outputs, inputs]),
                    ("backward", Operand::Weight(weight, 0), [tokens, inputs, outputs]),
                ] {
                    let g = Gemm { m, n, k, a: Operand::rows(&x, k), b, alpha: 1.0, into: Into::Store };
                    let id = BenchmarkId::new(format!("{name} {direction}"), format!("{} {precision:?}", kernels.isa));
                    group.bench_function(id, |bencher| {
                        bencher.iter(|| gemm(&ctx, black_box(&g), &mut y));
                    });
                }
            }
        }
    }
    group.finish();
}

criterion_group!(benches, gemms);
criterion_main!(benches);
