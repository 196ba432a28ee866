//! A look at the store's own tables, for `store check` and `store repair`.
//!
//! Of what is found to be wrong, some has one right answer, which stands elsewhere in the store: the superblock has a copy, an
//! extent's header repeats the catalogue. That comes with the block as it should be. The rest comes with advice.

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::bitmap::{BitmapKind, BitmapPage};
use crate::format::extent::{ExtentHeader, ExtentRecord, ExtentType};
use crate::format::gc::{GcPhase, GcRecord};
use crate::format::head::{Damage, Head, Record};
use crate::format::superblock::Superblock;
use crate::format::vdi::VdiHead;
use crate::io::Io;
use crate::slot::{Content, Slot, View};
use crate::store::open::{UNREADABLE_MAX, scan_extents};
use crate::store::{SCAN_SLOTS, Store, hosts, vdi_slot};
use crate::types::{BLOCK_SIZE, Gba};
use bytes::Bytes;

/// A block as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fix {
    /// Where it belongs.
    pub address: Gba,
    /// What writing it does, in words that go on after "will".
    pub what: String,
    /// Its 4096 bytes.
    pub block: Bytes,
}

/// What is to be done about a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cure {
    /// There is one right answer, and it is known.
    Write(Fix),
    /// What the operator can do.
    Advice(&'static str),
}

/// Something wrong with the store's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableProblem {
    /// A sentence that names the object.
    pub what: String,
    /// What is to be done about it.
    pub cure: Cure,
    /// There may be disks that nobody sees, so that what is not reached may still be theirs.
    pub hides_disks: bool,
}

impl TableProblem {
    fn new(what: String, cure: Cure) -> Self {
        Self { what, cure, hides_disks: false }
    }
}

const ANOTHER_VERSION: &str =
    "use the version of Ballast that wrote it, and check again; this one leaves it alone";
const DEVICE_ADVICE: &str = "the device reports an error there: look into its own log, and copy the store's disks out in time";
const HOST_ADVICE: &str = "nothing is lost with it: its host takes another place in the table when its agent starts. Make \
     sure that no agent runs there before the store is repaired";
const EXTENT_ADVICE: &str = "disks are read from the extent as before, but nothing in it is given out or freed any more: \
     put the record back from a copy of the device, or copy its disks to another store in time";
const GAP_ADVICE: &str = "those disks cannot be reached, and nothing is collected: put the record of the empty slot back from \
     a copy of the device";

/// What the device does not give is a problem like others: the rest is looked at all the same. The words are the same each time.
fn readable<T>(
    outcome: Result<T>,
    problems: &mut Vec<TableProblem>,
    what: impl FnOnce() -> String,
) -> Result<Option<T>> {
    match outcome {
        Err(error) if error.kind == StoreErrorKind::Device => {
            let what = format!("{} cannot be read.", what());
            problems.push(TableProblem::new(what, Cure::Advice(DEVICE_ADVICE)));
            Ok(None)
        }
        outcome => outcome.map(Some),
    }
}

impl Store {
    /// Checks both superblocks, the GC record, the host table, the extent catalogue with the
    /// extents' headers, and that the registry has no gap.
    ///
    /// # Errors
    /// The device's, but for lasting ones: what it does not give is a problem.
    pub async fn verify_tables(&self) -> Result<Vec<TableProblem>> {
        self.verify_tables_through(&self.control_io).await
    }

    pub(super) async fn verify_tables_through(&self, io: &Io) -> Result<Vec<TableProblem>> {
        let mut problems = Vec::new();
        self.verify_superblocks(io, &mut problems).await?;
        self.verify_gc(io, &mut problems).await?;
        let hosts = hosts::scan(io, &self.core.records, self.core.geometry()).await;
        let hosts = readable(hosts, &mut problems, || "The host table".to_owned())?;
        for view in hosts.unwrap_or_default() {
            if let Content::Damaged(damage) = view.content {
                let at = view.slot.first;
                let what = format!("The host record at block {at} is damaged: {damage}.");
                problems.push(TableProblem::new(what, Cure::Advice(HOST_ADVICE)));
            }
        }
        self.verify_extents(io, &mut problems).await?;
        let outcome = self.verify_registry(io, &mut problems).await;
        if readable(outcome, &mut problems, || "A part of the VDI registry".to_owned())?.is_none()
            && let Some(problem) = problems.last_mut()
        {
            problem.hides_disks = true;
        }
        Ok(problems)
    }

    /// A head of this store as it should stand at `address`.
    fn fix<T: Record>(&self, address: Gba, sequence: u64, record: T, what: String) -> Cure {
        let head = Head { store: self.uuid(), sequence, record };
        let block = Bytes::copy_from_slice(&head.encode_block(address));
        Cure::Write(Fix { address, what, block })
    }

    async fn superblock_at(
        &self,
        io: &Io,
        address: Gba,
    ) -> Result<Result<Head<Superblock>, Damage>> {
        let block = io.read(address, 1).await?;
        Ok(Head::<Superblock>::decode(&block, address).and_then(|head| head.of_store(self.uuid())))
    }

    /// The first one counts, as long as it is whole.
    async fn verify_superblocks(&self, io: &Io, problems: &mut Vec<TableProblem>) -> Result<()> {
        let [first, second] = self.core.superblock.geometry.superblocks();
        let (a, b) = (self.superblock_at(io, first).await, self.superblock_at(io, second).await);
        let a = readable(a, problems, || format!("The superblock at block {first}"))?;
        let b = readable(b, problems, || format!("The superblock at block {second}"))?;
        let (Some(a), Some(b)) = (a, b) else { return Ok(()) };
        let rewrite = |address, good: &Head<Superblock>| {
            let what = format!("write the superblock at block {address} anew, from its copy");
            self.fix(address, good.sequence, good.record.clone(), what)
        };
        let damaged = |address, damage: &Damage| {
            format!("The superblock at block {address} is damaged: {damage}; its copy is in use.")
        };
        let (what, cure) = match (&a, &b) {
            (Ok(a), Ok(b)) if a == b => return Ok(()),
            (_, Err(damage @ Damage::Newer(_))) => {
                (damaged(second, damage), Cure::Advice(ANOTHER_VERSION))
            }
            (Ok(a), Ok(b)) => {
                let what = format!("The superblock at block {second} differs from its copy.");
                let newer = b.sequence > a.sequence;
                (what, if newer { Cure::Advice(ANOTHER_VERSION) } else { rewrite(second, a) })
            }
            (Ok(a), Err(damage)) => (damaged(second, damage), rewrite(second, a)),
            (Err(damage), Ok(b)) => (damaged(first, damage), rewrite(first, b)),
            // Not since the store was opened, then.
            (Err(damage), Err(_)) => (damaged(first, damage), Cure::Advice(ANOTHER_VERSION)),
        };
        problems.push(TableProblem::new(what, cure));
        Ok(())
    }

    async fn verify_gc(&self, io: &Io, problems: &mut Vec<TableProblem>) -> Result<()> {
        let slot = Slot { first: Gba(self.core.geometry().gc_start), paired: true };
        let view = self.core.records.read::<GcRecord>(io, slot).await;
        let view = readable(view, problems, || format!("The GC record at block {}", slot.first))?;
        let Some(view) = view else { return Ok(()) };
        let what = match view.content {
            Content::Valid(_) => return Ok(()),
            Content::Unused => "The GC record is missing.".to_owned(),
            Content::Damaged(damage @ Damage::Newer(_)) => {
                let what = format!("The GC record at block {}: {damage}.", slot.first);
                problems.push(TableProblem::new(what, Cure::Advice(ANOTHER_VERSION)));
                return Ok(());
            }
            Content::Damaged(damage) => {
                format!("The GC record at block {} is damaged: {damage}.", slot.first)
            }
        };
        // All that matters of it is that no cycle has an epoch that one before it had. One may have been begun that only the
        // record knew of.
        let epoch = match self.epoch_seen(io).await {
            Err(error) if error.kind == StoreErrorKind::Device => {
                problems.push(TableProblem::new(what, Cure::Advice(DEVICE_ADVICE)));
                return Ok(());
            }
            seen => seen? + 2,
        };
        // A cycle changes the record four times.
        let sequence = 4 * epoch + 2;
        let place = slot.first.plus(if self.core.records.single_host { sequence % 2 } else { 0 });
        let record = GcRecord { epoch, phase: GcPhase::Idle, ..GcRecord::initial() };
        let words = format!(
            "write the GC record at block {place} anew, above every cycle that the store knows of"
        );
        problems.push(TableProblem::new(what, self.fix(place, sequence, record, words)));
        Ok(())
    }

    /// The highest cycle that hosts, extents and reclaim bitmaps name.
    async fn epoch_seen(&self, io: &Io) -> Result<u64> {
        let hosts = hosts::scan(io, &self.core.records, self.core.geometry()).await?;
        let acknowledged = hosts.iter().filter_map(View::record).map(|r| r.gc_epoch_acknowledged);
        let mut seen = acknowledged.max().unwrap_or(0);
        let extents = scan_extents(io, &self.core.records, self.core.geometry()).await?;
        for (number, view) in (0..).zip(extents) {
            let Some(record) = view.record() else { continue };
            seen = seen.max(record.sweep_epoch);
            if record.ready && record.owner.is_some() {
                let pages = self.bitmap(io, BitmapKind::Reclaim, number).await?;
                let epochs = pages.iter().filter_map(|page| Some(page.as_ref().ok()?.gc_epoch));
                seen = seen.max(epochs.max().unwrap_or(0));
            }
        }
        // Whatever stands there: no overflow.
        Ok(seen.min(u64::MAX >> 8))
    }

    async fn verify_extents(&self, io: &Io, problems: &mut Vec<TableProblem>) -> Result<()> {
        for (number, view) in self.extents_readable(io, problems).await? {
            if number == 0 {
                self.verify_system_extent(&view, problems);
                continue;
            }
            match &view.content {
                Content::Unused => {}
                Content::Valid(head) => {
                    self.verify_extent_header(io, number, &head.record, problems).await?;
                }
                Content::Damaged(damage) => {
                    let at = view.slot.first;
                    let what =
                        format!("The record of extent {number} (block {at}) is damaged: {damage}.");
                    problems.push(TableProblem::new(what, Cure::Advice(EXTENT_ADVICE)));
                }
            }
        }
        Ok(())
    }

    /// The catalogue, without the records that the device does not give.
    async fn extents_readable(
        &self,
        io: &Io,
        problems: &mut Vec<TableProblem>,
    ) -> Result<Vec<(u32, View<ExtentRecord>)>> {
        match scan_extents(io, &self.core.records, self.core.geometry()).await {
            Err(error) if error.kind == StoreErrorKind::Device => {}
            views => return Ok((0..).zip(views?).collect()),
        }
        let g = self.core.geometry();
        let (mut views, mut bad) = (Vec::new(), 0);
        for number in 0..g.extent_count {
            let slot = Slot { first: g.extent_slot(number), paired: false };
            let view = self.core.records.read::<ExtentRecord>(io, slot).await;
            let what = || format!("The record of extent {number} (block {})", slot.first);
            match readable(view, problems, what)? {
                Some(view) => views.push((number, view)),
                None => bad += 1,
            }
            if bad == UNREADABLE_MAX {
                let what = format!("Records of extents behind {number} were not looked at.");
                problems.push(TableProblem::new(what, Cure::Advice(DEVICE_ADVICE)));
                break;
            }
        }
        Ok(views)
    }

    /// Its record never changes.
    fn verify_system_extent(&self, view: &View<ExtentRecord>, problems: &mut Vec<TableProblem>) {
        let at = view.slot.first;
        let what = match &view.content {
            Content::Valid(head) if head.record.kind == ExtentType::System => return,
            Content::Valid(head) => format!(
                "Extent 0 (record at block {at}) holds the store's tables, but {:?} by the catalogue.",
                head.record.kind
            ),
            Content::Unused => format!("The record of extent 0 (block {at}) is missing."),
            Content::Damaged(damage) => {
                format!("The record of extent 0 (block {at}) is damaged: {damage}.")
            }
        };
        let words = format!("write the record of extent 0, the system's, at block {at} anew");
        let cure = self.fix(at, view.sequence() + 1, ExtentRecord::system(), words);
        problems.push(TableProblem::new(what, cure));
    }

    async fn verify_extent_header(
        &self,
        io: &Io,
        number: u32,
        record: &ExtentRecord,
        problems: &mut Vec<TableProblem>,
    ) -> Result<()> {
        if !record.ready || record.owner.is_none() {
            return Ok(());
        }
        let g = self.core.geometry();
        let base = g.extent_base(number);
        let block = io.read(base, 1).await;
        let what = || format!("The header of extent {number} (block {base})");
        let Some(block) = readable(block, problems, what)? else { return Ok(()) };
        let header: Result<Head<ExtentHeader>, Damage> =
            Head::decode(&block, base).and_then(|head| head.of_store(self.uuid()));
        let right = ExtentHeader::of(g, number, record.kind);
        let what = match header {
            Ok(head) if head.record == right => return Ok(()),
            Ok(head) if head.record.kind == record.kind => {
                format!("The header of extent {number} (block {base}) is another extent's.")
            }
            Ok(head) => format!(
                "Extent {number} holds {:?} by the catalogue, but {:?} by its header.",
                record.kind, head.record.kind
            ),
            Err(damage @ Damage::Newer(_)) => {
                let what = format!("The header of extent {number} (block {base}): {damage}.");
                problems.push(TableProblem::new(what, Cure::Advice(ANOTHER_VERSION)));
                return Ok(());
            }
            Err(damage) => format!("The header of extent {number} is damaged: {damage}."),
        };
        let words = format!(
            "write the header of extent {number} at block {base} anew, as the catalogue says"
        );
        problems.push(TableProblem::new(what, self.fix(base, 1, right, words)));
        Ok(())
    }

    /// Makes sure that no record lies behind the first empty slot, where nobody looks for it.
    pub(super) async fn refuse_gap(&self) -> Result<()> {
        let mut problems = Vec::new();
        self.verify_registry(&self.control_io, &mut problems).await?;
        match problems.pop() {
            None => Ok(()),
            Some(problem) => {
                let words = format!("{} Nothing is collected.", problem.what);
                Err(StoreError::new(StoreErrorKind::Damaged, self.url(), words))
            }
        }
    }

    /// A slot that was ever used stays so. One that reads as never used hides all that follow.
    async fn verify_registry(&self, io: &Io, problems: &mut Vec<TableProblem>) -> Result<()> {
        let slots = self.core.geometry().vdi_slots;
        let (mut next, mut gap) = (0, None);
        while next < slots {
            let count = SCAN_SLOTS.min(slots - next);
            let first = vdi_slot(self.core.geometry(), next);
            let views: Vec<View<VdiHead>> =
                self.core.records.read_run(io, first, u64::from(count)).await?;
            for (slot, view) in (next..).zip(views) {
                match (gap, view.content == Content::Unused) {
                    (None, true) => gap = Some((slot, view.slot.first)),
                    (Some((empty, at)), false) => {
                        let what = format!(
                            "The VDI registry has a gap: slot {empty} (block {at}) is empty, but slot {slot} (block \
                             {}) is not. The disks from there on are not seen.",
                            view.slot.first
                        );
                        let cure = Cure::Advice(GAP_ADVICE);
                        problems.push(TableProblem { what, cure, hides_disks: true });
                        return Ok(());
                    }
                    _ => {}
                }
            }
            next += count;
        }
        Ok(())
    }

    /// An extent's BMap, page by page.
    ///
    /// # Errors
    /// The device's; damaged pages are content.
    pub async fn read_bmap(&self, extent: u32) -> Result<Vec<Result<BitmapPage, Damage>>> {
        self.read_bitmap(BitmapKind::Allocation, extent).await
    }

    /// One of an extent's two bitmaps, page by page.
    ///
    /// # Errors
    /// The device's; damaged pages are content.
    pub async fn read_bitmap(
        &self,
        kind: BitmapKind,
        extent: u32,
    ) -> Result<Vec<Result<BitmapPage, Damage>>> {
        self.bitmap(&self.control_io, kind, extent).await
    }

    /// An extent's BMap, page by page; a page that the device lastingly does not read is damaged.
    ///
    /// # Errors
    /// The device's, but for lasting ones.
    pub(super) async fn bmap_readable(
        &self,
        extent: u32,
    ) -> Result<Vec<Result<BitmapPage, Damage>>> {
        let io = &self.control_io.giving_up();
        let is_lasting = |error: &StoreError| error.kind == StoreErrorKind::Device;
        match self.bitmap(io, BitmapKind::Allocation, extent).await {
            Err(error) if is_lasting(&error) => {}
            pages => return pages,
        }
        let mut pages = Vec::new();
        for page in 0..self.core.geometry().bmap_pages() {
            let content = self.bitmap_page(io, BitmapKind::Allocation, extent, page).await;
            pages.push(match content {
                Err(error) if is_lasting(&error) => Err(Damage::Unreadable),
                content => content?,
            });
        }
        Ok(pages)
    }

    async fn bitmap_page(
        &self,
        io: &Io,
        kind: BitmapKind,
        extent: u32,
        page: u32,
    ) -> Result<Result<BitmapPage, Damage>> {
        let address = self.bitmap_address(kind, extent, page);
        let block = io.read(address, 1).await?;
        Ok(BitmapPage::decode(&block, kind, self.uuid(), address))
    }

    fn bitmap_address(&self, kind: BitmapKind, extent: u32, page: u32) -> Gba {
        let g = self.core.geometry();
        match kind {
            BitmapKind::Allocation => g.bmap_page(extent, page),
            BitmapKind::Reclaim => g.reclaim_page(extent, page),
        }
    }

    async fn bitmap(
        &self,
        io: &Io,
        kind: BitmapKind,
        extent: u32,
    ) -> Result<Vec<Result<BitmapPage, Damage>>> {
        let g = self.core.geometry();
        let first = self.bitmap_address(kind, extent, 0);
        let bytes = io.read(first, u64::from(g.bmap_pages())).await?;
        let mut pages = Vec::new();
        for (block, page) in bytes.chunks_exact(BLOCK_SIZE).zip(0..) {
            let address = self.bitmap_address(kind, extent, page);
            let mut content = BitmapPage::decode(block, kind, self.uuid(), address);
            if content.is_err() {
                // Being written at this moment, or a fault on the way: look again.
                content = self.bitmap_page(io, kind, extent, page).await?;
            }
            pages.push(content);
        }
        Ok(pages)
    }
}
