//! Rules broken on purpose: each must make the simulator find the harm it prevents.

use craton_core::Incarnation;
use craton_core::decide::Decision;
use craton_core::observe::{Observation, ServerView};
use craton_core::records::{Change, Record};
use craton_core::sync::SyncSet;

/// A broken rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// 3.1.3: an election is content with one seal too few.
    OneSealTooFew,
    /// 3.2: a member leaves V (or k is raised) in the coordinator without the wait for the others' flush.
    NoWait,
    /// 3.1.5: the old leader is left out of the new V.
    OldLeaderLeftOut,
    /// 3.2: a cloned or rewound data directory passes for the old one.
    IncarnationForgotten,
    /// 3.1.2: a sealed member goes on receiving from the old leader.
    SealKeepsStreaming,
    /// 2.5: nobody stops a primary whose agent hangs.
    NoFence,
    /// 2.3: a restarted voter does not wait for the promises it has forgotten.
    PromisesForgotten,
    /// 2.7: a standby's agent restarts and seals although a promise of its earlier life may run.
    StandbyPromiseForgotten,
    /// 2.7: the leader is content with one standby promise less than k.
    OnePromiseTooFew,
    /// 2.7: a member seals although its promise runs.
    SealDespitePromise,
    /// 3: the coordinator hears of `quorum` before PostgreSQL waits for anybody.
    ModeBeforePostgres,
    /// 3.1.2: a backup answers with its seal, and goes on receiving.
    ReceiverKeepsReceiving,
    /// 3: a backup reports WAL as flushed that is only written.
    ReceiverReportsWritten,
    /// 2.7: a leader goes on as if a backup had promised.
    ReceiverPromises,
    /// 3.1.4: who is to get the missing WAL says that it has it, and is promoted without.
    CatchUpClaimed,
}

impl Flaw {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::OneSealTooFew,
        Self::NoWait,
        Self::OldLeaderLeftOut,
        Self::IncarnationForgotten,
        Self::SealKeepsStreaming,
        Self::NoFence,
        Self::PromisesForgotten,
        Self::StandbyPromiseForgotten,
        Self::OnePromiseTooFew,
        Self::SealDespitePromise,
        Self::ModeBeforePostgres,
        Self::ReceiverKeepsReceiving,
        Self::ReceiverReportsWritten,
        Self::ReceiverPromises,
        Self::CatchUpClaimed,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneSealTooFew => "one-seal-too-few",
            Self::NoWait => "no-wait",
            Self::OldLeaderLeftOut => "old-leader-left-out",
            Self::IncarnationForgotten => "incarnation-forgotten",
            Self::SealKeepsStreaming => "seal-keeps-streaming",
            Self::NoFence => "no-fence",
            Self::PromisesForgotten => "promises-forgotten",
            Self::StandbyPromiseForgotten => "standby-promise-forgotten",
            Self::OnePromiseTooFew => "one-promise-too-few",
            Self::SealDespitePromise => "seal-despite-promise",
            Self::ModeBeforePostgres => "mode-before-postgres",
            Self::ReceiverKeepsReceiving => "receiver-keeps-receiving",
            Self::ReceiverReportsWritten => "receiver-reports-written",
            Self::ReceiverPromises => "receiver-promises",
            Self::CatchUpClaimed => "catch-up-claimed",
        }
    }

    /// What the decision sees, bent.
    pub fn bend(self, o: &mut Observation) {
        match self {
            Self::OneSealTooFew => {
                let election = o.view.as_mut().and_then(|v| v.leadership.as_mut());
                if let Some(l) = election.filter(|l| l.value.leader.is_none() && l.value.sync.k > 0)
                {
                    l.value.sync.k += 1;
                }
            }
            Self::NoWait => {
                if let ServerView::Running(s) = &mut o.server {
                    for standby in s.standbys.iter_mut().filter(|b| b.streaming) {
                        standby.flush_lsn = standby.flush_lsn.max(s.end);
                    }
                }
            }
            Self::SealDespitePromise => o.promises.held_until = None,
            Self::ModeBeforePostgres => mode_before_postgres(o),
            _ => {}
        }
    }

    /// What was decided, bent.
    pub fn spoil(self, o: &Observation, d: &mut Decision) {
        let before = o
            .view
            .as_ref()
            .and_then(|v| v.leadership.as_ref())
            .map(|l| &l.value);
        let Some(before) = before.filter(|l| l.leader.is_none()) else {
            return;
        };
        let each = |d: &mut Decision, f: &dyn Fn(&mut SyncSet)| {
            let changes: &mut Vec<Change> = &mut d.changes;
            for record in changes.iter_mut().flat_map(|c| c.puts.iter_mut()) {
                if let Record::Leadership(l) = record {
                    f(&mut l.sync);
                }
            }
        };
        match self {
            Self::OneSealTooFew => {
                each(d, &|set| set.k = set.k.min(before.sync.k.saturating_sub(1)));
            }
            Self::OldLeaderLeftOut => each(d, &|set| {
                if let Some(old) = &before.previous {
                    set.members.remove(&old.member);
                    let left = u32::try_from(set.members.len()).unwrap_or(u32::MAX);
                    set.k = set.k.min(left);
                }
            }),
            _ => {}
        }
    }

    /// The incarnation of a new life of a data directory.
    pub fn incarnation(flaw: Option<Self>, fresh: u64) -> Incarnation {
        Incarnation(if flaw == Some(Self::IncarnationForgotten) {
            1
        } else {
            fresh
        })
    }
}

/// PostgreSQL waits for nobody, and the decision thinks that it waits for everybody there is.
fn mode_before_postgres(o: &mut Observation) {
    let wish = o
        .view
        .as_ref()
        .map(craton_core::records::ClusterView::settings);
    let Some(wish) = wish.filter(|w| w.durability.keeps_commits()) else {
        return;
    };
    if let ServerView::Running(s) = &mut o.server
        && s.sync_configured.k == 0
        && !s.in_recovery
    {
        s.sync_configured.members = s
            .standbys
            .iter()
            .map(|b| (b.member.clone(), b.incarnation))
            .collect();
        let there = u32::try_from(s.sync_configured.members.len()).unwrap_or(u32::MAX);
        s.sync_configured.k = wish.sync_standbys.min(there);
        for standby in &mut s.standbys {
            standby.flush_lsn = standby.flush_lsn.max(s.end);
        }
    }
}
