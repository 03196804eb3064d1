//! A component that was checked and linked, ready to run.

use anyhow::{Context, Result, bail};
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, HasSelf, InstancePre, Linker};
use wasmtime_wasi_http::p2::bindings::exports::wasi::http::incoming_handler;

use super::bindings::AnyWorker;
use super::bindings::exports::oncely::worker::{batch_handler, handler};
use super::call::CallState;
use super::engine::GuestEngine;

/// What a component must export one of to be a worker.
const HANDLER: &str = "oncely:worker/handler@0.1.0";
const BATCH_HANDLER: &str = "oncely:worker/batch-handler@0.1.0";
/// Of any patch version.
const HTTP_HANDLER: &str = "wasi:http/incoming-handler@0.2.";

/// Interfaces a component may import: all of ours, and those of WASI that language runtimes ask for. Behind the
/// latter there is nothing but a clock, random numbers and the log.
const IMPORTABLE: [&str; 8] = [
    "oncely:worker/",
    "wasi:logging/",
    "wasi:config/",
    "wasi:cli/",
    "wasi:io/",
    "wasi:clocks/",
    "wasi:random/",
    "wasi:http/types@",
];

/// Also linked, but every call of it is denied.
const IMPORTABLE_BUT_EMPTY: [&str; 3] = ["wasi:filesystem/", "wasi:sockets/", "wasi:http/outgoing-handler@"];

/// A component ready to run; instances are made from it for each message. Cheap to clone.
#[derive(Clone)]
pub struct Guest {
    pub(super) engine: GuestEngine,
    pub(super) pre: InstancePre<CallState>,
    pub(super) entry: Entry,
    surface: Surface,
}

/// Where a component is called.
#[derive(Clone)]
pub(super) enum Entry {
    Handler(handler::GuestIndices),
    BatchHandler(batch_handler::GuestIndices),
    Http(incoming_handler::GuestIndices),
}

/// What a component exports and imports, for the plan of a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surface {
    pub exports: Vec<String>,
    pub imports: Vec<String>,
}

impl Guest {
    /// Compiles (or loads from disk), checks and links a component. Blocks for as long as compiling takes.
    pub fn load(engine: &GuestEngine, wasm: &[u8]) -> Result<Guest> {
        let component = engine.compile(wasm)?;
        let surface = surface(engine, &component);
        let handler = one_handler(&surface)?;
        check_imports(&surface)?;
        let pre =
            linker(engine)?.instantiate_pre(&component).map_err(anyhow::Error::from).context("link the component")?;
        let entry = match handler {
            BATCH_HANDLER => batch_handler::GuestIndices::new(&pre).map(Entry::BatchHandler),
            HTTP_HANDLER => incoming_handler::GuestIndices::new(&pre).map(Entry::Http),
            _ => handler::GuestIndices::new(&pre).map(Entry::Handler),
        };
        let entry = entry.map_err(anyhow::Error::from).with_context(|| format!("link the export `{handler}`"))?;
        Ok(Guest { engine: engine.clone(), pre, entry, surface })
    }

    /// Whether it handles the messages of a batch together.
    pub fn takes_batches(&self) -> bool {
        matches!(self.entry, Entry::BatchHandler(_))
    }

    /// Whether it answers requests over HTTP, and handles no messages.
    pub fn takes_requests(&self) -> bool {
        matches!(self.entry, Entry::Http(_))
    }

    pub fn surface(&self) -> &Surface {
        &self.surface
    }
}

fn surface(engine: &GuestEngine, component: &Component) -> Surface {
    let kind = component.component_type();
    let instances = |items: Vec<(String, ComponentItem)>| {
        let mut names: Vec<String> = items
            .into_iter()
            .filter(|(_, item)| !matches!(item, ComponentItem::Type(_)))
            .map(|(name, _)| name)
            .collect();
        names.sort();
        names
    };
    let engine = engine.engine();
    Surface {
        exports: instances(kind.exports(engine).map(|(name, item)| (name.to_owned(), item.ty)).collect()),
        imports: instances(kind.imports(engine).map(|(name, item)| (name.to_owned(), item.ty)).collect()),
    }
}

/// The one handler of a component, of a kind that this host can call.
fn one_handler(surface: &Surface) -> Result<&'static str> {
    let kinds = ["worker/handler", "worker/batch-handler", "wasi:http/incoming-handler"];
    let is_handler = |name: &&str| kinds.iter().any(|kind| name.contains(kind));
    let handlers: Vec<&str> = surface.exports.iter().map(String::as_str).filter(is_handler).collect();
    match handlers.as_slice() {
        [HANDLER] => Ok(HANDLER),
        [BATCH_HANDLER] => Ok(BATCH_HANDLER),
        [http] if http.starts_with(HTTP_HANDLER) => Ok(HTTP_HANDLER),
        [] => bail!(
            "the component exports no handler: it must export `{HANDLER}`, `{BATCH_HANDLER}` or `{HTTP_HANDLER}x`, and it \
             exports {}",
            list(&surface.exports)
        ),
        [other] => bail!(
            "the component exports `{other}`, and this host runs `{HANDLER}`, `{BATCH_HANDLER}` and `{HTTP_HANDLER}x`"
        ),
        several => {
            bail!("the component exports {} handlers ({}); it must export one", several.len(), several.join(", "))
        }
    }
}

fn check_imports(surface: &Surface) -> Result<()> {
    let known = |name: &str| IMPORTABLE.iter().chain(&IMPORTABLE_BUT_EMPTY).any(|prefix| name.starts_with(prefix));
    let unknown: Vec<String> = surface.imports.iter().filter(|name| !known(name)).cloned().collect();
    if !unknown.is_empty() {
        bail!("the component imports {}, which a worker is not given", list(&unknown));
    }
    Ok(())
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "nothing".to_owned();
    }
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn linker(engine: &GuestEngine) -> Result<Linker<CallState>> {
    let mut linker = Linker::new(engine.engine());
    AnyWorker::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)
        .and_then(|()| wasmtime_wasi::p2::add_to_linker_async(&mut linker))
        .and_then(|()| wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker))
        .and_then(|()| super::wasi::add_to_linker(&mut linker))
        .map_err(anyhow::Error::from)
        .context("link the imports")?;
    Ok(linker)
}
