//! Clients that write through the proxy all the time, in containers of their own, as an application's would be.
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may fail at any line"
)]

use std::process::Command;
use std::time::Duration;

use jiff::Timestamp;

use crate::containers::{self, Stack};

/// The table that they write into, one row a statement.
pub const TABLE: &str = "CREATE TABLE w (who text, n bigint, PRIMARY KEY (who, n))";

const SESSION: &str = r#"n=0; while :; do n=$((n+1)); echo "INSERT INTO w VALUES ('$WHO', $n) RETURNING 'ok ' || n;"; sleep 0.02; done \
  | stdbuf -oL psql -h pgpool -U monkey_user -d monkey_db -XAtq -v ON_ERROR_STOP=1; echo "psql ended with ${PIPESTATUS[1]}"; sleep infinity"#;

const RECONNECTING: &str = r#"n=0; while :; do n=$((n+1));
  psql -h pgpool -U monkey_user -d monkey_db -XAtq -v ON_ERROR_STOP=1 -c "INSERT INTO w VALUES ('$WHO', $n) RETURNING 'ok ' || n" || sleep 0.2; sleep 0.05; done"#;

pub struct Writer<'s> {
    stack: &'s Stack,
    who: String,
    id: String,
}

impl<'s> Writer<'s> {
    /// One session, for as long as it lives.
    pub fn session(stack: &'s Stack, who: &str) -> Self {
        Self::start(stack, who, SESSION)
    }

    /// A new session for each row; what fails is not tried again.
    pub fn reconnecting(stack: &'s Stack, who: &str) -> Self {
        Self::start(stack, who, RECONNECTING)
    }

    fn start(stack: &'s Stack, who: &str, script: &str) -> Self {
        let who_is = format!("WHO={who}");
        let variables = [
            who_is.as_str(),
            "PGPASSWORD=monkey_pass",
            "PGCONNECT_TIMEOUT=60",
        ];
        let id = stack.client(who, "proxy", &variables, script);
        let writer = Self {
            stack,
            who: who.to_owned(),
            id,
        };
        writer.goes_on();
        writer
    }

    fn lines(&self) -> Vec<(Timestamp, String)> {
        let out = containers::run(Command::new("docker").args(["logs", "-t", &self.id]));
        let text = containers::text(&out);
        let line = |l: &str| {
            let (at, rest) = l.split_once(' ')?;
            Some((at.parse().ok()?, rest.to_owned()))
        };
        text.lines().filter_map(line).collect()
    }

    /// What was acknowledged, and when.
    pub fn acknowledged(&self) -> Vec<(Timestamp, u64)> {
        let row = |(at, l): (Timestamp, String)| Some((at, l.strip_prefix("ok ")?.parse().ok()?));
        self.lines().into_iter().filter_map(row).collect()
    }

    /// Everything that it was told but that a row is there.
    pub fn complaints(&self) -> Vec<String> {
        let told = self.lines().into_iter().map(|(_, l)| l);
        told.filter(|l| !l.starts_with("ok ") && !l.trim().is_empty())
            .collect()
    }

    /// Waits until more was acknowledged than now.
    pub fn goes_on(&self) {
        let before = self.acknowledged().len();
        self.stack.wait(
            &format!("{} writes", self.who),
            Duration::from_secs(60),
            || {
                if self.acknowledged().len() > before + 5 {
                    Ok(())
                } else {
                    Err(self.complaints().join("\n"))
                }
            },
        );
    }

    /// The longest time without an acknowledgement.
    pub fn longest_gap(&self) -> Duration {
        let times: Vec<Timestamp> = self.acknowledged().into_iter().map(|(at, _)| at).collect();
        let gaps = times.windows(2).map(|w| w[1].duration_since(w[0]));
        let longest = gaps.max().unwrap_or_default();
        Duration::try_from(longest).unwrap()
    }

    /// Ends it, and looks for every acknowledged row. Returns how many there were.
    pub fn finish(self) -> usize {
        self.stack.docker(&["kill", &self.id]);
        let acknowledged = self.acknowledged();
        let there = self
            .stack
            .wait("the rows are read", Duration::from_secs(30), || {
                let sql = format!("SELECT n FROM w WHERE who = '{}'", self.who);
                self.stack.sql(&sql)
            });
        let there: std::collections::BTreeSet<u64> =
            there.lines().map(|l| l.parse().unwrap()).collect();
        let lost: Vec<u64> = acknowledged
            .iter()
            .map(|(_, n)| *n)
            .filter(|n| !there.contains(n))
            .collect();
        assert!(
            lost.is_empty(),
            "{}: acknowledged and lost: {lost:?}",
            self.who
        );
        acknowledged.len()
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        containers::run(Command::new("docker").args(["rm", "-f", "-v", &self.id]));
    }
}
