//! The proxy's settings: the `[proxy]` table of `craton.toml`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use craton_trust::{TlsMode, TlsSettings};
use serde::{Deserialize, Serialize};

/// When a server connection goes back to its pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolMode {
    /// When the transaction ends.
    #[default]
    Transaction,
    /// When the client leaves.
    Session,
}

/// Settings of the pools of one user, one database, or both. The first entry that fits counts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolOverride {
    /// The user that it is for; any if absent.
    #[serde(default)]
    pub user: Option<String>,
    /// The database that it is for; any if absent.
    #[serde(default)]
    pub database: Option<String>,
    /// The mode; the general one if absent.
    #[serde(default)]
    pub mode: Option<PoolMode>,
    /// Server connections; the general number if absent.
    #[serde(default)]
    pub size: Option<usize>,
}

/// A PostgreSQL server in a set without agents.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticBackend {
    /// Host name or address.
    pub host: String,
    /// PostgreSQL's TCP port.
    pub port: u16,
}

/// A server as `SHOW pool_nodes` is to show it, in the place of a pgpool.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolNode {
    /// Its number.
    pub id: u32,
    /// Its host, as in the topology.
    pub host: String,
    /// PostgreSQL's TCP port.
    pub port: u16,
    /// Its weight, which is shown and nothing else.
    pub weight: f64,
}

/// The `[proxy]` table. Where the cluster is comes from `agents`, or else from `backends`; everything else
/// has a default.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// Where clients connect that write: `address:port`.
    pub listen: String,
    /// Where clients connect that only read: they get a standby. Nowhere if absent.
    pub listen_read: Option<String>,
    /// Where `/metrics` and `/health` are served.
    pub http: String,
    /// The agents whose topology is followed, `host:port` of their control APIs.
    pub agents: Vec<String>,
    /// The file with the token that opens the agents' API where TLS is off.
    pub agent_token_file: Option<PathBuf>,
    /// The proxy's certificate (role `proxy`): `dir`, or the files one by one.
    pub tls: TlsSettings,
    /// Servers without agents: roles are found by asking each of them every `probe_interval_ms`. The proxy can
    /// only watch such a set; it takes something else to fail it over.
    pub backends: Vec<StaticBackend>,
    /// Numbers and weights that `SHOW pool_nodes` shows; members that are not among these are numbered after them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pool_nodes: Vec<PoolNode>,
    /// How often static backends are asked for their role, in milliseconds.
    pub probe_interval_ms: u64,
    /// How long such a question may take, in milliseconds.
    pub probe_timeout_ms: u64,
    /// The role that looks up users' verifiers.
    pub auth_user: String,
    /// The file with that role's password. Without it the role must be able to log in without one.
    pub auth_password_file: Option<PathBuf>,
    /// The database in which it looks them up.
    pub auth_database: String,
    /// The query that does: one parameter, the name; two columns, the name and the verifier.
    pub auth_query: String,
    /// How long a verifier is believed before it is looked up again, in milliseconds. While no server can be reached
    /// older ones are believed.
    pub auth_cache_ttl_ms: u64,
    /// How many users' verifiers are remembered.
    pub auth_cache_users_max: usize,
    /// Addresses from which clients come in without a password, as `address` or `address/bits`. The server must
    /// then trust the proxy as well.
    pub trust: Vec<String>,
    /// When server connections go back to their pool.
    pub pool_mode: PoolMode,
    /// Server connections per user, database and server.
    pub pool_size: usize,
    /// Pools that differ.
    pub pools: Vec<PoolOverride>,
    /// Clients at once; more are refused with 53300.
    pub clients_max: usize,
    /// Threads that serve clients; 0: one per core.
    pub workers: usize,
    /// How long a client waits for a new primary before its statement fails with 57P03, in milliseconds.
    pub failover_wait_ms: u64,
    /// How long a client waits for a free server connection before its statement fails with 53300, in milliseconds.
    pub pool_wait_ms: u64,
    /// How long a client may take to log in, in milliseconds.
    pub login_timeout_ms: u64,
    /// How long a connection to a server may take to be made, login included, in milliseconds.
    pub connect_timeout_ms: u64,
    /// How long an unused server connection is kept, in milliseconds.
    pub server_idle_ms: u64,
    /// How long a server connection is used before it is replaced by a new one, in milliseconds.
    pub server_lifetime_ms: u64,
    /// How long a client may stay silent outside of a transaction, in milliseconds; 0: for ever.
    pub client_idle_ms: u64,
    /// How long running transactions may go on after a shutdown was asked for, in milliseconds.
    pub drain_ms: u64,
    /// The largest message that a client may send, in bytes.
    pub message_bytes_max: usize,
    /// Prepared statements per client.
    pub statements_per_client_max: usize,
    /// Prepared statements kept on each server connection; the least recently used are closed.
    pub statements_per_server_max: usize,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:5432".into(),
            listen_read: None,
            http: "127.0.0.1:8080".into(),
            agents: Vec::new(),
            agent_token_file: None,
            tls: TlsSettings::default(),
            backends: Vec::new(),
            pool_nodes: Vec::new(),
            probe_interval_ms: 1000,
            probe_timeout_ms: 1000,
            auth_user: "craton_proxy".into(),
            auth_password_file: None,
            auth_database: "postgres".into(),
            auth_query: "SELECT usename, passwd FROM craton.user_lookup($1)".into(),
            auth_cache_ttl_ms: 60_000,
            auth_cache_users_max: 10_000,
            trust: Vec::new(),
            pool_mode: PoolMode::Transaction,
            pool_size: 20,
            pools: Vec::new(),
            clients_max: 10_000,
            workers: 0,
            failover_wait_ms: 30_000,
            pool_wait_ms: 30_000,
            login_timeout_ms: 60_000,
            connect_timeout_ms: 2_000,
            server_idle_ms: 600_000,
            server_lifetime_ms: 3_600_000,
            client_idle_ms: 0,
            drain_ms: 10_000,
            message_bytes_max: craton_wire::frame::BODY_LEN_MAX,
            statements_per_client_max: 10_000,
            statements_per_server_max: 500,
        }
    }
}

/// Why settings cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("[proxy] {0}")]
pub struct ConfigError(String);

impl ProxyConfig {
    /// Checks what types cannot.
    pub fn check(&self) -> Result<(), ConfigError> {
        let problem = |text: &str| Err(ConfigError(text.to_owned()));
        match (self.agents.is_empty(), self.backends.is_empty()) {
            (true, true) => {
                return problem(
                    "names neither agents nor backends: set agents = [\"host:8008\", …]",
                );
            }
            (false, false) => {
                return problem("names both agents and backends: keep one of the two");
            }
            (false, true) if self.tls.mode == TlsMode::Off && self.agent_token_file.is_none() => {
                return problem(
                    "agents without TLS needs agent_token_file, the file with the token of their API",
                );
            }
            _ => {}
        }
        if self.pool_size == 0 || self.pools.iter().any(|p| p.size == Some(0)) {
            return problem("pool_size must be at least 1");
        }
        if self.clients_max == 0 {
            return problem("clients_max must be at least 1");
        }
        if self.statements_per_server_max == 0 {
            return problem("statements_per_server_max must be at least 1");
        }
        for entry in &self.trust {
            Network::parse(entry).ok_or_else(|| {
                ConfigError(format!(
                    "trust: \"{entry}\" is no address and no network like 10.0.0.0/8"
                ))
            })?;
        }
        Ok(())
    }

    /// The mode of the pools of this user and database.
    pub fn mode_of(&self, user: &str, database: &str) -> PoolMode {
        self.overrides(user, database)
            .find_map(|p| p.mode)
            .unwrap_or(self.pool_mode)
    }

    /// The size of the pools of this user and database.
    pub fn size_of(&self, user: &str, database: &str) -> usize {
        self.overrides(user, database)
            .find_map(|p| p.size)
            .unwrap_or(self.pool_size)
    }

    fn overrides<'a>(
        &'a self,
        user: &'a str,
        database: &'a str,
    ) -> impl Iterator<Item = &'a PoolOverride> {
        let fits = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|w| w == is);
        self.pools
            .iter()
            .filter(move |p| fits(&p.user, user) && fits(&p.database, database))
    }

    /// True when clients from this address need no password.
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trust
            .iter()
            .filter_map(|t| Network::parse(t))
            .any(|n| n.contains(address))
    }

    /// `failover_wait_ms`.
    pub fn failover_wait(&self) -> Duration {
        Duration::from_millis(self.failover_wait_ms)
    }

    /// `pool_wait_ms`.
    pub fn pool_wait(&self) -> Duration {
        Duration::from_millis(self.pool_wait_ms)
    }

    /// `connect_timeout_ms`.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }
}

/// A network: its address, and how many of its bits count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Some(most), |b| b.parse().ok().filter(|b| *b <= most))?;
        Some(Self { address, bits })
    }

    fn contains(self, other: IpAddr) -> bool {
        let (network, host, width) = match (self.address, other.to_canonical()) {
            (IpAddr::V4(n), IpAddr::V4(h)) => {
                (u128::from(n.to_bits()), u128::from(h.to_bits()), 32)
            }
            (IpAddr::V6(n), IpAddr::V6(h)) => (n.to_bits(), h.to_bits(), 128),
            _ => return false,
        };
        let ignored: u32 = width - self.bits;
        network.checked_shr(ignored) == host.checked_shr(ignored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let inside = |network: &str, address: &str| {
            Network::parse(network)
                .unwrap()
                .contains(address.parse().unwrap())
        };
        assert!(inside("127.0.0.0/8", "127.9.9.9"));
        assert!(inside("0.0.0.0/0", "1.2.3.4"));
        assert!(inside("::1", "::1"));
        assert!(inside("10.0.0.1", "::ffff:10.0.0.1"));
        assert!(!inside("10.0.0.0/8", "11.0.0.0"));
        assert!(!inside("::/0", "1.2.3.4"));
        assert_eq!(Network::parse("10.0.0.0/33"), None);
        assert_eq!(Network::parse("host"), None);
    }

    #[test]
    fn the_first_override_that_fits_counts() {
        let pool = |user: Option<&str>, mode, size| PoolOverride {
            user: user.map(Into::into),
            database: None,
            mode,
            size,
        };
        let config = ProxyConfig {
            pools: vec![
                pool(Some("ann"), Some(PoolMode::Session), None),
                pool(None, None, Some(3)),
            ],
            ..ProxyConfig::default()
        };
        assert_eq!(
            (config.mode_of("ann", "x"), config.size_of("ann", "x")),
            (PoolMode::Session, 3)
        );
        assert_eq!(
            (config.mode_of("bob", "x"), config.size_of("bob", "x")),
            (PoolMode::Transaction, 3)
        );
    }

    #[test]
    fn what_cannot_work_is_said() {
        let text = |config: ProxyConfig| {
            config
                .check()
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default()
        };
        assert!(text(ProxyConfig::default()).contains("neither agents nor backends"));
        let agents = ProxyConfig {
            agents: vec!["a:1".into()],
            tls: TlsSettings::off(),
            ..ProxyConfig::default()
        };
        assert!(text(agents).contains("agent_token_file"));
        let backends = vec![StaticBackend {
            host: "a".into(),
            port: 1,
        }];
        let trust = ProxyConfig {
            backends: backends.clone(),
            trust: vec!["me".into()],
            ..ProxyConfig::default()
        };
        assert!(text(trust).contains("\"me\""));
        assert_eq!(
            text(ProxyConfig {
                backends,
                ..ProxyConfig::default()
            }),
            ""
        );
    }
}
