//! From the environment to a daemon's settings. Pure: what is on disk and on the network comes in as arguments.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use craton_core::MemberId;

use super::environment::{Environment, configs};

pub mod check;
pub mod initdb;
mod names;
mod parameters;
mod pgpool;

pub use names::{ID_MAX, NodeNames, id_from_name};

/// PostgreSQL's port in every container.
pub const POSTGRES_PORT: u16 = 5432;
/// The port of the control API.
pub const API_PORT: u16 = 9898;
/// The port of the coordinator.
pub const PEER_PORT: u16 = 7400;
/// The port of metrics, health and what a container says about itself, in the clear.
pub const FRONT_PORT: u16 = 8080;
/// Where the proxy serves metrics and health to its own container.
pub const PROXY_HTTP: &str = "127.0.0.1:8081";
/// The member's directory: the volume.
pub const NODE_DIR: &str = "/var/lib/postgresql/data";
/// The cluster's name where nobody chose one.
pub const CLUSTER_DEFAULT: &str = "pg_cluster";

/// One setting and the variable that it comes from.
#[derive(Clone, PartialEq, Debug)]
pub struct Setting {
    /// Its key, as in the file.
    pub key: String,
    /// Its value.
    pub value: toml::Value,
    /// The variable; none: the image's own choice.
    pub from: Option<&'static str>,
}

/// A daemon's settings file.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// The table.
    pub table: &'static str,
    /// What goes into it.
    pub settings: Vec<Setting>,
    /// What the log should say once.
    pub notes: Vec<String>,
}

impl Plan {
    fn new(table: &'static str) -> Self {
        Self {
            table,
            settings: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds a setting.
    pub fn set(&mut self, key: &str, value: impl Into<toml::Value>, from: Option<&'static str>) {
        self.settings.push(Setting {
            key: key.to_owned(),
            value: value.into(),
            from,
        });
    }

    /// The file. A comment behind a setting names its variable; `craton config show --origin` reads it.
    pub fn text(&self) -> String {
        let mut text = format!(
            "# Written at every start of the container from its environment.\n\n[{}]\n",
            self.table
        );
        for setting in &self.settings {
            let _ = write!(text, "{} = {}", setting.key, setting.value);
            if let Some(variable) = setting.from {
                let _ = write!(text, "{}{variable}", crate::config::ORIGIN_MARK);
            }
            text.push('\n');
        }
        text
    }
}

/// What a proxy or a backup daemon knows besides its variables.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here<'a> {
    /// The directory of the secrets.
    pub secrets: &'a str,
    /// The host's name.
    pub hostname: &'a str,
    /// The cluster.
    pub cluster: &'a str,
}

/// The hosts that may know the cluster: partners and upstream, this one left out.
pub fn others(env: &Environment, host: &str) -> Vec<String> {
    let mut hosts = env.list("REPLICATION_PRIMARY_HOST");
    hosts.extend(env.list("PARTNER_NODES"));
    let mut seen = BTreeSet::new();
    hosts.retain(|h| h != host && seen.insert(h.clone()));
    hosts
}

/// True for a node that makes the cluster if nobody has one: it is told to follow nobody, or itself.
pub fn may_found(env: &Environment, host: &str) -> bool {
    told_to_follow(env, host).is_none()
}

/// This node as the only one of a new cluster.
pub fn own_peer(names: &NodeNames) -> toml::Value {
    let mut own = toml::Table::new();
    own.insert("member".into(), names.member.as_str().into());
    own.insert(
        "address".into(),
        format!("{}:{PEER_PORT}", names.host).into(),
    );
    toml::Value::Table(own)
}

/// The node that this one is told to follow, if it is another one.
pub fn told_to_follow<'a>(env: &'a Environment, host: &str) -> Option<&'a str> {
    env.get("REPLICATION_PRIMARY_HOST").filter(|h| *h != host)
}

/// The settings of a node. `known` are PostgreSQL's parameters, where they could be asked for.
pub fn node(
    env: &Environment,
    names: &NodeNames,
    cluster: &str,
    secrets: &str,
    known: Option<&BTreeSet<String>>,
) -> Result<Plan, String> {
    let mut plan = Plan::new("node");
    let host = &names.host;
    let host_from = env
        .get("CLUSTER_NODE_NETWORK_NAME")
        .map(|_| "CLUSTER_NODE_NETWORK_NAME");
    plan.set(
        "cluster",
        cluster,
        env.get("CLUSTER_NAME").map(|_| "CLUSTER_NAME"),
    );
    plan.set("member", names.member.as_str(), host_from);
    plan.set("dir", NODE_DIR, None);
    plan.set("host", host.as_str(), host_from);
    plan.set("port", i64::from(POSTGRES_PORT), None);
    plan.set("api_listen", format!("0.0.0.0:{API_PORT}"), None);
    plan.set("api_advertise", format!("{host}:{API_PORT}"), host_from);
    plan.set("peer_listen", format!("0.0.0.0:{PEER_PORT}"), None);
    plan.set("peer_advertise", format!("{host}:{PEER_PORT}"), host_from);
    plan.set("secrets", secrets, None);
    plan.set("networks", vec!["0.0.0.0/0", "::/0"], None);
    plan.set(
        "priority",
        i64::from(names.priority),
        env.get("NODE_PRIORITY").map(|_| "NODE_PRIORITY"),
    );
    let others = others(env, host);
    if may_found(env, host) {
        plan.set("peers", vec![own_peer(names)], None);
    } else {
        // Not even while the one that may is at odds with the data that it is to bring.
        plan.set("first_start", "wait", Some("REPLICATION_PRIMARY_HOST"));
    }
    if !others.is_empty() {
        let apis: Vec<String> = others.iter().map(|h| format!("{h}:{API_PORT}")).collect();
        let from = if env.get("PARTNER_NODES").is_some() {
            "PARTNER_NODES"
        } else {
            "REPLICATION_PRIMARY_HOST"
        };
        plan.set("join", apis, Some(from));
    } else if !may_found(env, host) {
        return Err("REPLICATION_PRIMARY_HOST names nobody to join".to_owned());
    }
    if env.is_on("CLEAN_OVER_REWIND") {
        plan.set("clone.over_rewind", true, Some("CLEAN_OVER_REWIND"));
    }
    detection(env, &mut plan)?;
    parameters::apply(env, &mut plan, known)?;
    plan.notes.extend(names::same_member(env, names));
    Ok(plan)
}

/// The old stack's times, only where somebody chose them: its defaults are far slower than Craton's.
fn detection(env: &Environment, plan: &mut Plan) -> Result<(), String> {
    let attempts = env.number::<u64>("RECONNECT_ATTEMPTS")?;
    let interval = env.number::<u64>("RECONNECT_INTERVAL")?;
    if attempts.is_some() || interval.is_some() {
        let seconds = attempts.unwrap_or(3).saturating_mul(interval.unwrap_or(5));
        let ttl_ms = seconds.saturating_mul(1000).clamp(500, 600_000);
        let from = if attempts.is_some() {
            "RECONNECT_ATTEMPTS"
        } else {
            "RECONNECT_INTERVAL"
        };
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        plan.set("initial.ttl_ms", whole(ttl_ms), Some(from));
        plan.set(
            "initial.heartbeat_ms",
            whole((ttl_ms / 6).clamp(50, 2000)),
            Some(from),
        );
        plan.notes.push(format!(
            "{from} asks to wait {ttl_ms} ms for a lost leader of a new cluster; for one that is there already: craton config set ttl_ms={ttl_ms}. Without it Craton waits 2000 ms, and never has two writers"
        ));
    }
    if let Some(seconds) = env.number::<i64>("MASTER_RESPONSE_TIMEOUT")? {
        let ms = seconds.saturating_mul(1000).clamp(500, 3_600_000);
        plan.set(
            "initial.crash_grace_ms",
            ms,
            Some("MASTER_RESPONSE_TIMEOUT"),
        );
    }
    Ok(())
}

/// The first node of the compose file, which names the others.
pub const BACKENDS_DEFAULT: &str = "0:pgmaster";

/// One of `BACKENDS`.
#[derive(Clone, PartialEq, Debug)]
pub struct Backend {
    /// Its number in `show pool_nodes`.
    pub id: u32,
    /// Its host.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Its weight.
    pub weight: f64,
}

/// Reads `BACKENDS`: `num:host:port:weight:data_directory:flag`, where all after the host may be left out.
pub fn backends(env: &Environment) -> Result<Vec<Backend>, String> {
    let mut found = Vec::new();
    let mut entries = env.list("BACKENDS");
    if entries.is_empty() {
        entries.push(BACKENDS_DEFAULT.to_owned());
    }
    for entry in entries {
        let mut fields = entry.split(':').map(str::trim);
        let mut next = || fields.next().unwrap_or_default();
        let (id, host, port, weight) = (next(), next(), next(), next());
        let wrong = |what: &str| {
            format!("BACKENDS: \"{entry}\": {what}; write num:host:port:weight:data_directory:flag")
        };
        if host.is_empty() {
            return Err(wrong("it names no host"));
        }
        let or = |text: &str, default: &str| {
            let text = if text.is_empty() { default } else { text };
            text.to_owned()
        };
        found.push(Backend {
            id: id.parse().map_err(|_| wrong("num is no number"))?,
            host: host.to_owned(),
            port: or(port, "5432")
                .parse()
                .map_err(|_| wrong("the port is no number"))?,
            weight: or(weight, "1")
                .parse::<f64>()
                .ok()
                .filter(|w| w.is_finite() && *w >= 0.0)
                .ok_or_else(|| wrong("the weight is no number"))?,
        });
    }
    let mut ids: Vec<u32> = found.iter().map(|b| b.id).collect();
    ids.sort_unstable();
    if ids.windows(2).any(|w| matches!(w, [a, b] if a == b)) {
        return Err("BACKENDS names a num twice".to_owned());
    }
    Ok(found)
}

/// The settings of the proxy.
pub fn proxy(env: &Environment, here: &Here<'_>) -> Result<Plan, String> {
    let secrets = here.secrets;
    let mut plan = Plan::new("proxy");
    let nodes = backends(env)?;
    let apis: Vec<String> = nodes
        .iter()
        .map(|b| format!("{}:{API_PORT}", b.host))
        .collect();
    witness(env, &mut plan, here, &apis)?;
    plan.set("agents", apis, Some("BACKENDS"));
    let shown: Vec<toml::Value> = nodes
        .iter()
        .map(|b| {
            let mut row = toml::Table::new();
            row.insert("id".into(), i64::from(b.id).into());
            row.insert("host".into(), b.host.clone().into());
            row.insert("port".into(), i64::from(b.port).into());
            row.insert("weight".into(), b.weight.into());
            toml::Value::Table(row)
        })
        .collect();
    plan.set("pool_nodes", shown, Some("BACKENDS"));
    plan.set("http", PROXY_HTTP, None);
    plan.set("auth_password_file", format!("{secrets}/proxy"), None);
    plan.set("tls.dir", secrets, None);
    pgpool::apply(&mut plan, &configs(env)?)?;
    Ok(plan)
}

/// Where the witness of a container keeps its log: in the volume.
pub fn witness_dir(env: &Environment, table: &str) -> String {
    match table {
        "backup" => format!("{}/.witness", env.or("BACKUP_DIR", "/var/backups")),
        _ => "/var/lib/postgresql/witness".to_owned(),
    }
}

/// `CRATON_WITNESS`: a voter inside of a proxy or a backup daemon.
fn witness(
    env: &Environment,
    plan: &mut Plan,
    here: &Here<'_>,
    apis: &[String],
) -> Result<(), String> {
    let from = Some("CRATON_WITNESS");
    let Some(name) = env.get("CRATON_WITNESS") else {
        return Ok(());
    };
    let name = MemberId::new(name).map_err(|e| format!("CRATON_WITNESS: {e}"))?;
    let host = env.or("CLUSTER_NODE_NETWORK_NAME", here.hostname);
    plan.set("witness.cluster", here.cluster, None);
    plan.set("witness.name", name.as_str(), from);
    plan.set("witness.dir", witness_dir(env, plan.table), from);
    plan.set("witness.listen", format!("0.0.0.0:{PEER_PORT}"), from);
    plan.set("witness.advertise", format!("{host}:{PEER_PORT}"), from);
    plan.set("witness.agents", apis.to_vec(), from);
    plan.set("witness.secrets", here.secrets, None);
    Ok(())
}

/// The settings of the backup daemon. `known` are hosts of the cluster from an earlier life.
pub fn backup(env: &Environment, here: &Here<'_>, known: &[String]) -> Result<Plan, String> {
    let secrets = here.secrets;
    let mut plan = Plan::new("backup");
    let mut hosts = env.list("REPLICATION_HOST");
    if hosts.is_empty() {
        return Err(
            "REPLICATION_HOST is not set: name a node of the cluster to start from".to_owned(),
        );
    }
    hosts.extend(
        known
            .iter()
            .filter(|k| !hosts.contains(k))
            .cloned()
            .collect::<Vec<_>>(),
    );
    let apis: Vec<String> = hosts.iter().map(|h| format!("{h}:{API_PORT}")).collect();
    plan.set(
        "repository",
        env.or("BACKUP_DIR", "/var/backups"),
        env.get("BACKUP_DIR").map(|_| "BACKUP_DIR"),
    );
    plan.set("listen", format!("0.0.0.0:{API_PORT}"), None);
    witness(env, &mut plan, here, &apis)?;
    plan.set("agents", apis, Some("REPLICATION_HOST"));
    plan.set("password_file", format!("{secrets}/replication"), None);
    plan.set("tls.dir", secrets, None);
    let slot = env.or("REPLICATION_SLOT_NAME", "barman_the_backupper");
    plan.set(
        "slot",
        slot,
        env.get("REPLICATION_SLOT_NAME")
            .map(|_| "REPLICATION_SLOT_NAME"),
    );
    // The container's schedule asks for them.
    plan.set("backup_interval_s", 0, Some("BACKUP_SCHEDULE"));
    if let Some(days) = env.number::<u32>("BACKUP_RETENTION_DAYS")? {
        plan.set(
            "retention_days",
            i64::from(days),
            Some("BACKUP_RETENTION_DAYS"),
        );
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::super::environment::{Kind, tests::env};
    use super::*;

    const HERE: Here<'static> = Here {
        secrets: "/s",
        hostname: "h",
        cluster: "c",
    };

    /// What the daemon makes of a plan: the settings, and the origin of one.
    fn settings<T: serde::de::DeserializeOwned>(plan: &Plan, key: &str) -> (T, Option<String>) {
        let sources = crate::config::Sources {
            file: "craton.toml".into(),
            text: plan.text(),
            environment: Vec::new(),
            set: Vec::new(),
        };
        let origins = sources.origins(plan.table).unwrap();
        (
            sources.table(plan.table).unwrap(),
            origins.get(key).cloned(),
        )
    }

    fn node_of(variables: &[(&str, &str)]) -> (craton_agent::AgentConfig, Plan) {
        let e = env(Kind::Node, variables);
        let names = NodeNames::of(&e, "host-1", None).unwrap();
        let plan = node(&e, &names, "c", "/s", None).unwrap();
        let (config, _): (craton_agent::AgentConfig, _) = settings(&plan, "");
        config.validate().unwrap();
        (config, plan)
    }

    #[test]
    fn the_first_node_of_an_old_compose_file() {
        let (config, plan) = node_of(&[
            ("NODE_ID", "1"),
            ("NODE_NAME", "node1"),
            ("CLUSTER_NODE_NETWORK_NAME", "pgmaster"),
            ("PARTNER_NODES", "pgmaster,pgslave1, pgslave3"),
            ("CONFIGS_DELIMITER_SYMBOL", ";"),
            (
                "CONFIGS",
                "listen_addresses:'*';max_replication_slots:5;wal_keep_segments:10;fsync:off;pg_stat_statements.max:7",
            ),
            ("CLUSTER_NAME", "pg_cluster"),
        ]);
        assert_eq!(config.member.as_str(), "pgmaster");
        assert_eq!(config.peers.len(), 1);
        assert_eq!(config.join, ["pgslave1:9898", "pgslave3:9898"]);
        assert_eq!(config.listen_addresses, "*");
        assert_eq!(config.initial, craton_core::settings::Settings::default());
        let parameters: Vec<_> = config
            .postgresql
            .iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        assert_eq!(
            parameters,
            [
                "max_replication_slots=10",
                "pg_stat_statements.max=7",
                "wal_keep_size=160MB"
            ]
        );
        assert!(plan.notes.iter().any(|n| n.contains("fsync is left out")));
        let (_, origin) =
            settings::<craton_agent::AgentConfig>(&plan, "postgresql.max_replication_slots");
        assert_eq!(origin.as_deref(), Some("the variable CONFIGS"));
        let (_, origin) = settings::<craton_agent::AgentConfig>(&plan, "host");
        assert_eq!(
            origin.as_deref(),
            Some("the variable CLUSTER_NODE_NETWORK_NAME")
        );
    }

    #[test]
    fn a_standby_joins_and_makes_no_cluster() {
        let variables = [
            ("CLUSTER_NODE_NETWORK_NAME", "Pg_Slave.2"),
            ("REPLICATION_PRIMARY_HOST", "pgmaster"),
            ("NODE_PRIORITY", "-1"),
            ("RECONNECT_INTERVAL", "2"),
        ];
        let (config, plan) = node_of(&variables);
        // It counts where a cluster is made, and is said at every start.
        let note = plan.notes.iter().find(|n| n.contains("RECONNECT_INTERVAL"));
        let note = note.unwrap();
        assert!(note.contains("of a new cluster"), "{note}");
        assert!(note.contains("craton config set ttl_ms=6000"), "{note}");
        assert_eq!(config.member.as_str(), "pg-slave");
        assert!(config.peers.is_empty());
        assert_eq!(config.join, ["pgmaster:9898"]);
        assert_eq!(config.first_start, craton_agent::FirstStart::Wait);
        // Who only joins founds nothing, whatever is said or left out.
        let unsaid = craton_agent::AgentConfig {
            first_start: craton_agent::FirstStart::Make,
            ..config.clone()
        };
        let wish = unsaid.effective_first_start();
        assert_eq!(wish, craton_agent::FirstStart::Wait);
        assert_eq!(config.priority, 0);
        assert_eq!(config.initial.ttl_ms, 6000);
        let e = env(Kind::Node, &variables);
        assert!(!may_found(&e, "Pg_Slave.2") && may_found(&e, "pgmaster"));
        // The volume knows better than the host's name.
        let recorded = Some(MemberId::new("b").unwrap());
        assert_eq!(
            NodeNames::of(&e, "x", recorded).unwrap().member.as_str(),
            "b"
        );
    }

    #[test]
    fn unknown_parameters_do_not_stop_the_server() {
        let e = env(
            Kind::Node,
            &[("CONFIGS", "checkpoint_segments:3,work_mem:8MB,a.b:1")],
        );
        let names = NodeNames::of(&e, "h", None).unwrap();
        let known = BTreeSet::from(["work_mem".to_owned()]);
        let plan = node(&e, &names, "c", "/s", Some(&known)).unwrap();
        let (config, _): (craton_agent::AgentConfig, _) = settings(&plan, "");
        assert_eq!(
            config.postgresql.keys().collect::<Vec<_>>(),
            ["a.b", "work_mem"]
        );
        assert!(plan.notes[0].contains("checkpoint_segments is left out"));
    }

    #[test]
    fn the_balancer_of_an_old_compose_file() {
        let e = env(
            Kind::Proxy,
            &[
                (
                    "BACKENDS",
                    "0:pgmaster:5432:1:/var/lib/postgresql/data:ALLOW_TO_FAILOVER,1:pgslave1::::,3:pgslave3::::,2:pgslave2::::",
                ),
                (
                    "CONFIGS",
                    "num_init_children:25,max_pool:4,health_check_period:30",
                ),
            ],
        );
        let plan = proxy(&e, &HERE).unwrap();
        let (config, origin) = settings::<craton_proxy::ProxyConfig>(&plan, "pool_size");
        config.check().unwrap();
        assert_eq!(
            config.agents,
            [
                "pgmaster:9898",
                "pgslave1:9898",
                "pgslave3:9898",
                "pgslave2:9898"
            ]
        );
        assert_eq!((config.clients_max, config.pool_size), (10_000, 25));
        assert_eq!(origin.as_deref(), Some("the variable CONFIGS"));
        assert_eq!(
            config.pool_nodes.iter().map(|n| n.id).collect::<Vec<_>>(),
            [0, 1, 3, 2]
        );
        let health = "health_check_period changes nothing";
        assert!(plan.notes.iter().any(|n| n.contains(health)));
        for wrong in ["x:h", "0:", "0:h:x", "0:h:1:-2", "0:a,0:b"] {
            assert!(
                proxy(&env(Kind::Proxy, &[("BACKENDS", wrong)]), &HERE).is_err(),
                "{wrong}"
            );
        }
        let alone = backends(&env(Kind::Proxy, &[])).unwrap();
        assert_eq!((alone.len(), alone[0].host.as_str()), (1, "pgmaster"));
    }

    #[test]
    fn the_backup_of_an_old_compose_file() {
        let e = env(Kind::Backup, &[("REPLICATION_HOST", "pgmaster")]);
        let plan = backup(&e, &HERE, &["pgslave1".to_owned(), "pgmaster".to_owned()]).unwrap();
        let (config, origin) = settings::<craton_backup::Config>(&plan, "agents");
        assert_eq!(config.agents, ["pgmaster:9898", "pgslave1:9898"]);
        assert_eq!(config.slot, "barman_the_backupper");
        assert_eq!(origin.as_deref(), Some("the variable REPLICATION_HOST"));
        assert!(backup(&env(Kind::Backup, &[]), &HERE, &[]).is_err());
    }

    #[test]
    fn a_witness_inside_the_backup_daemon() {
        let variables = [("REPLICATION_HOST", "a,b"), ("CRATON_WITNESS", "w")];
        let e = env(Kind::Backup, &variables);
        let plan = backup(&e, &HERE, &[]).unwrap();
        let sources = crate::config::Sources {
            file: "craton.toml".into(),
            text: plan.text(),
            environment: Vec::new(),
            set: Vec::new(),
        };
        let read = sources.table_and_witness("backup");
        let (_, witness): (
            craton_backup::Config,
            Option<craton_agent::witness::WitnessConfig>,
        ) = read.unwrap();
        let witness = witness.unwrap();
        witness.validate().unwrap();
        assert_eq!(
            (witness.name.as_str(), witness.cluster.as_str()),
            ("w", "c")
        );
        assert_eq!(witness.advertise.as_deref(), Some("h:7400"));
        assert_eq!(witness.agents, ["a:9898", "b:9898"]);
        let wrong = env(
            Kind::Backup,
            &[("REPLICATION_HOST", "a"), ("CRATON_WITNESS", "W_")],
        );
        assert!(backup(&wrong, &HERE, &[]).is_err());
    }
}
