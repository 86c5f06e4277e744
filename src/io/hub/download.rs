//! One file from the hub into the cache: resumed, checked, locked, and then linked into its snapshot.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use ureq::Response;

use super::http::{Attempt, Client, Failure, Follow};
use super::{Events, HubEvent, is_plain_name};
use crate::error::{Error, Result};
use crate::io::atomic::hash_reader;
use crate::io::os;

/// How much is read between two calls of the progress callback.
const CHUNK_BYTES: usize = 256 << 10;

/// A file as the hub describes it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    url: String,
    /// The blob's name: the SHA-256 of a large file, git's hash of a small one.
    etag: String,
    /// `None`: the hub does not say.
    pub(super) size: Option<u64>,
}

impl RemoteFile {
    /// Asks the hub for a file's hash and size. The answer may be a redirect to a store; its headers tell both already.
    pub(super) fn ask(client: &Client, name: &str, url: String, events: &mut Events<'_>) -> Attempt<Self> {
        let mut retry = client.retry();
        let response = loop {
            match client.send("HEAD", &url, &[], Follow::WithinHub) {
                Ok(response) => break response,
                Err(failure) => retry.wait(failure, &mut || events(&HubEvent::Waiting))?,
            }
        };
        let is_redirect = (300..400).contains(&response.status());
        let etag = response.header("X-Linked-Etag").or_else(|| response.header("ETag").filter(|_| !is_redirect));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"')).unwrap_or_default();
        if !is_plain_name(etag) {
            return Err(Failure::Final(
                client.error(format!("the hub does not tell the hash of {name}; check HF_ENDPOINT")),
            ));
        }
        let size =
            response.header("X-Linked-Size").or_else(|| response.header("Content-Length").filter(|_| !is_redirect));
        let size = size.and_then(|text| text.trim().parse().ok());
        let etag = etag.to_owned();
        Ok(Self { name: name.to_owned(), url, etag, size })
    }

    /// The SHA-256 of the content, where the hub tells it.
    fn sha256(&self) -> Option<&str> {
        (self.etag.len() == 64 && self.etag.chars().all(|c| c.is_ascii_hexdigit())).then_some(&self.etag)
    }

    fn partial(&self, blobs: &Path) -> PathBuf {
        blobs.join(format!("{}.incomplete", self.etag))
    }

    /// What is still to be downloaded.
    pub(super) fn missing_bytes(&self, blobs: &Path) -> u64 {
        if self.is_whole(&blobs.join(&self.etag)) {
            return 0;
        }
        let here = fs::metadata(self.partial(blobs)).map_or(0, |meta| meta.len());
        self.size.unwrap_or(0).saturating_sub(here)
    }

    /// Whether the blob is there in its full length. Its content was checked when it was downloaded.
    fn is_whole(&self, blob: &Path) -> bool {
        fs::metadata(blob).is_ok_and(|meta| self.size.is_none_or(|size| meta.len() == size))
    }

    /// Brings the file into `blobs/` of the repository's folder and returns its path there. `on_bytes` is called with
    /// the number of the file's bytes that are here, also while waiting.
    pub(super) fn download(
        &self,
        client: &Client,
        cache: &Path,
        repo_folder: &str,
        on_bytes: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Attempt<PathBuf> {
        let blobs = cache.join(repo_folder).join("blobs");
        let blob = blobs.join(&self.etag);
        // The place and kind of lock of `huggingface_hub`, so that our processes and its wait for each other.
        let locks = cache.join(".locks").join(repo_folder);
        let lock = Lock::acquire(&locks, &self.etag, &mut || on_bytes(0))?;
        if self.is_whole(&blob) {
            return Ok(blob); // another process was faster
        }
        let partial = match lock {
            Lock::Held(_) => self.partial(&blobs),
            // Without locks every process writes a file of its own, and none is resumed.
            Lock::Unsupported => blobs.join(format!("{}.{}.incomplete", self.etag, std::process::id())),
        };
        self.fill(client, &partial, on_bytes)?;
        os::rename(&partial, &blob).map_err(|source| Error::io(&blob, source))?;
        os::fsync_dir(&blobs).map_err(|source| Error::io(&blobs, source))?;
        Ok(blob)
    }

    /// Downloads into `partial` from where it ends, until length and hash are right.
    fn fill(&self, client: &Client, partial: &Path, on_bytes: &mut dyn FnMut(u64) -> Result<()>) -> Attempt<()> {
        let io_error = |source| Failure::Final(Error::io(partial, source));
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(partial).map_err(io_error)?;
        let mut here = file.metadata().map_err(io_error)?.len();
        let mut best = here;
        let mut is_second_attempt = false;
        let mut retry = client.retry();
        loop {
            if self.size.is_some_and(|size| here > size) {
                here = 0; // it cannot be the start of this file
            }
            let outcome = if self.size == Some(here) {
                Ok(())
            } else {
                self.transfer(client, (partial, &file), &mut here, on_bytes)
            };
            if here > best {
                best = here;
                retry.reset();
            }
            match outcome {
                Ok(()) => {}
                Err(failure) => {
                    retry.wait(failure, &mut || on_bytes(here))?;
                    continue;
                }
            }
            file.set_len(here).and_then(|()| os::fsync_file(&file)).map_err(io_error)?;
            let Some(expected) = self.sha256() else { return Ok(()) };
            let (_, found) = hash_reader(File::open(partial).map_err(io_error)?).map_err(io_error)?;
            if found == expected.to_ascii_lowercase() {
                return Ok(());
            }
            // A damaged partial file of an earlier run gets one fresh start; a damaged download is an error.
            file.set_len(0).map_err(io_error)?;
            if is_second_attempt {
                let _ = fs::remove_file(partial);
                return Err(Failure::Final(client.error(format!(
                    "{} arrived with SHA-256 {found}, but the hub promises {expected}; a proxy or the disk may change it",
                    self.name
                ))));
            }
            is_second_attempt = true;
            here = 0;
        }
    }

    /// One request for the bytes from `*here` on, which are written as they come; `*here` follows.
    fn transfer(
        &self,
        client: &Client,
        (partial, file): (&Path, &File),
        here: &mut u64,
        on_bytes: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Attempt<()> {
        let range = format!("bytes={here}-");
        let headers = [("Range", range.as_str())];
        let response = match client.send("GET", &self.url, if *here > 0 { &headers } else { &[] }, Follow::All) {
            Err(Failure::BadRange) => {
                *here = 0; // what is here is not the start of this file
                return Err(Failure::BadRange);
            }
            other => other?,
        };
        // A 200 means the whole file again, whatever was asked for.
        *here = if response.status() == 206 { self.range_start(client, &response, *here)? } else { 0 };
        let promised = response.header("Content-Length").and_then(|text| text.trim().parse::<u64>().ok());
        let end = promised.map(|length| *here + length);
        if let (Some(end), Some(size)) = (end, self.size)
            && end != size
        {
            let detail = format!("{} would have {end} bytes, the hub promised {size}", self.name);
            *here = 0;
            return Err(Failure::transient(detail));
        }

        let mut reader = response.into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let length = match reader.read(&mut chunk) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(Failure::transient(format!("the transfer of {} broke off: {error}", self.name)));
                }
            };
            os::write_all_at(file, &chunk[..length], *here).map_err(|source| Error::io(partial, source))?;
            *here += length as u64;
            on_bytes(*here)?;
        }
        match self.size.or(end) {
            Some(expected) if *here != expected => {
                Err(Failure::transient(format!("the transfer of {} ended after {here} of {expected} bytes", self.name)))
            }
            _ => Ok(()),
        }
    }

    /// Where a 206 answer really starts; anything but what was asked for means from the beginning.
    fn range_start(&self, client: &Client, response: &Response, asked: u64) -> Attempt<u64> {
        let start = response
            .header("Content-Range")
            .and_then(|text| text.trim().strip_prefix("bytes ")?.split('-').next()?.trim().parse::<u64>().ok());
        match start {
            Some(start) if start <= asked => Ok(start),
            _ => {
                Err(Failure::Final(client.error(format!("the hub sent another part of {} than asked for", self.name))))
            }
        }
    }
}

/// The right to write a blob, given back when dropped or when the process dies.
enum Lock {
    Held(#[expect(dead_code, reason = "held for its lock")] File),
    /// This file system has no locks.
    Unsupported,
}

impl Lock {
    /// Waits for the lock, calling `tick` ten times a second.
    fn acquire(folder: &Path, name: &str, tick: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        let path = folder.join(format!("{name}.lock"));
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|source| Error::io(&path, source))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self::Held(file)),
                Err(fs::TryLockError::WouldBlock) => {
                    tick()?;
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
                Err(fs::TryLockError::Error(_)) => return Ok(Self::Unsupported),
            }
        }
    }
}

/// Makes `pointer` (in a snapshot) stand for `blob`: a relative link; where links cannot be made, a copy.
pub(super) fn link_into_snapshot(blob: &Path, pointer: &Path) -> Result<()> {
    let error = |source| Error::io(pointer, source);
    if fs::symlink_metadata(pointer).is_ok() {
        if pointer.exists() {
            return Ok(()); // another process was faster
        }
        fs::remove_file(pointer).map_err(error)?; // a link to a blob that was removed
    }
    #[cfg(unix)]
    if let Some(name) = blob.file_name() {
        // snapshots/<commit>/<file> -> ../../blobs/<etag>
        match std::os::unix::fs::symlink(Path::new("../../blobs").join(name), pointer) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(_) => {} // a file system without links
        }
    }
    if fs::hard_link(blob, pointer).is_ok() {
        return Ok(());
    }
    let copy = crate::io::atomic::AtomicFile::create(pointer)?;
    let mut from = File::open(blob).map_err(|source| Error::io(blob, source))?;
    io::copy(&mut from, &mut copy.file()).map_err(error)?;
    copy.commit()
}
