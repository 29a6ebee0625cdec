//! The environment of a container: which variables there are, what they mean here, and their `_FILE` forms.
//!
//! The table in `variables` is the reference (`docs/reference/environment.md`) as well.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

mod variables;

use variables::{CHECK_USER_DEFAULT, IMAGE_ENV};
pub use variables::{REPLICATION_DEFAULT, VARIABLES};

/// Which of the images.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// PostgreSQL and its agent
    Node,
    /// The proxy
    Proxy,
    /// The backup daemon
    Backup,
}

impl Kind {
    /// The word on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Proxy => "proxy",
            Self::Backup => "backup",
        }
    }
}

/// What becomes of a variable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// It counts.
    Used,
    /// It counts, and nothing may show its value.
    Secret,
    /// It is accepted; why it changes nothing.
    Nothing(&'static str),
}

/// A variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// The images that look at it.
    pub kinds: &'static [Kind],
    /// What it is if it is not set.
    pub default: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What becomes of it.
    pub effect: Effect,
}

/// The variables of a container, files read, empty ones left out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

impl Environment {
    /// Takes over what concerns this kind of container. `NAME_FILE` names a file whose content, without the line's end,
    /// is `NAME`.
    pub fn gather(
        kind: Kind,
        all: impl IntoIterator<Item = (String, String)>,
        read: impl Fn(&str) -> Result<String, String>,
    ) -> Result<Self, String> {
        let all: BTreeMap<String, String> = all.into_iter().collect();
        let mut variables = BTreeMap::new();
        for variable in VARIABLES.iter().filter(|v| v.kinds.contains(&kind)) {
            let name = variable.name;
            let file_name = format!("{name}_FILE");
            let of_image = |n: &str, v: &str| {
                let mut set = IMAGE_ENV.iter().filter(|(kinds, ..)| kinds.contains(&kind));
                set.any(|(_, name, value)| *name == n && *value == v)
            };
            let filled = |n: &str| all.get(n).filter(|v| !v.is_empty() && !of_image(n, v));
            let value = match (filled(name), filled(&file_name)) {
                (Some(_), Some(_)) => {
                    return Err(format!(
                        "{name} and {file_name} are both set: set one of the two"
                    ));
                }
                (Some(value), None) => value.clone(),
                (None, Some(path)) => {
                    let text = read(path).map_err(|e| format!("{file_name}: {e}"))?;
                    let text = text.trim_end_matches(['\n', '\r']).to_owned();
                    if text.is_empty() {
                        return Err(format!("{file_name}: {path} is empty"));
                    }
                    text
                }
                (None, None) => continue,
            };
            variables.insert(name.to_owned(), value);
        }
        Ok(Self { variables })
    }

    /// The value, if one is set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// The value, or a default.
    pub fn or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.get(name).unwrap_or(default)
    }

    /// A number, if one is set.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        self.get(name)
            .map(|text| {
                let number = text.trim().parse();
                number.map_err(|_| format!("{name}={text} is no number that fits"))
            })
            .transpose()
    }

    /// A comma separated list, blanks and empty places left out.
    pub fn list(&self, name: &str) -> Vec<String> {
        let text = self.get(name).unwrap_or_default();
        let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
        parts.map(ToOwned::to_owned).collect()
    }

    /// True for 1, true, yes and on.
    pub fn is_on(&self, name: &str) -> bool {
        matches!(
            self.get(name).map(str::to_ascii_lowercase).as_deref(),
            Some("1" | "true" | "yes" | "on")
        )
    }

    /// The old balancer's check user and its password.
    pub fn check_login(&self) -> (&str, &str) {
        let user = self.or("CHECK_USER", CHECK_USER_DEFAULT);
        let said = self.get("CHECK_PASSWORD");
        let password = said.unwrap_or_else(|| self.or("REPLICATION_PASSWORD", REPLICATION_DEFAULT));
        (user, password)
    }

    /// What there is to say about variables that change nothing: each reason once.
    pub fn notes(&self, kind: Kind) -> Vec<String> {
        let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
        for v in VARIABLES.iter().filter(|v| v.kinds.contains(&kind)) {
            let Effect::Nothing(why) = v.effect else {
                continue;
            };
            if self.get(v.name).is_none() {
                continue;
            }
            match reasons.iter_mut().find(|(reason, _)| *reason == why) {
                Some((_, names)) => names.push(v.name),
                None => reasons.push((why, vec![v.name])),
            }
        }
        let note = |(why, names): (&str, Vec<&str>)| match names.as_slice() {
            [one] => format!("{one} changes nothing: {why}"),
            several => format!("{} change nothing: {why}", several.join(", ")),
        };
        reasons.into_iter().map(note).collect()
    }
}

/// True for a name whose value must not go on into the environment of daemons.
pub fn is_secret(name: &str) -> bool {
    let name = name.strip_suffix("_FILE").unwrap_or(name);
    VARIABLES
        .iter()
        .any(|v| v.name == name && v.effect == Effect::Secret)
        || name == "PCP_PASSWORD"
}

/// The page of the reference.
pub fn reference() -> String {
    use std::fmt::Write as _;
    let mut page = String::from(
        "# Environment of the images\n\nGenerated from the code by `make fix`; a test keeps it in step.\n\n\
         Each variable may be given as `NAME_FILE` instead: then its value is the content of that file (Docker's secrets). \
         Settings of Craton itself can be set as well: `CRATON_NODE_…`, `CRATON_PROXY_…`, `CRATON_BACKUP_…`, see [settings](settings.md); \
         they go over what is below. `craton config show --origin` names the variable that a node's setting comes from.\n",
    );
    for (title, kind) in [
        ("`craton/postgis`", Kind::Node),
        ("`craton/proxy`", Kind::Proxy),
        ("`craton/backup`", Kind::Backup),
    ] {
        let _ = write!(
            page,
            "\n## {title}\n\n| variable | default | meaning |\n|---|---|---|\n"
        );
        for v in VARIABLES.iter().filter(|v| v.kinds.contains(&kind)) {
            let meaning = match v.effect {
                Effect::Nothing(why) => format!("Accepted, changes nothing: {why}"),
                _ => v.meaning.to_owned(),
            };
            let _ = writeln!(
                page,
                "| `{}` | {} | {} |",
                v.name,
                v.default,
                meaning.replace('|', "\\|")
            );
        }
    }
    page
}

/// Reads `CONFIGS`: pairs, what separates them, and what stands between name and value. A value may hold the
/// assignment symbol; quotes around it are taken off, as `postgresql.conf` has them.
pub fn configs(env: &Environment) -> Result<Vec<(String, String)>, String> {
    let Some(text) = env.get("CONFIGS") else {
        return Ok(Vec::new());
    };
    let delimiter = env.or("CONFIGS_DELIMITER_SYMBOL", ",");
    let assignment = env.or("CONFIGS_ASSIGNMENT_SYMBOL", ":");
    let mut pairs = Vec::new();
    for pair in text.split(delimiter) {
        if pair.trim().is_empty() {
            continue;
        }
        let (name, value) = pair.split_once(assignment).ok_or_else(|| {
            format!(
                "CONFIGS: \"{}\" has no \"{assignment}\" between name and value (CONFIGS_DELIMITER_SYMBOL is \"{delimiter}\", CONFIGS_ASSIGNMENT_SYMBOL \"{assignment}\")",
                pair.trim()
            )
        })?;
        let name = name.trim().to_ascii_lowercase();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(format!("CONFIGS: \"{name}\" is no name of a setting"));
        }
        pairs.push((name, unquoted(value.trim())));
    }
    Ok(pairs)
}

fn unquoted(value: &str) -> String {
    let inner = value
        .strip_prefix('\'')
        .and_then(|rest| rest.strip_suffix('\''));
    inner.map_or_else(|| value.to_owned(), |inner| inner.replace("''", "'"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a container of this kind makes of these variables.
    pub(crate) fn env(kind: Kind, variables: &[(&str, &str)]) -> Environment {
        let all = variables
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        Environment::gather(kind, all, |path| {
            if path == "/run/secrets/p" {
                Ok("pa:ss, 'w\"\\$rd\n".to_owned())
            } else {
                Err(format!("cannot read {path}"))
            }
        })
        .unwrap()
    }

    #[test]
    fn names_are_unique_for_each_image() {
        for kind in [Kind::Node, Kind::Proxy, Kind::Backup] {
            let mut names: Vec<_> = VARIABLES
                .iter()
                .filter(|v| v.kinds.contains(&kind))
                .map(|v| v.name)
                .collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{kind:?}");
        }
    }

    #[test]
    fn a_file_stands_for_every_variable_with_whatever_is_in_it() {
        let e = env(
            Kind::Node,
            &[("REPLICATION_PASSWORD_FILE", "/run/secrets/p")],
        );
        assert_eq!(e.get("REPLICATION_PASSWORD"), Some("pa:ss, 'w\"\\$rd"));
        let gather = |pairs: &[(&str, &str)]| {
            let all = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
            Environment::gather(Kind::Node, all, |p| Err(format!("cannot read {p}")))
        };
        let both = gather(&[("POSTGRES_DB", "a"), ("POSTGRES_DB_FILE", "/b")]);
        assert!(both.unwrap_err().contains("both set"));
        let missing = gather(&[("POSTGRES_DB_FILE", "/b")]);
        assert_eq!(missing.unwrap_err(), "POSTGRES_DB_FILE: cannot read /b");
        // An empty variable is none, as in compose files that pass on what may be unset.
        assert_eq!(
            gather(&[("POSTGRES_DB", "")]).unwrap().get("POSTGRES_DB"),
            None
        );
    }

    #[test]
    fn configs_with_odd_symbols() {
        let read = |pairs: &[(&str, &str)]| configs(&env(Kind::Node, pairs)).unwrap();
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(
            read(&[(
                "CONFIGS",
                "listen_addresses:'*',max_connections:100, log_line_prefix : '%t: '"
            )]),
            [
                pair("listen_addresses", "*"),
                pair("max_connections", "100"),
                pair("log_line_prefix", "%t: ")
            ]
        );
        assert_eq!(
            read(&[
                (
                    "CONFIGS",
                    "listen_addresses)'some_host'|max_replication_slots)55|"
                ),
                ("CONFIGS_DELIMITER_SYMBOL", "|"),
                ("CONFIGS_ASSIGNMENT_SYMBOL", ")"),
            ]),
            [
                pair("listen_addresses", "some_host"),
                pair("max_replication_slots", "55")
            ]
        );
        assert!(configs(&env(Kind::Node, &[("CONFIGS", "a=1")])).is_err());
        assert!(configs(&env(Kind::Node, &[("CONFIGS", "a b:1")])).is_err());
    }

    #[test]
    fn what_changes_nothing_is_named() {
        let e = env(
            Kind::Node,
            &[
                ("USE_REPLICATION_SLOTS", "1"),
                ("NODE_NAME", "node1"),
                ("X", "y"),
            ],
        );
        let notes = e.notes(Kind::Node);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].starts_with("USE_REPLICATION_SLOTS changes nothing: "));
        // One reason, one line.
        let e = env(
            Kind::Node,
            &[
                ("REPMGR_PID_FILE", "/tmp/repmgrd.pid"),
                ("STOPPING_LOCK_FILE", "/tmp/stop.pid"),
                ("REPMGR_MAJOR", "3"),
            ],
        );
        let notes = e.notes(Kind::Node);
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert_eq!(
            notes[0],
            "REPMGR_MAJOR, REPMGR_PID_FILE change nothing: there is no repmgr"
        );
        assert!(notes[1].starts_with("STOPPING_LOCK_FILE changes nothing: "));
        let e = env(Kind::Backup, &[("CONFIGS", "compression:gzip")]);
        let notes = e.notes(Kind::Backup);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].starts_with("CONFIGS changes nothing: "));
        assert!(is_secret("DB_USERS") && is_secret("PCP_PASSWORD_FILE"));
        assert!(is_secret("POSTGRES_PASSWORD_FILE") && is_secret("CHECK_PASSWORD"));
        assert!(!is_secret("POSTGRES_USER"));
    }

    /// The names and values of a Dockerfile's `ENV`.
    fn of_dockerfile(name: &str) -> Vec<(String, String)> {
        let path = format!("{}/../../docker/{name}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap().replace("\\\n", " ");
        let lines = text.lines().filter_map(|l| l.strip_prefix("ENV "));
        let pairs = lines.flat_map(str::split_whitespace);
        pairs
            .filter_map(|pair| pair.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    #[test]
    fn what_the_image_says_counts_as_not_said() {
        for (kind, file) in [
            (Kind::Node, "Dockerfile.postgis"),
            (Kind::Proxy, "Dockerfile.proxy"),
            (Kind::Backup, "Dockerfile.backup"),
        ] {
            let image = of_dockerfile(file);
            for (_, name, value) in IMAGE_ENV.iter().filter(|(k, ..)| k.contains(&kind)) {
                let there = image.iter().any(|(n, v)| n == name && v == value);
                assert!(there, "{file} lacks {name}={value}");
            }
            for (name, _) in &image {
                assert!(!is_secret(name), "{file}: {name}");
            }
            let none = |_: &str| Err("no".to_owned());
            let e = Environment::gather(kind, image.clone(), none).unwrap();
            assert_eq!(e, Environment::default(), "{file}");
            // A file goes over the image's value, as over no value.
            for (name, _) in image.iter().filter(|(n, _)| {
                VARIABLES
                    .iter()
                    .any(|v| v.name == n && v.kinds.contains(&kind))
            }) {
                let mut all = image.clone();
                all.push((format!("{name}_FILE"), "/f".to_owned()));
                let e = Environment::gather(kind, all, |_| Ok("mine".into())).unwrap();
                assert_eq!(e.get(name), Some("mine"), "{file}: {name}");
            }
        }
        let e = env(Kind::Node, &[("REPLICATION_DB", "other")]);
        assert_eq!(e.get("REPLICATION_DB"), Some("other"));
    }

    #[test]
    fn the_check_users_password_is_the_replication_password_where_none_is_said() {
        let of = |pairs: &[(&str, &str)]| {
            let e = env(Kind::Proxy, pairs);
            let (user, password) = e.check_login();
            format!("{user} {password}")
        };
        assert_eq!(of(&[]), "replication_user replication_pass");
        let replication = ("REPLICATION_PASSWORD", "r");
        assert_eq!(of(&[replication]), "replication_user r");
        let all = [("CHECK_USER", "m"), ("CHECK_PASSWORD", "p"), replication];
        assert_eq!(of(&all), "m p");
    }
}
