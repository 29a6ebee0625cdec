//! Hostile and broken input on every port of a running cluster: it costs its sender the connection, and the cluster
//! nothing that grows. Meanwhile a client writes, and every write succeeds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    clippy::format_push_string,
    clippy::cast_possible_truncation,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, files_below, text, whole};

/// Connections that are opened at once and say nothing.
const FLOOD: usize = 400;

/// How long a friend may have to try during a flood.
const LET_IN_MAX: Duration = Duration::from_secs(15);

/// How much a daemon may grow by all of this, in KiB. Allocators keep some of what they had.
const RSS_GROWTH_MAX_KIB: u64 = 48 * 1024;

/// Descriptors that a daemon may have more afterwards: its own connections to others come and go.
const FD_GROWTH_MAX: usize = 24;

/// Bytes that the logs may grow by.
const LOG_GROWTH_MAX: u64 = 512 * 1024;

#[test]
fn strangers_cost_their_connection_and_nothing_else() {
    let c = Cluster::up("hostile", &["--no-sample"]);
    c.wait_status("a whole cluster", Duration::from_secs(90), whole);
    // A machine that stands still for a moment is no stranger's doing; strangers that hold up every renewal are seen.
    c.steady_for(6000);
    let before = c.wait_status("a whole cluster", Duration::from_secs(90), whole);
    c.sql(&[
        "-d",
        "postgres",
        "-U",
        "postgres",
        "-c",
        "CREATE TABLE writes (n int)",
    ]);
    let ports = ports(&c);
    // Once, so that what is set up at a first connection is not counted as growth.
    for (port, _) in &ports {
        noise(*port, 1);
    }
    let sizes_before = daemons(&c);
    let logs_before = log_bytes(&c);
    let writer = Writer::default();
    std::thread::scope(|scope| {
        scope.spawn(|| writer.run(&c));
        for (port, kind) in &ports {
            attack(&c, *port, *kind);
        }
        writer.stop.store(true, Ordering::Relaxed);
    });
    let written = writer.written.load(Ordering::Relaxed);
    let last = writer.last_failure.into_inner().unwrap();
    assert_eq!(last, None, "a write failed: {}", c.logs());
    assert!(written > 10, "the writer did nearly nothing");
    let after = c.wait_status("a whole cluster", Duration::from_secs(60), whole);
    assert_eq!(
        after["term"], before["term"],
        "strangers changed the leadership"
    );
    let count = c.sql(&[
        "-d",
        "postgres",
        "-U",
        "postgres",
        "-Atc",
        "SELECT count(*) FROM writes",
    ]);
    assert_eq!(count, written.to_string());
    settled(&c, &sizes_before);
    let grown = log_bytes(&c).saturating_sub(logs_before);
    eprintln!("logs grew by {grown} bytes, {written} writes");
    assert!(grown < LOG_GROWTH_MAX, "the logs grew by {grown} bytes");
}

/// A client that writes, one session a row, until it is told to stop.
#[derive(Default)]
struct Writer {
    stop: AtomicBool,
    written: AtomicU64,
    last_failure: Mutex<Option<String>>,
}

impl Writer {
    fn run(&self, c: &Cluster) {
        let insert = "INSERT INTO writes VALUES (1)";
        while !self.stop.load(Ordering::Relaxed) {
            let out = c.craton(&["psql", "-U", "postgres", "-d", "postgres", "-c", insert]);
            if out.status.success() {
                self.written.fetch_add(1, Ordering::Relaxed);
            } else {
                *self.last_failure.lock().unwrap() = Some(text(&out));
            }
        }
    }
}

/// Everything at one port.
fn attack(c: &Cluster, port: u16, kind: Kind) {
    let began = Instant::now();
    for round in 0..40 {
        noise(port, round);
    }
    for input in special(kind) {
        say(port, &input);
    }
    reset(port);
    let peak = flood_and_slow(c, port);
    eprintln!(
        "port {port} ({kind:?}): {:?}, most descriptors meanwhile {peak:?}",
        began.elapsed()
    );
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Api,
    Coordinator,
    Proxy,
}

fn ports(c: &Cluster) -> Vec<(u16, Kind)> {
    let at = |offset| c.base_port + offset;
    vec![
        (at(21), Kind::Api),
        (at(31), Kind::Coordinator),
        (at(32), Kind::Coordinator),
        (at(41), Kind::Api),
        (at(42), Kind::Api),
        (at(2), Kind::Proxy),
        (at(3), Kind::Proxy),
    ]
}

fn connect(port: u16) -> Option<TcpStream> {
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    Some(stream)
}

/// Sends, and listens for a moment. Both may fail: the port may hang up at any time.
fn say(port: u16, bytes: &[u8]) {
    if let Some(mut stream) = connect(port) {
        let _ = stream.write_all(bytes);
        let _ = stream.read(&mut [0; 1024]);
    }
}

/// Bytes of a generator with this seed; every fourth time behind something that looks right.
fn noise(port: u16, seed: u64) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes: Vec<u8> = match seed % 4 {
        // The head of a TLS record with a client's greeting.
        1 => vec![22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3],
        // A startup message of PostgreSQL.
        2 => vec![0, 0, 4, 0, 0, 3, 0, 0],
        3 => b"POST /v1/switchover HTTP/1.1\r\n".to_vec(),
        _ => Vec::new(),
    };
    for _ in 0..=(seed * 97) % 3000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.push(state as u8);
    }
    say(port, &bytes);
}

/// What each kind of port could choke on.
fn special(kind: Kind) -> Vec<Vec<u8>> {
    let mut all = vec![
        // TLS: the longest record there is, one that is too long, an alert, records without content.
        [&[22, 3, 1, 64, 0][..], &[1; 16384]].concat(),
        [&[22, 3, 1, 255, 255][..], &[1; 4096]].concat(),
        vec![21, 3, 3, 0, 2, 2, 40],
        [22, 3, 3, 0, 0].repeat(2000),
        vec![0; 65536],
        vec![255; 65536],
    ];
    match kind {
        Kind::Api | Kind::Coordinator => {
            all.push(b"GET /health HTTP/1.0\r\n\r\n".to_vec());
            all.push([b"GET /".to_vec(), vec![b'a'; 1 << 20]].concat());
            all.push(b"x: y\r\n".repeat(20_000));
        }
        Kind::Proxy => {
            // A startup message that claims two gigabytes, one without end, many requests for TLS, a cancel of a key
            // that nobody has, a parameter without its end.
            all.push(vec![0x7F, 0xFF, 0xFF, 0xFF, 0, 3, 0, 0]);
            all.push([&[0, 0, 0x27, 0x10, 0, 3, 0, 0][..], &[b'u'; 5000]].concat());
            all.push([0, 0, 0, 8, 4, 210, 22, 47].repeat(5000));
            all.push(vec![0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 1, 0, 0, 0, 2]);
            all.push([&[0, 0, 0, 20, 0, 3, 0, 0][..], b"user\0postgre"].concat());
        }
    }
    all
}

/// Abrupt ends: the connection is reset in the middle of a message.
fn reset(port: u16) {
    for _ in 0..50 {
        if let Some(mut stream) = connect(port) {
            let _ = stream.write_all(&[22, 3, 1]);
            let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
    }
}

/// Hundreds of connections that say nothing or a byte now and then; the most descriptors that a daemon had meanwhile.
fn flood_and_slow(c: &Cluster, port: u16) -> Option<(String, usize)> {
    let mut open: Vec<TcpStream> = (0..FLOOD).filter_map(|_| connect(port)).collect();
    for (number, stream) in open.iter_mut().enumerate().filter(|(n, _)| n % 3 == 0) {
        let _ = stream.write_all(if number % 2 == 0 { &[22] } else { b"G" });
    }
    let began = Instant::now();
    let mut peak = None;
    while began.elapsed() < Duration::from_secs(2) {
        for stream in open.iter_mut().step_by(3) {
            let _ = stream.write_all(&[3]);
        }
        let most = daemons(c)
            .into_iter()
            .map(|(name, size)| (name, size.fds))
            .max_by_key(|(_, fds)| *fds);
        peak = peak.max(most);
        // While they all hang there, whoever is meant to be let in is. On a busy machine that may take a second try.
        let deadline = Instant::now() + LET_IN_MAX;
        loop {
            let status = c.craton_once(&["--json", "status"]);
            if status.status.success() {
                break;
            }
            if Instant::now() > deadline {
                c.expect_ok(&status, "craton status during the flood");
            }
        }
    }
    peak
}

#[derive(Clone, Copy, Debug)]
struct Size {
    rss_kib: u64,
    fds: usize,
}

/// Memory and descriptors of every daemon, by its pid file.
fn daemons(c: &Cluster) -> BTreeMap<String, Size> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(c.dir.join("run")).unwrap().flatten() {
        let path = entry.path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some(name) = name.strip_suffix(".pid") else {
            continue;
        };
        let id = std::fs::read_to_string(&path).unwrap_or_default();
        let id: serde_json::Value = serde_json::from_str(&id).unwrap_or_default();
        let process = Path::new("/proc").join(id["pid"].to_string());
        let Ok(status) = std::fs::read_to_string(process.join("status")) else {
            continue;
        };
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let rss_kib = rss
            .and_then(|l| l.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        let fds = std::fs::read_dir(process.join("fd")).map_or(0, Iterator::count);
        found.insert(name.to_owned(), Size { rss_kib, fds });
    }
    assert!(found.len() >= 5, "{found:?}");
    found
}

/// Everything that strangers held is given back within the longest of the time-outs.
fn settled(c: &Cluster, before: &BTreeMap<String, Size>) {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let now = daemons(c);
        let grown: Vec<String> = now
            .iter()
            .filter_map(|(name, now)| {
                let was = before.get(name)?;
                let too_much = now.fds > was.fds + FD_GROWTH_MAX
                    || now.rss_kib > was.rss_kib + RSS_GROWTH_MAX_KIB;
                too_much.then(|| format!("{name}: {was:?} -> {now:?}"))
            })
            .collect();
        if grown.is_empty() {
            eprintln!("before {before:?}\nafter  {now:?}");
            return;
        }
        assert!(
            Instant::now() < deadline,
            "daemons keep what strangers cost: {grown:?}"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn log_bytes(c: &Cluster) -> u64 {
    let mut files = Vec::new();
    files_below(&c.dir.join("log"), &mut files);
    files
        .iter()
        .filter_map(|f| Some(std::fs::metadata(f).ok()?.len()))
        .sum()
}
