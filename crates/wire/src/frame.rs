//! Frames: a tag, a length and a body, as every message after the startup packet has it.
//!
//! Sans-io: functions look at whatever bytes have arrived and say what they are. Nothing is copied, and
//! a header alone is enough to pass a message on, so a body larger than any buffer can be streamed.
//! Source: PostgreSQL's documentation, "Message Formats".

/// Bytes of a header: the tag and the length.
pub const HEADER_LEN: usize = 5;

/// The largest body that PostgreSQL itself can send (`PQ_LARGE_MESSAGE_LIMIT`, `MaxAllocSize - 1`), in bytes.
pub const BODY_LEN_MAX: usize = 0x3FFF_FFFE;

/// Bytes that cannot be a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field counts itself, so it is never below 4.
    #[error(
        "a message announces a length of {announced} bytes, below the 4 bytes of the length itself"
    )]
    TooShort {
        /// What the length field says.
        announced: i32,
    },
    /// Longer than the caller's limit.
    #[error("a message of {len} bytes is over the limit of {max} bytes")]
    TooLong {
        /// Length of the body in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// The fields inside a message do not fit into it.
    #[error("a malformed {0} message")]
    Malformed(&'static str),
}

/// A header that has arrived completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The message's type.
    pub tag: u8,
    /// Bytes of the body, without tag and length.
    pub body_len: usize,
}

impl Header {
    /// Bytes of the whole frame.
    pub fn frame_len(self) -> usize {
        HEADER_LEN + self.body_len
    }
}

/// A whole frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The message's type.
    pub tag: u8,
    /// Its content.
    pub body: &'a [u8],
}

/// The header at the start of `buf`; `None` while it is incomplete. `body_max` in bytes.
pub fn header(buf: &[u8], body_max: usize) -> Result<Option<Header>, FrameError> {
    let Some([tag, a, b, c, d]) = buf.first_chunk::<HEADER_LEN>().copied() else {
        return Ok(None);
    };
    let announced = i32::from_be_bytes([a, b, c, d]);
    let body_len = usize::try_from(i64::from(announced) - 4)
        .map_err(|_| FrameError::TooShort { announced })?;
    if body_len > body_max {
        return Err(FrameError::TooLong {
            len: body_len,
            max: body_max,
        });
    }
    Ok(Some(Header { tag, body_len }))
}

/// The frame at the start of `buf` and how many bytes it takes; `None` while it is incomplete.
pub fn frame(buf: &[u8], body_max: usize) -> Result<Option<(Frame<'_>, usize)>, FrameError> {
    let Some(header) = header(buf, body_max)? else {
        return Ok(None);
    };
    let len = header.frame_len();
    Ok(buf.get(HEADER_LEN..len).map(|body| {
        (
            Frame {
                tag: header.tag,
                body,
            },
            len,
        )
    }))
}

/// Appends one message: the tag, room for the length, what `body` writes, and then the length.
/// A body over `i32::MAX` cannot be announced; callers bound theirs far below.
pub fn write(out: &mut Vec<u8>, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    write_untagged(out, body);
}

/// As [`write()`], for the packets that have no tag (startup, cancel).
pub fn write_untagged(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    let len = i32::try_from(out.len() - at)
        .unwrap_or(i32::MAX)
        .to_be_bytes();
    if let Some(place) = out.get_mut(at..at + 4) {
        place.copy_from_slice(&len);
    }
}

/// Appends a text and its terminating zero. A zero inside would end it early, so it is cut there.
pub fn put_cstr(out: &mut Vec<u8>, text: &[u8]) {
    let end = memchr::memchr(0, text).unwrap_or(text.len());
    out.extend_from_slice(text.get(..end).unwrap_or(text));
    out.push(0);
}

/// Takes bytes up to the next zero, and the rest after it; `None` without a zero.
pub fn take_cstr(buf: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr::memchr(0, buf)?;
    Some((buf.get(..end)?, buf.get(end + 1..)?))
}

/// Takes a big-endian 32-bit number, and the rest after it.
pub fn take_i32(buf: &[u8]) -> Option<(i32, &[u8])> {
    let (number, rest) = buf.split_first_chunk::<4>()?;
    Some((i32::from_be_bytes(*number), rest))
}

/// Takes a big-endian 16-bit number, and the rest after it.
pub fn take_i16(buf: &[u8]) -> Option<(i16, &[u8])> {
    let (number, rest) = buf.split_first_chunk::<2>()?;
    Some((i16::from_be_bytes(*number), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every frame in `buf`, fed in pieces of the given sizes.
    fn frames_in_pieces(buf: &[u8], sizes: &[usize]) -> Result<Vec<(u8, Vec<u8>)>, FrameError> {
        let (mut held, mut found, mut rest) = (Vec::new(), Vec::new(), buf);
        let mut sizes = sizes.iter().copied().cycle();
        loop {
            while let Some((f, len)) = frame(&held, 1 << 20)? {
                found.push((f.tag, f.body.to_vec()));
                held.drain(..len);
            }
            if rest.is_empty() {
                return Ok(found);
            }
            let n = sizes.next().unwrap_or(1).clamp(1, rest.len());
            held.extend_from_slice(&rest[..n]);
            rest = &rest[n..];
        }
    }

    #[test]
    fn limits() {
        assert_eq!(header(b"Q\0\0\0", 10), Ok(None));
        assert_eq!(
            header(b"Q\0\0\0\x03", 10),
            Err(FrameError::TooShort { announced: 3 })
        );
        assert_eq!(
            header(b"Q\xff\0\0\0", 10),
            Err(FrameError::TooShort {
                announced: -16_777_216
            })
        );
        assert_eq!(
            header(b"Q\0\0\0\x0f", 10),
            Err(FrameError::TooLong { len: 11, max: 10 })
        );
        assert_eq!(
            header(b"Q\0\0\0\x0e", 10),
            Ok(Some(Header {
                tag: b'Q',
                body_len: 10
            }))
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(buf in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = frame(&buf, 100);
            let _ = take_cstr(&buf);
            let _ = take_i32(&buf);
        }

        #[test]
        fn any_split_gives_the_same_frames(
            messages in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
            sizes in proptest::collection::vec(1_usize..20, 1..6),
        ) {
            let mut buf = Vec::new();
            for (tag, body) in &messages {
                write(&mut buf, *tag, |out| out.extend_from_slice(body));
            }
            prop_assert_eq!(frames_in_pieces(&buf, &sizes), Ok(messages));
        }
    }
}
