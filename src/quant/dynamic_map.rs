//! The 256-entry dynamic maps: how bitsandbytes writes a normalised number in 8 bits.
//!
//! Seven decades of exponent, each with twice the mantissa steps of the one below (Dettmers 2016, arXiv:1511.04561).
//! The signed map holds the block scales of double-quantized NF4 and Adam's first moment, the unsigned one Adam's second.

use std::sync::OnceLock;

/// Entries in a map, one per value of a byte.
pub const MAP_LEN: usize = 256;

/// Bits of a magnitude below those that select a bucket of [`DynamicMap::encode`]: exponent and five bits of mantissa.
const BUCKET_SHIFT: u32 = 18;

/// The largest number of bounds in a bucket, of both maps.
const STEPS: usize = 3;

/// A sorted table of 256 values in [-1, 1] and a fast way from a number to the nearest entry.
#[derive(Debug, Clone)]
pub struct DynamicMap {
    values: [f32; MAP_LEN],
    /// `bounds[i]` is the midpoint of `values[i]` and `values[i + 1]`; infinity from the last value on.
    bounds: [f32; MAP_LEN + STEPS],
    /// For each bucket of magnitudes, the code of the smallest number in it: of a positive, and of a negative one.
    first: [Vec<u8>; 2],
}

impl DynamicMap {
    /// The signed map: values from about -0.993 to 1.
    pub fn signed() -> &'static Self {
        static MAP: OnceLock<DynamicMap> = OnceLock::new();
        MAP.get_or_init(|| Self::new(&create(Sign::Signed)))
    }

    /// The unsigned map: values from 0 to 1.
    pub fn unsigned() -> &'static Self {
        static MAP: OnceLock<DynamicMap> = OnceLock::new();
        MAP.get_or_init(|| Self::new(&create(Sign::Unsigned)))
    }

    fn new(values: &[f32; MAP_LEN]) -> Self {
        let mut bounds = [f32::INFINITY; MAP_LEN + STEPS];
        for (bound, pair) in bounds.iter_mut().zip(values.windows(2)) {
            *bound = f32::midpoint(pair[0], pair[1]);
        }
        let edge = |bucket: u32| f32::from_bits(bucket << BUCKET_SHIFT);
        let buckets = 0..=1f32.to_bits() >> BUCKET_SHIFT;
        let below = |x: f32| bounds.partition_point(|&bound| bound < x) as u8;
        let positive: Vec<u8> = buckets.clone().map(|bucket| below(edge(bucket))).collect();
        let negative: Vec<u8> = buckets.clone().map(|bucket| below(-edge(bucket + 1))).collect();
        let up = buckets.clone().zip(&positive).map(|(bucket, &first)| below(edge(bucket + 1)) - first);
        let down = buckets.zip(&negative).map(|(bucket, &first)| below(-edge(bucket)) - first);
        assert!(up.chain(down).all(|bounds| usize::from(bounds) <= STEPS), "a bucket holds more than {STEPS} bounds");
        Self { values: *values, bounds, first: [positive, negative] }
    }

    /// The 256 values, ascending.
    pub fn values(&self) -> &[f32; MAP_LEN] {
        &self.values
    }

    /// The value of a code.
    #[inline]
    pub fn decode(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The code nearest to `x`: the number of midpoints strictly below it, so a tie goes to the lower code.
    ///
    /// Numbers outside [-1, 1] get the outermost code, NaN gets 0.
    #[inline]
    pub fn encode(&self, x: f32) -> u8 {
        if x.is_nan() {
            return 0;
        }
        // The code of the bucket's smallest number, and one more for each of the bucket's bounds below x. A search that ends
        // early is mispredicted half of the time, and one that follows the code waits for every compare.
        let bucket = (x.abs().min(1.0).to_bits() >> BUCKET_SHIFT) as usize;
        let first = self.first[usize::from(x < 0.0)][bucket];
        let bounds = &self.bounds[usize::from(first)..usize::from(first) + STEPS];
        first + bounds.iter().map(|&bound| u8::from(bound < x)).sum::<u8>()
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Sign {
    Signed,
    Unsigned,
}

/// Builds the map in f32 exactly as `bitsandbytes.functional.create_dynamic_map(signed, 7, 8)` of version 0.50.2 does.
fn create(sign: Sign) -> [f32; MAP_LEN] {
    const DECADES: u32 = 7;
    // The factors are Python floats rounded to f32; spelled out so that no powi rounding can creep in.
    const SCALES: [f32; DECADES as usize] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut data = Vec::with_capacity(MAP_LEN);
    for (decade, &scale) in SCALES.iter().enumerate() {
        let steps = match sign {
            Sign::Signed => 1usize << decade,
            Sign::Unsigned => 2usize << decade,
        };
        let edges = linspace(0.1, 1.0, steps + 1);
        for pair in edges.windows(2) {
            let mean = f32::midpoint(pair[0], pair[1]);
            data.push(scale * mean);
            if sign == Sign::Signed {
                data.push(-scale * mean);
            }
        }
    }
    data.push(0.0);
    data.push(1.0);
    data.sort_by(f32::total_cmp);
    data.try_into().expect("7 decades give 254 values, and two more are pushed")
}

/// `torch.linspace` in f32: counted from the start in the first half, from the end in the second, by fused multiply-adds.
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(
            |i| {
                if i < count / 2 { step.mul_add(i as f32, start) } else { step.mul_add(-((count - i - 1) as f32), end) }
            },
        )
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::quant::nf4::tests::shared_nf4;

    #[test]
    fn maps_equal_bitsandbytes_to_the_bit() {
        let Some(folder) = shared_nf4() else {
            eprintln!("left out 2 cases: shared data not found");
            return;
        };
        let bytes = std::fs::read(folder.join("dynamic_maps.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, map) in [("signed", DynamicMap::signed()), ("unsigned", DynamicMap::unsigned())] {
            let want: Vec<u32> = file
                .tensor(name)
                .unwrap()
                .data()
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            let got: Vec<u32> = map.values().iter().map(|v| v.to_bits()).collect();
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn maps_keep_their_checksum() {
        // A polynomial of the bit patterns of bitsandbytes' maps, for where its file is not at hand.
        let hash = |map: &DynamicMap| {
            map.values().iter().fold(0u64, |hash, v| hash.wrapping_mul(31).wrapping_add(u64::from(v.to_bits())))
        };
        assert_eq!(hash(DynamicMap::signed()), 0xbccb_8e6c_a441_6a6c);
        assert_eq!(hash(DynamicMap::unsigned()), 0xc018_be81_058e_22f4);
    }

    #[test]
    fn encode_is_the_nearest_code() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            let mut probes: Vec<f32> = map.values().to_vec();
            for &bound in &map.bounds[..MAP_LEN - 1] {
                probes.extend([bound, bound.next_up(), bound.next_down()]);
            }
            probes.extend([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 2.0, -2.0, f32::MIN_POSITIVE]);
            for x in probes {
                let want = map.bounds[..MAP_LEN - 1].iter().filter(|&&bound| bound < x).count();
                assert_eq!(usize::from(map.encode(x)), want, "{x:e}");
            }
            for code in 0..=255u8 {
                assert_eq!(map.encode(map.decode(code)), code);
            }
        }
    }
}
