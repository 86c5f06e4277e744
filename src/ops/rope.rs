//! Rotary position embedding in HF Llama's half-split layout, with llama3 and linear scaling.  Su et al. 2021, eq. 34.

use super::{Ctx, TASKS_AT_ONCE, rows_per_task};
use rayon::prelude::*;

/// How positions beyond the trained length are handled.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Positions divided by a factor.  Chen et al. 2023, section 2.3.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's rule: low frequencies divided by the factor, high ones kept, a ramp between
    /// (transformers `_compute_llama3_parameters`).
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The length the base model was trained on.
        original_max: f64,
    },
}

/// The inverse frequencies of a head.
pub struct Rope {
    /// `[head_dim / 2]`.
    inv_freq: Vec<f32>,
}

/// Which way to rotate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// By the position's angle.
    Forward,
    /// Back by it: the gradient.
    Backward,
}

impl Rope {
    /// `inv_freq[i] = theta^(-2 i / head_dim)`, scaled.
    pub fn new(head_dim: usize, theta: f64, scaling: &RopeScaling) -> Self {
        let scale = |freq: f64| match *scaling {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
                let wavelength = std::f64::consts::TAU / freq;
                if wavelength > original_max / low_freq_factor {
                    freq / factor
                } else if wavelength < original_max / high_freq_factor {
                    freq
                } else {
                    let ramp = (original_max / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - ramp) * freq / factor + ramp * freq
                }
            }
        };
        // The exponent in f32, as torch computes it.
        let frequency = |i: usize| 1.0 / theta.powf(f64::from(2.0_f32 * i as f32 / head_dim as f32));
        Self { inv_freq: (0..head_dim / 2).map(|i| scale(f64::from(frequency(i) as f32)) as f32).collect() }
    }

    /// cos and sin of each token's angles, `[n_tokens, head_dim / 2]` each; shared by all layers of a forward.
    pub fn angles(&self, positions: &[u32]) -> Angles {
        let half = self.inv_freq.len();
        let mut angles =
            Angles { cos: vec![0.0; positions.len() * half], sin: vec![0.0; positions.len() * half], half };
        let rows = angles.cos.par_chunks_mut(half).zip(angles.sin.par_chunks_mut(half));
        rows.zip(positions).for_each(|((cos, sin), position)| {
            for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
                let angle = *position as f32 * freq;
                (*cos, *sin) = (angle.cos(), angle.sin());
            }
        });
        angles
    }
}

/// cos and sin of each token's angles.
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    /// Rotates every head of every token in place;  x: `[n_tokens, heads · head_dim]`.
    pub fn rotate(&self, ctx: &Ctx, x: &mut [f32], width: usize, turn: Turn) {
        let (half, task) = (self.half, rows_per_task(width));
        let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
        x.par_chunks_mut(task * width).with_max_len(TASKS_AT_ONCE).enumerate().for_each(|(chunk, x)| {
            for (r, row) in x.chunks_exact_mut(width).enumerate() {
                let at = (chunk * task + r) * half;
                (ctx.kernels.rope_row)(row, &self.cos[at..at + half], &self.sin[at..at + half], sign);
            }
        });
    }
}
