//! Where a cluster keeps its records: which backend, and how it is reached.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The most endpoints that are listed.
const ENDPOINTS_MAX: usize = 16;

/// Which store the cluster agrees through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Raft inside the agents; nothing else to install.
    #[default]
    Embedded,
    /// An etcd that is there already, version 3.4 or newer.
    Etcd,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Embedded => "embedded",
            Self::Etcd => "etcd",
        })
    }
}

/// The `[node.coordinator]` table.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Place {
    /// `embedded` (the default) or `etcd`.
    pub backend: Backend,
    /// etcd's client addresses, `http://host:port` or `https://host:port`. All of one etcd cluster: the one
    /// that answered last is asked first, the next one when it does not answer.
    pub endpoints: Vec<String>,
    /// What the cluster's keys in etcd begin with; `/craton/<cluster>/` if not given.
    pub prefix: Option<String>,
    /// etcd user, where etcd asks for one.
    pub username: Option<String>,
    /// File with the user's password in its first line. Read again at each login.
    pub password_file: Option<PathBuf>,
    /// File with the certificate authorities (PEM) that may have signed etcd's certificate; the system's if
    /// not given.
    pub ca_file: Option<PathBuf>,
    /// File with this host's client certificate (PEM), where etcd asks for one.
    pub cert_file: Option<PathBuf>,
    /// File with the certificate's key (PEM).
    pub key_file: Option<PathBuf>,
}

impl Place {
    /// Says what is wrong, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if self.backend == Backend::Embedded {
            return if *self == Self::default() {
                Ok(())
            } else {
                Err("coordinator: backend is \"embedded\", but etcd's settings are given: say backend = \"etcd\", or leave them out".into())
            };
        }
        if self.endpoints.is_empty() || self.endpoints.len() > ENDPOINTS_MAX {
            return Err(format!(
                "coordinator.endpoints: list 1 to {ENDPOINTS_MAX} addresses of etcd, for example [\"http://10.0.0.1:2379\"]"
            ));
        }
        for endpoint in &self.endpoints {
            EndpointAddress::parse(endpoint)?;
        }
        if self
            .prefix
            .as_ref()
            .is_some_and(|p| !p.ends_with('/') || p.len() < 2 || p.len() > 128)
        {
            return Err(
                "coordinator.prefix: 2 to 128 bytes that end with a slash, for example \"/craton/main/\"".into(),
            );
        }
        if self.username.is_some() != self.password_file.is_some() {
            return Err(
                "coordinator: username and password_file go together, one of them is missing"
                    .into(),
            );
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return Err(
                "coordinator: cert_file and key_file go together, one of them is missing".into(),
            );
        }
        Ok(())
    }

    /// Whether the other means the same records: the same backend and prefix, and an endpoint in common.
    pub fn is_same_store(&self, other: &Self) -> bool {
        self.backend == other.backend
            && self.prefix == other.prefix
            && (self.backend == Backend::Embedded
                || self.endpoints.iter().any(|e| other.endpoints.contains(e)))
    }

    /// What the keys of `cluster` begin with.
    pub fn prefix_of(&self, cluster: &str) -> String {
        self.prefix
            .clone()
            .unwrap_or_else(|| format!("/craton/{cluster}/"))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.backend {
            Backend::Embedded => f.write_str("embedded"),
            Backend::Etcd => write!(f, "etcd at {}", self.endpoints.join(", ")),
        }
    }
}

/// One endpoint, taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct EndpointAddress {
    pub(crate) tls: bool,
    /// Host name or address, IPv6 without its brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// `host:port` as it was written.
    pub(crate) authority: String,
}

impl EndpointAddress {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "coordinator.endpoints: \"{text}\" is no address of etcd; write http://host:port or https://host:port"
            )
        };
        let (tls, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(wrong()),
        };
        let authority = rest.trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
        let port: u16 = port.parse().map_err(|_| wrong())?;
        let host = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(host);
        let odd = |c: char| c.is_whitespace() || c.is_control() || "/@?#".contains(c);
        if host.is_empty() || port == 0 || host.contains(odd) {
            return Err(wrong());
        }
        Ok(Self {
            tls,
            host: host.to_owned(),
            port,
            authority: authority.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etcd() -> Place {
        Place {
            backend: Backend::Etcd,
            endpoints: vec!["http://127.0.0.1:2379".into()],
            ..Place::default()
        }
    }

    #[test]
    fn endpoints_are_taken_apart() {
        let v6 = EndpointAddress::parse("https://[::1]:2379/").unwrap();
        assert_eq!(
            (v6.tls, v6.host.as_str(), v6.port, v6.authority.as_str()),
            (true, "::1", 2379, "[::1]:2379")
        );
        for wrong in [
            "127.0.0.1:2379",
            "http://host",
            "http://:1",
            "http://a:0",
            "http://a:99999",
            "http://u@h:1",
            "ftp://h:1",
            "http://a b:1",
        ] {
            assert!(EndpointAddress::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_same_store_may_be_reached_in_other_ways() {
        let other = |endpoints: &[&str]| Place {
            endpoints: endpoints.iter().map(|e| (*e).to_owned()).collect(),
            username: Some("u".into()),
            ..etcd()
        };
        assert!(etcd().is_same_store(&other(&["http://b:1", "http://127.0.0.1:2379"])));
        assert!(!etcd().is_same_store(&other(&["http://b:1"])));
        let prefix = Place {
            prefix: Some("/x/".into()),
            ..etcd()
        };
        assert!(!etcd().is_same_store(&prefix));
        assert!(Place::default().is_same_store(&Place::default()));
        assert!(!Place::default().is_same_store(&etcd()));
    }

    #[test]
    fn contradictions_are_named() {
        assert_eq!(Place::default().validate(), Ok(()));
        assert_eq!(etcd().validate(), Ok(()));
        let says = |p: Place| p.validate().unwrap_err();
        let embedded = Place {
            backend: Backend::Embedded,
            ..etcd()
        };
        assert!(says(embedded).contains("backend = \"etcd\""));
        let none = Place {
            endpoints: vec![],
            ..etcd()
        };
        assert!(says(none).contains("endpoints"));
        let user = Place {
            username: Some("u".into()),
            ..etcd()
        };
        assert!(says(user).contains("password_file"));
        let cert = Place {
            cert_file: Some("c".into()),
            ..etcd()
        };
        assert!(says(cert).contains("key_file"));
        let prefix = Place {
            prefix: Some("/x".into()),
            ..etcd()
        };
        assert!(says(prefix).contains("slash"));
    }
}
