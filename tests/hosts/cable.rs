//! A cable between a host and the switch that can delay what passes. The kernels that tests meet have no
//! `netem`, so two TAP devices, one at each end, are joined by this process.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Frames on the way in one direction at most; more are dropped, as a real queue does.
const FRAMES_MAX: usize = 10_000;

/// The longest frame: an Ethernet header and what segmentation offload may hand over.
const FRAME_BYTES_MAX: usize = 65_600;

/// How soon a cable notices that it is to end.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A device of Ethernet frames without a header of its own: `IFF_TAP | IFF_NO_PI` of `linux/if_tun.h`.
const TAP: u16 = 0x0002 | 0x1000;

/// `TUNSETIFF`.
const TUN_SET_IFF: u32 = 0x4004_54ca;

/// `struct ifreq`: a name and, here, flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// A cable. It ends when it is dropped.
pub struct Cable {
    delay_ms: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
}

impl Cable {
    /// Joins a new device in one network namespace with a new device in another.
    pub fn plug(netns: &str, device: &str, other_netns: &str, other_device: &str) -> Self {
        let cable = Self {
            delay_ms: Arc::default(),
            ended: Arc::default(),
        };
        let one = Arc::new(tap(netns, device));
        let other = Arc::new(tap(other_netns, other_device));
        for (from, to) in [(&one, &other), (&other, &one)] {
            let (send, receive) = sync_channel(FRAMES_MAX);
            let (from, delay, ended) = (from.clone(), cable.delay_ms.clone(), cable.ended.clone());
            std::thread::spawn(move || take(&from, &delay, &ended, &send));
            let to = to.clone();
            std::thread::spawn(move || deliver(&to, &receive));
        }
        cable
    }

    /// From now on frames take this long, in each direction.
    pub fn set_delay(&self, delay: Duration) {
        let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.delay_ms.store(millis, Ordering::Relaxed);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn take(from: &File, delay: &AtomicU64, ended: &AtomicBool, send: &SyncSender<(Instant, Vec<u8>)>) {
    let mut frame = vec![0; FRAME_BYTES_MAX];
    while !ended.load(Ordering::Relaxed) {
        let mut wait = [PollFd::new(from, PollFlags::IN)];
        if !matches!(poll(&mut wait, Some(&LOOK_EVERY)), Ok(n) if n > 0) {
            continue;
        }
        let Ok(length) = (&mut &*from).read(&mut frame) else {
            // The device is gone with its namespace.
            return;
        };
        let due = Instant::now() + Duration::from_millis(delay.load(Ordering::Relaxed));
        let _ = send.try_send((due, frame.iter().copied().take(length).collect()));
    }
}

fn deliver(to: &File, receive: &Receiver<(Instant, Vec<u8>)>) {
    while let Ok((due, frame)) = receive.recv() {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // A device that is down takes nothing; so does a real cable.
        let _ = (&mut &*to).write(&frame);
    }
}

/// Makes a TAP device in a network namespace.
fn tap(netns: &str, device: &str) -> File {
    let path = format!("/run/netns/{netns}");
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: TAP,
        rest: [0; 22],
    };
    for (to, from) in request.name.iter_mut().take(15).zip(device.bytes()) {
        *to = from;
    }
    // The device belongs to the namespace of the thread that opens the file.
    let made = std::thread::spawn(move || {
        let namespace = File::open(&path).expect("the network namespace");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("root may enter a network namespace");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .expect("/dev/net/tun can be opened");
        set_interface(&file, request);
        file
    });
    made.join().expect("a TAP device can be made")
}

#[allow(unsafe_code, reason = "an ioctl that no crate offers as a function")]
fn set_interface(file: &File, request: InterfaceRequest) {
    // SAFETY: TUNSETIFF reads one `struct ifreq`, which `InterfaceRequest` is laid out as, and keeps no pointer to it.
    let done = unsafe {
        let ioctl =
            rustix::ioctl::Setter::<{ TUN_SET_IFF as rustix::ioctl::Opcode }, _>::new(request);
        rustix::ioctl::ioctl(file, ioctl)
    };
    done.expect("the kernel makes a TAP device");
}
