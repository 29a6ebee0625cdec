//! What a mutual TLS handshake between two parts costs: wall clock and processor time, beside a bare TCP connection.
//!
//! Run by `make bench-handshake`. Both sides are in one thread of one process, so the processor time is of both.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_types,
    missing_docs,
    reason = "a bench may fail at any line, and prints its result"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use craton_trust::authority::{self, ensure_certificate};
use craton_trust::{Expect, Identity, Role, TlsFiles, Trust};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// So many connections, one after the other.
const ROUNDS: u32 = 2000;

/// Processor time of this process so far.
fn cpu() -> Duration {
    let t = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(t.tv_sec).unwrap(),
        u32::try_from(t.tv_nsec).unwrap(),
    )
}

async fn rounds(
    listener: &TcpListener,
    parts: Option<&(Arc<Trust>, Arc<Trust>)>,
) -> (Duration, Duration) {
    let address = listener.local_addr().unwrap();
    let (began, used) = (Instant::now(), cpu());
    for _ in 0..ROUNDS {
        let accept = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            match parts {
                Some((server, _)) => server
                    .accept(stream)
                    .await
                    .unwrap()
                    .0
                    .write_all(b"x")
                    .await
                    .unwrap(),
                None => stream.write_all(b"x").await.unwrap(),
            }
        };
        let connect = async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let mut byte = [0];
            match parts {
                Some((_, client)) => {
                    let mut stream = client
                        .connect(stream, &Expect::Role(Role::Node))
                        .await
                        .unwrap();
                    stream.read_exact(&mut byte).await.unwrap();
                }
                None => {
                    stream.read_exact(&mut byte).await.unwrap();
                }
            }
        };
        tokio::join!(accept, connect);
    }
    (
        began.elapsed() / ROUNDS,
        cpu().saturating_sub(used) / ROUNDS,
    )
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority::ensure(dir.path(), "c").unwrap();
    let part = |role, name: &str| {
        let files = TlsFiles::in_dir(dir.path(), name);
        ensure_certificate(
            &authority,
            &files,
            &Identity::new("c", role, name).unwrap(),
            &[],
        )
        .unwrap();
        Trust::open(files).unwrap()
    };
    let parts = (part(Role::Node, "a"), part(Role::Proxy, "p"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("{ROUNDS} connections each, both sides in one thread; per connection:");
        println!("| connection | wall clock | processor time of both sides |");
        println!("|---|---|---|");
        for (name, parts) in [("TCP", None), ("mutual TLS 1.3, P-256", Some(&parts))] {
            let (wall, cpu) = rounds(&listener, parts).await;
            println!(
                "| {name} | {:.3} ms | {:.3} ms |",
                wall.as_secs_f64() * 1e3,
                cpu.as_secs_f64() * 1e3
            );
        }
    });
}
