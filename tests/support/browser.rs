//! A headless Chromium, controlled by chromedriver over the WebDriver protocol.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::server::{Server, free_port};

/// Timeout for the start of the browser, and for a page.
const PATIENCE: Duration = Duration::from_secs(60);

/// The key under which WebDriver returns an element.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// Keys that are not characters.
pub mod keys {
    pub const TAB: &str = "\u{e004}";
    pub const ENTER: &str = "\u{e007}";
}

/// A browser with a profile of its own, gone when the value is dropped.
pub struct Browser {
    http: reqwest::Client,
    /// The address of the session.
    session: String,
    _driver: Server,
    _profile: TempDir,
}

/// One violation that axe-core found.
pub type Violation = String;

impl Browser {
    /// Starts a driver and a browser.
    pub async fn start() -> Result<Browser> {
        let profile = tempfile::Builder::new()
            .prefix("oncely-browser-")
            .tempdir()
            .context("create a folder")?;
        let port = free_port()?;
        let driver = start_driver(port)?;
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(PATIENCE)
            .build()
            .context("set up connections")?;
        let address = format!("http://127.0.0.1:{port}");
        let session = new_session(&http, &address, profile.path()).await?;
        Ok(Browser {
            http,
            session: format!("{address}/session/{session}"),
            _driver: driver,
            _profile: profile,
        })
    }

    /// Opens an address.
    pub async fn open(&self, url: &str) -> Result<()> {
        self.post("url", json!({ "url": url })).await.map(drop)
    }

    /// The address of the page.
    pub async fn url(&self) -> Result<String> {
        let url = self.get("url").await?;
        Ok(url.as_str().unwrap_or_default().to_owned())
    }

    /// The text of the page, as it is shown.
    pub async fn text(&self) -> Result<String> {
        let text = self
            .run("return document.body.innerText", json!([]))
            .await?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Clicks the only visible link or button with this text, as a mouse does.
    pub async fn click(&self, label: &str) -> Result<()> {
        let literal = xpath_literal(label);
        let path = format!(
            "//a[normalize-space()={literal}] | //button[normalize-space()={literal}] \
             | //summary[normalize-space()={literal}]"
        );
        let element = self.find("xpath", &path).await?;
        let done = self
            .post(&format!("element/{element}/click"), json!({}))
            .await;
        done.map(drop).with_context(|| format!("click `{label}`"))
    }

    /// Replaces the text of a field.
    pub async fn fill(&self, css: &str, text: &str) -> Result<()> {
        let element = self.find("css selector", css).await?;
        self.post(&format!("element/{element}/clear"), json!({}))
            .await?;
        self.post(&format!("element/{element}/value"), json!({ "text": text }))
            .await
            .map(drop)
    }

    /// Presses keys, wherever the focus is.
    pub async fn press(&self, text: &str) -> Result<()> {
        let strokes = text.chars().flat_map(|key| {
            let key = key.to_string();
            [
                json!({ "type": "keyDown", "value": key }),
                json!({ "type": "keyUp", "value": key }),
            ]
        });
        let strokes: Vec<Value> = strokes.collect();
        let actions =
            json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": strokes }] });
        self.post("actions", actions).await.map(drop)
    }

    /// Presses Ctrl+A.
    pub async fn select_all(&self) -> Result<()> {
        let stroke = |kind: &str, key: &str| json!({ "type": kind, "value": key });
        let strokes = [
            stroke("keyDown", "\u{e009}"),
            stroke("keyDown", "a"),
            stroke("keyUp", "a"),
            stroke("keyUp", "\u{e009}"),
        ];
        let actions =
            json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": strokes }] });
        self.post("actions", actions).await.map(drop)
    }

    /// Presses the tab key until the focused element has this text, this label or this name. A
    /// checkbox has no text.
    pub async fn tab_to(&self, wanted: &str) -> Result<()> {
        let script = "const e = document.activeElement; if (!e) return []; \
            const value = e.type === 'checkbox' ? e.getAttribute('aria-label') : e.value; \
            return [e.innerText, e.name, e.id, value].map(x => (x || '').trim())";
        let mut seen = Vec::new();
        for _ in 0..200 {
            self.press(keys::TAB).await?;
            let focused = self.run(script, json!([])).await?;
            let names: Vec<String> = serde_json::from_value(focused)?;
            if names.iter().any(|name| name == wanted) {
                return Ok(());
            }
            seen.push(names.first().cloned().unwrap_or_default());
        }
        bail!("the tab key does not reach `{wanted}`, only {seen:?}")
    }

    /// Sets the size of the window in CSS pixels.
    pub async fn resize(&self, width: u32, height: u32) -> Result<()> {
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
            .await
    }

    /// Sets the preferred colour scheme: `light` or `dark`.
    pub async fn prefer(&self, scheme: &str) -> Result<()> {
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", features).await
    }

    /// Runs a script in the page. The policy of the page does not apply to it.
    pub async fn run(&self, script: &str, args: Value) -> Result<Value> {
        self.post("execute/sync", json!({ "script": script, "args": args }))
            .await
    }

    /// The violations of WCAG 2.2 AA that axe-core finds in the page.
    pub async fn violations(&self, axe: &str) -> Result<Vec<Violation>> {
        self.run(axe, json!([])).await.context("load axe-core")?;
        let script = "const done = arguments[arguments.length - 1]; \
            const tags = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']; \
            axe.run(document, { runOnly: { type: 'tag', values: tags } }) \
                .then(found => done(found.violations.map(one => one.id + ': ' + one.help + ': ' \
                    + one.nodes.slice(0, 3).map(node => node.html + ' (' + node.failureSummary + ')') \
                        .join(' | '))))";
        let found = self
            .post("execute/async", json!({ "script": script, "args": [] }))
            .await
            .context("run axe-core")?;
        Ok(serde_json::from_value(found)?)
    }

    /// The errors and warnings in the browser's log since the last call, such as violations of the
    /// policy.
    pub async fn log(&self) -> Result<Vec<String>> {
        let entries = self.post("se/log", json!({ "type": "browser" })).await?;
        let entries = entries.as_array().cloned().unwrap_or_default();
        let is_problem = |entry: &&Value| entry["level"] == "SEVERE" || entry["level"] == "WARNING";
        let message = |entry: &Value| entry["message"].as_str().unwrap_or_default().to_owned();
        Ok(entries.iter().filter(is_problem).map(message).collect())
    }

    /// Saves a picture of the page.
    pub async fn picture(&self, path: &Path) -> Result<()> {
        let picture = self.get("screenshot").await?;
        let bytes = STANDARD
            .decode(picture.as_str().unwrap_or_default())
            .context("decode the picture")?;
        std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
    }

    async fn find(&self, using: &str, value: &str) -> Result<String> {
        let found = self
            .post("element", json!({ "using": using, "value": value }))
            .await
            .with_context(|| format!("find {value}"))?;
        let element = found[ELEMENT].as_str().context("read an element")?;
        Ok(element.to_owned())
    }

    async fn devtools(&self, command: &str, params: Value) -> Result<()> {
        let body = json!({ "cmd": command, "params": params });
        self.post("goog/cdp/execute", body).await.map(drop)
    }

    async fn post(&self, path: &str, body: Value) -> Result<Value> {
        let request = self.http.post(format!("{}/{path}", self.session));
        value_of(request.json(&body)).await
    }

    async fn get(&self, path: &str) -> Result<Value> {
        value_of(self.http.get(format!("{}/{path}", self.session))).await
    }
}

/// Starts the driver, in a process group of its own. The group is killed at the end: the driver
/// alone would leave its browser behind.
fn start_driver(port: u16) -> Result<Server> {
    let script = format!(
        "setsid chromedriver --port={port} --log-level=SEVERE & pid=$!; read _; \
         kill -KILL -$pid; wait $pid"
    );
    Server::run(&script).context("start chromedriver; `make install-tools` installs it")
}

/// Waits for the driver and begins a session.
async fn new_session(http: &reqwest::Client, address: &str, profile: &Path) -> Result<String> {
    let flags = [
        "--headless".to_owned(),
        "--no-sandbox".to_owned(),
        "--disable-gpu".to_owned(),
        "--disable-quic".to_owned(),
        "--disable-dev-shm-usage".to_owned(),
        "--no-first-run".to_owned(),
        "--disable-background-networking".to_owned(),
        "--disable-component-update".to_owned(),
        "--disable-sync".to_owned(),
        format!("--user-data-dir={}", profile.display()),
    ];
    let capabilities = json!({ "capabilities": { "alwaysMatch": {
        "browserName": "chrome",
        "goog:chromeOptions": { "args": flags },
        "goog:loggingPrefs": { "browser": "ALL" },
        "timeouts": { "pageLoad": 30_000, "script": 30_000, "implicit": 5_000 },
    } } });
    let end = Instant::now() + PATIENCE;
    loop {
        let request = http.post(format!("{address}/session")).json(&capabilities);
        match value_of(request).await {
            Ok(value) => {
                let id = value["sessionId"].as_str();
                return id.map(str::to_owned).context("read the id of the session");
            }
            Err(error) if Instant::now() > end => return Err(error.context("start a browser")),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn value_of(request: reqwest::RequestBuilder) -> Result<Value> {
    let response = request.send().await.context("reach chromedriver")?;
    let mut body: Value = response
        .json()
        .await
        .context("parse a response of chromedriver")?;
    let value = body["value"].take();
    ensure!(
        value["error"].is_null(),
        "{}: {}",
        value["error"],
        value["message"]
    );
    Ok(value)
}

/// A text in an XPath, which has no escapes.
fn xpath_literal(text: &str) -> String {
    let parts: Vec<String> = text.split('"').map(|part| format!("\"{part}\"")).collect();
    match parts.as_slice() {
        [only] => only.clone(),
        parts => format!("concat({})", parts.join(", '\"', ")),
    }
}
