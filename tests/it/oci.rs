//! Components from OCI registries, and signatures that a host demands.

use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;
use support::production::RunningHost;
use support::registry::{PASSWORD, Part, Registry, Signer, USER, digest_of, variant, write_login};
use support::world::{World, manifest_of};

/// The repository of the tests.
const NAME: &str = "team/worker";

/// The component of the tests, and another one with the same behaviour.
fn components() -> Result<(Vec<u8>, Vec<u8>)> {
    let one = std::fs::read(guests::component()?).context("read the component")?;
    let other = variant(&one, "other")?;
    Ok((one, other))
}

/// A manifest whose component has this reference, without `oci://`.
fn manifest(reference: &str) -> String {
    manifest_of(Path::new(&format!("oci://{reference}")), "")
}

/// Runs `oncely` in a folder, with the logins in its folder `docker`.
fn oncely(folder: &Path, args: &[&str]) -> Result<Output> {
    std::process::Command::new(guests::oncely()?)
        .args(args)
        .current_dir(folder)
        .env("DOCKER_CONFIG", folder.join("docker"))
        .env("NO_COLOR", "1")
        .env("RUST_BACKTRACE", "0")
        .env_remove("ONCELY_HOST")
        .env_remove("ONCELY_TOKEN")
        .output()
        .context("run `oncely`")
}

/// The standard error of `oncely build` for a reference, and whether it succeeded.
fn build(folder: &Path, reference: &str) -> Result<(bool, String)> {
    std::fs::write(folder.join("oncely.toml"), manifest(reference))?;
    let output = oncely(folder, &["build"])?;
    Ok((output.status.success(), String::from_utf8(output.stderr)?))
}

/// The error of a refused reference, which has a hint.
fn refusal(folder: &Path, reference: &str) -> Result<String> {
    let (built, said) = build(folder, reference)?;
    ensure!(!built, "the build succeeded: {reference}");
    ensure!(
        said.starts_with("error: ") || said.contains("\nerror: "),
        "{said}"
    );
    ensure!(said.contains("\nhint: "), "no hint:\n{said}");
    Ok(said)
}

/// Deploys a reference to a running host.
fn deploy(world: &World, reference: &str, args: &[&str]) -> Result<Output> {
    world.write_manifest(&manifest(reference))?;
    oncely(
        world.folder.path(),
        &[&["deploy"], args, &["oncely.toml"]].concat(),
    )
}

/// The error of a refused deployment.
fn deploy_refusal(world: &World, reference: &str) -> Result<String> {
    let output = deploy(world, reference, &[])?;
    ensure!(!output.status.success(), "deployed: {reference}");
    Ok(String::from_utf8(output.stderr)?)
}

/// The versions of the worker, newest first or last, as the host reports them.
async fn versions(world: &World) -> Result<Vec<Value>> {
    let versions = world.oncely_json(&["workers", "test", "--json"]).await?;
    Ok(versions.as_array().context("read the versions")?.clone())
}

/// The active version and the reference of its component.
async fn active(world: &World) -> Result<(u64, Option<String>)> {
    let all = versions(world).await?;
    let active = all.iter().find(|one| one["active"] == json!(true));
    let active = active.context("no version is active")?;
    let reference = active["component"].as_str().map(str::to_owned);
    Ok((active["version"].as_u64().unwrap_or_default(), reference))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tag_is_deployed_by_its_digest_and_never_resolved_again() -> Result<()> {
    let (one, other) = components()?;
    let registry = Registry::start().await?;
    let host = registry.host();
    let first = registry.push_component(NAME, "1.2", &one).await?;
    let tagged = format!("{host}/{NAME}:1.2");
    let pinned = |digest: &str| format!("oci://{tagged}@{digest}");
    let world = World::start(Kind::Postgres, &manifest(&tagged)).await?;
    assert_eq!(active(&world).await?, (1, Some(pinned(&first))));
    assert_eq!(
        versions(&world).await?[0]["digest"],
        digest_of(&one)["sha256:".len()..]
    );

    // An unmoved tag changes nothing.
    let plan = deploy(&world, &tagged, &["--plan"])?;
    assert_eq!(plan.status.code(), Some(0), "{plan:?}");

    // Another host starts while the tag is on another component, or the registry is gone.
    let second = registry.push_component(NAME, "1.2", &other).await?;
    let mut rival = RunningHost::start(&world, "rival").await?;
    assert_eq!(active(&world).await?, (1, Some(pinned(&first))));
    let workers: Value = serde_json::from_str(&rival.oncely(&["workers", "--json"])?)?;
    assert_eq!(
        workers[0]["digest"],
        digest_of(&one)["sha256:".len()..],
        "{workers}"
    );
    rival.ready().await?;

    // The plan has the digests of both.
    let plan = deploy(&world, &tagged, &["--plan", "--json"])?;
    assert_eq!(plan.status.code(), Some(10), "{plan:?}");
    let plan: Value = serde_json::from_slice(&plan.stdout)?;
    assert_eq!(
        plan["workers"][0]["manifest"],
        json!([{ "key": "component", "old": pinned(&first), "new": pinned(&second) }])
    );
    assert_eq!(
        plan["workers"][0]["component"]["new"],
        digest_of(&other)["sha256:".len()..]
    );
    let shown = deploy(&world, &tagged, &["--dry-run"])?;
    let shown = String::from_utf8(shown.stderr)?;
    assert!(
        shown.contains(&format!(
            "-> {} from {}",
            &digest_of(&other)[7..],
            pinned(&second)
        )),
        "{shown}"
    );

    // A deployment activates the new digest, and one by digest the former.
    assert!(deploy(&world, &tagged, &[])?.status.success());
    assert_eq!(active(&world).await?, (2, Some(pinned(&second))));
    let by_digest = format!("{host}/{NAME}@{first}");
    assert!(deploy(&world, &by_digest, &[])?.status.success());
    assert_eq!(
        active(&world).await?,
        (3, Some(format!("oci://{by_digest}")))
    );
    let table = world.oncely(&["workers", "test"]).await?;
    assert!(
        table.contains("SOURCE") && table.contains(&by_digest),
        "{table}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn build_pulls_a_component_once_and_refuses_everything_else() -> Result<()> {
    let (one, _) = components()?;
    let registry = Registry::start().await?;
    let host = registry.host();
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let digest = registry.push_component(NAME, "1", &one).await?;
    let reference = format!("{host}/{NAME}@{digest}");

    // The second build uses the file of the first, and a damaged file is pulled again.
    let file = folder.join("target/oncely/test.wasm");
    for (is_pulled, damage) in [(true, false), (false, false), (true, true)] {
        if damage {
            std::fs::write(&file, "damaged")?;
        }
        let (built, said) = build(folder, &reference)?;
        assert!(built && said.contains("pulling") == is_pulled, "{said}");
        assert_eq!(std::fs::read(&file)?, one);
    }

    // Artifacts of other kinds, sizes and digests.
    let image = "application/vnd.oci.image.layer.v1.tar+gzip";
    let config = || Part::new("application/vnd.oci.image.config.v1+json", "{}");
    let layers = vec![Part::new(image, "x")];
    registry.push(NAME, "image", config(), layers).await?;
    let two = vec![
        Part::new("application/wasm", "x"),
        Part::new("application/wasm", "y"),
    ];
    registry.push(NAME, "two", config(), two).await?;
    registry
        .push(
            NAME,
            "text",
            config(),
            vec![Part::new("application/wasm", "x")],
        )
        .await?;
    let media_type = "application/vnd.oci.image.index.v1+json";
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    let of_index = json!({ "mediaType": manifest, "digest": digest, "size": 1 });
    let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": [of_index] });
    registry
        .push_manifest(NAME, "index", media_type, &index)
        .await?;
    let missing = format!("sha256:{}", "0".repeat(64));
    for (name, why) in [
        ("worker:2", "does not have oci://"),
        ("other:1", "does not have oci://"),
        (format!("worker@{missing}").as_str(), "does not have oci://"),
        ("worker:image", "not a Wasm artifact"),
        ("worker:two", "2 layers"),
        ("worker:text", "cannot be deployed"),
        ("worker:index", &digest),
    ] {
        let said = refusal(folder, &format!("{host}/team/{name}"))?;
        assert!(said.contains(why), "{name}: {said}");
    }

    // A registry that stores other bytes.
    std::fs::remove_file(&file)?;
    let mut damaged = one.clone();
    damaged.pop();
    damaged.push(b'?');
    std::fs::write(registry.blob_file(&digest_of(&one)), &damaged)?;
    let said = refusal(folder, &reference)?;
    assert!(
        said.contains("the registry sent other content than sha256:"),
        "{said}"
    );
    std::fs::write(
        registry.blob_file(&digest_of(&one)),
        [one.as_slice(), &[0; 100]].concat(),
    )?;
    let said = build(folder, &reference)?;
    assert!(!said.0 && !file.exists(), "{said:?}");

    // A registry that is not there.
    drop(registry);
    let said = refusal(folder, &reference)?;
    assert!(
        said.contains(&format!("reach the registry {host}")),
        "{said}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_a_login_is_read_with_that_of_docker() -> Result<()> {
    let (one, _) = components()?;
    let registry = Registry::start_with_login().await?;
    let (host, folder) = (registry.host(), tempfile::tempdir()?);
    let folder = folder.path();
    registry.push_component(NAME, "1", &one).await?;
    let reference = format!("{host}/{NAME}:1");

    let said = refusal(folder, &reference)?;
    assert!(said.contains(&format!("docker login {host}")), "{said}");
    write_login(&folder.join("docker"), &host, "wrong-passw0rd")?;
    let said = refusal(folder, &reference)?;
    assert!(said.contains("401") && !said.contains("passw0rd"), "{said}");
    write_login(&folder.join("docker"), "registry.example.com", PASSWORD)?;
    assert!(refusal(folder, &reference)?.contains("needs a login"));
    write_login(&folder.join("docker"), &host, PASSWORD)?;
    let (built, said) = build(folder, &reference)?;
    assert!(built, "{said}");
    Ok(())
}

/// A server in front of a registry, as clouds have it: it wants a token, and redirects to a
/// storage server for blobs.
struct Front {
    registry: String,
    own: String,
    storage: String,
    /// The value of `Authorization` in each request to the storage server.
    at_storage: Mutex<Vec<Option<String>>>,
}

const TOKEN: &str = "a-token-for-the-repository";

async fn pass_on(front: &Front, request: Request) -> Response {
    let url = format!("http://{}{}", front.registry, request.uri());
    let client = reqwest::Client::new();
    let accept = request.headers().get(header::ACCEPT).cloned();
    let accept = accept.unwrap_or(header::HeaderValue::from_static("*/*"));
    let response = client.get(url).header(header::ACCEPT, accept).send().await;
    let Ok(response) = response else {
        return StatusCode::BAD_GATEWAY.into_response();
    };
    let status = response.status();
    let body = response.bytes().await.unwrap_or_default();
    (status, body).into_response()
}

fn authorization(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?;
    value.to_str().ok().map(str::to_owned)
}

async fn at_front(State(front): State<Arc<Front>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    if path == "/token" {
        use base64::Engine as _;
        let login = format!("{USER}:{PASSWORD}");
        let login = base64::engine::general_purpose::STANDARD.encode(login);
        let is_known = authorization(request.headers()) == Some(format!("Basic {login}"));
        let query = request.uri().query().unwrap_or_default();
        let is_scoped = query == "service=tests&scope=repository%3Ateam%2Fworker%3Apull";
        return match is_known && is_scoped {
            true => axum::Json(json!({ "token": TOKEN })).into_response(),
            false => StatusCode::UNAUTHORIZED.into_response(),
        };
    }
    if authorization(request.headers()) != Some(format!("Bearer {TOKEN}")) {
        let own = &front.own;
        let challenge = format!("Bearer realm=\"http://{own}/token\",service=\"tests\"");
        return (
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, challenge)],
        )
            .into_response();
    }
    if path.contains("/blobs/") {
        let location = format!("http://{}{path}", front.storage);
        return (
            StatusCode::TEMPORARY_REDIRECT,
            [(header::LOCATION, location)],
        )
            .into_response();
    }
    pass_on(&front, request).await
}

async fn at_storage(State(front): State<Arc<Front>>, request: Request) -> Response {
    let given = authorization(request.headers());
    front
        .at_storage
        .lock()
        .expect("the list of requests")
        .push(given);
    pass_on(&front, request).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_used_and_a_redirect_elsewhere_gets_no_login() -> Result<()> {
    let (one, _) = components()?;
    let registry = Registry::start().await?;
    registry.push_component(NAME, "1", &one).await?;
    let listener = || tokio::net::TcpListener::bind("127.0.0.1:0");
    let (own, storage) = (listener().await?, listener().await?);
    let front = Arc::new(Front {
        registry: registry.host(),
        own: own.local_addr()?.to_string(),
        storage: storage.local_addr()?.to_string(),
        at_storage: Mutex::default(),
    });
    let app = Router::new()
        .fallback(at_front)
        .with_state(Arc::clone(&front));
    tokio::spawn(async move { axum::serve(own, app).await });
    let app = Router::new()
        .fallback(at_storage)
        .with_state(Arc::clone(&front));
    tokio::spawn(async move { axum::serve(storage, app).await });

    let folder = tempfile::tempdir()?;
    let reference = format!("{}/{NAME}:1", front.own);
    assert!(refusal(folder.path(), &reference)?.contains("docker login"));
    write_login(&folder.path().join("docker"), &front.own, PASSWORD)?;
    let (built, said) = build(folder.path(), &reference)?;
    assert!(built, "{said}");
    let seen = front
        .at_storage
        .lock()
        .expect("the list of requests")
        .clone();
    assert_eq!(seen, [None]);
    Ok(())
}

/// A registry on loopback that answers every request with a fixed response.
async fn fixed(
    response: impl Fn(&str) -> Response + Clone + Send + Sync + 'static,
) -> Result<String> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let app = Router::new().fallback(move |request: Request| {
        let response = response(request.uri().path());
        async move { response }
    });
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_registry_is_refused_before_it_costs_memory() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let (small, large) = (digest_of(b"x"), 100 << 20);
    let manifest = |size: u64| {
        json!({ "layers": [{ "mediaType": "application/wasm", "digest": small, "size": size }] })
            .to_string()
    };

    // A component that claims to be too large, one that is larger than claimed, and a manifest
    // without end.
    let claims = manifest(large);
    let host = fixed(move |_| claims.clone().into_response()).await?;
    let said = refusal(folder, &format!("{host}/a:1"))?;
    assert!(
        said.contains("has 104857600 bytes; a component may have"),
        "{said}"
    );
    let claims = manifest(1);
    let host = fixed(move |path| match path.contains("/manifests/") {
        true => claims.clone().into_response(),
        false => vec![b'x'; 1 << 20].into_response(),
    })
    .await?;
    let (_, said) = build(folder, &format!("{host}/a:1"))?;
    assert!(said.contains("sends more than 1 bytes"), "{said}");
    let host = fixed(|_| vec![b' '; 2 << 20].into_response()).await?;
    let (_, said) = build(folder, &format!("{host}/a:1"))?;
    assert!(said.contains("sends more than 1048576 bytes"), "{said}");

    // Another manifest than the one of the digest, and redirects in a circle.
    let claims = manifest(1);
    let host = fixed(move |_| claims.clone().into_response()).await?;
    let said = refusal(folder, &format!("{host}/a@{small}"))?;
    assert!(said.contains("sent other content than sha256:"), "{said}");
    let host =
        fixed(|_| (StatusCode::FOUND, [(header::LOCATION, "/v2/a")]).into_response()).await?;
    let (_, said) = build(folder, &format!("{host}/a:1"))?;
    assert!(said.contains("redirects more than 5 times"), "{said}");
    Ok(())
}

/// A world whose host runs only components signed by `signer`, with a signed component.
async fn signed_world(registry: &Registry, signer: &Signer) -> Result<World> {
    let (one, _) = components()?;
    let digest = registry.push_component(NAME, "1", &one).await?;
    signer.sign_artifact(registry, NAME, &digest).await?;
    let reference = format!("{}/{NAME}:1", registry.host());
    let mut world = World::without_host(Kind::Sqlite, &manifest(&reference)).await?;
    let keys = world.folder.path().join("cosign.pub");
    std::fs::write(&keys, signer.public_key())?;
    let variable = "ONCELY_COMPONENT_KEYS".to_owned();
    world.host_env.push((variable, keys.display().to_string()));
    world.start_host().await?;
    Ok(world)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_with_keys_deploys_signed_artifacts_only() -> Result<()> {
    let (registry, signer, stranger) = (Registry::start().await?, Signer::new()?, Signer::new()?);
    let world = signed_world(&registry, &signer).await?;
    assert_eq!(active(&world).await?.0, 1);

    // No signature, one by another key, one of another artifact, and one of both.
    let (one, other) = components()?;
    let reference = format!("{}/{NAME}:2", registry.host());
    let digest = registry.push_component(NAME, "2", &other).await?;
    let said = deploy_refusal(&world, &reference)?;
    assert!(
        said.contains("`component_keys`") && said.contains("it is not signed"),
        "{said}"
    );
    assert!(said.contains("hint: sign it"), "{said}");
    stranger.sign_artifact(&registry, NAME, &digest).await?;
    let said = deploy_refusal(&world, &reference)?;
    assert!(
        said.contains("none of its 1 signatures is by a key of this host"),
        "{said}"
    );
    let first = registry.push_component(NAME, "1", &one).await?;
    signer.sign_as(&registry, NAME, &first, &digest).await?;
    let said = deploy_refusal(&world, &reference)?;
    assert!(
        said.contains("its signature is of another artifact"),
        "{said}"
    );
    assert_eq!(active(&world).await?.0, 1);
    signer.sign_artifact(&registry, NAME, &digest).await?;
    assert!(deploy(&world, &reference, &[])?.status.success());
    assert_eq!(active(&world).await?.0, 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_with_keys_deploys_a_file_with_its_signature() -> Result<()> {
    let (registry, signer) = (Registry::start().await?, Signer::new()?);
    let world = signed_world(&registry, &signer).await?;
    let (one, other) = components()?;
    let file = world.folder.path().join("worker.wasm");
    std::fs::write(&file, &other)?;
    world.write_manifest(&manifest_of(&file, ""))?;
    let deploy = || oncely(world.folder.path(), &["deploy", "oncely.toml"]);

    let said = String::from_utf8(deploy()?.stderr)?;
    assert!(
        said.contains("it is not signed") && said.contains("cosign sign-blob"),
        "{said}"
    );
    let signature = world.folder.path().join("worker.wasm.sig");
    std::fs::write(&signature, signer.sign(&one)?)?;
    let said = String::from_utf8(deploy()?.stderr)?;
    assert!(said.contains("or of other bytes"), "{said}");
    std::fs::write(&signature, signer.sign(&other)? + "\n")?;
    let deployed = deploy()?;
    assert!(deployed.status.success(), "{deployed:?}");
    assert_eq!(active(&world).await?, (2, None));
    Ok(())
}

both!(
    keys_also_hold_for_versions_that_were_deployed_before,
    |kind: Kind| async move {
        let (one, other) = components()?;
        let (registry, signer) = (Registry::start().await?, Signer::new()?);
        let reference = |tag: &str| format!("{}/{NAME}:{tag}", registry.host());
        registry.push_component(NAME, "1", &one).await?;
        let second = registry.push_component(NAME, "2", &other).await?;

        // Version 1 is not signed; version 2 is signed later.
        let mut world = World::start(kind, &manifest(&reference("1"))).await?;
        assert!(deploy(&world, &reference("2"), &[])?.status.success());
        let keys = world.folder.path().join("keys.pem");
        std::fs::write(&keys, Signer::new()?.public_key() + &signer.public_key())?;
        let variable = "ONCELY_COMPONENT_KEYS".to_owned();
        world.host_env.push((variable, keys.display().to_string()));
        world.stop_host().await?;
        let mut strict = RunningHost::spawn(&world, "strict")?;
        strict
            .eventually("the host refuses the unsigned version", || async {
                let workers = strict.oncely(&["workers", "--json"])?;
                Ok(workers.contains("it is not signed").then_some(()))
            })
            .await?;

        // The signature of a deployment without changes counts for the version.
        signer.sign_artifact(&registry, NAME, &second).await?;
        let manifest = world.folder.path().join("oncely.toml");
        strict.oncely(&["deploy", &manifest.display().to_string()])?;
        strict.until_version(2).await?;
        let refused = strict.oncely(&["rollback", "test"]).unwrap_err();
        assert!(
            format!("{refused:#}").contains("it is not signed"),
            "{refused:#}"
        );
        strict.ready().await
    }
);
