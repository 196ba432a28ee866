//! The daemon's side of the control socket.
//!
//! A request that changes something runs as a task of its own: a caller that goes away does not cancel it half-way.
//! At most [`REQUESTS_MAX`] requests are under way; more are turned away at once. Nothing that comes in over the socket
//! can end the daemon: what cannot be understood is answered with words. What there is to ask for: `routes.rs`.

use super::REQUEST_BYTES_MAX;
use super::routes::{self, router};
use super::stream::STREAMS_MAX;
use crate::error::{Failure, Kind, Result};
use crate::host::Host;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use parking_lot::RwLock;
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

/// Requests under way at one time.
pub const REQUESTS_MAX: usize = 64;

const ENDED_BADLY: &str =
    "the agent failed inside (its log has the details); 'ballast status' shows the state it left";

/// What the daemon is doing, as far as requests are concerned.
#[derive(Clone, Debug)]
pub enum Phase {
    /// Not ready yet, with what it is doing.
    Starting(String),
    /// Ready.
    Running(Arc<Host>),
    /// Stopping: nothing is accepted any more.
    Stopping,
}

/// The phase, shared between the daemon and its control socket.
#[derive(Clone, Debug)]
pub struct Gate {
    phase: Arc<RwLock<Phase>>,
    permits: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Gate {
    /// A daemon that is starting.
    #[must_use]
    pub fn new() -> Self {
        Self {
            phase: Arc::new(RwLock::new(Phase::Starting("starting".into()))),
            permits: Arc::new(Semaphore::new(REQUESTS_MAX)),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
        }
    }

    /// Enters a phase.
    pub fn set(&self, phase: Phase) {
        *self.phase.write() = phase;
    }

    pub(super) fn host(&self) -> Result<Arc<Host>> {
        match &*self.phase.read() {
            Phase::Running(host) => Ok(Arc::clone(host)),
            Phase::Starting(doing) => Err(Failure::new(
                Kind::Unavailable,
                format!("the agent is not ready yet ({doing}): try again"),
            )),
            Phase::Stopping => Err(Failure::new(
                Kind::Unavailable,
                "the agent is stopping: try again when it was started again",
            )),
        }
    }

    /// A place for one more stream of snapshots.
    pub(super) fn stream(&self) -> Result<OwnedSemaphorePermit> {
        Arc::clone(&self.streams).try_acquire_owned().map_err(|_| {
            let words =
                format!("{STREAMS_MAX} streams of snapshots are open already: end one first");
            Failure::new(Kind::Unavailable, words)
        })
    }
}

/// Serves the control socket until `stop` resolves and the requests under way are answered. Snapshots of served disks are taken by the thread that
/// this runs on, and what else is asked for is done by `others`.
pub async fn serve(
    listener: UnixListener,
    gate: Gate,
    others: Handle,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let server = axum::serve(listener, router(gate, others)).with_graceful_shutdown(stop);
    if let Err(error) = server.await {
        tracing::error!(
            "the control socket failed: {error}; restart the agent to control it again"
        );
    }
}

/// Serves the metrics, and nothing else, on a TCP port.
pub async fn serve_metrics(listener: TcpListener, gate: Gate) {
    let router = Router::new()
        .route("/metrics", get(routes::metrics))
        .fallback(routes::unknown)
        .method_not_allowed_fallback(routes::unknown)
        .layer(middleware::from_fn_with_state(gate.clone(), limit))
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(gate);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!("the metrics' port failed: {error}; restart the agent to have it again");
    }
}

/// Held for as long as something of a request is under way.
type Permit = Arc<OwnedSemaphorePermit>;

pub(super) async fn limit(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let Ok(permit) = Arc::clone(&gate.permits).try_acquire_owned() else {
        let words = format!("{REQUESTS_MAX} requests are under way already: try again later");
        return Failure::new(Kind::Unavailable, words).into_response();
    };
    let permit: Permit = Arc::new(permit);
    request.extensions_mut().insert(Arc::clone(&permit));
    next.run(request).await
}

/// Has a request done by the threads of a runtime; it ends with its caller.
pub(super) async fn elsewhere(
    State(others): State<Handle>,
    request: Request,
    next: Next,
) -> Response {
    let mut task = JoinSet::new();
    let permit = request.extensions().get::<Permit>().cloned();
    let doing = async move {
        let response = next.run(request).await;
        drop(permit);
        response
    };
    task.spawn_on(doing, &others);
    match task.join_next().await {
        Some(Ok(response)) => response,
        Some(Err(error)) if error.is_cancelled() => {
            Failure::new(Kind::Unavailable, "the agent is stopping").into_response()
        }
        ended => {
            tracing::error!(?ended, "a control request ended badly");
            Failure::new(Kind::Failed, ENDED_BADLY).into_response()
        }
    }
}

/// Runs a change as a task of its own, so that it ends in a defined state even if its caller goes away. A panic in it
/// is one failed request.
pub(super) async fn to_the_end<T: Send + 'static>(
    change: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    to_the_end_by(&Handle::current(), change).await
}

pub(super) async fn to_the_end_by<T: Send + 'static>(
    doer: &Handle,
    change: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    doer.spawn(change).await.unwrap_or_else(|error| {
        tracing::error!("a control request ended badly: {error}");
        Err(Failure::new(Kind::Failed, ENDED_BADLY))
    })
}
