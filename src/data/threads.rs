//! Spreading text work over all threads, except in a forked child, where the thread pool would hang.

use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// True in a process that was forked from one that may have started the thread pool.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Makes this process single-threaded for good; Python calls it in every child of `os.fork`.
///
/// The pool's threads exist in the parent only, so work handed to it in the child would wait for ever.
pub fn mark_forked() {
    FORKED.store(true, Ordering::Relaxed);
}

/// Whether [`mark_forked`] was called: whoever uses rayon asks this first.
pub fn is_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// `items.map(work)` in order, on all threads where that is safe.
pub fn map<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
    if is_forked() || items.len() < 2 {
        items.iter().map(work).collect()
    } else {
        // Rows differ in length by orders of magnitude: small pieces keep all threads busy.
        items.par_iter().with_max_len(16).map(work).collect()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn keeps_the_order() {
        let items: Vec<usize> = (0..1000).collect();
        let doubled = super::map(&items, |x| x * 2);
        assert!(doubled.iter().enumerate().all(|(i, &x)| x == 2 * i));
    }
}
