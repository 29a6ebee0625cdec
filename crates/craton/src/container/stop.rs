//! Signals while a container starts. The kernel passes to the first process only signals that it handles: without this a
//! start that waits for another container would wait on until it is killed.

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::exit;

/// Lets SIGTERM, SIGINT and SIGQUIT end this process in order, until it becomes another one. Nothing runs yet that would
/// have to be stopped, and what a start does it goes through again.
pub fn ends_the_start() -> anyhow::Result<()> {
    on_signal(|name| {
        tracing::info!("told to stop ({name}) before anything ran here: the start ends");
        std::process::exit(i32::from(exit::OK));
    })
}

/// Calls `then` with the name of the first signal that comes. From when this returns none is lost.
fn on_signal(then: impl FnOnce(&'static str) + Send + 'static) -> anyhow::Result<()> {
    let failed = "cannot wait for signals";
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(failed)?;
    let inside = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).context(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).context(failed)?;
    let mut quit = signal(SignalKind::quit()).context(failed)?;
    drop(inside);
    let wait = move || {
        then(runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = quit.recv() => "SIGQUIT",
            }
        }));
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).context(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[test]
    fn a_start_that_waits_hears_signals() {
        for (signal, name) in [
            (Signal::TERM, "SIGTERM"),
            (Signal::INT, "SIGINT"),
            (Signal::QUIT, "SIGQUIT"),
        ] {
            let (heard, hears) = sync_channel(1);
            on_signal(move |name| heard.send(name).unwrap()).unwrap();
            kill_process(getpid(), signal).unwrap();
            assert_eq!(hears.recv_timeout(Duration::from_secs(10)), Ok(name));
        }
    }
}
