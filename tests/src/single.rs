//! A disk used one request at a time, on a SAN that can be cut: for tests that look at single answers.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bench::front_end::Request;
use serde_json::Value;
use tempfile::TempDir;

use crate::agent_rig::{AgentRig, StoreSpec};
use crate::client::SECTOR;
use crate::client::port::{BlockPort, Event};
use crate::client::ring_port::RingPort;
use crate::targets::{TcpRelay, TgtOptions, TgtTarget};

const STORE_BYTES: u64 = 1 << 30;
/// Bytes of a request.
pub const CHUNK: usize = 64 << 10;
/// The byte that each chunk of a disk is full of; those that are not named: zero.
pub type Content = BTreeMap<u64, u8>;
/// For what must come to an end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// A target behind a relay.
#[derive(Debug)]
pub struct San {
    relay: TcpRelay,
    target: TgtTarget,
    _dir: TempDir,
}

impl San {
    /// Both, with an empty backing file.
    ///
    /// # Errors
    /// When the target is not installed or does not start.
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let target = TgtTarget::start(dir.path(), STORE_BYTES, TgtOptions::default())?;
        let relay = TcpRelay::start(target.address())?;
        Ok(Self { relay, target, _dir: dir })
    }

    /// An agent for a store on the target, with a cache of `cache_bytes`.
    ///
    /// # Errors
    /// As [`AgentRig::new`].
    pub fn rig(&self, cache_bytes: u64) -> Result<AgentRig> {
        let store = StoreSpec::url(self.target.url_through(self.relay.address()), STORE_BYTES);
        AgentRig::new(&store, cache_bytes)
    }

    /// Bytes of its disk that the file behind the LUN takes.
    ///
    /// # Errors
    /// The system's.
    pub fn bytes_taken(&self) -> Result<u64> {
        Ok(std::fs::metadata(self.target.image())?.blocks() * 512)
    }

    /// The file behind the LUN.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.target.image()
    }

    /// Lets the relay fall silent.
    pub fn cut(&self) {
        self.relay.refuse(true);
        self.relay.black_hole();
    }

    /// Lets it speak again.
    pub fn restore(&self) {
        self.relay.refuse(false);
    }
}

/// A disk, used one request at a time.
#[derive(Debug)]
pub struct Disk(RingPort);

impl Disk {
    /// A front end of the disk at `socket`.
    ///
    /// # Errors
    /// As [`AgentRig::connect`].
    pub fn connect(rig: &mut AgentRig, socket: &Path) -> Result<Self> {
        Ok(Self(rig.connect(|| RingPort::connect(socket, 4, 4))?))
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When the ring does not take it.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        self.0.submit(0, &request)?;
        self.0.kick()
    }

    /// Whether it was answered well.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn answer(&mut self) -> Result<bool> {
        match self.0.next(PATIENCE)? {
            Event::Completed { ok, .. } => Ok(ok),
            other => anyhow::bail!("no answer: {other:?}"),
        }
    }

    /// True if there is no answer yet.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn is_waiting(&mut self) -> Result<bool> {
        Ok(self.0.next(Duration::ZERO)? == Event::TimedOut)
    }

    /// Asks for the chunk at `at` to be written full of `byte`.
    ///
    /// # Errors
    /// When the ring does not take it.
    pub fn begin_write(&mut self, at: u64, byte: u8) -> Result<()> {
        self.0.buffer(0)[..CHUNK].fill(byte);
        self.submit(Request::Write { sector: at / SECTOR as u64, sectors: sectors() })
    }

    /// Writes the chunk at `at` full of `byte`.
    ///
    /// # Errors
    /// When the disk does not answer, or with an error.
    pub fn write(&mut self, at: u64, byte: u8) -> Result<()> {
        self.begin_write(at, byte)?;
        ensure!(self.answer()?, "the write at {at} failed");
        Ok(())
    }

    /// Flushes.
    ///
    /// # Errors
    /// When the disk does not answer, or with an error.
    pub fn flush(&mut self) -> Result<()> {
        self.submit(Request::Flush)?;
        ensure!(self.answer()?, "the flush failed");
        Ok(())
    }

    /// Asks for the chunk at `at`.
    ///
    /// # Errors
    /// When the disk does not answer, or with an error.
    pub fn begin_read(&mut self, at: u64) -> Result<()> {
        self.0.buffer(0)[..CHUNK].fill(0xee);
        self.submit(Request::Read { sector: at / SECTOR as u64, sectors: sectors() })
    }

    /// The byte that the chunk at `at` is full of; none if the read failed.
    ///
    /// # Errors
    /// When the disk does not answer, or with an error.
    pub fn end_read(&mut self, at: u64) -> Result<Option<u8>> {
        if !self.answer()? {
            return Ok(None);
        }
        let found = &self.0.buffer(0)[..CHUNK];
        let byte = found[0];
        ensure!(found.iter().all(|b| *b == byte), "the chunk at {at} is torn");
        Ok(Some(byte))
    }

    /// Both of them.
    ///
    /// # Errors
    /// When the disk does not answer, or with an error.
    pub fn read(&mut self, at: u64) -> Result<Option<u8>> {
        self.begin_read(at)?;
        self.end_read(at)
    }
}

fn sectors() -> u32 {
    (CHUNK / SECTOR) as u32
}

/// The answer to a command line, split at spaces.
///
/// # Errors
/// The command's.
pub fn control(rig: &AgentRig, line: &str) -> Result<Value> {
    rig.agent()?.control(&line.split(' ').collect::<Vec<_>>())
}

/// Asks for what `status` says until `wanted` holds.
///
/// # Errors
/// When it never does.
pub fn until(rig: &AgentRig, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        let status = control(rig, "status")?;
        if wanted(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "never {what}; the status is {status:#}\n{}", rig.log_tail());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Writes to the only disk, whose store is away, until its log is full: the last write is not answered.
///
/// # Errors
/// The disk's.
pub fn fill_log(rig: &AgentRig, disk: &mut Disk, bytes: u64) -> Result<()> {
    let is_full = |status: &Value| status["vdis"][0]["waiting"]["writes"] != 0;
    let mut at = 0;
    loop {
        disk.begin_write(at, 7)?;
        at = (at + CHUNK as u64) % bytes;
        let begun = Instant::now();
        while disk.is_waiting()? {
            // Slowed down, or stuck.
            if begun.elapsed() > Duration::from_secs(5) && is_full(&control(rig, "status")?) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Detaches the only disk, `db`, whose front end has just gone: that may not be noticed yet.
///
/// # Errors
/// It stays connected; the command's.
pub fn detach(rig: &AgentRig) -> Result<()> {
    until(rig, "disconnected", |status| status["vdis"][0]["front_end_connected"] == false)?;
    control(rig, "vdi detach db").map(drop)
}

/// What the store has of a disk or snapshot, as another process reads it.
///
/// # Errors
/// The command's.
pub fn in_the_store(rig: &AgentRig, what: &str) -> Result<Vec<u8>> {
    Ok(std::fs::read(rig.export(what)?)?)
}

/// Compares an image with what is expected of `bytes` of it.
///
/// # Errors
/// Says where it differs.
pub fn ensure_same(found: &[u8], bytes: u64, expected: &Content, what: &str) -> Result<()> {
    ensure!(found.len() as u64 == bytes, "{what} has {} bytes", found.len());
    for (chunk, at) in found.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
        let byte = expected.get(&at).copied().unwrap_or_default();
        ensure!(chunk.iter().all(|found| *found == byte), "{what} at {at}: not {byte} throughout");
    }
    Ok(())
}
