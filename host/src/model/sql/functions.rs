//! The functions of PostgreSQL that a guest's statement may call.
//!
//! The rule is an allowlist: a function that it does not name is refused. PostgreSQL's own
//! functions are allowed if the server declares them immutable or stable, except for the few that
//! run text as a statement. Some volatile functions are allowed, too. They neither outlive the
//! transaction nor affect another session. A worker's own functions, created by its migrations, are
//! allowed. Functions of extensions are allowed by extension.

use std::collections::{HashMap, HashSet};

use super::SqlError;
use super::lexer::{Token, refuse};

/// The schemas in which an unqualified name is resolved, in a guest's transaction.
const CATALOG: &str = "pg_catalog";
const APP_SCHEMA: &str = "app_default";

/// Allowed volatile functions of PostgreSQL.
const VOLATILE: [&str; 14] = [
    "array_sample",
    "array_shuffle",
    // Methods of `tablesample`, which cannot be called.
    "bernoulli",
    "system",
    "clock_timestamp",
    // Each works on one sequence, which must stand in the statement; see `check_sequence`.
    "currval",
    "nextval",
    "gen_random_uuid",
    "lastval",
    "random",
    "random_normal",
    "timeofday",
    "uuidv4",
    "uuidv7",
];

/// Prefixes of PostgreSQL's functions that are refused, regardless of their declared volatility.
/// They run text as a statement, read a table by its name, change a setting, or outlive the
/// transaction.
const REFUSED: [&str; 14] = [
    "query_to_xml",
    "cursor_to_xml",
    "table_to_xml",
    "schema_to_xml",
    "database_to_xml",
    "ts_stat",
    "ts_rewrite",
    "fmgr_",
    "lo_",
    "loread",
    "lowrite",
    "set_config",
    "setseed",
    "setval",
];

/// Extensions whose immutable and stable functions neither run text nor change a setting.
const EXTENSIONS: [&str; 15] = [
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "earthdistance",
    "fuzzystrmatch",
    "hstore",
    "intarray",
    "ltree",
    "pg_trgm",
    "pgcrypto",
    "seg",
    "unaccent",
    "uuid-ossp",
    "vector",
];

/// Allowed volatile functions of those extensions.
const EXTENSIONS_VOLATILE: [&str; 10] = [
    "gen_random_bytes",
    "gen_random_uuid",
    "gen_salt",
    "pgp_pub_encrypt",
    "pgp_pub_encrypt_bytea",
    "pgp_sym_encrypt",
    "pgp_sym_encrypt_bytea",
    "uuid_generate_v1",
    "uuid_generate_v1mc",
    "uuid_generate_v4",
];

/// A function as described by the server's catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// The schema that it belongs to.
    pub schema: String,
    /// The name without schema; overloads share it.
    pub name: String,
    /// Whether it is declared volatile: its result may change, or it has side effects.
    pub is_volatile: bool,
    /// The extension that it belongs to.
    pub extension: Option<String>,
    /// Whether it is native code, which only a superuser can create.
    pub is_native: bool,
    /// Whether it can be called with one argument, and thus be written like a column:
    /// `(x).function`.
    pub takes_one_argument: bool,
}

impl Function {
    /// Whether a guest may call it.
    pub fn is_allowed(&self) -> bool {
        let name = self.name.as_str();
        match (&self.extension, self.schema.as_str()) {
            (Some(extension), _) => {
                EXTENSIONS.contains(&extension.as_str())
                    && (!self.is_volatile || EXTENSIONS_VOLATILE.contains(&name))
            }
            (None, CATALOG) => {
                let is_refused = REFUSED.iter().any(|beginning| name.starts_with(beginning));
                !is_refused && (!self.is_volatile || VOLATILE.contains(&name))
            }
            (None, APP_SCHEMA) => !self.is_native,
            _ => false,
        }
    }
}

/// The verdict on each name of a function.
#[derive(Debug, Default)]
pub struct Functions {
    /// Names in the catalog or in the app schema that stand for a refused function.
    refused: HashSet<String>,
    /// Those of them that can be written like a column.
    refused_columns: HashSet<String>,
    /// Names that stand for allowed functions only, by schema.
    allowed: HashMap<String, HashSet<String>>,
    /// Operators of the catalog or of the app schema that call a volatile function.
    refused_operators: Vec<String>,
}

impl Functions {
    /// The verdicts on all functions of a server. `volatile_operators` are the operators of the
    /// catalog and of the app schema that call a volatile function.
    pub fn new(functions: &[Function], volatile_operators: Vec<String>) -> Self {
        let mut verdicts = Functions {
            refused_operators: volatile_operators,
            ..Functions::default()
        };
        let (allowed, refused): (Vec<&Function>, Vec<&Function>) =
            functions.iter().partition(|function| function.is_allowed());
        for function in allowed {
            verdicts
                .allowed
                .entry(function.schema.clone())
                .or_default()
                .insert(function.name.clone());
        }
        for function in refused {
            // One refused overload refuses the whole name.
            if let Some(names) = verdicts.allowed.get_mut(&function.schema) {
                names.remove(&function.name);
            }
            if [CATALOG, APP_SCHEMA].contains(&function.schema.as_str()) {
                verdicts.refused.insert(function.name.clone());
                if function.takes_one_argument {
                    verdicts.refused_columns.insert(function.name.clone());
                }
            }
        }
        verdicts
    }

    /// Refuses a statement that may call a function that is not allowed.
    pub(super) fn check(&self, tokens: &[Token]) -> Result<(), SqlError> {
        for (at, token) in tokens.iter().enumerate() {
            if let Token::Operator(operator) = token {
                self.check_operator(operator)?;
            }
            let Some(name) = token.name() else { continue };
            let called = tokens.get(at + 1) == Some(&Token::Symbol('('));
            let qualified = before(tokens, at, 1) == Some(&Token::Symbol('.'));
            match (called, qualified) {
                (true, false) => self.check_call(tokens, at, name)?,
                (true, true) => self.check_qualified_call(tokens, at, name)?,
                (false, true) if self.refused_columns.contains(name) => {
                    return refuse(not_for_workers(name));
                }
                (false, _) => {}
            }
        }
        Ok(())
    }

    /// Checks an unqualified call. A name before a parenthesis may also be no function at all, such
    /// as a table before its columns.
    fn check_call(&self, tokens: &[Token], at: usize, name: &str) -> Result<(), SqlError> {
        if follows_insert_into(tokens, at, 1) {
            return Ok(());
        }
        // `treat(x as name)` is another syntax for `name(x)`.
        if self.refused.contains(name) || tokens.get(at).is_some_and(|token| token.is("treat")) {
            return refuse(not_for_workers(name));
        }
        check_sequence(tokens, at, name)
    }

    /// Checks a qualified call: the name of an allowed function, or of a table that rows are
    /// inserted into.
    fn check_qualified_call(
        &self,
        tokens: &[Token],
        at: usize,
        name: &str,
    ) -> Result<(), SqlError> {
        let schema = before(tokens, at, 2)
            .and_then(Token::name)
            .unwrap_or_default();
        if self
            .allowed
            .get(schema)
            .is_some_and(|names| names.contains(name))
        {
            return check_sequence(tokens, at, name);
        }
        // `insert into schema.table (` or `insert into database.schema.table (`
        let has_database = before(tokens, at, 3) == Some(&Token::Symbol('.'));
        if follows_insert_into(tokens, at, if has_database { 5 } else { 3 }) {
            Ok(())
        } else {
            refuse(not_for_workers(&format!("{schema}.{name}")))
        }
    }

    fn check_operator(&self, operator: &str) -> Result<(), SqlError> {
        match self
            .refused_operators
            .iter()
            .find(|refused| operator.contains(refused.as_str()))
        {
            Some(refused) => refuse(format!(
                "the operator {refused} is not available to workers: its function is volatile"
            )),
            None => Ok(()),
        }
    }
}

fn before(tokens: &[Token], at: usize, back: usize) -> Option<&Token> {
    at.checked_sub(back).and_then(|before| tokens.get(before))
}

/// Whether `insert into` ends `back` tokens before.
fn follows_insert_into(tokens: &[Token], at: usize, back: usize) -> bool {
    let is = |back, word: &str| before(tokens, at, back).is_some_and(|before| before.is(word));
    is(back, "into") && is(back + 1, "insert")
}

fn not_for_workers(name: &str) -> String {
    format!(
        "the function `{name}` is not available to workers: they may call functions of PostgreSQL \
         that are immutable or stable and run no statement, {}, and those of their own migrations; \
         see docs/handlers.md",
        VOLATILE.join(", ")
    )
}

/// Checks that the sequence of `nextval` and `currval` is a literal, where the filter reads its
/// name. A parameter could name a sequence of the platform.
fn check_sequence(tokens: &[Token], at: usize, name: &str) -> Result<(), SqlError> {
    if !["nextval", "currval"].contains(&name) {
        return Ok(());
    }
    let symbol = |ahead: usize, symbol| tokens.get(at + ahead) == Some(&Token::Symbol(symbol));
    let is_text = matches!(tokens.get(at + 2), Some(Token::Text(_)));
    let is_cast = symbol(3, ':')
        && symbol(4, ':')
        && tokens.get(at + 5).is_some_and(|token| token.is("regclass"));
    if is_text && (symbol(3, ')') || is_cast && symbol(6, ')')) {
        return Ok(());
    }
    refuse(format!(
        "`{name}` takes the name of its sequence as a plain string in the statement: {name}('number')"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::sql::{Dialect, check_statement};

    fn function(schema: &str, name: &str, is_volatile: bool) -> Function {
        let (schema, name) = (schema.to_owned(), name.to_owned());
        Function {
            schema,
            name,
            is_volatile,
            extension: None,
            is_native: false,
            takes_one_argument: false,
        }
    }

    fn extension_function(
        schema: &str,
        name: &str,
        is_volatile: bool,
        extension: &str,
    ) -> Function {
        Function {
            extension: Some(extension.to_owned()),
            is_native: true,
            ..function(schema, name, is_volatile)
        }
    }

    fn functions() -> Functions {
        let functions = [
            function(CATALOG, "lower", false),
            function(CATALOG, "set_config", true),
            function(CATALOG, "ts_stat", true),
            // One of its overloads is declared immutable.
            function(CATALOG, "ts_rewrite", false),
            function(CATALOG, "table_to_xml", false),
            function(CATALOG, "random", true),
            function(CATALOG, "nextval", true),
            function(CATALOG, "later_version_does_harm", true),
            Function {
                takes_one_argument: true,
                ..function(CATALOG, "lo_create", true)
            },
            function(APP_SCHEMA, "own", true),
            Function {
                is_native: true,
                ..function(APP_SCHEMA, "native", false)
            },
            function("public", "shared", false),
            extension_function("public", "crosstab", false, "tablefunc"),
            extension_function("public", "similarity", false, "pg_trgm"),
            extension_function("public", "set_limit", true, "pg_trgm"),
            extension_function("public", "gen_salt", true, "pgcrypto"),
            extension_function(APP_SCHEMA, "dblink", true, "dblink"),
        ];
        Functions::new(&functions, vec!["@!".to_owned()])
    }

    fn check(statement: &str) -> Result<(), SqlError> {
        check_statement(statement, Dialect::Postgres, Some(&functions())).map(|_| ())
    }

    #[test]
    fn functions_that_run_text_or_outlive_the_tx_are_refused() {
        for statement in [
            "select set_config('role', 'none', true)",
            "select pg_catalog . set_config ('role', 'none', true)",
            "select db.pg_catalog.set_config('role', 'none', true)",
            "select \"set_config\"('role', 'none', true)",
            "select SET_CONFIG/**/('role', 'none', true)",
            "select * from ts_stat($1)",
            "select ts_rewrite(q, $1) from q",
            "select table_to_xml($1, true, true, '')",
            "select * from rows from (set_config($1, $2, false))",
            "insert into t values (1) returning set_config($1, $2, false)",
            "select treat(x as set_config) from t",
            "select (1).lo_create",
            "select t.\"lo_create\" from t",
            "select (x).LO_CREATE is null from t",
            "select later_version_does_harm()",
            "select 1 @!2",
            "select 1 operator(pg_catalog.@!) 2",
            // A call near `insert into` is not its table.
            "insert into t select pg_catalog.set_config($1, $2, false)",
            "insert into t table pg_catalog.ts_stat($1)",
            "insert into \"insert\" select app_default . dblink ($1)",
            "with a as (insert into t select pg_catalog.set_config($1, $2, false)) select 1",
            "insert into t.u select pg_catalog.set_config($1, $2, false)",
            // A lone `into` does not make a table of them.
            "select t.into set_config($1)",
            "select nextval($1)",
            "select nextval('a' || $1)",
            "select nextval('a'::text || $1)",
            "select nextval('onc' \n 'ely.x')",
            "select nextval(E'\\x6f')",
            "select nextval('oncely.outbox_seq_seq')",
            "select nextval(('a'))",
        ] {
            let checked = check(statement);
            assert!(
                matches!(checked, Err(SqlError::NotAllowed(_))),
                "{statement}: {checked:?}"
            );
        }
    }

    #[test]
    fn unknown_functions_of_extensions_and_schemas_are_refused() {
        for statement in [
            "select * from public.crosstab($1)",
            "select * from dblink($1, $2)",
            "select public.set_limit(0.1)",
            "select public.shared()",
            "select public.unknown()",
            "select native()",
            "select app_default.native()",
        ] {
            let checked = check(statement);
            assert!(
                matches!(checked, Err(SqlError::NotAllowed(_))),
                "{statement}: {checked:?}"
            );
        }
        for statement in [
            "select public.similarity($1, $2)",
            "select public.gen_salt('bf')",
        ] {
            assert_eq!(check(statement), Ok(()), "{statement}");
        }
    }

    #[test]
    fn data_statements_may_call_allowed_functions() {
        for statement in [
            "select lower(a), pg_catalog.lower(b) from t",
            "select random(), own(), app_default.own()",
            "insert into t (a, b) values ($1, $2) on conflict (a) do update set b = excluded.b",
            "insert into app_default.t (a) values (1)",
            "insert into db.app_default.t (a) values (1)",
            "with n (i) as (select 1) select count(*) from n where i in (1, 2)",
            "select nextval('number'), nextval('number'::regclass), currval('app_default.number')",
            "select a.set_config, b.ts_stat from a, b",
            "select 'set_config(', \"set_config\" from t",
        ] {
            assert_eq!(check(statement), Ok(()), "{statement}");
        }
    }
}
