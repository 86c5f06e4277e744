//! Each op's forward and backward against a twin built from candle's primitives, whose tape gives the gradients, and
//! against central differences of the op's own forward.

use crate::llama_golden::relative;
use candle_core::{D, DType, Device, Tensor, Var};
use rustune::kernels::{self, philox::philox4x32_10};
use rustune::ops::attention::{self, Forward, Heads, segments};
use rustune::ops::dora::{self, Dora};
use rustune::ops::dropout::Dropout;
use rustune::ops::linear::{Bias, Linear, Lora, Matrix};
use rustune::ops::rms_norm::{Gain, RmsNorm};
use rustune::ops::rope::{Rope, RopeScaling, Turn};
use rustune::ops::tape::{Op, seed_gradient};
use rustune::ops::{Ctx, DropoutKey, Env, Grads, ParamStore, Precision, Tokens, Weight, head, swiglu};
use rustune::quant::{FloatKind, Nf4Tensor, RowwiseInt8};
use std::sync::Arc;

fn floats(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| philox4x32_10([i, 0, 0, 0], [seed, 3])[0] as f32 / 2_147_483_648.0 - 1.0).collect()
}

fn var(values: &[f32], shape: &[usize]) -> Var {
    Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// The tape's gradients of `inputs` when the output's gradient is `upstream`.
fn tape(output: &Tensor, upstream: &[f32], inputs: &[&Var]) -> Vec<Vec<f32>> {
    let upstream = Tensor::from_slice(upstream, output.shape(), &Device::Cpu).unwrap();
    let grads = seed_gradient(output, &upstream).unwrap().backward().unwrap();
    inputs.iter().map(|input| values(grads.get(input).expect("every input has a gradient"))).collect()
}

fn assert_near(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    let difference = relative(got, want);
    assert!(difference < tolerance, "{what}: differs by {difference}");
}

/// `(loss(x + h e_i) - loss(x - h e_i)) / 2h` at a few places, against the gradient there.
fn central_differences(what: &str, x: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
    let h = 1e-2_f32;
    let scale = gradient.iter().fold(0.0_f32, |m, g| m.max(g.abs()));
    for i in (0..x.len()).step_by((x.len() / 7).max(1)) {
        let mut moved = x.to_vec();
        moved[i] = x[i] + h;
        let up = loss(&moved);
        moved[i] = x[i] - h;
        let slope = ((up - loss(&moved)) / f64::from(2.0 * h)) as f32;
        // 1 % of the largest: the third derivative times h², and f32 rounding over h.
        assert!((slope - gradient[i]).abs() < 1e-2 * scale, "{what}[{i}]: slope {slope}, gradient {}", gradient[i]);
    }
}

fn weighted(output: &[f32], upstream: &[f32]) -> f64 {
    output.iter().zip(upstream).map(|(o, u)| f64::from(*o) * f64::from(*u)).sum()
}

/// Runs a check on every instruction set.
fn on_every_isa(check: impl Fn(&Ctx, &str)) {
    for table in kernels::available() {
        check(&Ctx { kernels: table, ..Ctx::new(Precision::F32).unwrap() }, table.isa);
    }
}

#[test]
fn rms_norm() {
    on_every_isa(|ctx, isa| {
        for (n, hidden) in [(1, 2), (3, 7), (5, 64), (40, 100)] {
            let (x, w, dy) = (floats(n * hidden, 1), floats(hidden, 2), floats(n * hidden, 3));
            let mut params = ParamStore::default();
            let id = params.add("w".into(), vec![hidden], w.clone(), false);
            let norm = RmsNorm { gain: Gain::Trained(id), eps: 1e-5 };
            let tokens = Tokens::default();
            let env = Env::new(ctx, &params, &tokens);
            let (y, saved) = norm.forward(&env, &x);
            let (mut dx, mut grads) = (vec![0.0; x.len()], Grads::zeros(&params));
            norm.backward(&env, &x, &saved, &dy, &mut dx, &mut grads);

            let (tx, tw) = (var(&x, &[n, hidden]), var(&w, &[hidden]));
            let mean = tx.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
            let root = (mean + 1e-5).unwrap().sqrt().unwrap();
            let ty = tx.broadcast_div(&root).unwrap().broadcast_mul(&tw).unwrap();
            let want = tape(&ty, &dy, &[&tx, &tw]);
            let what = format!("{isa} {n}x{hidden}");
            assert_near(&what, &y, &values(&ty), 1e-5); // f32, sums reassociated
            assert_near(&what, &dx, &want[0], 1e-4);
            assert_near(&what, grads.get(id), &want[1], 1e-5);
            central_differences(&what, &x, &dx, |x| weighted(&norm.forward(&env, x).0, &dy));
        }
    });
}

#[test]
fn gated_activation() {
    on_every_isa(|ctx, isa| {
        for n in [1, 9, 1000, 20_000] {
            let (gate, up, dy) = (floats(n, 4), floats(n, 5), floats(n, 6));
            let y = swiglu::forward(ctx, &gate, &up);
            let (dgate, dup) = swiglu::backward(ctx, &gate, &up, &dy);
            let (tg, tu) = (var(&gate, &[n]), var(&up, &[n]));
            let ty = (tg.silu().unwrap() * tu.as_tensor()).unwrap();
            let want = tape(&ty, &dy, &[&tg, &tu]);
            assert_near(isa, &y, &values(&ty), 2e-6); // exp within 2 ulp
            assert_near(isa, &dgate, &want[0], 2e-6);
            assert_near(isa, &dup, &want[1], 2e-6);
            central_differences(isa, &gate, &dgate, |g| weighted(&swiglu::forward(ctx, g, &up), &dy));
        }
    });
}

#[test]
fn rotation_is_undone_by_its_backward_and_keeps_relative_positions() {
    on_every_isa(|ctx, isa| {
        let (heads, dim) = (3, 20);
        let rope = Rope::new(dim, 10_000.0, &RopeScaling::None);
        let x = floats(2 * heads * dim, 7);
        let angles = rope.angles(&[5, 1_000]);
        let mut y = x.clone();
        angles.rotate(ctx, &mut y, heads * dim, Turn::Forward);
        assert!(relative(&y, &x) > 0.1, "{isa}: nothing was rotated");
        let mut back = y.clone();
        angles.rotate(ctx, &mut back, heads * dim, Turn::Backward);
        assert_near(isa, &back, &x, 1e-6); // cos² + sin² = 1 in f32
        // q at m against k at n depends on m - n only.
        let score = |m: u32, n: u32| {
            let (mut q, mut k) = (x[..dim].to_vec(), x[dim..2 * dim].to_vec());
            rope.angles(&[m]).rotate(ctx, &mut q, dim, Turn::Forward);
            rope.angles(&[n]).rotate(ctx, &mut k, dim, Turn::Forward);
            q.iter().zip(&k).map(|(a, b)| a * b).sum::<f32>()
        };
        assert!((score(9, 4) - score(105, 100)).abs() < 1e-4, "{isa}");
    });
}

/// Causal attention of one sequence from primitives;  q: `[n, heads · dim]`, k, v: `[n, kv_heads · dim]`.
fn attention_twin(shape: Heads, n: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let split = |x: &Tensor, heads: usize| {
        x.reshape((n, heads, shape.head_dim)).unwrap().transpose(0, 1).unwrap().contiguous().unwrap()
    };
    let (q, k, v) = (split(q, shape.heads), split(k, shape.kv_heads), split(v, shape.kv_heads));
    let group = shape.heads / shape.kv_heads;
    let repeat = |x: &Tensor| {
        let x = x.unsqueeze(1).unwrap().broadcast_as((shape.kv_heads, group, n, shape.head_dim)).unwrap();
        x.reshape((shape.heads, n, shape.head_dim)).unwrap()
    };
    let scores = (q.matmul(&repeat(&k).t().unwrap()).unwrap() / (shape.head_dim as f64).sqrt()).unwrap();
    let mask: Vec<f32> = (0..n * n).map(|ij| if ij % n > ij / n { -1e9 } else { 0.0 }).collect();
    let scores = scores.broadcast_add(&Tensor::from_slice(&mask, (n, n), &Device::Cpu).unwrap()).unwrap();
    let shifted = scores.broadcast_sub(&scores.max_keepdim(D::Minus1).unwrap().detach()).unwrap().exp().unwrap();
    let probs = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1).unwrap()).unwrap();
    let out = probs.matmul(&repeat(&v)).unwrap(); // [heads, n, dim]
    out.transpose(0, 1).unwrap().reshape((n, shape.heads * shape.head_dim)).unwrap()
}

#[test]
fn attention_of_several_sequences() {
    on_every_isa(|ctx, isa| {
        for (heads, kv_heads, head_dim, lengths) in
            [(2, 2, 8, vec![1, 5]), (4, 2, 16, vec![70, 3, 64]), (6, 1, 12, vec![129]), (3, 3, 40, vec![2, 65, 1])]
        {
            let shape = Heads { heads, kv_heads, head_dim };
            let mut cu = vec![0];
            for len in &lengths {
                cu.push(cu[cu.len() - 1] + len);
            }
            let n = cu[lengths.len()];
            let (q, k) = (floats(n * shape.q_width(), 8), floats(n * shape.kv_width(), 9));
            let (v, dout) = (floats(n * shape.kv_width(), 10), floats(n * shape.q_width(), 11));
            let (out, lse) = attention::forward(ctx, shape, &q, &segments(&cu, shape.kv_width(), &k, &v));
            let f = Forward { q: &q, k: &k, v: &v, out: &out, lse: &lse };
            let (dq, dk, dv) = attention::backward(ctx, shape, &cu, f, &dout);
            for pair in cu.windows(2) {
                let (start, len) = (pair[0], pair[1] - pair[0]);
                let part = |x: &[f32], width: usize| x[start * width..(start + len) * width].to_vec();
                let (qw, kw) = (shape.q_width(), shape.kv_width());
                let (tq, tk) = (var(&part(&q, qw), &[len, qw]), var(&part(&k, kw), &[len, kw]));
                let tv = var(&part(&v, kw), &[len, kw]);
                let twin = attention_twin(shape, len, &tq, &tk, &tv);
                let want = tape(&twin, &part(&dout, qw), &[&tq, &tk, &tv]);
                let what = format!("{isa} {shape:?} rows {start}..{}", start + len);
                assert_near(&what, &part(&out, qw), &values(&twin), 1e-5); // f32, sums in tiles
                if len > 1 {
                    // With one key its softmax is 1 whatever q and k are: their gradients are zero.
                    assert_near(&format!("{what} dq"), &part(&dq, qw), &want[0], 1e-4);
                    assert_near(&format!("{what} dk"), &part(&dk, kw), &want[1], 1e-4);
                }
                assert_near(&format!("{what} dv"), &part(&dv, kw), &want[2], 1e-5);
            }
            let loss = |q: &[f32]| {
                weighted(&attention::forward(ctx, shape, q, &segments(&cu, shape.kv_width(), &k, &v)).0, &dout)
            };
            central_differences(isa, &q, &dq, loss);
        }
    });
}

/// A frozen weight in each storage, and the values it stands for.
fn weights(rows: usize, cols: usize) -> Vec<(&'static str, Weight, Vec<f32>)> {
    let plain = floats(rows * cols, 12);
    let halves: Vec<half::bf16> = plain.iter().map(|v| half::bf16::from_f32(*v)).collect();
    let half_values = halves.iter().map(|v| v.to_f32()).collect();
    let mut cases = vec![
        ("f32", Weight::f32(plain.clone(), rows, cols).unwrap(), plain.clone()),
        ("bf16", Weight::bf16(halves, rows, cols).unwrap(), half_values),
    ];
    for (name, kind, double) in
        [("nf4", FloatKind::F32, false), ("nf4 double", FloatKind::F32, true), ("nf4 of bf16", FloatKind::Bf16, true)]
    {
        let tensor = Nf4Tensor::quantize(&plain, &[rows, cols], kind, 64, double).unwrap();
        let dequantized = tensor.dequantize();
        cases.push((name, Weight::nf4(tensor).unwrap(), dequantized));
    }
    let read = |start: usize, out: &mut [f32]| {
        out.copy_from_slice(&plain[start..start + out.len()]);
        Ok(())
    };
    let matrix = RowwiseInt8::quantize_from(rows, cols, read).unwrap();
    let dequantized = matrix.codes.iter().zip(0..).map(|(code, i)| f32::from(*code) * matrix.absmax[i / cols] / 127.0);
    let dequantized = dequantized.collect();
    cases.push(("int8", Weight::int8(matrix), dequantized));
    cases
}

#[test]
fn lora_linear_over_every_storage() {
    on_every_isa(|ctx, isa| {
        // 43 columns: blocks of 64 run across rows; 300 outputs: more than one task of a magnitude.
        for (n, inputs, outputs, rank) in [(1, 43, 5, 2), (6, 43, 300, 3), (33, 64, 20, 16)] {
            for (name, weight, plain) in weights(outputs, inputs) {
                let squares = dora::squared_norms(ctx, &weight);
                let (matrix, bias) = (Matrix::Frozen(weight), Bias::Frozen(floats(outputs, 15)));
                let mut linear = Linear { inputs, outputs, matrix, bias, lora: None };
                for magnitude in [None, Some(floats(outputs, 23).iter().map(|v| 1.0 + 0.5 * v).collect::<Vec<_>>())] {
                    let what = format!("{isa} {name} {n}x{inputs}x{outputs} dora {}", magnitude.is_some());
                    let (a, b) = (floats(rank * inputs, 16), floats(outputs * rank, 17));
                    let mut params = ParamStore::default();
                    let ids = [
                        params.add("a".into(), vec![rank, inputs], a.clone(), true),
                        params.add("b".into(), vec![outputs, rank], b.clone(), true),
                    ];
                    let dora = magnitude.as_ref().map(|m| {
                        let id = params.add("m".into(), vec![outputs], m.clone(), true);
                        Arc::new(Dora::new(id, squares.clone()))
                    });
                    let lora =
                        Lora { a: ids[0], b: ids[1], rank, scale: 1.5, dropout: 0.25, module: 9, dora, taken: None };
                    linear.lora = Some(lora);
                    check_lora_linear(ctx, &what, n, &linear, &plain, &params);
                }
            }
        }
    });
}

/// One layer, with and without dropout, against its twin on the tape.
fn check_lora_linear(ctx: &Ctx, what: &str, n: usize, linear: &Linear, plain: &[f32], params: &ParamStore) {
    let (inputs, outputs) = (linear.inputs, linear.outputs);
    let lora = linear.lora.as_ref().unwrap();
    let Bias::Frozen(bias) = &linear.bias else { panic!("the test's layer has a frozen bias") };
    let (x, dy) = (floats(n * inputs, 13), floats(n * outputs, 14));
    let sequence: Vec<u32> = vec![0; n];
    let tokens = Tokens::from_sequences([&sequence[..]]);
    for dropout in [None, Some(DropoutKey { seed: 1, step: 2 })] {
        let env = Env { dropout, ..Env::new(ctx, params, &tokens) };
        let (y, saved) = linear.forward(&env, &x);
        let (mut dx, mut grads) = (vec![0.0; x.len()], Grads::zeros(params));
        linear.backward(&env, &x, saved, &dy, Some(&mut dx), &mut grads);

        // The mask, as the op itself draws it on ones.
        let mut mask = vec![1.0; x.len()];
        if let Some(key) = dropout {
            Dropout { key, module: 9, p: 0.25, tokens: &tokens, width: inputs }.in_place(ctx, &mut mask);
            assert!(mask.contains(&0.0), "{what}: nothing was dropped");
        }
        let (tx, ta) = (var(&x, &[n, inputs]), var(params.get(lora.a), &[lora.rank, inputs]));
        let tb = var(params.get(lora.b), &[outputs, lora.rank]);
        let fixed = |v: &[f32], shape: (usize, usize)| Tensor::from_slice(v, shape, &Device::Cpu).unwrap();
        let w = fixed(plain, (outputs, inputs));
        let base = tx.matmul(&w.t().unwrap()).unwrap();
        let dropped = (tx.as_tensor() * fixed(&mask, (n, inputs))).unwrap();
        let low = (dropped.matmul(&ta.t().unwrap()).unwrap().matmul(&tb.t().unwrap()).unwrap() * 1.5).unwrap();
        let bias = Tensor::from_slice(bias, outputs, &Device::Cpu).unwrap();
        let mut ty = (base + &low).unwrap().broadcast_add(&bias).unwrap();
        let mut inputs = vec![&tx, &ta, &tb];
        let tm;
        if let Some(dora) = &lora.dora {
            // As PEFT has it: (m / n - 1) (D(x) Wᵀ + s D(x) Aᵀ Bᵀ) on top, n = |W + s B A| by rows without a gradient.
            tm = var(params.get(dora.magnitude), &[outputs]);
            let v = (w.clone() + (tb.matmul(&ta).unwrap() * 1.5).unwrap()).unwrap();
            let norms = v.sqr().unwrap().sum(1).unwrap().sqrt().unwrap().detach();
            let excess = (tm.as_tensor().div(&norms).unwrap() - 1.0).unwrap();
            let z = (dropped.matmul(&w.t().unwrap()).unwrap() + low).unwrap();
            ty = (ty + z.broadcast_mul(&excess).unwrap()).unwrap();
            inputs.push(&tm);
        }
        let want = tape(&ty, &dy, &inputs);
        assert_near(what, &y, &values(&ty), 1e-5); // f32, sums reassociated
        assert_near(&format!("{what} dx"), &dx, &want[0], 1e-5);
        for (name, (got, want)) in ["da", "db", "dm"].iter().zip(grads.all().iter().zip(&want[1..])) {
            assert_near(&format!("{what} {name}"), got, want, 1e-5);
        }
        assert_eq!(grads.all().len(), want.len() - 1);
        central_differences(what, &x, &dx, |x| weighted(&linear.forward(&env, x).0, &dy));
    }
}

#[test]
fn head_and_loss_with_ignored_targets() {
    on_every_isa(|ctx, isa| {
        let (n, hidden, vocab) = (9, 24, 101);
        let (h, w) = (floats(n * hidden, 18), floats(vocab * hidden, 19));
        let targets = [3, -100, 100, 0, -100, 7, 7, 50, -100];
        let trained = targets.iter().filter(|t| **t >= 0).count();
        let mut params = ParamStore::default();
        let id = params.add("w".into(), vec![vocab, hidden], w.clone(), true);
        let tokens = Tokens::default();
        let env = Env::new(ctx, &params, &tokens);
        let mut grads = Grads::zeros(&params);
        let weight = 1.0 / trained as f32;
        let (sum, dh) = head::loss_and_grad(&env, &Matrix::Trained(id), vocab, &h, &targets, weight, &mut grads);

        let (th, tw) = (var(&h, &[n, hidden]), var(&w, &[vocab, hidden]));
        let keep: Vec<u32> = (0..n as u32).filter(|t| targets[*t as usize] >= 0).collect();
        let wanted: Vec<u32> = keep.iter().map(|t| targets[*t as usize] as u32).collect();
        let rows = th.index_select(&Tensor::new(&keep[..], &Device::Cpu).unwrap(), 0).unwrap();
        let scores = rows.matmul(&tw.t().unwrap()).unwrap();
        let log_sum = scores.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
        let picked = Tensor::new(&wanted[..], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let loss = (log_sum - scores.gather(&picked, 1).unwrap()).unwrap().mean_all().unwrap();
        let want = tape(&loss, &[1.0], &[&th, &tw]);
        assert!((sum / trained as f64 - f64::from(values(&loss)[0])).abs() < 1e-5, "{isa}: loss");
        assert_near(isa, &dh, &want[0], 1e-5);
        assert_near(isa, grads.get(id), &want[1], 1e-5);
        let mean = |h: &[f32]| {
            let mut ignored = Grads::zeros(&params);
            head::loss_and_grad(&env, &Matrix::Trained(id), vocab, h, &targets, weight, &mut ignored).0 / trained as f64
        };
        central_differences(isa, &h, &dh, mean);
    });
}

#[test]
fn an_op_composes_on_the_tape_with_views_that_are_not_contiguous() {
    let ctx = Ctx::new(Precision::F32).unwrap();
    let (gate, up) = (floats(35, 20), floats(35, 21));
    let (tg, tu) = (var(&gate, &[5, 7]), var(&up, &[7, 5]));
    let (forward, backward) = (ctx.clone(), ctx);
    let op = Op {
        name: "swiglu",
        forward: move |x: &[&[f32]]| swiglu::forward(&forward, x[0], x[1]).to_vec(),
        backward: move |x: &[&[f32]], dy: &[f32]| {
            let (dgate, dup) = swiglu::backward(&backward, x[0], x[1], dy);
            vec![dgate.to_vec(), dup.to_vec()]
        },
    };
    let ours = tg.t().unwrap().apply_op2(&tu, op).unwrap().sqr().unwrap();
    let twin = (tg.t().unwrap().silu().unwrap() * tu.as_tensor()).unwrap().sqr().unwrap();
    let upstream = floats(35, 22);
    assert_near("composed", &values(&ours), &values(&twin), 1e-5); // exp within 2 ulp, squared
    let (got, want) = (tape(&ours, &upstream, &[&tg, &tu]), tape(&twin, &upstream, &[&tg, &tu]));
    assert_near("composed dgate", &got[0], &want[0], 1e-5);
    assert_near("composed dup", &got[1], &want[1], 1e-5);
}
