//! The streaming replication protocol: what a WAL receiver and a base backup say and hear.
//!
//! Source: PostgreSQL's documentation, "Streaming Replication Protocol", and `walsender.c`,
//! `basebackup_copy.c`. Everything here is a function from bytes to values or back.

use craton_core::{Lsn, TimelineId};

/// Microseconds from 1970-01-01 to 2000-01-01, the epoch of PostgreSQL's timestamps.
pub const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Bytes that do not follow the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the server sent a malformed {0}")]
pub struct MalformedMessage(pub &'static str);

/// A message of the server while WAL is streamed (inside CopyData).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalMessage<'a> {
    /// `w`: WAL.
    Data {
        /// The position of the first byte.
        start: Lsn,
        /// The end of the WAL on the server.
        end: Lsn,
        /// The bytes.
        data: &'a [u8],
    },
    /// `k`: the server is alive, and tells how far its WAL goes.
    Keepalive {
        /// The end of the WAL on the server.
        end: Lsn,
        /// The server wants an answer at once, or it will hang up.
        reply_requested: bool,
    },
}

impl<'a> WalMessage<'a> {
    /// Reads the content of a CopyData message.
    pub fn parse(body: &'a [u8]) -> Result<Self, MalformedMessage> {
        let bad = MalformedMessage("WAL message");
        let (tag, rest) = body.split_first().ok_or(bad.clone())?;
        match tag {
            b'w' => {
                let (start, rest) = take_u64(rest).ok_or(bad.clone())?;
                let (end, rest) = take_u64(rest).ok_or(bad.clone())?;
                let (_send_time, data) = take_u64(rest).ok_or(bad)?;
                Ok(Self::Data {
                    start: Lsn(start),
                    end: Lsn(end),
                    data,
                })
            }
            b'k' => {
                let (end, rest) = take_u64(rest).ok_or(bad.clone())?;
                let (_send_time, rest) = take_u64(rest).ok_or(bad.clone())?;
                let [reply] = rest else { return Err(bad) };
                Ok(Self::Keepalive {
                    end: Lsn(end),
                    reply_requested: *reply != 0,
                })
            }
            _ => Err(bad),
        }
    }
}

fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (head, tail) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*head), tail))
}

/// `r`: how far the receiver is. What is reported as flushed may be released for ever by the
/// server, and counts as a copy for synchronous commits: it must survive a crash of the receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StandbyStatus {
    /// Received and handed to the operating system.
    pub written: Lsn,
    /// On stable storage.
    pub flushed: Lsn,
    /// Replayed; [`Lsn::ZERO`] for a receiver that does not replay.
    pub applied: Lsn,
    /// The receiver's clock, in microseconds since 1970.
    pub now_us: i64,
    /// Ask the server to answer at once.
    pub reply_requested: bool,
}

impl StandbyStatus {
    /// The content of the CopyData message.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(34);
        out.push(b'r');
        for position in [self.written, self.flushed, self.applied] {
            out.extend_from_slice(&position.0.to_be_bytes());
        }
        out.extend_from_slice(&self.now_us.saturating_sub(POSTGRES_EPOCH_US).to_be_bytes());
        out.push(u8::from(self.reply_requested));
        out
    }
}

/// `h`: which row versions a standby's queries still need. A receiver that runs no queries sends
/// none; here for completeness of the protocol (and for sending zeros, which clears an old one).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HotStandbyFeedback {
    /// The sender's clock, in microseconds since 1970.
    pub now_us: i64,
    /// The oldest transaction needed, and its epoch; zero for none.
    pub xmin: (u32, u32),
    /// The oldest transaction of the catalogs needed, and its epoch; zero for none.
    pub catalog_xmin: (u32, u32),
}

impl HotStandbyFeedback {
    /// The content of the CopyData message.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(25);
        out.push(b'h');
        out.extend_from_slice(&self.now_us.saturating_sub(POSTGRES_EPOCH_US).to_be_bytes());
        for number in [
            self.xmin.0,
            self.xmin.1,
            self.catalog_xmin.0,
            self.catalog_xmin.1,
        ] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        out
    }
}

/// A message of a base backup of PostgreSQL 15 and later (inside CopyData).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackupMessage<'a> {
    /// `n`: a new archive begins.
    Archive {
        /// `base.tar` or `<oid>.tar`.
        name: &'a str,
        /// Where the tablespace lies on the server; empty for the data directory.
        location: &'a str,
    },
    /// `m`: the backup manifest begins.
    Manifest,
    /// `d`: bytes of the archive or manifest.
    Data(&'a [u8]),
    /// `p`: so many bytes of the current archive were read.
    Progress(u64),
}

impl<'a> BackupMessage<'a> {
    /// Reads the content of a CopyData message.
    pub fn parse(body: &'a [u8]) -> Result<Self, MalformedMessage> {
        let bad = MalformedMessage("backup message");
        let (tag, rest) = body.split_first().ok_or(bad.clone())?;
        match tag {
            b'n' => {
                let (name, rest) = take_text(rest).ok_or(bad.clone())?;
                let (location, _) = take_text(rest).ok_or(bad)?;
                Ok(Self::Archive { name, location })
            }
            b'm' => Ok(Self::Manifest),
            b'd' => Ok(Self::Data(rest)),
            b'p' => take_u64(rest).map(|(n, _)| Self::Progress(n)).ok_or(bad),
            _ => Err(bad),
        }
    }
}

fn take_text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = memchr::memchr(0, bytes)?;
    let (text, rest) = bytes.split_at(end);
    Some((std::str::from_utf8(text).ok()?, rest.get(1..)?))
}

/// The columns of a DataRow message; `None` is SQL's NULL.
pub fn parse_row(body: &[u8]) -> Result<Vec<Option<&[u8]>>, MalformedMessage> {
    let bad = MalformedMessage("row");
    let (count, mut rest) = body.split_first_chunk::<2>().ok_or(bad.clone())?;
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, tail) = rest.split_first_chunk::<4>().ok_or(bad.clone())?;
        let length = i32::from_be_bytes(*length);
        if length == -1 {
            columns.push(None);
            rest = tail;
            continue;
        }
        let length = usize::try_from(length).map_err(|_| bad.clone())?;
        let (column, tail) = tail.split_at_checked(length).ok_or(bad.clone())?;
        columns.push(Some(column));
        rest = tail;
    }
    Ok(columns)
}

/// The fields of an ErrorResponse or NoticeResponse that say what happened.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServerReport {
    /// SQLSTATE, five characters.
    pub code: String,
    /// The message.
    pub message: String,
    /// Detail, where there is one.
    pub detail: Option<String>,
    /// Hint, where there is one.
    pub hint: Option<String>,
}

/// Reads an ErrorResponse or NoticeResponse. Never fails: what cannot be read is left empty.
pub fn parse_report(body: &[u8]) -> ServerReport {
    let mut report = ServerReport::default();
    for field in body.split(|b| *b == 0) {
        let Some((tag, text)) = field.split_first() else {
            continue;
        };
        let text = String::from_utf8_lossy(text).into_owned();
        match tag {
            b'C' => report.code = text,
            b'M' => report.message = text,
            b'D' => report.detail = Some(text),
            b'H' => report.hint = Some(text),
            _ => {}
        }
    }
    report
}

/// Quotes a name for a replication command, whose grammar knows SQL's double quotes.
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a text for a replication command. Its lexer (`repl_scanner.l`) has no backslash escapes.
pub fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// `START_REPLICATION`: streams WAL of `timeline` from `start`.
pub fn start_physical(slot: Option<&str>, start: Lsn, timeline: TimelineId) -> String {
    let slot = slot
        .map(|s| format!("SLOT {} ", quote_identifier(s)))
        .unwrap_or_default();
    format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}")
}

/// What a base backup is asked to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaseBackupOptions {
    /// The label in `backup_label`.
    pub label: String,
    /// Checkpoint at once instead of spreading its writes.
    pub fast_checkpoint: bool,
    /// At most so many kB a second; 32 to 1048576, as the server demands. None: no limit.
    pub max_rate_kb: Option<u32>,
    /// Ask for a backup manifest, which `pg_verifybackup` reads.
    pub manifest: bool,
}

impl BaseBackupOptions {
    /// The command. PostgreSQL 15 has parenthesised options, 13 and 14 a list of words. WAL is
    /// neither included nor waited for: it comes by the archive's own stream.
    pub fn command(&self, server_version: u32) -> String {
        let label = quote_literal(&self.label);
        let rate = self.max_rate_kb.map(|kb| kb.clamp(32, 1_048_576));
        if server_version >= 150_000 {
            let mut options = vec![
                format!("LABEL {label}"),
                "PROGRESS true".to_owned(),
                format!(
                    "CHECKPOINT '{}'",
                    if self.fast_checkpoint {
                        "fast"
                    } else {
                        "spread"
                    }
                ),
                "WAIT false".to_owned(),
                format!("MANIFEST '{}'", if self.manifest { "yes" } else { "no" }),
            ];
            options.extend(rate.map(|kb| format!("MAX_RATE {kb}")));
            return format!("BASE_BACKUP ({})", options.join(", "));
        }
        let mut words = vec![format!("BASE_BACKUP LABEL {label} PROGRESS")];
        words.extend(self.fast_checkpoint.then(|| "FAST".to_owned()));
        words.push("NOWAIT".to_owned());
        words.extend(rate.map(|kb| format!("MAX_RATE {kb}")));
        words.extend(self.manifest.then(|| "MANIFEST 'yes'".to_owned()));
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wal_messages() {
        let mut body = vec![b'w'];
        for n in [0x100_0000_u64, 0x100_0003, 7] {
            body.extend_from_slice(&n.to_be_bytes());
        }
        body.extend_from_slice(b"wal");
        let data = WalMessage::Data {
            start: Lsn(0x100_0000),
            end: Lsn(0x100_0003),
            data: b"wal",
        };
        assert_eq!(WalMessage::parse(&body), Ok(data));

        let mut body = vec![b'k'];
        body.extend_from_slice(&5_u64.to_be_bytes());
        body.extend_from_slice(&7_u64.to_be_bytes());
        body.push(1);
        assert_eq!(
            WalMessage::parse(&body),
            Ok(WalMessage::Keepalive {
                end: Lsn(5),
                reply_requested: true
            })
        );
        body.push(1);
        assert!(WalMessage::parse(&body).is_err());
    }

    #[test]
    fn status_is_laid_out_as_the_walsender_reads_it() {
        let status = StandbyStatus {
            written: Lsn(3),
            flushed: Lsn(2),
            applied: Lsn::ZERO,
            now_us: POSTGRES_EPOCH_US + 1,
            reply_requested: true,
        };
        let bytes = status.encode();
        assert_eq!(bytes.len(), 34);
        assert_eq!(
            (
                bytes[0], bytes[8], bytes[16], bytes[24], bytes[32], bytes[33]
            ),
            (b'r', 3, 2, 0, 1, 1)
        );
        assert_eq!(HotStandbyFeedback::default().encode().len(), 25);
    }

    #[test]
    fn backup_messages() {
        let archive = BackupMessage::Archive {
            name: "16400.tar",
            location: "/srv/ts",
        };
        assert_eq!(BackupMessage::parse(b"n16400.tar\0/srv/ts\0"), Ok(archive));
        assert_eq!(BackupMessage::parse(b"m"), Ok(BackupMessage::Manifest));
        assert_eq!(
            BackupMessage::parse(b"dxyz"),
            Ok(BackupMessage::Data(b"xyz"))
        );
        assert_eq!(
            BackupMessage::parse(b"p\0\0\0\0\0\0\x01\0"),
            Ok(BackupMessage::Progress(256))
        );
        for bad in [&b""[..], b"n", b"nbase.tar\0", b"p\0", b"?"] {
            assert!(BackupMessage::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn rows_and_reports() {
        assert_eq!(
            parse_row(b"\0\x02\0\0\0\x01x\xff\xff\xff\xff"),
            Ok(vec![Some(&b"x"[..]), None])
        );
        assert!(parse_row(b"\0\x01\0\0\0\x09x").is_err());
        let report = parse_report(b"SERROR\0C58P01\0Mgone\0\0");
        assert_eq!(
            (report.code.as_str(), report.message.as_str()),
            ("58P01", "gone")
        );
    }

    #[test]
    fn commands_of_both_grammars() {
        let options = BaseBackupOptions {
            label: "it's".into(),
            fast_checkpoint: true,
            max_rate_kb: Some(9),
            manifest: true,
        };
        assert_eq!(
            options.command(150_004),
            "BASE_BACKUP (LABEL 'it''s', PROGRESS true, CHECKPOINT 'fast', WAIT false, MANIFEST 'yes', MAX_RATE 32)"
        );
        assert_eq!(
            options.command(140_011),
            "BASE_BACKUP LABEL 'it''s' PROGRESS FAST NOWAIT MAX_RATE 32 MANIFEST 'yes'"
        );
        assert_eq!(
            start_physical(Some("a\"b"), Lsn(0x1_0000_0010), TimelineId(3)),
            "START_REPLICATION SLOT \"a\"\"b\" PHYSICAL 1/10 TIMELINE 3"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_stumble(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = WalMessage::parse(&body);
            let _ = BackupMessage::parse(&body);
            let _ = parse_row(&body);
            let _ = parse_report(&body);
        }
    }
}
