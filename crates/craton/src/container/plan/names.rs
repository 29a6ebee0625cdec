//! Who a node is: its member's name, and its name and number in the old stack.

use std::net::IpAddr;

use craton_core::MemberId;
use serde::{Deserialize, Serialize};

use super::super::environment::Environment;
use super::others;

/// The largest number of a node: what PostgreSQL's `integer` holds, as in `repmgr.nodes`.
pub const ID_MAX: i64 = 2_147_483_647;

/// Who a node is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeNames {
    /// How others reach it.
    pub host: String,
    /// The member of the cluster.
    pub member: MemberId,
    /// For people of the old stack.
    pub node_name: String,
    /// For people of the old stack.
    pub node_id: u32,
    /// Preference when a leader is elected.
    pub priority: u32,
}

/// A member's name out of a host's: lower case, what a name may not hold becomes `-`. Of a name with a domain it is the
/// first part; an address is none of that, and all of it counts.
pub fn member_of(host: &str) -> Result<MemberId, String> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let text = match bare.parse() {
        Ok(IpAddr::V4(address)) => address.to_string(),
        // In full: `::1` and `1::` are not the same.
        Ok(IpAddr::V6(address)) => address.segments().map(|s| format!("{s:x}")).join("-"),
        Err(_) => host.split('.').next().unwrap_or(host).to_owned(),
    };
    let name: String = text
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(MemberId::LEN_MAX)
        .collect();
    MemberId::new(name.trim_matches('-')).map_err(|e| {
        format!(
            "the network name \"{host}\" makes no member's name: {e}; set CLUSTER_NODE_NETWORK_NAME"
        )
    })
}

/// A note where another host that this node is told of would be the same member: two names that differ only behind their
/// first dot.
pub(super) fn same_member(env: &Environment, names: &NodeNames) -> Option<String> {
    let same = |host: &String| member_of(host).is_ok_and(|m| m == names.member);
    let host = others(env, &names.host).into_iter().find(same)?;
    Some(format!(
        "{host} would be the member {} as well, like this node ({}): where it is another node, set CLUSTER_NODE_NETWORK_NAME so that the first parts of their names differ",
        names.member, names.host
    ))
}

/// The number of a node: the digits at the end of its name and 1000.
pub fn id_from_name(name: &str) -> Option<u32> {
    let start = name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let digits = name.get(start..)?;
    let id = digits.parse::<u32>().ok()?.checked_add(1000)?;
    (i64::from(id) <= ID_MAX).then_some(id)
}

impl NodeNames {
    /// From the environment, the host's name, and the member whose data the volume holds.
    pub fn of(
        env: &Environment,
        hostname: &str,
        recorded: Option<MemberId>,
    ) -> Result<Self, String> {
        let host = env.or("CLUSTER_NODE_NETWORK_NAME", hostname).to_owned();
        let member = match recorded {
            Some(member) => member,
            None => member_of(&host)?,
        };
        let node_name = env.or("NODE_NAME", &host).to_owned();
        let node_id = match env.number::<u32>("NODE_ID")? {
            Some(id) => id,
            None => id_from_name(&node_name).unwrap_or(1000),
        };
        let priority = env.number::<i64>("NODE_PRIORITY")?.unwrap_or(100);
        Ok(Self {
            host,
            member,
            node_name,
            node_id,
            priority: u32::try_from(priority.max(0)).unwrap_or(u32::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::environment::{Kind, tests::env};
    use super::*;

    #[test]
    fn numbers_of_nodes() {
        assert_eq!(id_from_name("node-45"), Some(1045));
        assert_eq!(id_from_name("node-102"), Some(1102));
        assert_eq!(id_from_name("node1"), Some(1001));
        assert_eq!(id_from_name("node"), None);
        assert_eq!(id_from_name("n99999999999"), None);
        assert_eq!(id_from_name("n2147483647"), None);
        let id = |variables: &[(&str, &str)]| {
            NodeNames::of(&env(Kind::Node, variables), "h", None)
                .unwrap()
                .node_id
        };
        assert_eq!(id(&[("NODE_NAME", "node-102")]), 1102);
        assert_eq!(id(&[("NODE_NAME", "node-102"), ("NODE_ID", "7")]), 7);
    }

    #[test]
    fn an_address_is_not_cut_at_its_first_dot() {
        for (host, member) in [
            ("10.0.0.1", "10-0-0-1"),
            ("10.0.0.2", "10-0-0-2"),
            ("::1", "0-0-0-0-0-0-0-1"),
            ("1::", "1-0-0-0-0-0-0-0"),
            ("[2001:DB8::1]", "2001-db8-0-0-0-0-0-1"),
            (
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                "ffff-ffff-ffff-ffff-ffff-ffff-ffff-ffff",
            ),
            ("pg-1.example.org", "pg-1"),
            ("Pg_Slave.2", "pg-slave"),
        ] {
            assert_eq!(member_of(host).unwrap().as_str(), member, "{host}");
        }
        assert!(member_of("...").is_err());
    }

    #[test]
    fn two_names_that_are_one_member_are_noted() {
        let note = |host: &str, partners: &str| {
            let e = env(Kind::Node, &[("PARTNER_NODES", partners)]);
            let names = NodeNames::of(&e, host, None).unwrap();
            same_member(&e, &names)
        };
        let said = note("pg.a.example", "pg.a.example,pg.b.example").unwrap();
        assert!(
            said.starts_with("pg.b.example would be the member pg"),
            "{said}"
        );
        assert_eq!(note("pg1.example", "pg1.example,pg2.example"), None);
        assert_eq!(note("10.0.0.1", "10.0.0.1,10.0.0.2"), None);
    }
}
