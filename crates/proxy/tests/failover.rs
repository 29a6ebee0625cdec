//! What clients of the proxy see when servers come and go.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on must say where"
)]

mod common;

use std::path::Path;

use common::{Agent, Postgres, Proxy, code, connect, directory, soon, until};
use tokio_postgres::{Client, NoTls};

async fn pid(client: &Client) -> i32 {
    client
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0)
}

async fn note(client: &Client, text: &str) -> Result<(), tokio_postgres::Error> {
    let sql = format!("INSERT INTO notes (note) VALUES ('{text}')");
    client.batch_execute(&sql).await
}

async fn number(client: &Client, statement: &tokio_postgres::Statement, of: i32) -> i32 {
    client.query_one(statement, &[&of]).await.unwrap().get(0)
}

async fn notes(client: &Client) -> Vec<String> {
    let rows = client
        .query("SELECT note FROM notes ORDER BY id", &[])
        .await
        .unwrap();
    rows.iter().map(|r| r.get(0)).collect()
}

/// True once the statement runs on some server.
async fn runs(server: &Postgres, text: &str) -> bool {
    let like = format!("%{text}%");
    let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE $1 AND state = 'active' AND pid <> pg_backend_pid())";
    server
        .superuser()
        .await
        .query_one(sql, &[&like])
        .await
        .unwrap()
        .get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_outlive_the_primary() {
    let root = directory();
    let mut first = Postgres::primary(root.path()).await;
    let second = first.standby(root.path(), "b").await;
    let agent = Agent::start().await;
    agent.say(1, Some(&first), &[&second], false);
    let proxy = Proxy::with(&agent, |_| {}).await;

    let (idle, cut, in_block, failed) = (
        proxy.ann().await,
        proxy.ann().await,
        proxy.ann().await,
        proxy.ann().await,
    );
    let simple = proxy.ann().await;
    let statement = idle.prepare("SELECT $1::int + 1").await.unwrap();
    assert_eq!(number(&idle, &statement, 1).await, 2);
    in_block
        .batch_execute("BEGIN; INSERT INTO notes (note) VALUES ('never')")
        .await
        .unwrap();
    failed.batch_execute("BEGIN").await.unwrap();
    assert_eq!(code(failed.batch_execute("SELECT 1/0").await), "22012");
    let sleeping =
        tokio::spawn(async move { (cut.query("SELECT pg_sleep(100), 'cut'", &[]).await, cut) });
    let sql = "SELECT pg_sleep(100), 'simple'";
    let dozing = tokio::spawn(async move { (simple.batch_execute(sql).await, simple) });
    until("both statements run", || async {
        runs(&first, "'cut'").await && runs(&first, "'simple'").await
    })
    .await;

    first.kill_postmaster();
    agent.say(2, None, &[&second], false);
    let (result, cut) = soon("the cut statement is answered", sleeping)
        .await
        .unwrap();
    assert_eq!(code(result), "08007");
    let (result, simple) = soon("the cut simple query is answered", dozing)
        .await
        .unwrap();
    assert_eq!(code(result), "08007");

    // With no primary at all, a statement waits, and reads go on at the standby.
    let waiting = tokio::spawn(async move { (note(&idle, "waited").await, idle) });
    until("it waits", || async {
        proxy.metric("craton_proxy_waiting").await >= 1
    })
    .await;
    let login = connect(proxy.read_port, "ann", "postgres");
    let reader = soon("a login without a primary", login).await.unwrap();
    let sql = "SELECT pg_is_in_recovery()";
    assert!(reader.query_one(sql, &[]).await.unwrap().get::<_, bool>(0));

    second.promote().await;
    agent.say(2, Some(&second), &[], false);
    let (inserted, idle) = soon("the statement that waited", waiting).await.unwrap();
    inserted.unwrap();
    // The statement prepared on the dead server works on the new one.
    assert_eq!(number(&idle, &statement, 41).await, 42);
    for client in [&cut, &simple] {
        note(client, "goes on").await.unwrap();
    }
    // A block that was open is over; its client is told once.
    assert_eq!(
        code(
            in_block
                .batch_execute("INSERT INTO notes (note) VALUES ('never')")
                .await
        ),
        "08007"
    );
    note(&in_block, "again").await.unwrap();
    failed.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(
        notes(&idle).await,
        ["waited", "goes on", "goes on", "again"]
    );
    assert!(proxy.metric("craton_proxy_unknown_outcomes_total").await >= 3);
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_primary_that_lives_is_left_at_once() {
    let root = directory();
    let first = Postgres::primary(root.path()).await;
    let second = first.standby(root.path(), "b").await;
    let agent = Agent::start().await;
    agent.say(1, Some(&first), &[], false);
    let proxy = Proxy::with(&agent, |_| {}).await;
    let (busy, pinned, idle) = (proxy.ann().await, proxy.ann().await, proxy.ann().await);
    pinned
        .batch_execute("CREATE TEMP TABLE own ()")
        .await
        .unwrap();
    idle.batch_execute("SET app.tenant TO 'x'").await.unwrap();
    let running = tokio::spawn(async move {
        (
            busy.batch_execute("INSERT INTO notes (note) SELECT 'deposed' FROM pg_sleep(100)")
                .await,
            busy,
        )
    });
    until("the insert runs", || runs(&first, "deposed")).await;

    second.promote().await;
    agent.say(2, Some(&second), &[], false);
    let (result, busy) = soon("the statement on the deposed primary", running)
        .await
        .unwrap();
    assert_eq!(code(result), "08007");
    for client in [&busy, &idle] {
        client
            .batch_execute("INSERT INTO notes (note) VALUES ('new')")
            .await
            .unwrap();
    }
    // Whoever had state there is told before anything runs without it, and goes on.
    assert_eq!(
        code(
            pinned
                .batch_execute("INSERT INTO notes (note) VALUES ('unset')")
                .await
        ),
        "08006"
    );
    pinned
        .batch_execute("INSERT INTO notes (note) VALUES ('new')")
        .await
        .unwrap();
    let tenant = idle.query_one("SHOW app.tenant", &[]).await.unwrap();
    assert_eq!(
        tenant.get::<_, &str>(0),
        "x",
        "settings move with their session"
    );
    // Older news changes nothing.
    agent.say(1, Some(&first), &[], false);
    idle.batch_execute("INSERT INTO notes (note) VALUES ('new')")
        .await
        .unwrap();
    assert_eq!(notes(&second.superuser().await).await, ["new"; 4]);
    assert!(notes(&first.superuser().await).await.is_empty());
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_switchover_is_a_pause() {
    let root = directory();
    let mut first = Postgres::primary(root.path()).await;
    let second = first.standby(root.path(), "b").await;
    let agent = Agent::start().await;
    agent.say(1, Some(&first), &[&second], false);
    let proxy = Proxy::with(&agent, |_| {}).await;
    let (running, waiting, session) = (proxy.ann().await, proxy.ann().await, proxy.ann().await);
    running
        .batch_execute("BEGIN; INSERT INTO notes (note) VALUES ('before')")
        .await
        .unwrap();
    session
        .batch_execute("SET application_name TO 'seen'; SET timezone TO 'Asia/Tokyo'")
        .await
        .unwrap();

    agent.say(1, Some(&first), &[&second], true);
    until("the hold is known", || async {
        let health = craton_console::Client::new(None)
            .get_text(&format!("127.0.0.1:{}", proxy.http), "/health")
            .await;
        health.is_ok_and(|h| h.contains("switching over"))
    })
    .await;
    let held = tokio::spawn(async move {
        waiting
            .execute("INSERT INTO notes (note) VALUES ('after')", &[])
            .await
    });
    until("a transaction is held", || async {
        proxy.metric("craton_proxy_waiting").await >= 1
    })
    .await;
    running.batch_execute("COMMIT").await.unwrap();
    assert_eq!(notes(&first.superuser().await).await, ["before"]);
    first.stop();
    second.promote().await;
    agent.say(2, Some(&second), &[], false);
    assert_eq!(
        soon("the held transaction", held).await.unwrap().unwrap(),
        1
    );
    let zone: String = session
        .query_one("SHOW timezone", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(
        zone, "Asia/Tokyo",
        "settings that are followed move with the session"
    );
    assert_eq!(proxy.metric("craton_proxy_unknown_outcomes_total").await, 0);
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_ends_with_an_error_and_the_session_stays() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let agent = Agent::start().await;
    agent.say(1, Some(&server), &[], false);
    let proxy = Proxy::with(&agent, |c| c.failover_wait_ms = 3000).await;
    let client = proxy.ann().await;
    client.batch_execute("SELECT 1").await.unwrap();
    agent.say(2, None, &[], false);
    until("the loss is known", || async {
        proxy.metric("craton_proxy_primary_known").await == 0
    })
    .await;
    assert_eq!(
        code(soon("simple", client.batch_execute("SELECT 1")).await),
        "57P03"
    );
    assert_eq!(
        code(soon("extended", client.query("SELECT 1", &[])).await),
        "57P03"
    );
    // Before the news: the first query after it may begin before it has arrived.
    assert_eq!(
        proxy
            .metric("craton_proxy_failover_wait_timeouts_total")
            .await,
        2
    );
    agent.say(3, Some(&server), &[], false);
    until("it goes on", || async {
        client.query("SELECT 1", &[]).await.is_ok()
    })
    .await;
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_no_standby_confirmed_is_not_reported_as_done() {
    let root = directory();
    let mut server = Postgres::primary(root.path()).await;
    let sql = "ALTER SYSTEM SET synchronous_standby_names = 'nobody'";
    server.superuser().await.batch_execute(sql).await.unwrap();
    server.stop();
    server.start().await;
    let admin = server.superuser().await;
    let proxy = Proxy::of(&[&server], |_| {}).await;
    let client = proxy.ann().await;
    for extended in [false, true] {
        let sql = "INSERT INTO notes (note) VALUES ('unconfirmed')";
        let statement = async {
            if extended {
                client.query(sql, &[]).await.map(drop)
            } else {
                client.batch_execute(sql).await
            }
        };
        let cancel = until("it waits for standbys, and is cancelled", || async {
            let waits =
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            !admin.query(waits, &[]).await.unwrap().is_empty()
        });
        let (result, ()) = tokio::join!(soon("the commit is answered", statement), cancel);
        assert_eq!(code(result), "08007", "extended: {extended}");
        client.batch_execute("SELECT 1").await.unwrap();
    }
    assert_eq!(
        notes(&client).await,
        ["unconfirmed"; 2],
        "committed here all the same: that is why it is unknown"
    );
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_does_not_end_the_wait_for_standbys() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let admin = server.superuser().await;
    let names = async |value: &str| {
        let sql = format!("ALTER SYSTEM SET synchronous_standby_names = '{value}'");
        admin.batch_execute(&sql).await.unwrap();
        admin
            .batch_execute("SELECT pg_reload_conf()")
            .await
            .unwrap();
        until("the postmaster has read it", || async {
            let fresh = server.superuser().await;
            let sql = "SHOW synchronous_standby_names";
            let row = fresh.query_one(sql, &[]).await.unwrap();
            row.get::<_, String>(0) == value
        })
        .await;
        // Commits wait when the checkpointer has read it too: after two of these it went once round its loop.
        for _ in 0..2 {
            admin.batch_execute("CHECKPOINT").await.unwrap();
        }
    };
    names("nobody").await;
    // A proxy that cannot ask the server in time passes the cancel on.
    let proxy = Proxy::of(&[&server], |c| c.connect_timeout_ms = 30_000).await;
    let client = proxy.ann().await;
    let token = client.cancel_token();
    let commit = tokio::spawn(async move {
        let sql = "INSERT INTO notes (note) VALUES ('waits')";
        (client.batch_execute(sql).await, client)
    });
    let waits = async || {
        let sql = "SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        !admin.query(sql, &[]).await.unwrap().is_empty()
    };
    until("it waits for standbys", &waits).await;
    token.cancel_query(NoTls).await.unwrap();
    until("the cancel is withheld", || async {
        proxy.metric("craton_proxy_cancels_withheld_total").await == 1
    })
    .await;
    assert!(waits().await, "it waits as before");
    assert_eq!(proxy.metric("craton_proxy_cancels_total").await, 0);
    names("").await;
    let (result, client) = soon("the commit", commit).await.unwrap();
    result.unwrap();
    assert_eq!(notes(&client).await, ["waits"]);
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_a_static_server_is_a_pause() {
    let root = directory();
    let mut server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |_| {}).await;
    let (idle, other) = (proxy.ann().await, proxy.ann().await);
    let before = pid(&idle).await;
    server.stop();
    let waiting = tokio::spawn(async move { pid(&other).await });
    until("it waits", || async {
        proxy.metric("craton_proxy_waiting").await >= 1
    })
    .await;
    server.start().await;
    soon("the query that waited", waiting).await.unwrap();
    assert_ne!(soon("the idle client", pid(&idle)).await, before);
    assert_eq!(proxy.metric("craton_proxy_unknown_outcomes_total").await, 0);
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_ends_a_session_of_its_own() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |_| {}).await;
    let client = proxy.ann().await;
    client.batch_execute("BEGIN").await.unwrap();
    let process = format!("/proc/{}", pid(&client).await);
    client
        .batch_execute("SET LOCAL idle_in_transaction_session_timeout = 50")
        .await
        .unwrap();
    // Its last words are on the proxy's side of the connection when the process is gone.
    until("the server has ended it", || async {
        !Path::new(&process).exists()
    })
    .await;
    assert_eq!(code(client.batch_execute("SELECT 2").await), "25P03");
    client.batch_execute("SELECT 3").await.unwrap();
    proxy.end().await.unwrap();
}
