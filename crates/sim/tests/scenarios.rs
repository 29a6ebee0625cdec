//! The scenarios in `scenarios/*.txt`: commands to a simulated cluster and what follows from each.
//! `CRATON_WRITE_SCENARIOS=1 cargo test -p craton-sim --test scenarios` writes what follows now.

use std::fs;
use std::path::{Path, PathBuf};

use craton_sim::scenario::play;

fn scenarios() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    found.sort();
    found
}

/// The first line that differs, with both versions.
fn difference(expected: &str, played: &str) -> String {
    let (mut a, mut b) = (expected.lines(), played.lines());
    for number in 1.. {
        match (a.next(), b.next()) {
            (None, None) => break,
            (x, y) if x == y => {}
            (x, y) => {
                return format!(
                    "line {number}:\n- {}\n+ {}",
                    x.unwrap_or("(end)"),
                    y.unwrap_or("(end)")
                );
            }
        }
    }
    String::new()
}

#[test]
fn every_scenario_ends_as_it_is_told() {
    let write = std::env::var_os("CRATON_WRITE_SCENARIOS").is_some();
    let mut problems = Vec::new();
    let found = scenarios();
    assert!(found.len() >= 15, "{} scenarios", found.len());
    for path in found {
        let name = path.file_name().unwrap_or_default().display().to_string();
        let expected = fs::read_to_string(&path).unwrap_or_default();
        match play(&expected) {
            Err(failure) => problems.push(format!(
                "{name}, line {}: {}\nso far:\n{}",
                failure.line, failure.what, failure.played
            )),
            Ok(played) if played == expected => {}
            Ok(played) if write => {
                assert!(fs::write(&path, played).is_ok(), "{name} cannot be written");
            }
            Ok(played) => problems.push(format!("{name}, {}", difference(&expected, &played))),
        }
    }
    assert!(
        problems.is_empty(),
        "{}\n\nIf that is how it should be: CRATON_WRITE_SCENARIOS=1 cargo test --locked -p craton-sim --test scenarios, and read the difference",
        problems.join("\n\n")
    );
}

#[test]
fn a_scenario_that_does_not_come_true_fails() {
    let play_line = |line: &str| {
        play(&format!(
            "cluster\nstart\nwait until whole within 20s\n{line}\n"
        ))
    };
    assert!(play_line("expect primaries a b").is_err());
    assert!(play_line("wait until leader none within 3s").is_err());
    assert!(play_line("dance").is_err());
    assert!(play("write 1\n").is_err(), "no cluster");
    assert!(play_line("write 1").is_ok());
}
