//! Reading safetensors lazily, one tensor at a time, and writing them as a stream.
//!
//! The format (<https://github.com/huggingface/safetensors>, "Format"): 8 bytes with the header's length n, n bytes of
//! JSON `{name: {dtype, shape, data_offsets}}`, then the data without holes. Opening a file reads and checks only the
//! header; tensors come by positioned reads and not through a memory map, so that their pages never count as this
//! process's own memory and a file that shrinks gives an error instead of a signal.

mod folder;
mod read;
mod write;

pub use ::safetensors::Dtype;
pub use folder::ModelFiles;
pub use read::TensorFile;
pub use write::{SafetensorsWriter, TensorSpec, write};

/// The longest header the format allows, in bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The header's length comes first, in this many bytes, little-endian.
const LENGTH_BYTES: u64 = 8;
/// The key of the header that is no tensor.
const METADATA_KEY: &str = "__metadata__";
/// How much a thread reads at once; when elements are converted, no more than that is in memory in two types.
const READ_BYTES: usize = 256 << 10;

/// What the header says about one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The dimensions, slowest first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The length of the data in bytes.
    pub nbytes: usize,
}

/// The bytes that `shape` elements of `dtype` take; `None` when that overflows or is no whole number of bytes.
fn byte_length(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeMap;
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    pub(super) fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn empty_tensors_scalars_and_metadata_survive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), ("a".to_owned(), "\"é\n".to_owned())]);
        write(&path, &[("s", Dtype::F32, &[], &[0, 0, 128, 63]), ("e", Dtype::F32, &[0, 3], &[])], &metadata).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.metadata(), &metadata);
        assert_eq!(file.read_f32("s").unwrap(), [1.0]);
        assert_eq!(file.read_f32("e").unwrap(), [0.0; 0]);
        assert_eq!(file.info("e").unwrap().shape, [0, 3]);
        let bytes = fs::read(&path).unwrap();
        let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("s").unwrap().data(), [0, 0, 128, 63]);
    }

    fn any_dtype() -> impl Strategy<Value = Dtype> {
        prop::sample::select(vec![
            Dtype::BOOL,
            Dtype::F4,
            Dtype::U8,
            Dtype::F8_E4M3,
            Dtype::I16,
            Dtype::F16,
            Dtype::BF16,
            Dtype::F32,
            Dtype::I64,
            Dtype::F64,
        ])
    }

    /// Tensors with distinct names and data that fits.
    fn any_tensors() -> impl Strategy<Value = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>> {
        let tensor = (any_dtype(), prop::collection::vec(0_usize..5, 0..4), any::<u8>());
        prop::collection::btree_map("[a-z.é\"\\\\]{0,8}", tensor, 0..8).prop_map(|map| {
            map.into_iter()
                .map(|(name, (dtype, mut shape, seed))| {
                    if dtype == Dtype::F4 {
                        shape.push(2);
                    }
                    let nbytes = byte_length(dtype, &shape).unwrap();
                    let bytes = (0..nbytes).map(|i| seed.wrapping_mul(31).wrapping_add(i as u8)).collect();
                    (name, dtype, shape, bytes)
                })
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_we_write_is_what_the_reference_writes_and_both_read_both(
            tensors in any_tensors(),
            note in prop::option::of("[a-z]{1,6}"),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("t.safetensors");
            let metadata: BTreeMap<_, _> = note.iter().map(|note| ("note".to_owned(), note.clone())).collect();
            let specs: Vec<_> = tensors.iter().map(|(n, d, s, _)| spec(n, *d, s)).collect();
            let mut writer = SafetensorsWriter::create(&path, &specs, &metadata).unwrap();
            for (name, _, _, bytes) in tensors.iter().rev() {
                writer.write(name, bytes).unwrap();
            }
            writer.finish().unwrap();

            let views: Vec<_> = tensors
                .iter()
                .map(|(n, d, s, b)| (n.clone(), ::safetensors::tensor::TensorView::new(*d, s.clone(), b).unwrap()))
                .collect();
            let theirs_metadata = (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
            let reference = ::safetensors::serialize(views, theirs_metadata).unwrap();
            prop_assert_eq!(&fs::read(&path).unwrap(), &reference);

            let ours = TensorFile::open(&path).unwrap();
            let theirs = ::safetensors::SafeTensors::deserialize(&reference).unwrap();
            prop_assert_eq!(ours.names().count(), tensors.len());
            prop_assert_eq!(ours.metadata(), &metadata);
            let mut buf = Vec::new();
            for (name, dtype, shape, bytes) in &tensors {
                ours.read_bytes(name, &mut buf).unwrap();
                let view = theirs.tensor(name).unwrap();
                prop_assert_eq!(&buf, bytes);
                prop_assert_eq!(view.data(), &bytes[..]);
                prop_assert_eq!(ours.info(name).unwrap(), &TensorInfo { dtype: *dtype, shape: shape.clone(), nbytes: bytes.len() });
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), is_framed in any::<bool>()) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("t.safetensors");
            let framed = [&(bytes.len() as u64).to_le_bytes()[..], &bytes].concat();
            fs::write(&path, if is_framed { &framed } else { &bytes }).unwrap();
            // Only an empty header, `{}` among spaces, is a sound file without data.
            prop_assert!(TensorFile::open(&path).map_or(0, |file| file.names().count()) == 0);
        }

        /// A sound file with bytes changed: opens, and then every tensor can be read, or is a named error. What the
        /// reference refuses, we refuse.
        #[test]
        fn changed_bytes_never_panic(tensors in any_tensors(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("t.safetensors");
            let borrowed: Vec<(&str, Dtype, &[usize], &[u8])> = tensors.iter().map(|(n, d, s, b)| (&n[..], *d, &s[..], &b[..])).collect();
            write(&path, &borrowed, &BTreeMap::new()).unwrap();
            let mut bytes = fs::read(&path).unwrap();
            for (place, value) in changes {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            fs::write(&path, &bytes).unwrap();
            let theirs = ::safetensors::SafeTensors::deserialize(&bytes);
            if let Ok(file) = TensorFile::open(&path) {
                prop_assert!(theirs.is_ok(), "we read what the reference refuses: {:?}", theirs.err());
                let mut buf = Vec::new();
                for name in file.names() {
                    file.read_bytes(name, &mut buf).unwrap();
                }
            }
        }
    }
}
