//! Versions of what decides how text is sorted and what geometry comes to: an index that was written with one
//! version may be read wrongly with another.
//!
//! GEOS and PROJ are told from the files that a session has mapped once PostGIS is loaded, not by PostGIS's own
//! functions: those are objects of a user's database, which whoever owns it may have replaced, and the agent asks
//! as superuser.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::control::{Control, one};
use crate::error::{PgError, Result};

/// What `/proc/self/maps` of a session has at most, in bytes; a usual one has less than 100 KiB.
const MAPS_BYTES_MAX: u64 = 4 << 20;

const SQL: &str = "SELECT json_strip_nulls(json_build_object(
  'postgresql', split_part(current_setting('server_version'), ' ', 1),
  'libc', (SELECT max(pg_collation_actual_version(oid)) FROM pg_collation WHERE collprovider = 'c'),
  'icu', (SELECT max(pg_collation_actual_version(oid)) FROM pg_collation
      WHERE collprovider = 'i' AND collname = 'und-x-icu'),
  'postgis', (SELECT max(default_version) FROM pg_available_extensions WHERE name = 'postgis')))";

impl Control {
    /// The versions here by name: `postgresql`; `libc` and `icu` as PostgreSQL names the versions of their
    /// collations; `postgis`, `geos` and `proj` where PostGIS is installed. Works on a primary and on a standby.
    pub async fn libraries(&self, limit: Duration) -> Result<BTreeMap<String, String>> {
        let what = "versions of libraries";
        let text = self.query_one(what, SQL, limit).await?;
        let mut found: BTreeMap<String, String> =
            serde_json::from_str(&text).map_err(|e| PgError::Unintelligible {
                what,
                detail: format!("{e} in {text}"),
            })?;
        let Some(postgis) = found.get("postgis") else {
            return Ok(found);
        };
        let major = postgis.split('.').next().unwrap_or_default();
        if major.bytes().all(|b| b.is_ascii_digit()) {
            let sql = format!(
                "LOAD '$libdir/postgis-{major}'; SELECT pg_read_file('/proc/self/maps', 0, {MAPS_BYTES_MAX})"
            );
            let maps = one(what, self.query_apart(what, None, &sql, limit).await?)?;
            found.extend(mapped(&maps));
        }
        Ok(found)
    }
}

/// The versions in the names of mapped libraries, such as `libgeos.so.3.11.1`.
fn mapped(maps: &str) -> BTreeMap<String, String> {
    let version = |library: &str| {
        maps.lines().find_map(|line| {
            let (_, name) = line.rsplit_once('/')?;
            // The file of an upgraded package is shown as deleted for as long as somebody has it mapped.
            let version = name.trim_end_matches(" (deleted)").strip_prefix(library)?;
            Some(version.to_owned())
        })
    };
    [("geos", "libgeos.so."), ("proj", "libproj.so.")]
        .into_iter()
        .filter_map(|(name, library)| Some((name.to_owned(), version(library)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_mapped_files() {
        let maps = "\
7f00-7f01 r--p 00000000 fe:00 1 /usr/lib/x86_64-linux-gnu/libgeos_c.so.1.17.1
7f01-7f02 r--p 00000000 fe:00 1 /usr/lib/x86_64-linux-gnu/libgeos.so.3.11.1
7f02-7f03 r-xp 00001000 fe:00 1 /usr/lib/x86_64-linux-gnu/libgeos.so.3.11.1
7f03-7f04 r--p 00000000 fe:00 2 /usr/lib/x86_64-linux-gnu/libproj.so.25.9.1.1 (deleted)
7ffe-7fff rw-p 00000000 00:00 0 [stack]
";
        let expected = [("geos", "3.11.1"), ("proj", "25.9.1.1")];
        let expected = expected.map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(mapped(maps), expected.into());
        assert_eq!(mapped(""), BTreeMap::new());
    }
}
