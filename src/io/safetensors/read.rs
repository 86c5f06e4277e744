//! One file: its header checked, its tensors read when asked for.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;
use serde::de::{DeserializeSeed, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{Dtype, LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY, READ_BYTES, TensorInfo, byte_length};
use crate::error::{Error, Result};
use crate::io::os;

thread_local! {
    /// What a thread has read and not yet converted.
    static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
struct Entry {
    name: String,
    info: TensorInfo,
    /// From the start of the data.
    offset: u64,
}

/// An open safetensors file whose header was read and found sound.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    /// In the order of their data.
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens a file and checks its header: lengths, JSON, types, shapes against offsets, no overlap and no hole, and
    /// that the file is exactly as long as the header says.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or read, [`Error::Weights`] when it is damaged or cut off.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        let meta = file.metadata().map_err(|source| Error::io(path, source))?;
        if meta.is_dir() {
            return Err(Error::io(path, std::io::Error::from(std::io::ErrorKind::IsADirectory)));
        }
        let whole = |problem: String| Error::weights(path, "*", problem);
        let file_bytes = meta.len();
        let header_bytes = header_length(path, &file, file_bytes)?;
        let mut header = vec![0; header_bytes];
        os::read_exact_at(&file, &mut header, LENGTH_BYTES).map_err(|source| Error::io(path, source))?;
        let header: Header = serde_json::from_slice(&header)
            .map_err(|error| whole(format!("the header cannot be read: {error}; download the file again")))?;

        let (entries, data_bytes) = check_layout(path, header.tensors)?;
        let data_start = LENGTH_BYTES + header_bytes as u64;
        let expected = data_start.checked_add(data_bytes).ok_or_else(|| whole("its sizes overflow".to_owned()))?;
        if file_bytes < expected {
            return Err(whole(format!(
                "the file is cut off: it has {file_bytes} bytes and its header describes {expected}; download it again"
            )));
        }
        if file_bytes > expected {
            return Err(whole(format!(
                "the file has {file_bytes} bytes but its header describes {expected}; it is damaged, download it again"
            )));
        }
        let by_name = entries.iter().enumerate().map(|(index, entry)| (entry.name.clone(), index)).collect();
        Ok(Self { path: path.to_owned(), file, data_start, entries, by_name, metadata: header.metadata })
    }

    /// The file's path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The free-text part of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensors' names in the order of their data: reading in this order reads the file front to back.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|entry| entry.name.as_str())
    }

    /// Whether the file has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// What the header says about a tensor.
    ///
    /// # Errors
    /// [`Error::Weights`] when there is none of this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.entry(name)?.info)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        match self.by_name.get(name) {
            Some(&index) => Ok(&self.entries[index]),
            None => Err(Error::weights(&self.path, name, "the file has no tensor of this name")),
        }
    }

    /// Reads a tensor's bytes into `buf`, on all threads; afterwards it is exactly as long. A buffer used again is not
    /// reallocated.
    ///
    /// # Errors
    /// [`Error::Weights`] when there is none of this name or no memory for it, [`Error::Io`] when reading fails.
    pub fn read_bytes(&self, name: &str, buf: &mut Vec<u8>) -> Result<()> {
        let entry = self.entry(name)?;
        if buf.capacity() < entry.info.nbytes {
            *buf = self.zeros(entry, entry.info.nbytes)?;
        }
        buf.resize(entry.info.nbytes, 0);
        in_parts(buf, READ_BYTES, |start, part| self.read_at(entry, start, part))
    }

    /// Fills `out` with a tensor's bytes from `start_byte` on: for reading a large tensor row by row.
    ///
    /// # Errors
    /// [`Error::Weights`] when there is none of this name, [`Error::Shape`] when it ends before `out` is full,
    /// [`Error::Io`] when reading fails.
    pub fn read_slice(&self, name: &str, start_byte: usize, out: &mut [u8]) -> Result<()> {
        let entry = self.entry(name)?;
        if start_byte.checked_add(out.len()).is_none_or(|end| end > entry.info.nbytes) {
            return Err(Error::Shape {
                op: "read_slice",
                expected: format!("a range within the {} bytes of {name}", entry.info.nbytes),
                got: vec![start_byte, out.len()],
            });
        }
        self.read_at(entry, start_byte, out)
    }

    /// Reads a tensor of type F32, F16 or BF16 as `f32`, exactly, on all threads.
    ///
    /// # Errors
    /// [`Error::Weights`] when there is none of this name, it has another type or there is no memory for it,
    /// [`Error::Io`] when reading fails.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        self.float_bytes(entry)?;
        let mut values = self.zeros(entry, entry.info.nbytes * 8 / entry.info.dtype.bitsize())?;
        in_parts(&mut values, READ_BYTES / 4, |start, part| self.read_f32_slice(name, start, part))?;
        Ok(values)
    }

    /// Fills `out` with the elements from `start` on of a tensor of type F32, F16 or BF16, exactly, on this thread.
    ///
    /// # Errors
    /// Those of [`TensorFile::read_f32`], and [`Error::Shape`] when the tensor ends before `out` is full.
    pub fn read_f32_slice(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let entry = self.entry(name)?;
        let width = self.float_bytes(entry)?;
        BYTES.with_borrow_mut(|bytes| {
            bytes.resize(out.len() * width, 0);
            self.read_slice(name, start * width, bytes)?;
            match entry.info.dtype {
                Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
                Dtype::F16 => convert(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
                _ => convert(bytes, out, |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            }
            Ok(())
        })
    }

    /// Reads a tensor of type BF16 as it is stored, on all threads: an embedding table is the largest tensor there is.
    ///
    /// # Errors
    /// As [`TensorFile::read_f32`].
    pub fn read_bf16(&self, name: &str) -> Result<Vec<bf16>> {
        let entry = self.entry(name)?;
        if entry.info.dtype != Dtype::BF16 {
            return Err(Error::weights(&self.path, name, format!("expected BF16, got {}", entry.info.dtype)));
        }
        let mut values: Vec<u16> = self.zeros(entry, entry.info.nbytes / 2)?;
        in_parts(&mut values, READ_BYTES / 2, |start, part| {
            BYTES.with_borrow_mut(|bytes| {
                bytes.resize(2 * part.len(), 0);
                self.read_at(entry, 2 * start, bytes)?;
                convert(bytes, part, u16::from_le_bytes);
                Ok(())
            })
        })?;
        Ok(values.reinterpret_into())
    }

    /// Bytes of an element of a float tensor.
    fn float_bytes(&self, entry: &Entry) -> Result<usize> {
        match entry.info.dtype {
            Dtype::F32 => Ok(4),
            Dtype::F16 | Dtype::BF16 => Ok(2),
            other => Err(Error::weights(&self.path, &entry.name, format!("expected F32, F16 or BF16, got {other}"))),
        }
    }

    /// Zeros that take no memory before they are written, so that the threads that read share the page faults, too.
    fn zeros<T: Copy + Default>(&self, entry: &Entry, length: usize) -> Result<Vec<T>> {
        // `vec!` would abort the process where there is no memory: ask first.
        Vec::<T>::new().try_reserve_exact(length).map_err(|_| {
            let bytes = length.saturating_mul(size_of::<T>());
            Error::weights(&self.path, &entry.name, format!("no memory for its {bytes} bytes"))
        })?;
        Ok(os::zeros(length))
    }

    fn read_at(&self, entry: &Entry, start_byte: usize, out: &mut [u8]) -> Result<()> {
        let position = self.data_start + entry.offset + start_byte as u64;
        os::read_exact_at(&self.file, out, position).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::weights(&self.path, &entry.name, "the file was cut off after it was opened; download it again")
            }
            _ => Error::io(&self.path, source),
        })
    }
}

/// Calls `work(start, part)` for parts of `len` elements on all threads; the error is the earliest part's.
fn in_parts<T: Send>(out: &mut [T], len: usize, work: impl Fn(usize, &mut [T]) -> Result<()> + Sync) -> Result<()> {
    if out.len() <= len {
        return work(0, out);
    }
    os::with_pool(|| {
        let parts = out.par_chunks_mut(len).enumerate();
        parts.find_map_first(|(i, part)| work(i * len, part).err()).map_or(Ok(()), Err)
    })
}

/// `out[i] = from(the i-th N bytes)`.
fn convert<T, const N: usize>(bytes: &[u8], out: &mut [T], from: impl Fn([u8; N]) -> T) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = from(bytes);
    }
}

/// Reads the first 8 bytes and checks that the header they promise can be there.
fn header_length(path: &Path, file: &File, file_bytes: u64) -> Result<usize> {
    let whole = |problem: String| Error::weights(path, "*", problem);
    if file_bytes < LENGTH_BYTES {
        return Err(whole(format!(
            "the file is cut off: it has {file_bytes} bytes and a safetensors file at least {LENGTH_BYTES}; \
             download it again"
        )));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    os::read_exact_at(file, &mut length, 0).map_err(|source| Error::io(path, source))?;
    if &length == b"version " {
        return Err(whole("this is a Git LFS pointer and not the weights; run `git lfs pull`".to_owned()));
    }
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(whole(format!(
            "this is no safetensors file: its first 8 bytes promise a header of {length} bytes, at most \
             {MAX_HEADER_BYTES} are allowed"
        )));
    }
    if LENGTH_BYTES + length > file_bytes {
        let expected = LENGTH_BYTES + length;
        return Err(whole(format!(
            "the file is cut off: it has {file_bytes} bytes and its header alone ends at {expected}; download it again"
        )));
    }
    Ok(length as usize) // at most MAX_HEADER_BYTES
}

/// Checks each tensor's shape against its offsets, and that the offsets cover the data without overlap or hole.
/// Returns the tensors in the order of their data, and the data's length.
fn check_layout(path: &Path, mut tensors: Vec<(String, RawInfo)>) -> Result<(Vec<Entry>, u64)> {
    tensors.sort_by_key(|(_, raw)| raw.data_offsets);
    let mut entries = Vec::with_capacity(tensors.len());
    let mut end_so_far = 0;
    for (name, RawInfo { dtype, shape, data_offsets: (start, end) }) in tensors {
        let bad = |problem: String| Error::weights(path, name.clone(), format!("{problem}; the file is damaged"));
        if start < end_so_far {
            return Err(bad(format!(
                "its data starts at byte {start}, inside the tensor before, which ends at {end_so_far}"
            )));
        }
        if start > end_so_far {
            return Err(bad(format!("its data starts at byte {start}, but the tensor before ends at {end_so_far}")));
        }
        let Some(nbytes) = byte_length(dtype, &shape) else {
            return Err(bad(format!("shape {shape:?} of {dtype} is no possible size")));
        };
        if end.checked_sub(start) != Some(nbytes as u64) {
            return Err(bad(format!(
                "shape {shape:?} of {dtype} takes {nbytes} bytes, its offsets are [{start}, {end}]"
            )));
        }
        end_so_far = end;
        entries.push(Entry { name, info: TensorInfo { dtype, shape, nbytes }, offset: start });
    }
    Ok((entries, end_so_far))
}

/// One tensor's entry as it stands in the JSON.
#[derive(Deserialize)]
struct RawInfo {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The JSON header. Unlike a map it notices a name that comes twice.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawInfo)>,
}

/// Puts the tensor's name in front of what is wrong with its entry.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = RawInfo;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<RawInfo, D::Error> {
        RawInfo::deserialize(deserializer).map_err(|error| D::Error::custom(format!("tensor {}: {error}", self.0)))
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        let raw = map.next_value_seed(Named(&name))?;
                        header.tensors.push((name.clone(), raw));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("{name} comes twice")));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use super::super::write;
    use super::*;

    /// A file from a header's text and data.
    fn raw_file(folder: &Path, header: &str, data: &[u8]) -> PathBuf {
        let path = folder.join("raw.safetensors");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn open_error(folder: &Path, header: &str, data: &[u8]) -> String {
        TensorFile::open(raw_file(folder, header, data)).unwrap_err().to_string()
    }

    #[test]
    fn reads_f32_f16_and_bf16_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let values: Vec<f32> = (0..300_000_u32).map(|i| (i as f32 - 150_000.0) / 256.0).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let shape = [300, 1000];
        let tensors: [(&str, Dtype, &[usize], &[u8]); 4] = [
            ("b", Dtype::BF16, &shape, &bf16s),
            ("f", Dtype::F32, &shape, &f32s),
            ("h", Dtype::F16, &shape, &f16s),
            ("i", Dtype::U8, &[3], &[1, 2, 3]),
        ];
        write(&path, &tensors, &BTreeMap::new()).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["f", "b", "h", "i"]);
        assert_eq!(file.read_f32("f").unwrap(), values);
        assert_eq!(
            file.read_f32("h").unwrap(),
            values.iter().map(|&v| half::f16::from_f32(v).to_f32()).collect::<Vec<_>>()
        );
        assert_eq!(
            file.read_f32("b").unwrap(),
            values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect::<Vec<_>>()
        );
        let error = file.read_f32("i").unwrap_err().to_string();
        assert!(error.contains("tensor i: expected F32, F16 or BF16, got U8"), "{error}");
        assert!(file.read_f32("z").unwrap_err().to_string().contains("no tensor of this name"));

        let mut row = vec![0; 4000];
        file.read_slice("f", 4000 * 7, &mut row).unwrap();
        assert_eq!(row, f32s[28_000..32_000]);
        assert!(file.read_slice("f", 4000 * 300, &mut row).is_err());
        assert!(file.read_slice("f", usize::MAX, &mut row).is_err());
        let mut buf = vec![9; 10];
        file.read_bytes("i", &mut buf).unwrap();
        assert_eq!(buf, [1, 2, 3]);
    }

    #[test]
    fn a_file_cut_off_anywhere_says_how_many_bytes_are_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        write(&path, &[("w", Dtype::F32, &[4, 4], &[7; 64])], &BTreeMap::new()).unwrap();
        let bytes = fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            fs::write(&path, &bytes[..length]).unwrap();
            let error = TensorFile::open(&path).unwrap_err();
            assert!(matches!(error, Error::Weights { .. }));
            let text = error.to_string();
            assert!(text.contains(&format!("it has {length} bytes")) && text.contains("download it again"), "{text}");
            if length > bytes.len() - 64 {
                assert!(text.contains(&bytes.len().to_string()), "{text}");
            }
        }
        fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
        assert!(TensorFile::open(&path).unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn damaged_headers_are_named_errors() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let a = r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
        let cases = [
            (
                format!(r#"{{{a},"b":{{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}}}"#),
                6,
                "inside the tensor before",
            ),
            (format!(r#"{{{a},"b":{{"dtype":"U8","shape":[4],"data_offsets":[5,9]}}}}"#), 9, "tensor before ends at 4"),
            (format!("{{{a},{a}}}"), 4, "a comes twice"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#.to_owned(), 4, "takes 8 bytes"),
            (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#.to_owned(), 4, "starts at byte 4"),
            (
                r#"{"a":{"dtype":"U9","shape":[4],"data_offsets":[0,4]}}"#.to_owned(),
                4,
                "tensor a: unknown variant `U9`",
            ),
            (r#"{"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}"#.to_owned(), 4, "tensor a: invalid value"),
            (r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#.to_owned(), 1, "no possible size"),
            (
                format!(r#"{{"a":{{"dtype":"F32","shape":[{0},{0}],"data_offsets":[0,4]}}}}"#, usize::MAX),
                4,
                "no possible size",
            ),
            ("[]".to_owned(), 0, "a JSON object of tensors"),
            ("{".to_owned(), 0, "header cannot be read"),
            ("\u{1}\u{2}".to_owned(), 0, "header cannot be read"),
        ];
        for (header, n_data, expected) in cases {
            let error = open_error(folder, &header, &vec![0; n_data]);
            assert!(error.contains(expected), "{header}: {error}");
        }
        let pointer = folder.join("p.safetensors");
        fs::write(&pointer, "version https://git-lfs.github.com/spec/v1\n").unwrap();
        assert!(TensorFile::open(&pointer).unwrap_err().to_string().contains("git lfs pull"));
        fs::write(&pointer, [0xff; 64]).unwrap();
        assert!(TensorFile::open(&pointer).unwrap_err().to_string().contains("no safetensors file"));
        assert!(matches!(TensorFile::open(folder.join("absent")), Err(Error::Io { .. })));
        assert!(matches!(TensorFile::open(folder), Err(Error::Io { .. })));
    }

    #[test]
    fn a_file_that_shrinks_while_open_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        write(&path, &[("w", Dtype::F32, &[64], &[7; 256])], &BTreeMap::new()).unwrap();
        let file = TensorFile::open(&path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert!(file.read_f32("w").unwrap_err().to_string().contains("cut off after it was opened"));
    }
}
