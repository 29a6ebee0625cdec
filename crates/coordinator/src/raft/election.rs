//! Terms, votes, and who leads.

use std::collections::BTreeSet;

use craton_core::MemberId;

use super::message::{Birth, Body, Index, Message, Payload, RaftTerm};
use super::node::{Leading, Peer, Progress, Raft, Role};

impl Raft {
    /// Takes over a higher term, answers a lower one. False when the message is to be ignored.
    pub(super) fn observe_term(&mut self, message: &Message) -> bool {
        let ahead = message.term > self.hard.term;
        match &message.body {
            // A would-be term is nobody's term yet.
            Body::PreVote { .. } | Body::PreVoteReply { granted: true } => true,
            // Thesis 4.2.3: who hears a leader helps nobody to depose it.
            Body::Vote { .. } if ahead && self.hears_leader() => false,
            _ if ahead => {
                self.become_follower(message.term, None);
                true
            }
            _ if message.term == self.hard.term => true,
            Body::Append { .. } | Body::Heartbeat { .. } | Body::Snapshot { .. } => {
                // A leader of the past: this makes it step down.
                self.send(
                    message.from.clone(),
                    Body::HeartbeatReply {
                        round: 0,
                        verified: 0,
                    },
                );
                false
            }
            Body::Vote { .. } => {
                self.send(
                    message.from.clone(),
                    Body::VoteReply {
                        granted: false,
                        candidate: message.birth,
                    },
                );
                false
            }
            _ => false,
        }
    }

    fn hears_leader(&self) -> bool {
        if self.is_leader() {
            return true;
        }
        let patience = self.config.timings.election_timeout;
        self.leader.is_some()
            && self
                .leader_heard
                .is_some_and(|t| self.now < t.after(patience))
    }

    pub(super) fn become_follower(&mut self, term: RaftTerm, leader: Option<MemberId>) {
        if let Role::Leader(leading) = &mut self.role {
            let lost = std::mem::take(&mut leading.reads);
            self.ready
                .reads
                .extend(lost.into_iter().map(|(_, id, _)| (id, None)));
        }
        if !matches!(self.role, Role::Follower) {
            self.reset_election_timer();
        }
        self.role = Role::Follower;
        if self.leader != leader {
            self.verified = self.log.base();
        }
        self.leader = leader;

        if term > self.hard.term {
            self.hard.term = term;
            self.hard.vote = None;
            self.write_hard();
        }
    }

    /// The sender leads in the current term.
    pub(super) fn follow(&mut self, leader: MemberId) {
        if self.is_leader() {
            self.fail(format!("{leader} also leads in term {}", self.hard.term));
            return;
        }
        if !matches!(self.role, Role::Follower) || self.leader.as_ref() != Some(&leader) {
            self.become_follower(self.hard.term, Some(leader.clone()));
        }
        if self.hard.vote.is_none() {
            // A node that lost its disk may have voted for this very leader: it must not vote for another.
            self.hard.vote = Some(leader);
            self.write_hard();
        }
        self.leader_heard = Some(self.now);
        self.reset_election_timer();
    }

    pub(super) fn pre_campaign(&mut self) {
        self.leader = None;
        let own = self.has_say().then(|| self.config.me.clone());
        let votes = BTreeSet::from_iter(own);
        let enough = votes.len() >= self.majority();
        self.role = Role::PreCandidate(votes);
        let (last_index, last_term) = (self.log.last_index(), self.log.last_term());
        for peer in self.peers() {
            let mut message = self.message(
                peer,
                Body::PreVote {
                    last_index,
                    last_term,
                },
            );
            message.term += 1;
            self.ready.messages.push(message);
        }
        if enough {
            self.campaign();
        }
    }

    fn campaign(&mut self) {
        self.elections += 1;
        self.hard.term += 1;
        self.hard.vote = Some(self.config.me.clone());
        self.leader = None;
        self.role = Role::Candidate(BTreeSet::new());
        self.reset_election_timer();
        self.write_hard();
        // Not before the vote for itself is on disk: a candidate that forgot this campaign could take
        // up the answers to it in another campaign of the same term, with another log.
        let (last_index, last_term) = (self.log.last_index(), self.log.last_term());
        for peer in self.peers() {
            self.send_after_write(
                peer,
                Body::Vote {
                    last_index,
                    last_term,
                },
            );
        }
        self.own_vote_after_write();
    }

    fn up_to_date(&self, last_index: Index, last_term: RaftTerm) -> bool {
        (last_term, last_index) >= (self.log.last_term(), self.log.last_index())
    }

    pub(super) fn on_pre_vote(
        &mut self,
        from: MemberId,
        term: RaftTerm,
        last_index: Index,
        last_term: RaftTerm,
    ) {
        let granted = self.is_whole()
            && !self.hears_leader()
            && term > self.hard.term
            && self.up_to_date(last_index, last_term);
        let mut reply = self.message(from, Body::PreVoteReply { granted });
        if granted {
            reply.term = term;
        }
        self.ready.messages.push(reply);
    }

    pub(super) fn on_pre_vote_reply(&mut self, peer: &Peer, term: RaftTerm, granted: bool) {
        let counts = self.latest.counts(&peer.from, peer.birth, peer.voter);
        let fits = granted && term == self.hard.term + 1 && counts;
        let majority = self.majority();
        if let Role::PreCandidate(votes) = &mut self.role
            && fits
        {
            votes.insert(peer.from.clone());
            if votes.len() >= majority {
                self.campaign();
            }
        }
    }

    pub(super) fn on_vote(
        &mut self,
        from: MemberId,
        candidate: Birth,
        last_index: Index,
        last_term: RaftTerm,
    ) {
        let free = self.hard.vote.as_ref().is_none_or(|v| *v == from);
        let granted = self.is_whole()
            && self.leader.is_none()
            && matches!(self.role, Role::Follower | Role::PreCandidate(_))
            && free
            && self.up_to_date(last_index, last_term);
        if !granted {
            self.send(from, Body::VoteReply { granted, candidate });
            return;
        }
        if self.hard.vote.is_none() {
            self.hard.vote = Some(from.clone());
            self.write_hard();
        }
        self.role = Role::Follower;
        self.reset_election_timer();
        self.send_after_write(from, Body::VoteReply { granted, candidate });
    }

    pub(super) fn on_vote_reply(&mut self, peer: &Peer, granted: bool) {
        if granted && self.latest.counts(&peer.from, peer.birth, peer.voter) {
            self.count_vote(peer.from.clone());
        }
    }

    pub(super) fn count_vote(&mut self, from: MemberId) {
        let majority = self.majority();
        if let Role::Candidate(votes) = &mut self.role {
            votes.insert(from);
            if votes.len() >= majority {
                self.lead();
            }
        }
    }

    fn lead(&mut self) {
        let next = self.log.last_index() + 1;
        let peers = self.peers().into_iter().map(|p| {
            let birth = self.latest.voters.get(&p).copied().unwrap_or(0);
            (p, Progress::new(next, birth))
        });
        let leading = Leading {
            peers: peers.collect(),
            own_matched: 0,
            first_index: next,
            quorum_check: self.now.after(self.config.timings.election_timeout),
            ..Leading::default()
        };
        self.role = Role::Leader(leading);
        self.leader = Some(self.config.me.clone());
        self.append_own(Payload::Noop);
        self.broadcast_heartbeat();
    }

    /// A leader that has not heard a majority for an election timeout steps down.
    pub(super) fn check_quorum(&mut self) {
        let patience = self.config.timings.election_timeout;
        let (now, majority) = (self.now, self.majority());
        let voters = &self.latest;
        let Role::Leader(leading) = &mut self.role else {
            return;
        };
        let heard = leading
            .peers
            .iter()
            .filter(|(peer, p)| {
                let lately = p.heard.is_some_and(|t| now <= t.after(patience));
                lately && voters.counts(peer, p.birth, p.voter)
            })
            .count();
        // One that is being removed leads on until that is committed, and does not count itself.
        let own = usize::from(voters.voters.contains_key(&self.config.me));
        leading.quorum_check = now.after(patience);
        if heard + own < majority {
            self.become_follower(self.hard.term, None);
        }
    }
}
