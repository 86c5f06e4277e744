//! Files and folders that are either there whole or not at all, whenever the process dies and whatever the disk does.
//!
//! Everything is written under a temporary name beside its destination, synced, and renamed. Temporary names carry the
//! process that made them, so that [`sweep_stale`] can remove what a killed one left without touching a living one's.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

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

// ---------------------------------------------------------------------------------------------------------------------
// Folders
// ---------------------------------------------------------------------------------------------------------------------

/// The file whose presence, last of all, says that a folder is complete.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The version of [`Manifest`] this crate writes and reads.
const FORMAT_VERSION: u32 = 1;
/// The first part of the name a replaced folder has until it is removed.
const REPLACED_PREFIX: &str = ".old-";
/// Temporaries of other machines are removed when nothing in them has changed for this long: whether their process
/// still lives cannot be asked.
const FOREIGN_TEMP_MAX_AGE: Duration = Duration::from_hours(24);

/// What a complete folder holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this format.
    pub format_version: u32,
    /// The optimizer step, if the folder is of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Every file, by name.
    pub files: Vec<ManifestEntry>,
}

/// One file of a [`Manifest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestEntry {
    /// The path inside the folder, with `/` between its parts.
    pub name: String,
    /// The length in bytes.
    pub size: u64,
    /// The SHA-256 of the content, in lower-case hexadecimal.
    pub sha256: String,
}

/// Whether a folder is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirState {
    /// Every file is there with the size and the hash that the manifest tells.
    Complete(Manifest),
    /// Something is missing or differs.
    Incomplete {
        /// What, as a sentence for the user.
        reason: String,
    },
}

/// A folder under a temporary name; [`AtomicDir::commit`] gives it its own. Dropped before, it is removed.
#[derive(Debug)]
pub struct AtomicDir {
    temp: PathBuf,
    parent: PathBuf,
    name: String,
    is_committed: bool,
}

impl AtomicDir {
    /// Creates an empty temporary folder beside `final_path`, and the folders above it.
    ///
    /// # Errors
    /// [`Error::Io`], also when `final_path` is a file.
    pub fn create(final_path: impl AsRef<Path>) -> Result<Self> {
        let (parent, name) = split_destination(final_path.as_ref())?;
        let destination = parent.join(&name);
        if destination.is_file() {
            return Err(Error::io(&destination, io::Error::from(io::ErrorKind::NotADirectory)));
        }
        fs::create_dir_all(&parent).map_err(|source| Error::io(&parent, source))?;
        let temp = parent.join(tagged_name(TEMP_PREFIX, &name));
        fs::create_dir(&temp).map_err(|source| Error::io(&destination, source))?;
        Ok(Self { temp, parent, name, is_committed: false })
    }

    /// The temporary folder, to write files into.
    pub fn path(&self) -> &Path {
        &self.temp
    }

    /// Syncs every file, writes the manifest last, and renames the folder to its destination. A folder there is
    /// replaced: in one step where the system can, else it is moved aside first and [`sweep_stale`] moves it back if
    /// the process dies in between.
    ///
    /// # Errors
    /// [`Error::Io`]; the temporary folder is then removed and what was at the destination stays.
    pub fn commit(mut self, step: Option<u64>) -> Result<()> {
        let manifest = self.sync_files(step)?;
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| {
            Error::io(&self.temp, io::Error::other(format!("the manifest cannot be written: {error}")))
        })?;
        test_hook::reached("files synced");
        write_file(self.temp.join(MANIFEST_FILE), &text)?;
        test_hook::reached("manifest written");

        let destination = self.parent.join(&self.name);
        let replaced = self.move_into_place(&destination).map_err(|source| Error::io(&destination, source))?;
        self.is_committed = true;
        os::fsync_dir(&self.parent).map_err(|source| Error::io(&self.parent, source))?;
        test_hook::reached("renamed");
        if let Some(replaced) = replaced {
            // The new folder is in place; an old one that cannot be removed is no reason to fail.
            let _ = fs::remove_dir_all(replaced);
        }
        Ok(())
    }

    /// Syncs every file and folder below the temporary folder, and lists them.
    fn sync_files(&self, step: Option<u64>) -> Result<Manifest> {
        let mut files = Vec::new();
        let mut folders = vec![self.temp.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(|source| Error::io(&folder, source))? {
                let path = entry.map_err(|source| Error::io(&folder, source))?.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let Some(name) = slash_name(&self.temp, &path).filter(|name| name != MANIFEST_FILE) else {
                    let problem = "a file of this name cannot be in an atomic folder";
                    return Err(Error::io(&path, io::Error::new(io::ErrorKind::InvalidInput, problem)));
                };
                let file = File::open(&path).map_err(|source| Error::io(&path, source))?;
                os::fsync_file(&file).map_err(|source| Error::io(&path, source))?;
                let (size, sha256) = hash_reader(&file).map_err(|source| Error::io(&path, source))?;
                files.push(ManifestEntry { name, size, sha256 });
            }
            os::fsync_dir(&folder).map_err(|source| Error::io(&folder, source))?;
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Manifest { format_version: FORMAT_VERSION, step, files })
    }

    /// Puts the temporary folder at its destination; returns the folder that was there, now under another name.
    fn move_into_place(&self, destination: &Path) -> io::Result<Option<PathBuf>> {
        if fs::symlink_metadata(destination).is_err() {
            os::rename(&self.temp, destination)?;
            return Ok(None);
        }
        if test_hook::can_exchange() && os::exchange(&self.temp, destination)? {
            return Ok(Some(self.temp.clone()));
        }
        let aside = self.parent.join(tagged_name(REPLACED_PREFIX, &self.name));
        os::rename(destination, &aside)?;
        test_hook::reached("moved aside");
        if let Err(error) = os::rename(&self.temp, destination) {
            os::rename(&aside, destination)?;
            return Err(error);
        }
        Ok(Some(aside))
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.is_committed && !test_hook::is_crashed() {
            // Nothing more can be done about a temporary that cannot be removed; `sweep_stale` will meet it again.
            let _ = fs::remove_dir_all(&self.temp);
        }
    }
}

/// The path of `path` inside `root` with `/` between its parts; `None` when it is not valid UTF-8.
fn slash_name(root: &Path, path: &Path) -> Option<String> {
    let parts: Option<Vec<&str>> =
        path.strip_prefix(root).ok()?.components().map(|part| part.as_os_str().to_str()).collect();
    parts.map(|parts| parts.join("/"))
}

/// The number of bytes to the end of `reader`, and their SHA-256 in hexadecimal.
pub(crate) fn hash_reader(mut reader: impl Read) -> io::Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let length = match reader.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&chunk[..length]);
        size += length as u64;
    }
    Ok((size, hex(&hasher.finalize())))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

/// Checks a folder against its manifest: every file there, with its size and its hash. Files that the manifest does not
/// list are no fault.
///
/// # Errors
/// [`Error::Io`] when something is there but cannot be read; a folder that is missing or incomplete is an answer.
pub fn verify_dir(path: impl AsRef<Path>) -> Result<DirState> {
    let path = path.as_ref();
    let incomplete = |reason: String| Ok(DirState::Incomplete { reason });
    if !path.is_dir() {
        return incomplete("there is no such folder".to_owned());
    }
    let manifest_path = path.join(MANIFEST_FILE);
    let text = match fs::read(&manifest_path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return incomplete(format!("{MANIFEST_FILE} is missing, so the folder was never finished"));
        }
        Err(source) => return Err(Error::io(manifest_path, source)),
    };
    let manifest: Manifest = match serde_json::from_slice(&text) {
        Ok(manifest) => manifest,
        Err(error) => return incomplete(format!("{MANIFEST_FILE} cannot be read: {error}")),
    };
    if manifest.format_version != FORMAT_VERSION {
        return incomplete(format!(
            "{MANIFEST_FILE} has format version {}, this version of rustune reads {FORMAT_VERSION}",
            manifest.format_version
        ));
    }
    for entry in &manifest.files {
        if let Some(reason) = check_entry(path, entry)? {
            return incomplete(reason);
        }
    }
    Ok(DirState::Complete(manifest))
}

/// What is wrong with one file of a manifest.
fn check_entry(folder: &Path, ManifestEntry { name, size, sha256 }: &ManifestEntry) -> Result<Option<String>> {
    if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(Some(format!("{MANIFEST_FILE} names {name:?}, which is outside of the folder")));
    }
    let path = folder.join(name);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(format!("{name} is missing"))),
        Err(source) => return Err(Error::io(path, source)),
    };
    let found = file.metadata().map_err(|source| Error::io(&path, source))?.len();
    if found != *size {
        return Ok(Some(format!("{name} has {found} bytes, expected {size}")));
    }
    let (_, found) = hash_reader(&file).map_err(|source| Error::io(&path, source))?;
    Ok((found != *sha256).then(|| format!("the content of {name} has changed (its SHA-256 differs)")))
}

// ---------------------------------------------------------------------------------------------------------------------
// What killed processes leave
// ---------------------------------------------------------------------------------------------------------------------

/// A name made by [`tagged_name`], taken apart.
fn parse_tagged(file_name: &str, prefix: &str) -> Option<(String, ProcessTag)> {
    let mut parts = file_name.strip_prefix(prefix)?.rsplitn(5, '-');
    let _serial = u64::from_str_radix(parts.next()?, 16).ok()?;
    let started = u64::from_str_radix(parts.next()?, 16).ok()?;
    let pid = u32::from_str_radix(parts.next()?, 16).ok()?;
    let host = u32::from_str_radix(parts.next()?, 16).ok()?;
    Some((parts.next()?.to_owned(), ProcessTag { host, pid, started }))
}

/// Removes the temporaries in `parent` whose process is dead, and puts back a folder that was moved aside when the
/// process died before its successor was in place. Returns the paths removed. A missing `parent` has none.
///
/// Temporaries of another machine (a shared or synchronised folder) go when they are a day old.
///
/// # Errors
/// [`Error::Io`] when `parent` cannot be listed or a temporary cannot be removed.
pub fn sweep_stale(parent: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let parent = parent.as_ref();
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::io(parent, source)),
    };
    let names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let mut removed = Vec::new();
    // Folders moved aside first: what they were replaced by may still be one of the temporaries.
    for prefix in [REPLACED_PREFIX, TEMP_PREFIX] {
        for file_name in &names {
            let Some((name, tag)) = parse_tagged(file_name, prefix) else { continue };
            let path = parent.join(file_name);
            if !is_stale(&path, &tag) {
                continue;
            }
            let destination = parent.join(name);
            if prefix == REPLACED_PREFIX && fs::symlink_metadata(&destination).is_err() {
                os::rename(&path, &destination).map_err(|source| Error::io(&destination, source))?;
                continue;
            }
            let outcome = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match outcome {
                Ok(()) => removed.push(path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {} // another process sweeps, too
                Err(source) => return Err(Error::io(path, source)),
            }
        }
    }
    Ok(removed)
}

fn is_stale(path: &Path, tag: &ProcessTag) -> bool {
    tag.is_dead() || (tag.host != ProcessTag::current().host && age(path).is_some_and(|age| age > FOREIGN_TEMP_MAX_AGE))
}

/// How long ago the youngest of a folder and its files was changed.
fn age(path: &Path) -> Option<Duration> {
    let inside = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    std::iter::once(path.to_owned())
        .chain(inside)
        .filter_map(|path| fs::metadata(path).ok()?.modified().ok()?.elapsed().ok())
        .min()
}

/// Lets tests stop the process (in effect) at every point of a commit, and take the exchange of folders away.
mod test_hook {
    #[cfg(test)]
    pub(super) use super::tests::hook::{can_exchange, is_crashed, reached};

    #[cfg(not(test))]
    pub(super) fn reached(_point: &'static str) {}
    #[cfg(not(test))]
    pub(super) fn can_exchange() -> bool {
        true
    }
    #[cfg(not(test))]
    pub(super) fn is_crashed() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

    use std::process::{Command, Stdio};

    use super::*;

    /// A "crash" is a panic that no destructor cleans up after, as if the process were killed at that point.
    pub(super) mod hook {
        use std::cell::Cell;

        thread_local! {
            static CRASH_AT: Cell<Option<&'static str>> = const { Cell::new(None) };
            static HAS_EXCHANGE: Cell<bool> = const { Cell::new(true) };
            static CRASHED: Cell<bool> = const { Cell::new(false) };
        }

        pub(in super::super) fn reached(point: &'static str) {
            if CRASH_AT.get() == Some(point) {
                CRASHED.set(true);
                std::panic::resume_unwind(Box::new(point)); // without the message of a real panic
            }
        }
        pub(in super::super) fn can_exchange() -> bool {
            HAS_EXCHANGE.get()
        }
        pub(in super::super) fn is_crashed() -> bool {
            CRASHED.get()
        }

        /// Runs `f`, which "dies" at `point`; says whether it got there.
        pub(super) fn crash_at(point: &'static str, has_exchange: bool, f: impl FnOnce()) -> bool {
            CRASH_AT.set(Some(point));
            HAS_EXCHANGE.set(has_exchange);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
            CRASH_AT.set(None);
            HAS_EXCHANGE.set(true);
            CRASHED.set(false);
            outcome.is_err()
        }
    }

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Writes a folder of three files whose content tells its generation.
    fn write_generation(path: &Path, generation: u8) -> Result<()> {
        let folder = AtomicDir::create(path)?;
        write_file(folder.path().join("weights"), &vec![generation; 50_000])?;
        fs::create_dir(folder.path().join("deep")).map_err(|source| Error::io(path, source))?;
        write_file(folder.path().join("deep/state.json"), format!("{{\"n\": {generation}}}").as_bytes())?;
        write_file(folder.path().join("empty"), b"")?;
        folder.commit(Some(u64::from(generation)))
    }

    fn reason(path: &Path) -> String {
        match verify_dir(path).unwrap() {
            DirState::Incomplete { reason } => reason,
            DirState::Complete(_) => "complete".to_owned(),
        }
    }

    /// The generation of a complete folder, which must be the same in all its files.
    fn generation(path: &Path) -> Option<u64> {
        match verify_dir(path).unwrap() {
            DirState::Incomplete { .. } => None,
            DirState::Complete(manifest) => {
                let step = manifest.step.unwrap();
                assert_eq!(fs::read(path.join("weights")).unwrap(), vec![step as u8; 50_000]);
                Some(step)
            }
        }
    }

    /// Renames every temporary as if a process that is now dead had made it.
    fn disown(folder: &Path) {
        let this = ProcessTag::current();
        for name in entries(folder) {
            let mine = format!("-{:08x}-{:x}-{:x}-", this.host, this.pid, this.started);
            let dead = format!("-{:08x}-{:x}-{:x}-", this.host, this.pid, this.started + 1);
            if name.contains(&mine) {
                fs::rename(folder.join(&name), folder.join(name.replace(&mine, &dead))).unwrap();
            }
        }
    }

    #[test]
    fn files_are_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.json");
        write_file(&path, b"old").unwrap();
        write_file(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(entries(folder.path()), ["f.json"]);

        let half_written = AtomicFile::create(&path).unwrap();
        os::write_all_at(half_written.file(), b"broken", 0).unwrap();
        assert_eq!(entries(folder.path()).len(), 2);
        drop(half_written);
        assert_eq!(entries(folder.path()), ["f.json"]);
        assert_eq!(fs::read(&path).unwrap(), b"new");

        assert!(matches!(write_file(folder.path().join("no/f"), b"x"), Err(Error::Io { .. })));
        assert!(matches!(write_file(folder.path(), b"x"), Err(Error::Io { .. })));
        assert!(matches!(write_file("/", b"x"), Err(Error::Io { .. })));
        assert_eq!(entries(folder.path()), ["f.json"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_permissions_of_a_replaced_file_stay() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real"), folder.path().join("link"));
        fs::write(&real, "old").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write_file(&link, b"new").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().file_type().is_symlink());
        assert_eq!(fs::read(&real).unwrap(), b"new");
        assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn a_folder_is_complete_or_says_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("above").join("checkpoint-7");
        assert_eq!(reason(&path), "there is no such folder");
        write_generation(&path, 7).unwrap();
        assert_eq!(generation(&path), Some(7));
        assert_eq!(entries(&folder.path().join("above")), ["checkpoint-7"]);
        assert_eq!(entries(&path), ["deep", "empty", "manifest.json", "weights"]);
        let DirState::Complete(manifest) = verify_dir(&path).unwrap() else { unreachable!() };
        assert_eq!(
            manifest.files.iter().map(|f| &f.name[..]).collect::<Vec<_>>(),
            ["deep/state.json", "empty", "weights"]
        );
        assert_eq!(manifest.files[1].sha256, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");

        fs::write(path.join("README"), "added by hand").unwrap();
        assert_eq!(generation(&path), Some(7));
        let state = path.join("deep/state.json");
        fs::write(&state, "{\"n\": 8}").unwrap();
        assert_eq!(reason(&path), "the content of deep/state.json has changed (its SHA-256 differs)");
        fs::write(&state, "{\"n\"").unwrap();
        assert_eq!(reason(&path), "deep/state.json has 4 bytes, expected 8");
        fs::remove_file(&state).unwrap();
        assert_eq!(reason(&path), "deep/state.json is missing");

        let text = fs::read_to_string(path.join(MANIFEST_FILE)).unwrap();
        fs::write(path.join(MANIFEST_FILE), &text[..text.len() / 2]).unwrap();
        assert!(reason(&path).starts_with("manifest.json cannot be read"));
        fs::write(path.join(MANIFEST_FILE), text.replace("deep/state.json", "../../secret")).unwrap();
        assert!(reason(&path).contains("outside of the folder"));
        fs::write(path.join(MANIFEST_FILE), text.replace("\"format_version\": 1", "\"format_version\": 2")).unwrap();
        assert!(reason(&path).contains("format version 2, this version of rustune reads 1"));
        fs::remove_file(path.join(MANIFEST_FILE)).unwrap();
        assert!(reason(&path).contains("never finished"));
    }

    #[test]
    fn a_folder_is_replaced_and_an_abandoned_one_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c");
        for (number, has_exchange) in [(1, true), (2, true), (3, false)] {
            assert!(!hook::crash_at("nowhere", has_exchange, || write_generation(&path, number).unwrap()));
            assert_eq!(generation(&path), Some(u64::from(number)));
            assert_eq!(entries(folder.path()), ["c"]);
        }
        let abandoned = AtomicDir::create(&path).unwrap();
        fs::write(abandoned.path().join("x"), "x").unwrap();
        drop(abandoned);
        let with_manifest = AtomicDir::create(&path).unwrap();
        fs::write(with_manifest.path().join(MANIFEST_FILE), "x").unwrap();
        assert!(with_manifest.commit(None).is_err());
        assert_eq!(entries(folder.path()), ["c"]);
        assert_eq!(generation(&path), Some(3));
        fs::write(folder.path().join("file"), "x").unwrap();
        assert!(matches!(AtomicDir::create(folder.path().join("file")), Err(Error::Io { .. })));
    }

    #[test]
    fn killed_at_any_point_the_old_or_the_new_folder_is_whole() {
        for point in ["files synced", "manifest written", "moved aside", "renamed"] {
            for has_exchange in [true, false] {
                for has_old in [true, false] {
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("c");
                    if has_old {
                        write_generation(&path, 1).unwrap();
                    }
                    let crashed = hook::crash_at(point, has_exchange, || write_generation(&path, 2).unwrap());
                    assert_eq!(crashed, point != "moved aside" || (has_old && !has_exchange), "{point}");
                    sweep_stale(folder.path()).unwrap(); // our own are not stale: nothing may happen yet
                    disown(folder.path());
                    sweep_stale(folder.path()).unwrap();
                    let expected = match (point, has_old) {
                        ("renamed", _) => Some(2),
                        ("moved aside", _) if !crashed => Some(2),
                        (_, true) => Some(1),
                        (_, false) => None,
                    };
                    assert_eq!(generation(&path), expected, "{point}, exchange {has_exchange}, old {has_old}");
                    assert_eq!(entries(folder.path()).len(), usize::from(expected.is_some()), "{point}");
                }
            }
        }
    }

    #[test]
    fn only_what_dead_processes_left_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let parent = folder.path();
        assert!(sweep_stale(parent.join("absent")).unwrap().is_empty());
        let this = ProcessTag::current();
        let name = |tag: &ProcessTag| format!(".tmp-my-run-{:08x}-{:x}-{:x}-0", tag.host, tag.pid, tag.started);
        let alive = name(&this);
        let foreign = name(&ProcessTag { host: this.host ^ 1, ..this.clone() });
        let old_foreign = name(&ProcessTag { host: this.host ^ 2, ..this.clone() });
        let dead = name(&ProcessTag { started: this.started + 1, ..this });
        for folder in [&alive, &foreign, &old_foreign] {
            fs::create_dir(parent.join(folder)).unwrap();
        }
        fs::write(parent.join(&dead), "a file").unwrap();
        fs::write(parent.join(&foreign).join("x"), "young").unwrap();
        let long_ago = std::time::SystemTime::now() - FOREIGN_TEMP_MAX_AGE * 2;
        for folder in [&foreign, &old_foreign] {
            File::open(parent.join(folder)).unwrap().set_modified(long_ago).unwrap();
        }
        for not_ours in [".tmp-x", ".tmp-a-b-c-d-e", ".tmp-1-2-3-4", "checkpoint-1", ".old-name"] {
            fs::create_dir(parent.join(not_ours)).unwrap();
        }
        let mut removed = sweep_stale(parent).unwrap();
        removed.sort();
        let mut expected = vec![parent.join(&old_foreign)];
        if cfg!(target_os = "linux") {
            expected.push(parent.join(&dead));
        }
        expected.sort();
        assert_eq!(removed, expected);
        assert!(parent.join(&alive).exists() && parent.join(&foreign).exists());
        assert_eq!(parse_tagged(&alive, TEMP_PREFIX).unwrap(), ("my-run".to_owned(), ProcessTag::current()));
    }

    /// The folder that `write_until_killed` writes to; set only in the processes that the next test starts.
    const KILL_ME: &str = "RUSTUNE_TEST_KILL_ME";

    /// The victim of the next test, which starts this very test in a process of its own.
    #[test]
    fn write_until_killed() {
        let Some(folder) = std::env::var_os(KILL_ME) else { return };
        let path = Path::new(&folder).join("c");
        for number in (1..=200).cycle() {
            write_generation(&path, number).unwrap();
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn killed_for_real_the_folder_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c");
        write_generation(&path, 1).unwrap();
        let mut left_behind = 0;
        for round in 0..20 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "io::atomic::tests::write_until_killed", "--nocapture"])
                .env(KILL_ME, folder.path())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            // Let it come to writing, then strike at a moment that differs from round to round.
            let started = std::time::Instant::now();
            while entries(folder.path()).len() < 2 && started.elapsed() < Duration::from_secs(20) {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_micros(round * 437));
            child.kill().unwrap();
            child.wait().unwrap();
            left_behind += entries(folder.path()).len() - 1;
            sweep_stale(folder.path()).unwrap();
            assert!(generation(&path).is_some(), "round {round}: {}", reason(&path));
            assert_eq!(entries(folder.path()), ["c"]);
        }
        assert!(left_behind > 0, "no kill hit a folder being written");
    }

    /// A file system of 1 MiB at `folder`, if this user may mount one; unmounted when dropped.
    struct SmallDisk<'a>(&'a Path);
    impl<'a> SmallDisk<'a> {
        fn mount(folder: &'a Path) -> Option<Self> {
            let status = Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
                .arg(folder)
                .stderr(Stdio::null())
                .status();
            status.is_ok_and(|status| status.success()).then_some(Self(folder))
        }
    }
    impl Drop for SmallDisk<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }

    #[test]
    fn a_full_disk_leaves_the_old_files_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let Some(disk) = SmallDisk::mount(folder.path()) else {
            println!("left out 1 case: a small file system cannot be mounted here");
            return;
        };
        let is_full =
            |error: &Error| matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull);
        let checkpoint = disk.0.join("c");
        write_generation(&checkpoint, 1).unwrap();
        write_file(disk.0.join("f"), b"old").unwrap();
        let before = entries(disk.0);

        assert!(is_full(&write_file(disk.0.join("f"), &vec![1; 2 << 20]).unwrap_err()));
        assert_eq!(fs::read(disk.0.join("f")).unwrap(), b"old");
        assert_eq!(entries(disk.0), before);

        // Filled to within 0, 4, 8 ... KiB, so that the disk is full at every stage of the commit in turn.
        let mut n_failed = 0;
        for spare in (0..96 << 10).step_by(4096) {
            let fill = disk.0.join("fill");
            let free = os::disk_free_bytes(disk.0).unwrap();
            fs::write(&fill, vec![0; (free as usize).saturating_sub(spare)]).unwrap();
            let before = generation(&checkpoint).unwrap();
            match write_generation(&checkpoint, 2) {
                Ok(()) => assert_eq!(generation(&checkpoint), Some(2)),
                Err(error) => {
                    assert!(is_full(&error), "{error}");
                    assert_eq!(generation(&checkpoint), Some(before));
                    n_failed += 1;
                }
            }
            fs::remove_file(&fill).unwrap();
            assert_eq!(entries(disk.0), ["c", "f"]);
        }
        assert!(n_failed > 10, "{n_failed}");
        assert_eq!(generation(&checkpoint), Some(2), "with room enough the last must have been written");
    }
}
