//! The roles that the parts of a cluster log in with, made once by the first leader.

use std::fmt::{self, Write as _};
use std::time::Duration;

use crate::control::{Control, identifier, literal};
use crate::error::Result;

/// Streams WAL: standbys and the backup daemon.
pub const REPLICATION_ROLE: &str = "craton_replication";
/// Looks up clients' password verifiers and who waits for standbys, and nothing else.
pub const PROXY_ROLE: &str = "craton_proxy";
/// May call the functions that pg_rewind needs, and nothing else.
pub const REWIND_ROLE: &str = "craton_rewind";

/// What pg_rewind calls on its source (documentation of pg_rewind, "Notes").
const REWIND_FUNCTIONS: [&str; 4] = [
    "pg_ls_dir(text, boolean, boolean)",
    "pg_stat_file(text, boolean)",
    "pg_read_binary_file(text)",
    "pg_read_binary_file(text, bigint, bigint, boolean)",
];

/// The generated passwords. Not shown by `Debug`.
#[derive(Clone)]
pub struct RolePasswords {
    /// Of [`REPLICATION_ROLE`].
    pub replication: String,
    /// Of [`PROXY_ROLE`].
    pub proxy: String,
    /// Of [`REWIND_ROLE`].
    pub rewind: String,
}

impl fmt::Debug for RolePasswords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RolePasswords(…)")
    }
}

impl Control {
    /// Makes the roles, or sets their passwords and rights again, in one transaction. The server is sent
    /// SCRAM verifiers, never passwords, so that no log can hold one.
    pub async fn bootstrap_roles(&self, passwords: &RolePasswords, limit: Duration) -> Result<()> {
        let mut sql = String::from(
            "SET log_min_error_statement = panic; SET log_min_duration_statement = -1; BEGIN; ",
        );
        for (role, attributes, password) in [
            (REPLICATION_ROLE, "REPLICATION", &passwords.replication),
            (PROXY_ROLE, "NOREPLICATION", &passwords.proxy),
            (REWIND_ROLE, "NOREPLICATION", &passwords.rewind),
        ] {
            let verifier = postgres_protocol::password::scram_sha_256(password.as_bytes());
            let name = identifier(role);
            // Writing to a String cannot fail.
            let _ = write!(
                sql,
                "DO $do$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {}) \
                 THEN CREATE ROLE {name}; END IF; END $do$; \
                 ALTER ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE {attributes} PASSWORD {}; ",
                literal(role),
                literal(&verifier)
            );
        }
        for function in REWIND_FUNCTIONS {
            let _ = write!(
                sql,
                "GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {REWIND_ROLE}; "
            );
        }
        sql.push_str(LOOKUP);
        sql.push_str("COMMIT");
        self.query_apart("make the cluster's roles", None, &sql, limit)
            .await
            .map(|_| ())
    }
}

/// The proxy reads verifiers through this function only; an expired password is no password. And it must know
/// whether a commit waits for standbys before it passes a cancel on (failover protocol, 3.3).
const LOOKUP: &str = "\
CREATE SCHEMA IF NOT EXISTS craton;
REVOKE ALL ON SCHEMA craton FROM PUBLIC;
GRANT USAGE ON SCHEMA craton TO craton_proxy;
CREATE OR REPLACE FUNCTION craton.user_lookup(name text) RETURNS TABLE (usename text, passwd text)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $fn$
    SELECT s.usename::text, s.passwd::text FROM pg_catalog.pg_shadow AS s
    WHERE s.usename = $1::name AND (s.valuntil IS NULL OR s.valuntil > now()) $fn$;
REVOKE ALL ON FUNCTION craton.user_lookup(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION craton.user_lookup(text) TO craton_proxy;
CREATE OR REPLACE FUNCTION craton.waits_for_standbys(pid integer) RETURNS boolean
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $fn$
    SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity AS a WHERE a.pid = $1 AND a.wait_event = 'SyncRep') $fn$;
REVOKE ALL ON FUNCTION craton.waits_for_standbys(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION craton.waits_for_standbys(integer) TO craton_proxy;
";
