//! The operator's program that is told of every change of this member's role.
//!
//! It runs beside the agent's loop: nothing waits for it. One call at a time, in order; roles that come and go
//! while it runs are left out, the last one is not.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use craton_core::observe::ServerView;
use craton_core::records::ClusterView;
use craton_core::topology::MemberRole;
use craton_core::{MemberId, Term};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::sync::watch;

use crate::agent::Seen;
use crate::views;

/// What is kept of a program's output, bytes; the rest is read and thrown away.
const OUTPUT_MAX: usize = 16 << 10;

/// The `[node.hooks]` table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HooksConfig {
    /// A program that is called with role, term, member and cluster (also in CRATON_ROLE, CRATON_TERM, CRATON_MEMBER, CRATON_CLUSTER) when this member became `leader` (open for clients), `standby`, or `stopped`.
    pub on_role_change: Option<PathBuf>,
    /// A call that takes longer is killed, with its children. Seconds.
    pub timeout_s: u64,
}

impl Default for HooksConfig {
    fn default() -> Self {
        Self {
            on_role_change: None,
            timeout_s: 30,
        }
    }
}

impl HooksConfig {
    /// Says what is wrong, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if self
            .on_role_change
            .as_ref()
            .is_some_and(|p| !p.is_absolute())
        {
            return Err("node.hooks.on_role_change is not an absolute path".into());
        }
        if self.timeout_s == 0 || self.timeout_s > 3600 {
            return Err("node.hooks.timeout_s is out of range: use 1 to 3600".into());
        }
        Ok(())
    }
}

/// A role that a program is told of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Leads, and is open for clients.
    Leader,
    /// Follows a leader.
    Standby,
    /// PostgreSQL does not run.
    Stopped,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::Standby => "standby",
            Self::Stopped => "stopped",
        }
    }
}

/// A role with its term.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The role.
    pub role: Role,
    /// The term it began in, or was seen in first.
    pub term: Term,
}

impl Change {
    /// A leader of a new term is told of again; a standby of another leader is not.
    fn differs(self, before: Option<Self>) -> bool {
        before.is_none_or(|b| {
            b.role != self.role || (self.role == Role::Leader && b.term != self.term)
        })
    }
}

/// The role in an observation; none on the way from one to another.
#[allow(clippy::ref_option, reason = "it looks into what a channel holds")]
fn role_of(seen: &Option<Seen>) -> Option<Change> {
    let (o, d) = seen.as_deref().map(|s| (&s.0, &s.1))?;
    let own = views::own_status(o, d);
    let open = o
        .view
        .as_ref()
        .filter(|v| v.leader() == o.me.reference().as_ref())
        .and_then(|v: &ClusterView| v.leadership.as_ref())
        .is_some_and(|l| l.value.open);
    let role = match (own.role, &o.server) {
        (MemberRole::Leader, _) if open => Role::Leader,
        (MemberRole::Standby, _) => Role::Standby,
        (MemberRole::Down, ServerView::Down) => Role::Stopped,
        _ => return None,
    };
    Some(Change {
        role,
        term: own.term,
    })
}

/// Calls the program.
#[derive(Clone, Debug)]
pub struct Hooks {
    program: PathBuf,
    limit: Duration,
    member: MemberId,
    cluster: String,
}

impl Hooks {
    /// None where no program is configured.
    pub fn new(config: &HooksConfig, member: &MemberId, cluster: &str) -> Option<Self> {
        Some(Self {
            program: config.on_role_change.clone()?,
            limit: Duration::from_secs(config.timeout_s),
            member: member.clone(),
            cluster: cluster.to_owned(),
        })
    }

    /// One call, to its end or to the limit. Its failure is logged, and changes nothing.
    pub async fn call(&self, change: Change) {
        let (role, term) = (change.role.name(), change.term.to_string());
        let program = self.program.display();
        match self.run(role, &term).await {
            Ok((status, output)) if status.success() => {
                tracing::info!(%program, role, term, output, "the hook ran");
            }
            Ok((status, output)) => {
                tracing::warn!(%program, role, term, %status, output, "the hook failed");
            }
            Err(error) => tracing::warn!(%program, role, term, %error, "the hook failed"),
        }
    }

    async fn run(
        &self,
        role: &str,
        term: &str,
    ) -> std::io::Result<(std::process::ExitStatus, String)> {
        let mut child = Command::new(&self.program)
            .args([role, term, self.member.as_str(), &self.cluster])
            .env("CRATON_ROLE", role)
            .env("CRATON_TERM", term)
            .env("CRATON_MEMBER", self.member.as_str())
            .env("CRATON_CLUSTER", &self.cluster)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own: at the limit its children end with it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let mut group = Group(
            child
                .id()
                .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)),
        );
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let work = async {
            let (status, out, err) = tokio::join!(child.wait(), text_of(out), text_of(err));
            Ok((status?, format!("{out}{err}")))
        };
        if let Ok(result) = tokio::time::timeout(self.limit, work).await {
            // What it left running on purpose goes on.
            group.0 = None;
            return result;
        }
        Err(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!(
                "it did not end within {} s and was killed",
                self.limit.as_secs()
            ),
        ))
    }
}

/// The processes of a call. They end with it where it does not come to its end, at the limit or because the agent stops:
/// one that still works for a role of before would work against the next call.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Reads to the end, keeps the beginning.
async fn text_of(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    if let Some(mut pipe) = pipe {
        while let Ok(n) = pipe.read(&mut buffer).await {
            if n == 0 {
                break;
            }
            let room = OUTPUT_MAX.saturating_sub(kept.len());
            kept.extend(buffer.iter().take(n.min(room)));
        }
    }
    String::from_utf8_lossy(&kept).trim_end().to_owned()
}

/// Tells the program of every change, for as long as the agent lives.
pub async fn keep(hooks: Option<Hooks>, seen: watch::Receiver<Option<Seen>>) {
    if let Some(hooks) = hooks {
        follow(&hooks, seen, role_of).await;
    }
}

async fn follow<T>(
    hooks: &Hooks,
    mut newest: watch::Receiver<T>,
    role_of: impl Fn(&T) -> Option<Change>,
) {
    let mut told = None;
    loop {
        let change = role_of(&newest.borrow_and_update());
        if let Some(change) = change.filter(|c| c.differs(told)) {
            hooks.call(change).await;
            told = Some(change);
        }
        if newest.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn hooks(dir: &Path, script: &str, limit: Duration) -> Hooks {
        let (program, text) = (dir.join("hook"), dir.join("text"));
        std::fs::write(
            &text,
            format!("#!/bin/sh\ncd {}\n{script}\n", dir.display()),
        )
        .unwrap();
        // Another process writes it: a child that another test starts at this moment would inherit the descriptor, and
        // what is open for writing cannot be executed.
        let made = std::process::Command::new("install")
            .args(["-m", "755"])
            .args([&text, &program])
            .status();
        assert!(made.unwrap().success());
        Hooks {
            program,
            limit,
            member: MemberId::new("a").unwrap(),
            cluster: "test".into(),
        }
    }

    fn change(role: Role, term: u64) -> Change {
        Change {
            role,
            term: Term(term),
        }
    }

    async fn until(what: &str, met: impl Fn() -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while !met() {
            assert!(tokio::time::Instant::now() < deadline, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn lines(dir: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(dir.join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn one_at_a_time_in_order_and_the_last_one_always() {
        let dir = tempfile::tempdir().unwrap();
        // The first call waits until the test lets it go on.
        let script = "echo \"$* $CRATON_ROLE $CRATON_TERM $CRATON_MEMBER $CRATON_CLUSTER\" >> calls\n\
                      while [ \"$1\" = standby ] && [ ! -e go ]; do sleep 0.01; done\n\
                      echo end >> calls";
        let hooks = hooks(dir.path(), script, Duration::from_secs(30));
        let (tell, told) = watch::channel(Some(change(Role::Standby, 1)));
        let task = tokio::spawn(async move { follow(&hooks, told, |c| *c).await });
        until("the first call", || lines(dir.path()).len() == 1).await;
        // On the way to another role; comes and goes; and what it comes to.
        for next in [
            None,
            Some(change(Role::Stopped, 1)),
            Some(change(Role::Leader, 2)),
        ] {
            tell.send_replace(next);
        }
        std::fs::write(dir.path().join("go"), "").unwrap();
        until("the last call", || lines(dir.path()).len() == 4).await;
        tell.send_replace(Some(change(Role::Leader, 2)));
        tell.send_replace(Some(change(Role::Leader, 3)));
        until("a leader of a new term", || lines(dir.path()).len() == 6).await;
        drop(tell);
        task.await.unwrap();
        assert_eq!(
            lines(dir.path()),
            [
                "standby 1 a test standby 1 a test",
                "end",
                "leader 2 a test leader 2 a test",
                "end",
                "leader 3 a test leader 3 a test",
                "end"
            ]
        );
    }

    /// Starts a child, says who both are, and hangs.
    const HANGS: &str = "sleep 600 &\necho $$ $! > group\nwait";

    /// Who they are, once [`HANGS`] has said so.
    fn group(dir: &Path) -> Option<Vec<String>> {
        let text = std::fs::read_to_string(dir.join("group")).ok()?;
        let pids = text.strip_suffix('\n')?;
        Some(pids.split(' ').map(str::to_owned).collect())
    }

    async fn until_all_end(pids: &[String]) {
        assert_eq!(pids.len(), 2, "{pids:?}");
        until("they end", || {
            pids.iter().all(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/stat"))
                    .map_or(true, |s| s.contains(") Z "))
            })
        })
        .await;
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let mut limit = 1;
        let pids = loop {
            let hooks = hooks(dir.path(), HANGS, Duration::from_secs(limit));
            let error = hooks.run("leader", "1").await.unwrap_err();
            assert!(error.to_string().contains("was killed"), "{error}");
            if let Some(pids) = group(dir.path()) {
                break pids;
            }
            // It was killed before it had begun.
            limit *= 3;
            assert!(limit < 100);
        };
        until_all_end(&pids).await;
    }

    #[tokio::test]
    async fn a_call_that_is_dropped_leaves_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(dir.path(), HANGS, Duration::from_secs(600));
        let call = tokio::spawn(async move { hooks.run("leader", "1").await });
        until("it hangs", || group(dir.path()).is_some()).await;
        let pids = group(dir.path()).unwrap();
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        until_all_end(&pids).await;
    }

    #[tokio::test]
    async fn much_output_is_bounded_and_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let script = "head -c 1000000 /dev/zero | tr '\\0' x; echo failed >&2; exit 3";
        let hooks = hooks(dir.path(), script, Duration::from_secs(30));
        let (status, output) = hooks.run("leader", "1").await.unwrap();
        assert_eq!(status.code(), Some(3));
        assert!(output.len() <= 2 * OUTPUT_MAX && output.ends_with("failed"));
    }
}
