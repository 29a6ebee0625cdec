//! Hosts as network namespaces: each has an address, a cable to a switch in a namespace of its own, a control
//! group for its processes and a file system for its data. Everything goes when [`Net`] is dropped; what an
//! earlier run left behind that was killed goes when the next one starts.
//!
//! No address outside the made namespaces is used, and none of the machine's own interfaces, so neither its
//! firewall nor other runs can meet what happens here.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::cable::Cable;

/// What names of namespaces, control groups and directories begin with.
const PREFIX: &str = "craton-hosts-";

/// Where `ip netns` keeps its namespaces.
const NETNS: &str = "/run/netns";

/// Bytes of a host's file system. It is sparse: only what is written costs.
const DISK_BYTES: u64 = 3 << 30;

/// How a process comes to a host: into its control group, and into a session of its own, as a service manager
/// starts it. Ctrl-C is for the trial, which takes everything down in order; and schedulers that share the
/// processors out by session take each daemon for what it is on a host of its own.
const ENTER: &str = "echo $$ > \"$0\" && exec setsid \"$@\"";

/// How long killed processes may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(20);

/// The network of all hosts.
pub const NETWORK: &str = "10.77.0.0/24";

/// Runs a program of the system to its end; its output.
pub fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{program} cannot be run: {e}"))?;
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&out.stderr);
        Err(format!("{program} {}: {}", args.join(" "), said.trim()))
    }
}

fn must(program: &str, args: &[&str]) -> String {
    run(program, args).unwrap_or_else(|e| panic!("{e}"))
}

/// Why hosts cannot be made here, if they cannot.
pub fn impossible() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("this is not root, and only root makes network namespaces".into());
    }
    let name = format!("{PREFIX}{}-probe", std::process::id());
    let made = run("ip", &["netns", "add", &name]);
    let _ = run("ip", &["netns", "del", &name]);
    made.err().or_else(|| {
        let need = "there is no writable control group of version 2 (mount -t cgroup2 none /sys/fs/cgroup/unified)";
        cgroup_root().is_none().then(|| need.to_owned())
    })
}

/// The mounted control groups that can freeze and kill: version 2, wherever it is.
fn cgroup_root() -> Option<PathBuf> {
    // Once for all runs of this process: two that tried at the same moment would take each other's group for none.
    static ROOT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let look = || {
        mounted("cgroup2", "").filter(|root| {
            let probe = root.join(format!("{PREFIX}{}-probe", std::process::id()));
            let made = std::fs::create_dir(&probe).is_ok() && probe.join("cgroup.freeze").exists();
            let _ = std::fs::remove_dir(&probe);
            made
        })
    };
    ROOT.get_or_init(look).clone()
}

/// Where a kind of file system with this option is mounted.
fn mounted(kind: &str, option: &str) -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let place = fields.nth(1)?;
        let same = fields.next()? == kind
            && (option.is_empty() || fields.next()?.split(',').any(|o| o == option));
        same.then(|| PathBuf::from(place))
    })
}

/// How a host's cable is made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// By the kernel.
    Plain,
    /// Through this process, which can delay what passes.
    Slow,
}

/// A host.
pub struct Host {
    /// Its short name.
    pub name: String,
    /// Its address.
    pub ip: String,
    /// Its directory; a file system of its own where `disk` says so.
    pub dir: PathBuf,
    /// True when `dir` is a file system of its own.
    pub disk: bool,
    /// The cable, where it can delay.
    pub cable: Option<Cable>,
    netns: String,
    cgroup: PathBuf,
}

/// All hosts of a run.
pub struct Net {
    /// The directory of the run.
    pub dir: PathBuf,
    name: String,
    cgroups: PathBuf,
    hosts: Vec<Host>,
}

impl Net {
    /// The switch alone.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let cgroups = cgroup_root().expect("see `impossible`");
        let net = Self {
            dir: std::env::temp_dir().join(&name),
            name,
            cgroups,
            hosts: Vec::new(),
        };
        std::fs::create_dir_all(&net.dir).expect("a directory for the run");
        let switch = net.switch();
        must("ip", &["netns", "add", &switch]);
        must(
            "ip",
            &["-n", &switch, "link", "add", "br0", "type", "bridge"],
        );
        must("ip", &["-n", &switch, "link", "set", "br0", "up"]);
        net
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    /// Adds a host with the address 10.77.0.`last`.
    pub fn add(&mut self, name: &str, last: u8, link: Link, with_disk: bool) {
        let netns = format!("{}-{name}", self.name);
        let switch = self.switch();
        let ip = format!("10.77.0.{last}");
        let port = format!("to-{name}");
        must("ip", &["netns", "add", &netns]);
        let cable = match link {
            Link::Plain => {
                let there = ["peer", "name", &port, "netns", &switch];
                let here = ["-n", &netns, "link", "add", "eth0", "type", "veth"];
                must("ip", &[&here[..], &there[..]].concat());
                None
            }
            Link::Slow => Some(Cable::plug(&netns, "eth0", &switch, &port)),
        };
        must(
            "ip",
            &["-n", &switch, "link", "set", &port, "master", "br0"],
        );
        must("ip", &["-n", &switch, "link", "set", &port, "up"]);
        must(
            "ip",
            &[
                "-n",
                &netns,
                "addr",
                "add",
                &format!("{ip}/24"),
                "dev",
                "eth0",
            ],
        );
        must("ip", &["-n", &netns, "link", "set", "lo", "up"]);
        must("ip", &["-n", &netns, "link", "set", "eth0", "up"]);
        let cgroup = self.cgroups.join(&netns);
        std::fs::create_dir(&cgroup).expect("a control group for the host");
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).expect("a directory for the host");
        let mut host = Host {
            name: name.to_owned(),
            ip,
            dir,
            disk: false,
            cable,
            netns,
            cgroup,
        };
        if with_disk {
            host.mount_disk();
        }
        must(
            "chown",
            &["postgres:", host.dir.to_str().expect("a plain path")],
        );
        self.hosts.push(host);
    }

    /// A host by its name.
    pub fn host(&self, name: &str) -> &Host {
        let found = self.hosts.iter().find(|h| h.name == name);
        found.unwrap_or_else(|| panic!("there is no host {name}"))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in &self.hosts {
            host.thaw_disk();
        }
        if let Some(place) = std::env::var_os("CRATON_TEST_LOGS") {
            let place = Path::new(&place).join(&self.name);
            let _ = std::fs::create_dir_all(&place);
            for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
                if entry.path().extension().is_some_and(|e| e == "log") {
                    let _ = std::fs::copy(entry.path(), place.join(entry.file_name()));
                }
            }
        }
        remove(&self.name, &self.cgroups);
    }
}

/// Removes what runs left behind whose process is gone.
fn sweep() {
    let mut names: Vec<String> = std::fs::read_dir(NETNS)
        .into_iter()
        .chain(std::fs::read_dir(std::env::temp_dir()))
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter_map(|n| {
            let rest = n.strip_prefix(PREFIX)?;
            let mut parts = rest.split('-');
            let (pid, number) = (parts.next()?, parts.next()?);
            let dead = pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists();
            (dead && number.parse::<u32>().is_ok()).then(|| format!("{PREFIX}{pid}-{number}"))
        })
        .collect();
    names.sort();
    names.dedup();
    let Some(cgroups) = cgroup_root() else { return };
    for name in names {
        remove(&name, &cgroups);
    }
}

/// Kills, unmounts and removes everything of a run.
fn remove(name: &str, cgroups: &Path) {
    let dir = std::env::temp_dir().join(name);
    let mine = |entry: &std::fs::DirEntry| {
        let other = entry.file_name().to_string_lossy().into_owned();
        other.strip_prefix(name).is_some_and(|r| r.starts_with('-'))
    };
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let below = format!("{}/", dir.display());
    let places: BTreeSet<&str> = mounts
        .lines()
        .filter_map(|l| l.split(' ').nth(1))
        .filter(|place| place.starts_with(&below))
        .collect();
    for place in &places {
        let _ = run("fsfreeze", &["-u", place]);
    }
    for entry in std::fs::read_dir(cgroups)
        .into_iter()
        .flatten()
        .flatten()
        .filter(mine)
    {
        let group = entry.path();
        let segments = mapped_segments(&group);
        let _ = std::fs::write(group.join("cgroup.kill"), "1");
        wait_empty(&group);
        for segment in segments {
            let _ = std::fs::remove_file(segment);
        }
        let _ = std::fs::remove_dir(&group);
    }
    let starved = mounted("cgroup", "cpu").map(std::fs::read_dir);
    for entry in starved
        .into_iter()
        .flatten()
        .flatten()
        .flatten()
        .filter(mine)
    {
        let _ = std::fs::remove_dir(entry.path());
    }
    for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
        remove_shared_memory(&entry.path());
    }
    for place in places {
        if let Err(error) = run("umount", &[place]) {
            eprintln!("{error}");
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    let images = std::env::var_os("CRATON_TEST_DISKS").map(std::fs::read_dir);
    for entry in images
        .into_iter()
        .flatten()
        .flatten()
        .flatten()
        .filter(mine)
    {
        let _ = std::fs::remove_file(entry.path());
    }
    for entry in std::fs::read_dir(NETNS)
        .into_iter()
        .flatten()
        .flatten()
        .filter(mine)
    {
        let _ = run(
            "ip",
            &["netns", "del", &entry.file_name().to_string_lossy()],
        );
    }
}

/// What the processes of a group share in memory by name (PostgreSQL's segments, the fence's board), which
/// outlives them when they are killed.
fn mapped_segments(cgroup: &Path) -> BTreeSet<PathBuf> {
    let pids = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut found = BTreeSet::new();
    for pid in pids.lines() {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let names = maps.lines().filter_map(|l| l.split_whitespace().nth(5));
        found.extend(
            names
                .filter(|n| n.starts_with("/dev/shm/"))
                .map(PathBuf::from),
        );
    }
    found
}

/// A killed PostgreSQL leaves its System V segment, which only its next start would remove.
fn remove_shared_memory(host: &Path) {
    let Ok(text) = std::fs::read_to_string(host.join("member/data/postmaster.pid"))
        .or_else(|_| std::fs::read_to_string(host.join("data/postmaster.pid")))
    else {
        return;
    };
    if let Some(id) = text
        .lines()
        .nth(6)
        .and_then(|l| l.split_whitespace().nth(1))
    {
        let _ = run("ipcrm", &["-m", id]);
    }
}

fn wait_empty(cgroup: &Path) {
    let deadline = Instant::now() + GONE_WITHIN;
    while std::fs::read_to_string(cgroup.join("cgroup.events"))
        .is_ok_and(|events| events.contains("populated 1"))
    {
        if Instant::now() > deadline {
            eprintln!("processes in {} do not end", cgroup.display());
            return;
        }
        pause();
    }
}

/// Between two looks at something that sends no signal and is waited for with a deadline.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

impl Host {
    fn mount_disk(&mut self) {
        // Where the images are says what a flush costs: `CRATON_TEST_DISKS=/dev/shm` takes the machine's own
        // disk, and who else uses it, out of a measurement.
        let image = match std::env::var_os("CRATON_TEST_DISKS") {
            Some(place) => Path::new(&place).join(format!("{}.img", self.netns)),
            None => self.dir.with_extension("img"),
        };
        let file = std::fs::File::create(&image).expect("an image file");
        file.set_len(DISK_BYTES).expect("a sparse image");
        let image = image.to_str().expect("a plain path");
        let dir = self.dir.to_str().expect("a plain path");
        must(
            "mkfs.ext4",
            &["-q", "-m", "0", "-E", "lazy_itable_init=1", image],
        );
        must("mount", &["-o", "loop", image, dir]);
        self.disk = true;
    }

    /// Runs `body` on a thread of its own that lives in this host's network.
    pub fn enter(&self) -> impl Fn() + Send + Sync + 'static {
        let path = Path::new(NETNS).join(&self.netns);
        move || {
            let file = std::fs::File::open(&path).expect("the host's network namespace");
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("root may enter a network namespace");
        }
    }

    /// A command that will run on this host as the user `postgres`.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        self.command_as(Some("postgres"), program, args)
    }

    /// The same as some user; none: root.
    pub fn command_as(&self, user: Option<&str>, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("sh");
        let procs = self.cgroup.join("cgroup.procs");
        command.args(["-c", ENTER]).arg(procs);
        command
            .arg("nsenter")
            .arg(format!("--net={NETNS}/{}", self.netns));
        if let Some(user) = user {
            command.args([
                "setpriv",
                "--reuid",
                user,
                "--regid",
                user,
                "--clear-groups",
            ]);
        }
        command.arg(program).args(args);
        command.current_dir("/").env("HOME", "/var/lib/postgresql");
        command.stdin(Stdio::null());
        command
    }

    /// Every process of the host.
    pub fn pids(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }

    /// Processes of the host whose command line holds `needle`.
    pub fn processes(&self, needle: &str) -> Vec<i32> {
        let of = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line)
                .replace('\0', " ")
                .contains(needle)
        };
        self.pids().into_iter().filter(of).collect()
    }

    /// Kills every process, all at once, and waits until they are gone.
    pub fn kill(&self) {
        self.thaw();
        let _ = std::fs::write(self.starved_group().join("cgroup.kill"), "1");
        std::fs::write(self.cgroup.join("cgroup.kill"), "1").expect("cgroup.kill");
        wait_empty(&self.cgroup);
    }

    /// Stops every process, all at once.
    pub fn freeze(&self) {
        std::fs::write(self.cgroup.join("cgroup.freeze"), "1").expect("cgroup.freeze");
    }

    /// Lets them go on.
    pub fn thaw(&self) {
        let _ = std::fs::write(self.cgroup.join("cgroup.freeze"), "0");
    }

    /// Gives a process at most a thousandth of a core, or all it wants.
    pub fn starve(&self, pid: i32, starved: bool) -> Result<(), String> {
        let (group, back, limits) = if let Some(root) = mounted("cgroup", "cpu") {
            let limits = [
                ("cpu.cfs_period_us", "1000000"),
                ("cpu.cfs_quota_us", "1000"),
            ];
            (root.join(&self.netns), root, limits)
        } else {
            let root = self.cgroup.parent().ok_or("no parent group")?;
            // The processes of version 2 sit in leaves, so this is a group beside the host's.
            let _ = std::fs::write(root.join("cgroup.subtree_control"), "+cpu");
            let limits = [("cpu.max", "1000 1000000"), ("cpu.weight", "1")];
            (self.starved_group(), self.cgroup.clone(), limits)
        };
        let write = |path: PathBuf, text: &str| {
            std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
        };
        if starved {
            std::fs::create_dir_all(&group).map_err(|e| format!("{}: {e}", group.display()))?;
            for (file, value) in limits {
                write(group.join(file), value)?;
            }
            return write(group.join("cgroup.procs"), &pid.to_string());
        }
        if Path::new("/proc").join(pid.to_string()).exists() {
            write(back.join("cgroup.procs"), &pid.to_string())?;
        }
        let _ = std::fs::remove_dir(group);
        Ok(())
    }

    fn starved_group(&self) -> PathBuf {
        let name = format!("{}-starved", self.netns);
        self.cgroup.with_file_name(name)
    }

    /// Replaces the rules by which the host drops packets; no rules: all pass.
    pub fn rules(&self, rules: &Rules) {
        let mut text = String::from("table inet fault\ndelete table inet fault\n");
        if !rules.input.is_empty() || !rules.output.is_empty() {
            text.push_str("table inet fault {\n");
            for (hook, lines) in [("input", &rules.input), ("output", &rules.output)] {
                let _ = writeln!(
                    text,
                    " chain {hook} {{\n type filter hook {hook} priority 0"
                );
                for line in lines {
                    let _ = writeln!(text, "  {line} drop");
                }
                text.push_str(" }\n");
            }
            text.push_str("}\n");
        }
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &self.netns, "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft of the package nftables");
        let mut input = nft.stdin.take().expect("a pipe");
        input
            .write_all(text.as_bytes())
            .expect("nft reads its rules");
        drop(input);
        assert!(
            nft.wait().expect("nft ends").success(),
            "nft refused:\n{text}"
        );
    }

    /// Fills the host's file system.
    pub fn fill_disk(&self) {
        assert!(
            self.disk,
            "host {} has no file system of its own",
            self.name
        );
        let file = std::fs::File::create(self.dir.join("filler")).expect("a file to fill");
        // In shrinking steps, until not even a block fits.
        let mut size: u64 = DISK_BYTES;
        let mut offset = 0;
        while size >= 4096 {
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), offset, size) {
                Ok(()) => offset += size,
                Err(_) => size /= 2,
            }
        }
    }

    /// Makes room again.
    pub fn empty_disk(&self) {
        let _ = std::fs::remove_file(self.dir.join("filler"));
    }

    /// Lets every write to the host's file system wait.
    pub fn freeze_disk(&self) {
        assert!(
            self.disk,
            "host {} has no file system of its own",
            self.name
        );
        must(
            "fsfreeze",
            &["-f", self.dir.to_str().expect("a plain path")],
        );
    }

    /// Lets them go on.
    pub fn thaw_disk(&self) {
        if self.disk {
            let _ = run(
                "fsfreeze",
                &["-u", self.dir.to_str().expect("a plain path")],
            );
        }
    }
}

/// What a host drops, as conditions of nftables.
#[derive(Default)]
pub struct Rules {
    /// Of what arrives.
    pub input: Vec<String>,
    /// Of what it sends.
    pub output: Vec<String>,
}

/// Sends a signal to a process.
pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}
