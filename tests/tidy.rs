//! Style and architecture as tests: what may depend on what, sizes, words, links, licences, and pages of
//! the reference that are made from the code. `CRATON_WRITE_DOCS=1` writes those pages again (`make fix`).
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "tidy/named.rs"]
mod named;
#[path = "tidy/reference.rs"]
mod reference;

/// Lines of a file at most.
const FILE_LINES_MAX: usize = 800;

/// Lines of code of a function at most, from its `fn` to its brace, without comments and blank lines.
const FUNCTION_LINES_MAX: usize = 80;

/// Functions that are longer today. They may shrink and leave this list; nothing may be added or grow.
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[
    ("crates/core/src/decide/sync_set.rs", "sync_rule", 85),
    (
        "crates/proxy/tests/failover.rs",
        "clients_outlive_the_primary",
        111,
    ),
    ("crates/proxy/tests/relay.rs", "messages_one_by_one", 87),
    (
        "crates/proxy/tests/relay.rs",
        "state_of_a_session_stays_with_it",
        88,
    ),
];

/// Files that are longer today, under the same rule.
const LONG_FILES: &[(&str, usize)] = &[];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .display()
        .to_string()
}

/// Every file of the project with one of these endings, without what is built or hidden.
fn files(endings: &[&str]) -> Vec<PathBuf> {
    fn walk(dir: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
        let mut entries: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .flatten()
            .map(|e| e.path())
            .collect();
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !(name.starts_with('.') && name != ".ci") {
                    walk(&path, endings, found);
                }
            } else if endings.iter().any(|e| name.ends_with(e)) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), endings, &mut found);
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn manifest(crate_name: &str) -> toml::Table {
    toml::from_str(&read(
        &root().join("crates").join(crate_name).join("Cargo.toml"),
    ))
    .unwrap()
}

/// What a crate depends on, tests left out.
fn dependencies(crate_name: &str) -> BTreeSet<String> {
    let table = manifest(crate_name);
    table
        .get("dependencies")
        .and_then(|d| d.as_table())
        .map(|d| d.keys().cloned().collect())
        .unwrap_or_default()
}

fn crates() -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(root().join("crates"))
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn fail_if_any(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

/// Invariant 1: core, wire and repo cannot reach the world.
#[test]
fn pure_crates_stay_pure() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("core", &["serde", "serde_json", "thiserror"][..]),
        (
            "wire",
            &[
                "craton-core",
                "bytes",
                "memchr",
                "sha2",
                "hmac",
                "md-5",
                "subtle",
                "base64",
                "stringprep",
                "thiserror",
                "serde",
            ][..],
        ),
        (
            "repo",
            &[
                "craton-core",
                "blake3",
                "zstd",
                "crc32c",
                "serde",
                "serde_json",
                "thiserror",
            ][..],
        ),
    ]);
    let words = [
        "std::fs",
        "std::net",
        "std::env",
        "std::process",
        "std::thread",
        "SystemTime",
        "HashMap",
        "HashSet",
        "tokio::",
        "rand::",
    ];
    let mut problems = Vec::new();
    for (name, allowed) in allowed {
        for dependency in dependencies(name) {
            if !allowed.contains(&dependency.as_str()) {
                problems.push(format!(
                    "crates/{name} depends on {dependency}: it must stay pure"
                ));
            }
        }
        for path in files(&[".rs"])
            .into_iter()
            .filter(|p| p.starts_with(root().join("crates").join(name).join("src")))
        {
            let is_test =
                path.components().any(|c| c.as_os_str() == "tests") || path.ends_with("tests.rs");
            for (number, line) in before_tests(&read(&path)).lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                if let Some(word) = words.iter().find(|w| code.contains(**w))
                    && !is_test
                {
                    problems.push(format!(
                        "{}:{}: names {word}: the crate must stay pure",
                        relative(&path),
                        number + 1
                    ));
                }
            }
        }
    }
    fail_if_any(&problems);
}

fn before_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

/// The drawing in ARCHITECTURE.md: dependencies point down, and agent, proxy and backup do not know each
/// other (invariant 8).
#[test]
fn dependencies_point_down() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("core", &[][..]),
        ("wire", &["core"][..]),
        ("repo", &["core"][..]),
        ("fence", &[][..]),
        ("pg", &["core", "wire", "trust"][..]),
        ("trust", &[][..]),
        ("coordinator", &["core", "trust"][..]),
        ("console", &["core", "trust"][..]),
        (
            "agent",
            &["core", "pg", "coordinator", "console", "fence", "trust"][..],
        ),
        ("proxy", &["core", "wire", "pg", "console", "trust"][..]),
        (
            "backup",
            &["core", "wire", "repo", "pg", "console", "trust"][..],
        ),
        ("sim", &["core", "repo"][..]),
        (
            "craton",
            &[
                "core", "pg", "console", "fence", "agent", "proxy", "backup", "sim", "repo",
                "trust",
            ][..],
        ),
    ]);
    let mut problems = Vec::new();
    for name in crates() {
        let Some(allowed) = allowed.get(name.as_str()) else {
            problems.push(format!(
                "crates/{name} is not in the list of this test: say what it may depend on"
            ));
            continue;
        };
        for dependency in dependencies(&name)
            .iter()
            .filter_map(|d| d.strip_prefix("craton-"))
        {
            if !allowed.contains(&dependency) {
                problems.push(format!(
                    "crates/{name} depends on craton-{dependency}, which is not below it"
                ));
            }
        }
    }
    fail_if_any(&problems);
}

/// Invariant 4: outside crates that only their owner may name.
#[test]
fn outside_crates_have_one_owner() {
    let owners: [(&str, &[&str]); 13] = [
        ("tokio-postgres", &["pg", "craton"]),
        ("postgres-protocol", &["pg", "craton"]),
        ("axum", &["console", "agent", "proxy", "backup"]),
        ("clap", &["craton"]),
        ("comfy-table", &["craton"]),
        ("zstd", &["repo"]),
        ("hyper", &["console", "coordinator"]),
        ("hyper-util", &["console", "coordinator"]),
        ("rustls", &["trust", "coordinator"]),
        ("tokio-rustls", &["trust", "coordinator"]),
        ("rcgen", &["trust"]),
        ("x509-parser", &["trust"]),
        ("blake3", &["repo"]),
    ];
    let mut problems = Vec::new();
    for name in crates() {
        let theirs = dependencies(&name);
        for (outside, may) in owners {
            if theirs.contains(outside) && !may.contains(&name.as_str()) {
                problems.push(format!(
                    "crates/{name} names {outside}, which belongs to {}",
                    may.join(", ")
                ));
            }
        }
    }
    fail_if_any(&problems);
}

/// Clippy reads the nearest clippy.toml and merges nothing: the pure crates repeat the workspace's.
#[test]
fn copies_of_clippy_toml_are_in_step() {
    let base: toml::Table = toml::from_str(&read(&root().join("clippy.toml"))).unwrap();
    let mut problems = Vec::new();
    for name in ["core", "wire", "repo"] {
        let path = root().join("crates").join(name).join("clippy.toml");
        let copy: toml::Table = toml::from_str(&read(&path)).unwrap();
        for (key, value) in &base {
            let same = match (value, copy.get(key)) {
                (toml::Value::Array(wanted), Some(toml::Value::Array(there))) => {
                    wanted.iter().all(|w| there.contains(w))
                }
                (wanted, there) => there == Some(wanted),
            };
            if !same {
                problems.push(format!(
                    "{}: {key} differs from the workspace's clippy.toml",
                    relative(&path)
                ));
            }
        }
    }
    fail_if_any(&problems);
}

#[test]
fn every_crate_takes_the_workspaces_lints() {
    let mut problems = Vec::new();
    for name in crates() {
        let lints = manifest(&name)
            .get("lints")
            .and_then(|l| l.get("workspace"))
            .and_then(toml::Value::as_bool);
        if lints != Some(true) {
            problems.push(format!(
                "crates/{name}/Cargo.toml lacks [lints] workspace = true"
            ));
        }
    }
    fail_if_any(&problems);
}

#[test]
fn files_and_functions_stay_small() {
    let mut problems = Vec::new();
    for path in files(&[".rs"]) {
        let (name, text) = (relative(&path), read(&path));
        let lines = text.lines().count();
        let limit = LONG_FILES
            .iter()
            .find(|(file, _)| *file == name)
            .map_or(FILE_LINES_MAX, |(_, size)| *size);
        if lines > limit {
            problems.push(format!(
                "{name} has {lines} lines, at most {limit}: split it by concept"
            ));
        }
        for (function, at, length) in functions(&text) {
            let listed = LONG_FUNCTIONS
                .iter()
                .find(|(file, f, _)| *file == name && *f == function);
            let limit = listed.map_or(FUNCTION_LINES_MAX, |(_, _, size)| *size);
            if length > limit {
                problems.push(format!(
                    "{name}:{at}: fn {function} has {length} lines, at most {limit}"
                ));
            }
        }
    }
    fail_if_any(&problems);
}

/// Functions with their first line and their length, by indentation (the code is formatted).
fn functions(text: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let code = line.trim_start();
        let Some(position) = code.find("fn ") else {
            continue;
        };
        let before = &code[..position];
        let only_modifiers = before.split_whitespace().all(|w| {
            ["pub", "async", "const", "unsafe", "extern"].contains(&w) || w.starts_with("pub(")
        });
        if !only_modifiers {
            continue;
        }
        let name: String = code[position + 3..]
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        let closing = format!("{}}}", " ".repeat(indent));
        let end = lines
            .iter()
            .skip(start)
            .position(|l| *l == closing || (l.starts_with(&closing) && l.trim() == "}"));
        let declared_only = lines
            .iter()
            .skip(start)
            .take_while(|l| !l.contains('{'))
            .any(|l| l.trim_end().ends_with(';'));
        if let Some(length) = end.filter(|_| !declared_only) {
            let body = lines.iter().skip(start).take(length + 1).map(|l| l.trim());
            let code = body
                .filter(|l| !l.is_empty() && !l.starts_with("//"))
                .count();
            found.push((name, start + 1, code));
        }
    }
    found
}

#[test]
fn every_module_says_what_it_is() {
    let mut problems = Vec::new();
    for path in files(&[".rs"]) {
        // Unit tests in a file of their own are documented by what they test.
        let in_src = path.components().any(|c| c.as_os_str() == "src");
        let unit_tests = in_src
            && path
                .components()
                .any(|c| c.as_os_str() == "tests" || c.as_os_str() == "tests.rs");
        if !unit_tests && !read(&path).starts_with("//!") {
            problems.push(format!(
                "{} does not begin with //! and what it is for",
                relative(&path)
            ));
        }
    }
    fail_if_any(&problems);
}

/// Words that mean "not finished", and paths of somebody's machine.
#[test]
fn banned_words_are_absent() {
    // Put together here, so that this file does not hold them.
    let banned = [
        ["FIX", "ME"].concat(),
        ["XX", "X:"].concat(),
        ["TO", "DO"].concat(),
        ["todo", "!("].concat(),
        ["unimplemented", "!("].concat(),
        ["dbg", "!("].concat(),
        ["/work", "/main"].concat(),
        ["/work", "/shared"].concat(),
        ["/ho", "me/user"].concat(),
    ];
    let mut problems = Vec::new();
    for path in files(&[".rs", ".md", ".toml", ".sh", ".yml", "Makefile", "run"]) {
        for (number, line) in read(&path).lines().enumerate() {
            if let Some(word) = banned.iter().find(|w| line.contains(w.as_str())) {
                problems.push(format!("{}:{}: {word}", relative(&path), number + 1));
            }
        }
    }
    fail_if_any(&problems);
}

/// Links between the project's own pages lead somewhere.
#[test]
fn relative_links_are_alive() {
    let mut problems = Vec::new();
    for path in files(&[".md"]) {
        let text = read(&path);
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap_or_default();
            let elsewhere = target.is_empty()
                || target.contains("://")
                || target.starts_with("mailto:")
                || target.contains(' ');
            if !elsewhere && !path.parent().unwrap().join(target).exists() {
                problems.push(format!(
                    "{}: the link to {link} leads nowhere",
                    relative(&path)
                ));
            }
        }
    }
    fail_if_any(&problems);
}

/// What alert rules and dashboards ask for is served: every name is in the reference, which is made from the code.
#[test]
fn monitoring_asks_for_metrics_that_exist() {
    let reference = read(&root().join("docs/reference/metrics.md"));
    let mut problems = Vec::new();
    for path in files(&[".yml", ".json"]) {
        let name = relative(&path);
        if !name.starts_with("docker-compose/monitoring/") {
            continue;
        }
        let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        for metric in read(&path).split(word) {
            let ours = metric.starts_with("craton_") || metric.starts_with("barman_");
            // What a histogram of the reference is served as.
            let metric = metric.trim_end_matches("_bucket");
            if ours && !reference.contains(&format!("`{metric}`")) {
                problems.push(format!("{name}: there is no metric {metric}"));
            }
        }
    }
    fail_if_any(&problems);
}

/// Targets of make, commands and options of craton, and files that the pages name.
#[test]
fn pages_name_what_is_there() {
    fail_if_any(&named::problems());
}

/// Every dependency that is built may be given away under a licence on the list of deny.toml.
#[test]
fn licences_are_on_the_list() {
    let deny: toml::Table = toml::from_str(&read(&root().join("deny.toml"))).unwrap();
    let allowed: Vec<&str> = deny["licenses"]["allow"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(toml::Value::as_str)
        .collect();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--offline",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let built: BTreeSet<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|n| n["id"].as_str())
        .collect();
    let mut problems = Vec::new();
    for package in metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|p| p["id"].as_str().is_some_and(|id| built.contains(id)))
    {
        let licence = package["license"].as_str().unwrap_or("none");
        if !licence_fits(licence, &allowed) {
            problems.push(format!(
                "{} {} has the licence {licence}",
                package["name"], package["version"]
            ));
        }
    }
    fail_if_any(&problems);
}

/// SPDX expressions as they occur: alternatives with OR (or the old slash), all of AND needed.
fn licence_fits(expression: &str, allowed: &[&str]) -> bool {
    let plain = expression.replace(['(', ')'], "").replace('/', " OR ");
    plain
        .split(" AND ")
        .all(|all| all.split(" OR ").any(|one| allowed.contains(&one.trim())))
}

/// The reference says what the code says.
#[test]
fn reference_pages_are_in_step() {
    let mut problems = String::new();
    for (page, text) in reference::pages(&root()) {
        let path = root().join("docs/reference").join(page);
        if std::env::var("CRATON_WRITE_DOCS").is_ok_and(|v| v == "1") {
            std::fs::write(&path, text).unwrap();
        } else if std::fs::read_to_string(&path).ok().as_deref() != Some(text.as_str()) {
            writeln!(
                problems,
                "docs/reference/{page} is not what the code says: run `make fix`"
            )
            .unwrap();
        }
    }
    assert!(problems.is_empty(), "\n{problems}");
}
