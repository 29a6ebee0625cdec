//! What can happen in the model, and how it reads in a trace.

use super::state::{MEMBERS_MAX, Mode, Set, State};

/// One event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// A client's write is flushed on this primary, and waits for standbys.
    Write(usize),
    /// A standby receives and flushes one record.
    Receive(usize, usize),
    /// What a standby has reported reaches the primary, which may acknowledge commits.
    Ack(usize, usize),
    /// A WAL sender reads the configuration again.
    Reread(usize, usize),
    /// The checkpointer of a primary reads it again.
    RereadFlag(usize),
    /// A standby connects to a primary.
    Connect(usize, usize),
    /// A primary notices that a standby has gone.
    Gone(usize, usize),
    /// A leader reads the coordinator.
    Learn(usize),
    /// PostgreSQL is configured to wait for another set.
    SetPostgres(usize, Set),
    /// The leader writes another set into the coordinator; done or not, the answer does not arrive.
    Propose(usize, Set, bool),
    /// The leader writes the leadership unchanged, so that nothing older can be done any more.
    Settle(usize),
    /// A restarted agent has the set proven in force again.
    ProveAgain(usize, Set),
    /// The agent of a leader restarts.
    RestartAgent(usize),
    /// The lease is over: somebody opens the election of the next term.
    Open,
    /// A member seals, and the coordinator knows.
    Seal(usize),
    /// A sealed member gets a record that a sealed holder has, which cannot lead.
    CatchUp(usize, usize),
    /// A member wins.
    Win(usize),
    /// The winner promotes.
    Promote(usize),
    /// PostgreSQL ends.
    Crash(usize),
    /// It starts as a standby.
    Start(usize),
    /// It starts in place, as the primary it was.
    StartInPlace(usize),
    /// The data directory is lost.
    LoseDisk(usize),
    /// A new life of an empty data directory begins.
    BeginClone(usize),
    /// A member with another history gives its copy up for a new one.
    BeginRewind(usize),
    /// The copy from that member is complete.
    EndClone(usize, usize),
    /// A member promises its leader not to seal for a while.
    Promise(usize, usize),
    /// The leader hears of the promise.
    Promised(usize, usize),
    /// The time of a promise is over.
    RunsOut(usize),
    /// The lease is over and was not renewed: the leader goes on by promises, or its PostgreSQL is stopped.
    LeaseEnds(usize),
    /// The leader renews its lease again.
    Renews(usize),
    /// The leader's deadline by promises passes: its PostgreSQL is stopped.
    Stopped(usize),
    /// The agent of a member that has promised restarts.
    RestartPromiser(usize),
}

/// The names of the members in a state, as the trace calls them.
pub type Names = [char; MEMBERS_MAX];

/// A sync set in words.
pub fn set_in_words(set: Set, names: &Names) -> String {
    let mut members: Vec<String> = (0..MEMBERS_MAX)
        .filter(|m| set.incarnation(*m) != 0)
        .map(|m| format!("{}@{}", names[m], set.incarnation(m)))
        .collect();
    members.sort();
    let mode = match set.mode() {
        Mode::Quorum => "",
        Mode::Strict => " strict",
        Mode::Async => " async",
    };
    match set.k() {
        Set::CLOSED => format!("(nobody that exists){mode}"),
        0 if members.is_empty() => format!("(nobody, 0){mode}"),
        k => format!("({{{}}}, {k}){mode}", members.join(" ")),
    }
}

impl Action {
    /// As a line of a trace.
    pub fn in_words(self, names: &Names, after: &State) -> String {
        let n = |m: usize| names[m];
        let set = |s: Set| set_in_words(s, names);
        let end = |m: usize| after.members[m].log.len();
        match self {
            Self::Write(p) => format!("{} writes and flushes record {}", n(p), end(p)),
            Self::Receive(s, p) => {
                format!("{} flushes record {} from {}", n(s), end(s), n(p))
            }
            Self::Ack(p, s) => format!(
                "{} hears that {} has flushed up to {}",
                n(p),
                n(s),
                after.members[p].senders[s].flush
            ),
            Self::Reread(p, s) => {
                format!("{}'s WAL sender for {} reads the configuration", n(p), n(s))
            }
            Self::RereadFlag(p) => format!("{}'s checkpointer reads the configuration", n(p)),
            Self::Connect(s, p) => format!("{} streams from {}", n(s), n(p)),
            Self::Gone(p, s) => format!("{} notices that {} has gone", n(p), n(s)),
            Self::Learn(p) => format!("{} reads the coordinator", n(p)),
            Self::SetPostgres(p, s) => {
                format!("{} configures PostgreSQL to wait for {}", n(p), set(s))
            }
            Self::Propose(p, s, true) => format!("{} writes {} to the coordinator", n(p), set(s)),
            Self::Propose(p, s, false) => {
                format!("{} tries to write {}, and it is lost", n(p), set(s))
            }
            Self::Settle(p) => format!("{} writes the leadership unchanged", n(p)),
            Self::ProveAgain(p, s) => format!("{} has {} proven again", n(p), set(s)),
            Self::RestartAgent(p) => format!("{}'s agent restarts", n(p)),
            Self::Open => format!("the election of term {} is opened", after.term),
            Self::Seal(m) => format!("{} seals for term {}", n(m), after.term),
            Self::CatchUp(m, from) => {
                format!("{} gets record {} from {}", n(m), end(m), n(from))
            }
            Self::Win(m) => format!(
                "{} wins term {}; sync set {}",
                n(m),
                after.term,
                set(after.sync)
            ),
            Self::Promote(m) => format!("{} promotes", n(m)),
            Self::Crash(m) => format!("{}'s PostgreSQL ends", n(m)),
            Self::Start(m) => format!("{} starts as a standby", n(m)),
            Self::StartInPlace(m) => format!("{} starts in place as primary", n(m)),
            Self::LoseDisk(m) => format!("{} loses its data directory", n(m)),
            Self::BeginClone(m) => format!(
                "{} begins incarnation {}",
                n(m),
                after.members[m].incarnation
            ),
            Self::BeginRewind(m) => format!(
                "{} is rewound: incarnation {} begins",
                n(m),
                after.members[m].incarnation
            ),
            Self::EndClone(m, from) => {
                format!("{} is a copy of {}, {} records", n(m), n(from), end(m))
            }
            Self::Promise(m, p) => format!("{} promises {} not to seal", n(m), n(p)),
            Self::Promised(p, m) => format!("{} hears of {}'s promise", n(p), n(m)),
            Self::RunsOut(m) => format!("{}'s promise runs out", n(m)),
            Self::LeaseEnds(p) => format!("{}'s lease ends", n(p)),
            Self::Renews(p) => format!("{} renews its lease again", n(p)),
            Self::Stopped(p) => format!("{}'s deadline passes, its PostgreSQL is stopped", n(p)),
            Self::RestartPromiser(m) => format!("{}'s agent restarts", n(m)),
        }
    }
}
