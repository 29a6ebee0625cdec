//! PostgreSQL sessions of the local cluster's own tools: through the proxy, or straight to a member.

use std::time::Duration;

use anyhow::Context as _;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use crate::layout::{HOST, Layout};
use crate::secrets;

/// How long connecting may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Who connects and to what.
#[derive(Clone, Debug)]
pub struct Login {
    config: Config,
}

impl Login {
    /// The superuser, in database `postgres`.
    pub fn superuser(layout: &Layout) -> anyhow::Result<Self> {
        let password = secrets::read(&layout.secret(secrets::names::SUPERUSER))?;
        let mut config = Config::new();
        config
            .host(HOST.to_string())
            .user("postgres")
            .password(password)
            .dbname("postgres")
            .connect_timeout(CONNECT_TIMEOUT);
        Ok(Self { config })
    }

    /// The same login to another database.
    #[must_use]
    pub fn database(mut self, name: &str) -> Self {
        self.config.dbname(name);
        self
    }

    /// The same login with a name that shows in `pg_stat_activity`.
    #[must_use]
    pub fn application(mut self, name: &str) -> Self {
        self.config.application_name(name);
        self
    }

    /// Connects to a port on loopback. The session ends when the client is dropped.
    pub async fn connect(&self, port: u16) -> Result<Client, SessionError> {
        self.at(port).connect().await
    }

    /// A port on loopback as an endpoint.
    pub fn at(&self, port: u16) -> Endpoint {
        let mut config = self.config.clone();
        config.port(port);
        Endpoint::new(vec![config], CONNECT_TIMEOUT)
    }
}

/// Where sessions are made: one server or proxy, or several of which the first counts that answers as wished,
/// as a connection string of libpq with several hosts does.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// One of one host each, tried in this order.
    hosts: Vec<Config>,
    /// How long each may take, log-in included.
    limit: Duration,
}

impl Endpoint {
    /// `hosts`, each tried for at most `limit`.
    pub fn new(hosts: Vec<Config>, limit: Duration) -> Self {
        Self { hosts, limit }
    }

    /// Connects to the first that answers as wished. The session ends when the client is dropped.
    pub async fn connect(&self) -> Result<Client, SessionError> {
        let mut last = SessionError::TimedOut(self.limit);
        for config in &self.hosts {
            match tokio::time::timeout(self.limit, config.connect(NoTls)).await {
                Ok(Ok((client, connection))) => {
                    // The task ends with the client; its error reaches every request as well.
                    tokio::spawn(connection);
                    return Ok(client);
                }
                Ok(Err(error)) => last = SessionError::Failed(error),
                Err(_) => last = SessionError::TimedOut(self.limit),
            }
        }
        Err(last)
    }
}

/// Why there is no session.
#[derive(Debug)]
pub enum SessionError {
    /// No answer within this time.
    TimedOut(Duration),
    /// The connection or the login failed.
    Failed(tokio_postgres::Error),
}

impl std::fmt::Display for SessionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TimedOut(limit) => write!(f, "no answer within {} s", limit.as_secs()),
            Self::Failed(error) => f.write_str(&describe(error)),
        }
    }
}

impl std::error::Error for SessionError {}

/// An error with its SQLSTATE, or with the reason below tokio-postgres' own words.
pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} ({})", db.message(), db.code().code());
    }
    let cause = std::error::Error::source(error)
        .map(|c| format!(": {c}"))
        .unwrap_or_default();
    format!("{error}{cause}")
}

/// The first column of every row of a simple query.
pub async fn column(client: &Client, query: &str) -> anyhow::Result<Vec<String>> {
    let messages = client
        .simple_query(query)
        .await
        .map_err(|e| anyhow::anyhow!("{}", describe(&e)))?;
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(ToOwned::to_owned),
        _ => None,
    });
    Ok(rows.collect())
}

/// The only value of a query.
pub async fn value(client: &Client, query: &str) -> anyhow::Result<String> {
    column(client, query)
        .await?
        .into_iter()
        .next()
        .with_context(|| format!("no row from: {query}"))
}
