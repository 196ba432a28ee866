//! Self-describing sectors: what was written where, by which write, checkable without anything else.
//!
//! Layout of a stamped sector, little-endian: magic (8), run seed (8), disk (8), sector number (8),
//! write number (8), filler derived from the latter three (464), zero (4), CRC32C of all before (4).
//! A sector of all zeros is its own value: never written, zeroed or discarded.

use bench::load::Random;

use super::SECTOR;

const MAGIC: [u8; 8] = *b"BALSTAMP";
const CRC_AT: usize = SECTOR - 4;
const FILLER_AT: usize = 40;
const FILLER_END: usize = SECTOR - 8;

/// Number of a mutating request in the client's own order: 1, 2, 3, …
pub type Sequence = u64;

/// Whose stamps these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Seed of the run: stamps of another run are foreign.
    pub seed: u64,
    /// Which of the run's disks.
    pub disk: u64,
}

/// What a sector turned out to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Zeros.
    Zero,
    /// The stamp of write `0` for this very place.
    Stamp(Sequence),
    /// A stamp of this disk that belongs to another place.
    Misdirected { sector: u64, sequence: Sequence },
    /// A whole stamp of another disk or run.
    Foreign { seed: u64, disk: u64 },
    /// Begins as a stamp does, but its checksum is wrong: parts of two values.
    Torn { sector: u64, sequence: Sequence },
    /// Nothing that anybody wrote.
    Garbage,
}

impl Identity {
    /// Writes the stamp of write `sequence` for the sectors from `first` on into `out`.
    ///
    /// # Panics
    /// When `out` is not whole sectors.
    pub fn stamp(&self, first: u64, sequence: Sequence, out: &mut [u8]) {
        assert!(out.len().is_multiple_of(SECTOR), "{} bytes are not whole sectors", out.len());
        for (sector, bytes) in (first..).zip(out.chunks_exact_mut(SECTOR)) {
            bytes[0..8].copy_from_slice(&MAGIC);
            bytes[8..16].copy_from_slice(&self.seed.to_le_bytes());
            bytes[16..24].copy_from_slice(&self.disk.to_le_bytes());
            bytes[24..32].copy_from_slice(&sector.to_le_bytes());
            bytes[32..40].copy_from_slice(&sequence.to_le_bytes());
            let key = self.seed ^ sector.rotate_left(32) ^ sequence.rotate_left(16);
            Random(key | 1).fill(&mut bytes[FILLER_AT..FILLER_END]);
            bytes[FILLER_END..CRC_AT].fill(0);
            let crc = crc_fast::crc32_iscsi(&bytes[..CRC_AT]);
            bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        }
    }

    /// Says what the 512 bytes read from `sector` are.
    ///
    /// # Panics
    /// When `bytes` is not one sector.
    #[must_use]
    pub fn read(&self, sector: u64, bytes: &[u8]) -> Found {
        assert_eq!(bytes.len(), SECTOR);
        if bytes.iter().all(|byte| *byte == 0) {
            return Found::Zero;
        }
        if bytes[0..8] != MAGIC {
            return Found::Garbage;
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let (seed, disk, stamped, sequence) = (word(8), word(16), word(24), word(32));
        let crc = u32::from_le_bytes(bytes[CRC_AT..].try_into().expect("4 bytes"));
        if crc != crc_fast::crc32_iscsi(&bytes[..CRC_AT]) {
            Found::Torn { sector: stamped, sequence }
        } else if seed != self.seed || disk != self.disk {
            Found::Foreign { seed, disk }
        } else if stamped != sector {
            Found::Misdirected { sector: stamped, sequence }
        } else {
            Found::Stamp(sequence)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Identity = Identity { seed: 7, disk: 1 };

    #[test]
    fn a_sector_tells_what_it_is() {
        let mut two = vec![0; 2 * SECTOR];
        assert_eq!(ME.read(9, &two[..SECTOR]), Found::Zero);
        ME.stamp(9, 3, &mut two);
        assert_eq!(ME.read(9, &two[..SECTOR]), Found::Stamp(3));
        assert_eq!(ME.read(10, &two[SECTOR..]), Found::Stamp(3));
        assert_eq!(ME.read(9, &two[SECTOR..]), Found::Misdirected { sector: 10, sequence: 3 });
        let other = Identity { disk: 2, ..ME };
        assert_eq!(other.read(9, &two[..SECTOR]), Found::Foreign { seed: 7, disk: 1 });
    }

    #[test]
    fn any_mix_of_two_stamps_is_torn() {
        let (mut old, mut new) = (vec![0; SECTOR], vec![0; SECTOR]);
        ME.stamp(9, 3, &mut old);
        ME.stamp(9, 4, &mut new);
        for cut in 33..SECTOR {
            let mixed = [&new[..cut], &old[cut..]].concat();
            assert_eq!(ME.read(9, &mixed), Found::Torn { sector: 9, sequence: 4 }, "cut {cut}");
        }
        let half_zero = [&new[..256], &[0; 256][..]].concat();
        assert!(matches!(ME.read(9, &half_zero), Found::Torn { .. }));
        let tail = [&[0; 256][..], &new[256..]].concat();
        assert_eq!(ME.read(9, &tail), Found::Garbage);
    }
}
