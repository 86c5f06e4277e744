//! One row times frozen matrices that no cache holds, on all threads: what decoding a token consists of, in bytes of weights
//! a second, beside what the machine reads at most.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use rustune::kernels::available;
use rustune::ops::crew::with_crew;
use rustune::ops::gemv::{self, Input};
use rustune::ops::linear::{Bias, Linear, Matrix};
use rustune::ops::{Activations, Ctx, Env, ParamStore, Precision, Tokens, Weight, probe};
use rustune::quant::nf4::Absmax;
use rustune::quant::{FloatKind, Nf4Tensor};

/// Inputs and outputs; NF4 packs them to 288 MB.
const COLS: usize = 8192;
const ROWS: usize = 65_536;
/// Rows that are quantized; the others repeat them.
const DRAWN: usize = 1024;

fn matrices() -> Vec<(&'static str, Matrix)> {
    let values: Vec<f32> = (0..DRAWN * COLS).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5).collect();
    let mut made = Vec::new();
    for (name, kind) in [("nf4 of bf16", FloatKind::Bf16), ("nf4 of f32", FloatKind::F32)] {
        let drawn = Nf4Tensor::quantize(&values, &[DRAWN, COLS], kind, 64, false).expect("finite values");
        let absmax = Absmax::Plain(drawn.scales().repeat(ROWS / DRAWN));
        let packed = drawn.packed.repeat(ROWS / DRAWN);
        let tensor = Nf4Tensor { packed, absmax, shape: vec![ROWS, COLS], ..drawn };
        made.push((name, Matrix::Frozen(Weight::nf4(tensor).expect("a matrix"))));
    }
    let halves: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    let rows = ROWS / 4;
    made.push(("bf16", Matrix::Frozen(Weight::bf16(halves.repeat(rows / DRAWN), rows, COLS).expect("sizes fit"))));
    made
}

/// How x is taken, and how many rows of it; bf16 takes it as it is.
fn ways(name: &str) -> impl Iterator<Item = (Activations, usize)> {
    let all = [Activations::Exact, Activations::Bits16, Activations::Bits8];
    let taken = if name == "bf16" { 1 } else { all.len() };
    all.into_iter().take(taken).flat_map(|activations| [1, 4].map(|n_rows| (activations, n_rows)))
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemv");
    group.sample_size(10);
    for (name, matrix) in matrices() {
        let Matrix::Frozen(weight) = &matrix else { continue };
        group.throughput(Throughput::Bytes(weight.nbytes() as u64));
        let outputs = weight.rows();
        let linear = Linear { inputs: COLS, outputs, matrix, bias: Bias::None, lora: None };
        for kernels in available().iter().filter(|kernels| kernels.isa != "scalar") {
            for (activations, n_rows) in ways(name) {
                let ctx = Ctx { kernels, ..Ctx::new(Precision::F32).expect("RUSTUNE_ISA names a table") };
                let (params, tokens) = (ParamStore::default(), Tokens::default());
                let x = vec![0.5; n_rows * COLS];
                let id = BenchmarkId::new(format!("{name}, {n_rows} rows, {activations:?}"), kernels.isa);
                group.bench_function(id, |bencher| {
                    rayon::broadcast(|_| ()); // the pool's threads are there
                    let env = Env::new(&ctx, &params, &tokens);
                    rayon::scope(|_| {
                        let input = Input::new(&ctx, &x, n_rows, COLS, COLS).rounded(activations);
                        bencher.iter(|| with_crew(|crew| gemv::linears(&env, crew, [&linear], &input)));
                    });
                });
            }
        }
    }
    group.finish();
}

fn peak(c: &mut Criterion) {
    let ctx = Ctx::new(Precision::F32).expect("RUSTUNE_ISA names a table");
    let bandwidth = probe::read_bandwidth(&ctx);
    c.bench_function(&format!("memory reads at {:.1} GB/s", bandwidth / 1e9), |bencher| bencher.iter(|| ()));
}

criterion_group!(benches, peak, products);
criterion_main!(benches);
