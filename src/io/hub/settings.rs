//! The hub's options and environment variables as written, and the settings they resolve to.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubOptions;
use crate::error::{Error, Result};

/// An access token. It has no `Display`, and its `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Token(String);

impl Token {
    /// The value of the `Authorization` header.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

/// The proxies of the environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Proxies {
    pub(super) http: Option<String>,
    pub(super) https: Option<String>,
    /// Host names, or ends of them, that are reached directly.
    pub(super) except: Vec<String>,
}

/// What a download uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    /// Without a slash at its end.
    pub(super) endpoint: String,
    pub(super) cache: PathBuf,
    pub(super) token: Option<Token>,
    pub(super) is_offline: bool,
    /// How long to wait for the next bytes.
    pub(super) timeout: Duration,
    /// The first wait before trying again; each further one is twice as long.
    pub(super) first_wait: Duration,
    pub(super) proxies: Proxies,
}

impl Settings {
    /// An option counts before a variable, and a newer variable before an older one, as in `huggingface_hub`
    /// (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>). `variable` reads one.
    pub(super) fn resolve(options: &HubOptions, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let first_of = |names: &[&str]| {
            names
                .iter()
                .find_map(|&name| variable(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()))
        };
        let is_on = |name| {
            first_of(&[name])
                .is_some_and(|text| ["1", "ON", "YES", "TRUE"].contains(&text.to_ascii_uppercase().as_str()))
        };
        let user_home = first_of(&["HOME", "USERPROFILE"]).map(PathBuf::from).or_else(std::env::home_dir);
        let expand = |text: String| match (text.strip_prefix('~'), &user_home) {
            (Some(rest), Some(user_home)) if rest.is_empty() || rest.starts_with('/') => {
                user_home.join(rest.trim_start_matches('/'))
            }
            _ => PathBuf::from(text),
        };

        let hub_home = first_of(&["HF_HOME"])
            .map(expand)
            .or_else(|| first_of(&["XDG_CACHE_HOME"]).map(|text| expand(text).join("huggingface")))
            .or_else(|| user_home.as_ref().map(|home| home.join(".cache").join("huggingface")));
        let cache = match &options.cache_dir {
            Some(folder) => expand(folder.to_string_lossy().into_owned()),
            None => match first_of(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]) {
                Some(text) => expand(text),
                None => match &hub_home {
                    Some(home) => home.join("hub"),
                    None => return Err(Error::config("HF_HOME", "", "a folder: this user has no home folder")),
                },
            },
        };

        let endpoint = first_of(&["HF_ENDPOINT"]).unwrap_or_else(|| "https://huggingface.co".to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::config("HF_ENDPOINT", endpoint, "an address that starts with https:// or http://"));
        }
        let timeout_s = match first_of(&["HF_HUB_DOWNLOAD_TIMEOUT"]) {
            None => 10,
            Some(text) => text.parse::<u64>().ok().filter(|&seconds| seconds > 0).ok_or_else(|| {
                Error::config("HF_HUB_DOWNLOAD_TIMEOUT", &text, "a whole number of seconds, at least 1")
            })?,
        };
        Ok(Self {
            endpoint,
            cache,
            token: token(options, &first_of, is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN"), hub_home.as_deref(), &expand)?,
            is_offline: options.local_files_only || is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            timeout: Duration::from_secs(timeout_s),
            first_wait: Duration::from_millis(500),
            proxies: Proxies {
                http: first_of(&["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]),
                https: first_of(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
                except: first_of(&["NO_PROXY", "no_proxy"])
                    .map(|list| {
                        list.split(',').map(|host| host.trim().to_owned()).filter(|host| !host.is_empty()).collect()
                    })
                    .unwrap_or_default(),
            },
        })
    }
}

/// The token given, else the variables', else the file that `hf auth login` writes.
fn token(
    options: &HubOptions,
    first_of: &dyn Fn(&[&str]) -> Option<String>,
    is_implicit_disabled: bool,
    hub_home: Option<&Path>,
    expand: &dyn Fn(String) -> PathBuf,
) -> Result<Option<Token>> {
    let written = options.token.as_ref().map(|text| text.trim().to_owned());
    let found = written.or_else(|| {
        if is_implicit_disabled {
            return None;
        }
        first_of(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).or_else(|| {
            let file = first_of(&["HF_TOKEN_PATH"]).map(expand).or_else(|| Some(hub_home?.join("token")))?;
            Some(std::fs::read_to_string(file).ok()?.trim().to_owned())
        })
    });
    match found.filter(|text| !text.is_empty()) {
        // A header cannot carry other characters; the value itself is never shown.
        Some(text) if !text.chars().all(|c| c.is_ascii_graphic()) => {
            Err(Error::config("token", "(hidden)", "a token without spaces and line breaks, as the hub shows it"))
        }
        found => Ok(found.map(Token)),
    }
}
