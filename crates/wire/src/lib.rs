//! PostgreSQL's wire protocol as pure data: frames, SCRAM, MD5, replication messages.

pub mod replication;
