//! What a simulated device holds: a durable image, the image that reads see, and between them the
//! list of writes that were not flushed. Pure: no locks, no waiting.
//!
//! Crash behaviour: every unflushed write may independently be kept, lost or torn at multiples of
//! the tear unit (the logical block), and two of them may land in the wrong order. What was flushed
//! stays, whatever happens.

use crate::types::{BLOCK_SHIFT, BLOCK_SIZE};
use bytes::Bytes;
use hashbrown::HashMap;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::Arc;

type Block = [u8; BLOCK_SIZE];
type Image = HashMap<u64, Arc<Block>>;

/// A write that reads see but that a crash may undo.
#[derive(Clone, Debug)]
struct Unflushed {
    offset: u64,
    data: Bytes,
}

/// Which tear units of a write reach the device.
#[derive(Clone, Debug)]
pub(super) enum Extent {
    All,
    None,
    /// The first so many bytes.
    Prefix(usize),
    /// One flag for each tear unit.
    Subset(Vec<bool>),
}

/// How a crash treats the unflushed writes as a whole, so that the plain cases come up often
/// enough beside the wild ones.
enum CrashStyle {
    LoseAll,
    KeepAll,
    /// In order, and nothing after a certain write.
    KeepPrefix,
    /// All but one.
    LoseOne,
    /// Each on its own, torn, in any order.
    Wild,
}

pub(super) struct Media {
    tear_unit: usize,
    current: Image,
    durable: Image,
    /// Blocks that may differ between the two images.
    diverged: BTreeSet<u64>,
    unflushed: Vec<Unflushed>,
    /// A flush failed: of some blocks reads show what no later flush covers.
    forgot: bool,
    pub(super) rng: StdRng,
}

impl Media {
    pub(super) fn new(tear_unit: usize, seed: u64) -> Self {
        Self {
            tear_unit,
            current: Image::new(),
            durable: Image::new(),
            diverged: BTreeSet::new(),
            unflushed: Vec::new(),
            forgot: false,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// An independent copy, with choices of its own from here on.
    pub(super) fn fork(&self, seed: u64) -> Self {
        Self {
            tear_unit: self.tear_unit,
            current: self.current.clone(),
            durable: self.durable.clone(),
            diverged: self.diverged.clone(),
            unflushed: self.unflushed.clone(),
            forgot: self.forgot,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// Fills `buf` with what the device shows at `offset`.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        read_image(&self.current, offset, buf);
    }

    /// As [`read`](Self::read), but what would be there if everything unflushed were lost.
    pub(super) fn read_durable(&self, offset: u64, buf: &mut [u8]) {
        read_image(&self.durable, offset, buf);
    }

    /// True if some block of the range was never written.
    pub(super) fn has_hole(&self, offset: u64, len: u64) -> bool {
        let first = offset >> BLOCK_SHIFT;
        let end = (offset + len).div_ceil(BLOCK_SIZE as u64);
        (first..end).any(|block| !self.current.contains_key(&block))
    }

    /// Writes the chosen part; it stays volatile until [`flush`](Self::flush).
    pub(super) fn write(&mut self, offset: u64, data: &Bytes, extent: &Extent) {
        for (start, end) in runs(extent, data.len(), self.tear_unit) {
            let piece = Unflushed { offset: offset + start as u64, data: data.slice(start..end) };
            write_image(&mut self.current, piece.offset, &piece.data, Some(&mut self.diverged));
            self.unflushed.push(piece);
        }
    }

    pub(super) fn flush(&mut self) {
        if !self.forgot {
            // All that reads see becomes durable: the two images share its blocks.
            self.unflushed.clear();
            for block in std::mem::take(&mut self.diverged) {
                if let Some(content) = self.current.get(&block) {
                    self.durable.insert(block, Arc::clone(content));
                }
            }
            return;
        }
        for write in std::mem::take(&mut self.unflushed) {
            write_image(&mut self.durable, write.offset, &write.data, None);
        }
    }

    /// A flush that the device gave up on: some writes became durable, of others it forgot that they
    /// are not, so that no later flush covers them though reads still show them (as Linux did with
    /// pages whose write-back failed).
    pub(super) fn fail_flush(&mut self) {
        self.forgot = true;
        for write in std::mem::take(&mut self.unflushed) {
            match self.rng.random_range(0..3) {
                0 => write_image(&mut self.durable, write.offset, &write.data, None),
                1 => {}
                _ => self.unflushed.push(write),
            }
        }
    }

    /// Power loss: settles the fate of everything unflushed.
    pub(super) fn crash(&mut self) {
        self.forgot = false;
        let mut writes = std::mem::take(&mut self.unflushed);
        let style = match self.rng.random_range(0..8) {
            0 => CrashStyle::LoseAll,
            1 => CrashStyle::KeepAll,
            2 => CrashStyle::KeepPrefix,
            3 => CrashStyle::LoseOne,
            _ => CrashStyle::Wild,
        };
        match style {
            CrashStyle::LoseAll => writes.clear(),
            CrashStyle::KeepAll => {}
            CrashStyle::KeepPrefix => {
                let kept = self.rng.random_range(0..=writes.len());
                writes.truncate(kept);
                // The first one beyond may have been under way: it counts as torn elsewhere (Wild).
            }
            CrashStyle::LoseOne if !writes.is_empty() => {
                let lost = self.rng.random_range(0..writes.len());
                writes.remove(lost);
            }
            CrashStyle::LoseOne => {}
            CrashStyle::Wild => writes.shuffle(&mut self.rng),
        }
        let wild = matches!(style, CrashStyle::Wild);
        for write in writes {
            let extent = if wild { self.random_extent(write.data.len()) } else { Extent::All };
            for (start, end) in runs(&extent, write.data.len(), self.tear_unit) {
                let offset = write.offset + start as u64;
                write_image(&mut self.durable, offset, &write.data[start..end], None);
            }
        }
        for block in std::mem::take(&mut self.diverged) {
            match self.durable.get(&block) {
                Some(content) => self.current.insert(block, Arc::clone(content)),
                None => self.current.remove(&block),
            };
        }
    }

    /// All, nothing or any part of a write of `len` bytes.
    pub(super) fn random_extent(&mut self, len: usize) -> Extent {
        let units = len / self.tear_unit;
        match self.rng.random_range(0..4) {
            0 => Extent::All,
            1 => Extent::None,
            2 => Extent::Prefix(self.rng.random_range(0..=units) * self.tear_unit),
            _ => Extent::Subset((0..units).map(|_| self.rng.random()).collect()),
        }
    }

    /// Puts other content in the place of a block, for good.
    pub(super) fn put(&mut self, block: u64, content: &Block) {
        for image in [&mut self.current, &mut self.durable] {
            image.insert(block, Arc::new(*content));
        }
        let place = block << BLOCK_SHIFT;
        for write in &mut self.unflushed {
            let end = write.offset + write.data.len() as u64;
            let (from, to) = (write.offset.max(place), end.min(place + BLOCK_SIZE as u64));
            if from < to {
                let mut copy = write.data.to_vec();
                let new = &content[(from - place) as usize..(to - place) as usize];
                copy[(from - write.offset) as usize..(to - write.offset) as usize]
                    .copy_from_slice(new);
                write.data = Bytes::from(copy);
            }
        }
    }

    /// Bit rot: flips the bits of `mask` in one byte, for good.
    pub(super) fn corrupt(&mut self, offset: u64, mask: u8) {
        let (block, at) = (offset >> BLOCK_SHIFT, offset as usize % BLOCK_SIZE);
        for image in [&mut self.current, &mut self.durable] {
            Arc::make_mut(image.entry(block).or_insert_with(zero_block))[at] ^= mask;
        }
        for write in &mut self.unflushed {
            let end = write.offset + write.data.len() as u64;
            if (write.offset..end).contains(&offset) {
                let mut copy = write.data.to_vec();
                copy[(offset - write.offset) as usize] ^= mask;
                write.data = Bytes::from(copy);
            }
        }
    }

    pub(super) fn written_blocks(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = self.current.keys().copied().collect();
        blocks.sort_unstable();
        blocks
    }

    pub(super) fn unflushed_count(&self) -> usize {
        self.unflushed.len()
    }
}

fn zero_block() -> Arc<Block> {
    Arc::new([0; BLOCK_SIZE])
}

/// Byte ranges of a write of `len` bytes that `extent` lets through.
fn runs(extent: &Extent, len: usize, unit: usize) -> Vec<(usize, usize)> {
    match extent {
        Extent::All if len > 0 => vec![(0, len)],
        Extent::Prefix(end) if *end > 0 => vec![(0, *end)],
        Extent::All | Extent::Prefix(_) | Extent::None => Vec::new(),
        Extent::Subset(units) => {
            let kept = units.iter().enumerate().filter(|(_, keep)| **keep);
            kept.map(|(i, _)| (i * unit, (i + 1) * unit)).collect()
        }
    }
}

/// Splits a byte range into (block, offset in the block, length) pieces.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let position = offset + done as u64;
        let at = position as usize % BLOCK_SIZE;
        let n = (BLOCK_SIZE - at).min(len - done);
        done += n;
        Some((position >> BLOCK_SHIFT, at, n))
    })
}

fn read_image(image: &Image, offset: u64, buf: &mut [u8]) {
    let mut done = 0;
    for (block, at, n) in pieces(offset, buf.len()) {
        match image.get(&block) {
            Some(content) => buf[done..done + n].copy_from_slice(&content[at..at + n]),
            None => buf[done..done + n].fill(0),
        }
        done += n;
    }
}

fn write_image(
    image: &mut Image,
    offset: u64,
    data: &[u8],
    mut touched: Option<&mut BTreeSet<u64>>,
) {
    let mut done = 0;
    for (block, at, n) in pieces(offset, data.len()) {
        let data = &data[done..done + n];
        match <&Block>::try_from(data) {
            Ok(whole) => {
                image.insert(block, Arc::new(*whole));
            }
            Err(_) => {
                let content = Arc::make_mut(image.entry(block).or_insert_with(zero_block));
                content[at..at + n].copy_from_slice(data);
            }
        }
        if let Some(touched) = &mut touched {
            touched.insert(block);
        }
        done += n;
    }
}
