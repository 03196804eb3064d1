//! Hints name only existing things.
//!
//! The real parser accepts each `oncely …` command in messages, help texts and documents. Each
//! document that a message names exists.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser as _;
use clap::error::ErrorKind;
use oncely::cli::Cli;
use support::guests::repository;

/// Texts that start like a command but are names of sessions and locks, or the program itself.
const NO_COMMANDS: [&str; 9] = [
    "oncely from",
    "oncely reader",
    "oncely migrates",
    "oncely deploys",
    "oncely lease",
    "oncely guests",
    "oncely relay",
    "oncely authorizer",
    "oncely that",
];

/// All files below a folder with this extension.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path, extension)?);
        } else if path.extension().is_some_and(|own| own == extension) {
            found.push(path);
        }
    }
    Ok(found)
}

/// The unescaped string literals of a Rust source, and the texts of its doc comments.
fn texts(source: &str) -> Vec<String> {
    let mut texts = Vec::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let skip = |length: usize| rest.split_at(length.min(rest.len())).1;
        let line = || rest.split('\n').next().unwrap_or_default();
        rest = if rest.starts_with("//") {
            texts.extend(line().strip_prefix("///").map(str::to_owned));
            skip(line().len())
        } else if let Some((hashes, body)) = raw_string(rest) {
            let end = format!("\"{}", "#".repeat(hashes));
            let (text, after) = body.split_once(&end).unwrap_or((body, ""));
            texts.push(text.to_owned());
            after
        } else if first == '"' {
            let (text, after) = string(skip(1));
            texts.push(text);
            after
        } else if first == '\'' {
            // A character or a lifetime.
            let quoted: Vec<char> = rest.chars().skip(1).take(2).collect();
            match quoted.as_slice() {
                ['\\', escaped] => skip(2 + escaped.len_utf8()),
                [inner, '\''] => skip(2 + inner.len_utf8()),
                _ => skip(1),
            }
        } else if first.is_alphanumeric() || first == '_' {
            let word = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            skip(word)
        } else {
            skip(first.len_utf8())
        };
    }
    texts
}

/// The number of hashes of a raw string, and the text after its opening quote.
fn raw_string(rest: &str) -> Option<(usize, &str)> {
    let rest = rest.strip_prefix('b').unwrap_or(rest).strip_prefix('r')?;
    let body = rest.trim_start_matches('#');
    Some((rest.len() - body.len(), body.strip_prefix('"')?))
}

/// A string after its opening quote, and the text after its closing one.
fn string(rest: &str) -> (String, &str) {
    let mut text = String::new();
    let mut chars = rest.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (text, rest.split_at(at + 1).1),
            '\\' => match chars.next() {
                Some((_, '\n')) => {
                    // The string continues after the indentation of the next line.
                    let mut lookahead = chars.clone();
                    while lookahead.next().is_some_and(|(_, c)| c.is_whitespace()) {
                        chars.next();
                    }
                }
                Some((_, 'n')) => text.push('\n'),
                Some((_, escaped)) => text.push(escaped),
                None => {}
            },
            c => text.push(c),
        }
    }
    (text, "")
}

/// The commands in a message: from `oncely` to a terminator such as a backtick, bracket or line
/// end.
fn commands_in_message(text: &str) -> Vec<String> {
    let begins = |(at, _): &(usize, &str)| {
        let before = text.split_at(*at).0.chars().next_back();
        before.is_none_or(|before| before.is_whitespace() || "`(:".contains(before))
    };
    let mut commands = Vec::new();
    for (at, _) in text.match_indices("oncely ").filter(begins) {
        let command = text.split_at(at).1;
        let is_none = NO_COMMANDS.iter().any(|name| command.starts_with(name));
        let names_subcommand = command
            .chars()
            .nth("oncely ".len())
            .is_some_and(|c| c.is_ascii_lowercase());
        if is_none || !names_subcommand {
            continue;
        }
        let end = command
            .find(['`', '(', ')', '|', ';', '\n', ','])
            .unwrap_or(command.len());
        commands.push(
            command
                .split_at(end)
                .0
                .trim_end_matches(['.', '"', ' '])
                .to_owned(),
        );
    }
    commands
}

/// The commands in the `code` spans of a document's prose or of a help text.
fn commands_in_code(text: &str) -> Vec<String> {
    let code = text.split('`').skip(1).step_by(2);
    code.filter(|code| code.starts_with("oncely "))
        .flat_map(commands_in_message)
        .collect()
}

/// The words of a command; a placeholder such as ID or `{worker}` becomes a value.
fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut quote = None;
    let mut word = String::new();
    for c in command.chars() {
        match (quote, c) {
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if open == c => quote = None,
            (None, ' ') => words.push(std::mem::take(&mut word)),
            (_, c) => word.push(c),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    for word in &mut words {
        let is_placeholder = word.chars().all(|c| c.is_ascii_uppercase()) || word.starts_with('{');
        if is_placeholder {
            *word = "1".to_owned();
        }
    }
    words
}

/// Checks that the parser accepts a command. A command that is only named may lack its arguments.
fn exists(command: &str) -> Result<(), String> {
    match Cli::try_parse_from(words(command)) {
        Ok(_) => Ok(()),
        Err(error) => match error.kind() {
            ErrorKind::MissingRequiredArgument
            | ErrorKind::MissingSubcommand
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Ok(()),
            _ => Err(error.to_string()),
        },
    }
}

#[test]
fn every_command_in_messages_and_documents_exists() -> Result<()> {
    let mut commands = Vec::new();

    // Commands in messages
    for path in files(&repository().join("host/src"), "rs")? {
        let source = std::fs::read_to_string(&path)?;
        for text in texts(&source) {
            commands.extend(
                commands_in_message(&text)
                    .into_iter()
                    .map(|command| (path.clone(), command)),
            );
        }
    }
    let in_messages = commands.len();
    ensure!(
        in_messages > 30,
        "found only {in_messages} commands in messages"
    );

    // Commands in documents
    let mut documents = files(&repository().join("docs"), "md")?;
    documents.extend(files(&repository().join("examples"), "md")?);
    for name in [
        "README.md",
        "SECURITY.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ] {
        documents.push(repository().join(name));
    }
    for path in documents {
        let text = std::fs::read_to_string(&path)?;
        for paragraph in text
            .split("\n\n")
            .filter(|paragraph| !paragraph.contains("```"))
        {
            commands.extend(
                commands_in_code(paragraph)
                    .into_iter()
                    .map(|command| (path.clone(), command)),
            );
        }
    }
    ensure!(
        commands.len() > in_messages + 20,
        "found only {} commands",
        commands.len()
    );

    // Parse all of them
    let wrong = commands.iter().filter_map(|(path, command)| {
        let error = exists(command).err()?;
        Some(format!(
            "{}: `{command}`: {}",
            path.display(),
            error.lines().next().unwrap_or_default()
        ))
    });
    let wrong: Vec<String> = wrong.collect();
    ensure!(
        wrong.is_empty(),
        "commands that do not exist:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

#[test]
fn every_document_in_a_message_exists() -> Result<()> {
    let mut named = 0;
    for path in files(&repository().join("host/src"), "rs")? {
        for text in texts(&std::fs::read_to_string(&path)?) {
            for (at, _) in text.match_indices("docs/") {
                let rest = text.split_at(at).1;
                let end = rest
                    .find(".md")
                    .with_context(|| format!("{}: {rest}", path.display()))?
                    + ".md".len();
                let document = repository().join(rest.split_at(end).0);
                ensure!(
                    document.is_file(),
                    "{} names the missing file {}",
                    path.display(),
                    document.display()
                );
                named += 1;
            }
        }
    }
    ensure!(named > 2, "only {named} documents are named");
    Ok(())
}

#[test]
fn commands_that_do_not_exist_are_noticed() {
    for command in [
        "oncely purge NAME",
        "oncely dlq redrive ID --now",
        "oncely outbox list shows",
        "oncely dlq new",
    ] {
        assert!(exists(command).is_err(), "{command}");
    }
    for command in [
        "oncely dlq redrive {id}",
        "oncely state list WORKER",
        "oncely dlq resolve 7 --note \"by hand\"",
    ] {
        assert_eq!(exists(command), Ok(()), "{command}");
    }
    let source = r##"
        fn f<'a>(c: char) { if c == '"' { say("a `oncely dlq list` here, \
            (oncely outbox) and oncely status"); } say(r#"or: oncely workers"#) }
        /// See `oncely build`.
        // See `oncely nothing`.
    "##;
    let found: Vec<String> = texts(source)
        .iter()
        .flat_map(|text| commands_in_message(text))
        .collect();
    assert_eq!(
        found,
        [
            "oncely dlq list",
            "oncely outbox",
            "oncely status",
            "oncely workers",
            "oncely build"
        ]
    );
}
