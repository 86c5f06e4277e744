//! Adapters that begin with singular vectors: PiSSA and LoftQ.
//!
//! PiSSA (Meng et al. 2024, section 3) gives the adapter the leading part of the matrix, `s B₀ A₀`, and leaves the rest to the frozen
//! matrix, which is stored again as it was: in NF4, int8, bf16 or f32. LoftQ (Li et al. 2023, algorithm 1, one round) leaves the
//! quantized matrix alone and gives the adapter the leading part of what quantization lost. Both read the matrix before it was
//! quantized from the model's folder, one at a time.

use super::Init;
use super::svd::{self, Rounds};
use crate::error::{Error, Result};
use crate::model::weights::Originals;
use crate::ops::linear::Halves;
use crate::ops::matmul::{Gemm, Into, Operand, gemm};
use crate::ops::weight::Storage;
use crate::ops::{Ctx, Precision, Weight};
use crate::quant::{Nf4Tensor, RowwiseInt8};
use half::bf16;
use rayon::prelude::*;

/// Which linear layer, and the adapter it is to get.
pub(super) struct Site<'a> {
    /// Its name, `model.layers.0.self_attn.q_proj`.
    pub(super) module: String,
    pub(super) weight: &'a Weight,
    pub(super) rank: usize,
    pub(super) scale: f32,
    pub(super) seed: u64,
    /// Tells the layers' random rows apart.
    pub(super) number: u32,
}

impl Site<'_> {
    /// Whether the layer can begin as `init` says.
    ///
    /// # Errors
    /// [`Error::Config`] if the rank is more than the shorter side or, with LoftQ, nothing was quantized here, or it was before
    /// it came here; those of opening the model's files.
    pub(super) fn check(&self, init: Init, originals: &mut Originals) -> Result<()> {
        let name = match init {
            Init::Uniform | Init::Gaussian => return Ok(()),
            Init::Pissa(_) => "pissa",
            Init::Loftq => "loftq",
        };
        let (module, most) = (&self.module, self.weight.rows().min(self.weight.cols()));
        if self.rank > most {
            let expected = format!("{module} has no more than {most} singular values, and {name} begins with them");
            return Err(Error::config("r", self.rank, expected));
        }
        let (quantized, nf4) = (self.is_quantized(), matches!(self.weight.storage(), Storage::Nf4(_)));
        let problem = match (init, nf4, quantized && originals.is_quantized(module)?) {
            (Init::Loftq, false, _) => "is not in 4 bits, which is what LoftQ makes good: pass load_in_4bit=True",
            (Init::Loftq, _, true) => {
                "is in 4 bits in the checkpoint already, and what that lost is not in it: load the 16-bit checkpoint"
            }
            _ => return Ok(()),
        };
        Err(Error::config("init_lora_weights", name, format!("{module} {problem}")))
    }

    /// PiSSA: the leading part of the matrix, and the matrix without it.
    ///
    /// # Errors
    /// Those of reading the matrix again.
    pub(super) fn principal(&self, ctx: &Ctx, originals: &mut Originals, rounds: Rounds) -> Result<(Halves, Weight)> {
        let matrix = self.matrix(ctx, originals)?;
        let halves = self.leading(ctx, &matrix, rounds);
        let rest = self.without(ctx, matrix, &halves)?;
        Ok((halves, rest))
    }

    /// LoftQ: the leading part of what quantization lost.
    ///
    /// # Errors
    /// Those of reading the matrix again.
    pub(super) fn lost(&self, ctx: &Ctx, originals: &mut Originals) -> Result<Halves> {
        let (mut matrix, cols) = (self.matrix(ctx, originals)?, self.weight.cols());
        matrix.par_chunks_mut(cols).enumerate().for_each_init(
            || vec![0.0; cols],
            |kept, (row, values)| {
                self.weight.read(ctx.kernels, row * cols, kept);
                values.iter_mut().zip(kept).for_each(|(value, kept)| *value -= *kept);
            },
        );
        Ok(self.leading(ctx, &matrix, Rounds::Converged))
    }

    /// The matrix without `s B A`, stored as it is now; for an adapter whose first values are known.
    ///
    /// # Errors
    /// Those of reading the matrix again.
    pub(super) fn rest(&self, ctx: &Ctx, originals: &mut Originals, halves: &Halves) -> Result<Weight> {
        let matrix = self.matrix(ctx, originals)?;
        self.without(ctx, matrix, halves)
    }

    fn is_quantized(&self) -> bool {
        matches!(self.weight.storage(), Storage::Nf4(_) | Storage::Int8(_))
    }

    /// The matrix as it was before it was quantized, where the folder has it; otherwise as it is.
    fn matrix(&self, ctx: &Ctx, originals: &mut Originals) -> Result<Vec<f32>> {
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        if self.is_quantized()
            && let Some(matrix) = originals.read(&self.module, rows, cols)?
        {
            return Ok(matrix);
        }
        Ok(self.weight.to_f32(ctx.kernels))
    }

    /// `A = √(Σ/s) Vᵀ`, `B = U √(Σ/s)` of the leading triplets.
    fn leading(&self, ctx: &Ctx, matrix: &[f32], rounds: Rounds) -> Halves {
        let (rank, rows, cols) = (self.rank, self.weight.rows(), self.weight.cols());
        let key = [self.seed as u32, (self.seed >> 32) as u32 ^ 0x5356_4473];
        let triplets = svd::leading(ctx, matrix, cols, rank, rounds, |i| super::normal(i, self.number, key));
        let roots: Vec<f32> = triplets.values.iter().map(|v| (v / f64::from(self.scale)).sqrt() as f32).collect();
        let scaled = |vectors: &[f32], k: usize, i: usize, width: usize| roots[k] * vectors[k * width + i];
        Halves {
            a: (0..rank * cols).map(|at| scaled(&triplets.right, at / cols, at % cols, cols)).collect(),
            b: (0..rows * rank).map(|at| scaled(&triplets.left, at % rank, at / rank, rows)).collect(),
        }
    }

    /// `matrix - s B A`, stored as the weight is.
    fn without(&self, ctx: &Ctx, mut matrix: Vec<f32>, halves: &Halves) -> Result<Weight> {
        let (rank, rows, cols) = (self.rank, self.weight.rows(), self.weight.cols());
        let ctx = &Ctx { precision: Precision::F32, ..ctx.clone() };
        let (a, b) = (Operand::rows(&halves.b, rank), Operand::rows(&halves.a, cols));
        gemm(ctx, &Gemm { m: rows, n: cols, k: rank, a, b, alpha: -self.scale, into: Into::Add }, &mut matrix);
        match self.weight.storage() {
            Storage::F32(_) => Weight::f32(matrix, rows, cols),
            Storage::Bf16(_) => Weight::bf16(matrix.par_iter().map(|v| bf16::from_f32(*v)).collect(), rows, cols),
            Storage::Int8(_) => Ok(Weight::int8(RowwiseInt8::quantize_from(rows, cols, |start, out| {
                out.copy_from_slice(&matrix[start..start + out.len()]);
                Ok(())
            })?)),
            Storage::Nf4(now) => {
                let (dtype, block_size) = (now.dtype, now.block_size);
                Weight::nf4(Nf4Tensor::quantize(&matrix, &[rows, cols], dtype, block_size, now.double_quant())?)
            }
        }
    }
}
