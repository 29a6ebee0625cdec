//! What a certificate says about its holder: one URI among its alternative names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::{Result, TrustError};

/// The scheme of the URI.
const SCHEME: &str = "craton://";

/// The longest cluster or name, in bytes before they are written into the URI.
pub const NAME_LEN_MAX: usize = 128;

/// What a part of a cluster may do; see the table in `craton_console::access`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The agent of a member and its PostgreSQL. Trusted with everything, as its host holds the data.
    Node,
    /// A proxy: it follows the topology.
    Proxy,
    /// A backup daemon: it follows the topology and receives WAL.
    Backup,
    /// A voter without a database: it speaks to the members' coordinators, and to nothing else of them.
    Witness,
    /// Whoever operates the cluster, through the command line.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Node,
        Self::Proxy,
        Self::Backup,
        Self::Witness,
        Self::Operator,
    ];

    /// May it take part in the coordinator?
    pub fn votes(self) -> bool {
        matches!(self, Self::Node | Self::Witness)
    }

    /// The word in the URI, in settings and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Proxy => "proxy",
            Self::Backup => "backup",
            Self::Witness => "witness",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|r| r.as_str() == text)
            .ok_or_else(|| {
                format!("there is no role \"{text}\": use node, proxy, backup, witness or operator")
            })
    }
}

/// Who holds a certificate.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The cluster's name.
    pub cluster: String,
    /// What it may do.
    pub role: Role,
    /// Its name: the member's for [`Role::Node`].
    pub name: String,
}

impl Identity {
    /// Checks and wraps: cluster and name have 1 to [`NAME_LEN_MAX`] bytes.
    pub fn new(cluster: impl Into<String>, role: Role, name: impl Into<String>) -> Result<Self> {
        let (cluster, name) = (cluster.into(), name.into());
        for (what, text) in [("cluster", &cluster), ("name", &name)] {
            if text.is_empty() || text.len() > NAME_LEN_MAX {
                return Err(TrustError::Certificate(format!(
                    "the {what} in a certificate has 1 to {NAME_LEN_MAX} bytes, not {}",
                    text.len()
                )));
            }
        }
        Ok(Self {
            cluster,
            role,
            name,
        })
    }

    /// Reads it from a certificate in DER: exactly one URI of ours among its alternative names.
    pub fn of_certificate(der: &[u8]) -> Result<Self> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|e| TrustError::Certificate(format!("not a certificate: {e}")))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| {
                TrustError::Certificate(format!("the alternative names cannot be read: {e}"))
            })?
            .map(|extension| extension.value.general_names.as_slice())
            .unwrap_or_default();
        let mut ours = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri).filter(|uri| uri.starts_with(SCHEME)),
            _ => None,
        });
        match (ours.next(), ours.next()) {
            (Some(uri), None) => uri.parse(),
            (Some(_), Some(_)) => Err(TrustError::Certificate(
                "the certificate names more than one craton:// identity".into(),
            )),
            (None, _) => Err(TrustError::Certificate(format!(
                "the certificate (subject {}) has no alternative name craton://CLUSTER/ROLE/NAME",
                certificate.subject()
            ))),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SCHEME)?;
        escape(&self.cluster, f)?;
        write!(f, "/{}/", self.role)?;
        escape(&self.name, f)
    }
}

impl FromStr for Identity {
    type Err = TrustError;

    fn from_str(uri: &str) -> Result<Self> {
        let wrong = || {
            TrustError::Certificate(format!(
                "\"{}\" is not craton://CLUSTER/ROLE/NAME",
                uri.escape_debug()
            ))
        };
        let rest = uri.strip_prefix(SCHEME).ok_or_else(wrong)?;
        let mut parts = rest.split('/');
        let (Some(cluster), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        let role = role.parse().map_err(TrustError::Certificate)?;
        let identity = Self::new(
            unescape(cluster).ok_or_else(wrong)?,
            role,
            unescape(name).ok_or_else(wrong)?,
        )?;
        // One identity has one spelling.
        if identity.to_string() == uri {
            Ok(identity)
        } else {
            Err(wrong())
        }
    }
}

/// RFC 3986's unreserved characters stand for themselves.
fn escape(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            write!(f, "{}", char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            out.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn odd_names_survive_and_odd_spellings_do_not() {
        let identity = Identity::new("it's / ours", Role::Backup, "b%1").unwrap();
        let uri = identity.to_string();
        assert_eq!(uri, "craton://it%27s%20%2F%20ours/backup/b%251");
        assert_eq!(uri.parse::<Identity>().unwrap(), identity);
        for wrong in [
            "craton://c/node",
            "craton://c/node/a/b",
            "craton://c/king/a",
            "craton:///node/a",
            "craton://c/node/",
            "http://c/node/a",
            "craton://c/node/%61",
            "craton://c/node/%zz",
            "craton://c/node/%",
            "craton://c/node/%ff",
        ] {
            assert!(wrong.parse::<Identity>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_identity_survives_its_uri(cluster in ".{1,30}", name in ".{1,30}", role in 0..4_usize) {
            let identity = Identity::new(cluster, Role::ALL[role], name).unwrap();
            prop_assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        }

        #[test]
        fn no_text_makes_the_parser_fail_otherwise_than_by_an_error(text in ".{0,80}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = text.parse::<Identity>();
            let _ = format!("craton://{text}").parse::<Identity>();
            let _ = Identity::of_certificate(&bytes);
        }
    }
}
