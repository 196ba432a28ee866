//! Snapshots by the line, over a connection to the control socket that is HTTP no more: for programs that take many, or need each soon.
//!
//! What is asked goes to the disk's worker as it comes, and the worker itself writes the answer: no other thread has a part in it, nor
//! has the parsing of HTTP, which takes longer than all of the rest. The worker writes without waiting, and a stream has at most
//! [`UNANSWERED_MAX`] snapshots under way, whose answers fit into the socket; it is not read further before. Whoever leaves so many
//! answers unread that there is no room for one more is cut off.

use super::SNAPSHOT_STREAM;
use super::server::Gate;
use crate::api::snapshots::{SnapAnswered, SnapAsked};
use crate::error::{Failure, Kind, Result};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::upgrade::downcast;
use parking_lot::Mutex;
use std::io::{self, Cursor, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Chain, Interest};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

/// Streams at one time.
pub(super) const STREAMS_MAX: usize = 64;
/// Snapshots of one stream that are under way.
const UNANSWERED_MAX: u32 = 64;
/// Longest line that asks for something.
const LINE_BYTES_MAX: u64 = 4096;
/// How often is looked whether somebody is still there.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A disk that is served here.
pub(super) struct Disk {
    pub uuid: Uuid,
    pub name: String,
}

/// Makes a connection a stream of snapshots of a disk. It ends with its client.
pub(super) fn begin(
    gate: Gate,
    disk: Disk,
    mut request: Request,
    place: OwnedSemaphorePermit,
) -> Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let upgraded = upgrade.await.map_err(io::Error::other);
        let ended = match upgraded.and_then(Stream::new) {
            Ok(stream) => stream.converse(&gate, &disk).await,
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::debug!(vdi = %disk.name, "a stream of snapshots ended: {error}");
        }
        drop(place);
    });
    let head = [(header::CONNECTION, "upgrade"), (header::UPGRADE, SNAPSHOT_STREAM)];
    (StatusCode::SWITCHING_PROTOCOLS, head).into_response()
}

/// The request is for this protocol.
pub(super) fn check(request: &Request) -> Result<()> {
    let wanted = request.headers().get(header::UPGRADE);
    let is_this = wanted
        .is_some_and(|wanted| wanted.as_bytes().eq_ignore_ascii_case(SNAPSHOT_STREAM.as_bytes()));
    if is_this && request.extensions().get::<OnUpgrade>().is_some() {
        return Ok(());
    }
    let words = format!(
        "a stream of snapshots needs 'Upgrade: {SNAPSHOT_STREAM}' in the head of an HTTP/1.1 request"
    );
    Err(Failure::new(Kind::Usage, words))
}

struct Stream {
    asked: BufReader<Chain<Cursor<Bytes>, UnixStream>>,
    answers: Arc<Answers>,
    unanswered: Arc<Semaphore>,
}

impl Stream {
    /// Begins with what came already.
    fn new(upgraded: Upgraded) -> io::Result<Self> {
        let parts = downcast::<TokioIo<UnixStream>>(upgraded);
        let parts =
            parts.map_err(|_| io::Error::other("it is no connection of the control socket"))?;
        let socket = parts.io.into_inner().into_std()?;
        let answers = Arc::new(Answers(Mutex::new(Some(socket.try_clone()?))));
        let asked = Cursor::new(parts.read_buf).chain(UnixStream::from_std(socket)?);
        let unanswered = Arc::new(Semaphore::new(UNANSWERED_MAX as usize));
        Ok(Self { asked: BufReader::new(asked), answers, unanswered })
    }

    async fn converse(mut self, gate: &Gate, disk: &Disk) -> io::Result<()> {
        let ended = self.take_lines(gate, disk).await;
        if ended.is_ok() {
            // Who says no more may still listen.
            tokio::select! {
                _ = self.unanswered.acquire_many(UNANSWERED_MAX) => {}
                () = self.hung_up() => {}
            }
        }
        // What is answered later has nowhere to go, and keeps no socket open.
        self.answers.end();
        ended
    }

    async fn take_lines(&mut self, gate: &Gate, disk: &Disk) -> io::Result<()> {
        let mut line = Vec::new();
        loop {
            // What is refused at once waits for nothing.
            tokio::task::consume_budget().await;
            let place = tokio::select! {
                biased;
                place = Arc::clone(&self.unanswered).acquire_owned() => place.map_err(io::Error::other)?,
                () = self.hung_up() => return Ok(()),
            };
            line.clear();
            (&mut self.asked).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
            if line.is_empty() || self.answers.has_ended() {
                return Ok(());
            }
            if line.len() as u64 == LINE_BYTES_MAX && !line.ends_with(b"\n") {
                let words = format!(
                    "a line of {LINE_BYTES_MAX} bytes and more asks for nothing that there is"
                );
                self.answers.refuse(None, Failure::new(Kind::Usage, words));
                return Ok(());
            }
            self.ask(gate, disk, &line, place).await;
        }
    }

    async fn ask(&self, gate: &Gate, disk: &Disk, line: &[u8], place: OwnedSemaphorePermit) {
        let (tag, label) = match serde_json::from_slice(line) {
            Ok(SnapAsked { tag, label }) => (tag, label),
            Err(error) => {
                let failure = Failure::caused(Kind::Usage, "the line makes no sense", &error);
                return self.answers.refuse(None, failure);
            }
        };
        let answers = Arc::clone(&self.answers);
        let then = move |taken: Result<_>| {
            match taken {
                Ok(snapped) => answers.say(&SnapAnswered::Taken { tag, snapped }),
                Err(failure) => answers.refuse(tag, failure),
            }
            drop(place);
        };
        match gate.host() {
            Ok(host) => host.snap_then(disk.uuid, &disk.name, label, then).await,
            Err(failure) => then(Err(failure)),
        }
    }

    /// Returns when nobody can be answered any more.
    async fn hung_up(&self) {
        let socket = self.asked.get_ref().get_ref().1;
        while socket.ready(Interest::WRITABLE).await.is_ok_and(|ready| !ready.is_write_closed()) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// The way back, which does not block; none once somebody was cut off. The worker and the control socket's thread write to it, each for
/// the time that one such write takes.
struct Answers(Mutex<Option<std::os::unix::net::UnixStream>>);

impl Answers {
    fn say(&self, answer: &SnapAnswered) {
        let mut line = serde_json::to_vec(answer).unwrap_or_default();
        line.push(b'\n');
        let mut socket = self.0.lock();
        let written = socket.as_mut().map(|socket| socket.write(&line));
        if !matches!(written, Some(Ok(written)) if written == line.len()) {
            // The next line would be taken for this one's rest.
            Self::close(&mut socket);
        }
    }

    fn refuse(&self, tag: Option<u64>, error: Failure) {
        self.say(&SnapAnswered::Failed { tag, error });
    }

    fn has_ended(&self) -> bool {
        self.0.lock().is_none()
    }

    fn end(&self) {
        Self::close(&mut self.0.lock());
    }

    fn close(socket: &mut Option<std::os::unix::net::UnixStream>) {
        if let Some(socket) = socket.take() {
            // The other end of it is read still.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
