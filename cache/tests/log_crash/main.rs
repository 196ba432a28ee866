//! Goal: whatever a guest did and whenever the power or the agent failed, the recovered disk is a prefix of the log that
//! holds everything a completed flush covered (P1, P2), and, if only the agent died, everything acknowledged (rule L1); the
//! image that the flusher commits is at every LSN, and at every snapshot, exactly the disk as it was then; a snapshot that was
//! answered is in the recovered log (P5). On two legs all of this holds although
//! one of them is lost, damaged or left behind at any moment (rule L5, `legs.rs`), and while another takes its place
//! (`replacing.rs`).
//! Method: the real `Disk`, recovery and flusher on simulated devices whose unflushed writes get lost, torn and
//! reordered at a crash; a seeded guest; a model that keeps the log of what the guest did. `CACHE_SEEDS=N` runs more.

mod legs;
mod replacing;
mod snapshots;

use async_trait::async_trait;
use blockstore::crc::crc32c;
use blockstore::device::BlockDevice;
use blockstore::device::sim::SimDevice;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn, SECTOR_SIZE};
use bytes::Bytes;
use cache::backing::{Backing, BackingError, Batch, Change};
use cache::disk::plan::{BlockSource, Piece, ReadPlan, SegmentId};
use cache::disk::{Action, Disk, Identity, OpId, Progress, Staged, Start};
use cache::flusher::{self, Replay};
use cache::format::slot::SlotVdi;
use cache::image::ImagePool;
use cache::link::{self, FromDisk, Grant, Link, SealedSegment, ToDisk};
use cache::local::Local;
use cache::pool::Pool;
use cache::recovery;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// Blocks of the disk under test: few, so that everything is overwritten often.
const BLOCKS: u64 = 48;
const SECTORS: u64 = BLOCKS * 8;
const VDI: Uuid = Uuid::from_u128(0xd15c);
const LOG_ID: u128 = 77;

/// One sector's content: which operation wrote it (0: zeros).
type Image = Vec<u32>;

/// What the guest did: entry n - 1 has LSN n. The parts of a request that was split have one each.
#[derive(Clone, Debug)]
struct Done {
    sectors: std::ops::Range<u64>,
    /// Stamp, 0 for zeroing.
    stamp: u32,
}

#[derive(Debug, Default)]
struct Store {
    image: Mutex<(Image, u64)>,
    snapshots: Mutex<BTreeMap<u64, Image>>,
}

#[derive(Debug)]
struct StoreHandle(Arc<Store>);

#[async_trait]
impl Backing for StoreHandle {
    fn committed(&self) -> Lsn {
        Lsn(self.0.image.lock().unwrap().1)
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        let image = self.0.image.lock().unwrap();
        Ok((0..u64::from(blocks)).map(|n| Some(block_of(&image.0, lba.0 + n).into())).collect())
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        let mut image = self.0.image.lock().unwrap();
        let cuts = snapshots::images_at_cuts(&batch, &mut image.0, apply);
        self.0.snapshots.lock().unwrap().extend(cuts);
        assert!(batch.lsn.0 > image.1, "commits go forward");
        image.1 = batch.lsn.0;
        Ok(())
    }
}

fn apply(image: &mut Image, changes: &[Change]) {
    let mut next = 0;
    for change in changes {
        let (lba, blocks) = match change {
            Change::Write { lba, crc, data } => {
                assert_eq!(crc32c(data), *crc, "the checksum of a change is that of its data");
                for (n, sector) in data.chunks_exact(SECTOR_SIZE).enumerate() {
                    image[lba.0 as usize * 8 + n] = stamp_of(sector, lba.0 * 8 + n as u64);
                }
                (lba.0, 1)
            }
            Change::Zero { lba, blocks } => {
                image[lba.0 as usize * 8..(lba.0 + blocks) as usize * 8].fill(0);
                (lba.0, *blocks)
            }
        };
        assert!(lba >= next, "changes are sorted and disjoint");
        next = lba + blocks;
    }
}

/// A sector that names itself and the operation that wrote it.
fn sector(stamp: u32, sector: u64) -> [u8; SECTOR_SIZE] {
    let mut bytes = [0u8; SECTOR_SIZE];
    if stamp != 0 {
        for chunk in bytes.chunks_exact_mut(16) {
            chunk[..4].copy_from_slice(&stamp.to_le_bytes());
            chunk[4..12].copy_from_slice(&sector.to_le_bytes());
        }
    }
    bytes
}

fn stamp_of(bytes: &[u8], at: u64) -> u32 {
    let stamp = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    assert_eq!(bytes, sector(stamp, at), "sector {at} is torn or misdirected");
    stamp
}

fn block_of(image: &Image, lba: u64) -> Vec<u8> {
    (lba * 8..lba * 8 + 8).flat_map(|at| sector(image[at as usize], at)).collect()
}

struct Rig {
    rng: SmallRng,
    sims: Vec<SimDevice>,
    faults: legs::Faults,
    replacing: replacing::Replacing,
    local: Arc<Local>,
    /// What the cache has to say to the disk.
    link: Link,
    disk: Disk,
    store: Arc<Store>,
    slot: SlotVdi,
    images: Arc<ImagePool>,
    pool: Arc<Pool>,
    wants: bool,
    sealed: VecDeque<SealedSegment>,
    pending: Vec<Action>,
    done_ops: Vec<(OpId, Result<(), i32>)>,
    log: Vec<Done>,
    next_tag: u64,
    next_stamp: u32,
    /// Requests not completed: tag → LSN they reach, and whether it was a flush.
    open: BTreeMap<u64, (u64, bool)>,
    acked: u64,
    flushed: u64,
    through: bool,
    stalled: u32,
    evicting: BTreeSet<SegmentId>,
    snapshots: snapshots::Snapshots,
}

impl Rig {
    async fn new(seed: u64, legs: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let sims: Vec<_> = (0..legs).map(|_| SimDevice::new(16 << 20, rng.random())).collect();
        let local = Arc::new(Local::make_legs(legs::named(&sims)).await.unwrap());
        let store = Arc::new(Store {
            image: Mutex::new((vec![0; SECTORS as usize], 0)),
            snapshots: Mutex::default(),
        });
        let slot = SlotVdi {
            uuid: VDI,
            log_id: LOG_ID,
            name: "disk".into(),
            size_bytes: BLOCKS * BLOCK_SIZE as u64,
            committed: Lsn(0),
            evicted_below: 1,
            sequence_seen: 1,
            epoch: 0,
            first_lsn: Lsn(1),
            durable: Lsn(0),
            policy: Default::default(),
            left_behind: None,
            boot_trace: Vec::new(),
        };
        // Few segments of the device are used, so that the ring wraps often.
        let free = (0..rng.random_range(5..local.geometry.segments)).map(SegmentId).collect();
        let images = ImagePool::new(local.geometry.segment_size as usize, 4);
        let start =
            start(&local, &slot, &images, Lsn(0), Lsn(0), Default::default(), vec![], vec![]);
        let (link, local_members) = joined(&local);
        let faults = legs::Faults::new(&mut rng, legs);
        let pool = Arc::new(Pool::new(local.geometry, free, 1));
        let mut rig = Self {
            rng,
            sims,
            faults,
            replacing: replacing::Replacing::default(),
            local,
            link,
            disk: Disk::on_legs(start, local_members),
            store,
            slot,
            images,
            pool,
            wants: true,
            sealed: VecDeque::new(),
            pending: Vec::new(),
            done_ops: Vec::new(),
            log: Vec::new(),
            next_tag: 1,
            next_stamp: 1,
            open: BTreeMap::new(),
            acked: 0,
            flushed: 0,
            through: false,
            stalled: 0,
            evicting: BTreeSet::new(),
            snapshots: snapshots::Snapshots::default(),
        };
        rig.feed();
        rig
    }

    fn feed(&mut self) {
        if self.wants
            && let Some(grant) = self.pool.grant(VDI)
        {
            self.wants = false;
            // From the seed.
            let grant = Grant { nonce: self.rng.random(), roomy: true, ..grant };
            self.disk.on_message(ToDisk::Segment(grant));
        }
    }

    fn guest(&mut self) {
        let tag = self.next_tag;
        self.staged_snapshots(0);
        let before = self.disk.staged_lsn().0;
        match self.rng.random_range(0..100) {
            0..70 => {
                let len = match self.rng.random_range(0..10) {
                    0..5 => 8,
                    5..8 => self.rng.random_range(1..8),
                    _ => self.rng.random_range(1..200),
                };
                let from = if len == 8 {
                    self.rng.random_range(0..BLOCKS) * 8
                } else {
                    self.rng.random_range(0..SECTORS - len)
                };
                let stamp = self.next_stamp;
                let mut parts = Vec::new();
                let staged =
                    self.disk.write(tag, from, len as usize * SECTOR_SIZE, &mut |at, dst| {
                        let first = from + (at / SECTOR_SIZE) as u64;
                        parts.push(first..first + (dst.len() / SECTOR_SIZE) as u64);
                        for (n, out) in dst.chunks_exact_mut(SECTOR_SIZE).enumerate() {
                            out.copy_from_slice(&sector(
                                stamp,
                                from + (at / SECTOR_SIZE + n) as u64,
                            ));
                        }
                    });
                self.next_stamp += 1;
                assert_ne!(staged, Staged::Failed);
                self.staged(before, parts, stamp, tag, staged);
            }
            70..80 => {
                let len = self.rng.random_range(1..120);
                let from = self.rng.random_range(0..SECTORS - len);
                let discard = self.rng.random_bool(0.5);
                let staged = self.disk.zero(tag, from, len, discard);
                let range = if discard {
                    from.next_multiple_of(8)..((from + len) / 8 * 8)
                } else {
                    from..from + len
                };
                if staged == Staged::All && self.disk.staged_lsn().0 == before {
                    self.next_tag += 1;
                    return;
                }
                let parts = if staged == Staged::All { vec![range] } else { vec![] };
                self.staged(before, parts, 0, tag, staged);
            }
            80..83 => self.snapshot(),
            83..98 => {
                self.next_tag += 1;
                self.open.insert(tag, (before, true));
                self.disk.flush(tag);
            }
            98 => {
                self.through = !self.through;
                self.disk.set_write_through(self.through);
            }
            _ => self.disk.on_message(ToDisk::Tick),
        }
    }

    fn staged(
        &mut self,
        before: u64,
        parts: Vec<std::ops::Range<u64>>,
        stamp: u32,
        tag: u64,
        staged: Staged,
    ) {
        self.next_tag += 1;
        let after = self.disk.staged_lsn().0;
        self.staged_snapshots(parts.len() as u64);
        let before = before.max(self.log.len() as u64);
        assert_eq!(after - before, parts.len() as u64, "INV-LOG-1: one LSN for each part");
        self.log.extend(parts.into_iter().map(|sectors| Done { sectors, stamp }));
        if staged == Staged::All {
            self.open.insert(tag, (after, false));
        } else {
            self.stalled += 1;
        }
    }

    /// The disk hears what the cache has to say.
    fn listen(&mut self) {
        while let Some(message) = self.link.try_recv() {
            self.disk.on_message(message);
        }
    }

    /// Polls the disk and takes note of what it says.
    fn poll(&mut self) {
        let mut actions = Vec::new();
        self.disk.poll(&mut actions);
        self.staged_snapshots(0);
        for action in actions {
            match action {
                Action::Send(message) => self.told(message),
                io => self.pending.push(io),
            }
        }
        let through = self.through;
        let flushed_lsn = self.disk.flushed_lsn().0;
        for (tag, ok) in self.disk.completions() {
            assert!(ok, "nothing failed, so nothing is answered with an error");
            let Some((lsn, is_flush)) = self.open.remove(&tag) else { continue };
            if !is_flush {
                let older =
                    self.open.values().filter(|(_, flush)| !flush).map(|(lsn, _)| *lsn).min();
                assert!(older.is_none_or(|older| older > lsn), "writes complete in LSN order");
                self.acked = self.acked.max(lsn);
            }
            if is_flush {
                self.flushed = self.flushed.max(self.acked.min(lsn));
            }
            if through && flushed_lsn >= lsn {
                self.flushed = self.flushed.max(lsn);
            }
        }
        assert!(self.flushed <= self.disk.flushed_lsn().0);
    }

    fn told(&mut self, message: FromDisk) {
        match message {
            FromDisk::WantSegment => {
                self.wants = true;
                self.feed();
            }
            FromDisk::Sealed(sealed) => {
                assert!(sealed.last_lsn <= self.disk.flushed_lsn(), "INV-LOG-3");
                self.sealed.push_back(sealed);
            }
            FromDisk::Evicted { segment } => {
                self.evicting.remove(&segment);
                let at = self.sealed.iter().position(|s| s.id == segment).unwrap();
                let sealed = self.sealed.remove(at).unwrap();
                // The slot would be written durably here, then the segment freed.
                self.slot.evicted_below = self.slot.evicted_below.max(sealed.seq + 1);
                self.pool.release(segment, false);
                self.feed();
            }
            FromDisk::LegJoined { id } => {
                let sealed: Vec<_> = self.sealed.iter().map(|sealed| sealed.id).collect();
                self.pool.disk_joined(VDI, Some(id), Some(&sealed));
            }
            FromDisk::LegFailed { leg, joining, .. } => self.leg_failed(leg, joining),
            FromDisk::SnapshotTaken { id, result } => self.snapshot_taken(id, result),
            FromDisk::Failed { reason } => panic!("{reason}"),
            _ => {}
        }
    }

    /// Carries out one local I/O, in any order; its completion is reported at some later time.
    async fn device(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.pending.len());
        match self.pending.swap_remove(at) {
            Action::Write { op, leg, offset, image, start, len } => {
                let data = vec![image.slice(start, len)];
                let result = self.sims[usize::from(leg)].write(offset, data).await;
                self.done_ops.push((op, self.result(leg, result)));
            }
            Action::Flush { op, leg } => {
                let result = self.sims[usize::from(leg)].flush().await;
                self.done_ops.push((op, self.result(leg, result)));
            }
            Action::Send(_) => unreachable!(),
        }
    }

    fn complete(&mut self) {
        if !self.done_ops.is_empty() {
            let at = self.rng.random_range(0..self.done_ops.len());
            let (op, result) = self.done_ops.swap_remove(at);
            self.disk.io_done(op, result);
        }
    }

    /// Commits some sealed segments and checks the store's image.
    async fn commit(&mut self) {
        let committed = self.store.image.lock().unwrap().1;
        let most = self.rng.random_range(1..4);
        let in_memory = self.rng.random_bool(0.5);
        let batch: Vec<Replay> = self
            .sealed
            .iter()
            .filter(|s| s.last_lsn.0 > committed)
            .take(most)
            .map(|s| Replay {
                id: s.id,
                seq: s.seq,
                first_lsn: s.first_lsn,
                last_lsn: s.last_lsn,
                used_blocks: s.used_blocks,
                image: s.image.clone().filter(|_| in_memory),
            })
            .collect();
        if batch.is_empty() {
            return;
        }
        let backing = StoreHandle(Arc::clone(&self.store));
        let drafted = flusher::draft(&self.local, VDI, Lsn(committed), batch).await.unwrap();
        let lsn = flusher::commit(VDI, &backing, drafted).await.unwrap();
        let image = self.store.image.lock().unwrap().0.clone();
        assert_eq!(image, self.image_at(lsn.0), "P2: the store's image is the disk at LSN {lsn}");
        self.check_cuts(committed, lsn.0, &self.store.snapshots.lock().unwrap());
        // Sometimes the news reaches nobody before the crash.
        if self.rng.random_bool(0.9) {
            self.slot.committed = lsn;
            self.slot.durable = self.slot.durable.max(self.disk.flushed_lsn());
            self.disk.on_message(ToDisk::Committed { lsn });
        }
    }

    async fn evict(&mut self) {
        let Some(oldest) = self.sealed.iter().find(|s| !self.evicting.contains(&s.id)) else {
            return;
        };
        if oldest.last_lsn > self.slot.committed {
            return;
        }
        let (id, seq, last) = (oldest.id, oldest.seq, oldest.last_lsn);
        let named = flusher::lbas_of(&self.local, VDI, id, seq, last).await.unwrap();
        self.evicting.insert(id);
        self.disk.on_message(ToDisk::Evict { segment: id, lbas: named.lbas, holes: named.zeros });
        self.poll();
    }

    /// The disk as it was at `lsn`.
    fn image_at(&self, lsn: u64) -> Image {
        let mut image = vec![0; SECTORS as usize];
        for done in self.log.iter().take(lsn as usize) {
            image[done.sectors.start as usize..done.sectors.end as usize].fill(done.stamp);
        }
        image
    }

    /// Reads the whole disk through the index. Blocks on their way come from memory.
    fn read_all(&mut self) -> Image {
        let mut out = vec![0; SECTORS as usize];
        let store = self.store.image.lock().unwrap().0.clone();
        let mut plan = ReadPlan::default();
        let mut at = 0;
        while at < SECTORS {
            let len = self.rng.random_range(1..=SECTORS - at);
            self.disk.read(at, len, &mut plan);
            let mut bytes = Vec::new();
            for piece in &plan.pieces {
                match piece {
                    Piece::Local { block, blocks, offset } => {
                        for n in 0..*blocks {
                            let crc = plan.crcs[(block + n) as usize];
                            let at = offset + u64::from(n) * BLOCK_SIZE as u64;
                            bytes.extend(self.block_at(at, crc));
                        }
                    }
                    Piece::Memory { blocks, image, start, .. } => {
                        bytes.extend(image.bytes(*start, *blocks as usize * BLOCK_SIZE));
                    }
                    Piece::Zero { blocks, .. } => {
                        bytes.extend(vec![0; *blocks as usize * BLOCK_SIZE])
                    }
                    Piece::Miss { block, blocks } => {
                        for n in 0..*blocks {
                            bytes.extend(block_of(&store, plan.lba.0 + u64::from(block + n)));
                        }
                    }
                    Piece::Patched { block, patched } => {
                        let lba = plan.lba.0 + u64::from(*block);
                        let mut result = self.source(&patched.base, &store, lba);
                        for overlay in &patched.overlays {
                            let over = self.source(&overlay.source, &store, lba);
                            for n in (0..8).filter(|n| overlay.sectors & (1 << n) != 0) {
                                let range = n * SECTOR_SIZE..(n + 1) * SECTOR_SIZE;
                                result[range.clone()].copy_from_slice(&over[range]);
                            }
                        }
                        bytes.extend(result);
                    }
                }
            }
            self.disk.release(&mut plan);
            for n in 0..len {
                let from = ((at + n) - plan.lba.0 * 8) as usize * SECTOR_SIZE;
                out[(at + n) as usize] = stamp_of(&bytes[from..from + SECTOR_SIZE], at + n);
            }
            at += len;
        }
        out
    }

    fn source(&self, source: &BlockSource, store: &Image, lba: u64) -> Vec<u8> {
        match source {
            BlockSource::Local { offset, crc } => self.block_at(*offset, *crc),
            BlockSource::Memory { image, start } => image.bytes(*start, BLOCK_SIZE).to_vec(),
            BlockSource::Zero => vec![0; BLOCK_SIZE],
            BlockSource::Miss => block_of(store, lba),
        }
    }

    /// The host loses power, or only the agent dies; then recovery, also cut short now and then.
    async fn crash(&mut self) {
        self.replacing.stop();
        let mut power = self.rng.random_bool(0.5);
        if power {
            self.sims.iter().for_each(SimDevice::crash);
        } else {
            // What was submitted goes through or not, what was acknowledged has.
            for action in std::mem::take(&mut self.pending) {
                if let Action::Write { leg, offset, image, start, len, .. } = action
                    && self.rng.random_bool(0.5)
                {
                    let data = vec![image.slice(start, len)];
                    let result = self.sims[usize::from(leg)].write(offset, data).await;
                    let _ = self.result(leg, result);
                }
            }
            // Nobody owns the legs again before the rest has landed, or never will.
            self.sims.iter().for_each(SimDevice::kill_host);
        }
        let recovered = loop {
            self.open_again().await;
            self.rot().await;
            let mut headers = self.local.read_headers().await.unwrap();
            headers.retain(|h| h.log_id == LOG_ID && h.seq >= self.slot.evicted_below);
            headers.sort_by_key(|h| h.seq);
            let store = Lsn(self.store.image.lock().unwrap().1);
            let recovered =
                recovery::recover(&self.local, &self.slot, store, &headers).await.unwrap();
            if self.rng.random_bool(0.3) {
                let polls = self.rng.random_range(0..40);
                legs::cut_short(recovery::settle(&self.local, &recovered), polls).await;
                self.sims.iter().for_each(SimDevice::crash);
                power = true;
            } else {
                recovery::settle(&self.local, &recovered).await.unwrap();
                break recovered;
            }
        };
        self.recovered();
        let last = recovered.last_lsn.0;
        assert!(last >= self.flushed, "P1: LSN {last} recovered, {} was flushed", self.flushed);
        assert!(power || last >= self.acked, "L1: LSN {last} recovered, {} was acked", self.acked);
        self.log.truncate(last as usize);
        self.check_recovered_snapshots(&recovered);
        self.slot.epoch += 1;
        self.slot.first_lsn = Lsn(last + 1);
        self.slot.durable = Lsn(last);
        self.restart(recovered);
        let image = self.read_all();
        let expected = self.image_at(last);
        assert_eq!(image, expected, "P2: the recovered disk is the disk at LSN {last}");
    }

    fn restart(&mut self, recovered: recovery::Recovered) {
        let store = Lsn(self.store.image.lock().unwrap().1);
        self.slot.committed = store;
        let live: BTreeSet<SegmentId> = recovered.live.iter().map(|l| l.id).collect();
        let used = self.pool.counts().free as usize + self.sealed.len() + 8;
        self.sealed = recovered
            .live
            .iter()
            .map(|live| SealedSegment {
                id: live.id,
                seq: live.seq,
                first_lsn: live.first_lsn,
                last_lsn: live.last_lsn,
                used_blocks: live.used_blocks,
                image: None,
            })
            .collect();
        let segments = (used as u32).min(self.local.geometry.segments);
        let free = (0..segments).map(SegmentId).filter(|id| !live.contains(id)).collect();
        self.pool = Arc::new(Pool::new(self.local.geometry, free, self.pool.next_seq()));
        self.pool.adopt(VDI, live.into_iter());
        let sealed = recovered.live.iter().map(|l| (l.id, l.last_lsn)).collect();
        let (link, members) = joined(&self.local);
        self.link = link;
        let start = start(
            &self.local,
            &self.slot,
            &self.images,
            recovered.last_lsn,
            store,
            recovered.index,
            sealed,
            vec![],
        );
        self.disk = Disk::on_legs(start, members);
        self.pending.clear();
        self.done_ops.clear();
        self.open.clear();
        self.evicting.clear();
        self.acked = recovered.last_lsn.0;
        self.flushed = recovered.last_lsn.0;
        self.through = false;
        self.wants = true;
        self.feed();
    }

    /// Everything that waits gets done.
    async fn settle(&mut self) {
        for _ in 0..1000 {
            self.device().await;
            self.complete();
            self.poll();
            self.put_out().await;
            self.listen();
            self.replace_on();
        }
        assert!(self.disk.is_quiet(), "without new requests the log comes to rest");
        assert!(self.open.is_empty(), "every request was answered");
        self.assert_snapshots_answered();
    }
}

/// A link over which the cache tells of changes of its legs, and the members as they are.
fn joined(local: &Local) -> (Link, cache::format::LegSet) {
    let (link, sender, _) = link::pair().unwrap();
    let members = local.join(sender);
    (link, members)
}

#[allow(clippy::too_many_arguments, reason = "one call site per case, all named alike")]
fn start(
    local: &Local,
    slot: &SlotVdi,
    images: &Arc<ImagePool>,
    last_lsn: Lsn,
    committed: Lsn,
    index: cache::index::Index,
    sealed: Vec<(SegmentId, Lsn)>,
    grants: Vec<Grant>,
) -> Start {
    Start {
        identity: Identity {
            cache: local.cache_uuid(),
            vdi: VDI,
            log_id: LOG_ID,
            epoch: slot.epoch,
        },
        geometry: local.geometry,
        size_bytes: slot.size_bytes,
        index,
        last_lsn,
        committed,
        sealed,
        grants,
        images: Arc::clone(images),
        progress: Arc::new(Progress::default()),
    }
}

async fn run(seed: u64, legs: usize) {
    let mut rig = Rig::new(seed, legs).await;
    for _ in 0..rig.rng.random_range(1..6) {
        for _ in 0..rig.rng.random_range(10..1500) {
            match rig.rng.random_range(0..100) {
                0..35 => rig.guest(),
                35..60 => rig.device().await,
                60..85 => rig.complete(),
                85..90 => rig.commit().await,
                90..94 => rig.evict().await,
                94 => rig.disk.on_message(ToDisk::Roll { id: 1 }),
                96 => rig.put_out().await,
                97 if rig.rng.random_bool(0.05) => rig.lose_leg(),
                98 if rig.rng.random_bool(0.3) => rig.rot().await,
                99 => rig.replace().await,
                95 if rig.rng.random_bool(0.1) => {
                    let now = rig.image_at(rig.disk.staged_lsn().0);
                    assert_eq!(rig.read_all(), now, "a read returns the newest data");
                }
                _ => {}
            }
            if rig.rng.random_bool(0.5) {
                rig.poll();
            }
            if rig.rng.random_bool(0.2) {
                rig.listen();
            }
            rig.replace_on();
        }
        if rig.rng.random_bool(0.3) {
            rig.settle().await;
        }
        rig.crash().await;
    }
}

fn run_seeds(legs: usize, name: &str) {
    let seeds =
        std::env::var("CACHE_SEEDS").map_or(150, |s| s.parse().expect("CACHE_SEEDS is a number"));
    let first = std::env::var("CACHE_FIRST_SEED").map_or(0, |s| s.parse().expect("a number"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for seed in first..first + seeds {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runtime.block_on(run(seed, legs))
        }));
        if let Err(panic) = result {
            eprintln!(
                "seed {seed} failed; repeat with CACHE_FIRST_SEED={seed} CACHE_SEEDS=1 cargo test -p cache --test log_crash {name}"
            );
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_crash_at_any_moment_leaves_a_prefix_that_holds_all_that_was_flushed() {
    run_seeds(1, "a_crash");
}

#[test]
fn two_legs_survive_what_happens_to_one_at_any_moment() {
    run_seeds(2, "two_legs");
}
