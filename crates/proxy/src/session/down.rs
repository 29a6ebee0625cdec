//! What the server says.

use std::sync::Arc;

use craton_wire::backend::{
    Fields, Report, TransactionStatus, command_tag, parameter_status, put_empty, put_error,
};
use craton_wire::frame::{BODY_LEN_MAX, HEADER_LEN, Header, header};

use super::{Gone, Loss, Owed, Session};
use crate::buffer::CAPACITY;
use crate::metrics::Tally;
use crate::routes::Endpoint;
use crate::server::followed_index;
use crate::sql::{Effect, Made, Traits, effect};

/// Bytes of an error or a notice that are looked at; code, severity and message come first.
const REPORT_PREFIX: usize = 8 * 1024;

/// What has to happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// What was decided has to be written first.
    Flush,
    /// More bytes have to arrive.
    More,
}

impl Session {
    /// Decides on everything that has arrived from the server.
    pub(super) fn scan_down(&mut self) -> Result<Step, Gone> {
        loop {
            if !self.down.continue_body() {
                return Ok(Step::Flush);
            }
            if self.down.in_message() {
                return Ok(Step::More);
            }
            self.put_own_answers();
            let found = match header(self.down.unseen(), BODY_LEN_MAX) {
                Ok(Some(found)) => found,
                Ok(None) => return Ok(Step::More),
                Err(error) => {
                    self.server_lost(Loss::Broken(error.to_string()))?;
                    return Ok(Step::More);
                }
            };
            if !self.down.can_forward() {
                return Ok(Step::Flush);
            }
            // Rows are what most bytes are: they go through without a second look.
            if matches!(found.tag, b'D' | b'd') && !self.hushed {
                let whole = found.frame_len() <= CAPACITY;
                if whole && self.down.unseen().len() < found.frame_len() {
                    return Ok(Step::More);
                }
                self.down.pass(found.frame_len());
                continue;
            }
            let wanted = match found.tag {
                b'E' | b'N' => found.frame_len().min(REPORT_PREFIX),
                _ if found.frame_len() <= CAPACITY => found.frame_len(),
                _ => HEADER_LEN,
            };
            if self.down.unseen().len() < wanted {
                return Ok(Step::More);
            }
            if self.on_message(found)? == Some(Step::Flush) {
                return Ok(Step::Flush);
            }
            if self.link.is_none() {
                return Ok(Step::More);
            }
        }
    }

    /// Sends the proxy's own answers whose turn has come.
    fn put_own_answers(&mut self) {
        while let Some(Owed::Own(tag)) = self.owed.front() {
            let tag = *tag;
            self.owed.pop_front();
            if !self.hushed {
                put_empty(self.down.insert(), tag);
            }
        }
    }

    /// One message, of which at least the beginning is there.
    fn on_message(&mut self, found: Header) -> Result<Option<Step>, Gone> {
        let len = found.frame_len();
        let keep = |s: &mut Self| {
            s.down.pass(len);
            Ok(None)
        };
        let swallow = match (found.tag, self.owed.front()) {
            (b'1', Some(Owed::Prepare { .. })) | (b'3', Some(Owed::Evict { .. })) => true,
            (b'N', _) => self.is_unconfirmed_commit(),
            (b'Z' | b'S' | b'A' | b'E', _) => false,
            _ => self.hushed,
        };
        if swallow && !self.down.can_drop() {
            return Ok(Some(Step::Flush));
        }
        match found.tag {
            b'Z' => return self.on_ready(found),
            b'E' => return self.on_error(found),
            b'N' if swallow => self.tell_unconfirmed(),
            b'N' | b'A' | b't' | b'H' | b'c' | b'V' | b'D' | b'd' => {}
            b'S' => self.on_parameter(),
            b'C' => self.on_complete(),
            b'I' | b's' => self.pop_execute(),
            b'1' | b'2' | b'3' => {
                if !self.is_due(found.tag) {
                    return self.broken(found.tag);
                }
                self.owed.pop_front();
            }
            b'T' | b'n' => {
                if self.owed.front() == Some(&Owed::Describe) {
                    self.owed.pop_front();
                }
            }
            b'G' => {
                self.copy_in = true;
                // Syncs that were sent ahead are ignored by a server in COPY (postgres.c, copyfromparse.c).
                self.owed.retain(|o| *o != Owed::Sync);
            }
            other => return self.broken(other),
        }
        if swallow {
            self.down.drop_message(len);
            return Ok(None);
        }
        keep(self)
    }

    fn broken(&mut self, tag: u8) -> Result<Option<Step>, Gone> {
        self.server_lost(Loss::Broken(format!("message {tag:#04x} was not expected")))?;
        Ok(None)
    }

    fn is_due(&self, tag: u8) -> bool {
        matches!(
            (tag, self.owed.front()),
            (
                b'1',
                Some(Owed::Parse { .. } | Owed::ParsePlain | Owed::Prepare { .. })
            ) | (b'2', Some(Owed::Bind))
                | (b'3', Some(Owed::Close | Owed::Evict { .. }))
        )
    }

    fn pop_execute(&mut self) {
        if matches!(self.owed.front(), Some(Owed::Execute(_))) {
            self.owed.pop_front();
        }
    }

    fn server_body(&self) -> &[u8] {
        self.down.unseen().get(HEADER_LEN..).unwrap_or_default()
    }

    fn on_ready(&mut self, found: Header) -> Result<Option<Step>, Gone> {
        let body = self.server_body().get(..found.body_len).unwrap_or_default();
        let Ok(status) = TransactionStatus::parse(body) else {
            return self.broken(found.tag);
        };
        // Answers that were still owed in front of it will not come.
        loop {
            match self.owed.pop_front() {
                Some(Owed::Query(_) | Owed::Sync) => break,
                Some(_) => {}
                None => return self.broken(found.tag),
            }
        }
        self.status = status;
        self.keep_changes();
        self.hushed = false;
        self.copy_in = false;
        if status == TransactionStatus::Idle {
            Tally::add(&self.worker.tally.transactions, 1);
            if self.owed.is_empty() {
                self.traits = Traits::NONE;
            }
        }
        self.down.pass(found.frame_len());
        Ok(None)
    }

    fn on_error(&mut self, found: Header) -> Result<Option<Step>, Gone> {
        let fields = Fields::new(self.server_body());
        if fields.is_fatal() {
            let loss = Loss::fatal(fields);
            self.server_lost(loss)?;
            return Ok(None);
        }
        if self.hushed && !self.down.can_drop() {
            return Ok(Some(Step::Flush));
        }
        let deposed = fields.code() == b"25006" && self.settings.endpoint == Endpoint::Write;
        if let Some(link) = self.link.as_mut().filter(|_| deposed) {
            // Perhaps the client's own READ ONLY; perhaps a primary that is none any more.
            tracing::info!(target = %link.server.facts.target, "a write was refused as read-only; not used again");
            link.server.facts.tainted = true;
        }
        self.copy_in = false;
        // A failure undoes the settings of its transaction.
        self.confirmed.clear();
        self.skip_to_sync();
        if self.hushed {
            self.down.drop_message(found.frame_len());
        } else {
            self.down.pass(found.frame_len());
        }
        Ok(None)
    }

    /// After an error the server ignores everything up to the next Sync; a simple query just ends.
    fn skip_to_sync(&mut self) {
        loop {
            match self.owed.front() {
                Some(Owed::Sync | Owed::Query(_)) => return,
                None => {
                    self.server_skips = true;
                    return;
                }
                Some(_) => {}
            }
            match self.owed.pop_front() {
                Some(Owed::Parse { id, name }) => {
                    self.forget_statement(&name, id);
                    self.forget_on_server(id);
                }
                Some(Owed::Prepare { id }) => self.forget_on_server(id),
                // It was not closed, so it is still there.
                Some(Owed::Evict { id }) => {
                    if let Some(link) = &mut self.link {
                        link.server.facts.statements.touch(id);
                    }
                }
                Some(Owed::ParsePlain) => {
                    self.unnamed.id = 0;
                    self.forget_on_server(0);
                }
                _ => {}
            }
        }
    }

    /// The server does not have this statement; 0: the unnamed one.
    fn forget_on_server(&mut self, id: u64) {
        if let Some(link) = &mut self.link {
            if id == 0 {
                link.server.facts.unnamed = 0;
            } else {
                link.server.facts.statements.forget(id);
            }
        }
    }

    fn is_unconfirmed_commit(&self) -> bool {
        Fields::new(self.server_body()).is_cancelled_sync_wait()
    }

    /// A commit that no standby confirmed must not look like one that lasts.
    fn tell_unconfirmed(&mut self) {
        self.worker.shared.metrics.unknown_outcomes.inc();
        self.hushed = true;
        let report = Report {
            severity: "ERROR",
            code: "08007",
            message: "the wait for the standbys was cancelled: whether the commit lasts is unknown",
            detail: "The transaction is committed on this server, but not confirmed by the standbys. \
                     It is lost if the server fails before it is.",
            hint: "Find out what happened before the transaction is repeated.",
        };
        put_error(self.down.insert(), report);
    }

    fn on_parameter(&mut self) {
        let body = self.down.unseen().get(HEADER_LEN..).unwrap_or_default();
        let Some((_, announced)) = header(self.down.unseen(), BODY_LEN_MAX)
            .ok()
            .flatten()
            .map(|h| (h.tag, h.body_len))
        else {
            return;
        };
        let body = body.get(..announced).unwrap_or(body);
        let Some(link) = &mut self.link else {
            return;
        };
        link.server.facts.note_parameter(body);
        if let Ok((name, value)) = parameter_status(body)
            && let Some(own) = followed_index(name).and_then(|i| self.settings.values.get_mut(i))
        {
            own.clear();
            own.extend_from_slice(value);
        }
    }

    fn on_complete(&mut self) {
        let tag = command_tag(self.server_body());
        let sets = matches!(tag, b"SET" | b"RESET");
        let mut found = effect(tag, self.traits);
        if let Some(Owed::Query(change) | Owed::Execute(change)) =
            self.owed.front_mut().filter(|_| sets)
            && let Some(change) = change.take()
        {
            self.confirmed.push(*change);
            found = effect(b"", self.traits);
        }
        self.pop_execute();
        self.copy_in = false;
        match found {
            Effect::None => {}
            Effect::Pins => self.pin(),
            Effect::Discards => {
                self.unpin();
                self.set_made(Arc::default());
                self.statements.clear();
                self.forget_all_on_server();
            }
            Effect::Deallocates => {
                self.statements.clear();
                self.forget_all_on_server();
            }
        }
    }

    /// Settings last when their transaction has ended well. Inside of a block it is not known yet whether it will: then
    /// the session stays where it is.
    fn keep_changes(&mut self) {
        if self.confirmed.is_empty() {
            return;
        }
        let changes = std::mem::take(&mut self.confirmed);
        if self.status != TransactionStatus::Idle {
            self.pin();
            return;
        }
        let mut made = Made::clone(&self.made);
        if changes
            .into_iter()
            .try_for_each(|change| change.apply(&mut made))
            .is_none()
        {
            self.pin();
            return;
        }
        self.set_made(Arc::new(made));
    }

    /// What the session has made is what its server has.
    fn set_made(&mut self, made: Arc<Made>) {
        if let Some(link) = &mut self.link {
            link.server.facts.made = Arc::clone(&made);
        }
        self.made = made;
    }

    fn forget_all_on_server(&mut self) {
        self.unnamed.id = 0;
        if let Some(link) = &mut self.link {
            link.server.facts.statements.clear();
            link.server.facts.unnamed = 0;
        }
    }
}
