//! Raft as a pure state machine: events in, [`Ready`] out. No clock, disk, socket, task or randomness.
//!
//! ```text
//!   step(now, message) ──┐                    ┌──▶ writes    to the disk, in order; then persisted(token)
//!   tick(now) ───────────┤                    ├──▶ messages  to the peers, at once, may get lost
//!   propose(payload) ────┼──▶  Raft  ──ready()┼──▶ install   replace the state machine by this image
//!   read(id) ────────────┤                    ├──▶ committed apply in order
//!   persisted(token) ────┘                    └──▶ reads     serve once applied through the index
//! ```
//!
//! What differs from the paper (Ongaro & Ousterhout 2014; Ongaro's thesis 2014), and why:
//!
//! * **Writing is asynchronous** (thesis 10.2.1). What may only be said once something is on disk (a vote,
//!   an acknowledgement, the own vote and the own copy) waits in a queue for `persisted`. Heartbeats and
//!   their answers never wait, so a stalled disk costs a node its say, not its leadership.
//! * **Pre-vote and check-quorum** (thesis 9.6, 6.2): a node that was cut off does not depose a leader, and
//!   a leader without a majority steps down.
//! * **Reads by read-index** (thesis 6.4): one heartbeat round, no reliance on clocks.
//! * **Snapshots are the whole state**, which is a few kilobytes.
//! * **Births** make a lost disk safe: see [`standing`].
//! * **Members change one at a time** (thesis 4.1 to 4.3): see [`membership`].

mod durable;
mod election;
mod log;
mod membership;
mod message;
mod node;
mod replication;
mod standing;
#[cfg(test)]
mod tests;

pub use durable::{Durable, Write};
pub use membership::{Change, ChangeRefused, Configuration};
pub use message::{
    Birth, Births, Body, Entry, HardState, Image, Index, Message, Payload, RaftTerm, Standing,
};
pub use node::{Config, NotNow, Raft, Ready, RoleName, Status, Timings};
