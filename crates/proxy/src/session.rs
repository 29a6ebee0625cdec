//! One client after its login: its messages up to a server, the server's down to it.
//!
//! # Layout
//! * here: the loop, and how a session gets and gives back its server connection
//! * `up`: what the client says
//! * `down`: what the server says
//! * `loss`: what becomes of a session whose server is gone
//!
//! The session keeps a list of the answers that the server owes. It is what tells whether a transaction is over,
//! which answers are the proxy's own business, and, when the server is lost, which statements have no known outcome.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use craton_wire::backend::{Report, TransactionStatus, put_error, put_parameter_status, put_ready};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::backend::ConnectError;
use crate::buffer::{Fill, Flow};
use crate::cancel::Slot;
use crate::metrics::Tally;
use crate::pool::LocalPool;
use crate::routes::{Endpoint, Routes};
use crate::server::{ApplyError, Server, Values};
use crate::sql::{Change, FOLLOWED, Inspector, Made, Traits};
use crate::statements::Statement;
use crate::worker::{AcquireError, Who, Worker};

mod down;
mod loss;
mod up;

use loss::Loss;

/// How many buffers a session may pass on before others get their turn.
const TURNS_MAX: usize = 16;

/// How often a session tries another server connection because its settings could not be set on one.
const ADOPTIONS_MAX: usize = 5;

/// What a login found out.
pub struct Settings {
    /// Whose server connections it uses.
    pub who: Who,
    /// Which port it came to.
    pub endpoint: Endpoint,
    /// Its values of the followed parameters.
    pub values: Values,
    /// It keeps its server connection until it leaves.
    pub session_mode: bool,
    /// The process number of its key.
    pub process: i32,
    /// What its key means.
    pub cancel: Arc<Slot>,
}

/// The client is gone, or has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Gone;

impl From<std::io::Error> for Gone {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

/// An answer that the server owes.
#[derive(Debug, PartialEq, Eq)]
enum Owed {
    /// Everything up to the ReadyForQuery of a simple query or function call; the setting that it changes.
    Query(Option<Box<Change>>),
    /// The ReadyForQuery of a Sync.
    Sync,
    /// ParseComplete of a named statement; the client's name of it.
    Parse { id: u64, name: Box<[u8]> },
    /// ParseComplete of the unnamed statement, or of one that is not followed.
    ParsePlain,
    /// ParseComplete that only the proxy waits for; 0: of the unnamed statement.
    Prepare { id: u64 },
    /// BindComplete.
    Bind,
    /// RowDescription or NoData.
    Describe,
    /// CommandComplete, EmptyQueryResponse or PortalSuspended; the setting that is changed.
    Execute(Option<Box<Change>>),
    /// CloseComplete.
    Close,
    /// CloseComplete that only the proxy waits for.
    Evict { id: u64 },
    /// Not owed by the server: an empty message of this type that the proxy sends in its turn.
    Own(u8),
}

/// The server connection in use.
struct Link {
    server: Server,
    pool: Rc<LocalPool>,
}

/// The unnamed statement as the client prepared it; its buffer is used again and again.
#[derive(Default)]
struct Unnamed {
    id: u64,
    rest: Vec<u8>,
    traits: Traits,
    change: Option<Change>,
}

/// A client.
pub struct Session {
    worker: Rc<Worker>,
    client: TcpStream,
    settings: Settings,
    routes: watch::Receiver<Arc<Routes>>,
    stopping: watch::Receiver<bool>,
    up: Flow,
    down: Flow,
    link: Option<Link>,
    owed: VecDeque<Owed>,
    status: TransactionStatus,
    /// It has state on its server that cannot be moved.
    pinned: bool,
    /// Its unnamed statement is too long to be remembered and has not been bound yet.
    sticky: bool,
    /// The server ignores everything up to the next Sync.
    server_skips: bool,
    /// The proxy ignores everything up to the next Sync.
    discards: bool,
    /// What the client sent before it could know of a loss fails as well.
    failing: bool,
    /// The rest of the answer up to ReadyForQuery is withheld: the client was told an error instead.
    hushed: bool,
    /// The server takes CopyData.
    copy_in: bool,
    /// What the next statement is answered with instead of being run.
    lost: Option<Loss>,
    /// What the texts of the current transaction tell.
    traits: Traits,
    inspector: Option<Inspector>,
    /// Settings that the session made and no server reports; they are made again on every server that it uses.
    made: Arc<Made>,
    /// Changes of them that the server has confirmed in the transaction that runs.
    confirmed: Vec<Change>,
    /// The change that the portal bound last makes.
    bound: Option<Change>,
    statements: HashMap<Box<[u8]>, Rc<Statement>>,
    unnamed: Unnamed,
}

/// Why pumping stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pumped {
    /// A socket has to become ready.
    Waits,
    /// It was the others' turn.
    Yields,
    /// The next message needs a server connection, or leave to begin a transaction.
    Link,
}

impl Session {
    /// A session whose client has yet to read `greeting`.
    pub fn new(
        worker: Rc<Worker>,
        client: TcpStream,
        settings: Settings,
        greeting: Vec<u8>,
    ) -> Self {
        let mut down = Flow::new(&worker.spares);
        *down.insert() = greeting;
        Self {
            client,
            settings,
            routes: worker.routes.clone(),
            stopping: worker.stopping.clone(),
            up: Flow::new(&worker.spares),
            down,
            worker,
            link: None,
            owed: VecDeque::new(),
            status: TransactionStatus::Idle,
            pinned: false,
            sticky: false,
            server_skips: false,
            discards: false,
            failing: false,
            hushed: false,
            copy_in: false,
            lost: None,
            traits: Traits::NONE,
            inspector: None,
            made: Arc::default(),
            confirmed: Vec::new(),
            bound: None,
            statements: HashMap::new(),
            unnamed: Unnamed::default(),
        }
    }

    /// Serves the client until it leaves or has to.
    pub async fn run(mut self) {
        while self.step().await.is_ok() {}
        self.count_bytes();
        let Some(mut link) = self.link.take() else {
            return;
        };
        let cancelled = self.settings.cancel.clear();
        if !self.owed.is_empty() {
            // Nobody waits for the answer any more, and a backend does not look for that by itself.
            let cancel = link.server.facts.cancel.clone();
            let limit = self.worker.shared.config.connect_timeout();
            tokio::task::spawn_local(async move { cancel.send(limit).await });
            link.server.facts.tainted = true;
        }
        let clean = self.status == TransactionStatus::Idle && !self.pinned && !self.up.in_message();
        link.server.facts.tainted |=
            cancelled || !clean || !self.down.unseen().is_empty() || self.down.in_message();
        link.pool.give(link.server);
    }

    async fn step(&mut self) -> Result<(), Gone> {
        if *self.stopping.borrow() && self.is_idle() {
            return self.farewell();
        }
        let down = self.pump_down()?;
        match self.pump_up()? {
            Pumped::Link => {
                self.begin().await?;
                // At once: between transactions a server connection is given back by the next look at it.
                self.pump_up().map(|_| ())
            }
            Pumped::Yields => {
                tokio::task::yield_now().await;
                Ok(())
            }
            Pumped::Waits if down == Pumped::Yields => {
                tokio::task::yield_now().await;
                Ok(())
            }
            Pumped::Waits => self.wait().await,
        }
    }

    /// True between transactions, with nothing under way.
    fn is_idle(&self) -> bool {
        self.status == TransactionStatus::Idle
            && self.owed.is_empty()
            && self.up.is_drained()
            && self.lost.is_none()
    }

    fn farewell(&mut self) -> Result<(), Gone> {
        put_error(
            self.down.insert(),
            Report {
                severity: "FATAL",
                code: "57P01",
                message: "the proxy is shutting down",
                detail: "",
                hint: "Connect again; another proxy or the next one takes over.",
            },
        );
        // What does not fit is lost with the connection.
        let _ = self.down.flush(&self.client);
        Err(Gone)
    }

    /// Server to client, until a socket has to become ready.
    fn pump_down(&mut self) -> Result<Pumped, Gone> {
        for _ in 0..TURNS_MAX {
            self.leave_revoked()?;
            if !self.down.flush(&self.client)? {
                return Ok(Pumped::Waits);
            }
            if self.scan_down()? == down::Step::Flush {
                continue;
            }
            self.unlink_if_done();
            if !self.down.is_flushed() {
                continue;
            }
            let Some(link) = &self.link else {
                return Ok(Pumped::Waits);
            };
            match self.down.fill(&link.server.stream) {
                Ok(Fill::Data) => {}
                Ok(Fill::Blocked) => return Ok(Pumped::Waits),
                Ok(Fill::Eof) => self.server_lost(Loss::closed("it closed the connection"))?,
                Err(error) => self.server_lost(Loss::closed(error))?,
            }
        }
        Ok(Pumped::Yields)
    }

    /// Client to server, until a socket has to become ready or a server is needed.
    fn pump_up(&mut self) -> Result<Pumped, Gone> {
        for _ in 0..TURNS_MAX {
            self.leave_revoked()?;
            if !self.up.is_flushed() {
                match self
                    .link
                    .as_ref()
                    .map(|link| self.up.flush(&link.server.stream))
                {
                    Some(Ok(true)) => {}
                    Some(Ok(false)) => return Ok(Pumped::Waits),
                    Some(Err(error)) => self.server_lost(Loss::closed(error))?,
                    None => self.up.abandon(),
                }
            }
            match self.scan_up()? {
                up::Step::Flush => {}
                up::Step::Link => return Ok(Pumped::Link),
                up::Step::Leave => return Err(Gone),
                up::Step::More if !self.up.is_flushed() => {}
                up::Step::More => match self.up.fill(&self.client)? {
                    Fill::Data => {}
                    Fill::Blocked => return Ok(Pumped::Waits),
                    Fill::Eof => return Err(Gone),
                },
            }
        }
        Ok(Pumped::Yields)
    }

    /// Nothing is sent to a server that is not to be used any more, and nothing is believed of it.
    fn leave_revoked(&mut self) -> Result<(), Gone> {
        match &self.link {
            Some(link) if link.server.facts.target.is_revoked() => self.server_lost(Loss::Revoked),
            _ => Ok(()),
        }
    }

    /// Waits until a socket is ready, the routes change, or the proxy stops.
    async fn wait(&mut self) -> Result<(), Gone> {
        let flushed = self.down.flush(&self.client)?;
        let read_client =
            (self.up.is_flushed() && !self.up.is_full()).then_some(Interest::READABLE);
        let client = union(read_client, (!flushed).then_some(Interest::WRITABLE));
        let read_server = flushed.then_some(Interest::READABLE);
        let server = union(
            read_server,
            (!self.up.is_flushed()).then_some(Interest::WRITABLE),
        );
        let link = self.link.as_ref();
        let idle_ms = self.worker.shared.config.client_idle_ms;
        let may_time_out = idle_ms > 0 && link.is_none();
        tokio::select! {
            ready = self.client.ready(client.unwrap_or(Interest::ERROR)), if client.is_some() => {
                ready?;
            }
            () = ready(link, server), if link.is_some() => {}
            _ = self.routes.changed(), if link.is_some() => {}
            told = self.stopping.changed() => {
                // Without its owner the proxy has stopped as well.
                if told.is_err() {
                    return self.farewell();
                }
            }
            () = sleep(Duration::from_millis(idle_ms)), if may_time_out => return self.say_idle(),
        }
        Ok(())
    }

    fn say_idle(&mut self) -> Result<(), Gone> {
        let hint = "client_idle_ms of the proxy is the limit.";
        let message = "terminating connection due to idle-session timeout";
        put_error(
            self.down.insert(),
            Report {
                severity: "FATAL",
                code: "57P05",
                message,
                detail: "",
                hint,
            },
        );
        // What does not fit is lost with the connection.
        let _ = self.down.flush(&self.client);
        Err(Gone)
    }

    /// Gets what the next message needs: a server connection, or the end of a switchover's hold.
    async fn begin(&mut self) -> Result<(), Gone> {
        if self.link.is_some() {
            return self.wait_out_hold().await;
        }
        for _ in 0..ADOPTIONS_MAX {
            let found = self
                .worker
                .acquire_now(&self.settings.who, self.settings.endpoint);
            let acquired = match found {
                Some(found) => Ok(found),
                None => self.acquire().await?,
            };
            match acquired {
                Ok((server, pool)) => {
                    if self.adopt(server, pool).await {
                        return Ok(());
                    }
                }
                Err(error) => {
                    self.refuse_acquire(&error);
                    return Ok(());
                }
            }
        }
        let what = "the session's settings could not be set on a server connection";
        self.refuse("08006", what, "Try again; the proxy's log says more.");
        Ok(())
    }

    /// Waits for a server connection, and watches the client meanwhile.
    async fn acquire(&mut self) -> Result<Result<(Server, Rc<LocalPool>), AcquireError>, Gone> {
        let worker = Rc::clone(&self.worker);
        let who = self.settings.who.clone();
        let acquired = worker.acquire(&who, self.settings.endpoint);
        tokio::pin!(acquired);
        loop {
            self.down.flush(&self.client)?;
            tokio::select! {
                done = &mut acquired => return Ok(done),
                ready = self.client.readable(), if !self.up.is_full() => {
                    ready?;
                    if self.up.fill(&self.client)? == Fill::Eof {
                        return Err(Gone);
                    }
                }
            }
        }
    }

    /// Takes a server connection into use. False when it could not be brought to the session's settings.
    async fn adopt(&mut self, mut server: Server, pool: Rc<LocalPool>) -> bool {
        if server.facts.values != self.settings.values || server.facts.made != self.made {
            let before = self.settings.values.clone();
            let limit = self.worker.shared.config.connect_timeout();
            match timeout(limit, server.apply(&mut self.settings.values, &self.made)).await {
                Ok(Ok(())) => self.report_values(&before),
                Ok(Err(ApplyError::Refused { code, message })) => {
                    pool.give(server);
                    self.refuse(
                        &code,
                        &message,
                        "The session asked for a setting that this server does not take.",
                    );
                    return true;
                }
                Ok(Err(ApplyError::Io(_))) | Err(_) => return false,
            }
        }
        self.settings.cancel.set(server.facts.cancel.clone());
        self.link = Some(Link { server, pool });
        true
    }

    /// Tells the client what the server made of its settings.
    fn report_values(&mut self, before: &Values) {
        for ((name, old), new) in FOLLOWED.iter().zip(before).zip(&self.settings.values) {
            if old != new {
                put_parameter_status(self.down.insert(), name.as_bytes(), new);
            }
        }
    }

    /// A session that kept its server waits, like all others, until a planned switchover is over.
    async fn wait_out_hold(&mut self) -> Result<(), Gone> {
        self.worker.shared.metrics.failover_waits.inc();
        let give_up = Instant::now() + self.worker.shared.config.failover_wait();
        while self.is_held() {
            if timeout_at(give_up, self.routes.changed()).await.is_err() {
                self.worker.shared.metrics.failover_wait_timeouts.inc();
                let what = "a planned switchover holds new transactions, and has not ended in time";
                self.refuse("57P03", what, "See `craton status`, and try again.");
                return Ok(());
            }
            self.leave_revoked()?;
        }
        Ok(())
    }

    /// True when the server in use takes no new transaction now.
    fn is_held(&self) -> bool {
        self.link
            .as_ref()
            .is_some_and(|l| l.server.facts.target.is_primary())
            && self.routes.borrow().hold
    }

    /// Gives the server connection back if the transaction is over and nothing ties the session to it.
    fn unlink_if_done(&mut self) {
        let tied = self.pinned || self.sticky || self.settings.session_mode;
        let done = self.status == TransactionStatus::Idle
            && self.owed.is_empty()
            && !self.copy_in
            && self.up.is_flushed()
            && !self.up.in_message()
            && self.down.unseen().is_empty()
            && !self.down.in_message();
        if tied || !done || self.server_skips {
            return;
        }
        if let Some(mut link) = self.link.take() {
            link.server.facts.tainted |= self.settings.cancel.clear();
            link.pool.give(link.server);
            self.count_bytes();
        }
    }

    fn count_bytes(&mut self) {
        let tally = &self.worker.tally;
        Tally::add(&tally.bytes_to_servers, std::mem::take(&mut self.up.bytes));
        Tally::add(
            &tally.bytes_to_clients,
            std::mem::take(&mut self.down.bytes),
        );
    }

    fn refuse_acquire(&mut self, error: &AcquireError) {
        let text = error.to_string();
        tracing::debug!(user = %self.settings.who.user, error = text, "a transaction got no server");
        match error {
            AcquireError::NoTarget(_) => {
                self.refuse(
                    "57P03",
                    &text,
                    "See `craton status` for what the cluster waits for, and try again.",
                );
            }
            AcquireError::PoolBusy { .. } => {
                self.refuse(
                    "53300",
                    &text,
                    "Raise pool_size of the proxy, or end transactions that stay open.",
                );
            }
            AcquireError::Refused(ConnectError::Refused { code, message, .. }) => {
                let hint = if code == "28P01" {
                    "The password may have been changed: connect again."
                } else {
                    ""
                };
                self.refuse(code, message, hint);
            }
            AcquireError::Refused(_) => self.refuse("08006", &text, ""),
        }
    }

    fn put_ready_idle(&mut self) {
        put_ready(self.down.insert(), TransactionStatus::Idle);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.pinned {
            self.worker.shared.metrics.pinned.dec();
        }
    }
}

fn union(a: Option<Interest>, b: Option<Interest>) -> Option<Interest> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a | b),
        (a, b) => a.or(b),
    }
}

async fn ready(link: Option<&Link>, interest: Option<Interest>) {
    match (link, interest) {
        (Some(link), Some(interest)) => {
            // A failure shows when the socket is used.
            let _ = link.server.stream.ready(interest).await;
        }
        _ => std::future::pending().await,
    }
}
