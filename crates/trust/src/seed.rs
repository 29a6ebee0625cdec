//! An authority and secrets that follow from one password.
//!
//! Containers that share nothing but their environment find each other this way: each computes the same key. Whoever
//! knows the password has everything, which is what the replication password of the stack before meant as well
//! (its role was a superuser). Where that is not wanted, secrets are made by `craton ca init` and handed out.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::authority::Authority;
use crate::{Result, TrustError};

/// Iterations of PBKDF2-HMAC-SHA-256, as OWASP advises for passwords.
const ITERATIONS: u32 = 600_000;

/// PKCS #8 around the private number of an ECDSA key on P-256 (RFC 5208, RFC 5915), which follows as 32 bytes.
const PKCS8_P256: [u8; 35] = [
    0x30, 0x41, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
    0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x27, 0x30, 0x25, 0x02, 0x01,
    0x01, 0x04, 0x20,
];

/// What everything follows from. Not shown by `Debug`.
pub struct Seed([u8; 32]);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(…)")
    }
}

impl Seed {
    /// Stretches a password; takes some tenths of a second on purpose. Clusters of different names have nothing in
    /// common even with the same password.
    pub fn from_password(cluster: &str, password: &str) -> Result<Self> {
        let mac = keyed(password.as_bytes())?;
        let salt = format!("craton seed of cluster {cluster}");
        // PBKDF2 (RFC 8018, 5.2), first and only block.
        let mut block = sign(&mac, &[salt.as_bytes(), &1_u32.to_be_bytes()].concat());
        let mut sum = block;
        for _ in 1..ITERATIONS {
            block = sign(&mac, &block);
            for (total, byte) in sum.iter_mut().zip(block) {
                *total ^= byte;
            }
        }
        Ok(Self(sum))
    }

    fn bytes(&self, purpose: &str) -> Result<[u8; 32]> {
        Ok(sign(&keyed(&self.0)?, purpose.as_bytes()))
    }

    /// The secret for a purpose: 256 bits as 43 characters of base64url.
    pub fn secret(&self, purpose: &str) -> Result<String> {
        Ok(URL_SAFE_NO_PAD.encode(self.bytes(&format!("secret {purpose}"))?))
    }

    /// The authority of the cluster. Its key is the same everywhere; its certificate is signed anew, which those who
    /// trust the key do not notice.
    pub fn authority(&self, cluster: &str) -> Result<Authority> {
        let mut number = self.bytes("authority")?;
        // The order of P-256 begins with 32 set bits: with the first one clear every number is below it.
        if let Some(first) = number.first_mut() {
            *first &= 0x7f;
        }
        Authority::with_key(cluster, &[&PKCS8_P256[..], &number[..]].concat())
    }
}

fn keyed(key: &[u8]) -> Result<Hmac<Sha256>> {
    Hmac::new_from_slice(key).map_err(|e| TrustError::Certificate(e.to_string()))
}

fn sign(mac: &Hmac<Sha256>, text: &[u8]) -> [u8; 32] {
    let mut mac = mac.clone();
    mac.update(text);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::{BUNDLE_FILE, KEY_FILE, ensure_certificate};
    use crate::{Identity, Role, TlsFiles, Trust};

    #[test]
    fn the_same_password_makes_the_same_authority_and_no_other_does() {
        let seed = Seed::from_password("c", "replication_pass").unwrap();
        let again = Seed::from_password("c", "replication_pass").unwrap();
        let other = Seed::from_password("d", "replication_pass").unwrap();
        assert_eq!(
            seed.secret("peers").unwrap(),
            again.secret("peers").unwrap()
        );
        assert_eq!(seed.secret("peers").unwrap().len(), 43);
        assert_ne!(seed.secret("peers").unwrap(), seed.secret("proxy").unwrap());
        assert_ne!(
            seed.secret("peers").unwrap(),
            other.secret("peers").unwrap()
        );

        // One host's certificate is accepted on another, which computed its authority by itself.
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let identity = Identity::new("c", Role::Node, "a").unwrap();
        for (dir, seed) in dirs.iter().zip([&seed, &again]) {
            let authority = seed.authority("c").unwrap();
            authority.store_key(&dir.path().join(KEY_FILE)).unwrap();
            let pem = authority.certificate_pem();
            crate::files::write_secret(&dir.path().join(BUNDLE_FILE), pem).unwrap();
            // What was stored can be loaded and used.
            let loaded = Authority::load(&dir.path().join(KEY_FILE)).unwrap();
            let files = TlsFiles::in_dir(dir.path(), "node-a");
            ensure_certificate(&loaded, &files, &identity, &["host".to_owned()]).unwrap();
        }
        let [one, two] = &dirs;
        let crossed = TlsFiles {
            authority: two.path().join(BUNDLE_FILE),
            ..TlsFiles::in_dir(one.path(), "node-a")
        };
        assert_eq!(Trust::open(crossed).unwrap().identity(), identity);
        let foreign = other.authority("d").unwrap();
        let pem = two.path().join("foreign.pem");
        crate::files::write_secret(&pem, foreign.certificate_pem()).unwrap();
        let foreign = TlsFiles {
            authority: pem,
            ..TlsFiles::in_dir(one.path(), "node-a")
        };
        assert!(Trust::open(foreign).is_err());
    }
}
