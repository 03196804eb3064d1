//! Login with an OpenID Connect provider: a certified one in a real browser, and one that sends
//! wrong answers.

use support::browser::Browser;
use support::guests::repository;
use support::server::{Server, free_port};

use super::browser::{axe, shows};
use super::signer::{CLIENT, Key, SECRET, Signer, Token};
use super::*;

/// The roles of the tests, as `oidc_roles` has them.
const ROLES: &str = "on-call=operate, platform=deploy, staff=view";

/// Worlds whose console has a fixed port, and a login with this issuer.
async fn world_with(issuer: &str, settings: &str, roles: &str) -> Result<World> {
    let mut world = World::without_host(Kind::Sqlite, &manifest(settings)?).await?;
    let port = free_port()?;
    world.listen = format!("127.0.0.1:{port}");
    set_login(&mut world, issuer, roles);
    world.start_host().await?;
    Ok(world)
}

fn set_login(world: &mut World, issuer: &str, roles: &str) {
    world.host_env = [
        ("ONCELY_CONSOLE_URL", format!("http://{}", world.listen)),
        ("ONCELY_OIDC_ISSUER", issuer.to_owned()),
        ("ONCELY_OIDC_CLIENT_ID", CLIENT.to_owned()),
        ("ONCELY_OIDC_CLIENT_SECRET", "env:CONSOLE_SECRET".to_owned()),
        ("CONSOLE_SECRET", SECRET.to_owned()),
        (
            "ONCELY_OIDC_SCOPES",
            "openid email profile groups".to_owned(),
        ),
        ("ONCELY_OIDC_ROLES", roles.to_owned()),
        ("ONCELY_OIDC_SESSION", "1h".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
}

/// The npm package `oidc-provider`, at this port. Its name is another site than the console's.
async fn certified_provider(port: u16, console: &str) -> Result<Server> {
    let tools = repository().join("target/tools");
    let own = tools.join("bin/node");
    let node = if own.exists() { own } else { "node".into() };
    let script = format!(
        "{} '{}' '{}' http://localhost:{port} {console}/login/oidc/callback & pid=$!; \
         read _; kill -KILL $pid; wait $pid",
        node.display(),
        repository().join("tests/oidc/provider.mjs").display(),
        tools.join("oidc").display(),
    );
    let server = Server::run(&script).context("start oidc-provider")?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let url = format!("http://localhost:{port}/.well-known/openid-configuration");
    support::eventually::eventually(
        "oidc-provider answers; `make install-tools` installs it".to_owned(),
        || async {
            let response = http.get(&url).send().await?;
            ensure!(response.status().is_success(), "{}", response.status());
            Ok(Some(()))
        },
    )
    .await?;
    Ok(server)
}

/// Logs in at the provider, beginning at a page of the console.
async fn sign_in(world: &World, path: &str, issuer: &str, user: &str) -> Result<Browser> {
    let browser = Browser::start().await?;
    browser
        .open(&format!("{}{path}", world.control_url()?))
        .await?;
    let name = issuer.trim_start_matches("http://");
    browser.click(&format!("Sign in with {name}")).await?;
    browser.fill("input[name=login]", user).await?;
    browser.fill("input[name=password]", "any").await?;
    browser.click("Sign-in").await?;
    browser.click("Continue").await?;
    Ok(browser)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_log_in_with_a_certified_provider_in_a_browser() -> Result<()> {
    let port = free_port()?;
    let issuer = format!("http://localhost:{port}");
    let world = world_with(&issuer, "", ROLES).await?;
    let _provider = certified_provider(port, &world.control_url()?).await?;
    let actor = |user: &str| format!("oidc:localhost:{port}:{user}");

    // The way back leads to the page that was opened first, by a strict cookie.
    let browser = sign_in(&world, "/workers/test/pause", &issuer, "olga").await?;
    shows(&browser, "Pause test?").await?;
    browser.fill("#note", "the bank is down").await?;
    browser.click("Pause").await?;
    shows(&browser, "test is paused").await?;
    let activity = world.oncely_json(&["activity", "--json"]).await?;
    let last = &activity[0];
    assert_eq!(
        (&last["verb"], &last["actor"]),
        (&"pause".into(), &actor("olga").into())
    );
    assert_eq!(last["stated_name"], "olga@example.com");
    assert!(last["token_id"].is_null(), "{last}");

    // Her role does not deploy. After the logout, pages need a login again.
    let console = world.control_url()?;
    browser
        .open(&format!("{console}/workers/test/retire"))
        .await?;
    browser.fill("#name", "test").await?;
    browser.click("Retire").await?;
    shows(&browser, "has the role `operate`").await?;
    browser.open(&console).await?;
    browser.click("Log out").await?;
    shows(&browser, "Sign in with").await?;
    browser.open(&format!("{console}/workers")).await?;
    shows(&browser, "Sign in with").await?;
    drop(browser);

    // One role reads, one deploys, and a group without a role has none.
    let viewer = sign_in(&world, "/workers/test", &issuer, "vera").await?;
    shows(&viewer, "is paused").await?;
    viewer
        .open(&format!("{console}/workers/test/pause"))
        .await?;
    viewer.fill("#note", "x").await?;
    viewer.click("Pause").await?;
    shows(&viewer, "has the role `view`").await?;
    drop(viewer);
    let deployer = sign_in(&world, "/workers/test/retire", &issuer, "dora").await?;
    shows(&deployer, "Retire test").await?;
    deployer.fill("#name", "test").await?;
    deployer.click("Retire").await?;
    shows(&deployer, "test is retired").await?;
    drop(deployer);
    let stranger = sign_in(&world, "/", &issuer, "nina").await?;
    shows(&stranger, "has no role in this console").await?;
    shows(&stranger, &actor("nina")).await?;
    let axe = axe()?;
    let mut found = stranger.violations(&axe).await?;
    stranger.open(&console).await?;
    shows(&stranger, "Sign in with").await?;
    found.extend(stranger.violations(&axe).await?);
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

/// A login that is under way in one browser.
struct Login {
    http: reqwest::Client,
    base: String,
    cookie: String,
    state: String,
    nonce: String,
    challenge: String,
}

impl Login {
    /// Follows the link of the login page.
    async fn begin(world: &World, next: &str) -> Result<Login> {
        let (http, base) = visitor(world)?;
        let url = format!("{base}/login/oidc?{}", form_of(&[("next", next)]));
        let page = Page::of(http.get(url)).await?;
        ensure!(
            page.status == StatusCode::SEE_OTHER,
            "{} {}",
            page.status,
            page.text
        );
        let cookie = page.header("set-cookie").to_owned();
        ensure!(
            cookie.contains("; HttpOnly; SameSite=Lax; Max-Age=600"),
            "{cookie}"
        );
        let location = reqwest::Url::parse(page.header("location"))?;
        let query = |wanted: &str| {
            let mut pairs = location.query_pairs();
            let found = pairs.find(|(name, _)| name == wanted);
            found
                .map(|(_, value)| value.into_owned())
                .unwrap_or_default()
        };
        assert_eq!(query("redirect_uri"), format!("{base}/login/oidc/callback"));
        assert_eq!(query("code_challenge_method"), "S256");
        let (state, nonce, challenge) = (query("state"), query("nonce"), query("code_challenge"));
        Ok(Login {
            http,
            cookie: cookie.split(';').next().unwrap_or_default().to_owned(),
            base,
            state,
            nonce,
            challenge,
        })
    }

    /// The way back, with these fields.
    async fn back(&self, cookie: &str, fields: &[(&str, &str)]) -> Result<Page> {
        let url = format!("{}/login/oidc/callback?{}", self.base, form_of(fields));
        Page::of(self.http.get(url).header("cookie", cookie)).await
    }

    /// The way back of an honest provider.
    async fn complete(&self, signer: &Signer, token: &str) -> Result<Page> {
        let code = signer.code(token, &self.challenge);
        self.back(&self.cookie, &[("code", &code), ("state", &self.state)])
            .await
    }
}

/// The cookie of the session that a page begins.
fn session(page: &Page) -> Option<String> {
    let cookies = page.headers.get_all("set-cookie").iter();
    let mut cookies = cookies.filter_map(|cookie| cookie.to_str().ok());
    let cookie = cookies.find(|cookie| cookie.starts_with("oncely-session="))?;
    cookie.split(';').next().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_id_tokens_are_refused() -> Result<()> {
    let signer = Signer::start(Key::new("first")?).await?;
    let world = world_with(signer.issuer(), "", ROLES).await?;
    let stranger = Key::new("first")?;
    type Change = fn(&mut Token);
    let cases: [(&str, Change); 15] = [
        ("InvalidAudience", |token| {
            token.claims["aud"] = "another".into()
        }),
        ("for another client", |token| {
            token.claims["aud"] = vec![CLIENT, "another"].into()
        }),
        ("for another client", |token| {
            token.claims["azp"] = "another".into()
        }),
        ("InvalidIssuer", |token| {
            token.claims["iss"] = "https://evil.example".into()
        }),
        ("another issuer", |token| {
            token.claims["iss"] = vec![token.claims["iss"].clone(), "x".into()].into();
        }),
        ("ExpiredSignature", |token| {
            token.claims["exp"] = 1_700_000_000.into()
        }),
        ("exp", |token| token.claims["exp"] = Value::Null),
        ("ImmatureSignature", |token| {
            token.claims["nbf"] = 4_000_000_000_u64.into()
        }),
        ("nonce differs", |token| {
            token.claims["nonce"] = "0".repeat(64).into()
        }),
        ("nonce differs", |token| token.claims["nonce"] = Value::Null),
        ("sub", |token| token.claims["sub"] = Value::Null),
        ("printable ASCII", |token| {
            token.claims["sub"] = "a\nb".into()
        }),
        ("header of the ID token", |token| token.sign_with_none()),
        ("HS256 of the ID token is not accepted", |token| {
            token.sign_with_secret(SECRET)
        }),
        ("no key of the provider", |token| {
            token.header["kid"] = "unknown".into()
        }),
    ];
    for (why, change) in cases {
        let login = Login::begin(&world, "/").await?;
        let mut token = signer.token("ada", &["staff"], &login.nonce);
        change(&mut token);
        let page = login.complete(&signer, &token.signed(signer.key())).await?;
        assert_eq!(page.status, StatusCode::FORBIDDEN, "{why}: {}", page.text);
        assert!(page.text.contains(why), "{why}: {}", page.text);
        assert!(
            page.text.contains("name=\"token\""),
            "the form for tokens is missing"
        );
        assert_eq!(session(&page), None, "{why}");
    }

    // A signature by another key of the same name, and a cut one
    let login = Login::begin(&world, "/").await?;
    let token = signer.token("ada", &["staff"], &login.nonce);
    let forged = token.signed(&stranger);
    let page = login.complete(&signer, &forged).await?;
    assert!(page.text.contains("InvalidSignature"), "{}", page.text);
    let login = Login::begin(&world, "/").await?;
    let cut = signer
        .token("ada", &["staff"], &login.nonce)
        .signed(signer.key());
    let cut = cut.rsplit_once('.').map(|(rest, _)| format!("{rest}."));
    let page = login.complete(&signer, &cut.unwrap_or_default()).await?;
    assert_eq!((page.status, session(&page)), (StatusCode::FORBIDDEN, None));

    // The same token without a change is accepted.
    let login = Login::begin(&world, "/").await?;
    let token = signer.token("ada", &["staff"], &login.nonce);
    let page = login.complete(&signer, &token.signed(signer.key())).await?;
    assert_eq!(page.status, StatusCode::OK, "{}", page.text);
    assert!(session(&page).is_some());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_is_bound_to_its_browser_and_used_once() -> Result<()> {
    let signer = Signer::start(Key::new("first")?).await?;
    let world = world_with(signer.issuer(), "", ROLES).await?;
    let login = Login::begin(&world, "/").await?;
    let other = Login::begin(&world, "/").await?;
    let token = signer
        .token("ada", &["staff"], &login.nonce)
        .signed(signer.key());
    let code = || signer.code(&token, &login.challenge);
    let refused = |page: Page, why: &str| {
        assert_eq!(page.status, StatusCode::FORBIDDEN, "{why}: {}", page.text);
        assert!(page.text.contains(why), "{why}: {}", page.text);
        assert_eq!(session(&page), None, "{why}");
    };
    let fresh = code();
    let state = login.state.as_str();
    let honest = [("code", fresh.as_str()), ("state", state)];

    // Another browser, a cookie of another login, a changed cookie, another state
    let elsewhere = "did not begin in this browser";
    refused(login.back("", &honest).await?, elsewhere);
    refused(login.back("oncely-login=AAAA", &honest).await?, elsewhere);
    let mut changed = login.cookie.clone();
    changed.replace_range(60..61, if &changed[60..61] == "A" { "B" } else { "A" });
    refused(login.back(&changed, &honest).await?, elsewhere);
    refused(login.back(&other.cookie, &honest).await?, "another login");
    let no_state = [("code", fresh.as_str())];
    refused(login.back(&login.cookie, &no_state).await?, "another login");

    // Once
    let page = login.back(&login.cookie, &honest).await?;
    assert_eq!(page.status, StatusCode::OK, "{}", page.text);
    let gone = page.headers.get_all("set-cookie").iter();
    assert!(
        gone.filter_map(|value| value.to_str().ok())
            .any(|value| { value.starts_with("oncely-login=;") && value.contains("Max-Age=0") })
    );
    let again = code();
    let page = login
        .back(&login.cookie, &[("code", &again), ("state", state)])
        .await?;
    refused(page, "completed before");

    // A code that was used, one for another verifier, an answer of another provider, an error
    let used = Login::begin(&world, "/").await?;
    let page = used
        .back(
            &used.cookie,
            &[("code", fresh.as_str()), ("state", used.state.as_str())],
        )
        .await?;
    refused(page, "invalid_grant");
    let stolen = Login::begin(&world, "/").await?;
    let code_of_other = signer.code(&token, &login.challenge);
    let page = [
        ("code", code_of_other.as_str()),
        ("state", stolen.state.as_str()),
    ];
    refused(stolen.back(&stolen.cookie, &page).await?, "invalid_grant");
    let mixed = Login::begin(&world, "/").await?;
    let page = [
        ("code", "x"),
        ("state", mixed.state.as_str()),
        ("iss", "https://evil.example"),
    ];
    refused(mixed.back(&mixed.cookie, &page).await?, "another provider");
    let denied = Login::begin(&world, "/").await?;
    let page = [
        ("error", "access_denied"),
        ("state", denied.state.as_str()),
        ("error_description", "<b>no"),
    ];
    refused(
        denied.back(&denied.cookie, &page).await?,
        "access_denied &lt;b&gt;no",
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_returns_to_pages_of_the_console_only() -> Result<()> {
    let signer = Signer::start(Key::new("first")?).await?;
    let world = world_with(signer.issuer(), "", ROLES).await?;
    for (next, expected) in [
        ("/failures?worker=test", "/failures?worker=test"),
        ("https://evil.example", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/\r\nset-cookie: a=b", "/"),
        (&format!("/{}", "x".repeat(5_000)), "/"),
    ] {
        let login = Login::begin(&world, next).await?;
        let token = signer
            .token("ada", &["staff"], &login.nonce)
            .signed(signer.key());
        let page = login.complete(&signer, &token).await?;
        assert_eq!(page.status, StatusCode::OK, "{}", page.text);
        assert_eq!(
            page.header("refresh"),
            format!("0; url={expected}"),
            "{next:?}"
        );
    }

    // The provider sends browsers to the configured name, whatever the request says.
    let (http, base) = visitor(&world)?;
    let port = base.rsplit(':').next().unwrap_or_default();
    let begin = |host: String| {
        let request = http.get(format!("{base}/login/oidc?next=/hosts"));
        Page::of(request.header("host", host))
    };
    let page = begin(format!("localhost:{port}")).await?;
    let expected = format!("{base}/login/oidc?here=1&next=%2Fhosts");
    assert_eq!(
        (page.status, page.header("location")),
        (StatusCode::SEE_OTHER, &*expected)
    );
    let page = begin("evil.example".to_owned()).await?;
    assert_eq!(page.status, StatusCode::MISDIRECTED_REQUEST);
    let hidden = Page::of(
        http.get(&expected)
            .header("host", format!("localhost:{port}")),
    )
    .await?;
    let location = hidden.header("location");
    assert!(location.starts_with(signer.issuer()), "{location}");
    assert!(location.contains(&format!("redirect_uri=http%3A%2F%2F127.0.0.1%3A{port}%2F")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_keeps_the_identity_and_loses_a_removed_role() -> Result<()> {
    let first = Key::new("first")?;
    let signer = Signer::start(first).await?;
    let mut world = world_with(signer.issuer(), ONE_ATTEMPT, ROLES).await?;
    world.nats.publish_all(vec![failing("f1")]).await?;
    world.until(OPEN, 1).await?;

    // The keys of the provider change after the discovery.
    let login = Login::begin(&world, "/").await?;
    signer.publish(Key::new("second")?);
    let mut token = signer.token("7f3a", &["on-call"], &login.nonce);
    token.claims["email"] = "ada@example.com".into();
    token.claims["email_verified"] = true.into();
    let page = login.complete(&signer, &token.signed(signer.key())).await?;
    assert_eq!(page.status, StatusCode::OK, "{}", page.text);
    let cookie = session(&page).context("find the session")?;
    assert!(page.headers.get_all("set-cookie").iter().any(|value| {
        value
            .to_str()
            .is_ok_and(|value| value.contains("SameSite=Strict; Max-Age=3600"))
    }));

    // A form cannot state another name.
    let visit = Visit::of_session(&world, cookie.clone()).await?;
    let page = visit.page("/dead-letters/1").await?;
    assert!(page.text.contains("ada@example.com") && !page.text.contains("Your name"));
    let close = [
        ("action", "drop"),
        ("note", "a test"),
        ("actor", "grace@example.com"),
    ];
    visit.send("/dead-letters/1/close", &close).await?;
    let activity = world.oncely_json(&["activity", "--json"]).await?;
    let actor = format!(
        "oidc:{}:7f3a",
        signer.issuer().trim_start_matches("http://")
    );
    assert_eq!(activity[0]["actor"], actor.as_str(), "{activity}");
    assert_eq!(activity[0]["stated_name"], "ada@example.com", "{activity}");

    // Another person takes her address as an unverified one, and stays another person.
    let login = Login::begin(&world, "/").await?;
    let mut token = signer.token("99", &["on-call"], &login.nonce);
    token.claims["email"] = "ada@example.com".into();
    token.claims["name"] = "host".into();
    let page = login.complete(&signer, &token.signed(signer.key())).await?;
    let other = Visit::of_session(&world, session(&page).context("find the session")?).await?;
    other.send("/workers/test/pause", &[("note", "x")]).await?;
    let activity = world.oncely_json(&["activity", "--json"]).await?;
    assert!(
        activity[0]["actor"]
            .as_str()
            .is_some_and(|actor| actor.ends_with(":99"))
    );
    assert_eq!(activity[0]["stated_name"], "host");

    // Without the mapping, the session is gone with the restart, and the login has no role.
    world.stop_host().await?;
    set_login(&mut world, signer.issuer(), "platform=deploy");
    world.start_host().await?;
    let page = Page::of(visit.get("/")).await?;
    assert_eq!(
        (page.status, page.header("location")),
        (StatusCode::SEE_OTHER, "/login")
    );
    let login = Login::begin(&world, "/").await?;
    let token = signer.token("7f3a", &["on-call"], &login.nonce);
    let page = login.complete(&signer, &token.signed(signer.key())).await?;
    assert_eq!((page.status, session(&page)), (StatusCode::FORBIDDEN, None));
    assert!(
        page.text.contains("has no role in this console"),
        "{}",
        page.text
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_provider_tokens_still_log_in() -> Result<()> {
    let issuer = format!("http://127.0.0.1:{}", free_port()?);
    let world = world_with(&issuer, "", ROLES).await?;
    let (http, base) = visitor(&world)?;
    let page = Page::of(http.get(format!("{base}/login/oidc?next=/hosts"))).await?;
    assert_eq!(
        page.status,
        StatusCode::SERVICE_UNAVAILABLE,
        "{}",
        page.text
    );
    for shown in [
        "is unavailable",
        "log in with a token meanwhile",
        "name=\"token\"",
    ] {
        assert!(page.text.contains(shown), "{}", page.text);
    }
    assert_eq!(field(&page.text, "next").as_deref(), Some("/hosts"));
    Visit::log_in(&world).await?.page("/").await?;
    let request = http.get(format!("{base}/v1/doctor"));
    let report = Page::of(request.bearer_auth(world.token()?)).await?;
    let report: Value = serde_json::from_str(&report.text)?;
    let findings = report["findings"].as_array().context("read the findings")?;
    let finding = findings
        .iter()
        .find(|finding| finding["check"] == "oidc-provider");
    let level = finding.map(|finding| &finding["level"]);
    assert_eq!(level, Some(&"problem".into()), "{report}");

    // A provider of another issuer is none.
    let signer = Signer::start(Key::new("first")?).await?;
    let wrong = format!("{}/", signer.issuer());
    let world = world_with(&wrong, "", ROLES).await?;
    let (http, base) = visitor(&world)?;
    let page = Page::of(http.get(format!("{base}/login/oidc"))).await?;
    assert_eq!(
        page.status,
        StatusCode::SERVICE_UNAVAILABLE,
        "{}",
        page.text
    );
    assert!(page.text.contains("is of the issuer"), "{}", page.text);
    Ok(())
}
