//! Reads configuration files that PostgreSQL's other operators wrote (guc-file.l): settings and includes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::files;

/// Includes nest no deeper, as in PostgreSQL (guc-file.l, `CONF_FILE_MAX_DEPTH`).
const DEPTH_MAX: u8 = 10;

/// One setting and where it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Line {
    pub file: PathBuf,
    /// Counted from 0.
    pub number: usize,
    /// In lower case.
    pub key: String,
    pub value: String,
}

/// All settings of a file and of what it includes, in the order in which they count.
#[derive(Debug, Default)]
pub(crate) struct ConfFile {
    pub lines: Vec<Line>,
    /// Files that are included and cannot be read: PostgreSQL does not start without them.
    pub missing: Vec<PathBuf>,
}

impl ConfFile {
    /// Reads it; a missing file is an empty one.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut all = Self::default();
        if path.exists() {
            all.add(path, DEPTH_MAX)?;
        }
        Ok(all)
    }

    /// With another one that is read after it.
    pub(crate) fn and(mut self, path: &Path) -> Result<Self> {
        if path.exists() {
            self.add(path, DEPTH_MAX)?;
        }
        Ok(self)
    }

    fn add(&mut self, path: &Path, depth: u8) -> Result<()> {
        let Some(text) = files::read_text(path)?.filter(|_| depth > 0) else {
            self.missing.push(path.to_owned());
            return Ok(());
        };
        let place = path.parent().unwrap_or(Path::new("/"));
        for (number, line) in text.lines().enumerate() {
            let Some((key, value)) = parse_line(line) else {
                continue;
            };
            match key.as_str() {
                "include_if_exists" if !place.join(&value).exists() => {}
                "include" | "include_if_exists" => self.add(&place.join(&value), depth - 1)?,
                "include_dir" => self.add_dir(&place.join(&value), depth - 1)?,
                _ => self.lines.push(Line {
                    file: path.to_owned(),
                    number,
                    key,
                    value,
                }),
            }
        }
        Ok(())
    }

    fn add_dir(&mut self, dir: &Path, depth: u8) -> Result<()> {
        let Ok(entries) = std::fs::read_dir(dir) else {
            self.missing.push(dir.to_owned());
            return Ok(());
        };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        paths.retain(|p| {
            let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            name.strip_suffix(".conf").is_some_and(|n| !n.is_empty()) && !name.starts_with('.')
        });
        paths.sort();
        paths.iter().try_for_each(|p| self.add(p, depth))
    }

    /// What counts in the end: the last of several.
    pub(crate) fn values(&self) -> BTreeMap<&str, &str> {
        let pairs = self.lines.iter();
        pairs.map(|l| (l.key.as_str(), l.value.as_str())).collect()
    }
}

/// `key = 'value' # comment`, with the sign and the quotes left out as one likes.
fn parse_line(line: &str) -> Option<(String, String)> {
    let line = line.trim_start();
    let end = line
        .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$')))
        .unwrap_or(line.len());
    let (key, rest) = line.split_at_checked(end)?;
    if key.is_empty() {
        return None;
    }
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let value = match rest.strip_prefix('\'') {
        Some(quoted) => unquote(quoted),
        None => rest
            .split(|c: char| c == '#' || c.is_whitespace())
            .next()
            .unwrap_or_default()
            .to_owned(),
    };
    Some((key.to_ascii_lowercase(), value))
}

/// Up to the closing quote: `''` and `\'` are one, a backslash takes the next character as it is.
fn unquote(text: &str) -> String {
    let mut value = String::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\\' => value.extend(rest.next()),
            '\'' if rest.peek() == Some(&'\'') => value.extend(rest.next()),
            '\'' => break,
            c => value.push(c),
        }
    }
    value
}

/// The names of a list like `shared_preload_libraries`.
pub(crate) fn names(list: &str) -> Vec<String> {
    list.split(',')
        .map(|n| n.trim().trim_matches('"').trim())
        .filter(|n| !n.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_as_people_write_them() {
        let parse = |l| parse_line(l).map(|(k, v)| format!("{k}={v}"));
        for (line, expected) in [
            (
                "max_connections = 100\t# (change requires restart)",
                "max_connections=100",
            ),
            ("Port=5433", "port=5433"),
            ("  wal_level logical", "wal_level=logical"),
            (
                "a.b = 'it''s, # no comment' # one",
                "a.b=it's, # no comment",
            ),
            (
                "archive_command = 'test ! -f \\'x\\''",
                "archive_command=test ! -f 'x'",
            ),
            ("include 'conf.d/x'", "include=conf.d/x"),
        ] {
            assert_eq!(parse(line).as_deref(), Some(expected), "{line}");
        }
        assert_eq!(parse("# comment"), None);
        assert_eq!(parse(""), None);
        assert_eq!(
            names("'repmgr', \"pg_stat_statements\",x").join("|"),
            "'repmgr'|pg_stat_statements|x"
        );
    }

    #[test]
    fn includes_count_where_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        std::fs::create_dir(at("conf.d")).unwrap();
        std::fs::write(at("conf.d/1.conf"), "a = 2\nb = 2").unwrap();
        std::fs::write(at("conf.d/1.conf.bak"), "a = 9").unwrap();
        std::fs::write(
            at("main"),
            "a = 1\ninclude_dir 'conf.d'\ninclude 'gone'\ninclude_if_exists 'none'\nb = 3",
        )
        .unwrap();
        let conf = ConfFile::read(&at("main")).unwrap();
        assert_eq!(conf.values()["a"], "2");
        assert_eq!(conf.values()["b"], "3");
        assert_eq!(conf.missing, [at("gone")]);
        // One that includes itself ends.
        std::fs::write(at("loop"), "include 'loop'").unwrap();
        assert_eq!(ConfFile::read(&at("loop")).unwrap().missing.len(), 1);
    }
}
