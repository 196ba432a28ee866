//! Scrubs beside everything else: cut off at random, gone on with by this agent or the next from what was noted of them, with a rate or
//! without. The agent's `host/scrubbing.rs` drives them the same way.
//!
//! No false alarm: whatever is written, freed, used again, collected and unmapped meanwhile, and whatever fails on the way, nothing is
//! called damaged in a store that nobody harmed. Nothing passed over: a block that the simulator harms, and that can still be reached
//! when the pass is through, was named. Once nothing changes any more, what is damaged is named, and nothing else.

use crate::host::{Agent, few};
use crate::walk::{self, Key};
use blockstore::device::sim::{Reach, SimDevice};
use blockstore::snapshots::Page;
use blockstore::types::{BLOCK_SIZE, Gba, Lba};
use gc::scrub::{Damage, Part, Saved};
use gc::{ScrubOptions, ScrubProgress, Scrubbed};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// How often an agent notes how far a pass is.
const NOTE_EVERY: Duration = Duration::from_secs(2);
/// Longer than any life.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// Guests' reads that began before take less, once nothing fails any more.
const READS_END: Duration = Duration::from_secs(10);
/// A block of a tree, of a list, or with a name is damaged if so many replies, by two looks of two reads each, are wrong.
const LOOKS_OF_BLOCKS: usize = 4;
/// A record, or the tables, if so many looks find it so.
const LOOKS_OF_RECORDS: usize = 3;
/// Blocks that are harmed once nothing changes any more, one after the other.
const SPOILED: u32 = 3;

/// What is known of passes, over all lives.
pub type Scrubs = Arc<Mutex<Passes>>;

/// See [`Scrubs`].
#[derive(Debug, Default)]
pub struct Passes {
    /// In the run directory.
    begun: Option<Begun>,
    /// Harmed on purpose.
    rot: Option<Rot>,
    /// What the pass found that began after that.
    found: Option<Scrubbed>,
    /// That came to their end.
    ended: u64,
    /// Blocks that were harmed, and found to be.
    named: u64,
}

impl Passes {
    /// Passes that came to their end, and harmed blocks that were found.
    pub fn counts(&self) -> (u64, u64) {
        (self.ended, self.named)
    }

    /// A block is harmed at the moment.
    pub fn has_spoiled(&self) -> bool {
        self.rot.is_some()
    }
}

/// A pass that is under way.
#[derive(Clone, Debug)]
struct Begun {
    /// JSON, as the run directory has it.
    saved: String,
    /// Replies of the device that had been garbled before it began.
    garbled: usize,
}

/// A block with a flipped bit.
#[derive(Clone, Debug)]
struct Rot {
    key: Key,
    /// Byte on the device.
    at: u64,
    mask: u8,
    /// The block as it is since then.
    content: Vec<u8>,
}

impl Rot {
    fn new(sim: &SimDevice, key: Key, rng: &mut SmallRng) -> Self {
        let first = key.0.byte_offset();
        let (at, mask) =
            (first + rng.random_range(0..BLOCK_SIZE as u64), 1 << rng.random_range(0..8));
        sim.corrupt(at, mask);
        Self { key, at, mask, content: sim.peek(first, BLOCK_SIZE) }
    }

    /// It is whole again, unless something else is there by now.
    fn heal(&self, sim: &SimDevice) {
        if sim.peek(self.key.0.byte_offset(), BLOCK_SIZE) == self.content {
            sim.corrupt(self.at, self.mask);
        }
    }

    fn is_named(&self, damage: &Damage) -> bool {
        damage.block == Some(self.key.0.0)
    }
}

impl Agent {
    /// One pass after the other. In the last life some begin with a block that is harmed.
    pub async fn scrub(&self, rng: &mut SmallRng, last: bool) {
        if last && !self.store_harmed && rng.random() && self.spoil_something_cold(rng).await {
            let found = self.scrub_through(rng).await;
            self.scrubs.lock().found = Some(found);
            return std::future::pending().await;
        }
        for round in 0_u32.. {
            // An agent goes on with what was begun as soon as the store is there.
            let at_once = round == 0 && self.scrubs.lock().begun.is_some();
            if !at_once {
                // An outage of a day needs no thousand.
                let pause = Duration::from_millis(few(rng, 10_000));
                tokio::time::sleep(pause * (1 + round / 30)).await;
            }
            let patience = Duration::from_millis(few(rng, 60_000));
            if self.pass(rng, patience).await.is_none() && rng.random_bool(0.1) {
                // It is told to stop.
                self.scrubs.lock().begun = None;
            }
        }
    }

    /// A pass that is begun, or goes on: to its end, if that comes in time.
    async fn pass(&self, rng: &mut SmallRng, patience: Duration) -> Option<Scrubbed> {
        let begun = self.scrubs.lock().begun.clone();
        let (saved, garbled) = match begun {
            Some(Begun { saved, garbled }) => {
                (serde_json::from_str(&saved).expect("what was noted is understood"), garbled)
            }
            None => (Saved::default(), self.san.sim().garbled().len()),
        };
        // One that is waited for is not to take a day.
        let faster = if patience == FOR_EVER { 8 } else { 0 };
        let rate = rng.random_bool(0.6).then(|| 1 << (faster + rng.random_range(15..23)));
        let (store, progress) = (self.store(), ScrubProgress::from(saved));
        let note = || {
            let saved = serde_json::to_string(&progress.kept()).expect("a note");
            self.judge(&progress.saved().scrubbed, garbled);
            self.scrubs.lock().begun = Some(Begun { saved, garbled });
        };
        let noting = async {
            loop {
                note();
                tokio::time::sleep(NOTE_EVERY).await;
            }
        };
        tokio::select! {
            biased;
            ended = gc::scrub(&store, ScrubOptions { rate }, &progress) => {
                let found = ended.expect("P7: a scrub of a store that is open comes to its end");
                self.judge(&found, garbled);
                let mut scrubs = self.scrubs.lock();
                scrubs.begun = None;
                scrubs.ended += 1;
                Some(found)
            }
            () = noting => unreachable!("it is noted for ever"),
            () = tokio::time::sleep(patience) => {
                if rng.random() {
                    // As an agent that stops in order.
                    note();
                }
                None
            }
        }
    }

    /// To its end, with some cuts before: one that does not come to it is not helped by another.
    async fn scrub_through(&self, rng: &mut SmallRng) -> Scrubbed {
        let mut cuts = rng.random_range(0..4);
        loop {
            let patience = Duration::from_millis(few(rng, 60_000));
            let patience = if cuts == 0 { FOR_EVER } else { patience };
            if let Some(found) = self.pass(rng, patience).await {
                return found;
            }
            cuts -= 1;
        }
    }

    /// The store is away for a while.
    async fn outage(&self, reach: Reach, after: u64, lasts: u64) {
        let sim = self.san.sim();
        tokio::time::sleep(Duration::from_millis(after)).await;
        sim.set_reach(reach);
        tokio::time::sleep(Duration::from_millis(lasts)).await;
        sim.set_reach(Reach::Up);
    }

    /// Whether all that was called damaged is.
    fn judge(&self, scrubbed: &Scrubbed, garbled_before: usize) {
        if self.store_harmed {
            return;
        }
        let sim = self.san.sim();
        let rot = self.scrubs.lock().rot.clone();
        for damage in &scrubbed.damage {
            if rot.as_ref().is_some_and(|rot| rot.is_named(damage)) {
                continue;
            }
            // What the device says wrongly each time it is asked counts as damaged.
            let garbled = sim.garbled();
            let garbled = garbled.get(garbled_before..).unwrap_or_default();
            let of = |block: u64| garbled.iter().filter(|other| **other == block).count();
            let is_excused = match (damage.part, damage.block) {
                (Part::Table, _) | (_, None) => garbled.len() >= LOOKS_OF_RECORDS,
                // A record has two places.
                (Part::Record, Some(block)) => of(block) + of(block + 1) >= LOOKS_OF_RECORDS,
                (_, Some(block)) => of(block) >= LOOKS_OF_BLOCKS,
            };
            assert!(is_excused, "P7: a scrub calls damaged what is not: {damage:#?}");
        }
        assert_eq!(scrubbed.damage_not_listed, 0, "P7: {scrubbed:#?}");
    }

    /// Harms a block of a snapshot that no guest reads. False if there is none.
    async fn spoil_something_cold(&self, rng: &mut SmallRng) -> bool {
        let Some(key) = self.something_cold(rng).await else { return false };
        tokio::time::sleep(READS_END).await;
        let mut scrubs = self.scrubs.lock();
        scrubs.rot = Some(Rot::new(self.san.sim(), key, rng));
        // What was begun may have been there.
        scrubs.begun = None;
        true
    }

    /// Content of a snapshot that no disk has any more.
    async fn something_cold(&self, rng: &mut SmallRng) -> Option<Key> {
        let others = self.served_clones();
        if others.iter().any(|n| !self.vdis.lock().contains_key(n)) {
            return None;
        }
        let (store, (_, vdi)) = (self.store(), self.any_disk(rng));
        let page = Page { newest_first: rng.random(), beyond: None, limit: 16 };
        let listed = vdi.snapshots(page).await.ok()?;
        if listed.is_empty() {
            return None;
        }
        let snapshot = &listed[rng.random_range(0..listed.len())];
        // It must not go while it is looked through.
        let held = store.open_snapshot(self.holds.hold(vdi.uuid(), snapshot.lsn)).await.ok()?;
        let registry = store.scan_vdis().await.ok()?;
        let mut heads = registry.iter().filter_map(|(_, view)| view.record());
        let head = heads.find(|head| head.uuid == vdi.uuid())?;
        let blocks = |bytes: u64| (bytes / BLOCK_SIZE as u64) as u32;
        let size = blocks(snapshot.size_bytes);
        let reader = store.reader();
        let found = reader.resolve(&snapshot.as_head(head), Lba(0), size).await.ok()?;
        let written = found.into_iter().filter(|pointer| !pointer.is_sparse()).map(walk::key);
        let mut cold: BTreeSet<Key> = written.collect();
        let disks: Vec<_> = self.vdis.lock().values().cloned().collect();
        for disk in disks {
            let size = blocks(disk.committed().size_bytes);
            for pointer in disk.resolve(Lba(0), size).await.ok()? {
                cold.remove(&walk::key(pointer));
            }
        }
        drop(held);
        let pick = rng.random_range(0..cold.len().max(1));
        cold.into_iter().nth(pick)
    }

    /// Nothing fails, nothing changes any more: what is damaged is found, and nothing else.
    pub async fn finish_scrubs(&self, rng: &mut SmallRng) {
        let found = self.scrubs.lock().found.take();
        let found = match found {
            Some(found) => found,
            None => self.scrub_through(rng).await,
        };
        if self.store_harmed {
            return;
        }
        let rot = self.scrubs.lock().rot.take();
        if let Some(rot) = rot {
            self.judge_rot(&rot, &found).await;
        }
        let (store, sim) = (self.store(), self.san.sim());
        let all = walk::reachable(&store).await.expect("all can be read");
        // It waits for a store that is away.
        let reach = if rng.random() { Reach::Failing } else { Reach::Hanging };
        let outage = self.outage(reach, few(rng, 5_000), few(rng, 100_000));
        let (sound, ()) = tokio::join!(self.scrub_through(rng), outage);
        let words = "P7: a scrub of a sound store at rest";
        assert_eq!((sound.damaged(), sound.unverified), (0, 0), "{words}: {sound:#?}");
        let content = all.values().filter(|data| **data).count() as u64;
        let (read, nodes) = (sound.data_blocks, sound.metadata_blocks);
        let is_all = read >= content && nodes >= all.len() as u64 - content;
        assert!(is_all, "{words} has not seen all of {} blocks: {sound:#?}", all.len());
        for _ in 0..SPOILED {
            let pick = rng.random_range(0..all.len().max(1));
            let Some((key, data)) = all.iter().nth(pick) else { return };
            let rot = Rot::new(sim, *key, rng);
            self.scrubs.lock().rot = Some(rot.clone());
            let found = self.scrub_through(rng).await;
            rot.heal(sim);
            self.scrubs.lock().rot = None;
            let named: BTreeSet<Option<u64>> = found.damage.iter().map(|one| one.block).collect();
            let Gba(block) = key.0;
            assert_eq!(
                named,
                [Some(block)].into(),
                "P7: a scrub of a store at rest with one damaged block (content: {data}): {found:#?}"
            );
            self.scrubs.lock().named += 1;
        }
    }

    /// A block was harmed while all went on, before the pass began that found this.
    async fn judge_rot(&self, rot: &Rot, found: &Scrubbed) {
        let is_named = found.damage.iter().any(|damage| rot.is_named(damage));
        rot.heal(self.san.sim());
        let all = walk::reachable(&self.store()).await.expect("all can be read");
        let is_there = all.contains_key(&rot.key);
        // Of what it could not find out about it says so.
        assert!(
            is_named || !is_there || found.unverified > 0,
            "P7: a scrub passes over block {}, which is damaged and reachable: {found:#?}",
            rot.key.0
        );
        self.scrubs.lock().named += u64::from(is_named);
    }
}
