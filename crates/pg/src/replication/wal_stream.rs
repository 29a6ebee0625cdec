//! A physical WAL stream.

use bytes::Bytes;
use craton_core::{Lsn, TimelineId};
use craton_wire::replication::{StandbyStatus, WalMessage, parse_report, start_physical};
use tokio::time::timeout;

use super::connection::{Frame, unexpected};
use super::{COMMAND_TIMEOUT, ReplicationConnection, ReplicationError, Row, number, position};

/// What a stream brings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WalEvent {
    /// WAL.
    Data {
        /// The position of the first byte.
        start: Lsn,
        /// The end of the WAL on the server.
        server_end: Lsn,
        /// The bytes.
        data: Bytes,
    },
    /// The server is alive.
    Keepalive {
        /// The end of the WAL on the server.
        server_end: Lsn,
        /// It wants a status at once.
        reply_requested: bool,
    },
    /// The timeline has ended on this server; call [`WalStream::finish`].
    TimelineEnd,
}

/// What `START_REPLICATION` led to.
#[derive(Debug)]
pub enum Started {
    /// A stream.
    Streaming(WalStream),
    /// The timeline ended right where the stream should have begun.
    AtTimelineEnd(ReplicationConnection, Option<(TimelineId, Lsn)>),
}

/// A running stream.
#[derive(Debug)]
pub struct WalStream {
    connection: ReplicationConnection,
}

impl ReplicationConnection {
    /// Streams WAL of `timeline` from `start`, with a slot or without.
    pub async fn start_physical(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Started, ReplicationError> {
        self.send_query(&start_physical(slot, start, timeline))
            .await?;
        let first = timeout(COMMAND_TIMEOUT, self.frame()).await.map_err(|_| {
            ReplicationError::Timeout {
                what: "START_REPLICATION",
                limit: COMMAND_TIMEOUT,
            }
        })??;
        match first.tag {
            b'W' => Ok(Started::Streaming(WalStream { connection: self })),
            b'T' => {
                let rows = self.until_ready(COMMAND_TIMEOUT).await?;
                Ok(Started::AtTimelineEnd(self, next_timeline(&rows)?))
            }
            b'E' => Err(ReplicationError::Server(parse_report(&first.body))),
            tag => Err(unexpected(tag, "START_REPLICATION")),
        }
    }
}

impl WalStream {
    /// The next event. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<WalEvent, ReplicationError> {
        let frame = self.connection.frame().await?;
        event(&frame)
    }

    /// The next event if it has been received already.
    pub fn buffered(&mut self) -> Result<Option<WalEvent>, ReplicationError> {
        self.connection
            .buffered_frame()?
            .map(|frame| event(&frame))
            .transpose()
    }

    /// Reports how far this receiver is.
    pub async fn send_status(&mut self, status: &StandbyStatus) -> Result<(), ReplicationError> {
        self.connection.send(b'd', &status.encode()).await
    }

    /// Ends a stream after [`WalEvent::TimelineEnd`]: the connection, idle again, and the timeline
    /// that follows with the position where it forked off.
    pub async fn finish(
        mut self,
    ) -> Result<(ReplicationConnection, Option<(TimelineId, Lsn)>), ReplicationError> {
        self.connection.send(b'c', &[]).await?;
        let rows = self.connection.until_ready(COMMAND_TIMEOUT).await?;
        let next = next_timeline(&rows)?;
        Ok((self.connection, next))
    }
}

fn next_timeline(rows: &[Row]) -> Result<Option<(TimelineId, Lsn)>, ReplicationError> {
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    Ok(Some((
        TimelineId(number(row, 0, "timeline")?),
        position(row, 1)?,
    )))
}

fn event(frame: &Frame) -> Result<WalEvent, ReplicationError> {
    match frame.tag {
        b'd' => Ok(match WalMessage::parse(&frame.body)? {
            WalMessage::Data { start, end, data } => WalEvent::Data {
                start,
                server_end: end,
                data: frame.body.slice_ref(data),
            },
            WalMessage::Keepalive {
                end,
                reply_requested,
            } => WalEvent::Keepalive {
                server_end: end,
                reply_requested,
            },
        }),
        b'c' => Ok(WalEvent::TimelineEnd),
        b'E' => Err(ReplicationError::Server(parse_report(&frame.body))),
        // The end of a stream that the server shuts down: it says goodbye with CommandComplete.
        b'C' => Err(ReplicationError::Closed),
        tag => Err(unexpected(tag, "a WAL stream")),
    }
}
