//! The server's side.

use base64::Engine as _;

use super::{
    BASE64, Key, NONCE_BYTES, ScramError, Verifier, attribute, hmac, nonce_text, same, sha256, xor,
};

/// A server in the middle of an exchange.
#[derive(Debug)]
pub struct Server {
    verifier: Verifier,
    client_first_bare: String,
    gs2_header: String,
    first_answer: String,
    nonce: String,
}

/// How an exchange ended.
#[derive(Clone, PartialEq, Eq)]
pub enum ServerOutcome {
    /// The proof is right.
    Proven {
        /// The message that proves the server to the client.
        server_final: String,
        /// What the proof revealed, to log in elsewhere as this client.
        client_key: Key,
    },
    /// The proof is wrong.
    Wrong,
}

impl std::fmt::Debug for ServerOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Proven { .. } => "Proven",
            Self::Wrong => "Wrong",
        })
    }
}

impl Server {
    /// Reads the client's first message.
    pub fn new(
        verifier: Verifier,
        client_first: &[u8],
        random: &[u8; NONCE_BYTES],
    ) -> Result<Self, ScramError> {
        Self::with_nonce(verifier, client_first, &nonce_text(random))
    }

    pub(super) fn with_nonce(
        verifier: Verifier,
        client_first: &[u8],
        nonce: &str,
    ) -> Result<Self, ScramError> {
        let bad = ScramError::Malformed("client-first-message");
        let text = std::str::from_utf8(client_first).map_err(|_| bad)?;
        let (binding, rest) = text.split_once(',').ok_or(bad)?;
        // "y": the client could bind the channel and believes that we cannot: right as long as there is no TLS.
        match binding {
            "n" | "y" => {}
            p if p.starts_with("p=") => return Err(ScramError::ChannelBinding),
            _ => return Err(bad),
        }
        let (authzid, bare) = rest.split_once(',').ok_or(bad)?;
        if !authzid.is_empty() {
            return Err(ScramError::Malformed(
                "an authorization identity is not supported",
            ));
        }
        let (_user, after) = attribute(bare, 'n').ok_or(bad)?;
        let (client_nonce, _) = attribute(after, 'r').ok_or(bad)?;
        if client_nonce.is_empty() || !client_nonce.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(bad);
        }
        let nonce = format!("{client_nonce}{nonce}");
        let server_first = format!(
            "r={nonce},s={},i={}",
            BASE64.encode(&verifier.salt),
            verifier.iterations
        );
        Ok(Self {
            verifier,
            client_first_bare: bare.to_owned(),
            gs2_header: format!("{binding},,"),
            first_answer: server_first,
            nonce,
        })
    }

    /// The first answer.
    pub fn first_message(&self) -> &str {
        &self.first_answer
    }

    /// Checks the client's proof.
    pub fn finish(&self, client_final: &[u8]) -> Result<ServerOutcome, ScramError> {
        let bad = ScramError::Malformed("client-final-message");
        let text = std::str::from_utf8(client_final).map_err(|_| bad)?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(bad)?;
        let (binding, rest) = attribute(without_proof, 'c').ok_or(bad)?;
        let (nonce, _) = attribute(rest, 'r').ok_or(bad)?;
        if !same(nonce.as_bytes(), self.nonce.as_bytes()) {
            return Err(ScramError::Nonce);
        }
        if BASE64.decode(binding).ok().as_deref() != Some(self.gs2_header.as_bytes()) {
            return Err(ScramError::Malformed(
                "the channel binding of the final message is not the first one's",
            ));
        }
        let mut client_key: Key = BASE64
            .decode(proof)
            .ok()
            .and_then(|p| p.try_into().ok())
            .ok_or(bad)?;
        let auth_message = format!(
            "{},{},{without_proof}",
            self.client_first_bare, self.first_answer
        );
        xor(
            &mut client_key,
            &hmac(&self.verifier.stored_key, &[auth_message.as_bytes()]),
        );
        if !same(&sha256(&client_key), &self.verifier.stored_key) {
            return Ok(ServerOutcome::Wrong);
        }
        let signature = hmac(&self.verifier.server_key, &[auth_message.as_bytes()]);
        Ok(ServerOutcome::Proven {
            server_final: format!("v={}", BASE64.encode(signature)),
            client_key,
        })
    }
}
