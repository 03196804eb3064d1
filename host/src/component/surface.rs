//! The exports and imports of a component, and the check that a host can run it with them.

use anyhow::{Result, anyhow, bail};
use wasmparser::{ComponentExternalKind, Parser, Payload};

use super::{file_format, list, quoted};
use crate::model::hint::WithHint;

/// A worker's component exports one of these.
const HANDLER: &str = "oncely:worker/handler@0.1.0";
const ASYNC_HANDLER: &str = "oncely:worker/async-handler@0.1.0";
const BATCH_HANDLER: &str = "oncely:worker/batch-handler@0.1.0";
const NATS_HANDLER: &str = "wasmcloud:nats/jetstream-handler@0.1.";
const MESSAGING_HANDLER: &str = "wasmcloud:messaging/handler@0.2.0";
/// Any patch version.
const HTTP_HANDLER: &str = "wasi:http/incoming-handler@0.2.";
const ASYNC_HTTP_HANDLER: &str = "wasi:http/handler@0.3.";

/// All handlers that hosts run, for a sentence.
fn known_handlers(last: &str) -> String {
    format!(
        "`{HANDLER}`, `{ASYNC_HANDLER}`, `{BATCH_HANDLER}`, `{MESSAGING_HANDLER}`, \
         `{NATS_HANDLER}x`, `{HTTP_HANDLER}x` {last} `{ASYNC_HTTP_HANDLER}x`"
    )
}

/// A package of interfaces that a component may import.
struct Package {
    name: &'static str,
    /// The full version of an unstable package, or the prefix of a stable one, of which any patch
    /// version fits.
    version: &'static str,
    interfaces: &'static [&'static str],
}

/// Everything that a component may import: Oncely's interfaces, and the parts of WASI that language
/// runtimes need. WASI provides only a clock, random numbers and the log; every call to files,
/// sockets or other servers is denied.
const IMPORTABLE: [Package; 22] = [
    Package {
        name: "oncely:worker",
        version: "0.1.",
        interfaces: &["types", "invocation", "outbox", "state", "sql", "cache"],
    },
    Package {
        name: "wasi:logging",
        version: "0.1.0-draft",
        interfaces: &["logging"],
    },
    Package {
        name: "wasi:config",
        version: "0.2.0-rc.1",
        interfaces: &["store"],
    },
    Package {
        name: "wasi:config",
        version: "0.2.0-draft-2024-09-27",
        interfaces: &["store"],
    },
    Package {
        name: "wasi:config",
        version: "0.2.0-draft",
        interfaces: &["runtime"],
    },
    Package {
        name: "wasi:keyvalue",
        version: "0.2.0-draft",
        interfaces: &["store", "atomics", "batch"],
    },
    Package {
        name: "wasi:keyvalue",
        version: "0.2.0-draft2",
        interfaces: &["store", "atomics", "batch"],
    },
    Package {
        name: "wasmcloud:messaging",
        version: "0.2.",
        interfaces: &["types", "consumer"],
    },
    Package {
        name: "wasi:cli",
        version: "0.2.",
        interfaces: &[
            "environment",
            "exit",
            "stdin",
            "stdout",
            "stderr",
            "terminal-input",
            "terminal-output",
            "terminal-stdin",
            "terminal-stdout",
            "terminal-stderr",
        ],
    },
    Package {
        name: "wasi:io",
        version: "0.2.",
        interfaces: &["error", "poll", "streams"],
    },
    Package {
        name: "wasi:clocks",
        version: "0.2.",
        interfaces: &["wall-clock", "monotonic-clock"],
    },
    Package {
        name: "wasi:random",
        version: "0.2.",
        interfaces: &["random", "insecure", "insecure-seed"],
    },
    Package {
        name: "wasi:http",
        version: "0.2.",
        interfaces: &["types", "outgoing-handler"],
    },
    Package {
        name: "wasi:filesystem",
        version: "0.2.",
        interfaces: &["types", "preopens"],
    },
    Package {
        name: "wasi:sockets",
        version: "0.2.",
        interfaces: &[
            "network",
            "instance-network",
            "ip-name-lookup",
            "tcp",
            "tcp-create-socket",
            "udp",
            "udp-create-socket",
        ],
    },
    Package {
        name: "wasmcloud:nats",
        version: "0.1.",
        interfaces: &["types", "core", "jetstream", "kv"],
    },
    Package {
        name: "wasi:cli",
        version: "0.3.",
        interfaces: &[
            "types",
            "environment",
            "exit",
            "stdin",
            "stdout",
            "stderr",
            "terminal-input",
            "terminal-output",
            "terminal-stdin",
            "terminal-stdout",
            "terminal-stderr",
        ],
    },
    Package {
        name: "wasi:clocks",
        version: "0.3.",
        interfaces: &["types", "system-clock", "monotonic-clock"],
    },
    Package {
        name: "wasi:random",
        version: "0.3.",
        interfaces: &["random", "insecure", "insecure-seed"],
    },
    Package {
        name: "wasi:http",
        version: "0.3.",
        interfaces: &["types", "client"],
    },
    Package {
        name: "wasi:filesystem",
        version: "0.3.",
        interfaces: &["types", "preopens"],
    },
    Package {
        name: "wasi:sockets",
        version: "0.3.",
        interfaces: &["types", "ip-name-lookup"],
    },
];

/// The handler of a component: the kind of worker it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// Called with one message at a time.
    Message,
    /// Called with one message at a time; may wait for several things at once.
    AsyncMessage,
    /// Called with the messages of a batch together.
    Batch,
    /// Called with one message at a time, as wasmCloud does.
    Messaging,
    /// Called with one message at a time, as wasmCloud does for NATS.
    Nats,
    /// Answers requests over HTTP, and handles no messages.
    Http,
    /// Answers requests over HTTP as WASI 0.3 defines it.
    AsyncHttp,
}

impl Handler {
    /// Whether it answers requests, and handles no messages.
    pub fn is_http(self) -> bool {
        matches!(self, Handler::Http | Handler::AsyncHttp)
    }
}

/// The exports and imports of a component, without types, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surface {
    pub exports: Vec<String>,
    pub imports: Vec<String>,
}

impl Surface {
    /// Parses the outermost imports and exports of a component.
    pub(super) fn parse(wasm: &[u8]) -> Result<Surface> {
        let mut surface = Surface {
            exports: Vec::new(),
            imports: Vec::new(),
        };
        let damaged = |error| file_format::damaged(&error);
        let mut depth = 0_usize;
        for payload in Parser::new(0).parse_all(wasm) {
            match payload.map_err(damaged)? {
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
                Payload::End(_) => depth = depth.saturating_sub(1),
                Payload::ComponentImportSection(section) if depth == 0 => {
                    for import in section {
                        let import = import.map_err(damaged)?;
                        if import.ty.kind() != ComponentExternalKind::Type {
                            surface.imports.push(import.name.name.to_owned());
                        }
                    }
                }
                Payload::ComponentExportSection(section) if depth == 0 => {
                    for export in section {
                        let export = export.map_err(damaged)?;
                        if export.kind != ComponentExternalKind::Type {
                            surface.exports.push(export.name.name.to_owned());
                        }
                    }
                }
                _ => {}
            }
        }
        surface.exports.sort();
        surface.imports.sort();
        Ok(surface)
    }

    /// Refuses a component that a host cannot run.
    pub(super) fn check(&self) -> Result<()> {
        self.check_wasi()?;
        self.handler()?;
        self.check_imports()
    }

    /// The only handler of the component, of a kind that hosts can call.
    pub fn handler(&self) -> Result<Handler> {
        let kinds = [
            "worker/handler",
            "worker/async-handler",
            "worker/batch-handler",
            "wasmcloud:messaging/handler",
            "wasmcloud:nats/jetstream-handler",
            "wasi:http/incoming-handler",
            "wasi:http/handler",
        ];
        let is_handler = |name: &&str| kinds.iter().any(|kind| name.contains(kind));
        let handlers: Vec<&str> = self
            .exports
            .iter()
            .map(String::as_str)
            .filter(is_handler)
            .collect();
        match handlers.as_slice() {
            [HANDLER] => Ok(Handler::Message),
            [ASYNC_HANDLER] => Ok(Handler::AsyncMessage),
            [BATCH_HANDLER] => Ok(Handler::Batch),
            [MESSAGING_HANDLER] => Ok(Handler::Messaging),
            [nats] if nats.starts_with(NATS_HANDLER) => Ok(Handler::Nats),
            [http] if http.starts_with(HTTP_HANDLER) => Ok(Handler::Http),
            [http] if http.starts_with(ASYNC_HTTP_HANDLER) => Ok(Handler::AsyncHttp),
            [] => Err(self.missing_handler()),
            [other] => Err(anyhow!(
                "the component exports {}, but hosts run {}",
                quoted(other),
                known_handlers("and")
            )
            .hint("build it with this version's interfaces from wit/worker.wit")),
            several => {
                let several: Vec<String> = several.iter().copied().map(str::to_owned).collect();
                bail!(
                    "the component exports {} handlers ({}); it must export exactly one",
                    several.len(),
                    list(&several)
                )
            }
        }
    }

    fn missing_handler(&self) -> anyhow::Error {
        let hint = if self
            .exports
            .iter()
            .any(|name| name.starts_with("wasi:cli/run@"))
        {
            "it is a program with a `main`: export a handler from a library, see docs/handlers.md"
        } else if self.exports.is_empty() {
            "it may contain interfaces without code: use the component built from it"
        } else {
            "export one, see docs/handlers.md"
        };
        anyhow!(
            "the component exports no handler: it must export {}, and it exports {}",
            known_handlers("or"),
            list(&self.exports)
        )
        .hint(hint)
    }

    /// Refuses a component built for a release candidate of WASI 0.3, with an error that says so.
    fn check_wasi(&self) -> Result<()> {
        let is_candidate = |name: &&String| name.starts_with("wasi:") && name.contains("@0.3.0-rc");
        let imported = self.imports.iter().find(is_candidate);
        let exported = self.exports.iter().find(is_candidate);
        let clause = match (imported, exported) {
            (Some(name), _) => format!("it imports {}", quoted(name)),
            (_, Some(name)) => format!("it exports {}", quoted(name)),
            _ => return Ok(()),
        };
        Err(anyhow!(
            "the component is built for a release candidate of WASI 0.3, but hosts run WASI 0.3.0: \
             {clause}"
        )
        .hint("build it with a later version of its SDK, or for WASI 0.2"))
    }

    fn check_imports(&self) -> Result<()> {
        let refused: Vec<String> = self
            .imports
            .iter()
            .filter(|name| !is_importable(name))
            .cloned()
            .collect();
        let Some(first) = refused.first() else {
            return Ok(());
        };
        let provided: Vec<String> = packages_of(first).map(Package::describe).collect();
        let hint = match provided.is_empty() {
            false if first.contains('@') => format!("hosts provide {}", provided.join("; ")),
            _ => "a worker may import oncely:worker, wasi:logging, wasi:config, wasi:keyvalue, \
                  wasmcloud:messaging and WASI; build other imports into it, for example with \
                  `wac plug`"
                .to_owned(),
        };
        Err(anyhow!(
            "the component imports {}, which hosts do not provide",
            list(&refused)
        ))
        .hint(hint)
    }
}

/// Whether hosts provide an import, such as `wasi:io/poll@0.2.3`.
fn is_importable(import: &str) -> bool {
    let parts = import
        .split_once('/')
        .and_then(|(_, rest)| rest.split_once('@'));
    parts.is_some_and(|(interface, version)| {
        packages_of(import)
            .any(|package| package.has_version(version) && package.interfaces.contains(&interface))
    })
}

/// The versions of the package of an import that hosts provide.
fn packages_of(import: &str) -> impl Iterator<Item = &'static Package> {
    let name = import.split_once('/').map(|(name, _)| name.to_owned());
    let is_named = move |package: &&Package| Some(package.name) == name.as_deref();
    IMPORTABLE.iter().filter(is_named)
}

impl Package {
    fn has_version(&self, version: &str) -> bool {
        match version.strip_prefix(self.version) {
            Some("") => true,
            Some(patch) => {
                self.version.ends_with('.') && patch.bytes().all(|byte| byte.is_ascii_digit())
            }
            None => false,
        }
    }

    /// The package with its version and its interfaces, for a person.
    fn describe(&self) -> String {
        let version = self.version.trim_end_matches('.');
        format!("{} {version} ({})", self.name, self.interfaces.join(", "))
    }
}
