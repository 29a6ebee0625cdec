//! Connections whose other end is not known yet: few, for a short time, and without filling the log.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

/// How many may wait at once where a port does not say otherwise.
pub const WAITING_MAX: usize = 128;

/// Refusals are told of at most this often; those in between are counted.
pub const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// Set once the other end of a connection has shown who it is. Clones are the same mark.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<AtomicBool>);

impl Known {
    /// From here on the connection is no stranger's.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// See [`Self::set`].
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Strangers at one port. Who comes last is let in, and the one that has waited longest has to go: a flood of
/// connections that say nothing then cannot keep out a peer, which needs milliseconds to show who it is.
#[derive(Debug)]
pub struct Doorstep {
    waiting: VecDeque<(AbortHandle, Known)>,
    waiting_max: usize,
}

impl Doorstep {
    /// With room for `waiting_max` strangers.
    pub fn new(waiting_max: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            waiting_max,
        }
    }

    /// A connection came, served by this task. True if another one had to go for it.
    pub fn arrived(&mut self, task: AbortHandle, known: Known) -> bool {
        self.waiting
            .retain(|(task, known)| !task.is_finished() && !known.is_set());
        self.waiting.push_back((task, known));
        if self.waiting.len() <= self.waiting_max {
            return false;
        }
        if let Some((oldest, _)) = self.waiting.pop_front() {
            oldest.abort();
        }
        true
    }
}

/// Counts refused connections, and tells of them now and then.
#[derive(Debug)]
pub struct Refusals {
    port: &'static str,
    state: Mutex<(u64, Option<Instant>)>,
}

impl Refusals {
    /// For one port; `port` says in the log which.
    pub fn new(port: &'static str) -> Self {
        Self {
            port,
            state: Mutex::new((0, None)),
        }
    }

    /// One more.
    pub fn count(&self, from: Option<SocketAddr>, why: &dyn std::fmt::Display) {
        let refused = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.0 += 1;
            if state.1.is_some_and(|at| at.elapsed() < COMPLAINT_INTERVAL) {
                return;
            }
            state.1 = Some(Instant::now());
            std::mem::take(&mut state.0)
        };
        let from = from.map_or_else(|| "unknown".to_owned(), |a| a.to_string());
        tracing::warn!(port = self.port, refused, from, why = %why, "a connection was refused (others are counted and told of once a minute)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_stranger_makes_room_and_the_known_stay() {
        let mut doorstep = Doorstep::new(2);
        let guest = || tokio::spawn(std::future::pending::<()>());
        let (friend, known) = (guest(), Known::default());
        assert!(!doorstep.arrived(friend.abort_handle(), known.clone()));
        known.set();
        let strangers: Vec<_> = (0..3).map(|_| guest()).collect();
        let pushed: Vec<bool> = strangers
            .iter()
            .map(|s| doorstep.arrived(s.abort_handle(), Known::default()))
            .collect();
        assert_eq!(pushed, [false, false, true]);
        let mut strangers = strangers.into_iter();
        assert!(strangers.next().unwrap().await.unwrap_err().is_cancelled());
        assert!(!friend.is_finished());
        assert!(strangers.all(|s| !s.is_finished()));
    }
}
