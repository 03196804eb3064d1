//! The alert rules and the dashboard: they name metrics that hosts have, and sections that exist.
//!
//! `promtool` checks the rules and every expression of the dashboard. Grafana itself is not run: a
//! check of the fields that its dashboards require stands in for it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use support::database::Kind;
use support::guests::repository;
use support::metrics::scrape;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, http_manifest, manifest};

const ALERTS: &str = "docs/monitoring/alerts.yml";
const DASHBOARD: &str = "docs/monitoring/dashboard.json";
const TESTS: &str = "tests/it/monitoring/alerts.test.yml";

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(repository().join(path)).with_context(|| format!("read {path}"))
}

fn dashboard() -> Result<Value> {
    serde_json::from_str(&read(DASHBOARD)?).context("parse the dashboard")
}

/// The panels of the dashboard, rows included.
fn panels(dashboard: &Value) -> Result<&Vec<Value>> {
    dashboard["panels"].as_array().context("find the panels")
}

/// All expressions of the dashboard, with the title of their panel.
fn expressions(dashboard: &Value) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for panel in panels(dashboard)? {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().context("find a title")?;
            let expression = target["expr"].as_str().context("find an expression")?;
            found.push((title.to_owned(), expression.to_owned()));
        }
    }
    Ok(found)
}

/// The values of a key in the alert rules, such as `runbook`.
fn values_in_alerts(key: &str) -> Result<Vec<String>> {
    let text = read(ALERTS)?;
    let prefix = format!("{key}: ");
    let values = text
        .lines()
        .filter_map(|line| line.trim_start_matches([' ', '-']).strip_prefix(&prefix));
    Ok(values.map(str::to_owned).collect())
}

/// The words of a text that can be names, in order.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// The metric that a series belongs to: histograms have three suffixes.
fn metric_of(series: &str) -> &str {
    ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|suffix| series.strip_suffix(suffix))
        .unwrap_or(series)
}

fn is_metric(word: &str) -> bool {
    ["oncely_", "messaging_", "http_server_"]
        .iter()
        .any(|prefix| word.starts_with(prefix))
        && !["messaging_system"].contains(&word)
}

/// The documented metrics with their labels.
fn documented() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let text = read("docs/metrics.md")?;
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let mut cells = row.split('|').skip(1);
        let (name, labels) = (cells.next(), cells.next());
        let name = words(name.context("find a name")?).next();
        let labels = words(labels.context("find the labels")?).map(str::to_owned);
        Ok((name.context("find a name")?.to_owned(), labels.collect()))
    })
    .collect()
}

/// The metrics of a text of Prometheus, with the labels of their series.
fn exported(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_once(['{', ' ']).unwrap_or((line, ""));
        let labels = rest.split('}').next().unwrap_or_default();
        let labels = labels.split(',').filter_map(|pair| pair.split_once("=\""));
        let labels = labels.map(|(label, _)| label.to_owned());
        let labels = labels.filter(|label| label != "le");
        let entry = found.entry(metric_of(name).to_owned()).or_default();
        entry.extend(labels);
    }
    found
}

/// Checks that an expression names documented metrics, and only their labels.
fn check_expression(
    expression: &str,
    documented: &BTreeMap<String, BTreeSet<String>>,
) -> Result<BTreeSet<String>> {
    let names: BTreeSet<String> = words(expression)
        .filter(|word| is_metric(word))
        .map(|word| metric_of(word).to_owned())
        .filter(|word| !documented.values().any(|labels| labels.contains(word)))
        .collect();
    let mut labels: BTreeSet<&str> = ["instance", "job", "le"].into();
    for name in &names {
        let known = documented
            .get(name)
            .with_context(|| format!("`{name}` is no documented metric: {expression}"))?;
        labels.extend(known.iter().map(String::as_str));
    }
    // Labels follow `by (`, or precede a matcher.
    let grouped = expression.split("by (").skip(1);
    let grouped = grouped.flat_map(|rest| words(rest.split(')').next().unwrap_or_default()));
    let matched = expression.split('{').skip(1);
    let matched = matched.flat_map(|rest| {
        let matchers = rest.split('}').next().unwrap_or_default();
        matchers
            .split(',')
            .filter_map(|matcher| words(matcher).next())
    });
    for label in grouped.chain(matched) {
        ensure!(
            labels.contains(label),
            "`{label}` is no label of {names:?}: {expression}"
        );
    }
    Ok(names)
}

#[test]
fn rules_and_panels_name_documented_metrics_and_labels() -> Result<()> {
    let documented = documented()?;
    let mut used = BTreeSet::new();
    for (_, expression) in expressions(&dashboard()?)? {
        used.extend(check_expression(&expression, &documented)?);
    }
    ensure!(used.len() > 30, "the dashboard uses only {used:?}");

    // Expressions of rules may have several lines.
    let text = read(ALERTS)?;
    let rules = text.split("- alert:").skip(1);
    for rule in rules {
        let (_, rest) = rule.split_once("expr:").context("find an expression")?;
        let end = rest.find("labels: {").context("find the labels")?;
        let expression = rest.get(..end).context("cut the expression")?;
        let expression = expression.split("for:").next().unwrap_or_default();
        let names = check_expression(expression, &documented)?;
        ensure!(!names.is_empty() || expression.contains("up{"), "{rule}");
    }
    // An unknown metric and an unknown label are refused.
    assert!(check_expression("sum(oncely_nothing)", &documented).is_err());
    assert!(check_expression("sum by (color) (oncely_alarms)", &documented).is_err());
    assert!(check_expression(r#"oncely_alarms{color="red"}"#, &documented).is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn series_of_a_host_have_the_documented_labels() -> Result<()> {
    let documented = documented()?;
    let messages = World::start(Kind::Sqlite, &manifest(QUICK_RETRIES)?).await?;
    let message =
        |event: &str, behaviour: &str| NewMessage::new("in.x", event, behaviour, r#"{"n": 2}"#);
    let sent = [
        message("a", "insert"),
        message("b", "reject"),
        message("c", "trap"),
    ];
    messages.nats.publish_all(sent.to_vec()).await?;
    messages.quiet(3).await?;
    let route = "[[worker.route]]\npath = \"/r\"\nmethods = [\"POST\"]\n";
    let requests = World::start(Kind::Sqlite, &http_manifest("5s", route)?).await?;
    let url = format!("{}/r", requests.ingress_url()?);
    let request = reqwest::Client::new()
        .post(&url)
        .header("idempotency-key", "\"k\"");
    request.body("{}").send().await?;

    let mut series = exported(&scrape(&messages).await?);
    for (name, labels) in exported(&scrape(&requests).await?) {
        series.entry(name).or_default().extend(labels);
    }
    ensure!(
        series.contains_key("oncely_dead_letters_total")
            && series.contains_key("http_server_request_duration_seconds"),
        "{:?}",
        series.keys()
    );
    for (name, labels) in &series {
        let Some(known) = documented.get(name) else {
            ensure!(
                name.is_empty() || !is_metric(name),
                "{name} is undocumented"
            );
            continue;
        };
        assert_eq!(labels, known, "{name}");
    }
    Ok(())
}

/// Runs promtool, which `scripts/install-tools test` installs.
fn promtool(arguments: &[&str], folder: &Path) -> Result<String> {
    let installed = repository().join("target/tools/bin/promtool");
    let program = if installed.exists() {
        installed
    } else {
        "promtool".into()
    };
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .context("run promtool (install it: scripts/install-tools test)")?;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(output.status.success(), "promtool {arguments:?}: {said}");
    Ok(said)
}

#[test]
fn promtool_accepts_the_alert_rules_and_their_tests_pass() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let copy = |from: &str, to: &str| -> Result<()> {
        std::fs::write(folder.path().join(to), read(from)?)?;
        Ok(())
    };
    copy(ALERTS, "alerts.yml")?;
    copy(TESTS, "alerts.test.yml")?;
    let said = promtool(&["check", "rules", "alerts.yml"], folder.path())?;
    ensure!(said.contains("rules found"), "{said}");
    promtool(&["test", "rules", "alerts.test.yml"], folder.path())?;

    // Every alert has a test in which it fires.
    let tests = read(TESTS)?;
    for alert in values_in_alerts("alert")? {
        let fires = tests
            .split("alertname: ")
            .skip(1)
            .any(|test| test.starts_with(&format!("{alert}\n")) && test.contains("exp_labels"));
        ensure!(fires, "no test fires {alert}");
    }
    Ok(())
}

#[test]
fn promtool_accepts_every_expression_of_the_dashboard() -> Result<()> {
    let mut rules = "groups:\n  - name: dashboard\n    rules:\n".to_owned();
    for (number, (_, expression)) in expressions(&dashboard()?)?.iter().enumerate() {
        // The variables of Grafana.
        let expression = expression
            .replace("$__rate_interval", "5m")
            .replace("$worker", ".*")
            .replace("$instance", ".*");
        ensure!(!expression.contains('$'), "unknown variable: {expression}");
        let quoted = serde_json::to_string(&expression)?;
        rules.push_str(&format!(
            "      - record: panel_{number}\n        expr: {quoted}\n"
        ));
    }
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("dashboard.yml"), rules)?;
    promtool(&["check", "rules", "dashboard.yml"], folder.path()).map(drop)
}

/// The anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_alert_links_to_a_section_that_exists() -> Result<()> {
    let alerts = values_in_alerts("alert")?;
    let links = values_in_alerts("runbook")?;
    assert_eq!(alerts.len(), links.len(), "an alert has no link");
    ensure!(alerts.len() > 10, "{alerts:?}");
    let mut linked = BTreeSet::new();
    for link in links {
        let (document, section) = link.split_once('#').context("split a link")?;
        let text = read(document)?;
        let mut headings = text
            .lines()
            .filter(|line| line.starts_with('#'))
            .map(|line| anchor(line.trim_start_matches('#').trim()));
        ensure!(headings.any(|heading| heading == section), "{link}");
        linked.insert(section.to_owned());
    }
    // No section is without its alert.
    let text = read("docs/monitoring.md")?;
    let sections = text.lines().filter_map(|line| line.strip_prefix("### "));
    let sections: BTreeSet<String> = sections.map(anchor).collect();
    assert_eq!(linked, sections);
    Ok(())
}

#[test]
fn the_dashboard_has_the_fields_that_grafana_requires() -> Result<()> {
    let dashboard = dashboard()?;
    for key in ["title", "uid", "refresh", "timezone"] {
        ensure!(dashboard[key].is_string(), "the dashboard has no {key}");
    }
    ensure!(
        dashboard["schemaVersion"].as_u64() >= Some(36),
        "schemaVersion"
    );
    ensure!(
        dashboard["time"]["from"].is_string() && dashboard["time"]["to"].is_string(),
        "time"
    );
    let variables = dashboard["templating"]["list"]
        .as_array()
        .context("find the variables")?;
    let variables: BTreeSet<&str> = variables
        .iter()
        .filter_map(|variable| variable["name"].as_str())
        .collect();
    assert_eq!(
        variables,
        BTreeSet::from(["datasource", "instance", "worker"])
    );

    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in panels(&dashboard)? {
        let title = panel["title"].as_str().context("a panel has no title")?;
        let id = panel["id"]
            .as_u64()
            .with_context(|| format!("{title} has no id"))?;
        ensure!(ids.insert(id), "{title}: the id {id} is used twice");
        check_place(panel, &mut cells).with_context(|| format!("place {title}"))?;
        let kind = panel["type"].as_str().context("a panel has no type")?;
        if kind == "row" {
            ensure!(panel["collapsed"].is_boolean(), "{title}");
            continue;
        }
        ensure!(["stat", "timeseries"].contains(&kind), "{title}: {kind}");
        check_panel(panel).with_context(|| format!("check {title}"))?;
    }
    Ok(())
}

/// Checks that a panel is inside of the grid of 24 columns, and covers no other panel.
fn check_place(panel: &Value, cells: &mut BTreeSet<(u64, u64)>) -> Result<()> {
    let place = |key: &str| {
        panel["gridPos"][key]
            .as_u64()
            .with_context(|| format!("gridPos has no {key}"))
    };
    let (x, y, w, h) = (place("x")?, place("y")?, place("w")?, place("h")?);
    ensure!(w > 0 && h > 0 && x + w <= 24, "x {x}, w {w}, h {h}");
    for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
        ensure!(cells.insert(cell), "another panel covers {cell:?}");
    }
    Ok(())
}

/// Checks a panel with data: its source, its unit, its targets.
fn check_panel(panel: &Value) -> Result<()> {
    ensure!(panel["description"].is_string(), "no description");
    let is_source =
        |value: &Value| value["type"] == "prometheus" && value["uid"] == "${datasource}";
    ensure!(is_source(&panel["datasource"]), "no data source");
    ensure!(
        panel["fieldConfig"]["defaults"]["unit"].is_string(),
        "no unit"
    );
    ensure!(panel["fieldConfig"]["overrides"].is_array(), "no overrides");
    ensure!(panel["options"].is_object(), "no options");
    let targets = panel["targets"].as_array().context("no targets")?;
    ensure!(!targets.is_empty(), "no targets");
    let mut names = BTreeSet::new();
    for target in targets {
        let name = target["refId"].as_str().context("a target has no refId")?;
        ensure!(names.insert(name), "refId {name} is used twice");
        ensure!(
            is_source(&target["datasource"]),
            "a target has no data source"
        );
        ensure!(target["legendFormat"].is_string(), "a target has no legend");
    }
    Ok(())
}
