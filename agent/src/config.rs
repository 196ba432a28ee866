//! What the daemon was told: flags, a TOML file, or both. Flags win over the file, the file over the defaults.
//!
//! A key that is not known is refused with its name, its place and the file's: a misspelt durability or security setting
//! must not pass silently.

use crate::error::{Failure, Kind, Result};
use crate::machine::MACHINE_ID_FILE;
use crate::units::{parse_duration, parse_every, parse_rate, parse_size};
use ballast_vhost::server::{QUEUE_SIZE_MAX, QUEUES_MAX};
use cache::local::LEG_TIMEOUT;
use gc::schedule::{Schedule, ScrubSchedule};
use serde::{Deserialize, Deserializer};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Sound devices take longer than anything below this at times.
const LEG_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// Garbage is collected when less than this percentage of the store is free.
const GC_FREE_BELOW: u8 = 20;
/// And so long after the last cycle.
const GC_EVERY: Duration = Duration::from_secs(24 * 3600);
/// Bytes of metadata that a cycle reads in a second: little beside what guests ask of a SAN.
const GC_RATE: u64 = 64 << 20;
/// Bytes that a cycle's bits and lists may take, at least: less than that is needed in any case.
const GC_MEMORY_MIN: usize = 1 << 20;

/// Bytes unmapped in a second: a command of 64 MiB, a few times.
const GC_UNMAP_RATE: u64 = 512 << 20;

/// A scrub begins so long after the one before began.
const SCRUB_EVERY: Duration = Duration::from_secs(30 * 24 * 3600);
/// Bytes that it reads in a second: a TiB in 18 hours.
const SCRUB_RATE: u64 = 16 << 20;

/// Percentages of the store at which it is warned that so much is used.
const WARN_USED: [u8; 3] = [80, 90, 95];

/// Where sockets go if nothing else was said.
pub const RUN_DIR_DEFAULT: &str = "/run/ballast";

/// How to reach the store's device.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct DeviceArgs {
    /// iSCSI: a file with USER:SECRET in its first line, for CHAP [default: the variable BALLAST_CHAP, if set]
    #[arg(long, value_name = "FILE")]
    pub chap_file: Option<PathBuf>,
    /// iSCSI: the initiator's name [default: derived from this host's name]
    #[arg(long, value_name = "IQN")]
    pub initiator_name: Option<String>,
}

/// Settings of the daemon as given by flags.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct AgentArgs {
    /// Read settings from this TOML file; flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The shared store: file:PATH (a file or block device) or iscsi://HOST[:PORT]/IQN/LUN
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// The local cache: a file, partition or md array. Given twice, with two devices: mirrored on both
    #[arg(long, value_name = "PATH")]
    pub cache: Vec<PathBuf>,
    /// Start without a leg of the mirrored cache that is not there, although it may hold writes that the other lacks
    #[arg(long)]
    pub degraded: bool,
    /// Where this machine's id is, by which a cache that was moved here is known [default: /etc/machine-id]
    #[arg(long, value_name = "FILE")]
    pub machine_id_file: Option<PathBuf>,
    /// A leg of the mirrored cache that does not answer for so long, while the other does, counts as failed [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub leg_timeout: Option<Duration>,
    /// Create the cache with this size if it does not exist yet
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub cache_size: Option<u64>,
    /// What to log: error, warn, info, debug, trace, or a filter like info,cache=debug
    #[arg(long, value_name = "FILTER", env = "BALLAST_LOG")]
    pub log: Option<String>,
    /// This other host, which the store says uses it, is dead for certain: take the store over from it
    #[arg(long, value_name = "UUID")]
    pub take_over_host: Option<uuid::Uuid>,
    /// At the start, wait this long for a store that cannot be reached [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub store_wait: Option<Duration>,
    /// At the stop, spend this long on draining the log to the store [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub shutdown_timeout: Option<Duration>,
    /// Mode of the disks' sockets, octal [default: 0600]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub socket_mode: Option<u32>,
    /// Owner of the disks' sockets: USER, USER:GROUP or :GROUP, names or numbers
    #[arg(long, value_name = "USER:GROUP")]
    pub socket_owner: Option<String>,
    /// Queues offered per disk [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=QUEUES_MAX as i64))]
    pub queues: Option<u16>,
    /// Longest queue that is accepted [default: 1024]
    #[arg(long, value_name = "N", value_parser = parse_queue_size)]
    pub queue_size: Option<u16>,
    /// Poll this many microseconds for new requests before sleeping [default: 0]
    #[arg(long, value_name = "MICROSECONDS")]
    pub poll_us: Option<u32>,
    /// Memory for the store's tree nodes [default: 32MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub node_memory: Option<usize>,
    /// Memory for log segments that wait for their replay [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub segment_memory: Option<usize>,
    /// Commit a write to the store at the latest this long after it was acknowledged
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub flush_max_age: Option<Duration>,
    /// Collect garbage when less than this percentage of the store is free; 0: not for that [default: 20]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub gc_free_below: Option<u8>,
    /// Collect garbage this long after the last time, whatever is free; 0s: not for that [default: 24h]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub gc_every: Option<Duration>,
    /// Most metadata that garbage collection reads in a second; 0: as much as it can [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub gc_rate: Option<u64>,
    /// Tell the store's device of free blocks (UNMAP, hole punching), so that a thin one gives their space back [default: true]
    #[arg(long, value_name = "BOOL")]
    pub gc_unmap: Option<bool>,
    /// Most free space that the device is told of in a second; 0: as much as it takes [default: 512MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub gc_unmap_rate: Option<u64>,
    /// Memory for what garbage collection marks, one bit per block in use; with less it takes several passes [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub gc_memory: Option<usize>,
    /// Verify everything in the store this long after the last time, like 30d; never: only when told [default: 30d]
    #[arg(long, value_name = "TIME", value_parser = parse_every)]
    pub scrub_every: Option<Duration>,
    /// Most that a scrub reads in a second; 0: as much as it can [default: 16MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub scrub_rate: Option<u64>,
    /// Warn when more than this percentage of the store is used; several marks with commas [default: 80,90,95]
    #[arg(long, value_name = "PERCENT,…", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=100))]
    pub warn_used: Option<Vec<u8>>,
    /// Serve metrics for Prometheus at this address of the loopback device, like 127.0.0.1:9477
    #[arg(long, value_name = "ADDRESS", value_parser = crate::metrics::parse_address)]
    pub metrics_listen: Option<SocketAddr>,
}

/// The TOML file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileConfig {
    store: Option<String>,
    run_dir: Option<PathBuf>,
    log: Option<String>,
    chap_file: Option<PathBuf>,
    initiator_name: Option<String>,
    machine_id_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "duration")]
    store_wait: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    shutdown_timeout: Option<Duration>,
    #[serde(default)]
    cache: CacheSection,
    #[serde(default)]
    sockets: SocketSection,
    #[serde(default)]
    disks: DiskSection,
    #[serde(default)]
    memory: MemorySection,
    #[serde(default)]
    flush: FlushSection,
    #[serde(default)]
    gc: GcSection,
    #[serde(default)]
    scrub: ScrubSection,
    #[serde(default)]
    space: SpaceSection,
    #[serde(default)]
    metrics: MetricsSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct GcSection {
    free_below: Option<u8>,
    #[serde(default, deserialize_with = "duration")]
    every: Option<Duration>,
    #[serde(default, deserialize_with = "rate")]
    rate: Option<u64>,
    unmap: Option<bool>,
    #[serde(default, deserialize_with = "rate")]
    unmap_rate: Option<u64>,
    #[serde(default, deserialize_with = "memory")]
    memory: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScrubSection {
    #[serde(default, deserialize_with = "every")]
    every: Option<Duration>,
    #[serde(default, deserialize_with = "rate")]
    rate: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpaceSection {
    warn_used: Option<Vec<u8>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MetricsSection {
    #[serde(default, deserialize_with = "metrics_address")]
    listen: Option<SocketAddr>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemorySection {
    #[serde(default, deserialize_with = "memory")]
    nodes: Option<usize>,
    #[serde(default, deserialize_with = "memory")]
    segments: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CacheSection {
    #[serde(default)]
    paths: Vec<PathBuf>,
    #[serde(default, deserialize_with = "size")]
    size: Option<u64>,
    #[serde(default, deserialize_with = "duration")]
    leg_timeout: Option<Duration>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SocketSection {
    #[serde(default, deserialize_with = "mode")]
    mode: Option<u32>,
    owner: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskSection {
    queues: Option<u16>,
    queue_size: Option<u16>,
    poll_us: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FlushSection {
    #[serde(default, deserialize_with = "duration")]
    max_age: Option<Duration>,
}

/// Settings of the daemon, complete and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentConfig {
    /// URL of the shared store.
    pub store: String,
    /// How to reach it.
    pub device: DeviceArgs,
    /// The cache, or the first of its legs.
    pub cache: PathBuf,
    /// The second leg of a mirrored cache.
    pub cache_twin: Option<PathBuf>,
    /// The operator's word that a leg that is not there holds nothing that the other lacks. Never from the file: it is good
    /// for one start only.
    pub degraded: bool,
    /// Holds what tells this machine from others.
    pub machine_id_file: PathBuf,
    /// A leg that does not answer for so long, while the other does, counts as failed.
    pub leg_timeout: Duration,
    /// Bytes of a cache that does not exist yet.
    pub cache_size: Option<u64>,
    /// Folder of all sockets.
    pub run_dir: PathBuf,
    /// Log filter.
    pub log: String,
    /// The operator's word that this host is dead. Never from the file: it is good for one start only.
    pub take_over_host: Option<uuid::Uuid>,
    /// Patience with an unreachable store at the start.
    pub store_wait: Duration,
    /// Time for draining at the stop.
    pub shutdown_timeout: Duration,
    /// Of the disks' sockets.
    pub socket_mode: u32,
    /// Of the disks' sockets: user id and group id; `None` leaves them as created.
    pub socket_owner: (Option<u32>, Option<u32>),
    /// Queues per disk.
    pub queues: u16,
    /// Longest queue.
    pub queue_size: u16,
    /// Adaptive polling, microseconds.
    pub poll_us: u32,
    /// Bytes for the store's tree nodes.
    pub node_memory: usize,
    /// Bytes for log segments that wait for their replay.
    pub segment_memory: usize,
    /// Longest age of an uncommitted write while the store answers; `None` leaves it to the flusher.
    pub flush_max_age: Option<Duration>,
    /// When garbage is collected.
    pub gc: Schedule,
    /// Bytes of metadata that a cycle reads in a second; 0: as many as it can.
    pub gc_rate: u64,
    /// The device is told of free blocks.
    pub gc_unmap: bool,
    /// Bytes of them in a second; 0: as many as it takes.
    pub gc_unmap_rate: u64,
    /// Bytes of memory that a cycle marks in.
    pub gc_memory: usize,
    /// When the store is scrubbed.
    pub scrub: ScrubSchedule,
    /// Bytes that a scrub reads in a second; 0: as many as it can.
    pub scrub_rate: u64,
    /// Percentages of the store at which it is warned that so much is used, rising.
    pub warn_used: Vec<u8>,
    /// Where metrics are served by TCP, if anywhere; a loopback address.
    pub metrics_listen: Option<SocketAddr>,
}

impl AgentConfig {
    /// Puts flags, file and defaults together. `run_dir` is the global flag (or its environment variable).
    ///
    /// # Errors
    /// [`Kind::Usage`]: the file cannot be read or makes no sense; a setting is missing or not possible.
    pub fn load(args: AgentArgs, run_dir: Option<PathBuf>) -> Result<Self> {
        let file = match &args.config {
            Some(path) => read_file(path)?,
            None => FileConfig::default(),
        };
        merge(args, file, run_dir)
    }

    /// The files or devices of the cache.
    pub fn caches(&self) -> Vec<PathBuf> {
        std::iter::once(&self.cache).chain(&self.cache_twin).cloned().collect()
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new(Kind::Usage, message)
}

fn read_file(path: &Path) -> Result<FileConfig> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        usage(format!("cannot read the configuration file {}: {error}", path.display()))
    })?;
    parse_file(&text)
        .map_err(|failure| failure.within(format_args!("configuration file {}", path.display())))
}

fn parse_file(text: &str) -> Result<FileConfig> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.map(|before| before.matches('\n').count() + 1);
        let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
        let message = error.message().replace("unknown field", "unknown key").replace('\n', " ");
        usage(format!("{place}{message}"))
    })
}

fn merge(args: AgentArgs, file: FileConfig, run_dir: Option<PathBuf>) -> Result<AgentConfig> {
    let store = args.store.or(file.store).ok_or_else(|| {
        usage("no store was named: give --store URL, or 'store = \"…\"' in the configuration file")
    })?;
    let caches = if args.cache.is_empty() { file.cache.paths } else { args.cache };
    let (cache, cache_twin) = one_or_two_legs(caches)?;
    let owner = args.socket_owner.or(file.sockets.owner);
    let queues = args.queues.or(file.disks.queues).unwrap_or(4);
    if !(1..=QUEUES_MAX).contains(&queues) {
        return Err(usage(format!(
            "disks.queues is {queues}: give a number from 1 to {QUEUES_MAX}"
        )));
    }
    let queue_size = args.queue_size.or(file.disks.queue_size).unwrap_or(1024);
    check_queue_size(queue_size).map_err(|words| usage(format!("disks.queue_size: {words}")))?;
    let leg_timeout = args.leg_timeout.or(file.cache.leg_timeout).unwrap_or(LEG_TIMEOUT);
    if leg_timeout < LEG_TIMEOUT_MIN {
        return Err(usage(format!(
            "cache.leg_timeout is {leg_timeout:?}: give {LEG_TIMEOUT_MIN:?} or more, longer than a sound device ever takes"
        )));
    }
    let free_below = args.gc_free_below.or(file.gc.free_below).unwrap_or(GC_FREE_BELOW);
    if free_below > 100 {
        return Err(usage(format!("gc.free_below is {free_below}: give a percentage, 0 to 100")));
    }
    let gc_memory = args.gc_memory.or(file.gc.memory).unwrap_or(gc::MEMORY_DEFAULT as usize);
    if gc_memory < GC_MEMORY_MIN {
        return Err(usage(format!("gc.memory is {gc_memory} bytes: give {GC_MEMORY_MIN} or more")));
    }
    let every = args.gc_every.or(file.gc.every).unwrap_or(GC_EVERY);
    let scrub_every = args.scrub_every.or(file.scrub.every).unwrap_or(SCRUB_EVERY);
    Ok(AgentConfig {
        store,
        device: DeviceArgs {
            chap_file: args.device.chap_file.or(file.chap_file),
            initiator_name: args.device.initiator_name.or(file.initiator_name),
        },
        cache,
        cache_twin,
        degraded: args.degraded,
        machine_id_file: args
            .machine_id_file
            .or(file.machine_id_file)
            .unwrap_or_else(|| MACHINE_ID_FILE.into()),
        leg_timeout,
        cache_size: args.cache_size.or(file.cache.size),
        run_dir: run_dir.or(file.run_dir).unwrap_or_else(|| RUN_DIR_DEFAULT.into()),
        log: args.log.or(file.log).unwrap_or_else(|| "info".into()),
        take_over_host: args.take_over_host,
        store_wait: args.store_wait.or(file.store_wait).unwrap_or(Duration::from_secs(30)),
        shutdown_timeout: args
            .shutdown_timeout
            .or(file.shutdown_timeout)
            .unwrap_or(Duration::from_secs(10)),
        socket_mode: args.socket_mode.or(file.sockets.mode).unwrap_or(0o600),
        socket_owner: owner.map_or(Ok((None, None)), |owner| resolve_owner(&owner))?,
        queues,
        queue_size,
        poll_us: args.poll_us.or(file.disks.poll_us).unwrap_or(0),
        node_memory: args.node_memory.or(file.memory.nodes).unwrap_or(32 << 20),
        segment_memory: args.segment_memory.or(file.memory.segments).unwrap_or(64 << 20),
        flush_max_age: args.flush_max_age.or(file.flush.max_age),
        gc: Schedule { free_below, every: Some(every).filter(|every| !every.is_zero()) },
        gc_rate: args.gc_rate.or(file.gc.rate).unwrap_or(GC_RATE),
        gc_unmap: args.gc_unmap.or(file.gc.unmap).unwrap_or(true),
        gc_unmap_rate: args.gc_unmap_rate.or(file.gc.unmap_rate).unwrap_or(GC_UNMAP_RATE),
        gc_memory,
        scrub: ScrubSchedule { every: Some(scrub_every).filter(|every| !every.is_zero()) },
        scrub_rate: args.scrub_rate.or(file.scrub.rate).unwrap_or(SCRUB_RATE),
        warn_used: marks(args.warn_used.or(file.space.warn_used))?,
        metrics_listen: args.metrics_listen.or(file.metrics.listen),
    })
}

fn marks(given: Option<Vec<u8>>) -> Result<Vec<u8>> {
    let mut marks = given.unwrap_or_else(|| WARN_USED.to_vec());
    if let Some(mark) = marks.iter().find(|mark| !(1..=100).contains(*mark)) {
        return Err(usage(format!("space.warn_used has {mark}: give percentages, 1 to 100")));
    }
    marks.sort_unstable();
    marks.dedup();
    Ok(marks)
}

fn one_or_two_legs(caches: Vec<PathBuf>) -> Result<(PathBuf, Option<PathBuf>)> {
    let count = caches.len();
    let mut legs = caches.into_iter();
    match (legs.next(), legs.next(), legs.next()) {
        (None, ..) => Err(usage(
            "no cache was named: give --cache PATH, or 'paths = [\"…\"]' in section [cache] of the configuration file",
        )),
        (Some(cache), twin, None) => Ok((cache, twin)),
        (Some(first), _, Some(third)) => Err(usage(format!(
            "{count} caches were named ({} to {}): a cache is mirrored on two devices at most; name one or two",
            first.display(),
            third.display()
        ))),
    }
}

fn check_queue_size(size: u16) -> Result<u16, String> {
    if size.is_power_of_two() && (2..=QUEUE_SIZE_MAX).contains(&size) {
        Ok(size)
    } else {
        Err(format!("{size} is not possible: give a power of two from 2 to {QUEUE_SIZE_MAX}"))
    }
}

fn parse_queue_size(text: &str) -> Result<u16, String> {
    check_queue_size(text.parse().map_err(|_| format!("'{text}' is not a number up to 4096"))?)
}

fn parse_memory(text: &str) -> Result<usize, String> {
    usize::try_from(parse_size(text)?)
        .map_err(|_| format!("'{text}' is more memory than there can be"))
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("'{text}' is not a file mode: write it in octal, like 0660")),
    }
}

/// Resolves `USER`, `USER:GROUP` or `:GROUP` to ids.
fn resolve_owner(owner: &str) -> Result<(Option<u32>, Option<u32>)> {
    let (user, group) = owner.split_once(':').unwrap_or((owner, ""));
    let unknown = |what: &str, name: &str| {
        usage(format!("socket owner '{owner}': there is no {what} '{name}' on this host"))
    };
    let uid = match (user, user.parse()) {
        ("", _) => None,
        (_, Ok(uid)) => Some(uid),
        (name, Err(_)) => {
            let found = nix::unistd::User::from_name(name).ok().flatten();
            Some(found.ok_or_else(|| unknown("user", name))?.uid.as_raw())
        }
    };
    let gid = match (group, group.parse()) {
        ("", _) => None,
        (_, Ok(gid)) => Some(gid),
        (name, Err(_)) => {
            let found = nix::unistd::Group::from_name(name).ok().flatten();
            Some(found.ok_or_else(|| unknown("group", name))?.gid.as_raw())
        }
    };
    Ok((uid, gid))
}

/// A size in TOML: text with a unit, or plain bytes.
#[derive(Deserialize)]
#[serde(untagged)]
enum TextOrNumber {
    Text(String),
    Number(u64),
}

impl TextOrNumber {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Number(number) => number.to_string(),
        }
    }
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = TextOrNumber::deserialize(from)?.into_text();
    parse_size(&text).map(Some).map_err(serde::de::Error::custom)
}

fn rate<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = TextOrNumber::deserialize(from)?.into_text();
    parse_rate(&text).map(Some).map_err(serde::de::Error::custom)
}

fn every<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = TextOrNumber::deserialize(from)?.into_text();
    parse_every(&text).map(Some).map_err(serde::de::Error::custom)
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = TextOrNumber::deserialize(from)?.into_text();
    parse_duration(&text).map(Some).map_err(serde::de::Error::custom)
}

fn memory<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    let text = TextOrNumber::deserialize(from)?.into_text();
    parse_memory(&text).map(Some).map_err(serde::de::Error::custom)
}

fn metrics_address<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    crate::metrics::parse_address(&text).map(Some).map_err(serde::de::Error::custom)
}

/// A mode must be text: a bare 0660 is no TOML, and a bare 660 would be decimal.
fn mode<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(from)?;
    parse_mode(&text).map(Some).map_err(serde::de::Error::custom)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
