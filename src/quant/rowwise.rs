//! Rows in 8 bits with one scale each, as bitsandbytes' LLM.int8() stores the weights of linear layers.
//!
//! Dettmers et al. 2022, "LLM.int8()", section 2: `code = round(127 w / absmax)`, `w ≈ code · absmax / 127`, with absmax the
//! largest magnitude of the row. To the bit of bitsandbytes 0.50 on the CPU (`Int8Params`, `int8_vectorwise_quant`): w is
//! rounded to half precision first, the factor is `(1 / absmax) · 127`, ties go to even. Their 8-bit activations and
//! 16-bit outlier columns are not part of the storage, and not done here: products see the dequantized weights.

use super::nf4::READ_WEIGHTS;
use crate::error::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// The largest code.
const LARGEST: f32 = 127.0;
/// 1.5 · 2²³: added to a small number it leaves, in the lowest byte, the nearest whole number, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// A matrix `[rows, cols]` in 8 bits: `weight[j, p] = codes[j, p] · absmax[j] / 127`.
pub struct RowwiseInt8 {
    /// `[rows, cols]`, from -127 to 127.
    pub codes: Vec<i8>,
    /// `[rows]`; bitsandbytes calls it SCB.
    pub absmax: Vec<f32>,
    /// Columns, at least 1.
    pub cols: usize,
}

/// What a task reads and rounds.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    halves: Vec<f16>,
}

impl RowwiseInt8 {
    /// Quantizes a matrix that need not be in memory: `read(start, out)` gives the elements `start .. start + out.len()` of
    /// the row-major matrix, and is called from all threads, for some whole rows at a time.
    ///
    /// # Errors
    /// [`Error::Shape`] for a matrix without elements, [`Error::Data`] naming the first element that half precision cannot
    /// hold, and the error of `read` for the earliest elements.
    pub fn quantize_from(
        rows: usize,
        cols: usize,
        read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<Self> {
        let Some(len) = rows.checked_mul(cols).filter(|&len| len > 0) else {
            let expected = "at least one row and one column, and a size that fits in memory".to_owned();
            return Err(Error::Shape { op: "int8", expected, got: vec![rows, cols] });
        };
        let (mut codes, mut absmax) = (vec![0_i8; len], vec![0_f32; rows]);
        let step = (READ_WEIGHTS / cols).max(1);
        let tasks = codes.par_chunks_mut(step * cols).zip(absmax.par_chunks_mut(step)).enumerate();
        let errors = tasks.map_init(Scratch::default, |scratch, (task, (codes, absmax))| {
            let Scratch { values, halves } = scratch;
            values.resize(codes.len(), 0.0);
            halves.resize(codes.len(), f16::ZERO);
            read(task * step * cols, values).err().or_else(|| {
                halves.convert_from_f32_slice(values);
                halves.convert_to_f32_slice(values);
                let matrix = values.chunks_exact(cols).zip(codes.chunks_exact_mut(cols));
                for ((values, codes), absmax) in matrix.zip(absmax.iter_mut()) {
                    *absmax = quantize_row(values, codes);
                }
                let bad = values.iter().position(|value| !value.is_finite())?;
                let (row, col) = (task * step + bad / cols, bad % cols);
                Some(Error::data("int8", format!("element [{row}, {col}] is not finite in half precision")))
            })
        });
        match errors.find_map_first(|error| error) {
            Some(error) => Err(error),
            None => Ok(Self { codes, absmax, cols }),
        }
    }

    /// A matrix from parts that were stored, checked against each other.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one absmax for each row, [`Error::Data`] if one is NaN, infinite or negative.
    pub fn from_parts(codes: Vec<i8>, absmax: Vec<f32>, cols: usize) -> Result<Self> {
        if cols == 0 || codes.is_empty() || codes.len() != absmax.len() * cols {
            let expected = format!("as many absmax (SCB) as there are rows of {cols} codes");
            return Err(Error::Shape { op: "int8", expected, got: vec![codes.len(), absmax.len()] });
        }
        if let Some(row) = absmax.iter().position(|scale| !scale.is_finite() || *scale < 0.0) {
            let problem = format!("the absmax of row {row} is {}: the checkpoint is damaged", absmax[row]);
            return Err(Error::data("int8 absmax", problem));
        }
        Ok(Self { codes, absmax, cols })
    }

    /// Calls `dequantize(codes, absmax, out)` for each row's part of the elements `start .. start + out.len()`.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    #[inline]
    pub fn each_row<T>(&self, start: usize, out: &mut [T], dequantize: impl Fn(&[i8], f32, &mut [T])) {
        let (mut at, mut out) = (start, out);
        while !out.is_empty() {
            let (row, inside) = (at / self.cols, at % self.cols);
            let (now, rest) = out.split_at_mut((self.cols - inside).min(out.len()));
            dequantize(&self.codes[at..at + now.len()], self.absmax[row], now);
            at += now.len();
            out = rest;
        }
    }

    /// Bytes of codes and scales.
    pub fn nbytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.absmax[..])
    }
}

/// One row of numbers that half precision holds; returns its absmax. A row of zeros has codes of 0.
fn quantize_row(values: &[f32], codes: &mut [i8]) -> f32 {
    let absmax = values.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
    let factor = if absmax > 0.0 { 1.0 / absmax * LARGEST } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (value * factor + ROUNDER).to_bits() as i8;
    }
    absmax
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn quantize(values: &[f32], cols: usize) -> Result<RowwiseInt8> {
        RowwiseInt8::quantize_from(values.len() / cols, cols, |start, out| {
            out.copy_from_slice(&values[start..start + out.len()]);
            Ok(())
        })
    }

    #[test]
    fn codes_are_the_nearest_and_ties_go_to_even() {
        // absmax 127 makes the factor almost 1 and a step 1, so values at .5 are ties.
        let matrix = quantize(&[127.0, 0.5, 1.5, -2.5, 0.0, -127.0, 63.25, -1.0], 8).unwrap();
        assert_eq!(matrix.codes, [127, 0, 2, -2, 0, -127, 63, -1]);
        assert_eq!(matrix.absmax, [127.0]);
        // Rounded to half precision first: 1 + 2^-12 is 1 there.
        assert_eq!(quantize(&[1.0 + 1.0 / 4096.0, 0.0], 2).unwrap().absmax, [1.0]);
    }

    #[test]
    fn every_weight_comes_back_within_half_a_step_wherever_reading_starts() {
        let (rows, cols) = (3, 100);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37) % 201) as f32 / 128.0 - 0.75).collect();
        let matrix = quantize(&values, cols).unwrap();
        assert_eq!(matrix.nbytes(), rows * cols + 4 * rows);
        for (start, len) in [(0, 300), (1, 98), (99, 2), (150, 150), (299, 1), (300, 0)] {
            let mut out = vec![f32::NAN; len];
            matrix.each_row(start, &mut out, |codes, absmax, out| {
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = f32::from(*code) * absmax / 127.0;
                }
            });
            for (got, want) in out.iter().zip(&values[start..]) {
                assert!((got - want).abs() <= 0.501 * 0.82 / 127.0, "{got} against {want}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_half_precision_cannot_hold_is_named() {
        let matrix = quantize(&[0.0, -0.0, 1e-9, 0.0], 4).unwrap();
        assert_eq!((&matrix.codes[..], &matrix.absmax[..]), (&[0_i8; 4][..], &[0.0][..]));
        for bad in [f32::NAN, f32::INFINITY, 1e6] {
            let error = quantize(&[1.0, 1.0, 1.0, bad, 1.0, 1.0], 2).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("[1, 1]"), "{error}");
        }
        assert!(quantize(&[], 1).is_err());
        let failing = RowwiseInt8::quantize_from(2, 2, |start, _| Err(Error::data("read", start.to_string())));
        assert!(failing.map(|_| ()).unwrap_err().to_string().contains('0'));
    }

    #[test]
    fn stored_parts_are_checked() {
        assert!(RowwiseInt8::from_parts(vec![1; 6], vec![1.0; 2], 3).is_ok());
        for (codes, scales, cols) in [(6, 3, 3), (6, 2, 2), (0, 0, 3), (6, 6, 0)] {
            assert!(RowwiseInt8::from_parts(vec![1; codes], vec![1.0; scales], cols).is_err());
        }
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let error = RowwiseInt8::from_parts(vec![1; 6], vec![1.0, bad], 3).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("row 1"), "{error}");
        }
    }
}
