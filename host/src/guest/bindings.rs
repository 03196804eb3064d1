//! Rust bindings of `wit/worker.wit`, generated once for the whole host.

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
