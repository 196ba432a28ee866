//! One request to a file, cut into steps that the kernel can do, with the buffers it needs. Pure but
//! for the pointers it hands out.

use crate::buf::AlignedBuf;
use crate::types::SECTOR_SIZE;
use bytes::Bytes;
use io_uring::{opcode, squeue, types};
use std::io;

/// The kernel's limit on pieces of one gathering write (UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;
/// How often a request is repeated because the kernel was short of something for a moment.
const RETRIES_MAX: u32 = 1000;

/// A request with its progress.
pub(super) struct Request {
    what: What,
    /// Bytes dealt with.
    done: usize,
    retries: u32,
    /// What the gathering write in flight points to.
    iovecs: Vec<libc::iovec>,
}

enum What {
    Read { offset: u64, buf: AlignedBuf },
    Write { offset: u64, pieces: Vec<Bytes>, len: usize },
    Flush,
    Discard { offset: u64, len: u64 },
}

// SAFETY: the pointers in `iovecs` point into `pieces`, which move along with them and whose bytes
// stay where they are on the heap.
unsafe impl Send for Request {}

/// What follows from a completion.
#[derive(Debug)]
pub(super) enum Step {
    /// Submit [`Request::entry`] again.
    Again,
    Done,
    Failed(io::Error),
}

impl Request {
    fn new(what: What) -> Self {
        Self { what, done: 0, retries: 0, iovecs: Vec::new() }
    }

    pub(super) fn read(offset: u64, len: usize) -> Self {
        Self::new(What::Read { offset, buf: AlignedBuf::scratch(len) })
    }

    /// Pieces whose address is not a multiple of `align` are copied.
    pub(super) fn write(offset: u64, mut pieces: Vec<Bytes>, align: usize) -> Self {
        for piece in &mut pieces {
            if !(piece.as_ptr() as usize).is_multiple_of(align) {
                *piece = AlignedBuf::copy_of(piece).freeze();
            }
        }
        let len = pieces.iter().map(Bytes::len).sum();
        Self::new(What::Write { offset, pieces, len })
    }

    pub(super) fn flush() -> Self {
        Self::new(What::Flush)
    }

    pub(super) fn discard(offset: u64, len: u64) -> Self {
        Self::new(What::Discard { offset, len })
    }

    /// The next thing to ask of the kernel. It refers to memory of `self`, which must live and keep
    /// its content until the completion.
    pub(super) fn entry(&mut self, fd: types::Fd) -> squeue::Entry {
        let done = self.done;
        match &mut self.what {
            What::Read { offset, buf } => {
                let rest = &mut buf[done..];
                opcode::Read::new(fd, rest.as_mut_ptr(), rest.len() as u32)
                    .offset(*offset + done as u64)
                    .build()
            }
            What::Write { offset, pieces, .. } => {
                gather(pieces, done, &mut self.iovecs);
                let offset = *offset + done as u64;
                match &self.iovecs[..] {
                    [one] => opcode::Write::new(fd, one.iov_base.cast(), one.iov_len as u32)
                        .offset(offset)
                        .build(),
                    many => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                        .offset(offset)
                        .build(),
                }
            }
            What::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            What::Discard { offset, len } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
        }
    }

    /// Takes the kernel's answer to the last entry: a byte count or a negative errno.
    pub(super) fn advance(&mut self, result: i32) -> Step {
        if result < 0 {
            let errno = -result;
            let passing = matches!(errno, libc::EINTR | libc::EAGAIN);
            self.retries += 1;
            return match passing && self.retries <= RETRIES_MAX {
                true => Step::Again,
                false => Step::Failed(io::Error::from_raw_os_error(errno)),
            };
        }
        let (len, is_read) = match &self.what {
            What::Read { buf, .. } => (buf.len(), true),
            What::Write { len, .. } => (*len, false),
            What::Flush | What::Discard { .. } => return Step::Done,
        };
        let reached = self.done.saturating_add(result as usize);
        if reached >= len {
            return Step::Done;
        }
        // Direct I/O goes on at a sector; doing the broken one again does no harm.
        let reached = reached - reached % SECTOR_SIZE;
        if reached > self.done {
            self.done = reached;
            return Step::Again;
        }
        let message = if is_read {
            "the file ends before this: it was truncated while in use"
        } else {
            "the kernel accepts none of the data"
        };
        Step::Failed(io::Error::new(io::ErrorKind::UnexpectedEof, message))
    }

    pub(super) fn is_flush(&self) -> bool {
        matches!(self.what, What::Flush)
    }

    /// The data of a read; empty for anything else.
    pub(super) fn into_data(self) -> AlignedBuf {
        match self.what {
            What::Read { buf, .. } => buf,
            _ => AlignedBuf::zeroed(0),
        }
    }
}

/// Lists what lies behind the first `skip` bytes of `pieces`, as far as one write takes it.
fn gather(pieces: &[Bytes], mut skip: usize, iovecs: &mut Vec<libc::iovec>) {
    iovecs.clear();
    for piece in pieces {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        if iovecs.len() == IOVECS_MAX {
            return;
        }
        let rest = &piece[skip..];
        skip = 0;
        // The kernel only reads through this pointer.
        let iov_base = rest.as_ptr().cast_mut().cast();
        iovecs.push(libc::iovec { iov_base, iov_len: rest.len() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BLOCK_SIZE;

    fn block(byte: u8) -> Bytes {
        AlignedBuf::copy_of(&[byte; BLOCK_SIZE]).freeze()
    }

    fn lengths(request: &mut Request) -> Vec<usize> {
        request.entry(types::Fd(0));
        request.iovecs.iter().map(|iovec| iovec.iov_len).collect()
    }

    #[test]
    fn a_short_write_goes_on_at_the_sector_where_it_stopped() {
        let mut request = Request::write(0, vec![block(1), block(2)], 512);
        assert_eq!(lengths(&mut request), [4096, 4096]);
        assert!(matches!(request.advance(5000), Step::Again));
        assert_eq!(request.done, 4608);
        assert_eq!(lengths(&mut request), [3584]);
        assert!(matches!(request.advance(3584), Step::Done));
    }

    #[test]
    fn a_write_of_many_pieces_is_split() {
        let pieces = vec![block(1); IOVECS_MAX + 1];
        let mut request = Request::write(0, pieces, 512);
        assert_eq!(lengths(&mut request).len(), IOVECS_MAX);
        assert!(matches!(request.advance((IOVECS_MAX * BLOCK_SIZE) as i32), Step::Again));
        assert_eq!(lengths(&mut request), [4096]);
        assert!(matches!(request.advance(4096), Step::Done));
    }

    #[test]
    fn only_misaligned_pieces_are_copied() {
        let aligned = block(1);
        let misaligned = AlignedBuf::copy_of(&[2; 2 * BLOCK_SIZE]).freeze().slice(100..4196);
        let request = Request::write(0, vec![aligned.clone(), misaligned.clone()], 512);
        let What::Write { pieces, .. } = &request.what else { panic!("a write") };
        assert_eq!(pieces[0].as_ptr(), aligned.as_ptr());
        assert_ne!(pieces[1].as_ptr(), misaligned.as_ptr());
        assert_eq!(pieces[1], misaligned);
    }

    #[test]
    fn interruptions_are_repeated_and_a_request_that_gets_nowhere_ends() {
        let mut read = Request::read(0, BLOCK_SIZE);
        assert!(matches!(read.advance(-libc::EINTR), Step::Again));
        assert!(
            matches!(read.advance(0), Step::Failed(e) if e.kind() == io::ErrorKind::UnexpectedEof)
        );
        let mut write = Request::write(0, vec![block(1)], 512);
        assert!(matches!(write.advance(-libc::ENOSPC), Step::Failed(e)
            if e.raw_os_error() == Some(libc::ENOSPC)));
        for _ in 0..RETRIES_MAX {
            write.advance(-libc::EAGAIN);
        }
        assert!(matches!(write.advance(-libc::EAGAIN), Step::Failed(_)));
    }
}
