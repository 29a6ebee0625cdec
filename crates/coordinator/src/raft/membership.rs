//! Who takes part, and how that changes while the cluster runs.
//!
//! The configuration is an entry of the log like any other (Ongaro's thesis 2014, chapter 4). What keeps two
//! majorities from deciding apart:
//!
//! * **One voter at a time.** A configuration differs from the one before it by at most one voter, so that any
//!   majority of one and any majority of the other share a voter (4.1).
//! * **In force once it is in the log**, committed or not, on every node, the leader first (4.1). If the entry
//!   is replaced by another leader's, the one before it is in force again.
//! * **One change after the other.** The next is proposed only when the one before is committed, and only by a
//!   leader that has committed an entry of its own term: otherwise two leaders could each add a voter to the
//!   same old configuration, and those two need not share a majority (the flaw of 2015 in the original
//!   text). A lost disk that is readmitted ([`super::standing`]) counts as such a change.
//! * **Learners first** (4.2.1): a member gets entries, but no say, until it has caught up. A learner's
//!   birth is written into the configuration that makes it a voter, so a disk that was lost on the way has
//!   none.
//! * **A leader may remove itself** (4.2.2): it leads on until that is committed, without counting itself, and
//!   campaigns until then: its log may be the only one that is long enough.
//! * **Who was removed does not disturb** (4.2.3): it lacks the entry that removed it, so nobody that has it
//!   grants even a pre-vote, and voters that hear a leader ignore candidates.
//! * **Whose word counts is for the one who counts to say** (4.2.2), by its own configuration. A node whose disk
//!   is whole grants votes whether or not it is in its own: its admission may be in the candidate's log only.
//!   It counts if it knows itself to be a voter, or if the configuration names the very birth of its disk.
//!   Likewise nobody is ignored for not being known yet; every node says where it can be reached.

use std::collections::{BTreeMap, BTreeSet};

use craton_core::MemberId;
use serde::{Deserialize, Serialize};

use super::message::{Birth, Births, Entry, Image, Index, Payload, RaftTerm, Standing};
use super::node::{NotNow, Progress, Raft, Role};

/// Removed members that are remembered; beyond it the first by name are forgotten, and told less exactly why
/// nobody listens to them.
pub const REMOVED_MAX: usize = 64;

/// Members that a configuration may have.
pub const MEMBERS_MAX: usize = 32;

/// Who takes part.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Configuration {
    /// Grows by one with every change of the set of voters.
    pub epoch: u64,
    /// Who has a say, each under the birth of its disk.
    pub voters: Births,
    /// The voters of the epoch before: the lease asks them, see [`crate::promise`].
    #[serde(default)]
    pub previous: BTreeSet<MemberId>,
    /// Who gets entries and has no say.
    #[serde(default)]
    pub learners: BTreeSet<MemberId>,
    /// Where members' coordinators listen, `host:port`, as far as the log says it; the settings file says
    /// the rest.
    #[serde(default)]
    pub addresses: BTreeMap<MemberId, String>,
    /// Who was removed, and not taken in again.
    #[serde(default)]
    pub removed: BTreeSet<MemberId>,
}

/// A change of the members.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Take a member in, without a say; or note its new address.
    Admit {
        /// Who.
        member: MemberId,
        /// Where its coordinator listens, `host:port`.
        address: String,
    },
    /// Make a member that has caught up a voter.
    Promote {
        /// Who.
        member: MemberId,
        /// Only while there are fewer voters than this. The leader decides it, whose count is never old: members
        /// that join at one moment would all find room for one more.
        #[serde(default)]
        below: Option<usize>,
    },
    /// Take a voter's say away; it stays a member.
    Demote {
        /// Who.
        member: MemberId,
    },
    /// Take a member out.
    Remove {
        /// Who.
        member: MemberId,
    },
}

/// Why a change is not made. Nothing was done.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChangeRefused {
    /// This node does not lead, or too much is under way.
    #[error("this node does not lead")]
    NotNow(NotNow),
    /// An earlier change, or the leader's first entry, is not committed yet.
    #[error("an earlier change is not committed yet")]
    Pending,
    /// The configuration says so already.
    #[error("it is so already")]
    Nothing,
    /// There is no such member.
    #[error("there is no member {0}")]
    Unknown(MemberId),
    /// The member to be promoted is not there, or lacks entries.
    #[error("{0} has not caught up yet")]
    Behind(MemberId),
    /// There are as many voters as were asked for.
    #[error("there are {0} voters, and that is enough")]
    Enough(usize),
    /// Nobody would be left who has a say.
    #[error("{0} is the last voter")]
    LastVoter(MemberId),
    /// [`MEMBERS_MAX`] is reached.
    #[error("there are {MEMBERS_MAX} members already")]
    Full,
    /// Of the voters that there would be, too few answer: the cluster would stop until they do.
    #[error("of the {0} voters that there would be, too few answer now")]
    TooFew(usize),
}

impl Image {
    /// Who takes part at the image's end.
    pub fn configuration(&self) -> Configuration {
        self.config
            .clone()
            .unwrap_or_else(|| Configuration::begun(self.births.clone()))
    }
}

impl Configuration {
    /// What a cluster begins with.
    pub fn begun(voters: Births) -> Self {
        Self {
            voters,
            ..Self::default()
        }
    }

    /// True for voters and learners.
    pub fn holds(&self, member: &MemberId) -> bool {
        self.voters.contains_key(member) || self.learners.contains(member)
    }

    /// Voters and learners.
    pub fn members(&self) -> impl Iterator<Item = &MemberId> {
        self.voters.keys().chain(&self.learners)
    }

    /// Whether what a member says counts: it is a voter here, and knows itself to be one, or is named by the
    /// birth of its disk.
    pub(super) fn counts(&self, member: &MemberId, birth: Birth, knows: bool) -> bool {
        let named = self.voters.get(member);
        named.is_some_and(|b| knows || *b == birth)
    }

    /// How many voters are a majority.
    pub fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// The configuration after a change; `birth` is that of the disk of the member to be promoted.
    fn after(&self, change: &Change, birth: Birth) -> Result<Self, ChangeRefused> {
        let mut next = self.clone();
        match change {
            Change::Admit { member, address } => {
                let known = self.addresses.get(member) == Some(address);
                if self.holds(member) && known {
                    return Err(ChangeRefused::Nothing);
                }
                if !self.holds(member) {
                    if self.members().count() >= MEMBERS_MAX {
                        return Err(ChangeRefused::Full);
                    }
                    next.learners.insert(member.clone());
                }
                next.removed.remove(member);
                next.addresses.insert(member.clone(), address.clone());
            }
            Change::Promote { member, below } => {
                if self.voters.contains_key(member) {
                    return Err(ChangeRefused::Nothing);
                }
                if below.is_some_and(|enough| self.voters.len() >= enough) {
                    return Err(ChangeRefused::Enough(self.voters.len()));
                }
                if !next.learners.remove(member) {
                    return Err(ChangeRefused::Unknown(member.clone()));
                }
                next.voters.insert(member.clone(), birth);
            }
            Change::Demote { member } => {
                if self.learners.contains(member) {
                    return Err(ChangeRefused::Nothing);
                }
                if next.voters.remove(member).is_none() {
                    return Err(ChangeRefused::Unknown(member.clone()));
                }
                next.learners.insert(member.clone());
            }
            Change::Remove { member } => {
                if !self.holds(member) {
                    return Err(if self.removed.contains(member) {
                        ChangeRefused::Nothing
                    } else {
                        ChangeRefused::Unknown(member.clone())
                    });
                }
                next.voters.remove(member);
                next.learners.remove(member);
                next.addresses.remove(member);
                next.removed.insert(member.clone());
                while next.removed.len() > REMOVED_MAX {
                    next.removed.pop_first();
                }
            }
        }
        if next.voters.is_empty() {
            let (Change::Admit { member, .. }
            | Change::Promote { member, .. }
            | Change::Demote { member }
            | Change::Remove { member }) = change;
            return Err(ChangeRefused::LastVoter(member.clone()));
        }
        if !next.voters.keys().eq(self.voters.keys()) {
            next.epoch += 1;
            next.previous = self.voters.keys().cloned().collect();
        }
        Ok(next)
    }

    /// For tests: several changes in one step, and no questions asked.
    #[cfg(test)]
    pub(super) fn flawed(
        &self,
        changes: &[&Change],
        births: &Births,
    ) -> Result<Self, ChangeRefused> {
        let mut next = self.clone();
        for change in changes {
            let birth = match change {
                Change::Promote { member, .. } => births.get(member).copied().unwrap_or(0),
                _ => 0,
            };
            next = next.after(change, birth)?;
        }
        Ok(next)
    }
}

impl Raft {
    /// Proposes a change of the members, one at a time. It is made once the entry at this index comes out of
    /// `ready().committed` with this term.
    pub fn change(
        &mut self,
        now: craton_core::BootTime,
        change: &Change,
    ) -> Result<(RaftTerm, Index), ChangeRefused> {
        self.now = self.now.max(now);
        let Role::Leader(leading) = &self.role else {
            let leader = self.leader.clone();
            return Err(ChangeRefused::NotNow(NotNow::NotLeader(leader)));
        };
        if self.fault.is_some() || self.choked() {
            return Err(ChangeRefused::NotNow(NotNow::Busy));
        }
        if self.applied < leading.first_index || self.change_pending() {
            return Err(ChangeRefused::Pending);
        }
        let mut birth = 0;
        if let Change::Promote { member, .. } = change
            && self.latest.learners.contains(member)
        {
            let patience = self.config.timings.election_timeout;
            let ready = leading.peers.get(member).filter(|p| {
                p.matched >= self.commit && p.heard.is_some_and(|t| self.now <= t.after(patience))
            });
            birth = ready.map_or(0, |p| p.birth);
            if birth == 0 {
                return Err(ChangeRefused::Behind(member.clone()));
            }
        }
        let mut next = self.latest.after(change, birth)?;
        // Whoever joins has no settings file that says where the first ones are.
        for (member, address) in &self.config.addresses {
            if next.holds(member) && !next.addresses.contains_key(member) {
                next.addresses.insert(member.clone(), address.clone());
            }
        }
        self.would_go_on(&next)?;
        let index = self.append_own(Payload::Configure(next));
        Ok((self.hard.term, index))
    }

    /// A majority of the voters that there would be answers, and has its disk.
    fn would_go_on(&self, next: &Configuration) -> Result<(), ChangeRefused> {
        let Role::Leader(leading) = &self.role else {
            return Ok(());
        };
        let patience = self.config.timings.election_timeout;
        let answers = |voter: &&MemberId| {
            let p = leading.peers.get(*voter);
            **voter == self.config.me
                || p.is_some_and(|p| {
                    let lately = p.heard.is_some_and(|t| self.now <= t.after(patience));
                    lately && next.counts(voter, p.birth, p.voter)
                })
        };
        if next.voters.keys().filter(answers).count() < next.majority() {
            return Err(ChangeRefused::TooFew(next.voters.len()));
        }
        Ok(())
    }

    /// A change of who has a say is in the log and not known to be committed.
    pub(super) fn change_pending(&self) -> bool {
        (self.applied + 1..=self.log.last_index())
            .filter_map(|i| self.log.entry(i))
            .any(|e| matches!(e.payload, Payload::Configure(_) | Payload::Readmit { .. }))
    }

    /// Puts an entry at the log's end; a configuration is in force from here on.
    pub(super) fn push(&mut self, entry: Entry) {
        if let Payload::Configure(config) = &entry.payload {
            self.latest = config.clone();
            self.latest_index = entry.index;
            self.follow_members();
        }
        self.log.push(entry);
    }

    /// The log's end is another than before: what is in force there?
    pub(super) fn read_latest(&mut self) {
        let newest = self.log.last_configuration();
        (self.latest_index, self.latest) = match newest {
            Some((index, config)) if index > self.applied => (index, config.clone()),
            // Applied: what was readmitted since is in the settled one.
            _ => (0, self.settled.clone()),
        };
        self.follow_members();
    }

    /// Keeps the leader's list of those it sends to in step with the configuration.
    fn follow_members(&mut self) {
        let (me, last) = (&self.config.me, self.log.last_index());
        let Role::Leader(leading) = &mut self.role else {
            return;
        };
        leading.peers.retain(|peer, _| self.latest.holds(peer));
        for peer in self.latest.members().filter(|m| *m != me) {
            let birth = self.latest.voters.get(peer).copied().unwrap_or(0);
            leading
                .peers
                .entry(peer.clone())
                .or_insert_with(|| Progress::new(last + 1, birth));
        }
    }

    pub(super) fn configuration_committed(&mut self, config: Configuration) {
        self.settled = config;
        self.births_changed();
        let leads_on = self.latest.voters.contains_key(&self.config.me);
        if self.is_leader() && !leads_on {
            // Thesis 4.2.2: it has seen its own removal through.
            self.become_follower(self.hard.term, None);
        }
    }

    /// Nothing that this disk ever acknowledged or voted is forgotten.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self.hard.standing, Standing::Voter | Standing::Learner)
    }

    /// Whether this node is a voter by what its log says.
    pub(super) fn has_say(&self) -> bool {
        self.speaks_in(&self.latest)
    }

    /// Whether this node may campaign. One that is being removed may, until that is committed (thesis 4.2.2):
    /// it can be the only one whose log is long enough. It does not count its own vote.
    pub(super) fn may_campaign(&self) -> bool {
        self.speaks_in(&self.latest) || self.speaks_in(&self.settled)
    }

    fn speaks_in(&self, config: &Configuration) -> bool {
        let named = config.voters.get(&self.config.me);
        match self.hard.standing {
            Standing::Voter => named.is_some(),
            Standing::Learner => named == Some(&self.hard.birth),
            Standing::Fresh | Standing::Recovering => false,
        }
    }

    /// The standing as it works out: a voter that the configuration does not name is none.
    pub(super) fn shown_standing(&self) -> Standing {
        match self.hard.standing {
            Standing::Voter | Standing::Learner if self.has_say() => Standing::Voter,
            Standing::Voter => Standing::Learner,
            other => other,
        }
    }

    /// To whom this node speaks: all members but itself; before they are known, whom it was told to ask.
    pub(super) fn peers(&self) -> Vec<MemberId> {
        let asked: Vec<&MemberId> = if self.latest.voters.is_empty() {
            self.config.voters.iter().collect()
        } else {
            self.latest.members().collect()
        };
        let others = asked.into_iter().filter(|m| **m != self.config.me);
        others.cloned().collect()
    }
}
