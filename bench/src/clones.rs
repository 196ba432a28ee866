//! What many of a kind cost: clones of one snapshot, snapshots of one disk, and the store's blocks per snapshot.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::ballast::{Ballast, DISK_NAME};
use crate::collecting::{Cycle, collect};
use crate::control::Control;
use crate::outage::{Latency, histogram};
use crate::snapping::{Snapper, Way};
use crate::stage::{NO_CYCLES, NO_LIMIT, Stage};
use crate::suite::Settings;
use crate::synthetic::{Shape, disk_name};

/// Cache of the agents.
const CACHE_BYTES: u64 = 256 << 20;
/// Between two empty snapshots.
const EMPTY_INTERVAL: Duration = Duration::from_millis(10);

/// Clones of one snapshot.
#[derive(Debug, Clone, Copy)]
pub struct Clones {
    /// Bytes of the disk, and of those the ones that were written.
    pub disk_bytes: u64,
    /// The same.
    pub used_bytes: u64,
    /// The first of them.
    pub first: Duration,
    /// Each of them.
    pub each: Latency,
    /// The last tenth of them.
    pub last: Latency,
    /// All together, one after the other.
    pub all: Duration,
    /// A list of all disks, with all clones there.
    pub list: Duration,
    /// Attaching a disk, before there was a clone and with all there.
    pub attach: (Duration, Duration),
    /// A cycle of collection with all clones there.
    pub cycle: Cycle,
}

/// Clones a snapshot of a disk `count` times, one after the other.
///
/// # Errors
/// When there is no agent to measure, or it fails.
pub fn clones(settings: &Settings, disk_bytes: u64, used_bytes: u64, count: u32) -> Result<Clones> {
    let disk_bytes = disk_bytes.next_multiple_of(4096);
    // A larger store has more places for disks.
    let room_bytes = 64 << 30;
    let shape = Shape { used_bytes, disk_bytes, room_bytes, snapshots: 1, ..Shape::default() };
    let stage = stage(settings, &shape)?;
    let mut control = stage.control()?;
    let name = disk_name(0);
    let attach_before = attach_and_detach(&mut control)?;
    let from = newest(&mut control, &name)?;
    let (mut each, mut last, mut first) = (histogram()?, histogram()?, None);
    let begun = Instant::now();
    for number in 0..count {
        let body = json!({ "name": format!("c{number}"), "from": { "vdi": name, "snapshot": from.to_string() } });
        let took = timed(&mut each, || control.post("/v1/vdis", &body))?;
        first.get_or_insert(took);
        if number >= count - count.div_ceil(10) {
            last.saturating_record(took.as_nanos() as u64);
        }
    }
    let all = begun.elapsed();
    let begun = Instant::now();
    let list = control.get("/v1/vdis")?;
    let listed = begun.elapsed();
    let vdis = list.as_array().or_else(|| list["vdis"].as_array()).map_or(0, Vec::len);
    ensure!(vdis == count as usize + 1, "{vdis} disks are listed");
    let attach_after = attach_and_detach(&mut control)?;
    Ok(Clones {
        disk_bytes,
        used_bytes,
        first: first.unwrap_or_default(),
        each: Latency::of(&each),
        last: Latency::of(&last),
        all,
        list: listed,
        attach: (attach_before, attach_after),
        cycle: collect(&stage.agent, &mut control)?,
    })
}

/// One disk with many snapshots.
#[derive(Debug, Clone, Copy)]
pub struct Many {
    /// Snapshots.
    pub snapshots: u32,
    /// Attaching and detaching the disk.
    pub attach: Duration,
    /// The first page of 1,000, from the newest on.
    pub newest: Duration,
    /// A page of 1,000 from the middle.
    pub middle: Duration,
    /// One more snapshot, in the store.
    pub more: Duration,
    /// Deleting one from the middle.
    pub delete: Duration,
    /// The forest of all disks.
    pub tree: Duration,
    /// A cycle of collection.
    pub cycle: Cycle,
    /// Resident memory of the agent at most, collection not counted.
    pub peak_bytes: u64,
}

/// Works with a disk that has `snapshots` of them, which hold next to nothing.
///
/// # Errors
/// When there is no agent to measure, or it fails.
pub fn many(settings: &Settings, snapshots: u32) -> Result<Many> {
    let shape = Shape {
        used_bytes: settings.disk_bytes,
        snapshots,
        writes_per_snapshot: 0,
        ..Shape::default()
    };
    let stage = stage(settings, &shape)?;
    let mut control = stage.control()?;
    let name = disk_name(0);
    let attach = attach_and_detach(&mut control)?;
    let path = format!("/v1/vdis/{name}/snapshots/list");
    let (newest, _) = once(|| control.post(&path, &json!({ "limit": 1000 })))?;
    let (_, oldest) = once(|| control.post(&path, &json!({ "oldest_first": true, "limit": 1 })))?;
    let first = oldest["snapshots"][0]["lsn"].as_u64();
    let middle_of = |last: u64| first.map_or(last / 2, |first| first + (last - first) / 2);
    let (middle, page) = match snapshots {
        0 => (Duration::ZERO, Value::Null),
        _ => {
            let beyond = middle_of(self::newest(&mut control, &name)?);
            once(|| control.post(&path, &json!({ "beyond": beyond, "limit": 1000 })))?
        }
    };
    let delete = match page["snapshots"][0]["lsn"].as_u64() {
        None => Duration::ZERO,
        Some(lsn) => {
            let wanted = json!({ "snapshots": [lsn.to_string()] });
            let path = format!("/v1/vdis/{name}/snapshots/delete");
            once(|| control.post(&path, &wanted))?.0
        }
    };
    let (tree, _) = once(|| control.get("/v1/tree"))?;
    stage.agent.attach(&name)?;
    let (more, _) = once(|| {
        control.post(&format!("/v1/vdis/{name}/snapshots"), &json!({}))?;
        control.post("/v1/cache/drain", &json!({}))
    })?;
    let peak_bytes = stage.agent.process().memory("VmHWM")?;
    let cycle = collect(&stage.agent, &mut control)?;
    Ok(Many { snapshots, attach, newest, middle, more, delete, tree, cycle, peak_bytes })
}

/// What an empty snapshot leaves in the store.
#[derive(Debug, Clone, Copy)]
pub struct Empty {
    /// Snapshots.
    pub snapshots: u64,
    /// In how much time they were taken.
    pub took: Duration,
    /// Bytes that the store's disks reach, more than before, per snapshot.
    pub reachable_bytes: f64,
}

/// Takes empty snapshots, one every [`EMPTY_INTERVAL`].
///
/// # Errors
/// When there is no agent to measure, or it fails.
pub fn empty(settings: &Settings) -> Result<Empty> {
    let shape = Shape { used_bytes: settings.disk_bytes, ..Shape::default() };
    let stage = stage(settings, &shape)?;
    let mut control = stage.control()?;
    stage.agent.create(DISK_NAME, 1 << 30)?;
    let (agent, _files) = stage.into_parts();
    let ballast = Ballast::attach(agent, DISK_NAME)?;
    let before = collect(ballast.agent(), &mut control)?;
    let begun = Instant::now();
    let snapper = Snapper::start(&ballast, EMPTY_INTERVAL, Way::Request)?;
    std::thread::sleep(settings.sustained);
    let snapshots = snapper.stop()?.len();
    let took = begun.elapsed();
    ballast.agent().drain()?;
    let after = collect(ballast.agent(), &mut control)?;
    let per = |bytes: u64| bytes as f64 / snapshots.max(1) as f64;
    Ok(Empty {
        snapshots,
        took,
        reachable_bytes: per(after.reachable_bytes.saturating_sub(before.reachable_bytes)),
    })
}

fn stage(settings: &Settings, shape: &Shape) -> Result<Stage> {
    // The agent uses all cores, as it does in earnest.
    Stage::new(settings, shape, CACHE_BYTES, None, &[&NO_CYCLES[..], &NO_LIMIT].concat())
}

/// Attaches the first disk and detaches it again; how long the former took.
fn attach_and_detach(control: &mut Control) -> Result<Duration> {
    let path = format!("/v1/vdis/{}", disk_name(0));
    let (took, _) = once(|| control.post(&format!("{path}/attach"), &json!({})))?;
    control.post(&format!("{path}/detach"), &json!({}))?;
    Ok(took)
}

fn newest(control: &mut Control, disk: &str) -> Result<u64> {
    let list = control.post(&format!("/v1/vdis/{disk}/snapshots/list"), &json!({ "limit": 1 }))?;
    list["snapshots"][0]["lsn"].as_u64().context("a disk without snapshots")
}

fn once<T>(operation: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let begun = Instant::now();
    let value = operation()?;
    Ok((begun.elapsed(), value))
}

fn timed<T>(times: &mut Histogram<u64>, operation: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let (took, _) = once(operation)?;
    times.saturating_record(took.as_nanos() as u64);
    Ok(took)
}
