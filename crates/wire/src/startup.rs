//! The first packet of a connection, which has a length but no tag.
//!
//! Source: PostgreSQL's documentation, "Message Flow" (Start-up, SSL, GSSAPI, Canceling), and
//! `pqcomm.h`.

use crate::frame::{FrameError, put_cstr, take_cstr, take_i32, write_untagged};

/// Protocol 3.0.
pub const PROTOCOL_3_0: i32 = 3 << 16;

/// The largest first packet that PostgreSQL takes (`MAX_STARTUP_PACKET_LENGTH`), in bytes.
pub const STARTUP_LEN_MAX: usize = 10_000;

/// The most bytes of a cancel key (protocol 3.2 allows up to 256; 3.0 has 4).
pub const CANCEL_KEY_LEN_MAX: usize = 256;

const CANCEL_REQUEST: i32 = (1234 << 16) + 5678;
const SSL_REQUEST: i32 = (1234 << 16) + 5679;
const GSSENC_REQUEST: i32 = (1234 << 16) + 5680;

/// What a client opens a connection with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstPacket<'a> {
    /// Asks whether TLS may begin; answered with one byte.
    SslRequest,
    /// Asks whether GSSAPI encryption may begin; answered with one byte.
    GssEncRequest,
    /// Asks to cancel what another connection runs.
    Cancel {
        /// The process that the key belongs to.
        process: i32,
        /// The secret key.
        key: &'a [u8],
    },
    /// Begins a session.
    Startup(Startup<'a>),
}

/// A StartupMessage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup<'a> {
    /// The minor protocol version: 0 for 3.0.
    pub minor: u16,
    /// The parameters in the order of the packet.
    pub parameters: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Startup<'a> {
    /// A parameter's value; the last one counts, as in PostgreSQL.
    pub fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.parameters
            .iter()
            .rev()
            .find(|(n, _)| *n == name.as_bytes())
            .map(|(_, v)| *v)
    }
}

/// The first packet at the start of `buf` and its length; `None` while it is incomplete.
pub fn first_packet(buf: &[u8]) -> Result<Option<(FirstPacket<'_>, usize)>, FrameError> {
    let Some((announced, _)) = take_i32(buf) else {
        return Ok(None);
    };
    let len = usize::try_from(announced)
        .ok()
        .filter(|len| *len >= 8)
        .ok_or(FrameError::TooShort { announced })?;
    if len > STARTUP_LEN_MAX {
        return Err(FrameError::TooLong {
            len,
            max: STARTUP_LEN_MAX,
        });
    }
    let Some(body) = buf.get(4..len) else {
        return Ok(None);
    };
    let bad = FrameError::Malformed("startup");
    let (code, rest) = take_i32(body).ok_or(bad)?;
    let packet = match code {
        SSL_REQUEST => FirstPacket::SslRequest,
        GSSENC_REQUEST => FirstPacket::GssEncRequest,
        CANCEL_REQUEST => {
            let (process, key) = take_i32(rest).ok_or(FrameError::Malformed("cancel"))?;
            if key.is_empty() || key.len() > CANCEL_KEY_LEN_MAX {
                return Err(FrameError::Malformed("cancel"));
            }
            FirstPacket::Cancel { process, key }
        }
        version if version >> 16 == 3 => FirstPacket::Startup(Startup {
            minor: u16::try_from(version & 0xFFFF).map_err(|_| bad)?,
            parameters: parameters(rest).ok_or(bad)?,
        }),
        _ => {
            return Err(FrameError::Malformed(
                "startup (only protocol 3 is spoken here)",
            ));
        }
    };
    Ok(Some((packet, len)))
}

fn parameters(mut rest: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut found = Vec::new();
    loop {
        let (name, after) = take_cstr(rest)?;
        if name.is_empty() {
            return after.is_empty().then_some(found);
        }
        let (value, after) = take_cstr(after)?;
        found.push((name, value));
        rest = after;
    }
}

/// Appends a StartupMessage of protocol 3.0.
pub fn put_startup<'a>(
    out: &mut Vec<u8>,
    parameters: impl IntoIterator<Item = (&'a str, &'a str)>,
) {
    write_untagged(out, |out| {
        out.extend_from_slice(&PROTOCOL_3_0.to_be_bytes());
        for (name, value) in parameters {
            put_cstr(out, name.as_bytes());
            put_cstr(out, value.as_bytes());
        }
        out.push(0);
    });
}

/// Appends an SSLRequest.
pub fn put_ssl_request(out: &mut Vec<u8>) {
    write_untagged(out, |out| out.extend_from_slice(&SSL_REQUEST.to_be_bytes()));
}

/// Appends a CancelRequest.
pub fn put_cancel_request(out: &mut Vec<u8>, process: i32, key: &[u8]) {
    write_untagged(out, |out| {
        out.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
        out.extend_from_slice(&process.to_be_bytes());
        out.extend_from_slice(key);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn startup_round_trips_and_the_last_parameter_counts() {
        let mut buf = Vec::new();
        put_startup(
            &mut buf,
            [("user", "ann"), ("database", "a"), ("database", "b")],
        );
        let (packet, len) = first_packet(&buf).unwrap().unwrap();
        assert_eq!(len, buf.len());
        let FirstPacket::Startup(startup) = packet else {
            panic!("{packet:?}")
        };
        assert_eq!(startup.get("user"), Some(&b"ann"[..]));
        assert_eq!(startup.get("database"), Some(&b"b"[..]));
        for cut in 0..buf.len() {
            assert_eq!(first_packet(&buf[..cut]), Ok(None), "cut at {cut}");
        }
    }

    #[test]
    fn special_requests() {
        let mut buf = Vec::new();
        put_ssl_request(&mut buf);
        assert_eq!(first_packet(&buf), Ok(Some((FirstPacket::SslRequest, 8))));
        buf.clear();
        put_cancel_request(&mut buf, 7, &[1, 2, 3, 4]);
        assert_eq!(
            first_packet(&buf),
            Ok(Some((
                FirstPacket::Cancel {
                    process: 7,
                    key: &[1, 2, 3, 4]
                },
                16
            )))
        );
    }

    #[test]
    fn http_and_giants_are_refused() {
        assert!(first_packet(b"GET / HTTP/1.1\r\n").is_err());
        assert!(first_packet(&[0, 0, 0, 4, 0, 0, 0, 0]).is_err());
        assert!(
            first_packet(&[0, 0, 0, 8, 0, 2, 0, 0]).is_err(),
            "protocol 2"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(buf in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = first_packet(&buf);
        }

        #[test]
        fn arbitrary_startup_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut buf = Vec::new();
            write_untagged(&mut buf, |out| {
                out.extend_from_slice(&PROTOCOL_3_0.to_be_bytes());
                out.extend_from_slice(&body);
            });
            let _ = first_packet(&buf);
        }
    }
}
