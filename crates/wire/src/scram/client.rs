//! The client's side.

use std::fmt;

use base64::Engine as _;

use super::{
    BASE64, ITERATIONS_MAX, Key, NONCE_BYTES, ScramError, attribute, hmac, nonce_text,
    salted_password, same, sha256, xor,
};

/// What a client proves itself with.
#[derive(Clone)]
pub enum ClientIdentity {
    /// A password.
    Password(String),
    /// The keys that a proxy has: the client's, recovered from a proof, and the server's, from the verifier.
    /// They work with every server that has the same verifier (same salt, same iterations).
    Keys {
        /// The ClientKey.
        client_key: Key,
        /// The ServerKey, which the server's signature is checked with.
        server_key: Key,
    },
}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password(_) => "Password(…)",
            Self::Keys { .. } => "Keys(…)",
        })
    }
}

/// A client in the middle of an exchange.
#[derive(Debug)]
pub struct Client {
    identity: ClientIdentity,
    first_bare: String,
    nonce: String,
    server: Option<(Key, String)>,
}

/// This client does not support channel binding: there is no TLS under it.
const GS2_HEADER: &str = "n,,";

impl Client {
    /// Begins an exchange.
    pub fn new(identity: ClientIdentity, random: &[u8; NONCE_BYTES]) -> Self {
        let nonce = nonce_text(random);
        // PostgreSQL takes the user's name from the startup packet and ignores this one.
        let first_bare = format!("n=,r={nonce}");
        Self {
            identity,
            first_bare,
            nonce,
            server: None,
        }
    }

    #[cfg(test)]
    pub(super) fn with_nonce(identity: ClientIdentity, user: &str, nonce: &str) -> Self {
        Self {
            identity,
            first_bare: format!("n={user},r={nonce}"),
            nonce: nonce.into(),
            server: None,
        }
    }

    /// The first message.
    pub fn first_message(&self) -> String {
        format!("{GS2_HEADER}{}", self.first_bare)
    }

    /// The answer to the server's first message: the proof.
    pub fn final_message(&mut self, server_first: &[u8]) -> Result<String, ScramError> {
        let bad = ScramError::Malformed("server-first-message");
        let text = std::str::from_utf8(server_first).map_err(|_| bad)?;
        let (nonce, rest) = attribute(text, 'r').ok_or(bad)?;
        let (salt, rest) = attribute(rest, 's').ok_or(bad)?;
        let (iterations, _) = attribute(rest, 'i').ok_or(bad)?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(ScramError::Nonce);
        }
        let salt = BASE64.decode(salt).map_err(|_| bad)?;
        let iterations: u32 = iterations.parse().ok().filter(|n| *n > 0).ok_or(bad)?;
        if iterations > ITERATIONS_MAX {
            return Err(ScramError::Iterations(iterations));
        }
        let (client_key, server_key) = match &self.identity {
            ClientIdentity::Password(password) => {
                let salted = salted_password(password, &salt, iterations);
                (
                    hmac(&salted, &[b"Client Key"]),
                    hmac(&salted, &[b"Server Key"]),
                )
            }
            ClientIdentity::Keys {
                client_key,
                server_key,
            } => (*client_key, *server_key),
        };
        let without_proof = format!("c={},r={nonce}", BASE64.encode(GS2_HEADER));
        let auth_message = format!("{},{text},{without_proof}", self.first_bare);
        let mut proof = hmac(&sha256(&client_key), &[auth_message.as_bytes()]);
        xor(&mut proof, &client_key);
        self.server = Some((server_key, auth_message));
        Ok(format!("{without_proof},p={}", BASE64.encode(proof)))
    }

    /// Checks the server's signature: it too must know the verifier.
    pub fn verify(&self, server_final: &[u8]) -> Result<(), ScramError> {
        let bad = ScramError::Malformed("server-final-message");
        let text = std::str::from_utf8(server_final).map_err(|_| bad)?;
        if text.starts_with("e=") {
            return Err(ScramError::Refused);
        }
        let (signature, _) = attribute(text, 'v').ok_or(bad)?;
        let signature = BASE64.decode(signature).map_err(|_| bad)?;
        let (server_key, auth_message) = self.server.as_ref().ok_or(bad)?;
        if same(&signature, &hmac(server_key, &[auth_message.as_bytes()])) {
            Ok(())
        } else {
            Err(ScramError::ServerSignature)
        }
    }
}
