//! Causal attention, forward and backward, in FLOP/s: 32 query heads over 8 key-value heads of width 64, one long sequence.
//! Only the products below the diagonal count: 2 of them forward, 5 backward. `decode` is one query against a cache, in bytes/s.

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use rustune::kernels::available;
use rustune::ops::attention::{Forward, Heads, Segment, backward, forward, segments};
use rustune::ops::{Ctx, Precision};
use std::hint::black_box;

const SHAPE: Heads = Heads { heads: 32, kv_heads: 8, head_dim: 64 };

fn floats(n: usize, step: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * step) % 1000) as f32 / 500.0 - 1.0).collect()
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for kernels in available().iter().filter(|kernels| kernels.isa != "scalar") {
        let ctx = Ctx { kernels, ..Ctx::new(Precision::F32).expect("RUSTUNE_ISA names a table") };
        for len in [512, 2048, 8192] {
            let (q, k) = (floats(len * SHAPE.q_width(), 7919), floats(len * SHAPE.kv_width(), 7907));
            let (v, dout) = (floats(len * SHAPE.kv_width(), 7901), floats(len * SHAPE.q_width(), 7883));
            let cu = [0, len];
            let sequences = segments(&cu, SHAPE.kv_width(), &k, &v);
            let product = (2 * SHAPE.heads * SHAPE.head_dim * len * (len + 1) / 2) as u64;
            group.throughput(Throughput::Elements(2 * product));
            group.bench_function(BenchmarkId::new(format!("forward {len}"), kernels.isa), |bencher| {
                bencher.iter(|| forward(&ctx, SHAPE, black_box(&q), &sequences));
            });
            let (out, lse) = forward(&ctx, SHAPE, &q, &sequences);
            let f = Forward { q: &q, k: &k, v: &v, out: &out, lse: &lse };
            group.throughput(Throughput::Elements(5 * product));
            group.bench_function(BenchmarkId::new(format!("backward {len}"), kernels.isa), |bencher| {
                bencher.iter(|| backward(&ctx, SHAPE, &cu, f, black_box(&dout)));
            });
            let last = [Segment { q_len: 1, ..sequences[0] }];
            group.throughput(Throughput::Bytes(8 * k.len() as u64));
            group.bench_function(BenchmarkId::new(format!("decode {len}"), kernels.isa), |bencher| {
                bencher.iter(|| forward(&ctx, SHAPE, black_box(&q[..SHAPE.q_width()]), &last));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attention);
criterion_main!(benches);
