//! Before there is a leader: one initdb per cluster, ever (failover protocol, section 4).

use super::{INITIALIZER_SILENT_MAX, Mind, Task};
use crate::observe::DataView;
use crate::records::{
    At, Change, ClusterRecord, ClusterView, Key, Leadership, Record, TimelineRecord, Timelines,
};
use crate::sync::SyncSet;
use crate::types::{Lsn, Term, TimelineId};

pub(super) fn before_leadership(mind: &mut Mind<'_>, view: &ClusterView) {
    match (&view.cluster, &mind.o.data) {
        (None, DataView::Empty) => claim(mind),
        (None, DataView::Present { .. }) => mind.because(
            "unknown_data",
            "there is a database here, but the coordinator knows of no cluster: it is not touched; restore the coordinator's files, or start with an empty directory",
        ),
        (_, DataView::Foreign(what)) => {
            let text = format!("the data directory is in use by something else: {what}");
            mind.because("foreign", text);
        }
        (Some(cluster), data) => {
            if cluster.value.initializer == mind.o.me.id {
                if let DataView::Present { system_id, timeline } = data {
                    record_initialized(mind, view, cluster, system_id, *timeline);
                } else {
                    mind.because("initializing", "this member makes the cluster's database");
                    mind.start(Task::InitDb);
                }
            } else {
                wait_for_initializer(mind, cluster);
            }
        }
    }
}

/// One compare-and-set decides who runs initdb.
fn claim(mind: &mut Mind<'_>) {
    if mind.o.me.priority == 0 {
        return mind.because(
            "never_leads",
            "there is no cluster yet, and a member with priority 0 does not make one: waiting for another",
        );
    }
    mind.because(
        "claiming",
        "there is no cluster yet: asking to be the one that makes it",
    );
    let record = ClusterRecord {
        name: mind.o.cluster_name.clone(),
        initializer: mind.o.me.id.clone(),
        system_id: None,
        bootstrapped: false,
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
    mind.because("initialized", "the database is made; taking the first term");
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
        preferred: None,
        allow_data_loss: false,
        cause: "first start".into(),
    };
    let text = format!(
        "{} made the database (system identifier {system_id})",
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
    if mind.is_alive(initializer) {
        mind.out.memory.initializer_silent_since = None;
        let text = format!("waiting for {initializer} to make the database");
        return mind.because("waiting_for_initdb", text);
    }
    let now = mind.o.now;
    let since = *mind.out.memory.initializer_silent_since.get_or_insert(now);
    let text = format!("{initializer} was to make the database, and is silent");
    mind.because("initializer_silent", text);
    let empty = matches!(mind.o.data, DataView::Empty);
    if empty && mind.o.me.priority > 0 && now.since(since) >= INITIALIZER_SILENT_MAX {
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
