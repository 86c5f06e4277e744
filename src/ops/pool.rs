//! Buffers that are reused between ops, layers and steps, so that the loop does not fault in fresh pages.

use crate::kernels::lines::Lines;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers that wait for their next use.
#[derive(Default)]
pub struct Pool {
    free: Mutex<Vec<Lines>>,
}

impl Pool {
    /// A buffer of `len` floats with unspecified content, on a cache line: the smallest free one that is large enough, or a new one.
    pub fn take(self: &Arc<Self>, len: usize) -> Buf {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let best = (0..free.len()).filter(|&i| free[i].capacity() >= len).min_by_key(|&i| free[i].capacity());
        // A buffer more than twice as large is kept for a request of its own size.
        let reused = best.filter(|&i| free[i].capacity() <= 2 * len + 1024).map(|i| free.swap_remove(i));
        drop(free);
        let mut data = reused.unwrap_or_else(|| Lines::with_capacity(len));
        data.set_len(len);
        Buf { data, pool: Some(self.clone()) }
    }

    /// Returns all free memory to the operating system.
    pub fn clear(&self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// A `[len]` buffer of f32, on a cache line, that goes back to its pool when dropped.
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
        if let Some(pool) = self.pool.take() {
            pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.data));
        }
    }
}
