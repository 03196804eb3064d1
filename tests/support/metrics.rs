//! A host's metrics, read the way Prometheus reads them.

use anyhow::{Context, Result, ensure};

use crate::world::World;

/// Scrapes `/metrics` of a host without a token.
pub async fn scrape(world: &World) -> Result<String> {
    let url = format!("{}/metrics", world.control_url()?);
    let response = reqwest::get(url).await?;
    ensure!(response.status().is_success(), "{}", response.status());
    let form = response
        .headers()
        .get("content-type")
        .context("read the content type")?
        .to_str()?
        .to_owned();
    ensure!(form.starts_with("application/openmetrics-text"), "{form}");
    Ok(response.text().await?)
}

/// The value of a series, selected by its text form.
pub fn value(text: &str, series: &str) -> Option<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// Age in seconds of the oldest output that is committed, due and unpublished, in either relay
/// mode. None while the host or its database is unavailable.
pub async fn unpublished_age(world: &World) -> Option<f64> {
    let text = scrape(world).await.ok()?;
    if value(&text, "oncely_database_writable") != Some(1.0) {
        return None;
    }
    value(&text, "oncely_unpublished_age_max_seconds")
}
