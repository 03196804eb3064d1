//! The ratios of all measurements, with their targets.

use serde_json::{Map, Value, json};

/// A ratio with its target.
struct Target {
    name: &'static str,
    /// Dividend and divisor.
    what: &'static str,
    wanted: Wanted,
}

#[derive(Clone, Copy)]
enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

const TARGETS: &[Target] = &[
    target(
        "state_vs_handwritten",
        "keyed state ÷ handwritten loop",
        Wanted::AtLeast(7.0),
    ),
    target(
        "state_vs_native",
        "keyed state ÷ native limit",
        Wanted::AtLeast(0.6),
    ),
    target(
        "batch_state_vs_native",
        "keyed state with `isolation = \"batch\"` ÷ native limit",
        Wanted::AtLeast(0.8),
    ),
    target(
        "sql_vs_handwritten",
        "one statement ÷ handwritten loop",
        Wanted::AtLeast(4.0),
    ),
    target(
        "batch_sql_vs_handwritten",
        "batch handler with one statement ÷ handwritten loop",
        Wanted::AtLeast(8.0),
    ),
    target(
        "http_vs_handwritten",
        "requests with a key, 256 clients ÷ handwritten service",
        Wanted::AtLeast(3.0),
    ),
    target(
        "sqlite_vs_postgres",
        "keyed state on SQLite ÷ on PostgreSQL",
        Wanted::AtLeast(1.0),
    ),
    target(
        "p99_vs_handwritten",
        "99th percentile of latency ÷ that of the handwritten loop, at half of its maximum",
        Wanted::AtMost(1.0),
    ),
    target(
        "fresh_vs_warm",
        "call in a fresh instance ÷ call in a warm one",
        Wanted::AtMost(10.0),
    ),
    target("poison_vs_clean", "1 % poison ÷ none", Wanted::AtLeast(0.9)),
    target(
        "duplicates_vs_clean",
        "10 % duplicates ÷ none",
        Wanted::AtLeast(0.9),
    ),
    target(
        "relay_vs_worker",
        "relay alone ÷ keyed state",
        Wanted::AtLeast(1.5),
    ),
    target(
        "idle_kb_per_worker",
        "KiB of an idle worker among 1,000",
        Wanted::AtMost(300.0),
    ),
    target(
        "start_seconds",
        "seconds to start 1,000 workers from the cache",
        Wanted::AtMost(5.0),
    ),
];

const fn target(name: &'static str, what: &'static str, wanted: Wanted) -> Target {
    Target { name, what, wanted }
}

/// All measurements of a run; `Null` for those that were not made.
#[derive(Default)]
pub struct Measurements {
    pub throughput: Value,
    pub requests: Value,
    pub latency: Value,
    /// Outputs per second.
    pub relay: Value,
    pub workers: Value,
    pub instances: Value,
}

impl Measurements {
    /// The median rate of a contender.
    pub fn rate(&self, contender: &str) -> Option<f64> {
        self.row(contender)?["median"].as_f64()
    }

    fn row(&self, contender: &str) -> Option<&Value> {
        let rows = self.throughput["contenders"].as_array()?;
        rows.iter().find(|row| row["name"] == contender)
    }

    fn p99(&self, name: &str, load: &str) -> Option<f64> {
        let rows = self.latency.as_array()?;
        let row = rows
            .iter()
            .find(|row| row["name"] == name && row["load"] == load)?;
        row["p99_ms"].as_f64()
    }

    /// The value of a ratio, if its parts were measured.
    fn ratio(&self, name: &str) -> Option<f64> {
        let of =
            |contender: &str, baseline: &str| Some(self.rate(contender)? / self.rate(baseline)?);
        match name {
            "state_vs_handwritten" => of("state", "state, by hand"),
            "state_vs_native" => of("state", "state, native"),
            "batch_state_vs_native" => of("state, isolation = batch", "state, native"),
            "sql_vs_handwritten" => of("sql", "sql, by hand"),
            "batch_sql_vs_handwritten" => of("sql, batch handler", "sql, by hand"),
            "http_vs_handwritten" => self.requests["rows"].as_array()?.last()?["ratio"].as_f64(),
            "sqlite_vs_postgres" => of("state, sqlite", "state"),
            "p99_vs_handwritten" => {
                let by_hand = self.p99("state, by hand", "50 %")?;
                Some(self.p99("state", "50 % of the loop")? / by_hand)
            }
            "fresh_vs_warm" => self.instances["ratio"].as_f64(),
            "poison_vs_clean" => of("state, 1 % poison", "state"),
            "duplicates_vs_clean" => of("state, 10 % duplicates", "state"),
            "relay_vs_worker" => Some(self.relay.as_f64()? / self.rate("state")?),
            "idle_kb_per_worker" => self.workers["kib_each"].as_f64(),
            "start_seconds" => self.workers["start_seconds"].as_f64(),
            _ => None,
        }
    }

    /// The report, with an object `ratios`.
    pub fn json(&self) -> Value {
        let mut ratios = Map::new();
        for target in TARGETS {
            let Some(value) = self.ratio(target.name) else {
                continue;
            };
            let (wanted, holds) = match target.wanted {
                Wanted::AtLeast(least) => (json!({ "at_least": least }), value >= least),
                Wanted::AtMost(most) => (json!({ "at_most": most }), value <= most),
            };
            ratios.insert(
                target.name.to_owned(),
                json!({ "value": value, "what": target.what, "wanted": wanted, "holds": holds }),
            );
        }
        json!({
            "ratios": ratios, "throughput": self.throughput, "requests": self.requests,
            "latency": self.latency, "relay_outputs_per_second": self.relay, "workers": self.workers, "instances": self.instances,
        })
    }

    /// The ratios as a table in Markdown.
    pub fn markdown(&self) -> String {
        let mut table = "| ratio | what | measured | target |\n|---|---|---|---|\n".to_owned();
        for target in TARGETS {
            let Some(value) = self.ratio(target.name) else {
                continue;
            };
            let wanted = match target.wanted {
                Wanted::AtLeast(least) => format!("≥ {least}"),
                Wanted::AtMost(most) => format!("≤ {most}"),
            };
            let (name, what) = (target.name, target.what);
            table += &format!("| `{name}` | {what} | {value:.2} | {wanted} |\n");
        }
        table
    }
}
