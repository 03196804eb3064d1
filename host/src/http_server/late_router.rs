//! A router that is set while its listener already serves another one.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;

/// Serves one router until another one is set. Cheap to clone.
#[derive(Clone)]
pub struct LateRouter {
    before: Router,
    after: Arc<OnceLock<Router>>,
}

impl LateRouter {
    /// Starts with `before`.
    pub fn new(before: Router) -> Self {
        LateRouter {
            before,
            after: Arc::default(),
        }
    }

    /// The router to serve from the beginning.
    pub fn router(&self) -> Router {
        Router::new().fallback(forward).with_state(self.clone())
    }

    /// Serves `router` from now on. The first call counts.
    pub fn set(&self, router: Router) {
        let _ = self.after.set(router);
    }
}

async fn forward(State(late): State<LateRouter>, request: Request) -> Response {
    let router = late.after.get().unwrap_or(&late.before).clone();
    match TowerToHyperService::new(router).call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
