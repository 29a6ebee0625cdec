//! A state of the model, small enough to keep millions of them.

/// Members at most.
pub const MEMBERS_MAX: usize = 4;

/// Records that a log can hold.
const RECORDS_MAX: usize = 8;

/// A durability mode, as the coordinator's record says it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub enum Mode {
    /// `quorum`
    #[default]
    Quorum,
    /// `strict`
    Strict,
    /// `async`
    Async,
}

impl Mode {
    /// An election keeps what was acknowledged.
    pub fn keeps(self) -> bool {
        self != Self::Async
    }
}

/// What a member can be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub enum Kind {
    /// It may lead.
    #[default]
    Full,
    /// Its priority is 0: it counts and gives WAL, and never leads.
    NeverLeads,
    /// A backup receiver: WAL without a database.
    Receiver,
}

/// A sync set, packed: the incarnation of each member in it (0: not in it), k, and in the coordinator the mode.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Set(pub u32);

impl Set {
    const K_SHIFT: u32 = 16;
    const MODE_SHIFT: u32 = 20;
    /// A k that no members can fulfil: nothing is acknowledged.
    pub const CLOSED: u32 = 0xF;

    /// k.
    pub fn k(self) -> u32 {
        (self.0 >> Self::K_SHIFT) & 0xF
    }

    /// The same members with another k.
    pub fn with_k(self, k: u32) -> Self {
        Self((self.0 & !(0xF << Self::K_SHIFT)) | (k << Self::K_SHIFT))
    }

    /// The mode that is written with it.
    pub fn mode(self) -> Mode {
        match self.0 >> Self::MODE_SHIFT {
            0 => Mode::Quorum,
            1 => Mode::Strict,
            _ => Mode::Async,
        }
    }

    /// With this mode.
    pub fn with_mode(self, mode: Mode) -> Self {
        Self((self.0 & ((1 << Self::MODE_SHIFT) - 1)) | ((mode as u32) << Self::MODE_SHIFT))
    }

    /// The incarnation of a member in it, 0 if it is not in it.
    pub fn incarnation(self, m: usize) -> u8 {
        u8::try_from((self.0 >> (4 * m)) & 0xF).unwrap_or(0)
    }

    /// With this member; without it if the incarnation is 0.
    pub fn with(self, m: usize, incarnation: u8) -> Self {
        Self((self.0 & !(0xF << (4 * m))) | (u32::from(incarnation & 0xF) << (4 * m)))
    }

    /// This member in this incarnation is in it.
    pub fn holds(self, m: usize, incarnation: u8) -> bool {
        incarnation != 0 && self.incarnation(m) == incarnation
    }

    fn permuted(self, order: Order) -> Self {
        let k = self.k();
        let mut out = Self::default();
        for (new, old) in order.into_iter().enumerate() {
            out = out.with(new, self.incarnation(usize::from(old)));
        }
        out.with_k(k).with_mode(self.mode())
    }
}

/// WAL: the term in which each record was written, the oldest first. A timeline belongs to one term, so
/// (term, number of the record) names a record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Log(u32);

impl Log {
    /// How many records.
    pub fn len(self) -> usize {
        RECORDS_MAX - (self.0.leading_zeros() / 4) as usize
    }

    /// The term of a record, counted from 0; 0 beyond the end.
    pub fn at(self, i: usize) -> u8 {
        if i >= RECORDS_MAX {
            return 0;
        }
        u8::try_from((self.0 >> (4 * i)) & 0xF).unwrap_or(0)
    }

    /// The term of the last record.
    pub fn last(self) -> u8 {
        self.len().checked_sub(1).map_or(0, |i| self.at(i))
    }

    /// There is room for another record.
    pub fn has_room(self) -> bool {
        self.len() < RECORDS_MAX
    }

    /// With another record.
    pub fn push(self, term: u8) -> Self {
        Self(self.0 | (u32::from(term & 0xF) << (4 * self.len())))
    }

    /// The first `n` records.
    pub fn prefix(self, n: usize) -> Self {
        if n >= RECORDS_MAX {
            return self;
        }
        Self(self.0 & ((1u32 << (4 * n)) - 1))
    }

    /// What the two have in common from the beginning.
    pub fn common(self, other: Self) -> Self {
        let all = self.len().min(other.len());
        let same = (0..all).take_while(|i| self.at(*i) == other.at(*i)).count();
        self.prefix(same)
    }

    /// All of it is the beginning of `other`.
    pub fn begins(self, other: Self) -> bool {
        other.prefix(self.len()) == self
    }

    /// What PostgreSQL compares: timeline and position.
    pub fn position(self) -> (u8, u8) {
        (self.last(), u8::try_from(self.len()).unwrap_or(u8::MAX))
    }
}

/// What a data directory and the PostgreSQL on it are doing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub enum Role {
    /// No data.
    #[default]
    Empty,
    /// A new incarnation whose copy is not complete.
    Cloning,
    /// Data, and no PostgreSQL.
    Down,
    /// Runs in recovery.
    Standby,
    /// Accepts writes.
    Primary,
}

/// Has the sync set that is configured been seen in force?
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub enum Proof {
    /// Nobody looks: the agent that did was restarted.
    #[default]
    None,
    /// Not yet.
    Pending,
    /// Yes.
    Done,
}

/// By what a leader may go on (only where promises are in the model).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub enum Right {
    /// By nothing: its PostgreSQL is stopped.
    #[default]
    None,
    /// It renews its lease.
    Lease,
    /// Its standbys have promised not to seal.
    Promises,
}

/// A WAL sender of a primary.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Sender {
    /// `synchronous_standby_names` as this process has read it.
    pub config: Set,
    /// The incarnation in the standby's `application_name`; 0: there is no such sender.
    pub incarnation: u8,
    /// What the standby is known to have flushed.
    pub flush: u8,
    /// What it has reported; under way if it is more than `flush`.
    pub reported: u8,
    /// The standby has gone; what it reported may still arrive.
    pub closed: bool,
}

/// A leader: what its agent remembers, and what its PostgreSQL is told.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Lead {
    /// The term it leads, or once led and has not heard that it is over; 0: none.
    pub term: u8,
    /// The coordinator's (V, k) as it knows it.
    pub known: Set,
    /// That is the newest.
    pub fresh: bool,
    /// An earlier life of this agent may have proposed changes on the revision that is known.
    pub earlier_life: bool,
    /// What was proposed on that revision, sorted.
    pub proposed: [Option<Set>; 2],
    /// What PostgreSQL is configured to wait for.
    pub configured: Set,
    /// The flag by which backends decide whether to wait; written by the checkpointer.
    pub waits: bool,
    /// In force?
    pub proof: Proof,
    /// The flush position when it was seen in force.
    pub barrier: u8,
    /// By what it may go on.
    pub right: Right,
    /// Promises it has: the incarnation that gave each, 0 for none.
    pub promises: [u8; MEMBERS_MAX],
}

/// A member.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Member {
    /// What it can be.
    pub kind: Kind,
    /// Its flushed WAL.
    pub log: Log,
    /// The life of its data directory, 0 before the first.
    pub incarnation: u8,
    /// Nothing of a lower term may reach the directory.
    pub floor: u8,
    /// What it does.
    pub role: Role,
    /// Whom its WAL receiver is connected to, counted from 1; 0: nobody.
    pub upstream: u8,
    /// It has promised not to seal, and the time for that is not over.
    pub promised: bool,
    /// As a leader.
    pub lead: Lead,
    /// Its WAL senders, by standby.
    pub senders: [Sender; MEMBERS_MAX],
}

/// A seal in the coordinator.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Seal {
    /// The data directory that was sealed; 0: there is no seal.
    pub incarnation: u8,
    /// Timeline and position of its end of WAL.
    pub position: (u8, u8),
}

/// How much of what is bounded has happened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Used {
    /// Writes of clients.
    pub writes: u8,
    /// Ends of PostgreSQL, the host's included.
    pub crashes: u8,
    /// Lost disks.
    pub losses: u8,
    /// Restarts of an agent that leads.
    pub restarts: u8,
    /// Changes of a sync set that were begun.
    pub changes: u8,
}

/// Everything.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct State {
    /// The coordinator's term.
    pub term: u8,
    /// Its leader, counted from 1; 0: an election is open.
    pub leader: u8,
    /// The leader's incarnation.
    pub leader_incarnation: u8,
    /// In an election, the former leader, counted from 1.
    pub previous: u8,
    /// Its incarnation.
    pub previous_incarnation: u8,
    /// (V, k) in the coordinator.
    pub sync: Set,
    /// The seals of the open election.
    pub seals: [Seal; MEMBERS_MAX],
    /// The members.
    pub members: [Member; MEMBERS_MAX],
    /// Everything that clients have heard is committed. One log: two that fork are a loss already.
    pub acknowledged: Log,
    /// The log with which the highest term so far was won.
    pub line: Log,
    /// By term, a bit each: the mode in which the election of that term was won keeps what was acknowledged.
    pub kept: u8,
    /// What has happened.
    pub used: Used,
}

/// Which old number each new number stands for.
pub type Order = [u8; MEMBERS_MAX];

/// A mix of two numbers that depends on all their bits (the finish of MurmurHash3, Appleby).
fn mix(a: u64, b: u64) -> u64 {
    let mut z = (a.rotate_left(5) ^ b).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z ^= z >> 32;
    z = z.wrapping_mul(0xD6E8_FEB8_6659_FD93);
    z ^ (z >> 29)
}

impl State {
    /// The highest term that was won.
    pub fn won(&self) -> u8 {
        if self.leader == 0 {
            self.term.saturating_sub(1)
        } else {
            self.term
        }
    }

    /// What can be said of a member without naming another.
    fn signature(&self, m: usize) -> u64 {
        let member = &self.members[m];
        let number = u8::try_from(m + 1).unwrap_or(0);
        let bits = |list: &[u8]| list.iter().fold(0u64, |all, b| (all << 6) ^ u64::from(*b));
        let own = bits(&[
            member.role as u8,
            member.incarnation,
            member.floor,
            member.lead.term,
            u8::from(self.leader == number),
            u8::from(self.previous == number),
            self.sync.incarnation(m),
            self.seals[m].incarnation,
            u8::from(member.upstream != 0) + 2 * u8::from(member.promised) + 4 * member.kind as u8,
        ]);
        let mut out = mix(own, u64::from(member.log.0));
        for p in &self.members {
            let s = &p.senders[m];
            if s.incarnation != 0 || p.lead.term != 0 {
                let seen = bits(&[
                    p.lead.term,
                    s.incarnation,
                    s.flush,
                    s.reported,
                    u8::from(s.closed),
                    u8::try_from(s.config.k()).unwrap_or(0),
                    p.lead.known.incarnation(m) + 4 * s.config.incarnation(m),
                    p.lead.configured.incarnation(m),
                    p.lead.promises[m],
                ]);
                // A sum: it does not matter in which order the primaries stand.
                out = out.wrapping_add(mix(seen, 1));
            }
        }
        out
    }

    /// The same state with the members in an order that does not depend on their names: of states that
    /// differ only by a renaming, mostly one is kept.
    pub fn canonical(&self, members: usize) -> (Self, Order) {
        let mut keys = [(0u64, 0u8); MEMBERS_MAX];
        for (m, key) in keys.iter_mut().enumerate() {
            let signature = if m < members {
                self.signature(m)
            } else {
                u64::MAX
            };
            *key = (signature, u8::try_from(m).unwrap_or(0));
        }
        keys[..members].sort_unstable();
        let order = keys.map(|(_, m)| m);
        (self.permuted(order), order)
    }

    fn permuted(&self, order: Order) -> Self {
        let mut place = [0u8; MEMBERS_MAX];
        for (new, old) in order.into_iter().enumerate() {
            place[usize::from(old)] = u8::try_from(new).unwrap_or(0);
        }
        let renamed = |number: u8| match number {
            0 => 0,
            n => place[usize::from(n - 1)] + 1,
        };
        let mut out = *self;
        out.leader = renamed(self.leader);
        out.previous = renamed(self.previous);
        out.sync = self.sync.permuted(order);
        for (new, old) in order.into_iter().enumerate() {
            let old = usize::from(old);
            out.seals[new] = self.seals[old];
            let mut member = self.members[old];
            member.upstream = renamed(member.upstream);
            if member.lead.term != 0 {
                member.lead.known = member.lead.known.permuted(order);
                member.lead.configured = member.lead.configured.permuted(order);
                for set in member.lead.proposed.iter_mut().flatten() {
                    *set = set.permuted(order);
                }
                member.lead.proposed.sort_unstable();
                let (senders, promises) = (member.senders, member.lead.promises);
                for (to, from) in order.into_iter().enumerate() {
                    let mut sender = senders[usize::from(from)];
                    sender.config = sender.config.permuted(order);
                    member.senders[to] = sender;
                    member.lead.promises[to] = promises[usize::from(from)];
                }
            }
            out.members[new] = member;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_and_sets_are_what_they_hold() {
        let log = Log::default().push(1).push(1).push(2);
        assert_eq!((log.len(), log.last(), log.position()), (3, 2, (2, 3)));
        assert!(log.prefix(2).begins(log) && !log.begins(log.prefix(2)));
        let set = Set::default().with(1, 1).with(3, 2).with_k(1);
        assert!(set.holds(3, 2) && !set.holds(3, 1) && !set.holds(0, 0));
        assert_eq!((set.k(), set.with(3, 0).with(1, 0).with_k(0)), (1, Set(0)));
    }

    #[test]
    fn a_renamed_state_is_the_same_state() {
        let mut s = State {
            term: 1,
            leader: 1,
            leader_incarnation: 1,
            sync: Set::default().with(1, 1).with(2, 1).with_k(1),
            ..State::default()
        };
        for m in 0..3 {
            s.members[m].incarnation = 1;
            s.members[m].role = Role::Standby;
            s.members[m].log = Log::default().push(1);
        }
        s.members[0].lead.term = 1;
        s.members[2].log = s.members[2].log.push(1);
        let other = s.permuted([2, 0, 1, 3]);
        assert_ne!(s, other);
        assert_eq!(s.canonical(3).0, other.canonical(3).0);
    }
}
