//! Rows in 8 bits for decoding: 64 neighbours share a scale, the largest magnitude among them over 127.

use crate::error::{Error, Result};
use crate::io::os;
use crate::kernels::gemv::BLOCK;
use rayon::prelude::*;

/// The largest code.
const LARGEST: f32 = 127.0;
/// 1.5 · 2²³: added to a small number and taken away again, it leaves the nearest whole number, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// A matrix `[rows, cols]` in 8 bits: `weight[j, p] = scales[j, p / 64] · codes[j, p]`.
pub struct Int8Matrix {
    /// `[rows, cols]`, from -127 to 127.
    pub codes: Vec<i8>,
    /// `[rows, cols / 64]`.
    pub scales: Vec<f32>,
    /// Columns, a multiple of 64.
    pub cols: usize,
}

impl Int8Matrix {
    /// Quantizes row by row to the nearest code; `read(row, out)` gives a row and is called from all threads.
    ///
    /// # Errors
    /// [`Error::Shape`] if rows are not whole blocks of 64.
    pub fn quantize(rows: usize, cols: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Result<Self> {
        if cols == 0 || !cols.is_multiple_of(BLOCK) {
            let expected = "rows of a multiple of 64 weights".to_owned();
            return Err(Error::Shape { op: "int8", expected, got: vec![rows, cols] });
        }
        let (mut codes, mut scales) = (os::zeros::<i8>(rows * cols), os::zeros::<f32>(rows * cols / BLOCK));
        let tasks = codes.par_chunks_mut(cols).zip(scales.par_chunks_mut(cols / BLOCK));
        tasks.enumerate().for_each_init(
            || vec![0.0; cols],
            |values, (row, (codes, scales))| {
                read(row, values);
                let blocks = codes.as_chunks_mut::<BLOCK>().0.iter_mut().zip(values.as_chunks::<BLOCK>().0);
                for ((codes, values), scale) in blocks.zip(scales) {
                    let largest = values.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
                    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
                    *scale = largest / LARGEST;
                    for (code, value) in codes.iter_mut().zip(values) {
                        *code = ((value * inverse + ROUNDER) - ROUNDER) as i8;
                    }
                }
            },
        );
        Ok(Self { codes, scales, cols })
    }

    /// Bytes of codes and scales.
    pub fn nbytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.scales[..])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn every_weight_comes_back_within_half_a_step() {
        let value = |row: usize, p: usize| ((row * 131 + p * 37) % 201) as f32 / 100.0 - 1.0;
        let read = |row: usize, out: &mut [f32]| {
            for (p, out) in out.iter_mut().enumerate() {
                *out = if row == 2 { 0.0 } else { value(row, p) };
            }
        };
        let matrix = Int8Matrix::quantize(3, 128, read).unwrap();
        assert_eq!(matrix.nbytes(), 3 * 128 + 3 * 2 * 4);
        for (row, p) in (0..2).flat_map(|row| (0..128).map(move |p| (row, p))) {
            let scale = matrix.scales[row * 2 + p / 64];
            let got = f32::from(matrix.codes[row * 128 + p]) * scale;
            assert!((got - value(row, p)).abs() <= 0.5001 * scale, "[{row}, {p}]: {got}");
        }
        assert!(matrix.codes[256..].iter().all(|&code| code == 0) && matrix.scales[4..] == [0.0; 2]);
        assert!(Int8Matrix::quantize(1, 100, read).is_err());
    }
}
