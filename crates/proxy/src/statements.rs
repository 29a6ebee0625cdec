//! Prepared statements that outlive the server connection they were made on.
//!
//! A text gets one name on all servers, whoever prepares it; clients keep the names they chose. A server
//! connection that does not have the statement yet gets it right before it is used.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use craton_wire::frame::take_cstr;

use crate::sql::{Change, Traits, inspect};

/// Texts that may be unused before they are looked for.
const SWEEP_MIN: usize = 1024;

/// A prepared statement.
#[derive(Debug)]
pub struct Statement {
    /// Its number, which makes its name.
    pub id: u64,
    /// What follows the name in a Parse: text, zero, parameter types.
    pub rest: Box<[u8]>,
    /// What its text tells.
    pub traits: Traits,
    /// The setting that it changes, if that is all it does.
    pub change: Option<Change>,
}

impl Statement {
    /// Its name on servers.
    pub fn server_name(id: u64) -> String {
        format!("craton_{id}")
    }
}

/// The setting that a prepared text changes.
pub fn change_of(rest: &[u8]) -> Option<Change> {
    Change::read(take_cstr(rest)?.0)
}

/// Numbers for statements, the same for all workers because server connections can change the worker.
#[derive(Clone, Debug, Default)]
pub struct StatementIds(Arc<AtomicU64>);

impl StatementIds {
    /// A number never used before; never 0.
    pub fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// All texts that the clients of one worker have prepared.
#[derive(Debug)]
pub struct Registry {
    ids: StatementIds,
    by_text: HashMap<Box<[u8]>, Rc<Statement>>,
    sweep_at: usize,
}

impl Registry {
    /// An empty registry.
    pub fn new(ids: StatementIds) -> Self {
        Self {
            ids,
            by_text: HashMap::new(),
            sweep_at: SWEEP_MIN,
        }
    }

    /// The statement of this text.
    pub fn intern(&mut self, rest: &[u8]) -> Rc<Statement> {
        if let Some(known) = self.by_text.get(rest) {
            return Rc::clone(known);
        }
        if self.by_text.len() >= self.sweep_at {
            self.by_text.retain(|_, s| Rc::strong_count(s) > 1);
            self.sweep_at = SWEEP_MIN.max(self.by_text.len() * 2);
        }
        let statement = Rc::new(Statement {
            id: self.ids.next(),
            rest: rest.into(),
            traits: inspect(rest),
            change: change_of(rest),
        });
        self.by_text.insert(rest.into(), Rc::clone(&statement));
        statement
    }

    /// A number for an unnamed statement.
    pub fn next_id(&self) -> u64 {
        self.ids.next()
    }
}

/// The statements that a server connection has, and which of them was used least recently.
#[derive(Debug, Default)]
pub struct OnServer {
    used: BTreeMap<u64, u64>,
    by_use: BTreeMap<u64, u64>,
    clock: u64,
}

impl OnServer {
    /// Notes a use; true when the server has it already.
    pub fn touch(&mut self, id: u64) -> bool {
        self.clock += 1;
        let before = self.used.insert(id, self.clock);
        if let Some(before) = before {
            self.by_use.remove(&before);
        }
        self.by_use.insert(self.clock, id);
        before.is_some()
    }

    /// The server does not have it after all.
    pub fn forget(&mut self, id: u64) {
        if let Some(used) = self.used.remove(&id) {
            self.by_use.remove(&used);
        }
    }

    /// Takes out the least recently used one if there are more than `max`.
    pub fn evict(&mut self, max: usize) -> Option<u64> {
        if self.used.len() <= max {
            return None;
        }
        let (_, id) = self.by_use.pop_first()?;
        self.used.remove(&id);
        Some(id)
    }

    /// The server has none any more.
    pub fn clear(&mut self) {
        self.used.clear();
        self.by_use.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_text_one_name_and_unused_ones_go() {
        let mut registry = Registry::new(StatementIds::default());
        let first = registry.intern(b"SELECT 1\0\0\0");
        assert_eq!(registry.intern(b"SELECT 1\0\0\0").id, first.id);
        assert_ne!(
            registry.intern(b"SELECT 1\0\0\x01").id,
            first.id,
            "other parameter types"
        );
        for n in 0..SWEEP_MIN * 3 {
            registry.intern(format!("SELECT {n} AS n").as_bytes());
        }
        assert!(
            registry.by_text.len() <= SWEEP_MIN + 1,
            "{}",
            registry.by_text.len()
        );
        assert_eq!(
            registry.intern(b"SELECT 1\0\0\0").id,
            first.id,
            "what is in use stays"
        );
    }

    #[test]
    fn the_least_recently_used_goes() {
        let mut server = OnServer::default();
        assert!(!server.touch(1));
        assert!(!server.touch(2));
        assert!(server.touch(1));
        assert_eq!(server.evict(2), None);
        assert!(!server.touch(3));
        assert_eq!(server.evict(2), Some(2));
        assert!(!server.touch(2));
        server.forget(2);
        assert!(!server.touch(2));
    }
}
