//! Members that contend for the lead through a coordinator, as agents do, and a record of who believed what.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use craton_core::records::{Leadership, MemberRef};
use craton_core::settings::Durability;
use craton_core::sync::SyncSet;
use craton_core::{BootTime, Incarnation, MemberId, Term, TimelineId};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::api::{Compare, Coordinator, Op, Txn, TxnOutcome};
use crate::clock::Clock;

pub(crate) const TTL: Duration = Duration::from_millis(1500);
const MARGIN: Duration = Duration::from_millis(150);
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The record that this member leads.
pub(crate) fn leadership(term: Term, leader: &MemberId) -> String {
    let leadership = Leadership {
        term,
        leader: Some(MemberRef {
            member: leader.clone(),
            incarnation: Incarnation(1),
        }),
        previous: None,
        sync: SyncSet::default(),
        durability: Durability::default(),
        timeline: TimelineId(1),
        open: true,
        restarted: false,
        preferred: None,
        allow_data_loss: false,
        recovered: false,
        cause: "a test".to_owned(),
    };
    serde_json::to_string(&leadership).unwrap()
}

/// Who believed to hold which term, from when until when.
type Beliefs = BTreeMap<(Term, MemberId), (BootTime, BootTime)>;

/// Every stretch of time during which somebody believed to hold a lease.
#[derive(Clone, Default)]
pub(crate) struct Contest {
    beliefs: Arc<Mutex<Beliefs>>,
    over: Arc<AtomicBool>,
}

impl Contest {
    /// One member contends until the contest is over, or the task is aborted (it crashes).
    pub(crate) fn join(&self, me: MemberId, through: Arc<dyn Coordinator>) -> JoinHandle<()> {
        let contest = self.clone();
        tokio::spawn(async move {
            let mut known = None;
            for turn in 1_u32.. {
                sleep(Duration::from_millis(50)).await;
                if contest.over.load(Ordering::SeqCst) {
                    break;
                }
                // Now and then one is in a hurry: what keeps two from leading at once is the voters, not patience.
                let hurries = turn.is_multiple_of(20);
                contest
                    .turn(&me, through.as_ref(), &mut known, hurries)
                    .await;
            }
        })
    }

    /// `known`: the newest term that this member has seen, and since when. Like an agent it lets a term live for a ttl
    /// before it asks whether that is over: one that was just won is not renewed yet, so nothing speaks for it.
    async fn turn(
        &self,
        me: &MemberId,
        through: &dyn Coordinator,
        known: &mut Option<(Term, Instant)>,
        hurries: bool,
    ) {
        let Ok(seen) = through.read().await else {
            return;
        };
        let at = seen.get("leadership");
        let now: Option<Leadership> = at.map(|v| serde_json::from_str(&v.value).unwrap());
        let term = now.as_ref().map_or(Term(0), |l| l.term);
        let leader = now.and_then(|l| l.leader).map(|l| l.member);
        if leader.as_ref() == Some(me)
            && let Ok(renewal) = through.renew(term, TTL).await
        {
            let until = renewal.sent_at.after(TTL.saturating_sub(MARGIN));
            let mut beliefs = self.beliefs.lock().unwrap();
            let span = beliefs
                .entry((term, me.clone()))
                .or_insert((renewal.sent_at, until));
            *span = (span.0.min(renewal.sent_at), span.1.max(until));
            return;
        }
        let since = match *known {
            Some((t, since)) if t == term => since,
            _ => known.insert((term, Instant::now())).1,
        };
        let settled = hurries || since.elapsed() >= TTL;
        if term == Term(0) || settled && through.free(term).await == Ok(true) {
            let next = Term(term.0 + 1);
            let txn = Txn {
                compares: vec![Compare {
                    key: "leadership".to_owned(),
                    mod_revision: at.map_or(0, |v| v.mod_revision),
                }],
                ops: vec![Op::Put {
                    key: "leadership".to_owned(),
                    value: leadership(next, me),
                }],
            };
            let _: Result<TxnOutcome, _> = through.txn(txn).await;
        }
    }

    /// Somebody holds a lease that was renewed after this moment.
    pub(crate) async fn led_again(&self, what: &str) {
        let (from, due) = (Clock::system().now(), Instant::now() + PATIENCE);
        let renewed = || {
            let beliefs = self.beliefs.lock().unwrap();
            beliefs.values().any(|b| b.1 > from.after(TTL))
        };
        while !renewed() {
            assert!(Instant::now() < due, "nobody leads after {what}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Who leads by now, by the newest belief.
    pub(crate) fn newest(&self) -> Option<(Term, MemberId)> {
        let beliefs = self.beliefs.lock().unwrap();
        beliefs.keys().next_back().cloned()
    }

    /// Ends it, and looks whether ever two held a lease at once.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        let beliefs = self.beliefs.lock().unwrap().clone();
        let mut last: Option<(Term, BootTime)> = None;
        for ((term, who), (from, until)) in &beliefs {
            if let Some((before, ended)) = last {
                assert!(before < *term, "term {term} had two holders: {beliefs:?}");
                assert!(
                    ended <= *from,
                    "{who} held term {term} too early: {beliefs:?}"
                );
            }
            last = Some((*term, *until));
        }
    }
}

/// A leader that is gone is replaced by one of several that want to be: whoever wins a term is given time to renew it.
/// (When the others asked at once whether a term is over, it always was, and nobody ever led.)
#[tokio::test]
async fn whoever_wins_is_let_alone() {
    let ids = ["a", "b", "c", "d"].map(|m| MemberId::new(m).unwrap());
    let contest = Contest::default();
    let tasks: Vec<_> = crate::model::Model::cluster(&ids)
        .into_iter()
        .zip(&ids)
        .map(|(store, id)| contest.join(id.clone(), Arc::new(store)))
        .collect();
    contest.led_again("the start").await;
    let (before, leader) = contest.newest().unwrap();
    for (task, _) in tasks.iter().zip(&ids).filter(|(_, id)| **id == leader) {
        task.abort();
    }
    contest.led_again("the leader is gone").await;
    let (after, _) = contest.newest().unwrap();
    // A machine that stands still costs a term now and then.
    assert!(
        before < after && after.0 < before.0 + 20,
        "{before} {after}"
    );
    contest.end();
}
