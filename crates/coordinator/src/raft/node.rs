//! The node: its state, its clockwork, and what goes in and out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use craton_core::{BootTime, MemberId};

use super::durable::{Durable, Write};
use super::log::Log;
use super::membership::Configuration;
use super::message::{
    Birth, Body, Entry, HardState, Image, Index, Message, Payload, RaftTerm, Standing,
};

/// Writes that may be under way before a node takes no more entries: with a stalled disk, memory is bounded.
pub const UNWRITTEN_MAX: u64 = 2048;

/// With more writes than this under way, a node does not campaign.
const CAMPAIGN_UNWRITTEN_MAX: u64 = 16;

/// Reads that may wait for a heartbeat round.
pub const READS_MAX: usize = 1024;

/// How long things take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timings {
    /// A leader is heard from this often.
    pub heartbeat: Duration,
    /// A follower campaigns after silence of this long up to twice this long, drawn anew each time.
    pub election_timeout: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_timeout: Duration::from_millis(500),
        }
    }
}

/// Who a node is, and with whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub me: MemberId,
    /// Whom to ask who takes part, until that is known; for a new cluster all its voters, this one among them.
    pub voters: BTreeSet<MemberId>,
    /// The cluster exists and has taken this node in: an empty disk never begins a new one.
    pub joining: bool,
    /// Where others reach this node; told to those that may not know of it.
    pub address: Option<String>,
    /// Where the settings file says that the others are, for those of whom the log does not say it.
    pub addresses: BTreeMap<MemberId, String>,
    /// How long things take.
    pub timings: Timings,
    /// Where the draws of election timeouts begin.
    pub seed: u64,
}

/// Why a node does not take a proposal or a read: nothing was done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotNow {
    /// Somebody else leads, perhaps this one.
    NotLeader(Option<MemberId>),
    /// Too much is under way.
    Busy,
}

/// What has to be done for the node. Everything may be done in parallel, except that writes keep their order.
#[derive(Debug, Default)]
pub struct Ready {
    /// To disk, in this order; each has its token for [`Raft::persisted`].
    pub writes: Vec<(u64, Write)>,
    /// To the peers, at once.
    pub messages: Vec<Message>,
    /// Replaces the state machine; before `committed`.
    pub install: Option<Image>,
    /// To the state machine, in order.
    pub committed: Vec<Entry>,
    /// Reads that may be served once the state machine is at the index; `None` when leadership was lost.
    pub reads: Vec<(u64, Option<Index>)>,
}

/// The role by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RoleName {
    /// Follows, or waits for a leader.
    Follower,
    /// Asks whether it could win.
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

/// What can be seen from outside.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// Raft's term.
    pub term: RaftTerm,
    /// The role.
    pub role: RoleName,
    /// The leader, where known.
    pub leader: Option<MemberId>,
    /// The last committed entry known here.
    pub commit: Index,
    /// The last entry of the log.
    pub last_index: Index,
    /// Whether this node has a say.
    pub standing: Standing,
    /// The epoch of the committed configuration, see [`Configuration`].
    pub epoch: u64,
    /// Elections this node has begun since it started.
    pub elections: u64,
    /// Set when an invariant was found broken: the node has stopped taking part.
    pub fault: Option<String>,
}

/// What the leader knows of a peer.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    pub(super) matched: Index,
    pub(super) next: Index,
    /// When it last answered in this term.
    pub(super) heard: Option<BootTime>,
    /// The birth that `matched` belongs to.
    pub(super) birth: Birth,
    /// Whether it knows itself to be a voter.
    pub(super) voter: bool,
    /// The newest heartbeat round it answered.
    pub(super) round: u64,
    /// When an image was last sent to it: one a heartbeat is enough.
    pub(super) image_sent: Option<BootTime>,
}

impl Progress {
    pub(super) fn new(next: Index, birth: Birth) -> Self {
        Self {
            matched: 0,
            next,
            heard: None,
            birth,
            voter: false,
            round: 0,
            image_sent: None,
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Leading {
    pub(super) peers: BTreeMap<MemberId, Progress>,
    /// Own entries that are on the own disk.
    pub(super) own_matched: Index,
    pub(super) round: u64,
    /// Reads: the round that confirms each, its id, and the commit index when it came.
    pub(super) reads: VecDeque<(u64, u64, Index)>,
    /// The index of this leader's first entry: nothing is known to be committed before it is.
    pub(super) first_index: Index,
    pub(super) quorum_check: BootTime,
}

#[derive(Clone, Debug)]
pub(super) enum Role {
    Follower,
    PreCandidate(BTreeSet<MemberId>),
    Candidate(BTreeSet<MemberId>),
    Leader(Leading),
}

/// The sender of a message.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) from: MemberId,
    pub(super) birth: Birth,
    pub(super) voter: bool,
}

/// What waits for a write to be on disk.
#[derive(Clone, Debug)]
enum AfterWrite {
    Send(Box<Message>),
    OwnVote(RaftTerm),
    OwnEntries(RaftTerm, Index),
}

/// One node.
#[derive(Debug)]
pub struct Raft {
    pub(super) config: Config,
    pub(super) hard: HardState,
    pub(super) log: Log,
    /// Who takes part, as of `applied`.
    pub(super) settled: Configuration,
    /// Who takes part, by the newest configuration in the log, committed or not: what majorities are counted by.
    pub(super) latest: Configuration,
    /// The index of that configuration's entry, 0 if it is in the image or before.
    pub(super) latest_index: Index,
    pub(super) role: Role,
    pub(super) leader: Option<MemberId>,
    pub(super) leader_heard: Option<BootTime>,
    pub(super) commit: Index,
    pub(super) applied: Index,
    /// The log is known to agree with the current leader's through here.
    pub(super) verified: Index,
    pub(super) now: BootTime,
    pub(super) election_due: BootTime,
    pub(super) heartbeat_due: BootTime,
    /// What peers said of themselves, while this node is fresh.
    pub(super) census: BTreeMap<MemberId, (Birth, Standing)>,
    pub(super) ready: Ready,
    pub(super) fault: Option<String>,
    pub(super) elections: u64,
    written: u64,
    persisted: u64,
    waiting: VecDeque<(u64, AfterWrite)>,
    random: u64,
}

impl Raft {
    /// A node with what is on its disk. `durable.hard.birth` must be set.
    pub fn new(config: Config, durable: Durable, now: BootTime) -> Self {
        let Durable {
            hard,
            image,
            entries,
        } = durable;
        let install = image.clone();
        let log = Log::new(image, entries);
        let settled = install.as_ref().map_or_else(
            || Configuration::begun(hard.births.clone()),
            Image::configuration,
        );
        let random = config.seed;
        let mut raft = Self {
            commit: log.base(),
            applied: log.base(),
            verified: log.base(),
            config,
            hard,
            log,
            latest: settled.clone(),
            latest_index: 0,
            settled,
            role: Role::Follower,
            leader: None,
            leader_heard: None,
            now,
            election_due: now,
            heartbeat_due: now,
            census: BTreeMap::new(),
            ready: Ready {
                install,
                ..Ready::default()
            },
            fault: None,
            elections: 0,
            written: 0,
            persisted: 0,
            waiting: VecDeque::new(),
            random,
        };
        raft.read_latest();
        raft.reset_election_timer();
        if raft.hard.standing == Standing::Fresh {
            raft.settle_standing();
        }
        raft
    }

    /// Time has passed. To be called at least a few times per heartbeat.
    pub fn tick(&mut self, now: BootTime) {
        self.now = self.now.max(now);
        if self.fault.is_some() {
            return;
        }
        if let Role::Leader(leading) = &self.role {
            let check = leading.quorum_check;
            if self.now >= check {
                self.check_quorum();
            }
            if self.now >= self.heartbeat_due {
                self.broadcast_heartbeat();
            }
            return;
        }
        if (self.hard.standing == Standing::Fresh || self.settled.voters.is_empty())
            && self.now >= self.heartbeat_due
        {
            self.heartbeat_due = self.now.after(self.config.timings.heartbeat);
            self.ask_census();
        }
        if self.now >= self.election_due {
            self.reset_election_timer();
            // With a stalled disk it could not even vote for itself.
            if self.may_campaign() && self.unwritten() < CAMPAIGN_UNWRITTEN_MAX {
                self.pre_campaign();
            } else if !self.may_campaign() {
                // Nobody is heard: whoever asks this node for the leader must not wait for a dead one.
                self.leader = None;
            }
        }
    }

    /// A message has come.
    pub fn step(&mut self, now: BootTime, message: Message) {
        self.now = self.now.max(now);
        // Thesis 4.2.2: who is not in this node's configuration may be in a later one, and is listened to.
        let stray = message.to != self.config.me || message.from == self.config.me;
        if self.fault.is_some() || stray {
            return;
        }
        if let Body::Census {
            standing,
            births,
            ask,
        } = message.body
        {
            self.on_census(message.from, message.birth, standing, &births, ask);
            return;
        }
        if !self.observe_term(&message) {
            return;
        }
        let Message {
            from,
            birth,
            voter,
            term,
            body,
            ..
        } = message;
        let peer = Peer { from, birth, voter };
        match body {
            Body::PreVote {
                last_index,
                last_term,
            } => self.on_pre_vote(peer.from, term, last_index, last_term),
            Body::PreVoteReply { granted } => self.on_pre_vote_reply(&peer, term, granted),
            Body::Vote {
                last_index,
                last_term,
            } => self.on_vote(peer.from, birth, last_index, last_term),
            Body::VoteReply { granted, candidate } => {
                self.on_vote_reply(&peer, granted && candidate == self.hard.birth);
            }
            Body::Append {
                prev_index,
                prev_term,
                entries,
                commit,
            } => {
                self.follow(peer.from);
                self.on_append(prev_index, prev_term, entries, commit);
            }
            Body::Heartbeat { commit, round } => {
                self.follow(peer.from);
                self.on_heartbeat(commit, round);
            }
            Body::Snapshot { image } => {
                self.follow(peer.from);
                self.on_snapshot(image);
            }
            Body::Appended { matched } => self.on_appended(&peer, matched),
            Body::Conflict {
                prev_index,
                hint_index,
                hint_term,
            } => {
                self.on_conflict(&peer, prev_index, hint_index, hint_term);
            }
            Body::HeartbeatReply { round, verified } => {
                self.on_heartbeat_reply(&peer, round, verified);
            }
            Body::Census { .. } => {}
        }
    }

    /// Everything up to this token is on disk.
    pub fn persisted(&mut self, now: BootTime, token: u64) {
        self.now = self.now.max(now);
        self.persisted = self.persisted.max(token);
        while self
            .waiting
            .front()
            .is_some_and(|(t, _)| *t <= self.persisted)
        {
            if let Some((_, what)) = self.waiting.pop_front() {
                self.do_after_write(what);
            }
        }
    }

    /// Puts a command into the log. It has happened once it comes out of `ready().committed` with this term;
    /// if another entry comes out at this index, it has not.
    pub fn propose(&mut self, now: BootTime, command: String) -> Result<(RaftTerm, Index), NotNow> {
        self.now = self.now.max(now);
        if !self.is_leader() || self.fault.is_some() {
            return Err(NotNow::NotLeader(self.leader.clone()));
        }
        if self.choked() || self.log.last_index() - self.commit >= UNWRITTEN_MAX {
            return Err(NotNow::Busy);
        }
        let index = self.append_own(Payload::Command(command));
        Ok((self.hard.term, index))
    }

    /// Replaces the log through `index` by the state machine's text at that index. Does nothing for an index
    /// that is not applied, or is in the image already.
    pub fn compact(&mut self, index: Index, data: String) {
        if index != self.applied || index <= self.log.base() {
            return;
        }
        let Some(last_term) = self.log.term(index) else {
            return;
        };
        let image = Image {
            last_index: index,
            last_term,
            births: self.settled.voters.clone(),
            config: Some(self.settled.clone()),
            data,
        };
        self.write(Write::Snapshot(image.clone()));
        self.log.install(image);
        self.read_latest();
    }

    /// Entries that a snapshot now would cover.
    pub fn applied_since_image(&self) -> u64 {
        self.applied - self.log.base()
    }

    /// Takes what has to be done.
    pub fn ready(&mut self) -> Ready {
        self.collect_committed();
        std::mem::take(&mut self.ready)
    }

    /// What can be seen from outside.
    pub fn status(&self) -> Status {
        let role = match self.role {
            Role::Follower => RoleName::Follower,
            Role::PreCandidate(_) => RoleName::PreCandidate,
            Role::Candidate(_) => RoleName::Candidate,
            Role::Leader(_) => RoleName::Leader,
        };
        Status {
            term: self.hard.term,
            role,
            leader: self.leader.clone(),
            commit: self.commit,
            last_index: self.log.last_index(),
            standing: self.shown_standing(),
            epoch: self.settled.epoch,
            elections: self.elections,
            fault: self.fault.clone(),
        }
    }

    /// Who takes part, as committed and applied here.
    pub fn settled(&self) -> &Configuration {
        &self.settled
    }

    /// Who takes part by the newest configuration in the log, committed or not.
    pub fn latest(&self) -> &Configuration {
        &self.latest
    }

    /// The birth of this node's disk.
    pub fn birth(&self) -> Birth {
        self.hard.birth
    }

    fn collect_committed(&mut self) {
        while self.applied < self.commit && self.fault.is_none() {
            let Some(entry) = self.log.entry(self.applied + 1).cloned() else {
                self.fail(format!(
                    "entry {} is committed and missing",
                    self.applied + 1
                ));
                return;
            };
            self.applied = entry.index;
            match &entry.payload {
                Payload::Readmit { member, birth } => self.readmitted(member, *birth),
                Payload::Configure(config) => self.configuration_committed(config.clone()),
                Payload::Noop | Payload::Command(_) => {}
            }
            self.ready.committed.push(entry);
        }
    }

    /// An invariant is broken: going on could only spread it.
    pub(super) fn fail(&mut self, what: String) {
        self.role = Role::Follower;
        self.leader = None;
        self.fault.get_or_insert(what);
    }

    pub(super) fn is_leader(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }

    pub(super) fn majority(&self) -> usize {
        self.latest.voters.len() / 2 + 1
    }

    pub(super) fn unwritten(&self) -> u64 {
        self.written - self.persisted
    }

    /// The disk is so far behind that nothing more is taken.
    pub(super) fn choked(&self) -> bool {
        self.unwritten() >= UNWRITTEN_MAX || self.waiting.len() as u64 >= UNWRITTEN_MAX
    }

    pub(super) fn message(&self, to: MemberId, body: Body) -> Message {
        let voter = self.hard.standing == Standing::Voter;
        Message {
            from: self.config.me.clone(),
            to,
            birth: self.hard.birth,
            voter,
            term: self.hard.term,
            address: self.config.address.clone(),
            body,
        }
    }

    pub(super) fn send(&mut self, to: MemberId, body: Body) {
        let message = self.message(to, body);
        self.ready.messages.push(message);
    }

    /// Sends once everything that was written so far is on disk.
    pub(super) fn send_after_write(&mut self, to: MemberId, body: Body) {
        let message = self.message(to, body);
        self.after_write(AfterWrite::Send(Box::new(message)));
    }

    pub(super) fn own_vote_after_write(&mut self) {
        self.after_write(AfterWrite::OwnVote(self.hard.term));
    }

    pub(super) fn own_entries_after_write(&mut self) {
        self.after_write(AfterWrite::OwnEntries(
            self.hard.term,
            self.log.last_index(),
        ));
    }

    pub(super) fn write(&mut self, write: Write) {
        self.written += 1;
        self.ready.writes.push((self.written, write));
    }

    pub(super) fn write_hard(&mut self) {
        self.write(Write::Hard(self.hard.clone()));
    }

    fn after_write(&mut self, what: AfterWrite) {
        if self.persisted == self.written {
            self.do_after_write(what);
        } else {
            self.waiting.push_back((self.written, what));
        }
    }

    fn do_after_write(&mut self, what: AfterWrite) {
        match what {
            AfterWrite::Send(message) => self.ready.messages.push(*message),
            AfterWrite::OwnVote(term) if term == self.hard.term => {
                if self.has_say() {
                    self.count_vote(self.config.me.clone());
                }
            }
            AfterWrite::OwnEntries(term, index) if term == self.hard.term => {
                self.own_entries_written(index);
            }
            AfterWrite::OwnVote(_) | AfterWrite::OwnEntries(..) => {}
        }
    }

    pub(super) fn reset_election_timer(&mut self) {
        let least =
            u64::try_from(self.config.timings.election_timeout.as_nanos()).unwrap_or(u64::MAX / 4);
        let extra = self.draw().checked_rem(least).unwrap_or(0);
        self.election_due = self
            .now
            .after(Duration::from_nanos(least.saturating_add(extra)));
    }

    /// splitmix64 (Steele, Lea, Flood 2014).
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
