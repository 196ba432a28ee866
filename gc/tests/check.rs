//! Goal: the check finds every kind of damage it promises to find, and nothing in a sound store.
//! Method: a small store on the simulated device, damaged by hand in one place per test.

use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::device::sim::SimDevice;
use blockstore::format::bitmap::{BitmapKind, BitmapPage};
use blockstore::format::head::Head;
use blockstore::format::vdi::VdiHead;
use blockstore::snapshots::Page;
use blockstore::types::{Birth, Gba, Lba, Lsn};
use blockstore::{
    AttachOptions, Batch, Change, Cut, FormatOptions, OpenOptions, Result, SnapshotLabel, Store,
    Vdi,
};
use bytes::Bytes;
use gc::{CheckOptions, Report, check};
use std::sync::Arc;
use uuid::Uuid;

const HOST: Uuid = Uuid::from_u128(1);

fn host() -> OpenOptions {
    OpenOptions { host_uuid: HOST, host_name: "a".into(), ..Default::default() }
}

fn write(lba: u64) -> Change {
    let data = AlignedBuf::copy_of(&[lba as u8 + 1; 4096]).freeze();
    Change::Write { lba: Lba(lba), crc: crc32c(&data), data }
}

/// A store with the disks "a" and "b", 60 blocks each.
async fn store() -> Result<(SimDevice, Arc<Store>, Vec<Arc<Vdi>>)> {
    let sim = SimDevice::new(32 << 20, 1);
    Store::format(sim.device(), FormatOptions::default()).await?;
    let store = Store::open(sim.device(), host()).await?;
    let mut vdis = Vec::new();
    for name in ["a", "b"] {
        let info = store.create_vdi(name, 16 << 20).await?;
        let vdi = store.attach(info.uuid, AttachOptions { log_id: Uuid::from_u128(9) }).await?;
        let changes = (0..60).map(|n| write(n * 64)).collect();
        vdi.commit(Batch::new(Lsn(1), changes)).await?;
        vdis.push(vdi);
    }
    Ok((sim, store, vdis))
}

async fn report(sim: &SimDevice) -> Report {
    let store = Store::open(sim.connect().device(), OpenOptions::read_only()).await.expect("open");
    check(&store, CheckOptions { data: true }).await.expect("check")
}

/// Exactly one problem, with these words in it.
async fn finds(sim: &SimDevice, words: &[&str]) {
    let report = report(sim).await;
    assert_eq!(report.problems.len(), 1, "{report:#?}");
    for word in words {
        assert!(report.problems[0].contains(word), "{word}: {report:#?}");
    }
    assert!(!report.is_sound());
}

async fn put(sim: &SimDevice, gba: Gba, block: &[u8]) {
    let data = vec![Bytes::copy_from_slice(block)];
    sim.device().write(gba.byte_offset(), data).await.expect("write");
}

async fn change_head(sim: &SimDevice, store: &Store, slot: u32, f: impl FnOnce(&mut VdiHead)) {
    let view = store.read_vdi_slot(slot).await.expect("read");
    let mut record = view.record().cloned().expect("a head");
    f(&mut record);
    let head = Head { store: store.uuid(), sequence: view.sequence() + 1, record };
    put(sim, view.slot.first, &head.encode_block(view.slot.first)).await;
}

#[tokio::test]
async fn a_sound_store_is_found_sound_also_while_in_use() {
    let (sim, store, vdis) = store().await.expect("store");
    let live = report(&sim).await;
    assert!(live.is_sound(), "{live:#?}");
    assert_eq!((live.vdis, live.data_blocks_checked), (2, 120));
    // Two leaves less than 16 per disk are touched: 60 blocks, every 64th, in 15 leaves, and a root.
    assert_eq!(live.nodes, 2 * 16);
    assert_eq!(live.blocks_reachable, 120 + 32 + 2);
    assert!(live.blocks_leaked > 0, "claims of the running host are not reachable");
    for vdi in &vdis {
        vdi.detach(Lsn(1)).await.expect("detach");
    }
    store.close().await.expect("close");
    let closed = report(&sim).await;
    assert_eq!(closed.blocks_leaked, 0, "an orderly close leaves nothing behind: {closed:#?}");
    let json = serde_json::to_value(&closed).expect("json");
    assert_eq!(json["problems"].as_array().map(Vec::len), Some(0));
}

#[tokio::test]
async fn a_reachable_block_that_is_marked_free_is_found() {
    let (sim, store, vdis) = store().await.expect("store");
    let gba = vdis[0].resolve(Lba(64), 1).await.expect("resolve")[0].gba;
    let g = store.superblock().geometry.clone();
    let (extent, address) = (g.extent_of(gba), g.bmap_page(g.extent_of(gba), 0));
    let mut page: BitmapPage =
        store.read_bmap(extent).await.expect("BMap").remove(0).expect("page");
    page.set(gba.0 % g.extent_blocks, false);
    put(&sim, address, &page.encode(BitmapKind::Allocation, store.uuid(), address)).await;
    finds(&sim, &["VDI 'a'", "disk block 64", "marked free"]).await;
}

#[tokio::test]
async fn blocks_that_two_disks_hold_are_found() {
    let (sim, store, vdis) = store().await.expect("store");
    let root = vdis[0].committed().root;
    change_head(&sim, &store, 1, |head| head.root = root).await;
    finds(&sim, &["VDI 'b'", "its root", "something else uses too"]).await;
}

#[tokio::test]
async fn shared_blocks_of_snapshots_are_no_problem() {
    let (sim, store, vdis) = store().await.expect("store");
    let state = vdis[0].committed();
    change_head(&sim, &store, 0, |head| head.last_snapshot_birth = head.birth).await;
    change_head(&sim, &store, 1, |head| {
        head.root = state.root;
        head.last_snapshot_birth = head.birth;
    })
    .await;
    let report = report(&sim).await;
    assert!(report.is_sound(), "{report:#?}");
}

/// Snapshots of "a" at LSNs 2 to 4, with a block written before each, and another after them.
async fn cut(vdi: &Vdi) {
    let cuts = (2..=4).map(|lsn| Cut {
        changes: vec![write(64 * lsn)],
        lsn: Lsn(lsn),
        time_ms: 0,
        label: SnapshotLabel::default(),
    });
    let batch = Batch { lsn: Lsn(5), cuts: cuts.collect(), changes: vec![write(64)] };
    vdi.commit(batch).await.expect("commit");
}

#[tokio::test]
async fn snapshots_are_walked_and_damage_in_them_is_found() {
    let (sim, store, vdis) = store().await.expect("store");
    cut(&vdis[0]).await;
    let sound = report(&sim).await;
    assert!(sound.is_sound(), "{sound:#?}");
    assert_eq!(sound.snapshots, 3);
    let page = Page { newest_first: false, beyond: None, limit: 9 };
    let listed = store.snapshots("a", page).await.expect("snapshots");
    // A node that only one snapshot has.
    sim.corrupt(listed[1].root.gba.byte_offset() + 9, 1);
    finds(&sim, &["VDI 'a'", "snapshot 3", "map from block 0 on is damaged"]).await;
    sim.corrupt(listed[1].root.gba.byte_offset() + 9, 1);
    // The list.
    let head = store.read_vdi_slot(0).await.expect("read").record().cloned().expect("a head");
    sim.corrupt(head.snapshots.root.gba.byte_offset() + 9, 1);
    let report = report(&sim).await;
    assert!(report.problems[0].contains("its list of snapshots is damaged"), "{report:#?}");
    assert!(report.problems[1].contains("has 3 snapshots, and lists 0"), "{report:#?}");
}

#[tokio::test]
async fn a_disk_that_takes_a_snapshot_for_its_own_is_found() {
    let (sim, store, vdis) = store().await.expect("store");
    cut(&vdis[0]).await;
    // What only the disk may hold is what was born after the last snapshot.
    change_head(&sim, &store, 0, |head| head.last_snapshot_birth = Birth(0)).await;
    let report = report(&sim).await;
    let says = |words: &str| report.problems.iter().any(|problem| problem.contains(words));
    assert!(says("which something else uses too"), "{report:#?}");
    assert!(says("younger than the last one that its disk knows of"), "{report:#?}");
}

#[tokio::test]
async fn rot_in_data_and_nodes_is_found() {
    let (sim, _store, vdis) = store().await.expect("store");
    let gba = vdis[0].resolve(Lba(640), 1).await.expect("resolve")[0].gba;
    sim.corrupt(gba.byte_offset() + 9, 1);
    finds(&sim, &["VDI 'a'", "block 640 is damaged", "checksum"]).await;
    sim.corrupt(gba.byte_offset() + 9, 1);
    sim.corrupt(vdis[1].committed().root.gba.byte_offset() + 9, 1);
    finds(&sim, &["VDI 'b'", "map from block 0 on is damaged"]).await;
}

#[tokio::test]
async fn damaged_tables_are_found() {
    let (sim, store, _vdis) = store().await.expect("store");
    let g = store.superblock().geometry.clone();
    let places = [
        (g.superblocks()[1], "superblock"),
        (g.host_slot(0), "host record"),
        (g.extent_slot(9), "extent 9"),
        (g.extent_base(1), "header of extent 1"),
        (Gba(g.gc_start), "GC record"),
    ];
    for (gba, word) in places {
        sim.corrupt(gba.byte_offset() + 60, 1);
        finds(&sim, &[word]).await;
        sim.corrupt(gba.byte_offset() + 60, 1);
    }
    let bmap = g.bmap_page(1, 0).byte_offset() + 200;
    sim.corrupt(bmap, 1);
    let torn = report(&sim).await;
    assert!(torn.is_sound() && torn.bitmap_pages_damaged == 1, "{torn:#?}");
    assert!(torn.blocks_leaked > 100, "what a torn page says is free counts as allocated");
    sim.corrupt(bmap, 1);
    sim.corrupt(g.vdi_slot(0).byte_offset() + 60, 1);
    finds(&sim, &["VDI record in slot 0"]).await;
}

#[tokio::test]
async fn two_disks_of_one_name_are_found() {
    let (sim, store, _vdis) = store().await.expect("store");
    let view = store.read_vdi_slot(0).await.expect("read");
    let meta = view.record().expect("head").meta;
    let block = sim.peek(meta.gba.byte_offset(), 4096);
    let mut meta_a = blockstore::format::meta::VdiMeta::decode(&block).expect("meta");
    let other = store.read_vdi_slot(1).await.expect("read");
    let head = other.record().expect("head").clone();
    meta_a.uuid = head.uuid;
    let block = meta_a.encode();
    put(&sim, head.meta.gba, &block).await;
    change_head(&sim, &store, 1, |head| head.meta.crc = crc32c(&block)).await;
    finds(&sim, &["both named 'a'"]).await;
}
