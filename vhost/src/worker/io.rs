//! Local I/O under way: what each operation is for, and the memory that it uses.

use super::slab::Slab;
use super::uring::Uring;
use blockstore::buf::AlignedBuf;
use blockstore::types::BLOCK_SIZE;
use cache::disk::{OpId, Tag};
use cache::format::LegSet;
use cache::image::SegmentImage;
use std::ops::Range;
use std::sync::Arc;

/// Block buffers kept for reuse.
const SPARE_BLOCKS_MAX: usize = 64;

/// What an operation of the ring, or a fetch, is for.
#[derive(Debug)]
pub(super) enum Operation {
    /// Write of the disk's log; `done` bytes of it are on the device.
    Write {
        op: OpId,
        leg: u8,
        offset: u64,
        image: Arc<SegmentImage>,
        start: usize,
        len: usize,
        done: usize,
    },
    /// Flush of a leg.
    Flush { op: OpId, leg: u8 },
    /// Read of whole blocks straight into guest memory: the buffers in `arena` of the request's read state.
    Direct { tag: Tag, run: Run, arena: Range<u32> },
    /// Read of whole blocks into a buffer of ours.
    Bounce { tag: Tag, run: Run, buffer: AlignedBuf },
    /// Read of one block into a buffer of ours, to be judged by its checksum.
    Block { tag: Tag, read: BlockRead, buffer: AlignedBuf },
    /// Write of a block, read well from one leg, over the bad copy on `leg`.
    Repair { tag: Tag, read: BlockRead, leg: u8, buffer: AlignedBuf },
    /// Blocks that the store was, or will be, asked for.
    Fetch(Fetch),
}

/// Blocks of a read's plan that lie together on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// First block, counted from the plan's first.
    pub block: u32,
    pub blocks: u32,
    /// Byte on the device.
    pub offset: u64,
}

/// A block read on its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockRead {
    /// Counted from the plan's first.
    pub block: u32,
    pub offset: u64,
    pub crc: u32,
    pub leg: u8,
    /// Legs that were read and had no good copy.
    pub bad: LegSet,
    /// The block is part `.1` of patched block `.0` of the read; otherwise it goes to the guest.
    pub part: Option<(u16, u16)>,
}

/// Blocks wanted from the store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fetch {
    pub tag: Tag,
    /// First block of the disk.
    pub lba: blockstore::types::Lba,
    /// First block, counted from the plan's first.
    pub block: u32,
    pub blocks: u32,
    /// For `Disk::fill`.
    pub ticket: u64,
    /// It is the base of this patched block of the read.
    pub patch: Option<u16>,
    /// The store does not have it, and no leg of the cache gave it.
    pub unreadable: bool,
}

/// The worker's means of local I/O.
#[derive(Debug)]
pub(super) struct Io {
    pub uring: Uring,
    pub operations: Slab<Operation>,
    /// Legs of the cache device that hold everything.
    pub readable: LegSet,
    spare: Vec<AlignedBuf>,
}

impl Io {
    pub(super) fn new(uring: Uring, readable: LegSet) -> Self {
        Self { uring, operations: Slab::new(), readable, spare: Vec::new() }
    }

    /// The leg that reads go to.
    pub(super) fn first_leg(&self) -> u8 {
        self.readable.iter().next().unwrap_or(0)
    }

    /// A buffer of one block with any content.
    pub(super) fn block_buffer(&mut self) -> AlignedBuf {
        self.spare.pop().unwrap_or_else(|| AlignedBuf::zeroed(BLOCK_SIZE))
    }

    /// Takes a buffer back.
    pub(super) fn recycle(&mut self, buffer: AlignedBuf) {
        if buffer.len() == BLOCK_SIZE && self.spare.len() < SPARE_BLOCKS_MAX {
            self.spare.push(buffer);
        }
    }

    /// Starts (or goes on with) a write of the disk's log.
    pub(super) fn write(&mut self, operation: Operation) {
        let Operation::Write { leg, offset, image, start, len, done, .. } = &operation else {
            unreachable!("only writes are written");
        };
        let (file, at) = (usize::from(*leg), offset + *done as u64);
        let from = image.as_ptr(start + done, len - done);
        let rest = (len - done) as u32;
        let index = self.operations.insert(operation);
        // SAFETY: the operation holds the image until its completion was taken, and the range of an action never
        // changes again.
        unsafe { self.uring.write(file, at, from, rest, index) }
    }

    /// Starts a flush of a leg.
    pub(super) fn flush(&mut self, op: OpId, leg: u8) {
        let index = self.operations.insert(Operation::Flush { op, leg });
        self.uring.flush(usize::from(leg), index);
    }

    /// Starts a read of `run` into guest memory: `buffers` are the entries `arena` of the request's read state.
    ///
    /// # Safety
    /// The buffers must stay mapped, and their list unchanged, until the completion was taken.
    pub(super) unsafe fn read_direct(
        &mut self,
        tag: Tag,
        run: Run,
        arena: Range<u32>,
        buffers: &[libc::iovec],
    ) {
        let leg = usize::from(self.first_leg());
        let index = self.operations.insert(Operation::Direct { tag, run, arena });
        // SAFETY: the caller's promise.
        unsafe {
            if let [only] = buffers {
                let (into, len) = (only.iov_base.cast(), only.iov_len as u32);
                self.uring.read(leg, run.offset, into, len, index);
            } else {
                self.uring.read_vectored(leg, run.offset, buffers, index);
            }
        }
    }

    /// Starts a read of `run` into a buffer of ours.
    pub(super) fn read_bounced(&mut self, tag: Tag, run: Run) {
        let len = run.blocks as usize * BLOCK_SIZE;
        let mut buffer =
            if run.blocks == 1 { self.block_buffer() } else { AlignedBuf::zeroed(len) };
        let (into, leg) = (buffer.as_mut_ptr(), usize::from(self.first_leg()));
        let index = self.operations.insert(Operation::Bounce { tag, run, buffer });
        // SAFETY: the operation holds the buffer, whose bytes do not move, until its completion was taken.
        unsafe { self.uring.read(leg, run.offset, into, len as u32, index) }
    }

    /// Starts a read of one block.
    pub(super) fn read_block(&mut self, tag: Tag, read: BlockRead, mut buffer: AlignedBuf) {
        let into = buffer.as_mut_ptr();
        let leg = usize::from(read.leg);
        let index = self.operations.insert(Operation::Block { tag, read, buffer });
        // SAFETY: as in `read_bounced`.
        unsafe { self.uring.read(leg, read.offset, into, BLOCK_SIZE as u32, index) }
    }

    /// Starts to rewrite a block on a leg whose copy is bad. The block's segment must stay pinned until that is done.
    pub(super) fn repair(&mut self, tag: Tag, read: BlockRead, leg: u8, buffer: AlignedBuf) {
        let (from, file) = (buffer.as_ptr(), usize::from(leg));
        let index = self.operations.insert(Operation::Repair { tag, read, leg, buffer });
        // SAFETY: the operation holds the buffer, unchanged, until its completion was taken.
        unsafe { self.uring.write(file, read.offset, from, BLOCK_SIZE as u32, index) }
    }
}
