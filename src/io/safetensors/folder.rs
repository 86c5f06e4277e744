//! A model's folder: its weights in one file or several, found by name.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use half::bf16;
use serde::Deserialize;

use super::{TensorFile, TensorInfo};
use crate::error::{Error, Result};

/// The one-file form of a model's weights.
const SINGLE_FILE: &str = "model.safetensors";
/// The list of files of a model in several.
const INDEX_FILE: &str = "model.safetensors.index.json";

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

    use std::fs;

    use super::super::{Dtype, write};
    use super::*;

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
}
