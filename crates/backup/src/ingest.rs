//! Turns the tar archives of a base backup into chunks, packs and manifest entries.
//!
//! Runs on a blocking thread and is fed through a bounded channel: when compressing is slower than
//! the network, the server is held back. Chunks that the repository has already are not stored again.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};

use bytes::{Buf, Bytes};
use craton_pg::replication::TablespaceInfo;
use craton_repo::chunk::{CHUNK_BYTES, ChunkId};
use craton_repo::layout;
use craton_repo::manifest::{ChunkRef, Entry, EntryKind, is_safe_path};
use craton_repo::pack::{PackBuilder, PackEntry, PackId};
use tokio::sync::mpsc;

use crate::error::{BackupError, Result};
use crate::store::Repository;

/// How many messages may wait between network and disk; each has at most some 64 KiB.
pub(crate) const FEED_MESSAGES_MAX: usize = 64;

/// What the network side hands over.
pub(crate) enum Feed {
    /// The archive of this tablespace begins.
    Archive(TablespaceInfo),
    /// The server's backup manifest begins.
    Manifest,
    /// Bytes of what began last.
    Data(Bytes),
    /// Everything was sent.
    End,
}

/// What a backup consists of.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) packs: Vec<PackId>,
    pub(crate) chunks: Vec<ChunkRef>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) data_bytes: u64,
    pub(crate) new_bytes: u64,
    pub(crate) stored_bytes: u64,
}

/// Takes everything up to [`Feed::End`]; a feed that just stops is an interrupted backup.
pub(crate) fn ingest(repository: Repository, feed: mpsc::Receiver<Feed>) -> Result<Contents> {
    let mut reader = FeedReader {
        feed,
        data: Bytes::new(),
        waiting: None,
    };
    let mut writer = ChunkWriter::new(repository)?;
    loop {
        match reader.next_part()? {
            Feed::Archive(tablespace) => archive(&mut reader, &mut writer, tablespace.oid)?,
            Feed::Manifest => {
                let chunks = writer.file(&mut reader)?;
                writer.entry("backup_manifest".into(), None, (0o600, 0), chunks);
            }
            Feed::Data(_) => {}
            Feed::End => return writer.finish(),
        }
    }
}

fn archive(
    reader: &mut FeedReader,
    writer: &mut ChunkWriter,
    tablespace: Option<u32>,
) -> Result<()> {
    let broken = |e: io::Error| {
        BackupError::Interrupted(format!("the server's tar archive cannot be read: {e}"))
    };
    let mut tar = tar::Archive::new(&mut *reader);
    for member in tar.entries().map_err(broken)? {
        let mut member = member.map_err(broken)?;
        let path = member.path_bytes();
        let path = std::str::from_utf8(&path).map_err(|_| {
            BackupError::Interrupted("a file name in the data directory is not UTF-8".into())
        })?;
        let path = path
            .trim_end_matches('/')
            .trim_start_matches("./")
            .to_owned();
        let header = member.header();
        let about = (
            header.mode().map_err(broken)? & 0o7777,
            header.mtime().map_err(broken)?,
        );
        let kind = header.entry_type();
        if path.is_empty() || path == "." {
            continue;
        }
        if !is_safe_path(&path) {
            return Err(BackupError::Interrupted(format!(
                "the server sent a file named \"{path}\""
            )));
        }
        if kind.is_dir() {
            writer.entry(path, tablespace, about, EntryKind::Directory);
        } else if kind.is_symlink() {
            let target = member.link_name_bytes().unwrap_or_default();
            let target = String::from_utf8_lossy(&target).into_owned();
            writer.entry(path, tablespace, about, EntryKind::Symlink { target });
        } else {
            let file = writer.file(&mut member)?;
            writer.entry(path, tablespace, about, file);
        }
    }
    // What follows the last file (padding) belongs to this archive as well.
    io::copy(reader, &mut io::sink()).map_err(broken)?;
    Ok(())
}

/// The bytes of one archive as a reader; it ends where the next part begins.
struct FeedReader {
    feed: mpsc::Receiver<Feed>,
    data: Bytes,
    waiting: Option<Feed>,
}

impl FeedReader {
    fn next_part(&mut self) -> Result<Feed> {
        self.waiting
            .take()
            .or_else(|| self.feed.blocking_recv())
            .ok_or_else(|| {
                BackupError::Interrupted(
                    "the connection broke in the middle of the base backup".into(),
                )
            })
    }
}

impl Read for FeedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.data.is_empty() {
            if self.waiting.is_some() {
                return Ok(0);
            }
            match self.feed.blocking_recv() {
                Some(Feed::Data(data)) => self.data = data,
                Some(other) => self.waiting = Some(other),
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the connection broke",
                    ));
                }
            }
        }
        let length = buffer.len().min(self.data.len());
        self.data
            .copy_to_slice(buffer.get_mut(..length).unwrap_or_default());
        Ok(length)
    }
}

/// Where a chunk is.
#[derive(Clone, Copy)]
enum Place {
    /// In a pack of the repository.
    Stored(PackId, PackEntry),
    /// In this backup's list already.
    Listed(u32),
}

struct ChunkWriter {
    repository: Repository,
    known: HashMap<ChunkId, Place>,
    /// Packs by their place in the manifest; none for the one being filled.
    packs: Vec<Option<PackId>>,
    pack_places: BTreeMap<PackId, u32>,
    filling: Option<(u32, PackBuilder)>,
    contents: Contents,
}

impl ChunkWriter {
    fn new(repository: Repository) -> Result<Self> {
        let mut known = HashMap::new();
        for pack in repository.packs()? {
            match repository.pack_index(pack) {
                Ok(entries) => {
                    known.extend(entries.into_iter().map(|e| (e.id, Place::Stored(pack, e))));
                }
                // Not relied upon; what it held is stored again.
                Err(error) => tracing::error!(%pack, %error, "a damaged pack in the repository"),
            }
        }
        Ok(Self {
            repository,
            known,
            packs: Vec::new(),
            pack_places: BTreeMap::new(),
            filling: None,
            contents: Contents::default(),
        })
    }

    fn entry(
        &mut self,
        path: String,
        tablespace: Option<u32>,
        (mode, mtime_s): (u32, u64),
        kind: EntryKind,
    ) {
        self.contents.entries.push(Entry {
            path,
            tablespace,
            mode,
            mtime_s,
            kind,
        });
    }

    fn file(&mut self, content: &mut impl Read) -> Result<EntryKind> {
        let broken =
            |e: io::Error| BackupError::Interrupted(format!("the base backup broke off: {e}"));
        let (mut size, mut chunks) = (0, Vec::new());
        let mut buffer = Vec::with_capacity(CHUNK_BYTES);
        loop {
            buffer.clear();
            let read = content
                .take(CHUNK_BYTES as u64)
                .read_to_end(&mut buffer)
                .map_err(broken)?;
            if read == 0 {
                break;
            }
            size += read as u64;
            chunks.push(self.chunk(&buffer)?);
        }
        self.contents.data_bytes += size;
        Ok(EntryKind::File { size, chunks })
    }

    fn chunk(&mut self, plain: &[u8]) -> Result<u32> {
        let id = ChunkId::of(plain);
        let (pack, entry) = match self.known.get(&id).copied() {
            Some(Place::Listed(place)) => return Ok(place),
            Some(Place::Stored(pack, entry)) => (self.pack_place(pack)?, entry),
            None => self.store(id, plain)?,
        };
        let place = limited(self.contents.chunks.len())?;
        self.contents.chunks.push(ChunkRef {
            id,
            pack,
            offset: entry.offset,
            stored: entry.stored_len,
            plain: entry.plain_len,
        });
        self.known.insert(id, Place::Listed(place));
        Ok(place)
    }

    fn pack_place(&mut self, pack: PackId) -> Result<u32> {
        if let Some(place) = self.pack_places.get(&pack) {
            return Ok(*place);
        }
        let place = limited(self.packs.len())?;
        self.packs.push(Some(pack));
        self.pack_places.insert(pack, place);
        Ok(place)
    }

    fn store(&mut self, id: ChunkId, plain: &[u8]) -> Result<(u32, PackEntry)> {
        let (place, mut builder) = if let Some(filling) = self.filling.take() {
            filling
        } else {
            self.packs.push(None);
            (limited(self.packs.len() - 1)?, PackBuilder::default())
        };
        let entry = builder
            .push(id, plain)
            .map_err(BackupError::format(self.repository.root()))?;
        self.contents.new_bytes += plain.len() as u64;
        let full = builder.is_full();
        self.filling = Some((place, builder));
        if full {
            self.close_pack()?;
        }
        Ok((place, entry))
    }

    fn close_pack(&mut self) -> Result<()> {
        let Some((place, builder)) = self.filling.take() else {
            return Ok(());
        };
        let (id, bytes) = builder
            .finish()
            .map_err(BackupError::format(self.repository.root()))?;
        self.repository.write(&layout::pack(id), &bytes)?;
        self.contents.stored_bytes += bytes.len() as u64;
        if let Some(slot) = self.packs.get_mut(place as usize) {
            *slot = Some(id);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Contents> {
        self.close_pack()?;
        self.contents.packs = self.packs.into_iter().flatten().collect();
        Ok(self.contents)
    }
}

fn limited(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| {
        BackupError::Refused("the database has more chunks than a manifest can name".into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(files: &[(&str, &[u8])]) -> Bytes {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(7);
            tar.append_data(&mut header, name, *content).unwrap();
        }
        tar.into_inner().unwrap().into()
    }

    fn run(repository: &Repository, parts: Vec<Feed>) -> Result<Contents> {
        let (send, receive) = mpsc::channel(FEED_MESSAGES_MAX);
        let sender =
            std::thread::spawn(move || parts.into_iter().for_each(|p| drop(send.blocking_send(p))));
        let result = ingest(repository.clone(), receive);
        sender.join().unwrap();
        result
    }

    fn base() -> Feed {
        Feed::Archive(TablespaceInfo {
            oid: None,
            location: String::new(),
            size_bytes: 0,
        })
    }

    fn data(bytes: &Bytes) -> impl Iterator<Item = Feed> {
        bytes
            .chunks(1000)
            .map(|c| Feed::Data(Bytes::copy_from_slice(c)))
            .collect::<Vec<_>>()
            .into_iter()
    }

    #[test]
    fn what_is_known_is_not_stored_twice() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open_or_create(dir.path(), 1, 1 << 20).unwrap();
        let big: Vec<u8> = (0..300_000_u32)
            .map(|n| u8::try_from(n % 253).unwrap())
            .collect();
        let tar = tar_of(&[("base/1", &big), ("base/2", &big), ("PG_VERSION", b"15\n")]);
        let parts = || {
            [base()]
                .into_iter()
                .chain(data(&tar))
                .chain([Feed::End])
                .collect::<Vec<_>>()
        };
        let first = run(&repository, parts()).unwrap();
        assert_eq!(
            (first.entries.len(), first.chunks.len(), first.data_bytes),
            (3, 4, 600_003)
        );
        assert_eq!(first.new_bytes, 300_003);
        let second = run(&repository, parts()).unwrap();
        assert_eq!(
            (second.new_bytes, second.stored_bytes, second.packs),
            (0, 0, first.packs)
        );
        assert_eq!(second.entries, first.entries);
    }

    #[test]
    fn a_feed_that_stops_is_an_interrupted_backup() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open_or_create(dir.path(), 1, 1 << 20).unwrap();
        let tar = tar_of(&[("base/1", &[1; 5000])]);
        for cut in 0..data(&tar).count() {
            let parts = [base()].into_iter().chain(data(&tar).take(cut)).collect();
            assert!(
                matches!(run(&repository, parts), Err(BackupError::Interrupted(_))),
                "cut after {cut} messages"
            );
        }
    }
}
