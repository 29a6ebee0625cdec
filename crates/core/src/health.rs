//! What a member knows of its own host: room on its disks, storage that answers, crashes, the fence.
//!
//! [`Host`] is what its agent observed; [`assess`] makes of it what the other members are told
//! ([`Health`]). A member that is not fit goes on serving as long as it can, but it is not the one to elect
//! while another could lead (failover protocol, section 4).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::settings::Settings;
use crate::types::BootTime;

/// Crashes of PostgreSQL are remembered for this long.
pub const CRASH_WINDOW: Duration = Duration::from_secs(60);
/// So many crashes within [`CRASH_WINDOW`] make a member unfit to lead.
pub const CRASHES_MAX: u32 = 3;
/// A file system of which PostgreSQL's own WAL is no part counts as stalled after so many times the setting:
/// commits go on without it for a while.
const OTHER_DISK_FACTOR: u32 = 2;

/// A file system that PostgreSQL writes to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// A directory on it.
    pub path: String,
    /// Its size, bytes.
    pub total: u64,
    /// What PostgreSQL may still take, bytes: without the reserve file, and without the room that a missing
    /// reserve file should take.
    pub available: u64,
}

/// A write (or a look at a file system) that has not returned yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StuckWrite {
    /// The directory that it is in.
    pub path: String,
    /// Since when it is under way.
    pub since: BootTime,
    /// The WAL lies on this file system.
    pub wal: bool,
}

/// A host as its agent observes it. The default is a host without a fault.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Host {
    /// The file systems that PostgreSQL writes to; empty until they have been looked at.
    pub disks: Vec<Disk>,
    /// Probes of the storage that are under way.
    pub writes: Vec<StuckWrite>,
    /// When the flush position of the WAL was last seen to move.
    pub wal_moved_at: Option<BootTime>,
    /// Since when processes of PostgreSQL wait for a write or flush of WAL while the position does not move.
    /// Waiting for standbys is no such wait.
    pub wal_waits_since: Option<BootTime>,
    /// How often PostgreSQL crashed within [`CRASH_WINDOW`]: the postmaster, or a backend that made it
    /// restart all others.
    pub crashes: u32,
    /// Why the fence cannot guard a primary; none if it can.
    pub no_fence: Option<String>,
}

/// How much room a member's fullest file system has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Room {
    /// Enough, or not known.
    #[default]
    Ample,
    /// Less than twice the reserve.
    Low,
    /// Less than the reserve.
    Full,
}

/// What a member tells the others of its host. An older agent tells nothing, and counts as fit.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// Room on the fullest file system.
    pub room: Room,
    /// What PostgreSQL may still take there, bytes; none until it was looked at.
    pub available: Option<u64>,
    /// What is wrong with it as a leader, in words; empty if it is fit.
    pub unfit: Vec<String>,
    /// What an operator should look at although it is fit.
    pub warnings: Vec<String>,
}

impl Health {
    /// True if nothing speaks against it as a leader.
    pub fn is_fit(&self) -> bool {
        self.unfit.is_empty()
    }
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// The fullest file system: the one with the least room in parts of its reserve.
fn fullest<'a>(host: &'a Host, settings: &Settings) -> Option<(&'a Disk, u64)> {
    host.disks
        .iter()
        .map(|d| (d, settings.disk_reserve(d.total)))
        .min_by_key(|(d, reserve)| d.available.saturating_sub(*reserve))
}

/// Why the disk is a reason to hand over; none while there is more than the reserve.
pub fn disk_full(host: &Host, settings: &Settings) -> Option<String> {
    let (disk, reserve) = fullest(host, settings)?;
    (disk.available < reserve).then(|| {
        format!(
            "the disk is nearly full: {} MiB left in {}, the reserve is {} MiB",
            mib(disk.available),
            disk.path,
            mib(reserve)
        )
    })
}

/// True when less than half of the reserve is left: no time to wait for anything.
pub fn disk_is_urgent(host: &Host, settings: &Settings) -> bool {
    fullest(host, settings).is_some_and(|(d, reserve)| d.available < reserve / 2)
}

/// Why the storage counts as hung; none while it answers, or while WAL is still flushed.
pub fn storage_stalled(host: &Host, settings: &Settings, now: BootTime) -> Option<String> {
    let limit = settings.stall_after()?;
    let waiting = host.wal_waits_since.map(|at| now.since(at));
    if let Some(time) = waiting.filter(|t| *t >= limit) {
        return Some(format!(
            "commits have waited for the disk for {:.1} s",
            time.as_secs_f64()
        ));
    }
    let moves = host.wal_moved_at.is_some_and(|at| now.since(at) < limit);
    let stuck = host.writes.iter().find(|w| {
        let limit = if w.wal {
            limit
        } else {
            limit.saturating_mul(OTHER_DISK_FACTOR)
        };
        now.since(w.since) >= limit && !(w.wal && moves)
    })?;
    Some(format!(
        "a write in {} has not returned for {:.1} s",
        stuck.path,
        now.since(stuck.since).as_secs_f64()
    ))
}

/// Why PostgreSQL here crashes too often to lead.
pub fn crash_loop(host: &Host) -> Option<String> {
    (host.crashes >= CRASHES_MAX).then(|| {
        format!(
            "PostgreSQL crashed {} times within {} s",
            host.crashes,
            CRASH_WINDOW.as_secs()
        )
    })
}

/// What the others are told.
pub fn assess(host: &Host, settings: &Settings, now: BootTime) -> Health {
    let mut health = Health::default();
    if let Some((disk, reserve)) = fullest(host, settings) {
        health.available = Some(disk.available);
        if disk.available < reserve.saturating_mul(2) {
            health.room = Room::Low;
            health.warnings.push(format!(
                "{} MiB left in {}: at {} MiB a leader hands over",
                mib(disk.available),
                disk.path,
                mib(reserve)
            ));
        }
    }
    if let Some(why) = disk_full(host, settings) {
        health.room = Room::Full;
        health.warnings.clear();
        health.unfit.push(why);
    }
    health.unfit.extend(storage_stalled(host, settings, now));
    match crash_loop(host) {
        Some(why) => health.unfit.push(why),
        None if host.crashes > 0 => health.warnings.push(format!(
            "PostgreSQL crashed {} times within {} s",
            host.crashes,
            CRASH_WINDOW.as_secs()
        )),
        None => {}
    }
    health.unfit.extend(host.no_fence.clone());
    health
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(ms: u64) -> BootTime {
        BootTime(0).after(Duration::from_millis(ms))
    }

    fn disk(available_mib: u64) -> Host {
        Host {
            disks: vec![Disk {
                path: "/d".into(),
                total: 100_000 * MIB,
                available: available_mib * MIB,
            }],
            ..Host::default()
        }
    }

    #[test]
    fn room_on_the_disk() {
        let settings = Settings {
            disk_reserve_mb: 100,
            ..Settings::default()
        };
        let room = |mib| {
            let h = assess(&disk(mib), &settings, at(0));
            (h.room, h.is_fit(), disk_is_urgent(&disk(mib), &settings))
        };
        assert_eq!(room(200), (Room::Ample, true, false));
        assert_eq!(room(199), (Room::Low, true, false));
        assert_eq!(room(100), (Room::Low, true, false));
        assert_eq!(room(99), (Room::Full, false, false));
        assert_eq!(room(49), (Room::Full, false, true));
        let off = Settings {
            disk_reserve_mb: 0,
            ..settings
        };
        assert_eq!(assess(&disk(0), &off, at(0)).room, Room::Ample);
        assert_eq!(
            assess(&Host::default(), &off, at(0)),
            Health::default(),
            "nothing is known yet"
        );
    }

    #[test]
    fn a_small_file_system_has_a_small_reserve() {
        let settings = Settings {
            disk_reserve_mb: 1000,
            ..Settings::default()
        };
        let mut host = disk(90);
        host.disks[0].total = 800 * MIB;
        assert_eq!(
            disk_full(&host, &settings).map(|t| t.contains("100 MiB")),
            Some(true)
        );
    }

    fn stuck(wal: bool) -> Host {
        Host {
            writes: vec![StuckWrite {
                path: "/d".into(),
                since: at(1000),
                wal,
            }],
            ..Host::default()
        }
    }

    #[test]
    fn storage_that_hangs() {
        let settings = Settings {
            stall_after_ms: 4000,
            ..Settings::default()
        };
        let stalled = |host: &Host, ms| storage_stalled(host, &settings, at(ms)).is_some();
        assert!(!stalled(&stuck(true), 4999));
        assert!(stalled(&stuck(true), 5000));
        assert!(!stalled(&stuck(false), 8999), "other disks have longer");
        assert!(stalled(&stuck(false), 9000));
        let moving = Host {
            wal_moved_at: Some(at(2000)),
            ..stuck(true)
        };
        assert!(!stalled(&moving, 5999), "commits go on: slow, not hung");
        assert!(stalled(&moving, 6000));
        let waiting = Host {
            wal_waits_since: Some(at(0)),
            ..Host::default()
        };
        assert!(!stalled(&waiting, 3999));
        assert!(stalled(&waiting, 4000));
        let off = Settings {
            stall_after_ms: 0,
            ..settings.clone()
        };
        assert_eq!(storage_stalled(&stuck(true), &off, at(60_000)), None);
    }

    #[test]
    fn crashes_and_a_missing_fence() {
        let host = |crashes, no_fence: Option<&str>| Host {
            crashes,
            no_fence: no_fence.map(str::to_owned),
            ..Host::default()
        };
        let fit = |h: &Host| assess(h, &Settings::default(), at(0)).is_fit();
        assert!(fit(&host(2, None)));
        assert_eq!(
            assess(&host(2, None), &Settings::default(), at(0))
                .warnings
                .len(),
            1
        );
        assert!(!fit(&host(3, None)));
        assert!(!fit(&host(0, Some("it gives no sign of life"))));
    }
}
