//! One server: made, started, adopted, killed.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot go on must say where"
)]

mod common;

use std::time::Duration;

use common::{LIMIT, Member, PASSWORD, ran_as_postgres, until};
use craton_pg::{DataDir, ExitReason, InitOptions, PgError, StartMode, StopMode, processes};

#[tokio::test]
async fn initdb_is_whole_or_nothing() {
    if ran_as_postgres("initdb_is_whole_or_nothing") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let member = Member::new(root.path(), "a");
    assert_eq!(
        member.instance.data_dir_state().await.unwrap(),
        DataDir::Empty
    );

    let half = member.instance.member_dir().join("data.init");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("PG_VERSION"), "15").unwrap();
    assert_eq!(
        member.instance.data_dir_state().await.unwrap(),
        DataDir::HalfClone
    );

    let options = InitOptions {
        superuser_password: PASSWORD.into(),
        args: craton_pg::InitArgs::default(),
    };
    let control = member.instance.initdb(&options).await.unwrap();
    assert!(control.checksums && control.shut_down_cleanly() && control.system_identifier != 0);
    assert!(!half.exists());
    assert!(matches!(
        member.instance.data_dir_state().await.unwrap(),
        DataDir::Cluster { .. }
    ));
    let again = member.instance.initdb(&options).await;
    assert!(matches!(again, Err(PgError::DataDir { .. })), "{again:?}");

    let marker = member.instance.member_dir().join("rewind.incomplete");
    std::fs::write(&marker, "").unwrap();
    assert_eq!(
        member.instance.data_dir_state().await.unwrap(),
        DataDir::HalfRewind
    );
    std::fs::remove_file(&marker).unwrap();

    std::fs::write(member.instance.data_dir().join("PG_VERSION"), "9.6\n").unwrap();
    assert!(matches!(
        member.instance.data_dir_state().await.unwrap(),
        DataDir::Foreign(_)
    ));
}

#[tokio::test]
async fn a_server_outlives_its_handle_and_is_adopted() {
    if ran_as_postgres("a_server_outlives_its_handle_and_is_adopted") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut member = Member::new_primary(root.path(), "a").await;
    let pid = member.postmaster.take().unwrap().pid();
    // A name that cannot be looked up must not hold up a seal.
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    assert!(
        environment
            .split('\0')
            .any(|v| v.starts_with("RES_OPTIONS=")),
        "{environment}"
    );
    assert!(matches!(
        member.instance.start(StartMode::Standby).await,
        Err(PgError::Running { .. })
    ));

    let adopted = member.instance.adopt().await.unwrap().unwrap();
    assert_eq!(adopted.pid(), pid);
    assert!(adopted.is_running());
    let waiting = tokio::spawn({
        let adopted = adopted.clone();
        async move { adopted.exited().await }
    });
    member.control.disconnect().await;
    assert_eq!(
        adopted.stop(StopMode::Fast, LIMIT).await.unwrap(),
        ExitReason::Status(0)
    );
    assert_eq!(
        tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap(),
        ExitReason::Status(0)
    );
    assert!(member.instance.adopt().await.unwrap().is_none());
    assert!(
        member
            .instance
            .control_data()
            .await
            .unwrap()
            .shut_down_cleanly()
    );
}

#[tokio::test]
async fn a_closed_primary_lets_in_the_cluster_alone_until_clients_are_admitted() {
    if ran_as_postgres("a_closed_primary_lets_in_the_cluster_alone_until_clients_are_admitted") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut member = Member::new_primary(root.path(), "a").await;
    let port = member.instance.config().port;
    let log_in = async |user: &str| {
        let login = tokio_postgres::Config::new()
            .host("127.0.0.1")
            .port(port)
            .user(user)
            .dbname("postgres")
            .password(PASSWORD)
            .connect(tokio_postgres::NoTls)
            .await;
        login.map(drop).map_err(|e| e.code().cloned())
    };
    let refused = Err(Some(
        tokio_postgres::error::SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
    ));
    assert_eq!(log_in("postgres").await, Ok(()));
    assert!(!member.instance.is_closed().unwrap());
    member.stop(StopMode::Fast).await;

    member.managed.closed = true;
    member.start(StartMode::Primary).await;
    assert!(member.instance.is_closed().unwrap());
    assert_eq!(log_in("postgres").await, refused);
    assert_eq!(log_in("craton_proxy").await, Ok(()));
    assert_eq!(member.sql("SELECT 1").await, "1");

    // Settings of the operator's that PostgreSQL cannot read do not hold it up.
    let broken = member.instance.data_dir().join("postgresql.auto.conf");
    std::fs::write(broken, "no_such_parameter = 'x'\nwork_mem = \n").unwrap();
    member.managed.closed = false;
    let (postmaster, control) = (member.postmaster(), &member.control);
    let admitted = member
        .instance
        .admit(postmaster, control, &member.managed, LIMIT);
    admitted.await.unwrap();
    // At once, not soon.
    assert_eq!(log_in("postgres").await, Ok(()));
    assert!(!member.instance.is_closed().unwrap());
}

/// A backend that was just leaving may be gone.
fn freeze(process: &processes::Stat) {
    let pid = rustix::process::Pid::from_raw(process.pid).unwrap();
    let frozen = rustix::process::kill_process(pid, rustix::process::Signal::STOP);
    assert!(
        matches!(frozen, Ok(()) | Err(rustix::io::Errno::SRCH)),
        "{frozen:?}"
    );
}

#[tokio::test]
async fn kill_all_leaves_no_process_even_of_a_frozen_server() {
    if ran_as_postgres("kill_all_leaves_no_process_even_of_a_frozen_server") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut member = Member::new_primary(root.path(), "a").await;
    let busy = member.instance.control();
    let query =
        tokio::spawn(async move { busy.query("test", "SELECT pg_sleep(100)", LIMIT).await });
    let data = member.instance.data_dir().to_owned();
    until("backends run", || async {
        processes::living_in(&data).len() > 5
    })
    .await;
    for process in processes::living_in(&data).iter().take(3) {
        freeze(process);
    }
    let postmaster = member.postmaster.take().unwrap();
    postmaster.kill_all(LIMIT).await.unwrap();
    assert!(processes::living_in(&data).is_empty());
    assert_eq!(postmaster.exited().await, ExitReason::Signal(9));
    assert!(query.await.unwrap().is_err());

    // What it left behind (pid file, socket, shared memory) does not hinder the next start.
    member.start(StartMode::Primary).await;
    assert_eq!(member.sql("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_postmaster_that_dies_is_noticed_and_its_orphans_die_before_the_next_start() {
    if ran_as_postgres(
        "a_postmaster_that_dies_is_noticed_and_its_orphans_die_before_the_next_start",
    ) {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut member = Member::new_primary(root.path(), "a").await;
    let data = member.instance.data_dir().to_owned();
    let postmaster = member.postmaster.take().unwrap();
    // Frozen children cannot see that their postmaster is gone.
    for child in &processes::children_of(postmaster.pid()) {
        freeze(child);
    }
    let pid = rustix::process::Pid::from_raw(postmaster.pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let exit = tokio::time::timeout(LIMIT, postmaster.exited())
        .await
        .unwrap();
    assert_eq!(exit, ExitReason::Signal(9));
    assert!(!processes::living_in(&data).is_empty());
    assert!(member.instance.adopt().await.unwrap().is_none());
    member.start(StartMode::Primary).await;
    assert_eq!(member.sql("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_start_that_fails_says_why() {
    if ran_as_postgres("a_start_that_fails_says_why") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut member = Member::new(root.path(), "a");
    member
        .instance
        .initdb(&InitOptions {
            superuser_password: PASSWORD.into(),
            args: craton_pg::InitArgs::default(),
        })
        .await
        .unwrap();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", member.instance.config().port)).unwrap();
    member
        .managed
        .settings
        .insert("work_mem".into(), "many".into());
    member.instance.write_config(&member.managed).await.unwrap();
    let postmaster = member.instance.start(StartMode::Primary).await.unwrap();
    let error = member
        .instance
        .wait_ready(&postmaster, LIMIT)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("work_mem"), "{error}");
}

#[tokio::test]
async fn control_queries_have_deadlines_and_recover() {
    if ran_as_postgres("control_queries_have_deadlines_and_recover") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let member = Member::new_primary(root.path(), "a").await;
    let short = Duration::from_millis(50);
    let slow = member
        .control
        .query("test", "SELECT pg_sleep(10)", short)
        .await;
    assert!(matches!(slow, Err(PgError::Timeout { .. })), "{slow:?}");
    assert_eq!(member.sql("SELECT 1").await, "1");
    let wrong = member
        .control
        .query("test", "SELECT no_such", LIMIT)
        .await
        .unwrap_err();
    assert_eq!(wrong.sqlstate(), Some("42703"));

    member
        .control
        .create_database("it's \"x\"", None, LIMIT)
        .await
        .unwrap();
    member
        .control
        .create_database("it's \"x\"", None, LIMIT)
        .await
        .unwrap();
    assert_eq!(
        member
            .control
            .active_client_transactions(LIMIT)
            .await
            .unwrap(),
        0
    );

    member
        .control
        .bootstrap_roles(&passwords(), LIMIT)
        .await
        .unwrap();
    let row = member
        .sql("SELECT passwd FROM craton.user_lookup('craton_proxy')")
        .await;
    assert!(row.starts_with("SCRAM-SHA-256$"), "{row}");
    let log = std::fs::read_to_string(member.instance.log_path()).unwrap();
    assert!(
        !log.contains("secret") && !log.contains("SCRAM-SHA-256$"),
        "the log holds a secret"
    );
}

fn passwords() -> craton_pg::RolePasswords {
    let password = || PASSWORD.to_owned();
    craton_pg::RolePasswords {
        replication: password(),
        proxy: password(),
        rewind: password(),
    }
}

#[tokio::test]
async fn a_stale_pid_file_that_names_another_process_is_not_believed() {
    if ran_as_postgres("a_stale_pid_file_that_names_another_process_is_not_believed") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut member = Member::new(root.path(), "a");
    member
        .instance
        .initdb(&InitOptions {
            superuser_password: PASSWORD.into(),
            args: craton_pg::InitArgs::default(),
        })
        .await
        .unwrap();
    let stale = format!(
        "{}\n{}\n1\n",
        std::process::id(),
        member.instance.data_dir().display()
    );
    std::fs::write(member.instance.data_dir().join("postmaster.pid"), stale).unwrap();
    assert!(member.instance.adopt().await.unwrap().is_none());
    member.start(StartMode::Standby).await;
    assert!(member.control.sample(LIMIT).await.unwrap().in_recovery);

    // The log stays bounded while the server goes on writing to it.
    member
        .run("DO $$ BEGIN RAISE LOG 'a line %', repeat('x', 10000); END $$")
        .await;
    member.instance.bound_log(1000).await.unwrap();
    member
        .run("DO $$ BEGIN RAISE LOG 'after the cut'; END $$")
        .await;
    let log = std::fs::read_to_string(member.instance.log_path()).unwrap();
    assert!(
        log.len() < 2000 && log.contains("after the cut") && !log.contains('\0'),
        "{log}"
    );
}
