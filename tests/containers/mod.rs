//! A whole cluster in containers, from the project's own compose file and the images with the binary under test.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unused_self,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::cell::RefCell;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The images are tagged so; `CRATON_TEST_TAG` keeps those of several working copies apart.
pub fn tag() -> &'static str {
    static TAG: OnceLock<String> = OnceLock::new();
    TAG.get_or_init(|| std::env::var("CRATON_TEST_TAG").unwrap_or_else(|_| "test".to_owned()))
}

/// Variables of the compose file that must not come from outside.
const PORTS: [&str; 6] = [
    "PGMASTER_PORT",
    "PGSLAVE1_PORT",
    "PGSLAVE2_PORT",
    "PGSLAVE3_PORT",
    "PGPOOL_PORT",
    "PGPOOL_READ_PORT",
];

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn run(command: &mut Command) -> Output {
    let out = command.output();
    out.unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

pub fn text(out: &Output) -> String {
    let part = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", part(&out.stdout), part(&out.stderr))
}

/// Runs what must succeed, and returns its output.
pub fn ok(command: &mut Command) -> String {
    let out = run(command);
    assert!(
        out.status.success(),
        "{command:?}: {}\n{}",
        out.status,
        text(&out)
    );
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// Why no containers can be run here; `None` where they can.
pub fn impossible() -> Option<String> {
    let engine = Command::new("docker").arg("version").output();
    match engine {
        Err(e) => return Some(format!("docker: {e}")),
        Ok(out) if !out.status.success() => return Some(text(&out).trim().to_owned()),
        Ok(_) => {}
    }
    compose_command().is_none().then(|| "neither docker-compose nor docker compose is there; scripts/setup.sh --tests installs one".to_owned())
}

/// Compose v1 is a program, v2 a plug-in.
fn compose_command() -> Option<&'static [&'static str]> {
    let works = |words: &[&str]| {
        let (program, rest) = words.split_first().unwrap();
        let out = Command::new(program).args(rest).arg("version").output();
        out.is_ok_and(|o| o.status.success())
    };
    [&["docker-compose"][..], &["docker", "compose"]]
        .into_iter()
        .find(|words| works(words))
}

/// Builds the images with the binary under test; what has not changed is not built again. With `CRATON_TEST_IMAGES=keep`
/// they are taken as they are.
pub fn images() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        if std::env::var("CRATON_TEST_IMAGES").is_ok_and(|v| v == "keep") {
            return;
        }
        let mut build = Command::new(root().join("scripts/images.sh"));
        build
            .env("CRATON_BIN", env!("CARGO_BIN_EXE_craton"))
            .env("TAG", tag());
        sweep();
        let begun = Instant::now();
        ok(&mut build);
        eprintln!("images are there after {:?}", begun.elapsed());
    });
}

/// Takes away what runs that were killed left behind: projects carry the number of the process that made them.
fn sweep() {
    let mut left = std::collections::BTreeSet::new();
    for kind in [&["ps", "-a"][..], &["network", "ls"], &["volume", "ls"]] {
        let project = "{{.Label \"com.docker.compose.project\"}}";
        let mut list = Command::new("docker");
        list.args(kind)
            .args(["--filter", "label=com.docker.compose.project"])
            .args(["--format", project]);
        left.extend(ok(&mut list).lines().map(str::to_owned));
    }
    let dead = |project: &String| {
        let number = project.strip_prefix("craton-test-");
        let number = number.and_then(|p| p.rsplit('-').next()?.parse::<u32>().ok());
        number.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    };
    for project in left.iter().filter(|p| dead(p)) {
        eprintln!("an earlier run left {project}: removed");
        let label = format!("label=com.docker.compose.project={project}");
        let name = format!("name=^{project}[-_]");
        for (kind, list, remove) in [
            (
                "container",
                ["ls", "-aq", "--filter", &name],
                ["rm", "-f", "-v"].as_slice(),
            ),
            ("network", ["ls", "-q", "--filter", &label], &["rm"]),
            ("volume", ["ls", "-q", "--filter", &label], &["rm", "-f"]),
        ] {
            let found = ok(Command::new("docker").arg(kind).args(list));
            let ids: Vec<&str> = found.lines().collect();
            if !ids.is_empty() {
                run(Command::new("docker").arg(kind).args(remove).args(ids));
            }
        }
    }
}

/// Runs what must succeed with this as its input.
pub fn feed(command: &mut Command, input: &str) {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let status = child.wait().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// Looks until it finds something, and fails with the logs when that does not come within the limit.
pub fn wait<T>(
    what: &str,
    limit: Duration,
    logs: impl Fn() -> String,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let begun = Instant::now();
    loop {
        match look() {
            Ok(found) => {
                eprintln!("{what}: after {:.1} s", begun.elapsed().as_secs_f64());
                return found;
            }
            Err(why) => assert!(
                begun.elapsed() < limit,
                "{what}: not within {limit:?}: {why}\n{}",
                logs()
            ),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A project of compose, removed with its volumes when the test ends.
pub struct Stack {
    project: String,
    files: Vec<PathBuf>,
    tag: RefCell<String>,
    variables: Vec<(String, String)>,
}

impl Stack {
    pub fn new(name: &str) -> Self {
        images();
        let stack = Self {
            project: format!("craton-test-{name}-{}", std::process::id()),
            files: vec![root().join("docker-compose/docker-compose.yml")],
            tag: RefCell::new(tag().to_owned()),
            variables: Vec::new(),
        };
        stack.clear();
        stack
    }

    /// Other files than the first example's, with the variables that they need.
    pub fn of_files(name: &str, files: &[PathBuf], variables: &[(&str, &str)]) -> Self {
        let mut stack = Self::new(name);
        stack.files = files.to_vec();
        let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        stack.variables = variables.iter().map(owned).collect();
        stack
    }

    /// Containers that are made from now on are of these images.
    pub fn use_tag(&self, tag: &str) {
        tag.clone_into(&mut self.tag.borrow_mut());
    }

    /// The project's name.
    pub fn project(&self) -> &str {
        &self.project
    }

    /// Another file over the first one.
    pub fn with_file(mut self, path: PathBuf) -> Self {
        self.files.push(path);
        self
    }

    pub fn compose(&self, args: &[&str]) -> Command {
        let words = compose_command().unwrap();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(["-p", &self.project]);
        for file in &self.files {
            command.arg("-f").arg(file);
        }
        command
            .args(args)
            .env("CRATON_TAG", self.tag.borrow().as_str())
            // Six containers at once on a busy disk: more than the minute that version 1 waits.
            .env("COMPOSE_HTTP_TIMEOUT", "600")
            .envs(self.variables.iter().map(|(k, v)| (k, v)));
        for port in PORTS {
            command.env(port, "0");
        }
        command
    }

    pub fn up(&self, services: &[&str]) {
        ok(&mut self.compose(&[&["up", "-d"], services].concat()));
    }

    /// A command of compose, which must succeed.
    pub fn compose_ok(&self, args: &[&str]) -> String {
        ok(&mut self.compose(args))
    }

    fn clear(&self) {
        run(&mut self.compose(&["down", "--volumes", "--timeout", "2", "--remove-orphans"]));
    }

    /// The container of a service.
    pub fn container(&self, service: &str) -> String {
        let id = ok(&mut self.compose(&["ps", "-q", service]));
        assert!(!id.is_empty(), "{service} has no container");
        id
    }

    /// The container of a service that may have stopped.
    pub fn container_of_dead(&self, service: &str) -> String {
        let project = format!("label=com.docker.compose.project={}", self.project);
        let service = format!("label=com.docker.compose.service={service}");
        self.docker(&["ps", "-aq", "--filter", &project, "--filter", &service])
    }

    pub fn docker(&self, args: &[&str]) -> String {
        ok(Command::new("docker").args(args))
    }

    pub fn network(&self) -> String {
        format!("{}_cluster", self.project)
    }

    /// Starts a container beside the stack, in its network, that runs a script of bash; its id.
    pub fn client(&self, name: &str, image: &str, variables: &[&str], script: &str) -> String {
        let name = format!("{}-{name}", self.project);
        let network = self.network();
        let image = format!("craton/{image}:{}", tag());
        let mut run = vec![
            "run",
            "-d",
            "--init",
            "--name",
            &name,
            "--network",
            &network,
        ];
        run.extend(variables.iter().flat_map(|v| ["-e", *v]));
        run.extend([image.as_str(), "bash", "-c", script]);
        self.docker(&run)
    }

    pub fn volume(&self, name: &str) -> String {
        format!("{}_{name}", self.project)
    }

    /// Runs a command in a container.
    pub fn exec(&self, service: &str, args: &[&str]) -> Output {
        let id = self.container(service);
        let mut command = Command::new("timeout");
        command.args(["120", "docker", "exec", &id]).args(args);
        run(&mut command)
    }

    /// Runs a shell command in a container, which must succeed, and returns what it printed.
    pub fn sh(&self, service: &str, script: &str) -> String {
        let out = self.exec(service, &["bash", "-c", script]);
        assert!(
            out.status.success(),
            "{service}: {script}: {}\n{}\n{}",
            out.status,
            text(&out),
            self.logs()
        );
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// As [`Self::sh`], where it may fail.
    pub fn try_sh(&self, service: &str, script: &str) -> Result<String, String> {
        let out = self.exec(service, &["bash", "-c", script]);
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
        } else {
            Err(text(&out))
        }
    }

    /// SQL through the proxy, as the application.
    pub fn sql(&self, sql: &str) -> Result<String, String> {
        let sql = sql.replace('\'', "'\\''");
        self.try_sh(
            "pgpool",
            &format!("PGPASSWORD=monkey_pass PGCONNECT_TIMEOUT=60 psql -h localhost -U monkey_user -d monkey_db -XAtq -v ON_ERROR_STOP=1 -c '{sql}'"),
        )
    }

    /// SQL on one node, as the superuser.
    pub fn sql_on(&self, node: &str, database: &str, sql: &str) -> Result<String, String> {
        let sql = sql.replace('\'', "'\\''");
        self.try_sh(
            node,
            &format!("gosu postgres psql -d {database} -XAtq -v ON_ERROR_STOP=1 -c '{sql}'"),
        )
    }

    /// What an agent says.
    pub fn status(&self, node: &str) -> Result<serde_json::Value, String> {
        let text = self.try_sh(node, "craton --json status")?;
        serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
    }

    /// Who leads and is open for writes.
    pub fn leader(&self, asked: &str) -> Option<String> {
        let status = self.status(asked).ok()?;
        if status["writable"] != true {
            return None;
        }
        status["leader"].as_str().map(ToOwned::to_owned)
    }

    /// The end of every container's log.
    pub fn logs(&self) -> String {
        let out = run(&mut self.compose(&["logs", "--no-color", "--tail", "60"]));
        text(&out)
    }

    /// Waits for something, and fails with the logs when it does not come.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        look: impl FnMut() -> Result<T, String>,
    ) -> T {
        wait(what, limit, || self.logs(), look)
    }

    /// Waits until these nodes lead or stream, with one leader among them, and returns it.
    pub fn whole(&self, asked: &str, nodes: &[&str], limit: Duration) -> String {
        self.wait(&format!("{nodes:?} are whole"), limit, || {
            let status = self.status(asked)?;
            let leader = status["leader"].as_str().unwrap_or_default().to_owned();
            if status["writable"] != true {
                return Err(format!("not writable: {}", status["next"]));
            }
            for node in nodes {
                let members = status["members"].as_array().unwrap();
                let member = members.iter().find(|m| m["id"] == *node);
                let good = member.is_some_and(|m| {
                    m["streaming"] == true || (*node == leader && m["role"] == "leader")
                });
                if !good {
                    return Err(format!("{node}: {member:?}"));
                }
            }
            Ok(leader)
        })
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if std::env::var_os("KEEP").is_some() {
            eprintln!("kept: {}", self.project);
            return;
        }
        self.clear();
    }
}
