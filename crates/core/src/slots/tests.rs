//! Tables for what a standby does with its copies, and when one may be offered.

use super::*;

fn slot(name: &str, confirmed: u64, catalog_xmin: u32) -> LogicalSlot {
    LogicalSlot {
        name: name.into(),
        database: "shop".into(),
        plugin: "pgoutput".into(),
        restart: Lsn(confirmed.saturating_sub(10)),
        confirmed: Lsn(confirmed),
        catalog_xmin,
        ..LogicalSlot::default()
    }
}

/// A standby with its copies, and a leader of term 5.
struct Scene {
    leader: Told,
    here: Vec<LogicalSlot>,
    broken: BTreeSet<String>,
    notes: Notes,
    held_before: BTreeSet<String>,
    all_are_copies: bool,
}

impl Scene {
    fn new(there: &[LogicalSlot], here: &[LogicalSlot]) -> Self {
        let names = here.iter().map(|s| s.name.as_str());
        Self {
            leader: Told {
                slots: Some(there.to_vec()),
                ..Told::default()
            },
            notes: Notes::default().following(Term(5)).with_copies(names),
            here: here.to_vec(),
            broken: BTreeSet::new(),
            held_before: BTreeSet::new(),
            all_are_copies: true,
        }
    }

    fn held(mut self, xid: u32) -> Self {
        self.leader.held.insert("craton_b".into(), xid);
        self
    }

    fn look(&self) -> Outcome {
        look(&Look {
            term: Term(5),
            leader: &self.leader,
            own_slot: "craton_b",
            here: &self.here,
            broken: &self.broken,
            notes: &self.notes,
            all_are_copies: self.all_are_copies,
            held_before: &self.held_before,
        })
        .unwrap()
    }

    /// Looks, and takes over what comes of it.
    fn step(&mut self) -> Outcome {
        let out = self.look();
        self.notes = out.notes.clone();
        self.held_before.clone_from(&out.held);
        out
    }
}

fn names(set: &BTreeSet<String>) -> Vec<&str> {
    set.iter().map(String::as_str).collect()
}

#[test]
fn a_copy_is_moved_to_where_the_consumer_is_and_never_past_it() {
    let out = Scene::new(&[slot("s", 500, 10)], &[slot("s", 300, 10)]).look();
    assert_eq!(
        out.steps,
        [Step::Advance {
            name: "s".into(),
            database: "shop".into(),
            to: Lsn(500)
        }]
    );
    // A former leader's own slot may be ahead of the copy that leads now: the consumer did confirm that.
    let ahead = Scene::new(&[slot("s", 300, 10)], &[slot("s", 500, 10)]).look();
    assert_eq!(ahead.steps, []);
}

#[test]
fn slots_without_a_copy_are_missing_but_not_those_of_a_table_copy() {
    let there = [slot("s", 1, 1), slot("pg_16400_sync_16384_7123", 1, 1)];
    let out = Scene::new(&there, &[]).look();
    assert_eq!(names(&out.missing), ["s"]);
    for name in [
        "pg_1_sync_2_",
        "pg_x_sync_2_3",
        "pg_1_sync_2_3_4",
        "sub",
        "pg",
    ] {
        assert!(is_kept(name), "{name}");
    }
}

#[test]
fn a_copy_goes_with_its_original() {
    let why = |scene: &Scene| match scene.look().steps.as_slice() {
        [Step::Drop { name, why }] if name == "s" => *why,
        other => panic!("{other:?}"),
    };
    let gone = Scene::new(&[], &[slot("s", 1, 1)]);
    assert_eq!(why(&gone), "the leader has no such slot");
    let other = LogicalSlot {
        plugin: "test_decoding".into(),
        ..slot("s", 1, 1)
    };
    let changed = Scene::new(&[other], &[slot("s", 1, 1)]);
    assert_eq!(why(&changed), "the leader has another of that name");
    let mut broken = Scene::new(&[slot("s", 1, 1)], &[slot("s", 1, 1)]);
    broken.broken.insert("s".into());
    assert_eq!(why(&broken), "what it needs is not there any more");
    assert!(!broken.step().notes.is_whole("s"));
    // From 16 on a client may have made it on this very standby.
    let mut own = Scene::new(&[], &[slot("s", 1, 1)]);
    own.all_are_copies = false;
    own.notes.whole_in.clear();
    assert_eq!(own.look().steps, []);
    let notes = own.look().notes;
    assert_eq!(notes.not_whole(&own.here, false), Vec::<&str>::new());
    assert_eq!(notes.not_whole(&own.here, true), ["s"]);
}

#[test]
fn nothing_is_done_while_the_leader_has_not_told() {
    let mut scene = Scene::new(&[], &[slot("s", 1, 1)]);
    scene.leader.slots = None;
    let look = look(&Look {
        term: Term(5),
        leader: &scene.leader,
        own_slot: "craton_b",
        here: &scene.here,
        broken: &scene.broken,
        notes: &scene.notes,
        all_are_copies: true,
        held_before: &scene.held_before,
    });
    assert_eq!(look, None);
}

#[test]
fn a_copy_is_whole_only_once_the_leaders_vacuum_was_seen_to_be_held_back_for_it() {
    // Nothing holds it back.
    let mut bare = Scene::new(&[slot("s", 1, 100)], &[slot("s", 1, 100)]);
    bare.step();
    assert!(!bare.step().notes.is_whole("s"));
    // Held back for something younger than what the copy needs.
    let mut younger = Scene::new(&[slot("s", 1, 100)], &[slot("s", 1, 100)]).held(101);
    younger.step();
    assert!(!younger.step().notes.is_whole("s"));
    // The first look sees that it is held; what the leader's slot needs must have been told after that.
    let mut scene = Scene::new(&[slot("s", 1, 100)], &[slot("s", 1, 100)]).held(100);
    assert!(!scene.step().notes.is_whole("s"));
    assert!(scene.step().notes.is_whole("s"));
    // The leader's slot goes on: the copy's rows are held.
    scene.leader.slots = Some(vec![slot("s", 1, 150)]);
    assert!(scene.step().notes.is_whole("s"));
    // Nobody holds them any more.
    scene.leader.held.clear();
    assert!(!scene.step().notes.is_whole("s"));
    // They may be gone, so that holding them again is not enough, until the copy is past what is missing.
    scene = scene.held(100);
    scene.step();
    assert!(!scene.step().notes.is_whole("s"));
    scene.here = vec![slot("s", 1, 150)];
    assert!(scene.step().notes.is_whole("s"));
}

#[test]
fn transaction_numbers_wrap_around() {
    assert!(precedes(1, 2) && !precedes(2, 1) && !precedes(7, 7));
    assert!(precedes(u32::MAX, 3) && !precedes(3, u32::MAX));
}

#[test]
fn what_was_whole_under_one_leader_is_not_under_the_next() {
    let mut notes = Notes::default()
        .following(Term(5))
        .with_copies(["s"].into_iter());
    assert!(!notes.is_whole("s"));
    notes.whole_in.insert("s".into(), Term(5));
    assert!(notes.is_whole("s"), "an election that nobody has won");
    assert!(!notes.following(Term(7)).is_whole("s"));
    assert!(notes.following(Term(4)).is_whole("s"));
    // A slot that a client made here while this member led is nobody's copy.
    let led = notes.leading(Term(6), &[slot("s", 1, 1), slot("client", 1, 1)]);
    assert!(led.is_whole("s") && led.is_whole("client"));
    assert!(!led.following(Term(7)).is_whole("client"));
    // One that was not whole stays so, however long this member leads.
    let broken = notes
        .following(Term(7))
        .leading(Term(8), &[slot("s", 1, 1)]);
    assert!(!broken.is_whole("s"));
    // What is seen here may be older than the note of a copy that has just been put in place.
    let scene = Scene::new(&[slot("s", 1, 1)], &[]);
    let mut put = scene;
    put.notes.whole_in.insert("s".into(), Term(5));
    assert_eq!(put.look().notes.whole_in["s"], Term(0));
    // Notes go with their slots.
    assert!(notes.leading(Term(6), &[]).whole_in.is_empty());
}

#[test]
fn new_wal_begins_behind_all_that_a_consumer_can_have_confirmed() {
    let known = [Lsn(5), Lsn(100), Lsn(7)];
    assert_eq!(first_position(known.into_iter(), 16), Some(Lsn(116)));
    assert_eq!(first_position(std::iter::empty(), 16), None);
}
