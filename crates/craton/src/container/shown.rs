//! Where people and scripts of the old stack look what was set: `/usr/local/etc/pgpool.conf` and
//! `$PGDATA/postgresql.conf`. Nothing reads what is written here.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use super::entry::Facts;
use super::environment::{Environment, configs};
use super::plan::{NODE_DIR, backends};

/// Where the old image had it.
const POOL_CONF: &str = "/usr/local/etc/pgpool.conf";
/// Between two looks whether the data directory is there, and still says what was set: a clone or a rewind brings the
/// leader's file.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);
/// Begins and ends what is written into `postgresql.conf`. Comments alone: the file goes with every clone, and what is
/// set for one node must not hold for another.
const BLOCK_BEGINS: &str =
    "# CONFIGS of this container, set in ../conf/postgresql.conf, which goes over this file:";
const BLOCK_ENDS: &str = "# End of CONFIGS.";

const HEAD: &str = "\
# Written at each start from BACKENDS and CONFIGS, for those who look here. Nothing reads it: what the proxy goes by is
# in /run/craton/craton.toml, and its log says what each of these settings means there.
";

/// A value as pgpool writes it: numbers and words of switches plain, all else in quotes.
fn value(text: &str) -> String {
    let word = |t: &str| matches!(t, "on" | "off" | "true" | "false");
    if text.parse::<f64>().is_ok() || word(text) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}

fn is_password(name: &str) -> bool {
    name.ends_with("password")
}

/// The pool's file. No password is in it.
fn pool_conf(env: &Environment) -> Result<String, String> {
    let mut text = HEAD.to_owned();
    for b in backends(env)? {
        let id = b.id;
        let _ = writeln!(text, "backend_hostname{id} = {}", value(&b.host));
        let _ = writeln!(text, "backend_port{id} = {}", b.port);
        let _ = writeln!(text, "backend_weight{id} = {}", b.weight);
    }
    for (name, set) in configs(env)? {
        let set = if is_password(&name) {
            "(not shown)"
        } else {
            &set
        };
        let _ = writeln!(text, "{name} = {}", value(set));
    }
    Ok(text)
}

/// Writes the pool's file.
pub fn write_pool_conf(env: &Environment) -> anyhow::Result<()> {
    let text = pool_conf(env).map_err(anyhow::Error::msg)?;
    let path = Path::new(POOL_CONF);
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {POOL_CONF}"))
}

/// `postgresql.conf` with what `CONFIGS` set at its end, in the place of what an earlier start put there.
fn with_block(text: &str, set: &[(String, String)]) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in text.lines() {
        match line {
            BLOCK_BEGINS => inside = true,
            BLOCK_ENDS => inside = false,
            _ if inside => {}
            _ => {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    if set.is_empty() {
        return kept;
    }
    let _ = writeln!(kept, "{BLOCK_BEGINS}");
    for (name, set) in set.iter().filter(|(name, _)| !is_password(name)) {
        let _ = writeln!(kept, "#   {name} = {}", value(set));
    }
    let _ = writeln!(kept, "{BLOCK_ENDS}");
    kept
}

/// Keeps the block in `postgresql.conf` while the container runs.
pub async fn keep_postgresql_conf(facts: Arc<Facts>) {
    // Wrong ones stopped the container before.
    let set = configs(&facts.env).unwrap_or_default();
    let mut said = String::new();
    loop {
        if let Err(error) = keep(Path::new(NODE_DIR), &set) {
            let text = format!("{error:#}");
            if text != said {
                tracing::warn!("CONFIGS are not shown in the data directory: {text}");
                said = text;
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn keep(dir: &Path, set: &[(String, String)]) -> anyhow::Result<()> {
    let path = dir.join("data/postgresql.conf");
    // The agent writes its own file for data that it runs; others are not touched.
    if !dir.join("conf/postgresql.conf").exists() || !path.exists() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let wanted = with_block(&text, set);
    if wanted == text {
        return Ok(());
    }
    craton_trust::files::write_secret(&path, &wanted)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::environment::Kind;
    use super::*;

    #[test]
    fn settings_are_there_and_passwords_are_not() {
        let all = [
            ("BACKENDS", "0:pgmaster:5432:1,3:pgslave3::::"),
            (
                "CONFIGS",
                "num_init_children)12|max_pool)13|log_line_prefix)%t|health_check_password)hush",
            ),
            ("CONFIGS_DELIMITER_SYMBOL", "|"),
            ("CONFIGS_ASSIGNMENT_SYMBOL", ")"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let env = Environment::gather(Kind::Proxy, all, |_| Err("no".into())).unwrap();
        let text = pool_conf(&env).unwrap();
        let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                "backend_hostname0 = 'pgmaster'",
                "backend_port0 = 5432",
                "backend_weight0 = 1",
                "backend_hostname3 = 'pgslave3'",
                "backend_port3 = 5432",
                "backend_weight3 = 1",
                "num_init_children = 12",
                "max_pool = 13",
                "log_line_prefix = '%t'",
                "health_check_password = '(not shown)'",
            ]
        );
    }

    #[test]
    fn the_block_is_comments_and_is_replaced() {
        let set = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            let owned = pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            owned.collect()
        };
        let first = with_block(
            "a = 1\n",
            &set(&[("listen_addresses", "some_host"), ("n", "55")]),
        );
        assert_eq!(
            first,
            format!(
                "a = 1\n{BLOCK_BEGINS}\n#   listen_addresses = 'some_host'\n#   n = 55\n{BLOCK_ENDS}\n"
            )
        );
        let leaders = with_block(&first, &set(&[("m", "on")]));
        assert_eq!(
            leaders,
            format!("a = 1\n{BLOCK_BEGINS}\n#   m = on\n{BLOCK_ENDS}\n")
        );
        assert_eq!(with_block(&leaders, &[]), "a = 1\n");
    }

    #[test]
    fn data_that_craton_does_not_run_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("data")).unwrap();
        std::fs::write(at("data/postgresql.conf"), "a = 1\n").unwrap();
        let set = [("m".to_owned(), "on".to_owned())];
        keep(dir.path(), &set).unwrap();
        assert_eq!(
            std::fs::read_to_string(at("data/postgresql.conf")).unwrap(),
            "a = 1\n"
        );
        std::fs::create_dir(at("conf")).unwrap();
        std::fs::write(at("conf/postgresql.conf"), "").unwrap();
        keep(dir.path(), &set).unwrap();
        let text = std::fs::read_to_string(at("data/postgresql.conf")).unwrap();
        assert!(text.contains("#   m = on"), "{text}");
    }
}
