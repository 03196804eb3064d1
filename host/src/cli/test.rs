//! `oncely test`: runs the cases of a manifest's workers against their components.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use sha2::{Digest, Sha256};

use super::build::{BuiltComponent, EnvironmentArg, ToolchainArg};
use super::client::{COMPILED_DIR, DATA_DIR, make_data_dir};
use super::exit::Exit;
use super::term;
use crate::config::CompileSettings;
use crate::config::manifest::{Manifest, Worker, WorkerEntry};
use crate::guest::{Guest, GuestEngine};
use crate::ingress::TestRequests;
use crate::model::hint::WithHint;
use crate::model::visible::visible;
use crate::store::{PostgresStore, ScratchDatabase, SqliteStore, Store};
use crate::testing::{
    Case, CaseFile, Effects, Fault, Input, Racer, Runner, Tortured, race, torture,
    with_expectations,
};

/// The folder of cases, next to a manifest.
pub(super) const CASES: &str = "tests";

/// Test handlers: messages or requests with expected results, outputs, state and rows.
///
/// The cases are the *.yaml and *.json files of the folder `tests` next to a manifest. Each case
/// runs in a transaction that is rolled back. Without --postgres it is one of SQLite.
#[derive(Debug, Args)]
pub struct Test {
    /// Test the workers of these manifests, or of folders that contain an oncely.toml.
    #[arg(default_value = ".")]
    manifests: Vec<PathBuf>,
    /// Run only cases whose name contains this text.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Write the actual effects into the files of the cases.
    #[arg(long, conflicts_with_all = ["torture", "race"])]
    update: bool,
    /// Run each case again with a crash at every host call and a conflict at every statement, each
    /// followed by a redelivery. The effects must be the same.
    #[arg(long)]
    torture: bool,
    /// Run pairs of messages in both orders, and report effects that depend on the order.
    #[arg(long)]
    race: bool,
    /// Write a report for CI in the JUnit format to this file.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Use a new database on this PostgreSQL server. It is dropped afterwards.
    #[arg(long, value_name = "URL", env = "ONCELY_TEST_POSTGRES")]
    postgres: Option<String>,
    #[command(flatten)]
    toolchain: ToolchainArg,
    #[command(flatten)]
    environment: EnvironmentArg,
}

/// The result of one check.
struct Checked {
    suite: String,
    name: String,
    took: Duration,
    /// The lines that explain a failure.
    failure: Option<String>,
}

impl Test {
    pub async fn run(self) -> Result<()> {
        let began = Instant::now();
        let mut checked = Vec::new();
        let mut is_any_selected = false;
        for path in &self.manifests {
            let manifest = Manifest::load(path, self.environment.name())?;
            manifest.warnings().iter().for_each(term::warning);
            is_any_selected |= self.test_manifest(&manifest, &mut checked).await?;
        }
        if let (Some(filter), false) = (&self.filter, is_any_selected) {
            let message = format!("no case has `{filter}` in its name");
            return Err(anyhow!(Exit::NotFound.with_message(message)))
                .hint("the names of cases are in tests/*.yaml; upper and lower case differ");
        }

        if let Some(path) = &self.junit {
            write_junit(path, &checked)?;
        }
        let failed = checked.iter().filter(|one| one.failure.is_some()).count();
        let seconds = began.elapsed().as_secs_f64();
        if self.update {
            return Ok(());
        }
        term::data(format!(
            "\n{} passed, {failed} failed ({seconds:.1} s)",
            checked.len() - failed
        ))?;
        match failed {
            0 => Ok(()),
            _ => Err(anyhow!("{failed} of {} checks failed", checked.len()))
                .hint("oncely test --update accepts the actual effects of all cases"),
        }
    }

    /// Returns whether the filter selects any case.
    async fn test_manifest(&self, manifest: &Manifest, checked: &mut Vec<Checked>) -> Result<bool> {
        let files = case_files(manifest)?;
        let is_selected = |file: &&CaseFile| file.cases.iter().any(|case| self.selects(case));
        if !files.iter().any(|file| is_selected(&file)) {
            return Ok(false);
        }
        for entry in &manifest.workers {
            let own: Vec<&CaseFile> = files
                .iter()
                .filter(|file| belongs_to(file, entry, manifest))
                .filter(is_selected)
                .collect();
            if own.is_empty() {
                continue;
            }
            let bench = Bench::start(entry, self).await?;
            let tested = self.test_worker(&bench.runner, &own, checked).await;
            bench.stop().await?;
            tested?;
        }
        Ok(true)
    }

    fn selects(&self, case: &Case) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|text| case.name.contains(text))
    }

    async fn test_worker(
        &self,
        runner: &Runner,
        files: &[&CaseFile],
        checked: &mut Vec<Checked>,
    ) -> Result<()> {
        for file in files {
            term::data(file.path.display())?;
            let mut updates = Vec::new();
            let mut racers: Vec<(&Case, Vec<Input>)> = Vec::new();
            for (at, case) in file.cases.iter().enumerate() {
                if !self.selects(case) {
                    continue;
                }
                let context = || format!("run the case `{}` of {}", case.name, file.path.display());
                let inputs = case.inputs(&runner.worker).with_context(context)?;
                if self.update {
                    let update = actual_effects(runner, case, &inputs).await;
                    updates.extend(update.with_context(context)?.map(|effects| (at, effects)));
                } else {
                    self.check_case(runner, file, case, &inputs, checked)
                        .await
                        .with_context(context)?;
                }
                racers.push((case, inputs));
            }
            if self.race {
                match runner.worker.routes.is_empty() {
                    true => check_races(runner, file, &racers, checked).await?,
                    false => term::data("  no races: requests have no ordering key")?,
                }
            }
            if !updates.is_empty() {
                update(file, &updates)?;
            }
        }
        Ok(())
    }

    async fn check_case(
        &self,
        runner: &Runner,
        file: &CaseFile,
        case: &Case,
        inputs: &[Input],
        checked: &mut Vec<Checked>,
    ) -> Result<()> {
        let suite = file.path.display().to_string();
        let began = Instant::now();
        let run = runner
            .run(&[&case.given], case.now, inputs, Fault::None)
            .await?;
        let failure = explain(case, &run.effects, &run.logs);
        report(checked, &suite, &case.name, began.elapsed(), failure)?;
        if self.torture {
            let began = Instant::now();
            let tortured = torture(runner, case, inputs, &run).await?;
            let name = format!("{}: {} disturbed runs", case.name, tortured.runs);
            let failure = explain_torture(&tortured, kind_of(&runner.worker));
            report(checked, &suite, &name, began.elapsed(), failure)?;
        }
        Ok(())
    }
}

/// The actual effects of a case, if it does not expect them. Values that differ between two runs
/// are not fixed.
async fn actual_effects(runner: &Runner, case: &Case, inputs: &[Input]) -> Result<Option<Effects>> {
    let given = [&case.given];
    let run = runner.run(&given, case.now, inputs, Fault::None).await?;
    if case.expect != Effects::default() && case.expect.difference(&run.effects).is_none() {
        return Ok(None);
    }
    let again = runner.run(&given, case.now, inputs, Fault::None).await?;
    let mut effects = run.effects;
    effects.generalize(&again.effects);
    Ok(Some(effects))
}

/// A worker with a database of its own.
struct Bench {
    runner: Runner,
    scratch: Option<ScratchDatabase>,
    _folder: tempfile::TempDir,
}

impl Bench {
    async fn start(entry: &WorkerEntry, test: &Test) -> Result<Bench> {
        // Component
        let built = BuiltComponent::build(entry, test.toolchain).await?;
        let data_dir = make_data_dir(&entry.folder.join(DATA_DIR))?;
        let engine = GuestEngine::new(&data_dir.join(COMPILED_DIR), CompileSettings::for_tests())?;
        let guest = Guest::load(&engine, built.wasm.clone().into())
            .await
            .with_context(|| built.error_context(entry))?;

        let config = entry.worker.resolve_config()?;

        // Database
        let folder = tempfile::tempdir().context("create a folder for the database")?;
        let (store, scratch) = match &test.postgres {
            Some(url) => {
                let scratch = ScratchDatabase::create(url).await?;
                match PostgresStore::connect(&scratch.url(), 4).await {
                    Ok(store) => (Store::from(store), Some(scratch)),
                    Err(error) => {
                        scratch.drop().await?;
                        return Err(error);
                    }
                }
            }
            None => {
                let store = SqliteStore::open(&folder.path().join("test.db")).await?;
                (Store::from(store), None)
            }
        };
        let bench = Bench {
            runner: Runner {
                store: Arc::new(store),
                guest,
                requests: TestRequests::new(&entry.worker),
                worker: Arc::new(entry.worker.clone()),
                config: Arc::new(config),
            },
            scratch,
            _folder: folder,
        };
        match bench.create_tables(entry, &built.wasm).await {
            Ok(()) => Ok(bench),
            Err(error) => {
                bench.stop().await?;
                Err(error)
            }
        }
    }

    /// Runs the migrations of the worker, by a deployment.
    async fn create_tables(&self, entry: &WorkerEntry, wasm: &[u8]) -> Result<()> {
        let store = &self.runner.store;
        let migrations = entry.migrations_for(store.dialect())?;
        let digest = hex::encode(Sha256::digest(wasm));
        store.put_component(&digest, wasm).await?;
        let manifest = serde_json::to_string(&entry.worker).context("write the manifest")?;
        store
            .deploy(&entry.worker.name, &digest, &manifest, &migrations)
            .await
            .with_context(|| format!("run the migrations of worker {}", entry.worker.name))?;
        Ok(())
    }

    async fn stop(self) -> Result<()> {
        self.runner.store.close().await;
        match self.scratch {
            Some(scratch) => scratch.drop().await,
            None => Ok(()),
        }
    }
}

/// The files of cases next to a manifest, sorted by name.
fn case_files(manifest: &Manifest) -> Result<Vec<CaseFile>> {
    let Some(entry) = manifest.workers.first() else {
        return Ok(Vec::new());
    };
    let folder = match entry.folder.strip_prefix(".") {
        Ok(folder) => folder.join(CASES),
        Err(_) => entry.folder.join(CASES),
    };
    let hint = "write a case to tests/NAME.yaml next to oncely.toml, see docs/testing.md";
    if !folder.is_dir() {
        return Err(anyhow!(Exit::NotFound.with_message(format!(
            "there are no cases: {} does not exist",
            folder.display()
        ))))
        .hint(hint);
    }
    let mut paths = Vec::new();
    for file in std::fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let path = file
            .with_context(|| format!("list {}", folder.display()))?
            .path();
        let is_case = path.extension().is_some_and(|extension| {
            ["yaml", "yml", "json"]
                .iter()
                .any(|known| extension == *known)
        });
        if is_case {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(anyhow!(Exit::NotFound.with_message(format!(
            "there are no cases in {}: no *.yaml, *.yml or *.json file",
            folder.display()
        ))))
        .hint(hint);
    }
    paths.sort();
    let files: Vec<CaseFile> = paths
        .iter()
        .map(|path| CaseFile::load(path))
        .collect::<Result<_>>()?;
    for file in &files {
        let is_known = manifest
            .workers
            .iter()
            .any(|entry| belongs_to(file, entry, manifest));
        if !is_known {
            let names: Vec<&str> = manifest
                .workers
                .iter()
                .map(|entry| entry.worker.name.as_str())
                .collect();
            bail!(
                "{} names {}; the manifest has: {}",
                file.path.display(),
                file.worker
                    .as_ref()
                    .map_or("no worker".to_owned(), |name| format!(
                        "the worker `{name}`"
                    )),
                names.join(", ")
            );
        }
    }
    Ok(files)
}

fn belongs_to(file: &CaseFile, entry: &WorkerEntry, manifest: &Manifest) -> bool {
    match &file.worker {
        Some(name) => *name == entry.worker.name,
        None => manifest.workers.len() == 1,
    }
}

fn explain(case: &Case, effects: &Effects, logs: &str) -> Option<String> {
    let mut text = match case.expect == Effects::default() {
        true => "the case expects nothing: write `expect`, or accept the actual effects with \
                 `oncely test --update`\n"
            .to_owned(),
        false => case.expect.difference(effects)?,
    };
    if !logs.is_empty() {
        text.push_str("log of the handler:\n");
        text.push_str(logs);
    }
    Some(text)
}

/// The kind of a worker's inputs, and how one comes again after a crash.
fn kind_of(worker: &Worker) -> (&'static str, &'static str) {
    match worker.routes.is_empty() {
        true => ("message", "a redelivery"),
        false => ("request", "a retry"),
    }
}

fn explain_torture(tortured: &Tortured, (kind, again): (&str, &str)) -> Option<String> {
    let lines: Vec<String> = tortured
        .differences
        .iter()
        .map(|difference| {
            let fault = difference.fault.describe(kind);
            format!("after {fault}, and {again}:\n{}", difference.text)
        })
        .collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

async fn check_races(
    runner: &Runner,
    file: &CaseFile,
    cases: &[(&Case, Vec<Input>)],
    checked: &mut Vec<Checked>,
) -> Result<()> {
    let racers: Vec<Racer<'_>> = cases
        .iter()
        .flat_map(|(case, inputs)| {
            inputs.iter().filter_map(move |input| match input {
                Input::Message(delivery) => Some(Racer { case, delivery }),
                Input::Request(_) => None,
            })
        })
        .collect();
    let began = Instant::now();
    let raced = race(runner, &racers).await?;
    let name = format!(
        "{} pairs of messages in both orders, {} more have a common ordering key",
        raced.pairs, raced.ordered
    );
    let races: Vec<String> = raced
        .races
        .iter()
        .map(|race| {
            let [one, other] = &race.messages;
            format!(
                "the effects of {one} and {other} depend on their order:\n{}{}\n",
                race.text, race.hint
            )
        })
        .collect();
    let failure = (!races.is_empty()).then(|| races.join("\n"));
    let suite = file.path.display().to_string();
    report(checked, &suite, &name, began.elapsed(), failure)
}

fn report(
    checked: &mut Vec<Checked>,
    suite: &str,
    name: &str,
    took: Duration,
    failure: Option<String>,
) -> Result<()> {
    let verdict = if failure.is_some() { "FAILED" } else { "ok" };
    let ms = took.as_secs_f64() * 1_000.0;
    term::data(format!("  {verdict:<6}  {name} ({ms:.0} ms)"))?;
    if let Some(lines) = &failure {
        for line in lines.lines() {
            term::data(format!("          {}", visible(line)))?;
        }
    }
    checked.push(Checked {
        suite: suite.to_owned(),
        name: name.to_owned(),
        took,
        failure,
    });
    Ok(())
}

/// Writes the actual effects into a file of cases.
fn update(file: &CaseFile, updates: &[(usize, Effects)]) -> Result<()> {
    let path = &file.path;
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let text = with_expectations(file, &text, updates)?;
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    for (at, _) in updates {
        let name = file.cases.get(*at).map_or("", |case| case.name.as_str());
        term::data(format!("  updated {name}"))?;
    }
    Ok(())
}

fn write_junit(path: &Path, checked: &[Checked]) -> Result<()> {
    let mut report = Report::new("oncely");
    let mut suites: Vec<TestSuite> = Vec::new();
    for one in checked {
        let mut status = TestCaseStatus::success();
        if let Some(failure) = &one.failure {
            status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message("the effects differ");
            status.set_description(failure.as_str());
        }
        let mut case = TestCase::new(one.name.as_str(), status);
        case.set_time(one.took);
        match suites
            .last_mut()
            .filter(|suite| suite.name.as_str() == one.suite)
        {
            Some(suite) => {
                suite.add_test_case(case);
            }
            None => {
                let mut suite = TestSuite::new(one.suite.as_str());
                suite.add_test_case(case);
                suites.push(suite);
            }
        }
    }
    report.add_test_suites(suites);
    let file = std::fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
    report
        .serialize(file)
        .with_context(|| format!("write {}", path.display()))
}
