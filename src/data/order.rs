//! The order rows are trained in: `torch.randperm` of a CPU generator, so that runs can be laid side by side.
//!
//! MT19937 (Matsumoto and Nishimura 1998) and a forward Fisher-Yates shuffle with `u32 % (n - i)`, as PyTorch's
//! `randperm` draws for fewer than 2^32 / 20 elements.

/// Words of state.
const N: usize = 624;
/// The middle word, the recurrence's second tap.
const M: usize = 397;

/// The Mersenne Twister with 32-bit output, seeded as `torch.Generator().manual_seed(seed)` does.
#[derive(Debug, Clone)]
pub struct Mt19937 {
    state: Box<[u32; N]>,
    next: usize,
}

impl Mt19937 {
    /// A generator; only the low 32 bits of `seed` count, as in PyTorch.
    pub fn new(seed: u64) -> Self {
        let mut state = Box::new([0u32; N]);
        state[0] = seed as u32;
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
        }
        self.next = 0;
    }
}

/// `torch.randperm(n, generator=torch.Generator().manual_seed(seed))`.
///
/// # Panics
/// If `n` has more than 32 bits.
pub fn randperm(n: usize, seed: u64) -> Vec<u32> {
    let n = u32::try_from(n).expect("a dataset of fewer than 2^32 rows");
    let mut random = Mt19937::new(seed);
    let mut order: Vec<u32> = (0..n).collect();
    for i in 0..n.saturating_sub(1) {
        let pick = i + random.next_u32() % (n - i);
        order.swap(i as usize, pick as usize);
    }
    order
}

/// The rows of one pass over `n` rows, in the order they are trained: a permutation of generator `seed + epoch`.
pub fn epoch_order(n: usize, seed: u64, epoch: u64) -> Vec<u32> {
    randperm(n, seed.wrapping_add(epoch))
}

/// The rows of one pass in an order in which `batch` neighbours are of about the same length, the longest row first.
///
/// transformers' `get_length_grouped_indices` of the generator that [`epoch_order`] uses: mega-batches of up to 50 batches
/// of a random order, each sorted from long to short.
pub fn length_grouped_order(lengths: &[usize], batch: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let batches = (lengths.len() / (4 * batch)).clamp(1, 50);
    let mut order = epoch_order(lengths.len(), seed, epoch);
    let longest_first = |row: &u32| std::cmp::Reverse(lengths[*row as usize]);
    order.chunks_mut(batches * batch).for_each(|mega_batch| mega_batch.sort_by_key(longest_first));
    // The first of the longest of all: a step that does not fit into memory fails at once.
    let heads = (0..order.len()).step_by(batches * batch);
    if let Some(longest) = heads.min_by_key(|&at| longest_first(&order[at])) {
        order.swap(0, longest);
    }
    order
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn equals_torch_randperm() {
        // torch 2.13: torch.randperm(100000, generator=torch.Generator().manual_seed(3407))[:8]
        let want = [60_459, 64_297, 22_049, 75_835, 81_979, 24_360, 91_018, 34_859];
        assert_eq!(randperm(100_000, 3407)[..8], want);
        // 10 rows with seed 42, and with 2^32 + 42, whose high bits PyTorch drops.
        let ten = [2, 6, 1, 8, 4, 5, 0, 9, 3, 7];
        assert_eq!(randperm(10, 42), ten);
        assert_eq!(randperm(10, (1 << 32) + 42), ten);
    }

    #[test]
    fn equals_the_golden_permutations() {
        #[derive(serde::Deserialize)]
        struct Case {
            seed: u64,
            n: usize,
            order: Vec<u32>,
        }
        #[derive(serde::Deserialize)]
        struct File {
            cases: Vec<Case>,
        }
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/randperm.json");
        let file: File = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(file.cases.len() > 20);
        for Case { seed, n, order } in file.cases {
            assert_eq!(randperm(n, seed)[..order.len()], order, "seed {seed}, n {n}");
        }
    }

    #[test]
    fn generator_equals_the_published_sequence() {
        // The 10,000th output for the default seed 5489, from the C++ standard's requirement on std::mt19937.
        let mut random = Mt19937::new(5489);
        let last = (0..10_000).map(|_| random.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn grouping_by_length_equals_transformers() {
        // transformers 5.23, torch 2.13: get_length_grouped_indices([1 + i * 7919 % 61 for i in range(n)], batch, generator=
        // torch.Generator().manual_seed(seed)): its first eight, and the sum of (place + 1) * row.
        for (n, batch, seed, first, sum) in [
            (10, 2, 42, [6, 2, 1, 8, 4, 5, 9, 0], 251),
            (100, 8, 3407, [50, 78, 17, 67, 73, 62, 90, 46], 245_177),
            (1000, 4, 3408, [599, 710, 161, 405, 882, 516, 150, 455], 249_186_816_u64),
        ] {
            let lengths: Vec<usize> = (0..n).map(|i| 1 + i * 7919 % 61).collect();
            let order = length_grouped_order(&lengths, batch, seed - 1, 1);
            assert_eq!(order[..8], first, "n {n}");
            assert_eq!((1..).zip(&order).map(|(place, &row)| place * u64::from(row)).sum::<u64>(), sum, "n {n}");
        }
        assert_eq!(length_grouped_order(&[], 3, 0, 0), [0u32; 0]);
    }

    #[test]
    fn every_row_once_and_epochs_differ() {
        for n in [0, 1, 2, 625, 3000] {
            let mut order = epoch_order(n, 3407, 2);
            assert_eq!(order, randperm(n, 3409));
            order.sort_unstable();
            assert!(order.iter().copied().eq(0..n as u32));
        }
        assert_ne!(epoch_order(100, 1, 0), epoch_order(100, 1, 1));
    }
}
