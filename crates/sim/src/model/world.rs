//! What can happen in a state, and what follows.

use super::action::Action;
use super::promises;
use super::real::{Question, Rules, Step};
use super::state::{
    Kind, Lead, Log, MEMBERS_MAX, Member, Mode, Proof, Right, Role, Sender, Set, State,
};
use super::{Broken, Config};

/// An event, the state after it, and the property that it broke.
pub type Next = (Action, State, Option<String>);

/// The first term.
const FIRST: u8 = 1;
/// The first incarnation.
const BORN: u8 = 1;

/// The world with its rules.
#[derive(Debug)]
pub struct World {
    /// What is explored.
    pub config: Config,
    /// The product's rules.
    pub rules: Rules,
}

pub fn small(n: usize) -> u8 {
    u8::try_from(n).unwrap_or(u8::MAX)
}

impl World {
    /// A world with these bounds.
    pub fn new(config: &Config) -> Self {
        Self {
            config: config.clone(),
            rules: Rules::default(),
        }
    }

    pub(super) fn is_broken(&self, rule: Broken) -> bool {
        self.config.broken == Some(rule)
    }

    pub(super) fn members(&self) -> std::ops::Range<usize> {
        0..self.config.members
    }

    /// A whole cluster: one leads the first term, all others stream and are in V.
    pub fn initial(&mut self) -> State {
        let mode = self.config.mode;
        let mut s = State {
            term: FIRST,
            leader: 1,
            leader_incarnation: BORN,
            ..State::default()
        };
        let log = Log::default().push(FIRST);
        s.line = log;
        for m in self.members().skip(1) {
            s.sync = s.sync.with(m, BORN);
        }
        let k = if mode.keeps() { self.config.k } else { 0 };
        s.sync = s.sync.with_k(k).with_mode(mode);
        let configured = self.begins(s.sync);
        for m in self.members() {
            s.members[m] = Member {
                kind: self.kind(m),
                log,
                incarnation: BORN,
                floor: FIRST,
                role: if m == 0 { Role::Primary } else { Role::Standby },
                upstream: u8::from(m != 0),
                ..Member::default()
            };
        }
        s.members[0].lead = Lead {
            term: FIRST,
            known: s.sync,
            fresh: true,
            configured,
            waits: configured.k() > 0,
            proof: Proof::Done,
            barrier: 1,
            right: if self.config.promises {
                Right::Lease
            } else {
                Right::None
            },
            ..Lead::default()
        };
        for m in self.members().skip(1) {
            s.members[0].senders[m] = Sender {
                config: configured,
                incarnation: BORN,
                flush: 1,
                reported: 1,
                closed: false,
            };
        }
        s
    }

    /// The last ones are receivers, those before them never lead.
    fn kind(&self, m: usize) -> Kind {
        let from_the_end = self.config.members - 1 - m;
        if from_the_end < self.config.receivers {
            Kind::Receiver
        } else if from_the_end < self.config.receivers + self.config.never {
            Kind::NeverLeads
        } else {
            Kind::Full
        }
    }

    /// What PostgreSQL waits for from its first write on.
    pub(super) fn begins(&mut self, known: Set) -> Set {
        self.rules.begins(known, self.config.wanted_k_max)
    }

    /// Everything that can happen next.
    pub fn successors(&mut self, s: &State, out: &mut Vec<Next>) {
        out.clear();
        for m in self.members() {
            match s.members[m].role {
                Role::Primary => {
                    self.primary(s, m, out);
                    self.leader(s, m, out);
                }
                Role::Standby => self.standby(s, m, out),
                Role::Down => self.down(s, m, out),
                Role::Empty | Role::Cloning => self.copying(s, m, out),
            }
            self.faults(s, m, out);
        }
        self.election(s, out);
        if self.config.promises {
            promises::events(self, s, out);
        }
        for (_, next, broken) in out.iter_mut() {
            if broken.is_none() {
                *broken = self.inconsistent(next);
            }
        }
    }

    // --- PostgreSQL

    fn primary(&self, s: &State, p: usize, out: &mut Vec<Next>) {
        let me = &s.members[p];
        if s.used.writes < self.config.writes && me.log.has_room() {
            let mut next = *s;
            next.used.writes += 1;
            let me = &mut next.members[p];
            me.log = me.log.push(me.lead.term);
            let broken = if me.lead.waits {
                None
            } else {
                self.release(&mut next, p, usize::MAX)
            };
            out.push((Action::Write(p), next, broken));
        }
        for m in self.members() {
            let sender = me.senders[m];
            if sender.incarnation == 0 {
                continue;
            }
            if sender.reported > sender.flush {
                let mut next = *s;
                next.members[p].senders[m].flush = sender.reported;
                let broken = self.release_by(&mut next, p, m);
                out.push((Action::Ack(p, m), next, broken));
            }
            if sender.config != me.lead.configured {
                let mut next = *s;
                next.members[p].senders[m].config = me.lead.configured;
                let broken = self.release_by(&mut next, p, m);
                prove(&mut next.members[p]);
                out.push((Action::Reread(p, m), next, broken));
            }
            if sender.closed {
                let mut next = *s;
                next.members[p].senders[m] = Sender::default();
                prove(&mut next.members[p]);
                out.push((Action::Gone(p, m), next, None));
            }
        }
        if me.lead.waits != (me.lead.configured.k() > 0) {
            let mut next = *s;
            next.members[p].lead.waits = !me.lead.waits;
            // Switched off, it wakes everybody who waits.
            let broken = if me.lead.waits {
                self.release(&mut next, p, usize::MAX)
            } else {
                None
            };
            prove(&mut next.members[p]);
            out.push((Action::RereadFlag(p), next, broken));
        }
    }

    fn standby(&self, s: &State, m: usize, out: &mut Vec<Next>) {
        let me = &s.members[m];
        if let Some(p) = usize::from(me.upstream).checked_sub(1) {
            let record = s.members[p].log.at(me.log.len());
            if record != 0 && continues(me.log, s.members[p].log) {
                let mut next = *s;
                let mine = &mut next.members[m];
                mine.log = mine.log.push(record);
                let (len, incarnation) = (small(mine.log.len()), mine.incarnation);
                let sender = &mut next.members[p].senders[m];
                if sender.incarnation == incarnation && !sender.closed {
                    sender.reported = len;
                }
                out.push((Action::Receive(m, p), next, None));
            }
        }
        for p in self.members().filter(|p| *p != m) {
            let up = &s.members[p];
            let free = up.senders[m].incarnation == 0;
            // A sealed member never streams from a leader of a lower term; one that streams leaves its
            // upstream for a leader of a higher term only.
            let forgets = me.kind == Kind::Receiver && self.is_broken(Broken::ReceiverForgetsFloor);
            let floor = if forgets {
                0
            } else {
                me.floor + u8::from(me.upstream != 0)
            };
            if up.role != Role::Primary || !free || up.lead.term < floor {
                continue;
            }
            // A receiver keeps WAL of every timeline: what it holds of the leader's is what they have in common.
            let receiver = me.kind == Kind::Receiver;
            if receiver || continues(me.log, up.log) {
                let mut next = *s;
                end_receiver(&mut next, m);
                let mine = &mut next.members[m];
                mine.log = if receiver {
                    me.log.common(up.log)
                } else {
                    me.log
                };
                let held = small(mine.log.len());
                mine.floor = up.lead.term;
                mine.upstream = small(p + 1);
                next.members[p].senders[m] = Sender {
                    config: up.lead.configured,
                    incarnation: me.incarnation,
                    flush: 0,
                    reported: held,
                    closed: false,
                };
                out.push((Action::Connect(m, p), next, None));
            } else if let Some(incarnation) = self.reborn(me) {
                let mut next = *s;
                begin_copy(&mut next, m, incarnation);
                out.push((Action::BeginRewind(m), next, None));
            }
        }
    }

    /// The next incarnation of a data directory, if the bounds allow for one.
    fn reborn(&self, me: &Member) -> Option<u8> {
        if self.is_broken(Broken::IncarnationForgotten) {
            return Some(BORN);
        }
        (me.incarnation <= self.config.losses + 1).then_some(me.incarnation + 1)
    }

    fn down(&mut self, s: &State, m: usize, out: &mut Vec<Next>) {
        let mut next = *s;
        let me = &mut next.members[m];
        me.role = Role::Standby;
        me.lead = Lead::default();
        cut_off_from(&mut next, m);
        out.push((Action::Start(m), next, None));
        // The leader of a term whose lease has never lapsed: nobody can have opened the next election.
        let lead = s.members[m].lead;
        let leads =
            s.leader == small(m + 1) && s.term == lead.term && lead.right != Right::Promises;
        let was_primary = s.members[m].log.last() == lead.term;
        let lease = !self.config.promises || lead.right == Right::Lease;
        let begins = self.begins(lead.known);
        if leads && was_primary && lease && self.settled(&lead, begins) {
            let mut next = *s;
            cut_off_from(&mut next, m);
            let me = &mut next.members[m];
            me.role = Role::Primary;
            in_force_from_the_start(me, begins);
            out.push((Action::StartInPlace(m), next, None));
        } else if leads && was_primary && lease {
            settle(s, m, out);
        }
    }

    fn copying(&self, s: &State, m: usize, out: &mut Vec<Next>) {
        let me = &s.members[m];
        if me.role == Role::Empty {
            if let Some(incarnation) = self.reborn(me) {
                let mut next = *s;
                begin_copy(&mut next, m, incarnation);
                out.push((Action::BeginClone(m), next, None));
            }
            return;
        }
        for from in self.members() {
            let source = &s.members[from];
            // A receiver has no database to copy, and begins with what the leader has.
            let role = source.role == Role::Primary
                || source.role == Role::Standby && me.kind != Kind::Receiver;
            if role && source.kind != Kind::Receiver {
                let mut next = *s;
                let me = &mut next.members[m];
                me.log = s.members[from].log;
                me.role = Role::Standby;
                out.push((Action::EndClone(m, from), next, None));
            }
        }
    }

    fn faults(&self, s: &State, m: usize, out: &mut Vec<Next>) {
        let me = &s.members[m];
        let runs = matches!(me.role, Role::Standby | Role::Primary);
        if runs && s.used.crashes < self.config.crashes {
            let mut next = *s;
            next.used.crashes += 1;
            end_postgres(&mut next, m);
            out.push((Action::Crash(m), next, None));
        }
        if me.role != Role::Empty && s.used.losses < self.config.losses {
            let mut next = *s;
            next.used.losses += 1;
            end_postgres(&mut next, m);
            cut_off_from(&mut next, m);
            next.members[m] = Member {
                kind: me.kind,
                incarnation: me.incarnation,
                ..Member::default()
            };
            out.push((Action::LoseDisk(m), next, None));
        }
    }

    // --- the leader's agent

    /// `decide`'s rule: nothing proposed on this revision may be left uncovered by what PostgreSQL waits for.
    fn settled(&mut self, lead: &Lead, set: Set) -> bool {
        if self.is_broken(Broken::Unsettled) {
            return true;
        }
        let by_set = self.is_broken(Broken::UnsettledMode);
        let asked = lead
            .proposed
            .map(|p| p.map(|other| if by_set { other } else { self.begins(other) }));
        !lead.earlier_life
            && asked
                .iter()
                .flatten()
                .all(|names| self.rules.covers(set, *names))
    }

    fn leader(&mut self, s: &State, p: usize, out: &mut Vec<Next>) {
        let lead = s.members[p].lead;
        if !lead.fresh {
            let mut next = *s;
            if s.term == lead.term && s.leader == small(p + 1) {
                let lead = &mut next.members[p].lead;
                lead.known = s.sync;
                lead.fresh = true;
                lead.earlier_life = false;
                lead.proposed = [None; 2];
            } else {
                // Deposed: PostgreSQL is killed before anything else.
                end_postgres(&mut next, p);
            }
            out.push((Action::Learn(p), next, None));
        }
        if s.used.restarts < self.config.restarts && s.term == lead.term {
            let mut next = *s;
            next.used.restarts += 1;
            let lead = &mut next.members[p].lead;
            lead.known = s.sync;
            lead.fresh = true;
            lead.earlier_life = true;
            lead.proposed = [None; 2];
            lead.proof = Proof::None;
            lead.barrier = 0;
            lead.promises = [0; MEMBERS_MAX];
            if lead.right != Right::Promises {
                out.push((Action::RestartAgent(p), next, None));
            }
        }
        if lead.proof == Proof::None {
            let names = self.begins(lead.known);
            let closed = lead.configured.k() == Set::CLOSED;
            let set = if !closed && self.rules.covers(lead.configured, names) {
                lead.configured
            } else {
                names
            };
            if self.settled(&lead, set) {
                let mut next = *s;
                configure(&mut next.members[p], set, false);
                out.push((Action::ProveAgain(p, set), next, None));
            } else {
                settle(s, p, out);
            }
        }
        if lead.proof == Proof::Done {
            self.change(s, p, out);
        }
    }

    /// Every change of (V, k) that could be wished for now.
    fn change(&mut self, s: &State, p: usize, out: &mut Vec<Next>) {
        if s.used.changes >= self.config.changes {
            return;
        }
        let me = s.members[p];
        let mut steps: Vec<Step> = Vec::new();
        let wishes = self.config.wishes.clone();
        let choices = (0..1usize << self.config.members).filter(|c| c & (1 << p) == 0);
        for (chosen, wish) in choices.flat_map(|c| wishes.iter().map(move |w| (c, *w))) {
            let mut wanted = Set::default();
            let mut possible = true;
            for m in self.members().filter(|m| chosen & (1 << m) != 0) {
                let incarnation = match me.senders[m].incarnation {
                    0 => me.lead.known.incarnation(m),
                    streams => streams,
                };
                // In `async` a receiver could neither follow nor promise.
                let counts = wish.keeps() || s.members[m].kind != Kind::Receiver;
                possible &= incarnation != 0 && counts;
                wanted = wanted.with(m, incarnation);
            }
            for k in self.config.wanted_k_max.min(1)..=self.config.wanted_k_max {
                let question = Question {
                    coordinator: me.lead.known,
                    postgres: me.lead.configured,
                    wish,
                    wanted: wanted.with_k(k),
                    barrier: me.lead.barrier,
                    senders: me.senders.map(|b| (b.incarnation, b.flush)),
                };
                let step = self.step(question, &me);
                if possible && step != Step::Nothing && !steps.contains(&step) {
                    steps.push(step);
                }
            }
        }
        for step in steps {
            match step {
                Step::SetPostgres(set) if !self.settled(&me.lead, set) => settle(s, p, out),
                Step::SetPostgres(set) => {
                    let mut next = *s;
                    next.used.changes += 1;
                    let reloaded = self.is_broken(Broken::NotProven);
                    configure(&mut next.members[p], set, reloaded);
                    out.push((Action::SetPostgres(p, set), next, None));
                }
                // What the promises at hand do not block an election under may not become the sync set.
                Step::SetCoordinator(set) if promises::cover(self, &me.lead, set) => {
                    propose(s, p, set, out);
                }
                Step::SetCoordinator(_) | Step::Nothing => {}
            }
        }
    }

    fn step(&mut self, question: Question, me: &Member) -> Step {
        let raise = question.wanted.k() > question.coordinator.k();
        let from_async = !question.coordinator.mode().keeps() && question.wish.keeps();
        let skip = match self.config.broken {
            Some(Broken::NoWaitOnRemoval) => !raise,
            Some(Broken::NoWaitOnRaise) => raise,
            Some(Broken::ModeBeforeFlush) => from_async,
            _ => false,
        };
        let mut question = question;
        if skip {
            question.barrier = 0;
        }
        let strict = question.coordinator.mode() == Mode::Strict;
        if strict && question.wish == Mode::Strict && self.is_broken(Broken::StrictGoesAlone) {
            question.coordinator = question.coordinator.with_mode(Mode::Quorum);
            question.wish = Mode::Quorum;
            return match self.rules.step(&question) {
                Step::SetCoordinator(set) => Step::SetCoordinator(set.with_mode(Mode::Strict)),
                step => step,
            };
        }
        let to_async = question.coordinator.mode().keeps() && !question.wish.keeps();
        if to_async && self.is_broken(Broken::AsyncPostgresFirst) {
            return Step::SetPostgres(Set::default());
        }
        let step = self.rules.step(&question);
        match step {
            Step::SetPostgres(set)
                if self.is_broken(Broken::CoordinatorFirst) && set != me.lead.known =>
            {
                Step::SetCoordinator(set)
            }
            _ => step,
        }
    }

    /// Everything up to `upto` is acknowledged by `p`; a later leader must have it.
    fn release(&self, s: &mut State, p: usize, upto: usize) -> Option<String> {
        let me = &s.members[p];
        let done = me.log.prefix(upto.min(me.log.len()));
        let term = me.lead.term;
        if term < s.won() {
            // From an election in `async` on, what a former leader acknowledges may be lost.
            let all_kept = (term + 1..=s.won()).all(|t| s.kept & (1 << t) != 0);
            if !all_kept {
                return None;
            }
            if !done.begins(s.line) {
                return Some(format!(
                    "LOST: the leader of term {term} acknowledges what the leader of term {} does not have",
                    s.won()
                ));
            }
        }
        if done.len() > s.acknowledged.len() {
            s.acknowledged = done;
            let strict = s.sync.mode() == Mode::Strict && term == s.term;
            let copies = self.members().filter(|m| *m != p);
            let copies = copies.filter(|m| done.begins(s.members[*m].log)).count();
            if strict && copies < self.config.wanted_k_max as usize {
                return Some(format!(
                    "strict: a commit was acknowledged on {copies} others"
                ));
            }
        }
        None
    }

    /// A WAL sender releases what k of the set that *it* has read have flushed (`SyncRepReleaseWaiters`).
    fn release_by(&self, s: &mut State, p: usize, sender: usize) -> Option<String> {
        let me = &s.members[p];
        let own = me.senders[sender];
        let set = own.config;
        if !set.holds(sender, own.incarnation) || set.k() == 0 {
            return None;
        }
        let mut flushed: Vec<u8> = (0..MEMBERS_MAX)
            .filter(|m| set.holds(*m, me.senders[*m].incarnation))
            .map(|m| me.senders[m].flush)
            .collect();
        flushed.sort_unstable_by(|a, b| b.cmp(a));
        let upto = *flushed.get(set.k() as usize - 1)?;
        self.release(s, p, usize::from(upto))
    }

    /// What must hold in every state: one primary a term, and one content of each timeline.
    fn inconsistent(&self, s: &State) -> Option<String> {
        for a in self.members() {
            for b in a + 1..self.config.members {
                let (x, y) = (&s.members[a], &s.members[b]);
                let primaries = x.role == Role::Primary && y.role == Role::Primary;
                if primaries && x.lead.term == y.lead.term {
                    return Some(format!("two primaries in term {}", x.lead.term));
                }
                let shared = x.log.len().min(y.log.len());
                let same = (0..shared)
                    .rev()
                    .find(|i| x.log.at(*i) == y.log.at(*i))
                    .map_or(0, |i| i + 1);
                if x.log.prefix(same) != y.log.prefix(same) {
                    return Some("one timeline has two contents".into());
                }
            }
        }
        None
    }
}

/// By the numbers, as PostgreSQL looks: does `log` end on `other`'s history?
pub(super) fn continues(log: Log, other: Log) -> bool {
    log.len() > 0 && log.len() <= other.len() && other.at(log.len() - 1) == log.last()
}

/// What PostgreSQL waits for is changed; `reloaded` takes that for the proof.
fn configure(me: &mut Member, set: Set, reloaded: bool) {
    me.lead.configured = set;
    me.lead.barrier = 0;
    me.lead.proof = Proof::Pending;
    prove(me);
    if reloaded {
        me.lead.proof = Proof::Done;
        me.lead.barrier = small(me.log.len());
    }
}

/// The proof is made as soon as it can be: a later one has a higher barrier, which only waits for more.
fn prove(me: &mut Member) {
    let lead = &mut me.lead;
    let all = me
        .senders
        .iter()
        .all(|b| b.incarnation == 0 || b.config == lead.configured);
    if lead.proof == Proof::Pending && all && lead.waits == (lead.configured.k() > 0) {
        lead.proof = Proof::Done;
        lead.barrier = small(me.log.len());
    }
}

pub(super) fn in_force_from_the_start(me: &mut Member, set: Set) {
    me.senders = [Sender::default(); MEMBERS_MAX];
    me.lead.configured = set;
    me.lead.waits = set.k() > 0;
    me.lead.proof = Proof::Done;
    me.lead.barrier = small(me.log.len());
}

/// The leadership was written: whoever knew the newest knows it no longer.
pub(super) fn stale(s: &mut State) {
    for m in &mut s.members {
        m.lead.fresh = false;
    }
}

/// A transaction on the leadership is done on the revision that its writer knew, or never. That it may be
/// done late, or done with its answer lost, is one thing: it is done now, and its writer has not heard of it.
fn propose(s: &State, p: usize, set: Set, out: &mut Vec<Next>) {
    let mut next = *s;
    next.used.changes += 1;
    remember(&mut next.members[p].lead, set);
    out.push((Action::Propose(p, set, false), next, None));
    if s.members[p].lead.fresh {
        next.sync = set;
        stale(&mut next);
        out.push((Action::Propose(p, set, true), next, None));
    }
}

/// Remembers a proposal; with too many of them the agent is as one that knows of none.
pub(super) fn remember(lead: &mut Lead, set: Set) {
    if !lead.proposed.contains(&Some(set)) {
        match lead.proposed.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(set),
            None => lead.earlier_life = true,
        }
        lead.proposed.sort_unstable();
    }
}

/// Writes the leadership unchanged: whatever was proposed on the old revision is void.
fn settle(s: &State, p: usize, out: &mut Vec<Next>) {
    if !s.members[p].lead.fresh || out.iter().any(|(a, ..)| *a == Action::Settle(p)) {
        return;
    }
    let mut next = *s;
    stale(&mut next);
    out.push((Action::Settle(p), next, None));
}

/// The WAL receiver ends; what it has reported may still arrive.
pub(super) fn end_receiver(s: &mut State, m: usize) {
    let up = std::mem::take(&mut s.members[m].upstream);
    if let Some(p) = usize::from(up).checked_sub(1) {
        let sender = &mut s.members[p].senders[m];
        sender.closed |= sender.incarnation != 0;
    }
}

/// What is under way from a member does not arrive any more: it is another data directory, or another run.
fn cut_off_from(s: &mut State, m: usize) {
    for other in &mut s.members {
        if other.upstream == small(m + 1) {
            other.upstream = 0;
        }
    }
}

/// PostgreSQL ends. What it has sent may still arrive.
pub(super) fn end_postgres(s: &mut State, m: usize) {
    end_receiver(s, m);
    let me = &mut s.members[m];
    if matches!(me.role, Role::Standby | Role::Primary) {
        me.role = Role::Down;
    }
    me.senders = [Sender::default(); MEMBERS_MAX];
}

/// A new incarnation begins; its floor is the term that the coordinator has now.
fn begin_copy(s: &mut State, m: usize, incarnation: u8) {
    end_postgres(s, m);
    cut_off_from(s, m);
    let floor = s.term.max(s.members[m].floor);
    s.members[m] = Member {
        kind: s.members[m].kind,
        incarnation,
        floor,
        role: Role::Cloning,
        promised: s.members[m].promised,
        ..Member::default()
    };
}
