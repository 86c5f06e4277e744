//! NF4: code book, blocks, double quantization, packed tensors.
