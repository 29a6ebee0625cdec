//! When the server is gone: who is told what.
//!
//! Every statement that was sent and not answered is answered with 08007, because nobody knows whether it took
//! effect, and every ReadyForQuery that is owed is sent. The session goes on without a transaction.

use craton_wire::backend::{Fields, Report, TransactionStatus, put_error};

use super::{Gone, Owed, Session};

/// Why a server connection is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Loss {
    /// The socket said so.
    Closed(String),
    /// The server said so.
    Fatal {
        /// SQLSTATE.
        code: String,
        /// Its message.
        message: String,
    },
    /// The topology says that it is not to be used any more.
    Revoked,
    /// It does not follow the protocol.
    Broken(String),
    /// The loss was found between statements, in a transaction.
    InTransaction(Box<Loss>),
    /// The loss was found between transactions, in a pinned session.
    OfState(Box<Loss>),
}

impl Loss {
    pub(super) fn closed(why: impl std::fmt::Display) -> Self {
        Self::Closed(why.to_string())
    }

    pub(super) fn fatal(fields: Fields<'_>) -> Self {
        Self::Fatal {
            code: String::from_utf8_lossy(fields.code()).into_owned(),
            message: fields.message(),
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::Closed(why) => format!("The connection to the server failed: {why}."),
            Self::Fatal { code, message } => {
                format!("The server ended the connection: {message} (SQLSTATE {code}).")
            }
            Self::Revoked => {
                "The server is not the one any more that this endpoint leads to.".to_owned()
            }
            Self::Broken(how) => format!("The server broke the protocol: {how}."),
            Self::InTransaction(why) | Self::OfState(why) => why.detail(),
        }
    }

    fn code(&self) -> &str {
        match self {
            // The server's own time-outs: it is known what became of the transaction.
            Self::Fatal { code, .. } if matches!(code.as_str(), "25P03" | "25P04") => code,
            Self::InTransaction(why) => why.code(),
            Self::OfState(_) => "08006",
            _ => "08007",
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        let (message, hint) = match self {
            Self::InTransaction(_) => (
                "the server was lost in the middle of the transaction",
                "The session goes on outside of a transaction: run the whole transaction again.",
            ),
            Self::OfState(_) => (
                "the session's state was lost with its server",
                "Temporary tables, session locks, LISTEN, held cursors and settings are gone: set them up again. \
                 The statement has not been run.",
            ),
            _ => (
                "the server was lost while the statement ran: whether it took effect is unknown",
                "The session goes on outside of a transaction: find out what happened, then go on or repeat.",
            ),
        };
        let detail = self.detail();
        put_error(
            out,
            Report {
                severity: "ERROR",
                code: self.code(),
                message,
                detail: &detail,
                hint,
            },
        );
    }
}

impl Session {
    /// The server connection is gone, for whatever reason. What is said afterwards goes to another one.
    pub(super) fn server_lost(&mut self, loss: Loss) -> Result<(), Gone> {
        let Some(link) = self.link.take() else {
            return Ok(());
        };
        self.settings.cancel.clear();
        tracing::debug!(target = %link.server.facts.target, ?loss, "a server connection is lost");
        drop(link);
        let told = std::mem::take(&mut self.hushed) || self.server_skips;
        let skipped = std::mem::take(&mut self.server_skips);
        let status = std::mem::take(&mut self.status);
        self.copy_in = false;
        self.sticky = false;
        self.inspector = None;
        self.confirmed.clear();
        self.bound = None;
        let pinned = self.unpin();
        if self.down.in_forwarded_message() {
            // Half of a message is with the client. Whatever came next would be taken for the other half.
            self.worker.shared.metrics.unknown_outcomes.inc();
            return Err(Gone);
        }
        self.down.forget_unseen();
        self.up.abandon();
        if pinned {
            self.worker.shared.metrics.states_lost.inc();
        }
        if self.owed.is_empty() {
            self.discards = skipped;
            self.lost = match status {
                TransactionStatus::InTransaction | TransactionStatus::Failed => {
                    Some(Loss::InTransaction(loss.into()))
                }
                TransactionStatus::Idle if pinned => Some(Loss::OfState(loss.into())),
                TransactionStatus::Idle => None,
            };
            return Ok(());
        }
        self.answer_owed(&loss, told, skipped);
        self.failing = !self.up.is_drained();
        Ok(())
    }

    /// Answers what the server will not answer any more.
    fn answer_owed(&mut self, loss: &Loss, mut told: bool, skipped: bool) {
        let mut open = skipped;
        for owed in std::mem::take(&mut self.owed) {
            if matches!(owed, Owed::Sync | Owed::Query(_)) {
                if !told {
                    self.tell(loss);
                }
                self.put_ready_idle();
                (told, open) = (false, false);
            } else {
                open = true;
                if let Owed::Parse { id, name } = owed {
                    self.forget_statement(&name, id);
                }
            }
        }
        if open {
            if !told {
                self.tell(loss);
            }
            self.discards = true;
        }
    }

    /// Tells the client a loss, and counts it.
    pub(super) fn tell(&mut self, loss: &Loss) {
        if loss.code() == "08007" {
            self.worker.shared.metrics.unknown_outcomes.inc();
        }
        loss.put(self.down.insert());
    }

    /// The statement that the client sent before it could know of a loss.
    pub(super) fn pipelined_loss() -> Loss {
        Loss::Closed(
            "it was lost during an earlier statement of the same pipeline; this one was not sent"
                .to_owned(),
        )
    }

    pub(super) fn forget_statement(&mut self, name: &[u8], id: u64) {
        if self.statements.get(name).is_some_and(|s| s.id == id) {
            self.statements.remove(name);
        }
    }

    pub(super) fn pin(&mut self) {
        if !std::mem::replace(&mut self.pinned, true) {
            self.worker.shared.metrics.pinned.inc();
        }
    }

    /// True if it was pinned.
    pub(super) fn unpin(&mut self) -> bool {
        let pinned = std::mem::take(&mut self.pinned);
        if pinned {
            self.worker.shared.metrics.pinned.dec();
        }
        pinned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        let fatal = |code: &str| Loss::Fatal {
            code: code.into(),
            message: String::new(),
        };
        assert_eq!(fatal("57P01").code(), "08007");
        assert_eq!(
            fatal("25P03").code(),
            "25P03",
            "the server rolled back, and said so"
        );
        assert_eq!(Loss::InTransaction(fatal("25P03").into()).code(), "25P03");
        assert_eq!(Loss::InTransaction(Loss::Revoked.into()).code(), "08007");
        assert_eq!(Loss::OfState(Loss::Revoked.into()).code(), "08006");
    }
}
