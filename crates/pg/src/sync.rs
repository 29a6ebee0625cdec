//! `synchronous_standby_names`, and the proof that a change of it is in force.
//!
//! A reload is a signal: each process reads the files when it gets to it, and tells nobody. What decides
//! whether a client hears "committed" sits in three places (PostgreSQL 13 to 18, syncrep.c):
//!
//! 1. **The flag in shared memory**, `WalSndCtl->sync_standbys_defined` (18: `sync_standbys_status`).
//!    `SyncRepWaitForLSN` returns at once where it is off. Only the checkpointer sets it, at its start and
//!    when it reads the files (`SyncRepUpdateSyncStandbysDefined`).
//! 2. **Each WAL sender's priority**, in shared memory (`WalSnd.sync_standby_priority`), written by that WAL
//!    sender when it reads the files (`SyncRepInitConfig`), and shown as `sync_priority`. A sender with
//!    priority 0 never releases a commit (`SyncRepReleaseWaiters` leaves at once), nor counts for
//!    others (`SyncRepGetCandidateStandbys`).
//! 3. **Each WAL sender's own k**, in its private memory (`SyncRepConfig->num_sync`). It is shown nowhere.
//!
//! So the proof of a change goes like this.
//!
//! * **The postmaster has read the files** once a *new* session shows the new value: it was forked with the
//!   postmaster's memory. The postmaster reads first, then signals its children, then forks again; so from
//!   here on every older process has its signal and every newer one has the value. A sender that is in
//!   between (started before, not yet streaming) handles the signal at the top of `WalSndLoop`, before
//!   it can reach the state `streaming` that counts.
//! * **V with the same k** is in force when every sender that is not listed shows priority 0.
//!   A commit that was released just before has an LSN below the flush position read afterwards, which is
//!   what the wait in the failover protocol (3.2) uses.
//! * **Another k** cannot be seen, so it goes through [`SyncNames::Nobody`]: a name that nobody has. Once
//!   every sender shows 0, none of them releases anything whatever k it remembers; and a sender that shows 1
//!   after that has read the new list, and so the new k with it. Commits wait meanwhile (milliseconds),
//!   which is safe in both directions.
//! * **The flag** needs a proof only when the value was empty before, or is unknown: with `Nobody` set, a
//!   probe session commits with `synchronous_commit = on`; when it is seen to wait in `SyncRep`, the flag is
//!   on. Every later commit sees it, as it is read after the commit record is flushed. A standby
//!   cannot commit; there two `CHECKPOINT`s in a row show that the checkpointer went once round its loop
//!   (`CheckpointerMain` handles signals at its top). It costs a restartpoint, so members start as
//!   standbys with `Nobody`, and then a promotion needs neither.
//!
//! One hole is PostgreSQL's own: a server that starts *as a primary* accepts sessions about when the
//! checkpointer starts, and before the releases of May 2025 (13.21, 14.18, 15.13, 16.9, 17.5) a commit could
//! come before the flag. A standby's checkpointer has long run when it is promoted, so promotions are free of it.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::ManagedConfig;
use crate::control::{Control, cancel, one, run};
use crate::error::{PgError, Result};
use crate::instance::Instance;
use crate::postmaster::Postmaster;
use crate::sample::ReplicationRow;

/// A standby's name that no member can have (members' names carry `@`).
const NOBODY: &str = "craton_nobody";
/// How often a proof looks again.
const POLL: Duration = Duration::from_millis(3);

/// Who must have flushed a commit before a client hears of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum SyncNames {
    /// Nobody can acknowledge: every commit waits. The value of every standby and of every start, so that a
    /// promotion fails closed.
    #[default]
    Nobody,
    /// Commits do not wait.
    Off,
    /// Any `k` of these, by `application_name`.
    Any {
        /// How many, at least 1.
        k: u32,
        /// The names.
        names: Vec<String>,
    },
}

impl SyncNames {
    /// The setting's value. `Any` with no names, or k of 0, is `Nobody`: a caller's mistake fails closed.
    pub fn setting(&self) -> String {
        match self {
            Self::Off => String::new(),
            Self::Any { k, names } if *k > 0 && !names.is_empty() => {
                let quoted: Vec<String> = names
                    .iter()
                    .map(|n| format!("\"{}\"", n.replace('"', "\"\"")))
                    .collect();
                format!("ANY {k} ({})", quoted.join(", "))
            }
            Self::Any { .. } | Self::Nobody => format!("ANY 1 (\"{NOBODY}\")"),
        }
    }

    /// Reads back what [`Self::setting`] wrote; none for anything else.
    pub fn parse(setting: &str) -> Option<Self> {
        let setting = setting.trim();
        if setting.is_empty() {
            return Some(Self::Off);
        }
        let (k, list) = setting.strip_prefix("ANY ")?.split_once(" (")?;
        let names: Option<Vec<String>> = list
            .strip_suffix(')')?
            .split(", ")
            .map(|n| {
                Some(
                    n.strip_prefix('"')?
                        .strip_suffix('"')?
                        .replace("\"\"", "\""),
                )
            })
            .collect();
        let parsed = match names?.as_slice() {
            [one] if one == NOBODY => Self::Nobody,
            names => Self::Any {
                k: k.parse().ok()?,
                names: names.to_vec(),
            },
        };
        (parsed.setting() == setting).then_some(parsed)
    }

    /// What is still known when, with `self` proven, `next` was written and reloaded without a proof. From
    /// `Nobody` to a list: every process has either, so one that shows a priority has the list, and its k.
    /// From anything else: nothing.
    pub(crate) fn known_after_writing(&self, next: &Self) -> Option<Self> {
        let from_nobody = *self == Self::Nobody && matches!(next, Self::Any { .. });
        (self == next || from_nobody).then(|| next.clone())
    }

    /// k, where there is one.
    fn k(&self) -> Option<u32> {
        match self {
            Self::Any { k, .. } => Some(*k),
            Self::Nobody | Self::Off => None,
        }
    }

    /// PostgreSQL compares names without regard to case (`pg_strcasecmp`).
    fn lists(&self, application_name: &str) -> bool {
        match self {
            Self::Any { names, .. } => names
                .iter()
                .any(|n| n.eq_ignore_ascii_case(application_name)),
            Self::Nobody | Self::Off => false,
        }
    }

    /// What the WAL senders show once they have read this value. One that is listed and shows 0 releases
    /// nothing, which is safe; it is waited for only when it streams, because then it soon shows 1.
    fn agrees(&self, senders: &[ReplicationRow]) -> bool {
        senders.iter().all(|s| {
            if self.lists(&s.application_name) {
                s.sync_priority > 0 || s.state.as_deref() != Some("streaming")
            } else {
                s.sync_priority == 0
            }
        })
    }
}

/// What is known to be in force in one postmaster; nothing is known about another.
#[derive(Debug)]
pub(crate) struct Proven {
    pub pid: i32,
    pub start_ticks: u64,
    pub names: SyncNames,
}

impl Instance {
    /// Writes `managed`, reloads, and returns once `managed.sync` is proven to be in force; see the
    /// module's text for what that rests on. After an error nothing is known: call it again. A change of k,
    /// and the first call on a server that this process did not start, hold commits for some milliseconds.
    pub async fn enforce_sync(
        &self,
        postmaster: &Postmaster,
        control: &Control,
        managed: &ManagedConfig,
        limit: Duration,
    ) -> Result<()> {
        let end = Instant::now() + limit;
        let known = self.take_proven(postmaster);
        let proof = Proof {
            instance: self,
            postmaster,
            control,
            managed,
            end,
            limit,
        };
        if managed.sync == SyncNames::Off {
            // A commit that still waits a moment longer is no loss, so the senders are not asked.
            proof.set(&SyncNames::Off).await?;
        } else {
            let step = match &known {
                None | Some(SyncNames::Off) => Step::ThroughNobodyWithFlag,
                Some(SyncNames::Any { k, .. }) if managed.sync.k().is_some_and(|new| new != *k) => {
                    Step::ThroughNobody
                }
                Some(SyncNames::Any { .. } | SyncNames::Nobody) => Step::Direct,
            };
            if step != Step::Direct {
                proof.set(&SyncNames::Nobody).await?;
                proof.senders(&SyncNames::Nobody).await?;
            }
            if step == Step::ThroughNobodyWithFlag {
                proof.flag().await?;
            }
            proof.set(&managed.sync).await?;
            proof.senders(&managed.sync).await?;
        }
        self.set_proven(postmaster, managed.sync.clone());
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Direct,
    ThroughNobody,
    ThroughNobodyWithFlag,
}

/// One change under way.
struct Proof<'a> {
    instance: &'a Instance,
    postmaster: &'a Postmaster,
    control: &'a Control,
    managed: &'a ManagedConfig,
    end: Instant,
    limit: Duration,
}

impl Proof<'_> {
    /// What is left of the bound.
    fn left(&self) -> Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(PgError::Timeout {
                what: "proof that synchronous_standby_names is in force",
                limit: self.limit,
            });
        }
        Ok(left)
    }

    /// Writes and reloads, and waits until a new session shows the value.
    async fn set(&self, names: &SyncNames) -> Result<()> {
        let managed = ManagedConfig {
            sync: names.clone(),
            ..self.managed.clone()
        };
        self.instance.write_config(&managed).await?;
        self.postmaster.reload()?;
        while !self.control.new_session_shows(names, self.left()?).await? {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Waits until the WAL senders agree.
    async fn senders(&self, names: &SyncNames) -> Result<()> {
        while !names.agrees(&self.control.senders(self.left()?).await?) {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// With `Nobody` set: waits until the flag in shared memory is on.
    async fn flag(&self) -> Result<()> {
        let what = "role of the server";
        if self
            .control
            .query_one(what, "SELECT pg_is_in_recovery()", self.left()?)
            .await?
            == "t"
        {
            self.control.checkpoint(self.left()?).await?;
            return self.control.checkpoint(self.left()?).await;
        }
        while !self.probe().await? {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// One commit that only an unset flag lets through. True if it was seen to wait.
    async fn probe(&self) -> Result<bool> {
        let what = "probe of synchronous replication";
        let client = self.control.session(None, self.left()?).await?;
        let pid = one(what, run(&client, what, "SELECT pg_backend_pid()").await?)?;
        // A message that is part of a transaction gives it an id, and so a commit record to wait for.
        let commit = run(
            &client,
            what,
            "SET default_transaction_read_only = off; SET synchronous_commit = on; \
             SELECT pg_logical_emit_message(true, 'craton', 'probe')",
        );
        let waits = async {
            let sql =
                format!("SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = {pid}");
            while self.control.query_one(what, &sql, self.left()?).await? != "SyncRep" {
                tokio::time::sleep(POLL).await;
            }
            Ok(true)
        };
        let seen = tokio::select! {
            done = commit => done.map(|_| false),
            waiting = waits => waiting,
        };
        cancel(&client);
        seen
    }
}

impl Control {
    /// True if a session that starts now shows this value.
    async fn new_session_shows(&self, names: &SyncNames, limit: Duration) -> Result<bool> {
        let what = "synchronous_standby_names of a new session";
        let sql = "SELECT current_setting('synchronous_standby_names')";
        let rows = self.query_apart(what, None, sql, limit).await?;
        Ok(one(what, rows)? == names.setting())
    }

    /// The WAL senders, as far as the proof needs them.
    async fn senders(&self, limit: Duration) -> Result<Vec<ReplicationRow>> {
        Ok(self.sample(limit).await?.replication)
    }

    /// One look at whether a change of V *with the same k* is in force; the module's text says why that is
    /// all one look can show. [`Instance::enforce_sync`] is the whole proof.
    pub async fn sync_in_force(&self, names: &SyncNames, limit: Duration) -> Result<bool> {
        // The order matters: senders that started after the session have the value from birth.
        Ok(
            self.new_session_shows(names, limit).await?
                && names.agrees(&self.senders(limit).await?),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(k: u32, names: &[&str]) -> SyncNames {
        SyncNames::Any {
            k,
            names: names.iter().map(|n| (*n).to_owned()).collect(),
        }
    }

    fn sender(name: &str, state: &str, sync_priority: i32) -> ReplicationRow {
        ReplicationRow {
            pid: 1,
            application_name: name.into(),
            state: Some(state.into()),
            sent_lsn: None,
            write_lsn: None,
            flush_lsn: None,
            replay_lsn: None,
            sync_priority,
            sync_state: None,
            reply_age_us: None,
        }
    }

    #[test]
    fn settings_read_back_and_mistakes_fail_closed() {
        for names in [
            SyncNames::Off,
            SyncNames::Nobody,
            any(2, &["a@1", "b@2", "q\"x"]),
        ] {
            assert_eq!(SyncNames::parse(&names.setting()), Some(names));
        }
        assert_eq!(any(0, &["a"]).setting(), SyncNames::Nobody.setting());
        assert_eq!(any(1, &[]).setting(), SyncNames::Nobody.setting());
        for foreign in [
            "*",
            "FIRST 1 (\"a\")",
            "ANY x (\"a\")",
            "ANY 1 (a)",
            "ANY 1 (\"a\"",
        ] {
            assert_eq!(SyncNames::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn an_unproven_write_leaves_no_false_knowledge() {
        let after = |from: &SyncNames, to: &SyncNames| from.known_after_writing(to);
        let (one, two) = (any(1, &["a"]), any(2, &["a", "b"]));
        assert_eq!(after(&SyncNames::Nobody, &one), Some(one.clone()));
        assert_eq!(after(&one, &one), Some(one.clone()));
        // A sender that shows priority 1 now may still have the old k.
        assert_eq!(after(&one, &two), None);
        assert_eq!(after(&one, &SyncNames::Nobody), None);
        assert_eq!(after(&SyncNames::Nobody, &SyncNames::Off), None);
        assert_eq!(after(&SyncNames::Off, &one), None);
    }

    #[test]
    fn a_sender_that_has_not_read_the_list_is_seen() {
        let v = any(1, &["a@1", "b@2"]);
        let row = sender;
        assert!(v.agrees(&[row("A@1", "streaming", 1), row("c@3", "streaming", 0)]));
        assert!(
            !v.agrees(&[row("a@1", "streaming", 1), row("c@3", "streaming", 1)]),
            "c was removed"
        );
        assert!(!v.agrees(&[row("a@1", "streaming", 0)]), "a was added");
        assert!(v.agrees(&[row("a@1", "catchup", 0)]));
        assert!(!SyncNames::Nobody.agrees(&[row("a@1", "catchup", 1)]));
    }
}
