//! What is sent and what is kept.

use std::collections::BTreeMap;

use super::membership::Configuration;

use craton_core::MemberId;
use serde::{Deserialize, Serialize};

/// A place in the log; the first entry is 1.
pub type Index = u64;

/// Raft's own term. It has nothing to do with the terms of PostgreSQL leadership.
pub type RaftTerm = u64;

/// One life of a node's disk, drawn at random when the disk is first used and never 0.
pub type Birth = u64;

/// The birth under which each member has a say.
pub type Births = BTreeMap<MemberId, Birth>;

/// What an entry says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Payload {
    /// Nothing: a new leader's first entry, which commits everything before it.
    Noop,
    /// For the state machine.
    Command(String),
    /// The member lost its disk and is a voter again under this birth.
    Readmit {
        /// Who.
        member: MemberId,
        /// Its new birth.
        birth: Birth,
    },
    /// Who takes part from here on: in force on each node as soon as it is in its log.
    Configure(Configuration),
}

/// An entry of the log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Where.
    pub index: Index,
    /// The term of the leader that made it.
    pub term: RaftTerm,
    /// What it says.
    pub payload: Payload,
}

/// The whole state at one index.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Image {
    /// The last entry that is part of it.
    pub last_index: Index,
    /// That entry's term.
    pub last_term: RaftTerm,
    /// The births in force there.
    pub births: Births,
    /// Who takes part there; none in what versions wrote that had a fixed set of voters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Configuration>,
    /// The state machine's own text.
    pub data: String,
}

/// Whether this node has a say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// An empty disk: either the cluster is new, or this disk is. Asks the others.
    #[default]
    Fresh,
    /// Votes and acknowledges.
    Voter,
    /// Lost its disk: learns, but has no say until the others have readmitted it.
    Recovering,
    /// Has never had a say under this birth: gets one from the configuration that names it, once that is
    /// in its log.
    Learner,
}

/// What must be on disk before anything is said that rests on it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HardState {
    /// The greatest term seen.
    pub term: RaftTerm,
    /// Who got this node's vote in that term.
    pub vote: Option<MemberId>,
    /// This disk's birth.
    pub birth: Birth,
    /// Whether this node has a say.
    pub standing: Standing,
    /// The births that the cluster began with, as this node saw them; empty until known.
    pub births: Births,
}

/// A message between nodes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Message {
    /// Sender.
    pub from: MemberId,
    /// Receiver.
    pub to: MemberId,
    /// The sender's birth.
    pub birth: Birth,
    /// Whether the sender knew itself to be a voter: what it says counts towards a majority.
    pub voter: bool,
    /// The sender's term; with `PreVote` and a granted `PreVoteReply`, the term it would be.
    pub term: RaftTerm,
    /// Where the sender can be reached: the receiver may not know of it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The rest.
    pub body: Body,
}

/// What a message says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// Would you vote for me?
    PreVote {
        /// The sender's last entry.
        last_index: Index,
        /// Its term.
        last_term: RaftTerm,
    },
    /// Answer to `PreVote`.
    PreVoteReply {
        /// Yes or no.
        granted: bool,
    },
    /// Vote for me.
    Vote {
        /// The sender's last entry.
        last_index: Index,
        /// Its term.
        last_term: RaftTerm,
    },
    /// Answer to `Vote`.
    VoteReply {
        /// Yes or no.
        granted: bool,
        /// The birth of the candidate that asked: a candidate that lost its disk meanwhile is another.
        candidate: Birth,
    },
    /// Entries after `prev_index`.
    Append {
        /// The entry before the first one.
        prev_index: Index,
        /// Its term.
        prev_term: RaftTerm,
        /// The entries.
        entries: Vec<Entry>,
        /// What the leader has committed.
        commit: Index,
    },
    /// The log agrees with the leader's, and is on disk, through this index.
    Appended {
        /// The index.
        matched: Index,
    },
    /// The log does not have the entry before the first one sent.
    Conflict {
        /// `prev_index` of the refused message.
        prev_index: Index,
        /// The first index of the term that stands there instead, or one past the end of the log.
        hint_index: Index,
        /// That term, 0 past the end.
        hint_term: RaftTerm,
    },
    /// The leader is there.
    Heartbeat {
        /// Committed, and known to be in the receiver's log.
        commit: Index,
        /// Number of the newest read that this round confirms.
        round: u64,
    },
    /// Answer to `Heartbeat`, never delayed by a disk.
    HeartbeatReply {
        /// The round answered.
        round: u64,
        /// The log is known to agree with the leader's through here.
        verified: Index,
    },
    /// The whole state.
    Snapshot {
        /// The state.
        image: Image,
    },
    /// Who am I to the others? See [`super::standing`].
    Census {
        /// The sender's standing.
        standing: Standing,
        /// The births that the sender counts by.
        births: Births,
        /// Whether an answer is wanted.
        ask: bool,
    },
}
