//! A frozen matrix in the form it is stored: f32, bf16 or NF4.

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::quant::nf4::CODE_BOOK;
use crate::quant::{FloatKind, Nf4Tensor};
use half::bf16;

/// What GEMM operands are rounded to; sums are f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Operands as they are.
    F32,
    /// Operands rounded to bfloat16, ties to even.
    Bf16,
}

/// A matrix `[rows, cols]`, row-major; of a linear layer, `[out, in]`.
pub struct Weight {
    rows: usize,
    cols: usize,
    data: Storage,
}

/// How the elements are stored.
pub enum Storage {
    /// As they are.
    F32(Vec<f32>),
    /// Half the bytes, exact for a bf16 checkpoint.
    Bf16(Vec<bf16>),
    /// 4 bits an element and a scale a block (Dettmers et al. 2023, section 3).
    Nf4(Nf4Tensor),
}

impl Weight {
    /// A matrix of f32.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` does not have `rows · cols` elements.
    pub fn f32(data: Vec<f32>, rows: usize, cols: usize) -> Result<Self> {
        Self::new(data.len(), Storage::F32(data), rows, cols)
    }

    /// A matrix of bf16.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` does not have `rows · cols` elements.
    pub fn bf16(data: Vec<bf16>, rows: usize, cols: usize) -> Result<Self> {
        Self::new(data.len(), Storage::Bf16(data), rows, cols)
    }

    /// A quantized matrix; its shape is the tensor's.
    ///
    /// # Errors
    /// [`Error::Shape`] if the tensor is not a matrix.
    pub fn nf4(tensor: Nf4Tensor) -> Result<Self> {
        let [rows, cols] = tensor.shape[..] else {
            return Err(Error::Shape { op: "Weight::nf4", expected: "[out, in]".into(), got: tensor.shape.clone() });
        };
        Self::new(rows * cols, Storage::Nf4(tensor), rows, cols)
    }

    fn new(len: usize, data: Storage, rows: usize, cols: usize) -> Result<Self> {
        if len != rows * cols {
            let expected = format!("{rows} x {cols} elements");
            return Err(Error::Shape { op: "Weight::new", expected, got: vec![len] });
        }
        Ok(Self { rows, cols, data })
    }

    /// Rows, of a linear layer its outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, of a linear layer its inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the elements are stored.
    pub fn storage(&self) -> &Storage {
        &self.data
    }

    /// Bytes of the elements and their scales.
    pub fn nbytes(&self) -> usize {
        match &self.data {
            Storage::F32(data) => 4 * data.len(),
            Storage::Bf16(data) => 2 * data.len(),
            Storage::Nf4(tensor) => tensor.nbytes(),
        }
    }

    /// Elements `start .. start + out.len()` of the row-major matrix, dequantized and rounded to the dtype that the
    /// quantized tensor stands for; allocates nothing.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    #[inline]
    pub fn read(&self, kernels: &Kernels, start: usize, out: &mut [f32]) {
        match &self.data {
            Storage::F32(data) => out.copy_from_slice(&data[start..start + out.len()]),
            Storage::Bf16(data) => {
                let values = &data[start..start + out.len()];
                for (out, value) in out.iter_mut().zip(values) {
                    *out = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }
            Storage::Nf4(tensor) => read_nf4(kernels, tensor, start, out),
        }
    }
}

/// Runs over the blocks that the range touches; blocks may run across rows, so a range may start inside a byte.
fn read_nf4(kernels: &Kernels, tensor: &Nf4Tensor, start: usize, out: &mut [f32]) {
    let mut done = 0;
    while done < out.len() {
        let mut at = start + done;
        let block = at / tensor.block_size;
        let scale = tensor.block_scale(block);
        let end = out.len().min((block + 1) * tensor.block_size - start);
        let mut part = &mut out[done..end];
        done = end;
        if at % 2 == 1 {
            part[0] = CODE_BOOK[usize::from(tensor.packed[at / 2] & 15)] * scale;
            at += 1;
            part = &mut part[1..];
        }
        if !part.is_empty() {
            let bytes = &tensor.packed[at / 2..(at + part.len()).div_ceil(2)];
            (kernels.nf4_block)(bytes, scale, &CODE_BOOK, part);
        }
    }
    match tensor.dtype {
        FloatKind::F32 => {}
        FloatKind::Bf16 => (kernels.round_bf16)(out),
        FloatKind::F16 => out.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
    }
}
