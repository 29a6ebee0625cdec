//! Whatever is observed, some things are never decided.

use super::*;
use crate::records::{Order, OrderKind, Pause, RestartPlan};

/// Chance from a number, so that a failing case shrinks to a seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn yes(&mut self) -> bool {
        self.roll(2) == 0
    }

    fn name(&mut self) -> &'static str {
        ["a", "b", "c", "d"][usize::try_from(self.roll(4)).unwrap()]
    }

    fn member(&mut self) -> MemberRef {
        let name = self.name();
        let incarnation = if self.roll(4) == 0 {
            Incarnation(9)
        } else {
            life(name)
        };
        MemberRef {
            member: id(name),
            incarnation,
        }
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        if self.yes() { Some(make(self)) } else { None }
    }

    fn set(&mut self) -> SyncSet {
        let n = self.roll(4);
        SyncSet {
            members: (0..n)
                .map(|_| self.member())
                .map(|r| (r.member, r.incarnation))
                .collect(),
            k: u32::try_from(self.roll(4)).unwrap(),
        }
    }

    fn server(&mut self) -> ServerView {
        match self.roll(4) {
            0 => ServerView::Down,
            1 => ServerView::Silent {
                maybe_primary: self.yes(),
            },
            _ => ServerView::Running(Server {
                in_recovery: self.yes(),
                timeline: TimelineId(u32::try_from(self.roll(5)).unwrap()),
                end: Lsn(self.roll(4) * 1000),
                replay: None,
                end_is_exact: self.yes(),
                upstream: self.maybe(|d| (id(d.name()), Term(d.roll(4)))),
                streaming: self.yes(),
                sync_configured: self.set(),
                sync_in_force: self.yes(),
                standbys: (0..self.roll(4))
                    .map(|_| standby_of(self.name(), self.roll(4) * 1000))
                    .collect(),
                active_transactions: self.maybe(|d| u32::try_from(d.roll(3)).unwrap()),
                closed: self.yes(),
            }),
        }
    }

    fn leadership(&mut self) -> Leadership {
        Leadership {
            term: Term(self.roll(4)),
            leader: self.maybe(Self::member),
            previous: self.maybe(Self::member),
            sync: self.set(),
            durability: match self.roll(4) {
                0 => Durability::Async,
                1 => Durability::Strict,
                _ => Durability::Quorum,
            },
            timeline: TimelineId(u32::try_from(self.roll(5)).unwrap()),
            open: self.yes(),
            restarted: self.yes(),
            preferred: self.maybe(|d| id(d.name())),
            allow_data_loss: self.roll(5) == 0,
            recovered: self.roll(5) == 0,
            cause: String::new(),
        }
    }

    fn view(&mut self, scene: &Scene) -> ClusterView {
        let mut view = scene.o.view.clone().unwrap();
        view.leadership = self.maybe(Self::leadership).and_then(at);
        if self.roll(6) == 0 {
            view.cluster = None;
        }
        view.timelines = self
            .maybe(|d| {
                let n = u32::try_from(d.roll(4)).unwrap();
                Timelines(
                    (1..=n)
                        .map(|t| timeline(t, (t > 1).then(|| t - 1), d.roll(4) * 1000))
                        .collect(),
                )
            })
            .and_then(at);
        for _ in 0..self.roll(4) {
            let r = self.member();
            let value = Seal {
                term: Term(self.roll(4)),
                incarnation: r.incarnation,
                timeline: TimelineId(u32::try_from(self.roll(4)).unwrap()),
                lsn: Lsn(self.roll(4) * 1000),
            };
            view.seals.insert(r.member, At { revision: 3, value });
        }
        if self.roll(3) == 0 {
            let kind = if self.yes() {
                OrderKind::Reinit
            } else {
                OrderKind::Restart
            };
            let value = Order {
                id: self.roll(3),
                kind,
                process: self.maybe(|d| d.roll(3)),
                incarnation: self.maybe(|_| life("b")),
                by: "op".into(),
            };
            view.orders.insert(id("b"), At { revision: 4, value });
        }
        if self.roll(4) == 0 {
            view.restart = at(RestartPlan {
                id: self.roll(3),
                members: ["a", "b"]
                    .map(|m| (id(m), self.maybe(|d| d.roll(3))))
                    .into(),
                by: "op".into(),
            });
        }
        if self.roll(4) == 0 {
            view.pause = at(Pause {
                since_ms: 0,
                until_ms: None,
                reason: None,
                by: "op".into(),
            });
        }
        view.request = self
            .maybe(|d| Request {
                id: d.roll(3),
                kind: if d.yes() {
                    RequestKind::Switchover
                } else {
                    RequestKind::Failover
                },
                term: Term(d.roll(4)),
                to: d.maybe(|d| id(d.name())),
                allow_data_loss: d.roll(4) == 0,
                phase: if d.yes() {
                    RequestPhase::Asked
                } else {
                    RequestPhase::Hold
                },
                by: "op".into(),
                why: None,
            })
            .and_then(at);
        view
    }

    fn observation(&mut self, now: BootTime) -> Observation {
        let mut scene = Scene::cluster("b");
        let view = self.view(&scene);
        let o = &mut scene.o;
        o.now = now;
        o.view = if self.roll(8) == 0 { None } else { Some(view) };
        o.me.incarnation = if self.roll(6) == 0 {
            None
        } else {
            Some(life("b"))
        };
        o.me.floor = Term(self.roll(4));
        o.lease = self.maybe(|d| Lease {
            term: Term(d.roll(4)),
            until: BootTime(now.0 + d.roll(3) * SECOND - SECOND),
        });
        o.lease_seen = [
            LeaseSeen::Unknown,
            LeaseSeen::Lapsed,
            LeaseSeen::Held(Term(1)),
        ][usize::try_from(self.roll(3)).unwrap()];
        for peer in o.peers.values_mut() {
            peer.heard_at = BootTime(now.0 - self.roll(4) * SECOND);
            peer.status.timeline = self.maybe(|d| TimelineId(u32::try_from(d.roll(4)).unwrap()));
        }
        o.data = match self.roll(8) {
            0 => DataView::Empty,
            1 => DataView::Foreign("files".into()),
            n => DataView::Present {
                system_id: if n == 2 { "78" } else { "77" }.into(),
                timeline: TimelineId(u32::try_from(self.roll(4)).unwrap()),
                origin: match self.roll(6) {
                    0 => Origin::Strange { refused: None },
                    1 => Origin::Strange {
                        refused: Some("running".into()),
                    },
                    _ => Origin::Own,
                },
            },
        };
        o.me.first_start = match self.roll(4) {
            0 => FirstStart::Adopt,
            1 => FirstStart::Wait,
            _ => FirstStart::Make,
        };
        if let Some(cluster) = o.view.as_mut().and_then(|v| v.cluster.as_mut()) {
            cluster.value.founding = o.me.first_start;
        }
        o.server = self.server();
        o.process = self.maybe(|d| d.roll(3));
        o.config_stale = self.yes();
        o.bootstrap_done = self.yes();
        o.sealed = self.maybe(|d| Seal {
            term: Term(d.roll(4)),
            incarnation: life("b"),
            timeline: TimelineId(1),
            lsn: Lsn(d.roll(4) * 1000),
        });
        o.task = if self.roll(4) == 0 {
            Some(TaskView {
                task: Task::Checkpoint,
                since: now,
            })
        } else {
            None
        };
        scene.o
    }
}

/// No empty database in the place of an existing one, and nothing adopted that is Craton's.
fn founds_as_claimed(o: &Observation, task: &Task) {
    if *task == Task::InitDb {
        let cluster = o.view.as_ref().and_then(|v| v.cluster.as_ref());
        assert_ne!(
            cluster.map(|c| c.value.founding),
            Some(FirstStart::Adopt),
            "an empty database where an existing one was meant"
        );
    }
    let led = o.view.as_ref().is_some_and(|v| v.leadership.is_some());
    if *task == Task::Adopt {
        let strange = matches!(
            &o.data,
            DataView::Present {
                origin: Origin::Strange { refused: None },
                ..
            }
        );
        assert!(
            strange && o.me.incarnation.is_none() && !led,
            "adopts what is Craton's or cannot be adopted"
        );
    }
}

/// The operator has not accepted a loss yet.
fn by_recovered_records_nobody_leads(o: &Observation, d: &Decision) {
    let l = o.view.as_ref().and_then(|v| v.leadership.as_ref());
    if !l.is_some_and(|l| l.value.may_be_old()) {
        return;
    }
    let elects = |r: &Record| matches!(r, Record::Leadership(l) if l.leader.is_some());
    assert!(
        !d.changes.iter().any(|c| c.puts.iter().any(elects)),
        "leads by recovered records"
    );
    assert!(
        !matches!(d.lease, LeaseWish::Hold(_)),
        "holds the lease by recovered records"
    );
}

fn opened_only_to_whom_it_lets_in(o: &Observation, d: &Decision, term: Option<Term>) {
    if let (Some(Task::Admit), ServerView::Running(s)) = (&d.task, &o.server) {
        let l = &o.view.as_ref().unwrap().leadership.as_ref().unwrap().value;
        let has = |b: &&StandbyView| {
            b.streaming && l.sync.holds(&b.member, b.incarnation) && b.flush_lsn >= Lsn(1)
        };
        let copies = s.standbys.iter().filter(has).count();
        assert!(
            copies >= l.sync.k as usize || s.end == Lsn::ZERO,
            "clients are let in to what nobody else has"
        );
    }
    let now = o.view.as_ref().and_then(|v| v.leadership.as_ref());
    let was_open = |term| now.is_some_and(|l| l.value.open && l.value.term == term);
    for r in d.changes.iter().flat_map(|c| &c.puts) {
        if let Record::Leadership(l) = r {
            assert!(Some(l.term) >= term, "the term goes back");
            let refuses = matches!(&o.server, ServerView::Running(s) if s.closed);
            assert!(
                !l.open || was_open(l.term) || !refuses,
                "opened on record, and PostgreSQL refuses clients"
            );
        }
    }
}

/// What holds for every decision.
fn never_wrong(o: &Observation, d: &Decision) {
    let leads = o.view.as_ref().and_then(ClusterView::leader).cloned();
    let term = o
        .view
        .as_ref()
        .and_then(|v| v.leadership.as_ref())
        .map(|l| l.value.term);
    let leads = leads.is_some() && leads == o.me.reference();
    by_recovered_records_nobody_leads(o, d);
    let lease = o.lease.filter(|l| l.until > o.now && Some(l.term) == term);
    if let Some(task) = &d.task {
        assert!(o.task.is_none(), "one task at a time");
        if matches!(task, Task::Promote { .. } | Task::StartPrimary { .. }) {
            assert!(
                leads && lease.is_some(),
                "{task:?} without leadership or lease"
            );
        }
        if matches!(task, Task::InitDb | Task::Clone { .. }) {
            assert_eq!(o.data, DataView::Empty, "{task:?} over data");
        }
        founds_as_claimed(o, task);
        if let Task::Reinit { incarnation, .. } = task {
            let l = &o.view.as_ref().unwrap().leadership.as_ref().unwrap().value;
            assert!(
                l.open && l.leader.is_some() && !leads,
                "thrown away when it may be needed"
            );
            let ours = matches!(&o.data, DataView::Present { system_id, .. } if system_id == "77");
            if let Some(me) = o.me.reference().filter(|_| ours) {
                assert!(
                    !l.sync.holds(&me.member, me.incarnation),
                    "commits rest on it"
                );
            }
            assert_eq!(
                *incarnation, o.me.incarnation,
                "another life than the one meant"
            );
        }
        if let Task::Follow { term, .. } = task {
            assert!(*term >= o.me.floor, "follows below its floor");
        }
    }
    if let LeaseWish::Hold(held) = d.lease {
        let own = leads && Some(held) == term;
        assert!(own || o.view.is_none(), "holds a lease that is not its own");
    }
    let primary = matches!(&o.server, ServerView::Running(s) if !s.in_recovery);
    if primary && (term.is_some() || o.view.is_none()) {
        let allowed = if o.view.is_none() {
            o.lease.is_some_and(|l| l.until > o.now)
        } else {
            leads && lease.is_some()
        };
        assert!(
            allowed || d.kill.is_some(),
            "a primary without leadership or lease lives on"
        );
    }
    opened_only_to_whom_it_lets_in(o, d, term);
    let opens = d.open.as_ref().map(|open| &open.change);
    for c in d.changes.iter().chain(opens) {
        for put in &c.puts {
            let key = put.key();
            let guarded = c
                .expect
                .iter()
                .any(|(k, _)| *k == key || (*k == Key::Leadership && key == Key::Timelines));
            assert!(
                guarded || key == Key::Settings || key == Key::Timelines,
                "{key:?} is written blindly"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5000, ..ProptestConfig::default() })]

    #[test]
    fn total_deterministic_and_never_a_primary_without_a_lease(seed: u64) {
        let mut dice = Dice(seed);
        let mut memory = Memory::default();
        let mut now = START;
        for _ in 0..8 {
            now = now.after(Duration::from_millis(dice.roll(3000)));
            let o = dice.observation(now);
            let d = decide(&o, &memory);
            prop_assert_eq!(&d, &decide(&o, &memory));
            never_wrong(&o, &d);
            memory = d.memory;
        }
    }
}
