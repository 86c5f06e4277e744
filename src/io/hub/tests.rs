//! The hub client against a hub of our own, which listens on this machine and misbehaves on demand.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secretsecretsecret";

// ---------------------------------------------------------------------------------------------------------------------
// The hub
// ---------------------------------------------------------------------------------------------------------------------

#[derive(Debug, Clone)]
struct Request {
    /// `hub` or `store`.
    at: &'static str,
    method: String,
    path: String,
    /// Names in lower case.
    headers: HashMap<String, String>,
    /// How many requests of this method and path there were before.
    n_before: usize,
}

#[derive(Debug, Default)]
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Break the connection off after so many bytes of the body.
    cut_at: Option<usize>,
}

impl Reply {
    fn new(status: u16) -> Self {
        Self { status, ..Self::default() }
    }
    fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }
    fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
    fn cut_at(mut self, length: usize) -> Self {
        self.cut_at = Some(length);
        self
    }
}

struct FakeFile {
    content: Vec<u8>,
    is_large: bool,
}

impl FakeFile {
    fn etag(&self) -> String {
        let (_, sha256) = atomic::hash_reader(&self.content[..]).unwrap();
        if self.is_large { sha256 } else { sha256[..40].to_owned() }
    }
}

/// What a test changes: `Some` replaces the hub's usual answer.
type Override = dyn Fn(&Request) -> Option<Reply> + Send + Sync;

/// A hub with one repository, `owner/model`, and a store for its large files on a port of its own.
struct FakeHub {
    endpoint: String,
    cache: tempfile::TempDir,
    requests: Arc<Mutex<Vec<Request>>>,
    is_stopped: Arc<AtomicBool>,
    addresses: Vec<std::net::SocketAddr>,
}

impl FakeHub {
    fn new(files: &[(&str, &[u8])], overriding: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) -> Self {
        let files: HashMap<String, FakeFile> = files
            .iter()
            .map(|&(name, content)| {
                let is_large = name.ends_with(".safetensors");
                (name.to_owned(), FakeFile { content: content.to_vec(), is_large })
            })
            .collect();
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let store = TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = vec![hub.local_addr().unwrap(), store.local_addr().unwrap()];
        let requests = Arc::new(Mutex::new(Vec::new()));
        let is_stopped = Arc::new(AtomicBool::new(false));
        let shared: Arc<(HashMap<String, FakeFile>, Box<Override>)> = Arc::new((files, Box::new(overriding)));
        for (at, listener) in [("hub", hub), ("store", store)] {
            let (shared, requests, is_stopped) = (Arc::clone(&shared), Arc::clone(&requests), Arc::clone(&is_stopped));
            let store_port = addresses[1].port();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    if is_stopped.load(Ordering::SeqCst) {
                        return;
                    }
                    let Ok(stream) = stream else { continue };
                    let (shared, requests) = (Arc::clone(&shared), Arc::clone(&requests));
                    std::thread::spawn(move || serve(at, store_port, &stream, &shared, &requests));
                }
            });
        }
        let endpoint = format!("http://127.0.0.1:{}", addresses[0].port());
        Self { endpoint, cache: tempfile::tempdir().unwrap(), requests, is_stopped, addresses }
    }

    fn settings(&self, token: Option<&str>) -> Settings {
        let options = HubOptions {
            token: Some(token.unwrap_or_default().to_owned()),
            cache_dir: Some(self.cache.path().to_owned()),
            ..HubOptions::default()
        };
        let endpoint = self.endpoint.clone();
        let mut settings =
            Settings::resolve(&options, &|name| (name == "HF_ENDPOINT").then(|| endpoint.clone())).unwrap();
        settings.first_wait = Duration::from_millis(1);
        settings
    }

    fn repo(&self) -> HubRepo {
        HubRepo::new("owner/model", None, self.settings(Some(TOKEN))).unwrap()
    }

    fn resolve(&self) -> Result<PathBuf> {
        self.repo().resolve(&mut |_| Ok(()))
    }

    fn error(&self) -> String {
        let error = self.resolve().unwrap_err();
        assert!(matches!(error, Error::Hub { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with("owner/model: ") && !text.contains(TOKEN) && !text.contains("signature"), "{text}");
        text
    }

    /// `METHOD name-of-file` of the requests so far, which are forgotten then.
    fn take_requests(&self) -> Vec<String> {
        let requests = std::mem::take(&mut *self.requests.lock().unwrap());
        requests.iter().map(|r| format!("{} {}", r.method, r.path.rsplit('/').next().unwrap())).collect()
    }

    fn folder(&self) -> PathBuf {
        self.cache.path().join("models--owner--model")
    }

    fn blobs(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.folder().join("blobs")) else { return Vec::new() };
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Where a partial download of `content` lies.
    fn partial(&self, content: &[u8]) -> PathBuf {
        let blobs = self.folder().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        blobs.join(format!("{}.incomplete", atomic::hash_reader(content).unwrap().1))
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        for address in &self.addresses {
            let _ = TcpStream::connect(address);
        }
    }
}

fn serve(
    at: &'static str,
    store_port: u16,
    stream: &TcpStream,
    (files, overriding): &(HashMap<String, FakeFile>, Box<Override>),
    requests: &Mutex<Vec<Request>>,
) {
    let mut lines = BufReader::new(stream).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let mut parts = first.split(' ').map(str::to_owned);
    let (method, path) = (parts.next().unwrap(), parts.next().unwrap());
    let headers = lines
        .map_while(|line| line.ok().filter(|line| !line.is_empty()))
        .filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())))
        .collect();
    let request = {
        let mut requests = requests.lock().unwrap();
        let n_before = requests.iter().filter(|r| r.method == method && r.path == path).count();
        requests.push(Request { at, method, path, headers, n_before });
        requests.last().unwrap().clone()
    };
    let reply = overriding(&request).unwrap_or_else(|| usual(&request, files, store_port));
    let mut head = vec![format!("HTTP/1.1 {} Test", reply.status), "Connection: close".to_owned()];
    head.extend(reply.headers.iter().map(|(name, value)| format!("{name}: {value}")));
    if !reply.headers.iter().any(|(name, _)| name == "Content-Length") {
        head.push(format!("Content-Length: {}", reply.body.len()));
    }
    let head = head.join("\r\n") + "\r\n\r\n";
    let mut stream = stream;
    let body = if request.method == "HEAD" { &[] } else { &reply.body[..reply.cut_at.unwrap_or(reply.body.len())] };
    // A client that hangs up is no fault of the server.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read(&mut [0; 16]);
}

fn usual(request: &Request, files: &HashMap<String, FakeFile>, store_port: u16) -> Reply {
    let path = request.path.replace("/owner/new/", "/owner/model/"); // its name after a renaming
    if path == "/api/models/owner/model/revision/main" {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name, "more": 1})).collect();
        let info = serde_json::json!({"id": "owner/model", "sha": COMMIT, "siblings": siblings, "private": false});
        return Reply::new(200).body(info.to_string());
    }
    if let Some(name) = path.strip_prefix(&format!("/owner/model/resolve/{COMMIT}/"))
        && let Some(file) = files.get(name)
    {
        let reply = Reply::new(200).header("X-Repo-Commit", COMMIT);
        if !file.is_large {
            let reply = reply.header("ETag", format!("W/\"{}\"", file.etag())).body(file.content.clone());
            let length = file.content.len();
            return if request.method == "HEAD" { reply.header("Content-Length", length.to_string()) } else { reply };
        }
        let location = format!("http://127.0.0.1:{store_port}/store/{name}?signature=secret");
        return Reply { status: 302, ..reply }
            .header("X-Linked-Etag", format!("\"{}\"", file.etag()))
            .header("X-Linked-Size", file.content.len().to_string())
            .header("ETag", "\"of-the-redirect\"")
            .header("Location", location)
            .body("Found. Redirecting");
    }
    if let Some(name) = path.strip_prefix("/store/").and_then(|rest| rest.strip_suffix("?signature=secret")) {
        return part_of(&files[name].content, request);
    }
    Reply::new(404).header("X-Error-Code", "RepoNotFound")
}

/// The whole content, or the part that the request asks for.
fn part_of(content: &[u8], request: &Request) -> Reply {
    let Some(range) = request.headers.get("range") else { return Reply::new(200).body(content) };
    let start: usize = range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap();
    if start >= content.len() {
        return Reply::new(416);
    }
    let content_range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
    Reply::new(206).header("Content-Range", content_range).body(&content[start..])
}

fn weights() -> Vec<u8> {
    (0..700_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn is_weights(request: &Request) -> bool {
    request.at == "store" && request.method == "GET"
}

/// A hub with a whole model, and one override.
fn model_hub(overriding: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) -> FakeHub {
    let weights = weights();
    let files: [(&str, &[u8]); 3] =
        [("config.json", b"{\"a\": 1}"), ("tokenizer.json", b"{}"), ("model.safetensors", &weights)];
    FakeHub::new(&files, overriding)
}

fn assert_whole(hub: &FakeHub, snapshot: &Path) {
    assert_eq!(snapshot, hub.folder().join("snapshots").join(COMMIT));
    assert_eq!(fs::read(snapshot.join("config.json")).unwrap(), b"{\"a\": 1}");
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == weights());
    assert_eq!(fs::read_to_string(hub.folder().join("refs/main")).unwrap(), COMMIT);
    assert_eq!(hub.blobs().iter().filter(|name| name.contains("incomplete")).count(), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Downloads
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_model_is_downloaded_once_into_the_hubs_own_layout() {
    let weights = weights();
    let files: [(&str, &[u8]); 8] = [
        ("config.json", b"{\"a\": 1}"),
        ("tokenizer.json", b"{}"),
        ("chat_template.jinja", b""),
        ("model.safetensors", &weights),
        ("pytorch_model.bin", b"a pickle"),
        ("README.md", b"text"),
        ("original/consolidated.safetensors", b"x"),
        ("model.safetensors.index.json", b"{\"weight_map\": {\"a\": \"model.safetensors\"}}"),
    ];
    let hub = FakeHub::new(&files, |_| None);
    let mut seen = Vec::new();
    let snapshot = hub
        .repo()
        .resolve(&mut |event| {
            if let HubEvent::Progress { file, done_bytes, total_bytes } = event {
                seen.push(((*file).to_owned(), *done_bytes, *total_bytes));
            }
            Ok(())
        })
        .unwrap();
    assert_whole(&hub, &snapshot);
    assert_eq!(fs::read(snapshot.join("chat_template.jinja")).unwrap(), b"");
    let weights_seen: Vec<_> = seen.iter().filter(|(file, ..)| file == "model.safetensors").collect();
    assert!(weights_seen.is_sorted_by_key(|(_, done, _)| done) && weights_seen.len() >= 3);
    assert_eq!(weights_seen.last().unwrap().1, weights_seen.last().unwrap().2);

    // Other programs find the files, by names that do not depend on where the cache lies.
    let theirs = hf_hub::Cache::new(hub.cache.path().to_owned()).repo(Repo::model("owner/model".to_owned()));
    assert_eq!(theirs.get("config.json").unwrap(), snapshot.join("config.json"));
    if cfg!(unix) {
        let target = fs::read_link(snapshot.join("model.safetensors")).unwrap();
        assert_eq!(target.parent().unwrap(), Path::new("../../blobs"));
        assert_eq!(target.file_name().unwrap().len(), 64);
    }

    // The token goes to the hub with every request, and never to the store.
    for request in hub.requests.lock().unwrap().iter() {
        let expected = (request.at == "hub").then(|| format!("Bearer {TOKEN}"));
        assert_eq!(request.headers.get("authorization"), expected.as_ref(), "{request:?}");
    }
    let mut requests = hub.take_requests();
    requests.sort();
    requests.dedup();
    let expected = [
        "GET config.json",
        "GET main",
        "GET model.safetensors",
        "GET model.safetensors?signature=secret",
        "GET tokenizer.json",
        "HEAD chat_template.jinja", // an empty file: that it is there is all there is to know
        "HEAD config.json",
        "HEAD model.safetensors",
        "HEAD tokenizer.json",
    ];
    assert_eq!(requests, expected);
    assert_eq!(hub.resolve().unwrap(), snapshot);
    assert_eq!(hub.take_requests(), ["GET main"]);
}

#[test]
fn the_shards_that_the_index_lists_are_downloaded() {
    let index = br#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{}"),
        (INDEX_FILE, index),
        ("m-1.safetensors", b"one"),
        ("m-2.safetensors", b"two"),
        ("other.safetensors", b"not listed"),
    ];
    let hub = FakeHub::new(&files, |_| None);
    let snapshot = hub.resolve().unwrap();
    assert_eq!(fs::read(snapshot.join("m-1.safetensors")).unwrap(), b"one");
    assert_eq!(fs::read(snapshot.join("m-2.safetensors")).unwrap(), b"two");
    assert!(!snapshot.join("other.safetensors").exists());

    fs::remove_file(snapshot.join("m-2.safetensors")).unwrap();
    assert_eq!(missing_file(&snapshot).unwrap(), "m-2.safetensors");
    hub.take_requests();
    hub.resolve().unwrap();
    assert_eq!(hub.take_requests(), ["GET main", "HEAD m-2.safetensors"]);
    assert_eq!(missing_file(&snapshot), None);

    let hub = FakeHub::new(&files[..3], |_| None);
    assert!(hub.error().contains("lists m-2.safetensors, which the repository lacks"));
    let hub =
        FakeHub::new(&[("config.json", b"{}"), (INDEX_FILE, br#"{"weight_map": {"a": "../x.safetensors"}}"#)], |_| {
            None
        });
    assert!(hub.error().contains("which is no safetensors file"));
}

#[test]
fn a_partial_file_is_resumed() {
    let hub = model_hub(|_| None);
    fs::write(hub.partial(&weights()), &weights()[..300_000]).unwrap();
    assert_whole(&hub, &hub.resolve().unwrap());
    let ranges: Vec<_> = hub
        .requests
        .lock()
        .unwrap()
        .iter()
        .filter(|r| is_weights(r))
        .map(|r| r.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges, [Some("bytes=300000-".to_owned())]);
}

#[test]
fn a_200_to_a_range_request_starts_from_the_beginning() {
    let hub = model_hub(|request| is_weights(request).then(|| Reply::new(200).body(weights())));
    fs::write(hub.partial(&weights()), &weights()[..300_000]).unwrap();
    assert_whole(&hub, &hub.resolve().unwrap());
    assert_eq!(hub.take_requests().iter().filter(|r| r.ends_with("signature=secret")).count(), 1);
}

#[test]
fn a_partial_file_that_is_damaged_or_too_long_is_thrown_away() {
    for length in [300_000, 700_000, 900_000] {
        let hub = model_hub(|_| None);
        fs::write(hub.partial(&weights()), vec![7; length]).unwrap();
        assert_whole(&hub, &hub.resolve().unwrap());
    }
}

#[test]
fn a_size_the_hub_does_not_tell_is_no_obstacle() {
    // The weights' answer tells no size, so that a whole partial file leads to a 416.
    let hub = model_hub(|request| {
        let is_head = request.method == "HEAD" && request.path.ends_with("model.safetensors");
        let sha256 = atomic::hash_reader(&weights()[..]).unwrap().1;
        is_head.then(|| Reply::new(302).header("X-Linked-Etag", sha256).header("Location", "http://elsewhere.invalid/"))
    });
    fs::write(hub.partial(&weights()), weights()).unwrap();
    assert_whole(&hub, &hub.resolve().unwrap());
}

#[test]
fn content_with_another_hash_is_refused_and_removed() {
    let hub = model_hub(|request| is_weights(request).then(|| part_of(&vec![7; 700_000], request)));
    let error = hub.error();
    assert!(
        error.contains("model.safetensors arrived with SHA-256 ") && error.contains("but the hub promises"),
        "{error}"
    );
    let sha256 = atomic::hash_reader(&weights()[..]).unwrap().1;
    assert!(hub.blobs().iter().all(|name| !name.contains(&sha256)), "{:?}", hub.blobs());
    let snapshot = hub.folder().join("snapshots").join(COMMIT);
    assert!(fs::symlink_metadata(snapshot.join("model.safetensors")).is_err());
    assert!(!hub.folder().join("refs/main").exists());
}

#[test]
fn a_body_that_breaks_off_is_continued() {
    let hub = model_hub(|request| {
        (is_weights(request) && request.n_before < 7).then(|| part_of(&weights(), request).cut_at(50_000))
    });
    assert_whole(&hub, &hub.resolve().unwrap());
    let requests = hub.take_requests();
    assert_eq!(requests.iter().filter(|r| r.ends_with("signature=secret")).count(), 8);
}

#[test]
fn a_body_that_always_breaks_off_at_the_same_place_is_an_error() {
    let hub = model_hub(|request| is_weights(request).then(|| Reply::new(200).body(weights()).cut_at(50_000)));
    let error = hub.error();
    assert!(error.contains("the download failed") && error.contains("run it again"), "{error}");
    // A whole response that is too short is no better.
    let hub = model_hub(|request| is_weights(request).then(|| Reply::new(200).body(&weights()[..50_000])));
    let error = hub.error();
    assert!(error.contains("would have 50000 bytes, the hub promised 700000"), "{error}");
    assert!(fs::symlink_metadata(hub.folder().join("snapshots").join(COMMIT).join("model.safetensors")).is_err());
}

#[test]
fn failures_that_pass_are_tried_again() {
    let hub = model_hub(|request| match request.n_before {
        _ if request.at == "store" => None,
        0 => Some(Reply::new(500)),
        1 => Some(Reply::new(429).header("Retry-After", "0")),
        2 => Some(Reply::new(503).body("busy")),
        _ => None,
    });
    assert_whole(&hub, &hub.resolve().unwrap());
    let hub = model_hub(|_| Some(Reply::new(502)));
    let error = hub.error();
    assert!(error.contains("cannot be reached (HTTP 502: Test)"), "{error}");
    assert_eq!(hub.take_requests().len(), 5);
}

#[test]
fn a_renamed_repository_is_followed_within_the_hub() {
    let hub = model_hub(|request| {
        let renamed = request.path.replace("/owner/model/", "/owner/new/");
        (renamed != request.path).then(|| Reply::new(307).header("Location", renamed))
    });
    assert_whole(&hub, &hub.resolve().unwrap());
    let requests = hub.requests.lock().unwrap();
    let renamed: Vec<_> = requests.iter().filter(|request| request.path.contains("/owner/new/")).collect();
    assert!(renamed.iter().all(|request| request.headers["authorization"] == format!("Bearer {TOKEN}")));
    assert_eq!(renamed.len(), 1 + 3 + 3); // the list, and for each file its metadata and its content
}

#[test]
fn endless_redirects_end() {
    let hub = model_hub(|request| Some(Reply::new(302).header("Location", request.path.clone())));
    assert!(hub.error().contains("redirects more than 10 times"));
}

#[test]
fn two_downloads_at_once_do_not_disturb_each_other() {
    let hub = model_hub(|request| {
        if is_weights(request) {
            std::thread::sleep(Duration::from_millis(150)); // so that the other one comes to the lock
        }
        None
    });
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| hub.resolve().unwrap())).collect();
        for thread in threads {
            assert_whole(&hub, &thread.join().unwrap());
        }
    });
    assert_eq!(hub.take_requests().iter().filter(|r| r.ends_with("signature=secret")).count(), 1);
}

#[test]
fn a_callback_stops_the_download_and_the_next_one_goes_on() {
    let hub = model_hub(|_| None);
    let outcome = hub.repo().resolve(&mut |event| match event {
        HubEvent::Progress { file: "model.safetensors", done_bytes, .. } if *done_bytes > 100_000 => {
            Err(Error::Callback("Ctrl-C".into()))
        }
        _ => Ok(()),
    });
    assert!(matches!(outcome, Err(Error::Callback(_))), "{outcome:?}");
    let here = fs::metadata(hub.partial(&weights())).unwrap().len();
    assert!(here > 100_000);
    hub.take_requests();
    assert_whole(&hub, &hub.resolve().unwrap());
}

// ---------------------------------------------------------------------------------------------------------------------
// Refusals, and doing without the hub
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn refusals_say_what_to_do() {
    let cases: [(u16, Option<&str>, Option<&str>, &str); 9] = [
        (
            401,
            None,
            None,
            "no such public repository (HTTP 401); check the spelling, or, if it is private, set HF_TOKEN",
        ),
        (401, Some("RepoNotFound"), None, "no such public repository"),
        (404, Some("RepoNotFound"), Some(TOKEN), "no such repository that the token may read (HTTP 404)"),
        (401, None, Some(TOKEN), "the token was refused"),
        (401, Some("GatedRepo"), None, "gated; accept the licence at http://127.0.0.1:"),
        (403, Some("GatedRepo"), Some(TOKEN), "the token's user has no access yet"),
        (403, None, Some(TOKEN), "access is forbidden"),
        (404, Some("RevisionNotFound"), None, "there is no revision main"),
        (418, None, None, "the hub answered HTTP 418"),
    ];
    for (status, code, token, expected) in cases {
        let code = code.map(str::to_owned);
        let hub = model_hub(move |_| {
            let reply = Reply::new(status).body("body");
            Some(match &code {
                Some(code) => reply.header("X-Error-Code", code.clone()),
                None => reply,
            })
        });
        let repo = HubRepo::new("owner/model", None, hub.settings(token)).unwrap();
        let error = repo.resolve(&mut |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains(TOKEN), "{error}");
        assert_eq!(hub.take_requests().len(), 1, "a refusal is not tried again");
    }
}

#[test]
fn a_repository_without_safetensors_says_so() {
    let hub = FakeHub::new(&[("config.json", b"{}"), ("pytorch_model.bin", b"x")], |_| None);
    assert!(hub.error().contains("no safetensors weights, only pytorch_model.bin"));
    let hub = FakeHub::new(&[("README.md", b"{}")], |_| None);
    assert!(hub.error().contains("the repository has no model"));
    let hub = model_hub(|_| Some(Reply::new(200).body("<html>a captive portal</html>")));
    assert!(hub.error().contains("did not answer as a hub does"));
    let hub = model_hub(|_| Some(Reply::new(200).body(r#"{"sha": "../../x", "siblings": []}"#)));
    assert!(hub.error().contains("a commit that is no commit"));
}

#[test]
fn offline_the_cache_is_enough_if_it_is_whole() {
    let hub = model_hub(|_| None);
    let offline = |revision| {
        let settings = Settings { is_offline: true, ..hub.settings(None) };
        HubRepo::new("owner/model", revision, settings).unwrap().resolve(&mut |_| Ok(()))
    };
    let error = offline(None).unwrap_err().to_string();
    assert!(error.contains("revision main of a repository of that name is not in the cache"), "{error}");
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    let snapshot = hub.resolve().unwrap();
    hub.take_requests();
    assert_eq!(offline(None).unwrap(), snapshot);
    assert_eq!(offline(Some(COMMIT)).unwrap(), snapshot);
    assert!(offline(Some("v2")).is_err());

    for blob in hub.blobs().iter().filter(|name| name.len() == 64) {
        fs::remove_file(hub.folder().join("blobs").join(blob)).unwrap(); // leaves a link to nothing
    }
    let error = offline(None).unwrap_err().to_string();
    assert!(error.contains("model.safetensors is missing in the cache at"), "{error}");
    assert_eq!(hub.take_requests(), [""; 0]);
    assert_whole(&hub, &hub.resolve().unwrap());
}

#[test]
fn a_commit_in_the_cache_needs_no_network() {
    let hub = model_hub(|_| None);
    let snapshot = hub.resolve().unwrap();
    hub.take_requests();
    let repo = HubRepo::new("owner/model", Some(COMMIT), hub.settings(None)).unwrap();
    assert_eq!(repo.resolve(&mut |_| Ok(())).unwrap(), snapshot);
    assert_eq!(hub.take_requests(), [""; 0]);
}

#[test]
fn without_a_network_the_cache_serves_with_a_warning() {
    let hub = model_hub(|_| None);
    let snapshot = hub.resolve().unwrap();
    let nobody_listens = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port())
    };
    let settings = Settings { endpoint: nobody_listens, ..hub.settings(None) };
    let mut warnings = Vec::new();
    let repo = HubRepo::new("owner/model", None, settings.clone()).unwrap();
    let found = repo.resolve(&mut |event| {
        if let HubEvent::Warning(text) = event {
            warnings.push((*text).to_owned());
        }
        Ok(())
    });
    assert_eq!(found.unwrap(), snapshot);
    assert!(warnings.len() == 1 && warnings[0].contains("using the files in the cache"), "{warnings:?}");
    let repo = HubRepo::new("owner/other", None, settings).unwrap();
    let error = repo.resolve(&mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && error.contains("does not have the model"), "{error}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Names, settings, addresses
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_local_folder_is_itself_and_a_wrong_name_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert_eq!(resolve(path, &HubOptions::default()).unwrap(), folder.path());
    fs::write(folder.path().join("file"), "x").unwrap();
    let offline =
        HubOptions { cache_dir: Some(folder.path().to_owned()), local_files_only: true, ..HubOptions::default() };
    let error = |name: &str| resolve(name, &offline).unwrap_err().to_string();
    assert!(error(&format!("{path}/file")).contains("this is a file; give the folder"));
    for name in ["/no/such/folder", "./model", "../x", "a/b/c", "", "a//b", "-a/b", "a/..", "a/b c", "a--b/c", "a\\b"] {
        assert!(error(name).contains("no such folder, and it is no name"), "{name:?}: {}", error(name));
    }
    assert!(error("owner/model-1.0_x").contains("not in the cache"));
    for revision in ["", "../x", "a b", "/main", "a//b", ".git"] {
        let options = HubOptions { revision: Some(revision.to_owned()), ..offline.clone() };
        assert!(matches!(resolve("owner/model", &options), Err(Error::Config { field: "revision", .. })), "{revision}");
    }
}

fn settings_of(options: &HubOptions, variables: &[(&str, &str)]) -> Result<Settings> {
    Settings::resolve(options, &|name| {
        variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    })
}

#[test]
fn variables_are_read_in_the_hubs_order() {
    let none = HubOptions::default();
    let cache = |variables: &[(&str, &str)]| settings_of(&none, variables).unwrap().cache;
    let home = ("HOME", "/users/u");
    assert_eq!(cache(&[home]), Path::new("/users/u/.cache/huggingface/hub"));
    assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")]), Path::new("/users/u/hf/hub"));
    assert_eq!(cache(&[home, ("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
    assert_eq!(cache(&[home, ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]), Path::new("/new"));
    let given = HubOptions { cache_dir: Some("/given".into()), ..HubOptions::default() };
    assert_eq!(settings_of(&given, &[home, ("HF_HUB_CACHE", "/new")]).unwrap().cache, Path::new("/given"));

    let endpoint = |value| settings_of(&none, &[home, ("HF_ENDPOINT", value)]).map(|settings| settings.endpoint);
    assert_eq!(settings_of(&none, &[home]).unwrap().endpoint, "https://huggingface.co");
    assert_eq!(endpoint("https://mirror.example/").unwrap(), "https://mirror.example");
    assert!(endpoint("mirror.example").unwrap_err().to_string().starts_with("HF_ENDPOINT = mirror.example: "));

    for (value, expected) in [("1", true), ("true", true), ("ON", true), ("0", false), ("", false)] {
        assert_eq!(settings_of(&none, &[home, ("HF_HUB_OFFLINE", value)]).unwrap().is_offline, expected, "{value}");
    }
    assert!(settings_of(&none, &[home, ("TRANSFORMERS_OFFLINE", "1")]).unwrap().is_offline);
    let local = HubOptions { local_files_only: true, ..HubOptions::default() };
    assert!(settings_of(&local, &[home]).unwrap().is_offline);
    let timeout =
        |value| settings_of(&none, &[home, ("HF_HUB_DOWNLOAD_TIMEOUT", value)]).map(|settings| settings.timeout);
    assert_eq!(timeout("30").unwrap(), Duration::from_secs(30));
    assert!(timeout("0").is_err() && timeout("soon").is_err());
}

#[test]
fn the_token_is_found_and_never_shown() {
    let folder = tempfile::tempdir().unwrap();
    let hub_home = folder.path().to_str().unwrap();
    fs::write(folder.path().join("token"), "hf_from_home\n").unwrap();
    fs::write(folder.path().join("mine"), " hf_from_path ").unwrap();
    let path = folder.path().join("mine");
    let token = |given: Option<&str>, variables: &[(&str, &str)]| {
        let options = HubOptions { token: given.map(str::to_owned), ..HubOptions::default() };
        settings_of(&options, variables).map(|settings| settings.token.map(|token| token.header()))
    };
    let home = ("HF_HOME", hub_home);
    let found = |text: &str| Some(format!("Bearer {text}"));
    assert_eq!(token(None, &[home]).unwrap(), found("hf_from_home"));
    assert_eq!(token(None, &[home, ("HF_TOKEN_PATH", path.to_str().unwrap())]).unwrap(), found("hf_from_path"));
    assert_eq!(token(None, &[home, ("HUGGING_FACE_HUB_TOKEN", "hf_old")]).unwrap(), found("hf_old"));
    assert_eq!(
        token(None, &[home, ("HUGGING_FACE_HUB_TOKEN", "hf_old"), ("HF_TOKEN", "hf_new")]).unwrap(),
        found("hf_new")
    );
    assert_eq!(token(Some("hf_given"), &[home, ("HF_TOKEN", "hf_new")]).unwrap(), found("hf_given"));
    assert_eq!(token(Some(""), &[home]).unwrap(), None);
    assert_eq!(token(None, &[home, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).unwrap(), None);
    assert_eq!(token(None, &[("HF_HOME", "/no/such")]).unwrap(), None);

    let error = token(Some("hf_\nsecret"), &[home]).unwrap_err().to_string();
    assert!(!error.contains("secret"), "{error}");
    let options = HubOptions { token: Some(TOKEN.to_owned()), ..HubOptions::default() };
    let shown = format!("{options:?} {:?}", settings_of(&options, &[home]).unwrap());
    assert!(!shown.contains(TOKEN) && shown.contains("hidden"), "{shown}");
}

#[test]
fn redirects_never_leave_https() {
    let target = |location| http::redirect_target("https://hub.example:8443/a/b?c", location);
    assert_eq!(target("/x?y").unwrap(), "https://hub.example:8443/x?y");
    assert_eq!(target("//store.example/x").unwrap(), "https://store.example/x");
    assert_eq!(target("https://store.example/x").unwrap(), "https://store.example/x");
    assert_eq!(target("http://store.example/x"), None);
    assert_eq!(target("file:///etc/passwd"), None);
    assert_eq!(target("x"), None);
    assert_eq!(http::redirect_target("http://a/", "http://b/").unwrap(), "http://b/");
}

#[test]
fn only_what_a_model_needs_is_selected() {
    let of = |names: &[&'static str]| Selection::of(names).unwrap();
    let all = ["config.json", "a.py", "model.safetensors", INDEX_FILE, "merges.txt", ".gitattributes", "x/config.json"];
    assert_eq!(of(&all), Selection { small: vec!["config.json", "merges.txt"], weights: Weights::File(SINGLE_FILE) });
    let sharded = ["config.json", INDEX_FILE, "model-00001-of-00002.safetensors"];
    assert_eq!(of(&sharded), Selection { small: vec!["config.json", INDEX_FILE], weights: Weights::Index });
    let adapter = ["adapter_config.json", ADAPTER_FILE, "training_args.bin"];
    assert_eq!(of(&adapter), Selection { small: vec!["adapter_config.json"], weights: Weights::File(ADAPTER_FILE) });
    assert_eq!(of(&["tokenizer.json"]), Selection { small: vec!["tokenizer.json"], weights: Weights::None });
    assert!(Selection::of(&["config.json", "model.gguf"]).unwrap_err().contains("only model.gguf"));
}
