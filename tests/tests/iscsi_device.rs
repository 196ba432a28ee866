//! The iSCSI backend of blockstore against real targets: contract, capabilities, restarts, outages.
//!
//! Method: each test starts targets of its own on loopback (see `tests::targets`), some behind a relay that
//! holds, drops or cuts traffic, and uses the device as the store does.

use blockstore::buf::AlignedBuf;
use blockstore::device::{
    CawOutcome, Device, DeviceError, DeviceErrorKind, OpenOptions, conformance, iscsi,
};
use bytes::Bytes;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tests::targets::{IstgtTarget, TcpRelay, TgtOptions, TgtTarget};

const SIZE: u64 = 64 << 20;
const BLOCK: usize = 4096;
/// For what must come to an end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn temp() -> TempDir {
    tempfile::tempdir().expect("temporary directory")
}

fn istgt(dir: &TempDir) -> IstgtTarget {
    IstgtTarget::start(dir.path(), SIZE).expect("istgt")
}

fn tgtd(dir: &TempDir) -> TgtTarget {
    TgtTarget::start(dir.path(), SIZE, TgtOptions::default()).expect("tgtd")
}

async fn open(url: &str) -> Device {
    iscsi::open(url, &OpenOptions::default()).await.expect("open")
}

async fn open_error(url: &str, options: &OpenOptions) -> DeviceError {
    iscsi::open(url, options).await.expect_err("the device must not open")
}

/// The URL as another host would use it.
fn as_host(url: &str, host: &str) -> String {
    let mark = if url.contains('?') { '&' } else { '?' };
    format!("{url}{mark}initiator=iqn.2026-01.org.ballast:{host}-{}", std::process::id())
}

fn block(fill: u8) -> Bytes {
    let mut buf = AlignedBuf::zeroed(BLOCK);
    buf.fill(fill);
    buf.freeze()
}

async fn read_fill(device: &Device, offset: u64) -> u8 {
    let data = device.read(offset, BLOCK).await.expect("read");
    assert!(data.iter().all(|byte| *byte == data[0]), "a torn block at {offset}");
    data[0]
}

/// Repeats a write for as long as it fails for now, as the store's flusher does.
async fn write_until_done(device: &Device, offset: u64, data: &Bytes) {
    let end = Instant::now() + PATIENCE;
    while let Err(error) = device.write(offset, vec![data.clone()]).await {
        assert!(error.is_transient() && Instant::now() < end, "{error}");
    }
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "gave up waiting until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn istgt_conforms_and_has_compare_and_write() {
    let dir = temp();
    let target = istgt(&dir);
    let device = open(&target.url()).await;
    let info = device.info().clone();
    assert_eq!((info.capacity, info.logical_block), (SIZE, 4096));
    assert!(info.compare_and_write && !info.discard, "{info:?}");
    conformance::run(device).await;
}

#[tokio::test]
async fn tgtd_conforms_and_lacks_compare_and_write_though_it_claims_it() {
    let dir = temp();
    let target = tgtd(&dir);
    let device = open(&target.url()).await;
    let info = device.info().clone();
    assert_eq!((info.capacity, info.logical_block), (SIZE, 4096));
    assert!(!info.compare_and_write && info.discard, "{info:?}");
    assert!(!info.url.contains("chap-secret-file"), "{info:?}");
    conformance::run(device).await;
}

#[tokio::test]
async fn blocks_of_512_bytes_conform_too() {
    let dir = temp();
    let options = TgtOptions { block_size: 512, thin: false, ..TgtOptions::default() };
    let target = TgtTarget::start(dir.path(), SIZE, options).expect("tgtd");
    let device = open(&target.url()).await;
    assert_eq!((device.info().logical_block, device.info().discard), (512, false));
    conformance::run(device).await;
}

/// Goal: reads and writes longer than one SCSI command keep every block in its place.
#[tokio::test]
async fn long_requests_are_cut_into_commands_and_put_together() {
    let dir = temp();
    let target = istgt(&dir);
    let device = open(&target.url()).await;
    let content: Vec<u8> =
        (0..5 << 20).map(|i: usize| (i / BLOCK % 251) as u8 ^ (i % 7) as u8).collect();
    let pieces = content.chunks(3 * BLOCK).map(Bytes::copy_from_slice).collect();
    device.write(8192, pieces).await.expect("write");
    device.flush().await.expect("flush");
    assert!(*device.read(8192, content.len()).await.expect("read") == content);
    let on_disk = std::fs::read(target.image()).expect("backing file");
    assert!(on_disk[8192..][..content.len()] == content);
}

/// Goal: compare-and-write is atomic between sessions. Method: two initiators count in one block; no
/// count may be lost.
#[tokio::test]
async fn two_sessions_count_in_one_block_without_losing_any() {
    let dir = temp();
    let target = istgt(&dir);
    let (one, two) = (as_host(&target.url(), "a"), as_host(&target.url(), "b"));
    let (one, two) = tokio::join!(open(&one), open(&two));
    one.write(0, vec![block(0)]).await.expect("write");
    let count = |device: Device, tag: u8| async move {
        for _ in 0..200 {
            loop {
                let old = device.read(0, BLOCK).await.expect("read").freeze();
                let mut new = old.to_vec();
                let value = u64::from_le_bytes(old[..8].try_into().expect("8 bytes"));
                new[..8].copy_from_slice(&(value + 1).to_le_bytes());
                new[8] = tag;
                let outcome = device.compare_and_write(0, old, Bytes::from(new)).await;
                if outcome.expect("compare-and-write") == CawOutcome::Written {
                    break;
                }
            }
        }
    };
    tokio::join!(count(one.clone(), 1), count(two, 2));
    let found = one.read(0, BLOCK).await.expect("read");
    assert_eq!(u64::from_le_bytes(found[..8].try_into().expect("8 bytes")), 400);
}

/// Goal: a target that dies in mid-write costs an error and an epoch, never a hang or a lie. Method: kill
/// tgtd under a stream of writes; the error may come only after the login at the restarted target.
#[tokio::test]
async fn a_write_cut_off_by_a_dying_target_is_reported_after_the_next_login_only() {
    let dir = temp();
    let mut target = tgtd(&dir);
    let relay = TcpRelay::start(target.address()).expect("relay");
    let device = open(&target.url_through(relay.address())).await;
    let epoch = device.epoch();
    device.write(0, vec![block(1)]).await.expect("write");

    target.stop().expect("freeze");
    let writer = tokio::spawn({
        let device = device.clone();
        async move { device.write(0, vec![block(2)]).await }
    });
    let sent = relay.bytes_from_initiators();
    wait_until("the write is sent", || relay.bytes_from_initiators() >= sent + BLOCK as u64).await;
    relay.refuse(true);
    target.kill().expect("kill");
    relay.cut();
    wait_until("the loss is noticed", || device.epoch() > epoch).await;
    // No login is possible now: the outcome must stay open, while new commands fail in time.
    let error = device.read(0, BLOCK).await.expect_err("no session");
    assert_eq!(error.kind, DeviceErrorKind::Unreachable, "{error}");
    assert!(!writer.is_finished(), "the outcome was told before a login");

    target.restart().expect("restart");
    relay.refuse(false);
    let error = writer.await.expect("task").expect_err("the write was cut off");
    assert_eq!(error.kind, DeviceErrorKind::Unreachable, "{error}");
    assert!(error.to_string().contains("can no longer take effect"), "{error}");
    write_until_done(&device, 0, &block(3)).await;
    device.flush().await.expect("flush");
    assert_eq!(read_fill(&device, 0).await, 3);
}

/// Goal: the corruption of a careless reconnect cannot happen: an old write lands after a newer
/// one to the same block was acknowledged. Method: the relay holds a write on its way; the device gives the
/// session up, logs in again and writes the block anew; then the held write is let go.
async fn an_old_write_held_on_its_way_cannot_land(url: &str, relay: &TcpRelay) {
    let device = open(url).await;
    let epoch = device.epoch();
    write_until_done(&device, 0, &block(1)).await;
    let sent = relay.bytes_from_initiators();
    relay.hold();
    let old = tokio::spawn({
        let device = device.clone();
        async move { device.write(0, vec![block(0xaa)]).await }
    });
    wait_until("the old write is on its way", || {
        relay.bytes_from_initiators() >= sent + BLOCK as u64
    })
    .await;
    // NOPs go unanswered; the session is given up and set up again on a connection that passes.
    let error = old.await.expect("task").expect_err("the old write was cut off");
    assert_eq!(error.kind, DeviceErrorKind::Unreachable, "{error}");
    assert!(device.epoch() > epoch);
    write_until_done(&device, 0, &block(0xbb)).await;
    device.flush().await.expect("flush");
    assert_eq!(read_fill(&device, 0).await, 0xbb);

    relay.release();
    for _ in 0..40 {
        tokio::time::sleep(Duration::from_millis(25)).await;
        assert_eq!(read_fill(&device, 0).await, 0xbb, "the old write landed late");
    }
}

#[tokio::test]
async fn a_held_write_cannot_land_late_at_tgtd() {
    let dir = temp();
    let target = tgtd(&dir);
    let relay = TcpRelay::start(target.address()).expect("relay");
    an_old_write_held_on_its_way_cannot_land(&target.url_through(relay.address()), &relay).await;
}

#[tokio::test]
async fn a_held_write_cannot_land_late_at_istgt() {
    let dir = temp();
    let target = istgt(&dir);
    let relay = TcpRelay::start(target.address()).expect("relay");
    an_old_write_held_on_its_way_cannot_land(&target.url_through(relay.address()), &relay).await;
}

/// Goal: a target that keeps old sessions alive is found out before anything is written.
#[tokio::test]
async fn a_target_that_does_not_reinstate_sessions_is_refused() {
    let dir = temp();
    let options = TgtOptions { chap: false, ..TgtOptions::default() };
    let target = TgtTarget::start(dir.path(), SIZE, options).expect("tgtd");
    let error = open_error(&target.url(), &OpenOptions::default()).await;
    assert_eq!(error.kind, DeviceErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("CHAP"), "{error}");
    // Reading needs no such promise.
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let device = iscsi::open(&target.url(), &options).await.expect("open read-only");
    assert_eq!(read_fill(&device, 0).await, 0);
    let error = device.write(0, vec![block(1)]).await.expect_err("read-only");
    assert_eq!(error.kind, DeviceErrorKind::Unsupported, "{error}");
}

/// Goal: reads survive resets of the connection without an error.
#[tokio::test]
async fn reads_go_on_after_a_reset() {
    let dir = temp();
    let target = tgtd(&dir);
    let relay = TcpRelay::start(target.address()).expect("relay");
    let device = open(&target.url_through(relay.address())).await;
    write_until_done(&device, 0, &block(7)).await;
    for _ in 0..5 {
        let epoch = device.epoch();
        relay.cut();
        assert_eq!(read_fill(&device, 0).await, 7);
        wait_until("the loss is counted", || device.epoch() > epoch).await;
    }
}

/// Goal: a connection that swallows everything is given up after some seconds.
#[tokio::test]
async fn a_silent_path_is_found_out_and_replaced() {
    let dir = temp();
    let target = tgtd(&dir);
    let relay = TcpRelay::start(target.address()).expect("relay");
    let device = open(&target.url_through(relay.address())).await;
    let epoch = device.epoch();
    relay.black_hole();
    assert_eq!(read_fill(&device, 0).await, 0);
    assert!(device.epoch() > epoch);
}

/// Goal: a target that stands still for a moment costs time only. Method: shorter than the NOPs' limit.
#[tokio::test]
async fn a_short_stop_of_the_target_is_sat_out() {
    let dir = temp();
    let target = istgt(&dir);
    let device = open(&target.url()).await;
    let epoch = device.epoch();
    target.stop().expect("freeze");
    let write = tokio::spawn({
        let device = device.clone();
        async move { device.write(0, vec![block(9)]).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    target.cont().expect("continue");
    write.await.expect("task").expect("the write");
    assert_eq!((read_fill(&device, 0).await, device.epoch()), (9, epoch));
}

#[tokio::test]
async fn wrong_addresses_and_secrets_are_refused_at_once_with_words() {
    let dir = temp();
    let target = tgtd(&dir);
    let options = OpenOptions::default();
    let (url, address) = (target.url(), target.address().to_string());

    let error = open_error(&url.replace(":disk", ":none"), &options).await;
    assert!(error.to_string().contains("IQN"), "{error}");

    let error = open_error(&url.replace("/1?", "/7?"), &options).await;
    assert!(error.to_string().contains("no such LUN"), "{error}");

    let nobody = TcpRelay::start(target.address()).expect("relay");
    let closed = nobody.address().to_string();
    drop(nobody);
    let error = open_error(&url.replace(&address, &closed), &options).await;
    assert!(error.to_string().contains("Connection refused"), "{error}");

    let wrong = dir.path().join("wrong");
    std::fs::write(&wrong, "tester:not-the-secret\n").expect("write");
    let chap = OpenOptions { chap_file: Some(wrong), ..OpenOptions::default() };
    let bare = url.split_once('?').expect("a query").0;
    let error = open_error(bare, &chap).await;
    assert!(error.to_string().contains("CHAP user or secret"), "{error}");
    assert!(!error.to_string().contains("not-the-secret"), "{error}");
    let error = open_error(&bare.replace("tester@", ""), &options).await;
    assert!(error.to_string().contains("CHAP"), "{error}");
    let error = open_error(&url.replace("tester@", "tester%pw@"), &options).await;
    assert!(error.to_string().contains("chap-secret-file"), "{error}");
    assert!(!error.to_string().contains("%pw"), "{error}");

    // Whatever went before, the right URL opens.
    open(&url).await;
}

/// Goal: opening ends, though the target accepts connections and says nothing.
#[tokio::test]
async fn a_target_that_says_nothing_does_not_hang_the_opening() {
    let dir = temp();
    let target = istgt(&dir);
    target.stop().expect("freeze");
    let error = open_error(&target.url(), &OpenOptions::default()).await;
    assert_eq!(error.kind, DeviceErrorKind::Unreachable, "{error}");
    target.cont().expect("continue");
}

/// Goal: the reservation keeps others out, is renewed after a loss, and is given back at the end.
async fn exclusive_mode_keeps_others_out(url: &str, relay: &TcpRelay) {
    let exclusive = OpenOptions { exclusive: true, ..OpenOptions::default() };
    let (ours, theirs) = (as_host(url, "a"), as_host(url, "b"));
    let device = iscsi::open(&ours, &exclusive).await.expect("open exclusively");
    let error = open_error(&theirs, &exclusive).await;
    assert_eq!(error.kind, DeviceErrorKind::Reserved, "{error}");
    assert!(error.to_string().contains("reservation key 0x"), "{error}");
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    let reader = iscsi::open(&theirs, &read_only).await.expect("open read-only");
    reader.read(0, BLOCK).await.expect("read beside the holder");

    relay.cut();
    write_until_done(&device, 0, &block(5)).await;
    let error = open_error(&theirs, &exclusive).await;
    assert_eq!(error.kind, DeviceErrorKind::Reserved, "after a re-login: {error}");

    drop(device);
    let end = Instant::now() + PATIENCE;
    let device = loop {
        match iscsi::open(&theirs, &exclusive).await {
            Ok(device) => break device,
            Err(error) => assert!(Instant::now() < end, "the reservation stayed: {error}"),
        }
    };
    assert_eq!(read_fill(&device, 0).await, 5);
}

#[tokio::test]
async fn exclusive_mode_at_istgt() {
    let dir = temp();
    let target = istgt(&dir);
    let relay = TcpRelay::start(target.address()).expect("relay");
    exclusive_mode_keeps_others_out(&target.url_through(relay.address()), &relay).await;
}

#[tokio::test]
async fn exclusive_mode_at_tgtd() {
    let dir = temp();
    let target = tgtd(&dir);
    let relay = TcpRelay::start(target.address()).expect("relay");
    exclusive_mode_keeps_others_out(&target.url_through(relay.address()), &relay).await;
}

/// Goal: two processes of one host do not throw each other out of their sessions.
#[tokio::test]
async fn a_second_writer_on_this_host_is_refused_and_a_reader_is_not() {
    let dir = temp();
    let target = tgtd(&dir);
    let device = open(&target.url()).await;
    let epoch = device.epoch();
    let error = open_error(&target.url(), &OpenOptions::default()).await;
    assert_eq!(error.kind, DeviceErrorKind::Reserved, "{error}");
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    let reader = iscsi::open(&target.url(), &read_only).await.expect("open read-only");
    reader.read(0, BLOCK).await.expect("read");
    device.write(0, vec![block(1)]).await.expect("write");
    assert_eq!(device.epoch(), epoch, "the first session was thrown out");
    drop((device, reader));
    open(&target.url()).await;
}
