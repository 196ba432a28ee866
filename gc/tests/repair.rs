//! Goal: the check names damage in each structure; repair mends what has one right answer, and leaves the rest as it is, byte for
//! byte; killed at any operation, the same again ends clean.
//! Method: a store with disks, snapshots and a clone on the simulated device, closed in good order; one damage at a time.

use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::device::{BlockDevice, CawOutcome, sim::SimDevice};
use blockstore::format::bitmap::{BitmapKind, BitmapPage};
use blockstore::format::geometry::Geometry;
use blockstore::format::head::Head;
use blockstore::format::host::HostState;
use blockstore::format::superblock::Superblock;
use blockstore::format::vdi::VdiHead;
use blockstore::types::{Gba, Lba, Lsn};
use blockstore::{
    AttachOptions, Batch, Change, Cut, FormatOptions, OpenOptions, Repairer, Result, SnapshotLabel,
    Store, StoreErrorKind, WhenOffline,
};
use bytes::Bytes;
use gc::{CheckOptions, Findings, Progress, Report, check, examine, repair};
use std::collections::BTreeSet;
use std::sync::Arc;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn host() -> OpenOptions {
    OpenOptions { host_uuid: Uuid::from_u128(1), host_name: "alpha".into(), ..Default::default() }
}

fn by() -> Repairer {
    Repairer { host_name: "beta".into(), machine: "m1".into(), no_host_runs: false }
}

fn write(lba: u64, version: u64) -> Change {
    let data = AlignedBuf::copy_of(&[(lba * 7 + version) as u8; 4096]).freeze();
    Change::Write { lba: Lba(lba), crc: crc32c(&data), data }
}

/// Disks 'a' with snapshots at LSN 2 and 3, 'b', and 'c', a clone of a@2. The store is still open.
async fn open_store(seed: u64, single_host: bool) -> (SimDevice, Arc<Store>) {
    let sim = SimDevice::new(32 * MIB, seed);
    let options = FormatOptions { single_host, ..FormatOptions::default() };
    Store::format(sim.device(), options).await.expect("format");
    let store = Store::open(sim.device(), host()).await.expect("open");
    for name in ["a", "b"] {
        let info = store.create_vdi(name, 64 * MIB).await.expect("create");
        let vdi =
            store.attach(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("attach");
        let cut = |lsn: u64| Cut {
            changes: (0..20).map(|n| write(n * 300, lsn)).collect(),
            lsn: Lsn(lsn),
            time_ms: 0,
            label: SnapshotLabel::default(),
        };
        let cuts = if name == "a" { vec![cut(2), cut(3)] } else { vec![] };
        let changes = (0..30).map(|n| write(n * 200, 9)).collect();
        vdi.commit(Batch { lsn: Lsn(4), cuts, changes }).await.expect("commit");
        vdi.detach(Lsn(4)).await.expect("detach");
    }
    store.clone_vdi("c", "a", Lsn(2), WhenOffline::default()).await.expect("clone");
    // One cycle, so that the GC record and reclaim bitmaps have something to say.
    gc::collect(&store, gc::CollectOptions::default(), &Progress::default()).await.expect("cycle");
    (sim, store)
}

async fn sound() -> SimDevice {
    closed(false).await
}

async fn closed(single_host: bool) -> SimDevice {
    let (sim, store) = open_store(1, single_host).await;
    store.reclaimed().await;
    store.close().await.expect("close");
    sim.connect()
}

async fn look(sim: &SimDevice) -> Arc<Store> {
    Store::open(sim.device(), OpenOptions::read_only()).await.expect("open")
}

async fn report(sim: &SimDevice) -> Report {
    check(&*look(sim).await, CheckOptions { data: true }).await.expect("check")
}

async fn findings(sim: &SimDevice) -> Result<Findings> {
    examine(&*look(sim).await, &by(), &Progress::default()).await
}

async fn mend(sim: &SimDevice, by: &Repairer) -> Result<gc::Repaired> {
    let store = look(sim).await;
    let findings = examine(&store, by, &Progress::default()).await?;
    repair(&store, by, &findings, &Progress::default()).await
}

fn image(sim: &SimDevice) -> Vec<u8> {
    sim.peek(0, sim.capacity() as usize)
}

/// Blocks in which two images differ.
fn differing(a: &[u8], b: &[u8]) -> BTreeSet<u64> {
    let pairs = a.chunks(4096).zip(b.chunks(4096)).zip(0..);
    pairs.filter(|((a, b), _)| a != b).map(|(_, block)| block).collect()
}

fn put(sim: &SimDevice, gba: Gba, block: &[u8]) {
    sim.misplace(gba.byte_offset(), block.try_into().expect("a block"));
}

/// What the damages are done to.
struct Target {
    sim: SimDevice,
    store: Arc<Store>,
    g: Geometry,
}

impl Target {
    async fn head(&self, slot: u32) -> VdiHead {
        self.store.read_vdi_slot(slot).await.expect("read").record().cloned().expect("a head")
    }

    fn rot(&self, gba: Gba) -> BTreeSet<u64> {
        self.sim.corrupt(gba.byte_offset() + 150, 0x10);
        [gba.0].into()
    }

    async fn set_bit(&self, gba: Gba, value: bool) -> BTreeSet<u64> {
        let extent = self.g.extent_of(gba);
        let address = self.g.bmap_page(extent, 0);
        let mut page: BitmapPage =
            self.store.read_bmap(extent).await.expect("BMap").remove(0).expect("page");
        assert_ne!(page.get(gba.0 % self.g.extent_blocks), value);
        page.set(gba.0 % self.g.extent_blocks, value);
        put(&self.sim, address, &page.encode(BitmapKind::Allocation, self.store.uuid(), address));
        [address.0].into()
    }

    /// A block that is free, in an extent with blocks in use.
    async fn free_block(&self) -> Gba {
        let extent = self.g.extent_of(self.head(0).await.root.gba);
        let page = self.store.read_bmap(extent).await.expect("BMap").remove(0).expect("page");
        let (first, _) = page.next_clear_run(0, self.g.page_bits(0)).expect("a free block");
        self.g.extent_base(extent).plus(first)
    }

    /// The snapshot of 'a' at LSN 3, of which nothing else has the root.
    async fn snapshot_root(&self) -> Gba {
        let page = blockstore::snapshots::Page { newest_first: false, beyond: None, limit: 9 };
        self.store.snapshots("a", page).await.expect("snapshots")[1].root.gba
    }

    /// Does one damage; the blocks that a repair writes because of it.
    async fn damage(&self, what: What) -> BTreeSet<u64> {
        let g = &self.g;
        let none = BTreeSet::new();
        let left = |_: BTreeSet<u64>| none.clone();
        match what {
            What::FirstSuperblock => self.rot(g.superblocks()[0]),
            What::SecondSuperblock => self.rot(g.superblocks()[1]),
            What::OtherSuperblock => {
                let (at, store) = (g.superblocks()[1], self.store.uuid());
                let record = Superblock { label: "x".into(), ..self.store.superblock().clone() };
                put(&self.sim, at, &Head { store, sequence: 1, record }.encode_block(at));
                [at.0].into()
            }
            What::GcRecord => self.rot(Gba(g.gc_start)),
            What::SystemExtent => self.rot(g.extent_slot(0)),
            What::ExtentHeader => self.rot(g.extent_base(1)),
            What::BitmapPage => self.rot(g.bmap_page(1, 0)),
            What::ReclaimPage => self.rot(g.reclaim_page(1, 0)),
            What::BitOfDisk => self.set_bit(self.head(1).await.root.gba, false).await,
            What::BitOfHeader => self.set_bit(g.extent_base(1), false).await,
            What::Leak => self.set_bit(self.free_block().await, true).await,
            What::ExtentRecord => left(self.rot(g.extent_slot(1))),
            What::Head => left(self.rot(g.vdi_slot(1))),
            What::Gap => {
                put(&self.sim, g.vdi_slot(0), &[0; 4096]);
                none
            }
            What::Root => left(self.rot(self.head(1).await.root.gba)),
            What::SnapshotRoot => left(self.rot(self.snapshot_root().await)),
            What::SnapshotList => left(self.rot(self.head(0).await.snapshots.root.gba)),
            What::Name => left(self.rot(self.head(1).await.meta.gba)),
            What::Data => {
                let head = self.head(1).await;
                let mut extents = blockstore::tree::Extents::of(&head);
                let leaf = extents.next_leaf(&self.store.reader()).await.expect("read");
                left(self.rot(leaf.expect("a leaf")[0].1.gba))
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    FirstSuperblock,
    SecondSuperblock,
    OtherSuperblock,
    GcRecord,
    SystemExtent,
    ExtentHeader,
    BitmapPage,
    ReclaimPage,
    BitOfDisk,
    BitOfHeader,
    Leak,
    ExtentRecord,
    Head,
    Gap,
    Root,
    SnapshotRoot,
    SnapshotList,
    Name,
    Data,
}

/// A damage, and what the check says of it; no words: it is none that counts as a problem.
const DAMAGES: [(What, &str); 19] = [
    (What::FirstSuperblock, "superblock at block 0 is damaged"),
    (What::SecondSuperblock, "its copy is in use"),
    (What::OtherSuperblock, "differs from its copy"),
    (What::GcRecord, "GC record at block 1 is damaged"),
    (What::SystemExtent, "record of extent 0"),
    (What::ExtentHeader, "header of extent 1 is damaged"),
    (What::BitmapPage, ""),
    (What::ReclaimPage, ""),
    (What::BitOfDisk, "VDI 'b'"),
    (What::BitOfHeader, "header or bitmaps are marked free"),
    (What::Leak, ""),
    (What::ExtentRecord, "record of extent 1"),
    (What::Head, "VDI record in slot 1"),
    (What::Gap, "registry has a gap: slot 0"),
    (What::Root, "VDI 'b'"),
    (What::SnapshotRoot, "snapshot 3"),
    (What::SnapshotList, "its list of snapshots is damaged"),
    (What::Name, "its name block is damaged"),
    (What::Data, "its block 0 is damaged"),
];

async fn target(origin: &SimDevice) -> Target {
    let sim = origin.fork(7);
    let store = look(&sim).await;
    let g = store.superblock().geometry.clone();
    Target { sim, store, g }
}

#[tokio::test]
async fn each_damage_is_named_and_mended_or_left_alone() {
    let origin = sound().await;
    assert!(report(&origin).await.is_sound());
    let whole = image(&origin);
    for (what, words) in DAMAGES {
        let target = target(&origin).await;
        let wanted = target.damage(what).await;
        let damaged = image(&target.sim);
        let found = report(&target.sim).await;
        let says = |report: &Report| report.problems.iter().any(|p| p.contains(words));
        assert_eq!(says(&found), !words.is_empty(), "{what:?}: {found:#?}");
        assert_eq!(found.is_sound(), words.is_empty(), "{what:?}: {found:#?}");
        assert_eq!(found.problems.len(), found.advice.len());

        let findings = findings(&target.sim).await.expect("examine");
        assert!(image(&target.sim) == damaged, "{what:?}: looking changed something");
        assert_eq!(findings.repairs.len(), wanted.len(), "{what:?}: {findings:#?}");
        // What the check says to be repaired is, and all else comes with advice.
        assert!(findings.left().count() == 0 || wanted.is_empty(), "{what:?}: {findings:#?}");

        let repaired = mend(&target.sim, &by()).await.expect("repair");
        let after = image(&target.sim);
        // The repair notes in the host table that it is there.
        let mut wrote = differing(&damaged, &after);
        assert!(wrote.remove(&target.g.host_slot(1).0), "{what:?}: no host record");
        assert_eq!(wrote, wanted, "{what:?}");
        if wanted.is_empty() {
            assert_eq!(repaired.blocks_written, 0);
            continue;
        }
        let now = report(&target.sim).await;
        assert!(now.is_sound() && now.blocks_leaked == 0, "{what:?}: {now:#?}");
        assert_eq!((now.bitmap_pages_damaged, now.reclaim_pages_damaged), (0, 0), "{what:?}");
        if matches!(
            what,
            What::FirstSuperblock
                | What::SecondSuperblock
                | What::OtherSuperblock
                | What::SystemExtent
                | What::ExtentHeader
        ) {
            let mut differ = differing(&whole, &after);
            differ.remove(&target.g.host_slot(1).0);
            assert_eq!(differ, BTreeSet::new(), "{what:?}: not what it was before the damage");
        }
        goes_on(&target.sim, &format!("{what:?}")).await;
    }
}

/// An agent opens the store, writes, and collects.
async fn goes_on(sim: &SimDevice, when: &str) {
    let store = Store::open(sim.connect().device(), host()).await.expect("open");
    let info = store.lookup_vdi("b").await.expect("lookup");
    let vdi = store.attach(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("attach");
    let changes = (0..400).map(|n| write(n, 11)).collect();
    vdi.commit(Batch::new(Lsn(5), changes)).await.expect("commit");
    gc::collect(&store, gc::CollectOptions::default(), &Progress::default()).await.expect("cycle");
    let report = check(&store, CheckOptions { data: true }).await.expect("check");
    assert!(report.is_sound(), "{when}: {report:#?}");
    vdi.detach(Lsn(5)).await.expect("detach");
    store.close().await.expect("close");
}

#[tokio::test]
async fn nothing_is_freed_while_something_could_hide_what_is_reachable() {
    let origin = sound().await;
    for hides in [What::Head, What::Gap, What::Root, What::SnapshotRoot, What::SnapshotList] {
        let target = target(&origin).await;
        target.damage(What::Leak).await;
        target.damage(What::BitOfDisk).await;
        target.damage(hides).await;
        let findings = findings(&target.sim).await.expect("examine");
        assert!(findings.check.blocks_leaked > 0);
        assert_eq!(findings.blocks_to_free, 0, "{hides:?}: {findings:#?}");
        assert!(findings.not_freed_because.is_some(), "{hides:?}");
        // What is seen to be in use is marked so all the same.
        let seen = !matches!(hides, What::Head | What::Gap);
        assert_eq!(findings.blocks_to_mark, u64::from(seen), "{hides:?}: {findings:#?}");
    }
}

/// What a later version would write there: the same with a version that this one does not know, and a checksum that is right.
async fn newer(target: &Target, gba: Gba) {
    let mut block = target.sim.peek(gba.byte_offset(), 4096);
    block[8] = 99;
    let (crc, covered) = if block.starts_with(b"BALLAST") {
        (508, block[..508].to_vec())
    } else {
        (92, [&block[..92], &block[96..]].concat())
    };
    block[crc..crc + 4].copy_from_slice(&crc32c(&covered).to_le_bytes());
    put(&target.sim, gba, &block);
}

#[tokio::test]
async fn what_a_newer_version_wrote_is_no_damage_and_stops_a_repair() {
    for single_host in [false, true] {
        let origin = closed(single_host).await;
        let g = target(&origin).await.g;
        // Of a pair the older copy could still be read, which would take the record back.
        let pair = |first: Gba| first.plus(u64::from(single_host));
        let places = [
            pair(Gba(g.gc_start)),
            pair(g.host_slot(0)),
            pair(g.vdi_slot(1)),
            g.vdi_slot(1),
            g.extent_slot(1),
            g.extent_slot(0),
            g.bmap_page(1, 0),
            g.reclaim_page(1, 0),
        ];
        for place in places {
            let target = target(&origin).await;
            target.damage(What::SecondSuperblock).await;
            newer(&target, place).await;
            let before = image(&target.sim);
            let by = Repairer { no_host_runs: true, ..by() };
            let error = mend(&target.sim, &by).await.expect_err("not understood");
            assert_eq!(error.kind, StoreErrorKind::NewerVersion, "block {place}: {error}");
            assert!(error.to_string().contains("version 99"), "{error}");
            assert!(image(&target.sim) == before, "block {place}");
        }
    }
}

#[tokio::test]
async fn nothing_is_collected_from_a_registry_with_a_gap() {
    let target = target(&sound().await).await;
    target.damage(What::Gap).await;
    let before = report(&target.sim).await.blocks_allocated;
    let store = Store::open(target.sim.connect().device(), host()).await.expect("open");
    let cycle = gc::collect(&store, gc::CollectOptions::default(), &Progress::default()).await;
    let error = cycle.expect_err("a disk is hidden");
    assert!(error.to_string().contains("registry has a gap"), "{error}");
    store.close().await.expect("close");
    assert!(report(&target.sim).await.blocks_allocated >= before);
}

#[tokio::test]
async fn a_store_in_use_is_not_repaired_and_a_killed_host_is_kept_out_first() {
    let (sim, store) = open_store(2, false).await;
    let info = store.lookup_vdi("b").await.expect("lookup");
    let vdi = store.attach(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("attach");
    vdi.commit(Batch::new(Lsn(5), vec![write(7, 1)])).await.expect("commit");
    let before = image(&sim);
    let second = sim.connect();
    let error = mend(&second, &by()).await.expect_err("it is in use");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    for word in ["'alpha'", "--no-host-runs", "SIGTERM"] {
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(image(&sim) == before, "a refused repair changed something");
    sim.kill_host();
    assert!(mend(&second, &by()).await.is_err(), "killed is not known to be killed");
    let slot = store.superblock().geometry.vdi_slot(1);
    let old = Bytes::from(second.peek(slot.byte_offset(), 512));
    let word = Repairer { no_host_runs: true, ..by() };
    let repaired = mend(&second, &word).await.expect("repair");
    assert!(repaired.check.is_sound(), "{:#?}", repaired.check);
    assert_eq!(repaired.check.blocks_leaked, 0, "claims of the killed agent are freed");
    // A command of the killed agent that lands only now, with a tree in blocks that are free.
    let late = second.compare_and_write(slot.byte_offset(), old.clone(), old);
    assert_eq!(late.await.expect("an answer"), CawOutcome::Miscompare);
    // The agent comes back.
    let store = Store::open(sim.connect().device(), host()).await.expect("open");
    let vdi = store.resume(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("resume");
    vdi.commit(Batch::new(Lsn(6), vec![write(8, 1)])).await.expect("commit");
    assert!(check(&store, CheckOptions { data: true }).await.expect("check").is_sound());
}

#[tokio::test]
async fn heads_are_raised_before_a_killed_host_is_forgotten_however_often_a_repair_is_killed() {
    let (origin, store) = open_store(2, false).await;
    let info = store.lookup_vdi("b").await.expect("lookup");
    let vdi = store.attach(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("attach");
    vdi.commit(Batch::new(Lsn(5), vec![write(7, 1)])).await.expect("commit");
    origin.kill_host();
    let g = store.superblock().geometry.clone();
    let word = Repairer { no_host_runs: true, ..by() };
    for n in 0.. {
        let sim = origin.fork(n).connect();
        let heads = (0..3).map(|slot| g.vdi_slot(slot).byte_offset());
        let heads: Vec<(u64, Bytes)> =
            heads.map(|offset| (offset, Bytes::from(sim.peek(offset, 512)))).collect();
        let session = sim.connect();
        session.crash_after(n);
        let ended = tokio::select! {
            biased;
            () = session.died() => false,
            ended = mend(&session, &word) => { ended.expect("repair"); true }
        };
        session.kill_host();
        let next = sim.connect();
        // The word is given again only if it is asked for.
        if mend(&next, &by()).await.is_err() {
            mend(&next, &word).await.expect("repair");
        }
        for (offset, old) in heads {
            let late = next.compare_and_write(offset, old.clone(), old);
            let late = late.await.expect("an answer");
            assert_eq!(late, CawOutcome::Miscompare, "killed after {n}, head at {offset}");
        }
        if ended {
            break;
        }
    }
}

#[tokio::test]
async fn a_damaged_host_record_may_be_that_of_a_running_host() {
    let target = target(&sound().await).await;
    target.damage(What::SecondSuperblock).await;
    target.rot(target.g.host_slot(0));
    let error = findings(&target.sim).await.expect_err("who runs is not known");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    assert!(error.to_string().contains("host record at block 3 is damaged"), "{error}");
    let word = Repairer { no_host_runs: true, ..by() };
    let left = mend(&target.sim, &word).await.expect("repair").check;
    assert_eq!(left.problems.len(), 1, "{left:#?}");
    assert!(left.problems[0].contains("host record") && left.advice[0].is_some());
}

#[tokio::test]
async fn a_store_that_changed_after_it_was_examined_is_not_repaired() {
    let target = target(&sound().await).await;
    target.damage(What::Leak).await;
    let store = look(&target.sim).await;
    let findings = examine(&store, &by(), &Progress::default()).await.expect("examine");
    // An agent came and went.
    let agent = Store::open(target.sim.connect().device(), host()).await.expect("open");
    agent.create_vdi("d", MIB).await.expect("create");
    agent.close().await.expect("close");
    let before = image(&target.sim);
    let error = repair(&store, &by(), &findings, &Progress::default()).await.expect_err("changed");
    assert_eq!(error.kind, StoreErrorKind::Changed);
    assert!(image(&target.sim) == before);
}

#[tokio::test(start_paused = true)]
async fn a_killed_repair_keeps_agents_and_other_machines_out() {
    let origin = sound().await;
    let mut seen_up = 0;
    for n in 0.. {
        let target = target(&origin).await;
        target.damage(What::Leak).await;
        let session = target.sim.connect();
        session.crash_after(n);
        let by = by();
        let ended = tokio::select! {
            biased;
            () = session.died() => false,
            ended = mend(&session, &by) => { ended.expect("repair"); true }
        };
        session.kill_host();
        let next = target.sim.connect();
        let hosts = look(&next).await.scan_hosts().await.expect("hosts");
        let up = hosts
            .iter()
            .filter_map(|view| view.record())
            .any(|record| record.uuid == blockstore::REPAIR_HOST && record.state == HostState::Up);
        if up {
            seen_up += 1;
            let Err(error) = Store::open(next.device(), host()).await else { panic!("let in") };
            assert!(error.to_string().contains("store repair on beta"), "{error}");
            let other = Repairer { machine: "m2".into(), ..by.clone() };
            assert_eq!(mend(&next, &other).await.expect_err("in use").kind, StoreErrorKind::InUse);
        }
        assert!(mend(&next, &by).await.expect("repair").check.is_sound(), "after {n}");
        Store::open(next.device(), host()).await.expect("an agent is let in afterwards");
        if ended {
            break;
        }
    }
    assert!(seen_up > 5, "killed {seen_up} times while it held the store");
}

/// One death of a repair, after operation `n`; false if it ended before.
async fn die_at(origin: &SimDevice, n: u64, power_loss: bool) -> bool {
    let target = target(&origin.fork(n)).await;
    for what in [What::SecondSuperblock, What::ExtentHeader, What::GcRecord, What::Leak] {
        target.damage(what).await;
    }
    // Of a pair, both.
    if target.store.superblock().single_host {
        target.rot(Gba(target.g.gc_start + 1));
    }
    target.rot(target.g.bmap_page(2, 0));
    let session = target.sim.connect();
    session.crash_after(n);
    let by = by();
    let died = tokio::select! {
        biased;
        () = session.died() => true,
        ended = mend(&session, &by) => { ended.expect("repair"); false }
    };
    if power_loss {
        session.crash()
    } else {
        session.kill_host()
    }
    let again = target.sim.connect();
    let repaired = mend(&again, &by).await.unwrap_or_else(|error| panic!("after {n}: {error}"));
    assert!(repaired.check.is_sound(), "after {n}: {:#?}", repaired.check);
    let report = report(&again).await;
    assert!(report.is_sound() && report.blocks_leaked == 0, "after {n}: {report:#?}");
    goes_on(&again, &format!("after {n}")).await;
    died
}

fn die_everywhere(power_loss: bool, single_host: bool) {
    for n in 0.. {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        let died =
            runtime.block_on(async { die_at(&closed(single_host).await, n, power_loss).await });
        if !died {
            assert!(n > 30, "a repair has {n} operations");
            return;
        }
    }
}

#[test]
fn a_repair_that_is_killed_at_any_operation_is_ended_by_the_next() {
    die_everywhere(false, false);
}

#[test]
fn power_loss_at_any_operation_of_a_repair() {
    die_everywhere(true, false);
}

#[test]
fn power_loss_at_any_operation_of_a_repair_without_compare_and_write() {
    die_everywhere(true, true);
}
