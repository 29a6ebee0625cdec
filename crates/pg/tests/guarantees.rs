//! Settings that give up what is promised of commits are found wherever they are set.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on must say where"
)]

mod common;

use common::{LIMIT, Member, ran_as_postgres};

async fn found(member: &Member) -> Vec<String> {
    let found = member.control.weakenings(LIMIT).await.unwrap();
    let mut found: Vec<String> = found
        .into_iter()
        .map(|w| {
            let place = if w.shared { w.place } else { "a file".into() };
            format!("{place}: {} = {}", w.name, w.value)
        })
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn settings_that_promise_less_are_found() {
    if ran_as_postgres("settings_that_promise_less_are_found") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mut member = Member::new_primary(root.path(), "a").await;
    assert_eq!(found(&member).await, [""; 0]);
    for sql in [
        "CREATE ROLE app",
        "CREATE DATABASE shop",
        "ALTER ROLE app SET synchronous_commit = on",
        "ALTER ROLE app SET work_mem = '8MB'",
    ] {
        member.run(sql).await;
    }
    assert_eq!(found(&member).await, [""; 0]);
    for sql in [
        "ALTER ROLE app SET Synchronous_Commit = LOCAL",
        "ALTER DATABASE shop SET client_min_messages = error",
        "ALTER ROLE app IN DATABASE shop SET synchronous_commit = off",
        "ALTER ROLE ALL SET client_min_messages = error",
    ] {
        member.run(sql).await;
    }
    let settings = &mut member.managed.settings;
    settings.insert("client_min_messages".into(), "error".into());
    member.instance.write_config(&member.managed).await.unwrap();
    assert_eq!(
        found(&member).await,
        [
            ": client_min_messages = error",
            "a file: client_min_messages = error",
            "database shop: client_min_messages = error",
            "role app in database shop: synchronous_commit = off",
            "role app: synchronous_commit = local",
        ]
    );
}
