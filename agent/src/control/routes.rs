//! What can be asked for over the control socket, each with who answers it.

use super::REQUEST_BYTES_MAX;
use super::body::{Body, Name, answer, name_of, parse, parse_or_default};
use super::server::{Gate, elsewhere, limit, to_the_end, to_the_end_by};
use super::stream;
use crate::api::diff::DiffRequest;
use crate::api::loss::RollbackRequest;
use crate::api::schedule::ScheduleRequest;
use crate::api::sizes::SizesRequest;
use crate::api::snapshots::{
    RewindRequest, SnapDeleteRequest, SnapLabelRequest, SnapListRequest, SnapRequest,
    SnapSetRequest,
};
use crate::api::{
    AttachRequest, CreateRequest, DeleteRequest, DetachRequest, DrainRequest, DrillRequest,
    HydrateRequest, ReplaceRequest, ResizeRequest, SetRequest,
};
use crate::error::{Failure, Kind};
use crate::metrics;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, Uri, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use std::time::Duration;
use tokio::runtime::Handle;

type Gated = State<Gate>;

pub(super) fn router(gate: Gate, others: Handle) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/metrics", get(metrics))
        .route("/v1/cache", get(cache_status))
        .route("/v1/cache/drain", post(drain))
        .route("/v1/cache/quarantine/{name}", axum::routing::delete(discard_quarantine))
        .route("/v1/cache/replace", get(replacement).post(replace).delete(cancel_replacement))
        .route("/v1/snapshots", post(snap_quiesced))
        .route("/v1/diff", post(diff))
        .route("/v1/tree", get(forest))
        .route("/v1/sizes", post(sizes))
        .route("/v1/gc", get(gc_status).post(gc_run))
        .route("/v1/scrub", get(scrub_status).post(scrub_run).delete(scrub_stop))
        .route("/v1/vdis", get(list).post(create))
        .route("/v1/vdis/{name}", get(info))
        .route("/v1/vdis/{name}/delete", post(delete))
        .route("/v1/vdis/{name}/snapshots/list", post(snapshots))
        .route("/v1/vdis/{name}/snapshots/label", post(label_snapshot))
        .route("/v1/vdis/{name}/snapshots/delete", post(delete_snapshots))
        .route("/v1/vdis/{name}/attach", post(attach))
        .route("/v1/vdis/{name}/detach", post(detach))
        .route("/v1/vdis/{name}/resize", post(resize))
        .route("/v1/vdis/{name}/set", post(set))
        .route("/v1/vdis/{name}/schedule", get(schedule).post(set_schedule))
        .route("/v1/vdis/{name}/rollback", post(rollback))
        .route("/v1/vdis/{name}/snapshots/rollback", post(rewind))
        .route("/v1/vdis/{name}/hydrate", post(hydrate))
        .route("/v1/vdis/{name}/pin", post(pin).delete(unpin))
        .route("/v1/vdis/{name}/drill", post(drill).delete(end_drill))
        .layer(middleware::from_fn_with_state(others.clone(), elsewhere))
        .route("/v1/vdis/{name}/snapshots", post(snap).layer(Extension(others)))
        .route("/v1/vdis/{name}/snapshots/stream", get(snap_stream))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(middleware::from_fn_with_state(gate.clone(), limit))
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(gate)
}

pub(super) async fn unknown(method: Method, uri: Uri) -> Response {
    let words = format!(
        "the agent (version {}) knows no request '{method} {}': use the command of the same version",
        env!("CARGO_PKG_VERSION"),
        uri.path().escape_debug()
    );
    Failure::new(Kind::Usage, words).into_response()
}

async fn status(State(gate): Gated) -> Response {
    answer(gate.host().map(|host| host.status()))
}

pub(super) async fn metrics(State(gate): Gated) -> Response {
    match gate.host().and_then(|host| metrics::render(&host.status())) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(failure) => failure.into_response(),
    }
}

async fn cache_status(State(gate): Gated) -> Response {
    answer(gate.host().map(|host| host.cache_status()))
}

async fn replacement(State(gate): Gated) -> Response {
    answer(gate.host().and_then(|host| host.replacement()))
}

async fn replace(State(gate): Gated, body: Body) -> Response {
    answer(
        async {
            let ReplaceRequest { path, rate } = parse(body)?;
            let host = gate.host()?;
            to_the_end(async move { host.replace_leg(&path, rate).await }).await
        }
        .await,
    )
}

async fn cancel_replacement(State(gate): Gated) -> Response {
    answer(
        async {
            let host = gate.host()?;
            to_the_end(async move { host.cancel_replacement().await }).await
        }
        .await,
    )
}

async fn list(State(gate): Gated) -> Response {
    answer(async { gate.host()?.list().await }.await)
}

async fn info(State(gate): Gated, name: Name) -> Response {
    answer(async { gate.host()?.info(&name_of(name)?).await }.await)
}

async fn create(State(gate): Gated, body: Body) -> Response {
    answer(
        async {
            let CreateRequest { name, size, from, when_offline } = parse(body)?;
            let host = gate.host()?;
            to_the_end(async move {
                let policy = when_offline.as_deref();
                match (size, from) {
                    (Some(size), None) => host.create(&name, size, policy).await,
                    (None, Some(from)) => host.create_from(&name, &from, policy).await,
                    _ => Err(Failure::new(
                        Kind::Usage,
                        format!(
                            "disk '{name}': give either its size or the snapshot that it begins as"
                        ),
                    )),
                }
            })
            .await
        }
        .await,
    )
}

/// Of what a served disk is now: at once. What may read a log, or the registry, is done by the others.
async fn snap(
    State(gate): Gated,
    Extension(others): Extension<Handle>,
    name: Name,
    body: Body,
) -> Response {
    answer(
        async {
            let request: SnapRequest = parse_or_default(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            let is_here = request.as_of.is_none() && host.serves(&name);
            let doer = if is_here { Handle::current() } else { others };
            to_the_end_by(&doer, async move { host.snap(&name, request).await }).await
        }
        .await,
    )
}

async fn snap_stream(State(gate): Gated, name: Name, request: Request) -> Response {
    let begun = || {
        let name = name_of(name)?;
        stream::check(&request)?;
        let Some(uuid) = gate.host()?.served(&name) else {
            let words = format!(
                "disk '{name}' is not attached to this host: 'ballast vdi attach {name}' first"
            );
            return Err(Failure::new(Kind::Conflict, words));
        };
        Ok((stream::Disk { uuid, name }, gate.stream()?))
    };
    match begun() {
        Ok((disk, place)) => stream::begin(gate, disk, request, place),
        Err(failure) => failure.into_response(),
    }
}

async fn snap_quiesced(State(gate): Gated, body: Body) -> Response {
    answer(
        async {
            let request: SnapSetRequest = parse(body)?;
            let host = gate.host()?;
            to_the_end(async move { host.snap_quiesced(request).await }).await
        }
        .await,
    )
}

async fn snapshots(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let request: SnapListRequest = parse_or_default(body)?;
            gate.host()?.snapshots(&name_of(name)?, request).await
        }
        .await,
    )
}

async fn label_snapshot(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let request: SnapLabelRequest = parse(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.label_snapshot(&name, request).await }).await
        }
        .await,
    )
}

async fn delete_snapshots(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let SnapDeleteRequest { snapshots } = parse(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.delete_snapshots(&name, snapshots).await }).await
        }
        .await,
    )
}

async fn delete(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let DeleteRequest { with_snapshots } = parse_or_default(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.delete(&name, with_snapshots).await }).await
        }
        .await,
    )
}

async fn attach(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            // Commands of former versions send 'null'.
            let request: Option<AttachRequest> = parse_or_default(body)?;
            let AttachRequest { read_only } = request.unwrap_or_default();
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.attach(&name, read_only).await }).await
        }
        .await,
    )
}

async fn detach(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let DetachRequest { force } = parse_or_default(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.detach(&name, force).await }).await
        }
        .await,
    )
}

async fn rollback(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let RollbackRequest { accept_loss } = parse_or_default(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.roll_back(&name, accept_loss).await }).await
        }
        .await,
    )
}

async fn rewind(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let request: RewindRequest = parse(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.rewind(&name, request).await }).await
        }
        .await,
    )
}

async fn forest(State(gate): Gated) -> Response {
    answer(async { gate.host()?.forest().await }.await)
}

/// It only looks, and may take long: it ends with its caller.
async fn sizes(State(gate): Gated, body: Body) -> Response {
    answer(
        async {
            let request: SizesRequest = parse_or_default(body)?;
            gate.host()?.sizes(request).await
        }
        .await,
    )
}

async fn diff(State(gate): Gated, body: Body) -> Response {
    answer(
        async {
            let request: DiffRequest = parse(body)?;
            gate.host()?.diff(request).await
        }
        .await,
    )
}

async fn discard_quarantine(State(gate): Gated, log: Name) -> Response {
    answer(
        async {
            let (log, host) = (name_of(log)?, gate.host()?);
            to_the_end(async move { host.discard_quarantine(&log).await }).await
        }
        .await,
    )
}

async fn resize(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let ResizeRequest { size } = parse(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.resize(&name, size).await }).await
        }
        .await,
    )
}

async fn set(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let request: SetRequest = parse(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.set(&name, request).await }).await
        }
        .await,
    )
}

async fn schedule(State(gate): Gated, name: Name) -> Response {
    answer(async { gate.host()?.schedule(&name_of(name)?).await }.await)
}

async fn set_schedule(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let request: ScheduleRequest = parse(body)?;
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.set_schedule(&name, request).await }).await
        }
        .await,
    )
}

async fn hydrate(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let request: HydrateRequest = parse_or_default(body)?;
            gate.host()?.hydrate(&name_of(name)?, request).await
        }
        .await,
    )
}

async fn pin(State(gate): Gated, name: Name) -> Response {
    answer(
        async {
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.pin(&name, true).await }).await
        }
        .await,
    )
}

async fn unpin(State(gate): Gated, name: Name) -> Response {
    answer(
        async {
            let (name, host) = (name_of(name)?, gate.host()?);
            to_the_end(async move { host.pin(&name, false).await }).await
        }
        .await,
    )
}

async fn gc_status(State(gate): Gated) -> Response {
    answer(gate.host().map(|host| host.gc_status()))
}

/// The cycle goes on by itself.
async fn gc_run(State(gate): Gated) -> Response {
    answer(gate.host().and_then(|host| host.collect_now()))
}

async fn scrub_status(State(gate): Gated) -> Response {
    answer(gate.host().map(|host| host.scrub_status()))
}

/// The pass goes on by itself.
async fn scrub_run(State(gate): Gated) -> Response {
    answer(gate.host().and_then(|host| host.scrub_now()))
}

async fn scrub_stop(State(gate): Gated) -> Response {
    answer(gate.host().and_then(|host| host.stop_scrub()))
}

async fn drill(State(gate): Gated, name: Name, body: Body) -> Response {
    answer(
        async {
            let DrillRequest { time_ms } = parse(body)?;
            gate.host()?.drill(&name_of(name)?, Duration::from_millis(time_ms))
        }
        .await,
    )
}

async fn end_drill(State(gate): Gated, name: Name) -> Response {
    answer(async { gate.host()?.end_drill(&name_of(name)?) }.await)
}

/// Changes nothing that would have to be carried to its end: a caller that goes away ends the wait.
async fn drain(State(gate): Gated, body: Body) -> Response {
    answer(
        async {
            let DrainRequest { vdi } = parse_or_default(body)?;
            gate.host()?.drain(vdi.as_deref()).await
        }
        .await,
    )
}
