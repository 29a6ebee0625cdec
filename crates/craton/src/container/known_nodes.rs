//! What each member last said of its number and its name in the old stack, kept in the node's volume: a node that does not
//! run says neither, and people and scripts mean it by them. Where it is stands in the cluster's records.

use std::collections::BTreeMap;
use std::path::Path;

use craton_core::MemberId;
use serde::{Deserialize, Serialize};

/// In the volume.
const FILE: &str = "craton-nodes.json";
/// The form of the file.
const FORMAT: u32 = 1;

/// What a member said of itself.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Said {
    /// Its number.
    pub node_id: Option<u32>,
    /// Its name.
    pub node_name: Option<String>,
}

/// What the members of a cluster said.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KnownNodes {
    format: u32,
    cluster: String,
    members: BTreeMap<MemberId, Said>,
}

impl KnownNodes {
    fn nothing(cluster: &str) -> Self {
        Self {
            format: FORMAT,
            cluster: cluster.to_owned(),
            members: BTreeMap::new(),
        }
    }

    /// Reads it. What is not there, cannot be read, or is of another cluster is nothing: the members say it again.
    pub fn load(volume: &Path, cluster: &str) -> Self {
        std::fs::read_to_string(volume.join(FILE))
            .ok()
            .and_then(|text| serde_json::from_str::<Self>(&text).ok())
            .filter(|k| k.format == FORMAT && k.cluster == cluster)
            .unwrap_or_else(|| Self::nothing(cluster))
    }

    /// What a member said last.
    pub fn of(&self, member: &MemberId) -> Option<&Said> {
        self.members.get(member)
    }

    /// Takes over what members say now, and forgets those that are none any more. True if something is new.
    pub fn learn(&mut self, said: BTreeMap<MemberId, Option<Said>>) -> bool {
        let before = self.members.clone();
        // A node that knows of no members yet does not know who left.
        if !said.is_empty() {
            self.members.retain(|member, _| said.contains_key(member));
        }
        let news = said.into_iter().filter_map(|(m, s)| Some((m, s?)));
        self.members.extend(news);
        self.members != before
    }

    /// Writes it, durably.
    pub fn store(&self, volume: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string(self)?;
        craton_trust::files::write_secret(&volume.join(FILE), &text)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> MemberId {
        MemberId::new(name).unwrap()
    }

    fn said(number: u32) -> Said {
        Said {
            node_id: Some(number),
            node_name: Some(format!("node{number}")),
        }
    }

    #[test]
    fn who_does_not_answer_keeps_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = KnownNodes::load(dir.path(), "c");
        assert_eq!(known.of(&id("a")), None);
        let both = BTreeMap::from([(id("a"), Some(said(1))), (id("b"), Some(said(2)))]);
        assert!(known.learn(both));
        known.store(dir.path()).unwrap();
        let mut known = KnownNodes::load(dir.path(), "c");
        assert!(!known.learn(BTreeMap::from([(id("a"), None), (id("b"), Some(said(2)))])));
        assert_eq!(known.of(&id("a")), Some(&said(1)));
        // A node that begins anew knows of no members.
        assert!(!known.learn(BTreeMap::new()));
        // It has another number now; the other was taken out.
        assert!(known.learn(BTreeMap::from([(id("a"), Some(said(7)))])));
        assert_eq!(known.of(&id("a")), Some(&said(7)));
        assert_eq!(known.of(&id("b")), None);
    }

    #[test]
    fn what_is_damaged_or_of_another_cluster_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = KnownNodes::load(dir.path(), "c");
        known.learn(BTreeMap::from([(id("a"), Some(said(1)))]));
        known.store(dir.path()).unwrap();
        assert_eq!(KnownNodes::load(dir.path(), "d").of(&id("a")), None);
        for text in ["", "{", r#"{"format":2,"cluster":"c","members":{}}"#] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert_eq!(KnownNodes::load(dir.path(), "c").of(&id("a")), None);
        }
    }
}
