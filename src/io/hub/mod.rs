//! From a model's name to a folder with its files: a local folder, or a repository of the hub through its cache.
//!
//! The cache is the hub's own (`models--owner--name/{blobs,refs,snapshots}`), so that files which other programs have
//! downloaded are used and ours are used by them. hf-hub 0.5 gives the names of its folders and of the API's addresses
//! and the answer's type. The transfer is ours, over ureq 2, because hf-hub's cannot be made safe from the outside: it
//! appends whatever comes to a partial file (a 200 to a Range request corrupts it), checks neither length nor hash,
//! retries neither its metadata requests nor by status, shows no status or header of a failed one, knows only HF_HOME
//! and HF_ENDPOINT, and panics on a redirect it cannot parse.
//!
//! Start reading at [`resolve`]; `settings.rs` reads the environment, `http.rs` sends and retries, `download.rs` brings
//! one file safely into the cache.

mod download;
mod http;
mod settings;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::RepoInfo;
use hf_hub::{Repo, RepoType};

use self::download::RemoteFile;
use self::http::{Attempt, Client, Failure};
use self::settings::Settings;
use crate::error::{Error, Result};
use crate::io::{atomic, os};

/// How to find a repository. The default asks for the newest commit of `main` with the token of the environment.
#[derive(Clone, Default)]
pub struct HubOptions {
    /// A branch, tag or commit; `None`: `main`.
    pub revision: Option<String>,
    /// The access token; `None`: `HF_TOKEN`, else the file that `hf auth login` writes.
    pub token: Option<String>,
    /// The cache folder; `None`: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Never use the network, as `HF_HUB_OFFLINE=1` does.
    pub local_files_only: bool,
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("cache_dir", &self.cache_dir)
            .field("local_files_only", &self.local_files_only)
            .finish()
    }
}

/// What a caller hears while files are downloaded.
#[derive(Debug)]
#[non_exhaustive]
pub enum HubEvent<'a> {
    /// Bytes have come.
    Progress {
        /// The file they belong to.
        file: &'a str,
        /// The bytes of all files that are here.
        done_bytes: u64,
        /// The bytes of all files, as far as the hub tells them.
        total_bytes: u64,
    },
    /// Something the user should know; not an error.
    Warning(&'a str),
    /// Nothing has come for a tenth of a second: an occasion to stop.
    Waiting,
}

/// Hears every [`HubEvent`]; an error it returns stops the download and is returned unchanged.
pub type Events<'a> = dyn FnMut(&HubEvent<'_>) -> Result<()> + 'a;

/// The folder of a model: `model_name` itself when it is a local folder, else the snapshot of a hub repository, whose
/// missing files are downloaded first.
///
/// # Errors
/// [`Error::Hub`] when the name is neither, the repository has no weights we can read, access is refused, the network
/// fails, or a file does not arrive whole; [`Error::Config`] for an option or variable that cannot be used;
/// [`Error::Io`] when the cache cannot be written.
pub fn resolve(model_name: &str, options: &HubOptions) -> Result<PathBuf> {
    resolve_with(model_name, options, &mut |_| Ok(()))
}

/// As [`resolve`], telling `events` what happens.
///
/// # Errors
/// As [`resolve`], and whatever `events` returns.
pub fn resolve_with(model_name: &str, options: &HubOptions, events: &mut Events<'_>) -> Result<PathBuf> {
    if Path::new(model_name).is_dir() {
        return Ok(PathBuf::from(model_name));
    }
    let settings = Settings::resolve(options, &|name| std::env::var(name).ok())?;
    HubRepo::new(model_name, options.revision.as_deref(), settings)?.resolve(events)
}

/// One repository at one revision, and its place in the cache.
struct HubRepo {
    repo_id: String,
    repo: Repo,
    settings: Settings,
    client: Client,
    /// `<cache>/models--owner--name`.
    folder: PathBuf,
}

impl HubRepo {
    fn new(repo_id: &str, revision: Option<&str>, settings: Settings) -> Result<Self> {
        check_repo_id(repo_id)?;
        let revision = revision.unwrap_or("main");
        if !is_revision(revision) {
            return Err(Error::config("revision", revision, "a branch, tag or commit of the repository"));
        }
        let repo = Repo::with_revision(repo_id.to_owned(), RepoType::Model, revision.to_owned());
        let folder = settings.cache.join(repo.folder_name());
        let client = Client::new(&settings, repo_id, revision)?;
        Ok(Self { repo_id: repo_id.to_owned(), repo, settings, client, folder })
    }

    fn error(&self, problem: impl Into<String>) -> Error {
        Error::Hub { repo: self.repo_id.clone(), problem: problem.into() }
    }

    fn resolve(&self, events: &mut Events<'_>) -> Result<PathBuf> {
        let cached = self.cached_commit().map(|commit| self.snapshot(&commit));
        if self.settings.is_offline {
            return self.resolve_offline(cached);
        }
        if let Some(snapshot) = &cached
            && is_commit(self.repo.revision())
            && missing_file(snapshot).is_none()
        {
            return Ok(snapshot.clone()); // a commit never changes, so there is nothing to ask
        }
        match self.list_files(events) {
            Ok(info) => self.download_missing(&info, events),
            Err(Failure::Final(error)) => Err(error),
            Err(failure) => match cached.filter(|folder| missing_file(folder).is_none()) {
                Some(snapshot) => {
                    let warning = format!(
                        "{}: the hub cannot be reached ({failure}); using the files in the cache, which may not be the \
                         newest",
                        self.repo_id
                    );
                    events(&HubEvent::Warning(&warning))?;
                    Ok(snapshot)
                }
                None => Err(self.unreachable(&failure)),
            },
        }
    }

    fn unreachable(&self, failure: &Failure) -> Error {
        self.error(format!(
            "{} cannot be reached ({failure}) and the cache at {} does not have the model; check the network or the \
             proxy, or give the path of a local folder",
            self.settings.endpoint,
            self.settings.cache.display()
        ))
    }

    fn resolve_offline(&self, cached: Option<PathBuf>) -> Result<PathBuf> {
        let why = "downloads are turned off (local_files_only or HF_HUB_OFFLINE)";
        let Some(snapshot) = cached else {
            return Err(self.error(format!(
                "there is no such folder, revision {} of a repository of that name is not in the cache at {}, and {why}",
                self.repo.revision(),
                self.settings.cache.display()
            )));
        };
        match missing_file(&snapshot) {
            None => Ok(snapshot),
            Some(missing) => {
                Err(self.error(format!("{missing} is missing in the cache at {}, and {why}", snapshot.display())))
            }
        }
    }

    /// The commit that the revision meant when it was last asked for.
    fn cached_commit(&self) -> Option<String> {
        let revision = self.repo.revision();
        if is_commit(revision) && self.snapshot(revision).is_dir() {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        (is_plain_name(commit) && self.snapshot(commit).is_dir()).then(|| commit.to_owned())
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Asks the hub for the commit and the names of its files.
    fn list_files(&self, events: &mut Events<'_>) -> Attempt<RepoInfo> {
        let url = format!("{}/api/{}", self.settings.endpoint, self.repo.api_url());
        let text = self.client.get_text(&url, events)?;
        let info: RepoInfo = serde_json::from_str(&text).map_err(|error| {
            let endpoint = &self.settings.endpoint;
            Failure::Final(self.error(format!("{endpoint} did not answer as a hub does ({error}); check HF_ENDPOINT")))
        })?;
        if !is_plain_name(&info.sha) {
            return Err(Failure::Final(self.error("the hub answered with a commit that is no commit")));
        }
        Ok(info)
    }

    fn download_missing(&self, info: &RepoInfo, events: &mut Events<'_>) -> Result<PathBuf> {
        let snapshot = self.snapshot(&info.sha);
        let names: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let selection = Selection::of(&names).map_err(|problem| self.error(problem))?;

        self.fetch(&selection.small, &info.sha, events)?;
        let weights = match selection.weights {
            Weights::None => Vec::new(),
            Weights::File(name) => vec![name.to_owned()],
            Weights::Index => {
                let shards = index_shards(&snapshot).map_err(|problem| self.error(problem))?;
                if let Some(absent) = shards.iter().find(|shard| !names.contains(&shard.as_str())) {
                    return Err(self.error(format!("its {INDEX_FILE} lists {absent}, which the repository lacks")));
                }
                shards
            }
        };
        let weights: Vec<&str> = weights.iter().map(String::as_str).collect();
        self.fetch(&weights, &info.sha, events)?;

        // Last, so that a reference never points to a snapshot that was not whole once.
        let reference = self.folder.join("refs").join(self.repo.revision());
        if self.repo.revision() != info.sha && fs::read_to_string(&reference).ok().as_deref() != Some(&info.sha) {
            if let Some(parent) = reference.parent() {
                fs::create_dir_all(parent).map_err(|source| Error::io(parent, source))?;
            }
            atomic::write_file(&reference, info.sha.as_bytes())?;
        }
        Ok(snapshot)
    }

    /// Brings those of `names` into the snapshot that are not there yet.
    fn fetch(&self, names: &[&str], commit: &str, events: &mut Events<'_>) -> Result<()> {
        let snapshot = self.snapshot(commit);
        let mut files = Vec::new();
        for &name in names {
            if !snapshot.join(name).exists() {
                let url = format!("{}/{}/resolve/{commit}/{name}", self.settings.endpoint, self.repo.url());
                files.push(
                    RemoteFile::ask(&self.client, name, url, events).map_err(|failure| self.final_error(failure))?,
                );
            }
        }
        if files.is_empty() {
            return Ok(());
        }
        let blobs = self.folder.join("blobs");
        for folder in [&blobs, &snapshot] {
            fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        }
        let still_needed: u64 = files.iter().map(|file| file.missing_bytes(&blobs)).sum();
        if let Some(free) = os::disk_free_bytes(&blobs).filter(|&free| free < still_needed) {
            return Err(self.error(format!(
                "{still_needed} bytes are still to be downloaded, but the disk of {} has {free} free; free some, or set \
                 HF_HOME or cache_dir to a larger disk",
                self.settings.cache.display()
            )));
        }
        let total_bytes = files.iter().filter_map(|file| file.size).sum();
        let mut done_bytes = 0;
        for file in &files {
            let mut on_bytes = |file_bytes: u64| {
                events(&HubEvent::Progress { file: &file.name, done_bytes: done_bytes + file_bytes, total_bytes })
            };
            let blob = file.download(&self.client, &self.settings.cache, &self.repo.folder_name(), &mut on_bytes);
            let blob = blob.map_err(|failure| self.final_error(failure))?;
            done_bytes += fs::metadata(&blob).map_or(0, |meta| meta.len());
            download::link_into_snapshot(&blob, &snapshot.join(&file.name))?;
        }
        Ok(())
    }

    fn final_error(&self, failure: Failure) -> Error {
        match failure {
            Failure::Final(error) => error,
            failure => self.error(format!(
                "the download failed ({failure}); run it again to go on where it stopped, or check the network"
            )),
        }
    }
}

/// `name` or `owner/name` as the hub allows them; what looks like a path gets an error about a path.
fn check_repo_id(repo_id: &str) -> Result<()> {
    let is_part = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    let parts: Vec<&str> = repo_id.split('/').collect();
    if parts.len() <= 2 && parts.iter().all(|part| is_part(part)) && repo_id.len() <= 96 {
        return Ok(());
    }
    let problem = if Path::new(repo_id).exists() {
        "this is a file; give the folder that holds config.json and the weights"
    } else {
        "there is no such folder, and it is no name of a hub repository (owner/name) either"
    };
    Err(Error::Hub { repo: repo_id.to_owned(), problem: problem.to_owned() })
}

/// A branch, tag or commit that is safe as a path below `refs/` and in an address.
fn is_revision(revision: &str) -> bool {
    !revision.is_empty() && revision.len() <= 200 && revision.split('/').all(is_plain_name)
}

/// A file name that cannot leave its folder and means itself in an address.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
        && !name.starts_with('.')
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit())
}

// ---------------------------------------------------------------------------------------------------------------------
// Which files
// ---------------------------------------------------------------------------------------------------------------------

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// The small files a model or an adapter may have, besides its weights.
const SMALL_FILES: [&str; 13] = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    INDEX_FILE,
];

/// What of a repository is worth downloading.
#[derive(Debug, PartialEq, Eq)]
struct Selection<'a> {
    small: Vec<&'a str>,
    weights: Weights,
}

#[derive(Debug, PartialEq, Eq)]
enum Weights {
    /// A repository of which only the small files are of use, say a tokenizer's.
    None,
    File(&'static str),
    /// The files that the index lists, which must be read first.
    Index,
}

impl<'a> Selection<'a> {
    /// Only files at the top of the repository count; weights in pickles are never fetched.
    fn of(names: &[&'a str]) -> std::result::Result<Self, String> {
        let has = |name: &str| names.contains(&name);
        let weights = if has(SINGLE_FILE) {
            Weights::File(SINGLE_FILE)
        } else if has(INDEX_FILE) {
            Weights::Index
        } else if has(ADAPTER_FILE) {
            Weights::File(ADAPTER_FILE)
        } else {
            let is_foreign = |name: &&&str| {
                [".bin", ".pth", ".pt", ".gguf", ".ckpt", ".msgpack", ".h5", ".onnx"]
                    .iter()
                    .any(|end| name.ends_with(end))
            };
            match names.iter().find(is_foreign) {
                Some(foreign) => {
                    return Err(format!(
                        "the repository has no safetensors weights, only {foreign} and the like; look for a converted \
                         repository, or convert it with transformers' save_pretrained"
                    ));
                }
                None if has("tokenizer.json") || has("tokenizer.model") => Weights::None,
                None => {
                    return Err("the repository has no model: neither safetensors weights nor a tokenizer".to_owned());
                }
            }
        };
        let is_wanted = |name: &&&str| {
            SMALL_FILES.contains(name) && (**name != INDEX_FILE || weights == Weights::Index) && is_plain_name(name)
        };
        let small = names.iter().filter(is_wanted).copied().collect();
        Ok(Self { small, weights })
    }
}

/// The files that a downloaded index lists, each once.
fn index_shards(snapshot: &Path) -> std::result::Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let text = fs::read(snapshot.join(INDEX_FILE)).map_err(|error| format!("{INDEX_FILE} cannot be read: {error}"))?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|error| format!("{INDEX_FILE} cannot be read: {error}"))?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    match shards.iter().find(|shard| !is_plain_name(shard) || !shard.ends_with(".safetensors")) {
        Some(strange) => Err(format!("{INDEX_FILE} lists {strange:?}, which is no safetensors file")),
        None => Ok(shards),
    }
}

/// The first file that a snapshot needs and does not have; links to files that were removed count as missing.
fn missing_file(snapshot: &Path) -> Option<String> {
    let has = |name: &str| snapshot.join(name).exists();
    if has(ADAPTER_FILE) && has("adapter_config.json") {
        return None;
    }
    if !has("config.json") {
        return Some("config.json".to_owned());
    }
    if has(SINGLE_FILE) {
        return None;
    }
    if !has(INDEX_FILE) {
        return Some(SINGLE_FILE.to_owned());
    }
    match index_shards(snapshot) {
        Ok(shards) => shards.into_iter().find(|shard| !has(shard)),
        Err(_) => Some(INDEX_FILE.to_owned()),
    }
}

#[cfg(test)]
mod tests;
