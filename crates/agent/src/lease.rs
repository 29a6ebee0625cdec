//! Keeps the lease: renews it on time, counts its deadline from before the sending, tells the fence.
//!
//! Runs on a runtime of its own, away from everything that hashes, compresses or waits for a disk
//! (failover protocol, 2.3). A renewal that is slow does not hold up the next one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_coordinator::api::{Coordinator, CoordinatorError};
use craton_core::decide::LeaseWish;
use craton_core::observe::Lease;
use craton_core::{BootTime, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::clock;

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
}

struct Shared {
    lease: Mutex<Option<Lease>>,
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
        coordinator: Arc<dyn Coordinator>,
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
            lease: Mutex::new(inherited),
            counts: Mutex::new(LeaseCounts::default()),
            file,
            sink,
            changed,
            given_up: AtomicU64::new(0),
            wished_at: AtomicU64::new(clock::now().0),
        });
        tokio::spawn(keep(coordinator, Arc::clone(&shared), wishes));
        Self { shared, wish }
    }

    /// The lease as it stands; it may have run out.
    pub fn get(&self) -> Option<Lease> {
        *self
            .shared
            .lease
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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

    /// What to do from now on. A release takes effect here at once, before anybody is told.
    pub fn wish(&self, wish: LeaseWish, timing: LeaseTiming) {
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
    fn accept(&self, term: Term, until: BootTime) {
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        if term.0 <= self.given_up.load(Ordering::SeqCst) {
            return;
        }
        let newer = lease.is_none_or(|l| l.term < term || (l.term == term && l.until < until));
        if !newer {
            return;
        }
        let next = Lease { term, until };
        *lease = Some(next);
        (self.sink)(Some(until));
        self.file.write(next);
        drop(lease);
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    fn drop_lease(&self, term: Term) {
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        self.given_up.fetch_max(term.0, Ordering::SeqCst);
        if lease.is_some_and(|l| l.term <= term) {
            *lease = None;
            (self.sink)(None);
            self.file.remove();
        }
    }

    /// The agent still decides.
    fn is_wished(&self, timing: LeaseTiming, now: BootTime) -> bool {
        let at = BootTime(self.wished_at.load(Ordering::SeqCst));
        now.since(at) <= WISH_AGE_MAX.max(timing.ttl.saturating_mul(2))
    }

    fn count(&self, ok: bool) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if ok {
            counts.renewed += 1;
        } else {
            counts.failed += 1;
        }
    }
}

async fn keep(
    coordinator: Arc<dyn Coordinator>,
    shared: Arc<Shared>,
    mut wishes: watch::Receiver<(LeaseWish, LeaseTiming)>,
) {
    let mut renewals = JoinSet::new();
    let mut released = Term(0);
    loop {
        let (wish, timing) = *wishes.borrow_and_update();
        while renewals.try_join_next().is_some() {}
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

async fn renew(
    coordinator: Arc<dyn Coordinator>,
    shared: Arc<Shared>,
    term: Term,
    timing: LeaseTiming,
) {
    match coordinator.renew(term, timing.ttl).await {
        Ok(renewal) => {
            shared.accept(
                term,
                renewal
                    .sent_at
                    .after(timing.ttl.saturating_sub(timing.margin)),
            );
            shared.count(true);
        }
        Err(error) => {
            shared.count(false);
            match error {
                CoordinatorError::Refused(why) => {
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
    use super::*;

    fn shared(dir: &Path) -> Shared {
        Shared {
            lease: Mutex::new(None),
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
        shared.accept(Term(4), BootTime(99));
        assert!(shared.file.read().is_some());
        shared.drop_lease(Term(4));
        shared.accept(Term(4), BootTime(100));
        assert_eq!(*shared.lease.lock().unwrap(), None);
        assert_eq!(shared.file.read(), None, "nor for the next agent");
        shared.accept(Term(5), BootTime(101));
        assert_eq!(shared.file.read().map(|l| l.term), Some(Term(5)));
    }

    #[test]
    fn a_shorter_ttl_takes_nothing_away_from_a_lease_that_was_granted() {
        // Voters keep the longest promise they gave (`promise.rs`), so the deadline does not go back either.
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        shared.accept(Term(4), BootTime(100));
        shared.accept(Term(4), BootTime(60));
        let held = shared.lease.lock().unwrap().map(|l| l.until);
        assert_eq!(held, Some(BootTime(100)));
        assert_eq!(shared.file.read().map(|l| l.until), Some(BootTime(100)));
        shared.accept(Term(4), BootTime(120));
        let held = shared.lease.lock().unwrap().map(|l| l.until);
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
