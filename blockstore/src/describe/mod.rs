//! Any block of a store in words, for `store dump`. Pure; every structure is decoded by the code that the store itself reads it
//! with.
//!
//! What a block should be follows from its place, and for nodes, lists of snapshots, names and data from who points at it. A block
//! that nobody is known to point at is taken for what it looks like, and that is said.

mod fields;
mod region;

pub use region::Region;

use crate::buf::is_zero;
use crate::crc::crc32c;
use crate::format::bitmap::{BitmapKind, BitmapPage};
use crate::format::extent::{ExtentHeader, ExtentRecord, ExtentType};
use crate::format::gc::GcRecord;
use crate::format::geometry::Geometry;
use crate::format::head::{Damage, Head, Record, is_unused};
use crate::format::host::HostRecord;
use crate::format::meta::VdiMeta;
use crate::format::node::{NODE_ENTRIES, Node};
use crate::format::pointer::Pointer;
use crate::format::superblock::Superblock;
use crate::format::vdi::VdiHead;
use crate::snapshots::decode_leaf;
use crate::types::{BLOCK_SIZE, Gba};
use fields::{Fields, pointer_words};
use serde::{Serialize, Serializer};
use uuid::Uuid;

/// Bytes that are shown of what is not understood.
const HEX_BYTES: usize = 64;

/// Whether a block is what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Verdict {
    /// Its checksum and its fields are right.
    Good,
    /// It was never written, or zeroed.
    Unused,
    /// It is not what it should be.
    Damaged {
        /// Why.
        why: String,
    },
    /// The checksum stands with whoever points at it, and nobody is known to.
    Unknown,
}

/// What somebody who points at a block takes it for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A disk's name block.
    Name,
    /// A node of a disk's tree; leaves are level 1.
    Node(u8),
    /// A node of the tree that lists a disk's snapshots.
    SnapshotNode(u8),
    /// A leaf of that tree.
    SnapshotLeaf,
    /// A block of a disk.
    Data,
}

/// What is known of the store that a block lies in.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// The store.
    pub store: Uuid,
    /// Where things lie.
    pub geometry: &'a Geometry,
}

/// One thing in a block that has many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Which.
    pub place: u64,
    /// What.
    pub is: String,
}

/// A block in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Described {
    /// Its number: its GBA.
    pub block: u64,
    /// Where it begins on the device, in bytes.
    pub offset: u64,
    /// Where it lies in the store.
    pub lies_in: String,
    /// What it holds.
    pub holds: String,
    /// Whether that is as it should be.
    pub verdict: Verdict,
    /// What the structure says, by name, in order.
    #[serde(serialize_with = "as_map")]
    pub fields: Vec<(&'static str, String)>,
    /// Its entries that are in use, if it has such.
    pub entries: Vec<Entry>,
    /// The first bytes of what is not understood.
    pub hex: Vec<String>,
}

fn as_map<S: Serializer>(fields: &[(&'static str, String)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(fields.iter().map(|(name, value)| (name, value)))
}

impl Described {
    /// True if it is not what it should be.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        matches!(self.verdict, Verdict::Damaged { .. })
    }
}

/// What a structure's decoder made of a block.
struct Decoded {
    holds: String,
    verdict: Verdict,
    fields: Fields,
    entries: Vec<Entry>,
}

impl Decoded {
    fn new(holds: impl Into<String>, verdict: Verdict, fields: Fields) -> Self {
        Self { holds: holds.into(), verdict, fields, entries: Vec::new() }
    }

    fn damaged(holds: &str, why: impl ToString) -> Self {
        let why = why.to_string();
        Self::new(holds, Verdict::Damaged { why }, Vec::new())
    }
}

/// Describes a block by its place in the store, or by who points at it.
#[must_use]
pub fn describe(
    block: &[u8],
    address: Gba,
    within: Surroundings<'_>,
    pointed: Option<(Role, Pointer)>,
    extent: Option<ExtentType>,
) -> Described {
    let region = Region::of(within.geometry, address);
    let store = within.store;
    let decoded = match region {
        Region::Superblock(_) => record::<Superblock>("a superblock", block, address, store),
        Region::Gc(_) => record::<GcRecord>("the GC record", block, address, store),
        Region::Host(..) => record::<HostRecord>("a host record", block, address, store),
        Region::Vdi(..) => record::<VdiHead>("a VDI head", block, address, store),
        Region::Catalogue(_) => record::<ExtentRecord>("an extent's record", block, address, store),
        Region::ExtentHeader(_) => {
            record::<ExtentHeader>("an extent's header", block, address, store)
        }
        Region::Bitmap(extent, page) => {
            bitmap(block, BitmapKind::Allocation, address, within, extent, page)
        }
        Region::Reclaim(extent, page) => {
            bitmap(block, BitmapKind::Reclaim, address, within, extent, page)
        }
        Region::Block(..) => match pointed {
            Some((role, pointer)) => as_pointed(block, role, pointer, within.geometry),
            None => by_looks(block, within.geometry, extent),
        },
        Region::Spare | Region::Beyond => any_record(block, address),
    };
    finish(block, address, region.to_string(), decoded)
}

/// Describes a block of a device whose superblocks cannot be read, by what it says itself.
#[must_use]
pub fn describe_alone(block: &[u8], address: Gba) -> Described {
    finish(
        block,
        address,
        "a device whose superblocks tell nothing".into(),
        any_record(block, address),
    )
}

fn finish(block: &[u8], address: Gba, lies_in: String, decoded: Decoded) -> Described {
    let Decoded { holds, verdict, mut fields, entries } = decoded;
    let nothing_said = fields.is_empty() && entries.is_empty();
    let mut hex = Vec::new();
    if nothing_said && block.iter().any(|&byte| byte != 0) {
        fields.push(("crc32c of the block", format!("{:08x}", crc32c(block))));
        let other = block.iter().filter(|&&byte| byte != 0).count();
        fields.push(("bytes that are not zero", other.to_string()));
        hex = block.chunks(16).take(HEX_BYTES / 16).map(hex_line).collect();
    }
    let offset = address.0.saturating_mul(BLOCK_SIZE as u64);
    Described { block: address.0, offset, lies_in, holds, verdict, fields, entries, hex }
}

fn hex_line(bytes: &[u8]) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let printable = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' };
    format!("{}  {}", hex.join(" "), bytes.iter().map(printable).collect::<String>())
}

/// A record that should be of kind `T`, of this store.
fn record<T: Record + fields::Say>(what: &str, block: &[u8], address: Gba, store: Uuid) -> Decoded {
    if is_unused(block) {
        return Decoded::new(format!("{what}: never used"), Verdict::Unused, Vec::new());
    }
    match Head::<T>::decode(block, address) {
        Ok(head) if head.store == store => said(what, &head),
        // It can be read all the same.
        Ok(head) => {
            let why = Damage::Store(head.store).to_string();
            Decoded { verdict: Verdict::Damaged { why }, ..said(what, &head) }
        }
        Err(damage) => Decoded::damaged(what, damage),
    }
}

fn said<T: Record + fields::Say>(what: &str, head: &Head<T>) -> Decoded {
    let mut fields =
        vec![("store", head.store.to_string()), ("sequence", head.sequence.to_string())];
    head.record.say(&mut fields);
    Decoded::new(what, Verdict::Good, fields)
}

/// Whatever record says that it is one, here.
fn any_record(block: &[u8], address: Gba) -> Decoded {
    fn try_one<T: Record + fields::Say>(
        what: &str,
        block: &[u8],
        address: Gba,
    ) -> Result<Decoded, Damage> {
        Head::<T>::decode(block, address).map(|head| said(what, &head))
    }
    if is_zero(block) {
        return Decoded::new("nothing: all zeros", Verdict::Unused, Vec::new());
    }
    let first = match try_one::<Superblock>("a superblock", block, address) {
        Ok(decoded) => return decoded,
        Err(damage) => damage,
    };
    let others = [
        try_one::<GcRecord>("a GC record", block, address),
        try_one::<HostRecord>("a host record", block, address),
        try_one::<ExtentRecord>("an extent's record", block, address),
        try_one::<VdiHead>("a VDI head", block, address),
        try_one::<ExtentHeader>("an extent's header", block, address),
    ];
    if let Some(decoded) = others.into_iter().find_map(Result::ok) {
        return decoded;
    }
    match first {
        Damage::Magic => Decoded::damaged("nothing that is known", "it starts as no record does"),
        damage => Decoded::damaged("a record that cannot be read", damage),
    }
}

fn bitmap(
    block: &[u8],
    kind: BitmapKind,
    address: Gba,
    within: Surroundings<'_>,
    extent: u32,
    page: u32,
) -> Decoded {
    let what = match kind {
        BitmapKind::Allocation => "a page of an allocation bitmap",
        BitmapKind::Reclaim => "a page of a reclaim bitmap",
    };
    if is_zero(block) {
        return Decoded::new(format!("{what}: never used"), Verdict::Unused, Vec::new());
    }
    let content = match BitmapPage::decode(block, kind, within.store, address) {
        Ok(content) => content,
        Err(damage) => return Decoded::damaged(what, damage),
    };
    let (bits, first) = (within.geometry.page_bits(page), within.geometry.extent_base(extent));
    let first = first.plus(u64::from(page) * crate::format::bitmap::PAGE_BITS);
    let clear = content.clear_bits(bits);
    let mut fields = vec![
        ("sequence", content.sequence.to_string()),
        ("stands for", format!("blocks {first} to {}", first.plus(bits.saturating_sub(1)))),
    ];
    match kind {
        BitmapKind::Allocation => {
            fields.push((
                "allocated",
                format!("{} blocks, header and bitmaps among them", bits - clear),
            ));
            fields.push(("free", format!("{clear} blocks")));
        }
        BitmapKind::Reclaim => {
            fields.push(("of GC epoch", content.gc_epoch.to_string()));
            fields.push(("for extent record of sequence", content.extent_sequence.to_string()));
            fields.push(("for owner's generation", content.owner_generation.to_string()));
            fields.push(("names", format!("{} blocks that nothing reached", bits - clear)));
        }
    }
    Decoded { entries: runs(&content, bits, first), ..Decoded::new(what, Verdict::Good, fields) }
}

/// Runs of clear bits, the first of them.
fn runs(content: &BitmapPage, bits: u64, base: Gba) -> Vec<Entry> {
    const RUNS_MAX: usize = 32;
    let (mut found, mut from) = (Vec::new(), 0);
    while let Some((first, len)) = content.next_clear_run(from, bits) {
        if found.len() == RUNS_MAX {
            found.push(Entry { place: first, is: "and so on".into() });
            break;
        }
        let (start, end) = (base.plus(first), base.plus(first + len - 1));
        found.push(Entry { place: first, is: format!("blocks {start} to {end} are clear") });
        from = first + len;
    }
    found
}

/// A block as those who point at it take it, with their checksum.
fn as_pointed(block: &[u8], role: Role, pointer: Pointer, g: &Geometry) -> Decoded {
    let mut decoded = match role {
        Role::Name => name(block),
        Role::Node(level) => node(block, &format!("a node of level {level} of a disk's tree"), g),
        Role::SnapshotNode(level) => {
            node(block, &format!("a node of level {level} of a list of snapshots"), g)
        }
        Role::SnapshotLeaf => leaf(block),
        Role::Data => Decoded::new("a block of a disk", Verdict::Good, Vec::new()),
    };
    if !pointer.matches(block) {
        let (found, expected) = (crc32c(block), pointer.crc);
        let why = format!("checksum is {found:08x}, expected {expected:08x} by who points at it");
        decoded.verdict = Verdict::Damaged { why };
    }
    decoded
}

/// A block that nobody is known to point at.
fn by_looks(block: &[u8], g: &Geometry, extent: Option<ExtentType>) -> Decoded {
    if is_zero(block) {
        return Decoded::new("nothing: all zeros", Verdict::Unused, Vec::new());
    }
    let looks = |decoded: Decoded| {
        let Decoded { holds, fields, entries, .. } = decoded;
        Decoded {
            holds: format!("by its looks {holds}"),
            verdict: Verdict::Unknown,
            fields,
            entries,
        }
    };
    if extent == Some(ExtentType::Data) {
        return Decoded::new("by its extent a block of a disk", Verdict::Unknown, Vec::new());
    }
    let candidates = [name(block), leaf(block), node(block, "a node of a tree", g)];
    match candidates.into_iter().find(|decoded| decoded.verdict == Verdict::Good) {
        Some(decoded) => looks(decoded),
        None => Decoded::new("nothing that is known", Verdict::Unknown, Vec::new()),
    }
}

fn name(block: &[u8]) -> Decoded {
    const WHAT: &str = "a disk's name block";
    match VdiMeta::decode(block) {
        Ok(meta) => {
            let fields = vec![
                ("name", meta.name),
                ("disk", meta.uuid.to_string()),
                ("when the store is away", meta.policy.when_offline.to_string()),
                ("snapshots by themselves", meta.policy.schedule.to_string()),
                ("created", fields::time(meta.created_ms)),
            ];
            Decoded::new(WHAT, Verdict::Good, fields)
        }
        Err(damage) => Decoded::damaged(WHAT, damage),
    }
}

fn leaf(block: &[u8]) -> Decoded {
    const WHAT: &str = "a leaf of a list of snapshots";
    let snapshots = match decode_leaf(block) {
        Ok(snapshots) => snapshots,
        Err(problem) => return Decoded::damaged(WHAT, problem),
    };
    let entries: Vec<Entry> = snapshots
        .into_iter()
        .map(|(place, snapshot)| Entry { place, is: fields::snapshot_words(&snapshot) })
        .collect();
    let fields = vec![("snapshots", entries.len().to_string())];
    Decoded { entries, ..Decoded::new(WHAT, Verdict::Good, fields) }
}

fn node(block: &[u8], what: &str, g: &Geometry) -> Decoded {
    let node = match Node::decode(block) {
        Ok(node) => node,
        Err(damage) => return Decoded::damaged(what, damage),
    };
    let stray = node.children().find(|(_, child)| !g.is_allocatable(child.gba));
    let entries: Vec<Entry> = node
        .children()
        .map(|(slot, child)| Entry { place: slot.into(), is: pointer_words(&child) })
        .collect();
    let fields = vec![("children", format!("{} of {NODE_ENTRIES}", entries.len()))];
    let verdict = match stray {
        Some((slot, child)) => {
            let why = format!("entry {slot} names block {}, which no tree block can be", child.gba);
            Verdict::Damaged { why }
        }
        None => Verdict::Good,
    };
    Decoded { entries, ..Decoded::new(what, verdict, fields) }
}

#[cfg(test)]
mod tests;
