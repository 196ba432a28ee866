//! Snapshots that are attached read-only: what is read from one is the disk at its LSN, whatever is written, deleted and collected
//! beside it, and it is not deleted meanwhile. The next agent serves it again. The agent's `host/read_only/` does the same in the same
//! order, but for the guest, in whose place the simulator stands.

use crate::host::{Agent, few, pause, transient};
use blockstore::types::{Lsn, SECTOR_SIZE};
use blockstore::{SnapshotHold, StoreErrorKind};
use bytes::Bytes;
use cache::disk::AttachedDisk;
use cache::disk::plan::{Piece, ReadPlan};
use cache::link::{FromDisk, ToDisk};
use cache::read_only::{self, Reader};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Snapshots that are attached at once.
const SHOWN_MAX: usize = 3;
/// Sectors of a read at most.
const READ_MAX: u64 = 64;
/// Between two looks whether a reply has come.
const LOOK: Duration = Duration::from_millis(2);

/// In the run directory: a disk among the models, its UUID, and the snapshot.
pub type Notes = Arc<Mutex<BTreeMap<(usize, u64), Uuid>>>;

/// What an agent holds of them, until they are detached, or it is gone: a deletion that was asked for may come as late as that.
pub type Held = Mutex<BTreeMap<(usize, u64), SnapshotHold>>;

/// One that is served.
struct Shown {
    n: usize,
    lsn: u64,
    vdi: Uuid,
    sectors: u64,
    attached: AttachedDisk,
    reader: Reader,
    next: u64,
}

impl Agent {
    /// Holds those that the last agent served, before anything can be deleted.
    pub fn recall_shown(&self) {
        for (&(n, lsn), vdi) in &*self.shown.lock() {
            self.hold_shown(n, lsn, *vdi);
        }
    }

    fn hold_shown(&self, n: usize, lsn: u64, vdi: Uuid) {
        let mut held = self.held.lock();
        held.entry((n, lsn)).or_insert_with(|| self.holds.hold(vdi, Lsn(lsn)));
    }

    /// A snapshot is attached, or about to be.
    pub fn is_shown(&self, n: usize, lsn: u64) -> bool {
        self.held.lock().contains_key(&(n, lsn))
    }

    /// Attaches snapshots, reads them, detaches them, for ever.
    pub async fn show_some(&self, rng: &mut SmallRng) {
        let mut shown = self.bring_up_noted().await;
        for round in 0_u32.. {
            let pause = Duration::from_millis(few(rng, 3_000));
            tokio::time::sleep(pause * (1 + round / 100)).await;
            if shown.is_empty() || shown.len() < SHOWN_MAX && rng.random_bool(0.2) {
                shown.extend(self.attach_shown(rng, &shown).await);
                continue;
            }
            let at = rng.random_range(0..shown.len());
            match rng.random_range(0..12) {
                0 => self.detach_shown(shown.swap_remove(at)).await,
                1 | 2 => self.delete_shown(&shown[at]).await,
                _ => {
                    let one = &mut shown[at];
                    let first = rng.random_range(0..one.sectors);
                    let most = READ_MAX.min(one.sectors - first);
                    self.read_shown(one, first, rng.random_range(1..=most)).await;
                }
            }
        }
    }

    /// Held, found in the store, noted, served.
    async fn attach_shown(&self, rng: &mut SmallRng, others: &[Shown]) -> Option<Shown> {
        let (n, vdi) = self.any_disk(rng);
        let there = self.models.get(n).lock().there(vdi.committed().lsn.0);
        // A clone may be given up, and its snapshots with it.
        if there.is_empty() || n >= self.disks {
            return None;
        }
        let lsn = there[rng.random_range(0..there.len())];
        if others.iter().any(|one| (one.n, one.lsn) == (n, lsn)) {
            return None;
        }
        self.hold_shown(n, lsn, vdi.uuid());
        self.bring_up_shown(n, lsn, vdi.uuid()).await
    }

    async fn bring_up_noted(&self) -> Vec<Shown> {
        let (notes, mut shown) = (self.shown.lock().clone(), Vec::new());
        for ((n, lsn), vdi) in notes {
            shown.extend(self.bring_up_shown(n, lsn, vdi).await);
        }
        shown
    }

    /// None if it was lost with a part of the store.
    async fn bring_up_shown(&self, n: usize, lsn: u64, vdi: Uuid) -> Option<Shown> {
        let store = self.store();
        let image = loop {
            match store.open_snapshot(self.holds.hold(vdi, Lsn(lsn))).await {
                Ok(image) => break image,
                Err(_) if self.store_harmed => return None,
                Err(error) if error.kind == StoreErrorKind::Changed => pause().await,
                Err(error) => transient("P5: attaching a snapshot", &error, false).await.ok()?,
            }
        };
        self.shown.lock().insert((n, lsn), vdi);
        let bytes = image.snapshot().size_bytes;
        let (attached, reader) = read_only::open(bytes, Arc::new(image)).expect("an eventfd");
        let sectors = bytes / SECTOR_SIZE as u64;
        Some(Shown { n, lsn, vdi, sectors, attached, reader, next: 1 })
    }

    /// Struck from the notes, reads ended, let go of.
    async fn detach_shown(&self, shown: Shown) {
        let Shown { n, lsn, attached, reader, .. } = shown;
        self.shown.lock().remove(&(n, lsn));
        drop(attached);
        reader.end().await;
        self.held.lock().remove(&(n, lsn));
    }

    /// Nobody gets it deleted.
    async fn delete_shown(&self, shown: &Shown) {
        let Shown { n, lsn, vdi, .. } = shown;
        let model = self.models.get(*n);
        let is_new = model.lock().maybe_deleted.insert(*lsn);
        let deleted = self.store().delete_snapshots(&vdi.to_string(), vec![Lsn(*lsn)]).await;
        let Err(error) = deleted else {
            panic!("P5: snapshot {lsn} of disk {n} was deleted, and is attached")
        };
        // One of which nothing is known may have its turn once this is detached.
        if error.kind == StoreErrorKind::InUse && is_new {
            model.lock().maybe_deleted.remove(lsn);
        }
    }

    /// One read of a guest.
    async fn read_shown(&self, shown: &mut Shown, first: u64, sectors: u64) {
        let Shown { n, lsn, attached, next, .. } = shown;
        let mut plan = ReadPlan::default();
        attached.disk.read(first, sectors, &mut plan);
        let (mut under_way, mut blocks) = (BTreeMap::new(), BTreeMap::new());
        for piece in std::mem::take(&mut plan.pieces) {
            let Piece::Miss { block, blocks } = piece else {
                panic!("P7: of snapshot {lsn} of disk {n} something is kept: {piece:?}")
            };
            let lba = plan.lba.plus(u64::from(block));
            attached.ask(FromDisk::Fetch { id: *next, lba, blocks });
            under_way.insert(*next, lba);
            *next += 1;
        }
        attached.disk.release(&mut plan);
        let mut failed = None;
        while !under_way.is_empty() {
            let Some(message) = attached.link.try_recv() else {
                tokio::time::sleep(LOOK).await;
                continue;
            };
            let ToDisk::Fetched { id, result, .. } = message else { continue };
            // One that was not waited for to its end.
            let Some(lba) = under_way.remove(&id) else { continue };
            match result {
                Ok(found) => blocks.extend((lba.0..).zip(found)),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            None => self.judge_shown(*n, *lsn, first, sectors, &blocks),
            Some(error) => assert!(
                self.store_harmed || self.garbles || self.scrubs.lock().has_spoiled(),
                "P7: snapshot {lsn} of disk {n} cannot be read: {error:?}"
            ),
        }
    }

    fn judge_shown(
        &self,
        n: usize,
        lsn: u64,
        first: u64,
        sectors: u64,
        blocks: &BTreeMap<u64, Option<Bytes>>,
    ) {
        let model = self.models.get(n);
        let model = model.lock();
        if lsn > model.last_lsn() || model.damaged {
            // Damage took that part of its log.
            return;
        }
        let image = model.image_at(lsn);
        let per_block = crate::model::PER_BLOCK;
        for at in first..first + sectors {
            let block = blocks.get(&(at / per_block)).expect("all was asked for");
            let found = block.as_ref().map_or(Ok(0), |block| {
                let from = (at % per_block) as usize * SECTOR_SIZE;
                model.stamp_of(&block[from..from + SECTOR_SIZE], at)
            });
            let wanted = image[at as usize];
            assert_eq!(
                found,
                Ok(wanted),
                "P5: sector {at} of snapshot {lsn} of disk {n}, attached"
            );
        }
    }

    /// Nothing fails any more: what is noted comes up, is all there, and is detached.
    pub async fn finish_shown(&self) {
        for mut shown in self.bring_up_noted().await {
            let mut first = 0;
            while first < shown.sectors {
                let sectors = READ_MAX.min(shown.sectors - first);
                self.read_shown(&mut shown, first, sectors).await;
                first += sectors;
            }
            self.detach_shown(shown).await;
        }
    }
}
