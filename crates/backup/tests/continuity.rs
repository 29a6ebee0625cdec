//! The WAL stream through failovers, kills and losses, on real PostgreSQL.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on must say where"
)]

mod common;

use std::process::{Child, Command};
use std::sync::Arc;

use common::{
    Daemon, Server, config, options, ran_as_postgres, restore_to, status_until, topology,
};
use craton_backup::catalog;
use craton_backup::restore::Target;
use craton_backup::views::BackupStatusView;
use craton_core::TimelineId;
use craton_core::topology::{MemberRole, Topology};

#[test]
fn wal_fetch_process() {
    common::fetch_if_asked();
}

/// A backup daemon as a process of its own, so that it can be killed; does nothing unless asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_process() {
    let (Ok(config), Ok(topology)) = (
        std::env::var("DAEMON_CONFIG"),
        std::env::var("DAEMON_TOPOLOGY"),
    ) else {
        return;
    };
    let config = serde_json::from_str(&config).unwrap();
    let topology: Topology = serde_json::from_str(&topology).unwrap();
    let (_keep, told) = tokio::sync::watch::channel(Some(topology.into()));
    let (_run, stop) = tokio::sync::watch::channel(false);
    craton_backup::run_with_topology(config, told, stop)
        .await
        .unwrap();
}

struct Process(Child);

impl Process {
    fn start(config: &craton_backup::Config, leader: &Server) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "daemon_process", "--nocapture", "--quiet"])
            .env("DAEMON_CONFIG", serde_json::to_string(config).unwrap())
            .env(
                "DAEMON_TOPOLOGY",
                serde_json::to_string(topology(1, &[leader]).unwrap().as_ref()).unwrap(),
            )
            .spawn()
            .unwrap();
        Self(child)
    }

    fn kill(&mut self) {
        // `kill -9`.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The daemon gets further than the standby that will lead, by a whole segment and some: what it has
/// beyond the fork must neither be lost nor be used.
async fn fail_over_to_a_standby_behind_the_daemon(
    daemon: &Daemon,
    first: &mut Server,
    second: &mut Server,
) {
    second.kill();
    first.sql("insert into t values (98)");
    first.sql("select pg_switch_wal()");
    first.sql("insert into t values (99)");
    daemon.caught_up(first).await;
    first.kill();
    second.start();
    second.sql("select pg_promote()");
    daemon.topology.send_replace(topology(2, &[second, first]));
    second.sql("insert into t values (3)");
    let status = daemon
        .until("timeline 2", |s| s.timeline == TimelineId(2))
        .await;
    assert_eq!(status.missing_wal, []);
    daemon.caught_up(second).await;
    let held = daemon.repository();
    let fork = held
        .history(TimelineId(2))
        .unwrap()
        .end_of(TimelineId(1))
        .unwrap();
    let beyond = held
        .segments()
        .unwrap()
        .into_keys()
        .filter(|s| s.timeline == TimelineId(1));
    assert!(
        beyond
            .filter(|s| s.start(held.segment_size()) > fork)
            .count()
            >= 1,
        "the old leader's tail is gone"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follows_failovers_without_a_gap() {
    if ran_as_postgres("follows_failovers_without_a_gap") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut first = Server::new(root, "m1");
    first.sql("create table t (n int)");
    let mut second = Server::standby(root, "m2", &first);
    let daemon = Daemon::start(config(root), topology(1, &[&first, &second]));
    daemon.until("first backup", |s| s.backups == 1).await;
    first.sql("insert into t values (1); select pg_switch_wal()");
    first.sql("insert into t values (2)");
    second.until("select count(*) from t", "2");
    fail_over_to_a_standby_behind_the_daemon(&daemon, &mut first, &mut second).await;

    // Once more, with a whole segment between.
    let third = Server::standby(root, "m3", &second);
    second.sql("insert into t values (4); select pg_switch_wal()");
    second.sql("insert into t values (5)");
    third.until("select count(*) from t", "5");
    second.kill();
    third.sql("select pg_promote()");
    daemon.topology.send_replace(topology(3, &[&third]));
    third.sql("insert into t values (6)");
    daemon
        .until("timeline 3", |s| s.timeline == TimelineId(3))
        .await;
    daemon.caught_up(&third).await;

    let repository = daemon.repository();
    assert_eq!(catalog::missing_wal(&repository).unwrap(), []);
    assert_eq!(repository.gaps().unwrap(), []);
    let view = restore_to(
        &repository,
        &root.join("restored"),
        Target::Latest,
        &options(root),
    );
    assert_eq!(view.timeline, TimelineId(3));
    let restored = Server::restored(root, "restored");
    restored.until("select pg_is_in_recovery()", "f");
    assert_eq!(
        restored.sql("select string_agg(n::text, ' ' order by n) from t"),
        "1 2 3 4 5 6"
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_the_failover_cut_is_taken_again() {
    if ran_as_postgres("a_backup_that_the_failover_cut_is_taken_again") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut first = Server::new(root, "m1");
    first.sql("create table t as select generate_series(1, 200000) n");
    let second = Server::standby(root, "m2", &first);
    second.until("select count(*) from t", "200000");
    let mut config = config(root);
    // Slow enough to be caught in the middle.
    config.max_rate_kb = Some(4096);
    let daemon = Daemon::start(config, topology(1, &[&first, &second]));
    let reading = |s: &BackupStatusView| {
        s.runs
            .running
            .as_ref()
            .is_some_and(|r| r.done_bytes > 1 << 20)
    };
    daemon.until("a running backup", reading).await;
    first.kill();
    second.sql("select pg_promote()");
    daemon.topology.send_replace(topology(2, &[&second]));
    let status = daemon.until("a backup", |s| s.backups == 1).await;
    assert!(
        status.runs.requested >= 2 && status.missing_wal.is_empty(),
        "{status:?}"
    );
    let repository = daemon.repository();
    assert_eq!(catalog::list(&repository).unwrap().backups[0].source, "m2");
    assert_eq!(
        catalog::verify(&repository).unwrap().problems,
        Vec::<String>::new()
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_the_middle_of_a_segment_it_goes_on() {
    if ran_as_postgres("killed_in_the_middle_of_a_segment_it_goes_on") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let server = Server::new(root, "m1");
    server.sql("create table t (n int)");
    let config = config(root);
    let mut daemon = Process::start(&config, &server);
    status_until(&config, "first backup", |s| s.backups == 1).await;
    for round in 1..=3 {
        server.sql(&format!(
            "insert into t select {round} from generate_series(1, 50000)"
        ));
        let end = server.wal_end();
        status_until(&config, "WAL", |s| s.flushed_lsn >= end).await;
        // Again in the middle of a burst.
        server.sql(&format!(
            "insert into t select {round} from generate_series(1, 100000)"
        ));
        daemon.kill();
        server.sql(&format!(
            "insert into t select {round} from generate_series(1, 50000); checkpoint"
        ));
        daemon = Process::start(&config, &server);
    }
    let end = server.wal_end();
    let status = status_until(&config, "all WAL", |s| s.flushed_lsn >= end).await;
    assert_eq!(status.missing_wal, []);
    daemon.kill();
    let repository = craton_backup::Repository::open(&config.repository).unwrap();
    assert_eq!(catalog::missing_wal(&repository).unwrap(), []);
    restore_to(
        &repository,
        &root.join("restored"),
        Target::Latest,
        &options(root),
    );
    let restored = Server::restored(root, "restored");
    restored.until("select pg_is_in_recovery()", "f");
    assert_eq!(restored.sql("select count(*) from t"), "600000");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_leader_removed_comes_from_another_member() {
    if ran_as_postgres("what_the_leader_removed_comes_from_another_member") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let leader = Server::new(root, "m1");
    leader.sql("create table t (n int)");
    let standby = Server::standby(root, "m2", &leader);
    // The standby keeps what the leader is about to remove.
    standby.sql("alter system set wal_keep_size = '1GB'");
    standby.sql("select pg_reload_conf()");
    let daemon = Daemon::start(config(root), topology(1, &[&leader, &standby]));
    daemon.until("first backup", |s| s.backups == 1).await;
    let config = daemon.config.clone();
    daemon.stop().await;
    lose_wal(&leader, Some(&standby));
    standby.until(
        &format!("select pg_last_wal_replay_lsn() >= '{}'", leader.wal_end()),
        "t",
    );
    // What the leader has no more is not given up while a standby that is just starting may have it.
    let mut told = Topology::clone(&topology(1, &[&leader, &standby]).unwrap());
    told.members[1].role = MemberRole::Down;
    let daemon = Daemon::start(config, Some(Arc::new(told)));
    daemon
        .until("it waits for the standby", |s| {
            s.error.as_ref().is_some_and(|e| e.contains("m2 is down"))
        })
        .await;
    assert_eq!(daemon.repository().gaps().unwrap(), []);
    daemon
        .topology
        .send_replace(topology(1, &[&leader, &standby]));
    daemon.caught_up(&leader).await;
    let repository = daemon.repository();
    assert_eq!(repository.gaps().unwrap(), []);
    assert_eq!(catalog::missing_wal(&repository).unwrap(), []);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_that_nobody_has_is_said_to_be_missing_and_a_new_backup_is_taken() {
    if ran_as_postgres("wal_that_nobody_has_is_said_to_be_missing_and_a_new_backup_is_taken") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let leader = Server::new(root, "m1");
    leader.sql("create table t (n int)");
    let daemon = Daemon::start(config(root), topology(1, &[&leader]));
    daemon.until("first backup", |s| s.backups == 1).await;
    let config = daemon.config.clone();
    daemon.stop().await;
    lose_wal(&leader, None);
    let daemon = Daemon::start(config, topology(1, &[&leader]));
    let status = daemon
        .until("a new backup", |s| s.backups == 2 && !s.runs.is_under_way())
        .await;
    assert_eq!(status.missing_wal.len(), 1, "{:?}", status.missing_wal);
    daemon.caught_up(&leader).await;
    let repository = daemon.repository();
    let gaps = repository.gaps().unwrap();
    assert_eq!(gaps.len(), 1);
    assert_eq!(gaps[0].missing, status.missing_wal[0]);
    // From the new backup on, everything can be restored; from the old one, not beyond the gap.
    let list = catalog::list(&repository).unwrap().backups;
    let plan = |id| craton_backup::restore::plan(&repository, Target::Latest, Some(id));
    assert!(plan(&list[1].id).is_ok());
    let refused = plan(&list[0].id).unwrap_err().to_string();
    assert!(
        refused.contains(&format!(
            "from {} to {}",
            gaps[0].missing.from, gaps[0].missing.to
        )),
        "{refused}"
    );
    daemon.stop().await;
}

/// Makes a leader remove WAL that the daemon has not seen, as a leader without the slot would. A standby, which has
/// no slot either, has it before.
fn lose_wal(leader: &Server, standby: Option<&Server>) {
    leader.until(
        "select count(*) from pg_replication_slots where active",
        "0",
    );
    leader.sql("select pg_drop_replication_slot('craton_backup')");
    for _ in 0..8 {
        leader.sql("insert into t values (1); select pg_switch_wal()");
        if let Some(standby) = standby {
            let end = leader.wal_end();
            standby.until(&format!("select pg_last_wal_receive_lsn() >= '{end}'"), "t");
        }
        leader.sql("checkpoint");
    }
}
