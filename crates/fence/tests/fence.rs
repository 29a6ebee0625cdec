//! The fence as a process of its own, against real processes.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on must say where"
)]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use craton_fence::{Board, Ended, Order, PERIOD, Target, boottime_ns};
use rustix::process::{Pid, Signal, kill_process};

const BOARD: &str = "FENCE_TEST_BOARD";
const LIMIT_NS: u64 = 60_000_000_000;

/// Not a test of its own: what the others start as the fence.
#[test]
fn serves() {
    if let Some(path) = std::env::var_os(BOARD) {
        assert_eq!(
            craton_fence::run(Path::new(&path), None).unwrap(),
            Ended::Told
        );
    }
}

/// A fence, its board, and a postmaster-like tree: a shell with two children, one in a session of its own.
struct Scene {
    dir: tempfile::TempDir,
    board: Board,
    fence: Child,
    victim: Child,
    tree: Vec<Target>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = board_in(dir.path());
        let board = Board::open(&path).unwrap();
        let fence = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "serves"])
            .env(BOARD, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let victim = Command::new("sh")
            .args(["-c", "sleep 300 & setsid sleep 301 & wait"])
            .current_dir(dir.path())
            .process_group(0)
            .spawn()
            .unwrap();
        let mut scene = Self {
            dir,
            board,
            fence,
            victim,
            tree: Vec::new(),
        };
        until("the fence lives and the tree stands", || {
            scene.tree = tree(scene.victim_pid());
            let report = scene.board.report().unwrap().unwrap_or_default();
            scene.tree.len() == 3 && report.is_alive(boottime_ns())
        });
        scene
    }

    fn victim_pid(&self) -> i32 {
        i32::try_from(self.victim.id()).unwrap()
    }

    fn order(&self, left: Duration) -> Order {
        Order {
            armed: true,
            quit: false,
            deadline_ns: boottime_ns() + u64::try_from(left.as_nanos()).unwrap(),
            target: Target::of(self.victim_pid()),
            ..Order::default()
        }
    }

    fn alive(&self) -> usize {
        self.tree.iter().filter(|t| t.is_alive()).count()
    }

    fn fired(&self) -> u64 {
        self.board.report().unwrap().unwrap().fired_count
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.fence.kill();
        let _ = self.fence.wait();
        for process in self.tree.iter().filter(|t| t.is_alive()) {
            let _ = kill_process(Pid::from_raw(process.pid).unwrap(), Signal::KILL);
        }
        let _ = self.victim.wait();
    }
}

fn board_in(dir: &Path) -> PathBuf {
    dir.join("board")
}

/// A process and its children.
fn tree(pid: i32) -> Vec<Target> {
    let children =
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children
        .split_ascii_whitespace()
        .filter_map(|p| p.parse().ok());
    std::iter::once(pid)
        .chain(children)
        .filter_map(Target::of)
        .collect()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = boottime_ns() + LIMIT_NS;
    while !is_so() {
        assert!(boottime_ns() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn past_the_deadline_the_whole_tree_dies() {
    let scene = Scene::new();
    let order = scene.order(Duration::from_millis(300));
    scene.board.give(&order).unwrap();
    until("all are dead", || scene.alive() == 0);
    let dead_ns = boottime_ns();
    assert!(dead_ns >= order.deadline_ns, "killed before the deadline");
    until("it says so", || scene.fired() == 1);
    assert!(scene.board.report().unwrap().unwrap().fired_ns >= order.deadline_ns);
}

#[test]
fn a_frozen_tree_dies_too() {
    let scene = Scene::new();
    for process in &scene.tree {
        kill_process(Pid::from_raw(process.pid).unwrap(), Signal::STOP).unwrap();
    }
    scene.board.give(&scene.order(Duration::ZERO)).unwrap();
    until("all are dead", || scene.alive() == 0);
}

#[test]
fn a_renewed_deadline_spares_it_until_the_renewals_stop() {
    let scene = Scene::new();
    let first = scene.order(Duration::from_secs(3));
    scene.board.give(&first).unwrap();
    until("the first deadline has passed", || {
        // Far ahead: an owner on a machine that stands still is none that froze.
        scene
            .board
            .give(&scene.order(Duration::from_secs(120)))
            .unwrap();
        assert_eq!(scene.alive(), 3);
        boottime_ns() > first.deadline_ns + 500_000_000
    });
    assert_eq!(scene.fired(), 0);
    // The owner freezes after this one; a real one would be stopped by SIGSTOP.
    scene
        .board
        .give(&scene.order(Duration::from_millis(100)))
        .unwrap();
    until("all are dead", || scene.alive() == 0);
}

#[test]
fn unarmed_it_kills_nobody_and_ends_when_told() {
    let mut scene = Scene::new();
    scene
        .board
        .give(&Order {
            armed: false,
            ..scene.order(Duration::ZERO)
        })
        .unwrap();
    let looked = boottime_ns() + 3 * u64::try_from(PERIOD.as_nanos()).unwrap();
    until("it looked at the order", || {
        scene.board.report().unwrap().unwrap().alive_ns > looked
    });
    assert_eq!((scene.alive(), scene.fired()), (3, 0));
    scene
        .board
        .give(&Order {
            quit: true,
            ..Order::default()
        })
        .unwrap();
    assert!(scene.fence.wait().unwrap().success());
}

#[test]
fn another_process_with_the_same_pid_is_left_alone() {
    let scene = Scene::new();
    let mut order = scene.order(Duration::ZERO);
    order.target = order.target.map(|t| Target {
        start_ticks: t.start_ticks + 1,
        ..t
    });
    scene.board.give(&order).unwrap();
    let looked = boottime_ns() + 3 * u64::try_from(PERIOD.as_nanos()).unwrap();
    until("it looked at the order", || {
        scene.board.report().unwrap().unwrap().alive_ns > looked
    });
    assert_eq!((scene.alive(), scene.fired()), (3, 0));
}

#[test]
fn a_damaged_order_does_not_lengthen_the_deadline() {
    use std::os::unix::fs::FileExt;
    let scene = Scene::new();
    scene
        .board
        .give(&scene.order(Duration::from_millis(500)))
        .unwrap();
    let looked = boottime_ns() + 3 * u64::try_from(PERIOD.as_nanos()).unwrap();
    until("it looked at the order", || {
        scene.board.report().unwrap().unwrap().alive_ns > looked
    });
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(board_in(scene.dir.path()))
        .unwrap();
    file.write_all_at(&[0xff; 8], 16).unwrap();
    assert!(scene.board.order().is_err());
    until("all are dead", || scene.alive() == 0);
}

#[test]
fn one_fence_serves_a_board() {
    let scene = Scene::new();
    assert_eq!(
        craton_fence::run(&board_in(scene.dir.path()), None).unwrap(),
        Ended::AnotherServes
    );
}

#[test]
fn orders_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let board = Board::open(&board_in(dir.path())).unwrap();
    assert_eq!(board.order().unwrap(), None);
    let target = Some(Target {
        pid: 42,
        start_ticks: u64::MAX,
    });
    for order in [
        Order {
            armed: true,
            quit: false,
            deadline_ns: u64::MAX,
            target,
            ..Order::default()
        },
        Order {
            armed: false,
            quit: true,
            deadline_ns: 0,
            target: None,
            ..Order::default()
        },
    ] {
        board.give(&order).unwrap();
        assert_eq!(board.order().unwrap(), Some(order));
        assert_eq!(
            Board::open(&board_in(dir.path())).unwrap().order().unwrap(),
            Some(order)
        );
    }
}
