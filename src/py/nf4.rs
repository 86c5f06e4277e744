//! `Nf4Tensor`: a numpy array in 4 bits.

use super::enter;
use crate::error::Error;
use crate::quant::{Absmax, FloatKind, Nf4Tensor};
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use numpy::{PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Adds the class to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyNf4Tensor>()
}

/// A tensor quantized to NF4.
#[pyclass(module = "rustune._native", name = "Nf4Tensor", frozen)]
pub(super) struct PyNf4Tensor {
    tensor: Nf4Tensor,
}

/// The flat values of an array: singles, or the bits of 16-bit floats.
#[derive(FromPyObject)]
enum Values<'py> {
    Single(PyReadonlyArray1<'py, f32>),
    Bits(PyReadonlyArray1<'py, u16>),
}

#[pymethods]
impl PyNf4Tensor {
    /// Quantizes flat values: float32, or uint16 holding the bits of `dtype` float16 or bfloat16.
    #[staticmethod]
    fn quantize(
        py: Python<'_>,
        values: Values<'_>,
        shape: Vec<usize>,
        dtype: &str,
        block_size: i64,
        double_quant: bool,
    ) -> PyResult<Self> {
        let block_size = usize::try_from(block_size)
            .map_err(|_| Error::config("block_size", block_size, "a power of two from 32 to 4096"))?;
        let unknown = || Error::config("dtype", dtype, "expected float32, float16 or bfloat16");
        let kind = FloatKind::from_name(dtype).ok_or_else(unknown)?;
        let tensor = match (&values, kind) {
            (Values::Single(values), _) => {
                let values = values.as_slice()?;
                enter(py, || Nf4Tensor::quantize(values, &shape, kind, block_size, double_quant))
            }
            (Values::Bits(values), FloatKind::F16) => {
                let values: &[f16] = values.as_slice()?.reinterpret_cast();
                enter(py, || Nf4Tensor::quantize(values, &shape, kind, block_size, double_quant))
            }
            (Values::Bits(values), FloatKind::Bf16) => {
                let values: &[bf16] = values.as_slice()?.reinterpret_cast();
                enter(py, || Nf4Tensor::quantize(values, &shape, kind, block_size, double_quant))
            }
            (Values::Bits(_), FloatKind::F32) => Err(unknown().into()),
        }?;
        Ok(Self { tensor })
    }

    /// Two 4-bit indices a byte, the first in the high half: uint8 `[ceil(size / 2)]`.
    #[getter]
    fn packed<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        PyArray1::from_slice(py, &self.tensor.packed)
    }

    /// The scale of each block, de-quantized if it is: float32 `[ceil(size / block_size)]`.
    #[getter]
    fn absmax<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        PyArray1::from_vec(py, self.tensor.scales())
    }

    /// Under double quantization (codes uint8, second-level scales float32, offset), else None.
    #[getter]
    #[expect(clippy::type_complexity, reason = "a Python tuple of three")]
    fn nested<'py>(&self, py: Python<'py>) -> Option<(Bound<'py, PyArray1<u8>>, Bound<'py, PyArray1<f32>>, f32)> {
        match &self.tensor.absmax {
            Absmax::Plain(_) => None,
            Absmax::Nested { codes, absmax, offset, .. } => {
                Some((PyArray1::from_slice(py, codes), PyArray1::from_slice(py, absmax), *offset))
            }
        }
    }

    /// The shape of the array that was quantized.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.tensor.shape)
    }

    /// The dtype of the array that was quantized, to which dequantized values are rounded.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.tensor.dtype.name()
    }

    /// Weights that share a scale.
    #[getter]
    fn block_size(&self) -> usize {
        self.tensor.block_size
    }

    /// Whether the scales are quantized too.
    #[getter]
    fn double_quant(&self) -> bool {
        self.tensor.double_quant()
    }

    /// Bytes of the packed weights and their scales.
    #[getter]
    fn nbytes(&self) -> usize {
        self.tensor.nbytes()
    }

    /// The weights as float32, rounded to `dtype`, in their shape.
    fn dequantize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let values = enter(py, || Ok(self.tensor.dequantize()))?;
        PyArray1::from_vec(py, values).reshape(self.tensor.shape.as_slice())
    }

    fn __repr__(&self) -> String {
        let Nf4Tensor { shape, dtype, block_size, .. } = &self.tensor;
        let double = if self.tensor.double_quant() { "True" } else { "False" };
        let axes: Vec<String> = shape.iter().map(usize::to_string).collect();
        let comma = if axes.len() == 1 { "," } else { "" };
        format!(
            "Nf4Tensor(shape=({}{comma}), dtype='{}', block_size={block_size}, double_quant={double})",
            axes.join(", "),
            dtype.name(),
        )
    }
}
