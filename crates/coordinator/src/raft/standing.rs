//! Births: how a node that lost its disk gets its say back without ever saying something twice.
//!
//! A voter's safety rests on its disk: it must not vote twice in a term, and must keep what it
//! acknowledged. A voter whose disk is empty, damaged or replaced remembers neither. It may have voted in
//! any term, and entries may be committed that only it and one other have.
//!
//! So each life of a disk has a random **birth**, and the log says under which birth each member has a say.
//! Only a node that knows itself to be a voter grants votes, and only its acknowledgements count (every
//! message says whether its sender is one). An empty disk begins as [`Standing::Fresh`] and asks the others:
//!
//! * all others are fresh too: the cluster is new. The births become the first configuration.
//! * a voter counts by my birth: I was there at the beginning and have lost nothing. I am a voter.
//! * a voter counts by another birth of me: I lost a disk. I am [`Standing::Recovering`].
//!
//! A recovering node stores and acknowledges, but nothing it says counts. Once it has caught up, the leader
//! puts `Readmit { member, birth }` into the log; the node is a voter once it knows that to be committed.
//!
//! Why that is safe. Let node N lose its disk, and R be the entry that readmits it, in term T.
//! * *Its acknowledgements.* R is committed by a majority M without N (the old N is gone, the new one does
//!   not count before R is committed). So is all that lies before R, which includes all that the old N ever acknowledged to
//!   this leader; what it acknowledged to earlier leaders is in this leader's log already, because it was
//!   elected by a majority and, if that was after the loss, by one without N.
//! * *Its votes.* Suppose old N voted for X in a term T' > T, and X wins with a majority Q that includes
//!   that vote. Q and M share a node Z, which is not N. If Z voted for X before it stored R, it was in term
//!   T' already and would have refused R from term T. If after, its log has R and X's has not (X asked N
//!   for its vote before N lost its disk, so before R existed), and Z refuses. So X cannot win.
//!   In T itself N regards its vote as given to the leader it follows; in terms below T nobody can win any more.
//!
//! While N recovers, one failure fewer is survived. When a majority has lost its disks nobody can be
//! readmitted, by design: the survivors may lack committed entries. The operator then stops all nodes,
//! removes the coordinator directory of **every** node and starts them together, which begins a new, empty
//! store; the agents refill it from what PostgreSQL itself knows (system id, timelines) and no data is touched.

use craton_core::MemberId;

use super::membership::Configuration;
use super::message::{Birth, Births, Body, Payload, Standing};
use super::node::{Raft, Role};

impl Raft {
    pub(super) fn ask_census(&mut self) {
        for peer in self.peers() {
            self.send_census(peer, true);
        }
    }

    fn send_census(&mut self, to: MemberId, ask: bool) {
        let body = Body::Census {
            standing: self.hard.standing,
            births: self.settled.voters.clone(),
            ask,
        };
        self.send(to, body);
    }

    pub(super) fn on_census(
        &mut self,
        from: MemberId,
        birth: Birth,
        standing: Standing,
        births: &Births,
        ask: bool,
    ) {
        if ask {
            self.send_census(from.clone(), false);
        }
        if self.hard.standing != Standing::Fresh && !self.settled.voters.is_empty() {
            return;
        }
        if standing == Standing::Voter && !births.is_empty() {
            self.settled.voters.clone_from(births);
            self.read_latest();
            self.take_standing(match births.get(&self.config.me) {
                Some(birth) if *birth == self.hard.birth => Standing::Voter,
                Some(_) => Standing::Recovering,
                None => Standing::Learner,
            });
            return;
        }
        self.census.insert(from, (birth, standing));
        if self.hard.standing == Standing::Fresh {
            self.settle_standing();
        }
    }

    /// Everybody is fresh: the cluster is new.
    pub(super) fn settle_standing(&mut self) {
        let all_fresh = !self.config.joining
            && self.peers().iter().all(|p| {
                self.census
                    .get(p)
                    .is_some_and(|(_, standing)| *standing == Standing::Fresh)
            });
        if all_fresh {
            let all = self
                .census
                .iter()
                .filter(|(p, _)| self.config.voters.contains(*p));
            let mut births: Births = all.map(|(p, (birth, _))| (p.clone(), *birth)).collect();
            births.insert(self.config.me.clone(), self.hard.birth);
            self.settled = Configuration::begun(births);
            self.read_latest();
            self.take_standing(Standing::Voter);
        }
    }

    fn take_standing(&mut self, standing: Standing) {
        self.hard.standing = standing;
        self.hard.births.clone_from(&self.settled.voters);
        self.write_hard();
    }

    /// A lost disk has its say again; committed.
    pub(super) fn readmitted(&mut self, member: &MemberId, birth: Birth) {
        if let Some(b) = self.settled.voters.get_mut(member) {
            *b = birth;
        }
        // A later configuration in the log was made by somebody who knew this one to be committed.
        if self.applied > self.latest_index
            && let Some(b) = self.latest.voters.get_mut(member)
        {
            *b = birth;
        }
        self.births_changed();
    }

    /// The births in force changed: this node's own may now count, or count no longer.
    pub(super) fn births_changed(&mut self) {
        let named = self.settled.voters.get(&self.config.me).copied();
        let mine = named == Some(self.hard.birth);
        match self.hard.standing {
            Standing::Recovering | Standing::Fresh | Standing::Learner if mine => {
                self.take_standing(Standing::Voter);
            }
            // Not while old entries are read again, of a time before this disk was admitted.
            Standing::Voter if named.is_some() && !mine && !self.is_named_later() => {
                self.take_standing(Standing::Recovering);
                self.become_follower(self.hard.term, None);
            }
            Standing::Learner if named.is_some() => self.take_standing(Standing::Recovering),
            // What its former self may have said counted in configurations that named it; all that follow
            // this one name another disk or none.
            Standing::Recovering | Standing::Fresh
                if named.is_none() && !self.settled.voters.is_empty() =>
            {
                self.take_standing(Standing::Learner);
            }
            _ => {}
        }
    }

    /// An entry that is not applied yet gives this disk its say.
    fn is_named_later(&self) -> bool {
        let (me, mine) = (&self.config.me, self.hard.birth);
        let mut later =
            (self.applied + 1..=self.log.last_index()).filter_map(|i| self.log.entry(i));
        later.any(|e| match &e.payload {
            Payload::Readmit { member, birth } => member == me && *birth == mine,
            Payload::Configure(config) => config.voters.get(me) == Some(&mine),
            Payload::Noop | Payload::Command(_) => false,
        })
    }

    /// A peer with a birth that does not count has caught up: propose that it counts.
    pub(super) fn readmit_if_due(&mut self, from: &MemberId, birth: Birth) {
        let Role::Leader(leading) = &self.role else {
            return;
        };
        let caught_up = leading
            .peers
            .get(from)
            .is_some_and(|p| p.matched >= self.commit);
        // Before the first own entry is committed, the births in force may not be known here.
        let settled = self.applied >= leading.first_index;
        let known = self.settled.voters.get(from);
        if !caught_up || !settled || known.is_none_or(|b| *b == birth) {
            return;
        }
        if !self.change_pending() {
            self.append_own(Payload::Readmit {
                member: from.clone(),
                birth,
            });
        }
    }
}
