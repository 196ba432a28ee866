//! What the disk holds: by the log of what the guest did, and by what is read.

use super::*;

impl Rig {
    /// The disk as it was at `lsn`.
    pub fn image_at(&self, lsn: u64) -> Image {
        let mut image = vec![0; SECTORS as usize];
        for done in self.log.iter().take(lsn as usize) {
            image[done.sectors.start as usize..done.sectors.end as usize].fill(done.stamp);
        }
        image
    }

    /// Reads the whole disk through the index. Blocks on their way come from memory.
    pub fn read_all(&mut self) -> Image {
        let mut out = vec![0; SECTORS as usize];
        let store = self.store.image.lock().unwrap().0.clone();
        let mut plan = ReadPlan::default();
        let mut at = 0;
        while at < SECTORS {
            let len = self.rng.random_range(1..=SECTORS - at);
            self.disk.read(at, len, &mut plan);
            let mut bytes = Vec::new();
            for piece in &plan.pieces {
                match piece {
                    Piece::Local { block, blocks, offset } => {
                        for n in 0..*blocks {
                            let crc = plan.crcs[(block + n) as usize];
                            let at = offset + u64::from(n) * BLOCK_SIZE as u64;
                            bytes.extend(self.block_at(at, crc));
                        }
                    }
                    Piece::Memory { blocks, image, start, .. } => {
                        bytes.extend(image.bytes(*start, *blocks as usize * BLOCK_SIZE));
                    }
                    Piece::Zero { blocks, .. } => {
                        bytes.extend(vec![0; *blocks as usize * BLOCK_SIZE])
                    }
                    Piece::Miss { block, blocks } => {
                        for n in 0..*blocks {
                            bytes.extend(block_of(&store, plan.lba.0 + u64::from(block + n)));
                        }
                    }
                    Piece::Patched { block, patched } => {
                        let lba = plan.lba.0 + u64::from(*block);
                        let mut result = self.source(&patched.base, &store, lba);
                        for overlay in &patched.overlays {
                            let over = self.source(&overlay.source, &store, lba);
                            for n in (0..8).filter(|n| overlay.sectors & (1 << n) != 0) {
                                let range = n * SECTOR_SIZE..(n + 1) * SECTOR_SIZE;
                                result[range.clone()].copy_from_slice(&over[range]);
                            }
                        }
                        bytes.extend(result);
                    }
                }
            }
            self.disk.release(&mut plan);
            for n in 0..len {
                let from = ((at + n) - plan.lba.0 * 8) as usize * SECTOR_SIZE;
                out[(at + n) as usize] = stamp_of(&bytes[from..from + SECTOR_SIZE], at + n);
            }
            at += len;
        }
        out
    }

    pub fn source(&self, source: &BlockSource, store: &Image, lba: u64) -> Vec<u8> {
        match source {
            BlockSource::Local { offset, crc } => self.block_at(*offset, *crc),
            BlockSource::Memory { image, start } => image.bytes(*start, BLOCK_SIZE).to_vec(),
            BlockSource::Zero => vec![0; BLOCK_SIZE],
            BlockSource::Miss => block_of(store, lba),
        }
    }
}
