//! Reading safetensors lazily, one tensor at a time, and writing them as a stream.
//!
//! The format (<https://github.com/huggingface/safetensors>, "Format"): 8 bytes with the header's length n, n bytes of
//! JSON `{name: {dtype, shape, data_offsets}}`, then the data without holes. Opening a file reads and checks only the
//! header; tensors come by positioned reads and not through a memory map, so that their pages never count as this
//! process's own memory and a file that shrinks gives an error instead of a signal.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;
use serde::de::{DeserializeSeed, Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serializer};

pub use ::safetensors::Dtype;

use crate::error::{Error, Result};
use crate::io::atomic::AtomicFile;
use crate::io::os;

/// The longest header the format allows, in bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The header's length comes first, in this many bytes, little-endian.
const LENGTH_BYTES: u64 = 8;
/// The key of the header that is no tensor.
const METADATA_KEY: &str = "__metadata__";
/// How much a thread reads at once; when elements are converted, no more than that is in memory in two types.
const READ_BYTES: usize = 256 << 10;

thread_local! {
    /// What a thread has read and not yet converted.
    static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The one-file form of a model's weights.
const SINGLE_FILE: &str = "model.safetensors";
/// The list of files of a model in several.
const INDEX_FILE: &str = "model.safetensors.index.json";

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

// ---------------------------------------------------------------------------------------------------------------------
// Reading
// ---------------------------------------------------------------------------------------------------------------------

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
    fn zeros<T: Clone + Default>(&self, entry: &Entry, length: usize) -> Result<Vec<T>> {
        // `vec!` would abort the process where there is no memory: ask first.
        Vec::<T>::new().try_reserve_exact(length).map_err(|_| {
            let bytes = length.saturating_mul(size_of::<T>());
            Error::weights(&self.path, &entry.name, format!("no memory for its {bytes} bytes"))
        })?;
        Ok(vec![T::default(); length])
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

// ---------------------------------------------------------------------------------------------------------------------
// A model's folder
// ---------------------------------------------------------------------------------------------------------------------

/// The weights of a model folder, in one file or several, found by name.
#[derive(Debug)]
pub struct ModelFiles {
    folder: PathBuf,
    files: Vec<TensorFile>,
    /// The file of each tensor, an index into `files`.
    by_name: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl ModelFiles {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` lists, and checks every header.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be read; [`Error::Weights`] when there are no weights in it, a listed file
    /// is missing, a file is damaged, or a tensor is not in the file that the index names.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        if folder.join(SINGLE_FILE).exists() {
            let file = TensorFile::open(folder.join(SINGLE_FILE))?;
            let by_name = file.names().map(|name| (name.to_owned(), 0)).collect();
            return Ok(Self { folder: folder.to_owned(), files: vec![file], by_name });
        }
        let index_path = folder.join(INDEX_FILE);
        if index_path.exists() {
            return Self::open_shards(folder, &index_path);
        }
        Err(no_weights(folder))
    }

    fn open_shards(folder: &Path, index_path: &Path) -> Result<Self> {
        let bytes = std::fs::read(index_path).map_err(|source| Error::io(index_path, source))?;
        let index: ShardIndex = serde_json::from_slice(&bytes)
            .map_err(|error| Error::weights(index_path, "*", format!("the index cannot be read: {error}")))?;
        if index.weight_map.is_empty() {
            return Err(Error::weights(index_path, "*", "the index lists no tensors"));
        }
        let mut files: Vec<TensorFile> = Vec::new();
        let mut file_of_shard: HashMap<&str, usize> = HashMap::new();
        let mut by_name = HashMap::with_capacity(index.weight_map.len());
        for (tensor, shard) in &index.weight_map {
            let file_idx = if let Some(&file_idx) = file_of_shard.get(shard.as_str()) {
                file_idx
            } else {
                files.push(open_shard(folder, index_path, shard)?);
                file_of_shard.insert(shard, files.len() - 1);
                files.len() - 1
            };
            if !files[file_idx].contains(tensor) {
                let problem = format!("{INDEX_FILE} says that it is in {shard}, but it is not; download both again");
                return Err(Error::weights(folder, tensor, problem));
            }
            by_name.insert(tensor.clone(), file_idx);
        }
        Ok(Self { folder: folder.to_owned(), files, by_name })
    }

    /// The folder, as it was opened.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The open files.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// All names, file by file in the order of the data.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().enumerate().flat_map(move |(file_idx, file)| {
            // A shard may hold a tensor that the index places elsewhere or does not list: that copy is not ours.
            file.names().filter(move |&name| self.by_name.get(name) == Some(&file_idx))
        })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// [`Error::Weights`] when no file has it.
    pub fn file_of(&self, name: &str) -> Result<&TensorFile> {
        match self.by_name.get(name) {
            Some(&file_idx) => Ok(&self.files[file_idx]),
            None => Err(Error::weights(&self.folder, name, "the folder has no tensor of this name")),
        }
    }

    /// What the header says about a tensor.
    ///
    /// # Errors
    /// [`Error::Weights`] when no file has it.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.file_of(name)?.info(name)
    }

    /// As [`TensorFile::read_bytes`].
    ///
    /// # Errors
    /// As there.
    pub fn read_bytes(&self, name: &str, buf: &mut Vec<u8>) -> Result<()> {
        self.file_of(name)?.read_bytes(name, buf)
    }

    /// As [`TensorFile::read_f32`].
    ///
    /// # Errors
    /// As there.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        self.file_of(name)?.read_f32(name)
    }

    /// As [`TensorFile::read_f32_slice`].
    ///
    /// # Errors
    /// As there.
    pub fn read_f32_slice(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        self.file_of(name)?.read_f32_slice(name, start, out)
    }

    /// As [`TensorFile::read_bf16`].
    ///
    /// # Errors
    /// As there.
    pub fn read_bf16(&self, name: &str) -> Result<Vec<bf16>> {
        self.file_of(name)?.read_bf16(name)
    }

    /// Calls `each(name, info, bytes)` for every tensor, front to back, holding one tensor at a time.
    ///
    /// # Errors
    /// Those of reading, and the first that `each` returns.
    pub fn for_each(&self, mut each: impl FnMut(&str, &TensorInfo, &[u8]) -> Result<()>) -> Result<()> {
        let mut buf = Vec::new();
        for name in self.names() {
            self.read_bytes(name, &mut buf)?;
            each(name, self.info(name)?, &buf)?;
        }
        Ok(())
    }
}

/// Opens a file that the index names; it must lie in the folder itself.
fn open_shard(folder: &Path, index_path: &Path, shard: &str) -> Result<TensorFile> {
    let is_plain_name = Path::new(shard).file_name().is_some_and(|name| name == shard);
    if !is_plain_name {
        return Err(Error::weights(index_path, "*", format!("{shard:?} is no plain file name")));
    }
    let path = folder.join(shard);
    if !path.exists() {
        let problem = format!("{INDEX_FILE} lists {shard}, but the file is missing; download it again");
        return Err(Error::weights(folder, "*", problem));
    }
    TensorFile::open(path)
}

/// Says what the folder has instead of weights.
fn no_weights(folder: &Path) -> Error {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) => return Error::io(folder, source),
    };
    let names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let is_pickle = |name: &String| {
        let extension = Path::new(name).extension().unwrap_or_default();
        name.contains("model") && ["bin", "pt", "pth"].iter().any(|&pickle| extension == pickle)
    };
    let problem = if names.iter().any(|name| name == "adapter_model.safetensors") {
        "this is an adapter folder and has no model weights of its own".to_owned()
    } else if let Some(pickle) = names.iter().find(|name| is_pickle(name)) {
        format!("only {pickle} is here, which is a Python pickle; convert the weights to safetensors")
    } else {
        format!("neither {SINGLE_FILE} nor {INDEX_FILE} is here")
    };
    Error::weights(folder, "*", problem)
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing
// ---------------------------------------------------------------------------------------------------------------------

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
}

/// Writes a safetensors file tensor by tensor, aside, so that the destination appears whole or not at all.
///
/// The layout is that of the reference implementation, larger elements first and then by name: no reader meets a tensor
/// at an odd address, and equal content gives equal bytes. Tensors may be written in any order.
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    /// Name to (position in the file, bytes); what is written is taken out.
    pending: HashMap<String, (u64, usize)>,
}

impl SafetensorsWriter {
    /// Lays the file out and writes its header.
    ///
    /// # Errors
    /// [`Error::Weights`] for a name that comes twice or is reserved, or a shape that is no possible size; [`Error::Io`].
    pub fn create(path: impl AsRef<Path>, tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let path = path.as_ref();
        let mut ordered: Vec<&TensorSpec> = tensors.iter().collect();
        ordered.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));

        let mut pending = HashMap::with_capacity(ordered.len());
        let mut offset = 0_u64; // from the start of the data
        for spec in &ordered {
            let bad = |problem: &str| Err(Error::weights(path, &spec.name, problem));
            if spec.name == METADATA_KEY {
                return bad("this name is reserved");
            }
            let Some(nbytes) = byte_length(spec.dtype, &spec.shape) else {
                return bad("its shape is no possible size");
            };
            if pending.insert(spec.name.clone(), (offset, nbytes)).is_some() {
                return bad("this name comes twice");
            }
            let Some(end) = offset.checked_add(nbytes as u64) else {
                return bad("the file would be too large");
            };
            offset = end;
        }

        let header = header_bytes(&ordered, &pending, metadata)
            .map_err(|error| Error::weights(path, "*", format!("the header cannot be written: {error}")))?;
        if header.len() as u64 > MAX_HEADER_BYTES {
            return Err(Error::weights(path, "*", format!("the header takes more than {MAX_HEADER_BYTES} bytes")));
        }
        let data_start = LENGTH_BYTES + header.len() as u64;
        for (position, _) in pending.values_mut() {
            *position += data_start;
        }
        let file = AtomicFile::create(path)?;
        let mut start = (header.len() as u64).to_le_bytes().to_vec();
        start.extend_from_slice(&header);
        os::write_all_at(file.file(), &start, 0).map_err(|source| Error::io(path, source))?;
        Ok(Self { file, pending })
    }

    /// Writes one tensor: row-major, little-endian.
    ///
    /// # Errors
    /// [`Error::Weights`] when it was not announced, was written already, or has another length; [`Error::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let position = self.begin(name, bytes.len())?;
        self.write_at(bytes, position)
    }

    /// Writes one tensor of type F32.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::write`].
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let mut position = self.begin(name, values.len() * 4)?;
        let mut chunk = Vec::with_capacity(values.len().min(READ_BYTES / 4) * 4);
        for part in values.chunks(READ_BYTES / 4) {
            chunk.clear();
            chunk.extend(part.iter().flat_map(|value| value.to_le_bytes()));
            self.write_at(&chunk, position)?;
            position += chunk.len() as u64;
        }
        Ok(())
    }

    fn begin(&mut self, name: &str, nbytes: usize) -> Result<u64> {
        let path = self.file.destination();
        match self.pending.get(name) {
            None => Err(Error::weights(path, name, "it was not announced, or was written already")),
            Some(&(_, expected)) if expected != nbytes => {
                Err(Error::weights(path, name, format!("expected {expected} bytes, got {nbytes}")))
            }
            Some(&(position, _)) => {
                self.pending.remove(name);
                Ok(position)
            }
        }
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> Result<()> {
        os::write_all_at(self.file.file(), bytes, position).map_err(|source| Error::io(self.file.destination(), source))
    }

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// [`Error::Weights`] when a tensor was not written, [`Error::Io`]; nothing is left behind then.
    pub fn finish(self) -> Result<()> {
        if let Some(missing) = self.pending.keys().min() {
            return Err(Error::weights(self.file.destination(), missing, "it was announced but never written"));
        }
        self.file.commit()
    }
}

/// The JSON header, padded with spaces to a multiple of 8 as the format asks.
fn header_bytes(
    ordered: &[&TensorSpec],
    offsets: &HashMap<String, (u64, usize)>,
    metadata: &BTreeMap<String, String>,
) -> serde_json::Result<Vec<u8>> {
    #[derive(serde::Serialize)]
    struct Info<'a> {
        dtype: Dtype,
        shape: &'a [usize],
        data_offsets: (u64, u64),
    }
    let mut header = Vec::new();
    let mut serializer = serde_json::Serializer::new(&mut header);
    let mut map = serializer.serialize_map(None)?;
    if !metadata.is_empty() {
        map.serialize_entry(METADATA_KEY, metadata)?;
    }
    for spec in ordered {
        let (start, nbytes) = offsets[&spec.name];
        let data_offsets = (start, start + nbytes as u64);
        map.serialize_entry(&spec.name, &Info { dtype: spec.dtype, shape: &spec.shape, data_offsets })?;
    }
    map.end()?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    Ok(header)
}

/// Writes tensors that are all in memory: `(name, dtype, shape, bytes)`.
///
/// # Errors
/// As [`SafetensorsWriter`]'s.
pub fn write(
    path: impl AsRef<Path>,
    tensors: &[(&str, Dtype, &[usize], &[u8])],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|&(name, dtype, shape, _)| TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() })
        .collect();
    let mut writer = SafetensorsWriter::create(path, &specs, metadata)?;
    for &(name, _, _, bytes) in tensors {
        writer.write(name, bytes)?;
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

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

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
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

    #[test]
    fn the_writer_refuses_what_does_not_fit_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        fs::write(&path, "old").unwrap();
        let specs = [spec("a", Dtype::F32, &[2]), spec("b", Dtype::U8, &[1])];
        let mut writer = SafetensorsWriter::create(&path, &specs, &BTreeMap::new()).unwrap();
        assert!(writer.write("a", &[0; 7]).unwrap_err().to_string().contains("expected 8 bytes, got 7"));
        assert!(writer.write("c", &[0; 7]).unwrap_err().to_string().contains("not announced"));
        writer.write_f32("a", &[1.0, 2.0]).unwrap();
        assert!(writer.write("a", &[0; 8]).unwrap_err().to_string().contains("already"));
        assert!(writer.finish().unwrap_err().to_string().contains("tensor b: it was announced but never written"));
        assert_eq!(entries(folder.path()), ["t.safetensors"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");

        let twice = [spec("a", Dtype::F32, &[2]), spec("a", Dtype::U8, &[1])];
        assert!(SafetensorsWriter::create(&path, &twice, &BTreeMap::new()).is_err());
        let reserved = [spec(METADATA_KEY, Dtype::F32, &[2])];
        assert!(SafetensorsWriter::create(&path, &reserved, &BTreeMap::new()).is_err());
        let huge = [spec("a", Dtype::F32, &[usize::MAX])];
        assert!(SafetensorsWriter::create(&path, &huge, &BTreeMap::new()).is_err());
        assert_eq!(entries(folder.path()), ["t.safetensors"]);
    }

    fn shard(folder: &Path, file: &str, tensors: &[&str]) {
        let data: Vec<(&str, Dtype, &[usize], &[u8])> =
            tensors.iter().map(|&name| (name, Dtype::U8, &[1][..], &name.as_bytes()[..1])).collect();
        write(folder.join(file), &data, &BTreeMap::new()).unwrap();
    }

    fn index(folder: &Path, pairs: &[(&str, &str)]) {
        let map: BTreeMap<_, _> = pairs.iter().copied().collect();
        let text = serde_json::json!({"metadata": {"total_size": 3}, "weight_map": map}).to_string();
        fs::write(folder.join(INDEX_FILE), text).unwrap();
    }

    #[test]
    fn shards_are_found_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        shard(folder, "one.safetensors", &["a", "c", "unlisted"]);
        shard(folder, "two.safetensors", &["b", "c"]);
        index(folder, &[("a", "one.safetensors"), ("b", "two.safetensors"), ("c", "two.safetensors")]);
        let files = ModelFiles::open(folder).unwrap();
        assert_eq!(files.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        let mut seen = Vec::new();
        files
            .for_each(|name, info, bytes| {
                seen.push((name.to_owned(), info.nbytes, bytes.to_vec()));
                Ok(())
            })
            .unwrap();
        assert_eq!(
            seen,
            [
                ("a".to_owned(), 1, b"a".to_vec()),
                ("b".to_owned(), 1, b"b".to_vec()),
                ("c".to_owned(), 1, b"c".to_vec())
            ]
        );
        assert!(files.file_of("c").unwrap().path().ends_with("two.safetensors"));
        assert!(files.info("unlisted").is_err() && !files.contains("unlisted"));

        index(folder, &[("a", "one.safetensors"), ("b", "one.safetensors")]);
        let error = ModelFiles::open(folder).unwrap_err().to_string();
        assert!(error.contains("tensor b: ") && error.contains("in one.safetensors, but it is not"), "{error}");
        index(folder, &[("a", "three.safetensors")]);
        let error = ModelFiles::open(folder).unwrap_err().to_string();
        assert!(error.contains("lists three.safetensors, but the file is missing"), "{error}");
        for outside in ["../one.safetensors", "/etc/passwd", "..", ""] {
            index(folder, &[("a", outside)]);
            assert!(ModelFiles::open(folder).unwrap_err().to_string().contains("no plain file name"), "{outside}");
        }
        index(folder, &[]);
        assert!(ModelFiles::open(folder).unwrap_err().to_string().contains("lists no tensors"));
        fs::write(folder.join(INDEX_FILE), "{").unwrap();
        assert!(ModelFiles::open(folder).unwrap_err().to_string().contains("index cannot be read"));
    }

    #[test]
    fn a_folder_without_weights_says_what_it_has_instead() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert!(ModelFiles::open(folder).unwrap_err().to_string().contains("neither model.safetensors"));
        fs::write(folder.join("pytorch_model.bin"), "x").unwrap();
        assert!(
            ModelFiles::open(folder)
                .unwrap_err()
                .to_string()
                .contains("pytorch_model.bin is here, which is a Python pickle")
        );
        fs::write(folder.join("adapter_model.safetensors"), "x").unwrap();
        assert!(ModelFiles::open(folder).unwrap_err().to_string().contains("adapter folder"));
        assert!(matches!(ModelFiles::open(folder.join("absent")), Err(Error::Io { .. })));
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

    #[test]
    fn reads_real_checkpoints() {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/models");
        let folders = ["stories260K-hf", "stories260K-bnb-4bit", "stories260K-bnb-4bit-f32"];
        let mut left_out = 0;
        for folder in folders {
            let folder = models.join(folder);
            if !folder.exists() {
                left_out += 1;
                continue;
            }
            let bytes = fs::read(folder.join(SINGLE_FILE)).unwrap();
            let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let ours = ModelFiles::open(&folder).unwrap();
            assert_eq!(ours.names().count(), theirs.len());
            ours.for_each(|name, info, bytes| {
                let view = theirs.tensor(name).unwrap();
                assert_eq!((info.dtype, &info.shape[..], bytes), (view.dtype(), view.shape(), view.data()));
                Ok(())
            })
            .unwrap();
        }
        if left_out > 0 {
            println!("left out {left_out} cases: shared data not found");
        }
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
