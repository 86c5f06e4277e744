//! Memory in whole cache lines: packed panels and activations start on a 64-byte boundary.
//!
//! Wide loads that straddle lines cost twice, and a tile load of AMX from a 16-byte boundary runs at half speed.

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Floats in a cache line.
pub const LINE: usize = 16;

/// Bytes in a cache line.
const BYTES: usize = 4 * LINE;

/// Asks for the cache lines of `data`, to be read soon: nothing is read, and nothing waits.
///
/// Memory fetches ahead by itself only along a page of 4 KiB; pieces of rows that lie further apart than that arrive one by
/// one, at a tenth of a microsecond each, unless they have been asked for.
#[inline]
pub fn prefetch<T>(data: &[T]) {
    let start = data.as_ptr().cast::<i8>();
    let first = start.addr() % BYTES;
    for line in (0..first + size_of_val(data)).step_by(BYTES) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch reads nothing and never faults, wherever it points.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(start.wrapping_sub(first).wrapping_add(line));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// A growable buffer of f32 that starts on a cache line.
#[derive(Default)]
pub struct Lines {
    lines: Vec<Line>,
    len: usize,
}

impl Lines {
    /// An empty buffer with room for `len` floats.
    pub fn with_capacity(len: usize) -> Self {
        Self { lines: Vec::with_capacity(len.div_ceil(LINE)), len: 0 }
    }

    /// The memory it has, in use or not.
    pub fn memory(&self) -> std::ops::Range<*const u8> {
        let start = self.lines.as_ptr().cast::<u8>();
        start..start.wrapping_add(self.lines.capacity() * size_of::<Line>())
    }

    /// Floats it can hold without a new allocation.
    pub fn capacity(&self) -> usize {
        self.lines.capacity() * LINE
    }

    /// Sets the length; what is in the buffer stays as it is, what is new is 0 or what was there before.
    pub fn set_len(&mut self, len: usize) {
        let lines = len.div_ceil(LINE);
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0.0; LINE]));
        }
        self.len = len;
    }

    /// The floats.
    #[inline]
    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: `Line` is `repr(C)` of floats without padding, and `set_len` has filled `len` of them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    /// The floats, to be changed.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// The same memory as 16-bit halves, low half of each word first.
#[inline]
pub fn halves_mut(words: &mut [f32]) -> &mut [u16] {
    // SAFETY: u16 needs less alignment than f32, every bit pattern is valid for both, and the length is that of the words.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 2 * words.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_on_a_line_and_keep_what_they_hold() {
        let mut lines = Lines::with_capacity(5);
        for len in [1, 17, 300, 4] {
            lines.set_len(len);
            assert_eq!(lines.as_slice().as_ptr() as usize % 64, 0);
            assert_eq!(lines.as_slice().len(), len);
            lines.as_mut_slice()[0] += 1.0;
        }
        assert_eq!(lines.as_slice()[0], 4.0);
        assert!(lines.capacity() >= 300);
    }

    #[test]
    fn a_word_is_two_halves_low_half_first() {
        let mut words = [f32::from_bits(0x1234_5678)];
        assert_eq!(halves_mut(&mut words), [0x5678, 0x1234]);
        halves_mut(&mut words)[1] = 0x0001;
        assert_eq!(words[0].to_bits(), 0x0001_5678);
    }
}
