//! `SHOW pool_nodes`, as pgpool-II 3.7 answers it: dashboards, probes and fingers know it.

use craton_wire::backend::put_command_complete;
use craton_wire::frame::{put_cstr, write};

use crate::config::PoolNode;
use crate::routes::{Routes, Target};

/// pgpool's columns.
const COLUMNS: [&str; 9] = [
    "node_id",
    "hostname",
    "port",
    "status",
    "lb_weight",
    "role",
    "select_cnt",
    "load_balance_node",
    "replication_delay",
];

/// The type `text`.
const TEXT_OID: i32 = 25;

/// True for the text of that statement.
pub fn is_asked(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else {
        return false;
    };
    let mut words = text.trim().trim_end_matches(';').split_ascii_whitespace();
    let mut next = |word: &str| words.next().is_some_and(|w| w.eq_ignore_ascii_case(word));
    next("show") && next("pool_nodes") && words.next().is_none()
}

/// One row for each server that is known, by its number.
fn rows(configured: &[PoolNode], routes: &Routes) -> Vec<[String; 9]> {
    let mut nodes: Vec<PoolNode> = configured.to_vec();
    let is = |n: &PoolNode, t: &Target| n.host == t.host && n.port == t.port;
    for target in routes.targets() {
        if !nodes.iter().any(|n| is(n, target)) {
            nodes.push(PoolNode {
                id: nodes.iter().map(|n| n.id + 1).max().unwrap_or(0),
                host: target.host.clone(),
                port: target.port,
                weight: 1.0,
            });
        }
    }
    nodes.sort_by_key(|n| n.id);
    let sum: f64 = nodes.iter().map(|n| n.weight).sum();
    let row = |n: &PoolNode| {
        let target = routes.targets().find(|t| is(n, t));
        let primary = routes.primary.as_deref().is_some_and(|t| is(n, t));
        let weight = if sum > 0.0 { n.weight / sum } else { 0.0 };
        [
            n.id.to_string(),
            n.host.clone(),
            n.port.to_string(),
            if target.is_some() { "up" } else { "down" }.to_owned(),
            format!("{weight:.6}"),
            if primary { "primary" } else { "standby" }.to_owned(),
            "0".to_owned(),
            "false".to_owned(),
            "0".to_owned(),
        ]
    };
    nodes.iter().map(row).collect()
}

/// Appends the whole answer but ReadyForQuery.
pub fn put_answer(out: &mut Vec<u8>, configured: &[PoolNode], routes: &Routes) {
    let count = |n: usize| i16::try_from(n).unwrap_or(i16::MAX).to_be_bytes();
    write(out, b'T', |out| {
        out.extend_from_slice(&count(COLUMNS.len()));
        for name in COLUMNS {
            put_cstr(out, name.as_bytes());
            // No table, no column; text of any length, in text format.
            out.extend_from_slice(&0_i32.to_be_bytes());
            out.extend_from_slice(&0_i16.to_be_bytes());
            out.extend_from_slice(&TEXT_OID.to_be_bytes());
            out.extend_from_slice(&(-1_i16).to_be_bytes());
            out.extend_from_slice(&(-1_i32).to_be_bytes());
            out.extend_from_slice(&0_i16.to_be_bytes());
        }
    });
    for row in rows(configured, routes) {
        write(out, b'D', |out| {
            out.extend_from_slice(&count(row.len()));
            for field in row {
                let len = i32::try_from(field.len()).unwrap_or(i32::MAX);
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(field.as_bytes());
            }
        });
    }
    put_command_complete(out, "SHOW");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statement_in_its_spellings() {
        for asked in [
            "show pool_nodes",
            " SHOW  Pool_Nodes ; ",
            "show\npool_nodes;",
        ] {
            assert!(is_asked(asked.as_bytes()), "{asked}");
        }
        for other in [
            "show pool_nodes x",
            "show",
            "select 1",
            "show pool_nodes; select 1",
            "",
        ] {
            assert!(!is_asked(other.as_bytes()), "{other}");
        }
        assert!(!is_asked(b"\xff"));
    }

    #[test]
    fn configured_nodes_keep_their_numbers_and_others_follow() {
        let node = |id, host: &str, weight| PoolNode {
            id,
            host: host.to_owned(),
            port: 1,
            weight,
        };
        let routes = Routes::for_test("b", &["d"]);
        let rows = rows(&[node(3, "a", 1.0), node(1, "b", 2.0)], &routes);
        let seen: Vec<String> = rows
            .iter()
            .map(|r| format!("{} {} {} {} {}", r[0], r[1], r[3], r[4], r[5]))
            .collect();
        assert_eq!(
            seen,
            [
                "1 b up 0.500000 primary",
                "3 a down 0.250000 standby",
                "4 d up 0.250000 standby"
            ]
        );
    }
}
