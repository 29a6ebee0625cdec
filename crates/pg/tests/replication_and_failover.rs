//! Several servers: clone, stream, seal, promote, rewind, and the proof of synchronous replication.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot go on must say where"
)]

mod common;

use std::time::Duration;

use common::{LIMIT, Member, ran_as_postgres, until};
use craton_core::{Lsn, TimelineId};
use craton_pg::{
    PgError, ReplicationRow, RewindFailure, StartMode, StopMode, SyncNames, processes,
};

async fn streams(leader: &Member, name: &str) -> bool {
    let sample = leader.control.sample(LIMIT).await.unwrap();
    let is_streaming =
        |r: &ReplicationRow| r.application_name == name && r.state.as_deref() == Some("streaming");
    sample.replication.iter().any(is_streaming)
}

fn any(k: u32, names: &[&str]) -> SyncNames {
    SyncNames::Any {
        k,
        names: names.iter().map(|n| (*n).to_owned()).collect(),
    }
}

async fn enforce(leader: &mut Member, names: SyncNames) {
    leader.managed.sync = names;
    let Member {
        instance,
        control,
        managed,
        postmaster,
        ..
    } = &*leader;
    instance
        .enforce_sync(postmaster.as_ref().unwrap(), control, managed, LIMIT)
        .await
        .unwrap();
}

/// True if a commit is acknowledged in time.
async fn commits(leader: &Member, limit: Duration) -> bool {
    let sql = "SET synchronous_commit = on; INSERT INTO public.t VALUES (1)";
    leader
        .control
        .query_apart("test", None, sql, limit)
        .await
        .is_ok()
}

#[tokio::test]
async fn the_proof_of_synchronous_replication() {
    if ran_as_postgres("the_proof_of_synchronous_replication") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut a = Member::new_primary(root.path(), "a").await;
    a.run("CREATE TABLE public.t (i int)").await;
    let mut b = Member::new_standby(root.path(), "b", &a).await;
    let c = Member::new_standby(root.path(), "c", &a).await;
    until("both stream", || async {
        streams(&a, "b").await && streams(&a, "c").await
    })
    .await;

    // From off: the flag is proven, and a commit is on b when it is acknowledged.
    enforce(&mut a, any(1, &["b"])).await;
    assert!(commits(&a, LIMIT).await);
    assert!(
        a.control
            .sync_in_force(&any(1, &["b"]), LIMIT)
            .await
            .unwrap()
    );
    assert!(
        !a.control
            .sync_in_force(&any(1, &["c"]), LIMIT)
            .await
            .unwrap()
    );

    // b stops: nothing is acknowledged, though c streams.
    b.stop(StopMode::Fast).await;
    assert!(!commits(&a, Duration::from_millis(500)).await);

    // Another V with the same k, proven with one reload; then another k, through nobody and back.
    enforce(&mut a, any(1, &["b", "c"])).await;
    assert!(commits(&a, LIMIT).await);
    enforce(&mut a, any(2, &["b", "c"])).await;
    assert!(
        !commits(&a, Duration::from_millis(500)).await,
        "c alone is not two"
    );
    enforce(&mut a, any(1, &["c"])).await;
    assert!(commits(&a, LIMIT).await);
    enforce(&mut a, SyncNames::Nobody).await;
    assert!(
        !commits(&a, Duration::from_millis(500)).await,
        "nobody acknowledges"
    );
    enforce(&mut a, SyncNames::Off).await;
    assert!(commits(&a, LIMIT).await);

    // A new agent knows nothing of what is in force, and proves it from nothing.
    let adopted = a.instance.adopt().await.unwrap().unwrap();
    let fresh = craton_pg::Instance::new(a.instance.config().clone()).unwrap();
    a.managed.sync = any(1, &["c"]);
    fresh
        .enforce_sync(&adopted, &a.control, &a.managed, LIMIT)
        .await
        .unwrap();
    assert!(commits(&a, LIMIT).await);
    drop(c);
}

#[tokio::test]
async fn seal_promote_rewind() {
    if ran_as_postgres("seal_promote_rewind") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut a = Member::new_primary(root.path(), "a").await;
    a.run("CREATE TABLE public.t (i int)").await;
    a.control
        .ensure_slots(&["craton_b".into(), "craton_c".into()], LIMIT)
        .await
        .unwrap();
    a.control
        .ensure_slots(&["craton_b".into()], LIMIT)
        .await
        .unwrap();
    let mut b = Member::new_standby(root.path(), "b", &a).await;
    b.managed.upstream = Some(a.as_upstream("craton_replication", "b", Some("craton_b")));
    assert_eq!(
        b.instance.write_config(&b.managed).await.unwrap().changed,
        ["primary_slot_name"],
        "only the slot is new"
    );
    b.postmaster().reload().unwrap();
    until("b uses its slot", || async {
        let slots = a.control.sample(LIMIT).await.unwrap().slots;
        slots.iter().any(|s| s.name == "craton_b" && s.active)
    })
    .await;
    a.run("INSERT INTO public.t SELECT generate_series(1, 1000)")
        .await;
    let flushed = a.control.current_flush_lsn(LIMIT).await.unwrap();
    until("b has it all, and has replayed it", || async {
        let sample = b.control.sample(LIMIT).await.unwrap();
        sample.end_of_wal() >= flushed && sample.is_streaming() && sample.has_replayed_local_wal()
    })
    .await;
    let sample = b.control.sample(LIMIT).await.unwrap();
    assert!(sample.in_recovery);
    assert_eq!(sample.timeline, TimelineId(1));

    begins_a_segment(&a, &b).await;
    seal(&a, &b).await;
    promote(&b).await;
    rewind(&mut a, &b).await;
}

/// Before a handover, see `prepare_handover` of the agent.
async fn begins_a_segment(a: &Member, b: &Member) {
    const SEGMENT: u64 = 16 << 20;
    let at = || async { a.control.current_flush_lsn(LIMIT).await.unwrap().0 };
    let used = u32::try_from(at().await % SEGMENT).unwrap();
    let ends = |used_min, left_max| a.control.end_wal_segment(used_min, left_max, LIMIT);
    assert!(
        !ends(used + (1 << 20), 16 << 20).await.unwrap(),
        "too little is used"
    );
    assert!(!ends(0, 1 << 10).await.unwrap(), "too much is left");
    let before = at().await;
    assert!(ends(0, 16 << 20).await.unwrap());
    let begun = at().await;
    assert_eq!(begun / SEGMENT, before / SEGMENT + 1);
    until("b has the rest of the segment", || async {
        a.control.standbys_behind(Lsn(begun), LIMIT).await.unwrap() == 0
    })
    .await;
    assert!(b.control.sample(LIMIT).await.unwrap().end_of_wal() >= Lsn(begun));
    let ahead = Lsn(begun + SEGMENT);
    assert_eq!(a.control.standbys_behind(ahead, LIMIT).await.unwrap(), 1);
}

/// After the cut nothing arrives any more, whatever the upstream writes.
async fn seal(a: &Member, b: &Member) {
    b.instance
        .cut_upstream(b.postmaster(), &b.managed, LIMIT)
        .await
        .unwrap();
    assert!(!processes::children_of(b.postmaster().pid()).is_empty());
    let sealed = b.control.sample(LIMIT).await.unwrap();
    assert!(sealed.receiver.is_none());
    assert_eq!(sealed.timeline, TimelineId(1), "known without a receiver");
    a.run("INSERT INTO public.t SELECT generate_series(1, 1000)")
        .await;
    a.control.checkpoint(LIMIT).await.unwrap();
    let later = b.control.sample(LIMIT).await.unwrap();
    assert_eq!(later.end_of_wal(), sealed.end_of_wal());

    // Slots of others move on a standby too, and never back.
    b.control
        .ensure_slots(&["craton_a".into()], LIMIT)
        .await
        .unwrap();
    let end = later.end_of_wal();
    // A slot moves no further than what has been replayed.
    until("b has replayed it all", || async {
        b.control.sample(LIMIT).await.unwrap().replay_lsn == Some(end)
    })
    .await;
    b.control
        .advance_slot("craton_a", end, LIMIT)
        .await
        .unwrap();
    b.control
        .advance_slot("craton_a", Lsn(end.0 - 1), LIMIT)
        .await
        .unwrap();
    b.control
        .advance_slot("craton_a", Lsn(end.0 + (1 << 30)), LIMIT)
        .await
        .unwrap();
    let slots = b.control.sample(LIMIT).await.unwrap().slots;
    assert_eq!(
        slots
            .iter()
            .find(|s| s.name == "craton_a")
            .unwrap()
            .restart_lsn,
        Some(end)
    );
    b.control.drop_slot("craton_a", LIMIT).await.unwrap();
    b.control.drop_slot("craton_a", LIMIT).await.unwrap();
}

/// The numbers that the coordinator knows are passed over.
async fn promote(b: &Member) {
    b.instance
        .reserve_timelines_below(TimelineId(1), TimelineId(4))
        .await
        .unwrap();
    assert_eq!(b.control.promote(LIMIT).await.unwrap(), TimelineId(4));
    let history = b.instance.local_history(TimelineId(4)).await.unwrap();
    assert_eq!(
        history.iter().map(|h| h.timeline).collect::<Vec<_>>(),
        [TimelineId(1)]
    );
    assert!(
        b.instance
            .remove_reserved_history_files(TimelineId(4))
            .await
            .unwrap()
            .is_empty()
    );
    let sample = b.control.sample(LIMIT).await.unwrap();
    assert!(!sample.in_recovery);
    assert_eq!(sample.timeline, TimelineId(4));
}

/// The old primary, killed with WAL that nobody has, comes back as a standby of the new one.
async fn rewind(a: &mut Member, b: &Member) {
    let source = b.as_upstream("craton_rewind", "a", None);
    let running = a.instance.rewind_from(&source).await;
    assert!(
        matches!(running, Err(PgError::Running { .. })),
        "{running:?}"
    );
    let names = a.control.relation_names(LIMIT).await.unwrap();
    a.control.disconnect().await;
    a.postmaster.take().unwrap().kill_all(LIMIT).await.unwrap();

    // `Nobody` is in the file, as for every standby: the session must not wait for it.
    b.run("SET synchronous_commit = local; CREATE TABLE public.after_failover (i int)")
        .await;
    b.control.checkpoint(LIMIT).await.unwrap();
    let history = b.instance.local_history(TimelineId(4)).await.unwrap();
    let summary = a
        .instance
        .keep_divergent_wal("t1-a", TimelineId(1), history[0].switch, names)
        .await
        .unwrap();
    assert!(
        summary.commits >= 1 && summary.records > 1000,
        "{summary:?}"
    );
    assert!(!summary.relations.is_empty() && summary.first_commit.is_some());
    let written = summary.rows.get("postgres.public.t");
    assert!(
        written.is_some_and(|rows| rows.inserted > 0),
        "the rows that only this server has are told: {:?}",
        summary.rows
    );
    assert!(!summary.transactions.is_empty());
    assert_eq!(a.instance.divergences().await.unwrap(), [summary]);

    let mut nowhere = source.clone();
    nowhere.port = common::free_port();
    match a.instance.rewind_from(&nowhere).await {
        Err(PgError::Rewind {
            kind: RewindFailure::SourceUnavailable,
            ..
        }) => {}
        other => assert!(other.is_err(), "rewound from nowhere"),
    }
    a.instance.rewind_from(&source).await.unwrap();
    a.managed.upstream = Some(b.as_upstream("craton_replication", "a", None));
    a.managed.sync = SyncNames::Nobody;
    a.start(StartMode::Standby).await;
    until("a streams from b", || async { streams(b, "a").await }).await;
    until("a is on b's timeline", || async {
        a.control.sample(LIMIT).await.unwrap().timeline == TimelineId(4)
    })
    .await;
    until("a has b's table", || async {
        a.sql("SELECT count(*) FROM pg_class WHERE relname = 'after_failover'")
            .await
            == "1"
    })
    .await;
    assert_eq!(
        a.sql("SELECT count(*) FROM public.t").await,
        "1000",
        "the divergent rows are gone"
    );
}

/// True while so many copies of it are made, each by pg_basebackup itself and the process of it that receives WAL.
async fn copies_run(a: &Member, copies: u32) -> bool {
    let sql = "SELECT count(*) FROM pg_stat_replication WHERE state <> 'startup'";
    a.sql(sql).await == (2 * copies).to_string()
}

/// Drops a clone of `a` for `b` while both its processes are at work.
async fn cut_off(a: &Member, b: &Member) {
    let instance = b.instance.clone();
    let source = a.as_upstream("craton_replication", "b", None);
    let (progress, _) = tokio::sync::watch::channel(craton_pg::CloneProgress::default());
    // Slowly: it cannot be over soon.
    let clone = tokio::spawn(async move { instance.clone_from(&source, Some(32), progress).await });
    until("a copy runs", || copies_run(a, 1)).await;
    clone.abort();
    assert!(clone.await.unwrap_err().is_cancelled());
}

#[tokio::test]
async fn a_clone_that_fails_leaves_nothing_that_looks_like_a_cluster() {
    if ran_as_postgres("a_clone_that_fails_leaves_nothing_that_looks_like_a_cluster") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let a = Member::new_primary(root.path(), "a").await;
    let b = Member::new(root.path(), "b");
    let (progress, _) = tokio::sync::watch::channel(craton_pg::CloneProgress::default());
    let stranger = a.as_upstream("nobody_known", "b", None);
    let error = b
        .instance
        .clone_from(&stranger, None, progress.clone())
        .await
        .unwrap_err();
    assert!(matches!(error, PgError::Tool { .. }), "{error}");
    assert_eq!(
        b.instance.data_dir_state().await.unwrap(),
        craton_pg::DataDir::Empty
    );

    // Cut off in the middle: the next try clears it.
    let source = a.as_upstream("craton_replication", "b", None);
    cut_off(&a, &b).await;
    let control = b
        .instance
        .clone_from(&source, None, progress.clone())
        .await
        .unwrap();
    assert_eq!(
        control.system_identifier,
        a.instance.control_data().await.unwrap().system_identifier
    );
    // Kept beside while another is made, and put away afterwards.
    let former = b.instance.set_aside_data_dir().await.unwrap().unwrap();
    assert!(former.join("PG_VERSION").exists());
    assert_eq!(
        b.instance.data_dir_state().await.unwrap(),
        craton_pg::DataDir::Empty
    );
    b.instance
        .clone_from(&source, None, progress)
        .await
        .unwrap();
    // The second clone has proven nothing yet: it goes, and the first copy stays.
    assert!(!b.instance.retire_former().await.unwrap());
    assert_eq!(b.instance.set_aside_data_dir().await.unwrap(), None);
    assert!(former.join("PG_VERSION").exists());
    std::fs::create_dir(b.instance.data_dir()).unwrap();
    let pid_file = b.instance.data_dir().join("postmaster.pid");
    let running = std::process::id();
    std::fs::write(&pid_file, format!("{running}\n")).unwrap();
    assert!(b.instance.retire_former().await.unwrap());
    assert!(!former.exists());
    // What is still being removed does not stand in the way of the next.
    std::fs::create_dir(&former).unwrap();
    assert!(b.instance.retire_former().await.unwrap() && !former.exists());
    assert!(!b.instance.discard_former().await.unwrap());
    std::fs::remove_file(&pid_file).unwrap();
    std::fs::create_dir(&former).unwrap();
    assert!(b.instance.discard_former().await.unwrap() && !former.exists());
    // Half of a rewind is no copy.
    std::fs::write(b.instance.member_dir().join("rewind.incomplete"), "").unwrap();
    assert_eq!(b.instance.set_aside_data_dir().await.unwrap(), None);
    assert!(!former.exists());
    b.instance.discard_data_dir().await.unwrap();
    assert_eq!(
        b.instance.data_dir_state().await.unwrap(),
        craton_pg::DataDir::Empty
    );
    let in_use = a.instance.discard_data_dir().await;
    assert!(matches!(in_use, Err(PgError::Running { .. })), "{in_use:?}");
    let in_use = a.instance.set_aside_data_dir().await;
    assert!(matches!(in_use, Err(PgError::Running { .. })), "{in_use:?}");
}

/// What an agent that was killed leaves at work is found by its mark, with what it has forked; nothing else is.
#[tokio::test]
async fn stray_tools_of_one_member_are_ended() {
    if ran_as_postgres("stray_tools_of_one_member_are_ended") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let a = Member::new_primary(root.path(), "a").await;
    let (b, c) = (
        Member::new(root.path(), "b"),
        Member::new(root.path(), "bb"),
    );
    let clone = |member: &Member| {
        let source = a.as_upstream("craton_replication", member.name, None);
        let instance = member.instance.clone();
        let (progress, _) = tokio::sync::watch::channel(craton_pg::CloneProgress::default());
        // Slowly: it cannot be over soon.
        tokio::spawn(async move { instance.clone_from(&source, Some(32), progress).await })
    };
    let (killed, left) = (clone(&b), clone(&c));
    until("copies run", || copies_run(&a, 2)).await;
    let strays = b.instance.kill_stray_tools(LIMIT).await.unwrap();
    assert!(strays >= 2, "{strays}");
    let error = killed.await.unwrap().unwrap_err();
    // By its signal, or by itself when the process that receives WAL died first.
    assert!(matches!(error, PgError::Tool { .. }), "{error}");
    assert_eq!(b.instance.kill_stray_tools(LIMIT).await.unwrap(), 0);
    assert!(
        !left.is_finished(),
        "the other member's copy is its own affair"
    );
    left.abort();
    assert!(
        a.postmaster().is_running(),
        "and PostgreSQL is none of the tools"
    );
}
