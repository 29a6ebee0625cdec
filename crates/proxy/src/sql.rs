//! What a text tells about state that stays with a server connection after its transaction.
//!
//! Only words are looked at, whatever they stand in: a text that says more than it does costs a pinned session, one
//! that says less could give one client's state to another. Which kind of statement ran is known from the server's
//! command tags; the text only adds what tags do not tell.

use std::fmt::Write as _;

/// What was found, as a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traits(u16);

impl Traits {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// A temporary object.
    pub const TEMPORARY: Self = Self(1);
    /// Something is created, or selected into.
    pub const CREATES: Self = Self(1 << 1);
    /// A session's advisory lock.
    pub const ADVISORY_LOCK: Self = Self(1 << 2);
    /// A cursor that outlives its transaction.
    pub const HOLD: Self = Self(1 << 3);
    /// SET of a parameter that is followed, or for this transaction only.
    pub const SET_FOLLOWED: Self = Self(1 << 4);
    /// SET of anything else.
    pub const SET_OTHER: Self = Self(1 << 5);
    /// `set_config` that may be for the session.
    pub const SET_CONFIG: Self = Self(1 << 6);

    /// True when all of `other` is in here.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Parameters whose changes the server reports, so that they can be followed and set again elsewhere.
pub const FOLLOWED: [&str; 6] = [
    "client_encoding",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "application_name",
    "standard_conforming_strings",
];

/// The longest word that means something here.
const WORD_MAX: usize = 32;

/// Reads a text piece by piece.
#[derive(Debug, Default)]
pub struct Inspector {
    word: [u8; WORD_MAX],
    len: usize,
    /// The byte in front of the word.
    before: u8,
    last: u8,
    traits: u16,
    after: After,
    /// Calls of `set_config` that were not followed by a bare `true` yet: those may be for the session.
    set_configs: u32,
}

/// What the last words were.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum After {
    #[default]
    Nothing,
    Set,
    SetTime,
}

impl Inspector {
    /// Looks at the next piece.
    pub fn feed(&mut self, text: &[u8]) {
        for byte in text {
            if byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80 {
                if self.len == 0 {
                    self.before = self.last;
                }
                if let Some(place) = self.word.get_mut(self.len) {
                    *place = byte.to_ascii_lowercase();
                }
                self.len += 1;
            } else if self.len > 0 {
                self.end_word(*byte);
            }
            self.last = *byte;
        }
    }

    /// What was found until now.
    pub fn finish(&mut self) -> Traits {
        if self.len > 0 {
            self.end_word(b' ');
        }
        if self.set_configs > 0 {
            self.found(Traits::SET_CONFIG);
        }
        Traits(self.traits)
    }

    fn found(&mut self, traits: Traits) {
        self.traits |= traits.0;
    }

    fn end_word(&mut self, next: u8) {
        let buffer = self.word;
        let word = buffer.get(..self.len).unwrap_or_default();
        self.len = 0;
        let followed = FOLLOWED
            .iter()
            .any(|name| name.as_bytes().eq_ignore_ascii_case(word));
        match (self.after, word) {
            (After::Set, b"session") => return,
            (After::Set, b"time") => {
                self.after = After::SetTime;
                return;
            }
            (After::Set, b"local" | b"transaction" | b"constraints" | b"names") => {
                self.found(Traits::SET_FOLLOWED);
            }
            (After::Set, _) if followed => self.found(Traits::SET_FOLLOWED),
            (After::SetTime, b"zone") => self.found(Traits::SET_FOLLOWED),
            (After::Set | After::SetTime, _) => self.found(Traits::SET_OTHER),
            _ => {}
        }
        self.after = After::Nothing;
        match word {
            b"set" => self.after = After::Set,
            b"set_config" => self.set_configs += 1,
            // As a whole argument: neither a text's content nor part of an expression.
            b"true" if self.before != b'\'' && matches!(next, b')' | b' ') => {
                self.set_configs = self.set_configs.saturating_sub(1);
            }
            b"temp" | b"temporary" | b"pg_temp" => self.found(Traits::TEMPORARY),
            b"create" | b"into" => self.found(Traits::CREATES),
            b"hold" => self.found(Traits::HOLD),
            b"pg_advisory_lock"
            | b"pg_advisory_lock_shared"
            | b"pg_try_advisory_lock"
            | b"pg_try_advisory_lock_shared" => {
                self.found(Traits::ADVISORY_LOCK);
            }
            _ => {}
        }
    }
}

/// Looks at a whole text.
pub fn inspect(text: &[u8]) -> Traits {
    let mut inspector = Inspector::default();
    inspector.feed(text);
    inspector.finish()
}

/// The longest SET that is remembered, in bytes.
const SET_BYTES_MAX: usize = 1024;

/// A statement that changes a setting and does nothing else, so that it can be repeated on another server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// `SET name`, and its text.
    Set(Box<str>, Box<str>),
    /// `RESET name`.
    Reset(Box<str>),
    /// `RESET ALL`.
    ResetAll,
}

/// Settings that a session has made and that no server reports: names and texts, in the order in which they were made.
pub type Made = Vec<(Box<str>, Box<str>)>;

/// Settings of this kind that a session may have.
const MADE_MAX: usize = 64;

impl Change {
    /// Reads a text that is one SET or RESET and nothing else. `None` for everything that is not surely that.
    pub fn read(text: &[u8]) -> Option<Self> {
        let first = text.trim_ascii_start().first()?;
        if !matches!(first, b's' | b'S' | b'r' | b'R') || text.len() > SET_BYTES_MAX {
            return None;
        }
        let text = std::str::from_utf8(text).ok()?.trim();
        let text = text.strip_suffix(';').unwrap_or(text).trim_end();
        if text.contains(';') || text.contains("--") || text.contains("/*") {
            return None;
        }
        let (verb, rest) = text.split_once(|c: char| c.is_ascii_whitespace())?;
        let rest = rest.trim_start();
        if verb.eq_ignore_ascii_case("reset") {
            let name = setting_name(rest).filter(|(_, after)| after.is_empty())?.0;
            return Some(if &*name == "all" {
                Self::ResetAll
            } else {
                Self::Reset(name)
            });
        }
        if !verb.eq_ignore_ascii_case("set") {
            return None;
        }
        let (mut name, mut after) = setting_name(rest)?;
        if &*name == "session" {
            (name, after) = setting_name(after)?;
        }
        let assigns = after.starts_with('=')
            || after.get(..3).is_some_and(|to| {
                to.eq_ignore_ascii_case("to ") || to.eq_ignore_ascii_case("to\t")
            });
        let followed = FOLLOWED.iter().any(|f| f.eq_ignore_ascii_case(&name));
        (!followed && (assigns || &*name == "role")).then(|| Self::Set(name, text.into()))
    }

    /// What is made after this. `None` when that is too much to be remembered.
    pub fn apply(self, made: &mut Made) -> Option<()> {
        match self {
            Self::Set(name, text) => {
                made.retain(|(n, _)| *n != name);
                made.push((name, text));
            }
            Self::Reset(name) => made.retain(|(n, _)| *n != name),
            Self::ResetAll => made.clear(),
        }
        (made.len() <= MADE_MAX).then_some(())
    }
}

/// A parameter's name in lower case, and what follows it.
fn setting_name(text: &str) -> Option<(Box<str>, &str)> {
    let end = text
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'))
        .unwrap_or(text.len());
    let (name, after) = text
        .split_at_checked(end)
        .filter(|(name, _)| !name.is_empty())?;
    Some((name.to_ascii_lowercase().into(), after.trim_start()))
}

/// What brings a server connection from the settings that others made to those that a session made.
pub fn difference(is: &Made, wanted: &Made) -> String {
    let mut sql = String::new();
    for (name, _) in is
        .iter()
        .filter(|(name, _)| !wanted.iter().any(|(n, _)| n == name))
    {
        // Writing to a String cannot fail.
        let _ = write!(sql, "RESET {name};");
    }
    for (_, text) in wanted {
        let _ = write!(sql, "{text};");
    }
    sql
}

/// What a completed command means for the connection that it ran on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing that stays.
    None,
    /// State that cannot be moved.
    Pins,
    /// `DISCARD ALL`: the session is as new.
    Discards,
    /// `DEALLOCATE ALL`: no prepared statement is left.
    Deallocates,
}

/// Judges a command by its tag and the traits of the texts that it may have come from.
pub fn effect(tag: &[u8], traits: Traits) -> Effect {
    let temporary = traits.has(Traits::TEMPORARY.and(Traits::CREATES));
    if temporary || traits.has(Traits::ADVISORY_LOCK) || traits.has(Traits::SET_CONFIG) {
        return Effect::Pins;
    }
    match tag {
        b"SET" if traits.has(Traits::SET_OTHER) || !traits.has(Traits::SET_FOLLOWED) => {
            Effect::Pins
        }
        b"LISTEN" | b"PREPARE" | b"LOAD" => Effect::Pins,
        b"DECLARE CURSOR" if traits.has(Traits::HOLD) => Effect::Pins,
        b"DISCARD ALL" => Effect::Discards,
        b"DEALLOCATE ALL" => Effect::Deallocates,
        _ => Effect::None,
    }
}

/// The name in `DEALLOCATE [PREPARE] name`, if the text is that and nothing else.
pub fn deallocated_name(text: &[u8]) -> Option<&[u8]> {
    let text = text.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text).trim_ascii();
    let mut words = text
        .split(u8::is_ascii_whitespace)
        .filter(|w| !w.is_empty());
    if !words.next()?.eq_ignore_ascii_case(b"deallocate") {
        return None;
    }
    let mut name = words.next()?;
    if name.eq_ignore_ascii_case(b"prepare") {
        name = words.next()?;
    }
    if words.next().is_some() || name.eq_ignore_ascii_case(b"all") {
        return None;
    }
    Some(
        name.strip_prefix(b"\"")
            .and_then(|n| n.strip_suffix(b"\""))
            .unwrap_or(name),
    )
}

/// True for `ROLLBACK` and `ABORT` alone: a transaction that is lost is what they ask for.
pub fn is_rollback(text: &[u8]) -> bool {
    let text = text.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text).trim_ascii();
    text.eq_ignore_ascii_case(b"rollback") || text.eq_ignore_ascii_case(b"abort")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(tag: &str, text: &str) -> Effect {
        effect(tag.as_bytes(), inspect(text.as_bytes()))
    }

    #[test]
    fn what_pins_and_what_does_not() {
        let pins = [
            ("SET", "SET search_path TO a"),
            ("SET", "set session statement_timeout = 5"),
            (
                "SET",
                "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            ),
            ("SET", "SET SESSION AUTHORIZATION bob"),
            ("SET", "SET LOCAL a.b = 1; SET work_mem = '1MB'"),
            ("SET", "/* unseen */"),
            (
                "SELECT 1",
                "select pg_catalog.set_config('search_path', '', false)",
            ),
            (
                "SELECT 1",
                "select set_config('a.b', '1', true), set_config('a.b', '1', false)",
            ),
            ("SELECT 1", "SELECT set_config($1, $2, $3)"),
            ("SELECT 1", "SELECT set_config('a.b', 'true', false)"),
            ("SELECT 1", "SELECT pg_advisory_lock(1)"),
            ("SELECT 1", "SELECT 1 INTO TEMP x"),
            ("CREATE TABLE", "create temporary table x ()"),
            ("CREATE TABLE", "create table pg_temp.x ()"),
            ("LISTEN", "LISTEN x"),
            ("PREPARE", "PREPARE x AS SELECT 1"),
            ("DECLARE CURSOR", "DECLARE c CURSOR WITH HOLD FOR SELECT 1"),
        ];
        for (tag, text) in pins {
            assert_eq!(judge(tag, text), Effect::Pins, "{text}");
        }
        let free = [
            ("SET", "SET LOCAL statement_timeout = 5"),
            ("SET", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"),
            ("SET", "SET TIME ZONE 'UTC'"),
            ("SET", "set datestyle to iso"),
            ("SET", "SET SESSION timezone = 'UTC'"),
            ("SET", "SET NAMES 'UTF8'"),
            ("UPDATE 1", "UPDATE t SET temp = 1"),
            ("SELECT 1", "SELECT set_config('a.b', $1, true)"),
            (
                "SELECT 1",
                "select set_config('a.b', '1', true), set_config('a.c', '1', true)",
            ),
            ("SELECT 1", "SELECT pg_advisory_xact_lock(1)"),
            ("DECLARE CURSOR", "DECLARE c CURSOR FOR SELECT 1"),
            ("INSERT 0 1", "INSERT INTO t VALUES (1)"),
            ("DISCARD PLANS", "DISCARD PLANS"),
        ];
        for (tag, text) in free {
            assert_eq!(judge(tag, text), Effect::None, "{text}");
        }
        assert_eq!(judge("DISCARD ALL", "DISCARD ALL"), Effect::Discards);
    }

    #[test]
    fn settings_that_can_be_repeated() {
        let set = |name: &str, text: &str| Some(Change::Set(name.into(), text.into()));
        let read = |text: &str| Change::read(text.as_bytes());
        assert_eq!(
            read(" SET search_path TO a, \"B\" ; "),
            set("search_path", "SET search_path TO a, \"B\"")
        );
        assert_eq!(
            read("set session Work_Mem='1MB'"),
            set("work_mem", "set session Work_Mem='1MB'")
        );
        assert_eq!(
            read("SET app.tenant = 'x'"),
            set("app.tenant", "SET app.tenant = 'x'")
        );
        assert_eq!(read("SET ROLE ann"), set("role", "SET ROLE ann"));
        assert_eq!(
            read("RESET work_mem"),
            Some(Change::Reset("work_mem".into()))
        );
        assert_eq!(read("RESET ALL;"), Some(Change::ResetAll));
        for not in [
            "SET LOCAL work_mem = '1MB'",
            "SET TIME ZONE 'UTC'",
            "SET timezone TO 'UTC'",
            "SET SESSION AUTHORIZATION ann",
            "SET TRANSACTION READ ONLY",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SET a.b = 1; SELECT 1",
            "SET a.b = 1 -- why",
            "SELECT 1",
            "RESET SESSION AUTHORIZATION",
            "SET",
            "",
        ] {
            assert_eq!(read(not), None, "{not}");
        }
    }

    #[test]
    fn differences_of_settings() {
        let mut made = Made::new();
        for text in ["SET a.x = 1", "SET a.y = 1", "SET a.x = 2", "RESET a.y"] {
            Change::read(text.as_bytes())
                .unwrap()
                .apply(&mut made)
                .unwrap();
        }
        assert_eq!(difference(&Made::new(), &made), "SET a.x = 2;");
        assert_eq!(difference(&made, &Made::new()), "RESET a.x;");
        let full = (0..=MADE_MAX)
            .map(|n| Change::Set(format!("a.x{n}").into(), "".into()).apply(&mut made));
        assert_eq!(full.last(), Some(None));
    }

    #[test]
    fn words_may_be_cut_anywhere() {
        let text = b"select pg_advisory_lock(1); create temp table x (); set a = 1";
        for cut in 0..text.len() {
            let mut inspector = Inspector::default();
            inspector.feed(&text[..cut]);
            inspector.feed(&text[cut..]);
            assert_eq!(inspector.finish(), inspect(text), "cut at {cut}");
        }
    }

    #[test]
    fn deallocate_and_rollback() {
        assert_eq!(deallocated_name(b"DEALLOCATE s1"), Some(&b"s1"[..]));
        assert_eq!(
            deallocated_name(b" deallocate prepare \"s1\" ; "),
            Some(&b"s1"[..])
        );
        assert_eq!(deallocated_name(b"DEALLOCATE ALL"), None);
        assert_eq!(deallocated_name(b"DEALLOCATE a; SELECT 1"), None);
        assert!(is_rollback(b" rollback ; "));
        assert!(!is_rollback(b"rollback to a"));
    }
}
