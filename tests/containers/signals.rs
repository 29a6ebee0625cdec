//! What a container does with signals, and what clients of the proxy hear of it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::process::Command;
use std::time::{Duration, Instant};

use crate::containers::{self, Stack, tag};
use crate::writer::{TABLE, Writer};
use crate::{NODES, new_leader, start, turn};

/// Sends a signal to the first process and waits for the container's end.
fn stopped_by(stack: &Stack, service: &str, signal: &str) -> (String, Duration) {
    let id = stack.container(service);
    let begun = Instant::now();
    stack.docker(&["kill", "--signal", signal, &id]);
    let code = stack.docker(&["wait", &id]);
    let took = begun.elapsed();
    eprintln!("{service}: {signal}: exit code {code} after {took:?}");
    (code, took)
}

/// How often PostgreSQL had to recover, by the node's own log.
fn recoveries(stack: &Stack, node: &str) -> usize {
    let log = stack.sh(node, "cat /var/lib/postgresql/data/pg.log");
    log.matches("was not properly shut down").count()
        + log.matches("was interrupted; last known up").count()
}

/// Ends the leader's container by a signal, has another lead, and brings it back.
fn leader_by(stack: &Stack, signal: &str) -> (String, Duration, Vec<String>) {
    let old = stack
        .leader("pgslave1")
        .or_else(|| stack.leader("pgmaster"))
        .unwrap();
    let before = recoveries(stack, &old);
    let who = format!("during-{}", signal.to_lowercase());
    let writer = Writer::session(stack, &who);
    let (code, took) = stopped_by(stack, &old, signal);
    let new = new_leader(stack, &old);
    stack.wait("rows are written again", Duration::from_secs(30), || {
        stack.sql(&format!(
            "INSERT INTO w VALUES ('after {signal}', 1) ON CONFLICT DO NOTHING"
        ))
    });
    let told = writer.complaints();
    eprintln!(
        "{signal}: the client's longest pause: {:?}; it heard {told:?}",
        writer.longest_gap()
    );
    writer.finish();
    stack.docker(&["start", &stack.container_of_dead(&old)]);
    stack.whole(&new, &NODES, Duration::from_secs(120));
    if signal != "QUIT" {
        assert_eq!(
            recoveries(stack, &old),
            before,
            "{signal}: PostgreSQL was not stopped in order"
        );
    }
    (code, took, told)
}

#[test]
#[ignore = "three minutes; make test-containers runs it"]
fn signals() {
    let Some(_turn) = turn() else { return };
    let stack = start("signals");
    stack.sql(TABLE).unwrap();
    let (code, took, told) = leader_by(&stack, "TERM");
    assert_eq!((code.as_str(), told), ("0", vec![]));
    assert!(took < Duration::from_secs(20), "{took:?}");
    let (code, took, _) = leader_by(&stack, "INT");
    assert_eq!(code, "0");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let (code, took, _) = leader_by(&stack, "QUIT");
    assert_eq!(
        code, "131",
        "as a shell has it: 128 and the signal's number"
    );
    assert!(took < Duration::from_secs(3), "{took:?}");
    others(&stack);
    stops_in_time(&stack);
    a_start_that_waits(&stack);
}

/// A container that waits for a node is told to stop: its first process gets only the signals that it handles.
fn a_start_that_waits(stack: &Stack) {
    let image = format!("craton/proxy:{}", tag());
    for signal in ["TERM", "INT", "QUIT"] {
        let id = stack.docker(&["run", "-d", "-e", "BACKENDS=0:nobody", &image]);
        let log = || {
            let out = containers::run(Command::new("docker").args(["logs", &id]));
            containers::text(&out)
        };
        stack.wait("it waits for a node", Duration::from_secs(30), || {
            let text = log();
            let waits = text.contains("waiting for a node that tells");
            if waits { Ok(()) } else { Err(text) }
        });
        let begun = Instant::now();
        stack.docker(&["kill", "--signal", signal, &id]);
        assert_eq!(stack.docker(&["wait", &id]), "0", "{signal}: {}", log());
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "{signal}: {took:?}");
        let said = format!("told to stop (SIG{signal})");
        assert!(log().contains(&said), "{}", log());
        stack.docker(&["rm", &id]);
    }
}

/// The proxy and the backup daemon.
fn others(stack: &Stack) {
    for service in ["pgpool", "backup"] {
        for (signal, code) in [("TERM", "0"), ("INT", "0"), ("QUIT", "131")] {
            let limit = Duration::from_secs(15);
            let ended = stopped_by(stack, service, signal);
            assert_eq!(ended.0, code, "{service}: {signal}");
            assert!(ended.1 < limit, "{service}: {signal}: {:?}", ended.1);
            stack.docker(&["start", &stack.container_of_dead(service)]);
            stack.wait("it serves again", Duration::from_secs(60), || {
                stack.try_sh(service, "craton container health --ready")
            });
        }
    }
    stack.wait("WAL comes in again", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman check all")
    });
    stack.wait("clients are let in", Duration::from_secs(60), || {
        stack.sql("SELECT 1")
    });
}

/// `docker stop` never has to kill, and an orphan does not stay a zombie.
fn stops_in_time(stack: &Stack) {
    for service in crate::ALL {
        let id = stack.container(service);
        stack.docker(&["exec", "-d", &id, "sh", "-c", "(sleep 1 &)"]);
        stack.wait(
            "its orphan has ended and is taken away",
            Duration::from_secs(10),
            || {
                let all = stack.sh(
                    service,
                    "cat /proc/[0-9]*/stat 2>/dev/null | grep -E '\\((sleep|sh)\\)' || true",
                );
                if all.contains("(sleep)") || all.contains(" Z ") {
                    Err(all)
                } else {
                    Ok(())
                }
            },
        );
    }
    let out = stack.compose_ok(&["stop"]);
    assert!(!out.contains("error"), "{out}");
    for service in crate::ALL {
        let id = stack.container_of_dead(service);
        let state = stack.docker(&[
            "inspect",
            "--format",
            "{{.State.ExitCode}} {{.State.OOMKilled}}",
            &id,
        ]);
        assert_eq!(state, "0 false", "{service}");
    }
    stack.compose_ok(&["start"]);
    stack.whole("pgslave1", &NODES, Duration::from_secs(180));
}
