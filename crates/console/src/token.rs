//! The secret that opens `/v1/`: read from a file, compared in constant time, never printed.

use std::fmt;
use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq;

/// The longest token file that is read, in bytes.
const TOKEN_LEN_MAX: u64 = 4096;

/// The shortest token that is accepted, in bytes: shorter ones can be guessed.
const TOKEN_LEN_MIN: usize = 16;

/// A bearer token. Its `Debug` shows nothing of it.
#[derive(Clone)]
pub struct Token(String);

/// Why a token file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error(
        "cannot read the API token from {path}: {source}; check the path and that this user may read it"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It does not hold a token.
    #[error(
        "{path} does not hold an API token: expected one line of {TOKEN_LEN_MIN} or more visible ASCII characters"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

impl Token {
    /// Wraps a token; `None` when it is too short or has characters that cannot stand in a header.
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text = text.into();
        let fits = text.len() >= TOKEN_LEN_MIN && text.bytes().all(|b| b.is_ascii_graphic());
        fits.then_some(Self(text))
    }

    /// Reads a token from the first line of a file.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        let read = |source| TokenError::Read {
            path: path.to_owned(),
            source,
        };
        let malformed = || TokenError::Malformed {
            path: path.to_owned(),
        };
        if std::fs::metadata(path).map_err(read)?.len() > TOKEN_LEN_MAX {
            return Err(malformed());
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::new(text.trim()).ok_or_else(malformed)
    }

    /// True when a header `Authorization` carries this token.
    pub fn admits(&self, authorization: &str) -> bool {
        let Some((scheme, given)) = authorization.split_once(' ') else {
            return false;
        };
        scheme.eq_ignore_ascii_case("bearer")
            && bool::from(given.trim().as_bytes().ct_eq(self.0.as_bytes()))
    }

    /// The value of the `Authorization` header.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admits_its_own_header_only() {
        let token = Token::new("0123456789abcdef").unwrap();
        assert!(token.admits(&token.header()));
        assert!(token.admits("bearer 0123456789abcdef"));
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer 0123456789abcdeg",
            "Basic 0123456789abcdef",
            "0123456789abcdef",
        ] {
            assert!(!token.admits(bad), "{bad}");
        }
        assert_eq!(format!("{token:?}"), "Token(…)");
    }

    #[test]
    fn short_or_odd_tokens_are_refused() {
        assert!(Token::new("short").is_none());
        assert!(Token::new("0123456789abcdef with spaces").is_none());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        assert!(Token::from_file(file.path()).is_ok());
        std::fs::write(file.path(), "\n").unwrap();
        assert!(
            Token::from_file(file.path())
                .unwrap_err()
                .to_string()
                .contains("does not hold")
        );
    }
}
