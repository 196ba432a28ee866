//! The simulated device keeps the contract while nothing goes wrong, and breaks only what it may when
//! something does.

use super::*;
use crate::device::conformance;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

const BLOCK: usize = 4096;
const SECTOR: usize = 512;

fn block_of(byte: u8) -> Bytes {
    AlignedBuf::copy_of(&[byte; BLOCK]).freeze()
}

fn device(seed: u64) -> SimDevice {
    SimDevice::new(1 << 20, seed)
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

#[test]
fn it_keeps_the_contract() {
    for seed in 0..8 {
        let mut options = SimOptions::new(4 << 20, seed);
        options.yields_max = seed as u32;
        run(conformance::run(SimDevice::with_options(options.clone()).device()));
        options.logical_block = 4096;
        options.discard = false;
        run(conformance::run(SimDevice::with_options(options.clone()).device()));
        options.compare_and_write = false;
        run(conformance::run(SimDevice::with_options(options).device()));
    }
}

#[test]
fn it_keeps_the_contract_on_many_threads() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async { tokio::spawn(conformance::run(device(1).device())).await.unwrap() });
}

/// A step of the crash test. Places are block numbers below 8.
#[derive(Clone, Debug)]
enum Step {
    Write {
        first: usize,
        blocks: usize,
    },
    /// Of one sector, given as block and sector in it.
    CompareAndWrite {
        block: usize,
        sector: usize,
    },
    Flush,
    Crash,
    LoseSession,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..8_usize, 1..4_usize)
            .prop_map(|(first, blocks)| Step::Write { first, blocks: blocks.min(8 - first) }),
        3 => (0..8_usize, 0..8_usize)
            .prop_map(|(block, sector)| Step::CompareAndWrite { block, sector }),
        2 => Just(Step::Flush),
        1 => Just(Step::Crash),
        1 => Just(Step::LoseSession),
    ]
}

/// For each sector: what it may hold after a crash, and what it must show before one.
#[derive(Default)]
struct Oracle {
    legal: HashMap<usize, Vec<u64>>,
}

impl Oracle {
    fn write(&mut self, sector: usize, stamp: u64) {
        self.legal.entry(sector).or_insert_with(|| vec![0]).push(stamp);
    }

    fn flush(&mut self) {
        for stamps in self.legal.values_mut() {
            stamps.drain(..stamps.len() - 1);
        }
    }

    fn shown(&self, sector: usize) -> u64 {
        self.legal.get(&sector).and_then(|stamps| stamps.last()).copied().unwrap_or(0)
    }

    /// Checks each sector and takes what is there as the only legal value from now on.
    fn settle(&mut self, device: &SimDevice) {
        for sector in 0..64 {
            let found = stamp_at(device, sector);
            let legal = self.legal.entry(sector).or_insert_with(|| vec![0]);
            assert!(legal.contains(&found), "sector {sector} holds {found}, legal: {legal:?}");
            *legal = vec![found];
        }
    }
}

/// The stamp that fills a sector; a sector of mixed content is a failure of its own.
fn stamp_at(device: &SimDevice, sector: usize) -> u64 {
    let content = device.peek((sector * SECTOR) as u64, SECTOR);
    let stamps: HashSet<&[u8]> = content.chunks(8).collect();
    assert_eq!(stamps.len(), 1, "sector {sector} is torn inside");
    u64::from_le_bytes(content[..8].try_into().unwrap())
}

fn stamped(stamp: u64, len: usize) -> Bytes {
    Bytes::from(stamp.to_le_bytes().repeat(len / 8))
}

async fn crash_test(seed: u64, steps: Vec<Step>) {
    let mut device = device(seed);
    let mut oracle = Oracle::default();
    for (stamp, step) in (1..).zip(steps) {
        match step {
            Step::Write { first, blocks } => {
                let data = stamped(stamp, blocks * BLOCK);
                device.write((first * BLOCK) as u64, vec![data]).await.unwrap();
                (first * 8..(first + blocks) * 8).for_each(|sector| oracle.write(sector, stamp));
            }
            Step::CompareAndWrite { block, sector } => {
                let sector = block * 8 + sector;
                let (old, new) = (stamped(oracle.shown(sector), SECTOR), stamped(stamp, SECTOR));
                let offset = (sector * SECTOR) as u64;
                let outcome = device.compare_and_write(offset, old, new).await.unwrap();
                assert_eq!(outcome, CawOutcome::Written);
                oracle.write(sector, stamp);
            }
            Step::Flush => {
                device.flush().await.unwrap();
                oracle.flush();
            }
            Step::Crash => {
                device.crash();
                assert!(device.read(0, BLOCK).await.unwrap_err().is_transient());
                device = device.connect();
                oracle.settle(&device);
            }
            Step::LoseSession => {
                let before = device.epoch();
                device.lose_session();
                assert!(device.epoch() > before);
                oracle.settle(&device);
            }
        }
        for sector in 0..64 {
            assert_eq!(stamp_at(&device, sector), oracle.shown(sector), "sector {sector}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn after_a_crash_each_sector_holds_a_legal_value(
        seed: u64,
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        run(crash_test(seed, steps));
    }
}

/// Two writes of one block and one of another, then a crash: every kind of damage comes up.
#[test]
fn crashes_keep_lose_tear_and_reorder() {
    let mut seen = HashSet::new();
    for seed in 0..200 {
        let device = device(seed);
        run(async {
            for stamp in [1, 2] {
                device.write(0, vec![block_of(stamp)]).await.unwrap();
            }
        });
        device.crash();
        let content = device.peek(0, BLOCK);
        let distinct: HashSet<u8> = content.iter().copied().collect();
        seen.insert(match distinct.len() {
            1 => ["lost", "older", "newer"][usize::from(content[0])],
            _ => "torn",
        });
        assert_eq!(device.unflushed_count(), 0);
    }
    assert_eq!(seen, HashSet::from(["lost", "older", "newer", "torn"]));
}

#[test]
fn a_device_of_4096_byte_blocks_tears_between_blocks_only() {
    for seed in 0..100 {
        let mut options = SimOptions::new(1 << 20, seed);
        options.logical_block = 4096;
        let device = SimDevice::with_options(options);
        run(device.write(0, vec![block_of(1), block_of(2)])).unwrap();
        device.crash();
        for block in device.peek(0, 2 * BLOCK).chunks(BLOCK) {
            assert!(block.iter().all(|&byte| byte == block[0]));
        }
    }
}

/// One scripted history with faults; returns everything that can be observed.
async fn history(seed: u64) -> (Vec<TraceEntry>, Vec<u8>, u64) {
    let device = device(seed);
    device.set_rates(FaultRates {
        read_io: 0.1,
        read_garbled: 0.1,
        write_io: 0.1,
        write_no_space: 0.1,
        flush_io: 0.2,
        unreachable: 0.05,
        unknown: 0.05,
    });
    let tasks: Vec<_> = (0..4_u64)
        .map(|task| {
            let device = device.clone();
            tokio::spawn(async move {
                for i in 0..20 {
                    let offset = (task * 7 + i) % 16 * BLOCK as u64;
                    // Failures are part of the history.
                    let _ = device.write(offset, vec![block_of((task * 20 + i) as u8)]).await;
                    let _ = device.read(offset, BLOCK).await;
                    if i % 5 == 0 {
                        let _ = device.flush().await;
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let epoch = device.epoch();
    device.crash();
    (device.trace(), device.peek(0, 16 * BLOCK), epoch)
}

#[test]
fn one_seed_is_one_history() {
    for seed in 0..5 {
        assert!(run(history(seed)) == run(history(seed)), "seed {seed} does not repeat");
    }
    let errors = |trace: &[TraceEntry]| trace.iter().filter(|entry| entry.error.is_some()).count();
    let (one, other) = (run(history(1)), run(history(2)));
    assert!(one != other, "the seed has no influence");
    assert!(errors(&one.0) > 5, "the rates have no influence");
}

#[test]
fn planned_faults_come_once_and_where_planned() {
    run(async {
        let device = device(3);
        device.write(0, vec![block_of(1)]).await.unwrap();
        device.flush().await.unwrap();

        device.inject(OpKind::Read, 1, Fault::Io);
        device.read(0, BLOCK).await.unwrap();
        let error = device.read(0, BLOCK).await.unwrap_err();
        assert_eq!((error.kind, error.operation), (DeviceErrorKind::Io, "read"), "{error}");
        device.read(0, BLOCK).await.unwrap();

        device.inject(OpKind::Read, 0, Fault::Garbled);
        let garbled = device.read(0, BLOCK).await.unwrap();
        let flipped: u32 = garbled.iter().map(|byte| (byte ^ 1).count_ones()).sum();
        assert_eq!(flipped, 1);
        assert_eq!(*device.read(0, BLOCK).await.unwrap(), [1; BLOCK]);

        device.inject(OpKind::Write, 0, Fault::NoSpace);
        let error = device.write(BLOCK as u64, vec![block_of(2)]).await.unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::NoSpace);

        device.inject(OpKind::Write, 0, Fault::Lost);
        device.write(0, vec![block_of(9)]).await.unwrap();
        device.flush().await.unwrap();
        assert_eq!(device.peek(0, BLOCK), [1; BLOCK]);

        device.inject(OpKind::Write, 0, Fault::Misdirected(8192));
        device.write(0, vec![block_of(7)]).await.unwrap();
        assert_eq!(device.peek(0, BLOCK), [1; BLOCK]);
        assert_eq!(device.peek(8192, BLOCK), [7; BLOCK]);

        device.corrupt(5, 0x80);
        assert_eq!(device.read(0, BLOCK).await.unwrap()[4..7], [1, 0x81, 1]);
        assert_eq!(device.peek_durable(5, 1), [0x81]);
    });
}

#[test]
fn unknown_outcomes_go_both_ways_and_raise_the_epoch() {
    let mut landed = HashSet::new();
    for seed in 0..50 {
        run(async {
            let device = device(seed);
            device.inject(OpKind::CompareAndWrite, 0, Fault::Unknown);
            let (old, new) = (Bytes::from(vec![0; 512]), Bytes::from(vec![1; 512]));
            let result = device.compare_and_write(0, old.clone(), new.clone()).await;
            assert_eq!(result.unwrap_err().kind, DeviceErrorKind::Unreachable);
            assert_eq!(device.epoch(), 1);
            let content = device.peek(0, 512);
            assert!(content == old || content == new, "a compare-and-write was torn");
            landed.insert(content == new);

            device.inject(OpKind::Write, 0, Fault::UnknownApplied);
            device.write(0, vec![block_of(2)]).await.unwrap_err();
            assert_eq!((device.epoch(), device.peek(0, BLOCK)), (2, vec![2; BLOCK]));
            device.inject(OpKind::Write, 0, Fault::Unreachable);
            device.write(0, vec![block_of(3)]).await.unwrap_err();
            assert_eq!((device.epoch(), device.peek(0, BLOCK)), (3, vec![2; BLOCK]));
        });
    }
    assert_eq!(landed.len(), 2, "the outcome was always the same: {landed:?}");
}

/// After a flush that failed, a later one that succeeds does not make everything durable.
#[test]
fn a_failed_flush_forgets_writes_and_raises_the_epoch() {
    let mut forgotten = 0;
    for seed in 0..20 {
        run(async {
            let device = device(seed);
            for block in 0..8 {
                device.write(block * 4096, vec![block_of(1)]).await.unwrap();
            }
            device.inject(OpKind::Flush, 0, Fault::Io);
            assert_eq!(device.flush().await.unwrap_err().kind, DeviceErrorKind::Io);
            assert_eq!(device.epoch(), 1);
            device.flush().await.unwrap();
            assert_eq!(device.peek(0, 8 * BLOCK), vec![1; 8 * BLOCK]);
            device.crash();
            let lost = |block: u64| device.peek(block * 4096, 1) == [0];
            forgotten += (0..8).filter(|&block| lost(block)).count();
        });
    }
    assert!(forgotten > 0, "every write survived");
}

#[test]
fn a_host_dies_at_the_chosen_operation() {
    run(async {
        let device = device(4);
        device.crash_after(2);
        device.write(0, vec![block_of(1)]).await.unwrap();
        device.flush().await.unwrap();
        assert!(!device.is_dead());
        let error = device.write(0, vec![block_of(2)]).await.unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::Unreachable);
        assert!(device.is_dead());
        device.died().await;
        device.set_reachable(true);
        assert!(device.read(0, BLOCK).await.is_err(), "the dead stay dead");
        device.crash();
        let again = device.connect();
        for byte in again.read(0, BLOCK).await.unwrap().iter() {
            assert!(matches!(byte, 1 | 2), "a flushed write was lost");
        }
        assert_eq!(device.counts().total(), 4);
        assert_eq!(again.counts(), OpCounts { reads: 1, bytes_read: 4096, ..OpCounts::default() });
    });
}

#[test]
fn the_death_of_one_host_leaves_the_target_and_the_others_alone() {
    run(async {
        let one = device(5);
        let other = one.connect();
        one.write(0, vec![block_of(1)]).await.unwrap();
        one.kill_host();
        assert!(one.flush().await.is_err());
        assert_eq!(*other.read(0, BLOCK).await.unwrap(), [1; BLOCK]);
        other.flush().await.unwrap();
        other.crash();
        assert_eq!(one.connect().peek(0, BLOCK), [1; BLOCK]);
    });
}

#[test]
fn an_outage_fails_or_hangs_as_told_and_ends() {
    run(async {
        let device = device(6);
        device.set_reachable(false);
        assert_eq!(device.read(0, BLOCK).await.unwrap_err().kind, DeviceErrorKind::Unreachable);
        assert_eq!(device.epoch(), 1);
        device.set_reach(Reach::Hanging);
        let waiting = tokio::spawn({
            let device = device.clone();
            async move { device.write(0, vec![block_of(1)]).await }
        });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        assert_eq!(device.peek(0, BLOCK), [0; BLOCK]);
        device.set_reachable(true);
        waiting.await.unwrap().unwrap();
        assert_eq!(device.peek(0, BLOCK), [1; BLOCK]);
        assert_eq!(device.epoch(), 1);
    });
}

#[test]
fn a_full_target_takes_only_overwrites() {
    run(async {
        let device = device(7);
        device.write(0, vec![block_of(1)]).await.unwrap();
        device.set_full(true);
        let error = device.write(4096, vec![block_of(1)]).await.unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::NoSpace);
        let swap = |offset, from| {
            let sector = |fill| Bytes::from(vec![fill; 512]);
            device.compare_and_write(offset, sector(from), sector(2))
        };
        assert_eq!(swap(4096, 0).await.unwrap_err().kind, DeviceErrorKind::NoSpace);
        assert_eq!(swap(0, 1).await.unwrap(), CawOutcome::Written);
        device.write(0, vec![block_of(2)]).await.unwrap();
        device.set_full(false);
        device.write(4096, vec![block_of(1)]).await.unwrap();
    });
}

/// Starts a write, drops its future before it took effect, and returns the device.
async fn with_orphan(seed: u64) -> SimDevice {
    let mut options = SimOptions::new(1 << 20, seed);
    options.yields_max = 3;
    let device = SimDevice::with_options(options);
    let writing = tokio::spawn({
        let device = device.clone();
        async move { device.write(0, vec![block_of(1)]).await }
    });
    tokio::task::yield_now().await;
    writing.abort();
    // Aborted or finished, both are fine here.
    let _ = writing.await;
    device
}

#[test]
fn a_dropped_write_may_land_late_but_not_after_its_session() {
    let (mut late, mut never) = (0, 0);
    for seed in 0..100 {
        run(async {
            let device = with_orphan(seed).await;
            if device.peek(0, 1) == [1] {
                return;
            }
            device.read(4096, BLOCK).await.unwrap();
            late += usize::from(device.peek(0, 1) == [1]);

            let device = with_orphan(seed).await;
            device.set_reachable(false);
            let settled = device.peek(0, BLOCK);
            never += usize::from(settled == [0; BLOCK]);
            device.set_reachable(true);
            for _ in 0..50 {
                device.read(4096, BLOCK).await.unwrap();
            }
            assert_eq!(device.peek(0, BLOCK), settled, "it landed after the session had ended");
        });
    }
    assert!(late > 0 && never > 0, "late: {late}, never: {never}");
}

/// Operations in flight when the session ends fail, and do nothing later.
#[test]
fn what_is_in_flight_at_a_crash_never_lands_after_it() {
    for seed in 0..100 {
        run(async {
            let device = device(seed);
            let tasks: Vec<_> = (0..8)
                .map(|i| {
                    let device = device.clone();
                    tokio::spawn(async move { device.write(i * 4096, vec![block_of(1)]).await })
                })
                .collect();
            for _ in 0..seed % 5 {
                tokio::task::yield_now().await;
            }
            device.crash();
            let settled = device.peek(0, 8 * BLOCK);
            for task in tasks {
                // Those that had finished before the crash succeeded.
                let _ = task.await.unwrap();
            }
            assert!(device.peek(0, 8 * BLOCK) == settled, "a write landed after the crash");
        });
    }
}

#[test]
fn a_fork_loses_what_a_power_loss_would_and_leaves_the_device_alone() {
    for seed in 0..20 {
        run(async {
            let device = device(seed);
            device.write(0, vec![block_of(1)]).await.unwrap();
            device.flush().await.unwrap();
            device.write(0, vec![block_of(2)]).await.unwrap();
            let fork = device.fork(seed);
            assert_eq!(fork.peek(0, BLOCK), block_of(2), "it shows what the device shows");
            fork.crash();
            let sector = fork.peek(0, SECTOR);
            assert!(sector == [1; SECTOR] || sector == [2; SECTOR], "the old or the new");
            assert_eq!(device.peek(0, BLOCK), block_of(2));
            assert_eq!(device.unflushed_count(), 1, "the device itself lost nothing");
        });
    }
}
