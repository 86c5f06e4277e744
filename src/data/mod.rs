//! Chat templates, masking, collation and the order of batches.

pub mod order;
