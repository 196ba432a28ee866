//! Opening and creating files, and what can be learned of them before the first request.

use super::{lock, sgio};
use crate::device::{DeviceError, DeviceErrorKind, OpenOptions};
use crate::types::BLOCK_SIZE;
use std::fs::{File, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a file may be held by a process that is gone.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);
const RELEASE_POLL: Duration = Duration::from_millis(5);

nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);

/// An open file or block device with its facts.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) is_block_device: bool,
    /// Bytes, a multiple of 4096.
    pub(super) capacity: u64,
    pub(super) logical_block: u32,
    /// What a buffer's address must be a multiple of.
    pub(super) memory_align: usize,
    pub(super) discard: bool,
    /// As in [`DeviceInfo`](crate::device::DeviceInfo).
    pub(super) discard_granularity: u64,
    pub(super) discard_alignment: u64,
    /// How to compare and write; None: this device cannot, or was opened to read only.
    pub(super) caw: Option<CawMethod>,
}

/// How a compare-and-write is made atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CawMethod {
    /// A lock on the file's bytes: between all that share the file system.
    FileLock,
    /// The SCSI command: between all hosts of the disk.
    Scsi,
}

/// Opens as told, creating a missing file if `create_size` asks for it.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Opened, DeviceError> {
    let context = Context(path);
    let metadata = match (std::fs::metadata(path), options.create_size) {
        (Err(e), Some(size)) if e.kind() == io::ErrorKind::NotFound => {
            create(&context, size)?;
            std::fs::metadata(path).map_err(|e| context.io("looking at the new file", &e))?
        }
        (Err(e), _) => return Err(context.missing(&e)),
        (Ok(metadata), _) => metadata,
    };
    let is_block_device = metadata.file_type().is_block_device();
    if !is_block_device && !metadata.is_file() {
        let what = if metadata.is_dir() { "a folder" } else { "no regular file" };
        let message = format!("it is {what}: give a file or a block device");
        return Err(context.error(DeviceErrorKind::Unsupported, message));
    }
    let (file, direct) = open_file(&context, options, is_block_device)?;
    if !options.read_only {
        take_ownership(&context, &file, options.exclusive)?;
    }
    if is_block_device {
        block_device_facts(&context, file, options, &metadata)
    } else {
        file_facts(&context, file, options, direct)
    }
}

fn create(context: &Context<'_>, size: u64) -> Result<(), DeviceError> {
    let path = context.0;
    if size == 0 || !size.is_multiple_of(BLOCK_SIZE as u64) {
        let message =
            format!("cannot create it with {size} bytes: give a multiple of {BLOCK_SIZE}");
        return Err(context.error(DeviceErrorKind::OutOfRange, message));
    }
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(|e| context.io("creating it", &e))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let sized = file.set_len(size).and_then(|()| file.sync_all());
    let result = sized.and_then(|()| File::open(folder)?.sync_all());
    result.map_err(|e| {
        // A half-made file would only be in the way of the next attempt.
        let _ = std::fs::remove_file(path);
        context.io(&format!("creating it with {size} bytes"), &e)
    })
}

/// Opens past the page cache if the file system lets us. The flag returned says so.
fn open_file(
    context: &Context<'_>,
    options: &OpenOptions,
    is_block_device: bool,
) -> Result<(File, bool), DeviceError> {
    let mut how = std::fs::OpenOptions::new();
    how.read(true).write(!options.read_only);
    // On a block device O_EXCL also refuses one that is mounted or part of an array.
    let claim = if is_block_device && options.exclusive { libc::O_EXCL } else { 0 };
    let direct = how.custom_flags(claim | libc::O_DIRECT);
    let is_busy = |e: &io::Error| claim != 0 && e.raw_os_error() == Some(libc::EBUSY);
    match until_released(is_busy, || direct.open(context.0)) {
        Ok(file) => return Ok((file, true)),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
        Err(e) if is_busy(&e) => {
            let message = "it is in use (mounted, part of an array, or held by another process): \
                           release it there first, `lsblk` and `fuser -v` show by whom";
            return Err(context.error(DeviceErrorKind::Reserved, message.to_owned()));
        }
        Err(e) => return Err(context.io("opening it", &e)),
    }
    let file = how.custom_flags(claim).open(context.0).map_err(|e| context.io("opening it", &e))?;
    tracing::warn!(
        path = %context.0.display(),
        "the file system has no direct I/O: going through the page cache"
    );
    Ok((file, false))
}

/// Tries again for a while what fails because somebody holds the file. io_uring keeps a file, and the locks on it, until
/// its last request is done, which is a moment after the process that sent it was killed and reaped: an agent that is
/// started at once must not be refused because of that.
fn until_released<T>(
    is_held: impl Fn(&io::Error) -> bool,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let give_up = Instant::now() + RELEASE_PATIENCE;
    loop {
        match attempt() {
            Err(e) if is_held(&e) && Instant::now() < give_up => std::thread::sleep(RELEASE_POLL),
            other => return other,
        }
    }
}

fn take_ownership(context: &Context<'_>, file: &File, exclusive: bool) -> Result<(), DeviceError> {
    let is_held = |e: &io::Error| e.kind() == io::ErrorKind::WouldBlock;
    match until_released(is_held, || lock::lock_owner(file, exclusive)) {
        Ok(()) => Ok(()),
        Err(e) if is_held(&e) => {
            let holder = lock::describe_owner(file, exclusive)
                .unwrap_or("another process held it a moment ago");
            let path = context.0.display();
            let message = format!(
                "{holder}, most likely another agent: stop that one or use another path \
                 (`fuser -v {path}` names it)"
            );
            Err(context.error(DeviceErrorKind::Reserved, message))
        }
        // Without locks there is no way to keep a second agent out.
        Err(e) => Err(context.io("locking it against other agents", &e)),
    }
}

fn file_facts(
    context: &Context<'_>,
    file: File,
    options: &OpenOptions,
    direct: bool,
) -> Result<Opened, DeviceError> {
    let len = file.metadata().map_err(|e| context.io("reading its size", &e))?.len();
    if let Some(size) = options.create_size
        && size != len
    {
        let message = format!(
            "it exists and has {len} bytes, not the {size} asked for: give its own size or none, \
             or remove it first if nothing in it is needed"
        );
        return Err(context.error(DeviceErrorKind::OutOfRange, message));
    }
    let capacity = whole_blocks(context, len)?;
    let (memory_align, offset_align) = if direct { direct_alignment(&file) } else { (1, 512) };
    let logical_block = checked_logical_block(context, offset_align)?;
    let discard = !options.read_only && punches_holes(&file, capacity);
    let caw = (!options.read_only).then_some(CawMethod::FileLock);
    let memory_align = memory_align as usize;
    let blocks_of_file_system = file.metadata().map_or(0, |metadata| metadata.blksize());
    let (discard_granularity, discard_alignment) = discard_pieces(blocks_of_file_system, 0);
    Ok(Opened {
        file,
        is_block_device: false,
        capacity,
        logical_block,
        memory_align,
        discard,
        discard_granularity,
        discard_alignment,
        caw,
    })
}

fn block_device_facts(
    context: &Context<'_>,
    file: File,
    options: &OpenOptions,
    metadata: &Metadata,
) -> Result<Opened, DeviceError> {
    let mut len = 0_u64;
    // SAFETY: the descriptor is a block device's and the kernel writes one u64.
    unsafe { blkgetsize64(file.as_raw_fd(), &mut len) }
        .map_err(|e| context.io("reading its size", &e.into()))?;
    let mut sector = 0;
    // SAFETY: as above, and the kernel writes one int.
    unsafe { blksszget(file.as_raw_fd(), &mut sector) }
        .map_err(|e| context.io("reading its logical block size", &e.into()))?;
    let capacity = whole_blocks(context, len)?;
    let logical_block = checked_logical_block(context, u32::try_from(sector).unwrap_or(0))?;
    let sysfs = SysfsBlock::of(metadata.rdev());
    let discard = !options.read_only && sysfs.queue_limit("write_zeroes_max_bytes") > 0;
    let caw = match options.read_only || !sysfs.is_whole_scsi_disk() {
        true => None,
        false => sgio::probe(&file, capacity, logical_block)
            .map_err(|e| context.error(e.kind, format!("trying compare-and-write: {}", e.message)))?
            .then_some(CawMethod::Scsi),
    };
    let memory_align = (direct_alignment(&file).0.max(logical_block)) as usize;
    let (discard_granularity, discard_alignment) =
        discard_pieces(sysfs.queue_limit("discard_granularity"), sysfs.own("discard_alignment"));
    Ok(Opened {
        file,
        is_block_device: true,
        capacity,
        logical_block,
        memory_align,
        discard,
        discard_granularity,
        discard_alignment,
        caw,
    })
}

/// Granularity and alignment in bytes as the store can use them: whole blocks.
fn discard_pieces(granularity: u64, alignment: u64) -> (u64, u64) {
    let block = BLOCK_SIZE as u64;
    if granularity <= block || !granularity.is_multiple_of(block) {
        return (block, 0);
    }
    let alignment = alignment % granularity;
    (granularity, if alignment.is_multiple_of(block) { alignment } else { 0 })
}

/// The length cut to whole blocks; a device without a single one is refused.
fn whole_blocks(context: &Context<'_>, len: u64) -> Result<u64, DeviceError> {
    let capacity = len - len % BLOCK_SIZE as u64;
    if capacity > 0 {
        return Ok(capacity);
    }
    let message = format!("it has only {len} bytes: it is empty or was truncated");
    Err(context.error(DeviceErrorKind::OutOfRange, message))
}

fn checked_logical_block(context: &Context<'_>, bytes: u32) -> Result<u32, DeviceError> {
    match bytes {
        1..=512 => Ok(512),
        4096 => Ok(4096),
        _ => {
            let message = format!("its logical blocks have {bytes} bytes; 512 or 4096 are needed");
            Err(context.error(DeviceErrorKind::Unsupported, message))
        }
    }
}

/// (memory, offset) alignment of direct I/O in bytes; cautious values if the kernel does not tell.
fn direct_alignment(file: &File) -> (u32, u32) {
    let mut buf = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH;
    // SAFETY: the path is an empty NUL-terminated string and `buf` has room for a statx.
    let result = unsafe {
        let (fd, mask) = (file.as_raw_fd(), libc::STATX_DIOALIGN);
        libc::statx(fd, c"".as_ptr(), flags, mask, buf.as_mut_ptr())
    };
    // SAFETY: all-zero bytes are a valid statx, and the kernel wrote valid ones over them.
    let found = unsafe { buf.assume_init() };
    let told = result == 0
        && found.stx_mask & libc::STATX_DIOALIGN != 0
        && found.stx_dio_offset_align != 0;
    if told {
        (found.stx_dio_mem_align.max(512), found.stx_dio_offset_align)
    } else {
        (BLOCK_SIZE as u32, 512)
    }
}

/// Tries a hole beyond the file's end, which changes nothing.
fn punches_holes(file: &File, capacity: u64) -> bool {
    let Ok(end) = libc::off_t::try_from(capacity + BLOCK_SIZE as u64) else { return false };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: plain system call on an open descriptor.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, end, BLOCK_SIZE as libc::off_t) == 0 }
}

/// A block device's folder below /sys/dev/block.
struct SysfsBlock(PathBuf);

impl SysfsBlock {
    fn of(rdev: u64) -> Self {
        let (major, minor) = (libc::major(rdev), libc::minor(rdev));
        Self(PathBuf::from(format!("/sys/dev/block/{major}:{minor}")))
    }

    /// A number of the request queue; a partition has its disk's. 0 if unknown.
    fn queue_limit(&self, name: &str) -> u64 {
        let own = self.0.join("queue").join(name);
        let parent = self.0.join("../queue").join(name);
        let text = std::fs::read_to_string(own).or_else(|_| std::fs::read_to_string(parent));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// A number of the device or partition itself; 0 if unknown.
    fn own(&self, name: &str) -> u64 {
        let text = std::fs::read_to_string(self.0.join(name));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// True for `sd` disks and multipath maps of them. A partition or a logical volume would pass a
    /// SCSI command on with its block address unchanged, that is to somewhere else on the disk.
    fn is_whole_scsi_disk(&self) -> bool {
        if let Ok(uuid) = std::fs::read_to_string(self.0.join("dm/uuid")) {
            return uuid.starts_with("mpath-");
        }
        let is_scsi = std::fs::canonicalize(self.0.join("device/subsystem"))
            .is_ok_and(|subsystem| subsystem.ends_with("scsi"));
        is_scsi && !self.0.join("partition").exists()
    }
}

/// Names the path in errors.
struct Context<'a>(&'a Path);

impl Context<'_> {
    fn error(&self, kind: DeviceErrorKind, message: String) -> DeviceError {
        let device = format!("file:{}", self.0.display());
        DeviceError { kind, device, operation: "open", offset: 0, len: 0, message }
    }

    fn io(&self, doing: &str, error: &io::Error) -> DeviceError {
        let kind = match error.kind() {
            io::ErrorKind::PermissionDenied => DeviceErrorKind::Unsupported,
            // The device node is there or will be, what is behind it is not.
            _ => super::errno::kind_of(error, false),
        };
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied => "; check its owner and mode",
            io::ErrorKind::ReadOnlyFilesystem => "; it can be opened to read only",
            _ => "",
        };
        self.error(kind, format!("{doing} failed: {error}{advice}"))
    }

    fn missing(&self, error: &io::Error) -> DeviceError {
        if error.kind() != io::ErrorKind::NotFound {
            return self.io("looking at it", error);
        }
        let in_dev = self.0.starts_with("/dev");
        // A LUN's node vanishes with its session and comes back with it.
        let (kind, advice) = if in_dev {
            let advice = "log in to its target (iscsiadm, multipath) or correct the path";
            (DeviceErrorKind::Unreachable, advice)
        } else {
            (DeviceErrorKind::Io, "correct the path, or give a size to create it")
        };
        self.error(kind, format!("it does not exist: {advice}"))
    }
}
