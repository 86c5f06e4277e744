//! NF4: code book, blocks, double quantization, packed tensors; 8 bits with a scale a row, or a block for decoding.

pub mod dynamic_map;
pub mod int8;
pub mod nf4;
pub mod rowwise;

pub use dynamic_map::DynamicMap;
pub use int8::Int8Matrix;
pub use nf4::{Absmax, BnbAbsmax, BnbParts, FloatKind, Nf4Tensor, Weight};
pub use rowwise::RowwiseInt8;
