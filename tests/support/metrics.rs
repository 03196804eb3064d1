//! What a host measures, read as Prometheus would.

use anyhow::{Context, Result, ensure};

use crate::world::World;

/// What a host answers to `/metrics`, without a token.
pub async fn scrape(world: &World) -> Result<String> {
    let url = format!("{}/metrics", world.control_url()?);
    let response = reqwest::get(url).await?;
    ensure!(response.status().is_success(), "{}", response.status());
    let form = response
        .headers()
        .get("content-type")
        .context("it has no type")?
        .to_str()?
        .to_owned();
    ensure!(form.starts_with("application/openmetrics-text"), "{form}");
    Ok(response.text().await?)
}

/// The value of a series, by how it is written.
pub fn value(text: &str, series: &str) -> Option<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// Age of the oldest output that is committed, due and not published, in seconds, whichever way it is published; none when the
/// host, or its database, does not say.
pub async fn unpublished_age(world: &World) -> Option<f64> {
    let text = scrape(world).await.ok()?;
    if value(&text, "oncely_database_writable") != Some(1.0) {
        return None;
    }
    value(&text, "oncely_unpublished_age_max_seconds")
}
