//! What commands that change something share: who asks, whether it is meant, and whom to ask first.

use std::io::{IsTerminal as _, Write as _};

use craton_console::views::StatusView;

use crate::exit::{self, Problem};

/// Who asks, `user@host`; goes into the history.
pub fn who() -> String {
    let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let user = set("SUDO_USER")
        .or_else(|| set("USER"))
        .or_else(|| set("LOGNAME"))
        .unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => user,
        host => format!("{user}@{host}"),
    }
}

/// The leader's agent, if it lives: it need not pass a request on.
pub fn leader_api(status: &StatusView) -> Option<String> {
    let leader = status.leader.as_ref()?;
    let member = status.members.iter().find(|m| m.id == *leader)?;
    member.agent_alive.then(|| member.api.clone())
}

/// Asks a yes-or-no question on the terminal; no is the answer that costs nothing.
pub fn confirm(question: &str) -> anyhow::Result<bool> {
    let mut terminal = std::io::stderr().lock();
    write!(terminal, "{question} [y/N] ")?;
    terminal.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Goes on only if it is meant: `--yes`, or a yes on the terminal. `what` says what will happen.
pub fn must_be_meant(yes: bool, what: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Problem::new(
            exit::USAGE,
            format!("{what}: this must be confirmed, and there is no terminal to ask on"),
            "repeat it with --yes",
        )
        .into());
    }
    if confirm(&format!("{what}. Go on?"))? {
        return Ok(());
    }
    Err(Problem::new(exit::REFUSED, "not done", "nothing was changed").into())
}
