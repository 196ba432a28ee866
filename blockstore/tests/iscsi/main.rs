//! The iSCSI backend against a target that misbehaves on demand. What real targets do is tested in the
//! crate `tests`.

#![cfg(feature = "iscsi")]

mod fake;

use blockstore::device::{Device, DeviceError, DeviceErrorKind, OpenOptions, iscsi};
use bytes::Bytes;
use fake::{Answer, BLOCK, BLOCKS, COMPARE_AND_WRITE, FLUSH, FakeTarget, READ, UNMAP, WRITE};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const RESET: Answer = Answer::Sense(6, 0x2900);

async fn open(target: &FakeTarget) -> Device {
    iscsi::open(&target.url(), &OpenOptions::default()).await.expect("open")
}

async fn open_error(target: &FakeTarget) -> DeviceError {
    let opened = iscsi::open(&target.url(), &OpenOptions::default()).await;
    opened.expect_err("the device must not open")
}

fn data(fill: u8, blocks: usize) -> Vec<Bytes> {
    vec![Bytes::from(vec![fill; blocks * BLOCK])]
}

async fn until_done(device: &Device, fill: u8) {
    let end = Instant::now() + PATIENCE;
    while let Err(error) = device.write(0, data(fill, 1)).await {
        assert!(error.is_transient() && Instant::now() < end, "{error}");
    }
}

#[tokio::test]
async fn an_ordinary_target_serves() {
    let target = FakeTarget::start();
    let device = open(&target).await;
    let info = device.info();
    assert_eq!(info.capacity, (BLOCKS * BLOCK) as u64);
    assert!(info.compare_and_write && !info.discard, "{info:?}");
    device.write(0, data(1, 600)).await.expect("write");
    assert!(device.read(0, 600 * BLOCK).await.expect("read").iter().all(|byte| *byte == 1));
}

/// Goal: a reset of the target (UNIT ATTENTION 29h) raises the epoch; what only asks is asked again, and what
/// the caller must know of is told, not executed twice.
#[tokio::test]
async fn a_reset_raises_the_epoch_and_fails_writes_and_flushes_only() {
    let target = FakeTarget::start();
    let device = open(&target).await;
    let epoch = device.epoch();
    target.answer(WRITE, RESET);
    let error = device.write(0, data(1, 1)).await.expect_err("reset");
    assert_eq!((error.kind, device.epoch()), (DeviceErrorKind::Unreachable, epoch + 1), "{error}");
    target.answer(FLUSH, RESET);
    let error = device.flush().await.expect_err("reset");
    assert_eq!((error.kind, device.epoch()), (DeviceErrorKind::Unreachable, epoch + 2), "{error}");
    target.answer(COMPARE_AND_WRITE, RESET);
    let block = Bytes::from(vec![0; BLOCK]);
    let error = device.compare_and_write(0, block.clone(), block).await.expect_err("reset");
    assert_eq!((error.kind, device.epoch()), (DeviceErrorKind::Unreachable, epoch + 3), "{error}");
    target.answer(READ, RESET);
    device.read(0, BLOCK).await.expect("a read is repeated");
    assert_eq!(device.epoch(), epoch + 4);
}

#[tokio::test]
async fn commands_that_were_not_executed_are_sent_again() {
    let target = FakeTarget::start();
    let device = open(&target).await;
    let epoch = device.epoch();
    for answer in [Answer::Sense(6, 0x2a09), Answer::Status(0x08), Answer::Status(0x28)] {
        let before = target.count(WRITE);
        target.answer(WRITE, answer);
        device.write(0, data(1, 1)).await.expect("the second try");
        assert_eq!((target.count(WRITE), device.epoch()), (before + 2, epoch));
    }
}

#[tokio::test]
async fn errors_have_their_kind_and_the_session_goes_on() {
    let target = FakeTarget::start();
    let device = open(&target).await;
    let epoch = device.epoch();
    for (answer, kind) in [
        (Answer::Sense(7, 0x2707), DeviceErrorKind::NoSpace),
        (Answer::Sense(7, 0x2700), DeviceErrorKind::Io),
        (Answer::Sense(3, 0x0c00), DeviceErrorKind::Io),
        (Answer::Sense(11, 0x0000), DeviceErrorKind::Unreachable),
        (Answer::Status(0x18), DeviceErrorKind::Reserved),
        (Answer::Status(0x40), DeviceErrorKind::Unreachable),
    ] {
        target.answer(WRITE, answer.clone());
        let error = device.write(0, data(1, 1)).await.expect_err("refused");
        assert_eq!((error.kind, error.operation), (kind, "write"), "{answer:?}: {error}");
    }
    for (answer, kind) in [
        (Answer::NoSense, DeviceErrorKind::Io),
        (Answer::Sense(5, 0x2100), DeviceErrorKind::OutOfRange),
        (Answer::Sense(3, 0x1100), DeviceErrorKind::Io),
    ] {
        target.answer(READ, answer.clone());
        let error = device.read(0, BLOCK).await.expect_err("refused");
        assert_eq!((error.kind, error.operation), (kind, "read"), "{answer:?}: {error}");
    }
    device.read(0, BLOCK).await.expect("the session goes on");
    assert_eq!(device.epoch(), epoch);
}

/// Goal: a write is sent once, whatever happens to its session; a read as often as it takes.
#[tokio::test]
async fn after_a_loss_reads_are_sent_again_and_writes_are_not() {
    let target = FakeTarget::start();
    let device = open(&target).await;
    let (epoch, before) = (device.epoch(), target.count(WRITE));
    target.answer(WRITE, Answer::HangUp);
    let error = device.write(0, data(1, 1)).await.expect_err("cut off");
    assert_eq!(error.kind, DeviceErrorKind::Unreachable, "{error}");
    assert_eq!((target.count(WRITE), device.epoch()), (before + 1, epoch + 1));
    target.answer(READ, Answer::HangUp);
    target.answer(READ, Answer::HangUp);
    assert_eq!(device.read(0, BLOCK).await.expect("read")[0], 1, "executed, yet unknown");
    assert_eq!(device.epoch(), epoch + 3);
    // A read that ends every session is given up some time.
    target.behaviour().always.insert(READ, Answer::HangUp);
    let error = device.read(0, BLOCK).await.expect_err("a poisonous read");
    assert_eq!(error.kind, DeviceErrorKind::Unreachable, "{error}");
}

#[tokio::test]
async fn a_long_write_fails_only_after_all_its_parts_have_ended() {
    let target = FakeTarget::start();
    let device = open(&target).await;
    target.answer(WRITE, Answer::Sense(3, 0x0c00));
    let error = device.write(0, data(1, 768)).await.expect_err("the first part failed");
    assert_eq!((error.kind, error.len), (DeviceErrorKind::Io, 768 * BLOCK as u64), "{error}");
    let count = target.count(WRITE);
    assert_eq!(count, 3, "three parts of one MiB");
    device.flush().await.expect("flush");
    assert_eq!(target.count(WRITE), count, "a part came after the error");
}

/// Goal: another LUN that appears behind the same URL is not written to.
#[tokio::test]
async fn another_lun_behind_the_same_url_is_not_taken_for_the_first() {
    let target = FakeTarget::start();
    let device = open(&target).await;
    let before = target.count(WRITE);
    target.behaviour().serial = 2;
    target.hang_up();
    let error = device.write(0, data(1, 1)).await.expect_err("another LUN");
    let error = match error.is_transient() {
        // The loss itself may be noticed in the middle of the command.
        true => device.write(0, data(1, 1)).await.expect_err("another LUN"),
        false => error,
    };
    assert!(error.to_string().contains("another LUN"), "{error}");
    assert!(target.count(WRITE) <= before + 1);
    let count = target.count(WRITE);
    device.write(0, data(1, 1)).await.expect_err("another LUN");
    assert_eq!(target.count(WRITE), count);
    target.behaviour().serial = 1;
    let end = Instant::now() + PATIENCE;
    while device.read(0, BLOCK).await.is_err() {
        assert!(Instant::now() < end, "the right LUN is back, but not taken into use");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Goal: a target with room for few commands gets no more, and the session stays.
#[tokio::test]
async fn a_small_command_window_slows_and_does_not_break() {
    let target = FakeTarget::start();
    target.behaviour().window = 3;
    let device = open(&target).await;
    let epoch = device.epoch();
    let writes: Vec<_> = (0..200)
        .map(|i: u64| {
            let device = device.clone();
            tokio::spawn(async move { device.write(i * BLOCK as u64, data(i as u8, 1)).await })
        })
        .collect();
    for write in writes {
        write.await.expect("task").expect("write");
    }
    for i in 0..200_u64 {
        assert_eq!(device.read(i * BLOCK as u64, BLOCK).await.expect("read")[0], i as u8);
    }
    assert_eq!(device.epoch(), epoch);
}

/// Goal: a command that ends while its data still waits to be sent leaves nothing dangling. Method: a target
/// that does not read answers commands that are on their way. (A memory checker sees more than this test.)
#[tokio::test]
async fn an_error_amid_the_data_of_a_write_is_survived() {
    let target = FakeTarget::start();
    target.behaviour().segment = 4096;
    target.behaviour().window = 256;
    let device = open(&target).await;
    for round in 1..4 {
        target.answer(WRITE, Answer::Ahead);
        let writes: Vec<_> = (0..48)
            .map(|i| {
                let device = device.clone();
                tokio::spawn(async move { device.write((i % 8) << 18, data(round, 64)).await })
            })
            .collect();
        let mut failed = 0;
        for write in writes {
            failed += usize::from(write.await.expect("task").is_err());
        }
        assert!(failed > 0, "no write was answered ahead of its data");
        until_done(&device, round).await;
        assert_eq!(device.read(0, BLOCK).await.expect("read")[0], round);
    }
}

#[tokio::test]
async fn a_liar_is_not_believed() {
    let target = FakeTarget::start();
    target.behaviour().always.insert(COMPARE_AND_WRITE, Answer::Lie);
    assert!(!open(&target).await.info().compare_and_write);

    let target = FakeTarget::start();
    target.behaviour().always.insert(UNMAP, Answer::Lie);
    assert!(open(&target).await.info().discard);
}

#[tokio::test]
async fn odd_targets_are_refused_with_words() {
    let target = FakeTarget::start();
    target.behaviour().block_len = 520;
    let error = open_error(&target).await;
    assert!(error.to_string().contains("520"), "{error}");
    assert_eq!(error.kind, DeviceErrorKind::Unsupported);

    target.behaviour().login = Some((0x0101, "127.0.0.9:3260,1".to_owned()));
    let error = open_error(&target).await;
    assert!(error.to_string().contains("redirects to 127.0.0.9:3260"), "{error}");

    target.behaviour().login = Some((0x0202, String::new()));
    let error = open_error(&target).await;
    assert!(error.to_string().contains("ACL"), "{error}");

    target.behaviour().login = Some((0x0302, String::new()));
    let error = open_error(&target).await;
    assert!(error.to_string().contains("no room"), "{error}");
}

/// Goal: no bytes from the wire crash the process or hang it. Method: random and half-valid PDUs in place
/// of answers, from fixed seeds.
#[tokio::test]
async fn garbage_from_the_wire_is_survived() {
    for seed in 0..40 {
        let mut rng = StdRng::seed_from_u64(seed);
        let target = FakeTarget::start();
        if seed % 4 == 0 {
            target.behaviour().login_bytes = Some(garbage(&mut rng));
            let error = open_error(&target).await;
            assert_eq!(error.kind, DeviceErrorKind::Unreachable, "seed {seed}: {error}");
            continue;
        }
        let device = open(&target).await;
        let bytes = garbage(&mut rng);
        target.answer(if seed % 2 == 0 { READ } else { WRITE }, Answer::Bytes(bytes.clone()));
        let wrote = tokio::spawn({
            let device = device.clone();
            async move { device.write(0, data(1, 1)).await }
        });
        let read = device.read(0, BLOCK);
        // Garbage may look like a PDU that is still to be completed; then the connection must be cut.
        tokio::select! {
            _ = read => {}
            () = tokio::time::sleep(Duration::from_millis(100)) => target.hang_up(),
        }
        target.hang_up();
        let _ = wrote.await.expect("task");
        until_done(&device, 2).await;
        assert_eq!(device.read(0, BLOCK).await.expect("read")[0], 2, "seed {seed}");
    }
}

fn garbage(rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = vec![0; rng.random_range(1..4096)];
    rng.fill(&mut bytes[..]);
    let opcodes = [0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x31, 0x32, 0x3f];
    bytes[0] = opcodes[rng.random_range(0..opcodes.len())];
    if bytes.len() > 48 {
        // A data segment that fits, and no additional header, so that the PDU is taken in.
        bytes[4..6].fill(0);
        bytes[6] = ((bytes.len() - 48) >> 9) as u8;
        // Likely task tags: they count up from a random start, so mostly unknown, or reserved.
        if rng.random_bool(0.3) {
            bytes[16..20].fill(0xff);
        }
    }
    bytes
}
