//! A served disk: its socket, its threads, their start and their end.
//!
//! [`DiskServer::listen`] takes the socket early, so that front ends that come before the disk is ready wait instead of
//! giving up; [`Listening::run`] starts to answer them. One front end is served at a time, one after the other for
//! ever. Others may connect meanwhile, as the target of a live migration does, and are served when the first has stopped
//! its rings or hung up (`front_ends`).
//!
//! [`DiskServer::stop`] finishes what is under way, shows it to the guest, cuts the front end off and hands the disk
//! back. Dropping a server does the same. If the worker fails, the front end is cut off and the socket removed at once,
//! rather than leave a guest waiting on rings that nobody serves.

use crate::config::{ID_LEN, device_features};
use crate::error::{NotServed, ServerError};
use crate::front_ends::FRONT_ENDS_MAX;
use crate::session::{SessionContext, hung_up, serve};
use crate::socket::Socket;
use crate::stats::{Shared, Stats};
use crate::worker::{Handle, Request, Started, WorkerOptions, spawn};
use cache::disk::AttachedDisk;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// Most queues of a disk.
pub const QUEUES_MAX: u16 = 64;
/// Largest ring of a disk.
pub const QUEUE_SIZE_MAX: u16 = 4096;

/// How to serve a disk.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen; at most 107 bytes.
    pub socket: PathBuf,
    /// The socket's mode.
    pub mode: u32,
    /// The socket's user and group, if not this process's.
    pub owner: Option<(u32, u32)>,
    /// Request queues offered, 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// Largest ring accepted: a power of two from 2 to [`QUEUE_SIZE_MAX`].
    pub queue_size_max: u16,
    /// What the guest sees as the disk's serial number; cut to 20 bytes.
    pub serial: String,
    /// Refuse everything that writes.
    pub read_only: bool,
    /// Microseconds to look for work before sleeping. Costs a core while there is work now and then; 0 never does.
    pub poll_us: u32,
}

impl ServerOptions {
    /// The defaults for a disk at `socket`: mode 0600, four queues of up to 1024 entries, no polling.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            mode: 0o600,
            owner: None,
            queues: 4,
            queue_size_max: 1024,
            serial: String::new(),
            read_only: false,
            poll_us: 0,
        }
    }

    fn check(&self) -> Result<(), ServerError> {
        let path = &self.socket;
        let refuse = |message: String| Err(ServerError::Options { path: path.clone(), message });
        if self.queues == 0 || self.queues > QUEUES_MAX {
            return refuse(format!("{} queues; choose 1 to {QUEUES_MAX}", self.queues));
        }
        let size = self.queue_size_max;
        if !(2..=QUEUE_SIZE_MAX).contains(&size) || !size.is_power_of_two() {
            return refuse(format!(
                "queues of {size} entries; choose a power of two from 2 to {QUEUE_SIZE_MAX}"
            ));
        }
        if self.mode & !0o777 != 0 {
            return refuse(format!("socket mode {:o}; choose one up to 777", self.mode));
        }
        Ok(())
    }

    fn id(&self) -> [u8; ID_LEN] {
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(self.serial.bytes()) {
            *to = from;
        }
        id
    }
}

/// A socket that front ends can connect to, and wait.
#[derive(Debug)]
pub struct Listening {
    socket: Socket,
    options: ServerOptions,
}

impl Listening {
    /// Starts to serve `disk`, or gives it back.
    pub fn run(self, disk: AttachedDisk) -> Result<DiskServer, Box<NotServed>> {
        let Self { socket, options } = self;
        let path = socket.path().to_path_buf();
        let failed = |operation, source, disk| {
            let error = ServerError::Worker { path: path.clone(), operation, source };
            Box::new(NotServed { error, disk })
        };
        let shared = Arc::new(Shared::default());
        shared.size.store(disk.disk.size_bytes(), Ordering::Relaxed);
        shared.writeback.store(true, Ordering::Relaxed);
        // Both ends of a pair: closing one wakes the listener.
        let (stop, stopped) = match UnixStream::pair() {
            Ok(ends) => ends,
            Err(error) => return Err(failed("socketpair", error, disk)),
        };
        // Closed when the worker's thread ends, however it does.
        let (alive, worker_ended) = match UnixStream::pair() {
            Ok(ends) => ends,
            Err(error) => return Err(failed("socketpair", error, disk)),
        };
        let name: String = path
            .file_stem()
            .map_or_else(|| "disk".into(), |stem| stem.to_string_lossy().into_owned());
        let worker_options = WorkerOptions {
            name: name.clone(),
            queues: options.queues,
            read_only: options.read_only,
            id: options.id(),
            poll: Duration::from_micros(options.poll_us.into()),
        };
        let Started { handle: worker, thread } =
            match spawn(worker_options, disk, Arc::clone(&shared), alive) {
                Ok(started) => started,
                Err(refused) => {
                    let (error, disk) = *refused;
                    return Err(failed("start", error, disk));
                }
            };
        let context = SessionContext {
            worker: worker.clone(),
            shared: Arc::clone(&shared),
            queues: options.queues,
            queue_size_max: options.queue_size_max,
            read_only: options.read_only,
        };
        let listener =
            std::thread::Builder::new().name(format!("{name}:listen")).spawn(move || {
                Listener { socket, context, stopped, worker_ended, sessions: Vec::new() }.run()
            });
        let listener = match listener {
            Ok(listener) => listener,
            Err(source) => {
                let _ = worker.call(Request::Shutdown);
                let disk = thread.join().expect("the worker catches its panics");
                return Err(failed("thread", source, disk));
            }
        };
        tracing::info!(
            socket = %path.display(), features = format_args!("{:#x}", device_features(options.read_only)),
            "disk served"
        );
        Ok(DiskServer {
            path,
            shared,
            worker,
            threads: Some(Threads { worker: thread, listener, stop }),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.socket.path()
    }
}

/// A disk being served.
#[derive(Debug)]
pub struct DiskServer {
    path: PathBuf,
    shared: Arc<Shared>,
    worker: Handle,
    threads: Option<Threads>,
}

#[derive(Debug)]
struct Threads {
    worker: JoinHandle<AttachedDisk>,
    listener: JoinHandle<()>,
    stop: UnixStream,
}

impl DiskServer {
    /// Takes the socket. Nothing is answered yet.
    pub fn listen(options: ServerOptions) -> Result<Listening, ServerError> {
        options.check()?;
        let socket = Socket::bind(&options.socket, options.mode, options.owner)?;
        Ok(Listening { socket, options })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Counters and state.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Finishes what is under way, ends the session, removes the socket and gives the disk back. What waits for space
    /// in the log or for the store is left unfinished. Blocks for as long as local I/O does.
    ///
    /// # Panics
    /// If the worker's thread died outside of its own care, which takes the disk with it.
    #[must_use]
    pub fn stop(mut self) -> AttachedDisk {
        let threads = self.threads.take().expect("a server stops once");
        shut_down(&self.worker, threads).expect("the worker catches its panics")
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        if let Some(threads) = self.threads.take() {
            let _ = shut_down(&self.worker, threads);
        }
    }
}

fn shut_down(worker: &Handle, threads: Threads) -> std::thread::Result<AttachedDisk> {
    // Errors mean that the worker has ended already.
    let _ = worker.call(Request::Quiesce);
    drop(threads.stop);
    let _ = threads.listener.join();
    let _ = worker.call(Request::EndSession);
    let _ = worker.call(Request::Shutdown);
    threads.worker.join()
}

struct Listener {
    socket: Socket,
    context: SessionContext,
    /// Readable (at its end) when the server stops.
    stopped: UnixStream,
    /// Readable (at its end) when the worker has ended.
    worker_ended: UnixStream,
    sessions: Vec<RunningSession>,
}

struct RunningSession {
    /// A second handle to the connection.
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Listener {
    fn run(mut self) {
        loop {
            let flags = PollFlags::POLLIN;
            let mut polled = [
                PollFd::new(self.stopped.as_fd(), flags),
                PollFd::new(self.worker_ended.as_fd(), flags),
                PollFd::new(self.socket.listener.as_fd(), flags),
            ];
            if let Err(errno) = poll(&mut polled, PollTimeout::NONE)
                && errno != nix::errno::Errno::EINTR
            {
                tracing::error!(socket = %self.socket.path().display(), %errno, "poll failed: no more front ends are served");
                break;
            }
            let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
            if ready(&polled[0]) || ready(&polled[1]) {
                break;
            }
            if ready(&polled[2]) {
                self.accept();
            }
        }
        for session in self.sessions {
            let _ = session.stream.shutdown(Shutdown::Both);
            let _ = session.thread.join();
        }
    }

    fn accept(&mut self) {
        let path = self.socket.path().to_path_buf();
        let stream = match self.socket.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(socket = %path.display(), %error, "accept failed");
                // Out of file descriptors, most likely; the connection stays in the backlog.
                std::thread::sleep(Duration::from_millis(100));
                return;
            }
        };
        self.clean_up();
        if self.sessions.len() >= FRONT_ENDS_MAX {
            tracing::warn!(
                socket = %path.display(),
                "a front end was turned away: {FRONT_ENDS_MAX} others are connected"
            );
            return;
        }
        match self.start(stream) {
            Ok(session) => self.sessions.push(session),
            Err(error) => {
                tracing::warn!(socket = %self.socket.path().display(), %error, "no thread for a front end");
            }
        }
    }

    /// Waits for the sessions whose front ends have gone: the next one may be the same guest, and finds its disk free.
    fn clean_up(&mut self) {
        let over =
            |session: &mut RunningSession| session.thread.is_finished() || hung_up(&session.stream);
        for session in self.sessions.extract_if(.., over) {
            let _ = session.thread.join();
        }
    }

    fn start(&self, stream: UnixStream) -> io::Result<RunningSession> {
        let second = stream.try_clone()?;
        let closing = stream.try_clone()?;
        let context = self.context.clone();
        let path = self.socket.path().to_path_buf();
        let name = std::thread::current().name().unwrap_or("disk").replace(":listen", ":session");
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let shared = Arc::clone(&context.shared);
            shared.sessions.fetch_add(1, Ordering::Relaxed);
            let id = shared.front_ends.enter();
            serve(stream, context, id, &path);
            // Other handles to the connection are open still; the front end is to see its end now.
            let _ = closing.shutdown(Shutdown::Both);
        })?;
        Ok(RunningSession { stream: second, thread })
    }
}

#[cfg(test)]
mod tests;
