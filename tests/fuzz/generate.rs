//! Generates statements: correct ones, slightly wrong ones and random tokens, in every spelling.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::one_in;

/// A function of the server.
#[derive(Debug, Clone)]
pub struct Routine {
    pub schema: String,
    pub name: String,
    /// The types of its arguments.
    pub arguments: Vec<String>,
    /// `f`, `a` (aggregate), `w` (window) or `p`.
    pub kind: String,
}

/// The functions and names of the server.
pub struct Vocabulary {
    pub routines: Vec<Routine>,
    /// Functions that would be most useful to a hostile guest.
    pub harmful: Vec<Routine>,
    pub database: String,
}

/// Keywords, and names that resemble them.
const WORDS: [&str; 64] = [
    "select",
    "insert",
    "update",
    "delete",
    "merge",
    "values",
    "with",
    "into",
    "from",
    "where",
    "as",
    "recursive",
    "not",
    "materialized",
    "union",
    "all",
    "returning",
    "set",
    "on",
    "conflict",
    "do",
    "nothing",
    "using",
    "when",
    "matched",
    "then",
    "commit",
    "rollback",
    "and",
    "chain",
    "begin",
    "end",
    "savepoint",
    "table",
    "temp",
    "search",
    "depth",
    "breadth",
    "first",
    "by",
    "cycle",
    "to",
    "default",
    "treat",
    "cast",
    "operator",
    "tablesample",
    "only",
    "for",
    "key",
    "share",
    "of",
    "or",
    "limit",
    "order",
    "group",
    "having",
    "distinct",
    "case",
    "else",
    "lateral",
    "explain",
    "role",
    "copy",
];

const NAMES: [&str; 24] = [
    "as",
    "as",
    "a",
    "b",
    "c",
    "t",
    "x",
    "insert",
    "merge",
    "update",
    "delete",
    "into",
    "values",
    "recursive",
    "number",
    "own",
    "of_row",
    "hidden",
    "search",
    "cycle",
    "treat",
    "temp",
    "oncely",
    "pg_class",
];

const BLANKS: [&str; 16] = [
    " ",
    " ",
    " ",
    " ",
    "\n",
    "\t",
    "\r",
    "  ",
    "/**/",
    "/* ' */",
    "/*/* */*/",
    "--\n",
    "-- ' \r",
    "\x0c",
    "/* $$ */",
    "--/*\n",
];

/// Characters that some readers treat as white space and others do not.
const ODD_BLANKS: [&str; 6] = ["", "\u{feff}", "\x0b", "\u{a0}", "\u{2003}", "\u{85}"];

const TAGS: [&str; 9] = [
    "",
    "a",
    "_",
    "a1",
    "\u{a0}",
    "\u{e9}",
    "\u{1f980}",
    "A",
    "a\u{feff}",
];

const OPERATORS: [&str; 24] = [
    "+", "-", "*", "/", "<", ">", "=", "||", "->", "->>", "@>", "<@", "?", "~", "!~", "@@", "&&",
    "<>", "#", "%", "^", "*/*", "+--\n", "/-",
];

const NUMBERS: [&str; 18] = [
    "0", "1", "1.5", ".5", "1.", "1e5", "1e-5", "1E+1", "0x1f", "0b1", "0o7", "1_000", "1a", "1e",
    "0x", "1.e", "1..2", "$1a",
];

/// Contents of strings, mainly delimiters of other strings.
const INSIDES: [&str; 16] = [
    "", "x", "''", "\\", "\\\\", "\"", "$$", "--", "/*", "*/", ";", "commit", "into", "\n",
    "oncely", "\u{e9}",
];

pub struct Generator<'v> {
    vocabulary: &'v Vocabulary,
    rng: StdRng,
}

impl<'v> Generator<'v> {
    pub fn new(vocabulary: &'v Vocabulary, rng: StdRng) -> Self {
        Generator { vocabulary, rng }
    }

    pub fn statement(&mut self) -> String {
        let mut tokens = match self.rng.random_range(0..10) {
            0 | 1 => self.random_tokens(),
            _ => self.permitted(2),
        };
        if self.rng.random_range(0..10) < 4 {
            for _ in 0..self.rng.random_range(1..4) {
                self.mutate(&mut tokens);
            }
        }
        self.render(&tokens)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *from
            .choose(&mut self.rng)
            .expect("choose from a non-empty list")
    }

    fn one_in(&mut self, times: u32) -> bool {
        one_in(&mut self.rng, times)
    }

    /// A permitted statement, except perhaps for its functions and names.
    fn permitted(&mut self, depth: u32) -> Vec<String> {
        let mut tokens = Vec::new();
        if depth > 0 && self.one_in(4) {
            tokens.extend(self.with(depth));
        }
        match self.rng.random_range(0..8) {
            0 => {
                tokens.extend(words("insert into"));
                tokens.push(self.table());
                if self.one_in(2) {
                    tokens.extend(words("( a )"));
                }
                tokens.extend(self.rows(depth));
                tokens.extend(self.returning(depth));
            }
            1 => {
                tokens.push("update".to_owned());
                tokens.push(self.table());
                tokens.extend(words("set b ="));
                tokens.extend(self.expression(depth));
                tokens.extend(self.returning(depth));
            }
            2 => {
                tokens.extend(words("delete from"));
                tokens.push(self.table());
                tokens.push("where".to_owned());
                tokens.extend(self.expression(depth));
                tokens.extend(words("is null"));
                tokens.extend(self.returning(depth));
            }
            3 => {
                tokens.extend(words("merge into t using ( select 1 as"));
                tokens.push(self.name());
                tokens.extend(words(") s on"));
                tokens.extend(self.expression(depth));
                tokens.extend(words("is null when matched then delete"));
            }
            _ => tokens.extend(self.select(depth)),
        }
        if self.one_in(12) {
            tokens.push(";".to_owned());
        }
        tokens
    }

    fn with(&mut self, depth: u32) -> Vec<String> {
        let mut tokens = words(self.pick(&["with", "with", "with recursive"]));
        for n in 0..self.rng.random_range(1..3) {
            if n > 0 {
                tokens.push(",".to_owned());
            }
            tokens.push(self.name());
            if self.one_in(3) {
                tokens.extend(words("( a )"));
            }
            tokens.extend(words(self.pick(&[
                "as (",
                "as (",
                "as materialized (",
                "as not materialized (",
            ])));
            tokens.extend(self.permitted(depth - 1));
            tokens.push(")".to_owned());
            if self.one_in(10) {
                tokens.extend(words(self.pick(&[
                    "search depth first by a set o",
                    "search breadth first by a , b set insert",
                    "cycle a set c using p",
                    "cycle a set c to 1 default 0 using merge",
                ])));
            }
        }
        tokens
    }

    fn rows(&mut self, depth: u32) -> Vec<String> {
        if self.one_in(2) {
            return self.select(depth);
        }
        let mut tokens = words("values (");
        tokens.extend(self.expression(depth));
        tokens.push(")".to_owned());
        tokens
    }

    fn returning(&mut self, depth: u32) -> Vec<String> {
        if !self.one_in(3) {
            return Vec::new();
        }
        let mut tokens = words("returning");
        tokens.extend(self.expression(depth));
        tokens
    }

    fn select(&mut self, depth: u32) -> Vec<String> {
        let mut tokens = words("select");
        for n in 0..self.rng.random_range(1..3) {
            if n > 0 {
                tokens.push(",".to_owned());
            }
            tokens.extend(self.expression(depth));
            if self.one_in(3) {
                tokens.extend(words(self.pick(&["as", "as", ""])));
                tokens.push(self.name());
            }
        }
        if self.one_in(8) {
            tokens.push("into".to_owned());
            tokens.push(self.name());
        }
        if !self.one_in(4) {
            tokens.push("from".to_owned());
            tokens.extend(self.source(depth));
        }
        if self.one_in(4) {
            tokens.push("where".to_owned());
            tokens.extend(self.expression(depth));
            tokens.extend(words("is not null"));
        }
        tokens.extend(words(self.pick(&[
            "",
            "",
            "",
            "",
            "limit 1",
            "for update",
            "for no key update",
            "union all select null",
        ])));
        tokens
    }

    fn source(&mut self, depth: u32) -> Vec<String> {
        match self.rng.random_range(0..6) {
            0 if depth > 0 => {
                let mut tokens = words("(");
                tokens.extend(self.select(depth - 1));
                tokens.push(")".to_owned());
                tokens.push(self.pick(&["x", "t", "s"]).to_owned());
                tokens
            }
            1 => self.call(),
            2 => {
                let mut tokens = words("rows from (");
                tokens.extend(self.call());
                tokens.push(")".to_owned());
                tokens
            }
            3 => {
                let mut tokens = vec![self.table()];
                tokens.extend(words("tablesample"));
                tokens.push(self.pick(&["system", "bernoulli", "pg_sleep"]).to_owned());
                tokens.extend(words("( 1 )"));
                tokens
            }
            _ => vec![self.table()],
        }
    }

    fn expression(&mut self, depth: u32) -> Vec<String> {
        match self.rng.random_range(0..14) {
            0 => vec![self.name()],
            1 => vec![self.literal()],
            2 => vec![self.pick(&NUMBERS).to_owned()],
            3 => vec![
                self.pick(&["$1", "$2", "null", "true", "t . a", "t . *"])
                    .to_owned(),
            ],
            4 if depth > 0 => {
                let mut tokens = words("(");
                tokens.extend(self.select(depth - 1));
                tokens.push(")".to_owned());
                tokens
            }
            5 if depth > 0 => {
                let mut tokens = self.expression(depth - 1);
                tokens.push(self.operator());
                tokens.extend(self.expression(depth - 1));
                tokens
            }
            6 => {
                // Attribute notation, which is also a call.
                let routine = self.routine();
                let given = routine
                    .arguments
                    .first()
                    .cloned()
                    .unwrap_or_else(|| "integer".to_owned());
                let mut tokens = words("treat ( null ::");
                tokens.push(given);
                tokens.push("as".to_owned());
                tokens.push(routine.name);
                tokens.push(")".to_owned());
                tokens
            }
            7 => {
                let routine = self.routine();
                let mut tokens = words(self.pick(&["t .", "( t ) .", "x ."]));
                tokens.push(self.spelled(&routine.name));
                tokens
            }
            8 => {
                let mut tokens = vec![self.literal()];
                tokens.push("::".to_owned());
                tokens.push(
                    self.pick(&[
                        "regclass",
                        "text",
                        "pg_catalog . regproc",
                        "xml",
                        "jsonb",
                        "numeric(3)",
                    ])
                    .to_owned(),
                );
                tokens
            }
            9 => {
                let mut tokens = words(self.pick(&[
                    "nextval (",
                    "currval (",
                    "pg_catalog . nextval (",
                    "setval (",
                ]));
                tokens.push(
                    self.pick(&[
                        "'number'",
                        "'number'::regclass",
                        "$1",
                        "$$number$$",
                        "E'number'",
                    ])
                    .to_owned(),
                );
                tokens.push(")".to_owned());
                tokens
            }
            _ => self.call(),
        }
    }

    fn routine(&mut self) -> Routine {
        let from = if self.one_in(3) {
            &self.vocabulary.harmful
        } else {
            &self.vocabulary.routines
        };
        from.choose(&mut self.rng)
            .expect("choose a server function")
            .clone()
    }

    /// A call with arguments of the right types.
    fn call(&mut self) -> Vec<String> {
        let routine = self.routine();
        let mut tokens = Vec::new();
        if self.one_in(2) || !["pg_catalog", "app_default"].contains(&routine.schema.as_str()) {
            if self.one_in(4) {
                tokens.push(self.spelled(&self.vocabulary.database.clone()));
                tokens.push(".".to_owned());
            }
            tokens.push(self.spelled(&routine.schema));
            tokens.push(".".to_owned());
        }
        tokens.push(self.spelled(&routine.name));
        tokens.push("(".to_owned());
        for (n, argument) in routine.arguments.iter().enumerate() {
            if n > 0 {
                tokens.push(",".to_owned());
            }
            let is_any =
                argument.starts_with('"') || argument.starts_with("any") || argument == "record";
            match (is_any, argument.as_str()) {
                (true, "anyarray" | "anycompatiblearray") => {
                    tokens.push("null :: integer [ ]".to_owned())
                }
                (true, "record") => tokens.push("row ( 1 )".to_owned()),
                (true, _) => tokens.push("null :: integer".to_owned()),
                (false, argument) => {
                    tokens.extend(["null".to_owned(), "::".to_owned(), argument.to_owned()])
                }
            }
        }
        tokens.push(")".to_owned());
        if routine.kind == "w" {
            tokens.extend(words("over ( )"));
        }
        tokens
    }

    fn table(&mut self) -> String {
        self.pick(&[
            "t",
            "t",
            "t",
            "app_default . t",
            "texts",
            "app_default . texts",
            "\"insert\"",
            "oncely . inbox",
            "pg_stat_activity",
            "\"t\"",
        ])
        .to_owned()
    }

    fn name(&mut self) -> String {
        let name = self.pick(&NAMES);
        self.spelled(name)
    }

    /// A name in one of its spellings.
    fn spelled(&mut self, name: &str) -> String {
        match self.rng.random_range(0..12) {
            0 => name.to_uppercase(),
            1 | 2 => format!("\"{name}\""),
            3 if self.one_in(4) => {
                let escaped: String = name
                    .chars()
                    .map(|c| format!("\\{:04x}", u32::from(c)))
                    .collect();
                format!("U&\"{escaped}\"")
            }
            4 if self.one_in(8) => format!("{name}{}", "x".repeat(70)),
            _ => name.to_owned(),
        }
    }

    fn operator(&mut self) -> String {
        let operator = self.pick(&OPERATORS);
        if self.one_in(6) {
            format!("operator ( pg_catalog . {operator} )")
        } else {
            operator.to_owned()
        }
    }

    /// A string in one of its notations.
    fn literal(&mut self) -> String {
        let inside: String = (0..self.rng.random_range(0..4))
            .map(|_| self.pick(&INSIDES))
            .collect();
        let doubled = inside.replace('\'', "''");
        match self.rng.random_range(0..9) {
            0 => format!("E'{doubled}'"),
            1 => format!("U&'{doubled}'"),
            2 => format!("{}'{doubled}'", self.pick(&["B", "x", "n", "N"])),
            3 | 4 => {
                let tag = self.pick(&TAGS);
                format!("${tag}${inside}${tag}$")
            }
            5 => format!("'{doubled}'\n'{}'", self.pick(&INSIDES)),
            6 => format!("'{inside}'"),
            _ => format!("'{doubled}'"),
        }
    }

    fn token(&mut self) -> String {
        match self.rng.random_range(0..12) {
            0..=3 => {
                let word = self.pick(&WORDS);
                if self.one_in(6) {
                    word.to_uppercase()
                } else {
                    word.to_owned()
                }
            }
            4 | 5 => self.name(),
            6 => self.literal(),
            7 => self.pick(&NUMBERS).to_owned(),
            8 => self.pick(&OPERATORS).to_owned(),
            9 => {
                let routine = self.routine();
                format!("{} (", self.spelled(&routine.name))
            }
            _ => self
                .pick(&["(", ")", ",", ";", ".", "[", "]", "::", ":=", "$1", "*"])
                .to_owned(),
        }
    }

    fn random_tokens(&mut self) -> Vec<String> {
        let mut tokens = vec![
            self.pick(&["select", "insert", "with", "values", "(", "merge", "update"])
                .to_owned(),
        ];
        for _ in 0..self.rng.random_range(1..14) {
            tokens.push(self.token());
        }
        tokens
    }

    /// Changes, removes or adds a token.
    fn mutate(&mut self, tokens: &mut Vec<String>) {
        let at = self.rng.random_range(0..=tokens.len());
        match self.rng.random_range(0..5) {
            0 if at < tokens.len() => {
                tokens.remove(at);
            }
            1 if at < tokens.len() => tokens[at] = self.token(),
            2 if at + 1 < tokens.len() => tokens.swap(at, at + 1),
            3 => {
                let into = words(self.pick(&[
                    "into hidden",
                    "insert into hidden",
                    "merge into hidden",
                    "; commit",
                    "into temp x",
                ]));
                tokens.splice(at..at, into);
            }
            _ => tokens.insert(at, self.token()),
        }
    }

    fn render(&mut self, tokens: &[String]) -> String {
        let mut text = String::new();
        let is_odd = self.one_in(4);
        for token in tokens {
            if !text.is_empty() {
                let blank = match is_odd && self.one_in(6) {
                    true => self.pick(&ODD_BLANKS),
                    false if self.one_in(3) => self.pick(&BLANKS),
                    false => " ",
                };
                text.push_str(blank);
            }
            text.push_str(token);
        }
        text.retain(|c| c != '\0');
        text
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(' ')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}
