//! CRC32C (Castagnoli), the checksum of every block, header and record.

/// CRC32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC32C of the eight bytes of `key` followed by `bytes`: a checksum that only a holder of the key
/// can make up, so that stale or guest-written bytes do not pass for a header.
#[must_use]
pub fn crc32c_keyed(key: u64, bytes: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&key.to_le_bytes());
    digest.update(bytes);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_keyed(u64::from_le_bytes(*b"12345678"), b"9"), 0xe306_9283);
    }
}
