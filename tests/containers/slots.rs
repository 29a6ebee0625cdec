//! A logical slot of PostgreSQL 17, made with `failover`: its consumer goes on from the next leader, after a killed
//! container and after a switchover. PostgreSQL copies such slots by itself; the agents see to it that it does so soon.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail at any line"
)]

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use crate::containers::{self, Stack};
use crate::writer::{TABLE, Writer};
use crate::{ALL, NODES, another, new_leader, start, turn};

const SLOT: &str = "dbz";
/// As the guide has it: all members, and the one that takes writes. What it got is in a file.
const CONSUME: &str = r#"while :; do
  pg_recvlogical -d "host=pgmaster,pgslave1,pgslave2,pgslave3 user=dbz dbname=monkey_db connect_timeout=2 target_session_attrs=read-write" \
    --slot dbz --start --no-loop -o skip-empty-xacts=1 -F 1 -s 1 -f /tmp/consumed
  sleep 0.2; done"#;
/// Copies of a slot that is consumed, on every standby. A former leader's worker gives up once, and PostgreSQL starts
/// another 10 s later.
const COPIES: Duration = Duration::from_secs(25);

struct Consumer<'s> {
    stack: &'s Stack,
    id: String,
}

impl<'s> Consumer<'s> {
    fn start(stack: &'s Stack) -> Self {
        let password = ["PGPASSWORD=a consumer's"];
        let id = stack.client("consumer", "postgis", &password, CONSUME);
        Self { stack, id }
    }

    /// The numbers of a writer's rows, in the order in which they were first seen.
    fn seen(&self, who: &str) -> Vec<u64> {
        let show = [
            "exec",
            &self.id,
            "bash",
            "-c",
            "cat /tmp/consumed 2>/dev/null; true",
        ];
        let text = self.stack.docker(&show);
        let mark = format!("table public.w: INSERT: who[text]:'{who}' n[bigint]:");
        let mut known = BTreeSet::new();
        // The last line may be half written: a number that is cut off is another one.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let numbers = whole.lines().filter_map(|l| l.strip_prefix(&mark));
        numbers
            .map(|n| n.trim().parse::<u64>().unwrap())
            .filter(|n| known.insert(*n))
            .collect()
    }

    /// It gets every row that was acknowledged, in the order of the one writer.
    fn has_all(&self, writer: &Writer<'_>, who: &str, what: &str) {
        let acknowledged: Vec<u64> = writer.acknowledged().into_iter().map(|(_, n)| n).collect();
        assert!(acknowledged.len() > 10, "{what}: {}", acknowledged.len());
        let last = *acknowledged.last().unwrap();
        let seen = self.stack.wait(
            &format!("{what}: the consumer has row {last}"),
            Duration::from_secs(60),
            || {
                let seen = self.seen(who);
                if seen.iter().any(|n| *n >= last) {
                    Ok(seen)
                } else {
                    Err(format!("it is at {:?}; {}", seen.last(), self.log()))
                }
            },
        );
        let known: BTreeSet<u64> = seen.iter().copied().collect();
        let missed: Vec<&u64> = acknowledged.iter().filter(|n| !known.contains(n)).collect();
        assert!(missed.is_empty(), "{what}: it missed {missed:?}");
        let disorder = seen.windows(2).find(|w| w[0] >= w[1]);
        assert_eq!(disorder, None, "{what}");
        eprintln!("{what}: the consumer has all of {}", acknowledged.len());
    }

    fn log(&self) -> String {
        containers::text(&containers::run(
            Command::new("docker").args(["logs", "--tail", "10", &self.id]),
        ))
    }
}

impl Drop for Consumer<'_> {
    fn drop(&mut self) {
        containers::run(Command::new("docker").args(["rm", "-f", "-v", &self.id]));
    }
}

/// Until every standby would offer the slot.
fn copies(stack: &Stack, leader: &str, what: &str) {
    stack.wait(what, COPIES, || {
        let status = stack.status(leader)?;
        let slots = status["slots"].as_array().cloned().unwrap_or_default();
        let found = slots.iter().find(|s| s["name"] == SLOT);
        let found = found.ok_or_else(|| format!("no slot {SLOT}: {slots:?}"))?;
        let on = found["survives_on"].as_array().map_or(0, Vec::len);
        if on == NODES.len() - 1 {
            Ok(())
        } else {
            Err(found.to_string())
        }
    });
}

fn make() -> String {
    format!(
        "SELECT pg_create_logical_replication_slot('{SLOT}', 'test_decoding', failover => true)"
    )
}

#[test]
#[ignore = "four minutes; make test-containers runs it"]
fn logical_slots() {
    let Some(_turn) = turn() else { return };
    let stack = start("slots");
    stack.sh("pgmaster", "craton config set postgresql.wal_level=logical");
    stack.sh("pgmaster", "craton restart --all --pending");
    let leader = stack.whole("pgslave1", &NODES, Duration::from_secs(120));
    stack.sql(TABLE).unwrap();
    stack
        .sql("CREATE ROLE dbz LOGIN REPLICATION PASSWORD 'a consumer''s'")
        .unwrap();
    stack.sql(&make()).unwrap();
    // A copy counts once the leader's slot has moved past what the standby can still keep, and a consumer moves it.
    let consumer = Consumer::start(&stack);
    let who = "rows";
    let writer = Writer::reconnecting(&stack, who);
    copies(&stack, &leader, "copies of a new slot");

    let id = stack.container(&leader);
    stack.docker(&["kill", &id]);
    let second = new_leader(&stack, &leader);
    writer.goes_on();
    consumer.has_all(&writer, who, "after a killed container");
    stack.docker(&["start", &id]);
    stack.whole(&second, &NODES, Duration::from_secs(120));
    copies(&stack, &second, "copies with the former leader back");

    stack.sh(&second, "craton switchover");
    let third = new_leader(&stack, &second);
    // A failover right after it finds a slot: the other standbys had their copies.
    let kept = kept_at_once(&stack, &third);
    assert!(kept > 0, "nobody has a copy right after a switchover");
    copies(&stack, &third, "copies after a switchover");
    writer.goes_on();
    consumer.has_all(&writer, who, "after a switchover");
    writer.finish();
    drop(consumer);
    a_dropped_slot_goes_everywhere(&stack, &third);
    assert_eq!(stack.leader(another(&third)).unwrap(), third);
    for service in ALL {
        stack.container(service);
    }
}

/// How many standbys have a copy as soon as the new leader tells of the slot.
fn kept_at_once(stack: &Stack, leader: &str) -> usize {
    stack.wait("the slot is told of", Duration::from_secs(10), || {
        let status = stack.status(leader)?;
        let slots = status["slots"].as_array().cloned().unwrap_or_default();
        let found = slots.iter().find(|s| s["name"] == SLOT);
        let found = found.ok_or_else(|| format!("{slots:?}"))?;
        Ok(found["survives_on"].as_array().map_or(0, Vec::len))
    })
}

/// Its copies go with the slot.
fn a_dropped_slot_goes_everywhere(stack: &Stack, leader: &str) {
    stack.wait("the slot can be dropped", Duration::from_secs(20), || {
        let drop = format!("SELECT pg_drop_replication_slot('{SLOT}')");
        stack.sql_on(leader, "postgres", &drop)
    });
    for node in NODES {
        let what = format!("it is gone on {node}");
        stack.wait(&what, Duration::from_secs(40), || {
            let count =
                format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
            match stack.sql_on(node, "postgres", &count)?.as_str() {
                "0" => Ok(()),
                other => Err(other.to_owned()),
            }
        });
    }
}
