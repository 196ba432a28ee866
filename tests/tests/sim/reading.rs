//! One read of a guest: where its blocks come from, and what has arrived of them.

use crate::worker::Fetch;
use blockstore::buf::AlignedBuf;
use blockstore::types::{BLOCK_SIZE, Lba, SECTOR_SIZE};
use bytes::Bytes;
use cache::disk::plan::{BlockSource, Piece, ReadPlan};
use cache::disk::{BadBlock, Disk};
use cache::format::LegSet;

/// Times that a read is planned again before it is given up.
const TRIES_MAX: u32 = 8;

/// See the module.
#[derive(Debug)]
pub struct Reading {
    id: u64,
    pub sector: u64,
    sectors: u64,
    /// What the sectors held when the read began, and at which LSN that was.
    pub before: Vec<u32>,
    pub since: u64,
    plan: ReadPlan,
    pinned: bool,
    pub ticket: u64,
    blocks: Vec<Vec<Layer>>,
    local: u32,
    remote: u32,
    bad: bool,
    failed: bool,
    tries: u32,
    orphan: bool,
}

/// Sectors of a block and what fills them; nothing yet if it is under way.
#[derive(Debug)]
struct Layer {
    sectors: u8,
    content: Option<Content>,
}

#[derive(Debug)]
enum Content {
    Data(Vec<u8>),
    Zeros,
}

/// A block to be read from the cache device.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    read: u64,
    block: u32,
    layer: u32,
    pub offset: u64,
    pub crc: u32,
}

/// A block that was read from the cache device; no data if it is bad.
#[derive(Debug)]
pub struct Arrived {
    pub read: u64,
    block: u32,
    layer: u32,
    pub offset: u64,
    pub data: Option<AlignedBuf>,
    /// Legs whose copy is bad.
    pub bad: LegSet,
}

impl Local {
    /// It was read; no data if it is bad.
    pub fn with(self, data: Option<AlignedBuf>, bad: LegSet) -> Arrived {
        let Self { read, block, layer, offset, .. } = self;
        Arrived { read, block, layer, offset, data, bad }
    }
}

/// What a plan leaves to be had.
#[derive(Debug, Default)]
pub struct Wanted {
    pub local: Vec<Local>,
    /// First block, number of blocks, and whether they are wanted whole (not as the base of patches).
    pub missing: Vec<(u32, u32, bool)>,
}

impl Reading {
    pub fn new(id: u64, sector: u64, sectors: u64, before: Vec<u32>, since: u64) -> Self {
        Self {
            id,
            sector,
            sectors,
            before,
            since,
            plan: ReadPlan::default(),
            pinned: false,
            ticket: 0,
            blocks: Vec::new(),
            local: 0,
            remote: 0,
            bad: false,
            failed: false,
            tries: 0,
            orphan: false,
        }
    }

    /// Number on the disk of a block of the read.
    pub fn lba(&self, block: u32) -> u64 {
        self.plan.lba.0 + u64::from(block)
    }

    /// Plans it, from the start.
    pub fn plan(&mut self, disk: &mut Disk) -> Wanted {
        self.tries += 1;
        self.bad = false;
        self.orphan = false;
        self.ticket = disk.fill_ticket();
        disk.read(self.sector, self.sectors, &mut self.plan);
        self.pinned = true;
        self.blocks = (0..self.plan.blocks).map(|_| Vec::new()).collect();
        let mut wanted = Wanted::default();
        for piece in std::mem::take(&mut self.plan.pieces) {
            match piece {
                Piece::Local { block, blocks, offset } => {
                    for n in 0..blocks {
                        let offset = offset + u64::from(n) * BLOCK_SIZE as u64;
                        let crc = self.plan.crcs[(block + n) as usize];
                        self.add(
                            block + n,
                            u8::MAX,
                            BlockSource::Local { offset, crc },
                            &mut wanted,
                        );
                    }
                }
                Piece::Memory { block, blocks, image, start } => {
                    for n in 0..blocks {
                        let start = start + n as usize * BLOCK_SIZE;
                        let image = image.clone();
                        self.add(
                            block + n,
                            u8::MAX,
                            BlockSource::Memory { image, start },
                            &mut wanted,
                        );
                    }
                }
                Piece::Zero { block, blocks } => {
                    for n in 0..blocks {
                        self.add(block + n, u8::MAX, BlockSource::Zero, &mut wanted);
                    }
                }
                Piece::Miss { block, blocks } => {
                    for n in 0..blocks {
                        self.blocks[(block + n) as usize]
                            .push(Layer { sectors: u8::MAX, content: None });
                    }
                    self.remote += 1;
                    wanted.missing.push((block, blocks, true));
                }
                Piece::Patched { block, patched } => {
                    self.add(block, u8::MAX, patched.base, &mut wanted);
                    for overlay in patched.overlays {
                        self.add(block, overlay.sectors, overlay.source, &mut wanted);
                    }
                }
            }
        }
        wanted
    }

    fn add(&mut self, block: u32, sectors: u8, source: BlockSource, wanted: &mut Wanted) {
        let layers = &mut self.blocks[block as usize];
        let layer = layers.len() as u32;
        let content = match source {
            BlockSource::Local { offset, crc } => {
                self.local += 1;
                wanted.local.push(Local { read: self.id, block, layer, offset, crc });
                None
            }
            BlockSource::Memory { image, start } => {
                Some(Content::Data(image.bytes(start, BLOCK_SIZE).to_vec()))
            }
            BlockSource::Zero => Some(Content::Zeros),
            BlockSource::Miss => {
                self.remote += 1;
                wanted.missing.push((block, 1, false));
                None
            }
        };
        layers.push(Layer { sectors, content });
    }

    /// A block came from the cache device.
    pub fn arrived(&mut self, arrived: Arrived, disk: &mut Disk) {
        self.local -= 1;
        match arrived.data {
            Some(data) => {
                let layer = &mut self.blocks[arrived.block as usize][arrived.layer as usize];
                layer.content = Some(Content::Data(data.to_vec()));
            }
            None => match disk.bad_block(Lba(self.lba(arrived.block)), arrived.offset) {
                BadBlock::Refetch => self.bad = true,
                BadBlock::Lost => self.failed = true,
            },
        }
    }

    /// Blocks came from the store, or cannot be had.
    pub fn fetched(&mut self, fetch: &Fetch, blocks: Option<Vec<Option<Bytes>>>) {
        self.remote -= 1;
        let Some(blocks) = blocks.filter(|blocks| blocks.len() == fetch.blocks as usize) else {
            self.failed = true;
            return;
        };
        for (block, content) in (fetch.block as usize..).zip(blocks) {
            // Whether whole or a base, the store's block is the lowest layer.
            self.blocks[block][0].content =
                Some(content.map_or(Content::Zeros, |data| Content::Data(data.to_vec())));
        }
    }

    /// Gives pins back once local I/O is over.
    pub fn unpin(&mut self, disk: &mut Disk) {
        if self.pinned && self.local == 0 {
            self.pinned = false;
            disk.release(&mut self.plan);
        }
    }

    /// What it needs here is kept until its local I/O is over.
    pub fn has_pins(&self) -> bool {
        self.pinned
    }

    /// Its session ended: what it asked the store for is forgotten.
    pub fn end_session(&mut self) {
        self.orphan = true;
    }

    /// Only what was forgotten is missing: it ends here, whether or not another guest has come since.
    pub fn is_abandoned(&self) -> bool {
        self.orphan && self.local == 0 && self.remote > 0
    }

    /// Nothing is under way.
    pub fn is_complete(&self) -> bool {
        self.local == 0 && self.remote == 0
    }

    /// A block was bad here and may be had from the store: plan again.
    pub fn again(&mut self) -> bool {
        self.failed |= self.bad && self.tries >= TRIES_MAX;
        self.bad && !self.failed
    }

    /// What the guest gets; none for an I/O error.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        if self.failed {
            return None;
        }
        let mut all = Vec::with_capacity(self.blocks.len() * BLOCK_SIZE);
        for layers in &self.blocks {
            let from = all.len();
            all.resize(from + BLOCK_SIZE, 0);
            for layer in layers {
                for sector in (0..8).filter(|n| layer.sectors & (1 << n) != 0) {
                    let range = sector * SECTOR_SIZE..(sector + 1) * SECTOR_SIZE;
                    let into = &mut all[from..][range.clone()];
                    match layer.content.as_ref()? {
                        Content::Data(data) => into.copy_from_slice(&data[range]),
                        Content::Zeros => into.fill(0),
                    }
                }
            }
        }
        let skip = (self.sector - self.plan.lba.0 * 8) as usize * SECTOR_SIZE;
        Some(all[skip..skip + self.sectors as usize * SECTOR_SIZE].to_vec())
    }
}
