//! A command's side of the control socket.

use crate::error::{ErrorBody, Failure, Kind, Result};
use crate::names::CONTROL_SOCKET;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::body::Incoming;
use hyper::http::request;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

/// A connection that is HTTP no more.
pub type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// Speaks to the agent of one run directory.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the agent in `run_dir`; nothing is connected yet.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self { socket: run_dir.join(CONTROL_SOCKET) }
    }

    /// GET.
    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// GET of something that is no JSON.
    pub async fn get_text(&self, path: &str) -> Result<String> {
        let body = self.exchange(Method::GET, path, Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// DELETE.
    pub async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A> {
        self.request(Method::DELETE, path, Bytes::new()).await
    }

    /// POST.
    pub async fn post<Q: Serialize, A: DeserializeOwned>(&self, path: &str, body: &Q) -> Result<A> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Failure::caused(Kind::Failed, "cannot write the request", &error))?;
        self.request(Method::POST, path, body.into()).await
    }

    async fn request<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<A> {
        let body = self.exchange(method, path, body).await?;
        serde_json::from_slice(&body).map_err(|error| self.not_understood(&error))
    }

    /// A connection that speaks another protocol from here on.
    pub async fn upgrade(&self, path: &str, protocol: &str) -> Result<Upgraded> {
        let head = Request::get(path).header("connection", "upgrade").header("upgrade", protocol);
        let answer = self.send(head, Bytes::new()).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            let body = self.body_of(answer).await?;
            return Err(self.not_understood(&io::Error::other(format!("no {protocol}: {body:?}"))));
        }
        let upgraded = hyper::upgrade::on(answer).await.map_err(|error| self.gone(&error))?;
        Ok(TokioIo::new(upgraded))
    }

    /// One connection, one request. Returns the answer's body.
    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let head = Request::builder().method(method).uri(path);
        let answer = self.send(head, body).await?;
        self.body_of(answer).await
    }

    async fn send(&self, head: request::Builder, body: Bytes) -> Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.not_connected(&e))?;
        let gone = |error: hyper::Error| self.gone(&error);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(gone)?;
        // It ends with the answer's body.
        tokio::spawn(connection.with_upgrades());
        let request = head
            .header("host", "ballast")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| Failure::caused(Kind::Failed, "cannot build the request", &error))?;
        sender.send_request(request).await.map_err(gone)
    }

    async fn body_of(&self, answer: Response<Incoming>) -> Result<Bytes> {
        let status = answer.status();
        let body = answer.into_body().collect().await;
        let body = body.map_err(|error| self.gone(&error))?.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => Err(body.error),
            Err(error) => Err(self.not_understood(&error).within(format_args!("status {status}"))),
        }
    }

    /// The agent ended in the middle of something.
    pub(crate) fn gone(&self, error: &(dyn Error + 'static)) -> Failure {
        let at = self.socket.display();
        let message = format!(
            "the agent at {at} went away before it answered; 'ballast status' tells its state"
        );
        Failure::caused(Kind::AgentUnreachable, message, error)
    }

    fn not_connected(&self, error: &std::io::Error) -> Failure {
        let socket = self.socket.display();
        let words = match error.kind() {
            ErrorKind::NotFound => format!(
                "no agent is running: there is no socket {socket}; start one with 'ballast agent', \
                 or name its run directory with --run-dir"
            ),
            ErrorKind::ConnectionRefused => format!(
                "no agent is running: {socket} is left over from one that ended; start it again with 'ballast agent'"
            ),
            ErrorKind::PermissionDenied => {
                format!(
                    "{socket} cannot be opened by this user: run the command as the agent's user"
                )
            }
            _ => format!("cannot reach the agent at {socket}: {error}"),
        };
        Failure::new(Kind::AgentUnreachable, words)
    }

    pub(crate) fn not_understood(&self, error: &(dyn Error + 'static)) -> Failure {
        let socket = self.socket.display();
        let message = format!(
            "the answer of the agent at {socket} makes no sense to this version of ballast: use the agent's own version"
        );
        Failure::caused(Kind::Failed, message, error)
    }
}
