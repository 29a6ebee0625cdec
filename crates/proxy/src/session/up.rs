//! What the client says.

use std::rc::Rc;
use std::sync::Arc;

use craton_wire::backend::{Report, TransactionStatus, put_command_complete, put_error, put_ready};
use craton_wire::frame::{HEADER_LEN, Header, frame, header, put_cstr};
use craton_wire::frontend::{Named, bind_names, parse_name, put_parse_rest, put_statement};

use super::{Gone, Loss, Owed, Session};
use crate::buffer::CAPACITY;
use crate::metrics::Tally;
use crate::pool_nodes;
use crate::sql::{Change, Inspector, deallocated_name, inspect, is_rollback};
use crate::statements::{Statement, change_of};

/// Bytes of a long message in which the names of statement and portal have to end.
const NAMES_BYTES_MAX: usize = 4 * 1024;

/// What has to happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// What was decided has to be written first.
    Flush,
    /// More bytes have to arrive.
    More,
    /// The message needs a server connection, or leave to begin a transaction.
    Link,
    /// The client goes.
    Leave,
}

/// `None`: decided, on to the next one.
type Decided = Result<Option<Step>, Gone>;

impl Session {
    /// Decides on everything that has arrived from the client.
    pub(super) fn scan_up(&mut self) -> Result<Step, Gone> {
        loop {
            if !self.continue_message() {
                return Ok(Step::Flush);
            }
            if self.up.in_message() {
                return Ok(Step::More);
            }
            if self.up.unseen().is_empty() {
                self.failing = false;
                return Ok(Step::More);
            }
            let found = match header(
                self.up.unseen(),
                self.worker.shared.config.message_bytes_max,
            ) {
                Ok(Some(found)) => found,
                Ok(None) => return Ok(Step::More),
                Err(error) => return self.violation(&error.to_string()),
            };
            // Short messages are seen whole; of long ones the part that holds the names.
            let wanted = if found.frame_len() <= CAPACITY {
                found.frame_len()
            } else {
                NAMES_BYTES_MAX
            };
            if self.up.unseen().len() < wanted {
                return Ok(Step::More);
            }
            if let Some(step) = self.on_client_message(found)? {
                return Ok(step);
            }
        }
    }

    /// Goes on with a message that is longer than the buffer.
    fn continue_message(&mut self) -> bool {
        let before = self.up.unseen().len();
        if let Some(inspector) = self
            .inspector
            .as_mut()
            .filter(|_| self.up.in_message() && self.up.can_forward())
        {
            inspector.feed(
                self.up
                    .unseen()
                    .get(..self.up.body_arrived())
                    .unwrap_or_default(),
            );
        }
        let decided = self.up.continue_body();
        debug_assert!(decided || before == self.up.unseen().len());
        if !self.up.in_message()
            && let Some(mut inspector) = self.inspector.take()
        {
            self.traits = self.traits.and(inspector.finish());
        }
        decided
    }

    /// A client that does not follow the protocol is told so and goes.
    fn violation(&mut self, what: &str) -> Result<Step, Gone> {
        let report = Report {
            severity: "FATAL",
            code: "08P01",
            message: what,
            detail: "",
            hint: "",
        };
        put_error(self.down.insert(), report);
        // What does not fit is lost with the connection.
        let _ = self.down.flush(&self.client);
        Err(Gone)
    }

    fn on_client_message(&mut self, found: Header) -> Decided {
        let tag = found.tag;
        let begins = matches!(tag, b'Q' | b'P' | b'B' | b'D' | b'E' | b'C' | b'F');
        match tag {
            b'X' => return Ok(Some(Step::Leave)),
            b'S' | b'H' | b'd' | b'c' | b'f' => {}
            _ if begins => {}
            other => {
                return self
                    .violation(&format!("invalid frontend message type {other}"))
                    .map(Some);
            }
        }
        if self.discards || (self.server_skips && tag != b'S') {
            return Ok(self.discard(found));
        }
        if begins {
            if self.failing {
                return Ok(self.answer_with(found, &Self::pipelined_loss()));
            }
            if let Some(loss) = self.lost.take() {
                let wished = tag == b'Q'
                    && matches!(loss, Loss::InTransaction(_))
                    && is_rollback(self.text(found));
                if !wished {
                    return Ok(self.answer_with(found, &loss));
                }
            }
        }
        if self.link.is_none() {
            return Ok(self.unlinked(found));
        }
        if begins
            && self.status == TransactionStatus::Idle
            && self.owed.is_empty()
            && self.is_held()
        {
            return Ok(Some(Step::Link));
        }
        if !self.up.can_forward() {
            return Ok(Some(Step::Flush));
        }
        match tag {
            b'Q' => self.on_query(found),
            b'P' => self.on_parse(found),
            b'B' => self.on_bind(found),
            b'D' => self.on_describe(found),
            b'C' => self.on_close(found),
            b'S' if self.copy_in => self.pass(found, None),
            b'S' => {
                self.server_skips = false;
                self.pass(found, Some(Owed::Sync))
            }
            b'E' => {
                Tally::add(&self.worker.tally.queries, 1);
                let change = self.bound.clone().map(Box::new);
                self.pass(found, Some(Owed::Execute(change)))
            }
            b'F' => self.pass(found, Some(Owed::Query(None))),
            b'c' | b'f' => {
                self.copy_in = false;
                self.pass(found, None)
            }
            _ => self.pass(found, None),
        }
    }

    #[expect(
        clippy::unnecessary_wraps,
        reason = "every way to decide on a message has this result"
    )]
    fn pass(&mut self, found: Header, owed: Option<Owed>) -> Decided {
        self.owed.extend(owed);
        self.up.pass(found.frame_len());
        Ok(None)
    }

    /// Drops the message, if that is possible now.
    fn drop_it(&mut self, found: Header) -> Option<Step> {
        if !self.up.can_drop() {
            return Some(Step::Flush);
        }
        self.up.drop_message(found.frame_len());
        None
    }

    /// The message's body, as far as it has arrived.
    fn body(&self, found: Header) -> &[u8] {
        let unseen = self.up.unseen();
        unseen
            .get(HEADER_LEN..found.frame_len().min(unseen.len()))
            .unwrap_or_default()
    }

    /// The text of a Query.
    fn text(&self, found: Header) -> &[u8] {
        let body = self.body(found);
        body.strip_suffix(&[0]).unwrap_or(body)
    }

    fn discard(&mut self, found: Header) -> Option<Step> {
        if let Some(step) = self.drop_it(found) {
            return Some(step);
        }
        if found.tag == b'S' {
            self.discards = false;
            self.put_ready_idle();
        }
        None
    }

    /// Answers a statement with a loss instead of running it.
    fn answer_with(&mut self, found: Header, loss: &Loss) -> Option<Step> {
        if let Some(step) = self.drop_it(found) {
            return Some(step);
        }
        self.tell(loss);
        self.end_statement(found.tag);
        None
    }

    /// After an error of the proxy's own: a simple query is over, everything else up to the next Sync is ignored.
    fn end_statement(&mut self, tag: u8) {
        if matches!(tag, b'Q' | b'F') {
            self.put_ready_idle();
        } else {
            self.discards = true;
        }
    }

    /// Refuses the statement that waits for a server connection.
    pub(super) fn refuse(&mut self, code: &str, message: &str, hint: &str) {
        let Ok(Some(found)) = header(
            self.up.unseen(),
            self.worker.shared.config.message_bytes_max,
        ) else {
            return;
        };
        if self.drop_it(found).is_none() {
            put_error(
                self.down.insert(),
                Report {
                    severity: "ERROR",
                    code,
                    message,
                    detail: "",
                    hint,
                },
            );
            self.end_statement(found.tag);
        }
    }

    /// Without a server connection: what needs none is answered here.
    fn unlinked(&mut self, found: Header) -> Option<Step> {
        match found.tag {
            b'S' => {
                if let Some(step) = self.drop_it(found) {
                    return Some(step);
                }
                self.put_ready_idle();
                None
            }
            // A server ignores these outside of COPY, and a Flush has nothing to flush.
            b'H' | b'd' | b'c' | b'f' => self.drop_it(found),
            b'Q' if self.shows_nodes(found) => self.show_nodes(found),
            b'Q' => match self.deallocates(found) {
                Some(name) => self.deallocate(found, &name),
                None => Some(Step::Link),
            },
            b'C' => match self.closes_followed(found) {
                Some(name) => self.close_followed(found, &name),
                None => Some(Step::Link),
            },
            _ => Some(Step::Link),
        }
    }

    /// The name, if this is a `DEALLOCATE` of a statement that the server knows under another one.
    fn deallocates(&self, found: Header) -> Option<Box<[u8]>> {
        if found.frame_len() > CAPACITY
            || !self.owed.is_empty()
            || self.status == TransactionStatus::Failed
        {
            return None;
        }
        let name = deallocated_name(self.text(found))?;
        self.statements.contains_key(name).then(|| name.into())
    }

    fn deallocate(&mut self, found: Header, name: &[u8]) -> Option<Step> {
        if let Some(step) = self.drop_it(found) {
            return Some(step);
        }
        self.statements.remove(name);
        put_command_complete(self.down.insert(), "DEALLOCATE");
        put_ready(self.down.insert(), self.status);
        None
    }

    /// True for a statement about the proxy's servers, which no server has to be asked for.
    fn shows_nodes(&self, found: Header) -> bool {
        found.frame_len() <= CAPACITY
            && self.owed.is_empty()
            && self.status != TransactionStatus::Failed
            && pool_nodes::is_asked(self.text(found))
    }

    fn show_nodes(&mut self, found: Header) -> Option<Step> {
        if let Some(step) = self.drop_it(found) {
            return Some(step);
        }
        let routes = Arc::clone(&self.routes.borrow());
        let configured = &self.worker.shared.config.pool_nodes;
        pool_nodes::put_answer(self.down.insert(), configured, &routes);
        put_ready(self.down.insert(), self.status);
        None
    }

    fn on_query(&mut self, found: Header) -> Decided {
        if self.shows_nodes(found) {
            return Ok(self.show_nodes(found));
        }
        if let Some(name) = self.deallocates(found) {
            return Ok(self.deallocate(found, &name));
        }
        Tally::add(&self.worker.tally.queries, 1);
        let mut change = None;
        if found.frame_len() <= CAPACITY {
            self.traits = self.traits.and(inspect(self.text(found)));
            change = Change::read(self.text(found)).map(Box::new);
        } else {
            self.inspect_rest(found);
        }
        // A simple query ends the unnamed statement (exec_simple_query).
        self.forget_unnamed();
        self.sticky = false;
        self.pass(found, Some(Owed::Query(change)))
    }

    /// Looks at a message that is longer than the buffer while it passes.
    fn inspect_rest(&mut self, found: Header) {
        let mut inspector = Inspector::default();
        inspector.feed(self.body(found));
        self.inspector = Some(inspector);
    }

    fn forget_unnamed(&mut self) {
        self.unnamed.id = 0;
        if let Some(link) = &mut self.link {
            link.server.facts.unnamed = 0;
        }
    }

    fn on_parse(&mut self, found: Header) -> Decided {
        if found.frame_len() > CAPACITY {
            return self.on_long_parse(found);
        }
        let body = self
            .up
            .unseen()
            .get(HEADER_LEN..found.frame_len())
            .unwrap_or_default();
        let Ok((name, rest)) = parse_name(body) else {
            return self.violation("a malformed Parse message").map(Some);
        };
        let instead = self.instead_of(rest);
        if !name.is_empty() {
            let (name, rest): (Box<[u8]>, Box<[u8]>) = (name.into(), rest.into());
            return self.on_named_parse(found, name, instead.as_deref().unwrap_or(&rest));
        }
        if let Some(rest) = instead {
            return Ok(self.on_unnamed_nodes(found, rest));
        }
        let id = self.worker.statements.borrow().next_id();
        let (traits, change) = (inspect(rest), change_of(rest));
        let mut kept = std::mem::take(&mut self.unnamed.rest);
        kept.clear();
        kept.extend_from_slice(rest);
        self.unnamed = super::Unnamed {
            id,
            rest: kept,
            traits,
            change,
        };
        self.sticky = false;
        self.traits = self.traits.and(traits);
        if let Some(link) = &mut self.link {
            link.server.facts.unnamed = id;
        }
        self.pass(found, Some(Owed::ParsePlain))
    }

    /// What a server is to prepare in the place of a statement about the proxy's servers.
    fn instead_of(&self, rest: &[u8]) -> Option<Vec<u8>> {
        pool_nodes::is_parsed(rest).then(|| {
            let configured = &self.worker.shared.config.pool_nodes;
            pool_nodes::as_parse(configured, &self.routes.borrow())
        })
    }

    fn on_unnamed_nodes(&mut self, found: Header, rest: Vec<u8>) -> Option<Step> {
        if let Some(step) = self.drop_it(found) {
            return Some(step);
        }
        let id = self.worker.statements.borrow().next_id();
        put_parse_rest(self.up.insert(), b"", &rest);
        self.unnamed = super::Unnamed {
            id,
            traits: inspect(&rest),
            change: None,
            rest,
        };
        self.sticky = false;
        if let Some(link) = &mut self.link {
            link.server.facts.unnamed = id;
        }
        self.owed.push_back(Owed::ParsePlain);
        None
    }

    /// A statement that is too long to be remembered goes through as it is. Unnamed, it keeps the server until it was
    /// bound; named, it pins the session.
    fn on_long_parse(&mut self, found: Header) -> Decided {
        let Ok((name, _)) = parse_name(self.body(found)) else {
            return self
                .violation("the name of a prepared statement is too long")
                .map(Some);
        };
        if name.is_empty() {
            self.forget_unnamed();
            self.sticky = true;
        } else {
            self.pin();
        }
        self.inspect_rest(found);
        self.pass(found, Some(Owed::ParsePlain))
    }

    fn on_named_parse(&mut self, found: Header, name: Box<[u8]>, rest: &[u8]) -> Decided {
        if !self.up.can_drop() {
            return Ok(Some(Step::Flush));
        }
        if let Some(known) = self.statements.get(&name).map(Rc::clone) {
            // The server says, in its own words, that there is one already.
            self.prepare(&known);
            self.up.drop_message(found.frame_len());
            put_parse_rest(
                self.up.insert(),
                Statement::server_name(known.id).as_bytes(),
                rest,
            );
            self.owed.push_back(Owed::ParsePlain);
            return Ok(None);
        }
        if self.statements.len() >= self.worker.shared.config.statements_per_client_max {
            let what =
                "too many prepared statements; statements_per_client_max of the proxy is the limit";
            return self.violation(what).map(Some);
        }
        let statement = self.worker.statements.borrow_mut().intern(rest);
        self.traits = self.traits.and(statement.traits);
        self.up.drop_message(found.frame_len());
        self.statements.insert(name.clone(), Rc::clone(&statement));
        let known = self
            .link
            .as_mut()
            .is_some_and(|l| l.server.facts.statements.touch(statement.id));
        if known {
            self.own_answer(b'1');
            return Ok(None);
        }
        put_parse_rest(
            self.up.insert(),
            Statement::server_name(statement.id).as_bytes(),
            rest,
        );
        self.owed.push_back(Owed::Parse {
            id: statement.id,
            name,
        });
        self.evict();
        Ok(None)
    }

    /// An answer of the proxy's own, after everything that the server owes.
    fn own_answer(&mut self, tag: u8) {
        if self.owed.is_empty() {
            craton_wire::backend::put_empty(self.down.insert(), tag);
        } else {
            self.owed.push_back(Owed::Own(tag));
        }
    }

    /// Sees to it that the server has a statement. The place in front of the current message must be free.
    fn prepare(&mut self, statement: &Statement) {
        self.traits = self.traits.and(statement.traits);
        let Some(link) = &mut self.link else {
            return;
        };
        if link.server.facts.statements.touch(statement.id) {
            return;
        }
        put_parse_rest(
            self.up.insert(),
            Statement::server_name(statement.id).as_bytes(),
            &statement.rest,
        );
        self.owed.push_back(Owed::Prepare { id: statement.id });
        self.evict();
    }

    /// The same for the unnamed statement. False when it must be flushed first.
    fn prepare_unnamed(&mut self) -> bool {
        let id = self.unnamed.id;
        let Some(link) = self
            .link
            .as_mut()
            .filter(|l| id != 0 && l.server.facts.unnamed != id)
        else {
            self.traits = self.traits.and(self.unnamed.traits);
            return true;
        };
        if !self.up.can_drop() {
            return false;
        }
        link.server.facts.unnamed = id;
        put_parse_rest(self.up.insert(), b"", &self.unnamed.rest);
        self.owed.push_back(Owed::Prepare { id: 0 });
        self.traits = self.traits.and(self.unnamed.traits);
        true
    }

    /// Closes what a server connection has too many of.
    fn evict(&mut self) {
        let max = self.worker.shared.config.statements_per_server_max;
        let Some(link) = &mut self.link else {
            return;
        };
        while let Some(old) = link.server.facts.statements.evict(max) {
            put_statement(
                self.up.insert(),
                b'C',
                Statement::server_name(old).as_bytes(),
            );
            self.owed.push_back(Owed::Evict { id: old });
        }
    }

    fn on_bind(&mut self, found: Header) -> Decided {
        let Some((portal, name, names_len)) = bind_names(self.body(found)) else {
            return self.violation("a malformed Bind message").map(Some);
        };
        if name.is_empty() {
            self.sticky = false;
            if !self.prepare_unnamed() {
                return Ok(Some(Step::Flush));
            }
            self.bound.clone_from(&self.unnamed.change);
            return self.pass(found, Some(Owed::Bind));
        }
        let Some(statement) = self.statements.get(name).map(Rc::clone) else {
            self.bound = None;
            return self.pass(found, Some(Owed::Bind));
        };
        if !self.up.can_drop() {
            return Ok(Some(Step::Flush));
        }
        let portal: Box<[u8]> = portal.into();
        self.prepare(&statement);
        self.bound.clone_from(&statement.change);
        let server_name = Statement::server_name(statement.id);
        let rest = found.body_len - names_len;
        let announced = 4 + portal.len() + server_name.len() + 2 + rest;
        self.up.drop_message(HEADER_LEN + names_len);
        let out = self.up.insert();
        out.push(b'B');
        out.extend_from_slice(&i32::try_from(announced).unwrap_or(i32::MAX).to_be_bytes());
        put_cstr(out, &portal);
        put_cstr(out, server_name.as_bytes());
        self.up.pass(rest);
        self.owed.push_back(Owed::Bind);
        Ok(None)
    }

    /// What a Describe or Close names. They are short: a long one is malformed.
    fn named(&self, found: Header) -> Option<Named<'_>> {
        let (whole, _) = frame(self.up.unseen(), CAPACITY).ok()??;
        (whole.tag == found.tag).then(|| Named::parse(whole.body).ok())?
    }

    fn on_describe(&mut self, found: Header) -> Decided {
        let statement = match self.named(found) {
            None => return self.violation("a malformed Describe message").map(Some),
            Some(Named::Portal(_)) => return self.pass(found, Some(Owed::Describe)),
            Some(Named::Statement([])) => {
                if !self.prepare_unnamed() {
                    return Ok(Some(Step::Flush));
                }
                return self.pass(found, Some(Owed::Describe));
            }
            Some(Named::Statement(name)) => self.statements.get(name).map(Rc::clone),
        };
        let Some(statement) = statement else {
            return self.pass(found, Some(Owed::Describe));
        };
        if !self.up.can_drop() {
            return Ok(Some(Step::Flush));
        }
        self.prepare(&statement);
        self.up.drop_message(found.frame_len());
        put_statement(
            self.up.insert(),
            b'D',
            Statement::server_name(statement.id).as_bytes(),
        );
        self.owed.push_back(Owed::Describe);
        Ok(None)
    }

    /// The name, if a Close is for a statement that is followed.
    fn closes_followed(&self, found: Header) -> Option<Box<[u8]>> {
        match self.named(found)? {
            Named::Statement(name) if self.statements.contains_key(name) => Some(name.into()),
            _ => None,
        }
    }

    /// Other clients may use the statement on the server: only the client's name of it goes.
    fn close_followed(&mut self, found: Header, name: &[u8]) -> Option<Step> {
        if let Some(step) = self.drop_it(found) {
            return Some(step);
        }
        self.statements.remove(name);
        self.own_answer(b'3');
        None
    }

    fn on_close(&mut self, found: Header) -> Decided {
        if let Some(name) = self.closes_followed(found) {
            return Ok(self.close_followed(found, &name));
        }
        match self.named(found) {
            None => return self.violation("a malformed Close message").map(Some),
            Some(Named::Statement([])) => self.forget_unnamed(),
            Some(_) => {}
        }
        self.pass(found, Some(Owed::Close))
    }
}
