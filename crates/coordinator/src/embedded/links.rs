//! Ways to the other members, which come and go with the configuration.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use craton_core::MemberId;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::handshake::{Identity, Purpose};
use super::lease::LeaseAsker;
use super::peer::{Asker, RaftQueue, Target, carry_presence, carry_raft};
use super::stats::Stats;
use super::wire::{Call, CallTold};
use crate::raft::{Configuration, Message};

/// Links at once: to all members, and to some that are not known yet.
const LINKS_MAX: usize = 64;

pub(super) type CallAsker = Asker<Call, CallTold>;

/// One peer: a connection for each purpose, which end with this.
struct Link {
    address: String,
    raft: RaftQueue,
    calls: CallAsker,
    lease: LeaseAsker,
    tasks: Vec<AbortHandle>,
}

impl Drop for Link {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

#[derive(Default)]
struct Book {
    links: BTreeMap<MemberId, Link>,
    /// Where peers say that they are; newer than what the log says.
    heard: BTreeMap<MemberId, String>,
}

/// All of them.
pub(super) struct Links {
    identity: Arc<Identity>,
    stats: Arc<Stats>,
    pub(super) announcement: watch::Sender<Option<String>>,
    /// Where to look first: the settings file.
    seeds: BTreeMap<MemberId, String>,
    book: Mutex<Book>,
}

impl Links {
    pub(super) fn new(
        identity: &Arc<Identity>,
        stats: &Arc<Stats>,
        seeds: &BTreeMap<MemberId, String>,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity: Arc::clone(identity),
            stats: Arc::clone(stats),
            announcement: watch::Sender::new(None),
            seeds: seeds.clone(),
            book: Mutex::default(),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // Nothing panics half-way through a change of it.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Links to exactly the members; to the seeds while the members are not known.
    pub(super) fn follow(&self, settled: &Configuration, latest: &Configuration) {
        let mut book = self.book();
        let mut wanted: BTreeMap<MemberId, String> = BTreeMap::new();
        if latest.voters.is_empty() {
            wanted.clone_from(&self.seeds);
        }
        // One that is being removed is told so as long as that is not committed.
        for config in [settled, latest] {
            for member in config.members() {
                let known = book.heard.get(member);
                let known = known.or_else(|| config.addresses.get(member));
                if let Some(address) = known.or_else(|| self.seeds.get(member)) {
                    wanted.insert(member.clone(), address.clone());
                }
            }
        }
        wanted.remove(&self.identity.me);
        book.links
            .retain(|peer, link| wanted.get(peer) == Some(&link.address));
        book.heard.retain(|peer, _| wanted.contains_key(peer));
        for (peer, address) in wanted {
            self.link(&mut book, peer, address);
        }
    }

    /// A peer says where it is.
    pub(super) fn heard(&self, peer: &MemberId, address: &str) {
        let mut book = self.book();
        let same = book.links.get(peer).is_some_and(|l| l.address == address);
        if same || *peer == self.identity.me {
            return;
        }
        let known = book.links.remove(peer).is_some();
        if known || book.links.len() < LINKS_MAX {
            tracing::info!(%peer, address, "the coordinator reaches a peer there from now on");
            book.heard.insert(peer.clone(), address.to_owned());
            self.link(&mut book, peer.clone(), address.to_owned());
        }
    }

    fn link(&self, book: &mut Book, peer: MemberId, address: String) {
        if book.links.contains_key(&peer) {
            return;
        }
        let target = Target {
            identity: Arc::clone(&self.identity),
            peer: peer.clone(),
            address: address.clone(),
            stats: Arc::clone(&self.stats),
        };
        let raft = RaftQueue::new(Arc::clone(&self.stats));
        let (lease, carry_lease) = Asker::new(target.clone(), Purpose::Lease);
        let (calls, carry_calls) = Asker::new(target.clone(), Purpose::Call);
        let presence = carry_presence(target.clone(), self.announcement.subscribe());
        let tasks = vec![
            tokio::spawn(carry_raft(target, raft.clone())).abort_handle(),
            tokio::spawn(presence).abort_handle(),
            tokio::spawn(carry_lease).abort_handle(),
            tokio::spawn(carry_calls).abort_handle(),
        ];
        let link = Link {
            address,
            raft,
            calls,
            lease,
            tasks,
        };
        book.links.insert(peer, link);
    }

    /// Sends a Raft message, or drops it: Raft says it again.
    pub(super) fn send(&self, message: Message) {
        if let Some(link) = self.book().links.get(&message.to) {
            link.raft.push(message);
        }
    }

    pub(super) fn lease(&self, peer: &MemberId) -> Option<LeaseAsker> {
        self.book().links.get(peer).map(|l| l.lease.clone())
    }

    pub(super) fn call(&self, peer: &MemberId) -> Option<CallAsker> {
        self.book().links.get(peer).map(|l| l.calls.clone())
    }

    /// Everybody there is a link to.
    pub(super) fn peers(&self) -> Vec<MemberId> {
        self.book().links.keys().cloned().collect()
    }

    /// Where a peer is reached now.
    pub(super) fn address(&self, peer: &MemberId) -> Option<String> {
        self.book().links.get(peer).map(|l| l.address.clone())
    }

    /// Ends all connections.
    pub(super) fn close(&self) {
        self.book().links.clear();
    }
}
