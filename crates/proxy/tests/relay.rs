//! Logins, pooling, and everything that a client may say.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on must say where"
)]

mod common;

use std::time::Duration;

use common::{
    PASSWORD, Postgres, Proxy, code, connect, connect_with, directory, ran_alone, resident_bytes,
    soon, until,
};
use craton_proxy::{PoolMode, PoolOverride};
use craton_wire::frame::frame;
use craton_wire::{frontend, startup};
use futures_util::{SinkExt as _, StreamExt as _, TryStreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_postgres::{AsyncMessage, Client, NoTls, SimpleQueryMessage};

async fn pid(client: &Client) -> i32 {
    client
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0)
}

async fn show(client: &Client, name: &str) -> String {
    let sql = format!("SELECT current_setting('{name}')");
    let messages = client.simple_query(&sql).await.unwrap();
    let found = messages.into_iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    found.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn logins() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |_| {}).await;
    let user = |client: Client| async move {
        client
            .query_one("SELECT current_user::text", &[])
            .await
            .unwrap()
            .get::<_, String>(0)
    };
    assert_eq!(
        user(proxy.ann().await).await,
        "ann",
        "SCRAM, passed through"
    );
    assert_eq!(
        user(connect(proxy.port, "old", "postgres").await.unwrap()).await,
        "old",
        "MD5, passed through"
    );
    assert_eq!(
        user(connect(proxy.read_port, "ann", "postgres").await.unwrap()).await,
        "ann",
        "no standby: the primary"
    );
    for (name, password) in [
        ("ann", "wrong"),
        ("old", "wrong"),
        ("nobody", PASSWORD),
        ("bob", PASSWORD),
    ] {
        let login = connect_with(proxy.port, name, "postgres", password, "")
            .await
            .map(drop);
        assert_eq!(code(login), "28P01", "{name}");
    }
    assert_eq!(
        code(connect(proxy.port, "ann", "nowhere").await.map(drop)),
        "3D000"
    );
    assert_eq!(proxy.metric("craton_proxy_auth_failures_total").await, 4);

    // A new password counts at once for whoever has it, and the old one ends with the cache.
    let admin = server.superuser().await;
    admin
        .batch_execute("ALTER ROLE ann PASSWORD 'new one'")
        .await
        .unwrap();
    until("the new password is taken", || async {
        connect_with(proxy.port, "ann", "postgres", "new one", "")
            .await
            .is_ok()
    })
    .await;
    proxy.end().await.unwrap();

    let trusting = Proxy::of(&[&server], |c| c.trust = vec!["127.0.0.0/8".into()]).await;
    let refused = connect(trusting.port, "ann", "postgres").await.map(drop);
    assert_eq!(
        code(refused),
        "08006",
        "the server does not trust the proxy"
    );
    trusting.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_connection_serves_many() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |c| {
        (c.pool_size, c.workers, c.pool_wait_ms) = (1, 2, 15_000);
        c.pools = vec![PoolOverride {
            user: Some("old".into()),
            database: None,
            mode: Some(PoolMode::Session),
            size: Some(2),
        }];
    })
    .await;
    let (a, b, c) = (proxy.ann().await, proxy.ann().await, proxy.ann().await);
    let first = pid(&a).await;
    for client in [&b, &c, &a, &b] {
        assert_eq!(
            pid(client).await,
            first,
            "all workers share the one connection"
        );
    }
    // Who waits gets it when the transaction ends.
    a.batch_execute("BEGIN").await.unwrap();
    let waiting = tokio::spawn(async move { pid(&b).await });
    until("one waits", || async {
        proxy.metric("craton_proxy_waiting").await >= 1
    })
    .await;
    a.batch_execute("COMMIT").await.unwrap();
    assert_eq!(soon("the one that waited", waiting).await.unwrap(), first);
    // Who waits for too long is told what to do.
    a.batch_execute("BEGIN").await.unwrap();
    assert_eq!(
        code(soon("the wait ends", c.batch_execute("SELECT 1")).await),
        "53300"
    );
    a.batch_execute("ROLLBACK").await.unwrap();
    c.batch_execute("SELECT 1").await.unwrap();

    let session = connect(proxy.port, "old", "postgres").await.unwrap();
    let other = connect(proxy.port, "old", "postgres").await.unwrap();
    let own = pid(&session).await;
    assert_ne!(pid(&other).await, own);
    assert_eq!(pid(&session).await, own, "session mode keeps its server");
    drop(session);
    until("the server connection is free again", || async {
        let third = connect(proxy.port, "old", "postgres").await.unwrap();
        third
            .query_one("SELECT pg_backend_pid()", &[])
            .await
            .is_ok_and(|r| r.get::<_, i32>(0) == own)
    })
    .await;
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn prepared_statements_follow_their_client() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |c| {
        (c.pool_size, c.workers, c.statements_per_server_max) = (2, 1, 3);
    })
    .await;
    let (a, b) = (proxy.ann().await, proxy.ann().await);
    let plus = a.prepare("SELECT $1::int + 1").await.unwrap();
    let times = a.prepare("SELECT $1::int * 2").await.unwrap();
    // Somebody else takes the server that they were prepared on.
    let home = pid(&a).await;
    b.batch_execute("BEGIN").await.unwrap();
    assert_eq!(pid(&b).await, home);
    for n in 0..3 {
        assert_eq!(
            a.query_one(&plus, &[&n]).await.unwrap().get::<_, i32>(0),
            n + 1
        );
        assert_eq!(
            a.query_one(&times, &[&n]).await.unwrap().get::<_, i32>(0),
            n * 2
        );
    }
    assert_ne!(pid(&a).await, home);
    // The same text in another session is the same statement on the server.
    let same = b.prepare("SELECT $1::int + 1").await.unwrap();
    assert_eq!(b.query_one(&same, &[&5]).await.unwrap().get::<_, i32>(0), 6);
    b.batch_execute("COMMIT").await.unwrap();
    // A statement that does not parse is an error, and neither end keeps a trace of it.
    assert_eq!(code(a.prepare("SELEC 1").await.map(drop)), "42601");
    a.batch_execute("BEGIN").await.unwrap();
    assert_eq!(code(a.query("SELECT 1/0", &[]).await), "22012");
    assert_eq!(code(a.prepare("SELECT 7").await.map(drop)), "25P02");
    a.batch_execute("ROLLBACK").await.unwrap();
    // More statements than a server may keep.
    for n in 0..10 {
        let statement = a.prepare(&format!("SELECT {n} + $1::int")).await.unwrap();
        assert_eq!(
            a.query_one(&statement, &[&1])
                .await
                .unwrap()
                .get::<_, i32>(0),
            n + 1
        );
    }
    let kept: i64 = a
        .query_one("SELECT count(*) FROM pg_prepared_statements", &[])
        .await
        .unwrap()
        .get(0);
    assert!(kept <= 4, "{kept}");
    assert_eq!(
        a.query_one(&plus, &[&1]).await.unwrap().get::<_, i32>(0),
        2,
        "closed there, and made again"
    );
    // DISCARD ALL by one client does not hurt the other.
    b.batch_execute("DISCARD ALL").await.unwrap();
    assert_eq!(
        a.query_one(&times, &[&21]).await.unwrap().get::<_, i32>(0),
        42
    );
    // Many at once, in one pipeline.
    let all = futures_util::future::join_all((0..50).map(|n| {
        let (a, plus) = (&a, &plus);
        async move { a.query_one(plus, &[&n]).await.unwrap().get::<_, i32>(0) }
    }));
    assert_eq!(soon("the pipeline", all).await, (1..51).collect::<Vec<_>>());
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn state_of_a_session_stays_with_it() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |c| (c.pool_size, c.workers) = (3, 1)).await;
    let zoned = connect_with(
        proxy.port,
        "ann",
        "postgres",
        PASSWORD,
        "application_name=map",
    )
    .await
    .unwrap();
    zoned
        .batch_execute("SET TIME ZONE 'Asia/Tokyo'")
        .await
        .unwrap();
    let other = proxy.ann().await;
    assert_ne!(show(&other, "timezone").await, "Asia/Tokyo");
    assert_eq!(show(&zoned, "timezone").await, "Asia/Tokyo");
    assert_eq!(show(&zoned, "application_name").await, "map");
    assert_eq!(show(&other, "application_name").await, "");
    assert_eq!(
        proxy.metric("craton_proxy_pinned").await,
        0,
        "followed settings pin nobody"
    );

    let tables = proxy.ann().await;
    tables
        .batch_execute("CREATE TEMP TABLE own (n int)")
        .await
        .unwrap();
    let path = proxy.ann().await;
    path.batch_execute("SET search_path TO pg_temp, public")
        .await
        .unwrap();
    let role = proxy.ann().await;
    role.batch_execute("BEGIN; SET LOCAL work_mem TO '7MB'; ROLLBACK")
        .await
        .unwrap();
    assert_eq!(show(&role, "work_mem").await, "4MB");
    role.query("SET work_mem TO '9MB'", &[]).await.unwrap();
    assert_eq!(
        proxy.metric("craton_proxy_pinned").await,
        1,
        "the temporary table alone"
    );
    for _ in 0..3 {
        assert_eq!(show(&other, "search_path").await, "\"$user\", public");
        assert_eq!(show(&other, "work_mem").await, "4MB");
        assert_eq!(show(&role, "work_mem").await, "9MB");
        other.batch_execute("SELECT 1").await.unwrap();
        assert_eq!(show(&path, "search_path").await, "pg_temp, public");
        tables
            .batch_execute("INSERT INTO own VALUES (1)")
            .await
            .unwrap();
    }
    path.batch_execute("RESET search_path").await.unwrap();
    assert_eq!(show(&path, "search_path").await, "\"$user\", public");
    drop((tables, path));
    until("pins end with their clients", || async {
        proxy.metric("craton_proxy_pinned").await == 0
    })
    .await;
    assert_eq!(
        code(other.batch_execute("SELECT * FROM own").await),
        "42P01"
    );

    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn listen_and_notify() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |_| {}).await;
    let other = proxy.ann().await;
    let to = format!(
        "host=127.0.0.1 port={} user=ann dbname=postgres password='it\\'s a secret'",
        proxy.port
    );
    let (listener, mut connection) = tokio_postgres::connect(&to, NoTls).await.unwrap();
    let (heard, mut hears) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let mut messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(n) = message {
                heard.send(n.payload().to_owned()).await.unwrap();
            }
        }
    });
    listener.batch_execute("LISTEN news").await.unwrap();
    other.batch_execute("NOTIFY news, 'hello'").await.unwrap();
    assert_eq!(
        soon("the notification", hears.recv()).await.as_deref(),
        Some("hello")
    );
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_both_ways_and_cancel() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    let proxy = Proxy::of(&[&server], |c| (c.pool_size, c.workers) = (2, 1)).await;
    let client = proxy.ann().await;
    let sink = client
        .copy_in("COPY notes (note) FROM STDIN")
        .await
        .unwrap();
    futures_util::pin_mut!(sink);
    let line = axum::body::Bytes::from(format!("{}\n", "x".repeat(999)));
    for _ in 0..5000 {
        sink.send(line.clone()).await.unwrap();
    }
    assert_eq!(
        soon("COPY ends", sink.as_mut().finish()).await.unwrap(),
        5000
    );
    let stream = client
        .copy_out("COPY notes (note) TO STDOUT")
        .await
        .unwrap();
    let bytes = stream.try_fold(0, |sum, part| async move { Ok(sum + part.len()) });
    assert_eq!(soon("COPY out", bytes).await.unwrap(), 5_000_000);
    // A COPY that fails, and one that the client gives up.
    let sink = client
        .copy_in("COPY notes (id, note) FROM STDIN")
        .await
        .unwrap();
    futures_util::pin_mut!(sink);
    sink.send(axum::body::Bytes::from_static(b"no number\tx\n"))
        .await
        .unwrap();
    assert!(soon("a bad COPY", sink.as_mut().finish()).await.is_err());
    {
        let sink = client
            .copy_in::<_, axum::body::Bytes>("COPY notes (note) FROM STDIN")
            .await
            .unwrap();
        drop(sink);
    }
    assert_eq!(
        client
            .query_one("SELECT count(*) FROM notes", &[])
            .await
            .unwrap()
            .get::<_, i64>(0),
        5000
    );

    let token = client.cancel_token();
    let sleeping =
        tokio::spawn(async move { (client.batch_execute("SELECT pg_sleep(100)").await, client) });
    let admin = server.superuser().await;
    until("it sleeps", || async {
        let sql = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        !admin.query(sql, &[]).await.unwrap().is_empty()
    })
    .await;
    token.cancel_query(NoTls).await.unwrap();
    let (result, client) = soon("the cancelled query", sleeping).await.unwrap();
    assert_eq!(code(result), "57014");
    // A cancel of a client that runs nothing hits nobody. Until the proxy hangs up it could hit what runs next.
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
    token.cancel_query_raw(&mut stream, NoTls).await.unwrap();
    let mut rest = Vec::new();
    let _ = soon("the proxy hangs up", stream.read_to_end(&mut rest)).await;
    client.batch_execute("SELECT 1").await.unwrap();
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pgbench_in_all_protocols() {
    let root = directory();
    let server = Postgres::primary(root.path()).await;
    // Fewer server connections than clients on either worker: they change hands all the time.
    let proxy = Proxy::of(&[&server], |c| (c.pool_size, c.workers) = (3, 2)).await;
    let port = proxy.port;
    let work = tokio::task::spawn_blocking(move || {
        common::pgbench(port, &["-i", "-q", "-s", "1"]);
        for protocol in ["simple", "extended", "prepared"] {
            // A thread for each client: preparing blocks, and a thread that waits for one client in the pool must not
            // keep another one from ending its transaction.
            let common = ["-n", "-c", "16", "-j", "16", "-M", protocol];
            common::pgbench(port, &[&common[..], &["-S", "-t", "100"]].concat());
            let text = common::pgbench(port, &[&common[..], &["-t", "20"]].concat());
            assert!(text.contains("processed: 320/320"), "{text}");
        }
    });
    // Thousands of transactions, on a machine that does other things too.
    let runs = tokio::time::timeout(Duration::from_secs(180), work).await;
    runs.unwrap().unwrap();
    let check = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)";
    assert!(
        proxy
            .ann()
            .await
            .query_one(check, &[])
            .await
            .unwrap()
            .get::<_, bool>(0)
    );
    assert_eq!(proxy.metric("craton_proxy_pinned").await, 0);
    assert!(proxy.metric("craton_proxy_servers").await <= 4);
    proxy.end().await.unwrap();
}

/// A client that speaks bytes.
struct Raw {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Raw {
    async fn trusted(port: u16) -> Self {
        let mut raw = Self {
            stream: TcpStream::connect(("127.0.0.1", port)).await.unwrap(),
            buffer: Vec::new(),
        };
        let mut out = Vec::new();
        startup::put_startup(&mut out, [("user", "ann"), ("database", "postgres")]);
        raw.stream.write_all(&out).await.unwrap();
        raw
    }

    async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some((f, len)) = frame(&self.buffer, 1 << 20).unwrap() {
                let found = (f.tag, f.body.to_vec());
                self.buffer.drain(..len);
                return Some(found);
            }
            let read = soon("an answer", self.stream.read_buf(&mut self.buffer))
                .await
                .ok()?;
            if read == 0 {
                return None;
            }
        }
    }

    /// Tags up to and with the next ReadyForQuery.
    async fn tags(&mut self) -> String {
        let mut tags = String::new();
        while let Some((tag, _)) = self.next().await {
            tags.push(char::from(tag));
            if tag == b'Z' {
                break;
            }
        }
        tags
    }
}

fn say(raw: &mut Raw, build: &dyn Fn(&mut Vec<u8>)) {
    let mut out = Vec::new();
    build(&mut out);
    assert_eq!(raw.stream.try_write(&out).unwrap(), out.len());
}

/// A server that trusts the proxy, so that raw clients need no login.
async fn trusting() -> (tempfile::TempDir, Postgres, Proxy) {
    let root = directory();
    let mut server = Postgres::primary(root.path()).await;
    std::fs::write(
        root.path().join("a/pg_hba.conf"),
        "host all all all trust\n",
    )
    .unwrap();
    server.stop();
    server.start().await;
    let proxy = Proxy::of(&[&server], |c| {
        c.trust = vec!["127.0.0.1".into()];
        (c.pool_size, c.workers) = (1, 1);
    })
    .await;
    (root, server, proxy)
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_pass_without_being_held() {
    if ran_alone("large_values_pass_without_being_held") {
        return;
    }
    let (_root, _server, proxy) = trusting().await;
    let mut raw = Raw::trusted(proxy.port).await;
    assert!(raw.tags().await.ends_with('Z'));
    let mut out = Vec::new();
    frontend::put_query(&mut out, "SELECT repeat('x', 256 * 1024 * 1024)");
    raw.stream.write_all(&out).await.unwrap();
    let before = resident_bytes();
    let (mut total, mut most, mut piece) = (0_usize, 0, vec![0; 256 * 1024]);
    let mut last = [0; 6];
    // Until the bytes end with ReadyForQuery.
    while last != [b'Z', 0, 0, 0, 5, b'I'] {
        let n = soon("the next piece", raw.stream.read(&mut piece))
            .await
            .unwrap();
        assert_ne!(n, 0);
        total += n;
        most = most.max(resident_bytes().saturating_sub(before));
        let k = n.min(6);
        last.rotate_left(k);
        last[6 - k..].copy_from_slice(&piece[n - k..n]);
    }
    assert!(total > 256 * 1024 * 1024, "{total}");
    assert!(most < 16 * 1024 * 1024, "the proxy grew by {most} bytes");

    // The other way, with a text that is longer than any buffer, and a pin at its end.
    out.clear();
    let text = format!(
        "SELECT length('{}'); SELECT 1 INTO TEMP pinned",
        "y".repeat(8 * 1024 * 1024)
    );
    frontend::put_query(&mut out, &text);
    raw.stream.write_all(&out).await.unwrap();
    assert_eq!(raw.tags().await, "TDCCZ");
    assert_eq!(proxy.metric("craton_proxy_pinned").await, 1);
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_one_by_one() {
    let (_root, _server, proxy) = trusting().await;
    let mut raw = Raw::trusted(proxy.port).await;
    assert!(raw.tags().await.ends_with('Z'));
    // A Sync and a Close alone need no server.
    say(&mut raw, &|o| frontend::put_sync(o));
    assert_eq!(raw.tags().await, "Z");
    // An unnamed statement lives from one batch to the next, though the server may have served others.
    say(&mut raw, &|o| {
        frontend::put_parse(o, "", "SELECT 1");
        frontend::put_statement(o, b'D', b"");
        frontend::put_sync(o);
    });
    assert_eq!(raw.tags().await, "1tTZ");
    let mut other = Raw::trusted(proxy.port).await;
    assert!(other.tags().await.ends_with('Z'));
    say(&mut other, &|o| {
        frontend::put_parse(o, "", "SELECT 'another'");
        frontend::put_bind_text(o, "", &[]);
        frontend::put_execute(o);
        frontend::put_sync(o);
    });
    assert_eq!(other.tags().await, "12DCZ");
    say(&mut raw, &|o| {
        frontend::put_bind_text(o, "", &[]);
        frontend::put_execute(o);
        frontend::put_sync(o);
    });
    let mut row = Vec::new();
    loop {
        match raw.next().await.unwrap() {
            (b'D', body) => row = body,
            (b'Z', _) => break,
            (tag, _) => assert!(b"2C".contains(&tag), "{}", char::from(tag)),
        }
    }
    assert!(row.ends_with(b"1"), "{row:?}");
    // Twice the same name is an error in the server's words, and the batch is skipped up to its Sync.
    let twice = |o: &mut Vec<u8>| {
        frontend::put_parse(o, "s", "SELECT 2");
        frontend::put_parse(o, "s", "SELECT 3");
        frontend::put_bind_text(o, "s", &[]);
        frontend::put_execute(o);
        frontend::put_sync(o);
    };
    say(&mut raw, &twice);
    assert_eq!(raw.tags().await, "1EZ");
    // The first of them stands: bound twice in a pipeline of two batches, then closed.
    say(&mut raw, &|o| {
        for _ in 0..2 {
            frontend::put_bind_text(o, "s", &[]);
            frontend::put_execute(o);
            frontend::put_sync(o);
        }
        frontend::put_statement(o, b'C', b"s");
        frontend::put_sync(o);
        frontend::put_bind_text(o, "s", &[]);
        frontend::put_sync(o);
    });
    assert_eq!(raw.tags().await, "2DCZ");
    assert_eq!(raw.tags().await, "2DCZ");
    assert_eq!(raw.tags().await, "3Z");
    assert_eq!(raw.tags().await, "EZ");
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_is_cancelled() {
    let (_root, server, proxy) = trusting().await;
    let admin = server.superuser().await;
    let sleepers = || async {
        let sql = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        admin.query(sql, &[]).await.unwrap().len()
    };
    let mut raw = Raw::trusted(proxy.port).await;
    assert!(raw.tags().await.ends_with('Z'));
    say(&mut raw, &|o| {
        // Far longer than what follows is waited for.
        frontend::put_query(o, "SELECT pg_sleep(1000)");
    });
    until("it sleeps", || async { sleepers().await == 1 }).await;
    drop(raw);
    until("it is cancelled", || async { sleepers().await == 0 }).await;
    // Its place in the pool of one is free again.
    connect(proxy.port, "ann", "postgres")
        .await
        .unwrap()
        .batch_execute("SELECT 1")
        .await
        .unwrap();
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_sent_ahead_of_copy() {
    let (_root, _server, proxy) = trusting().await;
    let (mut raw, mut other) = (
        Raw::trusted(proxy.port).await,
        Raw::trusted(proxy.port).await,
    );
    assert!(raw.tags().await.ends_with('Z') && other.tags().await.ends_with('Z'));
    // As libpq does.
    say(&mut raw, &|o| {
        frontend::put_parse(o, "", "COPY notes (note) FROM STDIN");
        frontend::put_bind_text(o, "", &[]);
        frontend::put_execute(o);
        frontend::put_sync(o);
    });
    for expected in [b'1', b'2', b'G'] {
        assert_eq!(raw.next().await.unwrap().0, expected);
    }
    say(&mut raw, &|o| {
        frontend::put_copy_data(o, b"one\n");
        frontend::put_copy_done(o);
        frontend::put_sync(o);
    });
    assert_eq!(raw.tags().await, "CZ");
    say(&mut other, &|o| {
        frontend::put_query(o, "SELECT count(*) FROM notes");
    });
    assert_eq!(other.tags().await, "TDCZ", "the server was given back");
    proxy.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_bytes_hurt_nobody_else() {
    let (_root, _server, proxy) = trusting().await;
    let client = connect(proxy.port, "ann", "postgres").await.unwrap();
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..200_u32 {
        let mut bytes: Vec<u8> = (0..random() % 200)
            .map(|_| u8::try_from(random() & 0xFF).unwrap())
            .collect();
        let mut raw = if round % 2 == 0 {
            Raw {
                stream: TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap(),
                buffer: Vec::new(),
            }
        } else {
            // Past the login, messages of known types with random bodies.
            let tag = *b"QPBDECSHFdcfXpz"
                .get(usize::try_from(random() % 15).unwrap())
                .unwrap();
            let len = i32::try_from(bytes.len() + 4).unwrap();
            bytes.splice(0..0, [vec![tag], len.to_be_bytes().to_vec()].concat());
            let mut raw = Raw::trusted(proxy.port).await;
            raw.tags().await;
            raw
        };
        // The proxy may hang up in the middle.
        let _ = raw.stream.write_all(&bytes).await;
        let _ = raw.stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = soon("the proxy hangs up", raw.stream.read_to_end(&mut rest)).await;
    }
    soon("the well-behaved client", client.batch_execute("SELECT 1"))
        .await
        .unwrap();
    // One that never says anything is asked to go, and giants are not waited for.
    let mut giant = Raw::trusted(proxy.port).await;
    giant.tags().await;
    giant.stream.write_all(b"Q\x7f\xff\xff\xff").await.unwrap();
    assert_eq!(giant.next().await.map(|m| m.0), Some(b'E'));
    assert_eq!(giant.next().await, None);
    until("all are gone", || async {
        proxy.metric("craton_proxy_clients").await <= 1
    })
    .await;
    soon(
        "a quick end",
        tokio::time::timeout(Duration::from_secs(20), proxy.end()),
    )
    .await
    .unwrap()
    .unwrap();
}
