//! What a container's daemon was told, and which variable each setting comes from: `craton config show --origin`.

use std::collections::BTreeMap;
use std::path::Path;

use craton_agent::witness::WitnessConfig;
use craton_proxy::ProxyConfig;

use super::entry::{Facts, RUN_DIR};
use super::environment::Kind;
use crate::cli::DaemonArgs;
use crate::config::Sources;

/// A setting of the daemon of this container.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Own {
    /// Its name, with the table.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Where it comes from.
    pub origin: String,
}

/// The daemon's settings; `None` outside of a container, or before its daemon has begun.
pub fn own() -> anyhow::Result<Option<(Kind, Vec<Own>)>> {
    let Some(facts) = Facts::load()? else {
        return Ok(None);
    };
    let file = Path::new(RUN_DIR).join("craton.toml");
    if !file.exists() {
        return Ok(None);
    }
    let table = facts.kind.as_str();
    let sources = sources(&file)?;
    let values: toml::Table = sources.table(table)?;
    let file = file.display().to_string();
    let rows = rows(table, &values, &sources.origins(table)?, &file);
    Ok(Some((facts.kind, rows)))
}

fn sources(file: &Path) -> anyhow::Result<Sources> {
    Sources::gather(&DaemonArgs {
        config: file.to_owned(),
        set: Vec::new(),
        pid_file: None,
    })
}

/// Where this container's proxy takes clients, as seen from inside.
pub fn proxy_address() -> anyhow::Result<String> {
    let sources = sources(&Path::new(RUN_DIR).join("craton.toml"))?;
    let (config, _) = sources.table_and_witness::<ProxyConfig, WitnessConfig>("proxy")?;
    Ok(from_inside(&config.listen))
}

/// An address that stands for all of the host's is reached by loopback.
fn from_inside(listen: &str) -> String {
    match listen.rsplit_once(':') {
        Some(("0.0.0.0" | "[::]" | "*" | "", port)) => format!("127.0.0.1:{port}"),
        _ => listen.to_owned(),
    }
}

fn rows(
    table: &str,
    values: &toml::Table,
    origins: &BTreeMap<String, String>,
    file: &str,
) -> Vec<Own> {
    let mut flat = Vec::new();
    flatten("", values, &mut flat);
    let row = |(name, value): (String, String)| Own {
        origin: match origins.get(&name) {
            // A line of the file that names no variable.
            Some(origin) if !origin.starts_with(file) => origin.clone(),
            _ => "the image".to_owned(),
        },
        name: format!("{table}.{name}"),
        value,
    };
    flat.into_iter().map(row).collect()
}

fn flatten(prefix: &str, values: &toml::Table, into: &mut Vec<(String, String)>) {
    for (key, value) in values {
        let name = format!("{prefix}{key}");
        match value {
            toml::Value::Table(inner) => flatten(&format!("{name}."), inner, into),
            toml::Value::String(text) => into.push((name, text.clone())),
            other => into.push((name, other.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_for_all_is_asked_at_loopback() {
        assert_eq!(from_inside("0.0.0.0:5432"), "127.0.0.1:5432");
        assert_eq!(from_inside("[::]:5432"), "127.0.0.1:5432");
        assert_eq!(from_inside("10.0.0.1:6432"), "10.0.0.1:6432");
    }

    #[test]
    fn every_setting_with_its_variable() {
        let values: toml::Table =
            toml::from_str("host = 'a'\n[postgresql]\nwork_mem = '8MB'\n").unwrap();
        let origins = BTreeMap::from([
            ("host".to_owned(), "/run/c.toml:3".to_owned()),
            (
                "postgresql.work_mem".to_owned(),
                "the variable CONFIGS".to_owned(),
            ),
        ]);
        let seen: Vec<String> = rows("node", &values, &origins, "/run/c.toml")
            .iter()
            .map(|o| format!("{} {} {}", o.name, o.value, o.origin))
            .collect();
        assert_eq!(
            seen,
            [
                "node.host a the image",
                "node.postgresql.work_mem 8MB the variable CONFIGS"
            ]
        );
    }
}
