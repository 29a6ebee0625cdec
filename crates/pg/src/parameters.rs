//! PostgreSQL's parameters: which an operator may set for a cluster, whether a value can be, and which wait
//! for a restart.

use std::collections::BTreeMap;
use std::time::Duration;

use craton_core::observe::PendingChange;
use serde::{Deserialize, Serialize};

use crate::config;
use crate::control::{Control, literal};
use crate::error::{PgError, Result};
use crate::files::blocking;
use crate::instance::{Instance, run_tool};

pub use craton_core::settings::STANDBY_AT_LEAST;

/// One row of `pg_settings`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// The value in force, in `unit`.
    pub setting: String,
    /// What a plain number counts: `8kB`, `ms`, …
    pub unit: Option<String>,
    /// When it can change: `internal`, `postmaster`, `sighup`, …
    pub context: String,
    /// `bool`, `integer`, `real`, `string` or `enum`.
    pub vartype: String,
    /// The least, in `unit`.
    pub min_val: Option<String>,
    /// The greatest, in `unit`.
    pub max_val: Option<String>,
    /// The words of an enum.
    pub enumvals: Option<Vec<String>>,
}

/// Why an operator's value for a parameter is refused; none if it may be set.
pub fn refused(name: &str) -> Option<&'static str> {
    if !config::OWNED_KEYS.contains(&name) {
        return None;
    }
    Some(match name {
        "synchronous_standby_names" => {
            "it is the sync set, which Craton keeps; set durability and sync_standbys instead"
        }
        "primary_conninfo" | "primary_slot_name" | "promote_trigger_file" => {
            "it says whom a standby follows, which Craton decides"
        }
        "port" | "listen_addresses" | "unix_socket_directories" | "unix_socket_permissions" => {
            "it differs from member to member; set it in the member's craton.toml"
        }
        "fsync" | "full_page_writes" => "without it a crash can destroy acknowledged commits",
        "lc_messages" => {
            "Craton reads PostgreSQL's messages; give a role or a database another language with ALTER ROLE or ALTER DATABASE … SET"
        }
        "restart_after_crash" => {
            "on would show clients what PostgreSQL recovered after the crash of a session before any standby has it; the agent starts it again, or hands over"
        }
        "hot_standby" => "Craton reads the state of standbys through it",
        "log_destination" | "logging_collector" => "Craton keeps PostgreSQL's log in pg.log",
        _ if name.starts_with("recovery_") => "a member that stops short in recovery cannot follow",
        _ => "Craton sets it itself",
    })
}

impl Parameter {
    /// Says what is wrong with a value, if anything. What PostgreSQL's own hooks know beyond type and range is
    /// left to [`Instance::try_parameters`].
    pub fn check(&self, value: &str) -> std::result::Result<(), String> {
        if self.context == "internal" {
            return Err(format!(
                "{} cannot be changed: it was fixed when PostgreSQL was built or the cluster was made",
                self.name
            ));
        }
        match self.vartype.as_str() {
            "bool" if !is_bool(value) => {
                Err(format!("{} = {value} is neither on nor off", self.name))
            }
            "enum" => self.check_word(value),
            "integer" | "real" => self.check_number(value),
            _ => Ok(()),
        }
    }

    fn check_word(&self, value: &str) -> std::result::Result<(), String> {
        let words = self.enumvals.clone().unwrap_or_default();
        // Enums with on and off take every spelling of a bool.
        let known = words.iter().any(|w| w.eq_ignore_ascii_case(value))
            || (is_bool(value) && words.iter().any(|w| w == "on"));
        if known {
            return Ok(());
        }
        Err(format!(
            "{} = {value} is not one of {}",
            self.name,
            words.join(", ")
        ))
    }

    fn check_number(&self, value: &str) -> std::result::Result<(), String> {
        let limit = |text: &Option<String>| text.as_deref().and_then(|t| t.parse::<f64>().ok());
        let unit = self.unit.as_deref().unwrap_or_default();
        let Some(number) = in_unit(value, unit) else {
            let units = if unit.is_empty() {
                String::new()
            } else {
                format!(" (in {unit}, or with a unit of its own)")
            };
            return Err(format!("{} = {value} is not a number{units}", self.name));
        };
        let (min, max) = (limit(&self.min_val), limit(&self.max_val));
        if min.is_some_and(|m| number < m) || max.is_some_and(|m| number > m) {
            return Err(format!(
                "{} = {value} is out of range: PostgreSQL takes {} to {} {unit}",
                self.name,
                self.min_val.as_deref().unwrap_or("-∞"),
                self.max_val.as_deref().unwrap_or("∞"),
            )
            .trim_end()
            .to_owned());
        }
        Ok(())
    }

    /// True if a change takes effect only at the next start.
    pub fn needs_restart(&self) -> bool {
        self.context == "postmaster"
    }
}

/// PostgreSQL takes any unambiguous beginning of these words (bool.c).
fn is_bool(value: &str) -> bool {
    let value = value.to_ascii_lowercase();
    let begins = |word: &str, least: usize| value.len() >= least && word.starts_with(&value);
    value == "0"
        || value == "1"
        || begins("true", 1)
        || begins("false", 1)
        || begins("yes", 1)
        || begins("no", 1)
        || begins("on", 2)
        || begins("off", 2)
}

/// A number with an optional unit, in `unit` of `pg_settings` (guc.c, `convert_to_base_unit`). PostgreSQL rounds,
/// which the range check allows for by not doing so.
fn in_unit(value: &str, unit: &str) -> Option<f64> {
    let value = value.trim();
    let end = value
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-' | '+' | 'e' | 'E' | 'x')))
        .unwrap_or(value.len());
    let (digits, suffix) = value.split_at_checked(end)?;
    let suffix = suffix.trim();
    let number = match digits.strip_prefix("0x") {
        Some(hex) => f64::from(u32::from_str_radix(hex, 16).ok()?),
        None => digits.parse::<f64>().ok()?,
    };
    if suffix.is_empty() {
        return Some(number);
    }
    Some(number * size_of(suffix)? / size_of(unit)?).filter(|_| same_kind(suffix, unit))
}

/// Bytes or microseconds in a unit, `8kB` included.
fn size_of(unit: &str) -> Option<f64> {
    let at = unit.find(|c: char| !c.is_ascii_digit()).unwrap_or(0);
    let (count, name) = unit.split_at_checked(at)?;
    let count = if count.is_empty() {
        1.0
    } else {
        count.parse::<f64>().ok()?
    };
    let size = match name {
        "B" | "us" => 1.0,
        "kB" => 1024.0,
        "MB" => 1024.0 * 1024.0,
        "GB" => 1024.0 * 1024.0 * 1024.0,
        "TB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "ms" => 1e3,
        "s" => 1e6,
        "min" => 60e6,
        "h" => 3600e6,
        "d" => 86_400e6,
        _ => return None,
    };
    Some(count * size)
}

fn same_kind(a: &str, b: &str) -> bool {
    a.ends_with('B') == b.ends_with('B')
}

impl Control {
    /// The rows of `pg_settings` for these names; what PostgreSQL does not know is missing.
    pub async fn parameters(&self, names: &[String], limit: Duration) -> Result<Vec<Parameter>> {
        let what = "parameters";
        let list: Vec<String> = names.iter().map(|n| literal(n)).collect();
        let sql = format!(
            "SELECT coalesce(json_agg(json_build_object('name', name, 'setting', setting, 'unit', unit,
  'context', context, 'vartype', vartype, 'min_val', min_val, 'max_val', max_val,
  'enumvals', enumvals)), '[]') FROM pg_settings WHERE name = ANY (ARRAY[{}]::text[])",
            list.join(", ")
        );
        read(what, &self.query_one(what, &sql, limit).await?)
    }

    /// Which of these libraries (a value of `shared_preload_libraries`) are not installed here.
    pub async fn missing_libraries(&self, list: &str, limit: Duration) -> Result<Vec<String>> {
        let what = "directory of libraries";
        let sql = "SELECT setting FROM pg_config WHERE name = 'PKGLIBDIR'";
        let directory = std::path::PathBuf::from(self.query_one(what, sql, limit).await?);
        let names = list.split(',').map(|n| n.trim().trim_matches('"'));
        Ok(names
            .filter(|name| !name.is_empty())
            .filter(|name| {
                let file = name.strip_prefix("$libdir/").unwrap_or(name);
                let path = directory.join(file);
                !path.exists() && !path.with_file_name(format!("{file}.so")).exists()
            })
            .map(str::to_owned)
            .collect())
    }

    /// The parameters that wait for a restart.
    pub async fn pending_restart(&self, limit: Duration) -> Result<Vec<PendingChange>> {
        let what = "parameters that wait for a restart";
        let sql = "SELECT coalesce(json_agg(json_build_object('name', s.name,
  'from', current_setting(s.name), 'to', (SELECT f.setting FROM pg_file_settings f
    WHERE f.name = s.name ORDER BY f.seqno DESC LIMIT 1)) ORDER BY s.name), '[]')
FROM pg_settings s WHERE s.pending_restart";
        read(what, &self.query_one(what, sql, limit).await?)
    }
}

fn read<T: serde::de::DeserializeOwned>(what: &'static str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| PgError::Unintelligible {
        what,
        detail: format!("{e} in {text}"),
    })
}

impl Instance {
    /// Lets PostgreSQL itself look at values, with its own hooks, in a process that ends at once
    /// (`postgres -C`): a value that a server would refuse at its next start is refused here.
    pub async fn try_parameters(&self, values: &BTreeMap<String, String>) -> Result<()> {
        let (this, values) = (self.clone(), values.clone());
        blocking(move || {
            let mut command = this.tool("postgres");
            command.arg("-D").arg(this.data_dir());
            command.arg("-c").arg(format!(
                "config_file={}",
                this.conf_dir().join("postgresql.conf").display()
            ));
            for (name, value) in &values {
                command.arg("-c").arg(format!("{name}={value}"));
            }
            command.arg("-C").arg("max_connections");
            run_tool("postgres", &mut command).map(|_| ())
        })
        .await
    }

    /// Writes the configuration anew with other settings of the operator's; the role stays as it is. A running
    /// server needs a reload afterwards.
    pub async fn write_settings(&self, settings: &BTreeMap<String, String>) -> Result<()> {
        let (this, settings) = (self.clone(), settings.clone());
        blocking(move || this.write_settings_blocking(&settings)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(name: &str, vartype: &str, unit: Option<&str>, range: (&str, &str)) -> Parameter {
        Parameter {
            name: name.into(),
            setting: String::new(),
            unit: unit.map(Into::into),
            context: "sighup".into(),
            vartype: vartype.into(),
            min_val: Some(range.0.into()),
            max_val: Some(range.1.into()),
            enumvals: Some(vec!["off".into(), "local".into(), "on".into()]),
        }
    }

    #[test]
    fn values_are_checked_as_postgresql_reads_them() {
        let memory = parameter("work_mem", "integer", Some("kB"), ("64", "2147483647"));
        for good in ["64", "8MB", "1 GB", "0x100"] {
            assert_eq!(memory.check(good), Ok(()), "{good}");
        }
        for bad in ["63", "1B", "3TB", "8s", "lots", "8mb", ""] {
            assert!(memory.check(bad).is_err(), "{bad} was accepted");
        }
        let buffers = parameter(
            "shared_buffers",
            "integer",
            Some("8kB"),
            ("16", "1073741823"),
        );
        assert_eq!(buffers.check("128kB"), Ok(()));
        assert!(
            buffers
                .check("64kB")
                .unwrap_err()
                .contains("16 to 1073741823 8kB")
        );
        let delay = parameter(
            "deadlock_timeout",
            "integer",
            Some("ms"),
            ("1", "2147483647"),
        );
        assert_eq!(delay.check("1s"), Ok(()));
        assert!(delay.check("1MB").is_err());
        let word = parameter("synchronous_commit", "enum", None, ("", ""));
        assert_eq!(word.check("LOCAL"), Ok(()));
        assert_eq!(word.check("yes"), Ok(()));
        assert!(word.check("maybe").unwrap_err().contains("off, local, on"));
        let flag = parameter("log_checkpoints", "bool", None, ("", ""));
        assert!(flag.check("tr").is_ok() && flag.check("o").is_err());
    }

    #[test]
    fn every_owned_parameter_is_refused_with_its_reason() {
        for key in config::OWNED_KEYS {
            assert!(refused(key).is_some(), "{key}");
        }
        for (key, _) in config::FIXED {
            assert!(refused(key).is_some(), "{key} would be overwritten");
        }
        assert!(refused("synchronous_standby_names").is_some_and(|r| r.contains("durability")));
        assert_eq!(refused("work_mem"), None);
    }
}
