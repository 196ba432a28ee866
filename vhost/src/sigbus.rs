//! Survival of shared memory that is pulled away.
//!
//! A front end can shorten the file behind a region that we have mapped. Touching what is gone raises SIGBUS, which would
//! end this process and with it every other guest's disk. So each mapping of foreign memory is registered here, and a
//! fault inside one is answered by putting zeroed memory of our own in place of the page: that guest's rings and data turn
//! to zeros, which is its front end's doing, and everyone else goes on. A fault anywhere else takes the course that it
//! took before.
//!
//! The handler uses atomics and system calls only. The table is bounded; a mapping that finds no place in it is refused.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

/// Mappings of foreign memory at a time, over all disks.
const RANGES_MAX: usize = 8192;
/// Page sizes that a mapping may have, smallest first.
const PAGES: [usize; 3] = [4 << 10, 2 << 20, 1 << 30];

struct Range {
    /// 0: free.
    start: AtomicUsize,
    end: AtomicUsize,
}

static RANGES: [Range; RANGES_MAX] =
    [const { Range { start: AtomicUsize::new(0), end: AtomicUsize::new(0) } }; RANGES_MAX];
/// One past the last place ever used.
static USED: AtomicUsize = AtomicUsize::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);
/// Serialises changes of the table.
static CHANGE: Mutex<()> = Mutex::new(());
static FORMER: OnceLock<libc::sigaction> = OnceLock::new();

/// A registered mapping; must go before the mapping itself does.
#[derive(Debug)]
pub(crate) struct Guard {
    place: usize,
}

impl Guard {
    /// Registers `len` bytes at `start`.
    pub(crate) fn new(start: *const u8, len: usize) -> io::Result<Self> {
        let _change = CHANGE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        install()?;
        let free = |range: &&Range| range.start.load(Ordering::Relaxed) == 0;
        let place = RANGES.iter().position(|range| free(&range)).ok_or_else(|| {
            io::Error::other(format!("more than {RANGES_MAX} mappings of shared memory"))
        })?;
        RANGES[place].end.store(start.addr() + len, Ordering::Relaxed);
        RANGES[place].start.store(start.addr(), Ordering::Release);
        USED.fetch_max(place + 1, Ordering::Release);
        Ok(Self { place })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _change = CHANGE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        RANGES[self.place].start.store(0, Ordering::Release);
    }
}

/// How often memory was found to be gone, in this process so far.
pub(crate) fn faults() -> u64 {
    FAULTS.load(Ordering::Relaxed)
}

fn install() -> io::Result<()> {
    if FORMER.get().is_some() {
        return Ok(());
    }
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut former: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    ours.sa_sigaction = handler as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both structures are valid; the handler keeps to what is safe in one. The former action is stored before
    // any mapping is registered, so that the handler finds it.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut former) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let _ = FORMER.set(former);
    Ok(())
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo.
    let address = unsafe { (*info).si_addr() }.addr();
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    let used = USED.load(Ordering::Acquire);
    let hit = RANGES[..used].iter().find_map(|range| {
        let start = range.start.load(Ordering::Acquire);
        let end = range.end.load(Ordering::Relaxed);
        (start != 0 && start <= address && address < end).then_some((start, end))
    });
    if hit.is_some_and(|(start, end)| replace(address, start, end)) {
        FAULTS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        return;
    }
    // Not ours: the access faults again, and the former action deals with it.
    // SAFETY: all-zero bytes are a valid sigaction: the default action.
    let default: libc::sigaction = unsafe { std::mem::zeroed() };
    let former = FORMER.get().unwrap_or(&default);
    // SAFETY: a valid structure that came from sigaction.
    unsafe { libc::sigaction(libc::SIGBUS, std::ptr::from_ref(former), std::ptr::null_mut()) };
}

/// Puts memory of our own in place of the page around `address`, whatever its size.
fn replace(address: usize, start: usize, end: usize) -> bool {
    PAGES.iter().any(|page| {
        let at = address & !(page - 1);
        let inside = at >= start && at < end.next_multiple_of(*page);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the page belongs to a registered mapping, which nothing but raw pointers reaches into; a page size that
        // is not the mapping's is refused by the kernel.
        inside
            && unsafe {
                libc::mmap(at as *mut libc::c_void, *page, protection, flags, -1, 0)
                    != libc::MAP_FAILED
            }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn memory_that_is_pulled_away_reads_as_zeros() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * 4096).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of a file of that length.
        let base = unsafe {
            let fd = file.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), 3 * 4096, protection, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        let bytes = base.cast::<u8>();
        let guard = Guard::new(bytes, 3 * 4096).unwrap();
        // SAFETY: inside the mapping.
        unsafe { bytes.write_bytes(7, 3 * 4096) };
        file.set_len(4096).unwrap();
        let before = faults();
        // SAFETY: inside the mapping; what is gone is replaced.
        unsafe {
            assert_eq!((bytes.read_volatile(), bytes.add(4096).read_volatile()), (7, 0));
            bytes.add(8191).write_volatile(1);
            bytes.add(8192).write_volatile(1);
        }
        assert!(faults() >= before + 2);
        drop(guard);
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(base, 3 * 4096) };
    }
}
