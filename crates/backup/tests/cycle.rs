//! Backup and restore on a real PostgreSQL: the whole way round.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on must say where"
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{
    Daemon, LIMIT, Server, client, config, options, ran_as_postgres, restore_to, topology,
};
use craton_backup::restore::{self, RestoredView, Target};
use craton_backup::views::{
    BackupDetailView, BackupListView, BackupStatusView, BackupView, RunAcceptedView, SweptView,
};
use craton_backup::{Config, Repository, catalog};
use craton_core::Lsn;
use craton_core::topology::MemberRole;
use craton_repo::manifest::BackupId;
use jiff::Timestamp;
use tokio::time::Instant;

#[test]
fn wal_fetch_process() {
    common::fetch_if_asked();
}

/// The server's clock, after a moment in which nothing was committed.
fn moment(server: &Server) -> Timestamp {
    server.sql("select pg_sleep(0.05)");
    let now = server.sql(
        "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
    );
    server.sql("select pg_sleep(0.05)");
    now.parse().unwrap()
}

/// A server with a tablespace aside, 20,000 rows in `t` and 500 in `aside`.
fn server_with_tablespace(root: &Path) -> (Server, PathBuf) {
    let server = Server::new(root, "m1");
    let tablespace = root.join("a tablespace");
    fs::create_dir(&tablespace).unwrap();
    server.sql(&format!(
        "create tablespace aside location '{}'",
        tablespace.display()
    ));
    server.sql("create table t (n int); insert into t select generate_series(1, 20000)");
    server.sql("create table aside (n int) tablespace aside");
    server.sql("insert into aside select generate_series(1, 500)");
    (server, tablespace)
}

/// Such a server, and a daemon that has taken its first backup.
async fn backed_up(root: &Path, settings: Config) -> (Server, Daemon) {
    let (server, _) = server_with_tablespace(root);
    let daemon = Daemon::start(settings, topology(1, &[&server]));
    daemon.until("first backup", |s| s.backups == 1).await;
    (server, daemon)
}

/// Asks for a backup and waits for it.
async fn ask_for_backup(daemon: &Daemon) -> BackupView {
    let api = daemon.config.listen.to_string();
    let due = Instant::now() + LIMIT;
    let accepted: RunAcceptedView = loop {
        // A backup is in the catalog a moment before its run has ended.
        daemon
            .until("no backup runs", |s| !s.runs.is_under_way())
            .await;
        // A daemon that does not get to it soon says no.
        match client().post_json(&api, "/v1/backup/run", &()).await {
            Ok(accepted) => break accepted,
            Err(error) => {
                let said = error.to_string();
                let busy = ["a backup runs already", "the daemon is busy"];
                assert!(busy.iter().any(|b| said.contains(b)), "{said}");
                assert!(Instant::now() < due, "{said}");
            }
        }
    };
    let ended = |s: &BackupStatusView| s.runs.last.as_ref().is_some_and(|l| l.run == accepted.run);
    let last = daemon
        .until("the backup asked for", ended)
        .await
        .runs
        .last
        .unwrap();
    assert_eq!(last.error, None);
    last.backup.unwrap()
}

/// Restores, starts the result, and compares `t`.
fn check(
    root: &Path,
    repository: &Repository,
    name: &str,
    target: Target,
    expected: &str,
) -> RestoredView {
    let mut options = options(root);
    let location = root.join("a tablespace").to_str().unwrap().to_owned();
    options
        .tablespaces
        .insert(location, root.join(format!("{name} tablespace")));
    let view = restore_to(repository, &root.join(name), target, &options);
    assert!(view.bytes > 1_000_000);
    if target == Target::Latest {
        common::verify_backup(&root.join(name));
    }
    let restored = Server::restored(root, name);
    restored.until("select pg_is_in_recovery()", "f");
    assert_eq!(
        restored.sql("select count(*) || ' ' || min(n) from t"),
        expected,
        "{name}"
    );
    assert_eq!(restored.sql("select count(*) from aside"), "500");
    restored.sql("insert into t values (0)");
    view
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_cycle_with_point_in_time() {
    if ran_as_postgres("full_cycle_with_point_in_time") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (server, _) = server_with_tablespace(root);
    let daemon = Daemon::start(config(root), topology(1, &[&server]));
    let status = daemon.until("first backup", |s| s.backups == 1).await;
    assert_eq!(status.missing_wal, []);

    server.sql("insert into t values (-1)");
    let before = moment(&server);
    server.sql("delete from t where n > 0");
    server.sql("select pg_switch_wal()");
    server.sql("insert into t values (-2)");
    let second = ask_for_backup(&daemon).await;
    // What did not change is not stored again.
    assert!(second.stored_bytes * 4 < second.data_bytes, "{second:?}");
    server.sql("insert into t values (-3)");
    daemon.caught_up(&server).await;
    let api = daemon.config.listen.to_string();
    let list: BackupListView = client().get_json(&api, "/v1/backup/list").await.unwrap();
    assert_eq!(list.backups.len(), 2);
    let show = format!("/v1/backup/show/{}", second.id);
    let detail: BackupDetailView = client().get_json(&api, &show).await.unwrap();
    assert!(
        detail.restorable_to >= second.stop_lsn && detail.missing_wal.is_empty(),
        "{detail:?}"
    );
    let metrics = client().get_text(&api, "/metrics").await.unwrap();
    assert!(metrics.contains("craton_backup_streaming 1"), "{metrics}");

    let repository = daemon.repository();
    check(root, &repository, "latest", Target::Latest, "3 -3");
    let at = check(
        root,
        &repository,
        "at-time",
        Target::Time(before),
        "20001 -1",
    );
    assert_ne!(at.backup, second.id);
    check(root, &repository, "immediate", Target::Immediate, "2 -2");
    // PostgreSQL itself refuses a time after which nothing was committed.
    let idle = check(
        root,
        &repository,
        "idle",
        Target::Time(moment(&server)),
        "3 -3",
    );
    assert!(idle.note.is_some());
    let verified = catalog::verify(&repository).unwrap();
    assert_eq!((verified.problems, verified.backups_good), (vec![], 2));
    daemon.stop().await;
}

/// Removes a backup; the refusal where it stays.
async fn delete(daemon: &Daemon, id: &BackupId) -> Result<SweptView, String> {
    let at = daemon.config.listen.to_string();
    let body = serde_json::json!({ "id": id });
    let swept = client().post_json(&at, "/v1/backup/delete", &body).await;
    swept.map_err(|e: craton_console::ClientError| e.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_backup_needs_goes_with_the_backup() {
    if ran_as_postgres("what_no_backup_needs_goes_with_the_backup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (server, daemon) = backed_up(root, config(root)).await;
    let repository = daemon.repository();
    let first = catalog::list(&repository).unwrap().backups.remove(0);
    let last = delete(&daemon, &first.id).await.unwrap_err();
    assert!(last.contains("take another one first"), "{last}");
    server.sql("delete from t where n > 0");
    server.sql("insert into t values (-1)");
    server.sql("select pg_switch_wal()");
    server.sql("insert into t values (-2)");
    let second = ask_for_backup(&daemon).await;
    daemon.caught_up(&server).await;

    let nobody = BackupId::new("nobody").unwrap();
    let refused = delete(&daemon, &nobody).await.unwrap_err();
    assert!(refused.contains("there is no backup nobody"), "{refused}");
    let reading = repository.reading().unwrap();
    let busy = delete(&daemon, &first.id).await.unwrap_err();
    assert!(busy.contains("somebody restores"), "{busy}");
    drop(reading);

    let held = repository.segments().unwrap();
    let swept = delete(&daemon, &first.id).await.unwrap();
    assert_eq!(swept.backups, [first.id]);
    assert!(swept.segments > 0 && swept.bytes > 0, "{swept:?}");
    let left = repository.segments().unwrap();
    // What has arrived meanwhile does not count.
    let gone = held.keys().filter(|s| !left.contains_key(s)).count();
    assert_eq!(gone as u64, swept.segments);
    // Chunks that the first one stored and the second one needs are still there, and the next backup uses them.
    let third = ask_for_backup(&daemon).await;
    assert!(third.stored_bytes * 4 < third.data_bytes, "{third:?}");
    daemon.caught_up(&server).await;
    let verified = catalog::verify(&repository).unwrap();
    assert_eq!((verified.problems, verified.backups_good), (vec![], 2));
    check(root, &repository, "latest", Target::Latest, "2 -2");

    // What cannot be read may need anything: nothing goes.
    let manifest = repository
        .root()
        .join(format!("backups/{}.json", second.id));
    let whole = fs::read(&manifest).unwrap();
    fs::write(&manifest, "{").unwrap();
    let refused = delete(&daemon, &third.id).await.unwrap_err();
    assert!(refused.contains("cannot be read"), "{refused}");
    fs::write(&manifest, whole).unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_beyond_the_window_go_by_themselves() {
    if ran_as_postgres("backups_beyond_the_window_go_by_themselves") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let settings = Config {
        retention_days: 1,
        retention_backups: 1,
        ..config(root)
    };
    let (server, daemon) = backed_up(root, settings).await;
    let repository = daemon.repository();
    let first = catalog::list(&repository).unwrap().backups.remove(0);
    // Two backups that ended days ago.
    for (days, name) in [(3_u64, "threedays"), (2, "twodays")] {
        let mut old = repository.manifest(&first.id).unwrap();
        old.summary.id = BackupId::new(name).unwrap();
        old.summary.ended_at_ms -= days * 86_400_000;
        let path = repository.root().join(format!("backups/{name}.json"));
        fs::write(path, old.encode().unwrap()).unwrap();
    }
    server.sql("insert into t values (-1)");
    let second = ask_for_backup(&daemon).await;
    // The window's first moment is restored from the one that ended last before it.
    let status = daemon.until("the oldest goes", |s| s.backups == 3).await;
    assert_eq!(status.retention_days, 1);
    let list = catalog::list(&repository).unwrap();
    let left: Vec<String> = list.backups.iter().map(|b| b.id.to_string()).collect();
    let (first, second) = (first.id.to_string(), second.id.to_string());
    assert_eq!(left, ["twodays", &first, &second]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_restored_is_refused_with_a_reason() {
    if ran_as_postgres("what_cannot_be_restored_is_refused_with_a_reason") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (_server, daemon) = backed_up(root, config(root)).await;
    let second = ask_for_backup(&daemon).await;
    let repository = daemon.repository();
    let first = &catalog::list(&repository).unwrap().backups[0];
    let plan = |target, backup| {
        restore::plan(&repository, target, backup)
            .unwrap_err()
            .to_string()
    };
    let ancient = Target::Time("2000-01-01T00:00:00Z".parse().unwrap());
    assert!(plan(ancient, None).contains("before the end of the first backup"));
    let tomorrow = Target::Time(Timestamp::now() + Duration::from_secs(86_400));
    assert!(plan(tomorrow, None).contains("in the future"));
    assert!(
        plan(Target::Time(first.started_at), Some(&second.id)).contains("choose an older backup")
    );
    assert!(plan(Target::Lsn(Lsn(1)), None).contains("the earliest position"));
    assert!(plan(Target::Lsn(Lsn(u64::MAX / 2)), None).contains("WAL is missing"));
    let nobody = BackupId::new("nobody").unwrap();
    assert!(plan(Target::Latest, Some(&nobody)).contains("there is no backup nobody"));

    let into = |name: &str| {
        restore::restore(
            &repository,
            &root.join(name),
            Target::Latest,
            &options(root),
            &mut |_| {},
        )
        .unwrap_err()
        .to_string()
    };
    // The running server's tablespace must not be written into.
    assert!(into("new").contains("--tablespace"));
    assert!(!root.join("new").exists());
    assert!(into("m1").contains("not empty"));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_found_and_nothing_half_restored_stays() {
    if ran_as_postgres("damage_is_found_and_nothing_half_restored_stays") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let server = Server::new(root, "m1");
    let daemon = Daemon::start(config(root), topology(1, &[&server]));
    daemon.until("first backup", |s| s.backups == 1).await;
    let repository = daemon.repository();
    let pack = repository.packs().unwrap()[0];
    let path = repository.root().join(craton_repo::layout::pack(pack));
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64]
        .iter_mut()
        .for_each(|b| *b ^= 0x5a);
    fs::write(&path, &bytes).unwrap();

    let verified = catalog::verify(&repository).unwrap();
    assert_eq!(verified.backups_good, 0);
    assert!(
        verified
            .problems
            .iter()
            .any(|p| p.contains(&pack.to_string())),
        "{:?}",
        verified.problems
    );
    let kept = root.join("was empty");
    fs::create_dir(&kept).unwrap();
    for target in [root.join("new/deep"), kept.clone()] {
        let outcome = restore::restore(
            &repository,
            &target,
            Target::Latest,
            &options(root),
            &mut |_| {},
        );
        assert!(outcome.is_err());
    }
    assert!(
        !root.join("new").exists(),
        "a half-restored directory was left"
    );
    assert!(kept.is_dir() && fs::read_dir(&kept).unwrap().next().is_none());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_can_be_the_source() {
    if ran_as_postgres("a_standby_can_be_the_source") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let leader = Server::new(root, "m1");
    leader.sql("create table t as select generate_series(1, 1000) n");
    let standby = Server::standby(root, "m2", &leader);
    assert_eq!(
        standby.member(MemberRole::Standby).role,
        MemberRole::Standby
    );
    let mut config = config(root);
    config.prefer_standby = true;
    let daemon = Daemon::start(config, topology(1, &[&leader, &standby]));
    // A backup of a standby ends where the standby's replay was; the leader's WAL must go on for that.
    leader.sql("insert into t values (0)");
    daemon.until("first backup", |s| s.backups == 1).await;
    daemon.caught_up(&leader).await;
    let repository = daemon.repository();
    assert_eq!(catalog::list(&repository).unwrap().backups[0].source, "m2");
    restore_to(
        &repository,
        &root.join("restored"),
        Target::Latest,
        &options(root),
    );
    let restored = Server::restored(root, "restored");
    restored.until("select pg_is_in_recovery()", "f");
    assert_eq!(restored.sql("select count(*) from t"), "1001");
    daemon.stop().await;
}
