//! One op per file: a forward and a hand-derived backward on buffers the caller owns.
