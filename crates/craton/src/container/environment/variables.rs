//! The table of the variables: the images that look at each, its default, what it means.

use super::{Effect, Kind, Variable};

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

/// Why settings of repmgr change nothing.
const NO_REPMGR: &str = "there is no repmgr";
/// Why names inside of repmgr's database change nothing.
const REPMGR_4: &str = "what is shown to scripts is named as in repmgr 4";
/// Why files in which the old images' scripts kept their state change nothing.
const NO_SCRIPTS: &str = "no scripts start and stop the server; the agent does";

/// What the images set themselves (`ENV` in the Dockerfiles), for people who write `$REPLICATION_DB` in a shell of a
/// container, as the old images' README has it. These are the defaults: a variable that has the image's value counts as not
/// set. Never a secret.
pub(super) const IMAGE_ENV: &[(&[Kind], &str, &str)] = &[
    (NODE, "LANG", super::super::plan::initdb::LANG),
    (NODE, "REPLICATION_DB", "replication_db"),
    (NODE_BACKUP, "REPLICATION_USER", "replication_user"),
    (NODE, "REPLICATION_PRIMARY_PORT", "5432"),
    (NODE_PROXY, "CHECK_PGCONNECT_TIMEOUT", "10"),
    (NODE, "REPMGR_NODES_TABLE", "nodes"),
    (NODE, "REPMGR_SHOW_NODES_TABLE", "show_nodes"),
    (NODE, "REPMGR_NODE_ID_COLUMN", "node_id"),
    (NODE, "REPMGR_NODE_NAME_COLUMN", "node_name"),
    (PROXY, "CHECK_USER", CHECK_USER_DEFAULT),
    (BACKUP, "REPLICATION_PORT", "5432"),
    (BACKUP, "REPLICATION_SLOT_NAME", "barman_the_backupper"),
    (BACKUP, "UPSTREAM_NAME", "pg_cluster"),
    (BACKUP, "BACKUP_DIR", "/var/backups"),
];

/// The old balancer's check user, where nobody chose one.
pub(super) const CHECK_USER_DEFAULT: &str = "replication_user";

/// The password that everybody knows from the old README.
pub const REPLICATION_DEFAULT: &str = "replication_pass";

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
        "node: pg_cluster, or REPLICATION_PRIMARY_HOST's; others ask a node",
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
    noted(
        BACKUP,
        "CONFIGS",
        "neither PostgreSQL nor a balancer runs here; Craton's settings are CRATON_BACKUP_…",
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
        "POSTGRES_INITDB_ARGS",
        "",
        "Arguments of initdb for the database of a new cluster, on the node that makes it: `--locale`, `--lc-*`, `--encoding`, `--locale-provider`, `--icu-locale`, `--icu-rules`, `--builtin-locale`, `--text-search-config`, `--no-locale`. What Craton has in any case (`--data-checksums`, `--auth-host=scram-sha-256`) is taken, others stop the first start with the reason",
    ),
    used(
        NODE,
        "LANG",
        super::super::plan::initdb::LANG,
        "The locale of a new cluster's database where POSTGRES_INITDB_ARGS names none. The image has `C`, `C.UTF-8` and `en_US.utf8`; `localedef` in an image of your own makes others. The backup daemon and the proxy do not look at it",
    ),
    noted(
        NODE,
        "POSTGRES_INITDB_WALDIR",
        "WAL stands in the volume, beside the data",
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
    noted(NODE, "REPMGR_MAJOR", NO_REPMGR),
    noted(NODE, "REPMGR_CONFIG_FILE", NO_REPMGR),
    noted(NODE, "REPMGR_START_OPTIONS", NO_REPMGR),
    noted(NODE, "REPMGR_PID_FILE", NO_REPMGR),
    noted(NODE, "REPMGR_NODE_ID_PARAM_NAME", NO_REPMGR),
    noted(NODE, "REPMGR_LOG_LEVEL_PARAM_NAME", NO_REPMGR),
    noted(NODE, "REPMGR_CLUSTER_SHOW_MASTER_PATTERN", NO_REPMGR),
    noted(NODE, "REPMGR_MASTER_RESPONSE_TIMEOUT_PARAM_NAME", NO_REPMGR),
    noted(NODE, "REPMGR_NODES_TABLE", REPMGR_4),
    noted(NODE, "REPMGR_SHOW_NODES_TABLE", REPMGR_4),
    noted(NODE, "REPMGR_NODE_ID_COLUMN", REPMGR_4),
    noted(NODE, "REPMGR_NODE_NAME_COLUMN", REPMGR_4),
    noted(NODE, "STOPPING_LOCK_FILE", NO_SCRIPTS),
    noted(NODE, "MASTER_SYNC_LOCK_FILE", NO_SCRIPTS),
    noted(NODE, "MASTER_SLAVE_SWITCH", NO_SCRIPTS),
    noted(NODE, "CURRENT_REPLICATION_PRIMARY_HOST", NO_SCRIPTS),
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
        super::super::plan::BACKENDS_DEFAULT,
        "The nodes: `num:host:port:weight:data_directory:flag[,…]`. One that is reached is enough: the others are learnt from it. num, host and weight are shown by `show pool_nodes`",
    ),
    used(
        PROXY,
        "CHECK_USER",
        CHECK_USER_DEFAULT,
        "The user of has_write_node.sh and has_enough_backends.sh",
    ),
    secret(
        PROXY,
        "CHECK_PASSWORD",
        "REPLICATION_PASSWORD",
        "Its password. `psql -U $CHECK_USER -h localhost` in the container finds it by itself, also where it came from a file (PGPASSFILE)",
    ),
    secret(
        PROXY,
        "REPLICATION_PASSWORD",
        REPLICATION_DEFAULT,
        "The nodes' one, from which certificates are computed where they have no CRATON_CLUSTER_SECRET. CHECK_PASSWORD, those in DB_USERS, and where it is not set its default are tried with the nodes, too; the proxy does not start if the nodes have none of several. One alone is taken as it is: if it is not theirs, the proxy knows no leader, and its log says why",
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
    secret(
        PROXY,
        "DB_USERS",
        "",
        "Not needed: users are looked up in PostgreSQL, and every role that may log in there may log in here. Only its passwords are tried as the nodes' REPLICATION_PASSWORD",
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
