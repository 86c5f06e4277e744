//! Files and folders that are either there whole or not at all, whenever the process dies and whatever the disk does.
//!
//! Everything is written under a temporary name beside its destination, synced, and renamed. Temporary names carry the
//! process that made them, so that [`sweep_stale`] can remove what a killed one left without touching a living one's.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::io::os::{self, ProcessTag};

/// The first part of every temporary name.
const TEMP_PREFIX: &str = ".tmp-";

/// Tells apart the temporaries of one process.
static SERIAL: AtomicU64 = AtomicU64::new(0);

/// `<prefix><name>-<host>-<pid>-<started>-<serial>`, all numbers in hexadecimal.
fn tagged_name(prefix: &str, name: &str) -> String {
    let ProcessTag { host, pid, started } = ProcessTag::current();
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}{name}-{host:08x}-{pid:x}-{started:x}-{serial:x}")
}

/// The folder and the name of a destination. A link is followed, so that what it points to is replaced, not the link.
fn split_destination(path: &Path) -> Result<(PathBuf, String)> {
    let is_link = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_symlink());
    let resolved = if is_link { fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()) } else { path.to_owned() };
    let Some(name) = resolved.file_name() else {
        return Err(Error::io(
            path,
            io::Error::new(io::ErrorKind::InvalidInput, "a path that ends in a name is needed"),
        ));
    };
    let Some(name) = name.to_str() else {
        return Err(Error::io(path, io::Error::new(io::ErrorKind::InvalidInput, "the name is not valid UTF-8")));
    };
    let parent = match resolved.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name.to_owned()))
}

/// A file under a temporary name; [`AtomicFile::commit`] gives it its own. Dropped before, it is removed.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temp: PathBuf,
    parent: PathBuf,
    destination: PathBuf,
    is_committed: bool,
}

impl AtomicFile {
    /// Opens an empty temporary file beside `path`, whose folder must exist.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let (parent, name) = split_destination(path.as_ref())?;
        let destination = parent.join(&name);
        if destination.is_dir() {
            return Err(Error::io(&destination, io::Error::from(io::ErrorKind::IsADirectory)));
        }
        let temp = parent.join(tagged_name(TEMP_PREFIX, &name));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&temp)
            .map_err(|source| Error::io(&destination, source))?;
        let this = Self { file, temp, parent, destination, is_committed: false };
        if let Ok(old) = fs::metadata(&this.destination) {
            // A replaced file keeps its permissions; where they cannot be set, the new file's own will do.
            let _ = this.file.set_permissions(old.permissions());
        }
        Ok(this)
    }

    /// The open temporary file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the file will be.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Syncs the file, renames it to its destination and syncs the folder.
    ///
    /// # Errors
    /// [`Error::Io`]; the temporary file is then removed and what was at the destination stays.
    pub fn commit(mut self) -> Result<()> {
        os::fsync_file(&self.file).map_err(|source| Error::io(&self.destination, source))?;
        os::rename(&self.temp, &self.destination).map_err(|source| Error::io(&self.destination, source))?;
        self.is_committed = true;
        os::fsync_dir(&self.parent).map_err(|source| Error::io(&self.parent, source))
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.is_committed {
            // Nothing more can be done about a temporary that cannot be removed; `sweep_stale` will meet it again.
            let _ = fs::remove_file(&self.temp);
        }
    }
}

/// Writes `bytes` to `path` so that a reader, and whoever comes after a crash, sees the old file or the new one.
///
/// # Errors
/// [`Error::Io`]; the old file then stays as it was and nothing else is left behind.
pub fn write_file(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let file = AtomicFile::create(path)?;
    os::write_all_at(file.file(), bytes, 0).map_err(|source| Error::io(file.destination(), source))?;
    file.commit()
}
