//! The store's side: an image as of an LSN, and one for each snapshot. A sector names the operation that wrote it.

use super::*;

#[derive(Debug, Default)]
pub struct Store {
    pub image: Mutex<(Image, u64)>,
    pub snapshots: Mutex<BTreeMap<u64, Image>>,
}

#[derive(Debug)]
pub struct StoreHandle(pub Arc<Store>);

#[async_trait]
impl Backing for StoreHandle {
    fn committed(&self) -> Lsn {
        Lsn(self.0.image.lock().unwrap().1)
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        let image = self.0.image.lock().unwrap();
        Ok((0..u64::from(blocks)).map(|n| Some(block_of(&image.0, lba.0 + n).into())).collect())
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        let mut image = self.0.image.lock().unwrap();
        let cuts = snapshots::images_at_cuts(&batch, &mut image.0, apply);
        self.0.snapshots.lock().unwrap().extend(cuts);
        assert!(batch.lsn.0 > image.1, "commits go forward");
        image.1 = batch.lsn.0;
        Ok(())
    }
}

pub fn apply(image: &mut Image, changes: &[Change]) {
    let mut next = 0;
    for change in changes {
        let (lba, blocks) = match change {
            Change::Write { lba, crc, data } => {
                assert_eq!(crc32c(data), *crc, "the checksum of a change is that of its data");
                for (n, sector) in data.chunks_exact(SECTOR_SIZE).enumerate() {
                    image[lba.0 as usize * 8 + n] = stamp_of(sector, lba.0 * 8 + n as u64);
                }
                (lba.0, 1)
            }
            Change::Zero { lba, blocks } => {
                image[lba.0 as usize * 8..(lba.0 + blocks) as usize * 8].fill(0);
                (lba.0, *blocks)
            }
        };
        assert!(lba >= next, "changes are sorted and disjoint");
        next = lba + blocks;
    }
}

/// A sector that names itself and the operation that wrote it.
pub fn sector(stamp: u32, sector: u64) -> [u8; SECTOR_SIZE] {
    let mut bytes = [0u8; SECTOR_SIZE];
    if stamp != 0 {
        for chunk in bytes.chunks_exact_mut(16) {
            chunk[..4].copy_from_slice(&stamp.to_le_bytes());
            chunk[4..12].copy_from_slice(&sector.to_le_bytes());
        }
    }
    bytes
}

pub fn stamp_of(bytes: &[u8], at: u64) -> u32 {
    let stamp = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    assert_eq!(bytes, sector(stamp, at), "sector {at} is torn or misdirected");
    stamp
}

pub fn block_of(image: &Image, lba: u64) -> Vec<u8> {
    (lba * 8..lba * 8 + 8).flat_map(|at| sector(image[at as usize], at)).collect()
}
