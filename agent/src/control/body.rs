//! What a request says, and what it is answered.

use crate::error::{ErrorBody, Failure, Kind, Result};
use axum::body::Bytes;
use axum::extract::Path;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(super) type Name = Result<Path<String>, PathRejection>;
pub(super) type Body = Result<Bytes, BytesRejection>;

pub(super) fn name_of(name: Name) -> Result<String> {
    match name {
        Ok(Path(name)) => Ok(name),
        Err(error) => Err(Failure::new(
            Kind::Usage,
            format!("the disk's name in the request cannot be read: {}", error.body_text()),
        )),
    }
}

fn read(body: Body) -> Result<Bytes> {
    body.map_err(|error| {
        Failure::new(
            Kind::Usage,
            format!("the request's body cannot be read: {}", error.body_text()),
        )
    })
}

pub(super) fn parse<T: DeserializeOwned>(body: Body) -> Result<T> {
    serde_json::from_slice(&read(body)?)
        .map_err(|error| Failure::caused(Kind::Usage, "the request's body makes no sense", &error))
}

pub(super) fn parse_or_default<T: DeserializeOwned + Default>(body: Body) -> Result<T> {
    match body {
        Ok(bytes) if bytes.is_empty() => Ok(T::default()),
        body => parse(body),
    }
}

pub(super) fn answer<T: Serialize>(result: Result<T>) -> Response {
    let value = match result {
        Ok(value) => value,
        Err(failure) => return failure.into_response(),
    };
    match serde_json::to_vec(&value) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => {
            Failure::caused(Kind::Failed, "cannot write the answer", &error).into_response()
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.http_status());
        let body = serde_json::to_vec(&ErrorBody { error: self }).unwrap_or_default();
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
    }
}
