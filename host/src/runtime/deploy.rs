//! Deploying: checks the component against manifest and streams, shows the plan, creates an
//! immutable deployment.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::bus::StreamSpec;
use crate::component;
use crate::config::manifest::{Stream, Worker, WorkerMigration};
use crate::consumer::subscriptions;
use crate::guest::check_kind;
use crate::ingress::check_routes;
use crate::model::hint::WithHint;
use crate::model::signature::Signature;
use crate::model::subject;
use crate::runtime::Host;
use crate::runtime::plan_details::{
    Action, Change, PlanDetails, consumer_changes, manifest_changes,
};
use crate::store::DeploymentRecord;

/// A deployment to make. The component is uploaded before it, under its digest.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DeploymentProposal")]
pub struct Proposal {
    pub worker: Worker,
    /// SHA-256 of the component, lower-case hex.
    pub digest: String,
    /// Streams that the manifest declares. Missing ones are created.
    pub streams: Vec<Stream>,
    pub migrations: Vec<WorkerMigration>,
    /// The signature of the component.
    #[serde(default)]
    pub signature: Option<Signature>,
}

/// The changes that a deployment will make.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DeploymentPlan")]
pub struct Plan {
    pub worker: String,
    /// The version that is active now.
    pub from: Option<u32>,
    /// One line each, beginning with `+`, `-` or `~`; empty when nothing changes.
    pub changes: Vec<String>,
    /// The same changes by kind.
    pub details: PlanDetails,
}

/// Checks a proposal and returns the changes it would make.
///
/// # Errors
/// The component does not fit the manifest, the routes of other workers, or the streams.
pub async fn plan(host: &Host, proposal: &Proposal) -> Result<Plan> {
    let wasm = host
        .services
        .store
        .component(&proposal.digest)
        .await?
        .with_context(|| format!("the component {} was not uploaded", proposal.digest))?;

    // The component, the routes and the streams.
    let signature = proposal.signature.as_ref();
    host.services
        .check_signature(&proposal.digest, &wasm, signature)
        .await
        .with_context(|| cannot_be_deployed(&proposal.worker))?;
    let guest = host.services.load(wasm.into()).await?;
    check_kind(&proposal.worker, guest.handler())?;
    proposal.worker.compile_schemas()?;
    check_routes(
        &proposal.worker,
        host.services.deployed_workers().await?.iter(),
    )?;
    let streams = check_streams(host, proposal).await?;
    let mut changes: Vec<String> = streams
        .iter()
        .map(|stream| format!("+ stream {} ({})", stream.name, stream.subjects.join(", ")))
        .collect();
    check_consumer(host, &proposal.worker).await?;

    // Pending migrations.
    let due = host
        .services
        .store
        .due_migrations(&proposal.worker.name, &proposal.migrations)
        .await?;
    changes.extend(due.iter().map(|name| format!("+ migration {name}")));
    let active = host
        .services
        .store
        .active_deployment(&proposal.worker.name)
        .await?;

    // The differences from the active deployment.
    let imports: Vec<Value> = guest
        .surface()
        .imports
        .iter()
        .map(|name| Value::from(name.as_str()))
        .collect();
    let (before, old_worker) = match &active {
        Some(active) => {
            let worker: Worker =
                serde_json::from_str(&active.manifest).context("read the active manifest")?;
            (describe_active(host, active, &worker).await?, Some(worker))
        }
        None => (Value::Null, None),
    };
    let after = describe(&proposal.worker, &proposal.digest, imports)?;
    let differing = match &active {
        Some(_) => differences(&before, &after),
        None => non_default_settings(&proposal.worker, &after)?,
    };
    // Any difference has to be deployed, even one of order alone.
    if differing.is_empty() && before != after {
        changes.push("~ the order of lists".to_owned());
    }
    changes.extend(differing);
    let is_changed = !changes.is_empty();
    let digests = Change {
        old: active.as_ref().map(|active| active.digest.clone()),
        new: proposal.digest.clone(),
    };
    let details = PlanDetails {
        action: Action::of(active.is_some(), is_changed),
        component: Some(digests).filter(|digests| digests.old.as_ref() != Some(&digests.new)),
        manifest: manifest_changes(old_worker.as_ref(), &proposal.worker)?,
        migrations: due,
        streams: streams.into_iter().map(|stream| stream.name).collect(),
        consumers: consumer_changes(old_worker.as_ref(), &proposal.worker),
    };
    Ok(Plan {
        worker: proposal.worker.name.clone(),
        from: active.map(|active| active.version),
        changes,
        details,
    })
}

/// Creates the deployment and activates it. If nothing would change, returns the active one.
pub async fn deploy(host: &Host, proposal: &Proposal) -> Result<(Plan, DeploymentRecord)> {
    let plan = plan(host, proposal).await?;
    if let Some(signature) = &proposal.signature {
        let signature = serde_json::to_string(signature).context("write the signature")?;
        let store = &host.services.store;
        store.put_signature(&proposal.digest, &signature).await?;
    }
    if plan.changes.is_empty()
        && let Some(active) = host
            .services
            .store
            .active_deployment(&proposal.worker.name)
            .await?
    {
        return Ok((plan, active));
    }
    for stream in &proposal.streams {
        host.services
            .bus
            .ensure_stream(&stream_spec(stream))
            .await
            .with_context(|| format!("create the stream {}", stream.name))?;
    }
    // Checked again, since its stream may be new.
    check_consumer(host, &proposal.worker).await?;
    let manifest = serde_json::to_string(&proposal.worker).context("write the manifest")?;
    let record = host
        .services
        .store
        .deploy(
            &proposal.worker.name,
            &proposal.digest,
            &manifest,
            &proposal.migrations,
        )
        .await?;
    host.notify_deployed();
    Ok((plan, record))
}

/// Activates an earlier version: `to`, or the one before the active one.
pub async fn rollback(host: &Host, worker: &str, to: Option<u32>) -> Result<DeploymentRecord> {
    let active = host
        .services
        .store
        .active_deployment(worker)
        .await?
        .ok_or_else(|| anyhow!("there is no worker `{worker}`"))
        .hint("oncely workers")?;
    let version = match to {
        Some(version) => version,
        None => active
            .version
            .checked_sub(1)
            .filter(|version| *version > 0)
            .ok_or_else(|| {
                anyhow!(
                    "worker {worker} runs version {}, and there is no earlier version",
                    active.version
                )
            })?,
    };

    // The earlier version must still fit the routes and the streams.
    if let Some(record) = host
        .services
        .store
        .deployments(worker)
        .await?
        .iter()
        .find(|one| one.version == version)
    {
        let earlier: Worker =
            serde_json::from_str(&record.manifest).context("read the earlier manifest")?;
        check_routes(&earlier, host.services.deployed_workers().await?.iter())?;
        check_consumer(host, &earlier).await?;
        check_stored_signature(host, &earlier, &record.digest).await?;
    }
    let record = host
        .services
        .store
        .activate(worker, version)
        .await?
        .ok_or_else(|| anyhow!("worker {worker} has no version {version}"))
        .hint(format!("oncely workers {worker}"))?;
    host.notify_deployed();
    Ok(record)
}

/// Checks the signature of a component that was deployed before, if this host has keys.
async fn check_stored_signature(host: &Host, worker: &Worker, digest: &str) -> Result<()> {
    let services = &host.services;
    if services.component_keys.is_none() {
        return Ok(());
    }
    let wasm = services.store.component(digest).await?.unwrap_or_default();
    let checked = services.check_signature(digest, &wasm, None).await;
    checked.with_context(|| cannot_be_deployed(worker))
}

fn cannot_be_deployed(worker: &Worker) -> String {
    format!("the component of worker {} cannot be deployed", worker.name)
}

/// Checks that the worker can consume its stream and its redrives: a version that never can is not
/// activated.
async fn check_consumer(host: &Host, worker: &Worker) -> Result<()> {
    let Some(stream) = &worker.stream else {
        return Ok(());
    };
    for subscription in subscriptions(worker, stream) {
        let result = host.services.bus.validate_subscription(&subscription).await;
        let name = &worker.name;
        result.with_context(|| {
            format!(
                "worker {name} cannot consume the stream {}",
                subscription.stream
            )
        })?;
    }
    Ok(())
}

fn stream_spec(stream: &Stream) -> StreamSpec {
    StreamSpec {
        name: stream.name.clone(),
        subjects: stream.subjects.clone(),
        max_age: stream.max_age,
        ..StreamSpec::default()
    }
}

/// Checks that the source and all outputs have a stream. Returns the streams that will be created.
async fn check_streams(host: &Host, proposal: &Proposal) -> Result<Vec<Stream>> {
    let worker = &proposal.worker;
    let mut missing = Vec::new();
    let mut source = None;
    for stream in &proposal.streams {
        if host.services.bus.stream(&stream.name).await?.is_none() {
            missing.push(stream.clone());
        }
        if Some(&stream.name) == worker.stream.as_ref() {
            source = Some(stream.subjects.clone());
        }
    }
    if let Some(stream) = &worker.stream {
        check_source(host, proposal, stream, source).await?;
    }
    for output in &worker.outputs {
        let declared = proposal
            .streams
            .iter()
            .any(|s| s.subjects.iter().any(|p| subject::covers(p, output)));
        if !declared
            && host
                .services
                .bus
                .stream_name_for_subject(output)
                .await?
                .is_none()
        {
            return Err(anyhow!(
                "no stream accepts the output `{output}` of worker {}, \
                 so its messages cannot be stored",
                worker.name
            ))
            .hint(format!(
                "add to oncely.toml:  [[stream]]  name = \"OUTPUTS\"  subjects = [\"{output}\"]"
            ));
        }
    }
    Ok(missing)
}

/// Checks that the stream of a worker exists or is declared, and covers its subjects.
///
/// `source` are the subjects of the stream in the proposal.
async fn check_source(
    host: &Host,
    proposal: &Proposal,
    stream: &str,
    mut source: Option<Vec<String>>,
) -> Result<()> {
    let worker = &proposal.worker;
    match host.services.bus.stream(stream).await? {
        Some(existing) => {
            host.retention.check(worker, existing.max_age)?;
            // A copy or a subject transform stores messages under subjects that the stream does not
            // list.
            if existing.is_copy || existing.has_subject_transform {
                return Ok(());
            }
            source = Some(existing.subjects);
        }
        None => {
            if let Some(declared) = proposal
                .streams
                .iter()
                .find(|declared| declared.name == stream)
            {
                host.retention.check(worker, declared.max_age)?;
            }
        }
    }
    let Some(source) = source else {
        return Err(anyhow!(
            "worker {} reads the stream `{}`, which does not exist",
            worker.name,
            stream
        ))
        .hint(format!(
            "add to oncely.toml:  [[stream]]  name = \"{}\"  subjects = [{}]",
            stream,
            quoted(&worker.subjects)
        ));
    };
    for wanted in &worker.subjects {
        if !source
            .iter()
            .any(|pattern| subject::covers(pattern, wanted))
        {
            bail!(
                "worker {} subscribes to `{wanted}`, but its stream `{}` accepts only {}",
                worker.name,
                stream,
                quoted(&source)
            );
        }
    }
    Ok(())
}

fn quoted(names: &[String]) -> String {
    names
        .iter()
        .map(|name| format!("\"{name}\""))
        .collect::<Vec<_>>()
        .join(", ")
}

/// A deployment as one tree for comparison.
fn describe(worker: &Worker, digest: &str, imports: Vec<Value>) -> Result<Value> {
    let mut tree = serde_json::to_value(worker).context("describe the manifest")?;
    if let Some(tree) = tree.as_object_mut() {
        // A digest stands for the content of a schema.
        let schemas = worker.schemas.iter().map(|schema| {
            let digest = hex::encode(Sha256::digest(schema.text.as_bytes()));
            let digest = digest.get(..12).unwrap_or_default();
            let text = format!("{} (sha256 {digest})", schema.file);
            (schema.subject.clone(), Value::from(text))
        });
        tree.insert("schemas".to_owned(), schemas.collect());
        let component = match &worker.component {
            Some(reference) => format!("{digest} from {reference}"),
            None => digest.to_owned(),
        };
        tree.insert("component".to_owned(), Value::from(component));
        tree.insert("imports".to_owned(), Value::from(imports));
    }
    Ok(tree)
}

async fn describe_active(
    host: &Host,
    deployment: &DeploymentRecord,
    worker: &Worker,
) -> Result<Value> {
    let wasm = host
        .services
        .store
        .component(&deployment.digest)
        .await?
        .unwrap_or_default();
    let imports = match component::inspect(&wasm) {
        Ok(surface) => surface.imports.into_iter().map(Value::from).collect(),
        Err(_) => Vec::new(),
    };
    describe(worker, &deployment.digest, imports)
}

/// The settings of a new worker that differ from their defaults.
fn non_default_settings(worker: &Worker, description: &Value) -> Result<Vec<String>> {
    let defaults =
        leaves(&serde_json::to_value(worker.with_defaults()).context("describe the defaults")?);
    let is_shown = |path: &str, value: &String| {
        let is_always_shown = ["component", "stream", "routes"].contains(&path);
        is_always_shown
            || (path != "imports"
                && !defaults
                    .get(path)
                    .is_some_and(|values| values.contains(value)))
    };
    let settings = leaves(description).into_iter().flat_map(|(path, values)| {
        let values: Vec<String> = values
            .into_iter()
            .filter(|value| is_shown(&path, value))
            .collect();
        values
            .into_iter()
            .map(move |value| format!("+ {path}: {value}"))
    });
    Ok(settings.collect())
}

/// The differences of two trees, one line each. Lists are compared as sets.
fn differences(before: &Value, after: &Value) -> Vec<String> {
    let (before, after) = (leaves(before), leaves(after));
    let mut lines = Vec::new();
    for (path, values) in &after {
        let old = before.get(path).map_or(&[][..], Vec::as_slice);
        let added: Vec<&String> = values.iter().filter(|value| !old.contains(value)).collect();
        let removed: Vec<&String> = old.iter().filter(|value| !values.contains(value)).collect();
        match (removed.as_slice(), added.as_slice()) {
            ([from], [to]) => lines.push(format!("~ {path}: {from} -> {to}")),
            (removed, added) => {
                lines.extend(removed.iter().map(|value| format!("- {path}: {value}")));
                lines.extend(added.iter().map(|value| format!("+ {path}: {value}")));
            }
        }
    }
    for (path, values) in before.iter().filter(|(path, _)| !after.contains_key(*path)) {
        lines.extend(values.iter().map(|value| format!("- {path}: {value}")));
    }
    lines
}

/// Every leaf of a tree under its dotted path; the items of a list share one path.
fn leaves(tree: &Value) -> BTreeMap<String, Vec<String>> {
    fn walk(path: &str, tree: &Value, into: &mut BTreeMap<String, Vec<String>>) {
        let below = |key: &str| {
            if path.is_empty() {
                key.to_owned()
            } else {
                format!("{path}.{key}")
            }
        };
        match tree {
            Value::Null => {}
            Value::Object(members) => members
                .iter()
                .for_each(|(key, value)| walk(&below(key), value, into)),
            Value::Array(items) => items.iter().for_each(|item| match label(item) {
                // Path and methods identify a route, so a setting that moves to another route is a
                // change.
                Some(label) => {
                    into.entry(path.to_owned()).or_default().push(label.clone());
                    walk(&format!("{path}[{label}]"), item, into);
                }
                None => walk(path, item, into),
            }),
            Value::String(text) => into.entry(path.to_owned()).or_default().push(text.clone()),
            other => into
                .entry(path.to_owned())
                .or_default()
                .push(other.to_string()),
        }
    }
    /// `POST /a` for a route; none for anything else.
    fn label(item: &Value) -> Option<String> {
        let path = item.get("path")?.as_str()?;
        let methods: Vec<&str> = item
            .get("methods")?
            .as_array()?
            .iter()
            .filter_map(Value::as_str)
            .collect();
        Some(if methods.is_empty() {
            path.to_owned()
        } else {
            format!("{} {path}", methods.join(","))
        })
    }
    let mut into = BTreeMap::new();
    walk("", tree, &mut into);
    into
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::manifest::Manifest;
    use serde_json::json;

    #[test]
    fn plan_of_a_new_worker_lists_its_non_default_settings() {
        let settings = |text: &str| {
            let worker = Manifest::parse(text, "oncely.toml")
                .unwrap()
                .workers
                .remove(0)
                .worker;
            let description = describe(&worker, "d1", vec!["wasi:io/poll".into()]).unwrap();
            non_default_settings(&worker, &description).unwrap()
        };
        let worker = "[[worker]]\nname = \"a\"\ncomponent = \"a.wasm\"\n";
        let consuming = settings(&format!(
            "{worker}stream = \"S\"\noutputs = [\"o.>\"]\nbatch = 7\n[worker.limits]\ntime = \"3s\""
        ));
        assert_eq!(
            consuming,
            [
                "+ batch: 7",
                "+ component: d1",
                "+ limits.time: 3s",
                "+ outputs: o.>",
                "+ stream: S"
            ]
        );
        let route = "[[worker.route]]\npath = \"/a\"\nmethods = [\"POST\"]\nwindow = \"48h\"\n";
        let http = settings(&format!("{worker}{route}"));
        assert_eq!(
            http,
            [
                "+ component: d1",
                "+ routes: POST /a",
                "+ routes[POST /a].window: 48h"
            ]
        );
        // Two routes of one path are both listed.
        let other = "[[worker.route]]\npath = \"/a\"\nmethods = [\"GET\"]\n";
        let both = settings(&format!("{worker}outputs = [\"o.>\"]\n{route}{other}"));
        assert!(
            both.contains(&"+ outputs: o.>".to_owned()) && both.len() == 5,
            "{both:?}"
        );
    }

    #[test]
    fn differences_list_settings_moved_between_routes() {
        let tree = |first: &str, second: &str| {
            json!({"routes": [
                {"path": "/a", "methods": [], "idempotency_key": first},
                {"path": "/b", "methods": ["GET"], "idempotency_key": second},
            ]})
        };
        let changes = differences(&tree("required", "optional"), &tree("optional", "required"));
        assert_eq!(
            changes,
            [
                "~ routes[/a].idempotency_key: required -> optional",
                "~ routes[GET /b].idempotency_key: optional -> required",
            ]
        );
    }

    #[test]
    fn differences_list_added_removed_and_changed_values() {
        let before = json!({"outputs": ["a", "b"], "retry": {"attempts": 5}, "component": "1"});
        let after = json!({"outputs": ["b", "c", "d"], "retry": {"attempts": 3}, "component": "1"});
        assert_eq!(
            differences(&before, &after),
            [
                "- outputs: a",
                "+ outputs: c",
                "+ outputs: d",
                "~ retry.attempts: 5 -> 3"
            ]
        );
        assert!(differences(&after, &after).is_empty());
    }
}
