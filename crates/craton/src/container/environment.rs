//! The environment of a container: which variables there are, what they mean here, and their `_FILE` forms.
//!
//! The table below is the reference (`docs/reference/environment.md`) as well.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Which of the images.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// PostgreSQL and its agent
    Node,
    /// The proxy
    Proxy,
    /// The backup daemon
    Backup,
}

impl Kind {
    /// The word on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Proxy => "proxy",
            Self::Backup => "backup",
        }
    }
}

/// What becomes of a variable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// It counts.
    Used,
    /// It counts, and nothing may show its value.
    Secret,
    /// It is accepted; why it changes nothing.
    Nothing(&'static str),
}

/// A variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// The images that look at it.
    pub kinds: &'static [Kind],
    /// What it is if it is not set.
    pub default: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What becomes of it.
    pub effect: Effect,
}

const ALL: &[Kind] = &[Kind::Node, Kind::Proxy, Kind::Backup];
const NODE: &[Kind] = &[Kind::Node];
const PROXY: &[Kind] = &[Kind::Proxy];
const BACKUP: &[Kind] = &[Kind::Backup];
const NODE_BACKUP: &[Kind] = &[Kind::Node, Kind::Backup];
const PROXY_BACKUP: &[Kind] = &[Kind::Proxy, Kind::Backup];
const NODE_PROXY: &[Kind] = &[Kind::Node, Kind::Proxy];

const fn used(
    kinds: &'static [Kind],
    name: &'static str,
    default: &'static str,
    meaning: &'static str,
) -> Variable {
    Variable {
        name,
        kinds,
        default,
        meaning,
        effect: Effect::Used,
    }
}

const fn secret(
    kinds: &'static [Kind],
    name: &'static str,
    default: &'static str,
    meaning: &'static str,
) -> Variable {
    Variable {
        name,
        kinds,
        default,
        meaning,
        effect: Effect::Secret,
    }
}

const fn noted(kinds: &'static [Kind], name: &'static str, why: &'static str) -> Variable {
    Variable {
        name,
        kinds,
        default: "",
        meaning: "accepted",
        effect: Effect::Nothing(why),
    }
}

/// Every variable, in the order of the reference.
pub const VARIABLES: &[Variable] = &[
    secret(
        ALL,
        "CRATON_CLUSTER_SECRET",
        "the replication password",
        "The password from which the containers of a cluster compute their certificates and internal passwords; the same for all of them. Long and random: whoever has it can do everything",
    ),
    used(
        ALL,
        "CRATON_SECRETS_DIR",
        "/etc/craton/secrets",
        "A directory with secrets and certificates made by `craton ca init` or `craton join`. If it holds `authority.pem`, it is used, and nothing is computed from a password",
    ),
    used(
        ALL,
        "CLUSTER_NAME",
        "node: pg_cluster; others ask a node",
        "The cluster's name",
    ),
    used(
        ALL,
        "SSH_ENABLE",
        "0",
        "1: sshd is started, for the user postgres alone and with keys alone. They are looked for in /var/lib/postgresql/.ssh/keys and /tmp/.ssh/keys",
    ),
    used(
        NODE_PROXY,
        "CONFIGS",
        "",
        "Settings: of PostgreSQL for a node, of pgpool for the proxy, which translates those that mean something here. `name:value[,name:value…]`",
    ),
    used(
        NODE_PROXY,
        "CONFIGS_DELIMITER_SYMBOL",
        ",",
        "What stands between two settings in CONFIGS",
    ),
    used(
        NODE_PROXY,
        "CONFIGS_ASSIGNMENT_SYMBOL",
        ":",
        "What stands between name and value in CONFIGS",
    ),
    used(
        NODE_BACKUP,
        "POSTGRES_USER",
        "postgres",
        "The application's superuser, made at the first start of the first node",
    ),
    secret(NODE_BACKUP, "POSTGRES_PASSWORD", "", "Its password"),
    used(
        NODE_BACKUP,
        "POSTGRES_DB",
        "POSTGRES_USER",
        "The application's database, made at the first start of the first node",
    ),
    used(
        NODE,
        "NODE_NAME",
        "the network name",
        "The name of the node in `repmgr cluster show`",
    ),
    used(
        NODE,
        "NODE_ID",
        "the digits at the end of NODE_NAME + 1000",
        "The number of the node in `repmgr cluster show` and `get_node_id`",
    ),
    used(
        NODE,
        "CLUSTER_NODE_NETWORK_NAME",
        "the host's name",
        "How others reach this node. The member of the cluster has this name, in lower case and for as long as its volume lives",
    ),
    used(
        NODE,
        "NODE_PRIORITY",
        "100",
        "Preference when a leader is elected; 0 or less: never",
    ),
    used(
        NODE,
        "PARTNER_NODES",
        "",
        "Network names of other nodes, comma separated. An empty node asks them for the cluster before it makes a new one",
    ),
    used(
        NODE,
        "REPLICATION_PRIMARY_HOST",
        "",
        "A node of the cluster that this one joins. Without it, or where it names this node itself, an empty node makes a new cluster if none of its partners knows one. Where PARTNER_NODES is empty and the node named here follows another one itself, this one streams from it (a node of the second level): commits do not wait for it, and it is not elected",
    ),
    used(
        NODE,
        "CLEAN_OVER_REWIND",
        "0",
        "1: a former leader is cloned anew instead of rewound when it comes back. (With 0 that happens only where a rewind cannot work)",
    ),
    used(
        NODE,
        "REPLICATION_DB",
        "replication_db",
        "A database, made at the first start of the first node",
    ),
    used(
        NODE_BACKUP,
        "REPLICATION_USER",
        "replication_user",
        "A role that may replicate and monitor and is no superuser, made at the first start of the first node. Craton itself uses roles of its own",
    ),
    secret(
        NODE_BACKUP,
        "REPLICATION_PASSWORD",
        "replication_pass",
        "Its password",
    ),
    used(
        NODE,
        "RECONNECT_ATTEMPTS",
        "",
        "Times RECONNECT_INTERVAL is the lease of a new cluster, if one of the two is set: so long is a lost leader waited for",
    ),
    used(
        NODE,
        "RECONNECT_INTERVAL",
        "",
        "Seconds; see RECONNECT_ATTEMPTS (3 and 5 where only the other is set). 2 seconds where neither is",
    ),
    used(
        NODE,
        "MASTER_RESPONSE_TIMEOUT",
        "",
        "Seconds after which a leader whose PostgreSQL runs and does not answer is replaced (crash_grace_ms of a new cluster)",
    ),
    used(
        NODE,
        "STOPPING_TIMEOUT",
        "5",
        "Seconds that a planned handover may take when a node is told to stop (SIGTERM)",
    ),
    used(
        NODE,
        "LOG_LEVEL",
        "INFO",
        "The level of the log: DEBUG, INFO, NOTICE, WARNING, ERROR",
    ),
    noted(
        NODE,
        "REPLICATION_PRIMARY_PORT",
        "nodes listen on port 5432",
    ),
    noted(
        NODE,
        "USE_REPLICATION_SLOTS",
        "every standby has a slot, with max_slot_wal_keep_size as its bound",
    ),
    noted(
        NODE,
        "CONNECT_TIMEOUT",
        "the lease decides when a leader is lost",
    ),
    noted(
        NODE,
        "CHECK_PGCONNECT_TIMEOUT",
        "the scripts have bounds of their own",
    ),
    noted(
        NODE,
        "REPMGR_WAIT_POSTGRES_START_TIMEOUT",
        "a start is waited for as long as it makes progress",
    ),
    noted(
        NODE,
        "REPMGR_DEGRADED_MONITORING_TIMEOUT",
        "there is no repmgrd",
    ),
    noted(
        NODE,
        "REPMGR_SLOT_NAME_PREFIX",
        "slots are named craton_MEMBER",
    ),
    noted(NODE, "REPMGR_MAJOR", "there is no repmgr"),
    noted(
        NODE,
        "LAUNCH_RECOVERY_CHECK_INTERVAL",
        "recovery is watched all the time",
    ),
    noted(
        NODE,
        "MASTER_ROLE_LOCK_FILE_NAME",
        "who leads is in the coordinator, not in a file",
    ),
    noted(
        NODE,
        "STANDBY_ROLE_LOCK_FILE_NAME",
        "who follows whom is in the coordinator, not in a file",
    ),
    noted(
        NODE,
        "FORCE_RECONFIGURE",
        "settings are applied at every start",
    ),
    used(
        PROXY_BACKUP,
        "CRATON_WITNESS",
        "",
        "The name of a witness: the container is a voter besides, without a database, so that a cluster of two nodes survives the loss of one. It keeps its log in BACKUP_DIR/.witness, at the proxy in /var/lib/postgresql/witness, which must then be a volume, and listens on port 7400",
    ),
    used(
        PROXY_BACKUP,
        "CLUSTER_NODE_NETWORK_NAME",
        "the host's name",
        "How the nodes reach the witness in this container",
    ),
    used(
        PROXY,
        "BACKENDS",
        super::plan::BACKENDS_DEFAULT,
        "The nodes: `num:host:port:weight:data_directory:flag[,…]`. One that is reached is enough: the others are learnt from it. num, host and weight are shown by `show pool_nodes`",
    ),
    used(
        PROXY,
        "CHECK_USER",
        "replication_user",
        "The user of has_write_node.sh and has_enough_backends.sh",
    ),
    secret(
        PROXY,
        "CHECK_PASSWORD",
        "replication_pass",
        "Its password. Without CRATON_CLUSTER_SECRET the nodes' REPLICATION_PASSWORD must be the same, or the default",
    ),
    used(
        PROXY,
        "REQUIRE_MIN_BACKENDS",
        "0",
        "The proxy does not start with fewer nodes that are reached",
    ),
    used(
        PROXY,
        "WAIT_BACKEND_TIMEOUT",
        "120",
        "Seconds to wait for that many nodes",
    ),
    used(
        PROXY,
        "PCP_USER",
        "",
        "If it is set, the container gets a certificate that may operate the cluster, for pcp_promote_node",
    ),
    noted(
        PROXY,
        "PCP_PASSWORD",
        "the pcp commands work inside the container, with a certificate",
    ),
    noted(
        PROXY,
        "DB_USERS",
        "users are looked up in PostgreSQL; every role that may log in there may log in here",
    ),
    noted(
        PROXY,
        "CHECK_PGCONNECT_TIMEOUT",
        "the topology is pushed by the nodes; nothing is polled",
    ),
    used(
        BACKUP,
        "REPLICATION_HOST",
        "",
        "A node to start from, or several, comma separated. The daemon then follows the cluster. Required",
    ),
    used(
        BACKUP,
        "BACKUP_SCHEDULE",
        "0 0 * * *",
        "When base backups are taken: a cron expression of five fields, UTC",
    ),
    used(
        BACKUP,
        "BACKUP_RETENTION_DAYS",
        "30",
        "The recovery window, days: backups and WAL that only older times need are removed; the two newest backups always stay. 0: everything is kept",
    ),
    used(BACKUP, "BACKUP_DIR", "/var/backups", "The repository"),
    used(
        BACKUP,
        "REPLICATION_SLOT_NAME",
        "barman_the_backupper",
        "The slot that keeps WAL for the daemon",
    ),
    used(
        BACKUP,
        "UPSTREAM_NAME",
        "pg_cluster",
        "The server's name in the output of `barman` commands",
    ),
    noted(
        BACKUP,
        "REPLICATION_PORT",
        "nodes tell where their PostgreSQL listens",
    ),
    noted(
        BACKUP,
        "WAIT_UPSTREAM_TIMEOUT",
        "a cluster that is not there yet is waited for",
    ),
    noted(
        BACKUP,
        "POSTGRES_CONNECTION_TIMEOUT",
        "connecting takes at most 5 seconds",
    ),
    noted(BACKUP, "UPSTREAM_CONFIG_FILE", "there is no barman"),
    noted(ALL, "NOTVISIBLE", "it was of no use before either"),
];

/// The variables of a container, files read, empty ones left out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

impl Environment {
    /// Takes over what concerns this kind of container. `NAME_FILE` names a file whose content, without the line's end,
    /// is `NAME`.
    pub fn gather(
        kind: Kind,
        all: impl IntoIterator<Item = (String, String)>,
        read: impl Fn(&str) -> Result<String, String>,
    ) -> Result<Self, String> {
        let all: BTreeMap<String, String> = all.into_iter().collect();
        let mut variables = BTreeMap::new();
        for variable in VARIABLES.iter().filter(|v| v.kinds.contains(&kind)) {
            let name = variable.name;
            let file_name = format!("{name}_FILE");
            let filled = |n: &str| all.get(n).filter(|v| !v.is_empty());
            let value = match (filled(name), filled(&file_name)) {
                (Some(_), Some(_)) => {
                    return Err(format!(
                        "{name} and {file_name} are both set: set one of the two"
                    ));
                }
                (Some(value), None) => value.clone(),
                (None, Some(path)) => {
                    let text = read(path).map_err(|e| format!("{file_name}: {e}"))?;
                    let text = text.trim_end_matches(['\n', '\r']).to_owned();
                    if text.is_empty() {
                        return Err(format!("{file_name}: {path} is empty"));
                    }
                    text
                }
                (None, None) => continue,
            };
            variables.insert(name.to_owned(), value);
        }
        Ok(Self { variables })
    }

    /// The value, if one is set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// The value, or a default.
    pub fn or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.get(name).unwrap_or(default)
    }

    /// A number, if one is set.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        self.get(name)
            .map(|text| {
                let number = text.trim().parse();
                number.map_err(|_| format!("{name}={text} is no number that fits"))
            })
            .transpose()
    }

    /// A comma separated list, blanks and empty places left out.
    pub fn list(&self, name: &str) -> Vec<String> {
        let text = self.get(name).unwrap_or_default();
        let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
        parts.map(ToOwned::to_owned).collect()
    }

    /// True for 1, true, yes and on.
    pub fn is_on(&self, name: &str) -> bool {
        matches!(
            self.get(name).map(str::to_ascii_lowercase).as_deref(),
            Some("1" | "true" | "yes" | "on")
        )
    }

    /// What there is to say about variables that change nothing.
    pub fn notes(&self, kind: Kind) -> Vec<String> {
        let here = VARIABLES.iter().filter(|v| v.kinds.contains(&kind));
        here.filter_map(|v| match v.effect {
            Effect::Nothing(why) if self.get(v.name).is_some() => {
                Some(format!("{} changes nothing: {why}", v.name))
            }
            _ => None,
        })
        .collect()
    }
}

/// True for a name whose value must not go on into the environment of daemons.
pub fn is_secret(name: &str) -> bool {
    let name = name.strip_suffix("_FILE").unwrap_or(name);
    VARIABLES
        .iter()
        .any(|v| v.name == name && v.effect == Effect::Secret)
        || matches!(name, "PCP_PASSWORD" | "DB_USERS")
}

/// The page of the reference.
pub fn reference() -> String {
    use std::fmt::Write as _;
    let mut page = String::from(
        "# Environment of the images\n\nGenerated from the code by `make fix`; a test keeps it in step.\n\n\
         Each variable may be given as `NAME_FILE` instead: then its value is the content of that file (Docker's secrets). \
         Settings of Craton itself can be set as well: `CRATON_NODE_…`, `CRATON_PROXY_…`, `CRATON_BACKUP_…`, see [settings](settings.md); \
         they go over what is below. `craton config show --origin` names the variable that a node's setting comes from.\n",
    );
    for (title, kind) in [
        ("`craton/postgis`", Kind::Node),
        ("`craton/proxy`", Kind::Proxy),
        ("`craton/backup`", Kind::Backup),
    ] {
        let _ = write!(
            page,
            "\n## {title}\n\n| variable | default | meaning |\n|---|---|---|\n"
        );
        for v in VARIABLES.iter().filter(|v| v.kinds.contains(&kind)) {
            let meaning = match v.effect {
                Effect::Nothing(why) => format!("Accepted, changes nothing: {why}"),
                _ => v.meaning.to_owned(),
            };
            let _ = writeln!(
                page,
                "| `{}` | {} | {} |",
                v.name,
                v.default,
                meaning.replace('|', "\\|")
            );
        }
    }
    page
}

/// Reads `CONFIGS`: pairs, what separates them, and what stands between name and value. A value may hold the
/// assignment symbol; quotes around it are taken off, as `postgresql.conf` has them.
pub fn configs(env: &Environment) -> Result<Vec<(String, String)>, String> {
    let Some(text) = env.get("CONFIGS") else {
        return Ok(Vec::new());
    };
    let delimiter = env.or("CONFIGS_DELIMITER_SYMBOL", ",");
    let assignment = env.or("CONFIGS_ASSIGNMENT_SYMBOL", ":");
    let mut pairs = Vec::new();
    for pair in text.split(delimiter) {
        if pair.trim().is_empty() {
            continue;
        }
        let (name, value) = pair.split_once(assignment).ok_or_else(|| {
            format!(
                "CONFIGS: \"{}\" has no \"{assignment}\" between name and value (CONFIGS_DELIMITER_SYMBOL is \"{delimiter}\", CONFIGS_ASSIGNMENT_SYMBOL \"{assignment}\")",
                pair.trim()
            )
        })?;
        let name = name.trim().to_ascii_lowercase();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(format!("CONFIGS: \"{name}\" is no name of a setting"));
        }
        pairs.push((name, unquoted(value.trim())));
    }
    Ok(pairs)
}

fn unquoted(value: &str) -> String {
    let inner = value
        .strip_prefix('\'')
        .and_then(|rest| rest.strip_suffix('\''));
    inner.map_or_else(|| value.to_owned(), |inner| inner.replace("''", "'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn env(kind: Kind, variables: &[(&str, &str)]) -> Environment {
        let all = variables
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        Environment::gather(kind, all, |path| {
            if path == "/run/secrets/p" {
                Ok("pa:ss, 'w\"\\$rd\n".to_owned())
            } else {
                Err(format!("cannot read {path}"))
            }
        })
        .unwrap()
    }

    #[test]
    fn names_are_unique_for_each_image() {
        for kind in ALL {
            let mut names: Vec<_> = VARIABLES
                .iter()
                .filter(|v| v.kinds.contains(kind))
                .map(|v| v.name)
                .collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{kind:?}");
        }
    }

    #[test]
    fn a_file_stands_for_every_variable_with_whatever_is_in_it() {
        let e = env(
            Kind::Node,
            &[("REPLICATION_PASSWORD_FILE", "/run/secrets/p")],
        );
        assert_eq!(e.get("REPLICATION_PASSWORD"), Some("pa:ss, 'w\"\\$rd"));
        let gather = |pairs: &[(&str, &str)]| {
            let all = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
            Environment::gather(Kind::Node, all, |p| Err(format!("cannot read {p}")))
        };
        let both = gather(&[("POSTGRES_DB", "a"), ("POSTGRES_DB_FILE", "/b")]);
        assert!(both.unwrap_err().contains("both set"));
        let missing = gather(&[("POSTGRES_DB_FILE", "/b")]);
        assert_eq!(missing.unwrap_err(), "POSTGRES_DB_FILE: cannot read /b");
        // An empty variable is none, as in compose files that pass on what may be unset.
        assert_eq!(
            gather(&[("POSTGRES_DB", "")]).unwrap().get("POSTGRES_DB"),
            None
        );
    }

    #[test]
    fn configs_with_odd_symbols() {
        let read = |pairs: &[(&str, &str)]| configs(&env(Kind::Node, pairs)).unwrap();
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(
            read(&[(
                "CONFIGS",
                "listen_addresses:'*',max_connections:100, log_line_prefix : '%t: '"
            )]),
            [
                pair("listen_addresses", "*"),
                pair("max_connections", "100"),
                pair("log_line_prefix", "%t: ")
            ]
        );
        assert_eq!(
            read(&[
                (
                    "CONFIGS",
                    "listen_addresses)'some_host'|max_replication_slots)55|"
                ),
                ("CONFIGS_DELIMITER_SYMBOL", "|"),
                ("CONFIGS_ASSIGNMENT_SYMBOL", ")"),
            ]),
            [
                pair("listen_addresses", "some_host"),
                pair("max_replication_slots", "55")
            ]
        );
        assert!(configs(&env(Kind::Node, &[("CONFIGS", "a=1")])).is_err());
        assert!(configs(&env(Kind::Node, &[("CONFIGS", "a b:1")])).is_err());
    }

    #[test]
    fn what_changes_nothing_is_named() {
        let e = env(
            Kind::Node,
            &[
                ("USE_REPLICATION_SLOTS", "1"),
                ("NODE_NAME", "node1"),
                ("X", "y"),
            ],
        );
        let notes = e.notes(Kind::Node);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].starts_with("USE_REPLICATION_SLOTS changes nothing: "));
        assert!(is_secret("POSTGRES_PASSWORD_FILE") && is_secret("CHECK_PASSWORD"));
        assert!(!is_secret("POSTGRES_USER"));
    }
}
