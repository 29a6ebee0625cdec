//! Who may do what at the control APIs: one table.
//!
//! A proxy learns where the members are and nothing else; a witness that, and asks to be taken in; a backup daemon may also look; only operators change
//! things. Agents may do everything: their hosts hold the data, the authority's key and the superuser's password
//! anyway. What is not in the table is for agents and operators.

use axum::http::Method;
use craton_trust::Role;

/// A rule: the beginning of a path, the method (any if none), and the roles.
struct Rule {
    prefix: &'static str,
    method: Option<Method>,
    roles: &'static [Role],
}

const fn rule(prefix: &'static str, method: Option<Method>, roles: &'static [Role]) -> Rule {
    Rule {
        prefix,
        method,
        roles,
    }
}

/// The first rule that fits counts.
const RULES: [Rule; 10] = [
    rule("/v1/topology", Some(Method::GET), &Role::ALL),
    rule("/v1/authority", Some(Method::GET), &Role::ALL),
    // Between agents alone: a promise of a member that another's leadership rests on.
    rule("/v1/promise", None, &[Role::Node]),
    // A backup daemon that is a synchronous copy reports; seals and WAL are for agents alone.
    rule(
        "/v1/receivers",
        Some(Method::POST),
        &[Role::Node, Role::Backup],
    ),
    rule("/v1/receiver/", None, &[Role::Node]),
    // A standby copies the leader's logical slots.
    rule("/v1/slots", None, &[Role::Node]),
    // A witness asks to be taken in.
    rule(
        "/v1/members/join",
        Some(Method::POST),
        &[Role::Node, Role::Witness, Role::Operator],
    ),
    // A new certificate for whoever shows the present one.
    rule("/v1/certificate", Some(Method::POST), &Role::ALL),
    rule(
        "/v1/",
        Some(Method::GET),
        &[Role::Node, Role::Operator, Role::Backup],
    ),
    rule("/v1/", None, &[Role::Node, Role::Operator]),
];

/// True if a holder of this role may ask for this.
pub fn may(role: Role, method: &Method, path: &str) -> bool {
    RULES
        .iter()
        .find(|r| {
            let below = path.strip_prefix(r.prefix);
            let fits = below.is_some_and(|rest| {
                rest.is_empty() || rest.starts_with('/') || r.prefix.ends_with('/')
            });
            fits && r.method.as_ref().is_none_or(|m| m == method)
        })
        .is_some_and(|r| r.roles.contains(&role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_open_what_they_need_and_nothing_else() {
        let opens = |method: &Method, path: &str| -> String {
            Role::ALL
                .into_iter()
                .filter(|r| may(*r, method, path))
                .map(|r| r.as_str().chars().next().unwrap())
                .collect()
        };
        let (get, post) = (Method::GET, Method::POST);
        for (method, path, who) in [
            (&get, "/v1/topology", "npbwo"),
            (&get, "/v1/topology/stream", "npbwo"),
            (&get, "/v1/topologyx", "nbo"),
            (&post, "/v1/topology", "no"),
            (&get, "/v1/status", "nbo"),
            (&post, "/v1/switchover", "no"),
            (&Method::DELETE, "/v1/members/a", "no"),
            (&post, "/v1/promise", "n"),
            (&get, "/v1/promise", "n"),
            (&post, "/v1/members/join", "nwo"),
            (&post, "/v1/members/remove", "no"),
            (&post, "/v1/receivers", "nb"),
            (&get, "/v1/receiver", "nbo"),
            (&post, "/v1/receiver/seal", "n"),
            (&get, "/v1/receiver/wal/000000010000000000000001", "n"),
            (&get, "/v1/slots/dbz", "n"),
            (&post, "/v1/certificate", "npbwo"),
            (&get, "/v1/authority", "npbwo"),
            (&post, "/v1/join-tokens", "no"),
            (&get, "/v2/anything", ""),
            (&get, "/", ""),
        ] {
            assert_eq!(opens(method, path), who, "{method} {path}");
        }
    }
}
