//! What fuzz targets reach of the initiator's inside; built with `--cfg fuzzing` only.

use super::scsi::{self, BlockLimits, Capacity, Sense};

/// Every parser of what a target answers. None may panic, whatever a target says.
pub fn parse_answers(bytes: &[u8]) {
    if let Some(sense) = Sense::parse(bytes) {
        assert!(sense.key < 16, "a sense key has four bits");
        let _ = sense.to_string();
    }
    if let Some(capacity) = Capacity::parse(bytes) {
        assert!(capacity.blocks > 0, "a device has at least its last block");
    }
    let _ = BlockLimits::parse(bytes);
    let _ = scsi::parse_reservation(bytes);
    assert!(scsi::parse_identity(bytes).len() <= bytes.len(), "an identity is part of its page");
}
