//! PostgreSQL's MD5 authentication, for clients that are too old for SCRAM.

use std::fmt::Write as _;

use md5::{Digest as _, Md5};
use subtle::ConstantTimeEq as _;

/// The verifier in `pg_authid`: `md5` and the hash of password and user name.
pub fn verifier(user: &str, password: &str) -> String {
    format!("md5{}", hex(&[password.as_bytes(), user.as_bytes()]))
}

/// The answer to a salt, from a verifier. `None` if it is not an MD5 verifier.
pub fn answer(verifier: &str, salt: [u8; 4]) -> Option<String> {
    let inner = verifier.strip_prefix("md5").filter(|h| h.len() == 32)?;
    Some(format!("md5{}", hex(&[inner.as_bytes(), &salt])))
}

/// True when a client's answer is right, in a time that does not depend on the answer.
pub fn verify(verifier: &str, salt: [u8; 4], client: &[u8]) -> bool {
    answer(verifier, salt).is_some_and(|expected| bool::from(expected.as_bytes().ct_eq(client)))
}

fn hex(parts: &[&[u8]]) -> String {
    let mut hash = Md5::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .fold(String::with_capacity(32), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let stored = verifier("md5_user", "password");
        // From rust-postgres: user "md5_user", password "password", salt 2a 3d 8f e0.
        assert_eq!(
            answer(&stored, [0x2a, 0x3d, 0x8f, 0xe0]).unwrap(),
            "md562af4dd09bbb41884907a838a3233294"
        );
        assert!(verify(
            &stored,
            [0x2a, 0x3d, 0x8f, 0xe0],
            b"md562af4dd09bbb41884907a838a3233294"
        ));
        assert!(!verify(
            &stored,
            [0x2a, 0x3d, 0x8f, 0xe1],
            b"md562af4dd09bbb41884907a838a3233294"
        ));
        assert_eq!(answer("SCRAM-SHA-256$4096:x", [0; 4]), None);
    }
}
