//! Messages that a server sends: builders for a proxy that answers itself, and views of what arrives.

use crate::frame::{FrameError, put_cstr, take_cstr, take_i16, take_i32, write};

/// The state of a session between statements, as ReadyForQuery tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransactionStatus {
    /// No transaction block.
    #[default]
    Idle,
    /// Inside a transaction block.
    InTransaction,
    /// Inside a block that failed: everything but its end is refused.
    Failed,
}

impl TransactionStatus {
    /// Reads the body of a ReadyForQuery.
    pub fn parse(body: &[u8]) -> Result<Self, FrameError> {
        match body {
            [b'I'] => Ok(Self::Idle),
            [b'T'] => Ok(Self::InTransaction),
            [b'E'] => Ok(Self::Failed),
            _ => Err(FrameError::Malformed("ReadyForQuery")),
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Idle => b'I',
            Self::InTransaction => b'T',
            Self::Failed => b'E',
        }
    }
}

/// Appends a ReadyForQuery.
pub fn put_ready(out: &mut Vec<u8>, status: TransactionStatus) {
    write(out, b'Z', |out| out.push(status.byte()));
}

/// Appends an AuthenticationOk.
pub fn put_auth_ok(out: &mut Vec<u8>) {
    put_auth(out, 0, &[]);
}

/// Appends an AuthenticationMD5Password.
pub fn put_auth_md5(out: &mut Vec<u8>, salt: [u8; 4]) {
    put_auth(out, 5, &salt);
}

/// Appends an AuthenticationSASL that offers one mechanism.
pub fn put_auth_sasl(out: &mut Vec<u8>, mechanism: &str) {
    let mut list = Vec::with_capacity(mechanism.len() + 2);
    put_cstr(&mut list, mechanism.as_bytes());
    list.push(0);
    put_auth(out, 10, &list);
}

/// Appends an AuthenticationSASLContinue.
pub fn put_auth_sasl_continue(out: &mut Vec<u8>, data: &[u8]) {
    put_auth(out, 11, data);
}

/// Appends an AuthenticationSASLFinal.
pub fn put_auth_sasl_final(out: &mut Vec<u8>, data: &[u8]) {
    put_auth(out, 12, data);
}

fn put_auth(out: &mut Vec<u8>, code: i32, data: &[u8]) {
    write(out, b'R', |out| {
        out.extend_from_slice(&code.to_be_bytes());
        out.extend_from_slice(data);
    });
}

/// Appends a ParameterStatus.
pub fn put_parameter_status(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    write(out, b'S', |out| {
        put_cstr(out, name);
        put_cstr(out, value);
    });
}

/// Appends a BackendKeyData.
pub fn put_key_data(out: &mut Vec<u8>, process: i32, key: &[u8]) {
    write(out, b'K', |out| {
        out.extend_from_slice(&process.to_be_bytes());
        out.extend_from_slice(key);
    });
}

/// Appends a NegotiateProtocolVersion: 3.0 is the newest spoken, and these options are not known.
pub fn put_negotiate_version(out: &mut Vec<u8>, unknown_options: &[&[u8]]) {
    write(out, b'v', |out| {
        out.extend_from_slice(&0_i32.to_be_bytes());
        out.extend_from_slice(
            &i32::try_from(unknown_options.len())
                .unwrap_or(0)
                .to_be_bytes(),
        );
        for option in unknown_options {
            put_cstr(out, option);
        }
    });
}

/// Appends a CommandComplete.
pub fn put_command_complete(out: &mut Vec<u8>, tag: &str) {
    write(out, b'C', |out| put_cstr(out, tag.as_bytes()));
}

/// Appends a message that has no body: ParseComplete (`1`), BindComplete (`2`), CloseComplete (`3`), …
pub fn put_empty(out: &mut Vec<u8>, tag: u8) {
    write(out, tag, |_| {});
}

/// An ErrorResponse or NoticeResponse to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report<'a> {
    /// `ERROR`, `FATAL`, `WARNING`, …
    pub severity: &'a str,
    /// SQLSTATE: five characters.
    pub code: &'a str,
    /// What happened.
    pub message: &'a str,
    /// More about it; nothing is sent if empty.
    pub detail: &'a str,
    /// What to do; nothing is sent if empty.
    pub hint: &'a str,
}

/// Appends an ErrorResponse.
pub fn put_error(out: &mut Vec<u8>, report: Report<'_>) {
    put_report(out, b'E', report);
}

/// Appends a NoticeResponse.
pub fn put_notice(out: &mut Vec<u8>, report: Report<'_>) {
    put_report(out, b'N', report);
}

fn put_report(out: &mut Vec<u8>, tag: u8, report: Report<'_>) {
    let fields = [
        (b'S', report.severity),
        (b'V', report.severity),
        (b'C', report.code),
        (b'M', report.message),
        (b'D', report.detail),
        (b'H', report.hint),
    ];
    write(out, tag, |out| {
        for (field, text) in fields {
            if !text.is_empty() {
                out.push(field);
                put_cstr(out, text.as_bytes());
            }
        }
        out.push(0);
    });
}

/// A view of an ErrorResponse or NoticeResponse. Fields that did not arrive completely are absent, so it
/// also reads the beginning of a message that is longer than a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// Wraps the body, or its beginning.
    pub fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    /// All fields: their type and their text.
    pub fn iter(self) -> impl Iterator<Item = (u8, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (kind, after) = rest.split_first()?;
            let (text, after) = take_cstr(after)?;
            rest = after;
            (*kind != 0).then_some((*kind, text))
        })
    }

    /// One field.
    pub fn get(self, kind: u8) -> Option<&'a [u8]> {
        self.iter().find(|(k, _)| *k == kind).map(|(_, text)| text)
    }

    /// SQLSTATE, or nothing if there is none.
    pub fn code(self) -> &'a [u8] {
        self.get(b'C').unwrap_or_default()
    }

    /// The message as text.
    pub fn message(self) -> String {
        String::from_utf8_lossy(self.get(b'M').unwrap_or_default()).into_owned()
    }

    /// True when the server closes the connection after this: the severity that no language setting changes is
    /// FATAL or PANIC.
    pub fn is_fatal(self) -> bool {
        matches!(
            self.get(b'V').or_else(|| self.get(b'S')),
            Some(b"FATAL" | b"PANIC")
        )
    }

    /// True for the warning that a commit is durable here but was not confirmed by the standbys
    /// (`SyncRepWaitForLSN` in `syncrep.c`). The routine's name is the same in every language.
    pub fn is_cancelled_sync_wait(self) -> bool {
        let warning = self.get(b'V').or_else(|| self.get(b'S')) == Some(b"WARNING");
        let from_sync_rep = self.get(b'R') == Some(b"SyncRepWaitForLSN")
            || self
                .get(b'M')
                .is_some_and(|m| m.starts_with(b"canceling wait for synchronous replication"));
        warning && from_sync_rep
    }
}

/// What a server asks for while a connection is being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authentication<'a> {
    /// The client is in.
    Ok,
    /// A password in clear text.
    CleartextPassword,
    /// The MD5 answer to this salt.
    Md5Password([u8; 4]),
    /// SASL with one of these mechanisms (a list of zero-terminated names).
    Sasl(&'a [u8]),
    /// The server's next SASL message.
    SaslContinue(&'a [u8]),
    /// The server's last SASL message.
    SaslFinal(&'a [u8]),
    /// GSSAPI, SSPI or something newer.
    Other(i32),
}

impl<'a> Authentication<'a> {
    /// Reads the body of an `R` message.
    pub fn parse(body: &'a [u8]) -> Result<Self, FrameError> {
        let bad = FrameError::Malformed("Authentication");
        let (code, rest) = take_i32(body).ok_or(bad)?;
        Ok(match code {
            0 => Self::Ok,
            3 => Self::CleartextPassword,
            5 => Self::Md5Password(rest.try_into().map_err(|_| bad)?),
            10 => Self::Sasl(rest),
            11 => Self::SaslContinue(rest),
            12 => Self::SaslFinal(rest),
            other => Self::Other(other),
        })
    }

    /// True when a list of mechanisms holds this one.
    pub fn offers(list: &[u8], mechanism: &str) -> bool {
        list.split(|b| *b == 0)
            .any(|name| name == mechanism.as_bytes())
    }
}

/// Reads a ParameterStatus: name and value.
pub fn parameter_status(body: &[u8]) -> Result<(&[u8], &[u8]), FrameError> {
    let bad = FrameError::Malformed("ParameterStatus");
    let (name, rest) = take_cstr(body).ok_or(bad)?;
    let (value, rest) = take_cstr(rest).ok_or(bad)?;
    if rest.is_empty() {
        Ok((name, value))
    } else {
        Err(bad)
    }
}

/// Reads a BackendKeyData: process and secret key.
pub fn key_data(body: &[u8]) -> Result<(i32, &[u8]), FrameError> {
    let bad = FrameError::Malformed("BackendKeyData");
    let (process, key) = take_i32(body).ok_or(bad)?;
    if key.is_empty() || key.len() > crate::startup::CANCEL_KEY_LEN_MAX {
        return Err(bad);
    }
    Ok((process, key))
}

/// The command tag at the start of a CommandComplete's body, as far as it has arrived.
pub fn command_tag(body: &[u8]) -> &[u8] {
    take_cstr(body).map_or(body, |(tag, _)| tag)
}

/// Reads a DataRow: its columns, `None` for NULL.
pub fn data_row(body: &[u8]) -> Result<Vec<Option<&[u8]>>, FrameError> {
    let bad = FrameError::Malformed("DataRow");
    let (count, mut rest) = take_i16(body).ok_or(bad)?;
    let count = usize::try_from(count).map_err(|_| bad)?;
    let mut columns = Vec::with_capacity(count.min(body.len() / 4));
    for _ in 0..count {
        let (len, after) = take_i32(rest).ok_or(bad)?;
        rest = after;
        let Ok(len) = usize::try_from(len) else {
            columns.push(None);
            continue;
        };
        let (value, after) = rest.split_at_checked(len).ok_or(bad)?;
        columns.push(Some(value));
        rest = after;
    }
    Ok(columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::frame;
    use proptest::prelude::*;

    #[test]
    fn reports_round_trip() {
        let mut out = Vec::new();
        let report = Report {
            severity: "ERROR",
            code: "08007",
            message: "cut",
            detail: "",
            hint: "look",
        };
        put_error(&mut out, report);
        let (f, len) = frame(&out, 1000).unwrap().unwrap();
        assert_eq!((f.tag, len), (b'E', out.len()));
        let fields = Fields::new(f.body);
        assert_eq!(fields.code(), b"08007");
        assert_eq!(fields.message(), "cut");
        assert_eq!(fields.get(b'H'), Some(&b"look"[..]));
        assert_eq!(fields.get(b'D'), None);
        assert!(!fields.is_fatal());
    }

    #[test]
    fn the_sync_wait_warning_is_known_in_any_language() {
        let german = b"SWARNUNG\0VWARNING\0C01000\0Mstorniere Warten\0RSyncRepWaitForLSN\0\0";
        assert!(Fields::new(german).is_cancelled_sync_wait());
        let english = b"SWARNING\0C01000\0Mcanceling wait for synchronous replication due to user request\0\0";
        assert!(Fields::new(english).is_cancelled_sync_wait());
        assert!(!Fields::new(b"SWARNING\0C01000\0Mother\0\0").is_cancelled_sync_wait());
        assert!(!Fields::new(b"SERROR\0VERROR\0RSyncRepWaitForLSN\0\0").is_cancelled_sync_wait());
    }

    #[test]
    fn rows() {
        let body = [0, 2, 0, 0, 0, 2, b'h', b'i', 255, 255, 255, 255];
        assert_eq!(data_row(&body), Ok(vec![Some(&b"hi"[..]), None]));
        assert!(data_row(&body[..7]).is_err());
    }

    #[test]
    fn authentication() {
        let mut out = Vec::new();
        put_auth_sasl(&mut out, "SCRAM-SHA-256");
        let (f, _) = frame(&out, 100).unwrap().unwrap();
        let Authentication::Sasl(list) = Authentication::parse(f.body).unwrap() else {
            panic!()
        };
        assert!(Authentication::offers(list, "SCRAM-SHA-256"));
        assert!(!Authentication::offers(list, "SCRAM"));
        assert!(Authentication::parse(&[0, 0, 0, 5, 1]).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Authentication::parse(&body);
            let _ = data_row(&body);
            let _ = parameter_status(&body);
            let _ = key_data(&body);
            let _ = command_tag(&body);
            let fields = Fields::new(&body);
            let _ = (fields.is_fatal(), fields.is_cancelled_sync_wait(), fields.message(), fields.iter().count());
        }
    }
}
