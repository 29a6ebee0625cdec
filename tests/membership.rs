//! Members come and go while clients write: the finished binary, real PostgreSQL.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, processes_of, running, serves, signal, text};

const PATIENCE: Duration = Duration::from_secs(120);

/// One cluster at a time: the machine is small.
static TURN: Mutex<()> = Mutex::new(());

fn streaming(status: &Value, members: usize) -> bool {
    let all = status["members"].as_array().map_or(&[][..], Vec::as_slice);
    status["writable"] == true
        && all.len() == members
        && all.iter().all(|m| serves(status, m))
        && status["sync"]["members"]
            .as_array()
            .is_some_and(|v| v.len() + 1 == members)
}

/// How many have a say; none while that cannot be asked.
fn voters(c: &Cluster) -> Option<usize> {
    let out = c.craton(&["--json", "member", "list"]);
    let members: Value = serde_json::from_slice(&out.stdout).ok()?;
    let all = members["members"].as_array()?;
    Some(all.iter().filter(|m| m["voter"] == true).count())
}

fn wait_voters(c: &Cluster, wanted: usize) {
    let deadline = Instant::now() + PATIENCE;
    while voters(c) != Some(wanted) {
        assert!(
            Instant::now() < deadline,
            "never {wanted} voters: {}\n{}",
            text(&c.craton(&["member", "list"])),
            c.logs()
        );
    }
}

/// Writes one row after the other through the proxy until told to stop; how many were acknowledged, or the first
/// error.
fn write(c: &Cluster, stop: &AtomicBool) -> Result<u64, String> {
    let mut n = 0;
    while !stop.load(Ordering::SeqCst) {
        let insert = format!("INSERT INTO marks VALUES ({n})");
        let out = c.craton(&["psql", "-d", "postgres", "-c", &insert]);
        if !out.status.success() {
            return Err(format!("row {n}: {}", text(&out)));
        }
        n += 1;
    }
    Ok(n)
}

/// Ends the writer however the test ends: the cluster is purged only then.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn from_two_to_three_to_five_and_back_while_clients_write() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let c = Cluster::up("members", &["--members", "2", "--no-sample"]);
    c.wait_status("two members", PATIENCE, |s| streaming(s, 2));
    c.steady();
    c.sql(&[
        "-d",
        "postgres",
        "-c",
        "CREATE TABLE marks (n bigint PRIMARY KEY)",
    ]);
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writing = scope.spawn(|| write(&c, &stop));
        let stopper = Stop(&stop);
        grow_and_shrink(&c);
        drop(stopper);
        writing.join().unwrap()
    });
    let written = written.unwrap_or_else(|error| {
        panic!("a client saw an error: {error}\n{}", c.logs());
    });
    let count = "SELECT count(*) FROM marks";
    assert_eq!(
        c.sql(&["-d", "postgres", "-Atc", count]),
        written.to_string()
    );
    assert!(written > 20, "only {written} rows were written");

    // What is left is a cluster as any other.
    let over = c.craton(&["switchover"]);
    c.expect_ok(&over, "craton switchover");
    assert_eq!(
        c.sql(&["-d", "postgres", "-Atc", count]),
        written.to_string()
    );
}

fn grow_and_shrink(c: &Cluster) {
    for (members, votes) in [("3", 3), ("5", 5)] {
        let up = c.craton(&["up", "--members", members]);
        c.expect_ok(&up, "craton up --members");
        c.wait_status("all of them", PATIENCE, |s| streaming(s, votes));
        wait_voters(c, votes);
    }
    // The leader is not removed.
    let status = c.json(&["status"]);
    let leader = status["leader"].as_str().unwrap().to_owned();
    let refused = c.craton(&["member", "remove", &leader, "--yes"]);
    assert_eq!(refused.status.code(), Some(4), "{}", text(&refused));
    assert!(text(&refused).contains("switchover"), "{}", text(&refused));

    let others: Vec<String> = status["members"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap().to_owned())
        .filter(|m| *m != leader)
        .collect();
    for (gone, left) in others.iter().take(2).zip([4, 3]) {
        let out = c.craton(&["member", "remove", gone, "--yes"]);
        c.expect_ok(&out, "craton member remove");
        c.wait_status("the others", PATIENCE, |s| streaming(s, left));
    }
    wait_voters(c, 3);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name ~ '^craton_.$'";
    let deadline = Instant::now() + PATIENCE;
    while c.sql(&["-d", "postgres", "-Atc", slots]) != "2" {
        assert!(Instant::now() < deadline, "slots of removed members stay");
    }
}

/// The majority of the voters is lost for good, with its disks: one survivor goes on, and a host with an empty disk
/// takes the place of a lost one.
#[test]
fn one_survivor_goes_on_and_a_new_host_joins_it() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let c = Cluster::up("recover", &["--no-sample"]);
    let status = c.wait_status("a whole cluster", PATIENCE, |s| streaming(s, 3));
    let leader = status["leader"].as_str().unwrap().to_owned();
    let mut standbys = ["a", "b", "c"].into_iter().filter(|m| *m != leader);
    let (survivor, other) = (standbys.next().unwrap(), standbys.next().unwrap());
    c.sql(&[
        "-qc",
        "CREATE TABLE kept AS SELECT generate_series(1, 100) AS i",
    ]);
    wait_received(&c, survivor);

    // Nothing is to start the lost ones again.
    for pid in running(&[" supervise", c.dir.to_str().unwrap()]) {
        signal(pid, "KILL");
    }
    // Both at once: one after the other, the second could still elect the survivor.
    let lost = [&leader, other].map(|lost| (lost, processes_of(&c.dir, lost)));
    let pids: Vec<u32> = lost.iter().flat_map(|(_, pids)| pids).copied().collect();
    kill(&pids);
    for (lost, _) in lost {
        let home = c.dir.join("members").join(lost);
        wait_until("it is gone", || processes_of(&c.dir, lost).is_empty());
        std::fs::remove_dir_all(home).unwrap();
    }
    let conf = c.dir.join(format!("conf/node-{survivor}.toml"));
    let recover = format!("recover --config {} --yes", conf.display());
    let refused = as_owner(&c, &recover);
    assert_eq!(refused.status.code(), Some(4), "{}", text(&refused));
    assert!(
        text(&refused).contains("stop this member's agent first"),
        "{}",
        text(&refused)
    );
    for pid in running(&[" node ", conf.to_str().unwrap()]) {
        signal(pid, "TERM");
    }
    wait_until("the agent ends", || {
        processes_of(&c.dir, survivor).is_empty()
    });
    let out = as_owner(&c, &recover);
    c.expect_ok(&out, "craton recover");
    println!("{}", text(&out));
    assert!(
        text(&out).contains("is the only voter now"),
        "{}",
        text(&out)
    );

    let _agent = start_agent(&c, survivor);
    let stuck = c.wait_status("an election that lacks a seal", PATIENCE, |s| {
        s["election"]["sealed"] == serde_json::json!([survivor])
    });
    assert_eq!(stuck["voters"], serde_json::json!([survivor]), "{stuck}");
    let out = c.craton(&["failover", "--allow-data-loss", "--yes"]);
    c.expect_ok(&out, "craton failover --allow-data-loss");
    c.wait_status("the survivor leads", PATIENCE, |s| {
        s["writable"] == true && s["leader"] == survivor
    });
    assert_eq!(c.sql(&["-Atc", "SELECT count(*) FROM kept"]), "100");

    joins(&c, &stuck, (survivor, other));
}

/// The survivor was cut off first, so its log is an old one: by what it says it may lead, and rows that the leader
/// acknowledged alone afterwards would be lost without anybody having said so.
#[test]
fn a_survivor_with_an_old_log_stays_closed_until_the_loss_is_accepted() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let c = Cluster::up(
        "recover-old",
        &["--members", "2", "--witness", "--no-sample"],
    );
    let status = c.wait_status("a whole cluster", PATIENCE, |s| streaming(s, 2));
    wait_voters(&c, 3);
    let leader = status["leader"].as_str().unwrap().to_owned();
    let survivor = if leader == "a" { "b" } else { "a" };
    c.sql(&[
        "-qc",
        "CREATE TABLE kept AS SELECT generate_series(1, 100) AS i",
    ]);
    wait_received(&c, survivor);
    // Nothing is to start the lost ones again.
    for pid in running(&[" supervise", c.dir.to_str().unwrap()]) {
        signal(pid, "KILL");
    }

    // Cut off, as far as the others can tell: nothing of it runs.
    kill(&processes_of(&c.dir, survivor));
    wait_until("it is cut off", || {
        processes_of(&c.dir, survivor).is_empty()
    });
    c.wait_status("the leader is alone on record", PATIENCE, |s| {
        s["writable"] == true && s["sync"]["members"] == serde_json::json!([])
    });
    c.sql(&["-qc", "INSERT INTO kept SELECT generate_series(101, 150)"]);
    assert_eq!(c.sql(&["-Atc", "SELECT count(*) FROM kept"]), "150");

    // Leader and witness burn.
    let witness = || running(&[" witness ", c.dir.to_str().unwrap()]);
    assert_eq!(witness().len(), 1);
    kill(&[processes_of(&c.dir, &leader), witness()].concat());
    wait_until("they are gone", || {
        processes_of(&c.dir, &leader).is_empty() && witness().is_empty()
    });
    std::fs::remove_dir_all(c.dir.join("members").join(&leader)).unwrap();
    std::fs::remove_dir_all(c.dir.join("witness")).unwrap();

    let conf = c.dir.join(format!("conf/node-{survivor}.toml"));
    let out = as_owner(&c, &format!("recover --config {} --yes", conf.display()));
    c.expect_ok(&out, "craton recover");
    println!("{}", text(&out));
    let old = format!("led by {leader}, commits wait for 1 of {survivor}");
    assert!(text(&out).contains(&old), "{}", text(&out));
    assert!(
        text(&out).contains("not promoted by itself"),
        "{}",
        text(&out)
    );
    let _agent = start_agent(&c, survivor);
    stays_closed_and_says_why(&c, survivor);

    let out = c.craton(&["failover", "--allow-data-loss", "--yes"]);
    c.expect_ok(&out, "craton failover --allow-data-loss");
    assert!(text(&out).contains("recovered from"), "{}", text(&out));
    c.wait_status("the survivor leads", PATIENCE, |s| {
        s["writable"] == true && s["leader"] == survivor
    });
    assert_eq!(c.sql(&["-Atc", "SELECT count(*) FROM kept"]), "100");
    let told = c.json(&["history"]);
    let kinds: Vec<&str> = told["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["kind"].as_str().unwrap())
        .filter(|k| ["recovered", "override", "elected"].contains(k))
        .collect();
    assert!(
        kinds.ends_with(&["recovered", "override", "elected"]),
        "{told}"
    );
}

/// Its own seal is all that its old sync set asks for, and it does not lead for several leases.
fn stays_closed_and_says_why(c: &Cluster, survivor: &str) {
    let stuck = c.wait_status("an election in recovered records", PATIENCE, |s| {
        s["election"]["recovered"] == true
            && s["election"]["sealed"] == serde_json::json!([survivor])
    });
    assert_eq!(stuck["election"]["seals_needed"], 1, "{stuck}");
    let plain = c.craton(&["status"]);
    assert!(text(&plain).contains("may be old"), "{}", text(&plain));
    harness::watch(Duration::from_secs(6), || {
        let status = c.json(&["status"]);
        assert!(status["leader"].is_null(), "it was promoted: {status}");
    });
    let explained = text(&c.craton(&["explain", survivor]));
    let doctor = text(&c.craton(&["doctor"]));
    for (said, by) in [(explained, "no_winner"), (doctor, "recovered")] {
        assert!(said.contains(by), "{said}");
        assert!(said.contains("--allow-data-loss"), "{said}");
    }
}

fn kill(pids: &[u32]) {
    let pids = pids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg("-KILL").args(pids).status();
}

/// A new host in the place of a lost one: an empty disk, and whom to ask.
fn joins(c: &Cluster, status: &Value, (survivor, other): (&str, &str)) {
    let api = status["members"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["id"] == survivor)
        .unwrap();
    let api = api["api"].as_str().unwrap();
    let path = c.dir.join(format!("conf/node-{other}.toml"));
    let file = std::fs::read_to_string(&path).unwrap();
    assert!(file.contains("join = []"), "{file}");
    let file = file.replace("join = []", &format!("join = [\"{api}\"]"));
    std::fs::write(&path, file).unwrap();
    let _other = start_agent(c, other);
    c.wait_status("a second copy", PATIENCE, |s| {
        s["writable"] == true && s["sync"]["members"] == serde_json::json!([other])
    });
    c.sql(&["-qc", "INSERT INTO kept VALUES (101)"]);
    // It is flushed there; it is seen once it is replayed.
    answers(c, &["--read", "-Atc", "SELECT count(*) FROM kept"], "101");
}

/// Waits until a query gives this.
fn answers(c: &Cluster, query: &[&str], expected: &str) {
    c.wait(&query.join(" "), PATIENCE, || {
        let found = c.sql(query);
        if found == expected {
            Ok(())
        } else {
            Err(found)
        }
    });
}

/// All that is committed now is flushed on this standby, by the leader's own word.
fn wait_received(c: &Cluster, standby: &str) {
    let end = c.sql(&["-qAtc", "SELECT pg_current_wal_flush_lsn()"]);
    let received = format!(
        "SELECT count(*) FROM pg_stat_replication WHERE application_name LIKE '{standby}@%' AND flush_lsn >= '{end}'"
    );
    answers(c, &["-qAtc", &received], "1");
}

/// Runs a command of the cluster's own binary as the cluster's user.
fn as_owner(c: &Cluster, args: &str) -> std::process::Output {
    let line = format!("{} {args}", c.dir.join("bin/craton").display());
    owner(&line).output().expect("a shell runs")
}

fn owner(line: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        let mut command = Command::new("su");
        command.args(["postgres", "-s", "/bin/sh", "-c", line]);
        command
    } else {
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        command
    }
}

/// Ends with the test at the latest.
struct Agent(std::process::Child);

impl Drop for Agent {
    fn drop(&mut self) {
        // The shell around it; `craton down` ends the agent itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts an agent as the supervisor would.
fn start_agent(c: &Cluster, member: &str) -> Agent {
    let dir = c.dir.display();
    let line = format!(
        "cd {dir} && exec bin/craton node --config {dir}/conf/node-{member}.toml \
         --pid-file {dir}/run/node-{member}.pid >>{dir}/log/node-{member}.log 2>&1"
    );
    Agent(owner(&line).spawn().expect("a shell runs"))
}

fn wait_until(what: &str, met: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !met() {
        assert!(Instant::now() < deadline, "{what}: never");
        std::thread::sleep(Duration::from_millis(50));
    }
}
