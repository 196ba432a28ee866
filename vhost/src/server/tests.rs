//! What only shows from inside: a worker that panics, and a disk that cannot be served.

use super::*;
use async_trait::async_trait;
use blockstore::types::{Lba, Lsn};
use bytes::Bytes;
use cache::backing::{Backing, BackingError, Batch};
use cache::flusher::FlushOptions;
use cache::{Cache, CacheError, CacheOptions, VdiIdentity};
use std::io::Read;
use std::time::Instant;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

const SIZE: u64 = 1 << 20;

/// A store that holds nothing and is never written to.
#[derive(Debug)]
struct Empty;

#[async_trait]
impl Backing for Empty {
    fn committed(&self) -> Lsn {
        Lsn(0)
    }

    async fn read(&self, _: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        Ok(vec![None; blocks as usize])
    }

    async fn commit(&self, _: Batch) -> Result<(), BackingError> {
        std::future::pending().await
    }
}

/// A disk that is attached, and what it needs around it.
struct Attached {
    runtime: Runtime,
    cache: Arc<Cache>,
    vdi: Uuid,
    folder: TempDir,
}

impl Attached {
    fn new() -> (Self, AttachedDisk) {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let vdi = VdiIdentity { uuid: Uuid::new_v4(), name: "disk".into(), size_bytes: SIZE };
        let (cache, disk) = runtime.block_on(async {
            let options = CacheOptions {
                path: folder.path().join("cache"),
                create_size: Some(64 << 20),
                flush: FlushOptions::default(),
                image_bytes: 4 << 20,
            };
            let cache = Cache::open(options).await.unwrap();
            cache.bind(Uuid::new_v4()).await.unwrap();
            cache.reserve(&vdi).await.unwrap();
            let disk = cache.attach(&vdi, Arc::new(Empty)).await.unwrap();
            (cache, disk)
        });
        (Self { runtime, cache, vdi: vdi.uuid, folder }, disk)
    }

    fn listen(&self) -> Listening {
        DiskServer::listen(ServerOptions::new(self.folder.path().join("disk.sock"))).unwrap()
    }

    fn release(&self, disk: AttachedDisk) -> Result<(), CacheError> {
        let result = self.runtime.block_on(self.cache.release(self.vdi, disk));
        self.runtime.block_on(self.cache.close());
        result
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < give_up, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_panic_in_the_worker_costs_this_disk_only_and_the_disk_is_handed_back() {
    let (attached, disk) = Attached::new();
    let server = attached.listen().run(disk).unwrap();
    let mut front_end = UnixStream::connect(server.path()).unwrap();
    wait_until("connected", || server.stats().connected);
    let answer = server.worker.call(Request::Panic);
    assert!(answer.is_err());
    assert_eq!(front_end.read(&mut [0; 1]).unwrap(), 0, "the front end is cut off");
    wait_until("socket removed", || !server.path().exists());
    assert!(server.stats().worker_failed);
    let disk = server.stop();
    assert_eq!(disk.disk.size_bytes(), SIZE);
    let error = attached.release(disk).unwrap_err().to_string();
    assert!(error.contains("the worker panicked"), "{error}");
}

#[test]
fn a_disk_that_cannot_be_served_is_handed_back_and_can_be_served_later() {
    let (attached, mut disk) = Attached::new();
    let legs = std::mem::take(&mut disk.legs);
    let NotServed { error, mut disk } = *attached.listen().run(disk).unwrap_err();
    assert!(error.to_string().contains("disk.sock"), "{error}");
    disk.legs = legs;
    let server = attached.listen().run(disk).unwrap();
    attached.release(server.stop()).unwrap();
}
