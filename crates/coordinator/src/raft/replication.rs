//! Entries, heartbeats, images, and what is committed.

use std::time::Duration;

use craton_core::MemberId;

use super::durable::Write;
use super::message::{Body, Entry, Image, Index, Payload, RaftTerm};
use super::node::{NotNow, Peer, Progress, READS_MAX, Raft, Role};

impl Raft {
    // ---- leader ----

    pub(super) fn append_own(&mut self, payload: Payload) -> Index {
        let entry = Entry {
            index: self.log.last_index() + 1,
            term: self.hard.term,
            payload,
        };
        let index = entry.index;
        self.push(entry.clone());
        self.write(Write::Append(vec![entry]));
        for peer in self.peers() {
            self.send_entries(&peer);
        }
        self.own_entries_after_write();
        index
    }

    pub(super) fn own_entries_written(&mut self, index: Index) {
        if let Role::Leader(leading) = &mut self.role {
            leading.own_matched = leading.own_matched.max(index);
            self.advance_commit();
        }
    }

    /// Sends what the peer lacks: entries if the log still has them, else the image.
    fn send_entries(&mut self, to: &MemberId) {
        let (now, heartbeat) = (self.now, self.config.timings.heartbeat);
        let commit = self.commit;
        let Role::Leader(leading) = &mut self.role else {
            return;
        };
        let Some(p) = leading.peers.get_mut(to) else {
            return;
        };
        let prev_index = p.next.saturating_sub(1);
        let body = if let Some(prev_term) = self.log.term(prev_index) {
            let entries = self.log.from(p.next);
            p.next += entries.len() as u64;
            Body::Append {
                prev_index,
                prev_term,
                entries,
                commit,
            }
        } else {
            if p.image_sent.is_some_and(|t| now < t.after(heartbeat)) {
                return;
            }
            p.image_sent = Some(now);
            Body::Snapshot {
                image: self.log.image().clone(),
            }
        };
        self.send(to.clone(), body);
    }

    pub(super) fn broadcast_heartbeat(&mut self) {
        self.heartbeat_due = self.now.after(self.config.timings.heartbeat);
        let Role::Leader(leading) = &self.role else {
            return;
        };
        let (round, commit) = (leading.round, self.commit);
        let heartbeats: Vec<_> = leading
            .peers
            .iter()
            .map(|(peer, p)| {
                (
                    peer.clone(),
                    Body::Heartbeat {
                        commit: commit.min(p.matched),
                        round,
                    },
                )
            })
            .collect();
        for (peer, body) in heartbeats {
            self.send(peer, body);
        }
    }

    /// A sign of life from a peer; its progress, begun anew when it has another birth than before.
    fn progress(&mut self, peer: &Peer) -> Option<&mut Progress> {
        let (now, last) = (self.now, self.log.last_index());
        let Role::Leader(leading) = &mut self.role else {
            return None;
        };
        let p = leading.peers.get_mut(&peer.from)?;
        if p.birth != peer.birth {
            *p = Progress::new(last + 1, peer.birth);
        }
        p.heard = Some(now);
        p.voter = peer.voter;
        Some(p)
    }

    pub(super) fn on_appended(&mut self, peer: &Peer, matched: Index) {
        let last = self.log.last_index();
        if matched > last {
            // Only a message from another history can say so.
            return;
        }
        let Some(p) = self.progress(peer) else {
            return;
        };
        p.matched = p.matched.max(matched);
        p.next = p.next.max(p.matched + 1);
        let more = p.next <= last;
        self.readmit_if_due(&peer.from, peer.birth);
        self.advance_commit();
        if more {
            self.send_entries(&peer.from);
        }
    }

    pub(super) fn on_conflict(
        &mut self,
        peer: &Peer,
        prev_index: Index,
        hint_index: Index,
        hint_term: RaftTerm,
    ) {
        // Thesis 5.3 (fast backup): skip the whole term that the follower has and this log has not.
        let guess = if hint_term == 0 {
            hint_index
        } else {
            self.log.last_index_of_term(hint_term).min(hint_index) + 1
        };
        let Some(p) = self.progress(peer) else {
            return;
        };
        if prev_index <= p.matched {
            return;
        }
        p.next = guess.min(prev_index).max(p.matched + 1);
        self.send_entries(&peer.from);
    }

    pub(super) fn on_heartbeat_reply(&mut self, peer: &Peer, round: u64, verified: Index) {
        let last = self.log.last_index();
        let Some(p) = self.progress(peer) else {
            return;
        };
        p.round = p.round.max(round);
        // Something sent may have been lost, or the peer started anew; what arrives twice does no harm.
        let agreed = p.matched.min(verified);
        if agreed < last {
            p.next = agreed + 1;
            self.send_entries(&peer.from);
        }
        self.readmit_if_due(&peer.from, peer.birth);
        // It may have become a voter since it acknowledged.
        self.advance_commit();
        self.confirm_reads();
    }

    /// Commits what a majority has on disk, if its last entry is of this term (paper, figure 8).
    pub(super) fn advance_commit(&mut self) {
        let majority = self.majority();

        let Role::Leader(leading) = &self.role else {
            return;
        };
        let counted = |voter: &MemberId| {
            if *voter == self.config.me {
                return leading.own_matched;
            }
            let p = leading.peers.get(voter);
            let p = p.filter(|p| self.latest.counts(voter, p.birth, p.voter));
            p.map_or(0, |p| p.matched)
        };
        let mut matched: Vec<Index> = self.latest.voters.keys().map(counted).collect();
        matched.sort_unstable_by(|a, b| b.cmp(a));
        let Some(&index) = matched.get(majority - 1) else {
            return;
        };
        if index <= self.commit || self.log.term(index) != Some(self.hard.term) {
            return;
        }
        self.commit = index;
        // At once, not with the next heartbeat: followers' watchers wait for it.
        self.broadcast_heartbeat();
        self.confirm_reads();
    }

    /// A linearizable read: its id comes back in `ready().reads`.
    pub fn read(&mut self, now: craton_core::BootTime, id: u64) -> Result<(), NotNow> {
        self.now = self.now.max(now);
        let commit = self.commit;
        let leader = self.leader.clone();
        let Role::Leader(leading) = &mut self.role else {
            return Err(NotNow::NotLeader(leader));
        };
        if leading.reads.len() >= READS_MAX {
            return Err(NotNow::Busy);
        }
        leading.round += 1;
        leading.reads.push_back((leading.round, id, commit));
        self.broadcast_heartbeat();
        self.confirm_reads();
        Ok(())
    }

    fn confirm_reads(&mut self) {
        let majority = self.majority();

        let commit = self.commit;
        let Role::Leader(leading) = &mut self.role else {
            return;
        };
        // Until its first entry is committed, a leader does not know what is (thesis 6.4).
        if commit < leading.first_index {
            return;
        }
        let first_index = leading.first_index;
        let round = |voter: &MemberId| {
            if *voter == self.config.me {
                return u64::MAX;
            }
            let p = leading.peers.get(voter);
            let p = p.filter(|p| self.latest.counts(voter, p.birth, p.voter));
            p.map_or(0, |p| p.round)
        };
        let mut rounds: Vec<u64> = self.latest.voters.keys().map(round).collect();
        rounds.sort_unstable_by(|a, b| b.cmp(a));
        let Some(&confirmed) = rounds.get(majority - 1) else {
            return;
        };
        while leading
            .reads
            .front()
            .is_some_and(|(round, _, _)| *round <= confirmed)
        {
            if let Some((_, id, index)) = leading.reads.pop_front() {
                self.ready.reads.push((id, Some(index.max(first_index))));
            }
        }
    }

    // ---- follower ----

    fn reply_to_leader(&mut self, body: Body, after_write: bool) {
        let Some(leader) = self.leader.clone() else {
            return;
        };
        if after_write {
            self.send_after_write(leader, body);
        } else {
            self.send(leader, body);
        }
    }

    pub(super) fn on_append(
        &mut self,
        prev_index: Index,
        prev_term: RaftTerm,
        entries: Vec<Entry>,
        commit: Index,
    ) {
        // Without knowing the births at the log's beginning, those at its end could not be known either.
        if self.fault.is_some() || self.choked() || self.settled.voters.is_empty() {
            return;
        }
        let consecutive = entries
            .iter()
            .zip(prev_index + 1..)
            .all(|(e, i)| e.index == i && e.term <= self.hard.term);
        if !consecutive {
            return;
        }
        if prev_index >= self.log.base() && self.log.term(prev_index) != Some(prev_term) {
            let here = prev_index.min(self.log.last_index() + 1);
            let hint_index = self.log.first_index_of_run(here);
            let hint_term = self.log.term(here).unwrap_or(0);
            self.reply_to_leader(
                Body::Conflict {
                    prev_index,
                    hint_index,
                    hint_term,
                },
                false,
            );
            return;
        }
        // What lies in the image is committed, hence the same.
        let matched = prev_index + entries.len() as u64;
        let is_new =
            |e: &Entry| e.index > self.log.base() && self.log.term(e.index) != Some(e.term);
        let new: Vec<Entry> = match entries.iter().position(is_new) {
            Some(at) => entries.into_iter().skip(at).collect(),
            None => Vec::new(),
        };
        if let Some(first) = new.first().map(|e| e.index) {
            if first <= self.commit {
                self.fail(format!(
                    "the leader replaces entry {first}, which is committed through {}",
                    self.commit
                ));
                return;
            }
            self.log.truncate_from(first);
            if first <= self.latest_index {
                self.read_latest();
            }
            for entry in &new {
                self.push(entry.clone());
            }
            self.write(Write::Append(new));
        }
        self.verified = self.verified.max(matched);
        self.commit = self.commit.max(commit.min(self.verified));
        self.reply_to_leader(
            Body::Appended {
                matched: matched.max(self.log.base()),
            },
            true,
        );
    }

    pub(super) fn on_heartbeat(&mut self, commit: Index, round: u64) {
        // What the leader believes this log to hold may be what it held before a disk was lost.
        self.commit = self.commit.max(commit.min(self.verified));

        let verified = self.verified.max(self.commit);
        self.reply_to_leader(Body::HeartbeatReply { round, verified }, false);
    }

    pub(super) fn on_snapshot(&mut self, image: Image) {
        if image.last_index > self.commit {
            if self.choked() {
                return;
            }
            self.settled = image.configuration();
            self.verified = self.verified.max(image.last_index);
            self.commit = image.last_index;
            self.applied = image.last_index;
            self.ready.committed.clear();
            self.ready.install = Some(image.clone());
            self.log.install(image.clone());
            self.read_latest();
            self.write(Write::Snapshot(image));
            self.births_changed();
        }
        self.reply_to_leader(
            Body::Appended {
                matched: self.commit.min(self.log.last_index()),
            },
            true,
        );
    }

    /// How long a leader may go unheard before it counts as gone.
    pub fn election_timeout(&self) -> Duration {
        self.config.timings.election_timeout
    }
}
