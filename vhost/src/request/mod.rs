//! One descriptor chain → one validated virtio-blk request (virtio 1.2, sections 2.7 and 5.2.6).
//!
//! Pure over a guest memory: nothing is cached, no I/O is done, and the guest may scribble meanwhile. Every descriptor
//! is loaded once and judged by that copy; every buffer address is resolved here and nowhere else (INV-VH-1).
//!
//! The layout of a chain is free, as VERSION_1 demands: the readable descriptors are one run of bytes that starts with
//! the 16-byte header, the writable ones are another whose last byte is the status. What does not fit gets a status
//! byte if the chain has one, and is otherwise given back with nothing written.

mod chain;
#[cfg(test)]
mod tests;

pub use chain::Chain;

use crate::config::{SEGMENTS_MAX, ZERO_RANGES_MAX, ZERO_SECTORS_MAX};
use crate::memory::Cursor;
use libc::iovec;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Status byte: done.
pub const STATUS_OK: u8 = 0;
/// Status byte: failed.
pub const STATUS_IOERR: u8 = 1;
/// Status byte: not a request that this device knows.
pub const STATUS_UNSUPP: u8 = 2;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const HEADER_LEN: usize = 16;
const SECTOR: u64 = 512;
const RANGE_LEN: usize = 16;
const FLAG_UNMAP: u32 = 1;
/// A region boundary inside a buffer splits it; more pieces than this are not worth serving.
const PIECES_MAX: usize = SEGMENTS_MAX as usize * 2;

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in 512-byte sectors.
    pub capacity: u64,
    /// Refuse everything that writes.
    pub read_only: bool,
    /// DISCARD was negotiated.
    pub discard: bool,
    /// WRITE_ZEROES was negotiated.
    pub write_zeroes: bool,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Disk to guest.
    #[default]
    Read,
    /// Guest to disk.
    Write,
    /// Make completed writes durable.
    Flush,
    /// The ranges need not keep their content.
    Discard,
    /// The ranges must read as zeros.
    WriteZeroes,
    /// The disk's serial number.
    GetId,
}

/// A range of a DISCARD or WRITE_ZEROES request, inside the disk and not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroRange {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u64,
}

/// A parsed request. Reused from one request to the next to keep its buffers.
#[derive(Debug)]
pub struct Request {
    /// What it asks for.
    pub kind: Kind,
    /// First sector of a read or write.
    pub sector: u64,
    /// Bytes of `data`.
    pub len: usize,
    /// Host addresses of the guest's data buffers, in order.
    pub data: Vec<iovec>,
    /// Ranges of a DISCARD or WRITE_ZEROES.
    pub ranges: Vec<ZeroRange>,
    /// Host address of the status byte; null if the chain has none.
    pub(crate) status: *mut u8,
    /// The side of the chain that holds no data.
    other: Vec<iovec>,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            kind: Kind::Read,
            sector: 0,
            len: 0,
            data: Vec::new(),
            ranges: Vec::new(),
            status: std::ptr::null_mut(),
            other: Vec::new(),
        }
    }
}

/// What to do with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is a valid request: serve it.
    Serve,
    /// It has a status byte: set it to this and give the chain back.
    Answer(u8),
    /// It has no usable status byte: give the chain back with nothing written.
    Unanswerable,
}

/// Parses the chain into `request`, whose former content is lost.
pub fn parse<M: GuestMemoryBackend>(
    memory: &M,
    chain: Chain,
    limits: &Limits,
    request: &mut Request,
) -> Verdict {
    match Parser::new(memory, request).run(chain, limits) {
        Ok(()) => Verdict::Serve,
        Err(Refusal::Status(status)) => Verdict::Answer(status),
        Err(Refusal::NoStatus) => Verdict::Unanswerable,
    }
}

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Status(u8),
    NoStatus,
}

const IOERR: Refusal = Refusal::Status(STATUS_IOERR);
const UNSUPP: Refusal = Refusal::Status(STATUS_UNSUPP);

struct Parser<'a, M> {
    memory: &'a M,
    request: &'a mut Request,
    header: [u8; HEADER_LEN],
    header_len: usize,
    /// Bytes of the readable side behind the header.
    readable: u64,
    /// Bytes of the writable side.
    writable: u64,
    /// A buffer lies outside the guest's memory, is out of order or is one too many.
    bad: bool,
    /// The last writable buffer was resolved to its end.
    status_mapped: bool,
}

impl<'a, M: GuestMemoryBackend> Parser<'a, M> {
    fn new(memory: &'a M, request: &'a mut Request) -> Self {
        request.data.clear();
        request.other.clear();
        request.ranges.clear();
        request.status = std::ptr::null_mut();
        request.len = 0;
        request.sector = 0;
        Self {
            memory,
            request,
            header: [0; HEADER_LEN],
            header_len: 0,
            readable: 0,
            writable: 0,
            bad: false,
            status_mapped: false,
        }
    }

    /// Readable buffers are gathered in `other`, writable ones in `data`; a write swaps them.
    fn run(mut self, chain: Chain, limits: &Limits) -> Result<(), Refusal> {
        let well_formed = chain.walk(self.memory, |descriptor| {
            let address = GuestAddress(descriptor.address);
            if descriptor.writable {
                self.take_writable(address, descriptor.len);
            } else {
                self.take_readable(address, descriptor.len);
            }
        });
        if !well_formed {
            return Err(Refusal::NoStatus);
        }
        self.split_off_status()?;
        if self.bad || self.header_len < HEADER_LEN {
            return Err(IOERR);
        }
        let kind =
            u32::from_le_bytes([self.header[0], self.header[1], self.header[2], self.header[3]]);
        let sector = u64::from_le_bytes(self.header[8..].try_into().expect("eight bytes"));
        match kind {
            TYPE_IN => self.transfer(Kind::Read, sector, limits),
            TYPE_OUT if limits.read_only => Err(IOERR),
            TYPE_OUT => self.transfer(Kind::Write, sector, limits),
            TYPE_FLUSH => self.without_data(Kind::Flush),
            TYPE_GET_ID => self.get_id(),
            TYPE_DISCARD if limits.discard => self.zero(Kind::Discard, limits),
            TYPE_WRITE_ZEROES if limits.write_zeroes => self.zero(Kind::WriteZeroes, limits),
            _ => Err(UNSUPP),
        }
    }

    fn take_readable(&mut self, address: GuestAddress, len: u32) {
        // Readable after writable is out of order (virtio 1.2, 2.7.4.2).
        if self.writable > 0 {
            self.bad = true;
            return;
        }
        for slice in self.memory.get_slices(address, len as usize) {
            let Ok(slice) = slice else {
                self.bad = true;
                return;
            };
            let mut piece =
                iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
            if self.header_len < HEADER_LEN {
                let count = piece.iov_len.min(HEADER_LEN - self.header_len);
                let into = &mut self.header[self.header_len..self.header_len + count];
                // SAFETY: the piece was just resolved to mapped memory of `iov_len` bytes, and `self.memory` lives.
                unsafe { Cursor::new(&[piece], 0).copy_from_guest(into) };
                self.header_len += count;
                piece.iov_base = piece.iov_base.wrapping_byte_add(count);
                piece.iov_len -= count;
            }
            self.readable += piece.iov_len as u64;
            push(&mut self.request.other, piece, &mut self.bad);
        }
    }

    fn take_writable(&mut self, address: GuestAddress, len: u32) {
        if len == 0 {
            return;
        }
        self.writable += u64::from(len);
        self.status_mapped = false;
        let last = address.0.checked_add(u64::from(len) - 1).map(GuestAddress);
        for slice in self.memory.get_slices(address, len as usize) {
            let Ok(slice) = slice else {
                self.bad = true;
                break;
            };
            let piece =
                iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
            push(&mut self.request.data, piece, &mut self.bad);
        }
        // The status byte may be mapped although the buffer before it is not.
        if let Some(slice) = last.and_then(|last| self.memory.get_slice(last, 1).ok()) {
            self.request.status = slice.ptr_guard_mut().as_ptr();
            self.status_mapped = true;
        }
    }

    fn split_off_status(&mut self) -> Result<(), Refusal> {
        if self.writable == 0 || !self.status_mapped {
            self.request.status = std::ptr::null_mut();
            return Err(Refusal::NoStatus);
        }
        self.writable -= 1;
        if let Some(last) = self.request.data.last_mut() {
            last.iov_len -= 1;
            if last.iov_len == 0 {
                self.request.data.pop();
            }
        }
        Ok(())
    }

    fn transfer(&mut self, kind: Kind, sector: u64, limits: &Limits) -> Result<(), Refusal> {
        let (len, unused) = match kind {
            Kind::Write => (self.readable, self.writable),
            _ => (self.writable, self.readable),
        };
        if unused != 0 || len == 0 || len % SECTOR != 0 || len > u64::from(u32::MAX) - 1 {
            return Err(IOERR);
        }
        let end = sector.checked_add(len / SECTOR);
        if end.is_none_or(|end| end > limits.capacity) {
            return Err(IOERR);
        }
        if kind == Kind::Write {
            std::mem::swap(&mut self.request.data, &mut self.request.other);
        }
        self.request.kind = kind;
        self.request.sector = sector;
        self.request.len = usize::try_from(len).map_err(|_| IOERR)?;
        Ok(())
    }

    fn without_data(&mut self, kind: Kind) -> Result<(), Refusal> {
        if self.readable != 0 || self.writable != 0 {
            return Err(IOERR);
        }
        self.request.kind = kind;
        Ok(())
    }

    fn get_id(&mut self) -> Result<(), Refusal> {
        if self.readable != 0 || self.writable == 0 || self.writable > u64::from(u32::MAX) - 1 {
            return Err(IOERR);
        }
        self.request.kind = Kind::GetId;
        self.request.len = usize::try_from(self.writable).map_err(|_| IOERR)?;
        Ok(())
    }

    fn zero(&mut self, kind: Kind, limits: &Limits) -> Result<(), Refusal> {
        let len = usize::try_from(self.readable).map_err(|_| IOERR)?;
        if self.writable != 0
            || len == 0
            || len % RANGE_LEN != 0
            || len > ZERO_RANGES_MAX as usize * RANGE_LEN
        {
            return Err(IOERR);
        }
        let mut cursor = Cursor::new(&self.request.other, 0);
        for _ in 0..len / RANGE_LEN {
            let mut bytes = [0u8; RANGE_LEN];
            // SAFETY: the buffers were resolved to mapped memory of `self.memory`, which lives.
            unsafe { cursor.copy_from_guest(&mut bytes) };
            let range = zero_range(&bytes, kind, limits)?;
            if range.sectors > 0 {
                self.request.ranges.push(range);
            }
        }
        self.request.kind = kind;
        Ok(())
    }
}

fn push(list: &mut Vec<iovec>, piece: iovec, bad: &mut bool) {
    if piece.iov_len == 0 {
        return;
    }
    if list.len() == PIECES_MAX {
        *bad = true;
        return;
    }
    list.push(piece);
}

fn zero_range(bytes: &[u8; RANGE_LEN], kind: Kind, limits: &Limits) -> Result<ZeroRange, Refusal> {
    let sector = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let sectors = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
    let flags = u32::from_le_bytes(bytes[12..].try_into().expect("four bytes"));
    let known = if kind == Kind::WriteZeroes { FLAG_UNMAP } else { 0 };
    if flags & !known != 0 {
        return Err(UNSUPP);
    }
    let end = sector.checked_add(u64::from(sectors));
    if sectors > ZERO_SECTORS_MAX || end.is_none_or(|end| end > limits.capacity) {
        return Err(IOERR);
    }
    Ok(ZeroRange { sector, sectors: u64::from(sectors) })
}
