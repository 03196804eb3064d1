//! The Rust side of `wit/worker.wit`, generated in this one place.

wasmtime::component::bindgen!({
    path: "../wit",
    world: "worker",
    imports: { default: async | trappable },
    exports: { default: async },
});
