//! Writes the effects of cases into their file, and keeps the rest of it.

use anyhow::{Context as _, Result, bail};

use super::case::CaseFile;
use super::effects::{Effects, to_yaml};
use crate::model::hint::WithHint as _;

/// The text of a file with new expectations for some of its cases, by their position.
///
/// # Errors
/// The cases are not in the form of a list of blocks.
pub fn with_expectations(
    file: &CaseFile,
    text: &str,
    updates: &[(usize, Effects)],
) -> Result<String> {
    if file
        .path
        .extension()
        .is_some_and(|extension| extension == "json")
    {
        return in_json(text, updates);
    }
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    // From the last one, so that the lines of the others stay where they are.
    let mut updates: Vec<&(usize, Effects)> = updates.iter().collect();
    updates.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    for (at, effects) in updates {
        let starts = case_lines(&lines);
        if starts.len() != file.cases.len() {
            return Err(anyhow::anyhow!(
                "the cases of {} are not a list of blocks that begin with `- name:`",
                file.path.display()
            ))
            .hint("write them as in docs/testing.md");
        }
        let start = starts.get(*at).copied().unwrap_or_default();
        let next = starts.get(at + 1).copied().unwrap_or(lines.len());
        let end = case_end(&lines, start, next);
        replace(&mut lines, start, end, effects);
    }
    Ok(lines.join("\n") + "\n")
}

/// The lines at which cases begin.
fn case_lines(lines: &[String]) -> Vec<usize> {
    let is_start = |line: &&String| line.trim_start().starts_with("- name:");
    let Some(first) = lines.iter().find(is_start) else {
        return Vec::new();
    };
    let indent = indent_of(first);
    let starts = lines.iter().enumerate();
    starts
        .filter(|(_, line)| is_start(line) && indent_of(line) == indent)
        .map(|(at, _)| at)
        .collect()
}

/// The line after the last one of a case, without the comments and empty lines that follow it.
fn case_end(lines: &[String], start: usize, next: usize) -> usize {
    let indent = lines.get(start).map_or(0, |line| indent_of(line));
    let is_inside = |line: &String| !line.trim().is_empty() && indent_of(line) > indent;
    let inside = (start..next)
        .rev()
        .find(|at| lines.get(*at).is_some_and(is_inside));
    inside.map_or(start + 1, |last| last + 1)
}

fn indent_of(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// Replaces the block `expect` of the case in `start..end`, or adds one.
fn replace(lines: &mut Vec<String>, start: usize, end: usize, effects: &Effects) {
    let indent = lines.get(start).map_or(0, |line| indent_of(line)) + 2;
    let pad = " ".repeat(indent);
    let mut block = vec![format!("{pad}expect:")];
    let body = to_yaml(effects);
    block.extend(body.lines().map(|line| format!("{pad}  {line}")));

    let is_expect =
        |line: &String| indent_of(line) == indent && line.trim_start().starts_with("expect:");
    let found = (start..end).find(|at| lines.get(*at).is_some_and(is_expect));
    let (from, to) = match found {
        Some(from) => {
            let is_inside = |line: &String| line.trim().is_empty() || indent_of(line) > indent;
            let inside = lines
                .iter()
                .skip(from + 1)
                .take_while(|line| is_inside(line));
            (from, (from + 1 + inside.count()).min(end))
        }
        None => (end, end),
    };
    lines.splice(from..to, block);
}

fn in_json(text: &str, updates: &[(usize, Effects)]) -> Result<String> {
    let mut file: serde_json::Value = serde_json::from_str(text).context("parse the cases")?;
    for (at, effects) in updates {
        let case = file.get_mut("cases").and_then(|cases| cases.get_mut(*at));
        let Some(serde_json::Value::Object(case)) = case else {
            bail!("case {at} is not in the file");
        };
        let effects = serde_json::to_value(effects).context("write the effects")?;
        case.insert("expect".to_owned(), effects);
    }
    Ok(serde_json::to_string_pretty(&file).context("write the cases")? + "\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const FILE: &str = "# Orders.
cases:
  # The usual one.
  - name: one
    message: {body: a}
    expect:
      result: retry
      outputs: []

  - name: two
    message: {body: b}

# The end.
";

    #[test]
    fn only_expectations_change() {
        let file: CaseFile = serde_saphyr::from_str(FILE).unwrap();
        let effects = |result: &str| Effects {
            result: Some(json!(result)),
            ..Effects::default()
        };
        let updates = [(0, effects("done")), (1, effects("reject"))];
        let updated = with_expectations(&file, FILE, &updates).unwrap();
        let expected = "# Orders.
cases:
  # The usual one.
  - name: one
    message: {body: a}
    expect:
      result: done

  - name: two
    message: {body: b}
    expect:
      result: reject

# The end.
";
        assert_eq!(updated, expected);
    }
}
