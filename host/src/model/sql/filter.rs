//! The statement filter for guest SQL: one data statement, and no names of the platform.

use std::collections::HashSet;

use super::functions::Functions;
use super::lexer::{Token, refuse, tokens};
use super::{Dialect, SqlError};

/// The longest text of a statement, in bytes, without its parameters. A longer one is refused
/// before it is parsed.
pub const STATEMENT_BYTES_MAX: usize = 256 << 10;

/// The words with which a guest's statement may begin.
const ALLOWED: [&str; 7] = [
    "select", "insert", "update", "delete", "merge", "values", "with",
];

/// Prefixes of names on SQLite that belong to the platform or bypass it.
const SQLITE_NAMES: [&str; 3] = ["oncely_", "sqlite_", "pragma_"];
/// The schemas of the platform on PostgreSQL.
const POSTGRES_SCHEMAS: [&str; 2] = ["oncely", "oncely_definer"];
/// The prefix of PostgreSQL's own catalog, which exposes other sessions, settings and secrets.
const POSTGRES_CATALOG: &str = "pg_";
/// Harmless names with the prefix [`POSTGRES_CATALOG`].
const POSTGRES_CATALOG_ALLOWED: [&str; 2] = ["pg_catalog", "pg_typeof"];

/// Facts that follow from the text of a statement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StatementFacts {
    /// Whether it can change rows. The databases differ in the row count of a read-only statement.
    pub changes_rows: bool,
    /// The highest n of its placeholders `$n`; zero without placeholders.
    pub highest_placeholder: usize,
}

impl StatementFacts {
    /// The facts of any statement, also of one that the filter refuses. An unreadable statement has
    /// the default facts.
    pub fn of(statement: &str, dialect: Dialect) -> Self {
        StatementFacts::from_tokens(&tokens(statement, dialect).unwrap_or_default(), dialect)
    }

    fn from_tokens(tokens: &[Token], dialect: Dialect) -> Self {
        let numbers = tokens.iter().map(|token| {
            if let Token::Placeholder(number) = token {
                *number
            } else {
                0
            }
        });
        let highest_placeholder = usize::from(numbers.max().unwrap_or(0));
        StatementFacts {
            changes_rows: changes_rows(tokens, dialect),
            highest_placeholder,
        }
    }
}

/// Allows one data statement and nothing else. Transaction control, DDL, settings, commands and
/// names of the platform are refused. On PostgreSQL, so are functions that `functions` does not
/// allow.
///
/// The databases parse comments, white space and quotes differently, so the text is parsed by the
/// rules of `dialect`. A comment in one of them may be a `commit` in the other.
///
/// # Errors
///
/// Returns [`SqlError::TooLarge`] or [`SqlError::NotAllowed`].
pub fn check_statement(
    statement: &str,
    dialect: Dialect,
    functions: Option<&Functions>,
) -> Result<StatementFacts, SqlError> {
    check_length(statement)?;
    if statement.contains('\0') {
        return refuse("a statement cannot contain a NUL character");
    }

    // One data statement that cannot leave the transaction.
    let tokens = tokens(statement, dialect)?;
    check_first_word(&tokens)?;
    check_single(&tokens)?;
    check_rollback(&tokens)?;
    if dialect == Dialect::Postgres {
        check_into(&tokens)?;
    }

    // No names of the platform, and allowed functions only.
    check_platform_names(statement, dialect)?;
    if let Some(functions) = functions {
        functions.check(&tokens)?;
    }
    Ok(StatementFacts::from_tokens(&tokens, dialect))
}

/// Checks that a statement has as many parameters as placeholders.
///
/// # Errors
///
/// Returns [`SqlError::InvalidParameter`] if it has fewer or more.
pub fn check_count(facts: &StatementFacts, parameters: usize) -> Result<(), SqlError> {
    if facts.highest_placeholder == parameters {
        return Ok(());
    }
    Err(SqlError::InvalidParameter(format!(
        "the statement has placeholders up to ${}, but {parameters} parameters were passed",
        facts.highest_placeholder
    )))
}

/// Checks the length of a statement, before any other work on it.
///
/// # Errors
///
/// Returns [`SqlError::TooLarge`] if it is longer than [`STATEMENT_BYTES_MAX`].
pub fn check_length(statement: &str) -> Result<(), SqlError> {
    if statement.len() <= STATEMENT_BYTES_MAX {
        return Ok(());
    }
    Err(SqlError::TooLarge(format!(
        "the statement has {} bytes; at most {STATEMENT_BYTES_MAX} are allowed; pass values as \
         parameters ($1)",
        statement.len()
    )))
}

/// Refuses statements that name the platform's tables or the catalog. Every word of the text is
/// checked, quoted or not. A name may also stand in a string, as in `'oncely.outbox'::regclass`.
fn check_platform_names(statement: &str, dialect: Dialect) -> Result<(), SqlError> {
    let lower = statement.to_ascii_lowercase();
    match lower
        .split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .find(|word| is_platform_name(word, dialect))
    {
        Some(word) => refuse(format!(
            "`{word}` is not available to workers; if it is part of a value, pass the value as a \
             parameter ($1)"
        )),
        None => Ok(()),
    }
}

fn is_platform_name(word: &str, dialect: Dialect) -> bool {
    match dialect {
        Dialect::Sqlite => SQLITE_NAMES.iter().any(|name| word.starts_with(name)),
        Dialect::Postgres => {
            let is_catalog =
                word.starts_with(POSTGRES_CATALOG) && !POSTGRES_CATALOG_ALLOWED.contains(&word);
            is_catalog || POSTGRES_SCHEMAS.contains(&word)
        }
    }
}

fn changes_rows(tokens: &[Token], dialect: Dialect) -> bool {
    let changes = ["insert", "update", "delete", "merge"];
    tokens.iter().enumerate().any(|(at, token)| {
        let before = at.checked_sub(1).and_then(|before| tokens.get(before));
        // `for update` and `for no key update` only lock rows.
        let locks = before.is_some_and(|before| before.is("for") || before.is("key"));
        // `replace` is also a function.
        let replaces = dialect == Dialect::Sqlite
            && token.is("replace")
            && tokens.get(at + 1).is_some_and(|after| after.is("into"));
        replaces || (!locks && changes.iter().any(|word| token.is(word)))
    })
}

fn check_first_word(tokens: &[Token]) -> Result<(), SqlError> {
    let first = match tokens.iter().find(|token| **token != Token::Symbol('(')) {
        Some(Token::Word(word)) if ALLOWED.contains(&word.as_str()) => return Ok(()),
        Some(Token::Word(word)) => format!("`{word}`"),
        Some(_) => "a statement that begins like this".to_owned(),
        None => "an empty statement".to_owned(),
    };
    refuse(format!(
        "{first} is not allowed; a worker may run: {}",
        ALLOWED.join(", ")
    ))
}

fn check_single(tokens: &[Token]) -> Result<(), SqlError> {
    let mut after_the_end = tokens
        .iter()
        .skip_while(|token| **token != Token::Symbol(';'));
    if after_the_end.any(|token| *token != Token::Symbol(';')) {
        return refuse("several statements in one are not allowed; run them one at a time");
    }
    Ok(())
}

/// SQLite ends the whole transaction on `insert or rollback`, which only the text reveals.
fn check_rollback(tokens: &[Token]) -> Result<(), SqlError> {
    if tokens
        .windows(2)
        .any(|pair| matches!(pair, [or, rollback] if or.is("or") && rollback.is("rollback")))
    {
        return refuse("`or rollback` would end the delivery's transaction");
    }
    Ok(())
}

/// Refuses PostgreSQL's `select ... into`. The words `insert` and `merge` can be names of columns
/// and of results. So `into` may follow them only where a statement begins.
fn check_into(tokens: &[Token]) -> Result<(), SqlError> {
    let closing = closing(tokens);
    // The main words of all statements, nested ones included.
    let begins = std::iter::once(0).chain(positions(tokens, &Token::Symbol('(')).map(|at| at + 1));
    let verbs: HashSet<usize> = begins
        .filter_map(|at| main_word(tokens, &closing, at))
        .collect();

    // Each `into` must be a name, or follow one of those words.
    for at in positions(tokens, &Token::Word("into".to_owned())) {
        let Some(before) = at.checked_sub(1) else {
            continue;
        };
        let Some(word) = tokens.get(before) else {
            continue;
        };
        let is_name = *word == Token::Symbol('.') || is_keyword_as(tokens, before);
        let takes_rows = (word.is("insert") || word.is("merge")) && verbs.contains(&before);
        if !is_name && !takes_rows {
            return refuse(
                "`select into` creates a table; tables are created by the worker's migrations",
            );
        }
    }
    Ok(())
}

/// Whether the word at `at` is the keyword `as`, which a name follows. After a dot or after the
/// keyword, `as` is itself a name: `select t.as`, `select 1 as as`.
fn is_keyword_as(tokens: &[Token], at: usize) -> bool {
    let words = tokens.get(..=at).unwrap_or_default();
    let run = words.iter().rev().take_while(|word| word.is("as")).count();
    let is_after_dot = words
        .len()
        .checked_sub(run + 1)
        .is_some_and(|before| tokens.get(before) == Some(&Token::Symbol('.')));
    // Of a run, every other word is the keyword. After a dot, the first word is a name.
    run > 0 && (run % 2 == 0) == is_after_dot
}

fn positions<'t>(tokens: &'t [Token], wanted: &'t Token) -> impl Iterator<Item = usize> + 't {
    tokens
        .iter()
        .enumerate()
        .filter(move |(_, token)| *token == wanted)
        .map(|(at, _)| at)
}

/// For each opening parenthesis, the position after its closing one.
fn closing(tokens: &[Token]) -> Vec<usize> {
    let mut closing = vec![tokens.len(); tokens.len()];
    let mut open = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Symbol('(') => open.push(at),
            Token::Symbol(')') => {
                if let Some(place) = open.pop().and_then(|opened: usize| closing.get_mut(opened)) {
                    *place = at + 1;
                }
            }
            _ => {}
        }
    }
    closing
}

/// The position of the main word of the statement that begins at `at`, after its `with` clause.
fn main_word(tokens: &[Token], closing: &[usize], at: usize) -> Option<usize> {
    let is = |at: usize, word: &str| tokens.get(at).is_some_and(|token| token.is(word));
    let opens = |at: usize| tokens.get(at) == Some(&Token::Symbol('('));
    let comma = |at: usize| tokens.get(at) == Some(&Token::Symbol(','));
    if !is(at, "with") {
        return Some(at);
    }
    let mut at = at + 1;
    // A query may be named `recursive`.
    if is(at, "recursive") && !is(at + 1, "as") && !opens(at + 1) {
        at += 1;
    }

    // Skip each named query: name, columns, `as`, modifiers, text, clauses.
    loop {
        at += 1;
        if opens(at) {
            at = *closing.get(at)?;
        }
        if !is(at, "as") {
            return None;
        }
        at += 1;
        at += usize::from(is(at, "not"));
        at += usize::from(is(at, "materialized"));
        if !opens(at) {
            return None;
        }
        at = *closing.get(at)?;
        // `search depth first by a, b set c`
        if is(at, "search") {
            at += 5;
            while comma(at) {
                at += 2;
            }
            at += 2;
        }
        // `cycle a, b set c to 1 default 0 using d`
        if is(at, "cycle") {
            let is_paren = |token: &&Token| matches!(token, Token::Symbol('(' | ')'));
            let clause = tokens.iter().skip(at).take_while(|token| !is_paren(token));
            at += clause.take_while(|token| !token.is("using")).count() + 2;
        }
        if !comma(at) {
            return Some(at);
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Dialect; 2] = [Dialect::Postgres, Dialect::Sqlite];

    fn check(statement: &str, dialect: Dialect) -> Result<(), SqlError> {
        check_statement(statement, dialect, None).map(|_| ())
    }

    fn refused(statement: &str, dialect: Dialect) {
        let checked = check(statement, dialect);
        assert!(
            matches!(checked, Err(SqlError::NotAllowed(_))),
            "{dialect:?}: {statement}: {checked:?}"
        );
    }

    #[test]
    fn data_statements_pass_in_any_spelling() {
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
                assert_eq!(
                    check(statement, dialect),
                    Ok(()),
                    "{dialect:?}: {statement}"
                );
            }
        }
        for statement in [
            "/* a /* nested */ comment */ select 1",
            "select $x$ ; into $x$, E'\\'; into', $1::text",
        ] {
            assert_eq!(check(statement, Dialect::Postgres), Ok(()), "{statement}");
        }
    }

    #[test]
    fn statements_that_could_leave_the_transaction_are_refused() {
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
                refused(statement, dialect);
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
            refused(statement, Dialect::Sqlite);
        }
        for statement in [
            "/* /* */ select 1 */ commit",
            "-- \r commit \n select 1",
            "select 1 into t",
            "select 1 into temp t",
            "select E'\\''\n'\\' into t --'",
            // Names that are keywords of statements.
            "select x.insert into t from (select 1 as insert) x",
            "select x.merge into t from (select 1 as merge) x",
            "select 1 merge into t",
            "select 1 insert into t",
            "select (1) merge into t",
            "(select 1 merge into t)",
            "select 1, merge into t from m",
            "with insert as (select 1) select 1 insert into t",
            "with recursive as (select 1) select 1 merge into t",
            "with a as (select 1) search depth first by b set c select 1 insert into t",
            "with a as (select 1) cycle b set c using d select 1 merge into t",
            "select 1 as a into t",
            "select * into t from u",
            // `as` that is a name.
            "select 1 as as into t",
            "select 1 as/* */As into temp t",
            "select 1 as x, 2 as as into t",
            "select x.as into t from (select 1 as \"as\") x",
            "select x . as into t from (select 1 as \"as\") x",
            "select (x).as into t from x",
            "select x.as as as into t from x",
            "select 1 as \"as\" into t",
            "select \"as\" into t from x",
            "select 1\u{feff}merge into t",
            // Tags, numbers and operators.
            "select 1 as a, $\u{a0}$ ' $\u{a0}$ into t --'",
            "select 1 as a, $\u{1f980}x$ ' $\u{1f980}x$ into t --'",
            "select 1as into t",
            "select 1e5into t",
            "select 1.into t",
            "select $1into t",
            "select 1 as a into\u{b}t",
            "select +--\n 1 as a into t",
            "select 1 */* */ 1 as a into t",
            "select U&'\\' as a into t --'",
            "select b'1' as a into t",
            "select n'\\' as a into t --'",
        ] {
            refused(statement, Dialect::Postgres);
        }
        for statement in [
            "insert into t select 1 as into",
            "select t.into from t",
            "select 1 as as, t.as as into from t",
            "with a as (insert into t values (1) returning b) merge into u using a on a.b = u.b when matched then do nothing",
            "with recursive a (b) as not materialized (select 1), c as (select 2) insert into t select * from a",
            "with recursive a as (select 1 union select 2 from a) search breadth first by b, c set d insert into t select 1",
            "with recursive a as (select 1) cycle b, c set d to 1 default 0 using e merge into t using a on true when matched \
             then do nothing",
            "select 0x1f, 1e-5, 1.5, .5, 1_000, 0b1 from t where a->>'b' = $1 and c @> $2::jsonb",
        ] {
            assert_eq!(check(statement, Dialect::Postgres), Ok(()), "{statement}");
        }
    }

    #[test]
    fn the_platforms_names_are_refused_however_they_are_written() {
        for statement in [
            "select * from oncely.inbox",
            "select * from \"oncely\" . inbox",
            "select * from ONCELY/**/.inbox",
            "select * from U&\"\\006fncely\".inbox",
            "select oncely_definer.release_claims($1, $2, $3)",
            "select \"oncely_definer\" . guard()",
            "select 'oncely.outbox'::regclass",
            "update pg_settings set setting = 'none' where name = 'role'",
            "select pg_advisory_lock(42)",
        ] {
            refused(statement, Dialect::Postgres);
        }
        for statement in [
            "select * from oncely_inbox",
            "select * from [Oncely_Inbox]",
            "select * from 'oncely_inbox'",
            "select * from sqlite_schema",
            "select * from pragma_database_list",
        ] {
            refused(statement, Dialect::Sqlite);
        }
        assert_eq!(
            check("select pg_typeof(oncely_id) from t", Dialect::Postgres),
            Ok(())
        );
        assert_eq!(
            check("select my_oncely_id, oncely from t", Dialect::Sqlite),
            Ok(())
        );
    }

    #[test]
    fn a_text_that_is_too_long_is_refused_before_parsing() {
        let long = format!("select 1{}", ";".repeat(8 << 20));
        for dialect in BOTH {
            let began = std::time::Instant::now();
            assert!(matches!(check(&long, dialect), Err(SqlError::TooLarge(_))));
            assert!(began.elapsed() < std::time::Duration::from_millis(100));
        }
    }

    /// Deep nesting, long runs and many words are parsed in time proportional to their length.
    #[test]
    fn the_longest_allowed_texts_are_parsed_quickly() {
        let repeat = |piece: &str| piece.repeat((STATEMENT_BYTES_MAX - 10) / piece.len());
        let pieces = [
            ";",
            "(",
            "(with a as ",
            "(with a as () cycle ",
            "(with a as () search depth first by b, ",
            "1",
            ".",
            "a.",
            "/*",
            "-",
            "'",
            "e'\n",
            "$a$",
            "$",
            "into ",
            "insert into ",
            "f(",
            "x.f(",
            "nextval('a'",
            "\"\"",
            "\u{1f980}",
            "oncely_",
        ];
        for piece in pieces {
            for dialect in BOTH {
                let text = format!("select {}", repeat(piece));
                let began = std::time::Instant::now();
                let _ = check(&text, dialect);
                assert!(
                    began.elapsed() < std::time::Duration::from_secs(2),
                    "{dialect:?}: {piece}: {:?}",
                    began.elapsed()
                );
            }
        }
    }

    #[test]
    fn statements_that_change_rows_are_detected_by_keyword() {
        let changes = |statement, dialect| StatementFacts::of(statement, dialect).changes_rows;
        for dialect in BOTH {
            assert!(changes(
                "with a as (select 1) insert into t select * from a",
                dialect
            ));
            assert!(!changes("select * from t for update", dialect));
            assert!(!changes("select replace('into', 'a', 'b')", dialect));
        }
        assert!(changes(
            "with a as (select 1) replace into t select * from a",
            Dialect::Sqlite
        ));
        assert!(changes(
            "with a as (select 1) Replace /* */ Into t select * from a",
            Dialect::Sqlite
        ));
    }
}
