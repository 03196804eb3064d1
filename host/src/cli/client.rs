//! The client of a host's control API, which is found by flag, by environment or by the file of a
//! host.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use reqwest::header::{self, HeaderValue};
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::exit::Exit;
use crate::api::{ErrorResponse, STATED_NAME_HEADER};
use crate::config::HostConfig;
use crate::model::hint::WithHint;

/// The file in the data folder of a host with its address and its token.
pub const HOST_FILE: &str = "host.json";

/// The default data folder.
pub const DATA_DIR: &str = ".oncely";

/// The folder with the machine code of components, in the data folder.
pub const COMPILED_DIR: &str = "components";

/// The host that a command uses.
#[derive(Debug, Clone, Args)]
pub struct HostArgs {
    /// Use the control API of this host, such as http://127.0.0.1:7420. Default: the host whose
    /// .oncely folder is here or in a parent folder.
    #[arg(long, env = "ONCELY_HOST", value_name = "URL", global = true)]
    pub host: Option<String>,
    /// Use this token of the host.
    #[arg(
        long,
        env = "ONCELY_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true,
        global = true
    )]
    pub token: Option<String>,
}

/// The address and the token of a running host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostFile {
    /// The control API.
    pub url: String,
    pub token: String,
    /// The address of the ingress; none without one.
    #[serde(default)]
    pub http: Option<String>,
    /// The NATS server it is connected to.
    pub nats: String,
    /// The database, without credentials.
    pub database: String,
    pub pid: u32,
}

impl HostFile {
    /// Writes the file, readable for this user only: it contains the token.
    pub fn write(&self, data_dir: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let text = serde_json::to_string_pretty(self).context("write the host file")?;
        let file = tempfile::NamedTempFile::new_in(data_dir)
            .context("create a file in the data folder")?;
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600))
            .context("protect the token")?;
        std::fs::write(file.path(), text).context("write the host file")?;
        file.persist(data_dir.join(HOST_FILE))
            .context("write the host file")?;
        Ok(())
    }

    /// Removes the file of this process. The file of another process stays.
    pub fn remove(data_dir: &Path) {
        let path = data_dir.join(HOST_FILE);
        let own = std::fs::read_to_string(&path)
            .ok()
            .and_then(|text| serde_json::from_str::<HostFile>(&text).ok());
        if own.is_some_and(|file| file.pid == std::process::id()) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// The file of the nearest host: in `.oncely` of this folder or of a parent folder.
    pub fn nearest() -> Option<HostFile> {
        let here = std::env::current_dir().ok()?;
        let found = here
            .ancestors()
            .map(|folder| folder.join(DATA_DIR).join(HOST_FILE))
            .find(|path| path.exists())?;
        serde_json::from_str(&std::fs::read_to_string(found).ok()?).ok()
    }
}

/// A host's control API.
pub struct Client {
    base: String,
    token: String,
    /// The name of the user, which is recorded beside that of the token.
    stated_name: Option<HeaderValue>,
    http: reqwest::Client,
}

impl Client {
    /// Finds the host.
    ///
    /// # Errors
    /// No host is known.
    pub fn find(args: &HostArgs) -> Result<Self> {
        let nearest = HostFile::nearest();
        let base = args
            .host
            .clone()
            .or_else(|| nearest.as_ref().map(|file| file.url.clone()));
        let Some(base) = base else {
            let why = format!(
                "no host is known here: no {DATA_DIR}/{HOST_FILE} in this folder or its parents"
            );
            return Err(Exit::Unreachable.with_message(why))
                .hint("start one with: oncely dev   (or set one with --host and --token)");
        };
        let token = args
            .token
            .clone()
            .or_else(|| nearest.map(|file| file.token))
            .unwrap_or_default();
        let is_local =
            reqwest::Url::parse(&base).is_ok_and(|url| oncely_client::is_on_this_machine(&url));
        let http = reqwest::Client::builder();
        let http = if is_local { http.no_proxy() } else { http };
        let http = http.build().context("set up connections")?;
        Ok(Client {
            base: base.trim_end_matches('/').to_owned(),
            token,
            stated_name: stated_name(),
            http,
        })
    }

    /// The address of the host, without a slash at the end.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The same host, for a program that acts for the user. Its name is recorded with the user's.
    pub fn via(mut self, program: &str) -> Self {
        let user = self
            .stated_name
            .as_ref()
            .and_then(|name| name.to_str().ok());
        let name = format!("{} via {program}", user.unwrap_or("unknown"));
        self.stated_name = HeaderValue::from_str(&name).ok();
        self
    }

    /// A page of the console, as JSON.
    pub async fn page<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let request = self.http.get(format!("{}{path}", self.base));
        let request = request.bearer_auth(&self.token);
        self.send(request.header(header::ACCEPT, "application/json"))
            .await
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.send(self.request(Method::GET, path)).await
    }

    pub async fn get_with<Q: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        query: &Q,
    ) -> Result<T> {
        self.send(self.request(Method::GET, path).query(query))
            .await
    }

    /// Downloads bytes, unchanged.
    pub async fn download(&self, path: &str) -> Result<Vec<u8>> {
        Ok(self
            .response_body(self.request(Method::GET, path))
            .await?
            .into())
    }

    pub async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    pub async fn upload<T: DeserializeOwned>(&self, path: &str, bytes: Vec<u8>) -> Result<T> {
        self.send(self.request(Method::POST, path).body(bytes))
            .await
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self
            .http
            .request(method, format!("{}/v1{path}", self.base))
            .bearer_auth(&self.token);
        match &self.stated_name {
            Some(name) => request.header(STATED_NAME_HEADER, name),
            None => request,
        }
    }

    async fn send<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T> {
        let body = self.response_body(request).await?;
        serde_json::from_slice(&body).context("parse the host's response (is it the same version?)")
    }

    async fn response_body(&self, request: reqwest::RequestBuilder) -> Result<bytes::Bytes> {
        let response = request
            .send()
            .await
            .with_context(|| {
                Exit::Unreachable.with_message(format!("reach the host at {}", self.base))
            })
            .hint(
                "start it with `oncely dev` or `oncely run`, or set another one with --host URL",
            )?;
        let status = response.status();
        let body = response.bytes().await.context("read the host's response")?;
        if status.is_success() {
            return Ok(body);
        }
        let exit = match status {
            StatusCode::NOT_FOUND => Exit::NotFound,
            StatusCode::SERVICE_UNAVAILABLE => Exit::Unreachable,
            _ => Exit::Failure,
        };
        Err(match serde_json::from_slice::<ErrorResponse>(&body) {
            Ok(error_response) => from_error_response(error_response, exit),
            Err(_) => anyhow!(
                "the host answered {status}: {}",
                String::from_utf8_lossy(&body).trim()
            ),
        })
    }
}

/// The name of the user: `ONCELY_ACTOR`, or the user of the operating system. That is reported by
/// `id`, as the environment can be wrong. `None` if it cannot be sent.
fn stated_name() -> Option<HeaderValue> {
    let user = || {
        let output = std::process::Command::new("id").arg("-un").output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let name = std::env::var("ONCELY_ACTOR").ok().or_else(user)?;
    HeaderValue::from_str(&name).ok()
}

/// The error as the host reported it: causes from the inside out, then the hints.
fn from_error_response(error_response: ErrorResponse, exit: Exit) -> anyhow::Error {
    let mut causes = error_response.causes.into_iter().rev();
    let error = match causes.next() {
        Some(innermost) => causes
            .fold(anyhow!(innermost), |error, text| error.context(text))
            .context(exit.with_message(error_response.error)),
        None => exit.with_message(error_response.error).into(),
    };
    error_response
        .hints
        .into_iter()
        .rev()
        .fold(error, |error, hint| error.hint(hint))
}

/// Creates the folder for archived rows if it is missing.
pub fn make_archive(config: &HostConfig) -> Result<()> {
    let Some(folder) = &config.archive else {
        return Ok(());
    };
    std::fs::create_dir_all(folder)
        .with_context(|| format!("create the archive folder {}", folder.display()))
        .hint("set another folder with --archive FOLDER")
}

/// Creates the data folder if it is missing, accessible for this user only.
pub fn make_data_dir(path: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("create the folder {}", path.display()))?;
    path.canonicalize()
        .with_context(|| format!("find the folder {}", path.display()))
}
