//! The file backend on real files, and against a second process.

use super::*;
use crate::device::{conformance, open};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const BLOCK: usize = 4096;
const CHILD_PATH: &str = "BALLAST_TEST_CHILD_PATH";

fn block_of(byte: u8) -> Bytes {
    AlignedBuf::copy_of(&[byte; BLOCK]).freeze()
}

/// A folder on disk with the path of a file that does not exist yet.
fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.img");
    (folder, path)
}

fn create(size: u64) -> OpenOptions {
    OpenOptions { create_size: Some(size), ..OpenOptions::default() }
}

fn exclusive() -> OpenOptions {
    OpenOptions { exclusive: true, ..OpenOptions::default() }
}

fn refused(path: &Path, options: &OpenOptions) -> DeviceError {
    let error = FileDevice::open(path, options).expect_err("opening must fail");
    assert_eq!(error.operation, "open");
    assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    error
}

#[tokio::test]
async fn it_keeps_the_contract() {
    let (_folder, path) = scratch();
    let device = FileDevice::open(&path, &create(16 << 20)).unwrap();
    assert!(device.info().compare_and_write);
    conformance::run(device).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_contract_on_many_threads() {
    let (_folder, path) = scratch();
    let device = FileDevice::open(&path, &create(conformance::SIZE_USED)).unwrap();
    tokio::spawn(conformance::run(device)).await.unwrap();
}

/// A file system in memory: no direct I/O on older kernels, direct I/O in name only on newer ones.
#[tokio::test]
async fn it_keeps_the_contract_on_tmpfs() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
    let device = FileDevice::open(&folder.path().join("store.img"), &create(16 << 20)).unwrap();
    conformance::run(device).await;
}

#[tokio::test]
async fn content_survives_reopening_by_url() {
    let (_folder, path) = scratch();
    let url = format!("file:{}", path.display());
    let device = open(&url, &create(1 << 20)).await.unwrap();
    assert_eq!((device.info().capacity, &device.info().url), (1 << 20, &url));
    device.write(8192, vec![block_of(7)]).await.unwrap();
    device.flush().await.unwrap();
    drop(device);
    let device = open(&path.to_string_lossy(), &OpenOptions::default()).await.unwrap();
    assert_eq!(*device.read(8192, BLOCK).await.unwrap(), [7; BLOCK]);
    assert_eq!(*device.read(0, BLOCK).await.unwrap(), [0; BLOCK]);
}

#[tokio::test]
async fn discarded_blocks_of_a_file_read_as_zeros_and_free_their_space() {
    use std::os::unix::fs::MetadataExt;
    let (_folder, path) = scratch();
    let device = FileDevice::open(&path, &create(1 << 20)).unwrap();
    if !device.info().discard {
        return;
    }
    device.write(0, vec![Bytes::from(vec![1; 1 << 20])]).await.unwrap();
    device.flush().await.unwrap();
    let before = std::fs::metadata(&path).unwrap().blocks();
    device.discard(0, 1 << 19).await.unwrap();
    assert_eq!(*device.read(0, 1 << 19).await.unwrap(), vec![0; 1 << 19]);
    assert_eq!(*device.read(1 << 19, 1 << 19).await.unwrap(), vec![1; 1 << 19]);
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.blocks() < before);
    assert_eq!(metadata.len(), 1 << 20);
}

/// Futures dropped at any moment, with the device closed right behind them: what the kernel still
/// works on stays allocated, and reads into freed memory would show as damage of the others.
#[tokio::test]
async fn dropped_futures_and_an_early_close_do_no_harm() {
    let (_folder, path) = scratch();
    for round in 0..20_u8 {
        let device = match round {
            0 => FileDevice::open(&path, &create(8 << 20)).unwrap(),
            _ => FileDevice::open(&path, &OpenOptions::default()).unwrap(),
        };
        let tasks: Vec<_> = (0..200_u64)
            .map(|i| {
                let device = Arc::clone(&device);
                tokio::spawn(async move {
                    device.write(i * 4096, vec![block_of(round)]).await.unwrap();
                    device.read(i * 4096, BLOCK).await.unwrap()
                })
            })
            .collect();
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
        drop(device);
        for task in tasks {
            if let Ok(content) = task.await {
                assert_eq!(*content, [round; BLOCK]);
            }
        }
    }
    let content = std::fs::read(&path).unwrap();
    for block in content.chunks(BLOCK) {
        assert!(block.iter().all(|&byte| byte == block[0]), "a write was mixed up");
    }
}

#[tokio::test]
async fn a_read_only_device_refuses_changes_and_locks_nobody_out() {
    let (_folder, path) = scratch();
    drop(FileDevice::open(&path, &create(1 << 20)).unwrap());
    let owner = FileDevice::open(&path, &exclusive()).unwrap();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let device = FileDevice::open(&path, &options).unwrap();
    assert!(!device.info().compare_and_write && !device.info().discard);
    device.read(0, BLOCK).await.unwrap();
    device.flush().await.unwrap();
    let error = device.write(0, vec![block_of(1)]).await.unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Unsupported, "{error}");
    let error = device.discard(0, 4096).await.unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Unsupported, "{error}");
    let sector = Bytes::from(vec![0; 512]);
    let error = device.compare_and_write(0, sector.clone(), sector).await.unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Unsupported, "{error}");
    owner.write(0, vec![block_of(1)]).await.unwrap();
    assert_eq!(*device.read(0, BLOCK).await.unwrap(), [1; BLOCK]);
}

#[test]
fn an_exclusive_owner_and_other_writers_keep_each_other_out() {
    let (_folder, path) = scratch();
    let shared = OpenOptions::default();
    let owner =
        FileDevice::open(&path, &OpenOptions { exclusive: true, ..create(1 << 20) }).unwrap();
    for options in [exclusive(), shared.clone()] {
        let error = refused(&path, &options);
        assert_eq!(error.kind, DeviceErrorKind::Reserved, "{error}");
        assert!(error.message.contains("holds it exclusively"), "{error}");
        assert!(error.message.contains("stop"), "it says what to do: {error}");
    }
    drop(owner);
    let one = FileDevice::open(&path, &shared).unwrap();
    let other = FileDevice::open(&path, &shared).unwrap();
    drop(one);
    let error = refused(&path, &exclusive());
    assert_eq!(error.kind, DeviceErrorKind::Reserved, "{error}");
    assert!(error.message.contains("has it open for writing"), "{error}");
    drop(other);
    FileDevice::open(&path, &exclusive()).unwrap();
}

#[test]
fn what_a_process_that_is_gone_still_holds_for_a_moment_is_waited_for() {
    let (_folder, path) = scratch();
    let owner =
        FileDevice::open(&path, &OpenOptions { exclusive: true, ..create(1 << 20) }).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            drop(owner);
        });
        FileDevice::open(&path, &exclusive()).unwrap();
    });
}

#[test]
fn nobody_becomes_the_owner_while_the_last_ones_other_opens_are_there() {
    let (_folder, path) = scratch();
    let owner =
        FileDevice::open(&path, &OpenOptions { exclusive: true, ..create(1 << 20) }).unwrap();
    let beside = FileDevice::open_beside(&path).unwrap();
    let other = FileDevice::open_beside(&path).unwrap();
    drop((owner, other));
    let error = refused(&path, &exclusive());
    assert_eq!(error.kind, DeviceErrorKind::Reserved, "{error}");
    drop(beside);
    FileDevice::open(&path, &exclusive()).unwrap();
}

#[test]
fn paths_that_will_not_do_are_refused_with_advice() {
    let (folder, path) = scratch();
    let error = refused(&path, &OpenOptions::default());
    assert!(
        error.message.contains("does not exist") && error.message.contains("create"),
        "{error}"
    );
    let error = refused(Path::new("/dev/ballast-no-such-disk"), &OpenOptions::default());
    assert_eq!(error.kind, DeviceErrorKind::Unreachable, "{error}");
    let error = refused(folder.path(), &OpenOptions::default());
    assert!(error.message.contains("folder"), "{error}");
    refused(Path::new("/dev/null"), &OpenOptions::default());
    refused(&folder.path().join("no/such/folder"), &create(4096));

    for (size, legal) in [(0, false), (1000, false), (4096, true)] {
        let result = FileDevice::open(&path, &create(size));
        assert_eq!(result.is_ok(), legal, "{size}");
        assert_eq!(path.exists(), legal, "a refused size leaves nothing behind");
    }
    let error = refused(&path, &create(8192));
    assert!(error.message.contains("4096") && error.message.contains("8192"), "{error}");
    FileDevice::open(&path, &create(4096)).unwrap();

    std::fs::write(&path, b"").unwrap();
    let error = refused(&path, &OpenOptions::default());
    assert!(error.message.contains("truncated"), "{error}");
}

#[test]
fn a_capacity_that_is_no_whole_number_of_blocks_is_cut() {
    let (_folder, path) = scratch();
    std::fs::write(&path, vec![0; 10_000]).unwrap();
    let device = FileDevice::open(&path, &OpenOptions::default()).unwrap();
    assert_eq!(device.info().capacity, 8192);
}

#[tokio::test]
async fn a_file_truncated_in_use_is_an_error_not_zeros() {
    let (_folder, path) = scratch();
    let device = FileDevice::open(&path, &create(1 << 20)).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
    let error = device.read(4096, 4 * BLOCK).await.unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Io);
    assert!(error.message.contains("truncated"), "{error}");
}

/// A limit on the size of files, in a process of its own, gives writes a real errno.
#[test]
fn a_failing_write_carries_its_errno_and_advice() {
    let (folder, path) = scratch();
    drop(FileDevice::open(&path, &create(1 << 20)).unwrap());
    let output = child("child_writes_beyond_its_limit", &path).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    drop(folder);
}

#[tokio::test]
async fn child_writes_beyond_its_limit() {
    let Ok(path) = std::env::var(CHILD_PATH) else { return };
    let device = FileDevice::open(Path::new(&path), &OpenOptions::default()).unwrap();
    let limit = libc::rlimit { rlim_cur: 8192, rlim_max: 8192 };
    // SAFETY: the limit is valid for the call, and ignoring a signal installs no handler.
    unsafe {
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    device.write(4096, vec![block_of(1)]).await.unwrap();
    let error = device.write(8192, vec![block_of(1)]).await.unwrap_err();
    assert!(error.to_string().contains("os error 27"), "{error}");
    // Half of it fits: the rest must not be taken for written.
    device.write(4096, vec![block_of(1), block_of(2)]).await.unwrap_err();
}

/// Starts one test of this very program in a process of its own.
fn child(test: &str, path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("device::file::tests::{test}"), "--nocapture"])
        .env(CHILD_PATH, path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

#[test]
fn another_process_is_kept_out_too() {
    let (_folder, path) = scratch();
    let owner =
        FileDevice::open(&path, &OpenOptions { exclusive: true, ..create(1 << 20) }).unwrap();
    finish(child("child_is_refused", &path));
    drop(owner);
    FileDevice::open(&path, &exclusive()).unwrap();
}

#[test]
fn child_is_refused() {
    let Ok(path) = std::env::var(CHILD_PATH) else { return };
    let error = refused(Path::new(&path), &exclusive());
    assert_eq!(error.kind, DeviceErrorKind::Reserved, "{error}");
}

const INCREMENTS: u64 = 200;

/// Three processes count in one sector; no count may be lost.
#[tokio::test]
async fn compare_and_write_excludes_other_processes() {
    let (_folder, path) = scratch();
    let device = FileDevice::open(&path, &create(1 << 20)).unwrap();
    let children = [(); 2].map(|()| child("child_counts", &path));
    count(&device).await;
    children.into_iter().for_each(finish);
    let content = device.read(0, BLOCK).await.unwrap();
    assert_eq!(content[..8], (3 * INCREMENTS).to_le_bytes());
}

#[tokio::test]
async fn child_counts() {
    let Ok(path) = std::env::var(CHILD_PATH) else { return };
    count(&FileDevice::open(Path::new(&path), &OpenOptions::default()).unwrap()).await;
}

async fn count(device: &Device) {
    let unit = device.info().logical_block as usize;
    let mut counted = 0;
    while counted < INCREMENTS {
        let found = device.read(0, BLOCK).await.unwrap();
        let mut new = found[..unit].to_vec();
        let value = u64::from_le_bytes(found[..8].try_into().unwrap());
        new[..8].copy_from_slice(&(value + 1).to_le_bytes());
        let expected = Bytes::copy_from_slice(&found[..unit]);
        if device.compare_and_write(0, expected, Bytes::from(new)).await.unwrap()
            == CawOutcome::Written
        {
            counted += 1;
        }
    }
}

#[test]
fn failures_that_leave_writes_in_doubt_raise_the_epoch() {
    let shared = |is_block_device| Shared {
        file: tempfile::tempfile().unwrap(),
        epoch: AtomicU64::new(0),
        is_block_device,
    };
    let rises = |shared: &Shared, errno, is_flush| {
        let before = shared.epoch.load(Ordering::SeqCst);
        shared.note_failure(&io::Error::from_raw_os_error(errno), is_flush);
        shared.epoch.load(Ordering::SeqCst) > before
    };
    for device in [shared(false), shared(true)] {
        assert!(rises(&device, libc::EIO, true), "a flush failed");
        assert!(rises(&device, libc::ENODEV, false), "the disk was away");
        assert!(!rises(&device, libc::ENOSPC, false), "a write found no room");
        assert_eq!(rises(&device, libc::EIO, false), device.is_block_device);
    }
}

/// A loop device over a file, if this machine and user can have one; detached on drop.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn attach(file: &Path, sector: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file)
            .output()
            .ok()?;
        let path = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !path.is_empty()).then(|| Self(PathBuf::from(path)))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Nothing can be done about a failure here, and the kernel says why in its log.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_block_device_keeps_the_contract_for_a_single_host() {
    for sector in [512, 4096] {
        let (_folder, path) = scratch();
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let Some(disk) = LoopDevice::attach(&path, sector) else {
            eprintln!("skipped: no loop device can be attached here");
            return;
        };
        let device = FileDevice::open(&disk.0, &exclusive()).unwrap();
        let info = device.info();
        assert_eq!((info.capacity, info.logical_block), (16 << 20, sector));
        assert!(!info.compare_and_write, "a lock on a device node reaches no other host");
        assert_eq!(refused(&disk.0, &exclusive()).kind, DeviceErrorKind::Reserved);
        conformance::run(device).await;
    }
}

/// Names SCSI disks that may be overwritten, separated by commas.
const SCSI_DISKS: &str = "BALLAST_TEST_SCSI_DISKS";
/// Names partitions and logical volumes of such disks.
const SCSI_PARTS: &str = "BALLAST_TEST_SCSI_PARTS";

fn disks_of(variable: &str) -> Vec<PathBuf> {
    let value = std::env::var(variable).unwrap_or_default();
    value.split(',').filter(|path| !path.is_empty()).map(PathBuf::from).collect()
}

/// Runs where somebody offers disks, for example in a guest with LIO and tcm_loop.
#[tokio::test]
async fn a_scsi_disk_keeps_the_contract_between_hosts() {
    for path in disks_of(SCSI_DISKS) {
        let device = FileDevice::open(&path, &OpenOptions::default()).unwrap();
        assert!(device.info().compare_and_write, "{device:?}");
        conformance::run(Arc::clone(&device)).await;
        device.write(0, vec![block_of(0)]).await.unwrap();
        let children = [(); 2].map(|()| child("child_counts", &path));
        count(&device).await;
        children.into_iter().for_each(finish);
        let content = device.read(0, BLOCK).await.unwrap();
        assert_eq!(content[..8], (3 * INCREMENTS).to_le_bytes());
        println!("tested {}", path.display());
    }
    for path in disks_of(SCSI_PARTS) {
        let device = FileDevice::open(&path, &OpenOptions::default()).unwrap();
        assert!(!device.info().compare_and_write, "{device:?}");
        conformance::run(device).await;
        println!("tested {}", path.display());
    }
}
