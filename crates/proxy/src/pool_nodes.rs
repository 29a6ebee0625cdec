//! `SHOW pool_nodes`, as pgpool-II 3.7 answers it: dashboards, probes and fingers know it.

use craton_wire::backend::put_command_complete;
use craton_wire::frame::{put_cstr, take_cstr, write};

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
            target.map_or(0, |t| t.behind_bytes()).to_string(),
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

/// True for what follows the name in a Parse, where the text is that statement.
pub fn is_parsed(rest: &[u8]) -> bool {
    take_cstr(rest).is_some_and(|(text, _)| is_asked(text))
}

/// What follows the name in a Parse of a statement that any server answers with the same rows: a driver that prepares
/// everything gets them in this way, as they were when it did.
pub fn as_parse(configured: &[PoolNode], routes: &Routes) -> Vec<u8> {
    let literal = |field: &String| format!("'{}'::text", field.replace('\'', "''"));
    let rows: Vec<String> = rows(configured, routes)
        .iter()
        .map(|row| {
            format!(
                "({})",
                row.iter().map(literal).collect::<Vec<_>>().join(", ")
            )
        })
        .collect();
    let columns = COLUMNS.join(", ");
    let text = if rows.is_empty() {
        let none: Vec<String> = COLUMNS.iter().map(|c| format!("''::text AS {c}")).collect();
        format!("SELECT {} WHERE false", none.join(", "))
    } else {
        format!(
            "SELECT * FROM (VALUES {}) AS pool_nodes ({columns})",
            rows.join(", ")
        )
    };
    let mut rest = Vec::new();
    put_cstr(&mut rest, text.as_bytes());
    // No parameter has a type given.
    rest.extend_from_slice(&0_i16.to_be_bytes());
    rest
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
    fn prepared_it_is_a_select_of_the_same_rows() {
        assert!(is_parsed(b"show pool_nodes\0\0\0"));
        assert!(!is_parsed(b"select 1\0\0\0") && !is_parsed(b"show pool_nodes"));
        let node = PoolNode {
            id: 7,
            host: "o'b".to_owned(),
            port: 1,
            weight: 1.0,
        };
        let text = String::from_utf8(as_parse(&[node], &Routes::for_test("b", &[]))).unwrap();
        assert!(
            text.starts_with(
                "SELECT * FROM (VALUES ('7'::text, 'o''b'::text, '1'::text, 'down'::text"
            ),
            "{text}"
        );
        assert!(text.ends_with("replication_delay)\0\0\0"), "{text}");
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

    #[test]
    fn the_delay_is_what_a_standby_has_not_replayed() {
        use craton_core::topology::{MemberRole, Topology, TopologyMember};
        use craton_core::{Lsn, MemberId, Term};
        let member = |id: &str, role, lsn: u64, replay_lsn: Option<u64>| TopologyMember {
            id: MemberId::new(id).unwrap(),
            host: id.to_owned(),
            port: 1,
            api: String::new(),
            role,
            timeline: None,
            lsn: Some(Lsn(lsn)),
            replay_lsn: replay_lsn.map(Lsn),
            streaming: role == MemberRole::Standby,
            noload: false,
        };
        let topology = Topology {
            cluster: "c".to_owned(),
            system_id: None,
            term: Term(1),
            revision: 1,
            writable: Some(MemberId::new("a").unwrap()),
            hold: false,
            members: vec![
                member("a", MemberRole::Leader, 5000, None),
                member("b", MemberRole::Standby, 5000, Some(4100)),
                member("c", MemberRole::Standby, 4990, None),
                // Heard of a moment after the leader was.
                member("d", MemberRole::Standby, 5001, Some(5001)),
            ],
        };
        let delays: Vec<String> = rows(&[], &Routes::of_topology(&topology))
            .iter()
            .map(|r| format!("{} {}", r[1], r[8]))
            .collect();
        assert_eq!(delays, ["a 0", "b 900", "c 10", "d 0"]);
    }
}
