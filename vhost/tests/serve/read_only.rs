//! Goal: a disk that only reads serves exactly its image, over all that front ends and stores do, and takes nothing that writes.
//! Method: an image in memory that can be unplugged, served as a snapshot is: with nothing on a cache device.

use super::data::pattern;
use super::guest::{DATA, Guest, IOERR, OK, RING, feature};
use super::rig::BLOCK;
use async_trait::async_trait;
use ballast_vhost::{DiskServer, ServerOptions, Stats};
use blockstore::types::Lba;
use bytes::Bytes;
use cache::backing::BackingError;
use cache::read_only::{self, Image, Reader};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

/// Bytes of the disk: its last block is not whole.
const SIZE: usize = 600 * BLOCK + 512;
const UNSUPP: u8 = 2;
/// Blocks that are a hole, and one that is damaged.
const HOLE: std::ops::Range<u64> = 100..110;
const DAMAGED: u64 = 50;

#[derive(Debug)]
struct Still {
    plugged: watch::Sender<bool>,
    reading: AtomicUsize,
}

struct Leaves<'a>(&'a AtomicUsize);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Image for Still {
    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        self.reading.fetch_add(1, Ordering::SeqCst);
        let _leaves = Leaves(&self.reading);
        let _ = self.plugged.subscribe().wait_for(|plugged| *plugged).await;
        let range = lba.0..lba.0 + u64::from(blocks);
        if range.contains(&DAMAGED) {
            return Err(BackingError::Corrupt("as the test wants it".into()));
        }
        let block = |n: u64| (!HOLE.contains(&n)).then(|| pattern(n, BLOCK).into());
        Ok(range.map(block).collect())
    }
}

struct Rig {
    image: Arc<Still>,
    served: Option<(DiskServer, Reader)>,
    dir: TempDir,
    runtime: Runtime,
}

impl Rig {
    fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let image = Still { plugged: watch::Sender::new(true), reading: AtomicUsize::new(0) };
        let dir = tempfile::tempdir().unwrap();
        let mut rig = Self { image: Arc::new(image), served: None, dir, runtime };
        rig.serve();
        rig
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    fn serve(&mut self) {
        let options = ServerOptions { read_only: true, ..ServerOptions::new(self.socket()) };
        let listening = DiskServer::listen(options).unwrap();
        let _in_runtime = self.runtime.enter();
        let (disk, reader) = read_only::open(SIZE as u64, Arc::clone(&self.image) as _).unwrap();
        self.served = Some((listening.run(disk).unwrap(), reader));
    }

    fn stop(&mut self) {
        let (server, reader) = self.served.take().unwrap();
        drop(server.stop());
        self.runtime.block_on(reader.end());
        assert_eq!(
            self.image.reading.load(Ordering::SeqCst),
            0,
            "nothing reads the image any more"
        );
    }

    fn stats(&self) -> Stats {
        self.served.as_ref().unwrap().0.stats()
    }

    fn plug(&self, plugged: bool) {
        self.image.plugged.send_replace(plugged);
    }

    fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        for _ in 0..3000 {
            if condition(self) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("never happened: {what}; {:?}", self.stats());
    }
}

/// What the guest is to see of these bytes.
fn expected(from: usize, len: usize) -> Vec<u8> {
    let block = |n: u64| if HOLE.contains(&n) { vec![0; BLOCK] } else { pattern(n, BLOCK) };
    let (first, last) = (from / BLOCK, (from + len).div_ceil(BLOCK));
    let bytes: Vec<u8> = (first as u64..last as u64).flat_map(block).collect();
    bytes[from - first * BLOCK..][..len].to_vec()
}

#[test]
fn it_says_that_it_is_read_only_and_takes_nothing_that_writes() {
    let mut rig = Rig::start();
    let everything = feature::USUAL | 1 << 5 | 1 << 13 | 1 << 14;
    let mut guest = Guest::connect(&rig.socket(), 1, everything);
    let offered = guest.front_end.get_features().unwrap();
    assert_eq!(offered >> 5 & 1, 1, "VIRTIO_BLK_F_RO");
    assert_eq!((offered >> 13 & 1, offered >> 14 & 1), (0, 0), "no discard, no zeroes");
    assert_eq!(guest.config(0, 8), (SIZE as u64 / 512).to_le_bytes());
    for sector in [0, 3, 8 * 200] {
        assert_eq!(guest.write(sector, &[9; 512]), IOERR);
        assert_eq!(guest.write(sector, &[9; 4 * BLOCK]), IOERR);
        assert_eq!(guest.zero(11, sector, 8), UNSUPP, "discard was not offered");
        assert_eq!(guest.zero(13, sector, 8), UNSUPP, "nor was zeroing");
    }
    // Neither what went before nor the write cache makes a flush more than it is.
    assert_eq!(guest.flush(), OK);
    guest.set_write_cache(false);
    assert_eq!(guest.flush(), OK);
    let stats = rig.stats();
    assert_eq!((stats.writes, stats.zeroings, stats.flushes, stats.failed), (0, 0, 2, 0));
    assert_eq!(guest.read(0, BLOCK), Ok(expected(0, BLOCK)));
    drop(guest);
    rig.stop();
}

#[test]
fn reads_are_the_image_to_the_last_sector() {
    let mut rig = Rig::start();
    let mut guest = Guest::simple(&rig.socket());
    // Whole and parts, through holes, more than one span, the part of a block at the end; again, since nothing is kept.
    for _ in 0..2 {
        for (from, len) in [
            (0, BLOCK),
            (512, 512),
            (BLOCK - 512, 1024),
            (98 * BLOCK + 1536, 14 * BLOCK),
            (120 * BLOCK, 400 * BLOCK),
            (120 * BLOCK + 512, 300 * BLOCK),
            (SIZE - 512, 512),
            (SIZE - 512 - BLOCK, BLOCK + 512),
        ] {
            let found = guest.read((from / 512) as u64, len);
            assert!(found == Ok(expected(from, len)), "{len} bytes at {from}");
        }
    }
    assert_eq!(guest.read((SIZE / 512) as u64, 512), Err(IOERR), "beyond its end");
    // One damaged block is the error of its request and of no other.
    assert_eq!(guest.read(DAMAGED * 8, BLOCK), Err(IOERR));
    assert_eq!(guest.read((DAMAGED - 2) * 8, 4 * BLOCK), Err(IOERR));
    let after = expected(51 * BLOCK, BLOCK);
    assert_eq!(guest.read((DAMAGED + 1) * 8, BLOCK), Ok(after));
    assert_eq!(rig.stats().failed, 2);
    drop(guest);
    rig.stop();
}

#[test]
fn reads_wait_for_a_store_that_is_away_and_outlive_their_server() {
    let mut rig = Rig::start();
    rig.plug(false);
    let mut guest = Guest::negotiate(&rig.socket(), feature::USUAL).unwrap();
    let wanted = VhostUserInflight::new(0, 0, 1, RING);
    let (region, file) = guest.front_end.get_inflight_fd(&wanted).unwrap();
    guest.front_end.set_inflight_fd(&region, std::os::fd::AsRawFd::as_raw_fd(&file)).unwrap();
    guest.add_queue(0);
    guest.start_queue(0, 0);
    let first = guest.queues[0].submit(0, 0, &[(DATA, 4096, true)]);
    // What needs no image is answered meanwhile.
    let flush = guest.queues[0].submit(4, 0, &[]);
    assert_eq!(guest.queues[0].next_used(), (flush, 1, OK), "out of order");
    guest.poke(DATA + 0x10000, &[9; 512]);
    let write = guest.queues[0].submit(1, 0, &[(DATA + 0x10000, 512, false)]);
    assert_eq!(guest.queues[0].next_used(), (write, 1, IOERR));
    let second = guest.queues[0].submit(0, 8, &[(DATA + 0x1000, 4096, true)]);
    rig.wait_until("both are asked for", |rig| rig.stats().fetching == 2);
    // It stops although they wait, and nothing of them goes on; another server takes them up.
    rig.stop();
    rig.serve();
    let mut guest = guest.reconnect_tracked(&rig.socket(), &region, &file, 2);
    rig.wait_until("both are asked for again", |rig| rig.stats().in_flight == 2);
    rig.plug(true);
    let mut done = [guest.queues[0].next_used(), guest.queues[0].next_used()];
    done.sort_unstable();
    let mut all = [(first, 4097, OK), (second, 4097, OK)];
    all.sort_unstable();
    assert_eq!(done, all);
    assert_eq!(guest.peek(DATA, 2 * BLOCK), expected(0, 2 * BLOCK));
    assert_eq!(guest.queues[0].try_used(), None);
    drop(guest);
    rig.stop();
}
