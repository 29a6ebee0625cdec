//! Logical replication slots that survive a failover: which copies a standby keeps, and which of them may be offered
//! after a promotion.
//!
//! From PostgreSQL 17 on the server does this by itself, for slots that were made with `failover = true`. Below, a
//! standby takes over the file in which the leader keeps the slot, restarts with it, and moves it along from then on.
//! Such a copy is never ahead of what the consumer has confirmed: it is moved to no more than that. What remains is
//! that the rows of the catalog which decoding needs are still there. They are once the leader's vacuum is known to
//! be held back for this copy (by the standby's own physical slot), and the copy asks for nothing older than the
//! leader's slot asked for at that moment. Only then is the copy *ready*. It is so for the term in which that was
//! seen: another leader's vacuum is held back by nothing yet. A copy that is not ready is dropped before a promotion:
//! better no slot, said loudly, than one that skips or cannot decode.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::types::{Lsn, Term};

/// A member tells of no more slots than this, the first by name; what is beyond has no copies.
pub const SLOTS_MAX: usize = 64;

/// From this version on PostgreSQL copies slots by itself.
pub const OWN_SYNC_FROM: u32 = 17;

/// A logical slot as its server tells it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LogicalSlot {
    /// Its name.
    pub name: String,
    /// The database that it decodes.
    pub database: String,
    /// The output plugin.
    pub plugin: String,
    /// Decodes prepared transactions.
    #[serde(default)]
    pub two_phase: bool,
    /// Decoding begins here: WAL from there on is needed.
    pub restart: Lsn,
    /// The consumer has everything before.
    pub confirmed: Lsn,
    /// Rows of the catalog that were dead before this transaction are not needed.
    pub catalog_xmin: u32,
    /// From PostgreSQL 17: made with `failover = true`.
    #[serde(default)]
    pub failover: Option<bool>,
    /// From PostgreSQL 17: a copy that PostgreSQL itself keeps.
    #[serde(default)]
    pub synced: Option<bool>,
}

impl LogicalSlot {
    /// The same slot, at whatever position.
    fn is_copy_of(&self, other: &Self) -> bool {
        (&self.name, &self.database, &self.plugin, self.two_phase)
            == (&other.name, &other.database, &other.plugin, other.two_phase)
    }
}

/// What a member tells the others of its logical slots.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    /// Its slots; none while they are not known.
    #[serde(default)]
    pub slots: Option<Vec<LogicalSlot>>,
    /// The leader: what each physical slot holds its vacuum of the catalog back for.
    #[serde(default)]
    pub held: BTreeMap<String, u32>,
    /// A standby: the copies that would survive its promotion.
    #[serde(default)]
    pub ready: BTreeSet<String>,
    /// A standby: the leader's slots that it has no copy of.
    #[serde(default)]
    pub missing: BTreeSet<String>,
    /// The leader: slots of its predecessor that it could not offer.
    #[serde(default)]
    pub lost: BTreeSet<String>,
}

impl Told {
    /// Without what moves all the time: a change of this is told at once.
    #[must_use]
    pub fn in_substance(&self) -> Self {
        let still = |s: &LogicalSlot| LogicalSlot {
            restart: Lsn::ZERO,
            confirmed: Lsn::ZERO,
            catalog_xmin: 0,
            ..s.clone()
        };
        Self {
            slots: self.slots.as_ref().map(|s| s.iter().map(still).collect()),
            held: BTreeMap::new(),
            ..self.clone()
        }
    }
}

/// What a member must not forget of its copies. Kept on disk.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Notes {
    /// The last term in which it took WAL from a leader.
    #[serde(default)]
    pub followed: Term,
    /// The slots that it looks after, and the last term in which each was known to be whole; 0: never.
    #[serde(default)]
    pub whole_in: BTreeMap<String, Term>,
}

impl Notes {
    /// WAL of a leader of this term comes from now on, and with it what that leader's vacuum did.
    #[must_use]
    pub fn following(&self, term: Term) -> Self {
        Self {
            followed: self.followed.max(term),
            whole_in: self.whole_in.clone(),
        }
    }

    /// The copy may be offered after a promotion.
    pub fn is_whole(&self, name: &str) -> bool {
        let noted = self.whole_in.get(name);
        noted.is_some_and(|t| *t >= self.followed && *t > Term(0))
    }

    /// What must not be offered of the logical slots that a standby has. Where not all of them are copies (from
    /// PostgreSQL 16 on clients make some on a standby), one without a note is a client's.
    pub fn not_whole<'a>(&self, here: &'a [LogicalSlot], all_are_copies: bool) -> Vec<&'a str> {
        let copy = |name: &str| all_are_copies || self.whole_in.contains_key(name);
        here.iter()
            .map(|s| s.name.as_str())
            .filter(|name| copy(name) && !self.is_whole(name))
            .collect()
    }

    /// These are copies now, and nothing is known of them yet.
    #[must_use]
    pub fn with_copies<'a>(&self, names: impl Iterator<Item = &'a str>) -> Self {
        let mut next = self.clone();
        next.whole_in.extend(names.map(|n| (n.to_owned(), Term(0))));
        next
    }

    /// The slots of a leader of this term are whole by themselves, unless it is noted that they are not.
    #[must_use]
    pub fn leading(&self, term: Term, own: &[LogicalSlot]) -> Self {
        let now = |s: &LogicalSlot| {
            let broken = self.whole_in.contains_key(&s.name) && !self.is_whole(&s.name);
            (s.name.clone(), if broken { Term(0) } else { term })
        };
        Self {
            followed: self.followed,
            whole_in: own.iter().map(now).collect(),
        }
    }
}

/// A is before B, where both may have wrapped around (transam.c, `TransactionIdPrecedes`).
fn precedes(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

/// Something that a standby does with its copies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Move a copy to there, as far as has been replayed.
    Advance {
        /// Which.
        name: String,
        /// In this database.
        database: String,
        /// The consumer's position.
        to: Lsn,
    },
    /// Drop a copy: the leader has no such slot (any more).
    Drop {
        /// Which.
        name: String,
        /// In words.
        why: &'static str,
    },
}

/// What a standby knows when it looks after its copies.
#[derive(Clone, Debug)]
pub struct Look<'a> {
    /// The leader's term.
    pub term: Term,
    /// What the leader told.
    pub leader: &'a Told,
    /// This member's physical slot there.
    pub own_slot: &'a str,
    /// The logical slots here.
    pub here: &'a [LogicalSlot],
    /// Those here that have lost their WAL or their rows.
    pub broken: &'a BTreeSet<String>,
    /// What was noted.
    pub notes: &'a Notes,
    /// Before PostgreSQL 16 no client makes a logical slot on a standby: all of them are copies.
    pub all_are_copies: bool,
    /// The copies that the leader's vacuum was seen to be held back for, in this term and before `leader` was told.
    pub held_before: &'a BTreeSet<String>,
}

/// What comes of a look.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// To do.
    pub steps: Vec<Step>,
    /// The leader's slots without a copy here.
    pub missing: BTreeSet<String>,
    /// To be noted, if it differs.
    pub notes: Notes,
    /// The copies that the leader's vacuum is held back for now.
    pub held: BTreeSet<String>,
}

/// Copies are kept of this slot: not of those in which a subscription copies one table, which live for a moment.
pub fn is_kept(name: &str) -> bool {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = name.split('_').collect();
    // tablesync.c, ReplicationSlotNameForTablesync: pg_SUBSCRIPTION_sync_RELATION_SYSTEM
    !matches!(parts.as_slice(), ["pg", a, "sync", b, c] if digits(a) && digits(b) && digits(c))
}

/// Looks after the copies of a standby that streams. None while the leader has not told of its slots.
pub fn look(k: &Look<'_>) -> Option<Outcome> {
    let there = k.leader.slots.as_ref()?;
    let mut out = Outcome {
        notes: k.notes.clone(),
        ..Outcome::default()
    };
    let held_for = k.leader.held.get(k.own_slot).copied();
    for slot in k.here {
        let original = there.iter().find(|s| s.name == slot.name);
        let copy = k.all_are_copies || k.notes.whole_in.contains_key(&slot.name);
        let why = match original {
            _ if copy && k.broken.contains(&slot.name) => {
                Some("what it needs is not there any more")
            }
            None if copy => Some("the leader has no such slot"),
            Some(o) if copy && !slot.is_copy_of(o) => Some("the leader has another of that name"),
            Some(_) if copy => None,
            _ => continue,
        };
        let (Some(original), None) = (original, why) else {
            out.steps.push(Step::Drop {
                name: slot.name.clone(),
                why: why.unwrap_or_default(),
            });
            continue;
        };
        if slot.confirmed < original.confirmed {
            out.steps.push(Step::Advance {
                name: slot.name.clone(),
                database: slot.database.clone(),
                to: original.confirmed,
            });
        }
        let held = held_for.is_some_and(|xid| !precedes(slot.catalog_xmin, xid));
        if held {
            out.held.insert(slot.name.clone());
        }
        let whole_before = k.notes.whole_in.get(&slot.name) == Some(&k.term);
        // Once it is held back for the copy, it stays so; before, the leader's own slot must not be past it.
        let whole = held
            && (whole_before
                || k.held_before.contains(&slot.name)
                    && !precedes(slot.catalog_xmin, original.catalog_xmin));
        out.notes
            .whole_in
            .insert(slot.name.clone(), if whole { k.term } else { Term(0) });
    }
    let here: BTreeSet<&str> = k.here.iter().map(|s| s.name.as_str()).collect();
    let dropped: BTreeSet<&String> = out
        .steps
        .iter()
        .filter_map(|s| match s {
            Step::Drop { name, .. } => Some(name),
            Step::Advance { .. } => None,
        })
        .collect();
    for name in dropped {
        out.notes.whole_in.insert(name.clone(), Term(0));
    }
    // The note of a slot goes when it is neither here nor there. (What is seen here may be older than the note.)
    let gone = |name: &String| !here.contains(name.as_str());
    let known: BTreeSet<&String> = there.iter().map(|s| &s.name).collect();
    let notes = &mut out.notes.whole_in;
    notes.retain(|name, _| !gone(name) || known.contains(name));
    for (_, whole_in) in notes.iter_mut().filter(|(name, _)| gone(name)) {
        *whole_in = Term(0);
    }
    out.missing = there
        .iter()
        .map(|s| &s.name)
        .filter(|name| is_kept(name) && gone(name))
        .cloned()
        .collect();
    Some(out)
}

/// After a promotion new WAL begins behind this: a consumer may have confirmed positions of the former leader's WAL
/// that nobody else got, and asks for what comes after them. What is written at such a position on the new timeline
/// it would never see. `known` are the ends of WAL that anybody told of, and the consumers' positions.
pub fn first_position(known: impl Iterator<Item = Lsn>, segment_size: u64) -> Option<Lsn> {
    known
        .max()
        .map(|end| Lsn(end.0.saturating_add(segment_size)))
}

#[cfg(test)]
mod tests;
