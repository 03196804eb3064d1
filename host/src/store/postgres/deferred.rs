//! Many deferred statements in one round trip.
//!
//! Each distinct statement is prepared by the server under a name. One message then executes it
//! once for each set of parameters. A `prepare` goes through the protocol that takes a single
//! statement, so a guest's text cannot smuggle in a second one. The message consists of the host's
//! own text and of literals in ASCII.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::TryStreamExt as _;
use jiff::Timestamp;
use sqlx::postgres::PgArguments;
use sqlx::{AssertSqlSafe, Either, raw_sql};

use super::guest_sql::{self, Guests};
use super::session::Session;
use crate::model::sql::Value;
use crate::store::Result;
use crate::store::guest_statement::{DeferredStatement, StatementOutcome};

/// Fewer statements than this run one by one, as do fewer than this for each distinct statement on
/// average: preparing one costs about two round trips.
const STATEMENTS_MIN: usize = 4;

/// The largest message, in bytes.
const MESSAGE_MAX: usize = 8 << 20;

/// Numbers the prepared statements of this process: one that a failure left behind cannot clash
/// with a later one.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

/// Statements that run together.
pub(in crate::store) struct Bundle {
    statements: Vec<NamedStatement>,
    /// Executes them with all parameters, in order.
    message: String,
    executions: usize,
}

/// A statement to prepare.
struct NamedStatement {
    name: String,
    prepare: String,
    /// The position of its first execution.
    first: usize,
}

impl Bundle {
    /// Bundles statements; `None` where running them one by one is as good, or needed for one of
    /// their parameters.
    pub(in crate::store) fn of(deferred: &[DeferredStatement]) -> Option<Self> {
        if deferred.len() < STATEMENTS_MIN {
            return None;
        }
        let mut names: HashMap<(&str, String), String> = HashMap::new();
        let mut statements = Vec::new();
        let mut message = String::new();
        for (position, one) in deferred.iter().enumerate() {
            let literals: Option<Vec<Literal>> = one.params.iter().map(Literal::of).collect();
            let literals = literals?;
            let types: Vec<&str> = literals.iter().map(|literal| literal.type_name).collect();
            let types = types.join(", ");
            let name = names
                .entry((one.statement.as_str(), types.clone()))
                .or_insert_with(|| {
                    let named = NamedStatement::new(&one.statement, &types, position);
                    let name = named.name.clone();
                    statements.push(named);
                    name
                });
            message.push_str("execute ");
            message.push_str(name);
            let texts: Vec<&str> = literals
                .iter()
                .map(|literal| literal.text.as_str())
                .collect();
            if !texts.is_empty() {
                // Writing to a string cannot fail.
                let _ = write!(message, "({})", texts.join(", "));
            }
            message.push_str("; ");
            if message.len() > MESSAGE_MAX {
                return None;
            }
        }
        if deferred.len() < STATEMENTS_MIN * statements.len() {
            return None;
        }
        for statement in &statements {
            let _ = write!(message, "deallocate {}; ", statement.name);
        }
        Some(Bundle {
            statements,
            message,
            executions: deferred.len(),
        })
    }

    /// Runs the statements. `done` is the number of those that succeeded, which is the position of
    /// a failed one.
    pub(in crate::store) async fn run(
        self,
        session: &mut Session,
        guests: &Guests,
        done: &mut usize,
    ) -> Result<StatementOutcome<()>> {
        let run = async |session: &mut Session| {
            for statement in &self.statements {
                let query = session.guest_query(statement.prepare.clone(), PgArguments::default());
                let prepared = query.persistent(false).execute(session.connection()).await;
                if let Err(error) = prepared {
                    *done = statement.first;
                    return guest_sql::failed(error);
                }
                session.leave_behind(&statement.name);
            }
            let mut results = raw_sql(AssertSqlSafe(self.message)).fetch_many(session.connection());
            loop {
                match results.try_next().await {
                    Ok(Some(Either::Left(_))) if *done < self.executions => *done += 1,
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => return guest_sql::failed(error),
                }
            }
            drop(results);
            session.leave_nothing_behind();
            Ok(StatementOutcome::Done(()))
        };
        guest_sql::run_with_deadline(session, guests, run).await
    }
}

impl NamedStatement {
    fn new(statement: &str, types: &str, first: usize) -> Self {
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("oncely_deferred_{number}");
        let types = match types {
            "" => String::new(),
            types => format!(" ({types})"),
        };
        NamedStatement {
            // The line break ends a comment at the end of the statement.
            prepare: format!("prepare {name}{types} as {statement}\n"),
            name,
            first,
        }
    }
}

/// A parameter as text.
struct Literal {
    text: String,
    /// As for a parameter in binary form, see `guest_values`.
    type_name: &'static str,
}

impl Literal {
    /// `None` for a value without a form that the server reads in every setting.
    fn of(value: &Value) -> Option<Self> {
        let (type_name, text) = match value {
            Value::Null => {
                return Some(Literal {
                    text: "null".to_owned(),
                    type_name: "unknown",
                });
            }
            Value::Boolean(truth) => ("pg_catalog.bool", truth.to_string()),
            Value::Int64(number) => ("pg_catalog.int8", number.to_string()),
            Value::Float64(number) => ("pg_catalog.float8", float_text(*number)),
            Value::Decimal(text) => ("pg_catalog.numeric", text.clone()),
            Value::Text(text) => ("pg_catalog.text", text.clone()),
            Value::Bytes(bytes) => ("pg_catalog.bytea", format!("\\x{}", hex::encode(bytes))),
            Value::Uuid(text) => ("pg_catalog.uuid", text.clone()),
            Value::Json(text) => ("pg_catalog.jsonb", text.clone()),
            Value::Timestamp(micros) => ("pg_catalog.timestamptz", timestamp_text(*micros)?),
            Value::Date(text) if text.starts_with('-') => return None,
            Value::Date(text) => ("pg_catalog.date", text.clone()),
            Value::Time(text) => ("pg_catalog.time", text.clone()),
        };
        Some(Literal {
            text: quote(&text),
            type_name,
        })
    }
}

fn float_text(number: f64) -> String {
    match number {
        number if number.is_nan() => "NaN".to_owned(),
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        // The shortest text that reads as the same number.
        number => format!("{number:?}"),
    }
}

/// ISO 8601 in UTC, which the server reads with every `DateStyle`. `None` before the year 1 and
/// after 9999.
fn timestamp_text(micros: i64) -> Option<String> {
    let timestamp = Timestamp::from_microsecond(micros).ok()?;
    let text = timestamp.to_string();
    (!text.starts_with('-')).then_some(text)
}

/// A string literal of ASCII alone that reads the same whatever settings a worker's function has
/// changed, such as `standard_conforming_strings` or `client_encoding`.
fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 3);
    quoted.push_str("E'");
    for character in text.chars() {
        match character {
            '\'' | '\\' => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(character));
            }
            ' '..='~' => quoted.push(character),
            _ if u32::from(character) <= 0xFFFF => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(character));
            }
            _ => {
                let _ = write!(quoted, "\\U{:08X}", u32::from(character));
            }
        }
    }
    quoted.push('\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deferred(statement: &str, param: Value) -> DeferredStatement {
        DeferredStatement {
            statement: statement.to_owned(),
            params: vec![param],
        }
    }

    #[test]
    fn literals_are_ascii_without_quotes_or_backslashes_of_the_guest() {
        assert_eq!(
            quote("it's \\ü😀\n"),
            r"E'it\u0027s \u005C\u00FC\U0001F600\u000A'"
        );
        for text in ["'); commit; --", "\\'; x", "\u{bf}'", "E'\\", "$$;$$"] {
            let quoted = quote(text);
            let inner = quoted
                .strip_prefix("E'")
                .and_then(|it| it.strip_suffix('\''));
            assert!(quoted.is_ascii());
            assert!(!inner.unwrap().contains('\''), "{quoted}");
        }
    }

    #[test]
    fn equal_statements_are_prepared_once_for_each_combination_of_types() {
        let mut all: Vec<_> = (0..8)
            .map(|number| deferred("insert into t values ($1) -- x", Value::Int64(number)))
            .collect();
        let bundle = Bundle::of(&all).unwrap();
        assert_eq!(bundle.statements.len(), 1);
        assert!(
            bundle.statements[0]
                .prepare
                .ends_with("(pg_catalog.int8) as insert into t values ($1) -- x\n")
        );
        all[5].params = vec![Value::Null];
        let bundle = Bundle::of(&all).unwrap();
        let firsts: Vec<_> = bundle.statements.iter().map(|one| one.first).collect();
        assert_eq!(firsts, [0, 5]);
        assert_eq!(bundle.message.matches("execute ").count(), 8);
    }

    #[test]
    fn few_or_different_statements_run_one_by_one() {
        let three: Vec<_> = (0..3)
            .map(|n| deferred("select $1", Value::Int64(n)))
            .collect();
        assert!(Bundle::of(&three).is_none());
        let different: Vec<_> = (0..6)
            .map(|n| deferred(&format!("select $1 + {n}"), Value::Int64(n)))
            .collect();
        assert!(Bundle::of(&different).is_none());
        let ancient = vec![deferred("select $1", Value::Timestamp(-100_000_000_000_000_000)); 9];
        assert!(Bundle::of(&ancient).is_none());
    }
}
