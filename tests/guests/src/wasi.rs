//! The little of WASI that the guests use, imported directly: `std` has none of it on `wasm32-unknown-unknown`. The
//! interfaces are whole, because on `wasm32-wasip2` they have to agree with those that `std` brings.

pub use bindings::wasi::clocks::{monotonic_clock, wall_clock};
pub use bindings::wasi::random::{insecure_seed, random};

#[allow(unsafe_code, missing_docs, clippy::all, reason = "generated code answers to its generator")]
mod bindings {
    wit_bindgen::generate!({
        inline: "
            package oncely:tests;
            world guest {
                import wasi:clocks/monotonic-clock@0.2.0;
                import wasi:clocks/wall-clock@0.2.0;
                import wasi:random/insecure-seed@0.2.0;
                import wasi:random/random@0.2.0;
            }
            package wasi:clocks@0.2.0 {
                interface monotonic-clock {
                    use wasi:io/poll@0.2.0.{pollable};
                    type instant = u64;
                    type duration = u64;
                    now: func() -> instant;
                    resolution: func() -> duration;
                    subscribe-instant: func(when: instant) -> pollable;
                    subscribe-duration: func(when: duration) -> pollable;
                }
                interface wall-clock {
                    record datetime {
                        seconds: u64,
                        nanoseconds: u32,
                    }
                    now: func() -> datetime;
                    resolution: func() -> datetime;
                }
            }
            package wasi:io@0.2.0 {
                interface poll {
                    resource pollable {
                        ready: func() -> bool;
                        block: func();
                    }
                    poll: func(in: list<borrow<pollable>>) -> list<u32>;
                }
            }
            package wasi:random@0.2.0 {
                interface insecure-seed {
                    insecure-seed: func() -> tuple<u64, u64>;
                }
                interface random {
                    get-random-bytes: func(len: u64) -> list<u8>;
                    get-random-u64: func() -> u64;
                }
            }
        ",
        generate_all,
    });
}
