//! The listening socket's path: taken over, guarded and cleaned up the way operators expect.
//!
//! A socket that nobody listens on is what a killed process leaves behind: it is replaced. Everything else at the path
//! is left alone and reported. Owner and mode are set before anyone can connect, and the path is removed at the end if
//! it still is the socket that was made here.

use crate::error::ServerError;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Bytes of `sun_path` without its terminator.
const PATH_MAX: usize = 107;
/// Front ends that may wait to be accepted.
const BACKLOG: i32 = 8;

/// A listening socket and its name in the file system.
#[derive(Debug)]
pub(crate) struct Socket {
    pub listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the name, to recognise it again.
    identity: (u64, u64),
}

impl Socket {
    /// Listens at `path`.
    pub(crate) fn bind(
        path: &Path,
        mode: u32,
        owner: Option<(u32, u32)>,
    ) -> Result<Self, ServerError> {
        let len = path.as_os_str().as_bytes().len();
        if len > PATH_MAX {
            return Err(ServerError::PathTooLong { path: path.into(), len });
        }
        clear_the_way(path)?;
        let failed = |operation| {
            let path = path.to_path_buf();
            move |source: io::Error| ServerError::Socket { path, operation, source }
        };
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| failed("socket")(errno.into()))?;
        let address = UnixAddr::new(path).map_err(|errno| failed("bind")(errno.into()))?;
        match bind(fd.as_raw_fd(), &address) {
            Err(nix::errno::Errno::EADDRINUSE) => {
                return Err(ServerError::InUse { path: path.into() });
            }
            result => result.map_err(|errno| failed("bind")(errno.into()))?,
        }
        let metadata = fs::symlink_metadata(path).map_err(failed("stat"))?;
        let identity = (metadata.dev(), metadata.ino());
        let made = Self { listener: UnixListener::from(fd), path: path.into(), identity };
        // Nobody can connect before `listen`.
        if let Some((user, group)) = owner {
            chown(path, Some(user), Some(group)).map_err(failed("chown"))?;
        }
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("chmod"))?;
        let backlog = Backlog::new(BACKLOG).expect("a small backlog");
        listen(&made.listener, backlog).map_err(|errno| failed("listen")(errno.into()))?;
        Ok(made)
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let Ok(metadata) = fs::symlink_metadata(&self.path) else { return };
        if (metadata.dev(), metadata.ino()) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket that nobody listens on; refuses anything else that is there.
fn clear_the_way(path: &Path) -> Result<(), ServerError> {
    let failed = |operation, source| ServerError::Socket { path: path.into(), operation, source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("stat", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ServerError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        // A full backlog (EAGAIN) needs a listener as well.
        Ok(_) => Err(ServerError::InUse { path: path.into() }),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(ServerError::InUse { path: path.into() })
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| failed("unlink of a stale socket", error))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("connect", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        drop(UnixListener::bind(&path).unwrap());
        let live = Socket::bind(&path, 0o600, None).unwrap();
        assert!(matches!(Socket::bind(&path, 0o600, None), Err(ServerError::InUse { .. })));
        assert!(UnixStream::connect(&path).is_ok(), "the live one still listens");
        drop(live);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, b"data").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for path in [&path, &link] {
            let refused = Socket::bind(path, 0o600, None).unwrap_err();
            assert!(matches!(&refused, ServerError::NotASocket { .. }), "{refused}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn mode_and_owner_are_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        let own = fs::metadata(dir.path()).unwrap();
        let _socket = Socket::bind(&path, 0o640, Some((own.uid(), own.gid()))).unwrap();
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o640);
        assert_eq!((metadata.uid(), metadata.gid()), (own.uid(), own.gid()));
    }

    #[test]
    fn another_socket_at_the_path_survives_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        let ours = Socket::bind(&path, 0o600, None).unwrap();
        // Held under another name, so that its inode is not handed out again.
        fs::rename(&path, dir.path().join("aside")).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn long_paths_and_missing_folders_are_refused_with_words() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(PATH_MAX));
        let message = Socket::bind(&long, 0o600, None).unwrap_err().to_string();
        assert!(message.contains("107"), "{message}");
        let missing = dir.path().join("no/such/folder.sock");
        let message = Socket::bind(&missing, 0o600, None).unwrap_err().to_string();
        assert!(message.contains("folder.sock") && message.contains("bind"), "{message}");
    }
}
