//! Pure vocabulary and decisions of a Craton cluster: no I/O, no clock, no async, no randomness.
//!
//! Everything that decides lives here as plain functions of plain data, so that the agent, the
//! simulator and the tests run the very same code. Time is a field of the input.

pub mod decide;
pub mod election;
pub mod health;
pub mod libraries;
pub mod observe;
pub mod promise;
pub mod reasons;
pub mod receiver;
pub mod records;
pub mod settings;
pub mod slots;
pub mod sync;
pub mod timeline;
pub mod topology;
pub mod types;

pub use types::{BootTime, Incarnation, Lsn, LsnParseError, MemberId, Term, TimelineId};
