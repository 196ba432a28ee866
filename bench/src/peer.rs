//! qemu-storage-daemon as a server: a raw file behind its vhost-user-blk export.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process::Process;
use crate::server::Server;

/// A running qemu-storage-daemon.
#[derive(Debug)]
pub struct StorageDaemon {
    process: Process,
    socket: PathBuf,
}

impl StorageDaemon {
    /// The arguments that export `file` on `socket`.
    #[must_use]
    pub fn arguments(file: &str, socket: &str) -> Vec<String> {
        vec![
            "--blockdev".into(),
            format!("driver=file,filename={file},node-name=file,aio=io_uring,cache.direct=on"),
            "--blockdev".into(),
            "driver=raw,file=file,node-name=disk".into(),
            "--export".into(),
            format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},\
                 writable=on,num-queues=1"
            ),
        ]
    }

    /// Exports `file`, with the daemon pinned to `core`; socket and log lie in `dir`.
    ///
    /// # Errors
    /// When the daemon does not come up.
    pub fn start(file: &Path, dir: &Path, core: usize) -> Result<Self> {
        let socket = dir.join("peer.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-storage-daemon");
        command.args(Self::arguments(&file.display().to_string(), &socket.display().to_string()));
        let log = dir.join("peer.log");
        let mut process = Process::spawn("qemu-storage-daemon", command, Some(core), &log)?;
        process.wait_until("its socket", Duration::from_secs(20), || socket.exists())?;
        Ok(Self { process, socket })
    }
}

impl Server for StorageDaemon {
    fn name(&self) -> &'static str {
        "qemu-storage-daemon"
    }

    fn socket(&self) -> &Path {
        &self.socket
    }

    fn process(&self) -> &Process {
        &self.process
    }

    fn settle(&mut self) -> Result<()> {
        Ok(())
    }
}
