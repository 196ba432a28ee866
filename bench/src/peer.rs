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
        let (file, socket) = (file.display().to_string(), dir.join("peer.sock"));
        let arguments = Self::arguments(&file, &socket.display().to_string());
        Self::start_with(arguments, socket, dir, core)
    }

    /// The same for the last of a chain of qcow2 images, the base first; to read only: images may then be shared.
    ///
    /// # Errors
    /// When the daemon does not come up.
    pub fn start_chain(images: &[PathBuf], dir: &Path, core: usize) -> Result<Self> {
        let socket = dir.join("peer.sock");
        let mut arguments = Vec::new();
        let mut backing = String::new();
        for (number, image) in images.iter().enumerate() {
            arguments.extend([
                "--blockdev".to_owned(),
                format!(
                    "driver=file,filename={},node-name=file{number},read-only=on,aio=io_uring,cache.direct=on",
                    image.display()
                ),
                "--blockdev".to_owned(),
                format!("driver=qcow2,file=file{number},node-name=disk{number},read-only=on{backing}"),
            ]);
            backing = format!(",backing=disk{number}");
        }
        arguments.extend([
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=export,node-name=disk{},addr.type=unix,addr.path={},writable=off,num-queues=1",
                images.len() - 1,
                socket.display()
            ),
        ]);
        Self::start_with(arguments, socket, dir, core)
    }

    fn start_with(
        arguments: Vec<String>,
        socket: PathBuf,
        dir: &Path,
        core: usize,
    ) -> Result<Self> {
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-storage-daemon");
        command.args(arguments);
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
