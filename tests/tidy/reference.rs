//! The pages of the reference, rendered from the code: commands from clap, metrics from their registries,
//! settings from the structs that hold them.

use std::fmt::Write as _;
use std::path::Path;

use clap::CommandFactory as _;
use craton_console::Metrics;
use craton_console::metrics::render_reference;

/// Every generated page: file name and text.
pub fn pages(root: &Path) -> Vec<(&'static str, String)> {
    vec![
        ("commands.md", commands()),
        (
            "environment.md",
            craton::container::environment::reference(),
        ),
        ("metrics.md", metrics()),
        ("settings.md", settings(root)),
    ]
}

fn commands() -> String {
    let mut page = String::from(
        "# Commands\n\nGenerated from the code by `make fix`; a test keeps it in step. `craton COMMAND --help` says the same.\n\
         The options of the first section go with every command.\n",
    );
    let root = craton::cli::Cli::command();
    describe(&mut page, &root, &[]);
    page.push_str("\n## Exit codes\n\n| code | meaning |\n|---|---|\n");
    for (code, meaning) in craton::exit::MEANINGS {
        writeln!(page, "| {code} | {meaning} |").unwrap();
    }
    page
}

fn describe(page: &mut String, command: &clap::Command, path: &[&str]) {
    let mut name = path.to_vec();
    name.push(command.get_name());
    let about = command
        .get_about()
        .map(ToString::to_string)
        .unwrap_or_default();
    writeln!(page, "\n## `{}`\n\n{about}\n", name.join(" ")).unwrap();
    let arguments: Vec<_> = command
        .get_arguments()
        .filter(|a| !a.is_hide_set() && !["help", "version"].contains(&a.get_id().as_str()))
        .collect();
    if !arguments.is_empty() {
        page.push_str("| argument | meaning |\n|---|---|\n");
        for argument in arguments {
            writeln!(page, "| `{}` | {} |", usage(argument), meaning(argument)).unwrap();
        }
    }
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
        describe(page, sub, &name);
    }
}

fn usage(argument: &clap::Arg) -> String {
    let value = argument
        .get_value_names()
        .map(|v| v.join(" "))
        .unwrap_or_default();
    let takes_value = argument.get_action().takes_values();
    match argument.get_long() {
        Some(long) if takes_value => format!("--{long} {value}"),
        Some(long) => format!("--{long}"),
        None => format!("[{value}]"),
    }
}

fn meaning(argument: &clap::Arg) -> String {
    let mut text = argument
        .get_help()
        .map(ToString::to_string)
        .unwrap_or_default();
    let shown = argument.get_action().takes_values();
    let values: Vec<_> = argument
        .get_possible_values()
        .iter()
        .filter(|v| !v.is_hide_set())
        .map(|v| format!("`{}`", v.get_name()))
        .collect();
    if shown && !values.is_empty() {
        write!(text, "; one of {}", values.join(", ")).unwrap();
    }
    let defaults: Vec<_> = argument
        .get_default_values()
        .iter()
        .map(|d| d.to_string_lossy())
        .collect();
    if shown && !defaults.is_empty() {
        write!(text, " (default `{}`)", defaults.join(" ")).unwrap();
    }
    if let Some(variable) = argument.get_env() {
        write!(text, " (variable `{}`)", variable.to_string_lossy()).unwrap();
    }
    text.replace('|', "\\|")
}

fn metrics() -> String {
    let mut agent = Metrics::new();
    craton_agent::metrics::AgentMetrics::register(&mut agent);
    let mut backup = Metrics::new();
    craton_backup::metrics::BackupMetrics::register(&mut backup);
    render_reference(&[
        ("Agent", agent.catalogue()),
        ("Backup", backup.catalogue()),
        (
            "Backup, in the container `craton/backup` besides",
            &craton::container::barman::metrics_catalogue(),
        ),
        ("Proxy", &craton_proxy::metrics_catalogue()),
        (
            "Witness",
            craton_agent::witness::metrics_catalogue().catalogue(),
        ),
    ])
}

/// Title, what it is about, file and struct.
const TABLES: [(&str, &str, &str, &str); 13] = [
    (
        "[node]",
        "The agent beside one PostgreSQL.",
        "crates/agent/src/config.rs",
        "AgentConfig",
    ),
    (
        "[[node.peers]]",
        "Each voter of the coordinator.",
        "crates/agent/src/config.rs",
        "Peer",
    ),
    (
        "[node.coordinator]",
        "Where a new cluster keeps its records, and how this host reaches that etcd; moving them later: `craton coordinator move`.",
        "crates/coordinator/src/place.rs",
        "Place",
    ),
    (
        "[node.clone]",
        "How an empty data directory is filled.",
        "crates/agent/src/config.rs",
        "CloneConfig",
    ),
    (
        "[node.hooks]",
        "A program of the operator's that is told of changes of the role.",
        "crates/agent/src/hooks.rs",
        "HooksConfig",
    ),
    (
        "[node.initial]",
        "What a new cluster starts with; from then on the cluster keeps these itself: see `craton config`.",
        "crates/core/src/settings.rs",
        "Settings",
    ),
    (
        "[node.tls], [proxy.tls], [backup.tls], [witness.tls]",
        "Certificates of a part. TLS is on: without them a daemon does not start.",
        "crates/trust/src/files.rs",
        "TlsSettings",
    ),
    (
        "[proxy]",
        "The proxy.",
        "crates/proxy/src/config.rs",
        "ProxyConfig",
    ),
    (
        "[[proxy.pool_nodes]]",
        "Each row of `SHOW pool_nodes`.",
        "crates/proxy/src/config.rs",
        "PoolNode",
    ),
    (
        "[[proxy.pools]]",
        "Pools that differ.",
        "crates/proxy/src/config.rs",
        "PoolOverride",
    ),
    (
        "[[proxy.backends]]",
        "Each server of a set without agents.",
        "crates/proxy/src/config.rs",
        "StaticBackend",
    ),
    (
        "[backup]",
        "The backup daemon.",
        "crates/backup/src/config.rs",
        "Config",
    ),
    (
        "[witness], [proxy.witness], [backup.witness]",
        "A witness: a voter without a PostgreSQL, as a daemon of its own, or inside a proxy or a backup daemon.",
        "crates/agent/src/witness.rs",
        "WitnessConfig",
    ),
];

/// The settings are read from the source: a struct's fields, their types, their documentation.
fn settings(root: &Path) -> String {
    let mut page = String::from(
        "# Settings\n\nGenerated from the code by `make fix`; a test keeps it in step.\n\n\
         A daemon reads its table of `craton.toml` (`--config`), then variables `CRATON_<TABLE>_<KEY>` (a key inside\n\
         another table after two underscores: `CRATON_NODE_INITIAL__TTL_MS`), then `--set table.key=value`. What comes later\n\
         counts. `CRATON_LOG` sets the level of the log (`info`, `debug`, `craton_proxy=trace`), and\n\
         `CRATON_LOG_FORMAT=json` its form.\n",
    );
    for (table, about, file, name) in TABLES {
        writeln!(
            page,
            "\n## `{table}`\n\n{about}\n\n| key | type | meaning |\n|---|---|---|"
        )
        .unwrap();
        let source = std::fs::read_to_string(root.join(file)).unwrap();
        if name == "Settings" {
            page.truncate(page.len() - "| key | type | meaning |\n|---|---|---|\n".len());
            shared_settings(&mut page);
            continue;
        }
        for (key, kind, doc) in fields(&source, name) {
            writeln!(page, "| `{key}` | `{kind}` | {} |", doc.replace('|', "\\|")).unwrap();
        }
    }
    page
}

/// The cluster-wide settings, from the table that also checks them.
fn shared_settings(page: &mut String) {
    page.push_str("| key | may be | default | meaning |\n|---|---|---|---|\n");
    for field in craton_core::settings::FIELDS {
        writeln!(
            page,
            "| `{}` | {} | `{}` | {} |",
            field.name,
            field.range(),
            field.default_text(),
            field.doc
        )
        .unwrap();
    }
    page.push_str(
        "| `postgresql` | table | empty | Parameters of PostgreSQL for every member, by name. A member's own `[node.postgresql]` goes over them. |\n",
    );
}

/// The public fields of a struct: name, type, documentation.
fn fields(source: &str, name: &str) -> Vec<(String, String, String)> {
    let start = source
        .find(&format!("pub struct {name} {{"))
        .unwrap_or_else(|| panic!("no struct {name}"));
    let body = source[start..].split("\n}").next().unwrap();
    let (mut found, mut doc, mut hidden) = (Vec::new(), Vec::new(), false);
    for line in body.lines().skip(1).map(str::trim) {
        if line == "#[serde(skip)]" {
            hidden = true;
        } else if let Some(text) = line.strip_prefix("///") {
            doc.push(text.trim());
        } else if let Some((key, kind)) = line
            .strip_prefix("pub ")
            .and_then(|field| field.split_once(": "))
        {
            let doc = std::mem::take(&mut doc)
                .join(" ")
                .replace(", see [`Secrets`]", "");
            if std::mem::take(&mut hidden) {
                continue;
            }
            found.push((key.to_owned(), kind.trim_end_matches(',').to_owned(), doc));
        }
    }
    assert!(!found.is_empty(), "struct {name} has no public fields");
    found
}
