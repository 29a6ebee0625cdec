//! A server connection between two transactions, and what is known of it.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use craton_wire::backend::{Fields, parameter_status};
use craton_wire::frame::frame;
use craton_wire::frontend::{put_query, put_terminate};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::cancel::CancelTarget;
use crate::metrics::ProxyMetrics;
use crate::pool::Place;
use crate::routes::Target;
use crate::sql::{FOLLOWED, Made, difference};
use crate::statements::OnServer;

/// The most bytes that a server may say on its own while nobody uses the connection.
const IDLE_BYTES_MAX: usize = 16 * 1024;

/// The most bytes of the answer to a few SETs.
const SET_ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Values of the parameters in [`FOLLOWED`], as the server reports them.
pub type Values = [Vec<u8>; FOLLOWED.len()];

/// The place of a parameter in [`Values`]; names are not case-sensitive.
pub fn followed_index(name: &[u8]) -> Option<usize> {
    FOLLOWED
        .iter()
        .position(|f| f.as_bytes().eq_ignore_ascii_case(name))
}

/// Everything about a server connection but its socket.
#[derive(Debug)]
pub struct Facts {
    /// Its place in the pool.
    pub _place: Place,
    /// The server.
    pub target: Arc<Target>,
    /// How to cancel what it runs.
    pub cancel: CancelTarget,
    /// Settings that are in force on it.
    pub values: Values,
    /// Settings that were made on it and are not reported.
    pub made: Arc<Made>,
    /// Prepared statements that it has.
    pub statements: OnServer,
    /// The number of its unnamed statement; 0: it has none that anybody knows.
    pub unnamed: u64,
    /// It is not to be used again.
    pub tainted: bool,
    /// When it was made.
    pub opened: Instant,
    /// Since when nobody uses it.
    pub idle_since: Instant,
    /// Counts it as busy on its target while it is in use.
    pub busy: Option<Busy>,
    /// Counts it as open.
    pub _counted: Counted,
}

/// A transaction that runs on a target.
#[derive(Debug)]
pub struct Busy(Arc<Target>);

impl Busy {
    /// Counts one more.
    pub fn on(target: &Arc<Target>) -> Self {
        target.busy.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(target))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts a server connection in the metrics as long as it lives.
#[derive(Debug)]
pub struct Counted(Arc<ProxyMetrics>);

impl Counted {
    /// Counts one more.
    pub fn new(metrics: &Arc<ProxyMetrics>) -> Self {
        metrics.servers.inc();
        metrics.servers_opened.inc();
        Self(Arc::clone(metrics))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.servers.dec();
    }
}

/// A server connection on its worker's event loop.
#[derive(Debug)]
pub struct Server {
    /// The socket.
    pub stream: TcpStream,
    /// The rest.
    pub facts: Facts,
}

/// A server connection on its way to another worker.
#[derive(Debug)]
pub struct Parked {
    stream: std::net::TcpStream,
    facts: Facts,
}

impl Server {
    /// Takes it off this event loop.
    pub fn park(self) -> io::Result<Parked> {
        Ok(Parked {
            stream: self.stream.into_std()?,
            facts: self.facts,
        })
    }

    /// Puts it on this event loop.
    pub fn unpark(parked: Parked) -> io::Result<Self> {
        Ok(Self {
            stream: TcpStream::from_std(parked.stream)?,
            facts: parked.facts,
        })
    }

    /// Ends it in good order.
    pub fn close(self) {
        let mut out = Vec::new();
        put_terminate(&mut out);
        // If it does not fit, the server sees the connection end instead.
        let _ = self.stream.try_write(&out);
    }

    /// Reads what the server said while nobody listened. False when the connection is of no more use.
    /// Costs no system call as long as nothing has arrived.
    pub fn is_alive(&mut self) -> bool {
        let mut said = Vec::new();
        let mut piece = [0; 1024];
        loop {
            match self.stream.try_read(&mut piece) {
                Ok(0) => return false,
                Ok(n) => said.extend_from_slice(piece.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
            if said.len() > IDLE_BYTES_MAX {
                return false;
            }
        }
        let mut rest = said.as_slice();
        while let Ok(Some((message, len))) = frame(rest, IDLE_BYTES_MAX) {
            match message.tag {
                b'S' => self.facts.note_parameter(message.body),
                b'N' | b'A' => {}
                _ => return false,
            }
            rest = rest.get(len..).unwrap_or_default();
        }
        rest.is_empty()
    }

    /// Sets what differs from `wanted`. What the server makes of a value is written back, so that it compares equal
    /// the next time. The error is the server's, or the socket's.
    pub async fn apply(&mut self, wanted: &mut Values, made: &Arc<Made>) -> Result<(), ApplyError> {
        let mut sql = String::new();
        for ((name, wanted), value) in FOLLOWED.iter().zip(wanted.iter()).zip(&self.facts.values) {
            if wanted != value {
                let text = String::from_utf8_lossy(wanted)
                    .replace('\\', "\\\\")
                    .replace('\'', "''");
                // Writing to a String cannot fail.
                let _ = write!(sql, "SET {name} TO E'{text}';");
            }
        }
        if self.facts.made != *made {
            sql.push_str(&difference(&self.facts.made, made));
        }
        if sql.is_empty() {
            return Ok(());
        }
        self.set(&sql).await?;
        self.facts.made = Arc::clone(made);
        wanted.clone_from(&self.facts.values);
        Ok(())
    }

    async fn set(&mut self, sql: &str) -> Result<(), ApplyError> {
        let (mut out, mut said) = (Vec::new(), Vec::new());
        put_query(&mut out, sql);
        let mut refused = None;
        let mut rest = out.as_slice();
        loop {
            while !rest.is_empty() {
                self.stream.writable().await?;
                match self.stream.try_write(rest) {
                    Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e.into()),
                }
            }
            self.stream.readable().await?;
            match self.stream.try_read_buf(&mut said) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e.into()),
            }
            if said.len() > SET_ANSWER_BYTES_MAX {
                return Err(io::Error::from(io::ErrorKind::InvalidData).into());
            }
            while let Some((message, len)) =
                frame(&said, SET_ANSWER_BYTES_MAX).map_err(io::Error::other)?
            {
                match message.tag {
                    b'S' => self.facts.note_parameter(message.body),
                    b'E' => {
                        let fields = Fields::new(message.body);
                        if fields.is_fatal() {
                            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                        }
                        refused = Some((
                            String::from_utf8_lossy(fields.code()).into_owned(),
                            fields.message(),
                        ));
                    }
                    b'Z' if len == said.len() => {
                        return refused.map_or(Ok(()), |(code, message)| {
                            Err(ApplyError::Refused { code, message })
                        });
                    }
                    b'Z' => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
                    _ => {}
                }
                said.drain(..len);
            }
        }
    }
}

/// Why a session's settings are not in force.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server does not take a value.
    #[error("{message}")]
    Refused {
        /// SQLSTATE.
        code: String,
        /// The server's message.
        message: String,
    },
}

impl Facts {
    /// Takes over a ParameterStatus; the index and the value if it is a followed one.
    pub fn note_parameter(&mut self, body: &[u8]) {
        if let Ok((name, value)) = parameter_status(body)
            && let Some(place) = followed_index(name).and_then(|i| self.values.get_mut(i))
        {
            place.clear();
            place.extend_from_slice(value);
        }
    }
}
