//! `oncely schema`: the JSON Schema of `oncely.toml`, for editors.

use anyhow::{Context, Result};
use clap::Args;

use super::term;
use crate::config::manifest::json_schema;

/// Print the JSON Schema of oncely.toml, for editors.
#[derive(Debug, Args)]
pub struct Schema;

impl Schema {
    pub fn run(self) -> Result<()> {
        let text = serde_json::to_string_pretty(&json_schema()).context("write the schema")?;
        term::data(text)
    }
}
