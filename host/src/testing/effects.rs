//! The effects of a case, and their comparison with the expected ones.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use similar::TextDiff;

/// Stands for any value in the expectation of a case.
pub const ANY: &str = "<any>";

/// Effects. In an expectation, an absent part is not checked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Effects {
    /// The result of the only message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// The results of several messages, in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub results: Option<Vec<Value>>,
    /// The response to the only request, or its status alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<Value>,
    /// The responses to several requests, in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub responses: Option<Vec<Value>>,
    /// The outputs, in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outputs: Option<Vec<Value>>,
    /// Changed keys of state; `null` for a deleted one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<BTreeMap<String, Value>>,
    /// Changed rows by table: `insert`, `update` or `delete` with the row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<BTreeMap<String, Vec<Value>>>,
}

impl Effects {
    /// # Errors
    /// A part of these expected effects belongs to requests.
    pub fn check_none_of_requests(&self) -> Result<()> {
        match self.response.is_some() || self.responses.is_some() {
            true => bail!("messages have no `response`: expect a `result`"),
            false => Ok(()),
        }
    }

    /// # Errors
    /// A part of these expected effects belongs to messages.
    pub fn check_none_of_messages(&self) -> Result<()> {
        match self.result.is_some() || self.results.is_some() {
            true => bail!("requests have no `result`: expect a `response`"),
            false => Ok(()),
        }
    }

    /// The difference to these expected effects, one line of YAML per line; `None` if there is
    /// none.
    pub fn difference(&self, actual: &Effects) -> Option<String> {
        let actual = self.view_of(actual);
        if *self == actual {
            return None;
        }
        let (expected, actual) = (to_yaml(self), to_yaml(&actual));
        let diff = TextDiff::from_lines(&expected, &actual);
        Some(diff.unified_diff().context_radius(4).to_string())
    }

    /// The actual effects as far as they are expected: without unchecked parts and columns, with
    /// [`ANY`] where any value is expected, and with equal values in the same form.
    fn view_of(&self, actual: &Effects) -> Effects {
        let result = self.result.as_ref().map(|expected| {
            let actual = actual.result.clone().unwrap_or_default();
            view_result(expected, actual)
        });
        let results = self.results.as_ref().map(|expected| {
            let actual = actual.results.clone().unwrap_or_default();
            view_each(expected, actual, view_result)
        });
        let response = self.response.as_ref().map(|expected| {
            let actual = actual.response.clone().unwrap_or_default();
            view_response(expected, actual)
        });
        let responses = self.responses.as_ref().map(|expected| {
            let actual = actual.responses.clone().unwrap_or_default();
            view_each(expected, actual, view_response)
        });
        let outputs = self.outputs.as_ref().map(|expected| {
            let actual = actual.outputs.clone().unwrap_or_default();
            view_each(expected, actual, view_output)
        });
        let state = self.state.as_ref().map(|expected| {
            let actual = actual.state.clone().unwrap_or_default();
            let seen = actual.into_iter().map(|(key, value)| {
                let value = match expected.get(&key) {
                    Some(wanted) => view(wanted, value, Columns::All),
                    None => value,
                };
                (key, value)
            });
            seen.collect()
        });
        let rows = self.rows.as_ref().map(|expected| {
            let actual = actual.rows.clone().unwrap_or_default();
            let seen = actual.into_iter().map(|(table, rows)| {
                let wanted = expected.get(&table).cloned().unwrap_or_default();
                let rows = view_list(&wanted, in_order_of(&wanted, rows), Columns::Expected);
                (table, rows)
            });
            seen.collect()
        });
        Effects {
            result,
            results,
            response,
            responses,
            outputs,
            state,
            rows,
        }
    }

    /// Replaces the values that differ in another run by [`ANY`].
    pub fn generalize(&mut self, other: &Effects) {
        let lists = |mine: &mut Option<Vec<Value>>, other: &Option<Vec<Value>>| {
            if let (Some(mine), Some(other)) = (mine, other) {
                generalize_list(mine, other);
            }
        };
        let values = |mine: &mut Option<Value>, other: &Option<Value>| {
            if let (Some(mine), Some(other)) = (mine, other) {
                generalize(mine, other);
            }
        };
        values(&mut self.result, &other.result);
        values(&mut self.response, &other.response);
        lists(&mut self.results, &other.results);
        lists(&mut self.responses, &other.responses);
        lists(&mut self.outputs, &other.outputs);
        if let (Some(mine), Some(other)) = (&mut self.state, &other.state) {
            for (key, value) in mine {
                if let Some(other) = other.get(key) {
                    generalize(value, other);
                }
            }
        }
        if let (Some(mine), Some(other)) = (&mut self.rows, &other.rows) {
            for (table, rows) in mine {
                if let Some(other) = other.get(table) {
                    generalize_list(rows, other);
                }
            }
        }
    }
}

/// The text of effects as YAML.
pub fn to_yaml(effects: &Effects) -> String {
    serde_saphyr::to_string(effects).unwrap_or_else(|error| format!("unprintable: {error}\n"))
}

/// Whether a row may have more columns than expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Columns {
    All,
    Expected,
}

/// A result as far as it is expected. `retry` alone expects any failure of that kind.
fn view_result(expected: &Value, actual: Value) -> Value {
    match (expected, &actual) {
        (Value::String(kind), Value::Object(failure)) if failure.contains_key(kind) => {
            expected.clone()
        }
        _ => view(expected, actual, Columns::Expected),
    }
}

/// A response as far as it is expected: a status alone, or some of its parts and headers. The case
/// of a header's name does not matter. The body is expected as a whole.
fn view_response(expected: &Value, actual: Value) -> Value {
    let wanted = match expected {
        Value::Number(_) => return actual.get("status").cloned().unwrap_or_default(),
        expected => expected.get("headers").and_then(Value::as_object),
    };
    let mut response = view_output(expected, actual);
    if let (Some(wanted), Some(Value::Object(headers))) = (wanted, response.get_mut("headers")) {
        let named = wanted.iter().filter_map(|(name, wanted)| {
            let value = headers.get(&name.to_ascii_lowercase()).cloned();
            Some((name.clone(), view(wanted, value?, Columns::All)))
        });
        *headers = named.collect();
    }
    response
}

/// An output as far as it is expected. Its body is expected as a whole.
fn view_output(expected: &Value, actual: Value) -> Value {
    let (Value::Object(wanted), Value::Object(actual)) = (expected, actual.clone()) else {
        return view(expected, actual, Columns::All);
    };
    let parts = actual.into_iter();
    let expected_parts = parts.filter_map(|(name, value)| {
        let value = view(wanted.get(&name)?, value, Columns::All);
        Some((name, value))
    });
    Value::Object(expected_parts.collect())
}

fn view(expected: &Value, actual: Value, columns: Columns) -> Value {
    if *expected == ANY || is_same_scalar(expected, &actual) {
        return expected.clone();
    }
    match (expected, actual) {
        (Value::Object(expected), Value::Object(actual)) => {
            let seen: Map<String, Value> = actual
                .into_iter()
                .filter(|(key, _)| columns == Columns::All || expected.contains_key(key))
                .map(|(key, value)| {
                    let value = match expected.get(&key) {
                        Some(wanted) => view(wanted, value, columns),
                        None => value,
                    };
                    (key, value)
                })
                .collect();
            Value::Object(seen)
        }
        (Value::Array(expected), Value::Array(actual)) => {
            Value::Array(view_list(expected, actual, columns))
        }
        (_, actual) => actual,
    }
}

fn view_list(expected: &[Value], actual: Vec<Value>, columns: Columns) -> Vec<Value> {
    view_each(expected, actual, |expected, actual| {
        view(expected, actual, columns)
    })
}

/// Each actual value by the expected one at its position.
fn view_each(
    expected: &[Value],
    actual: Vec<Value>,
    view: impl Fn(&Value, Value) -> Value,
) -> Vec<Value> {
    let wanted = expected.iter().map(Some).chain(std::iter::repeat(None));
    let pairs = actual.into_iter().zip(wanted);
    pairs
        .map(|(actual, expected)| match expected {
            Some(expected) => view(expected, actual),
            None => actual,
        })
        .collect()
}

/// Rows in the order of the expected ones that they equal; the others follow.
fn in_order_of(expected: &[Value], mut rows: Vec<Value>) -> Vec<Value> {
    let mut ordered: Vec<Option<Value>> = Vec::new();
    for wanted in expected {
        let is_wanted = |row: &Value| view(wanted, row.clone(), Columns::Expected) == *wanted;
        let found = rows.iter().position(is_wanted).map(|at| rows.remove(at));
        ordered.push(found);
    }
    let mut rest = rows.into_iter();
    let mut all: Vec<Value> = Vec::new();
    for row in ordered {
        all.extend(row.or_else(|| rest.next()));
    }
    all.extend(rest);
    all
}

/// Whether two values are the same in different forms: `1.50` as number and as text, a boolean and
/// its number on SQLite.
fn is_same_scalar(expected: &Value, actual: &Value) -> bool {
    match (expected, actual) {
        (Value::Number(number), Value::String(text))
        | (Value::String(text), Value::Number(number)) => number.to_string() == *text,
        (Value::Bool(yes), Value::Number(number)) | (Value::Number(number), Value::Bool(yes)) => {
            number.as_i64() == Some(i64::from(*yes))
        }
        _ => expected == actual,
    }
}

fn generalize(mine: &mut Value, other: &Value) {
    match (&mut *mine, other) {
        (Value::Object(mine), Value::Object(other)) if mine.keys().eq(other.keys()) => {
            for (key, value) in mine {
                if let Some(other) = other.get(key) {
                    generalize(value, other);
                }
            }
        }
        (Value::Array(mine), Value::Array(other)) if mine.len() == other.len() => {
            generalize_list(mine, other);
        }
        (mine, other) if mine != other => *mine = Value::String(ANY.to_owned()),
        _ => {}
    }
}

fn generalize_list(mine: &mut [Value], other: &[Value]) {
    for (mine, other) in mine.iter_mut().zip(other) {
        generalize(mine, other);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn effects(rows: Value, outputs: Value) -> Effects {
        serde_json::from_value(json!({
            "result": "done", "rows": { "t": rows }, "outputs": outputs,
        }))
        .unwrap()
    }

    #[test]
    fn equal_effects_have_no_difference() {
        let actual = effects(
            json!([{"insert": {"id": 2, "at": "now"}}, {"insert": {"id": 1, "price": "1.5"}}]),
            json!([{"subject": "a", "body": {"id": "x", "n": 1}}]),
        );
        let expected = effects(
            json!([{"insert": {"id": 1, "price": 1.5}}, {"insert": {"id": 2}}]),
            json!([{"subject": "a", "body": {"id": ANY, "n": 1}}]),
        );
        assert_eq!(expected.difference(&actual), None);
        let unchecked = Effects {
            result: Some(json!("done")),
            ..Effects::default()
        };
        assert_eq!(unchecked.difference(&actual), None);
    }

    #[test]
    fn each_difference_is_a_line() {
        let expected = effects(json!([{"insert": {"id": 1}}]), json!([]));
        let actual = effects(
            json!([{"insert": {"id": 7}}]),
            json!([{"subject": "a", "body": "x"}]),
        );
        let difference = expected.difference(&actual).unwrap();
        for line in ["-      id: 1", "+      id: 7", "+  subject: a"] {
            assert!(difference.contains(line), "{difference}");
        }
    }

    #[test]
    fn a_response_is_compared_as_far_as_expected() {
        let actual = Effects {
            response: Some(json!({
                "status": 201,
                "headers": {"content-type": "application/json", "location": "/x"},
                "body": {"id": "x", "at": 5},
            })),
            ..Effects::default()
        };
        let differs = |response: Value| {
            let expected = Effects {
                response: Some(response),
                ..Effects::default()
            };
            expected.difference(&actual).is_some()
        };
        for same in [
            json!(201),
            json!({"headers": {"Location": "/x"}}),
            json!({"status": 201, "body": {"id": "x", "at": ANY}}),
        ] {
            assert!(!differs(same.clone()), "{same}");
        }
        for other in [
            json!(200),
            json!({"headers": {"Location": "/y"}}),
            json!({"headers": {"Retry-After": ANY}}),
            json!({"body": {"id": "x"}}),
        ] {
            assert!(differs(other.clone()), "{other}");
        }
    }

    #[test]
    fn values_that_differ_between_runs_are_generalized() {
        let mut one = effects(json!([{"insert": {"id": 1, "at": 5}}]), json!([]));
        let other = effects(json!([{"insert": {"id": 1, "at": 6}}]), json!([]));
        one.generalize(&other);
        assert_eq!(
            one,
            effects(json!([{"insert": {"id": 1, "at": ANY}}]), json!([]))
        );
    }
}
