//! Local I/O under way: what each operation is for, and the memory that it uses.

use super::slab::Slab;
use super::uring::{Token, Uring};
use blockstore::buf::AlignedBuf;
use blockstore::types::BLOCK_SIZE;
use cache::disk::{OpId, Tag};
use cache::format::LegSet;
use cache::image::SegmentImage;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

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
    Bounce { tag: Tag, run: Run, leg: u8, buffer: AlignedBuf },
    /// Read of one block into a buffer of ours, to be judged by its checksum.
    Block { tag: Tag, read: BlockRead, buffer: AlignedBuf },
    /// Write of a block, read well from one leg, over the bad copy on `leg`.
    Repair { tag: Tag, read: BlockRead, leg: u8, buffer: AlignedBuf },
    /// Blocks that the store was, or will be, asked for.
    Fetch(Fetch),
    /// Nobody waits for it any more, but the kernel has not answered: keeps the memory that it uses.
    GivenUp(Box<Operation>),
}

impl Operation {
    /// The leg of the cache device that is to answer, if somebody waits for it and need not: what goes straight into guest
    /// memory was asked of the only leg there was.
    fn leg(&self) -> Option<u8> {
        match self {
            Self::Write { leg, .. }
            | Self::Flush { leg, .. }
            | Self::Bounce { leg, .. }
            | Self::Repair { leg, .. } => Some(*leg),
            Self::Block { read, .. } => Some(read.leg),
            Self::Direct { .. } | Self::Fetch(_) | Self::GivenUp(_) => None,
        }
    }
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
    /// Since when the operation at this index of the table is under way; of no meaning where there is none.
    since: Vec<Instant>,
    /// Operations that were given up and not answered.
    given_up: usize,
    /// Legs of the cache device that hold everything.
    pub readable: LegSet,
    spare: Vec<AlignedBuf>,
}

impl Io {
    pub(super) fn new(uring: Uring, readable: LegSet) -> Self {
        Self {
            uring,
            operations: Slab::new(),
            since: Vec::new(),
            given_up: 0,
            readable,
            spare: Vec::new(),
        }
    }

    /// Notes an operation; its index goes to the kernel.
    fn begin(&mut self, operation: Operation) -> u32 {
        let index = self.operations.insert(operation);
        let now = Instant::now();
        let at = index as usize;
        self.since.resize(self.since.len().max(at + 1), now);
        self.since[at] = now;
        index
    }

    /// Takes an operation that the kernel has answered out; none if nobody waits for it.
    pub(super) fn ended(&mut self, index: u32) -> Option<Operation> {
        match self.operations.remove(index) {
            Some(Operation::GivenUp(memory)) => {
                drop(memory);
                self.given_up -= 1;
                None
            }
            Some(operation) => Some(operation),
            None => {
                debug_assert!(false, "a completion of no operation");
                None
            }
        }
    }

    /// From now on nobody waits for the operation at `index`, whose memory is kept until the kernel answers.
    pub(super) fn give_up(&mut self, index: u32) {
        if let Some(operation) = self.operations.remove(index) {
            // The same place: the last that became free is the first to be used.
            let again = self.operations.insert(Operation::GivenUp(Box::new(operation)));
            assert_eq!(again, index, "the kernel names it by its place");
            self.given_up += 1;
        }
    }

    /// Operations of the cache device that somebody waits for: their index, leg and start.
    pub(super) fn under_way(&self) -> impl Iterator<Item = (u32, u8, Instant)> + '_ {
        self.operations.iter().filter_map(|(index, operation)| {
            Some((index, operation.leg()?, *self.since.get(index as usize)?))
        })
    }

    /// How many operations of the kernel somebody waits for.
    pub(super) fn awaited(&self) -> usize {
        self.uring.in_flight() - self.given_up
    }

    /// The kernel may still use memory of ours for operations that nobody waits for.
    pub(super) fn is_haunted(&self) -> bool {
        self.given_up > 0
    }

    /// Waits until the kernel has answered all that was not given up, dropping its answers.
    pub(super) fn drain(&mut self) {
        while self.awaited() > 0 && !self.uring.is_poisoned() {
            while let Some(completion) = self.uring.next() {
                if let Token::Operation(index) = completion.token {
                    drop(self.ended(index));
                }
            }
            if self.awaited() > 0 {
                self.uring.wait();
            }
        }
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
        let index = self.begin(operation);
        // SAFETY: the operation holds the image until its completion was taken, and the range of an action never
        // changes again.
        unsafe { self.uring.write(file, at, from, rest, index) }
    }

    /// Starts a flush of a leg.
    pub(super) fn flush(&mut self, op: OpId, leg: u8) {
        let index = self.begin(Operation::Flush { op, leg });
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
        let index = self.begin(Operation::Direct { tag, run, arena });
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

    /// Starts a read of `run` from a leg into a buffer of ours.
    pub(super) fn read_bounced(&mut self, tag: Tag, run: Run, leg: u8) {
        let len = run.blocks as usize * BLOCK_SIZE;
        let mut buffer =
            if run.blocks == 1 { self.block_buffer() } else { AlignedBuf::zeroed(len) };
        let into = buffer.as_mut_ptr();
        let index = self.begin(Operation::Bounce { tag, run, leg, buffer });
        let leg = usize::from(leg);
        // SAFETY: the operation holds the buffer, whose bytes do not move, until its completion was taken.
        unsafe { self.uring.read(leg, run.offset, into, len as u32, index) }
    }

    /// Starts a read of one block.
    pub(super) fn read_block(&mut self, tag: Tag, read: BlockRead, mut buffer: AlignedBuf) {
        let into = buffer.as_mut_ptr();
        let leg = usize::from(read.leg);
        let index = self.begin(Operation::Block { tag, read, buffer });
        // SAFETY: as in `read_bounced`.
        unsafe { self.uring.read(leg, read.offset, into, BLOCK_SIZE as u32, index) }
    }

    /// Starts to rewrite a block on a leg whose copy is bad. The block's segment must stay pinned until that is done.
    pub(super) fn repair(&mut self, tag: Tag, read: BlockRead, leg: u8, buffer: AlignedBuf) {
        let (from, file) = (buffer.as_ptr(), usize::from(leg));
        let index = self.begin(Operation::Repair { tag, read, leg, buffer });
        // SAFETY: the operation holds the buffer, unchanged, until its completion was taken.
        unsafe { self.uring.write(file, read.offset, from, BLOCK_SIZE as u32, index) }
    }
}
