//! Maps paths to the workers that answer them.

use std::sync::Arc;

use anyhow::{Result, anyhow};

use super::HttpWorker;
use super::problem::Problem;
use crate::config::manifest::{Route, Worker};
use crate::model::hint::WithHint as _;

/// The workers of a path, each with its route.
type RouteEntries<W> = Vec<(Arc<W>, Arc<Route>)>;

/// The worker and the route of a request.
///
/// `params` are the named parts of the path. They are filled in for cached routes only, whose tags
/// use them.
pub(super) struct MatchedRoute<W = HttpWorker> {
    pub worker: Arc<W>,
    pub route: Arc<Route>,
    pub params: Vec<(String, String)>,
}

/// The routes of all HTTP workers that run here.
pub struct RouteTable<W = HttpWorker> {
    paths: matchit::Router<RouteEntries<W>>,
}

impl<W> Default for RouteTable<W> {
    fn default() -> Self {
        RouteTable {
            paths: matchit::Router::new(),
        }
    }
}

impl RouteTable {
    /// The routes of these workers. Routes that conflict with those of another worker are left out
    /// and logged.
    pub fn new(workers: impl IntoIterator<Item = Arc<HttpWorker>>) -> RouteTable {
        RouteTable::of(workers.into_iter().map(|worker| {
            let routes = worker.delivery.worker.routes.clone();
            (worker, routes)
        }))
    }
}

impl<W> RouteTable<W> {
    /// The table of workers with their routes.
    pub(super) fn of(workers: impl IntoIterator<Item = (Arc<W>, Vec<Route>)>) -> RouteTable<W> {
        let mut by_path: Vec<(String, RouteEntries<W>)> = Vec::new();
        for (worker, routes) in workers {
            for route in routes {
                let entry = (Arc::clone(&worker), Arc::new(route.clone()));
                match by_path.iter_mut().find(|(path, _)| *path == route.path) {
                    Some((_, entries)) => entries.push(entry),
                    None => by_path.push((route.path, vec![entry])),
                }
            }
        }
        let mut paths = matchit::Router::new();
        // A wildcard may match nothing: `/a/{*rest}` answers `/a/` too, unless that is a route of
        // its own.
        let rests: Vec<(String, RouteEntries<W>)> = by_path
            .iter()
            .filter_map(|(path, entries)| Some((split_rest(path)?.0.to_owned(), entries.clone())))
            .collect();
        let own: Vec<String> = by_path.iter().map(|(path, _)| path.clone()).collect();
        for (path, entries) in by_path {
            if let Err(error) = paths.insert(&path, entries) {
                tracing::error!(route = path, error = %error, "route not served");
            }
        }
        for (path, entries) in rests.into_iter().filter(|(path, _)| !own.contains(path)) {
            let _ = paths.insert(path, entries);
        }
        RouteTable { paths }
    }

    /// The route of a request.
    ///
    /// # Errors
    /// 404 for an unknown path, 405 for a method that the path does not allow.
    pub(super) fn find(
        &self,
        method: &str,
        path: &str,
    ) -> std::result::Result<MatchedRoute<W>, Problem> {
        let Ok(found) = self.paths.at(path) else {
            return Err(Problem::not_found());
        };
        let taking = |method: &str| {
            found
                .value
                .iter()
                .find(|(_, route)| route.accepts_method(method))
        };
        let or_get = || {
            if method == "HEAD" {
                taking("GET")
            } else {
                None
            }
        };
        let (worker, route) = taking(method).or_else(or_get).ok_or_else(|| {
            let allowed: Vec<String> = found
                .value
                .iter()
                .flat_map(|(_, route)| route.allowed_methods())
                .collect();
            Problem::method_not_allowed(&allowed)
        })?;
        let tagged = route.cache.as_ref().map(|_| found.params.iter());
        let mut params: Vec<(String, String)> = tagged
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        if let Some((_, rest)) = split_rest(&route.path)
            && !params.iter().any(|(name, _)| name == rest)
        {
            params.push((rest.to_owned(), String::new()));
        }
        Ok(MatchedRoute {
            worker: Arc::clone(worker),
            route: Arc::clone(route),
            params,
        })
    }
}

/// Splits a trailing wildcard off a path: `/a/` and `rest` for `/a/{*rest}`.
fn split_rest(path: &str) -> Option<(&str, &str)> {
    path.strip_suffix('}')?.rsplit_once("{*")
}

/// Checks that the routes of a worker overlap with those of no other worker.
///
/// # Errors
/// The first pair of routes that could match the same request.
pub fn check_routes<'w>(worker: &Worker, others: impl Iterator<Item = &'w Worker>) -> Result<()> {
    for other in others.filter(|other| other.name != worker.name) {
        for route in &worker.routes {
            for theirs in &other.routes {
                let both = |method: &String| theirs.accepts_method(method);
                let meets = route.methods.is_empty()
                    || theirs.methods.is_empty()
                    || route.methods.iter().any(both);
                let is_same = theirs.path == route.path && meets;
                let conflicts = theirs.path != route.path && {
                    let mut paths = matchit::Router::new();
                    paths.insert(theirs.path.as_str(), ()).is_ok()
                        && paths.insert(route.path.as_str(), ()).is_err()
                };
                if is_same || conflicts {
                    let (name, path) = (&other.name, &theirs.path);
                    return Err(anyhow!(
                        "the route `{}` and the route `{path}` of worker {name} overlap",
                        route.path
                    ))
                    .hint("change the path or the `methods` of one of them");
                }
            }
        }
    }
    Ok(())
}
