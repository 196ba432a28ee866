//! What can go wrong when a disk is to be served.

use cache::disk::AttachedDisk;
use std::io;
use std::path::PathBuf;

/// Why a socket could not be served. Each names the socket and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// `sun_path` holds 108 bytes with its terminator.
    #[error(
        "socket path {path} is {len} bytes long; UNIX sockets allow 107: choose a shorter run directory"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Something that is no socket has that name.
    #[error("{path} exists and is not a socket: move it away or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens there.
    #[error(
        "{path} is in use: another process listens on it; stop that one or choose another path"
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A system call on the socket failed.
    #[error("{path}: {operation} failed: {source}")]
    Socket {
        /// The path.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// An option lies outside its range.
    #[error("{path}: {message}")]
    Options {
        /// The socket.
        path: PathBuf,
        /// Which option, and what is allowed.
        message: String,
    },
    /// The disk's worker could not be started.
    #[error("{path}: cannot start the disk's worker: {operation} failed: {source}")]
    Worker {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// A disk that could not be served, as it was handed over: to be released, or served by another attempt.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NotServed {
    /// Why.
    pub error: ServerError,
    /// The disk.
    pub disk: AttachedDisk,
}
