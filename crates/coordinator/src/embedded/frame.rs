//! Frames on a connection: length, authentication tag, JSON. Hostile input costs the connection only.

use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};

/// The largest frame, in bytes: an image of the whole state and its envelope.
pub(super) const FRAME_LEN_MAX: usize = 16 * 1024 * 1024;

/// The largest frame before the peer has proved who it is, in bytes.
pub(super) const HELLO_LEN_MAX: usize = 2048;

/// How long the rest of a frame may take once it has begun, and how long writing one may take.
pub(super) const FRAME_TIMEOUT: Duration = Duration::from_secs(5);

const TAG_LEN: usize = 16;
const HEADER_LEN: usize = 4 + TAG_LEN;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("too slow")]
    TimedOut,
    #[error("a frame of {0} bytes is too long")]
    TooLong(usize),
    #[error("a frame is not authentic")]
    NotAuthentic,
    #[error("a frame is not understood: {0}")]
    NotUnderstood(String),
}

/// The key of one direction of one connection; all-zero before the handshake is through.
#[derive(Clone)]
pub(super) struct Key(pub(super) [u8; 32]);

/// HMAC-SHA256 over the parts, each with its length before it.
pub(super) fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    // HMAC takes a key of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else {
        return [0; 32];
    };
    for part in parts {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn tag(key: &Key, seq: u64, payload: &[u8]) -> [u8; TAG_LEN] {
    let full = mac(&key.0, &[&seq.to_le_bytes(), payload]);
    let mut out = [0; TAG_LEN];
    for (to, from) in out.iter_mut().zip(full) {
        *to = from;
    }
    out
}

/// Reads frames. [`FrameReader::next`] may be dropped at any await without losing bytes.
pub(super) struct FrameReader<R> {
    from: R,
    buffer: Vec<u8>,
    key: Key,
    seq: u64,
    len_max: usize,
    /// When the frame that has begun must be whole.
    due: Option<Instant>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            buffer: Vec::new(),
            key: Key([0; 32]),
            seq: 0,
            len_max: HELLO_LEN_MAX,
            due: None,
        }
    }

    /// From here on the peer is known.
    pub(super) fn authenticated(&mut self, key: Key) {
        self.key = key;
        self.seq = 0;
        self.len_max = FRAME_LEN_MAX;
    }

    /// The next frame. Waits without limit for it to begin, but not for it to end.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<T, FrameError> {
        loop {
            if let Some(frame) = self.take()? {
                self.due = None;
                return Ok(frame);
            }
            let begun = !self.buffer.is_empty();
            let read = self.from.read_buf(&mut self.buffer);
            let n = if begun {
                let due = *self
                    .due
                    .get_or_insert_with(|| Instant::now() + FRAME_TIMEOUT);
                timeout_at(due, read)
                    .await
                    .map_err(|_| FrameError::TimedOut)??
            } else {
                read.await?
            };
            if n == 0 {
                return Err(FrameError::Closed);
            }
        }
    }

    fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some(len) = self.buffer.first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*len) as usize;
        if len > self.len_max {
            return Err(FrameError::TooLong(len));
        }
        let Some(frame) = self.buffer.get(4..HEADER_LEN + len) else {
            return Ok(None);
        };
        let Some((claimed, payload)) = frame.split_first_chunk::<TAG_LEN>() else {
            return Ok(None);
        };
        let expected = tag(&self.key, self.seq, payload);
        if !bool::from(subtle::ConstantTimeEq::ct_eq(&claimed[..], &expected[..])) {
            return Err(FrameError::NotAuthentic);
        }
        let parsed = serde_json::from_slice(payload)
            .map_err(|e| FrameError::NotUnderstood(e.to_string()))?;
        self.seq += 1;
        self.buffer.drain(..HEADER_LEN + len);
        Ok(Some(parsed))
    }
}

/// Writes frames.
pub(super) struct FrameWriter<W> {
    to: W,
    key: Key,
    seq: u64,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub(super) fn new(to: W) -> Self {
        Self {
            to,
            key: Key([0; 32]),
            seq: 0,
        }
    }

    /// From here on the peer is known.
    pub(super) fn authenticated(&mut self, key: Key) {
        self.key = key;
        self.seq = 0;
    }

    /// Writes one frame whole; after an error, or when dropped half-way, the connection is of no more use.
    pub(super) async fn send<T: Serialize>(&mut self, value: &T) -> Result<(), FrameError> {
        let payload =
            serde_json::to_vec(value).map_err(|e| FrameError::NotUnderstood(e.to_string()))?;
        let len = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= FRAME_LEN_MAX);
        let Some(len) = len else {
            return Err(FrameError::TooLong(payload.len()));
        };
        let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
        frame.extend_from_slice(&len.to_le_bytes());
        frame.extend_from_slice(&tag(&self.key, self.seq, &payload));
        frame.extend_from_slice(&payload);
        self.seq += 1;
        let write = async {
            self.to.write_all(&frame).await?;
            // TLS may hold back what did not fit into the socket.
            self.to.flush().await
        };
        timeout(FRAME_TIMEOUT, write)
            .await
            .map_err(|_| FrameError::TimedOut)??;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wait<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.unwrap().block_on(work)
    }

    /// The frames of these texts, as they go over the wire.
    fn written(texts: &[String], key: [u8; 32]) -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new());
        writer.authenticated(Key(key));
        wait(async {
            for text in texts {
                writer.send(text).await.unwrap();
            }
        });
        writer.to
    }

    /// What a reader takes from these bytes until it ends, and why it ends.
    fn read(bytes: &[u8], key: Option<[u8; 32]>) -> (Vec<String>, FrameError) {
        let mut reader = FrameReader::new(bytes);
        if let Some(key) = key {
            reader.authenticated(Key(key));
        }
        wait(async {
            let mut taken = Vec::new();
            loop {
                match reader.next::<String>().await {
                    Ok(text) => taken.push(text),
                    Err(end) => return (taken, end),
                }
            }
        })
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_error_and_are_not_hoarded(bytes in proptest::collection::vec(any::<u8>(), 0..6000)) {
            let (taken, _) = read(&bytes, None);
            prop_assert!(taken.is_empty());
        }

        #[test]
        fn what_was_written_is_read_and_what_was_altered_replayed_or_reordered_is_not(
            texts in proptest::collection::vec(".{0,40}", 2..5),
            key in any::<[u8; 32]>(),
            at in any::<proptest::sample::Index>(),
            bit in 0..8_u32,
        ) {
            let bytes = written(&texts, key);
            let (taken, end) = read(&bytes, Some(key));
            prop_assert_eq!(&taken, &texts);
            prop_assert!(matches!(end, FrameError::Closed));
            let mut altered = bytes.clone();
            altered[at.index(bytes.len())] ^= 1 << bit;
            let (taken, _) = read(&altered, Some(key));
            prop_assert!(taken.len() < texts.len() && texts.starts_with(&taken));
            let replayed = [&bytes[..], &bytes[..]].concat();
            let (taken, end) = read(&replayed, Some(key));
            prop_assert_eq!(&taken, &texts);
            prop_assert!(matches!(end, FrameError::NotAuthentic));
            let first = written(&texts[..1], key).len();
            let (taken, end) = read(&bytes[first..], Some(key));
            prop_assert!(taken.is_empty() && matches!(end, FrameError::NotAuthentic));
        }
    }

    #[test]
    fn the_length_of_a_strangers_frame_is_bounded_before_anything_is_kept() {
        let too_long = u32::try_from(HELLO_LEN_MAX + 1).unwrap().to_le_bytes();
        assert!(matches!(read(&too_long, None).1, FrameError::TooLong(_)));
        let too_long = u32::try_from(FRAME_LEN_MAX + 1).unwrap().to_le_bytes();
        assert!(matches!(
            read(&too_long, Some([1; 32])).1,
            FrameError::TooLong(_)
        ));
    }
}
