//! Who is who: the cluster's certificate authority, certificates with roles, TLS on both sides.
//!
//! # Layout
//! * [`identity`]: what a certificate says: `craton://CLUSTER/ROLE/NAME`.
//! * [`authority`]: makes and signs certificates. Only hosts of members have its key.
//! * [`files`]: where certificates and keys are, and how they get there whole.
//! * [`channel`]: a TLS connection whose other end is known. Reloads what changed on disk.
//! * [`doorstep`]: connections whose other end is not known yet.
//! * [`join`]: the token with which a new host joins.
//! * [`seed`]: an authority that follows from a password, for containers.
//! * [`renewal`]: a certificate is replaced long before it ends.
//!
//! # What holds
//! * TLS 1.3 only, one provider of cryptography (aws-lc-rs), no session is ever resumed: each connection is
//!   checked against the authorities and the clock of its own moment. A handshake with P-256 costs
//!   0.7 ms of processor time, both sides together (`benches/handshake.rs`), and what is frequent (lease,
//!   topology) keeps its connection.
//! * A name in DNS decides nothing: members are recognised by the identity in their certificate, so that
//!   addresses may change and whoever spoofs one gains nothing.
//! * What cannot be parsed never replaces what works.

pub mod authority;
pub mod channel;
pub mod doorstep;
pub mod files;
pub mod identity;
pub mod join;
pub mod renewal;
pub mod seed;

pub use authority::Authority;
pub use channel::{Expect, Guest, Stream, Trust};
pub use files::{TlsFiles, TlsMode, TlsSettings};
pub use identity::{Identity, Role};

/// Why something about certificates failed. Every text says which file or which peer was meant.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file cannot be read or written.
    #[error("cannot {verb} {}: {source}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A certificate, key or request is of no use.
    #[error("{0}")]
    Certificate(String),
    /// The settings contradict themselves.
    #[error("{0}")]
    Settings(String),
}

/// What a function of this crate gives.
pub type Result<T> = std::result::Result<T, TrustError>;
