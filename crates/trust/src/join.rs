//! The token with which a new host joins: whom to trust, and a secret that works once.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::authority::sha256;

/// What every token begins with; the number is that of its format.
const PREFIX: &str = "craton1.";

/// Bytes of the secret.
pub const SECRET_LEN: usize = 32;

/// What a new host is handed. `Debug` shows nothing of it; `Display` is the token itself.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the certificate of the authority: the first connection is checked against it.
    pub authority_sha256: [u8; 32],
    /// Random; the cluster keeps its hash alone.
    pub secret: [u8; SECRET_LEN],
}

impl JoinToken {
    /// Under this the cluster keeps what the token is for. Knowing it does not help to join.
    pub fn id(&self) -> String {
        hex(&sha256(&self.secret))
    }

    /// The secret as it is shown to the cluster.
    pub fn secret_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.secret)
    }
}

/// The id that belongs to a secret as it is shown; `None` if it is no secret.
pub fn id_of_secret(text: &str) -> Option<String> {
    let secret = URL_SAFE_NO_PAD.decode(text).ok()?;
    (secret.len() == SECRET_LEN).then(|| hex(&sha256(&secret)))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads 32 bytes of hexadecimal.
pub fn unhex(text: &str) -> Option<[u8; 32]> {
    let bytes: Option<Vec<u8>> = (0..32)
        .map(|i| u8::from_str_radix(text.get(i * 2..i * 2 + 2)?, 16).ok())
        .collect();
    bytes
        .filter(|_| text.len() == 64)
        .and_then(|b| b.try_into().ok())
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = self.authority_sha256.to_vec();
        bytes.extend_from_slice(&self.secret);
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(…)")
    }
}

impl FromStr for JoinToken {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            "that is no token to join with: it begins with \"craton1.\" and has 94 characters; `craton ca token` makes one"
                .to_owned()
        };
        let bytes = text
            .trim()
            .strip_prefix(PREFIX)
            .and_then(|rest| URL_SAFE_NO_PAD.decode(rest).ok())
            .ok_or_else(wrong)?;
        let (authority, secret) = bytes.split_at_checked(32).ok_or_else(wrong)?;
        Ok(Self {
            authority_sha256: authority.try_into().map_err(|_| wrong())?,
            secret: secret.try_into().map_err(|_| wrong())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tokens_survive_their_text_and_the_id_needs_the_secret_alone(a in any::<[u8; 32]>(), s in any::<[u8; 32]>()) {
            let token = JoinToken { authority_sha256: a, secret: s };
            let text = token.to_string();
            prop_assert_eq!(text.len(), 94);
            let back = text.parse::<JoinToken>();
            prop_assert_eq!(back.as_ref(), Ok(&token));
            prop_assert_eq!(id_of_secret(&token.secret_text()), Some(token.id()));
            prop_assert_eq!(unhex(&hex(&a)), Some(a));
        }

        #[test]
        fn what_is_no_token_is_refused(text in ".{0,120}") {
            prop_assert!(text.parse::<JoinToken>().is_err());
            let _ = format!("{PREFIX}{text}").parse::<JoinToken>();
            let _ = (id_of_secret(&text), unhex(&text));
        }
    }
}
