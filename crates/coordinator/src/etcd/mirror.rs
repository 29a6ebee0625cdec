//! The local copy of the cluster's keys: one watch, and a look every second whether the watch still lives.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_core::BootTime;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

use super::client::{Client, Repeat, Stream};
use super::lease::{LeaseKeys, Seen};
use super::wire::{
    Bytes, Int, KeyValue, Range, RangeTold, WatchAsk, WatchCreate, WatchLine, WatchTold, range_end,
};
use crate::api::{CoordinatorError, LeaseHint, Snapshot, Versioned};
use crate::clock::Clock;

/// A watch says nothing while nothing changes, and nothing either when its endpoint hangs. A linearizable read
/// this often, without a disk write, tells the two apart.
const LOOK_EVERY: Duration = Duration::from_secs(1);

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Names below the cluster's prefix.
pub(super) const DATA: &str = "data/";

struct State {
    snapshot: Arc<Snapshot>,
    lease: LeaseKeys,
    seen: Seen,
    read_once: bool,
    /// Counts how often etcd's revision went back: it was restored from a copy.
    epoch: u64,
}

/// What one look gave.
pub(super) struct Look {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) lease: LeaseKeys,
    /// The newest revision at which one of the cluster's own keys was written.
    pub(super) newest_key: u64,
}

/// The copy.
pub(super) struct Mirror {
    prefix: String,
    clock: Clock,
    state: Mutex<State>,
    /// Why the last look, or the watch, brought nothing.
    trouble: Mutex<Option<String>>,
    out: watch::Sender<Arc<Snapshot>>,
}

impl Mirror {
    pub(super) fn new(prefix: String, clock: Clock) -> Self {
        let state = State {
            snapshot: Arc::default(),
            lease: LeaseKeys::default(),
            seen: Seen::default(),
            read_once: false,
            epoch: 0,
        };
        Self {
            prefix,
            clock,
            state: Mutex::new(state),
            trouble: Mutex::default(),
            out: watch::Sender::new(Arc::default()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.out.subscribe()
    }

    /// Why etcd cannot be read, as of the last try.
    pub(super) fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock();
        trouble.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_trouble(&self, why: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// A linearizable read of all keys. Everybody is shown what it found.
    pub(super) async fn look(&self, client: &Client) -> Result<Look, CoordinatorError> {
        let ask = Range::of(self.prefix.clone());
        // Before it is sent: an answer that is older than this is no answer that came late.
        let (known, epoch) = {
            let state = self.lock();
            (state.snapshot.revision, state.epoch)
        };
        let told = client.call("/v3/kv/range", &ask, Repeat::Freely).await;
        let told: RangeTold =
            told.inspect_err(|error| self.note_trouble(Some(error.why().to_owned())))?;
        self.note_trouble(None);
        // After the answer: a beat is never taken for older than it is.
        let now = self.clock.now();
        let look = self.parse(&told).map_err(CoordinatorError::Refused)?;
        self.take(&look, now, (known, epoch));
        Ok(look)
    }

    fn name<'a>(&self, key: &'a str) -> &'a str {
        key.strip_prefix(self.prefix.as_str()).unwrap_or(key)
    }

    /// The lease's keys of an answer.
    pub(super) fn lease_keys(&self, told: &RangeTold) -> Result<LeaseKeys, String> {
        Ok(self.parse(told)?.lease)
    }

    fn parse(&self, told: &RangeTold) -> Result<Look, String> {
        let mut snapshot = Snapshot {
            revision: told.header.revision.0,
            ..Snapshot::default()
        };
        let mut lease = LeaseKeys::default();
        for kv in &told.kvs {
            let name = self.name(&kv.key.0);
            lease.note(name, Some(kv))?;
            if let Some(key) = name.strip_prefix(DATA) {
                snapshot.entries.insert(key.to_owned(), versioned(kv));
            }
        }
        let newest_key = told.kvs.iter().map(|kv| kv.mod_revision.0).max();
        Ok(Look {
            snapshot: Arc::new(snapshot),
            lease,
            newest_key: newest_key.unwrap_or(0),
        })
    }

    fn take(&self, look: &Look, now: BootTime, (known, epoch): (u64, u64)) {
        let mut state = self.lock();
        state.read_once = true;
        let went_back = state.epoch == epoch && look.snapshot.revision < known;
        if went_back {
            tracing::error!(
                known,
                now = look.snapshot.revision,
                "etcd's revision went back: it was restored from a copy"
            );
            // Beats count anew, from when each is first seen: that only makes others wait longer.
            state.epoch += 1;
            state.seen = Seen::default();
        } else if look.snapshot.revision < state.snapshot.revision {
            return;
        }
        state.seen.note(look.lease.beat.revision, now);
        state.lease = look.lease.clone();
        state.snapshot = Arc::clone(&look.snapshot);
        if went_back {
            self.out.send_replace(Arc::clone(&state.snapshot));
        } else {
            self.publish(&state);
        }
    }

    fn publish(&self, state: &State) {
        self.out.send_if_modified(|out| {
            let newer = state.snapshot.revision > out.revision;
            if newer {
                *out = Arc::clone(&state.snapshot);
            }
            newer
        });
    }

    fn follow(&self, told: &WatchTold) -> Result<(), String> {
        let now = self.clock.now();
        let mut state = self.lock();
        if told.header.revision.0 <= state.snapshot.revision {
            return Ok(());
        }
        let from = state.snapshot.revision;
        let mut next = Snapshot::clone(&state.snapshot);
        let mut data = false;
        for event in told.events.iter().filter(|e| e.kv.mod_revision.0 > from) {
            let name = self.name(&event.kv.key.0).to_owned();
            let deleted = event.kind == "DELETE";
            state.lease.note(&name, (!deleted).then_some(&event.kv))?;
            if let Some(key) = name.strip_prefix(DATA) {
                data = true;
                if deleted {
                    next.entries.remove(key);
                } else {
                    next.entries.insert(key.to_owned(), versioned(&event.kv));
                }
            }
            next.revision = next.revision.max(event.kv.mod_revision.0);
        }
        let beat = state.lease.beat.revision;
        state.seen.note(beat, now);
        state.snapshot = Arc::new(next);
        // A beat alone wakes nobody.
        if data {
            self.publish(&state);
        }
        Ok(())
    }

    /// A beat of our own that etcd has accepted.
    pub(super) fn note_beat(&self, revision: u64) {
        let now = self.clock.now();
        self.lock().seen.note(revision, now);
    }

    /// Since when this process has seen the beat of `keys` unchanged.
    pub(super) fn silent_since(&self, keys: &LeaseKeys) -> BootTime {
        let now = self.clock.now();
        self.lock().seen.since(keys, now)
    }

    pub(super) fn hint(&self) -> LeaseHint {
        let now = self.clock.now();
        let mut state = self.lock();
        if !state.read_once {
            return LeaseHint::Unknown;
        }
        let lease = state.lease.clone();
        let until = state.seen.since(&lease, now).after(lease.silence());
        match lease.running() {
            Some(holder) if until > now => LeaseHint::Held {
                term: holder.term,
                until,
            },
            _ => LeaseHint::Lapsed,
        }
    }

    /// Follows for ever.
    pub(super) async fn run(self: Arc<Self>, client: Arc<Client>) {
        let mut backoff = BACKOFF_MIN;
        let mut last = String::new();
        loop {
            let began = Instant::now();
            let why = match self.watch_once(&client).await {
                Ok(why) => {
                    backoff = BACKOFF_MIN;
                    why
                }
                Err(why) => why,
            };
            if why == last {
                tracing::debug!(why, "etcd's watch ended again");
            } else {
                tracing::warn!(why, "etcd's watch ended; it is begun again");
                last = why;
            }
            if began.elapsed() > LOOK_EVERY * 10 {
                last.clear();
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Reads, then watches from there, until something is wrong. `Err`: it did not even begin.
    async fn watch_once(&self, client: &Client) -> Result<String, String> {
        let look = self.look(client).await.map_err(|e| e.to_string())?;
        let ask = WatchAsk {
            create_request: WatchCreate {
                key: Bytes(self.prefix.clone()),
                range_end: range_end(&self.prefix),
                start_revision: Int(look.snapshot.revision + 1),
            },
        };
        let mut stream = client.stream("/v3/watch", &ask).await?;
        let why = self
            .listen(client, &mut stream, look.snapshot.revision)
            .await;
        client.give_up(&stream);
        Ok(why)
    }

    /// Until the stream ends, or falls silent about something that a look has shown.
    async fn listen(&self, client: &Client, stream: &mut Stream, from: u64) -> String {
        let mut looks = interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told_through = from;
        let mut must_tell = from;
        loop {
            tokio::select! {
                line = stream.lines.next() => match line.and_then(|l| self.hear(&l)) {
                    Ok(revision) => told_through = told_through.max(revision),
                    Err(why) => return why,
                },
                _ = looks.tick() => {
                    if must_tell > told_through {
                        return format!("the endpoint is silent about revision {must_tell}");
                    }
                    // A failed look says nothing about the stream.
                    if let Ok(look) = self.look(client).await {
                        must_tell = must_tell.max(look.newest_key);
                    }
                }
            }
        }
    }

    /// One line of the stream; the revision that it tells of.
    fn hear(&self, line: &[u8]) -> Result<u64, String> {
        let line: WatchLine = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        if let Some(error) = line.error {
            return Err(error.to_string());
        }
        let told = line.result.unwrap_or_default();
        if told.canceled {
            return Err(if told.compact_revision.0 > 0 {
                format!(
                    "etcd has compacted what came before revision {}; all keys are read again",
                    told.compact_revision.0
                )
            } else {
                format!("etcd canceled the watch: {}", told.cancel_reason)
            });
        }
        self.follow(&told)?;
        Ok(told
            .events
            .iter()
            .map(|e| e.kv.mod_revision.0)
            .max()
            .unwrap_or(0))
    }
}

fn versioned(kv: &KeyValue) -> Versioned {
    Versioned {
        mod_revision: kv.mod_revision.0,
        value: kv.value.0.clone(),
    }
}
