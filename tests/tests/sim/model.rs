//! What a disk should hold: the log of what its guest did, and what of it must have survived.
//!
//! Every sector that a guest writes names the disk, its own place and the write that made it, so that data which is stale,
//! torn, misdirected or another disk's is recognised wherever it turns up. A clone bears the name of what it was cloned from, whose
//! sectors it begins with; its own writes have numbers that nobody else's have.

mod rolled_back;

pub use rolled_back::{Rollback, kept_label};

use crate::labels::Labels;
use crate::parting::Parted;
use crate::world::name;
use blockstore::SnapshotLabel;
use blockstore::commit::{Batch, Change};
use blockstore::crc::crc32c;
use blockstore::schedule::is_cut;
use blockstore::types::{BLOCK_SIZE, SECTOR_SIZE};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use uuid::Uuid;

/// Sectors in a block.
pub const PER_BLOCK: u64 = (BLOCK_SIZE / SECTOR_SIZE) as u64;
/// Bytes that say which write made a sector.
const PATTERN: usize = size_of::<u128>();

/// Writes of one disk have numbers of so many bits.
const STAMP_BITS: u32 = 24;

/// In the place of a number: a part of what a clone began with is written once more.
const COPIED: u32 = u32::MAX;

/// One sector's content: the number of the write that made it (0: zeros).
pub type Image = Vec<u32>;

/// An entry of the log; entry n - 1 has LSN n.
#[derive(Clone, Debug)]
struct Done {
    sectors: Range<u64>,
    stamp: u32,
    /// The whole disk became this: it was rolled back.
    becomes: Option<Arc<Image>>,
}

impl Done {
    fn is_cut(&self) -> bool {
        self.sectors.is_empty() && self.stamp != COPIED && self.becomes.is_none()
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Model {
    /// In the store.
    pub name: String,
    pub uuid: Option<Uuid>,
    /// It must be in the store.
    pub made: bool,
    /// A clone that the cache alone made, and of which the store may not know.
    pub is_provisional: bool,
    /// That was answered, or seen: it is there for good.
    pub is_promised: bool,
    /// It did not come about: there must be no such disk, anywhere.
    pub is_none: bool,
    /// What is known of its leaving this host.
    pub parted: Parted,
    /// Its log begins with so much of what was copied as its first recovery says.
    is_copied: bool,
    /// Of the disk in every sector, and of all that was cloned from it.
    family: u32,
    /// What it began as; behind its end are zeros.
    base: Image,
    log: Vec<Done>,
    /// With all of the log.
    now: Image,
    next_stamp: u32,
    /// Every write up to here was completed.
    pub acked: u64,
    /// A completed flush, or write-through, covers everything up to here.
    pub flushed: u64,
    /// The cache device lost power since the last recovery.
    pub power_lost: bool,
    /// The only leg of the cache was damaged: what no copy is left of may be gone, if that is said.
    pub damaged: bool,
    /// The log as it was, if damage took flushed records of it and the store has not been compared with what is left: until
    /// it refuses the disk, or not, its image may be one of those.
    former: Option<Vec<Done>>,
    /// The store's image as of an LSN, as far as commits told.
    stored: (Image, u64),
    /// The guest has asked for all it wanted, and all was answered.
    pub guest_is_done: bool,
    /// Snapshots that are not in the store any more, and those of which that is not known.
    pub deleted: BTreeSet<u64>,
    pub maybe_deleted: BTreeSet<u64>,
    /// Snapshots of what the disk was at an LSN that its log had gone beyond; and those of which it is not known whether they are
    /// taken.
    pub as_of: BTreeSet<u64>,
    pub maybe_as_of: BTreeSet<u64>,
    /// Of its snapshots.
    pub labels: Labels,
    /// A schedule had snapshots cut behind its writes at some time.
    pub has_rules: bool,
    /// The first broken promise that was found where nobody could be told.
    pub broken: Option<String>,
}

/// All disks of a seed, clones that are served among them: each has its place for good.
#[derive(Clone, Debug, Default)]
pub struct Models(Arc<Mutex<Vec<Arc<Mutex<Model>>>>>);

impl Models {
    pub fn get(&self, n: usize) -> Arc<Mutex<Model>> {
        Arc::clone(&self.0.lock()[n])
    }

    pub fn all(&self) -> Vec<Arc<Mutex<Model>>> {
        self.0.lock().clone()
    }

    /// Its place is the one that `model` is told.
    pub fn add(&self, model: impl FnOnce(usize) -> Model) -> usize {
        let mut all = self.0.lock();
        let n = all.len();
        all.push(Arc::new(Mutex::new(model(n))));
        n
    }
}

impl Model {
    /// Disk number `n`, empty.
    pub fn new(n: usize, blocks: u64) -> Self {
        let empty = vec![0; (blocks * PER_BLOCK) as usize];
        let base = Image::new();
        Self { now: empty.clone(), stored: (empty, 0), ..Self::begun(name(n), n as u32 + 1, base) }
    }

    /// Disk number `n`, a clone of what this one is at `lsn`. It is as large as what it holds until [`Self::grow`] says more.
    pub fn clone_of(&self, n: usize, name: String, lsn: u64) -> Self {
        let mut base = self.image_at(lsn);
        base.truncate(base.iter().rposition(|stamp| *stamp != 0).map_or(0, |last| last + 1));
        let next_stamp = ((n as u32) << STAMP_BITS) + 1;
        Self { next_stamp, damaged: self.damaged, ..Self::begun(name, self.family, base) }
    }

    /// As [`Self::clone_of`], made by the cache alone.
    pub fn provisional_clone_of(&self, n: usize, name: String, uuid: Uuid, lsn: u64) -> Self {
        let (is_provisional, is_copied) = (true, true);
        Self { is_provisional, is_copied, uuid: Some(uuid), ..self.clone_of(n, name, lsn) }
    }

    fn begun(name: String, family: u32, base: Image) -> Self {
        Self {
            name,
            uuid: None,
            made: false,
            is_provisional: false,
            is_promised: false,
            is_none: false,
            parted: Parted::default(),
            is_copied: false,
            family,
            log: Vec::new(),
            now: base.clone(),
            next_stamp: 1,
            acked: 0,
            flushed: 0,
            power_lost: false,
            damaged: false,
            former: None,
            stored: (base.clone(), 0),
            base,
            guest_is_done: false,
            deleted: BTreeSet::new(),
            maybe_deleted: BTreeSet::new(),
            as_of: BTreeSet::new(),
            maybe_as_of: BTreeSet::new(),
            labels: Labels::default(),
            has_rules: false,
            broken: None,
        }
    }

    pub fn sectors(&self) -> u64 {
        self.now.len() as u64
    }

    /// Last LSN given out.
    pub fn last_lsn(&self) -> u64 {
        self.log.len() as u64
    }

    /// A stamp for the next write.
    pub fn stamp(&mut self) -> u32 {
        self.next_stamp += 1;
        self.next_stamp - 1
    }

    /// The guest's next change, which takes one LSN.
    pub fn push(&mut self, sectors: Range<u64>, stamp: u32) {
        self.now[sectors.start as usize..sectors.end as usize].fill(stamp);
        self.log.push(Done { sectors, stamp, becomes: None });
    }

    /// A snapshot was given the next LSN.
    pub fn push_cut(&mut self) {
        self.log.push(Done { sectors: 0..0, stamp: 0, becomes: None });
    }

    /// A snapshot was said to be taken: from now on it is durable, and so is all before it.
    pub fn cut_taken(&mut self, lsn: u64) {
        let disk = &self.name;
        assert!(self.is_cut(lsn), "P5, {disk}: LSN {lsn} is said to be a snapshot, and is none");
        self.flushed = self.flushed.max(lsn);
        self.labels.taken_by_others(lsn);
    }

    /// A snapshot of what the disk was is said to be taken: it is durable, and so is all before it.
    pub fn as_of_taken(&mut self, lsn: u64) {
        assert!(lsn <= self.last_lsn(), "P5, {}: LSN {lsn} was never given out", self.name);
        self.flushed = self.flushed.max(lsn);
        self.as_of.insert(lsn);
    }

    /// Snapshots that must be there from after `base` up to `lsn`, and those that may be.
    fn wanted(&self, log: &[Done], base: u64, lsn: u64) -> [BTreeSet<u64>; 2] {
        let within = |set: &BTreeSet<u64>| -> BTreeSet<u64> {
            set.iter().copied().filter(|at| (base + 1..=lsn).contains(at)).collect()
        };
        let mut must: BTreeSet<u64> = cuts_in(log, base, lsn).into_iter().collect();
        let mut may = within(&self.maybe_as_of);
        // What asks for them has two copies in one place, of which damage may leave the older one.
        let asked = if self.damaged { &mut may } else { &mut must };
        asked.extend(within(&self.as_of));
        [must, may]
    }

    pub fn is_cut(&self, lsn: u64) -> bool {
        !cuts_in(&self.log, lsn - 1, lsn).is_empty()
    }

    /// The snapshots from after `base` up to `lsn`.
    pub fn cuts(&self, base: u64, lsn: u64) -> Vec<u64> {
        cuts_in(&self.log, base, lsn)
    }

    /// The disk was deleted, or may have been.
    pub fn may_be_gone(&self) -> bool {
        self.is_none || self.parted.may_be_deleted
    }

    /// Those of them that are surely in the store, which has all up to `committed`.
    pub fn there(&self, committed: u64) -> Vec<u64> {
        let mut there = self.cuts(0, committed);
        there.retain(|lsn| !self.deleted.contains(lsn) && !self.maybe_deleted.contains(lsn));
        there
    }

    /// Makes a sector what write number `stamp` made it.
    pub fn fill_sector(&self, stamp: u32, at: u64, sector: &mut [u8]) {
        let pattern = self.pattern(stamp, at).to_le_bytes();
        sector.chunks_exact_mut(PATTERN).for_each(|chunk| chunk.copy_from_slice(&pattern));
    }

    /// What a sector consists of, over and over.
    fn pattern(&self, stamp: u32, at: u64) -> u128 {
        match stamp {
            0 => 0,
            stamp => u128::from(at) << 64 | u128::from(self.family) << 32 | u128::from(stamp),
        }
    }

    /// Which write made this sector; words if none did.
    pub fn stamp_of(&self, bytes: &[u8], at: u64) -> Result<u32, String> {
        let stamp = u32::from_le_bytes(bytes[..4].try_into().map_err(|_| "no sector")?);
        let pattern = self.pattern(stamp, at).to_le_bytes();
        if bytes.chunks_exact(PATTERN).all(|chunk| chunk == pattern) {
            return Ok(stamp);
        }
        let (head, tail) = (&bytes[..16], &bytes[SECTOR_SIZE - 16..]);
        Err(format!(
            "{}, sector {at} is torn, misdirected or foreign: {head:x?} … {tail:x?}",
            self.name
        ))
    }

    /// What these sectors hold with the log up to `lsn`.
    pub fn at(&self, lsn: u64, sectors: Range<u64>) -> Image {
        let range = sectors.start as usize..sectors.end as usize;
        if lsn == self.last_lsn() {
            self.now[range].to_vec()
        } else {
            self.image_at(lsn)[range].to_vec()
        }
    }

    /// Judges what a read returned: each sector as it was when the read began (`before`, at LSN `since`), or as a later
    /// write made it.
    pub fn check_read(
        &self,
        first: u64,
        bytes: &[u8],
        before: &[u32],
        since: u64,
    ) -> Result<(), String> {
        for ((at, sector), was) in (first..).zip(bytes.chunks_exact(SECTOR_SIZE)).zip(before) {
            let found = self.stamp_of(sector, at)?;
            let later = &self.log[since as usize..];
            let is_later =
                || later.iter().any(|done| done.sectors.contains(&at) && done.stamp == found);
            if found != *was && !is_later() {
                return Err(format!(
                    "{}, sector {at} reads as write {found}, it was write {was} at LSN {since}",
                    self.name
                ));
            }
        }
        Ok(())
    }

    /// The disk as it was at `lsn`.
    pub fn image_at(&self, lsn: u64) -> Image {
        image_of(&self.base, &self.log[..lsn as usize], self.now.len())
    }

    /// The disk grew: what is new holds zeros.
    pub fn grow(&mut self, bytes: u64) {
        let sectors = bytes as usize / SECTOR_SIZE;
        assert!(sectors >= self.now.len(), "{}: it shrank to {sectors} sectors", self.name);
        self.now.resize(sectors, 0);
        self.stored.0.resize(sectors, 0);
    }

    /// The log was recovered up to `last`: judges that, and forgets what came after. What the device itself said to be
    /// flushed reaches up to `stated`: less than that is never opened, however damaged it is.
    pub fn recovered(&mut self, last: u64, stated: u64) {
        if std::mem::take(&mut self.is_copied) {
            // None of that changes anything; all of it was durable before there was a clone.
            let copied = Done { sectors: 0..0, stamp: COPIED, becomes: None };
            self.log.resize(last as usize, copied);
            self.flushed = last;
        }
        let Self { name: disk, flushed, acked, .. } = &*self;
        let (flushed, acked) = (*flushed, *acked);
        assert!(last <= self.last_lsn(), "{disk}: LSN {last} was recovered but never given out");
        let least = if self.damaged { flushed.min(stated) } else { flushed };
        assert!(
            last >= least,
            "P1, {disk}: LSN {last} recovered, {flushed} was flushed, and {stated} stated"
        );
        assert!(
            self.power_lost || self.damaged || last >= acked,
            "L1, {disk}: LSN {last} recovered, {acked} was acknowledged"
        );
        if last < flushed && self.former.is_none() {
            self.former = Some(self.log.clone());
        }
        self.log.truncate(last as usize);
        self.labels.truncate(last);
        let sectors = self.now.len();
        self.now = self.image_at(last);
        self.now.truncate(sectors);
        self.acked = last;
        self.flushed = last;
        self.power_lost = false;
        self.guest_is_done = false;
    }

    /// The store's image was found at `lsn` when the disk was attached.
    pub fn attached_at(&mut self, lsn: u64) {
        assert!(lsn <= self.last_lsn(), "{}: the store is ahead of the guest", self.name);
        self.stored = (self.image_at(lsn), lsn);
        self.former = None;
    }

    /// A batch goes to the store, whose image is at `base`: it must lead to the disk as of its LSN (P2).
    pub fn check_commit(&mut self, base: u64, batch: &Batch) {
        if base != self.stored.1 {
            self.stored = (self.image_at(base), base);
        }
        let lsn = batch.lsn.0;
        if lsn <= base || lsn > self.last_lsn() {
            let last = self.last_lsn();
            return self
                .breaks(format!("a commit from LSN {base} to {lsn}, the log ends at {last}"));
        }
        // A snapshot that the store has already is not made again.
        let cuts = batch.cuts.iter().filter(|cut| cut.lsn.0 > base);
        // Those of a cadence are where a batch makes them: what they hold is looked at below.
        let (of_rules, cuts): (Vec<_>, Vec<_>) = cuts.partition(|cut| is_cut(cut.label.as_str()));
        let mut labelled = cuts.iter().map(|cut| self.labels.check(cut.lsn.0, &cut.label));
        if let Some(words) = labelled.find_map(Result::err) {
            drop(labelled);
            return self.breaks(format!("the commit to LSN {lsn}: {words}"));
        }
        drop(labelled);
        let cuts: Vec<u64> = cuts.iter().map(|cut| cut.lsn.0).collect();
        if !of_rules.is_empty() && !self.has_rules {
            return self.breaks(format!("P5: the commit to LSN {lsn} has snapshots of no rule"));
        }
        let [must, may] = self.wanted(&self.log, base, lsn);
        let sure: BTreeSet<u64> =
            cuts.iter().copied().filter(|lsn| must.contains(lsn) || !may.contains(lsn)).collect();
        if sure != must {
            return self.breaks(format!(
                "P5: the commit from LSN {base} to {lsn} has snapshots {cuts:?}, not {must:?}"
            ));
        }
        let ends = batch.cuts.iter().map(|cut| cut.lsn.0).chain([lsn]);
        let (mut found, mut expected) = (self.stored.0.clone(), self.stored.0.clone());
        let mut at = base;
        for (changes, end) in batch.parts().zip(ends) {
            for change in changes {
                if let Err(words) = self.apply_change(&mut found, change) {
                    return self.breaks(format!("commit at LSN {end}: {words}"));
                }
            }
            if end <= base {
                continue;
            }
            apply(&mut expected, &self.log[at as usize..end as usize]);
            at = end;
            if let Some(at) = differs(&found, &expected) {
                let (found, expected) = (found[at], expected[at]);
                return self.breaks(format!(
                    "P2: the commit at LSN {end} would show write {found} in sector {at}, it was {expected}"
                ));
            }
        }
    }

    fn apply_change(&self, image: &mut Image, change: &Change) -> Result<(), String> {
        match change {
            Change::Write { lba, crc, data } => {
                if crc32c(data) != *crc {
                    return Err(format!("block {lba}: its checksum is not that of its data"));
                }
                for (at, sector) in (lba.0 * PER_BLOCK..).zip(data.chunks_exact(SECTOR_SIZE)) {
                    image[at as usize] = self.stamp_of(sector, at)?;
                }
            }
            Change::Zero { lba, blocks } => {
                let (from, to) = (lba.0 * PER_BLOCK, (lba.0 + blocks) * PER_BLOCK);
                image[from as usize..to as usize].fill(0);
            }
        }
        Ok(())
    }

    /// Up to where the store's image is, as far as commits told.
    pub fn stored_lsn(&self) -> u64 {
        self.stored.1
    }

    /// The commit succeeded.
    pub fn committed(&mut self, lsn: u64) {
        if lsn > self.stored.1 && lsn <= self.last_lsn() {
            let from = self.stored.1 as usize;
            apply(&mut self.stored.0, &self.log[from..lsn as usize]);
            self.stored.1 = lsn;
        }
    }

    /// The store's image was read from the device and claims to be that of `lsn` (P2).
    pub fn check_store(&self, lsn: u64, found: &Image) {
        if let Some(after) = self.after_rollback(lsn) {
            return after.check_store(lsn, found);
        }
        let disk = &self.name;
        if self.former.as_ref().is_some_and(|former| {
            let before = former.get(..lsn as usize);
            let before = before.map(|log| image_of(&self.base, log, self.now.len()));
            before.is_some_and(|before| differs(found, &before).is_none())
        }) {
            return;
        }
        assert!(lsn <= self.last_lsn(), "P2, {disk}: the store holds LSN {lsn}, never given out");
        let expected = self.image_at(lsn);
        if let Some(at) = differs(found, &expected) {
            let (found, expected) = (found.get(at), expected.get(at));
            panic!(
                "P2, {disk}: the store at LSN {lsn} shows write {found:?} in sector {at}, it was {expected:?}"
            );
        }
    }

    /// The store, whose image is at `lsn`, lists these snapshots (P5).
    pub fn check_listed(&self, lsn: u64, listed: &[u64]) {
        if let Some(after) = self.after_rollback(lsn) {
            return after.check_listed(lsn, listed);
        }
        let gone = |lsn: &u64| self.deleted.contains(lsn) || self.maybe_deleted.contains(lsn);
        // Those that must be there, and of those that are there those that need a reason.
        let compared = |log: &[Done]| -> [Vec<u64>; 2] {
            let [must, may] = self.wanted(log, 0, lsn);
            let excused = |lsn: &u64| may.contains(lsn) && !must.contains(lsn);
            let sure =
                listed.iter().filter(|lsn| !self.maybe_deleted.contains(lsn) && !excused(lsn));
            [must.iter().copied().filter(|lsn| !gone(lsn)).collect(), sure.copied().collect()]
        };
        let is_right = |[expected, sure]: [Vec<u64>; 2]| expected == sure;
        if self.former.as_ref().is_some_and(|former| is_right(compared(former))) {
            return;
        }
        let [expected, sure] = compared(&self.log);
        let disk = &self.name;
        assert_eq!(sure, expected, "P5, {disk}: snapshots in the store at LSN {lsn}");
    }

    /// The store lists snapshots with these labels (P5).
    pub fn check_labels(&self, listed: &[(u64, SnapshotLabel)]) {
        // It may hold what damage took from the log.
        if self.former.is_some() {
            return;
        }
        for (lsn, label) in listed {
            if let Err(words) = self.labels.check(*lsn, label) {
                panic!("{}: the store: {words}", self.name);
            }
        }
    }

    fn breaks(&mut self, words: String) {
        self.broken.get_or_insert(format!("{}: {words}", self.name));
    }
}

/// The LSNs of snapshots in a log, from after `base` up to `lsn`.
fn cuts_in(log: &[Done], base: u64, lsn: u64) -> Vec<u64> {
    let is_cut = |lsn: &u64| log.get(*lsn as usize - 1).is_some_and(Done::is_cut);
    (base + 1..=lsn).filter(is_cut).collect()
}

/// What so many sectors, which began as `base`, hold after all of a log. More, if the disk was larger before it was rolled back.
fn image_of(base: &Image, log: &[Done], sectors: usize) -> Image {
    let mut image = base.clone();
    let written = log.iter().map(|done| done.sectors.end as usize).max().unwrap_or(0);
    image.resize(sectors.max(base.len()).max(written), 0);
    apply(&mut image, log);
    image
}

fn apply(image: &mut Image, log: &[Done]) {
    for done in log {
        if let Some(becomes) = &done.becomes {
            let len = becomes.len().min(image.len());
            image[..len].copy_from_slice(&becomes[..len]);
            image[len..].fill(0);
        }
        image[done.sectors.start as usize..done.sectors.end as usize].fill(done.stamp);
    }
}

/// The first sector in which two images differ; beyond its end an image holds zeros.
fn differs(a: &Image, b: &Image) -> Option<usize> {
    let at = |image: &Image, at| image.get(at).copied().unwrap_or(0);
    (0..a.len().max(b.len())).find(|&n| at(a, n) != at(b, n))
}
