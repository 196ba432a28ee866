//! The run directory: who owns it, and the control socket.
//!
//! `agent.lock` carries a lock that the kernel drops with the process, and the process id in words; whoever holds it owns
//! every socket in the directory, so what an agent that was killed left behind may be replaced. `agent.toml`
//! remembers which cache the agent used, for commands that run while it is down, and who the host is, should the cache be lost.

use crate::error::{Failure, Kind, Result};
use crate::names::{CONTROL_SOCKET, SOCKET_PATH_LEN_MAX};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

const LOCK_FILE: &str = "agent.lock";
const MEMORY_FILE: &str = "agent.toml";

/// A run directory that this process owns until it ends.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: Flock<File>,
}

/// What the last agent in a run directory used.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Remembered {
    /// The cache's files.
    pub caches: Vec<PathBuf>,
    /// The host's identity, for a cache that has to be made anew.
    #[serde(default)]
    pub host: Option<uuid::Uuid>,
}

impl RunDir {
    /// Creates the directory if need be and takes its lock.
    ///
    /// # Errors
    /// [`Kind::Conflict`]: a live agent holds it; its process id is named. Otherwise the file that failed.
    pub fn claim(path: &Path) -> Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(|error| {
            Failure::new(
                Kind::Failed,
                format!("cannot create the run directory {}: {error}", path.display()),
            )
        })?;
        // Absolute, since scripts in other directories use the sockets' paths that we report.
        let path = path.canonicalize().map_err(|error| failed("resolve", path, &error))?;
        let lock_path = path.join(LOCK_FILE);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(|error| failed("open", &lock_path, &error))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                write_pid(&mut lock).map_err(|error| failed("write", &lock_path, &error))?;
                Ok(Self { path, _lock: lock })
            }
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                Err(Failure::new(
                    Kind::Conflict,
                    format!(
                        "an agent is already running in {}, pid {}: stop it first, or give another --run-dir",
                        path.display(),
                        if holder.trim().is_empty() { "unknown" } else { holder.trim() }
                    ),
                ))
            }
            Err((_, errno)) => Err(failed("lock", &lock_path, &errno.into())),
        }
    }

    /// Its absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the control socket, mode 0600 from its first moment. To be called while the process has one thread,
    /// because the umask belongs to all of them.
    ///
    /// # Errors
    /// The path is too long, or something that is no socket is in the way.
    pub fn listen_control(&self) -> Result<UnixListener> {
        let path = self.path.join(CONTROL_SOCKET);
        if path.as_os_str().len() > SOCKET_PATH_LEN_MAX {
            return Err(Failure::new(
                Kind::Usage,
                format!(
                    "the run directory {} has too long a path: sockets' paths may have {SOCKET_PATH_LEN_MAX} bytes; \
                     use a shorter --run-dir",
                    self.path.display()
                ),
            ));
        }
        clear_stale_socket(&path)?;
        let former = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(&path);
        umask(former);
        listener.map_err(|error| failed("listen on the control socket", &path, &error))
    }

    /// Leaves a note for commands that run while no agent does. Losing it costs comfort only.
    pub fn remember(&self, what: &Remembered) {
        let path = self.path.join(MEMORY_FILE);
        let text = toml::to_string(what).unwrap_or_default();
        if let Err(error) = std::fs::write(&path, text) {
            tracing::warn!("cannot write {}: {error}", path.display());
        }
    }

    /// Removes the control socket at a clean stop.
    pub fn remove_control(&self) {
        let _ = std::fs::remove_file(self.path.join(CONTROL_SOCKET));
    }
}

/// What the last agent in `run_dir` used, if one left word.
#[must_use]
pub fn recall(run_dir: &Path) -> Option<Remembered> {
    toml::from_str(&std::fs::read_to_string(run_dir.join(MEMORY_FILE)).ok()?).ok()
}

/// Makes way for a socket at `path`: one that nobody listens on any more is removed.
///
/// # Errors
/// [`Kind::Conflict`]: something is there that is no socket, or a process listens on it.
fn clear_stale_socket(path: &Path) -> Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("examine", path, &error)),
        Ok(found) => found,
    };
    let in_the_way = |what: &str, remedy: &str| {
        let path = path.display();
        Err(Failure::new(
            Kind::Conflict,
            format!("cannot listen on {path}: {what} is in the way; {remedy}"),
        ))
    };
    if !found.file_type().is_socket() {
        return in_the_way(
            "something that is not a socket",
            "move it away or use another --run-dir",
        );
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            in_the_way("a socket of another process", "stop that process or use another --run-dir")
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| failed("remove the stale", path, &error))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("examine", path, &error)),
    }
}

fn failed(doing: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Kind::Failed, format!("cannot {doing} {}: {error}", path.display()))
}

fn write_pid(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

/// Replaces a file by a rename after a flush: a crash leaves the former one or the new one, whole. Its folder is made if need be.
///
/// # Errors
/// Those of the file system; the former file stands.
pub fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let beside = path.with_extension("json.new");
    let mut file = File::create(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_second_claim_names_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = RunDir::claim(&path).unwrap();
        let error = RunDir::claim(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Conflict);
        assert!(error.message.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        RunDir::claim(&path).unwrap();
    }

    #[test]
    fn the_control_socket_is_private_and_replaces_a_stale_one() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::claim(dir.path()).unwrap();
        drop(run_dir.listen_control().unwrap());
        let _listener = run_dir.listen_control().unwrap();
        let mode = std::fs::metadata(dir.path().join(CONTROL_SOCKET)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_is_in_the_way_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        std::fs::write(&path, "precious").unwrap();
        let error = clear_stale_socket(&path).unwrap_err();
        assert!(
            error.message.contains("x.sock") && error.message.contains("not a socket"),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");

        let live = dir.path().join("live.sock");
        let _listener = UnixListener::bind(&live).unwrap();
        let error = clear_stale_socket(&live).unwrap_err();
        assert!(error.message.contains("another process"), "{error}");
        assert!(live.exists());
    }

    #[test]
    fn memory_survives_and_absence_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(recall(dir.path()).is_none());
        let run_dir = RunDir::claim(dir.path()).unwrap();
        run_dir.remember(&Remembered {
            caches: vec!["/c \"x\"".into()],
            host: Some(uuid::Uuid::from_u128(7)),
        });
        let found = recall(dir.path()).unwrap();
        assert_eq!(found.caches[0].to_str(), Some("/c \"x\""));
        assert_eq!(found.host, Some(uuid::Uuid::from_u128(7)));
        // As former versions left it.
        std::fs::write(dir.path().join(MEMORY_FILE), "caches = [\"/c\"]").unwrap();
        assert_eq!(recall(dir.path()).unwrap().host, None);
    }
}
