//! Watches the file systems that PostgreSQL writes to: room, the reserve file, and whether they answer.
//!
//! Every call that a hung disk could hold runs on a thread of its own, never in the agent's loop. One thread
//! looks at free space; one per file system writes a page and flushes it, twice a second. A call that
//! does not return is seen from outside: by the instant at which it began.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use craton_core::BootTime;
use craton_core::health::{Disk, StuckWrite};
use craton_core::settings::Settings;
use craton_pg::Instance;

use crate::clock;

/// How often free space is looked at: a fast writer fills some ten MiB in it.
const SPACE_INTERVAL: Duration = Duration::from_millis(250);
/// The pause between two probes of a file system.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// More file systems (tablespaces) than this are not watched.
const PLACES_MAX: usize = 64;
/// What a probe writes: one page, always the same one.
const PAGE: [u8; 4096] = [0x43; 4096];
/// The reserve file is made (again) where it leaves room for this many more of it: above the warning.
const MAKE_AT: u64 = 3;
/// It is given up where less than this part of it is left: recovery and the shutdown checkpoint need room.
const GIVE_UP_PART: u64 = 4;

/// A file system under watch.
struct Probe {
    /// The directory in which the probe's file lies.
    path: PathBuf,
    file: &'static str,
    wal: bool,
    /// When the write under way began, nanoseconds on the boot-time clock; 0: none is.
    begun: AtomicU64,
}

/// The watcher.
pub struct Storage {
    member_dir: PathBuf,
    data_dir: PathBuf,
    reserve: Instance,
    settings: Mutex<Settings>,
    disks: Mutex<Vec<Disk>>,
    probes: Mutex<BTreeMap<u64, Arc<Probe>>>,
    /// When the look at free space under way began; 0: none is.
    look_begun: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Storage {
    /// Starts watching; ends when the last handle is dropped.
    pub fn start(instance: &Instance, settings: Settings) -> io::Result<Arc<Self>> {
        let storage = Arc::new(Self {
            member_dir: instance.member_dir().to_owned(),
            data_dir: instance.data_dir().to_owned(),
            reserve: instance.clone(),
            settings: Mutex::new(settings),
            disks: Mutex::new(Vec::new()),
            probes: Mutex::new(BTreeMap::new()),
            look_begun: AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&storage);
        std::thread::Builder::new()
            .name("craton-space".into())
            .spawn(move || watch_space(&weak))?;
        Ok(storage)
    }

    /// The settings in force from now on.
    pub fn set_settings(&self, settings: &Settings) {
        let mut known = lock(&self.settings);
        if *known != *settings {
            known.clone_from(settings);
        }
    }

    /// The file systems as they were last seen.
    pub fn disks(&self) -> Vec<Disk> {
        lock(&self.disks).clone()
    }

    /// What is under way and has not returned.
    pub fn writes(&self) -> Vec<StuckWrite> {
        let since = |begun: &AtomicU64| {
            let at = begun.load(Ordering::SeqCst);
            (at != 0).then_some(BootTime(at))
        };
        let look = since(&self.look_begun).map(|since| StuckWrite {
            path: self.data_dir.display().to_string(),
            since,
            wal: false,
        });
        let probes = lock(&self.probes);
        probes
            .values()
            .filter_map(|p| {
                Some(StuckWrite {
                    path: p.path.display().to_string(),
                    since: since(&p.begun)?,
                    wal: p.wal,
                })
            })
            .chain(look)
            .collect()
    }

    fn look(self: &Arc<Self>) {
        self.look_begun.store(clock::now().0, Ordering::SeqCst);
        let found = places(&self.member_dir, &self.data_dir);
        self.watch_devices(&found);
        let settings = lock(&self.settings).clone();
        let mut disks = Vec::new();
        for place in found.values() {
            match space(&place.path) {
                Ok(disk) if place.is_members => {
                    let missing = self.keep_reserve(settings.disk_reserve(disk.total), &disk);
                    disks.push(Disk {
                        available: disk.available.saturating_sub(missing),
                        ..disk
                    });
                }
                Ok(disk) => disks.push(disk),
                Err(error) => {
                    tracing::debug!(path = %place.path.display(), %error, "cannot ask for free space");
                }
            }
        }
        *lock(&self.disks) = disks;
        self.look_begun.store(0, Ordering::SeqCst);
    }

    /// Makes the reserve file where there is room, and gives it up where there is none. Returns how much of
    /// the free space it should take and does not.
    fn keep_reserve(&self, wanted: u64, disk: &Disk) -> u64 {
        let path = self.member_dir.join("reserve");
        let held = fs::metadata(&path).map_or(0, |m| m.len());
        let set = |bytes| match self.reserve.set_reserve_blocking(bytes) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the reserve file could not be changed");
                false
            }
        };
        if held > 0 && (wanted == 0 || disk.available < wanted / GIVE_UP_PART) {
            if set(0) {
                tracing::warn!(
                    bytes = held,
                    "the disk is full: the reserve file is given up"
                );
            }
            return wanted;
        }
        if wanted > held && disk.available >= wanted.saturating_mul(MAKE_AT) - held {
            if set(wanted) {
                tracing::info!(bytes = wanted, "the reserve file is made");
            }
            // What the next look finds is less by it.
            return wanted - held;
        }
        if wanted < held && set(wanted) {
            return 0;
        }
        wanted.saturating_sub(held)
    }

    /// One probe a device: begun for those that are new, dropped for those that are gone.
    fn watch_devices(self: &Arc<Self>, found: &BTreeMap<u64, Place>) {
        let mut probes = lock(&self.probes);
        probes.retain(|device, p| {
            found
                .get(device)
                .is_some_and(|f| f.path == p.path && f.wal == p.wal)
        });
        for (device, place) in found {
            if probes.contains_key(device) {
                continue;
            }
            let probe = Arc::new(Probe {
                path: place.path.clone(),
                file: if place.is_members {
                    "probe"
                } else {
                    "craton.probe"
                },
                wal: place.wal,
                begun: AtomicU64::new(0),
            });
            let weak = Arc::downgrade(&probe);
            let started = std::thread::Builder::new()
                .name("craton-probe".into())
                .spawn(move || watch_device(&weak));
            match started {
                Ok(_) => {
                    probes.insert(*device, probe);
                }
                Err(error) => tracing::error!(%error, "cannot watch a file system"),
            }
        }
    }
}

fn watch_space(storage: &Weak<Storage>) {
    while let Some(storage) = storage.upgrade() {
        storage.look();
        drop(storage);
        std::thread::sleep(SPACE_INTERVAL);
    }
}

fn watch_device(probe: &Weak<Probe>) {
    while let Some(probe) = probe.upgrade() {
        probe.begun.store(clock::now().0, Ordering::SeqCst);
        // An error is an answer: a full or a broken disk is PostgreSQL's to notice, and it does.
        if let Err(error) = write_page(&probe.path.join(probe.file)) {
            tracing::debug!(path = %probe.path.display(), %error, "a probe of the storage failed");
        }
        probe.begun.store(0, Ordering::SeqCst);
        drop(probe);
        std::thread::sleep(PROBE_INTERVAL);
    }
}

fn write_page(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    file.write_all_at(&PAGE, 0)?;
    file.sync_data()
}

/// A directory on a file system of its own.
struct Place {
    path: PathBuf,
    /// The member's own directory, where the reserve file lies.
    is_members: bool,
    wal: bool,
}

/// The file systems by device: the member's directory, the data directory, the WAL, the tablespaces.
fn places(member_dir: &Path, data_dir: &Path) -> BTreeMap<u64, Place> {
    let device = |path: &Path| fs::metadata(path).ok().map(|m| m.dev());
    let mut found = BTreeMap::new();
    let wal = data_dir.join("pg_wal");
    let wal_device = device(&wal).or_else(|| device(member_dir));
    // Nothing of ours may lie in a directory that is empty or half-made: it would not be taken for empty.
    let has_data = data_dir.join("PG_VERSION").exists();
    let mut paths = vec![(member_dir.to_owned(), true)];
    if has_data {
        paths.push((data_dir.to_owned(), false));
        paths.push((wal, false));
        let links = fs::read_dir(data_dir.join("pg_tblspc"));
        paths.extend(
            links
                .into_iter()
                .flatten()
                .flatten()
                .map(|e| (e.path(), false)),
        );
    }
    let mut seen = BTreeSet::new();
    for (path, is_members) in paths {
        let Some(at) = device(&path) else { continue };
        if found.len() < PLACES_MAX && seen.insert(at) {
            let wal = Some(at) == wal_device;
            let place = Place {
                path,
                is_members,
                wal,
            };
            found.insert(at, place);
        }
    }
    found
}

fn space(path: &Path) -> io::Result<Disk> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(Disk {
        path: path.display().to_string(),
        total: stat.f_frsize.saturating_mul(stat.f_blocks),
        available: stat.f_frsize.saturating_mul(stat.f_bavail),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_system_is_watched_once() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        fs::create_dir_all(data.join("pg_wal")).unwrap();
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        let found = places(dir.path(), &data);
        assert_eq!(found.len(), 1);
        assert!(found.values().all(|p| p.is_members && p.wal));
        assert_eq!(
            fs::read_dir(&data).unwrap().count(),
            2,
            "nothing is put there"
        );
    }

    #[test]
    fn wal_and_tablespaces_elsewhere_are_watched_too() {
        let elsewhere = Path::new("/dev/shm");
        let dir = tempfile::tempdir().unwrap();
        let own = fs::metadata(dir.path()).unwrap().dev();
        if fs::metadata(elsewhere).map_or(own, |m| m.dev()) == own {
            return;
        }
        let data = dir.path().join("data");
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        fs::write(data.join("PG_VERSION"), "15").unwrap();
        std::os::unix::fs::symlink(elsewhere, data.join("pg_wal")).unwrap();
        let found = places(dir.path(), &data);
        assert_eq!(found.len(), 2);
        let wal: Vec<&Place> = found.values().filter(|p| p.wal).collect();
        assert_eq!(wal.len(), 1);
        assert!(!wal[0].is_members && wal[0].path.ends_with("pg_wal"));
    }

    #[test]
    fn a_probe_writes_one_page_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("probe");
        write_page(&path).unwrap();
        write_page(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
    }
}
