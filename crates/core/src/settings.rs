//! Cluster-wide settings: what the operator chose, kept in the coordinator, the same for every member.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Which copies must exist before a client hears "committed" (failover protocol, section 3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Flushed on the leader. A failover may lose the tail not yet received, at most `max_lag_bytes`.
    Async,
    /// Flushed on the leader and on k members of the sync set. A failover loses nothing acknowledged. When
    /// standbys are gone the leader goes on with fewer, in the end alone.
    #[default]
    Quorum,
    /// As `quorum`, and with fewer than k standbys writes wait.
    Strict,
}

impl Durability {
    /// A failover loses nothing acknowledged: an election needs seals, not luck.
    pub fn keeps_commits(self) -> bool {
        self != Self::Async
    }
}

impl std::fmt::Display for Durability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Async => "async",
            Self::Quorum => "quorum",
            Self::Strict => "strict",
        })
    }
}

/// Cluster-wide settings. Times are milliseconds. Every field but the last two has its row in [`FIELDS`].
///
/// What a newer version stored and this one does not know is kept as it is, so that members of two versions
/// can share a cluster; what a person writes is read by [`strict`] and [`Settings::with`], which know no
/// unknown names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// How long a lease lasts after its renewal was sent.
    pub ttl_ms: u64,
    /// How often the leader renews its lease and every member announces itself.
    pub heartbeat_ms: u64,
    /// Durability mode.
    pub durability: Durability,
    /// How many members of the sync set must have flushed a commit (k). In `quorum` it is lowered to the
    /// number of standbys that are there; in `strict` writes wait instead.
    pub sync_standbys: u32,
    /// In `async`: a standby further behind the last known position of the leader is never promoted
    /// automatically. Bytes.
    pub max_lag_bytes: u64,
    /// A standby that has not streamed, or has not flushed anything new while there was something to
    /// flush, for this long leaves the sync set.
    pub standby_grace_ms: u64,
    /// A planned switchover waits at most this long for running transactions to end.
    pub switchover_wait_ms: u64,
    /// A leader whose fullest file system has less room than this hands over; below twice as much it warns.
    /// A file of this size is kept on the member's disk and given up when it runs full. On a small file
    /// system at most an eighth of it. MiB; 0: the disk is not looked at.
    pub disk_reserve_mb: u64,
    /// A leader whose commits, or whose probe of the storage, have not come to an end for this long fences
    /// itself and hands over, if another member can be promoted. 0: never.
    pub stall_after_ms: u64,
    /// A leader whose PostgreSQL runs and does not answer (starting, or stuck)
    /// for this long counts as dead, if another member can be promoted.
    pub crash_grace_ms: u64,
    /// Parameters of PostgreSQL for every member, by name. A member's own `[node.postgresql]` goes over them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub postgresql: BTreeMap<String, String>,
    /// Settings of a newer version.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, Value>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ttl_ms: 2000,
            heartbeat_ms: 300,
            durability: Durability::Quorum,
            sync_standbys: 1,
            max_lag_bytes: 16 << 20,
            standby_grace_ms: 2000,
            switchover_wait_ms: 3000,
            disk_reserve_mb: 128,
            stall_after_ms: 4000,
            crash_grace_ms: 2000,
            postgresql: BTreeMap::new(),
            unknown: BTreeMap::new(),
        }
    }
}

/// The reserve takes at most this part of a file system.
const RESERVE_PART: u64 = 8;

impl Settings {
    /// The lease's length.
    pub fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms)
    }

    /// What the leader's own deadline keeps away from the lease's end: a tenth of it, so that clock
    /// *rates* may differ by that much (failover protocol, 2.2).
    pub fn margin(&self) -> Duration {
        Duration::from_millis(self.ttl_ms.div_ceil(10))
    }

    /// The renewal interval.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// The reserve on a file system of this size, bytes.
    pub fn disk_reserve(&self, total: u64) -> u64 {
        self.disk_reserve_mb
            .saturating_mul(1 << 20)
            .min(total / RESERVE_PART)
    }

    /// After how long storage counts as hung; none: never.
    pub fn stall_after(&self) -> Option<Duration> {
        (self.stall_after_ms > 0).then(|| Duration::from_millis(self.stall_after_ms))
    }

    /// How long a PostgreSQL that runs may be silent.
    pub fn crash_grace(&self) -> Duration {
        Duration::from_millis(self.crash_grace_ms)
    }

    /// Says what is wrong with the settings, if anything: each field's range, then what two say together.
    /// PostgreSQL's parameters are checked by whoever has a PostgreSQL.
    pub fn validate(&self) -> Result<(), String> {
        let values = self.values();
        for field in FIELDS {
            if let Some(value) = values.get(field.name) {
                field.check(value)?;
            }
        }
        if self.heartbeat_ms.saturating_mul(3) > self.ttl_ms {
            return Err(format!(
                "heartbeat_ms = {} does not fit ttl_ms = {}: use at most a third of the ttl, so that one lost renewal is not a failover",
                self.heartbeat_ms, self.ttl_ms
            ));
        }
        if self.stall_after_ms != 0 && self.stall_after_ms < 1000 {
            return Err(format!(
                "stall_after_ms = {} is too short: a healthy disk may take a second for a flush; use 1000 or more, or 0 for never",
                self.stall_after_ms
            ));
        }
        Ok(())
    }

    /// Every setting of [`FIELDS`] by name, as JSON.
    fn values(&self) -> serde_json::Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        }
    }

    /// The value of a setting as text, as [`Self::with`] reads it; none for a name that is not set or not known.
    pub fn get(&self, name: &str) -> Option<String> {
        if let Some(parameter) = name.strip_prefix(POSTGRESQL) {
            return self.postgresql.get(parameter).cloned();
        }
        field(name)?;
        self.values().get(name).map(plain)
    }

    /// These settings with one of them changed. `name` is one of [`FIELDS`] or `postgresql.PARAMETER`; numbers may
    /// carry a unit (`3s`, `16MB`). Ranges are checked, what two settings say together is not: see
    /// [`Self::validate`].
    pub fn with(&self, name: &str, text: &str) -> Result<Self, String> {
        if let Some(parameter) = name.strip_prefix(POSTGRESQL) {
            let mut next = self.clone();
            next.postgresql
                .insert(parameter_name(parameter)?, text.to_owned());
            return Ok(next);
        }
        let field = field(name).ok_or_else(|| no_such(name))?;
        let value = field.parse(text)?;
        field.check(&value)?;
        self.replaced(name, value)
    }

    /// These settings with one of them back at its default; a parameter of PostgreSQL is taken out.
    pub fn without(&self, name: &str) -> Result<Self, String> {
        if let Some(parameter) = name.strip_prefix(POSTGRESQL) {
            let mut next = self.clone();
            return match next.postgresql.remove(&parameter_name(parameter)?) {
                Some(_) => Ok(next),
                None => Err(format!("{name} is not set")),
            };
        }
        field(name).ok_or_else(|| no_such(name))?;
        let default = Self::default().values().remove(name).unwrap_or_default();
        self.replaced(name, default)
    }

    fn replaced(&self, name: &str, value: Value) -> Result<Self, String> {
        let mut values = self.values();
        values.insert(name.to_owned(), value);
        serde_json::from_value(Value::Object(values)).map_err(|e| format!("{name}: {e}"))
    }
}

/// Parameters of PostgreSQL of which a standby needs at least as much as its primary has
/// (`CheckRequiredParameterValues` in xlog.c). They are raised on the standbys first, and lowered on the leader first.
pub const STANDBY_AT_LEAST: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

/// Before the name of a parameter of PostgreSQL.
pub const POSTGRESQL: &str = "postgresql.";

/// PostgreSQL's names are lower case, with a dot in those of extensions.
fn parameter_name(name: &str) -> Result<String, String> {
    let fits = !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
    if fits {
        Ok(name.to_ascii_lowercase())
    } else {
        Err(format!(
            "\"{name}\" is not the name of a parameter of PostgreSQL"
        ))
    }
}

/// What a setting may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A number with its range, both ends included.
    Number {
        /// The least.
        min: u64,
        /// The greatest.
        max: u64,
    },
    /// One of these words.
    Word(&'static [&'static str]),
    /// `true` or `false`.
    Flag,
}

/// What a number counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Nothing: it is a plain number or a word.
    None,
    /// Milliseconds.
    Milliseconds,
    /// Bytes.
    Bytes,
}

impl Unit {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Milliseconds => "ms",
            Self::Bytes => "bytes",
        }
    }

    /// The suffixes that are understood, with what they multiply by.
    fn suffixes(self) -> &'static [(&'static str, u64)] {
        match self {
            Self::None => &[],
            Self::Milliseconds => &[("ms", 1), ("s", 1000), ("min", 60_000), ("h", 3_600_000)],
            Self::Bytes => &[
                ("B", 1),
                ("kB", 1 << 10),
                ("MB", 1 << 20),
                ("GB", 1 << 30),
                ("TB", 1 << 40),
            ],
        }
    }
}

/// One cluster-wide setting: validation, help and the reference page are all made from this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// Its name, as in [`Settings`].
    pub name: &'static str,
    /// What it does, in a sentence or two.
    pub doc: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// What it may be.
    pub kind: Kind,
}

/// Every cluster-wide setting but the parameters of PostgreSQL.
pub const FIELDS: &[Field] = &[
    Field {
        name: "ttl_ms",
        doc: "How long a lease lasts after its renewal was sent. A leader that is lost is replaced after this.",
        unit: Unit::Milliseconds,
        kind: Kind::Number {
            min: 500,
            max: 600_000,
        },
    },
    Field {
        name: "heartbeat_ms",
        doc: "How often the leader renews its lease and every member announces itself; at most a third of ttl_ms.",
        unit: Unit::Milliseconds,
        kind: Kind::Number {
            min: 50,
            max: 200_000,
        },
    },
    Field {
        name: "durability",
        doc: "Which copies must exist before a client hears \"committed\".",
        unit: Unit::None,
        kind: Kind::Word(&["async", "quorum", "strict"]),
    },
    Field {
        name: "sync_standbys",
        doc: "How many members of the sync set must have flushed a commit (k). In quorum it is lowered to the number of standbys that are there, in strict writes wait. For none at all set durability to async.",
        unit: Unit::None,
        kind: Kind::Number { min: 1, max: 16 },
    },
    Field {
        name: "max_lag_bytes",
        doc: "In async: a standby further behind the last known position of the leader is never promoted automatically.",
        unit: Unit::Bytes,
        kind: Kind::Number {
            min: 0,
            max: 1 << 50,
        },
    },
    Field {
        name: "standby_grace_ms",
        doc: "A standby that has not streamed, or has not flushed anything new while there was something to flush, for this long leaves the sync set.",
        unit: Unit::Milliseconds,
        kind: Kind::Number {
            min: 100,
            max: 600_000,
        },
    },
    Field {
        name: "switchover_wait_ms",
        doc: "A planned switchover (or restart of the leader in place) waits at most this long for running transactions to end.",
        unit: Unit::Milliseconds,
        kind: Kind::Number {
            min: 0,
            max: 600_000,
        },
    },
    Field {
        name: "disk_reserve_mb",
        doc: "A leader whose fullest file system has less room than this (MiB) hands over; below twice as much it warns. A file of this size is kept on the member's disk and given up when it runs full. At most an eighth of a file system counts; 0: the disk is not looked at.",
        unit: Unit::None,
        kind: Kind::Number {
            min: 0,
            max: 1 << 20,
        },
    },
    Field {
        name: "stall_after_ms",
        doc: "A leader whose commits, or whose probe of the storage, have not come to an end for this long fences itself and hands over, if another member can be promoted; 0: never.",
        unit: Unit::Milliseconds,
        kind: Kind::Number {
            min: 0,
            max: 3_600_000,
        },
    },
    Field {
        name: "crash_grace_ms",
        doc: "A leader whose PostgreSQL runs and does not answer (starting, or stuck) for this long counts as dead, if another member can be promoted.",
        unit: Unit::Milliseconds,
        kind: Kind::Number {
            min: 500,
            max: 3_600_000,
        },
    },
];

/// The row of a setting.
pub fn field(name: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|f| f.name == name)
}

fn no_such(name: &str) -> String {
    let names: Vec<&str> = FIELDS.iter().map(|f| f.name).collect();
    format!(
        "there is no setting \"{name}\"; there are {} and postgresql.PARAMETER",
        names.join(", ")
    )
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl Field {
    /// Its default as text.
    pub fn default_text(&self) -> String {
        Settings::default().get(self.name).unwrap_or_default()
    }

    /// What it may be, for people: `500 to 600000 ms`, `async, quorum`.
    pub fn range(&self) -> String {
        match self.kind {
            Kind::Number { min, max } => format!("{min} to {max} {}", self.unit.name())
                .trim_end()
                .to_owned(),
            Kind::Word(words) => words.join(", "),
            Kind::Flag => "true, false".to_owned(),
        }
    }

    fn parse(&self, text: &str) -> Result<Value, String> {
        let text = text.trim();
        match self.kind {
            Kind::Word(_) => Ok(Value::String(text.to_owned())),
            Kind::Flag => match text {
                "true" | "on" | "yes" => Ok(Value::Bool(true)),
                "false" | "off" | "no" => Ok(Value::Bool(false)),
                _ => Err(format!("{} = {text} is neither true nor false", self.name)),
            },
            Kind::Number { .. } => self.number(text).map(Value::from),
        }
    }

    fn number(&self, text: &str) -> Result<u64, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, suffix) = text.split_at_checked(digits).unwrap_or((text, ""));
        let suffix = suffix.trim();
        let factor = match suffix {
            "" => Some(1),
            _ => self
                .unit
                .suffixes()
                .iter()
                .find(|(s, _)| s.eq_ignore_ascii_case(suffix))
                .map(|(_, f)| *f),
        };
        let value = number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(factor?));
        value.ok_or_else(|| {
            let suffixes: Vec<&str> = self.unit.suffixes().iter().map(|(s, _)| *s).collect();
            let units = if suffixes.is_empty() {
                String::new()
            } else {
                format!(", or one with a unit ({})", suffixes.join(", "))
            };
            format!(
                "{} = {text} is not a number: write {}{units}",
                self.name,
                self.range()
            )
        })
    }

    /// Says whether a value is of its kind and within its range.
    pub fn check(&self, value: &Value) -> Result<(), String> {
        let fits = match self.kind {
            Kind::Number { min, max } => value.as_u64().is_some_and(|n| (min..=max).contains(&n)),
            Kind::Word(words) => value.as_str().is_some_and(|w| words.contains(&w)),
            Kind::Flag => value.is_boolean(),
        };
        if fits {
            return Ok(());
        }
        Err(format!(
            "{} = {} is out of range: use {}",
            self.name,
            plain(value),
            self.range()
        ))
    }
}

/// Settings as a person writes them: a name that is not known is a mistake, not a newer version.
pub fn strict<'de, D: Deserializer<'de>>(d: D) -> Result<Settings, D::Error> {
    use serde::de::Error as _;
    let written = BTreeMap::<String, Value>::deserialize(d)?;
    if let Some(name) = written
        .keys()
        .find(|k| field(k).is_none() && *k != "postgresql")
    {
        return Err(D::Error::custom(no_such(name)));
    }
    serde_json::from_value(Value::Object(written.into_iter().collect())).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_the_margin_is_a_tenth() {
        let s = Settings::default();
        s.validate().unwrap();
        assert_eq!(s.margin(), Duration::from_millis(200));
    }

    #[test]
    fn one_lost_renewal_must_not_cost_the_lease() {
        let s = Settings {
            heartbeat_ms: 900,
            ..Settings::default()
        };
        assert!(s.validate().unwrap_err().contains("a third of the ttl"));
    }

    #[test]
    fn the_table_has_a_row_for_every_field_and_no_other() {
        let mut values = Settings {
            postgresql: [("a".to_owned(), "b".to_owned())].into(),
            ..Settings::default()
        }
        .values();
        assert!(values.remove("postgresql").is_some());
        let fields: Vec<&str> = values.keys().map(String::as_str).collect();
        let mut rows: Vec<&str> = FIELDS.iter().map(|f| f.name).collect();
        rows.sort_unstable();
        assert_eq!(
            fields, rows,
            "give every field of Settings its row in FIELDS"
        );
        for f in FIELDS {
            f.check(&values[f.name]).unwrap();
            if let Kind::Word(words) = f.kind {
                for word in words {
                    let set = Settings::default().with(f.name, word).unwrap();
                    assert_eq!(set.get(f.name).as_deref(), Some(*word));
                }
            }
        }
    }

    #[test]
    fn what_a_newer_version_stored_is_kept() {
        let stored = r#"{"ttl_ms":5000,"colour":"blue"}"#;
        let read: Settings = serde_json::from_str(stored).unwrap();
        assert_eq!(read.ttl_ms, 5000);
        let changed = read.with("heartbeat_ms", "1s").unwrap();
        let text = serde_json::to_string(&changed).unwrap();
        assert!(text.contains(r#""colour":"blue""#), "{text}");
        assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), changed);
    }

    #[test]
    fn what_a_person_writes_is_checked() {
        let s = Settings::default();
        assert_eq!(s.with("ttl_ms", "3 s").unwrap().ttl_ms, 3000);
        assert_eq!(
            s.with("max_lag_bytes", "16MB").unwrap().max_lag_bytes,
            16 << 20
        );
        let parameter = s.with("postgresql.Work_Mem", "8MB").unwrap();
        assert_eq!(parameter.get("postgresql.work_mem").as_deref(), Some("8MB"));
        assert_eq!(parameter.without("postgresql.work_mem").unwrap(), s);
        assert_eq!(
            s.with("ttl_ms", "9s").unwrap().without("ttl_ms").unwrap(),
            s
        );
        for (name, text, says) in [
            ("ttl_ms", "100", "500 to 600000 ms"),
            ("ttl_ms", "-1", "is not a number"),
            ("ttl_ms", "3 parsec", "(ms, s, min, h)"),
            ("durability", "eventual", "out of range: use async"),
            ("sync_standbys", "0", "out of range"),
            ("tll_ms", "3000", "there is no setting \"tll_ms\""),
            ("postgresql.a b", "1", "not the name of a parameter"),
        ] {
            let error = s.with(name, text).unwrap_err();
            assert!(error.contains(says), "{name} = {text}: {error}");
        }
        let unknown = strict(serde_json::json!({"tll_ms": 1})).unwrap_err();
        assert!(unknown.to_string().contains("there is no setting"));
        let known = strict(serde_json::json!({"ttl_ms": 4000, "postgresql": {"work_mem": "8MB"}}));
        assert_eq!(known.unwrap().ttl_ms, 4000);
    }
}
