//! What every backend must do: one test of the contract of [`BlockDevice`], run against each.
//!
//! It overwrites the first megabyte of the device, and checks what a healthy device promises; failures
//! are for each backend's own tests.

use super::{BlockDevice, CawOutcome, Device, DeviceErrorKind};
use crate::buf::AlignedBuf;
use crate::types::BLOCK_SIZE;
use bytes::Bytes;
use std::collections::HashSet;

/// Bytes of the device that [`run`] uses.
pub const SIZE_USED: u64 = 1 << 20;

const BLOCK: u64 = BLOCK_SIZE as u64;

/// Checks the whole contract on a device of at least [`SIZE_USED`] bytes opened for writing.
///
/// # Panics
/// On every breach, with words.
pub async fn run(device: Device) {
    let device = &*device;
    info_is_sane(device);
    writes_are_read_back(device).await;
    misaligned_pieces_are_written(device).await;
    many_pieces_are_written_in_order(device).await;
    nothing_is_a_valid_length(device).await;
    bad_ranges_are_refused(device).await;
    requests_in_flight_do_not_mix(device).await;
    dropped_futures_do_no_harm(device).await;
    discard_keeps_the_neighbours(device).await;
    if device.info().compare_and_write {
        compare_and_write_covers_one_logical_block(device).await;
        compare_and_write_refuses_bad_requests(device).await;
        contending_compare_and_writes_count_exactly(device).await;
    } else {
        compare_and_write_is_unsupported(device).await;
    }
    flush_keeps_the_epoch(device).await;
}

/// A block whose every 8 bytes tell what it is.
fn stamped(tag: u64) -> Vec<u8> {
    (0..BLOCK / 8).flat_map(|i| (tag << 16 | i).to_le_bytes()).collect()
}

fn aligned(content: &[u8]) -> Bytes {
    AlignedBuf::copy_of(content).freeze()
}

fn info_is_sane(device: &dyn BlockDevice) {
    let info = device.info();
    assert!(info.capacity >= SIZE_USED, "a device of {} bytes is too small", info.capacity);
    assert!(info.capacity.is_multiple_of(BLOCK), "capacity must be whole blocks");
    assert!(matches!(info.logical_block, 512 | 4096), "logical block of {}", info.logical_block);
    assert!(!info.url.is_empty(), "the device must have a name");
}

async fn writes_are_read_back(device: &dyn BlockDevice) {
    let content = [stamped(1), stamped(2), stamped(3)].concat();
    device.write(0, vec![aligned(&content)]).await.expect("write");
    assert!(*device.read(0, content.len()).await.expect("read") == content, "read differs");
    device.write(BLOCK, vec![aligned(&stamped(4))]).await.expect("overwrite");
    device.flush().await.expect("flush");
    let expected = [stamped(1), stamped(4), stamped(3)].concat();
    let found = device.read(0, 3 * BLOCK_SIZE).await.expect("read after overwrite");
    assert!(*found == expected, "an overwrite changed something else, or nothing");
    let last = device.info().capacity - BLOCK;
    if last >= SIZE_USED {
        device.read(last, BLOCK_SIZE).await.expect("the last block can be read");
    }
}

async fn misaligned_pieces_are_written(device: &dyn BlockDevice) {
    let content = [stamped(10), stamped(11)].concat();
    let mut shifted = vec![0; 1];
    shifted.extend_from_slice(&content);
    let shifted = aligned(&shifted).slice(1..);
    assert!(!(shifted.as_ptr() as usize).is_multiple_of(512));
    let pieces = vec![aligned(&stamped(9)), shifted, Bytes::copy_from_slice(&stamped(12))];
    device.write(4 * BLOCK, pieces).await.expect("write of misaligned pieces");
    let expected = [stamped(9), content, stamped(12)].concat();
    assert!(*device.read(4 * BLOCK, 4 * BLOCK_SIZE).await.expect("read") == expected);
}

async fn many_pieces_are_written_in_order(device: &dyn BlockDevice) {
    // More pieces than one system call takes need a device large enough; 200 fit everywhere.
    let room = (device.info().capacity - SIZE_USED) / BLOCK;
    let (offset, count) = if room >= 1500 { (SIZE_USED, 1500) } else { (0, 200) };
    let pieces = (0..count).map(|i| aligned(&stamped(100 + i))).collect();
    device.write(offset, pieces).await.expect("write of many pieces");
    let found = device.read(offset, count as usize * BLOCK_SIZE).await.expect("read");
    for (i, block) in (0..count).zip(found.chunks(BLOCK_SIZE)) {
        assert!(*block == stamped(100 + i), "piece {i} is not where it belongs");
    }
}

async fn nothing_is_a_valid_length(device: &dyn BlockDevice) {
    assert!(device.read(0, 0).await.expect("empty read").is_empty());
    device.write(0, Vec::new()).await.expect("write of nothing");
    device.discard(0, 0).await.or_else(|e| unsupported(&e)).expect("discard of nothing");
}

fn unsupported(error: &super::DeviceError) -> Result<(), String> {
    if error.kind == DeviceErrorKind::Unsupported { Ok(()) } else { Err(error.to_string()) }
}

async fn bad_ranges_are_refused(device: &dyn BlockDevice) {
    let capacity = device.info().capacity;
    let out = DeviceErrorKind::OutOfRange;
    for (offset, len) in [
        (1, BLOCK_SIZE),
        (0, 1),
        (512, BLOCK_SIZE),
        (0, 512),
        (capacity, BLOCK_SIZE),
        (capacity - BLOCK, 2 * BLOCK_SIZE),
        (u64::MAX - BLOCK + 1, BLOCK_SIZE),
        (0, usize::MAX - BLOCK_SIZE + 1),
    ] {
        let error = device.read(offset, len).await.expect_err("a bad read must fail");
        assert_eq!((error.kind, error.operation), (out, "read"), "{error}");
        let error = device.discard(offset, len as u64).await.expect_err("a bad discard must fail");
        assert!(error.kind == out || unsupported(&error).is_ok(), "{error}");
        if len <= 2 * BLOCK_SIZE {
            let data = vec![aligned(&vec![0; len])];
            let error = device.write(offset, data).await.expect_err("a bad write must fail");
            assert_eq!((error.kind, error.operation), (out, "write"), "{error}");
        }
    }
    let halves = vec![aligned(&[0; 2048]), aligned(&[0; 2048])];
    let error = device.write(0, halves).await.expect_err("pieces must be whole blocks");
    assert_eq!(error.kind, out, "{error}");
}

async fn requests_in_flight_do_not_mix(device: &dyn BlockDevice) {
    let blocks: Vec<u64> = (0..SIZE_USED / BLOCK).collect();
    let write = |&i: &u64| device.write(i * BLOCK, vec![aligned(&stamped(1000 + i))]);
    for result in join_all(blocks.iter().map(write)).await {
        result.expect("one of many writes");
    }
    device.flush().await.expect("flush");
    let read = |&i: &u64| device.read(i * BLOCK, BLOCK_SIZE);
    for (i, result) in blocks.iter().zip(join_all(blocks.iter().map(read)).await) {
        assert!(*result.expect("one of many reads") == stamped(1000 + i), "block {i} mixed up");
    }
}

/// A write that nobody waits for is there or not, a block at a time, and nothing else changes.
async fn dropped_futures_do_no_harm(device: &dyn BlockDevice) {
    for round in 0..20 {
        let old = [stamped(2000), stamped(2001)].concat();
        device.write(0, vec![aligned(&old)]).await.expect("write");
        let new = [stamped(3000 + round), stamped(4000 + round)].concat();
        poll_a_little(device.write(0, vec![aligned(&new)]), round).await;
        poll_a_little(device.read(0, 64 * BLOCK_SIZE), round).await;
        poll_a_little(device.flush(), round).await;
        // Enough traffic for the dropped write to have ended, one way or the other, on the backends
        // that carry out requests in order; the others may still be at it, hence both are legal.
        for _ in 0..4 {
            device.flush().await.expect("flush");
        }
        let found = device.read(0, 2 * BLOCK_SIZE).await.expect("read");
        for (i, block) in found.chunks(BLOCK_SIZE).enumerate() {
            let range = i * BLOCK_SIZE..(i + 1) * BLOCK_SIZE;
            assert!(*block == old[range.clone()] || *block == new[range], "a third content");
        }
        let next = device.read(2 * BLOCK, BLOCK_SIZE).await.expect("read");
        assert!(*next == stamped(1002), "a dropped write hit its neighbour");
        settle(device).await;
    }
}

/// Waits until a dropped write can no longer land: until the blocks stay as they are written here.
async fn settle(device: &dyn BlockDevice) {
    let mark = [stamped(5000), stamped(5001)].concat();
    let mut calm = 0;
    while calm < 64 {
        let found = device.read(0, 2 * BLOCK_SIZE).await.expect("read");
        if *found == mark {
            calm += 1;
        } else {
            calm = 0;
            device.write(0, vec![aligned(&mark)]).await.expect("write");
        }
    }
}

/// Polls a future a few times and drops it.
async fn poll_a_little<F: Future>(future: F, times: u64) {
    let mut future = Box::pin(future);
    for _ in 0..=times % 4 {
        if poll_once(&mut future).await.is_some() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

async fn join_all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        let mut ready = true;
        for (future, output) in &mut waiting {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    std::task::Poll::Ready(value) => *output = Some(value),
                    std::task::Poll::Pending => ready = false,
                }
            }
        }
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    waiting.into_iter().filter_map(|(_, output)| output).collect()
}

async fn discard_keeps_the_neighbours(device: &dyn BlockDevice) {
    let content = [stamped(20), stamped(21), stamped(22), stamped(23)].concat();
    device.write(0, vec![aligned(&content)]).await.expect("write");
    let result = device.discard(BLOCK, 2 * BLOCK).await;
    assert_eq!(result.is_ok(), device.info().discard, "{result:?}");
    let found = device.read(0, 4 * BLOCK_SIZE).await.expect("read after discard");
    assert!(found[..BLOCK_SIZE] == stamped(20) && found[3 * BLOCK_SIZE..] == stamped(23));
    device.write(BLOCK, vec![aligned(&stamped(24))]).await.expect("write after discard");
    assert!(*device.read(BLOCK, BLOCK_SIZE).await.expect("read") == stamped(24));
}

async fn compare_and_write_covers_one_logical_block(device: &dyn BlockDevice) {
    let unit = device.info().logical_block as usize;
    let content = stamped(30);
    device.write(0, vec![aligned(&content)]).await.expect("write");
    let at = BLOCK_SIZE - unit;
    let old = Bytes::copy_from_slice(&content[at..]);
    let new = Bytes::from(vec![0x5a; unit]);
    let compare = |expected: &Bytes, new: &Bytes| {
        device.compare_and_write(at as u64, expected.clone(), new.clone())
    };
    let outcome = compare(&new, &old).await.expect("compare-and-write");
    assert_eq!(outcome, CawOutcome::Miscompare);
    assert!(*device.read(0, BLOCK_SIZE).await.expect("read") == content, "a miscompare wrote");
    let outcome = compare(&old, &new).await.expect("compare-and-write");
    assert_eq!(outcome, CawOutcome::Written);
    let found = device.read(0, BLOCK_SIZE).await.expect("read");
    assert!(found[..at] == content[..at] && found[at..] == new[..], "more or less was written");
    assert_eq!(compare(&old, &new).await.expect("again"), CawOutcome::Miscompare);
    device.flush().await.expect("flush");
}

async fn compare_and_write_refuses_bad_requests(device: &dyn BlockDevice) {
    let unit = device.info().logical_block as usize;
    let capacity = device.info().capacity;
    for (offset, expected, new) in [
        (1, unit, unit),
        (unit as u64 / 2, unit, unit),
        (capacity, unit, unit),
        (u64::MAX - unit as u64 + 1, unit, unit),
        (0, unit, 2 * unit),
        (0, 2 * unit, 2 * unit),
        (0, 0, 0),
    ] {
        let (expected, new) = (Bytes::from(vec![0; expected]), Bytes::from(vec![0; new]));
        let result = device.compare_and_write(offset, expected, new).await;
        let error = result.expect_err("a bad compare-and-write must fail");
        assert_eq!(error.kind, DeviceErrorKind::OutOfRange, "{error}");
    }
}

async fn compare_and_write_is_unsupported(device: &dyn BlockDevice) {
    let zeros = Bytes::from(vec![0; device.info().logical_block as usize]);
    let result = device.compare_and_write(0, zeros.clone(), zeros).await;
    let error = result.expect_err("a device without compare-and-write must say so");
    assert_eq!(error.kind, DeviceErrorKind::Unsupported, "{error}");
}

async fn contending_compare_and_writes_count_exactly(device: &dyn BlockDevice) {
    const TASKS: u64 = 8;
    const EACH: u64 = 25;
    let unit = device.info().logical_block as usize;
    device.write(0, vec![aligned(&[0; BLOCK_SIZE])]).await.expect("write");
    let tasks = (0..TASKS).map(|task| async move {
        let mut seen = Vec::new();
        for _ in 0..EACH {
            seen.push(increment(device, unit, task).await);
        }
        seen
    });
    let seen = join_all(tasks).await.concat();
    let distinct: HashSet<u64> = seen.iter().copied().collect();
    assert_eq!(distinct.len() as u64, TASKS * EACH, "two tasks won the same count");
    let found = device.read(0, BLOCK_SIZE).await.expect("read");
    assert_eq!(counter(&found), TASKS * EACH);
}

/// Adds one to the counter in the first logical block, however often it takes; returns the value
/// that was there before.
async fn increment(device: &dyn BlockDevice, unit: usize, task: u64) -> u64 {
    loop {
        let found = device.read(0, BLOCK_SIZE).await.expect("read");
        let count = counter(&found);
        let mut new = found[..unit].to_vec();
        new[..8].copy_from_slice(&(count + 1).to_le_bytes());
        new[8..16].copy_from_slice(&task.to_le_bytes());
        let expected = Bytes::copy_from_slice(&found[..unit]);
        match device.compare_and_write(0, expected, Bytes::from(new)).await {
            Ok(CawOutcome::Written) => return count,
            Ok(CawOutcome::Miscompare) => {}
            Err(e) => panic!("compare-and-write failed: {e}"),
        }
    }
}

fn counter(block: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[..8]);
    u64::from_le_bytes(bytes)
}

async fn flush_keeps_the_epoch(device: &dyn BlockDevice) {
    let epoch = device.epoch();
    device.write(0, vec![aligned(&stamped(40))]).await.expect("write");
    device.flush().await.expect("flush");
    assert_eq!(device.epoch(), epoch, "the epoch rose though nothing was lost");
}
