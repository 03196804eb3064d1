//! The changes of a deployment by kind, as `oncely deploy --plan --json` prints them.

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bus::Subscription;
use crate::config::manifest::Worker;
use crate::consumer::subscriptions;

/// The changes of a deployment by kind. `docs/deploying.md` documents the JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlanDetails {
    pub action: Action,
    /// The SHA-256 of the component; none if it stays.
    pub component: Option<Change<Option<String>, String>>,
    /// The changed keys of the manifest, in the order of their names.
    pub manifest: Vec<KeyChange>,
    /// The migrations that will run, in order.
    pub migrations: Vec<String>,
    /// The streams that will be created.
    pub streams: Vec<String>,
    /// The changes of consumers on streams.
    pub consumers: Vec<ConsumerChange>,
}

/// The effect of a deployment on its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "DeploymentAction")]
pub enum Action {
    /// The worker is new, or it was retired.
    Create,
    /// A new version is activated.
    Update,
    /// The active version stays.
    None,
}

/// A value before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Change<Old, New> {
    pub old: Old,
    pub new: New,
}

/// A changed key of the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeyChange {
    /// The key with its tables, such as `retry.attempts`.
    pub key: String,
    /// The value in the active version; null if it has none. A secret is its reference.
    pub old: Value,
    /// The value in the new version; null if it has none.
    pub new: Value,
}

/// A changed consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsumerChange {
    pub stream: String,
    pub consumer: String,
    pub action: ConsumerAction,
}

/// The effect of a deployment on a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConsumerAction {
    /// It is created if it does not exist.
    Create,
    /// Its subjects or its limits change. Its position stays.
    Update,
    /// The new version does not use it. It stays on the server.
    Unused,
}

impl Action {
    /// The action for a worker with or without an active version.
    pub fn of(is_active: bool, is_changed: bool) -> Action {
        match (is_active, is_changed) {
            (false, _) => Action::Create,
            (true, true) => Action::Update,
            (true, false) => Action::None,
        }
    }
}

/// The changed keys between two workers. For a new worker, the keys without their default.
pub fn manifest_changes(old: Option<&Worker>, new: &Worker) -> Result<Vec<KeyChange>> {
    let tree = |worker: &Worker| serde_json::to_value(worker).context("describe the manifest");
    let new_tree = tree(new)?;
    let mut changes = Vec::new();
    match old {
        Some(old) => compare("", &tree(old)?, &new_tree, &mut changes),
        None => {
            let mut defaults = tree(&new.with_defaults())?;
            if let Some(defaults) = defaults.as_object_mut() {
                defaults.remove("stream");
                defaults.remove("routes");
            }
            compare("", &defaults, &new_tree, &mut changes);
            changes
                .iter_mut()
                .for_each(|change| change.old = Value::Null);
        }
    }
    Ok(changes)
}

/// Adds the differences of two trees. Lists and references to secrets are compared as a whole.
fn compare(path: &str, old: &Value, new: &Value, changes: &mut Vec<KeyChange>) {
    if old == new {
        return;
    }
    let is_table = |value: &Value| value.is_object() && !is_secret(value);
    let is_absent_or_table = |value: &Value| value.is_null() || is_table(value);
    if !(is_absent_or_table(old) && is_absent_or_table(new)) {
        changes.push(KeyChange {
            key: path.to_owned(),
            old: old.clone(),
            new: new.clone(),
        });
        return;
    }
    let keys = |value: &Value| -> Vec<String> {
        let members = value.as_object().into_iter().flatten();
        members.map(|(key, _)| key.clone()).collect()
    };
    let all: std::collections::BTreeSet<String> = keys(old).into_iter().chain(keys(new)).collect();
    for key in all {
        let below = match path {
            "" => key.clone(),
            path => format!("{path}.{key}"),
        };
        let value = |tree: &Value| tree.get(&key).cloned().unwrap_or_default();
        compare(&below, &value(old), &value(new), changes);
    }
}

/// Whether a value is `{ "secret": … }`.
fn is_secret(value: &Value) -> bool {
    let members = value.as_object();
    members.is_some_and(|members| members.len() == 1 && members.contains_key("secret"))
}

/// The changes of the consumers of a worker.
pub fn consumer_changes(old: Option<&Worker>, new: &Worker) -> Vec<ConsumerChange> {
    let of = |worker: Option<&Worker>| -> Vec<Subscription> {
        worker
            .and_then(|worker| Some(subscriptions(worker, worker.stream.as_ref()?)))
            .map_or_else(Vec::new, Vec::from)
    };
    let (old, new) = (of(old), of(Some(new)));
    let is_same =
        |a: &Subscription, b: &Subscription| (&a.stream, &a.durable) == (&b.stream, &b.durable);
    let change = |subscription: &Subscription, action| ConsumerChange {
        stream: subscription.stream.clone(),
        consumer: subscription.durable.clone(),
        action,
    };
    let mut changes = Vec::new();
    for subscription in &new {
        match old.iter().find(|old| is_same(old, subscription)) {
            None => changes.push(change(subscription, ConsumerAction::Create)),
            Some(old) if old != subscription => {
                changes.push(change(subscription, ConsumerAction::Update));
            }
            Some(_) => {}
        }
    }
    let unused = old
        .iter()
        .filter(|old| !new.iter().any(|new| is_same(old, new)));
    changes.extend(unused.map(|old| change(old, ConsumerAction::Unused)));
    changes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::manifest::Manifest;

    fn worker(settings: &str) -> Worker {
        let text = format!("[[worker]]\nname = \"w\"\ncomponent = \"w.wasm\"\n{settings}");
        let mut manifest = Manifest::parse(&text, "oncely.toml").unwrap();
        manifest.workers.remove(0).worker
    }

    fn changes(old: Option<&Worker>, new: &Worker) -> Vec<(String, Value, Value)> {
        let changes = manifest_changes(old, new).unwrap().into_iter();
        changes
            .map(|change| (change.key, change.old, change.new))
            .collect()
    }

    #[test]
    fn changed_keys_have_their_old_and_new_values() {
        let old = worker(
            "stream = \"S\"\nbatch = 7\n[worker.config]\na = \"1\"\nb = \"2\"\n\
             c = { secret = \"env:C\" }",
        );
        let new = worker(
            "stream = \"S\"\noutputs = [\"o.>\"]\n[worker.config]\n\
             a = { secret = \"env:A\" }\nc = { secret = \"env:D\" }\nd = \"4\"",
        );
        assert_eq!(
            changes(Some(&old), &new),
            [
                ("batch".into(), json!(7), json!(100)),
                ("config.a".into(), json!("1"), json!({ "secret": "env:A" })),
                ("config.b".into(), json!("2"), json!(null)),
                (
                    "config.c".into(),
                    json!({ "secret": "env:C" }),
                    json!({ "secret": "env:D" })
                ),
                ("config.d".into(), json!(null), json!("4")),
                ("outputs".into(), json!([]), json!(["o.>"])),
            ]
        );
        assert!(changes(Some(&old), &old).is_empty());
    }

    #[test]
    fn a_new_worker_lists_its_keys_without_default() {
        let new = worker("stream = \"S\"\n[worker.retry]\nattempts = 9");
        assert_eq!(
            changes(None, &new),
            [
                ("retry.attempts".into(), json!(null), json!(9)),
                ("stream".into(), json!(null), json!("S")),
            ]
        );
    }

    #[test]
    fn consumers_are_created_updated_or_unused() {
        let plan = |old: Option<&Worker>, new: &Worker| -> Vec<(String, ConsumerAction)> {
            let changes = consumer_changes(old, new).into_iter();
            changes
                .map(|change| (change.stream, change.action))
                .collect()
        };
        let (a, b) = (worker("stream = \"A\""), worker("stream = \"B\""));
        let http = worker("[[worker.route]]\npath = \"/r\"");
        let narrow = worker("stream = \"A\"\nsubjects = [\"a.x\"]");
        let created = plan(None, &a);
        assert_eq!(created.len(), 2);
        assert!(
            created
                .iter()
                .all(|(_, action)| *action == ConsumerAction::Create)
        );
        assert!(plan(Some(&a), &a).is_empty());
        assert_eq!(
            plan(Some(&a), &narrow),
            [("A".into(), ConsumerAction::Update)]
        );
        assert_eq!(
            plan(Some(&a), &b),
            [
                ("B".into(), ConsumerAction::Create),
                ("A".into(), ConsumerAction::Unused)
            ]
        );
        assert!(plan(None, &http).is_empty());
    }
}
