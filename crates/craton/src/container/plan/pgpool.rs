//! pgpool's settings, as the proxy understands them.

use craton_proxy::ProxyConfig;

use super::{POSTGRES_PORT, Plan};

/// Clients that the old balancer served at once where nobody chose (`num_init_children`).
const CHILDREN_DEFAULT: u32 = 32;

/// The largest pool that follows from `num_init_children`. PostgreSQL has room for 100 connections where nobody chose
/// (`max_connections`), three of these for superusers alone. Agents, look-ups of passwords, other users' pools and whoever
/// comes past the proxy need some, too.
const POOL_SIZE_MAX: u32 = 80;

/// Where the numbers come from.
const FROM: Option<&str> = Some("CONFIGS");

/// Translates `CONFIGS` of the old balancer. The last of several settings of one name counts, as in `pgpool.conf`.
pub(super) fn apply(plan: &mut Plan, configs: &[(String, String)]) -> Result<(), String> {
    let mut port = (POSTGRES_PORT, None);
    let mut children = None;
    for (at, (name, value)) in configs.iter().enumerate() {
        if configs.iter().skip(at + 1).any(|(later, _)| later == name) {
            continue;
        }
        match name.as_str() {
            "port" => port = (port_of(value)?, FROM),
            "num_init_children" => children = Some(number(name, value)?.max(1)),
            _ => translated(plan, name, value)?,
        }
    }
    pool(plan, children);
    let (port, from) = port;
    let reads = port.saturating_add(1);
    plan.set("listen", format!("0.0.0.0:{port}"), from);
    plan.set("listen_read", format!("0.0.0.0:{reads}"), from);
    plan.notes.push(format!(
        "port {port} leads to the primary, reads included; port {reads} spreads reads over the standbys: connect there what only reads"
    ));
    Ok(())
}

fn port_of(value: &str) -> Result<u16, String> {
    let port = value.parse::<u16>().ok();
    // The next one is for reads.
    port.filter(|p| (1..u16::MAX).contains(p))
        .ok_or_else(|| format!("CONFIGS: port = {value}: a port from 1 to 65534 is expected"))
}

fn number(name: &str, value: &str) -> Result<u32, String> {
    value.parse().map_err(|_| {
        format!("CONFIGS: {name} = {value}: a whole number from 0 to 4294967295 is expected")
    })
}

/// In pgpool so many clients are served at once, each by a process with a server connection, and the next wait until
/// one of these leaves. Here a client needs a server connection only while its transaction runs: their number is what the
/// old one limited, and clients that have none wait for one without being refused.
fn pool(plan: &mut Plan, children: Option<u32>) {
    let from = FROM.filter(|_| children.is_some());
    let wanted = children.unwrap_or(CHILDREN_DEFAULT);
    let size = wanted.min(POOL_SIZE_MAX);
    plan.set("pool_size", i64::from(size), from);
    let clients = u32::try_from(ProxyConfig::default().clients_max).unwrap_or(u32::MAX);
    if wanted > clients {
        plan.set("clients_max", i64::from(wanted), from);
    }
    if children.is_none() {
        return;
    }
    let bound = if size < wanted {
        ", so that pools leave room among the 100 that PostgreSQL's default max_connections allows"
    } else {
        ""
    };
    plan.notes.push(format!(
        "CONFIGS: num_init_children = {wanted}: each user has up to {size} connections to a database of a server{bound}, unless CRATON_PROXY_POOL_SIZE says otherwise; up to {} clients may be connected and take turns",
        clients.max(wanted)
    ));
}

/// A setting of pgpool: what it is here, or why it is nothing.
fn translated(plan: &mut Plan, name: &str, value: &str) -> Result<(), String> {
    let time = match name {
        "client_idle_limit" => Some("client_idle_ms"),
        "child_life_time" => Some("server_idle_ms"),
        "connection_life_time" => Some("server_lifetime_ms"),
        "authentication_timeout" => Some("login_timeout_ms"),
        _ => None,
    };
    if let Some(key) = time {
        let seconds = number(name, value)?;
        // In pgpool 0 means for ever. Of these only a silent client may be so here.
        if seconds > 0 || key == "client_idle_ms" {
            plan.set(key, i64::from(seconds) * 1000, FROM);
        } else {
            plan.notes.push(format!(
                "CONFIGS: {name} = 0 changes nothing: there is always a limit, {key}"
            ));
        }
        return Ok(());
    }
    let why = match name {
        "max_pool" => {
            "in Pgpool-II each child process keeps so many connections, for as many users and databases; here every user and database has a pool of its own, whose size follows num_init_children"
        }
        n if n.starts_with("health_check") || n.starts_with("sr_check") => {
            "the nodes push who leads; nothing is polled"
        }
        n if n.starts_with("fail") || n.starts_with("search_primary") => {
            "Craton's agents fail over; the proxy follows"
        }
        n if n.starts_with("wd_") || n.contains("watchdog") => {
            "proxies have no state to agree on; run as many as you like"
        }
        n if n.starts_with("pcp_") => "the pcp commands work inside the container",
        n if n.contains("load_balance") || n.starts_with("black_") || n.starts_with("white_") => {
            "reads go to standbys through the port for reads"
        }
        n if n.contains("memory_cache") || n.starts_with("memqcache") => "results are not cached",
        _ => "it has no counterpart",
    };
    plan.notes
        .push(format!("CONFIGS: {name} changes nothing: {why}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(configs: &[(&str, &str)]) -> (ProxyConfig, Plan) {
        let owned: Vec<(String, String)> = configs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let mut plan = Plan::new("proxy");
        apply(&mut plan, &owned).unwrap();
        let text = plan.text();
        let mut file: toml::Table = toml::from_str(&text).unwrap();
        let config = file.remove("proxy").unwrap().try_into().unwrap();
        (config, plan)
    }

    fn said<'p>(plan: &'p Plan, about: &str) -> &'p str {
        let mut fit = plan.notes.iter().filter(|n| n.contains(about));
        let note = fit.next().unwrap_or_else(|| panic!("{:?}", plan.notes));
        assert_eq!(fit.next(), None, "once");
        note
    }

    #[test]
    fn the_stock_line_serves_as_many_as_the_servers_can() {
        let (config, plan) = planned(&[("num_init_children", "250"), ("max_pool", "4")]);
        assert_eq!((config.pool_size, config.clients_max), (80, 10_000));
        let note = said(&plan, "num_init_children = 250");
        assert!(note.contains("up to 80 connections"), "{note}");
        assert!(note.contains("CRATON_PROXY_POOL_SIZE"), "{note}");
        let note = said(&plan, "max_pool changes nothing");
        assert!(note.contains("follows num_init_children"), "{note}");
    }

    #[test]
    fn the_number_of_clients_at_work_is_the_old_one() {
        for (children, pool_size, clients_max) in [
            (None, 32, 10_000),
            (Some("12"), 12, 10_000),
            (Some("80"), 80, 10_000),
            (Some("81"), 80, 10_000),
            (Some("20000"), 80, 20_000),
            (Some("0"), 1, 10_000),
        ] {
            let set: Vec<_> = children
                .map(|n| ("num_init_children", n))
                .into_iter()
                .collect();
            let (config, plan) = planned(&set);
            let is = (config.pool_size, config.clients_max);
            assert_eq!(is, (pool_size, clients_max), "{children:?}");
            let told = plan.notes.iter().any(|n| n.contains("num_init_children"));
            assert_eq!(told, children.is_some());
        }
        // A number that is not bounded is no reason to name another variable.
        let (_, plan) = planned(&[("num_init_children", "80")]);
        assert!(!said(&plan, "num_init_children").contains("leave room"));
    }

    #[test]
    fn the_port_for_reads_is_named_whatever_is_set() {
        let (_, plan) = planned(&[]);
        assert!(said(&plan, "reads over the standbys").contains("port 5433"));
        let (config, plan) = planned(&[("load_balance_mode", "on"), ("port", "9999")]);
        assert!(said(&plan, "reads over the standbys").contains("port 10000"));
        assert_eq!(config.listen, "0.0.0.0:9999");
        assert_eq!(config.listen_read.as_deref(), Some("0.0.0.0:10000"));
    }

    #[test]
    fn no_limit_is_not_the_shortest_one() {
        let (config, plan) = planned(&[
            ("connection_life_time", "0"),
            ("child_life_time", "0"),
            ("authentication_timeout", "0"),
            ("client_idle_limit", "0"),
        ]);
        let default = ProxyConfig::default();
        assert_eq!(config.server_lifetime_ms, default.server_lifetime_ms);
        assert_eq!(config.server_idle_ms, default.server_idle_ms);
        assert_eq!(config.login_timeout_ms, default.login_timeout_ms);
        assert_eq!(config.client_idle_ms, 0);
        said(&plan, "connection_life_time = 0 changes nothing");
        let (config, _) = planned(&[("connection_life_time", "60")]);
        assert_eq!(config.server_lifetime_ms, 60_000);
    }

    #[test]
    fn the_last_of_several_counts() {
        let twice = [("num_init_children", "7"), ("num_init_children", "9")];
        assert_eq!(planned(&twice).0.pool_size, 9);
    }

    #[test]
    fn what_is_no_number_is_said_with_its_name() {
        for (name, value) in [
            ("num_init_children", "many"),
            ("client_idle_limit", "-1"),
            ("child_life_time", "5min"),
            ("port", "65535"),
        ] {
            let mut plan = Plan::new("proxy");
            let error = apply(&mut plan, &[(name.into(), value.into())]).unwrap_err();
            let begins = format!("CONFIGS: {name} = {value}: ");
            assert!(
                error.starts_with(&begins) && error.contains("expected"),
                "{error}"
            );
        }
    }
}
