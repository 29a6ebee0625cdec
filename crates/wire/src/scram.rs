//! SCRAM-SHA-256 as PostgreSQL does it: both sides, without I/O. Nonces come in from outside.
//!
//! A proxy is the server towards its client and the client towards the server behind it. It never learns the
//! password: the client's proof reveals the ClientKey, and that is enough to log in to any server that has the
//! same verifier. Sources: RFC 5802, RFC 7677, RFC 4013; `scram-common.c`, `auth-scram.c`.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

mod client;
mod server;

pub use client::{Client, ClientIdentity};
pub use server::{Server, ServerOutcome};

/// The mechanism's name.
pub const MECHANISM: &str = "SCRAM-SHA-256";

/// Bytes of a key and of a hash.
pub const KEY_LEN: usize = 32;

/// Random bytes that go into a nonce; 18 make 24 printable characters, as in PostgreSQL.
pub const NONCE_BYTES: usize = 18;

/// Iterations of PostgreSQL's default verifier.
pub const ITERATIONS_DEFAULT: u32 = 4096;

/// The most iterations that a server may demand of us: each costs CPU time before anything is proven.
pub const ITERATIONS_MAX: u32 = 1_000_000;

/// Bytes of a salt as PostgreSQL makes it.
pub const SALT_LEN: usize = 16;

/// One key or hash.
pub type Key = [u8; KEY_LEN];

/// Why an exchange failed. Says nothing about secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// A message that does not follow the RFC.
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// The peer demands channel binding, which needs TLS.
    #[error("the client demands channel binding, which needs TLS")]
    ChannelBinding,
    /// The nonce is not the one that was sent.
    #[error("the SCRAM nonce does not match")]
    Nonce,
    /// The server demands more iterations than are reasonable.
    #[error("the server demands {0} SCRAM iterations, more than {ITERATIONS_MAX}")]
    Iterations(u32),
    /// The server could not prove that it knows the verifier.
    #[error("the server's SCRAM signature is wrong: it does not know the password")]
    ServerSignature,
    /// The server reports an error.
    #[error("the server refused the SCRAM exchange")]
    Refused,
}

/// What `pg_authid` holds: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    /// Iterations of the key derivation.
    pub iterations: u32,
    /// The salt.
    pub salt: Vec<u8>,
    /// SHA-256 of the ClientKey.
    pub stored_key: Key,
    /// The key of the server's signature.
    pub server_key: Key,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("iterations", &self.iterations)
            .finish_non_exhaustive()
    }
}

impl Verifier {
    /// Reads a verifier; `None` when the text is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (parameters, keys) = rest.split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        let iterations = iterations.parse().ok().filter(|n| *n > 0)?;
        Some(Self {
            iterations,
            salt: BASE64.decode(salt).ok()?,
            stored_key: BASE64.decode(stored).ok()?.try_into().ok()?,
            server_key: BASE64.decode(server).ok()?.try_into().ok()?,
        })
    }

    /// Makes a verifier from a password.
    pub fn from_password(password: &str, salt: &[u8], iterations: u32) -> Self {
        let salted = salted_password(password, salt, iterations);
        Self {
            iterations,
            salt: salt.to_vec(),
            stored_key: sha256(&hmac(&salted, &[b"Client Key"])),
            server_key: hmac(&salted, &[b"Server Key"]),
        }
    }

    /// The text as `pg_authid` has it.
    pub fn to_text(&self) -> String {
        format!(
            "SCRAM-SHA-256${}:{}${}:{}",
            self.iterations,
            BASE64.encode(&self.salt),
            BASE64.encode(self.stored_key),
            BASE64.encode(self.server_key)
        )
    }

    /// A verifier for a user that does not exist: no proof satisfies it, and its salt is always the same for the
    /// same name, so that names cannot be told apart by asking twice (`mock_scram_secret` in PostgreSQL).
    pub fn mock(user: &str, secret: &Key) -> Self {
        let salt = hmac(secret, &[b"salt", user.as_bytes()]);
        Self {
            iterations: ITERATIONS_DEFAULT,
            salt: salt
                .first_chunk::<SALT_LEN>()
                .map(|s| s.to_vec())
                .unwrap_or_default(),
            stored_key: hmac(secret, &[b"stored", user.as_bytes()]),
            server_key: hmac(secret, &[b"server", user.as_bytes()]),
        }
    }
}

/// The password as SASLprep has it; as it is where SASLprep refuses it, as PostgreSQL does.
pub fn normalize(password: &str) -> Vec<u8> {
    stringprep::saslprep(password).map_or_else(
        |_| password.as_bytes().to_vec(),
        |p| p.into_owned().into_bytes(),
    )
}

fn salted_password(password: &str, salt: &[u8], iterations: u32) -> Key {
    let keyed = keyed(&normalize(password));
    let mut mac = keyed.clone();
    mac.update(salt);
    mac.update(&1_u32.to_be_bytes());
    let mut previous: Key = mac.finalize().into_bytes().into();
    let mut result = previous;
    for _ in 1..iterations {
        let mut mac = keyed.clone();
        mac.update(&previous);
        previous = mac.finalize().into_bytes().into();
        xor(&mut result, &previous);
    }
    result
}

#[expect(
    clippy::expect_used,
    reason = "HMAC takes keys of any length (RFC 2104)"
)]
fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length")
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = keyed(key);
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn sha256(bytes: &[u8]) -> Key {
    Sha256::digest(bytes).into()
}

fn xor(into: &mut Key, other: &Key) {
    for (a, b) in into.iter_mut().zip(other) {
        *a ^= b;
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

fn nonce_text(random: &[u8; NONCE_BYTES]) -> String {
    BASE64.encode(random)
}

/// Takes `<name>=<value>` up to the next comma, and the rest after it.
fn attribute(text: &str, name: char) -> Option<(&str, &str)> {
    let value = text.strip_prefix(name)?.strip_prefix('=')?;
    Some(value.split_once(',').unwrap_or((value, "")))
}

#[cfg(test)]
mod tests;
