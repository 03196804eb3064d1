//! A simulation of a thousand clients whose server returns after an outage. It runs the code of
//! real requests with a paused clock, and produces `docs/retry-herd.svg`.

use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::HeaderMap;
use tokio::time::{Instant, sleep};

use crate::budget::Budget;
use crate::policy::Policy;
use crate::retry::{Operation, Retrier};
use crate::{Error, Failure, GiveUpReason, Method, Response, StatusCode};

const CLIENTS: u64 = 1000;
/// All clients lose the server at the same instant. It returns after this time.
const OUTAGE: Duration = Duration::from_secs(15);
const SHOWN: Duration = Duration::from_secs(20);
const BUCKET: Duration = Duration::from_millis(100);

/// Tries by the tenth of a second of their arrival.
struct Arrivals {
    buckets: Vec<u64>,
    succeeded: u64,
}

/// Numbers from 0 up to 1 that are the same on every machine and in every version (SplitMix64).
fn random_from(seed: u64) -> impl Fn() -> f64 {
    let state = AtomicU64::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    move || {
        let mut z = state.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn response(status: StatusCode) -> Response {
    Response::new(status, HeaderMap::new(), Bytes::new())
}

fn post() -> Operation {
    let key = crate::key::Key::generate_for(&Method::POST);
    Operation {
        method: Method::POST,
        path: "/payments".to_owned(),
        key,
        deadline: None,
    }
}

/// Runs the clients. Each is a program of its own, with one operation that begins with the outage.
async fn herd(jitter: bool) -> Arrivals {
    let started_at = Instant::now();
    let buckets = (SHOWN.as_millis() / BUCKET.as_millis()) as usize;
    let arrivals = Arc::new(Mutex::new(vec![0; buckets]));
    let mut clients = tokio::task::JoinSet::new();
    for seed in 1..=CLIENTS {
        let random = random_from(seed);
        let retrier = Retrier {
            policy: Policy::default(),
            budget: Mutex::new(Budget::new(Budget::SHARE, Budget::RESERVE)),
            random: Box::new(move || if jitter { random() } else { 1.0 }),
        };
        let arrivals = Arc::clone(&arrivals);
        clients.spawn(async move {
            let once = || async {
                let now = started_at.elapsed();
                if let Some(bucket) = arrivals
                    .lock()
                    .unwrap()
                    .get_mut((now.as_millis() / BUCKET.as_millis()) as usize)
                {
                    *bucket += 1;
                }
                Ok(response(if now < OUTAGE {
                    StatusCode::SERVICE_UNAVAILABLE
                } else {
                    StatusCode::CREATED
                }))
            };
            retrier.run(&post(), once).await
        });
    }
    let outcomes = clients.join_all().await;
    let succeeded = outcomes.iter().filter(|outcome| outcome.is_ok()).count() as u64;
    let buckets = arrivals.lock().unwrap().clone();
    Arrivals { buckets, succeeded }
}

/// The largest count of some buckets, and their mean.
fn fullest_and_mean(buckets: &[u64]) -> (f64, f64) {
    let fullest = buckets.iter().max().copied().unwrap_or_default();
    (
        fullest as f64,
        buckets.iter().sum::<u64>() as f64 / buckets.len() as f64,
    )
}

/// The buckets of the last ten seconds of the outage, and those after the outage.
fn late_and_after(arrivals: &Arrivals) -> (&[u64], &[u64]) {
    let (outage, after) = arrivals
        .buckets
        .split_at((OUTAGE.as_millis() / BUCKET.as_millis()) as usize);
    (&outage[outage.len() - 100..], after)
}

#[tokio::test(start_paused = true)]
async fn a_thousand_clients_do_not_retry_in_the_same_tick() {
    let without = herd(false).await;
    let (late, after) = late_and_after(&without);
    let (fullest, mean) = fullest_and_mean(late);
    assert!(
        fullest >= CLIENTS as f64 && fullest > 20.0 * mean,
        "without jitter: at most {fullest}, on average {mean}"
    );
    assert!(
        after.contains(&CLIENTS),
        "without jitter all clients return within one tenth of a second"
    );

    let with = herd(true).await;
    let (late, after) = late_and_after(&with);
    let (fullest, mean) = fullest_and_mean(late);
    assert!(
        fullest < 1.8 * mean,
        "with jitter: at most {fullest}, on average {mean}"
    );
    // Waiting clients are spread over the whole of their last wait, so no wave follows the outage.
    let most = after.iter().max().copied().unwrap_or_default() as f64;
    assert!(
        most < 1.8 * mean,
        "after the outage at most {most}, during it on average {mean}"
    );
    assert_eq!((without.succeeded, with.succeeded), (CLIENTS, CLIENTS));

    let plot = plot(&without, &with);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/retry-herd.svg");
    if std::env::var_os("ONCELY_WRITE_DOCS").is_some() {
        std::fs::write(&file, &plot).unwrap();
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        committed == plot,
        "docs/retry-herd.svg is out of date; run the test with ONCELY_WRITE_DOCS=1"
    );
}

#[tokio::test(start_paused = true)]
async fn an_outage_longer_than_the_deadline_gives_up_at_it() {
    let retrier = retrier(Policy::default());
    let started_at = Instant::now();
    let failed = retrier
        .run(&post(), || async { Ok(response(StatusCode::BAD_GATEWAY)) })
        .await;
    let Err(Error::GaveUp(gave_up)) = failed else {
        panic!("{failed:?}")
    };
    assert_eq!(
        gave_up.reason,
        GiveUpReason::Deadline(Duration::from_secs(30))
    );
    assert!(gave_up.unclear && gave_up.tries > 5, "{gave_up:?}");
    assert!(
        started_at.elapsed() <= Duration::from_secs(30),
        "{:?}",
        started_at.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_try_times_out_and_the_last_one_ends_at_the_deadline() {
    let retrier = retrier(Policy {
        deadline: Duration::from_secs(25),
        ..Policy::default()
    });
    let started_at = Instant::now();
    let failed = retrier
        .run(&post(), || async {
            sleep(Duration::from_secs(3600)).await;
            Ok(response(StatusCode::OK))
        })
        .await;
    let Err(Error::GaveUp(gave_up)) = failed else {
        panic!("{failed:?}")
    };
    // Two tries of ten seconds, and the remaining five.
    assert_eq!(gave_up.tries, 3);
    assert!(
        matches!(gave_up.last, Failure::TimedOut(limit) if limit < Duration::from_secs(5)),
        "{gave_up:?}"
    );
    assert!(
        started_at.elapsed() < Duration::from_secs(26),
        "{:?}",
        started_at.elapsed()
    );
}

fn retrier(policy: Policy) -> Retrier {
    Retrier {
        policy,
        budget: Mutex::new(Budget::new(0.2, 30)),
        random: Box::new(random_from(7)),
    }
}

/// Both histograms, one above the other, each with its own scale.
fn plot(without: &Arrivals, with: &Arrivals) -> String {
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 860 430\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"860\" height=\"430\" fill=\"#fff\"/>\n",
    );
    panel(&mut svg, 30, "without jitter", without, "#b3472f");
    panel(&mut svg, 230, "with full jitter", with, "#2f6db3");
    let _ = writeln!(
        svg,
        "<text x=\"40\" y=\"418\" fill=\"#444\">seconds since 1,000 clients lost their server</text>\n</svg>"
    );
    svg
}

/// One histogram: a bar 4 wide and up to 140 high for each bucket, seconds below it.
fn panel(svg: &mut String, top: usize, title: &str, arrivals: &Arrivals, colour: &str) {
    let (fullest, _) = fullest_and_mean(late_and_after(arrivals).0);
    // The first tries arrive together under either policy. They are cut off at the end of the
    // scale.
    let scale = fullest * 1.5;
    let bottom = top + 160;
    let _ = writeln!(
        svg,
        "<rect x=\"640\" y=\"{}\" width=\"200\" height=\"140\" fill=\"#eef5ea\"/>",
        bottom - 140
    );
    let _ = writeln!(
        svg,
        "<text x=\"646\" y=\"{}\" fill=\"#3c6b2f\">the server is back</text>",
        bottom - 124
    );
    let _ = writeln!(
        svg,
        "<text x=\"40\" y=\"{}\" fill=\"#222\">{title}: from the fifth second to the end of the outage, at most {fullest} tries in a tenth of a second</text>",
        top + 8
    );
    for (at, count) in arrivals
        .buckets
        .iter()
        .enumerate()
        .filter(|(_, count)| **count > 0)
    {
        let height = (*count as f64 / scale).min(1.0) * 140.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{}\" y=\"{:.1}\" width=\"3.4\" height=\"{height:.1}\" fill=\"{colour}\"/>",
            40 + 4 * at,
            bottom as f64 - height
        );
    }
    let _ = writeln!(svg, "<path d=\"M40 {bottom}H840\" stroke=\"#444\"/>");
    for second in (0..=20).step_by(5) {
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" fill=\"#444\">{second}</text>",
            37 + 40 * second,
            bottom + 15
        );
    }
}
