//! The OpenAPI 3.1 document of the control API.
//!
//! It is made of the table of requests and of the types of their handlers: a handler is in the
//! document as it is in the code, or the host does not compile.

use std::future::Future;
use std::sync::{Arc, OnceLock};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use schemars::generate::SchemaSettings;
use schemars::transform::transform_subschemas;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::access::Caller;
use super::endpoints::{self, Endpoint};
use super::{ApiError, ErrorResponse};
use crate::runtime::Host;

/// Parameters, body and response of a request.
#[derive(Default)]
pub struct Contents {
    /// The schema of the one parameter in the path.
    path: Option<Schema>,
    /// The schema of the query, an object.
    query: Option<Schema>,
    /// The kind of the body and its schema.
    body: Option<(&'static str, Schema)>,
    /// The kind of the response and its schema.
    response: Option<(&'static str, Schema)>,
}

const JSON: &str = "application/json";
const BYTES: &str = "application/octet-stream";

/// A handler with known contents. `T` are its parameters as axum sees them: a marker, then one type
/// for each.
pub trait Described<T> {
    /// Adds the schemas of its types, and returns those of its contents.
    fn contents(schemas: &mut SchemaGenerator) -> Contents;
}

/// A parameter of a handler.
pub trait Input {
    /// Adds its part of the request. Most parameters have none.
    fn add(_contents: &mut Contents, _schemas: &mut SchemaGenerator) {}
}

/// The result of a handler.
pub trait Output {
    /// The kind of a successful response and its schema.
    fn response(schemas: &mut SchemaGenerator) -> (&'static str, Schema);
}

macro_rules! described {
    ($($input:ident),+) => {
        impl<F, Fut, Out, M, $($input),+> Described<(M, $($input),+,)> for F
        where
            F: FnOnce($($input),+) -> Fut,
            Fut: Future<Output = Out>,
            Out: Output,
            $($input: Input),+
        {
            fn contents(schemas: &mut SchemaGenerator) -> Contents {
                let mut contents = Contents::default();
                $($input::add(&mut contents, schemas);)+
                contents.response = Some(Out::response(schemas));
                contents
            }
        }
    };
}

described!(A);
described!(A, B);
described!(A, B, C);
described!(A, B, C, D);

impl Input for State<Arc<Host>> {}

impl Input for Caller {}

impl<T: JsonSchema> Input for Path<T> {
    fn add(contents: &mut Contents, schemas: &mut SchemaGenerator) {
        contents.path = Some(schemas.subschema_for::<T>());
    }
}

impl<T: JsonSchema> Input for Query<T> {
    fn add(contents: &mut Contents, schemas: &mut SchemaGenerator) {
        // Its properties become parameters, so it is no schema of its own.
        contents.query = Some(T::json_schema(schemas));
    }
}

impl<T: JsonSchema> Input for Json<T> {
    fn add(contents: &mut Contents, schemas: &mut SchemaGenerator) {
        contents.body = Some((JSON, schemas.subschema_for::<T>()));
    }
}

impl Input for Bytes {
    fn add(contents: &mut Contents, _schemas: &mut SchemaGenerator) {
        contents.body = Some((BYTES, Schema::default()));
    }
}

impl<T: JsonSchema> Output for Json<T> {
    fn response(schemas: &mut SchemaGenerator) -> (&'static str, Schema) {
        (JSON, schemas.subschema_for::<T>())
    }
}

impl<T: JsonSchema> Output for Result<Json<T>, ApiError> {
    fn response(schemas: &mut SchemaGenerator) -> (&'static str, Schema) {
        Json::<T>::response(schemas)
    }
}

impl Output for Result<Vec<u8>, ApiError> {
    fn response(_schemas: &mut SchemaGenerator) -> (&'static str, Schema) {
        (BYTES, Schema::default())
    }
}

/// Responds with the document.
pub(super) async fn serve() -> Response {
    static TEXT: OnceLock<Bytes> = OnceLock::new();
    let text = TEXT.get_or_init(|| Bytes::from(document().to_string()));
    ([(header::CONTENT_TYPE, JSON)], text.clone()).into_response()
}

/// The document.
pub fn document() -> Value {
    let mut schemas = generator();
    let error = schemas.subschema_for::<ErrorResponse>();
    let mut paths = Map::new();
    for endpoint in endpoints::all() {
        let method = endpoint.method.as_str().to_ascii_lowercase();
        let operation = operation(&endpoint, &mut schemas);
        let path = paths
            .entry(format!("/v1{}", endpoint.path))
            .or_insert_with(|| json!({}));
        if let Some(methods) = path.as_object_mut() {
            methods.insert(method, operation);
        }
    }
    let schemas = schemas.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Oncely control API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The API of a host, which the command line uses. It has no stability \
                promise: use the document of the host you talk to.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/", "description": "The host that serves this document" }],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": { "Error": error_response(&error) },
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The host's own token, or a named one. The role that a request \
                        needs is `x-oncely-role`; each role includes the ones before it: view, \
                        operate, deploy, admin.",
                },
            },
        },
    })
}

fn generator() -> SchemaGenerator {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    settings.with_transform(in_terms_of_json).into_generator()
}

/// Turns links between items of the code into plain names, and `None` into null.
fn in_terms_of_json(schema: &mut Schema) {
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = text.replace("[`", "`").replace("`]", "`");
        *text = text.replace("`None`", "null").replace("None ", "Null ");
    }
    transform_subschemas(&mut in_terms_of_json, schema);
}

fn operation(endpoint: &Endpoint, schemas: &mut SchemaGenerator) -> Value {
    let contents = (endpoint.contents)(schemas);
    let role = endpoint.role.as_str();
    let error = json!({ "$ref": "#/components/responses/Error" });
    let mut responses = Map::new();
    if let Some((kind, schema)) = &contents.response {
        let content = json!({ *kind: { "schema": schema } });
        let done = json!({ "description": "Done", "content": content });
        responses.insert("200".to_owned(), done);
    }
    for status in ["401", "403", "default"] {
        responses.insert(status.to_owned(), error.clone());
    }
    let mut operation = json!({
        "operationId": operation_id(endpoint.function),
        "summary": endpoint.about,
        "tags": [endpoint.path.split('/').nth(1)],
        "security": [{ "token": [role] }],
        "x-oncely-role": role,
        "parameters": parameters(endpoint.path, &contents),
        "responses": responses,
    });
    if let (Some((kind, schema)), Some(fields)) = (contents.body, operation.as_object_mut()) {
        let content = json!({ kind: { "schema": schema } });
        let body = json!({ "required": true, "content": content });
        fields.insert("requestBody".to_owned(), body);
    }
    operation
}

/// The id of an operation: its function, such as `dead_letters_find`.
fn operation_id(function: &str) -> String {
    let (_, below) = function.split_once("::api::").unwrap_or(("", function));
    below.replace("::", "_")
}

fn parameters(path: &str, contents: &Contents) -> Vec<Value> {
    let mut parameters = Vec::new();
    let names = path.split(['{', '}']).skip(1).step_by(2);
    for (name, schema) in names.zip(&contents.path) {
        parameters.push(json!({ "name": name, "in": "path", "required": true, "schema": schema }));
    }
    let query = contents.query.as_ref().map(Schema::as_value);
    let properties = query.and_then(|query| query.get("properties")?.as_object());
    let is_required = |name: &String| {
        let required = query.and_then(|query| query.get("required")?.as_array());
        required.is_some_and(|names| names.iter().any(|one| one == name))
    };
    for (name, schema) in properties.into_iter().flatten() {
        let schema = schema.as_object().cloned().unwrap_or_default();
        parameters.push(json!({
            "name": name,
            "in": "query",
            "required": is_required(name),
            "description": schema.get("description").cloned().unwrap_or_else(|| json!("")),
            "schema": without_null(schema),
        }));
    }
    parameters
}

/// The schema of a parameter. A query cannot contain null: an optional parameter is left out.
fn without_null(mut schema: Map<String, Value>) -> Map<String, Value> {
    schema.remove("description");
    schema.retain(|key, value| key != "default" || !value.is_null());
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|one| one != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            schema.insert("type".to_owned(), only);
        }
    }
    schema
}

/// The response of each refused or failed request.
fn error_response(error: &Schema) -> Value {
    json!({
        "description": "The request was refused or failed, and nothing was changed unless the \
            error says so. 400: it cannot be done. 401: the token is missing, wrong, expired or \
            revoked. 403: the role is too low. 404: the named thing does not exist. 409: a \
            precondition of the request does not hold. 503: the database or the broker is \
            unavailable. A request that cannot be read gets plain text.",
        "content": {
            JSON: { "schema": error },
            "text/plain": { "schema": { "type": "string" } },
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_request_of_the_table_is_in_the_document() {
        let document = document();
        for endpoint in endpoints::all() {
            let (method, path) = (endpoint.method.as_str().to_ascii_lowercase(), endpoint.path);
            let operation = &document["paths"][format!("/v1{path}")][&method];
            assert_eq!(operation["x-oncely-role"], endpoint.role.as_str(), "{path}");
            assert_eq!(operation["summary"], endpoint.about, "{path}");
            assert!(!endpoint.about.is_empty(), "{method} {path} has no summary");
            let response = &operation["responses"]["200"]["content"];
            assert!(response.is_object(), "{method} {path}: {operation}");
            let in_path = operation["parameters"].as_array().into_iter().flatten();
            let in_path = in_path.filter(|one| one["in"] == "path").count();
            assert_eq!(in_path, path.matches('{').count(), "{method} {path}");
        }
    }

    #[test]
    fn ids_of_operations_are_unique() {
        let all = endpoints::all();
        let ids: BTreeSet<String> = all.iter().map(|one| operation_id(one.function)).collect();
        assert_eq!(ids.len(), all.len(), "{ids:?}");
        assert!(
            ids.contains("dead_letters_find") && ids.contains("status"),
            "{ids:?}"
        );
    }

    #[test]
    fn no_two_types_have_the_same_name() {
        let document = document();
        let schemas = document["components"]["schemas"].as_object();
        for name in schemas.into_iter().flatten().map(|(name, _)| name) {
            assert!(
                !name.ends_with(|last: char| last.is_ascii_digit()),
                "rename one of the types with #[schemars(rename)]: {name}"
            );
        }
    }

    #[test]
    fn every_reference_of_the_document_is_resolved() {
        let document = document();
        let text = document.to_string();
        for found in text.split("\"$ref\":\"#").skip(1) {
            let pointer = found.split('"').next().unwrap_or_default();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }
}
