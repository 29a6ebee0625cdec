//! One PostgreSQL instance (versions 13 to 18): files, processes, control queries, clone, rewind,
//! replication client. It carries out; it never decides.
//!
//! # Layout
//! * [`binaries`]: which PostgreSQL is installed.
//! * [`instance`]: the member's directory, [`Instance`] as the handle for everything about it. [`initdb`]: a new cluster.
//! * [`config`], `hba`: `postgresql.conf`, `pg_hba.conf`, `pg_ident.conf`, outside the data directory; `conf_file`: those of others.
//! * [`adopt`]: a data directory that Craton did not make; `follow`: a standby of a primary that is not Craton's.
//! * [`control_data`]: `pg_controldata`, typed.
//! * [`postmaster`], [`processes`]: start, adopt, watch, stop and kill, by pidfd.
//! * [`control`]: the control connection; [`sample`]: one look at a running server; [`roles`], [`slots`];
//!   `logical_slots`: copies of logical slots.
//! * [`parameters`]: which of PostgreSQL's parameters may be set, and which wait for a restart.
//! * [`sync`]: `synchronous_standby_names`, and the proof that a change of it is in force.
//! * [`clone`], [`rewind`], [`divergence`]: ways to become a standby again.
//! * [`history`]: timeline history files; `fetched`: WAL that came another way than by streaming.
//! * [`guarantees`]: settings that give up what the cluster promises of commits.
//! * [`libraries`]: versions of what sorts text and computes geometry.
//! * [`disk`]: free space and the reserve file.
//!
//! # The member's directory
//! `data/` (PGDATA), `run/` (Unix socket), `conf/` (ours), `pg.log`; `data.init/`, `data.clone/` and `data.former/` while
//! a cluster is being made: they are renamed to `data/` when complete, so that half a cluster is never
//! taken for one.

mod admit;
pub mod adopt;
pub mod binaries;
pub mod clone;
mod conf_file;
pub mod config;
pub mod control;
pub mod control_data;
mod data_dir;
pub mod disk;
pub mod divergence;
mod error;
mod fetched;
mod files;
mod follow;
pub mod former;
pub mod guarantees;
mod hba;
pub mod history;
pub mod initdb;
pub mod instance;
pub mod libraries;
mod logical_slots;
pub mod made;
pub mod parameters;
pub mod postmaster;
pub mod processes;
pub mod replication;
pub mod rewind;
pub mod roles;
pub mod sample;
pub mod slots;
pub mod sync;

pub use adopt::{AdoptOptions, Adoptable, Inspected};
pub use binaries::{Binaries, PgVersion};
pub use clone::CloneProgress;
pub use config::{ConfigChange, ManagedConfig, PgTls, Upstream};
pub use control::Control;
pub use control_data::{ClusterState, ControlData};
pub use data_dir::DataDir;
pub use disk::DiskSpace;
pub use divergence::{DivergenceSummary, RelationNames};
pub use error::{PgError, Result, RewindFailure};
pub use fetched::{history_name, segment_name};
pub use guarantees::Weakening;
pub use hba::HbaRule;
pub use history::HistoryEntry;
pub use initdb::{InitArgs, InitOptions};
pub use instance::{Instance, InstanceConfig};
pub use logical_slots::{SLOT_FILE_MAX, SlotFile};
pub use made::{Recovered, finish_recovery};
pub use parameters::Parameter;
pub use postmaster::{ExitReason, Postmaster, StartMode, StopMode};
pub use roles::RolePasswords;
pub use sample::{Logical, Receiver, ReplicationRow, ServerSample, Slot};
pub use sync::SyncNames;
