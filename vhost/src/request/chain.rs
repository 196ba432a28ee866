//! Walking a descriptor chain of a split ring, direct or indirect.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};

const DESCRIPTOR_LEN: usize = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

/// Descriptors of one chain, whatever its table's size: bounds the walk, and with it a loop's cost.
const DESCRIPTORS_MAX: usize = 1024;

/// Where a chain starts.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// The ring's descriptor table.
    pub table: GuestAddress,
    /// Entries in the table.
    pub entries: u16,
    /// Index of the first descriptor.
    pub head: u16,
}

/// A buffer as its descriptor gives it; nothing about it was checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

impl Chain {
    /// Visits the chain's buffers in order; false if the chain is malformed: it leaves its table, loops, or nests
    /// indirect tables.
    pub(super) fn walk<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        mut visit: impl FnMut(Buffer),
    ) -> bool {
        let direct_len = usize::from(self.entries) * DESCRIPTOR_LEN;
        let Ok(mut table) = memory.get_slice(self.table, direct_len) else { return false };
        let mut entries = usize::from(self.entries);
        let mut index = usize::from(self.head);
        let mut indirect = false;
        let mut visited = 0;
        loop {
            if index >= entries || visited == DESCRIPTORS_MAX {
                return false;
            }
            let Ok(entry) = table.get_ref::<Descriptor>(index * DESCRIPTOR_LEN) else {
                return false;
            };
            let descriptor = entry.load();
            let flags = descriptor.flags();
            if flags & FLAG_INDIRECT != 0 {
                let len = descriptor.len() as usize;
                if indirect
                    || flags & FLAG_NEXT != 0
                    || len == 0
                    || !len.is_multiple_of(DESCRIPTOR_LEN)
                {
                    return false;
                }
                let Ok(inner) = memory.get_slice(descriptor.addr(), len) else { return false };
                table = inner;
                entries = len / DESCRIPTOR_LEN;
                index = 0;
                indirect = true;
                continue;
            }
            visited += 1;
            visit(Buffer {
                address: descriptor.addr().0,
                len: descriptor.len(),
                writable: flags & FLAG_WRITE != 0,
            });
            if flags & FLAG_NEXT == 0 {
                return true;
            }
            index = usize::from(descriptor.next());
        }
    }
}
