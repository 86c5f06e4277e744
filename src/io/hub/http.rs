//! Requests to the hub: which failures are worth another try, what the others mean, and where the token may go.

use std::fmt;
use std::io::Read;
use std::time::Duration;

use ureq::{Agent, AgentBuilder, ErrorKind, Proxy, Response};

use super::settings::{Settings, Token};
use super::{Events, HubEvent};
use crate::error::{Error, Result};

/// How many times in a row a request may fail without having brought anything.
const MAX_TRIES: u32 = 5;
/// The longest wait between two tries, also when the hub asks for more.
const MAX_WAIT: Duration = Duration::from_mins(1);
const MAX_REDIRECTS: usize = 10;
/// The longest answer that is read into memory: lists of files and small files' metadata.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another try may succeed.
    Transient {
        /// What happened.
        detail: String,
        /// How long the hub asked to wait.
        wait: Option<Duration>,
    },
    /// The hub has no such part of the file; a try from its beginning may succeed.
    BadRange,
    /// Another try would fail, too.
    Final(Error),
}

/// What a request brought.
pub(super) type Attempt<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(super) fn transient(detail: impl Into<String>) -> Self {
        Self::Transient { detail: detail.into(), wait: None }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transient { detail, .. } => f.write_str(detail),
            Self::BadRange => f.write_str("HTTP 416: no such part of the file"),
            Self::Final(error) => error.fmt(f),
        }
    }
}

/// Counts tries, and waits between them.
pub(super) struct Retry {
    failures: u32,
    first_wait: Duration,
}

impl Retry {
    /// To be called when a try brought something.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Waits for the next try, or gives the failure back when there were enough. `tick` is called all along.
    pub(super) fn wait(&mut self, failure: Failure, tick: &mut dyn FnMut() -> Result<()>) -> Attempt<()> {
        let asked = match &failure {
            Failure::Transient { wait, .. } => *wait,
            Failure::BadRange => None,
            Failure::Final(_) => return Err(failure),
        };
        self.failures += 1;
        if self.failures >= MAX_TRIES {
            return Err(failure);
        }
        let backoff = self.first_wait * 2_u32.pow(self.failures - 1);
        let mut left = asked.unwrap_or(backoff).max(backoff).min(MAX_WAIT);
        while !left.is_zero() {
            tick()?;
            let nap = left.min(Duration::from_millis(100));
            std::thread::sleep(nap);
            left -= nap;
        }
        Ok(())
    }
}

/// Which redirects to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    /// Only those that stay on the hub (a renamed repository): beyond it lie stores that know nothing of commits.
    WithinHub,
    All,
}

/// Sends requests about one repository.
pub(super) struct Client {
    endpoint: String,
    repo_id: String,
    revision: String,
    token: Option<Token>,
    first_wait: Duration,
    direct: Agent,
    http_proxied: Option<Agent>,
    https_proxied: Option<Agent>,
    reached_directly: Vec<String>,
}

impl Client {
    pub(super) fn new(settings: &Settings, repo_id: &str, revision: &str) -> Result<Self> {
        let agent = || {
            AgentBuilder::new()
                .redirects(0) // followed by hand: the token must not leave the hub
                .timeout_connect(settings.timeout)
                .timeout_read(settings.timeout)
                .timeout_write(settings.timeout)
                .user_agent(concat!("rustune/", env!("CARGO_PKG_VERSION")))
        };
        let proxied = |name: &'static str, address: Option<&str>| match address {
            None => Ok(None),
            Some(address) => Proxy::new(address)
                .map(|proxy| Some(agent().proxy(proxy).build()))
                // Its value may hold a password.
                .map_err(|_| Error::config(name, "(hidden)", "an address like http://host:port")),
        };
        Ok(Self {
            endpoint: settings.endpoint.clone(),
            repo_id: repo_id.to_owned(),
            revision: revision.to_owned(),
            token: settings.token.clone(),
            first_wait: settings.first_wait,
            direct: agent().build(),
            http_proxied: proxied("HTTP_PROXY", settings.proxies.http.as_deref())?,
            https_proxied: proxied("HTTPS_PROXY", settings.proxies.https.as_deref())?,
            reached_directly: settings.proxies.except.clone(),
        })
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> Error {
        Error::Hub { repo: self.repo_id.clone(), problem: problem.into() }
    }

    pub(super) fn retry(&self) -> Retry {
        Retry { failures: 0, first_wait: self.first_wait }
    }

    /// The text of an answer, with retries.
    pub(super) fn get_text(&self, url: &str, events: &mut Events<'_>) -> Attempt<String> {
        let mut retry = self.retry();
        loop {
            let outcome = self.send("GET", url, &[], Follow::All).and_then(|response| {
                let mut text = String::new();
                match response.into_reader().take(MAX_TEXT_BYTES).read_to_string(&mut text) {
                    Ok(_) => Ok(text),
                    Err(error) => Err(Failure::transient(format!("the answer broke off: {error}"))),
                }
            });
            match outcome {
                Ok(text) => return Ok(text),
                Err(failure) => retry.wait(failure, &mut || events(&HubEvent::Waiting))?,
            }
        }
    }

    /// One request; follows redirects.
    pub(super) fn send(&self, method: &str, url: &str, headers: &[(&str, &str)], follow: Follow) -> Attempt<Response> {
        let mut url = url.to_owned();
        for _ in 0..MAX_REDIRECTS {
            // Compressed, the length would not be the file's.
            let mut request = self.agent(&url).request(method, &url).set("Accept-Encoding", "identity");
            if let Some(token) = self.token.as_ref().filter(|_| self.is_at_hub(&url)) {
                request = request.set("Authorization", &token.header());
            }
            for (name, value) in headers {
                request = request.set(name, value);
            }
            let response = match request.call() {
                Ok(response) => response,
                Err(ureq::Error::Status(status, response)) => return Err(self.refusal(status, &response)),
                Err(ureq::Error::Transport(error)) => return Err(self.transport_failure(&error)),
            };
            let (true, Some(location)) = ((300..400).contains(&response.status()), response.header("Location")) else {
                return Ok(response);
            };
            let target = redirect_target(&url, location)
                .ok_or_else(|| self.error("the hub redirects to an address that cannot be followed"))?;
            if follow == Follow::WithinHub && !self.is_at_hub(&target) {
                return Ok(response);
            }
            url = target;
        }
        Err(Failure::Final(self.error(format!("the hub redirects more than {MAX_REDIRECTS} times"))))
    }

    /// Whether an address is the hub's own: only there may the token go.
    fn is_at_hub(&self, url: &str) -> bool {
        url.strip_prefix(&self.endpoint).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?']))
    }

    fn agent(&self, url: &str) -> &Agent {
        let (scheme, host) = scheme_and_host(url);
        let is_loopback = host == "localhost" || host.starts_with("127.") || host == "[::1]";
        let is_excepted = self.reached_directly.iter().any(|except| {
            let except = except.trim_start_matches('.');
            except == "*" || host == except || host.strip_suffix(except).is_some_and(|rest| rest.ends_with('.'))
        });
        let proxied = if scheme == "https" { &self.https_proxied } else { &self.http_proxied };
        if is_loopback || is_excepted { &self.direct } else { proxied.as_ref().unwrap_or(&self.direct) }
    }

    /// No address in the text: those of the hub's stores carry signatures that give access.
    fn transport_failure(&self, error: &ureq::Transport) -> Failure {
        let mut detail = error.kind().to_string();
        for more in [error.message().map(str::to_owned), std::error::Error::source(error).map(ToString::to_string)] {
            if let Some(more) = more.filter(|more| !more.contains("://")) {
                detail = format!("{detail}: {more}");
            }
        }
        match error.kind() {
            ErrorKind::InvalidUrl | ErrorKind::UnknownScheme => {
                Failure::Final(self.error(format!("{detail}; check HF_ENDPOINT")))
            }
            ErrorKind::InvalidProxyUrl | ErrorKind::ProxyUnauthorized => {
                Failure::Final(self.error(format!("{detail}; check HTTP_PROXY and HTTPS_PROXY")))
            }
            _ => Failure::transient(detail),
        }
    }

    /// What a status means, and what to do about it. `X-Error-Code` tells the hub's own reasons.
    fn refusal(&self, status: u16, response: &Response) -> Failure {
        let page = format!("{}/{}", self.endpoint, self.repo_id);
        let has_token = self.token.is_some();
        let problem = match (response.header("X-Error-Code"), status) {
            (_, 416) => return Failure::BadRange,
            (_, 408 | 429 | 500 | 502 | 503 | 504) => {
                let wait = response.header("Retry-After").and_then(|text| text.trim().parse().ok());
                let detail = if status == 429 {
                    "HTTP 429: too many requests".to_owned()
                } else {
                    format!("HTTP {status}: {}", response.status_text())
                };
                return Failure::Transient { detail, wait: wait.map(Duration::from_secs) };
            }
            (Some("GatedRepo"), _) if has_token => {
                format!(
                    "the repository is gated and the token's user has no access yet; ask for it or accept the licence at {page}"
                )
            }
            (Some("GatedRepo"), _) => format!(
                "the repository is gated; accept the licence at {page}, then set HF_TOKEN or token= to a token of that user"
            ),
            (Some("RevisionNotFound"), _) => {
                format!("there is no revision {}; check the branch, tag or commit", self.revision)
            }
            (Some("EntryNotFound"), _) => "a file the hub listed is not there; try again".to_owned(),
            // The hub answers 401 also for what does not exist, so as not to tell which names do.
            (Some("RepoNotFound"), _) | (None, 401 | 404) if !has_token => format!(
                "there is no such public repository (HTTP {status}); check the spelling, or, if it is private, set \
                 HF_TOKEN or token=; if a local folder was meant, it does not exist"
            ),
            (Some("RepoNotFound"), _) | (None, 404) => format!(
                "there is no such repository that the token may read (HTTP {status}); check the spelling and the token's \
                 user; if a local folder was meant, it does not exist"
            ),
            (_, 401) if has_token => {
                "the token was refused (HTTP 401); make a new one on the hub and set HF_TOKEN or token=".to_owned()
            }
            (_, 403) => format!("access is forbidden (HTTP 403); see {page}, and check what the token may read"),
            _ => format!("the hub answered HTTP {status} {}", response.status_text()),
        };
        Failure::Final(self.error(problem))
    }
}

/// `https` and `huggingface.co` of `https://huggingface.co:443/path`, in lower case.
fn scheme_and_host(url: &str) -> (String, String) {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host_and_port = authority.rsplit('@').next().unwrap_or_default();
    let host = match host_and_port.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => format!("[{address}]"), // IPv6
        None => host_and_port.split(':').next().unwrap_or_default().to_owned(),
    };
    (scheme.to_ascii_lowercase(), host.to_ascii_lowercase())
}

/// Where a `Location` points, seen from `url`; `None` for forms no hub uses and for a step down from https.
pub(super) fn redirect_target(url: &str, location: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let target = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        location.to_owned()
    };
    let is_allowed = target.starts_with("https://") || (target.starts_with("http://") && scheme == "http");
    is_allowed.then_some(target)
}
