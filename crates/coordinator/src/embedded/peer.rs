//! Connections to the other voters: each purpose its own, made at once and made again with back-off.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_core::MemberId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::frame::FrameError;
use super::handshake::{Identity, Purpose, Session, dial};
use super::stats::Stats;
use super::wire::{Announcement, Ask, Told};
use crate::api::CALL_TIMEOUT;
use crate::raft::Message;

/// Raft messages that wait for one peer; beyond it the oldest is dropped (Raft sends again).
const RAFT_QUEUE_MAX: usize = 512;

/// Questions that wait for, or at, one peer.
pub(super) const QUESTIONS_MAX: usize = 128;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// A peer that does not acknowledge at the TCP level for this long is gone.
const TCP_SILENCE_MAX: Duration = Duration::from_secs(4);

/// Where a peer is, and who asks.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) identity: Arc<Identity>,
    pub(super) peer: MemberId,
    pub(super) address: String,
    pub(super) stats: Arc<Stats>,
}

/// No delay for small messages, and an end to connections whose other side has vanished.
pub(super) fn tune(stream: &TcpStream) {
    let silence = u32::try_from(TCP_SILENCE_MAX.as_millis()).unwrap_or(u32::MAX);
    // Best effort: without these, a vanished peer is noticed later.
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(stream, silence);
    let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
    let _ = rustix::net::sockopt::set_tcp_keepidle(stream, Duration::from_secs(2));
    let _ = rustix::net::sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1));
    let _ = rustix::net::sockopt::set_tcp_keepcnt(stream, 3);
}

impl Target {
    async fn connect(&self, purpose: Purpose) -> Result<Session, String> {
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.address))
            .await
            .map_err(|_| format!("no connection within {} ms", CONNECT_TIMEOUT.as_millis()))?
            .map_err(|e| e.to_string())?;
        tune(&stream);
        let session = dial(stream, &self.identity, &self.peer, purpose)
            .await
            .map_err(|e| e.to_string())?;
        Stats::count(&self.stats.reconnects);
        Ok(session)
    }

    /// Waits a little longer after each failure in a row; says what is wrong when it changes.
    fn complain(&self, purpose: Purpose, why: String, last: &mut String) {
        if *last != why {
            tracing::warn!(peer = %self.peer, address = %self.address, ?purpose, why, "the coordinator cannot reach a peer");
            *last = why;
        }
    }
}

struct Backoff {
    next: Duration,
    last: String,
}

impl Backoff {
    fn new() -> Self {
        Self {
            next: BACKOFF_MIN,
            last: String::new(),
        }
    }

    fn reset(&mut self) {
        *self = Self::new();
    }

    async fn wait(&mut self) {
        sleep(self.next).await;
        self.next = (self.next * 2).min(BACKOFF_MAX);
    }
}

/// Raft messages for one peer, newest kept.
#[derive(Clone)]
pub(super) struct RaftQueue {
    waiting: Arc<(Mutex<VecDeque<Message>>, Notify)>,
    stats: Arc<Stats>,
}

impl RaftQueue {
    pub(super) fn new(stats: Arc<Stats>) -> Self {
        Self {
            waiting: Arc::default(),
            stats,
        }
    }

    pub(super) fn push(&self, message: Message) {
        let mut queue = self
            .waiting
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        queue.push_back(message);
        if queue.len() > RAFT_QUEUE_MAX {
            queue.pop_front();
            Stats::count(&self.stats.messages_dropped);
        }
        self.waiting.1.notify_one();
    }

    fn pop(&self) -> Option<Message> {
        self.waiting
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    fn clear(&self) {
        self.waiting
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

/// Carries Raft messages to one peer for ever.
pub(super) async fn carry_raft(target: Target, queue: RaftQueue) {
    let mut backoff = Backoff::new();
    loop {
        let why = match target.connect(Purpose::Raft).await {
            Ok(mut session) => {
                backoff.reset();
                // What waited is of the time before; Raft says it again.
                queue.clear();
                loop {
                    let Some(message) = queue.pop() else {
                        tokio::select! {
                            () = queue.waiting.1.notified() => continue,
                            end = session.reader.next::<Told<()>>() => break end.err().unwrap_or(FrameError::Closed).to_string(),
                        }
                    };
                    if let Err(e) = session.writer.send(&message).await {
                        break e.to_string();
                    }
                }
            }
            Err(why) => why,
        };
        target.complain(Purpose::Raft, why, &mut backoff.last);
        backoff.wait().await;
    }
}

/// Carries the newest announcement to one peer for ever.
pub(super) async fn carry_presence(target: Target, mut own: watch::Receiver<Option<String>>) {
    let mut backoff = Backoff::new();
    loop {
        if let Ok(mut session) = target.connect(Purpose::Presence).await {
            backoff.reset();
            own.mark_changed();
            loop {
                tokio::select! {
                    changed = own.changed() => if changed.is_err() { return },
                    _ = session.reader.next::<Told<()>>() => break,
                }
                let value = own.borrow_and_update().clone();
                let Some(value) = value else { continue };
                if session.writer.send(&Announcement { value }).await.is_err() {
                    break;
                }
            }
        }
        backoff.wait().await;
    }
}

struct Question<Q, A> {
    asked: Instant,
    ask: Q,
    told: oneshot::Sender<A>,
}

/// The question never left this process, and never will.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NotSent;

/// Asks one peer questions over one connection.
pub(super) struct Asker<Q, A> {
    questions: mpsc::Sender<Question<Q, A>>,
    connected: watch::Receiver<bool>,
}

impl<Q, A> Clone for Asker<Q, A> {
    fn clone(&self) -> Self {
        Self {
            questions: self.questions.clone(),
            connected: self.connected.clone(),
        }
    }
}

impl<Q, A> Asker<Q, A>
where
    Q: Serialize + Send + Sync + 'static,
    A: DeserializeOwned + Send + 'static,
{
    /// The asker, and the task that carries its questions for ever.
    pub(super) fn new(
        target: Target,
        purpose: Purpose,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (questions, queue) = mpsc::channel(QUESTIONS_MAX);
        let (connected_tx, connected) = watch::channel(false);
        (
            Self {
                questions,
                connected,
            },
            carry_questions(target, purpose, queue, connected_tx),
        )
    }

    /// Puts a question on its way now; the answer is awaited separately, and may be given up.
    pub(super) fn ask(&self, ask: Q) -> Result<oneshot::Receiver<A>, NotSent> {
        if !*self.connected.borrow() {
            return Err(NotSent);
        }
        let (told, answer) = oneshot::channel();
        let question = Question {
            asked: Instant::now(),
            ask,
            told,
        };
        self.questions.try_send(question).map_err(|_| NotSent)?;
        Ok(answer)
    }
}

async fn carry_questions<Q, A>(
    target: Target,
    purpose: Purpose,
    mut queue: mpsc::Receiver<Question<Q, A>>,
    connected: watch::Sender<bool>,
) where
    Q: Serialize + Send + Sync + 'static,
    A: DeserializeOwned + Send + 'static,
{
    let mut backoff = Backoff::new();
    loop {
        let why = match target.connect(purpose).await {
            Ok(session) => {
                backoff.reset();
                connected.send_replace(true);
                let why = converse(session, &mut queue).await;
                connected.send_replace(false);
                // Dropped unanswered: to the askers they are lost, which is the cautious reading.
                while queue.try_recv().is_ok() {}
                match why {
                    Some(e) => e.to_string(),
                    None => return,
                }
            }
            Err(why) => why,
        };
        target.complain(purpose, why, &mut backoff.last);
        backoff.wait().await;
    }
}

/// Until the connection fails, or (`None`) nobody is left to ask.
async fn converse<Q: Serialize, A: DeserializeOwned>(
    mut session: Session,
    queue: &mut mpsc::Receiver<Question<Q, A>>,
) -> Option<FrameError> {
    let mut waiting: BTreeMap<u64, (Instant, oneshot::Sender<A>)> = BTreeMap::new();
    let mut next_id = 0;
    loop {
        // A peer that leaves a question unanswered for this long is not there, whatever TCP says.
        let oldest = waiting
            .first_key_value()
            .map(|(_, (asked, _))| *asked + CALL_TIMEOUT * 2);
        let silence = async {
            match oldest {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            question = queue.recv() => {
                let Question { asked, ask, told } = question?;
                if asked.elapsed() > CALL_TIMEOUT {
                    continue;
                }
                next_id += 1;
                waiting.insert(next_id, (asked, told));
                if let Err(e) = session.writer.send(&Ask { id: next_id, ask }).await {
                    return Some(e);
                }
            }
            told = session.reader.next::<Told<A>>() => match told {
                Ok(Told { id, told }) => {
                    if let Some((_, asker)) = waiting.remove(&id) {
                        // It may have given up.
                        let _ = asker.send(told);
                    }
                }
                Err(e) => return Some(e),
            },
            () = silence => return Some(FrameError::TimedOut),
        }
    }
}
