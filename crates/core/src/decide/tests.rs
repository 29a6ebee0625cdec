//! Scenario tables for the decision: a situation, and what it must come to, in one line each.

use proptest::prelude::*;

use super::*;
use crate::observe::{
    Lease, LeaseSeen, Me, MemberStatus, PeerView, Server, TaskFailure, TaskView,
};
use crate::records::{
    At, ClusterRecord, MemberRecord, MemberRef, Request, RequestKind, RequestPhase, Seal, TimelineRecord,
};
use crate::settings::Durability;
use crate::sync::StandbyView;
use crate::topology::MemberRole;
use crate::types::Incarnation;

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
        slots: BTreeMap::new(),
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
            },
            view: Some(ClusterView::default()),
            lease: None,
            lease_seen: LeaseSeen::Unknown,
            peers: BTreeMap::new(),
            data: DataView::Empty,
            server: ServerView::Down,
            bootstrap_done: false,
            sealed: None,
            task: None,
            failures: vec![],
        };
        Self {
            o,
            memory: Memory::default(),
        }
    }

    /// Three members; `a` leads term 1 and is open; V is b and c, k is 1.
    fn cluster(me: &str) -> Self {
        let mut s = Self::blank(me);
        s.o.me.incarnation = Some(life(me));
        s.o.data = DataView::Present {
            system_id: "77".into(),
            timeline: TimelineId(1),
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
            preferred: None,
            allow_data_loss: false,
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
        s
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
        });
        self
    }

    /// This member and others sealed at these positions; `me` knows its own.
    fn sealed(mut self, seals: &[(&str, u32, u64)]) -> Self {
        for (name, timeline, lsn) in seals {
            let seal = Seal {
                term: Term(2),
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
    for c in &d.changes {
        let puts: Vec<String> = c.puts.iter().map(|p| p.key().path()).collect();
        words.push(format!("write {}", puts.join("+")));
        words.extend(c.deletes.iter().map(|k| format!("delete {}", k.path())));
    }
    match &d.task {
        None => {}
        Some(Task::Follow { leader, term }) => words.push(format!("Follow {leader} {term}")),
        Some(Task::Clone { from, term }) => words.push(format!("Clone {from} {term}")),
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
fn check(what: &str, scene: Scene, expected: &str) {
    let got = line(&decide(&scene.o, &scene.memory));
    assert_eq!(got, expected, "{what}");
}

#[test]
fn first_start() {
    check("nobody has begun", Scene::blank("a"), "write cluster+settings : claiming");
    let claimed = |me: &str| {
        let mut s = Scene::blank(me);
        s.view().cluster = at(ClusterRecord {
            name: "test".into(),
            initializer: id("a"),
            system_id: None,
            bootstrapped: false,
        });
        s
    };
    check("the winner of the race", claimed("a"), "write member/a, InitDb : initializing");
    check("a loser waits", claimed("b").with(|o| {
        o.peers.insert(id("a"), PeerView { heard_at: o.now, status: status("a") });
    }), "write member/b : waiting_for_initdb");
    check("the initializer is silent for a while", claimed("b").after(19_000), "write member/b : initializer_silent");
    check("and for long", claimed("b").after(21_000), "write cluster, write member/b : initializer_silent");
    let made = claimed("a").with(|o| {
        o.me.incarnation = Some(life("a"));
        o.data = DataView::Present { system_id: "77".into(), timeline: TimelineId(1) };
    });
    check("the database is made", made, "write cluster+leadership+timelines+history, write member/a : initialized");
    let stranger = Scene::blank("a").with(|o| {
        o.data = DataView::Present { system_id: "77".into(), timeline: TimelineId(1) };
    });
    check("a database, but no cluster", stranger, " : unknown_data");
}

#[test]
fn the_first_leader() {
    let first = || {
        let mut s = Scene::cluster("a").leadership(|l| {
            l.open = false;
            l.sync = SyncSet::default();
        });
        s.view().cluster.as_mut().unwrap().value.bootstrapped = false;
        s
    };
    check("takes the lease first", first(), "hold 1 : restarting waiting_for_lease");
    check("then starts", first().lease(1), "hold 1, StartPrimary (nobody (the leader is alone)) : restarting");
    let runs = |done| first().lease(1).with(|o| {
        o.server = ServerView::Running(running(false));
        o.bootstrap_done = done;
    });
    check("makes the roles", runs(false), "hold 1, Bootstrap : bootstrapping");
    check("and says so", runs(true), "hold 1, write cluster : ");
    let mut ready = runs(true);
    ready.view().cluster.as_mut().unwrap().value.bootstrapped = true;
    check("and opens", ready, "hold 1, write leadership+history : leading");
}

#[test]
fn an_empty_data_directory() {
    let empty = || {
        Scene::cluster("b").with(|o| o.data = DataView::Empty)
    };
    let c_streams = |o: &mut Observation| {
        o.peers.get_mut(&id("a")).unwrap().status.role = MemberRole::Leader;
    };
    check("is cloned from another standby", empty().with(c_streams), "Clone c 1 : cloning");
    let no_standby = empty().with(|o| o.peers.get_mut(&id("c")).unwrap().status.streaming = false);
    check("or from the leader", no_standby, "Clone a 1 : cloning");
    let failed = empty().with(|o| {
        o.failures = vec![TaskFailure {
            kind: TaskKind::Clone,
            error: "gone".into(),
            count: 1,
            retry_at: o.now,
        }];
    });
    check("after a failure from the leader", failed.clone(), "Clone a 1 : cloning");
    let waits = failed.with(|o| o.failures[0].retry_at = o.now.after(Duration::from_secs(1)));
    check("and not at once", waits, " : cloning back_off");
    let closed = empty().leadership(|l| l.open = false);
    check("not while nobody is open", closed, " : waiting_for_leader");
    let own = Scene::cluster("a").with(|o| o.data = DataView::Empty);
    check("never over the leadership", own, " : leader_without_data");
}

#[test]
fn what_does_not_belong_here_is_left_alone() {
    let foreign = Scene::cluster("b").with(|o| o.data = DataView::Foreign("photos".into()));
    check("somebody's files", foreign, " : foreign");
    let other = Scene::cluster("b").with(|o| {
        o.data = DataView::Present {
            system_id: "78".into(),
            timeline: TimelineId(1),
        };
    });
    check("another cluster's database", other, " : wrong_system_id");
}

#[test]
fn a_standby_follows() {
    check("streams", Scene::standby(), " : standby");
    check("down", Scene::standby().with(|o| o.server = ServerView::Down), "StartStandby : starting");
    check("follows nobody yet", Scene::standby().server(|s| s.upstream = None), "Follow a 1 : following");
    let reading = Scene::standby().server(|s| {
        s.upstream = None;
        s.end_is_exact = false;
    });
    check("not before the end of its WAL is known", reading, " : reading_wal");
    check("sealed for a later term", Scene::standby().with(|o| o.me.floor = Term(2)), " : sealed");
    let busy = Scene::standby().server(|s| s.upstream = None).with(|o| {
        o.task = Some(TaskView {
            task: Task::Checkpoint,
            since: o.now,
        });
    });
    check("one task at a time", busy, " : following busy");
    let new_term = Scene::standby().leadership(|l| {
        l.term = Term(2);
        l.leader = Some(member("c"));
    });
    check("a new leader", new_term, "Follow c 2 : following");
    let stuck = Scene::standby().server(|s| s.streaming = false);
    check("not streaming for a moment", stuck.clone().after(10_000), " : not_streaming");
    check("not streaming for long", stuck.after(21_000), "Rewind a 1 : not_streaming stuck");
}

/// `b` led timeline 1 to 1000; `c` leads term 2 on timeline 2, which left timeline 1 at `fork`.
fn former_leader(fork: u64) -> Scene {
    let mut s = Scene::cluster("b").leadership(|l| {
        l.term = Term(2);
        l.leader = Some(member("c"));
        l.timeline = TimelineId(2);
    });
    s.view().timelines = at(Timelines(vec![timeline(1, None, 0), timeline(2, Some(1), fork)]));
    s.o.server = ServerView::Running(running(true));
    s
}

#[test]
fn a_member_that_comes_back() {
    check("with a prefix", former_leader(1000), "Follow c 2 : following");
    check("with more than the cluster has", former_leader(999), "Rewind c 2 : diverged");
    let closed = former_leader(999).leadership(|l| l.open = false);
    check("not before the leader is open", closed, " : diverged waiting_for_leader");
    // An agent that was paused knows less than its WAL: found by the simulator, seed 1849.
    let ahead = Scene::standby().server(|s| {
        s.timeline = TimelineId(2);
        s.streaming = false;
    });
    check("with a timeline nobody here has heard of", ahead.clone(), " : not_streaming behind");
    check("and nobody ever does", ahead.after(21_000), "Rewind a 1 : not_streaming diverged");
}

#[test]
fn the_fence_rule() {
    let primary = |s: Scene| s.with(|o| o.server = ServerView::Running(running(false)));
    check("somebody else leads", primary(Scene::cluster("b")), "kill : fenced");
    check("an election is open", primary(Scene::election("a")), "kill : fenced election");
    let lapsed = Scene::leader().with(|o| o.lease = None);
    check("the lease ran out", lapsed, "kill, release 1, elect-after 1 : fenced");
    let other_term = Scene::leader().lease(7);
    check("the lease is of another term", other_term, "kill, release 1, elect-after 1 : fenced");
    let starting = Scene::leader().with(|o| {
        o.lease = None;
        o.server = ServerView::Silent { maybe_primary: true };
    });
    check("it may be a primary", starting, "kill, release 1, elect-after 1 : fenced");
    let blind = Scene::leader().with(|o| o.view = None);
    check("no coordinator, a lease", blind.clone(), "hold 1 : no_coordinator");
    check("no coordinator, no lease", blind.with(|o| o.lease = None), "kill : fenced no_coordinator");
}

#[test]
fn the_leader_is_gone() {
    let lapsed = || Scene::standby().with(|o| o.lease_seen = LeaseSeen::Lapsed);
    check("a moment after its election", lapsed(), " : standby");
    check("settled", lapsed().after(2100), "elect-after 1 : lease_over standby");
    let held = lapsed().with(|o| o.lease_seen = LeaseSeen::Held(Term(1)));
    check("a promise runs", held.after(2100), " : standby");
    let outside = lapsed().leadership(|l| l.sync = set(1, &["c"]));
    check("outside V", outside.after(2100), " : leader_was_alone standby");
    let reborn = lapsed().leadership(|l| {
        l.sync.members.insert(id("b"), Incarnation(99));
    });
    check("in V as another incarnation", reborn.after(2100), " : leader_was_alone standby");
    let alone = lapsed().leadership(|l| l.sync = SyncSet::default());
    check("the leader was alone", alone.after(2100), " : leader_was_alone standby");
}

#[test]
fn an_election() {
    check("seals", Scene::election("b"), "Seal : election");
    let down = Scene::election("b").with(|o| o.server = ServerView::Down);
    check("starts first", down, "StartStandby : election starting");
    let told = Scene::election("b").with(|o| {
        o.sealed = Some(Seal {
            term: Term(2),
            incarnation: life("b"),
            timeline: TimelineId(1),
            lsn: Lsn(1000),
        });
    });
    check("tells the coordinator", told, "write seal/b : election sealing");
    check("one seal is too few", Scene::election("b").sealed(&[("b", 1, 1000)]), " : election no_winner");
    let both = |c| Scene::election("b").sealed(&[("b", 1, 1000), ("c", 1, c)]);
    check("wins a tie by name", both(1000), "write leadership+timelines+history : election won");
    check("yields to more WAL", both(1001), " : election yields");
    let old = Scene::election("b").sealed(&[("a", 1, 900), ("b", 1, 1000)]);
    check("the old leader's seal is proof enough", old, "write leadership+timelines+history : election won");
    let back = Scene::election("a").sealed(&[("a", 1, 1000)]);
    check("the old leader alone", back, "write leadership+timelines+history : election won");
    let older = Scene::election("b").sealed(&[("b", 1, 1000), ("c", 1, 5)]).leadership(|l| l.term = Term(3));
    check("seals of another term", older, "Seal : election");
}

#[test]
fn the_winner_writes_v_with_the_old_leader_and_an_unused_timeline() {
    let scene = Scene::election("b").sealed(&[("b", 1, 1000), ("c", 1, 900)]);
    let d = decide(&scene.o, &scene.memory);
    let won = d.changes[0].puts.iter().find_map(|p| match p {
        Record::Leadership(l) => Some(l.clone()),
        _ => None,
    });
    let won = won.unwrap();
    assert_eq!(won.leader, Some(member("b")));
    assert_eq!(won.sync, set(1, &["a", "c"]));
    assert_eq!(won.timeline, TimelineId(2));
    assert!(!won.open);
}

#[test]
fn the_operator_may_accept_a_loss() {
    let mut scene = Scene::election("b").sealed(&[("b", 1, 1000)]);
    scene = scene.asked(Some("b"), RequestPhase::Asked);
    let request = scene.view().request.as_mut().unwrap();
    request.value.kind = RequestKind::Failover;
    check("a failover that may lose nothing", scene.clone(), " : election no_winner");
    scene.view().request.as_mut().unwrap().value.allow_data_loss = true;
    check("may lose", scene.clone(), "write leadership+history : election override no_winner");
    let scene = scene.leadership(|l| {
        l.allow_data_loss = true;
        l.preferred = Some(id("b"));
    });
    check("then wins", scene, "write leadership+timelines+history, delete request : election won");
}

/// `b` has won term 2 and is still a standby.
fn elected() -> Scene {
    let mut s = Scene::election("b").leadership(|l| {
        l.leader = Some(member("b"));
        l.previous = None;
        l.sync = set(1, &["a", "c"]);
        l.timeline = TimelineId(2);
    });
    s.view().timelines = at(Timelines(vec![timeline(1, None, 0), timeline(2, Some(1), 1000)]));
    s
}

#[test]
fn the_elected() {
    check("takes the lease", elected(), "hold 2 : waiting_for_lease");
    check("promotes", elected().lease(2), "hold 2, Promote 2 (1 of a, c) : promoting");
    check("not with an older lease", elected().lease(1), "hold 2 : waiting_for_lease");
    let down = elected().lease(2).with(|o| o.server = ServerView::Down);
    check("starts first", down, "hold 2, StartStandby : starting");
    // With an even number of voters half may refuse and half go on promising: found by the simulator.
    check("is refused the lease", elected().after(2100), "release 2, elect-after 2 : lease_refused");
    let primary = elected().lease(2).with(|o| {
        o.data = DataView::Present { system_id: "77".into(), timeline: TimelineId(2) };
        o.server = ServerView::Running(Server {
            timeline: TimelineId(2),
            sync_configured: set(1, &["a", "c"]),
            ..running(false)
        });
    });
    check("opens", primary.clone(), "hold 2, write leadership+history : leading");
    let unset = primary.clone().server(|s| s.sync_configured = set(1, &["b", "c"]));
    check("not before its sync set", unset, "hold 2, SetSync (1 of a, c) : leading opening");
    let wrong = primary.server(|s| s.timeline = TimelineId(3));
    check("on a number that was not reserved", wrong, "kill, hold 2 : wrong_timeline");
    let back = elected().lease(2).server(|s| s.timeline = TimelineId(2));
    check("came back from its own timeline", back, "release 2, elect-after 2 : demoted");
}

#[test]
fn postgresql_dies_on_the_leader() {
    let down = || Scene::leader().with(|o| o.server = ServerView::Down);
    check("others can take over", down(), "release 1, elect-after 1 : handing_over");
    let nobody = down().with(|o| o.peers.clear());
    check("nobody can", nobody, "hold 1, write leadership+history, StartPrimary (1 of b, c) : restarting");
    let one = down().with(|o| {
        o.peers.remove(&id("c"));
    });
    check("too few can", one, "hold 1, write leadership+history, StartPrimary (1 of b, c) : restarting");
    let reborn = down().with(|o| {
        o.peers.get_mut(&id("c")).unwrap().status.incarnation = Some(Incarnation(9));
    });
    check("a reborn one does not count", reborn, "hold 1, write leadership+history, StartPrimary (1 of b, c) : restarting");
    let lapsed = down().with(|o| o.lease = None);
    check("the lease ran out", lapsed, "release 1, elect-after 1, StartStandby : lapsed");
    let standby = Scene::leader().server(|s| s.in_recovery = true);
    check("it came back as a standby", standby, "release 1, elect-after 1 : demoted");
}

#[test]
fn a_leader_that_restarted_in_place_opens_when_its_wal_is_safe() {
    let closed = |flushed| {
        let mut s = Scene::leader().leadership(|l| l.open = false).server(|s| {
            s.standbys = vec![standby_of("b", flushed), standby_of("c", flushed)];
        });
        s.view().history = at(crate::records::History(vec![Event {
            at_ms: 0,
            term: Term(1),
            member: id("a"),
            kind: "closed".into(),
            text: String::new(),
        }]));
        s
    };
    check("not yet", closed(999), "hold 1 : leading recovering");
    check("safe", closed(1000), "hold 1, write leadership+history : leading");
}

#[test]
fn the_sync_set_follows_the_standbys() {
    check("as it is", Scene::leader(), "hold 1 : leading");
    let unproven = Scene::leader().server(|s| s.sync_in_force = false);
    // The agent was restarted, or the proof failed: found by the simulator, seed 30.
    check("not proven", unproven, "hold 1, SetSync (1 of b, c) : leading sync_pending");
    let gone = Scene::leader().after(100).server(|s| s.standbys.truncate(1));
    check("one is away for a moment", gone.clone(), "hold 1 : leading");
    check("for long: PostgreSQL first", gone.clone().after(2200), "hold 1, SetSync (1 of b) : leading sync_change");
    let set_here = gone.after(2200).server(|s| s.sync_configured = set(1, &["b"]));
    check("then the coordinator", set_here.clone(), "hold 1, write leadership+history : leading sync_change");
    let behind = set_here.server(|s| s.standbys[0].flush_lsn = Lsn(999));
    check("but not before the rest has flushed", behind, "hold 1 : leading sync_waiting");
    let alone = Scene::leader().after(100).server(|s| s.standbys.clear()).after(2200);
    check("all are away: coordinator first", alone, "hold 1, write leadership+history : leading sync_change");
    let joins = Scene::leader().leadership(|l| l.sync = set(1, &["b"])).server(|s| s.sync_configured = set(1, &["b"]));
    check("one joins: coordinator first", joins, "hold 1, write leadership+history : leading sync_change");
}

#[test]
fn a_switchover() {
    let asked = |to| Scene::leader().asked(to, RequestPhase::Asked);
    check("a checkpoint first", asked(Some("b")), "hold 1, Checkpoint : leading switching");
    check("then the proxies hold", asked(None).after(50), "hold 1, write request : leading switching");
    let hold = |active| Scene::leader().asked(Some("b"), RequestPhase::Hold).server(|s| s.active_transactions = active);
    check("transactions run", hold(Some(2)).after(100), "hold 1 : leading switching holding");
    check("none is left", hold(Some(0)).after(100), "hold 1, Stop : leading switching");
    check("they take too long", hold(Some(2)).after(3100), "hold 1, Stop : leading switching");
    let stopped = hold(Some(0)).with(|o| o.server = ServerView::Down);
    let d = decide(&stopped.o, &stopped.memory);
    let next = d.open.as_ref().map(|o| &o.change.puts[0]);
    assert!(matches!(next, Some(Record::Leadership(l)) if l.preferred == Some(id("b"))));
    check("stopped", stopped, "release 1, elect-after 1 : handing_over");
}

#[test]
fn a_request_that_cannot_be_met_is_refused_before_anything_is_touched() {
    let refused = "hold 1, write history, delete request : leading refused";
    let asked = |to| Scene::leader().asked(Some(to), RequestPhase::Asked);
    check("to itself", asked("a"), refused);
    check("to a stranger", asked("x"), refused);
    check("to one that is away", asked("b").after(50).server(|s| s.standbys.retain(|b| b.member != id("b"))), refused);
    let mut never = asked("b");
    never.view().members.get_mut(&id("b")).unwrap().value.priority = 0;
    check("to one that never leads", never, refused);
    check("too few standbys", asked("b").with(|o| o.peers.clear()), refused);
    let old = asked("b").leadership(|l| l.term = Term(2)).lease(2);
    check("of another term", old, "hold 2, write history, delete request : leading refused");
}

mod random;
