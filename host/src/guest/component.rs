//! A checked and linked component, ready to run.

use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use wasmtime::Engine;
use wasmtime::component::{Component, HasSelf, InstancePre, Linker};
use wasmtime_wasi_http::p2::bindings::exports::wasi::http::incoming_handler;
use wasmtime_wasi_http::p3::bindings::exports::wasi::http::handler as async_http;

use super::bindings::AnyWorker;
use super::bindings::async_worker::exports::oncely::worker::async_handler;
use super::bindings::exports::oncely::worker::{batch_handler, handler};
use super::bindings::nats::exports::wasmcloud::nats::jetstream_handler;
use super::bindings::others;
use super::bindings::others::exports::wasmcloud::messaging::handler as messaging_handler;
use super::engine::{GuestEngine, blocking};
use super::state::CallState;
use crate::component::{self, Handler, Surface};

/// A component that is ready to run. Each message gets an instance of it. Cheap to clone.
#[derive(Clone)]
pub struct Guest(pub(super) Arc<LinkedComponent>);

/// A linked component, shared by all workers that run it.
pub(super) struct LinkedComponent {
    pub pre: InstancePre<CallState>,
    pub entry: Entry,
    handler: Handler,
    surface: Surface,
}

/// The export that a call enters.
#[derive(Clone)]
pub(super) enum Entry {
    Handler(handler::GuestIndices),
    BatchHandler(batch_handler::GuestIndices),
    Messaging(messaging_handler::GuestIndices),
    Http(incoming_handler::GuestIndices),
    AsyncHandler(async_handler::GuestIndices),
    Nats(jetstream_handler::GuestIndices),
    AsyncHttp(async_http::GuestIndices),
}

impl Guest {
    /// Checks a component, compiles it or loads its machine code from disk, and links it. Dropping
    /// the future stops the compiler.
    ///
    /// # Errors
    /// The component is invalid, exceeds the limits of the compiler, or imports something that the
    /// host does not have.
    pub async fn load(engine: &GuestEngine, wasm: Bytes) -> Result<Guest> {
        let inspected = wasm.clone();
        let surface = blocking(move || component::inspect(&inspected)).await?;
        let component = engine.component(&wasm).await?;
        blocking(move || Guest::link(&component, surface)).await
    }

    fn link(component: &Component, surface: Surface) -> Result<Guest> {
        let pre = linker(component.engine())?
            .instantiate_pre(component)
            .map_err(anyhow::Error::from)
            .context("link the component")?;
        let handler = surface.handler()?;
        let entry = match handler {
            Handler::Message => handler::GuestIndices::new(&pre).map(Entry::Handler),
            Handler::AsyncMessage => {
                async_handler::GuestIndices::new(&pre).map(Entry::AsyncHandler)
            }
            Handler::Nats => jetstream_handler::GuestIndices::new(&pre).map(Entry::Nats),
            Handler::AsyncHttp => async_http::GuestIndices::new(&pre).map(Entry::AsyncHttp),
            Handler::Batch => batch_handler::GuestIndices::new(&pre).map(Entry::BatchHandler),
            Handler::Messaging => messaging_handler::GuestIndices::new(&pre).map(Entry::Messaging),
            Handler::Http => incoming_handler::GuestIndices::new(&pre).map(Entry::Http),
        };
        let entry = entry
            .map_err(anyhow::Error::from)
            .context("link the handler")?;
        Ok(Guest(Arc::new(LinkedComponent {
            pre,
            entry,
            handler,
            surface,
        })))
    }

    /// Whether the component handles the messages of a batch in one call.
    pub fn is_batch_handler(&self) -> bool {
        self.0.handler == Handler::Batch
    }

    /// The kind of handler that the component exports.
    pub fn handler(&self) -> Handler {
        self.0.handler
    }

    /// Imports and exports of the component.
    pub fn surface(&self) -> &Surface {
        &self.0.surface
    }
}

fn linker(engine: &Engine) -> Result<Linker<CallState>> {
    let mut linker = Linker::new(engine);
    AnyWorker::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)
        .and_then(|()| others::Others::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state))
        .and_then(|()| wasmtime_wasi::p2::add_to_linker_async(&mut linker))
        .and_then(|()| wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker))
        .and_then(|()| super::wasi::add_to_linker(&mut linker))
        .and_then(|()| match engine.get_concurrency_support() {
            true => super::wasi3::add_to_linker(&mut linker),
            false => Ok(()),
        })
        .map_err(anyhow::Error::from)
        .context("link the imports")?;
    Ok(linker)
}
