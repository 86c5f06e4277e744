//! Slices in, slices out: the arithmetic, one table per instruction set.
