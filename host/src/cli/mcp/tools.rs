//! The table of tools, each with its description and the schema of its arguments.

use std::future::Future;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use rmcp::model::{JsonObject, ToolAnnotations};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::answer::Answer;
use super::planning::{dead_letters, outputs, workers};
use super::{Session, applying, reading};

/// The effect of a tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolKind {
    /// It changes nothing.
    Read,
    /// It changes nothing, and returns a plan.
    Plan,
    /// It applies a plan.
    Apply,
}

/// A tool.
pub struct Tool {
    pub name: &'static str,
    about: &'static str,
    pub kind: ToolKind,
    arguments: JsonObject,
    pub call: Call,
}

/// Runs a tool with arguments that were not checked yet.
type Call = Box<dyn Fn(Arc<Session>, Value) -> BoxFuture<'static, Result<Answer>> + Send + Sync>;

/// All tools, the overview first.
pub fn all() -> Vec<Tool> {
    let mut tools = reading_tools();
    tools.extend(planning_tools());
    tools.push(tool("apply", ToolKind::Apply, applying::apply).about(
        "Apply a plan, once. Ask the user before. It is refused if the plan has expired, was \
             applied before, or if the things that it saw have changed.",
    ));
    tools
}

fn reading_tools() -> Vec<Tool> {
    vec![
        read("status", reading::status).about(
            "The state of the installation: whether it is ready, its workers with backlog and \
             failures, raised alarms, and the relay. Begin here.",
        ),
        read("worker", reading::worker)
            .about("One worker: its deployments, its state on each host, and its pause."),
        read("dead_letter_groups", reading::groups).about(
            "Failed messages, grouped by their failure: the number and the age of each group. \
             Read this before single dead letters.",
        ),
        read("dead_letters", reading::dead_letters)
            .about("A list of dead letters, newest first, without bodies."),
        read("dead_letter", reading::dead_letter).about(
            "One dead letter: its body in parts of 4 KiB, headers, failed attempts with logs, \
             corrections, and earlier actions.",
        ),
        read("event", reading::event).about(
            "One event of a worker: its place on the stream, its inbox row, its attempts, its \
             outputs with their places, and whether it took effect once.",
        ),
        read("search", reading::search)
            .about("Find an event id, the number of a dead letter, or a subject."),
        read("outputs", reading::outputs).about(
            "Messages that workers sent and that are parked: their stream refused them. Or all \
             unpublished ones, or dropped ones.",
        ),
        read("output", reading::output)
            .about("One output with its headers and its body, in parts of 4 KiB."),
        read("streams", reading::streams)
            .about("The streams with their subjects, their size and the workers that use them."),
        read("state", reading::state)
            .about("Values of a worker's keyed state, by the prefix of their keys."),
        read("jobs", reading::jobs).about(
            "Jobs that redrive dead letters: the newest ones, or one with its dead letters.",
        ),
        read("verify", reading::verify).about(
            "Check the results of redriven dead letters: inbox, and copies of their outputs on \
             the streams.",
        ),
        read("activity", reading::activity).about(
            "The log of changes: who changed what, when, why, and with which result. Newest first.",
        ),
        read("doctor", reading::doctor).about(
            "Check NATS, the database, the machine and the settings. Returns advice and problems, \
             each with its fix.",
        ),
        read("audit", reading::audit).about(
            "Compare the database with the streams over a time, and name the differences. Repairs \
             nothing. It takes seconds to minutes. The token needs the role operate.",
        ),
        read("explain", reading::explain)
            .about("Explain a code of Oncely: its meaning and what to do."),
    ]
}

fn planning_tools() -> Vec<Tool> {
    vec![
        plan("plan_redrive", dead_letters::redrive).about(
            "Plan to send dead letters to their worker again, at most 100. Each is tried in a dry \
             run, whose effects are rolled back; the plan has those that would succeed. Shows the \
             changes of rows, state and outputs. The token needs the role operate.",
        ),
        plan("plan_close", dead_letters::close).about(
            "Plan to resolve dead letters (no action is needed) or to drop them (they are never \
             handled), at most 100.",
        ),
        plan("plan_edit", dead_letters::edit).about(
            "Plan to store a corrected body for a dead letter. The next redrive sends it. Shows \
             the difference.",
        ),
        plan("plan_pause", workers::pause)
            .about("Plan to pause a worker on all hosts. Its messages wait on the stream."),
        plan("plan_resume", workers::resume).about("Plan to end the pause of a worker."),
        plan("plan_skip", workers::skip).about(
            "Plan to skip messages of the backlog of a paused worker: they are never handled. At \
             most 100,000.",
        ),
        plan("plan_rollback", workers::rollback).about(
            "Plan to activate an earlier version of a worker. Applying it needs the role deploy.",
        ),
        plan("plan_outputs", outputs::outputs).about(
            "Plan to retry parked outputs, or to drop them (they are never published), at most \
             100.",
        ),
        plan("plan_job", outputs::job).about("Plan to pause, resume or cancel a redrive job."),
    ]
}

fn read<A, Fut>(name: &'static str, call: fn(Arc<Session>, A) -> Fut) -> Tool
where
    A: DeserializeOwned + JsonSchema + Send + 'static,
    Fut: Future<Output = Result<Answer>> + Send + 'static,
{
    tool(name, ToolKind::Read, call)
}

fn plan<A, Fut>(name: &'static str, call: fn(Arc<Session>, A) -> Fut) -> Tool
where
    A: DeserializeOwned + JsonSchema + Send + 'static,
    Fut: Future<Output = Result<Answer>> + Send + 'static,
{
    tool(name, ToolKind::Plan, call)
}

fn tool<A, Fut>(name: &'static str, kind: ToolKind, call: fn(Arc<Session>, A) -> Fut) -> Tool
where
    A: DeserializeOwned + JsonSchema + Send + 'static,
    Fut: Future<Output = Result<Answer>> + Send + 'static,
{
    let call =
        move |session: Arc<Session>, arguments: Value| match serde_json::from_value(arguments) {
            Ok(arguments) => call(session, arguments).boxed(),
            Err(error) => {
                let error = anyhow!("the arguments of {name} are wrong: {error}");
                std::future::ready(Err(error)).boxed()
            }
        };
    Tool {
        name,
        about: "",
        kind,
        arguments: schema::<A>(),
        call: Box::new(call),
    }
}

/// The schema of arguments, complete in itself: not every assistant resolves references.
fn schema<A: JsonSchema>() -> JsonObject {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<A>();
    let mut schema = schema.as_object().cloned().unwrap_or_default();
    schema.remove("title");
    schema.remove("description");
    schema
}

impl Tool {
    /// Sets the description, which is constant: text of outsiders has no place in it.
    fn about(self, about: &'static str) -> Self {
        Tool { about, ..self }
    }

    /// The tool as the protocol describes it.
    pub fn definition(&self) -> rmcp::model::Tool {
        let reads = self.kind != ToolKind::Apply;
        let hints = ToolAnnotations::new()
            .read_only(reads)
            .destructive(!reads)
            .idempotent(reads)
            .open_world(false);
        rmcp::model::Tool::new(self.name, self.about, self.arguments.clone()).annotate(hints)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_has_a_name_a_description_and_an_object_of_arguments() {
        let tools = all();
        let mut names: Vec<&str> = tools.iter().map(|tool| tool.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), tools.len());
        for tool in &tools {
            assert!(!tool.about.is_empty(), "{}", tool.name);
            assert_eq!(
                tool.arguments.get("type").and_then(Value::as_str),
                Some("object"),
                "{}: {:?}",
                tool.name,
                tool.arguments
            );
            let schema = Value::Object(tool.arguments.clone()).to_string();
            assert!(!schema.contains("$ref"), "{}: {schema}", tool.name);
            assert_eq!(tool.name.starts_with("plan_"), tool.kind == ToolKind::Plan);
        }
    }
}
