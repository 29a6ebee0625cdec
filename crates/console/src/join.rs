//! What is said about tokens, joining, and new certificates.

use craton_trust::Role;
use serde::{Deserialize, Serialize};

/// Keeps a token: `POST /v1/join-tokens`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenRequest {
    /// SHA-256 of the token's secret, in hexadecimal.
    pub id: String,
    /// What the new part may do.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// Host names and addresses that its certificate names.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// For how many seconds it is good.
    pub ttl_s: u64,
}

/// A token was kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenView {
    /// SHA-256 of the certificate of the authority that signs, in hexadecimal: a part of the token.
    pub signer_sha256: String,
    /// Until when it is good, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// Uses a token: `POST /join`. Not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The token's secret.
    pub secret: String,
    /// The request for a certificate, in PEM.
    pub request: String,
}

/// What a new part gets. Not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinView {
    /// Its certificate.
    pub certificate: CertificateView,
    /// Names and contents of the secrets that its role needs.
    pub secrets: Vec<(String, String)>,
}

/// Asks for a new certificate with the present one: `POST /v1/certificate`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CertificateRequest {
    /// The request, in PEM.
    pub request: String,
}

/// A signed certificate.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CertificateView {
    /// Whom it names.
    pub identity: String,
    /// The certificate and its chain, in PEM.
    pub certificate: String,
    /// The authorities that are trusted, in PEM.
    pub authority: String,
}

/// Whom the cluster trusts: `GET /v1/authority`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AuthorityView {
    /// The cluster's name.
    pub cluster: String,
    /// The authorities that are trusted, in PEM.
    pub authority: String,
    /// SHA-256 of the certificate of the one that signs, in hexadecimal.
    pub signer_sha256: String,
}
