//! Connections that other voters make to this one.

use std::sync::Arc;
use std::time::Duration;

use craton_core::MemberId;
use craton_trust::doorstep::{Doorstep, Known, Refusals, WAITING_MAX};
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::driver::Event;
use super::frame::FrameError;
use super::handshake::{Identity, Purpose, Session, accept};
use super::lease::Desk;
use super::members::Members;
use super::peer::{QUESTIONS_MAX, tune};
use super::stats::Stats;
use super::wire::{Announcement, Ask, Call, CallTold, LeaseAsk, Told};
use crate::api::{CALL_TIMEOUT, Presence, PresenceMap};
use crate::clock::Clock;
use crate::raft::Message;

/// Connections at once, proved or not. The voters need four each.
const CONNECTIONS_MAX: usize = 256;

/// The longest announcement, in bytes.
pub(super) const ANNOUNCEMENT_LEN_MAX: usize = 64 * 1024;

/// After a failed accept (no file descriptors), this long until the next.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// What incoming connections lead to.
pub(super) struct Acceptor {
    pub(super) identity: Arc<Identity>,
    pub(super) members: watch::Receiver<Arc<Members>>,
    pub(super) inbox: mpsc::Sender<Event>,
    pub(super) desk: Arc<Desk>,
    pub(super) presence: watch::Sender<PresenceMap>,
    pub(super) clock: Clock,
    pub(super) stats: Arc<Stats>,
}

impl Acceptor {
    /// Accepts for ever. Dropping this ends all its connections.
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener) {
        let refusals = Arc::new(Refusals::new("coordinator"));
        let mut doorstep = Doorstep::new(WAITING_MAX);
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((_, from)) if connections.len() >= CONNECTIONS_MAX => {
                    Stats::count(&self.stats.connections_refused);
                    refusals.count(Some(from), &"too many connections are open");
                }
                Ok((stream, _)) => {
                    let (acceptor, known) = (Arc::clone(&self), Known::default());
                    let (refusals, proved) = (Arc::clone(&refusals), known.clone());
                    let task = connections
                        .spawn(async move { acceptor.serve(stream, &refusals, &proved).await });
                    if doorstep.arrived(task, known) {
                        Stats::count(&self.stats.connections_refused);
                    }
                }
                Err(e) => {
                    tracing::warn!(error = %e, "the coordinator cannot accept a connection");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    async fn serve(self: Arc<Self>, stream: TcpStream, refusals: &Refusals, known: &Known) {
        tune(&stream);
        let from = stream.peer_addr();
        let session = match accept(stream, &self.identity, |_| true).await {
            Ok(session) => session,
            Err(e) => {
                Stats::count(&self.stats.connections_refused);
                return refusals.count(from.ok(), &e);
            }
        };
        known.set();
        let (peer, purpose) = (session.peer.clone(), session.purpose);
        let end = match purpose {
            Purpose::Raft => self.take_raft(session).await,
            Purpose::Presence => self.take_presence(session).await,
            Purpose::Lease => {
                let desk = Arc::clone(&self.desk);
                let holder = peer.clone();
                let answer = move |ask: LeaseAsk| {
                    let (desk, holder) = (Arc::clone(&desk), holder.clone());
                    async move { Some(desk.answer(&holder, ask).await) }
                };
                answer_all(session, answer).await
            }
            Purpose::Call => {
                let (inbox, members) = (self.inbox.clone(), self.members.clone());
                let asker = peer.clone();
                let answer = move |call: Call| {
                    let removed = members.borrow().settled.removed.contains(&asker);
                    let inbox = inbox.clone();
                    async move {
                        Some(match call {
                            _ if removed => CallTold::Removed,
                            Call::AmIMember => CallTold::NotRemoved,
                            call => put_call(&inbox, call).await,
                        })
                    }
                };
                answer_all(session, answer).await
            }
        };
        match end {
            FrameError::Closed | FrameError::Io(_) => {
                tracing::debug!(%peer, ?purpose, end = %end, "a coordinator connection ended");
            }
            FrameError::TimedOut
            | FrameError::TooLong(_)
            | FrameError::NotAuthentic
            | FrameError::NotUnderstood(_) => {
                Stats::count(&self.stats.connections_refused);
                tracing::warn!(%peer, ?purpose, error = %end, "a coordinator connection was cut");
            }
        }
    }

    async fn take_raft(&self, mut session: Session) -> FrameError {
        loop {
            let message: Message = match session.reader.next().await {
                Ok(message) => message,
                Err(e) => return e,
            };
            if message.from != session.peer {
                return FrameError::NotUnderstood(format!(
                    "{} speaks for {}",
                    session.peer, message.from
                ));
            }
            if self.inbox.try_send(Event::Peer(Box::new(message))).is_err() {
                Stats::count(&self.stats.messages_dropped);
            }
        }
    }

    async fn take_presence(&self, mut session: Session) -> FrameError {
        loop {
            let Announcement { value } = match session.reader.next().await {
                Ok(announcement) => announcement,
                Err(e) => return e,
            };
            if value.len() > ANNOUNCEMENT_LEN_MAX {
                return FrameError::TooLong(value.len());
            }
            note_presence(&self.presence, session.peer.clone(), value, self.clock);
        }
    }
}

pub(super) fn note_presence(
    map: &watch::Sender<PresenceMap>,
    who: MemberId,
    value: String,
    clock: Clock,
) {
    let heard_at = clock.now();
    map.send_modify(|map| {
        Arc::make_mut(map).insert(who, Presence { heard_at, value });
    });
}

/// Asks the local core.
pub(super) async fn put_call(inbox: &mpsc::Sender<Event>, call: Call) -> CallTold {
    let (told, answer) = oneshot::channel();
    let (event, doubt) = match call {
        Call::Txn(request) => (Event::Txn(request, told), CallTold::InDoubt),
        Call::Read => (Event::Read(told), CallTold::NotDone),
        Call::Change { change, epoch } => {
            let event = Event::Change {
                change,
                epoch,
                told,
            };
            (event, CallTold::InDoubt)
        }
        Call::AmIMember => return CallTold::NotRemoved,
    };
    if inbox.try_send(event).is_err() {
        return CallTold::Busy;
    }
    match timeout(CALL_TIMEOUT, answer).await {
        Ok(Ok(told)) => told,
        Ok(Err(_)) | Err(_) => doubt,
    }
}

/// Answers questions as they come, each at its own pace, at most [`QUESTIONS_MAX`] at once.
async fn answer_all<Q, A, F>(mut session: Session, answer: impl Fn(Q) -> F) -> FrameError
where
    Q: serde::de::DeserializeOwned,
    A: Serialize + Send + 'static,
    F: Future<Output = Option<A>> + Send + 'static,
{
    let mut under_way: JoinSet<Option<Told<A>>> = JoinSet::new();
    loop {
        tokio::select! {
            question = session.reader.next::<Ask<Q>>(), if under_way.len() < QUESTIONS_MAX => match question {
                Ok(Ask { id, ask }) => {
                    let answer = answer(ask);
                    under_way.spawn(async move { answer.await.map(|told| Told { id, told }) });
                }
                Err(e) => return e,
            },
            Some(done) = under_way.join_next() => {
                if let Ok(Some(told)) = done
                    && let Err(e) = session.writer.send(&told).await
                {
                    return e;
                }
            }
        }
    }
}
