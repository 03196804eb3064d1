//! The gate every guest statement passes: one data statement, and nothing that is the platform's.

use super::{Dialect, SqlError};

/// The words a guest's statement may begin with.
const ALLOWED: [&str; 7] = ["select", "insert", "update", "delete", "merge", "values", "with"];

/// Beginnings of names that belong to the platform or reach around it.
const SQLITE_NAMES: [&str; 3] = ["oncely_", "sqlite_", "pragma_"];
const POSTGRES_NAMES: [&str; 22] = [
    "pg_",
    "set_config",
    "query_to_xml",
    "table_to_xml",
    "cursor_to_xml",
    "schema_to_xml",
    "database_to_xml",
    "dblink",
    "lo_import",
    "lo_export",
    "lo_creat",
    "lo_from_bytea",
    "lo_get",
    "lo_put",
    "lo_open",
    "lo_close",
    "lo_lseek",
    "lo_tell",
    "lo_truncate",
    "lo_unlink",
    "loread",
    "lowrite",
];
/// What begins like one of [`POSTGRES_NAMES`] and is harmless.
const POSTGRES_HARMLESS: [&str; 2] = ["pg_catalog", "pg_typeof"];

/// Lets through one data statement and nothing else: no transaction control, DDL, settings or commands.
///
/// The databases read comments, white space and quotes differently, so the text is read as `dialect` reads it:
/// what is a comment to one of them may be a `commit` to the other.
pub fn check_statement(statement: &str, dialect: Dialect) -> Result<(), SqlError> {
    if statement.contains('\0') {
        return refuse("a statement cannot contain a NUL character");
    }
    let tokens = tokens(statement, dialect)?;
    check_first_word(&tokens)?;
    check_alone(&tokens)?;
    check_pairs(&tokens, dialect)
}

/// Refuses statements that name the platform's tables, or functions that reach around the gate. It looks at every
/// word of the text, quoted or not, because some functions take names and statements as strings.
pub fn check_platform_names(statement: &str, dialect: Dialect) -> Result<(), SqlError> {
    let lower = statement.to_ascii_lowercase();
    if dialect == Dialect::Postgres && lower.contains("u&\"") {
        return refuse("identifiers with Unicode escapes (`U&\"...\"`) are not allowed");
    }
    match lower.split(|c: char| !(c.is_alphanumeric() || c == '_')).find(|word| is_platform_name(word, dialect)) {
        Some(word) => {
            refuse(format!("`{word}` is not for workers; if it is part of a value, pass the value as a parameter ($1)"))
        }
        None => Ok(()),
    }
}

/// Whether a statement that passed [`check_statement`] can change rows; the databases count the rows of one that only
/// reads in different ways.
pub fn changes_rows(statement: &str, dialect: Dialect) -> bool {
    let tokens = tokens(statement, dialect).unwrap_or_default();
    let before = std::iter::once(None).chain(tokens.iter().map(Some));
    let changes = ["insert", "update", "delete", "merge"];
    // `for update` and `for no key update` lock rows.
    before.zip(&tokens).any(|(before, token)| {
        changes.iter().any(|word| token.is(word)) && !before.is_some_and(|before| before.is("for") || before.is("key"))
    })
}

/// The highest n of the placeholders `$n` of a statement that passed [`check_statement`].
pub fn highest_placeholder(statement: &str, dialect: Dialect) -> usize {
    let tokens = tokens(statement, dialect).unwrap_or_default();
    let numbers = tokens.iter().map(|token| if let Token::Placeholder(number) = token { *number } else { 0 });
    usize::from(numbers.max().unwrap_or(0))
}

fn is_platform_name(word: &str, dialect: Dialect) -> bool {
    match dialect {
        Dialect::Sqlite => SQLITE_NAMES.iter().any(|name| word.starts_with(name)),
        Dialect::Postgres => {
            let reserved = POSTGRES_NAMES.iter().any(|name| word.starts_with(name));
            word == "oncely" || (reserved && !POSTGRES_HARMLESS.contains(&word))
        }
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T, SqlError> {
    Err(SqlError::NotAllowed(why.into()))
}

/// A piece of a statement. Comments and white space are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// A keyword, a name or a number, in lower case.
    Word(String),
    /// A string, or a name in quotes.
    Quoted,
    /// `$1` and so on.
    Placeholder(u16),
    Symbol(char),
}

impl Token {
    fn is(&self, word: &str) -> bool {
        matches!(self, Token::Word(own) if own == word)
    }
}

fn check_first_word(tokens: &[Token]) -> Result<(), SqlError> {
    let what = match tokens.iter().find(|token| **token != Token::Symbol('(')) {
        Some(Token::Word(word)) if ALLOWED.contains(&word.as_str()) => return Ok(()),
        Some(Token::Word(word)) => format!("`{word}`"),
        Some(_) => "a statement that begins like this".to_owned(),
        None => "an empty statement".to_owned(),
    };
    refuse(format!("{what} is not allowed; a worker may run: {}", ALLOWED.join(", ")))
}

fn check_alone(tokens: &[Token]) -> Result<(), SqlError> {
    let mut after_the_end = tokens.iter().skip_while(|token| **token != Token::Symbol(';'));
    if after_the_end.any(|token| *token != Token::Symbol(';')) {
        return refuse("several statements in one are not allowed; run them one by one");
    }
    Ok(())
}

fn check_pairs(tokens: &[Token], dialect: Dialect) -> Result<(), SqlError> {
    let before = std::iter::once(None).chain(tokens.iter().map(Some));
    for (before, token) in before.zip(tokens) {
        // SQLite ends the whole transaction on `insert or rollback`, and nothing but the text shows it.
        if token.is("rollback") && before.is_some_and(|before| before.is("or")) {
            return refuse("`or rollback` would end the delivery's transaction");
        }
        let takes_rows = before.is_some_and(|before| before.is("insert") || before.is("merge"));
        if dialect == Dialect::Postgres && token.is("into") && !takes_rows {
            return refuse("`select into` makes a table; tables are made by the worker's migrations");
        }
    }
    Ok(())
}

fn tokens(statement: &str, dialect: Dialect) -> Result<Vec<Token>, SqlError> {
    let mut tokens = Vec::new();
    let mut rest = skip_blank(statement, dialect)?;
    while let Some(first) = rest.chars().next() {
        let (token, after) = match dialect {
            Dialect::Sqlite => sqlite_token(first, rest)?,
            Dialect::Postgres => postgres_token(first, rest)?,
        };
        tokens.push(token);
        rest = skip_blank(after, dialect)?;
    }
    Ok(tokens)
}

fn sqlite_token(first: char, rest: &str) -> Result<(Token, &str), SqlError> {
    match first {
        '\'' | '"' | '`' => Ok((Token::Quoted, after_quoted(rest, first)?)),
        '[' => match rest.split_once(']') {
            Some((_, after)) => Ok((Token::Quoted, after)),
            None => refuse("a name in brackets has no end"),
        },
        '$' => {
            let (name, after) = split_word(tail(rest), |c| c.is_alphanumeric() || c == '_' || c == '$');
            // `$0` and names have no parameter; `$1::t` and `$1(t)` are read as names of parameters by SQLite.
            match name.parse() {
                Ok(number) if number > 0 && !after.starts_with("::") && !after.starts_with('(') => {
                    Ok((Token::Placeholder(number), after))
                }
                _ => {
                    refuse(format!("`${name}` is not a placeholder; write $1, $2, ... and casts as `cast($1 as text)`"))
                }
            }
        }
        '?' | ':' | '@' | '#' => refuse(format!("`{first}` placeholders are not allowed; write $1, $2, ...")),
        _ => Ok(word_or_symbol(first, rest)),
    }
}

fn postgres_token(first: char, rest: &str) -> Result<(Token, &str), SqlError> {
    match first {
        '\'' | '"' => Ok((Token::Quoted, after_quoted(rest, first)?)),
        'e' | 'E' if tail(rest).starts_with('\'') => {
            let after = after_escaped(tail(rest))?;
            // A string on the next line would continue this one, with its escapes.
            if skip_blank(after, Dialect::Postgres)?.starts_with('\'') {
                return refuse("strings that continue on the next line are not allowed");
            }
            Ok((Token::Quoted, after))
        }
        '$' => {
            let (tag, after) = split_word(tail(rest), |c| c.is_alphanumeric() || c == '_');
            match after.strip_prefix('$') {
                Some(body) if !tag.starts_with(|c: char| c.is_ascii_digit()) => {
                    match body.split_once(&format!("${tag}$")) {
                        Some((_, after)) => Ok((Token::Quoted, after)),
                        None => refuse("a dollar-quoted string has no end"),
                    }
                }
                _ => Ok((Token::Placeholder(tag.parse().unwrap_or_default()), after)),
            }
        }
        _ => Ok(word_or_symbol(first, rest)),
    }
}

fn word_or_symbol(first: char, rest: &str) -> (Token, &str) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
    if !is_word(first) {
        return (Token::Symbol(first), tail(rest));
    }
    let (word, after) = split_word(rest, is_word);
    (Token::Word(word.to_ascii_lowercase()), after)
}

fn split_word(text: &str, is_word: impl Fn(char) -> bool) -> (&str, &str) {
    let end = text.find(|c| !is_word(c)).unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or((text, ""))
}

/// What follows a string or name in quotes; the quote doubled stands for itself.
fn after_quoted(text: &str, quote: char) -> Result<&str, SqlError> {
    let mut rest = tail(text);
    loop {
        match rest.split_once(quote) {
            Some((_, after)) if after.starts_with(quote) => rest = tail(after),
            Some((_, after)) => return Ok(after),
            None => return refuse(format!("a quoted text has no closing {quote}")),
        }
    }
}

/// What follows a string in which a backslash takes the meaning from the next character.
fn after_escaped(text: &str) -> Result<&str, SqlError> {
    let mut rest = tail(text);
    loop {
        let Some(at) = rest.find(['\'', '\\']) else { return refuse("a quoted text has no closing '") };
        let found = rest.get(at..).unwrap_or_default();
        let after = tail(found);
        rest = if found.starts_with('\\') || after.starts_with('\'') { tail(after) } else { return Ok(after) };
    }
}

/// Everything behind the first character.
fn tail(text: &str) -> &str {
    let mut chars = text.chars();
    chars.next();
    chars.as_str()
}

/// Skips white space and comments.
fn skip_blank(mut rest: &str, dialect: Dialect) -> Result<&str, SqlError> {
    let line_ends: &[char] = match dialect {
        Dialect::Postgres => &['\n', '\r'],
        Dialect::Sqlite => &['\n'],
    };
    loop {
        rest = rest.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c', '\u{feff}']);
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.split_once(line_ends).map_or("", |(_, after)| after);
        } else if let Some(comment) = rest.strip_prefix("/*") {
            rest = skip_block_comment(comment, dialect)?;
        } else {
            return Ok(rest);
        }
    }
}

/// Skips a block comment whose beginning is behind us. They nest on PostgreSQL only.
fn skip_block_comment(mut rest: &str, dialect: Dialect) -> Result<&str, SqlError> {
    let mut depth = 1_usize;
    while depth > 0 {
        if let Some(after) = rest.strip_prefix("*/") {
            depth -= 1;
            rest = after;
        } else if let Some(after) = rest.strip_prefix("/*")
            && dialect == Dialect::Postgres
        {
            depth += 1;
            rest = after;
        } else if rest.is_empty() {
            return refuse("a comment has no end");
        } else {
            rest = tail(rest);
        }
    }
    Ok(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Dialect; 2] = [Dialect::Postgres, Dialect::Sqlite];

    fn refused(check: fn(&str, Dialect) -> Result<(), SqlError>, statement: &str, dialect: Dialect) {
        assert!(matches!(check(statement, dialect), Err(SqlError::NotAllowed(_))), "{dialect:?}: {statement}");
    }

    #[test]
    fn data_statements_pass_however_they_are_dressed() {
        for statement in [
            "select 1",
            "  /* a comment */ -- and a line\n Select 1;",
            "(select 1) union (select 2) ; ;",
            "with x as (select 1) insert into t select * from x",
            "insert into t values ($1, 'it''s; commit', \"or\") on conflict do nothing",
            "values (1)",
            "select 'or rollback' -- or rollback",
        ] {
            for dialect in BOTH {
                assert_eq!(check_statement(statement, dialect), Ok(()), "{dialect:?}: {statement}");
            }
        }
        for statement in ["/* a /* nested */ comment */ select 1", "select $x$ ; into $x$, E'\\'; into', $1::text"] {
            assert_eq!(check_statement(statement, Dialect::Postgres), Ok(()), "{statement}");
        }
    }

    #[test]
    fn everything_that_could_leave_the_transaction_is_refused() {
        for statement in [
            "",
            ";commit",
            "commit",
            "/**/ COMMIT and chain",
            "rollback",
            "end",
            "begin",
            "savepoint a",
            "release a",
            "set role none",
            "reset all",
            "prepare transaction 'x'",
            "do $$ begin commit; end $$",
            "copy t to program 'sh'",
            "create table t (a int)",
            "pragma journal_mode",
            "attach 'x' as y",
            "insert or rollback into t values (1)",
            "insert or /* hidden */ Rollback into t values (1)",
            "insert or -- hidden\n Rollback into t values (1)",
            "update OR\nROLLBACK t set a = 1",
            "explain select 1",
            "call p()",
            "select 1; commit",
            "select ';'; commit",
            "select 1 /* ; */; /* ; */ commit",
            "select 1\0",
        ] {
            for dialect in BOTH {
                refused(check_statement, statement, dialect);
            }
        }
    }

    #[test]
    fn comments_and_quotes_are_read_as_the_database_reads_them() {
        for statement in [
            "/* /* */ commit -- */ select 1",
            "-- \r select 1 \n commit",
            "insert or -- \r x \n rollback into t values (1)",
            "insert or \u{feff}rollback into t values (1)",
            "select [']; commit --']",
            "select `'`; commit --'",
            "select E'\\'; commit --'",
            "select $0",
            "select $a",
            "select ?",
            "select :a",
            "select $1(; commit)",
        ] {
            refused(check_statement, statement, Dialect::Sqlite);
        }
        for statement in [
            "/* /* */ select 1 */ commit",
            "-- \r commit \n select 1",
            "select 1 into t",
            "select 1 into temp t",
            "select E'\\''\n'\\' into t --'",
        ] {
            refused(check_statement, statement, Dialect::Postgres);
        }
    }

    #[test]
    fn the_platforms_names_are_refused_however_they_are_written() {
        for statement in [
            "select * from oncely.inbox",
            "select * from \"oncely\" . inbox",
            "select * from ONCELY/**/.inbox",
            "select * from U&\"\\006fncely\".inbox",
            "select query_to_xml('select 1', true, true, '')",
            "select set_config('role', 'none', true)",
            "update pg_settings set setting = 'none' where name = 'role'",
            "select pg_advisory_lock(42)",
        ] {
            refused(check_platform_names, statement, Dialect::Postgres);
        }
        for statement in [
            "select * from oncely_inbox",
            "select * from [Oncely_Inbox]",
            "select * from 'oncely_inbox'",
            "select * from sqlite_schema",
            "select * from pragma_database_list",
        ] {
            refused(check_platform_names, statement, Dialect::Sqlite);
        }
        assert_eq!(check_platform_names("select pg_typeof(oncely_id) from t", Dialect::Postgres), Ok(()));
        assert_eq!(check_platform_names("select my_oncely_id, oncely from t", Dialect::Sqlite), Ok(()));
    }
}
