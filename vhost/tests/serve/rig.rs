//! A served disk: a real cache on a temporary file, over a backing in memory that can be unplugged.

use async_trait::async_trait;
use ballast_vhost::{DiskServer, ServerOptions};
use blockstore::types::{Lba, Lsn};
use blockstore::{PolicyChange, SnapshotLabel, WhenOffline};
use bytes::Bytes;
use cache::backing::{Backing, BackingError, Batch, Change};
use cache::disk::AttachedDisk;
use cache::flusher::FlushOptions;
use cache::local::Terms;
use cache::{Cache, CacheError, CacheOptions, SnapshotTaken, VdiIdentity};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use uuid::Uuid;

pub const BLOCK: usize = 4096;

/// Blocks by their address.
pub type Image = HashMap<u64, Bytes>;

/// The shared store's place: a map of blocks behind a cable.
#[derive(Debug)]
pub struct MemoryBacking {
    image: Mutex<(Lsn, Image)>,
    cuts: Mutex<Vec<(Lsn, Image)>>,
    plugged: watch::Sender<bool>,
    away: Mutex<Option<u64>>,
}

impl MemoryBacking {
    fn new() -> Self {
        Self {
            image: Mutex::default(),
            cuts: Mutex::default(),
            plugged: watch::Sender::new(true),
            away: Mutex::default(),
        }
    }

    /// Connects or disconnects the store: while it is away, reads and commits wait.
    pub fn plug(&self, plugged: bool) {
        self.plugged.send_replace(plugged);
    }

    /// What the store says of itself: the outage that goes on, if one does. Without, a store that is not plugged is slow.
    pub fn say_away(&self, outage: Option<u64>) {
        *self.away.lock().unwrap() = outage;
    }

    /// The image at each snapshot.
    pub fn cuts(&self) -> Vec<(Lsn, Image)> {
        self.cuts.lock().unwrap().clone()
    }

    /// Puts a block into the committed image.
    pub fn put(&self, lba: u64, content: Vec<u8>) {
        assert_eq!(content.len(), BLOCK);
        self.image.lock().unwrap().1.insert(lba, content.into());
    }

    async fn reach(&self) {
        let mut plugged = self.plugged.subscribe();
        plugged.wait_for(|plugged| *plugged).await.expect("the sender lives in self");
    }
}

#[async_trait]
impl Backing for MemoryBacking {
    fn committed(&self) -> Lsn {
        self.image.lock().unwrap().0
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        self.reach().await;
        let image = self.image.lock().unwrap();
        Ok((0..u64::from(blocks)).map(|n| image.1.get(&(lba.0 + n)).cloned()).collect())
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        self.reach().await;
        let mut image = self.image.lock().unwrap();
        let mut cuts = batch.cuts.iter();
        for changes in batch.parts() {
            for change in changes {
                match change {
                    Change::Write { lba, data, .. } => {
                        image.1.insert(lba.0, Bytes::copy_from_slice(data));
                    }
                    Change::Zero { lba, blocks } => {
                        (0..*blocks).for_each(|n| drop(image.1.remove(&(lba.0 + n))));
                    }
                }
            }
            let cut = cuts.next().map(|cut| (cut.lsn, image.1.clone()));
            self.cuts.lock().unwrap().extend(cut);
        }
        image.0 = batch.lsn;
        Ok(())
    }

    fn away_since_ms(&self) -> Option<u64> {
        *self.away.lock().unwrap()
    }
}

pub struct Rig {
    pub backing: Arc<MemoryBacking>,
    pub vdi: VdiIdentity,
    cache: Arc<Cache>,
    server: Option<DiskServer>,
    dir: TempDir,
    runtime: Runtime,
}

impl Rig {
    /// A disk of `size` bytes over a cache of `cache` bytes, served with the default options.
    pub fn start(size: u64, cache: u64) -> Self {
        Self::with_options(size, cache, |_| {})
    }

    pub fn with_options(size: u64, cache: u64, change: impl FnOnce(&mut ServerOptions)) -> Self {
        Self::with_flusher(size, cache, 20, change)
    }

    /// As [`Self::start`], and what is written is left alone for `max_age_ms`.
    pub fn with_flusher(
        size: u64,
        cache: u64,
        max_age_ms: u64,
        change: impl FnOnce(&mut ServerOptions),
    ) -> Self {
        Self::on_legs(&["cache"], size, cache, max_age_ms, change)
    }

    /// As [`Self::start`], on a mirrored cache.
    pub fn mirrored(size: u64, cache: u64) -> Self {
        Self::on_legs(&["cache", "twin"], size, cache, 20, |_| {})
    }

    fn on_legs(
        legs: &[&str],
        size: u64,
        cache: u64,
        max_age_ms: u64,
        change: impl FnOnce(&mut ServerOptions),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let backing = Arc::new(MemoryBacking::new());
        let vdi = VdiIdentity { uuid: Uuid::new_v4(), name: "disk".into(), size_bytes: size };
        let mut options = ServerOptions::new(dir.path().join("disk.sock"));
        change(&mut options);
        let listening = DiskServer::listen(options).unwrap();
        let (opened, disk) = runtime.block_on(async {
            let options = CacheOptions {
                path: dir.path().join("cache"),
                create_size: Some(cache),
                flush: FlushOptions { max_age_ms, ..FlushOptions::default() },
                image_bytes: 4 << 20,
            };
            let legs: Vec<_> = legs.iter().map(|leg| dir.path().join(leg)).collect();
            let opened = Cache::open_legs(options, &legs, &Terms::default()).await.unwrap();
            opened.bind(Uuid::new_v4()).await.unwrap();
            opened.reserve(&vdi).await.unwrap();
            let disk = opened.attach(&vdi, backing.clone()).await.unwrap();
            (opened, disk)
        });
        let server = listening.run(disk).unwrap();
        Self { backing, vdi, cache: opened, server: Some(server), dir, runtime }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    pub fn server(&self) -> &DiskServer {
        self.server.as_ref().unwrap()
    }

    /// Stops serving and gives the disk back as a driver would hand it on.
    pub fn stop(&mut self) -> AttachedDisk {
        self.server.take().unwrap().stop()
    }

    /// Serves the disk again.
    pub fn serve(&mut self, disk: AttachedDisk) {
        let listening = DiskServer::listen(ServerOptions::new(self.socket())).unwrap();
        self.server = Some(listening.run(disk).unwrap());
    }

    /// Returns when everything acknowledged is in the backing's image.
    pub fn drain(&self) {
        self.runtime.block_on(self.cache.drain(self.vdi.uuid)).unwrap();
    }

    /// Takes a snapshot, from any thread.
    pub fn snapshotter(&self) -> impl Fn() -> Result<SnapshotTaken, CacheError> + Send + 'static {
        let (cache, vdi) = (Arc::clone(&self.cache), self.vdi.uuid);
        let runtime = self.runtime.handle().clone();
        move || runtime.block_on(cache.snapshot(vdi, SnapshotLabel::default()))
    }

    /// Last LSN given out, and last LSN that is durable.
    pub fn lsns(&self) -> (u64, u64) {
        let status = self.cache.vdi_status(self.vdi.uuid).unwrap();
        (status.last_lsn, status.flushed_lsn)
    }

    /// What becomes of requests that cannot go on without the store.
    pub fn when_offline(&self, policy: WhenOffline) {
        let change = PolicyChange { when_offline: Some(policy), ..PolicyChange::default() };
        self.runtime.block_on(self.cache.set_policy(self.vdi.uuid, change)).unwrap();
    }

    /// No segment of the ring is free or could be.
    pub fn is_full(&self) -> bool {
        let status = self.cache.status();
        status.free_bytes + status.clean_bytes == 0
    }

    /// Legs that are members.
    pub fn members(&self) -> usize {
        self.cache.legs().iter().filter(|leg| leg.member).count()
    }

    /// A file that answers no read until something is written to it.
    pub fn silent_file(&self) -> File {
        let path = self.dir.path().join("silent");
        if !path.exists() {
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        File::options().read(true).write(true).open(&path).unwrap()
    }

    /// Grows the disk.
    pub fn resize(&self, bytes: u64) {
        self.runtime.block_on(self.cache.resize(self.vdi.uuid, bytes)).unwrap();
    }

    /// Flips a bit in each copy of `content` on the cache device; returns how many there were.
    pub fn corrupt(&self, content: &[u8]) -> usize {
        let file =
            File::options().read(true).write(true).open(self.dir.path().join("cache")).unwrap();
        let blocks = file.metadata().unwrap().len() / BLOCK as u64;
        let mut found = 0;
        let mut block = vec![0; BLOCK];
        for at in (0..blocks).map(|n| n * BLOCK as u64) {
            file.read_exact_at(&mut block, at).unwrap();
            if block == content {
                file.write_all_at(&[content[77] ^ 1], at + 77).unwrap();
                found += 1;
            }
        }
        file.sync_all().unwrap();
        found
    }

    /// Waits until `condition` holds; gives up after half a minute.
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        for _ in 0..3000 {
            if condition(self) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("never happened: {what}; {:?}", self.server.as_ref().map(DiskServer::stats));
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.backing.plug(true);
        if let Some(server) = self.server.take() {
            let disk = server.stop();
            let _ = self.runtime.block_on(self.cache.release(self.vdi.uuid, disk));
        }
        self.runtime.block_on(self.cache.close());
    }
}
