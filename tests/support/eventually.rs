//! Polling for a state that is reached soon.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::world::PATIENCE;

/// How often a probe runs.
const INTERVAL: Duration = Duration::from_millis(20);

/// Runs `probe` until it returns a value. `description` is the awaited state, such as `the host is
/// ready`.
///
/// # Errors
/// There is no value after [`PATIENCE`]. The last error of `probe` is part of the error.
pub async fn eventually<T, F>(description: impl Display, probe: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    eventually_within(PATIENCE, description, probe).await
}

/// Like [`eventually`], with another limit.
pub async fn eventually_within<T, F>(
    limit: Duration,
    description: impl Display,
    mut probe: impl FnMut() -> F,
) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let end = Instant::now() + limit;
    loop {
        let error = match probe().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() > end {
            match error {
                Some(error) => bail!("timeout while waiting until {description}: {error:#}"),
                None => bail!("timeout while waiting until {description}"),
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Counts until there are at least `minimum`, and returns the count. `description` names the
/// counted things, such as `outputs on the stream`.
///
/// # Errors
/// There are fewer after [`PATIENCE`]. The last count or error of `count` is part of the error.
pub async fn until_at_least<N, F>(
    description: impl Display,
    minimum: N,
    mut count: impl FnMut() -> F,
) -> Result<N>
where
    N: Copy + PartialOrd + Display,
    F: Future<Output = Result<N>>,
{
    let description = format!("there are at least {minimum} {description}");
    eventually(description, || {
        let counting = count();
        async move {
            let found = counting.await?;
            ensure!(found >= minimum, "found {found}");
            Ok(Some(found))
        }
    })
    .await
}
