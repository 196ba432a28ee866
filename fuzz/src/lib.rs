//! What the targets share: reading a fuzzer's input as a script, and changing a valid structure as the script says.
//!
//! Checksums keep random bytes out of a decoder's depths. So most inputs are not the structure itself, but patches to
//! one that is valid; the target puts the checksum right again.

/// The input, read from its start; zeros after its end.
#[derive(Debug)]
pub struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    /// All of `input`.
    pub fn new(input: &'a [u8]) -> Self {
        Self(input)
    }

    /// Nothing is left.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, fewer at the end.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        now
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// A little-endian number of `len` bytes, at most eight.
    pub fn number(&mut self, len: usize) -> u64 {
        let mut bytes = [0; 8];
        let found = self.bytes(len);
        bytes[..found.len()].copy_from_slice(found);
        u64::from_le_bytes(bytes)
    }

    /// Overwrites a piece of `target`: offset (two bytes), length (one byte, at most 16 count), bytes.
    pub fn patch(&mut self, target: &mut [u8]) {
        let offset = self.number(2) as usize % target.len();
        let len = usize::from(self.byte() & 15) + 1;
        let value = self.bytes(len);
        let len = value.len().min(target.len() - offset);
        target[offset..offset + len].copy_from_slice(&value[..len]);
    }

    /// Patches until the input is over.
    pub fn patch_all(&mut self, target: &mut [u8]) {
        while !self.is_over() {
            self.patch(target);
        }
    }
}

/// Puts the CRC32C of `bytes`, with the field zero, into the field at `offset`.
pub fn put_crc(bytes: &mut [u8], offset: usize, crc: impl FnOnce(&[u8]) -> u32) {
    bytes[offset..offset + 4].fill(0);
    let crc = crc(bytes);
    bytes[offset..offset + 4].copy_from_slice(&crc.to_le_bytes());
}
