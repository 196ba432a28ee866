//! Goal: the front end speaks vhost-user-blk as an independent server understands it, in every mode.
//! Method: qemu-storage-daemon on a small file; write through the ring, read back through the ring
//! and from the file.

use std::path::Path;
use std::time::Duration;

use bench::front_end::{Disk, Options, Request, Status, Wake, feature};
use bench::load::{self, Limit, Pattern, Random, Workload};
use bench::peer::StorageDaemon;
use bench::server::{Server, measure};

const DISK_BYTES: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn daemon(dir: &Path) -> StorageDaemon {
    let file = dir.join("disk.raw");
    std::fs::write(&file, vec![0u8; DISK_BYTES as usize]).unwrap();
    StorageDaemon::start(&file, dir, 0).unwrap()
}

fn modes() -> Vec<(&'static str, Options)> {
    let base = Options { slots: 8, slot_bytes: 65536, ..Options::default() };
    vec![
        ("indirect, event index", base.clone()),
        ("indirect, several segments", Options { segments: 5, ..base.clone() }),
        ("direct", Options { features: base.features & !feature::INDIRECT_DESC, ..base.clone() }),
        (
            "flags instead of event index",
            Options { features: base.features & !feature::EVENT_IDX, ..base.clone() },
        ),
        ("polling", Options { poll: true, ..base.clone() }),
        ("smallest ring", Options { slots: 1, queue_size: 4, ..base }),
    ]
}

#[test]
fn what_is_written_is_read_back_in_every_mode() {
    let dir = tempfile::tempdir().unwrap();
    let server = daemon(dir.path());
    for (index, (name, options)) in modes().into_iter().enumerate() {
        let mut disk = Disk::connect(server.socket(), &options).unwrap();
        assert_eq!(disk.config().capacity_sectors * 512, DISK_BYTES, "{name}");
        let mut random = Random(index as u64 + 1);
        let mut expected = vec![0; 40 * 512];
        random.fill(&mut expected);
        let sector = 8 * index as u64 + 3;

        disk.buffer(0)[..expected.len()].copy_from_slice(&expected);
        disk.execute(&Request::Write { sector, sectors: 40 }, PATIENCE).expect(name);
        disk.execute(&Request::Flush, PATIENCE).expect(name);
        disk.buffer(0).fill(0);
        disk.execute(&Request::Read { sector, sectors: 40 }, PATIENCE).expect(name);
        assert_eq!(disk.buffer(0)[..expected.len()], expected, "{name}");
        disk.stop().expect(name);

        let file = std::fs::read(dir.path().join("disk.raw")).unwrap();
        let at = sector as usize * 512;
        assert_eq!(file[at..at + expected.len()], expected, "{name}: in the file");
    }
}

#[test]
fn a_range_past_the_end_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let server = daemon(dir.path());
    let mut disk = Disk::connect(server.socket(), &Options::default()).unwrap();
    disk.submit(3, &Request::Read { sector: DISK_BYTES / 512, sectors: 8 }).unwrap();
    disk.kick().unwrap();
    assert_eq!(disk.wait(PATIENCE).unwrap(), Wake::Completions);
    let done = disk.take().unwrap().unwrap();
    assert_eq!((done.slot, done.status), (3, Status::IoError));
    disk.execute(&Request::Read { sector: 0, sectors: 8 }, PATIENCE).unwrap();
}

#[test]
fn the_death_of_the_server_is_seen_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let server = daemon(dir.path());
    for poll in [false, true] {
        let options = Options { poll, ..Options::default() };
        let mut disk = Disk::connect(server.socket(), &options).unwrap();
        assert_eq!(disk.wait(Duration::ZERO).unwrap(), Wake::TimedOut);
        disk.stop().unwrap();
    }
    let mut disk = Disk::connect(server.socket(), &Options::default()).unwrap();
    drop(server);
    assert_eq!(disk.wait(PATIENCE).unwrap(), Wake::Disconnected);
}

#[test]
fn load_is_counted_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let server = daemon(dir.path());
    let patterns = [
        Pattern::RandomWrite,
        Pattern::RandomWriteFlush,
        Pattern::RandomRead,
        Pattern::SequentialWrite,
        Pattern::SequentialRead,
    ];
    for pattern in patterns {
        let workload = Workload {
            pattern,
            block_bytes: 8192,
            depth: 4,
            span_bytes: DISK_BYTES,
            paced_writes_per_second: 50,
            seed: 1,
        };
        let limit = Limit { time: PATIENCE, bytes: 64 * 8192 };
        let sample = measure(&server, &workload, limit, false).unwrap();
        assert_eq!(sample.measured.operations, 64, "{pattern:?}");
        assert_eq!(sample.measured.bytes, 64 * 8192, "{pattern:?}");
        assert_eq!(sample.measured.latency.len(), 64, "{pattern:?}");
    }
    let mut disk = Disk::connect(server.socket(), &Options::default()).unwrap();
    let too_wide = Workload {
        pattern: Pattern::RandomRead,
        block_bytes: 4096,
        depth: 1,
        span_bytes: DISK_BYTES * 2,
        paced_writes_per_second: 0,
        seed: 1,
    };
    let limit = Limit { time: PATIENCE, bytes: 1 };
    assert!(load::run(&mut disk, &too_wide, limit).is_err());
}
