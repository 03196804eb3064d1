//! A component that serves `wasi:http/handler` of WASI 0.3: it reads the body of a request as a
//! stream, counts it in a bucket, and sends the response after it has returned it.

mod keyvalue {
    wit_bindgen::generate!({
        path: "../../host/wit",
        inline: "
            package tests:keyvalue;
            world keyvalue {
                import wasi:keyvalue/store@0.2.0-draft;
                import wasi:keyvalue/atomics@0.2.0-draft;
            }
        ",
        generate_all,
    });
}

use keyvalue::wasi::keyvalue0_2_0_draft::{atomics, store};
use wasip3::http::types::{ErrorCode, Fields, Method, Request, Response};
use wasip3::{wit_future, wit_stream};

wasip3::http::service::export!(Component);

struct Component;

impl wasip3::exports::http::handler::Guest for Component {
    async fn handle(request: Request) -> Result<Response, ErrorCode> {
        let method = request.get_method();
        let path = request.get_path_with_query().unwrap_or_default();
        let authority = request.get_authority().unwrap_or_default();
        let (sender, result) = wit_future::new(|| Ok(()));
        let (body, trailers) = Request::consume_body(request, result);
        let body = body.collect().await;
        drop(sender);
        drop(trailers);

        let count = match method {
            Method::Post => count(&path),
            _ => Ok(0),
        };
        let count = count.map_err(|why| ErrorCode::InternalError(Some(why)))?;
        if path.ends_with("error") {
            return Err(ErrorCode::InternalError(Some("requested error".to_owned())));
        }
        let status = if path.ends_with("refuse") { 422 } else { 200 };
        let first = format!("{authority}{path} {count} ");
        Ok(respond(status, first.into_bytes(), body))
    }
}

fn count(path: &str) -> Result<u64, String> {
    let bucket = store::open("").map_err(|error| format!("{error:?}"))?;
    atomics::increment(&bucket, path, 1).map_err(|error| format!("{error:?}"))
}

/// A response whose body is written after the handler has returned, in several parts.
fn respond(status: u16, first: Vec<u8>, body: Vec<u8>) -> Response {
    let (mut writer, reader) = wit_stream::new();
    let (trailers, end) = wit_future::new(|| Ok(None));
    let headers = Fields::from_list(&[("x-guest".to_owned(), b"async".to_vec())])
        .unwrap_or_else(|_| Fields::new());
    let (response, _sent) = Response::new(headers, Some(reader), end);
    let _ = response.set_status_code(status);
    wasip3::spawn(async move {
        for part in [first, body, b" end".to_vec()] {
            writer.write_all(part).await;
        }
        drop(writer);
        drop(trailers);
    });
    response
}
