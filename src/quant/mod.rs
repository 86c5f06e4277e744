//! NF4: code book, blocks, double quantization, packed tensors.

pub mod dynamic_map;
pub mod nf4;

pub use dynamic_map::DynamicMap;
pub use nf4::{Absmax, BnbAbsmax, BnbParts, FloatKind, Nf4Tensor, Weight};
