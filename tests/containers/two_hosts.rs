//! The example of two database hosts and a third one with the backup and a vote. Each host is a network namespace of its
//! own, which its compose project takes for the host's network.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::containers::{self, Stack, root, tag};
use crate::turn;

/// A network, and what stands for a host in it: something that has its name, its address, and runs nothing.
struct Hosts {
    network: String,
    files: tempfile::TempDir,
    names: Vec<String>,
}

impl Hosts {
    fn new(names: &[&str]) -> Self {
        let network = format!("craton-test-hosts-{}", std::process::id());
        let hosts = Self {
            files: tempfile::tempdir().unwrap(),
            names: names.iter().map(|n| format!("{network}-{n}")).collect(),
            network,
        };
        hosts.clear();
        let docker = |args: &[&str]| {
            let out = containers::run(Command::new("docker").args(args));
            assert!(out.status.success(), "{args:?}: {}", containers::text(&out));
        };
        docker(&["network", "create", &hosts.network]);
        for (name, short) in hosts.names.iter().zip(names) {
            let image = format!("craton/proxy:{}", tag());
            docker(&[
                "run",
                "-d",
                "--init",
                "--name",
                name,
                "--hostname",
                short,
                "--network",
                &hosts.network,
                "--network-alias",
                short,
                &image,
                "sleep",
                "infinity",
            ]);
        }
        hosts
    }

    fn clear(&self) {
        for name in &self.names {
            containers::run(Command::new("docker").args(["rm", "-f", "-v", name]));
        }
        containers::run(Command::new("docker").args(["network", "rm", &self.network]));
    }

    fn name(&self, host: &str) -> String {
        format!("{}-{host}", self.network)
    }

    /// The example's file, on that host.
    fn stack(&self, host: &str, file: &str, service: &str, variables: &[(&str, &str)]) -> Stack {
        let mut over = format!("version: '3.8'\nservices:\n  {service}:\n");
        // A container in another one's network has that one's name.
        let _ = write!(
            over,
            "    hostname: ''\n    network_mode: \"container:{}\"\n",
            self.name(host)
        );
        let path = self.files.path().join(format!("{host}.yml"));
        std::fs::write(&path, over).unwrap();
        let files: [PathBuf; 2] = [root().join("docker-compose/two-hosts").join(file), path];
        Stack::of_files(host, &files, &[&[("HOST", host)], variables].concat())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Waits until both hosts' members lead or stream and all three have a say; returns who leads.
fn whole(asked: &Stack, seconds: u64) -> String {
    asked.wait("both stream or lead", Duration::from_secs(seconds), || {
        let text = asked.try_sh("node", "craton --json status")?;
        let status: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        let members = status["members"].as_array().unwrap();
        let good = |n: &str| {
            let m = members.iter().find(|m| m["id"] == n);
            m.is_some_and(|m| m["streaming"] == true || m["role"] == "leader")
        };
        let voters = status["voters"].as_array().map_or(0, Vec::len);
        if status["writable"] == true && good("db1") && good("db2") && voters == 3 {
            Ok(status["leader"].as_str().unwrap().to_owned())
        } else {
            Err(text)
        }
    })
}

#[test]
#[ignore = "two minutes; make test-containers runs it"]
fn two_hosts() {
    let Some(_turn) = turn() else { return };
    containers::images();
    let hosts = Hosts::new(&["db1", "db2", "store1"]);
    let db1 = hosts.stack(
        "db1",
        "node.yml",
        "node",
        &[("PEER", "db2"), ("FIRST", "db1")],
    );
    let db2 = hosts.stack(
        "db2",
        "node.yml",
        "node",
        &[("PEER", "db1"), ("FIRST", "db1")],
    );
    let store = hosts.stack(
        "store1",
        "store.yml",
        "backup",
        &[("NODE1", "db1"), ("NODE2", "db2")],
    );
    db1.up(&["node"]);
    db2.up(&["node"]);
    store.up(&["backup"]);
    assert_eq!(whole(&db1, 180), "db1");
    db1.sql_on(
        "node",
        "monkey_db",
        "CREATE TABLE t (id bigserial primary key)",
    )
    .unwrap();
    db1.sql_on("node", "monkey_db", "INSERT INTO t DEFAULT VALUES")
        .unwrap();
    store.wait("the third host backs up", Duration::from_secs(90), || {
        store.try_sh(
            "backup",
            "barman check all && test -n \"$(barman list-backup all --minimal)\"",
        )
    });
    // The leader's host is cut off: everything on it at once.
    db1.docker(&["network", "disconnect", &hosts.network, &hosts.name("db1")]);
    db2.wait("the other host leads", Duration::from_secs(30), || {
        db2.sql_on("node", "monkey_db", "INSERT INTO t DEFAULT VALUES")
    });
    let own = db1.sql_on("node", "postgres", "SELECT pg_is_in_recovery()");
    assert_ne!(own.as_deref(), Ok("f"), "two primaries");
    db1.docker(&[
        "network",
        "connect",
        "--alias",
        "db1",
        &hosts.network,
        &hosts.name("db1"),
    ]);
    assert_eq!(whole(&db2, 120), "db2");
    assert_eq!(
        db1.sql_on("node", "monkey_db", "SELECT count(*) FROM t")
            .unwrap(),
        "2"
    );
    // The third host may be lost as well.
    store.compose_ok(&["stop"]);
    db2.sql_on("node", "monkey_db", "INSERT INTO t DEFAULT VALUES")
        .unwrap();
    store.compose_ok(&["start"]);
    whole(&db2, 60);
    store.wait("WAL comes in again", Duration::from_secs(60), || {
        store.try_sh("backup", "barman check all")
    });
}
