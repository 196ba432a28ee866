//! The worker's io_uring: the one place where it waits, and its only way to the cache device.
//!
//! Wake-ups are multishot polls inside the ring: on each queue's kick eventfd, on the link's and on the worker's own.
//! Each write to an eventfd posts a completion even while its counter is above zero, so the counters are never read.

use cache::format::legs::LEGS_MAX;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::io;
use std::os::fd::RawFd;

/// Submission queue entries; more are submitted in between.
const SQ_ENTRIES: u32 = 256;
/// Completion queue entries; the kernel keeps what does not fit.
const CQ_ENTRIES: u32 = 2048;

/// Queued entries that are worth a system call of their own while more are prepared.
const EARLY: usize = 4;

/// What a completion belongs to; travels through the kernel as 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A read, write or flush of the cache device: index of its entry in the operations' table.
    Operation(u32),
    /// The kick eventfd of a queue; `arming` tells polls of the same queue apart.
    Kick { queue: u16, arming: u32 },
    /// The link's eventfd.
    Link,
    /// The worker's eventfd: control messages.
    Control,
    /// Nobody waits for this one.
    Nobody,
}

impl Token {
    const KIND: u32 = 56;

    fn pack(self) -> u64 {
        match self {
            Self::Operation(index) => u64::from(index),
            Self::Kick { queue, arming } => {
                1 << Self::KIND | u64::from(queue) << 32 | u64::from(arming)
            }
            Self::Link => 2 << Self::KIND,
            Self::Control => 3 << Self::KIND,
            Self::Nobody => 4 << Self::KIND,
        }
    }

    fn unpack(data: u64) -> Self {
        let low = (data & u64::from(u32::MAX)) as u32;
        match data >> Self::KIND {
            0 => Self::Operation(low),
            1 => Self::Kick { queue: (data >> 32) as u16, arming: low },
            2 => Self::Link,
            3 => Self::Control,
            _ => Self::Nobody,
        }
    }
}

/// A completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub token: Token,
    /// Bytes, or a negated errno.
    pub result: i32,
    /// The poll goes on.
    pub more: bool,
}

/// The ring. Must be used by the thread that made it.
pub(super) struct Uring {
    ring: IoUring,
    /// Files are registered and go by index.
    registered: bool,
    files: Vec<RawFd>,
    /// Operations submitted or queued whose completion was not taken yet; polls do not count.
    in_flight: usize,
    poisoned: bool,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Uring({} in flight)", self.in_flight)
    }
}

impl Uring {
    /// A ring for I/O on `files`, in the best mode that this kernel has.
    pub(super) fn new(files: &[RawFd]) -> io::Result<Self> {
        let ring = build(|builder| {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        })
        .or_else(|_| {
            build(|builder| {
                builder.setup_coop_taskrun().setup_taskrun_flag();
            })
        })
        .or_else(|_| build(|_| ()))?;
        let mut files = files.to_vec();
        if let Some(last) = files.last().copied() {
            // Places for legs that join later, which nothing refers to before.
            files.resize(files.len().max(LEGS_MAX), last);
        }
        let registered = !files.is_empty() && ring.submitter().register_files(&files).is_ok();
        Ok(Self { ring, registered, files, in_flight: 0, poisoned: false })
    }

    /// Another file takes this place. What was submitted goes on with the former, which the kernel keeps until then.
    ///
    /// # Errors
    /// The kernel's, or there is no such place: the former file stays.
    pub(super) fn set_file(&mut self, file: usize, fd: RawFd) -> io::Result<()> {
        let place = self.files.get_mut(file).ok_or(io::ErrorKind::InvalidInput)?;
        if self.registered {
            self.ring.submitter().register_files_update(file as u32, &[fd])?;
        }
        *place = fd;
        Ok(())
    }

    /// Operations whose completion was not taken yet.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Reads into `len` bytes at `into` from byte `offset` of file `file`.
    ///
    /// # Safety
    /// The memory must stay mapped until the completion was taken, and nobody may rely on its content meanwhile.
    pub(super) unsafe fn read(
        &mut self,
        file: usize,
        offset: u64,
        into: *mut u8,
        len: u32,
        index: u32,
    ) {
        let entry = if self.registered {
            opcode::Read::new(types::Fixed(file as u32), into, len).offset(offset).build()
        } else {
            opcode::Read::new(types::Fd(self.files[file]), into, len).offset(offset).build()
        };
        // SAFETY: the caller keeps the memory.
        unsafe { self.start(entry, index) }
    }

    /// Reads into the buffers `into` from byte `offset` of file `file`.
    ///
    /// # Safety
    /// As [`Self::read`]; the list itself must stay unchanged as well.
    pub(super) unsafe fn read_vectored(
        &mut self,
        file: usize,
        offset: u64,
        into: &[libc::iovec],
        index: u32,
    ) {
        let (list, count) = (into.as_ptr(), into.len() as u32);
        let entry = if self.registered {
            opcode::Readv::new(types::Fixed(file as u32), list, count).offset(offset).build()
        } else {
            opcode::Readv::new(types::Fd(self.files[file]), list, count).offset(offset).build()
        };
        // SAFETY: the caller keeps the memory and the list.
        unsafe { self.start(entry, index) }
    }

    /// Writes `len` bytes at `from` to byte `offset` of file `file`.
    ///
    /// # Safety
    /// The memory must stay mapped and unchanged until the completion was taken.
    pub(super) unsafe fn write(
        &mut self,
        file: usize,
        offset: u64,
        from: *const u8,
        len: u32,
        index: u32,
    ) {
        let entry = if self.registered {
            opcode::Write::new(types::Fixed(file as u32), from, len).offset(offset).build()
        } else {
            opcode::Write::new(types::Fd(self.files[file]), from, len).offset(offset).build()
        };
        // SAFETY: the caller keeps the memory.
        unsafe { self.start(entry, index) }
    }

    /// fdatasync of file `file`.
    pub(super) fn flush(&mut self, file: usize, index: u32) {
        let flags = types::FsyncFlags::DATASYNC;
        let entry = if self.registered {
            opcode::Fsync::new(types::Fixed(file as u32)).flags(flags).build()
        } else {
            opcode::Fsync::new(types::Fd(self.files[file])).flags(flags).build()
        };
        // SAFETY: no memory is involved.
        unsafe { self.start(entry, index) }
    }

    /// Reports `fd` becoming readable, from now on, each time; at once if it is readable already.
    pub(super) fn poll(&mut self, fd: RawFd, token: Token) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        // SAFETY: no memory is involved; the kernel holds the file until the poll ends.
        unsafe { self.push(entry.user_data(token.pack())) }
    }

    /// Ends a poll; its last completion reports an error.
    pub(super) fn stop_poll(&mut self, token: Token) {
        let entry = opcode::PollRemove::new(token.pack()).build();
        // SAFETY: no memory is involved.
        unsafe { self.push(entry.user_data(Token::Nobody.pack())) }
    }

    /// # Safety
    /// As the operation demands.
    unsafe fn start(&mut self, entry: squeue::Entry, index: u32) {
        self.in_flight += 1;
        // SAFETY: the caller's promise.
        unsafe { self.push(entry.user_data(Token::Operation(index).pack())) }
    }

    /// # Safety
    /// As the operation demands.
    unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller's promise covers the memory that the entry names.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.enter(0);
        }
    }

    /// Submits what is queued; lets the kernel do deferred work if there is any.
    pub(super) fn submit(&mut self) {
        let (queued, work) = {
            let queue = self.ring.submission();
            (!queue.is_empty(), queue.taskrun() || queue.cq_overflow())
        };
        if queued || work {
            self.enter(0);
        }
    }

    /// Submits a first few entries, so that the device works on them while the rest is prepared.
    pub(super) fn submit_early(&mut self) {
        if self.ring.submission().len() >= EARLY {
            self.enter(0);
        }
    }

    /// Submits what is queued and waits for a completion.
    pub(super) fn wait(&mut self) {
        self.enter(1);
    }

    fn enter(&mut self, want: usize) {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // A signal, or the completion queue is full: the caller takes completions and comes again.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME)
                ) => {}
            Err(error) => {
                // The arguments are fixed, so the kernel has no reason; there is no way to go on without the ring.
                self.poisoned = true;
                panic!("io_uring_enter failed: {error}");
            }
        }
    }

    /// The next completion that is there.
    pub(super) fn next(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        let token = Token::unpack(entry.user_data());
        if matches!(token, Token::Operation(_)) {
            self.in_flight -= 1;
        }
        Some(Completion { token, result: entry.result(), more: cqueue::more(entry.flags()) })
    }

    /// Completions were posted or can be had without waiting.
    pub(super) fn is_ready(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    /// The ring cannot be entered any more.
    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned
    }
}

fn build(options: impl Fn(&mut io_uring::Builder)) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(CQ_ENTRIES).setup_submit_all();
    options(&mut builder);
    builder.build(SQ_ENTRIES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Operation(0),
            Token::Operation(u32::MAX),
            Token::Kick { queue: 513, arming: u32::MAX },
            Token::Link,
            Token::Control,
            Token::Nobody,
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }

    #[test]
    fn every_write_to_a_polled_eventfd_wakes_although_it_is_never_read() {
        let event = EventFd::new(0).unwrap();
        event.write(1).unwrap();
        let mut uring = Uring::new(&[]).unwrap();
        uring.poll(event.as_raw_fd(), Token::Link);
        for _ in 0..3 {
            uring.wait();
            let completion = uring.next().expect("woken");
            assert_eq!((completion.token, completion.more), (Token::Link, true));
            assert!(uring.next().is_none());
            event.write(1).unwrap();
        }
        uring.stop_poll(Token::Link);
        while uring.next().is_none_or(|completion| completion.more) {
            uring.wait();
        }
    }

    #[test]
    fn a_file_takes_the_place_of_another_or_a_place_of_its_own() {
        let files = [(); 3].map(|()| tempfile::tempfile().unwrap());
        let mut uring = Uring::new(&[files[0].as_raw_fd()]).unwrap();
        uring.set_file(1, files[1].as_raw_fd()).unwrap();
        let data = [7u8; 10];
        for (index, place) in [(0, 0), (1, 1), (2, 0)] {
            // SAFETY: the buffer outlives the operation, which is waited for.
            unsafe { uring.write(place, 0, data.as_ptr(), 10, index) }
            uring.submit();
            uring.set_file(place, files[2].as_raw_fd()).unwrap();
        }
        while uring.in_flight() > 0 {
            uring.wait();
            while uring.next().is_some() {}
        }
        assert_eq!(files.map(|file| file.metadata().unwrap().len()), [10, 10, 10]);
        assert!(uring.set_file(LEGS_MAX, 0).is_err());
    }

    #[test]
    fn data_goes_to_and_from_files_by_their_place_in_the_list() {
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let mut uring = Uring::new(&fds).unwrap();
        let data = [7u8; 100];
        let mut back = [0u8; 60];
        files[1].write_at(&data, 0).unwrap();
        // SAFETY: both buffers outlive the operations, which are waited for below.
        unsafe {
            uring.write(0, 10, data.as_ptr(), 100, 4);
            uring.read(1, 50, back.as_mut_ptr(), 60, 5);
        }
        uring.flush(0, 6);
        let mut results = vec![];
        while results.len() < 3 {
            uring.wait();
            while let Some(completion) = uring.next() {
                results.push((completion.token, completion.result));
            }
        }
        results.sort_by_key(|(token, _)| token.pack());
        let operation = |index, result| (Token::Operation(index), result);
        assert_eq!(results, [operation(4, 100), operation(5, 50), operation(6, 0)]);
        assert_eq!((files[0].metadata().unwrap().len(), back[49], back[50]), (110, 7, 0));
        assert_eq!(uring.in_flight(), 0);
    }
}
