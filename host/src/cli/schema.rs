//! `oncely schema`: the JSON Schema of `oncely.toml`, for editors, and the description of the
//! control API.

use anyhow::{Context, Result};
use clap::Args;

use super::term;
use crate::api::openapi;
use crate::config::manifest::json_schema;

/// Print the JSON Schema of oncely.toml, for editors.
#[derive(Debug, Args)]
pub struct Schema {
    /// Print the OpenAPI document of the control API instead.
    #[arg(long)]
    openapi: bool,
}

impl Schema {
    pub fn run(self) -> Result<()> {
        let schema = match self.openapi {
            true => openapi::document(),
            false => json_schema(),
        };
        let text = serde_json::to_string_pretty(&schema).context("write the schema")?;
        term::data(text)
    }
}
