//! `/v1/config`: the cluster-wide settings, shown with their origin and changed after they were checked.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use craton_console::views::{ConfigChangeView, ConfigRequest, ConfigRow, ConfigView};
use craton_core::records::{Change, ClusterView, Key, Record};
use craton_core::settings::{FIELDS, POSTGRESQL, Settings};

use super::{Api, Refusal, who};
use crate::parameters::{self, Verdict};

/// More settings than this in one change are refused.
const CHANGES_MAX: usize = 200;

pub(super) async fn show(State(api): State<Api>) -> Response {
    match api.read().await {
        Ok(view) => Json(rows(&api, &view)).into_response(),
        Err(refusal) => refusal.answer(),
    }
}

fn rows(api: &Api, view: &ClusterView) -> ConfigView {
    let revision = view.revision_of(&Key::Settings);
    let settings = view.settings();
    let stored = format!("coordinator (revision {revision})");
    let mut rows: Vec<ConfigRow> = FIELDS
        .iter()
        .map(|f| {
            let value = settings.get(f.name).unwrap_or_default();
            let default = f.default_text();
            ConfigRow {
                name: f.name.into(),
                origin: if value == default {
                    "default".into()
                } else {
                    stored.clone()
                },
                value,
                unit: f.unit.name().into(),
                default: Some(default),
                range: f.range(),
                doc: f.doc.into(),
                shared: true,
            }
        })
        .collect();
    let own = api.server.parameters.own();
    rows.extend(settings.postgresql.iter().map(|(name, value)| ConfigRow {
        name: format!("{POSTGRESQL}{name}"),
        value: value.clone(),
        origin: if own.contains_key(name) {
            format!("{stored}, overridden on this member")
        } else {
            stored.clone()
        },
        shared: true,
        ..ConfigRow::default()
    }));
    rows.extend(own.iter().map(|(name, value)| {
        let written = api.origins.get(&format!("postgresql.{name}"));
        ConfigRow {
            name: format!("{POSTGRESQL}{name}"),
            value: value.clone(),
            origin: written.map_or_else(|| "[node.postgresql]".to_owned(), Clone::clone),
            shared: false,
            ..ConfigRow::default()
        }
    }));
    ConfigView {
        revision,
        member: api.seen.borrow().as_ref().map(|s| s.0.me.id.clone()),
        settings: rows,
    }
}

pub(super) async fn change(State(api): State<Api>, Json(body): Json<ConfigRequest>) -> Response {
    match try_change(&api, body).await {
        Ok(view) => Json(view).into_response(),
        Err(refusal) => refusal.answer(),
    }
}

async fn try_change(api: &Api, body: ConfigRequest) -> Result<ConfigChangeView, Refusal> {
    let wrong = |why: String| {
        Refusal(
            StatusCode::UNPROCESSABLE_ENTITY,
            why,
            "nothing was changed; craton config show lists the settings",
        )
    };
    if body.set.len() + body.unset.len() > CHANGES_MAX {
        return Err(wrong(format!("more than {CHANGES_MAX} settings at once")));
    }
    let view = api.read().await?;
    let next = apply(&view.settings(), &body).map_err(wrong)?;
    let members = view.members.len();
    let before = view.settings();
    let mut verdict = parameters::check(&api.server, &new_parameters(&before, &next), members)
        .await
        .map_err(wrong)?;
    let gone = before.postgresql.keys();
    let gone: Vec<String> = gone
        .filter(|name| !next.postgresql.contains_key(*name))
        .cloned()
        .collect();
    verdict
        .restart
        .extend(parameters::waiting_for_restart(&api.server, &gone).await);
    let by = who(body.by.clone());
    let (revision, changed) = api
        .transact(|view| {
            let revision = view.revision_of(&Key::Settings);
            if body.revision.is_some_and(|r| r != revision) {
                return Err(Refusal::conflict(
                    format!(
                        "the settings were changed since they were shown (revision {}, now {revision})",
                        body.revision.unwrap_or_default()
                    ),
                    "look at them again with craton config show, then repeat the change",
                ));
            }
            let before = view.settings();
            // Made anew of what is stored now: another change may have come in between.
            let next = apply(&before, &body).map_err(wrong)?;
            let changed = differences(&before, &next);
            let mut puts = vec![Record::Settings(next)];
            if !changed.is_empty() {
                let text = format!("settings changed by {by}: {}", changed.join(", "));
                puts.push(api.noted(view, "config", text));
            }
            let change = Change {
                expect: vec![(Key::Settings, revision)],
                puts,
                deletes: vec![],
            };
            Ok((change, changed))
        })
        .await?;
    let Verdict { restart, notes } = verdict;
    Ok(ConfigChangeView {
        revision,
        changed,
        restart,
        notes,
    })
}

/// Each value on its own, then what they say together.
fn apply(settings: &Settings, body: &ConfigRequest) -> Result<Settings, String> {
    let mut next = settings.clone();
    for name in &body.unset {
        next = next.without(name)?;
    }
    for (name, value) in &body.set {
        next = next.with(name, value)?;
    }
    next.validate()?;
    Ok(next)
}

/// PostgreSQL's parameters that get another value.
fn new_parameters(before: &Settings, next: &Settings) -> BTreeMap<String, String> {
    next.postgresql
        .iter()
        .filter(|(name, value)| before.postgresql.get(*name) != Some(value))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// `name: from -> to` for each that differs.
fn differences(before: &Settings, next: &Settings) -> Vec<String> {
    let parameters = before.postgresql.keys().chain(next.postgresql.keys());
    let mut names: Vec<String> = parameters.map(|n| format!("{POSTGRESQL}{n}")).collect();
    names.sort();
    names.dedup();
    let fields = FIELDS.iter().map(|f| f.name.to_owned());
    fields
        .chain(names)
        .filter_map(|name| {
            let (from, to) = (before.get(&name), next.get(&name));
            let shown = |v: Option<String>| v.unwrap_or_else(|| "not set".into());
            (from != to).then(|| format!("{name}: {} -> {}", shown(from), shown(to)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(set: &[(&str, &str)], unset: &[&str]) -> ConfigRequest {
        ConfigRequest {
            set: set
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            unset: unset.iter().map(|u| (*u).to_owned()).collect(),
            ..ConfigRequest::default()
        }
    }

    #[test]
    fn a_change_is_checked_as_a_whole() {
        let s = Settings::default();
        // Either alone would not do.
        let both = apply(&s, &body(&[("heartbeat_ms", "3s"), ("ttl_ms", "9s")], &[])).unwrap();
        assert_eq!((both.heartbeat_ms, both.ttl_ms), (3000, 9000));
        assert!(apply(&s, &body(&[("heartbeat_ms", "3s")], &[])).is_err());
        assert!(
            apply(&both, &body(&[], &["ttl_ms"]))
                .unwrap_err()
                .contains("a third")
        );
        let set = apply(&s, &body(&[("postgresql.work_mem", "8MB")], &[])).unwrap();
        assert_eq!(
            differences(&both, &set),
            [
                "ttl_ms: 9000 -> 2000",
                "heartbeat_ms: 3000 -> 300",
                "postgresql.work_mem: not set -> 8MB"
            ]
        );
        assert_eq!(new_parameters(&s, &set).len(), 1);
        assert_eq!(new_parameters(&set, &set).len(), 0);
    }
}
