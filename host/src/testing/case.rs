//! Cases of tests, as their files have them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::content;
use super::effects::Effects;
use crate::config::manifest::Worker;
use crate::model::hint::WithHint as _;
use crate::model::message::{self, EVENT_ID_MAX, Headers, Message, Origin};
use crate::model::request::HttpRequest;
use crate::model::subject;

/// A file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaseFile {
    /// The worker; may be absent if the manifest has one worker.
    pub worker: Option<String>,
    pub cases: Vec<Case>,
    /// Its path.
    #[serde(skip)]
    pub path: PathBuf,
}

/// One case: the state and rows before, messages or requests, and the effects that they must have.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    pub name: String,
    #[serde(default)]
    pub given: Given,
    /// The time that the handler reads; by default that of the run.
    pub now: Option<Timestamp>,
    message: Option<MessageText>,
    messages: Option<Vec<MessageText>>,
    request: Option<RequestText>,
    requests: Option<Vec<RequestText>>,
    /// The expected effects. An absent part is not checked.
    #[serde(default)]
    pub expect: Effects,
}

/// State and rows before the messages.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Given {
    /// Values of keyed state.
    pub state: BTreeMap<String, Value>,
    /// Rows by table.
    pub rows: BTreeMap<String, Vec<Map<String, Value>>>,
    /// Statements that run after the rows are inserted.
    pub sql: Vec<String>,
}

/// A message as a case has it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MessageText {
    subject: Option<String>,
    id: Option<String>,
    headers: BTreeMap<String, HeaderText>,
    body: Value,
    /// The number of the attempt.
    attempt: Option<u32>,
}

/// A request as a case has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestText {
    method: Option<String>,
    path: String,
    /// The idempotency key; null for none.
    #[serde(default, deserialize_with = "present")]
    key: Option<Option<String>>,
    #[serde(default)]
    headers: BTreeMap<String, HeaderText>,
    #[serde(default)]
    body: Value,
}

/// Distinguishes null from an absent field.
fn present<'de, D>(field: D) -> Result<Option<Option<String>>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    Option::deserialize(field).map(Some)
}

/// One value of a header, or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum HeaderText {
    One(String),
    Several(Vec<String>),
}

/// One input of a worker.
#[derive(Debug, Clone)]
pub enum Input {
    Message(Delivered),
    Request(HttpRequest),
}

/// A message to deliver, and the number of its attempt.
#[derive(Debug, Clone)]
pub struct Delivered {
    pub message: Arc<Message>,
    pub attempt: u32,
}

impl CaseFile {
    /// Reads a file of cases, YAML or JSON.
    ///
    /// # Errors
    /// The file is unreadable, or no list of cases.
    pub fn load(path: &Path) -> Result<CaseFile> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read the cases of {}", path.display()))?;
        let mut file: CaseFile = serde_saphyr::from_str(&text)
            .map_err(|error| anyhow!("{error}"))
            .with_context(|| format!("read the cases of {}", path.display()))
            .hint("docs/testing.md describes the form of a case")?;
        path.clone_into(&mut file.path);
        let mut names = std::collections::BTreeSet::new();
        for case in &file.cases {
            if !names.insert(case.name.as_str()) {
                bail!("{} has two cases `{}`", path.display(), case.name);
            }
        }
        Ok(file)
    }
}

impl Case {
    /// The messages or requests for a worker, in order.
    ///
    /// # Errors
    /// The case has none, has those of the other kind of worker, or an invalid one.
    pub fn inputs(&self, worker: &Worker) -> Result<Vec<Input>> {
        let (one, several) = (&self.request, &self.requests);
        if worker.routes.is_empty() {
            if one.is_some() || several.is_some() {
                bail!("worker {} has no routes: write `message`", worker.name);
            }
            self.expect.check_none_of_requests()?;
            let messages = either(&self.message, &self.messages)
                .context("a case has either `message` or `messages`")?;
            let numbered = messages.iter().zip(1..);
            return numbered
                .map(|(message, number)| Ok(Input::Message(message.delivered(number, worker)?)))
                .collect();
        }
        if self.message.is_some() || self.messages.is_some() {
            bail!("worker {} answers requests: write `request`", worker.name);
        }
        self.expect.check_none_of_messages()?;
        let requests = either(one, several).context("a case has either `request` or `requests`")?;
        let numbered = requests.iter().zip(1..);
        numbered
            .map(|(request, number)| Ok(Input::Request(request.read(number)?)))
            .collect()
    }
}

/// The values of a part that has one form for a single value, and another for several.
fn either<'t, T>(one: &'t Option<T>, several: &'t Option<Vec<T>>) -> Option<&'t [T]> {
    match (one, several) {
        (Some(one), None) => Some(std::slice::from_ref(one)),
        (None, Some(several)) if !several.is_empty() => Some(several),
        _ => None,
    }
}

impl RequestText {
    fn read(&self, number: u64) -> Result<HttpRequest> {
        let method = self.method.clone().unwrap_or_else(|| "GET".to_owned());
        let mut request = HttpRequest {
            method: method.to_ascii_uppercase(),
            path_and_query: self.path.clone(),
            authority: "localhost".to_owned(),
            headers: headers(&self.headers),
            body: content::to_bytes(&self.body)
                .with_context(|| format!("read the body of request {number}"))?,
        };
        if !self.path.starts_with('/') {
            bail!("the path of request {number} must begin with /");
        }

        // Headers that most cases need.
        let mut default = |name: &str, value: String| {
            if message::header(&request.headers, name).is_none() {
                request.headers.push((name.to_owned(), value));
            }
        };
        if self.body.is_object() || self.body.is_array() {
            default("content-type", "application/json".to_owned());
        }
        match &self.key {
            Some(Some(key)) => default("idempotency-key", key.clone()),
            Some(None) => {}
            None => default("idempotency-key", format!("k{number}")),
        }
        Ok(request)
    }
}

impl MessageText {
    fn delivered(&self, number: u64, worker: &Worker) -> Result<Delivered> {
        let default_subject = worker
            .subjects
            .iter()
            .find(|subject| !subject.contains(['*', '>']));
        let subject = self.subject.as_ref().or(default_subject).with_context(|| {
            format!("message {number} needs a `subject`: the subjects of the worker are patterns")
        })?;
        subject::check_subject(subject)
            .map_err(|why| anyhow!("the subject `{subject}` of message {number}: {why}"))?;
        let is_consumed = worker.subjects.is_empty()
            || worker
                .subjects
                .iter()
                .any(|pattern| subject::matches(pattern, subject));
        if !is_consumed {
            bail!("worker {} does not consume `{subject}`", worker.name);
        }
        let event_id = self.id.clone().unwrap_or_else(|| format!("e{number}"));
        if event_id.is_empty() || event_id.len() > EVENT_ID_MAX {
            bail!("the id of message {number} must have 1 to {EVENT_ID_MAX} bytes");
        }
        let message = Message {
            event_id,
            subject: subject.clone(),
            headers: headers(&self.headers),
            body: content::to_bytes(&self.body)
                .with_context(|| format!("read the body of message {number}"))?,
            origin: Some(Origin {
                stream: worker.stream.clone().unwrap_or_default(),
                sequence: number,
                stored_at: Timestamp::now(),
            }),
            redriven: None,
        };
        Ok(Delivered {
            message: Arc::new(message),
            attempt: self.attempt.unwrap_or(1).max(1),
        })
    }
}

fn headers(texts: &BTreeMap<String, HeaderText>) -> Headers {
    let mut headers = Headers::new();
    for (name, values) in texts {
        match values {
            HeaderText::One(value) => headers.push((name.clone(), value.clone())),
            HeaderText::Several(values) => {
                headers.extend(values.iter().map(|value| (name.clone(), value.clone())));
            }
        }
    }
    headers
}
