//! What logical replication slots need of the configuration so that they survive a failover.
//!
//! From PostgreSQL 17 on the server copies them by itself: standbys with `sync_replication_slots`, which reach the
//! leader's database `postgres` as the replication role; and on the leader `synchronized_standby_slots`, so that no
//! consumer sees what a failover could still lose.

use std::collections::BTreeMap;

use craton_core::sync::parse_application_name;

use super::{ManagedConfig, Place};
use crate::hba::HbaRule;
use crate::roles::REPLICATION_ROLE;
use crate::sync::SyncNames;

/// The first version that copies slots by itself.
const OWN_SYNC_FROM: u32 = 17;
/// The consumers of the leader's slots wait for the standbys that use these.
pub(super) const WAITS_FOR: &str = "synchronized_standby_slots";
/// Standbys ask for the slots in this database.
const DATABASE: &str = "postgres";

impl ManagedConfig {
    /// WAL holds what logical decoding needs.
    pub fn decodes(&self) -> bool {
        let mut all = self.settings.iter();
        all.any(|(k, v)| {
            k.eq_ignore_ascii_case("wal_level") && v.trim().eq_ignore_ascii_case("logical")
        })
    }
}

fn copies_slots(place: &Place<'_>, managed: &ManagedConfig) -> bool {
    place.version >= OWN_SYNC_FROM && managed.decodes()
}

/// What goes below the operator's settings.
pub(super) fn defaults(
    place: &Place<'_>,
    managed: &ManagedConfig,
    all: &mut BTreeMap<String, String>,
) {
    if managed.decodes() {
        // The leader's vacuum must leave the rows of the catalog that a standby's copies need.
        all.insert("hot_standby_feedback".to_owned(), "on".to_owned());
    }
    if copies_slots(place, managed) {
        all.insert("sync_replication_slots".to_owned(), "on".to_owned());
    }
}

/// The database in a standby's connection string.
pub(super) fn database(place: &Place<'_>, managed: &ManagedConfig) -> Option<&'static str> {
    copies_slots(place, managed).then_some(DATABASE)
}

/// Whom consumers wait for: those whom commits wait for. While nobody is listed for a moment, as before.
pub(super) fn waits_for(
    place: &Place<'_>,
    managed: &ManagedConfig,
    before: &BTreeMap<String, String>,
) -> Option<(String, String)> {
    if !copies_slots(place, managed) {
        return None;
    }
    let value = match &managed.sync {
        SyncNames::Off => String::new(),
        SyncNames::Nobody => before.get(WAITS_FOR).cloned().unwrap_or_default(),
        SyncNames::Any { names, .. } => {
            let members = names.iter().filter_map(|n| parse_application_name(n));
            // A backup receiver's slot has another name, and it may not be there.
            let slots = members
                .map(|(m, _)| m.slot_name())
                .filter(|slot| managed.member_slots.contains(slot));
            slots.collect::<Vec<_>>().join(",")
        }
    };
    Some((WAITS_FOR.to_owned(), value))
}

/// Who may log in, the standbys for that included.
pub(super) fn rules(place: &Place<'_>, managed: &ManagedConfig) -> Vec<HbaRule> {
    if !copies_slots(place, managed) {
        return managed.hba.clone();
    }
    let streams = |r: &&HbaRule| r.database == "replication" && r.user == REPLICATION_ROLE;
    let asks = |r: &HbaRule| HbaRule {
        database: DATABASE.to_owned(),
        ..r.clone()
    };
    let asking = managed.hba.iter().filter(streams).map(asks);
    asking.chain(managed.hba.iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::tests::upstream;
    use crate::files;

    fn written(version: u32, managed: &ManagedConfig, dir: &Path) -> BTreeMap<String, String> {
        let place = Place {
            conf_dir: dir,
            data_dir: dir,
            socket_dir: dir,
            listen_addresses: "127.0.0.1",
            port: 6441,
            cluster_name: "c",
            superuser: "postgres",
            os_user: "postgres",
            version,
        };
        crate::config::write(&place, managed).unwrap();
        let text = files::read_text(&dir.join("postgresql.conf"));
        crate::config::parse_settings(&text.unwrap().unwrap())
    }

    fn logical(sync: SyncNames) -> ManagedConfig {
        ManagedConfig {
            settings: BTreeMap::from([("wal_level".to_owned(), "logical".to_owned())]),
            hba: HbaRule::standard(&["10.0.0.0/8"], true),
            member_slots: ["craton_a", "craton_b", "craton_c"].map(Into::into).into(),
            upstream: Some(upstream()),
            sync,
            ..ManagedConfig::default()
        }
    }

    #[test]
    fn vacuum_waits_for_standbys_once_wal_is_logical() {
        let dir = tempfile::tempdir().unwrap();
        let mut managed = logical(SyncNames::Off);
        assert_eq!(
            written(15, &managed, dir.path())["hot_standby_feedback"],
            "on"
        );
        assert!(!written(15, &managed, dir.path()).contains_key(WAITS_FOR));
        managed
            .settings
            .insert("hot_standby_feedback".into(), "off".into());
        assert_eq!(
            written(15, &managed, dir.path())["hot_standby_feedback"],
            "off"
        );
        managed.settings.clear();
        assert!(!written(17, &managed, dir.path()).contains_key("hot_standby_feedback"));
    }

    #[test]
    fn from_17_on_the_server_copies_slots() {
        let dir = tempfile::tempdir().unwrap();
        let any = |names: &[&str]| SyncNames::Any {
            k: 1,
            names: names.iter().map(|n| (*n).to_owned()).collect(),
        };
        let v = logical(any(&[
            "b@0000000000000001",
            "c@0000000000000002",
            "backup@0000000000000003",
        ]));
        let all = written(17, &v, dir.path());
        assert_eq!(all["sync_replication_slots"], "on");
        assert_eq!(all[WAITS_FOR], "craton_b,craton_c");
        assert!(all["primary_conninfo"].contains("dbname='postgres'"));
        let hba = std::fs::read_to_string(dir.path().join("pg_hba.conf")).unwrap();
        let line =
            "hostssl postgres craton_replication 10.0.0.0/8 scram-sha-256 clientcert=verify-ca";
        let reject = hba.find(" reject").unwrap();
        assert!(hba.find(line).is_some_and(|at| at < reject), "{hba}");
        // While a change is being proven nobody is listed; consumers go on waiting for those before.
        let between = written(17, &logical(SyncNames::Nobody), dir.path());
        assert_eq!(between[WAITS_FOR], "craton_b,craton_c");
        assert_eq!(
            written(17, &logical(SyncNames::Off), dir.path())[WAITS_FOR],
            ""
        );
        let old = written(16, &v, dir.path());
        assert!(!old.contains_key("sync_replication_slots"));
        assert!(!old["primary_conninfo"].contains("dbname"));
    }
}
