//! The tokens of a statement, by the rules of the database that runs it.
//!
//! PostgreSQL's rules are those of its `scan.l`, with `standard_conforming_strings` on, as at the
//! beginning of every guest's transaction. Where versions of PostgreSQL differ, the statement is
//! refused or parsed so that no word is hidden.

use super::{Dialect, SqlError};

/// PostgreSQL truncates longer names, at a character boundary.
const NAME_BYTES_MAX: usize = 63;

/// A token of a statement. Comments and white space are skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// A keyword or an unquoted name, in lower case. On SQLite also a number.
    Word(String),
    /// A quoted name, without its quotes.
    Name(String),
    /// A string in plain quotes, as it stands between them.
    Text(String),
    /// A string with escapes, in dollar quotes, or of bits. On SQLite any quoted text.
    Quoted,
    Number,
    /// A placeholder, such as `$1`.
    Placeholder(u16),
    /// A run of operator characters.
    Operator(String),
    Symbol(char),
}

impl Token {
    pub(super) fn is(&self, word: &str) -> bool {
        matches!(self, Token::Word(own) if own == word)
    }

    /// A name as PostgreSQL resolves it, quoted or not.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Token::Word(name) | Token::Name(name) => Some(name),
            _ => None,
        }
    }
}

pub(super) fn refuse<T>(why: impl Into<String>) -> Result<T, SqlError> {
    Err(SqlError::NotAllowed(why.into()))
}

/// Splits a statement into its tokens. Refuses text that cannot be read with certainty.
pub(super) fn tokens(statement: &str, dialect: Dialect) -> Result<Vec<Token>, SqlError> {
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
        '\'' | '"' | '`' => Ok((Token::Quoted, split_quoted(rest, first)?.1)),
        '[' => match rest.split_once(']') {
            Some((_, after)) => Ok((Token::Quoted, after)),
            None => refuse("unterminated name in brackets"),
        },
        '$' => {
            let (name, after) =
                split_word(tail(rest), |c| c.is_alphanumeric() || c == '_' || c == '$');
            // `$0` and names have no parameter. SQLite reads `$1::t` and `$1(t)` as names of
            // parameters.
            match name.parse() {
                Ok(number) if number > 0 && !after.starts_with("::") && !after.starts_with('(') => {
                    Ok((Token::Placeholder(number), after))
                }
                _ => refuse(format!(
                    "`${name}` is not a placeholder; write $1, $2, ... and casts as `cast($1 as text)`"
                )),
            }
        }
        '?' | ':' | '@' | '#' => refuse(format!(
            "`{first}` placeholders are not allowed; write $1, $2, ..."
        )),
        _ if is_word(first) => {
            let (word, after) = split_word(rest, is_word);
            Ok((Token::Word(word.to_ascii_lowercase()), after))
        }
        _ => Ok((Token::Symbol(first), tail(rest))),
    }
}

fn postgres_token(first: char, rest: &str) -> Result<(Token, &str), SqlError> {
    match first {
        '\'' => {
            let (text, after) = split_quoted(rest, '\'')?;
            Ok((Token::Text(text.to_owned()), after))
        }
        '"' => {
            let (name, after) = split_quoted(rest, '"')?;
            Ok((
                Token::Name(truncate_name(&name.replace("\"\"", "\"")).to_owned()),
                after,
            ))
        }
        'e' | 'E' if tail(rest).starts_with('\'') => {
            let after = after_escaped(tail(rest))?;
            // A string on the next line would continue this one, with its escapes.
            if skip_blank(after, Dialect::Postgres)?.starts_with('\'') {
                return refuse("strings that continue on the next line are not allowed");
            }
            Ok((Token::Quoted, after))
        }
        'u' | 'U' if tail(rest).starts_with("&\"") => {
            refuse("identifiers with Unicode escapes (`U&\"...\"`) are not allowed")
        }
        'u' | 'U' if tail(rest).starts_with("&'") => {
            Ok((Token::Quoted, split_quoted(tail(tail(rest)), '\'')?.1))
        }
        'b' | 'B' | 'x' | 'X' | 'n' | 'N' if tail(rest).starts_with('\'') => {
            Ok((Token::Quoted, split_quoted(tail(rest), '\'')?.1))
        }
        '$' => dollar(rest),
        '0'..='9' => number(rest),
        '.' if tail(rest).starts_with(|c: char| c.is_ascii_digit()) => number(rest),
        _ if is_operator(first) => {
            let end = operator_end(rest);
            let (operator, after) = rest.split_at_checked(end).unwrap_or((rest, ""));
            Ok((Token::Operator(operator.to_owned()), after))
        }
        _ if is_word_start(first) => {
            let (word, after) = split_word(rest, is_word);
            Ok((
                Token::Word(truncate_name(&word.to_ascii_lowercase()).to_owned()),
                after,
            ))
        }
        _ if first.is_ascii_control() => refuse(format!(
            "a statement cannot contain the character {first:?}"
        )),
        _ => Ok((Token::Symbol(first), tail(rest))),
    }
}

/// A placeholder, or a string in dollar quotes.
fn dollar(rest: &str) -> Result<(Token, &str), SqlError> {
    let (digits, after) = split_word(tail(rest), |c| c.is_ascii_digit());
    if !digits.is_empty() {
        return match digits.parse() {
            Ok(number) if !after.starts_with(is_word_start) => {
                Ok((Token::Placeholder(number), after))
            }
            _ => refuse(format!(
                "`${digits}` is not a placeholder; write $1, $2, ... up to $65535"
            )),
        };
    }
    let (tag, after) = split_word(tail(rest), |c| is_word_start(c) || c.is_ascii_digit());
    let Some(body) = after.strip_prefix('$') else {
        return refuse("`$` begins neither a placeholder nor a string");
    };
    match body.split_once(&format!("${tag}$")) {
        Some((_, after)) => Ok((Token::Quoted, after)),
        None => refuse("unterminated dollar-quoted string"),
    }
}

/// A number, in any notation. A word right after it is refused, which PostgreSQL 15 does as well.
fn number(rest: &str) -> Result<(Token, &str), SqlError> {
    let is_prefixed = ["0x", "0X", "0o", "0O", "0b", "0B"]
        .iter()
        .any(|prefix| rest.starts_with(prefix));
    let (mut end, mut before, mut has_point) = (0, '0', false);
    for (at, c) in rest.char_indices() {
        let is_point = c == '.' && !has_point;
        let is_sign = matches!(c, '+' | '-') && matches!(before, 'e' | 'E') && !is_prefixed;
        if !(c.is_ascii_alphanumeric() || c == '_' || is_point || is_sign) {
            break;
        }
        (end, before, has_point) = (at + c.len_utf8(), c, has_point || is_point);
    }
    let (number, after) = rest.split_at_checked(end).unwrap_or((rest, ""));
    let letters = number.chars().filter(char::is_ascii_alphabetic).count();
    let is_whole = number.ends_with(|c: char| c.is_ascii_digit() || c == '.');
    let is_number =
        is_prefixed || is_whole && (letters == 0 || letters == 1 && number.contains(['e', 'E']));
    // Only PL/pgSQL reads `1..2` differently.
    if !is_number || has_point && after.starts_with('.') || after.starts_with(is_word_start) {
        return refuse(format!(
            "`{number}` is not a number; put a space between a number and a word"
        ));
    }
    Ok((Token::Number, after))
}

/// A name, truncated as PostgreSQL truncates it.
fn truncate_name(name: &str) -> &str {
    let end = (0..=NAME_BYTES_MAX)
        .rev()
        .find(|at| name.is_char_boundary(*at))
        .unwrap_or_default();
    if name.len() > NAME_BYTES_MAX {
        name.get(..end).unwrap_or(name)
    } else {
        name
    }
}

fn is_word_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn is_word(c: char) -> bool {
    is_word_start(c) || c.is_ascii_digit() || c == '$'
}

pub(super) fn is_operator(c: char) -> bool {
    "~!@#^&|`?+-*/%<>=".contains(c)
}

/// The end of a run of operator characters. A comment ends it, too.
fn operator_end(text: &str) -> usize {
    let run = text.find(|c| !is_operator(c)).unwrap_or(text.len());
    let run = text.get(..run).unwrap_or(text);
    let comment = ["--", "/*"]
        .iter()
        .filter_map(|begin| run.find(begin))
        .min();
    comment.unwrap_or(run.len())
}

fn split_word(text: &str, is_word: impl Fn(char) -> bool) -> (&str, &str) {
    let end = text.find(|c| !is_word(c)).unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or((text, ""))
}

/// Splits a quoted string or name from the text after it. The quotes are removed, but a doubled
/// quote inside stays doubled.
fn split_quoted(text: &str, quote: char) -> Result<(&str, &str), SqlError> {
    let inside = tail(text);
    let mut rest = inside;
    loop {
        match rest.split_once(quote) {
            Some((_, after)) if after.starts_with(quote) => rest = tail(after),
            Some((_, after)) => {
                let end = inside.len() - after.len() - quote.len_utf8();
                return Ok((inside.get(..end).unwrap_or_default(), after));
            }
            None => return refuse(format!("unterminated quoted text: missing {quote}")),
        }
    }
}

/// The text after a string in which a backslash escapes the next character.
fn after_escaped(text: &str) -> Result<&str, SqlError> {
    let mut rest = tail(text);
    loop {
        let Some(at) = rest.find(['\'', '\\']) else {
            return refuse("unterminated quoted text: missing '");
        };
        let found = rest.get(at..).unwrap_or_default();
        let after = tail(found);
        rest = if found.starts_with('\\') || after.starts_with('\'') {
            tail(after)
        } else {
            return Ok(after);
        };
    }
}

/// The text after its first character.
fn tail(text: &str) -> &str {
    let mut chars = text.chars();
    chars.next();
    chars.as_str()
}

/// Skips white space and comments. A vertical tab is white space since PostgreSQL 16. A byte order
/// mark is part of a word on PostgreSQL and white space on SQLite.
fn skip_blank(mut rest: &str, dialect: Dialect) -> Result<&str, SqlError> {
    let (blank, line_ends): (&[char], &[char]) = match dialect {
        Dialect::Postgres => (&[' ', '\t', '\n', '\r', '\x0b', '\x0c'], &['\n', '\r']),
        Dialect::Sqlite => (
            &[' ', '\t', '\n', '\r', '\x0b', '\x0c', '\u{feff}'],
            &['\n'],
        ),
    };
    loop {
        rest = rest.trim_start_matches(blank);
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.split_once(line_ends).map_or("", |(_, after)| after);
        } else if let Some(comment) = rest.strip_prefix("/*") {
            rest = skip_block_comment(comment, dialect)?;
        } else {
            return Ok(rest);
        }
    }
}

/// Skips a block comment after its opening. Only PostgreSQL nests them.
fn skip_block_comment(mut rest: &str, dialect: Dialect) -> Result<&str, SqlError> {
    let mut depth = 1_usize;
    while depth > 0 {
        let Some(at) = rest.find(['*', '/']) else {
            return refuse("unterminated comment");
        };
        rest = rest.get(at..).unwrap_or_default();
        if let Some(after) = rest.strip_prefix("*/") {
            depth -= 1;
            rest = after;
        } else if let Some(after) = rest.strip_prefix("/*")
            && dialect == Dialect::Postgres
        {
            depth += 1;
            rest = after;
        } else {
            rest = tail(rest);
        }
    }
    Ok(rest)
}
