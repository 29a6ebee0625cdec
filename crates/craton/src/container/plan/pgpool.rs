//! pgpool's settings, as the proxy understands them.

use super::Plan;

/// A setting of pgpool: what it is here, or why it is nothing.
pub(super) fn translated(plan: &mut Plan, name: &str, value: &str) -> Result<(), String> {
    let number = || {
        value
            .parse::<i64>()
            .map_err(|_| format!("CONFIGS: {name} = {value} is no number"))
    };
    let ms = || number().map(|s| s.saturating_mul(1000));
    let from = Some("CONFIGS");
    let why = match name {
        "num_init_children" => {
            plan.set("clients_max", number()?.max(1), from);
            return Ok(());
        }
        // In pgpool each process keeps so many connections; here each pool (user, database, server) does.
        "max_pool" => {
            plan.set("pool_size", number()?.max(1), from);
            return Ok(());
        }
        "client_idle_limit" => {
            plan.set("client_idle_ms", ms()?, from);
            return Ok(());
        }
        "child_life_time" => {
            plan.set("server_idle_ms", ms()?.max(1000), from);
            return Ok(());
        }
        "connection_life_time" => {
            plan.set("server_lifetime_ms", ms()?.max(1000), from);
            return Ok(());
        }
        "authentication_timeout" => {
            plan.set("login_timeout_ms", ms()?.max(1000), from);
            return Ok(());
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
