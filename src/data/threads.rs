//! Spreading text work over all threads.

use crate::error::Result;
use crate::io::os;
use rayon::prelude::*;

/// `items.map(work)` in order, on the threads of this process's own pool (one thread in a forked child).
///
/// # Errors
/// Those of [`os::pool`].
pub fn map<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync + Send) -> Result<Vec<R>> {
    if items.len() < 2 {
        return Ok(items.iter().map(work).collect());
    }
    // Rows differ in length by orders of magnitude: small pieces keep all threads busy.
    os::with_pool(|| Ok(items.par_iter().with_max_len(16).map(work).collect()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    #[test]
    fn keeps_the_order() {
        let items: Vec<usize> = (0..1000).collect();
        let doubled = super::map(&items, |x| x * 2).unwrap();
        assert!(doubled.iter().enumerate().all(|(i, &x)| x == 2 * i));
    }
}
