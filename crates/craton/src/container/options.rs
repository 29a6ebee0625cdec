//! The options of the old stack's commands. Each is done, or known to ask for nothing that matters here, or refused: what
//! an option asks for is never left out in silence.

use crate::exit::{Problem, USAGE};

/// Whether an option takes a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Takes {
    /// None.
    Nothing,
    /// One: behind `=`, or the next word.
    Value,
    /// One behind `=`, or none.
    Maybe,
}

/// An option that a program knows, whatever becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    short: Option<char>,
    long: &'static str,
    takes: Takes,
}

/// An option without a letter.
pub const fn long(name: &'static str, takes: Takes) -> Opt {
    Opt {
        short: None,
        long: name,
        takes,
    }
}

/// An option with a letter.
pub const fn short(letter: char, name: &'static str, takes: Takes) -> Opt {
    Opt {
        short: Some(letter),
        long: name,
        takes,
    }
}

/// What becomes of the options of one command; all others are refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accepted {
    /// They are done.
    pub done: &'static [&'static str],
    /// They ask for nothing that matters here: how to connect, where the old configuration is, how much is said, or
    /// something that is so anyway.
    pub needless: &'static [&'static str],
    /// Words behind the command, at most.
    pub words: usize,
}

/// The words of a command line, its options apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Line {
    /// What is no option.
    pub words: Vec<String>,
    options: Vec<(&'static str, Option<String>)>,
}

fn usage(what: String, hint: String) -> anyhow::Error {
    Problem::new(USAGE, what, hint).into()
}

fn unknown(program: &str, typed: &str) -> anyhow::Error {
    usage(
        format!("{program}: there is no option {typed} here; nothing was done"),
        format!("{program} --help lists what there is"),
    )
}

impl Line {
    /// Takes a command line apart, as getopt_long(3) does. An option that the program does not know is an error: whether
    /// the word behind it is its value could only be guessed.
    pub fn of(program: &str, known: &[Opt], args: &[String]) -> anyhow::Result<Self> {
        let mut line = Self::default();
        let mut rest = args.iter();
        while let Some(arg) = rest.next() {
            if arg == "--" {
                line.words.extend(rest.cloned());
                break;
            }
            if let Some(text) = arg.strip_prefix("--") {
                let (name, given) = match text.split_once('=') {
                    Some((name, value)) => (name, Some(value.to_owned())),
                    None => (text, None),
                };
                let found = known.iter().find(|o| o.long == name);
                let opt = found.ok_or_else(|| unknown(program, &format!("--{name}")))?;
                let value = match (opt.takes, given) {
                    (Takes::Nothing, Some(_)) => {
                        let what = format!("{program}: --{name} takes no value");
                        return Err(usage(what, format!("write --{name}")));
                    }
                    (Takes::Value, None) => Some(next(program, opt, rest.next())?),
                    (_, given) => given,
                };
                line.options.push((opt.long, value));
            } else if arg.len() > 1 && arg.starts_with('-') {
                line.letters(program, known, arg, &mut rest)?;
            } else {
                line.words.push(arg.clone());
            }
        }
        Ok(line)
    }

    /// `-v`, `-vt`, `-f FILE`, `-fFILE`.
    fn letters<'a>(
        &mut self,
        program: &str,
        known: &[Opt],
        arg: &str,
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> anyhow::Result<()> {
        let mut letters = arg.chars();
        letters.next();
        while let Some(letter) = letters.next() {
            let found = known.iter().find(|o| o.short == Some(letter));
            let opt = found.ok_or_else(|| unknown(program, &format!("-{letter}")))?;
            let behind = letters.as_str();
            let value = match opt.takes {
                Takes::Nothing => None,
                Takes::Maybe if behind.is_empty() => None,
                Takes::Value if behind.is_empty() => Some(next(program, opt, rest.next())?),
                Takes::Maybe | Takes::Value => {
                    let value = behind.to_owned();
                    letters = "".chars();
                    Some(value)
                }
            };
            self.options.push((opt.long, value));
        }
        Ok(())
    }

    /// A word by its place.
    pub fn word(&self, n: usize) -> Option<&str> {
        self.words.get(n).map(String::as_str)
    }

    /// An option's value, the last one that was given; empty where it has none.
    pub fn option(&self, name: &str) -> Option<&str> {
        let found = self.options.iter().rfind(|(n, _)| *n == name);
        found.map(|(_, value)| value.as_deref().unwrap_or_default())
    }

    /// True if the option was given.
    pub fn has(&self, name: &str) -> bool {
        self.option(name).is_some()
    }

    /// All values of an option that may be given several times.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        let given = self.options.iter().filter(move |(n, _)| *n == name);
        given.filter_map(|(_, value)| value.as_deref())
    }

    /// Refuses what the command would leave out: `everywhere` is needless for all of a program's commands, and `instead`
    /// says what to do instead of a refused option.
    pub fn check(
        &self,
        command: &str,
        everywhere: &[&str],
        accepted: &Accepted,
        instead: impl Fn(&str) -> Option<&'static str>,
    ) -> anyhow::Result<()> {
        let fine = |name: &str| {
            let lists = [everywhere, accepted.done, accepted.needless];
            lists.iter().any(|list| list.contains(&name))
        };
        if let Some((name, _)) = self.options.iter().find(|(n, _)| !fine(n)) {
            let what = format!("{command}: --{name} cannot be done here; nothing was done");
            let hint = instead(name).unwrap_or(
                "leave it out if that is meant; docs/guide/coming-from-postdock.md lists what each command understands",
            );
            return Err(usage(what, hint.to_owned()));
        }
        let most = command.split_whitespace().count().saturating_sub(1) + accepted.words;
        if let Some(word) = self.words.get(most) {
            let what = format!("{command}: \"{word}\" is one word too many; nothing was done");
            return Err(usage(what, "say one thing at a time".to_owned()));
        }
        Ok(())
    }
}

fn next(program: &str, opt: &Opt, word: Option<&String>) -> anyhow::Result<String> {
    word.cloned().ok_or_else(|| {
        usage(
            format!("{program}: --{} needs a value", opt.long),
            format!("write --{}=VALUE", opt.long),
        )
    })
}

/// A command line of a test, as a shell takes it apart where there are no quotes.
#[cfg(test)]
pub fn typed(line: &str) -> Vec<String> {
    line.split_whitespace().map(ToOwned::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Opt] = &[
        short('f', "config-file", Takes::Value),
        short('v', "verbose", Takes::Nothing),
        long("node-id", Takes::Value),
        long("dry-run", Takes::Nothing),
        long("force-rewind", Takes::Maybe),
    ];

    fn line(text: &str) -> anyhow::Result<Line> {
        Line::of("tool", KNOWN, &typed(text))
    }

    #[test]
    fn values_in_every_form_leave_the_words_alone() {
        for text in [
            "-f /etc/x primary unregister --node-id 3 -v",
            "-f/etc/x primary unregister --node-id=3 -v",
            "primary -vf /etc/x unregister --node-id 3",
            "--config-file=/etc/x -v --node-id 3 primary unregister",
        ] {
            let line = line(text).unwrap();
            assert_eq!(line.words, ["primary", "unregister"], "{text}");
            assert_eq!(line.option("node-id"), Some("3"), "{text}");
            assert_eq!(line.option("config-file"), Some("/etc/x"), "{text}");
            assert!(line.has("verbose") && !line.has("dry-run"), "{text}");
        }
        let line = line("a --force-rewind b --force-rewind=/x -- --dry-run").unwrap();
        assert_eq!(line.words, ["a", "b", "--dry-run"]);
        assert_eq!(line.option("force-rewind"), Some("/x"));
        assert!(!line.has("dry-run"));
    }

    #[test]
    fn what_cannot_be_understood_is_refused() {
        for (text, said) in [
            ("a --else", "no option --else"),
            ("a -x", "no option -x"),
            ("a -vx", "no option -x"),
            ("a --node-id", "--node-id needs a value"),
            ("a -f", "--config-file needs a value"),
            ("a --dry-run=1", "--dry-run takes no value"),
            ("a --dry", "no option --dry"),
        ] {
            let error = line(text).unwrap_err();
            assert!(error.to_string().contains(said), "{text}: {error}");
            assert_eq!(crate::exit::code_of(&error), USAGE, "{text}");
        }
    }

    #[test]
    fn only_what_is_accepted_passes() {
        let accepted = Accepted {
            done: &["dry-run"],
            needless: &["force-rewind"],
            words: 1,
        };
        let check = |text: &str| {
            let instead = |name: &str| (name == "node-id").then_some("type it elsewhere");
            line(text)
                .unwrap()
                .check("tool do it", &["verbose"], &accepted, instead)
        };
        check("do it now --dry-run -v --force-rewind").unwrap();
        let error = check("do it --node-id 3").unwrap_err();
        assert!(error.to_string().contains("--node-id"), "{error}");
        assert_eq!(crate::exit::code_of(&error), USAGE);
        assert_eq!(
            crate::exit::hint_of(&error).as_deref(),
            Some("type it elsewhere")
        );
        let error = check("do it now and then").unwrap_err();
        assert!(error.to_string().contains("\"and\""), "{error}");
    }
}
