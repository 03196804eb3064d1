//! The walk of the guide: a failing worker is repaired in the console, with pictures, and in five
//! commands.
//!
//! With `ONCELY_WRITE_WALK=1` (`make walk`) the test writes the pictures in `docs/console/` and the
//! commands in `docs/console.md`. Otherwise it compares.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use support::browser::Browser;
use support::guests::repository;

use super::browser::shows;
use super::*;

/// The walk in a terminal.
const COMMANDS: [&str; 5] = [
    "dlq list --groups --worker settle",
    "dlq show 1",
    "dlq redrive 1 --dry-run",
    "dlq redrive --worker settle",
    "dlq verify --worker settle",
];

/// The pictures of the walk, in its order.
const PICTURES: [&str; 5] = ["now", "failures", "dead-letter", "dry-run", "verified"];

/// The most bytes of a picture.
const PICTURE_MAX: u64 = 60 << 10;

/// The most lines of the output of a command.
const LINES_MAX: usize = 30;

fn writes() -> bool {
    std::env::var_os("ONCELY_WRITE_WALK").is_some()
}

fn guide() -> PathBuf {
    repository().join("docs/console.md")
}

fn picture(name: &str) -> PathBuf {
    repository().join(format!("docs/console/{name}.png"))
}

/// A worker whose messages failed at their only attempt, and succeed now.
async fn world() -> Result<World> {
    let alarm = format!("{ONE_ATTEMPT}\n[worker.alarm]\ndead_letters = 2\n");
    let text = manifest(&alarm)?;
    let text = text.replace("name = \"test\"", "name = \"settle\"");
    let text = text.replace("\"IN\"", "\"PAYMENTS\"");
    let text = text.replace("\"in.>\"", "\"payments.>\"");
    let world = World::start(Kind::Sqlite, &text).await?;
    let payment = |event: String, behaviour: &str, attempt: u32| {
        let body = format!("{{\"attempt\": {attempt}, \"n\": 1}}");
        NewMessage::new("payments.booked", &event, behaviour, &body)
    };
    let good = (1..=20).map(|n| payment(format!("p-{n}"), "insert", 1));
    world.nats.publish_all(good.collect()).await?;
    for (n, dead) in (21..=23).zip(1..) {
        let bad = payment(format!("p-{n}"), "fail_until,insert", 2);
        world.nats.publish_all(vec![bad]).await?;
        world.until(OPEN, dead).await?;
    }
    done(&world, 20).await?;
    Ok(world)
}

async fn done(world: &World, count: i64) -> Result<()> {
    let done = "select count(*) from oncely.inbox where state = 'done'";
    world.until(done, count).await?;
    world.until(world.database.unpublished(), 0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_the_walk_print_what_the_guide_shows() -> Result<()> {
    let world = world().await?;
    let mut session = String::new();
    for command in COMMANDS {
        if command.starts_with("dlq verify") {
            done(&world, 23).await?;
        }
        let arguments: Vec<&str> = command.split(' ').collect();
        let output = world.oncely(&arguments).await?;
        let lines: Vec<&str> = output.lines().map(str::trim_end).collect();
        session.push_str(&format!("$ oncely {command}\n"));
        for line in lines.iter().take(LINES_MAX) {
            session.push_str(line);
            session.push('\n');
        }
        ensure!(
            lines.len() <= LINES_MAX,
            "{command} prints {} lines",
            lines.len()
        );
    }
    let text = std::fs::read_to_string(guide())?;
    let (before, rest) = text
        .split_once(&format!("```console\n$ oncely {}\n", COMMANDS[0]))
        .context("find the session in the guide")?;
    let (shown, after) = rest
        .split_once("```\n")
        .context("find the end of the session")?;
    let shown = format!("$ oncely {}\n{shown}", COMMANDS[0]);
    if writes() {
        let text = format!("{before}```console\n{session}```\n{after}");
        return std::fs::write(guide(), text).context("write the guide");
    }
    let (shown, printed) = (masked(&shown), masked(&session));
    assert_eq!(shown, printed, "run `make walk` to update docs/console.md");
    Ok(())
}

/// The lines without the words that differ from run to run, such as times and digests.
fn masked(text: &str) -> Vec<String> {
    let mask =
        |word: &str| match word.starts_with("--") || !word.contains(|c: char| c.is_ascii_digit()) {
            true => word.to_owned(),
            false => "#".to_owned(),
        };
    let line = |line: &str| {
        line.split_whitespace()
            .map(mask)
            .collect::<Vec<_>>()
            .join(" ")
    };
    text.lines().map(line).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_walk_of_the_guide_has_pictures_of_the_console() -> Result<()> {
    if writes() {
        take_pictures().await?;
    }
    let text = std::fs::read_to_string(guide())?;
    for name in PICTURES {
        let size = std::fs::metadata(picture(name))
            .with_context(|| format!("find {name}.png"))?
            .len();
        ensure!(size <= PICTURE_MAX, "{name}.png has {size} bytes");
        ensure!(
            text.contains(&format!("(console/{name}.png)")),
            "the guide shows no {name}.png"
        );
    }
    Ok(())
}

/// Walks from the first page to the proof, and takes the pictures.
async fn take_pictures() -> Result<()> {
    let world = world().await?;
    let browser = Browser::start().await?;
    browser.prefer("light").await?;
    browser.resize(960, 560).await?;
    browser.open(&world.control_url()?).await?;
    browser.fill("#token", &world.token()?).await?;
    browser.click("Log in").await?;
    shows(&browser, "Needs a person").await?;
    take(&browser, "now").await?;
    browser.click("Failures").await?;
    shows(&browser, "attempts-exhausted").await?;
    browser.resize(960, 520).await?;
    take(&browser, "failures").await?;
    browser.click("requested failure of attempt #").await?;
    browser.click("1").await?;
    shows(&browser, "Dead letter 1").await?;
    browser.resize(960, 580).await?;
    take(&browser, "dead-letter").await?;
    browser.click("Dry run and redrive").await?;
    shows(&browser, "would succeed").await?;
    browser.resize(960, 530).await?;
    take(&browser, "dry-run").await?;
    browser.click("Redrive").await?;
    shows(&browser, "was redriven").await?;
    done(&world, 21).await?;
    browser.click("Verify").await?;
    shows(&browser, "The event took effect once.").await?;
    browser.resize(960, 460).await?;
    take(&browser, "verified").await
}

async fn take(browser: &Browser, name: &str) -> Result<()> {
    let path = picture(name);
    browser.picture(&path).await?;
    let small = smaller(&std::fs::read(&path)?).with_context(|| format!("compress {name}.png"))?;
    std::fs::write(&path, small).with_context(|| format!("write {name}.png"))
}

/// The same picture without the filters of PNG, which suit photographs. Pages are a quarter smaller
/// without them.
fn smaller(png: &[u8]) -> Result<Vec<u8>> {
    let (signature, mut rest) = png.split_at_checked(8).context("read the signature")?;
    let (mut head, mut data) = (Vec::new(), Vec::new());
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let (kind, after) = after.split_at_checked(4).context("read a kind")?;
        let (content, after) = after.split_at_checked(length).context("read a chunk")?;
        match kind {
            b"IHDR" => head = content.to_vec(),
            b"IDAT" => data.extend_from_slice(content),
            _ => {}
        }
        rest = after.get(4..).context("read a checksum")?;
    }
    // Width and height, then 8 bits of red, green and blue without interlacing.
    ensure!(
        head[8..] == [8, 2, 0, 0, 0],
        "another form of pixels: {head:?}"
    );
    let width = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let mut filtered = Vec::new();
    ZlibDecoder::new(data.as_slice()).read_to_end(&mut filtered)?;
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    let mut above = vec![0; 3 * width];
    for line in filtered.chunks(1 + 3 * width) {
        above = unfiltered(line, &above);
        encoder.write_all(&[0])?;
        encoder.write_all(&above)?;
    }
    let mut small = signature.to_vec();
    for (kind, content) in [
        (b"IHDR", head),
        (b"IDAT", encoder.finish()?),
        (b"IEND", Vec::new()),
    ] {
        small.extend_from_slice(&u32::try_from(content.len())?.to_be_bytes());
        let chunk = [kind.as_slice(), &content].concat();
        let mut checksum = flate2::Crc::new();
        checksum.update(&chunk);
        small.extend_from_slice(&chunk);
        small.extend_from_slice(&checksum.sum().to_be_bytes());
    }
    Ok(small)
}

/// The bytes of a line, from its filter and its differences to the left and the line above.
fn unfiltered(line: &[u8], above: &[u8]) -> Vec<u8> {
    let (filter, differences) = (line[0], &line[1..]);
    let mut bytes: Vec<u8> = Vec::with_capacity(differences.len());
    for (at, difference) in differences.iter().enumerate() {
        let before = |bytes: &[u8]| at.checked_sub(3).map_or(0, |left| bytes[left]);
        let (left, up, corner) = (before(&bytes), above[at], before(above));
        let predicted = match filter {
            1 => left,
            2 => up,
            3 => u8::midpoint(left, up),
            4 => nearest(left, up, corner),
            _ => 0,
        };
        bytes.push(difference.wrapping_add(predicted));
    }
    bytes
}

/// The predictor of Paeth: the neighbour that is nearest to left + up - corner.
fn nearest(left: u8, up: u8, corner: u8) -> u8 {
    let wanted = i16::from(left) + i16::from(up) - i16::from(corner);
    let distance = |neighbour: &u8| (wanted - i16::from(*neighbour)).abs();
    let neighbours = [left, up, corner];
    neighbours.into_iter().min_by_key(distance).unwrap_or(left)
}
