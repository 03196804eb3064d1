//! `[worker.config]` of the manifest, under the three names by which components import it.

use super::super::bindings::others::wasi::config0_2_0_draft::runtime;
use super::super::bindings::others::wasi::config0_2_0_draft_2024_09_27::store as draft;
use super::super::bindings::wasi::config::store;
use crate::guest::state::CallState;

macro_rules! config {
    ($interface:ident, $error:ident) => {
        impl $interface::Host for CallState {
            async fn get(
                &mut self,
                key: String,
            ) -> wasmtime::Result<Result<Option<String>, $interface::$error>> {
                Ok(Ok(self.call.config.get(&key).map(str::to_owned)))
            }

            async fn get_all(
                &mut self,
            ) -> wasmtime::Result<Result<Vec<(String, String)>, $interface::$error>> {
                let config = self.call.config.iter();
                Ok(Ok(config
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .collect()))
            }
        }
    };
}

config!(store, Error);
config!(draft, Error);
config!(runtime, ConfigError);
