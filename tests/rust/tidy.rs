//! What no linter knows: file headers, homes of `unsafe` and `pyo3`, dependency edges, unlinked files, licences, words.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folders that hold no source of ours.
const SKIPPED_FOLDERS: &[&str] = &[
    ".git",
    ".venv",
    ".venv-golden",
    "target",
    "dist",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "outputs",
    "quickstart-out",
];

/// For each part of `src`, the other parts its code (not its tests) may name. DESIGN: kernels <- quant <- ops <- model
/// <- lora <- train <- py, where the right may use the left; the four at the top serve everybody but kernels.
const EDGES: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("kernels", &["error"]),
    ("config", &["error", "io", "data"]),
    ("io", &["error", "config", "data"]),
    ("data", &["error", "config", "io"]),
    ("quant", &["error", "config", "io", "data", "kernels"]),
    ("ops", &["error", "config", "io", "data", "kernels", "quant"]),
    ("model", &["error", "config", "io", "data", "kernels", "quant", "ops"]),
    ("lora", &["error", "config", "io", "data", "kernels", "quant", "ops", "model"]),
    ("train", &["error", "config", "io", "data", "kernels", "quant", "ops", "model", "lora"]),
    ("generate", &["error", "config", "io", "data", "kernels", "quant", "ops", "model", "lora"]),
    ("py", &["error", "config", "io", "data", "kernels", "quant", "ops", "model", "lora", "train", "generate"]),
];

/// Licences a dependency may carry alone; an `OR` needs one of them, an `AND` needs all.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CDLA-Permissive-2.0", // webpki-roots: a list of certificates
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Packages with another licence, each with why it is acceptable.
const LICENCE_EXCEPTIONS: &[(&str, &str)] = &[
    ("option-ext", "MPL-2.0"), // one small file, unmodified, through hf-hub -> dirs; MPL binds only that file
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `root()/folder` whose name ends in one of `endings`, sorted; panics if there is none.
fn files(folder: &str, endings: &[&str]) -> Vec<PathBuf> {
    fn walk(dir: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                if !SKIPPED_FOLDERS.contains(&name.as_str()) {
                    walk(&path, endings, found);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), endings, &mut found);
    assert!(!found.is_empty(), "found no {endings:?} files in {folder:?}: this check would pass on nothing");
    found.sort();
    found
}

/// The path as seen from the repository's root, with `/`.
fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// `source` with comments, strings and character literals blanked out; line numbers stay.
fn code_only(source: &str) -> String {
    let text: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let blank = |out: &mut String, from: usize, to: usize| {
        out.extend(text[from..to].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
    };
    let mut i = 0;
    while i < text.len() {
        let rest = &text[i..];
        let end = if rest.starts_with(&['/', '/']) {
            i + rest.iter().position(|&c| c == '\n').unwrap_or(rest.len())
        } else if rest.starts_with(&['/', '*']) {
            let (mut depth, mut j) = (1, i + 2);
            while j < text.len() && depth > 0 {
                match (text[j], text.get(j + 1)) {
                    ('*', Some('/')) => (depth, j) = (depth - 1, j + 2),
                    ('/', Some('*')) => (depth, j) = (depth + 1, j + 2),
                    _ => j += 1,
                }
            }
            j
        } else if let Some(hashes) = raw_string_hashes(&text, i) {
            let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
            let body = i + 2 + hashes;
            text[body..].windows(close.len()).position(|w| w == close).map_or(text.len(), |p| body + p + close.len())
        } else if text[i] == '"' {
            let mut j = i + 1;
            while j < text.len() && text[j] != '"' {
                j += if text[j] == '\\' { 2 } else { 1 };
            }
            (j + 1).min(text.len())
        } else if text[i] == '\'' && (text.get(i + 2) == Some(&'\'') || text.get(i + 1) == Some(&'\\')) {
            let body = if text[i + 1] == '\\' { i + 3 } else { i + 2 };
            body + text[body..].iter().position(|&c| c == '\'').map_or(0, |p| p + 1)
        } else {
            out.push(text[i]);
            i += 1;
            continue;
        };
        blank(&mut out, i, end);
        i = end;
    }
    out
}

/// The number of `#` if a raw string `r"`, `r#"`... starts at `i` (not inside an identifier).
fn raw_string_hashes(text: &[char], i: usize) -> Option<usize> {
    let inside_word = i > 0 && (text[i - 1].is_alphanumeric() || text[i - 1] == '_') && text[i - 1] != 'b';
    if text[i] != 'r' || inside_word {
        return None;
    }
    let hashes = text[i + 1..].iter().take_while(|&&c| c == '#').count();
    (text.get(i + 1 + hashes) == Some(&'"')).then_some(hashes)
}

/// The words of `code` (identifiers and keywords) with their line numbers.
fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().flat_map(|(n, line)| {
        line.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty()).map(move |w| (n + 1, w))
    })
}

/// `code` without its `#[cfg(test)] mod tests`, which by our habit ends the file.
fn without_tests(code: &str) -> &str {
    let tests = code.find("#[cfg(test)]\nmod ").or_else(|| code.find("#[cfg(all(test"));
    &code[..tests.unwrap_or(code.len())]
}

/// First path segments named after `crate::` in `code`, with line numbers; understands `crate::{a, b::c}`.
fn crate_names(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let rest = &code[at + "crate::".len()..];
        let ident = |s: &str| s.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        if let Some(list) = rest.strip_prefix('{') {
            let (mut depth, mut start) = (0, 0);
            for (i, c) in list.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth > 0 => depth -= 1,
                    ',' | '}' if depth == 0 => {
                        found.push((line, ident(&list[start..i])));
                        start = i + 1;
                        if c == '}' {
                            break;
                        }
                    }
                    _ => {}
                }
            }
        } else {
            found.push((line, ident(rest)));
        }
    }
    found.retain(|(_, name)| !name.is_empty());
    found
}

/// Fails with the list, if there is anything in it.
fn must_be_empty(faults: &[String], what: &str) {
    assert!(faults.is_empty(), "{what}:\n  {}", faults.join("\n  "));
}

#[test]
fn every_file_says_what_it_is_in_its_first_line() {
    let mut faults = Vec::new();
    for path in files("", &[".rs", ".py", ".pyi", ".cu"]) {
        let source = read(&path);
        // A script may start with `#!`.
        let first = source.lines().find(|line| !line.starts_with("#!")).unwrap_or("");
        let rust = path.extension().is_some_and(|e| e == "rs" || e == "cu");
        let text = if rust { first.strip_prefix("//!") } else { first.strip_prefix("\"\"\"") };
        if text.is_none_or(|t| t.trim_matches(['"', ' ']).len() < 10) {
            faults.push(format!("{}: {first:?}", shown(&path)));
        }
    }
    must_be_empty(&faults, "files must open with `//!` or `\"\"\"` and one sentence");
}

#[test]
fn unsafe_and_pyo3_stay_at_home() {
    let mut faults = Vec::new();
    for path in files("", &[".rs"]) {
        let (name, code) = (shown(&path), code_only(&read(&path)));
        for (line, word) in words(&code) {
            let home = match word {
                "unsafe" => {
                    name.starts_with("src/kernels/") || ["src/io/os.rs", "src/ops/crew.rs"].contains(&name.as_str())
                }
                "pyo3" => name.starts_with("src/py/"),
                _ => true,
            };
            if !home {
                faults.push(format!("{name}:{line}: {word}"));
            }
        }
    }
    must_be_empty(
        &faults,
        "`unsafe` lives in src/kernels, src/io/os.rs and src/ops/crew.rs only, `pyo3` in src/py only",
    );
}

#[test]
fn dependencies_point_one_way() {
    let mut faults = Vec::new();
    let parts: BTreeSet<&str> = EDGES.iter().map(|(part, _)| *part).collect();
    for path in files("src", &[".rs"]) {
        let name = shown(&path);
        if name == "src/lib.rs" {
            continue;
        }
        let part = name["src/".len()..].split(['/', '.']).next().unwrap().to_owned();
        let Some((_, allowed)) = EDGES.iter().find(|(p, _)| *p == part) else {
            faults.push(format!("{name}: {part} has no row in EDGES"));
            continue;
        };
        let code = code_only(&read(&path));
        let code = without_tests(&code);
        for (line, target) in crate_names(code) {
            let of_error = target == "Error" || target == "Result"; // re-exported by lib.rs
            let target = if of_error { "error" } else { target.as_str() };
            if target != part && (!parts.contains(target) || !allowed.contains(&target)) {
                faults.push(format!("{name}:{line}: {part} must not use {target}"));
            }
        }
        if code.contains("super::super::") {
            faults.push(format!("{name}: write crate:: instead of super::super::"));
        }
    }
    must_be_empty(&faults, "dependency edges (EDGES in tests/rust/tidy.rs)");
}

#[test]
fn every_rust_file_is_compiled() {
    let mut faults = Vec::new();
    let roots = ["src/lib.rs", "tests/rust/main.rs"];
    for path in files("src", &[".rs"]).into_iter().chain(files("tests/rust", &[".rs"])) {
        let name = shown(&path);
        if roots.contains(&name.as_str()) {
            continue;
        }
        let is_mod = path.file_name().unwrap() == "mod.rs";
        let module = if is_mod { path.parent().unwrap() } else { path.as_path() };
        let folder = module.parent().unwrap();
        let stem = module.file_stem().unwrap().to_string_lossy();
        let parents = ["mod.rs", "lib.rs", "main.rs"].map(|file| folder.join(file));
        let named = format!("mod {stem}");
        let declared = parents.iter().chain(std::iter::once(&folder.with_extension("rs"))).any(|parent| {
            parent.is_file() && code_only(&read(parent)).split(['\n', ';']).any(|s| s.trim_end().ends_with(&named))
        });
        // Or a neighbour names it: `#[path = "nf4_tests.rs"] mod tests;`.
        let by_path = format!("#[path = \"{stem}.rs\"]");
        let declared = declared || files(&shown(folder), &[".rs"]).iter().any(|file| read(file).contains(&by_path));
        if !declared {
            faults.push(format!("{name}: no `mod {stem};` above it"));
        }
    }
    must_be_empty(&faults, "files that no compiler sees");
}

#[test]
fn every_dependency_has_a_licence_we_accept() {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--locked", "--format-version", "1", "--all-features"])
        .args(["--filter-platform", &host()])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(metadata.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "only {} packages: is this the whole tree?", packages.len());
    let mut faults = Vec::new();
    for package in packages {
        let (name, licence) = (package["name"].as_str().unwrap(), package["license"].as_str().unwrap_or("none"));
        if !licence_is_accepted(licence) && !LICENCE_EXCEPTIONS.contains(&(name, licence)) {
            faults.push(format!("{name}: {licence}"));
        }
    }
    must_be_empty(&faults, "licences outside LICENCES and LICENCE_EXCEPTIONS in tests/rust/tidy.rs");
}

/// The target triple of this build machine, as `rustc -vV` names it.
fn host() -> String {
    let output = Command::new("rustc").arg("-vV").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().find_map(|line| line.strip_prefix("host: ")).unwrap().to_owned()
}

/// SPDX expressions as they occur in practice: `A OR B`, `A/B`, `A AND B`, `(A OR B) AND C`.
fn licence_is_accepted(expression: &str) -> bool {
    expression.split(" AND ").all(|term| {
        term.trim_matches(['(', ')', ' '])
            .split(" OR ")
            .flat_map(|t| t.split('/'))
            .any(|t| LICENCES.contains(&t.trim()))
    })
}

#[test]
fn no_file_carries_words_that_do_not_belong() {
    // Written in two halves, so that this file passes its own check.
    let everywhere = [
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("py", "pi.org"),
        concat!("files.python", "hosted"),
        concat!("index.crates", ".io"),
        concat!("static.crates", ".io"),
    ];
    let in_code = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let mut faults = Vec::new();
    let endings = [
        ".rs", ".py", ".pyi", ".toml", ".md", ".yaml", ".yml", ".txt", ".jinja", ".json", ".ipynb", ".sh", "Makefile",
        "run", ".cfg", ".cu",
    ];
    for path in files("", &endings) {
        let Ok(text) = fs::read_to_string(&path) else {
            faults.push(format!("{}: not UTF-8", shown(&path)));
            continue;
        };
        let code = path.extension().is_some_and(|e| e == "rs" || e == "py" || e == "pyi" || e == "cu");
        for (n, line) in text.lines().enumerate() {
            let words = everywhere.iter().chain(if code { in_code.iter() } else { [].iter() });
            for word in words.filter(|w| line.contains(**w)) {
                faults.push(format!("{}:{}: {word:?}", shown(&path), n + 1));
            }
        }
    }
    must_be_empty(&faults, "machine paths, registry hosts and unfinished work do not belong in the repository");
}

#[test]
fn the_helpers_of_this_file_see_what_they_should() {
    let code = code_only(
        "let a = \"unsafe\"; // unsafe\nlet r = r#\"pyo3 \" unsafe\"#; let c = '\"'; unsafe {}\n/* pyo3 */ x::<'a>(y)",
    );
    assert_eq!(words(&code).filter(|(_, w)| *w == "unsafe").map(|(n, _)| n).collect::<Vec<_>>(), [2]);
    assert!(!code.contains("pyo3") && code.contains("x::<'a>(y)"), "{code}");
    let names = crate_names("use crate::{error::{Error, Result}, ops, model::Llama};\nlet x = crate::lora::f();");
    let names: Vec<(usize, &str)> = names.iter().map(|(n, s)| (*n, s.as_str())).collect();
    assert_eq!(names, [(1, "error"), (1, "ops"), (1, "model"), (2, "lora")]);
    assert!(licence_is_accepted("(MIT OR GPL-3.0) AND Unicode-3.0") && !licence_is_accepted("MIT AND GPL-3.0"));
    assert!(without_tests("fn a() {}\n#[cfg(test)]\nmod tests {}").ends_with("{}\n"));
}
