//! `oncely console`: a link that logs in to the console.

use anyhow::Result;
use clap::Args;

use super::client::{Client, HostArgs};
use super::term;
use crate::console::LoginLink;

/// Print a link that logs in to the console. It works once, within an hour.
#[derive(Debug, Args)]
pub struct Console {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Console {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let link: LoginLink = client.post("/console/login-links", &()).await?;
        let link = LoginLink {
            url: format!("{}{}", client.base(), link.url),
        };
        if self.json {
            return term::json(&link);
        }
        term::data(link.url)
    }
}
