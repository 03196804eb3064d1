//! The little of WASI that the guests use, imported directly: `std` has none of it on `wasm32-unknown-unknown`.

pub use bindings::wasi::clocks::monotonic_clock;
pub use bindings::wasi::random::random;

#[allow(unsafe_code, missing_docs, clippy::all, reason = "generated code answers to its generator")]
mod bindings {
    wit_bindgen::generate!({
        inline: "
            package oncely:tests;
            world guest {
                import wasi:clocks/monotonic-clock@0.2.0;
                import wasi:random/random@0.2.0;
            }
            package wasi:clocks@0.2.0 {
                interface monotonic-clock {
                    use wasi:io/poll@0.2.0.{pollable};
                    type instant = u64;
                    type duration = u64;
                    now: func() -> instant;
                    subscribe-duration: func(when: duration) -> pollable;
                }
            }
            package wasi:io@0.2.0 {
                interface poll {
                    resource pollable {
                        block: func();
                    }
                }
            }
            package wasi:random@0.2.0 {
                interface random {
                    get-random-u64: func() -> u64;
                }
            }
        ",
        generate_all,
    });
}
