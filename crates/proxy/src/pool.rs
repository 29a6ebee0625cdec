//! Pools of server connections: the limit is the process's, the connections are the workers'.
//!
//! A worker uses its own unused connections without a lock. Only when it has none does it look at the shared
//! account: there may be a place for a new connection, or it has to wait until some worker gives one away. A
//! connection then moves to the other worker's event loop.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::server::{Busy, Parked, Server};

/// Whose connections a pool holds, and to where.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PoolKey {
    /// [`crate::routes::Target::id`].
    pub target: u64,
    /// The user.
    pub user: Arc<str>,
    /// The database.
    pub database: Arc<str>,
    /// Startup parameters that cannot be changed later.
    pub options: Arc<[(String, String)]>,
}

/// What a waiting client gets.
#[derive(Debug)]
pub enum Grant {
    /// A connection.
    Server(Box<Parked>),
    /// The right to make one.
    Place(Place),
}

#[derive(Debug, Default)]
struct Account {
    open: usize,
    waiting: VecDeque<oneshot::Sender<Grant>>,
}

/// The account of one pool, shared by all workers.
#[derive(Debug)]
pub struct SharedPool {
    max: usize,
    account: Mutex<Account>,
    waiting: AtomicUsize,
}

/// The right to one connection. Dropping it gives the right to the next who waits.
#[derive(Debug)]
pub struct Place(Option<Arc<SharedPool>>);

/// What the account says.
#[derive(Debug)]
pub enum Reserved {
    /// There is room for one more connection.
    Place(Place),
    /// Somebody has to give one away first.
    Wait(oneshot::Receiver<Grant>),
}

impl SharedPool {
    /// A pool of at most `max` connections.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            account: Mutex::default(),
            waiting: AtomicUsize::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, or a place in the queue. The queue is as long as there are clients, at most.
    pub fn reserve(self: &Arc<Self>) -> Reserved {
        let mut account = self.lock();
        if account.open < self.max {
            account.open += 1;
            return Reserved::Place(Place(Some(Arc::clone(self))));
        }
        let (grant, granted) = oneshot::channel();
        account.waiting.retain(|w| !w.is_closed());
        account.waiting.push_back(grant);
        self.waiting.store(account.waiting.len(), Ordering::SeqCst);
        Reserved::Wait(granted)
    }

    /// True when somebody waits. Cheap: asked whenever a connection is given back.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    fn next_waiting(&self) -> Option<oneshot::Sender<Grant>> {
        let mut account = self.lock();
        let found = loop {
            match account.waiting.pop_front() {
                Some(waiting) if waiting.is_closed() => {}
                found => break found,
            }
        };
        self.waiting.store(account.waiting.len(), Ordering::SeqCst);
        found
    }

    /// Gives a connection to the next who waits; hands it back when nobody does.
    fn hand_over(&self, server: Server) -> Option<Server> {
        let Some(waiting) = self.next_waiting() else {
            return Some(server);
        };
        // A connection that cannot be moved is closed, and its place goes to the next.
        let parked = server.park().ok()?;
        match waiting.send(Grant::Server(Box::new(parked))) {
            Err(Grant::Server(parked)) => {
                Server::unpark(*parked).ok().and_then(|s| self.hand_over(s))
            }
            Ok(()) | Err(Grant::Place(_)) => None,
        }
    }

    fn release_place(self: Arc<Self>) {
        let mut shared = self;
        loop {
            let next = {
                let mut account = shared.lock();
                let next = loop {
                    match account.waiting.pop_front() {
                        Some(waiting) if waiting.is_closed() => {}
                        found => break found,
                    }
                };
                shared
                    .waiting
                    .store(account.waiting.len(), Ordering::SeqCst);
                if next.is_none() {
                    account.open = account.open.saturating_sub(1);
                }
                next
            };
            let Some(next) = next else {
                return;
            };
            match next.send(Grant::Place(Place(Some(Arc::clone(&shared))))) {
                // Taken back without dropping it, which would come here again.
                Err(Grant::Place(mut place)) => match place.0.take() {
                    Some(again) => shared = again,
                    None => return,
                },
                Ok(()) | Err(Grant::Server(_)) => return,
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.release_place();
        }
    }
}

/// One worker's unused connections of a pool.
#[derive(Debug)]
pub struct LocalPool {
    /// The account.
    pub shared: Arc<SharedPool>,
    idle: RefCell<Vec<Server>>,
    lifetime: Duration,
}

impl LocalPool {
    /// An empty pool.
    pub fn new(shared: Arc<SharedPool>, lifetime: Duration) -> Self {
        Self {
            shared,
            idle: RefCell::default(),
            lifetime,
        }
    }

    /// The connection that was used last, if one is left that works.
    pub fn take(&self) -> Option<Server> {
        loop {
            let mut server = self.idle.borrow_mut().pop()?;
            if !server.facts.target.is_revoked() && server.is_alive() {
                server.facts.busy = Some(Busy::on(&server.facts.target));
                return Some(server);
            }
        }
    }

    /// Takes a connection back, and gives it to whoever waits for one.
    pub fn give(&self, mut server: Server) {
        server.facts.busy = None;
        let facts = &server.facts;
        if facts.tainted || facts.target.is_revoked() || facts.opened.elapsed() > self.lifetime {
            server.close();
            return;
        }
        server.facts.idle_since = Instant::now();
        let kept = if self.shared.is_wanted() {
            self.shared.hand_over(server)
        } else {
            Some(server)
        };
        self.idle.borrow_mut().extend(kept);
    }

    /// Gives unused connections to clients of other workers that wait.
    pub fn share(&self) {
        while self.shared.is_wanted() {
            let Some(server) = self.idle.borrow_mut().pop() else {
                return;
            };
            if let Some(kept) = self.shared.hand_over(server) {
                self.idle.borrow_mut().push(kept);
                return;
            }
        }
    }

    /// Closes what is dead, revoked, or unused for longer than `idle_max`. True when nothing is left.
    pub fn tidy(&self, idle_max: Duration) -> bool {
        let mut idle = self.idle.borrow_mut();
        for mut server in std::mem::take(&mut *idle) {
            let facts = &server.facts;
            if facts.target.is_revoked() || facts.idle_since.elapsed() > idle_max {
                server.close();
            } else if server.is_alive() {
                idle.push(server);
            }
        }
        idle.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_passed_on() {
        let pool = SharedPool::new(1);
        let Reserved::Place(place) = pool.reserve() else {
            panic!("the first place")
        };
        let Reserved::Wait(gone) = pool.reserve() else {
            panic!("a second place")
        };
        let Reserved::Wait(mut waiting) = pool.reserve() else {
            panic!("a third place")
        };
        drop(gone);
        assert!(pool.is_wanted());
        drop(place);
        assert!(!pool.is_wanted());
        let Ok(Grant::Place(place)) = waiting.try_recv() else {
            panic!("nothing was passed on")
        };
        drop(place);
        assert!(
            matches!(pool.reserve(), Reserved::Place(_)),
            "the place is free again"
        );
        assert_eq!(pool.lock().open, 0);
    }

    #[test]
    fn a_grant_that_nobody_takes_goes_on() {
        let pool = SharedPool::new(1);
        let Reserved::Place(place) = pool.reserve() else {
            panic!()
        };
        let Reserved::Wait(granted) = pool.reserve() else {
            panic!()
        };
        drop(place);
        drop(granted);
        assert_eq!(pool.lock().open, 0);
    }
}
