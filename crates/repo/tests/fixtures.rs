//! Files of every version of the format that was ever released keep loading.
//!
//! `CRATON_WRITE_FIXTURES=1 cargo test -p craton-repo --test fixtures` writes those of the current
//! version; do that only for a new version, under new names.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::path::PathBuf;

use craton_core::{Lsn, TimelineId};
use craton_repo::chunk::ChunkId;
use craton_repo::layout::Descriptor;
use craton_repo::manifest::{BackupId, ChunkRef, Entry, EntryKind, Manifest, Summary, Tablespace};
use craton_repo::pack::{self, FOOTER_BYTES, PackBuilder};
use craton_repo::segment::{self, SegmentId};

const SEGMENT: SegmentId = SegmentId {
    timeline: TimelineId(2),
    number: 7,
};

fn fixture(name: &str, current: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name);
    if std::env::var_os("CRATON_WRITE_FIXTURES").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, current()).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn page() -> Vec<u8> {
    (0..8192_u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect()
}

fn wal() -> Vec<u8> {
    (0..1_u32 << 20)
        .map(|n| u8::try_from((n >> 7) % 256).unwrap())
        .collect()
}

fn manifest() -> Manifest {
    let file = EntryKind::File {
        size: 8192,
        chunks: vec![0],
    };
    Manifest {
        summary: Summary {
            id: BackupId::new("20260131T120000Z").unwrap(),
            system_id: 7_412_345_678_901_234_567,
            server_version: 150_010,
            wal_segment_size: 16 << 20,
            source: "m1".into(),
            started_at_ms: 1_769_860_800_000,
            ended_at_ms: 1_769_860_805_000,
            start_lsn: Lsn(0x200_0028),
            start_timeline: TimelineId(1),
            stop_lsn: Lsn(0x200_0100),
            stop_timeline: TimelineId(1),
            data_bytes: 8192,
            new_bytes: 8192,
            stored_bytes: 300,
            minimum_settings: std::collections::BTreeMap::new(),
        },
        tablespaces: vec![Tablespace {
            oid: 16_400,
            location: "/srv/ts".into(),
        }],
        packs: vec![ChunkId::of(b"a pack")],
        chunks: vec![ChunkRef {
            id: ChunkId::of(&page()),
            pack: 0,
            offset: 12,
            stored: 300,
            plain: 8192,
        }],
        entries: vec![
            Entry {
                path: "base".into(),
                tablespace: None,
                mode: 0o700,
                mtime_s: 1,
                kind: EntryKind::Directory,
            },
            Entry {
                path: "base/1".into(),
                tablespace: None,
                mode: 0o600,
                mtime_s: 1,
                kind: file,
            },
        ],
    }
}

#[test]
fn manifest_v1() {
    let bytes = fixture("manifest-v1.json", || manifest().encode().unwrap());
    assert_eq!(Manifest::decode(&bytes).unwrap(), manifest());
}

#[test]
fn pack_v1() {
    let bytes = fixture("chunks-v1.pack", || {
        let mut pack = PackBuilder::default();
        pack.push(ChunkId::of(&page()), &page()).unwrap();
        pack.finish().unwrap().1
    });
    pack::check_header(&bytes[..12]).unwrap();
    let tail = bytes.len() - FOOTER_BYTES;
    let footer = pack::parse_footer(&bytes[tail..]).unwrap();
    let entries = pack::parse_index(&bytes[tail - footer.index_bytes..tail], footer, None).unwrap();
    let at = usize::try_from(entries[0].offset).unwrap();
    let stored = &bytes[at..at + entries[0].stored_len as usize];
    assert_eq!(
        pack::open_chunk(entries[0].id, entries[0].plain_len, stored).unwrap(),
        page()
    );
}

#[test]
fn segment_v1() {
    let bytes = fixture("segment-v1.zst", || {
        segment::encode(SEGMENT, 1_769_860_800_000, &wal()).unwrap()
    });
    assert_eq!(
        segment::decode_header(&bytes).unwrap().received_at_ms,
        1_769_860_800_000
    );
    assert!(segment::decode(SEGMENT, &bytes).unwrap() == wal());
}

#[test]
fn descriptor_v1() {
    let current = Descriptor::new(7_412_345_678_901_234_567, 16 << 20);
    let bytes = fixture("descriptor-v1.json", || current.encode());
    assert_eq!(Descriptor::parse(&bytes).unwrap(), current);
}
