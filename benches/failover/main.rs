//! Craton and Patroni on the same hosts, under the same faults, with the same recorder; prints a table.
//!
//! Run by `make bench-failover`. What to run comes from the environment, because `cargo bench` has arguments of
//! its own: `SYSTEMS=craton,patroni-fastest,patroni-default`, `FAULTS=kill-host,…`, `RUNS=3`, `PATRONI_RUNS=1`,
//! `OUT=outcomes.jsonl` (every outcome is appended; the table is made of all that the file holds),
//! `PATRONI_VENV=…`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_types,
    clippy::indexing_slicing,
    clippy::format_push_string,
    missing_docs,
    reason = "a bench may fail at any line, and prints its result"
)]

#[path = "../../tests/hosts/mod.rs"]
mod hosts;
mod patroni;
mod table;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use hosts::craton::{Craton, Options};
use hosts::fault::{self, Fault};
use hosts::system::System;
use hosts::trial::{self, Outcome, Terms};
use patroni::{Patroni, Variant};

/// What is measured unless `FAULTS` says otherwise.
const FAULTS: [&str; 14] = [
    "kill-postmaster",
    "kill-host",
    "freeze-host",
    "isolate",
    "cut-from-peers",
    "cut-from-peers+cancel",
    "kill-agent",
    "restart-agent",
    "freeze-agent",
    "lose-standby",
    "lose-coordinator",
    "full-disk",
    "freeze-postmaster",
    "switchover",
];

/// One kind of trial.
#[derive(Clone)]
struct Kind {
    name: String,
    fault: Fault,
    terms: Terms,
}

impl Kind {
    fn parse(name: &str) -> Self {
        let (plain, cancel) = match name.strip_suffix("+cancel") {
            Some(plain) => (plain, true),
            None => (name, false),
        };
        let known: Vec<&str> = fault::ALL.iter().map(|f| f.name()).collect();
        let fault = fault::ALL
            .into_iter()
            .find(|f| f.name() == plain)
            .unwrap_or_else(|| panic!("there is no fault {plain}; there are {}", known.join(", ")));
        Self {
            name: name.to_owned(),
            fault,
            terms: Terms {
                cancel,
                // Old sessions go on; only new ones show it.
                fresh: fault == Fault::FreezePostmaster,
                sample: false,
                lost_max: usize::MAX,
            },
        }
    }
}

fn variable(name: &str, default: &str) -> String {
    std::env::var(name)
        .ok()
        .filter(|v| !v.is_empty())
        .unwrap_or_else(|| default.to_owned())
}

fn number(name: &str, default: u32) -> u32 {
    let text = variable(name, &default.to_string());
    text.parse()
        .unwrap_or_else(|_| panic!("{name}={text} is no number"))
}

/// Starts a cluster of a kind.
fn start(system: &str, venv: &Path) -> Box<dyn System> {
    match system {
        "craton" => Box::new(Craton::start(Options::default())),
        "craton-async" => Box::new(Craton::start(Options {
            durability: "async",
            name: "craton async",
            ..Options::default()
        })),
        "patroni-default" => Box::new(Patroni::start(Variant::Default, venv)),
        "patroni-fastest" => Box::new(Patroni::start(Variant::Fastest, venv)),
        other => panic!("there is no system {other}"),
    }
}

/// Every trial of one system; a cluster that does not heal is replaced.
fn series(system: &str, kinds: &[Kind], runs: u32, venv: &Path, out: &Mutex<PathBuf>) {
    let mut cluster: Option<Box<dyn System>> = None;
    for number in 1..=runs {
        for kind in kinds {
            let running = cluster.get_or_insert_with(|| start(system, venv));
            let result = catch_unwind(AssertUnwindSafe(|| {
                trial::run(running.as_ref(), kind.fault, kind.terms)
            }));
            let healed = match result {
                Ok(Ok(outcome)) => {
                    let healed = outcome.missing.is_none();
                    keep(out, &kind.name, outcome);
                    healed
                }
                Ok(Err(why)) => {
                    eprintln!("{system}, {} {number}: not measured: {why}", kind.name);
                    false
                }
                Err(_) => {
                    eprintln!("{system}, {} {number}: not measured, see above", kind.name);
                    false
                }
            };
            if !healed {
                eprintln!("{}\na new cluster is made", running.logs());
                cluster = None;
            }
        }
    }
}

/// Appends an outcome to the file.
fn keep(out: &Mutex<PathBuf>, kind: &str, outcome: Outcome) {
    let path = out.lock().expect("no writer has panicked");
    let mut line = serde_json::to_value(outcome).expect("an outcome is JSON");
    if let Some(fields) = line.as_object_mut() {
        fields.insert("fault".into(), kind.into());
    }
    eprintln!("{}", table::line(&line));
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&*path)
        .expect("the file of outcomes can be written");
    writeln!(file, "{line}").expect("the file of outcomes can be written");
}

fn main() {
    if let Some(why) = hosts::net::impossible() {
        panic!("no hosts can be made: {why}");
    }
    let out = PathBuf::from(variable("OUT", "target/bench-failover.jsonl"));
    let systems = variable("SYSTEMS", "craton,patroni-fastest,patroni-default");
    let systems: Vec<&str> = systems.split(',').filter(|s| *s != "none").collect();
    let faults = variable("FAULTS", &FAULTS.join(","));
    let kinds: Vec<Kind> = faults.split(',').map(Kind::parse).collect();
    let venv = PathBuf::from(variable("PATRONI_VENV", "target/patroni"));
    if systems.iter().any(|s| s.starts_with("patroni"))
        && let Some(why) = patroni::impossible(&venv)
    {
        panic!("{why}");
    }
    let path = Mutex::new(out.clone());
    let (ours, theirs): (Vec<&str>, Vec<&str>) =
        systems.into_iter().partition(|s| s.starts_with("craton"));
    for system in ours {
        series(system, &kinds, number("RUNS", 3), &venv, &path);
    }
    // Their timers decide, not the processors: they run at the same time, after ours.
    std::thread::scope(|scope| {
        for system in theirs {
            let (kinds, venv, path) = (&kinds, &venv, &path);
            scope.spawn(move || series(system, kinds, number("PATRONI_RUNS", 1), venv, path));
        }
    });
    println!("{}", table::render(&out));
}
