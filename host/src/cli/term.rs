//! Terminal output. This is the only file that prints: data to standard output, all else to
//! standard error.
//!
//! Colour and progress bars appear on a terminal only, and `NO_COLOR` is honoured. Neither carries
//! meaning. Text from messages and workers is shown with escaped control characters, so that it
//! cannot control the terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::model::hint;
use crate::model::json_text;
use crate::model::visible::{visible, visible_text};

/// Prints data: one or more lines on standard output.
pub fn data(text: impl Display) -> anyhow::Result<()> {
    raw(format!("{}\n", text.to_string().trim_end_matches('\n')).as_bytes())
}

/// Prints data as JSON: indented on a terminal, else on one line.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let terminal = io::stdout().is_terminal();
    let text = if terminal {
        serde_json::to_string_pretty(value)
    } else {
        serde_json::to_string(value)
    };
    data(text.context("write JSON")?)
}

/// Prints bytes unchanged, without a line end. A reader that closes the pipe (`| head`) is no
/// failure.
pub fn raw(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("print to standard output"),
    }
}

/// Prints a line on standard error.
pub fn note(text: impl Display) {
    // Without standard error there is no place for a report.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints a warning on standard error.
pub fn warning(text: impl Display) {
    note(format!(
        "{} {text}",
        paint("warning:", YELLOW, stderr_has_color())
    ));
}

/// Prints an error with its causes and hints on standard error.
pub fn error(error: &anyhow::Error) {
    note(render_error(error, stderr_has_color()));
}

/// Asks for confirmation on the terminal. Anything but `y` or `yes` means no, and so does a missing
/// terminal.
pub fn confirm(question: &str) -> bool {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return false;
    }
    let _ = write!(io::stderr().lock(), "{question} [y/N] ");
    let mut answer = String::new();
    let read = io::stdin().read_line(&mut answer);
    read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// Bytes for people: JSON indented, other text unchanged, anything else as hex.
pub fn readable(bytes: &[u8]) -> String {
    const SHOWN_MAX: usize = 4096;
    if let Some(text) = json_text::indented(bytes) {
        return visible_text(&text);
    }
    let shown = bytes.get(..SHOWN_MAX).unwrap_or(bytes);
    let more = if bytes.len() > shown.len() {
        "\n(truncated; --json prints all of it)"
    } else {
        ""
    };
    match std::str::from_utf8(shown) {
        Ok(text) => format!("{}{more}", visible_text(text)),
        Err(_) => {
            let lines: Vec<String> = shown.chunks(16).map(hex::encode_upper).collect();
            format!("{}{more}", lines.join("\n"))
        }
    }
}

/// A table without borders: UPPERCASE headings, columns as wide as their content, numbers
/// right-aligned.
pub struct Table {
    heads: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows; headings are converted to upper case.
    pub fn new(heads: &[&str]) -> Table {
        Table {
            heads: heads.iter().map(|head| head.to_uppercase()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells stay empty.
    pub fn row<T: Display>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(
            cells
                .into_iter()
                .map(|cell| visible(&cell.to_string()))
                .collect(),
        );
    }

    /// Whether the table has no rows; headings do not count.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn cells(&self, column: usize) -> impl Iterator<Item = &str> {
        self.rows
            .iter()
            .map(move |row| row.get(column).map_or("", String::as_str))
    }

    fn layout(&self) -> Vec<(usize, Align)> {
        let column = |(index, head): (usize, &String)| {
            let width = self
                .cells(index)
                .map(UnicodeWidthStr::width)
                .chain([head.width()])
                .max()
                .unwrap_or(0);
            let mut filled = self
                .cells(index)
                .filter(|cell| !cell.is_empty() && *cell != "-")
                .peekable();
            let numbers = filled.peek().is_some() && filled.all(|cell| cell.parse::<f64>().is_ok());
            (width, if numbers { Align::Right } else { Align::Left })
        };
        self.heads.iter().enumerate().map(column).collect()
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layout = self.layout();
        for row in std::iter::once(&self.heads).chain(&self.rows) {
            let cells = layout.iter().enumerate().map(|(index, (width, align))| {
                pad(row.get(index).map_or("", String::as_str), *width, *align)
            });
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Names and values, one pair per line, aligned on the colon.
pub fn details<K: Display, V: Display>(pairs: impl IntoIterator<Item = (K, V)>) -> String {
    let pairs: Vec<_> = pairs
        .into_iter()
        .map(|(name, value)| (name.to_string(), visible(&value.to_string())))
        .collect();
    let width = pairs
        .iter()
        .map(|(name, _)| name.width())
        .max()
        .unwrap_or(0);
    let line =
        |(name, value): &(String, String)| format!("{}: {value}", pad(name, width, Align::Right));
    pairs.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The progress of long work: a bar or a spinner on a terminal, plain lines elsewhere.
pub struct Progress {
    bar: ProgressBar,
    label: String,
    total: Option<u64>,
    /// Quarters of the total that plain lines have reported; none on a terminal.
    reported_quarter: Option<u64>,
}

impl Progress {
    /// Work of known length, counted in `total` steps.
    pub fn bar(label: &str, total: u64) -> Progress {
        Progress::start(label, Some(total))
    }

    /// Work of unknown length.
    pub fn spinner(label: &str) -> Progress {
        Progress::start(label, None)
    }

    /// Sets the number of finished steps.
    pub fn set(&mut self, done: u64) {
        self.bar.set_position(done);
        let (Some(reported), Some(total)) = (self.reported_quarter, self.total) else {
            return;
        };
        let quarter = done
            .saturating_mul(4)
            .checked_div(total)
            .unwrap_or_default();
        if quarter > reported && quarter < 4 {
            note(format!("{}: {done} of {total}", self.label));
            self.reported_quarter = Some(quarter);
        }
    }

    /// Counts one more finished step.
    pub fn step(&mut self) {
        self.set(self.bar.position() + 1);
    }

    /// Sets the text beside the bar.
    pub fn message(&self, text: &str) {
        self.bar.set_message(visible(text));
    }

    /// Finishes the work and prints one line with its outcome.
    pub fn finish(self, outcome: &str) {
        self.bar.finish_and_clear();
        note(format!("{}: {outcome}", self.label));
    }

    fn start(label: &str, total: Option<u64>) -> Progress {
        let terminal = io::stderr().is_terminal();
        let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        bar.set_draw_target(if terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        });
        let template = if total.is_some() {
            "{prefix}: [{bar:30}] {pos} of {len} {msg}"
        } else {
            "{prefix}: {elapsed} {msg}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(label.to_owned());
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(100));
        } else {
            note(format!("{label} ..."));
        }
        Progress {
            bar,
            label: label.to_owned(),
            total,
            reported_quarter: (!terminal).then_some(0),
        }
    }
}

impl Drop for Progress {
    /// Removes the bar of failed work; its error follows.
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// An error for people: `error:`, one `cause:` per cause, and last one `hint:` per hint.
pub fn render_error(error: &anyhow::Error, color: bool) -> String {
    let mut lines = Vec::new();
    for (index, part) in error.chain().enumerate() {
        let label = if index == 0 {
            paint("error:", RED, color)
        } else {
            "cause:".to_owned()
        };
        lines.push(format!("{label} {}", visible_lines(&part.to_string())));
    }
    // Some libraries include the cause in their own text; it is shown once.
    lines.dedup_by(|later, earlier| {
        later
            .strip_prefix("cause: ")
            .is_some_and(|cause| earlier.ends_with(cause))
    });
    lines.extend(
        hint::hints(error)
            .iter()
            .map(|hint| format!("{} {hint}", paint("hint:", CYAN, color))),
    );
    lines.join("\n")
}

/// Like [`visible`], with line breaks kept and later lines indented.
fn visible_lines(text: &str) -> String {
    text.trim_end()
        .lines()
        .map(visible)
        .collect::<Vec<_>>()
        .join("\n       ")
}

#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}

fn pad(text: &str, width: usize, align: Align) -> String {
    let space = " ".repeat(width.saturating_sub(text.width()));
    match align {
        Align::Left => format!("{text}{space}"),
        Align::Right => format!("{space}{text}"),
    }
}

const RED: &str = "\u{1b}[1;31m";
const YELLOW: &str = "\u{1b}[1;33m";
const CYAN: &str = "\u{1b}[36m";

fn paint(text: &str, color: &str, on: bool) -> String {
    if on {
        format!("{color}{text}\u{1b}[0m")
    } else {
        text.to_owned()
    }
}

fn stderr_has_color() -> bool {
    allows_color(io::stderr().is_terminal(), &|name| {
        std::env::var_os(name).is_some_and(|value| !value.is_empty())
    }) && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Colour needs a terminal, and is off if `NO_COLOR` is set to any value.
fn allows_color(terminal: bool, is_set: &dyn Fn(&str) -> bool) -> bool {
    terminal && !is_set("NO_COLOR")
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::model::hint::WithHint;

    #[test]
    fn table_columns_are_as_wide_as_their_content() {
        let mut table = Table::new(&["worker", "done", "note"]);
        table.row(["settle", "12", "größer"]);
        table.row(["a-longer-name", "-", ""]);
        table.row(["x"]);
        let lines = [
            "WORKER         DONE  NOTE",
            "settle           12  größer",
            "a-longer-name     -",
            "x",
            "",
        ];
        assert_eq!(table.to_string(), lines.join("\n"));
        assert!(Table::new(&["a"]).is_empty() && !table.is_empty());
    }

    #[test]
    fn table_counts_wide_characters_by_display_width() {
        let mut table = Table::new(&["a", "b"]);
        table.row(["日本", "x"]);
        assert_eq!(table.to_string(), "A     B\n日本  x\n");
    }

    #[test]
    fn details_are_aligned_on_the_colon() {
        let text = details([("worker", "settle"), ("dead letters", "3")]);
        assert_eq!(text, "      worker: settle\ndead letters: 3");
    }

    #[test]
    fn render_error_shows_causes_and_then_hints() {
        let error = anyhow!("connection refused")
            .context("connect to NATS")
            .hint("start it: nats-server -js");
        let error = error.context("start the host");
        let text = "error: start the host\ncause: connect to NATS\ncause: connection refused\nhint: start it: nats-server -js";
        assert_eq!(render_error(&error, false), text);
        assert_eq!(
            render_error(&error, true)
                .replace(RED, "")
                .replace(CYAN, "")
                .replace("\u{1b}[0m", ""),
            text
        );
    }

    #[test]
    fn render_error_omits_a_repeated_cause() {
        let error = anyhow!("disk full").context("write x: disk full");
        assert_eq!(render_error(&error, false), "error: write x: disk full");
    }

    #[test]
    fn control_characters_are_escaped_in_tables_and_errors() {
        let mut table = Table::new(&["detail"]);
        table.row(["\u{1b}[2Jgone\nnext\u{202e}"]);
        assert_eq!(
            table.to_string(),
            "DETAIL\n\\u{1b}[2Jgone\\nnext\\u{202e}\n"
        );
        let error = anyhow!("\u{7}one\ntwo").context("read");
        assert_eq!(
            render_error(&error, false),
            "error: read\ncause: \\u{7}one\n       two"
        );
    }

    #[test]
    fn color_needs_a_terminal_and_no_color_unset() {
        assert!(allows_color(true, &|_| false));
        assert!(!allows_color(true, &|name| name == "NO_COLOR"));
        assert!(!allows_color(false, &|_| false));
    }
}
