//! PostgreSQL's parameters as the operator wants them: the cluster's, and this member's own over them; which of
//! them wait for a restart; and whether new ones may be written.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::observe::PendingChange;
use craton_pg::guarantees::weakens;
use craton_pg::parameters::refused;
use tokio::sync::Notify;

use crate::server::LocalServer;

/// How often the server is asked what waits for a restart.
const INTERVAL: Duration = Duration::from_secs(2);
/// A reload takes a moment to be read.
const AFTER_RELOAD: Duration = Duration::from_millis(200);
/// A query of the agent's own.
const QUERY_MAX: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Known {
    cluster: BTreeMap<String, String>,
    /// What the configuration file holds; none if that is not known.
    written: Option<BTreeMap<String, String>>,
    pending: Vec<PendingChange>,
}

/// The operator's settings for this member's PostgreSQL.
pub struct Parameters {
    own: BTreeMap<String, String>,
    look: Notify,
    known: Mutex<Known>,
}

impl Parameters {
    /// With the member's own settings, `[node.postgresql]`. What Craton sets itself is left out, and said: a version
    /// that owns more must not keep PostgreSQL from starting.
    pub fn new(mut own: BTreeMap<String, String>) -> Self {
        own.retain(|name, value| {
            let why = refused(&name.to_ascii_lowercase());
            if let Some(why) = why {
                tracing::warn!(
                    "node.postgresql.{name} = {value} is left out: {why}; take it out of this member's craton.toml"
                );
            }
            why.is_none()
        });
        Self {
            own,
            look: Notify::new(),
            known: Mutex::new(Known::default()),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The member's own, which go over the cluster's.
    pub fn own(&self) -> &BTreeMap<String, String> {
        &self.own
    }

    /// What the coordinator says.
    pub fn set_cluster(&self, settings: BTreeMap<String, String>) {
        self.known().cluster = settings;
    }

    fn wanted(&self, known: &Known) -> BTreeMap<String, String> {
        let mut all = known.cluster.clone();
        // A version that owns fewer parameters may have stored one that this one owns: it must not keep
        // PostgreSQL from starting.
        all.retain(|name, _| refused(name).is_none());
        all.extend(self.own.clone());
        all
    }

    /// The settings that go into the configuration file now.
    pub fn to_write(&self) -> BTreeMap<String, String> {
        let mut known = self.known();
        let wanted = self.wanted(&known);
        known.written = Some(wanted.clone());
        wanted
    }

    /// The settings that are in the configuration file, as far as is known.
    pub fn in_file(&self) -> BTreeMap<String, String> {
        let known = self.known();
        let written = known.written.clone();
        written.unwrap_or_else(|| self.wanted(&known))
    }

    /// What the file holds is not what was asked for: it is to be written again.
    pub fn forget_written(&self) {
        self.known().written = None;
    }

    /// The file is not what the settings ask for.
    pub fn is_stale(&self) -> bool {
        let known = self.known();
        known.written.as_ref() != Some(&self.wanted(&known))
    }

    /// What waits for a restart.
    pub fn pending(&self) -> Vec<PendingChange> {
        self.known().pending.clone()
    }

    /// PostgreSQL has started (or was taken over): what waited for that waits no more, as far as is known.
    pub fn new_life(&self) {
        self.known().pending.clear();
        self.look.notify_one();
    }

    /// The server has been told to read its files.
    pub fn look_soon(&self) {
        self.look.notify_one();
    }
}

/// Raises what a standby must have as much of as its primary had; true if anything was raised. `needs` is what the
/// control file says. A parameter that is not set has PostgreSQL's default.
pub fn raise_to(settings: &mut BTreeMap<String, String>, needs: &BTreeMap<String, u32>) -> bool {
    let mut raised = false;
    for (name, least) in needs {
        let default = match name.as_str() {
            "max_connections" => 100,
            "max_worker_processes" => 8,
            "max_locks_per_transaction" => 64,
            // Craton's own default, see `craton_pg::config`.
            "max_wal_senders" => 16,
            _ => 0,
        };
        let has = settings.get(name).map_or(Some(default), |v| v.parse().ok());
        if has.is_some_and(|has| has < *least) {
            settings.insert(name.clone(), least.to_string());
            raised = true;
        }
    }
    raised
}

/// Asks the server what waits for a restart, for as long as the agent lives.
pub async fn keep(server: Arc<LocalServer>) {
    loop {
        tokio::select! {
            () = server.parameters.look.notified() => tokio::time::sleep(AFTER_RELOAD).await,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let pending = if server.sample().is_some() {
            match server.control.pending_restart(QUERY_MAX).await {
                Ok(pending) => pending,
                Err(error) => {
                    tracing::debug!(%error, "cannot tell what waits for a restart");
                    continue;
                }
            }
        } else {
            Vec::new()
        };
        let changed = {
            let mut known = server.parameters.known();
            let changed = known.pending != pending;
            known.pending = pending;
            changed
        };
        if changed {
            server.changed.notify_one();
        }
    }
}

/// What a change of PostgreSQL's parameters comes to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Names that take effect only at a restart.
    pub restart: Vec<String>,
    /// What the operator should know of it.
    pub notes: Vec<String>,
}

/// Slots and WAL senders that Craton itself needs beside one for each member: the backup's, and a base backup.
const OWN_SENDERS: u32 = 3;

/// Checks parameters that are to be set for every member: names and values against the running server, then all of
/// them together by PostgreSQL itself. The text of an error says what to do.
pub async fn check(
    server: &LocalServer,
    changed: &BTreeMap<String, String>,
    members: usize,
) -> Result<Verdict, String> {
    let mut verdict = Verdict::default();
    if changed.is_empty() {
        return Ok(verdict);
    }
    for (name, value) in changed {
        if let Some(why) = refused(name) {
            return Err(format!("postgresql.{name} is Craton's: {why}"));
        }
        if value.chars().any(char::is_control) {
            return Err(format!(
                "postgresql.{name}: {value:?} holds a control character"
            ));
        }
        promises_kept(name, value, members)?;
    }
    let names: Vec<String> = changed.keys().cloned().collect();
    let known = server
        .control
        .parameters(&names, QUERY_MAX)
        .await
        .map_err(|e| format!("PostgreSQL of this member cannot be asked: {e}"))?;
    for (name, value) in changed {
        match known.iter().find(|p| p.name.eq_ignore_ascii_case(name)) {
            Some(parameter) => {
                parameter
                    .check(value)
                    .map_err(|e| format!("postgresql.{e}"))?;
                if parameter.needs_restart() {
                    verdict.restart.push(name.clone());
                }
            }
            None if name.contains('.') => verdict.notes.push(format!(
                "{name} belongs to an extension that is not loaded: its value is not checked"
            )),
            None => {
                return Err(format!(
                    "postgresql.{name}: this PostgreSQL has no parameter of that name"
                ));
            }
        }
        if server.parameters.own().contains_key(name) {
            verdict.notes.push(format!(
                "{name} is also in this member's own [node.postgresql], which goes over the cluster's"
            ));
        }
    }
    would_start(server, changed).await?;
    Ok(verdict)
}

/// Which of these take effect only at a restart.
pub async fn waiting_for_restart(server: &LocalServer, names: &[String]) -> Vec<String> {
    if names.is_empty() {
        return Vec::new();
    }
    match server.control.parameters(names, QUERY_MAX).await {
        Ok(known) => known
            .into_iter()
            .filter(craton_pg::Parameter::needs_restart)
            .map(|p| p.name)
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "cannot tell what needs a restart");
            Vec::new()
        }
    }
}

/// What PostgreSQL checks only when it starts, and then does not start.
async fn would_start(
    server: &LocalServer,
    changed: &BTreeMap<String, String>,
) -> Result<(), String> {
    let tried = server.instance.try_parameters(changed).await;
    tried.map_err(|e| format!("PostgreSQL refuses it: {}", short(&e.to_string())))?;
    if let Some(libraries) = changed.get("shared_preload_libraries") {
        let missing = server.control.missing_libraries(libraries, QUERY_MAX).await;
        let missing = missing.map_err(|e| format!("PostgreSQL cannot be asked: {e}"))?;
        if let Some(library) = missing.first() {
            return Err(format!(
                "postgresql.shared_preload_libraries: there is no library {library} on this member; install its package on every member first"
            ));
        }
    }
    let both = [
        "max_connections".to_owned(),
        "superuser_reserved_connections".to_owned(),
    ];
    if both.iter().any(|name| changed.contains_key(name)) {
        let known = server.control.parameters(&both, QUERY_MAX).await;
        let known = known.map_err(|e| format!("PostgreSQL cannot be asked: {e}"))?;
        let next = |name: &str| {
            let now = known.iter().find(|p| p.name == name).map(|p| &p.setting);
            changed.get(name).or(now)?.parse::<u32>().ok()
        };
        if let (Some(all), Some(reserved)) = (
            next("max_connections"),
            next("superuser_reserved_connections"),
        ) && reserved >= all
        {
            return Err(format!(
                "postgresql.max_connections = {all} leaves none for users: superuser_reserved_connections is {reserved}"
            ));
        }
    }
    Ok(())
}

/// What PostgreSQL said, without its time and process id.
fn short(error: &str) -> &str {
    error
        .split_once("FATAL:")
        .map_or(error, |(_, why)| why.trim())
}

/// What would take away what Craton promises.
fn promises_kept(name: &str, value: &str, members: usize) -> Result<(), String> {
    let at_least = u32::try_from(members)
        .unwrap_or(u32::MAX)
        .saturating_add(OWN_SENDERS);
    match name {
        "max_wal_senders" | "max_replication_slots"
            if value.parse::<u32>().is_ok_and(|n| n < at_least) =>
        {
            Err(format!(
                "postgresql.{name} = {value} is too little: {members} members and backups need at least {at_least}"
            ))
        }
        "wal_level" if value.eq_ignore_ascii_case("minimal") => Err(
            "postgresql.wal_level = minimal lets no standby follow: use replica or logical".into(),
        ),
        "synchronous_commit" if weakens(name, value) => Err(format!(
            "postgresql.synchronous_commit = {value} would acknowledge commits that no standby has: set durability for the cluster, or synchronous_commit in a session that may lose its own"
        )),
        "client_min_messages" if weakens(name, value) => Err(format!(
            "postgresql.client_min_messages = {value} would hide from clients that the wait for the standbys was cancelled, and that the commit may be lost: use warning or less"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map<V: Clone>(pairs: &[(&str, V)]) -> BTreeMap<String, V> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.clone()))
            .collect()
    }

    #[test]
    fn a_standby_starts_with_at_least_what_its_primary_had() {
        let needs = map(&[("max_connections", 200), ("max_worker_processes", 8)]);
        let mut lower = map(&[("max_connections", "50".to_owned())]);
        assert!(raise_to(&mut lower, &needs));
        assert_eq!(lower, map(&[("max_connections", "200".to_owned())]));
        let mut unset = BTreeMap::new();
        assert!(raise_to(&mut unset, &needs));
        assert_eq!(unset, lower);
        let mut higher = map(&[("max_connections", "300".to_owned())]);
        assert!(!raise_to(&mut higher, &needs));
    }

    #[test]
    fn the_members_own_go_over_the_clusters() {
        let p = Parameters::new(map(&[
            ("shared_buffers", "64MB".to_owned()),
            ("Restart_after_crash", "on".to_owned()),
        ]));
        assert!(p.is_stale(), "nothing is written yet");
        p.set_cluster(map(&[
            ("shared_buffers", "1GB".to_owned()),
            ("work_mem", "8MB".to_owned()),
            ("port", "1".to_owned()),
        ]));
        let written = p.to_write();
        assert_eq!(
            written,
            map(&[
                ("shared_buffers", "64MB".to_owned()),
                ("work_mem", "8MB".to_owned())
            ])
        );
        assert!(!p.is_stale());
        p.set_cluster(map(&[("work_mem", "9MB".to_owned())]));
        assert!(p.is_stale());
        let _ = p.to_write();
        p.forget_written();
        assert!(p.is_stale());
    }

    #[test]
    fn promises_come_first() {
        for (name, value) in [
            ("max_wal_senders", "5"),
            ("max_replication_slots", "2"),
            ("wal_level", "minimal"),
            ("synchronous_commit", "local"),
            ("client_min_messages", "error"),
        ] {
            assert!(promises_kept(name, value, 3).is_err(), "{name} = {value}");
        }
        assert_eq!(promises_kept("max_wal_senders", "6", 3), Ok(()));
        for value in ["remote_apply", "on", "true"] {
            assert_eq!(promises_kept("synchronous_commit", value, 3), Ok(()));
        }
    }
}
