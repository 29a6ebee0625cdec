//! Where transactions go: what a topology means for a proxy.
//!
//! A topology changes with every position that is reported; routes change only when something else becomes
//! of a client's transaction. A target that may no longer be used is revoked before the new routes are seen, and
//! nothing is sent to a revoked target.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use craton_core::topology::{MemberRole, Topology, TopologyMember};
use craton_core::{MemberId, Term};
use tokio::sync::watch;

/// What a client's port promises.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// The primary.
    Write,
    /// A standby; the primary while there is none.
    Read,
}

/// A server in one of its roles. A primary of another term is another target, even on the same server.
#[derive(Debug)]
pub struct Target {
    /// Tells targets apart within this process.
    pub id: u64,
    /// The member.
    pub member: MemberId,
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// As a primary: the term. As a standby: none.
    term: Option<Term>,
    revoked: AtomicBool,
    /// Transactions that run there now, of all workers.
    pub busy: AtomicU64,
    /// How many bytes of WAL it is behind the primary, as last heard of both.
    behind: AtomicU64,
}

impl Target {
    /// True when nothing may be sent there any more.
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// True when it takes writes.
    pub fn is_primary(&self) -> bool {
        self.term.is_some()
    }

    /// How many bytes of WAL a standby has not replayed yet, as last heard; 0 for a primary.
    pub fn behind_bytes(&self) -> u64 {
        self.behind.load(Ordering::Relaxed)
    }

    fn is(&self, member: &TopologyMember, term: Option<Term>) -> bool {
        self.member == member.id
            && self.port == member.port
            && self.host == member.host
            && self.term == term
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}:{})", self.member, self.host, self.port)
    }
}

/// Where transactions go now.
#[derive(Debug, Default)]
pub struct Routes {
    /// The primary, if there is one.
    pub primary: Option<Arc<Target>>,
    /// New transactions for the primary wait.
    pub hold: bool,
    /// Standbys that new read transactions may go to.
    pub standbys: Vec<Arc<Target>>,
    /// Standbys on which running ones may go on.
    lagging: Vec<Arc<Target>>,
    /// False until the first topology arrived.
    pub known: bool,
}

impl Routes {
    /// The target of a new transaction; `None`: wait. One that just failed is avoided if there is another.
    pub fn choose(&self, endpoint: Endpoint, avoid: Option<u64>) -> Option<&Arc<Target>> {
        let primary = self.primary.as_ref().filter(|_| !self.hold);
        let least_busy = |t: &&Arc<Target>| (Some(t.id) == avoid, t.busy.load(Ordering::Relaxed));
        match endpoint {
            Endpoint::Write => primary,
            Endpoint::Read => {
                let standby = self.standbys.iter().min_by_key(least_busy);
                standby
                    .filter(|t| Some(t.id) != avoid || primary.is_none())
                    .or(primary)
            }
        }
    }

    /// All targets.
    pub fn targets(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.primary
            .iter()
            .chain(&self.standbys)
            .chain(&self.lagging)
    }

    /// The routes that follow from a topology; `None` when they are the same. Targets that stay keep their identity.
    fn next(&self, topology: &Topology, ids: &mut u64) -> Option<Self> {
        let mut target = |member: &TopologyMember, term: Option<Term>| {
            self.targets().find(|t| t.is(member, term)).map_or_else(
                || {
                    *ids += 1;
                    Arc::new(Target {
                        id: *ids,
                        member: member.id.clone(),
                        host: member.host.clone(),
                        port: member.port,
                        term,
                        revoked: AtomicBool::new(false),
                        busy: AtomicU64::new(0),
                        behind: AtomicU64::new(0),
                    })
                },
                Arc::clone,
            )
        };
        let primary = topology.leader().map(|m| target(m, Some(topology.term)));
        let (mut standbys, mut lagging) = (Vec::new(), Vec::new());
        for member in &topology.members {
            let is_writable = topology.writable.as_ref() == Some(&member.id);
            match member.role {
                MemberRole::Standby if member.streaming && !member.noload && !is_writable => {
                    standbys.push(target(member, None));
                }
                // A standby that is being promoted, or has lost its source, goes on with what it runs.
                MemberRole::Standby | MemberRole::Transition | MemberRole::Leader => {
                    if let Some(known) = self.targets().find(|t| t.is(member, None)) {
                        lagging.push(Arc::clone(known));
                    }
                }
                MemberRole::Down => {}
            }
        }
        let next = Self {
            primary,
            hold: topology.hold,
            standbys,
            lagging,
            known: true,
        };
        (!self.is_same(&next)).then_some(next)
    }

    /// Notes how far behind the standbys are. While there is no primary, or one does not say, the last number stays.
    fn note_positions(&self, topology: &Topology) {
        let Some(end) = topology.leader().and_then(|l| l.lsn) else {
            return;
        };
        for target in self.targets().filter(|t| !t.is_primary()) {
            let member = topology.members.iter().find(|m| target.is(m, None));
            if let Some(own) = member.and_then(|m| m.replay_lsn.or(m.lsn)) {
                target.behind.store(end.bytes_since(own), Ordering::Relaxed);
            }
        }
    }

    /// Follows one topology, as [`follow`] does.
    #[cfg(test)]
    pub fn of_topology(topology: &Topology) -> Self {
        let routes = Self::default().next(topology, &mut 0).unwrap();
        routes.note_positions(topology);
        routes
    }

    /// A primary and standbys named as their hosts are.
    #[cfg(test)]
    pub fn for_test(primary: &str, standbys: &[&str]) -> Self {
        let target = |host: &str, term: Option<Term>| {
            Arc::new(Target {
                id: 0,
                member: MemberId::new(host).unwrap(),
                host: host.to_owned(),
                port: 1,
                term,
                revoked: AtomicBool::new(false),
                busy: AtomicU64::new(0),
                behind: AtomicU64::new(0),
            })
        };
        Self {
            primary: Some(target(primary, Some(Term(1)))),
            standbys: standbys.iter().map(|s| target(s, None)).collect(),
            known: true,
            ..Self::default()
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        let same = |a: &[Arc<Target>], b: &[Arc<Target>]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.id == b.id)
        };
        self.known == other.known
            && self.hold == other.hold
            && self.primary.as_ref().map(|t| t.id) == other.primary.as_ref().map(|t| t.id)
            && same(&self.standbys, &other.standbys)
            && same(&self.lagging, &other.lagging)
    }
}

/// Follows topologies until their source ends, and publishes the routes that follow from them.
pub async fn follow(
    mut topologies: watch::Receiver<Option<Arc<Topology>>>,
    publish: watch::Sender<Arc<Routes>>,
) {
    let mut ids = 0;
    let mut newest: Option<(Term, u64)> = None;
    loop {
        let topology = topologies.borrow_and_update().clone();
        if let Some(topology) =
            topology.filter(|t| newest.is_none_or(|n| n <= (t.term, t.revision)))
        {
            newest = Some((topology.term, topology.revision));
            let current = Arc::clone(&publish.borrow());
            if let Some(next) = current.next(&topology, &mut ids) {
                announce(&current, &next, &topology);
                publish.send_replace(Arc::new(next));
            }
            publish.borrow().note_positions(&topology);
        }
        if topologies.changed().await.is_err() {
            return;
        }
    }
}

/// Revokes what is gone, before anybody can see the new routes.
fn announce(current: &Routes, next: &Routes, topology: &Topology) {
    for gone in current
        .targets()
        .filter(|t| !next.targets().any(|n| n.id == t.id))
    {
        gone.revoked.store(true, Ordering::Release);
        tracing::info!(target = %gone, primary = gone.is_primary(), "no longer used");
    }
    if current.primary.as_ref().map(|t| t.id) != next.primary.as_ref().map(|t| t.id) {
        if let Some(primary) = &next.primary {
            tracing::info!(term = %topology.term, target = %primary, "writes go to this member");
        } else {
            tracing::warn!(term = %topology.term, "there is no primary; writes wait");
        }
    }
    if current.hold != next.hold {
        tracing::info!(
            hold = next.hold,
            "new transactions are held for a planned switchover"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(term: u64, writable: Option<&str>, roles: &[(&str, MemberRole, bool)]) -> Topology {
        Topology {
            cluster: "c".into(),
            system_id: None,
            term: Term(term),
            revision: 1,
            writable: writable.map(|w| MemberId::new(w).unwrap()),
            hold: false,
            members: roles
                .iter()
                .map(|(id, role, streaming)| TopologyMember {
                    id: MemberId::new(*id).unwrap(),
                    host: "h".into(),
                    port: 1,
                    api: String::new(),
                    role: *role,
                    timeline: None,
                    lsn: None,
                    replay_lsn: None,
                    streaming: *streaming,
                    noload: false,
                })
                .collect(),
        }
    }

    #[test]
    fn a_deposed_primary_is_another_target() {
        use MemberRole::{Leader, Standby};
        let mut ids = 0;
        let first = Routes::default()
            .next(
                &topology(1, Some("a"), &[("a", Leader, false), ("b", Standby, true)]),
                &mut ids,
            )
            .unwrap();
        assert_eq!(
            first.choose(Endpoint::Write, None).unwrap().member.as_str(),
            "a"
        );
        assert_eq!(
            first.choose(Endpoint::Read, None).unwrap().member.as_str(),
            "b"
        );
        let mut same = topology(1, Some("a"), &[("a", Leader, false), ("b", Standby, true)]);
        same.revision = 9;
        assert!(
            first.next(&same, &mut ids).is_none(),
            "positions change no routes"
        );

        let none = first
            .next(
                &topology(2, None, &[("a", Leader, false), ("b", Standby, false)]),
                &mut ids,
            )
            .unwrap();
        announce(&first, &none, &same);
        assert!(first.primary.as_ref().unwrap().is_revoked());
        assert!(!first.standbys[0].is_revoked(), "reads on b go on");
        assert!(
            none.choose(Endpoint::Write, None).is_none()
                && none.choose(Endpoint::Read, None).is_none()
        );

        let again = none
            .next(&topology(3, Some("a"), &[("a", Leader, false)]), &mut ids)
            .unwrap();
        assert_ne!(again.primary.unwrap().id, first.primary.unwrap().id);
    }

    #[test]
    fn reads_keep_away_from_a_member_with_noload() {
        use MemberRole::{Leader, Standby};
        let all = [
            ("a", Leader, false),
            ("b", Standby, true),
            ("c", Standby, true),
        ];
        let mut ids = 0;
        let free = topology(1, Some("a"), &all);
        let before = Routes::default().next(&free, &mut ids).unwrap();
        assert_eq!(before.standbys.len(), 2);
        let mut spared = free.clone();
        spared.members[1].noload = true;
        let after = before.next(&spared, &mut ids).unwrap();
        announce(&before, &after, &spared);
        let names: Vec<&str> = after.standbys.iter().map(|t| t.member.as_str()).collect();
        assert_eq!(names, ["c"]);
        let b = before.standbys.iter().find(|t| t.member.as_str() == "b");
        assert!(!b.unwrap().is_revoked(), "what runs there ends there");
        spared.members[2].noload = true;
        let none = after.next(&spared, &mut ids).unwrap();
        let read = none.choose(Endpoint::Read, None).unwrap();
        assert_eq!(read.member.as_str(), "a", "rather the primary than nobody");
    }

    #[test]
    fn hold_stops_new_writes_only() {
        use MemberRole::{Leader, Standby};
        let mut held = topology(1, Some("a"), &[("a", Leader, false), ("b", Standby, true)]);
        held.hold = true;
        let routes = Routes::default().next(&held, &mut 0).unwrap();
        assert!(routes.choose(Endpoint::Write, None).is_none());
        assert!(routes.choose(Endpoint::Read, None).is_some());
        assert!(!routes.primary.unwrap().is_revoked());
    }
}
