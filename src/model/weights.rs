//! From a folder's tensors to a decoder: one tensor at a time, quantizing on the way where asked.

use super::config::ModelConfig;
use super::llama::{LINEAR_NAMES, Layer, Llama};
use crate::error::{Error, Result};
use crate::io::safetensors::{Dtype, ModelFiles};
use crate::ops::attention::Heads;
use crate::ops::linear::{Bias, Linear, Matrix};
use crate::ops::rms_norm::{Gain, RmsNorm};
use crate::ops::rope::Rope;
use crate::ops::{ParamStore, Precision, Weight};
use crate::quant::{BnbAbsmax, BnbParts, FloatKind, Nf4Tensor, RowwiseInt8};
use half::{bf16, f16};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// How the linear layers of a 16- or 32-bit checkpoint are quantized while they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// To NF4.
    Nf4 {
        /// Weights that share a scale.
        block_size: usize,
        /// Whether the scales are quantized too.
        double_quant: bool,
    },
    /// To 8 bits, a scale a row.
    Int8,
}

/// How a checkpoint becomes a model.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// What GEMM operands are rounded to.
    pub precision: Precision,
    /// Quantization of the decoder's linear layers; a checkpoint's own quantization is kept either way.
    pub quantize: Option<Quantize>,
    /// Whether every tensor is trained (in f32, unquantized).
    pub full_finetuning: bool,
}

/// Reads the decoder of `folder`; trained tensors go to `params`. Memory: the result and a few
/// megabytes; all threads read and quantize.
///
/// # Errors
/// [`Error::Weights`] for a missing, surplus, misshapen or non-finite tensor; [`Error::Io`].
pub fn load(folder: &Path, config: &ModelConfig, options: &LoadOptions, params: &mut ParamStore) -> Result<Llama> {
    let files = ModelFiles::open(folder)?;
    let mut loader = Loader { folder, files: &files, options, params, used: BTreeSet::new() };
    let c = config;
    let embed = loader.table("model.embed_tokens.weight", c.vocab_size, c.hidden_size)?;
    let heads = Heads { heads: c.num_heads, kv_heads: c.num_kv_heads, head_dim: c.head_dim };
    let (h, ffn, q, kv) = (c.hidden_size, c.intermediate_size, heads.q_width(), heads.kv_width());
    let mut layers = Vec::with_capacity(c.num_layers);
    for layer_idx in 0..c.num_layers {
        let prefix = format!("model.layers.{layer_idx}");
        let mut linear = |which: usize, outputs: usize, inputs: usize| {
            let bias = if which < 4 { c.attention_bias } else { c.mlp_bias };
            loader.linear(&format!("{prefix}.{}", LINEAR_NAMES[which]), outputs, inputs, bias)
        };
        let (lin_q, lin_k, lin_v, lin_o) = (linear(0, q, h)?, linear(1, kv, h)?, linear(2, kv, h)?, linear(3, h, q)?);
        let (gate, up, down) = (linear(4, ffn, h)?, linear(5, ffn, h)?, linear(6, h, ffn)?);
        let mut norm = |name: &str| loader.norm(&format!("{prefix}.{name}.weight"), h, c.rms_norm_eps);
        let (input_norm, post_norm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
        layers.push(Layer { heads, input_norm, q: lin_q, k: lin_k, v: lin_v, o: lin_o, post_norm, gate, up, down });
    }
    let norm = loader.norm("model.norm.weight", h, c.rms_norm_eps)?;
    let head = if c.tie_word_embeddings {
        loader.used.insert("lm_head.weight".to_owned()); // some files repeat the tied table
        None
    } else {
        Some(loader.table("lm_head.weight", c.vocab_size, h)?)
    };
    loader.refuse_surplus()?;
    let rope = Rope::new(c.head_dim, c.rope_theta, &c.rope_scaling);
    Ok(Llama { hidden_size: h, vocab_size: c.vocab_size, embed, layers, norm, head, rope })
}

const IS_QUANTIZED: &str = "is quantized: full fine-tuning needs a 16- or 32-bit checkpoint";
/// What bitsandbytes calls the absmax of a matrix's rows.
const SCB: &str = "SCB";
/// How the codes are laid out, one byte.
const WEIGHT_FORMAT: &str = "weight_format";

/// The name of a tensor beside the int8 matrix `name`, `P.weight`: `P.suffix`.
fn bnb_int8_key(name: &str, suffix: &str) -> String {
    format!("{}{suffix}", name.strip_suffix("weight").unwrap_or(name))
}

/// A checkpoint's matrices, to be read again as they stand in its files after a model was made of them.
pub struct Originals {
    folder: PathBuf,
    /// Opened when the first is asked for.
    files: Option<ModelFiles>,
}

impl Originals {
    /// Those of a model's folder.
    pub fn of(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), files: None }
    }

    /// The weight of a linear layer in f32, `[rows, cols]`; `None` if the files hold it quantized.
    ///
    /// # Errors
    /// [`Error::Io`] if the files are there no more; [`Error::Weights`] if the tensor is not as it should be.
    pub fn read(&mut self, module: &str, rows: usize, cols: usize) -> Result<Option<Vec<f32>>> {
        if self.is_quantized(module)? {
            return Ok(None);
        }
        let folder = self.folder.clone();
        let options = LoadOptions { precision: Precision::F32, quantize: None, full_finetuning: false };
        let (files, params, used) = (self.files()?, &mut ParamStore::default(), BTreeSet::new());
        let mut loader = Loader { folder: &folder, files, options: &options, params, used };
        loader.dense(&format!("{module}.weight"), &[rows, cols]).map(Some)
    }

    /// Whether the files hold a linear layer quantized.
    ///
    /// # Errors
    /// [`Error::Io`] if the files are there no more.
    pub fn is_quantized(&mut self, module: &str) -> Result<bool> {
        let (name, files) = (format!("{module}.weight"), self.files()?);
        let marks = [format!("{name}{}", BnbParts::QUANT_STATE), bnb_int8_key(&name, SCB)];
        Ok(marks.iter().any(|mark| files.contains(mark)))
    }

    fn files(&mut self) -> Result<&ModelFiles> {
        let files = match self.files.take() {
            Some(files) => files,
            None => ModelFiles::open(&self.folder)?,
        };
        Ok(self.files.insert(files))
    }
}

struct Loader<'a> {
    folder: &'a Path,
    files: &'a ModelFiles,
    options: &'a LoadOptions,
    params: &'a mut ParamStore,
    used: BTreeSet<String>,
}

impl Loader<'_> {
    fn error(&self, tensor: &str, problem: impl Into<String>) -> Error {
        Error::weights(self.folder, tensor, problem)
    }

    /// An embedding table or head: never quantized.
    fn table(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        self.matrix(name, rows, cols, None)
    }

    fn linear(&mut self, module: &str, outputs: usize, inputs: usize, with_bias: bool) -> Result<Linear> {
        let matrix = self.matrix(&format!("{module}.weight"), outputs, inputs, self.options.quantize)?;
        let bias = if with_bias {
            let name = format!("{module}.bias");
            let values = self.dense(&name, &[outputs])?;
            if self.options.full_finetuning {
                Bias::Trained(self.params.add(name, vec![outputs], values, false))
            } else {
                Bias::Frozen(values)
            }
        } else {
            Bias::None
        };
        Ok(Linear { inputs, outputs, matrix, bias, lora: None })
    }

    fn norm(&mut self, name: &str, hidden: usize, eps: f32) -> Result<RmsNorm> {
        let values = self.dense(name, &[hidden])?;
        let gain = if self.options.full_finetuning {
            Gain::Trained(self.params.add(name.to_owned(), vec![hidden], values, false))
        } else {
            Gain::Frozen(values)
        };
        Ok(RmsNorm { gain, eps })
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, quantize: Option<Quantize>) -> Result<Matrix> {
        if self.files.contains(&format!("{name}{}", BnbParts::QUANT_STATE)) {
            if self.options.full_finetuning {
                return Err(self.error(name, IS_QUANTIZED));
            }
            return self.bnb(name, rows, cols).map(Matrix::Frozen);
        }
        if self.files.contains(&bnb_int8_key(name, SCB)) {
            if self.options.full_finetuning {
                return Err(self.error(name, IS_QUANTIZED));
            }
            return self.bnb_int8(name, rows, cols).map(Matrix::Frozen);
        }
        if self.options.full_finetuning {
            let values = self.dense(name, &[rows, cols])?;
            return Ok(Matrix::Trained(self.params.add(name.to_owned(), vec![rows, cols], values, true)));
        }
        let dtype = self.check(name, &[rows, cols])?;
        let bf16_run = self.options.precision == Precision::Bf16;
        if let Some(quantize) = quantize {
            let weight = match quantize {
                Quantize::Nf4 { block_size, double_quant } => {
                    let kind = if bf16_run { FloatKind::Bf16 } else { FloatKind::F32 };
                    let kernels = crate::kernels::active()?;
                    let read = |start: usize, out: &mut [f32]| {
                        self.files.read_f32_slice(name, start, out)?;
                        if bf16_run && dtype != Dtype::BF16 {
                            (kernels.round_bf16)(out);
                        }
                        Ok(())
                    };
                    Nf4Tensor::quantize_from(&[rows, cols], kind, block_size, double_quant, read).and_then(Weight::nf4)
                }
                // Stands for no dtype: the codes are the same whatever the products are rounded to.
                Quantize::Int8 => {
                    let read = |start: usize, out: &mut [f32]| self.files.read_f32_slice(name, start, out);
                    RowwiseInt8::quantize_from(rows, cols, read).map(Weight::int8)
                }
            };
            let weight = weight.map_err(|error| match error {
                // Found by its scale; reading it again finds the element as it stands in the file.
                Error::Data { .. } => self.dense(name, &[rows, cols]).err().unwrap_or(error),
                other => other,
            });
            return weight.map(Matrix::Frozen);
        }
        if dtype == Dtype::BF16 {
            return Ok(Matrix::Frozen(Weight::bf16(self.dense_bf16(name)?, rows, cols)?));
        }
        if bf16_run {
            let values = self.dense(name, &[rows, cols])?;
            return Ok(Matrix::Frozen(Weight::bf16(values.into_iter().map(bf16::from_f32).collect(), rows, cols)?));
        }
        Ok(Matrix::Frozen(Weight::f32(self.dense(name, &[rows, cols])?, rows, cols)?))
    }

    /// The tensor in f32, checked for its shape and for numbers that are none.
    fn dense(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.check(name, shape)?;
        let values = self.files.read_f32(name)?;
        match first_not_finite(&values, |v| v.to_bits(), f32::INFINITY.to_bits()) {
            None => Ok(values),
            Some(i) => Err(self.not_finite(name, i, values[i])),
        }
    }

    /// A checked bf16 tensor as it is stored, never widened: an embedding table is the largest tensor there is.
    fn dense_bf16(&self, name: &str) -> Result<Vec<bf16>> {
        let values = self.files.read_bf16(name)?;
        match first_not_finite(&values, |v| u32::from(v.to_bits()), u32::from(bf16::INFINITY.to_bits())) {
            None => Ok(values),
            Some(i) => Err(self.not_finite(name, i, values[i].to_f32())),
        }
    }

    fn not_finite(&self, tensor: &str, at: usize, value: f32) -> Error {
        self.error(tensor, format!("element {at} is {value}: the checkpoint is damaged; download it again"))
    }

    /// Marks a tensor as used and checks that it is there, has the shape, and is of a float type.
    fn check(&mut self, name: &str, shape: &[usize]) -> Result<Dtype> {
        let dtype = self.check_shape(name, shape)?;
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let problem = format!("has dtype {dtype:?}; expected F32, F16, BF16 or bitsandbytes NF4 or int8");
            return Err(self.error(name, problem));
        }
        Ok(dtype)
    }

    /// Marks a tensor as used and checks that it is there and has the shape.
    fn check_shape(&mut self, name: &str, shape: &[usize]) -> Result<Dtype> {
        if !self.files.contains(name) {
            return Err(self.error(name, "is missing; does config.json belong to these files?"));
        }
        self.used.insert(name.to_owned());
        let info = self.files.info(name)?;
        if info.shape != shape {
            return Err(self.error(name, format!("has shape {:?}, but config.json says {shape:?}", info.shape)));
        }
        Ok(info.dtype)
    }

    /// A matrix that bitsandbytes has quantized to 8 bits: codes in I8, the absmax of each row beside them.
    fn bnb_int8(&mut self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        let (scales, format) = (bnb_int8_key(name, SCB), bnb_int8_key(name, WEIGHT_FORMAT));
        let dtype = self.files.info(name)?.dtype;
        if dtype != Dtype::I8 {
            return Err(self.error(name, format!("has dtype {dtype:?} beside {scales}; expected I8")));
        }
        self.check_shape(name, &[rows, cols])?;
        let absmax = self.dense(&scales, &[rows])?;
        if self.files.contains(&format) {
            let mut bytes = Vec::new();
            self.files.read_bytes(&format, &mut bytes)?;
            // 0: row by row. Older layouts, made for certain GPUs, are no longer written.
            if bytes.iter().any(|&byte| byte != 0) {
                return Err(self.error(&format, "is not 0: save the model anew with a bitsandbytes of 0.45 or later"));
            }
            self.used.insert(format);
        }
        let mut bytes = Vec::new();
        self.files.read_bytes(name, &mut bytes)?;
        let codes = bytes.into_iter().map(u8::cast_signed).collect();
        let matrix = RowwiseInt8::from_parts(codes, absmax, cols).map_err(|e| self.error(name, e.to_string()))?;
        Ok(Weight::int8(matrix))
    }

    /// A tensor that bitsandbytes has quantized to 4 bits.
    fn bnb(&mut self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        let mut raw = |suffix: &str| -> Result<Option<Vec<u8>>> {
            let key = format!("{name}{suffix}");
            if !self.files.contains(&key) {
                return Ok(None);
            }
            let mut bytes = Vec::new();
            self.files.read_bytes(&key, &mut bytes)?;
            self.used.insert(key);
            Ok(Some(bytes))
        };
        let floats =
            |bytes: Vec<u8>| -> Vec<f32> { bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
        let (packed, absmax, map) = (raw("")?, raw(BnbParts::ABSMAX)?, raw(BnbParts::QUANT_MAP)?);
        let (nested_absmax, nested_map) = (raw(BnbParts::NESTED_ABSMAX)?, raw(BnbParts::NESTED_QUANT_MAP)?);
        let state = raw(BnbParts::QUANT_STATE)?;
        let (Some(packed), Some(absmax), Some(map), Some(quant_state)) = (packed, absmax, map, state) else {
            return Err(self.error(name, "lacks its absmax or quant_map; download the checkpoint again"));
        };
        let absmax = match self.files.info(&format!("{name}{}", BnbParts::ABSMAX))?.dtype {
            Dtype::U8 => BnbAbsmax::U8(absmax),
            Dtype::F32 => BnbAbsmax::F32(floats(absmax)),
            other => return Err(self.error(name, format!("has absmax of dtype {other:?}; expected U8 or F32"))),
        };
        let parts = BnbParts {
            packed,
            absmax,
            quant_map: floats(map),
            nested_absmax: nested_absmax.map(floats),
            nested_quant_map: nested_map.map(floats),
            quant_state,
        };
        let tensor = Nf4Tensor::from_bnb_parts(parts).map_err(|e| self.error(name, e.to_string()))?;
        if tensor.shape != [rows, cols] {
            let problem = format!("has shape {:?}, but config.json says [{rows}, {cols}]", tensor.shape);
            return Err(self.error(name, problem));
        }
        if tensor.scales().iter().any(|scale| !scale.is_finite()) {
            return Err(
                self.error(name, "has a scale that is not a number: the checkpoint is damaged; download it again")
            );
        }
        Weight::nf4(tensor)
    }

    /// A tensor we would not use changes the numbers of a model we do not know.
    fn refuse_surplus(&self) -> Result<()> {
        let harmless = |name: &str| name.ends_with("rotary_emb.inv_freq");
        match self.files.names().find(|name| !self.used.contains(*name) && !harmless(name)) {
            None => Ok(()),
            Some(name) => {
                let problem =
                    "is not part of the architecture that config.json names, so it would be left out silently";
                Err(self.error(name, problem))
            }
        }
    }
}

/// The first number whose exponent is that of `infinity`. Looked for by chunks, whose maximum is quick to take.
fn first_not_finite<T: Sync>(values: &[T], bits: impl Fn(&T) -> u32 + Sync, infinity: u32) -> Option<usize> {
    const CHUNK: usize = 64 << 10;
    let exponent = |value: &T| bits(value) & infinity;
    values.par_chunks(CHUNK).enumerate().find_map_first(|(chunk, values)| {
        let largest = values.iter().map(exponent).fold(0, u32::max);
        let at = (largest == infinity).then(|| values.iter().position(|v| exponent(v) == infinity))??;
        Some(chunk * CHUNK + at)
    })
}

/// The bytes of `values` in a 16- or 32-bit dtype.
pub fn to_bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}
