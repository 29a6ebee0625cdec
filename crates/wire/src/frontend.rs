//! Messages that a client sends: builders, and the few views that a proxy needs.

use crate::frame::{FrameError, put_cstr, take_cstr, take_i32, write};

/// Appends a Query: one or more statements as text.
pub fn put_query(out: &mut Vec<u8>, sql: &str) {
    write(out, b'Q', |out| put_cstr(out, sql.as_bytes()));
}

/// Appends a Parse. `rest` is what follows the name: the query's text, its zero, and the parameter types.
pub fn put_parse_rest(out: &mut Vec<u8>, name: &[u8], rest: &[u8]) {
    write(out, b'P', |out| {
        put_cstr(out, name);
        out.extend_from_slice(rest);
    });
}

/// Appends a Parse without parameter types.
pub fn put_parse(out: &mut Vec<u8>, name: &str, sql: &str) {
    write(out, b'P', |out| {
        put_cstr(out, name.as_bytes());
        put_cstr(out, sql.as_bytes());
        out.extend_from_slice(&[0, 0]);
    });
}

/// Appends a Bind to the unnamed portal with text parameters and text results.
pub fn put_bind_text(out: &mut Vec<u8>, statement: &str, parameters: &[&str]) {
    write(out, b'B', |out| {
        out.push(0);
        put_cstr(out, statement.as_bytes());
        out.extend_from_slice(&[0, 0]);
        let count = i16::try_from(parameters.len()).unwrap_or(i16::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        for parameter in parameters.iter().take(usize::from(count.unsigned_abs())) {
            let len = i32::try_from(parameter.len()).unwrap_or(i32::MAX);
            out.extend_from_slice(&len.to_be_bytes());
            out.extend_from_slice(parameter.as_bytes());
        }
        out.extend_from_slice(&[0, 0]);
    });
}

/// Appends an Execute of the unnamed portal, without a limit of rows.
pub fn put_execute(out: &mut Vec<u8>) {
    write(out, b'E', |out| out.extend_from_slice(&[0; 5]));
}

/// What a Describe or a Close names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named<'a> {
    /// A prepared statement.
    Statement(&'a [u8]),
    /// A portal.
    Portal(&'a [u8]),
}

impl<'a> Named<'a> {
    /// Reads the body of a Describe or Close.
    pub fn parse(body: &'a [u8]) -> Result<Self, FrameError> {
        let bad = FrameError::Malformed("Describe or Close");
        let (kind, rest) = body.split_first().ok_or(bad)?;
        let (name, rest) = take_cstr(rest).ok_or(bad)?;
        match (kind, rest) {
            (b'S', []) => Ok(Self::Statement(name)),
            (b'P', []) => Ok(Self::Portal(name)),
            _ => Err(bad),
        }
    }
}

/// Appends a Describe (`D`) or Close (`C`) of a statement.
pub fn put_statement(out: &mut Vec<u8>, tag: u8, name: &[u8]) {
    write(out, tag, |out| {
        out.push(b'S');
        put_cstr(out, name);
    });
}

/// Appends a Sync.
pub fn put_sync(out: &mut Vec<u8>) {
    write(out, b'S', |_| {});
}

/// Appends a Terminate.
pub fn put_terminate(out: &mut Vec<u8>) {
    write(out, b'X', |_| {});
}

/// Appends a PasswordMessage: a clear-text password or an MD5 answer.
pub fn put_password(out: &mut Vec<u8>, password: &[u8]) {
    write(out, b'p', |out| put_cstr(out, password));
}

/// Appends a SASLInitialResponse.
pub fn put_sasl_initial(out: &mut Vec<u8>, mechanism: &str, data: &[u8]) {
    write(out, b'p', |out| {
        put_cstr(out, mechanism.as_bytes());
        out.extend_from_slice(&i32::try_from(data.len()).unwrap_or(i32::MAX).to_be_bytes());
        out.extend_from_slice(data);
    });
}

/// Appends a SASLResponse.
pub fn put_sasl_response(out: &mut Vec<u8>, data: &[u8]) {
    write(out, b'p', |out| out.extend_from_slice(data));
}

/// Appends a CopyData. A backup receiver's status updates go this way too.
pub fn put_copy_data(out: &mut Vec<u8>, data: &[u8]) {
    write(out, b'd', |out| out.extend_from_slice(data));
}

/// Appends a CopyDone.
pub fn put_copy_done(out: &mut Vec<u8>) {
    write(out, b'c', |_| {});
}

/// The first answer of a client that authenticates by SASL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaslInitial<'a> {
    /// The mechanism that it chose.
    pub mechanism: &'a [u8],
    /// Its first message; `None` when it sent none.
    pub data: Option<&'a [u8]>,
}

impl<'a> SaslInitial<'a> {
    /// Reads the body of a `p` message.
    pub fn parse(body: &'a [u8]) -> Result<Self, FrameError> {
        let bad = FrameError::Malformed("SASLInitialResponse");
        let (mechanism, rest) = take_cstr(body).ok_or(bad)?;
        let (len, data) = take_i32(rest).ok_or(bad)?;
        match usize::try_from(len) {
            Ok(len) if len == data.len() => Ok(Self {
                mechanism,
                data: Some(data),
            }),
            Err(_) if len == -1 && data.is_empty() => Ok(Self {
                mechanism,
                data: None,
            }),
            _ => Err(bad),
        }
    }
}

/// The name in a Parse and what follows it: the text, its zero, and the parameter types.
pub fn parse_name(body: &[u8]) -> Result<(&[u8], &[u8]), FrameError> {
    take_cstr(body).ok_or(FrameError::Malformed("Parse"))
}

/// The portal and the statement that a Bind names, and how many bytes both take.
/// `None` while the names have not arrived completely.
pub fn bind_names(body: &[u8]) -> Option<(&[u8], &[u8], usize)> {
    let (portal, rest) = take_cstr(body)?;
    let (statement, _) = take_cstr(rest)?;
    Some((portal, statement, portal.len() + statement.len() + 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::frame;
    use proptest::prelude::*;

    #[test]
    fn sasl_initial_round_trips() {
        let mut out = Vec::new();
        put_sasl_initial(&mut out, "SCRAM-SHA-256", b"n,,n=,r=x");
        let (f, _) = frame(&out, 100).unwrap().unwrap();
        let view = SaslInitial::parse(f.body).unwrap();
        assert_eq!(
            view,
            SaslInitial {
                mechanism: b"SCRAM-SHA-256",
                data: Some(b"n,,n=,r=x")
            }
        );
    }

    #[test]
    fn names_in_bind_and_close() {
        assert_eq!(
            bind_names(b"p\0stmt\0\0\0"),
            Some((&b"p"[..], &b"stmt"[..], 7))
        );
        assert_eq!(bind_names(b"p\0stm"), None);
        assert_eq!(Named::parse(b"Sx\0"), Ok(Named::Statement(b"x")));
        assert!(Named::parse(b"Sx\0y").is_err());
        assert!(Named::parse(b"Zx\0").is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = SaslInitial::parse(&body);
            let _ = Named::parse(&body);
            let _ = bind_names(&body);
            let _ = parse_name(&body);
        }
    }
}
