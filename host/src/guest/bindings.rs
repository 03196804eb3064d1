//! Rust bindings of `wit/worker.wit` and of other hosts' interfaces, generated once for the whole
//! host.

wasmtime::component::bindgen!({
    path: "../wit",
    inline: "
        package oncely:host;

        world any-worker {
            include oncely:worker/imports@0.1.0;
            export oncely:worker/handler@0.1.0;
            export oncely:worker/batch-handler@0.1.0;
        }
    ",
    imports: { default: async | trappable },
    exports: { default: async },
});

/// The interfaces of `host/wit/others.wit`.
pub mod others {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "oncely:others/others",
        imports: { default: async | trappable },
        exports: { default: async },
        with: {
            "wasi:keyvalue/store@0.2.0-draft.bucket": crate::guest::bucket::Bucket,
            "wasi:keyvalue/store@0.2.0-draft2.bucket": crate::guest::bucket::Bucket,
            "wasi:keyvalue/atomics@0.2.0-draft2.cas": crate::guest::bucket::Cas,
        },
    });
}

/// The async handler, which is called in a store with async functions.
pub mod async_worker {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "
            package oncely:host;

            world async-worker {
                export oncely:worker/async-handler@0.1.0;
            }
        ",
        exports: { default: async | store },
        with: {
            "oncely:worker/types@0.1.0": super::oncely::worker::types,
        },
    });
}

/// The interfaces of wasmCloud for NATS, whose functions are async.
pub mod nats {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "oncely:others/nats",
        imports: { default: async | trappable },
        exports: { default: async | store },
        with: {
            "wasmcloud:nats/jetstream@0.1.0.message-handle": crate::guest::bucket::MessageHandle,
            "wasmcloud:nats/jetstream@0.1.0.pull-consumer": crate::guest::bucket::PullConsumer,
            "wasmcloud:nats/kv@0.1.0.bucket": crate::guest::bucket::Bucket,
        },
    });
}
