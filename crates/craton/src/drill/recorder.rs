//! Records the fate of every write while something is being broken, as a client of the proxy sees it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;

use crate::sessions::{Login, SessionError, describe};

/// A statement that takes longer is given up; its outcome is unknown.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// The pause after a failed attempt to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);

/// The pause between two reads.
const READ_PAUSE: Duration = Duration::from_millis(20);

/// Kinds of errors that are kept with their counts.
const ERROR_KINDS_MAX: usize = 50;

/// What became of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// The client was told that it is committed.
    Acknowledged,
    /// The client was told for certain that it did not happen.
    Failed,
    /// The client cannot know.
    Unknown,
}

/// One write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Its row.
    pub id: u64,
    /// What became of it.
    pub fate: Fate,
    /// When it was sent.
    pub began: Instant,
    /// When the answer came.
    pub ended: Instant,
}

/// Everything recorded so far.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// Writes in the order of their answers.
    pub writes: Vec<Write>,
    /// When sessions of writers ended without being asked to.
    pub sessions_lost: Vec<Instant>,
    /// When a writer could not connect.
    pub connects_failed: Vec<Instant>,
    /// When reads were answered.
    pub reads: Vec<Instant>,
    /// When reads failed.
    pub reads_failed: Vec<Instant>,
    /// Error texts with how often each was seen.
    pub errors: BTreeMap<String, u64>,
}

impl Log {
    fn error(&mut self, text: String) {
        if self.errors.len() < ERROR_KINDS_MAX || self.errors.contains_key(&text) {
            *self.errors.entry(text).or_default() += 1;
        }
    }
}

/// What the recorder does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How the clients log in.
    pub login: Login,
    /// The proxy's port for writes.
    pub write_port: u16,
    /// The proxy's port for reads.
    pub read_port: u16,
    /// How many clients write at the same time.
    pub writers: u32,
    /// The pause of each between two writes.
    pub pause: Duration,
    /// The number of this recording, part of every row.
    pub run: i64,
    /// Writers rest once this many writes were recorded: the recording is kept in memory.
    pub writes_max: u64,
}

/// Writers and a reader at work. Dropping it stops them.
#[derive(Debug)]
pub struct Recorder {
    log: Arc<Mutex<Log>>,
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

impl Recorder {
    /// Starts writing and reading.
    pub fn start(plan: &Plan) -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let next_id = Arc::new(AtomicU64::new(1));
        let (stop, stopped) = watch::channel(false);
        let mut clients = JoinSet::new();
        for _ in 0..plan.writers {
            clients.spawn(write_on(
                plan.clone(),
                Arc::clone(&log),
                Arc::clone(&next_id),
                stopped.clone(),
            ));
        }
        clients.spawn(read_on(plan.clone(), Arc::clone(&log), stopped));
        Self { log, stop, clients }
    }

    /// What is recorded by now.
    pub fn log(&self) -> Log {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// How many writes were acknowledged after `since`.
    pub fn acknowledged_since(&self, since: Instant) -> usize {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.writes
            .iter()
            .rev()
            .take_while(|w| w.ended > since)
            .filter(|w| w.fate == Fate::Acknowledged)
            .count()
    }

    /// Lets every client finish its statement, and returns the whole recording.
    pub async fn finish(self) -> Log {
        self.stop.send_replace(true);
        self.clients.join_all().await;
        std::mem::take(&mut *self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn with_log<T>(log: &Mutex<Log>, change: impl FnOnce(&mut Log) -> T) -> T {
    change(&mut log.lock().unwrap_or_else(PoisonError::into_inner))
}

async fn write_on(
    plan: Plan,
    log: Arc<Mutex<Log>>,
    next_id: Arc<AtomicU64>,
    stopped: watch::Receiver<bool>,
) {
    while !*stopped.borrow() {
        match plan.login.connect(plan.write_port).await {
            Ok(client) => write_in_session(&plan, &client, &log, &next_id, &stopped).await,
            Err(error) => {
                with_log(&log, |log| {
                    log.connects_failed.push(Instant::now());
                    log.error(format!("connect: {error}"));
                });
                sleep(RECONNECT_PAUSE).await;
            }
        }
    }
}

/// Writes until the session ends or it is time to stop.
async fn write_in_session(
    plan: &Plan,
    client: &Client,
    log: &Mutex<Log>,
    next_id: &AtomicU64,
    stopped: &watch::Receiver<bool>,
) {
    while !*stopped.borrow() {
        let id = next_id.fetch_add(1, Ordering::SeqCst);
        if id > plan.writes_max {
            let _ = stopped.clone().wait_for(|stop| *stop).await;
            return;
        }
        let statement = format!(
            "INSERT INTO craton_drill.writes (run, id) VALUES ({}, {id})",
            plan.run
        );
        let began = Instant::now();
        let answer = timeout(STATEMENT_TIMEOUT, client.batch_execute(&statement)).await;
        let ended = Instant::now();
        let (fate, error) = match answer {
            Ok(Ok(())) => (Fate::Acknowledged, None),
            Ok(Err(error)) => (fate_of(&error), Some(describe(&error))),
            Err(_) => (Fate::Unknown, Some("no answer in time".to_owned())),
        };
        let given_up = answer_missing(error.as_deref());
        with_log(log, |log| {
            log.writes.push(Write {
                id,
                fate,
                began,
                ended,
            });
            if let Some(error) = error {
                log.error(error);
            }
            if client.is_closed() || given_up {
                log.sessions_lost.push(ended);
            }
        });
        if client.is_closed() || given_up {
            return;
        }
        sleep(plan.pause).await;
    }
}

fn answer_missing(error: Option<&str>) -> bool {
    error == Some("no answer in time")
}

/// What an error says about the write. Whatever does not say for certain that the statement did not
/// commit leaves its outcome unknown: class 08 (connection), class 57 (cancelled, shut down: it may have
/// been waiting for a standby), and everything that is not an answer of the server.
fn fate_of(error: &tokio_postgres::Error) -> Fate {
    error
        .code()
        .map_or(Fate::Unknown, |code| fate_of_sqlstate(code.code()))
}

fn fate_of_sqlstate(code: &str) -> Fate {
    match code {
        // Could not connect, was rejected, or cannot connect now: nothing was sent to a server.
        "08001" | "08004" | "57P03" => Fate::Failed,
        _ if code.starts_with("08") || code.starts_with("57") || code.starts_with("XX") => {
            Fate::Unknown
        }
        _ => Fate::Failed,
    }
}

async fn read_on(plan: Plan, log: Arc<Mutex<Log>>, stopped: watch::Receiver<bool>) {
    while !*stopped.borrow() {
        let failed: String = match plan.login.connect(plan.read_port).await {
            Ok(client) => read_in_session(&client, &log, &stopped).await,
            Err(SessionError::TimedOut) => "no answer in time".to_owned(),
            Err(error) => error.to_string(),
        };
        if !*stopped.borrow() {
            with_log(&log, |log| {
                log.reads_failed.push(Instant::now());
                log.error(format!("read: {failed}"));
            });
            sleep(RECONNECT_PAUSE).await;
        }
    }
}

/// Reads until a read fails (returns why) or it is time to stop.
async fn read_in_session(
    client: &Client,
    log: &Mutex<Log>,
    stopped: &watch::Receiver<bool>,
) -> String {
    while !*stopped.borrow() {
        match timeout(
            STATEMENT_TIMEOUT,
            client.batch_execute("SELECT max(id) FROM craton_drill.writes"),
        )
        .await
        {
            Ok(Ok(())) => with_log(log, |log| log.reads.push(Instant::now())),
            Ok(Err(error)) => return describe(&error),
            Err(_) => return "no answer in time".to_owned(),
        }
        sleep(READ_PAUSE).await;
    }
    String::new()
}

/// The longest time between two successive instants, of those in or next to `[from, to]`.
pub fn longest_gap(instants: &[Instant], from: Instant, to: Instant) -> Duration {
    let mut previous = instants
        .iter()
        .copied()
        .filter(|t| *t <= from)
        .max()
        .unwrap_or(from);
    let mut inside: Vec<Instant> = instants
        .iter()
        .copied()
        .filter(|t| *t > from && *t <= to)
        .collect();
    inside.sort_unstable();
    // Nothing came back in the window: the gap is as long as what is known of it.
    inside.push(to);
    let mut longest = Duration::ZERO;
    for instant in inside {
        longest = longest.max(instant.saturating_duration_since(previous));
        previous = instant;
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_certain_answers_are_failures() {
        assert_eq!(fate_of_sqlstate("25006"), Fate::Failed);
        assert_eq!(fate_of_sqlstate("23505"), Fate::Failed);
        assert_eq!(fate_of_sqlstate("57P03"), Fate::Failed);
        for code in ["08007", "08006", "57P01", "57P02", "57014", "XX000"] {
            assert_eq!(fate_of_sqlstate(code), Fate::Unknown, "{code}");
        }
    }

    #[tokio::test]
    async fn gaps_reach_over_the_edge_of_the_window() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let acks = [at(0), at(90), at(700), at(710), at(5000)];
        assert_eq!(
            longest_gap(&acks, at(100), at(800)),
            Duration::from_millis(610)
        );
        assert_eq!(
            longest_gap(&acks, at(720), at(1000)),
            Duration::from_millis(290)
        );
        assert_eq!(longest_gap(&[], at(0), at(50)), Duration::from_millis(50));
    }
}
