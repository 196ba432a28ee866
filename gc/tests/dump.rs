//! Goal: dump tells of every block of a store what it is, whether it is whole and who points at it, whatever is damaged, and
//! writes nothing.
//! Method: every block of a small store on the simulated device, whole, then with each block that was ever written rotten.

use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::describe::Verdict;
use blockstore::device::sim::SimDevice;
use blockstore::format::vdi::VdiHead;
use blockstore::types::{Gba, Lba, Lsn};
use blockstore::{
    AttachOptions, Batch, Change, Cut, FormatOptions, OpenOptions, SnapshotLabel, Store,
    StoreErrorKind,
};
use gc::{Dump, Dumped, Progress, What, dump};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn write(lba: u64) -> Change {
    let data = AlignedBuf::copy_of(&[lba as u8 + 1; 4096]).freeze();
    Change::Write { lba: Lba(lba), crc: crc32c(&data), data }
}

/// A store with the disk 'a', which has a snapshot at LSN 2, closed; the disk's head.
async fn store() -> (SimDevice, VdiHead) {
    let sim = SimDevice::new(8 * MIB, 1);
    Store::format(sim.device(), FormatOptions::default()).await.expect("format");
    let host_uuid = Uuid::from_u128(1);
    let options = OpenOptions { host_uuid, host_name: "alpha".into(), ..Default::default() };
    let store = Store::open(sim.device(), options).await.expect("open");
    let info = store.create_vdi("a", 64 * MIB).await.expect("create");
    let vdi = store.attach(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("attach");
    let changes = (0..8).map(|n| write(n * 300)).collect();
    let label = SnapshotLabel::new("first").expect("a label");
    let cuts = vec![Cut { changes, lsn: Lsn(2), time_ms: 5, label }];
    vdi.commit(Batch { lsn: Lsn(3), cuts, changes: vec![write(300)] }).await.expect("commit");
    vdi.detach(Lsn(3)).await.expect("detach");
    let head = store.read_vdi_slot(0).await.expect("read").record().cloned().expect("a head");
    store.reclaimed().await;
    store.close().await.expect("close");
    (sim.connect(), head)
}

async fn show(sim: &SimDevice, what: What) -> Dump {
    dump(sim.device(), &what, true, &Progress::default()).await.expect("dump")
}

async fn block(sim: &SimDevice, gba: u64) -> Dumped {
    show(sim, What::Block(Gba(gba))).await.blocks.remove(0)
}

#[tokio::test]
async fn every_block_of_a_whole_store_is_known() {
    let (sim, head) = store().await;
    let before = sim.peek(0, 8 * MIB as usize);
    let mut pointed = 0;
    for gba in 0..8 * MIB / 4096 {
        let dumped = block(&sim, gba).await;
        assert!(!dumped.described.is_damaged(), "{dumped:#?}");
        pointed += dumped.pointed_at_by.len();
    }
    // Name, list of snapshots; disk and snapshot have a tree each, which share leaves.
    assert!(pointed > 20, "{pointed} pointers");
    let is = |dumped: &Dumped, holds: &str, by: &str| {
        assert!(dumped.described.holds.contains(holds), "{dumped:#?}");
        assert_eq!(dumped.described.verdict, Verdict::Good, "{dumped:#?}");
        assert!(dumped.pointed_at_by.iter().any(|words| words.contains(by)), "{dumped:#?}");
    };
    is(&block(&sim, head.meta.gba.0).await, "name block", "its head, as its name block");
    is(&block(&sim, head.root.gba.0).await, "a node of level 2", "VDI 'a'");
    let list = block(&sim, head.snapshots.root.gba.0).await;
    is(&list, "a leaf of a list of snapshots", "the top of its list");
    assert!(list.described.entries[0].is.contains("LSN 2 'first'"), "{list:#?}");
    assert!(sim.peek(0, 8 * MIB as usize) == before, "looking changed something");
}

#[tokio::test]
async fn tables_are_shown() {
    let (sim, _) = store().await;
    let blocks = |what: What| {
        let sim = &sim;
        async move {
            let shown = show(sim, what).await;
            assert_eq!(shown.damaged(), 0, "{shown:#?}");
            shown.blocks.len()
        }
    };
    assert_eq!(blocks(What::Superblock).await, 2);
    assert_eq!(blocks(What::Gc).await, 1);
    assert_eq!(blocks(What::Hosts).await, 1);
    assert_eq!(blocks(What::Heads).await, 1);
    assert_eq!(blocks(What::Vdi("a".into())).await, 4);
    assert_eq!(blocks(What::Snapshots("a".into())).await, 1);
    // The system's, one of data and one of metadata.
    assert_eq!(blocks(What::Extents).await, 3);
    let error = dump(sim.device(), &What::Vdi("b".into()), false, &Progress::default()).await;
    assert_eq!(error.expect_err("no such disk").kind, StoreErrorKind::NotFound);
    let beyond = What::Block(Gba(8 * MIB / 4096));
    let error = dump(sim.device(), &beyond, false, &Progress::default()).await;
    assert_eq!(error.expect_err("no such block").kind, StoreErrorKind::Invalid);
}

#[tokio::test]
async fn a_rotten_block_is_shown_as_damaged_and_keeps_nothing_else_from_being_shown() {
    let (origin, head) = store().await;
    let mut told = 0;
    for gba in origin.written_blocks() {
        let sim = origin.fork(3);
        if sim.peek(gba * 4096, 4096).iter().all(|&byte| byte == 0) {
            continue;
        }
        sim.corrupt(gba * 4096 + 90, 4);
        let dumped = block(&sim, gba).await;
        told += u64::from(dumped.described.is_damaged());
        let all = [
            What::Superblock,
            What::Gc,
            What::Hosts,
            What::Extents,
            What::Heads,
            What::Block(head.root.gba),
        ];
        for what in all {
            show(&sim, what).await;
        }
        for what in [What::Vdi("a".into()), What::Snapshots("a".into())] {
            let shown = dump(sim.device(), &what, false, &Progress::default()).await;
            // Its head or its name is what is rotten.
            assert!(shown.is_ok() || dumped.described.is_damaged(), "{gba}: {shown:?}");
        }
    }
    // What is reached, and all tables; not what nobody points at any more.
    assert!(told > 30, "{told} damaged blocks were told");
}
