//! Where certificates and keys are, and how they get there whole.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use crate::authority::{BUNDLE_FILE, Facts};
use crate::identity::Identity;
use crate::{Result, TrustError};

/// The longest file that is read, in bytes.
const FILE_LEN_MAX: u64 = 256 * 1024;

/// Whether a part speaks TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// Nothing else is spoken to other parts.
    #[default]
    On,
    /// Nothing is encrypted, and the token alone opens the API: for isolated tests.
    Off,
}

/// The table `tls` of a daemon's settings.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    /// `off` is for isolated tests: then nothing is encrypted and a token alone opens the API.
    pub mode: TlsMode,
    /// The directory with `authority.pem` and this part's certificate, as `craton join` leaves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// The file with the certificates of the authorities that are trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<PathBuf>,
    /// The file with this part's certificate, which names `craton://CLUSTER/ROLE/NAME`, and its chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// The file with the certificate's key; that of the certificate if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

impl TlsSettings {
    /// Everything in this directory.
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            dir: Some(dir.to_owned()),
            ..Self::default()
        }
    }

    /// No TLS: for tests.
    pub fn off() -> Self {
        Self {
            mode: TlsMode::Off,
            ..Self::default()
        }
    }

    /// The files, or `None` without TLS. What is not given is looked for in `dir`: `authority.pem` and `<stem>.pem`.
    /// `table` is what the settings are called in errors.
    pub fn files(&self, table: &str, dir: Option<&Path>, stem: &str) -> Result<Option<TlsFiles>> {
        if self.mode == TlsMode::Off {
            return Ok(None);
        }
        let dir = self.dir.as_deref().or(dir);
        let pick = |given: &Option<PathBuf>, what: &str, name: String| {
            given
                .clone()
                .or_else(|| dir.map(|dir| dir.join(name)))
                .ok_or_else(|| {
                    TrustError::Settings(format!(
                        "{table}.{what} is missing: every part has a certificate; `craton join` gets one, docs/guide/security.md says how to use your own"
                    ))
                })
        };
        let certificate = pick(&self.certificate, "certificate", format!("{stem}.pem"))?;
        Ok(Some(TlsFiles {
            authority: pick(&self.authority, "authority", BUNDLE_FILE.to_owned())?,
            key: self.key.clone().unwrap_or_else(|| certificate.clone()),
            certificate,
        }))
    }
}

/// The files of one part. A key that stands in the file of its certificate is replaced together with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFiles {
    /// Certificates of the authorities that are trusted, in PEM.
    pub authority: PathBuf,
    /// The part's certificate and its chain, in PEM.
    pub certificate: PathBuf,
    /// The certificate's key, in PEM.
    pub key: PathBuf,
}

/// What stands in the files.
#[derive(Debug)]
pub struct Loaded {
    /// The authorities.
    pub authorities: Vec<CertificateDer<'static>>,
    /// The certificate and its chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key. Not shown by `Debug`.
    pub key: PrivateKeyDer<'static>,
    /// Who holds the certificate.
    pub identity: Identity,
    /// What else it says.
    pub facts: Facts,
}

/// What changes when a file is replaced or written: device, inode, time of its change, size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stamp(Vec<Option<Mark>>);

type Mark = (u64, u64, i64, i64, u64);

impl TlsFiles {
    /// In one directory: `authority.pem`, and certificate and key in `<stem>.pem`.
    pub fn in_dir(dir: &Path, stem: &str) -> Self {
        let certificate = dir.join(format!("{stem}.pem"));
        Self {
            authority: dir.join(BUNDLE_FILE),
            key: certificate.clone(),
            certificate,
        }
    }

    /// Reads and checks all three.
    pub fn load(&self) -> Result<Loaded> {
        let authorities = authorities(&self.authority)?;
        let text = read(&self.certificate)?;
        let chain = certificates(&self.certificate, &text)?;
        let key =
            PrivateKeyDer::from_pem_slice(read_secret(&self.key)?.as_bytes()).map_err(|e| {
                TrustError::Content {
                    path: self.key.clone(),
                    reason: format!("holds no private key in PEM: {e}"),
                }
            })?;
        let content = |e: TrustError| TrustError::Content {
            path: self.certificate.clone(),
            reason: e.to_string(),
        };
        let own = chain.first().map_or(&[][..], AsRef::as_ref);
        let identity = Identity::of_certificate(own).map_err(content)?;
        let facts = Facts::of_certificate(own).map_err(content)?;
        Ok(Loaded {
            authorities,
            chain,
            key,
            identity,
            facts,
        })
    }

    /// Tells whether any of them was replaced since.
    pub fn stamp(&self) -> Stamp {
        let one = |path: &PathBuf| {
            let m = std::fs::metadata(path).ok()?;
            Some((m.dev(), m.ino(), m.mtime(), m.mtime_nsec(), m.size()))
        };
        Stamp(
            [&self.authority, &self.certificate, &self.key]
                .into_iter()
                .map(one)
                .collect(),
        )
    }
}

/// The certificates of authorities in a file.
pub fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    certificates(path, &read(path)?)
}

fn certificates(path: &Path, text: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found: std::result::Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(TrustError::Content {
            path: path.to_owned(),
            reason: "holds no certificate in PEM".into(),
        }),
        Err(e) => Err(TrustError::Content {
            path: path.to_owned(),
            reason: format!("holds a damaged certificate: {e}"),
        }),
    }
}

/// The first section of a PEM text that has this label, with its two lines around it.
pub(crate) fn section<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let begin = text.find(&format!("-----BEGIN {label}-----"))?;
    let end_line = format!("-----END {label}-----\n");
    let rest = text.get(begin..)?;
    let end = rest.find(end_line.trim_end())?;
    rest.get(..(end + end_line.len()).min(rest.len()))
}

fn read(path: &Path) -> Result<String> {
    let failed = |source| TrustError::File {
        verb: "read",
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(FILE_LEN_MAX).read_to_string(&mut text))
        .map_err(failed)?;
    Ok(text)
}

/// Reads a file with a key: it must be readable by its owner alone, or belong to root and be readable by one group (as
/// PostgreSQL demands of `ssl_key_file`).
pub fn read_secret(path: &Path) -> Result<String> {
    let failed = |source| TrustError::File {
        verb: "read",
        path: path.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(TrustError::Content {
            path: path.to_owned(),
            reason: format!(
                "holds a key and is open to others (mode {:04o}): chmod 600 it",
                metadata.mode() & 0o7777
            ),
        });
    }
    read(path)
}

/// Replaces a file by one that only its owner can read, durably: a crash leaves the old or the new one.
pub fn write_secret(path: &Path, text: &str) -> Result<()> {
    let failed = |source| TrustError::File {
        verb: "write",
        path: path.to_owned(),
        source,
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // Two processes that write at once do not write into each other's file.
    name.push(format!(".{}.new", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let _ = std::fs::remove_file(&temporary);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        // Root works in directories of the user that the daemons run as: what it writes there is that user's.
        let dir = path
            .parent()
            .filter(|_| rustix::process::geteuid().is_root());
        if let Some(owner) = dir.and_then(|dir| std::fs::metadata(dir).ok()) {
            std::os::unix::fs::fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(failed)
}

/// Held while an authority is made or changed. Given back when dropped, however the process ends.
#[derive(Debug)]
pub(crate) struct DirLock(
    #[expect(dead_code, reason = "the lock lives as long as the descriptor")] File,
);

impl DirLock {
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        let failed = |source| TrustError::File {
            verb: "lock",
            path: dir.to_owned(),
            source,
        };
        let file = File::open(dir).map_err(failed)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| failed(e.into()))?;
        Ok(Self(file))
    }
}
