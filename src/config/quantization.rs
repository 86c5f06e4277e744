//! How weights are held in memory.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Arguments of `from_pretrained` and of `BitsAndBytesConfig`, as written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizationOptions {
    /// Quantize linear layers to 4 bits on load; default true, unless another storage is asked for.
    pub load_in_4bit: Option<bool>,
    /// Quantize linear layers to 8 bits on load.
    pub load_in_8bit: Option<bool>,
    /// Keep weights in 16 bits; the opposite of `load_in_4bit`.
    pub load_in_16bit: Option<bool>,
    /// Train every weight; needs them unquantized.
    pub full_finetuning: Option<bool>,
    /// Only `nf4`.
    pub bnb_4bit_quant_type: Option<String>,
    /// Store the block scales in 8 bits too; default true.
    pub bnb_4bit_use_double_quant: Option<bool>,
    /// Weights that share a scale; default 64.
    pub block_size: Option<i64>,
}

/// How the linear layers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Quantization {
    /// As the checkpoint has them.
    None,
    /// In 8 bits, a scale a row.
    Int8,
    /// In 4 bits.
    Nf4 {
        /// Weights that share a scale.
        block_size: usize,
        /// Whether the scales are stored in 8 bits.
        double_quant: bool,
    },
}

impl QuantizationOptions {
    /// Checks what was written and fills in the rest.
    ///
    /// # Errors
    /// [`Error::Config`] naming a setting that contradicts another, is out of range, or is not there yet.
    pub fn resolve(&self) -> Result<Quantization> {
        let full = self.full_finetuning == Some(true);
        let (four, eight) = (self.load_in_4bit == Some(true), self.load_in_8bit == Some(true));
        let wide = self.load_in_16bit == Some(true) || full;
        if wide && (four || eight) {
            let field = if four { "load_in_4bit" } else { "load_in_8bit" };
            let why = if full { "full_finetuning=True trains unquantized weights" } else { "load_in_16bit=True" };
            return Err(Error::config(field, true, format!("contradicts {why}: choose one")));
        }
        if four && eight {
            return Err(Error::config("load_in_8bit", true, "contradicts load_in_4bit=True: choose one"));
        }
        if eight {
            return Ok(Quantization::Int8);
        }
        if wide || self.load_in_4bit == Some(false) {
            return Ok(Quantization::None);
        }
        let kind = self.bnb_4bit_quant_type.as_deref().unwrap_or("nf4");
        if kind != "nf4" {
            return Err(Error::config("bnb_4bit_quant_type", kind, "expected nf4, the only 4-bit type there is"));
        }
        let written = self.block_size.unwrap_or(64);
        let block_size = usize::try_from(written)
            .ok()
            .filter(|n| n.is_power_of_two() && (32..=4096).contains(n))
            .ok_or_else(|| Error::config("block_size", written, "expected a power of two from 32 to 4096"))?;
        Ok(Quantization::Nf4 { block_size, double_quant: self.bnb_4bit_use_double_quant.unwrap_or(true) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn four_bits_unless_said_otherwise() {
        let four = Quantization::Nf4 { block_size: 64, double_quant: true };
        assert_eq!(QuantizationOptions::default().resolve().unwrap(), four);
        for options in [
            QuantizationOptions { load_in_4bit: Some(false), ..Default::default() },
            QuantizationOptions { load_in_16bit: Some(true), ..Default::default() },
            QuantizationOptions { full_finetuning: Some(true), ..Default::default() },
        ] {
            assert_eq!(options.resolve().unwrap(), Quantization::None, "{options:?}");
        }
    }

    #[test]
    fn eight_bits_where_asked_for() {
        for load_in_4bit in [None, Some(false)] {
            let options = QuantizationOptions { load_in_8bit: Some(true), load_in_4bit, ..Default::default() };
            assert_eq!(options.resolve().unwrap(), Quantization::Int8);
        }
    }

    #[test]
    fn contradictions_and_unknowns_are_named() {
        let message = |options: QuantizationOptions| options.resolve().unwrap_err().to_string();
        let both = QuantizationOptions { load_in_4bit: Some(true), full_finetuning: Some(true), ..Default::default() };
        assert!(message(both).contains("full_finetuning"));
        let eight = QuantizationOptions { load_in_8bit: Some(true), ..Default::default() };
        let with_four = QuantizationOptions { load_in_4bit: Some(true), ..eight.clone() };
        assert!(message(with_four).contains("load_in_8bit = true: contradicts load_in_4bit"));
        let with_full = QuantizationOptions { full_finetuning: Some(true), ..eight.clone() };
        assert!(message(with_full).contains("load_in_8bit = true: contradicts full_finetuning"));
        let with_16 = QuantizationOptions { load_in_16bit: Some(true), ..eight };
        assert!(message(with_16).contains("load_in_8bit = true: contradicts load_in_16bit"));
        let fp4 = QuantizationOptions { bnb_4bit_quant_type: Some("fp4".into()), ..Default::default() };
        assert!(message(fp4).contains("nf4"));
        let odd = QuantizationOptions { block_size: Some(65), ..Default::default() };
        assert!(message(odd).contains("block_size = 65"));
    }
}
