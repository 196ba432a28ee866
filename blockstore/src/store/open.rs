//! Opening a store.
//!
//! Order for a writer (rule C2): read the superblock; register in the host table with the next
//! generation; raise every own VDI head by one compare-and-write, which makes any late command of an
//! earlier incarnation fail; only then allocate. Heads that the device does not write are left for later (`unraised.rs`).

use crate::alloc::{Allocator, Territory};
use crate::device::Device;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::ExtentRecord;
use crate::format::geometry::Geometry;
use crate::format::head::{Damage, Head, MAGIC};
use crate::format::superblock::Superblock;
use crate::format::vdi::{Owner, VdiHead, VdiState};
use crate::holds::SnapshotHolds;
use crate::io::{Io, Patience};
use crate::node_cache::NodeCache;
use crate::slot::{Records, Slot, Swap, View};
use crate::store::unraised::take_up_vdis;
use crate::store::{Background, Core, Store, Writer, hosts, scan_vdis};
use crate::tree::Reader;
use crate::tree::reclaim::Reclaimer;
use crate::types::{BLOCK_SIZE, Gba};
use hashbrown::HashMap;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;

/// Catalogue blocks read at once.
const CATALOGUE_BLOCKS: u64 = 256;

/// Records of extents that the device does not read, after which the others are not asked for one by one.
pub(crate) const UNREADABLE_MAX: u32 = 64;

/// How often a disk's head is raised while it changes: each late command can do that once.
const TAKE_UP_ATTEMPTS: u32 = 8;

/// How to open a store.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// This host's identity, kept in its state directory. Not used when read-only.
    pub host_uuid: Uuid,
    /// For people.
    pub host_name: String,
    /// For people.
    pub host_address: String,
    /// Change nothing: no registration, no attaching.
    pub read_only: bool,
    /// Even a store that is larger than its device: for tools that show what is there.
    pub any_size: bool,
    /// The operator's word that this other host, which its record says is up, is dead.
    pub take_over_host: Option<Uuid>,
    /// Bytes of memory for tree nodes.
    pub node_cache_bytes: usize,
    /// How long opening and control operations wait for a device that does not answer.
    pub control_timeout: Duration,
    /// The device is told of free blocks ([`Store::unmap`]): extents are given up only after that.
    pub unmap: bool,
    /// Snapshots that are not to be deleted while somebody reads them.
    pub holds: Arc<SnapshotHolds>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            host_uuid: Uuid::nil(),
            host_name: String::new(),
            host_address: String::new(),
            read_only: false,
            any_size: false,
            take_over_host: None,
            node_cache_bytes: 32 << 20,
            control_timeout: Duration::from_secs(10),
            unmap: false,
            holds: Arc::default(),
        }
    }
}

impl OpenOptions {
    /// For tools that change nothing.
    #[must_use]
    pub fn read_only() -> Self {
        Self { read_only: true, ..Self::default() }
    }
}

impl Store {
    /// Opens the store on a device.
    ///
    /// # Errors
    /// `NotAStore`, `NewerVersion`, `Damaged`; `InUse` naming the host that uses it; `Invalid` if the
    /// device is smaller than the store or lacks what it needs; `Unreachable` and the device's.
    pub async fn open(device: Device, options: OpenOptions) -> Result<Arc<Self>> {
        let io = Io::new(device, Patience::Forever);
        let control_io = io.with_patience(Patience::Limited(options.control_timeout));
        let head = read_superblock(&control_io).await?;
        let superblock = head.record;
        check_device(&io, &superblock, &options)?;
        let logical_block = if superblock.single_host {
            BLOCK_SIZE
        } else {
            (io.device().info().logical_block as usize).clamp(512, BLOCK_SIZE)
        };
        let records =
            Records { store: head.store, single_host: superblock.single_host, logical_block };
        let reader = Reader {
            io: io.clone(),
            geometry: superblock.geometry.clone(),
            nodes: NodeCache::new(options.node_cache_bytes),
        };
        let mut core = Core { io, superblock, records, reader, writer: None };
        let mut background = None;
        if !options.read_only {
            // From here on patiently: writes in place must not be given up half way.
            let writer = join(&core, &core.io, &options).await?;
            let (stop, stopped) = watch::channel(false);
            let work = Arc::clone(&writer.reclaimer).run(core.reader.clone(), stopped);
            background = Some(Background { stop, task: tokio::spawn(work) });
            core.writer = Some(writer);
        }
        Ok(Arc::new(Self {
            core: Arc::new(core),
            control_io,
            registry: tokio::sync::Mutex::default(),
            latest: Default::default(),
            attached: Mutex::new(HashMap::new()),
            holds: options.holds,
            background: Mutex::new(background),
        }))
    }
}

/// Enters the store as a host.
async fn join(core: &Core, io: &Io, options: &OpenOptions) -> Result<Writer> {
    if options.host_uuid.is_nil() {
        return Err(StoreError::new(
            StoreErrorKind::Invalid,
            core.io.url(),
            "a host needs an identity to open the store for writing",
        ));
    }
    let geometry = &core.superblock.geometry;
    let generation = hosts::register(io, &core.records, geometry, options).await?;
    let owner = Owner { host: options.host_uuid, generation };
    let unraised = take_up_vdis(core, io, owner, scan_vdis(core, io).await?).await?;
    let territory = Territory {
        geometry: geometry.clone(),
        records: core.records.clone(),
        host: options.host_uuid,
        generation,
    };
    let catalogue = scan_extents_readable(io, &core.records, geometry).await?;
    let allocator = Arc::new(Allocator::open(io, territory, catalogue).await?);
    if options.unmap {
        allocator.keep_unmapped(io, true).await;
    }
    let (host, reclaimer) = (options.host_uuid, Reclaimer::new(allocator));
    Ok(Writer { host, generation, reclaimer, unraised: Mutex::new(unraised) })
}

/// Raises the head of a disk of this host, or ends what an earlier incarnation left half done there. A late command of that one, or of
/// an attempt that failed, may change the head once more: it is judged again.
pub(super) async fn take_up_vdi(
    core: &Core,
    io: &Io,
    owner: Owner,
    slot: u32,
    mut view: View<VdiHead>,
) -> Result<()> {
    let mut attempts_left = TAKE_UP_ATTEMPTS;
    loop {
        let Some(head) = view.record().filter(|h| h.owner.is_some_and(|o| o.host == owner.host))
        else {
            return Ok(());
        };
        let next = match head.state {
            VdiState::Active => VdiHead { owner: Some(owner), ..head.clone() },
            // Never shown to anyone; what it held leaks until GC.
            VdiState::Creating | VdiState::Deleting => head.clone().buried(),
            VdiState::Tombstone => return Ok(()),
        };
        attempts_left -= 1;
        match core.records.swap(io, &view, next).await? {
            Swap::Lost(found) if attempts_left > 0 && is_of_earlier(&found, owner) => view = found,
            swap => {
                swap.done(|| format!("{}, VDI slot {slot}", core.io.url()))?;
                return Ok(());
            }
        }
    }
}

/// The head is one that an incarnation of this host wrote, not a later one.
fn is_of_earlier(view: &View<VdiHead>, owner: Owner) -> bool {
    let written_by = view.record().and_then(|head| head.owner);
    written_by.is_some_and(|by| by.host == owner.host && by.generation <= owner.generation)
}

pub(crate) async fn scan_extents(
    io: &Io,
    records: &Records,
    g: &Geometry,
) -> Result<Vec<View<ExtentRecord>>> {
    let count = u64::from(g.extent_count);
    let mut views = Vec::with_capacity(count as usize);
    while (views.len() as u64) < count {
        let next = views.len() as u64;
        let first = Slot { first: Gba(g.extent_start + next), paired: false };
        let blocks = CATALOGUE_BLOCKS.min(count - next);
        views.extend(records.read_run(io, first, blocks).await?);
    }
    Ok(views)
}

/// The same; a record that the device lastingly does not read is damaged, and one bad sector keeps nobody from the others. Nothing is
/// said of it in the device's health.
///
/// # Errors
/// The device's, but for lasting ones.
pub(crate) async fn scan_extents_readable(
    io: &Io,
    records: &Records,
    g: &Geometry,
) -> Result<Vec<View<ExtentRecord>>> {
    let io = &io.giving_up();
    let is_lasting = |error: &StoreError| error.kind == StoreErrorKind::Device;
    let count = u64::from(g.extent_count);
    let mut views: Vec<View<ExtentRecord>> = Vec::with_capacity(count as usize);
    let mut unreadable = 0;
    while (views.len() as u64) < count {
        let next = views.len() as u64;
        let slot = |number| Slot { first: Gba(g.extent_start + number), paired: false };
        let blocks = CATALOGUE_BLOCKS.min(count - next);
        match records.read_run(io, slot(next), blocks).await {
            Err(error) if is_lasting(&error) => {}
            run => {
                views.extend(run?);
                continue;
            }
        }
        for number in next..next + blocks {
            let slot = slot(number);
            if unreadable == UNREADABLE_MAX {
                views.push(View::unreadable(slot));
                continue;
            }
            let mut view = records.read(io, slot).await;
            if view.as_ref().is_err_and(is_lasting) {
                // The third time, with that of the run.
                view = records.read(io, slot).await;
            }
            views.push(match view {
                Err(error) if is_lasting(&error) => {
                    tracing::warn!(extent = number, %error, "the record of an extent cannot be read");
                    unreadable += 1;
                    View::unreadable(slot)
                }
                view => view?,
            });
        }
    }
    Ok(views)
}

/// Reads the superblock, or its copy if the first is damaged.
async fn read_superblock(io: &Io) -> Result<Head<Superblock>> {
    let mut block = io.read(Gba(0), 1).await?;
    if matches!(Head::<Superblock>::decode(&block, Gba(0)), Err(Damage::Crc { .. })) {
        // The fault may be on the way.
        block = io.read(Gba(0), 1).await?;
    }
    let damage = match Head::<Superblock>::decode(&block, Gba(0)) {
        Ok(head) => return Ok(head),
        Err(Damage::Newer(version)) => return Err(newer(io, version)),
        Err(damage) => damage,
    };
    if let Some(copy) = find_copy(io).await? {
        tracing::warn!(
            store = io.url(), %damage,
            "the first superblock is damaged; using its copy at the end of the first extent"
        );
        return Ok(copy);
    }
    if block.starts_with(&MAGIC) {
        return Err(StoreError::new(
            StoreErrorKind::Damaged,
            io.url(),
            format!("both superblocks are damaged ({damage})"),
        ));
    }
    let what = super::foreign_signature(&block)
        .map_or(String::new(), |what| format!(" It seems to hold {what}."));
    Err(StoreError::new(
        StoreErrorKind::NotAStore,
        io.url(),
        format!("the device holds no Ballast store.{what} Make one with 'ballast store format'"),
    ))
}

/// The copy lies at the end of extent 0, whose size is one of a few powers of two.
async fn find_copy(io: &Io) -> Result<Option<Head<Superblock>>> {
    for address in Geometry::copy_places(io.device().info().capacity) {
        let block = io.read(address, 1).await?;
        match Head::<Superblock>::decode(&block, address) {
            Ok(head) if head.record.geometry.superblocks()[1] == address => return Ok(Some(head)),
            Err(Damage::Newer(version)) => return Err(newer(io, version)),
            _ => {}
        }
    }
    Ok(None)
}

fn newer(io: &Io, version: u16) -> StoreError {
    StoreError::new(
        StoreErrorKind::NewerVersion,
        io.url(),
        format!(
            "the store has format version {version} or uses features that this program does not know; \
             install the version of Ballast that formatted or upgraded it"
        ),
    )
}

fn check_device(io: &Io, superblock: &Superblock, options: &OpenOptions) -> Result<()> {
    let info = io.device().info();
    let invalid = |problem| Err(StoreError::new(StoreErrorKind::Invalid, io.url(), problem));
    if info.capacity < superblock.device_size && !options.any_size {
        return invalid(format!(
            "the device has {} bytes, but the store was formatted with {}; it was cut short or this is \
             another device",
            info.capacity, superblock.device_size
        ));
    }
    if !superblock.single_host && !info.compare_and_write && !options.read_only {
        return invalid(
            "the store needs compare-and-write, which this path to the device does not offer; use \
             another path, or format for a single host"
                .to_owned(),
        );
    }
    Ok(())
}
