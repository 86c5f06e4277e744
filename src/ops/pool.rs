//! Buffers that are reused between ops, layers and steps, so that the loop does not fault in fresh pages.
//!
//! Free buffers never hold much more than what was in use at once already: batches of changing sizes do not add up.

use crate::io::os::prefer_large_pages;
use crate::kernels::lines::Lines;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Floats that free and used buffers may hold together beyond the most that was in use at once: a quarter of that and not more
/// than this. Buffers of a size that comes once a layer would otherwise make way for another size, and each new one is
/// zeroed by the system, page by page.
const SLACK: usize = 32 << 20;

/// Buffers that wait for their next use.
#[derive(Default)]
pub struct Pool {
    state: Mutex<State>,
}

/// Sizes are in floats.
#[derive(Default)]
struct State {
    /// Free buffers, the longest unused first.
    free: Vec<Lines>,
    free_len: usize,
    used_len: usize,
    /// The most that was in use at once.
    peak_len: usize,
}

impl State {
    /// The smallest free buffer that is large enough; one more than twice as large waits for a request of its own size.
    fn reuse(&mut self, len: usize) -> Option<Lines> {
        let fits = |data: &Lines| (len..=2 * len + 1024).contains(&data.capacity());
        let (best, _) =
            self.free.iter().enumerate().filter(|(_, data)| fits(data)).min_by_key(|(_, d)| d.capacity())?;
        let data = self.free.remove(best);
        self.free_len -= data.capacity();
        Some(data)
    }

    /// Counts a buffer as used, and gives free ones back to the system that peak and slack have no room for.
    fn take(&mut self, capacity: usize) {
        self.used_len += capacity;
        self.peak_len = self.peak_len.max(self.used_len);
        let most = self.peak_len + (self.peak_len / 4).min(SLACK);
        while self.used_len + self.free_len > most && !self.free.is_empty() {
            self.free_len -= self.free.remove(0).capacity();
        }
    }
}

impl Pool {
    /// A buffer of `len` floats with unspecified content, on a cache line.
    pub fn take(self: &Arc<Self>, len: usize) -> Buf {
        let mut state = self.state();
        let reused = state.reuse(len);
        state.take(reused.as_ref().map_or(len.next_multiple_of(16), Lines::capacity));
        drop(state);
        let mut data = reused.unwrap_or_else(|| {
            let data = Lines::with_capacity(len);
            prefer_large_pages(data.memory());
            data
        });
        data.set_len(len);
        Buf { data, pool: Some(self.clone()) }
    }

    /// The most bytes that were in use at once.
    pub fn peak_bytes(&self) -> usize {
        4 * self.state().peak_len
    }

    /// Returns all free memory to the operating system, and forgets the peak.
    pub fn clear(&self) {
        let mut state = self.state();
        *state = State { used_len: state.used_len, peak_len: state.used_len, ..State::default() };
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A `[len]` buffer of f32, on a cache line, that goes back to its pool when dropped.
#[derive(Default)]
pub struct Buf {
    data: Lines,
    pool: Option<Arc<Pool>>,
}

impl Deref for Buf {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        self.data.as_slice()
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.data.as_mut_slice()
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let Some(pool) = self.pool.take() else { return };
        let data = std::mem::take(&mut self.data);
        let mut state = pool.state();
        state.used_len -= data.capacity();
        state.free_len += data.capacity();
        state.free.push(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_reused_and_hardly_exceed_the_peak_of_what_was_in_use() {
        let pool = Arc::new(Pool::default());
        let (a, b) = (pool.take(10_000), pool.take(6_000));
        let at = a.as_ptr();
        drop(a);
        let again = pool.take(9_000);
        assert_eq!((again.as_ptr(), again.len()), (at, 9_000), "a free buffer of about the size is taken again");
        drop((again, b));
        assert_eq!(pool.peak_bytes(), 4 * 16_000);
        // Sizes no free buffer serves: the free ones make room instead of adding up.
        for len in [100, 16_000, 200, 15_999, 40] {
            drop(pool.take(len));
            let state = pool.state();
            assert!(state.used_len + state.free_len <= state.peak_len * 5 / 4, "after {len}");
        }
        pool.clear();
        assert_eq!((pool.peak_bytes(), pool.state().free.len()), (0, 0));
    }
}
