//! `oncely token`: named tokens of the control API.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};

use super::client::{Client, HostArgs};
use super::term::{self, Table};
use crate::api::tokens::{CreatedToken, TokenRequest, WhoAmI};
use crate::model::role::Role;
use crate::model::units;
use crate::store::TokenRecord;

/// Create, list and revoke named tokens of the control API.
///
/// That needs the host's own token. Every change is recorded with the name of its token, see
/// `oncely activity`.
#[derive(Debug, Args)]
pub struct Token {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(Create),
    List(List),
    Revoke(Revoke),
    Whoami(Whoami),
}

/// Create a token, and print it once.
#[derive(Debug, Args)]
struct Create {
    /// Record this name with the changes of the token.
    name: String,
    /// Grant this role. Each role includes the ones before it.
    #[arg(long)]
    role: RoleArg,
    /// Refuse the token after this time, such as 30d or 12h. Default: never.
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    expires: Option<Duration>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// The role of a named token.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleArg {
    /// Read everything.
    View,
    /// Pause workers, handle dead letters and outputs, publish messages.
    Operate,
    /// Deploy, roll back, retire and recover.
    Deploy,
}

/// List the tokens, without their secrets.
#[derive(Debug, Args)]
struct List {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Revoke a token. All hosts refuse it within a second.
#[derive(Debug, Args)]
struct Revoke {
    /// Revoke the token of this name.
    name: String,
    #[command(flatten)]
    host: HostArgs,
}

/// Show the name and the role of the token in use.
#[derive(Debug, Args)]
struct Whoami {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Token {
    pub async fn run(self) -> Result<()> {
        match self.command {
            Command::Create(create) => create.run().await,
            Command::List(list) => list.run().await,
            Command::Revoke(revoke) => revoke.run().await,
            Command::Whoami(whoami) => whoami.run().await,
        }
    }
}

impl Create {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let request = TokenRequest {
            name: self.name,
            role: match self.role {
                RoleArg::View => Role::View,
                RoleArg::Operate => Role::Operate,
                RoleArg::Deploy => Role::Deploy,
            },
            lifetime_ms: self.expires.map(units::milliseconds),
        };
        let created: CreatedToken = client.post("/tokens", &request).await?;
        if self.json {
            return term::json(&created);
        }
        let token = &created.token;
        let until = token.expires_at.map_or_else(
            || "never expires".to_owned(),
            |at| format!("expires at {}", units::format_time(at)),
        );
        term::note(format!(
            "token {} has the role {} and {until}; it is not shown again",
            token.name,
            token.role.as_str()
        ));
        term::data(&created.secret)
    }
}

impl List {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let tokens: Vec<TokenRecord> = client.get("/tokens").await?;
        if self.json {
            return term::json(&tokens);
        }
        if tokens.is_empty() {
            term::note("no tokens; create one with: oncely token create NAME --role operate");
            return Ok(());
        }
        let mut table = Table::new(&[
            "name",
            "role",
            "created at",
            "created by",
            "expires at",
            "revoked at",
        ]);
        let time = |time: Option<jiff::Timestamp>| time.map_or("-".to_owned(), units::format_time);
        for token in &tokens {
            table.row([
                token.name.clone(),
                token.role.as_str().to_owned(),
                units::format_time(token.created_at),
                token.created_by.clone(),
                time(token.expires_at),
                time(token.revoked_at),
            ]);
        }
        term::data(table.to_string().trim_end())
    }
}

impl Revoke {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let path = format!("/tokens/{}/revoke", self.name);
        let token: TokenRecord = client.post(&path, &()).await?;
        term::data(format!("token {} is revoked", token.name))
    }
}

impl Whoami {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let caller: WhoAmI = client.get("/whoami").await?;
        if self.json {
            return term::json(&caller);
        }
        let mut details = vec![
            ("name", caller.name),
            ("role", caller.role.as_str().to_owned()),
        ];
        details.extend(
            caller
                .expires_at
                .map(|at| ("expires at", units::format_time(at))),
        );
        term::data(term::details(details))
    }
}
