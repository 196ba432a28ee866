//! Serving a read: plan a span of it, bring its pieces together, check every block, go on with the next span.
//!
//! A span is at most [`SPAN_DIRECT`] bytes of the request, [`SPAN_BOUNCED`] where the guest's buffers are too oddly
//! placed for the device to read into them, [`SPAN_MIRRORED`] where the cache is mirrored (see `legs.rs`). Blocks on a cache of
//! one leg are read straight into guest memory where whole blocks and buffers allow, and checked there. A block that fails (checksum or I/O error) is read again into memory of
//! ours and judged by that (rule L9), from each leg in turn; only then is it called bad. What one leg has and another
//! has not is rewritten there, while the pin keeps its place from being used anew. What the disk says can be had from the
//! store is planned again as a span of its own.
//!
//! Patches are copied when the span is planned or as they arrive, and laid over their base whenever that arrives, be it
//! from the store hours later (rule L7). Pins are given back as soon as the span's local I/O is finished, whether or
//! not the store has answered.

use super::io::{BlockRead, Fetch, Io, Run};
use super::slots::Slot;
use crate::memory::Cursor;
use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::types::{BLOCK_SIZE, Lba, SECTOR_SIZE};
use bytes::Bytes;
use cache::disk::plan::{BlockSource, PatchedBlock, Piece, ReadPlan};
use cache::disk::{BadBlock, Disk, Tag};
use cache::format::LegSet;
use libc::iovec;
use smallvec::SmallVec;
use std::ops::Range;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Bytes of a span read straight into guest memory.
const SPAN_DIRECT: u64 = 1 << 20;
/// Bytes of a span read from a mirrored cache, into buffers of ours: a leg that hangs must not write to guest memory later.
const SPAN_MIRRORED: u64 = 1 << 18;
/// Bytes of a span that needs buffers of ours; times the requests under way, this bounds them.
const SPAN_BOUNCED: u64 = 1 << 16;
/// What the kernel asks of a buffer's address and length at most, short of a whole block.
const DIRECT_ALIGN: usize = SECTOR_SIZE;
/// Spans that may be planned again for each block of a request before it is given up: a bound, never met in practice.
const REPLANS_PER_BLOCK: u64 = 4;

/// How far a read has come. All byte positions are positions on the disk.
#[derive(Debug, Default)]
pub(super) struct ReadState {
    plan: ReadPlan,
    /// `Disk::fill_ticket` when the span was planned.
    ticket: u64,
    /// The plan's pins are still held.
    pinned: bool,
    /// The span being served.
    span: Range<u64>,
    /// What follows it.
    rest: Range<u64>,
    /// Ranges to plan again.
    again: Vec<Range<u64>>,
    replans: u64,
    /// Operations on the cache device under way.
    pub local: u32,
    /// Fetches from the store under way or waiting.
    pub remote: u32,
    /// The request will end with an I/O error.
    failed: bool,
    /// Guest buffers can be read into directly.
    aligned: bool,
    /// They are, in this span: the cache is not mirrored.
    direct: bool,
    /// Parts of the guest's buffers, for direct reads.
    arena: Vec<iovec>,
    patches: Vec<Patch>,
}

/// A patched block whose parts are being gathered.
#[derive(Debug)]
struct Patch {
    block: u32,
    patched: Box<PatchedBlock>,
    /// Content of the base and of each overlay that must be read first.
    parts: Vec<Option<AlignedBuf>>,
    missing: u32,
}

/// Runs to be read straight into guest memory, and their buffers in the arena.
type DirectRuns = SmallVec<[(Run, Range<u32>); 4]>;

/// What a read needs around it.
pub(super) struct Context<'a> {
    pub disk: &'a mut Disk,
    pub io: &'a mut Io,
    /// Fetches to be sent.
    pub fetches: &'a mut Vec<Fetch>,
}

/// Starts the read in `slot`. True when it is finished.
pub(super) fn start(slot: &mut Slot, tag: Tag, context: &mut Context<'_>) -> bool {
    let begin = slot.request.sector * SECTOR_SIZE as u64;
    let read = &mut slot.read;
    read.rest = begin..begin + slot.request.len as u64;
    read.span = begin..begin;
    read.again.clear();
    read.replans = 0;
    read.failed = false;
    read.aligned = slot.request.data.iter().all(|buffer| {
        buffer.iov_base.addr().is_multiple_of(DIRECT_ALIGN)
            && buffer.iov_len.is_multiple_of(DIRECT_ALIGN)
    });
    advance(slot, tag, context)
}

/// Goes on after something arrived. True when the request is finished; its status is in the slot.
pub(super) fn advance(slot: &mut Slot, tag: Tag, context: &mut Context<'_>) -> bool {
    loop {
        let read = &mut slot.read;
        if read.local == 0 && read.pinned {
            context.disk.release(&mut read.plan);
            read.pinned = false;
        }
        if read.local > 0 || (read.remote > 0 && !slot.orphan) {
            return false;
        }
        read.patches.clear();
        if read.failed {
            slot.status = crate::request::STATUS_IOERR;
        }
        if slot.orphan || read.failed {
            return true;
        }
        // A leg may have joined since the span before.
        read.direct = read.aligned && context.disk.written_legs().len() < 2;
        let Some(span) = next_span(read) else { return true };
        plan_span(slot, tag, span, context);
    }
}

fn next_span(read: &mut ReadState) -> Option<Range<u64>> {
    if let Some(span) = read.again.pop() {
        return Some(span);
    }
    if read.rest.is_empty() {
        return None;
    }
    let most = match (read.aligned, read.direct) {
        (true, true) => SPAN_DIRECT,
        (true, false) => SPAN_MIRRORED,
        (false, _) => SPAN_BOUNCED,
    };
    let full = (read.rest.start + most) / BLOCK * BLOCK;
    let end = read.rest.end.min(full);
    let span = read.rest.start..end;
    read.rest.start = end;
    Some(span)
}

/// Plans a span, copies what is in memory and starts I/O for the rest.
fn plan_span(slot: &mut Slot, tag: Tag, span: Range<u64>, context: &mut Context<'_>) {
    let sector = span.start / SECTOR_SIZE as u64;
    let sectors = (span.end - span.start) / SECTOR_SIZE as u64;
    let read = &mut slot.read;
    read.span = span;
    read.ticket = context.disk.fill_ticket();
    read.arena.clear();
    context.disk.read(sector, sectors, &mut read.plan);
    read.pinned = true;
    // Taken out so that segment images are let go of as soon as they were copied.
    let pieces = std::mem::take(&mut read.plan.pieces);
    let mut direct = DirectRuns::new();
    for piece in pieces {
        match piece {
            Piece::Local { block, blocks, offset } => {
                local_piece(slot, tag, Run { block, blocks, offset }, &mut direct, context.io);
            }
            Piece::Memory { block, blocks, image, start } => {
                deliver(slot, block, image.bytes(start, blocks as usize * BLOCK_SIZE));
            }
            Piece::Zero { block, blocks } => deliver_zeros(slot, block, blocks),
            Piece::Miss { block, blocks } => fetch(slot, tag, block, blocks, None, context),
            Piece::Patched { block, patched } => patched_piece(slot, tag, block, patched, context),
        }
    }
    // The arena is complete: its entries stay where they are from here on.
    for (run, arena) in direct {
        slot.read.local += 1;
        let buffers = &slot.read.arena[as_usize(&arena)];
        // SAFETY: the slot holds the guest's memory map, and its arena is not touched before its operations are done.
        unsafe { context.io.read_direct(tag, run, arena, buffers) }
    }
}

/// Splits a run of blocks on the device into what can be read straight into guest memory and what cannot.
fn local_piece(slot: &mut Slot, tag: Tag, run: Run, direct: &mut DirectRuns, io: &mut Io) {
    let wanted = wanted(&slot.read, run.block, run.blocks);
    let whole_from = wanted.start.next_multiple_of(BLOCK);
    let whole_to = wanted.end / BLOCK * BLOCK;
    if !slot.read.direct || whole_from >= whole_to {
        slot.read.local += 1;
        io.read_bounced(tag, run, io.first_leg());
        return;
    }
    let origin = position(&slot.read, run.block);
    let part = |from: u64, to: u64| {
        let skipped = ((from - origin) / BLOCK) as u32;
        let offset = run.offset + u64::from(skipped) * BLOCK;
        Run { block: run.block + skipped, blocks: ((to - from) / BLOCK) as u32, offset }
    };
    if wanted.start < whole_from {
        slot.read.local += 1;
        io.read_bounced(tag, part(whole_from - BLOCK, whole_from), io.first_leg());
    }
    if whole_to < wanted.end {
        slot.read.local += 1;
        io.read_bounced(tag, part(whole_to, whole_to + BLOCK), io.first_leg());
    }
    let mut cursor = Cursor::new(&slot.request.data, guest_offset(slot, whole_from));
    let mut left = (whole_to - whole_from) as usize;
    let first = slot.read.arena.len() as u32;
    while let Some((ptr, len)) = cursor.take(left).filter(|_| left > 0) {
        slot.read.arena.push(iovec { iov_base: ptr.cast(), iov_len: len });
        left -= len;
    }
    direct.push((part(whole_from, whole_to), first..slot.read.arena.len() as u32));
}

fn patched_piece(
    slot: &mut Slot,
    tag: Tag,
    block: u32,
    patched: Box<PatchedBlock>,
    context: &mut Context<'_>,
) {
    let index = slot.read.patches.len() as u16;
    let overlays = patched.overlays.iter().map(|overlay| overlay.source.clone());
    let sources: Vec<BlockSource> = [patched.base.clone()].into_iter().chain(overlays).collect();
    let parts = sources.iter().map(|_| None).collect();
    slot.read.patches.push(Patch { block, patched, parts, missing: 0 });
    for (part, source) in (0u16..).zip(&sources) {
        match source {
            BlockSource::Local { offset, crc } => {
                let (offset, crc) = (*offset, *crc);
                let (leg, bad) = (context.io.first_leg(), LegSet::NONE);
                let read = BlockRead { block, offset, crc, leg, bad, part: Some((index, part)) };
                slot.read.patches[usize::from(index)].missing += 1;
                slot.read.local += 1;
                let buffer = context.io.block_buffer();
                context.io.read_block(tag, read, buffer);
            }
            BlockSource::Miss => {
                slot.read.patches[usize::from(index)].missing += 1;
                fetch(slot, tag, block, 1, Some(index), context);
            }
            BlockSource::Memory { .. } | BlockSource::Zero => {}
        }
    }
    assemble(slot, index, context.io);
}

fn fetch(
    slot: &mut Slot,
    tag: Tag,
    block: u32,
    blocks: u32,
    patch: Option<u16>,
    context: &mut Context<'_>,
) {
    slot.read.remote += 1;
    slot.waits();
    let lba = slot.read.plan.lba.plus(u64::from(block));
    let ticket = slot.read.ticket;
    let unreadable = false;
    context.fetches.push(Fetch { tag, lba, block, blocks, ticket, patch, unreadable });
}

/// Asks for a whole block that only the cache has, and that no leg gives: should all of them have failed, it may get to the
/// store from memory.
fn ask_for_unreadable(slot: &mut Slot, tag: Tag, block: u32, context: &mut Context<'_>) {
    slot.read.remote += 1;
    slot.waits();
    let (lba, ticket) = (slot.read.plan.lba.plus(u64::from(block)), slot.read.ticket);
    let fetch = Fetch { tag, lba, block, blocks: 1, ticket, patch: None, unreadable: true };
    context.fetches.push(fetch);
}

/// A direct read ended: checks every block in guest memory.
pub(super) fn direct_done(
    slot: &mut Slot,
    tag: Tag,
    run: Run,
    arena: &Range<u32>,
    result: i32,
    io: &mut Io,
) {
    slot.read.local -= 1;
    if slot.orphan {
        return;
    }
    let complete = result == (run.blocks as usize * BLOCK_SIZE) as i32;
    let mut scratch = [0u8; BLOCK_SIZE];
    let mut suspects = Vec::new();
    {
        let mut cursor = Cursor::new(&slot.read.arena[as_usize(arena)], 0);
        for n in 0..run.blocks {
            let expected = slot.read.plan.crcs[(run.block + n) as usize];
            if !complete || block_crc(&mut cursor, &mut scratch) != expected {
                suspects.push(n);
            }
        }
    }
    for n in suspects {
        judge(slot, tag, run, n, io);
    }
}

/// CRC32C of the next block of guest memory.
fn block_crc(cursor: &mut Cursor<'_>, scratch: &mut [u8; BLOCK_SIZE]) -> u32 {
    let mut ahead = *cursor;
    cursor.advance(BLOCK_SIZE);
    match ahead.take(BLOCK_SIZE) {
        // SAFETY: the slot keeps the memory mapped. The guest may write to it while the checksum runs; the result is
        // then any number, which at worst sends us to read the block again.
        Some((ptr, BLOCK_SIZE)) => crc32c(unsafe { std::slice::from_raw_parts(ptr, BLOCK_SIZE) }),
        Some((ptr, len)) => {
            // SAFETY: mapped, as above; `len` is less than a block.
            unsafe { std::ptr::copy_nonoverlapping(ptr, scratch.as_mut_ptr(), len) };
            // SAFETY: as above.
            unsafe { ahead.copy_from_guest(&mut scratch[len..]) };
            crc32c(scratch)
        }
        None => crc32c(&[]),
    }
}

/// A read into a buffer of ours ended.
pub(super) fn bounce_done(
    slot: &mut Slot,
    tag: Tag,
    run: Run,
    buffer: AlignedBuf,
    result: i32,
    io: &mut Io,
) {
    slot.read.local -= 1;
    let complete = result == buffer.len() as i32;
    for (n, block) in (0u32..).zip(buffer.chunks_exact(BLOCK_SIZE)) {
        let index = run.block + n;
        if complete && crc32c(block) == slot.read.plan.crcs[index as usize] {
            deliver(slot, index, block);
        } else {
            judge(slot, tag, run, n, io);
        }
    }
    io.recycle(buffer);
}

/// Reads block `n` of a run on its own, to tell a bad block from a guest that writes to its buffer (rule L9).
fn judge(slot: &mut Slot, tag: Tag, run: Run, n: u32, io: &mut Io) {
    let block = run.block + n;
    let crc = slot.read.plan.crcs[block as usize];
    let offset = run.offset + u64::from(n) * BLOCK;
    slot.read.local += 1;
    let (leg, bad) = (io.first_leg(), LegSet::NONE);
    let buffer = io.block_buffer();
    io.read_block(tag, BlockRead { block, offset, crc, leg, bad, part: None }, buffer);
}

/// A read of one block ended.
pub(super) fn block_done(
    slot: &mut Slot,
    tag: Tag,
    read: BlockRead,
    buffer: AlignedBuf,
    result: i32,
    context: &mut Context<'_>,
) {
    let found = crc32c(&buffer);
    if result == BLOCK_SIZE as i32 && found == read.crc {
        match read.bad.and(context.io.readable).iter().next() {
            Some(leg) => context.io.repair(tag, read, leg, buffer),
            None => block_good(slot, read, buffer, context.io),
        }
        return;
    }
    let lba = slot.read.plan.lba.plus(u64::from(read.block));
    tracing::warn!(
        %lba, leg = read.leg, offset = read.offset, result,
        expected = format_args!("{:08x}", read.crc), found = format_args!("{found:08x}"),
        "a block on the cache device does not match its checksum or cannot be read"
    );
    let bad = read.bad.with(read.leg);
    if let Some(leg) = context.io.readable.minus(bad).iter().next() {
        context.io.read_block(tag, BlockRead { leg, bad, ..read }, buffer);
        return;
    }
    slot.read.local -= 1;
    context.io.recycle(buffer);
    match context.disk.bad_block(lba, read.offset) {
        BadBlock::Refetch => plan_again(&mut slot.read, read.block, slot.request.len),
        BadBlock::Lost if result != BLOCK_SIZE as i32 => {
            ask_for_unreadable(slot, tag, read.block, context);
        }
        BadBlock::Lost => {
            slot.read.failed = true;
            tracing::error!(%lba, offset = read.offset, "the only copy of a block is bad: the read fails");
        }
    }
}

/// A block that was read on its own is good: the guest's, or part of a patched block.
pub(super) fn block_good(slot: &mut Slot, read: BlockRead, buffer: AlignedBuf, io: &mut Io) {
    slot.read.local -= 1;
    match read.part {
        None => {
            deliver(slot, read.block, &buffer);
            io.recycle(buffer);
        }
        Some((patch, part)) => part_arrived(slot, patch, part, buffer, io),
    }
}

/// The bad copy of a block was rewritten, or that failed; the block is good either way.
pub(super) fn repair_done(
    slot: &mut Slot,
    read: BlockRead,
    leg: u8,
    buffer: AlignedBuf,
    result: i32,
    context: &mut Context<'_>,
) {
    if result == BLOCK_SIZE as i32 {
        tracing::info!(leg, offset = read.offset, "a damaged block was rewritten from another leg");
    } else {
        tracing::error!(leg, offset = read.offset, result, "a damaged block cannot be rewritten");
        let errno = if result < 0 { -result } else { libc::EIO };
        context.disk.repair_failed(leg, errno);
    }
    block_good(slot, read, buffer, context.io);
}

fn plan_again(read: &mut ReadState, block: u32, request_len: usize) {
    let range = wanted(read, block, 1);
    if read.again.contains(&range) {
        return;
    }
    read.replans += 1;
    let blocks = request_len as u64 / BLOCK + 2;
    if read.replans > blocks * REPLANS_PER_BLOCK {
        read.failed = true;
        tracing::error!(position = range.start, "a block keeps coming back bad: the read fails");
        return;
    }
    read.again.push(range);
}

/// The store answered a fetch of this request.
pub(super) fn fetch_done(
    slot: &mut Slot,
    fetch: &Fetch,
    blocks: Option<&[Option<Bytes>]>,
    io: &mut Io,
) {
    slot.read.remote -= 1;
    if slot.orphan {
        return;
    }
    let Some(blocks) = blocks.filter(|blocks| blocks.len() == fetch.blocks as usize) else {
        slot.read.failed = true;
        return;
    };
    for (n, block) in (0u32..).zip(blocks) {
        match (fetch.patch, block.as_deref()) {
            (Some(patch), content) => {
                let mut buffer = io.block_buffer();
                match content {
                    Some(content) => buffer.copy_from_slice(content),
                    None => buffer.fill(0),
                }
                part_arrived(slot, patch, 0, buffer, io);
            }
            (None, Some(content)) => deliver(slot, fetch.block + n, content),
            (None, None) => deliver_zeros(slot, fetch.block + n, 1),
        }
    }
}

fn part_arrived(slot: &mut Slot, patch: u16, part: u16, buffer: AlignedBuf, io: &mut Io) {
    let gathered = &mut slot.read.patches[usize::from(patch)];
    gathered.missing -= 1;
    gathered.parts[usize::from(part)] = Some(buffer);
    assemble(slot, patch, io);
}

/// Lays a patched block's overlays over its base, oldest first, once all parts are there.
fn assemble(slot: &mut Slot, patch: u16, io: &mut Io) {
    let gathered = &mut slot.read.patches[usize::from(patch)];
    if gathered.missing > 0 {
        return;
    }
    let mut content = io.block_buffer();
    let overlays =
        gathered.patched.overlays.iter().map(|overlay| (&overlay.source, overlay.sectors));
    let layers = [(&gathered.patched.base, u8::MAX)].into_iter().chain(overlays);
    for ((source, sectors), part) in layers.zip(&gathered.parts) {
        let from = match (source, part) {
            (BlockSource::Memory { image, start }, _) => Some(image.bytes(*start, BLOCK_SIZE)),
            (_, part) => part.as_deref(),
        };
        for sector in (0..8).filter(|sector| sectors & (1 << sector) != 0) {
            let range = sector * SECTOR_SIZE..(sector + 1) * SECTOR_SIZE;
            match from {
                Some(from) => content[range.clone()].copy_from_slice(&from[range]),
                None => content[range].fill(0),
            }
        }
    }
    for part in gathered.parts.drain(..).flatten() {
        io.recycle(part);
    }
    let block = gathered.block;
    deliver(slot, block, &content);
    io.recycle(content);
}

/// Copies whole blocks, the first of which is `block`, to where the guest wants them.
fn deliver(slot: &mut Slot, block: u32, content: &[u8]) {
    if slot.orphan {
        return;
    }
    let origin = position(&slot.read, block);
    let wanted = wanted(&slot.read, block, (content.len() / BLOCK_SIZE) as u32);
    let (from, to) = ((wanted.start - origin) as usize, (wanted.end - origin) as usize);
    let mut cursor = Cursor::new(&slot.request.data, guest_offset(slot, wanted.start));
    // SAFETY: the slot holds the guest's memory map.
    unsafe { cursor.copy_to_guest(&content[from..to]) };
}

fn deliver_zeros(slot: &mut Slot, block: u32, blocks: u32) {
    let wanted = wanted(&slot.read, block, blocks);
    let mut cursor = Cursor::new(&slot.request.data, guest_offset(slot, wanted.start));
    // SAFETY: the slot holds the guest's memory map.
    unsafe { cursor.zero_guest((wanted.end - wanted.start) as usize) };
}

/// Byte of the disk where block `block` of the plan starts.
fn position(read: &ReadState, block: u32) -> u64 {
    (read.plan.lba.0 + u64::from(block)) * BLOCK
}

/// The part of these blocks that the span asks for.
fn wanted(read: &ReadState, block: u32, blocks: u32) -> Range<u64> {
    let start = position(read, block);
    let end = start + u64::from(blocks) * BLOCK;
    start.max(read.span.start)..end.min(read.span.end)
}

/// Offset in the guest's buffers of byte `position` of the disk.
fn guest_offset(slot: &Slot, position: u64) -> usize {
    (position - slot.request.sector * SECTOR_SIZE as u64) as usize
}

fn as_usize(range: &Range<u32>) -> Range<usize> {
    range.start as usize..range.end as usize
}

/// Its local I/O is over, and the store has not answered.
pub(super) fn waits_for_store_only(read: &ReadState) -> bool {
    read.local == 0 && read.remote > 0
}

/// Forgets a read that only waits for the store. Its pins were given back with its last local I/O.
pub(super) fn abandon(slot: &mut Slot) {
    debug_assert!(slot.read.local == 0 && !slot.read.pinned, "local I/O is under way");
    slot.read.remote = 0;
    slot.read.patches.clear();
}

/// Blocks of the disk that a fetch is about.
pub(super) fn fetched_lbas(fetch: &Fetch) -> impl Iterator<Item = Lba> + use<> {
    let first = fetch.lba;
    (0..u64::from(fetch.blocks)).map(move |n| first.plus(n))
}
