//! A frozen matrix in the form it is stored: f32, bf16, 8 bits or NF4.

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::kernels::gemm::PairKernels;
use crate::kernels::lines::prefetch;
use crate::quant::nf4::{CODE_BOOK, scaled_code_book};
use crate::quant::{FloatKind, Nf4Tensor, RowwiseInt8};
use half::bf16;
use rayon::prelude::*;

/// What GEMM operands are rounded to; sums are f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Operands as they are.
    F32,
    /// Operands rounded to bfloat16, ties to even.
    Bf16,
    /// Operands rounded to 16-bit whole numbers with a scale for each 64 neighbours along the sum
    /// ([`crate::kernels::int16`]); what decodes token by token, [`super::Activations`] say.
    Int16,
}

impl Precision {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int16];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::Int16 => "int16",
        }
    }

    /// The fastest that this instruction set has: bf16 where there is a unit for it, else 16-bit blocks where their products
    /// are faster than those of f32.
    pub fn best(kernels: &Kernels) -> Self {
        match kernels {
            _ if kernels.prefers_bf16() => Self::Bf16,
            _ if kernels.int16.fast => Self::Int16,
            _ => Self::F32,
        }
    }
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
    /// 8 bits an element and a scale a row (Dettmers et al. 2022, section 2).
    Int8(RowwiseInt8),
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

    /// A matrix in 8 bits.
    pub fn int8(matrix: RowwiseInt8) -> Self {
        Self { rows: matrix.absmax.len(), cols: matrix.cols, data: Storage::Int8(matrix) }
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
            Storage::Int8(matrix) => matrix.nbytes(),
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
            Storage::Bf16(data) => (kernels.widen)(bits(&data[start..start + out.len()]), out),
            Storage::Int8(matrix) => matrix.each_row(start, out, kernels.int8_row),
            Storage::Nf4(tensor) => {
                let round = tensor.dtype == FloatKind::Bf16;
                each_run(tensor, start, out, |bytes, scales, code, out| {
                    (kernels.nf4_blocks)(bytes, scales, tensor.block_size, code, round, out);
                });
            }
        }
    }

    /// Asks for the memory of elements `start .. start + len`, as far as the matrix goes.
    #[inline]
    pub fn prefetch(&self, start: usize, len: usize) {
        let end = (start + len).min(self.rows * self.cols);
        let start = start.min(end);
        match &self.data {
            Storage::F32(data) => prefetch(&data[start..end]),
            Storage::Bf16(data) => prefetch(&data[start..end]),
            Storage::Int8(matrix) => prefetch(&matrix.codes[start..end]),
            Storage::Nf4(tensor) => {
                prefetch(&tensor.packed[start / 2..end / 2]);
                tensor.absmax.prefetch(start / tensor.block_size..end.div_ceil(tensor.block_size));
            }
        }
    }

    /// All elements, as [`Weight::read`] gives them.
    pub fn to_f32(&self, kernels: &Kernels) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        let read = |(row, out): (usize, &mut [f32])| self.read(kernels, row * self.cols, out);
        values.par_chunks_mut(self.cols).enumerate().for_each(read);
        values
    }

    /// Cuts the matrix to `rows` rows, or adds rows that all are `fill: [cols]`, rounded as the elements are stored.
    ///
    /// A quantized matrix becomes one of the dtype that it stands for (f32 for int8 and f16): rows have no blocks of their own.
    pub fn resize_rows(&mut self, kernels: &Kernels, rows: usize, fill: &[f32]) {
        self.dequantize(kernels);
        let len = rows * self.cols;
        let fill = |at: usize| fill[at % fill.len()];
        match &mut self.data {
            Storage::F32(data) => {
                data.truncate(len);
                data.extend((data.len()..len).map(fill));
            }
            Storage::Bf16(data) => {
                data.truncate(len);
                data.extend((data.len()..len).map(|at| bf16::from_f32(fill(at))));
            }
            Storage::Int8(_) | Storage::Nf4(_) => unreachable!("dequantized above"),
        }
        self.rows = rows;
    }

    /// Sets a row, rounded as the elements are stored; a quantized matrix as in [`Weight::resize_rows`].
    ///
    /// # Panics
    /// If there is no such row.
    pub fn set_row(&mut self, kernels: &Kernels, row: usize, values: &[f32]) {
        self.dequantize(kernels);
        let range = row * self.cols..(row + 1) * self.cols;
        match &mut self.data {
            Storage::F32(data) => data[range].copy_from_slice(values),
            Storage::Bf16(data) => {
                data[range].iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(*value));
            }
            Storage::Int8(_) | Storage::Nf4(_) => unreachable!("dequantized above"),
        }
    }

    fn dequantize(&mut self, kernels: &Kernels) {
        let half = match &self.data {
            Storage::F32(_) | Storage::Bf16(_) => return,
            Storage::Int8(_) => false,
            Storage::Nf4(tensor) => tensor.dtype == FloatKind::Bf16,
        };
        let values = self.to_f32(kernels);
        self.data =
            if half { Storage::Bf16(values.into_iter().map(bf16::from_f32).collect()) } else { Storage::F32(values) };
    }

    /// As [`Weight::read`], rounded to bf16 as well.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    #[inline]
    pub fn read_bf16(&self, pairs: &PairKernels, start: usize, out: &mut [u16]) {
        match &self.data {
            Storage::F32(data) => {
                let values = &data[start..start + out.len()];
                for (out, value) in out.iter_mut().zip(values) {
                    *out = bf16::from_f32(*value).to_bits();
                }
            }
            Storage::Bf16(data) => out.copy_from_slice(bits(&data[start..start + out.len()])),
            Storage::Int8(matrix) => matrix.each_row(start, out, pairs.int8),
            Storage::Nf4(tensor) => each_run(tensor, start, out, |bytes, scales, code, out| {
                (pairs.nf4)(bytes, scales, tensor.block_size, code, out);
            }),
        }
    }
}

/// The bits of a slice of bf16.
fn bits(values: &[bf16]) -> &[u16] {
    use half::slice::HalfFloatSliceExt;
    values.reinterpret_cast()
}

/// Scales that are looked up at a time.
const SCALES: usize = 64;

/// Cuts the range into runs that a kernel takes, and calls `dequantize(bytes, scales, code book, out)` for each.
///
/// Blocks may run across rows, so a range may start inside a block, even inside a byte: what comes before the first whole
/// block, and an odd element, is done here. Halves round each code-book value times scale once, so f16 goes block by
/// block with a code book of its own.
fn each_run<T: Copy>(
    tensor: &Nf4Tensor,
    start: usize,
    out: &mut [T],
    dequantize: impl Fn(&[u8], &[f32], &[f32; 16], &mut [T]),
) {
    let block_size = tensor.block_size;
    let f16 = tensor.dtype == FloatKind::F16;
    let mut done = 0;
    while done < out.len() {
        let at = start + done;
        let (block, inside) = (at / block_size, at % block_size);
        if inside % 2 == 1 {
            // The low nibble of a byte: as the second of a pair.
            let mut pair = [out[done]; 2];
            let scale = tensor.block_scale(block);
            let (code, scale) = if f16 { (scaled_code_book(scale, FloatKind::F16), 1.0) } else { (CODE_BOOK, scale) };
            dequantize(&tensor.packed[at / 2..=at / 2], &[scale], &code, &mut pair);
            out[done] = pair[1];
            done += 1;
            continue;
        }
        let whole_blocks = if f16 || inside > 0 { 1 } else { SCALES };
        let len = (whole_blocks * block_size - inside).min(out.len() - done);
        let bytes = &tensor.packed[at / 2..(at + len).div_ceil(2)];
        let part = &mut out[done..done + len];
        if f16 {
            dequantize(bytes, &[1.0], &scaled_code_book(tensor.block_scale(block), FloatKind::F16), part);
        } else {
            let mut scales = [0.0; SCALES];
            let scales = &mut scales[..len.div_ceil(block_size)];
            tensor.absmax.read_few(block, scales);
            dequantize(bytes, scales, &CODE_BOOK, part);
        }
        done += len;
    }
}
