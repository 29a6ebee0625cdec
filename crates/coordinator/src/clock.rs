//! The boot-time clock, as a value that is handed down.

use craton_core::BootTime;
use rustix::time::{ClockId, clock_gettime};

/// Reads `CLOCK_BOOTTIME`: it counts through suspend, so a lease cannot outlive a closed lid.
#[derive(Clone, Copy, Debug)]
pub struct Clock(());

impl Clock {
    /// This host's clock.
    pub fn system() -> Self {
        Self(())
    }

    /// Now.
    pub fn now(self) -> BootTime {
        let ts = clock_gettime(ClockId::Boottime);
        // The kernel never reports a time before boot.
        let secs = u64::try_from(ts.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(ts.tv_nsec).unwrap_or(0);
        BootTime(secs.saturating_mul(1_000_000_000).saturating_add(nanos))
    }
}
