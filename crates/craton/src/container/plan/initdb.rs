//! How the database of a new cluster is made: `POSTGRES_INITDB_ARGS` and `LANG`, as in the official image.

use craton_pg::InitArgs;

use super::super::environment::Environment;
use super::Plan;

/// The locale that the image has besides those of the C library, and that the official image makes databases in.
pub const LANG: &str = "en_US.utf8";

/// Where a cluster is made now, by this node, of nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Makes {
    /// Here and now: what is wrong must stop it.
    Now,
    /// Not now: nothing looks at the arguments.
    NotNow,
}

/// Sets `initdb_args`. They are set at every start of a node that may make the cluster: an agent that dies between its
/// first file and initdb goes on with the same ones.
pub fn set(env: &Environment, plan: &mut Plan, makes: Makes) -> Result<(), String> {
    let (args, from) = match chosen(env) {
        Ok(found) => found,
        Err(why) if makes == Makes::Now => return Err(why),
        Err(why) => {
            plan.notes.push(format!(
                "{why}; it changes nothing now, as there is a database already"
            ));
            return Ok(());
        }
    };
    plan.set("initdb_args", args.words().to_vec(), from);
    Ok(())
}

fn chosen(env: &Environment) -> Result<(InitArgs, Option<&'static str>), String> {
    const ARGS: &str = "POSTGRES_INITDB_ARGS";
    let own = env.get(ARGS);
    let parsed = InitArgs::split(own.unwrap_or_default()).and_then(|w| InitArgs::parse(&w));
    let parsed = parsed.map_err(|e| format!("{ARGS}: {e}"))?;
    let from = match (own, env.get("LANG")) {
        (Some(_), _) => Some(ARGS),
        (None, Some(_)) => Some("LANG"),
        (None, None) => None,
    };
    if parsed.has_locale() {
        return Ok((parsed, from));
    }
    let mut words = vec![format!("--locale={}", env.or("LANG", LANG))];
    words.extend(parsed.words().iter().cloned());
    let all = InitArgs::parse(&words).map_err(|e| format!("LANG: {e}"))?;
    Ok((all, from))
}

#[cfg(test)]
mod tests {
    use super::super::super::environment::{Kind, tests::env};
    use super::*;

    fn planned(variables: &[(&str, &str)], makes: Makes) -> Result<Plan, String> {
        let env = env(Kind::Node, variables);
        let mut plan = Plan::new("node");
        set(&env, &mut plan, makes).map(|()| plan)
    }

    #[test]
    fn lang_is_the_locale_where_the_arguments_name_none() {
        for (variables, line) in [
            (vec![], r#"initdb_args = ["--locale=en_US.utf8"]"#),
            // The image's own value.
            (
                vec![("LANG", "en_US.utf8")],
                r#"initdb_args = ["--locale=en_US.utf8"]"#,
            ),
            (
                vec![("LANG", "C.UTF-8")],
                r#"initdb_args = ["--locale=C.UTF-8"] # from LANG"#,
            ),
            (
                vec![
                    ("LANG", "de_DE.utf8"),
                    ("POSTGRES_INITDB_ARGS", "--data-checksums"),
                ],
                r#"initdb_args = ["--locale=de_DE.utf8"] # from POSTGRES_INITDB_ARGS"#,
            ),
            (
                vec![
                    ("LANG", "de_DE.utf8"),
                    ("POSTGRES_INITDB_ARGS", "--locale C --lc-time='en_US.utf8'"),
                ],
                r#"initdb_args = ["--locale=C", "--lc-time=en_US.utf8"] # from POSTGRES_INITDB_ARGS"#,
            ),
            (
                vec![(
                    "POSTGRES_INITDB_ARGS",
                    "--locale-provider=icu --icu-locale=de",
                )],
                r#"initdb_args = ["--locale=en_US.utf8", "--locale-provider=icu", "--icu-locale=de"] # from POSTGRES_INITDB_ARGS"#,
            ),
        ] {
            let text = planned(&variables, Makes::Now).unwrap().text();
            assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
        }
    }

    #[test]
    fn wrong_arguments_stop_only_the_start_that_would_use_them() {
        let wrong = [("POSTGRES_INITDB_ARGS", "--auth-host=md5")];
        let error = planned(&wrong, Makes::Now).unwrap_err();
        assert!(
            error.starts_with("POSTGRES_INITDB_ARGS: the argument --auth-host=md5"),
            "{error}"
        );
        let plan = planned(&wrong, Makes::NotNow).unwrap();
        assert!(plan.settings.is_empty());
        assert!(plan.notes[0].contains("changes nothing now"), "{plan:?}");
    }

    #[test]
    fn what_is_planned_is_what_an_agent_reads() {
        let variables = [("POSTGRES_INITDB_ARGS", "-E UTF8 --lc-collate=C")];
        let text = planned(&variables, Makes::Now).unwrap().text();
        let parsed: toml::Table = text.parse().unwrap();
        let words: Vec<String> = parsed["node"]["initdb_args"].clone().try_into().unwrap();
        assert_eq!(
            words,
            ["--locale=en_US.utf8", "--encoding=UTF8", "--lc-collate=C"]
        );
    }
}
