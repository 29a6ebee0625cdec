//! Cancel requests: the key that a client has is the proxy's; the server's is looked up when it is used.
//!
//! A cancel hits whatever the server runs when it arrives. So a server connection towards which one is under way is
//! not given to another client.
//!
//! A statement that waits for standbys is committed already: a cancel would only end the wait, and show a commit that
//! a failover may still undo (failover protocol, 3.3). So such a cancel is not passed on. One that arrives there
//! in the instant between question and cancel is found in the server's warning, and the client told 08007.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use craton_wire::startup::put_cancel_request;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Duration, timeout};

use crate::routes::Target;

/// What to send, and where.
#[derive(Clone, Debug)]
pub struct CancelTarget {
    /// The server.
    pub target: Arc<Target>,
    /// Its process.
    pub process: i32,
    /// Its key.
    pub key: Arc<[u8]>,
}

impl CancelTarget {
    /// Sends the request and waits until the server has taken it.
    pub async fn send(&self, limit: Duration) {
        let mut packet = Vec::new();
        put_cancel_request(&mut packet, self.process, &self.key);
        let work = async {
            let mut stream =
                TcpStream::connect((self.target.host.as_str(), self.target.port)).await?;
            stream.write_all(&packet).await?;
            // The server closes once the signal is sent.
            stream.read(&mut [0; 1]).await
        };
        match timeout(limit, work).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, target = %self.target, "a cancel request did not arrive");
            }
            Err(_) => {
                tracing::debug!(target = %self.target, "a cancel request was not taken in time");
            }
        }
    }
}

#[derive(Debug, Default)]
struct SlotState {
    now: Option<CancelTarget>,
    under_way: u32,
}

/// What a client's key means now.
#[derive(Debug, Default)]
pub struct Slot(Mutex<SlotState>);

impl Slot {
    fn lock(&self) -> std::sync::MutexGuard<'_, SlotState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client is served by this.
    pub fn set(&self, target: CancelTarget) {
        self.lock().now = Some(target);
    }

    /// The client is served by nobody. True when a cancel is on its way to the server that it had.
    pub fn clear(&self) -> bool {
        let mut state = self.lock();
        state.now = None;
        state.under_way > 0
    }
}

/// What became of a cancel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The key is wrong, or nothing runs.
    Nobody,
    /// What runs is committed and waits for standbys.
    Withheld,
    /// The server was told.
    PassedOn,
}

/// All clients' keys.
#[derive(Debug, Default)]
pub struct Cancels(Mutex<BTreeMap<i32, (i32, Arc<Slot>)>>);

impl Cancels {
    /// A new key: process number and secret.
    pub fn register(&self) -> (i32, i32, Arc<Slot>) {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let process = rand::random_range(1..=i32::MAX);
            if let std::collections::btree_map::Entry::Vacant(free) = keys.entry(process) {
                let (secret, slot) = (rand::random(), Arc::new(Slot::default()));
                free.insert((secret, Arc::clone(&slot)));
                return (process, secret, slot);
            }
        }
    }

    /// The client is gone.
    pub fn remove(&self, process: i32) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&process);
    }

    /// Passes a cancel on, if the key is right, the client is being served, and `withheld` does not forbid it.
    pub async fn cancel<W: Future<Output = bool>>(
        &self,
        process: i32,
        key: &[u8],
        limit: Duration,
        withheld: impl FnOnce(CancelTarget) -> W,
    ) -> Outcome {
        let slot = {
            let keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match keys.get(&process) {
                Some((secret, slot)) if secret.to_be_bytes() == key => Arc::clone(slot),
                _ => return Outcome::Nobody,
            }
        };
        let target = {
            let mut state = slot.lock();
            let Some(target) = state.now.clone() else {
                return Outcome::Nobody;
            };
            state.under_way += 1;
            target
        };
        let outcome = if withheld(target.clone()).await {
            Outcome::Withheld
        } else {
            target.send(limit).await;
            Outcome::PassedOn
        };
        slot.lock().under_way -= 1;
        outcome
    }
}
