//! Records the fate of every write while something is being broken, as a client of the proxy, or of the
//! servers themselves, sees it: what it was told, when, and by which server on which timeline.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::sessions::{Endpoint, describe};

/// A read that takes longer is given up.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a cancelled statement may take to answer.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// Servers that are told apart.
const SERVERS_MAX: usize = 1000;

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

/// Who acknowledged a write.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct By {
    /// The timeline that the server was writing.
    pub timeline: u32,
    /// The server: its place in [`Log::servers`].
    pub server: u16,
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
    /// Who acknowledged it.
    pub by: Option<By>,
}

/// Everything recorded so far.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// Writes in the order of their answers.
    pub writes: Vec<Write>,
    /// Addresses of servers that acknowledged, as they know themselves.
    pub servers: Vec<String>,
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

    fn by(&mut self, stamp: &Stamp) -> Option<By> {
        let known = self.servers.iter().position(|s| *s == stamp.server);
        let place = known.or_else(|| {
            (self.servers.len() < SERVERS_MAX).then(|| {
                self.servers.push(stamp.server.clone());
                self.servers.len() - 1
            })
        })?;
        Some(By {
            timeline: stamp.timeline,
            server: u16::try_from(place).ok()?,
        })
    }
}

/// What a server says of itself with a written row.
struct Stamp {
    server: String,
    timeline: u32,
}

impl Stamp {
    fn of(messages: &[SimpleQueryMessage]) -> Option<Self> {
        messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(Self {
                server: row.get(0)?.to_owned(),
                timeline: u32::from_str_radix(row.get(1)?, 16).ok()?,
            }),
            _ => None,
        })
    }
}

/// What a client does with a statement that takes too long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Patience {
    /// Drops the session after this long; the outcome is unknown.
    Drop(Duration),
    /// Asks for its cancellation after this long, and believes what comes back.
    Cancel(Duration),
}

/// What the recorder does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the writers connect.
    pub write: Endpoint,
    /// Where the reader connects; without it nobody reads.
    pub read: Option<Endpoint>,
    /// What a writer does with a statement that takes too long.
    pub patience: Patience,
    /// How many clients write at the same time.
    pub writers: u32,
    /// The pause of each between two writes.
    pub pause: Duration,
    /// True: each write has a session of its own, as those of clients without a pool.
    pub fresh: bool,
    /// The number of this recording, part of every row.
    pub run: i64,
    /// The number of the first row; recordings of one run have ranges of their own.
    pub first_id: u64,
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
        let next_id = Arc::new(AtomicU64::new(plan.first_id));
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
        if let Some(endpoint) = plan.read.clone() {
            clients.spawn(read_on(endpoint, Arc::clone(&log), stopped));
        }
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
        match plan.write.connect().await {
            Ok(client) => {
                write_in_session(&plan, &client, &log, &next_id, &stopped).await;
                if plan.fresh {
                    sleep(plan.pause).await;
                }
            }
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

/// Writes until the session ends or it is time to stop; once, where each write has a session of its own.
async fn write_in_session(
    plan: &Plan,
    client: &Client,
    log: &Mutex<Log>,
    next_id: &AtomicU64,
    stopped: &watch::Receiver<bool>,
) {
    while !*stopped.borrow() {
        let id = next_id.fetch_add(1, Ordering::SeqCst);
        if id - plan.first_id >= plan.writes_max {
            let _ = stopped.clone().wait_for(|stop| *stop).await;
            return;
        }
        let statement = format!(
            "INSERT INTO craton_drill.writes (run, id) VALUES ({}, {id}) RETURNING \
             concat(host(inet_server_addr()), ':', inet_server_port()), \
             left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)",
            plan.run
        );
        let began = Instant::now();
        let answer = answer_in_time(client, &statement, plan.patience).await;
        let ended = Instant::now();
        let (fate, stamp, error) = match &answer {
            Some(Ok(messages)) => (Fate::Acknowledged, Stamp::of(messages), None),
            Some(Err(error)) => (fate_of(error), None, Some(describe(error))),
            None => (Fate::Unknown, None, Some("no answer in time".to_owned())),
        };
        let over = client.is_closed() || answer.is_none();
        with_log(log, |log| {
            let by = stamp.and_then(|stamp| log.by(&stamp));
            log.writes.push(Write {
                id,
                fate,
                began,
                ended,
                by,
            });
            if let Some(error) = error {
                log.error(error);
            }
            if over {
                log.sessions_lost.push(ended);
            }
        });
        if over || plan.fresh {
            return;
        }
        sleep(plan.pause).await;
    }
}

/// The answer to a statement; none when the client has lost its patience and the session is to be dropped.
async fn answer_in_time(
    client: &Client,
    statement: &str,
    patience: Patience,
) -> Option<Result<Vec<SimpleQueryMessage>, tokio_postgres::Error>> {
    let mut query = std::pin::pin!(client.simple_query(statement));
    match patience {
        Patience::Drop(limit) => timeout(limit, query).await.ok(),
        Patience::Cancel(limit) => {
            if let Ok(answer) = timeout(limit, &mut query).await {
                return Some(answer);
            }
            // Whether the cancel arrives or not, the statement's own answer is what counts.
            let _ = timeout(CANCEL_TIMEOUT, client.cancel_token().cancel_query(NoTls)).await;
            timeout(CANCEL_TIMEOUT, query).await.ok()
        }
    }
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

async fn read_on(endpoint: Endpoint, log: Arc<Mutex<Log>>, stopped: watch::Receiver<bool>) {
    while !*stopped.borrow() {
        let failed: String = match endpoint.connect().await {
            Ok(client) => read_in_session(&client, &log, &stopped).await,
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
            READ_TIMEOUT,
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

/// How long writes were acknowledged on an old timeline after a newer one had begun to acknowledge: the time in
/// which two servers said "committed". Both ends are what a client saw, so this is never too long.
pub fn two_acknowledging<'a>(logs: impl IntoIterator<Item = &'a Log>) -> Duration {
    // By timeline and server. A server that does not know that it was replaced goes on with its own timeline, or,
    // where two were given the same number, with that one.
    let mut periods: BTreeMap<(u32, &str), (Instant, Instant)> = BTreeMap::new();
    for log in logs {
        for write in log.writes.iter().filter(|w| w.fate == Fate::Acknowledged) {
            let Some(by) = write.by else { continue };
            let server = log.servers.get(usize::from(by.server));
            let key = (by.timeline, server.map_or("", String::as_str));
            let (first_answer, last_sent) =
                periods.entry(key).or_insert((write.ended, write.began));
            *first_answer = write.ended.min(*first_answer);
            *last_sent = write.began.max(*last_sent);
        }
    }
    let mut longest = Duration::ZERO;
    for (newer, (first_answer, _)) in &periods {
        for (older, (_, last_sent)) in &periods {
            if older.0 <= newer.0 && older != newer {
                longest = longest.max(last_sent.saturating_duration_since(*first_answer));
            }
        }
    }
    longest
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
    async fn two_that_acknowledge_at_a_time_are_seen() {
        let start = Instant::now();
        let write = |server, timeline, began_ms: u64, ended_ms: u64| Write {
            id: began_ms,
            fate: Fate::Acknowledged,
            began: start + Duration::from_millis(began_ms),
            ended: start + Duration::from_millis(ended_ms),
            by: Some(By { timeline, server }),
        };
        let log = |writes: &[Write]| Log {
            writes: writes.to_vec(),
            servers: vec!["a:1".into(), "b:1".into()],
            ..Log::default()
        };
        // One after the other; the last answer of the old one may come late.
        let handed_over = [
            write(0, 1, 0, 10),
            write(0, 1, 20, 500),
            write(1, 2, 100, 110),
        ];
        assert_eq!(two_acknowledging([&log(&handed_over)]), Duration::ZERO);
        // The old one takes a write after the new one has acknowledged.
        let split = [
            write(1, 2, 100, 110),
            write(0, 1, 150, 160),
            write(0, 1, 410, 420),
        ];
        assert_eq!(
            two_acknowledging([&log(&split)]),
            Duration::from_millis(300)
        );
        // Two on one timeline.
        let twins = [write(0, 2, 0, 10), write(1, 2, 30, 40), write(0, 2, 60, 70)];
        assert_eq!(two_acknowledging([&log(&twins)]), Duration::from_millis(20));
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
