//! Settings of a daemon: its table of `craton.toml`, then `CRATON_<TABLE>_<KEY>` variables, then `--set`.
//!
//! Two steps: first what was written and where, as spans of the file; then the daemon's own typed
//! settings, whose unknown fields and wrong types are reported with file, line and field.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::de::{DeserializeOwned, IntoDeserializer as _};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::cli::DaemonArgs;
use crate::exit::{Problem, USAGE};

/// The tables that a `craton.toml` may have.
const TABLES: [&str; 4] = ["node", "proxy", "backup", "witness"];

/// A table inside a daemon's own that another part of the program reads.
pub const WITNESS: &str = "witness";

/// In a file that a container wrote: between a setting and the variable that it comes from.
pub const ORIGIN_MARK: &str = " # from ";

/// The span of what did not come from the file.
const NOT_IN_FILE: Range<usize> = 0..0;

/// Where settings come from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The file.
    pub file: PathBuf,
    /// Its text.
    pub text: String,
    /// `CRATON_*` variables.
    pub environment: Vec<(String, String)>,
    /// `table.key=value` from the command line.
    pub set: Vec<String>,
}

impl Sources {
    /// Reads the file and the environment.
    pub fn gather(args: &DaemonArgs) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(&args.config).map_err(|e| {
            let what = format!(
                "cannot read the settings file {}: {e}",
                args.config.display()
            );
            Problem::new(
                USAGE,
                what,
                "name it with --config; docs/reference/settings.md lists what goes into it",
            )
        })?;
        let environment = std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .filter(|(k, _)| k.starts_with("CRATON_"))
            .collect();
        Ok(Self {
            file: args.config.clone(),
            text,
            environment,
            set: args.set.clone(),
        })
    }

    /// The typed settings of one table.
    pub fn table<T: DeserializeOwned>(&self, table: &str) -> anyhow::Result<T> {
        self.parse(table, |_| None)
    }

    /// The typed settings of a daemon's table, and of the table [`WITNESS`] in it where that daemon is one too.
    pub fn table_and_witness<T: DeserializeOwned, W: DeserializeOwned>(
        &self,
        table: &str,
    ) -> anyhow::Result<(T, Option<W>)> {
        let mut found = None;
        let settings = self.parse(table, |value| {
            let DeValue::Table(inner) = value else {
                return None;
            };
            let witness = inner.remove(WITNESS)?;
            match W::deserialize(witness.into_deserializer()) {
                Ok(witness) => {
                    found = Some(witness);
                    None
                }
                Err(error) => Some(error),
            }
        })?;
        Ok((settings, found))
    }

    fn parse<T: DeserializeOwned>(
        &self,
        table: &str,
        mut take: impl FnMut(&mut DeValue<'_>) -> Option<toml::de::Error>,
    ) -> anyhow::Result<T> {
        let parsed = DeTable::parse(&self.text).map_err(|e| self.problem(&e, table, &[]))?;
        let mut file = parsed.into_inner();
        for key in file.keys() {
            if !TABLES.contains(&key.get_ref().as_ref()) {
                let at = position(&self.text, key.span().start);
                let what = format!(
                    "{}:{at}: there is no table [{}]",
                    self.file.display(),
                    key.get_ref()
                );
                return Err(Problem::new(
                    USAGE,
                    what,
                    format!("the tables are [{}]", TABLES.join("], [")),
                )
                .into());
            }
        }
        let mut value = file
            .remove(table)
            .unwrap_or_else(|| Spanned::new(NOT_IN_FILE, DeValue::Table(DeTable::new())));
        let overlays = self.overlays(table)?;
        for overlay in &overlays {
            apply(value.get_mut(), &overlay.path, &overlay.value).map_err(|why| {
                Problem::new(
                    USAGE,
                    format!("{}: {why}", overlay.origin),
                    "check its name",
                )
            })?;
        }
        if let Some(error) = take(value.get_mut()) {
            return Err(self.problem(&error, table, &overlays));
        }
        T::deserialize(value.into_deserializer()).map_err(|e| self.problem(&e, table, &overlays))
    }

    /// Where each setting of a table was written, by its dotted name: `craton.toml:12`, `the variable X`, …
    pub fn origins(&self, table: &str) -> anyhow::Result<BTreeMap<String, String>> {
        let parsed = DeTable::parse(&self.text).map_err(|e| self.problem(&e, table, &[]))?;
        let mut origins = BTreeMap::new();
        if let Some(DeValue::Table(written)) = parsed.get_ref().get(table).map(Spanned::get_ref) {
            self.note_origins(written, "", &mut origins);
        }
        for overlay in self.overlays(table)? {
            origins.insert(overlay.path.join("."), overlay.origin);
        }
        Ok(origins)
    }

    fn note_origins(
        &self,
        written: &DeTable<'_>,
        prefix: &str,
        origins: &mut BTreeMap<String, String>,
    ) {
        for (key, value) in written {
            let name = format!("{prefix}{}", key.get_ref());
            if let DeValue::Table(inner) = value.get_ref() {
                self.note_origins(inner, &format!("{name}."), origins);
            } else {
                origins.insert(name, self.origin_at(key.span().start));
            }
        }
    }

    /// The place of a setting, or the variable that it comes from where the file says so.
    fn origin_at(&self, offset: usize) -> String {
        let rest = self.text.get(offset..).unwrap_or_default();
        let line = rest.lines().next().unwrap_or_default();
        if let Some((_, variable)) = line.rsplit_once(ORIGIN_MARK) {
            return format!("the variable {variable}");
        }
        let place = position(&self.text, offset);
        let number = place.split(':').next().unwrap_or_default();
        format!("{}:{number}", self.file.display())
    }

    /// What variables and flags say about `table`, in the order in which they count.
    fn overlays(&self, table: &str) -> anyhow::Result<Vec<Overlay>> {
        let prefix = format!("CRATON_{}_", table.to_ascii_uppercase());
        let mut environment: Vec<_> = self
            .environment
            .iter()
            .filter_map(|(k, v)| Some((k, k.strip_prefix(&prefix)?, v)))
            .collect();
        environment.sort();
        let mut overlays: Vec<Overlay> = environment
            .into_iter()
            .map(|(name, key, value)| Overlay {
                origin: format!("the variable {name}"),
                path: key
                    .to_ascii_lowercase()
                    .split("__")
                    .map(ToOwned::to_owned)
                    .collect(),
                value: value.clone(),
            })
            .collect();
        for set in &self.set {
            let parts = set
                .split_once('=')
                .and_then(|(path, value)| Some((path.split_once('.')?, value)));
            let Some(((named, path), value)) = parts else {
                return Err(Problem::new(
                    USAGE,
                    format!("--set {set} cannot be understood"),
                    "write --set table.key=value",
                )
                .into());
            };
            if named == table {
                let path = path.split('.').map(ToOwned::to_owned).collect();
                overlays.push(Overlay {
                    origin: format!("--set {set}"),
                    path,
                    value: value.to_owned(),
                });
            }
        }
        Ok(overlays)
    }

    fn problem(&self, error: &toml::de::Error, table: &str, overlays: &[Overlay]) -> anyhow::Error {
        let place = match error.span().filter(|span| *span != NOT_IN_FILE) {
            Some(span) => format!(
                "{}:{}",
                self.file.display(),
                position(&self.text, span.start)
            ),
            None => self.file.display().to_string(),
        };
        let mut what = format!("{place}: [{table}]: {}", error.message().trim());
        if !overlays.is_empty() {
            let origins: Vec<_> = overlays.iter().map(|o| o.origin.as_str()).collect();
            what = format!("{what} (also in force: {})", origins.join(", "));
        }
        Problem::new(
            USAGE,
            what,
            "docs/reference/settings.md lists every setting with its type",
        )
        .into()
    }
}

struct Overlay {
    origin: String,
    path: Vec<String>,
    value: String,
}

/// `line:column` of a byte offset, both from 1.
fn position(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .unwrap_or_default()
        .chars()
        .count()
        + 1;
    format!("{line}:{column}")
}

/// Sets one value, making tables on the way. What is a TOML value is one (numbers, booleans, lists);
/// everything else is a text.
fn apply<'i>(target: &mut DeValue<'i>, path: &[String], text: &'i str) -> Result<(), String> {
    let DeValue::Table(table) = target else {
        return Err("it names a key inside of something that is not a table".to_owned());
    };
    let Some((key, rest)) = path.split_first() else {
        return Err("it names no key".to_owned());
    };
    let name = Spanned::new(NOT_IN_FILE, Cow::Owned(key.clone()));
    if rest.is_empty() {
        let value = DeValue::parse(text).map_or_else(
            |_| DeValue::String(Cow::Borrowed(text)),
            Spanned::into_inner,
        );
        table.insert(name, Spanned::new(NOT_IN_FILE, value));
        return Ok(());
    }
    let next = table
        .entry(name)
        .or_insert_with(|| Spanned::new(NOT_IN_FILE, DeValue::Table(DeTable::new())));
    apply(next.get_mut(), rest, text)
}

/// Reads one table for a daemon. Relative paths in it are relative to the file's directory only where the
/// daemon says so; the local cluster writes absolute ones.
pub fn load<T: DeserializeOwned>(args: &DaemonArgs, table: &str) -> anyhow::Result<T> {
    Sources::gather(args)?.table(table)
}

/// Writes a settings file with one table.
pub fn write(path: &Path, table: &str, settings: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut file = toml::Table::new();
    let value = toml::Value::try_from(settings)
        .with_context(|| format!("cannot write [{table}] as TOML"))?;
    file.insert(table.to_owned(), value);
    let text = format!(
        "# Written by `craton up`, again at every start. Variables CRATON_{}_… and --set go on top of it.\n\n{}",
        table.to_ascii_uppercase(),
        toml::to_string_pretty(&file)?
    );
    crate::secrets::write_private(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        listen: String,
        #[serde(default)]
        pool: u32,
        #[serde(default)]
        inner: Inner,
    }

    #[derive(Deserialize, Debug, PartialEq, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        names: Vec<String>,
    }

    fn sources(text: &str, environment: &[(&str, &str)], set: &[&str]) -> Sources {
        Sources {
            file: "craton.toml".into(),
            text: text.into(),
            environment: environment
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            set: set.iter().map(|s| (*s).to_owned()).collect(),
        }
    }

    #[test]
    fn file_then_environment_then_flags() {
        let file = "[proxy]\nlisten = \"a:1\"\npool = 1\n";
        let sources = sources(
            file,
            &[
                ("CRATON_PROXY_POOL", "2"),
                ("CRATON_PROXY_LISTEN", "b:2"),
                ("CRATON_DIR", "/x"),
            ],
            &["proxy.pool=3", "proxy.inner.names=[\"x\"]", "node.pool=9"],
        );
        let settings: Settings = sources.table("proxy").unwrap();
        let inner = Inner {
            names: vec!["x".into()],
        };
        assert_eq!(
            settings,
            Settings {
                listen: "b:2".into(),
                pool: 3,
                inner
            }
        );
    }

    #[test]
    fn origins_name_line_variable_or_flag() {
        let file = "[proxy]\nlisten = \"a:1\"\npool = 1\n\n[proxy.inner]\nnames = []\n";
        let sources = sources(
            file,
            &[("CRATON_PROXY_POOL", "2")],
            &["proxy.extra.x=3", "node.pool=9"],
        );
        let origins: Vec<_> = sources.origins("proxy").unwrap().into_iter().collect();
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(
            origins,
            [
                pair("extra.x", "--set proxy.extra.x=3"),
                pair("inner.names", "craton.toml:6"),
                pair("listen", "craton.toml:2"),
                pair("pool", "the variable CRATON_PROXY_POOL"),
            ]
        );
    }

    #[test]
    fn a_required_field_may_come_from_the_environment_alone() {
        let settings: Settings = sources(
            "",
            &[
                ("CRATON_PROXY_LISTEN", "127.0.0.1:1"),
                ("CRATON_PROXY_INNER__NAMES", "[]"),
            ],
            &[],
        )
        .table("proxy")
        .unwrap();
        assert_eq!(settings.listen, "127.0.0.1:1");
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let wrong = |text: &str| {
            sources(text, &[], &[])
                .table::<Settings>("proxy")
                .unwrap_err()
                .to_string()
        };
        let unknown = wrong("[proxy]\nlisten = \"a:1\"\npooool = 1\n");
        assert!(
            unknown.starts_with("craton.toml:3:1: [proxy]: ") && unknown.contains("pooool"),
            "{unknown}"
        );
        let typed = wrong("[proxy]\nlisten = 5\n");
        assert!(
            typed.starts_with("craton.toml:2:10: ") && typed.contains("string"),
            "{typed}"
        );
        assert!(wrong("[proxy]\n").contains("listen"));
        assert!(wrong("[prox]\n").contains("there is no table [prox]"));
        assert!(wrong("[proxy\n").starts_with("craton.toml:1:"));
    }

    #[test]
    fn an_unknown_variable_is_named() {
        let error = sources(
            "[proxy]\nlisten = \"a\"\n",
            &[("CRATON_PROXY_POOOL", "1")],
            &[],
        )
        .table::<Settings>("proxy")
        .unwrap_err()
        .to_string();
        assert!(error.contains("CRATON_PROXY_POOOL"), "{error}");
    }
}
