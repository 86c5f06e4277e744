//! One file written tensor by tensor, aside, in the layout of the reference implementation.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Serializer;
use serde::ser::SerializeMap;

use super::{Dtype, LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY, READ_BYTES, byte_length};
use crate::error::{Error, Result};
use crate::io::atomic::AtomicFile;
use crate::io::os;

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
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use super::super::tests::spec;
    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
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
}
