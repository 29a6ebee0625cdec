//! The server's configuration: three files in `conf/`, outside the data directory, wholly ours.
//!
//! `postgresql.conf` includes the data directory's own file first, so that what initdb or an operator put
//! there still counts, and then sets what a member of a cluster must have. `ALTER SYSTEM` writes to
//! `postgresql.auto.conf`, which PostgreSQL reads last of all; lines there that name one of our keys are
//! taken out and reported.

mod logical;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{PgError, Result};
use crate::files;
use crate::hba::{self, HbaRule};
use crate::slots;
use crate::sync::SyncNames;

/// Parameters that take effect only at a start (`context = postmaster` in `pg_settings`).
const RESTART_KEYS: &[&str] = &[
    "archive_mode",
    "autovacuum_freeze_max_age",
    "autovacuum_max_workers",
    "bonjour",
    "bonjour_name",
    "cluster_name",
    "dynamic_shared_memory_type",
    "event_source",
    "external_pid_file",
    "hot_standby",
    "huge_page_size",
    "huge_pages",
    "io_max_combine_limit",
    "io_max_concurrency",
    "io_method",
    "jit_provider",
    "listen_addresses",
    "logging_collector",
    "max_active_replication_origins",
    "max_connections",
    "max_files_per_process",
    "max_locks_per_transaction",
    "max_logical_replication_workers",
    "max_notify_queue_pages",
    "max_pred_locks_per_transaction",
    "max_prepared_transactions",
    "max_replication_slots",
    "max_wal_senders",
    "max_worker_processes",
    "min_dynamic_shared_memory",
    "old_snapshot_threshold",
    "port",
    "recovery_target_timeline",
    "reserved_connections",
    "restore_command",
    "shared_buffers",
    "shared_memory_type",
    "shared_preload_libraries",
    "superuser_reserved_connections",
    "track_activity_query_size",
    "track_commit_timestamp",
    "unix_socket_directories",
    "unix_socket_group",
    "unix_socket_permissions",
    "wal_buffers",
    "wal_level",
    "wal_log_hints",
];

/// What every member has unless the operator's settings say otherwise, with the reason where it is odd.
pub(crate) const DEFAULTS: &[(&str, &str)] = &[
    ("wal_level", "replica"),
    ("max_wal_senders", "16"),
    ("max_replication_slots", "16"),
    // pg_rewind needs one of checksums and this; clusters that were not made by us may lack checksums.
    ("wal_log_hints", "on"),
    ("hot_standby", "on"),
    // A standby's queries must not hold back the primary, nor be cancelled at once.
    ("max_standby_streaming_delay", "30s"),
    // Slots keep what standbys need. This is for pg_rewind on a former leader, which reads its own WAL back to the
    // last checkpoint before the histories parted; and pg_rewind before 18 copies all of the source's pg_wal.
    ("wal_keep_size", "64MB"),
    ("password_encryption", "scram-sha-256"),
    ("synchronous_commit", "on"),
    // A standby looks for a new leader this often.
    ("wal_retrieve_retry_interval", "200ms"),
    ("wal_receiver_status_interval", "1s"),
    ("wal_receiver_timeout", "5s"),
    ("wal_sender_timeout", "5s"),
    ("tcp_keepalives_idle", "5"),
    ("tcp_keepalives_interval", "2"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "10s"),
    ("log_line_prefix", "%m [%p] %q%u@%d %a "),
    ("log_checkpoints", "on"),
    ("log_lock_waits", "on"),
];

/// What the data directory's own configuration, which was perhaps another system's, must not say otherwise.
pub(crate) const FIXED: [(&str, &str); 12] = [
    ("archive_cleanup_command", ""),
    ("external_pid_file", ""),
    ("fsync", "on"),
    ("full_page_writes", "on"),
    // The agent reads in PostgreSQL's log why it did not start. A role may be given another language.
    ("lc_messages", "C"),
    ("recovery_min_apply_delay", "0"),
    ("recovery_target", ""),
    ("recovery_target_lsn", ""),
    ("recovery_target_name", ""),
    ("recovery_target_time", ""),
    ("recovery_target_xid", ""),
    // A server that starts its processes again by itself lets clients see what it recovered before standbys have it:
    // the agent decides what becomes of it.
    ("restart_after_crash", "off"),
];

/// Settings that the agent owns: an operator's value for them is refused.
pub(crate) const OWNED_KEYS: &[&str] = &[
    "archive_cleanup_command",
    "cluster_name",
    "config_file",
    "data_directory",
    "external_pid_file",
    "fsync",
    "full_page_writes",
    "hba_file",
    "hot_standby",
    "ident_file",
    "lc_messages",
    "listen_addresses",
    "log_destination",
    "logging_collector",
    "port",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_min_apply_delay",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restart_after_crash",
    // A sealed standby that went on reading an archive would not be sealed (failover protocol, 3.1).
    "restore_command",
    "ssl",
    "ssl_ca_file",
    "ssl_cert_file",
    "ssl_key_file",
    "synchronized_standby_slots",
    "synchronous_standby_names",
    "unix_socket_directories",
    "unix_socket_permissions",
];

/// Where a standby streams from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Upstream {
    /// Host name or address.
    pub host: String,
    /// PostgreSQL's port there.
    pub port: u16,
    /// The role, `craton_replication` or `craton_rewind`.
    pub user: String,
    /// Its password, in libpq's password file format, mode 0600.
    pub passfile: PathBuf,
    /// `<member>@<incarnation>`: what synchronous_standby_names lists.
    pub application_name: String,
    /// The physical slot that keeps WAL for us there.
    pub slot: Option<String>,
    /// What is shown to it and what it must show; without, encryption is as the server likes (isolated tests).
    pub tls: Option<PgTls>,
}

/// Files for TLS between PostgreSQL servers, all in PEM. The server re-reads them at a reload, libpq at each
/// connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PgTls {
    /// The authorities that are trusted.
    pub authority: PathBuf,
    /// The member's certificate; it names the host under which others reach it.
    pub certificate: PathBuf,
    /// Its key, mode 0600. May be the same file.
    pub key: PathBuf,
}

impl Upstream {
    /// The connection string for libpq. `dbname` is left out for replication connections.
    pub(crate) fn conninfo(&self, dbname: Option<&str>) -> String {
        // A leader whose host is gone must not hold a standby for the kernel's two minutes.
        self.conninfo_within(2, dbname)
    }

    /// The same with another limit on connecting, in seconds: a clone is not started again for a slow handshake.
    pub(crate) fn conninfo_within(&self, limit_s: u8, dbname: Option<&str>) -> String {
        let limit = limit_s.to_string();
        let mut text = String::new();
        let port = self.port.to_string();
        let passfile = self.passfile.display().to_string();
        let mut pairs = vec![
            ("host", self.host.as_str()),
            ("port", &port),
            ("user", &self.user),
            ("passfile", &passfile),
            ("application_name", &self.application_name),
            ("connect_timeout", &limit),
            ("keepalives_idle", "5"),
            ("keepalives_interval", "2"),
            ("keepalives_count", "3"),
            ("tcp_user_timeout", "10000"),
        ];
        let files = self.tls.as_ref().map(|tls| {
            [&tls.authority, &tls.certificate, &tls.key].map(|path| path.display().to_string())
        });
        match &files {
            Some([authority, certificate, key]) => pairs.extend([
                ("sslmode", "verify-full"),
                ("ssl_min_protocol_version", "TLSv1.3"),
                ("sslrootcert", authority.as_str()),
                ("sslcert", certificate.as_str()),
                ("sslkey", key.as_str()),
            ]),
            None => pairs.push(("sslmode", "prefer")),
        }
        if let Some(dbname) = dbname {
            pairs.push(("dbname", dbname));
        }
        for (key, value) in pairs {
            let separator = if text.is_empty() { "" } else { " " };
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "{separator}{key}='{}'",
                value.replace('\\', "\\\\").replace('\'', "\\'")
            );
        }
        text
    }
}

/// What changes while a member lives; the rest comes from [`crate::InstanceConfig`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ManagedConfig {
    /// Where to stream from; none for a leader, or to make a standby drop its WAL receiver.
    pub upstream: Option<Upstream>,
    /// Where WAL is read from besides, while a copy from the backup repository catches up; never on a member
    /// that takes part in the cluster.
    pub restore_command: Option<String>,
    /// Who must have flushed a commit before a client hears of it.
    pub sync: SyncNames,
    /// The physical slots of the members, as far as they are known.
    pub member_slots: BTreeSet<String>,
    /// The operator's settings for the whole cluster, over the defaults.
    pub settings: BTreeMap<String, String>,
    /// Who may connect over TCP.
    pub hba: Vec<HbaRule>,
    /// Only the cluster's own roles are let in, and the superuser on this host.
    pub closed: bool,
    /// The server's own TLS.
    pub tls: Option<PgTls>,
}

/// What writing the configuration changed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ConfigChange {
    /// The keys, and `pg_hba.conf` or `pg_ident.conf`, that differ from before.
    pub changed: Vec<String>,
    /// Those of them that take effect only at the next start.
    pub needs_restart: Vec<String>,
    /// Lines taken out of `postgresql.auto.conf` because the agent owns or manages their keys.
    pub removed_overrides: Vec<String>,
}

impl ConfigChange {
    /// True if a reload (or a restart) is needed.
    pub fn any(&self) -> bool {
        !self.changed.is_empty() || !self.removed_overrides.is_empty()
    }
}

/// The places and fixed values that go into the files.
pub(crate) struct Place<'a> {
    pub conf_dir: &'a Path,
    pub data_dir: &'a Path,
    pub socket_dir: &'a Path,
    pub listen_addresses: &'a str,
    pub port: u16,
    pub cluster_name: &'a str,
    pub superuser: &'a str,
    pub os_user: &'a str,
    pub version: u32,
}

/// Writes the three files where they differ, durably.
pub(crate) fn write(place: &Place<'_>, managed: &ManagedConfig) -> Result<ConfigChange> {
    let mut wanted = settings(place, managed)?;
    let main = place.conf_dir.join("postgresql.conf");
    let before = files::read_text(&main)?
        .map(|t| parse_settings(&t))
        .unwrap_or_default();
    wanted.extend(logical::waits_for(place, managed, &before));
    let mut change = ConfigChange::default();
    for key in before.keys().chain(wanted.keys()).collect::<BTreeSet<_>>() {
        if before.get(key) != wanted.get(key) {
            change.changed.push(key.clone());
            if RESTART_KEYS.contains(&key.as_str()) {
                change.needs_restart.push(key.clone());
            }
        }
    }
    let text = render(place, &wanted);
    if files::read_text(&main)?.as_deref() != Some(&text) {
        files::write_durably(&main, text.as_bytes())?;
    }
    change.changed.extend(write_access(place, managed)?);
    change.removed_overrides = remove_overrides(place.data_dir, &wanted)?;
    Ok(change)
}

/// Writes who may log in, where it differs; returns the names of the files that did.
pub(crate) fn write_access(place: &Place<'_>, managed: &ManagedConfig) -> Result<Vec<String>> {
    let rules = logical::rules(place, managed);
    let mut changed = Vec::new();
    for (name, text) in [
        (hba::FILE, hba::hba(place, &rules, managed.closed)?),
        ("pg_ident.conf", hba::ident(place)?),
    ] {
        let path = place.conf_dir.join(name);
        if files::read_text(&path)?.as_deref() != Some(&text) {
            files::write_durably(&path, text.as_bytes())?;
            changed.push(name.to_owned());
        }
    }
    Ok(changed)
}

/// What says which role the server plays: only a change of the role changes it.
const ROLE_KEYS: [&str; 8] = [
    "primary_conninfo",
    "primary_slot_name",
    "ssl",
    "ssl_ca_file",
    "ssl_cert_file",
    "ssl_key_file",
    logical::WAITS_FOR,
    "synchronous_standby_names",
];

/// Writes `postgresql.conf` with other settings of the operator's, in the role that the present file has.
pub(crate) fn write_settings(place: &Place<'_>, wanted: &BTreeMap<String, String>) -> Result<()> {
    let main = place.conf_dir.join("postgresql.conf");
    let Some(before) = files::read_text(&main)?.map(|t| parse_settings(&t)) else {
        return Err(PgError::Invalid {
            what: "configuration",
            reason: format!("{} is not written yet", main.display()),
        });
    };
    let managed = ManagedConfig {
        settings: wanted.clone(),
        ..ManagedConfig::default()
    };
    let mut next = settings(place, &managed)?;
    for key in ROLE_KEYS {
        if let Some(value) = before.get(key) {
            next.insert(key.to_owned(), value.clone());
        }
    }
    let text = render(place, &next);
    if files::read_text(&main)?.as_deref() != Some(&text) {
        files::write_durably(&main, text.as_bytes())?;
    }
    remove_overrides(place.data_dir, &next).map(|_| ())
}

/// The value of synchronous_standby_names in the file, if it is one of ours.
pub(crate) fn sync_names(conf_dir: &Path) -> Result<Option<SyncNames>> {
    let text = files::read_text(&conf_dir.join("postgresql.conf"))?.unwrap_or_default();
    Ok(parse_settings(&text)
        .get("synchronous_standby_names")
        .and_then(|v| SyncNames::parse(v)))
}

/// All settings of the managed section, by key.
fn settings(place: &Place<'_>, managed: &ManagedConfig) -> Result<BTreeMap<String, String>> {
    let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
    let mut all: BTreeMap<String, String> = DEFAULTS.iter().map(owned).collect();
    all.insert(
        "max_slot_wal_keep_size".to_owned(),
        slots::wal_bound(place.data_dir, place.conf_dir),
    );
    if place.version >= 14 && files::can_flush_file_systems() {
        // After a crash PostgreSQL first flushes all files, one by one: seconds in which nobody is served.
        all.insert("recovery_init_sync_method".to_owned(), "syncfs".to_owned());
    }
    logical::defaults(place, managed, &mut all);
    for (key, value) in &managed.settings {
        let key = key.to_ascii_lowercase();
        if OWNED_KEYS.contains(&key.as_str()) {
            return Err(PgError::Invalid {
                what: "PostgreSQL setting",
                reason: format!(
                    "{key} is managed by the agent; take it out of the cluster's settings"
                ),
            });
        }
        if key.is_empty()
            || !key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.')
        {
            return Err(PgError::Invalid {
                what: "PostgreSQL setting",
                reason: format!("{key:?} is not a parameter name"),
            });
        }
        all.insert(key, one_line("PostgreSQL setting", value)?.to_owned());
    }
    let upstream = managed.upstream.as_ref();
    let conninfo = upstream.map(|u| u.conninfo(logical::database(place, managed)));
    let path = |p: &Path| p.display().to_string();
    let owned = [
        ("data_directory", path(place.data_dir)),
        ("listen_addresses", place.listen_addresses.to_owned()),
        ("port", place.port.to_string()),
        ("cluster_name", place.cluster_name.to_owned()),
        ("unix_socket_directories", path(place.socket_dir)),
        ("unix_socket_permissions", "0700".to_owned()),
        ("hba_file", path(&place.conf_dir.join("pg_hba.conf"))),
        ("ident_file", path(&place.conf_dir.join("pg_ident.conf"))),
        ("hot_standby", "on".to_owned()),
        ("log_destination", "stderr".to_owned()),
        ("logging_collector", "off".to_owned()),
        ("recovery_target_timeline", "latest".to_owned()),
        (
            "restore_command",
            managed.restore_command.clone().unwrap_or_default(),
        ),
        ("primary_conninfo", conninfo.unwrap_or_default()),
        (
            "primary_slot_name",
            upstream.and_then(|u| u.slot.clone()).unwrap_or_default(),
        ),
        ("synchronous_standby_names", managed.sync.setting()),
    ];
    let fixed = FIXED.iter().map(|(k, v)| (*k, (*v).to_owned()));
    let tls = managed.tls.as_ref().map(|tls| {
        [
            ("ssl", "on".to_owned()),
            ("ssl_ca_file", path(&tls.authority)),
            ("ssl_cert_file", path(&tls.certificate)),
            ("ssl_key_file", path(&tls.key)),
        ]
    });
    let owned = owned.into_iter().chain(fixed);
    for (key, value) in owned.chain(tls.into_iter().flatten()) {
        all.insert(
            key.to_owned(),
            one_line("PostgreSQL setting", &value)?.to_owned(),
        );
    }
    Ok(all)
}

/// A value that would begin a new line could smuggle in another setting.
fn one_line<'a>(what: &'static str, value: &'a str) -> Result<&'a str> {
    if value.chars().any(char::is_control) {
        return Err(PgError::Invalid {
            what,
            reason: format!("{value:?} holds a control character"),
        });
    }
    Ok(value)
}

fn render(place: &Place<'_>, settings: &BTreeMap<String, String>) -> String {
    let own = place.data_dir.join("postgresql.conf").display().to_string();
    let mut text = format!(
        "# Written by the craton agent: changes are overwritten. Use \"craton config edit\".\n\
         include_if_exists = {}\n",
        quoted(&own)
    );
    for (key, value) in settings {
        let _ = writeln!(text, "{key} = {}", quoted(value));
    }
    text
}

/// A value for guc-file.l: quotes and backslashes doubled.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// Reads back what [`render`] wrote.
fn parse_settings(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter(|l| !l.starts_with('#') && !l.starts_with("include"))
        .filter_map(|l| l.split_once(" = "))
        .filter_map(|(k, v)| Some((k, v.strip_prefix('\'')?.strip_suffix('\'')?)))
        .map(|(k, v)| (k.to_owned(), v.replace("''", "'").replace("\\\\", "\\")))
        .collect()
}

/// Takes our keys out of `postgresql.auto.conf`; returns the lines.
fn remove_overrides(data_dir: &Path, ours: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let path = data_dir.join("postgresql.auto.conf");
    let Some(text) = files::read_text(&path)? else {
        return Ok(Vec::new());
    };
    let is_ours = |line: &str| {
        let key = line
            .split(['=', ' ', '\t'])
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        ours.contains_key(&key) || OWNED_KEYS.contains(&key.as_str())
    };
    let (removed, kept): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|l| is_ours(l.trim_start()));
    if !removed.is_empty() {
        let mut rest = kept.join("\n");
        rest.push('\n');
        files::write_durably(&path, rest.as_bytes())?;
    }
    Ok(removed.into_iter().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_in(dir: &Path, managed: &ManagedConfig) -> Result<ConfigChange> {
        write(
            &Place {
                conf_dir: dir,
                data_dir: dir,
                socket_dir: dir,
                listen_addresses: "127.0.0.1",
                port: 6441,
                cluster_name: "it's",
                superuser: "postgres",
                os_user: "postgres",
                version: 15,
            },
            managed,
        )
    }

    pub(super) fn upstream() -> Upstream {
        Upstream {
            host: "10.0.0.1".into(),
            port: 6441,
            user: "craton_replication".into(),
            passfile: "/a b/it's".into(),
            application_name: "a@0000000000000001".into(),
            slot: Some("craton_b".into()),
            tls: None,
        }
    }

    #[test]
    fn tells_what_changed_and_what_needs_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut managed = ManagedConfig {
            hba: HbaRule::standard(&["127.0.0.1/32"], false),
            ..Default::default()
        };
        assert!(write_in(dir.path(), &managed).unwrap().any());
        assert_eq!(
            write_in(dir.path(), &managed).unwrap(),
            ConfigChange::default()
        );
        managed.upstream = Some(upstream());
        managed
            .settings
            .insert("shared_buffers".into(), "1GB".into());
        let change = write_in(dir.path(), &managed).unwrap();
        assert_eq!(
            change.changed,
            ["primary_conninfo", "primary_slot_name", "shared_buffers"]
        );
        assert_eq!(change.needs_restart, ["shared_buffers"]);
        assert!(
            !write_in(dir.path(), &managed).unwrap().any(),
            "quoting does not survive reading back"
        );
    }

    #[test]
    fn other_settings_leave_the_role_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut managed = ManagedConfig {
            upstream: Some(upstream()),
            sync: SyncNames::Nobody,
            settings: BTreeMap::from([("work_mem".to_owned(), "8MB".to_owned())]),
            tls: Some(PgTls {
                authority: "/s/authority.pem".into(),
                certificate: "/s/a.pem".into(),
                key: "/s/a.pem".into(),
            }),
            ..Default::default()
        };
        write_in(dir.path(), &managed).unwrap();
        managed.settings = BTreeMap::from([("max_connections".to_owned(), "50".to_owned())]);
        let place = Place {
            conf_dir: dir.path(),
            data_dir: dir.path(),
            socket_dir: dir.path(),
            listen_addresses: "127.0.0.1",
            port: 6441,
            cluster_name: "it's",
            superuser: "postgres",
            os_user: "postgres",
            version: 15,
        };
        write_settings(&place, &managed.settings).unwrap();
        let after = write_in(dir.path(), &managed).unwrap();
        assert_eq!(
            after.changed, ["pg_hba.conf"; 0],
            "role or settings differ: {after:?}"
        );
    }

    #[test]
    fn own_roles_reach_what_they_need_by_tls_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let tls = PgTls {
            authority: "/s/authority.pem".into(),
            certificate: "/s/a b.pem".into(),
            key: "/s/a b.pem".into(),
        };
        let managed = ManagedConfig {
            hba: HbaRule::standard(&["10.0.0.0/24"], true),
            upstream: Some(Upstream {
                tls: Some(tls.clone()),
                ..upstream()
            }),
            tls: Some(tls),
            ..Default::default()
        };
        write_in(dir.path(), &managed).unwrap();
        let hba = std::fs::read_to_string(dir.path().join("pg_hba.conf")).unwrap();
        assert_eq!(
            hba.lines().skip(1).collect::<Vec<_>>(),
            [
                "local all postgres peer map=craton",
                "local all all scram-sha-256",
                "hostssl replication craton_replication 10.0.0.0/24 scram-sha-256 clientcert=verify-ca",
                "hostssl postgres craton_rewind 10.0.0.0/24 scram-sha-256 clientcert=verify-ca",
                "hostssl postgres craton_proxy 10.0.0.0/24 scram-sha-256 clientcert=verify-ca",
                "host all craton_replication,craton_rewind,craton_proxy all reject",
                "hostssl replication all 10.0.0.0/24 scram-sha-256 clientcert=verify-ca",
                "host all all 10.0.0.0/24 scram-sha-256",
            ]
        );
        let closed = ManagedConfig {
            closed: true,
            ..managed
        };
        assert_eq!(
            write_in(dir.path(), &closed).unwrap().changed,
            ["pg_hba.conf"]
        );
        let hba = std::fs::read_to_string(dir.path().join("pg_hba.conf")).unwrap();
        let lines: Vec<&str> = hba.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(lines[1], "local all all reject");
        assert_eq!(lines.len(), 6, "nobody else is let in: {lines:?}");
        assert!(lines[2..].iter().all(|l| l.contains(" craton_")));
        let text = std::fs::read_to_string(dir.path().join("postgresql.conf")).unwrap();
        let settings = parse_settings(&text);
        assert_eq!(settings["ssl_key_file"], "/s/a b.pem");
        let conninfo = &settings["primary_conninfo"];
        for part in [
            "sslmode='verify-full'",
            "ssl_min_protocol_version='TLSv1.3'",
            "sslrootcert='/s/authority.pem'",
            "sslkey='/s/a b.pem'",
        ] {
            assert!(conninfo.contains(part), "{conninfo}");
        }
        let refused = ManagedConfig {
            settings: BTreeMap::from([("ssl".to_owned(), "off".to_owned())]),
            ..Default::default()
        };
        assert!(write_in(dir.path(), &refused).is_err());
    }

    #[test]
    fn alter_system_cannot_override_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let auto = dir.path().join("postgresql.auto.conf");
        std::fs::write(
            &auto,
            "# Do not edit\nwork_mem = '8MB'\nSynchronous_Standby_Names = ''\nfsync=off\n",
        )
        .unwrap();
        let change = write_in(dir.path(), &ManagedConfig::default()).unwrap();
        assert_eq!(
            change.removed_overrides,
            ["Synchronous_Standby_Names = ''", "fsync=off"]
        );
        assert_eq!(
            std::fs::read_to_string(&auto).unwrap(),
            "# Do not edit\nwork_mem = '8MB'\n"
        );
    }

    #[test]
    fn refuses_settings_that_would_break_the_cluster_or_the_file() {
        let dir = tempfile::tempdir().unwrap();
        for (key, value) in [
            ("fsync", "off"),
            ("Port", "1"),
            ("a b", "1"),
            ("work_mem", "1\nfsync=off"),
        ] {
            let managed = ManagedConfig {
                settings: BTreeMap::from([(key.to_owned(), value.to_owned())]),
                ..Default::default()
            };
            assert!(
                write_in(dir.path(), &managed).is_err(),
                "{key} = {value} was accepted"
            );
        }
        let rule = HbaRule {
            address: "all # x".into(),
            ..HbaRule::standard(&["all"], false)[0].clone()
        };
        let managed = ManagedConfig {
            hba: vec![rule],
            ..Default::default()
        };
        assert!(write_in(dir.path(), &managed).is_err());
    }
}
