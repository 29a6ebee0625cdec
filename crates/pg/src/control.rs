//! The control connection: one session over the Unix socket, as superuser by peer authentication, kept
//! open and opened again when it broke. Every query has a deadline.
//!
//! Its own writes commit locally (`synchronous_commit = local`): an agent that waited for standbys could
//! not act when they are gone.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use craton_core::{Lsn, TimelineId};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::error::{PgError, Result};

/// What a session of ours is called in `pg_stat_activity`.
pub const APPLICATION_NAME: &str = "craton_agent";
/// A bound on the server's side for queries whose client has gone.
const STATEMENT_TIMEOUT: &str = "60s";
/// How long a cancel request may take.
const CANCEL_LIMIT: Duration = Duration::from_secs(1);
/// How often a promotion is looked at.
const PROMOTE_POLL: Duration = Duration::from_millis(3);

/// Rows of text, as the simple query protocol returns them.
pub type Rows = Vec<Vec<Option<String>>>;

#[derive(Debug)]
struct Inner {
    config: tokio_postgres::Config,
    at: String,
    wal_dir: PathBuf,
    client: Mutex<Option<Arc<Client>>>,
}

/// A handle to the server of one instance. Clones share the connection. It does not connect until used.
#[derive(Clone, Debug)]
pub struct Control {
    inner: Arc<Inner>,
}

impl Control {
    /// For [`crate::Instance::control`].
    pub(crate) fn new(socket_dir: PathBuf, port: u16, superuser: &str, wal_dir: PathBuf) -> Self {
        let at = format!("{} port {port}", socket_dir.display());
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(socket_dir)
            .port(port)
            .user(superuser)
            .dbname("postgres")
            .application_name(APPLICATION_NAME)
            .options(format!(
                "-c statement_timeout={STATEMENT_TIMEOUT} -c synchronous_commit=local -c search_path=pg_catalog \
                 -c lock_timeout=10s -c idle_in_transaction_session_timeout=10s -c log_statement=none"
            ));
        Self {
            inner: Arc::new(Inner {
                config,
                at,
                wal_dir,
                client: Mutex::new(None),
            }),
        }
    }

    /// `pg_wal`, for what the server does not tell.
    pub(crate) fn wal_dir(&self) -> &std::path::Path {
        &self.inner.wal_dir
    }

    /// Opens a session of its own, which ends when the client is dropped.
    pub(crate) async fn session(&self, database: Option<&str>, limit: Duration) -> Result<Client> {
        let mut config = self.inner.config.clone();
        if let Some(database) = database {
            config.dbname(database);
        }
        let (client, connection) = tokio::time::timeout(limit, config.connect(NoTls))
            .await
            .map_err(|_| PgError::Timeout {
                what: "connecting to PostgreSQL",
                limit,
            })?
            .map_err(|e| self.connect_error(&e))?;
        // Ends when the client is dropped or the server goes; either shows in the next query.
        tokio::spawn(connection);
        Ok(client)
    }

    /// How the superuser logs in through the socket.
    pub(crate) fn login(&self) -> tokio_postgres::Config {
        self.inner.config.clone()
    }

    pub(crate) fn connect_error(&self, error: &tokio_postgres::Error) -> PgError {
        let reason = error
            .as_db_error()
            .map_or_else(|| chain(error), |db| db.message().to_owned());
        PgError::Connect {
            at: self.inner.at.clone(),
            reason,
        }
    }

    async fn shared(&self, limit: Duration) -> Result<Arc<Client>> {
        let mut slot = self.inner.client.lock().await;
        if let Some(client) = slot.as_ref().filter(|c| !c.is_closed()) {
            return Ok(Arc::clone(client));
        }
        let client = Arc::new(self.session(None, limit).await?);
        *slot = Some(Arc::clone(&client));
        Ok(client)
    }

    /// Closes the kept connection (before a smart or fast stop, or after a role change).
    pub async fn disconnect(&self) {
        self.inner.client.lock().await.take();
    }

    /// Runs SQL on the kept connection and returns the rows of all statements as text. After a timeout the
    /// query is cancelled and the connection given up.
    pub async fn query(&self, what: &'static str, sql: &str, limit: Duration) -> Result<Rows> {
        let end = Instant::now() + limit;
        let client = match tokio::time::timeout(limit, self.shared(limit)).await {
            Ok(client) => client?,
            Err(_) => return Err(PgError::Timeout { what, limit }),
        };
        if let Ok(result) = tokio::time::timeout_at(end, run(&client, what, sql)).await {
            return result;
        }
        self.disconnect().await;
        cancel(&client);
        Err(PgError::Timeout { what, limit })
    }

    /// As [`Self::query`], on a connection of its own: for what takes long, so that samples go on.
    pub async fn query_apart(
        &self,
        what: &'static str,
        database: Option<&str>,
        sql: &str,
        limit: Duration,
    ) -> Result<Rows> {
        let end = Instant::now() + limit;
        let client = self.session(database, limit).await?;
        let millis = limit.as_millis().max(1);
        let sql = format!("SET statement_timeout = {millis}; {sql}");
        if let Ok(result) = tokio::time::timeout_at(end, run(&client, what, &sql)).await {
            return result;
        }
        cancel(&client);
        Err(PgError::Timeout { what, limit })
    }

    /// One value of one row.
    pub async fn query_one(
        &self,
        what: &'static str,
        sql: &str,
        limit: Duration,
    ) -> Result<String> {
        one(what, self.query(what, sql, limit).await?)
    }

    /// Writes a checkpoint (a restartpoint on a standby). Do so on a new leader before anyone rewinds
    /// against it: pg_rewind reads the timeline from the control file, which a promotion leaves as it was.
    pub async fn checkpoint(&self, limit: Duration) -> Result<()> {
        self.query_apart("checkpoint", None, "CHECKPOINT", limit)
            .await
            .map(|_| ())
    }

    /// The end of the WAL flushed on a primary.
    pub async fn current_flush_lsn(&self, limit: Duration) -> Result<Lsn> {
        let what = "current WAL position";
        parse_lsn(
            what,
            &self
                .query_one(what, "SELECT pg_current_wal_flush_lsn()", limit)
                .await?,
        )
    }

    /// Ends the WAL segment that is being written, if more than `used_min` bytes of it are in use and no more than
    /// `left_max` are left: what is left is sent to the standbys. True if it did.
    pub async fn end_wal_segment(
        &self,
        used_min: u32,
        left_max: u32,
        limit: Duration,
    ) -> Result<bool> {
        let what = "new WAL segment";
        let sql = format!(
            "SELECT coalesce((CASE WHEN used > {used_min} AND size - used <= {left_max} THEN pg_switch_wal() END)::text, '') \
             FROM (SELECT (pg_walfile_name_offset(pg_current_wal_insert_lsn())).file_offset AS used, \
             (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size') AS size) segment"
        );
        Ok(!self.query_one(what, &sql, limit).await?.is_empty())
    }

    /// How many of the standbys that commits wait for (of all that stream, if commits wait for none) have not flushed
    /// WAL up to `lsn`.
    pub async fn standbys_behind(&self, lsn: Lsn, limit: Duration) -> Result<u64> {
        let what = "standbys' flush positions";
        let sql = format!(
            "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' \
             AND (sync_state <> 'async' OR current_setting('synchronous_standby_names') = '') \
             AND (flush_lsn < '{lsn}' OR flush_lsn IS NULL)"
        );
        parse(what, &self.query_one(what, &sql, limit).await?)
    }

    /// How many client sessions other than ours are inside a transaction.
    pub async fn active_client_transactions(&self, limit: Duration) -> Result<u64> {
        let what = "running transactions";
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
             AND xact_start IS NOT NULL AND pid <> pg_backend_pid() AND application_name <> '{APPLICATION_NAME}'"
        );
        parse(what, &self.query_one(what, &sql, limit).await?)
    }

    /// Makes a database if it is not there yet.
    pub async fn create_database(
        &self,
        name: &str,
        owner: Option<&str>,
        limit: Duration,
    ) -> Result<()> {
        let what = "create database";
        let exists = format!(
            "SELECT count(*) FROM pg_database WHERE datname = {}",
            literal(name)
        );
        if self.query_one(what, &exists, limit).await? != "0" {
            return Ok(());
        }
        let owner = owner
            .map(|o| format!(" OWNER {}", identifier(o)))
            .unwrap_or_default();
        let client = self.session(None, limit).await?;
        let sql = format!("CREATE DATABASE {}{owner}", identifier(name));
        match tokio::time::timeout(limit, run(&client, what, &sql)).await {
            // Somebody else made it meanwhile.
            Ok(Err(e)) if e.sqlstate() == Some("42P04") => Ok(()),
            Ok(result) => result.map(|_| ()),
            Err(_) => {
                cancel(&client);
                Err(PgError::Timeout { what, limit })
            }
        }
    }

    /// Promotes a standby and returns the new timeline once it accepts writes.
    pub async fn promote(&self, limit: Duration) -> Result<TimelineId> {
        let what = "promotion";
        let end = Instant::now() + limit;
        let asked = self
            .query_one(what, "SELECT pg_promote(false)", limit)
            .await?;
        if asked != "t" {
            return Err(PgError::Query {
                what,
                message: format!("pg_promote returned {asked:?}"),
                sqlstate: None,
            });
        }
        while self
            .query_one(what, "SELECT pg_is_in_recovery()", limit)
            .await?
            != "f"
        {
            if Instant::now() >= end {
                return Err(PgError::Timeout { what, limit });
            }
            tokio::time::sleep(PROMOTE_POLL).await;
        }
        let timeline = self
            .query_one(what, &format!("SELECT {TIMELINE_OF_PRIMARY}"), limit)
            .await?;
        Ok(TimelineId(parse(what, &timeline)?))
    }
}

/// The timeline that a primary writes, from the name of its WAL file; the control file may lag behind.
pub(crate) const TIMELINE_OF_PRIMARY: &str =
    "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint";

/// Runs SQL through the simple protocol.
pub(crate) async fn run(client: &Client, what: &'static str, sql: &str) -> Result<Rows> {
    let messages = client
        .simple_query(sql)
        .await
        .map_err(|e| query_error(what, &e))?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|i| row.try_get(i).ok().flatten().map(str::to_owned))
                    .collect(),
            ),
            _ => None,
        })
        .collect())
}

/// Asks the server, in the background, to cancel what this session runs.
pub(crate) fn cancel(client: &Client) {
    let token = client.cancel_token();
    tokio::spawn(async move {
        // Best effort: the server's own statement_timeout is the other bound.
        let _ = tokio::time::timeout(CANCEL_LIMIT, token.cancel_query(NoTls)).await;
    });
}

pub(crate) fn query_error(what: &'static str, error: &tokio_postgres::Error) -> PgError {
    match error.as_db_error() {
        Some(db) => PgError::Query {
            what,
            message: db.message().to_owned(),
            sqlstate: Some(db.code().code().to_owned()),
        },
        None => PgError::Query {
            what,
            message: chain(error),
            sqlstate: None,
        },
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

/// The first value of the first row that has one; rows of a preceding SET have none.
pub(crate) fn one(what: &'static str, rows: Rows) -> Result<String> {
    rows.into_iter()
        .next()
        .and_then(|row| row.into_iter().next())
        .flatten()
        .ok_or(PgError::Unintelligible {
            what,
            detail: "PostgreSQL returned no value".to_owned(),
        })
}

pub(crate) fn parse<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T> {
    text.parse().map_err(|_| PgError::Unintelligible {
        what,
        detail: format!("{text:?}"),
    })
}

pub(crate) fn parse_lsn(what: &'static str, text: &str) -> Result<Lsn> {
    text.parse()
        .map_err(|e: craton_core::LsnParseError| PgError::Unintelligible {
            what,
            detail: e.to_string(),
        })
}

/// A string literal. `standard_conforming_strings` may be off in an old cluster, hence the `E` form.
pub(crate) fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// A quoted identifier.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting() {
        assert_eq!(literal(r"a'b\c"), r"E'a\'b\\c'");
        assert_eq!(identifier(r#"a"b"#), r#""a""b""#);
    }
}
