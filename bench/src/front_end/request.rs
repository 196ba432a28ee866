//! Block requests as virtio-blk encodes them (virtio 1.2, section 5.2.6), and the configuration.

use anyhow::{Result, ensure};

/// What to ask of the disk. Offsets and lengths are in 512-byte sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Reads `sectors` into the slot's buffer.
    Read { sector: u64, sectors: u32 },
    /// Writes `sectors` from the slot's buffer.
    Write { sector: u64, sectors: u32 },
    /// Makes every write that was completed before durable.
    Flush,
    /// Gives the range up.
    Discard { sector: u64, sectors: u32 },
    /// Zeroes the range.
    WriteZeroes { sector: u64, sectors: u32, unmap: bool },
    /// Reads the disk's identity (20 bytes) into the slot's buffer.
    GetId,
}

/// Length of the identity that `GetId` returns.
pub const ID_BYTES: usize = 20;

impl Request {
    /// The type field of the request header.
    #[must_use]
    pub fn kind(&self) -> u32 {
        match self {
            Self::Read { .. } => 0,
            Self::Write { .. } => 1,
            Self::Flush => 4,
            Self::GetId => 8,
            Self::Discard { .. } => 11,
            Self::WriteZeroes { .. } => 13,
        }
    }

    /// The 16-byte header.
    #[must_use]
    pub fn header(&self) -> [u8; 16] {
        let sector = match self {
            Self::Read { sector, .. } | Self::Write { sector, .. } => *sector,
            _ => 0,
        };
        let mut out = [0; 16];
        out[0..4].copy_from_slice(&self.kind().to_le_bytes());
        out[8..16].copy_from_slice(&sector.to_le_bytes());
        out
    }

    /// The 16-byte range segment of a discard or write-zeroes.
    #[must_use]
    pub fn segment(&self) -> Option<[u8; 16]> {
        let (sector, sectors, flags) = match self {
            Self::Discard { sector, sectors } => (*sector, *sectors, 0u32),
            Self::WriteZeroes { sector, sectors, unmap } => (*sector, *sectors, u32::from(*unmap)),
            _ => return None,
        };
        let mut out = [0; 16];
        out[0..8].copy_from_slice(&sector.to_le_bytes());
        out[8..12].copy_from_slice(&sectors.to_le_bytes());
        out[12..16].copy_from_slice(&flags.to_le_bytes());
        Some(out)
    }

    /// Bytes of the slot's buffer that travel, and whether the device writes them.
    #[must_use]
    pub fn data(&self) -> (usize, bool) {
        match self {
            Self::Read { sectors, .. } => (*sectors as usize * 512, true),
            Self::Write { sectors, .. } => (*sectors as usize * 512, false),
            Self::GetId => (ID_BYTES, true),
            _ => (0, false),
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The device failed.
    IoError,
    /// The device does not know the request.
    Unsupported,
    /// A value that the specification does not define; 0xff is what we put there before submitting.
    Undefined(u8),
}

impl From<u8> for Status {
    fn from(byte: u8) -> Self {
        match byte {
            0 => Self::Ok,
            1 => Self::IoError,
            2 => Self::Unsupported,
            other => Self::Undefined(other),
        }
    }
}

/// One finished request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The slot it was submitted in; free again.
    pub slot: usize,
    /// How it ended.
    pub status: Status,
    /// Bytes the device says it wrote, status byte included.
    pub written: u32,
}

/// The device's configuration space (virtio 1.2, section 5.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Disk size in 512-byte sectors.
    pub capacity_sectors: u64,
    /// Most data segments of one request.
    pub segments_max: u32,
    /// Logical block in bytes.
    pub block_bytes: u32,
    /// Whether the write cache is on (write-back).
    pub write_cache: bool,
    /// Request queues.
    pub queues: u16,
    /// Most sectors of one discard.
    pub discard_sectors_max: u32,
    /// Most sectors of one write-zeroes.
    pub zeroes_sectors_max: u32,
}

impl Config {
    /// Bytes of the space up to and including the write-zeroes fields.
    pub const BYTES: usize = 60;
    /// Offset of the write-cache byte, the one field a driver may set.
    pub const WRITE_CACHE_OFFSET: u32 = 32;

    /// Decodes the space.
    ///
    /// # Errors
    /// When it is too short.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.len() >= Self::BYTES, "configuration space of {} bytes", bytes.len());
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        Ok(Self {
            capacity_sectors: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            segments_max: u32_at(12),
            block_bytes: u32_at(20),
            write_cache: bytes[Self::WRITE_CACHE_OFFSET as usize] != 0,
            queues: u16_at(34),
            discard_sectors_max: u32_at(36),
            zeroes_sectors_max: u32_at(48),
        })
    }
}
