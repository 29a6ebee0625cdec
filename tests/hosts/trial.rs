//! One fault against one cluster, with clients that write and read all the while, and what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use craton::drill::recorder::{
    Fate, Log, Patience, Plan, Recorder, Write, longest_gap, two_acknowledging,
};
use craton::drill::verify::{Verdict, judge, present};
use craton::sessions::{Endpoint, describe, value};
use serde::Serialize;
use tokio::time::Instant;

use super::fault::{Fault, Inflicted};
use super::net::pause;
use super::system::{MEMBERS, State, System};

/// Rows of one recording; recordings of a run have ranges of this size.
const ROWS_MAX: u64 = 1_000_000;

/// Clients at each way to the primary.
const WRITERS: u32 = 4;

/// The pause of each between two writes.
const PAUSE: Duration = Duration::from_millis(15);

/// The pause of clients that make a session for every write.
const FRESH_PAUSE: Duration = Duration::from_millis(100);

/// The pause of the writer that tries a member whatever its role.
const SAMPLE_PAUSE: Duration = Duration::from_millis(5);

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Writes count as back when they have been acknowledged for this long.
const BACK_FOR: Duration = Duration::from_secs(1);

/// The cluster counts as whole when it has looked so for this long.
const WHOLE_FOR: Duration = Duration::from_millis(500);

/// How long a standby may take to replay what the leader has, and a server to let somebody in.
const CATCH_UP: Duration = Duration::from_secs(60);

/// How a trial is run.
#[derive(Clone, Copy)]
pub struct Terms {
    /// True: clients cancel a statement that takes too long, and believe the answer.
    pub cancel: bool,
    /// True: more clients come with a new session for every write.
    pub fresh: bool,
    /// True: every member is also tried by a writer of its own all the time.
    pub sample: bool,
    /// How many acknowledged rows may be lost (`async`).
    pub lost_max: usize,
}

/// What one way to the primary saw. Times in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    /// The way.
    pub entry: String,
    /// The longest time without an acknowledged write.
    pub outage_ms: u64,
    /// The longest time without an answered read.
    pub read_gap_ms: Option<u64>,
    /// Acknowledged writes.
    pub acknowledged: usize,
    /// Writes that certainly failed, and attempts to connect that did.
    pub errors: usize,
    /// Writes of unknown outcome.
    pub unknown: usize,
    /// Sessions that ended.
    pub sessions_lost: usize,
    /// Acknowledged rows that some member lacks in the end.
    pub lost: usize,
    /// Rows that are there although their client was told that they failed.
    pub ghosts: usize,
}

/// What came of a trial.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The cluster.
    pub system: String,
    /// What was done.
    pub fault: &'static str,
    /// Who led before, and after.
    pub leaders: (String, String),
    /// The terms, or timelines, before and after.
    pub terms: (u64, u64),
    /// What each way to the primary saw.
    pub seen: Vec<Seen>,
    /// For how long an old leader acknowledged after a new one had begun to.
    pub two_acknowledging_ms: u64,
    /// From the end of the fault until the cluster was whole; none: not in time.
    pub whole_ms: Option<u64>,
    /// What was missing then.
    pub missing: Option<String>,
    /// True when all members hold the same rows.
    pub identical: bool,
    /// Texts of errors with how often each was seen.
    pub errors: BTreeMap<String, u64>,
}

impl Outcome {
    /// The worst of a number over all ways.
    pub fn worst(&self, of: impl Fn(&Seen) -> u64) -> u64 {
        self.seen.iter().map(of).max().unwrap_or(0)
    }

    /// What must hold for every fault of a cluster that loses nothing; the first that does not.
    pub fn broken(&self, terms: Terms) -> Option<String> {
        let lost: usize = self.seen.iter().map(|s| s.lost).sum();
        let ghosts: usize = self.seen.iter().map(|s| s.ghosts).sum();
        if lost > terms.lost_max {
            let most = terms.lost_max;
            return Some(format!(
                "{lost} acknowledged rows are lost; at most {most} may be"
            ));
        }
        if ghosts > 0 {
            return Some(format!(
                "{ghosts} rows are there whose clients were told that they failed"
            ));
        }
        if self.two_acknowledging_ms > 0 {
            return Some(format!(
                "two servers acknowledged for {} ms",
                self.two_acknowledging_ms
            ));
        }
        if let Some(missing) = &self.missing {
            return Some(format!("the cluster did not heal: {missing}"));
        }
        (!self.identical).then(|| "members hold different rows".to_owned())
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// A number for the rows of a run, different from every other.
fn new_run() -> i64 {
    static LAST: AtomicI64 = AtomicI64::new(0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now = i64::try_from(now.as_millis()).unwrap_or(1);
    let last = LAST.fetch_max(now, Ordering::Relaxed);
    if last < now {
        return now;
    }
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// Clients at work.
pub struct Recording<'a> {
    system: &'a dyn System,
    run: i64,
    ways: Vec<(String, Recorder)>,
    samples: Vec<Recorder>,
}

impl<'a> Recording<'a> {
    /// Makes the table, starts the clients, and waits until each way has written.
    pub fn start(system: &'a dyn System, terms: Terms) -> Self {
        let run = new_run();
        let entries = system.entries();
        let first = entries.first().expect("a way to the primary").write.clone();
        system
            .client()
            .run(async move { prepare(&first).await })
            .unwrap_or_else(|e| panic!("the table cannot be made: {e}\n{}", system.logs()));
        let plan = |write: Endpoint, writers: u32, pause: Duration| Plan {
            write,
            read: None,
            patience: Patience::Drop(PATIENCE),
            writers,
            pause,
            fresh: false,
            run,
            first_id: 0,
            writes_max: ROWS_MAX,
        };
        let mut plans = Vec::new();
        for entry in entries {
            let mut lasting = plan(entry.write.clone(), WRITERS, PAUSE);
            // What PostgreSQL answers to a cancelled commit is its own affair; the proxy's answer is ours.
            if terms.cancel && entry.read.is_some() {
                lasting.patience = Patience::Cancel(PATIENCE);
            }
            lasting.read = entry.read;
            plans.push((Some(entry.name.to_owned()), lasting));
            if terms.fresh {
                let mut fresh = plan(entry.write, WRITERS, FRESH_PAUSE);
                fresh.fresh = true;
                plans.push((Some(format!("{}, new sessions", entry.name)), fresh));
            }
        }
        if terms.sample {
            for (member, _) in MEMBERS {
                plans.push((None, plan(system.direct(member), 1, SAMPLE_PAUSE)));
            }
        }
        let mut recording = Self {
            system,
            run,
            ways: Vec::new(),
            samples: Vec::new(),
        };
        let mut first_id = 1;
        for (name, mut plan) in plans {
            plan.first_id = first_id;
            first_id += ROWS_MAX;
            let recorder = system.client().run(async move { Recorder::start(&plan) });
            match name {
                Some(name) => recording.ways.push((name, recorder)),
                None => recording.samples.push(recorder),
            }
        }
        recording.wait_writes(Duration::from_secs(90));
        recording
    }

    /// Waits until every way has acknowledged for a second.
    fn wait_writes(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while !self.writes_are_back() {
            if Instant::now() > deadline {
                let logs: Vec<_> = self.ways.iter().map(|(n, r)| (n, r.log().errors)).collect();
                panic!(
                    "writes do not get through: {logs:?}\n{}",
                    self.system.logs()
                );
            }
            pause();
        }
    }

    /// True when every way has acknowledged throughout the last second.
    fn writes_are_back(&self) -> bool {
        let now = Instant::now();
        self.ways.iter().all(|(_, recorder)| {
            let half = now.checked_sub(BACK_FOR / 2).unwrap_or(now);
            let whole = now.checked_sub(BACK_FOR).unwrap_or(now);
            let late = recorder.acknowledged_since(half);
            late > 0 && recorder.acknowledged_since(whole) > late
        })
    }

    /// Waits until the cluster has looked whole for a while and writes get through; what is missing if it is
    /// not in time.
    pub fn wait_whole(&self, limit: Duration) -> Result<Instant, String> {
        let deadline = Instant::now() + limit;
        let mut since: Option<Instant> = None;
        loop {
            let missing = match self.system.state() {
                Ok(state) => state.missing,
                Err(error) => Some(error),
            };
            let missing = missing.or_else(|| {
                (!self.writes_are_back()).then(|| "writes do not get through yet".to_owned())
            });
            match missing {
                None => {
                    let first = *since.get_or_insert_with(Instant::now);
                    if first.elapsed() >= WHOLE_FOR {
                        return Ok(first);
                    }
                }
                Some(missing) if Instant::now() > deadline => return Err(missing),
                Some(_) => since = None,
            }
            pause();
        }
    }

    /// Stops the clients and compares what they were told with what every member has.
    pub fn finish(self, began: Instant) -> Result<Verdicts, String> {
        let until = Instant::now();
        let client = self.system.client();
        // Recordings end with their clients, so that what is compared is all there is.
        let mut logs: Vec<(Option<String>, Log)> = Vec::new();
        for (name, recorder) in self.ways {
            logs.push((Some(name), client.run(recorder.finish())));
        }
        for recorder in self.samples {
            logs.push((None, client.run(recorder.finish())));
        }
        let answers = rows_everywhere(self.system, self.run)?;
        let mut unasked = Vec::new();
        let mut rows = Vec::new();
        for ((member, _), answer) in MEMBERS.iter().zip(answers) {
            match answer {
                Ok(there) => rows.push(there),
                Err(why) => unasked.push(format!("{member} cannot be asked for its rows: {why}")),
            }
        }
        let identical = unasked.is_empty() && rows.windows(2).all(|w| w.first() == w.last());
        let two = two_acknowledging(logs.iter().map(|(_, log)| log));
        let mut errors = BTreeMap::new();
        let mut seen = Vec::new();
        for (name, log) in &logs {
            let mut one = account(name.as_deref().unwrap_or("sample"), log, began, until);
            for present in &rows {
                let verdict: Verdict = judge(&log.writes, present);
                one.lost = one.lost.max(verdict.lost.len());
                one.ghosts = one.ghosts.max(verdict.ghosts.len());
            }
            if name.is_some() {
                for (text, count) in &log.errors {
                    *errors.entry(text.clone()).or_default() += count;
                }
                seen.push(one);
            } else if one.lost + one.ghosts > 0 {
                // A row that a member took itself and that is gone counts like any other.
                seen.push(one);
            }
        }
        Ok(Verdicts {
            unasked,
            seen,
            two,
            identical,
            errors,
        })
    }
}

/// What a recording comes to.
pub struct Verdicts {
    /// Members that could not be asked, and why.
    pub unasked: Vec<String>,
    /// By way.
    pub seen: Vec<Seen>,
    /// For how long two acknowledged.
    pub two: Duration,
    /// All members hold the same rows.
    pub identical: bool,
    /// Texts of errors.
    pub errors: BTreeMap<String, u64>,
}

fn account(name: &str, log: &Log, began: Instant, until: Instant) -> Seen {
    let inside = |w: &&Write| w.ended >= began;
    let count = |fate| {
        log.writes
            .iter()
            .filter(inside)
            .filter(|w| w.fate == fate)
            .count()
    };
    let acknowledged: Vec<Instant> = log
        .writes
        .iter()
        .filter(|w| w.fate == Fate::Acknowledged)
        .map(|w| w.ended)
        .collect();
    let later = |instants: &[Instant]| instants.iter().filter(|t| **t > began).count();
    let reads = (!log.reads.is_empty()).then(|| millis(longest_gap(&log.reads, began, until)));
    Seen {
        entry: name.to_owned(),
        outage_ms: millis(longest_gap(&acknowledged, began, until)),
        read_gap_ms: reads,
        acknowledged: count(Fate::Acknowledged),
        errors: count(Fate::Failed) + later(&log.connects_failed),
        unknown: count(Fate::Unknown),
        sessions_lost: later(&log.sessions_lost),
        lost: 0,
        ghosts: 0,
    }
}

/// A session; one try alone may meet a busy moment.
async fn session(endpoint: &Endpoint) -> Result<tokio_postgres::Client, String> {
    let deadline = Instant::now() + CATCH_UP;
    loop {
        match endpoint.connect().await {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => return Err(error.to_string()),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Makes the table, or finds it.
async fn prepare(endpoint: &Endpoint) -> Result<(), String> {
    let client = session(endpoint).await?;
    let made = client.batch_execute(craton::drill::SCHEMA).await;
    made.map_err(|e| describe(&e))
}

/// The rows of a run on every member, each once it has replayed all.
fn rows_everywhere(
    system: &dyn System,
    run: i64,
) -> Result<Vec<Result<BTreeSet<u64>, String>>, String> {
    let entry = system.entries().into_iter().next().ok_or("no way in")?;
    let members: Vec<Endpoint> = MEMBERS.iter().map(|(m, _)| system.direct(m)).collect();
    system.client().run(async move {
        let text = |e: anyhow::Error| format!("{e:#}");
        let leader = session(&entry.write).await?;
        let flushed = value(&leader, "SELECT pg_current_wal_flush_lsn()")
            .await
            .map_err(text)?;
        let mut all = Vec::new();
        for member in members {
            all.push(rows_of(&member, run, &flushed).await);
        }
        Ok(all)
    })
}

async fn rows_of(member: &Endpoint, run: i64, flushed: &str) -> Result<BTreeSet<u64>, String> {
    let client = caught_up(member, flushed).await?;
    let last = i64::MAX.unsigned_abs();
    let there = present(&client, run, 0, last).await;
    there.map_err(|e| format!("{e:#}"))
}

async fn caught_up(member: &Endpoint, position: &str) -> Result<tokio_postgres::Client, String> {
    let deadline = Instant::now() + CATCH_UP;
    let query = format!(
        "SELECT NOT pg_is_in_recovery() OR pg_last_wal_replay_lsn() >= '{position}'::pg_lsn"
    );
    loop {
        let why = match member.connect().await {
            Ok(client) => match value(&client, &query).await {
                Ok(answer) if answer == "t" => return Ok(client),
                Ok(_) => format!("it has not replayed {position}"),
                Err(error) => format!("{error:#}"),
            },
            Err(error) => error.to_string(),
        };
        if Instant::now() > deadline {
            return Err(why);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits, and ends early once `done`.
pub fn hold(at_least: Duration, at_most: Duration, done: impl Fn() -> bool) {
    let began = Instant::now();
    while began.elapsed() < at_least || (began.elapsed() < at_most && !done()) {
        pause();
    }
}

/// What happened between the beginning of a recording and its end.
struct Course {
    began: Instant,
    before: State,
    fault: &'static str,
    /// The slowest healing, or what was missing.
    healed: Result<Duration, String>,
}

impl Course {
    fn begin<'a>(
        system: &'a dyn System,
        fault: &'static str,
        terms: Terms,
    ) -> (Self, Recording<'a>) {
        let pace = system.pace();
        system.wait_whole(pace.heal_within);
        system.leader(pace.heal_within);
        let recording = Recording::start(system, terms);
        let before = system.settled(pace.heal_within);
        let course = Self {
            began: Instant::now(),
            before,
            fault,
            healed: Ok(Duration::ZERO),
        };
        (course, recording)
    }

    /// Waits until the cluster is whole after something that was over at `over`.
    fn heal(&mut self, recording: &Recording<'_>, over: Instant, limit: Duration) {
        let healed = recording
            .wait_whole(limit)
            .map(|at| at.saturating_duration_since(over));
        self.healed = match (
            healed,
            std::mem::replace(&mut self.healed, Ok(Duration::ZERO)),
        ) {
            (Ok(now), Ok(before)) => Ok(now.max(before)),
            (Err(why), _) | (_, Err(why)) => Err(why),
        };
    }

    fn end(self, recording: Recording<'_>) -> Result<Outcome, String> {
        let system = recording.system;
        let after = if self.healed.is_ok() {
            system.settled(system.pace().heal_within)
        } else {
            system.state().unwrap_or_default()
        };
        let found = recording.finish(self.began)?;
        let (whole_ms, missing) = match self.healed {
            Ok(_) if !found.unasked.is_empty() => (None, Some(found.unasked.join("; "))),
            Ok(took) => (Some(millis(took)), None),
            Err(missing) => (None, Some(missing)),
        };
        Ok(Outcome {
            system: system.name().to_owned(),
            fault: self.fault,
            leaders: (
                self.before.leader.unwrap_or_default(),
                after.leader.unwrap_or_default(),
            ),
            terms: (self.before.term, after.term),
            seen: found.seen,
            two_acknowledging_ms: millis(found.two),
            whole_ms,
            missing,
            identical: found.identical,
            errors: found.errors,
        })
    }
}

/// Clients at work while `body` runs; the cluster must be whole at the end of it.
pub fn watch(system: &dyn System, terms: Terms, body: impl FnOnce()) -> Result<Outcome, String> {
    let (mut course, recording) = Course::begin(system, "watch", terms);
    body();
    course.heal(&recording, Instant::now(), system.pace().heal_within);
    course.end(recording)
}

/// Faults one after the other, drawn by `draw`, for as long as `length`; the cluster heals from each.
pub fn rolling(
    system: &dyn System,
    length: Duration,
    terms: Terms,
    mut draw: impl FnMut() -> (Fault, Duration),
) -> Result<Outcome, String> {
    let pace = system.pace();
    let (mut course, recording) = Course::begin(system, "rolling", terms);
    while course.began.elapsed() < length && course.healed.is_ok() {
        let (fault, lasts) = draw();
        let target = fault.target(&system.settled(pace.heal_within));
        let inflicted = Inflicted::on(system, fault, &target)?;
        hold(lasts, lasts, || true);
        inflicted.undo(system);
        let over = Instant::now();
        course.heal(&recording, over, pace.heal_within);
        let at = over.duration_since(course.began).as_secs();
        let healed = over.elapsed().as_secs_f32();
        eprintln!(
            "{at:4} s: {} of {target}, whole after {healed:.1} s",
            fault.name()
        );
    }
    course.end(recording)
}

/// One fault, from whole to whole.
pub fn run(system: &dyn System, fault: Fault, terms: Terms) -> Result<Outcome, String> {
    let pace = system.pace();
    let (mut course, recording) = Course::begin(system, fault.name(), terms);
    let inflicted = Inflicted::on(system, fault, &fault.target(&course.before))?;
    if !fault.at_once() {
        // A cluster may notice some of them late: only then there is something to see.
        let times = if fault == Fault::FreezePostmaster {
            3
        } else {
            1
        };
        hold(pace.hold_min * times, pace.hold_max, || {
            recording.writes_are_back()
        });
    }
    let over = Instant::now();
    inflicted.undo(system);
    course.heal(&recording, over, pace.heal_within);
    course.end(recording)
}
