//! Who may send requests over HTTP, and where.

use std::net::SocketAddr;

use super::HTTP;
use super::sources::{Given, Sources};
use crate::request::Admission;
use crate::subject;

/// Where requests are taken; none for nowhere.
pub(super) fn address(sources: &Sources<'_>) -> anyhow::Result<Option<SocketAddr>> {
    let given = sources.get("http").unwrap_or_else(|| Given::default_of("http", HTTP));
    if given.value == "off" {
        return Ok(None);
    }
    let address = given.value.replacen("localhost:", "127.0.0.1:", 1).parse();
    address.map(Some).map_err(|_| given.refuse_value("is neither an address with a port nor `off`", HTTP))
}

pub(super) fn admission(sources: &Sources<'_>) -> anyhow::Result<Admission> {
    Ok(Admission {
        caller: sources.get("http_caller").map(|given| caller(&given)).transpose()?,
        publish: sources.get("http_publish").map_or(Ok(Vec::new()), |given| publish(&given))?,
    })
}

fn caller(given: &Given) -> anyhow::Result<String> {
    let name = given.value.to_ascii_lowercase();
    match axum::http::HeaderName::try_from(&name) {
        Ok(_) => Ok(name),
        Err(_) => Err(given.refuse_value("is no name of a header", "X-Account")),
    }
}

fn publish(given: &Given) -> anyhow::Result<Vec<String>> {
    let patterns: Vec<String> = given.value.split(',').map(|pattern| pattern.trim().to_owned()).collect();
    for pattern in &patterns {
        if let Err(why) = subject::check_pattern(pattern) {
            return Err(
                given.refuse(format!("`{}` is no subject: {why}", pattern.escape_debug()), "payments.requested")
            );
        }
    }
    Ok(patterns)
}
