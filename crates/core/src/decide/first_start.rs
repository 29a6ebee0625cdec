//! Before there is a leader: one initdb per cluster, ever (failover protocol, section 4), or one data directory that
//! was there before the cluster (docs/decisions/0006-adoption.md).

use super::{INITIALIZER_SILENT_MAX, Mind, Task};
use crate::observe::{DataView, FirstStart, Origin};
use crate::records::{
    At, Change, ClusterRecord, ClusterView, Key, Leadership, Record, TimelineRecord, Timelines,
};
use crate::sync::SyncSet;
use crate::types::{Lsn, Term, TimelineId};

pub(super) fn before_leadership(mind: &mut Mind<'_>, view: &ClusterView) {
    match (&view.cluster, &mind.o.data) {
        (None, DataView::Empty) => claim_empty(mind),
        (None, DataView::Present { origin, .. }) => claim_present(mind, origin),
        (_, DataView::Foreign(what)) => {
            let text = format!("the data directory is in use by something else: {what}");
            mind.because("foreign", text);
        }
        (Some(cluster), data) => {
            if cluster.value.initializer == mind.o.me.id {
                found(mind, view, cluster, data);
            } else {
                wait_for_initializer(mind, cluster);
            }
        }
    }
}

/// This member won the right to give the cluster its database.
fn found(mind: &mut Mind<'_>, view: &ClusterView, cluster: &At<ClusterRecord>, data: &DataView) {
    let adopts = cluster.value.founding == FirstStart::Adopt;
    match data {
        DataView::Present { origin, .. } if adopts && mind.o.me.incarnation.is_none() => {
            adopt(mind, origin);
        }
        DataView::Present {
            system_id,
            timeline,
            ..
        } => record_initialized(mind, view, cluster, system_id, *timeline),
        _ if adopts => mind.because(
            "adopted_data_missing",
            "this member was to bring an existing data directory, and it is gone: an empty database is not made in its place; bring it back",
        ),
        _ => {
            mind.because("initializing", "this member makes the cluster's database");
            mind.start(Task::InitDb);
        }
    }
}

/// What may be taken over is looked at once more: the claim may be from an earlier life.
fn adopt(mind: &mut Mind<'_>, origin: &Origin) {
    match origin {
        Origin::Strange { refused: None } => {
            mind.because(
                "adopting",
                "preparing the data directory that is here to be the cluster's",
            );
            mind.start(Task::Adopt);
        }
        Origin::Strange { refused: Some(why) } => cannot_adopt(mind, why),
        Origin::Own => mind.because("unknown_data", OWN_DATA),
    }
}

/// Losing the coordinator must not let any member claim that its copy is the newest.
const OWN_DATA: &str = "there is a database of a Craton cluster here, but the coordinator knows of no cluster: it is not touched; restore the coordinator's files, or start with an empty directory";

fn cannot_adopt(mind: &mut Mind<'_>, why: &str) {
    let text = format!("the data directory is left as it is: {why}");
    mind.because("cannot_adopt", text);
}

fn claim_empty(mind: &mut Mind<'_>) {
    match mind.o.me.first_start {
        FirstStart::Make => claim(mind, FirstStart::Make),
        FirstStart::Wait => mind.because(
            "waiting_for_founder",
            "there is no cluster yet, and this member is not to found one (first_start = \"wait\"): waiting for another",
        ),
        FirstStart::Adopt => mind.because(
            "nothing_to_adopt",
            "this member is to bring an existing data directory (first_start = \"adopt\"), and there is none: an empty database is not made in its place",
        ),
    }
}

fn claim_present(mind: &mut Mind<'_>, origin: &Origin) {
    match origin {
        // The agent's own memory is a trace of its own.
        Origin::Strange { .. } if mind.o.me.incarnation.is_some() => {
            mind.because("unknown_data", OWN_DATA);
        }
        Origin::Own => mind.because("unknown_data", OWN_DATA),
        Origin::Strange { .. } if mind.o.me.first_start != FirstStart::Adopt => mind.because(
            "strange_data",
            "there is a database here that Craton did not make, and no cluster: it is not touched; to found a cluster with it set first_start = \"adopt\" in [node], or start with an empty directory",
        ),
        Origin::Strange { refused: Some(why) } => cannot_adopt(mind, why),
        Origin::Strange { refused: None } => claim(mind, FirstStart::Adopt),
    }
}

/// One compare-and-set decides who gives the cluster its database.
fn claim(mind: &mut Mind<'_>, founding: FirstStart) {
    if mind.o.me.priority == 0 {
        return mind.because(
            "never_leads",
            "there is no cluster yet, and a member with priority 0 does not make one: waiting for another",
        );
    }
    let text = match founding {
        FirstStart::Adopt => {
            "there is no cluster yet: asking to found it with the data directory that is here"
        }
        _ => "there is no cluster yet: asking to be the one that makes it",
    };
    mind.because("claiming", text);
    let record = ClusterRecord {
        name: mind.o.cluster_name.clone(),
        initializer: mind.o.me.id.clone(),
        system_id: None,
        bootstrapped: false,
        founding,
    };
    mind.submit(Change {
        expect: vec![(Key::Cluster, 0), (Key::Settings, 0)],
        puts: vec![
            Record::Cluster(record),
            Record::Settings(mind.o.initial_settings.clone()),
        ],
        deletes: vec![],
    });
}

fn record_initialized(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    cluster: &At<ClusterRecord>,
    system_id: &str,
    timeline: TimelineId,
) {
    let Some(me) = mind.o.me.reference() else {
        return mind.because(
            "no_incarnation",
            "the data directory has no incarnation yet",
        );
    };
    let adopted = cluster.value.founding == FirstStart::Adopt;
    mind.because(
        "initialized",
        "the database is there; taking the first term",
    );
    let term = Term(1);
    let timelines = Timelines(vec![TimelineRecord {
        timeline,
        term,
        parent: None,
        fork: Lsn::ZERO,
        member: me.member.clone(),
    }]);
    let leadership = Leadership {
        term,
        leader: Some(me),
        previous: None,
        sync: SyncSet::default(),
        durability: mind.settings.durability,
        timeline,
        open: false,
        restarted: false,
        preferred: None,
        allow_data_loss: false,
        recovered: false,
        cause: "first start".into(),
    };
    let did = if adopted { "brought" } else { "made" };
    let text = format!(
        "{} {did} the database (system identifier {system_id})",
        mind.o.me.id
    );
    let record = ClusterRecord {
        system_id: Some(system_id.to_owned()),
        ..cluster.value.clone()
    };
    let history = mind.event(view, term, "initialized", text);
    mind.submit(Change {
        expect: vec![(Key::Cluster, cluster.revision), (Key::Leadership, 0)],
        puts: vec![
            Record::Cluster(record),
            Record::Leadership(leadership),
            Record::Timelines(timelines),
            history,
        ],
        deletes: vec![],
    });
}

fn wait_for_initializer(mind: &mut Mind<'_>, cluster: &At<ClusterRecord>) {
    let initializer = &cluster.value.initializer;
    let adopted = cluster.value.founding == FirstStart::Adopt;
    if mind.is_alive(initializer) {
        mind.out.memory.initializer_silent_since = None;
        let does = if adopted { "bring" } else { "make" };
        let text = format!("waiting for {initializer} to {does} the database");
        return mind.because("waiting_for_initdb", text);
    }
    if adopted {
        // An empty database in the place of the one that was meant would be found out when it is too late.
        let text = format!(
            "{initializer} was to bring its data directory, and is silent: nobody makes an empty database in its place; start it"
        );
        return mind.because("adopter_silent", text);
    }
    let now = mind.o.now;
    let since = *mind.out.memory.initializer_silent_since.get_or_insert(now);
    let text = format!("{initializer} was to make the database, and is silent");
    mind.because("initializer_silent", text);
    let empty = matches!(mind.o.data, DataView::Empty);
    let may = mind.o.me.first_start == FirstStart::Make && mind.o.me.priority > 0;
    if empty && may && now.since(since) >= INITIALIZER_SILENT_MAX {
        let record = ClusterRecord {
            initializer: mind.o.me.id.clone(),
            ..cluster.value.clone()
        };
        mind.submit(Change {
            expect: vec![(Key::Cluster, cluster.revision), (Key::Leadership, 0)],
            puts: vec![Record::Cluster(record)],
            deletes: vec![],
        });
    }
}
