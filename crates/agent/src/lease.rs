//! Keeps the lease: renews it on time, counts its deadline from before the sending, tells the fence.
//!
//! Runs on a runtime of its own, away from everything that hashes, compresses or waits for a disk
//! (failover protocol, 2.3). A renewal that is slow does not hold up the next one.
//!
//! When renewals fail for a third of the ttl the members of V are asked for their promises (2.7): the deadline
//! is the later of what the voters and what the standbys make it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_coordinator::api::{Coordinator, CoordinatorError};
use craton_core::decide::LeaseWish;
use craton_core::observe::Lease;
use craton_core::promise::{Ask, Ledger};
use craton_core::{BootTime, Incarnation, MemberId, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::clock;
use crate::promises::{AskPromise, Plan};

/// Questions to standbys under way at once.
const ASKS_MAX: usize = 32;

/// Renewals under way at once: more means that nothing answers, and another would not either.
const RENEWALS_MAX: usize = 8;

/// A decision to hold the lease that is older than this (or than two ttls) is not acted upon any more: the
/// agent's loop hangs, for example because PostgreSQL's processes hang in a dead disk and cannot be killed.
/// Then somebody else must be able to lead.
const WISH_AGE_MAX: Duration = Duration::from_secs(5);

/// Who is told of every new deadline before anybody else may act on it.
pub type DeadlineSink = Arc<dyn Fn(Option<BootTime>) + Send + Sync>;

/// How long the lease lasts, as the settings have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseTiming {
    /// The lease's length.
    pub ttl: Duration,
    /// What the own deadline keeps away from its end.
    pub margin: Duration,
    /// The renewal interval.
    pub heartbeat: Duration,
}

/// Counters for the metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LeaseCounts {
    /// Renewals that a majority accepted.
    pub renewed: u64,
    /// Renewals that failed or came too late.
    pub failed: u64,
    /// Promises that standbys gave.
    pub promised: u64,
}

/// What is held, and what it rests on.
#[derive(Default)]
struct Held {
    /// The lease: its deadline is the later of `base` and what the promises come to.
    lease: Option<Lease>,
    /// By renewals; or as an earlier life of the agent left it.
    base: Option<Lease>,
    /// The newest renewal: its term, and when it was sent.
    renewed: Option<(Term, BootTime)>,
    /// Standby promises.
    ledger: Ledger,
    /// Whose promises would do, and where they are asked.
    plan: Arc<Plan>,
    /// Since when the deadline rests on promises, or on what an earlier life left.
    living_since: Option<BootTime>,
    /// The voters have called this term over: promises do not bring it back.
    refused: Term,
}

struct Shared {
    me: MemberId,
    lease: Mutex<Held>,
    counts: Mutex<LeaseCounts>,
    file: LeaseFile,
    sink: DeadlineSink,
    changed: watch::Sender<u64>,
    /// The highest term that was given up; a renewal still on its way does not bring it back. Changed under
    /// the lock of `lease` only.
    given_up: AtomicU64,
    /// When the wish was last expressed, nanoseconds on the boot-time clock.
    wished_at: AtomicU64,
}

/// The keeper's handle.
#[derive(Clone)]
pub struct LeaseKeeper {
    shared: Arc<Shared>,
    wish: watch::Sender<(LeaseWish, LeaseTiming)>,
}

impl LeaseKeeper {
    /// Starts the keeper on the current runtime. A lease that an earlier agent of this member took, and
    /// that has not run out, is taken over (rule 2.6).
    pub fn start(
        me: MemberId,
        (coordinator, asker): (Arc<dyn Coordinator>, Arc<dyn AskPromise>),
        dir: &Path,
        timing: LeaseTiming,
        sink: DeadlineSink,
    ) -> Self {
        let file = LeaseFile::of(dir);
        file.move_former();
        let inherited = file.read().filter(|l| l.until > clock::now());
        sink(inherited.map(|l| l.until));
        let (changed, _) = watch::channel(0);
        let (wish, wishes) = watch::channel((LeaseWish::Leave, timing));
        let shared = Arc::new(Shared {
            me,
            lease: Mutex::new(Held {
                lease: inherited,
                base: inherited,
                // It may rest on promises that this life knows nothing of.
                living_since: inherited.map(|_| clock::now()),
                ..Held::default()
            }),
            counts: Mutex::new(LeaseCounts::default()),
            file,
            sink,
            changed,
            given_up: AtomicU64::new(0),
            wished_at: AtomicU64::new(clock::now().0),
        });
        tokio::spawn(keep(coordinator, asker, Arc::clone(&shared), wishes));
        Self { shared, wish }
    }

    /// The lease as it stands; it may have run out.
    pub fn get(&self) -> Option<Lease> {
        self.shared.held().lease
    }

    /// Since when the lease rests on standby promises, and whose run.
    pub fn promises(&self) -> (Option<BootTime>, Vec<MemberId>) {
        let held = self.shared.held();
        let from = held.ledger.running(clock::now()).cloned().collect();
        (held.living_since, from)
    }

    /// Counters.
    pub fn counts(&self) -> LeaseCounts {
        *self
            .shared
            .counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes with the lease.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Nothing of this term is held any more, here and for an agent that starts next; renewals of it end.
    /// Comes before the coordinator is told.
    pub fn give_up(&self, term: Term) {
        self.shared.drop_lease(term);
    }

    /// What to do from now on, and whose promises would do where renewals fail. A release takes effect here at
    /// once, before anybody is told; and so does a plan that asks for more promises than there are.
    pub fn wish(&self, wish: LeaseWish, timing: LeaseTiming, plan: Plan) {
        self.shared.set_plan(plan);
        if let LeaseWish::Release(term) = wish {
            self.shared.drop_lease(term);
        }
        self.shared
            .wished_at
            .store(clock::now().0, Ordering::SeqCst);
        self.wish.send_if_modified(|now| {
            let next = (wish, timing);
            let differs = *now != next;
            *now = next;
            differs
        });
    }
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A majority of voters accepted a renewal that was sent at `sent_at`.
    fn accept(&self, term: Term, sent_at: BootTime, until: BootTime) {
        let mut held = self.held();
        if term.0 <= self.given_up.load(Ordering::SeqCst) {
            return;
        }
        let next = Lease { term, until };
        if later(held.base, next) {
            held.base = Some(next);
        }
        if held.renewed.is_none_or(|r| r < (term, sent_at)) {
            held.renewed = Some((term, sent_at));
        }
        self.settle(held);
    }

    /// A standby promised; the deadline it gives is `until`.
    fn promised(&self, term: Term, member: &MemberId, incarnation: Incarnation, until: BootTime) {
        let mut held = self.held();
        if term.0 <= self.given_up.load(Ordering::SeqCst) || held.refused >= term {
            return;
        }
        held.ledger.promised(term, member, incarnation, until);
        self.settle(held);
    }

    fn set_plan(&self, plan: Plan) {
        let mut held = self.held();
        if *held.plan == plan {
            return;
        }
        held.plan = Arc::new(plan);
        self.settle(held);
    }

    /// The deadline anew, from renewals and promises. It may come nearer: a change of the sync set that is about
    /// to be proposed asks for other promises than those that are there.
    fn settle(&self, mut held: MutexGuard<'_, Held>) {
        let Some(base) = held.base else { return };
        let by_promises = held.ledger.deadline(base.term, &held.plan.needs);
        let until = by_promises.map_or(base.until, |t| t.max(base.until));
        let next = Lease {
            term: base.term,
            until,
        };
        let inherited = held.renewed.is_none_or(|(term, _)| term != base.term);
        if until > base.until || inherited {
            held.living_since.get_or_insert_with(clock::now);
        } else {
            held.living_since = None;
        }
        if held.lease == Some(next) {
            return;
        }
        held.lease = Some(next);
        (self.sink)(Some(until));
        self.file.write(next);
        drop(held);
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    fn drop_lease(&self, term: Term) {
        let mut held = self.held();
        self.given_up.fetch_max(term.0, Ordering::SeqCst);
        if held.lease.is_some_and(|l| l.term <= term) {
            held.lease = None;
            held.base = None;
            held.living_since = None;
            (self.sink)(None);
            self.file.remove();
        }
    }

    /// Whom to ask for a promise now: nobody while renewals come through, or where the voters refuse the term.
    /// A renewal is late a third of the ttl after the last one that was granted, and no sooner than half a heartbeat
    /// after it was to be sent: a heartbeat may be a third of the ttl.
    fn to_ask(&self, term: Term, timing: LeaseTiming, now: BootTime) -> Option<Arc<Plan>> {
        let late = (timing.ttl / 3).max(timing.heartbeat.saturating_mul(3) / 2);
        let held = self.held();
        let fresh = held
            .renewed
            .is_some_and(|(t, sent_at)| t == term && now.since(sent_at) < late);
        let leads = held.lease.is_some_and(|l| l.term == term);
        (leads && !fresh && held.refused < term).then(|| Arc::clone(&held.plan))
    }

    fn refuse(&self, term: Term) {
        let mut held = self.held();
        held.refused = held.refused.max(term);
    }

    /// The agent still decides.
    fn is_wished(&self, timing: LeaseTiming, now: BootTime) -> bool {
        let at = BootTime(self.wished_at.load(Ordering::SeqCst));
        now.since(at) <= WISH_AGE_MAX.max(timing.ttl.saturating_mul(2))
    }

    fn count(&self, add: impl FnOnce(&mut LeaseCounts)) {
        add(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn later(known: Option<Lease>, next: Lease) -> bool {
    known.is_none_or(|l| (l.term, l.until) < (next.term, next.until))
}

async fn keep(
    coordinator: Arc<dyn Coordinator>,
    asker: Arc<dyn AskPromise>,
    shared: Arc<Shared>,
    mut wishes: watch::Receiver<(LeaseWish, LeaseTiming)>,
) {
    let mut renewals = JoinSet::new();
    let mut asks = JoinSet::new();
    let mut released = Term(0);
    loop {
        let (wish, timing) = *wishes.borrow_and_update();
        while renewals.try_join_next().is_some() {}
        while asks.try_join_next().is_some() {}
        match wish {
            LeaseWish::Hold(term) if term.0 > shared.given_up.load(Ordering::SeqCst) => {
                if !shared.is_wished(timing, clock::now()) {
                    tracing::warn!(%term, "the agent has not decided anything for too long: the lease is left to run out");
                } else if renewals.len() < RENEWALS_MAX {
                    renewals.spawn(renew(
                        Arc::clone(&coordinator),
                        Arc::clone(&shared),
                        term,
                        timing,
                    ));
                }
                if shared.is_wished(timing, clock::now()) {
                    ask_all(&mut asks, &asker, &shared, term, timing);
                }
            }
            LeaseWish::Release(term) if term > released => {
                // No renewal of this term may be on its way when it is released.
                renewals.shutdown().await;
                shared.drop_lease(term);
                released = term;
                if let Err(error) = coordinator.release(term).await {
                    tracing::warn!(%term, %error, "the lease could not be released; it runs out by itself");
                }
                continue;
            }
            _ => {}
        }
        tokio::select! {
            changed = wishes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(timing.heartbeat) => {}
        }
    }
}

/// Asks everybody whose promise would do. The answers come in on their own; a round that is slow does not hold up
/// the next one.
fn ask_all(
    asks: &mut JoinSet<()>,
    asker: &Arc<dyn AskPromise>,
    shared: &Arc<Shared>,
    term: Term,
    timing: LeaseTiming,
) {
    let Some(plan) = shared.to_ask(term, timing, clock::now()) else {
        return;
    };
    for ((member, incarnation), address) in plan.targets() {
        if asks.len() >= ASKS_MAX {
            return;
        }
        let (asker, shared) = (Arc::clone(asker), Arc::clone(shared));
        asks.spawn(async move {
            let ask = Ask {
                leader: shared.me.clone(),
                term,
                incarnation,
                ttl_ms: u64::try_from(timing.ttl.as_millis()).unwrap_or(u64::MAX),
            };
            let sent_at = clock::now();
            match asker.ask(&address, &ask, timing.ttl / 2).await {
                Ok(()) => {
                    let until = sent_at.after(timing.ttl.saturating_sub(timing.margin));
                    shared.promised(term, &member, incarnation, until);
                    shared.count(|c| c.promised += 1);
                }
                Err(why) => tracing::debug!(%term, %member, why, "no promise"),
            }
        });
    }
}

async fn renew(
    coordinator: Arc<dyn Coordinator>,
    shared: Arc<Shared>,
    term: Term,
    timing: LeaseTiming,
) {
    match coordinator.renew(term, timing.ttl).await {
        Ok(renewal) => {
            let until = renewal
                .sent_at
                .after(timing.ttl.saturating_sub(timing.margin));
            shared.accept(term, renewal.sent_at, until);
            shared.count(|c| c.renewed += 1);
        }
        Err(error) => {
            shared.count(|c| c.failed += 1);
            match error {
                CoordinatorError::Refused(why) => {
                    shared.refuse(term);
                    tracing::warn!(%term, why, "the lease was refused");
                }
                error => tracing::debug!(%term, %error, "a renewal failed"),
            }
        }
    }
}

/// The lease, so that a restarted agent can take it over: term, deadline, and the boot it counts in. It means
/// nothing after a reboot, so it lies beside the fence's board, on tmpfs where there is one: noting a
/// renewal must not wait for a disk.
struct LeaseFile {
    path: PathBuf,
    /// Where earlier versions kept it; looked at once, at the start.
    former: PathBuf,
}

impl LeaseFile {
    fn of(member_dir: &Path) -> Self {
        Self {
            path: craton_fence::board_path(member_dir).with_extension("lease"),
            former: member_dir.join("lease"),
        }
    }

    /// An agent of an earlier version may have been replaced a moment ago.
    fn move_former(&self) {
        if let Ok(text) = std::fs::read_to_string(&self.former) {
            if !self.path.exists() {
                let _ = std::fs::write(&self.path, text);
            }
            let _ = std::fs::remove_file(&self.former);
        }
    }

    fn boot_id() -> Option<String> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().to_owned())
    }

    fn read(&self) -> Option<Lease> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let mut words = text.split_ascii_whitespace();
        let (term, until, boot) = (words.next()?, words.next()?, words.next()?);
        if Some(boot) != Self::boot_id().as_deref() {
            return None;
        }
        Some(Lease {
            term: Term(term.parse().ok()?),
            until: BootTime(until.parse().ok()?),
        })
    }

    fn write(&self, lease: Lease) {
        let Some(boot) = Self::boot_id() else { return };
        let text = format!("{} {} {boot}\n", lease.term, lease.until.0);
        let tmp = self.path.with_extension("tmp");
        let written = std::fs::write(&tmp, text).and_then(|()| std::fs::rename(&tmp, &self.path));
        if let Err(error) = written {
            // Costs a restarted agent its takeover, nothing else.
            tracing::debug!(path = %self.path.display(), %error, "cannot note the lease");
        }
    }

    fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use craton_core::promise::PromiseNeed;

    use super::*;

    fn id(name: &str) -> MemberId {
        MemberId::new(name).unwrap()
    }

    fn shared(dir: &Path) -> Shared {
        Shared {
            me: id("a"),
            lease: Mutex::new(Held::default()),
            counts: Mutex::new(LeaseCounts::default()),
            file: LeaseFile {
                path: dir.join("lease"),
                former: dir.join("former"),
            },
            sink: Arc::new(|_| {}),
            changed: watch::channel(0).0,
            given_up: AtomicU64::new(0),
            wished_at: AtomicU64::new(0),
        }
    }

    #[test]
    fn a_late_renewal_does_not_bring_back_what_was_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        shared.accept(Term(4), BootTime(9), BootTime(99));
        assert!(shared.file.read().is_some());
        shared.drop_lease(Term(4));
        shared.accept(Term(4), BootTime(10), BootTime(100));
        assert_eq!(shared.held().lease, None);
        assert_eq!(shared.file.read(), None, "nor for the next agent");
        shared.accept(Term(5), BootTime(11), BootTime(101));
        assert_eq!(shared.file.read().map(|l| l.term), Some(Term(5)));
    }

    /// So many promises of these members would do.
    fn plan(needs: &[(&[&str], usize)]) -> Plan {
        Plan {
            needs: needs
                .iter()
                .map(|(names, needed)| PromiseNeed {
                    members: names.iter().map(|n| (id(n), Incarnation(1))).collect(),
                    needed: *needed,
                })
                .collect(),
            addresses: ["b", "c"].map(|n| (id(n), format!("{n}:1"))).into(),
        }
    }

    fn until(shared: &Shared) -> Option<u64> {
        shared.held().lease.map(|l| l.until.0)
    }

    #[test]
    fn promises_carry_the_lease_while_renewals_fail() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        let promise = |n, t, at| shared.promised(Term(t), &id(n), Incarnation(1), BootTime(at));
        promise("b", 4, 500);
        assert_eq!(until(&shared), None, "no lease was ever taken");
        shared.accept(Term(4), BootTime(0), BootTime(100));
        promise("b", 4, 200);
        assert_eq!(until(&shared), Some(100), "nobody said that it would do");
        shared.set_plan(plan(&[(&["b", "c"], 2)]));
        assert_eq!(until(&shared), Some(100), "one of two");
        promise("c", 4, 150);
        assert_eq!(until(&shared), Some(150));
        assert!(shared.held().living_since.is_some());
        assert_eq!(shared.file.read().map(|l| l.until.0), Some(150));
        // A change that is about to be proposed needs the promise of somebody else.
        shared.set_plan(plan(&[(&["b", "c"], 2), (&["d"], 1)]));
        assert_eq!(until(&shared), Some(100), "the deadline comes nearer");
        shared.set_plan(plan(&[(&["b", "c"], 1)]));
        assert_eq!(until(&shared), Some(500));
        shared.accept(Term(4), BootTime(400), BootTime(499));
        assert!(
            shared.held().living_since.is_some(),
            "the promise is the later one"
        );
        shared.accept(Term(4), BootTime(401), BootTime(501));
        assert_eq!(
            (until(&shared), shared.held().living_since),
            (Some(501), None)
        );
        promise("b", 3, 900);
        assert_eq!(until(&shared), Some(501), "a promise of another term");
        shared.drop_lease(Term(4));
        promise("b", 4, 900);
        assert_eq!(until(&shared), None, "given up");
    }

    #[test]
    fn standbys_are_asked_only_when_renewals_fail_and_the_term_is_not_over() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        shared.set_plan(plan(&[(&["b", "c"], 1), (&["b", "x"], 1)]));
        let timing = |heartbeat| LeaseTiming {
            ttl: Duration::from_nanos(300),
            margin: Duration::from_nanos(30),
            heartbeat: Duration::from_nanos(heartbeat),
        };
        let asked = |heartbeat, at| {
            shared
                .to_ask(Term(4), timing(heartbeat), BootTime(at))
                .map(|p| p.targets().len())
        };
        let asks = |at| asked(45, at);
        assert_eq!(asks(1), None, "no lease");
        shared.accept(Term(4), BootTime(0), BootTime(270));
        assert_eq!(asks(99), None, "renewed a moment ago");
        assert_eq!(
            asks(100),
            Some(2),
            "each once, and only those whose address is known"
        );
        assert_eq!(asked(100, 149), None, "a heartbeat of a third of the ttl");
        assert_eq!(asked(100, 150), Some(2), "with it, one renewal is missing");
        shared.refuse(Term(4));
        assert_eq!(asks(100), None, "the voters called it over");
    }

    #[test]
    fn a_shorter_ttl_takes_nothing_away_from_a_lease_that_was_granted() {
        // Voters keep the longest promise they gave (`promise.rs`), so the deadline does not go back either.
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        shared.accept(Term(4), BootTime(0), BootTime(100));
        shared.accept(Term(4), BootTime(1), BootTime(60));
        let held = shared.held().lease.map(|l| l.until);
        assert_eq!(held, Some(BootTime(100)));
        assert_eq!(shared.file.read().map(|l| l.until), Some(BootTime(100)));
        shared.accept(Term(4), BootTime(2), BootTime(120));
        let held = shared.held().lease.map(|l| l.until);
        assert_eq!(held, Some(BootTime(120)));
    }

    #[test]
    fn an_old_wish_is_not_acted_upon() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        let timing = LeaseTiming {
            ttl: Duration::from_secs(2),
            margin: Duration::from_millis(200),
            heartbeat: Duration::from_millis(300),
        };
        let at = |seconds| BootTime(0).after(Duration::from_secs(seconds));
        assert!(shared.is_wished(timing, at(4)));
        assert!(!shared.is_wished(timing, at(6)));
    }

    #[test]
    fn a_lease_is_inherited_within_the_same_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let file = LeaseFile {
            path: dir.path().join("lease"),
            former: dir.path().join("former"),
        };
        assert_eq!(file.read(), None);
        let lease = Lease {
            term: Term(4),
            until: BootTime(99),
        };
        file.write(lease);
        assert_eq!(file.read(), Some(lease));
        std::fs::write(&file.path, "4 99 another-boot\n").unwrap();
        assert_eq!(file.read(), None);
        std::fs::write(&file.path, "4").unwrap();
        assert_eq!(file.read(), None);
        file.write(lease);
        std::fs::rename(&file.path, dir.path().join("former")).unwrap();
        file.move_former();
        assert_eq!(file.read(), Some(lease), "where an earlier version left it");
        file.remove();
        file.move_former();
        assert_eq!(file.read(), None);
    }
}
