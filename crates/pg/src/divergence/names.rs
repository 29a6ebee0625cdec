//! What the relations in divergent WAL are called, asked of the server while it still has them.

use std::time::Duration;

use tokio::time::Instant;

use super::RelationNames;
use crate::control::Control;
use crate::error::Result;

/// At most this many databases are asked.
const DATABASES_MAX: usize = 32;
/// At most this many relations of each, the largest first.
const RELATIONS_MAX: usize = 20_000;

impl Control {
    /// Names of tables, indexes and the rest by `tablespace/database/filenode`, of all databases that answer
    /// within `limit` in all. A relation that was made after the fork is known to nobody else, and to this
    /// server only until it is rewound. System catalogs and TOAST tables are named after what they are of.
    pub async fn relation_names(&self, limit: Duration) -> Result<RelationNames> {
        let end = Instant::now() + limit;
        let mut names = RelationNames::new();
        let databases = "SELECT oid, datname FROM pg_database WHERE datallowconn ORDER BY oid";
        let rows = self
            .query_apart("databases", None, databases, limit)
            .await?;
        for row in rows.into_iter().take(DATABASES_MAX) {
            let mut cells = row.into_iter().flatten();
            let (Some(oid), Some(database)) = (cells.next(), cells.next()) else {
                continue;
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // A database that cannot be asked costs its own names only.
            let Ok(rows) = self
                .query_apart("relation names", Some(&database), &sql(), left)
                .await
            else {
                continue;
            };
            for row in rows {
                let mut cells = row.into_iter().flatten();
                if let (Some(place), Some(node), Some(name)) =
                    (cells.next(), cells.next(), cells.next())
                {
                    let key = format!("{place}/{oid}/{node}");
                    names.insert(key, format!("{database}.{name}"));
                }
            }
        }
        Ok(names)
    }
}

/// Tablespace 0 is the database's own (`pg_class.reltablespace`).
fn sql() -> String {
    format!(
        "SELECT CASE WHEN c.reltablespace = 0 THEN d.dattablespace ELSE c.reltablespace END, \
         pg_relation_filenode(c.oid), \
         CASE WHEN c.relkind = 't' THEN coalesce((SELECT 'TOAST of ' || o.oid::regclass::text FROM pg_class o \
         WHERE o.reltoastrelid = c.oid), c.oid::regclass::text) \
         ELSE n.nspname || '.' || c.relname END \
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_database d \
         WHERE d.datname = current_database() AND c.relkind IN ('r', 't', 'm', 'i', 'S') \
         AND pg_relation_filenode(c.oid) IS NOT NULL ORDER BY c.oid DESC LIMIT {RELATIONS_MAX}"
    )
}
