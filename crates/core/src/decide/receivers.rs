//! Backup receivers in V: they seal when an agent asks them to, and never lead (failover protocol, 3).

use super::Mind;
use crate::observe::ReceiverView;
use crate::records::{Change, ClusterView, Key, Leadership, ReceiverRecord, Record};
use crate::types::{MemberId, Term};

/// A receiver to be asked for its seal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AskSeal {
    /// Whom.
    pub receiver: MemberId,
    /// As it is on record.
    pub record: ReceiverRecord,
    /// The term of the open election.
    pub term: Term,
}

/// Those whose present life V lists.
pub(super) fn in_v<'a>(
    view: &'a ClusterView,
    l: &'a Leadership,
) -> impl Iterator<Item = (&'a MemberId, &'a ReceiverRecord)> {
    view.receivers
        .iter()
        .map(|(m, r)| (m, &r.value))
        .filter(|(m, r)| l.sync.holds(m, r.incarnation))
}

impl Mind<'_> {
    /// A receiver in its life on record, if it was heard within a ttl.
    pub(super) fn receiver(
        &self,
        name: &MemberId,
        record: &ReceiverRecord,
    ) -> Option<&ReceiverView> {
        let seen = self.o.receivers.get(name)?;
        let fresh = self.o.now.since(seen.heard_at) < self.settings.ttl();
        (fresh && seen.incarnation == record.incarnation).then_some(seen)
    }
}

/// In an election: those of V are asked to seal, and what they answer is written down, by whoever is first.
pub(super) fn seal_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    for (name, record) in in_v(view, l) {
        if view.seals.get(name).is_some_and(|s| s.value.term == l.term) {
            continue;
        }
        let sealed = mind.o.receivers.get(name).and_then(|r| r.seal.clone());
        let sealed = sealed.filter(|s| s.term == l.term && s.incarnation == record.incarnation);
        let Some(seal) = sealed else {
            mind.out.ask_seals.push(AskSeal {
                receiver: name.clone(),
                record: record.clone(),
                term: l.term,
            });
            continue;
        };
        let key = Key::Seal(name.clone());
        mind.submit(Change {
            // Only while this very election is open.
            expect: vec![
                (Key::Leadership, view.revision_of(&Key::Leadership)),
                (key.clone(), view.revision_of(&key)),
            ],
            puts: vec![Record::Seal(name.clone(), seal)],
            deletes: vec![],
        });
    }
}

/// No member of V may lead, and what is acknowledged can be had from V all the same: somebody else may stand, and
/// get the WAL first.
pub(super) fn only_receivers(view: &ClusterView, l: &Leadership) -> bool {
    let (all, receivers) = (l.sync.members.len(), in_v(view, l).count());
    l.durability.keeps_commits() && l.sync.k > 0 && receivers > 0 && receivers == all
}
