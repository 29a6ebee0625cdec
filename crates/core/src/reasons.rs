//! What every reason code of the decision means, and what an operator may do about it: `craton explain` prints it.

/// One code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Meaning {
    /// As in [`crate::decide::Reason`].
    pub code: &'static str,
    /// What it means, in a sentence.
    pub means: &'static str,
    /// What to do; empty where there is nothing to do but wait, or nothing at all.
    pub todo: &'static str,
}

const fn m(code: &'static str, means: &'static str, todo: &'static str) -> Meaning {
    Meaning { code, means, todo }
}

/// All of them, in alphabetical order.
pub const MEANINGS: &[Meaning] = &[
    m(
        "admitting",
        "What the leader recovered is safe, and clients are let in before the record says that it is open.",
        "",
    ),
    m(
        "adopted_data_missing",
        "The cluster was claimed for a data directory of this member that is not there any more.",
        "Bring it back to where it was. To begin with another database instead, empty the coordinator directories of all members and start anew.",
    ),
    m(
        "adopter_silent",
        "The member that founds this cluster with an existing data directory is silent, and nobody makes an empty database in its place.",
        "Start that member.",
    ),
    m(
        "adopting",
        "The data directory that was here before the cluster is being prepared to be its database.",
        "",
    ),
    m(
        "back_off",
        "The last try failed; the next one waits a moment, longer after every failure.",
        "Mend what the error names; nothing else is needed.",
    ),
    m(
        "behind",
        "The WAL here is newer than what this agent knows of the cluster.",
        "",
    ),
    m(
        "bootstrapping",
        "Roles and functions that the other parts log in with are being made.",
        "",
    ),
    m(
        "busy",
        "A long action is in progress, and there is only ever one at a time.",
        "",
    ),
    m(
        "cannot_adopt",
        "The data directory was to found the cluster and cannot as it is; nothing in it was changed.",
        "Do what the text says; craton adopt check DIRECTORY looks at it once more.",
    ),
    m(
        "cannot_start",
        "PostgreSQL refuses to start: its data are at odds with a history that it has seen. They are rewound, or cloned anew.",
        "",
    ),
    m(
        "cannot_stream",
        "The leader has all the WAL that this member needs, and yet it does not stream.",
        "Read pg.log in this member's directory: authentication, network and disk are the usual causes.",
    ),
    m(
        "catching_up",
        "A member that never leads holds the most WAL: this one gets the rest of it before it is promoted.",
        "",
    ),
    m(
        "claiming",
        "There is no cluster yet; one member wins the right to make it.",
        "",
    ),
    m(
        "cloning",
        "The data directory is empty and is being copied from another member.",
        "",
    ),
    m(
        "collecting",
        "Seals of members that are alive are waited for, at most a ttl.",
        "",
    ),
    m(
        "configuring",
        "Changed settings are being written into PostgreSQL's configuration.",
        "",
    ),
    m(
        "demoted",
        "This member led, lost the lease, and came back as a standby: an election decides.",
        "",
    ),
    m(
        "disk_low",
        "Free space on this member's file system is below what is kept in reserve.",
        "Make room: a leader whose disk is nearly full hands over, and a full one stops.",
    ),
    m(
        "diverged",
        "This member has WAL that the cluster does not have. It is kept, then the data are rewound.",
        "craton divergence list shows what was kept.",
    ),
    m("election", "Nobody leads: an election is open.", ""),
    m(
        "fenced",
        "This member may not write any more, so every process of PostgreSQL was stopped at once.",
        "",
    ),
    m(
        "following",
        "This member is being pointed at its leader.",
        "",
    ),
    m(
        "foreign",
        "The data directory holds something that is not this cluster's, and is not touched.",
        "Move the files away, or correct node.dir.",
    ),
    m(
        "gives_up",
        "What an elected leader has to do failed again and again: a new election decides.",
        "Read pg.log of that member.",
    ),
    m(
        "handing_over",
        "PostgreSQL is down on the leader and another member can be promoted now.",
        "",
    ),
    m(
        "hands_over",
        "This member's host is about to fail it, so it asks for a switchover.",
        "Mend what it names: a full disk, crashes in a row.",
    ),
    m(
        "hands_over_later",
        "This member asked for a switchover a moment ago and does not ask again yet.",
        "",
    ),
    m(
        "holding",
        "The proxies hold new transactions while running ones end.",
        "A transaction that does not end holds it up for switchover_wait_ms at most.",
    ),
    m(
        "initialized",
        "The database is made; the first term begins.",
        "",
    ),
    m(
        "initializer_silent",
        "The member that was to make the database is silent; another takes over after a while.",
        "Start that member, or wait.",
    ),
    m(
        "initializing",
        "This member makes the cluster's database.",
        "",
    ),
    m(
        "lapsed",
        "The lease ended while PostgreSQL was down: it starts as a standby, and an election decides.",
        "",
    ),
    m(
        "leader_was_alone",
        "The leader is gone and nobody else is known to have every acknowledged commit, so nobody is promoted.",
        "Bring the leader back. Only if it is lost for good: craton failover --allow-data-loss.",
    ),
    m(
        "leader_without_data",
        "This member leads on paper and its data directory is empty; the others elect another.",
        "",
    ),
    m("leading", "This member leads.", ""),
    m(
        "lease_over",
        "The leader's lease has ended: an election is being opened.",
        "",
    ),
    m(
        "lease_refused",
        "The elected leader could not get the lease for a whole ttl: a new election decides.",
        "",
    ),
    m(
        "leaving_room",
        "There are logical replication slots: before clients write, new WAL begins behind every position that a consumer may have confirmed.",
        "",
    ),
    m(
        "libraries_differ",
        "Libraries here differ from the leader's in version: indexes on text or geometry that one of the two wrote may be read wrongly by the other.",
        "Bring the packages of all members to the same versions, then restart PostgreSQL (craton restart) and see to the indexes: REINDEX what depends on collations that changed.",
    ),
    m(
        "never_leads",
        "This member has priority 0, so it does not make the cluster's database: it would have to lead it.",
        "Start a member with a priority above 0.",
    ),
    m(
        "no_coordinator",
        "The coordinator has no majority, or has not answered yet: nothing is decided without it.",
        "Bring back enough voters for a majority; see craton doctor.",
    ),
    m(
        "no_failover_in_pause",
        "The leader's lease has ended, and the cluster is paused.",
        "craton resume lets an election begin; craton failover asks for one.",
    ),
    m(
        "no_fence",
        "PostgreSQL does not become writable without a fence that is at work.",
        "craton explain and the agent's log say what the fence lacks.",
    ),
    m(
        "no_incarnation",
        "The data directory has no name for its life yet.",
        "",
    ),
    m(
        "no_winner",
        "An election is open and nobody can be promoted without the risk of losing acknowledged commits.",
        "Bring a member back whose seal is missing. Only if it is lost for good: craton failover --allow-data-loss.",
    ),
    m(
        "nobody_fitter",
        "This member would hand over, and no other is better off.",
        "Bring another standby into shape; see craton doctor.",
    ),
    m(
        "not_streaming",
        "This member is pointed at its leader and does not stream yet.",
        "If it stays so, read pg.log of this member.",
    ),
    m(
        "nothing_to_adopt",
        "This member is to found the cluster with an existing data directory, and has none.",
        "Move the data directory to data in node.dir, or set first_start = \"make\".",
    ),
    m(
        "on_promises",
        "The coordinator is away, and standbys promise not to elect anybody: the leader goes on, and the sync set stays as it is.",
        "Bring a majority of the voters back, or the etcd that keeps the records.",
    ),
    m(
        "opening",
        "The sync set is put in force before the first write.",
        "",
    ),
    m(
        "order_waits",
        "An order to this member waits until it can be done safely.",
        "",
    ),
    m(
        "override",
        "An operator accepted the loss of acknowledged commits.",
        "",
    ),
    m(
        "paused",
        "The cluster is paused: nothing is promoted, started, rewound or cloned but what is asked for.",
        "craton resume ends it.",
    ),
    m(
        "promised",
        "The leader cannot renew its lease, and this member has promised it not to elect anybody yet.",
        "",
    ),
    m(
        "promoting",
        "This member was elected and is being promoted.",
        "",
    ),
    m(
        "reading_wal",
        "The end of the local WAL is not known before all of it has been read.",
        "",
    ),
    m(
        "records_are_old",
        "The store names an earlier term than this member has sealed or followed: it was restored from an old copy, so nobody votes or leads by it.",
        "Restore the store's newest copy, or have the members write what they know: `craton coordinator rebuild`.",
    ),
    m(
        "recovering",
        "The leader restarted; it lets clients in once enough standbys have flushed what it recovered.",
        "Bring a standby of the sync set back if none is there.",
    ),
    m(
        "refused",
        "What was asked for cannot be done, for the reason given.",
        "Mend what it names and ask again.",
    ),
    m(
        "reinit",
        "The data directory is thrown away and cloned anew, as asked.",
        "",
    ),
    m(
        "restarting",
        "PostgreSQL died on the leader and nobody else can be promoted: it starts in place.",
        "",
    ),
    m(
        "restarting_on_order",
        "PostgreSQL is restarted, as asked.",
        "",
    ),
    m(
        "rolling_handover",
        "In a rolling restart the leader comes last: it hands over first.",
        "",
    ),
    m(
        "rolling_order",
        "In a rolling restart the next member is told to restart.",
        "",
    ),
    m("rolling_over", "A rolling restart has ended.", ""),
    m(
        "rolling_restart",
        "A rolling restart is in progress.",
        "craton restart --cancel stops it after the member that is at it.",
    ),
    m(
        "rolling_waits",
        "A rolling restart waits for a member whose agent is silent.",
        "Bring its host back, or stop with craton restart --cancel.",
    ),
    m(
        "schedule_dropped",
        "A scheduled switchover could not begin in time and is dropped.",
        "Mend what it names and schedule another.",
    ),
    m(
        "schedule_due",
        "The time of a scheduled switchover has come.",
        "",
    ),
    m(
        "schedule_waits",
        "A scheduled switchover is due and cannot begin.",
        "Mend what it names within a minute of its time.",
    ),
    m(
        "scheduled",
        "A switchover is scheduled.",
        "craton switchover --cancel takes it back.",
    ),
    m(
        "sealed",
        "This member promised a newer term not to follow an older one.",
        "",
    ),
    m(
        "sealing",
        "This member tells the election what it holds.",
        "",
    ),
    m(
        "settling",
        "What this agent's earlier life proposed may still be written; it is settled first, so that standby promises count.",
        "",
    ),
    m(
        "silent",
        "PostgreSQL runs and does not answer yet: it starts, or recovers.",
        "If it stays so, read pg.log of this member.",
    ),
    m(
        "slot_lost",
        "The leader no longer has the WAL that this member needs: it is cloned anew.",
        "Raise max_slot_wal_keep_size if members are away for long.",
    ),
    m(
        "slots_missing",
        "The leader has logical replication slots of which this member has no copy: they would not survive its promotion.",
        "If it stays so, the agent's log says why; see docs/guide/slots.md.",
    ),
    m(
        "stalled",
        "PostgreSQL has not answered for a whole ttl and another member can take over: it is killed.",
        "Look at the storage of this member.",
    ),
    m("standby", "This member follows the leader.", ""),
    m(
        "starting",
        "PostgreSQL is being started as a standby.",
        "If it stays so, read pg.log of this member.",
    ),
    m(
        "stopped_by_fence",
        "The lease was lost during a pause. A primary without a lease is stopped, paused or not: nobody can know who else writes by then.",
        "craton resume, or craton failover.",
    ),
    m(
        "stopped_in_pause",
        "PostgreSQL is down on the leader, and the cluster is paused.",
        "craton restart MEMBER starts it; craton resume lets the cluster decide.",
    ),
    m(
        "strange_copy",
        "This member's data directory is of the cluster's database, but Craton did not make the copy, so nobody knows whether it is part of the leader's history.",
        "craton reinit MEMBER throws it away and clones; or move it away.",
    ),
    m(
        "strange_data",
        "There is a database here that Craton did not make, and there is no cluster yet. It is not touched.",
        "To found the cluster with it set first_start = \"adopt\" in [node]; else start with an empty directory.",
    ),
    m(
        "stuck",
        "This member could not stream for long: it is rewound or cloned anew.",
        "",
    ),
    m(
        "suspended",
        "What would be done now waits for the end of the pause.",
        "craton resume ends it.",
    ),
    m(
        "switching",
        "A change of the leader, or its restart in place, is in progress.",
        "",
    ),
    m(
        "sync_change",
        "The sync set follows the standbys that are there.",
        "",
    ),
    m(
        "sync_pending",
        "A new sync set is not yet proven to be in force in every WAL sender.",
        "",
    ),
    m(
        "sync_unsettled",
        "An earlier change of the sync set may still be under way: that is settled first.",
        "",
    ),
    m(
        "sync_waiting",
        "A sync set counts only when its members have flushed all that was acknowledged before.",
        "",
    ),
    m(
        "taking_slots",
        "This standby restarts its PostgreSQL with copies of the leader's logical replication slots, so that they survive a failover to it.",
        "",
    ),
    m(
        "unfit",
        "This member had better not lead, for the reason given; it is elected only if nobody else can be.",
        "Mend what it names.",
    ),
    m(
        "unknown_data",
        "There is a database here and the coordinator knows of no cluster: it is not touched.",
        "Restore the coordinator's files, or start with an empty directory.",
    ),
    m(
        "upstream_away",
        "The standby that this member should stream from (node.upstream) does not stream from the leader: the leader is followed until it does.",
        "Look at that member; craton explain of it says what it does.",
    ),
    m(
        "waiting_for_checkpoint",
        "pg_rewind needs the new leader's first checkpoint.",
        "",
    ),
    m(
        "waiting_for_founder",
        "There is no cluster yet, and this member is set to wait for another that founds it.",
        "Start that member, or set first_start = \"make\".",
    ),
    m(
        "waiting_for_initdb",
        "Another member makes the database.",
        "",
    ),
    m(
        "waiting_for_leader",
        "There must be an open leader first.",
        "",
    ),
    m(
        "waiting_for_lease",
        "The elected leader asks the voters for the lease.",
        "",
    ),
    m("won", "This member takes the leadership.", ""),
    m(
        "writes_wait",
        "durability is strict and too few standbys stream: writes wait.",
        "Start the standbys, or `craton config set durability=quorum`.",
    ),
    m(
        "wrong_system_id",
        "The data directory belongs to another cluster.",
        "Move it away to have this member cloned.",
    ),
    m(
        "wrong_timeline",
        "PostgreSQL took a timeline number that was not reserved for it, and is stopped.",
        "Report it: this should not happen. The others elect a new leader.",
    ),
    m(
        "yields",
        "Another member is the better winner of the election.",
        "",
    ),
];

/// What a code means.
pub fn meaning(code: &str) -> Option<&'static Meaning> {
    MEANINGS.iter().find(|m| m.code == code)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The codes that the decision's source names.
    #[allow(clippy::disallowed_methods, reason = "it reads its own source")]
    fn in_source() -> BTreeSet<String> {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files = vec![root.join("decide.rs")];
        let inside = std::fs::read_dir(root.join("decide")).unwrap();
        files.extend(inside.map(|f| f.unwrap().path()));
        let mut codes = BTreeSet::new();
        for file in files
            .into_iter()
            .filter(|f| f.extension().is_some_and(|e| e == "rs"))
        {
            let text = std::fs::read_to_string(file).unwrap();
            for call in text.split("because(").skip(1) {
                if let Some(code) = call.trim_start().strip_prefix('"') {
                    codes.insert(code.split('"').next().unwrap().to_owned());
                }
            }
        }
        codes
    }

    #[test]
    fn every_code_of_the_decision_is_explained_and_no_other() {
        let explained: BTreeSet<String> = MEANINGS.iter().map(|m| m.code.to_owned()).collect();
        let source = in_source();
        assert!(
            source.len() > 60,
            "the codes are not found any more: {source:?}"
        );
        let missing: Vec<_> = source.difference(&explained).collect();
        assert!(
            missing.is_empty(),
            "give these codes their row in MEANINGS: {missing:?}"
        );
        let surplus: Vec<_> = explained.difference(&source).collect();
        assert!(
            surplus.is_empty(),
            "nobody says these any more: {surplus:?}"
        );
        assert!(MEANINGS.is_sorted_by_key(|m| m.code));
    }
}
