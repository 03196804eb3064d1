//! A real browser walks from "failing since noon" to "done once", by mouse and by keyboard alone,
//! and checks accessibility.

use std::path::PathBuf;

use support::browser::{Browser, keys};
use support::guests::repository;

use super::*;

/// The checks of accessibility, from the npm package `axe-core`.
pub fn axe() -> Result<String> {
    let path = repository().join("target/tools/axe/node_modules/axe-core/axe.min.js");
    std::fs::read_to_string(path).context("read axe-core; `make install-tools` installs it")
}

/// The folder for pictures of the pages; none unless `ONCELY_TEST_PICTURES` names one.
fn pictures() -> Option<PathBuf> {
    std::env::var_os("ONCELY_TEST_PICTURES").map(PathBuf::from)
}

/// A world with a worker whose messages fail, and a few that did not.
async fn failing_world() -> Result<World> {
    let settings = format!("{ONE_ATTEMPT}\n[worker.alarm]\ndead_letters = 2\n");
    let world = World::start(Kind::Sqlite, &manifest(&settings)?).await?;
    let mut messages: Vec<NewMessage> = (1..=20).map(NewMessage::insert).collect();
    messages.extend(["f1", "f2", "f3"].map(failing));
    world.nats.publish_all(messages).await?;
    // The failures are dead letters 1 to 3, and the refusal is the fourth.
    world.until(OPEN, 3).await?;
    let reject = r#"{"code": "unknown-account", "message": "there is no account 4711"}"#;
    let rejected = NewMessage::new("in.y", "r1", "reject", reject);
    world.nats.publish_all(vec![rejected]).await?;
    world.until(OPEN, 4).await?;
    world.quiet(24).await?;
    Ok(world)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_since_noon_is_repaired_by_mouse() -> Result<()> {
    let world = failing_world().await?;
    let browser = Browser::start().await?;
    browser.resize(1280, 900).await?;
    browser.open(&world.control_url()?).await?;
    browser.fill("#token", &world.token()?).await?;
    browser.click("Log in").await?;

    // Which failures, and since when
    shows(&browser, "Needs a person").await?;
    browser.click("Failures").await?;
    shows(&browser, "attempts-exhausted").await?;
    browser.click("requested failure of attempt #").await?;
    shows(&browser, "3 dead letters of test").await?;
    browser.click("1").await?;
    shows(&browser, "Recorded calls of attempt 1").await?;

    // The dry run fails, too; the body is corrected.
    browser.click("Dry run and redrive").await?;
    shows(&browser, "same failure").await?;
    browser.click("Edit the body first").await?;
    browser.fill("#body", r#"{"attempt": 1, "n": 1}"#).await?;
    browser.click("Show the changes").await?;
    shows(&browser, "\"attempt\": 99").await?;
    browser.fill("#actor", "ada").await?;
    browser.fill("#note", "the attempt was wrong").await?;
    browser.click("Save the corrected body").await?;

    // Now it would succeed. It is redriven, and took effect once.
    shows(&browser, "would succeed").await?;
    browser.click("Redrive").await?;
    shows(&browser, "was redriven").await?;
    world
        .until("select count(*) from oncely.inbox where state = 'done'", 21)
        .await?;
    world.until(world.database.unpublished(), 0).await?;
    browser.click("Verify").await?;
    shows(&browser, "The event took effect once.").await?;
    books::check(&world).await?;
    no_violation_of_the_policy(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_since_noon_is_repaired_by_keyboard() -> Result<()> {
    let world = failing_world().await?;
    let browser = Browser::start().await?;
    browser.resize(390, 844).await?;
    browser.open(&world.control_url()?).await?;
    // The field of the token has the focus.
    browser.press(&world.token()?).await?;
    browser.press(keys::ENTER).await?;
    shows(&browser, "Needs a person").await?;

    let follow = |name: &'static str| {
        let browser = &browser;
        async move {
            browser.tab_to(name).await?;
            browser.press(keys::ENTER).await
        }
    };
    follow("Failures").await?;
    shows(&browser, "attempts-exhausted").await?;
    follow("requested failure of attempt #").await?;
    shows(&browser, "3 dead letters of test").await?;
    follow("2").await?;
    shows(&browser, "Dead letter 2").await?;
    let event = world
        .database
        .rows("select event_id from oncely.dead_letter where id = 2")
        .await?;
    let event = event.concat().concat();
    follow("Edit the body").await?;
    browser.tab_to("body").await?;
    // Select all of it, and write over it.
    browser.select_all().await?;
    browser.press(r#"{"attempt": 1, "n": 1}"#).await?;
    follow("Show the changes").await?;
    shows(&browser, "\"attempt\": 99").await?;
    browser.tab_to("note").await?;
    browser.press("wrong attempt").await?;
    follow("Save the corrected body").await?;
    shows(&browser, "would succeed").await?;
    follow("Redrive").await?;
    shows(&browser, "was redriven").await?;
    world
        .until("select count(*) from oncely.inbox where state = 'done'", 21)
        .await?;
    world.until(world.database.unpublished(), 0).await?;
    follow("Verify").await?;
    shows(&browser, "The event took effect once.").await?;

    // The skip link comes first, and the search finds the event.
    browser.press(keys::TAB).await?;
    browser.tab_to("q").await?;
    browser.press(&event).await?;
    browser.press(keys::ENTER).await?;
    shows(&browser, "It took effect once").await?;
    books::check(&world).await?;
    no_violation_of_the_policy(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_have_no_violation_of_wcag_and_fit_narrow_windows() -> Result<()> {
    let axe = axe()?;
    let browser = Browser::start().await?;
    let empty = World::start(Kind::Sqlite, &manifest("")?).await?;
    check_pages(&browser, &empty, &axe, "empty", &PAGES).await?;
    let full = failing_world().await?;
    // A group with a note, a job with its results, and an audit that found a difference.
    let groups = full
        .oncely_json(&["dlq", "list", "--groups", "--json"])
        .await?;
    let group = groups[0]["group"]["id"].as_str().context("find a group")?;
    let note = [
        "dlq",
        "note",
        group,
        "--owner",
        "payments",
        "--note",
        "the bank is down",
    ];
    full.oncely(&note).await?;
    full.oncely(&["dlq", "redrive", "4", "--detach"]).await?;
    let removed = "delete from oncely.inbox where event_id = 'e1'";
    full.database.execute(removed).await?;
    let _ = full.oncely(&["audit"]).await;
    let of_group = format!("/failures?group={group}");
    let mut pages = PAGES.to_vec();
    pages.extend([
        of_group.as_str(),
        "/failures/redrive?selected=1&id=1&id=2",
        "/jobs/1",
        "/jobs/1/verify",
        "/books/1",
        "/outputs?stream=OUT&dropped=1",
        "/failures?worker=test&since=2h",
        "/failures/redrive?subject=in.y",
        "/failures/drop?worker=test",
        "/dead-letters/1",
        "/dead-letters/1/dry-run",
        "/dead-letters/1/edit",
        "/dead-letters/1/verify",
        "/workers/test/events/f1",
        "/workers/test/events/e1?count=1",
        "/workers/test/retire",
        "/workers/test/pause",
        "/outputs/1",
        "/search?q=in.y",
        "/nowhere",
    ]);
    check_pages(&browser, &full, &axe, "full", &pages).await?;
    no_violation_of_the_policy(&browser).await
}

/// Five messages that die, and take effect when they are redriven.
async fn repaired_world() -> Result<World> {
    let world = World::start(Kind::Sqlite, &manifest(ONE_ATTEMPT)?).await?;
    let once = |n| NewMessage::new("in.x", &format!("e{n}"), "fail_once,insert", r#"{"n": 1}"#);
    world.nats.publish_all((0..5).map(once).collect()).await?;
    world.until(OPEN, 5).await?;
    Ok(world)
}

/// Opens the page of a job until it has ended.
async fn job_ends(browser: &Browser, world: &World) -> Result<()> {
    let job = format!("{}/jobs/1", world.control_url()?);
    world
        .eventually("the job ends", || async {
            browser.open(&job).await?;
            let text = browser.text().await?;
            Ok(text.contains("5 of 5 dead letters processed").then_some(()))
        })
        .await?;
    world
        .until("select count(*) from oncely.inbox where state = 'done'", 5)
        .await?;
    world.until(world.database.unpublished(), 0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_are_planned_redriven_and_proved_by_mouse() -> Result<()> {
    let world = repaired_world().await?;
    let browser = Browser::start().await?;
    browser.resize(1280, 900).await?;
    browser.open(&world.control_url()?).await?;
    browser.fill("#token", &world.token()?).await?;
    browser.click("Log in").await?;

    // An owner and a note for the group
    browser.click("Failures").await?;
    browser.click("requested failure of attempt #").await?;
    browser.click("Add an owner and a note").await?;
    browser.fill("#owner", "payments").await?;
    browser.fill("#group-note", "the bank is down").await?;
    browser.click("Save").await?;
    shows(&browser, "Owner: payments").await?;

    // The plan, and its job
    browser.click("Redrive all…").await?;
    shows(&browser, "5 × would succeed").await?;
    shows(&browser, "none found").await?;
    browser.click("Redrive 5 dead letters").await?;
    shows(&browser, "job 1 redrives 5 dead letters").await?;
    job_ends(&browser, &world).await?;
    browser.click("Verify").await?;
    shows(&browser, "No event took effect twice").await?;

    // The books
    browser.click("Books").await?;
    browser.click("Audit").await?;
    let correct = || async {
        browser
            .open(&format!("{}/books/1", world.control_url()?))
            .await?;
        let text = browser.text().await?;
        Ok(text.contains("The books are correct.").then_some(()))
    };
    world.eventually("the audit ends", correct).await?;
    books::check(&world).await?;
    no_violation_of_the_policy(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_selection_is_redriven_paused_and_cancelled_by_keyboard() -> Result<()> {
    let world = repaired_world().await?;
    let browser = Browser::start().await?;
    browser.resize(390, 844).await?;
    browser.open(&world.control_url()?).await?;
    browser.press(&world.token()?).await?;
    browser.press(keys::ENTER).await?;
    let follow = |name: &'static str| {
        let browser = &browser;
        async move {
            browser.tab_to(name).await?;
            browser.press(keys::ENTER).await
        }
    };
    follow("Failures").await?;
    shows(&browser, "Dead letters").await?;
    for name in ["Select dead letter 3", "Select dead letter 2"] {
        browser.tab_to(name).await?;
        browser.press(" ").await?;
    }
    follow("Redrive the selected ones…").await?;
    shows(&browser, "Redrive 2 dead letters?").await?;

    // One a second, so that there is time for a pause.
    browser.tab_to("rate").await?;
    browser.select_all().await?;
    browser.press("1").await?;
    follow("Redrive 2 dead letters").await?;
    shows(&browser, "job 1 redrives 2 dead letters").await?;
    follow("Pause").await?;
    shows(&browser, "job 1 is paused").await?;
    follow("Cancel the job").await?;
    shows(&browser, "job 1 is cancelled").await?;
    no_violation_of_the_policy(&browser).await
}

/// Checks each page in both colour schemes, wide and narrow.
async fn check_pages(
    browser: &Browser,
    world: &World,
    axe: &str,
    kind: &str,
    pages: &[&str],
) -> Result<()> {
    let base = world.control_url()?;
    let mut found = Vec::new();
    browser.open(&format!("{base}/login")).await?;
    found.extend(browser.violations(axe).await?);
    take_picture(browser, &format!("{kind}-login")).await?;
    browser.fill("#token", &world.token()?).await?;
    browser.click("Log in").await?;
    for (scheme, width) in [
        ("light", 1280),
        ("dark", 1280),
        ("light", 390),
        ("dark", 390),
    ] {
        browser.prefer(scheme).await?;
        browser.resize(width, 900).await?;
        for path in pages {
            browser.open(&format!("{base}{path}")).await?;
            for violation in browser.violations(axe).await? {
                found.push(format!("{path} ({scheme}, {width}): {violation}"));
            }
            let overflow = "return document.documentElement.scrollWidth - window.innerWidth";
            let overflow = browser.run(overflow, serde_json::json!([])).await?;
            if overflow.as_i64().is_some_and(|pixels| pixels > 0) {
                found.push(format!("{path} ({width}) is {overflow} pixels too wide"));
            }
            take_picture(browser, &format!("{kind}-{scheme}-{width}-{path}")).await?;
        }
    }
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

async fn take_picture(browser: &Browser, name: &str) -> Result<()> {
    let Some(folder) = pictures() else {
        return Ok(());
    };
    let name: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    browser.picture(&folder.join(format!("{name}.png"))).await
}

/// Waits until the page shows a text.
pub async fn shows(browser: &Browser, text: &str) -> Result<()> {
    support::eventually::eventually(format!("the page shows `{text}`"), || async {
        let shown = browser.text().await?;
        ensure!(shown.contains(text), "it shows:\n{shown}");
        Ok(Some(()))
    })
    .await
}

async fn no_violation_of_the_policy(browser: &Browser) -> Result<()> {
    let log = browser.log().await?;
    // Pages that do not exist are opened on purpose.
    let is_expected = |line: &&String| line.contains("404") && line.contains("/nowhere");
    let unexpected: Vec<&String> = log.iter().filter(|line| !is_expected(line)).collect();
    ensure!(
        unexpected.is_empty(),
        "the browser's log has {unexpected:?}"
    );
    Ok(())
}
