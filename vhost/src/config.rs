//! What the device tells its driver: feature bits and the virtio-blk configuration space
//! (virtio 1.2, section 5.2).

use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// Feature bit numbers, virtio 1.2 sections 5.2.3 and 6.
pub(crate) mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// vhost-user's own: mark the pages that we write.
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Data segments of one request: 1 MiB in single pages.
pub(crate) const SEGMENTS_MAX: u32 = 256;
/// Ranges of one DISCARD or WRITE_ZEROES request.
pub(crate) const ZERO_RANGES_MAX: u32 = 16;
/// Sectors of one range of a DISCARD or WRITE_ZEROES request: 1 GiB.
pub(crate) const ZERO_SECTORS_MAX: u32 = 1 << 21;
/// Memory regions that a front end may add one by one.
pub(crate) const MEM_SLOTS_MAX: u64 = 509;
/// Bytes of the answer to GET_ID.
pub(crate) const ID_LEN: usize = 20;

/// Byte of the configuration space that holds `writeback`.
pub(crate) const WRITEBACK_OFFSET: u32 = 32;

/// The features offered to the driver.
pub(crate) fn device_features(read_only: bool) -> u64 {
    use feature::*;
    let common = SEG_MAX
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | INDIRECT_DESC
        | EVENT_IDX
        | LOG_ALL
        | PROTOCOL_FEATURES
        | VERSION_1;
    common | if read_only { RO } else { DISCARD | WRITE_ZEROES }
}

/// The vhost-user protocol features offered to the front end. STATUS stays out: some front ends then send
/// SET_STATUS, which the protocol crate answers by ending the connection.
pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ
}

/// What varies in the configuration space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// 512-byte sectors.
    pub capacity: u64,
    /// Request queues.
    pub queues: u16,
    /// Write cache on.
    pub writeback: bool,
}

/// `struct virtio_blk_config` up to its secure-erase fields.
pub(crate) fn config_space(geometry: Geometry) -> [u8; 60] {
    let mut space = [0u8; 60];
    let mut put = |offset: usize, bytes: &[u8]| {
        space[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &geometry.capacity.to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &512u32.to_le_bytes()); // logical block
    put(24, &[3, 0]); // 2^3 logical blocks in a physical one; the first is aligned
    put(26, &8u16.to_le_bytes()); // smallest I/O without read-modify-write, in logical blocks
    put(28, &128u32.to_le_bytes()); // optimal I/O: 64 KiB
    put(WRITEBACK_OFFSET as usize, &[u8::from(geometry.writeback)]);
    put(34, &geometry.queues.to_le_bytes());
    put(36, &ZERO_SECTORS_MAX.to_le_bytes());
    put(40, &ZERO_RANGES_MAX.to_le_bytes());
    put(44, &8u32.to_le_bytes()); // discard alignment: one 4 KiB block
    put(48, &ZERO_SECTORS_MAX.to_le_bytes());
    put(52, &ZERO_RANGES_MAX.to_le_bytes());
    put(56, &[1]); // WRITE_ZEROES may unmap
    space
}

/// Bytes `offset..offset + size` of the configuration space; what lies behind its end reads as zeros.
pub(crate) fn read_config(geometry: Geometry, offset: u32, size: u32) -> Vec<u8> {
    let space = config_space(geometry);
    let byte = |at: u64| usize::try_from(at).ok().and_then(|at| space.get(at)).copied();
    (u64::from(offset)..u64::from(offset) + u64::from(size))
        .map(|at| byte(at).unwrap_or(0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry =
        Geometry { capacity: 0x0102_0304_0506_0708, queues: 4, writeback: true };

    #[test]
    fn any_window_of_the_config_space_is_answered_with_its_exact_size() {
        let whole = read_config(GEOMETRY, 0, 256);
        assert_eq!(whole.len(), 256);
        assert_eq!(whole[..8], 0x0102_0304_0506_0708u64.to_le_bytes());
        assert!(whole[60..].iter().all(|&byte| byte == 0));
        for (offset, size) in [(0, 57), (0, 60), (32, 1), (59, 5), (60, 4), (4000, 96)] {
            let window = read_config(GEOMETRY, offset, size);
            let expected: Vec<u8> = (offset..offset + size)
                .map(|at| whole.get(at as usize).copied().unwrap_or(0))
                .collect();
            assert_eq!(window, expected, "offset {offset} size {size}");
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let space = config_space(GEOMETRY);
        let u16_at = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(8), u32_at(12)), (0, SEGMENTS_MAX));
        assert_eq!((u32_at(20), space[24], space[25]), (512, 3, 0));
        assert_eq!((u16_at(26), space[32], u16_at(34)), (8, 1, 4));
        assert_eq!(u32_at(44) * 512, 4096);
        assert!(u64::from(SEGMENTS_MAX) * 4096 >= 1 << 20, "1 MiB in single pages must fit");
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let features = device_features(true);
        assert_ne!(features & feature::RO, 0);
        assert_eq!(features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
        assert_eq!(device_features(false) & feature::RO, 0);
        assert!(!protocol_features().contains(VhostUserProtocolFeatures::STATUS));
    }
}
