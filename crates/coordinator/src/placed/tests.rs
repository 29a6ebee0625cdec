//! Moves between two stores in memory, cut off at every step.

mod older;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use craton_core::{MemberId, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::note::{Note, remember};
use super::{Opener, Placed, parse, remembered};
use crate::api::{
    Answer, Coordinator, CoordinatorError, LeaseHint, PresenceMap, Renewal, Snapshot, Txn,
    TxnOutcome,
};
use crate::conformance::{self, put};
use crate::contest::{Contest, PATIENCE};
use crate::model::Model;
use crate::place::{Backend, Place};

fn elsewhere() -> Place {
    Place {
        backend: Backend::Etcd,
        endpoints: vec!["http://127.0.0.1:1".to_owned()],
        ..Place::default()
    }
}

fn ids() -> Vec<MemberId> {
    ["a", "b", "c"]
        .into_iter()
        .map(|m| MemberId::new(m).unwrap())
        .collect()
}

/// When a member crashes: after so many calls of its, before (even) or after (odd) the last one is done.
#[derive(Clone)]
struct Fuse(Arc<AtomicI64>);

impl Fuse {
    fn never() -> Self {
        Self(Arc::new(AtomicI64::new(i64::MAX)))
    }

    fn arm(&self, halves: i64) {
        self.0.store(halves, Ordering::SeqCst);
    }

    /// The store answers nobody.
    fn off() -> Self {
        Self(Arc::new(AtomicI64::new(i64::MIN)))
    }

    fn is_off(&self) -> bool {
        self.0.load(Ordering::SeqCst) == i64::MIN
    }

    fn blown(&self) -> bool {
        self.0.load(Ordering::SeqCst) <= 0
    }

    /// Half a call; never returns once the fuse is blown.
    async fn half(&self) {
        if self.0.fetch_sub(1, Ordering::SeqCst) <= 1 {
            std::future::pending::<()>().await;
        }
    }
}

/// A store as a member that may crash sees it.
struct Fused {
    store: Model,
    fuse: Fuse,
}

impl Fused {
    fn guard<'a, T: Send + 'a>(&'a self, call: Answer<'a, T>) -> Answer<'a, T> {
        Box::pin(async move {
            if self.fuse.is_off() {
                return Err(CoordinatorError::Unavailable("it is off".to_owned()));
            }
            self.fuse.half().await;
            let answer = call.await;
            self.fuse.half().await;
            answer
        })
    }
}

impl Coordinator for Fused {
    fn read(&self) -> Answer<'_, Arc<Snapshot>> {
        self.guard(Box::pin(async { self.store.read().await }))
    }
    fn txn(&self, txn: Txn) -> Answer<'_, TxnOutcome> {
        self.guard(Box::pin(async { self.store.txn(txn).await }))
    }
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.store.watch()
    }
    fn renew(&self, term: Term, ttl: Duration) -> Answer<'_, Renewal> {
        self.guard(Box::pin(async move { self.store.renew(term, ttl).await }))
    }
    fn release(&self, term: Term) -> Answer<'_, ()> {
        self.guard(Box::pin(async move { self.store.release(term).await }))
    }
    fn free(&self, term: Term) -> Answer<'_, bool> {
        self.guard(Box::pin(async move { self.store.free(term).await }))
    }
    fn lease_hint(&self) -> LeaseHint {
        self.store.lease_hint()
    }
    fn announce(&self, value: String) {
        self.store.announce(value);
    }
    fn presence(&self) -> watch::Receiver<PresenceMap> {
        self.store.presence()
    }
}

/// Two stores, and where each member notes its place.
struct World {
    dir: tempfile::TempDir,
    old: Vec<Model>,
    new: Vec<Model>,
}

impl World {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            old: Model::cluster(&ids()),
            new: Model::cluster(&ids()),
        }
    }

    fn memory(&self, i: usize) -> std::path::PathBuf {
        let own = self.dir.path().join(i.to_string());
        std::fs::create_dir_all(&own).unwrap();
        own.join("place.json")
    }

    fn opener(&self, i: usize, old: &Fuse, new: &Fuse) -> Opener {
        let fused = |store: &Model, fuse: &Fuse| -> Arc<dyn Coordinator> {
            Arc::new(Fused {
                store: store.clone(),
                fuse: fuse.clone(),
            })
        };
        let (old, new) = (fused(&self.old[i], old), fused(&self.new[i], new));
        Arc::new(move |place| {
            Ok(Arc::clone(match place.backend {
                Backend::Embedded => &old,
                Backend::Etcd => &new,
            }))
        })
    }

    fn start(&self, i: usize, fuse: &Fuse) -> Arc<Placed> {
        self.start_at(i, Place::default(), fuse)
    }

    fn start_at(&self, i: usize, wish: Place, fuse: &Fuse) -> Arc<Placed> {
        let open = self.opener(i, fuse, fuse);
        let presence = open(&Place::default()).unwrap();
        Placed::start(ids().remove(i), wish, self.memory(i), open, presence).unwrap()
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let due = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < due, "never: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Asks until it is answered: on a busy machine one call may not be.
async fn answered<'a, T>(what: &str, mut ask: impl FnMut() -> Answer<'a, T>) -> T {
    let due = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Ok(told) => return told,
            Err(error) => assert!(
                matches!(error, CoordinatorError::Unavailable(_)) && Instant::now() < due,
                "{what}: {error}"
            ),
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Asks for a move until it is under way. Whether it is over in time for this call is for a busy machine to say.
async fn asked_to_move(member: &Placed) {
    let due = Instant::now() + PATIENCE;
    while let Err(error) = member.move_to(elsewhere()).await {
        let CoordinatorError::Unavailable(why) = &error else {
            panic!("no move: {error}");
        };
        if why.contains("the move goes on by itself") {
            return;
        }
        assert!(Instant::now() < due, "no move: {why}");
    }
}

/// Moves. A member that has not heard of the end of the last move yet says so after a while, and is asked again.
async fn moved(member: &Arc<Placed>, place: Place) {
    let due = Instant::now() + PATIENCE;
    while let Err(error) = member.move_to(place.clone()).await {
        assert!(
            matches!(error, CoordinatorError::Unavailable(_)) && Instant::now() < due,
            "no move to {place}: {error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_conforms_before_and_after_a_move() {
    let world = World::new();
    let members: Vec<_> = (0..3).map(|i| world.start(i, &Fuse::never())).collect();
    let handles: Vec<conformance::Handle> = ids()
        .into_iter()
        .zip(&members)
        .map(|(id, m)| (id, Arc::clone(m) as Arc<dyn Coordinator>))
        .collect();
    conformance::run(&handles).await;
    for member in &members {
        member.stop().await;
    }
}

/// The leader crashes at every half step of a move, and starts again: the records arrive whole, in one store, and
/// never do two hold a lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_is_cut_off_anywhere_is_completed() {
    let mut runs = JoinSet::new();
    for halves in 1..=36 {
        runs.spawn(cut_off(halves));
    }
    let mut cut = 0;
    while let Some(run) = runs.join_next().await {
        cut += usize::from(run.unwrap());
    }
    assert!(cut > 20, "only {cut} moves were cut off");
}

/// True if the leader crashed before the move was over.
async fn cut_off(halves: i64) -> bool {
    let world = World::new();
    let contest = Contest::default();
    let fuse = Fuse::never();
    let mut a = world.start(0, &fuse);
    let mut a_task = contest.join(ids().remove(0), Arc::clone(&a) as Arc<dyn Coordinator>);
    contest.led_again("the start").await;
    let others: Vec<_> = (1..3).map(|i| world.start(i, &Fuse::never())).collect();
    for (i, other) in others.iter().enumerate() {
        contest.join(
            ids().remove(i + 1),
            Arc::clone(other) as Arc<dyn Coordinator>,
        );
    }
    answered("a mark", || others[0].txn(put("mark", 0, "kept"))).await;
    let before = answered("before", || others[0].read()).await;
    fuse.arm(halves);
    let asker = Arc::clone(&others[0]);
    let asked = tokio::spawn(async move { asked_to_move(&asker).await });
    let moved = |m: &Arc<Placed>| {
        let current = m.shared.current();
        current.place == elsewhere() && current.placement.former.is_none()
    };
    until("the fuse, or the move", || {
        fuse.blown() || (moved(&a) && others.iter().all(moved))
    })
    .await;
    let was_cut = fuse.blown();
    if was_cut {
        a_task.abort();
        a.stop().await;
        drop(a);
        a = world.start(0, &Fuse::never());
        a_task = contest.join(ids().remove(0), Arc::clone(&a) as Arc<dyn Coordinator>);
    }
    until("everybody is there", || {
        moved(&a) && others.iter().all(moved)
    })
    .await;
    asked.await.unwrap();
    contest.led_again("the move").await;
    let after = answered("after", || others[1].read()).await;
    assert!(after.revision > before.revision, "revisions never go back");
    assert_eq!(after.get("mark").map(|v| v.value.as_str()), Some("kept"));
    sealed_for_good(&world).await;
    for i in 0..3 {
        let note = remembered(&world.memory(i)).unwrap().unwrap();
        assert_eq!((note.place, note.generation), (elsewhere(), 1));
    }
    contest.end();
    a_task.abort();
    for member in others.iter().chain([&a]) {
        member.stop().await;
    }
    was_cut
}

async fn sealed_for_good(world: &World) {
    let old = world.old[0].read().await.unwrap();
    let (placement, revision) = parse(&old).unwrap();
    assert!(placement.sealed() && revision > 0, "{placement:?}");
    let new = world.new[0].read().await.unwrap();
    assert_eq!(parse(&new).unwrap().0.generation, placement.generation + 1);
}

/// There and back, with one member away that starts where the records are no longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_and_back_with_one_away() {
    for attempt in 1.. {
        if three_moves().await {
            break;
        }
        // One that stands still for a whole lease is replaced, rightly.
        assert!(attempt < 3, "not the same leader in the same term");
    }
}

/// True if the same leader leads in the same term afterwards.
async fn three_moves() -> bool {
    let world = World::new();
    let contest = Contest::default();
    let members: Vec<_> = (0..2).map(|i| world.start(i, &Fuse::never())).collect();
    for (id, member) in ids().into_iter().zip(&members) {
        contest.join(id, Arc::clone(member) as Arc<dyn Coordinator>);
    }
    contest.led_again("the start").await;
    let led_before = contest.newest();
    moved(&members[1], elsewhere()).await;
    moved(&members[0], Place::default()).await;
    moved(&members[1], elsewhere()).await;
    contest.led_again("three moves").await;
    let same = contest.newest() == led_before;
    // It knows only the first place, two generations back.
    let late = world.start(2, &Fuse::never());
    until("the late one follows", || late.place() == elsewhere()).await;
    let due = Instant::now() + PATIENCE;
    loop {
        let known = answered("the late one's", || late.read()).await;
        let there = answered("another's", || members[0].read()).await;
        if known.entries == there.entries {
            break;
        }
        // Another leader may have come in between.
        assert!(Instant::now() < due, "{known:?} {there:?}");
    }
    contest.end();
    for member in members.iter().chain([&late]) {
        member.stop().await;
    }
    same
}

#[tokio::test]
async fn what_does_not_fit_is_refused_before_anything_changes() {
    let world = World::new();
    let cluster = |id: &str| put("cluster", 0, &format!("{{\"system_id\":\"{id}\"}}"));
    world.old[0].txn(cluster("1")).await.unwrap();
    world.new[0].txn(cluster("2")).await.unwrap();
    let a = world.start(0, &Fuse::never());
    let refused = a.move_to(elsewhere()).await;
    assert!(
        matches!(&refused, Err(CoordinatorError::Refused(why)) if why.contains("another cluster")),
        "{refused:?}"
    );
    let own_key = a.txn(put("placement", 0, "{}")).await;
    assert!(
        matches!(own_key, Err(CoordinatorError::Refused(_))),
        "{own_key:?}"
    );
    let nowhere = a
        .move_to(Place {
            endpoints: vec![],
            ..elsewhere()
        })
        .await;
    assert!(
        matches!(nowhere, Err(CoordinatorError::Refused(_))),
        "{nowhere:?}"
    );
    assert_eq!(a.place(), Place::default());
    assert!(
        world.old[0]
            .read()
            .await
            .unwrap()
            .get("placement")
            .is_none()
    );
    a.stop().await;
}

/// Without a leader nothing is sealed, and the wish can be taken back.
#[tokio::test]
async fn a_move_waits_for_a_leader_and_can_be_taken_back() {
    let world = World::new();
    let a = world.start(0, &Fuse::never());
    let asker = Arc::clone(&a);
    let asked = tokio::spawn(async move { asker.move_to(elsewhere()).await });
    until("the wish stands", || {
        a.shared.current().placement.next.is_some()
    })
    .await;
    moved(&a, Place::default()).await;
    asked.abort();
    assert!(a.shared.current().placement.next.is_none());
    assert_eq!(a.place(), Place::default());
    a.stop().await;
}

#[test]
fn the_note_of_the_place_is_read_back_or_complained_about() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("place.json");
    assert_eq!(remembered(&path), Ok(None));
    let note = Note::new(elsewhere(), 3, Some("7".into()));
    remember(&path, &note).unwrap();
    assert_eq!(remembered(&path), Ok(Some(note)));
    let text = std::fs::read_to_string(&path).unwrap();
    for wrong in ["{", "", &text.replace("\"format\":1", "\"format\":2")] {
        std::fs::write(&path, wrong).unwrap();
        let why = remembered(&path).unwrap_err();
        assert!(why.contains("place.json"), "{why}");
    }
}

/// Members of a new cluster whose settings differ agree on one place all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_cluster_begins_where_its_settings_say() {
    let world = World::new();
    let asks = world.start_at(0, elsewhere(), &Fuse::never());
    until("it is there", || asks.place() == elsewhere()).await;
    answered("its record", || asks.txn(put("cluster", 0, "{}"))).await;
    let other = world.start(1, &Fuse::never());
    until("the other one follows", || other.place() == elsewhere()).await;
    let read = answered("the record", || other.read()).await;
    assert_eq!(read.get("cluster").map(|v| v.value.as_str()), Some("{}"));
    assert_eq!(
        other.progress(),
        None,
        "no lease of the former store counts"
    );
    sealed_for_good(&world).await;
    for member in [asks, other] {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_there_stays_where_it_is() {
    let world = World::new();
    world.old[0].txn(put("cluster", 0, "{}")).await.unwrap();
    let asks = world.start_at(0, elsewhere(), &Fuse::never());
    answered("where it is", || asks.read()).await;
    assert_eq!(asks.place(), Place::default());
    asks.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_cluster_does_not_begin_over_another() {
    let world = World::new();
    world.new[0].txn(put("cluster", 0, "{}")).await.unwrap();
    let asks = world.start_at(0, elsewhere(), &Fuse::never());
    until("it says so", || {
        asks.trouble().is_some_and(|t| t.contains("already"))
    })
    .await;
    assert!(asks.read().await.is_err(), "and does nothing");
    assert_eq!(world.old[0].read().await.unwrap().revision, 0);
    asks.stop().await;
}

/// The store of the note is gone since, and the records have moved back: the member finds them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_was_away_finds_the_records_where_the_former_store_is_off() {
    let world = World::new();
    let contest = Contest::default();
    let a = world.start(0, &Fuse::never());
    contest.join(ids().remove(0), Arc::clone(&a) as Arc<dyn Coordinator>);
    contest.led_again("the start").await;
    let b = world.start(1, &Fuse::never());
    moved(&a, elsewhere()).await;
    until("b is there too", || b.place() == elsewhere()).await;
    b.stop().await;
    moved(&a, Place::default()).await;
    let open = world.opener(1, &Fuse::never(), &Fuse::off());
    let presence = Arc::new(world.old[1].clone());
    let b = Placed::start(
        ids().remove(1),
        elsewhere(),
        world.memory(1),
        open,
        presence,
    )
    .unwrap();
    until("it finds them", || b.place() == Place::default()).await;
    answered("what it finds", || b.read()).await;
    contest.end();
    for member in [a, b] {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_emptied_is_not_believed() {
    let world = World::new();
    remember(&world.memory(0), &Note::new(elsewhere(), 1, None)).unwrap();
    let a = world.start(0, &Fuse::never());
    until("it says so", || {
        a.trouble().is_some_and(|t| t.contains("emptied"))
    })
    .await;
    assert!(a.txn(put("cluster", 0, "{}")).await.is_err());
    assert_eq!(world.new[0].read().await.unwrap().revision, 0);
    a.stop().await;
}
