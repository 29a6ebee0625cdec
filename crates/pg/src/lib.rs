//! One PostgreSQL instance (versions 13 to 18): files, processes, control queries, clone, rewind,
//! replication client. It carries out; it never decides.
//!
//! # Layout
//! * [`binaries`]: which PostgreSQL is installed.
//! * [`instance`]: the member's directory, [`Instance`] as the handle for everything about it.
//! * [`config`]: `postgresql.conf`, `pg_hba.conf`, `pg_ident.conf`, outside the data directory.
//! * [`control_data`]: `pg_controldata`, typed.
//! * [`postmaster`], [`processes`]: start, adopt, watch, stop and kill, by pidfd.
//! * [`control`]: the control connection; [`sample`]: one look at a running server; [`roles`], [`slots`].
//! * [`parameters`]: which of PostgreSQL's parameters may be set, and which wait for a restart.
//! * [`sync`]: `synchronous_standby_names`, and the proof that a change of it is in force.
//! * [`clone`], [`rewind`], [`divergence`]: ways to become a standby again.
//! * [`history`]: timeline history files; `fetched`: WAL that came another way than by streaming.
//! * [`libraries`]: versions of what sorts text and computes geometry.
//! * [`disk`]: free space and the reserve file.
//!
//! # The member's directory
//! `data/` (PGDATA), `run/` (Unix socket), `conf/` (ours), `pg.log`; `data.init/` and `data.clone/` while
//! a cluster is being made: they are renamed to `data/` when complete, so that half a cluster is never
//! taken for one.

pub mod binaries;
pub mod clone;
pub mod config;
pub mod control;
pub mod control_data;
pub mod disk;
pub mod divergence;
mod error;
mod fetched;
mod files;
pub mod history;
pub mod instance;
pub mod libraries;
pub mod parameters;
pub mod postmaster;
pub mod processes;
pub mod replication;
pub mod rewind;
pub mod roles;
pub mod sample;
pub mod slots;
pub mod sync;

pub use binaries::{Binaries, PgVersion};
pub use clone::CloneProgress;
pub use config::{ConfigChange, HbaRule, ManagedConfig, PgTls, Upstream};
pub use control::Control;
pub use control_data::{ClusterState, ControlData};
pub use disk::DiskSpace;
pub use divergence::{DivergenceSummary, RelationNames};
pub use error::{PgError, Result, RewindFailure};
pub use fetched::{history_name, segment_name};
pub use history::{HistoryEntry, KnownTimeline};
pub use instance::{DataDir, InitOptions, Instance, InstanceConfig};
pub use parameters::Parameter;
pub use postmaster::{ExitReason, Postmaster, StartMode, StopMode};
pub use roles::RolePasswords;
pub use sample::{Receiver, ReplicationRow, ServerSample, Slot};
pub use sync::SyncNames;
