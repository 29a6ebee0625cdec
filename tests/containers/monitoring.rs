//! A real Prometheus with the project's configuration, alert rules and dashboard, beside the compose file's cluster.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail at any line"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::containers::{self, Stack, root, tag};
use crate::{ALL, NODES, turn};

/// Panels that show nothing on a cluster where nothing went wrong, and why.
const RIGHTLY_EMPTY: [&str; 0] = [];

fn image() -> String {
    format!("craton/test-prometheus:{}", tag())
}

/// Debian's Prometheus in the place of the project's own image, which cannot be pulled everywhere: the same working
/// directory, and the program as the entry point.
fn build_image() {
    let text = format!(
        "FROM craton/proxy:{}\n\
         RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/*\n\
         HEALTHCHECK NONE\n\
         WORKDIR /prometheus\n\
         ENTRYPOINT [\"/usr/bin/prometheus\"]\n",
        tag()
    );
    let mut build = Command::new("docker");
    build.args(["build", "--quiet", "--tag", &image(), "-"]);
    containers::feed(build.stdout(Stdio::null()), &text);
}

/// Its HTTP API, through the published port.
struct Prometheus {
    at: String,
}

impl Prometheus {
    fn of(stack: &Stack) -> Self {
        let published = stack.docker(&["port", &stack.container("prometheus"), "9090/tcp"]);
        let at = published.lines().next().unwrap().to_owned();
        Self { at }
    }

    fn get(&self, path: &str) -> Result<Value, String> {
        let text = http(&self.at, path)?;
        let (_, body) = text.split_once("\r\n\r\n").ok_or("no answer")?;
        let answer: Value = serde_json::from_str(body).map_err(|e| format!("{e}: {text}"))?;
        if answer["status"] == "success" {
            Ok(answer["data"].clone())
        } else {
            Err(format!("{path}: {answer}"))
        }
    }

    /// The series that an expression yields now.
    fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let mut path = "/api/v1/query?query=".to_owned();
        for byte in expression.bytes() {
            let _ = write!(path, "%{byte:02X}");
        }
        let data = self.get(&path)?;
        let result = data["result"].as_array().cloned();
        result.ok_or_else(|| format!("{expression}: {data}"))
    }

    fn rules(&self) -> Result<Vec<Value>, String> {
        let data = self.get("/api/v1/rules")?;
        let groups = data["groups"].as_array().cloned().unwrap_or_default();
        let rules = groups.iter().filter_map(|g| g["rules"].as_array().cloned());
        Ok(rules.flatten().collect())
    }

    /// The alerts of a name, as (state, instance, summary).
    fn alerts(&self, name: &str) -> Result<Vec<(String, String, String)>, String> {
        let rules = self.rules()?;
        let rule = rules.iter().find(|r| r["name"] == name).unwrap();
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let alerts = rule["alerts"].as_array().cloned().unwrap_or_default();
        let alert = |a: &Value| {
            let instance = text(&a["labels"]["instance"]);
            (
                text(&a["state"]),
                instance,
                text(&a["annotations"]["summary"]),
            )
        };
        Ok(alerts.iter().map(alert).collect())
    }
}

fn http(at: &str, path: &str) -> Result<String, String> {
    let error = |e: std::io::Error| format!("{at}{path}: {e}");
    let mut stream = TcpStream::connect(at).map_err(error)?;
    let limit = Some(Duration::from_secs(10));
    stream.set_read_timeout(limit).map_err(error)?;
    stream
        .write_all(format!("GET {path} HTTP/1.0\r\nHost: prometheus\r\n\r\n").as_bytes())
        .map_err(error)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(error)?;
    Ok(text)
}

#[test]
#[ignore = "four minutes; make test-containers runs it"]
fn monitoring() {
    let Some(_turn) = turn() else { return };
    containers::images();
    build_image();
    let compose = root().join("docker-compose");
    let files = [
        compose.join("docker-compose.yml"),
        compose.join("docker-compose.monitoring.yml"),
    ];
    let image = image();
    let variables = [
        ("PROMETHEUS_IMAGE", image.as_str()),
        ("PROMETHEUS_PORT", "0"),
    ];
    let stack = Stack::of_files("monitoring", &files, &variables);
    stack.up(&ALL);
    stack.whole("pgmaster", &NODES, Duration::from_secs(240));
    stack.wait(
        "the proxy lets the application in",
        Duration::from_secs(60),
        || stack.sql("CREATE TABLE t (id bigserial primary key)"),
    );
    stack.wait("the backup's checks pass", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman check all")
    });
    stack.sh("backup", "barman backup all");

    stack.up(&["prometheus"]);
    let prometheus = Prometheus::of(&stack);
    syntax(&stack);
    targets(&stack, &prometheus);
    all_is_well(&stack, &prometheus);
    every_metric_is_there(&prometheus);
    every_panel_shows_something(&stack, &prometheus);
    what_prometheus_3_asks_for(&stack);
    a_stopped_standby(&stack, &prometheus);
    no_leader(&stack, &prometheus);
    // Taken down with the files that it was brought up with.
    drop(stack);
}

/// Debian's `promtool` reads the configuration, the rules, and the templates of their annotations.
fn syntax(stack: &Stack) {
    let said = stack.sh(
        "prometheus",
        "promtool check config /etc/prometheus/prometheus.yml 2>&1",
    );
    assert!(
        said.contains("SUCCESS") && !said.contains("FAILED"),
        "{said}"
    );
}

/// Every container is scraped, and nothing of what it answers is refused.
fn targets(stack: &Stack, prometheus: &Prometheus) {
    stack.wait("all targets are up", Duration::from_secs(60), || {
        let data = prometheus.get("/api/v1/targets?state=active")?;
        let active = data["activeTargets"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let up: BTreeSet<&str> = active
            .iter()
            .filter(|t| t["health"] == "up" && t["lastError"] == "")
            .filter_map(|t| t["labels"]["instance"].as_str())
            .collect();
        let expected = ALL.map(|s| format!("{s}:8080"));
        let all = expected.iter().all(|e| up.contains(e.as_str()));
        if all && active.len() == ALL.len() {
            Ok(())
        } else {
            Err(format!("{active:#?}"))
        }
    });
}

/// For a minute, every rule is evaluated without an error, and none of them fires.
fn all_is_well(stack: &Stack, prometheus: &Prometheus) {
    stack.wait(
        "a minute of data is there",
        Duration::from_secs(120),
        || {
            let minute = prometheus.query("min(count_over_time(up[5m])) >= 12")?;
            if minute.is_empty() {
                Err("not yet".to_owned())
            } else {
                Ok(())
            }
        },
    );
    let rules = prometheus.rules().unwrap();
    let named =
        std::fs::read_to_string(root().join("docker-compose/monitoring/alerts.yml")).unwrap();
    assert_eq!(rules.len(), named.matches("- alert:").count());
    for rule in &rules {
        assert_eq!(rule["health"], "ok", "{rule:#}");
        assert_eq!(rule["state"], "inactive", "{rule:#}");
        assert!(
            rule["lastError"].as_str().unwrap_or_default().is_empty(),
            "{rule:#}"
        );
    }
    let fired = prometheus
        .query("last_over_time(ALERTS{alertstate=\"firing\"}[10m])")
        .unwrap();
    assert!(fired.is_empty(), "{fired:#?}");
}

/// The metrics that a text names.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let named = text.split(word);
    named
        .filter(|w| w.starts_with("craton_") || w.starts_with("barman_"))
        .map(str::to_owned)
        .collect()
}

fn every_metric_is_there(prometheus: &Prometheus) {
    for file in ["alerts.yml", "dashboard.json"] {
        let path = root().join("docker-compose/monitoring").join(file);
        let names = metrics_in(&std::fs::read_to_string(path).unwrap());
        assert!(names.len() > 5, "{file}: {names:?}");
        for name in &names {
            let series = prometheus.query(name).unwrap();
            assert!(!series.is_empty(), "{file}: {name} has no data");
        }
        eprintln!("{file}: all of {} metrics have data", names.len());
    }
}

fn every_panel_shows_something(stack: &Stack, prometheus: &Prometheus) {
    let path = root().join("docker-compose/monitoring/dashboard.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut count = 0;
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().unwrap();
            count += 1;
            if RIGHTLY_EMPTY.contains(&expression) {
                continue;
            }
            stack.wait(title, Duration::from_secs(30), || {
                let series = prometheus.query(expression)?;
                if series.is_empty() {
                    Err(format!("{expression}: nothing"))
                } else {
                    Ok(())
                }
            });
        }
    }
    assert!(count > 20, "{count}");
    let value = |expression: &str| {
        let series = prometheus.query(expression).unwrap();
        series[0]["value"][1].as_str().unwrap().to_owned()
    };
    assert_eq!(value("sum(craton_leader)"), "1");
    assert_eq!(value("sum(craton_streaming)"), "3");
    assert_eq!(value("sum(craton_member_role == 2)"), "6");
    assert_eq!(value("craton_proxy_standbys"), "3");
}

/// It refuses an answer whose type it does not know; older ones guess.
fn what_prometheus_3_asks_for(stack: &Stack) {
    for service in ALL {
        let answer = stack.sh(
            service,
            "exec 3<>/dev/tcp/localhost/8080; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3",
        );
        let head = answer.to_ascii_lowercase();
        assert!(
            head.contains("content-type: application/openmetrics-text; version=1.0.0"),
            "{service}: {answer}"
        );
        assert!(answer.ends_with("# EOF"), "{service}: {answer}");
    }
}

/// The one alert for it is pending, then fires, says what it is about, and ends with the cause.
fn a_stopped_standby(stack: &Stack, prometheus: &Prometheus) {
    let id = stack.container("pgslave2");
    stack.docker(&["stop", &id]);
    let begun = Instant::now();
    let mut pending = false;
    let mut firing = |expected: &str| {
        let alerts = prometheus.alerts("ContainerDown")?;
        match alerts.as_slice() {
            [(state, instance, summary)] => {
                assert_eq!(instance, "pgslave2:8080");
                assert_eq!(summary, "pgslave2:8080 cannot be reached");
                pending |= state == "pending";
                if state == expected {
                    Ok(())
                } else {
                    Err(state.clone())
                }
            }
            other => Err(format!("{other:?}")),
        }
    };
    stack.wait("the alert fires", Duration::from_secs(90), || {
        firing("firing")
    });
    assert!(pending, "it fired at once");
    eprintln!("ContainerDown fires {:?} after the stop", begun.elapsed());
    for rule in prometheus.rules().unwrap() {
        let expected = if rule["name"] == "ContainerDown" {
            "firing"
        } else {
            "inactive"
        };
        assert_eq!(rule["state"], expected, "{rule:#}");
    }
    stack.docker(&["start", &id]);
    stack.whole("pgmaster", &NODES, Duration::from_secs(120));
    stack.wait("the alert ends", Duration::from_secs(60), || {
        let alerts = prometheus.alerts("ContainerDown")?;
        if alerts.is_empty() {
            Ok(())
        } else {
            Err(format!("{alerts:?}"))
        }
    });
}

/// With all but one node gone nobody may lead, and the rest says so.
fn no_leader(stack: &Stack, prometheus: &Prometheus) {
    let nodes = ["pgmaster", "pgslave1", "pgslave2"];
    let ids = nodes.map(|n| stack.container(n));
    for id in &ids {
        stack.docker(&["kill", id]);
    }
    stack.wait("NoLeader fires", Duration::from_secs(90), || {
        let alerts = prometheus.alerts("NoLeader")?;
        match alerts.as_slice() {
            [(state, ..)] if state == "firing" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    for id in &ids {
        stack.docker(&["start", id]);
    }
    stack.whole("pgslave3", &NODES, Duration::from_secs(180));
    stack.wait("it ends", Duration::from_secs(60), || {
        let left = prometheus.query("ALERTS{alertname=\"NoLeader\"}")?;
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
}
