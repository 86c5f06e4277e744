//! Clipping gradients by their global norm, as `torch.nn.utils.clip_grad_norm_` does.

use rayon::prelude::*;

/// Elements summed before the sums are added up: a fixed number, so that the result knows nothing of threads.
const CHUNK: usize = 8_192;

/// The Euclidean norm of all gradients together, in f64 and in a fixed order.
pub fn global_norm(grads: &[&[f32]]) -> f64 {
    let sums: Vec<f64> = grads
        .par_iter()
        .flat_map(|grad| grad.par_chunks(CHUNK))
        .map(|chunk| {
            // Four running sums let the additions overlap.
            let mut sums = [0f64; 4];
            let mut fours = chunk.chunks_exact(4);
            for four in fours.by_ref() {
                for (sum, &g) in sums.iter_mut().zip(four) {
                    *sum += f64::from(g) * f64::from(g);
                }
            }
            for (sum, &g) in sums.iter_mut().zip(fours.remainder()) {
                *sum += f64::from(g) * f64::from(g);
            }
            (sums[0] + sums[1]) + (sums[2] + sums[3])
        })
        .collect();
    sums.iter().sum::<f64>().sqrt()
}

/// What gradients of norm `norm` are multiplied by: `max_norm / (norm + 1e-6)`, at most 1; 1 if `max_norm` is 0.
///
/// A norm that is NaN gives NaN; callers end the run before they use it.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm <= 0.0 {
        return 1.0;
    }
    let factor = max_norm / (norm + 1e-6);
    if factor > 1.0 { 1.0 } else { factor as f32 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut random = crate::data::order::Mt19937::new(seed);
        (0..n).map(|_| random.next_u32() as f32 / u32::MAX as f32 - 0.5).collect()
    }

    #[test]
    fn norm_is_the_root_of_the_sum_of_squares() {
        let (a, b, c) = (noise(20_003, 1), noise(7, 2), noise(8_192, 3));
        let slow = a.iter().chain(&b).chain(&c).map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        // 1e-13: f64 sums in another order.
        assert!((global_norm(&[&a, &b, &[], &c]) - slow).abs() < 1e-13 * slow);
        assert_eq!(global_norm(&[&[3.0, 4.0]]), 5.0);
        assert_eq!(global_norm(&[]), 0.0);
        assert!(global_norm(&[&[1.0, f32::NAN]]).is_nan());
    }

    #[test]
    fn threads_do_not_change_the_norm() {
        let (a, b) = (noise(100_001, 4), noise(50_000, 5));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| global_norm(&[&a, &b])).to_bits()
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(4));
    }

    #[test]
    fn factor_equals_torch() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(5.0, 0.0), 1.0);
        assert_eq!(clip_factor(4.0, 1.0), (1.0 / 4.000_001) as f32);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
        assert!(clip_factor(f64::NAN, 1.0).is_nan());
    }
}
