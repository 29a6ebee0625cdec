//! Settings, of the server or of a role or a database, with which sessions give up what the cluster promises of their
//! commits: that they are on standbys, and that a client is told where that is not known.

use std::time::Duration;

use serde::Deserialize;

use crate::control::Control;
use crate::error::{PgError, Result};

/// A setting with which commits are promised less.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Weakening {
    /// `client_min_messages` or `synchronous_commit`.
    pub name: String,
    /// What it is set to.
    pub value: String,
    /// Whose: `role x`, `database y`, `role x in database y`, or a line of a file.
    pub place: String,
    /// In the database, and so the same on every member; else in a file of this one.
    pub shared: bool,
}

/// What the roles and the databases are given, and what the files of the server say. The names are PostgreSQL's own
/// spelling in the first, and the operator's in the second. Of a file that says it twice the last one is applied.
const SQL: &str = "SELECT coalesce(json_agg(found), '[]') FROM (
    SELECT split_part(setting, '=', 1) AS name, substr(setting, strpos(setting, '=') + 1) AS value,
        concat_ws(' in ', 'role ' || r.rolname, 'database ' || d.datname) AS place, true AS shared
      FROM pg_db_role_setting s CROSS JOIN LATERAL unnest(s.setconfig) AS setting
      LEFT JOIN pg_database d ON d.oid = s.setdatabase LEFT JOIN pg_roles r ON r.oid = s.setrole
    UNION ALL
    SELECT lower(name), setting, sourcefile || ' line ' || sourceline, false FROM pg_file_settings WHERE applied
  ) AS found WHERE name IN ('client_min_messages', 'synchronous_commit')";

/// True if a session with this is promised less. `client_min_messages` hides the warning that the wait for the standbys
/// was cancelled; with less than `on` a commit does not wait until a standby has flushed it.
pub fn weakens(name: &str, value: &str) -> bool {
    let value = value.to_ascii_lowercase();
    match name {
        "client_min_messages" => ["error", "fatal", "panic"].contains(&value.as_str()),
        "synchronous_commit" => {
            !["on", "remote_apply", "true", "yes", "1"].contains(&value.as_str())
        }
        _ => false,
    }
}

impl Control {
    /// The settings with which sessions are promised less. Works on a primary and on a standby.
    pub async fn weakenings(&self, limit: Duration) -> Result<Vec<Weakening>> {
        let what = "settings of roles and databases";
        let text = self.query_one(what, SQL, limit).await?;
        let mut found: Vec<Weakening> =
            serde_json::from_str(&text).map_err(|e| PgError::Unintelligible {
                what,
                detail: format!("{e} in {text}"),
            })?;
        found.retain(|w| weakens(&w.name, &w.value));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_promises_less() {
        for (name, value, less) in [
            ("client_min_messages", "warning", false),
            ("client_min_messages", "log", false),
            ("client_min_messages", "ERROR", true),
            ("client_min_messages", "panic", true),
            ("synchronous_commit", "on", false),
            ("synchronous_commit", "remote_apply", false),
            ("synchronous_commit", "yes", false),
            ("synchronous_commit", "remote_write", true),
            ("synchronous_commit", "Local", true),
            ("synchronous_commit", "off", true),
            ("synchronous_commit", "0", true),
            ("work_mem", "error", false),
        ] {
            assert_eq!(weakens(name, value), less, "{name} = {value}");
        }
    }
}
