//! Crashes and conflicts at every step of a case. The outcome must be that of an undisturbed run.

use anyhow::Result;

use super::case::{Case, Input};
use super::effects::Effects;
use super::runner::{Fault, Run, Runner};

/// A fault after which the effects of a case differ.
#[derive(Debug)]
pub struct Difference {
    pub fault: Fault,
    /// The lines that differ.
    pub text: String,
}

/// The outcome of torturing a case.
#[derive(Debug)]
pub struct Tortured {
    /// The number of disturbed runs.
    pub runs: usize,
    pub differences: Vec<Difference>,
}

/// Runs a case with each fault. `undisturbed` is a run without one.
///
/// # Errors
/// The database fails.
pub async fn torture(
    runner: &Runner,
    case: &Case,
    inputs: &[Input],
    undisturbed: &Run,
) -> Result<Tortured> {
    let run = async |fault| runner.run(&[&case.given], case.now, inputs, fault).await;

    // Values that differ without a fault, such as times, may differ with one.
    let mut expected: Effects = undisturbed.effects.clone();
    expected.generalize(&run(Fault::None).await?.effects);

    let faults = faults(undisturbed);
    let mut tortured = Tortured {
        runs: faults.len(),
        differences: Vec::new(),
    };
    for fault in faults {
        if let Some(text) = expected.difference(&run(fault).await?.effects) {
            tortured.differences.push(Difference { fault, text });
        }
    }
    Ok(tortured)
}

/// A crash at each host call, and a conflict at each statement.
fn faults(undisturbed: &Run) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (input, calls) in undisturbed.host_calls.iter().enumerate() {
        faults.extend((1..=*calls).map(|call| Fault::Crash { input, call }));
    }
    for (input, statements) in undisturbed.statements.iter().enumerate() {
        let each = 1..=*statements;
        faults.extend(each.map(|statement| Fault::Conflict { input, statement }));
    }
    faults
}

impl Fault {
    /// The fault in words; `kind` names the input.
    pub fn describe(&self, kind: &str) -> String {
        match self {
            Fault::None => "no fault".to_owned(),
            Fault::Crash { input, call } => {
                format!("a crash at host call {call} of {kind} {}", input + 1)
            }
            Fault::Conflict { input, statement } => {
                format!(
                    "a conflict at statement {statement} of {kind} {}",
                    input + 1
                )
            }
        }
    }
}
