//! A command's side of the control socket.

use crate::error::{ErrorBody, Failure, Kind, Result};
use crate::names::CONTROL_SOCKET;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

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

    /// One connection, one request. Returns the answer's body.
    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.not_connected(&e))?;
        let broken = |error: hyper::Error| {
            let at = self.socket.display();
            let message = format!(
                "the agent at {at} went away before it answered; 'ballast status' tells its state"
            );
            Failure::caused(Kind::AgentUnreachable, message, &error)
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "ballast")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| Failure::caused(Kind::Failed, "cannot build the request", &error))?;
        let answer = sender.send_request(request).await.map_err(broken)?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(broken)?.to_bytes();
        driver.abort();
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => Err(body.error),
            Err(error) => Err(self.not_understood(&error).within(format_args!("status {status}"))),
        }
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

    fn not_understood(&self, error: &serde_json::Error) -> Failure {
        let socket = self.socket.display();
        let message = format!(
            "the answer of the agent at {socket} makes no sense to this version of ballast: use the agent's own version"
        );
        Failure::caused(Kind::Failed, message, error)
    }
}
