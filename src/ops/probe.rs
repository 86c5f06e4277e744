//! What this machine can do at most: products from the nearest cache on all threads, and reading from memory.

use super::Ctx;
use super::pack::Form;
use crate::io::os;
use crate::kernels::gemm::TileC;
use crate::kernels::lines::Lines;
use crate::kernels::tiles::TileMut;
use rayon::prelude::*;
use std::time::Instant;

/// Words of k in a panel, scales apart: both panels of a tile then fit the first-level cache.
const WORDS: usize = 96;
/// Panels of A in one call, which share the cache with one of B: what a call costs by itself is shared too.
const PANELS: usize = 4;
/// Calls that one thread times at once.
const REPEAT: usize = 5_000;
/// Floats of the buffer that is read, where there is room: 1.5 GB, since some third-level caches hold a quarter of one.
const FLOATS: usize = 384 << 20;

/// The most floating-point operations a second that the product in use reaches when all it needs is at hand.
///
/// The panels of a tile stay in the first-level cache and the sums in registers. The best of five tries.
pub fn peak_flops(ctx: &Ctx) -> f64 {
    let form = Form::of(ctx);
    let (tile, k) = (form.tile, WORDS * form.k_per_word());
    let depth = form.depth(k);
    let (mr, nr) = (tile.mr * PANELS, tile.nr);
    let n_threads = rayon::current_num_threads();
    let flops = 2.0 * (mr * nr * k * REPEAT * n_threads) as f64;
    let try_once = || {
        let started = Instant::now();
        rayon::broadcast(|_| {
            let zeros = |len: usize| {
                let mut lines = Lines::with_capacity(len);
                lines.set_len(len);
                lines
            };
            let (a, b, mut c) = (zeros(depth * mr), zeros(depth * nr), zeros(mr * nr));
            for _ in 0..REPEAT {
                let c = &mut TileMut::whole(c.as_mut_slice(), nr, mr, nr);
                (tile.run)(a.as_slice(), b.as_slice(), TileC { c, i: 0, j: 0, alpha: 1.0, add: false, ahead: &[] });
            }
            std::hint::black_box(c.as_slice());
        });
        flops / started.elapsed().as_secs_f64()
    };
    (0..5).map(|_| try_once()).fold(0.0, f64::max)
}

/// The most bytes a second that all threads read from memory together. The best of five tries.
pub fn read_bandwidth(ctx: &Ctx) -> f64 {
    let room = os::available_memory_bytes().map_or(FLOATS, |bytes| bytes as usize / 4 / size_of::<f32>());
    let len = FLOATS.min(room.max(1 << 20));
    let mut data = os::zeros::<f32>(len);
    data.par_chunks_mut(1 << 20).for_each(|part| part.fill(1.0)); // a page that is never written is not in memory
    let dot = ctx.kernels.dot;
    let try_once = || {
        let started = Instant::now();
        let sum: f32 = data.par_chunks(1 << 16).map(|part| part.split_at(part.len() / 2)).map(|(x, y)| dot(x, y)).sum();
        std::hint::black_box(sum);
        (4 * len) as f64 / started.elapsed().as_secs_f64()
    };
    (0..5).map(|_| try_once()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::Precision;

    #[test]
    fn what_is_measured_is_a_positive_number() {
        for precision in Precision::ALL {
            assert!(peak_flops(&Ctx::new(precision).unwrap()) > 1e6);
        }
        assert!(read_bandwidth(&Ctx::new(Precision::F32).unwrap()) > 1e6);
    }
}
