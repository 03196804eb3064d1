//! Names the commit that the program is built from, for `oncely --version`.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=ONCELY_COMMIT");
    // The log of HEAD changes with every commit and checkout; where there is none, as in an
    // archive, nothing is watched.
    if let Some(log) = git(&[
        "rev-parse",
        "--path-format=absolute",
        "--git-path",
        "logs/HEAD",
    ]) {
        println!("cargo::rerun-if-changed={log}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    // Builds without the repository, as in an image, are given the commit in the environment.
    let given = std::env::var("ONCELY_COMMIT")
        .ok()
        .filter(|commit| !commit.is_empty());
    let commit = given
        .or_else(|| git(&["rev-parse", "--short=12", "HEAD"]))
        .unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=ONCELY_COMMIT={commit}");
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
