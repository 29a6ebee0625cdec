//! etcd's v3 messages as its JSON gateway has them: bytes as base64, 64-bit numbers as texts, zeros left out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A 64-bit number, written as a text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(super) struct Int(pub(super) u64);

impl Serialize for Int {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Int {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

/// A text that travels as base64.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Bytes(pub(super) String);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let bytes = STANDARD.decode(text).map_err(serde::de::Error::custom)?;
        String::from_utf8(bytes)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

/// The first key after all keys that begin with `prefix`.
pub(super) fn range_end(prefix: &str) -> Bytes {
    let mut end: Vec<char> = prefix.chars().collect();
    // The prefix ends with an ASCII slash, so the next character exists and keeps the length.
    if let Some(last) = end.pop() {
        end.push(char::from_u32(u32::from(last) + 1).unwrap_or(last));
    }
    Bytes(end.into_iter().collect())
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Header {
    pub(super) revision: Int,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct KeyValue {
    pub(super) key: Bytes,
    pub(super) mod_revision: Int,
    pub(super) value: Bytes,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Range {
    pub(super) key: Bytes,
    pub(super) range_end: Bytes,
}

impl Range {
    /// All keys that begin with `prefix`.
    pub(super) fn of(prefix: String) -> Self {
        Self {
            range_end: range_end(&prefix),
            key: Bytes(prefix),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct DeleteTold {
    pub(super) deleted: Int,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RangeTold {
    pub(super) header: Header,
    pub(super) kvs: Vec<KeyValue>,
}

/// "The key's `mod_revision` is this"; 0 for a key that does not exist.
#[derive(Clone, Debug, Serialize)]
pub(super) struct CompareMod {
    pub(super) key: Bytes,
    pub(super) target: &'static str,
    pub(super) result: &'static str,
    pub(super) mod_revision: Int,
}

impl CompareMod {
    pub(super) fn new(key: String, mod_revision: u64) -> Self {
        Self {
            key: Bytes(key),
            target: "MOD",
            result: "EQUAL",
            mod_revision: Int(mod_revision),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Put {
    pub(super) key: Bytes,
    pub(super) value: Bytes,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Delete {
    pub(super) key: Bytes,
}

#[derive(Clone, Debug, Serialize)]
pub(super) enum RequestOp {
    #[serde(rename = "request_put")]
    Put(Put),
    #[serde(rename = "request_delete_range")]
    Delete(Delete),
    #[serde(rename = "request_range")]
    Range(Range),
}

impl RequestOp {
    pub(super) fn put(key: String, value: String) -> Self {
        Self::Put(Put {
            key: Bytes(key),
            value: Bytes(value),
        })
    }

    pub(super) fn all_below(prefix: &str) -> Self {
        Self::Range(Range {
            key: Bytes(prefix.to_owned()),
            range_end: range_end(prefix),
        })
    }
}

#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct TxnAsk {
    pub(super) compare: Vec<CompareMod>,
    pub(super) success: Vec<RequestOp>,
    pub(super) failure: Vec<RequestOp>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ResponseOp {
    pub(super) response_range: Option<RangeTold>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TxnTold {
    pub(super) header: Header,
    pub(super) succeeded: bool,
    pub(super) responses: Vec<ResponseOp>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct WatchAsk {
    pub(super) create_request: WatchCreate,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct WatchCreate {
    pub(super) key: Bytes,
    pub(super) range_end: Bytes,
    pub(super) start_revision: Int,
}

/// One line of the watch's stream.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WatchLine {
    pub(super) result: Option<WatchTold>,
    pub(super) error: Option<serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WatchTold {
    pub(super) header: Header,
    pub(super) canceled: bool,
    pub(super) cancel_reason: String,
    pub(super) compact_revision: Int,
    pub(super) events: Vec<WatchEvent>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WatchEvent {
    /// `PUT` (left out) or `DELETE`.
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) kv: KeyValue,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct AuthAsk {
    pub(super) name: String,
    pub(super) password: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AuthTold {
    pub(super) token: String,
}

/// What the gateway says when it refuses: gRPC's code and text.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ErrorTold {
    pub(super) code: u32,
    pub(super) message: String,
}
