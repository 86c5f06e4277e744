//! Decoders, one readable file per family.
