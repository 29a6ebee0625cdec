//! PostgreSQL's wire protocol as pure data: frames, SCRAM, MD5, replication messages.
//!
//! Pure: bytes in, values out. Sockets, clocks and random numbers are the callers'.

pub mod backend;
pub mod frame;
pub mod frontend;
pub mod md5;
pub mod replication;
pub mod scram;
pub mod startup;
