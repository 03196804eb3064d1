//! Tests of the precedence of sources, of refused values, and of the reference's completeness.

use std::os::unix::fs::PermissionsExt;

use clap::{Args as _, Command, FromArgMatches};

use super::*;
use crate::model::hint::hints;
use crate::model::role::Role;

/// A public key as cosign writes it.
const PUBLIC_KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAECa7ZoRA5IWcfCeDXbe52TFWv9LZY
uQq0E4FXNh6MmXRHp9z/ltCg1kEMWMc7PK5CrP2+5qMpLdez4ywKrKpSmg==
-----END PUBLIC KEY-----
";

/// A complete login with a provider.
const OIDC: [(&str, &str); 4] = [
    ("ONCELY_OIDC_ISSUER", "https://login.example.com"),
    ("ONCELY_OIDC_CLIENT_ID", "oncely"),
    ("ONCELY_OIDC_ROLES", "on-call=operate"),
    ("ONCELY_CONSOLE_URL", "https://oncely.example.com"),
];

fn flags(arguments: &[&str]) -> HostFlags {
    let command = HostFlags::augment_args(Command::new("run").no_binary_name(true));
    HostFlags::from_arg_matches(&command.try_get_matches_from(arguments).unwrap()).unwrap()
}

fn resolve(arguments: &[&str], env: &[(&str, &str)]) -> anyhow::Result<HostConfig> {
    let env = |name: &str| {
        env.iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| (*value).to_owned())
    };
    HostConfig::resolve(&flags(arguments), &env)
}

fn file(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("host.toml"), text).unwrap();
    folder
}

#[test]
fn defaults_run_a_host_from_one_local_folder() {
    let config = resolve(&[], &[]).unwrap();
    let expected = HostConfig {
        database: Database::Sqlite(".oncely/oncely.db".into()),
        pool_size: 16,
        guest_sql: GuestSql::Restricted,
        stream_replicas: None,
        take_over: None,
        nats: Nats {
            servers: vec!["nats://127.0.0.1:4222".into()],
            ..Nats::default()
        },
        listen: LISTEN_ADDRESS.parse().unwrap(),
        token: None,
        console_names: Vec::new(),
        console_url: None,
        oidc: None,
        http: Some(HTTP_ADDRESS.parse().unwrap()),
        admission: Admission::default(),
        http_limits: HttpLimits::default(),
        data_dir: ".oncely".into(),
        log_format: LogFormat::Text,
        log_level: "info".into(),
        drain: Duration::from_secs(30),
        keep_outputs: Duration::from_secs(15 * 60),
        relay: None,
        relay_database: None,
        relay_slot_max: 4 << 30,
        keep_inbox: KeepInbox::Auto,
        archive: None,
        receipts: None,
        keep_receipts: Duration::from_secs(7 * 24 * 60 * 60),
        webhook: None,
        webhook_secret: None,
        cache: CacheSettings {
            size: 64 << 20,
            shared: None,
        },
        compile: CompileSettings::default(),
        component_keys: None,
        file_with_secrets: None,
        traces: TraceSettings::default(),
    };
    assert_eq!(config, expected);
}

#[test]
fn a_flag_beats_a_variable_beats_the_file_beats_the_default() {
    let folder = file("drain = \"1s\"\npool_size = 3\nlog_format = \"json\"");
    let path = folder.path().join("host.toml");
    let path = path.to_str().unwrap();
    let drain =
        |arguments: &[&str], env: &[(&str, &str)]| resolve(arguments, env).unwrap().drain.as_secs();
    let env = [("ONCELY_DRAIN", "2s"), ("ONCELY_CONFIG", path)];
    assert_eq!(drain(&["--drain", "3s"], &env), 3);
    assert_eq!(drain(&[], &env), 2);
    assert_eq!(drain(&["--config", path], &[("ONCELY_DRAIN", "")]), 1);
    assert_eq!(drain(&[], &[]), 30);
    let config = resolve(&[], &env).unwrap();
    assert_eq!((config.pool_size, config.log_format), (3, LogFormat::Json));
}

/// A valid value other than the default for every setting, which detects a setting that is never
/// read.
#[test]
fn every_setting_is_read_from_every_source() {
    let folder = file("");
    let context = folder.path().join("nats/context");
    std::fs::create_dir_all(&context).unwrap();
    std::fs::write(
        context.join("prod.json"),
        r#"{"url": "tls://a:1", "user": "u", "password": "p"}"#,
    )
    .unwrap();
    let creds = folder.path().join("a.creds");
    std::fs::write(&creds, "").unwrap();
    let public_key = folder.path().join("cosign.pub");
    std::fs::write(&public_key, PUBLIC_KEY).unwrap();
    let values = |key: &str| match key {
        "database" => "postgres://a/b".to_owned(),
        "pool_size" => "7".to_owned(),
        "guest_sql" => "trusted".to_owned(),
        "nats" => "nats://b:2".to_owned(),
        "nats_context" => "prod".to_owned(),
        "nats_creds" => creds.to_string_lossy().into_owned(),
        "stream_replicas" => "5".to_owned(),
        "take_over" => "0123456789abcdef".to_owned(),
        "listen" => "127.0.0.1:1".to_owned(),
        "token" => "0123456789abcdef".to_owned(),
        "console_names" => "ops.example.com, b".to_owned(),
        "console_url" => "https://ops.example.com".to_owned(),
        "oidc_issuer" => "https://login.example.com/a".to_owned(),
        "oidc_client_id" => "another".to_owned(),
        "oidc_client_secret" => format!("file:{}", public_key.display()),
        "oidc_scopes" => "openid groups".to_owned(),
        "oidc_claim" => "/realm_access/roles".to_owned(),
        "oidc_roles" => "a=b=view, c=deploy".to_owned(),
        "oidc_session" => "9m".to_owned(),
        "http" => "off".to_owned(),
        "http_caller" => "x-account".to_owned(),
        "http_publish" => "a.>, b".to_owned(),
        "http_connections" => "7".to_owned(),
        "http_memory" => "2MiB".to_owned(),
        "http_head_timeout" | "http_body_timeout" | "http_idle_timeout" => "9s".to_owned(),
        "data_dir" => "/elsewhere".to_owned(),
        "log_format" => "json".to_owned(),
        "log_level" => "debug".to_owned(),
        "drain" => "9s".to_owned(),
        "keep_outputs" => "9m".to_owned(),
        "relay" => "poll".to_owned(),
        "relay_database" => "postgres://c/d".to_owned(),
        "relay_slot_max" => "128MiB".to_owned(),
        "keep_inbox" => "9d".to_owned(),
        "archive" => creds
            .with_file_name("archive")
            .to_string_lossy()
            .into_owned(),
        "receipts" => "9s".to_owned(),
        "keep_receipts" => "9d".to_owned(),
        "webhook" => "https://a/b".to_owned(),
        "cache_size" => "1MiB".to_owned(),
        "cache_url" => "redis://a:1/2".to_owned(),
        "compile_time" => "9s".to_owned(),
        "compile_memory" => "3GiB".to_owned(),
        "component_keys" => public_key.to_string_lossy().into_owned(),
        "traces" => "http://a:4318".to_owned(),
        "traces_service" => "payments".to_owned(),
        "traces_sampling" => "0.5".to_owned(),
        "webhook_secret" => format!("whsec_{}", "c2VjcmV0".repeat(4)),
        _ => panic!("no value for {key}"),
    };
    let home = ("XDG_CONFIG_HOME", folder.path().to_str().unwrap());
    for key in SETTINGS {
        let value = values(key);
        let variable = format!("ONCELY_{}", key.to_uppercase());
        // The settings of a login are valid together only.
        let is_login = key.starts_with("oidc_") || key == "console_url";
        let others = if is_login { &OIDC[..] } else { &[] };
        let default = resolve(&[], others).unwrap();
        let others = others.iter().filter(|(name, _)| *name != variable);
        let env: Vec<_> = std::iter::once(&home).chain(others).copied().collect();
        let flag = format!("--{}", key.replace('_', "-"));
        let by_flag = resolve(&[&flag, &value], &env).unwrap();
        let with_variable = [&env[..], &[(variable.as_str(), value.as_str())]].concat();
        let by_variable = resolve(&[], &with_variable).unwrap();
        let path = folder.path().join("host.toml");
        std::fs::write(&path, format!("{key} = {value:?}")).unwrap();
        let mut by_file = resolve(&["--config", path.to_str().unwrap()], &env).unwrap();
        let has_secret = by_file.file_with_secrets.take().is_some();
        let is_secret = ["token", "webhook", "webhook_secret"].contains(&key);
        assert!(has_secret || !is_secret, "{key}");
        assert_ne!(by_flag, default, "{key}");
        assert_eq!(by_flag, by_variable, "{key}");
        assert_eq!(by_flag, by_file, "{key}");
    }
}

#[test]
fn an_invalid_setting_is_reported_with_its_source_and_an_example() {
    type Case = (
        &'static [&'static str],
        &'static [(&'static str, &'static str)],
        &'static str,
        &'static str,
    );
    let cases: [Case; 30] = [
        (
            &["--component-keys", "/no/such/file"],
            &[],
            "`component_keys` (from --component-keys) is invalid: /no/such/file: No such file",
            "--component-keys cosign.pub",
        ),
        (
            &["--receipts", "5m"],
            &[("ONCELY_KEEP_OUTPUTS", "9m")],
            "`5m` is neither `off` nor a duration between 1s and half of `keep_outputs`",
            "--receipts 1m",
        ),
        (
            &["--take-over", "me"],
            &[],
            "`me` is not the id of an installation",
            "--take-over 0123456789abcdef",
        ),
        (
            &["--compile-time", "0s"],
            &[],
            "`0s` is not a duration between 1s and 1h",
            "--compile-time 2m",
        ),
        (
            &["--compile-memory", "1MiB"],
            &[],
            "`1MiB` is not a size of 1 GiB or more",
            "--compile-memory 2GiB",
        ),
        (
            &["--relay", "push"],
            &[],
            "`relay` (from --relay) is invalid: `push` is neither",
            "--relay wal",
        ),
        (
            &[],
            &[("ONCELY_RELAY", "wal")],
            "`relay` (from ONCELY_RELAY) is invalid: `wal` reads",
            "postgres://",
        ),
        (
            &["--relay-slot-max", "1MiB"],
            &[],
            "`1MiB` is not a size of 64 MiB or more",
            "--relay-slot-max 4GiB",
        ),
        (
            &["--http", "here"],
            &[],
            "`here` is neither an address with a port nor `off`",
            "--http 127.0.0.1:7480",
        ),
        (
            &["--http-caller", "a b"],
            &[],
            "`a b` is not a valid header name",
            "--http-caller X-Account",
        ),
        (
            &["--http-publish", "a..b"],
            &[],
            "is not a valid subject",
            "--http-publish payments.requested",
        ),
        (
            &["--http-connections", "0"],
            &[],
            "`0` is not a whole number between 1",
            "--http-connections 1024",
        ),
        (
            &["--http-memory", "1KiB"],
            &[],
            "`1KiB` is not a size between 1 MiB",
            "--http-memory 128MiB",
        ),
        (
            &["--http-head-timeout", "0s"],
            &[],
            "`0s` is not a duration between 100ms",
            "--http-head-timeout 30s",
        ),
        (
            &["--http-body-timeout", "2h"],
            &[],
            "`2h` is not a duration between 100ms",
            "--http-body-timeout 30s",
        ),
        (
            &["--http-idle-timeout", "x"],
            &[],
            "`x` is not a duration between 100ms",
            "--http-idle-timeout 30s",
        ),
        (
            &["--drain", "soon"],
            &[],
            "`drain` (from --drain) is invalid: `soon` is not a duration",
            "--drain 30s",
        ),
        (
            &["--archive", "/proc/none"],
            &[],
            "/proc/none is not writable",
            "--archive /var/lib",
        ),
        (
            &["--keep-inbox", "ever"],
            &[],
            "`ever` is neither `auto` nor a duration",
            "--keep-inbox auto",
        ),
        (
            &[],
            &[("ONCELY_LOG_FORMAT", "xml")],
            "`log_format` (from ONCELY_LOG_FORMAT) is invalid: `xml` is neither",
            "ONCELY_LOG_FORMAT=json",
        ),
        (
            &["--pool-size", "1"],
            &[],
            "`pool_size` (from --pool-size) is invalid: `1` is not a whole",
            "--pool-size 16",
        ),
        (
            &["--log-level", "a=b=c"],
            &[],
            "`log_level` (from --log-level) is invalid",
            "oncely=debug,info",
        ),
        (
            &["--database", "mysql://u:hush@h/d"],
            &[],
            "`mysql://` is not a supported database",
            "postgres://",
        ),
        (
            &["--database", ":memory:"],
            &[],
            "it must name a file",
            "oncely.db",
        ),
        (
            &["--nats", "http://u:hush@x"],
            &[],
            "`http://` is not a supported scheme",
            "--nats nats://127.0.0.1:4222",
        ),
        (
            &["--nats-context", "nowhere"],
            &[("HOME", "/none")],
            "there is no NATS context `nowhere` at /none/.config/nats",
            "nats context ls",
        ),
        (
            &["--nats-creds", "/none/a.creds"],
            &[],
            "there is no file /none/a.creds",
            "--nats-creds host.creds",
        ),
        (
            &["--listen", "everywhere"],
            &[],
            "`everywhere` is not an address with a port",
            "--listen 127.0.0.1:7420",
        ),
        (
            &["--listen", "0.0.0.0:7420"],
            &[],
            "`0.0.0.0:7420` is reachable from other machines, but no token is set",
            "ONCELY_TOKEN=",
        ),
        (
            &["--token", "hush"],
            &[],
            "a token has at least 16 characters",
            "openssl rand -hex 32",
        ),
    ];
    for (arguments, env, what, hint) in cases {
        let error = resolve(arguments, env).unwrap_err();
        let (text, hints) = (error.to_string(), hints(&error).join("; "));
        assert!(
            text.contains(what) && hints.contains(hint),
            "{text}\n{hints}"
        );
        assert!(!text.contains("hush"), "{text}");
    }
}

#[test]
fn the_file_is_read_strictly_and_its_paths_are_relative_to_it() {
    let folder = file("\ndata_dir = \"data\"\ndatabase = \"sqlite:a.db\"");
    let path = folder.path().join("host.toml");
    let path_text = path.to_str().unwrap();
    let config = resolve(&["--config", path_text], &[]).unwrap();
    assert_eq!(config.data_dir, folder.path().join("data"));
    assert_eq!(
        config.database,
        Database::Sqlite(folder.path().join("a.db"))
    );

    std::fs::write(&path, "\ndatabse = \"a.db\"").unwrap();
    let error = resolve(&["--config", path_text], &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{path_text}:2: the configuration has no key `databse`")
    );
    assert_eq!(hints(&error), ["did you mean: database = \"a.db\""]);

    std::fs::write(&path, "drain = 5").unwrap();
    let error = resolve(&["--config", path_text], &[]).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with(&format!("`drain` (from {path_text}:1) is invalid")),
        "{error}"
    );

    let error = resolve(&["--config", "/none.toml"], &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no configuration file /none.toml (from --config)"
    );
}

#[test]
fn a_nats_context_gives_servers_and_login_and_flags_override_it() {
    let folder = tempfile::tempdir().unwrap();
    let context = folder.path().join("nats/context");
    std::fs::create_dir_all(&context).unwrap();
    let text = r#"{"url": "nats://a,nats://b", "creds": "~/x.creds", "ca": "/ca.pem", "cert": "/c", "key": "/k", "nsc": ""}"#;
    std::fs::write(context.join("prod.json"), text).unwrap();
    let env = [
        ("XDG_CONFIG_HOME", folder.path().to_str().unwrap()),
        ("HOME", "/me"),
        ("ONCELY_NATS_CONTEXT", "prod"),
    ];
    let nats = resolve(&[], &env).unwrap().nats;
    assert_eq!(nats.servers, ["nats://a", "nats://b"]);
    assert_eq!(nats.login, Login::Credentials("/me/x.creds".into()));
    assert_eq!(nats.root_certificate, Some("/ca.pem".into()));
    assert_eq!(nats.client_certificate, Some(("/c".into(), "/k".into())));
    assert_eq!(
        resolve(&["--nats", "c:4222"], &env).unwrap().nats.servers,
        ["c:4222"]
    );

    // A login in the context's URL is read again, too.
    let write = |password: &str| {
        let text = format!(r#"{{"url": "nats://ada:{password}@a"}}"#);
        std::fs::write(context.join("prod.json"), text).unwrap();
    };
    let password = |password: &str| Login::Password {
        user: "ada".into(),
        password: Secret::new(password),
    };
    write("one");
    let nats = resolve(&[], &env).unwrap().nats;
    assert_eq!(nats.current_login().unwrap(), password("one"));
    write("two");
    assert_eq!(nats.current_login().unwrap(), password("two"));
}

#[test]
fn a_database_url_names_one_address() {
    for several in [
        "postgres://u:p,w@a,b/db",
        "postgresql://a:5432,b:5433/db?target_session_attrs=read-write",
        "postgres:///db?host=a,b",
        "postgres:///db?sslmode=require&host=a%2Cb",
    ] {
        let error = resolve(&["--database", several], &[]).unwrap_err();
        assert!(
            format!("{error:#}").contains("names several PostgreSQL servers"),
            "{error:#}"
        );
        assert!(
            hints(&error)[0].contains("virtual address"),
            "{:?}",
            hints(&error)
        );
    }
    for one in [
        "postgres://u:p,w@a/db",
        "postgres://a/d,b?application_name=x,y",
        "postgres:///db?host=/run/a",
    ] {
        assert!(resolve(&["--database", one], &[]).is_ok(), "{one}");
    }
}

#[test]
fn a_login_in_the_url_is_used() {
    let login = |url: &str| resolve(&["--nats", url], &[]).unwrap().nats.login;
    let ada = Login::Password {
        user: "ada".into(),
        password: Secret::new("p@ss:word"),
    };
    assert_eq!(login("nats://ada:p%40ss%3Aword@127.0.0.1:4222"), ada);
    assert_eq!(login("nats://a,ada:p%40ss:word@b"), ada);
    assert_eq!(login("tls://t0ken@a"), Login::Token(Secret::new("t0ken")));
    assert_eq!(login("nats://a"), Login::None);
}

#[test]
fn a_public_listen_address_requires_a_token() {
    let config = resolve(
        &["--listen", "0.0.0.0:7420", "--token", "0123456789abcdef"],
        &[],
    )
    .unwrap();
    assert_eq!(
        config.load_or_create_token().unwrap().reveal(),
        "0123456789abcdef"
    );
    assert!(
        resolve(&["--listen", "localhost:80"], &[]).is_ok()
            && resolve(&["--listen", "[::1]:80"], &[]).is_ok()
    );
}

#[test]
fn a_token_is_generated_once_and_private_to_the_user() {
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().join("data");
    assert!(read_token(&data_dir).unwrap().is_none());
    let token = load_or_create_token(&data_dir).unwrap();
    assert_eq!(token.reveal().len(), 64);
    assert_eq!(load_or_create_token(&data_dir).unwrap(), token);
    assert_eq!(read_token(&data_dir).unwrap(), Some(token));
    let file = data_dir.join("token");
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(
        read_token(&data_dir)
            .unwrap_err()
            .to_string()
            .contains("other users can read")
    );
}

#[test]
fn hosts_that_start_together_agree_on_one_token() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = std::thread::scope(|scope| {
        let started: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| load_or_create_token(folder.path()).unwrap()))
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert!(tokens.iter().all(|token| *token == tokens[0]));
}

#[test]
fn webhook_urls_and_secrets_are_validated() {
    let webhook =
        |url: &str| resolve(&["--webhook", url], &[]).map(|config| config.webhook.unwrap());
    let target = webhook("https://alarms.example.com/a/b?c=d").unwrap();
    assert!(target.is_tls);
    assert_eq!(target.url(), "https://alarms.example.com/a/b?c=d");
    assert_eq!(target.redacted(), "https://alarms.example.com");
    let plain = webhook("http://[::1]:8080").unwrap();
    assert!(!plain.is_tls);
    assert_eq!(plain.url(), "http://[::1]:8080/");
    for wrong in [
        "alarms.example.com",
        "ftp://h/x",
        "https://",
        "https://user:hush@h/x",
        "not a url",
    ] {
        let error = webhook(wrong).unwrap_err();
        assert!(
            format!("{error:#}").contains("`webhook` (from --webhook) is invalid"),
            "{error:#}"
        );
        assert!(!format!("{error:#}").contains("hush"), "{error:#}");
    }
    for wrong in ["hush", "whsec_hush", "whsec_!"] {
        let error = resolve(&["--webhook-secret", wrong], &[]).unwrap_err();
        assert!(
            format!("{error:#}").contains("24 to 64 bytes")
                && !format!("{error:#}").contains("hush"),
            "{error:#}"
        );
    }
}

#[test]
fn cache_url_is_validated_and_its_password_is_never_shown() {
    let url =
        |url: &str| resolve(&["--cache-url", url], &[]).map(|config| config.cache.shared.unwrap());
    for right in [
        "redis://a",
        "redis://:hush@a:6379/3",
        "rediss://me:hush@a",
        "valkey://[::1]:6379",
    ] {
        let url = url(right).unwrap();
        assert_eq!(url.reveal(), right);
        assert!(
            !format!("{url:?} {}", url.redacted()).contains("hush"),
            "{url:?}"
        );
    }
    for wrong in [
        "a:6379",
        "http://hush@a",
        "redis://",
        "redis://me:hush@",
        "redis://:hush@a/x",
        "redis://a b",
    ] {
        let error = format!("{:#}", url(wrong).unwrap_err());
        assert!(
            error.contains("`cache_url` (from --cache-url) is invalid") && !error.contains("hush"),
            "{error}"
        );
    }
    let error = resolve(&["--cache-size", "much"], &[]).unwrap_err();
    assert!(
        format!("{error:#}").contains("`cache_size` (from --cache-size) is invalid"),
        "{error:#}"
    );
}

#[test]
fn secrets_are_never_shown() {
    let arguments = [
        "--database",
        "postgres://me:hush@h/d?password=hush",
        "--nats",
        "nats://me:hush@h,me:hush@i",
    ];
    let token = [
        "--token",
        "hush-hush-hush-hush",
        "--webhook",
        "https://h/hush?hush",
        "--webhook-secret",
    ];
    let secret = ["whsec_hushhushhushhushhushhushhushhush"];
    let config = resolve(&[&arguments[..], &token[..], &secret[..]].concat(), &[]).unwrap();
    assert!(!format!("{config:?}").contains("hush"), "{config:?}");
    assert_eq!(config.database.redacted(), "postgres://me@h/d");
    assert_eq!(config.nats.redacted(), "nats://me@h,nats://me@i");
}

#[test]
fn every_setting_is_in_the_reference_and_in_the_help() {
    let reference = include_str!("../../../docs/configuration.md");
    let command = HostFlags::augment_args(Command::new("run"));
    for key in SETTINGS.into_iter().chain(["config"]) {
        let flag = key.replace('_', "-");
        let variable = format!("ONCELY_{}", key.to_uppercase());
        let key = if key == "config" {
            "".to_owned()
        } else {
            format!("`{key}`")
        };
        let row = format!("| `--{flag}` | `{variable}` | {key}");
        assert!(
            reference.contains(&row),
            "docs/configuration.md has no row: {row}"
        );
        let argument = command
            .get_arguments()
            .find(|argument| argument.get_long() == Some(&flag));
        let help = argument
            .and_then(|argument| argument.get_help())
            .unwrap()
            .to_string();
        assert!(help.contains(&format!("[env: {variable}]")), "{help}");
    }
    assert_eq!(command.get_arguments().count(), SETTINGS.len() + 1);
}

#[test]
fn the_collector_of_traces_is_validated() {
    let traces =
        |flags: &[&str], env: &[(&str, &str)]| resolve(flags, env).map(|config| config.traces);
    let url = |flags: &[&str], env: &[(&str, &str)]| {
        let endpoint = traces(flags, env).unwrap().endpoint;
        endpoint.map(|endpoint| endpoint.url())
    };
    const STANDARD: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/");
    assert_eq!(
        url(&["--traces", "https://a.example.com/in/"], &[]).as_deref(),
        Some("https://a.example.com/in/v1/traces")
    );
    assert_eq!(
        url(&[], &[STANDARD]).as_deref(),
        Some("http://c:4318/v1/traces")
    );
    assert_eq!(
        url(&["--traces", "http://a"], &[STANDARD]).as_deref(),
        Some("http://a/v1/traces")
    );
    assert_eq!(url(&["--traces", "off"], &[STANDARD]), None);

    for (wrong, why) in [
        ("a:4318", "it begins neither with https:// nor with http://"),
        (
            "ftp://a",
            "it begins neither with https:// nor with http://",
        ),
        ("http://", "it is neither a URL nor `off`"),
        ("http://user:secret@a", "it contains a login or a query"),
        ("http://a/?token=secret", "it contains a login or a query"),
    ] {
        let error = traces(&["--traces", wrong], &[]).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("`traces` (from --traces) is invalid") && text.contains(why),
            "{wrong}: {text}"
        );
        assert!(!text.contains("secret"), "{text}");
    }
    let error = traces(&[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", "grpc")]).unwrap_err();
    assert!(format!("{error:#}").contains("(from OTEL_EXPORTER_OTLP_ENDPOINT)"));
}

#[test]
fn the_share_of_recorded_traces_is_validated() {
    let share = |share: &str| {
        resolve(&[], &[("ONCELY_TRACES_SAMPLING", share)])
            .map(|config| config.traces.sample_below())
    };
    assert_eq!(share("0").unwrap(), 0);
    assert_eq!(share("0.5").unwrap(), 1 << 62);
    assert_eq!(share("1").unwrap(), 1 << 63);
    for wrong in ["2", "-0.1", "NaN", "inf", "10%", "all"] {
        let error = share(wrong).unwrap_err();
        assert!(
            format!("{error:#}").contains("is not a number between 0 and 1"),
            "{error:#}"
        );
    }
    assert!(resolve(&["--traces-service", " "], &[]).is_err());
}

#[test]
fn the_login_with_a_provider_is_validated() {
    let with = |changes: &[(&str, &str)]| {
        let name = |(key, value): &(&str, &str)| {
            let key = format!("ONCELY_{}", key.to_uppercase());
            (key, (*value).to_owned())
        };
        let base = OIDC.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let all: Vec<_> = changes.iter().map(name).chain(base).collect();
        // The first of two counts, and an empty one is unset.
        let env = |name: &str| {
            all.iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.clone())
        };
        HostConfig::resolve(&HostFlags::default(), &env)
    };
    let config = with(&[
        ("oidc_client_secret", "env:ONCELY_HUSH"),
        ("hush", "hush"),
        ("oidc_roles", "cn=ops=operate , a b=deploy"),
    ]);
    let config = config.unwrap();
    let oidc = config.oidc.as_ref().unwrap();
    let roles = [
        ("cn=ops".to_owned(), Role::Operate),
        ("a b".to_owned(), Role::Deploy),
    ];
    assert_eq!(oidc.roles, roles);
    assert_eq!(oidc.client_secret, Some(Secret::new("hush")));
    assert!(!format!("{config:?}").contains("\"hush"), "{config:?}");
    assert_eq!(
        (oidc.issuer_short(), oidc.session.as_secs()),
        ("login.example.com", 28_800)
    );
    let url = config.console_url.unwrap();
    assert_eq!(
        (url.join("/x").as_str(), url.host.as_str()),
        ("https://oncely.example.com/x", "oncely.example.com")
    );
    assert!(with(&[("oidc_issuer", "http://127.0.0.1:8080/a")]).is_ok());

    for (changes, expected) in [
        (
            &[("oidc_client_id", "")][..],
            "`oidc_issuer` is set, but `oidc_client_id` is not",
        ),
        (
            &[("oidc_roles", "")],
            "`oidc_issuer` is set, but `oidc_roles` is not",
        ),
        (
            &[("console_url", "")],
            "`oidc_issuer` is set, but `console_url` is not",
        ),
        (
            &[("oidc_issuer", "")],
            "`oidc_client_id` (from ONCELY_OIDC_CLIENT_ID) is invalid: it has no effect",
        ),
        (
            &[("oidc_issuer", "http://login.example.com")],
            "`http://login.example.com` has no TLS",
        ),
        (
            &[("oidc_issuer", "login.example.com")],
            "`oidc_issuer` (from ONCELY_OIDC_ISSUER) is invalid",
        ),
        (&[("oidc_issuer", "https://a@b")], "it contains a login"),
        (
            &[("oidc_issuer", "https://a/b?c")],
            "it contains a login, a query",
        ),
        (
            &[("console_url", "http://oncely.example.com")],
            "has no TLS",
        ),
        (&[("console_url", "https://a/console")], "has a path"),
        (
            &[("oidc_roles", "ops=admin")],
            "`admin` is none of the roles",
        ),
        (&[("oidc_roles", "ops")], "`ops` is not value=role"),
        (&[("oidc_roles", "=view")], "`=view` is not value=role"),
        (
            &[("oidc_scopes", "profile")],
            "is not a list of scopes with `openid`",
        ),
        (
            &[("oidc_session", "2d")],
            "is not a duration between 5m and 24h",
        ),
        (
            &[("oidc_client_secret", "hush")],
            "it is neither env:NAME nor file:PATH",
        ),
        (
            &[("oidc_client_secret", "env:HUSH")],
            "the variable HUSH is not set",
        ),
        (&[("oidc_client_secret", "file:/no/such")], "read /no/such"),
    ] {
        let error = with(changes).unwrap_err();
        let shown = format!("{error:#}");
        assert!(
            shown.contains(expected) && !hints(&error).is_empty(),
            "{shown}"
        );
        assert!(!shown.contains("hush"), "{shown}");
    }
}
