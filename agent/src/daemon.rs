//! The daemon's life: claim, start, serve, stop.
//!
//! Order of the start: run directory's lock, control socket, cache, store, disks. Whatever fails before the disks ends the
//! daemon with words and leaves nothing behind but the locks' files; a disk that does not come back is shown as failed
//! and the others go on. Order of the stop: no more requests, disk servers (requests under way finish),
//! open segments sealed, drain within the configured time, cache, store. What is not drained is safe in the log and
//! carried on by the next start. A kill at any point is as good as a crash: the log covers it.

use crate::config::AgentConfig;
use crate::control::server::{Gate, Phase, serve, serve_metrics};
use crate::error::{Failure, Kind, Result};
use crate::host::Host;
use crate::notify;
use crate::run_dir::RunDir;
use blockstore::turns::take_turns_of;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// How long the stop may take beyond the configured time for draining before the daemon ends regardless.
const STOP_GRACE: Duration = Duration::from_secs(15);
/// Somebody waits for each answer on the control socket, and there is little to compute for one.
const TURN: Duration = Duration::from_micros(100);

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// Why it could not start.
pub fn run(config: AgentConfig) -> Result<()> {
    start_logging(&config.log)?;
    log_panics();
    let run_dir = RunDir::claim(&config.run_dir)?;
    // Still one thread: the socket's mode is set through the umask.
    let control = run_dir.listen_control()?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|error| {
            Failure::new(Kind::Failed, format!("cannot start the agent's threads: {error}"))
        })?;
    let result = runtime.block_on(Box::pin(live(config, &run_dir, control)));
    run_dir.remove_control();
    // A store that hangs must not keep the agent from ending.
    runtime.shutdown_background();
    result
}

fn start_logging(filter: &str) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).map_err(|error| {
        Failure::caused(Kind::Usage, format_args!("'{filter}' is not a log filter"), &error)
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// A panic is a bug, costs the task it happened in, and is in the log with its place.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let what = text.unwrap_or("no message");
        let name = thread.name().unwrap_or("?");
        tracing::error!("bug: thread '{name}' panicked at {place}: {what}");
    }));
}

async fn live(config: AgentConfig, run_dir: &RunDir, control: UnixListener) -> Result<()> {
    let mut signals = Signals::new()?;
    let gate = Gate::new();
    let (stop_serving, stopped) = oneshot::channel::<()>();
    let metrics = match config.metrics_listen {
        Some(address) => Some(listen_metrics(address).await?),
        None => None,
    };
    let metrics = metrics.map(|listener| tokio::spawn(serve_metrics(listener, gate.clone())));
    serve_control(control, gate.clone(), stopped)?;

    let progress = |doing: &str| {
        tracing::info!("{doing}");
        notify::status(doing);
        gate.set(Phase::Starting(doing.to_owned()));
    };
    let timeout = config.shutdown_timeout;
    let started = tokio::select! {
        started = Host::start(config, run_dir.path(), &progress) => Some(started),
        () = signals.stop() => None,
    };
    let host = match started {
        Some(started) => started?,
        None => {
            tracing::info!("told to stop while starting");
            return Ok(());
        }
    };
    run_dir.remember(&host.remembered());
    gate.set(Phase::Running(Arc::clone(&host)));
    notify::ready("serving");
    tracing::info!("ready; control socket in {}", run_dir.path().display());

    signals.stop().await;
    tracing::info!(
        "stopping: draining for at most {} s; a second signal ends it at once",
        timeout.as_secs()
    );
    notify::stopping();
    gate.set(Phase::Stopping);
    let _ = stop_serving.send(());
    tokio::select! {
        ended = tokio::time::timeout(timeout + STOP_GRACE, host.stop(timeout)) => {
            match ended {
                Ok(()) => tracing::info!("stopped"),
                Err(_) => tracing::warn!("the stop took too long: ending now; the log has what is not in the store"),
            }
        }
        () = signals.stop() => {
            tracing::warn!("second signal: ending now; the log has what is not in the store");
        }
    }
    if let Some(metrics) = metrics {
        metrics.abort();
    }
    Ok(())
}

async fn listen_metrics(address: SocketAddr) -> Result<tokio::net::TcpListener> {
    tokio::net::TcpListener::bind(address).await.map_err(|error| {
        let words = format!("cannot serve metrics on {address}: {error}; give another address");
        Failure::new(Kind::Failed, words)
    })
}

/// Serves the control socket on a thread of its own: the others compute for milliseconds at a time, and whoever asks for a snapshot
/// waits. All but snapshots of served disks is done by them all the same ([`serve`]).
fn serve_control(control: UnixListener, gate: Gate, stopped: oneshot::Receiver<()>) -> Result<()> {
    let failed = |error: std::io::Error| {
        Failure::new(Kind::Failed, format!("cannot listen on the control socket: {error}"))
    };
    let others = tokio::runtime::Handle::current();
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("control".to_owned());
    let thread = thread.spawn(move || {
        if let Err(error) = take_turns_of(TURN) {
            tracing::debug!("no shorter turns for the control socket: {error}");
        }
        let (runtime, listener) = match listen(control) {
            Ok(listening) => listening,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let _ = ready.send(Ok(()));
        runtime.block_on(async {
            serve(listener, gate, others, async { drop(stopped.await) }).await;
            // What was begun here goes on, also if who asked has gone.
            std::future::pending::<()>().await;
        });
    });
    thread.map_err(failed)?;
    started
        .recv()
        .unwrap_or_else(|_| Err(std::io::Error::other("its thread ended")))
        .map_err(failed)
}

/// The socket, on a runtime of its own.
fn listen(
    control: UnixListener,
) -> std::io::Result<(tokio::runtime::Runtime, tokio::net::UnixListener)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    control.set_nonblocking(true)?;
    let of_this_runtime = runtime.enter();
    let listener = tokio::net::UnixListener::from_std(control)?;
    drop(of_this_runtime);
    Ok((runtime, listener))
}

/// The signals that the daemon listens to. SIGHUP is taken and ignored, so that a closing terminal does not end it.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    _hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let take = |kind| {
            signal(kind).map_err(|error| {
                Failure::new(Kind::Failed, format!("cannot listen to signals: {error}"))
            })
        };
        Ok(Self {
            terminate: take(SignalKind::terminate())?,
            interrupt: take(SignalKind::interrupt())?,
            _hangup: take(SignalKind::hangup())?,
        })
    }

    /// Resolves at the next SIGTERM or SIGINT.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
