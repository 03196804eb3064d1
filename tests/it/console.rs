//! The console: login and its defences, the pages and their JSON, forms, hostile data.

use anyhow::{Context, Result, ensure};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{RequestBuilder, StatusCode};
use serde_json::Value;
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{World, manifest};

mod browser;
mod forms;
mod hostile;
mod oidc;
mod signer;
mod walk;

/// One attempt, so that a message dies at once.
const ONE_ATTEMPT: &str =
    "[worker.retry]\nattempts = 1\nbackoff = \"10ms\"\nbackoff_max = \"50ms\"";

const OPEN: &str = "select count(*) from oncely.dead_letter where state = 'open'";

/// All pages without a parameter.
const PAGES: [&str; 11] = [
    "/",
    "/failures",
    "/workers",
    "/workers/test",
    "/workers/test/state",
    "/outputs",
    "/outputs?unpublished=1",
    "/streams",
    "/hosts",
    "/activity",
    "/search?q=nothing",
];

/// A program that behaves like a browser that is logged in.
pub struct Visit {
    http: reqwest::Client,
    base: String,
    cookie: String,
    csrf: String,
}

/// A response, read completely.
pub struct Page {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Page {
    async fn of(request: RequestBuilder) -> Result<Page> {
        let response = request.send().await.context("send a request")?;
        Ok(Page {
            status: response.status(),
            headers: response.headers().clone(),
            text: response.text().await.context("read a response")?,
        })
    }

    pub fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }
}

/// The console of a world, without a login.
fn visitor(world: &World) -> Result<(reqwest::Client, String)> {
    let http = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()?;
    Ok((http, world.control_url()?))
}

impl Visit {
    /// Logs in with the token of the host.
    pub async fn log_in(world: &World) -> Result<Visit> {
        Visit::log_in_with(world, &world.token()?).await
    }

    /// Logs in with a token.
    pub async fn log_in_with(world: &World, token: &str) -> Result<Visit> {
        let (http, base) = visitor(world)?;
        let form = form_of(&[("token", token)]);
        let request = http.post(format!("{base}/login"));
        let page = Page::of(
            request
                .header("origin", &base)
                .headers(form_type())
                .body(form),
        )
        .await?;
        ensure!(page.status == StatusCode::SEE_OTHER, "{}", page.text);
        let cookie = page.header("set-cookie").split(';').next();
        Visit::of_session(world, cookie.unwrap_or_default().to_owned()).await
    }

    /// The browser with the cookie of a session.
    pub async fn of_session(world: &World, cookie: String) -> Result<Visit> {
        let (http, base) = visitor(world)?;
        let mut visit = Visit {
            http,
            base,
            cookie,
            csrf: String::new(),
        };
        let first = visit.page("/").await?;
        visit.csrf = field(&first.text, "csrf").context("find the token of forms")?;
        Ok(visit)
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        let request = self.http.get(format!("{}{path}", self.base));
        request.header("cookie", &self.cookie)
    }

    /// A page, which must be shown without an error.
    pub async fn page(&self, path: &str) -> Result<Page> {
        let page = Page::of(self.get(path)).await?;
        ensure!(
            page.status == StatusCode::OK,
            "{path}: {} {}",
            page.status,
            page.text
        );
        Ok(page)
    }

    /// The JSON of a page.
    pub async fn json(&self, path: &str) -> Result<Value> {
        let page = Page::of(self.get(path).header("accept", "application/json")).await?;
        ensure!(
            page.status == StatusCode::OK,
            "{path}: {} {}",
            page.status,
            page.text
        );
        serde_json::from_str(&page.text).with_context(|| format!("parse {path}"))
    }

    pub fn post(&self, path: &str, fields: &[(&str, &str)]) -> RequestBuilder {
        let request = self.http.post(format!("{}{path}", self.base));
        let mut all = vec![("csrf", self.csrf.as_str())];
        all.extend(fields);
        request
            .header("cookie", &self.cookie)
            .header("origin", &self.base)
            .headers(form_type())
            .body(form_of(&all))
    }

    /// Sends a form and follows the redirect.
    pub async fn send(&self, path: &str, fields: &[(&str, &str)]) -> Result<Page> {
        let page = Page::of(self.post(path, fields)).await?;
        ensure!(
            page.status == StatusCode::SEE_OTHER,
            "{path}: {} {}",
            page.status,
            page.text
        );
        self.page(page.header("location")).await
    }
}

fn form_type() -> HeaderMap {
    let form = HeaderValue::from_static("application/x-www-form-urlencoded");
    HeaderMap::from_iter([(HeaderName::from_static("content-type"), form)])
}

fn form_of(fields: &[(&str, &str)]) -> String {
    let encode = |text: &str| -> String {
        text.bytes()
            .map(|byte| match byte.is_ascii_alphanumeric() {
                true => char::from(byte).to_string(),
                false => format!("%{byte:02X}"),
            })
            .collect()
    };
    let pairs = fields
        .iter()
        .map(|(name, value)| format!("{}={}", encode(name), encode(value)));
    pairs.collect::<Vec<_>>().join("&")
}

/// The value of a hidden field in a page.
pub fn field(page: &str, name: &str) -> Option<String> {
    let (_, rest) = page.split_once(&format!("name=\"{name}\" value=\""))?;
    rest.split_once('"').map(|(value, _)| value.to_owned())
}

/// A message that dies at once, until its body is corrected.
fn failing(event: &str) -> NewMessage {
    let options = r#"{"attempt": 99, "n": 1}"#;
    NewMessage::new("in.x", event, "fail_until,insert", options)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_response_of_the_console_has_the_headers_of_its_policy() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let visit = Visit::log_in(&world).await?;
    for path in PAGES.iter().chain(&[
        "/login",
        "/nowhere",
        "/dead-letters/7",
        "/assets/console.css",
    ]) {
        let page = Page::of(visit.get(path)).await?;
        let policy = page.header("content-security-policy");
        for directive in [
            "default-src 'none'",
            "style-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        ] {
            assert!(policy.contains(directive), "{path}: {policy}");
        }
        assert!(
            !policy.contains("unsafe") && !policy.contains("script-src"),
            "{policy}"
        );
        assert_eq!(page.header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(page.header("x-frame-options"), "DENY", "{path}");
        assert_eq!(page.header("referrer-policy"), "same-origin", "{path}");
        assert_eq!(
            page.header("cross-origin-opener-policy"),
            "same-origin",
            "{path}"
        );
        assert_eq!(
            page.header("cross-origin-resource-policy"),
            "same-origin",
            "{path}"
        );
        assert!(
            !page.text.contains("<script") && !page.text.contains(" style="),
            "{path}"
        );
        if !path.starts_with("/assets") {
            assert_eq!(page.header("cache-control"), "no-store", "{path}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_page_is_shown_without_a_login() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let (http, base) = visitor(&world)?;
    for path in PAGES {
        let page = Page::of(http.get(format!("{base}{path}"))).await?;
        assert_eq!(page.status, StatusCode::SEE_OTHER, "{path}");
        assert!(page.header("location").starts_with("/login"), "{path}");
        let json = http
            .get(format!("{base}{path}"))
            .header("accept", "application/json");
        assert_eq!(
            Page::of(json).await?.status,
            StatusCode::UNAUTHORIZED,
            "{path}"
        );
        let forged = http
            .get(format!("{base}{path}"))
            .header("cookie", format!("oncely-session={}", "0".repeat(64)));
        assert_eq!(
            Page::of(forged).await?.status,
            StatusCode::SEE_OTHER,
            "{path}"
        );
    }

    // Addresses below /v1 are those of the API.
    let unknown = http
        .get(format!("{base}/v1/nothing"))
        .bearer_auth(world.token()?);
    assert_eq!(Page::of(unknown).await?.status, StatusCode::NOT_FOUND);

    // The token reads JSON, and sends no forms.
    let token = world.token()?;
    let json = http.get(format!("{base}/workers")).bearer_auth(&token);
    let page = Page::of(json.header("accept", "application/json")).await?;
    let workers: Value = serde_json::from_str(&page.text)?;
    assert_eq!(workers[0]["worker"], "test");
    let form = http
        .post(format!("{base}/workers/test/retire"))
        .bearer_auth(&token)
        .header("origin", &base)
        .headers(form_type())
        .body("name=test");
    assert_eq!(Page::of(form).await?.status, StatusCode::SEE_OTHER);
    assert_eq!(
        world.oncely_json(&["workers", "--json"]).await?[0]["state"],
        "running"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_named_token_has_its_role_and_its_sessions_end_with_it() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let create = async |name: &str, role: &str| {
        let created = world
            .oncely_json(&["token", "create", name, "--role", role, "--json"])
            .await?;
        let secret = created["secret"].as_str().context("find the new token")?;
        Visit::log_in_with(&world, secret).await
    };
    let reader = create("reader", "view").await?;
    let operator = create("operator", "operate").await?;

    // Forms and dry runs need their role.
    let note = [("note", "x")];
    for (visit, path) in [
        (&reader, "/workers/test/pause"),
        (&reader, "/dead-letters/1/redrive"),
        (&operator, "/workers/test/retire"),
        (&operator, "/workers/test/rollback"),
    ] {
        let refused = Page::of(visit.post(path, &note)).await?;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{path}");
        assert!(refused.text.contains("needs the role"), "{}", refused.text);
    }
    let dry_run = Page::of(reader.get("/dead-letters/1/dry-run")).await?;
    assert_eq!(dry_run.status, StatusCode::FORBIDDEN);
    operator.send("/workers/test/pause", &note).await?;
    let activity = reader.json("/activity").await?;
    assert_eq!(activity[0]["actor"], "operator", "{activity}");

    // A revoked token ends its sessions.
    world.oncely(&["token", "revoke", "reader"]).await?;
    let logged_out = || async {
        let page = Page::of(reader.get("/")).await?;
        Ok((page.status == StatusCode::SEE_OTHER).then_some(()))
    };
    world.eventually("the session ended", logged_out).await?;
    operator.page("/").await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_needs_the_token_and_ends_with_the_logout() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let (http, base) = visitor(&world)?;
    let log_in = |token: &str, next: &str| {
        let form = form_of(&[("token", token), ("next", next)]);
        let request = http.post(format!("{base}/login")).header("origin", &base);
        Page::of(request.headers(form_type()).body(form))
    };
    let page = log_in("0123456789abcdef", "/").await?;
    assert_eq!(page.status, StatusCode::FORBIDDEN);
    assert!(page.header("set-cookie").is_empty() && page.text.contains("the token is wrong"));

    // The cookie cannot be read by scripts nor sent by other sites.
    let page = log_in(&world.token()?, "/failures?worker=test").await?;
    assert_eq!(page.header("location"), "/failures?worker=test");
    let cookie = page.header("set-cookie");
    assert!(
        cookie.contains("; HttpOnly; SameSite=Strict; Max-Age="),
        "{cookie}"
    );
    assert!(!cookie.contains("Secure"), "{cookie}");
    let id = cookie.split(['=', ';']).nth(1).unwrap_or_default();
    assert_eq!(id.len(), 64, "256 bits in hex");

    // A login leads to no other site.
    let page = log_in(&world.token()?, "//evil.example").await?;
    assert_eq!(page.header("location"), "/");

    // The page that was wanted is shown after the login.
    let page = Page::of(http.get(format!("{base}/failures?worker=test"))).await?;
    assert_eq!(
        page.header("location"),
        "/login?next=%2Ffailures%3Fworker%3Dtest"
    );

    let visit = Visit::log_in(&world).await?;
    let page = Page::of(visit.post("/logout", &[])).await?;
    assert!(page.header("set-cookie").contains("Max-Age=0"));
    assert_eq!(
        Page::of(visit.get("/")).await?.status,
        StatusCode::SEE_OTHER
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_of_dev_and_console_log_in_once() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let (http, _) = visitor(&world)?;
    let link = world
        .eventually("the link is printed", || async {
            let log = world.host_log();
            let line = log.lines().find(|line| line.contains("/login?code="));
            Ok(line
                .and_then(|line| line.split_once(": "))
                .map(|(_, link)| link.to_owned()))
        })
        .await?;
    assert!(
        !link.contains(&world.token()?),
        "the link does not contain the token"
    );
    let page = Page::of(http.get(&link)).await?;
    assert_eq!(
        (page.status, page.header("location")),
        (StatusCode::SEE_OTHER, "/")
    );
    assert!(page.header("set-cookie").starts_with("oncely-session="));
    let page = Page::of(http.get(&link)).await?;
    assert_eq!(page.status, StatusCode::FORBIDDEN);
    assert!(page.header("set-cookie").is_empty());

    // The command makes another one, for holders of the token.
    let link = world.oncely(&["console"]).await?;
    let page = Page::of(http.get(link.trim())).await?;
    assert!(
        page.header("set-cookie").starts_with("oncely-session="),
        "{link}"
    );
    let wrong = ["console", "--token", "0123456789abcdef"];
    let refused = world.oncely(&wrong).await.unwrap_err().to_string();
    assert!(
        refused.contains("the token is missing or wrong"),
        "{refused}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forms_of_other_sites_and_other_host_names_are_refused() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let visit = Visit::log_in(&world).await?;
    let name = [("name", "test")];

    // Another origin, no origin, another site on this machine, a form of another session
    let with = |header: &'static str, value: &'static str| {
        let form = form_of(&[("csrf", &visit.csrf), ("name", "test")]);
        let request = visit
            .http
            .post(format!("{}/workers/test/retire", visit.base));
        let request = request.header("cookie", &visit.cookie).headers(form_type());
        Page::of(request.header(header, value).body(form))
    };
    for (header, value) in [
        ("origin", "http://evil.example"),
        ("origin", "null"),
        ("origin", "http://127.0.0.1:1"),
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
        ("x-none", "x"),
    ] {
        assert_eq!(
            with(header, value).await?.status,
            StatusCode::FORBIDDEN,
            "{header}: {value}"
        );
    }
    let other = Visit::log_in(&world).await?;
    let forged = Visit {
        http: visit.http.clone(),
        base: visit.base.clone(),
        cookie: visit.cookie.clone(),
        csrf: other.csrf,
    };
    let page = Page::of(forged.post("/workers/test/retire", &name)).await?;
    assert_eq!(page.status, StatusCode::FORBIDDEN);
    let text = visit
        .http
        .post(format!("{}/workers/test/retire", visit.base))
        .header("cookie", &visit.cookie)
        .header("origin", &visit.base)
        .header("content-type", "text/plain")
        .body(form_of(&[("csrf", &visit.csrf), ("name", "test")]));
    let page = Page::of(text).await?;
    assert_eq!(page.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);

    // A name that was bound to this address again
    for host in ["evil.example", "127.0.0.1.evil.example:80"] {
        let page = Page::of(visit.get("/").header("host", host)).await?;
        assert_eq!(page.status, StatusCode::MISDIRECTED_REQUEST, "{host}");
        assert!(!page.text.contains("test"), "{host}");
    }
    assert_eq!(
        world.oncely_json(&["workers", "--json"]).await?[0]["state"],
        "running"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configured_name_is_served() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    world.host_env = vec![(
        "ONCELY_CONSOLE_NAMES".to_owned(),
        "ops.example.com, b".to_owned(),
    )];
    world.start_host().await?;
    let visit = Visit::log_in(&world).await?;
    let at = |host: &'static str, proto: &'static str| {
        let request = visit.http.post(format!("{}/login", visit.base));
        let form = form_of(&[("token", &world.token().unwrap_or_default())]);
        let request = request
            .header("host", host)
            .header("origin", format!("{proto}://{host}"));
        let request = request
            .header("x-forwarded-proto", proto)
            .headers(form_type());
        Page::of(request.body(form))
    };
    let page = at("ops.example.com", "https").await?;
    assert_eq!(page.status, StatusCode::SEE_OTHER);
    assert!(page.header("set-cookie").ends_with("; Secure"));
    assert_eq!(
        at("c", "https").await?.status,
        StatusCode::MISDIRECTED_REQUEST
    );
    Ok(())
}

both!(
    pages_and_json_show_the_same_as_the_commands,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        world
            .nats
            .publish_all(vec![NewMessage::insert(9), failing("e1"), failing("e2")])
            .await?;
        world.until(OPEN, 2).await?;
        world.quiet(3).await?;
        let visit = Visit::log_in(&world).await?;
        for path in PAGES {
            visit.page(path).await.with_context(|| path.to_owned())?;
        }

        // The list, one dead letter, and the workers are those of the commands.
        let listed = visit.json("/failures?worker=test").await?;
        let of_command = world.oncely_json(&["dlq", "list", "--json"]).await?;
        assert_eq!(listed["dead_letters"], of_command);
        let groups = world
            .oncely_json(&["dlq", "list", "--groups", "--json"])
            .await?;
        assert_eq!(listed["groups"], groups);
        assert_eq!(groups[0]["dead_letters"], 2);
        let mut one = visit.json("/dead-letters/1").await?;
        let recording = one.as_object_mut().and_then(|one| one.remove("recording"));
        assert!(recording.is_some_and(|recording| recording["record"]["steps"].is_array()));
        assert_eq!(
            one,
            world.oncely_json(&["dlq", "show", "1", "--json"]).await?
        );

        // The search finds numbers, event ids and subjects.
        for (query, to) in [("1", "/dead-letters/1"), ("e2", "/workers/test/events/e2")] {
            let page = Page::of(visit.get(&format!("/search?q={query}"))).await?;
            assert_eq!(
                (page.status, page.header("location")),
                (StatusCode::SEE_OTHER, to)
            );
        }
        let found = visit.json("/search?q=in.x").await?;
        assert_eq!(found["dead_letters"].as_array().map(Vec::len), Some(2));

        // The event shows its place, its row, its output, and the proof.
        let event = visit.json("/workers/test/events/e9?count=1").await?;
        assert_eq!(event["inbox"]["state"], "done");
        assert_eq!(event["source"]["stream"], "IN");
        assert!(event["source"]["stored_at"].is_string());
        assert_eq!(event["outputs"][0]["on_stream"], "same");
        assert_eq!(event["outputs"][0]["copies"], 1);
        assert_eq!(event["proof"]["holds"], true);
        let event = visit.json("/workers/test/events/e1").await?;
        assert_eq!(
            (&event["inbox"]["state"], &event["proof"]["holds"]),
            (&"dead".into(), &true.into())
        );
        assert_eq!(event["attempts"].as_array().map(Vec::len), Some(1));
        let missing = Page::of(visit.get("/workers/test/events/none")).await?;
        assert_eq!(missing.status, StatusCode::NOT_FOUND);

        // Pages follow each other by a cursor.
        let page = visit.json("/failures?below=2").await?;
        assert_eq!(page["dead_letters"][0]["id"], 1);
        let now = visit.json("/").await?;
        assert_eq!(now["dead_letters"][0]["open"], 2);
        books::check(&world).await.map(drop)
    }
);

both!(
    the_history_of_a_worker_is_a_ring_of_a_week,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let messages = (1..=5).map(NewMessage::insert).chain([failing("f")]);
        world.nats.publish_all(messages.collect()).await?;
        let done = "select coalesce(sum(done), 0) from oncely.worker_history";
        world.until(done, 5).await?;
        let dead = "select coalesce(sum(dead), 0) from oncely.worker_history";
        world.until(dead, 1).await?;
        let visit = Visit::log_in(&world).await?;
        let sum = |view: &Value, name: &str| -> u64 {
            let points = view["history"].as_array().into_iter().flatten();
            points.filter_map(|point| point[name].as_u64()).sum()
        };
        let worker = visit.json("/workers/test").await?;
        assert_eq!((sum(&worker, "done"), sum(&worker, "dead")), (5, 1));
        assert_eq!(sum(&visit.json("/").await?, "done"), 5);
        let page = visit.page("/workers/test").await?;
        assert!(
            page.text.contains("5 handled, 1 failed attempts"),
            "{}",
            page.text
        );

        // A row of the week before is used again. Its counts are gone.
        let age = "update oncely.worker_history set bucket = bucket - 2016, done = 1000";
        world.database.execute(age).await?;
        assert_eq!(sum(&visit.json("/workers/test").await?, "done"), 0);
        world.nats.publish_all(vec![NewMessage::insert(6)]).await?;
        let recent = "select coalesce(sum(done), 0) from oncely.worker_history where done < 1000";
        world.until(recent, 1).await?;
        assert_eq!(sum(&visit.json("/workers/test").await?, "done"), 1);
        Ok(())
    }
);
