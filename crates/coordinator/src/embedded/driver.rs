//! The task that owns the Raft core: events in, what is ready out. It never waits for a disk or a peer.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::disk::Disk;
use super::lease::Desk;
use super::links::Links;
use super::members::Members;
use super::wire::CallTold;
use crate::api::Snapshot;
use crate::clock::Clock;
use crate::kv::{Request, Store};
use crate::raft::{
    Change, ChangeRefused, Entry, Index, Message, NotNow, Payload, Raft, RaftTerm, RoleName,
    Standing, Status, Timings, Write,
};

/// Events that wait for the core; beyond it, peers' messages are dropped and callers told that it is busy.
pub(super) const INBOX_MAX: usize = 1024;

/// Events handled before what they gave rise to is carried out.
const BATCH_MAX: usize = 128;

/// The log is replaced by an image when it has this many applied entries.
const COMPACT_ENTRIES: u64 = 1024;

pub(super) enum Event {
    Peer(Box<Message>),
    Txn(Request, oneshot::Sender<CallTold>),
    Read(oneshot::Sender<CallTold>),
    Change {
        change: Change,
        epoch: u64,
        told: oneshot::Sender<CallTold>,
    },
}

/// What the rest of the process sees.
#[derive(Clone)]
pub(super) struct View {
    pub(super) status: watch::Receiver<Status>,
    /// The newest state, and the index it is of.
    pub(super) applied: watch::Receiver<Index>,
    pub(super) snapshot: watch::Receiver<Arc<Snapshot>>,
    pub(super) members: watch::Receiver<Arc<Members>>,
}

pub(super) struct Outputs {
    pub(super) status: watch::Sender<Status>,
    pub(super) applied: watch::Sender<Index>,
    pub(super) snapshot: watch::Sender<Arc<Snapshot>>,
    pub(super) members: watch::Sender<Arc<Members>>,
}

/// Both ends of what the rest of the process sees.
pub(super) fn views(raft: &Raft) -> (Outputs, View) {
    let (status_tx, status) = watch::channel(raft.status());
    let (members_tx, members) = watch::channel(Arc::new(members_of(raft)));
    let (applied_tx, applied) = watch::channel(0);
    let (snapshot_tx, snapshot) = watch::channel(Arc::default());
    let out = Outputs {
        status: status_tx,
        applied: applied_tx,
        snapshot: snapshot_tx,
        members: members_tx,
    };
    (
        out,
        View {
            status,
            applied,
            snapshot,
            members,
        },
    )
}

fn members_of(raft: &Raft) -> Members {
    Members {
        settled: raft.settled().clone(),
        latest: raft.latest().clone(),
    }
}

pub(super) struct Driver {
    pub(super) raft: Raft,
    pub(super) clock: Clock,
    pub(super) timings: Timings,
    pub(super) disk: Disk,
    pub(super) desk: Arc<Desk>,
    pub(super) links: Arc<Links>,
    pub(super) inbox: mpsc::Receiver<Event>,
    pub(super) out: Outputs,
    pub(super) state: State,
}

/// The state machine and who waits for it.
#[derive(Default)]
pub(super) struct State {
    store: Store,
    applied: Index,
    txns: BTreeMap<Index, (RaftTerm, oneshot::Sender<CallTold>)>,
    reads: BTreeMap<u64, oneshot::Sender<CallTold>>,
    next_read: u64,
    /// The standing on disk, or on its way there.
    standing: Standing,
    led: bool,
    broken: bool,
}

impl Driver {
    /// Runs until the disk fails or the process stops.
    pub(super) async fn run(mut self) {
        let mut tick = interval(self.timings.heartbeat / 5);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failed = self.disk.failed.clone();

        self.carry_out();
        loop {
            tokio::select! {
                event = self.inbox.recv() => {
                    let Some(event) = event else { return };
                    self.take(event);
                    for _ in 0..BATCH_MAX {
                        let Ok(event) = self.inbox.try_recv() else { break };
                        self.take(event);
                    }
                }
                changed = self.disk.persisted.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let token = *self.disk.persisted.borrow_and_update();
                    self.raft.persisted(self.clock.now(), token);
                }
                _ = failed.changed() => break,
                _ = tick.tick() => self.raft.tick(self.clock.now()),
            }
            self.carry_out();
            if self.state.broken {
                break;
            }
        }
        self.give_up().await;
    }

    fn take(&mut self, event: Event) {
        let now = self.clock.now();
        match event {
            Event::Peer(message) => {
                if let Some(address) = &message.address {
                    self.links.heard(&message.from, address);
                }
                self.raft.step(now, *message);
            }
            Event::Change {
                change,
                epoch,
                told,
            } => self.change(&change, epoch, told),
            Event::Txn(request, told) => self.propose(&request, told),
            Event::Read(told) => {
                self.state.next_read += 1;
                let id = self.state.next_read;
                match self.raft.read(now, id) {
                    Ok(()) => {
                        self.state.reads.insert(id, told);
                    }
                    Err(why) => tell(told, refusal(why)),
                }
            }
        }
    }

    fn propose(&mut self, request: &Request, told: oneshot::Sender<CallTold>) {
        let Ok(command) = serde_json::to_string(request) else {
            return tell(told, CallTold::NotDone);
        };
        match self.raft.propose(self.clock.now(), command) {
            Ok((term, index)) => {
                if let Some((_, former)) = self.state.txns.insert(index, (term, told)) {
                    tell(former, CallTold::InDoubt);
                }
            }
            Err(why) => tell(told, refusal(why)),
        }
    }

    fn change(&mut self, change: &Change, epoch: u64, told: oneshot::Sender<CallTold>) {
        if self.raft.latest().epoch != epoch {
            return tell(told, CallTold::Busy);
        }
        match self.raft.change(self.clock.now(), change) {
            Ok((term, index)) => {
                tracing::info!(?change, index, "the members change");
                if let Some((_, former)) = self.state.txns.insert(index, (term, told)) {
                    tell(former, CallTold::InDoubt);
                }
            }
            Err(ChangeRefused::Nothing) => tell(told, CallTold::Changed),
            Err(ChangeRefused::NotNow(why)) => tell(told, refusal(why)),
            Err(ChangeRefused::Pending | ChangeRefused::Behind(_)) => tell(told, CallTold::Busy),
            Err(why) => tell(told, CallTold::Refused(why.to_string())),
        }
    }

    fn carry_out(&mut self) {
        loop {
            let ready = self.raft.ready();
            for (token, write) in ready.writes {
                self.before_write(&write);
                if !self.disk.write(token, write) {
                    self.state.broken = true;
                }
            }
            self.follow_members();
            for message in ready.messages {
                self.links.send(message);
            }
            if let Some(image) = &ready.install {
                match serde_json::from_str(&image.data) {
                    Ok(store) => self.state.install(store, image.last_index),
                    Err(e) => {
                        tracing::error!(error = %e, "the coordinator's image cannot be read; this voter stops");
                        self.state.broken = true;
                    }
                }
            }
            self.state.apply(ready.committed);
            for (id, index) in ready.reads {
                if let Some(told) = self.state.reads.remove(&id) {
                    tell(
                        told,
                        index.map_or(CallTold::NotLeader(None), CallTold::ReadAt),
                    );
                }
            }
            if self.raft.applied_since_image() < COMPACT_ENTRIES {
                break;
            }
            let Ok(data) = serde_json::to_string(&self.state.store) else {
                break;
            };
            self.raft.compact(self.state.applied, data);
        }
        self.publish();
    }

    /// The lease voter's note of what it has to remember must be on disk before the standing is.
    fn before_write(&mut self, write: &Write) {
        if let Write::Hard(hard) = write {
            match (self.state.standing, hard.standing) {
                (Standing::Fresh, Standing::Voter) => self.desk.settle_at_birth(),
                (Standing::Fresh | Standing::Recovering, Standing::Learner) => self.desk.is_new(),
                (_, Standing::Recovering) => self.desk.has_lost(),
                _ => {}
            }
            self.state.standing = hard.standing;
        }
    }

    fn follow_members(&mut self) {
        let (settled, latest) = (self.raft.settled(), self.raft.latest());
        let same = |m: &Members| m.settled == *settled && m.latest == *latest;
        if same(&self.out.members.borrow()) {
            return;
        }
        self.links.follow(settled, latest);
        self.out
            .members
            .send_replace(Arc::new(members_of(&self.raft)));
    }

    fn publish(&mut self) {
        let status = self.raft.status();
        let leads = status.role == RoleName::Leader;
        if self.state.led && !leads {
            self.state.doubt_all();
        }
        self.state.led = leads;
        if let Some(fault) = &status.fault {
            tracing::error!(
                fault,
                "the coordinator found an invariant broken; this voter stops"
            );
            self.state.broken = true;
        }
        let snapshot = self.state.store.snapshot();
        self.out.snapshot.send_if_modified(|old| {
            let newer = !Arc::ptr_eq(old, &snapshot) && old.revision != snapshot.revision;
            if newer {
                *old = Arc::clone(&snapshot);
            }
            newer
        });
        let applied = self.state.applied;
        self.out
            .applied
            .send_if_modified(|old| std::mem::replace(old, applied) != applied);
        self.out.status.send_if_modified(|old| {
            let changed = *old != status;
            if changed {
                if old.leader != status.leader || old.standing != status.standing {
                    tracing::info!(
                        term = status.term, leader = ?status.leader, standing = ?status.standing, role = ?status.role,
                        "coordinator"
                    );
                }
                *old = status;
            }
            changed
        });
    }

    /// Nothing more is taken or said; callers go to other members.
    async fn give_up(mut self) {
        self.state.doubt_all();
        self.state.reads.clear();
        self.out.status.send_modify(|status| {
            status.role = RoleName::Follower;
            status.leader = None;
            status
                .fault
                .get_or_insert_with(|| "the disk failed".to_owned());
        });
        while let Some(event) = self.inbox.recv().await {
            if let Event::Txn(_, told) | Event::Read(told) | Event::Change { told, .. } = event {
                tell(told, CallTold::NotLeader(None));
            }
        }
    }
}

fn is_change(payload: &Payload) -> bool {
    matches!(payload, Payload::Configure(_))
}

/// The caller may have given up.
fn tell(told: oneshot::Sender<CallTold>, what: CallTold) {
    let _ = told.send(what);
}

fn refusal(why: NotNow) -> CallTold {
    match why {
        NotNow::NotLeader(leader) => CallTold::NotLeader(leader),
        NotNow::Busy => CallTold::Busy,
    }
}

impl State {
    pub(super) fn new(standing: Standing) -> Self {
        Self {
            standing,
            ..Self::default()
        }
    }

    fn install(&mut self, store: Store, index: Index) {
        self.store = store;
        self.applied = index;
        let later = self.txns.split_off(&(index + 1));
        for (_, (_, told)) in std::mem::replace(&mut self.txns, later) {
            tell(told, CallTold::InDoubt);
        }
    }

    fn apply(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.applied = entry.index;
            let waiting = self.txns.remove(&entry.index);
            let outcome = match &entry.payload {
                Payload::Command(text) => match serde_json::from_str::<Request>(text) {
                    Ok(request) => Some(self.store.apply(&request)),
                    // Every member reads the same text with the same result: all leave it out.
                    Err(e) => {
                        tracing::error!(index = entry.index, error = %e, "a command is not understood and left out");
                        None
                    }
                },
                Payload::Noop | Payload::Readmit { .. } | Payload::Configure(_) => None,
            };
            if let Some((term, told)) = waiting {
                let what = match outcome {
                    Some(applied) if term == entry.term => CallTold::Applied(applied),
                    None if term == entry.term && is_change(&entry.payload) => CallTold::Changed,
                    _ => CallTold::NotDone,
                };
                tell(told, what);
            }
        }
    }

    /// Leadership is lost: what was appended may be committed by the next leader, or not.
    fn doubt_all(&mut self) {
        for (_, (_, told)) in std::mem::take(&mut self.txns) {
            tell(told, CallTold::InDoubt);
        }
    }
}
