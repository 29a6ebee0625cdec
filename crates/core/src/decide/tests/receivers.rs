//! Backup receivers as members of V.

use super::*;
use crate::observe::ReceiverView;
use crate::records::ReceiverRecord;

/// The receiver, in its first life.
fn backup() -> MemberId {
    id("backup")
}

const LIFE: Incarnation = Incarnation(77);

impl Scene {
    /// A receiver is on record, was heard just now, and is at this position.
    fn receiver(mut self, lsn: u64) -> Self {
        let value = ReceiverRecord {
            api: "k:3".into(),
            incarnation: LIFE,
            leaving: false,
        };
        let record = At { revision: 7, value };
        self.view().receivers.insert(backup(), record);
        let seen = ReceiverView {
            heard_at: self.o.now,
            incarnation: LIFE,
            timeline: TimelineId(1),
            lsn: Lsn(lsn),
            streams_from: None,
            seal: None,
        };
        self.o.receivers.insert(backup(), seen);
        self
    }

    /// V is these and the receiver.
    fn v_with_receiver(self, names: &[&str]) -> Self {
        let mut v = set(1, names);
        v.members.insert(backup(), LIFE);
        self.leadership(|l| l.sync = v)
    }

    /// The receiver has answered.
    fn receiver_sealed(mut self, term: u64, lsn: u64) -> Self {
        let seal = Seal {
            term: Term(term),
            incarnation: LIFE,
            timeline: TimelineId(1),
            lsn: Lsn(lsn),
        };
        self.o.receivers.get_mut(&backup()).unwrap().seal = Some(seal);
        self
    }

    /// Its answer is on record.
    fn receiver_counted(mut self, lsn: u64) -> Self {
        let value = Seal {
            term: Term(2),
            incarnation: LIFE,
            timeline: TimelineId(1),
            lsn: Lsn(lsn),
        };
        self.view().seals.insert(
            backup(),
            At {
                revision: 31,
                value,
            },
        );
        self
    }

    /// The receiver streams from the leader.
    fn receives(self, incarnation: Incarnation, flushed: u64) -> Self {
        self.server(|s| {
            s.standbys.push(StandbyView {
                member: backup(),
                incarnation,
                streaming: true,
                flush_lsn: Lsn(flushed),
            });
        })
    }
}

#[test]
fn it_is_asked_and_what_it_says_is_written_down() {
    let s = || {
        Scene::election("b")
            .v_with_receiver(&["b"])
            .receiver(1000)
            .sealed(&[("b", 1, 1000)])
    };
    check("asked", s(), "ask backup 2 : election no_winner");
    check(
        "an old answer",
        s().receiver_sealed(1, 900),
        "ask backup 2 : election no_winner",
    );
    check(
        "it has answered",
        s().receiver_sealed(2, 1000),
        "write seal/backup : election no_winner",
    );
    check(
        "it counts",
        s().receiver_counted(1000),
        "write leadership+timelines+history : election won",
    );
    let other_life = s().leadership(|l| {
        l.sync.members.insert(backup(), Incarnation(5));
    });
    check(
        "another life is not asked",
        other_life,
        " : election no_winner",
    );
    let unlisted = s().leadership(|l| l.sync = set(1, &["b"]));
    check(
        "not in V",
        unlisted,
        "write leadership+timelines+history : election won",
    );
}

#[test]
fn what_only_it_holds_comes_first() {
    let s = Scene::election("b")
        .v_with_receiver(&["b"])
        .receiver(1500)
        .sealed(&[("b", 1, 1000)])
        .receiver_counted(1500);
    check(
        "the rest is fetched",
        s.clone(),
        "CatchUp : election catching_up",
    );
    let d = decide(&s.o, &s.memory);
    let task = Task::CatchUp {
        from: backup(),
        receiver: Some("k:3".into()),
        term: Term(2),
        timeline: TimelineId(1),
        lsn: Lsn(1500),
    };
    assert_eq!(d.task, Some(task));
    let silent = s.with(|o| {
        o.receivers.clear();
    });
    // Its seal counts, and nobody else holds what it holds.
    check("it is gone", silent, " : election no_winner");
}

/// Commits rest on the receiver alone: whoever is there may open the election, and gets the WAL.
#[test]
fn it_is_all_that_is_left_of_v() {
    let s = Scene::standby()
        .v_with_receiver(&[])
        .receiver(1500)
        .with(|o| o.lease_seen = LeaseSeen::Lapsed)
        .after(2100);
    check("the lease is over", s, "elect-after 1 : lease_over standby");
    let s = Scene::election("b")
        .v_with_receiver(&[])
        .receiver(1500)
        .sealed(&[("b", 1, 1000)])
        .receiver_counted(1500);
    check(
        "WAL is fetched",
        s.clone(),
        "CatchUp : election catching_up",
    );
    check(
        "and then somebody leads",
        s.sealed(&[("b", 1, 1500)]),
        "write leadership+timelines+history : election won",
    );
}

#[test]
fn it_enters_v_and_leaves_it() {
    let wants = |s: Scene| {
        let d = decide(&s.o, &s.memory);
        d.changes.iter().find_map(|c| {
            c.puts.iter().find_map(|p| match p {
                Record::Leadership(l) => Some(l.sync.to_string()),
                _ => None,
            })
        })
    };
    let there = || Scene::leader().receiver(1000).receives(LIFE, 1000);
    assert_eq!(wants(there()), Some("1 of b, backup, c".into()));
    assert_eq!(
        wants(Scene::leader().receives(LIFE, 1000)),
        None,
        "nobody knows of it"
    );
    let former = Scene::leader()
        .receiver(1000)
        .receives(Incarnation(5), 1000);
    assert_eq!(wants(former), None, "a former life");
    let mut leaving = there();
    leaving
        .view()
        .receivers
        .get_mut(&backup())
        .unwrap()
        .value
        .leaving = true;
    assert_eq!(wants(leaving), None, "it is being taken out");
    let mut slack = there();
    let settings = slack.view().settings.as_mut().unwrap();
    settings.value.durability = Durability::Async;
    let listed = wants(slack).unwrap_or_default();
    assert!(!listed.contains("backup"), "async: {listed}");
}

/// Its seal is needed, and it can be had: the leader may hand over.
#[test]
fn it_counts_when_a_leader_hands_over() {
    let down = |s: Scene| s.with(|o| o.server = ServerView::Down);
    let s = || Scene::leader().v_with_receiver(&["b"]);
    let d = |s: Scene| line(&decide(&s.o, &s.memory));
    let with = d(down(s().receiver(1000)));
    assert!(with.contains("elect-after 1"), "{with}");
    let without = d(down(s()));
    assert!(!without.contains("elect-after"), "{without}");
    let old = d(down(s().receiver(1000)).with(|o| {
        o.receivers.get_mut(&backup()).unwrap().timeline = TimelineId(9);
    }));
    assert!(!old.contains("elect-after"), "{old}");
}
