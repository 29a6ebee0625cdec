//! Scenario tables for the decision: a situation, and what it must come to, in one line each.

mod durability;
mod electing;
mod health;
mod joining;
mod leading;
mod operating;
mod random;
mod receivers;
mod slots;

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::observe::{
    FirstStart, Lease, LeaseSeen, Me, MemberStatus, Origin, PeerView, PromiseView, Server,
    TaskFailure, TaskView,
};
use crate::records::{
    At, ClusterRecord, MemberRecord, MemberRef, Request, RequestKind, RequestPhase, Seal,
    TimelineRecord, Timelines,
};
use crate::settings::Durability;
use crate::sync::StandbyView;
use crate::topology::MemberRole;

const SECOND: u64 = 1_000_000_000;
const START: BootTime = BootTime(1000 * SECOND);

fn id(name: &str) -> MemberId {
    MemberId::new(name).unwrap()
}

/// The incarnation of a member: its first letter's place in the alphabet.
fn life(name: &str) -> Incarnation {
    Incarnation(u64::from(name.as_bytes()[0] - b'a' + 1))
}

fn member(name: &str) -> MemberRef {
    MemberRef {
        member: id(name),
        incarnation: life(name),
    }
}

fn set(k: u32, names: &[&str]) -> SyncSet {
    SyncSet {
        members: names.iter().map(|n| (id(n), life(n))).collect(),
        k,
    }
}

fn record(name: &str) -> MemberRecord {
    MemberRecord {
        host: "h".into(),
        port: 1,
        api: "h:2".into(),
        priority: 100,
        incarnation: Some(life(name)),
        leaving: false,
    }
}

fn status(name: &str) -> MemberStatus {
    MemberStatus {
        incarnation: Some(life(name)),
        role: MemberRole::Standby,
        term: Term(1),
        timeline: Some(TimelineId(1)),
        lsn: Some(Lsn(1000)),
        replay_lsn: None,
        streaming: true,
        doing: String::new(),
        checkpoint_timeline: Some(TimelineId(1)),
        slots: BTreeMap::new(),
        process: Some(1),
        pending_restart: vec![],
        lost_slots: BTreeSet::new(),
        health: crate::health::Health::default(),
        libraries: BTreeMap::new(),
        noload: false,
        upstream: Some(id("a")),
        logical: crate::slots::Told::default(),
    }
}

fn running(in_recovery: bool) -> Server {
    Server {
        in_recovery,
        timeline: TimelineId(1),
        end: Lsn(1000),
        replay: None,
        end_is_exact: true,
        upstream: None,
        streaming: false,
        sync_configured: SyncSet::default(),
        sync_in_force: true,
        standbys: vec![],
        active_transactions: None,
        closed: false,
    }
}

fn standby_of(name: &str, flushed: u64) -> StandbyView {
    StandbyView {
        member: id(name),
        incarnation: life(name),
        streaming: true,
        flush_lsn: Lsn(flushed),
    }
}

/// A situation.
#[derive(Clone)]
struct Scene {
    o: Observation,
    memory: Memory,
}

impl Scene {
    /// A member with nothing, in a coordinator with nothing.
    fn blank(me: &str) -> Self {
        let o = Observation {
            now: START,
            wall_ms: 0,
            cluster_name: "test".into(),
            initial_settings: Settings::default(),
            me: Me {
                id: id(me),
                incarnation: None,
                floor: Term(0),
                host: "h".into(),
                port: 1,
                api: "h:2".into(),
                priority: 100,
                noload: false,
                upstream: None,
                first_start: FirstStart::Make,
            },
            view: Some(ClusterView::default()),
            lease: None,
            lease_seen: LeaseSeen::Unknown,
            promises: PromiseView::default(),
            peers: BTreeMap::new(),
            receivers: BTreeMap::new(),
            data: DataView::Empty,
            server: ServerView::Down,
            process: Some(1),
            config_stale: false,
            pending: vec![],
            host: crate::health::Host::default(),
            libraries: BTreeMap::new(),
            bootstrap_done: false,
            logical: crate::slots::Told::default(),
            clone_repository: false,
            sealed: None,
            task: None,
            failures: vec![],
        };
        Self {
            o,
            // Not just started.
            memory: Memory {
                first_revision: Some(0),
                ..Memory::default()
            },
        }
    }

    /// Three members; `a` leads term 1 and is open; V is b and c, k is 1.
    fn cluster(me: &str) -> Self {
        let mut s = Self::blank(me);
        s.o.me.incarnation = Some(life(me));
        s.o.data = DataView::Present {
            system_id: "77".into(),
            timeline: TimelineId(1),
            origin: Origin::Own,
        };
        for other in ["a", "b", "c"].into_iter().filter(|n| *n != me) {
            let peer = PeerView {
                heard_at: START,
                status: status(other),
            };
            s.o.peers.insert(id(other), peer);
        }
        let v = s.view();
        v.revision = 20;
        v.cluster = at(ClusterRecord {
            name: "test".into(),
            initializer: id("a"),
            system_id: Some("77".into()),
            bootstrapped: true,
            founding: FirstStart::Make,
        });
        v.settings = at(Settings::default());
        v.leadership = at(Leadership {
            term: Term(1),
            leader: Some(member("a")),
            previous: None,
            sync: set(1, &["b", "c"]),
            durability: Durability::Quorum,
            timeline: TimelineId(1),
            open: true,
            restarted: false,
            preferred: None,
            allow_data_loss: false,
            recovered: false,
            cause: "first start".into(),
        });
        v.timelines = at(Timelines(vec![timeline(1, None, 0)]));
        for name in ["a", "b", "c"] {
            v.members.insert(
                id(name),
                At {
                    revision: 5,
                    value: record(name),
                },
            );
        }
        s
    }

    /// `a`, leading and open.
    fn leader() -> Self {
        let mut s = Self::cluster("a").lease(1);
        s.o.server = ServerView::Running(Server {
            sync_configured: set(1, &["b", "c"]),
            standbys: vec![standby_of("b", 1000), standby_of("c", 1000)],
            ..running(false)
        });
        s
    }

    /// `b`, streaming from `a`.
    fn standby() -> Self {
        let mut s = Self::cluster("b");
        s.o.server = ServerView::Running(Server {
            upstream: Some((id("a"), Term(1))),
            streaming: true,
            ..running(true)
        });
        s.o.me.floor = Term(1);
        s.leads("a", 1)
    }

    /// A member says that it leads.
    fn leads(mut self, name: &str, term: u64) -> Self {
        let status = &mut self.o.peers.get_mut(&id(name)).unwrap().status;
        (status.role, status.term) = (MemberRole::Leader, Term(term));
        // In these scenes the leader of term t runs timeline t.
        status.checkpoint_timeline = u32::try_from(term).ok().map(TimelineId);
        self
    }

    /// The election of term 2 is open; `me` is a standby that follows nobody.
    fn election(me: &str) -> Self {
        let mut s = Self::cluster(me).leadership(|l| {
            l.term = Term(2);
            l.previous = l.leader.take();
            l.open = false;
        });
        s.o.server = ServerView::Running(running(true));
        s
    }

    fn with(mut self, change: impl FnOnce(&mut Observation)) -> Self {
        change(&mut self.o);
        self
    }

    fn view(&mut self) -> &mut ClusterView {
        self.o.view.get_or_insert_default()
    }

    fn leadership(mut self, change: impl FnOnce(&mut Leadership)) -> Self {
        let l = self.view().leadership.as_mut().unwrap();
        change(&mut l.value);
        l.revision += 1;
        self
    }

    fn server(mut self, change: impl FnOnce(&mut Server)) -> Self {
        if let ServerView::Running(s) = &mut self.o.server {
            change(s);
        }
        self
    }

    fn lease(mut self, term: u64) -> Self {
        let until = START.after(Duration::from_secs(3600));
        self.o.lease = Some(Lease {
            term: Term(term),
            until,
        });
        self
    }

    fn asked(mut self, to: Option<&str>, phase: RequestPhase) -> Self {
        self.view().request = at(Request {
            id: 1,
            kind: RequestKind::Switchover,
            term: Term(1),
            to: to.map(id),
            allow_data_loss: false,
            phase,
            by: "op".into(),
            why: None,
        });
        self
    }

    /// This member and others sealed at these positions; `me` knows its own.
    fn sealed(mut self, seals: &[(&str, u32, u64)]) -> Self {
        let election = self.view().leadership.as_ref().unwrap().value.term;
        for (name, timeline, lsn) in seals {
            let seal = Seal {
                term: election,
                incarnation: life(name),
                timeline: TimelineId(*timeline),
                lsn: Lsn(*lsn),
            };
            if id(name) == self.o.me.id {
                self.o.sealed = Some(seal.clone());
            }
            let value = At {
                revision: 30,
                value: seal,
            };
            self.view().seals.insert(id(name), value);
        }
        self
    }

    /// The same situation for so long: decides on the way, as the agent does.
    fn after(mut self, ms: u64) -> Self {
        let step = 50;
        for _ in 0..ms / step {
            self.memory = decide(&self.o, &self.memory).memory;
            self.o.now = self.o.now.after(Duration::from_millis(step));
            for peer in self.o.peers.values_mut() {
                peer.heard_at = self.o.now;
            }
        }
        self
    }
}

#[allow(clippy::unnecessary_wraps, reason = "the fields are options")]
fn at<T>(value: T) -> Option<At<T>> {
    Some(At {
        revision: 10,
        value,
    })
}

fn timeline(number: u32, parent: Option<u32>, fork: u64) -> TimelineRecord {
    TimelineRecord {
        timeline: TimelineId(number),
        term: Term(u64::from(number)),
        parent: parent.map(TimelineId),
        fork: Lsn(fork),
        member: id("a"),
    }
}

/// A decision in one line.
fn line(d: &Decision) -> String {
    let mut words = Vec::new();
    if d.kill.is_some() {
        words.push("kill".to_owned());
    }
    match d.lease {
        LeaseWish::Leave => {}
        LeaseWish::Hold(t) => words.push(format!("hold {t}")),
        LeaseWish::Release(t) => words.push(format!("release {t}")),
    }
    if let Some(open) = &d.open {
        words.push(format!("elect-after {}", open.after));
    }
    for ask in &d.ask_seals {
        words.push(format!("ask {} {}", ask.receiver, ask.term));
    }
    for c in &d.changes {
        let puts: Vec<String> = c.puts.iter().map(|p| p.key().path()).collect();
        words.push(format!("write {}", puts.join("+")));
        words.extend(c.deletes.iter().map(|k| format!("delete {}", k.path())));
    }
    match &d.task {
        None => {}
        Some(Task::Follow { from, term }) => words.push(format!("Follow {from} {term}")),
        Some(Task::Clone {
            from,
            term,
            repository,
        }) => words.push(if *repository {
            format!("Clone repository {term}")
        } else {
            format!("Clone {from} {term}")
        }),
        Some(Task::Rewind { from, term, .. }) => words.push(format!("Rewind {from} {term}")),
        Some(Task::Promote { timeline, sync, .. }) => {
            words.push(format!("Promote {timeline} ({sync})"));
        }
        Some(Task::SetSync(set) | Task::StartPrimary { sync: set }) => {
            words.push(format!("{:?} ({set})", d.task.as_ref().unwrap().kind()));
        }
        Some(task) => words.push(format!("{:?}", task.kind())),
    }
    let codes: Vec<&str> = d.reasons.iter().map(|r| r.code).collect();
    format!("{} : {}", words.join(", "), codes.join(" "))
}

/// One case: the decision, or for what is not said in one line a part of it.
#[track_caller]
#[allow(clippy::needless_pass_by_value, reason = "tables read better")]
fn check(what: &str, scene: Scene, expected: &str) {
    let got = line(&decide(&scene.o, &scene.memory));
    assert_eq!(got, expected, "{what}");
}
