//! Bytes on their way from one socket to the other.
//!
//! Messages are looked at where they were received and written from there: nothing is copied but what has to be
//! changed. One read buffer a direction, of fixed size, is all the memory that a relay takes, however large a
//! message is; while the receiver is not ready to take more, nothing more is read.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::rc::Rc;

use tokio::net::TcpStream;

/// Bytes of a read buffer. Messages up to this size are seen whole; of longer ones only the beginning is.
pub const CAPACITY: usize = 32 * 1024;

/// How many unused buffers a worker keeps.
const SPARE_MAX: usize = 256;

/// Unused read buffers of one worker, so that idle clients need none.
#[derive(Clone, Debug, Default)]
pub struct Spares(Rc<RefCell<Vec<Box<[u8]>>>>);

impl Spares {
    fn take(&self) -> Box<[u8]> {
        self.0
            .borrow_mut()
            .pop()
            .unwrap_or_else(|| vec![0; CAPACITY].into_boxed_slice())
    }

    fn give(&self, buffer: Box<[u8]>) {
        let mut spares = self.0.borrow_mut();
        if spares.len() < SPARE_MAX {
            spares.push(buffer);
        }
    }
}

/// What a read brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    /// Bytes.
    Data,
    /// Nothing yet.
    Blocked,
    /// The peer has closed its side.
    Eof,
}

/// One direction of a relay. What is written, in this order: `lead`, `forward` bytes of the buffer, `tail`.
#[derive(Debug)]
pub struct Flow {
    spares: Spares,
    data: Option<Box<[u8]>>,
    start: usize,
    end: usize,
    forward: usize,
    lead: Vec<u8>,
    tail: Vec<u8>,
    written: usize,
    body_left: usize,
    body_dropped: bool,
    /// Bytes written since the counter was read.
    pub bytes: u64,
}

impl Flow {
    /// An empty flow; it takes a buffer when something arrives.
    pub fn new(spares: &Spares) -> Self {
        Self {
            spares: spares.clone(),
            data: None,
            start: 0,
            end: 0,
            forward: 0,
            lead: Vec::new(),
            tail: Vec::new(),
            written: 0,
            body_left: 0,
            body_dropped: false,
            bytes: 0,
        }
    }

    /// Bytes that have arrived and are not decided on.
    pub fn unseen(&self) -> &[u8] {
        self.data
            .as_deref()
            .and_then(|d| d.get(self.start + self.forward..self.end))
            .unwrap_or_default()
    }

    /// True when nothing that arrived is left, decided or not.
    pub fn is_drained(&self) -> bool {
        self.start == self.end && self.is_flushed()
    }

    /// True when everything decided has been written.
    pub fn is_flushed(&self) -> bool {
        self.forward == 0 && self.lead.is_empty() && self.tail.is_empty()
    }

    /// True in the middle of a message.
    pub fn in_message(&self) -> bool {
        self.body_left > 0
    }

    /// True in the middle of a message that is being passed on: what was written of it cannot be taken back.
    pub fn in_forwarded_message(&self) -> bool {
        self.body_left > 0 && !self.body_dropped
    }

    /// True when more bytes of the buffer may be passed on before a flush.
    pub fn can_forward(&self) -> bool {
        self.tail.is_empty()
    }

    /// True when bytes may be dropped or put before what follows without a flush.
    pub fn can_drop(&self) -> bool {
        self.forward == 0 && self.tail.is_empty()
    }

    /// Where to put bytes that come after everything decided so far.
    pub fn insert(&mut self) -> &mut Vec<u8> {
        if self.can_drop() {
            &mut self.lead
        } else {
            &mut self.tail
        }
    }

    /// Passes on a message of this length, as far as it has arrived and from then on. Needs [`Self::can_forward`].
    pub fn pass(&mut self, len: usize) {
        self.body_left = len;
        self.body_dropped = false;
        self.continue_body();
    }

    /// Drops a message (or the beginning of one) of this length. Needs [`Self::can_drop`].
    pub fn drop_message(&mut self, len: usize) {
        self.body_left = len;
        self.body_dropped = true;
        self.continue_body();
    }

    /// Whatever is still to come of the message that is being passed on is dropped: its receiver is gone.
    /// So is everything decided and not written.
    pub fn abandon(&mut self) {
        self.start += self.forward;
        self.forward = 0;
        self.lead.clear();
        self.tail.clear();
        self.written = 0;
        self.body_dropped = true;
        self.continue_body();
    }

    /// Forgets what has arrived and is not decided on, and the rest of a message that is being dropped.
    pub fn forget_unseen(&mut self) {
        self.end = self.start + self.forward;
        self.body_left = 0;
    }

    /// How much has arrived of what is left of the current message.
    pub fn body_arrived(&self) -> usize {
        self.body_left.min(self.unseen().len())
    }

    /// Decides on what has arrived of the current message. False when it has to be flushed first.
    pub fn continue_body(&mut self) -> bool {
        if self.body_left == 0 {
            return true;
        }
        let n = self.body_left.min(self.unseen().len());
        if self.body_dropped {
            if self.forward > 0 {
                return false;
            }
            self.start += n;
        } else {
            if !self.can_forward() {
                return false;
            }
            self.forward += n;
        }
        self.body_left -= n;
        true
    }

    /// Reads what there is room for.
    pub fn fill(&mut self, from: &TcpStream) -> io::Result<Fill> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        let spares = &self.spares;
        let data = self.data.get_or_insert_with(|| spares.take());
        if self.start > 0 {
            data.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let Some(room) = data.get_mut(self.end..).filter(|r| !r.is_empty()) else {
            return Ok(Fill::Blocked);
        };
        let filled = match from.try_read(room) {
            Ok(0) => Ok(Fill::Eof),
            Ok(n) => {
                self.end += n;
                Ok(Fill::Data)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Fill::Blocked),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Fill::Data),
            Err(e) => Err(e),
        };
        if self.start == self.end {
            self.release();
        }
        filled
    }

    /// True when no more can be read until something is written.
    pub fn is_full(&self) -> bool {
        self.end - self.start >= CAPACITY
    }

    fn release(&mut self) {
        if let Some(data) = self.data.take() {
            self.spares.give(data);
        }
        self.start = 0;
        self.end = 0;
    }

    /// Writes what is decided. True when all of it is written.
    pub fn flush(&mut self, to: &TcpStream) -> io::Result<bool> {
        while !self.is_flushed() {
            let body = self
                .data
                .as_deref()
                .and_then(|d| d.get(self.start..self.start + self.forward));
            let rest = self.lead.get(self.written..).unwrap_or_default();
            let slices = [
                IoSlice::new(rest),
                IoSlice::new(body.unwrap_or_default()),
                IoSlice::new(&self.tail),
            ];
            match to.try_write_vectored(&slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.start == self.end {
            self.release();
        }
        Ok(true)
    }

    fn advance(&mut self, written: usize) {
        self.bytes += written as u64;
        let from_lead = written.min(self.lead.len() - self.written);
        self.written += from_lead;
        if self.written == self.lead.len() {
            self.lead.clear();
            self.written = 0;
        }
        let from_body = (written - from_lead).min(self.forward);
        self.start += from_body;
        self.forward -= from_body;
        let from_tail = written - from_lead - from_body;
        self.tail.drain(..from_tail.min(self.tail.len()));
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (a, b) = tokio::join!(TcpStream::connect(address), listener.accept());
        (a.unwrap(), b.unwrap().0)
    }

    async fn fill(flow: &mut Flow, from: &TcpStream) {
        let filled = async {
            loop {
                // Said still because of the read before, maybe: then nothing is there yet.
                from.readable().await.unwrap();
                let filled = flow.fill(from).unwrap();
                if filled != Fill::Blocked {
                    return filled;
                }
            }
        };
        let filled = tokio::time::timeout(Duration::from_secs(30), filled).await;
        assert_eq!(filled.unwrap(), Fill::Data);
    }

    #[tokio::test]
    async fn what_is_inserted_and_dropped_keeps_its_place() {
        let (near, source) = pair().await;
        let (sink, far) = pair().await;
        near.try_write(b"headBODYtail").unwrap();
        let mut flow = Flow::new(&Spares::default());
        fill(&mut flow, &source).await;
        flow.insert().extend_from_slice(b"<");
        flow.pass(4);
        assert!(!flow.can_drop() && flow.can_forward());
        flow.insert().extend_from_slice(b">");
        assert!(!flow.can_forward());
        assert!(flow.flush(&sink).unwrap());
        flow.drop_message(4);
        flow.pass(10);
        assert!(flow.in_forwarded_message());
        assert!(flow.flush(&sink).unwrap());
        flow.abandon();
        assert!(flow.in_message() && !flow.in_forwarded_message());
        near.try_write(b"123456Z").unwrap();
        fill(&mut flow, &source).await;
        assert!(flow.continue_body());
        assert_eq!(flow.unseen(), b"Z");
        flow.pass(1);
        assert!(flow.flush(&sink).unwrap() && flow.is_drained());
        let mut got = Vec::new();
        while got.len() < 11 {
            far.readable().await.unwrap();
            let mut part = [0; 64];
            if let Ok(n) = far.try_read(&mut part) {
                got.extend_from_slice(&part[..n]);
            }
        }
        assert_eq!(got, b"<head>tailZ");
        assert_eq!(flow.bytes, 11);
    }
}
