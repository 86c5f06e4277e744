//! 4-bit NormalFloat (NF4) tensors, bit for bit those of bitsandbytes.
//!
//! `block_size` consecutive weights of the row-major tensor share a scale, the largest magnitude among them (absmax), so
//! blocks run across rows. A weight is the 4-bit index of the code-book value nearest to `x / absmax`; the first of two
//! neighbours sits in the high nibble. Double quantization stores the scales themselves in 8 bits (Dettmers et al. 2023,
//! QLoRA, section 3). Rules and constants are facts of bitsandbytes 0.50.2, `backends/default/ops.py`.

use half::{bf16, f16};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::dynamic_map::{DynamicMap, MAP_LEN};
use crate::error::{Error, Result};
use crate::io::os;
use crate::kernels::Kernels;
use crate::kernels::lines::prefetch;
use crate::kernels::quantize::{CHUNK, MIN_ABSMAX};
use std::cell::RefCell;
use std::ops::Range;

/// The 16 values of NF4, ascending: quantiles of a normal distribution scaled to [-1, 1], with an exact zero.
pub const CODE_BOOK: [f32; 16] = [
    -1.0,
    f32::from_bits(0xbf32_39b1),
    f32::from_bits(0xbf06_6b30),
    f32::from_bits(0xbeca_32a0),
    f32::from_bits(0xbe91_a24d),
    f32::from_bits(0xbe3d_353f),
    f32::from_bits(0xbdba_7871),
    0.0,
    f32::from_bits(0x3da2_faff),
    f32::from_bits(0x3e24_cae3),
    f32::from_bits(0x3e7c_04dd),
    f32::from_bits(0x3ead_033a),
    f32::from_bits(0x3ee1_a4b8),
    f32::from_bits(0x3f10_07ab),
    f32::from_bits(0x3f39_13b3),
    1.0,
];

/// The midpoints of neighbouring code-book values; the index of `x` is the number of thresholds strictly below it.
pub const THRESHOLDS: [f32; 15] = {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        midpoints[i] = f32::midpoint(CODE_BOOK[i], CODE_BOOK[i + 1]);
        i += 1;
    }
    midpoints
};

/// Block sizes bitsandbytes knows.
pub const BLOCK_SIZES: std::ops::RangeInclusive<usize> = 32..=4096;

/// Scales that share one second-level scale under double quantization.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// Values that are read and quantized at a time, a multiple of every block size.
pub const READ_WEIGHTS: usize = 64 << 10;

thread_local! {
    /// A task's values.
    static VALUES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The dtype dequantized values are rounded to, the one the weights had before they were quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FloatKind {
    /// IEEE single precision.
    #[serde(rename = "float32")]
    F32,
    /// IEEE half precision.
    #[serde(rename = "float16")]
    F16,
    /// The upper half of a single.
    #[serde(rename = "bfloat16")]
    Bf16,
}

impl FloatKind {
    /// The name PyTorch, numpy and `config.json` use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The kind of a name as [`FloatKind::name`] gives it, with or without `torch.` in front.
    pub fn from_name(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" => Some(Self::F32),
            "float16" => Some(Self::F16),
            "bfloat16" => Some(Self::Bf16),
            _ => None,
        }
    }

    /// `x` rounded to this dtype (to nearest, ties to even) and back.
    #[inline]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }
}

/// A number type weights come in.
pub trait Weight: Copy + Send + Sync {
    /// Its dtype.
    const KIND: FloatKind;
    /// Its value, exactly.
    fn value(self) -> f32;
}

impl Weight for f32 {
    const KIND: FloatKind = FloatKind::F32;
    fn value(self) -> f32 {
        self
    }
}

impl Weight for f16 {
    const KIND: FloatKind = FloatKind::F16;
    fn value(self) -> f32 {
        self.to_f32()
    }
}

impl Weight for bf16 {
    const KIND: FloatKind = FloatKind::Bf16;
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// The scales of the blocks.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One f32 for each block: half a bit per weight at block size 64.
    Plain(Vec<f32>),
    /// Double quantization: `map[codes[b]] * absmax[b / block_size] + offset`, an eighth of a bit per weight.
    Nested {
        /// One code for each block of weights.
        codes: Vec<u8>,
        /// The second-level scales, one for each `block_size` codes.
        absmax: Vec<f32>,
        /// The mean of all scales, subtracted before they were quantized.
        offset: f32,
        /// Codes that share a second-level scale; bitsandbytes always writes 256.
        block_size: usize,
        /// What each code stands for, [`DynamicMap::signed`] unless a checkpoint says otherwise.
        map: Box<[f32; MAP_LEN]>,
    },
}

impl Absmax {
    /// Number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested { codes, .. } => codes.len(),
        }
    }

    /// Whether there is no block at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scales of the blocks from `first` on.
    ///
    /// # Panics
    /// If there are fewer than `out.len()`.
    pub fn read(&self, kernels: &Kernels, first: usize, out: &mut [f32]) {
        self.look_up(first, out, kernels.nested_scales);
    }

    /// As [`Absmax::read`], for so few that a kernel would not pay.
    #[inline]
    pub fn read_few(&self, first: usize, out: &mut [f32]) {
        self.look_up(first, out, |codes, map, scale, offset, out| {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = map[usize::from(*code)] * scale + offset;
            }
        });
    }

    /// Calls `nested(codes, map, scale, offset, out)` for each run of codes that share a scale.
    #[inline]
    fn look_up(
        &self,
        mut first: usize,
        mut out: &mut [f32],
        nested: impl Fn(&[u8], &[f32; MAP_LEN], f32, f32, &mut [f32]),
    ) {
        match self {
            Self::Plain(scales) => out.copy_from_slice(&scales[first..first + out.len()]),
            Self::Nested { codes, absmax, offset, block_size, map } => {
                while !out.is_empty() {
                    let len = (block_size - first % block_size).min(out.len());
                    let (part, rest) = std::mem::take(&mut out).split_at_mut(len);
                    nested(&codes[first..first + len], map, absmax[first / block_size], *offset, part);
                    (first, out) = (first + len, rest);
                }
            }
        }
    }

    /// Asks for the memory of the scales of some blocks.
    #[inline]
    pub fn prefetch(&self, blocks: Range<usize>) {
        match self {
            Self::Plain(scales) => prefetch(&scales[blocks]),
            Self::Nested { codes, .. } => prefetch(&codes[blocks]),
        }
    }

    /// The scale of a block.
    #[inline]
    pub fn scale(&self, block: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[block],
            Self::Nested { codes, absmax, offset, block_size, map } => {
                map[usize::from(codes[block])] * absmax[block / block_size] + offset
            }
        }
    }
}

/// A tensor in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Tensor {
    /// Two indices a byte, the first in the high nibble: `ceil(len / 2)` bytes.
    pub packed: Vec<u8>,
    /// `ceil(len / block_size)` scales.
    pub absmax: Absmax,
    /// The axes of the tensor, row-major.
    pub shape: Vec<usize>,
    /// What dequantized values are rounded to.
    pub dtype: FloatKind,
    /// Weights that share a scale; a power of two within [`BLOCK_SIZES`].
    pub block_size: usize,
}

impl Nf4Tensor {
    /// Quantizes `values`, a row-major tensor of `shape`; the bits do not depend on the number of threads.
    ///
    /// `dtype` is what dequantized values will be rounded to: the dtype of the checkpoint the values come from
    /// ([`Weight::KIND`] when they are still in it).
    ///
    /// # Errors
    /// [`Error::Shape`] if `values` do not fill `shape`, [`Error::Config`] if `block_size` is none of bitsandbytes',
    /// [`Error::Data`] naming the first element that is NaN or infinite.
    pub fn quantize<T: Weight>(
        values: &[T],
        shape: &[usize],
        dtype: FloatKind,
        block_size: usize,
        double_quant: bool,
    ) -> Result<Self> {
        if shape_len(shape) != Some(values.len()) || values.is_empty() {
            return Err(Error::Shape {
                op: "nf4.quantize",
                expected: format!("at least one value, and as many as the shape {shape:?} holds"),
                got: vec![values.len()],
            });
        }
        Self::quantize_from(shape, dtype, block_size, double_quant, |start, out| {
            for (out, value) in out.iter_mut().zip(&values[start..]) {
                *out = value.value();
            }
            Ok(())
        })
    }

    /// Quantizes a tensor that need not be in memory: `read(start, out)` gives the values `start .. start + out.len()`, and
    /// is called from all threads, for [`READ_WEIGHTS`] values at a time.
    ///
    /// # Errors
    /// Those of [`Nf4Tensor::quantize`], and the one of `read` for the earliest values.
    pub fn quantize_from(
        shape: &[usize],
        dtype: FloatKind,
        block_size: usize,
        double_quant: bool,
        read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<Self> {
        check_block_size(block_size)?;
        let len = checked_len(shape)?;
        let mut packed = os::zeros::<u8>(len.div_ceil(2));
        let mut scales = os::zeros::<f32>(len.div_ceil(block_size));
        let kernels = crate::kernels::active()?;
        // A task is a whole number of blocks, so that no byte and no scale is shared; its size changes nothing else.
        let tasks = packed.par_chunks_mut(READ_WEIGHTS / 2).zip(scales.par_chunks_mut(READ_WEIGHTS / block_size));
        let error = tasks.enumerate().find_map_first(|(task, (bytes, scales))| {
            let start = task * READ_WEIGHTS;
            VALUES.with_borrow_mut(|values| {
                values.resize(READ_WEIGHTS.min(len - start), 0.0);
                read(start, values).err().or_else(|| {
                    let blocks = bytes.chunks_mut(block_size / 2).zip(values.chunks(block_size));
                    for (scale, (bytes, values)) in scales.iter_mut().zip(blocks) {
                        *scale = if values.len() == block_size {
                            (kernels.nf4_quantize)(values, &THRESHOLDS, bytes)
                        } else {
                            quantize_rest(kernels, values, bytes)
                        };
                    }
                    let bad = scales.iter().position(|scale| !scale.is_finite())?;
                    Some(non_finite(&values[bad * block_size..], start + bad * block_size, shape))
                })
            })
        });
        if let Some(error) = error {
            return Err(error);
        }
        let absmax = if double_quant { nest(&scales) } else { Absmax::Plain(scales) };
        Ok(Self { packed, absmax, shape: shape.to_vec(), dtype, block_size })
    }

    /// A tensor from parts that were stored, checked against each other.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown block size, [`Error::Shape`] if the number of bytes, scales or second-level
    /// scales does not follow from `shape`, [`Error::Data`] if a scale is NaN or infinite.
    pub fn from_parts(
        packed: Vec<u8>,
        absmax: Absmax,
        shape: Vec<usize>,
        dtype: FloatKind,
        block_size: usize,
    ) -> Result<Self> {
        check_block_size(block_size)?;
        let len = checked_len(&shape)?;
        expect_len("nf4 packed bytes", packed.len(), len.div_ceil(2))?;
        expect_len("nf4 absmax", absmax.len(), len.div_ceil(block_size))?;
        let finite = match &absmax {
            Absmax::Plain(scales) => scales.iter().all(|scale| scale.is_finite()),
            Absmax::Nested { codes, absmax, offset, block_size, map } => {
                if *block_size == 0 {
                    return Err(Error::config("nested_blocksize", block_size, "at least 1"));
                }
                expect_len("nf4 nested_absmax", absmax.len(), codes.len().div_ceil(*block_size))?;
                offset.is_finite() && absmax.iter().chain(map.iter()).all(|scale| scale.is_finite())
            }
        };
        if !finite {
            return Err(Error::data("nf4 absmax", "a scale is NaN or infinite: the checkpoint is damaged"));
        }
        Ok(Self { packed, absmax, shape, dtype, block_size })
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no weights; the constructors never make such a tensor.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the scales are quantized too.
    pub fn double_quant(&self) -> bool {
        matches!(self.absmax, Absmax::Nested { .. })
    }

    /// The scale of a block.
    #[inline]
    pub fn block_scale(&self, block: usize) -> f32 {
        self.absmax.scale(block)
    }

    /// The scales of blocks of `size` weights, from block `first` on; the tensor's own blocks are a multiple of that.
    ///
    /// # Panics
    /// If there are fewer than `out.len()`, or the sizes do not divide.
    pub fn block_scales(&self, kernels: &Kernels, size: usize, first: usize, out: &mut [f32]) {
        if self.block_size == size {
            return self.absmax.read(kernels, first, out);
        }
        assert!(self.block_size.is_multiple_of(size), "nf4: blocks of {} cut into {size}", self.block_size);
        let per_scale = self.block_size / size;
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.absmax.scale((first + i) / per_scale);
        }
    }

    /// The scales of all blocks.
    pub fn scales(&self) -> Vec<f32> {
        (0..self.absmax.len()).map(|block| self.absmax.scale(block)).collect()
    }

    /// Replaces double-quantized scales by their f32 values: the same numbers, 3 bytes more for each block.
    ///
    /// A nested scale costs one look-up and one multiply-add for 64 weights, so this rarely pays.
    pub fn denest(&mut self) {
        if self.double_quant() {
            self.absmax = Absmax::Plain(self.scales());
        }
    }

    /// Writes the weights `start..start + out.len()` of the flat tensor, rounded to [`Nf4Tensor::dtype`], into `out`.
    ///
    /// `start` may lie anywhere, also inside a block and inside a byte; nothing is allocated.
    ///
    /// # Panics
    /// If the range leaves the tensor.
    pub fn dequantize_range(&self, start: usize, out: &mut [f32]) {
        let mut start = start;
        let mut out = out;
        while !out.is_empty() {
            let block = start / self.block_size;
            let run = (self.block_size - start % self.block_size).min(out.len());
            let (now, rest) = out.split_at_mut(run);
            let table = scaled_code_book(self.absmax.scale(block), self.dtype);
            dequantize_run(&self.packed, start, &table, now);
            start += run;
            out = rest;
        }
    }

    /// All weights, rounded to [`Nf4Tensor::dtype`].
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.len()];
        let task = 256 * self.block_size;
        out.par_chunks_mut(task).enumerate().for_each(|(i, out)| self.dequantize_range(i * task, out));
        out
    }

    /// Bytes of the packed weights and their scales.
    pub fn nbytes(&self) -> usize {
        self.packed.len()
            + match &self.absmax {
                Absmax::Plain(scales) => size_of_val(scales.as_slice()),
                Absmax::Nested { codes, absmax, .. } => {
                    codes.len() + size_of_val(absmax.as_slice()) + size_of::<[f32; MAP_LEN]>() + size_of::<f32>()
                }
            }
    }
}

/// The code book times a block's scale, rounded to `dtype`: what each index of that block stands for.
#[inline]
pub fn scaled_code_book(scale: f32, dtype: FloatKind) -> [f32; 16] {
    match dtype {
        FloatKind::F32 => CODE_BOOK.map(|code| code * scale),
        FloatKind::F16 | FloatKind::Bf16 => CODE_BOOK.map(|code| dtype.round(code * scale)),
    }
}

/// `out[i] = table[index of weight start + i]`; the weights must lie in one block, `table` is its scaled code book.
#[inline]
pub fn dequantize_run(packed: &[u8], start: usize, table: &[f32; 16], out: &mut [f32]) {
    // A range that starts in the low nibble takes that one weight first.
    let odd = (start % 2).min(out.len());
    let (first, out) = out.split_at_mut(odd);
    if let [first] = first {
        *first = table[usize::from(packed[start / 2] & 0xf)];
    }
    let start = start + odd;
    let bytes = &packed[start / 2..start / 2 + out.len().div_ceil(2)];
    let mut pairs = out.chunks_exact_mut(2);
    for (pair, &byte) in pairs.by_ref().zip(bytes) {
        pair[0] = table[usize::from(byte >> 4)];
        pair[1] = table[usize::from(byte & 0xf)];
    }
    if let ([last], Some(&byte)) = (pairs.into_remainder(), bytes.last()) {
        *last = table[usize::from(byte >> 4)];
    }
}

/// Quantizes the values that do not fill the last block; returns their absmax, which is NaN or infinite if a value is.
fn quantize_rest(kernels: &Kernels, values: &[f32], bytes: &mut [u8]) -> f32 {
    let mut whole = vec![0.0; values.len().next_multiple_of(CHUNK)];
    whole[..values.len()].copy_from_slice(values);
    let mut codes = vec![0; whole.len() / 2];
    // Zeros behind the values change neither the absmax nor, being code 7 themselves, what the last byte must be.
    let absmax = (kernels.nf4_quantize)(&whole, &THRESHOLDS, &mut codes);
    bytes.copy_from_slice(&codes[..bytes.len()]);
    absmax
}

/// Double quantization of the scales: minus their mean, in groups of 256, to the nearest entry of the signed map.
fn nest(scales: &[f32]) -> Absmax {
    let map = DynamicMap::signed();
    // PyTorch's f32 mean depends on its vector width; summed in f64, ours is the mean rounded once.
    let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
    let offset = (sum / scales.len() as f64) as f32;
    let mut codes = vec![0u8; scales.len()];
    let mut absmax = Vec::new();
    let groups = codes.par_chunks_mut(NESTED_BLOCK_SIZE).zip(scales.par_chunks(NESTED_BLOCK_SIZE));
    let groups = groups.with_min_len(16).map(|(codes, scales)| {
        let largest = scales.iter().map(|scale| (scale - offset).abs()).fold(0f32, f32::max);
        // A group of equal scales keeps code 0, as in bitsandbytes; times 0 it stands for the mean.
        if largest > 0.0 {
            let inverse = 1.0 / largest.max(MIN_ABSMAX);
            for (code, scale) in codes.iter_mut().zip(scales) {
                *code = map.encode((scale - offset) * inverse);
            }
        }
        largest
    });
    groups.collect_into_vec(&mut absmax);
    Absmax::Nested { codes, absmax, offset, block_size: NESTED_BLOCK_SIZE, map: Box::new(*map.values()) }
}

fn check_block_size(block_size: usize) -> Result<()> {
    if block_size.is_power_of_two() && BLOCK_SIZES.contains(&block_size) {
        return Ok(());
    }
    Err(Error::config("block_size", block_size, "a power of two from 32 to 4096"))
}

fn shape_len(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |len, &axis| len.checked_mul(axis))
}

/// The number of elements, at least one.
fn checked_len(shape: &[usize]) -> Result<usize> {
    shape_len(shape).filter(|&len| len > 0).ok_or_else(|| Error::Shape {
        op: "nf4 shape",
        expected: "axes of at least 1 whose product fits in memory".to_owned(),
        got: shape.to_vec(),
    })
}

fn expect_len(op: &'static str, got: usize, want: usize) -> Result<()> {
    if got == want {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{want}, which follows from the shape and block size"), got: vec![got] })
}

/// The error about the first of `values` that is not finite, with its position along the axes of `shape`; `start`: the
/// position of the first value in the flat tensor.
fn non_finite(values: &[f32], start: usize, shape: &[usize]) -> Error {
    let at = values.iter().position(|v| !v.is_finite()).unwrap_or(0);
    let flat = start + at;
    let mut rest = flat;
    let mut position: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&axis| {
            let here = rest % axis;
            rest /= axis;
            here
        })
        .collect();
    position.reverse();
    Error::data("nf4.quantize", format!("element {position:?} is {}: only finite weights can be quantized", values[at]))
}

/// The scales as a bitsandbytes checkpoint stores them.
#[derive(Debug, Clone, PartialEq)]
pub enum BnbAbsmax {
    /// `absmax` of dtype F32.
    F32(Vec<f32>),
    /// `absmax` of dtype U8: the codes of double quantization.
    U8(Vec<u8>),
}

/// A quantized tensor as a bitsandbytes checkpoint stores it under `P.weight` and the keys behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct BnbParts {
    /// `P.weight`, U8 of shape `[ceil(len / 2), 1]`.
    pub packed: Vec<u8>,
    /// `P.weight.absmax`.
    pub absmax: BnbAbsmax,
    /// `P.weight.quant_map`, F32 of 16; the code book.
    pub quant_map: Vec<f32>,
    /// `P.weight.nested_absmax`, F32; only under double quantization.
    pub nested_absmax: Option<Vec<f32>>,
    /// `P.weight.nested_quant_map`, F32 of 256; only under double quantization.
    pub nested_quant_map: Option<Vec<f32>>,
    /// `P.weight.quant_state.bitsandbytes__nf4`, U8: the JSON text of the remaining settings.
    pub quant_state: Vec<u8>,
}

impl BnbParts {
    /// Ends of the keys behind `P.weight`, in the order of the fields above.
    pub const ABSMAX: &str = ".absmax";
    /// See [`BnbParts::quant_map`].
    pub const QUANT_MAP: &str = ".quant_map";
    /// See [`BnbParts::nested_absmax`].
    pub const NESTED_ABSMAX: &str = ".nested_absmax";
    /// See [`BnbParts::nested_quant_map`].
    pub const NESTED_QUANT_MAP: &str = ".nested_quant_map";
    /// See [`BnbParts::quant_state`].
    pub const QUANT_STATE: &str = ".quant_state.bitsandbytes__nf4";
}

/// The JSON of `quant_state.bitsandbytes__nf4`.
#[derive(Debug, Serialize, Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f64>,
}

impl Nf4Tensor {
    /// Reads a tensor from the parts of a bitsandbytes checkpoint.
    ///
    /// # Errors
    /// [`Error::Data`] if the JSON does not parse or names another quantization, another code book or dtype, or if a part
    /// of double quantization is missing; the errors of [`Nf4Tensor::from_parts`].
    pub fn from_bnb_parts(parts: BnbParts) -> Result<Self> {
        const STATE: &str = "quant_state.bitsandbytes__nf4";
        let state: QuantState = serde_json::from_slice(&parts.quant_state)
            .map_err(|e| Error::data(STATE, format!("not the JSON that bitsandbytes writes: {e}")))?;
        if state.quant_type != "nf4" {
            return Err(Error::data(STATE, format!("quant_type is {:?}: only nf4 can be read", state.quant_type)));
        }
        let dtype = FloatKind::from_name(&state.dtype).ok_or_else(|| {
            Error::data(STATE, format!("dtype is {:?}: expected float32, float16 or bfloat16", state.dtype))
        })?;
        // Written by every version as f32; compared loosely because some old files rounded it.
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6;
        if parts.quant_map.len() != CODE_BOOK.len() || !parts.quant_map.iter().zip(&CODE_BOOK).all(same) {
            return Err(Error::data("quant_map", "not the 16 values of NF4: the file uses a code book we do not know"));
        }
        let absmax = match parts.absmax {
            BnbAbsmax::F32(scales) => Absmax::Plain(scales),
            BnbAbsmax::U8(codes) => {
                let missing = |what: &str| Error::data(what, "missing, though absmax is quantized (U8)");
                if let Some(name) = state.nested_dtype.as_deref().filter(|&name| name != "float32") {
                    return Err(Error::data(STATE, format!("nested_dtype is {name:?}: expected float32")));
                }
                let map = parts.nested_quant_map.ok_or_else(|| missing("nested_quant_map"))?;
                let map: Box<[f32; MAP_LEN]> = map.into_boxed_slice().try_into().map_err(|map: Box<[f32]>| {
                    Error::Shape { op: "nested_quant_map", expected: MAP_LEN.to_string(), got: vec![map.len()] }
                })?;
                Absmax::Nested {
                    codes,
                    absmax: parts.nested_absmax.ok_or_else(|| missing("nested_absmax"))?,
                    offset: state.nested_offset.ok_or_else(|| missing("nested_offset in quant_state"))? as f32,
                    block_size: state.nested_blocksize.ok_or_else(|| missing("nested_blocksize in quant_state"))?,
                    map,
                }
            }
        };
        Self::from_parts(parts.packed, absmax, state.shape, dtype, state.blocksize)
    }

    /// The parts a bitsandbytes checkpoint stores; [`Nf4Tensor::from_bnb_parts`] gives the same tensor back.
    pub fn to_bnb_parts(&self) -> BnbParts {
        let mut state = QuantState {
            quant_type: "nf4".to_owned(),
            blocksize: self.block_size,
            dtype: self.dtype.name().to_owned(),
            shape: self.shape.clone(),
            nested_blocksize: None,
            nested_dtype: None,
            nested_offset: None,
        };
        let (absmax, nested_absmax, nested_quant_map) = match &self.absmax {
            Absmax::Plain(scales) => (BnbAbsmax::F32(scales.clone()), None, None),
            Absmax::Nested { codes, absmax, offset, block_size, map } => {
                state.nested_blocksize = Some(*block_size);
                state.nested_dtype = Some("float32".to_owned());
                state.nested_offset = Some(f64::from(*offset));
                (BnbAbsmax::U8(codes.clone()), Some(absmax.clone()), Some(map.to_vec()))
            }
        };
        BnbParts {
            packed: self.packed.clone(),
            absmax,
            quant_map: CODE_BOOK.to_vec(),
            nested_absmax,
            nested_quant_map,
            quant_state: serde_json::to_vec(&state).expect("strings and finite numbers always serialise"),
        }
    }
}

#[cfg(test)]
#[path = "nf4_tests.rs"]
pub(crate) mod tests;
