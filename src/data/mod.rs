//! Chat templates, masking, collation and the order of batches.
