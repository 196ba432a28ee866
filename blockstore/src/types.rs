//! Newtypes for the quantities that must never be mixed up.
//!
//! Units: a *block* is 4096 bytes, a *sector* 512 bytes. `Lba` counts blocks inside one virtual disk,
//! `Gba` counts blocks of the shared device.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a block, the unit of allocation, of the radix tree and of every checksum.
pub const BLOCK_SIZE: usize = 4096;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_SHIFT: u32 = 12;
/// Bytes in a sector, the unit that guests address.
pub const SECTOR_SIZE: usize = 512;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = (BLOCK_SIZE / SECTOR_SIZE) as u64;

macro_rules! quantity {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The value `n` further on.
            #[must_use]
            pub const fn plus(self, n: u64) -> Self {
                Self(self.0 + n)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

quantity! {
    /// Block number inside one virtual disk.
    Lba
}
quantity! {
    /// Global block address: byte offset on the shared device / 4096. 44 bits on disk.
    Gba
}
quantity! {
    /// Log sequence number of one virtual disk: dense, from 1; 0 means "before the first write".
    Lsn
}
quantity! {
    /// A virtual disk's commit counter at the time a block was written. 48 bits on disk.
    Birth
}
quantity! {
    /// Counts the incarnations of an owner (host, attachment): +1 each time it returns.
    Generation
}

impl Gba {
    /// Byte offset on the device.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 << BLOCK_SHIFT
    }
}
