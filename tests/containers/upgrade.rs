//! Other images, one container at a time, while clients write through the proxy.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::containers::{Stack, tag};
use crate::writer::{TABLE, Writer};
use crate::{ALL, NODES, start, turn};

/// The newer images' tag.
fn next() -> String {
    format!("{}-next", tag())
}

fn image_of(service: &str) -> &'static str {
    match service {
        "pgpool" => "craton/proxy",
        "backup" => "craton/backup",
        _ => "craton/postgis",
    }
}

/// The same program in images of their own, so that each container can be told from its predecessor.
fn next_images() {
    for image in ["craton/postgis", "craton/proxy", "craton/backup"] {
        let mut build = Command::new("docker")
            .args([
                "build",
                "--quiet",
                "--tag",
                &format!("{image}:{}", next()),
                "-",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let text = format!("FROM {image}:{}\nLABEL craton.test.generation=2\n", tag());
        build
            .stdin
            .take()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        assert!(build.wait().unwrap().success(), "{image}");
    }
}

/// As docs/guide/docker.md has it.
fn replace(stack: &Stack, service: &str) {
    let begun = Instant::now();
    let before = stack.container(service);
    stack.compose_ok(&["up", "-d", "--no-deps", service]);
    let now = stack.container(service);
    assert_ne!(before, now, "{service} was not made anew");
    let image = stack.docker(&["inspect", "--format", "{{.Image}}", &now]);
    let next = format!("{}:{}", image_of(service), next());
    assert_eq!(
        image,
        stack.docker(&["image", "inspect", "--format", "{{.Id}}", &next])
    );
    eprintln!("{service} replaced: {:?}", begun.elapsed());
}

/// The backup, the standbys, the leader: no client hears of it. Then the proxy, whose clients connect again.
#[test]
#[ignore = "three minutes; make test-containers runs it"]
fn image_upgrade() {
    let Some(_turn) = turn() else { return };
    let stack = start("upgrade");
    stack.sql(TABLE).unwrap();
    next_images();
    let session = Writer::session(&stack, "session");
    let reconnecting = Writer::reconnecting(&stack, "reconnecting");
    let term = stack.status("pgslave1").unwrap()["term"].as_u64().unwrap();
    stack.use_tag(&next());
    replace(&stack, "backup");
    stack.wait("WAL comes in again", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman check all")
    });
    let mut leader = stack.leader("pgslave1").unwrap();
    for standby in NODES.iter().filter(|n| **n != leader) {
        replace(&stack, standby);
        let now = stack.whole(&leader, &NODES, Duration::from_secs(120));
        assert_eq!(
            now, leader,
            "a standby's replacement is no reason for another leader"
        );
    }
    assert_eq!(stack.status(&leader).unwrap()["term"], term);
    replace(&stack, &leader);
    let asked = NODES.iter().find(|n| **n != leader).unwrap();
    let after = stack.whole(asked, &NODES, Duration::from_secs(120));
    assert_ne!(after, leader, "it came back as a standby");
    assert_eq!(
        stack.status(asked).unwrap()["term"],
        term + 1,
        "one handover"
    );
    leader = after;
    for writer in [&session, &reconnecting] {
        writer.goes_on();
        assert_eq!(writer.complaints(), Vec::<String>::new());
        let gap = writer.longest_gap();
        eprintln!("the longest pause of a client: {gap:?}");
        assert!(gap < Duration::from_secs(5), "{gap:?}");
    }

    // Its clients are on its sockets: they are told, and connect again.
    replace(&stack, "pgpool");
    stack.wait("the proxy is back", Duration::from_secs(60), || {
        stack.sql("SELECT 1")
    });
    reconnecting.goes_on();
    let told = session.complaints().join("\n");
    eprintln!("what a session of the replaced proxy hears:\n{told}");
    assert!(
        told.contains("FATAL:  the proxy is shutting down"),
        "{told}"
    );
    let told = reconnecting.complaints().join("\n");
    eprintln!("what connects meanwhile hears:\n{told}");
    eprintln!("its longest pause: {:?}", reconnecting.longest_gap());
    let rows = [session.finish(), reconnecting.finish()];
    eprintln!("{rows:?} rows were acknowledged, and all are there");
    for service in ALL {
        let image = stack.docker(&[
            "inspect",
            "--format",
            "{{.Config.Image}}",
            &stack.container(service),
        ]);
        assert_eq!(image, format!("{}:{}", image_of(service), next()));
    }
    assert_eq!(stack.leader(&leader).unwrap(), leader);
}
