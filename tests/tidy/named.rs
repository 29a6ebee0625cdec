//! What the pages name is there: targets of make, commands and options of craton, files of the project.

use clap::{ArgAction, CommandFactory as _};

use super::{files, read, relative, root};

/// Every piece of code in a page: spans between backticks, and lines of blocks. With the number of its line.
fn pieces(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut block = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            block = !block;
        } else if block {
            let line = line.trim_start();
            let command = ["$ ", "# "].iter().find_map(|p| line.strip_prefix(p));
            let line = line.split(" #").next().unwrap_or_default().trim_end();
            // Columns are a picture or a table, no command.
            if command.is_some() || !line.contains("  ") {
                found.push((number + 1, command.unwrap_or(line).to_owned()));
            }
        } else {
            let spans = line.split('`').skip(1).step_by(2);
            found.extend(spans.map(|s| (number + 1, s.to_owned())));
        }
    }
    found
}

/// The commands of a line of a shell, each with what it was called with.
fn calls<'a>(piece: &'a str, program: &str) -> Vec<Vec<&'a str>> {
    let piece = piece.split(" #").next().unwrap_or_default();
    piece
        .split(" && ")
        .flat_map(|part| part.split(" | "))
        .flat_map(|part| part.split(';'))
        .filter_map(|part| {
            let mut words: Vec<&str> = part.split_whitespace().collect();
            // Behind what runs it as somebody else, or somewhere else.
            if let Some(at) = words.iter().position(|w| ["--", "postgres"].contains(w))
                && ["runuser", "docker", "docker-compose", "sudo"].contains(words.first()?)
            {
                words.drain(..=at);
                words.drain(
                    ..words
                        .iter()
                        .position(|w| !["--", "gosu", "postgres"].contains(w))?,
                );
            }
            let mut words = words.into_iter().skip_while(|w| w.contains('='));
            (words.next() == Some(program)).then(|| words.collect())
        })
        .collect()
}

/// What is wrong with a call of craton, as a page has it; words in capitals and dots stand for something else.
fn wrong_call(words: &[&str]) -> Option<String> {
    let root = craton::cli::Cli::command();
    let mut command = &root;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let bare = word.trim_matches(|c| "[](),.:\"'".contains(c));
        if let Some(option) = bare.strip_prefix("--") {
            let (name, value) = option
                .split_once('=')
                .map_or((option, None), |(n, v)| (n, Some(v)));
            if ["help", "version"].contains(&name) || name.is_empty() {
                continue;
            }
            let known = [command, &root]
                .iter()
                .flat_map(|c| c.get_arguments())
                .find(|a| a.get_long() == Some(name));
            match known {
                None => return Some(format!("{} has no --{name}", command.get_name())),
                Some(a) if matches!(a.get_action(), ArgAction::Set | ArgAction::Append) => {
                    if value.is_none() {
                        words.next();
                    }
                }
                Some(_) => {}
            }
            continue;
        }
        let plain =
            |w: &str| !w.is_empty() && w.chars().all(|c| c.is_ascii_lowercase() || c == '-');
        if !word.is_ascii()
            || ["\\", ">", ">>", "<", "2>&1", "&"].contains(word)
            || word.starts_with("<<")
        {
            return None;
        }
        if !command.has_subcommands() || !bare.split('|').all(plain) {
            continue;
        }
        for name in bare.split('|') {
            match command.find_subcommand(name) {
                None => return Some(format!("{} has no {name}", command.get_name())),
                Some(_) if bare.contains('|') => {}
                Some(sub) => command = sub,
            }
        }
        if bare.contains('|') {
            return None;
        }
    }
    None
}

/// A span that can only be a file of this project.
fn missing_file(piece: &str) -> Option<&str> {
    const TOP: [&str; 9] = [
        "benches/",
        "crates/",
        "data/",
        "docker/",
        "docker-compose/",
        "docs/",
        "packaging/",
        "scripts/",
        "tests/",
    ];
    let path = piece.split_whitespace().next()?.split(':').next()?;
    let names = TOP.iter().any(|t| path.starts_with(t));
    let open = path.contains(['*', '…', '<', '{', '$']);
    (names && !open && !root().join(path).exists()).then_some(path)
}

/// What is wrong with a page.
pub fn problems() -> Vec<String> {
    let makefile = read(&root().join("Makefile"));
    let target = |name: &str| {
        makefile
            .lines()
            .any(|l| l.split_once(':').is_some_and(|(n, _)| n == name))
    };
    let mut problems = Vec::new();
    for path in files(&[".md"]) {
        let page = relative(&path);
        for (line, piece) in pieces(&read(&path)) {
            let mut say = |what: String| problems.push(format!("{page}:{line}: {what}: {piece}"));
            for call in calls(&piece, "make") {
                let plain = |w: &&str| w.chars().all(|c| c.is_ascii_lowercase() || c == '-');
                let targets = call.into_iter().skip_while(|w| w.contains('='));
                for name in targets.take_while(plain).filter(|n| !target(n)) {
                    say(format!("make has no {name}"));
                }
            }
            for call in calls(&piece, "craton") {
                if let Some(why) = wrong_call(&call) {
                    say(why);
                }
            }
            if let Some(file) = missing_file(&piece) {
                say(format!("there is no {file}"));
            }
        }
    }
    problems
}

#[test]
fn a_call_that_cannot_be_made_is_noticed() {
    let wrong = |line: &str| calls(line, "craton").iter().find_map(|c| wrong_call(c));
    for line in [
        "craton statsu",
        "craton status --frobnicate",
        "craton divergence list|shwo",
        "runuser -u postgres -- craton ca nit",
        "docker exec pgmaster gosu postgres craton statsu",
        "craton psql -c 'SELECT 1' --frobnicate",
    ] {
        assert!(wrong(line).is_some(), "{line}");
    }
    for line in [
        "craton --api db1:8008 status",
        "craton divergence list|show",
        "runuser -u postgres -- craton ca init --cluster prod",
        "craton restore DIRECTORY --to TIME",
    ] {
        assert_eq!(wrong(line), None, "{line}");
    }
}
