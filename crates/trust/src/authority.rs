//! The cluster's own certificate authority: one key, and certificates that name a role.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::files::{self, TlsFiles};
use crate::identity::Identity;
use crate::{Result, TrustError};

/// How long the authority's certificate is valid.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_secs(10 * 365 * 86_400);

/// How long a certificate is valid that it signs. It is replaced in the last half of that time.
pub const CERTIFICATE_VALIDITY: Duration = Duration::from_secs(14 * 86_400);

/// How far other hosts' clocks may be behind this one's.
pub const CLOCK_SKEW_MAX: Duration = Duration::from_secs(3600);

/// The longest request for a certificate that is looked at, in bytes.
pub const REQUEST_LEN_MAX: usize = 8192;

/// The most host names and addresses in one certificate.
pub const HOSTS_MAX: usize = 16;

/// The file with the authority's key, in a directory of secrets.
pub const KEY_FILE: &str = "authority.key";

/// The file with the certificates of all authorities that are trusted, in a directory of secrets.
pub const BUNDLE_FILE: &str = "authority.pem";

/// An authority with its key. Not shown by `Debug`.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    cluster: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({}, …)", self.cluster)
    }
}

fn failed(what: &str) -> impl Fn(rcgen::Error) -> TrustError + '_ {
    move |e| TrustError::Certificate(format!("cannot make {what}: {e}"))
}

impl Authority {
    /// Makes a new one: an ECDSA key on P-256 and a certificate for it that may sign others, but no further
    /// authorities.
    pub fn create(cluster: &str) -> Result<Self> {
        let key = KeyPair::generate().map_err(failed("the authority"))?;
        Self::of_key(cluster, key)
    }

    /// As [`Self::create`], with a key that is there already: ECDSA on P-256, as PKCS #8.
    pub(crate) fn with_key(cluster: &str, pkcs8: &[u8]) -> Result<Self> {
        let key = KeyPair::try_from(pkcs8).map_err(failed("the authority"))?;
        Self::of_key(cluster, key)
    }

    fn of_key(cluster: &str, key: KeyPair) -> Result<Self> {
        let failed = failed("the authority");
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, "Craton");
        name.push(
            DnType::CommonName,
            format!("authority of cluster {cluster}"),
        );
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let now = SystemTime::now();
        params.not_before = (now - CLOCK_SKEW_MAX).into();
        params.not_after = (now + AUTHORITY_VALIDITY).into();
        let certificate_pem = params.self_signed(&key).map_err(&failed)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate_pem,
            cluster: cluster.to_owned(),
        })
    }

    /// Reads it from the file that [`Self::store_key`] wrote: its certificate and its key.
    pub fn load(path: &Path) -> Result<Self> {
        let text = files::read_secret(path)?;
        let content = |reason: String| TrustError::Content {
            path: path.to_owned(),
            reason,
        };
        let der = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|e| content(format!("holds no certificate: {e}")))?;
        let key = KeyPair::from_pem(files::section(&text, "PRIVATE KEY").unwrap_or_default())
            .map_err(|e| content(format!("holds no private key: {e}")))?;
        let cluster =
            cluster_of(&der).ok_or_else(|| content("is not the authority of a cluster".into()))?;
        let issuer = Issuer::from_ca_cert_der(&der, key)
            .map_err(|e| content(format!("cannot sign with it: {e}")))?;
        Ok(Self {
            issuer,
            certificate_pem: files::section(&text, "CERTIFICATE")
                .unwrap_or_default()
                .to_owned(),
            cluster,
        })
    }

    /// The cluster that it speaks for.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Its certificate, in PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its certificate and key, as they are stored.
    pub fn key_pem(&self) -> String {
        format!(
            "{}{}",
            self.certificate_pem,
            self.issuer.key().serialize_pem()
        )
    }

    /// Writes certificate and key into a file that only its owner reads.
    pub fn store_key(&self, path: &Path) -> Result<()> {
        files::write_secret(path, &self.key_pem())
    }

    /// A new key and a certificate for it: what goes into one file. `hosts` are the names and addresses under
    /// which the holder's PostgreSQL is reached.
    pub fn issue(&self, identity: &Identity, hosts: &[String]) -> Result<String> {
        self.issue_until(identity, hosts, SystemTime::now() + CERTIFICATE_VALIDITY)
    }

    /// As [`Self::issue`], with another end: the beginning is [`CERTIFICATE_VALIDITY`] and [`CLOCK_SKEW_MAX`]
    /// before it.
    pub fn issue_until(
        &self,
        identity: &Identity,
        hosts: &[String],
        not_after: SystemTime,
    ) -> Result<String> {
        let key = KeyPair::generate().map_err(failed("a key"))?;
        let certificate = self.sign(identity, hosts, &key, not_after)?;
        Ok(format!("{certificate}{}", key.serialize_pem()))
    }

    /// Signs the key of a request. Nothing else of the request is taken over: who it is for was decided by whoever
    /// made the token, or by the certificate that is being replaced.
    pub fn sign_request(
        &self,
        identity: &Identity,
        hosts: &[String],
        request_pem: &str,
    ) -> Result<String> {
        if request_pem.len() > REQUEST_LEN_MAX {
            return Err(TrustError::Certificate(format!(
                "the request has more than {REQUEST_LEN_MAX} bytes"
            )));
        }
        let request = CertificateSigningRequestParams::from_pem(request_pem).map_err(|e| {
            TrustError::Certificate(format!("the request for a certificate is of no use: {e}"))
        })?;
        let not_after = SystemTime::now() + CERTIFICATE_VALIDITY;
        self.sign(identity, hosts, &request.public_key, not_after)
    }

    fn sign(
        &self,
        identity: &Identity,
        hosts: &[String],
        key: &impl PublicKeyData,
        not_after: SystemTime,
    ) -> Result<String> {
        let failed = failed("a certificate");
        if identity.cluster != self.cluster {
            return Err(TrustError::Certificate(format!(
                "this is the authority of cluster \"{}\", not of \"{}\"",
                self.cluster, identity.cluster
            )));
        }
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, "Craton");
        name.push(
            DnType::CommonName,
            format!("{} {}", identity.role, identity.name),
        );
        params.distinguished_name = name;
        let uri = identity.to_string().try_into().map_err(&failed)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        for host in hosts.iter().take(HOSTS_MAX) {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(host.as_str().try_into().map_err(&failed)?),
            });
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (not_after - CERTIFICATE_VALIDITY - CLOCK_SKEW_MAX).into();
        params.not_after = not_after.into();
        let own = params.signed_by(key, &self.issuer).map_err(&failed)?.pem();
        // The authority's certificate goes along: a host that joins knows only its hash.
        Ok(format!("{own}{}", self.certificate_pem))
    }

    /// The SHA-256 of its certificate: what a token to join carries.
    pub fn sha256(&self) -> Result<[u8; 32]> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes())
            .map(|der| sha256(&der))
            .map_err(|e| TrustError::Certificate(format!("the authority's certificate: {e}")))
    }
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).into()
}

/// A new key, and a request for a certificate for it: (key, request), both in PEM.
pub fn request() -> Result<(String, String)> {
    let failed = failed("a request for a certificate");
    let key = KeyPair::generate().map_err(&failed)?;
    let request = CertificateParams::default()
        .serialize_request(&key)
        .and_then(|r| r.pem())
        .map_err(&failed)?;
    Ok((key.serialize_pem(), request))
}

/// What a certificate says besides who holds it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// The names and addresses of hosts in it.
    pub hosts: Vec<String>,
    /// From when on it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

impl Facts {
    /// Reads them from a certificate in DER.
    pub fn of_certificate(der: &[u8]) -> Result<Self> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|e| TrustError::Certificate(format!("not a certificate: {e}")))?;
        let names = certificate.subject_alternative_name().ok().flatten();
        let hosts = names
            .map(|n| n.value.general_names.as_slice())
            .unwrap_or_default()
            .iter()
            .filter_map(|name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                GeneralName::IPAddress(bytes) => address(bytes).map(|a| a.to_string()),
                _ => None,
            })
            .collect();
        let at =
            |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        Ok(Self {
            hosts,
            not_before: at(certificate.validity().not_before.timestamp()),
            not_after: at(certificate.validity().not_after.timestamp()),
        })
    }

    /// True in the last half of its life, and after it.
    pub fn is_due(&self, now: SystemTime) -> bool {
        let life = self
            .not_after
            .duration_since(self.not_before)
            .unwrap_or_default();
        now >= self.not_after - life / 2
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(Into::into)
}

/// The cluster in an authority's subject.
fn cluster_of(der: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    let cluster = name.as_str().ok()?.strip_prefix("authority of cluster ")?;
    Some(cluster.to_owned())
}

/// Makes sure that a directory of secrets has an authority: makes one where there is neither key nor bundle.
/// Several processes may try at once; one of them makes it.
pub fn ensure(dir: &Path, cluster: &str) -> Result<Authority> {
    let _guard = files::DirLock::take(dir)?;
    let (key, bundle) = (dir.join(KEY_FILE), dir.join(BUNDLE_FILE));
    if key.exists() {
        let authority = Authority::load(&key)?;
        if authority.cluster != cluster {
            return Err(TrustError::Content {
                path: key,
                reason: format!(
                    "is the authority of cluster \"{}\", not of \"{cluster}\"",
                    authority.cluster
                ),
            });
        }
        if !bundle.exists() {
            files::write_secret(&bundle, authority.certificate_pem())?;
        }
        return Ok(authority);
    }
    if bundle.exists() {
        return Err(TrustError::Content {
            path: key,
            reason: format!(
                "is missing, although {} says that the cluster has an authority; only a host that has the key can issue certificates",
                bundle.display()
            ),
        });
    }
    let authority = Authority::create(cluster)?;
    authority.store_key(&key)?;
    files::write_secret(&bundle, authority.certificate_pem())?;
    Ok(authority)
}

/// Issues the certificate of `files` where it is missing, due, of another holder, or of an authority that is not the
/// newest. True if it was issued.
pub fn ensure_certificate(
    authority: &Authority,
    files: &TlsFiles,
    identity: &Identity,
    hosts: &[String],
) -> Result<bool> {
    if let Ok(loaded) = files.load()
        && loaded.identity == *identity
        && !loaded.facts.is_due(SystemTime::now())
        && hosts.iter().all(|h| loaded.facts.hosts.contains(h))
        && loaded.is_signed_by(authority.certificate_pem())
    {
        return Ok(false);
    }
    files::write_secret(&files.certificate, &authority.issue(identity, hosts)?)?;
    Ok(true)
}
